//! The parallel axes, their order, and the coordinates of a rank on each.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;
use crate::limits::{DIVISORS_SHOWN, RANKS_MAX};

/// Sizes of the parallel axes. Slowest to fastest, unless `order` says otherwise:
/// rank = ((dp * PP + pp) * CP + cp) * TP + tp.
///
/// Experts lie on the same ranks in a mesh of their own: the `dp * cp * tp` ranks of a pipeline stage, taken as one, are
/// `ep` groups of `etp` ranks. `ep` 1 divides the tensors of each expert over all of these ranks; with `ep` equal to
/// their number each expert is whole on one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mesh {
    /// Data parallel.
    pub dp: u32,
    /// Pipeline parallel.
    pub pp: u32,
    /// Context parallel.
    pub cp: u32,
    /// Tensor parallel.
    pub tp: u32,
    /// Expert parallel: adds no ranks, and divides `dp * cp * tp`.
    pub ep: u32,
    /// Which axes are slow, and which are fast.
    pub order: MeshOrder,
}

/// An axis of a [`Mesh`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ax {
    /// Data parallel.
    Dp,
    /// Pipeline parallel.
    Pp,
    /// Context parallel.
    Cp,
    /// Tensor parallel.
    Tp,
    /// Expert parallel: different experts.
    Ep,
    /// Tensor parallel inside an expert: the ranks of a stage that share its experts.
    Etp,
}

/// The order of a mesh's axes, slowest first: `dp,pp,cp,tp,ep,etp` by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MeshOrder {
    dense: [Ax; 4],
    experts: [Ax; 2],
}

impl Mesh {
    /// A mesh of `tp` tensor-parallel ranks.
    pub fn tp(tp: u32) -> Mesh {
        Mesh { dp: 1, pp: 1, cp: 1, tp, ep: 1, order: MeshOrder::default() }
    }

    /// The number of ranks; `u32::MAX` where it is more than that, which no plan accepts.
    pub fn size(self) -> u32 {
        self.stage_size().saturating_mul(self.pp)
    }

    /// The size of an axis.
    pub fn axis(self, ax: Ax) -> u32 {
        match ax {
            Ax::Dp => self.dp,
            Ax::Pp => self.pp,
            Ax::Cp => self.cp,
            Ax::Tp => self.tp,
            Ax::Ep => self.ep,
            Ax::Etp => self.stage_size().checked_div(self.ep).unwrap_or(0),
        }
    }

    /// The coordinate of `rank` on an axis.
    ///
    /// # Panics
    /// If an axis has size 0: such a mesh has no ranks.
    pub fn coordinate(self, rank: Rank, ax: Ax) -> u32 {
        let MeshOrder { dense, experts } = self.order;
        let (axes, linear) = match ax {
            Ax::Ep | Ax::Etp => {
                let stage = dense.into_iter().filter(|&ax| ax != Ax::Pp);
                (&experts[..], self.flat(rank, stage).0)
            }
            Ax::Dp | Ax::Pp | Ax::Cp | Ax::Tp => (&dense[..], rank.0),
        };
        let faster = axes.iter().rev().take_while(|&&other| other != ax);
        faster.fold(linear, |linear, &other| linear / self.axis(other)) % self.axis(ax)
    }

    /// The axes as one, slowest first: the coordinate of `rank` there, and the size.
    pub(super) fn flat(self, rank: Rank, axes: impl Iterator<Item = Ax>) -> (u32, u32) {
        axes.fold((0, 1), |(i, n): (u32, u32), ax| {
            let size = self.axis(ax);
            (i.saturating_mul(size).saturating_add(self.coordinate(rank, ax)), n.saturating_mul(size))
        })
    }

    /// The ranks of a pipeline stage: those that its experts lie on.
    fn stage_size(self) -> u32 {
        self.dp.saturating_mul(self.cp).saturating_mul(self.tp)
    }

    /// All ranks, unless there are more than any plan accepts.
    pub(super) fn ranks(self) -> Vec<Rank> {
        let size = self.size();
        if size > RANKS_MAX { Vec::new() } else { (0..size).map(Rank).collect() }
    }

    /// Refuses a mesh of no or too many ranks, and experts that do not divide the ranks of a stage.
    pub(in crate::plan) fn check(self) -> Result<()> {
        let usage = |message: &str| Error::new(ErrorKind::Usage, message);
        if !(1..=RANKS_MAX).contains(&self.size()) {
            return Err(usage("number of ranks out of range").with_expected(format!("1 to {RANKS_MAX}"), self));
        }
        let ranks = self.stage_size();
        if self.ep == 0 || !ranks.is_multiple_of(self.ep) {
            return Err(usage("experts do not divide the dp x cp x tp ranks of a stage")
                .with_expected(divisor_of(ranks.into(), "ranks"), format!("ep {}", self.ep)));
        }
        Ok(())
    }
}

impl Default for Mesh {
    /// One rank.
    fn default() -> Mesh {
        Mesh::tp(1)
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mesh { dp, pp, cp, tp, ep, order } = self;
        write!(f, "dp {dp} pp {pp} cp {cp} tp {tp} ep {ep}")?;
        if *order != MeshOrder::default() {
            write!(f, " order {order}")?;
        }
        Ok(())
    }
}

impl Ax {
    /// All axes, those of the experts last.
    pub const ALL: [Ax; 6] = [Ax::Dp, Ax::Pp, Ax::Cp, Ax::Tp, Ax::Ep, Ax::Etp];

    /// The axis of this name: `dp`, `pp`, `cp`, `tp`, `ep` or `etp`.
    pub fn named(name: &str) -> Option<Ax> {
        Ax::ALL.into_iter().find(|ax| ax.name() == name)
    }

    /// The name of the axis.
    pub fn name(self) -> &'static str {
        match self {
            Ax::Dp => "dp",
            Ax::Pp => "pp",
            Ax::Cp => "cp",
            Ax::Tp => "tp",
            Ax::Ep => "ep",
            Ax::Etp => "etp",
        }
    }
}

impl fmt::Display for Ax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl MeshOrder {
    /// The order of these axes, slowest first: `dp`, `pp`, `cp` and `tp`, each once, then `ep` and `etp` or nothing. Of
    /// the ranks of a stage, counted in this order, `ep` slower than `etp` puts neighbours into one expert-parallel
    /// group.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for any other list.
    pub fn new(axes: &[Ax]) -> Result<MeshOrder> {
        let MeshOrder { dense, experts } = MeshOrder::default();
        let refuse = || {
            let found: Vec<&str> = axes.iter().map(|ax| ax.name()).collect();
            Error::new(ErrorKind::Usage, "not an order of the axes")
                .with_expected("dp, pp, cp and tp in any order, then ep,etp or etp,ep or nothing", found.join(","))
        };
        let permuted = |given: &[Ax], axes: &[Ax]| axes.iter().all(|ax| given.contains(ax));
        let (first, rest) = axes.split_first_chunk().ok_or_else(refuse)?;
        let last = if rest.is_empty() { &experts } else { rest.try_into().map_err(|_| refuse())? };
        if !permuted(first, &dense) || !permuted(last, &experts) {
            return Err(refuse());
        }
        Ok(MeshOrder { dense: *first, experts: *last })
    }
}

impl Default for MeshOrder {
    fn default() -> MeshOrder {
        MeshOrder { dense: [Ax::Dp, Ax::Pp, Ax::Cp, Ax::Tp], experts: [Ax::Ep, Ax::Etp] }
    }
}

impl FromStr for MeshOrder {
    type Err = Error;

    /// Parses names between commas; see [`MeshOrder::new`].
    fn from_str(list: &str) -> Result<MeshOrder> {
        let axis = |name: &str| {
            Ax::named(name).ok_or_else(|| {
                Error::new(ErrorKind::Usage, "no such axis").with_expected("one of dp, pp, cp, tp, ep, etp", name)
            })
        };
        MeshOrder::new(&list.split(',').map(axis).collect::<Result<Vec<_>>>()?)
    }
}

impl fmt::Display for MeshOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MeshOrder { dense: [a, b, c, d], experts: [slow, fast] } = self;
        write!(f, "{a},{b},{c},{d},{slow},{fast}")
    }
}

/// What is expected of a number that must divide `count`: the numbers that do, up to the most ranks of a world.
pub(in crate::plan) fn divisor_of(count: u64, what: &str) -> String {
    let mut divisors = (1..=count.min(RANKS_MAX.into())).filter(|&divisor| count.is_multiple_of(divisor));
    let shown: Vec<String> = divisors.by_ref().take(DIVISORS_SHOWN).map(|divisor| divisor.to_string()).collect();
    let more = if divisors.next().is_some() { ", ..." } else { "" };
    format!("a divisor of {count} {what}: {}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn at(mesh: Mesh, rank: u32) -> [u32; 6] {
        Ax::ALL.map(|ax| mesh.coordinate(Rank(rank), ax))
    }

    #[test]
    fn tensor_parallel_is_the_fastest_axis() {
        let mesh = Mesh { dp: 2, pp: 3, cp: 4, ..Mesh::tp(5) };
        assert_eq!(at(mesh, ((3 + 2) * 4 + 3) * 5 + 4)[..4], [1, 2, 3, 4]);
        assert_eq!(mesh.size(), 120);
    }

    /// vLLM: at a fixed stage `ep_rank = (dp * CP + cp) * TP + tp`, whatever lies between dp and cp.
    #[test]
    fn experts_lie_on_all_ranks_of_a_stage() {
        let mesh = Mesh { dp: 2, pp: 3, cp: 2, ep: 16, ..Mesh::tp(4) };
        assert_eq!((mesh.size(), mesh.axis(Ax::Ep), mesh.axis(Ax::Etp)), (48, 16, 1));
        for rank in 0..48 {
            let [dp, _, cp, tp, ep, etp] = at(mesh, rank);
            assert_eq!((ep, etp), ((dp * 2 + cp) * 4 + tp, 0));
            let [.., ep, etp] = at(Mesh { ep: 1, ..mesh }, rank);
            assert_eq!((ep, etp), (0, (dp * 2 + cp) * 4 + tp));
            // SGLang: moe_tp is the fastest.
            let [.., ep, etp] = at(Mesh { ep: 4, ..mesh }, rank);
            assert_eq!(ep * 4 + etp, (dp * 2 + cp) * 4 + tp);
        }
    }

    /// TensorRT-LLM: pp, cp, tp, and in a stage `moe_ep_rank = tp % EP`, `moe_tp_rank = tp / EP`.
    #[test]
    fn expert_groups_may_be_the_fastest() {
        let order = "dp,pp,cp,tp,etp,ep".parse().unwrap();
        let mesh = Mesh { pp: 2, ep: 4, order, ..Mesh::tp(8) };
        for rank in 0..16 {
            let [_, pp, _, tp, ep, etp] = at(mesh, rank);
            assert_eq!((pp, tp, ep, etp), (rank / 8, rank % 8, tp % 4, tp / 4));
        }
    }

    #[test]
    fn any_axis_may_be_the_slowest() {
        let order = "pp,tp,cp,dp".parse().unwrap();
        let mesh = Mesh { dp: 2, pp: 3, cp: 4, ep: 8, order, ..Mesh::tp(5) };
        let [dp, pp, cp, tp, ep, etp] = at(mesh, ((2 * 5 + 4) * 4 + 3) * 2 + 1);
        assert_eq!((dp, pp, cp, tp), (1, 2, 3, 4));
        assert_eq!((ep * 5 + etp, mesh.axis(Ax::Etp)), ((4 * 4 + 3) * 2 + 1, 5));
        assert_eq!(mesh.to_string(), "dp 2 pp 3 cp 4 tp 5 ep 8 order pp,tp,cp,dp,ep,etp");
        assert_eq!(Mesh { ep: 8, ..Mesh::tp(8) }.to_string(), "dp 1 pp 1 cp 1 tp 8 ep 8");
    }

    #[test]
    fn an_order_names_each_axis_once() {
        for order in ["dp,pp,cp,tp,ep,etp", "pp,tp,cp,dp,etp,ep"] {
            assert_eq!(order.parse::<MeshOrder>().unwrap().to_string(), order);
        }
        assert_eq!("dp,pp,cp,tp".parse::<MeshOrder>().unwrap(), MeshOrder::default());
        for wrong in
            ["", "tp", "dp,pp,cp,cp", "dp,pp,cp,tp,ep", "dp,pp,cp,tp,ep,ep", "dp,pp,cp,ep,tp,etp", "dp,pp,cp,x"]
        {
            assert_eq!(wrong.parse::<MeshOrder>().unwrap_err().kind(), ErrorKind::Usage, "{wrong}");
        }
    }

    #[test]
    fn divisors_are_counted_up_to_the_most_ranks() {
        assert_eq!(divisor_of(32, "units"), "a divisor of 32 units: 1, 2, 4, 8, 16, 32");
        assert_eq!(divisor_of(71, "units"), "a divisor of 71 units: 1, 71");
        let many = divisor_of(28672, "units");
        assert_eq!(
            many,
            "a divisor of 28672 units: 1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 224, 256, 448, ..."
        );
        assert!(
            divisor_of(u64::MAX, "units")
                .ends_with(": 1, 3, 5, 15, 17, 51, 85, 255, 257, 641, 771, 1285, 1923, 3205, 3855, 4369")
        );
    }
    proptest! {
        #[test]
        fn every_rank_has_its_own_place(
            sizes in [1..4u32, 1..4, 1..4, 1..7],
            ep in any::<prop::sample::Index>(),
            dense in Just(vec![Ax::Dp, Ax::Pp, Ax::Cp, Ax::Tp]).prop_shuffle(),
            experts in Just(vec![Ax::Ep, Ax::Etp]).prop_shuffle(),
        ) {
            let [dp, pp, cp, tp] = sizes;
            let order = MeshOrder::new(&[&dense[..], &experts].concat()).unwrap();
            let divisors: Vec<u32> = (1..=dp * cp * tp).filter(|ep| (dp * cp * tp).is_multiple_of(*ep)).collect();
            let mesh = Mesh { dp, pp, cp, tp, ep: *ep.get(&divisors), order };
            prop_assert!(mesh.check().is_ok());
            let experts = [Ax::Pp, Ax::Ep, Ax::Etp];
            prop_assert_eq!(experts.map(|ax| mesh.axis(ax)).iter().product::<u32>(), mesh.size());
            let places: HashSet<_> = mesh.ranks().iter().map(|&rank| experts.map(|ax| mesh.coordinate(rank, ax))).collect();
            prop_assert_eq!(places.len(), mesh.size() as usize);
            for rank in mesh.ranks() {
                prop_assert_eq!(mesh.flat(rank, dense.iter().copied()), (rank.0, mesh.size()));
                prop_assert!(Ax::ALL.into_iter().all(|ax| mesh.coordinate(rank, ax) < mesh.axis(ax)));
            }
        }
    }
}
