//! A load from async code: a thread that may block has it, and the runtime's own goes on. Alone in its process: what it holds
//! is a time.

use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView};
use shardlift::{Checkpoint, ErrorKind, Loader, Monitor, Plan, Rank, Result, Rules, World};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

/// Cancels its load unless it was told that the load is over: a future that is dropped ends nothing on a thread.
struct Cancels(Monitor);

impl Drop for Cancels {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

fn plan() -> (tempfile::TempDir, Plan) {
    let folder = tempfile::tempdir().unwrap();
    let bytes = vec![3; 1 << 20];
    let view = || TensorView::new(Dtype::U8, vec![1 << 10, 1 << 10], &bytes).unwrap();
    let tensors = (0..16).map(|at| (format!("layers.{at:02}"), view()));
    safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1)).unwrap();
    (folder, plan)
}

#[test]
fn the_timers_of_a_runtime_of_one_thread_go_on_beside_a_load() {
    let (_folder, plan) = plan();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let (tell, mut told) = mpsc::unbounded_channel();
        let (watch, watched) = tokio::sync::oneshot::channel();
        // Half a second of reading.
        let load = spawn_blocking(move || -> Result<_> {
            let mut load = Loader::new().throttle(Some(32 << 20)).start(&plan)?;
            watch.send(load.monitor()).ok();
            for tensor in &mut load {
                tell.send(tensor?).ok();
            }
            load.finish()
        });
        let monitor = watched.await.unwrap();
        let (mut ticks, mut longest, mut landed) = (0, Duration::ZERO, 0);
        while !load.is_finished() {
            let began = Instant::now();
            sleep(Duration::from_millis(2)).await;
            longest = longest.max(began.elapsed());
            ticks += 1;
            let progress = monitor.progress();
            while let Ok(tensor) = told.try_recv() {
                landed += tensor.nbytes();
            }
            assert!(landed as u64 <= progress.bytes_total);
        }
        let (weights, report) = load.await.unwrap().unwrap();
        assert!(ticks > 20 && longest < Duration::from_millis(250), "{ticks} ticks, one of {longest:?}");
        assert!(report.seconds > 0.3 && landed > 0);
        assert_eq!(weights.tensor(Rank(0), "layers.15").unwrap().nbytes(), 1 << 20);
    });
}

#[test]
fn a_request_that_is_dropped_cancels_its_load() {
    let (_folder, plan) = plan();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let (tell, told) = std::sync::mpsc::channel();
        let request = async {
            // A load starts within the system's time for its memory and threads; this would take half a minute.
            let load = Loader::new().throttle(Some(1 << 19)).start(&plan).unwrap();
            let _cancels = Cancels(load.monitor());
            spawn_blocking(move || tell.send(load.finish().map(drop))).await.unwrap()
        };
        assert!(timeout(Duration::from_millis(50), request).await.is_err());
        let outcome = spawn_blocking(move || told.recv()).await.unwrap().unwrap();
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Cancelled);
    });
}
