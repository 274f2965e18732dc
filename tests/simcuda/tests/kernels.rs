//! The kernels, compiled for the host, against their definitions; and the committed PTX against what was compiled.
//!
//! What is proved here is the arithmetic: indices, bits, sums. That NVRTC makes the committed PTX of the same text is
//! what `scripts/kernels --check` proves.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_void};

use half::{bf16, f16};
// The kernels are linked into it.
use simcuda as _;

#[test]
fn every_kernel_is_in_the_ptx_with_the_same_parameters() {
    assert!(PTX.lines().any(|line| line == ".version 8.0"), "every driver of CUDA 12 takes PTX 8.0");
    assert!(PTX.lines().any(|line| line == ".target sm_70"), "every card from V100 on takes compute_70");
    let compiled: BTreeMap<_, _> =
        kernels().iter().map(|kernel| (kernel.name(), kernel.param_bytes().to_vec())).collect();
    assert_eq!(ptx_entries(), compiled);
}

#[test]
fn gathers_copy_each_run_of_the_loops() {
    let mut random = Random(1);
    for unit in [1, 2, 4, 8, 16] {
        for _ in 0..60 {
            let run = random.below(40) * unit;
            let case = Strided::random(&mut random, unit as u64, run as u64, run as u64);
            let source = random.bytes(case.src_bytes);
            let mut expected = Buffer::poisoned(case.dst_bytes);
            case.for_each_run(|src, dst| {
                expected.bytes_mut()[dst..dst + run].copy_from_slice(&source.bytes()[src..src + run]);
            });
            let mut found = Buffer::poisoned(case.dst_bytes);
            Launch::new(&format!("shardlift_gather_{unit}"))
                .pointer(source.bytes().as_ptr())
                .pointer(found.bytes_mut().as_mut_ptr())
                .words(&case.loops())
                .words(&[run as u64])
                .on(random.blocks());
            assert!(found.bytes() == expected.bytes(), "unit {unit}, run {run}, {case:?}");
        }
    }
}

#[test]
fn a_gather_without_runs_or_indices_writes_nothing() {
    for (count, run) in [(0, 16), (7, 0)] {
        let source = Random(2).bytes(256);
        let mut found = Buffer::poisoned(256);
        let mut loops = [0; 15];
        loops[..5].copy_from_slice(&[1, 1, count, 1, 1]);
        Launch::new("shardlift_gather_16")
            .pointer(source.bytes().as_ptr())
            .pointer(found.bytes_mut().as_mut_ptr())
            .words(&loops)
            .words(&[run])
            .on(3);
        assert!(found.bytes() == Buffer::poisoned(256).bytes());
    }
}

#[test]
fn transpositions_swap_rows_and_columns_of_each_matrix() {
    let mut random = Random(3);
    for size in [1, 2, 4, 8] {
        for round in 0..40 {
            let (batch, rows, cols) = (random.below(4), random.below(100), random.below(100));
            // Sources may be misaligned, destinations are not.
            let misaligned = if round % 2 == 0 { 0 } else { random.below(16) };
            let src_row_stride = cols * size + random.below(3) * if misaligned == 0 { size } else { 1 };
            let src_batch_stride = rows * src_row_stride + random.below(3) * size;
            let dst_col_stride = (rows + random.below(3)) * size;
            let dst_batch_stride = cols * dst_col_stride + random.below(3) * size;

            let source = random.bytes(misaligned + batch * src_batch_stride + 16);
            let mut expected = Buffer::poisoned(batch * dst_batch_stride + 16);
            for (b, row, col) in indices(batch, rows, cols) {
                let src = misaligned + b * src_batch_stride + row * src_row_stride + col * size;
                let dst = b * dst_batch_stride + col * dst_col_stride + row * size;
                expected.bytes_mut()[dst..dst + size].copy_from_slice(&source.bytes()[src..src + size]);
            }
            let mut found = Buffer::poisoned(batch * dst_batch_stride + 16);
            let sizes = [batch, rows, cols, src_batch_stride, src_row_stride, dst_batch_stride, dst_col_stride];
            let launch = Launch::new(&format!("shardlift_transpose_{size}"))
                .pointer(source.bytes()[misaligned..].as_ptr())
                .pointer(found.bytes_mut().as_mut_ptr());
            sizes.iter().fold(launch, |launch, &size| launch.words(&[size as u64])).on(random.blocks());
            assert!(found.bytes() == expected.bytes(), "{size} bytes, {sizes:?}, misaligned by {misaligned}");
        }
    }
}

#[test]
fn casts_of_16_bits_are_those_of_the_half_crate() {
    let every: Vec<u16> = (0..=u16::MAX).collect();
    check_cast("f16_f32", &every, |bits| f16::from_bits(bits).to_f32().to_bits());
    check_cast("bf16_f32", &every, |bits| bf16::from_bits(bits).to_f32().to_bits());
    check_cast("f16_bf16", &every, |bits| bf16::from_f32(f16::from_bits(bits).to_f32()).to_bits());
    check_cast("bf16_f16", &every, |bits| f16::from_f32(bf16::from_bits(bits).to_f32()).to_bits());
}

#[test]
fn casts_of_f32_are_those_of_the_half_crate() {
    // Around every place where rounding can change its mind, in every binade, of either sign; and at random.
    let edges: Vec<u32> =
        (0..24).flat_map(|bit| [-2i32, -1, 0, 1, 2].map(|near| (1u32 << bit).wrapping_add_signed(near))).collect();
    let mut values = Vec::new();
    for upper in 0..=0x1ff_u32 {
        for &edge in &edges {
            values.push(upper << 23 | edge & 0x7f_ffff);
            values.push(upper << 23 | !edge & 0x7f_ffff);
            for other in 9..23 {
                values.push(upper << 23 | (edge ^ 1 << other) & 0x7f_ffff);
            }
        }
    }
    let mut random = Random(4);
    values.extend((0..1_000_000).map(|_| random.next() as u32));
    check_cast("f32_f16", &values, |bits| f16::from_f32(f32::from_bits(bits)).to_bits());
    check_cast("f32_bf16", &values, |bits| bf16::from_f32(f32::from_bits(bits)).to_bits());
}

#[test]
fn casts_of_8_bits_are_the_values_of_the_format() {
    let every: Vec<u8> = (0..=u8::MAX).collect();
    for (name, value) in [("f8_e4m3", e4m3 as fn(u8) -> f64), ("f8_e5m2", e5m2)] {
        // All values are representable, so that f64 converts them exactly; NaN is the canonical one with the sign kept.
        let sign = |bits: u8| u32::from(bits >> 7);
        let nan = |bits: u8| value(bits).is_nan();
        check_cast(&format!("{name}_f32"), &every, |bits| {
            if nan(bits) { sign(bits) << 31 | 0x7fc0_0000 } else { (value(bits) as f32).to_bits() }
        });
        check_cast(&format!("{name}_f16"), &every, |bits| {
            if nan(bits) { (sign(bits) << 15) as u16 | 0x7e00 } else { f16::from_f64(value(bits)).to_bits() }
        });
        check_cast(&format!("{name}_bf16"), &every, |bits| {
            if nan(bits) { (sign(bits) << 15) as u16 | 0x7fc0 } else { bf16::from_f64(value(bits)).to_bits() }
        });
    }
}

#[test]
fn casts_walk_the_loops_with_strides_of_either_side() {
    let mut random = Random(5);
    for round in 0..60 {
        let elements = random.below(40);
        let mut case = Strided::random(&mut random, 1, elements as u64 * 4, elements as u64 * 2);
        case.dst_stride.iter_mut().for_each(|stride| *stride *= 2);
        case.dst_bytes *= 2;
        // Sources may be misaligned: their strides are any number of bytes.
        let misaligned = round % 5;
        let source = random.bytes(misaligned + case.src_bytes);
        let mut expected = Buffer::poisoned(case.dst_bytes);
        case.for_each_run(|src, dst| {
            for element in 0..elements {
                let from = misaligned + src + element * 4;
                let bits = u32::from_le_bytes(source.bytes()[from..from + 4].try_into().unwrap());
                let cast = bf16::from_f32(f32::from_bits(bits)).to_bits();
                let to = dst + element * 2;
                expected.bytes_mut()[to..to + 2].copy_from_slice(&cast.to_le_bytes());
            }
        });
        let mut found = Buffer::poisoned(case.dst_bytes);
        Launch::new("shardlift_cast_f32_bf16")
            .pointer(source.bytes()[misaligned..].as_ptr())
            .pointer(found.bytes_mut().as_mut_ptr())
            .words(&case.loops())
            .words(&[elements as u64])
            .on(random.blocks());
        assert!(found.bytes() == expected.bytes(), "{elements} elements, misaligned by {misaligned}, {case:?}");
    }
}

#[test]
fn the_digest_is_the_sum_of_the_definition() {
    let mut random = Random(6);
    for bytes in (0..40).chain([255, 2048, 4097, 100_003]) {
        let source = random.bytes(bytes);
        let before = random.next();
        let mut sum = before;
        Launch::new("shardlift_digest")
            .pointer(source.bytes().as_ptr())
            .words(&[bytes as u64])
            .pointer(&raw mut sum)
            .on(random.blocks());
        assert_eq!(sum, before.wrapping_add(digest(source.bytes())), "{bytes} bytes");
    }
}

/// Converts all of `values` in one run and holds each result against `expected`.
fn check_cast<From: Copy + std::fmt::LowerHex, To: Copy + Default + PartialEq + std::fmt::LowerHex>(
    name: &str,
    values: &[From],
    expected: impl Fn(From) -> To,
) {
    let mut found = vec![To::default(); values.len()];
    let mut loops = [0; 15];
    loops[..5].fill(1);
    Launch::new(&format!("shardlift_cast_{name}"))
        .pointer(values.as_ptr())
        .pointer(found.as_mut_ptr())
        .words(&loops)
        .words(&[values.len() as u64])
        .on(7);
    for (&value, &found) in values.iter().zip(&found) {
        let expected = expected(value);
        assert!(found == expected, "{name} of {value:#x}: expected {expected:#x}, found {found:#x}");
    }
}

/// The value of an OCP E4M3 number.
fn e4m3(bits: u8) -> f64 {
    if bits & 0x7f == 0x7f { f64::NAN } else { small_float(bits, 3, 7) }
}

/// The value of an OCP E5M2 number.
fn e5m2(bits: u8) -> f64 {
    match bits & 0x7f {
        0x7c => f64::INFINITY.copysign(small_float(bits, 2, 15)),
        0x7d.. => f64::NAN,
        _ => small_float(bits, 2, 15),
    }
}

/// (-1)^sign * 2^(exponent - bias) * 1.mantissa, or 0.mantissa in the lowest binade.
fn small_float(bits: u8, mantissa_bits: u32, bias: i32) -> f64 {
    let exponent = i32::from(bits & 0x7f) >> mantissa_bits;
    let fraction = f64::from(bits & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    let magnitude =
        if exponent == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(exponent - bias) };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}

/// The digest of a tensor, by its definition.
fn digest(bytes: &[u8]) -> u64 {
    let golden = 0x9e37_79b9_7f4a_7c15_u64;
    bytes.chunks(8).zip(1u64..).fold(0u64, |sum, (chunk, position)| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let mut z = (u64::from_le_bytes(word) ^ position.wrapping_mul(golden)).wrapping_add(golden);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        sum.wrapping_add(z ^ z >> 31)
    })
}

/// A strided copy whose runs do not overlap at the destination, with gaps that must stay as they are.
#[derive(Debug)]
struct Strided {
    count: [u64; 5],
    src_stride: [u64; 5],
    dst_stride: [u64; 5],
    src_bytes: usize,
    dst_bytes: usize,
}

impl Strided {
    /// All strides are multiples of `unit`; a run takes `src_run` and `dst_run` bytes.
    fn random(random: &mut Random, unit: u64, src_run: u64, dst_run: u64) -> Strided {
        let mut case = Strided { count: [1; 5], src_stride: [0; 5], dst_stride: [0; 5], src_bytes: 0, dst_bytes: 0 };
        let mut dst_bytes = dst_run;
        // Which loop is the innermost at the destination does not follow from its place in the list.
        let first = random.below(5);
        for loop_ in (0..5).map(|i| (first + i * 2) % 5).filter(|_| random.below(3) > 0).collect::<Vec<_>>() {
            case.count[loop_] = 1 + random.below(5) as u64;
            case.src_stride[loop_] = random.below(60) as u64 * unit;
            case.dst_stride[loop_] = dst_bytes + random.below(3) as u64 * unit;
            dst_bytes = case.dst_stride[loop_] * case.count[loop_];
        }
        let last = |strides: &[u64; 5]| (0..5).map(|i| (case.count[i] - 1) * strides[i]).sum::<u64>();
        case.src_bytes = (last(&case.src_stride) + src_run) as usize;
        case.dst_bytes = dst_bytes as usize;
        case
    }

    fn for_each_run(&self, mut run: impl FnMut(usize, usize)) {
        for flat in 0..self.count.iter().product() {
            let (mut rest, mut src, mut dst) = (flat, 0, 0);
            for i in (0..5).rev() {
                src += rest % self.count[i] * self.src_stride[i];
                dst += rest % self.count[i] * self.dst_stride[i];
                rest /= self.count[i];
            }
            run(src as usize, dst as usize);
        }
    }

    /// The kernels' `Loops`.
    fn loops(&self) -> [u64; 15] {
        let mut words = [0; 15];
        words[..5].copy_from_slice(&self.count);
        words[5..10].copy_from_slice(&self.src_stride);
        words[10..].copy_from_slice(&self.dst_stride);
        words
    }
}

fn indices(batch: usize, rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..batch).flat_map(move |b| (0..rows).flat_map(move |row| (0..cols).map(move |col| (b, row, col))))
}

/// Bytes that start on 16 bytes.
struct Buffer {
    words: Vec<u128>,
    bytes: usize,
}

impl Buffer {
    fn poisoned(bytes: usize) -> Buffer {
        Buffer { words: vec![u128::from_ne_bytes([0xCD; 16]); bytes.div_ceil(16)], bytes }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the words are initialised and span at least `bytes` bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the words are borrowed exclusively; any bytes make a u128.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.bytes) }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// One block, a few, or more than there is work for.
    fn blocks(&mut self) -> u32 {
        [1, 2, 3, 7, 50][self.below(5)]
    }

    fn bytes(&mut self, bytes: usize) -> Buffer {
        let mut buffer = Buffer::poisoned(bytes);
        buffer.bytes_mut().iter_mut().for_each(|byte| *byte = self.next() as u8);
        buffer
    }
}

/// A launch in the making: the kernel and its arguments, each on its own words.
struct Launch {
    kernel: &'static SimKernel,
    arguments: Vec<Box<[u64]>>,
}

impl Launch {
    fn new(name: &str) -> Launch {
        let kernel = kernels().iter().find(|kernel| kernel.name() == name);
        Launch { kernel: kernel.unwrap_or_else(|| panic!("no kernel {name}")), arguments: Vec::new() }
    }

    fn words(mut self, words: &[u64]) -> Launch {
        self.arguments.push(words.into());
        self
    }

    fn pointer<T>(self, pointer: *const T) -> Launch {
        self.words(&[pointer.expose_provenance() as u64])
    }

    /// Runs it in so many blocks of 256 threads.
    fn on(mut self, blocks: u32) {
        let bytes: Vec<_> = self.arguments.iter().map(|words| size_of_val(&**words) as u32).collect();
        assert_eq!(bytes, self.kernel.param_bytes(), "{}", self.kernel.name());
        let mut arguments: Vec<*mut c_void> =
            self.arguments.iter_mut().map(|words| words.as_mut_ptr().cast()).collect();
        // SAFETY: the arguments have the kernel's sizes, and the callers' buffers hold what the kernel touches.
        unsafe { (self.kernel.launch)(arguments.as_mut_ptr(), &[blocks, 1, 1], &[256, 1, 1], 0) }
    }
}

/// `SimKernel` of `shim/cuda_shim.h`.
#[repr(C)]
struct SimKernel {
    name: *const c_char,
    params: u32,
    param_bytes: *const u32,
    launch: unsafe extern "C" fn(*mut *mut c_void, *const [u32; 3], *const [u32; 3], u32),
}

impl SimKernel {
    fn name(&self) -> &str {
        // SAFETY: a literal of the shim.
        unsafe { CStr::from_ptr(self.name) }.to_str().unwrap()
    }

    fn param_bytes(&self) -> &[u32] {
        // SAFETY: a static array of the shim, of so many entries.
        unsafe { std::slice::from_raw_parts(self.param_bytes, self.params as usize) }
    }
}

unsafe extern "C" {
    fn simcuda_kernels(count: *mut usize) -> *const SimKernel;
}

fn kernels() -> &'static [SimKernel] {
    let mut count = 0;
    // SAFETY: the shim returns a static array and its length.
    unsafe {
        let kernels = simcuda_kernels(&mut count);
        std::slice::from_raw_parts(kernels, count)
    }
}

/// The kernels of the committed PTX, each with the sizes of its parameters.
fn ptx_entries() -> BTreeMap<&'static str, Vec<u32>> {
    let parameter_bytes = |line: &str| match line.trim().strip_prefix(".param .")? {
        line if line.starts_with("u64 ") => Some(8),
        line => line.rsplit_once('[')?.1.trim_end_matches(',').trim_end_matches(']').parse().ok(),
    };
    let entries = PTX.split(".visible .entry ").skip(1);
    entries
        .map(|entry| {
            let (name, rest) = entry.split_once('(').unwrap();
            let (parameters, _) = rest.split_once(')').unwrap();
            (name, parameters.lines().filter_map(parameter_bytes).collect())
        })
        .collect()
}

const PTX: &str = include_str!("../../../kernels/shardlift.ptx");
