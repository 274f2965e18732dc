//! The names that transformers knows the tensors of a checkpoint by, and how it looks for them in a plan.

use super::super::pattern::Pattern;

/// The transformers that a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Engine {
    /// 4.57: parameters have the names of the files.
    V4,
    /// 5: those of experts are stacked, and some modules are renamed.
    #[default]
    V5,
}

/// A parameter's name.
pub(super) struct Name {
    pub(super) text: String,
    /// Which index of the parameter's first dimension the tensor is, where that is not all of it.
    pub(super) expert: Option<Expert>,
}

/// An expert that has tensors of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expert {
    pub(super) index: u64,
    /// The bytes of the tensor's name before the number.
    pub(super) start: usize,
}

impl Engine {
    /// That of a version.
    pub(super) fn of(version: &str) -> Option<Engine> {
        match version.split('.').next()? {
            "4" => Some(Engine::V4),
            "5" => Some(Engine::V5),
            _ => None,
        }
    }

    /// The one that alone has some of these styles, or keys like these.
    pub(super) fn written_for<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> Option<Engine> {
        let mut legacy = false;
        for (key, style) in entries {
            match super::style::only_of(style) {
                Some(Engine::V5) => return Some(Engine::V5),
                Some(Engine::V4) => legacy = true,
                // `w*` is what 4.57 made of `w1`.
                None => legacy |= key.split('.').any(|segment| segment != "*" && segment.contains('*')),
            }
        }
        legacy.then_some(Engine::V4)
    }

    /// A name as a plan has it: 4.57 writes `*` for every run of digits, 5 only for numbers between dots, of which two
    /// in a row share a dot, so that the second stays.
    pub(super) fn generic(self, name: &str) -> String {
        let mut generic = String::with_capacity(name.len());
        let digit = |char: char| char.is_ascii_digit();
        let mut rest = name;
        while let Some(at) = rest.find(digit) {
            let (before, number) = rest.split_at(at);
            let after = number.trim_start_matches(digit);
            generic.push_str(before);
            let alone = before.ends_with('.') && (after.is_empty() || after.starts_with('.'));
            if self == Engine::V5 && !alone {
                generic.push_str(&number[..number.len() - after.len()]);
            } else {
                generic.push('*');
            }
            rest = after;
            if self == Engine::V5
                && alone
                && let Some(after) = rest.strip_prefix('.')
            {
                generic.push('.');
                rest = after;
            }
        }
        generic + rest
    }

    /// The names of the parameter that the tensor `disk` is, or is a part of: the file's own first.
    pub(super) fn names(self, disk: &str) -> impl Iterator<Item = Name> {
        let own = Name { text: disk.to_owned(), expert: None };
        let others = (self == Engine::V5).then(|| {
            let renamed = match disk.strip_prefix("embed_out.") {
                Some(rest) => format!("lm_head.{rest}"),
                None => disk.replacen(".block_sparse_moe.", ".mlp.", 1),
            };
            let stacked = stacked(disk, &renamed);
            [(renamed != disk).then_some(Name { text: renamed, expert: None }), stacked]
        });
        std::iter::once(own).chain(others.into_iter().flatten().flatten())
    }
}

/// The parameter that the tensor of one expert is stacked into.
fn stacked(disk: &str, renamed: &str) -> Option<Name> {
    let (module, rest) = renamed.split_once(".experts.")?;
    let mut segments = rest.split('.');
    let (number, part, leaf) = (segments.next()?, segments.next()?, segments.next()?);
    let param = match part {
        "gate_proj" | "up_proj" | "w1" | "w3" => "gate_up_proj",
        "down_proj" | "w2" => "down_proj",
        _ => return None,
    };
    let index = number.parse().ok().filter(|_| segments.next().is_none())?;
    let bias = if leaf == "bias" { "_bias" } else { "" };
    let start = disk.find(".experts.")? + ".experts.".len();
    Some(Name { text: format!("{module}.experts.{param}{bias}"), expert: Some(Expert { index, start }) })
}

/// The parameter that this one holds the scales of, or the blocks.
pub(super) fn scaled(name: &str) -> Option<&str> {
    ["_scale_inv", "_scale", "_blocks", "_scales"].iter().find_map(|suffix| name.strip_suffix(suffix))
}

/// A pattern like [`Pattern::like`], but of this expert alone.
pub(super) fn of_expert(name: &str, expert: Expert) -> String {
    let (before, after) = name.split_at(expert.start);
    let (number, rest) = after.split_once('.').unwrap_or((after, ""));
    format!("{}.{number}.{}", Pattern::like(before.trim_end_matches('.')), Pattern::like(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_wildcards() {
        for (name, v4, v5) in [
            ("model.layers.17.q_proj.weight", "model.layers.*.q_proj.weight", "model.layers.*.q_proj.weight"),
            ("l.0.experts.3.w1.weight", "l.*.experts.*.w*.weight", "l.*.experts.*.w1.weight"),
            ("h.10", "h.*", "h.*"),
            ("a.0.1.b", "a.*.*.b", "a.*.1.b"),
            ("a.0.1.2", "a.*.*.*", "a.*.1.*"),
            ("0.a.dense_h_to_4h", "*.a.dense_h_to_*h", "0.a.dense_h_to_4h"),
            ("", "", ""),
        ] {
            assert_eq!(Engine::V4.generic(name), v4, "{name}");
            assert_eq!(Engine::V5.generic(name), v5, "{name}");
        }
    }

    #[test]
    fn experts_are_stacked_since_5() {
        let names = |engine: Engine, disk: &str| {
            engine.names(disk).map(|name| (name.text, name.expert.map(|expert| expert.index))).collect::<Vec<_>>()
        };
        let disk = "model.layers.2.block_sparse_moe.experts.13.w3.weight";
        assert_eq!(names(Engine::V4, disk), [(disk.to_owned(), None)]);
        let renamed = "model.layers.2.mlp.experts.13.w3.weight";
        let stacked = "model.layers.2.mlp.experts.gate_up_proj";
        assert_eq!(
            names(Engine::V5, disk),
            [(disk.to_owned(), None), (renamed.to_owned(), None), (stacked.to_owned(), Some(13))]
        );
        let expert = Engine::V5.names(disk).find_map(|name| name.expert).unwrap();
        assert_eq!(of_expert(disk, expert), "model.layers.*.block_sparse_moe.experts.13.w3.weight");
        assert_eq!(names(Engine::V5, "embed_out.weight")[1].0, "lm_head.weight");
        assert_eq!(names(Engine::V5, "m.mlp.experts.gate_up_proj").len(), 1);
    }
}
