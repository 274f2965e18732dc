//! Ranks in processes of their own that read together, on the twins of driver and NCCL.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "support/loading.rs"]
mod loading;
#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;
#[path = "support/released/mod.rs"]
mod released;

use std::fs;
use std::path::Path;

use loading::{Model, Ranks};
use released::{Experts, Llama};
use serde_json::Value;

fn sum(objects: &[Value], field: &str) -> u64 {
    objects.iter().map(|object| object[field].as_u64().unwrap()).sum()
}

/// Bytes that each rank sends and receives, as the plan of all of them has it.
fn planned(model: &Model, mesh: &[&str]) -> Vec<[u64; 2]> {
    let object = model.plan(&[mesh, &["--cooperate", "always"]].concat());
    let of = |rank: &Value| ["sent_bytes", "received_bytes"].map(|field| rank[field].as_u64().unwrap());
    let ranks: Vec<[u64; 2]> = object["ranks"].as_array().unwrap().iter().map(of).collect();
    for (at, field) in ["sent_bytes", "received_bytes"].iter().enumerate() {
        assert_eq!(object[field], ranks.iter().map(|bytes| bytes[at]).sum::<u64>());
    }
    assert_eq!(object["storage_bytes"], object["checkpoint_bytes"], "{mesh:?}");
    ranks
}

/// What passed between ranks is what was planned: as each of them counts it, and as the twin does, with which they exchange a
/// few bytes more to part.
fn travelled_as_planned(model: &Model, mesh: &[&str], ledgers: &Path, objects: &[Value]) {
    let planned = planned(model, mesh);
    let loaded =
        objects.iter().map(|object| ["sent_bytes", "received_bytes"].map(|field| object[field].as_u64().unwrap()));
    assert_eq!(loaded.collect::<Vec<_>>(), planned, "{mesh:?}");
    let ledgers: Vec<Value> = (0..planned.len())
        .map(|rank| serde_json::from_slice(&fs::read(ledgers.join(format!("{rank}.json"))).unwrap()).unwrap())
        .collect();
    let of = |ledger: &Value, field: &str| ledger["devices"][0][field].as_u64().unwrap();
    let mut parting = 0;
    for (ledger, [_, received]) in ledgers.iter().zip(&planned) {
        let more = of(ledger, "received_bytes") - received;
        assert!(more <= 16 * (planned.len() as u64 - 1), "{mesh:?}: {more} bytes more than planned");
        parting += more;
    }
    // A broadcast goes round a ring there: who sends what differs, the sum does not.
    let sent = ledgers.iter().map(|ledger| of(ledger, "sent_bytes")).sum::<u64>();
    assert_eq!(sent - parting, planned.iter().map(|[sent, _]| sent).sum::<u64>(), "{mesh:?}");
}

#[test]
fn every_rank_holds_what_it_holds_on_the_host_and_storage_is_read_once() {
    let model = Model::new();
    for (mesh, count, engine) in [
        (&["--tp", "2"][..], 2, "pread"),
        (&["--tp", "4"], 4, "auto"),
        (&["--tp", "4"], 4, "mmap"),
        (&["--tp", "4"], 4, "uring"),
        (&["--tp", "4"], 4, "cufile"),
        (&["--tp", "8"], 8, "pread"),
        (&["--tp", "2", "--dp", "2"], 4, "pread"),
    ] {
        let (host, ledgers) = (model.host_digests(mesh), tempfile::tempdir().unwrap());
        let ranks = Ranks::start(&model, count, |rank, command| {
            command.args(mesh).args(["--cooperate", "always", "--check", "--engine", engine]);
            command.env("SIMNCCL_LEDGER", ledgers.path().join(format!("{rank}.json")));
        });
        let objects = ranks.loaded();
        let digests: Vec<Value> = objects.iter().map(|object| object["ranks"][0]["digest"].clone()).collect();
        assert_eq!(digests, host, "{mesh:?} {engine}");
        let (read, checkpoint) =
            (sum(&objects, "storage_bytes_read"), objects[0]["checkpoint_bytes"].as_u64().unwrap());
        let direct = if ["uring", "cufile"].contains(&engine) { 4096 * 2 * 40 } else { 0 };
        assert!(read <= checkpoint * 101 / 100 + direct, "{mesh:?} {engine}: {read} of {checkpoint}");
        assert!(sum(&objects, "received_bytes") > 0);
        travelled_as_planned(&model, mesh, ledgers.path(), &objects);
    }
}

#[test]
fn ranks_that_read_alone_need_nobody() {
    let model = Model::new();
    let host = model.host_digests(&["--tp", "2"]);
    let ranks = Ranks::alone(&model, 2, |_, command| {
        command.args(["--tp", "2", "--cooperate", "never", "--check"]);
    });
    let objects = ranks.loaded();
    assert_eq!(objects.iter().map(|object| object["ranks"][0]["digest"].clone()).collect::<Vec<_>>(), host);
    assert_eq!(sum(&objects, "received_bytes"), 0);
}

#[test]
fn stages_and_experts_are_exchanged_within_those_who_have_them() {
    let experts = Experts { count: 4, per_token: 2, intermediate: 256 };
    let sizes = Llama { layers: 4, hidden: 256, heads: 8, kv_heads: 4, head_dim: 32, ..Llama::MIXTRAL_8X7B };
    let mixtral = Llama { intermediate: 256, experts: Some(experts), vocab: 512, files: 2, ..sizes };
    let model = Model::of_family(|folder| released::write_random(folder, &mixtral.model(), 1).unwrap());
    for (mesh, count) in [
        (&["--tp", "2", "--pp", "2"][..], 4),
        (&["--tp", "4", "--ep", "4"], 4),
        (&["--tp", "4", "--ep", "2", "--dp", "2"], 8),
    ] {
        let (host, ledgers) = (model.host_digests(mesh), tempfile::tempdir().unwrap());
        let ranks = Ranks::start(&model, count, |rank, command| {
            command.args(mesh).args(["--cooperate", "always", "--check", "--engine", "pread"]);
            command.env("SIMNCCL_LEDGER", ledgers.path().join(format!("{rank}.json")));
        });
        let objects = ranks.loaded();
        assert_eq!(
            objects.iter().map(|object| object["ranks"][0]["digest"].clone()).collect::<Vec<_>>(),
            host,
            "{mesh:?}"
        );
        let (read, checkpoint) =
            (sum(&objects, "storage_bytes_read"), objects[0]["checkpoint_bytes"].as_u64().unwrap());
        assert!(read <= checkpoint * 101 / 100, "{mesh:?}: {read} of {checkpoint}");
        travelled_as_planned(&model, mesh, ledgers.path(), &objects);
    }
}
