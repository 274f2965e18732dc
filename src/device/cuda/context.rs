//! Finding the driver, and the primary context of a GPU.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use libloading::Library;

use super::driver::{self, Attribute, Failure, RawContext, RawDevice, RawStream, Status};
use super::kernels::Module;
use super::service::Returns;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::sync::lock;

/// Names of the driver's library, in the order in which they are asked for: cudarc's first choice, and what drivers
/// install.
const LIBRARIES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// Loads the driver's library, for ever, and initialises it; cudarc panics where there is none.
///
/// # Errors
/// [`ErrorKind::Device`] if there is no driver, or it refuses.
pub(super) fn library() -> Result<()> {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    static INITIALISED: Mutex<bool> = Mutex::new(false);
    let mut initialised = lock(&INITIALISED);
    if *initialised {
        return Ok(());
    }
    if LIBRARY.get().is_none() {
        // SAFETY: the driver's library may be loaded into any process, and is never unloaded.
        let found = LIBRARIES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let missing = || Error::new(ErrorKind::Device, "no NVIDIA driver: libcuda.so.1 not found");
        let _ = LIBRARY.set(found.ok_or_else(missing)?);
    }
    // SAFETY: the library is there.
    unsafe { driver::init() }.map_err(|failure| {
        let what = if failure.is_no_device() { "no NVIDIA GPU" } else { "no NVIDIA driver" };
        Error::new(ErrorKind::Device, format!("{what}: {failure}"))
    })?;
    // SAFETY: as above.
    let version = unsafe { driver::version() }.map_err(|failure| Error::new(ErrorKind::Device, failure.to_string()))?;
    if version < limits::DRIVER_MIN {
        let of = |version: i32| format!("one for CUDA {}.{}", version / 1000, version % 1000 / 10);
        return Err(
            Error::new(ErrorKind::Device, "NVIDIA driver too old").with_expected(of(limits::DRIVER_MIN), of(version))
        );
    }
    *initialised = true;
    Ok(())
}

/// How many GPUs there are.
///
/// # Errors
/// [`ErrorKind::Device`] if there is no driver.
pub(super) fn device_count() -> Result<u32> {
    library()?;
    // SAFETY: the driver is loaded.
    unsafe { driver::device_count() }.map_err(|failure| Error::new(ErrorKind::Device, failure.to_string()))
}

/// The GPU with this number, without a context on it.
pub(super) fn device(ordinal: u32) -> Result<RawDevice> {
    library()?;
    // SAFETY: the driver is loaded.
    match unsafe { driver::device(ordinal) } {
        Ok(device) => Ok(device),
        Err(failure) if failure.is_no_device() => {
            let expected = format!("a device below {}", device_count()?);
            Err(Error::new(ErrorKind::Device, "no such device").with_expected(expected, format!("cuda:{ordinal}")))
        }
        Err(failure) => Err(error(ordinal, failure)),
    }
}

/// A driver's refusal as an error that names the device.
pub(super) fn error(ordinal: u32, failure: Failure) -> Error {
    let kind = if failure.is_out_of_memory() { ErrorKind::DeviceMemory } else { ErrorKind::Device };
    Error::new(kind, format!("cuda:{ordinal}: {failure}"))
}

/// The primary context of a GPU: the one that the caller's own CUDA code uses too. Given back when dropped.
#[derive(Debug)]
pub(super) struct Context {
    /// Itself, for threads that stay in it; dead while it is dropped.
    this: Weak<Context>,
    ordinal: u32,
    device: RawDevice,
    raw: RawContext,
    multiprocessors: u32,
    /// Where the device's memory pool is asked, digests are taken, and bytes come back.
    service: OnceLock<RawStream>,
    /// Of what passes there one thing at a time.
    returns: Mutex<Option<Returns>>,
    /// How long a wait for that may take.
    stall: Duration,
    module: OnceLock<Module>,
    compiling: Mutex<()>,
}

// SAFETY: the driver's handles may be used from every thread; `enter` makes the context current first.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of the GPU with this number; the caller's current context stays what it was. No wait
    /// for it that is not a load's takes longer than `stall`.
    pub(super) fn open(ordinal: u32, stall: Duration) -> Result<Arc<Context>> {
        let device = device(ordinal)?;
        // SAFETY: the driver is loaded, the device exists, here and below.
        let multiprocessors = unsafe { driver::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) };
        let multiprocessors = multiprocessors.map_err(|failure| error(ordinal, failure))?.max(1) as u32;
        // SAFETY: as above.
        let raw = unsafe { driver::retain_primary_context(device) }.map_err(|failure| error(ordinal, failure))?;
        Ok(Arc::new_cyclic(|this| Context {
            this: Weak::clone(this),
            ordinal,
            device,
            raw,
            multiprocessors,
            service: OnceLock::new(),
            returns: Mutex::default(),
            stall,
            module: OnceLock::new(),
            compiling: Mutex::new(()),
        }))
    }

    pub(super) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    pub(super) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    pub(super) fn device(&self) -> RawDevice {
        self.device
    }

    pub(super) fn stall(&self) -> Duration {
        self.stall
    }

    /// Whether an attribute of the device is there and not 0.
    pub(super) fn has(&self, attribute: Attribute) -> bool {
        // SAFETY: the driver is loaded, the device exists.
        unsafe { driver::attribute(self.device, attribute) }.is_ok_and(|value| value != 0)
    }

    /// Makes the context current on this thread until what this returns is dropped; then the one before is again. A
    /// thread that [stays](stay) keeps it.
    pub(super) fn enter(&self) -> Result<Entered> {
        if let Ok(Some(mut staying)) = STAYING.try_with(Cell::take) {
            let outcome = staying.enter(self);
            let _ = STAYING.try_with(|kept| kept.set(Some(staying)));
            if let Some(outcome) = outcome {
                return outcome
                    .map(|()| Entered { pushed: false, _here: PhantomData })
                    .map_err(|failure| self.error(failure));
            }
        }
        // SAFETY: the context is retained for as long as `self` lives.
        unsafe { driver::push_context(self.raw) }.map_err(|failure| self.error(failure))?;
        Ok(Entered { pushed: true, _here: PhantomData })
    }

    /// Calls the driver with this context current.
    pub(super) fn with<T>(&self, calls: impl FnOnce() -> Status<T>) -> Result<T> {
        let _entered = self.enter()?;
        calls().map_err(|failure| self.error(failure))
    }

    /// Gives something back with this context current; whether that was tried. There is nobody to tell if the driver
    /// refuses, as it does after a GPU was lost.
    pub(super) fn give_back(&self, calls: impl FnOnce() -> Status<()>) -> bool {
        // A context that is refused once must not cost the memory.
        let outcome = self.enter().or_else(|_| self.enter()).map(|_entered| calls());
        match &outcome {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => tracing::warn!("{}", self.error(*failure)),
            Err(error) => tracing::warn!("{error}"),
        }
        outcome.is_ok()
    }

    /// A failure as an error that names this device.
    pub(super) fn error(&self, failure: Failure) -> Error {
        error(self.ordinal, failure)
    }

    /// Free bytes and all bytes of the device's memory.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        // SAFETY: the context is current.
        let (free, total) = self.with(|| unsafe { driver::memory_info() })?;
        Ok((free as u64, total as u64))
    }

    /// The kernels, compiled for this device when they are first asked for: by the driver, which takes as long as many a
    /// load.
    pub(super) fn module(&self) -> Result<&Module> {
        let _one_at_a_time = lock(&self.compiling);
        if self.module.get().is_none() {
            let made = self.with(Module::load)?;
            let _ = self.module.set(made);
        }
        Ok(self.module.get().expect("bug in shardlift: set above"))
    }

    /// The stream on which memory of the pool is taken and given back, digests are taken, and bytes come back.
    pub(super) fn service(&self) -> Result<RawStream> {
        if let Some(stream) = self.service.get() {
            return Ok(*stream);
        }
        // SAFETY: the context is current.
        let made = self.with(|| unsafe { driver::create_stream() })?;
        if let Err(spare) = self.service.set(made) {
            // SAFETY: nobody else has the one that came second.
            self.give_back(|| unsafe { driver::destroy_stream(spare) });
        }
        Ok(*self.service.get().expect("bug in shardlift: set above"))
    }

    /// Does something with where bytes come back to, which is made when it is first needed; nobody else does meanwhile.
    pub(super) fn with_returns<T>(&self, body: impl FnOnce(&Returns) -> Result<T>) -> Result<T> {
        let mut returns = lock(&self.returns);
        let made = match returns.take() {
            Some(made) => made,
            None => Returns::new(self)?,
        };
        body(returns.insert(made))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(module) = self.module.take() {
            self.give_back(|| module.unload());
        }
        if let Some(returns) = lock(&self.returns).take() {
            returns.give_back(self);
        }
        if let Some(stream) = self.service.take() {
            // SAFETY: all that used the stream held this context.
            self.give_back(|| unsafe { driver::destroy_stream(stream) });
        }
        // SAFETY: retained in `open`, and everything that was made in it held `self`.
        if let Err(failure) = unsafe { driver::release_primary_context(self.device) } {
            tracing::warn!("{}", self.error(failure));
        }
    }
}

/// While it lives, a context is current on this thread, which it does not leave.
#[derive(Debug)]
pub(crate) struct Entered {
    pushed: bool,
    /// Dropped where it was made.
    _here: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            // Pushed by `enter` on this thread: the type is dropped where it was made.
            leave();
        }
    }
}

/// Takes the context away that this thread made current last.
fn leave() {
    // SAFETY: pushed on this thread.
    let popped = unsafe { driver::pop_context().or_else(|_| driver::pop_context()) };
    if let Err(failure) = popped {
        tracing::warn!("{failure}");
    }
}

thread_local! {
    /// Of a thread that stays in contexts.
    static STAYING: Cell<Option<Staying>> = const { Cell::new(None) };
}

/// Which context a thread stays in.
#[derive(Default)]
struct Staying {
    /// One of ours lies on the thread's stack.
    pushed: bool,
    /// The one that is current, if that is known.
    current: Option<Arc<Context>>,
}

impl Staying {
    /// Makes a context current unless it is; `None` for one that is being dropped, in which nobody may stay.
    fn enter(&mut self, context: &Context) -> Option<Status<()>> {
        if self.current.as_ref().is_some_and(|current| current.raw == context.raw) {
            return Some(Ok(()));
        }
        let next = context.this.upgrade()?;
        // SAFETY: the context is retained for as long as `next` lives.
        let entered =
            unsafe { if self.pushed { driver::set_context(next.raw) } else { driver::push_context(next.raw) } };
        self.current = None;
        if entered.is_ok() {
            self.pushed = true;
            self.current = Some(next);
        }
        Some(entered)
    }
}

/// Until it is dropped, contexts that this thread enters stay current between calls: entering the same again costs no
/// call of the driver. Then the context is current that was before.
#[derive(Debug)]
pub(crate) struct Stay {
    /// The thread stayed before: it ends with that.
    within: bool,
    /// Dropped where it was made.
    _here: PhantomData<*const ()>,
}

/// Lets this thread stay in the contexts that it enters.
pub(crate) fn stay() -> Stay {
    let within = STAYING.with(|kept| {
        let before = kept.take();
        let within = before.is_some();
        kept.set(Some(before.unwrap_or_default()));
        within
    });
    Stay { within, _here: PhantomData }
}

impl Drop for Stay {
    fn drop(&mut self) {
        if !self.within
            && let Some(staying) = STAYING.take()
        {
            if staying.pushed {
                leave();
            }
            // Only now: this may be the last that holds the context.
            drop(staying);
        }
    }
}
