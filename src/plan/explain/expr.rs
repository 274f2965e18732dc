//! Expressions as rules files write them: keys in the order in which they apply.

use std::fmt;

use crate::plan::cut::{Cut, Split};
use crate::plan::expr::Expr;
use crate::plan::world::{Ax, Coord};

/// As the keys of a rule, those that apply first before the others: `shard = { dim = 1 }, cast = "bf16"`. Of long lists
/// of parts only the first are written.
impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expr::Source => f.write_str("replicate = true"),
            other => keys(other, f),
        }
    }
}

/// The keys of an expression, without any for the matched tensor itself.
fn keys(expr: &Expr, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let after = |x: &Expr, f: &mut fmt::Formatter<'_>| match x {
        Expr::Source => Ok(()),
        x => keys(x, f).and_then(|()| f.write_str(", ")),
    };
    match expr {
        Expr::Source => f.write_str("source = true"),
        Expr::Tensor(name) => write!(f, "tensor = {name:?}"),
        Expr::View { x, dims } => {
            after(x, f)?;
            write!(f, "view = {dims:?}")
        }
        Expr::Merge { x, dim, count } => {
            after(x, f)?;
            write!(f, "merge = {{ dim = {dim}, count = {count} }}")
        }
        Expr::Slice { x, dim, start, len, step } => {
            after(x, f)?;
            write!(f, "slice = {{ dim = {dim}, start = {start}, len = {len}")?;
            if *step != 1 {
                write!(f, ", step = {step}")?;
            }
            f.write_str(" }")
        }
        Expr::Shard { x, dim, cut } => {
            after(x, f)?;
            write!(f, "shard = {{ dim = {dim}")?;
            cut_keys(cut, f)?;
            f.write_str(" }")
        }
        Expr::Permute { x, order } => {
            after(x, f)?;
            match order[..] {
                [1, 0] => f.write_str("transpose = true"),
                _ => write!(f, "permute = {order:?}"),
            }
        }
        Expr::Cast { x, to } => {
            after(x, f)?;
            write!(f, "cast = \"{}\"", to.name().to_ascii_lowercase())
        }
        Expr::Concat { dim, parts } => {
            write!(f, "concat = {{ dim = {dim}, parts = ")?;
            list(parts, f)?;
            f.write_str(" }")
        }
        Expr::Stack { parts } => {
            f.write_str("stack = ")?;
            list(parts, f)
        }
        Expr::Select { by, of } => {
            f.write_str("select = { of = ")?;
            list(of, f)?;
            cut_keys(by, f)?;
            f.write_str(" }")
        }
        Expr::Pad { x, dim, to, fill } => {
            after(x, f)?;
            write!(f, "pad = {{ dim = {dim}, to = {to}, fill = \"{fill}\" }}")
        }
        Expr::Repeat { x, dim, times } => {
            after(x, f)?;
            write!(f, "repeat = {{ dim = {dim}, times = {times} }}")
        }
        Expr::Const { dtype, dims, fill } => {
            let dtype = dtype.name().to_ascii_lowercase();
            write!(f, "const = {{ dtype = \"{dtype}\", dims = {dims:?}, fill = \"{fill}\" }}")
        }
        Expr::On { x, by, part, fill } => {
            after(x, f)?;
            write!(f, "on = {{ by = {by}, part = {part}, fill = \"{fill}\" }}")
        }
    }
}

/// A list of parts, the matched and named tensors as themselves.
fn list(parts: &[Expr], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let shown = if parts.len() > PARTS_SHOWN { 2 } else { PARTS_SHOWN };
    f.write_str("[")?;
    for (at, part) in parts.iter().take(shown).enumerate() {
        f.write_str(if at > 0 { ", " } else { "" })?;
        match part {
            Expr::Source => f.write_str("{ source = true }")?,
            Expr::Tensor(name) => write!(f, "{name:?}")?,
            part => {
                f.write_str("{ ")?;
                keys(part, f)?;
                f.write_str(" }")?;
            }
        }
    }
    if parts.len() > shown {
        write!(f, ", ... {} more", parts.len() - shown)?;
    }
    f.write_str("]")
}

/// The keys of a cut that are not what they are by default.
fn cut_keys(cut: &Cut, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Cut { by, how, unit, units, replicate_units } = cut;
    if *how != Split::Even {
        write!(f, ", split = \"{how}\"")?;
    }
    if *unit != 1 {
        write!(f, ", unit = {unit}")?;
    }
    if let Some(units) = units {
        write!(f, ", units = {units}")?;
    }
    if *replicate_units {
        f.write_str(", replicate_units = true")?;
    }
    if *by != Coord::Axis(Ax::Tp) {
        write!(f, ", by = {by}")?;
    }
    Ok(())
}

/// Most parts of a list that is written whole; of a longer one two are enough to see what it is.
const PARTS_SHOWN: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::plan::expr::Fill;

    #[test]
    fn expressions_read_as_rules() {
        assert_eq!(Expr::Source.to_string(), "replicate = true");
        let heads = Cut { unit: 128, units: Some(8), replicate_units: true, ..Cut::default() };
        let keys = Expr::shard(0, heads);
        assert_eq!(keys.to_string(), "shard = { dim = 0, unit = 128, units = 8, replicate_units = true }");
        let view = Box::new(Expr::View { x: Box::new(Expr::Source), dims: vec![112, 3, 128, 14336] });
        let cut = Cut { by: Coord::Flat(vec![Ax::Cp, Ax::Tp]), how: Split::Ceil, ..Cut::default() };
        let heads = Expr::Shard { x: view, dim: 0, cut };
        let grouped = Expr::Permute { x: Box::new(heads), order: vec![1, 0, 2, 3] };
        assert_eq!(
            Expr::Cast { x: Box::new(grouped), to: Dtype::Bf16 }.to_string(),
            "view = [112, 3, 128, 14336], shard = { dim = 0, split = \"ceil\", by = [\"cp\", \"tp\"] }, \
             permute = [1, 0, 2, 3], cast = \"bf16\""
        );
        let up = Expr::Shard { x: Box::new(Expr::Tensor("{1}.up".into())), dim: 0, cut: Cut::default() };
        let merged = Expr::Concat { dim: 0, parts: vec![Expr::shard(0, Cut::default()), up] };
        let padded = Expr::Pad { x: Box::new(merged), dim: 0, to: 64, fill: Fill::NegInf };
        assert_eq!(
            padded.to_string(),
            "concat = { dim = 0, parts = [{ shard = { dim = 0 } }, { tensor = \"{1}.up\", shard = { dim = 0 } }] }, \
             pad = { dim = 0, to = 64, fill = \"-inf\" }"
        );
        let experts: Vec<Expr> = (0..6).map(|expert| Expr::Tensor(format!("e.{expert}"))).collect();
        let by = Cut { by: Coord::Axis(Ax::Ep), ..Cut::default() };
        assert_eq!(
            Expr::Stack { parts: vec![Expr::Select { by, of: experts }] }.to_string(),
            "stack = [{ select = { of = [\"e.0\", \"e.1\", ... 4 more], by = \"ep\" } }]"
        );
    }
}
