//! Makes a [`Plan`]: rules over the tensors -> parameters -> each rank's partition -> audit -> who reads what.

use std::cell::OnceCell;
use std::sync::Arc;

use rayon::prelude::*;
use smallvec::SmallVec;
use tracing::debug_span;

use super::audit::{CHUNK, Wanted, audit};
use super::cover::{Strided, Times};
use super::cut::Split;
use super::digest::digest;
use super::expr::Expr;
use super::extents::extents;
use super::form::{Boxes, For, Form, Sources};
use super::leaf::Leaf;
use super::rules::{AliasRule, Matches, Owner, Placement, Rules, TENSORS_PER_TASK, Verdict};
use super::uses::Uses;
use super::world::World;
use super::{BoxCopy, Dest, Inner, Param, Plan, RankPlan, ReadOrder};
use crate::cast::Cast;
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::dtype::Dtype;
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
        let (params, declared) = debug_span!("rules").in_scope(|| {
            let matches = rules.matches(checkpoint).map_err(|error| rules.located(error))?;
            builder.params(matches)
        })?;
        let (ranks, uses) = debug_span!("partition").in_scope(|| -> Result<_> {
            let ranks: Vec<Result<RankPlan>> =
                (0..world.size()).into_par_iter().map(|rank| builder.rank(Rank(rank), &params, &declared)).collect();
            let ranks = ranks.into_iter().collect::<Result<Vec<_>>>()?;
            let uses = Uses::new(checkpoint.tensors().len(), ranks.iter())?;
            Ok((ranks, uses))
        })?;
        debug_span!("audit").in_scope(|| audit(checkpoint, &ranks, &uses, &builder.wanted_bytes(&declared)?))?;
        let (extents, consumers) =
            debug_span!("reads").in_scope(|| extents(checkpoint, world, &ranks, &uses, order))?;
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
    /// [`ErrorKind::NotFound`] if the plan has no such rank, or the rank no such destination.
    pub(super) fn form(&self, rank: Rank, dest: usize) -> Result<Form> {
        let Inner { checkpoint, world, rules, params, declared, ranks, .. } = &*self.inner;
        let missing = |what: &str, count: usize, found: String| {
            Error::new(ErrorKind::NotFound, what).with_expected(format!("one below {count}"), found)
        };
        let Some(RankPlan { dests, .. }) = ranks.get(rank.index()) else {
            return Err(missing("no such rank", ranks.len(), rank.to_string()));
        };
        let Some(&Dest { param, .. }) = dests.get(dest) else {
            return Err(missing("no such destination", dests.len(), dest.to_string()).with_rank(rank));
        };
        let original = params[param as usize].alias_of.unwrap_or(param);
        let entry = declared.binary_search_by_key(&original, |entry| entry.param).map(|found| &declared[found]);
        let Ok(entry) = entry else { unreachable!("bug in shardlift: parameter without a source") };
        Builder { tensors: checkpoint.tensors(), rules, world }.form(entry, For::Rank(world.mesh(), rank))
    }

    /// The boxes that a rank's destination is made of, as [`leaves`](Plan::leaves).
    pub(crate) fn boxes(&self, rank: Rank, dest: usize) -> Result<Boxes> {
        self.form(rank, dest).map(Boxes)
    }

    /// The parts of tensors that a rank's destination is made of: `dest` is a position in [`RankPlan::dests`]. An alias
    /// has those of its original.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the plan has no such rank, or the rank no such destination.
    pub fn leaves(&self, rank: Rank, dest: usize) -> Result<Vec<Leaf>> {
        Ok(self.form(rank, dest)?.leaves().cloned().collect())
    }
}

/// What a parameter that is no alias is made of.
#[derive(Debug, Clone)]
pub(super) struct Declared {
    /// Position of the parameter.
    pub(super) param: u32,
    /// Position of the tensor that the rule matched.
    pub(super) tensor: u32,
    /// Position of the rule.
    pub(super) rule: u32,
    /// The tensors that the rule's expression names.
    pub(super) named: Box<[u32]>,
}

/// What a plan is made from.
struct Builder<'a> {
    tensors: &'a [TensorMeta],
    rules: &'a Rules,
    world: &'a World,
}

/// A destination before its position is known.
struct Named<'a> {
    name: String,
    made: Made<'a>,
}

#[derive(Clone, Copy)]
enum Made<'a> {
    From { tensor: u32, rule: u32 },
    AliasOf(&'a str),
}

impl<'a> Builder<'a> {
    /// All parameters, sorted by name, and what those that are no alias are made of.
    fn params(&self, matches: Matches) -> Result<(Vec<Param>, Vec<Declared>)> {
        let named = self.named(&matches.verdicts).map_err(|error| self.rules.located(error))?;
        let tensors = self.tensors.iter().map(|tensor| tensor.name.as_str());
        self.rules.check_filters(tensors.chain(named.iter().map(|entry| entry.name.as_str())))?;
        let named = self.wanted(named);

        let mut params = Vec::with_capacity(named.len());
        let mut declared = Vec::with_capacity(named.len());
        let scales = Scales::default();
        for (param, entry) in (0..).zip(&named) {
            let (tensor, rule, alias_of) = match entry.made {
                Made::From { tensor, rule } => {
                    let sources = matches.named.binary_search_by_key(&tensor, |(matched, _)| *matched);
                    let sources = sources.map(|found| matches.named[found].1.clone()).unwrap_or_default();
                    declared.push(self.declare(Declared { param, tensor, rule, named: sources }, &scales)?);
                    (tensor, rule, None)
                }
                Made::AliasOf(of) => match find(&named, of).map(|original| (original, named[original].made)) {
                    Some((original, Made::From { tensor, rule })) => (tensor, rule, Some(original as u32)),
                    _ => unreachable!("bug in shardlift: alias was checked"),
                },
            };
            let from = self.tensors[tensor as usize].dtype;
            let to = match self.rules.dtype(rule) {
                Some(dtype) => dtype,
                None => self.rules.cast_to(rule, from).unwrap_or(from),
            };
            params.push((to, (from != to).then_some(Cast { from, to }), alias_of));
        }
        let param = |(Named { name, .. }, (dtype, cast, alias_of))| Param { name, dtype, cast, alias_of };
        Ok((named.into_iter().zip(params).map(param).collect(), declared))
    }

    /// All destinations that the rules make, sorted by name; filters leave none out yet.
    fn named(&self, verdicts: &[Verdict]) -> Result<Vec<Named<'a>>> {
        let named: Vec<Result<Named<'a>>> = verdicts
            .par_iter()
            .enumerate()
            .with_min_len(TENSORS_PER_TASK)
            .filter_map(|(tensor, verdict)| match *verdict {
                Verdict::Rule(rule) => {
                    let made = Made::From { tensor: tensor as u32, rule };
                    let name = self.rules.destination(rule, &self.tensors[tensor].name);
                    Some(name.map(|name| Named { name, made }))
                }
                Verdict::Part | Verdict::Skipped => None,
            })
            .collect();
        let mut named = named.into_iter().collect::<Result<Vec<_>>>()?;
        named.par_sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let aliases: &'a [AliasRule] = &self.rules.aliases;
        if let Some(AliasRule { name, of }) = aliases.iter().find(|alias| find(&named, &alias.of).is_none()) {
            let what = format!("alias of `{of}`, which is no destination");
            return Err(broken("alias", what).with_tensor(name.as_str()));
        }
        if !aliases.is_empty() {
            let alias = |AliasRule { name, of }: &'a AliasRule| Named { name: name.clone(), made: Made::AliasOf(of) };
            named.extend(aliases.iter().map(alias));
            named.sort_by(|a, b| a.name.cmp(&b.name));
        }
        match named.windows(2).find(|pair| pair[0].name == pair[1].name) {
            Some(twice) => {
                let both = format!("{} and {} get one name", self.origin(&twice[0]), self.origin(&twice[1]));
                Err(broken("rename-collision", both).with_tensor(twice[0].name.as_str()))
            }
            None => Ok(named),
        }
    }

    /// Those that the filters leave. The first alias of an original that is left out holds the bytes instead, and is the
    /// original of the others.
    fn wanted(&self, named: Vec<Named<'a>>) -> Vec<Named<'a>> {
        let wants = |Named { name, made }: &Named<'a>| match *made {
            Made::From { tensor, .. } => self.rules.wants(&[name, &self.tensors[tensor as usize].name]),
            Made::AliasOf(_) => self.rules.wants(&[name]),
        };
        let wanted: Vec<bool> = named.iter().map(wants).collect();
        let is_left = |name: &str| find(&named, name).is_some_and(|at| wanted[at]);
        let made = |entry: &Named<'a>| match entry.made {
            Made::AliasOf(of) if !is_left(of) => {
                let heir = self.rules.aliases.iter().find(|alias| alias.of == of && is_left(&alias.name));
                match heir {
                    Some(heir) if heir.name != entry.name => Made::AliasOf(&heir.name),
                    _ => find(&named, of).map_or(entry.made, |original| named[original].made),
                }
            }
            made => made,
        };
        let made: Vec<Made<'a>> = named.iter().map(made).collect();
        let left = named.into_iter().zip(made).zip(wanted).filter(|(_, wanted)| *wanted);
        left.map(|((entry, made), _)| Named { made, ..entry }).collect()
    }

    /// What a destination comes from, for errors.
    fn origin(&self, Named { made, .. }: &Named<'a>) -> String {
        match *made {
            Made::From { tensor, .. } => format!("tensor `{}`", self.tensors[tensor as usize].name),
            Made::AliasOf(of) => format!("an alias of `{of}`"),
        }
    }

    fn declare(&self, entry: Declared, scales: &Scales<'a>) -> Result<Declared> {
        self.refuse_scaled(&entry, scales)?;
        match self.owner(&entry) {
            Owner::Only(rank) if rank.0 >= self.world.size() => {
                let what = format!("rule `{}`: no such rank", self.rules.pattern(entry.rule));
                let error = broken("rank", what).with_tensor(self.tensors[entry.tensor as usize].name.as_str());
                Err(self.rules.located(error.with_expected(format!("a rank below {}", self.world.size()), rank)))
            }
            Owner::All | Owner::Only(_) => Ok(entry),
        }
    }

    /// What the rules declare of each tensor, sorted by tensor.
    fn wanted_bytes(&self, declared: &[Declared]) -> Result<Vec<Wanted>> {
        let wanted: Vec<Result<Vec<Wanted>>> = declared
            .par_chunks(CHUNK)
            .map(|chunk| {
                let mut wanted = Vec::with_capacity(chunk.len());
                chunk.iter().try_for_each(|entry| self.wanted_of(entry, &mut wanted))?;
                Ok(wanted)
            })
            .collect();
        let wanted = wanted.into_iter().collect::<Result<Vec<_>>>()?;
        let mut wanted: Vec<Wanted> = wanted.into_iter().flatten().collect();
        wanted.par_sort_unstable_by_key(|wanted| wanted.tensor);
        Ok(wanted)
    }

    fn wanted_of(&self, entry: &Declared, into: &mut Vec<Wanted>) -> Result<()> {
        let holders: SmallVec<[Rank; 8]> =
            (0..self.world.size()).map(Rank).filter(|&rank| self.owner(entry).has(rank)).collect();
        let mesh = self.world.mesh();
        if let Some(parts) = self.parts_of_whole(entry)? {
            let times = Times { are: 0, should: (holders.len() as u64 / parts).max(1) };
            let run = self.tensors[entry.tensor as usize].bytes();
            let bytes = Strided { start: 0, loops: SmallVec::new(), run, times };
            into.extend((run > 0).then_some(Wanted { tensor: entry.tensor, bytes, partial: false }));
            return Ok(());
        }
        if self.expr(entry).takes_of_parts() {
            // Nothing tells what they should be together.
            return holders.iter().try_for_each(|&rank| self.wanted_by(entry, For::Rank(mesh, rank), 1, true, into));
        }
        let partial = self.expr(entry).is_partial();
        self.wanted_by(entry, For::All(mesh), holders.len() as u64, partial, into)
    }

    /// How many parts there are of a matched tensor that the ranks have whole, or divided once: most are one of these,
    /// and need no form to say so.
    fn parts_of_whole(&self, entry: &Declared) -> Result<Option<u64>> {
        Ok(match self.expr(entry) {
            Expr::Source => Some(1),
            Expr::Shard { x, dim, cut } if matches!(**x, Expr::Source) && !matches!(cut.how, Split::Table(_)) => {
                match self.tensors[entry.tensor as usize].shape.get(*dim) {
                    Some(&size) => Some(cut.part(size, self.world.mesh(), Rank(0))?.1),
                    None => None,
                }
            }
            _ => None,
        })
    }

    /// What is declared for some of the ranks, `holders` of them.
    fn wanted_by(
        &self,
        entry: &Declared,
        whom: For,
        holders: u64,
        partial: bool,
        into: &mut Vec<Wanted>,
    ) -> Result<()> {
        let form = self.form(entry, whom)?;
        let mut copies = Vec::new();
        for leaf in form.leaves() {
            let start = self.tensors[leaf.tensor as usize].start;
            copies.clear();
            leaf.source(start, &mut copies)?;
            let parts = if matches!(whom, For::All(_)) { leaf.parts } else { 1 };
            let times = Times { are: 0, should: (holders / parts).max(1) };
            let wanted = |copy: &BoxCopy| Strided { times, ..copy.source(start) };
            into.extend(copies.iter().map(|copy| Wanted { tensor: leaf.tensor, bytes: wanted(copy), partial }));
        }
        Ok(())
    }

    /// Refuses the cast of an F8 that another tensor scales: without its scale it would be another number.
    fn refuse_scaled(&self, entry: &Declared, scales: &Scales<'a>) -> Result<()> {
        let rule = entry.rule;
        for &tensor in entry.named.iter().chain([&entry.tensor]) {
            let TensorMeta { name, dtype, .. } = &self.tensors[tensor as usize];
            let Some(to) = self.rules.cast_to(rule, *dtype).filter(|_| matches!(dtype, Dtype::F8E4M3 | Dtype::F8E5M2))
            else {
                continue;
            };
            let Some(scale) = scales.of(name, self.tensors) else { continue };
            let what = format!("rule `{}`: {dtype} that is scaled is not cast to {to}", self.rules.pattern(rule));
            let error = broken("cast", what).with_expected("no tensor of its scale", format!("`{scale}`"));
            return Err(self.rules.located(error.with_tensor(name.as_str())));
        }
        Ok(())
    }

    /// One rank's partition.
    fn rank(&self, rank: Rank, params: &[Param], declared: &[Declared]) -> Result<RankPlan> {
        let mut dests = Vec::with_capacity(params.len());
        let mut pieces = Vec::with_capacity(params.len());
        let mut fills = Vec::new();
        let mut next = declared.iter();
        for (param, Param { alias_of, .. }) in params.iter().enumerate() {
            let entry = match alias_of {
                None => next.next(),
                Some(original) => {
                    let found = declared.binary_search_by_key(original, |entry| entry.param);
                    found.ok().map(|found| &declared[found])
                }
            };
            let Some(entry) = entry else { unreachable!("bug in shardlift: parameter without a source") };
            if !self.owner(entry).has(rank) {
                continue;
            }
            let placed = |error| self.place(error, entry, rank);
            let form = self.form(entry, For::Rank(self.world.mesh(), rank)).map_err(placed)?;
            let (first, first_fill) = (pieces.len() as u32, fills.len() as u32);
            let mut bytes = 0;
            if alias_of.is_none() {
                bytes = form.bytes().map_err(placed)?;
                form.lower(self.tensors, &mut pieces, &mut fills).map_err(placed)?;
            }
            dests.push(Dest {
                param: param as u32,
                shape: form.shape(),
                bytes,
                pieces: first..pieces.len() as u32,
                fills: first_fill..fills.len() as u32,
            });
        }
        Ok(RankPlan { rank, dests, pieces, fills })
    }

    fn form(&self, entry: &Declared, whom: For) -> Result<Form> {
        let casting = self.rules.casts_to();
        let sources = Sources { tensors: self.tensors, matched: entry.tensor, named: &entry.named, casting };
        Form::of(self.expr(entry), &sources, whom)
    }

    fn expr(&self, entry: &Declared) -> &Expr {
        match &self.rules.rules[entry.rule as usize].placement {
            Placement::Place { expr, .. } => expr,
            Placement::Part | Placement::Skip => unreachable!("bug in shardlift: a parameter of no rule that places"),
        }
    }

    fn owner(&self, entry: &Declared) -> Owner {
        match self.rules.rules[entry.rule as usize].placement {
            Placement::Place { owner, .. } => owner,
            Placement::Part | Placement::Skip => Owner::All,
        }
    }

    /// Names rule and tensor in an error about a rank's part, and the rank unless all ranks have such an error.
    fn place(&self, error: Error, entry: &Declared, rank: Rank) -> Error {
        let meta = &self.tensors[entry.tensor as usize];
        let fails = |rank| {
            let form = self.form(entry, For::Rank(self.world.mesh(), Rank(rank)));
            form.and_then(|form| form.lower(self.tensors, &mut Vec::new(), &mut Vec::new())).is_err()
        };
        let error = error.in_context(format_args!("rule `{}`", self.rules.pattern(entry.rule)));
        let error = if error.tensor().is_some() { error } else { error.with_tensor(meta.name.as_str()) };
        let error = self.rules.located(error);
        if (0..self.world.size()).all(fails) { error } else { error.with_rank(rank) }
    }
}

/// The tensors whose names speak of scales, sorted; looked for when the first is asked for.
#[derive(Default)]
struct Scales<'a>(OnceCell<Vec<&'a str>>);

impl<'a> Scales<'a> {
    /// A tensor that scales the one of this name: in `X.weight`'s module one with `scale` in its own name
    /// (`X.weight_scale_inv`, `X.input_scale`, `X.scale`), or one whose name goes on where this ends (`W_scale`,
    /// `W.scale`).
    fn of(&self, name: &str, tensors: &'a [TensorMeta]) -> Option<&'a str> {
        let all = self.0.get_or_init(|| {
            let names = tensors.iter().map(|tensor| tensor.name.as_str());
            let mut scales: Vec<&str> = names.filter(|name| name.contains("scale")).collect();
            scales.sort_unstable();
            scales
        });
        let module = name.strip_suffix("weight").and_then(|stem| stem.strip_suffix(['.', '_']));
        let belongs = |stem: &str, scale: &str| {
            let rest = &scale[stem.len()..];
            scale != name && rest.starts_with(['.', '_']) && rest.contains("scale") && !rest[1..].contains('.')
        };
        [Some(name), module].into_iter().flatten().find_map(|stem| {
            let from = all.partition_point(|scale| *scale < stem);
            all[from..].iter().take_while(|scale| scale.starts_with(stem)).find(|scale| belongs(stem, scale)).copied()
        })
    }
}

/// The position of this name in a list that is sorted by name.
fn find(named: &[Named<'_>], name: &str) -> Option<usize> {
    named.binary_search_by(|entry| entry.name.as_str().cmp(name)).ok()
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
