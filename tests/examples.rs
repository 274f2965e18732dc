//! Every example runs, on a generated checkpoint that also the demo uses; and the demo itself.
#![cfg(feature = "cli")]

use std::fs;
use std::os::unix::fs::symlink;
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

#[test]
fn fused_buffers() {
    let text = run("08_fused_buffers");
    assert!(text.contains("16 buffers are as they should be"), "{text}");
    assert!(text.contains("19 tensors that no request names were not loaded: "), "{text}");
}

/// With weights that were trained, where they can be had.
#[cfg(feature = "examples")]
#[test]
fn candle_bert() {
    let fetched = Command::new(script("fetch-minilm")).output().unwrap();
    if !fetched.status.success() {
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        return eprintln!("SKIPPED: no weights: {}", String::from_utf8_lossy(&fetched.stderr));
    }
    let folder = String::from_utf8(fetched.stdout).unwrap();
    let text = output(Command::new(built("05_candle_bert")).arg(folder.trim()));
    // Sentences of one meaning are near each other, others are not.
    let near: Vec<f32> = text.lines().next().unwrap().split_whitespace().map_while(|word| word.parse().ok()).collect();
    assert!(near[0] > 0.999 && near[1] > 0.7 && near[2] < 0.3, "{text}");
    assert!(text.contains("candle's own loader gives the same 1152 numbers"), "{text}");
}

#[cfg(feature = "examples")]
#[test]
fn candle_llama_tp() {
    let folder = tempfile::tempdir().unwrap();
    let text = output(Command::new(built("06_candle_llama_tp")).arg(folder.path()));
    for (line, ranks) in text.lines().zip([1, 2, 4]) {
        let numbers: Vec<usize> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [of, held, whole] = numbers[..] else { panic!("{text}") };
        assert!(of == ranks && line.contains("logits differ by"), "{text}");
        // All is divided but the 7 norms, of 64 numbers, and embeddings and head, of 256 rows of as many.
        let same = (7 + 2 * 256) * 64 * 4;
        assert_eq!(held, (whole - same) / ranks + same, "{text}");
    }
    assert_eq!(text.lines().count(), 3, "{text}");
}

/// With the binary of the tests in place of a release build.
#[test]
fn demo_takes_a_path_that_is_relative_to_its_caller() {
    let folder = tempfile::tempdir().unwrap();
    output(Command::new(script("make-llama")).arg(folder.path().join("model")));
    let [tools, release] = ["tools", "target/release"].map(|name| folder.path().join(name));
    fs::create_dir_all(&tools).unwrap();
    fs::create_dir_all(&release).unwrap();
    symlink("/bin/true", tools.join("cargo")).unwrap();
    symlink(env!("CARGO_BIN_EXE_shardlift"), release.join("shardlift")).unwrap();
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin", tools.display());
    let mut demo = Command::new(script("demo"));
    demo.env("PATH", path).env("CARGO_TARGET_DIR", folder.path().join("target")).current_dir(&folder);
    let text = output(demo.arg("model"));
    assert!(text.contains("$ shardlift load model --tp 4 --check") && text.contains("check: every byte"), "{text}");
}

fn run(example: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    output(Command::new(script("make-llama")).arg(folder.path()));
    output(Command::new(built(example)).arg(folder.path()))
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
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
