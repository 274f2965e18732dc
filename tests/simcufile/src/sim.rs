//! The one state of the twin, what surrounds every call, and what is written down.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::time::Duration;
use std::{fs, thread};

use twins::settings::die;

use crate::config::Config;
use crate::faults::{Due, Faults};

/// Everything there is.
pub(crate) struct Sim {
    pub(crate) faults: Faults,
    pub(crate) open: bool,
    /// By parameter: those of compatibility mode begin as libraries have them, allowed and not forced.
    pub(crate) parameters: BTreeMap<i32, bool>,
    /// Live handles, and how many there ever were.
    pub(crate) files: BTreeMap<u64, RegisteredFile>,
    pub(crate) made: u64,
    /// Registered memory: length by address.
    pub(crate) memory: BTreeMap<u64, u64>,
    pub(crate) bytes: Bytes,
    pub(crate) reads: u64,
    calls: BTreeMap<&'static str, u64>,
    violations: Vec<String>,
}

#[derive(Clone, Copy)]
pub(crate) struct RegisteredFile {
    pub(crate) descriptor: i32,
    /// Device and inode.
    pub(crate) identity: (u64, u64),
    pub(crate) reads: u32,
}

/// How bytes came.
#[derive(Default, Clone, Copy)]
pub(crate) struct Bytes {
    pub(crate) direct: u64,
    pub(crate) bounced: u64,
    pub(crate) compat: u64,
    /// Most that was registered at a time.
    pub(crate) registered_peak: u64,
}

/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`.
pub(crate) const ALLOW_COMPAT: i32 = 1;
/// `CUFILE_PARAM_FORCE_COMPAT_MODE`.
pub(crate) const FORCE_COMPAT: i32 = 2;

pub(crate) fn config() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(Config::from_env)
}

/// The locked state.
pub(crate) fn lock() -> MutexGuard<'static, Sim> {
    static SIM: OnceLock<Mutex<Sim>> = OnceLock::new();
    let sim = SIM.get_or_init(|| {
        let (fault, expected) = (&config().fault, "call@n=code, comma-separated");
        let faults = Faults::parse(fault, Due::read).unwrap_or_else(|| die("SIMCUFILE_FAULT", fault, expected));
        Mutex::new(Sim {
            faults,
            open: false,
            parameters: BTreeMap::from([(ALLOW_COMPAT, true), (FORCE_COMPAT, false)]),
            files: BTreeMap::new(),
            made: 0,
            memory: BTreeMap::new(),
            bytes: Bytes::default(),
            reads: 0,
            calls: BTreeMap::new(),
            violations: Vec::new(),
        })
    });
    sim.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a call, and says what a test wants to become of it. A call that is to hang never returns.
pub(crate) fn count(name: &'static str) -> Option<Due> {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| {
        // SAFETY: the function stays, since nobody unloads the twin.
        unsafe { libc::atexit(at_exit) };
    });
    let due = {
        let mut sim = lock();
        *sim.calls.entry(name).or_default() += 1;
        sim.faults.due(name)
    };
    while due == Some(Due::Hang) {
        thread::sleep(Duration::from_secs(3600));
    }
    due
}

impl Sim {
    /// A defect of the caller's that cuFile may not show.
    pub(crate) fn violate(&mut self, call: &str, what: &str) {
        let text = format!("{call}: {what}");
        eprintln!("simcufile: VIOLATION {text}");
        self.violations.push(text);
        if config().strict {
            std::process::abort();
        }
    }

    pub(crate) fn compat(&self, parameter: i32) -> bool {
        self.parameters.get(&parameter).copied().unwrap_or(false)
    }

    pub(crate) fn calls(&self, name: Option<&str>) -> u64 {
        match name {
            Some(name) => self.calls.get(name).copied().unwrap_or(0),
            None => self.calls.values().sum(),
        }
    }

    /// What was not deregistered.
    pub(crate) fn live(&self) -> u64 {
        (self.files.len() + self.memory.len()) as u64
    }

    pub(crate) fn violations(&self) -> u64 {
        self.violations.len() as u64
    }

    /// Counts from 0 again, but not violations.
    pub(crate) fn reset(&mut self) {
        self.calls.clear();
        self.bytes = Bytes::default();
    }

    /// Everything, as JSON.
    pub(crate) fn report(&self) -> String {
        let calls: Vec<String> = self.calls.iter().map(|(name, count)| format!("\"{name}\": {count}")).collect();
        let violations: Vec<String> = self.violations.iter().map(|text| format!("{text:?}")).collect();
        let Bytes { direct, bounced, compat, registered_peak } = self.bytes;
        let mut text = String::from("{\n");
        let mut field = |name: &str, value: String| writeln!(text, "  \"{name}\": {value},").expect("a string");
        field("calls_by_function", format!("{{{}}}", calls.join(", ")));
        field("direct_bytes", direct.to_string());
        field("bounced_bytes", bounced.to_string());
        field("compat_bytes", compat.to_string());
        field("registered_peak_bytes", registered_peak.to_string());
        field("leaks", self.live().to_string());
        write!(text, "  \"violations\": [{}]\n}}\n", violations.join(", ")).expect("a string");
        text
    }
}

extern "C" fn at_exit() {
    let sim = lock();
    if let Some(path) = config().ledger.as_ref().map(|path| path.replace("%p", &std::process::id().to_string()))
        && let Err(error) = fs::write(&path, sim.report())
    {
        eprintln!("simcufile: SIMCUFILE_LEDGER={path}: {error}");
    }
    if sim.live() > 0 {
        eprintln!("simcufile: LEAK: {} files, {} places of memory", sim.files.len(), sim.memory.len());
    }
}
