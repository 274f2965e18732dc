//! Whether all layers and experts that are to be divided are there. One file of several alone may have some of them only,
//! which matters where stages or groups of ranks divide them.

use std::collections::{BTreeSet, HashMap};

use super::rules::{Made, Origin, Pipeline, Placed, Rules};
use super::world::Mesh;
use crate::checkpoint::TensorMeta;
use crate::error::{Error, ErrorKind, Result};

/// Refuses pipeline stages without tensors of their layers, and with expert parallelism a list of experts with gaps; of
/// rules for a model any layer that is missing.
pub(super) fn complete(
    rules: &Rules,
    tensors: &[TensorMeta],
    placed: &[Placed],
    made: &[Made],
    mesh: Mesh,
) -> Result<()> {
    if let Some(pipeline) = rules.pipeline.as_ref().filter(|_| mesh.pp > 1) {
        layers(pipeline, tensors, made, mesh)?;
    }
    if mesh.ep > 1 { experts(rules, tensors, placed, made) } else { Ok(()) }
}

fn layers(pipeline: &Pipeline, tensors: &[TensorMeta], made: &[Made], mesh: Mesh) -> Result<()> {
    let Some(count) = pipeline.layers else { return Ok(()) };
    let mut found = BTreeSet::new();
    for tensor in made.iter().flat_map(|made| made.named.iter().chain(&made.tensor)) {
        found.extend(pipeline.layer(&tensors[*tensor as usize].name)?);
    }
    if pipeline.is_strict && found.len() as u64 != count {
        return Err(missing("stages", "layers", count, &found));
    }
    for (stage, layers) in pipeline.how.stages(count, mesh.pp)?.into_iter().enumerate() {
        if !layers.is_empty() && found.range(layers.clone()).next().is_none() {
            let what = format!("pipeline stage {stage} has no tensor of its layers");
            let layers = format!("some of layers {} to {}", layers.start, layers.end - 1);
            return Err(broken("stages", what).with_expected(layers, format!("{} layers in all", found.len())));
        }
    }
    Ok(())
}

fn experts(rules: &Rules, tensors: &[TensorMeta], placed: &[Placed], made: &[Made]) -> Result<()> {
    // The numbers of all that differ in nothing else, and the first tensor of them.
    let mut found: HashMap<(u32, &str, &str), (BTreeSet<u64>, &str)> = HashMap::new();
    for Made { tensor, placed: at, .. } in made {
        let placed = &placed[*at as usize];
        let (Origin::Rule { rule, .. }, Some(tensor)) = (placed.origin, tensor) else { continue };
        let entry = &rules.rules[rule as usize];
        let Some(among) = &entry.among else { continue };
        let name = tensors[*tensor as usize].name.as_str();
        let subject = placed.subject(name);
        let (number, range) = entry.number(among, subject)?;
        let like = (rule, &subject[..range.start], &subject[range.end..]);
        found.entry(like).or_insert_with(|| (BTreeSet::new(), name)).0.insert(number);
    }
    let gaps = |((rule, ..), (numbers, name)): (&(u32, &str, &str), &(BTreeSet<u64>, &'_ str))| {
        let count = rules.rules[*rule as usize].among.as_ref()?.count();
        (numbers.len() as u64 != count).then(|| (name.to_string(), missing("experts", "experts", count, numbers)))
    };
    // Of several always the same one is told.
    match found.iter().filter_map(gaps).min_by(|a, b| a.0.cmp(&b.0)) {
        Some((name, error)) => Err(error.with_tensor(name)),
        None => Ok(()),
    }
}

fn missing(rule: &'static str, what: &str, count: u64, found: &BTreeSet<u64>) -> Error {
    let first = (0..count).find(|number| !found.contains(number)).unwrap_or(count);
    broken(rule, format!("{what} are missing, the first of them {first}"))
        .with_expected(format!("{count} {what}"), found.len())
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
