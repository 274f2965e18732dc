//! Who may import whom: the table of `ARCHITECTURE.md`, held against every source file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// Words with no opinions: everyone may name them, and they name only each other.
const BASE: &[&str] = &["cast", "error", "dtype", "shape", "extent", "limits", "observe", "stride", "sync"];

/// Module, and what it may import besides base and itself. A module that is not here may not exist.
const TABLE: &[(&str, &[&str])] = &[
    ("source", &[]),
    ("format", &[]),
    ("checkpoint", &["source", "format"]),
    ("plan", &["checkpoint"]),
    ("device", &[]),
    ("stage", &["device"]),
    ("read", &["source", "plan", "stage"]),
    ("copy", &["plan", "stage", "device"]),
    ("collective", &["plan", "device"]),
    ("place", &["plan", "device"]),
    ("pipeline", &["source", "plan", "device", "stage", "read", "copy", "collective", "place", "launch"]),
    ("launch", &["plan"]),
    ("loader", &["source", "checkpoint", "plan", "read", "collective", "place", "pipeline", "launch"]),
    ("candle", &["plan", "place"]),
];

/// Parts of the standard library that a module must not know: bytes go in, a `Header` comes out.
const FORBIDDEN_STD: &[(&str, &[&str])] = &[("format", &["fs", "path", "time", "net", "env", "process", "thread"])];

#[test]
fn every_import_is_in_the_table() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    files.sort();
    assert!(files.iter().any(|file| file.ends_with("lib.rs")), "no sources in {}", src.display());

    let root = Root::parse(&fs::read_to_string(src.join("lib.rs")).unwrap());
    let mut violations = Vec::new();
    for file in &files {
        let relative = file.strip_prefix(&src).unwrap();
        let text = fs::read_to_string(file).unwrap();
        violations.extend(check(relative, &text, &root).into_iter().map(|v| format!("{}: {v}", relative.display())));
    }
    assert!(violations.is_empty(), "{} imports break the table:\n{}", violations.len(), violations.join("\n"));
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// What the names at the crate root stand for: `crate::Plan` is an import of `plan`.
#[derive(Default)]
struct Root {
    exports: BTreeMap<String, String>,
}

impl Root {
    fn parse(lib: &str) -> Root {
        let mut exports = BTreeMap::new();
        for item in syn::parse_file(lib).unwrap().items {
            match item {
                syn::Item::Mod(module) => {
                    exports.insert(module.ident.to_string(), module.ident.to_string());
                }
                syn::Item::Use(item) => {
                    for leaf in leaves(&item.tree) {
                        let start = usize::from(matches!(leaf.path[0].as_str(), "crate" | "self"));
                        exports.insert(leaf.name, leaf.path[start].clone());
                    }
                }
                _ => {}
            }
        }
        Root { exports }
    }
}

/// The violations in one file; `relative` counts from `src`.
fn check(relative: &Path, text: &str, root: &Root) -> Vec<String> {
    let file = match syn::parse_file(text) {
        Ok(file) => file,
        Err(error) => return vec![format!("does not parse: {error}")],
    };
    let mut module: Vec<String> =
        relative.with_extension("").iter().map(|part| part.to_str().unwrap().into()).collect();
    let library = module[0] != "bin";
    if library {
        if matches!(module.last().map(String::as_str), Some("mod" | "lib")) {
            module.pop();
        }
        if let Some(top) = module.first()
            && !BASE.contains(&top.as_str())
            && !TABLE.iter().any(|(name, _)| name == top)
        {
            return vec![format!("module {top} is not in the import table")];
        }
    }
    let mut visitor = Visitor { module, library, root, violations: Vec::new() };
    visitor.visit_file(&file);
    visitor.violations
}

struct Visitor<'a> {
    /// The module that is being visited, from the crate root.
    module: Vec<String>,
    library: bool,
    root: &'a Root,
    violations: Vec<String>,
}

impl Visitor<'_> {
    /// Judges one path as it is written, for instance `super::plan::World`.
    fn path(&mut self, path: &[String]) {
        if !self.library {
            return; // another crate: the compiler shows it the public API only
        }
        let Some(top) = self.module.first().cloned() else {
            return; // lib.rs, the front door
        };
        let Some(first) = path.first() else { return };
        if matches!(first.as_str(), "std" | "core" | "alloc") {
            let forbidden = FORBIDDEN_STD.iter().find(|(name, _)| *name == top).map_or(&[][..], |(_, names)| *names);
            if let Some(name) = path.get(1).filter(|name| forbidden.contains(&name.as_str())) {
                self.violations.push(format!("{top} must not know {first}::{name}"));
            }
            return;
        }
        let mut place = match first.as_str() {
            "crate" | "$crate" | "shardlift" => Vec::new(),
            "self" | "super" => self.module.clone(),
            _ => return, // a local name or another crate
        };
        let mut rest = &path[usize::from(first != "super")..];
        while let Some((_, tail)) = rest.split_first().filter(|(segment, _)| *segment == "super") {
            place.pop();
            rest = tail;
        }
        if let Some(inside) = place.first() {
            assert_eq!(*inside, top, "relative paths stay inside their top-level module");
            return;
        }
        match rest.first().map(String::as_str) {
            None => self.violations.push(format!("{top} names the crate root itself ({})", path.join("::"))),
            Some("*") => self.violations.push(format!("{top} imports everything ({})", path.join("::"))),
            Some(name) => {
                let target = self.root.exports.get(name).map_or(name, String::as_str);
                if !allowed(&top, target) {
                    self.violations.push(format!("{top} must not import {target} ({})", path.join("::")));
                }
            }
        }
    }

    /// Paths inside macro calls, which syn leaves as tokens.
    fn tokens(&mut self, tokens: &str) {
        let mut path: Vec<String> = Vec::new();
        let mut joined = false; // the last token was `::` after a segment
        for token in lex(tokens) {
            if token == "::" {
                joined = !path.is_empty();
            } else if joined && (is_word(&token) || token == "*") {
                path.push(token);
                joined = false;
            } else {
                if joined && token == "{" && matches!(path[0].as_str(), "crate" | "$crate" | "super") {
                    self.violations.push(format!("grouped import of {} inside a macro call", path[0]));
                }
                if path.len() > 1 {
                    self.path(&path);
                }
                path.clear();
                joined = false;
                if is_word(&token) {
                    path.push(token);
                }
            }
        }
        if path.len() > 1 {
            self.path(&path);
        }
    }
}

impl<'ast> Visit<'ast> for Visitor<'_> {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        for leaf in leaves(&item.tree) {
            self.path(&leaf.path);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        // `self` alone is the receiver, and a single name is local.
        if path.segments.len() > 1 {
            self.path(&path.segments.iter().map(|segment| segment.ident.to_string()).collect::<Vec<_>>());
        }
        visit::visit_path(self, path);
    }

    // `pub(super)` and `pub(in path)` give access, they take none.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if item.attrs.iter().any(|attribute| attribute.path().is_ident("path")) {
            self.violations.push(format!("module {} has a #[path]: a file lies where its module says", item.ident));
        }
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_extern_crate(&mut self, item: &'ast syn::ItemExternCrate) {
        if item.ident == "self" {
            self.violations.push("extern crate self renames the crate root".into());
        }
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        if call.path.is_ident("include") {
            self.violations.push("include! hides whose code it is".into());
        }
        self.tokens(&call.tokens.to_string());
        visit::visit_macro(self, call);
    }
}

fn allowed(from: &str, to: &str) -> bool {
    from == to || BASE.contains(&to) || TABLE.iter().any(|(name, imports)| *name == from && imports.contains(&to))
}

/// One name that a `use` brings in, and its full path as written.
struct Leaf {
    path: Vec<String>,
    name: String,
}

fn leaves(tree: &syn::UseTree) -> Vec<Leaf> {
    fn walk(tree: &syn::UseTree, prefix: &mut Vec<String>, leaves: &mut Vec<Leaf>) {
        let mut leaf = |prefix: &[String], last: String, name: String| {
            // `use crate::plan::{self}` is `use crate::plan`
            let mut path = prefix.to_vec();
            let name = if name == "self" && !path.is_empty() { path[path.len() - 1].clone() } else { name };
            if last != "self" || path.is_empty() {
                path.push(last);
            }
            leaves.push(Leaf { path, name });
        };
        match tree {
            syn::UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                walk(&path.tree, prefix, leaves);
                prefix.pop();
            }
            syn::UseTree::Name(name) => leaf(prefix, name.ident.to_string(), name.ident.to_string()),
            syn::UseTree::Rename(name) => leaf(prefix, name.ident.to_string(), name.rename.to_string()),
            syn::UseTree::Glob(_) => leaf(prefix, "*".into(), "*".into()),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| walk(tree, prefix, leaves)),
        }
    }
    let mut found = Vec::new();
    walk(tree, &mut Vec::new(), &mut found);
    found
}

/// Words, `::` and other characters; string literals are dropped.
fn lex(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens: Vec<String> = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let char = chars[at];
        if char.is_whitespace() {
            at += 1;
        } else if char == '"' {
            let hashes = tokens.iter().rev().take_while(|token| *token == "#").count();
            let raw = tokens.iter().rev().nth(hashes).is_some_and(|token| matches!(token.as_str(), "r" | "br" | "cr"));
            at = literal_end(&chars, at, raw.then_some(hashes));
            tokens.push("\"\"".into());
        } else if is_word_char(char) || char == '$' {
            let start = at;
            at += 1;
            while at < chars.len() && (is_word_char(chars[at]) || (char == '$' && at == start + 1 && chars[at] == ' '))
            {
                at += 1;
            }
            tokens.push(chars[start..at].iter().filter(|char| **char != ' ').collect());
        } else if char == ':' && chars.get(at + 1) == Some(&':') {
            tokens.push("::".into());
            at += 2;
        } else if char == '\'' && chars.get(at + 1) == Some(&'"') && chars.get(at + 2) == Some(&'\'') {
            at += 3;
        } else {
            tokens.push(char.to_string());
            at += 1;
        }
    }
    tokens
}

/// The position after the string literal that opens at `at`; raw strings end at a quote and as many hashes.
fn literal_end(chars: &[char], at: usize, raw_hashes: Option<usize>) -> usize {
    let mut end = at + 1;
    while end < chars.len() {
        match (chars[end], raw_hashes) {
            ('\\', None) => end += 2,
            ('"', None) => return end + 1,
            ('"', Some(hashes)) if chars[end + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes => {
                return end + 1 + hashes;
            }
            _ => end += 1,
        }
    }
    end
}

fn is_word(token: &str) -> bool {
    token.starts_with(|char: char| is_word_char(char) || char == '$')
}

fn is_word_char(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

mod catches {
    use super::*;

    fn violations(file: &str, text: &str) -> Vec<String> {
        let root = Root::parse(
            "pub mod plan; mod device; pub mod checkpoint; mod error;
             pub use plan::{Plan, World as Ranks}; pub use checkpoint::Checkpoint; pub use error::{Error, Result};",
        );
        check(Path::new(file), text, &root)
    }

    #[track_caller]
    fn caught(file: &str, text: &str, what: &str) {
        let found = violations(file, text);
        assert!(found.len() == 1 && found[0].contains(what), "{file}: {text}\nexpected {what}, found {found:?}");
    }

    #[track_caller]
    fn fine(file: &str, text: &str) {
        assert_eq!(violations(file, text), Vec::<String>::new(), "{file}: {text}");
    }

    #[test]
    fn absolute_relative_and_grouped_imports() {
        caught("plan/mod.rs", "use crate::device::Host;", "plan must not import device");
        caught("plan/rules.rs", "use crate::{error::Error, device};", "plan must not import device");
        caught("plan/rules.rs", "use crate::{self as root};", "names the crate root");
        caught("plan/mod.rs", "use super::device::Host;", "plan must not import device");
        caught("plan/family/llama.rs", "use super::super::super::device;", "plan must not import device");
        caught("plan/mod.rs", "use self::super::device;", "plan must not import device");
        caught("plan/mod.rs", "mod tests { use super::super::device; }", "plan must not import device");
        caught("source/mod.rs", "use crate::checkpoint::{Checkpoint as C};", "source must not import checkpoint");
        caught("plan/mod.rs", "use crate::*;", "imports everything");
        caught("plan/mod.rs", "use super::*;", "imports everything");
    }

    #[test]
    fn names_of_the_crate_root() {
        caught("source/mod.rs", "use crate::Plan;", "source must not import plan");
        caught("source/mod.rs", "use crate::Ranks;", "source must not import plan");
        caught("checkpoint/mod.rs", "fn f(_: &crate::Plan) {}", "checkpoint must not import plan");
    }

    #[test]
    fn inline_paths() {
        caught("plan/mod.rs", "fn f() { crate::device::run(1) }", "plan must not import device");
        caught("plan/mod.rs", "struct S(Option<Vec<crate::device::D>>);", "plan must not import device");
        caught("plan/mod.rs", "impl crate::device::T for S {}", "plan must not import device");
        caught("plan/mod.rs", "fn f(x: u8) { match x { crate::device::A => {} } }", "plan must not import device");
        caught("plan/mod.rs", "fn f() { super::device::run::<u8>() }", "plan must not import device");
        caught("plan/mod.rs", "fn f() { assert!(a && crate::device::ok(), \"x\"); }", "plan must not import device");
        caught("plan/mod.rs", "macro_rules! m { () => { $crate::device::x() } }", "plan must not import device");
    }

    #[test]
    fn base_names_only_base() {
        caught("error.rs", "use crate::plan::Plan;", "error must not import plan");
        caught("limits.rs", "use super::source;", "limits must not import source");
        fine("error.rs", "use crate::extent::Rank; use super::dtype::Dtype;");
    }

    #[test]
    fn ways_around() {
        caught("plan/mod.rs", "#[path = \"../device/host.rs\"] mod host;", "#[path]");
        caught("plan/mod.rs", "include!(\"../device/host.rs\");", "include!");
        caught("extra/mod.rs", "", "module extra is not in the import table");
        caught("format/header.rs", "use std::{fmt, fs::File};", "format must not know std::fs");
        caught("format/header.rs", "fn f() { std::time::Instant::now(); }", "format must not know std::time");
        caught("bin/shardlift/main.rs", "#[path = \"../../plan/mod.rs\"] mod plan;", "#[path]");
    }

    #[test]
    fn and_lets_the_rest_pass() {
        fine("plan/mod.rs", "use crate::checkpoint::Checkpoint; use crate::error::{Error, Result}; use std::fs;");
        fine("plan/mod.rs", "use super::checkpoint; use crate::Checkpoint; mod tests { use super::*; }");
        fine("plan/family/llama.rs", "use super::{Family, super::leaf}; use crate::plan::rules;");
        fine("plan/mod.rs", "pub(crate) fn f(self_: &S) -> Self { self.x; Self::new(\"crate::device::X\") }");
        fine("plan/mod.rs", "fn f() { panic!(\"crate::device::X {}\", r#\"crate::device\"#); }");
        fine("plan/mod.rs", "/// Not [`crate::device::X`].\npub(in crate::plan) fn f() {}");
        fine("lib.rs", "mod device; pub use device::X; use crate::plan::Plan;");
        fine("bin/shardlift/main.rs", "use crate::output::Output; use shardlift::Plan;");
    }
}
