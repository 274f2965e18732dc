//! How soon a cancel ends a load. Alone in its process: what it asserts is a time.

#[path = "support/model.rs"]
#[expect(dead_code, reason = "only the model is needed, not what its ranks hold")]
mod model;
#[path = "support/worlds.rs"]
mod worlds;

use std::time::{Duration, Instant};

use shardlift::{Checkpoint, ErrorKind, Loader, Rules};

#[test]
fn a_cancel_from_another_thread_ends_the_load_soon() {
    let folder = tempfile::tempdir().unwrap();
    model::write(folder.path(), 5);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let loader = Loader::new().throttle(Some(20 << 20));
    for world in worlds::of(2) {
        let plan = loader.plan(&checkpoint, &Rules::from_toml(model::RULES).unwrap(), &world).unwrap();
        let load = loader.start(&plan).unwrap();
        let monitor = load.monitor();
        let canceller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            monitor.cancel();
            Instant::now()
        });
        let error = load.finish().unwrap_err();
        let cancelled = canceller.join().unwrap();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(cancelled.elapsed() < Duration::from_millis(200), "{:?}", cancelled.elapsed());
    }
}
