//! Makes a [`Plan`]: rules over the tensors -> parameters -> each rank's partition -> audit -> who reads what.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;
use smallvec::SmallVec;
use tracing::debug_span;

use super::audit::{CHUNK, Wanted, audit};
use super::complete::complete;
use super::cover::{Strided, Times};
use super::cut::Split;
use super::digest::digest;
use super::expr::Expr;
use super::extents::extents;
use super::form::{Boxes, For, Form, Sources};
use super::holders::{HolderMaker, Holders};
use super::leaf::Leaf;
use super::rules::{AliasRule, Made, Matches, Origin, Placed, Request, Rules, Stage, TENSORS_PER_TASK};
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

    /// Plans the load of an engine's own list of destinations, and of nothing else: tensors that no request names are
    /// [skipped](Plan::skipped). [`Rules::submit`] adds requests to rules instead.
    ///
    /// # Errors
    /// As [`Plan::new`], [`ErrorKind::Rules`] also for a tensor that is not there, a name that is requested twice, and
    /// for a type and shape other than is asked for, with both.
    pub fn of_requests(checkpoint: &Checkpoint, requests: &[Request], world: &World) -> Result<Plan> {
        Plan::new(checkpoint, &Rules::of_requests(requests), world)
    }

    /// [`Plan::new`] with another order of reads.
    pub fn with_order(checkpoint: &Checkpoint, rules: &Rules, world: &World, order: ReadOrder) -> Result<Plan> {
        world.check()?;
        let mesh = world.mesh();
        let Matches { placed, made } =
            debug_span!("match").in_scope(|| rules.matches(checkpoint, mesh)).map_err(|error| rules.located(error))?;
        complete(rules, checkpoint.tensors(), &placed, &made, mesh).map_err(|error| rules.located(error))?;
        let builder = Builder { tensors: checkpoint.tensors(), rules, placed: &placed, world };
        let Params { params, declared, holders } = debug_span!("rules").in_scope(|| builder.params(made))?;
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
    /// Position of the tensor that the rule matched; none of a request.
    pub(super) tensor: Option<u32>,
    /// What becomes of it: a position in the list of all.
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
    what: What<'a>,
    /// The stages of an alias that has some of its own; those of others are their rules'.
    stage: Option<&'a Stage>,
}

#[derive(Clone, Copy)]
enum What<'a> {
    /// A position in the list of what is made.
    Made(u32),
    AliasOf(&'a str),
}

impl<'a> Builder<'a> {
    /// All parameters that filters leave.
    fn params(&self, mut made: Vec<Made>) -> Result<Params> {
        let named = self.named(&made).map_err(|error| self.rules.located(error))?;
        self.check_filters(&named, &made)?;
        let named = self.wanted(named, &made);

        let mut params = Vec::with_capacity(named.len());
        let mut declared = Vec::with_capacity(named.len());
        let mut of = Vec::with_capacity(named.len());
        let mut holders = HolderMaker::new(self.rules, self.world.mesh()).map_err(|error| self.rules.located(error))?;
        for entry in &named {
            let (at, alias_of) = match entry.what {
                What::Made(at) => (at as usize, None),
                What::AliasOf(of) => match find(&named, of).map(|original| (original, named[original].what)) {
                    Some((original, What::Made(at))) => (at as usize, Some(original as u32)),
                    _ => unreachable!("bug in shardlift: alias was checked"),
                },
            };
            of.push(self.holders(entry, &made[at], &mut holders)?);
            let Made { tensor, placed, named } = &made[at];
            let placed = &self.placed[*placed as usize];
            let dtype = |tensor: u32| self.tensors[tensor as usize].dtype;
            let (from, to) = self.rules.dtypes(placed, tensor.map(dtype), named.first().copied().map(dtype));
            self.rules.request(placed).map_or(Ok(()), |request| request.check_dtype(to))?;
            // A value of any type may be one of another; else what cannot be cast is refused where its form is made.
            let cast = if from == to { None } else { Cast::new(from, to).ok() };
            params.push((to, cast, alias_of));
        }
        let scales = Scales::default();
        for (param, entry) in (0..).zip(&named) {
            let What::Made(at) = entry.what else { continue };
            let Made { tensor, placed, named } = &mut made[at as usize];
            let entry = Declared { param, tensor: *tensor, placed: *placed, named: std::mem::take(named) };
            self.refuse_scaled(&entry, &scales)?;
            declared.push(entry);
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

    /// Refuses filters that match nothing, or nothing but parts of destinations.
    fn check_filters(&self, named: &[Named<'a>], made: &[Made]) -> Result<()> {
        let mut part_of = vec![None; self.tensors.len()];
        for Named { name, what, .. } in named {
            let What::Made(at) = *what else { continue };
            made[at as usize].named.iter().for_each(|&part| part_of[part as usize] = Some(name.as_str()));
        }
        made.iter().filter_map(|made| made.tensor).for_each(|tensor| part_of[tensor as usize] = None);
        let tensors = self.tensors.iter().map(|tensor| tensor.name.as_str()).zip(&part_of);
        let whole = tensors.clone().filter_map(|(name, of)| of.is_none().then_some(name));
        let parts = tensors.filter_map(|(name, of)| Some((name, (*of)?)));
        self.rules.check_filters(whole.chain(named.iter().map(|entry| entry.name.as_str())), parts)
    }

    /// The set of ranks that hold a destination.
    fn holders(&self, entry: &Named<'a>, made: &Made, maker: &mut HolderMaker<'_>) -> Result<u32> {
        if let Some(stage) = entry.stage {
            return maker.of_stage(stage);
        }
        let placed = &self.placed[made.placed as usize];
        let set = match (placed.origin, made.tensor) {
            (Origin::Rule { rule, .. }, Some(tensor)) => {
                let name = self.tensors[tensor as usize].name.as_str();
                maker.of_rule(rule, name, placed.subject(name))
            }
            (Origin::Rule { .. }, None) => unreachable!("bug in shardlift: a rule that matched nothing"),
            (Origin::Request(at), _) => maker.of_owner(&self.rules.requests[at as usize].owner),
        };
        set.map_err(|error| self.located(error, placed, made.tensor))
    }

    /// All destinations, sorted by name; filters leave none out yet.
    fn named(&self, made: &[Made]) -> Result<Vec<Named<'a>>> {
        let name = |(at, made): (usize, &Made)| {
            let matched = made.tensor.map(|tensor| self.tensors[tensor as usize].name.as_str());
            let name = self.rules.destination(&self.placed[made.placed as usize], matched)?;
            Ok(Named { name, what: What::Made(at as u32), stage: None })
        };
        let named: Vec<Result<Named<'a>>> =
            made.par_iter().enumerate().with_min_len(TENSORS_PER_TASK).map(name).collect();
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
                what: What::AliasOf(of),
                stage: stage.as_ref(),
            };
            named.extend(aliases.iter().map(alias));
            named.sort_by(|a, b| a.name.cmp(&b.name));
        }
        match named.windows(2).find(|pair| pair[0].name == pair[1].name) {
            Some(twice) => {
                let [one, other] = [0, 1].map(|at| self.origin(&twice[at], made));
                let both = format!("{one} and {other} get one name");
                Err(broken("rename-collision", both).with_tensor(twice[0].name.as_str()))
            }
            None => Ok(named),
        }
    }

    /// Those that the filters leave. The first alias of an original that is left out holds the bytes instead, and is the
    /// original of the others.
    fn wanted(&self, named: Vec<Named<'a>>, made: &[Made]) -> Vec<Named<'a>> {
        let wants = |Named { name, what, .. }: &Named<'a>| match *what {
            What::Made(at) => match made[at as usize].tensor {
                Some(tensor) => self.rules.wants(&[name, &self.tensors[tensor as usize].name]),
                None => self.rules.wants(&[name]),
            },
            What::AliasOf(_) => self.rules.wants(&[name]),
        };
        let wanted: Vec<bool> = named.iter().map(wants).collect();
        let is_left = |name: &str| find(&named, name).is_some_and(|at| wanted[at]);
        let mut heirs: HashMap<&str, &'a str> = HashMap::new();
        for AliasRule { name, of, .. } in self.rules.aliases.iter().filter(|alias| is_left(&alias.name)) {
            heirs.entry(of).or_insert(name);
        }
        let what = |entry: &Named<'a>| match entry.what {
            What::AliasOf(of) if !is_left(of) => match heirs.get(of) {
                Some(&heir) if heir != entry.name => What::AliasOf(heir),
                _ => find(&named, of).map_or(entry.what, |original| named[original].what),
            },
            what => what,
        };
        let what: Vec<What<'a>> = named.iter().map(what).collect();
        let left = named.into_iter().zip(what).zip(wanted).filter(|(_, wanted)| *wanted);
        left.map(|((entry, what), _)| Named { what, ..entry }).collect()
    }

    /// What a destination comes from, for errors.
    fn origin(&self, Named { what, .. }: &Named<'a>, made: &[Made]) -> String {
        match *what {
            What::Made(at) => match made[at as usize] {
                Made { tensor: Some(tensor), .. } => format!("tensor `{}`", self.tensors[tensor as usize].name),
                Made { placed, .. } => {
                    let (who, name) = self.rules.said_by(&self.placed[placed as usize]);
                    format!("{who} `{name}`")
                }
            },
            What::AliasOf(of) => format!("an alias of `{of}`"),
        }
    }

    /// Names rule or request, and the tensor, in an error.
    fn located(&self, error: Error, placed: &Placed, tensor: Option<u32>) -> Error {
        let (who, name) = self.rules.said_by(placed);
        let error = error.in_context(format_args!("{who} `{name}`"));
        let about = tensor.map_or(name, |tensor| &self.tensors[tensor as usize].name);
        self.rules.located(if error.tensor().is_some() { error } else { error.with_tensor(about) })
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
        if let Some((tensor, parts)) = self.parts_of_whole(entry)? {
            let times = Times { are: 0, should: (u64::from(count) / parts).max(1) };
            let run = self.tensors[tensor as usize].bytes();
            let bytes = Strided { start: 0, loops: SmallVec::new(), run, times };
            into.extend((run > 0).then_some(Wanted { tensor, bytes, partial: false }));
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

    /// The tensor that the ranks have whole, or divided once, and how many parts there are of it: most destinations are of
    /// one, and need no form to say so.
    fn parts_of_whole(&self, entry: &Declared) -> Result<Option<(u32, u64)>> {
        let whole = |expr: &Expr| match expr {
            Expr::Source => entry.tensor,
            Expr::Tensor(_) => entry.named.first().copied(),
            _ => None,
        };
        Ok(match self.expr(entry) {
            Expr::Shard { x, dim, cut } if !matches!(cut.how, Split::Table(_)) => {
                match whole(x).and_then(|tensor| Some((tensor, *self.tensors[tensor as usize].shape.get(*dim)?))) {
                    Some((tensor, size)) => Some((tensor, cut.part(size, self.world.mesh(), Rank(0))?.1)),
                    None => None,
                }
            }
            expr => whole(expr).map(|tensor| (tensor, 1)),
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
        let Some(to) = placed.expr.cast_to() else { return Ok(()) };
        for &tensor in entry.named.iter().chain(&entry.tensor) {
            let TensorMeta { name, dtype, .. } = &self.tensors[tensor as usize];
            if !matches!(dtype, Dtype::F8E4M3 | Dtype::F8E5M2) {
                continue;
            }
            let Some(scale) = scales.of(name, self.tensors) else { continue };
            let (who, said) = self.rules.said_by(placed);
            let what = format!("{who} `{said}`: {dtype} that is scaled is not cast to {to}");
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
            if let Some(request) = self.rules.request(&self.placed[entry.placed as usize]) {
                request.check_shape(rank, &form.shape())?;
            }
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
        let casting = self.rules.casting_of(&self.placed[entry.placed as usize]);
        let sources = Sources { tensors: self.tensors, matched: entry.tensor, named: &entry.named, casting };
        Form::of(self.expr(entry), &sources, whom)
    }

    fn expr(&self, entry: &Declared) -> &Expr {
        &self.placed[entry.placed as usize].expr
    }

    /// Names rule and tensor in an error about a rank's part, and the rank unless all ranks have such an error.
    fn place(&self, error: Error, entry: &Declared, rank: Rank) -> Error {
        let fails = |rank| {
            let form = self.form(entry, For::Rank(self.world.mesh(), Rank(rank)));
            form.and_then(|form| form.lower(self.tensors, &mut Vec::new(), &mut Vec::new())).is_err()
        };
        let error = self.located(error, &self.placed[entry.placed as usize], entry.tensor);
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
