//! Kernels compiled for the host, and the PTX that must have them too.

use std::ffi::{CStr, c_char, c_void};

use crate::handle::Handle;

/// A kernel as the C++ side exports it.
#[repr(C)]
pub(crate) struct SimKernel {
    name: *const c_char,
    params: u32,
    param_bytes: *const u32,
    launch: extern "C" fn(*mut *mut c_void, *const u32, *const u32, u32),
}

/// A loaded module: its PTX.
pub(crate) struct Module {
    pub(crate) context: Handle,
    pub(crate) ptx: String,
}

/// A kernel of a module.
pub(crate) struct Function {
    pub(crate) module: Handle,
    pub(crate) kernel: Kernel,
    /// Bytes of dynamic shared memory that a launch may ask for.
    pub(crate) shared_bytes: u32,
}

/// A kernel of the table.
#[derive(Clone, Copy)]
pub(crate) struct Kernel(&'static SimKernel);

// SAFETY: the table is constant, and a kernel may be launched from any thread.
unsafe impl Send for Kernel {}

/// A kernel with its arguments.
pub(crate) struct Launch {
    pub(crate) kernel: Kernel,
    pub(crate) arguments: Vec<Vec<u64>>,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
}

#[cfg(host_kernels)]
fn table() -> &'static [SimKernel] {
    unsafe extern "C" {
        fn simcuda_kernels(count: *mut usize) -> *const SimKernel;
    }
    let mut count = 0;
    // SAFETY: the shim's function gives a constant table and its length.
    unsafe {
        let first = simcuda_kernels(&mut count);
        if first.is_null() { &[] } else { std::slice::from_raw_parts(first, count) }
    }
}

#[cfg(not(host_kernels))]
fn table() -> &'static [SimKernel] {
    &[]
}

impl Kernel {
    /// The kernel of this name that was compiled for the host.
    pub(crate) fn find(name: &str) -> Option<Kernel> {
        table().iter().map(Kernel).find(|kernel| kernel.name() == name)
    }

    pub(crate) fn name(self) -> &'static str {
        // SAFETY: a constant C string of the table.
        unsafe { CStr::from_ptr(self.0.name) }.to_str().unwrap_or("?")
    }

    /// Sizes of the parameters, in bytes.
    pub(crate) fn param_bytes(self) -> &'static [u32] {
        if self.0.params == 0 {
            return &[];
        }
        // SAFETY: as many constants as the table says.
        unsafe { std::slice::from_raw_parts(self.0.param_bytes, self.0.params as usize) }
    }
}

impl Launch {
    pub(crate) fn run(&self) {
        let mut arguments: Vec<*mut c_void> =
            self.arguments.iter().map(|argument| argument.as_ptr().cast_mut().cast()).collect();
        (self.kernel.0.launch)(arguments.as_mut_ptr(), self.grid.as_ptr(), self.block.as_ptr(), self.shared_bytes);
    }
}

/// Whether PTX has an entry of this name; how many parameters it takes.
pub(crate) fn entry(ptx: &str, name: &str) -> Option<usize> {
    let mut rest = ptx;
    while let Some(at) = rest.find(".entry") {
        rest = rest[at + ".entry".len()..].trim_start();
        let Some(after) = rest.strip_prefix(name).map(str::trim_start) else { continue };
        if let Some(parameters) = after.strip_prefix('(') {
            return Some(parameters[..parameters.find(')')?].matches(".param").count());
        }
        if after.starts_with('{') || after.starts_with('.') {
            return Some(0);
        }
    }
    None
}

/// The `.version` of PTX, as 10 times the number; `None` if this is no PTX.
pub(crate) fn version(ptx: &str) -> Option<u32> {
    let line = ptx.lines().find_map(|line| line.trim().strip_prefix(".version"))?;
    let (major, minor) = line.trim().split_once('.')?;
    Some(major.parse::<u32>().ok()? * 10 + minor.split_whitespace().next()?.parse::<u32>().ok()?)
}

/// The newest PTX that a driver of this version takes, likewise.
pub(crate) fn newest_version(driver: i32) -> u32 {
    match driver {
        ..12000 => 78,
        12000..12080 => 80 + (driver as u32 - 12000) / 10,
        12080..12090 => 87,
        12090..13000 => 88,
        _ => 90 + (driver as u32 - 13000) / 10,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_versions_are_found_in_ptx() {
        let ptx = "//\n.version 8.0\n.target sm_70\n.visible .entry cast_long(\n\t.param .u64 a,\n\t.param .u32 b\n)\n{}\n.visible .entry cast(\n.param .u64 a\n)\n{ ret; }";
        assert_eq!(entry(ptx, "cast"), Some(1));
        assert_eq!(entry(ptx, "cast_long"), Some(2));
        assert_eq!(entry(ptx, "cast_lo"), None);
        assert_eq!(version(ptx), Some(80));
        assert_eq!(version("\x7fELF"), None);
        assert_eq!([12000, 12020, 12080, 12090, 13000].map(newest_version), [80, 82, 87, 88, 90]);
    }
}
