//! Where each rank is in a mesh, by counting through it, and which part of a division that is.

use shardlift::Rank;
use shardlift::plan::{Ax, Coord, Mesh, MeshOrder};

use super::evaluate::{Illegal, Who};

/// Every rank's coordinates.
#[derive(Debug)]
pub(crate) struct Places {
    pub(crate) mesh: Mesh,
    sizes: [u32; 6],
    at: Vec<[u32; 6]>,
}

/// Position of an axis in the lists of this module.
fn position(ax: Ax) -> usize {
    Ax::ALL.iter().position(|other| *other == ax).unwrap()
}

/// The next place, the last of `axes` the fastest.
fn count(at: &mut [u32; 6], sizes: &[u32; 6], axes: &[Ax]) {
    for ax in axes.iter().rev().map(|&ax| position(ax)) {
        at[ax] += 1;
        if at[ax] < sizes[ax] {
            return;
        }
        at[ax] = 0;
    }
}

impl Places {
    /// The mesh of dp, pp, cp, tp and ep, with its axes in this order, slowest first, those of experts last.
    pub(crate) fn new([dp, pp, cp, tp, ep]: [u32; 5], order: [Ax; 6]) -> Places {
        let sizes = [dp, pp, cp, tp, ep, dp * cp * tp / ep];
        let (dense, experts) = order.split_at(4);
        let mut at = Vec::new();
        let mut place = [0; 6];
        // How far each stage is through its experts' places.
        let mut stages = vec![[0; 6]; pp as usize];
        for _ in 0..dp * pp * cp * tp {
            let stage = &mut stages[place[position(Ax::Pp)] as usize];
            let mut here = place;
            experts.iter().for_each(|&ax| here[position(ax)] = stage[position(ax)]);
            at.push(here);
            count(stage, &sizes, experts);
            count(&mut place, &sizes, dense);
        }
        let mut mesh = Mesh::tp(tp);
        (mesh.dp, mesh.pp, mesh.cp, mesh.ep, mesh.order) = (dp, pp, cp, ep, MeshOrder::new(&order).unwrap());
        Places { mesh, sizes, at }
    }

    pub(crate) fn ranks(&self) -> u32 {
        self.at.len() as u32
    }

    /// Which part of how many `who` has; all ranks together have what the first has.
    pub(crate) fn part(&self, by: &Coord, who: Who) -> Result<(u32, u32), Illegal> {
        let rank = match who {
            Who::Rank(rank) => Rank(rank),
            Who::All => Rank(0),
        };
        self.of(by, rank)
    }

    fn of(&self, by: &Coord, rank: Rank) -> Result<(u32, u32), Illegal> {
        let place = |ax: &Ax| (self.at[rank.index()][position(*ax)], self.sizes[position(*ax)]);
        match by {
            Coord::One => Ok((0, 1)),
            Coord::Axis(ax) => Ok(place(ax)),
            Coord::Flat(axes) => {
                let has = |of: &[Ax]| axes.iter().any(|ax| of.contains(ax));
                let twice = axes.iter().enumerate().any(|(at, ax)| axes[..at].contains(ax));
                if axes.is_empty() || twice || (has(&[Ax::Ep, Ax::Etp]) && has(&[Ax::Dp, Ax::Cp, Ax::Tp])) {
                    return Err("no such axes".into());
                }
                Ok(axes.iter().map(place).fold((0, 1), |(i, n), (at, size)| (i * size + at, n * size)))
            }
            Coord::Div(inner, k) => {
                let (i, n) = self.of(inner, rank)?;
                if *k == 0 || n % k != 0 { Err("no divisor".into()) } else { Ok((i / k, n / k)) }
            }
            Coord::Mod(inner, k) => {
                let (i, n) = self.of(inner, rank)?;
                if *k == 0 || n % k != 0 { Err("no divisor".into()) } else { Ok((i % k, *k)) }
            }
        }
    }
}
