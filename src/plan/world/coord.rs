//! Which part of a division a rank gets, as a function of its place in the mesh.

use std::fmt;

use super::mesh::{Ax, Mesh, divisor_of};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

/// Which part of a division a rank gets, as a function of its place in the mesh: `(i, n)`, part `i` of `n`. Displayed as
/// rules files write it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Coord {
    /// Part 0 of 1: the same on all ranks.
    One,
    /// The coordinate on one axis.
    Axis(Ax),
    /// The axes as one, slowest first.
    Flat(Vec<Ax>),
    /// Neighbours share a part: `(i / k, n / k)`. `k` must divide `n`.
    Div(Box<Coord>, u32),
    /// Parts repeat: `(i % k, k)`. `k` must divide `n`.
    Mod(Box<Coord>, u32),
}

impl Coord {
    /// Refuses what is no division of any mesh.
    pub(in crate::plan) fn check(&self) -> Result<()> {
        let broken = |what: String| Err(Error::new(ErrorKind::Rules, what).with_rule("coordinate"));
        let axes = match self {
            Coord::One | Coord::Axis(_) => return Ok(()),
            Coord::Div(inner, _) | Coord::Mod(inner, _) => return inner.check(),
            Coord::Flat(axes) => axes,
        };
        if axes.is_empty() {
            return broken("no axis says which part a rank gets".into());
        }
        if let Some((_, ax)) = axes.iter().enumerate().find(|(at, ax)| axes[..*at].contains(ax)) {
            return broken(format!("axis {ax} is named twice"));
        }
        let first = |of: &[Ax]| axes.iter().find(|ax| of.contains(ax));
        match (first(&[Ax::Ep, Ax::Etp]), first(&[Ax::Dp, Ax::Cp, Ax::Tp])) {
            (Some(expert), Some(dense)) => broken(format!("axes {expert} and {dense} name the same ranks")),
            _ => Ok(()),
        }
    }

    /// Whether an axis has a say.
    pub(in crate::plan) fn names(&self, ax: Ax) -> bool {
        match self {
            Coord::One => false,
            Coord::Axis(own) => *own == ax,
            Coord::Flat(axes) => axes.contains(&ax),
            Coord::Div(inner, _) | Coord::Mod(inner, _) => inner.names(ax),
        }
    }

    /// The part `(i, n)` of `rank`: `i < n`.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`] if a divisor does not divide the number of parts, or axes taken as one are none, repeat, or
    /// name the same ranks.
    ///
    /// # Panics
    /// If an axis of the mesh has size 0.
    pub fn of(&self, mesh: Mesh, rank: Rank) -> Result<(u32, u32)> {
        let divided = |inner: &Coord, k: u32| {
            let (i, n) = inner.of(mesh, rank)?;
            if k > 0 && n.is_multiple_of(k) {
                return Ok((i, n));
            }
            Err(Error::new(ErrorKind::Rules, format!("parts of {inner} do not divide evenly"))
                .with_rule("coordinate")
                .with_expected(divisor_of(n.into(), "parts"), k))
        };
        match self {
            Coord::One => Ok((0, 1)),
            Coord::Axis(ax) => Ok((mesh.coordinate(rank, *ax), mesh.axis(*ax))),
            Coord::Flat(axes) => {
                self.check()?;
                Ok(mesh.flat(rank, axes.iter().copied()))
            }
            Coord::Div(inner, k) => divided(inner, *k).map(|(i, n)| (i / k, n / k)),
            Coord::Mod(inner, k) => divided(inner, *k).map(|(i, _)| (i % k, *k)),
        }
    }
}

impl fmt::Display for Coord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Coord::One => f.write_str("\"one\""),
            Coord::Axis(ax) => write!(f, "\"{ax}\""),
            Coord::Flat(axes) => f.debug_list().entries(axes.iter().map(|ax| ax.name())).finish(),
            Coord::Div(inner, k) => write!(f, "{{ div = {inner}, by = {k} }}"),
            Coord::Mod(inner, k) => write!(f, "{{ mod = {inner}, by = {k} }}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn div(inner: Coord, k: u32) -> Coord {
        Coord::Div(Box::new(inner), k)
    }

    fn repeat(inner: Coord, k: u32) -> Coord {
        Coord::Mod(Box::new(inner), k)
    }

    #[test]
    fn coordinates_divide_and_repeat() {
        let mesh = Mesh::tp(16);
        let tp = || Coord::Axis(Ax::Tp);
        assert_eq!(div(tp(), 2).of(mesh, Rank(5)).unwrap(), (2, 8));
        assert_eq!(repeat(tp(), 4).of(mesh, Rank(5)).unwrap(), (1, 4));
        assert_eq!(repeat(div(tp(), 2), 4).of(mesh, Rank(13)).unwrap(), (2, 4));
        for wrong in [div(tp(), 3), repeat(tp(), 3), div(tp(), 0), repeat(tp(), 0), div(tp(), 32)] {
            let error = wrong.of(mesh, Rank(5)).unwrap_err();
            assert_eq!(error.rule(), Some("coordinate"));
            assert_eq!(error.expected(), Some("a divisor of 16 parts: 1, 2, 4, 8, 16"));
        }
    }

    #[test]
    fn axes_are_taken_as_one() {
        let mesh = Mesh { dp: 2, pp: 3, cp: 4, ep: 4, ..Mesh::tp(5) };
        let rank = Rank(((3 + 2) * 4 + 3) * 5 + 4);
        assert_eq!(Coord::Flat(vec![Ax::Cp, Ax::Tp]).of(mesh, rank).unwrap(), (19, 20));
        assert_eq!(Coord::Flat(vec![Ax::Tp, Ax::Cp]).of(mesh, rank).unwrap(), (19, 20));
        assert_eq!(Coord::Flat(vec![Ax::Ep, Ax::Etp]).of(mesh, rank).unwrap(), (39, 40));
        assert_eq!(Coord::Flat(vec![Ax::Pp, Ax::Ep]).of(mesh, rank).unwrap(), (2 * 4 + 3, 12));
        for (axes, what) in [
            (vec![Ax::Cp, Ax::Tp, Ax::Tp], "axis tp is named twice"),
            (vec![], "no axis"),
            (vec![Ax::Tp, Ax::Ep], "axes ep and tp name the same ranks"),
        ] {
            let error = Coord::Flat(axes).of(mesh, rank).unwrap_err();
            assert!(error.rule() == Some("coordinate") && error.message().contains(what), "{error}");
        }
    }

    #[test]
    fn coordinates_read_as_in_rules_files() {
        let coord = repeat(div(Coord::Flat(vec![Ax::Cp, Ax::Tp]), 4), 2);
        assert_eq!(coord.to_string(), r#"{ mod = { div = ["cp", "tp"], by = 4 }, by = 2 }"#);
        assert_eq!(div(Coord::Axis(Ax::Etp), 2).to_string(), r#"{ div = "etp", by = 2 }"#);
    }
}
