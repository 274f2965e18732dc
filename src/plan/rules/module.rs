//! Rules of modules: what is said of a linear module once, for each of the tensors that are stored for it.

use std::collections::HashMap;
use std::fmt::Display;

use super::matching::{Match, Origin, Placed, templates};
use super::pattern::{Captures, Template};
use super::{ModuleRule, Rule, Rules, Scope, broken};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::plan::expr::Expr;
use crate::plan::quant::{self, Known, Linear, Parts};
use crate::plan::world::Mesh;
use crate::shape::Shape;

/// Derives what rules say of modules, once for all modules that are stored alike.
pub(super) struct Modules<'a> {
    rules: &'a Rules,
    checkpoint: &'a Checkpoint,
    mesh: Mesh,
    /// The tensors of each module that a rule of modules matches.
    tensors: HashMap<&'a str, Vec<(&'static str, u32)>>,
    /// What aliases are of.
    aliases: HashMap<&'a str, &'a str>,
    /// A number for each way in which a module is stored.
    signatures: HashMap<Vec<(&'static str, Dtype, Shape)>, u32>,
    signature_of: HashMap<&'a str, u32>,
    /// The names in the expression of each rule of modules.
    templates: Vec<Vec<Template>>,
    /// What was derived: by rule, suffix, and the signatures of all modules that the rule speaks of.
    derived: HashMap<(u32, &'static str, Vec<u32>), u32>,
}

impl<'a> Modules<'a> {
    pub(super) fn new(
        rules: &'a Rules,
        checkpoint: &'a Checkpoint,
        mesh: Mesh,
        matched: &[Option<Match>],
    ) -> Result<Self> {
        let mut tensors: HashMap<&str, Vec<_>> = HashMap::new();
        for (at, (tensor, found)) in (0..).zip(checkpoint.tensors().iter().zip(matched)) {
            if let Some(found) = found
                && let Some(suffix) = found.suffix
            {
                tensors.entry(found.subject(&tensor.name)).or_default().push((suffix, at));
            }
        }
        let of_rule = |rule: &Rule| match (&rule.scope, rule.placement.expr()) {
            (Scope::Module(_), Some(expr)) => templates(expr),
            _ => Ok(Vec::new()),
        };
        Ok(Modules {
            rules,
            checkpoint,
            mesh,
            signatures: HashMap::new(),
            signature_of: HashMap::with_capacity(tensors.len()),
            tensors,
            aliases: rules.aliases.iter().map(|alias| (&*alias.name, &*alias.of)).collect(),
            templates: rules.rules.iter().map(of_rule).collect::<Result<_>>()?,
            derived: HashMap::new(),
        })
    }

    /// Where in `placed` stands what becomes of this tensor.
    pub(super) fn placed(&mut self, tensor: usize, found: &Match, placed: &mut Vec<Placed>) -> Result<u32> {
        let Match { rule, suffix: Some(suffix) } = *found else {
            unreachable!("bug in shardlift: a tensor of no module")
        };
        let Rule { pattern: Ok(pattern), placement, scope: Scope::Module(how), .. } = &self.rules.rules[rule as usize]
        else {
            return Ok(rule);
        };
        let Some(expr) = placement.expr() else { return Ok(rule) };
        let name = &self.checkpoint.tensors()[tensor].name;
        let module = found.subject(name);
        let captures = pattern.captures(module).unwrap_or_default();
        if suffix.starts_with(".lora_") {
            let known = Known {
                quantization: &self.rules.quantization,
                orientation: how.orientation,
                outputs: outputs(expr, None),
            };
            self.check_adapter(module, suffix, &self.checkpoint.tensors()[tensor], known)?;
        }
        let mut signatures = vec![self.signature(module)];
        let filler = Filler { module, captures };
        for at in 0..self.templates[rule as usize].len() {
            let named = self.templates[rule as usize][at].fill(module, &filler.captures);
            // Modules that no rule matches have no signature.
            let known = self.tensors.get_key_value(named.as_str()).map(|(&name, _)| name);
            signatures.push(known.map_or(u32::MAX, |name| self.signature(name)));
        }
        let key = (rule, suffix, signatures);
        if let Some(&known) = self.derived.get(&key) {
            return Ok(known);
        }
        let (expr, casts) = self.derive(expr, how, suffix, &filler).map_err(|error| {
            let error = error.in_context(format_args!("rule `{}`", pattern.text()));
            if error.tensor().is_some() { error } else { error.with_tensor(self.weight(module).unwrap_or(name)) }
        })?;
        let at = placed.len() as u32;
        let casts = casts && !self.rules.rules[rule as usize].keep_dtype;
        placed.push(Placed { origin: Origin::Rule { rule, suffix: Some(suffix) }, expr, casts });
        self.derived.insert(key, at);
        Ok(at)
    }

    /// Refuses what an adapter has for a module that the model does not have, or has with other sizes.
    fn check_adapter(&self, module: &str, suffix: &str, factor: &TensorMeta, known: Known<'_>) -> Result<()> {
        let Some(base) = module.strip_prefix(ADAPTER) else { return Ok(()) };
        let tensor = |name: &str| -> Option<&TensorMeta> {
            // A tied head is no tensor.
            self.checkpoint.tensor(name).or_else(|| self.checkpoint.tensor(self.aliases.get(name)?))
        };
        let wrong = |what: &str, expected: String, found: &dyn Display| {
            broken("adapter", what).with_expected(expected, found).with_tensor(factor.name.as_str())
        };
        let Some(linear) = quant::recognise(base, known, tensor)? else {
            return Err(wrong(
                "adapter of what the model does not have",
                format!("module `{base}`"),
                &"no weight of it",
            ));
        };
        // Stacked experts have factors of their own kind.
        let Some([outputs, inputs]) = linear.matrix(known.outputs) else { return Ok(()) };
        let (dim, size) = match suffix {
            ".lora_A.weight" => (1, inputs),
            ".lora_embedding_A" => (1, outputs),
            ".lora_embedding_B" => (0, inputs),
            _ => (0, outputs),
        };
        if factor.shape.dims().get(dim) == Some(&size) {
            return Ok(());
        }
        let expected = format!("{size} in dimension {dim}, for `{base}` of {outputs} x {inputs}");
        Err(wrong("adapter is for a module of other sizes", expected, &factor.shape))
    }

    /// What becomes of the tensors with a suffix, and whether they are cast with the model.
    fn derive(&self, expr: &Expr, how: &ModuleRule, suffix: &str, filler: &Filler<'_>) -> Result<(Expr, bool)> {
        let linear = |module: &str, outputs: Option<u64>| -> Result<Linear> {
            let known = Known { quantization: &self.rules.quantization, orientation: how.orientation, outputs };
            let tensor = |name: &str| -> Option<&TensorMeta> { self.checkpoint.tensor(name) };
            quant::recognise(module, known, tensor)?
                .ok_or_else(|| broken("module", format!("no tensor is the weight of `{module}`")))
        };
        let matched = linear(filler.module, outputs(expr, None))?;
        let named = |template: &str| linear(&filler.fill(template)?, outputs(expr, Some(template)));
        let (mesh, scalars) = (self.mesh, how.scalars);
        let mut parts = Parts { matched: &matched, named: &named, mesh, refined: None, scalars };
        if self.rules.quantization.refine {
            parts.refined = quant::refined(expr, &parts)?;
        }
        let derived = quant::derive(expr, suffix, &parts)?;
        let expr = match &how.bias {
            Some((by, part, fill)) if matches!(suffix, ".bias" | "_bias") => {
                Expr::On { x: Box::new(derived), by: by.clone(), part: *part, fill: fill.clone() }
            }
            _ => derived,
        };
        Ok((expr, matched.casts(suffix)))
    }

    /// The tensor that a module is known by: its first in the file may be a bias or a scale.
    fn weight(&self, module: &str) -> Option<&str> {
        let tensors = self.tensors.get(module)?;
        let (_, at) = tensors.iter().find(|(suffix, _)| quant::WEIGHTS.contains(suffix))?;
        Some(&self.checkpoint.tensors()[*at as usize].name)
    }

    /// How a module is stored.
    fn signature(&mut self, module: &'a str) -> u32 {
        if let Some(&known) = self.signature_of.get(module) {
            return known;
        }
        let tensors = self.tensors.get(module).map(Vec::as_slice).unwrap_or_default();
        let mut stored: Vec<_> = tensors
            .iter()
            .map(|&(suffix, at)| {
                let TensorMeta { dtype, shape, .. } = &self.checkpoint.tensors()[at as usize];
                (suffix, *dtype, shape.clone())
            })
            .collect();
        stored.sort_unstable_by_key(|(suffix, ..)| *suffix);
        let next = self.signatures.len() as u32;
        let signature = *self.signatures.entry(stored).or_insert(next);
        self.signature_of.insert(module, signature);
        signature
    }
}

/// Fills templates with what a pattern matched of a module's name.
struct Filler<'a> {
    module: &'a str,
    captures: Captures,
}

impl Filler<'_> {
    fn fill(&self, template: &str) -> Result<String> {
        let template = Template::new(template).map_err(|what| broken("source", what))?;
        Ok(template.fill(self.module, &self.captures))
    }
}

/// What PEFT puts before the names of a model's modules.
const ADAPTER: &str = "base_model.model.";

/// The outputs of a module that an expression speaks of, where a cut says how many units of them there are: of the one
/// with this name in it, or of the one that the rule matched.
fn outputs(expr: &Expr, name: Option<&str>) -> Option<u64> {
    let is = |x: &Expr| match (x, name) {
        (Expr::Source, None) => true,
        (Expr::Tensor(other), Some(name)) => other == name,
        _ => false,
    };
    match expr {
        Expr::Shard { x, dim: 0, cut } if is(x) => cut.units?.checked_mul(cut.unit),
        _ => expr.inner().iter().find_map(|inner| outputs(inner, name)),
    }
}
