//! The library's name for the loader.

fn main() {
    // Whoever asks for `libcufile.so.0` gets the twin once it was loaded, by whatever path.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcufile.so.0");
    println!("cargo::rerun-if-changed=build.rs");
}
