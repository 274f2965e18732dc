//! The grammar of the command line. What belongs to later is parsed here and refused by name, never ignored.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use shardlift::limits::RULES_MAX;
use shardlift::plan::{self, MeshOrder, Split, StageSplit};
use shardlift::{Error, ErrorKind, Result, limits};

/// Moves the weights of safetensors checkpoints into the memory of many ranks.
#[derive(Debug, Parser)]
#[command(name = "shardlift", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the tensors of a checkpoint
    Inspect(InspectArgs),
    /// Hold a checkpoint against every rule of the format and the index
    Verify(VerifyArgs),
    /// Show what would move where; reads headers only
    Plan(PlanArgs),
    /// Load every rank's partition into memory
    Load(LoadArgs),
    /// Write each rank's partition as a checkpoint of its own
    Reshard(ReshardArgs),
    /// Show what this machine can do
    Doctor(DoctorArgs),
}

impl Command {
    pub(crate) fn name_and_json(&self) -> (&'static str, bool) {
        match self {
            Command::Inspect(args) => ("inspect", args.json),
            Command::Verify(args) => ("verify", args.json),
            Command::Plan(args) => ("plan", args.json),
            Command::Load(args) => ("load", args.json),
            Command::Reshard(args) => ("reshard", args.json),
            Command::Doctor(args) => ("doctor", args.json),
        }
    }

    /// The subcommand of this name.
    pub(crate) fn known(word: &str) -> Option<&'static str> {
        ["inspect", "verify", "plan", "load", "reshard", "doctor"].into_iter().find(|name| *name == word)
    }
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A .safetensors file, a directory, or org/name[@revision] in the local Hugging Face cache
    pub(crate) model: PathBuf,
    /// Only tensors whose name matches
    #[arg(long, value_name = "GLOB")]
    pub(crate) filter: Option<String>,
    /// Order of the tensors
    #[arg(long, value_enum, default_value_t = Sort::Offset)]
    pub(crate) sort: Sort,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Sort {
    Name,
    Size,
    Offset,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// A .safetensors file, a directory, or org/name[@revision] in the local Hugging Face cache
    pub(crate) model: PathBuf,
    /// Read every byte: digests of tensors, and sha256 against the blob names of the Hugging Face cache
    #[arg(long)]
    pub(crate) deep: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MeshArgs {
    /// Tensor-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) tp: u32,
    /// Pipeline stages
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pp: u32,
    /// Expert-parallel groups; they add no ranks
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) ep: u32,
    /// Data-parallel replicas
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) dp: u32,
    /// Context-parallel ranks
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cp: u32,
    /// The axes, slowest first: dp, pp, cp and tp in any order, then ep,etp or etp,ep or nothing
    #[arg(long, value_name = "LIST", value_parser = order)]
    pub(crate) order: Option<MeshOrder>,
    /// Layers of each pipeline stage: even, vllm, hf, trt, or a FILE with a number for each stage
    #[arg(long, value_name = "SPLIT", value_parser = OsStringValueParser::new().try_map(pp_split))]
    pub(crate) pp_split: Option<SplitChoice<StageSplit>>,
    /// Experts of each expert-parallel group: even, balanced, round-robin, or a FILE with a line for each group
    #[arg(long, value_name = "SPLIT", value_parser = OsStringValueParser::new().try_map(ep_split))]
    pub(crate) ep_split: Option<SplitChoice<Split>>,
    /// How tensors are divided: auto (from config.json), replicate, hf-plan:FILE (a tp plan of transformers as
    /// JSON), or a rules FILE
    #[arg(long, value_name = "RULES", default_value = "auto", value_parser = OsStringValueParser::new().try_map(rules))]
    pub(crate) rules: RulesChoice,
    /// Repeat scales of FP8 blocks that a cut falls inside, for smaller blocks
    #[arg(long)]
    pub(crate) refine_scales: bool,
    /// A folder with a LoRA adapter of the model, divided as the layers that it is for
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// Whose names and layouts the destinations have
    #[arg(long, value_enum, default_value_t = Target::Plain)]
    pub(crate) target: Target,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RulesChoice {
    Auto,
    Replicate,
    HfPlan(PathBuf),
    File(PathBuf),
}

/// A way to divide layers or experts: one that has a name, or what a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SplitChoice<T> {
    Named(T),
    File(PathBuf),
}

impl<T: Clone> SplitChoice<T> {
    /// Its file, if it is read from one.
    pub(crate) fn file(&self) -> Option<&PathBuf> {
        match self {
            SplitChoice::Named(_) => None,
            SplitChoice::File(path) => Some(path),
        }
    }

    /// What it says, where `read` understands a file's text.
    pub(crate) fn read(&self, read: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        match self {
            SplitChoice::Named(split) => Ok(split.clone()),
            SplitChoice::File(path) => {
                // As rules are read: a pipe has no size, and a device no end.
                let mut bytes = Vec::new();
                let cannot = |error| Error::io("cannot read split", path, error);
                let file = File::open(path).map_err(cannot)?;
                file.take(RULES_MAX + 1).read_to_end(&mut bytes).map_err(cannot)?;
                if bytes.len() as u64 > RULES_MAX {
                    let error = Error::new(ErrorKind::Rules, "file of a split is too large").with_file(path);
                    return Err(error.with_expected(format!("at most {RULES_MAX} bytes"), "more"));
                }
                let text = String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
                read(&text.map_err(cannot)?).map_err(|error| error.with_file(path))
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    Plain,
    Vllm,
    Hf,
    Mistralrs,
}

impl From<Target> for plan::Target {
    fn from(target: Target) -> plan::Target {
        match target {
            Target::Plain => plan::Target::Plain,
            Target::Vllm => plan::Target::Vllm,
            Target::Hf => plan::Target::Hf,
            Target::Mistralrs => plan::Target::MistralRs,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// A .safetensors file, a directory, or org/name[@revision] in the local Hugging Face cache
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
    /// Plan for the process that drives this rank only
    #[arg(long, value_name = "R")]
    pub(crate) rank: Option<u32>,
    /// Plan for ranks with a process each, on GPUs of one node, that read together what several want: auto (where passing it on
    /// costs less), always, cluster (the same as always here), or never; of all processes, or of that of --rank
    #[arg(long, value_enum)]
    pub(crate) cooperate: Option<CooperateChoice>,
    /// Tell the whole story of this tensor instead: rule, source, who gets which part, how it is read
    #[arg(long, value_name = "TENSOR")]
    pub(crate) explain: Option<String>,
    /// Say what the audit proved, and how many ranks hold the bytes of each class of tensors
    #[arg(long)]
    pub(crate) audit: bool,
    /// Rate of the storage in GB/s, for the prediction
    #[arg(long, value_name = "GB/s", value_parser = positive)]
    pub(crate) storage: Option<f64>,
    /// Rate of the link to each device in GB/s, for the prediction
    #[arg(long, value_name = "GB/s", value_parser = positive)]
    pub(crate) link: Option<f64>,
    /// Take the rates that are not given from what `doctor --json` printed into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) doctor: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// A .safetensors file, a directory, or org/name[@revision] in the local Hugging Face cache
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
    /// Drive only this rank; the others belong to other processes
    #[arg(long, value_name = "R")]
    pub(crate) rank: Option<u32>,
    #[command(flatten)]
    pub(crate) processes: ProcessArgs,
    /// Where the ranks live: host, host:staged, or cuda[:LIST]
    #[arg(long, default_value = "host", value_parser = devices)]
    pub(crate) devices: Devices,
    /// How files are read
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub(crate) engine: Engine,
    /// What `doctor --json` printed into this file: where it found cuFile direct and faster, auto reads with that
    #[arg(long, value_name = "FILE")]
    pub(crate) doctor: Option<PathBuf>,
    /// Memory for staging, for instance 256M; at least 2M
    #[arg(long, value_name = "SIZE", value_parser = staging)]
    pub(crate) staging: Option<u64>,
    /// How destination memory is allocated
    #[arg(long, value_enum, default_value_t = MemoryChoice::Blocks)]
    pub(crate) memory: MemoryChoice,
    /// Whether whole tensors may be lent from a mapping of their file
    #[arg(long, value_enum, default_value_t = ResidencyChoice::Owned)]
    pub(crate) residency: ResidencyChoice,
    /// What becomes of the file's pages in the page cache
    #[arg(long, value_enum, default_value_t = PageCache::Keep)]
    pub(crate) page_cache: PageCache,
    /// Upper bound on bytes read per second, for instance 2G
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) throttle: Option<u64>,
    /// Load only tensors whose name matches; may be given several times
    #[arg(long, value_name = "GLOB")]
    pub(crate) only: Vec<String>,
    /// Leave out tensors whose name matches; may be given several times
    #[arg(long, value_name = "GLOB")]
    pub(crate) skip: Vec<String>,
    /// Cast tensors of type BF16, F16 and F32 to this type
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<Cast>,
    /// Load this often and report the median run; with --check every run is compared
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: Option<u32>,
    /// Compare what landed with the files, byte for byte
    #[arg(long)]
    pub(crate) check: bool,
    /// Write a timeline of all runs, for ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// How the processes of several ranks find each other, and what they share.
#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Read together what several ranks want: auto, always (the ranks of a node), cluster (all ranks), or never
    #[arg(long, value_enum, default_value_t = CooperateChoice::Auto)]
    pub(crate) cooperate: CooperateChoice,
    /// Where the processes of the ranks meet: tcp://host:port, or file:///path on a file system that they share
    #[arg(long, value_name = "URL")]
    pub(crate) rendezvous: Option<String>,
    /// What tells them from others that may meet there
    #[arg(long, value_name = "ID")]
    pub(crate) session: Option<String>,
    /// The node of this process, where the launcher does not tell
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// How long to wait for all ranks to arrive
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) join_timeout: Option<Duration>,
    /// How soon all ranks know of one that failed, died or fell silent; the same for all
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) fail_timeout: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CooperateChoice {
    Auto,
    Always,
    Cluster,
    Never,
}

impl LoadArgs {
    /// Refuses what this build cannot do yet.
    pub(crate) fn supported(&self) -> Result<()> {
        if cfg!(not(feature = "cuda")) && matches!(self.devices, Devices::Cuda(_)) {
            return Err(not_in_this_build("--devices cuda"));
        }
        if cfg!(not(feature = "cuda")) && self.engine == Engine::Cufile {
            return Err(not_in_this_build("--engine cufile"));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Devices {
    Host,
    HostStaged,
    /// Device numbers; empty for all.
    Cuda(Vec<u32>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    Auto,
    Pread,
    Mmap,
    Uring,
    Cufile,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MemoryChoice {
    Blocks,
    PerTensor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResidencyChoice {
    Owned,
    Mapped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PageCache {
    Keep,
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cast {
    Bf16,
    F16,
    F32,
}

#[derive(Debug, Args)]
pub(crate) struct ReshardArgs {
    /// A .safetensors file, a directory, or org/name[@revision] in the local Hugging Face cache
    pub(crate) model: PathBuf,
    /// The folder to write
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
    /// Replace the folder OUT if it exists; never the model
    #[arg(long)]
    pub(crate) force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// A file or directory whose storage is looked at
    #[arg(default_value = ".")]
    pub(crate) path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn not_in_this_build(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unsupported, format!("not in this build: {what}"))
}

fn rules(word: OsString) -> Result<RulesChoice, String> {
    Ok(match word.as_bytes() {
        b"auto" => RulesChoice::Auto,
        b"replicate" => RulesChoice::Replicate,
        b"" => return Err("no file".into()),
        b"hf-plan:" => return Err("hf-plan: needs a file".into()),
        bytes => match bytes.strip_prefix(b"hf-plan:") {
            Some(path) => RulesChoice::HfPlan(OsStr::from_bytes(path).into()),
            None => RulesChoice::File(word.into()),
        },
    })
}

fn order(list: &str) -> Result<MeshOrder, String> {
    list.parse().map_err(|error: Error| error.to_string())
}

fn pp_split(word: OsString) -> Result<SplitChoice<StageSplit>, String> {
    split(word, StageSplit::named)
}

fn ep_split(word: OsString) -> Result<SplitChoice<Split>, String> {
    let expert = |split: &Split| matches!(split, Split::Even | Split::Balanced | Split::RoundRobin);
    split(word, |name| Split::named(name).filter(expert))
}

fn split<T>(word: OsString, named: impl Fn(&str) -> Option<T>) -> Result<SplitChoice<T>, String> {
    match word.to_str().and_then(named) {
        Some(split) => Ok(SplitChoice::Named(split)),
        None if word.is_empty() => Err("no file".into()),
        None => Ok(SplitChoice::File(word.into())),
    }
}

fn devices(text: &str) -> Result<Devices, String> {
    match text {
        "host" => Ok(Devices::Host),
        "host:staged" => Ok(Devices::HostStaged),
        "cuda" => Ok(Devices::Cuda(Vec::new())),
        _ => {
            let list = text.strip_prefix("cuda:").ok_or("expected host, host:staged, cuda or cuda:LIST")?;
            let parse = |number: &str| number.parse().map_err(|_| format!("not a device number: {number:?}"));
            Ok(Devices::Cuda(list.split(',').map(parse).collect::<Result<_, _>>()?))
        }
    }
}

/// Bytes: a number with an optional unit. `K`, `M`, `G`, `T` and `KiB`... are powers of 1024, `KB`... of 1000.
fn size(text: &str) -> Result<u64, String> {
    let split = text.find(|char: char| !char.is_ascii_digit() && char != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| format!("not a size: {text:?}"))?;
    let power = |base: f64, exponent: i32| base.powi(exponent);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => power(1024.0, 1),
        "m" | "mib" => power(1024.0, 2),
        "g" | "gib" => power(1024.0, 3),
        "t" | "tib" => power(1024.0, 4),
        "kb" => power(1000.0, 1),
        "mb" => power(1000.0, 2),
        "gb" => power(1000.0, 3),
        "tb" => power(1000.0, 4),
        _ => return Err(format!("unknown unit in {text:?}")),
    };
    let bytes = number * factor;
    if bytes < 1.0 || bytes > power(2.0, 62) {
        return Err(format!("out of range: {text:?}"));
    }
    Ok(bytes as u64)
}

/// A size that staging can work with.
fn staging(text: &str) -> Result<u64, String> {
    let least = limits::STAGING_MIN as u64;
    match size(text)? {
        bytes if bytes < least => Err(format!("expected at least {least} bytes, found {bytes}")),
        bytes => Ok(bytes),
    }
}

/// Bytes per second: a size, with or without `/s`.
fn rate(text: &str) -> Result<u64, String> {
    size(text.strip_suffix("/s").unwrap_or(text))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = positive(text.strip_suffix('s').unwrap_or(text))?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("out of range: {text:?}"))
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("expected a number above 0".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_rates() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("256M"), Ok(256 << 20));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(rate("2GB/s"), Ok(2_000_000_000));
        assert_eq!(staging("2M"), Ok(2 << 20));
        assert!(staging("1").unwrap_err().contains("2097152 bytes"));
        for text in ["", "x", "1Q", "-1", "0", "1e99"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn devices_and_rules() {
        assert_eq!(devices("cuda:0,3"), Ok(Devices::Cuda(vec![0, 3])));
        assert!(devices("cuda:").is_err() && devices("tpu").is_err());
        assert_eq!(rules("hf-plan:a.json".into()), Ok(RulesChoice::HfPlan("a.json".into())));
        assert_eq!(rules("x.toml".into()), Ok(RulesChoice::File("x.toml".into())));
    }

    #[test]
    fn splits_and_orders() {
        assert_eq!(pp_split("trt".into()), Ok(SplitChoice::Named(StageSplit::Trt)));
        assert_eq!(pp_split("balanced".into()), Ok(SplitChoice::File("balanced".into())));
        assert_eq!(ep_split("balanced".into()), Ok(SplitChoice::Named(Split::Balanced)));
        assert_eq!(ep_split("ceil".into()), Ok(SplitChoice::File("ceil".into())));
        assert!(ep_split("".into()).is_err());
        assert_eq!(order("dp,pp,cp,tp"), Ok(MeshOrder::default()));
        assert!(order("dp,pp,cp").unwrap_err().contains("found dp,pp,cp"));
        assert!(order("dp,pp,cp,sp").unwrap_err().contains("found sp"));
    }

    #[test]
    fn what_comes_later_is_refused_by_name() {
        let refused = [(["--engine", "cufile"], "--engine cufile"), (["--devices", "cuda:0"], "--devices cuda")];
        for (flags, what) in refused {
            let cli = Cli::try_parse_from(["shardlift", "load", "m"].into_iter().chain(flags)).unwrap();
            let Command::Load(args) = cli.command else { panic!("not load") };
            let supported = args.supported();
            if cfg!(feature = "cuda") {
                supported.unwrap();
                continue;
            }
            let error = supported.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.message().starts_with("not in this build") && error.message().contains(what), "{error}");
        }
    }
}
