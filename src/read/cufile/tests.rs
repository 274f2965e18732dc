//! The engine on cuFile's twin: single requests as every engine passes them, and a driver that takes its time.

use std::env;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libloading::Library;

use super::{Buffers, Cufile};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::Direct;
use crate::read::conformance::conforms;
use crate::read::{Engine, Registrar};
use crate::stage::{Pinned, Pinner, Ring};

/// The twins of driver and cuFile, beside the test binary: whoever asks for either from now on gets them.
fn twins() -> &'static [Library; 2] {
    static TWINS: OnceLock<[Library; 2]> = OnceLock::new();
    TWINS.get_or_init(|| {
        let binary = env::current_exe().unwrap();
        ["libsimcuda.so", "libsimcufile.so"].map(|name| {
            // SAFETY: libraries of this workspace, which are never closed.
            unsafe { Library::new(binary.with_file_name(name)) }.unwrap_or_else(|error| panic!("{name}: {error}"))
        })
    })
}

/// Calls a function of the driver's twin by its name and type.
macro_rules! driver {
    ($name:literal($($argument:expr => $of:ty),*)) => {
        // SAFETY: declared as in cuda.h.
        assert_eq!(unsafe { twins()[0].get::<extern "C" fn($($of),*) -> i32>($name).unwrap()($($argument),*) }, 0, $name)
    };
}

/// Makes a context current on this thread.
pub(in crate::read) fn enter() {
    let mut context = 0u64;
    driver!("cuInit"(0 => u32));
    driver!("cuDevicePrimaryCtxRetain"(&raw mut context => *mut u64, 0 => i32));
    driver!("cuCtxSetCurrent"(context => u64));
}

/// A ring of as many slots in the twin's device memory, which the host reaches.
pub(in crate::read) fn ring(slots: usize, slot_bytes: usize) -> Ring {
    enter();
    let ring = Ring::on_device(slots * slot_bytes, slot_bytes);
    while ring.grow(&OnTwin, slots, || false).unwrap() {}
    ring
}

#[derive(Debug)]
struct OnTwin;

impl Pinner for OnTwin {
    unsafe fn pin(&self, _: *mut u8, _: usize) -> Result<Pinned> {
        Err(Error::new(ErrorKind::Unsupported, "slots are made"))
    }

    fn make(&self, bytes: usize) -> Result<(u64, Pinned)> {
        let mut address = 0;
        driver!("cuMemAlloc_v2"(&raw mut address => *mut u64, bytes => usize));
        let registered = Buffers(super::Library::load()?).register(address, bytes)?;
        Ok((address, Box::new(OfTwin { registered: Some(registered), address })))
    }

    fn numa_node(&self) -> Option<u32> {
        None
    }
}

struct OfTwin {
    registered: Option<Box<dyn std::any::Any + Send + Sync>>,
    address: u64,
}

impl std::fmt::Debug for OfTwin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OfTwin")
    }
}

impl Drop for OfTwin {
    fn drop(&mut self) {
        enter();
        self.registered = None;
        driver!("cuMemFree_v2"(self.address => u64));
    }
}

/// In a process of its own.
#[test]
#[ignore = "run by another test"]
fn conforming() {
    twins();
    for threads in [1, 3] {
        let engine = Cufile::new(threads, Duration::from_secs(10)).unwrap();
        assert_eq!((engine.direct(), engine.threads()), (Direct::Known, threads));
        conforms(&engine);
    }
    // SAFETY: as exported by the twin.
    let number = |name| unsafe { twins()[1].get::<extern "C" fn() -> u64>(name).unwrap()() };
    assert_eq!((number("simcufile_live"), number("simcufile_violations")), (0, 0));
    // SAFETY: as above.
    let bytes = |kind| unsafe { twins()[1].get::<extern "C" fn(u32) -> u64>("simcufile_bytes").unwrap()(kind) };
    assert!(bytes(0) > 1 << 20 && [bytes(1), bytes(2)] == [0, 0], "not directly");
}

/// In a process of its own, whose driver takes a second to open.
#[test]
#[ignore = "run by another test"]
fn opening() {
    twins();
    let began = Instant::now();
    let open = |deadline| Cufile::new(1, Duration::from_millis(deadline));
    let error = open(100).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled, "{error}");
    assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
    // It goes on opening, and does so once.
    open(10_000).unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    open(0).unwrap();
}

/// In a process of its own, whose driver refuses at first.
#[test]
#[ignore = "run by another test"]
fn refusing() {
    twins();
    let error = Cufile::new(1, Duration::from_secs(10)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert_eq!(error.to_string(), "cuFileDriverOpen failed: status 5001: the nvidia-fs driver is not there");
    assert_eq!(Cufile::new(1, Duration::from_secs(10)).unwrap().direct(), Direct::Known);
}

/// In a process of its own, whose cuFile cannot be told to fail rather than read indirectly.
#[test]
#[ignore = "run by another test"]
fn unknowing() {
    twins();
    assert_eq!(Cufile::new(1, Duration::from_secs(10)).unwrap().direct(), Direct::Unknown);
}

/// In a process of its own, which has opened cuFile's driver before, and told it so or not: what holds is what it says.
#[test]
#[ignore = "run by another test"]
fn opened_before() {
    let [_, cufile] = twins();
    // SAFETY: declared as in cufile.h, but for the result, which is looked at as the number that it is.
    unsafe {
        if forbids() {
            let set = cufile.get::<extern "C" fn(i32, bool) -> u64>("cuFileSetParameterBool").unwrap();
            assert_eq!((set(1, false), set(2, false)), (0, 0));
        }
        assert_eq!(cufile.get::<extern "C" fn() -> u64>("cuFileDriverOpen").unwrap()(), 0);
    }
    let direct = if forbids() { Direct::Known } else { Direct::Unknown };
    assert_eq!(Cufile::new(1, Duration::from_secs(10)).unwrap().direct(), direct);
}

#[expect(clippy::disallowed_methods, reason = "tests speak to their children so")]
fn forbids() -> bool {
    env::var_os("FORBIDS").is_some()
}

#[expect(clippy::disallowed_methods, reason = "what the tests' own environment says must not reach the process")]
fn child(test: &str, settings: &[(&str, &str)]) {
    let mut command = Command::new(env::current_exe().unwrap());
    for (name, _) in env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"SIMCU")) {
        command.env_remove(name);
    }
    let test = format!("read::cufile::tests::{test}");
    let output = command.args(["--ignored", "--exact", &test]).envs(settings.iter().copied()).output().unwrap();
    let text = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    assert!(output.status.success() && text.contains("1 passed"), "{test} {settings:?}: {text}");
}

#[test]
fn cufile() {
    child("conforming", &[]);
}

#[test]
fn its_driver_is_opened_once_and_not_waited_for_for_ever() {
    child("opening", &[("SIMCUFILE_OPEN_MS", "1000")]);
    child("refusing", &[("SIMCUFILE_FAULT", "cuFileDriverOpen@1=5001")]);
}

#[test]
fn what_it_cannot_be_told_is_not_known() {
    child("unknowing", &[("SIMCUFILE_PARAMETERS", "0")]);
    child("unknowing", &[("SIMCUFILE_PARAMETERS", "0"), ("SIMCUFILE_MODE", "compat")]);
    child("opened_before", &[]);
    child("opened_before", &[("FORBIDS", "1")]);
}
