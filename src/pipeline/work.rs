//! The one loop above all engines: hands out requests, continues short reads, and sends what arrived on its way.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::digests::Last;
use super::windows::Permit;
use super::{Job, traced};
use crate::copy::{Filled, Landed, Landing, Part, Traced, costs, lower};
use crate::device::{Op, RawCopy, copy_now, copy_to_look_at};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::limits;
use crate::observe::{Event, Kind};
use crate::place::Place;
use crate::plan::{Piece, ReadOp};
use crate::read::{Next, Pending, Request, Work};
use crate::source::{Mapping, SourceFile};
use crate::stage::{Home, Slot, Staged};
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
                let times = [request.pending.since, Instant::now()];
                self.begin(request.id, left, request.bytes, request.slot.is_some(), times);
                return Next::Request(request);
            }
            match self.take() {
                Ok(Taken::Request(request)) => return Next::Request(request),
                Ok(Taken::Nothing) => return Next::Finished,
                Ok(Taken::Skipped) => {}
                Ok(Taken::NoSlot) if !may_wait => return Next::Later,
                Ok(Taken::NoSlot) if asked.elapsed() > self.patience(self.setup.stall_error) => {
                    let whose = match self.setup.ring.is_retired() {
                        true => ": another load of the loader stalled, and keeps what it had",
                        false => "",
                    };
                    let message = format!("no staging slot became free for {:?}{whose}", asked.elapsed());
                    self.fail(self.locate_next(Error::new(ErrorKind::Stalled, message)));
                    return Next::Finished;
                }
                Ok(Taken::NoSlot) => {
                    let began = Instant::now();
                    self.copies.hurry();
                    match &self.windows {
                        Some(windows) => windows.wait(limits::LOOK_AGAIN),
                        None => self.hold.wait(self.lend(), limits::LOOK_AGAIN, || self.is_stopped()),
                    }
                    let ended = Instant::now();
                    self.counters.read_waiting(ended - began);
                    if let Some(trace) = self.trace() {
                        trace.span(Event::of(Kind::WaitForSlot), began, ended);
                    }
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

    unsafe fn lent(&self, request: Request, mapping: *const u8, keep: Arc<dyn Any + Send + Sync>) {
        let Request { id, file, permit, mut pending, .. } = request;
        let began = self.trace().map(|trace| (trace, Instant::now()));
        // SAFETY: the same duties.
        let staged = unsafe { self.lease(&pending.op, &file, permit, mapping, keep) };
        if let Some((trace, began)) = began {
            trace.since(Event::of(Kind::Pin), began);
        }
        self.count_read(id, 0);
        match staged {
            Ok(staged) => {
                self.land(id, pending.op.extent.start, &mut pending, staged, false);
                self.keep_spare(pending);
            }
            Err(error) => self.fail(self.locate(error, pending.op.extent)),
        }
    }

    fn done(&self, mut request: Request, outcome: io::Result<usize>) {
        self.count_read(request.id, if self.trace().is_some() { traced::landed_by(&request, &outcome) } else { 0 });
        let extent = request.pending.op.extent;
        let failed = match outcome {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                lock(&self.again).push_back(request);
                return;
            }
            Err(error) if self.repeats(&request) => self.read_through_host(request, &error.to_string()).err(),
            Err(error) => {
                let into = request.device_buffer().map(|_| format!(" into {}", self.devices[0].0.name()));
                let message = format!("read{} failed: {error}", into.unwrap_or_default());
                Some(Error::new(ErrorKind::Io, message).with_source(error))
            }
            Ok(bytes) if bytes > request.bytes => Some(Error::new(
                ErrorKind::Io,
                format!("engine {} reports {bytes} bytes in a buffer of {}", self.setup.engine.name(), request.bytes),
            )),
            // The file has these bytes, or else that read says so.
            Ok(0) if self.repeats(&request) => self.read_through_host(request, "nothing came").err(),
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
                match self.repeats(&request) {
                    true => self.read_through_host(request, "less than a block came").err(),
                    false => Some(Error::new(ErrorKind::Truncated, "file ended early")),
                }
            }
            Ok(_) => {
                self.arrived(request);
                None
            }
        };
        if let Some(error) = failed {
            self.fail(self.locate(error, extent));
        }
    }
}

thread_local! {
    /// The device that this thread submitted to last.
    static LAST_DEVICE: Cell<usize> = const { Cell::new(usize::MAX) };
}

enum Taken {
    Request(Request),
    /// A read that nobody here wants.
    Skipped,
    NoSlot,
    Nothing,
}

/// Where the bytes of a read go.
enum Room {
    Destination,
    Slot(Slot),
    /// Nowhere: they are lent from a mapping.
    Lent(Permit),
}

impl Job {
    fn take(&self) -> Result<Taken> {
        let (op, room, exchanged) = {
            let mut cursor = lock(&self.cursor);
            let Some((op, behind)) = self.reads.next(&cursor) else { return Ok(Taken::Nothing) };
            let room = match &self.windows {
                Some(windows) => windows.try_permit().map(Room::Lent),
                None if op.direct => Some(Room::Destination),
                None => self.hold.try_lend(self.lend())?.map(Room::Slot),
            };
            let Some(room) = room else { return Ok(Taken::NoSlot) };
            *cursor = behind;
            // In the order of the plan, hence under the lock.
            let exchanged = if op.shared { self.begin_exchanged() } else { None };
            (op, room, exchanged)
        };
        let base = op.extent.start - op.extent.start % self.alignment;
        let bytes = (op.extent.end.next_multiple_of(self.alignment) - base) as usize;
        let mut spare = lock(&self.spare).pop();
        let mut pieces = spare.as_mut().map_or_else(Vec::new, |spare| std::mem::take(&mut spare.pieces));
        let order = spare.as_mut().map_or_else(Vec::new, |spare| std::mem::take(&mut spare.order));
        let (mut slot, mut permit) = (None, None);
        let address = match room {
            Room::Slot(lent) => {
                assert!(bytes <= self.setup.ring.slot_bytes(), "bug in shardlift: a read larger than its slot");
                slot.insert(lent).address()
            }
            Room::Lent(right) => {
                permit = Some(Box::new(right) as Box<dyn Any + Send>);
                std::ptr::null_mut()
            }
            Room::Destination => {
                self.reads.pieces(&op, &mut pieces);
                pieces.retain(|piece| self.setup.destinations.waits(piece.rank, piece.dest));
                let Some(piece) = pieces.first() else { return Ok(Taken::Skipped) };
                let fits = piece.run == bytes as u64 && piece.loops.is_empty() && piece.cast.is_none();
                assert!(fits, "bug in shardlift: a read that is not as its destination has it");
                std::ptr::with_exposed_provenance_mut(self.address(piece) as usize)
            }
        };
        let id = self.request_id();
        // Before the file is opened: that may take for ever too.
        let since = Instant::now();
        self.begin(id, op.extent, bytes, slot.is_some(), [since, since]);
        let file = match self.files.get(op.extent.file) {
            Ok(file) => file,
            Err(error) => {
                lock(&self.in_flight).remove(&id);
                return Err(self.locate(error, op.extent));
            }
        };
        if let Some(trace) = self.trace() {
            trace.unless_short(traced::of_file(Kind::Open, op.extent.file), since, Instant::now());
        }
        let pending = Pending { base, op, pieces, order, exchanged, repeated: false, since };
        let pending = match spare {
            Some(mut spare) => {
                *spare = pending;
                spare
            }
            None => Box::new(pending),
        };
        Ok(Taken::Request(Request { id, file, offset: base, address, bytes, slot, permit, pending }))
    }

    /// All bytes of a read are in its buffer: sends them on to every destination.
    fn arrived(&self, request: Request) {
        let Request { id, slot, mut pending, .. } = request;
        match slot {
            None => self.fan_out(pending.op.extent, &pending.pieces),
            Some(slot) => self.land(id, pending.base, &mut pending, slot.stage(), true),
        }
        self.keep_spare(pending);
    }

    /// Whether what this request is for is read through memory of the host if the engine fails.
    fn repeats(&self, request: &Request) -> bool {
        self.setup.falls_back && request.device_buffer().is_some()
    }

    /// Reads what a request for a slot on a device is for into memory that is not pinned, because of what the engine said, and
    /// sends it on from there. The slot is kept, so that there are no more of these than of slots.
    fn read_through_host(&self, request: Request, why: &str) -> Result<()> {
        self.counters.warn(format!("read through memory of the host: {why}"));
        let Request { id, file, slot, mut pending, .. } = request;
        let Extent { start, end, .. } = pending.op.extent;
        let count = (end - start) as usize;
        let mut bytes = vec![0u128; count.div_ceil(size_of::<u128>())];
        // SAFETY: the vector is as long, and any bytes are numbers.
        let into = unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<u8>(), count) };
        let now = Instant::now();
        self.begin(id, pending.op.extent, count, true, [now, now]);
        let outcome = file.read_exact_at(into, start);
        self.count_read(id, 0);
        outcome?;
        self.counters.repeated_bytes.fetch_add(count as u64, Ordering::Relaxed);
        // SAFETY: what keeps the bytes is the vector itself, which nobody writes to.
        let staged = unsafe { Staged::lent(bytes.as_ptr().cast(), Arc::new((bytes, slot))) };
        self.land(id, start, &mut pending, staged, false);
        self.keep_spare(pending);
        Ok(())
    }

    /// Keeps what was remembered of a read for another one, which then allocates nothing.
    fn keep_spare(&self, mut pending: Box<Pending>) {
        pending.pieces.clear();
        lock(&self.spare).push(pending);
    }

    /// Pins the window that has a read's bytes, of the mapping of this file; or copies them.
    ///
    /// # Safety
    /// As [`Work::lent`].
    unsafe fn lease(
        &self,
        op: &ReadOp,
        file: &SourceFile,
        permit: Option<Box<dyn Any + Send>>,
        mapping: *const u8,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Staged> {
        let permit = permit.and_then(|permit| permit.downcast::<Permit>().ok());
        let (Some(windows), Some(permit)) = (&self.windows, permit) else {
            return Err(Error::new(ErrorKind::Usage, "engine lends what it was not asked to"));
        };
        let Extent { file: of_file, start, end } = op.extent;
        let size = file.identity().size;
        if end > size {
            return Err(Error::new(ErrorKind::Truncated, "file ended early"));
        }
        let first = mapping.wrapping_add(start as usize);
        let mut permit = *permit;
        if windows.has(start, end) {
            // SAFETY: the same duties.
            match unsafe { windows.lease(permit, of_file, start, mapping, size, Arc::clone(&keep)) } {
                // SAFETY: the lease keeps the mapping, which is readable.
                Ok(lease) => return Ok(unsafe { Staged::lent(first, Arc::new(lease)) }),
                Err((error, unused)) => {
                    self.warn(format!("mapped memory is copied instead of pinned: {error}"));
                    permit = unused;
                }
            }
        }
        // Refused, or an element across two windows: the driver takes them from memory that is not pinned.
        let count = (end - start) as usize;
        let mut bytes = vec![0u128; count.div_ceil(limits::KERNEL_ACCESS)];
        // SAFETY: the range lies in the mapping, whose guard keeps it readable; the vector is as long.
        unsafe { std::ptr::copy_nonoverlapping(first, bytes.as_mut_ptr().cast(), count) };
        // Who lends from a mapping of its own answers for that itself.
        if keep.downcast_ref::<Mapping>().is_some_and(Mapping::broken) {
            return Err(match file.without_page() {
                Ok(()) => Error::new(ErrorKind::Truncated, "file ended early"),
                Err(error) => Error::new(ErrorKind::Io, format!("read failed: {error}")).with_source(error),
            });
        }
        // SAFETY: what keeps the bytes is the vector itself, which nobody writes to; with the permit not too many are kept.
        Ok(unsafe { Staged::lent(bytes.as_ptr().cast(), Arc::new((bytes, permit))) })
    }

    /// Takes a read out of the list of those in flight, and counts it; so many bytes are in their destination with it.
    fn count_read(&self, id: u64, landed: u64) {
        if let Some(read) = lock(&self.in_flight).remove(&id) {
            self.counters.storage_bytes.fetch_add(read.bytes, Ordering::Relaxed);
            self.counters.reads.fetch_add(1, Ordering::Relaxed);
            if let Some(trace) = self.trace() {
                trace.since(traced::read(&read, landed), read.began);
            }
        }
    }

    /// The bytes lie in the first piece's destination: copies them to the other ones.
    fn fan_out(&self, extent: Extent, pieces: &[Piece]) {
        let (first, others) = pieces.split_first().expect("bug in shardlift: a direct read without destination");
        let began = Instant::now();
        let src: *const u8 = std::ptr::with_exposed_provenance(self.address(first) as usize);
        // SAFETY: the source was just written by this read and nobody writes it again; the audit proved that no other copy
        // names the destination bytes; the job keeps both alive.
        unsafe {
            let mut last = self.digest_read(extent, src, pieces);
            self.digest_landed(first, &mut last);
            others.iter().for_each(|piece| self.copy_here(piece, src, &mut last));
        }
        let ended = Instant::now();
        self.counters.copy_busy(ended - began);
        if let Some(trace) = self.trace().filter(|_| !others.is_empty()) {
            trace.span(traced::copied(Kind::Copy, others.iter().map(Piece::landed_bytes).sum()), began, ended);
        }
        pieces.iter().for_each(|piece| self.landed(landing(piece)));
    }

    /// Makes a piece's copy on this thread, of what a read brought to `src`.
    ///
    /// # Safety
    /// - the read's needed bytes lie at `src` and nobody writes them; `last` is of this read;
    /// - nobody else uses the piece's bytes of the destination.
    unsafe fn copy_here(&self, piece: &Piece, src: *const u8, last: &mut Last) {
        let copy = self.raw_copy(piece, src);
        // SAFETY: the same duties.
        unsafe {
            match self.digests {
                None => copy_now(&copy),
                Some(_) => {
                    copy_to_look_at(&copy);
                    self.digest_landed(piece, last);
                }
            }
        }
    }

    /// Digests what a read brought to `src`, if digests are taken.
    ///
    /// # Safety
    /// The bytes of `extent` lie at `src`, and nobody writes them meanwhile.
    unsafe fn digest_read(&self, extent: Extent, src: *const u8, pieces: &[Piece]) -> Last {
        let digests = self.digests.as_ref()?;
        // SAFETY: the same duties.
        unsafe { digests.read(&self.setup.plan, extent, src, pieces) }
    }

    /// Digests what lies where a piece is, if digests are taken.
    ///
    /// # Safety
    /// The piece has landed in memory of the host, and nobody writes it again; `last` is of the same read.
    unsafe fn digest_landed(&self, piece: &Piece, last: &mut Last) {
        if let Some(digests) = &self.digests {
            // SAFETY: the same duties.
            unsafe { digests.landed(&self.setup.plan, piece, self.place(piece).address, last) };
        }
    }

    /// The bytes of a file from `base` on are staged, in memory that may be written if they are `ours`: copies them at
    /// once, or submits them to the queues of their devices. `id` is the read's number.
    fn land(&self, id: u64, base: u64, pending: &mut Pending, staged: Staged, ours: bool) {
        let Pending { op, pieces, order, exchanged, .. } = pending;
        let offset = (op.extent.start - base) as usize;
        let first = staged.address().wrapping_add(offset);
        // Others read from it, too, until it has travelled.
        let ours = ours && exchanged.is_none();
        // What no processor may touch is still a slot of ours.
        let here = ours && staged.home() == Home::Host;
        if let Some(number) = *exchanged {
            self.exchange(number, staged.clone(), op.extent, offset);
        }
        self.reads.pieces(op, pieces);
        pieces.retain(|piece| self.setup.destinations.waits(piece.rank, piece.dest));
        let began = Instant::now();
        let device = |piece: &Piece| self.device_of[piece.rank.index()];
        // Numbers are sorted, the device above the position, rather than pieces: a slot may have thousands of those.
        order.clear();
        order.extend((0..).zip(pieces.iter()).map(|(at, piece): (u64, &Piece)| (device(piece) as u64) << 32 | at));
        order.sort_unstable();
        // Before a device may pack the slot in place. What is lent from a mapping may change.
        // SAFETY: the slot is staged, and nobody else writes it.
        let mut digested = if here { unsafe { self.digest_read(op.extent, first, pieces) } } else { None };
        let device = |order: &u64| (order >> 32) as usize;
        let piece = |order: &u64| &pieces[*order as u32 as usize];
        let mut of_devices: SmallVec<[&[u64]; 8]> = order.chunk_by(|a, b| device(a) == device(b)).collect();
        let shared = of_devices.len() > 1;
        // Where this thread ended it need not change contexts. And that differs from thread to thread: a call of one driver
        // that takes long should not hold up all others.
        let last = of_devices.iter().position(|of_device| device(&of_device[0]) == LAST_DEVICE.get());
        let turn = last.unwrap_or(id as usize % of_devices.len().max(1));
        of_devices.rotate_left(turn);
        let mut waited = Duration::ZERO;
        for of_device in of_devices {
            let device = device(&of_device[0]);
            if self.copies.has_queue(device) {
                LAST_DEVICE.set(device);
                self.begin_copies(id, device, Some(op.extent), ours);
                let pieces = of_device.iter().map(piece);
                // SAFETY: the slot is staged, and if no other device takes from it nobody else has a handle to it yet.
                waited += unsafe { self.submit(device, pieces, first, staged.clone(), here && !shared, shared) };
                self.end_copies(id);
                continue;
            }
            let began = self.trace().map(|trace| (trace, Instant::now()));
            for piece in of_device.iter().map(piece) {
                // SAFETY: the slot is staged, so nobody writes it; the audit proved that no other copy names the
                // destination bytes; the job keeps them alive.
                unsafe { self.copy_here(piece, first, &mut digested) };
                self.landed(landing(piece));
            }
            if let Some((trace, began)) = began {
                trace.since(
                    traced::copied(Kind::Copy, of_device.iter().map(|at| piece(at).landed_bytes()).sum()),
                    began,
                );
            }
        }
        self.counters.copy_busy(began.elapsed().saturating_sub(waited));
        self.counters.copy_waiting(waited);
    }

    /// Submits what a device takes from a slot, whose needed bytes begin at `first` and which may be `shared` with other
    /// devices; how long others had its queue.
    ///
    /// # Safety
    /// If `writable`, the slot is written by nobody else.
    unsafe fn submit<'a>(
        &self,
        device: usize,
        pieces: impl ExactSizeIterator<Item = &'a Piece> + Clone,
        first: *const u8,
        staged: Staged,
        writable: bool,
        shared: bool,
    ) -> Duration {
        if self.is_stopped() {
            return Duration::ZERO;
        }
        let ops = if self.devices[device].0.copies_any() {
            pieces.clone().map(|piece| Op::Copy(self.raw_copy(piece, first))).collect()
        } else {
            let part = |piece| Part { copy: self.raw_copy(piece, first), allocation: self.place(piece).allocation() };
            // SAFETY: the same duty.
            unsafe { lower(pieces.clone().map(part).collect(), writable, costs(staged.home())) }
        };
        let landing = pieces.map(landing).collect();
        self.hand_over(device, Filled { staged, ops, landing, shared, traced: None })
    }

    /// Submits operations to a device's queue; how long others had it.
    pub(super) fn hand_over(&self, device: usize, mut filled: Filled) -> Duration {
        let Some(trace) = self.trace() else { return self.copies.submit(device, filled, self) };
        let event = |kind| traced::of_device(kind, device, traced::bytes_of(&filled.landing));
        let (submit, wait) = (event(Kind::Submit), traced::of_device(Kind::WaitForQueue, device, 0));
        let traced = Traced::begin(&filled.ops);
        let since = traced.since;
        filled.traced = Some(traced);
        let waited = self.copies.submit(device, filled, self);
        trace.unless_short(wait, since, since + waited);
        trace.since(submit, since);
        waited
    }

    /// The number of a read that other ranks want too.
    fn begin_exchanged(&self) -> Option<u64> {
        #[cfg(feature = "cuda")]
        return self.exchanging.as_ref().map(|exchanging| exchanging.begin());
        #[cfg(not(feature = "cuda"))]
        return None;
    }

    /// Hands what such a read brought to the exchange.
    fn exchange(&self, number: u64, staged: Staged, extent: Extent, offset: usize) {
        #[cfg(feature = "cuda")]
        if let Some(exchanging) = &self.exchanging {
            exchanging.arrived(number, staged, extent, offset);
        }
        #[cfg(not(feature = "cuda"))]
        let _ = (number, staged, extent, offset);
    }

    pub(super) fn raw_copy(&self, piece: &Piece, src: *const u8) -> RawCopy {
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
        self.place(piece).address + piece.dst
    }

    fn place(&self, piece: &Piece) -> &Place {
        let place = self.setup.destinations.place(piece.rank, piece.dest);
        place.expect("bug in shardlift: a piece for another process")
    }
}

fn landing(piece: &Piece) -> Landing {
    Landing { rank: piece.rank, dest: piece.dest, bytes: piece.landed_bytes() }
}
