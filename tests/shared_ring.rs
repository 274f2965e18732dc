//! Loads that run at the same time share the slots of their loader: one that keeps its slots for long leaves another its
//! part. Alone in its process: what it holds is how far one is when the other one ends.

#[path = "support/worlds.rs"]
mod worlds;

use std::any::Any;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use safetensors::tensor::{Dtype, TensorView};
use shardlift::read::{Engine, Next, Pread, Request, Work};
use shardlift::{Checkpoint, Loader, Plan, Result, Rules};

const MIB: usize = 1 << 20;

/// Plain reads on more threads than there are slots; one of this file, which has that size, keeps its slot for a while.
#[derive(Debug)]
struct Uneven {
    slow: u64,
}

/// Work whose slow reads take their time.
struct Slowed<'a>(&'a dyn Work, u64);

// SAFETY: the plain engine answers for it.
unsafe impl Engine for Uneven {
    fn name(&self) -> &'static str {
        "uneven"
    }
    fn threads(&self) -> usize {
        8
    }
    fn run(&self, work: &dyn Work) -> Result<()> {
        Pread::new(1).run(&Slowed(work, self.slow))
    }
}

impl Work for Slowed<'_> {
    fn next(&self, may_wait: bool) -> Next {
        self.0.next(may_wait)
    }
    fn stopped(&self) -> bool {
        self.0.stopped()
    }
    fn done(&self, request: Request, outcome: io::Result<usize>) {
        if request.file().identity().size == self.1 {
            thread::sleep(Duration::from_millis(50));
        }
        self.0.done(request, outcome);
    }
    unsafe fn lent(&self, request: Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>) {
        // SAFETY: the same duties.
        unsafe { self.0.lent(request, mapping, keep) }
    }
}

fn write(folder: &Path, name: &str, tensors: usize) -> Checkpoint {
    let bytes = vec![7; MIB];
    let view = || TensorView::new(Dtype::U8, vec![MIB / 4, 4], &bytes).unwrap();
    let path = folder.join(name);
    safetensors::serialize_to_file((0..tensors).map(|at| (format!("{at}.columns"), view())), None, &path).unwrap();
    Checkpoint::open(&path).unwrap()
}

#[test]
fn a_load_that_keeps_its_slots_leaves_another_its_part() {
    let folder = tempfile::tempdir().unwrap();
    let [slow, quick] = [("slow", 40), ("quick", 32)].map(|(name, tensors)| write(folder.path(), name, tensors));
    let rules = Rules::from_toml("rule = [{ match = \"**\", shard = { dim = 1 } }]").unwrap();
    for world in worlds::of(2) {
        let [slow, quick] = [&slow, &quick].map(|model| Plan::new(model, &rules, &world).unwrap());
        let engine = Uneven { slow: slow.checkpoint().files()[0].identity.size };
        let loader = Loader::new().staging(4 * MIB).custom_engine(Arc::new(engine));
        // All slots are there.
        loader.load(&quick).unwrap();
        let load = loader.start(&slow).unwrap();
        let monitor = load.monitor();
        while monitor.progress().bytes_done == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        let before = monitor.progress().bytes_done;
        loader.load(&quick).unwrap();
        let meanwhile = monitor.progress().bytes_done - before;
        // Slot for slot it would be as many bytes as the other load has.
        let share = meanwhile as f64 / quick.storage_bytes() as f64;
        assert!(share < 0.9, "{:?}: {share}", world.device(shardlift::Rank(0)));
        // And it has its part while others come and go.
        loader.load(&quick).unwrap();
        load.finish().unwrap().0.check().unwrap();
    }
}
