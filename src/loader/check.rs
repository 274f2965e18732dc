//! Holds what landed against what is on disk, by another way than the one the bytes came; and for `--check` against what
//! was read of it, where the load digested that on its way.

use std::borrow::Cow;
use std::fmt::Write;

use rayon::prelude::*;

use crate::cast::Cast;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{FileId, Rank};
use crate::limits;
use crate::place::{Digest, Moved, Tensor, Weights};
use crate::plan::{BoxOf, Boxes, Factor, Leaf, Plan};
use crate::source::SourceFile;

impl Weights {
    /// Reads every part once more, plainly, from where index arithmetic over the declared cut finds it (not the copies
    /// that the pipeline made), and compares the digests. Returns each rank's digest (xxh3-64 of the lines
    /// `name dtype shape digest` sorted by name; aliases do not count). Works on all cores, and needs
    /// [`limits::CHECK_WINDOW`] bytes for each, and [`limits::CHECK_BAND`] more while it looks at a permuted tensor.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] naming tensor and rank; errors of the files.
    pub fn check(&self) -> Result<Vec<(Rank, u64)>> {
        self.check_by(|_| None)
    }

    /// Compares what the load digested on its way ([`Loader::digests`](crate::Loader::digests)): of each tensor the bytes as
    /// they were read, from where index arithmetic over the declared cut finds them, with those that lie in its memory (on a
    /// GPU, where they are digested now). What could not be digested so is read once more, as by [`check`](Weights::check):
    /// what is converted, permuted, made of several parts, lent, or cut within eight bytes.
    ///
    /// # Errors
    /// As [`check`](Weights::check).
    pub fn check_moved(&self) -> Result<Vec<(Rank, u64)>> {
        self.check_by(|tensor| self.moved(tensor))
    }

    fn check_by(&self, moved: impl Fn(&Tensor) -> Option<Moved> + Sync) -> Result<Vec<(Rank, u64)>> {
        let plan = self.plan();
        let original = |tensor: &&Tensor| plan.params()[tensor.param_position()].alias_of.is_none();
        let mut tensors: Vec<&Tensor> = self.iter().filter(original).collect();
        tensors.sort_by_key(|tensor| (tensor.param_position(), tensor.rank()));
        // All ranks of a tensor together: its file is opened once, and read from the page cache but for the first time.
        let params: Vec<_> = tensors.chunk_by(|a, b| a.param_position() == b.param_position()).collect();
        let digests = params.par_iter().map(|ranks| check_ranks(plan, ranks, &moved)).collect::<Result<Vec<_>>>()?;

        let mut lines = vec![String::new(); plan.world().size() as usize];
        for (tensor, digest) in tensors.iter().zip(digests.into_iter().flatten()) {
            let line = &mut lines[tensor.rank().index()];
            let _ = writeln!(line, "{} {} {} {digest:016x}", tensor.name(), tensor.dtype(), tensor.shape());
        }
        let digest = |rank: &Rank| (*rank, xxhash_rust::xxh3::xxh3_64(lines[rank.index()].as_bytes()));
        Ok(plan.world().driven().iter().map(digest).collect())
    }
}

/// The digests of what landed of one destination on several ranks, all as the files say.
fn check_ranks(plan: &Plan, ranks: &[&Tensor], moved: &impl Fn(&Tensor) -> Option<Moved>) -> Result<Vec<u64>> {
    let mut files = Files { plan, open: None };
    let mut digests = Vec::with_capacity(ranks.len());
    for tensor in ranks {
        let moved = moved(tensor);
        let expected = match moved {
            Some(moved) => moved.read,
            None => expected_of(plan, tensor, &mut files).map_err(|error| at(error, tensor))?,
        };
        let landed = moved.and_then(|moved| moved.landed).map_or_else(|| tensor.digest(), Ok)?;
        if landed != expected {
            let error = Error::new(ErrorKind::Mismatch, "what landed is not what is on disk");
            return Err(at(error.with_expected(hex(expected), hex(landed)), tensor));
        }
        digests.push(landed);
    }
    Ok(digests)
}

/// The digest of what should have landed, read from the files.
fn expected_of(plan: &Plan, tensor: &Tensor, files: &mut Files<'_>) -> Result<u64> {
    if tensor.nbytes() == 0 {
        return Ok(Digest::default().value());
    }
    let boxes = plan.boxes(tensor.rank(), tensor.position())?;
    match boxes.only_leaf() {
        Some(leaf) => expected(leaf, files),
        None => expected_of_boxes(boxes, files),
    }
}

fn at(error: Error, tensor: &Tensor) -> Error {
    error.with_tensor(tensor.name()).with_rank(tensor.rank())
}

fn hex(digest: u64) -> String {
    format!("digest {digest:016x}")
}

/// The files of a plan, the last one open.
struct Files<'a> {
    plan: &'a Plan,
    open: Option<(FileId, SourceFile)>,
}

impl Files<'_> {
    /// The bytes of a tensor.
    fn window(&mut self, tensor: u32) -> Result<Window<'_>> {
        let meta = self.plan.tensor(tensor);
        let file = match self.open.take() {
            Some((of, file)) if of == meta.file => file,
            _ => {
                let planned = self.plan.file(meta.file);
                SourceFile::reopen(&planned.path, planned.identity)?
            }
        };
        let (_, file) = self.open.insert((meta.file, file));
        Ok(Window { file, start: meta.start, end: meta.end, at: 0, bytes: Vec::new(), ahead: limits::CHECK_WINDOW })
    }
}

/// The digest of a destination of several boxes, band by band.
fn expected_of_boxes(boxes: Boxes, files: &mut Files<'_>) -> Result<u64> {
    let (mut digest, mut offset) = (Digest::default(), 0);
    let mut band = Vec::new();
    for part in boxes.bands(limits::CHECK_BAND)? {
        band.clear();
        band.resize(part.bytes()? as usize, 0);
        let bits = u64::from(part.dtype().bits());
        part.for_each(|placed| {
            let bytes = match placed.what {
                BoxOf::Fill(element) => Cow::Borrowed(element),
                BoxOf::Leaf(leaf) => Cow::Owned(elements(leaf, &mut files.window(leaf.tensor)?)?),
            };
            if bits.is_multiple_of(8) {
                let element = bits as usize / 8;
                let mut rows = bytes.chunks_exact(element).cycle();
                place(&placed.lens, &placed.strides, placed.offset, &mut |at| {
                    let to = at as usize * element;
                    band[to..to + element].copy_from_slice(rows.next().expect("bug in shardlift: an empty box"));
                });
                return Ok(());
            }
            let mut from = (0..bytes.len() as u64 * 8).cycle();
            place(&placed.lens, &placed.strides, placed.offset, &mut |at| {
                for (to, from) in (at * bits..(at + 1) * bits).zip(&mut from) {
                    band[to as usize / 8] |= (bytes[from as usize / 8] >> (from % 8) & 1) << (to % 8);
                }
            });
            Ok(())
        })?;
        digest.add(offset, &band);
        offset += band.len() as u64;
    }
    Ok(digest.value())
}

/// Shows the elements of a box, in its order, as positions in the destination.
fn place(lens: &[u64], strides: &[u64], at: u64, show: &mut impl FnMut(u64)) {
    match (lens, strides) {
        ([len, lens @ ..], [stride, strides @ ..]) => {
            (0..*len).for_each(|index| place(lens, strides, at + index * stride, show));
        }
        _ => show(at),
    }
}

/// The elements that a leaf takes of its tensor, in the form that they should have landed in.
fn elements(leaf: &Leaf, window: &mut Window<'_>) -> Result<Vec<u8>> {
    let mut source = Vec::new();
    let bits = u64::from(leaf.dtype.bits());
    if leaf.order.is_sorted() {
        gather(&leaf.factors, bits, 0, &mut |from, to| {
            window.slices(from, to, &mut |bytes| source.extend_from_slice(bytes))
        })?;
    } else {
        bands(leaf, window, &mut |band| source.extend_from_slice(band))?;
    }
    let Some(cast) = leaf.cast else { return Ok(source) };
    let mut landed = vec![0; cast.converted(source.len() as u64) as usize];
    cast.convert(&source, &mut landed);
    Ok(landed)
}

/// The digest of the elements that a leaf takes of its tensor, in the form that they should have landed in.
fn expected(leaf: &Leaf, files: &mut Files<'_>) -> Result<u64> {
    let dtype = leaf.dtype;
    let mut window = files.window(leaf.tensor)?;
    let mut landed =
        Landed { cast: leaf.cast, digest: Digest::default(), offset: 0, source: Vec::with_capacity(WORDS) };
    if leaf.order.is_sorted() {
        gather(&leaf.factors, u64::from(dtype.bits()), 0, &mut |from, to| {
            window.slices(from, to, &mut |bytes| landed.add(bytes))
        })?;
    } else {
        bands(leaf, &mut window, &mut |band| landed.add(band))?;
    }
    landed.flush();
    Ok(landed.digest.value())
}

/// The digest of a destination, in the making: of bytes of the file in the order of the destination.
struct Landed {
    cast: Option<Cast>,
    digest: Digest,
    offset: u64,
    source: Vec<u8>,
}

impl Landed {
    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(WORDS - self.source.len()));
            self.source.extend_from_slice(now);
            bytes = later;
            if self.source.len() == WORDS {
                self.flush();
            }
        }
    }

    fn flush(&mut self) {
        let mut cast = Vec::new();
        let landed = match self.cast {
            None => &self.source,
            Some(how) => {
                cast.resize(how.converted(self.source.len() as u64) as usize, 0);
                how.convert(&self.source, &mut cast);
                &cast
            }
        };
        self.digest.add(self.offset, landed);
        self.offset += landed.len() as u64;
        self.source.clear();
    }
}

/// Bytes of the file that are gathered before they are digested: in every type a multiple of a word of the digest.
const WORDS: usize = 32 << 10;

/// A piece of a tensor in memory, which moves on towards the tensor's end.
struct Window<'a> {
    file: &'a SourceFile,
    /// The tensor's bytes in the file.
    start: u64,
    end: u64,
    /// The first byte in the window, counted from the tensor's.
    at: u64,
    bytes: Vec<u8>,
    /// Bytes that are read at once, if fewer are asked for.
    ahead: u64,
}

impl Window<'_> {
    /// Shows bytes `from..to` of the tensor, in pieces.
    fn slices(&mut self, mut from: u64, to: u64, show: &mut impl FnMut(&[u8])) -> Result<()> {
        while from < to {
            if from < self.at || from >= self.at + self.bytes.len() as u64 {
                self.at = from;
                let wanted = (to - from).max(self.ahead).min(limits::CHECK_WINDOW);
                self.bytes.resize((self.end - self.start - from).min(wanted) as usize, 0);
                self.file.read_exact_at(&mut self.bytes, self.start + from)?;
            }
            let until = to.min(self.at + self.bytes.len() as u64);
            show(&self.bytes[(from - self.at) as usize..(until - self.at) as usize]);
            from = until;
        }
        Ok(())
    }
}

/// Calls `take` with the byte ranges that `factors` take of a row-major tensor, from the element index `base` on.
fn gather(factors: &[Factor], bits: u64, base: u64, take: &mut impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    let Some((factor, inner)) = factors.split_first() else {
        return take(base * bits / 8, (base + 1) * bits / 8);
    };
    let inner_elements: u64 = inner.iter().map(|factor| factor.size).product();
    let whole = |factor: &Factor| (factor.start, factor.len, factor.step) == (0, factor.size, 1);
    if factor.step == 1 && inner.iter().all(whole) {
        let first = base + factor.start * inner_elements;
        return take(first * bits / 8, (first + factor.len * inner_elements) * bits / 8);
    }
    for i in 0..factor.len {
        gather(inner, bits, base + (factor.start + i * factor.step) * inner_elements, take)?;
    }
    Ok(())
}

/// Shows the bytes that a leaf takes, in the order of its destination: bands of it, each of which is gathered from
/// where the file has it.
fn bands(leaf: &Leaf, window: &mut Window<'_>, show: &mut impl FnMut(&[u8])) -> Result<()> {
    let bytes = u64::from(leaf.dtype.bits()) / 8;
    let lens: Vec<u64> = leaf.shape().to_vec();
    // A band has all indices of the dimensions behind `dim`, some of `dim`, and one of those before it.
    let inner = |dim: usize| lens[dim + 1..].iter().product::<u64>() * bytes;
    let dim = (0..lens.len()).find(|&dim| inner(dim) <= limits::CHECK_BAND).unwrap_or(0);
    let at_once = (limits::CHECK_BAND / inner(dim)).clamp(1, lens[dim]);
    // Of a row of the tensor little may be in a band: then what lies between is not worth reading.
    let row = leaf.factors.last().map_or(1, |factor| factor.size);
    let in_row = match leaf.order[dim] + 1 == leaf.factors.len() {
        true => at_once,
        false if leaf.order[dim + 1..].contains(&(leaf.factors.len() - 1)) => row,
        false => 1,
    };
    window.ahead = if in_row * WORTH_READING >= row { limits::CHECK_WINDOW } else { 0 };
    let mut band = Vec::new();
    for outer in 0..lens[..dim].iter().product() {
        for first in (0..lens[dim]).step_by(at_once as usize) {
            let mut parts: Vec<Part> = leaf.factors.iter().map(|&factor| Part { factor, stride: 0 }).collect();
            let mut left = outer;
            for (before, len) in lens[..dim].iter().enumerate().rev() {
                parts[leaf.order[before]].narrow(left % len, 1);
                left /= len;
            }
            parts[leaf.order[dim]].narrow(first, at_once.min(lens[dim] - first));
            let mut stride = bytes;
            for &factor in leaf.order.iter().rev() {
                parts[factor].stride = stride;
                stride *= parts[factor].factor.len;
            }
            band.resize(stride as usize, 0);
            fill(&parts, bytes, 0, 0, window, &mut band)?;
            show(&band);
        }
    }
    Ok(())
}

/// As many times the bytes that are needed may be read of a row without gaps.
const WORTH_READING: u64 = 8;

/// A factor, as much of it as is in a band, and the bytes of the band from one of its indices to the next.
struct Part {
    factor: Factor,
    stride: u64,
}

impl Part {
    fn narrow(&mut self, start: u64, len: u64) {
        self.factor.start += start * self.factor.step;
        self.factor.len = len;
    }
}

/// Fills a band, from the element index `base` of the tensor and byte `at` of the band on.
fn fill(parts: &[Part], bytes: u64, base: u64, at: u64, window: &mut Window<'_>, band: &mut [u8]) -> Result<()> {
    let Some((&Part { factor, stride }, inner)) = parts.split_first() else {
        let to = &mut band[at as usize..(at + bytes) as usize];
        return window.slices(base * bytes, (base + 1) * bytes, &mut |element| to.copy_from_slice(element));
    };
    if inner.is_empty() && factor.step == 1 {
        let first = (base + factor.start) * bytes;
        let mut at = at as usize;
        return window.slices(first, first + factor.len * bytes, &mut |elements| {
            for element in elements.chunks_exact(bytes as usize) {
                band[at..at + element.len()].copy_from_slice(element);
                at += stride as usize;
            }
        });
    }
    let inner_elements: u64 = inner.iter().map(|part| part.factor.size).product();
    for i in 0..factor.len {
        let base = base + (factor.start + i * factor.step) * inner_elements;
        fill(inner, bytes, base, at + i * stride, window, band)?;
    }
    Ok(())
}
