//! Launchers that a machine may have.

use std::io::Write;
use std::process::Command;

/// A command that ends well where Slurm starts steps of this many nodes.
pub(crate) const fn srun(nodes: &str) -> [&str; 6] {
    ["--nodes", nodes, "--ntasks-per-node", "1", "--immediate=5", "true"]
}

/// `--help` is answered by versions of torchrun that start nothing, beside a Python that is too new for them.
pub(crate) const TORCHRUN: [&str; 5] = ["--no_python", "--standalone", "--nproc_per_node", "1", "true"];

/// Whether a launcher can be run here, as a probe of it tells. A line says it if not; with `SHARDLIFT_REQUIRE_LAUNCHERS=1`,
/// which is for machines that are meant to have all of them, it fails.
#[track_caller]
pub(crate) fn is_there(name: &str, probe: &[&str]) -> bool {
    let why = match Command::new(name).args(probe).output() {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    };
    #[expect(clippy::disallowed_methods, reason = "tests are told so")]
    let required = std::env::var_os("SHARDLIFT_REQUIRE_LAUNCHERS").is_some_and(|value| value == "1");
    assert!(!required, "no ranks of {name} {}: {why}", probe.join(" "));
    // The test harness keeps what it prints itself from being hidden.
    let line = format!("SKIPPED: no ranks of {name} {}: {why}\n", probe.join(" "));
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    false
}
