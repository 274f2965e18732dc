//! What users can name, held against `docs/api.txt`: a change of it is seen in review. Read from the sources, so it is without
//! what the compiler adds (auto traits, blanket impls), and the same with every compiler and set of features.
//!
//! `cargo test --test api -- --ignored` writes the file anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use quote::ToTokens;
use syn::{Attribute, Fields, ImplItem, Item, ItemImpl, Type, UseTree, Visibility};

const LISTING: &str = "docs/api.txt";

#[test]
fn the_public_api_is_as_listed() {
    let (found, listed) = (listing(), fs::read_to_string(LISTING).unwrap_or_default());
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (new, old) = (lines(&found), lines(&listed));
    let added: Vec<_> = new.difference(&old).map(|line| format!("+ {line}")).collect();
    let removed: Vec<_> = old.difference(&new).map(|line| format!("- {line}")).collect();
    let advice = "meant? then `cargo test --test api -- --ignored`, and a line in CHANGELOG.md";
    assert!(found == listed, "{LISTING} is not the public API:\n{}\n{advice}", [removed, added].concat().join("\n"));
}

#[test]
#[ignore = "writes the listing"]
fn record() {
    fs::write(LISTING, listing()).unwrap();
}

fn listing() -> String {
    let mut krate = Crate::default();
    krate.read(Path::new("src/lib.rs"), Path::new("src"), Vec::new());
    let mut lines = BTreeSet::new();
    krate.list(&[], "shardlift", &mut lines);
    lines.into_iter().map(|line| line + "\n").collect()
}

/// All items by module, and all impls by the name of their type.
#[derive(Default)]
struct Crate {
    modules: BTreeMap<Vec<String>, Vec<Item>>,
    impls: BTreeMap<String, Vec<ItemImpl>>,
    /// Traits of this crate that not every module can name.
    private_traits: BTreeSet<String>,
}

impl Crate {
    fn read(&mut self, file: &Path, folder: &Path, module: Vec<String>) {
        let items = syn::parse_file(&fs::read_to_string(file).unwrap()).unwrap().items;
        self.add(items, folder, module);
    }

    fn add(&mut self, mut items: Vec<Item>, folder: &Path, module: Vec<String>) {
        items.retain(|item| !is_hidden(attributes(item)));
        for item in &mut items {
            match item {
                Item::Mod(inner) => {
                    let (name, mut path) = (inner.ident.to_string(), module.clone());
                    path.push(name.clone());
                    let below = folder.join(&name);
                    match inner.content.take() {
                        Some((_, items)) => self.add(items, &below, path),
                        None => {
                            let files = [below.with_extension("rs"), below.join("mod.rs")];
                            let file: &PathBuf = files.iter().find(|file| file.exists()).unwrap();
                            self.read(file, &below, path);
                        }
                    }
                }
                Item::Impl(of) => {
                    if let Type::Path(path) = &*of.self_ty {
                        let name = path.path.segments.last().unwrap().ident.to_string();
                        self.impls.entry(name).or_default().push(of.clone());
                    }
                }
                Item::Trait(of) if !is_public(&of.vis) => {
                    self.private_traits.insert(of.ident.to_string());
                }
                _ => {}
            }
        }
        self.modules.insert(module, items);
    }

    /// Everything public of a module, which users know by this name.
    fn list(&self, module: &[String], name: &str, lines: &mut BTreeSet<String>) {
        for item in &self.modules[module] {
            match item {
                Item::Use(of) if is_public(&of.vis) => {
                    for (path, known_as) in leaves(&of.tree, &[]) {
                        self.list_leaf(module, &path, &format!("{name}::{known_as}"), lines);
                    }
                }
                Item::Use(_) | Item::Impl(_) => {}
                _ => {
                    if let Some(ident) = name_of(item) {
                        self.list_item(module, item, &format!("{name}::{ident}"), lines);
                    }
                }
            }
        }
    }

    /// What a path of a `use` in this module leads to.
    fn list_leaf(&self, module: &[String], path: &[String], name: &str, lines: &mut BTreeSet<String>) {
        let mut at = if path[0] == "crate" { Vec::new() } else { module.to_vec() };
        let (last, before) = path.split_last().unwrap();
        for segment in before.iter().filter(|segment| *segment != "crate" && *segment != "self") {
            if segment == "super" { drop(at.pop()) } else { at.push(segment.clone()) }
        }
        let Some(items) = self.modules.get(&at) else {
            lines.insert(format!("use {name} = {}", path.join("::"))); // of another crate
            return;
        };
        for item in items {
            match item {
                Item::Use(of) => {
                    for (path, _) in leaves(&of.tree, &[]).into_iter().filter(|(_, known_as)| known_as == last) {
                        self.list_leaf(&at, &path, name, lines);
                    }
                }
                _ if name_of(item).is_some_and(|ident| ident == *last) => self.list_item(&at, item, name, lines),
                _ => {}
            }
        }
    }

    fn list_item(&self, module: &[String], item: &Item, name: &str, lines: &mut BTreeSet<String>) {
        let mut line = |text: String| {
            lines.insert(text);
        };
        let mut item = item.clone();
        let marks = marks(attributes(&item));
        match &mut item {
            Item::Mod(of) if is_public(&of.vis) => {
                line(format!("mod {name}"));
                let inner = [module, &[of.ident.to_string()]].concat();
                self.list(&inner, name, lines);
            }
            Item::Struct(of) if is_public(&of.vis) => {
                line(format!("struct {name}{} {marks}", text(&of.generics)));
                fields(&of.fields, true).into_iter().for_each(|field| line(format!("{name}.{field}")));
                self.list_impls(&of.ident.to_string(), name, lines);
            }
            Item::Enum(of) if is_public(&of.vis) => {
                line(format!("enum {name} {marks}"));
                for variant in &of.variants {
                    line(format!("{name}::{} {}", variant.ident, fields(&variant.fields, false).join(", ")));
                }
                self.list_impls(&of.ident.to_string(), name, lines);
            }
            Item::Trait(of) if is_public(&of.vis) => {
                let head = if of.unsafety.is_some() { "unsafe trait" } else { "trait" };
                line(format!("{head} {name}: {}", text(&of.supertraits)));
                for item in &mut of.items {
                    if let syn::TraitItem::Fn(function) = item {
                        let provided = if function.default.is_some() { " (provided)" } else { "" };
                        line(format!("{name}::{}{provided}", text(&function.sig)));
                    } else {
                        line(format!("{name}::{}", text(item)));
                    }
                }
            }
            Item::Fn(of) if is_public(&of.vis) => line(format!("{name}: {}", text(&of.sig))),
            Item::Const(of) if is_public(&of.vis) => line(format!("const {name}: {}", text(&of.ty))),
            Item::Type(of) if is_public(&of.vis) => line(format!("type {name} = {}", text(&of.ty))),
            _ => {}
        }
    }

    fn list_impls(&self, ident: &str, name: &str, lines: &mut BTreeSet<String>) {
        for of in self.impls.get(ident).into_iter().flatten() {
            if let Some((_, path, _)) = &of.trait_ {
                if !self.private_traits.contains(&path.segments.last().unwrap().ident.to_string()) {
                    lines.insert(format!("impl {} for {name}", text(path)));
                }
                continue;
            }
            for item in of.items.iter().filter(|item| !matches!(item, ImplItem::Fn(of) if is_hidden(&of.attrs))) {
                match item {
                    ImplItem::Fn(of) if is_public(&of.vis) => {
                        lines.insert(format!("{name}::{}: {}", of.sig.ident, text(&of.sig)));
                    }
                    ImplItem::Const(of) if is_public(&of.vis) => {
                        lines.insert(format!("{name}::{}: {}", of.ident, text(&of.ty)));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The paths that a `use` names, and what they are called from then on.
fn leaves(tree: &UseTree, before: &[String]) -> Vec<(Vec<String>, String)> {
    let with = |ident: &syn::Ident| [before, &[ident.to_string()]].concat();
    match tree {
        UseTree::Path(path) => leaves(&path.tree, &with(&path.ident)),
        UseTree::Group(group) => group.items.iter().flat_map(|tree| leaves(tree, before)).collect(),
        UseTree::Name(name) => vec![(with(&name.ident), name.ident.to_string())],
        UseTree::Rename(name) => vec![(with(&name.ident), name.rename.to_string())],
        UseTree::Glob(_) => Vec::new(), // the crate exports none
    }
}

fn name_of(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Mod(of) => &of.ident,
        Item::Struct(of) => &of.ident,
        Item::Enum(of) => &of.ident,
        Item::Trait(of) => &of.ident,
        Item::Fn(of) => &of.sig.ident,
        Item::Const(of) => &of.ident,
        Item::Type(of) => &of.ident,
        _ => return None,
    };
    Some(ident.to_string())
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Mod(of) => &of.attrs,
        Item::Struct(of) => &of.attrs,
        Item::Enum(of) => &of.attrs,
        Item::Trait(of) => &of.attrs,
        Item::Fn(of) => &of.attrs,
        Item::Const(of) => &of.attrs,
        Item::Impl(of) => &of.attrs,
        Item::Use(of) => &of.attrs,
        _ => &[],
    }
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// Of tests, or of builds without a feature: then there is another one of the name.
fn is_hidden(attributes: &[Attribute]) -> bool {
    let text: Vec<String> = attributes.iter().map(text).collect();
    text.iter().any(|text| {
        text.starts_with("#[cfg(")
            && ["cfg(test", "cfg(all(test", "doctest", "not(feature"].iter().any(|of| text.contains(of))
    })
}

/// What attributes promise: derived traits, and that more may come.
fn marks(attributes: &[Attribute]) -> String {
    let text = attributes.iter().map(text);
    text.filter(|text| text.starts_with("#[derive") || text.contains("non_exhaustive")).collect::<Vec<_>>().join(" ")
}

fn fields(fields: &Fields, public_only: bool) -> Vec<String> {
    let shown = fields.iter().enumerate().filter(|(_, field)| !public_only || is_public(&field.vis));
    let name = |(at, field): (usize, &syn::Field)| {
        let name = field.ident.as_ref().map_or(at.to_string(), ToString::to_string);
        format!("{name}: {}", text(&field.ty))
    };
    shown.map(name).collect()
}

/// Tokens with as few spaces as people write.
fn text(tokens: &impl ToTokens) -> String {
    let mut text = tokens.to_token_stream().to_string();
    for (from, to) in [
        (" :: ", "::"),
        (":: ", "::"),
        (" < ", "<"),
        ("< ", "<"),
        (" >", ">"),
        ("& ", "&"),
        (" ,", ","),
        ("( ", "("),
        (" (", "("),
        (" )", ")"),
        (" :", ":"),
        (" ;", ";"),
        ("# [", "#["),
        ("[ ", "["),
        (" ]", "]"),
        (" !", "!"),
        ("-> (", "-> ("),
    ] {
        text = text.replace(from, to);
    }
    text.replace("->(", "-> (").trim().to_owned()
}
