//! The one state of the twin in this process, and what surrounds every call.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use twins::settings::die;

use crate::abi::{Code, Handle, INVALID_ARGUMENT, Result};
use crate::comm::Comm;
use crate::config::Config;
use crate::faults::{Due, Faults};
use crate::ledger::Ledger;

/// Everything there is in this process.
pub(crate) struct Sim {
    pub(crate) faults: Faults,
    pub(crate) ledger: Ledger,
    /// With the number of the call that made each.
    pub(crate) comms: BTreeMap<Handle, Arc<Comm>>,
    made: Handle,
    /// Files of the ids that this process made, until all ranks have arrived.
    pub(crate) files: HashMap<u64, OwnedFd>,
    random: u64,
}

/// The top half-word of every handle: no address has it, so one that is followed faults.
const MARK: Handle = 0x5D << 56;

pub(crate) fn config() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(Config::from_env)
}

/// The locked state.
pub(crate) fn lock() -> MutexGuard<'static, Sim> {
    static SIM: OnceLock<Mutex<Sim>> = OnceLock::new();
    let sim = SIM.get_or_init(|| {
        let (fault, expected) = (&config().fault, "call@n=code, comma-separated; hang is a code");
        let faults = Faults::parse(fault, Due::read).unwrap_or_else(|| die("SIMNCCL_FAULT", fault, expected));
        let (comms, files, random) = (BTreeMap::new(), HashMap::new(), config().seed);
        Mutex::new(Sim { faults, ledger: Ledger::default(), comms, made: 0, files, random })
    });
    sim.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sim {
    /// The next number of the seeded sequence.
    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.random;
        word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ word >> 31
    }

    /// A handle that there was not before.
    pub(crate) fn handle(&mut self) -> Handle {
        self.made += 1;
        MARK | self.made
    }

    /// Whether this was a communicator of this process.
    fn was(&self, handle: Handle) -> bool {
        (MARK + 1..=MARK | self.made).contains(&handle)
    }
}

/// A defect of the caller's that NCCL may not show.
pub(crate) fn violate(call: &str, what: &str) {
    let text = format!("{call}: {what}");
    eprintln!("simnccl: VIOLATION {text}");
    lock().ledger.violations.push(text);
    if config().strict {
        std::process::abort();
    }
}

/// Texts of `ncclGetLastError`, the last one last; kept, since callers may hold them.
static TEXTS: Mutex<Vec<CString>> = Mutex::new(Vec::new());

/// Notes what went wrong, and gives the code back.
pub(crate) fn fail(code: Code, text: &str) -> Code {
    let text = CString::new(text).unwrap_or_default();
    TEXTS.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    code
}

/// What went wrong last.
pub(crate) fn last_text() -> *const c_char {
    TEXTS.lock().unwrap_or_else(PoisonError::into_inner).last().map_or(c"".as_ptr(), |text| text.as_ptr())
}

/// Counts a call, and says what a test wants to become of it. A call that is to hang never returns.
pub(crate) fn count(name: &'static str) -> Option<Due> {
    let mut sim = lock();
    sim.ledger.count(name);
    sim.faults.due(name)
}

/// A function that may be made to fail or to hang.
pub(crate) fn call(name: &'static str, body: impl FnOnce() -> Result<Code>) -> Code {
    match count(name) {
        Some(Due::Code(code)) => fail(code, "a test wants this call to fail"),
        Some(Due::Hang) => never(),
        None => body().unwrap_or_else(|code| code),
    }
}

/// A function that gives something back: it does so even if it is made to fail.
pub(crate) fn release(name: &'static str, body: impl FnOnce() -> Result<Code>) -> Code {
    let due = count(name);
    if due == Some(Due::Hang) {
        never();
    }
    let code = body().unwrap_or_else(|code| code);
    if let Some(Due::Code(code)) = due { fail(code, "a test wants this call to fail") } else { code }
}

pub(crate) fn never() -> ! {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// The communicator of a handle; one that was destroyed is a violation.
pub(crate) fn comm(call: &str, handle: Handle) -> Result<Arc<Comm>> {
    let (found, was) = {
        let sim = lock();
        (sim.comms.get(&handle).map(Arc::clone), sim.was(handle))
    };
    if found.is_none() && was {
        violate(call, "the communicator was destroyed or aborted");
    }
    found.ok_or_else(|| fail(INVALID_ARGUMENT, "not a communicator"))
}

/// Waits as long as the twin wants a call that does not block to take.
pub(crate) fn dawdle() {
    let most = config().jitter_us;
    if most > 0 {
        let microseconds = lock().random() % most;
        thread::sleep(Duration::from_micros(microseconds));
    }
}
