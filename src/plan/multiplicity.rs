//! How many ranks each byte of the checkpoint goes to, counted on the plan's pieces and not taken from its rules.

use std::collections::BTreeMap;
use std::fmt;

use super::cover::cover;
use super::report::{Size, class_of};
use super::rules::Placement;
use super::uses::Uses;
use super::{Inner, Plan};
use crate::error::OneLine;

/// How often the ranks together hold the bytes of one class of tensors, as the audit counts them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Multiplicity {
    /// The class: the tensors' name with `*` for segments that are whole numbers.
    pub class: String,
    /// How many tensors of the checkpoint are of it.
    pub tensors: u64,
    /// How many ranks hold some of it, of the tensor that most ranks hold.
    pub holders: u32,
    /// Ranks of the world.
    pub ranks: u32,
    /// How many bytes are held how often, ascending: (times, bytes).
    pub bytes: Vec<(u64, u64)>,
    /// The patterns of rules that skip tensors of it.
    pub skipped_by: Vec<String>,
    /// Whether there are tensors of it that a filter leaves out.
    pub filtered: bool,
}

impl Plan {
    /// How often the ranks hold the bytes of every class of tensors of the checkpoint, by name.
    pub fn multiplicities(&self) -> Vec<Multiplicity> {
        let Inner { checkpoint, ranks, .. } = &*self.inner;
        let tensors = checkpoint.tensors();
        let uses = Uses::new(tensors.len(), ranks.iter()).expect("bug in shardlift: the plan was made of these pieces");
        let mut classes = BTreeMap::<String, Counting>::new();
        for (tensor, meta) in (0..).zip(tensors) {
            let Counting { class, bytes } = classes.entry(class_of(&meta.name)).or_default();
            class.tensors += 1;
            let pieces = uses.of(tensor);
            let holders = pieces.chunk_by(|a, b| a.rank == b.rank).count() as u32;
            class.holders = class.holders.max(holders);
            let set = pieces.iter().map(|of| self.copy(of).source(meta.start)).collect();
            let regular = cover(set, meta.bytes(), &mut |range| {
                *bytes.entry(range.times.are).or_default() += (range.to - range.from) * range.repeats;
            });
            debug_assert!(regular.is_some(), "bug in shardlift: the audit covered the same pieces");
            if pieces.is_empty() && meta.bytes() > 0 {
                match self.skipped_by(&meta.name) {
                    Some(pattern) if class.skipped_by.iter().all(|known| known != pattern) => {
                        class.skipped_by.push(pattern.to_owned());
                    }
                    Some(_) => {}
                    None => class.filtered = true,
                }
            }
        }
        let done = |(class, counting): (String, Counting)| {
            let bytes = counting.bytes.into_iter().collect();
            Multiplicity { class, ranks: ranks.len() as u32, bytes, ..counting.class }
        };
        classes.into_iter().map(done).collect()
    }

    /// The pattern of the rule that skips a tensor; `None` if none does.
    pub(super) fn skipped_by(&self, name: &str) -> Option<&str> {
        let rules = &self.inner.rules;
        let rule = rules.first_match(name)?;
        matches!(rules.rules[rule as usize].placement, Placement::Skip).then(|| rules.pattern(rule))
    }
}

/// A class while it is counted.
#[derive(Default)]
struct Counting {
    class: Multiplicity,
    bytes: BTreeMap<u64, u64>,
}

impl Multiplicity {
    /// What it means that bytes are held so often, in words.
    pub fn meaning(&self, times: u64) -> String {
        match times {
            0 => match (&self.skipped_by[..], self.filtered) {
                ([], true) => "left out by a filter".into(),
                ([], false) => "left out by its rule".into(),
                (patterns, filtered) => {
                    let quoted: Vec<String> = patterns.iter().map(|it| format!("`{}`", OneLine(it))).collect();
                    let more = if filtered { " and a filter" } else { "" };
                    format!("skipped by {}{more}", quoted.join(", "))
                }
            },
            1 if self.ranks == 1 => "on the only rank".into(),
            1 if self.holders == 1 => "on one rank".into(),
            1 => format!("sharded over {} ranks", self.holders),
            _ if times == u64::from(self.ranks) => format!("replicated on all {times} ranks"),
            _ if times == u64::from(self.holders) => format!("replicated on {times} ranks"),
            _ if times > u64::from(self.holders) => format!("repeated on {} ranks", self.holders),
            _ => format!("each part shared by {times} ranks"),
        }
    }
}

/// A line of a table: how many tensors of which class, and for each multiplicity the bytes.
impl fmt::Display for Multiplicity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>7}  {}: ", self.tensors, OneLine(&self.class))?;
        for (at, &(times, bytes)) in self.bytes.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            write!(f, "{comma}{{{times}}} {} {}", Size(bytes), self.meaning(times))?;
        }
        if self.bytes.is_empty() {
            f.write_str("no bytes")?;
        }
        Ok(())
    }
}
