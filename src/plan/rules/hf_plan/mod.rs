//! Tensor-parallel plans of Hugging Face transformers as rules (sharding.md section 9).

mod names;
mod style;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File as Input;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use self::names::Engine;
use self::style::{Placing, Style};
use super::pattern::Pattern;
use super::{Owner, Placement, Rule, Rules};
use crate::checkpoint::{Checkpoint, TensorMeta};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::RULES_MAX;
use crate::plan::world::Mesh;

impl Rules {
    /// The rules of a tensor-parallel plan of transformers for the tensors of `checkpoint` on `mesh`. The file is JSON:
    /// the plan's dictionary, or an object with some of the keys `base_model_tp_plan`, `_tp_plan`,
    /// `base_model_ep_plan`, `base_model_prefix` and `version`. What no key names is replicated, and a key that names
    /// nothing has no effect, as in transformers. `docs/rules.md` has the styles and the details.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Io`] if the file cannot be read, else [`ErrorKind::Rules`] with rule
    /// `hf-plan` if it is larger than [`RULES_MAX`], is no such JSON, has a style that is not known, names no tensor
    /// of the checkpoint, or divides what it cannot: packed weights, and experts that do not divide evenly.
    pub fn from_hf_plan(path: impl AsRef<Path>, checkpoint: &Checkpoint, mesh: Mesh) -> Result<Rules> {
        let path = path.as_ref();
        let mut bytes = Vec::new();
        // Not by its size: a pipe has none.
        Input::open(path)
            .and_then(|file| file.take(RULES_MAX + 1).read_to_end(&mut bytes))
            .map_err(|error| Error::io("cannot read plan", path, error))?;
        let plan = || {
            if bytes.len() as u64 > RULES_MAX {
                return Err(refuse("plan is too large").with_expected(format!("at most {RULES_MAX} bytes"), "more"));
            }
            let json = serde_json::from_slice(&bytes).map_err(|error| refuse(format!("plan is no JSON: {error}")))?;
            HfPlan::new(&Dictionaries::new(&json)?, checkpoint, mesh)?.rules(checkpoint, mesh)
        };
        let rules = plan().map_err(|error| error.with_file(path))?;
        Ok(Rules { file: Some(path.to_owned()), ..rules })
    }
}

/// What is in the file.
struct Dictionaries<'a> {
    /// Keys relative to the base model.
    base: Vec<(&'a str, &'a str)>,
    /// Keys of the class around it.
    class: Vec<(&'a str, &'a str)>,
    /// Keys relative to the base model that count where experts have a mesh of their own.
    experts: Vec<(&'a str, &'a str)>,
    /// What the names of the base model begin with, without the last dot.
    prefix: Option<&'a str>,
    engine: Engine,
}

/// A plan for the names of one checkpoint.
struct HfPlan {
    /// Names with `*` for numbers, as the engine's modules and parameters have them.
    styles: HashMap<String, Style>,
    engine: Engine,
}

/// The tensors of one pattern by what becomes of them.
type Group<'a> = Vec<(Placement, Vec<&'a TensorMeta>)>;

impl<'a> Dictionaries<'a> {
    fn new(json: &'a Value) -> Result<Dictionaries<'a>> {
        let object = json.as_object().ok_or_else(|| refuse("plan is no JSON object"))?;
        let text = |key: &str| object.get(key).and_then(Value::as_str);
        let whole =
            ["base_model_tp_plan", "_tp_plan", "base_model_ep_plan"].iter().any(|key| object.contains_key(*key));
        let (base, class, experts) = match whole {
            true => (
                dictionary(object, "base_model_tp_plan")?,
                dictionary(object, "_tp_plan")?,
                dictionary(object, "base_model_ep_plan")?,
            ),
            false => (entries(object)?, Vec::new(), Vec::new()),
        };
        let all = || base.iter().chain(&class).chain(&experts).copied();
        let engine = match text("version") {
            Some(version) => Engine::of(version).ok_or_else(|| {
                refuse("plan is for an unknown version").with_expected("4.57 or 5", format!("`{version}`"))
            })?,
            None => {
                Engine::written_for(all()).or_else(|| Engine::of(text("transformers_version")?)).unwrap_or_default()
            }
        };
        Ok(Dictionaries { prefix: text("base_model_prefix"), base, class, experts, engine })
    }

    /// What the names of the base model begin with: what the file says, else that under which most keys name tensors,
    /// the shortest if there are several.
    fn prefix(&self, names: &HashSet<String>) -> String {
        if let Some(prefix) = self.prefix {
            return prefix.to_owned();
        }
        let mut found: BTreeMap<&str, usize> = BTreeMap::new();
        for (key, _) in self.base.iter().chain(&self.experts) {
            let parents = names.iter().filter_map(|name| name.rsplit_once('.').map(|(parent, _)| parent));
            let named = names.iter().map(String::as_str).chain(parents);
            let prefixes: HashSet<&str> = named.filter_map(|name| before(name, key)).collect();
            prefixes.into_iter().for_each(|prefix| *found.entry(prefix).or_default() += 1);
        }
        let best = found.into_iter().max_by_key(|(prefix, keys)| (*keys, std::cmp::Reverse(prefix.len())));
        best.map_or_else(String::new, |(prefix, _)| prefix.to_owned())
    }
}

impl HfPlan {
    fn new(file: &Dictionaries<'_>, checkpoint: &Checkpoint, mesh: Mesh) -> Result<HfPlan> {
        let engine = file.engine;
        let names = checkpoint.tensors().iter().flat_map(|tensor| engine.names(&tensor.name));
        let mut names: HashSet<String> = names.map(|name| engine.generic(&name.text)).collect();
        let scaled: Vec<String> = names.iter().filter_map(|name| names::scaled(name)).map(str::to_owned).collect();
        names.extend(scaled);
        let prefix = file.prefix(&names);
        let outer = prefix.rsplit_once('.').map_or("", |(outer, _)| outer);
        let mut plan = HfPlan { styles: HashMap::new(), engine };
        let experts = mesh.ep > 1 && !file.experts.is_empty();
        // 4.57 has one plan or the other; since 5 rules of experts take the place of others for the same modules.
        if !(experts && engine == Engine::V4) {
            let of_experts = |key: &str| file.experts.iter().any(|(module, _)| below(key, module));
            let kept = file.base.iter().filter(|(key, _)| !(experts && of_experts(key)));
            plan.add(kept, &[&prefix, outer, ""])?;
            plan.add(file.class.iter(), &[outer, ""])?;
        }
        if experts {
            plan.add(file.experts.iter(), &[&prefix, outer, ""])?;
        } else {
            file.experts.iter().try_for_each(|(_, style)| Style::named(style, engine).map(drop))?;
        }
        Ok(plan)
    }

    /// Adds keys under these prefixes.
    fn add<'a>(&mut self, keys: impl Iterator<Item = &'a (&'a str, &'a str)>, prefixes: &[&str]) -> Result<()> {
        for (key, style) in keys {
            let style = Style::named(style, self.engine)?;
            for prefix in prefixes {
                let name = if prefix.is_empty() { (*key).to_owned() } else { format!("{prefix}.{key}") };
                self.styles.insert(name, style);
            }
        }
        Ok(())
    }

    /// The style of a parameter: of its own key, that of what it scales, or its module's.
    fn style(&self, name: &str) -> Option<Style> {
        let name = self.engine.generic(name);
        let own = self.styles.get(&name).or_else(|| self.styles.get(names::scaled(&name)?));
        own.or_else(|| self.styles.get(name.rsplit_once('.')?.0)).copied()
    }

    /// One rule for each pattern of names and way to divide.
    fn rules(&self, checkpoint: &Checkpoint, mesh: Mesh) -> Result<Rules> {
        let placing = Placing::new(checkpoint, mesh, self.engine);
        let mut groups: BTreeMap<(usize, String), Group<'_>> = BTreeMap::new();
        let mut named = false;
        for tensor in checkpoint.tensors() {
            let found = self.engine.names(&tensor.name).find_map(|name| Some((self.style(&name.text)?, name.expert)));
            named |= found.is_some();
            let (style, expert) = found.unwrap_or((Style::Whole, None));
            let place = placing.place(style, tensor, expert).map_err(|error| error.with_tensor(&*tensor.name))?;
            // Experts go to different ranks, so their numbers tell them apart.
            let pattern = match expert.filter(|_| place.owner() != Some(&Owner::All)) {
                Some(expert) => names::of_expert(&tensor.name, expert),
                None => Pattern::like(&tensor.name),
            };
            let group = groups.entry((pattern.matches('*').count(), pattern)).or_default();
            match group.iter_mut().find(|(other, _)| *other == place) {
                Some((_, tensors)) => tensors.push(tensor),
                None => group.push((place, vec![tensor])),
            }
        }
        if !named {
            return Err(refuse("no key of the plan names a tensor of the checkpoint"));
        }
        // Those of fewer wildcards first: a name fits the pattern of its own group, and else only ones with more.
        let mut rules = Rules::new();
        for ((_, pattern), mut group) in groups {
            let most = group.iter().enumerate().max_by_key(|(_, (_, tensors))| tensors.len()).map_or(0, |(at, _)| at);
            let (place, _) = group.swap_remove(most);
            for (other, tensors) in group {
                for tensor in tensors {
                    rules = rules.push(Rule::new(&Pattern::exactly(&tensor.name), other.clone()));
                }
            }
            rules = rules.push(Rule::new(&pattern, place));
        }
        Ok(rules)
    }
}

/// A dictionary of the file; one that is null or not there has no entries.
fn dictionary<'a>(object: &'a Map<String, Value>, key: &str) -> Result<Vec<(&'a str, &'a str)>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(plan)) => entries(plan),
        Some(_) => Err(refuse(format!("`{key}` is no dictionary"))),
    }
}

fn entries(plan: &Map<String, Value>) -> Result<Vec<(&str, &str)>> {
    let settings = ["version", "base_model_prefix"];
    let modules = plan.iter().filter(|(key, _)| !settings.contains(&key.as_str()));
    let entry = |(key, style): (&'_ String, &'_ Value)| match style.as_str() {
        Some(_) => Ok(()),
        None => Err(refuse(format!("`{key}` has no style")).with_expected("the name of a style", style)),
    };
    modules.clone().try_for_each(entry)?;
    Ok(modules.filter_map(|(key, style)| Some((key.as_str(), style.as_str()?))).collect())
}

/// What stands before `key`, which is the end of `name`, without the dot between them.
fn before<'a>(name: &'a str, key: &str) -> Option<&'a str> {
    let rest = name.strip_suffix(key)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_suffix('.') }
}

/// Whether a name is `module` or below it.
fn below(name: &str, module: &str) -> bool {
    name.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn refuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule("hf-plan")
}
