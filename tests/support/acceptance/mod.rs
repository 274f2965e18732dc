//! Cases of the planner as data, and what runs them through the command line: `plan --json` over headers without data.

pub(crate) mod dense;
pub(crate) mod experts;
pub(crate) mod further;
pub(crate) mod fused;
pub(crate) mod quantised;
pub(crate) mod refusals;
mod walk;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::released::{self, Model};
use walk::{Piece, Range};

/// What a case asks of which checkpoint, and what it expects.
pub(crate) struct Case {
    /// Its number in the table, or what it is about.
    name: &'static str,
    files: Files,
    /// Flags, between blanks.
    flags: &'static str,
    /// Entries of the list `rule`; all other tensors are replicated. Empty for the rules of `config.json`.
    rules: &'static str,
    /// A file that a flag names, and its text.
    beside: Option<(&'static str, &'static str)>,
    /// Rank by rank.
    expected: Vec<(u32, Vec<Dest>)>,
    refusal: Option<Refusal<'static>>,
}

enum Files {
    Model(Box<Model>),
    /// One file of this name with these tensors.
    File(&'static str, Vec<(&'static str, &'static str, Vec<u64>)>),
}

pub(crate) fn case(name: &'static str, model: Model, flags: &'static str) -> Case {
    let files = Files::Model(Box::new(model));
    Case { name, files, flags, rules: "", beside: None, expected: Vec::new(), refusal: None }
}

/// A case of tensors that no released model has: name, dtype, shape.
pub(crate) fn made<const N: usize>(
    name: &'static str,
    tensors: [(&'static str, &'static str, &[u64]); N],
    flags: &'static str,
) -> Case {
    let tensors = tensors.map(|(name, dtype, shape)| (name, dtype, shape.to_vec())).to_vec();
    let files = Files::File("model.safetensors", tensors);
    Case { name, files, flags, rules: "", beside: None, expected: Vec::new(), refusal: None }
}

impl Case {
    /// The name of the one file.
    pub(crate) fn file(mut self, name: &'static str) -> Case {
        match &mut self.files {
            Files::File(file, _) => *file = name,
            Files::Model(_) => panic!("{}: a model names its files", self.name),
        }
        self
    }

    pub(crate) fn rules(mut self, rules: &'static str) -> Case {
        self.rules = rules;
        self
    }

    pub(crate) fn beside(mut self, name: &'static str, text: &'static str) -> Case {
        self.beside = Some((name, text));
        self
    }

    pub(crate) fn on<const N: usize>(mut self, rank: u32, dests: [Dest; N]) -> Case {
        self.expected.push((rank, dests.into()));
        self
    }

    pub(crate) fn refused(mut self, refusal: Refusal<'static>) -> Case {
        self.refusal = Some(refusal);
        self
    }
}

/// The data of an error; `None` is null.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal<'a> {
    pub(crate) rule: &'a str,
    pub(crate) tensor: Option<&'a str>,
    pub(crate) expected: Option<&'a str>,
    pub(crate) found: Option<&'a str>,
    pub(crate) rank: Option<u64>,
}

/// A destination: its type, its shape, and the bytes that it is made of.
pub(crate) struct Dest {
    name: &'static str,
    dtype: &'static str,
    shape: Vec<u64>,
    /// Runs of the files, whatever their order in the destination.
    file: Option<Vec<Runs>>,
    /// Runs in the order of the destination. The table counts those of the file, but for its cases 9 (grouped) and 13: what
    /// these read is one run of the file.
    landing: Option<Vec<Runs>>,
    /// Name of the fill, and the bytes that have it.
    fill: Option<(&'static str, u64)>,
    /// Elements of the destination, and the byte of the tensor where each begins; none for those that are filled.
    elements: Vec<(Vec<u64>, Option<Runs>)>,
    alias_of: Option<&'static str>,
    absent: bool,
}

pub(crate) fn dest<const N: usize>(name: &'static str, dtype: &'static str, shape: [u64; N]) -> Dest {
    Dest {
        name,
        dtype,
        shape: shape.into(),
        file: None,
        landing: None,
        fill: None,
        elements: Vec::new(),
        alias_of: None,
        absent: false,
    }
}

/// A destination that the rank does not have.
pub(crate) fn absent(name: &'static str) -> Dest {
    Dest { absent: true, ..dest(name, "", []) }
}

impl Dest {
    pub(crate) fn file<const N: usize>(mut self, runs: [Runs; N]) -> Dest {
        self.file = Some(runs.into());
        self
    }

    pub(crate) fn landing<const N: usize>(mut self, runs: [Runs; N]) -> Dest {
        self.landing = Some(runs.into());
        self
    }

    pub(crate) fn fill(mut self, fill: &'static str, bytes: u64) -> Dest {
        self.fill = Some((fill, bytes));
        self
    }

    pub(crate) fn element<const N: usize>(mut self, index: [u64; N], from: Runs) -> Dest {
        self.elements.push((index.into(), Some(from)));
        self
    }

    pub(crate) fn filled<const N: usize>(mut self, index: [u64; N]) -> Dest {
        self.elements.push((index.into(), None));
        self
    }

    pub(crate) fn alias_of(mut self, name: &'static str) -> Dest {
        self.alias_of = Some(name);
        self
    }
}

/// Runs of one tensor, from its first byte on.
#[derive(Debug, Clone)]
pub(crate) struct Runs {
    /// That of the destination's name if there is none.
    tensor: Option<String>,
    first: u64,
    run: u64,
    /// Count and pitch, outermost first.
    loops: Vec<(u64, u64)>,
    last: Option<(u64, u64)>,
}

/// One run of `run` bytes.
pub(crate) fn run(first: u64, run: u64) -> Runs {
    Runs { tensor: None, first, run, loops: Vec::new(), last: None }
}

/// `count` runs of `bytes`, from one to the next `pitch`.
pub(crate) fn runs(count: u64, bytes: u64, first: u64, pitch: u64) -> Runs {
    Runs { loops: vec![(count, pitch)], ..run(first, bytes) }
}

/// Where an element begins.
pub(crate) fn byte(at: u64) -> Runs {
    run(at, 0)
}

impl Runs {
    pub(crate) fn of(mut self, tensor: impl Into<String>) -> Runs {
        self.tensor = Some(tensor.into());
        self
    }

    /// All of this `count` times, `pitch` from one to the next.
    pub(crate) fn times(mut self, count: u64, pitch: u64) -> Runs {
        self.loops.insert(0, (count, pitch));
        self
    }

    /// What the last run must be.
    pub(crate) fn last(mut self, from: u64, to: u64) -> Runs {
        self.last = Some((from, to));
        self
    }

    fn ranges(&self, name: &str) -> Vec<Range> {
        let mut starts = vec![self.first];
        for &(count, pitch) in &self.loops {
            starts = starts.iter().flat_map(|start| (0..count).map(move |at| start + at * pitch)).collect();
        }
        let tensor = self.tensor.as_deref().unwrap_or(name);
        let ranges: Vec<Range> = starts.into_iter().map(|start| (tensor.into(), start, start + self.run)).collect();
        if let (Some((from, to)), Some(last)) = (self.last, ranges.last()) {
            assert_eq!((from, to), (last.1, last.2), "the table contradicts itself about {tensor}");
        }
        ranges
    }
}

/// Plans each case and holds what is printed against what it expects.
pub(crate) fn check(cases: impl IntoIterator<Item = Case>) {
    let mut wrong = Vec::new();
    for case in cases {
        let written = Written::new(&case);
        for (rank, dests) in &case.expected {
            let object = written.plan(&format!("{} --rank {rank}", case.flags), 0);
            let place = format!("case {}, {}, rank {rank}", case.name, case.flags);
            let list = object["ranks"][0]["destinations"].as_array().expect("a list");
            dests.iter().for_each(|dest| dest.check(list, &written, &place));
        }
        if let Some(expected) = &case.refusal {
            let object = written.plan(case.flags, 2);
            let error = &object["error"];
            let text = |key: &str| error[key].as_str();
            let found = Refusal {
                rule: text("rule").unwrap_or_default(),
                tensor: text("tensor"),
                expected: text("expected"),
                found: text("found"),
                rank: error["rank"].as_u64(),
            };
            if found != *expected {
                wrong.push(format!("case {}, {}: {found:?}, expected {expected:?}", case.name, case.flags));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

impl Dest {
    fn check(&self, list: &[Value], written: &Written, place: &str) {
        let Dest { name, dtype, shape, file, landing, fill, elements, alias_of, absent } = self;
        let place = format!("{place}, {name}");
        let Some(found) = list.iter().find(|found| found["name"] == *name) else {
            assert!(absent, "{place}: not there, but {:?}", list.iter().map(|it| &it["name"]).collect::<Vec<_>>());
            return;
        };
        assert!(!absent, "{place}: there");
        assert_eq!((&found["dtype"], &found["shape"]), (&json!(dtype), &json!(shape)), "{place}");
        assert_eq!(found["alias_of"].as_str(), *alias_of, "{place}");
        assert_eq!(found["prefill"].as_str(), fill.map(|(fill, _)| fill), "{place}");
        let fills = found["fills"].as_array().expect("a list");
        let filled = fills.iter().map(|fill| {
            let counts =
                fill["loops"].as_array().expect("a list").iter().map(|inner| inner[0].as_u64().expect("a count"));
            counts.product::<u64>() * fill["run"].as_u64().expect("bytes")
        });
        assert_eq!(filled.sum::<u64>(), fill.map_or(0, |(_, filled)| filled), "{place}");
        assert!(
            fills.iter().all(|each| Some(each["value"].as_str().expect("a value")) == fill.map(|(fill, _)| fill)),
            "{place}"
        );
        assert_eq!(found["cast"], Value::Null, "{place}");
        let pieces = found["pieces"].as_array().expect("a list").iter();
        let pieces: Vec<Piece> =
            pieces.map(|piece| Piece::parse(piece, |file, tensor| written.start(file, tensor))).collect();

        let bytes = shape.iter().product::<u64>() * bits(dtype) / 8;
        let read: u64 = pieces.iter().map(Piece::bytes).sum();
        match alias_of {
            Some(_) => assert_eq!((&found["bytes"], read), (&json!(0), 0), "{place}"),
            None => {
                assert_eq!(found["bytes"], json!(bytes), "{place}");
                assert_eq!(read + fill.map_or(0, |(_, filled)| filled), bytes, "{place}");
            }
        }
        for piece in &pieces {
            let (tensor, end) = piece.source_end();
            assert!(end <= written.tensors[tensor].2 && piece.destination_end() <= bytes, "{place}: out of range");
        }

        let ranges = |runs: &[Runs]| runs.iter().flat_map(|runs| runs.ranges(name)).collect::<Vec<_>>();
        if let Some(runs) = file {
            let mut expected = ranges(runs);
            expected.sort();
            same(&walk::file_side(&pieces), &expected, &place);
        }
        if let Some(runs) = landing {
            same(&walk::landing(&pieces), &walk::joined(ranges(runs)), &place);
        }
        for (index, from) in elements {
            let at = index.iter().zip(shape).fold(0, |at, (index, size)| at * size + index) * bits(dtype) / 8;
            let from = from.as_ref().map(|from| (from.tensor.as_deref().unwrap_or(name), from.first));
            assert_eq!(walk::source_of(&pieces, at), from, "{place}: element {index:?}");
        }
    }
}

/// Compares without printing thousands of ranges.
fn same(found: &[Range], expected: &[Range], place: &str) {
    let differs = (0..found.len().max(expected.len())).find(|&at| found.get(at) != expected.get(at));
    if let Some(at) = differs {
        let (found_len, expected_len) = (found.len(), expected.len());
        let (found, expected) = (found.get(at), expected.get(at));
        panic!("{place}: run {at} is {found:?} (of {found_len}), expected {expected:?} (of {expected_len})");
    }
}

fn bits(dtype: &str) -> u64 {
    match dtype {
        "F4" => 4,
        "U8" | "F8_E4M3" => 8,
        "BF16" | "F16" => 16,
        "F32" | "I32" => 32,
        "I64" => 64,
        _ => panic!("how large is {dtype}?"),
    }
}

/// A checkpoint on disk.
pub(crate) struct Written {
    folder: TempDir,
    model: PathBuf,
    has_rules: bool,
    /// For each tensor its file, where it begins there, and its bytes.
    tensors: HashMap<String, (String, u64, u64)>,
}

impl Written {
    fn new(case: &Case) -> Written {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("model");
        let model = match &case.files {
            Files::Model(model) => {
                released::write(&root, model).unwrap();
                root.clone()
            }
            Files::File(name, tensors) => {
                fs::create_dir(&root).unwrap();
                write(&root.join(name), tensors);
                root.join(name)
            }
        };
        if !case.rules.is_empty() {
            let rest = r#"{ match = "**", replicate = true, optional = true }"#;
            fs::write(folder.path().join("rules.toml"), format!("rule = [\n{}\n{rest} ]\n", case.rules)).unwrap();
        }
        if let Some((name, text)) = case.beside {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let mut tensors = HashMap::new();
        for entry in fs::read_dir(&root).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                headers(&path, &mut tensors);
            }
        }
        Written { folder, model, has_rules: !case.rules.is_empty(), tensors }
    }

    /// Where the tensor begins in the file, which must be its own.
    fn start(&self, file: &str, tensor: &str) -> u64 {
        let (own, start, _) = &self.tensors[tensor];
        assert_eq!(file, own, "{tensor}");
        *start
    }

    /// What `plan --json` prints with these flags.
    pub(crate) fn plan(&self, flags: &str, status: i32) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shardlift"));
        command
            .arg("plan")
            .arg(&self.model)
            .arg("--json")
            .args(flags.split_whitespace())
            .current_dir(self.folder.path());
        if self.has_rules {
            command.args(["--rules", "rules.toml"]);
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let told = text.chars().take(500).collect::<String>();
        assert_eq!(output.status.code(), Some(status), "{flags}: {told} {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{flags}: {error}: {told}"))
    }
}

/// A model, and rules for [`Case::rules`].
pub(crate) fn written(model: Model, rules: &'static str) -> Written {
    Written::new(&case("", model, "").rules(rules))
}

/// A file of these tensors without its data.
fn write(path: &Path, tensors: &[(&str, &str, Vec<u64>)]) {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, dtype, shape) in tensors {
        let start = end;
        end += shape.iter().product::<u64>() * bits(dtype) / 8;
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
        assert!(header.insert((*name).to_owned(), entry).is_none(), "{name} twice");
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    let len = file.len() as u64 + end;
    fs::write(path, file).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// Reads a header without the library's parser.
fn headers(path: &Path, tensors: &mut HashMap<String, (String, u64, u64)>) {
    use std::io::Read;
    let mut file = fs::File::open(path).unwrap();
    let mut length = [0; 8];
    file.read_exact(&mut length).unwrap();
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header).unwrap();
    let data = 8 + header.len() as u64;
    let header: Map<String, Value> = serde_json::from_slice(&header).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    for (tensor, entry) in header {
        let at = |index: usize| entry["data_offsets"][index].as_u64().unwrap();
        tensors.insert(tensor, (name.to_owned(), data + at(0), at(1) - at(0)));
    }
}
