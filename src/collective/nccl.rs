//! NCCL's functions, as few as are needed, by their addresses in a library that is opened when it is first wanted: cudarc's
//! own module asks for names that installations do not have, and takes statuses for one of a closed list.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Mutex;

use libloading::Library;

use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::sync::lock;

/// Names of the library, in the order in which they are asked for: what installations have, and developers besides.
const LIBRARIES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclResult_t`: a number, since later versions have ones that are not known here.
pub(super) type RawStatus = c_int;
/// `ncclComm_t`.
pub(super) type RawComm = *mut c_void;
/// `cudaStream_t`.
type RawStream = *mut c_void;

pub(super) const SUCCESS: RawStatus = 0;
pub(super) const IN_PROGRESS: RawStatus = 7;
/// `ncclUint8`.
const BYTE: c_int = 1;

/// What names a communicator that ranks are about to make together: one of them makes it, all need it. Opaque bytes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct UniqueId {
    bytes: [u8; UniqueId::BYTES],
}

impl UniqueId {
    /// `NCCL_UNIQUE_ID_BYTES`.
    pub(crate) const BYTES: usize = 128;

    /// As it came from another rank.
    pub(crate) fn from_bytes(bytes: [u8; UniqueId::BYTES]) -> UniqueId {
        UniqueId { bytes }
    }

    /// As it goes to other ranks.
    pub(crate) fn as_bytes(&self) -> &[u8; UniqueId::BYTES] {
        &self.bytes
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UniqueId").finish_non_exhaustive()
    }
}

/// `ncclConfig_t` as NCCL 2.14 introduced it. Every later one copies as many bytes as `size` says, and gives all fields that
/// are younger than `version` their defaults; what is padding here is such a field from 2.17 on.
#[repr(C)]
#[derive(Debug)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    padding: c_int,
}

const _: () = assert!(size_of::<usize>() != 8 || size_of::<Config>() == 24);

impl Config {
    /// Calls return at once, and are asked for how they went.
    const NON_BLOCKING: Config = Config {
        size: size_of::<Config>(),
        magic: 0xcafe_beef,
        version: limits::NCCL_MIN as u32,
        blocking: 0,
        padding: c_int::MIN, // NCCL_CONFIG_UNDEF_INT
    };
}

macro_rules! functions {
    ($($(#[doc = $doc:literal])* $field:ident = $name:ident($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used, by their addresses.
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// # Safety
            /// - the library is NCCL, and is never closed.
            unsafe fn of(library: &Library) -> Result<Functions, &'static str> {
                Ok(Functions {
                    $($field: {
                        // SAFETY: declared as in nccl.h; the caller's duty.
                        let symbol = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                        *symbol.map_err(|_| stringify!($name))?
                    },)*
                })
            }
        }
    };
}

functions! {
    version = ncclGetVersion(*mut c_int) -> RawStatus;
    error_string = ncclGetErrorString(RawStatus) -> *const c_char;
    last_error = ncclGetLastError(RawComm) -> *const c_char;
    unique_id = ncclGetUniqueId(*mut UniqueId) -> RawStatus;
    init = ncclCommInitRankConfig(*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> RawStatus;
    async_error = ncclCommGetAsyncError(RawComm, *mut RawStatus) -> RawStatus;
    finalize = ncclCommFinalize(RawComm) -> RawStatus;
    destroy = ncclCommDestroy(RawComm) -> RawStatus;
    abort = ncclCommAbort(RawComm) -> RawStatus;
    group_start = ncclGroupStart() -> RawStatus;
    group_end = ncclGroupEnd() -> RawStatus;
    broadcast = ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> RawStatus;
    all_gather = ncclAllGather(*const c_void, *mut c_void, usize, c_int, RawComm, RawStream) -> RawStatus;
    send = ncclSend(*const c_void, usize, c_int, c_int, RawComm, RawStream) -> RawStatus;
    recv = ncclRecv(*mut c_void, usize, c_int, c_int, RawComm, RawStream) -> RawStatus;
}

/// NCCL, loaded for ever.
#[derive(Clone, Copy)]
pub(crate) struct Nccl {
    functions: &'static Functions,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl").finish_non_exhaustive()
    }
}

/// A version of NCCL, as in 2.28.9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NcclVersion(u32, u32, u32);

impl NcclVersion {
    /// From what `ncclGetVersion` says; before 2.9 it had fewer digits.
    fn of(code: c_int) -> NcclVersion {
        let code = code.max(0) as u32;
        let major = if code < 10_000 { 1000 } else { 10_000 };
        NcclVersion(code / major, code % major / 100, code % 100)
    }
}

impl fmt::Display for NcclVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NcclVersion(major, minor, patch) = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// The version of this machine's NCCL, which is loaded.
///
/// # Errors
/// [`ErrorKind::Device`] if there is none, or one that is too old.
pub fn nccl_version() -> Result<NcclVersion> {
    Nccl::open()?.version()
}

/// A call that NCCL refused, or an operation that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    call: &'static str,
    status: RawStatus,
    /// What the status means, and what NCCL said last.
    text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: status {}: {}", self.call, self.status, self.text)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::new(ErrorKind::Device, failure.to_string())
    }
}

pub(super) type Status<T = ()> = Result<T, Failure>;

/// Whether a call has come to its end; if not, the communicator is asked until it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    Pending,
}

impl Nccl {
    /// Loads the library, once for this process.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if there is none, or one that is too old.
    pub(crate) fn open() -> Result<Nccl> {
        static OPENED: Mutex<Option<&'static Functions>> = Mutex::new(None);
        let mut opened = lock(&OPENED);
        if let Some(functions) = *opened {
            return Ok(Nccl { functions });
        }
        let nccl = Nccl { functions: Box::leak(Box::new(load(&LIBRARIES)?)) };
        let code = nccl.version_code()?;
        if code < limits::NCCL_MIN {
            let expected = format!("{} or newer", NcclVersion::of(limits::NCCL_MIN));
            return Err(Error::new(ErrorKind::Device, "NCCL too old").with_expected(expected, NcclVersion::of(code)));
        }
        *opened = Some(nccl.functions);
        Ok(nccl)
    }

    /// The library's version.
    pub(crate) fn version(self) -> Result<NcclVersion> {
        Ok(NcclVersion::of(self.version_code()?))
    }

    fn version_code(self) -> Status<c_int> {
        let mut code = 0;
        // SAFETY: writes a number.
        let status = unsafe { (self.functions.version)(&raw mut code) };
        self.done("ncclGetVersion", status, None).map(|()| code)
    }

    /// A name for a new communicator.
    pub(crate) fn unique_id(self) -> Result<UniqueId> {
        let mut id = MaybeUninit::uninit();
        // SAFETY: writes an id, or fails.
        let status = unsafe { (self.functions.unique_id)(id.as_mut_ptr()) };
        self.done("ncclGetUniqueId", status, None)?;
        // SAFETY: written.
        Ok(unsafe { id.assume_init() })
    }

    /// Begins to make a communicator whose calls do not block. What there is of it, if anything, is in `comm` even if that
    /// fails.
    ///
    /// # Safety
    /// - a context of the rank's device is current.
    pub(super) unsafe fn init(self, comm: &mut RawComm, size: u32, id: UniqueId, rank: u32) -> Status<Progress> {
        let number = |value: u32| c_int::try_from(value).unwrap_or(c_int::MAX);
        let mut config = Config::NON_BLOCKING;
        // SAFETY: NCCL writes a handle and reads the configuration during the call; the caller's duty.
        let status = unsafe { (self.functions.init)(comm, number(size), id, number(rank), &raw mut config) };
        self.progress("ncclCommInitRankConfig", status, None)
    }

    /// How `call`, the last one, went so far, and what followed from it.
    ///
    /// # Safety
    /// - the communicator is live, and nobody else is in it.
    pub(super) unsafe fn poll(self, comm: RawComm, call: &'static str) -> Status<Progress> {
        let mut state = SUCCESS;
        // SAFETY: writes a status; the caller's duty.
        let status = unsafe { (self.functions.async_error)(comm, &raw mut state) };
        self.done("ncclCommGetAsyncError", status, Some(comm))?;
        self.progress(call, state, Some(comm))
    }

    /// Begins to end a communicator once its operations are over; then comes [`destroy`](Nccl::destroy).
    ///
    /// # Safety
    /// - as for [`poll`](Nccl::poll); the device's context is current.
    pub(super) unsafe fn finalize(self, comm: RawComm) -> Status<Progress> {
        // SAFETY: the caller's duties.
        let status = unsafe { (self.functions.finalize)(comm) };
        self.progress("ncclCommFinalize", status, Some(comm))
    }

    /// Gives a finalized communicator back.
    ///
    /// # Safety
    /// - as for [`finalize`](Nccl::finalize), and it is never used again.
    pub(super) unsafe fn destroy(self, comm: RawComm) -> Status {
        // SAFETY: the caller's duties.
        let status = unsafe { (self.functions.destroy)(comm) };
        self.progress("ncclCommDestroy", status, None).map(|_| ())
    }

    /// Ends a communicator and whatever it has under way. May take long, and even for ever where a driver is broken.
    ///
    /// # Safety
    /// - as for [`destroy`](Nccl::destroy).
    pub(super) unsafe fn abort(self, comm: RawComm) -> Status {
        // SAFETY: the caller's duties.
        let status = unsafe { (self.functions.abort)(comm) };
        self.progress("ncclCommAbort", status, None).map(|_| ())
    }

    /// From now on this thread's operations are collected.
    pub(super) fn group_start(self) -> Status {
        // SAFETY: no duties.
        let status = unsafe { (self.functions.group_start)() };
        self.done("ncclGroupStart", status, None)
    }

    /// Launches what was collected; afterwards each communicator is polled.
    pub(super) fn group_end(self) -> Status<Progress> {
        // SAFETY: no duties but those of the operations.
        let status = unsafe { (self.functions.group_end)() };
        self.progress("ncclGroupEnd", status, None)
    }

    /// Queues an operation.
    ///
    /// # Safety
    /// - as for [`finalize`](Nccl::finalize); the stream is one of that context's;
    /// - the operation's memory is the device's, and as [`Comm`](super::Comm) says, until it has run.
    pub(super) unsafe fn operation(self, comm: RawComm, operation: &Operation, stream: usize) -> Status<Progress> {
        let stream: RawStream = std::ptr::with_exposed_provenance_mut(stream);
        let (from, to) = (operation.from, operation.to);
        // Addresses of a device, which the host never follows.
        let from = std::ptr::without_provenance::<c_void>(from as usize);
        let to = std::ptr::without_provenance_mut::<c_void>(to as usize);
        let number = |rank: u32| c_int::try_from(rank).unwrap_or(c_int::MAX);
        let (functions, bytes) = (self.functions, operation.bytes);
        // SAFETY: the caller's duties.
        let (call, status) = unsafe {
            match operation.kind {
                Kind::Broadcast { root } => {
                    ("ncclBroadcast", (functions.broadcast)(from, to, bytes, BYTE, number(root), comm, stream))
                }
                Kind::AllGather => ("ncclAllGather", (functions.all_gather)(from, to, bytes, BYTE, comm, stream)),
                Kind::Send { to: peer } => {
                    ("ncclSend", (functions.send)(from, bytes, BYTE, number(peer), comm, stream))
                }
                Kind::Recv { from: peer } => {
                    ("ncclRecv", (functions.recv)(to, bytes, BYTE, number(peer), comm, stream))
                }
            }
        };
        self.progress(call, status, Some(comm))
    }

    fn progress(self, call: &'static str, status: RawStatus, comm: Option<RawComm>) -> Status<Progress> {
        match status {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Pending),
            _ => Err(self.failure(call, status, comm)),
        }
    }

    fn done(self, call: &'static str, status: RawStatus, comm: Option<RawComm>) -> Status {
        if status == SUCCESS { Ok(()) } else { Err(self.failure(call, status, comm)) }
    }

    fn failure(self, call: &'static str, status: RawStatus, comm: Option<RawComm>) -> Failure {
        let text = |text: *const c_char| {
            // SAFETY: null, or a string of NCCL's, which it keeps at least until its next call on this thread.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned())
        };
        // SAFETY: any number is a status to this function.
        let meaning = text(unsafe { (self.functions.error_string)(status) }).unwrap_or_default();
        // SAFETY: a live communicator, or null: NCCL does not look at it.
        let last = text(unsafe { (self.functions.last_error)(comm.unwrap_or(std::ptr::null_mut())) });
        let text = match last.filter(|last| !last.is_empty()) {
            Some(last) => format!("{meaning}: {last}"),
            None => meaning,
        };
        Failure { call, status, text }
    }
}

/// What one rank does of an operation on bytes; addresses are of its device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    pub(super) kind: Kind,
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) bytes: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Broadcast { root: u32 },
    AllGather,
    Send { to: u32 },
    Recv { from: u32 },
}

impl Kind {
    /// The function that does it.
    pub(super) fn call(self) -> &'static str {
        match self {
            Kind::Broadcast { .. } => "ncclBroadcast",
            Kind::AllGather => "ncclAllGather",
            Kind::Send { .. } => "ncclSend",
            Kind::Recv { .. } => "ncclRecv",
        }
    }
}

/// The functions of the first of these libraries that there is.
fn load(names: &[&str]) -> Result<Functions> {
    // SAFETY: NCCL may be loaded into any process, and is never unloaded.
    let found = names.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
    let missing = || Error::new(ErrorKind::Device, format!("no NCCL: {} not found", names[0]));
    let library = Box::leak(Box::new(found.ok_or_else(missing)?));
    // SAFETY: it is NCCL by its name, and leaked.
    unsafe { Functions::of(library) }
        .map_err(|name| Error::new(ErrorKind::Device, format!("NCCL too old, or not NCCL: {} has no {name}", names[0])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_ordinary_error() {
        let error = load(&["libnccl-that-nobody-has.so.2", "libnccl-neither.so"]).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "no NCCL: libnccl-that-nobody-has.so.2 not found");
        assert_eq!(error.kind(), ErrorKind::Device);
        // Some other library.
        let error = load(&["libc.so.6"]).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "NCCL too old, or not NCCL: libc.so.6 has no ncclGetVersion");
    }

    #[test]
    fn versions_are_read_as_nccl_writes_them() {
        let text = |code| NcclVersion::of(code).to_string();
        assert_eq!([text(23003), text(22809), text(21403), text(2804)], ["2.30.3", "2.28.9", "2.14.3", "2.8.4"]);
        assert!(NcclVersion::of(22809) < NcclVersion::of(23003));
    }
}
