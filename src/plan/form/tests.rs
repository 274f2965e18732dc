//! Forms of known tensors, and of random expressions against an evaluation element by element.

use proptest::prelude::*;

use super::*;
use crate::extent::FileId;
use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Fill;
use crate::plan::leaf::Factor;
use crate::plan::world::{Ax, Coord};
use crate::plan::{Loop, Loops};

fn meta(dtype: Dtype, dims: &[u64]) -> TensorMeta {
    let shape = Shape::new(dims);
    let end = shape.bytes(dtype).expect("whole bytes");
    TensorMeta { name: "w".into(), file: FileId(0), dtype, shape, start: 0, end }
}

fn of(expr: &Expr, dtype: Dtype, dims: &[u64], mesh: Mesh, rank: u32) -> Result<Form> {
    let tensors = [meta(dtype, dims)];
    let sources = Sources { tensors: &tensors, matched: Some(0), named: &[], casting: None };
    Form::of(expr, &sources, For::Rank(mesh, Rank(rank)))
}

fn whole(dtype: Dtype, dims: &[u64]) -> Form {
    of(&Expr::Source, dtype, dims, Mesh::tp(1), 0).unwrap()
}

fn copies(form: &Form) -> Result<(u64, Vec<BoxCopy>)> {
    let (mut copies, mut fills) = (Vec::new(), Vec::new());
    let metas = [meta(Dtype::U8, &[0])];
    form.lower(&metas, &mut copies, &mut fills)?;
    assert!(fills.is_empty());
    Ok((form.bytes()?, copies))
}

fn factor(form: &Form) -> Factor {
    form.leaves().next().unwrap().factors[0]
}

fn shard(dtype: Dtype, dims: &[u64], dim: usize, cut: Cut, rank: u32, n: u32) -> (Shape, u64, BoxCopy) {
    let form = of(&Expr::shard(dim, cut), dtype, dims, Mesh::tp(n), rank).unwrap();
    let (bytes, copies) = copies(&form).unwrap();
    assert_eq!(copies.len(), 1);
    (form.shape(), bytes, copies[0].clone())
}

fn rows(count: u64, src_stride: u64, dst_stride: u64) -> Loops {
    smallvec![Loop { count, src_stride, dst_stride }]
}

// The numbers are those of sharding.md section 15.
#[test]
fn table_of_known_shards() {
    let heads = |unit, units| Cut { unit, units: Some(units), replicate_units: true, ..Cut::default() };
    let (shape, bytes, copy) = shard(Dtype::Bf16, &[4096, 4096], 0, heads(128, 32), 1, 4);
    assert_eq!((shape.dims(), bytes), (&[1024, 4096][..], 8_388_608));
    assert_eq!((copy.src, copy.run, copy.loops.len()), (8_388_608, 8_388_608, 0));

    let (shape, _, copy) = shard(Dtype::Bf16, &[1024, 4096], 0, heads(128, 8), 5, 16);
    assert_eq!((shape.dims(), copy.src, copy.src + copy.run), (&[128, 4096][..], 2_097_152, 3_145_728));

    let (shape, _, copy) = shard(Dtype::Bf16, &[4096, 4096], 1, Cut::default(), 3, 4);
    assert_eq!((shape.dims(), copy.src, copy.run), (&[4096, 1024][..], 6_144, 2_048));
    assert_eq!(copy.loops, rows(4096, 8_192, 2_048));

    let (_, _, copy) = shard(Dtype::Bf16, &[8192, 28672], 1, Cut::default(), 7, 8);
    assert_eq!((copy.src, copy.run, &copy.loops), (50_176, 7_168, &rows(8192, 57_344, 7_168)));
    assert_eq!(copy.src + 8191 * 57_344 + copy.run, 469_762_048);

    let (_, _, copy) = shard(Dtype::Bf16, &[43008, 14336], 0, heads(384, 112), 2, 8);
    assert_eq!((copy.src, copy.run), (308_281_344, 154_140_672));
}

#[test]
fn replicated_tensors_are_one_run() {
    let (bytes, made) = copies(&whole(Dtype::Bf16, &[8192])).unwrap();
    assert_eq!((bytes, made.len(), made[0].src, made[0].run), (16_384, 1, 0, 16_384));
    let (bytes, made) = copies(&whole(Dtype::F32, &[])).unwrap();
    assert_eq!((bytes, made[0].run), (4, 4));
    assert_eq!(copies(&whole(Dtype::F32, &[3, 0])).unwrap(), (0, Vec::new()));
}

#[test]
fn packed_types_are_cut_on_bytes() {
    let cols = |start, len| copies(&whole(Dtype::F4, &[4, 6]).slice(1, start, len, 1).unwrap());
    assert_eq!(cols(1, 2).unwrap_err().rule(), Some("cut-not-on-bytes"));
    let (bytes, made) = cols(2, 2).unwrap();
    assert_eq!((bytes, made[0].src, made[0].run, &made[0].loops), (4, 1, 1, &rows(4, 3, 1)));
    let rows = |start, len| copies(&whole(Dtype::F4, &[4, 3]).slice(0, start, len, 1).unwrap());
    assert_eq!(rows(1, 1).unwrap_err().rule(), Some("cut-not-on-bytes"));
    let (_, made) = rows(2, 2).unwrap();
    assert_eq!((made[0].src, made[0].run), (3, 3));
}

#[test]
fn views_split_and_slices_compose() {
    let leaf = whole(Dtype::U8, &[24, 5]).view(&[2, 3, 4, 5]).unwrap();
    let leaf = leaf.slice(1, 2, 1, 1).unwrap();
    let (bytes, copies) = copies(&leaf).unwrap();
    assert_eq!((bytes, copies[0].src, copies[0].run, &copies[0].loops), (40, 40, 20, &rows(2, 60, 20)));
    assert_eq!(whole(Dtype::U8, &[24]).view(&[5, 5]).unwrap_err().rule(), Some("view"));
    let every = whole(Dtype::U8, &[10]).slice(0, 1, 4, 2).unwrap().slice(0, 1, 2, 2).unwrap();
    assert_eq!(factor(&every), Factor { size: 10, start: 3, len: 2, step: 4 });
    assert_eq!(whole(Dtype::U8, &[10]).slice(0, 9, 2, 1).unwrap_err().rule(), Some("slice"));
    let head = whole(Dtype::U8, &[24]).slice(0, 8, 8, 1).unwrap().view(&[2, 4]).unwrap();
    assert_eq!(factor(&head), Factor { size: 6, start: 2, len: 2, step: 1 });
    assert!(whole(Dtype::U8, &[24]).slice(0, 6, 8, 1).unwrap().view(&[2, 4]).is_err());
}

#[test]
fn groups_are_merged_and_put_behind_each_other() {
    // Falcon-40B: 8 groups of 16 query heads, a key and a value head, of 64 each; case 13 of section 15.
    let groups = whole(Dtype::Bf16, &[9216, 8192]).view(&[8, 18, 64, 8192]).unwrap();
    let groups = groups.slice(0, 6, 2, 1).unwrap();
    let part = |start, len| groups.clone().slice(1, start, len, 1).unwrap().merge(0, 3).unwrap();
    let form = Form::concat(0, vec![part(0, 16), part(16, 1), part(17, 1)]).unwrap();
    assert_eq!(form.shape().dims(), [2 * 18 * 64, 8192]);
    let (_, copies) = copies(&form).unwrap();
    let row = 8192 * 2;
    let of = |copy: &BoxCopy| (copy.src / row, copy.dst / row, copy.run / row);
    assert_eq!(copies.iter().map(of).collect::<Vec<_>>(), [(6912, 0, 1024), (7936, 2048, 64), (8000, 2176, 64)]);
    assert!(copies.iter().all(|copy| copy.loops[0].src_stride == 1152 * row && copy.loops[0].count == 2));
    // Whole groups can be taken of what was merged, parts of them not.
    assert_eq!(part(0, 16).slice(0, 1024, 1024, 1).unwrap().shape().dims(), [1024, 8192]);
    assert_eq!(part(0, 16).slice(0, 64, 1024, 1).unwrap_err().rule(), Some("slice"));
    assert_eq!(part(0, 16).merge(1, 2).unwrap_err().rule(), Some("merge"));
}

#[test]
fn deep_boxes_are_unrolled_or_refused() {
    let deep = |outer: u64| {
        let mut leaf = whole(Dtype::U8, &[outer, 3, 3, 3, 3, 3, 3]);
        for dim in 0..7 {
            let len = leaf.dims[dim] - 1;
            leaf = leaf.slice(dim, 1, len, 1).unwrap();
        }
        copies(&leaf)
    };
    let (bytes, copies) = deep(4).unwrap();
    assert_eq!((bytes, copies.len(), copies[0].loops.len()), (3 * 64, 3, 5));
    assert_eq!((copies[1].src - copies[0].src, copies[1].dst), (729, 64));
    assert_eq!(deep(5000).unwrap_err().rule(), Some("too-deep"));
}

/// One element of a destination: of a tensor, or filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    Of(usize, u64),
    Filled,
}

/// A destination, element by element.
#[derive(Debug, Clone)]
struct Array {
    dims: Vec<u64>,
    cells: Vec<Cell>,
}

impl Array {
    fn new(dims: &[u64], cell: impl Fn(u64) -> Cell) -> Array {
        Array { dims: dims.to_vec(), cells: (0..dims.iter().product()).map(cell).collect() }
    }

    /// The array of these dimensions whose elements come from where `from` says.
    fn made(&self, dims: &[u64], from: impl Fn(&[u64]) -> Option<Vec<u64>>) -> Array {
        let mut cells = Vec::new();
        for at in 0..dims.iter().product::<u64>() {
            let (mut left, mut index) = (at, vec![0; dims.len()]);
            for dim in (0..dims.len()).rev() {
                index[dim] = left % dims[dim];
                left /= dims[dim];
            }
            let position = |index: Vec<u64>| index.iter().zip(&self.dims).fold(0, |at, (i, dim)| at * dim + i);
            cells.push(from(&index).map_or(Cell::Filled, |index| self.cells[position(index) as usize]));
        }
        Array { dims: dims.to_vec(), cells }
    }

    fn along(&self, dim: usize, indices: &[Option<u64>]) -> Array {
        let mut dims = self.dims.clone();
        dims[dim] = indices.len() as u64;
        self.made(&dims, |index| {
            let mut index = index.to_vec();
            index[dim] = indices[index[dim] as usize]?;
            Some(index)
        })
    }

    fn concat(dim: usize, arrays: &[Array]) -> Array {
        let sizes: Vec<u64> = arrays.iter().map(|array| array.dims[dim]).collect();
        let outer: u64 = arrays[0].dims[..dim].iter().product();
        let inner = |array: &Array| array.dims[dim..].iter().product::<u64>() as usize;
        let rows = (0..outer as usize).flat_map(|row| {
            arrays.iter().flat_map(move |array| &array.cells[row * inner(array)..(row + 1) * inner(array)]).copied()
        });
        let mut dims = arrays[0].dims.clone();
        let cells = rows.collect();
        dims[dim] = sizes.iter().sum();
        Array { dims, cells }
    }
}

/// Which of `units` part `i` of `n` has, by the words of sharding.md section 1.
fn units(how: &Split, units: u64, i: u64, n: u64) -> Vec<u64> {
    let owner = |unit: u64| match how {
        Split::Ceil => unit / units.div_ceil(n),
        Split::Balanced => (0..n).find(|part| unit < (part + 1) * (units / n) + (part + 1).min(units % n)).unwrap(),
        Split::LastTakesRest => unit.checked_div(units / n).map_or(n - 1, |part| part.min(n - 1)),
        Split::RoundRobin => unit % n,
        _ => unit * n / units,
    };
    (0..units).filter(|&unit| owner(unit) == i).collect()
}

/// What `expr` is, element by element; `next` is the named tensor that comes next.
fn evaluate(expr: &Expr, shapes: &[Vec<u64>], next: &mut usize, tp: (u64, u64)) -> Array {
    let (i, n) = tp;
    match expr {
        Expr::Source => Array::new(&shapes[0], |at| Cell::Of(0, at)),
        Expr::Tensor(_) => {
            *next += 1;
            let tensor = *next;
            Array::new(&shapes[tensor], |at| Cell::Of(tensor, at))
        }
        Expr::View { x, dims } => Array { dims: dims.clone(), ..evaluate(x, shapes, next, tp) },
        Expr::Merge { x, dim, count } => {
            let mut whole = evaluate(x, shapes, next, tp);
            let merged = whole.dims[*dim..dim + count].iter().product();
            whole.dims.splice(*dim..dim + count, [merged]);
            whole
        }
        Expr::Slice { x, dim, start, len, step } => {
            let indices: Vec<_> = (0..*len).map(|index| Some(start + index * step)).collect();
            evaluate(x, shapes, next, tp).along(*dim, &indices)
        }
        Expr::Shard { x, dim, cut } => {
            let whole = evaluate(x, shapes, next, tp);
            let size = whole.dims[*dim];
            let units = units(&cut.how, size.div_ceil(cut.unit), i, n);
            let indices = units.iter().flat_map(|unit| unit * cut.unit..((unit + 1) * cut.unit).min(size));
            whole.along(*dim, &indices.map(Some).collect::<Vec<_>>())
        }
        Expr::Permute { x, order } => {
            let whole = evaluate(x, shapes, next, tp);
            let dims: Vec<u64> = order.iter().map(|&dim| whole.dims[dim]).collect();
            whole.made(&dims, |index| {
                let mut from = vec![0; index.len()];
                order.iter().zip(index).for_each(|(&dim, &at)| from[dim] = at);
                Some(from)
            })
        }
        Expr::Concat { dim, parts } => {
            let parts: Vec<_> = parts.iter().map(|part| evaluate(part, shapes, next, tp)).collect();
            Array::concat(*dim, &parts)
        }
        Expr::Stack { parts } => {
            let [Expr::Select { of, .. }] = &parts[..] else { unreachable!() };
            let all: Vec<_> = of.iter().map(|part| evaluate(part, shapes, next, tp)).collect();
            let mut dims = all[0].dims.clone();
            let taken = units(&Split::Balanced, of.len() as u64, i, n);
            dims.insert(0, taken.len() as u64);
            Array { dims, cells: taken.iter().flat_map(|&part| all[part as usize].cells.clone()).collect() }
        }
        Expr::Pad { x, dim, to, .. } => {
            let whole = evaluate(x, shapes, next, tp);
            let indices: Vec<_> = (0..*to).map(|index| (index < whole.dims[*dim]).then_some(index)).collect();
            whole.along(*dim, &indices)
        }
        Expr::Repeat { x, dim, times } => {
            let whole = evaluate(x, shapes, next, tp);
            let indices: Vec<_> = (0..whole.dims[*dim] * times).map(|index| Some(index / times)).collect();
            whole.along(*dim, &indices)
        }
        Expr::On { x, part, .. } => {
            let whole = evaluate(x, shapes, next, tp);
            if i == u64::from(*part) { whole } else { Array::new(&whole.dims, |_| Cell::Filled) }
        }
        Expr::Const { dims, .. } => Array::new(dims, |_| Cell::Filled),
        Expr::Cast { .. } | Expr::Select { .. } => unreachable!("not generated"),
    }
}

/// A random expression over named tensors and its shape on rank `i` of `n`; `dice` decides.
fn random(
    dice: &mut impl FnMut(u64) -> u64,
    depth: u32,
    shapes: &mut Vec<Vec<u64>>,
    (i, n): (u64, u64),
) -> (Expr, Vec<u64>) {
    if depth == 0 {
        let dims: Vec<u64> = (0..1 + dice(3)).map(|_| 1 + dice(6)).collect();
        shapes.push(dims.clone());
        return (Expr::Tensor(format!("t{}", shapes.len() - 1)), dims);
    }
    let (x, dims) = random(dice, depth - 1, shapes, (i, n));
    let dim = dice(dims.len() as u64) as usize;
    let size = dims[dim];
    let boxed = |x: Expr| Box::new(x);
    let with = |len: u64| {
        let mut dims = dims.clone();
        dims[dim] = len;
        dims
    };
    match dice(10) {
        0 if size > 0 => {
            let step = 1 + dice(2);
            let start = dice(size);
            let len = 1 + dice((size - start - 1) / step + 1);
            (Expr::Slice { x: boxed(x), dim, start, len, step }, with(len))
        }
        1 => {
            let hows = [Split::Ceil, Split::Balanced, Split::LastTakesRest, Split::RoundRobin];
            let how = hows[dice(4) as usize].clone();
            let unit = if how == Split::RoundRobin { 1 } else { 1 + dice(2) };
            let taken = units(&how, size.div_ceil(unit), i, n);
            let len = taken.iter().map(|at| ((at + 1) * unit).min(size) - at * unit).sum();
            (Expr::Shard { x: boxed(x), dim, cut: Cut { how, unit, ..Cut::default() } }, with(len))
        }
        2 => {
            let mut order: Vec<usize> = (0..dims.len()).collect();
            order.rotate_left(dim);
            let dims = order.iter().map(|&dim| dims[dim]).collect();
            (Expr::Permute { x: boxed(x), order }, dims)
        }
        3 => {
            shapes.push(with(1 + dice(3)));
            let other = shapes[shapes.len() - 1].clone();
            let parts = vec![x, Expr::Tensor(format!("t{}", shapes.len() - 1))];
            (Expr::Concat { dim, parts }, with(size + other[dim]))
        }
        4 => {
            let to = size + dice(4);
            (Expr::Pad { x: boxed(x), dim, to, fill: Fill::Zero }, with(to))
        }
        5 => {
            let times = 1 + dice(3);
            (Expr::Repeat { x: boxed(x), dim, times }, with(size * times))
        }
        6 if size.is_multiple_of(2) && size > 0 => {
            let mut split = dims.clone();
            split.splice(dim..=dim, [size / 2, 2]);
            (Expr::View { x: boxed(x), dims: split.clone() }, split)
        }
        7 => {
            let mut of = vec![x];
            for _ in 0..2 + dice(3) {
                shapes.push(dims.clone());
                of.push(Expr::Tensor(format!("t{}", shapes.len() - 1)));
            }
            let by = Cut { how: Split::Balanced, ..Cut::default() };
            let mut stacked = dims.clone();
            stacked.insert(0, units(&Split::Balanced, of.len() as u64, i, n).len() as u64);
            (Expr::Stack { parts: vec![Expr::Select { by, of }] }, stacked)
        }
        8 => {
            let (by, part) = (Coord::Axis(Ax::Tp), 0);
            (Expr::On { x: boxed(x), by, part, fill: Fill::Zero }, dims)
        }
        9 => {
            let count = 1 + dice((dims.len() - dim) as u64) as usize;
            let mut merged = dims.clone();
            merged.splice(dim..dim + count, [dims[dim..dim + count].iter().product()]);
            (Expr::Merge { x: boxed(x), dim, count }, merged)
        }
        _ => (x, dims),
    }
}

proptest! {
    #[test]
    fn random_expressions_are_what_they_are_element_by_element(
        rolls in prop::collection::vec(any::<u32>(), 64), depth in 0u32..5, n in 1u32..4, rank in 0u32..4
    ) {
        let rank = rank % n;
        let mut rolls = rolls.into_iter().cycle();
        let mut dice = |sides: u64| u64::from(rolls.next().unwrap()) % sides.max(1);
        let mut shapes = vec![vec![1]]; // of the matched tensor
        let (expr, dims) = random(&mut dice, depth, &mut shapes, (rank.into(), n.into()));
        let dtype = Dtype::Bf16;
        let mut start = 0;
        let tensors: Vec<TensorMeta> = shapes.iter().map(|dims| {
            let mut meta = meta(dtype, dims);
            (meta.start, meta.end) = (start, start + meta.end);
            start = meta.end;
            meta
        }).collect();
        let named: Vec<u32> = (1..shapes.len() as u32).collect();
        let sources = Sources { tensors: &tensors, matched: Some(0), named: &named, casting: None };
        let mesh = Mesh::tp(n);
        let made = Form::of(&expr, &sources, For::Rank(mesh, Rank(rank)));
        let form = match made {
            Ok(form) => form,
            // What strides twice, or is no box when it is viewed, may be refused; nothing else.
            Err(error) => {
                prop_assert!(matches!(error.rule(), Some("slice" | "view")), "{error:?} {expr:?}");
                return Ok(());
            }
        };
        let expected = evaluate(&expr, &shapes, &mut 0, (rank.into(), n.into()));
        prop_assert_eq!(&expected.dims, &dims);
        prop_assert_eq!(form.shape(), Shape::new(&expected.dims));
        let (mut copies, mut fills) = (Vec::new(), Vec::new());
        form.lower(&tensors, &mut copies, &mut fills).unwrap();
        let mut cells: Vec<Option<Cell>> = vec![None; expected.cells.len()];
        let mut put = |byte: u64, cell: Cell| {
            assert!(byte.is_multiple_of(2));
            assert_eq!(cells[byte as usize / 2].replace(cell), None, "written twice");
        };
        for copy in &copies {
            crate::stride::for_each_run(&copy.loops, copy.src, copy.dst, &mut |src, dst| {
                for element in (0..copy.run).step_by(2) {
                    let meta = &tensors[copy.tensor as usize];
                    put(dst + element, Cell::Of(copy.tensor as usize, (src + element - meta.start) / 2));
                }
            });
        }
        for fill in &fills {
            let mut starts = vec![fill.dst];
            for &(count, stride) in &fill.loops {
                starts = starts.iter().flat_map(|start| (0..count).map(move |index| start + index * stride)).collect();
            }
            starts.iter().for_each(|start| (0..fill.run).step_by(2).for_each(|at| put(start + at, Cell::Filled)));
        }
        let cells: Vec<Cell> = cells.into_iter().map(|cell| cell.expect("not written")).collect();
        prop_assert_eq!(cells, expected.cells);
    }
}
