//! Random meshes, checkpoints and expressions, most of them legal.

use std::cell::RefCell;

use shardlift::Dtype;
use shardlift::plan::{Ax, Coord, Cut, Expr, Fill, Split};

use super::evaluate::{Array, Illegal, Oracle, Who, any, inner};
use super::places::Places;
use crate::transform::Source;

/// Numbers that a seed decides: xorshift64* (Vigna 2016).
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// One of `sides` numbers, 0 the first.
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides.max(1)
    }

    pub(crate) fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize].clone()
    }

    pub(crate) fn shuffled<T: Clone>(&mut self, of: &[T]) -> Vec<T> {
        let mut left = of.to_vec();
        (0..of.len()).map(|_| left.remove(self.roll(left.len() as u64) as usize)).collect()
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.roll(256) as u8).collect()
    }
}

/// Types of every size; floats, which alone are permuted and cast, more often.
const DTYPES: [Dtype; 20] = [
    Dtype::Bool,
    Dtype::F4,
    Dtype::F6E2M3,
    Dtype::U8,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
    Dtype::I16,
    Dtype::I32,
    Dtype::C64,
    Dtype::I64,
    Dtype::F16,
    Dtype::F16,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Bf16,
    Dtype::Bf16,
    Dtype::F32,
    Dtype::F32,
    Dtype::F32,
    Dtype::F64,
];

/// Most elements of a destination: every step evaluates all of them for every rank.
const CELLS: u64 = 300;
/// Most dimensions.
const DIMS: usize = 7;

/// A mesh of at most 8 ranks.
pub(crate) fn places(dice: &mut Dice) -> Places {
    loop {
        let sizes = [4, 4, 3, 2].map(|sides| if dice.one_in(2) { 1 } else { 1 + dice.roll(sides) as u32 });
        let [tp, pp, dp, cp] = sizes;
        if sizes.iter().product::<u32>() > 8 {
            continue;
        }
        let stage = dp * cp * tp;
        let divisors: Vec<u32> = (1..=stage).filter(|ep| stage.is_multiple_of(*ep)).collect();
        let mut order = Ax::ALL;
        if dice.one_in(2) {
            order = [dice.shuffled(&order[..4]), dice.shuffled(&order[4..])].concat().try_into().unwrap();
        }
        return Places::new([dp, pp, cp, tp, dice.pick(&divisors)], order);
    }
}

/// Makes the expressions of a case, and the tensors that they name.
pub(crate) struct Random<'a> {
    pub(crate) dice: &'a mut Dice,
    pub(crate) places: &'a Places,
    pub(crate) tensors: Vec<Source>,
    pub(crate) casting: Option<Dtype>,
}

impl Random<'_> {
    /// A new tensor of the checkpoint.
    pub(crate) fn tensor(&mut self, dtype: Dtype, dims: &[u64]) -> usize {
        let bits = dims.iter().product::<u64>() * u64::from(dtype.bits());
        assert!(bits.is_multiple_of(8), "whole bytes");
        let bytes = self.dice.bytes(bits as usize / 8);
        self.tensors.push(Source { dtype, dims: dims.to_vec(), bytes });
        self.tensors.len() - 1
    }

    /// The tensor that a rule matches.
    pub(crate) fn matched(&mut self) -> usize {
        let dtype = self.dice.pick(&DTYPES);
        let most = if dtype.bits() < 8 { 3 } else { 4 };
        let mut dims: Vec<u64> = (0..self.dice.roll(most)).map(|_| 1 + self.dice.roll(6)).collect();
        if self.dice.one_in(40) {
            dims.push(0);
        }
        if dtype.bits() < 8 {
            dims.push(4 * (1 + self.dice.roll(3)));
        }
        self.tensor(dtype, &dims)
    }

    /// An expression for the rule that matched this tensor, of so many steps.
    pub(crate) fn expr(&mut self, matched: usize, steps: u32) -> Expr {
        let mut expr = Expr::Source;
        for _ in 0..steps {
            for _ in 0..8 {
                let before = self.tensors.len();
                let arrays = self.evaluate(matched, &expr).expect("only the last step is illegal");
                let next = self.step(matched, &expr, &arrays);
                match self.evaluate(matched, &next) {
                    Ok(arrays) if arrays.iter().all(|array| array.cells.len() as u64 <= CELLS) => {
                        expr = next;
                        break;
                    }
                    Err(_) if self.dice.one_in(10) => return next,
                    // A tensor that nobody names needs a rule of its own.
                    _ => self.tensors.truncate(before),
                }
            }
        }
        expr
    }

    /// What it is on every rank.
    fn evaluate(&self, matched: usize, expr: &Expr) -> Result<Vec<Array>, Illegal> {
        let (places, tensors, casting) = (self.places, &self.tensors[..], self.casting);
        let oracle = Oracle { places, tensors, matched, casting, doubts: RefCell::default() };
        (0..self.places.ranks()).map(|rank| oracle.evaluate(expr, Who::Rank(rank))).collect()
    }

    /// One step more.
    fn step(&mut self, matched: usize, x: &Expr, arrays: &[Array]) -> Expr {
        let Array { dtype, dims, .. } = &arrays[0];
        let dim = self.dice.roll(dims.len() as u64) as usize;
        let sizes: Vec<u64> = arrays.iter().map(|array| array.dims.get(dim).copied().unwrap_or(0)).collect();
        let (least, most) = (*sizes.iter().min().unwrap(), *sizes.iter().max().unwrap());
        let same = arrays.iter().all(|array| array.dims == *dims);
        let boxed = || Box::new(x.clone());
        match self.dice.roll(15) {
            0 | 1 => {
                let step = 1 + self.dice.roll(3);
                let beyond = u64::from(self.dice.one_in(10));
                let start = self.dice.roll(least + beyond);
                let len = self.dice.roll(least.saturating_sub(start).div_ceil(step) + 1).max(u64::from(least > start));
                Expr::Slice { x: boxed(), dim, start, len, step }
            }
            2..=4 => Expr::Shard { x: boxed(), dim, cut: self.cut(most) },
            5 => {
                let mut order = self.dice.shuffled(&(0..dims.len()).collect::<Vec<_>>());
                if self.dice.one_in(20) {
                    order.push(0);
                }
                Expr::Permute { x: boxed(), order }
            }
            6 => Expr::Cast { x: boxed(), to: self.dice.pick(&[Dtype::Bf16, Dtype::F16, Dtype::F32]) },
            7 if dims.len() < DIMS && !dims.is_empty() => {
                let size = dims[dim];
                let inner =
                    self.dice.pick(&(1..=size.max(1)).filter(|by| size.is_multiple_of(*by)).collect::<Vec<_>>());
                let mut dims = dims.clone();
                dims.splice(dim..=dim, [size / inner, inner]);
                if self.dice.one_in(20) {
                    dims[0] += 1;
                }
                Expr::View { x: boxed(), dims }
            }
            14 => {
                let count = self.dice.roll((dims.len() - dim.min(dims.len())) as u64 + 1) as usize;
                Expr::Merge { x: boxed(), dim, count: count.max(usize::from(!self.dice.one_in(20))) }
            }
            8 => {
                let mut parts = vec![x.clone()];
                for _ in 0..self.dice.roll(3) {
                    let other = match self.dice.roll(4) {
                        0 if same => {
                            let mut dims = dims.clone();
                            dims.iter_mut().skip(dim).take(1).for_each(|size| *size = self.dice.roll(4));
                            Expr::Const { dtype: *dtype, dims, fill: self.fill(*dtype) }
                        }
                        1 => {
                            let of = (0..1 + self.dice.roll(4)).map(|_| self.twin(matched, x)).collect::<Vec<_>>();
                            Expr::Select { by: self.cut(of.len() as u64), of }
                        }
                        _ => self.twin(matched, x),
                    };
                    parts.insert(self.dice.roll(parts.len() as u64 + 1) as usize, other);
                }
                Expr::Concat { dim, parts }
            }
            9 | 10 if dims.len() < DIMS => {
                let mut of = vec![x.clone()];
                for _ in 0..self.dice.roll(5) {
                    of.push(self.twin(matched, x));
                }
                if self.dice.one_in(3) {
                    return Expr::Stack { parts: of };
                }
                let by = self.cut(of.len() as u64);
                let select = Expr::Select { by, of };
                let parts = if self.dice.one_in(4) { vec![self.twin(matched, x), select] } else { vec![select] };
                if self.dice.one_in(3) { Expr::Concat { dim, parts } } else { Expr::Stack { parts } }
            }
            11 => {
                let to = (most + self.dice.roll(4)).saturating_sub(u64::from(self.dice.one_in(20)));
                Expr::Pad { x: boxed(), dim, to, fill: self.fill(*dtype) }
            }
            12 => Expr::Repeat { x: boxed(), dim, times: self.dice.roll(4).max(u64::from(!self.dice.one_in(20))) },
            _ => {
                let (by, fill) = (self.coord(), self.fill(*dtype));
                let parts = self.places.part(&by, Who::All).map_or(1, |(_, n)| n);
                Expr::On { x: boxed(), by, part: self.dice.roll(parts.into()) as u32, fill }
            }
        }
    }

    /// The same expression of other tensors of the same types and shapes.
    fn twin(&mut self, matched: usize, x: &Expr) -> Expr {
        let mut twin = x.clone();
        self.rename(matched, &mut twin);
        twin
    }

    fn rename(&mut self, matched: usize, expr: &mut Expr) {
        let of = match expr {
            Expr::Source => matched,
            Expr::Tensor(name) => super::evaluate::number(name),
            Expr::View { x, .. }
            | Expr::Merge { x, .. }
            | Expr::Slice { x, .. }
            | Expr::Shard { x, .. }
            | Expr::Permute { x, .. }
            | Expr::Cast { x, .. }
            | Expr::Pad { x, .. }
            | Expr::Repeat { x, .. }
            | Expr::On { x, .. } => return self.rename(matched, x),
            Expr::Concat { parts, .. } | Expr::Stack { parts } => {
                return parts.iter_mut().for_each(|part| self.rename(matched, part));
            }
            Expr::Select { of, .. } => return of.iter_mut().for_each(|part| self.rename(matched, part)),
            _ => return,
        };
        if self.dice.one_in(8) {
            return; // a source may be there twice
        }
        let Source { dtype, dims, .. } = self.tensors[of].clone();
        *expr = Expr::Tensor(format!("t{}", self.tensor(dtype, &dims)));
    }

    /// A cut of a dimension of about this size.
    fn cut(&mut self, size: u64) -> Cut {
        let mut cut = Cut::default();
        cut.by = self.coord();
        cut.unit = if self.dice.one_in(3) { 1 + self.dice.roll(3) } else { 1 };
        let parts = self.places.part(&cut.by, Who::All).map_or(1, |(_, n)| u64::from(n));
        let units = size.div_ceil(cut.unit);
        cut.replicate_units = self.dice.one_in(4);
        if self.dice.one_in(6) && size.is_multiple_of(cut.unit) {
            cut.units = Some(units + u64::from(self.dice.one_in(10)));
        }
        let hows = [Split::Even, Split::Ceil, Split::Balanced, Split::LastTakesRest, Split::RoundRobin];
        cut.how = match self.dice.roll(6) {
            5 => self.table(units, parts),
            how => hows[how as usize].clone(),
        };
        cut
    }

    /// Each unit in one part, and some in two.
    fn table(&mut self, units: u64, parts: u64) -> Split {
        let mut table = vec![Vec::new(); parts as usize];
        let mut start = 0;
        while start < units {
            let end = (start + 1 + self.dice.roll(3)).min(units);
            for _ in 0..1 + u64::from(self.dice.one_in(5)) {
                let part = self.dice.roll(parts) as usize;
                let at = self.dice.roll(table[part].len() as u64 + 1) as usize;
                table[part].insert(at, start..end);
            }
            start = end + u64::from(self.dice.one_in(60));
        }
        Split::Table(table)
    }

    fn coord(&mut self) -> Coord {
        let axis = |dice: &mut Dice| Coord::Axis(dice.pick(&Ax::ALL));
        match self.dice.roll(10) {
            0 => Coord::One,
            1 | 2 => {
                let axes = if self.dice.one_in(3) { &Ax::ALL[4..] } else { &Ax::ALL[..4] };
                let mut axes = self.dice.shuffled(axes);
                axes.truncate(1 + self.dice.roll(4) as usize);
                if self.dice.one_in(20) {
                    axes.push(Ax::Etp);
                }
                Coord::Flat(axes)
            }
            kind @ 3..=5 => {
                let inner = self.coord();
                let parts = self.places.part(&inner, Who::All).map_or(1, |(_, n)| n);
                let divisors: Vec<u32> = (1..=parts).filter(|by| parts.is_multiple_of(*by)).collect();
                let by = self.dice.pick(&divisors) + u32::from(self.dice.one_in(20));
                if kind == 3 { Coord::Mod(Box::new(inner), by) } else { Coord::Div(Box::new(inner), by) }
            }
            6 | 7 => axis(self.dice),
            _ => Coord::Axis(Ax::Tp),
        }
    }

    fn fill(&mut self, dtype: Dtype) -> Fill {
        match self.dice.roll(6) {
            0 if dtype.bits() >= 8 => Fill::Bytes(self.dice.bytes(dtype.bits() as usize / 8)),
            1 => Fill::One,
            2 => Fill::NegInf,
            _ => Fill::Zero,
        }
    }
}

/// Whether indices are taken of what was cut before: then nothing says what the parts are together.
pub(crate) fn takes_of_cut(expr: &Expr) -> bool {
    let cuts = |expr: &Expr| matches!(expr, Expr::Shard { .. } | Expr::Select { .. } | Expr::On { .. });
    let takes = |expr: &Expr| {
        let own = match expr {
            Expr::View { .. } | Expr::Slice { .. } => true,
            Expr::Shard { cut, .. } => matches!(cut.how, Split::Table(_)),
            _ => false,
        };
        own && inner(expr).iter().any(|x| any(x, &cuts))
    };
    any(expr, &takes)
}

/// Puts another expression in the place of the matched tensor.
pub(crate) fn with_source(expr: &mut Expr, source: &Expr) {
    match expr {
        Expr::Source => expr.clone_from(source),
        Expr::View { x, .. }
        | Expr::Merge { x, .. }
        | Expr::Slice { x, .. }
        | Expr::Shard { x, .. }
        | Expr::Permute { x, .. }
        | Expr::Cast { x, .. }
        | Expr::Pad { x, .. }
        | Expr::Repeat { x, .. }
        | Expr::On { x, .. } => with_source(x, source),
        Expr::Concat { parts, .. } | Expr::Stack { parts } => {
            parts.iter_mut().for_each(|part| with_source(part, source))
        }
        Expr::Select { of, .. } => of.iter_mut().for_each(|part| with_source(part, source)),
        _ => {}
    }
}
