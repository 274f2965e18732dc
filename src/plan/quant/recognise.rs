//! Which tensors a module has on disk, and what their dimensions are of the logical matrix.

use smallvec::{SmallVec, smallvec};

use super::{Dim, Linear, Merged, Orientation, Packed, Quantization, Stored};
use crate::checkpoint::TensorMeta;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::cut::lcm;

/// What names of a module's tensors have after the module's, longer ones before those that they end with.
pub(in crate::plan) const SUFFIXES: &[&str] = &[
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".weight",
    ".bias",
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_g_idx",
    ".g_idx",
    ".weight_packed",
    ".weight_shape",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_zero_point",
    ".weight_global_scale",
    ".input_global_scale",
    ".input_scale_ub",
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".SCB",
    ".weight_format",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
    "_blocks",
    "_scales",
    "_bias",
];

/// Those of the weight itself, whatever a quantiser made of it.
pub(in crate::plan) const WEIGHTS: &[&str] = &["", ".weight", ".qweight", ".weight_packed", "_blocks"];

/// Tensors of several elements that are of all of a weight.
const OF_ALL: &[&str] = &[
    ".weight.quant_map",
    ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
];

/// Elements that share an element of absmax in bitsandbytes, and those of these that share one of the nested absmax
/// (its `blocksize` of 64 and 256).
const ABSMAX_BLOCK: u64 = 64;
const NESTED_BLOCK: u64 = 64 * 256;

/// Inputs of a block of MXFP4 and MXFP8 (OCP Microscaling Formats v1.0).
const MX_BLOCK: u64 = 32;

/// The size of a dimension that nothing says.
pub(super) const UNKNOWN: u64 = 0;

/// What is known of a module before its tensors are looked at.
#[derive(Debug, Clone, Copy)]
pub(in crate::plan) struct Known<'a> {
    /// What the configuration says of quantised ones.
    pub(in crate::plan) quantization: &'a Quantization,
    /// Of the weight of one that is not quantised.
    pub(in crate::plan) orientation: Orientation,
    /// The outputs, where a rule says how many they are.
    pub(in crate::plan) outputs: Option<u64>,
}

/// The module of this name, or `None` if no tensor is its weight.
pub(in crate::plan) fn recognise<'a>(
    module: &str,
    known: Known<'_>,
    tensor: impl Fn(&str) -> Option<&'a TensorMeta>,
) -> Result<Option<Linear>> {
    let find = |suffix: &str| tensor(&format!("{module}{suffix}"));
    let maker = Maker { find: &find, known };
    let linear = if let Some(weight) = find(".qweight") {
        maker.packed_words(weight)?
    } else if let Some(weight) = find(".weight_packed") {
        maker.weight_packed(weight)?
    } else if let Some(blocks) = find("_blocks") {
        maker.blocks(blocks)?
    } else if let Some(absmax) = find(".weight.absmax") {
        maker.nf4(absmax)?
    } else if let Some(weight) = find(".weight") {
        maker.weight(".weight", weight)?
    } else if let Some(weight) = tensor(module) {
        maker.weight("", weight)?
    } else if let Some(weight) = find(".lora_A.weight").or_else(|| find(".lora_embedding_A")) {
        maker.adapter(weight)
    } else if let Some(bias) = find(".bias") {
        // Its weight lies in a file that is not here.
        Linear::new(smallvec![bias.shape.dims().first().copied().unwrap_or(1), UNKNOWN])
    } else {
        return Ok(None);
    };
    maker.with_common(linear).map(Some)
}

struct Maker<'a, F> {
    find: &'a F,
    known: Known<'a>,
}

type Dims = SmallVec<[Dim; 4]>;

impl<'a, F: Fn(&str) -> Option<&'a TensorMeta>> Maker<'a, F> {
    fn find(&self, suffix: &str) -> Option<&'a TensorMeta> {
        (self.find)(suffix)
    }

    /// A plain weight, or one of FP8, INT8 or two FP4 to a byte with scales beside it.
    fn weight(&self, suffix: &'static str, weight: &TensorMeta) -> Result<Linear> {
        let shape = weight.shape.dims();
        let scale = self.find(".weight_scale_inv").or_else(|| self.find(".weight_scale"));
        let pairs = weight.dtype == Dtype::U8 && scale.is_some();
        let mut sizes: SmallVec<[u64; 3]> = shape.into();
        let mut dims: Dims = (0..shape.len()).map(Dim::same).collect();
        let last = shape.len().wrapping_sub(1);
        if pairs && shape.len() >= 2 {
            sizes[last] = times(sizes[last], 2, weight)?;
            dims[last] = Dim::each(last, 2);
        }
        let is_turned = self.known.orientation == Orientation::InOut && shape.len() >= 2;
        if is_turned {
            sizes.swap(last - 1, last);
            dims.swap(last - 1, last);
        }
        let mut linear = Linear::new(sizes);
        linear.push(suffix, dims);
        for suffix in [".weight_scale_inv", ".weight_scale", ".weight_zero_point"] {
            if let Some(scale) = self.find(suffix) {
                let (dims, block) = self.scale(&linear.sizes, scale)?;
                linear.push(suffix, dims);
                linear.block = linear.block.or(block);
            }
        }
        // bitsandbytes, 8 bits: one for each output.
        if self.find(".SCB").is_some() {
            linear.push(".SCB", smallvec![Dim::same(0)]);
        }
        if is_turned && (pairs || linear.block.is_some()) {
            return Err(wrong("no layout of inputs before outputs is packed or in blocks", weight));
        }
        Ok(linear)
    }

    /// The dimensions of a tensor of scales, and the block of FP8 if it is of blocks.
    fn scale(&self, sizes: &[u64], scale: &TensorMeta) -> Result<(Dims, Option<[u64; 2]>)> {
        let &[ref lead @ .., outputs, inputs] = sizes else { return Ok((own(scale), None)) };
        let shape = scale.shape.dims();
        let block = self.known.quantization.block;
        let blocks = [outputs.div_ceil(block[0]), inputs.div_ceil(block[1])];
        let (first, second) = (lead.len(), lead.len() + 1);
        let mut dims: Dims = (0..lead.len()).map(Dim::same).collect();
        let rest = shape.strip_prefix(lead);
        match rest {
            Some(rest) if rest == blocks && scale.name.ends_with("_inv") => {}
            _ if shape.iter().all(|&size| size == 1) => return Ok((own(scale), None)),
            Some(&[rows]) if rows == outputs => {
                dims.push(Dim::same(first));
                return Ok((dims, None));
            }
            Some(&[rows, 1]) if rows == outputs => {
                dims.extend([Dim::same(first), Dim::Own]);
                return Ok((dims, None));
            }
            Some(rest) if rest == blocks => {}
            Some(&[rows, groups]) if rows == outputs && groups > 0 && inputs.is_multiple_of(groups) => {
                dims.extend([Dim::same(first), Dim::each(second, inputs / groups)]);
                return Ok((dims, None));
            }
            _ => {
                return Err(wrong("scales are of no layout of their weight", scale).with_expected(
                    format!("[], [{outputs}, 1], {blocks:?} or [{outputs}, GROUPS] for {outputs} x {inputs}"),
                    &scale.shape,
                ));
            }
        }
        dims.extend([Dim::groups(first, block[0], blocks[0]), Dim::groups(second, block[1], blocks[1])]);
        Ok((dims, Some(block)))
    }

    /// GPTQ and AWQ: `qweight`, `qzeros`, `scales`, `g_idx`.
    fn packed_words(&self, weight: &TensorMeta) -> Result<Linear> {
        let packed = self.known.quantization.packed;
        let (values, words) = self.word();
        let [rows, columns] = two(weight)?;
        let Some(packed) = packed else {
            return Err(wrong("nothing says which method packed this", weight).with_expected("gptq or awq", "neither"));
        };
        let (outputs, inputs) = match packed {
            Packed::Gptq => (columns, times(rows / words, values, weight)?),
            Packed::Awq => (times(columns / words, values, weight)?, rows),
        };
        let mut linear = Linear::new(smallvec![outputs, inputs]);
        let word = |dim| Dim::Of { dim, per: words, of: values };
        linear.push(
            ".qweight",
            match packed {
                Packed::Gptq => smallvec![word(1), Dim::same(0)],
                Packed::Awq => smallvec![Dim::same(1), word(0)],
            },
        );
        for (suffix, output) in [(".qzeros", word(0)), (".scales", Dim::same(0))] {
            if let Some(groups) = self.find(suffix) {
                let group = self.group(groups, two(groups)?[0], inputs)?;
                linear.push(suffix, smallvec![group, output]);
            }
        }
        linear.push_shared(".g_idx", smallvec![Dim::same(1)], inputs);
        Ok(linear)
    }

    /// compressed-tensors: INT4 and INT8 in words, or two FP4 to a byte.
    fn weight_packed(&self, weight: &TensorMeta) -> Result<Linear> {
        let (values, words) = if weight.dtype == Dtype::U8 { (2, 1) } else { self.word() };
        let [outputs, columns] = two(weight)?;
        let most = times(columns.div_ceil(words), values, weight)?;
        let scale = self.find(".weight_scale");
        let groups = scale.map(two).transpose()?.map_or(1, |[_, groups]| groups);
        // The last word may not be full; whole groups say how many values there are.
        let inputs = match self.known.quantization.group {
            Some(group)
                if groups > 1 && (most.saturating_sub(values) + 1..=most).contains(&groups.saturating_mul(group)) =>
            {
                groups * group
            }
            _ => most,
        };
        let mut linear = Linear::new(smallvec![outputs, inputs]);
        linear.push(".weight_packed", smallvec![Dim::same(0), Dim::Of { dim: 1, per: words, of: values }]);
        if let Some(scale) = scale {
            linear.push(".weight_scale", smallvec![Dim::same(0), self.group(scale, groups, inputs)?]);
        }
        if let Some(zeros) = self.find(".weight_zero_point") {
            let group = self.group(zeros, two(zeros)?[1], inputs)?;
            linear.push(".weight_zero_point", smallvec![Dim::Of { dim: 0, per: words, of: values }, group]);
        }
        linear.push_shared(".weight_g_idx", smallvec![Dim::same(1)], inputs);
        Ok(linear)
    }

    /// gpt-oss: MXFP4 in blocks of 16 bytes, one matrix for each expert.
    fn blocks(&self, blocks: &TensorMeta) -> Result<Linear> {
        let &[experts, outputs, count, _] = blocks.shape.dims() else {
            return Err(
                wrong("not blocks of MXFP4", blocks).with_expected("[experts, outputs, blocks, bytes]", &blocks.shape)
            );
        };
        let mut linear = Linear::new(smallvec![experts, outputs, times(count, MX_BLOCK, blocks)?]);
        let block = Dim::each(2, MX_BLOCK);
        linear.push("_blocks", smallvec![Dim::same(0), Dim::same(1), block, Dim::Own]);
        linear.push("_scales", smallvec![Dim::same(0), Dim::same(1), block]);
        Ok(linear)
    }

    /// bitsandbytes: a flat column of bytes, whose rows only the configuration tells apart.
    fn nf4(&self, absmax: &TensorMeta) -> Result<Linear> {
        let Some(weight) = self.find(".weight") else {
            return Err(wrong("no weight beside its absmax", absmax));
        };
        let elements = weight.shape.dims().iter().product::<u64>() * 2;
        if elements == 0 {
            return Err(wrong("no rows to tell apart", weight).with_expected("elements", &weight.shape));
        }
        let outputs = self.known.outputs.filter(|&outputs| outputs > 0 && elements.is_multiple_of(outputs));
        let (outputs, inputs) = outputs.map_or((1, elements), |outputs| (outputs, elements / outputs));
        let mut linear = Linear::new(smallvec![outputs, inputs]);
        linear.whole_inputs = Some("bitsandbytes packs rows one after the other: they are not cut");
        for (suffix, elements) in
            [(".weight", 2), (".weight.absmax", ABSMAX_BLOCK), (".weight.nested_absmax", NESTED_BLOCK)]
        {
            let of = lcm(inputs, elements) / inputs;
            linear.push(suffix, smallvec![Dim::Of { dim: 0, per: of * inputs / elements, of }, Dim::Own]);
        }
        Ok(linear)
    }

    /// LoRA without the layer that it is for.
    fn adapter(&self, a: &TensorMeta) -> Linear {
        let inputs = a.shape.dims().last().copied().unwrap_or(1);
        let b = self.find(".lora_B.weight").or_else(|| self.find(".lora_embedding_B"));
        let outputs = b.and_then(|b| b.shape.dims().first().copied()).unwrap_or(1);
        Linear::new(smallvec![outputs, inputs])
    }

    /// Adds what modules of all layouts may have.
    fn with_common(&self, mut linear: Linear) -> Result<Linear> {
        let is_stack = linear.sizes.len() == 3;
        for suffix in [".bias", "_bias"] {
            if let Some(bias) = self.find(suffix) {
                let dims = if is_stack && bias.shape.dims().len() == 2 { 2 } else { 1 };
                linear.push(suffix, (0..dims).map(Dim::same).collect());
            }
        }
        let inputs = linear.sizes.len().saturating_sub(1);
        linear.push(".lora_A.weight", smallvec![Dim::Own, Dim::same(inputs)]);
        linear.push(".lora_B.weight", smallvec![Dim::same(0), Dim::Own]);
        // An embedding is looked up by its first dimension: [vocabulary, hidden].
        linear.push(".lora_embedding_A", smallvec![Dim::Own, Dim::same(0)]);
        linear.push(".lora_embedding_B", smallvec![Dim::same(inputs), Dim::Own]);
        linear.push(".lora_magnitude_vector", smallvec![Dim::same(0)]);
        for &suffix in SUFFIXES {
            let Some(other) = self.find(suffix).filter(|_| linear.stored(suffix).is_none()) else { continue };
            let elements = other.shape.dims().iter().product::<u64>();
            match suffix {
                ".weight_shape" => linear.push_shared(suffix, own(other), elements),
                _ if elements == 1 || OF_ALL.contains(&suffix) => linear.push(suffix, own(other)),
                _ => {
                    return Err(
                        wrong("no layout says what this is of its weight", other).with_expected("1 element", elements)
                    );
                }
            }
        }
        let present = |stored: &Stored| self.find(stored.suffix).is_some();
        linear.stored.retain(present);
        Ok(linear)
    }

    /// Packed values of so many words.
    fn word(&self) -> (u64, u64) {
        let bits = self.known.quantization.bits;
        let all = lcm(32, bits);
        (all / bits, all / 32)
    }

    /// The dimension of a tensor that has `groups` for so many inputs.
    fn group(&self, tensor: &TensorMeta, groups: u64, inputs: u64) -> Result<Dim> {
        if groups <= 1 || self.known.quantization.act_order {
            return Ok(Dim::Own);
        }
        let group = self.known.quantization.group.unwrap_or_else(|| inputs.div_ceil(groups)).max(1);
        if inputs.div_ceil(group) == groups {
            return Ok(Dim::each(1, group));
        }
        let expected = format!("{} of {group} for {inputs} inputs", inputs.div_ceil(group));
        Err(wrong("groups are not what the configuration says", tensor).with_expected(expected, groups))
    }
}

impl Linear {
    fn new(sizes: SmallVec<[u64; 3]>) -> Linear {
        Linear { sizes, stored: Vec::new(), block: None, whole_inputs: None }
    }

    fn push(&mut self, suffix: &'static str, dims: Dims) {
        self.stored.push(Stored { suffix, dims, merged: Merged::Each, refined: None });
    }

    fn push_shared(&mut self, suffix: &'static str, dims: Dims, len: u64) {
        self.stored.push(Stored { suffix, dims, merged: Merged::First(len), refined: None });
    }
}

/// A tensor without a logical dimension.
fn own(tensor: &TensorMeta) -> Dims {
    tensor.shape.dims().iter().map(|_| Dim::Own).collect()
}

/// A logical size; where a tensor has a dimension of 0 the others may be of any size.
fn times(size: u64, of: u64, tensor: &TensorMeta) -> Result<u64> {
    size.checked_mul(of)
        .ok_or_else(|| wrong("dimension is too large", tensor).with_expected(format!("less than 2^64 / {of}"), size))
}

fn two(tensor: &TensorMeta) -> Result<[u64; 2]> {
    match *tensor.shape.dims() {
        [rows, columns] => Ok([rows, columns]),
        _ => Err(wrong("not a matrix", tensor).with_expected("2 dimensions", &tensor.shape)),
    }
}

fn wrong(message: &str, tensor: &TensorMeta) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule("quantization").with_tensor(tensor.name.as_str())
}
