//! Random expressions over random meshes and checkpoints, loaded: what lands is what an evaluation element by element
//! says, byte for byte, and what has no meaning is an error.
//!
//! `SHARDLIFT_CASES` says how many (500), `SHARDLIFT_CASE=SEED,STEPS,DESTINATIONS` repeats one that failed.

#[path = "support/vocabulary/evaluate.rs"]
mod evaluate;
#[path = "support/vocabulary/places.rs"]
mod places;
#[path = "support/vocabulary/random.rs"]
mod random;
#[path = "support/transform.rs"]
mod transform;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::path::Path;
use std::str::FromStr;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Map, Value as Json, json};
use shardlift::plan::{Ax, Coord, Cut, Expr, Fill, Plan, Split};
use shardlift::read::EngineChoice;
use shardlift::{Checkpoint, Dtype, Error, ErrorKind, Loader, Memory, Rank, Rules, World};

use evaluate::{Array, Cell, Illegal, Oracle, Value, Who, any};
use places::Places;
use random::{Dice, Random, takes_of_cut};
use transform::Source;

/// Steps of the longest expression.
const STEPS: u32 = 8;
const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring];

/// A checkpoint and what is made of it.
struct Case {
    places: Places,
    tensors: Vec<Source>,
    casting: Option<Dtype>,
    dests: Vec<Dest>,
}

/// A destination: `t` and the number of the tensor that its rule matches.
struct Dest {
    matched: usize,
    expr: Expr,
    /// The one rank that holds it, if not all do.
    only: Option<u32>,
}

/// What the destinations are: by destination, then by rank.
struct Expected {
    arrays: Vec<BTreeMap<u32, Array>>,
    bytes: Vec<BTreeMap<u32, Vec<u8>>>,
    /// Whether the ranks together have every byte as often as the expressions want it, where that can be told.
    whole: Option<bool>,
    /// Rules by which legal ones may be refused.
    doubts: BTreeSet<&'static str>,
}

fn case(dice: &mut Dice, steps: u32, count: u32) -> Case {
    let places = random::places(dice);
    let casting = if dice.one_in(8) { Some(dice.pick(&[Dtype::Bf16, Dtype::F16, Dtype::F32])) } else { None };
    let mut random = Random { dice, places: &places, tensors: Vec::new(), casting };
    let mut dests: Vec<Dest> = Vec::new();
    for _ in 0..count {
        let matched = random.matched();
        let dest = match random.dice.roll(8) {
            0 => Dest { matched, expr: Expr::Source, only: Some(random.dice.roll(places.ranks().into()) as u32) },
            // What an earlier destination has, again.
            1 if !dests.is_empty() => {
                let earlier = random.dice.roll(dests.len() as u64) as usize;
                let mut expr = dests[earlier].expr.clone();
                random::with_source(&mut expr, &Expr::Tensor(format!("t{}", dests[earlier].matched)));
                Dest { matched, expr, only: None }
            }
            _ => Dest { matched, expr: random.expr(matched, steps), only: None },
        };
        dests.push(dest);
    }
    let tensors = random.tensors;
    Case { places, tensors, casting, dests }
}

impl Case {
    fn holders(&self, dest: &Dest) -> Vec<u32> {
        (0..self.places.ranks()).filter(|rank| dest.only.is_none_or(|only| only == *rank)).collect()
    }

    fn rules(&self) -> Rules {
        let rules = self.dests.iter().fold(Rules::new(), |rules, Dest { matched, expr, only }| match only {
            Some(rank) => rules.only(format!("t{matched}"), Rank(*rank)),
            None => rules.place(format!("t{matched}"), expr.clone()),
        });
        match self.casting {
            Some(to) => rules.casting(to),
            None => rules,
        }
    }

    /// Tensors one after the other in one or two files, aligned to nothing.
    fn write(&self, folder: &Path, dice: &mut Dice) {
        let split = dice.roll(self.tensors.len() as u64 + 1) as usize;
        let (one, two) = self.tensors.split_at(split);
        for (file, first, tensors) in [("one", 0, one), ("two", split, two)] {
            if tensors.is_empty() {
                continue;
            }
            let (mut header, mut data) = (Map::new(), Vec::new());
            for (at, Source { dtype, dims, bytes }) in (first..).zip(tensors) {
                let offsets = [data.len(), data.len() + bytes.len()];
                data.extend(bytes);
                let entry = json!({ "dtype": dtype.name(), "shape": dims, "data_offsets": offsets });
                header.insert(format!("t{at}"), entry);
            }
            let header = Json::Object(header).to_string();
            let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
            std::fs::write(folder.join(file).with_extension("safetensors"), bytes).unwrap();
        }
    }

    /// What every rank should have, or why that makes no sense.
    fn expected(&self) -> Result<Expected, (Illegal, BTreeSet<&'static str>)> {
        let doubts = RefCell::default();
        let mut oracle =
            Oracle { places: &self.places, tensors: &self.tensors, matched: 0, casting: self.casting, doubts };
        let (mut all_arrays, mut all_bytes, mut wholes) = (Vec::new(), Vec::new(), Vec::new());
        for dest in &self.dests {
            let Dest { matched, expr, .. } = dest;
            oracle.matched = *matched;
            let cast = any(expr, &|expr| matches!(expr, Expr::Cast { .. }));
            oracle.casting = self.casting.filter(|_| !cast);
            let (mut arrays, mut bytes) = (BTreeMap::new(), BTreeMap::new());
            for rank in self.holders(dest) {
                let made = oracle.evaluate(expr, Who::Rank(rank)).and_then(|array| {
                    let bytes = array.bytes(&self.tensors)?;
                    Ok((array, bytes))
                });
                let (array, of_rank) = made.map_err(|why| (why, oracle.doubts.borrow().clone()))?;
                arrays.insert(rank, array);
                bytes.insert(rank, of_rank);
            }
            all_arrays.push(arrays);
            all_bytes.push(bytes);
            wholes.push(oracle.evaluate(expr, Who::All).ok());
        }
        let whole = wholes.into_iter().collect::<Option<Vec<_>>>().map(|wholes| self.is_whole(&all_arrays, &wholes));
        Ok(Expected { arrays: all_arrays, bytes: all_bytes, whole, doubts: oracle.doubts.into_inner() })
    }

    /// Whether every element of a tensor is there as often as it should be.
    fn is_whole(&self, arrays: &[BTreeMap<u32, Array>], wholes: &[Array]) -> bool {
        let mut times: BTreeMap<(usize, u64), (u64, u64)> = BTreeMap::new();
        let (mut partial, mut seen) = (BTreeSet::new(), BTreeSet::new());
        for (dest, whole) in self.dests.iter().zip(wholes) {
            let holders = self.holders(dest).len() as u64;
            let slices = any(&dest.expr, &|expr| matches!(expr, Expr::Slice { .. }));
            for Cell { value, parts } in &whole.cells {
                let Value::Of { tensor, at, .. } = value else { continue };
                times.entry((*tensor, *at)).or_default().1 += (holders / parts).max(1);
                seen.insert(*tensor);
                if slices {
                    partial.insert(*tensor);
                }
            }
        }
        for Cell { value, .. } in arrays.iter().flat_map(BTreeMap::values).flat_map(|array| &array.cells) {
            if let Value::Of { tensor, at, .. } = value {
                times.entry((*tensor, *at)).or_default().0 += 1;
            }
        }
        let gap = |tensor: &usize| {
            let elements = self.tensors[*tensor].dims.iter().product();
            !partial.contains(tensor) && (0..elements).any(|at| !times.contains_key(&(*tensor, at)))
        };
        times.values().all(|(are, should)| are == should) && !seen.iter().any(gap)
    }
}

/// The bytes of tensors that some rank needs.
fn needed(case: &Case, expected: &Expected) -> BTreeSet<(usize, u64)> {
    let mut needed = BTreeSet::new();
    for Cell { value, .. } in expected.arrays.iter().flat_map(BTreeMap::values).flat_map(|array| &array.cells) {
        if let Value::Of { tensor, at, .. } = value {
            let bits = u64::from(case.tensors[*tensor].dtype.bits());
            needed.extend((at * bits / 8..((at + 1) * bits).div_ceil(8)).map(|byte| (*tensor, byte)));
        }
    }
    needed
}

/// Every destination byte is written once, and what is read is what is needed.
fn check_plan(case: &Case, expected: &Expected, plan: &Plan) {
    let mut read = BTreeSet::new();
    for rank in plan.ranks() {
        for dest in &rank.dests {
            let mut written = vec![0u32; dest.bytes as usize];
            let mut write = |dst: u64, bytes: u64| {
                written[dst as usize..][..bytes as usize].iter_mut().for_each(|times| *times += 1)
            };
            for copy in &rank.pieces[dest.pieces.start as usize..dest.pieces.end as usize] {
                let tensor = plan.tensor(copy.tensor);
                let landed = copy
                    .cast
                    .map_or(copy.run, |cast| copy.run * u64::from(cast.to().bits()) / u64::from(cast.from().bits()));
                for step in 0..copy.loops.iter().map(|inner| inner.count).product() {
                    let (mut left, mut src, mut dst): (u64, u64, u64) = (step, copy.src - tensor.start, copy.dst);
                    for inner in copy.loops.iter().rev() {
                        src += left % inner.count * inner.src_stride;
                        dst += left % inner.count * inner.dst_stride;
                        left /= inner.count;
                    }
                    write(dst, landed);
                    read.extend((src..src + copy.run).map(|byte| (evaluate::number(&tensor.name), byte)));
                }
            }
            for fill in &rank.fills[dest.fills.start as usize..dest.fills.end as usize] {
                let mut starts = vec![fill.dst];
                for &(count, stride) in &fill.loops {
                    starts = starts.iter().flat_map(|start| (0..count).map(move |at| start + at * stride)).collect();
                }
                starts.into_iter().for_each(|start| write(start, fill.run));
            }
            assert!(written.iter().all(|times| *times == 1), "bytes of {dest:?} are not written once: {written:?}");
        }
    }
    let needed = needed(case, expected);
    assert_eq!(read, needed);
    let ranks: Vec<Rank> = (0..case.places.ranks()).map(Rank).collect();
    assert_eq!(plan.needed_bytes(&ranks), needed.len() as u64);
}

/// Whether the planner may refuse what every rank could have with this error.
fn may_refuse(expected: &Expected, error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Audit => error.message().contains("irregular") || expected.whole != Some(true),
        // What the ranks have together has no shape, or the planner does not do that.
        ErrorKind::Rules => expected.whole.is_none() || error.rule().is_some_and(|rule| expected.doubts.contains(rule)),
        _ => false,
    }
}

/// Makes and tries one case; what came of it in a word.
fn run(seed: u64, steps: u32, count: u32, loaders: &[Loader]) -> String {
    let mut dice = Dice::new(seed);
    let case = case(&mut dice, steps, count);
    hold(&case, &mut dice, loaders)
}

/// Plans, loads and compares a case.
fn hold(case: &Case, dice: &mut Dice, loaders: &[Loader]) -> String {
    let folder = tempfile::tempdir().unwrap();
    case.write(folder.path(), dice);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let world = if dice.one_in(4) { World::host_staged(1) } else { World::host(1) };
    let mut world = world.with_mesh(case.places.mesh);
    if dice.one_in(6) {
        world = world.driving(Rank(dice.roll(case.places.ranks().into()) as u32));
    }
    let shown = || {
        let dests: Vec<_> = case.dests.iter().map(|Dest { matched, expr, only }| (matched, expr, only)).collect();
        let tensors: Vec<_> = case.tensors.iter().map(|tensor| (tensor.dtype, &tensor.dims)).collect();
        format!("{} {dests:?} of {tensors:?}, casting {:?}", case.places.mesh, case.casting)
    };
    let loader = &loaders[dice.roll(loaders.len() as u64) as usize];
    let planned = loader.plan(&checkpoint, &case.rules(), &world);
    let (expected, plan) = match (case.expected(), planned) {
        (Err(_), Err(error)) => {
            assert_eq!(error.kind(), ErrorKind::Rules, "{error}: {}", shown());
            return "illegal".into();
        }
        (Err((why, doubts)), Ok(_)) => panic!("planned though {why} ({doubts:?}): {}", shown()),
        (Ok(expected), Err(error)) => {
            assert!(may_refuse(&expected, &error), "refused though it is legal: {error}: {}", shown());
            return format!("refused: {}", error.rule().unwrap_or("audit"));
        }
        (Ok(expected), Ok(plan)) => (expected, plan),
    };
    let untold = case.dests.iter().any(|dest| takes_of_cut(&dest.expr));
    assert!(untold || expected.whole != Some(false), "planned though bytes are missing: {}", shown());
    check_plan(case, &expected, &plan);
    let (weights, report) = loader.load(&plan).unwrap_or_else(|error| panic!("{error}: {}", shown()));
    assert_eq!(report.needed_bytes, plan.needed_bytes(world.driven()));
    for &rank in world.driven() {
        let mut found: BTreeMap<&str, _> = weights.of_rank(rank).map(|tensor| (tensor.name(), tensor)).collect();
        for ((dest, arrays), bytes) in case.dests.iter().zip(&expected.arrays).zip(&expected.bytes) {
            let Some((array, bytes)) = arrays.get(&rank.0).zip(bytes.get(&rank.0)) else { continue };
            let landed = found.remove(&*format!("t{}", dest.matched));
            let landed = landed.unwrap_or_else(|| panic!("no t{} on {rank}: {}", dest.matched, shown()));
            assert_eq!(
                (landed.dtype(), landed.shape().dims()),
                (array.dtype, &array.dims[..]),
                "t{} on {rank}: {}",
                dest.matched,
                shown()
            );
            assert!(*landed.to_bytes().unwrap() == **bytes, "t{} on {rank}: {}", dest.matched, shown());
        }
        assert!(found.is_empty(), "{:?} on {rank}: {}", found.keys(), shown());
    }
    weights.check().unwrap_or_else(|error| panic!("{error}: {}", shown()));
    "loaded".into()
}

/// What an environment variable holds.
fn setting<T: FromStr>(name: &str) -> Option<T> {
    #[expect(clippy::disallowed_methods, reason = "how a test is told what to do")]
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} makes no sense")))
}

/// A loader for each engine and kind of memory.
fn loaders() -> Vec<Loader> {
    let loader = |engine, memory| Loader::new().engine(engine).memory(memory).staging(2 << 20);
    let loaders = [Memory::Blocks, Memory::PerTensor].map(|memory| ENGINES.map(|engine| loader(engine, memory)));
    loaders.into_iter().flatten().collect()
}

/// What random expressions once got wrong.
#[test]
fn edges_land_as_they_are_element_by_element() {
    use Dtype::{Bf16, F4, F16, I16, U8};
    let cut = |by, how, unit| {
        let mut cut = Cut::default();
        (cut.by, cut.how, cut.unit) = (Coord::Axis(by), how, unit);
        cut
    };
    let source = || Box::new(Expr::Source);
    let select = |by, of| Expr::Concat { dim: 0, parts: vec![Expr::Select { by, of }] };
    let t1 = || Expr::Tensor("t1".into());
    let table = |text| Split::from_table(text).unwrap();
    let halves = Expr::Shard { x: source(), dim: 0, cut: cut(Ax::Pp, Split::Even, 1) };
    let one = Fill::Bytes(vec![0x00, 0x3C]);
    let nothing = Expr::Const { dtype: U8, dims: vec![0, 4], fill: Fill::NegInf };
    let cases = [
        // A table of units of a selection.
        (Bf16, [6, 4], select(cut(Ax::Tp, table("1\n0"), 2), vec![Expr::Source, t1(), t1()])),
        // A rank that gets none of a selection.
        (Bf16, [6, 4], select(cut(Ax::Tp, Split::Ceil, 1), vec![Expr::Source])),
        // A part of what was cut before, by a table of its own units.
        (Bf16, [6, 4], Expr::Shard { x: Box::new(halves), dim: 0, cut: cut(Ax::Tp, table("2\n0..2"), 1) }),
        // The same of nothing.
        (Bf16, [0, 4], Expr::Shard { x: source(), dim: 0, cut: cut(Ax::Tp, table("0..0\n0..0"), 1) }),
        // Bytes that fill are cast, too.
        (F16, [6, 4], Expr::Cast { x: Box::new(Expr::Pad { x: source(), dim: 0, to: 8, fill: one }), to: Bf16 }),
        // A destination that has nothing of the tensor that was matched.
        (I16, [6, 4], t1()),
        // Packed elements in several boxes.
        (F4, [6, 4], Expr::Concat { dim: 1, parts: vec![Expr::Source, Expr::Source] }),
        // A value that the type does not have, nowhere.
        (U8, [6, 4], Expr::Concat { dim: 0, parts: vec![Expr::Source, nothing] }),
    ];
    for (dtype, dims, expr) in cases {
        let mut dice = Dice::new(1);
        let places = Places::new([1, 2, 1, 2, 1], Ax::ALL);
        let mut random = Random { dice: &mut dice, places: &places, tensors: Vec::new(), casting: None };
        random.tensor(dtype, &dims);
        random.tensor(Bf16, &dims);
        let tensors = random.tensors;
        let named = any(&expr, &|expr| matches!(expr, Expr::Tensor(_)));
        let mut dests = vec![Dest { matched: 0, expr, only: None }];
        if !named {
            dests.push(Dest { matched: 1, expr: Expr::Source, only: None });
        }
        let case = Case { places, tensors, casting: None, dests };
        assert_eq!(hold(&case, &mut dice, &loaders()), "loaded");
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "says what was tried")]
fn random_expressions_land_as_they_are_element_by_element() {
    let loaders = loaders();
    if let Some(one) = setting::<String>("SHARDLIFT_CASE") {
        let [seed, steps, count] = one.split(',').collect::<Vec<_>>()[..] else { panic!("SEED,STEPS,DESTINATIONS") };
        let outcome = run(seed.parse().unwrap(), steps.parse().unwrap(), count.parse().unwrap(), &loaders);
        eprintln!("{one}: {outcome}");
        return;
    }
    let cases = setting("SHARDLIFT_CASES").unwrap_or(500);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    let outcomes = RefCell::new(BTreeMap::<String, u32>::new());
    let ran = TestRunner::new(config).run(&(any_seed(), 0..=STEPS, 1..=3u32), |(seed, steps, count)| {
        *outcomes.borrow_mut().entry(run(seed, steps, count, &loaders)).or_default() += 1;
        Ok(())
    });
    if let Err(failure) = ran {
        panic!("{failure}\nrepeat it with SHARDLIFT_CASE=SEED,STEPS,DESTINATIONS");
    }
    let outcomes = outcomes.into_inner();
    eprintln!("{cases} cases: {outcomes:?}");
    assert!(outcomes.get("loaded").is_some_and(|loaded| *loaded > cases / 3), "{outcomes:?}");
}

fn any_seed() -> impl Strategy<Value = u64> {
    proptest::num::u64::ANY.no_shrink()
}
