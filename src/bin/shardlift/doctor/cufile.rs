//! cuFile on this machine, for `doctor`: whether it opens, whether it is known to read directly, and how fast it is beside
//! staging.

use std::path::Path;

use serde_json::{Value, json};
use shardlift::{CufileMeasurement, Direct};

use crate::output::Output;

/// What there is of it.
pub(super) struct Found {
    version: Option<(u32, u32)>,
    direct: Direct,
    /// From PATH into each GPU.
    pub(super) measured: Vec<CufileMeasurement>,
    /// Why not into one of them.
    why: Option<String>,
}

/// Opens cuFile's driver, and measures reads from PATH into each GPU where there are some.
#[cfg(feature = "cuda")]
pub(super) fn look(path: &Path, gpus: Result<Vec<u32>, String>) -> Result<Found, String> {
    use shardlift::limits;
    use shardlift::read::{Cufile, cufile_facts};

    let told = |error: shardlift::Error| error.to_string();
    let facts = cufile_facts().map_err(told)?;
    let engine = Cufile::new(1, limits::STALL_ERROR).map_err(told)?;
    let (measured, why) = measure(path, gpus);
    Ok(Found { version: facts.version, direct: engine.direct(), measured, why })
}

/// What could be measured, and why not all.
#[cfg(feature = "cuda")]
fn measure(path: &Path, gpus: Result<Vec<u32>, String>) -> (Vec<CufileMeasurement>, Option<String>) {
    use std::time::Instant;

    use shardlift::{Loader, Plan, World};

    let (began, mut measured) = (Instant::now(), Vec::new());
    let all = || -> Result<(), String> {
        let told = |error: shardlift::Error| error.to_string();
        let gpus = gpus?;
        let (checkpoint, rules) = largest_tensors(path)?;
        for gpu in gpus {
            if began.elapsed() > MEASURED_FOR {
                return Err(format!("cuda:{gpu} and what comes after it: others took {MEASURED_FOR:?}"));
            }
            let plan = Plan::new(&checkpoint, &rules, &World::local([gpu])).map_err(told)?;
            measured.push(Loader::new().measure_cufile(&plan).map_err(told)?);
        }
        Ok(())
    };
    let why = all().err();
    (measured, why)
}

/// The checkpoint at PATH, and rules for as many of its tensors as are measured.
#[cfg(feature = "cuda")]
fn largest_tensors(path: &Path) -> Result<(shardlift::Checkpoint, shardlift::Rules), String> {
    use shardlift::{Checkpoint, Rules, limits};

    let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
    if checkpoint.bytes() < limits::AUTO_SMALL {
        return Err(format!("less than {} bytes of tensors", limits::AUTO_SMALL));
    }
    let mut tensors: Vec<_> =
        checkpoint.tensors().iter().map(|tensor| (tensor.end - tensor.start, &tensor.name)).collect();
    tensors.sort_unstable_by(|a, b| b.cmp(a));
    let mut rules = Rules::replicate_all();
    let mut bytes = 0;
    for (more, name) in tensors {
        rules = rules.keeping(name);
        bytes += more;
        if bytes >= MEASURED_BYTES {
            break;
        }
    }
    Ok((checkpoint, rules))
}

#[cfg(not(feature = "cuda"))]
pub(super) fn look(_: &Path, _: Result<Vec<u32>, String>) -> Result<Found, String> {
    Err(super::LATER.into())
}

pub(super) fn print(found: &Result<Found, String>, output: &mut Output) {
    let Found { direct, measured, why, .. } = match found {
        Ok(found) => found,
        Err(why) => return output.line(format_args!("cufile: not usable: {why}")),
    };
    let version = found.as_ref().ok().and_then(version).unwrap_or_else(|| "of an unknown version".into());
    output.line(format_args!("cufile: {version}, direct: {direct}"));
    for CufileMeasurement { gpu, cufile_gb_per_s, staged_gb_per_s, .. } in measured {
        output.line(format_args!(
            "cufile: {cufile_gb_per_s:.2} GB/s from storage into cuda:{gpu}, staged {staged_gb_per_s:.2} GB/s"
        ));
    }
    if let Some(why) = why {
        output.line(format_args!("cufile: not measured: {why}"));
    }
}

pub(super) fn object(found: &Result<Found, String>) -> Value {
    let figures = |one: &CufileMeasurement| {
        json!({
            "gpu": one.gpu,
            "file_system": one.file_system,
            "cufile_gb_per_s": one.cufile_gb_per_s,
            "staged_gb_per_s": one.staged_gb_per_s,
        })
    };
    let measured = found.as_ref().map_or(&[][..], |found| &found.measured);
    json!({
        "usable": found.is_ok(),
        "why": found.as_ref().err(),
        "version": found.as_ref().ok().and_then(version),
        "direct": found.as_ref().ok().map(|found| found.direct.to_string()),
        "measured": measured.iter().map(figures).collect::<Vec<_>>(),
        "measured_why": found.as_ref().ok().and_then(|found| found.why.as_ref()),
    })
}

fn version(found: &Found) -> Option<String> {
    found.version.map(|(major, minor)| format!("{major}.{minor}"))
}

/// Bytes of a measurement, of the largest tensors: a second or less of fast storage.
#[cfg(feature = "cuda")]
const MEASURED_BYTES: u64 = 1 << 30;

/// No further GPU is measured after so long.
#[cfg(feature = "cuda")]
const MEASURED_FOR: std::time::Duration = std::time::Duration::from_secs(60);
