//! A plan's fingerprint: xxh3-64 over a fixed little-endian encoding, equal on every machine and across releases.
//!
//! Integers are u64, texts and lists are preceded by their length. In this order:
//! - the version of this encoding;
//! - files: name, size, hash of the header;
//! - the mesh: dp, pp, cp, tp; what its order and its experts change shows in the ranks' pieces;
//! - parameters: name, name of the dtype, alias (0 none, else 1 + its original's position);
//! - for each rank the xxh3-64 of its destinations: parameter, shape, bytes, and pieces: tensor, first source byte,
//!   first destination byte, loops (count, source stride, destination stride), run; and fills: first byte, loops (count,
//!   stride), run, element.
//!
//! That says how elements are permuted and cast, too: loops hold the one, and the other is from the type in the header
//! to the type of the parameter.

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3Default;

use super::world::{Mesh, World};
use super::{Loop, Param, RankPlan, ReadExtent};
use crate::checkpoint::Checkpoint;

pub(super) fn digest(checkpoint: &Checkpoint, world: &World, params: &[Param], ranks: &[RankPlan]) -> u64 {
    let mut out = Encoder::new();
    out.number(VERSION);
    out.number(checkpoint.files().len() as u64);
    for file in checkpoint.files() {
        out.text(&file.name);
        out.number(file.identity.size);
        out.number(file.header_hash);
    }
    let Mesh { dp, pp, cp, tp, ep: _, order: _ } = world.mesh();
    for size in [dp, pp, cp, tp] {
        out.number(size.into());
    }
    out.number(params.len() as u64);
    for Param { name, dtype, cast: _, alias_of } in params {
        out.text(name);
        out.text(dtype.name());
        out.number(alias_of.map_or(0, |original| u64::from(original) + 1));
    }
    let partitions: Vec<u64> = ranks.par_iter().map(partition).collect();
    out.number(partitions.len() as u64);
    for partition in partitions {
        out.number(partition);
    }
    out.finish()
}

/// The same over who reads what, which is no part of the other: the ranks' groups, and for each extent tensor, reader, first byte, loops (count,
/// stride), run.
pub(super) fn reading(groups: &[u32], extents: &[ReadExtent]) -> u64 {
    let mut out = Encoder::new();
    out.number(VERSION);
    out.number(groups.len() as u64);
    groups.iter().for_each(|&group| out.number(group.into()));
    out.number(extents.len() as u64);
    for extent in extents {
        for number in [u64::from(extent.tensor), extent.reader.0.into(), extent.start, extent.outer.len() as u64] {
            out.number(number);
        }
        for &(count, stride) in &extent.outer {
            out.number(count);
            out.number(stride);
        }
        out.number(extent.run);
    }
    out.finish()
}

fn partition(rank: &RankPlan) -> u64 {
    let mut out = Encoder::new();
    out.number(rank.dests.len() as u64);
    for dest in &rank.dests {
        out.number(dest.param.into());
        out.number(dest.shape.len() as u64);
        for &dim in dest.shape.dims() {
            out.number(dim);
        }
        out.number(dest.bytes);
        let pieces = super::audit::pieces(rank, dest);
        out.number(pieces.len() as u64);
        for piece in pieces {
            out.number(piece.tensor.into());
            out.number(piece.src);
            out.number(piece.dst);
            out.number(piece.loops.len() as u64);
            for &Loop { count, src_stride, dst_stride } in &piece.loops {
                out.number(count);
                out.number(src_stride);
                out.number(dst_stride);
            }
            out.number(piece.run);
        }
        let fills = super::audit::fills(rank, dest);
        out.number(fills.len() as u64);
        for fill in fills {
            out.number(fill.dst);
            out.number(fill.loops.len() as u64);
            for &(count, stride) in &fill.loops {
                out.number(count);
                out.number(stride);
            }
            out.number(fill.run);
            out.number(fill.element.len() as u64);
            out.bytes(&fill.element);
        }
    }
    out.finish()
}

struct Encoder {
    hash: Xxh3Default,
    buffer: Vec<u8>,
}

impl Encoder {
    fn new() -> Encoder {
        Encoder { hash: Xxh3Default::new(), buffer: Vec::with_capacity(2 * BUFFER) }
    }

    fn number(&mut self, number: u64) {
        self.bytes(&number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.bytes(text.as_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER {
            self.hash.update(&self.buffer);
            self.buffer.clear();
        }
    }

    fn finish(mut self) -> u64 {
        self.hash.update(&self.buffer);
        self.hash.digest()
    }
}

/// The version of the encoding; a change of it changes every digest.
const VERSION: u64 = 2;

/// Bytes gathered before they are hashed: many small updates would cost more than their bytes.
const BUFFER: usize = 16 << 10;
