//! What servers ask of loads: tensors as they land, first layers first; and new values in the memory of the old ones.

#[path = "support/model.rs"]
mod model;
#[path = "support/worlds.rs"]
mod worlds;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorView};
use shardlift::plan::ReadOrder;
use shardlift::read::{Engine, EngineChoice, Pread, Work};
use shardlift::{CallerMemory, Checkpoint, ErrorKind, Loader, Memory, Plan, Rank, Residency, Rules, Weights, World};

const LAYERS: usize = 8;

/// A model whose file has its last layer first.
fn write_layers(folder: &Path) -> Checkpoint {
    let bytes = vec![1; 256 << 10];
    let view = || TensorView::new(Dtype::U8, vec![512, 512], &bytes).unwrap();
    let layers = (0..LAYERS).flat_map(|layer| {
        let file_order = LAYERS - layer;
        ["columns", "rows", "whole"].map(|cut| format!("m{file_order}.layers.{layer}.{cut}"))
    });
    let tensors = layers.chain(["z.embed.whole".to_owned()]).map(|name| (name, view()));
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
    Checkpoint::open(folder).unwrap()
}

#[test]
fn by_layer_the_first_layers_come_first() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = write_layers(folder.path());
    let rules = Rules::from_toml(model::RULES).unwrap();
    for world in worlds::of(2) {
        let plan = Plan::with_order(&checkpoint, &rules, &world, ReadOrder::Layer).unwrap();
        let loader = Loader::new().custom_engine(Arc::new(Pread::new(1))).throttle(Some(32 << 20));
        let mut load = loader.start(&plan).unwrap();
        let monitor = load.monitor();
        let mut layers = [Vec::new(), Vec::new()];
        for tensor in &mut load {
            let tensor = tensor.unwrap();
            let layer = tensor.name().split('.').nth(2).and_then(|layer| layer.parse().ok());
            // What a server needs to build with is there long before the rest.
            let progress = monitor.progress();
            let early = progress.bytes_done * 2 < progress.bytes_total;
            assert!(layer != Some(0) || early, "{tensor:?} comes after {progress:?}");
            layers[tensor.rank().index()].push(layer.map_or(0, |layer: usize| layer + 1));
        }
        load.finish().unwrap();
        for of_rank in layers {
            assert_eq!(of_rank.len(), 3 * LAYERS + 1);
            // What is no layer's comes before all of them.
            assert!(of_rank.is_sorted(), "{world:?}: {of_rank:?}");
        }
    }
}

#[test]
fn other_values_are_loaded_into_the_memory_of_weights() {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let models = [0, 1].map(|at| model::write(folders[at].path(), 30 + at as u64));
    let rules =
        Rules::from_toml(&format!("alias = [{{ name = \"tied\", of = \"f.whole\" }}]\n{}", model::RULES)).unwrap();
    for memory in [Memory::Blocks, Memory::PerTensor] {
        for world in worlds::of(2) {
            let [old, new] =
                [0, 1].map(|at| Plan::new(&Checkpoint::open(folders[at].path()).unwrap(), &rules, &world).unwrap());
            let loader = Loader::new().memory(memory);
            let (mut weights, _) = loader.load(&old).unwrap();
            let addresses = |weights: &Weights| weights.iter().map(|tensor| tensor.device_ptr()).collect::<Vec<_>>();
            let before = addresses(&weights);
            for (plan, tensors) in [(&new, &models[1]), (&old, &models[0])] {
                // Another loader, of other settings, does as well.
                let loader = Loader::new().engine(EngineChoice::Pread).staging(2 << 20).digests(true);
                loader.reload(plan, &mut weights).unwrap();
                assert_eq!(addresses(&weights), before, "{world:?} {memory:?}");
                for tensor in weights.iter().filter(|tensor| tensor.name() != "tied") {
                    let of_model = tensors.iter().find(|of_model| of_model.name == tensor.name()).unwrap();
                    let expected = model::expected(of_model, tensor.rank().index(), 2);
                    assert!(tensor.to_bytes().unwrap() == expected, "{world:?} {memory:?} {tensor:?}");
                }
                assert_eq!(weights.check_moved().unwrap(), weights.check().unwrap());
            }
            // As they land.
            let mut load = loader.start_reload(&new, &mut weights).unwrap();
            assert_eq!(weights.iter().count(), 0);
            assert_eq!(load.by_ref().filter(Result::is_ok).count(), before.len());
            assert_eq!(addresses(&load.finish().unwrap().0), before);
        }
    }
}

#[test]
fn weights_that_others_can_see_stay_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 32);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let rules = Rules::from_toml(model::RULES).unwrap();
    let plan = Plan::new(&checkpoint, &rules, &World::host(2)).unwrap();
    let loader = Loader::new();
    let (mut weights, _) = loader.load(&plan).unwrap();
    let digests = weights.check().unwrap();
    let refused = |plan: &Plan, weights: &mut Weights, why: &str, tensor: Option<&str>| {
        let error = loader.start_reload(plan, weights).unwrap_err();
        assert!(error.kind() == ErrorKind::Usage && error.to_string().contains(why), "{error}");
        assert_eq!(error.tensor(), tensor, "{error}");
    };
    let kept = weights.tensor(Rank(1), "d.rows").unwrap().clone();
    refused(&plan, &mut weights, "another handle shares its memory", Some("a.rows"));
    drop(kept);
    for world in [World::host(1), World::host_staged(2), World::host(2).driving(Rank(0))] {
        refused(&Plan::new(&checkpoint, &rules, &world).unwrap(), &mut weights, "other ranks or devices", None);
    }
    let whole = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(2)).unwrap();
    refused(&whole, &mut weights, "expected a.rows BF16 [24,24], found a.rows BF16 [48,24]", Some("a.rows"));
    let fewer = Plan::new(&checkpoint, &rules.clone().keeping("{a,b}.*"), &World::host(2)).unwrap();
    refused(&fewer, &mut weights, "expected c.whole BF16 [7,5], found nothing", Some("c.whole"));
    assert_eq!(weights.check().unwrap(), digests);
    loader.reload(&plan, &mut weights).unwrap();
    let taken = weights.take(Rank(0), "e.columns").unwrap();
    refused(&plan, &mut weights, "it was taken out", Some("e.columns"));
    drop((taken, weights));

    let (mut lent, _) = Loader::new().residency(Residency::Mapped).load(&plan).unwrap();
    refused(&plan, &mut lent, "the caller's or a file's", Some("c.whole"));
    let mut buffer = [0u16; 48 * 24];
    let address = buffer.as_mut_ptr().cast();
    let entry = CallerMemory { rank: Rank(0), name: "a.rows".into(), address, bytes: 24 * 24 * 2 };
    // SAFETY: the buffer outlives the weights, and nobody uses it meanwhile.
    let (mut weights, _) = unsafe { loader.start_into(&plan, &[entry]) }.unwrap().finish().unwrap();
    refused(&plan, &mut weights, "the caller's or a file's", Some("a.rows"));
}

/// An engine that wants its bytes where no slot has room for them.
#[derive(Debug)]
struct Odd;

// SAFETY: reads nothing.
unsafe impl Engine for Odd {
    fn name(&self) -> &'static str {
        "odd"
    }
    fn alignment(&self) -> u64 {
        3
    }
    fn threads(&self) -> usize {
        1
    }
    fn run(&self, _: &dyn Work) -> shardlift::Result<()> {
        unreachable!("nothing is asked of it")
    }
}

#[test]
fn a_reload_that_cannot_start_leaves_the_weights_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 35);
    let rules = Rules::from_toml(model::RULES).unwrap();
    for world in worlds::of(2) {
        let plan = Plan::new(&Checkpoint::open(folder.path()).unwrap(), &rules, &world).unwrap();
        let (mut weights, _) = Loader::new().load(&plan).unwrap();
        let digests = weights.check().unwrap();
        let error = Loader::new().custom_engine(Arc::new(Odd)).reload(&plan, &mut weights).unwrap_err();
        assert_eq!((error.kind(), error.found()), (ErrorKind::Usage, Some("3")), "{error}");
        assert_eq!(weights.check().unwrap(), digests);
    }
}

#[test]
fn a_reload_that_fails_leaves_no_weights_of_two_models() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 33);
    let rules = Rules::from_toml(model::RULES).unwrap();
    for world in worlds::of(2) {
        let other = tempfile::tempdir().unwrap();
        model::write(other.path(), 34);
        let [old, new] = [folder.path(), other.path()]
            .map(|model| Plan::new(&Checkpoint::open(model).unwrap(), &rules, &world).unwrap());
        let loader = Loader::new();
        let (mut weights, _) = loader.load(&old).unwrap();
        // Since it was planned.
        File::options().write(true).open(other.path().join("two.safetensors")).unwrap().set_len(4096).unwrap();
        let error = loader.reload(&new, &mut weights).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
        assert_eq!(weights.iter().count(), 0);
        assert_eq!(weights.tensor(Rank(0), "a.rows").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(loader.reload(&old, &mut weights).unwrap_err().kind(), ErrorKind::Usage);
        loader.load(&old).unwrap().0.check().unwrap();
    }
}
