//! What this machine moves at best, in GB/s: short measurements, ceilings and not averages.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Copies between buffers that fit no cache, on every thread.
pub(super) fn memcpy_gb_per_s(threads: usize) -> f64 {
    let each = |_| {
        let from = vec![1u8; CEILING_BYTES];
        let mut to = vec![2u8; CEILING_BYTES];
        move || to.copy_from_slice(black_box(&from))
    };
    best_gb_per_s(threads, each)
}

/// Reads from a file that lies in the page cache, on every thread.
#[cfg(target_os = "linux")]
pub(super) fn pread_gb_per_s(threads: usize) -> Option<f64> {
    use std::os::unix::fs::FileExt;

    let memfd = rustix::fs::memfd_create("shardlift-doctor", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    let file = fs::File::from(memfd);
    file.write_all_at(&vec![1; CEILING_BYTES], 0).ok()?;
    let file = &file;
    let each = |_| {
        let mut to = vec![2u8; CEILING_BYTES];
        move || {
            // A read that fails is as good as none: the best of several counts.
            let _ = file.read_exact_at(black_box(&mut to), 0);
        }
    };
    Some(best_gb_per_s(threads, each))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn pread_gb_per_s(_: usize) -> Option<f64> {
    None
}

/// Reads parts of a file past the page cache, on every thread, for a moment; each part once.
///
/// # Errors
/// Why it cannot be measured.
#[cfg(target_os = "linux")]
pub(super) fn storage_gb_per_s(path: &Path, threads: usize) -> Result<f64, String> {
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::atomic::{AtomicU64, Ordering};

    let told = |error: std::io::Error| error.to_string();
    let bytes = fs::metadata(path).map_err(told)?.len();
    if bytes < STORAGE_BYTES_MIN {
        return Err(format!("no file of at least {STORAGE_BYTES_MIN} bytes"));
    }
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let open = fs::OpenOptions::new().read(true).custom_flags(direct).open(path);
    let file = open.map_err(|error| format!("O_DIRECT is refused: {error}"))?;
    let (next, moved) = (AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let read = || -> Result<(), String> {
        let pages = memmap2::MmapOptions::new().len(STORAGE_CHUNK as usize).map_anon().map_err(told);
        let mut pages = pages?;
        while began.elapsed() < STORAGE_TIME {
            let at = next.fetch_add(STORAGE_CHUNK, Ordering::Relaxed);
            if at + STORAGE_CHUNK > bytes {
                break;
            }
            let read = rustix::io::pread(&file, &mut pages[..], at).map_err(|error| told(error.into()))?;
            moved.fetch_add(black_box(read) as u64, Ordering::Relaxed);
        }
        Ok(())
    };
    let outcomes: Vec<Result<(), String>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads * 2).map(|_| scope.spawn(read)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| Err("a thread died".into()))).collect()
    });
    outcomes.into_iter().collect::<Result<(), String>>()?;
    Ok(moved.into_inner() as f64 / began.elapsed().as_secs_f64() / 1e9)
}

#[cfg(not(target_os = "linux"))]
pub(super) fn storage_gb_per_s(_: &Path, _: usize) -> Result<f64, String> {
    Err("only on linux".into())
}

/// The best of several rounds in which every thread moves its bytes once: a ceiling, not an average.
fn best_gb_per_s<W: FnMut() + Send>(threads: usize, worker: impl Fn(usize) -> W) -> f64 {
    let mut workers: Vec<W> = (0..threads).map(worker).collect();
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        thread::scope(|scope| workers.iter_mut().for_each(|worker| drop(scope.spawn(worker))));
        best = best.min(start.elapsed().as_secs_f64());
    }
    (threads * CEILING_BYTES) as f64 / best / 1e9
}

/// Bytes that each thread moves in a round: more than its share of any cache.
const CEILING_BYTES: usize = 64 << 20;
/// The first brings the pages in, and one of the others is seldom disturbed.
const ROUNDS: usize = 4;
/// Bytes of one read from storage.
const STORAGE_CHUNK: u64 = 2 << 20;
/// Fewest bytes of a file that says something about storage.
const STORAGE_BYTES_MIN: u64 = 64 << 20;
/// How long storage is read from.
const STORAGE_TIME: Duration = Duration::from_millis(700);
