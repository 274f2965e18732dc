//! Tests in processes of their own, since what a twin is told and counts is of a whole process.

use std::env;
use std::ffi::{OsStr, OsString};
use std::process::{Command, Output};

/// A command whose process has none of the settings of twins that this one has.
#[expect(clippy::disallowed_methods, reason = "what the tests' own environment says must not reach the process")]
pub(crate) fn command(binary: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(binary);
    let ours = |name: &OsString| {
        [b"SIMCUDA_".as_slice(), b"SIMNCCL_", b"SIMCUFILE_", b"NCCL_"]
            .iter()
            .any(|ours| name.as_encoded_bytes().starts_with(ours))
    };
    for (name, _) in env::vars_os().filter(|(name, _)| ours(name)) {
        command.env_remove(name);
    }
    command
}

/// Runs an ignored test of this binary with these settings; it loads the twins that it needs.
pub fn run(test: &str, settings: &[(&str, &str)]) -> Output {
    let mut command = command(env::current_exe().unwrap());
    command.args(["--ignored", "--exact", test, "--nocapture"]);
    command.envs(settings.iter().copied()).output().unwrap()
}

/// The same of a test that has to pass; what it printed.
#[track_caller]
pub fn passes(test: &str, settings: &[(&str, &str)]) -> String {
    let Output { status, stdout, stderr } = run(test, settings);
    let text = [String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)].concat();
    assert!(status.success() && text.contains("1 passed"), "{test} {settings:?}: {text}");
    text
}
