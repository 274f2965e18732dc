//! Ranks in processes of their own that read together, on the twins of driver and NCCL.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "support/loading.rs"]
mod loading;
#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;
#[path = "support/released/mod.rs"]
mod released;
#[path = "support/twin.rs"]
mod twin;

use loading::{Model, Ranks};
use released::{Experts, Llama};
use serde_json::Value;

fn sum(objects: &[Value], field: &str) -> u64 {
    objects.iter().map(|object| object[field].as_u64().unwrap()).sum()
}

#[test]
fn every_rank_holds_what_it_holds_on_the_host_and_storage_is_read_once() {
    let model = Model::new();
    for (mesh, count, engine) in [
        (&["--tp", "2"][..], 2, "pread"),
        (&["--tp", "4"], 4, "auto"),
        (&["--tp", "4"], 4, "mmap"),
        (&["--tp", "4"], 4, "uring"),
        (&["--tp", "8"], 8, "pread"),
        (&["--tp", "2", "--dp", "2"], 4, "pread"),
    ] {
        let host = model.host_digests(mesh);
        let ranks = Ranks::start(&model, count, |_, command| {
            command.args(mesh).args(["--cooperate", "always", "--check", "--engine", engine]);
        });
        let objects = ranks.loaded();
        let digests: Vec<Value> = objects.iter().map(|object| object["ranks"][0]["digest"].clone()).collect();
        assert_eq!(digests, host, "{mesh:?} {engine}");
        let (read, checkpoint) =
            (sum(&objects, "storage_bytes_read"), objects[0]["checkpoint_bytes"].as_u64().unwrap());
        let direct = if engine == "uring" { 4096 * 2 * 40 } else { 0 };
        assert!(read <= checkpoint * 101 / 100 + direct, "{mesh:?} {engine}: {read} of {checkpoint}");
        assert!(sum(&objects, "received_bytes") > 0);
        assert_eq!(sum(&objects, "sent_bytes"), sum(&objects, "received_bytes"));
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
        let host = model.host_digests(mesh);
        let ranks = Ranks::start(&model, count, |_, command| {
            command.args(mesh).args(["--cooperate", "always", "--check", "--engine", "pread"]);
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
    }
}
