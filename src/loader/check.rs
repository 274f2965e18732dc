//! `--check`: holds what landed against what is on disk, by another way than the one the bytes came.

use std::fmt::Write;

use rayon::prelude::*;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits;
use crate::place::{Digest, Tensor, Weights};
use crate::plan::{Factor, Leaf, Plan};
use crate::source::SourceFile;

impl Weights {
    /// Reads every part once more, plainly, from where index arithmetic over the declared cut finds it (not the copies
    /// that the pipeline made), and compares the digests. Returns each rank's digest (xxh3-64 of the lines
    /// `name dtype shape digest` sorted by name; aliases do not count). Works on all cores, and needs
    /// [`limits::CHECK_WINDOW`] bytes for each.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] naming tensor and rank; errors of the files.
    pub fn check(&self) -> Result<Vec<(Rank, u64)>> {
        let plan = self.plan();
        let original = |tensor: &&Tensor| plan.params()[tensor.param_position()].alias_of.is_none();
        let mut tensors: Vec<&Tensor> = self.iter().filter(original).collect();
        tensors.sort_by_key(|tensor| (tensor.param_position(), tensor.rank()));
        // All ranks of a tensor together: its file is opened once, and read from the page cache but for the first time.
        let params: Vec<_> = tensors.chunk_by(|a, b| a.param_position() == b.param_position()).collect();
        let digests = params.par_iter().map(|ranks| check_ranks(plan, ranks)).collect::<Result<Vec<_>>>()?;

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
fn check_ranks(plan: &Plan, ranks: &[&Tensor]) -> Result<Vec<u64>> {
    let mut source: Option<(u32, SourceFile)> = None;
    let mut digests = Vec::with_capacity(ranks.len());
    for tensor in ranks {
        let leaf = plan.leaf(tensor.rank(), tensor.position())?;
        let expected = if tensor.nbytes() == 0 {
            Digest::default().value()
        } else {
            let file = match source.take() {
                Some((of, file)) if of == leaf.tensor => file,
                _ => {
                    let planned = plan.file(plan.tensor(leaf.tensor).file);
                    SourceFile::reopen(&planned.path, planned.identity).map_err(|error| at(error, tensor))?
                }
            };
            let expected = expected(plan, &leaf, &file).map_err(|error| at(error, tensor))?;
            source = Some((leaf.tensor, file));
            expected
        };
        let landed = tensor.digest()?;
        if landed != expected {
            let error = Error::new(ErrorKind::Mismatch, "what landed is not what is on disk");
            return Err(at(error.with_expected(hex(expected), hex(landed)), tensor));
        }
        digests.push(landed);
    }
    Ok(digests)
}

fn at(error: Error, tensor: &Tensor) -> Error {
    error.with_tensor(tensor.name()).with_rank(tensor.rank())
}

fn hex(digest: u64) -> String {
    format!("digest {digest:016x}")
}

/// The digest of the elements that a leaf takes of its tensor, as the file has them.
fn expected(plan: &Plan, leaf: &Leaf, file: &SourceFile) -> Result<u64> {
    let meta = plan.tensor(leaf.tensor);
    let mut window = Window { file, start: meta.start, end: meta.end, at: 0, bytes: Vec::new() };
    let (mut digest, mut offset, mut words) = (Digest::default(), 0, Vec::with_capacity(WORDS));
    gather(&leaf.factors, u64::from(meta.dtype.bits()), 0, &mut |from, to| {
        window.slices(from, to, &mut |mut bytes| {
            while !bytes.is_empty() {
                let (now, later) = bytes.split_at(bytes.len().min(WORDS - words.len()));
                words.extend_from_slice(now);
                bytes = later;
                if words.len() == WORDS {
                    digest.add(offset, &words);
                    offset += words.len() as u64;
                    words.clear();
                }
            }
        })
    })?;
    digest.add(offset, &words);
    Ok(digest.value())
}

/// Bytes that are gathered before they are digested: a multiple of a word of the digest.
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
}

impl Window<'_> {
    /// Shows bytes `from..to` of the tensor, in pieces.
    fn slices(&mut self, mut from: u64, to: u64, show: &mut impl FnMut(&[u8])) -> Result<()> {
        while from < to {
            if from < self.at || from >= self.at + self.bytes.len() as u64 {
                self.at = from;
                self.bytes.resize((self.end - self.start - from).min(limits::CHECK_WINDOW) as usize, 0);
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
