//! The library's name for the loader.

fn main() {
    // Whoever asks for `libnccl.so.2` gets the twin once it was loaded, by whatever path.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libnccl.so.2");
    println!("cargo::rerun-if-changed=build.rs");
}
