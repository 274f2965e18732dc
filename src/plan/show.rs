//! A plan for people: its sizes, and a line for each rank.

use std::fmt;

use super::report::Size;
use super::who::Who;
use super::{BoxCopy, BoxFill, Inner, Plan, ReadOrder};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { checkpoint, world, params, declared, ranks, order, digest, .. } = &*self.inner;
        writeln!(f, "plan {digest:016x}: {} over {} ranks", checkpoint.path().display(), ranks.len())?;
        writeln!(f, "  mesh        {}", world.mesh())?;
        let aliases = params.iter().filter(|param| param.alias_of.is_some()).count();
        let mut is_used = vec![false; checkpoint.tensors().len()];
        for entry in declared {
            entry.named.iter().chain([&entry.tensor]).for_each(|&tensor| is_used[tensor as usize] = true);
        }
        let skipped = match is_used.iter().filter(|used| !**used).count() {
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
            "  storage     {} asked for by this process in {reads} extents, {} needed, by {by}",
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
