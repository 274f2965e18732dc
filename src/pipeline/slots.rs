//! Slots in the memory of a GPU, for engines that read there.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Device;
use crate::device::{Allocation, Pinned, Pinner};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::read::Registrar;
use crate::stage::Ring;

/// Makes slots on a device, and makes them known to what reads into them.
#[derive(Debug)]
pub(crate) struct SlotMaker {
    device: Arc<dyn Device>,
    registrar: Arc<dyn Registrar>,
}

impl SlotMaker {
    pub(crate) fn new(device: Arc<dyn Device>, registrar: Arc<dyn Registrar>) -> SlotMaker {
        SlotMaker { device, registrar }
    }

    /// Makes the first slot of a ring, unless there is one: what refuses that refuses all. Waits for as long as this while
    /// somebody else makes it.
    ///
    /// # Errors
    /// What refused it, or [`ErrorKind::Stalled`].
    pub(crate) fn try_out(&self, ring: &Ring, bound: Duration) -> Result<()> {
        let until = Instant::now() + bound;
        // So that no other load of the loader gives it back at once.
        let _hold = ring.hold();
        while ring.grow(self, 1, || Instant::now() >= until)? {}
        if ring.pinned_bytes() == 0 {
            return Err(Error::new(ErrorKind::Stalled, format!("no slot was registered for {bound:?}")));
        }
        Ok(())
    }
}

impl Pinner for SlotMaker {
    unsafe fn pin(&self, _: *mut u8, _: usize) -> Result<Pinned> {
        Err(Error::new(ErrorKind::Unsupported, "slots are made on the device"))
    }

    fn make(&self, bytes: usize) -> Result<(u64, Pinned)> {
        let memory = self.device.slot(bytes)?;
        let address = memory.address();
        if !address.is_multiple_of(limits::DIRECT_ALIGNMENT) {
            // What is read there would pass through buffers of the library's own.
            let message = format!("{} has memory for slots that no block starts on", self.device.name());
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let _current = self.device.current()?;
        let registered = self.registrar.register(address, bytes);
        let named = |error: Error| Error::new(error.kind(), format!("{}: {}", self.device.name(), error.message()));
        let registered = Some(registered.map_err(named)?);
        Ok((address, Box::new(MadeSlot { registered, _memory: memory, device: Arc::clone(&self.device) })))
    }

    fn numa_node(&self) -> Option<u32> {
        None
    }
}

/// The memory of such a slot.
#[derive(Debug)]
struct MadeSlot {
    registered: Option<Box<dyn Any + Send + Sync>>,
    _memory: Allocation,
    device: Arc<dyn Device>,
}

impl Drop for MadeSlot {
    fn drop(&mut self) {
        // Where the device is lost: without its context it is tried all the same.
        let _current = self.device.current().inspect_err(|error| tracing::warn!("{error}"));
        self.registered = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::device::{Feed, Queue};

    /// A device whose memory starts so many bytes behind the start of a block.
    #[derive(Debug)]
    struct Crooked(usize);

    impl Device for Crooked {
        fn name(&self) -> String {
            "crooked".into()
        }

        fn queue(&self, _: Feed) -> Result<Option<Box<dyn Queue>>> {
            unreachable!("nothing is copied")
        }

        fn block(&self, _: usize) -> Result<Allocation> {
            unreachable!("no destinations")
        }

        fn tensor(&self, _: usize, _: usize) -> Result<Allocation> {
            unreachable!("no destinations")
        }

        unsafe fn lent(&self, _: *mut u8, _: Arc<dyn Any + Send + Sync>) -> Allocation {
            unreachable!("no destinations")
        }

        fn slot(&self, _: usize) -> Result<Allocation> {
            let address = std::ptr::without_provenance_mut(limits::DIRECT_ALIGNMENT as usize + self.0);
            // SAFETY: nothing is read from it, or written to it.
            Ok(unsafe { Allocation::lent(address, Arc::new(())) })
        }
    }

    #[derive(Debug, Default)]
    struct Counting(AtomicUsize);

    impl Registrar for Counting {
        fn register(&self, _: u64, _: usize) -> Result<Box<dyn Any + Send + Sync>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Box::new(()))
        }
    }

    #[test]
    fn only_memory_that_a_block_starts_on_is_registered() {
        for (behind, registered) in [(0, 1), (512, 0), (1, 0)] {
            let registrar = Arc::new(Counting::default());
            let maker = SlotMaker::new(Arc::new(Crooked(behind)), Arc::clone(&registrar) as Arc<dyn Registrar>);
            let ring = Ring::on_device(1 << 20, 1 << 20);
            let outcome = maker.try_out(&ring, Duration::from_secs(1));
            assert_eq!(registrar.0.load(Ordering::Relaxed), registered, "{behind}");
            assert_eq!(ring.pinned_bytes(), (registered << 20) as u64);
            match registered {
                1 => outcome.unwrap(),
                _ => {
                    let error = outcome.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                    assert_eq!(error.message(), "crooked has memory for slots that no block starts on");
                }
            }
        }
    }
}
