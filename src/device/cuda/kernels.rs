//! The kernels of `kernels/*.cu`: their committed PTX, and how they are launched.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::Mutex;

use super::context::Context;
use super::driver::{self, RawFunction, RawModule, RawStream, Status};
use crate::device::RawCopy;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::LOOPS_MAX;
use crate::stride::{Loop, bytes_moved};
use crate::sync::lock;

/// Threads of a block, of every kernel.
const THREADS: u32 = 256;

/// Most blocks of a launch for each multiprocessor: the kernels stride over their grid, and this fills the device.
const BLOCKS_EACH: u32 = 8;

/// The side of the tiles that the transposing kernels work on.
const TILE: u64 = 32;

/// The PTX that drivers from CUDA 12.0 on compile for cards from V100 on.
const PTX: &str = concat!(include_str!("../../../kernels/shardlift.ptx"), "\0");

/// The loaded kernels.
#[derive(Debug)]
pub(super) struct Module {
    raw: RawModule,
    /// Those that were asked for: launches come by the thousand.
    functions: Mutex<HashMap<CString, RawFunction, foldhash::fast::FixedState>>,
}

// SAFETY: handles of the driver, which may be used from every thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Compiles the kernels for the current context's device.
    pub(super) fn load() -> Status<Module> {
        let ptx = CStr::from_bytes_with_nul(PTX.as_bytes()).expect("bug in shardlift: a zero in the PTX");
        // SAFETY: the context is current, the text is PTX that ends with a zero.
        unsafe { driver::load_module(ptx) }.map(|raw| Module { raw, functions: Mutex::default() })
    }

    /// Unloads them; the context is current.
    pub(super) fn unload(&self) -> Status<()> {
        // SAFETY: loaded in `load`, and no kernel of it is queued any more.
        unsafe { driver::unload_module(self.raw) }
    }

    fn function(&self, name: &CStr) -> Status<RawFunction> {
        let mut functions = lock(&self.functions);
        if let Some(&known) = functions.get(name) {
            return Ok(known);
        }
        // SAFETY: the module is loaded, the context is current.
        let function = unsafe { driver::function(self.raw, name) }?;
        functions.insert(name.to_owned(), function);
        Ok(function)
    }
}

/// The loops of a copy as kernels take them: outermost first, unused ones counting 1.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KernelLoops {
    count: [u64; LOOPS_MAX],
    src_stride: [u64; LOOPS_MAX],
    dst_stride: [u64; LOOPS_MAX],
}

/// A kernel for one copy, and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kernel {
    /// Copies runs with accesses of this many bytes.
    Gather { access: u64, loops: KernelLoops },
    /// Swaps rows and columns of elements of this many bytes.
    Transpose { element: u64, batch: u64, rows: u64, cols: u64, src: [u64; 2], dst: [u64; 2] },
    /// Converts elements.
    Cast { name: CString, loops: KernelLoops, run_elements: u64 },
}

/// Queues the kernel that makes this copy on the device, from `src`.
///
/// # Safety
/// - the context is current and `stream` is its own;
/// - until the stream has come past it, every byte that the copy names from `src` on is readable memory of the device,
///   every destination byte writable, and nobody else uses either.
pub(super) unsafe fn copy(context: &Context, copy: &RawCopy, src: u64, stream: RawStream) -> Result<()> {
    let kernel = Kernel::of(copy, src)?;
    let module = context.module()?;
    let (mut src, mut dst, mut run) = (src, copy.dst, copy.run);
    let launch = |name: &CStr, items: u64, parameters: &mut [*mut c_void]| {
        let function = module.function(name)?;
        let blocks = blocks(context, items);
        // SAFETY: the caller's duties; the parameters are those of the kernel's declaration, in order.
        unsafe { driver::launch(function, blocks, THREADS, stream, parameters) }
    };
    match kernel {
        Kernel::Gather { access, mut loops } => {
            let name = named(&format!("shardlift_gather_{access}"));
            let items = bytes_moved(&copy.loops, run) / access;
            launch(&name, items, &mut [erase(&mut src), erase(&mut dst), erase(&mut loops), erase(&mut run)])
        }
        Kernel::Transpose { element, mut batch, mut rows, mut cols, src: mut from, dst: mut to } => {
            let name = named(&format!("shardlift_transpose_{element}"));
            let tiles = batch * rows.div_ceil(TILE) * cols.div_ceil(TILE);
            let parameters = &mut [
                erase(&mut src),
                erase(&mut dst),
                erase(&mut batch),
                erase(&mut rows),
                erase(&mut cols),
                erase(&mut from[0]),
                erase(&mut from[1]),
                erase(&mut to[0]),
                erase(&mut to[1]),
            ];
            launch(&name, tiles * u64::from(THREADS), parameters)
        }
        Kernel::Cast { name, mut loops, mut run_elements } => {
            let items = bytes_moved(&copy.loops, run_elements);
            let parameters = &mut [erase(&mut src), erase(&mut dst), erase(&mut loops), erase(&mut run_elements)];
            launch(&name, items, parameters)
        }
    }
    .map_err(|failure| context.error(failure))
}

/// The digest of memory of the device.
///
/// # Errors
/// As [`Context::serve`].
///
/// # Safety
/// `address..address + bytes` is readable memory of the device, on a multiple of 8, and nobody writes it meanwhile, and for
/// ever if this stalls.
pub(super) unsafe fn digest(context: &Context, address: u64, bytes: u64) -> Result<u64> {
    let module = context.module()?;
    let blocks = blocks(context, bytes.div_ceil(8));
    let (mut src, mut length) = (address, bytes);
    // SAFETY: the kernel is queued on the stream that it is given, and adds to the sum; the caller's duties.
    unsafe {
        context.sum(|mut total, stream| {
            let function = module.function(c"shardlift_digest")?;
            let parameters = &mut [erase(&mut src), erase(&mut length), erase(&mut total)];
            driver::launch(function, blocks, THREADS, stream, parameters)
        })
    }
}

/// How many blocks work on this many items.
fn blocks(context: &Context, items: u64) -> u32 {
    let most = u64::from(context.multiprocessors() * BLOCKS_EACH);
    items.div_ceil(u64::from(THREADS)).clamp(1, most) as u32
}

impl Kernel {
    fn of(copy: &RawCopy, src: u64) -> Result<Kernel> {
        let mut loops: Vec<Loop> = copy.loops.iter().filter(|inner| inner.count != 1).copied().collect();
        // Neighbouring threads write neighbouring bytes.
        loops.sort_by_key(|inner| std::cmp::Reverse(inner.dst_stride));
        if let Some(cast) = copy.cast {
            let name = |dtype: crate::dtype::Dtype| dtype.name().to_ascii_lowercase();
            let name = named(&format!("shardlift_cast_{}_{}", name(cast.from()), name(cast.to())));
            let run_elements = copy.run / u64::from(cast.from().bits() / 8);
            return Ok(Kernel::Cast { name, loops: KernelLoops::new(&loops)?, run_elements });
        }
        if let Some(transpose) = transpose(&loops, copy.run) {
            let Kernel::Transpose { element, src: from, dst: to, .. } = &transpose else { return Ok(transpose) };
            let aligned = [src, copy.dst, from[0], from[1], to[0], to[1]];
            if aligned.iter().all(|number| number.is_multiple_of(*element)) {
                return Ok(transpose);
            }
        }
        let strides = loops.iter().flat_map(|inner| [inner.src_stride, inner.dst_stride]);
        let common = strides.fold(src | copy.dst | copy.run | 16, |bits, stride| bits | stride);
        Ok(Kernel::Gather { access: 1 << common.trailing_zeros(), loops: KernelLoops::new(&loops)? })
    }
}

impl KernelLoops {
    fn new(loops: &[Loop]) -> Result<KernelLoops> {
        let mut made = KernelLoops { count: [1; LOOPS_MAX], src_stride: [0; LOOPS_MAX], dst_stride: [0; LOOPS_MAX] };
        let Some(first) = LOOPS_MAX.checked_sub(loops.len()) else {
            return Err(Error::new(ErrorKind::Unsupported, "copy has too many loops for a kernel")
                .with_expected(format!("at most {LOOPS_MAX}"), loops.len()));
        };
        for (at, inner) in (first..).zip(loops) {
            made.count[at] = inner.count;
            made.src_stride[at] = inner.src_stride;
            made.dst_stride[at] = inner.dst_stride;
        }
        Ok(made)
    }
}

/// The copy as a transposition of elements of `run` bytes, if it is one of at most three dimensions.
fn transpose(loops: &[Loop], run: u64) -> Option<Kernel> {
    if !matches!(run, 1 | 2 | 4 | 8) || !(2..=3).contains(&loops.len()) {
        return None;
    }
    let cols = loops.iter().position(|inner| inner.src_stride == run)?;
    let rows = loops.iter().position(|inner| inner.dst_stride == run)?;
    if cols == rows {
        return None;
    }
    let one = Loop { count: 1, src_stride: 0, dst_stride: 0 };
    let batch = (0..loops.len()).find(|&at| at != cols && at != rows).map_or(one, |at| loops[at]);
    let (rows, cols) = (loops[rows], loops[cols]);
    Some(Kernel::Transpose {
        element: run,
        batch: batch.count,
        rows: rows.count,
        cols: cols.count,
        src: [batch.src_stride, rows.src_stride],
        dst: [batch.dst_stride, cols.dst_stride],
    })
}

fn named(name: &str) -> CString {
    CString::new(name).expect("bug in shardlift: a zero in a kernel's name")
}

fn erase<T>(value: &mut T) -> *mut c_void {
    (&raw mut *value).cast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cast::Cast;
    use crate::dtype::Dtype;
    use crate::stride::Loops;

    fn copy(loops: &[(u64, u64, u64)], run: u64, cast: Option<Cast>) -> RawCopy {
        let make = |&(count, src_stride, dst_stride): &(u64, u64, u64)| Loop { count, src_stride, dst_stride };
        RawCopy { src: std::ptr::null(), dst: 1024, loops: loops.iter().map(make).collect::<Loops>(), run, cast }
    }

    #[test]
    fn accesses_are_as_wide_as_everything_allows() {
        let access = |copy: &RawCopy, src| match Kernel::of(copy, src).unwrap() {
            Kernel::Gather { access, .. } => access,
            other => panic!("{other:?}"),
        };
        assert_eq!(access(&copy(&[(3, 64, 32)], 32, None), 256), 16);
        assert_eq!(access(&copy(&[(3, 64, 32)], 32, None), 264), 8);
        assert_eq!(access(&copy(&[(3, 68, 32)], 32, None), 256), 4);
        assert_eq!(access(&copy(&[(3, 64, 32)], 6, None), 256), 2);
        assert_eq!(access(&copy(&[(3, 63, 32)], 32, None), 256), 1);
    }

    #[test]
    fn transpositions_are_told_from_gathers() {
        let kernel = Kernel::of(&copy(&[(7, 40, 2), (20, 2, 14)], 2, None), 256).unwrap();
        let expected = Kernel::Transpose { element: 2, batch: 1, rows: 7, cols: 20, src: [0, 40], dst: [0, 14] };
        assert_eq!(kernel, expected);
        let kernel = Kernel::of(&copy(&[(3, 280, 280), (7, 40, 2), (20, 2, 14)], 2, None), 256).unwrap();
        let expected = Kernel::Transpose { element: 2, batch: 3, rows: 7, cols: 20, src: [280, 40], dst: [280, 14] };
        assert_eq!(kernel, expected);
        // An odd address cannot be read in elements of two bytes.
        let kernel = Kernel::of(&copy(&[(7, 40, 2), (20, 2, 14)], 2, None), 257).unwrap();
        assert!(matches!(kernel, Kernel::Gather { access: 1, .. }), "{kernel:?}");
    }

    #[test]
    fn casts_name_their_kernel() {
        let cast = Cast::new(Dtype::F8E4M3, Dtype::Bf16).unwrap();
        let Kernel::Cast { name, loops, run_elements } =
            Kernel::of(&copy(&[(3, 64, 64)], 32, Some(cast)), 256).unwrap()
        else {
            panic!("no cast")
        };
        assert_eq!((name.as_c_str(), run_elements), (c"shardlift_cast_f8_e4m3_bf16", 32));
        assert_eq!((loops.count, loops.src_stride[4]), ([1, 1, 1, 1, 3], 64));
    }
}
