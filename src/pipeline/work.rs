//! The one loop above all engines: hands out requests, continues short reads, and sends what arrived on its way.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Job;
use crate::copy::{Filled, Landed, Landing};
use crate::device::{RawCopy, copy_now};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, Rank};
use crate::limits;
use crate::plan::{Piece, ReadOp};
use crate::read::{Next, Pending, Request, Work};
use crate::stage::Slot;
use crate::sync::lock;

impl Work for Job {
    fn next(&self, may_wait: bool) -> Next {
        let asked = Instant::now();
        loop {
            if self.is_stopped() {
                return Next::Finished;
            }
            if let Some(request) = lock(&self.again).pop_front() {
                // Aligned requests reach beyond the bytes that are needed; errors name those.
                let needed = request.pending.op.extent;
                let left = Extent { start: needed.start.max(request.offset), ..needed };
                self.begin(request.id, left, request.bytes, request.slot.is_some(), request.pending.since);
                return Next::Request(request);
            }
            match self.take() {
                Ok(Taken::Request(request)) => return Next::Request(request),
                Ok(Taken::Nothing) => return Next::Finished,
                Ok(Taken::Skipped) => {}
                Ok(Taken::NoSlot) if !may_wait => return Next::Later,
                Ok(Taken::NoSlot) if asked.elapsed() > self.setup.stall_error => {
                    self.fail(Error::new(
                        ErrorKind::Stalled,
                        format!("no staging slot became free for {:?}", self.setup.stall_error),
                    ));
                    return Next::Finished;
                }
                Ok(Taken::NoSlot) => {
                    let began = Instant::now();
                    self.setup.ring.wait(limits::LOOK_AGAIN);
                    self.counters.read_waiting(began.elapsed());
                }
                Err(error) => {
                    self.fail(error);
                    return Next::Finished;
                }
            }
        }
    }

    fn stopped(&self) -> bool {
        self.is_stopped()
    }

    fn done(&self, mut request: Request, outcome: io::Result<usize>) {
        let entry = lock(&self.in_flight).remove(&request.id);
        if let Some(entry) = entry {
            self.counters.read_busy(entry.since.elapsed());
            self.counters.storage_bytes.fetch_add(entry.bytes, Ordering::Relaxed);
            self.counters.reads.fetch_add(1, Ordering::Relaxed);
        }
        let extent = request.pending.op.extent;
        let failed = match outcome {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                lock(&self.again).push_back(request);
                return;
            }
            Err(error) => Some(Error::new(ErrorKind::Io, format!("read failed: {error}")).with_source(error)),
            Ok(bytes) if bytes > request.bytes => Some(Error::new(
                ErrorKind::Io,
                format!("engine {} reports {bytes} bytes in a buffer of {}", self.setup.engine.name(), request.bytes),
            )),
            Ok(0) => Some(
                Error::new(ErrorKind::Truncated, "file ended early")
                    .with_expected(format!("{} bytes", extent.end), format!("{} bytes", request.offset)),
            ),
            Ok(bytes) if request.offset + (bytes as u64) < extent.end => {
                // A short read: the rest is a request of its own. It starts on the engine's alignment again.
                let bytes = bytes - bytes % self.alignment as usize;
                // Less than one aligned block may be a short read, or all that the file has: a second time it is that.
                if bytes > 0 || !request.pending.repeated {
                    request.pending.repeated = bytes == 0;
                    request.pending.since = Instant::now();
                    request.offset += bytes as u64;
                    request.address = request.address.wrapping_add(bytes);
                    request.bytes -= bytes;
                    lock(&self.again).push_back(request);
                    return;
                }
                Some(Error::new(ErrorKind::Truncated, "file ended early"))
            }
            Ok(_) => self.arrived(request).err(),
        };
        if let Some(error) = failed {
            self.fail(self.locate(error, extent));
        }
    }
}

enum Taken {
    Request(Request),
    /// A read that nobody here wants.
    Skipped,
    NoSlot,
    Nothing,
}

impl Job {
    fn take(&self) -> Result<Taken> {
        let (op, slot) = {
            let mut cursor = lock(&self.cursor);
            let Some((op, behind)) = self.reads.next(&cursor) else { return Ok(Taken::Nothing) };
            let slot = if op.direct {
                None
            } else {
                match self.setup.ring.try_lend()? {
                    Some(slot) => Some(slot),
                    None => return Ok(Taken::NoSlot),
                }
            };
            *cursor = behind;
            (op, slot)
        };
        let base = op.extent.start - op.extent.start % self.alignment;
        let bytes = (op.extent.end.next_multiple_of(self.alignment) - base) as usize;
        assert!(
            slot.is_none() || bytes <= self.setup.ring.slot_bytes(),
            "bug in shardlift: a read larger than its slot"
        );
        let mut pieces = Vec::new();
        let address = match &slot {
            Some(slot) => slot.address(),
            None => {
                self.reads.pieces(&op, &mut pieces);
                pieces.retain(|piece| self.setup.destinations.waits(piece.rank, piece.dest));
                match pieces.first() {
                    Some(piece) => std::ptr::with_exposed_provenance_mut(self.address(piece) as usize),
                    None => return Ok(Taken::Skipped),
                }
            }
        };
        let id = self.request_id();
        // Before the file is opened: that may take for ever too.
        let since = Instant::now();
        self.begin(id, op.extent, bytes, slot.is_some(), since);
        let file = match self.files.get(op.extent.file) {
            Ok(file) => file,
            Err(error) => {
                lock(&self.in_flight).remove(&id);
                return Err(self.locate(error, op.extent));
            }
        };
        let pending = Pending { base, op, pieces, repeated: false, since };
        Ok(Taken::Request(Request { id, file, offset: base, address, bytes, slot, pending }))
    }

    /// All bytes of a read are in its buffer: sends them on to every destination.
    fn arrived(&self, request: Request) -> Result<()> {
        let Request { slot, pending: Pending { op, base, pieces, .. }, .. } = request;
        match slot {
            None => {
                self.fan_out(&pieces);
                Ok(())
            }
            Some(slot) => self.land(&op, base, slot),
        }
    }

    /// The bytes lie in the first piece's destination: copies them to the other ones.
    fn fan_out(&self, pieces: &[Piece]) {
        let (first, others) = pieces.split_first().expect("bug in shardlift: a direct read without destination");
        let began = Instant::now();
        let src: *const u8 = std::ptr::with_exposed_provenance(self.address(first) as usize);
        for piece in others {
            // SAFETY: the source was just written by this read and nobody writes it again; the audit proved that no
            // other copy names the destination bytes; the job keeps both alive.
            unsafe { copy_now(&self.raw_copy(piece, src)) };
        }
        self.spent(began.elapsed(), Duration::ZERO);
        pieces.iter().for_each(|piece| self.landed(landing(piece)));
    }

    /// The bytes lie in a slot: copies them at once, or hands them to the queues of the ranks' devices.
    fn land(&self, op: &ReadOp, base: u64, slot: Slot) -> Result<()> {
        let staged = slot.stage();
        let src = staged.address().wrapping_add((op.extent.start - base) as usize);
        let mut pieces = Vec::new();
        self.reads.pieces(op, &mut pieces);
        pieces.retain(|piece| self.setup.destinations.waits(piece.rank, piece.dest));
        let began = Instant::now();
        pieces.sort_by_key(|piece| piece.rank);
        for of_rank in pieces.chunk_by(|a, b| a.rank == b.rank) {
            let rank = of_rank[0].rank;
            let Some(inbox) = &self.inboxes[rank.index()] else {
                for piece in of_rank {
                    // SAFETY: the slot is staged, so nobody writes it; the audit proved that no other copy names the
                    // destination bytes; the job keeps them alive.
                    unsafe { copy_now(&self.raw_copy(piece, src)) };
                    self.landed(landing(piece));
                }
                continue;
            };
            let filled = Filled {
                staged: staged.clone(),
                copies: of_rank.iter().map(|piece| self.raw_copy(piece, src)).collect(),
                landing: of_rank.iter().map(landing).collect(),
            };
            let sent = lock(inbox).as_ref().is_some_and(|inbox| inbox.send(filled).is_ok());
            if !sent && !self.is_stopped() {
                return Err(Error::new(ErrorKind::Device, "the copier is gone").with_rank(rank));
            }
        }
        self.spent(began.elapsed(), Duration::ZERO);
        Ok(())
    }

    fn raw_copy(&self, piece: &Piece, src: *const u8) -> RawCopy {
        RawCopy {
            src: src.wrapping_add(piece.src as usize),
            dst: self.address(piece),
            loops: piece.loops.clone(),
            run: piece.run,
            cast: piece.cast,
        }
    }

    /// The address of a piece's first destination byte.
    fn address(&self, piece: &Piece) -> u64 {
        self.place_address(piece.rank, piece.dest) + piece.dst
    }

    fn place_address(&self, rank: Rank, dest: u32) -> u64 {
        self.setup.destinations.place(rank, dest).expect("bug in shardlift: a piece for another process").address
    }
}

fn landing(piece: &Piece) -> Landing {
    Landing { rank: piece.rank, dest: piece.dest, bytes: piece.landed_bytes() }
}
