//! Every example runs, on a generated checkpoint that also the demo uses.
#![cfg(feature = "cli")]

use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn inspect() {
    let text = run("01_inspect");
    assert!(text.contains("39 tensors, 8000000 bytes"), "{text}");
}

#[test]
fn load() {
    let text = run("02_load");
    assert!(text.contains("8000000 bytes in"), "{text}");
}

#[test]
fn tensor_parallel() {
    let text = run("03_tensor_parallel");
    assert!(text.contains("rank 3: "), "{text}");
}

fn run(example: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-llama");
    output(Command::new(make).arg(folder.path()));
    output(Command::new(built(example)).arg(folder.path()))
}

/// Where cargo put the example: beside the binary, built by the same `cargo test`.
fn built(example: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_shardlift")).parent().unwrap().join("examples");
    let file = folder.join(example);
    assert!(
        file.exists(),
        "{} is not there: `cargo test` builds it, `cargo test --test examples` does not",
        file.display()
    );
    file
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}
