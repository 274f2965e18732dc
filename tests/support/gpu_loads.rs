//! Loads into the first GPU there is, through the library, against the same loads into host memory.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use shardlift::device::{cuda_machine, pinned_gb_per_s};
use shardlift::read::EngineChoice;
use shardlift::{
    CallerMemory, Checkpoint, Digest, Dtype, ErrorKind, Load, Loader, Memory, Plan, Rank, Report, Result, Rules,
    Weights, World, nccl_alone, nccl_version,
};

use super::driver::{self, Context, Stream, ok};
use super::transform::noise;

const ENGINES: [EngineChoice; 4] = [EngineChoice::Auto, EngineChoice::Pread, EngineChoice::Mmap, EngineChoice::Uring];

/// So little that a load has to wait for slots.
const STAGING: usize = 2 << 20;

/// Casts and transpositions by what the names end in, whole or cut.
const RULES: &str = r#"
rule = [
  { match = "*.to_f32.rows", shard = { dim = 0 }, cast = "f32" },
  { match = "*.to_f16.columns", shard = { dim = 1 }, cast = "f16" },
  { match = "*.to_bf16.whole", replicate = true, cast = "bf16" },
  { match = "*.to_bf16.transposed", shard = { dim = 1 }, transpose = true, cast = "bf16" },
  { match = "*.transposed.rows", shard = { dim = 0 }, transpose = true },
  { match = "*.transposed.columns", shard = { dim = 1 }, transpose = true },
  { match = "**.rows", shard = { dim = 0 } },
  { match = "**.columns", shard = { dim = 1 } },
  { match = "**", replicate = true },
]
"#;

/// Writes a model of two files, the second one's tensors at odd offsets: every dtype whole and cut, those that can be
/// cast or transposed so too, and a few that are more than a slot. `seed` changes every byte.
fn write(folder: &Path, seed: u8) {
    use Dtype::{Bf16, F8E4M3, F8E5M2, F16, F32, F64};
    let mut tensors = vec![
        ("large.whole".to_owned(), Bf16, [700, 2000]),
        ("large.rows".to_owned(), Bf16, [2048, 1000]),
        ("large.columns".to_owned(), Bf16, [1024, 2000]),
        ("wide.columns".to_owned(), Bf16, [16, 96_000]),
        ("large.transposed.columns".to_owned(), Bf16, [1000, 1024]),
        ("large.to_bf16.transposed".to_owned(), F32, [512, 1032]),
        ("none.whole".to_owned(), Bf16, [0, 9]),
    ];
    for &dtype in Dtype::ALL {
        let mut add = |end: &str, shape: [u64; 2]| tensors.push((format!("{dtype}.{end}"), dtype, shape));
        add("whole", [37, 24]);
        add("rows", [64, 72]);
        add("columns", [72, 64]);
        if [F8E4M3, F8E5M2, F16, Bf16, F32].contains(&dtype) {
            add("to_f32.rows", [72, 40]);
            add("to_f16.columns", [40, 72]);
            add("to_bf16.whole", [31, 33]);
        }
        if [F16, Bf16, F32, F64].contains(&dtype) {
            add("transposed.rows", [136, 72]);
            add("transposed.columns", [72, 136]);
        }
        if [F16, Bf16, F32].contains(&dtype) {
            add("to_bf16.transposed", [48, 136]);
        }
    }
    let middle = tensors.len() / 2;
    for (name, part, odd) in [("one", &tensors[..middle], 0), ("two", &tensors[middle..], 1)] {
        let (mut header, mut end) = (Map::new(), 0);
        for (name, dtype, shape) in part {
            let from = end;
            end += dtype.bytes_of(shape[0] * shape[1]).unwrap() as usize;
            let entry = json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [from, end] });
            header.insert(name.clone(), entry);
        }
        let data: Vec<u8> = noise(end).into_iter().map(|byte| byte ^ seed).collect();
        let path = folder.join(format!("{name}.safetensors"));
        fs::write(path, [start_of_file(header, odd), data].concat()).unwrap();
    }
}

/// A file up to its data, which starts at an odd offset if `odd` is 1.
fn start_of_file(header: Map<String, Value>, odd: usize) -> Vec<u8> {
    let mut header = Value::from(header).to_string();
    while header.len() % 2 != odd {
        header.push(' ');
    }
    [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
}

/// The model in a folder of its own.
struct Model(tempfile::TempDir);

impl Model {
    fn new(seed: u8) -> Model {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), seed);
        Model(folder)
    }

    fn plan(&self, world: &World) -> Plan {
        Plan::new(&Checkpoint::open(self.0.path()).unwrap(), &Rules::from_toml(RULES).unwrap(), world).unwrap()
    }

    /// What lands in host memory, which other tests hold against index arithmetic.
    fn on_host(&self, ranks: u32) -> Weights {
        Loader::new().load(&self.plan(&World::host(ranks))).unwrap().0
    }
}

/// So many ranks, all on the first GPU.
fn on_gpu(ranks: u32) -> World {
    World::local((0..ranks).map(|_| 0))
}

/// Holds weights on a GPU against those in host memory, byte by byte.
fn compare(weights: &Weights, host: &Weights, what: &str) {
    assert_eq!(weights.iter().count(), host.iter().count());
    for tensor in weights.iter() {
        let expected = host.tensor(tensor.rank(), tensor.name()).unwrap();
        assert_eq!((tensor.shape(), tensor.dtype()), (expected.shape(), expected.dtype()));
        assert!(tensor.as_bytes().is_none(), "{tensor:?} is in host memory");
        let bytes = tensor.to_bytes().unwrap();
        assert!(bytes == expected.to_bytes().unwrap(), "{what}: {tensor:?}");
    }
}

/// Through cuFile, where it is and reads from this file system.
pub(crate) fn cufile_is_bit_exact_where_it_reads() {
    let model = Model::new(0);
    let _kept = Context::new();
    for ranks in [1, 4] {
        let (host, plan) = (model.on_host(ranks), model.plan(&on_gpu(ranks)));
        let (weights, report) = match Loader::new().engine(EngineChoice::Cufile).staging(STAGING).load(&plan) {
            Ok(loaded) => loaded,
            Err(error) => return super::skip(&format!("loads through cuFile: {error}")),
        };
        assert_eq!((report.engine.as_str(), report.peak_pinned_bytes), ("cufile", 0));
        compare(&weights, &host, &format!("cufile, {ranks} ranks, direct: {:?}", report.direct));
        assert_eq!(weights.check().unwrap(), host.check().unwrap());
    }
}

pub(crate) fn every_engine_and_number_of_ranks_is_bit_exact() {
    let model = Model::new(0);
    // Of 20 loaders each would make the context anew.
    let _kept = Context::new();
    for ranks in [1, 2, 4, 8] {
        let (host, plan) = (model.on_host(ranks), model.plan(&on_gpu(ranks)));
        let digests = host.check().unwrap();
        let blocks = ENGINES.map(|engine| (engine, Memory::Blocks));
        for (engine, memory) in blocks.into_iter().chain([(EngineChoice::Auto, Memory::PerTensor)]) {
            let loader = Loader::new().engine(engine).memory(memory).staging(STAGING);
            let (weights, report) = loader.load(&plan).unwrap();
            let what = format!("{ranks} ranks, {engine:?}, {memory:?}");
            compare(&weights, &host, &what);
            assert_eq!(weights.check().unwrap(), digests, "{what}");
            assert!(report.peak_pinned_bytes <= STAGING as u64, "{what}: {report:?}");
            assert_eq!(report.abandoned_bytes, 0);
        }
    }
}

pub(crate) fn digests_are_taken_where_the_bytes_are() {
    let (weights, _) = Loader::new().load(&Model::new(14).plan(&on_gpu(2))).unwrap();
    for tensor in weights.iter() {
        assert_eq!(tensor.digest().unwrap(), Digest::of(&tensor.to_bytes().unwrap()), "{tensor:?}");
    }
}

pub(crate) fn members_of_a_world_get_what_one_process_gives_them() {
    let model = Model::new(1);
    let host = model.on_host(4);
    for rank in (0..4).map(Rank) {
        let (weights, _) = Loader::new().load(&model.plan(&on_gpu(4).driving(rank))).unwrap();
        for expected in host.of_rank(rank) {
            let found = weights.tensor(rank, expected.name()).unwrap();
            assert!(found.to_bytes().unwrap() == expected.to_bytes().unwrap(), "{found:?}");
        }
    }
}

pub(crate) fn a_tensor_that_was_given_is_complete_for_every_stream() {
    let model = Model::new(2);
    let host = model.on_host(2);
    let plan = model.plan(&on_gpu(2));
    let loader = Loader::new().staging(STAGING);
    let _context = Context::new();
    let mut load = loader.start(&plan).unwrap();
    let stream = Stream::new();
    let mut given = 0;
    for tensor in &mut load {
        let tensor = tensor.unwrap();
        let mut found = vec![0; tensor.nbytes()];
        if !found.is_empty() {
            // SAFETY: the tensor is that long, and lives.
            unsafe {
                ok(driver::cuMemcpyDtoHAsync_v2(found.as_mut_ptr(), tensor.device_ptr(), found.len(), stream.0));
            }
            stream.synchronize();
        }
        assert!(*host.tensor(tensor.rank(), tensor.name()).unwrap().to_bytes().unwrap() == found, "{tensor:?}");
        given += 1;
    }
    load.finish().unwrap();
    assert_eq!(given, host.iter().count());
}

pub(crate) fn destinations_may_be_memory_of_the_callers() {
    let (before, after) = (Model::new(3), Model::new(4));
    let world = on_gpu(2);
    for engine in [EngineChoice::Pread, EngineChoice::Mmap] {
        let loader = Loader::new().engine(engine).staging(STAGING);
        let (lender, _) = loader.load(&before.plan(&world)).unwrap();
        let memory: Vec<CallerMemory> = lender
            .iter()
            .map(|tensor| CallerMemory {
                rank: tensor.rank(),
                name: tensor.name().into(),
                address: std::ptr::without_provenance_mut(tensor.device_ptr() as usize),
                bytes: tensor.nbytes(),
            })
            .collect();
        // SAFETY: memory of tensors that live longer, which nobody uses meanwhile.
        let load = unsafe { loader.start_into(&after.plan(&world), &memory) }.unwrap();
        let (mut weights, _) = load.finish().unwrap();
        for tensor in weights.iter() {
            assert_eq!(tensor.device_ptr(), lender.tensor(tensor.rank(), tensor.name()).unwrap().device_ptr());
        }
        compare(&weights, &after.on_host(2), "in the caller's memory");
        // Whoever lent it may read it now.
        assert_eq!(loader.reload(&before.plan(&world), &mut weights).unwrap_err().kind(), ErrorKind::Usage);
        compare(&weights, &after.on_host(2), "in the caller's memory, after a refusal");
        drop(weights);
    }
}

pub(crate) fn other_values_are_loaded_into_the_memory_of_weights() {
    let (before, after) = (Model::new(15), Model::new(16));
    let (old, new) = (before.plan(&on_gpu(2)), after.plan(&on_gpu(2)));
    for memory in [Memory::Blocks, Memory::PerTensor] {
        let loader = Loader::new().memory(memory).staging(STAGING);
        let (mut weights, _) = loader.load(&old).unwrap();
        let addresses: Vec<u64> = weights.iter().map(|tensor| tensor.device_ptr()).collect();
        let kept = weights.iter().next().unwrap().clone();
        assert_eq!(loader.reload(&new, &mut weights).unwrap_err().kind(), ErrorKind::Usage);
        drop(kept);
        compare(&weights, &before.on_host(2), "after a refusal");
        loader.reload(&new, &mut weights).unwrap();
        compare(&weights, &after.on_host(2), "in the memory of others");
        assert!(weights.iter().map(|tensor| tensor.device_ptr()).eq(addresses));
        // What is cancelled is some of both, and given back.
        let load = loader.start_reload(&old, &mut weights).unwrap();
        load.monitor().cancel();
        drop(load);
        assert_eq!(weights.iter().count(), 0);
    }
}

pub(crate) fn too_little_memory_is_told_before_anything_moves() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = driver::total_bytes() as u64 + (1 << 30);
    let header = json!({ "a": { "dtype": "U8", "shape": [bytes], "data_offsets": [0, bytes] } });
    let start = start_of_file(header.as_object().unwrap().clone(), 0);
    let path = folder.path().join("model.safetensors");
    fs::write(&path, &start).unwrap();
    // Holes only.
    File::options().write(true).open(&path).unwrap().set_len(start.len() as u64 + bytes).unwrap();
    let plan = Plan::new(&Checkpoint::open(&path).unwrap(), &Rules::replicate_all(), &on_gpu(1)).unwrap();
    for memory in [Memory::Blocks, Memory::PerTensor] {
        let error = Loader::new().memory(memory).start(&plan).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeviceMemory, "{error}");
        assert!(error.to_string().contains("cuda:0"), "{error}");
        let needed: u64 = error.expected().and_then(|needed| needed.strip_suffix(" bytes")?.parse().ok()).unwrap();
        let free: u64 = error.found().and_then(|free| free.strip_suffix(" bytes")?.parse().ok()).unwrap();
        assert!(needed >= bytes && free > 0 && free < bytes, "{error}");
    }
    assert!(!driver::is_active(0));
}

pub(crate) fn a_device_that_is_not_there_is_an_error() {
    let gpu = driver::device_count() as u32;
    let error = Loader::new().load(&Model::new(5).plan(&World::local([gpu]))).unwrap_err();
    assert_eq!((error.kind(), error.at().rank), (ErrorKind::Device, Some(Rank(0))), "{error}");
    assert_eq!(error.found(), Some(&*format!("cuda:{gpu}")));
}

pub(crate) fn a_cancelled_load_ends_and_the_next_one_is_whole() {
    let model = Model::new(6);
    let plan = model.plan(&on_gpu(2));
    // Slow enough that it cannot end before it is cancelled.
    let loader = Loader::new().staging(STAGING).throttle(Some(4 << 20));
    let mut load = loader.start(&plan).unwrap();
    load.next().unwrap().unwrap();
    load.monitor().cancel();
    assert_eq!(load.finish().unwrap_err().kind(), ErrorKind::Cancelled);
    drop(loader.start(&plan).unwrap());
    let loader = loader.throttle(None);
    compare(&loader.load(&plan).unwrap().0, &model.on_host(2), "after a cancelled load");
}

pub(crate) fn the_current_context_stays_what_it_was() {
    let model = Model::new(7);
    let plan = model.plan(&on_gpu(1));
    let load = || {
        let (weights, _) = Loader::new().load(&plan).unwrap();
        weights.check().unwrap();
    };
    load();
    assert!(driver::current().is_null());
    let context = Context::new();
    load();
    pinned_gb_per_s(&[0]).unwrap();
    assert_eq!(driver::current(), context.0);
}

/// With a context as a server has one, and a loader that has not loaded yet.
pub(crate) fn the_first_tensor_comes_before_the_load_is_over() {
    let (tensors, each) = (32, 8 << 20);
    let folder = tempfile::tempdir().unwrap();
    let header = (0..tensors).map(|at| {
        let offsets = [at * each, (at + 1) * each];
        (format!("layers.{at:02}"), json!({ "dtype": "U8", "shape": [each], "data_offsets": offsets }))
    });
    let mut file = start_of_file(header.collect(), 0);
    file.resize(file.len() + tensors * each, 7);
    let path = folder.path().join("model.safetensors");
    fs::write(&path, file).unwrap();
    let plan = Plan::new(&Checkpoint::open(&path).unwrap(), &Rules::replicate_all(), &on_gpu(1)).unwrap();
    let _context = Context::new();
    let loader = Loader::new();
    for name in ["first_tensor_ms", "first_tensor_again_ms"] {
        let began = Instant::now();
        let mut load = loader.start(&plan).unwrap();
        let tensor = load.next().unwrap().unwrap();
        let first = began.elapsed();
        assert_eq!(tensor.nbytes(), each);
        load.finish().unwrap();
        assert!(first < began.elapsed());
        super::measured(name, first.as_secs_f64() * 1e3);
    }
}

pub(crate) fn contexts_are_made_where_the_plan_needs_them_and_kept_until_released() {
    let active = || (0..driver::device_count()).map(driver::is_active).collect::<Vec<_>>();
    let none = active();
    assert!(!none.contains(&true), "somebody has a context: {none:?}");
    let model = Model::new(8);
    let loader = Loader::new();
    cuda_machine().unwrap();
    let plan = model.plan(&on_gpu(1));
    assert_eq!(active(), none);
    let (weights, _) = loader.load(&plan).unwrap();
    let first: Vec<bool> = (0..driver::device_count()).map(|device| device == 0).collect();
    assert_eq!(active(), first);
    loader.release();
    // Its memory is still the caller's.
    assert_eq!(active(), first);
    drop(weights);
    assert_eq!(active(), none);
    compare(&loader.load(&plan).unwrap().0, &model.on_host(1), "after a release");
    assert_eq!(active(), first);
    drop(loader);
    assert_eq!(active(), none);
}

pub(crate) fn loads_of_one_loader_run_at_the_same_time() {
    let models = [Model::new(9), Model::new(10), Model::new(11)];
    let loader = Loader::new().staging(STAGING);
    thread::scope(|scope| {
        for model in &models {
            let loader = &loader;
            scope.spawn(move || {
                let plan = model.plan(&on_gpu(2));
                compare(&loader.load(&plan).unwrap().0, &model.on_host(2), "beside other loads");
            });
        }
    });
}

pub(crate) fn mappings_are_lent_in_windows_where_devices_can_copy_from_them() {
    let model = Model::new(12);
    let lent = driver::attribute(driver::READ_ONLY_REGISTERING) != 0;
    let by_page_tables = driver::attribute(driver::HOST_PAGE_TABLES) != 0;
    let load = |engine| -> Result<Report> {
        let (weights, report) = Loader::new().engine(engine).staging(STAGING).load(&model.plan(&on_gpu(2)))?;
        compare(&weights, &model.on_host(2), "from mappings");
        Ok(report)
    };
    let report = load(EngineChoice::Mmap).unwrap();
    assert_eq!(report.engine, "mmap");
    // Whatever the device can do, no more than the staging budget is pinned at a time.
    assert!(report.peak_pinned_bytes <= STAGING as u64, "{report:?}");
    if lent && !by_page_tables {
        assert!(report.peak_pinned_bytes > 0);
    }
}

pub(crate) fn the_facts_are_the_drivers() {
    let machine = cuda_machine().unwrap();
    assert_eq!(machine.devices.len(), driver::device_count() as usize);
    let first = &machine.devices[0];
    assert_eq!(first.total_bytes, driver::total_bytes() as u64);
    assert_eq!(first.registers_read_only, driver::attribute(driver::READ_ONLY_REGISTERING) != 0);
    assert_eq!(first.host_page_tables, driver::attribute(driver::HOST_PAGE_TABLES) != 0);
    let rates = pinned_gb_per_s(&[0]).unwrap();
    assert!(rates.len() == 1 && rates[0] > 0.0, "{rates:?}");
}

pub(crate) fn nccl_passes_bytes_to_itself() {
    if let Err(why) = nccl_version() {
        return super::skip(&format!("nothing through NCCL: {why}"));
    }
    let version = nccl_alone(0).unwrap();
    assert_eq!(version, nccl_version().unwrap());
    assert_eq!(nccl_alone(99).unwrap_err().kind(), ErrorKind::Device);
}

pub(crate) fn a_load_that_is_dropped_leaves_nothing_behind() {
    let model = Model::new(13);
    let plan = model.plan(&on_gpu(4));
    for patience in [0, 1, 20] {
        let load: Load = Loader::new().staging(STAGING).start(&plan).unwrap();
        thread::sleep(Duration::from_millis(patience));
        drop(load);
        assert!(!driver::is_active(0), "dropped after {patience} ms");
    }
}
