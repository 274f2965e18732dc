//! The driver's functions, one for each that is used: every status is looked at, none is thrown away but where nothing
//! can be done about it. The only file that names cudarc's `sys`.
//!
//! # Safety
//! of every function here, besides what its own documentation says: the driver is loaded (see [`super::library`]),
//! handles are live, and where a function works in "the current context", that is the one that its handles were made in.

#![expect(clippy::undocumented_unsafe_blocks, reason = "every function here passes its own duties on, see above")]

use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr;

use cudarc::driver::sys;

pub(super) use sys::CUdevice_attribute as Attribute;
pub(super) use sys::{
    CUcontext as RawContext, CUdevice as RawDevice, CUevent as RawEvent, CUfunction as RawFunction,
    CUmemGenericAllocationHandle as RawHandle, CUmodule as RawModule, CUstream as RawStream,
};

/// A call that the driver refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) call: &'static str,
    status: sys::CUresult,
}

pub(super) type Status<T> = Result<T, Failure>;

impl Failure {
    /// Not enough memory of the device. What the system lets be pinned is another matter.
    pub(super) fn is_out_of_memory(self) -> bool {
        self.status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY && self.call != "cuMemHostRegister_v2"
    }

    /// The driver or the device cannot do this at all.
    pub(super) fn is_unsupported(self) -> bool {
        matches!(self.status, sys::CUresult::CUDA_ERROR_NOT_SUPPORTED | sys::CUresult::CUDA_ERROR_NOT_PERMITTED)
    }

    /// There is no such device, or none at all.
    pub(super) fn is_no_device(self) -> bool {
        matches!(self.status, sys::CUresult::CUDA_ERROR_NO_DEVICE | sys::CUresult::CUDA_ERROR_INVALID_DEVICE)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.status as u32;
        let mut name = ptr::null();
        // SAFETY: the driver is loaded, for it gave this status; it writes a static string, or nothing.
        let known = unsafe { sys::cuGetErrorName(self.status, &raw mut name) } == sys::CUresult::CUDA_SUCCESS;
        if known && !name.is_null() {
            // SAFETY: a string of the driver's that lives as long as it.
            let name = unsafe { CStr::from_ptr(name) };
            write!(f, "{} failed: {} ({code})", self.call, name.to_string_lossy())
        } else {
            write!(f, "{} failed: status {code}", self.call)
        }
    }
}

macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        match sys::$function($($argument),*) {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            status => Err(Failure { call: stringify!($function), status }),
        }
    };
}

macro_rules! get {
    ($function:ident($($argument:expr),* $(,)?)) => {{
        let mut value = MaybeUninit::uninit();
        call!($function(value.as_mut_ptr(), $($argument),*)).map(|()| value.assume_init())
    }};
}

/// Has to come before everything else, once.
pub(super) unsafe fn init() -> Status<()> {
    unsafe { call!(cuInit(0)) }
}

/// For instance 12090 for CUDA 12.9: the newest that this driver knows.
pub(super) unsafe fn version() -> Status<i32> {
    unsafe { get!(cuDriverGetVersion()) }
}

pub(super) unsafe fn device_count() -> Status<u32> {
    unsafe { get!(cuDeviceGetCount()) }.map(|count: c_int| count.max(0) as u32)
}

pub(super) unsafe fn device(ordinal: u32) -> Status<RawDevice> {
    unsafe { get!(cuDeviceGet(c_int::try_from(ordinal).unwrap_or(c_int::MAX))) }
}

pub(super) unsafe fn device_name(device: RawDevice) -> Status<String> {
    let mut name = [0; 128];
    unsafe { call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device)) }.map(|()| text(&name))
}

/// As `0000:3b:00.0`.
pub(super) unsafe fn pci_bus_id(device: RawDevice) -> Status<String> {
    let mut name = [0; 32];
    unsafe { call!(cuDeviceGetPCIBusId(name.as_mut_ptr(), name.len() as c_int, device)) }.map(|()| text(&name))
}

pub(super) unsafe fn total_bytes(device: RawDevice) -> Status<usize> {
    unsafe { get!(cuDeviceTotalMem_v2(device)) }
}

pub(super) unsafe fn attribute(device: RawDevice, attribute: Attribute) -> Status<i32> {
    unsafe { get!(cuDeviceGetAttribute(attribute, device)) }
}

pub(super) unsafe fn can_access_peer(device: RawDevice, peer: RawDevice) -> Status<bool> {
    unsafe { get!(cuDeviceCanAccessPeer(device, peer)) }.map(|answer: c_int| answer != 0)
}

pub(super) unsafe fn retain_primary_context(device: RawDevice) -> Status<RawContext> {
    unsafe { get!(cuDevicePrimaryCtxRetain(device)) }
}

pub(super) unsafe fn release_primary_context(device: RawDevice) -> Status<()> {
    unsafe { call!(cuDevicePrimaryCtxRelease_v2(device)) }
}

pub(super) unsafe fn push_context(context: RawContext) -> Status<()> {
    unsafe { call!(cuCtxPushCurrent_v2(context)) }
}

/// In the place of the current context.
pub(super) unsafe fn set_context(context: RawContext) -> Status<()> {
    unsafe { call!(cuCtxSetCurrent(context)) }
}

pub(super) unsafe fn pop_context() -> Status<RawContext> {
    unsafe { get!(cuCtxPopCurrent_v2()) }
}

/// Free bytes in the current context's device, of how many.
pub(super) unsafe fn memory_info() -> Status<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    unsafe { call!(cuMemGetInfo_v2(&raw mut free, &raw mut total)) }.map(|()| (free, total))
}

/// A stream that does not wait for the default one.
pub(super) unsafe fn create_stream() -> Status<RawStream> {
    unsafe { get!(cuStreamCreate(sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32)) }
}

pub(super) unsafe fn destroy_stream(stream: RawStream) -> Status<()> {
    unsafe { call!(cuStreamDestroy_v2(stream)) }
}

pub(super) unsafe fn synchronize(stream: RawStream) -> Status<()> {
    unsafe { call!(cuStreamSynchronize(stream)) }
}

/// Whether everything that was queued on the stream is done.
pub(super) unsafe fn stream_is_done(stream: RawStream) -> Status<bool> {
    ready(unsafe { call!(cuStreamQuery(stream)) })
}

/// An event without a time stamp.
pub(super) unsafe fn create_event() -> Status<RawEvent> {
    unsafe { get!(cuEventCreate(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)) }
}

pub(super) unsafe fn destroy_event(event: RawEvent) -> Status<()> {
    unsafe { call!(cuEventDestroy_v2(event)) }
}

pub(super) unsafe fn record_event(event: RawEvent, stream: RawStream) -> Status<()> {
    unsafe { call!(cuEventRecord(event, stream)) }
}

/// Lets what is queued on the stream from now on wait for the event as it was recorded last; not at all if it never was.
pub(super) unsafe fn wait_event(stream: RawStream, event: RawEvent) -> Status<()> {
    unsafe { call!(cuStreamWaitEvent(stream, event, 0)) }
}

/// Whether everything that was queued before the event was recorded is done.
pub(super) unsafe fn event_is_done(event: RawEvent) -> Status<bool> {
    ready(unsafe { call!(cuEventQuery(event)) })
}

fn ready(answer: Status<()>) -> Status<bool> {
    match answer {
        Ok(()) => Ok(true),
        Err(Failure { status: sys::CUresult::CUDA_ERROR_NOT_READY, .. }) => Ok(false),
        Err(failure) => Err(failure),
    }
}

/// Memory of the current context.
pub(super) unsafe fn allocate(bytes: usize) -> Status<u64> {
    unsafe { get!(cuMemAlloc_v2(bytes)) }
}

pub(super) unsafe fn free(address: u64) -> Status<()> {
    unsafe { call!(cuMemFree_v2(address)) }
}

/// The start of the allocation that an address of a device lies in.
pub(super) unsafe fn allocation_of(address: u64) -> Status<u64> {
    let which = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR;
    let mut start = 0u64;
    unsafe { call!(cuPointerGetAttribute((&raw mut start).cast(), which, address)) }.map(|()| start)
}

/// Memory of the device's pool, there once `stream` comes to it.
pub(super) unsafe fn allocate_async(bytes: usize, stream: RawStream) -> Status<u64> {
    unsafe { get!(cuMemAllocAsync(bytes, stream)) }
}

pub(super) unsafe fn free_async(address: u64, stream: RawStream) -> Status<()> {
    unsafe { call!(cuMemFreeAsync(address, stream)) }
}

/// What physical memory of a device that can be exported as a file descriptor is asked for as.
fn exportable(device: RawDevice) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        location: location(device),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn location(device: RawDevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device }
}

/// What sizes of exportable memory are a multiple of.
pub(super) unsafe fn granularity(device: RawDevice) -> Status<usize> {
    let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    unsafe { get!(cuMemGetAllocationGranularity(&exportable(device), minimum)) }
}

/// Physical memory; `bytes` are a multiple of the [`granularity`].
pub(super) unsafe fn create_memory(device: RawDevice, bytes: usize) -> Status<RawHandle> {
    unsafe { get!(cuMemCreate(bytes, &exportable(device), 0)) }
}

pub(super) unsafe fn release_memory(handle: RawHandle) -> Status<()> {
    unsafe { call!(cuMemRelease(handle)) }
}

pub(super) unsafe fn reserve_addresses(bytes: usize) -> Status<u64> {
    unsafe { get!(cuMemAddressReserve(bytes, 0, 0, 0)) }
}

pub(super) unsafe fn free_addresses(address: u64, bytes: usize) -> Status<()> {
    unsafe { call!(cuMemAddressFree(address, bytes)) }
}

pub(super) unsafe fn map(address: u64, bytes: usize, handle: RawHandle) -> Status<()> {
    unsafe { call!(cuMemMap(address, bytes, 0, handle, 0)) }
}

pub(super) unsafe fn unmap(address: u64, bytes: usize) -> Status<()> {
    unsafe { call!(cuMemUnmap(address, bytes)) }
}

/// Lets the device read and write what is mapped there.
pub(super) unsafe fn grant(address: u64, bytes: usize, device: RawDevice) -> Status<()> {
    let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    let access = sys::CUmemAccessDesc { location: location(device), flags };
    unsafe { call!(cuMemSetAccess(address, bytes, &raw const access, 1)) }
}

/// Pins host memory for all contexts; `read_only` needs an attribute of the device.
pub(super) unsafe fn register(address: *mut u8, bytes: usize, read_only: bool) -> Status<()> {
    let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | if read_only { sys::CU_MEMHOSTREGISTER_READ_ONLY } else { 0 };
    unsafe { call!(cuMemHostRegister_v2(address.cast(), bytes, flags)) }
}

pub(super) unsafe fn unregister(address: *mut u8) -> Status<()> {
    unsafe { call!(cuMemHostUnregister(address.cast())) }
}

pub(super) unsafe fn copy_to_device(to: u64, from: *const u8, bytes: usize, stream: RawStream) -> Status<()> {
    unsafe { call!(cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream)) }
}

/// From one place of the current context's device to another.
pub(super) unsafe fn copy_on_device(to: u64, from: u64, bytes: usize, stream: RawStream) -> Status<()> {
    unsafe { call!(cuMemcpyDtoDAsync_v2(to, from, bytes, stream)) }
}

/// To pinned memory: otherwise it waits until the bytes are there.
pub(super) unsafe fn copy_to_host(to: *mut u8, from: u64, bytes: usize, stream: RawStream) -> Status<()> {
    unsafe { call!(cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream)) }
}

/// Rows of `width` bytes, from one pitch to another.
pub(super) struct Rect {
    pub(super) from: *const u8,
    /// It is an address of the device.
    pub(super) from_device: bool,
    pub(super) from_pitch: usize,
    pub(super) to: u64,
    pub(super) to_pitch: usize,
    pub(super) width: usize,
    pub(super) rows: usize,
}

pub(super) unsafe fn copy_rect_to_device(rect: &Rect, stream: RawStream) -> Status<()> {
    let &Rect { from, from_device, from_pitch, to, to_pitch, width, rows } = rect;
    let (host, device) = (sys::CUmemorytype::CU_MEMORYTYPE_HOST, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: if from_device { device } else { host },
        srcHost: if from_device { ptr::null() } else { from.cast() },
        srcDevice: if from_device { from.addr() as u64 } else { 0 },
        srcArray: ptr::null_mut(),
        srcPitch: from_pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: device,
        dstHost: ptr::null_mut(),
        dstDevice: to,
        dstArray: ptr::null_mut(),
        dstPitch: to_pitch,
        WidthInBytes: width,
        Height: rows,
    };
    unsafe { call!(cuMemcpy2DAsync_v2(&raw const copy, stream)) }
}

pub(super) unsafe fn fill(address: u64, byte: u8, bytes: usize, stream: RawStream) -> Status<()> {
    unsafe { call!(cuMemsetD8Async(address, byte, bytes, stream)) }
}

/// Compiles PTX for the current context's device.
pub(super) unsafe fn load_module(ptx: &CStr) -> Status<RawModule> {
    unsafe { get!(cuModuleLoadData(ptx.as_ptr().cast::<c_void>())) }
}

pub(super) unsafe fn unload_module(module: RawModule) -> Status<()> {
    unsafe { call!(cuModuleUnload(module)) }
}

pub(super) unsafe fn function(module: RawModule, name: &CStr) -> Status<RawFunction> {
    unsafe { get!(cuModuleGetFunction(module, name.as_ptr())) }
}

/// Queues a kernel with one-dimensional grid and blocks; `parameters` point to values of its types, in order.
pub(super) unsafe fn launch(
    function: RawFunction,
    blocks: u32,
    threads: u32,
    stream: RawStream,
    parameters: &mut [*mut c_void],
) -> Status<()> {
    let parameters = parameters.as_mut_ptr();
    unsafe { call!(cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, ptr::null_mut())) }
}

fn text(bytes: &[std::ffi::c_char]) -> String {
    bytes.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte as u8)).collect()
}
