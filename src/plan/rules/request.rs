//! Destinations that an engine lists itself, by the names of tensors.

use super::rule::Owner;
use super::{Rules, broken, unusable};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::extent::Rank;
use crate::plan::expr::Expr;
use crate::plan::world::Coord;
use crate::shape::Shape;

/// One destination of an engine's own list. Its expression names tensors of the checkpoint as they are, without wildcards;
/// several requests may name one tensor. What is said of its type and shape is checked when a plan is made, before
/// anything moves.
///
/// ```
/// use shardlift::plan::{Cut, Expr, Request};
/// use shardlift::{Dtype, Rank};
///
/// let rows = |name: &str| Expr::Shard { x: Box::new(Expr::Tensor(name.into())), dim: 0, cut: Cut::default() };
/// let parts = vec![rows("mlp.gate_proj.weight"), rows("mlp.up_proj.weight")];
/// let mut buffer = vec![0u16; 2 * 28 * 16];
/// let request = Request::new("mlp.gate_up", Dtype::Bf16, Expr::Concat { dim: 0, parts })
///     .shape([2 * 28, 16])
///     .memory(Rank(0), buffer.as_mut_ptr().cast(), 2 * buffer.len());
/// # let _ = request;
/// ```
#[derive(Debug, Clone)]
pub struct Request {
    name: String,
    pub(in crate::plan) dtype: Dtype,
    pub(in crate::plan) expr: Expr,
    pub(in crate::plan) owner: Owner,
    /// Of all ranks that hold it, or of one.
    shapes: Vec<(Option<Rank>, Shape)>,
    memory: Vec<Buffer>,
}

/// The caller's memory for a destination of one rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) rank: Rank,
    /// In the address space of the rank's device.
    pub(crate) address: usize,
    pub(crate) bytes: usize,
}

impl Request {
    /// A destination of this name, type and content, on all ranks.
    pub fn new(name: impl Into<String>, dtype: Dtype, expr: Expr) -> Request {
        Request { name: name.into(), dtype, expr, owner: Owner::All, shapes: Vec::new(), memory: Vec::new() }
    }

    /// Every rank that holds it must have this shape, but those with one of their own.
    pub fn shape(mut self, dims: impl AsRef<[u64]>) -> Request {
        self.shapes.push((None, Shape::new(dims.as_ref())));
        self
    }

    /// This rank must have this shape.
    pub fn shape_on(mut self, rank: Rank, dims: impl AsRef<[u64]>) -> Request {
        self.shapes.push((Some(rank), Shape::new(dims.as_ref())));
        self
    }

    /// Only these ranks hold it.
    pub fn on(mut self, ranks: impl IntoIterator<Item = Rank>) -> Request {
        self.owner = Owner::Only(ranks.into_iter().collect());
        self
    }

    /// Only the ranks that have `part` of the division `by` hold it.
    pub fn held_by(mut self, by: Coord, part: u32) -> Request {
        self.owner = Owner::Where(by, part);
        self
    }

    /// The bytes of this rank, which the calling process drives, go to `address`, a pointer in the address space of the
    /// rank's device. [`Loader::start_requests`](crate::Loader::start_requests) puts them there, and says what that
    /// takes.
    pub fn memory(mut self, rank: Rank, address: *mut u8, bytes: usize) -> Request {
        self.memory.push(Buffer { rank, address: address.expose_provenance(), bytes });
        self
    }

    /// The destination's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn buffers(&self) -> &[Buffer] {
        &self.memory
    }

    /// Refuses what makes no sense for any checkpoint.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(what) = unusable(&self.name) {
            return Err(broken("request", format!("a request for {what}")));
        }
        self.expr.check().map_err(|error| self.located(error))?;
        if self.expr.has_source() {
            return Err(self.located(broken("source", "nothing is matched: a request names its tensors")));
        }
        match &self.owner {
            Owner::Where(by, _) => by.check().map_err(|error| self.located(error)),
            _ => Ok(()),
        }
    }

    /// The tensors that it names.
    pub(super) fn sources(&self, checkpoint: &Checkpoint) -> Result<Box<[u32]>> {
        let mut sources = Vec::with_capacity(self.expr.names());
        self.expr.for_each_name(&mut |name| match checkpoint.position(name) {
            Some(position) => {
                sources.push(position as u32);
                Ok(())
            }
            None => Err(self.located(broken("source", format!("no tensor `{name}` for its destination")))),
        })?;
        Ok(sources.into())
    }

    /// Refuses another type than is asked for.
    pub(in crate::plan) fn check_dtype(&self, dtype: Dtype) -> Result<()> {
        if dtype == self.dtype {
            return Ok(());
        }
        Err(self.located(broken("request", "its expression is of another type").with_expected(self.dtype, dtype)))
    }

    /// Refuses another shape than is asked for.
    pub(in crate::plan) fn check_shape(&self, rank: Rank, shape: &Shape) -> Result<()> {
        let asked = |whose: Option<Rank>| self.shapes.iter().rfind(|(rank, _)| *rank == whose);
        match asked(Some(rank)).or_else(|| asked(None)) {
            Some((_, asked)) if asked != shape => Err(self
                .located(broken("request", "its expression has another shape").with_expected(asked, shape))
                .with_rank(rank)),
            _ => Ok(()),
        }
    }

    fn located(&self, error: Error) -> Error {
        let error = error.in_context(format_args!("request `{}`", self.name));
        if error.tensor().is_some() { error } else { error.with_tensor(self.name.as_str()) }
    }
}

impl Rules {
    /// A destination that no rule makes of a tensor: see [`Request`]. Tensors that it names need no rule.
    pub fn submit(mut self, request: Request) -> Rules {
        self.requests.push(request);
        self
    }

    /// Only what is requested; all other tensors are skipped.
    pub(in crate::plan) fn of_requests(requests: &[Request]) -> Rules {
        Rules { requests: requests.to_vec(), ..Rules::new().skip("**").optional() }
    }
}
