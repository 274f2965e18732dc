//! Expression -> form: which tensors, and which indices each rank gets of them.

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::{Dims, For, Form, Sources, broken};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::extent::Rank;
use crate::plan::cut::{Cut, Split, Taken};
use crate::plan::expr::{Expr, Fill};
use crate::plan::world::Coord;

/// Makes forms of an expression, naming its sources one after the other.
pub(super) struct Maker<'a> {
    pub(super) sources: &'a Sources<'a>,
    pub(super) whom: For,
    pub(super) casting: Option<Dtype>,
    /// Position of the next named source.
    pub(super) next: usize,
}

impl Maker<'_> {
    pub(super) fn make(&mut self, expr: &Expr) -> Result<Form> {
        match expr {
            Expr::Source => {
                let matched = self.sources.matched.expect("bug in shardlift: nothing was matched");
                self.source(matched)
            }
            Expr::Tensor(_) => {
                let named = self.sources.named[self.next];
                self.next += 1;
                self.source(named)
            }
            Expr::View { x, dims } => self.make(x)?.view(dims),
            Expr::Merge { x, dim, count } => self.make(x)?.merge(*dim, *count),
            Expr::Slice { x, dim, start, len, step } => self.make(x)?.slice(*dim, *start, *len, *step),
            Expr::Shard { x, dim, cut } => {
                let form = self.make(x)?;
                self.shard(form, *dim, cut)
            }
            Expr::Permute { x, order } => self.make(x)?.permute(order),
            Expr::Cast { x, to } => self.make(x)?.cast(*to),
            Expr::Concat { dim, parts } => match self.parts(parts)? {
                (forms, Some(sample)) if forms.is_empty() => sample.slice(*dim, 0, 0, 1),
                (forms, _) => Form::concat(*dim, forms),
            },
            Expr::Stack { parts } => self.stack(parts),
            Expr::Select { .. } => Err(broken("select", "a selection is no part of a concat or a stack")),
            Expr::Pad { x, dim, to, fill } => {
                let form = self.make(x)?;
                let to = match self.whom {
                    For::Rank(..) => *to,
                    // All parts together may be more than each of them is padded to.
                    For::All(_) => (*to).max(form.dim(*dim)?),
                };
                form.pad(*dim, to, fill)
            }
            Expr::Repeat { x, dim, times } => self.make(x)?.repeat(*dim, *times),
            Expr::Const { dtype, dims, fill } => Ok(Form::filled(*dtype, Dims::from_slice(dims), fill.clone())),
            Expr::On { x, by, part, fill } => {
                let form = self.make(x)?;
                self.only_on(form, by, *part, fill)
            }
        }
    }

    fn source(&self, tensor: u32) -> Result<Form> {
        let meta = &self.sources.tensors[tensor as usize];
        Form::source(tensor, meta, self.casting).map_err(|error| error.with_tensor(meta.name.as_str()))
    }

    fn shard(&self, mut form: Form, dim: usize, cut: &Cut) -> Result<Form> {
        let size = form.dim(dim)?;
        let (mesh, rank) = match self.whom {
            For::Rank(mesh, rank) => (mesh, rank),
            For::All(mesh) => {
                let parts = cut.part(size, mesh, Rank(0))?.1;
                form.cut_into(parts);
                let Split::Table(table) = &cut.how else { return Ok(form) };
                if size == 0 {
                    return Ok(form); // no units to be listed
                }
                let runs = table.iter().flatten().map(|run| {
                    let at = |unit: u64| unit.saturating_mul(cut.unit).min(size);
                    let (start, end) = (at(run.start), at(run.end));
                    form.clone().slice(dim, start.min(end), end.saturating_sub(start), 1)
                });
                return Form::concat(dim, runs.collect::<Result<_>>()?);
            }
        };
        form.cut_into(cut.part(size, mesh, rank)?.1);
        let taken = cut.take(size, mesh, rank)?;
        match taken[..] {
            [] => form.slice(dim, 0, 0, 1),
            [run] => form.slice(dim, run.start, run.len, run.step),
            _ => {
                let runs = taken.iter().map(|run| form.clone().slice(dim, run.start, run.len, run.step));
                Form::concat(dim, runs.collect::<Result<_>>()?)
            }
        }
    }

    /// The forms of parts, where selections are what they select, and one of a part if there are none.
    fn parts(&mut self, parts: &[Expr]) -> Result<(Vec<Form>, Option<Form>)> {
        let mut forms = Vec::with_capacity(parts.len());
        let mut sample = None;
        for part in parts {
            let Expr::Select { by, of } = part else {
                forms.push(self.make(part)?);
                continue;
            };
            let first = self.next;
            let count = of.len() as u64;
            let (taken, parts) = match self.whom {
                For::Rank(mesh, rank) => (by.take(count, mesh, rank)?, by.part(count, mesh, rank)?.1),
                For::All(mesh) => (all_of(by, count), by.part(count, mesh, Rank(0))?.1),
            };
            // Where the named sources of each of them begin.
            let mut starts = Vec::with_capacity(of.len() + 1);
            starts.push(first);
            for of in of {
                starts.push(starts[starts.len() - 1] + of.names());
            }
            let nth = |maker: &mut Self, at: u64| {
                maker.next = starts[at as usize];
                maker.make(&of[at as usize])
            };
            for run in &taken {
                for at in 0..run.len {
                    let mut form = nth(self, run.start + at * run.step)?;
                    form.cut_into(parts);
                    forms.push(form);
                }
            }
            if forms.is_empty() && count > 0 {
                sample = Some(nth(self, 0)?);
            }
            self.next = starts[of.len()];
        }
        if forms.is_empty()
            && let Some(sample) = &sample
        {
            return Ok((Vec::new(), Some(sample.clone())));
        }
        Ok((forms, sample))
    }

    fn stack(&mut self, parts: &[Expr]) -> Result<Form> {
        let (forms, sample) = self.parts(parts)?;
        match (forms.is_empty(), sample) {
            (true, Some(sample)) => sample.in_a_stack().slice(0, 0, 0, 1),
            (true, None) => Err(broken("stack", "nothing is put together")),
            (false, _) => Form::concat(0, forms.into_iter().map(Form::in_a_stack).collect()),
        }
    }

    fn only_on(&self, mut form: Form, by: &Coord, part: u32, fill: &Fill) -> Result<Form> {
        let (mesh, rank) = match self.whom {
            For::Rank(mesh, rank) => (mesh, rank),
            For::All(mesh) => (mesh, Rank(0)),
        };
        let (i, n) = by.of(mesh, rank)?;
        if part >= n {
            return Err(no_part(n, part));
        }
        form.cut_into(n.into());
        match self.whom {
            For::Rank(..) if i != part => Ok(Form::filled(form.dtype, form.dims, fill.clone())),
            _ => Ok(form),
        }
    }
}

/// Refuses a part of a division that has fewer.
pub(in crate::plan) fn no_part(n: u32, part: u32) -> Error {
    broken("coordinate", "there is no such part").with_expected(format!("one below {n}"), part)
}

/// What all parts have of `count`.
fn all_of(cut: &Cut, count: u64) -> SmallVec<[Taken; 1]> {
    match &cut.how {
        Split::Table(table) => {
            let at = |unit: u64| unit.saturating_mul(cut.unit).min(count);
            let run = |run: &Range<u64>| Taken { start: at(run.start), len: at(run.end) - at(run.start), step: 1 };
            table.iter().flatten().map(run).collect()
        }
        _ => smallvec![Taken { start: 0, len: count, step: 1 }],
    }
}
