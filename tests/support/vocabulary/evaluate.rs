//! What an expression is, element by element, by the words of its documentation. Shares no code with the planner but the
//! names of things.

use std::cell::RefCell;
use std::collections::BTreeSet;

use half::{bf16, f16};
use shardlift::Dtype;
use shardlift::plan::{Cut, Expr, Fill, Split};

use super::places::Places;
use crate::transform::{Source, element};

/// One element of a destination.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cell {
    pub(crate) value: Value,
    /// How many different parts the ranks have of it: the product over its cuts.
    pub(crate) parts: u64,
}

/// Where an element comes from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// The element of a tensor at this position, perhaps cast.
    Of {
        tensor: usize,
        at: u64,
        cast: Option<Dtype>,
    },
    Filled(Fill),
}

/// A destination, element by element.
#[derive(Debug, Clone)]
pub(crate) struct Array {
    pub(crate) dtype: Dtype,
    pub(crate) dims: Vec<u64>,
    pub(crate) cells: Vec<Cell>,
}

/// For whom an expression is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Rank(u32),
    /// All ranks together: every cut is all of its parts.
    All,
}

/// Why there is no such destination.
pub(crate) type Illegal = String;

/// Evaluates the expressions of one destination.
pub(crate) struct Oracle<'a> {
    pub(crate) places: &'a Places,
    pub(crate) tensors: &'a [Source],
    /// The tensor that the rule matched.
    pub(crate) matched: usize,
    /// What floats of 16 and 32 bits are cast to where the expression says nothing.
    pub(crate) casting: Option<Dtype>,
    /// Rules by which the planner may refuse what is legal: it says so in its documents.
    pub(crate) doubts: RefCell<BTreeSet<&'static str>>,
}

impl Array {
    fn filled(dtype: Dtype, dims: &[u64], fill: &Fill) -> Array {
        let cell = Cell { value: Value::Filled(fill.clone()), parts: 1 };
        Array { dtype, dims: dims.to_vec(), cells: vec![cell; dims.iter().product::<u64>() as usize] }
    }

    /// The array of these dimensions whose elements are those that `from` says, or else `fill`.
    fn made(&self, dims: &[u64], fill: &Fill, from: impl Fn(&[u64]) -> Option<Vec<u64>>) -> Array {
        let mut array = Array::filled(self.dtype, dims, fill);
        for (at, cell) in array.cells.iter_mut().enumerate() {
            let (mut left, mut index) = (at as u64, vec![0; dims.len()]);
            for dim in (0..dims.len()).rev() {
                index[dim] = left % dims[dim];
                left /= dims[dim];
            }
            if let Some(index) = from(&index) {
                let position = index.iter().zip(&self.dims).fold(0, |at, (index, size)| at * size + index);
                cell.clone_from(&self.cells[position as usize]);
            }
        }
        array
    }

    /// These indices of a dimension, and `fill` where there is none.
    fn along(&self, dim: usize, indices: &[Option<u64>], fill: &Fill) -> Array {
        let mut dims = self.dims.clone();
        dims[dim] = indices.len() as u64;
        self.made(&dims, fill, |index| {
            let mut index = index.to_vec();
            index[dim] = indices[index[dim] as usize]?;
            Some(index)
        })
    }

    fn take(&self, dim: usize, indices: impl IntoIterator<Item = u64>) -> Array {
        self.along(dim, &indices.into_iter().map(Some).collect::<Vec<_>>(), &Fill::Zero)
    }

    fn size(&self, dim: usize) -> Result<u64, Illegal> {
        self.dims.get(dim).copied().ok_or_else(|| format!("no dimension {dim}"))
    }

    fn concat(dim: usize, arrays: &[Array]) -> Result<Array, Illegal> {
        let [first, rest @ ..] = arrays else { return Err("nothing is put together".into()) };
        let mut dims = first.dims.clone();
        first.size(dim)?;
        for array in rest {
            let others = |dims: &[u64]| [&dims[..dim], &dims[dim + 1..]].concat();
            if array.dims.len() != dims.len() || others(&array.dims) != others(&dims) || array.dtype != first.dtype {
                return Err("parts differ".into());
            }
            dims[dim] += array.dims[dim];
        }
        let outer: u64 = dims[..dim].iter().product();
        let mut cells = Vec::new();
        for row in 0..outer as usize {
            for array in arrays {
                let inner = array.dims[dim..].iter().product::<u64>() as usize;
                cells.extend_from_slice(&array.cells[row * inner..(row + 1) * inner]);
            }
        }
        Ok(Array { dtype: first.dtype, dims, cells })
    }

    /// The elements as they lie in memory, those smaller than a byte from its lowest bit on.
    pub(crate) fn bytes(&self, tensors: &[Source]) -> Result<Vec<u8>, Illegal> {
        let width = self.dtype.bits() as usize;
        let mut bits = Vec::with_capacity(self.cells.len() * width);
        for Cell { value, .. } in &self.cells {
            let bytes = match value {
                Value::Filled(fill) => filled(fill, self.dtype).ok_or("no such value")?,
                Value::Of { tensor, at, cast } => {
                    let Source { dtype, bytes, .. } = &tensors[*tensor];
                    let width = u64::from(dtype.bits());
                    let bits: Vec<u8> =
                        (at * width..(at + 1) * width).map(|bit| bytes[bit as usize / 8] >> (bit % 8) & 1).collect();
                    let own = packed(&bits);
                    cast.map_or_else(|| own.clone(), |to| element(*dtype, to, &own).to_vec())
                }
            };
            bits.extend((0..width).map(|bit| bytes[bit / 8] >> (bit % 8) & 1));
        }
        if bits.len().is_multiple_of(8) { Ok(packed(&bits)) } else { Err("no whole bytes".into()) }
    }
}

fn packed(bits: &[u8]) -> Vec<u8> {
    bits.chunks(8).map(|bits| bits.iter().enumerate().fold(0, |byte, (at, bit)| byte | bit << at)).collect()
}

/// An element of this value, if the type has it.
fn filled(fill: &Fill, dtype: Dtype) -> Option<Vec<u8>> {
    use Dtype::{Bf16, Bool, F8E4M3, F8E5M2, F16, F32, F64, I16, I32, I64, U8};
    let bytes = dtype.bits().div_ceil(8) as usize;
    let float = |value: f64| match dtype {
        F64 => Some(value.to_le_bytes().to_vec()),
        F32 => Some((value as f32).to_le_bytes().to_vec()),
        F16 => Some(f16::from_f64(value).to_le_bytes().to_vec()),
        Bf16 => Some(bf16::from_f64(value).to_le_bytes().to_vec()),
        _ => None,
    };
    match fill {
        Fill::Zero => Some(vec![0; bytes]),
        Fill::One => match dtype {
            F8E4M3 => Some(vec![7 << 3]),
            F8E5M2 => Some(vec![15 << 2]),
            Bool | U8 | I16 | I32 | I64 => Some(1u64.to_le_bytes()[..bytes].to_vec()),
            _ => float(1.0),
        },
        Fill::NegInf => float(f64::NEG_INFINITY),
        Fill::Bytes(element) => (element.len() == bytes).then(|| element.clone()),
        _ => panic!("no such fill"),
    }
}

impl Oracle<'_> {
    /// What `expr` is for `who`.
    pub(crate) fn evaluate(&self, expr: &Expr, who: Who) -> Result<Array, Illegal> {
        match expr {
            Expr::Source => self.source(self.matched),
            Expr::Tensor(name) => self.source(number(name)),
            Expr::View { x, dims } => {
                let array = self.evaluate(x, who)?;
                if !is_plain(x) || array.cells.is_empty() {
                    self.doubt("view");
                }
                if !splits(&array.dims, dims) {
                    return Err(format!("{dims:?} does not split {:?}", array.dims));
                }
                Ok(Array { dims: dims.clone(), ..array })
            }
            Expr::Merge { x, dim, count } => {
                let mut array = self.evaluate(x, who)?;
                let merged = match array.dims.get(*dim..dim + count) {
                    Some(merged) if *count > 0 => merged.iter().product(),
                    _ => return Err("no such dimensions".into()),
                };
                array.dims.splice(*dim..dim + count, [merged]);
                Ok(array)
            }
            Expr::Slice { x, dim, start, len, step } => {
                let array = self.evaluate(x, who)?;
                let size = array.size(*dim)?;
                if *step == 0 || *start > size || (*len > 0 && start + (len - 1) * step >= size) {
                    return Err("slice leaves its dimension".into());
                }
                self.doubt_steps(x, *step);
                Ok(array.take(*dim, (0..*len).map(|index| start + index * step)))
            }
            Expr::Shard { x, dim, cut } => self.shard(self.evaluate(x, who)?, x, *dim, cut, who),
            Expr::Permute { x, order } => self.permute(&self.evaluate(x, who)?, order),
            Expr::Cast { x, to } => self.cast(self.evaluate(x, who)?, x, *to),
            Expr::Concat { dim, parts } => match self.parts(parts, who)? {
                (arrays, Some(sample)) if arrays.is_empty() => {
                    sample.size(*dim)?;
                    Ok(sample.take(*dim, []))
                }
                (arrays, _) => Array::concat(*dim, &arrays),
            },
            Expr::Stack { parts } => {
                let outermost = |mut array: Array| {
                    array.dims.insert(0, 1);
                    array
                };
                match self.parts(parts, who)? {
                    (arrays, Some(sample)) if arrays.is_empty() => Ok(outermost(sample).take(0, [])),
                    (arrays, _) => Array::concat(0, &arrays.into_iter().map(outermost).collect::<Vec<_>>()),
                }
            }
            Expr::Select { .. } => Err("a selection alone".into()),
            Expr::Pad { x, dim, to, fill } => {
                let array = self.evaluate(x, who)?;
                let size = array.size(*dim)?;
                // All parts together may be more than each of them is padded to.
                let to = if who == Who::All { size.max(*to) } else { *to };
                if to < size {
                    return Err("larger than what it is padded to".into());
                }
                let indices: Vec<_> = (0..to).map(|index| (index < size).then_some(index)).collect();
                Ok(array.along(*dim, &indices, fill))
            }
            Expr::Repeat { x, dim, times } => {
                let array = self.evaluate(x, who)?;
                let size = array.size(*dim)?;
                if *times == 0 {
                    return Err("no repetition".into());
                }
                Ok(array.take(*dim, (0..size * times).map(|index| index / times)))
            }
            Expr::Const { dtype, dims, fill } => Ok(Array::filled(*dtype, dims, fill)),
            Expr::On { x, by, part, fill } => {
                let mut array = self.evaluate(x, who)?;
                let (i, n) = self.places.part(by, who)?;
                if *part >= n {
                    return Err(format!("no part {part} of {n}"));
                }
                array.cells.iter_mut().for_each(|cell| cell.parts *= u64::from(n));
                match who {
                    Who::Rank(_) if i != *part => Ok(Array::filled(array.dtype, &array.dims, fill)),
                    _ => Ok(array),
                }
            }
            other => panic!("not known: {other:?}"),
        }
    }

    fn source(&self, tensor: usize) -> Result<Array, Illegal> {
        let Source { dtype, dims, .. } = &self.tensors[tensor];
        let cast = self.casting.filter(|to| to != dtype && [Dtype::Bf16, Dtype::F16, Dtype::F32].contains(dtype));
        if dtype.bits() < 8 {
            self.doubt("cut-not-on-bytes");
        }
        let cell = |at| Cell { value: Value::Of { tensor, at, cast }, parts: 1 };
        let cells = (0..dims.iter().product()).map(cell).collect();
        Ok(Array { dtype: cast.unwrap_or(*dtype), dims: dims.clone(), cells })
    }

    fn permute(&self, array: &Array, order: &[usize]) -> Result<Array, Illegal> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..array.dims.len()) {
            return Err("no order of the dimensions".into());
        }
        if ![Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F64].contains(&array.dtype) {
            self.doubt("permute");
        }
        let dims: Vec<u64> = order.iter().map(|&dim| array.dims[dim]).collect();
        Ok(array.made(&dims, &Fill::Zero, |index| {
            let mut from = vec![0; index.len()];
            order.iter().zip(index).for_each(|(&dim, &at)| from[dim] = at);
            Some(from)
        }))
    }

    fn cast(&self, mut array: Array, x: &Expr, to: Dtype) -> Result<Array, Illegal> {
        use Dtype::{Bf16, F8E4M3, F8E5M2, F16, F32};
        let from = array.dtype;
        if ![Bf16, F16, F32].contains(&to) || any(x, &|expr| matches!(expr, Expr::Cast { .. })) {
            return Err("no such cast".into());
        }
        let castable = from == to || [Bf16, F16, F32, F8E4M3, F8E5M2].contains(&from);
        if !castable && array.cells.iter().any(|cell| matches!(cell.value, Value::Of { .. })) {
            return Err("elements of this type are not cast".into());
        }
        if !castable {
            self.doubt("cast");
        }
        for cell in &mut array.cells {
            match &mut cell.value {
                Value::Of { cast, .. } => *cast = (from != to).then_some(to),
                Value::Filled(Fill::Bytes(bytes)) if from != to => {
                    if !castable || bytes.len() * 8 != from.bits() as usize {
                        return Err("bytes are not of this type".into());
                    }
                    *bytes = element(from, to, bytes).to_vec();
                }
                Value::Filled(_) => {}
            }
        }
        Ok(Array { dtype: to, ..array })
    }

    fn shard(&self, mut array: Array, x: &Expr, dim: usize, cut: &Cut, who: Who) -> Result<Array, Illegal> {
        let size = array.size(dim)?;
        let (taken, parts) = self.taken(cut, size, who)?;
        self.doubt_steps(x, if cut.how == Split::RoundRobin { 2 } else { 1 });
        array.cells.iter_mut().for_each(|cell| cell.parts *= parts);
        Ok(array.take(dim, taken))
    }

    /// The indices of `size` that `who` gets, and how many parts there are.
    fn taken(&self, cut: &Cut, size: u64, who: Who) -> Result<(Vec<u64>, u64), Illegal> {
        let (i, n) = self.places.part(&cut.by, who)?;
        let (mut i, mut n, unit) = (u64::from(i), u64::from(n), cut.unit);
        if unit == 0 || cut.units.is_some_and(|units| units * unit != size) {
            return Err("not what the dimension has".into());
        }
        // The last unit may have fewer indices.
        let units: Vec<Vec<u64>> = (0..size).collect::<Vec<_>>().chunks(unit as usize).map(<[u64]>::to_vec).collect();
        let count = units.len() as u64;
        if cut.replicate_units && count > 0 && n > count {
            if !n.is_multiple_of(count) {
                return Err("more ranks than units, and no multiple of them".into());
            }
            (i, n) = (i / (n / count), count);
        }
        let all = who == Who::All;
        let of_part: Vec<u64> = match &cut.how {
            Split::Table(table) => {
                let listed: Vec<Vec<u64>> = table.iter().map(|part| part.iter().cloned().flatten().collect()).collect();
                let has = |unit| listed.iter().any(|part| part.contains(&unit));
                let inside = table.iter().flatten().all(|range| range.start <= range.end && range.end <= count);
                if listed.len() as u64 != n || !inside || !(0..count).all(has) {
                    return Err("a table of other units or parts".into());
                }
                if all { listed.concat() } else { listed[i as usize].clone() }
            }
            _ if all => (0..count).collect(),
            Split::Even if n == 1 => (0..count).collect(),
            Split::Even if !size.is_multiple_of(unit) || !count.is_multiple_of(n) => return Err("uneven".into()),
            Split::Even => (0..count).filter(|at| at / (count / n) == i).collect(),
            Split::Ceil => (0..count).filter(|at| at / count.div_ceil(n) == i).collect(),
            Split::Balanced => {
                // Each part has what it has when units are dealt one by one.
                let dealt = |part: u64| (0..count).filter(|at| at % n == part).count() as u64;
                let before: u64 = (0..i).map(dealt).sum();
                (before..before + dealt(i)).collect()
            }
            Split::LastTakesRest => {
                let each = count / n;
                (i * each..if i == n - 1 { count } else { (i + 1) * each }).collect()
            }
            Split::RoundRobin => (0..count).filter(|at| at % n == i).collect(),
            other => panic!("not known: {other:?}"),
        };
        let short = |at: &u64| units[*at as usize].len() as u64 != unit;
        if !all && of_part.iter().rev().skip(1).any(short) {
            return Err("a partial unit before others".into());
        }
        Ok((of_part.iter().flat_map(|&at| units[at as usize].clone()).collect(), n))
    }

    /// The parts that `who` has, and one of a selection.
    fn parts(&self, parts: &[Expr], who: Who) -> Result<(Vec<Array>, Option<Array>), Illegal> {
        let (mut arrays, mut sample) = (Vec::new(), None);
        for part in parts {
            let Expr::Select { by, of } = part else {
                arrays.push(self.evaluate(part, who)?);
                continue;
            };
            let (taken, n) = self.taken(by, of.len() as u64, who)?;
            if taken.is_empty() && !of.is_empty() {
                sample = Some(self.evaluate(&of[0], who)?);
            }
            for at in taken {
                let mut array = self.evaluate(&of[at as usize], who)?;
                array.cells.iter_mut().for_each(|cell| cell.parts *= n);
                arrays.push(array);
            }
        }
        Ok((arrays, sample))
    }

    fn doubt(&self, rule: &'static str) {
        self.doubts.borrow_mut().insert(rule);
    }

    /// Steps of what is repeated would stride twice.
    fn doubt_steps(&self, x: &Expr, step: u64) {
        let strides = step > 1 && any(x, &|expr| matches!(expr, Expr::Repeat { .. }));
        // Only whole ones are taken of what was merged.
        if strides || any(x, &|expr| matches!(expr, Expr::Merge { .. })) {
            self.doubt("slice");
        }
    }
}

/// The number in the name of a tensor.
pub(crate) fn number(name: &str) -> usize {
    name[1..].parse().unwrap()
}

/// Whether `dims` split each of `sizes` into neighbouring dimensions.
fn splits(sizes: &[u64], dims: &[u64]) -> bool {
    let Some((&size, rest)) = sizes.split_first() else { return dims.iter().all(|&dim| dim == 1) };
    (1..=dims.len()).any(|group| dims[..group].iter().product::<u64>() == size && splits(rest, &dims[group..]))
}

/// Whether `x` is all of a tensor, whatever the order of its dimensions.
fn is_plain(x: &Expr) -> bool {
    match x {
        Expr::Source | Expr::Tensor(_) | Expr::Const { .. } => true,
        Expr::View { x, .. } | Expr::Permute { x, .. } | Expr::Cast { x, .. } => is_plain(x),
        _ => false,
    }
}

/// The expressions that this one is made of.
pub(crate) fn inner(expr: &Expr) -> &[Expr] {
    match expr {
        Expr::View { x, .. }
        | Expr::Merge { x, .. }
        | Expr::Slice { x, .. }
        | Expr::Shard { x, .. }
        | Expr::Permute { x, .. }
        | Expr::Cast { x, .. }
        | Expr::Pad { x, .. }
        | Expr::Repeat { x, .. }
        | Expr::On { x, .. } => std::slice::from_ref(x),
        Expr::Concat { parts, .. } | Expr::Stack { parts } => parts,
        Expr::Select { of, .. } => of,
        _ => &[],
    }
}

/// Whether this holds for an expression or one that it is made of.
pub(crate) fn any(expr: &Expr, is: &dyn Fn(&Expr) -> bool) -> bool {
    is(expr) || inner(expr).iter().any(|inner| any(inner, is))
}
