//! `shardlift doctor`: what this machine can do, and what `auto` would choose.

mod ceilings;
mod cufile;
mod gpus;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::{Map, Value, json};
use shardlift::source::{FileSystem, SourceFile};
use shardlift::{Checkpoint, CufileMeasurement, Loader, Plan, Rules, World, limits};

use crate::args::DoctorArgs;
use crate::output::{Failure, Output, count, fields, human_bytes};

pub(crate) fn run(args: &DoctorArgs, output: &mut Output) -> Result<Map<String, Value>, Failure> {
    let DoctorArgs { path, json: _ } = args;
    // A path that is not there is an argument that is wrong, not a machine that is.
    fs::metadata(path).map_err(|error| shardlift::Error::io("cannot look at", path, error))?;
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let moving = cpus.min(limits::READ_THREADS_MAX);
    let threads = count(moving, "thread");
    let [total, available] = memory();
    let uring = uring();
    let file_system = file_system(path);
    let memcpy = ceilings::memcpy_gb_per_s(moving);
    let pread = ceilings::pread_gb_per_s(moving);
    let largest = largest_file(path).ok_or_else(|| "no file there".to_owned());
    let direct = largest.as_ref().map_err(Clone::clone).and_then(|file| direct(file));
    let storage = largest.and_then(|file| ceilings::storage_gb_per_s(&file, moving));
    let gpus = gpus::look();
    let nccl = nccl();
    let cufile = cufile::look(path, gpus::usable(&gpus));
    let auto = auto(path, cufile.as_ref().map_or(&[], |cufile| &cufile.measured));

    output.line(format_args!("cpus: {cpus}"));
    if let (Some(total), Some(available)) = (total, available) {
        output.line(format_args!("memory: {}, {} available", human_bytes(total), human_bytes(available)));
    }
    match &file_system {
        Some((kind, name)) => output.line(format_args!("file system of {}: {name} ({kind})", path.display())),
        None => output.line(format_args!("file system of {}: not known", path.display())),
    }
    output.line(format_args!("engine pread: usable"));
    output.line(format_args!("engine mmap: usable"));
    match &uring {
        Ok(()) => output.line(format_args!("engine uring: usable")),
        Err(why) => output.line(format_args!("engine uring: not usable: {why}")),
    }
    match &auto {
        Ok((engine, reason)) => output.line(format_args!("auto would choose: {engine} ({reason})")),
        Err(why) => output.line(format_args!("auto would choose: not known ({why})")),
    }
    output.line(format_args!("memcpy: {memcpy:.1} GB/s with {threads}"));
    if let Some(pread) = pread {
        output.line(format_args!("pread from the page cache: {pread:.1} GB/s with {threads}"));
    }
    match &direct {
        Ok(()) => output.line(format_args!("O_DIRECT: usable")),
        Err(why) => output.line(format_args!("O_DIRECT: not usable: {why}")),
    }
    match &storage {
        Ok(rate) => output.line(format_args!("storage, past the page cache: {rate:.1} GB/s with {threads}")),
        Err(why) => output.line(format_args!("storage, past the page cache: not measured: {why}")),
    }
    gpus::print(&gpus, output);
    match &nccl {
        Ok(version) => output.line(format_args!("nccl: {version}")),
        Err(why) => output.line(format_args!("nccl: not usable: {why}")),
    }
    cufile::print(&cufile, output);

    let usable = |why: Option<&String>| json!({ "usable": why.is_none(), "why": why });
    Ok(fields(json!({
        "path": path.to_string_lossy(),
        "cpus": cpus,
        "memory_bytes": total,
        "memory_available_bytes": available,
        "file_system": file_system.map(|(kind, name)| json!({ "kind": kind, "name": name })),
        "engines": { "pread": usable(None), "mmap": usable(None), "uring": usable(uring.as_ref().err()) },
        "auto": match &auto {
            Ok((engine, reason)) => json!({ "engine": engine, "reason": reason }),
            Err(why) => json!({ "engine": null, "reason": why }),
        },
        "memcpy_gb_per_s": memcpy,
        "page_cache_gb_per_s": pread,
        "o_direct": usable(direct.as_ref().err()),
        "storage_gb_per_s": storage.as_ref().ok(),
        "storage_why": storage.as_ref().err(),
        "cuda": gpus::object(&gpus),
        "cufile": cufile::object(&cufile),
        "nccl": { "usable": nccl.is_ok(), "why": nccl.as_ref().err(), "version": nccl.as_ref().ok() },
    })))
}

/// What is said of what this build was made without.
#[cfg(not(feature = "cuda"))]
const LATER: &str = "not in this build";

/// The version of this machine's NCCL, or why there is none to use.
#[cfg(feature = "cuda")]
fn nccl() -> Result<String, String> {
    shardlift::nccl_version().map(|version| version.to_string()).map_err(|error| error.to_string())
}

/// Why there is no NCCL to use.
#[cfg(not(feature = "cuda"))]
fn nccl() -> Result<String, String> {
    Err(LATER.into())
}

/// Whether a file can be read past the page cache as the loader would.
fn direct(path: &Path) -> Result<(), String> {
    let file = SourceFile::open(path).map_err(|error| error.to_string())?;
    let aligned = file.direct(limits::DIRECT_ALIGNMENT).map(|_| ());
    aligned.ok_or_else(|| "the file system refuses it, or wants a larger alignment".into())
}

/// The largest file at PATH, or in it.
fn largest_file(path: &Path) -> Option<PathBuf> {
    let sized = files(path).map(|path| (fs::metadata(&path), path));
    sized.filter_map(|(meta, path)| Some((meta.ok()?.len(), path))).max().map(|(_, path)| path)
}

/// The file at PATH, or those in it.
fn files(path: &Path) -> impl Iterator<Item = PathBuf> {
    let all = match fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => vec![path.to_owned()],
    };
    all.into_iter().filter(|path| path.is_file())
}

/// All of this machine's memory, and what can still be had, in bytes.
fn memory() -> [Option<u64>; 2] {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    ["MemTotal:", "MemAvailable:"].map(|key| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    })
}

/// Kind and name of the file system that PATH lies on.
fn file_system(path: &Path) -> Option<(&'static str, String)> {
    // A folder is asked through one of its files, which may lie elsewhere by a link.
    let file = files(path).find_map(|file| SourceFile::open(file).ok())?;
    let file_system = file.file_system().ok()?;
    Some(match file_system {
        FileSystem::Local(name) => ("local", name.into()),
        FileSystem::Memory(name) => ("memory", name.into()),
        FileSystem::Network(name) => ("network", name.into()),
        FileSystem::Unknown(magic) => ("unknown", format!("{magic:#x}")),
        _ => return None,
    })
}

#[cfg(target_os = "linux")]
fn uring() -> Result<(), String> {
    shardlift::read::Uring::new(1, 1, false).map(drop).map_err(|error| error.to_string())
}

#[cfg(not(target_os = "linux"))]
fn uring() -> Result<(), String> {
    Err("only on linux".into())
}

/// What `auto` answers for all of the checkpoint at PATH; into the first GPU if something was measured there.
fn auto(path: &Path, measured: &[CufileMeasurement]) -> Result<(&'static str, String), String> {
    let asked = || -> shardlift::Result<_> {
        let world = measured.first().map_or_else(|| World::host(1), |measured| World::local([measured.gpu]));
        let plan = Plan::new(&Checkpoint::open(path)?, &Rules::replicate_all(), &world)?;
        Ok(Loader::new().cufile_measured(measured).engine_for(&plan))
    };
    asked().map_err(|error| error.to_string())
}
