//! `--check`: holds what landed against what is on disk, by another way than the one the bytes came.

use std::fmt::Write;

use rayon::prelude::*;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::place::{Digest, Tensor, Weights};
use crate::plan::{Factor, Leaf, Plan};
use crate::source::SourceFile;

impl Weights {
    /// Reads every source tensor once more, plainly, picks each rank's part out of it by index arithmetic over the
    /// declared cut (not the copies that the pipeline made), and compares the digests. Returns each rank's digest
    /// (xxh3-64 of the lines `name dtype shape digest` sorted by name; aliases do not count). Needs memory for one
    /// source tensor and its parts.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] naming tensor and rank; errors of the files.
    pub fn check(&self) -> Result<Vec<(Rank, u64)>> {
        let plan = self.plan();
        let mut lines = vec![String::new(); plan.world().size() as usize];
        let original = |tensor: &&Tensor| plan.params()[tensor.param_position()].alias_of.is_none();
        let mut tensors: Vec<&Tensor> = self.iter().filter(original).collect();
        tensors.sort_by_key(|tensor| (tensor.param_position(), tensor.rank()));
        for ranks in tensors.chunk_by(|a, b| a.param_position() == b.param_position()) {
            let digests = check_ranks(plan, ranks)?;
            for (tensor, digest) in ranks.iter().zip(digests) {
                let line = &mut lines[tensor.rank().index()];
                let _ = writeln!(line, "{} {} {} {digest:016x}", tensor.name(), tensor.dtype(), tensor.shape());
            }
        }
        let digest = |rank: &Rank| (*rank, xxhash_rust::xxh3::xxh3_64(lines[rank.index()].as_bytes()));
        Ok(plan.world().driven().iter().map(digest).collect())
    }
}

/// The digests of what landed of one destination on several ranks, all as the files say.
fn check_ranks(plan: &Plan, ranks: &[&Tensor]) -> Result<Vec<u64>> {
    let mut parts = Vec::new();
    let mut sources: Vec<(u32, Vec<u8>)> = Vec::new();
    for tensor in ranks {
        let leaf = plan.leaf(tensor.rank(), tensor.position())?;
        if tensor.nbytes() > 0 && sources.iter().all(|(source, _)| *source != leaf.tensor) {
            sources.push((leaf.tensor, read(plan, leaf.tensor)?));
        }
        parts.push((*tensor, leaf));
    }
    parts.par_iter().map(|(tensor, leaf)| check_part(plan, &sources, tensor, leaf)).collect()
}

/// All bytes of a source tensor.
fn read(plan: &Plan, tensor: u32) -> Result<Vec<u8>> {
    let meta = plan.tensor(tensor);
    let planned = plan.file(meta.file);
    let mut bytes = vec![0; meta.bytes() as usize];
    SourceFile::reopen(&planned.path, planned.identity)
        .and_then(|file| file.read_exact_at(&mut bytes, meta.start))
        .map_err(|error| error.with_tensor(&meta.name))?;
    Ok(bytes)
}

fn check_part(plan: &Plan, sources: &[(u32, Vec<u8>)], tensor: &Tensor, leaf: &Leaf) -> Result<u64> {
    let mut part = Vec::with_capacity(tensor.nbytes());
    if let Some((_, whole)) = sources.iter().find(|(source, _)| *source == leaf.tensor) {
        gather(&leaf.factors, u64::from(plan.tensor(leaf.tensor).dtype.bits()), 0, whole, &mut part);
    }
    let (expected, landed) = (Digest::of(&part), Digest::of(tensor.as_bytes()));
    if landed == expected && part.len() == tensor.nbytes() {
        return Ok(landed);
    }
    Err(Error::new(ErrorKind::Mismatch, "what landed is not what is on disk")
        .with_expected(format!("digest {expected:016x}"), format!("digest {landed:016x}"))
        .with_tensor(tensor.name())
        .with_rank(tensor.rank()))
}

/// Appends the elements that `factors` take of a row-major tensor, from the element index `base` on.
fn gather(factors: &[Factor], bits: u64, base: u64, whole: &[u8], part: &mut Vec<u8>) {
    let Some((factor, inner)) = factors.split_first() else {
        part.extend_from_slice(&whole[(base * bits / 8) as usize..((base + 1) * bits / 8) as usize]);
        return;
    };
    let inner_elements: u64 = inner.iter().map(|factor| factor.size).product();
    if inner.is_empty() && factor.step == 1 {
        let first = base + factor.start;
        part.extend_from_slice(&whole[(first * bits / 8) as usize..((first + factor.len) * bits / 8) as usize]);
        return;
    }
    for i in 0..factor.len {
        gather(inner, bits, base + (factor.start + i * factor.step) * inner_elements, whole, part);
    }
}
