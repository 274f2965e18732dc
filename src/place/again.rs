//! The memory of weights as destinations once more.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::{Destinations, Tensor, Weights};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::plan::Plan;

impl Weights {
    /// Whether a load of `plan` may write where these weights lie: it has the same destinations, and nobody else can see them.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] naming the first tensor for which that does not hold, and its rank.
    pub(crate) fn check_reusable(&self, plan: &Plan) -> Result<()> {
        let (old, new) = (self.plan().world(), plan.world());
        let devices = |world: &crate::plan::World| -> Vec<_> {
            world.driven().iter().map(|&rank| (rank, world.device(rank))).collect()
        };
        if devices(old) != devices(new) {
            let told = |world| format!("{:?}", devices(world));
            return Err(Error::new(ErrorKind::Usage, "the plan is for other ranks or devices than the weights")
                .with_expected(told(old), told(new)));
        }
        new.driven().iter().try_for_each(|&rank| self.check_destinations(plan, rank))?;
        let mut handles: HashMap<*const (), usize> = HashMap::new();
        let owner = |tensor: &Tensor| Arc::as_ptr(tensor.owner()).cast();
        self.iter().for_each(|tensor| *handles.entry(owner(tensor)).or_default() += 1);
        for tensor in self.iter() {
            let refuse = |why: &str| Err(refused(why).with_tensor(tensor.name()).with_rank(tensor.rank()));
            if tensor.owner().is_lent() {
                return refuse("its memory is the caller's or a file's");
            }
            if Arc::strong_count(tensor.owner()) > handles[&owner(tensor)] {
                return refuse("another handle shares its memory");
            }
        }
        // What others read through handles that they have dropped happened before what is written from now on.
        fence(Ordering::Acquire);
        Ok(())
    }

    /// That a rank has the same destinations, and all of them are here.
    fn check_destinations(&self, plan: &Plan, rank: Rank) -> Result<()> {
        let of = |plan: &Plan, position: usize| {
            let dest = plan.rank(rank).dests.get(position)?;
            let (params, param) = (plan.params(), &plan.params()[dest.param as usize]);
            let original = param.alias_of.map(|original| params[original as usize].name.clone());
            Some((param.name.clone(), param.dtype, dest.shape.clone(), original))
        };
        let count = self.plan().rank(rank).dests.len().max(plan.rank(rank).dests.len());
        for position in 0..count {
            let (old, new) = (of(self.plan(), position), of(plan, position));
            let name = new.as_ref().or(old.as_ref()).map_or("", |(name, ..)| name).to_owned();
            let at = |error: Error| error.with_tensor(&name).with_rank(rank);
            if old != new {
                let told = |dest: Option<(String, crate::Dtype, crate::Shape, Option<String>)>| match dest {
                    Some((name, dtype, shape, None)) => format!("{name} {dtype} {shape}"),
                    Some((name, _, _, Some(original))) => format!("{name}, an alias of {original}"),
                    None => "nothing".into(),
                };
                return Err(at(refused("the plan has another destination there").with_expected(told(old), told(new))));
            }
            if self.tensor(rank, &name).is_err() {
                return Err(at(refused("it was taken out")));
            }
        }
        Ok(())
    }
}

impl Destinations {
    /// The memory of weights that were [found](Weights::check_reusable) fit for it, and are left without tensors.
    pub(crate) fn again(weights: &mut Weights) -> Destinations {
        Destinations::of_places(weights.take_all().map(|tensors| tensors.map(Tensor::into_place).collect()).collect())
    }
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::Usage, format!("cannot be loaded again: {why}"))
}
