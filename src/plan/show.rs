//! A plan for people: its sizes, and a line for each rank.

use std::fmt;

use super::report::Size;
use super::who::Who;
use super::{BoxCopy, BoxFill, Inner, Plan, Processes, ReadOrder};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { checkpoint, world, params, ranks, order, digest, .. } = &*self.inner;
        writeln!(f, "plan {digest:016x}: {} over {} ranks", checkpoint.path().display(), ranks.len())?;
        writeln!(f, "  mesh        {}", world.mesh())?;
        let aliases = params.iter().filter(|param| param.alias_of.is_some()).count();
        let skipped = match self.skipped() {
            (0, _) => String::new(),
            (skipped, bytes) => format!(", {skipped} of them skipped ({})", Size(bytes)),
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
        let whose = match world.processes() {
            Processes::PerRank if world.driven().len() > 1 => "all processes",
            _ => "this process",
        };
        let by = match order {
            ReadOrder::File => "file",
            ReadOrder::Layer => "layer",
        };
        writeln!(
            f,
            "  storage     {} asked for by {whose} in {reads} extents, {} needed, by {by}",
            Size(self.storage_bytes()),
            Size(self.needed_bytes(world.driven())),
        )?;
        let who = Who::of(self);
        let coordinates = who.header();
        let traffic = self.traffic();
        let passes = traffic.iter().any(|of| of.sent_bytes > 0);
        let columns = |sent: &str, received: &str| match passes {
            true => format!("  {sent:>10}  {received:>10}"),
            false => String::new(),
        };
        let (passed, head) = (columns("sent", "received"), ["rank", "bytes", "tensors", "pieces"]);
        writeln!(f, "  {:>4}  {:>10}  {:>8}  {:>8}{passed}{coordinates}", head[0], head[1], head[2], head[3])?;
        for (rank, traffic) in ranks.iter().zip(&traffic) {
            let [sent, received] = [traffic.sent_bytes, traffic.received_bytes].map(|bytes| Size(bytes).to_string());
            let passed = columns(&sent, &received);
            let here = if world.drives(rank.rank) { "" } else { "  elsewhere" };
            let bytes = Size(self.bytes_on(rank.rank)).to_string();
            let (tensors, pieces, who) = (rank.dests.len(), rank.pieces.len(), who.row(rank.rank));
            writeln!(f, "  {:>4}  {bytes:>10}  {tensors:>8}  {pieces:>8}{passed}{who}{here}", rank.rank)?;
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
