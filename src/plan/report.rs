//! The sizes of a plan: what its process wants, reads and copies, tensor class by tensor class.

use std::collections::BTreeMap;
use std::fmt;
use std::iter;

use smallvec::SmallVec;

use super::cover::{Covered, Strided, cover};
use super::lowering::{Lowering, Reading};
use super::uses::Uses;
use super::{Consumer, Inner, Plan, ReadExtent, Traffic};
use crate::checkpoint::{CheckpointFile, TensorMeta};
use crate::error::OneLine;
use crate::extent::Rank;
use crate::limits::{DEVICE_SLOT, STAGING};

/// What the process of a plan wants, reads and copies. Bytes are those of the file.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct PlanReport {
    /// Bytes of the checkpoint that at least one of this process's ranks wants.
    pub needed_bytes: u64,
    /// Bytes that storage moves for them. What is read in pieces takes whole pages of 4 KiB.
    pub read_bytes: u64,
    /// Ranges of files that are read, before an engine cuts long ones and joins neighbours.
    pub reads: u64,
    /// Copies into destinations.
    pub pieces: u64,
    /// Kernels that GPUs would have to run: for casts, transposes, and what is too deep a cut for their copy engines.
    pub launches: u64,
    /// Most bytes of the staging ring that a load into GPUs fills at a time, with the default budget.
    pub peak_staging_bytes: u64,
    /// Bytes of the destinations of the rank of this process that has most.
    pub most_landed_bytes: u64,
    /// Bytes that the ranks of this process send to others that they read together with, as [`Plan::traffic`] counts.
    pub sent_bytes: u64,
    /// Bytes that they receive.
    pub received_bytes: u64,
    /// Bytes that go from the host to the device of one of its ranks, at most.
    most_linked_bytes: u64,
    /// Bytes of the tensors that no destination is made of, on whatever rank.
    pub skipped_bytes: u64,
    /// What the reads cost, in bytes that storage could have moved instead: a piece costs at least
    /// [`READ_COST`](crate::limits::READ_COST).
    pub cost_bytes: u64,
    /// The classes of tensors that are read, by name.
    pub classes: Vec<ClassReport>,
}

/// The same of one class of tensors: those whose names differ only in segments that are whole numbers.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct ClassReport {
    /// The name, with `*` for these segments.
    pub class: String,
    /// How many tensors of it are read.
    pub tensors: u64,
    /// As in [`PlanReport`].
    pub needed_bytes: u64,
    /// As in [`PlanReport`].
    pub read_bytes: u64,
    /// As in [`PlanReport`].
    pub reads: u64,
    /// As in [`PlanReport`].
    pub pieces: u64,
    /// As in [`PlanReport`].
    pub launches: u64,
    /// What its copies are, each kind once.
    pub lowering: Vec<Lowering>,
    /// How it is read, each way once.
    pub reading: Vec<Reading>,
}

impl Plan {
    /// What this process wants, reads and copies.
    pub fn report(&self) -> PlanReport {
        let mut classes = BTreeMap::<String, ClassReport>::new();
        let mut report = PlanReport::default();
        let own: Vec<&ReadExtent> = self.extents().iter().filter(|extent| self.concerns(extent)).collect();
        // The extents of a tensor are neighbours in every order of reads.
        for of_tensor in own.chunk_by(|a, b| a.tensor == b.tensor) {
            let class = class_of(&self.tensor(of_tensor[0].tensor).name);
            let entry = classes.entry(class).or_default();
            let tensor = self.of_extents(of_tensor);
            let own = of_tensor.iter().filter(|extent| self.world().drives(extent.reader));
            report.cost_bytes += own.map(|extent| extent.cost()).sum::<u64>();
            entry.add(tensor);
        }
        for (class, mut entry) in classes {
            report.needed_bytes += entry.needed_bytes;
            report.read_bytes += entry.read_bytes;
            report.reads += entry.reads;
            report.pieces += entry.pieces;
            report.launches += entry.launches;
            entry.class = class;
            report.classes.push(entry);
        }
        let slots = report.read_bytes.div_ceil(DEVICE_SLOT as u64).saturating_mul(DEVICE_SLOT as u64);
        report.peak_staging_bytes = slots.min(STAGING as u64);
        let landed = self.world().driven().iter().map(|&rank| self.bytes_on(rank));
        report.most_landed_bytes = landed.max().unwrap_or(0);
        let traffic = self.traffic();
        for &rank in self.world().driven() {
            let Traffic { sent_bytes, received_bytes, packed_bytes } = traffic[rank.index()];
            report.sent_bytes += sent_bytes;
            report.received_bytes += received_bytes;
            let linked = self.bytes_on(rank).saturating_sub(received_bytes) + packed_bytes;
            report.most_linked_bytes = report.most_linked_bytes.max(linked);
        }
        report.skipped_bytes = self.skipped().1;
        report
    }

    /// What these extents of one tensor are for its class.
    pub(super) fn of_extents(&self, extents: &[&ReadExtent]) -> ClassReport {
        let mut report = ClassReport { tensors: 1, ..ClassReport::default() };
        let Some(first) = extents.first() else { return report };
        let mut consumers = SmallVec::<[&Consumer; 8]>::new();
        for extent in extents {
            if self.world().drives(extent.reader) {
                report.read_bytes += extent.paged_bytes();
                report.reads += extent.reads();
            }
            report.reading.push(self.reading(extent));
            consumers.extend(self.consumers(extent).iter().filter(|consumer| self.world().drives(consumer.rank)));
        }
        if extents.iter().any(|extent| self.is_shared(extent)) {
            // A piece is in every stripe of its tensor.
            consumers.sort_unstable_by_key(|consumer| (consumer.rank, consumer.piece));
            consumers.dedup_by_key(|consumer| (consumer.rank, consumer.piece));
        }
        let meta = self.tensor(first.tensor);
        let mut wanted = SmallVec::new();
        for copy in consumers.into_iter().map(|consumer| self.copy(consumer)) {
            report.pieces += 1;
            report.launches += copy.launches();
            report.lowering.push(self.lowering(copy));
            wanted.push(copy.source(meta.start));
        }
        report.needed_bytes = union(meta, wanted);
        report
    }

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
        let needed = |(tensor, meta): (u32, &TensorMeta)| {
            union(meta, uses.of(tensor).iter().map(|of| self.copy(of).source(meta.start)).collect())
        };
        (0..).zip(tensors).map(needed).sum()
    }

    /// Tensors that no destination is made of, and their bytes: rules and filters leave them out, or no request names
    /// them.
    pub fn skipped(&self) -> (usize, u64) {
        let Inner { checkpoint, declared, .. } = &*self.inner;
        let mut is_used = vec![false; checkpoint.tensors().len()];
        for entry in declared {
            entry.named.iter().chain(&entry.tensor).for_each(|&tensor| is_used[tensor as usize] = true);
        }
        let skipped = checkpoint.tensors().iter().zip(is_used).filter(|(_, used)| !used);
        skipped.fold((0, 0), |(count, bytes), (tensor, _)| (count + 1, bytes + tensor.bytes()))
    }

    /// Bytes that this process reads from storage, before any padding that an engine adds.
    pub fn storage_bytes(&self) -> u64 {
        self.own_extents().map(ReadExtent::bytes).sum()
    }

    /// The file that this process reads first, if it reads any bytes.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "asked for cuFile only"))]
    pub(crate) fn first_read(&self) -> Option<&CheckpointFile> {
        self.own_extents().find(|extent| extent.bytes() > 0).map(|extent| self.file(extent.file))
    }

    /// Whether this process reads some of an extent, or wants some.
    pub(super) fn concerns(&self, extent: &ReadExtent) -> bool {
        let wants = |consumer: &Consumer| self.world().drives(consumer.rank);
        self.world().drives(extent.reader) || self.consumers(extent).iter().any(wants)
    }

    /// The extents that this process reads.
    pub(super) fn own_extents(&self) -> impl Iterator<Item = &ReadExtent> {
        self.extents().iter().filter(|extent| self.world().drives(extent.reader))
    }
}

impl PlanReport {
    /// Bytes read for each byte needed; 1 if nothing is.
    pub fn over_read(&self) -> f64 {
        over_read(self.read_bytes, self.needed_bytes)
    }

    /// Seconds of a load from storage of this rate over links of that one to each device, in GB/s: both work at the same
    /// time, so the slower decides. One that is not known takes no time; `None` if neither is.
    pub fn predicted_seconds(&self, storage: Option<f64>, link: Option<f64>) -> Option<f64> {
        let read = storage.map(|rate| self.cost_bytes as f64 / (rate * 1e9));
        let copy = link.map(|rate| self.most_linked_bytes as f64 / (rate * 1e9));
        read.into_iter().chain(copy).reduce(f64::max)
    }
}

impl ClassReport {
    /// Bytes read for each byte needed; 1 if nothing is.
    pub fn over_read(&self) -> f64 {
        over_read(self.read_bytes, self.needed_bytes)
    }

    pub(super) fn add(&mut self, other: ClassReport) {
        self.tensors += other.tensors;
        self.needed_bytes += other.needed_bytes;
        self.read_bytes += other.read_bytes;
        self.reads += other.reads;
        self.pieces += other.pieces;
        self.launches += other.launches;
        once(&mut self.lowering, other.lowering);
        once(&mut self.reading, other.reading);
    }
}

/// A table: a line for the whole and one for each class.
impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, columns: [&str; 7], how: &str| {
            let [class, tensors, needed, read, over, reads, pieces] = columns;
            writeln!(f, "  {tensors:>7}  {needed:>9}  {read:>9}  {over:>5}  {reads:>9}  {pieces:>7}  {class}{how}")
        };
        line(f, ["class", "tensors", "needed", "read", "over", "reads", "pieces"], "")?;
        for of in &self.classes {
            let numbers = [of.tensors, of.reads, of.pieces].map(|number| number.to_string());
            let over = format!("{:.2}", of.over_read());
            let columns = [
                &*OneLine(&of.class).to_string(),
                &numbers[0],
                &Size(of.needed_bytes).to_string(),
                &Size(of.read_bytes).to_string(),
                &over,
                &numbers[1],
                &numbers[2],
            ];
            line(f, columns, &format!(": {}", of.how()))?;
        }
        let Self { needed_bytes, read_bytes, reads, pieces, launches, peak_staging_bytes, .. } = self;
        let plural = |count: u64, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        writeln!(
            f,
            "  needed {}, read {} in {}: over-read {:.2}",
            Size(*needed_bytes),
            Size(*read_bytes),
            plural(*reads, "range"),
            self.over_read(),
        )?;
        if self.sent_bytes + self.received_bytes > 0 {
            writeln!(f, "  sent to other processes {}, received {}", Size(self.sent_bytes), Size(self.received_bytes))?;
        }
        writeln!(
            f,
            "  {}; on GPUs {launches} kernel launches, and at most {} of staging",
            plural(*pieces, "piece"),
            Size(*peak_staging_bytes),
        )
    }
}

impl ClassReport {
    /// What its copies are and how it is read, in words.
    pub(super) fn how(&self) -> String {
        let words = |words: Vec<String>| words.join(" and ");
        let lowering = words(self.lowering.iter().map(ToString::to_string).collect());
        let reading = words(self.reading.iter().map(ToString::to_string).collect());
        let kernels = if self.launches > 0 { ", put in place by kernels on GPUs" } else { "" };
        format!("{lowering}, {reading}{kernels}")
    }
}

/// The class of a tensor: its name with `*` for segments that are whole numbers.
pub(super) fn class_of(name: &str) -> String {
    let mut class = String::with_capacity(name.len());
    for (at, segment) in name.split('.').enumerate() {
        class.extend(iter::once(".").filter(|_| at > 0));
        let number = !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit());
        class.push_str(if number { "*" } else { segment });
    }
    class
}

/// Bytes of a tensor that lie in at least one of these.
fn union(meta: &TensorMeta, wanted: SmallVec<[Strided; 8]>) -> u64 {
    if let [one] = &wanted[..] {
        return one.loops.iter().map(|&(count, _)| count).product::<u64>() * one.run;
    }
    let mut needed = 0;
    let regular = cover(wanted, meta.bytes(), &mut |Covered { from, to, repeats, times }| {
        if times.are > 0 {
            needed += (to - from) * repeats;
        }
    });
    debug_assert!(regular.is_some(), "bug in shardlift: the audit covered the same pieces");
    needed
}

fn over_read(read: u64, needed: u64) -> f64 {
    if needed == 0 { 1.0 } else { read as f64 / needed as f64 }
}

/// Adds those that are not there yet, in order.
fn once<T: Ord>(all: &mut Vec<T>, more: Vec<T>) {
    all.extend(more);
    all.sort_unstable();
    all.dedup();
}

/// Bytes with a decimal prefix.
pub(super) struct Size(pub(super) u64);

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_numbers_are_left_out_of_a_class() {
        for (name, class) in [
            ("model.layers.31.mlp.experts.255.w1.weight", "model.layers.*.mlp.experts.*.w1.weight"),
            ("h.0", "h.*"),
            ("a1.2b..3", "a1.2b..*"),
            ("", ""),
        ] {
            assert_eq!(class_of(name), class);
        }
    }
}
