//! The story of one tensor in a screenful: by which rule it is what, where its bytes come from, which rank gets which of
//! them, how they are read and where they land.

mod expr;
mod words;

use std::fmt::Display;

use self::words::{Lines, group_lines, indices, numbers, value};
use super::audit::pieces;
use super::build::Declared;
use super::expr::list;
use super::form::BoxOf;
use super::leaf::Leaf;
use super::report::{ClassReport, Size};
use super::rules::Placed;
use super::world::Ax;
use super::{Dest, Inner, Plan, ReadExtent};
use crate::checkpoint::TensorMeta;
use crate::error::{Error, ErrorKind, OneLine, Result};
use crate::extent::Rank;

impl Plan {
    /// What happens to one tensor, in about 40 lines of text: `name` is a destination, or a tensor of the
    /// checkpoint.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is neither.
    pub fn explain(&self, name: &str) -> Result<String> {
        let Inner { checkpoint, params, declared, .. } = &*self.inner;
        let tensor = checkpoint.position(name).map(|position| position as u32);
        let own = |tensor: u32| declared.iter().find(|entry| entry.tensor == Some(tensor)).map(|entry| entry.param);
        let param = match params.binary_search_by(|param| param.name.as_str().cmp(name)) {
            Ok(param) => Some(param as u32),
            Err(_) => tensor.and_then(own),
        };
        let mut lines = Lines::default();
        match (param, tensor) {
            (Some(param), tensor) => {
                self.destination(param, &mut lines)?;
                if let Some(tensor) = tensor {
                    self.named_alike(tensor, param, &mut lines);
                }
            }
            (None, Some(tensor)) => self.no_destination(tensor, &mut lines),
            (None, None) => {
                return Err(Error::new(ErrorKind::NotFound, "no such tensor or destination").with_tensor(name));
            }
        }
        Ok(lines.done())
    }

    /// A destination: what it is made of, who has what of it, how that is read.
    fn destination(&self, param: u32, lines: &mut Lines) -> Result<()> {
        let Inner { rules, params, declared, ranks, .. } = &*self.inner;
        let alias_of = params[param as usize].alias_of;
        let Ok(entry) = declared.binary_search_by_key(&alias_of.unwrap_or(param), |entry| entry.param) else {
            unreachable!("bug in shardlift: parameter without a source")
        };
        let entry = &declared[entry];
        let holders = ranks.iter().filter(|rank| rank.dest_of(param).is_some()).count();
        let name = &params[param as usize].name;
        let dtype = params[param as usize].dtype;
        lines.title(format!("{}: {dtype} on {} of {} ranks", OneLine(name), holders, ranks.len()));
        if let Some(original) = alias_of {
            lines.add("alias", format!("shares the memory of {}", OneLine(&params[original as usize].name)));
        }
        let aliases = params.iter().filter(|other| other.alias_of == Some(param));
        for alias in aliases.take(SOURCES) {
            lines.add("alias", format!("{} shares its memory", OneLine(&alias.name)));
        }
        let placed = self.placed_of(entry);
        let (what, name) = rules.said_by(placed);
        lines.add_some(what, format!("`{}`: {}", OneLine(name), OneLine(placed.expr.to_string())));
        if let Some(cast) = params[param as usize].cast {
            lines.add("cast", format!("cast from {} to {}", cast.from(), cast.to()));
        }
        let sources = self.sources_of(entry);
        for &source in sources.iter().take(SOURCES) {
            lines.add("from", self.source_words(source));
        }
        if sources.len() > SOURCES {
            lines.add("", format!("and {} more tensors", sources.len() - SOURCES));
        }
        self.reading_words(&sources, lines);
        self.groups(param, lines)
    }

    /// Who has which part, ranks that have the same together.
    fn groups(&self, param: u32, lines: &mut Lines) -> Result<()> {
        let mut groups: Vec<(Vec<String>, Vec<Rank>)> = Vec::new();
        for rank in self.ranks() {
            let words = match rank.dest_of(param) {
                None => vec!["nothing".to_owned()],
                Some(dest) => self.part_words(rank.rank, dest)?,
            };
            match groups.iter_mut().find(|(known, _)| *known == words) {
                Some((_, ranks)) => ranks.push(rank.rank),
                None => groups.push((words, vec![rank.rank])),
            }
        }
        let told = |(mut words, ranks): (Vec<String>, Vec<Rank>)| {
            words[0] = format!("{}: {}", self.who(&ranks), words[0]);
            if let Some(dest) = self.rank(ranks[0]).dest_of(param) {
                words.extend(self.landing_words(ranks[0], dest));
            }
            (group_lines(&words), ranks.len())
        };
        // The first and the last are always told, so that one sees how far they go.
        let Some((last, _)) = (groups.len() > 1).then(|| groups.pop()).flatten().map(told) else {
            groups.into_iter().map(told).for_each(|(group, _)| lines.extend(group));
            return Ok(());
        };
        let (mut at, mut left_out) = (0, 0);
        for (words, ranks) in groups {
            if at > 0 && (left_out > 0 || !lines.has_room(words.len() + COPIES + 1 + last.len())) {
                left_out += ranks.len();
                continue;
            }
            lines.extend(told((words, ranks)).0);
            at += 1;
        }
        if left_out > 0 {
            lines.extend(group_lines(&[format!("and {left_out} ranks between")]));
        }
        lines.extend(last);
        Ok(())
    }

    /// What a rank's destination is: its size, and the boxes that it is made of.
    fn part_words(&self, rank: Rank, dest: usize) -> Result<Vec<String>> {
        let Dest { shape, bytes, .. } = &self.rank(rank).dests[dest];
        let boxes = self.boxes(rank, dest)?;
        let size = format!("{shape}, {}", Size(*bytes));
        if let Some(leaf) = boxes.only_leaf() {
            return Ok(vec![format!("{size}: {}", self.leaf_words(leaf))]);
        }
        let dtype = boxes.dtype();
        let mut words = vec![size];
        let mut more = 0;
        let mut dense = vec![1; shape.len()];
        for dim in (1..shape.len()).rev() {
            dense[dim - 1] = dense[dim] * shape.dims()[dim];
        }
        boxes.for_each(|at| {
            if words.len() > BOXES {
                more += 1;
                return Ok(());
            }
            let spot = |dim: usize| {
                let size = shape.dims()[dim];
                indices(at.offset / dense[dim] % size, at.lens[dim], at.strides[dim] / dense[dim], size)
            };
            let place: Vec<String> = (0..shape.len()).map(spot).collect();
            let what = match at.what {
                BoxOf::Leaf(leaf) => format!("{} {}", OneLine(&self.tensor(leaf.tensor).name), self.leaf_words(leaf)),
                BoxOf::Fill(element) => value(element, dtype),
            };
            words.push(format!("[{}] is {what}", place.join(", ")));
            Ok(())
        })?;
        if more > 0 {
            words.push(format!("and {more} more parts"));
        }
        Ok(words)
    }

    /// Which indices of its tensor a leaf has.
    fn leaf_words(&self, leaf: &Leaf) -> String {
        let of = |factor: &super::Factor| indices(factor.start, factor.len, factor.step, factor.size);
        let sizes = |sizes: &mut dyn Iterator<Item = u64>| sizes.filter(|&size| size != 1).collect::<Vec<_>>();
        let dims = self.tensor(leaf.tensor).shape.dims();
        let factors: Vec<_> = leaf.factors.iter().filter(|factor| factor.size != 1).collect();
        let parts: Vec<String> = factors.iter().map(|factor| of(factor)).collect();
        let viewed = sizes(&mut factors.iter().map(|factor| factor.size));
        let mut words = format!("[{}]", parts.join(", "));
        if viewed != sizes(&mut dims.iter().copied()) {
            words += &format!(" of {viewed:?}");
        }
        if !leaf.order.is_sorted() {
            words += &format!(" permuted to {}", list(&leaf.order));
        }
        words
    }

    /// The copies that fill a rank's destination.
    fn landing_words(&self, rank: Rank, dest: usize) -> Vec<String> {
        let partition = self.rank(rank);
        let copies = pieces(partition, &partition.dests[dest]);
        let mut words: Vec<String> =
            copies.iter().take(COPIES).map(|copy| format!("{copy}: {}", self.lowering(copy))).collect();
        if copies.len() > COPIES {
            words.push(format!("and {} more copies", copies.len() - COPIES));
        }
        words
    }

    /// How this process reads these tensors.
    fn reading_words(&self, sources: &[u32], lines: &mut Lines) {
        let mut extents: Vec<&ReadExtent> =
            self.extents().iter().filter(|it| sources.contains(&it.tensor) && self.concerns(it)).collect();
        extents.sort_by_key(|extent| extent.tensor);
        let mut read = ClassReport::default();
        extents.chunk_by(|a, b| a.tensor == b.tensor).for_each(|of| read.add(self.of_extents(of)));
        if extents.is_empty() {
            return;
        }
        lines.add(
            "read",
            format!(
                "{} for {} needed (over-read {:.2}) in {}: {}",
                Size(read.read_bytes),
                Size(read.needed_bytes),
                read.over_read(),
                counted(read.reads, "read"),
                read.how(),
            ),
        );
    }

    /// A tensor that has its own name for another destination, or none.
    fn named_alike(&self, tensor: u32, param: u32, lines: &mut Lines) {
        let users: Vec<u32> =
            self.inner.declared.iter().filter(|entry| self.takes(entry, tensor)).map(|entry| entry.param).collect();
        for &user in users.iter().filter(|&&user| user != param).take(SOURCES) {
            let name = OneLine(&self.inner.params[user as usize].name);
            lines.add("also", format!("the checkpoint's tensor of this name is a part of {name}"));
        }
        if users.is_empty() {
            lines.add("", format!("the checkpoint's tensor of this name is {}", self.left_out_words(tensor)));
        }
    }

    /// A tensor that no destination is named after.
    fn no_destination(&self, tensor: u32, lines: &mut Lines) {
        let Inner { params, declared, .. } = &*self.inner;
        let name = OneLine(&self.tensor(tensor).name);
        let parts: Vec<&Declared> = declared.iter().filter(|entry| self.takes(entry, tensor)).collect();
        if parts.is_empty() {
            lines.title(format!("{name}: {} on every rank", self.left_out_words(tensor)));
            lines.add("in", self.source_words(tensor));
            return;
        }
        lines.title(format!("{name}: no destination of its own"));
        lines.add("in", self.source_words(tensor));
        for entry in parts.iter().take(SOURCES) {
            lines.add("part of", OneLine(&params[entry.param as usize].name).to_string());
            let placed = self.placed_of(entry);
            let (what, name) = self.inner.rules.said_by(placed);
            lines.add_some(what, format!("`{}`: {}", OneLine(name), OneLine(placed.expr.to_string())));
        }
        if parts.len() > SOURCES {
            lines.add("", format!("and of {} more destinations", parts.len() - SOURCES));
        }
        self.reading_words(&[tensor], lines);
    }

    fn left_out_words(&self, tensor: u32) -> String {
        match self.skipped_by(&self.tensor(tensor).name) {
            Some(pattern) => format!("skipped by rule `{}`", OneLine(pattern)),
            None => "left out by a filter".into(),
        }
    }

    /// A tensor of the checkpoint and where it lies.
    fn source_words(&self, tensor: u32) -> String {
        let TensorMeta { name, file, dtype, shape, start, end } = self.tensor(tensor);
        let (name, file) = (OneLine(name), OneLine(&self.file(*file).name));
        format!("{name}: {dtype} {shape}, bytes {start}..{end} ({}) of {file}", Size(end - start))
    }

    /// The tensors that a destination is made of.
    fn sources_of(&self, entry: &Declared) -> Vec<u32> {
        let matched = entry.tensor.filter(|_| self.placed_of(entry).expr.has_source());
        let mut sources: Vec<u32> = matched.into_iter().chain(entry.named.iter().copied()).collect();
        let mut seen = std::collections::HashSet::new();
        sources.retain(|source| seen.insert(*source));
        sources
    }

    /// Whether a destination is made of this tensor, too.
    fn takes(&self, entry: &Declared, tensor: u32) -> bool {
        entry.named.contains(&tensor) || entry.tensor == Some(tensor) && self.placed_of(entry).expr.has_source()
    }

    fn placed_of(&self, entry: &Declared) -> &Placed {
        &self.inner.placed[entry.placed as usize]
    }

    /// Ranks and their coordinates on the axes that tell them apart.
    fn who(&self, ranks: &[Rank]) -> String {
        let mesh = self.world().mesh();
        let axes = [Ax::Dp, Ax::Pp, Ax::Cp, Ax::Tp, Ax::Ep, Ax::Etp].into_iter().filter(|&ax| match ax {
            Ax::Ep | Ax::Etp => mesh.ep > 1 && mesh.axis(ax) > 1,
            _ => mesh.axis(ax) > 1,
        });
        let coordinates: Vec<String> =
            axes.map(|ax| format!("{ax} {}", numbers(ranks.iter().map(|&rank| mesh.coordinate(rank, ax))))).collect();
        let plural = if ranks.len() == 1 { "" } else { "s" };
        let ranks = numbers(ranks.iter().map(|rank| rank.0));
        match &coordinates[..] {
            [] => format!("rank{plural} {ranks}"),
            all => format!("rank{plural} {ranks} ({})", all.join(", ")),
        }
    }
}

impl super::RankPlan {
    /// The position of a parameter's destination.
    fn dest_of(&self, param: u32) -> Option<usize> {
        self.dests.binary_search_by_key(&param, |dest| dest.param).ok()
    }
}

fn counted(count: u64, what: impl Display) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Tensors, aliases and destinations of each kind that are told one by one.
const SOURCES: usize = 3;

/// Boxes of a destination that are told one by one.
const BOXES: usize = 3;

/// Copies of a destination that are told one by one.
const COPIES: usize = 2;
