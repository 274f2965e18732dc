//! The driver's twin, for tests, which load it before anything asks for the driver.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::OnceLock;

use crate::child;
use crate::library::{Library, functions_of_every_twin};

static LIBRARY: Library = Library::new("simcuda");

functions_of_every_twin!();

/// The context that is current on this thread, as a number; 0 for none.
pub fn current_context() -> usize {
    let mut context = 0;
    // SAFETY: as the driver declares it: it writes a handle.
    let result = unsafe { function::<extern "C" fn(*mut usize) -> i32>(c"cuCtxGetCurrent")(&raw mut context) };
    assert!(result == 0 || result == 3, "{result}"); // 3: not initialised yet
    context
}

/// Bytes that went to a device (kind 0), came from it (1), or were copied on it (2).
pub fn bytes(device: u32, kind: u32) -> u64 {
    // SAFETY: as exported by the twin.
    unsafe { LIBRARY.own::<extern "C" fn(u32, u32) -> u64>("bytes")(device, kind) }
}

/// A command whose process finds the twins under the names that programs ask for, and none of our settings.
pub fn command(binary: impl AsRef<OsStr>) -> Command {
    let mut command = child::command(binary);
    command.env("LD_LIBRARY_PATH", folder());
    command
}

/// A folder with both names of the driver, and those of NCCL and cuFile where their twins were built.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let library = LIBRARY.path();
        let folder = library.parent().unwrap().join("twins");
        fs::create_dir_all(&folder).unwrap();
        let [nccl, cufile] = ["nccl", "cufile"].map(|name| library.with_file_name(format!("libsim{name}.so")));
        let cuda = [("libcuda.so", &library), ("libcuda.so.1", &library)];
        for (name, target) in cuda.into_iter().chain([("libnccl.so.2", &nccl), ("libcufile.so.0", &cufile)]) {
            // Another test may do the same at this moment: a link of one's own, moved into place.
            let link = folder.join(format!("{name}.{}", process::id()));
            fs::remove_file(&link).ok();
            if target.exists() {
                symlink(target, &link).unwrap();
                fs::rename(&link, folder.join(name)).unwrap();
            }
        }
        folder
    })
}
