//! What a stream does: copies, fills, kernels, calls of the host.

use crate::abi::{ForeignFn, HostData, HostFn, SkipFn};
use crate::code::{Code, INVALID_VALUE, Result};
use crate::handle::Handle;
use crate::kernels::Launch;

/// Equally spaced rows of bytes; one row for a plain copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) width: u64,
    pub(crate) rows: u64,
    pub(crate) pitch: u64,
}

impl Region {
    pub(crate) fn flat(start: u64, bytes: u64) -> Region {
        Region { start, width: bytes, rows: 1, pitch: bytes }
    }

    /// From the first byte to the last one, gaps included.
    pub(crate) fn span(self) -> u64 {
        if self.bytes() == 0 { 0 } else { (self.rows - 1) * self.pitch + self.width }
    }

    pub(crate) fn bytes(self) -> u64 {
        self.width * self.rows
    }

    pub(crate) fn end(self) -> u64 {
        self.start + self.span()
    }

    /// Whether a byte is in both; two regions of different pitch are compared by their spans only if one has no gaps.
    pub(crate) fn overlaps(self, other: Region) -> bool {
        if self.bytes() == 0 || other.bytes() == 0 || self.start >= other.end() || other.start >= self.end() {
            return false;
        }
        let gaps = |region: Region| region.rows > 1 && region.pitch > region.width;
        match (gaps(self), gaps(other)) {
            (false, false) => true,
            (true, true) if self.pitch == other.pitch => {
                let column = other.start.wrapping_sub(self.start).rem_euclid(self.pitch);
                let column = if other.start < self.start {
                    (self.pitch - (self.start - other.start) % self.pitch) % self.pitch
                } else {
                    column
                };
                column < self.width || column + other.width > self.pitch
            }
            // Exact only at a cost: rows of two pitches that interleave are let pass.
            (true, true) => false,
            (true, false) => self.touches(other),
            (false, true) => other.touches(self),
        }
    }

    /// Whether a row of this one meets `flat`, which overlaps the span.
    fn touches(self, flat: Region) -> bool {
        let row = flat.start.saturating_sub(self.start) / self.pitch;
        (row..(row + 2).min(self.rows)).any(|row| {
            let start = self.start + row * self.pitch;
            start < flat.end() && flat.start < start + self.width
        })
    }
}

/// Where the bytes of a copy come from.
pub(crate) enum Source {
    /// Memory that is read when the copy runs.
    At(Region),
    /// Pageable memory, taken at the call, row after row.
    Staged(Vec<u8>),
    /// A pattern, repeated.
    Fill(Vec<u8>),
}

/// One thing for a stream to do.
pub(crate) enum Work {
    /// Only its place in the stream matters: a wait.
    Nothing,
    Copy {
        source: Source,
        to: Region,
    },
    Kernel(Launch),
    Host(HostFn, HostData),
    /// What another library put there.
    Foreign(Foreign),
    /// The event gets the time.
    Record(Handle),
    /// Stream-ordered memory is given back.
    Free {
        start: u64,
        id: u64,
    },
}

/// An operation of another library. One of its functions is called, once.
pub(crate) struct Foreign {
    pub(crate) run: ForeignFn,
    pub(crate) skip: SkipFn,
    pub(crate) data: HostData,
}

impl Work {
    /// Runs what needs no lock: bytes move here.
    pub(crate) fn run(&self) {
        match self {
            Work::Nothing | Work::Record(_) | Work::Free { .. } | Work::Foreign(_) => {}
            Work::Copy { source, to } => copy(source, *to),
            Work::Kernel(launch) => launch.run(),
            Work::Host(function, data) => function(data.0),
        }
    }
}

fn copy(source: &Source, to: Region) {
    if to.bytes() == 0 {
        return;
    }
    for row in 0..to.rows {
        let target = (to.start + row * to.pitch) as *mut u8;
        let width = to.width as usize;
        match source {
            Source::At(from) => {
                let from = (from.start + row * from.pitch) as *const u8;
                // SAFETY: both rows lie in memory that was found live just before, and is kept so while this runs; they
                // may overlap.
                unsafe { target.copy_from(from, width) }
            }
            Source::Staged(bytes) => {
                let from = &bytes[row as usize * width..][..width];
                // SAFETY: as above; the staged bytes are this operation's own.
                unsafe { target.copy_from_nonoverlapping(from.as_ptr(), width) }
            }
            Source::Fill(pattern) => {
                // SAFETY: as above.
                let target = unsafe { std::slice::from_raw_parts_mut(target, width) };
                match pattern.as_slice() {
                    [byte] => target.fill(*byte),
                    pattern => target.chunks_mut(pattern.len()).for_each(|chunk| {
                        chunk.copy_from_slice(&pattern[..chunk.len()]);
                    }),
                }
            }
        }
    }
}

/// The bytes of pageable memory, taken now.
pub(crate) fn stage(from: Region) -> Vec<u8> {
    let mut bytes = vec![0; from.bytes() as usize];
    if !bytes.is_empty() {
        let to = Region { start: bytes.as_mut_ptr() as u64, width: from.width, rows: from.rows, pitch: from.width };
        copy(&Source::At(from), to);
    }
    bytes
}

/// A hash of a region: of all of it, or of its ends and samples between.
pub(crate) fn hash(region: Region, all: bool) -> u64 {
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    let rows = if all { region.rows } else { region.rows.min(16) };
    for index in 0..rows {
        // Spread over the rows, the first and the last among them.
        let row = if rows < 2 { 0 } else { index * (region.rows - 1) / (rows - 1) };
        hash_row(&mut state, region.start + row * region.pitch, region.width, all);
    }
    state
}

/// Rows up to this size are hashed whole: a few microseconds.
const WHOLE: u64 = 32 << 10;

fn hash_row(state: &mut u64, start: u64, width: u64, all: bool) {
    let mut piece = |offset: u64, bytes: u64| {
        let bytes = bytes.min(width - offset);
        // SAFETY: inside a region that its caller found readable.
        let slice = unsafe { std::slice::from_raw_parts((start + offset) as *const u8, bytes as usize) };
        let mut words = slice.chunks_exact(8);
        for word in &mut words {
            mix(state, u64::from_ne_bytes(word.try_into().expect("8 bytes")));
        }
        words.remainder().iter().for_each(|byte| mix(state, u64::from(*byte)));
    };
    if width == 0 {
    } else if all || width <= WHOLE {
        piece(0, width);
    } else {
        let step = (width - 64) / 256;
        (0..=256).for_each(|sample| piece(sample * step, 64));
        piece(width - 64, 64);
    }
}

fn mix(state: &mut u64, word: u64) {
    *state = (*state ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
}

/// Rows as the driver's 2-D copy names them.
pub(crate) fn rows(base: u64, x: usize, y: usize, pitch: usize, width: usize, height: usize) -> Result<Region> {
    let bad: Code = INVALID_VALUE;
    let pitch = if pitch == 0 { width } else { pitch };
    if base == 0 || pitch < width || x + width > pitch && height > 1 {
        return Err(bad);
    }
    let offset = (y as u64).checked_mul(pitch as u64).and_then(|rows| rows.checked_add(x as u64)).ok_or(bad)?;
    let start = base.checked_add(offset).ok_or(bad)?;
    let region = Region { start, width: width as u64, rows: height as u64, pitch: pitch as u64 };
    (height as u64).checked_mul(pitch as u64).and_then(|span| start.checked_add(span)).map(|_| region).ok_or(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_agrees_with_counting_bytes() {
        let covered = |region: Region| {
            (0..region.rows)
                .flat_map(move |row| (0..region.width).map(move |byte| region.start + row * region.pitch + byte))
                .collect::<std::collections::HashSet<_>>()
        };
        let mut regions = vec![Region::flat(3, 4), Region::flat(7, 9), Region::flat(0, 40), Region::flat(20, 0)];
        for start in [0, 2, 5, 9, 13] {
            for width in [1, 3, 5, 7] {
                regions.push(Region { start, width, rows: 3, pitch: 7 });
            }
        }
        for a in &regions {
            for b in &regions {
                let expected = !covered(*a).is_disjoint(&covered(*b));
                // A column may meet the other one in a row that only one of the two has.
                assert!(a.overlaps(*b) || !expected, "{a:?} {b:?}");
                let spans = a.start < b.end() && b.start < a.end();
                assert!(spans || !a.overlaps(*b), "{a:?} {b:?}");
            }
        }
        let (left, right) =
            (Region { start: 0, width: 8, rows: 9, pitch: 16 }, Region { start: 8, width: 8, rows: 9, pitch: 16 });
        assert!(!left.overlaps(right) && !right.overlaps(left) && left.overlaps(left));
    }

    #[test]
    fn a_changed_byte_changes_the_hash() {
        let mut bytes = vec![7_u8; 20_000];
        let region = Region { start: bytes.as_ptr() as u64, width: 100, rows: 20, pitch: 1000 };
        let before = hash(region, true);
        bytes[3050] = 8;
        assert_ne!(hash(region, true), before);
        bytes[3050] = 7;
        bytes[500] = 9; // in a gap
        assert_eq!(hash(region, true), before);
    }
}
