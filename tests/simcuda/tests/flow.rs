//! A flow of all that a loader does, through unmodified cudarc, on the twin.

#![allow(clippy::undocumented_unsafe_blocks, reason = "calls of the driver, whose twin checks what it gets")]

use cudarc::driver::result::{event, stream};
use cudarc::driver::{CudaContext, DriverError, result, sys};

fn code(result: Result<(), DriverError>) -> u32 {
    result.map_or_else(|error| error.0 as u32, |()| 0)
}

#[test]
fn copies_through_the_safe_layer_arrive() {
    twins::cuda::load();
    let context = CudaContext::new(0).unwrap();
    assert_eq!(CudaContext::device_count().unwrap(), 4);
    assert_eq!(context.compute_capability().unwrap(), (9, 0));
    let stream = context.new_stream().unwrap();
    let host: Vec<f32> = (0..100_000).map(|i| i as f32).collect();
    let on_device = stream.clone_htod(&host).unwrap();
    assert_eq!(stream.clone_dtoh(&on_device).unwrap(), host);
    let mut zeros = stream.alloc_zeros::<f32>(1000).unwrap();
    stream.memcpy_dtod(&on_device.slice(..1000), &mut zeros).unwrap();
    assert_eq!(stream.clone_dtoh(&zeros).unwrap(), host[..1000]);

    let mut pinned = unsafe { context.alloc_pinned::<u8>(5000) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(7);
    let copied = stream.clone_htod(&pinned).unwrap();
    assert_eq!(stream.clone_dtoh(&copied).unwrap(), [7; 5000]);

    let other = CudaContext::new(2).unwrap();
    let stream = other.new_stream().unwrap();
    let peer = stream.clone_dtod(&on_device).unwrap();
    assert_eq!(stream.clone_dtoh(&peer).unwrap(), host);
    assert_eq!(code(CudaContext::new(9).map(drop)), 101);
    context.check_err().unwrap();
}

#[test]
fn fresh_memory_is_poisoned_and_counted() {
    twins::cuda::load();
    let context = CudaContext::new(1).unwrap();
    context.bind_to_thread().unwrap();
    let (free, total) = result::mem_get_info().unwrap();
    assert_eq!(total, 1 << 30);
    let memory = unsafe { result::malloc_sync(10_000) }.unwrap();
    assert!(result::mem_get_info().unwrap().0 <= free - 10_000);
    let mut bytes = [0_u8; 10_000];
    unsafe { result::memcpy_dtoh_sync(&mut bytes, memory) }.unwrap();
    assert_eq!(bytes, [0xCD; 10_000]);
    assert_eq!(code(unsafe { result::malloc_sync(2 << 30) }.map(drop)), 2);
    unsafe { result::free_sync(memory) }.unwrap();
    assert_eq!(result::mem_get_info().unwrap().0, free);
}

#[test]
fn registered_memory_strided_copies_and_events() {
    twins::cuda::load();
    let context = CudaContext::new(3).unwrap();
    context.bind_to_thread().unwrap();
    let mut source: Vec<u8> = (0..64 * 1000).map(|i| (i % 251) as u8).collect();
    unsafe {
        let bytes = source.len();
        let mut register = || sys::cuMemHostRegister_v2(source.as_mut_ptr().cast(), bytes, 1).result();
        register().unwrap();
        assert_eq!(code(register()), 712);
        let queue = stream::create(stream::StreamKind::NonBlocking).unwrap();
        let done = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
        let memory = result::malloc_sync(16 * 1000).unwrap();
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 8,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: source.as_ptr().cast(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: 64,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: memory,
            dstArray: std::ptr::null_mut(),
            dstPitch: 16,
            WidthInBytes: 16,
            Height: 1000,
        };
        sys::cuMemcpy2DAsync_v2(&copy, queue).result().unwrap();
        event::record(done, queue).unwrap();
        while event::query(done) == Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) {
            std::thread::yield_now();
        }
        event::query(done).unwrap();
        let mut columns = vec![0_u8; 16 * 1000];
        result::memcpy_dtoh_sync(&mut columns, memory).unwrap();
        let expected: Vec<u8> = source.chunks(64).flat_map(|row| &row[8..24]).copied().collect();
        assert_eq!(columns, expected);
        sys::cuMemHostUnregister(source.as_mut_ptr().cast()).result().unwrap();
        result::free_sync(memory).unwrap();
        event::destroy(done).unwrap();
        stream::destroy(queue).unwrap();
    }
}

#[test]
fn virtual_memory_is_exported_and_imported() {
    twins::cuda::load();
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    let location = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: 0 };
    unsafe {
        let mut prop: sys::CUmemAllocationProp = std::mem::zeroed();
        prop.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location = location;
        prop.requestedHandleTypes = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let mut unit = 0;
        let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        sys::cuMemGetAllocationGranularity(&mut unit, &prop, minimum).result().unwrap();
        let mut handle = 0;
        assert_eq!(code(sys::cuMemCreate(&mut handle, unit + 1, &prop, 0).result()), 1);
        sys::cuMemCreate(&mut handle, unit, &prop, 0).result().unwrap();
        let mut file = -1_i32;
        let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        sys::cuMemExportToShareableHandle((&raw mut file).cast(), handle, kind, 0).result().unwrap();
        let mut imported = 0;
        sys::cuMemImportFromShareableHandle(&mut imported, file as usize as *mut _, kind).result().unwrap();
        let mut addresses = [0; 2];
        for (address, handle) in addresses.iter_mut().zip([handle, imported]) {
            sys::cuMemAddressReserve(address, 2 * unit, 0, 0, 0).result().unwrap();
            sys::cuMemMap(*address + unit as u64, unit, 0, handle, 0).result().unwrap();
            let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
            let access = sys::CUmemAccessDesc { location, flags };
            sys::cuMemSetAccess(*address + unit as u64, unit, &access, 1).result().unwrap();
            sys::cuMemRelease(handle).result().unwrap();
        }
        result::memcpy_htod_sync(addresses[0] + unit as u64, &[1_u8, 2, 3, 4]).unwrap();
        let mut read = [0_u8; 5];
        result::memcpy_dtoh_sync(&mut read, addresses[1] + unit as u64).unwrap();
        assert_eq!(read, [1, 2, 3, 4, 0xCD]);
        for address in addresses {
            sys::cuMemUnmap(address + unit as u64, unit).result().unwrap();
            sys::cuMemAddressFree(address, 2 * unit).result().unwrap();
        }
    }
}
