//! Ranks in processes of their own that read together, on the twins of driver and NCCL.
#![cfg(all(feature = "cli", feature = "cuda"))]

#[path = "support/loading.rs"]
mod loading;
#[path = "support/model.rs"]
#[allow(dead_code, reason = "only the files are wanted")]
mod model;
#[path = "support/twin.rs"]
mod twin;

use loading::{Model, Ranks};
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
