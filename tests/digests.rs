//! Loads that digest what they move: the check then agrees with one that reads every byte again, reads nothing of what was
//! digested, and notices what is wrong in memory that is digested after the load.

#[path = "support/model.rs"]
#[allow(dead_code, reason = "what each rank should hold is what the full check says")]
mod model;
#[path = "support/worlds.rs"]
mod worlds;

use safetensors::tensor::{Dtype, TensorView};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, ErrorKind, Loader, Rank, Residency, Rules, World};

const ENGINES: [EngineChoice; 3] = [EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring];

/// Also what is converted, permuted and padded, which no load digests on its way.
const EVERY_KIND: &str = r#"
rule = [
  { match = "d.rows", cast = "f32", shard = { dim = 0 } },
  { match = "f.whole", transpose = true, replicate = true },
  { match = "c.whole", steps = [{ pad = { dim = 0, to = 64, fill = "zero" } }] },
  { match = "**.rows", shard = { dim = 0 } },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "**", replicate = true },
]
"#;

#[test]
fn both_checks_agree_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 31);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for rules in [model::RULES, EVERY_KIND].map(|rules| Rules::from_toml(rules).unwrap()) {
        for engine in ENGINES {
            for world in [1, 2, 3, 8].into_iter().flat_map(worlds::of) {
                let loader = Loader::new().engine(engine).digests(true).staging(8 << 20);
                let (weights, _) = loader.load(&loader.plan(&checkpoint, &rules, &world).unwrap()).unwrap();
                assert_eq!(weights.check_moved().unwrap(), weights.check().unwrap(), "{engine:?} {world:?}");
            }
        }
    }
}

#[test]
fn what_was_digested_is_not_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    // Tensors that lie on words of the digest, wherever reads are cut.
    let shapes =
        [("a.rows", [1536, 1024]), ("b.columns", [768, 1536]), ("c.whole", [64, 32]), ("d.columns", [24, 96000])];
    let bytes: Vec<Vec<u8>> = (0..)
        .zip(shapes)
        .map(|(at, (_, [rows, columns]))| (0..rows * columns * 2).map(|i| (i * 7 + i / 251 + at) as u8).collect())
        .collect();
    let view = |(bytes, (name, shape)): (&'_ Vec<u8>, _)| (name, shape, bytes.clone());
    let tensors: Vec<(&str, [usize; 2], Vec<u8>)> = bytes.iter().zip(shapes).map(view).collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::BF16, shape.into(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &file).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    let contents = std::fs::read(&file).unwrap();
    for engine in ENGINES {
        for world in worlds::of(2) {
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let load = |digests| {
                let loader = Loader::new().engine(engine).digests(digests);
                loader.load(&loader.plan(&checkpoint, &rules, &world).unwrap()).unwrap().0
            };
            let (digested, plain) = (load(true), load(false));
            let before = digested.check().unwrap();
            // What is there now has another time, so no load or check would take it.
            std::fs::write(&file, &contents).unwrap();
            std::fs::File::open(&file).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
            assert!(plain.check_moved().is_err() && digested.check().is_err(), "{engine:?} {world:?}");
            // What GPUs take from a mapping is not digested on the way: it may change meanwhile.
            let lent = engine == EngineChoice::Mmap && world.device(Rank(0)).to_string().starts_with("cuda");
            assert_eq!(digested.check_moved().ok(), (!lent).then_some(before), "{engine:?} {world:?}");
            drop((digested, plain));
            std::fs::write(&file, &contents).unwrap();
        }
    }
}

#[test]
fn what_is_digested_after_the_load_is_held_against_what_was_read() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = model::write(folder.path(), 33);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new().digests(true);
    let rules = Rules::from_toml(model::RULES).unwrap();
    let plan = loader.plan(&checkpoint, &rules, &World::host_staged(2)).unwrap();
    let (weights, _) = loader.load(&plan).unwrap();
    let before = weights.check_moved().unwrap();
    for tensor in tensors.iter().filter(|tensor| !tensor.bytes.is_empty()) {
        let landed = weights.tensor(Rank(1), &tensor.name).unwrap();
        let last = landed.device_ptr() as usize + landed.nbytes() - 1;
        // SAFETY: the byte is the last of the tensor's own memory, and nobody holds a slice of it now.
        let flip = || unsafe { *std::ptr::with_exposed_provenance_mut::<u8>(last) ^= 0x10 };
        flip();
        let error = weights.check_moved().unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (ErrorKind::Mismatch, Some(&*tensor.name)));
        assert_eq!(error.at().rank, Some(Rank(1)));
        flip();
    }
    assert_eq!(weights.check_moved().unwrap(), before);
}

#[test]
fn what_is_lent_is_checked_too() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 34);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new().residency(Residency::Mapped).digests(true);
    let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(1)).unwrap();
    let (weights, report) = loader.load(&plan).unwrap();
    assert_eq!((report.storage_bytes_read, report.reads), (0, 0));
    assert_eq!(weights.check_moved().unwrap(), weights.check().unwrap());
}
