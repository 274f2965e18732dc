//! Builders that hand loaded tensors to models by name.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::{self, Backend, SimpleBackend, VarBuilder, VarBuilderArgs};

use super::{check_dtype, tensor, wrapped};
use crate::error;
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
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) for a rank whose tensors are not in these weights.
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
/// [candle's](candle_nn::var_builder::Shard), which converts to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shard {
    /// One of `world_size` equal parts of dimension `dim`: all of the tensor if that is 1.
    Simple {
        /// The dimension.
        dim: usize,
        /// Which part.
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
pub struct Unsharded(Held);

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

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.tensor(name, device)?.0.to_dtype(dtype)
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
        let mut tensors = HashMap::new();
        for tensor in weights.take_rank(rank)? {
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
        let failed = State::Failed(format!("tensor {name}: it was lost when it was first asked for"));
        let made = match std::mem::replace(&mut entry.state, failed) {
            State::Made(made) => made,
            State::Loaded(loaded) => tensor(loaded, device)?,
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
        let sizes = shape.iter().map(|&size| size as usize);
        Ok(Some(ranges.into_iter().map(|range| range.start as usize..range.end as usize).zip(sizes).collect()))
    }

    /// The part of a tensor that is wanted, if this rank has it.
    fn part(&self, shape: Shape, name: &str, shard: Shard, device: &Device) -> Result<Tensor> {
        let (tensor, dest) = self.tensor(name, device)?;
        let loaded = self.loaded(dest)?;
        let all = matches!(shard, Shard::Simple { world_size: 1, .. });
        let Some(loaded) = loaded else {
            // Made of several tensors, padded, or turned around: it is what it is.
            if all {
                check_shape(name, shape, &tensor)?;
                return Ok(tensor);
            }
            candle_core::bail!("tensor {name} (rank {}): what was loaded is no plain part of one tensor", self.rank);
        };
        let lacks = |wanted: &str| {
            let part = |(range, size): &Loaded| format!("{}..{} of {size}", range.start, range.end);
            let held: Vec<String> = loaded.iter().map(part).collect();
            let message =
                format!("tensor {name} (rank {}): {wanted} was not loaded, but [{}]", self.rank, held.join(", "));
            Error::msg(message)
        };
        if all {
            if loaded.iter().any(|(range, size)| *range != (0..*size)) {
                return Err(lacks("all of it"));
            }
            check_shape(name, shape, &tensor)?;
            return Ok(tensor);
        }
        let (Shard::Simple { dim, .. } | Shard::Offset { dim, .. }) = shard;
        let Some((held, size)) = loaded.get(dim) else {
            candle_core::bail!("tensor {name} has {} dimensions, and no dimension {dim}", loaded.len());
        };
        let wanted = match shard {
            Shard::Simple { rank, world_size, .. } if world_size > 0 && size % world_size == 0 && rank < world_size => {
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
            return Err(lacks(&format!("{}..{} of dimension {dim}", wanted.start, wanted.end)));
        }
        if wanted == *held {
            return Ok(tensor);
        }
        tensor.narrow(dim, wanted.start - held.start, wanted.len())?.force_contiguous()
    }
}
