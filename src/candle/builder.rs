//! Builders that hand loaded tensors to models by name.

use std::collections::HashMap;
use std::fmt::Display;
use std::ops::Range;
use std::sync::Mutex;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::{self, Backend, SimpleBackend, VarBuilder, VarBuilderArgs};

use super::{check_dtype, tensor, wrapped};
use crate::error::{self, ErrorKind};
use crate::extent::Rank;
use crate::place::{self, Weights};
use crate::plan::Plan;
use crate::sync::lock;

/// A builder over what a rank loaded, which is taken out of the weights: every model of candle's reads from it unchanged.
/// Names, shapes and types are those of the plan; a request for another type is converted, as candle's builders do
/// ([`Rules::casting`](crate::Rules::casting) converts while it loads, and needs no second copy). A rank that loaded a
/// part of a tensor has that part: a model's shapes are those of the rank.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a rank that is not driven here, and one whose tensors were all taken out before, by another
/// builder for instance.
pub fn var_builder(
    weights: &mut Weights,
    rank: Rank,
    dtype: DType,
    device: &Device,
) -> error::Result<VarBuilder<'static>> {
    let backend: Box<dyn SimpleBackend> = Box::new(Unsharded(Held::new(weights, rank)?));
    Ok(VarBuilder::from_backend(backend, dtype, device.clone()))
}

/// A builder over what a rank loaded, for tensor-parallel layers that say with each request which part they want; see
/// [`Sharded`].
///
/// # Errors
/// As [`var_builder()`].
pub fn sharded_var_builder(
    weights: &mut Weights,
    rank: Rank,
    dtype: DType,
    device: &Device,
) -> error::Result<ShardedVarBuilder<'static>> {
    Ok(VarBuilderArgs::new_with_args(Sharded(Held::new(weights, rank)?), dtype, device))
}

/// What a layer wants of a tensor: with the same fields as in mistral.rs, and as
/// [candle's](candle_nn::var_builder::Shard), which converts to it. Indices and sizes are those of the whole tensor in the
/// checkpoint, in elements, and dimension 0 is the outermost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Shard {
    /// One of `world_size` equal parts of dimension `dim`: all of the tensor if that is 1.
    Simple {
        /// The dimension.
        dim: usize,
        /// Which part, counted from 0.
        rank: usize,
        /// How many there are.
        world_size: usize,
    },
    /// `len` indices of dimension `dim` from `offset` on.
    Offset {
        /// The dimension.
        dim: usize,
        /// The first index.
        offset: usize,
        /// How many.
        len: usize,
    },
}

impl Default for Shard {
    /// All of the tensor.
    fn default() -> Shard {
        Shard::Simple { dim: 0, rank: 0, world_size: 1 }
    }
}

impl From<var_builder::Shard> for Shard {
    fn from(var_builder::Shard { dim, rank, world_size }: var_builder::Shard) -> Shard {
        Shard::Simple { dim, rank, world_size }
    }
}

/// A [`VarBuilderArgs`] over [`Sharded`].
pub type ShardedVarBuilder<'a> = VarBuilderArgs<'a, Sharded>;

/// The backend of [`var_builder()`].
#[derive(Debug)]
struct Unsharded(Held);

/// The backend of [`sharded_var_builder()`]. A request for the part that was loaded gets that; one for a part of it gets a
/// copy; one for anything that this rank did not load is an error that says what it loaded.
#[derive(Debug)]
pub struct Sharded(Held);

impl SimpleBackend for Unsharded {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let (found, _) = self.0.tensor(name, device)?;
        check_shape(name, shape, &found)?;
        found.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.tensor(name, device)?.0.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.param(name).is_some()
    }
}

impl Backend for Sharded {
    type Hints = Shard;

    /// As in candle and mistral.rs the shape is that of the whole tensor, and only looked at if all of it is wanted.
    fn get(&self, shape: Shape, name: &str, shard: Shard, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.part(shape, name, shard, device)?.to_dtype(dtype)
    }

    /// As there all of the tensor: an error if this rank loaded a part of it.
    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.whole(name, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.param(name).is_some()
    }
}

fn check_shape(name: &str, expected: Shape, found: &Tensor) -> Result<()> {
    if *found.shape() == expected {
        return Ok(());
    }
    let msg = format!("shape mismatch for {name}");
    Err(Error::UnexpectedShape { msg, expected, got: found.shape().clone() }.bt())
}

/// The tensors of a rank: as they were loaded until somebody asks for them, and candle's from then on.
#[derive(Debug)]
struct Held {
    plan: Plan,
    rank: Rank,
    /// By position in the plan's parameters. An alias has no entry: it is its original.
    tensors: Mutex<HashMap<u32, Entry>>,
}

#[derive(Debug)]
struct Entry {
    /// Position in the rank's destinations.
    dest: usize,
    state: State,
}

/// The indices of a dimension of the checkpoint's tensor that a rank loaded, and how many there are.
type Loaded = (Range<usize>, usize);

#[derive(Debug)]
enum State {
    Loaded(place::Tensor),
    Made(Tensor),
    /// It did not become a tensor of candle's, and its memory is gone.
    Failed(String),
}

impl Held {
    fn new(weights: &mut Weights, rank: Rank) -> error::Result<Held> {
        let plan = weights.plan().clone();
        let taken = weights.take_rank(rank)?;
        if taken.is_empty() && !plan.rank(rank).dests.is_empty() {
            return Err(error::Error::new(ErrorKind::NotFound, "its tensors were taken out").with_rank(rank));
        }
        let mut tensors = HashMap::new();
        for tensor in taken {
            let param = tensor.param_position();
            if plan.params()[param].alias_of.is_none() {
                let entry = Entry { dest: tensor.position(), state: State::Loaded(tensor) };
                tensors.insert(param as u32, entry);
            }
        }
        Ok(Held { plan, rank, tensors: Mutex::new(tensors) })
    }

    /// Position of the parameter that has the bytes of this name.
    fn param(&self, name: &str) -> Option<u32> {
        let params = self.plan.params();
        let found = params.binary_search_by(|param| param.name.as_str().cmp(name)).ok()?;
        let original = params[found].alias_of.unwrap_or(found as u32);
        lock(&self.tensors).contains_key(&original).then_some(original)
    }

    /// What was loaded under this name, and its position in the rank's destinations.
    fn tensor(&self, name: &str, device: &Device) -> Result<(Tensor, usize)> {
        let missing = || Error::CannotFindTensor { path: name.to_owned() }.bt();
        let param = self.param(name).ok_or_else(missing)?;
        let mut tensors = lock(&self.tensors);
        let entry = tensors.get_mut(&param).ok_or_else(missing)?;
        if let State::Loaded(loaded) = &entry.state {
            check_dtype(loaded)?; // it stays what it is
        }
        let lost = |why: &dyn Display| format!("tensor {name} was lost when it was first asked for: {why}");
        let made = match std::mem::replace(&mut entry.state, State::Failed(lost(&"a panic"))) {
            State::Made(made) => made,
            State::Loaded(loaded) => {
                tensor(loaded, device).inspect_err(|why| entry.state = State::Failed(lost(why)))?
            }
            State::Failed(why) => {
                entry.state = State::Failed(why.clone());
                return Err(Error::msg(why));
            }
        };
        entry.state = State::Made(made.clone());
        Ok((made.to_device(device)?, entry.dest))
    }

    /// What a destination has of each dimension; `None` if it is no plain part of one tensor.
    fn loaded(&self, dest: usize) -> Result<Option<Vec<Loaded>>> {
        let leaves = self.plan.leaves(self.rank, dest).map_err(wrapped)?;
        let [leaf] = leaves.as_slice() else { return Ok(None) };
        let shape = &self.plan.tensor(leaf.tensor).shape;
        let Some(ranges) = leaf.ranges(shape) else { return Ok(None) };
        // Viewed in other dimensions, or filled up, its indices are not those of the tensor.
        let has = self.plan.rank(self.rank).dests[dest].shape.iter().copied();
        if !has.eq(ranges.iter().map(|range| range.end - range.start)) {
            return Ok(None);
        }
        let sizes = shape.iter().map(|&size| size as usize);
        Ok(Some(ranges.into_iter().map(|range| range.start as usize..range.end as usize).zip(sizes).collect()))
    }

    /// The error that this rank has other indices of a tensor than are wanted.
    fn lacks(&self, name: &str, loaded: &[Loaded], wanted: &str) -> Error {
        let part = |(range, size): &Loaded| format!("{}..{} of {size}", range.start, range.end);
        let held = loaded.iter().map(part).collect::<Vec<_>>().join(", ");
        Error::msg(format!("tensor {name} (rank {}): {wanted} was not loaded, but [{held}]", self.rank))
    }

    /// All of a tensor. What is made of several, filled up, or turned around is what it is.
    fn whole(&self, name: &str, device: &Device) -> Result<Tensor> {
        let (tensor, dest) = self.tensor(name, device)?;
        match self.loaded(dest)? {
            Some(loaded) if loaded.iter().any(|(range, size)| *range != (0..*size)) => {
                Err(self.lacks(name, &loaded, "all of it"))
            }
            _ => Ok(tensor),
        }
    }

    /// The part of a tensor that is wanted, if this rank has it.
    fn part(&self, shape: Shape, name: &str, shard: Shard, device: &Device) -> Result<Tensor> {
        if matches!(shard, Shard::Simple { world_size: 1, .. }) {
            let tensor = self.whole(name, device)?;
            check_shape(name, shape, &tensor)?;
            return Ok(tensor);
        }
        let (tensor, dest) = self.tensor(name, device)?;
        let Some(loaded) = self.loaded(dest)? else {
            candle_core::bail!("tensor {name} (rank {}): what was loaded is no plain part of one tensor", self.rank);
        };
        let (Shard::Simple { dim, .. } | Shard::Offset { dim, .. }) = shard;
        let Some((held, size)) = loaded.get(dim) else {
            candle_core::bail!("tensor {name} has {} dimensions, and no dimension {dim}", loaded.len());
        };
        let wanted = match shard {
            Shard::Simple { rank, world_size, .. } if rank >= world_size => {
                candle_core::bail!("tensor {name}: no part {rank} of {world_size}, which are counted from 0");
            }
            Shard::Simple { rank, world_size, .. } if size % world_size == 0 => {
                let part = size / world_size;
                rank * part..(rank + 1) * part
            }
            Shard::Simple { dim, world_size, .. } => {
                let shape = loaded.iter().map(|(_, size)| *size).collect::<Vec<_>>().into();
                return Err(Error::ShapeMismatchSplit { shape, dim, n_parts: world_size }.bt());
            }
            Shard::Offset { offset, len, .. } => offset..offset.saturating_add(len),
        };
        let others = loaded.iter().enumerate().filter(|(at, _)| *at != dim);
        let whole = others.map(|(_, part)| part).all(|(range, size)| *range == (0..*size));
        if !whole || wanted.start < held.start || wanted.end > held.end {
            let wanted = format!("{}..{} of dimension {dim}", wanted.start, wanted.end);
            return Err(self.lacks(name, &loaded, &wanted));
        }
        if wanted == *held {
            return Ok(tensor);
        }
        if matches!(tensor.dtype(), DType::F4 | DType::F6E2M3 | DType::F6E3M2 | DType::F8E8M0) {
            let dtype = self.plan.params()[self.plan.rank(self.rank).dests[dest].param as usize].dtype;
            candle_core::bail!("tensor {name} (rank {}): candle cuts no {dtype}; rules can load the part", self.rank);
        }
        tensor.narrow(dim, wanted.start - held.start, wanted.len())?.force_contiguous()
    }
}
