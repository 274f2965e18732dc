//! The driver's own functions, by their names: those that the tests for hardware call beside the library.

#![allow(dead_code, reason = "each test uses its own part")]
#![allow(
    non_snake_case,
    clippy::missing_safety_doc,
    clippy::too_many_arguments,
    reason = "the driver's names and duties"
)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::OnceLock;
use std::{mem, ptr};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

const RTLD_NOW: i32 = 2;

/// The statuses that tests ask for.
pub(crate) const SUCCESS: i32 = 0;
pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const NO_DEVICE: i32 = 100;
pub(crate) const INVALID_DEVICE: i32 = 101;
pub(crate) const NOT_FOUND: i32 = 500;
pub(crate) const NOT_READY: i32 = 600;
pub(crate) const ALREADY_REGISTERED: i32 = 712;
pub(crate) const NOT_REGISTERED: i32 = 713;
pub(crate) const NOT_PERMITTED: i32 = 800;
pub(crate) const NOT_SUPPORTED: i32 = 801;

pub(crate) const MULTIPROCESSORS: i32 = 16;
pub(crate) const HOST_PAGE_TABLES: i32 = 100;
pub(crate) const READ_ONLY_REGISTERING: i32 = 113;

/// `CU_MEMHOSTREGISTER_PORTABLE` and `CU_MEMHOSTREGISTER_READ_ONLY`.
pub(crate) const PORTABLE: u32 = 1;
pub(crate) const READ_ONLY: u32 = 8;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Copy2D {
    src_x: usize,
    src_y: usize,
    src_kind: u32,
    src_host: *const u8,
    src_device: u64,
    src_array: *const c_void,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_kind: u32,
    dst_host: *mut u8,
    dst_device: u64,
    dst_array: *const c_void,
    dst_pitch: usize,
    width: usize,
    rows: usize,
}

impl Copy2D {
    /// Rows of `width` bytes from the host to the device.
    pub(crate) fn to_device(
        from: *const u8,
        from_pitch: usize,
        to: u64,
        to_pitch: usize,
        [width, rows]: [usize; 2],
    ) -> Copy2D {
        Copy2D {
            src_x: 0,
            src_y: 0,
            src_kind: 1,
            src_host: from,
            src_device: 0,
            src_array: ptr::null(),
            src_pitch: from_pitch,
            dst_x: 0,
            dst_y: 0,
            dst_kind: 2,
            dst_host: ptr::null_mut(),
            dst_device: to,
            dst_array: ptr::null(),
            dst_pitch: to_pitch,
            width,
            rows,
        }
    }
}

/// `CUmemLocation` of a device.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Location {
    kind: u32,
    id: i32,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct AllocationProp {
    kind: u32,
    handle_types: u32,
    location: Location,
    win32: *const c_void,
    flags: [u8; 8],
}

impl AllocationProp {
    /// Pinned memory of a device that can be exported as a file descriptor.
    pub(crate) fn exportable(device: i32) -> AllocationProp {
        let location = Location { kind: 1, id: device };
        AllocationProp { kind: 1, handle_types: 1, location, win32: ptr::null(), flags: [0; 8] }
    }
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct AccessDesc {
    location: Location,
    flags: u32,
}

impl AccessDesc {
    /// A device reads and writes.
    pub(crate) fn read_write(device: i32) -> AccessDesc {
        AccessDesc { location: Location { kind: 1, id: device }, flags: 3 }
    }
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            /// The driver's function of this name; its status.
            pub(crate) unsafe fn $name($($argument: $type),*) -> i32 {
                // SAFETY: declared as in the driver's header; the caller answers for the arguments.
                unsafe {
                    let function: unsafe extern "C" fn($($type),*) -> i32 = mem::transmute(symbol(stringify!($name)));
                    function($($argument),*)
                }
            }
        )*
    };
}

/// An opaque handle.
pub(crate) type Handle = *mut c_void;

functions! {
    cuInit(flags: u32);
    cuDriverGetVersion(version: &mut i32);
    cuDeviceGetCount(count: &mut i32);
    cuDeviceGet(device: &mut i32, ordinal: i32);
    cuDeviceGetAttribute(value: &mut i32, attribute: i32, device: i32);
    cuDeviceTotalMem_v2(bytes: &mut usize, device: i32);
    cuDevicePrimaryCtxRetain(context: &mut Handle, device: i32);
    cuDevicePrimaryCtxRelease_v2(device: i32);
    cuDevicePrimaryCtxGetState(device: i32, flags: &mut u32, active: &mut i32);
    cuCtxGetCurrent(context: &mut Handle);
    cuCtxSetCurrent(context: Handle);
    cuCtxSynchronize();
    cuStreamCreate(stream: &mut Handle, flags: u32);
    cuStreamDestroy_v2(stream: Handle);
    cuStreamSynchronize(stream: Handle);
    cuStreamQuery(stream: Handle);
    cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32);
    cuEventCreate(event: &mut Handle, flags: u32);
    cuEventDestroy_v2(event: Handle);
    cuEventRecord(event: Handle, stream: Handle);
    cuEventQuery(event: Handle);
    cuEventSynchronize(event: Handle);
    cuMemGetInfo_v2(free: &mut usize, total: &mut usize);
    cuMemAlloc_v2(address: &mut u64, bytes: usize);
    cuMemFree_v2(address: u64);
    cuMemAllocAsync(address: &mut u64, bytes: usize, stream: Handle);
    cuMemFreeAsync(address: u64, stream: Handle);
    cuMemHostRegister_v2(address: *mut u8, bytes: usize, flags: u32);
    cuMemHostUnregister(address: *mut u8);
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: Handle);
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: Handle);
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle);
    cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize);
    cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize);
    cuMemcpy2DAsync_v2(copy: &Copy2D, stream: Handle);
    cuMemsetD8_v2(to: u64, byte: u8, bytes: usize);
    cuMemGetAllocationGranularity(bytes: &mut usize, prop: &AllocationProp, option: u32);
    cuMemCreate(memory: &mut u64, bytes: usize, prop: &AllocationProp, flags: u64);
    cuMemRelease(memory: u64);
    cuMemAddressReserve(address: &mut u64, bytes: usize, alignment: usize, wish: u64, flags: u64);
    cuMemAddressFree(address: u64, bytes: usize);
    cuMemMap(address: u64, bytes: usize, offset: usize, memory: u64, flags: u64);
    cuMemUnmap(address: u64, bytes: usize);
    cuMemSetAccess(address: u64, bytes: usize, access: &AccessDesc, count: usize);
    cuModuleLoadData(module: &mut Handle, image: *const c_char);
    cuModuleUnload(module: Handle);
    cuModuleGetFunction(function: &mut Handle, module: Handle, name: *const c_char);
    cuLaunchKernel(function: Handle, blocks_x: u32, blocks_y: u32, blocks_z: u32, threads_x: u32, threads_y: u32,
        threads_z: u32, shared_bytes: u32, stream: Handle, parameters: *mut *mut c_void, extra: *mut *mut c_void);
}

fn library() -> Option<*mut c_void> {
    static LIBRARY: OnceLock<Option<usize>> = OnceLock::new();
    let found = LIBRARY.get_or_init(|| {
        // SAFETY: C strings; the driver may be loaded into any process, and is never closed.
        let found = [c"libcuda.so", c"libcuda.so.1"].map(|name| unsafe { dlopen(name.as_ptr(), RTLD_NOW) });
        found.into_iter().find(|library| !library.is_null()).map(|library| library as usize)
    });
    found.map(|library| library as *mut c_void)
}

fn symbol(name: &str) -> *mut c_void {
    let text = CString::new(name).unwrap();
    // SAFETY: a live library and a C string.
    let address = unsafe { dlsym(library().expect("no driver"), text.as_ptr()) };
    assert!(!address.is_null(), "the driver has no {name}");
    address
}

/// Initialises the driver, and says why there is no GPU if there is none.
pub(crate) fn init() -> Result<(), String> {
    library().ok_or("no driver: libcuda.so.1 not found")?;
    let mut count = 0;
    // SAFETY: the driver is loaded.
    match unsafe { (cuInit(0), cuDeviceGetCount(&mut count)) } {
        (SUCCESS, SUCCESS) if count > 0 => Ok(()),
        (SUCCESS, SUCCESS) | (NO_DEVICE, _) => Err("the driver has no device".into()),
        (init, count) => Err(format!("cuInit answers {init}, cuDeviceGetCount {count}")),
    }
}

/// Holds a status against success.
#[track_caller]
pub(crate) fn ok(status: i32) {
    assert_eq!(status, SUCCESS, "status of a call of the driver");
}

/// How many GPUs there are.
pub(crate) fn device_count() -> i32 {
    let mut count = 0;
    // SAFETY: the driver is loaded.
    ok(unsafe { cuDeviceGetCount(&mut count) });
    count
}

pub(crate) fn attribute(attribute: i32) -> i32 {
    let mut value = 0;
    // SAFETY: the driver is loaded.
    ok(unsafe { cuDeviceGetAttribute(&mut value, attribute, 0) });
    value
}

pub(crate) fn total_bytes() -> usize {
    let mut bytes = 0;
    // SAFETY: the driver is loaded.
    ok(unsafe { cuDeviceTotalMem_v2(&mut bytes, 0) });
    bytes
}

/// Free memory of the current context's device.
pub(crate) fn free_bytes() -> usize {
    let (mut free, mut total) = (0, 0);
    // SAFETY: a context is current, or the driver says that there is none.
    ok(unsafe { cuMemGetInfo_v2(&mut free, &mut total) });
    free
}

/// Whether somebody holds the primary context of a device.
pub(crate) fn is_active(device: i32) -> bool {
    let (mut flags, mut active) = (0, 0);
    // SAFETY: the driver is loaded.
    ok(unsafe { cuDevicePrimaryCtxGetState(device, &mut flags, &mut active) });
    active != 0
}

pub(crate) fn current() -> Handle {
    let mut context = ptr::null_mut();
    // SAFETY: the driver is loaded.
    ok(unsafe { cuCtxGetCurrent(&mut context) });
    context
}

/// The primary context of the first GPU, current on this thread for as long as this lives.
#[derive(Debug)]
pub(crate) struct Context(pub(crate) Handle);

impl Context {
    pub(crate) fn new() -> Context {
        let mut context = ptr::null_mut();
        // SAFETY: the driver is loaded.
        unsafe {
            ok(cuDevicePrimaryCtxRetain(&mut context, 0));
            ok(cuCtxSetCurrent(context));
        }
        Context(context)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `new`.
        unsafe {
            cuCtxSetCurrent(ptr::null_mut());
            cuDevicePrimaryCtxRelease_v2(0);
        }
    }
}

/// Memory of the current context's device, freed when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

impl Memory {
    pub(crate) fn new(bytes: usize) -> Memory {
        let mut address = 0;
        // SAFETY: a context is current.
        ok(unsafe { cuMemAlloc_v2(&mut address, bytes) });
        Memory { address, bytes }
    }

    /// Memory with these bytes.
    pub(crate) fn of(bytes: &[u8]) -> Memory {
        let memory = Memory::new(bytes.len());
        // SAFETY: as long as the memory.
        ok(unsafe { cuMemcpyHtoD_v2(memory.address, bytes.as_ptr(), bytes.len()) });
        // It may return before the last bytes are there, and other streams do not wait for them.
        // SAFETY: a context is current.
        ok(unsafe { cuCtxSynchronize() });
        memory
    }

    pub(crate) fn filled(byte: u8, bytes: usize) -> Memory {
        Memory::of(&vec![byte; bytes])
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        read(self.address, self.bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`.
        unsafe { cuMemFree_v2(self.address) };
    }
}

/// Copies from the device.
pub(crate) fn read(address: u64, bytes: usize) -> Vec<u8> {
    let mut found = vec![0; bytes];
    // SAFETY: the caller's memory, on whichever side it is wrong the driver says so.
    ok(unsafe { cuMemcpyDtoH_v2(found.as_mut_ptr(), address, bytes) });
    found
}

/// A stream that does not wait for the default one.
#[derive(Debug)]
pub(crate) struct Stream(pub(crate) Handle);

impl Stream {
    pub(crate) fn new() -> Stream {
        let mut stream = ptr::null_mut();
        // SAFETY: a context is current.
        ok(unsafe { cuStreamCreate(&mut stream, 1) });
        Stream(stream)
    }

    pub(crate) fn synchronize(&self) {
        // SAFETY: a live stream.
        ok(unsafe { cuStreamSynchronize(self.0) });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: not used again.
        unsafe { cuStreamDestroy_v2(self.0) };
    }
}

/// An event without a time.
#[derive(Debug)]
pub(crate) struct Event(pub(crate) Handle);

impl Event {
    pub(crate) fn new() -> Event {
        let mut event = ptr::null_mut();
        // SAFETY: a context is current.
        ok(unsafe { cuEventCreate(&mut event, 2) });
        Event(event)
    }

    pub(crate) fn record(&self, stream: &Stream) {
        // SAFETY: both are live and of one context.
        ok(unsafe { cuEventRecord(self.0, stream.0) });
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: not used again.
        unsafe { cuEventDestroy_v2(self.0) };
    }
}

/// Whole pages of host memory, registered for as long as this lives.
#[derive(Debug)]
pub(crate) struct Registered {
    address: *mut u8,
    bytes: usize,
    _pages: memmap2::MmapMut,
}

impl Registered {
    pub(crate) fn new(bytes: usize) -> Registered {
        let mut pages = memmap2::MmapMut::map_anon(bytes).unwrap();
        let address = pages.as_mut_ptr();
        // SAFETY: live pages, which go after they were unregistered.
        ok(unsafe { cuMemHostRegister_v2(address, bytes, PORTABLE) });
        Registered { address, bytes, _pages: pages }
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.address
    }

    /// Writes all of it; no copy from it may be under way.
    pub(crate) fn fill(&mut self, byte: impl Fn(usize) -> u8) {
        for at in 0..self.bytes {
            // SAFETY: within the pages, which nobody else uses.
            unsafe { self.address.add(at).write(byte(at)) };
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered in `new`.
        unsafe { cuMemHostUnregister(self.address) };
    }
}

/// The library's kernels, loaded into the current context.
#[derive(Debug)]
pub(crate) struct Module(Handle);

impl Module {
    pub(crate) fn load(ptx: &str) -> Module {
        let (text, mut module) = (CString::new(ptx).unwrap(), ptr::null_mut());
        // SAFETY: PTX that ends with a zero.
        ok(unsafe { cuModuleLoadData(&mut module, text.as_ptr()) });
        Module(module)
    }

    /// The kernel of this name, or the driver's status.
    pub(crate) fn function(&self, name: &CStr) -> Result<Handle, i32> {
        let mut function = ptr::null_mut();
        // SAFETY: a live module and a C string.
        match unsafe { cuModuleGetFunction(&mut function, self.0, name.as_ptr()) } {
            SUCCESS => Ok(function),
            status => Err(status),
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: nothing of it runs any more.
        unsafe { cuModuleUnload(self.0) };
    }
}

/// The committed PTX, which was built into the test: the machine may have no sources.
pub(crate) const PTX: &str = include_str!("../../kernels/shardlift.ptx");
