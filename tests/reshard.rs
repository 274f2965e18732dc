//! What a reshard does to the disk: nothing to the model, nothing beside its output, and all of that or nothing.

#[path = "support/model.rs"]
mod model;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use shardlift::{Checkpoint, ErrorKind, Loader, Plan, Rank, Rules, World, limits};

/// A folder with a model in `parent/m`.
fn folder_with_model() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let m = folder.path().join("parent/m");
    fs::create_dir_all(&m).unwrap();
    model::write(&m, 21);
    fs::write(m.join("config.json"), "{}").unwrap();
    (folder, m)
}

fn plan(model: &Path, ranks: u32) -> Plan {
    let checkpoint = Checkpoint::open(model).unwrap();
    Plan::new(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &World::host(ranks)).unwrap()
}

/// Everything below a folder: links by what they name, files by what they hold.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if let Ok(target) = fs::read_link(&path) {
            found.insert(path, target.into_os_string().into_encoded_bytes());
        } else if path.is_dir() {
            found.extend(tree(&path));
            found.insert(path, Vec::new());
        } else {
            let bytes = fs::read(&path).unwrap();
            found.insert(path, bytes);
        }
    }
    found
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn refused(root: &Path, model: &Path, out: &Path, rule: &str) {
    let (plan, before) = (plan(model, 1), tree(root));
    for force in [false, true] {
        let error = Loader::new().reshard(&plan, out, force).unwrap_err();
        let found = (error.kind(), error.rule());
        assert_eq!(found, (ErrorKind::Usage, Some(rule)), "{} as {}: {error}", model.display(), out.display());
        assert!(tree(root) == before, "{} as {}", model.display(), out.display());
    }
}

#[test]
fn the_model_is_never_replaced() {
    let (folder, m) = folder_with_model();
    let (root, parent, file) = (folder.path(), folder.path().join("parent"), m.join("one.safetensors"));
    let link = root.join("link");
    symlink(&m, &link).unwrap();
    // The shape of a hub cache: a snapshot of links to blobs.
    let hub = root.join("hub");
    fs::create_dir_all(hub.join("blobs")).unwrap();
    fs::create_dir_all(hub.join("snapshots/x")).unwrap();
    fs::rename(m.join("two.safetensors"), hub.join("blobs/two")).unwrap();
    fs::copy(&file, hub.join("blobs/one")).unwrap();
    for name in ["one", "two"] {
        let link = hub.join("snapshots/x").join(format!("{name}.safetensors"));
        symlink(format!("../../blobs/{name}"), link).unwrap();
    }
    let snapshot = hub.join("snapshots/x");
    for (model, out) in [
        (&m, &m),
        (&m, &parent),
        (&m, &root.to_path_buf()),
        (&m, &link),
        (&link, &m),
        (&link, &parent),
        (&m, &file),
        (&file, &m),
        (&file, &file),
        (&file, &parent),
        (&m, &root.join("hub/../parent")),
        (&snapshot, &hub),
        (&snapshot, &hub.join("blobs")),
        (&snapshot, &hub.join("snapshots")),
        (&snapshot, &snapshot.join("one.safetensors")),
        (&snapshot, &hub.join("blobs/one")),
    ] {
        refused(root, model, out, "output-is-model");
    }

    // Inside the model's folder it takes nothing away.
    let before = tree(&m);
    let out = m.join("out");
    Loader::new().reshard(&plan(&m, 1), &out, false).unwrap();
    Loader::new().reshard(&plan(&m, 1), &out, true).unwrap();
    let partition = out.join("model-rank-0-part-0.safetensors");
    refused(root, &partition, &out, "output-is-model");
    fs::remove_dir_all(&out).unwrap();
    assert!(tree(&m) == before);
}

#[test]
fn only_folders_are_replaced_and_links_to_them_stay() {
    let (folder, m) = folder_with_model();
    let root = folder.path();
    let (dangling, file, to_file) = (root.join("dangling"), root.join("file"), root.join("to-file"));
    fs::write(&file, "mine").unwrap();
    symlink("nowhere", &dangling).unwrap();
    symlink("file", &to_file).unwrap();
    for out in [&dangling, &file, &to_file] {
        refused(root, &m, out, "output-not-folder");
    }
    fs::create_dir_all(root.join("disk/real")).unwrap();
    fs::write(root.join("disk/real/old"), "old").unwrap();
    let link = root.join("out");
    symlink("disk/real", &link).unwrap();
    let error = Loader::new().reshard(&plan(&m, 1), &link, false).unwrap_err();
    assert_eq!(error.rule(), Some("output-exists"));
    Loader::new().reshard(&plan(&m, 1), &link, true).unwrap();
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("disk/real"));
    assert_eq!(names(&root.join("disk/real")), ["config.json", "model-rank-0-part-0.safetensors"]);
    assert_eq!(names(&root.join("disk")), ["real"]);
}

#[test]
fn where_an_output_cannot_be_is_a_wrong_argument_and_nothing_is_left() {
    let (folder, m) = folder_with_model();
    let root = folder.path();
    let file = m.join("one.safetensors");
    for out in [file.join("out"), root.join("x".repeat(256)), root.join("a").join("x".repeat(256))] {
        refused(root, &m, &out, "output-not-creatable");
    }
    #[cfg(target_os = "linux")]
    refused(root, &m, Path::new("/proc/shardlift/out"), "output-not-creatable");
    // The longest name that there is, and a way that leads through folders that are not there.
    let (long, detour) = ("x".repeat(255), root.join("no/no/../../mine/../plain"));
    for out in [root.join(&long), detour] {
        Loader::new().reshard(&plan(&m, 1), out, false).unwrap();
    }
    assert_eq!(names(root), ["parent", "plain", &long]);
    refused(root, &m, &root.join("no/../parent"), "output-is-model");
}

/// Each file opens, but a partition has the metadata of both.
#[test]
fn a_header_that_nobody_could_read_is_refused_before_anything_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (m, out) = (folder.path().join("m"), folder.path().join("out"));
    for path in [&m, &out] {
        fs::create_dir(path).unwrap();
    }
    fs::write(out.join("old"), "old").unwrap();
    for name in ["one", "two"] {
        let half = "x".repeat(limits::HEADER_MAX as usize / 2);
        let header = format!(
            r#"{{"__metadata__":{{"{name}":"{half}"}},"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#
        );
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[1]].concat();
        fs::write(m.join(name).with_extension("safetensors"), bytes).unwrap();
    }
    let checkpoint = Checkpoint::open(&m).unwrap();
    let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1).driving(Rank(0))).unwrap();
    let error = Loader::new().reshard(&plan, &out, true).unwrap_err();
    assert_eq!((error.kind(), error.rule()), (ErrorKind::Usage, Some("output-header-too-large")), "{error}");
    let file = out.join("model-rank-0-part-0.safetensors");
    assert_eq!((error.file(), error.at().rank), (Some(&*file), Some(Rank(0))));
    assert_eq!((names(&out), names(folder.path())), (vec!["old".to_owned()], vec!["m".to_owned(), "out".to_owned()]));
}

#[test]
fn aliases_that_are_left_out_are_a_warning() {
    let (folder, m) = folder_with_model();
    let checkpoint = Checkpoint::open(&m).unwrap();
    let first = &checkpoint.tensors()[0].name;
    let plan = |rules| Plan::new(&checkpoint, &rules, &World::host(1)).unwrap();
    let reshard = |rules, out| Loader::new().reshard(&plan(rules), folder.path().join(out), false).unwrap().warnings;
    let warnings = reshard(Rules::replicate_all().alias("head", first), "aliased");
    assert_eq!(warnings, [format!("aliases are not written: head of {first}")]);
    assert!(reshard(Rules::replicate_all(), "plain").is_empty());
}

#[cfg(target_os = "linux")]
#[test]
fn a_mount_point_is_refused_before_anything_moves() {
    let (folder, m) = folder_with_model();
    refused(folder.path(), &m, Path::new("/proc"), "output-is-mount");
}

#[test]
fn the_output_holds_the_model_and_nothing_from_elsewhere() {
    let (folder, m) = folder_with_model();
    let root = folder.path();
    // What processes of the same number left when they were killed.
    let id = std::process::id();
    for stale in [format!(".shardlift-{id}-0.partial"), format!(".shardlift-{id}-0.old")] {
        fs::create_dir(root.join(&stale)).unwrap();
        fs::write(root.join(stale).join("model-rank-7-part-0.safetensors"), "stale").unwrap();
    }
    fs::write(m.join("tokenizer.json"), "[1]").unwrap();
    fs::write(m.join("model.safetensors.index.json.bak"), "no companion").unwrap();
    fs::create_dir(m.join("folder.json")).unwrap();
    symlink(m.join("tokenizer.json"), m.join("vocab.txt")).unwrap();
    let file = m.join("two.safetensors");
    let out = root.join("out");
    for (model, force) in [(&m, false), (&m, true), (&file, true)] {
        Loader::new().reshard(&plan(model, 1), &out, force).unwrap();
        let expected = ["config.json", "model-rank-0-part-0.safetensors", "tokenizer.json", "vocab.txt"];
        assert_eq!(names(&out), expected, "{}", model.display());
        assert_eq!(fs::read_to_string(out.join("vocab.txt")).unwrap(), "[1]");
        assert!(!out.join("vocab.txt").is_symlink());
    }
    // A single file in a folder of other things takes none of them along.
    fs::remove_file(m.join("config.json")).unwrap();
    Loader::new().reshard(&plan(&file, 1), &out, true).unwrap();
    assert_eq!(names(&out), ["model-rank-0-part-0.safetensors"]);
    // What cannot be copied is an error before the weights are.
    symlink("nowhere", m.join("config.json")).unwrap();
    let before = tree(root);
    let error = Loader::new().start_reshard(&plan(&m, 1), root.join("a/b/out"), false).unwrap_err();
    assert_eq!(error.file(), Some(&*m.join("config.json")));
    assert!(tree(root) == before);
}

#[test]
fn until_it_has_its_name_it_can_be_cancelled_or_removed() {
    let (folder, m) = folder_with_model();
    let root = folder.path();
    let tensors = model::write(&m, 22);
    fs::create_dir(root.join("mine")).unwrap();
    let before = tree(root);
    let (plan, out) = (plan(&m, 2), root.join("mine/a/b/out"));
    let landed = || {
        let reshard = Loader::new().start_reshard(&plan, &out, false).unwrap();
        let monitor = reshard.monitor();
        let began = Instant::now();
        while monitor.progress().tensors_done < monitor.progress().tensors_total {
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", monitor.progress());
            std::thread::sleep(Duration::from_millis(1));
        }
        // Its threads end; only syncing and the name are left to do.
        std::thread::sleep(Duration::from_millis(100));
        reshard
    };
    let reshard = landed();
    assert!(names(&root.join("mine/a/b"))[0].ends_with(".partial"));
    reshard.monitor().cancel();
    assert_eq!(reshard.finish().unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(tree(root) == before, "cancelled after the last byte");

    drop(landed());
    assert!(tree(root) == before, "dropped");

    let reshard = landed();
    reshard.partial().remove();
    assert!(tree(root) == before, "removed at once");
    reshard.partial().remove();
    reshard.finish().unwrap_err();
    assert!(tree(root) == before, "removed and then finished");

    let reshard = landed();
    let partial = reshard.partial();
    reshard.finish().unwrap();
    partial.remove();
    assert_eq!(names(&out), ["config.json", "model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"]);
    assert_eq!(names(&root.join("mine/a/b")), ["out"]);
    for rank in 0..2 {
        let bytes = fs::read(out.join(format!("model-rank-{rank}-part-0.safetensors"))).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for tensor in &tensors {
            assert!(read.tensor(&tensor.name).unwrap().data() == model::expected(tensor, rank, 2), "{}", tensor.name);
        }
    }
}

#[cfg(feature = "cli")]
mod command {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::FromRawFd;
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn reshard(model: &Path, out: &Path, ranks: &str, stderr: Stdio) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shardlift"));
        command.arg("reshard").args([model, out]).args(["--rules", "replicate", "--tp", ranks]);
        command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap()
    }

    #[test]
    fn an_interrupt_leaves_nothing_behind() {
        let (folder, m) = folder_with_model();
        let root = folder.path();
        let before = tree(root);
        let mut child = reshard(&m, &root.join("a/b/out"), "48", Stdio::null());
        let began = Instant::now();
        while !fs::read_dir(root.join("a/b")).is_ok_and(|mut entries| entries.next().is_some()) {
            assert!(began.elapsed() < Duration::from_secs(20) && child.try_wait().unwrap().is_none());
        }
        // SAFETY: a signal to a child that was not waited for, so its number is still its own.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        assert_eq!(child.wait().unwrap().code(), Some(143));
        assert!(tree(root) == before);
    }

    #[test]
    fn a_terminal_sees_a_bar() {
        let (folder, m) = folder_with_model();
        let (mut ours, mut theirs) = (0, 0);
        let none = std::ptr::null_mut::<u8>();
        // SAFETY: two places for descriptors, which are owned from here on; name and settings may be null.
        let (mut ours, theirs) = unsafe {
            assert_eq!(libc::openpty(&mut ours, &mut theirs, none.cast(), none.cast(), none.cast()), 0);
            (File::from_raw_fd(ours), File::from_raw_fd(theirs))
        };
        let mut child = reshard(&m, &folder.path().join("out"), "2", theirs.into());
        let mut seen = Vec::new();
        // Linux ends the last reader of a terminal with an error.
        let _ = ours.read_to_end(&mut seen);
        assert!(child.wait().unwrap().success());
        let seen = String::from_utf8_lossy(&seen);
        assert!(seen.contains("B/21.57 MB"), "{seen:?}");
    }
}
