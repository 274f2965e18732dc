//! What a GPU is asked for besides a load's copies: memory of its pool, digests, and bytes that come back. All of it passes
//! one stream of the context, and each wait for that has a bound: a device that hangs does not answer whoever waits
//! inside the driver.

use std::thread;
use std::time::{Duration, Instant};

use super::context::{Context, stay};
use super::driver::{self, RawStream, Status};
use crate::device::Pages;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;

/// Where bytes of a device come back to.
#[derive(Debug)]
pub(super) struct Returns {
    /// Pinned: a copy to other memory waits inside the driver.
    pages: Pages,
    /// An address of the device, where a sum is made.
    sum: u64,
}

impl Returns {
    /// Pages and a sum of their own.
    pub(super) fn new(context: &Context) -> Result<Returns> {
        let mut pages = Pages::new(limits::RETURN_BYTES)?;
        pages.populate(None);
        // SAFETY: the context is current; the pages are as long and stay until they are given back.
        context.with(|| unsafe { driver::register(pages.address(), limits::RETURN_BYTES, false) })?;
        // SAFETY: the context is current.
        match context.with(|| unsafe { driver::allocate(size_of::<u64>()) }) {
            Ok(sum) => Ok(Returns { pages, sum }),
            Err(error) => {
                // SAFETY: registered above, and nobody copies there.
                context.give_back(|| unsafe { driver::unregister(pages.address()) });
                Err(error)
            }
        }
    }

    /// Gives them back; nothing that uses them is under way.
    pub(super) fn give_back(self, context: &Context) {
        // SAFETY: registered and allocated in `new`; the caller answers for the rest.
        context.give_back(|| unsafe { driver::unregister(self.pages.address()) });
        // SAFETY: as above.
        context.give_back(|| unsafe { driver::free(self.sum) });
    }
}

impl Context {
    /// Queues calls on the context's own stream, and waits until nothing is under way there.
    ///
    /// # Errors
    /// [`ErrorKind::Stalled`] if something still is after the bound: then what it may use has to stay for ever, this context
    /// too. Otherwise nothing is, whatever failed.
    pub(super) fn serve(&self, calls: impl FnOnce(RawStream) -> Status<()>) -> Result<()> {
        let _stay = stay();
        let stream = self.service()?;
        let queued = self.with(|| calls(stream));
        let Some(ended) = self.settle(stream, self.stall()) else {
            let message =
                format!("cuda:{} did not end what it was asked for within {:?}", self.ordinal(), self.stall());
            return Err(Error::new(ErrorKind::Stalled, message));
        };
        queued.and(ended)
    }

    /// Waits until nothing of a stream is under way any more, failed work included, for at most `bound`; `None` if
    /// something still is. A stream that only answers with errors is lost, and with it what was queued. Tells the first
    /// answer that was an error.
    pub(super) fn settle(&self, stream: RawStream, bound: Duration) -> Option<Result<()>> {
        let _stay = stay();
        let began = Instant::now();
        let mut refused: Option<(Instant, Error)> = None;
        let mut asked = 0;
        loop {
            // SAFETY: the stream is live, the context current.
            match self.with(|| unsafe { driver::stream_is_done(stream) }) {
                Ok(true) => break,
                Ok(false) if began.elapsed() >= bound => return None,
                Ok(false) => {}
                Err(error) => {
                    let (since, _) = refused.get_or_insert((Instant::now(), error));
                    if since.elapsed() >= limits::LOST_DEVICE {
                        break;
                    }
                }
            }
            // What is short is over before a sleep would be.
            asked += 1;
            if asked > limits::ASK_AT_ONCE {
                thread::sleep(limits::EVENT_POLL);
            }
        }
        Some(refused.map_or(Ok(()), |(_, error)| Err(error)))
    }

    /// Copies bytes at `address` of the device to host memory.
    ///
    /// # Errors
    /// As [`serve`](Context::serve).
    ///
    /// # Safety
    /// All of `address..address + into.len()` is readable memory of the device that nobody writes meanwhile, and
    /// for ever if this stalls.
    pub(super) unsafe fn read(&self, address: u64, into: &mut [u8]) -> Result<()> {
        self.with_returns(|Returns { pages, .. }| {
            let mut from = address;
            for part in into.chunks_mut(limits::RETURN_BYTES) {
                // SAFETY: the caller's duties; a part fits the pages, which nobody else uses while they are borrowed, and
                // which are complete when nothing is under way.
                unsafe {
                    self.serve(|stream| driver::copy_to_host(pages.address(), from, part.len(), stream))?;
                    std::ptr::copy_nonoverlapping(pages.address(), part.as_mut_ptr(), part.len());
                }
                from += part.len() as u64;
            }
            Ok(())
        })
    }

    /// What calls make of a sum that is 0 before.
    ///
    /// # Errors
    /// As [`serve`](Context::serve).
    ///
    /// # Safety
    /// The calls, which get the sum's address, queue nothing on other streams than the one that they get.
    pub(super) unsafe fn sum(&self, calls: impl FnOnce(u64, RawStream) -> Status<()>) -> Result<u64> {
        self.with_returns(|Returns { pages, sum }| {
            let mut word = [0; size_of::<u64>()];
            // SAFETY: the word of the device and the pages are long enough and used by nobody else while they are borrowed; they
            // are complete when nothing is under way.
            unsafe {
                self.serve(|stream| {
                    driver::fill(*sum, 0, word.len(), stream)?;
                    calls(*sum, stream)?;
                    driver::copy_to_host(pages.address(), *sum, word.len(), stream)
                })?;
                std::ptr::copy_nonoverlapping(pages.address(), word.as_mut_ptr(), word.len());
            }
            Ok(u64::from_le_bytes(word))
        })
    }
}
