//! What the library relies on the driver for, asked of the driver itself: by whatever `libcuda` there is.

#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "calls of the driver with live handles and memory of the test's"
)]

use std::ffi::{CStr, CString, c_void};
use std::fs::File;
use std::io::Write;
use std::ptr;

use shardlift::Digest;

use super::driver::*;
use super::transform::{element, noise};

/// Statuses of what does not exist or cannot be had.
pub(crate) fn refusals_have_their_codes() {
    let (mut device, mut value, mut address) = (0, 0, 0);
    unsafe {
        assert_eq!(cuDeviceGet(&mut device, device_count()), INVALID_DEVICE);
        assert_eq!(cuDeviceGet(&mut device, -1), INVALID_DEVICE);
        assert_eq!(cuDeviceGetAttribute(&mut value, READ_ONLY_REGISTERING, device_count()), INVALID_DEVICE);
        let _context = Context::new();
        assert_eq!(cuMemAlloc_v2(&mut address, total_bytes() + (1 << 30)), OUT_OF_MEMORY);
        assert_eq!(cuMemAlloc_v2(&mut address, 0), INVALID_VALUE);
        let module = Module::load(PTX);
        assert_eq!(module.function(c"shardlift_nothing"), Err(NOT_FOUND));
    }
}

pub(crate) fn the_driver_knows_cuda_12() {
    let mut version = 0;
    unsafe { ok(cuDriverGetVersion(&mut version)) };
    assert!(version >= 12_000, "the driver knows CUDA up to {version}: the library needs 12000");
    assert!(attribute(MULTIPROCESSORS) > 0);
    assert!(matches!((attribute(READ_ONLY_REGISTERING), attribute(HOST_PAGE_TABLES)), (0 | 1, 0 | 1)));
}

pub(crate) fn primary_contexts_are_shared_and_counted() {
    assert!(current().is_null() && !is_active(0), "somebody has a context already");
    let (first, mut second) = (Context::new(), ptr::null_mut());
    unsafe { ok(cuDevicePrimaryCtxRetain(&mut second, 0)) };
    assert_eq!((first.0, current()), (second, second));
    drop(first);
    assert!(is_active(0));
    unsafe { ok(cuDevicePrimaryCtxRelease_v2(0)) };
    assert!(!is_active(0));
}

pub(crate) fn host_memory_is_registered_once() {
    let _context = Context::new();
    let registered = Registered::new(1 << 20);
    let address = registered.address();
    unsafe {
        assert_eq!(cuMemHostRegister_v2(address, 1 << 20, PORTABLE), ALREADY_REGISTERED);
        assert_eq!(cuMemHostRegister_v2(address.add(4096), 4096, PORTABLE), ALREADY_REGISTERED);
        let mut unknown = memmap2::MmapMut::map_anon(4096).unwrap();
        assert_eq!(cuMemHostUnregister(unknown.as_mut_ptr()), NOT_REGISTERED);
        ok(cuMemHostUnregister(address));
        assert_eq!(cuMemHostUnregister(address), NOT_REGISTERED);
        ok(cuMemHostRegister_v2(address, 1 << 20, PORTABLE));
    }
}

pub(crate) fn copies_from_registered_memory_are_under_way_until_the_event_says_otherwise() {
    const BYTES: usize = 8 << 20;
    const COPIES: usize = 8;
    let _context = Context::new();
    let mut source = Registered::new(BYTES);
    let target = Memory::filled(0, COPIES * BYTES);
    let (stream, event) = (Stream::new(), Event::new());
    // A thread that is not scheduled for long enough finds everything done: several rounds.
    let mut unready = 0;
    for round in 0..10 {
        let byte = |at: usize| (at / 7 + round) as u8;
        source.fill(byte);
        for copy in 0..COPIES {
            let to = target.address + (copy * BYTES) as u64;
            unsafe { ok(cuMemcpyHtoDAsync_v2(to, source.address(), BYTES, stream.0)) };
        }
        event.record(&stream);
        loop {
            match unsafe { cuEventQuery(event.0) } {
                SUCCESS => break,
                NOT_READY => unready += 1,
                status => panic!("cuEventQuery answers {status}"),
            }
            std::thread::yield_now();
        }
        assert_eq!(unsafe { cuStreamQuery(stream.0) }, SUCCESS);
        // What was read is not needed any more.
        source.fill(|_| 0xEE);
        let found = target.read();
        assert!(found.iter().enumerate().all(|(at, &found)| found == byte(at % BYTES)), "round {round}");
        if unready > 0 {
            return;
        }
    }
    panic!("no event was ever seen to be not ready");
}

pub(crate) fn streams_wait_for_events_of_others() {
    const BYTES: usize = 32 << 20;
    let _context = Context::new();
    let mut source = Registered::new(BYTES);
    source.fill(|at| (at / 5) as u8);
    let (landing, last) = (Memory::filled(0, BYTES), Memory::filled(1, BYTES));
    let (one, two, event) = (Stream::new(), Stream::new(), Event::new());
    unsafe {
        ok(cuMemcpyHtoDAsync_v2(landing.address, source.address(), BYTES, one.0));
        event.record(&one);
        ok(cuStreamWaitEvent(two.0, event.0, 0));
        ok(cuMemcpyDtoDAsync_v2(last.address, landing.address, BYTES, two.0));
        let done = Event::new();
        done.record(&two);
        ok(cuEventSynchronize(done.0));
    }
    assert!(last.read().iter().enumerate().all(|(at, &byte)| byte == (at / 5) as u8));
}

pub(crate) fn rows_are_copied_from_pitch_to_pitch() {
    const ROWS: usize = 700;
    let _context = Context::new();
    let stream = Stream::new();
    for (width, from_pitch, to_pitch) in [(16, 64, 16), (100, 100, 128), (1, 3, 2), (4096, 5000, 4099), (30, 30, 30)] {
        let mut source = Registered::new((ROWS * from_pitch).next_multiple_of(4096));
        source.fill(|at| (at * 7 / 5) as u8);
        let target = Memory::filled(0xAA, ROWS * to_pitch);
        let copy = Copy2D::to_device(source.address(), from_pitch, target.address, to_pitch, [width, ROWS]);
        unsafe { ok(cuMemcpy2DAsync_v2(&copy, stream.0)) };
        stream.synchronize();
        let mut expected = vec![0xAA; ROWS * to_pitch];
        for row in 0..ROWS {
            for at in 0..width {
                expected[row * to_pitch + at] = ((row * from_pitch + at) * 7 / 5) as u8;
            }
        }
        assert!(target.read() == expected, "{width} of {from_pitch} to {to_pitch}");
        // A pitch of 0 is no pitch.
        if width > 1 {
            let wide = Copy2D::to_device(source.address(), width - 1, target.address, to_pitch, [width, ROWS]);
            assert_eq!(unsafe { cuMemcpy2DAsync_v2(&wide, stream.0) }, INVALID_VALUE, "a pitch below {width}");
        }
    }
}

pub(crate) fn allocations_take_free_memory() {
    const BYTES: usize = 256 << 20;
    let _context = Context::new();
    let before = free_bytes();
    let memory = Memory::new(BYTES);
    let with = free_bytes();
    assert!(with + BYTES <= before, "{before} bytes were free, and {with} with {BYTES} more in use");
    drop(memory);
    assert!(free_bytes() >= with + BYTES);
}

pub(crate) fn memory_of_the_pool_is_there_in_the_order_of_its_stream() {
    const BYTES: usize = 3 << 20;
    let _context = Context::new();
    let stream = Stream::new();
    let bytes = noise(BYTES);
    let (mut address, mut found) = (0, vec![0; BYTES]);
    unsafe {
        ok(cuMemAllocAsync(&mut address, BYTES, stream.0));
        ok(cuMemcpyHtoDAsync_v2(address, bytes.as_ptr(), BYTES, stream.0));
        ok(cuMemcpyDtoHAsync_v2(found.as_mut_ptr(), address, BYTES, stream.0));
        ok(cuMemFreeAsync(address, stream.0));
    }
    stream.synchronize();
    assert!(found == bytes);
}

pub(crate) fn virtual_memory_is_mapped_and_taken_apart() {
    let _context = Context::new();
    let prop = AllocationProp::exportable(0);
    let (mut unit, mut memory, mut address) = (0, 0, 0);
    unsafe {
        ok(cuMemGetAllocationGranularity(&mut unit, &prop, 0));
        assert!(unit.is_power_of_two() && unit >= 4096, "a granularity of {unit}");
        assert_eq!(cuMemCreate(&mut memory, unit + 1, &prop, 0), INVALID_VALUE);
        let bytes = 3 * unit;
        let before = free_bytes();
        match cuMemCreate(&mut memory, bytes, &prop, 0) {
            // As in containers without the right to file descriptors of the driver.
            status @ (NOT_PERMITTED | NOT_SUPPORTED) => return super::skip(&format!("cuMemCreate answers {status}")),
            status => ok(status),
        }
        assert!(free_bytes() + bytes <= before);
        ok(cuMemAddressReserve(&mut address, bytes, 0, 0, 0));
        assert!(address.is_multiple_of(unit as u64));
        ok(cuMemMap(address, bytes, 0, memory, 0));
        ok(cuMemSetAccess(address, bytes, &AccessDesc::read_write(0), 1));
        // The mapping keeps the memory.
        ok(cuMemRelease(memory));
        let source = noise(bytes - 5);
        ok(cuMemsetD8_v2(address, 9, bytes));
        ok(cuMemcpyHtoD_v2(address + 5, source.as_ptr(), source.len()));
        let found = read(address, bytes);
        assert!(found[..5] == [9; 5] && found[5..] == source);
        ok(cuMemUnmap(address, bytes));
        ok(cuMemAddressFree(address, bytes));
        assert!(free_bytes() + unit > before);
    }
}

pub(crate) fn mappings_of_files_are_registered_where_the_attribute_says_so() {
    const BYTES: usize = 6 << 20;
    let _context = Context::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mapped");
    let bytes = noise(BYTES);
    File::create(&path).unwrap().write_all(&bytes).unwrap();
    // Pages are only read, and the file is the test's own.
    let mapping = unsafe { memmap2::Mmap::map(&File::open(&path).unwrap()) }.unwrap();
    let address = mapping.as_ptr().cast_mut();
    let stream = Stream::new();
    let target = Memory::filled(0, BYTES);
    unsafe {
        let status = cuMemHostRegister_v2(address, BYTES, PORTABLE | READ_ONLY);
        if attribute(READ_ONLY_REGISTERING) == 0 {
            return assert_eq!(status, NOT_SUPPORTED);
        }
        ok(status);
        ok(cuMemcpyHtoDAsync_v2(target.address, address, BYTES, stream.0));
        stream.synchronize();
        let columns = Memory::filled(0, BYTES / 4);
        let copy = Copy2D::to_device(address.add(8), 64, columns.address, 16, [16, BYTES / 64]);
        ok(cuMemcpy2DAsync_v2(&copy, stream.0));
        stream.synchronize();
        ok(cuMemHostUnregister(address));
        let expected: Vec<u8> = bytes.chunks(64).flat_map(|row| &row[8..24]).copied().collect();
        assert!(target.read() == bytes && columns.read() == expected);
    }
}

/// A kernel on a few blocks, and what it made of `len` bytes that were 0xAA.
fn launch(module: &Module, name: &str, source: &[u8], len: usize, more: &mut [Parameter]) -> Vec<u8> {
    let kernel = module.function(&CString::new(name).unwrap());
    let kernel = kernel.unwrap_or_else(|status| panic!("no kernel {name}: {status}"));
    let (source, target, stream) = (Memory::of(source), Memory::filled(0xAA, len), Stream::new());
    let (mut from, mut to) = (source.address, target.address);
    let mut parameters: Vec<*mut c_void> = vec![(&raw mut from).cast(), (&raw mut to).cast()];
    parameters.extend(more.iter_mut().map(|parameter| match parameter {
        Parameter::Word(word) => (&raw mut *word).cast::<c_void>(),
        Parameter::Loops(loops) => (&raw mut *loops).cast(),
    }));
    unsafe {
        let (parameters, none) = (parameters.as_mut_ptr(), ptr::null_mut());
        ok(cuLaunchKernel(kernel, 5, 1, 1, 256, 1, 1, 0, stream.0, parameters, none));
    }
    stream.synchronize();
    target.read()
}

/// A kernel's parameter by value.
enum Parameter {
    Word(u64),
    /// Counts, strides of the source, strides of the destination; outermost first.
    Loops([[u64; 5]; 3]),
}

pub(crate) fn gathers_copy_each_run() {
    let _context = Context::new();
    let module = Module::load(PTX);
    for unit in [1, 2, 4, 8, 16] {
        let run = 3 * unit;
        let (counts, from, to) = ([1, 1, 3, 7, 11], [0, 0, 7 * 640, 640, 48], [0, 0, 7 * 800, 800, 64]);
        let source = noise(3 * 7 * 640 + 1024);
        let mut expected = vec![0xAA; 3 * 7 * 800 + 1024];
        for (a, b, c) in (0..3).flat_map(|a| (0..7).flat_map(move |b| (0..11).map(move |c| (a, b, c)))) {
            let (src, dst) = (a * 4480 + b * 640 + c * 48, a * 5600 + b * 800 + c * 64);
            expected[dst..dst + run].copy_from_slice(&source[src..src + run]);
        }
        let mut more = [Parameter::Loops([counts, from, to]), Parameter::Word(run as u64)];
        let found = launch(&module, &format!("shardlift_gather_{unit}"), &source, expected.len(), &mut more);
        assert!(found == expected, "{unit} bytes at a time");
    }
}

pub(crate) fn transpositions_swap_rows_and_columns() {
    let _context = Context::new();
    let module = Module::load(PTX);
    for size in [1, 2, 4, 8] {
        let (batch, rows, cols) = (3, 77, 130);
        let source = noise(batch * rows * cols * size);
        let mut expected = vec![0; source.len()];
        for (b, row, col) in (0..batch).flat_map(|b| (0..rows).flat_map(move |r| (0..cols).map(move |c| (b, r, c)))) {
            let (src, dst) = ((b * rows + row) * cols + col, (b * cols + col) * rows + row);
            expected[dst * size..][..size].copy_from_slice(&source[src * size..][..size]);
        }
        let matrix = rows * cols * size;
        let words = [batch, rows, cols, matrix, cols * size, matrix, rows * size];
        let mut more = words.map(|word| Parameter::Word(word as u64));
        let found = launch(&module, &format!("shardlift_transpose_{size}"), &source, expected.len(), &mut more);
        assert!(found == expected, "elements of {size} bytes");
    }
}

pub(crate) fn casts_are_those_of_the_host() {
    use shardlift::Dtype::{Bf16, F8E4M3, F8E5M2, F16, F32};
    let _context = Context::new();
    let module = Module::load(PTX);
    for (from, targets) in [
        (F32, [F16, Bf16].as_slice()),
        (F16, &[F32, Bf16]),
        (Bf16, &[F32, F16]),
        (F8E4M3, &[F32, F16, Bf16]),
        (F8E5M2, &[F32, F16, Bf16]),
    ] {
        let size = from.bits() as usize / 8;
        // Every value of 8 and of 16 bits; of 32 bits as many as differ in their upper half, and where rounding turns.
        let source: Vec<u8> = match size {
            1 => (0..=u8::MAX).collect(),
            2 => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
            _ => (0..=u16::MAX)
                .flat_map(|upper| {
                    [0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001].map(|low| u32::from(upper) << 16 | low)
                })
                .flat_map(u32::to_le_bytes)
                .collect(),
        };
        for &to in targets {
            let elements = source.len() / size;
            let expected: Vec<u8> = source.chunks(size).flat_map(|bits| element(from, to, bits)).collect();
            let name = format!("shardlift_cast_{}_{}", from.name().to_lowercase(), to.name().to_lowercase());
            let mut more = [Parameter::Loops([[1; 5], [0; 5], [0; 5]]), Parameter::Word(elements as u64)];
            let found = launch(&module, &name, &source, expected.len(), &mut more);
            let bits = to.bits() as usize / 8;
            let wrong = found.chunks(bits).zip(expected.chunks(bits)).position(|(found, expected)| found != expected);
            assert_eq!(wrong, None, "the first element that {name} casts otherwise");
        }
    }
}

pub(crate) fn digests_are_those_of_the_host() {
    let _context = Context::new();
    let module = Module::load(PTX);
    let kernel = module.function(c"shardlift_digest").unwrap();
    for bytes in [1, 8, 4095, 1_000_003] {
        let bytes = noise(bytes);
        let (source, sum, stream) = (Memory::of(&bytes), Memory::filled(0, 8), Stream::new());
        let (mut from, mut length, mut to) = (source.address, bytes.len() as u64, sum.address);
        let mut parameters: [*mut c_void; 3] = [(&raw mut from).cast(), (&raw mut length).cast(), (&raw mut to).cast()];
        let (parameters, none) = (parameters.as_mut_ptr(), ptr::null_mut());
        unsafe { ok(cuLaunchKernel(kernel, 7, 1, 1, 256, 1, 1, 0, stream.0, parameters, none)) };
        stream.synchronize();
        assert_eq!(sum.read(), Digest::of(&bytes).to_le_bytes(), "of {} bytes", bytes.len());
    }
}

/// Every kernel of the PTX is one that the tests above launch.
pub(crate) fn every_kernel_is_in_the_module() {
    let _context = Context::new();
    let module = Module::load(PTX);
    let names: Vec<&str> =
        PTX.lines().filter_map(|line| line.strip_prefix(".visible .entry ")?.strip_suffix('(')).collect();
    assert_eq!(names.len(), 5 + 4 + 12 + 1);
    for name in names {
        let text = CString::new(name).unwrap();
        assert!(module.function(CStr::from_bytes_with_nul(text.as_bytes_with_nul()).unwrap()).is_ok(), "{name}");
    }
}
