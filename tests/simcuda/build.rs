//! The library's name for the loader, and the kernels compiled for the host.

use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    // Whoever asks for `libcuda.so` gets the twin once it was loaded, by whatever path.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo::rustc-check-cfg=cfg(host_kernels)");
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (shim, kernels) = (here.join("shim"), here.join("../../kernels"));
    for folder in [&shim, &kernels] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    let sources = files(&shim, "cpp");
    if sources.is_empty() {
        return;
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-ffp-contract=off") // the GPU's compiler is told the same
        .include(&shim)
        .include(&kernels)
        .files(sources)
        .compile("simcuda_kernels");
    println!("cargo::rustc-cfg=host_kernels");
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}
