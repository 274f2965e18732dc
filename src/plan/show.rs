//! A plan for people: its sizes, a table, and the story of one tensor.

use std::fmt::{self, Write};

use super::audit::{fills, pieces};
use super::cover::{Covered, cover};
use super::expr::list;
use super::uses::Uses;
use super::who::Who;
use super::{BoxCopy, BoxFill, Inner, Plan, RankPlan, ReadExtent, ReadOrder};
use crate::cast::Cast;
use crate::error::{Error, ErrorKind, OneLine, Result};
use crate::extent::Rank;

impl Plan {
    /// Bytes of all destinations of a rank, whichever process drives it; an alias has none.
    ///
    /// # Panics
    /// If the world has no such rank, as [`rank`](Plan::rank).
    pub fn bytes_on(&self, rank: Rank) -> u64 {
        self.rank(rank).dests.iter().map(|dest| dest.bytes).sum()
    }

    /// Bytes of the checkpoint that at least one of these ranks wants. A rank outside the world wants nothing.
    pub fn needed_bytes(&self, ranks: &[Rank]) -> u64 {
        let Inner { checkpoint, ranks: all, .. } = &*self.inner;
        let tensors = checkpoint.tensors();
        let asked = all.iter().filter(|partition| ranks.contains(&partition.rank));
        let uses = Uses::new(tensors.len(), asked).expect("bug in shardlift: some ranks have more pieces than all");
        let mut needed = 0;
        for (tensor, meta) in (0..).zip(tensors) {
            let pieces = uses.of(tensor).iter().map(|of| &all[of.rank.index()].pieces[of.piece as usize]);
            let set = pieces.map(|copy| copy.source(meta.start)).collect();
            let regular = cover(set, meta.bytes(), &mut |Covered { from, to, repeats, times }| {
                if times.are > 0 {
                    needed += (to - from) * repeats;
                }
            });
            debug_assert!(regular.is_some(), "bug in shardlift: the audit covered the same pieces");
        }
        needed
    }

    /// Bytes that this process reads from storage, before any padding that an engine adds.
    pub fn storage_bytes(&self) -> u64 {
        self.own_extents().map(ReadExtent::bytes).sum()
    }

    /// The extents that this process reads.
    fn own_extents(&self) -> impl Iterator<Item = &ReadExtent> {
        self.extents().iter().filter(|extent| self.world().drives(extent.reader))
    }

    /// What happens to one tensor, as a few lines of text: `name` is a destination, or a tensor of the checkpoint.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is neither.
    pub fn explain(&self, name: &str) -> Result<String> {
        let Inner { checkpoint, rules, placed, params, declared, ranks, .. } = &*self.inner;
        let tensor = checkpoint.position(name).map(|position| position as u32);
        let param = match params.binary_search_by(|param| param.name.as_str().cmp(name)) {
            Ok(param) => Some(param as u32),
            Err(_) => declared.iter().find(|entry| Some(entry.tensor) == tensor).map(|entry| entry.param),
        };
        let mut text = String::new();
        let Some(param) = param else {
            if tensor.is_none() {
                return Err(Error::new(ErrorKind::NotFound, "no such tensor or destination").with_tensor(name));
            }
            _ = writeln!(text, "{}: skipped on every rank", OneLine(name));
            return Ok(text);
        };
        let alias_of = params[param as usize].alias_of;
        let Ok(entry) = declared.binary_search_by_key(&alias_of.unwrap_or(param), |entry| entry.param) else {
            unreachable!("bug in shardlift: parameter without a source")
        };
        let entry = &declared[entry];
        let meta = self.tensor(entry.tensor);
        let (file, from) = (OneLine(&self.file(meta.file).name), OneLine(&meta.name));
        _ = writeln!(text, "{}: {} {}", OneLine(&params[param as usize].name), meta.dtype, meta.shape);
        _ = writeln!(text, "  from {from} in {file}, bytes {}..{}", meta.start, meta.end);
        if !entry.named.is_empty() {
            _ = writeln!(text, "  and from {} more tensors", entry.named.len());
        }
        _ = writeln!(text, "  by rule `{}`", OneLine(rules.pattern(placed[entry.placed as usize].rule)));
        let holds = |rank: &&RankPlan| rank.dests.binary_search_by_key(&param, |dest| dest.param).ok();
        if let Some((rank, dest)) = ranks.iter().find_map(|rank| Some((rank.rank, holds(&rank)?))) {
            for leaf in self.form(rank, dest)?.leaves().filter(|leaf| !leaf.order.is_sorted()).take(1) {
                _ = writeln!(text, "  permuted to {}", list(&leaf.order));
            }
        }
        if let Some(Cast { from, to }) = params[param as usize].cast {
            _ = writeln!(text, "  cast from {from} to {to}");
        }
        if let Some(original) = alias_of {
            _ = writeln!(text, "  shares the memory of {}", OneLine(&params[original as usize].name));
        }
        if tensor.is_some_and(|tensor| declared.iter().all(|entry| entry.tensor != tensor)) {
            _ = writeln!(text, "  the checkpoint's tensor of this name is skipped");
        }
        for rank in ranks {
            let Ok(dest) = rank.dests.binary_search_by_key(&param, |dest| dest.param) else { continue };
            let dest = &rank.dests[dest];
            _ = writeln!(text, "  rank {}: {}, {} bytes", rank.rank, dest.shape, dest.bytes);
            let copies = pieces(rank, dest);
            for copy in &copies[..copies.len().min(SHOWN)] {
                _ = writeln!(text, "    {copy}");
            }
            for fill in fills(rank, dest) {
                _ = writeln!(text, "    {fill}");
            }
            if copies.len() > SHOWN {
                _ = writeln!(text, "    and {} more", copies.len() - SHOWN);
            }
        }
        Ok(text)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { checkpoint, world, params, declared, ranks, order, digest, .. } = &*self.inner;
        writeln!(f, "plan {digest:016x}: {} over {} ranks", checkpoint.path().display(), ranks.len())?;
        writeln!(f, "  mesh        {}", world.mesh())?;
        let aliases = params.iter().filter(|param| param.alias_of.is_some()).count();
        let skipped = match checkpoint.tensors().len() - declared.len() {
            0 => String::new(),
            skipped => format!(", {skipped} of them skipped"),
        };
        writeln!(
            f,
            "  checkpoint  {} in {} file{}, {} tensors{skipped}; {} destinations, {aliases} of them aliases",
            Size(checkpoint.bytes()),
            checkpoint.files().len(),
            if checkpoint.files().len() == 1 { "" } else { "s" },
            checkpoint.tensors().len(),
            params.len(),
        )?;
        let reads = self.own_extents().count();
        let by = match order {
            ReadOrder::File => "file",
            ReadOrder::Layer => "layer",
        };
        writeln!(
            f,
            "  storage     {} read by this process in {reads} extents, {} needed, by {by}",
            Size(self.storage_bytes()),
            Size(self.needed_bytes(world.driven())),
        )?;
        let who = Who::of(self);
        let coordinates = who.header();
        writeln!(f, "  {:>4}  {:>10}  {:>8}  {:>8}{coordinates}", "rank", "bytes", "tensors", "pieces")?;
        for rank in ranks {
            let here = if world.drives(rank.rank) { "" } else { "  elsewhere" };
            let bytes = Size(self.bytes_on(rank.rank)).to_string();
            let (tensors, pieces, who) = (rank.dests.len(), rank.pieces.len(), who.row(rank.rank));
            writeln!(f, "  {:>4}  {bytes:>10}  {tensors:>8}  {pieces:>8}{who}{here}", rank.rank)?;
        }
        Ok(())
    }
}

impl fmt::Display for BoxCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file byte {} -> {}: ", self.src, self.dst)?;
        for inner in &self.destination_loops() {
            write!(f, "{} x (+{} -> +{}) ", inner.count, inner.src_stride, inner.dst_stride)?;
        }
        write!(f, "{} bytes", self.run)
    }
}

impl fmt::Display for BoxFill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "filled -> {}: ", self.dst)?;
        for (count, stride) in &self.loops {
            write!(f, "{count} x (+{stride}) ")?;
        }
        write!(f, "{} bytes of ", self.run)?;
        self.element.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Bytes with a decimal prefix.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes @ ..1_000 => write!(f, "{bytes} B"),
            bytes @ ..1_000_000 => write!(f, "{:.1} kB", bytes as f64 / 1e3),
            bytes @ ..1_000_000_000 => write!(f, "{:.1} MB", bytes as f64 / 1e6),
            bytes => write!(f, "{:.2} GB", bytes as f64 / 1e9),
        }
    }
}

/// Pieces of one destination that `explain` prints.
const SHOWN: usize = 8;
