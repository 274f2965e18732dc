//! `--check`: holds what landed against what is on disk, by another way than the one the bytes came.

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::place::{Digest, Tensor, Weights};
use crate::plan::{Factor, Plan};
use crate::source::SourceFile;

impl Weights {
    /// Reads every source tensor again, plainly, picks each rank's part out of it by index arithmetic over the
    /// declared cut (not the copies that the pipeline made), and compares the digests. Returns each rank's digest
    /// (xxh3-64 of the lines `name dtype shape digest` sorted by name; aliases do not count).
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] naming tensor and rank; errors of the files.
    pub fn check(&self) -> Result<Vec<(Rank, u64)>> {
        let plan = self.plan();
        let mut digests = Vec::new();
        for &rank in plan.world().driven() {
            let mut lines = String::new();
            for tensor in self.of_rank(rank) {
                let dest = &plan.rank(rank).dests[tensor.position()];
                if plan.params()[dest.param as usize].alias_of.is_some() {
                    continue;
                }
                let landed = Digest::of(tensor.as_bytes());
                let expected = expected(plan, rank, tensor)?;
                if landed != expected {
                    return Err(Error::new(ErrorKind::Mismatch, "what landed is not what is on disk")
                        .with_expected(format!("digest {expected:016x}"), format!("digest {landed:016x}"))
                        .with_tensor(tensor.name())
                        .with_rank(rank));
                }
                use std::fmt::Write;
                let _ = writeln!(lines, "{} {} {} {landed:016x}", tensor.name(), tensor.dtype(), tensor.shape());
            }
            digests.push((rank, xxhash_rust::xxh3::xxh3_64(lines.as_bytes())));
        }
        Ok(digests)
    }
}

/// The digest that the file says this destination should have.
fn expected(plan: &Plan, rank: Rank, tensor: &Tensor) -> Result<u64> {
    let mut part = Vec::with_capacity(tensor.nbytes());
    if tensor.nbytes() > 0 {
        let leaf = plan.leaf(rank, tensor.position())?;
        let meta = plan.tensor(leaf.tensor);
        let file = plan.file(meta.file);
        let source = SourceFile::open(&file.path)?;
        source.verify_identity(file.identity)?;
        let mut whole = vec![0; meta.bytes() as usize];
        source.read_exact_at(&mut whole, meta.start).map_err(|error| error.with_tensor(&meta.name))?;
        gather(&leaf.factors, u64::from(meta.dtype.bits()), 0, &whole, &mut part);
    }
    Ok(Digest::of(&part))
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
