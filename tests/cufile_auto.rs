//! When loads go through cuFile, on its twin: what was measured, what is known of it, and what is done without it. One test
//! function for each process that is needed, as in `cufile.rs`.

#[path = "support/cufile.rs"]
mod cufile;

use std::time::{Duration, Instant};

use cufile::{
    MORE, SKIPPED, auto, cool, loader, measurement, nothing_is_left, plan_for, planned, println_result, write,
};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, CufileMeasurement, Direct, ErrorKind, Loader, World};
use twins::child::passes;

/// In a process of its own, whose GPU has room for the tensors and for few slots.
#[test]
#[ignore = "run by another test"]
fn tight() {
    let (_folder, plan) = planned(&[0], MORE);
    let error = loader().staging(64 << 20).load(&plan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeviceMemory, "{error}");
    nothing_is_left();
    cool(&plan);
    let auto = auto(&plan).staging(64 << 20);
    let (weights, report) = auto.load(&plan).unwrap();
    if report.warnings.is_empty() {
        return println_result(SKIPPED);
    }
    assert_ne!(report.engine, "cufile");
    assert!(report.warnings[0].contains("cufile is not used: too little free memory on cuda:0"), "{report:?}");
    assert_eq!((report.direct, twins::cufile::live()), (None, 0));
    weights.check().unwrap();
    drop((weights, auto));
    nothing_is_left();
}

/// In a process of its own, whose cuFile takes long to open.
#[test]
#[ignore = "run by another test"]
fn late() {
    let (_folder, plan) = planned(&[0], 0);
    let began = Instant::now();
    let error = loader().stall(Duration::from_millis(50), Duration::from_millis(200)).load(&plan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled, "{error}");
    assert!(error.to_string().contains("cuFileDriverOpen"), "{error}");
    assert!(began.elapsed() < Duration::from_millis(1200), "{:?}", began.elapsed());
    // Another engine never asks for it.
    let began = Instant::now();
    Loader::new().engine(EngineChoice::Pread).load(&plan).unwrap();
    assert!(began.elapsed() < Duration::from_millis(1000), "{:?}", began.elapsed());
    loader().load(&plan).unwrap().0.check().unwrap();
    assert_eq!(twins::cufile::calls(Some("cuFileDriverOpen")), 1);
}

/// In a process of its own: `auto` chooses cuFile where it was measured to be faster and known to be direct, and does without
/// it where it fails.
#[test]
#[ignore = "run by another test"]
fn automatic() {
    let (_folder, plan) = planned(&[0], MORE);
    let auto = |measurement| Loader::new().staging(2 << 20).drop_page_cache(true).cufile_measured(&[measurement]);
    let fast = measurement(&plan, Direct::Known, 6.0);
    let chosen = |measurement| {
        // Whoever asks what is in the page cache brings some of it there.
        cool(&plan);
        auto(measurement).engine_for(&plan).0
    };
    if chosen(measurement(&plan, Direct::Known, 5.0)) != "uring" {
        return println_result(SKIPPED);
    }
    assert_eq!(chosen(measurement(&plan, Direct::Unknown, 6.0)), "uring");
    assert_eq!(chosen(CufileMeasurement { gpu: 1, ..fast.clone() }), "uring");
    assert_eq!(chosen(CufileMeasurement { file_system: 0, ..fast.clone() }), "uring");
    // Whoever measured is told why that was of no use.
    let why = |measurement| {
        cool(&plan);
        auto(measurement).engine_for(&plan).1
    };
    for (measurement, expected) in [
        (measurement(&plan, Direct::Known, 5.0), "; cufile was no faster"),
        (measurement(&plan, Direct::Unknown, 6.0), "; cufile is not known to be direct"),
        (CufileMeasurement { gpu: 1, ..fast.clone() }, "; cufile was measured elsewhere"),
    ] {
        let reason = why(measurement);
        assert!(reason.ends_with(expected), "{reason}");
    }
    assert_eq!(chosen(fast.clone()), "cufile");
    assert_eq!(twins::cufile::calls(None), 0, "cuFile was asked without being chosen");
    cool(&plan);
    let (weights, report) = auto(fast.clone()).load(&plan).unwrap();
    assert_eq!((report.engine.as_str(), report.direct), ("cufile", Some(Direct::Known)));
    assert!(report.engine_reason.contains("6.00 GB/s where staging had 5.00"), "{report:?}");
    weights.check().unwrap();
    drop(weights);
    // Before it begins, and while it reads: the load goes on.
    for (fault, engine) in [
        ("cuFileHandleRegister@1=5008", "another"),
        ("cuFileBufRegister@1=5010", "another"),
        ("cuFileHandleRegister@2=5030", "cufile"),
        ("cuFileRead@1=5030", "cufile"),
        ("cuFileRead@7=-5", "cufile"),
        ("cuFileRead@3=5011,cuFileRead@4=5011,cuFileRead@20=5034", "cufile"),
    ] {
        cool(&plan);
        twins::cufile::fault(fault);
        let (weights, report) = auto(fast.clone()).load(&plan).unwrap();
        twins::cufile::fault("");
        assert_eq!(report.engine == "cufile", engine == "cufile", "{fault}");
        // Not all bytes were read directly, if any.
        assert_eq!(report.direct, (engine == "cufile").then_some(Direct::No), "{fault}");
        let cause = fault.split('=').nth(1).unwrap().split(',').next().unwrap();
        let cause = cause.strip_prefix('-').map_or(cause.to_owned(), |errno| format!("os error {errno}"));
        assert!(report.warnings.iter().any(|warning| warning.contains(&cause)), "{fault}: {:?}", report.warnings);
        weights.check().unwrap();
        drop(weights);
        nothing_is_left();
    }
    // A file that is not there cannot be had by any way.
    std::fs::OpenOptions::new().write(true).open(&plan.checkpoint().files()[1].path).unwrap().set_len(4096).unwrap();
    let error = auto(fast).load(&plan).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Changed | ErrorKind::Truncated), "{error}");
    nothing_is_left();
}

/// In a process of its own, without nvidia-fs: reads that are not direct fail, where that can be asked for.
#[test]
#[ignore = "run by another test"]
fn compatible() {
    let (_folder, plan) = planned(&[0], MORE);
    let (weights, report) = match loader().load(&plan) {
        Ok(loaded) => loaded,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Device);
            assert!(error.to_string().contains("engine cufile") && error.to_string().contains("nvidia-fs"), "{error}");
            cool(&plan);
            let auto = Loader::new().cufile_measured(&[measurement(&plan, Direct::Known, 6.0)]);
            let (weights, report) = auto.load(&plan).unwrap();
            assert_ne!(report.engine, "cufile");
            assert!(report.warnings.iter().all(|warning| warning.contains("nvidia-fs")), "{:?}", report.warnings);
            weights.check().unwrap();
            return println_result("refused");
        }
    };
    assert_eq!((report.engine.as_str(), report.direct), ("cufile", Some(Direct::Unknown)));
    let [direct, bounced, compat, _] = twins::cufile::bytes();
    assert_eq!([direct, bounced], [0, 0]);
    assert!(compat >= report.needed_bytes);
    weights.check().unwrap();
    println_result("unknown");
}

/// In a process of its own: both ways are measured, and what comes of it may be given to another loader.
#[test]
#[ignore = "run by another test"]
fn measured() {
    let (_folder, plan) = planned(&[3, 3], 5_000_000);
    let found = Loader::new().staging(2 << 20).measure_cufile(&plan).unwrap();
    assert_eq!((found.gpu, found.direct), (3, Direct::Known));
    assert!(found.cufile_gb_per_s > 0.0 && found.staged_gb_per_s > 0.0, "{found:?}");
    let several = plan_for(plan.checkpoint(), World::local(0..2));
    assert_eq!(Loader::new().measure_cufile(&several).unwrap_err().kind(), ErrorKind::Usage);
    nothing_is_left();
}

/// In a process of its own: where cuFile does not read to is told before it is opened.
#[test]
#[ignore = "run by another test"]
fn elsewhere() {
    let (_folder, plan) = planned(&[0, 1], 0);
    let host = plan_for(plan.checkpoint(), World::host(2));
    for (plan, found) in [(&plan, "cuda:0, cuda:1"), (&host, "host")] {
        let error = loader().load(plan).unwrap_err();
        assert_eq!((error.kind(), error.found()), (ErrorKind::Unsupported, Some(found)), "{error}");
    }
    assert_eq!(twins::cufile::calls(None), 0);
    nothing_is_left();
}

/// In a process of its own, without cuFile.
#[test]
#[ignore = "run by another test"]
fn missing() {
    twins::cuda::load();
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 0);
    let plan = plan_for(&Checkpoint::open(folder.path()).unwrap(), World::local([0]));
    if shardlift::read::cufile_facts().is_ok() {
        return println_result("SKIPPED: this machine has a cuFile");
    }
    let error = loader().load(&plan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().contains("engine cufile: no cuFile: libcufile.so.0 not found"), "{error}");
}

#[test]
fn auto_does_without_it_where_slots_have_no_room() {
    passes("tight", &[("SIMCUDA_MEMORY", "120M")]);
}

#[test]
fn a_driver_that_opens_late_is_not_waited_for() {
    passes("late", &[("SIMCUFILE_OPEN_MS", "1500")]);
}

#[test]
fn auto_takes_it_where_it_is_known_to_be_better() {
    passes("automatic", &[]);
}

#[test]
fn indirect_reads_are_refused_or_not_called_direct() {
    assert!(passes("compatible", &[("SIMCUFILE_MODE", "compat")]).contains("refused"));
    assert!(passes("compatible", &[("SIMCUFILE_MODE", "compat"), ("SIMCUFILE_PARAMETERS", "0")]).contains("unknown"));
}

#[test]
fn both_ways_are_measured() {
    passes("measured", &[]);
}

#[test]
fn other_destinations_are_refused() {
    passes("elsewhere", &[]);
    passes("missing", &[]);
}
