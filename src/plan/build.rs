//! Makes a [`Plan`]: rules over the tensors -> parameters -> each rank's partition -> audit -> who reads what.

use std::sync::Arc;

use rayon::prelude::*;

use super::audit::{Declared, audit};
use super::digest::digest;
use super::extents::extents;
use super::leaf::Leaf;
use super::rules::{Owner, Placement, Rules, Verdict};
use super::world::World;
use super::{Dest, Inner, Param, Plan, RankPlan, ReadOrder};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

impl Plan {
    /// Plans the load of a checkpoint for all ranks of the world, reading by file and offset.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`] if the rules do not fit the checkpoint or the mesh: a tensor that no rule matches, a rule
    /// that matches none, a dimension that does not divide; with the tensor's name and both numbers.
    /// [`ErrorKind::Usage`] for a world without ranks. [`ErrorKind::Audit`] if the plan were to break an invariant.
    pub fn new(checkpoint: &Checkpoint, rules: &Rules, world: &World) -> Result<Plan> {
        Plan::with_order(checkpoint, rules, world, ReadOrder::default())
    }

    /// [`Plan::new`] with another order of reads.
    pub fn with_order(checkpoint: &Checkpoint, rules: &Rules, world: &World, order: ReadOrder) -> Result<Plan> {
        world.check()?;
        let builder = Builder { tensors: checkpoint.tensors(), rules, world };
        let (params, declared) = builder.params()?;
        let ranks: Vec<Result<RankPlan>> =
            (0..world.size()).into_par_iter().map(|rank| builder.rank(Rank(rank), &params, &declared)).collect();
        let ranks = ranks.into_iter().collect::<Result<Vec<_>>>()?;
        audit(checkpoint, &ranks, &declared)?;
        let (extents, consumers) = extents(checkpoint, world, &ranks, &declared, order)?;
        let digest = digest(checkpoint, world, &params, &ranks);
        Ok(Plan {
            inner: Arc::new(Inner {
                checkpoint: checkpoint.clone(),
                world: world.clone(),
                rules: rules.clone(),
                params,
                declared,
                ranks,
                extents,
                consumers,
                order,
                digest,
            }),
        })
    }

    /// One rank's part of a destination in normal form, lowered again from the rules: `dest` is a position in
    /// [`RankPlan::dests`]. An alias has the form of its original.
    ///
    /// # Errors
    /// None that making the plan would not have given.
    pub fn leaf(&self, rank: Rank, dest: usize) -> Result<Leaf> {
        let Inner { checkpoint, world, rules, params, declared, ranks, .. } = &*self.inner;
        let param = ranks[rank.index()].dests[dest].param;
        let original = params[param as usize].alias_of.unwrap_or(param);
        let entry = declared.binary_search_by_key(&original, |entry| entry.param).map(|found| declared[found]);
        let Ok(entry) = entry else { unreachable!("bug in shardlift: parameter without a source") };
        Builder { tensors: checkpoint.tensors(), rules, world }.leaf(entry, rank)
    }
}

/// What a plan is made from.
struct Builder<'a> {
    tensors: &'a [TensorMeta],
    rules: &'a Rules,
    world: &'a World,
}

/// A parameter before its position is known.
struct Named<'a> {
    name: String,
    made: Made<'a>,
}

enum Made<'a> {
    From { tensor: u32, rule: u32 },
    AliasOf(&'a str),
}

impl<'a> Builder<'a> {
    /// All parameters, sorted by name, and what those that are no alias are made of.
    fn params(&self) -> Result<(Vec<Param>, Vec<Declared>)> {
        let verdicts = self.rules.verdicts(self.tensors)?;
        let mut named: Vec<Named<'a>> = verdicts
            .par_iter()
            .enumerate()
            .with_min_len(512)
            .filter_map(|(tensor, verdict)| match *verdict {
                Verdict::Rule(rule) => Some(Named {
                    name: self.rules.destination(rule, &self.tensors[tensor].name),
                    made: Made::From { tensor: tensor as u32, rule },
                }),
                Verdict::Skipped | Verdict::Unmatched => None,
            })
            .collect();
        self.add_aliases(&mut named)?;
        named.par_sort_unstable_by(|a, b| a.name.cmp(&b.name));
        if let Some(twice) = named.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(broken("rename-collision", "two tensors become one").with_tensor(twice[0].name.as_str()));
        }

        let mut params = Vec::with_capacity(named.len());
        let mut declared = Vec::with_capacity(named.len());
        for (param, entry) in named.iter().enumerate() {
            let (origin, alias_of) = match entry.made {
                Made::From { .. } => (&entry.made, None),
                Made::AliasOf(of) => {
                    let Ok(original) = named.binary_search_by(|entry| entry.name.as_str().cmp(of)) else {
                        unreachable!("bug in shardlift: alias was checked")
                    };
                    (&named[original].made, Some(original as u32))
                }
            };
            let Made::From { tensor, rule } = *origin else {
                return Err(broken("alias", "alias of an alias").with_tensor(entry.name.as_str()));
            };
            let dtype = self.tensors[tensor as usize].dtype;
            params.push((dtype, alias_of));
            if alias_of.is_none() {
                declared.push(self.declare(param as u32, tensor, rule)?);
            }
        }
        let params = named
            .into_iter()
            .zip(params)
            .map(|(entry, (dtype, alias_of))| Param { name: entry.name, dtype, alias_of })
            .collect();
        Ok((params, declared))
    }

    fn add_aliases(&self, named: &mut Vec<Named<'a>>) -> Result<()> {
        let mut aliases = Vec::new();
        for alias in &self.rules.aliases {
            let known = |name: &str| named.iter().any(|entry| entry.name == name);
            if known(&alias.of) || self.rules.aliases.iter().any(|other| other.name == alias.of) {
                aliases.push(Named { name: alias.name.clone(), made: Made::AliasOf(&alias.of) });
            } else if !self.rules.is_filtered() {
                return Err(broken("alias", format!("alias of `{}`, which is no destination", alias.of))
                    .with_tensor(alias.name.as_str()));
            }
        }
        named.extend(aliases);
        Ok(())
    }

    fn declare(&self, param: u32, tensor: u32, rule: u32) -> Result<Declared> {
        let Placement::Place { owner, expr } = &self.rules.rules[rule as usize].placement else {
            unreachable!("bug in shardlift: a skipped tensor has no parameter")
        };
        let entry = Declared { param, tensor, rule, times: 1, partial: expr.is_partial() };
        match *owner {
            Owner::All => {
                let parts = self.leaf(entry, Rank(0))?.parts;
                Ok(Declared { times: (u64::from(self.world.size()) / parts) as u32, ..entry })
            }
            Owner::Only(rank) if rank.0 < self.world.size() => Ok(entry),
            Owner::Only(rank) => Err(broken("rank", format!("rule `{}` names no rank", self.rules.pattern(rule)))
                .with_expected(format!("a rank below {}", self.world.size()), rank)),
        }
    }

    /// One rank's partition.
    fn rank(&self, rank: Rank, params: &[Param], declared: &[Declared]) -> Result<RankPlan> {
        let mut dests = Vec::with_capacity(params.len());
        let mut pieces = Vec::with_capacity(params.len());
        let mut next = declared.iter();
        for (param, Param { alias_of, .. }) in params.iter().enumerate() {
            let entry = match alias_of {
                None => next.next().copied(),
                Some(original) => {
                    let found = declared.binary_search_by_key(original, |entry| entry.param);
                    found.ok().map(|found| declared[found])
                }
            };
            let Some(entry) = entry else { unreachable!("bug in shardlift: parameter without a source") };
            if !self.owner(entry).has(rank) {
                continue;
            }
            let leaf = self.leaf(entry, rank)?;
            let first = pieces.len() as u32;
            let mut bytes = 0;
            if alias_of.is_none() {
                let meta = &self.tensors[entry.tensor as usize];
                let copies = leaf.copies(meta.start).map_err(|error| self.place(error, entry, rank))?;
                bytes = copies.0;
                pieces.extend(copies.1);
            }
            dests.push(Dest { param: param as u32, shape: leaf.shape(), bytes, pieces: first..pieces.len() as u32 });
        }
        Ok(RankPlan { rank, dests, pieces })
    }

    fn leaf(&self, entry: Declared, rank: Rank) -> Result<Leaf> {
        let meta = &self.tensors[entry.tensor as usize];
        match &self.rules.rules[entry.rule as usize].placement {
            Placement::Place { expr, .. } => Leaf::lower(expr, entry.tensor, meta, self.world.mesh(), rank)
                .map_err(|error| self.place(error, entry, rank)),
            Placement::Skip => unreachable!("bug in shardlift: a skipped tensor has no parameter"),
        }
    }

    fn owner(&self, entry: Declared) -> Owner {
        match self.rules.rules[entry.rule as usize].placement {
            Placement::Place { owner, .. } => owner,
            Placement::Skip => Owner::All,
        }
    }

    fn place(&self, error: Error, entry: Declared, rank: Rank) -> Error {
        error.with_tensor(self.tensors[entry.tensor as usize].name.as_str()).with_rank(rank)
    }
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
