//! Formats and checkpoints: every rule has a file that breaks it, and the reference implementation is the oracle.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use safetensors::SafeTensors;
use shardlift::checkpoint::{Checkpoint, HubCache, Index};
use shardlift::format::{FormatError, Header, HeaderWarning};
use shardlift::limits::{CONFIG_MAX, INDEX_MAX};
use shardlift::{Dtype, ErrorKind, Rank, Rules};

#[path = "fuzz/bodies.rs"]
mod bodies;
#[path = "support/collisions.rs"]
mod collisions;

fn data(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder)
}

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

fn parse(file: &[u8]) -> Result<Header, FormatError> {
    Header::parse(file, file.len() as u64)
}

/// One smallest file per rule. `SHARDLIFT_WRITE_DATA=1 cargo test --test format` writes them anew.
fn malformed() -> Vec<(&'static str, Vec<u8>)> {
    let w = |fields: &str| file_of(&format!("{{\"w\":{fields}}}"), &[0; 4]);
    let two = |a: &str, b: &str, len: usize| {
        let entry = |offsets: &str| format!("{{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":{offsets}}}");
        file_of(&format!("{{\"a\":{},\"b\":{}}}", entry(a), entry(b)), &vec![0; len])
    };
    let deep = format!("{{\"w\":{{\"x\":{}{}}}}}", "[".repeat(130), "]".repeat(130));
    let mut not_utf8 = file_of("{\"w\": 1}", &[]);
    not_utf8[10] = 0xFF;
    let u8_2 = r#"{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
    vec![
        ("length-missing", vec![1, 0, 0]),
        ("header-too-large", 100_000_001u64.to_le_bytes().to_vec()),
        ("header-outside-file", 9u64.to_le_bytes().to_vec()),
        ("header-not-utf8", not_utf8),
        ("json-syntax", file_of("{\"w\":", &[])),
        ("json-too-deep", file_of(&deep, &[])),
        ("header-not-object", file_of("[]", &[])),
        ("metadata-twice", file_of(r#"{"__metadata__":{},"__metadata__":{}}"#, &[])),
        ("metadata-not-object", file_of(r#"{"__metadata__":[]}"#, &[])),
        ("metadata-key-twice", file_of(r#"{"__metadata__":{"a":"1","a":"2"}}"#, &[])),
        ("metadata-not-string", file_of(r#"{"__metadata__":{"a":1}}"#, &[])),
        ("tensor-twice", file_of(&format!("{{\"w\":{u8_2},\"w\":{u8_2}}}"), &[0; 2])),
        ("tensor-not-object", w("3")),
        ("field-twice", w(r#"{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}"#)),
        ("field-missing", w(r#"{"dtype":"U8","data_offsets":[0,4]}"#)),
        ("dtype-not-string", w(r#"{"dtype":7,"shape":[4],"data_offsets":[0,4]}"#)),
        ("dtype-unknown", w(r#"{"dtype":"F128","shape":[4],"data_offsets":[0,4]}"#)),
        ("shape-not-array", w(r#"{"dtype":"U8","shape":4,"data_offsets":[0,4]}"#)),
        ("dimension-not-count", w(r#"{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}"#)),
        ("offsets-not-pair", w(r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4,4]}"#)),
        ("offset-not-count", w(r#"{"dtype":"U8","shape":[4],"data_offsets":[0,4.0]}"#)),
        ("shape-overflow", w(r#"{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}"#)),
        ("partial-byte", w(r#"{"dtype":"F4","shape":[7],"data_offsets":[0,4]}"#)),
        ("offsets-reversed", w(r#"{"dtype":"U8","shape":[4],"data_offsets":[4,0]}"#)),
        ("size-mismatch", w(r#"{"dtype":"U8","shape":[3],"data_offsets":[0,4]}"#)),
        ("hole", two("[0,2]", "[3,5]", 5)),
        ("overlap", two("[0,2]", "[1,3]", 3)),
        ("data-outside-file", two("[0,2]", "[2,4]", 3)),
        ("trailing-bytes", two("[0,2]", "[2,4]", 5)),
    ]
}

#[test]
fn every_rule_has_a_file_that_breaks_it_alone() {
    let folder = data("data/format");
    let files = malformed();
    let names: BTreeSet<&str> = files.iter().map(|(rule, _)| *rule).collect();
    assert_eq!(names, FormatError::RULES.iter().copied().collect());
    for (rule, bytes) in files {
        let path = folder.join(format!("{rule}.safetensors"));
        #[expect(clippy::disallowed_methods, reason = "a switch of this test")]
        if std::env::var_os("SHARDLIFT_WRITE_DATA").is_some() {
            fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(fs::read(&path).unwrap(), bytes, "{rule}: the committed file differs");
        let found = parse(&bytes).unwrap_err();
        assert_eq!(found.rule(), rule);
        assert!(SafeTensors::read_metadata(&bytes).is_err() || STRICTER.contains(&rule), "{rule}");

        let error = Checkpoint::open(&path).unwrap_err();
        assert_eq!((error.kind(), error.rule(), error.file()), (ErrorKind::Format, Some(rule), Some(&*path)));
        assert_eq!((error.tensor(), error.at().bytes), (found.tensor(), found.bytes()));
        assert!(error.expected().is_some() && error.found().is_some(), "{error}");
        assert_eq!(error.source().unwrap().downcast_ref::<FormatError>(), Some(&found));
    }
}

/// What a message repeats of a header is cut: headers may have 100 MB.
#[test]
fn an_error_is_one_short_line_whatever_the_header_holds() {
    let ones = ["1"; 20_000].join(",");
    let long = "x".repeat(20_000);
    let entry = |dtype: &str, more: &str| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":[{ones}{more}],"data_offsets":[0,1]}}}}"#)
    };
    let (known, twice) = (entry("U8", ""), format!(r#""{long}":1,"{long}":2"#));
    for (rule, header) in [
        ("shape-overflow", entry("U8", ",4294967296,4294967296")),
        ("partial-byte", entry("F4", "")),
        ("dtype-unknown", entry(&long, "")),
        ("field-twice", known.replace("\"shape\"", &format!("{twice},\"shape\""))),
        (
            "metadata-key-twice",
            format!(r#"{{"__metadata__":{{{}}}}}"#, twice.replace(":1", ":\"\"").replace(":2", ":\"\"")),
        ),
        ("metadata-not-string", format!(r#"{{"__metadata__":{{"{long}":1}}}}"#)),
    ] {
        let error = parse(&file_of(&header, &[0])).unwrap_err();
        assert_eq!(error.rule(), rule, "{}", error.to_string().len());
        assert!(error.to_string().len() < 400, "{rule}: {}", error.to_string().len());
    }
}

/// All from byte 0 of the file, where the header counts from the start of the data.
#[test]
fn errors_about_positions_name_the_bytes_of_the_file() {
    for (rule, from, to) in [("hole", 2, 3), ("overlap", 1, 2), ("data-outside-file", 3, 4), ("trailing-bytes", 4, 5)] {
        let (_, file) = malformed().into_iter().find(|(known, _)| *known == rule).unwrap();
        let data_start = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
        assert_eq!(parse(&file).unwrap_err().bytes(), Some((data_start + from, data_start + to)), "{rule}");
    }
}

/// Where we refuse on purpose what safetensors 0.8.0 takes:
/// - a tensor's name or a key of `__metadata__` twice (the last one wins there);
/// - a field that neither knows twice (`field-twice`);
/// - a tensor's entry as an array `["U8", [4], [0, 4]]` (`tensor-not-object`), and a dtype as `{"U8": null}`
///   (`dtype-not-string`): serde's derive takes these, no other reader does.
const STRICTER: &[&str] =
    &["tensor-twice", "metadata-key-twice", "field-twice", "tensor-not-object", "dtype-not-string"];

/// Whatever the reference takes we take, with equal fields, but for [`STRICTER`]; and the other way round always.
fn compare(file: &[u8]) -> Result<(), TestCaseError> {
    let header = match (parse(file), SafeTensors::read_metadata(file)) {
        (Err(_), Err(_)) => return Ok(()),
        (Ok(_), Err(error)) => return Err(TestCaseError::fail(format!("reference refuses: {error}"))),
        (Err(error), Ok(_)) if STRICTER.contains(&error.rule()) => return Ok(()),
        (Err(error), Ok(_)) => return Err(TestCaseError::fail(format!("reference accepts: {error}"))),
        (Ok(header), Ok((length, reference))) => {
            prop_assert_eq!(header.data_start, length as u64 + 8);
            let mut metadata: Vec<_> = reference.metadata().clone().unwrap_or_default().into_iter().collect();
            metadata.sort();
            prop_assert_eq!(&header.metadata, &metadata);
            prop_assert_eq!(header.tensors.len(), reference.tensors().len());
            for tensor in &header.tensors {
                let info = reference.info(&tensor.name).unwrap();
                prop_assert_eq!(tensor.dtype.name(), info.dtype.to_string());
                prop_assert_eq!(tensor.dtype.bits() as usize, info.dtype.bitsize());
                prop_assert_eq!(tensor.shape.to_vec(), info.shape.iter().map(|&dim| dim as u64).collect::<Vec<_>>());
                let (start, end) = info.data_offsets;
                prop_assert_eq!(tensor.start - header.data_start, start as u64);
                prop_assert_eq!(tensor.end - header.data_start, end as u64);
            }
            header
        }
    };
    prop_assert!(header.tensors.windows(2).all(|pair| pair[0].end == pair[1].start));
    Ok(())
}

/// A file whose tensors are dense; the order in the header is not that of the data.
fn valid() -> impl Strategy<Value = Vec<u8>> {
    let dims = prop::collection::vec(0u64..5, 0..4);
    let tensor = ("[a-z\u{e9}.\\\\\"]{0,6}", prop::sample::select(Dtype::ALL), dims);
    let around = ("[ \n\t\r]{0,3}", "[ \n\t\r]{0,12}");
    (prop::collection::vec(tensor, 0..6), prop::option::of("[a-z]{0,4}"), around, any::<bool>()).prop_map(
        |(tensors, metadata, (before, after), reversed)| {
            let (mut at, mut entries) = (0, Vec::new());
            for (position, (name, dtype, mut dims)) in tensors.into_iter().enumerate() {
                if dtype.bits() < 8 {
                    dims.push(4);
                }
                let bytes = dims.iter().product::<u64>() * u64::from(dtype.bits()) / 8;
                let name = serde_json::to_string(&format!("{name}{position}")).unwrap();
                entries.push(format!(
                    "{name}:{{\"dtype\":\"{dtype}\",\"shape\":{dims:?},\"x\":[1e3,{{}}],\"data_offsets\":[{at},{}]}}",
                    at + bytes
                ));
                at += bytes;
            }
            if reversed {
                entries.reverse();
            }
            entries.extend(metadata.map(|value| format!("\"__metadata__\":{{\"k\":\"{value}\"}}")));
            file_of(&format!("{before}{{{}}}{after}", entries.join(",")), &vec![0; at as usize])
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn valid_files_agree_with_the_reference(file in valid()) {
        prop_assert!(parse(&file).is_ok(), "{:?}", parse(&file));
        compare(&file)?;
    }

    #[test]
    fn mutated_files_agree_with_the_reference(
        mut file in valid(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"\"{}[]:,0123456789.-eE\\ nulU8F4\xC3".to_vec())), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        for (at, byte) in edits {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        compare(&file)?;
    }

    #[test]
    fn random_json_agrees_with_the_reference(
        header in r#"[ ]?\{("(w|__metadata__|\\u0077)":(null|3|\{\}|\["U8",\[\],\[0,1\]\]|\{"dtype":("U8"|"F4"|\{"U8":null\}|1),"shape":(\[\]|\[2,1\]|\[1\.0\]|\[-0\]|null),"data_offsets":\[0,[0-3]\](,"y":(1e999|"\\ud800"|\[\]))?\}),?){0,3}\}"#,
        len in 0usize..4,
    ) {
        compare(&file_of(&header, &vec![0; len]))?;
    }
}

#[test]
fn malformed_files_are_never_taken_by_the_reference_alone() {
    for (rule, file) in malformed() {
        compare(&file).unwrap_or_else(|error| panic!("{rule}: {error}"));
    }
}

#[test]
fn all_22_dtypes_and_what_is_odd_but_allowed() {
    for &dtype in Dtype::ALL {
        let bytes = u64::from(dtype.bits()) * 4 / 8;
        let header = format!("{{\"w\":{{\"dtype\":\"{dtype}\",\"shape\":[4],\"data_offsets\":[0,{bytes}]}}}}");
        let header = parse(&file_of(&header, &vec![0; bytes as usize])).unwrap();
        assert_eq!((header.tensors[0].dtype, header.tensors[0].bytes()), (dtype, bytes));
    }
    let text = format!("  {{\"s\":{{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}}}{}", " ".repeat(8));
    let header = parse(&file_of(&text, &[0])).unwrap();
    let unaligned = HeaderWarning::DataUnaligned(header.data_start);
    assert_eq!(header.warnings, [HeaderWarning::PaddingBefore(2), HeaderWarning::PaddingAfter(8), unaligned]);
}

/// Whoever makes a file knows no hash of it: what takes quadratic time for whom every name has one is as quick as ever.
#[test]
fn names_that_are_made_to_collide_cost_no_more_than_others() {
    type Work<'a> = &'a dyn Fn(&[String]);
    let others: Vec<String> =
        (0..1 << collisions::BITS).map(|at| format!("{at:0>width$}", width = collisions::LEN)).collect();
    let hostile = collisions::names();
    let entry = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    let join = |names: &[String], value: &str| {
        names.iter().map(|name| format!("\"{name}\":{value}")).collect::<Vec<_>>().join(",")
    };
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, names: &[String]| {
        fs::write(folder.path().join(name), file_of(&format!("{{{}}}", join(names, entry)), &[])).unwrap()
    };
    let header = |text: String| drop(parse(&file_of(&text, &[])).unwrap());
    let work: [(&str, Work<'_>); 5] = [
        ("tensors", &|names| header(format!("{{{}}}", join(names, entry)))),
        ("metadata", &|names| header(format!("{{\"__metadata__\":{{{}}}}}", join(names, "\"\"")))),
        ("fields", &|names| header(format!("{{\"w\":{{{},{}", join(names, "0"), &format!("{entry}}}")[1..]))),
        ("index", &|names| {
            drop(Index::parse(format!("{{\"weight_map\":{{{}}}}}", join(names, "\"a\"")).as_bytes()).unwrap())
        }),
        ("files of an index", &|names| {
            let map: Vec<String> = names.iter().map(|name| format!("\"{name}\":\"{name}\"")).collect();
            drop(Index::parse(format!("{{\"weight_map\":{{{}}}}}", map.join(",")).as_bytes()).unwrap());
        }),
    ];
    for (what, work) in work {
        let time = |names: &[String]| {
            let begin = Instant::now();
            work(names);
            begin.elapsed()
        };
        let quickest = |names: &[String]| (0..3).map(|_| time(names)).min().unwrap();
        let [others, hostile] = [&others, &hostile].map(|names| quickest(names));
        assert!(hostile < 5 * others + Duration::from_millis(200), "{what}: {hostile:?}, others {others:?}");
    }
    for (names, tensors) in [(&others, "others.safetensors"), (&hostile, "hostile.safetensors")] {
        write(tensors, names);
    }
    let open = |file: &str| {
        let begin = Instant::now();
        Checkpoint::open(folder.path().join(file)).unwrap();
        begin.elapsed()
    };
    let [others, hostile] =
        ["others.safetensors", "hostile.safetensors"].map(|file| (0..3).map(|_| open(file)).min().unwrap());
    assert!(hostile < 5 * others + Duration::from_millis(200), "open: {hostile:?}, others {others:?}");
}

fn model(tensors: &[(&str, u64)]) -> Vec<u8> {
    let (mut at, mut entries) = (0, Vec::new());
    for (name, len) in tensors {
        entries.push(format!("\"{name}\":{{\"dtype\":\"U8\",\"shape\":[{len}],\"data_offsets\":[{at},{}]}}", at + len));
        at += len;
    }
    file_of(&format!("{{{}}}", entries.join(",")), &vec![0; at as usize])
}

/// A directory with `a` and `b` in `1.safetensors`, `c` in `2.safetensors`, and this index.
fn indexed(index: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("1.safetensors"), model(&[("a", 1), ("b", 2)])).unwrap();
    fs::write(folder.path().join("2.safetensors"), model(&[("c", 3)])).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn every_rule_of_the_index() {
    let deep = format!("{{\"x\":{}", "[".repeat(200));
    for (rule, tensor, index) in [
        ("index-not-json", None, "{"),
        ("index-not-json", None, deep.as_str()),
        ("index-not-object", None, "[]"),
        ("index-weight-map-missing", None, "{}"),
        ("index-weight-map-not-object", None, r#"{"weight_map":3}"#),
        ("index-empty", None, r#"{"weight_map":{}}"#),
        ("index-duplicate-key", None, r#"{"weight_map":{},"weight_map":{}}"#),
        ("index-duplicate-key", Some("a"), r#"{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}"#),
        ("index-file-not-string", Some("a"), r#"{"weight_map":{"a":1}}"#),
        ("index-path-outside", Some("a"), r#"{"weight_map":{"a":"../1.safetensors"}}"#),
        ("index-path-outside", Some("a"), r#"{"weight_map":{"a":"/1.safetensors"}}"#),
        ("index-path-outside", Some("a"), r#"{"weight_map":{"a":""}}"#),
        ("index-file-missing", Some("a"), r#"{"weight_map":{"a":"3.safetensors"}}"#),
        ("index-tensor-missing", Some("z"), r#"{"weight_map":{"z":"1.safetensors"}}"#),
        ("index-tensor-elsewhere", Some("c"), r#"{"weight_map":{"a":"2.safetensors","c":"1.safetensors"}}"#),
    ] {
        let folder = indexed(index);
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert_eq!((error.kind(), error.rule()), (ErrorKind::Index, Some(rule)), "{index}: {error}");
        assert!(error.file().is_some() && error.expected().is_some() && error.found().is_some(), "{error}");
        if rule != "index-tensor-elsewhere" {
            assert_eq!(error.tensor(), tensor, "{error}");
        }
    }
}

#[test]
fn an_index_that_is_too_large_is_not_read() {
    let folder = indexed("");
    // Sparse: no such bytes are on disk.
    let resize = |name: &str, bytes| {
        let path = folder.path().join(name);
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    };
    let index = resize("model.safetensors.index.json", INDEX_MAX + 1);
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_eq!((error.kind(), error.rule()), (ErrorKind::Index, Some("index-too-large")), "{error}");
    assert_eq!((error.file(), error.found()), (Some(&*index), Some("100000001 bytes")));
    assert_eq!(error.expected(), Some("at most 100000000 bytes"));
    resize("model.safetensors.index.json", INDEX_MAX);
    assert_eq!(Checkpoint::open(folder.path()).unwrap_err().rule(), Some("index-not-json"));

    fs::remove_file(&index).unwrap();
    resize("config.json", CONFIG_MAX + 1);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.config().is_none());
    assert!(checkpoint.warnings().iter().any(|warning| warning.contains("too large")), "{:?}", checkpoint.warnings());
}

/// Whatever stands in `metadata` besides, and of whatever kind it is.
#[test]
fn of_the_metadata_of_an_index_the_total_is_read() {
    let index = |metadata: &str| {
        let text = format!(r#"{{"x":[{{"y":[1]}},"z"],"metadata":{metadata},"weight_map":{{"a":"f"}}}}"#);
        Index::parse(text.as_bytes())
    };
    let total = |metadata: &str| index(metadata).unwrap().total_size.map(|total| total.to_string());
    for (metadata, expected) in [
        (r#"{"a":[{"total_size":1}],"total_size":5,"b":{"total_size":2}}"#, Some("5")),
        (r#"{"total_size":5.5}"#, Some("5.5")),
        (r#"{"total_size":-5}"#, Some("-5")),
        (r#"{"total_size":"5"}"#, Some("\"5\"")),
        (r#"{"total_size":true}"#, Some("true")),
        (r#"{"total_size":null}"#, Some("null")),
        (r#"{"total_size":[[1],2]}"#, Some("[]")),
        (r#"{"total_size":{"a":{}}}"#, Some("{}")),
        (r#"{"total":5}"#, None),
        ("null", None),
        ("[{\"total_size\":1}]", None),
        ("7", None),
    ] {
        assert_eq!(total(metadata).as_deref(), expected, "{metadata}");
    }
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    for broken in [r#"{"a":"\q"}"#, r#"{"a":[1,]}"#, r#"{"total_size":[1,]}"#, "{\"a\":1e999}", "\"\u{1}\"", &deep] {
        assert_eq!(index(broken).unwrap_err().rule(), Some("index-not-json"), "{broken}");
    }
}

#[test]
fn orphans_and_a_wrong_total_are_warnings() {
    let folder = indexed(
        r#"{"metadata":{"total_size":6},"weight_map":{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#,
    );
    fs::write(folder.path().join("3.safetensors"), model(&[("not the index's", 1)])).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let names: Vec<&str> = checkpoint.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!((names, checkpoint.bytes()), (vec!["a", "b", "c"], 6));
    assert_eq!(checkpoint.position("c"), Some(2));
    assert_eq!(checkpoint.position("d"), None);
    let warnings = checkpoint.warnings();
    let odd: Vec<&String> = warnings.iter().filter(|warning| !warning.contains("no multiple of 8")).collect();
    assert_eq!(odd, ["left out: 1 .safetensors file that the index does not name: 3.safetensors"]);

    let folder = indexed(r#"{"metadata":{"total_size":1},"weight_map":{"a":"1.safetensors"}}"#);
    fs::write(folder.path().join("2.safetensors"), model(&[("a", 1)])).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((checkpoint.tensors().len(), checkpoint.bytes(), checkpoint.position("b")), (1, 1, None));
    assert!(!checkpoint.warnings().iter().any(|warning| warning.contains("total_size")), "{:?}", checkpoint.warnings());

    let folder = indexed(r#"{"metadata":{"total_size":7},"weight_map":{"a":"1.safetensors","c":"2.safetensors"}}"#);
    fs::write(folder.path().join("2.safetensors"), model(&[("a", 1), ("c", 3), ("d", 0), ("e", 1), ("f", 1)])).unwrap();
    fs::write(folder.path().join("config.json"), "{").unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((checkpoint.tensors().len(), checkpoint.bytes()), (2, 4));
    for wanted in [
        "left out: 4 tensors that the index does not name: b, d, e",
        "left out: copies of 1 tensor in other files than the index says: a",
        "index says total_size 7, its tensors take 4 bytes",
        "config.json is not used",
    ] {
        assert!(checkpoint.warnings().iter().any(|warning| warning.contains(wanted)), "{:?}", checkpoint.warnings());
    }
    assert!(checkpoint.config().is_none());
}

#[test]
fn directories_without_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let (path, write) = (folder.path(), |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap());
    assert_eq!(Checkpoint::open(path).unwrap_err().kind(), ErrorKind::NotFound);
    write("pytorch_model.bin", b"");
    let error = Checkpoint::open(path).unwrap_err();
    assert_eq!((error.kind(), error.found()), (ErrorKind::NotFound, Some("pytorch_model.bin")));
    write("x.safetensors", &model(&[("a", 1)]));
    write("y.safetensors", &model(&[("b", 1)]));
    write("config.json", br#"{"architectures":[]}"#);
    let checkpoint = Checkpoint::open(path).unwrap();
    assert_eq!((checkpoint.files().len(), checkpoint.tensors().len()), (2, 2));
    assert!(checkpoint.config().is_some());
    write("y.safetensors", &model(&[("a", 1)]));
    let error = Checkpoint::open(path).unwrap_err();
    assert_eq!((error.kind(), error.rule()), (ErrorKind::Index, Some("tensor-in-two-files")));
    write("model.safetensors", &model(&[("m", 1)]));
    assert_eq!(Checkpoint::open(path).unwrap().files().len(), 1);
}

/// A name that leads to no regular file is never the same as no such name.
#[test]
fn what_a_directory_names_must_open() {
    use std::os::unix::fs::symlink;
    let make = |kind: &str, path: &Path| match kind {
        "link to nothing" => symlink("../blobs/0", path).unwrap(),
        "folder" => fs::create_dir(path).unwrap(),
        _ => assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success()),
    };
    for name in ["model.safetensors.index.json", "model.safetensors", "model-00002-of-00002.safetensors"] {
        for kind in ["link to nothing", "folder", "fifo"] {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("model-00001-of-00002.safetensors"), model(&[("a", 1)])).unwrap();
            make(kind, &folder.path().join(name));
            let error = Checkpoint::open(folder.path()).unwrap_err();
            assert_eq!(
                (error.kind(), error.rule()),
                (ErrorKind::Index, Some("file-unusable")),
                "{name} {kind}: {error}"
            );
            assert!(error.file().is_some_and(|file| file.ends_with(name)), "{error}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), model(&[("a", 1)])).unwrap();
    fs::write(folder.path().join("other.safetensors"), model(&[("b", 1)])).unwrap();
    symlink("nothing", folder.path().join("config.json")).unwrap();
    let warnings = Checkpoint::open(folder.path()).unwrap().warnings().join("\n");
    assert!(warnings.contains("left out: 1 .safetensors file beside model.safetensors: other.safetensors"));
    assert!(warnings.contains("config.json is not used"), "{warnings}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_name_that_is_not_utf8_is_not_passed_over() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.safetensors"), model(&[("a", 1)])).unwrap();
    let odd = folder.path().join(std::ffi::OsStr::from_bytes(b"b\xff.safetensors"));
    fs::write(&odd, model(&[("b", 1)])).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap_err();
    let found = (error.kind(), error.rule(), error.file());
    assert_eq!(found, (ErrorKind::Index, Some("file-name-not-utf8"), Some(&*odd)));
}

#[test]
fn errors_about_the_config_name_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), model(&[("a", 1)])).unwrap();
    let config = folder.path().join("config.json");
    for (text, rule) in [(r#"{"model_type":"x"}"#, "unknown-architecture"), (r#"{"model_type":"llama"}"#, "config")] {
        fs::write(&config, text).unwrap();
        let error = Rules::for_model(&Checkpoint::open(folder.path()).unwrap()).unwrap_err();
        assert_eq!((error.rule(), error.file()), (Some(rule), Some(&*config)));
    }
}

#[test]
fn one_checkpoint_per_rank_is_never_merged() {
    let folder = tempfile::tempdir().unwrap();
    for (rank, part) in [(0, 0), (0, 1), (1, 0)] {
        let name = format!("model-rank-{rank}-part-{part}.safetensors");
        fs::write(folder.path().join(name), model(&[(&format!("w{part}"), rank + 1)])).unwrap();
    }
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.to_string().contains("model-rank-0-part-0.safetensors"), "{error}");
    assert!(error.message().ends_with("of ranks 0 to 1: open one of its files"), "{error}");
    assert_eq!(Checkpoint::rank_files(folder.path()).unwrap()[&Rank(0)].len(), 2);
    assert_eq!(Checkpoint::open_rank(folder.path(), Rank(0)).unwrap().tensors().len(), 2);
    assert_eq!(Checkpoint::open_rank(folder.path(), Rank(1)).unwrap().bytes(), 2);
    assert_eq!(Checkpoint::open_rank(folder.path(), Rank(2)).unwrap_err().kind(), ErrorKind::NotFound);
    fs::remove_file(folder.path().join("model-rank-0-part-0.safetensors")).unwrap();
    assert_eq!(Checkpoint::open_rank(folder.path(), Rank(0)).unwrap_err().rule(), Some("rank-part-missing"));
}

#[test]
fn the_hub_cache() {
    let folder = tempfile::tempdir().unwrap();
    let repo = folder.path().join("models--org--name");
    for dir in ["blobs", "refs/pr", "snapshots/c0ffee"] {
        fs::create_dir_all(repo.join(dir)).unwrap();
    }
    fs::write(repo.join("blobs/1234"), model(&[("a", 1)])).unwrap();
    std::os::unix::fs::symlink("../../blobs/1234", repo.join("snapshots/c0ffee/model.safetensors")).unwrap();
    fs::write(repo.join("refs/main"), "c0ffee").unwrap();
    fs::write(repo.join("refs/pr/1"), "c0ffee\n").unwrap();
    fs::write(repo.join("refs/gone"), "dead").unwrap();
    let cache = HubCache::new(folder.path());
    for id in ["org/name", "org/name@main", "org/name@pr/1", "org/name@c0ffee"] {
        assert_eq!(Checkpoint::open_hub(id, &cache).unwrap().tensors().len(), 1, "{id}");
    }
    for id in ["org/other", "name", "org/name@v2", "org/name@gone"] {
        assert_eq!(Checkpoint::open_hub(id, &cache).unwrap_err().kind(), ErrorKind::NotFound, "{id}");
    }
    for id in ["", "a/b/c", "../x", "org/name@../../x", "org/name@"] {
        assert_eq!(Checkpoint::open_hub(id, &cache).unwrap_err().kind(), ErrorKind::Usage, "{id}");
    }
}

#[test]
fn fuzz_bodies_run_over_their_corpus() {
    for (folder, body) in [("header", bodies::header as fn(&[u8])), ("index", bodies::index)] {
        let mut count = 0;
        for entry in fs::read_dir(data("fuzz/corpus").join(folder)).unwrap() {
            body(&fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "empty corpus {folder}");
    }
    malformed().iter().for_each(|(_, file)| bodies::header(file));
}
