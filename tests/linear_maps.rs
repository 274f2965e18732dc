//! What tensor parallelism is for: the ranks' shards of every linear map give what the whole gives, in f64, independent of
//! any engine. Column shards' outputs are those of the whole's heads, row shards' sum to the whole's with the bias counted
//! once, experts and what is replicated are all there; no attention, norm or activation is computed. Quantised layers are
//! dequantised from the shards alone.
//!
//! What is divided how is a table of the test, `support/linear/families.rs`. A family that the crate does not know yet is
//! skipped, and a test says so; those of [`FAMILIES`] and [`SCHEMES`] must not be.

#[path = "support/linear/families.rs"]
mod families;
#[path = "support/linear/features.rs"]
mod features;
#[path = "support/linear/matrix.rs"]
mod matrix;
#[path = "support/released/mod.rs"]
mod released;
#[path = "support/transform.rs"]
mod transform;

use std::collections::{BTreeMap, BTreeSet};

use shardlift::plan::{Mesh, ModelOptions};
use shardlift::{Checkpoint, ErrorKind, Loader, Plan, Rank, Rules, Weights, World};

use families::{By, Cut, Family, Map};
use matrix::{Matrix, Parts, dequantised, mxfp4};
use released::Scheme;

/// Families that the crate knows.
const FAMILIES: [&str; 23] = [
    "gpt_oss",
    "llama4",
    "qwen3_next",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon",
    "mpt",
    "dbrx",
    "internlm2",
    "bert",
];
/// Quantised layouts that the crate knows, by the names of [`Scheme`].
const SCHEMES: [&str; 9] = ["Gptq", "Awq", "Packed", "Fp8Tensor", "Fp8Channel", "Fbgemm", "Fp8Block", "Nvfp4", "Mxfp8"];

const RANKS: [u64; 5] = [1, 2, 3, 4, 8];
const SEED: u64 = 11;

/// What the name of a tensor ends with in a module of several.
const PARTS: [&str; 18] = [
    "weight",
    "bias",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "input_scale",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "absmax",
];

/// Those that say something besides the matrix that a module stands for.
const ALONE: [&str; 7] =
    ["bias", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale", "k_scale", "v_scale"];

/// Module and part of a tensor.
fn split(name: &str) -> (&str, &str) {
    if let Some((module, part)) = name.rsplit_once('.').filter(|(_, part)| PARTS.contains(part)) {
        return (module, part);
    }
    let stacked = name
        .rsplit_once('_')
        .filter(|(_, part)| name.contains(".experts.") && ["blocks", "scales", "bias"].contains(part));
    stacked.unwrap_or((name, "weight"))
}

/// Whether a module's name is of this pattern, and the number in it.
fn matches(pattern: &str, module: &str) -> Option<u64> {
    if let Some(prefix) = pattern.strip_suffix("**") {
        return format!("{module}.").starts_with(prefix).then_some(0);
    }
    if let Some(suffix) = pattern.strip_prefix('+') {
        return module.ends_with(suffix).then_some(0);
    }
    let mut number = 0;
    let mut segments = module.rsplit('.');
    for wanted in pattern.rsplit('.') {
        match (wanted, segments.next()?) {
            ("*", segment) => number = segment.parse().ok()?,
            (wanted, segment) if wanted == segment => {}
            _ => return None,
        }
    }
    Some(number)
}

/// Tensor-parallel ranks, and how many groups of them have different experts.
#[derive(Debug, Clone, Copy)]
struct Ranks {
    tp: u64,
    ep: u64,
}

impl Ranks {
    /// Which part of how many a rank has.
    fn part(self, by: By, rank: u64) -> (u64, u64) {
        let each = self.tp / self.ep;
        match by {
            By::Tp => (rank, self.tp),
            By::Ep => (rank / each, self.ep),
            By::Etp => (rank % each, each),
        }
    }

    /// The indices that a rank has of each dimension that is divided.
    fn taken(self, cuts: &[Cut], rank: u64) -> Option<Vec<(usize, Vec<u64>)>> {
        let taken = |Cut { dim, of, by }: &Cut| {
            let (i, n) = self.part(*by, rank);
            Some((*dim, of.of(i, n)?))
        };
        cuts.iter().map(taken).collect()
    }

    /// Whether this number of ranks divides what the table says.
    fn divide(self, map: &Map) -> bool {
        match map {
            Map::Shared { cuts, .. } => (0..self.tp).all(|rank| self.taken(cuts, rank).is_some()),
            Map::Expert(count, map) => count.is_multiple_of(self.ep) && self.divide(map),
            Map::Flat(_, map) => self.divide(map),
            Map::Skipped | Map::Buffer => true,
        }
    }
}

/// A module: its tensors' names, what they are in the checkpoint, and what each rank has.
struct Module<'a> {
    name: &'a str,
    scheme: Scheme,
    whole: Parts,
    /// Without those that a rank does not have.
    shards: Vec<Parts>,
}

impl Module<'_> {
    fn check(&self, map: &Map, number: u64, ranks: Ranks) {
        let name = self.name;
        match map {
            Map::Skipped => assert!(self.shards.iter().all(Parts::is_empty), "{name} is loaded"),
            Map::Buffer => {
                let whole = |shard: &Parts| shard.is_empty() || *shard == self.whole;
                assert!(self.shards.iter().all(whole), "{name} is divided");
            }
            Map::Shared { input, cuts } => self.check_shared(*input, cuts, None, ranks, 0..ranks.tp),
            Map::Flat(experts, map) => {
                let Map::Shared { input, cuts } = &**map else { panic!("no linear map") };
                self.check_shared(*input, cuts, Some(*experts), ranks, 0..ranks.tp);
            }
            Map::Expert(count, map) => {
                let Map::Shared { input, cuts } = &**map else { panic!("no linear map") };
                let group = number / (count / ranks.ep);
                let each = ranks.tp / ranks.ep;
                for rank in (0..ranks.tp).filter(|rank| rank / each != group) {
                    assert!(self.shards[rank as usize].is_empty(), "{name} on rank {rank}, which has other experts");
                }
                self.check_shared(*input, cuts, None, ranks, group * each..(group + 1) * each);
            }
        }
    }

    /// The shards of these ranks make the whole.
    fn check_shared(
        &self,
        input: Option<usize>,
        cuts: &[Cut],
        flat: Option<u64>,
        ranks: Ranks,
        of: std::ops::Range<u64>,
    ) {
        let name = self.name;
        let whole = matrix(self.scheme, &self.whole);
        let whole = match flat {
            Some(experts) => whole.clone().viewed(&[experts, whole.dims[0] / experts, whole.dims[1]]),
            None => whole,
        };
        let is_map = input.filter(|_| self.whole.keys().any(|part| part != "bias"));
        let inputs = is_map.map_or(Vec::new(), |input| inputs(whole.dims[input]));
        let outputs = is_map.map(|input| whole.times(input, &inputs));
        // What each group of ranks with the same experts makes together, if inputs are divided.
        let mut sums: BTreeMap<Vec<u64>, Matrix> = BTreeMap::new();
        let mut seen: Vec<BTreeSet<u64>> = vec![BTreeSet::new(); cuts.len()];
        for rank in of {
            let shard = &self.shards[rank as usize];
            assert_eq!(shard.len(), self.whole.len(), "{name} on rank {rank}: {:?}", shard.keys());
            let taken = ranks.taken(cuts, rank).expect("they divide");
            let part = matrix(self.scheme, shard);
            let part = match flat {
                Some(_) => {
                    let experts =
                        taken.iter().find(|(dim, _)| *dim == 0).map_or(0, |(_, experts)| experts.len() as u64);
                    part.clone().viewed(&[experts, part.dims[0] / experts, part.dims[1]])
                }
                None => part,
            };
            let expected = taken.iter().fold(whole.clone(), |whole, (dim, indices)| whole.take(*dim, indices));
            assert!(part == expected, "{name} on rank {rank} of {ranks:?}: {:?} for {:?}", part.dims, expected.dims);
            taken.iter().zip(&mut seen).for_each(|((_, indices), seen)| seen.extend(indices));

            // Of the dimensions that are left when inputs are gone.
            let left = |whole: &Matrix, gone: usize| {
                taken
                    .iter()
                    .filter(|(dim, _)| *dim != gone)
                    .fold(whole.clone(), |whole, (dim, indices)| whole.take(dim - usize::from(*dim > gone), indices))
            };
            for (extra, of_whole) in self.whole.iter().filter(|(part, _)| ALONE.contains(&part.as_str())) {
                let expected = match (extra.as_str(), is_map) {
                    ("bias", Some(input)) => left(of_whole, input),
                    ("bias", None) if self.whole.len() == 1 => continue, // it is what was compared
                    _ => of_whole.clone(),
                };
                assert!(shard[extra] == expected, "{extra} of {name} on rank {rank}");
            }
            let (Some(input), Some(outputs)) = (is_map, &outputs) else { continue };
            match taken.iter().find(|(dim, _)| *dim == input) {
                None => assert!(part.times(input, &inputs) == left(outputs, input), "outputs of {name} on rank {rank}"),
                Some((_, indices)) => {
                    let inputs: Vec<f64> = indices.iter().map(|&index| inputs[index as usize]).collect();
                    let partial = part.times(input, &inputs);
                    let group = taken.iter().filter(|(dim, _)| *dim != input).flat_map(|(_, indices)| indices.clone());
                    let key: Vec<u64> = group.collect();
                    let sum = sums.get(&key).map_or_else(|| partial.clone(), |sum| sum.plus(&partial));
                    sums.insert(key, sum);
                }
            }
        }
        for (Cut { dim, .. }, seen) in cuts.iter().zip(&seen) {
            assert!(seen.len() as u64 == whole.dims[*dim], "dimension {dim} of {name} is not all there");
        }
        let (Some(input), Some(outputs)) = (is_map, outputs) else { return };
        let magnitude = Matrix { values: whole.values.iter().map(|value| value.abs()).collect(), ..whole.clone() };
        let magnitude = magnitude.times(input, &inputs.iter().map(|value| value.abs()).collect::<Vec<_>>());
        for (experts, sum) in sums {
            let of = |all: &Matrix| if experts.is_empty() { all.clone() } else { all.take(0, &experts) };
            let (mut expected, mut sum) = (of(&outputs), sum);
            if let Some(bias) = self.whole.get("bias") {
                // Every rank has it; it counts once.
                (expected, sum) = (expected.plus(&of(bias)), sum.plus(&of(bias)));
            }
            let mut pairs = sum.values.iter().zip(&expected.values).zip(of(&magnitude).values);
            let close = pairs.all(|((sum, expected), scale)| (sum - expected).abs() <= 1e-12 * (scale + 4.0));
            assert!(sum.dims == expected.dims && close, "sum of {name} over {ranks:?}");
        }
    }
}

/// What the parts of a module stand for.
fn matrix(scheme: Scheme, parts: &Parts) -> Matrix {
    if let Some(blocks) = parts.get("blocks") {
        return mxfp4(blocks, &parts["scales"]);
    }
    dequantised(scheme, parts).unwrap_or_else(|| parts["bias"].clone())
}

/// A vector of random numbers between -1 and 1.
fn inputs(len: u64) -> Vec<f64> {
    let mut state = len;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// What the checkpoint has: modules, and their parts.
fn modules(family: &Family) -> BTreeMap<&str, Parts> {
    let mut modules: BTreeMap<&str, Parts> = BTreeMap::new();
    for tensor in &family.model.tensors {
        let (module, part) = split(&tensor.name);
        let values = Matrix::decode(tensor.dtype, &tensor.shape, &tensor.random(SEED));
        modules.entry(module).or_default().insert(part.to_owned(), values);
    }
    modules
}

/// What becomes of a module, and the number in its name.
fn row<'a>(family: &'a Family, module: &str) -> (&'a Map, u64) {
    let row = family.rows.iter().find_map(|(pattern, map)| Some((map, matches(pattern, module)?)));
    row.unwrap_or_else(|| panic!("no row for {module}"))
}

/// Every module of a family's model on these ranks.
fn check(family: &Family, modules: &BTreeMap<&str, Parts>, weights: &Weights, ranks: Ranks) {
    let names: BTreeSet<&str> = family.model.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut shards = vec![BTreeMap::<&str, Parts>::new(); ranks.tp as usize];
    for tensor in weights.iter() {
        let values = Matrix::decode(tensor.dtype(), tensor.shape().dims(), &tensor.to_bytes().unwrap());
        if let Some((_, of)) = family.tied.iter().find(|(name, _)| *name == tensor.name()) {
            let (module, part) = split(of);
            assert!(values == modules[module][part], "{} is not {of}", tensor.name());
            continue;
        }
        assert!(names.contains(tensor.name()), "{} is no tensor of the model", tensor.name());
        let (module, part) = split(tensor.name());
        shards[tensor.rank().index()].entry(module).or_default().insert(part.to_owned(), values);
    }
    for (&name, whole) in modules {
        let (map, number) = row(family, name);
        let shards = shards.iter().map(|shards| shards.get(name).cloned().unwrap_or_default()).collect();
        Module { name, scheme: family.scheme, whole: whole.clone(), shards }.check(map, number, ranks);
    }
}

/// Loads a family's model for every number of ranks and checks it; why it was not, if the crate does not know it.
fn run(family: &Family, is_known: bool) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    released::write_random(folder.path(), &family.model, SEED).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let modules = modules(family);
    for ranks in all_ranks(family) {
        let mut options = ModelOptions::default();
        options.mesh = Mesh { ep: ranks.ep as u32, ..Mesh::tp(ranks.tp as u32) };
        let mesh = options.mesh;
        let rules = match Rules::for_model_with(&checkpoint, &options) {
            Err(error) if !is_known && error.rule() == Some("unknown-architecture") => {
                return Err("unknown architecture".into());
            }
            rules => rules.unwrap_or_else(|error| panic!("{}: {error}", family.name)),
        };
        let planned = Plan::new(&checkpoint, &rules, &World::host(1).with_mesh(mesh));
        let divides = family.rows.iter().all(|(_, map)| ranks.divide(map));
        let plan = match planned {
            Err(error) if !divides => {
                assert_eq!(error.kind(), ErrorKind::Rules, "{}: {error}", family.name);
                continue;
            }
            Err(error) if !is_known => return Err(error.message().to_owned()),
            planned => planned.unwrap_or_else(|error| panic!("{}, {ranks:?}: {error}", family.name)),
        };
        assert!(divides, "{} is planned for {ranks:?}, which do not divide it", family.name);
        let (weights, _) = Loader::new().staging(2 << 20).load(&plan).unwrap();
        assert!(weights.of_rank(Rank(ranks.tp as u32 - 1)).next().is_some());
        check(family, &modules, &weights, ranks);
    }
    Ok(())
}

/// All numbers of ranks, and of groups of them where there are experts.
fn all_ranks(family: &Family) -> Vec<Ranks> {
    let has_experts = |(_, map): &(&str, Map)| match map {
        Map::Expert(..) | Map::Flat(..) => true,
        Map::Shared { cuts, .. } => cuts.iter().any(|cut| cut.by == By::Ep),
        Map::Skipped | Map::Buffer => false,
    };
    let has_experts = family.rows.iter().any(has_experts);
    let groups = |tp: u64| RANKS.into_iter().filter(move |&ep| ep == 1 || (has_experts && tp.is_multiple_of(ep)));
    RANKS.into_iter().flat_map(|tp| groups(tp).map(move |ep| Ranks { tp, ep })).collect()
}

/// The shard of one part of a module whose whole is a matrix of these dimensions: what belongs to the indices taken of it.
fn shard_of(scheme: Scheme, part: &str, values: &Matrix, dims: &[u64], taken: &[(usize, Vec<u64>)]) -> Matrix {
    let transposed = matches!(scheme, Scheme::Gptq { .. } | Scheme::Awq { .. }) && part != "bias" && part != "weight";
    let mut shard = values.clone();
    for (dim, indices) in taken {
        let whole_groups =
            matches!(scheme, Scheme::Gptq { act_order: true, .. }) && ["scales", "qzeros"].contains(&part);
        let at = match (part, dim) {
            ("g_idx", 1) => 0,
            ("g_idx", _) | ("weight_shape", _) => continue,
            (_, 1) if whole_groups => continue,
            _ if transposed => 1 - dim,
            _ => *dim,
        };
        let Some(&size) = shard.dims.get(at).filter(|size| **size > 1 || dims[*dim] == 1) else { continue };
        let each = dims[*dim].div_ceil(size);
        let mut groups: Vec<u64> = indices.iter().map(|index| index / each).collect();
        groups.dedup();
        shard = shard.take(at, &groups);
    }
    shard
}

#[test]
fn the_table_fits_the_models_and_the_checks() {
    let schemes = released::schemes(16).into_iter().filter(|scheme| *scheme != Scheme::Nf4).map(families::quantised);
    for family in families::all().into_iter().chain(schemes) {
        let divide = |ranks: &Ranks| family.rows.iter().all(|(_, map)| ranks.divide(map));
        for (name, whole) in modules(&family) {
            let (map, number) = row(&family, name);
            let (shared, flat) = match map {
                Map::Skipped | Map::Buffer => continue,
                Map::Expert(_, map) => (&**map, None),
                Map::Flat(experts, map) => (&**map, Some(*experts)),
                map => (map, None),
            };
            let Map::Shared { input, cuts } = shared else { panic!("no linear map") };
            let view = |values: &Matrix| match flat {
                Some(experts) => values.clone().viewed(&[experts, values.dims[0] / experts, values.dims[1]]),
                None => values.clone(),
            };
            let dims = view(&matrix(family.scheme, &whole)).dims;
            assert!(cuts.iter().all(|cut| cut.of.count() == dims[cut.dim]), "{}: {name} {dims:?}", family.name);
            for ranks in all_ranks(&family).into_iter().filter(divide) {
                let shard = |rank| -> Parts {
                    if let Map::Expert(count, _) = map
                        && number / (count / ranks.ep) != ranks.part(By::Ep, rank).0
                    {
                        return Parts::new();
                    }
                    let taken = ranks.taken(cuts, rank).unwrap();
                    let outputs = taken.iter().filter(|(dim, _)| Some(*dim) != *input);
                    let outputs: Vec<_> = outputs
                        .map(|(dim, of)| (dim - usize::from(input.is_some_and(|input| *dim > input)), of.clone()))
                        .collect();
                    let part = |(part, values): (&String, &Matrix)| {
                        let shard = match part.as_str() {
                            "bias" if whole.len() > 1 => {
                                outputs.iter().fold(values.clone(), |all, (dim, of)| all.take(*dim, of))
                            }
                            part => {
                                let shard = shard_of(family.scheme, part, &view(values), &dims, &taken);
                                let last = shard.dims.last().copied().unwrap_or(1);
                                if flat.is_some() {
                                    shard.clone().viewed(&[shard.values.len() as u64 / last, last])
                                } else {
                                    shard
                                }
                            }
                        };
                        (part.clone(), shard)
                    };
                    whole.iter().map(part).collect()
                };
                let shards = (0..ranks.tp).map(shard).collect();
                Module { name, scheme: family.scheme, whole: whole.clone(), shards }.check(map, number, ranks);
            }
        }
    }
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn run_all(families: impl Iterator<Item = (String, Family)>, known: &[&str]) {
    let mut ran = BTreeSet::new();
    for (name, family) in families {
        let known = known.iter().find(|known| name.split(' ').next() == Some(known));
        match run(&family, known.is_some()) {
            Ok(()) => {
                ran.extend(known.copied());
            }
            Err(why) => eprintln!("SKIPPED: {name}: {why}"),
        }
    }
    assert!(ran.iter().eq(known.iter().collect::<BTreeSet<&&str>>()), "only {ran:?} were tried");
}

#[test]
fn shards_of_every_linear_map_make_the_whole() {
    run_all(families::all().into_iter().map(|family| (family.name.to_owned(), family)), &FAMILIES);
}

#[test]
fn shards_of_quantised_layers_are_the_shards_of_what_they_stand_for() {
    let schemes = released::schemes(16).into_iter().filter(|scheme| *scheme != Scheme::Nf4);
    run_all(schemes.map(|scheme| (format!("{scheme:?}"), families::quantised(scheme))), &SCHEMES);
}
