//! Which ranks hold each parameter: sets of ranks, each of them once.

use std::collections::HashMap;
use std::ops::Range;

use smallvec::SmallVec;

use super::rules::{Owner, Pipeline, Rule, Rules, Stage};
use super::world::{Ax, Mesh};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

/// Sets of ranks; a set is named by its position.
#[derive(Debug, Clone)]
pub(super) struct Holders {
    sets: Vec<Set>,
}

#[derive(Debug, Clone)]
struct Set {
    bits: SmallVec<[u64; 1]>,
    count: u32,
}

/// Makes the sets that rules ask for.
pub(super) struct HolderMaker<'a> {
    rules: &'a Rules,
    mesh: Mesh,
    /// The layers of each stage, where rules have a pipeline.
    stages: Vec<Range<u64>>,
    known: HashMap<Key, u32>,
    holders: Holders,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    /// Position of a rule; `None` for an alias, which has only stages.
    rule: Option<u32>,
    stages: On,
    /// Which one of several like tensors it is.
    number: Option<u64>,
}

/// Pipeline stages.
#[derive(PartialEq, Eq, Hash)]
enum On {
    All,
    One(u32),
    Ends,
    Listed(Vec<u32>),
}

impl Holders {
    /// Whether `rank` is in a set.
    pub(super) fn has(&self, set: u32, rank: Rank) -> bool {
        self.sets[set as usize].bits[rank.index() / 64] >> (rank.0 % 64) & 1 == 1
    }

    /// How many ranks are in a set.
    pub(super) fn count(&self, set: u32) -> u32 {
        self.sets[set as usize].count
    }

    /// Whether all ranks of `set` are in `other`.
    pub(super) fn are_in(&self, set: u32, other: u32) -> bool {
        let bits = |set: u32| self.sets[set as usize].bits.iter();
        bits(set).zip(bits(other)).all(|(set, other)| set & !other == 0)
    }
}

impl<'a> HolderMaker<'a> {
    pub(super) fn new(rules: &'a Rules, mesh: Mesh) -> Result<HolderMaker<'a>> {
        let stages = match &rules.pipeline {
            Some(Pipeline { layers: Some(layers), how, .. }) if mesh.pp > 1 => how.stages(*layers, mesh.pp)?,
            Some(Pipeline { layers: None, .. }) if mesh.pp > 1 => {
                return Err(Error::new(
                    ErrorKind::Rules,
                    "nothing says how many layers there are to divide into stages",
                )
                .with_rule("stages")
                .with_expected("1 stage", mesh.pp));
            }
            _ => Vec::new(),
        };
        Ok(HolderMaker { rules, mesh, stages, known: HashMap::new(), holders: Holders { sets: Vec::new() } })
    }

    pub(super) fn finish(self) -> Holders {
        self.holders
    }

    /// The ranks that hold what a rule places: `subject` is what its pattern matched of the tensor's name.
    pub(super) fn of_rule(&mut self, rule: u32, name: &str, subject: &str) -> Result<u32> {
        let Rule { stage, among, .. } = &self.rules.rules[rule as usize];
        let stages = match (stage, &self.rules.pipeline) {
            (Some(stage), _) => self.on(stage)?,
            (None, Some(pipeline)) if !self.stages.is_empty() => match pipeline.layer(name)? {
                Some(layer) => {
                    let stage = self.stages.iter().position(|layers| layers.contains(&layer));
                    On::One(stage.expect("bug in shardlift: a layer of no stage") as u32)
                }
                None if pipeline.is_strict => {
                    return Err(Error::new(ErrorKind::Rules, "nothing says on which stage this is")
                        .with_rule("stages")
                        .with_expected(format!("a tensor of `{}`", pipeline.text()), format!("`{name}`"))
                        .with_tensor(name));
                }
                None => On::All,
            },
            _ => On::All,
        };
        let number = match among {
            Some(among) => Some(self.rules.rules[rule as usize].number(among, subject)?.0),
            None => None,
        };
        self.set(Key { rule: Some(rule), stages, number })
    }

    /// The ranks of a stage.
    pub(super) fn of_stage(&mut self, stage: &Stage) -> Result<u32> {
        let stages = self.on(stage)?;
        self.set(Key { rule: None, stages, number: None })
    }

    /// The ranks of an owner, whatever their stage.
    pub(super) fn of_owner(&mut self, owner: &Owner) -> Result<u32> {
        if *owner == Owner::All {
            return self.of_stage(&Stage::All);
        }
        self.add(|maker, rank| owner.has(maker.mesh, rank))
    }

    fn on(&self, stage: &Stage) -> Result<On> {
        Ok(match stage {
            Stage::First => On::One(0),
            Stage::Last => On::One(self.mesh.pp - 1),
            Stage::Ends => On::Ends,
            Stage::All => On::All,
            Stage::Listed(stages) => match stages.iter().find(|&&stage| stage >= self.mesh.pp) {
                None => On::Listed(stages.clone()),
                Some(beyond) => {
                    return Err(Error::new(ErrorKind::Rules, "there is no such stage")
                        .with_rule("stages")
                        .with_expected(format!("stages below {}", self.mesh.pp), beyond));
                }
            },
        })
    }

    fn set(&mut self, key: Key) -> Result<u32> {
        if let Some(&set) = self.known.get(&key) {
            return Ok(set);
        }
        let at = self.add(|maker, rank| maker.holds(&key, rank))?;
        self.known.insert(key, at);
        Ok(at)
    }

    /// A set of the ranks that are in it.
    fn add(&mut self, has: impl Fn(&Self, Rank) -> Result<bool>) -> Result<u32> {
        let size = self.mesh.size();
        let mut set = Set { bits: SmallVec::from_elem(0, (size as usize).div_ceil(64)), count: 0 };
        for rank in (0..size).map(Rank) {
            if has(self, rank)? {
                set.bits[rank.index() / 64] |= 1 << (rank.0 % 64);
                set.count += 1;
            }
        }
        let at = self.holders.sets.len() as u32;
        self.holders.sets.push(set);
        Ok(at)
    }

    fn holds(&self, key: &Key, rank: Rank) -> Result<bool> {
        let stage = self.mesh.coordinate(rank, Ax::Pp);
        let here = match &key.stages {
            On::All => true,
            On::One(one) => stage == *one,
            On::Listed(stages) => stages.contains(&stage),
            On::Ends => stage == 0 || stage == self.mesh.pp - 1,
        };
        let Some(rule) = key.rule else { return Ok(here) };
        let Rule { placement, among, .. } = &self.rules.rules[rule as usize];
        let owns = placement.owner().map_or(Ok(true), |owner| owner.has(self.mesh, rank))?;
        let has = match (among, key.number) {
            (Some(among), Some(number)) => {
                among.cut.take(among.count(), self.mesh, rank)?.iter().any(|run| run.has(number))
            }
            _ => true,
        };
        Ok(here && owns && has)
    }
}
