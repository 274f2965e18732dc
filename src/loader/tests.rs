use std::any::Any;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::pipeline::{Allocation, Feed, Home, HostDevice, Op, Queue};

/// A device whose driver never comes back from submitting, or else from being asked what is done.
#[derive(Debug)]
struct Gone {
    when_asked: bool,
}

impl Device for Gone {
    fn name(&self) -> String {
        "gone".into()
    }

    fn queue(&self, _: Feed) -> Result<Option<Box<dyn Queue>>> {
        Ok(Some(Box::new(GoneQueue { when_asked: self.when_asked })))
    }

    fn block(&self, bytes: usize) -> Result<Allocation> {
        HostDevice.block(bytes)
    }

    fn tensor(&self, bytes: usize, alignment: usize) -> Result<Allocation> {
        HostDevice.tensor(bytes, alignment)
    }

    unsafe fn lent(&self, address: *mut u8, keep: Arc<dyn Any + Send + Sync>) -> Allocation {
        // SAFETY: the same duties.
        unsafe { HostDevice.lent(address, keep) }
    }
}

struct GoneQueue {
    when_asked: bool,
}

impl GoneQueue {
    fn never(&self) -> u64 {
        loop {
            thread::park();
        }
    }
}

impl Queue for GoneQueue {
    unsafe fn submit(&mut self, _: Vec<Op>, _: Home) -> Result<u64> {
        Ok(if self.when_asked { 1 } else { self.never() })
    }

    fn finished(&mut self) -> Result<u64> {
        Ok(if self.when_asked { self.never() } else { 0 })
    }

    fn settle(&mut self, _: Duration) -> bool {
        false
    }
}

#[test]
fn a_driver_that_does_not_come_back_ends_the_load() {
    [false, true].into_iter().for_each(ends_with);
}

fn ends_with(when_asked: bool) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes = vec![1; 1 << 20];
    let view = TensorView::new(Dtype::U8, vec![1 << 20], &bytes).unwrap();
    safetensors::serialize_to_file([("a", view)], None, &path).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let plan = Plan::new(&checkpoint, &Rules::replicate_all(), &World::host(1)).unwrap();
    let bound = Duration::from_millis(100);
    let loader = Loader::new().stall(bound / 2, bound);
    let devices: Vec<Arc<dyn Device>> = vec![Arc::new(Gone { when_asked })];
    let destinations =
        Destinations::in_blocks(&plan, &devices, feed(&plan, limits::SLOT, 0, None), &Default::default()).unwrap();
    let chosen = loader.choose_engine(&plan, &devices).unwrap();
    let prepared = chosen.prepare(&plan, &devices).unwrap();
    let setup = loader.setup(&tracing::Span::none(), &plan, destinations, devices, chosen);
    let mut running = Running::start(setup, prepared).unwrap();
    let began = Instant::now();
    let monitor = Monitor::new(running.job());
    let error = running.finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stalled);
    assert!(began.elapsed() < bound * 20, "{:?}", began.elapsed());
    // What the driver may still use is kept, and counted.
    assert!(monitor.progress().abandoned_bytes >= 1 << 20, "{:?}", monitor.progress());
}
