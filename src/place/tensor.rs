//! What the caller gets: complete tensors that keep their memory alive.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::destinations::{Destinations, Place};
use super::{Digest, Moved};
use crate::device::Allocation;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::plan::{Dest, Param, Plan};
use crate::shape::Shape;

/// One tensor of one rank, complete in its memory, which lives for as long as the tensor or a clone of it does. Memory of a
/// GPU is given back when the last of them is dropped: work of the caller's that uses it must have ended by then.
#[derive(Clone)]
pub struct Tensor {
    plan: Plan,
    rank: Rank,
    dest: u32,
    address: u64,
    owner: Arc<Allocation>,
}

impl Tensor {
    /// The tensor at a place that is complete; `None` if it is not memory of this process.
    pub(crate) fn new(plan: &Plan, destinations: &Destinations, rank: Rank, dest: u32) -> Option<Tensor> {
        let Place { address, owner, lent: _ } = destinations.place(rank, dest)?;
        Some(Tensor { plan: plan.clone(), rank, dest, address: *address, owner: Arc::clone(owner.as_ref()?) })
    }

    /// The rank that holds it.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The name of the destination.
    pub fn name(&self) -> &str {
        &self.param().name
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.param().dtype
    }

    /// The shape of this rank's part.
    pub fn shape(&self) -> &Shape {
        &self.dest().shape
    }

    /// The size in bytes.
    pub fn nbytes(&self) -> usize {
        // The shape's size was checked when the plan was made; an alias has the size of its original.
        self.shape().bytes(self.dtype()).expect("bug in shardlift: a planned shape overflows") as usize
    }

    /// The largest power of two that the address is a multiple of: at least 256 in blocks, at least the element's size
    /// in memory per tensor (a `Vec` is freed with the alignment of its element), what the file or the caller chose
    /// otherwise.
    pub fn alignment(&self) -> usize {
        1 << (self.address.trailing_zeros().min(63))
    }

    /// The bytes, row-major and dense, in the file's (little-endian) element format; `None` if they are in the memory of
    /// a GPU.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        if self.owner.device().is_some() {
            return None;
        }
        if self.address == 0 {
            return Some(&[]); // what the caller may give for no bytes
        }
        let address = std::ptr::with_exposed_provenance::<u8>(self.address as usize);
        // SAFETY: a `Tensor` exists only for complete destinations, and this one is in host memory: every byte was
        // written, none is written again, and `owner` keeps the memory alive.
        Some(unsafe { std::slice::from_raw_parts(address, self.nbytes()) })
    }

    /// The bytes, copied to host memory if they are in that of a GPU.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the GPU refuses; [`ErrorKind::Stalled`] if it does not answer within the bound of
    /// [`Loader::stall`](crate::Loader::stall): then the tensor's memory is kept for ever, for the GPU may still read it.
    pub fn to_bytes(&self) -> Result<Cow<'_, [u8]>> {
        let Some(device) = self.owner.device() else {
            return Ok(Cow::Borrowed(self.as_bytes().unwrap_or_default()));
        };
        let mut bytes = vec![0; self.nbytes()];
        if !bytes.is_empty() {
            // SAFETY: the tensor is complete, nobody writes it again, and `owner` keeps it alive, for ever if this stalls.
            unsafe { device.read(self.address, &mut bytes) }.map_err(|error| self.refused(error))?;
        }
        Ok(Cow::Owned(bytes))
    }

    /// The digest of its bytes, taken where they are.
    ///
    /// # Errors
    /// As [`to_bytes`](Tensor::to_bytes).
    pub fn digest(&self) -> Result<u64> {
        match self.owner.device() {
            Some(device) if self.nbytes() > 0 && self.address.is_multiple_of(8) => {
                // SAFETY: as in `to_bytes`; the address is on a word.
                unsafe { device.digest(self.address, self.nbytes() as u64) }.map_err(|error| self.refused(error))
            }
            // The caller's memory may start anywhere.
            _ => Ok(Digest::of(&self.to_bytes()?)),
        }
    }

    /// The address of the first byte, in the address space of the rank's device.
    pub fn device_ptr(&self) -> u64 {
        self.address
    }

    /// Takes the memory over as a vector, without a copy.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if the tensor was not loaded with `Memory::PerTensor`, if another handle to it (or an
    /// alias) lives, or if `T` is not the element type of its dtype.
    pub fn into_vec<T: Element>(self) -> Result<Vec<T>> {
        self.try_into_vec().map_err(|(tensor, why)| {
            Error::new(ErrorKind::Usage, format!("cannot become a vector: {why}"))
                .with_tensor(tensor.name())
                .with_rank(tensor.rank)
        })
    }

    /// As [`into_vec`](Tensor::into_vec), but gives itself back with the reason if that cannot be.
    pub(crate) fn try_into_vec<T: Element>(self) -> Result<Vec<T>, (Tensor, &'static str)> {
        if !T::DTYPES.contains(&self.dtype()) {
            return Err((self, "another element type"));
        }
        let Tensor { plan, rank, dest, address, owner } = self;
        let allocation = match Arc::try_unwrap(owner) {
            Ok(allocation) => allocation,
            Err(owner) => {
                return Err((Tensor { plan, rank, dest, address, owner }, "another handle shares its memory"));
            }
        };
        match allocation.into_vec_parts(size_of::<T>(), align_of::<T>()) {
            // SAFETY: the memory came from the global allocator with this alignment and `count * size_of::<T>()`
            // bytes, all of which are written (the tensor is complete); every bit pattern is a `T`; nobody else
            // holds it (the only handle was unwrapped).
            Ok((pointer, count)) => Ok(unsafe { Vec::from_raw_parts(pointer.cast(), count, count) }),
            Err(allocation) => {
                let owner = Arc::new(allocation);
                Err((Tensor { plan, rank, dest, address, owner }, "its memory is not of the global allocator"))
            }
        }
    }

    /// The GPU whose memory it is in.
    #[cfg(feature = "candle-cuda")]
    pub(crate) fn gpu(&self) -> Option<u32> {
        self.owner.device().map(crate::device::DeviceMemory::gpu)
    }

    /// Gives its memory up as what a `CudaSlice` of cudarc can own, if that can be; else itself back.
    #[cfg(feature = "candle-cuda")]
    pub(crate) fn into_gpu_memory(self) -> Result<u64, Tensor> {
        let Tensor { plan, rank, dest, address, owner } = self;
        let owner = match Arc::try_unwrap(owner) {
            Ok(allocation) if allocation.address() == address => match allocation.into_gpu_memory() {
                Ok(address) => return Ok(address),
                Err(allocation) => Arc::new(allocation),
            },
            Ok(allocation) => Arc::new(allocation),
            Err(owner) => owner,
        };
        Err(Tensor { plan, rank, dest, address, owner })
    }

    /// Position in the rank's destinations.
    pub(crate) fn position(&self) -> usize {
        self.dest as usize
    }

    /// Position of its destination in the plan's parameters.
    pub(crate) fn param_position(&self) -> usize {
        self.dest().param as usize
    }

    /// What keeps its memory alive.
    pub(super) fn owner(&self) -> &Arc<Allocation> {
        &self.owner
    }

    /// Its memory, for other bytes.
    pub(super) fn into_place(self) -> Place {
        Place { address: self.address, owner: Some(self.owner), lent: false }
    }

    /// An error of the device that was asked for the bytes.
    #[expect(
        clippy::mem_forget,
        reason = "freeing memory that a stalled device may still read is worse than leaking it"
    )]
    fn refused(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::Stalled {
            std::mem::forget(Arc::clone(&self.owner));
        }
        error.with_tensor(self.name()).with_rank(self.rank)
    }

    fn dest(&self) -> &Dest {
        &self.plan.rank(self.rank).dests[self.dest as usize]
    }

    fn param(&self) -> &Param {
        &self.plan.params()[self.param_position()]
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {} {} rank {})", self.name(), self.dtype(), self.shape(), self.rank)
    }
}

/// A type that elements of a tensor can be taken as.
///
/// # Safety
/// Every bit pattern is a value of the type, and its size is that of each of its dtypes' elements (or 1, for packed
/// ones).
pub unsafe trait Element: Copy {
    /// The dtypes whose elements have this type.
    const DTYPES: &'static [Dtype];
}

macro_rules! elements {
    ($($type:ty: $($dtype:ident)*,)*) => {
        $(
            // SAFETY: a plain number of the dtypes' size.
            unsafe impl Element for $type {
                const DTYPES: &'static [Dtype] = &[$(Dtype::$dtype,)*];
            }
        )*
    };
}

elements! {
    u8: U8 Bool F4 F6E2M3 F6E3M2 F8E5M2 F8E4M3 F8E8M0 F8E4M3Fnuz F8E5M2Fnuz,
    i8: I8,
    i16: I16,
    u16: U16,
    half::f16: F16,
    half::bf16: Bf16,
    i32: I32,
    u32: U32,
    f32: F32,
    f64: F64,
    i64: I64,
    u64: U64,
}

/// All tensors of the ranks of this process: whole, or it does not exist. Its memory can be
/// [loaded into again](crate::Loader::reload).
#[derive(Debug)]
pub struct Weights {
    plan: Plan,
    /// One list for each rank of the world, parallel to the rank's destinations; `None` where taken.
    tensors: Vec<Vec<Option<Tensor>>>,
    /// The same for what the load digested; nothing if it was not to.
    moved: Vec<Vec<Option<Moved>>>,
}

impl Weights {
    pub(crate) fn new(plan: &Plan, destinations: &Destinations, moved: Vec<Vec<Option<Moved>>>) -> Weights {
        let mut tensors = vec![Vec::new(); plan.world().size() as usize];
        for &rank in plan.world().driven() {
            tensors[rank.index()] = (0..plan.rank(rank).dests.len() as u32)
                .map(|dest| Tensor::new(plan, destinations, rank, dest))
                .collect();
        }
        Weights { plan: plan.clone(), tensors, moved }
    }

    /// A tensor of a rank.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the rank holds no tensor of this name (any more), or is not driven here.
    pub fn tensor(&self, rank: Rank, name: &str) -> Result<&Tensor> {
        let position = self.position(rank, name)?;
        self.tensors[rank.index()][position].as_ref().ok_or_else(|| missing(rank, name))
    }

    /// Takes a tensor of a rank out, for instance for [`Tensor::into_vec`].
    ///
    /// # Errors
    /// As [`tensor`](Weights::tensor).
    pub fn take(&mut self, rank: Rank, name: &str) -> Result<Tensor> {
        let position = self.position(rank, name)?;
        self.tensors[rank.index()][position].take().ok_or_else(|| missing(rank, name))
    }

    /// Takes all tensors out: those of each rank of the world.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = impl Iterator<Item = Tensor>> {
        self.moved.clear();
        self.tensors.iter_mut().map(|of_rank| of_rank.iter_mut().filter_map(Option::take))
    }

    /// Takes all tensors of a rank out, sorted by name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the rank is not driven here.
    pub fn take_rank(&mut self, rank: Rank) -> Result<Vec<Tensor>> {
        if !self.plan.world().driven().contains(&rank) {
            return Err(Error::new(ErrorKind::NotFound, "not a rank of this process").with_rank(rank));
        }
        let tensors = self.tensors.get_mut(rank.index()).map(Vec::as_mut_slice).unwrap_or_default();
        Ok(tensors.iter_mut().filter_map(Option::take).collect())
    }

    /// The tensors of a rank, sorted by name.
    pub fn of_rank(&self, rank: Rank) -> impl Iterator<Item = &Tensor> {
        self.tensors.get(rank.index()).into_iter().flatten().flatten()
    }

    /// All tensors, by rank and name.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.iter().flatten().flatten()
    }

    /// The plan that was carried out.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What the load digested of a tensor.
    pub(crate) fn moved(&self, tensor: &Tensor) -> Option<Moved> {
        *self.moved.get(tensor.rank.index())?.get(tensor.position())?
    }

    fn position(&self, rank: Rank, name: &str) -> Result<usize> {
        let params = self.plan.params();
        let param = params.binary_search_by(|param| param.name.as_str().cmp(name)).map_err(|_| missing(rank, name))?;
        if self.tensors.get(rank.index()).is_none_or(Vec::is_empty) {
            return Err(missing(rank, name));
        }
        let dests = &self.plan.rank(rank).dests;
        dests.binary_search_by_key(&(param as u32), |dest| dest.param).map_err(|_| missing(rank, name))
    }
}

fn missing(rank: Rank, name: &str) -> Error {
    Error::new(ErrorKind::NotFound, "no such tensor").with_tensor(name).with_rank(rank)
}
