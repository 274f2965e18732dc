//! What each rank must get, found bit by bit with index arithmetic. Shares no code with the planner.

use std::ops::Range;

/// One tensor and how it is divided.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) bits: u64,
    pub(crate) dims: Vec<u64>,
    /// The dimension that is sharded; `None` replicates.
    pub(crate) dim: Option<usize>,
    pub(crate) ceil: bool,
    pub(crate) unit: u64,
    pub(crate) ranks: u64,
}

/// Why no partition exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Units do not divide evenly over several ranks, or the dimension is not a whole number of them.
    Uneven,
    /// A cut does not fall on a byte.
    Misaligned,
}

impl Case {
    /// The shape and bytes of one rank's part of `data`.
    pub(crate) fn part(&self, data: &[u8], rank: u64) -> Result<(Vec<u64>, Vec<u8>), Refusal> {
        let taken = self.taken(rank)?;
        let mut shape = self.dims.clone();
        if let Some(dim) = self.dim {
            shape[dim] = taken.end - taken.start;
        }
        let total: u64 = shape.iter().product();
        let mut bits = Vec::new();
        let mut before: Option<u64> = None;
        for element in 0..total {
            let source = self.source(&shape, element, taken.start);
            // Wherever the source jumps, both sides of the jump must be whole bytes.
            if before.is_none_or(|before| before + 1 != source)
                && (!self.on_byte(source) || before.is_some_and(|before| !self.on_byte(before + 1)))
            {
                return Err(Refusal::Misaligned);
            }
            before = Some(source);
            for bit in source * self.bits..(source + 1) * self.bits {
                bits.push(data[bit as usize / 8] >> (bit % 8) & 1);
            }
        }
        if before.is_some_and(|before| !self.on_byte(before + 1)) {
            return Err(Refusal::Misaligned);
        }
        let byte = |bits: &[u8]| bits.iter().enumerate().fold(0, |byte, (at, bit)| byte | bit << at);
        Ok((shape, bits.chunks(8).map(byte).collect()))
    }

    fn on_byte(&self, element: u64) -> bool {
        (element * self.bits).is_multiple_of(8)
    }

    /// The indices of the sharded dimension that a rank gets.
    fn taken(&self, rank: u64) -> Result<Range<u64>, Refusal> {
        let Some(dim) = self.dim else { return Ok(0..0) };
        let size = self.dims[dim];
        let mut units = Vec::new();
        let mut at = 0;
        while at < size {
            units.push(at..(at + self.unit).min(size));
            at += self.unit;
        }
        let whole = size.is_multiple_of(self.unit) && (units.len() as u64).is_multiple_of(self.ranks);
        // One part is all of it, whatever the units are.
        if !self.ceil && !whole && self.ranks > 1 {
            return Err(Refusal::Uneven);
        }
        let each = (units.len() as u64).div_ceil(self.ranks).max(1);
        let mine: Vec<_> = units.iter().enumerate().filter(|(at, _)| *at as u64 / each == rank).collect();
        match (mine.first(), mine.last()) {
            (Some((_, first)), Some((_, last))) => Ok(first.start..last.end),
            _ => Ok(size..size),
        }
    }

    /// The element of the tensor that is `element` of the part.
    fn source(&self, shape: &[u64], mut element: u64, first: u64) -> u64 {
        let mut index = vec![0; shape.len()];
        for at in (0..shape.len()).rev() {
            index[at] = element % shape[at];
            element /= shape[at];
        }
        if let Some(dim) = self.dim {
            index[dim] += first;
        }
        index.iter().zip(&self.dims).fold(0, |offset, (index, size)| offset * size + index)
    }
}
