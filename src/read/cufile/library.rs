//! cuFile's functions, as few as are needed, by their addresses in a library that is opened when it is first wanted: cudarc's
//! own module asks for names that installations do not have, and takes results for members of a closed list.

use std::error::Error as _;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::lock;

/// Names of the library, in the order in which they are asked for: what installations have, and developers besides.
const LIBRARIES: [&str; 2] = ["libcufile.so.0", "libcufile.so"];

/// `CUfileHandle_t`.
pub(super) type RawHandle = *mut c_void;

/// `CUfileError_t`: numbers, since later versions have ones that are not known here.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RawStatus {
    status: c_int,
    /// The driver's own, where that is the reason.
    driver: c_int,
}

/// `CUfileDescr_t`.
#[repr(C)]
struct Descriptor {
    kind: c_int,
    file: FileOrHandle,
    operations: *const c_void,
}

#[repr(C)]
union FileOrHandle {
    descriptor: c_int,
    /// Gives the union its size.
    _handle: *mut c_void,
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
const OPAQUE_FD: c_int = 1;

/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE` and `CUFILE_PARAM_FORCE_COMPAT_MODE`: reads through memory of the host.
const COMPAT_MODES: [c_int; 2] = [1, 2];

const SUCCESS: c_int = 0;
/// `CU_FILE_DRIVER_ALREADY_OPEN`: older libraries count no openings.
const ALREADY_OPEN: c_int = 5026;
/// `CUFILEOP_BASE_ERR`: what is below it is the system's.
const FIRST_STATUS: isize = 5000;

/// The functions that are used, by their addresses.
struct Functions {
    open: unsafe extern "C" fn() -> RawStatus,
    register_file: unsafe extern "C" fn(*mut RawHandle, *mut Descriptor) -> RawStatus,
    deregister_file: unsafe extern "C" fn(RawHandle),
    register_memory: unsafe extern "C" fn(*const c_void, usize, c_int) -> RawStatus,
    deregister_memory: unsafe extern "C" fn(*const c_void) -> RawStatus,
    read: unsafe extern "C" fn(RawHandle, *mut c_void, usize, i64, i64) -> isize,
    /// Not in the oldest libraries.
    version: Option<unsafe extern "C" fn(*mut c_int) -> RawStatus>,
    /// Of CUDA 12.8 and later.
    set_bool: Option<unsafe extern "C" fn(c_int, bool) -> RawStatus>,
    /// The same.
    get_bool: Option<unsafe extern "C" fn(c_int, *mut u8) -> RawStatus>,
}

impl Functions {
    /// # Safety
    /// - the library is cuFile, and is never closed.
    unsafe fn of(library: &libloading::Library) -> Result<Functions, &'static str> {
        macro_rules! get {
            ($name:literal) => {
                // SAFETY: declared as in cufile.h; the caller's duty.
                unsafe { library.get(concat!($name, "\0").as_bytes()) }.map(|symbol| *symbol).map_err(|_| $name)
            };
        }
        Ok(Functions {
            open: get!("cuFileDriverOpen")?,
            register_file: get!("cuFileHandleRegister")?,
            deregister_file: get!("cuFileHandleDeregister")?,
            register_memory: get!("cuFileBufRegister")?,
            deregister_memory: get!("cuFileBufDeregister")?,
            read: get!("cuFileRead")?,
            version: get!("cuFileGetVersion").ok(),
            set_bool: get!("cuFileSetParameterBool").ok(),
            get_bool: get!("cuFileGetParameterBool").ok(),
        })
    }
}

/// cuFile, loaded for ever.
#[derive(Clone, Copy)]
pub(super) struct Library {
    functions: &'static Functions,
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").finish_non_exhaustive()
    }
}

/// A call that cuFile refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failure {
    call: &'static str,
    status: c_int,
    driver: c_int,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { call, status, driver } = self;
        write!(f, "{call} failed: status {status}")?;
        if let Some(meaning) = meaning(*status) {
            write!(f, ": {meaning}")?;
        }
        if *driver != 0 { write!(f, ", status {driver} of the driver") } else { Ok(()) }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::new(ErrorKind::Device, failure.to_string())
    }
}

/// What those mean that users meet.
fn meaning(status: c_int) -> Option<&'static str> {
    Some(match status {
        5001 => "the nvidia-fs driver is not there",
        5007 => "this platform is not supported",
        5008 => "this file system is not supported",
        5009 => "this GPU is not supported",
        5010 => "an error of the nvidia-fs driver",
        5011 => "an error of the CUDA driver",
        5015 => "the memory is of another context",
        5016 => "more memory than may be registered",
        5020 => "the file was opened without O_DIRECT",
        5024 => "the memory is not registered",
        5025 => "permission denied",
        5030 => "an internal error",
        5033 => "the library could not be initialised",
        5034 => "reads and writes are disabled",
        5036 => "no memory of the GPU could be pinned",
        _ => return None,
    })
}

type Status<T = ()> = Result<T, Failure>;

impl Library {
    /// Loads the library, once for this process; its driver is not opened.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if there is none.
    pub(super) fn load() -> Result<Library> {
        static LOADED: Mutex<Option<&'static Functions>> = Mutex::new(None);
        let mut loaded = lock(&LOADED);
        let functions = match *loaded {
            Some(functions) => functions,
            None => loaded.insert(Box::leak(Box::new(load(&LIBRARIES)?))),
        };
        Ok(Library { functions })
    }

    /// As in 1.14; `None` if it does not say.
    pub(super) fn version(self) -> Option<(u32, u32)> {
        let mut code = 0;
        // SAFETY: writes a number.
        let status = unsafe { (self.functions.version?)(&raw mut code) };
        let code = code.max(0) as u32;
        (status.status == SUCCESS && code > 0).then_some((code / 1000, code % 1000 / 10))
    }

    /// Whether the library can be told to fail rather than read through memory of the host.
    pub(super) fn can_forbid_compat(self) -> bool {
        self.functions.set_bool.is_some()
    }

    /// Tells it so, which does something only before the driver is opened; whether it took that.
    pub(super) fn forbid_compat(self) -> bool {
        let Some(set_bool) = self.functions.set_bool else { return false };
        // SAFETY: known parameters, and a value of theirs; both are set, whatever comes of the first.
        COMPAT_MODES.map(|parameter| unsafe { set_bool(parameter, false) }).iter().all(|told| told.status == SUCCESS)
    }

    /// Whether it may read through memory of the host, now that the driver is open; `None` if it does not say.
    pub(super) fn allows_compat(self) -> Option<bool> {
        let get_bool = self.functions.get_bool?;
        let allowed = COMPAT_MODES.map(|parameter| {
            let mut value = 0u8;
            // SAFETY: a known parameter, and room for C's `bool`, of which every value is a number.
            let status = unsafe { get_bool(parameter, &raw mut value) };
            (status.status == SUCCESS).then_some(value != 0)
        });
        let [one, other] = allowed;
        Some(one? || other?)
    }

    /// Opens the driver, for ever. Takes seconds.
    pub(super) fn open_driver(self) -> Status {
        // SAFETY: no duties.
        match unsafe { (self.functions.open)() } {
            RawStatus { status: ALREADY_OPEN, .. } => Ok(()),
            status => done("cuFileDriverOpen", status),
        }
    }

    /// Registers a file that was opened with O_DIRECT.
    ///
    /// # Safety
    /// - the file stays open until it was [deregistered](Library::deregister_file).
    pub(super) unsafe fn register_file(self, file: BorrowedFd<'_>) -> Status<RawHandle> {
        let mut handle = std::ptr::null_mut();
        let file = FileOrHandle { descriptor: file.as_raw_fd() };
        let mut descriptor = Descriptor { kind: OPAQUE_FD, file, operations: std::ptr::null() };
        // SAFETY: writes a handle, and reads the descriptor during the call.
        let status = unsafe { (self.functions.register_file)(&raw mut handle, &raw mut descriptor) };
        done("cuFileHandleRegister", status).map(|()| handle)
    }

    /// # Safety
    /// - registered, and not used again.
    pub(super) unsafe fn deregister_file(self, handle: RawHandle) {
        // SAFETY: the caller's duty.
        unsafe { (self.functions.deregister_file)(handle) }
    }

    /// Registers memory of the GPU whose context is current. An address that is none is refused.
    pub(super) fn register_memory(self, address: u64, bytes: usize) -> Status {
        // SAFETY: cuFile asks the driver what is at the address.
        done("cuFileBufRegister", unsafe { (self.functions.register_memory)(pointer(address), bytes, 0) })
    }

    /// # Safety
    /// - registered, and no read into it is under way or to come.
    pub(super) unsafe fn deregister_memory(self, address: u64) -> Status {
        // SAFETY: the caller's duty.
        done("cuFileBufDeregister", unsafe { (self.functions.deregister_memory)(pointer(address)) })
    }

    /// Reads from `offset` of a file to `place` of registered memory; how many bytes arrived.
    ///
    /// # Safety
    /// - the handle is registered, and so is the memory, of the GPU whose context is current;
    /// - it has `bytes` from `place` on, which nobody else uses meanwhile.
    pub(super) unsafe fn read(
        self,
        handle: RawHandle,
        memory: u64,
        place: usize,
        bytes: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let (offset, place) = (offset as i64, place as i64);
        // SAFETY: the caller's duties.
        let result = unsafe { (self.functions.read)(handle, pointer(memory), bytes, offset, place) };
        outcome(result, io::Error::last_os_error)
    }
}

/// What a result of `cuFileRead` says: -1 stands for `errno`, what else is negative for a status or an `errno` of its own.
fn outcome(result: isize, errno: impl FnOnce() -> io::Error) -> io::Result<usize> {
    match result {
        0.. => Ok(result as usize),
        -1 => Err(errno()),
        _ if result > -FIRST_STATUS => Err(io::Error::from_raw_os_error(-result as c_int)),
        _ => {
            let status = c_int::try_from(result.unsigned_abs()).unwrap_or(c_int::MAX);
            Err(io::Error::other(Failure { call: "cuFileRead", status, driver: 0 }.to_string()))
        }
    }
}

fn done(call: &'static str, RawStatus { status, driver }: RawStatus) -> Status {
    if status == SUCCESS { Ok(()) } else { Err(Failure { call, status, driver }) }
}

/// An address of a device, which the host never follows.
fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

/// The functions of the first of these libraries that there is.
fn load(names: &[&str]) -> Result<Functions> {
    let mut why = None;
    let found = names.iter().find_map(|name| {
        // SAFETY: cuFile may be loaded into any process, and is never unloaded.
        match unsafe { libloading::Library::new(*name) } {
            Ok(library) => Some(library),
            Err(error) => {
                let said = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                why.get_or_insert_with(|| missing(name, &said));
                None
            }
        }
    });
    let library = found.ok_or_else(|| Error::new(ErrorKind::Device, why.unwrap_or_default()))?;
    let library = Box::leak(Box::new(library));
    // SAFETY: it is cuFile by its name, and leaked.
    unsafe { Functions::of(library) }
        .map_err(|name| Error::new(ErrorKind::Device, format!("not cuFile: {} has no {name}", names[0])))
}

/// Why a library could not be loaded, in the loader's words where it lacks something else.
fn missing(name: &str, why: &str) -> String {
    if why.contains(name) && why.contains("No such file") {
        return format!("no cuFile: {name} not found");
    }
    format!("no cuFile: {name}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_ordinary_error() {
        let error = load(&["libcufile-that-nobody-has.so.0", "libcufile-neither.so"]).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "no cuFile: libcufile-that-nobody-has.so.0 not found");
        assert_eq!(error.kind(), ErrorKind::Device);
        let error = load(&["libc.so.6"]).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "not cuFile: libc.so.6 has no cuFileDriverOpen");
    }

    #[test]
    fn a_library_that_lacks_another_says_which() {
        let why = "libmount.so.1: cannot open shared object file: No such file or directory";
        assert_eq!(missing("libcufile.so.0", why), format!("no cuFile: libcufile.so.0: {why}"));
    }

    #[test]
    fn results_are_counts_or_errors() {
        let errno = || io::Error::from_raw_os_error(5);
        assert_eq!(outcome(4096, errno).unwrap(), 4096);
        assert_eq!(outcome(0, errno).unwrap(), 0);
        assert_eq!(outcome(-1, errno).unwrap_err().raw_os_error(), Some(5));
        assert_eq!(outcome(-22, errno).unwrap_err().raw_os_error(), Some(22));
        let text = |result| outcome(result, errno).unwrap_err().to_string();
        assert_eq!(text(-5024), "cuFileRead failed: status 5024: the memory is not registered");
        assert_eq!(text(-5999), "cuFileRead failed: status 5999");
    }
}
