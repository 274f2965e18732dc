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
use super::holders::{HolderMaker, Holders};
use super::leaf::Leaf;
use super::rules::{AliasRule, Matches, Placed, Rules, Stage, TENSORS_PER_TASK, Verdict};
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
        let mesh = world.mesh();
        let Matches { verdicts, placed, named } =
            debug_span!("match").in_scope(|| rules.matches(checkpoint, mesh)).map_err(|error| rules.located(error))?;
        let builder = Builder { tensors: checkpoint.tensors(), rules, placed: &placed, world };
        let Params { params, declared, holders } =
            debug_span!("rules").in_scope(|| builder.params(&verdicts, named))?;
        let (ranks, uses) = debug_span!("partition").in_scope(|| -> Result<_> {
            let ranks: Vec<Result<RankPlan>> = (0..world.size())
                .into_par_iter()
                .map(|rank| builder.rank(Rank(rank), &params, &declared, &holders))
                .collect();
            let ranks = ranks.into_iter().collect::<Result<Vec<_>>>()?;
            let uses = Uses::new(checkpoint.tensors().len(), ranks.iter())?;
            Ok((ranks, uses))
        })?;
        debug_span!("audit")
            .in_scope(|| audit(checkpoint, &ranks, &uses, &builder.wanted_bytes(&declared, &holders)?))?;
        let (extents, consumers) =
            debug_span!("reads").in_scope(|| extents(checkpoint, world, &ranks, &uses, order))?;
        let digest = digest(checkpoint, world, &params, &ranks);
        Ok(Plan {
            inner: Arc::new(Inner {
                checkpoint: checkpoint.clone(),
                world: world.clone(),
                rules: rules.clone(),
                placed,
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
        let Inner { checkpoint, world, rules, placed, params, declared, ranks, .. } = &*self.inner;
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
        Builder { tensors: checkpoint.tensors(), rules, placed, world }.form(entry, For::Rank(world.mesh(), rank))
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
    /// What the rule makes of it: a position in the list of all.
    pub(super) placed: u32,
    /// The tensors that the expression names.
    pub(super) named: Box<[u32]>,
}

/// All parameters, sorted by name.
struct Params {
    params: Vec<Param>,
    /// What those that are no alias are made of.
    declared: Vec<Declared>,
    holders: ParamHolders,
}

/// Which ranks hold each parameter.
struct ParamHolders {
    holders: Holders,
    /// A set for each parameter.
    of: Vec<u32>,
}

impl ParamHolders {
    fn has(&self, param: usize, rank: Rank) -> bool {
        self.holders.has(self.of[param], rank)
    }
}

/// What a plan is made from.
struct Builder<'a> {
    tensors: &'a [TensorMeta],
    rules: &'a Rules,
    placed: &'a [Placed],
    world: &'a World,
}

/// A destination before its position is known.
struct Named<'a> {
    name: String,
    made: Made<'a>,
    /// The stages of an alias that has some of its own; those of others are their rules'.
    stage: Option<Stage>,
}

#[derive(Clone, Copy)]
enum Made<'a> {
    From { tensor: u32, placed: u32 },
    AliasOf(&'a str),
}

impl<'a> Builder<'a> {
    /// All parameters that filters leave.
    fn params(&self, verdicts: &[Verdict], sources: Vec<(u32, Box<[u32]>)>) -> Result<Params> {
        let named = self.named(verdicts).map_err(|error| self.rules.located(error))?;
        let tensors = self.tensors.iter().map(|tensor| tensor.name.as_str());
        self.rules.check_filters(tensors.chain(named.iter().map(|entry| entry.name.as_str())))?;
        let named = self.wanted(named);

        let mut params = Vec::with_capacity(named.len());
        let mut declared = Vec::with_capacity(named.len());
        let mut of = Vec::with_capacity(named.len());
        let mut holders = HolderMaker::new(self.rules, self.world.mesh()).map_err(|error| self.rules.located(error))?;
        let scales = Scales::default();
        let sources = |tensor: u32| {
            let found = sources.binary_search_by_key(&tensor, |(matched, _)| *matched);
            found.map_or(&[][..], |found| &sources[found].1)
        };
        for (param, entry) in (0..).zip(&named) {
            let (tensor, placed, alias_of) = match entry.made {
                Made::From { tensor, placed } => {
                    let entry = Declared { param, tensor, placed, named: sources(tensor).into() };
                    self.refuse_scaled(&entry, &scales)?;
                    declared.push(entry);
                    (tensor, placed, None)
                }
                Made::AliasOf(of) => match find(&named, of).map(|original| (original, named[original].made)) {
                    Some((original, Made::From { tensor, placed })) => (tensor, placed, Some(original as u32)),
                    _ => unreachable!("bug in shardlift: alias was checked"),
                },
            };
            of.push(self.holders(entry, tensor, placed, &mut holders)?);
            let placed = &self.placed[placed as usize];
            let dtype = |tensor: u32| self.tensors[tensor as usize].dtype;
            let (from, to) = self.rules.dtypes(placed, dtype(tensor), sources(tensor).first().copied().map(dtype));
            params.push((to, (from != to).then_some(Cast { from, to }), alias_of));
        }
        let holders = ParamHolders { holders: holders.finish(), of };
        let param = |(Named { name, .. }, (dtype, cast, alias_of))| Param { name, dtype, cast, alias_of };
        let params: Vec<Param> = named.into_iter().zip(params).map(param).collect();
        for (param, Param { name, alias_of, .. }) in params.iter().enumerate() {
            if let Some(original) = alias_of.map(|original| original as usize)
                && !holders.holders.are_in(holders.of[param], holders.of[original])
            {
                let what = format!("alias of `{}`, which is not on all of its ranks", params[original].name);
                return Err(self.rules.located(broken("alias", what).with_tensor(name.as_str())));
            }
        }
        Ok(Params { params, declared, holders })
    }

    /// The set of ranks that hold a destination.
    fn holders(&self, entry: &Named<'a>, tensor: u32, placed: u32, maker: &mut HolderMaker<'_>) -> Result<u32> {
        if let Some(stage) = entry.stage {
            return maker.of_stage(stage);
        }
        let (placed, name) = (&self.placed[placed as usize], self.tensors[tensor as usize].name.as_str());
        maker.of_rule(placed.rule, name, placed.subject(name)).map_err(|error| {
            let error = error.in_context(format_args!("rule `{}`", self.rules.pattern(placed.rule)));
            self.rules.located(if error.tensor().is_some() { error } else { error.with_tensor(name) })
        })
    }

    /// All destinations that the rules make, sorted by name; filters leave none out yet.
    fn named(&self, verdicts: &[Verdict]) -> Result<Vec<Named<'a>>> {
        let named: Vec<Result<Named<'a>>> = verdicts
            .par_iter()
            .enumerate()
            .with_min_len(TENSORS_PER_TASK)
            .filter_map(|(tensor, verdict)| match *verdict {
                Verdict::Placed(placed) => {
                    let made = Made::From { tensor: tensor as u32, placed };
                    let name = self.rules.destination(&self.placed[placed as usize], &self.tensors[tensor].name);
                    Some(name.map(|name| Named { name, made, stage: None }))
                }
                Verdict::Part | Verdict::Skipped => None,
            })
            .collect();
        let mut named = named.into_iter().collect::<Result<Vec<_>>>()?;
        named.par_sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let aliases: &'a [AliasRule] = &self.rules.aliases;
        if let Some(AliasRule { name, of, .. }) = aliases.iter().find(|alias| find(&named, &alias.of).is_none()) {
            let what = format!("alias of `{of}`, which is no destination");
            return Err(broken("alias", what).with_tensor(name.as_str()));
        }
        if !aliases.is_empty() {
            let alias = |AliasRule { name, of, stage }: &'a AliasRule| Named {
                name: name.clone(),
                made: Made::AliasOf(of),
                stage: *stage,
            };
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
        let wants = |Named { name, made, .. }: &Named<'a>| match *made {
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

    /// What the rules declare of each tensor, sorted by tensor.
    fn wanted_bytes(&self, declared: &[Declared], holders: &ParamHolders) -> Result<Vec<Wanted>> {
        let wanted: Vec<Result<Vec<Wanted>>> = declared
            .par_chunks(CHUNK)
            .map(|chunk| {
                let mut wanted = Vec::with_capacity(chunk.len());
                chunk.iter().try_for_each(|entry| self.wanted_of(entry, holders, &mut wanted))?;
                Ok(wanted)
            })
            .collect();
        let wanted = wanted.into_iter().collect::<Result<Vec<_>>>()?;
        let mut wanted: Vec<Wanted> = wanted.into_iter().flatten().collect();
        wanted.par_sort_unstable_by_key(|wanted| wanted.tensor);
        Ok(wanted)
    }

    fn wanted_of(&self, entry: &Declared, holders: &ParamHolders, into: &mut Vec<Wanted>) -> Result<()> {
        let mesh = self.world.mesh();
        let count = holders.holders.count(holders.of[entry.param as usize]);
        if count == 0 {
            return Ok(());
        }
        if let Some(parts) = self.parts_of_whole(entry)? {
            let times = Times { are: 0, should: (u64::from(count) / parts).max(1) };
            let run = self.tensors[entry.tensor as usize].bytes();
            let bytes = Strided { start: 0, loops: SmallVec::new(), run, times };
            into.extend((run > 0).then_some(Wanted { tensor: entry.tensor, bytes, partial: false }));
            return Ok(());
        }
        if self.expr(entry).takes_of_parts() {
            // Nothing tells what they should be together.
            let mut ranks = (0..self.world.size()).map(Rank).filter(|&rank| holders.has(entry.param as usize, rank));
            return ranks.try_for_each(|rank| self.wanted_by(entry, For::Rank(mesh, rank), 1, true, into));
        }
        let partial = self.expr(entry).is_partial();
        self.wanted_by(entry, For::All(mesh), count.into(), partial, into)
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
        let placed = &self.placed[entry.placed as usize];
        for &tensor in entry.named.iter().chain([&entry.tensor]) {
            let TensorMeta { name, dtype, .. } = &self.tensors[tensor as usize];
            let Some(to) =
                self.rules.cast_to(placed, *dtype).filter(|_| matches!(dtype, Dtype::F8E4M3 | Dtype::F8E5M2))
            else {
                continue;
            };
            let Some(scale) = scales.of(name, self.tensors) else { continue };
            let what =
                format!("rule `{}`: {dtype} that is scaled is not cast to {to}", self.rules.pattern(placed.rule));
            let error = broken("cast", what).with_expected("no tensor of its scale", format!("`{scale}`"));
            return Err(self.rules.located(error.with_tensor(name.as_str())));
        }
        Ok(())
    }

    /// One rank's partition.
    fn rank(&self, rank: Rank, params: &[Param], declared: &[Declared], holders: &ParamHolders) -> Result<RankPlan> {
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
            if !holders.has(param, rank) {
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
        &self.placed[entry.placed as usize].expr
    }

    /// Names rule and tensor in an error about a rank's part, and the rank unless all ranks have such an error.
    fn place(&self, error: Error, entry: &Declared, rank: Rank) -> Error {
        let meta = &self.tensors[entry.tensor as usize];
        let fails = |rank| {
            let form = self.form(entry, For::Rank(self.world.mesh(), Rank(rank)));
            form.and_then(|form| form.lower(self.tensors, &mut Vec::new(), &mut Vec::new())).is_err()
        };
        let rule = self.placed[entry.placed as usize].rule;
        let error = error.in_context(format_args!("rule `{}`", self.rules.pattern(rule)));
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
