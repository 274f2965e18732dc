//! What a rule says of a logical matrix, said of one of the tensors that are stored for it.

use smallvec::{SmallVec, smallvec};

use super::recognise::UNKNOWN;
use super::{Dim, Linear, Merged, Scalars, Stored};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::REFINED_BLOCK_MIN;
use crate::plan::cut::{Cut, Split, gcd, lcm};
use crate::plan::expr::Expr;
use crate::plan::world::Mesh;

/// What a derivation asks for: the modules that an expression names, and the ranks that it is for.
pub(in crate::plan) struct Parts<'a> {
    /// The module that the rule matched.
    pub(in crate::plan) matched: &'a Linear,
    /// The module that the expression names.
    pub(in crate::plan) named: &'a dyn Fn(&str) -> Result<Linear>,
    /// The ranks.
    pub(in crate::plan) mesh: Mesh,
    /// The size of FP8 blocks that scales are repeated for, if they are.
    pub(in crate::plan) refined: Option<u64>,
    /// What becomes of tensors of one element.
    pub(in crate::plan) scalars: Scalars,
}

/// The expression for the tensor with this suffix.
pub(in crate::plan) fn derive(expr: &Expr, suffix: &str, parts: &Parts<'_>) -> Result<Expr> {
    Deriver { suffix, parts }.derive(expr).map(|derived| derived.expr)
}

/// Refuses what nothing says of a module's other tensors.
pub(in crate::plan) fn check_derivable(expr: &Expr) -> Result<()> {
    let what = match expr {
        Expr::View { .. } => "view",
        Expr::Merge { .. } => "merge",
        Expr::Permute { .. } => "permute",
        Expr::Repeat { .. } => "repeat",
        Expr::Const { .. } => "const",
        _ => return expr.inner().iter().try_for_each(check_derivable),
    };
    Err(broken("module", "a rule of modules does not say what becomes of scales")
        .with_expected("shard, slice, pad, on, cast, concat or stack", what))
}

/// The size of smaller FP8 blocks that no cut of the expression falls inside, if one falls inside the blocks as they are
/// (vLLM's rule: what divides the block's sides, the part that each rank gets, and the side that is not cut).
pub(in crate::plan) fn refined(expr: &Expr, parts: &Parts<'_>) -> Result<Option<u64>> {
    let below = |smallest: Option<u64>, block: Option<u64>| smallest.into_iter().chain(block).min();
    let inner =
        expr.inner().iter().try_fold(None, |block, inner| Ok::<_, Error>(below(block, refined(inner, parts)?)))?;
    let Expr::Shard { x, dim, cut } = expr else { return Ok(inner) };
    let Some(Taken { linear, sizes, ends }) = taken(x, parts)? else { return Ok(inner) };
    let (Some(block), Some(&size)) = (linear.block, sizes.get(*dim)) else { return Ok(inner) };
    let count = cut.part(size, parts.mesh, Rank(0))?.1;
    let unit = lcm(cut.unit, lcm(linear.align(*dim), linear.one(*dim)));
    if count <= 1 || !size.is_multiple_of(count) || gcd(size / count, ends).is_multiple_of(unit) {
        return Ok(inner);
    }
    let sides = sizes.iter().rev().take(2).copied().chain([size / count, ends]);
    let refined = sides.fold(gcd(block[0], block[1]), gcd);
    Ok(below(inner, (refined >= REFINED_BLOCK_MIN).then_some(refined)))
}

/// What all ranks have of a module before it is divided: all of it, or one of the blocks of a fused one.
struct Taken {
    linear: Linear,
    sizes: SmallVec<[u64; 3]>,
    /// What divides the indices at which slices begin and end.
    ends: u64,
}

fn taken(expr: &Expr, parts: &Parts<'_>) -> Result<Option<Taken>> {
    let whole = |linear: Linear| Taken { sizes: linear.sizes.clone(), linear, ends: 0 };
    match expr {
        Expr::Source => Ok(Some(whole(parts.matched.clone()))),
        Expr::Tensor(name) => (parts.named)(name).map(whole).map(Some),
        Expr::Slice { x, dim, start, len, step: 1 } => {
            let Some(mut all) = taken(x, parts)? else { return Ok(None) };
            if let Some(size) = all.sizes.get_mut(*dim) {
                (*size, all.ends) = (*len, gcd(all.ends, gcd(*start, *len)));
            }
            Ok(Some(all))
        }
        Expr::Shard { x, dim, cut } => {
            let Some(all) = taken(x, parts)? else { return Ok(None) };
            // What other dimensions are divided into is none of this one's.
            let count = match all.sizes.get(*dim) {
                Some(&size) => cut.part(size, parts.mesh, Rank(0))?.1,
                None => return Ok(None),
            };
            Ok(Some(all).filter(|all| count == 1 || *dim + 2 < all.sizes.len()))
        }
        _ => Ok(None),
    }
}

struct Deriver<'a> {
    suffix: &'a str,
    parts: &'a Parts<'a>,
}

/// An expression of a stored tensor, and what is known of the logical matrix that it is of.
struct Derived {
    expr: Expr,
    dims: SmallVec<[Dim; 4]>,
    /// Whether it is one element.
    is_scalar: bool,
    merged: Merged,
    logical: SmallVec<[Logical; 3]>,
    is_dense: bool,
    whole_inputs: Option<&'static str>,
}

/// A logical dimension.
#[derive(Debug, Clone, Copy)]
struct Logical {
    /// Its size; `None` where ranks have different parts.
    size: Option<u64>,
    /// So many indices that no tensor of the module divides.
    align: u64,
    /// The size of a group where one is all of the dimension, else 1: parts may share it, but nothing follows less.
    one: u64,
    /// Whether the last of the former groups has fewer.
    ragged: bool,
}

impl Logical {
    fn of(size: u64, align: u64, one: u64) -> Logical {
        Logical { size: Some(size).filter(|&size| size != UNKNOWN), align, one, ragged: !size.is_multiple_of(align) }
    }

    /// The groups that do not end where this does, if there are any: of a part that is one of several of a module
    /// only those that it does not share.
    fn unfinished(&self, of_one: bool) -> Option<u64> {
        let shares = of_one || self.size.is_some_and(|size| size.is_multiple_of(self.one));
        match (self.ragged, self.one) {
            (true, _) => Some(self.align),
            (false, one) if one > 1 && !shares => Some(one),
            _ => None,
        }
    }
}

impl Deriver<'_> {
    fn derive(&self, expr: &Expr) -> Result<Derived> {
        match expr {
            Expr::Source => self.leaf(Expr::Source, self.parts.matched),
            Expr::Tensor(name) => self.leaf(Expr::Tensor(format!("{name}{}", self.suffix)), &(self.parts.named)(name)?),
            Expr::Shard { x, dim, cut } => self.derive(x)?.shard(*dim, cut, self.parts.mesh),
            Expr::Slice { x, dim, start, len, step } => self.derive(x)?.slice(*dim, *start, *len, *step),
            Expr::Pad { x, dim, to, fill } => {
                let derived = self.derive(x)?;
                let logical = derived.logical(*dim)?;
                if !to.is_multiple_of(logical.align) {
                    return Err(inside("padding", logical.align, format!("{to} indices")));
                }
                let at = Dim::find(&derived.dims, *dim);
                Ok(derived.with(*dim, Logical::of(*to, logical.align, logical.one), |x| match at {
                    Some((dim, per, of)) => Expr::Pad { x, dim, to: to / of * per, fill: fill.clone() },
                    None => *x,
                }))
            }
            Expr::On { x, by, part, fill } => {
                let derived = self.derive(x)?;
                let on = |x| Expr::On { x, by: by.clone(), part: *part, fill: fill.clone() };
                Ok(Derived { expr: on(Box::new(derived.expr)), ..derived })
            }
            Expr::Cast { x, to } => {
                let derived = self.derive(x)?;
                if !derived.is_dense {
                    return Err(broken("cast", "quantised weights are not cast"));
                }
                if !self.parts.matched.casts(self.suffix) {
                    return Ok(derived);
                }
                Ok(Derived { expr: Expr::Cast { x: Box::new(derived.expr), to: *to }, ..derived })
            }
            Expr::Concat { dim, parts } => self.concat(*dim, parts),
            Expr::Stack { parts } => self.stack(parts),
            Expr::View { .. }
            | Expr::Merge { .. }
            | Expr::Permute { .. }
            | Expr::Repeat { .. }
            | Expr::Const { .. }
            | Expr::Select { .. } => unreachable!("bug in shardlift: an expression of modules was checked"),
        }
    }

    fn leaf(&self, expr: Expr, linear: &Linear) -> Result<Derived> {
        let refined = self.parts.refined.filter(|_| linear.block.is_some()).map(|block| linear.refine(block));
        let linear = refined.as_ref().unwrap_or(linear);
        let stored = linear.stored(self.suffix).ok_or_else(|| {
            let all: Vec<&str> = linear.stored.iter().map(|stored| stored.suffix).collect();
            broken("module", format!("module has no `{}`", self.suffix))
                .with_expected("as its other parts", all.join(", "))
        })?;
        let logical = linear.sizes.iter().enumerate();
        let logical = logical.map(|(dim, &size)| Logical::of(size, linear.align(dim), linear.one(dim)));
        Ok(Derived {
            expr: stored.refine(expr),
            dims: stored.dims.clone(),
            is_scalar: stored.is_scalar,
            merged: stored.merged,
            logical: logical.collect(),
            is_dense: linear.is_dense(),
            whole_inputs: linear.whole_inputs,
        })
    }

    /// The parts, where a selection is derived in each of its own; and what the first of all is.
    fn parts(&self, parts: &[Expr], see: &mut dyn FnMut(&Derived) -> Result<()>) -> Result<(Vec<Expr>, Derived)> {
        let mut exprs = Vec::with_capacity(parts.len());
        let mut first = None;
        let mut each = |expr: &Expr| -> Result<Expr> {
            let derived = self.derive(expr)?;
            see(&derived)?;
            let expr = derived.expr.clone();
            first.get_or_insert(derived);
            Ok(expr)
        };
        for part in parts {
            exprs.push(match part {
                Expr::Select { by, of } => {
                    Expr::Select { by: by.clone(), of: of.iter().map(&mut each).collect::<Result<_>>()? }
                }
                part => each(part)?,
            });
        }
        let first = first.ok_or_else(|| broken("concat", "nothing is put together"))?;
        Ok((exprs, first))
    }

    fn concat(&self, dim: usize, parts: &[Expr]) -> Result<Derived> {
        let of_one = parts.iter().all(|part| part.names() == 0);
        let (mut whole, mut last) = (Some(0), None::<Logical>);
        let (exprs, mut first) = self.parts(parts, &mut |derived| {
            let part = derived.logical(dim)?;
            if let Some((before, group)) = last.and_then(|last| Some((last, last.unfinished(of_one)?))) {
                let found =
                    before.size.map_or_else(|| "a part of each rank".to_owned(), |size| format!("{size} indices"));
                return Err(inside("the end of a part that others follow", group, found));
            }
            whole = whole.zip(part.size).map(|(whole, size): (u64, u64)| whole.saturating_add(size));
            last = Some(part);
            Ok(())
        })?;
        let Some(part) = last else { return Err(broken("concat", "nothing is put together")) };
        let is_counted = parts.iter().all(|part| !matches!(part, Expr::Select { .. }));
        let last_only = first.is_scalar && !of_one && is_counted && self.has_last_only();
        let at = if of_one { Dim::find(&first.dims, dim).map(|(at, ..)| at) } else { Dim::place(&first.dims, dim) };
        let merged = match (at, first.merged) {
            (Some(dim), _) => Expr::Concat { dim, parts: exprs },
            // Parts of one module, which stays one.
            (None, _) if of_one => first.expr.clone(),
            (None, Merged::Each) => {
                let count = exprs.len() as u64;
                let all = if first.dims.is_empty() {
                    Expr::Stack { parts: exprs }
                } else {
                    Expr::Concat { dim: 0, parts: exprs }
                };
                match last_only {
                    true => Expr::Slice { x: Box::new(all), dim: 0, start: count - 1, len: 1, step: 1 },
                    false => all,
                }
            }
            (None, Merged::First(len)) => {
                let own = first.dims.first().and_then(|own| match *own {
                    Dim::Of { dim, per, of } => first.logical.get(dim)?.size.map(|size| size.div_ceil(of) * per),
                    Dim::One { .. } | Dim::Own => Some(len),
                });
                let len =
                    own.ok_or_else(|| broken("module", format!("parts with `{}` are cut before", self.suffix)))?;
                Expr::Slice { x: Box::new(Expr::Concat { dim: 0, parts: exprs }), dim: 0, start: 0, len, step: 1 }
            }
        };
        if first.is_scalar && !of_one {
            (first.is_scalar, first.dims) = (last_only, smallvec![Dim::Own]);
        }
        Ok(first.with(dim, Logical { size: whole, ..part }, |_| merged))
    }

    /// Whether only the last of several scalars is taken.
    fn has_last_only(&self) -> bool {
        let is = |(of, unless): &(&str, &str)| *of == self.suffix && self.parts.matched.stored(unless).is_none();
        self.parts.scalars.last.iter().any(is)
    }

    fn stack(&self, parts: &[Expr]) -> Result<Derived> {
        let (exprs, mut first) = self.parts(parts, &mut |_| Ok(()))?;
        let is_flat = self.parts.scalars.flat && first.is_scalar && !first.dims.is_empty();
        if is_flat {
            first.dims.clear();
        }
        for dim in &mut first.dims {
            if let Dim::Of { dim, .. } | Dim::One { dim, .. } = dim {
                *dim += 1;
            }
        }
        first.dims.insert(0, Dim::same(0));
        first.logical.insert(0, Logical { size: None, align: 1, one: 1, ragged: false });
        first.is_scalar = false;
        let expr = if is_flat { Expr::Concat { dim: 0, parts: exprs } } else { Expr::Stack { parts: exprs } };
        Ok(Derived { expr, ..first })
    }
}

impl Derived {
    fn logical(&self, dim: usize) -> Result<Logical> {
        self.logical.get(dim).copied().ok_or_else(|| {
            broken("dimension", "module has no such dimension")
                .with_expected(format!("a dimension below {}", self.logical.len()), dim)
        })
    }

    /// The same with another expression, and a logical dimension that it changed.
    fn with(mut self, dim: usize, logical: Logical, expr: impl FnOnce(Box<Expr>) -> Expr) -> Derived {
        self.expr = expr(Box::new(self.expr));
        self.logical[dim] = logical;
        self
    }

    fn shard(self, dim: usize, cut: &Cut, mesh: Mesh) -> Result<Derived> {
        let logical = self.logical(dim)?;
        let unit = lcm(cut.unit, logical.align);
        if unit != cut.unit && matches!(cut.how, Split::RoundRobin | Split::Table(_)) {
            return Err(inside("a unit of the cut", logical.align, format!("units of {}", cut.unit)));
        }
        let whole = Cut { unit, units: None, replicate_units: cut.replicate_units && unit == cut.unit, ..cut.clone() };
        match (logical.size, self.whole_inputs.filter(|_| dim + 1 == self.logical.len())) {
            (Some(_), Some(why)) => {
                // The size may be that of all rows together: it says nothing about units.
                let count = cut.by.of(mesh, Rank(0))?.1;
                if count > 1 {
                    return Err(broken("quantization", why).with_expected("1 part", format!("{count} parts")));
                }
            }
            (Some(size), None) => {
                cut.check_units(size)?;
                whole.take(size, mesh, Rank(0))?;
            }
            (None, _) => {}
        }
        let size = match logical.size {
            Some(size) if whole.part(size, mesh, Rank(0))?.1 == 1 => Some(size),
            _ => None,
        };
        let at = Dim::find(&self.dims, dim);
        Ok(self.with(dim, Logical { size, ..logical }, |x| match at {
            Some((dim, per, of)) => {
                // What is as long as the matrix is held against the configuration like it.
                let units = cut.units.filter(|_| unit == cut.unit && (per, of) == (1, 1));
                Expr::Shard { x, dim, cut: Cut { unit: unit / of * per, units, ..whole } }
            }
            None => *x,
        }))
    }

    fn slice(self, dim: usize, start: u64, len: u64, step: u64) -> Result<Derived> {
        let logical = self.logical(dim)?;
        let Logical { size, align, .. } = logical;
        let ends = len.is_multiple_of(align) || size.is_some_and(|size| start.checked_add(len) == Some(size));
        if !start.is_multiple_of(align) || !ends || (step != 1 && align != 1) {
            return Err(inside("slice", align, format!("{len} from {start} by {step}")));
        }
        let at = Dim::find(&self.dims, dim);
        Ok(self.with(dim, Logical::of(len, align, logical.one), |x| match at {
            Some((dim, per, of)) => {
                Expr::Slice { x, dim, start: start / of * per, len: len.div_ceil(of).saturating_mul(per), step }
            }
            None => *x,
        }))
    }
}

impl Linear {
    /// Whether its weight is one tensor of plain numbers.
    fn is_dense(&self) -> bool {
        self.block.is_none() && self.stored.iter().all(|stored| is_plain(stored.suffix))
    }

    /// Whether the tensor with this suffix is cast with the model: scales, zeros and the like have types of their own.
    pub(in crate::plan) fn casts(&self, suffix: &str) -> bool {
        is_added(suffix) || (is_weight(suffix) && self.is_dense())
    }

    /// The same with smaller FP8 blocks.
    fn refine(&self, to: u64) -> Linear {
        let mut refined = self.clone();
        let Some(block) = self.block else { return refined };
        for Stored { dims, refined: repeats, .. } in &mut refined.stored {
            let [.., rows, columns] = &mut dims[..] else { continue };
            let group = |at: &Dim| match *at {
                Dim::Of { dim, of, .. } | Dim::One { dim, of } => Some((dim, of)),
                Dim::Own => None,
            };
            let (Some((first, of_rows)), Some((second, of_columns))) = (group(rows), group(columns)) else { continue };
            if [of_rows, of_columns] == block {
                let counts = [first, second].map(|dim| self.sizes[dim].div_ceil(to));
                *repeats = Some([(of_rows / to, counts[0]), (of_columns / to, counts[1])]);
                *rows = Dim::groups(first, to, counts[0]);
                *columns = Dim::groups(second, to, counts[1]);
            }
        }
        refined
    }
}

impl Stored {
    /// The scales of smaller blocks.
    fn refine(&self, expr: Expr) -> Expr {
        let Some(repeats) = self.refined else { return expr };
        let first = self.dims.len() - 2;
        repeats.into_iter().enumerate().fold(expr, |x, (at, (times, len))| {
            let repeated = Expr::Repeat { x: Box::new(x), dim: first + at, times };
            Expr::Slice { x: Box::new(repeated), dim: first + at, start: 0, len, step: 1 }
        })
    }
}

/// Scales of the queries, keys and values that a module puts out, not of its weight.
const CACHE_SCALES: [&str; 3] = [".q_scale", ".k_scale", ".v_scale"];

/// What a module may have that nobody quantised.
pub(super) fn is_plain(suffix: &str) -> bool {
    is_weight(suffix) || is_added(suffix) || CACHE_SCALES.contains(&suffix)
}

fn is_weight(suffix: &str) -> bool {
    matches!(suffix, "" | ".weight")
}

/// What is plain numbers whatever a quantiser made of the weight: a bias, and what an adapter adds.
fn is_added(suffix: &str) -> bool {
    matches!(suffix, ".bias" | "_bias") || suffix.starts_with(".lora_")
}

/// Why tensors of a module cannot be divided alike.
fn inside(what: &str, align: u64, found: String) -> Error {
    broken("unit", format!("{what} falls inside a group")).with_expected(format!("a multiple of {align}"), found)
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
