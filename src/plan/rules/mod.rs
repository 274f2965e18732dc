//! [`Rules`]: patterns over tensor names -> placement. First match wins, and nothing is placed by default.

mod file;
mod hf_plan;
mod matching;
mod module;
mod pattern;
mod request;
mod rule;

use std::collections::HashSet;
use std::path::PathBuf;

pub(super) use self::matching::{Made, Matches, Origin, Placed, TENSORS_PER_TASK};
use self::pattern::{Pattern, Template};
pub(crate) use self::request::Buffer;
pub use self::request::Request;
pub(super) use self::rule::{AliasRule, Among, Owner, Pipeline, Placement, Rule};
use self::rule::{Filter, ModuleRule, Scope};
use super::cut::{Cut, Split};
use super::expr::{Expr, Fill, castable};
use super::quant::{Orientation, Quantization, SUFFIXES, Scalars};
use super::stages::StageSplit;
use super::world::Coord;
use crate::checkpoint::TensorMeta;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Rank;

/// How the tensors of a checkpoint are divided over the ranks: a list of patterns with a placement each. The first
/// one that matches a tensor's name decides.
///
/// In a pattern `*` is one dot-separated segment or a part of one, `**` any number of segments (also none), `{a,b}`
/// alternatives, and `\` takes the next character as it is. A tensor that no rule matches is an error, and so is a
/// rule that matches no tensor unless it is [`optional`](Rules::optional): a typo must not silently replicate a model.
/// Patterns are checked when a plan is made.
///
/// ```
/// use shardlift::plan::{Rules, ShardRule};
///
/// let rules = Rules::new()
///     .shard("**.{q,k,v}_proj.weight", ShardRule::dim(0).unit(128))
///     .shard("**.{o,down}_proj.weight", 1)
///     .skip("**.rotary_emb.inv_freq").optional()
///     .replicate("**");
/// # let _ = rules;
/// ```
#[derive(Debug, Clone, Default)]
pub struct Rules {
    pub(super) rules: Vec<Rule>,
    pub(super) aliases: Vec<AliasRule>,
    pub(super) requests: Vec<Request>,
    keep: Vec<Filter>,
    drop: Vec<Filter>,
    /// What floats of 16 bits and more are cast to whose rule does not say.
    casting: Option<Dtype>,
    /// How modules that a quantiser made are stored.
    quantization: Quantization,
    pub(super) pipeline: Option<Pipeline>,
    /// The file that the rules are from.
    file: Option<PathBuf>,
    /// The first mistake made while building; builders cannot fail half way.
    mistake: Option<(&'static str, String)>,
}

/// How a dimension is sharded: [`Rules::shard`] takes one, or a plain dimension.
#[derive(Debug, Clone)]
pub struct ShardRule {
    dim: usize,
    cut: Cut,
}

/// Which pipeline stages hold what no layer's number says it of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// The first: embeddings.
    First,
    /// The last: the final norm, the output head.
    Last,
    /// Both: embeddings that are the output head, too.
    Ends,
    /// All of them.
    All,
    /// These, the first being 0: a norm that the stage before its layer's keeps, too (TensorRT-LLM).
    Listed(Vec<u32>),
}

impl Rules {
    /// No rules yet: every tensor is unmatched.
    pub fn new() -> Rules {
        Rules::default()
    }

    /// Every tensor whole on every rank.
    pub fn replicate_all() -> Rules {
        Rules::new().replicate("**").optional()
    }

    /// Matching tensors lie whole on every rank.
    pub fn replicate(self, pattern: impl AsRef<str>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::replicate()))
    }

    /// Matching tensors are divided along a dimension: `shard("**.q_proj.weight", 0)`, or a [`ShardRule`].
    pub fn shard(self, pattern: impl AsRef<str>, shard: impl Into<ShardRule>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::from(shard.into())))
    }

    /// Matching tensors are what the expression says, on every rank.
    pub fn place(self, pattern: impl AsRef<str>, expr: Expr) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::Place { owner: Owner::All, expr }))
    }

    /// The tensors of matching modules are what the expression says of a logical matrix: `[outputs, inputs]`, or
    /// `[experts, outputs, inputs]` where one tensor has those of all experts. The pattern matches the name of the
    /// module, `model.layers.0.mlp.up_proj`; its tensors are the weight, or what a quantiser made of it (see
    /// [`quantization`](Rules::quantization)), the bias, and what a LoRA adapter adds to it. Each of them is divided as
    /// the matrix is: a bias along the outputs, scales with what they scale. Names in the expression and in
    /// [`rename`](Rules::rename) are those of modules, too.
    ///
    /// A cut falls between groups of values that share a scale or a word, of all tensors of the module: its unit is
    /// their least common multiple. Expressions of modules are made of [`Shard`](Expr::Shard),
    /// [`Slice`](Expr::Slice), [`Pad`](Expr::Pad), [`On`](Expr::On), [`Cast`](Expr::Cast), [`Concat`](Expr::Concat) and
    /// [`Stack`](Expr::Stack) of [`Select`](Expr::Select).
    pub fn module(self, pattern: impl AsRef<str>, expr: Expr) -> Rules {
        let rule = Rule::new(pattern.as_ref(), Placement::Place { owner: Owner::All, expr });
        self.push(Rule { scope: Scope::Module(ModuleRule::default()), ..rule })
    }

    /// All tensors of matching modules are parts of other destinations: [`part`](Rules::part) of a
    /// [`module`](Rules::module).
    pub fn module_part(self, pattern: impl AsRef<str>) -> Rules {
        let rule = Rule::new(pattern.as_ref(), Placement::Part);
        self.push(Rule { scope: Scope::Module(ModuleRule::default()), ..rule })
    }

    /// Weights of the modules of the rule added last that are not quantised are stored so.
    pub fn orientation(mut self, orientation: Orientation) -> Rules {
        if let Some(module) = self.last_module("orientation") {
            module.orientation = orientation;
        }
        self
    }

    /// Biases of the modules of the rule added last are only on the ranks that have `part` of the division `by`; the
    /// others have as many places that are filled. Without it a bias that no cut divides is whole on every rank.
    pub fn bias_on(mut self, by: Coord, part: u32, fill: Fill) -> Rules {
        if let Some(module) = self.last_module("bias_on") {
            module.bias = Some((by, part, fill));
        }
        self
    }

    /// Destinations of the rule of modules added last have `to` after the module's name where their tensors have `from`,
    /// which is one of the endings that tensors of modules have: `.weight`, `.qweight`, `_blocks`...
    pub fn suffix(mut self, from: impl AsRef<str>, to: impl Into<String>) -> Rules {
        let from = from.as_ref();
        match SUFFIXES.iter().chain(&[""]).find(|known| **known == from) {
            Some(known) => {
                if let Some(module) = self.last_module("suffix") {
                    module.suffixes.push((known, to.into()));
                }
            }
            None => self.mistake("suffix", &format!("no tensor of a module ends in `{from}`: {}", SUFFIXES.join(", "))),
        }
        self
    }

    /// What the rule of modules added last makes of tensors of one element.
    pub(in crate::plan) fn scalars(mut self, scalars: Scalars) -> Rules {
        if let Some(module) = self.last_module("scalars") {
            module.scalars = scalars;
        }
        self
    }

    /// The tensors of the rule added last are `count` like ones, for instance a layer's experts, of which each rank
    /// holds those that `cut` gives it: the number of one is what wildcard `wildcard` of the pattern matched, the
    /// first wildcard being 1.
    pub fn among(mut self, wildcard: usize, count: u64, cut: Cut) -> Rules {
        match self.rules.last_mut() {
            Some(rule) => rule.among = Some(Among { wildcard, count, cut }),
            None => self.mistake("among", "among() before any rule"),
        }
        self
    }

    /// Destinations of the rule added last are on these pipeline stages, whatever layer they are of.
    pub fn stage(mut self, stage: Stage) -> Rules {
        match self.rules.last_mut() {
            Some(rule) => rule.stage = Some(stage),
            None => self.mistake("stage", "stage() before any rule"),
        }
        self
    }

    /// Tensors whose name matches `layers` are of the layer whose number is the first wildcard that is one, and only on
    /// the pipeline stage that `how` gives this one of `count` layers; without a `count` there is one stage only. All other tensors are on every stage, unless their
    /// rule has a [`stage`](Rules::stage).
    pub fn pipeline(mut self, layers: impl AsRef<str>, count: impl Into<Option<u64>>, how: StageSplit) -> Rules {
        self.pipeline =
            Some(Pipeline { pattern: Pattern::new(layers.as_ref()), layers: count.into(), how, is_strict: false });
        self
    }

    /// With several stages all layers of the [`pipeline`](Rules::pipeline) must be there, and a tensor of none whose rule
    /// has no [`stage`](Rules::stage) is an error.
    pub(super) fn all_have_stages(mut self) -> Rules {
        if let Some(pipeline) = &mut self.pipeline {
            pipeline.is_strict = true;
        }
        self
    }

    /// Divides the layers of the [`pipeline`](Rules::pipeline) in another way.
    pub fn stage_split(mut self, how: StageSplit) -> Rules {
        match &mut self.pipeline {
            Some(pipeline) => pipeline.how = how,
            None => self.mistake("stages", "nothing says which tensors are of layers"),
        }
        self
    }

    /// How modules that a quantiser made are stored.
    pub fn quantization(mut self, quantization: Quantization) -> Rules {
        self.quantization = quantization;
        self
    }

    /// Matching tensors lie whole on one rank and nowhere else.
    pub fn only(self, pattern: impl AsRef<str>, rank: Rank) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::only(rank)))
    }

    /// Matching tensors are parts of other destinations, whose expressions [name](Expr::Tensor) them, and no destinations
    /// of their own.
    pub fn part(self, pattern: impl AsRef<str>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::Part))
    }

    /// Matching tensors are not loaded.
    pub fn skip(self, pattern: impl AsRef<str>) -> Rules {
        self.push(Rule::new(pattern.as_ref(), Placement::Skip))
    }

    /// The rule added last may match nothing.
    pub fn optional(mut self) -> Rules {
        match self.rules.last_mut() {
            Some(rule) => rule.optional = true,
            None => self.mistake("optional", "optional() before any rule"),
        }
        self
    }

    /// Tensors of the rule added last keep their type where [`casting`](Rules::casting) casts the others.
    pub fn keep_dtype(mut self) -> Rules {
        match self.rules.last_mut() {
            Some(rule) => rule.keep_dtype = true,
            None => self.mistake("keep-dtype", "keep_dtype() before any rule"),
        }
        self
    }

    /// Destinations of the rule added last get this name, in which `{1}` is what the first wildcard of the pattern
    /// matched, `{2}` the second, and so on; `\` takes the next character as it is.
    pub fn rename(mut self, template: impl AsRef<str>) -> Rules {
        match self.rules.last_mut() {
            Some(rule) => rule.rename = Some(Template::new(template.as_ref())),
            None => self.mistake("rename", "rename() before any rule"),
        }
        self
    }

    /// Tensors of the rule added last are cast: their elements become of type `to`, which is BF16, F16 or F32. They
    /// must be of one of these, or of F8_E4M3 or F8_E5M2 without a tensor of scales beside them.
    pub fn cast(self, to: Dtype) -> Rules {
        self.wrap("cast", |x| Expr::Cast { x, to })
    }

    /// Dimensions of the tensors of the rule added last come in another order: `order` says for each dimension of the
    /// destination which one of the tensor it is. What a rule shards are dimensions of the tensor. Only floats of 16
    /// bits and more are permuted, and an F8 that is [cast](Rules::cast).
    pub fn permute(self, order: &[usize]) -> Rules {
        self.wrap("permute", |x| Expr::Permute { x, order: order.to_vec() })
    }

    /// Tensors of the rule added last are transposed; they must have two dimensions.
    pub fn transpose(self) -> Rules {
        self.permute(&[1, 0])
    }

    /// Casts all tensors of type BF16, F16 and F32 to `to`, which is one of these, unless their rule has a
    /// [`cast`](Rules::cast) of its own, or [keeps](Rules::keep_dtype) their type. Tensors of other types stay as they are,
    /// and of [modules](Rules::module) all but weights that are not quantised, biases, and what a LoRA adapter adds.
    pub fn casting(mut self, to: Dtype) -> Rules {
        self.casting = Some(to);
        self
    }

    /// A further destination `name` that shares the memory of the destination `of` (tied weights), which is no alias
    /// itself. If `of` is left out by [`keeping`](Rules::keeping) or [`skipping`](Rules::skipping), its first alias
    /// that is not holds its bytes instead.
    pub fn alias(mut self, name: impl Into<String>, of: impl Into<String>) -> Rules {
        self.aliases.push(AliasRule { name: name.into(), of: of.into(), stage: None });
        self
    }

    /// An [`alias`](Rules::alias) that only these pipeline stages have, all of which hold the original.
    pub fn alias_on(mut self, stage: Stage, name: impl Into<String>, of: impl Into<String>) -> Rules {
        self.aliases.push(AliasRule { name: name.into(), of: of.into(), stage: Some(stage) });
        self
    }

    /// Only destinations that match `glob`, by their own name or by that of their tensor in the checkpoint, are loaded
    /// (those that match any, if called repeatedly). Does not say where to; the rules do.
    pub fn keeping(mut self, glob: impl AsRef<str>) -> Rules {
        self.keep.push(Filter::new(glob.as_ref()));
        self
    }

    /// Destinations that match `glob`, by their own name or by that of their tensor in the checkpoint, are not loaded,
    /// whatever the rules say.
    pub fn skipping(mut self, glob: impl AsRef<str>) -> Rules {
        self.drop.push(Filter::new(glob.as_ref()));
        self
    }

    /// Only the ranks that have `part` of the division `by` hold the destinations of the rule added last; the others have
    /// no such destinations.
    pub fn held_by(mut self, by: Coord, part: u32) -> Rules {
        match self.rules.last_mut().map(|rule| &mut rule.placement) {
            Some(Placement::Place { owner: owner @ Owner::All, .. }) => *owner = Owner::Where(by, part),
            Some(_) => self.mistake("where", "held_by() of what not all ranks hold"),
            None => self.mistake("where", "held_by() before any rule"),
        }
        self
    }

    /// Makes what the rule added last places a part of another expression.
    fn wrap(mut self, what: &'static str, expr: impl FnOnce(Box<Expr>) -> Expr) -> Rules {
        match self.rules.last_mut().map(|rule| &mut rule.placement) {
            Some(Placement::Place { expr: placed, .. }) => {
                *placed = expr(Box::new(std::mem::replace(placed, Expr::Source)));
            }
            Some(Placement::Part) => self.mistake(what, &format!("{what} of a part of other destinations")),
            Some(Placement::Skip) => self.mistake(what, &format!("{what} of a tensor that is skipped")),
            None => self.mistake(what, &format!("{what}() before any rule")),
        }
        self
    }

    fn last_module(&mut self, what: &'static str) -> Option<&mut ModuleRule> {
        if !matches!(self.rules.last(), Some(Rule { scope: Scope::Module(_), .. })) {
            self.mistake(what, &format!("{what}() of no rule of modules"));
        }
        match self.rules.last_mut() {
            Some(Rule { scope: Scope::Module(module), .. }) => Some(module),
            _ => None,
        }
    }

    /// What a destination's name has after the module's, where the rule says that.
    fn renamed_suffix(&self, rule: u32, suffix: &'static str) -> &str {
        match &self.rules[rule as usize].scope {
            Scope::Module(ModuleRule { suffixes, .. }) => {
                suffixes.iter().find(|(from, _)| *from == suffix).map_or(suffix, |(_, to)| to)
            }
            Scope::Tensors => suffix,
        }
    }

    pub(super) fn push(mut self, rule: Rule) -> Rules {
        self.rules.push(rule);
        self
    }

    fn mistake(&mut self, rule: &'static str, message: &str) {
        self.mistake.get_or_insert_with(|| (rule, message.to_owned()));
    }

    /// Refuses what makes no sense for any checkpoint.
    fn check(&self) -> Result<()> {
        if let Some((rule, message)) = &self.mistake {
            return Err(broken(rule, message.clone()));
        }
        self.rules.iter().try_for_each(Rule::check)?;
        self.requests.iter().try_for_each(Request::check)?;
        self.casting.map_or(Ok(()), castable)?;
        self.quantization.check()?;
        if let Some(Pipeline { pattern, .. }) = &self.pipeline {
            compiled("pattern", pattern)?;
        }
        let aliases: HashSet<&str> = self.aliases.iter().map(|alias| &*alias.name).collect();
        for AliasRule { name, of, stage: _ } in &self.aliases {
            let wrong = |what: String| broken("alias", what).with_tensor(name.as_str());
            if let Some(what) = unusable(name) {
                return Err(wrong(format!("alias of `{of}` is {what}")));
            }
            if aliases.contains(&**of) {
                return Err(wrong(format!("alias of `{of}`, which is an alias itself")));
            }
        }
        Ok(())
    }

    /// Whether a destination is loaded that goes by these names.
    pub(super) fn wants(&self, names: &[&str]) -> bool {
        let matches = |filter: &Filter| names.iter().any(|name| filter.matches(name));
        (self.keep.is_empty() || self.keep.iter().any(matches)) && !self.drop.iter().any(matches)
    }

    /// Refuses filters that make no sense, or that match none of the tensors and destinations with these names. `parts`
    /// are tensors that are parts of destinations only, and one of these.
    pub(super) fn check_filters<'a>(
        &self,
        names: impl Iterator<Item = &'a str> + Clone,
        parts: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Result<()> {
        for Filter { glob, pattern } in self.keep.iter().chain(&self.drop) {
            let pattern = compiled("pattern", pattern)?;
            if names.clone().any(|name| pattern.matches(name)) {
                continue;
            }
            if let Some((part, whole)) = parts.clone().find(|(part, _)| pattern.matches(part)) {
                return Err(broken("filter", format!("`{glob}` matches only parts of destinations"))
                    .with_expected(format!("a destination, as `{whole}`"), "a part of it")
                    .with_tensor(part));
            }
            return Err(broken("unused-rule", format!("no tensor and no destination matches `{glob}`")));
        }
        Ok(())
    }

    /// Names the rules file in an error of the rules.
    pub(super) fn located(&self, error: Error) -> Error {
        match &self.file {
            Some(file) if error.kind() == ErrorKind::Rules => error.with_file(file),
            _ => error,
        }
    }

    /// The pattern of a rule, as it was written.
    pub(super) fn pattern(&self, rule: u32) -> &str {
        self.rules[rule as usize].text()
    }
}

impl ShardRule {
    /// Even shards of whole indices of dimension `dim` (0 the outermost), over the tensor-parallel ranks.
    pub fn dim(dim: usize) -> ShardRule {
        ShardRule { dim, cut: Cut::default() }
    }

    /// What happens when the units do not divide evenly.
    pub fn split(mut self, how: Split) -> ShardRule {
        self.cut.how = how;
        self
    }

    /// So many indices stay together: a head, a group, a block.
    pub fn unit(mut self, unit: u64) -> ShardRule {
        self.cut.unit = unit;
        self
    }

    /// The dimension must have exactly so many units.
    pub fn units(mut self, units: u64) -> ShardRule {
        self.cut.units = Some(units);
        self
    }

    /// With more ranks than units, neighbouring ranks share a unit.
    pub fn replicate_units(mut self) -> ShardRule {
        self.cut.replicate_units = true;
        self
    }

    /// Which part each rank gets.
    pub fn by(mut self, by: Coord) -> ShardRule {
        self.cut.by = by;
        self
    }
}

impl ShardRule {
    /// The matched tensor's, or module's, parts.
    pub fn expr(self) -> Expr {
        Expr::shard(self.dim, self.cut)
    }
}

impl From<usize> for ShardRule {
    fn from(dim: usize) -> ShardRule {
        ShardRule::dim(dim)
    }
}

fn compiled<'a, T>(rule: &'static str, compiled: &'a Result<T, String>) -> Result<&'a T> {
    compiled.as_ref().map_err(|message| broken(rule, message.clone()))
}

/// Why no destination can have this name: the header of a safetensors file has its metadata there.
fn unusable(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("an empty name"),
        "__metadata__" => Some("`__metadata__`, which is no tensor in a safetensors file"),
        _ => None,
    }
}

fn unmatched(tensor: &TensorMeta) -> Error {
    // A JSON string is a TOML string, but for DEL.
    let pattern = serde_json::Value::from(Pattern::like(&tensor.name)).to_string().replace('\u{7f}', "\\u007f");
    let line = format!("{{ match = {pattern}, replicate = true }}");
    broken("unmatched-tensor", format!("no rule matches; to load it whole on every rank add {line}"))
        .with_tensor(tensor.name.as_str())
}

fn broken(rule: &'static str, message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule(rule)
}
