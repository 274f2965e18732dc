//! Loads of real files: every engine, rank count, cut, memory policy and device, bit for bit.

#[path = "support/model.rs"]
mod model;
#[path = "support/worlds.rs"]
mod worlds;

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use shardlift::plan::{Cooperate, DeviceSpec};
use shardlift::read::{EngineChoice, Mmap, Uring};
use shardlift::source::{FileSystem, SourceFile};
use shardlift::{CallerMemory, Checkpoint, ErrorKind, Loader, Memory, Plan, Rank, Report, Residency, Rules, World};

const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring];

/// A load that was asked to read with io_uring did so, where this machine has it.
fn assert_uring_if_asked(asked: EngineChoice, report: &Report) {
    static USABLE: LazyLock<bool> = LazyLock::new(|| {
        let usable = Uring::new(1, 1, true);
        #[expect(clippy::print_stderr, reason = "a skipped test says so")]
        if let Err(error) = &usable {
            eprintln!("SKIPPED: loads with io_uring: {error}");
        }
        usable.is_ok()
    });
    if asked == EngineChoice::Uring && *USABLE {
        assert_eq!(report.engine, "uring", "{}", report.engine_reason);
    }
}

fn all_worlds() -> Vec<World> {
    [1, 2, 3, 4, 8].iter().flat_map(|&n| worlds::of(n)).collect()
}

#[test]
fn every_engine_and_world_is_bit_exact() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 1);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    for engine in ENGINES {
        for memory in [Memory::Blocks, Memory::PerTensor] {
            for world in all_worlds() {
                let loader = Loader::new().engine(engine).memory(memory).staging(8 << 20);
                let plan = loader.plan(&checkpoint, &rules, &world).unwrap();
                let mut load = loader.start(&plan).unwrap();
                let seen = load.by_ref().collect::<shardlift::Result<Vec<_>>>().unwrap().len();
                let (weights, report) = load.finish().unwrap();
                assert_eq!(seen, tensors.len() * world.size() as usize);
                for rank in 0..world.size() {
                    for tensor in &tensors {
                        let landed = weights.tensor(Rank(rank), &tensor.name).unwrap();
                        let expected = model::expected(tensor, rank as usize, world.size() as usize);
                        assert!(
                            landed.to_bytes().unwrap() == expected,
                            "{engine:?} {memory:?} {world:?} {} rank {rank}",
                            tensor.name
                        );
                        if memory == Memory::Blocks {
                            assert_eq!(landed.device_ptr() % 256, 0);
                        }
                    }
                }
                weights.check().unwrap();
                assert_uring_if_asked(engine, &report);
                // Aligned reads may ask for up to a page before and after each span.
                let slack = if report.engine == "uring" { 32 * 4096 } else { 0 };
                assert!(report.storage_bytes_read >= report.needed_bytes);
                assert!(report.storage_bytes_read <= report.needed_bytes + slack, "{report:?}");
                assert_eq!(report.needed_bytes, checkpoint.bytes());
            }
        }
    }
}

#[test]
fn what_the_index_leaves_out_is_neither_planned_nor_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 20);
    let (left, kept): (Vec<_>, Vec<_>) = tensors.iter().partition(|t| ["c.whole", "f.whole"].contains(&&*t.name));
    let file = |name: &str| if name < "f" { "one.safetensors" } else { "two.safetensors" };
    let weight_map: serde_json::Value = kept.iter().map(|t| (t.name.clone(), file(&t.name))).collect();
    let bytes = kept.iter().map(|t| t.bytes.len() as u64).sum::<u64>();
    let index = serde_json::json!({ "metadata": { "total_size": bytes }, "weight_map": weight_map });
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.bytes(), bytes);
    assert_eq!(checkpoint.warnings(), ["left out: 2 tensors that the index does not name: c.whole, f.whole"]);
    // No rule matches what is left out.
    let rules = model::RULES.replace("\"**\"", "\"{h,i}.*\"");
    let rules = Rules::from_toml(&rules).unwrap();
    for engine in ENGINES {
        for world in worlds::of(2).into_iter().chain(worlds::of(3)) {
            let loader = Loader::new().engine(engine).staging(8 << 20);
            let (weights, report) = loader.load(&loader.plan(&checkpoint, &rules, &world).unwrap()).unwrap();
            assert_eq!(report.needed_bytes, bytes);
            assert_uring_if_asked(engine, &report);
            for rank in 0..world.size() {
                for tensor in &kept {
                    let landed = weights.tensor(Rank(rank), &tensor.name).unwrap();
                    let expected = model::expected(tensor, rank as usize, world.size() as usize);
                    assert!(landed.to_bytes().unwrap() == expected, "{engine:?} {}", tensor.name);
                }
                assert!(left.iter().all(|tensor| weights.tensor(Rank(rank), &tensor.name).is_err()));
            }
        }
    }
}

#[test]
fn mapped_tensors_are_lent_and_the_rest_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 2);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    for ranks in [1, 2] {
        let loader = Loader::new().residency(Residency::Mapped);
        let plan = loader.plan(&checkpoint, &rules, &World::host(ranks)).unwrap();
        let (weights, report) = loader.load(&plan).unwrap();
        for rank in 0..ranks {
            for tensor in &tensors {
                let landed = weights.tensor(Rank(rank), &tensor.name).unwrap();
                assert!(*landed.to_bytes().unwrap() == model::expected(tensor, rank as usize, ranks as usize));
            }
        }
        assert_eq!(report.landed_bytes, (0..ranks).map(|rank| plan.bytes_on(Rank(rank))).sum::<u64>());
        if ranks == 1 {
            assert_eq!(report.storage_bytes_read, 0);
        } else {
            assert!(report.storage_bytes_read > 0);
        }
    }
}

#[test]
fn tensors_outlive_the_weights_and_become_vectors() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 3);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new().memory(Memory::PerTensor);
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(2)).unwrap();
    let load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    let (mut weights, _) = load.finish().unwrap();
    let kept = weights.tensor(Rank(0), "d.rows").unwrap().clone();
    let taken = weights.take(Rank(1), "e.columns").unwrap();
    assert_eq!(weights.tensor(Rank(1), "e.columns").unwrap_err().kind(), ErrorKind::NotFound);
    let shared = weights.take(Rank(0), "d.rows").unwrap();
    assert_eq!(shared.into_vec::<half::bf16>().unwrap_err().kind(), ErrorKind::Usage);
    drop(weights);
    assert!(*kept.to_bytes().unwrap() == model::expected(&tensors[3], 0, 2));
    // Whoever watched the load has no part in its memory.
    let vector = taken.into_vec::<half::bf16>().unwrap();
    assert_eq!(monitor.progress().tensors_done, 2 * tensors.len() as u64);
    monitor.cancel();
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    assert!(bytes == model::expected(&tensors[4], 1, 2));
    assert_eq!(kept.into_vec::<f32>().unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn the_callers_memory_is_filled_and_its_size_checked() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 4);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new();
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(1)).unwrap();
    let mut buffer = vec![0u8; tensors[3].bytes.len()];
    let mut entry =
        CallerMemory { rank: Rank(0), name: "d.rows".into(), address: buffer.as_mut_ptr(), bytes: buffer.len() };
    // SAFETY: `buffer` outlives the load and its weights, and is not touched until they are dropped.
    let load = unsafe { loader.start_into(&plan, std::slice::from_ref(&entry)) }.unwrap();
    drop(load.finish().unwrap());
    assert!(buffer == tensors[3].bytes);
    let nothing = CallerMemory { name: "i.empty".into(), address: std::ptr::null_mut(), bytes: 0, ..entry.clone() };
    // SAFETY: no bytes are read or written there.
    let (weights, _) = unsafe { loader.start_into(&plan, &[nothing]) }.unwrap().finish().unwrap();
    assert!(weights.tensor(Rank(0), "i.empty").unwrap().to_bytes().unwrap().is_empty());
    entry.bytes -= 1;
    // SAFETY: as above; the size is refused before anything is written.
    let refused = unsafe { loader.start_into(&plan, &[entry]) }.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Usage);
    assert_eq!(refused.tensor(), Some("d.rows"));
}

#[test]
fn a_slow_consumer_does_not_stop_the_load() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 6);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new().staging(2 << 20);
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host_staged(4)).unwrap();
    let mut load = loader.start(&plan).unwrap();
    let monitor = load.monitor();
    let first = load.next().unwrap().unwrap();
    let began = Instant::now();
    while monitor.progress().tensors_done < monitor.progress().tensors_total {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", monitor.progress());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(1 + load.by_ref().count(), tensors.len() * 4);
    drop(first);
    load.finish().unwrap();
}

#[test]
fn reshard_writes_partitions_that_join_to_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 7);
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    let outside = tempfile::tempdir().unwrap();
    for ranks in [1, 2, 4] {
        let out = outside.path().join(format!("tp{ranks}"));
        let loader = Loader::new().staging(4 << 20);
        let plan = loader.plan(&checkpoint, &rules, &World::host(ranks)).unwrap();
        loader.reshard(&plan, &out, false).unwrap();
        assert_eq!(loader.reshard(&plan, &out, false).unwrap_err().kind(), ErrorKind::Usage);
        loader.reshard(&plan, &out, true).unwrap();
        assert!(out.join("config.json").is_file());
        for rank in 0..ranks {
            let file = out.join(format!("model-rank-{rank}-part-0.safetensors"));
            let bytes = std::fs::read(&file).unwrap();
            let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let part = Checkpoint::open(&file).unwrap();
            assert_eq!(part.tensors().len(), tensors.len());
            for tensor in &tensors {
                let expected = model::expected(tensor, rank as usize, ranks as usize);
                assert!(read.tensor(&tensor.name).unwrap().data() == expected, "{} of {ranks}", tensor.name);
            }
        }
        assert_eq!(
            std::fs::read_dir(outside.path()).unwrap().filter(|e| e.is_ok()).count(),
            ranks.ilog2() as usize + 1
        );
    }
}

#[test]
fn a_cancelled_reshard_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 8);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let outside = tempfile::tempdir().unwrap();
    let loader = Loader::new().throttle(Some(20 << 20));
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(2)).unwrap();
    let reshard = loader.start_reshard(&plan, outside.path().join("out"), false).unwrap();
    let monitor = reshard.monitor();
    monitor.cancel();
    assert_eq!(reshard.finish().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn what_ranks_read_together_is_not_written_by_one() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 8);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let world = World::member(Rank(0), 2, DeviceSpec::Host).reading_together(vec![0, 0], Cooperate::Always);
    let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &world).unwrap();
    assert!(plan.report().received_bytes > 0);
    let out = folder.path().join("out");
    let error = Loader::new().reshard(&plan, &out, false).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Usage, "ranks that read together load as a group"));
    assert!(!out.exists());
}

/// An engine keeps nothing of the files that it read once nobody reads with it.
#[test]
fn an_engine_that_maps_files_lets_go_of_them() {
    let mmap = Arc::new(Mmap::new(2));
    let loader = Loader::new().custom_engine(mmap.clone());
    for seed in [10, 11] {
        let folder = tempfile::tempdir().unwrap();
        model::write(folder.path(), seed);
        let rules = Rules::from_toml(model::RULES).unwrap();
        let plan = loader.plan(&Checkpoint::open(folder.path()).unwrap(), &rules, &World::host(2)).unwrap();
        let (weights, _) = loader.load(&plan).unwrap();
        weights.check().unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains(folder.path().to_str().unwrap()), "{maps}");
    }
}

#[test]
fn an_alias_shows_its_original_wherever_that_lies() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 9);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules =
        Rules::from_toml(&format!("alias = [{{ name = \"tied\", of = \"f.whole\" }}]\n{}", model::RULES)).unwrap();
    let expected = &tensors[5].bytes;
    let mut buffer = vec![0u8; expected.len()];
    let entry =
        CallerMemory { rank: Rank(0), name: "f.whole".into(), address: buffer.as_mut_ptr(), bytes: buffer.len() };
    for world in [World::host(2), World::host_staged(2)] {
        for residency in [Residency::Owned, Residency::Mapped] {
            for memory in [Memory::Blocks, Memory::PerTensor] {
                for callers in [&[][..], std::slice::from_ref(&entry)] {
                    let loader = Loader::new().residency(residency).memory(memory);
                    let plan = loader.plan(&checkpoint, &rules, &world).unwrap();
                    // SAFETY: `buffer` outlives each load and its weights, and is not touched meanwhile.
                    let mut load = unsafe { loader.start_into(&plan, callers) }.unwrap();
                    let seen = load.by_ref().collect::<shardlift::Result<Vec<_>>>().unwrap();
                    assert_eq!(seen.iter().filter(|tensor| tensor.name() == "tied").count(), 2);
                    let (weights, _) = load.finish().unwrap();
                    for rank in [Rank(0), Rank(1)] {
                        let tied = weights.tensor(rank, "tied").unwrap();
                        assert!(*tied.to_bytes().unwrap() == *expected, "{world:?} {residency:?} {memory:?} {rank}");
                        assert_eq!(tied.device_ptr(), weights.tensor(rank, "f.whole").unwrap().device_ptr());
                    }
                }
            }
        }
    }
}

#[test]
fn a_check_notices_one_flipped_bit() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 10);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new();
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(2)).unwrap();
    for tensor in tensors.iter().filter(|tensor| !tensor.bytes.is_empty()) {
        let (weights, _) = loader.load(&plan).unwrap();
        let before = weights.check().unwrap();
        let landed = weights.tensor(Rank(1), &tensor.name).unwrap();
        let last = landed.device_ptr() as usize + landed.nbytes() - 1;
        // SAFETY: the byte is the last of the tensor's own memory, and nobody holds a slice of it now.
        unsafe { *std::ptr::with_exposed_provenance_mut::<u8>(last) ^= 0x10 };
        let error = weights.check().unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (ErrorKind::Mismatch, Some(&*tensor.name)));
        assert_eq!(error.at().rank, Some(Rank(1)));
        // SAFETY: as above.
        unsafe { *std::ptr::with_exposed_provenance_mut::<u8>(last) ^= 0x10 };
        assert_eq!(weights.check().unwrap(), before);
    }
}

#[test]
fn a_staging_budget_of_any_size_serves_every_engine() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 15);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    for bytes in [2 << 20, 2_100_001, 5_000_000] {
        for engine in ENGINES {
            for world in worlds::of(2) {
                let loader = Loader::new().engine(engine).staging(bytes);
                let plan = loader.plan(&checkpoint, &rules, &world).unwrap();
                loader.load(&plan).unwrap().0.check().unwrap();
            }
        }
    }
}

#[test]
fn a_checkpoint_may_have_more_files_than_a_process_may_open() {
    let folder = tempfile::tempdir().unwrap();
    for file in 0..200 {
        let bytes = vec![file as u8; 3000];
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![3000], &bytes).unwrap();
        let path = folder.path().join(format!("part-{file:03}.safetensors"));
        safetensors::serialize_to_file([(format!("tensor.{file}"), view)], None, &path).unwrap();
    }
    for engine in ["pread", "mmap", "uring"] {
        for residency in ["owned", "mapped"] {
            let command =
                "ulimit -n 190 && exec \"$0\" load \"$1\" --rules replicate --check --engine $2 --residency $3";
            let output = std::process::Command::new("sh")
                .args(["-c", command, env!("CARGO_BIN_EXE_shardlift")])
                .arg(folder.path())
                .args([engine, residency])
                .output()
                .unwrap();
            assert!(output.status.success(), "{engine} {residency}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

#[test]
fn the_page_cache_forgets_what_was_read_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 17);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    let resident = || {
        let shares = checkpoint.files().iter().map(|file| {
            let size = file.identity.size;
            SourceFile::open(&file.path).unwrap().resident_fraction(&[(0, size)])
        });
        shares.sum::<Option<f64>>().map(|sum| sum / checkpoint.files().len() as f64)
    };
    for file in checkpoint.files() {
        let open = std::fs::File::open(&file.path).unwrap();
        open.sync_all().unwrap(); // what is not written yet cannot be forgotten
        if matches!(SourceFile::open(&file.path).unwrap().file_system(), Ok(FileSystem::Memory(_))) {
            return; // the page cache is where these files are
        }
    }
    for engine in ENGINES {
        for world in worlds::of(2) {
            let loader = Loader::new().engine(engine).drop_page_cache(true);
            let plan = loader.plan(&checkpoint, &rules, &world).unwrap();
            checkpoint.files().iter().for_each(|file| drop(std::fs::read(&file.path).unwrap()));
            let Some(1.0) = resident() else { return };
            let (weights, _) = loader.load(&plan).unwrap();
            assert_eq!(resident(), Some(0.0), "{engine:?}");
            drop(weights);
        }
    }
}
