//! cuFile on this machine, for `doctor`: whether it opens, whether it is known to read directly, and how fast it is beside
//! staging.

use std::path::Path;

use serde_json::{Value, json};
use shardlift::CufileMeasurement;

use crate::output::Output;

/// What there is of it.
pub(super) struct Found {
    version: Option<(u32, u32)>,
    direct: shardlift::Direct,
    pub(super) measured: Result<CufileMeasurement, String>,
}

/// Opens cuFile's driver, and measures reads from PATH into the first GPU where there is one.
#[cfg(feature = "cuda")]
pub(super) fn look(path: &Path, gpu: Result<u32, String>) -> Result<Found, String> {
    use shardlift::read::{Cufile, cufile_facts};
    use shardlift::{Checkpoint, Loader, Plan, Rules, World, limits};

    let told = |error: shardlift::Error| error.to_string();
    let facts = cufile_facts().map_err(told)?;
    let engine = Cufile::new(1, limits::STALL_ERROR).map_err(told)?;
    let measure = || -> Result<CufileMeasurement, String> {
        let gpu = gpu?;
        let checkpoint = Checkpoint::open(path).map_err(told)?;
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
        let plan = Plan::new(&checkpoint, &rules, &World::local([gpu])).map_err(told)?;
        Loader::new().measure_cufile(&plan).map_err(told)
    };
    Ok(Found { version: facts.version, direct: engine.direct(), measured: measure() })
}

#[cfg(not(feature = "cuda"))]
pub(super) fn look(_: &Path, _: Result<u32, String>) -> Result<Found, String> {
    Err(super::LATER.into())
}

pub(super) fn print(found: &Result<Found, String>, output: &mut Output) {
    let Found { direct, measured, .. } = match found {
        Ok(found) => found,
        Err(why) => return output.line(format_args!("cufile: not usable: {why}")),
    };
    let version = found.as_ref().ok().and_then(version).unwrap_or_else(|| "of an unknown version".into());
    output.line(format_args!("cufile: {version}, direct: {direct}"));
    match measured {
        Ok(CufileMeasurement { gpu, cufile_gb_per_s, staged_gb_per_s, .. }) => output.line(format_args!(
            "cufile: {cufile_gb_per_s:.2} GB/s from storage into cuda:{gpu}, staged {staged_gb_per_s:.2} GB/s"
        )),
        Err(why) => output.line(format_args!("cufile: not measured: {why}")),
    }
}

pub(super) fn object(found: &Result<Found, String>) -> Value {
    let measured = found.as_ref().ok().map(|found| &found.measured);
    let figures = measured.and_then(|measured| measured.as_ref().ok()).map(|measured| {
        json!({
            "gpu": measured.gpu,
            "cufile_gb_per_s": measured.cufile_gb_per_s,
            "staged_gb_per_s": measured.staged_gb_per_s,
        })
    });
    json!({
        "usable": found.is_ok(),
        "why": found.as_ref().err(),
        "version": found.as_ref().ok().and_then(version),
        "direct": found.as_ref().ok().map(|found| found.direct.to_string()),
        "measured": figures,
        "measured_why": measured.and_then(|measured| measured.as_ref().err()),
    })
}

fn version(found: &Found) -> Option<String> {
    found.version.map(|(major, minor)| format!("{major}.{minor}"))
}

/// Bytes of a measurement, of the largest tensors: a second or less of fast storage.
#[cfg(feature = "cuda")]
const MEASURED_BYTES: u64 = 1 << 30;
