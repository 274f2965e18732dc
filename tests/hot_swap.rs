//! The server of example 07, asked over HTTP while it changes its model.
#![cfg(all(feature = "examples", feature = "cli"))]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

/// Bytes of a tensor that no layer uses, so that a load takes its time.
const UNUSED: usize = 24_000_000;
const LIMIT: Duration = Duration::from_secs(60);

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(model: &Path, options: &[&str]) -> Server {
        let folder = Path::new(env!("CARGO_BIN_EXE_shardlift")).parent().unwrap().join("examples");
        let example = folder.join("07_hot_swap");
        assert!(example.exists(), "`cargo test` builds {}, `cargo test --test hot_swap` does not", example.display());
        let mut command = Command::new(example);
        command.arg(model).args(["--listen", "127.0.0.1:0"]).args(options).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        Server { child, address }
    }

    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// The model that answered, and its vectors.
    fn embed(&self) -> (String, Value) {
        self.embed_all(&["a crane lifts", "it rained"])
    }

    fn embed_all(&self, sentences: &[&str]) -> (String, Value) {
        let (status, body) = self.ask("POST", "/embed", Some(json!({ "sentences": sentences })));
        assert_eq!(status, 200, "{body}");
        let mut answer: Value = serde_json::from_str(&body).unwrap();
        (answer["model"].as_str().unwrap().into(), answer["vectors"].take())
    }

    fn swap(&self, model: &Path) -> (u16, Value) {
        let (status, body) = self.ask("POST", "/swap", Some(json!({ "model": model })));
        (status, serde_json::from_str(&body).unwrap_or_else(|_| panic!("{body}")))
    }

    fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.ask("GET", "/metrics", None);
        assert_eq!(status, 200);
        let line = text.lines().find(|line| line.starts_with(&format!("shardlift_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn wait_until_loading(&self, bytes: u64) {
        let began = Instant::now();
        while self.loading().is_none_or(|done| done < bytes) {
            assert!(began.elapsed() < LIMIT, "no load has {bytes} bytes");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Bytes that were loaded of the model that is on its way, if one is.
    fn loading(&self) -> Option<u64> {
        let (_, body) = self.ask("GET", "/status", None);
        serde_json::from_str::<Value>(&body).unwrap()["loading"]["bytes"].as_u64()
    }

    /// Whether a swap was under way to be cancelled.
    fn cancel(&self) -> bool {
        let (status, body) = self.ask("POST", "/cancel", None);
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert!(status == 200 && answer.as_object().unwrap().len() == 1, "{body}");
        answer["cancelled"].as_bool().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes a model of random weights; its folder and the bytes of its weights.
fn model(folder: &Path, name: &str) -> (PathBuf, u64) {
    model_of_words(folder, name, 0)
}

/// The same with so many words more, in a type that the model converts when it is made.
fn model_of_words(folder: &Path, name: &str, more: usize) -> (PathBuf, u64) {
    let folder = folder.join(name);
    fs::create_dir(&folder).unwrap();
    let words = ["[UNK]", "a", "crane", "lifts", "it", "rained"];
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(at, word)| (word.to_string(), at.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]" },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let (hidden, inner, layers) = (32, 48, 2);
    let config = json!({
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": words.len() + more, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": inner, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "max_position_embeddings": 16, "type_vocab_size": 2, "initializer_range": 0.02,
        "layer_norm_eps": 1e-12, "pad_token_id": 0,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = HashMap::new();
    let mut random = |name: String, shape: &[usize]| {
        tensors.insert(name, Tensor::randn(0f32, 0.3, shape, &Device::Cpu).unwrap());
    };
    for (name, rows) in [("word", words.len()), ("position", 16), ("token_type", 2)] {
        random(format!("embeddings.{name}_embeddings.weight"), &[rows, hidden]);
    }
    let mut norm = |name: &str| ["weight", "bias"].map(|of| random(format!("{name}.LayerNorm.{of}"), &[hidden]));
    norm("embeddings");
    for layer in 0..layers {
        norm(&format!("encoder.layer.{layer}.attention.output"));
        norm(&format!("encoder.layer.{layer}.output"));
    }
    for layer in 0..layers {
        for (name, rows, columns) in [
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ] {
            random(format!("encoder.layer.{layer}.{name}.weight"), &[rows, columns]);
            random(format!("encoder.layer.{layer}.{name}.bias"), &[rows]);
        }
    }
    if more > 0 {
        let words = Tensor::zeros((words.len() + more, hidden), DType::F64, &Device::Cpu).unwrap();
        tensors.insert("embeddings.word_embeddings.weight".into(), words);
    }
    tensors.insert("unused".into(), Tensor::zeros(UNUSED / 4, DType::F32, &Device::Cpu).unwrap());
    let bytes = tensors.values().map(|tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64).sum();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    (folder, bytes)
}

#[test]
fn no_request_fails_while_models_change() {
    let folder = tempfile::tempdir().unwrap();
    let [(a, bytes), (b, _)] = ["a", "b"].map(|name| model(folder.path(), name));
    let server = Server::start(&a, &["--throttle", "60"]);
    let (of_a, of_b) = (server.embed(), {
        assert_eq!(server.swap(&b).0, 200);
        server.embed()
    });
    assert_eq!((of_a.0.as_str(), of_b.0.as_str()), (a.to_str().unwrap(), b.to_str().unwrap()));
    assert_ne!(of_a.1, of_b.1);
    let done = AtomicBool::new(false);
    let answered = thread::scope(|scope| {
        let ask = || {
            let mut answers = [0_u64; 2];
            while !done.load(Ordering::Relaxed) {
                let answer = server.embed();
                let which = usize::from(answer.0 == of_b.0);
                assert_eq!(answer, [&of_a, &of_b][which].clone()); // one model's from end to end
                answers[which] += 1;
            }
            answers
        };
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
        for round in 0..4 {
            let (next, last) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
            let (status, swapped) = server.swap(next);
            assert_eq!((status, &swapped["bytes"]), (200, &bytes.into()), "{swapped}");
            assert_eq!(swapped["model"], next.to_str().unwrap());
            // The old one is gone, whoever was asking it.
            assert_eq!(server.metric("weights_bytes"), bytes as f64, "{}", last.display());
        }
        done.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).fold([0; 2], |[a, b], [c, d]| [a + c, b + d])
    });
    assert!(answered.iter().all(|&answers| answers > 3), "{answered:?}");
    assert_eq!((server.metric("loads_total"), server.metric("load_failures_total")), (6.0, 0.0));
    assert_eq!(server.metric("load_bytes_total"), 6.0 * bytes as f64);
    let rate = server.metric("load_bytes_total") / server.metric("load_seconds_total") / 1e6;
    assert!((20.0..90.0).contains(&rate), "{rate} MB/s with a throttle of 60");
    assert!(server.metric("last_load_gb_per_second") > 0.0);
    assert!(server.metric(r#"stage_busy_seconds_total{stage="read"}"#) > 0.0);
}

#[test]
fn a_load_that_fails_or_is_cancelled_leaves_the_old_model() {
    let folder = tempfile::tempdir().unwrap();
    let [(a, bytes), (b, _), (cut, _)] = ["a", "b", "cut"].map(|name| model(folder.path(), name));
    let weights = cut.join("model.safetensors");
    File::options().write(true).open(&weights).unwrap().set_len(fs::metadata(&weights).unwrap().len() - 10).unwrap();
    let budget = (2 * bytes / 1_000_000 + 1).to_string();
    let server = Server::start(&a, &["--throttle", "20", "--budget", &budget]);
    let of_a = server.embed();
    let mut failures = 0.0;
    let mut still_a = |why: &str| {
        failures += 1.0;
        assert_eq!(server.embed(), of_a, "{why}");
        assert_eq!(server.metric("load_failures_total"), failures, "{why}");
        assert_eq!(server.metric("weights_bytes"), bytes as f64, "{why}");
    };

    let refused = |model: &Path| {
        let (status, answer) = server.swap(model);
        assert_eq!(status, 422, "{answer}");
        answer["error"].as_str().unwrap().to_owned()
    };
    let why = refused(&folder.path().join("none"));
    assert!(why.contains("none"), "{why}");
    still_a(&why);
    let why = refused(&cut);
    assert!(why.contains("model.safetensors"), "{why}");
    still_a(&why);
    // Weights without a tokenizer are not read.
    fs::remove_file(cut.join("tokenizer.json")).unwrap();
    fs::copy(b.join("model.safetensors"), &weights).unwrap();
    let why = refused(&cut);
    assert!(why.contains("cut"), "{why}");
    still_a(&why);

    // Cancelled, and a second swap meanwhile refused.
    thread::scope(|scope| {
        let swap = scope.spawn(|| server.swap(&b));
        server.wait_until_loading(1);
        let (status, answer) = server.swap(&a);
        assert_eq!(status, 409, "{answer}");
        assert_eq!(server.embed(), of_a);
        assert!(server.cancel());
        let (status, answer) = swap.join().unwrap();
        assert_eq!(status, 422);
        assert!(answer["error"].as_str().unwrap().contains("cancelled"), "{answer}");
    });
    still_a("cancelled");
    assert!(!server.cancel());
    // And then it works.
    assert_eq!(server.swap(&b).0, 200);
    assert_ne!(server.embed().1, of_a.1);
}

#[test]
fn a_swap_that_was_cancelled_does_not_take_over() {
    let folder = tempfile::tempdir().unwrap();
    let [(a, bytes), (b, _)] = ["a", "b"].map(|name| model(folder.path(), name));
    let server = Server::start(&a, &[]);
    let of_a = server.embed();

    // Before there is a load: whoever reads the tokenizer waits for somebody who writes it.
    let tokenizer = b.join("tokenizer.json");
    let text = fs::read(&tokenizer).unwrap();
    fs::remove_file(&tokenizer).unwrap();
    assert!(Command::new("mkfifo").arg(&tokenizer).status().unwrap().success());
    thread::scope(|scope| {
        let swap = scope.spawn(|| server.swap(&b));
        server.wait_until_loading(0);
        assert!(server.cancel());
        fs::write(&tokenizer, &text).unwrap();
        let (status, answer) = swap.join().unwrap();
        assert!(status == 422 && answer["error"].as_str().unwrap().contains("cancelled"), "{answer}");
    });
    assert_eq!(server.embed(), of_a);
    assert_eq!(server.metric("weights_bytes"), bytes as f64);
    fs::remove_file(&tokenizer).unwrap();
    fs::write(&tokenizer, &text).unwrap();

    // After the load, while a model is made of it.
    let (slow, of_slow) = model_of_words(folder.path(), "slow", 400_000);
    for _ in 0..3 {
        let (told, (status, answer)) = thread::scope(|scope| {
            let swap = scope.spawn(|| server.swap(&slow));
            while !swap.is_finished() && server.loading().is_none_or(|done| done < of_slow) {}
            (server.cancel(), swap.join().unwrap())
        });
        assert_eq!(status, if told { 422 } else { 200 }, "{answer}");
        assert_eq!(server.embed().0, if told { &a } else { &slow }.to_str().unwrap());
        assert_eq!(server.swap(&a).0, 200);
    }

    // And whenever else: who is told that it is cancelled finds the old one, who is not the new one.
    let mut cancelled = [0; 2];
    let mut serving = a.clone();
    for turn in 0..40 {
        let next = if serving == a { &b } else { &a };
        let (told, (status, answer)) = thread::scope(|scope| {
            let swap = scope.spawn(|| server.swap(next));
            thread::sleep(Duration::from_millis(turn));
            (server.cancel(), swap.join().unwrap())
        });
        assert_eq!(status, if told { 422 } else { 200 }, "{answer}");
        serving = if told { serving } else { next.clone() };
        assert_eq!(server.embed().0, serving.to_str().unwrap());
        assert_eq!(server.metric("weights_bytes"), bytes as f64);
        cancelled[usize::from(told)] += 1;
    }
    assert!(cancelled[1] > 0, "{cancelled:?}");
}

#[test]
fn a_sentence_without_words_has_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _) = model(folder.path(), "a");
    let server = Server::start(&a, &[]);
    assert_eq!(server.embed_all(&[]).1, json!([]));
    let vectors = server.embed_all(&["a crane lifts", ""]).1;
    assert_eq!(vectors[1], json!(vec![0.0; 32]));
    assert!(vectors[0].as_array().unwrap().iter().all(|number| number.as_f64().is_some()), "{vectors}");
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let folder = tempfile::tempdir().unwrap();
    let (a, _) = model(folder.path(), "a");
    let server = Server::start(&a, &[]);
    let (status, text) = server.ask("GET", "/metrics", None);
    assert!(status == 200 && text.ends_with('\n'), "{text}");
    // Of each metric one line of help, one of its type, and then all of its samples.
    let mut lines = text.lines().peekable();
    let mut seen = Vec::new();
    while let Some(help) = lines.next() {
        let (name, _) = help.strip_prefix("# HELP ").unwrap().split_once(' ').unwrap();
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        assert!(name.starts_with("shardlift_") && name.bytes().all(is_name) && !seen.contains(&name), "{name}");
        let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap();
        assert_eq!(kind, if name.ends_with("_total") { "counter" } else { "gauge" }, "{name}");
        let mut samples = 0;
        while let Some(sample) = lines.next_if(|line| !line.starts_with('#')) {
            let (of, value) = sample.rsplit_once(' ').unwrap();
            let labels = of.strip_prefix(name).unwrap();
            assert!(labels.is_empty() || (labels.starts_with("{stage=\"") && labels.ends_with("\"}")), "{sample}");
            assert!(value.parse::<f64>().unwrap().is_finite(), "{sample}");
            samples += 1;
        }
        assert!(samples > 0, "{name}");
        seen.push(name);
    }
    assert_eq!(seen.len(), 7);
}

#[test]
fn a_model_over_the_budget_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let [(a, bytes), (b, _)] = ["a", "b"].map(|name| model(folder.path(), name));
    let budget = 2 * bytes / 1_000_000; // rounded down: just too little
    let server = Server::start(&a, &["--budget", &budget.to_string()]);
    let (status, answer) = server.swap(&b);
    let why = answer["error"].as_str().unwrap();
    assert_eq!(status, 507, "{why}");
    for number in [bytes, budget * 1_000_000] {
        assert!(why.contains(&number.to_string()), "{why}");
    }
    assert_eq!(server.metric("load_bytes_total"), bytes as f64);
    assert_eq!(server.embed().0, a.to_str().unwrap());
}
