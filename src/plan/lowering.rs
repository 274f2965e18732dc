//! What a copy is to storage and devices, and how its bytes are read (sharding.md section 13). Derived from the
//! descriptors of a plan; the rule that made them is in `limits.rs`: [`read_cost`](crate::limits::read_cost) for reads,
//! [`COPY_COSTS`](crate::limits::COPY_COSTS) for the ways to a device.

use std::fmt;

use super::{BoxCopy, Consumer, Plan, ReadExtent};
use crate::limits::{DEVICE_SLOT, DIRECT_ALIGNMENT, UNROLL_MAX, read_cost};
use crate::stride::{is_rows, source_span};

/// What a copy from a tensor to a destination looks like on both sides: the classes C0 to C4 of sharding.md section 13.
/// Displayed in plain words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Lowering {
    /// C0: one run of the file is one run of the destination.
    Contiguous,
    /// C1: many runs of the file, which lie behind each other in the destination.
    Rows,
    /// C2: few large runs of the file, in whatever order.
    Runs,
    /// C3: many runs on both sides.
    Pitched,
    /// C4: single elements, or a cast; only a kernel does it on a device.
    Elements,
}

/// How the bytes of a tensor get from storage to those who want them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reading {
    /// One read of what one rank wants.
    Contiguous,
    /// One read for each run, or for each of a few groups of runs.
    Pieces,
    /// One read from the first to the last byte that one rank wants, cut on the way.
    Cover,
    /// One read of what several ranks want; each takes its part of it.
    FanOut,
    /// Ranks of several processes read a part each, and pass on what others want of it.
    Together,
}

impl Lowering {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Lowering::Contiguous => "contiguous",
            Lowering::Rows => "rows",
            Lowering::Runs => "runs",
            Lowering::Pitched => "pitched",
            Lowering::Elements => "elements",
        }
    }
}

impl fmt::Display for Lowering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lowering::Contiguous => "contiguous",
            Lowering::Rows => "strided rows",
            Lowering::Runs => "few large runs",
            Lowering::Pitched => "strided on both sides",
            Lowering::Elements => "element by element",
        })
    }
}

impl Reading {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Reading::Contiguous => "contiguous",
            Reading::Pieces => "pieces",
            Reading::Cover => "cover",
            Reading::FanOut => "fan-out",
            Reading::Together => "together",
        }
    }
}

impl fmt::Display for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reading::Contiguous => "read straight",
            Reading::Pieces => "read in pieces",
            Reading::Cover => "covered and cut",
            Reading::FanOut => "covered once, fanned out",
            Reading::Together => "read together, passed on",
        })
    }
}

impl Plan {
    /// What a copy of this plan looks like on both sides.
    ///
    /// # Panics
    /// If the checkpoint has no such tensor: the copy is another plan's.
    pub fn lowering(&self, copy: &BoxCopy) -> Lowering {
        let element = u64::from(self.tensor(copy.tensor).dtype.bits()).div_ceil(8);
        let runs: u64 = copy.loops.iter().map(|inner| inner.count).product();
        if copy.cast.is_some() || !copy.loops.is_empty() && copy.run <= element && copy.is_transformed() {
            Lowering::Elements
        } else if copy.loops.is_empty() {
            Lowering::Contiguous
        } else if copy.run >= LARGE_RUN && runs <= FEW_RUNS {
            Lowering::Runs
        } else if !copy.is_transformed() && copy.destination().loops.is_empty() {
            Lowering::Rows
        } else {
            Lowering::Pitched
        }
    }

    /// How an extent of this plan is read.
    ///
    /// # Panics
    /// It may, if the extent is another plan's.
    pub fn reading(&self, extent: &ReadExtent) -> Reading {
        let consumers = self.consumers(extent);
        let several = consumers.windows(2).any(|pair| pair[0].rank != pair[1].rank);
        let wanted = |consumer: &Consumer| self.copy(consumer).source(0).loops.is_empty();
        match (several, extent.outer.is_empty()) {
            _ if self.is_shared(extent) => Reading::Together,
            (true, _) => Reading::FanOut,
            (false, false) => Reading::Pieces,
            (false, true) if consumers.len() == 1 && consumers.iter().all(wanted) => Reading::Contiguous,
            (false, true) => Reading::Cover,
        }
    }

    /// The copy that feeds a consumer.
    pub(super) fn copy(&self, consumer: &Consumer) -> &BoxCopy {
        &self.rank(consumer.rank).pieces[consumer.piece as usize]
    }
}

impl BoxCopy {
    /// Kernels that put it in place on a GPU where no copy engine can: one for each slot that its source lies in.
    pub(super) fn launches(&self) -> u64 {
        if self.cast.is_none() && (self.loops.is_empty() || is_rows(&self.loops, self.run)) {
            return 0;
        }
        source_span(&self.loops, self.run).div_ceil(DEVICE_SLOT as u64).max(1)
    }
}

impl ReadExtent {
    /// How many ranges are read.
    pub fn reads(&self) -> u64 {
        self.outer.iter().map(|&(count, _)| count).product()
    }

    /// The bytes read where a range that is read on its own takes whole pages; one that is not shares its pages with its
    /// neighbours.
    pub(super) fn paged_bytes(&self) -> u64 {
        if self.outer.is_empty() {
            return self.run;
        }
        // Where in a page ranges begin repeats after at most this many steps of a loop.
        let cycle = |count: u64| count.min(DIRECT_ALIGNMENT);
        let steps: u64 = self.outer.iter().map(|&(count, _)| cycle(count)).product();
        if steps > UNROLL_MAX {
            return self.reads() * (self.run + DIRECT_ALIGNMENT - 1);
        }
        let page = |byte: u64| byte / DIRECT_ALIGNMENT;
        let paged = |mut step: u64| {
            let (mut start, mut times) = (self.start, 1);
            for &(count, stride) in &self.outer {
                let at = step % cycle(count);
                step /= cycle(count);
                start += at * stride;
                times *= count / cycle(count) + u64::from(at < count % cycle(count));
            }
            times * (page(start + self.run - 1) - page(start) + 1) * DIRECT_ALIGNMENT
        };
        (0..steps).map(paged).sum()
    }

    /// What reading it costs, in bytes that the storage could have moved instead.
    pub(super) fn cost(&self) -> u64 {
        if self.outer.is_empty() { self.run } else { self.reads().saturating_mul(read_cost(self.run)) }
    }
}

/// Runs that are worth a read each: C2 of sharding.md section 13.
const LARGE_RUN: u64 = 64 << 10;

/// Most runs that are few there.
const FEW_RUNS: u64 = 1024;
