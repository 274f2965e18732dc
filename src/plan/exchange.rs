//! What ranks that read together pass on to each other, in rounds that all of them derive from the plan alone: in each round
//! those whose turn it is read one chunk of what they read for several, and send each of the others its part of it.

use smallvec::SmallVec;

use super::{Cursor, Cutting, Loops, Piece, Plan, Processes, ReadOp, Reads};
use crate::extent::Rank;
use crate::limits;
use crate::stride::{Loop, bytes_moved};

/// The exchange of one rank with its [partners](Plan::partners): an iterator over rounds, all of them, also those in which it
/// has no part.
#[derive(Debug)]
pub(crate) struct Exchange {
    rank: Rank,
    members: Vec<Member>,
    chunk: u64,
}

/// A rank of the exchange, what it reads for several, and how far it is.
#[derive(Debug)]
struct Member {
    rank: Rank,
    reads: Reads,
    cursor: Cursor,
    /// For each extent of `reads` the bytes that the rank reads before it, whomever for.
    before: Vec<u64>,
    next: Option<Turn>,
}

/// A rank's next read for several.
#[derive(Debug)]
struct Turn {
    op: ReadOp,
    /// How many bytes the rank has read then.
    at: u64,
}

/// What one rank does in a round.
#[derive(Debug, Default)]
pub(crate) struct Round {
    /// What it reads, if anything.
    pub(crate) own: Option<ReadOp>,
    /// What of that it sends.
    pub(crate) sent: Vec<Parcel>,
    /// What it receives, at most one parcel of each member.
    pub(crate) received: Vec<Received>,
}

/// Bytes of a read that travel as one message to each of its receivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parcel {
    /// Who gets it, ascending.
    pub(crate) to: SmallVec<[Rank; 8]>,
    /// What it is made of, in order.
    pub(crate) parts: Vec<Part>,
    /// Its bytes.
    pub(crate) bytes: u64,
    /// It is all of the read, of which each receiver takes its pieces itself.
    whole: bool,
}

/// Runs of a read that lie densely in a parcel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// The first byte, counted from the first of the read.
    pub(crate) src: u64,
    /// The first byte in the parcel.
    pub(crate) dst: u64,
    /// From the read to the parcel.
    pub(crate) loops: Loops,
    /// Contiguous bytes.
    pub(crate) run: u64,
}

/// A parcel that a rank receives.
#[derive(Debug)]
pub(crate) struct Received {
    /// Who sends it.
    pub(crate) from: Rank,
    /// Everybody else in the exchange receives the same.
    pub(crate) by_all: bool,
    /// Its bytes.
    pub(crate) bytes: u64,
    /// What becomes of it, counted from its first byte.
    pub(crate) pieces: Vec<Piece>,
}

impl Exchange {
    /// The exchange of the rank that this process drives, in chunks of at most so many bytes; `None` if it has no part in
    /// any.
    pub(crate) fn new(plan: &Plan, chunk: u64) -> Option<Exchange> {
        let (&[rank], Processes::PerRank) = (plan.world().driven(), plan.world().processes()) else { return None };
        let members: Vec<Member> =
            plan.partners(rank).into_iter().map(|member| Member::new(plan, member, chunk)).collect();
        (!members.is_empty()).then_some(Exchange { rank, members, chunk })
    }

    /// Bytes of the chunks in which so many ranks exchange, with staging slots of this size: few enough for the device
    /// memory that is meant for it, and for a slot.
    pub(crate) fn chunk(members: usize, slot_bytes: usize) -> u64 {
        let each = limits::EXCHANGE / (limits::EXCHANGE_ROUNDS * members.max(1)) as u64;
        let chunk = each.clamp(limits::EXCHANGE_CHUNK_MIN, limits::EXCHANGE_CHUNK).min(slot_bytes as u64 / 2);
        chunk - chunk % limits::DIRECT_ALIGNMENT
    }

    /// Most bytes of a round that a rank sends, and that it receives of each other one.
    pub(crate) fn most(chunk: u64) -> u64 {
        chunk + limits::DIRECT_ALIGNMENT
    }

    /// Those who take part, ascending.
    pub(crate) fn members(&self) -> impl ExactSizeIterator<Item = Rank> {
        self.members.iter().map(|member| member.rank)
    }
}

impl Iterator for Exchange {
    type Item = Round;

    fn next(&mut self) -> Option<Round> {
        let (mut round, mut pieces, count) = (Round::default(), Vec::new(), self.members.len());
        // Who is as far as the one that comes first, if all read equally fast, or a chunk further: nobody waits for more.
        let first = self.members.iter().filter_map(|member| member.next.as_ref()).map(|turn| turn.at).min()?;
        let until = first + self.chunk;
        for member in &mut self.members {
            let Some(Turn { op, .. }) = member.next.take_if(|turn| turn.at <= until) else { continue };
            member.advance();
            let Member { rank, reads, .. } = member;
            let parcels = parcels(reads, &op, *rank, &mut pieces);
            if *rank == self.rank {
                (round.own, round.sent) = (Some(op), parcels);
            } else if let Some(parcel) = parcels.into_iter().find(|parcel| parcel.to.contains(&self.rank)) {
                let own: Vec<&Piece> = pieces.iter().filter(|piece| piece.rank == self.rank).collect();
                let pieces = parcel.pieces(&own);
                let by_all = parcel.to.len() + 1 == count;
                round.received.push(Received { from: *rank, by_all, bytes: parcel.bytes, pieces });
            }
        }
        Some(round)
    }
}

impl Member {
    fn new(plan: &Plan, rank: Rank, chunk: u64) -> Member {
        let (mut extents, mut before, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (position, extent) in (0..).zip(plan.extents()).filter(|(_, extent)| extent.reader == rank) {
            if plan.is_shared(extent) {
                extents.push(position);
                before.push(bytes);
            }
            bytes += extent.bytes();
        }
        let reads = Reads::of(plan, Cutting::of_exchange(chunk), extents);
        let mut member = Member { rank, reads, cursor: Cursor::default(), before, next: None };
        member.advance();
        member
    }

    fn advance(&mut self) {
        let Some((op, behind)) = self.reads.next(&self.cursor) else { return };
        let (extent, done) = self.cursor.place(&self.reads);
        let at = self.before[extent] + done + op.extent.end - op.extent.start;
        self.cursor = behind;
        self.next = Some(Turn { op, at });
    }
}

impl Round {
    /// Whether the rank has no part in it.
    pub(crate) fn is_idle(&self) -> bool {
        self.own.is_none() && self.received.is_empty()
    }
}

/// What of a read travels from its reader, and the read's pieces, sorted by rank. Those who want the same share a parcel,
/// and where all parcels together are more than what was read everybody gets that instead.
pub(super) fn parcels(reads: &Reads, op: &ReadOp, reader: Rank, pieces: &mut Vec<Piece>) -> Vec<Parcel> {
    pieces.clear();
    reads.pieces(op, pieces);
    pieces.sort_by_key(|piece| (piece.rank, piece.src, piece.dest, piece.dst));
    let bytes = op.extent.end - op.extent.start;
    let mut parcels: Vec<Parcel> = Vec::new();
    for of_rank in pieces.chunk_by(|a, b| a.rank == b.rank).filter(|of_rank| of_rank[0].rank != reader) {
        let parcel = Parcel::of(of_rank);
        match parcels.iter_mut().find(|other| other.parts == parcel.parts) {
            Some(same) => same.to.push(of_rank[0].rank),
            None => parcels.push(parcel),
        }
    }
    if parcels.iter().map(|parcel| parcel.bytes).sum::<u64>() <= bytes {
        return parcels;
    }
    let mut to: SmallVec<[Rank; 8]> = parcels.into_iter().flat_map(|parcel| parcel.to).collect();
    to.sort_unstable();
    let part = Part { src: 0, dst: 0, loops: Loops::new(), run: bytes };
    vec![Parcel { to, parts: vec![part], bytes, whole: true }]
}

impl Parcel {
    /// The pieces of one rank, behind each other.
    fn of(pieces: &[Piece]) -> Parcel {
        let (mut parts, mut bytes) = (Vec::with_capacity(pieces.len()), 0);
        for piece in pieces {
            let mut loops = piece.loops.clone();
            let mut dense = piece.run;
            for inner in loops.iter_mut().rev() {
                inner.dst_stride = dense;
                dense *= inner.count;
            }
            let part = Part { src: piece.src, dst: bytes, loops, run: piece.run };
            bytes += bytes_moved(&part.loops, part.run);
            parts.push(part);
        }
        Parcel { to: SmallVec::from_slice(&[pieces[0].rank]), parts, bytes, whole: false }
    }

    /// What becomes of it at the rank whose pieces of the read these are.
    fn pieces(&self, pieces: &[&Piece]) -> Vec<Piece> {
        if self.whole {
            return pieces.iter().map(|&piece| piece.clone()).collect();
        }
        let packed = |(&piece, part): (&&Piece, &Part)| {
            let loops = piece.loops.iter().zip(&part.loops);
            let loops = loops.map(|(inner, packed)| Loop { src_stride: packed.dst_stride, ..*inner }).collect();
            Piece { src: part.dst, loops, ..piece.clone() }
        };
        pieces.iter().zip(&self.parts).map(packed).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::dtype::Dtype;
    use crate::plan::tests::checkpoint;
    use crate::plan::{Ax, Cooperate, Coord, DeviceSpec, Mesh, Rules, ShardRule, Traffic, World};
    use crate::stride::for_each_run;

    /// Which byte of the file each byte of a rank's destinations has: (destination, byte) to byte of the file.
    type Landed = BTreeMap<(u32, u64), u64>;

    /// Lands pieces of what lies at `base` of the file, or wherever `file_byte` finds it.
    fn land(pieces: &[Piece], rank: Rank, landed: &mut Landed, file_byte: impl Fn(u64) -> u64) {
        for piece in pieces.iter().filter(|piece| piece.rank == rank) {
            for_each_run(&piece.loops, piece.src, piece.dst, &mut |src, dst| {
                for at in 0..piece.run {
                    let before = landed.insert((piece.dest, dst + at), file_byte(src + at));
                    assert_eq!(before, None, "written once");
                }
            });
        }
    }

    /// The bytes of the file that a parcel of a read holds, in order.
    fn held(parcel: &Parcel, op: &ReadOp) -> Vec<u64> {
        let mut held = vec![u64::MAX; parcel.bytes as usize];
        for part in &parcel.parts {
            for_each_run(&part.loops, part.src, part.dst, &mut |src, dst| {
                (0..part.run).for_each(|at| held[(dst + at) as usize] = op.extent.start + src + at);
            });
        }
        assert!(!held.contains(&u64::MAX), "dense");
        held
    }

    fn plan(rank: u32, ranks: u32, rules: &Rules, cooperate: Option<Cooperate>) -> Plan {
        plan_of(rules, World::member(Rank(rank), ranks, DeviceSpec::Host), ranks, cooperate)
    }

    fn plan_of(rules: &Rules, world: World, ranks: u32, cooperate: Option<Cooperate>) -> Plan {
        let tensors: &[(&str, Dtype, &[u64])] = &[
            ("whole", Dtype::U8, &[5000]),
            ("rows", Dtype::Bf16, &[48, 40]),
            ("columns", Dtype::F32, &[600, 96]),
            ("turned", Dtype::F16, &[48, 96]),
            ("pairs", Dtype::U8, &[24, 4000]),
            ("large", Dtype::U8, &[4, 1 << 20]),
            ("tail", Dtype::U8, &[7]),
            // What one rank reads for several, with something of its own between.
            ("x0", Dtype::U8, &[9000]),
            ("own1", Dtype::U8, &[4, 100]),
            ("x1", Dtype::U8, &[1000]),
            ("own2", Dtype::U8, &[4, 100]),
            ("x2", Dtype::U8, &[1000]),
            ("own3", Dtype::U8, &[4, 100]),
            ("x3", Dtype::U8, &[1000]),
            ("own4", Dtype::U8, &[4, 100]),
            ("x4", Dtype::U8, &[1000]),
            ("own5", Dtype::U8, &[4, 100]),
            ("x5", Dtype::U8, &[1000]),
            ("own6", Dtype::U8, &[4, 100]),
            ("x6", Dtype::U8, &[1000]),
        ];
        let world = match cooperate {
            Some(cooperate) => world.reading_together(vec![3; ranks as usize], cooperate),
            None => world,
        };
        Plan::new(&checkpoint(tensors, None), rules, &world).unwrap()
    }

    fn rules() -> Rules {
        let halves = Coord::Div(Box::new(Coord::Axis(Ax::Tp)), 2);
        Rules::new()
            .shard("{rows,own*}", 0)
            .shard("columns", 1)
            .shard("turned", 1)
            .transpose()
            .shard("pairs", ShardRule::dim(0).by(halves))
            .replicate("*")
    }

    #[test]
    fn every_byte_is_read_once_and_gets_to_everybody_who_wants_it() {
        for (ranks, chunk) in [(2, 4096), (4, 8192), (4, 1 << 21)] {
            let mut all: Vec<Landed> = vec![Landed::new(); ranks as usize];
            let plans: Vec<Plan> =
                (0..ranks).map(|rank| plan(rank, ranks, &rules(), Some(Cooperate::Always))).collect();
            let mut rounds: Vec<Vec<Round>> =
                plans.iter().map(|plan| Exchange::new(plan, chunk).unwrap().collect()).collect();
            let counts: Vec<usize> = rounds.iter().map(Vec::len).collect();
            assert!(counts.windows(2).all(|pair| pair[0] == pair[1]), "{counts:?}");
            assert_eq!(plans.iter().map(Plan::storage_bytes).sum::<u64>(), plans[0].checkpoint().bytes());
            let loads: Vec<u64> = plans.iter().map(Plan::storage_bytes).collect();
            assert!(
                loads.iter().all(|load| load * 10 < loads.iter().sum::<u64>() / u64::from(ranks) * 12),
                "{loads:?}"
            );

            for (plan, (rank, landed)) in plans.iter().zip((0..).map(Rank).zip(&mut all)) {
                // What it reads, by an engine that cuts other reads differently.
                let cutting = Cutting { chunk: 1 << 16, cut_chunk: 1000, alignment: 1, direct: true, exchanged: chunk };
                let reads = Reads::new(plan, cutting, |extent| extent.reader == rank);
                let mut own = rounds[rank.index()].iter().filter_map(|round| round.own.as_ref());
                let (mut cursor, mut pieces) = (Cursor::default(), Vec::new());
                while let Some((op, behind)) = reads.next(&cursor) {
                    cursor = behind;
                    pieces.clear();
                    reads.pieces(&op, &mut pieces);
                    land(&pieces, rank, landed, |src| op.extent.start + src);
                    if op.shared {
                        assert_eq!(
                            own.next().map(|own| own.extent),
                            Some(op.extent),
                            "the exchange has the same reads"
                        );
                        assert!(op.extent.end - op.extent.start <= Exchange::most(chunk));
                    }
                }
                assert!(own.next().is_none());
            }
            // One round of all ranks after the other.
            let mut traffic = vec![Traffic::default(); ranks as usize];
            for _ in 0..counts[0] {
                let round: Vec<Round> = rounds.iter_mut().map(|rounds| rounds.remove(0)).collect();
                for (rank, this) in (0..).map(Rank).zip(&round) {
                    let sent: u64 = this.sent.iter().map(|parcel| parcel.bytes).sum();
                    assert!(sent <= Exchange::most(chunk));
                    let counted = &mut traffic[rank.index()];
                    counted.packed_bytes += sent;
                    counted.sent_bytes += this.sent.iter().map(|it| it.bytes * it.to.len() as u64).sum::<u64>();
                    counted.received_bytes += this.received.iter().map(|received| received.bytes).sum::<u64>();
                    for received in &this.received {
                        let sender = &round[received.from.index()];
                        let parcel = sender.sent.iter().find(|parcel| parcel.to.contains(&rank)).unwrap();
                        assert_eq!(parcel.bytes, received.bytes);
                        let held = held(parcel, sender.own.as_ref().unwrap());
                        land(&received.pieces, rank, &mut all[rank.index()], |src| held[src as usize]);
                    }
                    let expected = this.sent.iter().flat_map(|parcel| &parcel.to).count();
                    let to_others = round.iter().flat_map(|other| &other.received).filter(|it| it.from == rank).count();
                    assert_eq!(to_others, expected);
                }
            }
            // As any of the plans says, and one that looks at all of them.
            let whole = plan_of(&rules(), World::host(ranks).per_rank(), ranks, Some(Cooperate::Always));
            assert!(plans.iter().chain([&whole]).all(|plan| plan.traffic_in(chunk) == traffic), "{traffic:?}");
            assert_eq!(whole.storage_bytes(), whole.checkpoint().bytes());
            // What each rank gets when it reads alone.
            for (rank, landed) in (0..).map(Rank).zip(&all) {
                let alone = plan(rank.0, ranks, &rules(), None);
                let mut expected = Landed::new();
                let (tensors, partition) = (alone.checkpoint().tensors(), alone.rank(rank));
                for (number, dest) in (0..).zip(&partition.dests) {
                    for copy in &partition.pieces[dest.pieces.start as usize..dest.pieces.end as usize] {
                        assert!(tensors[copy.tensor as usize].start <= copy.src);
                        for_each_run(&copy.loops, copy.src, copy.dst, &mut |src, dst| {
                            (0..copy.run)
                                .for_each(|at| assert!(expected.insert((number, dst + at), src + at).is_none()));
                        });
                    }
                }
                assert!(*landed == expected, "{ranks} ranks, chunks of {chunk}: {rank}");
            }
        }
    }

    #[test]
    fn ranks_read_alone_what_costs_no_more_or_is_little() {
        let sharded = Rules::new().shard("{rows,columns,turned}", 0).keeping("{rows,columns,turned}");
        assert!(Exchange::new(&plan(0, 4, &sharded, Some(Cooperate::Always)), 4096).is_none());
        // A few megabytes are not worth a communicator.
        assert!(Exchange::new(&plan(0, 4, &rules(), Some(Cooperate::Auto)), 4096).is_none());
        let alone = plan(0, 4, &rules(), None);
        assert!(Exchange::new(&alone, 4096).is_none());
        assert_eq!(alone.traffic(), [Traffic::default(); 4]);
    }

    /// Two stages of two ranks, the first of which begins with what both of its ranks want, and the last ends so; and what
    /// is wanted by all of them, if anything.
    fn stages(rank: u32, tied: bool) -> Plan {
        let large: (Dtype, &[u64]) = (Dtype::U8, &[4, 1 << 20]);
        let tensors = ["a", "b", "c", "d"].map(|name| (name, large.0, large.1));
        let tied = if tied { vec![("t", Dtype::U8, &[100][..])] } else { Vec::new() };
        let rules = "rule = [
            { match = 'a', stage = 'first', replicate = true },
            { match = 'b', stage = 'first', shard = { dim = 0 } },
            { match = 'c', stage = 'last', shard = { dim = 0 } },
            { match = 'd', stage = 'last', replicate = true },
            { match = 't', replicate = true, optional = true },
        ]";
        let world = World::member(Rank(rank), 4, DeviceSpec::Host).with_mesh(Mesh { pp: 2, ..Mesh::tp(2) });
        let world = world.reading_together(vec![0; 4], Cooperate::Always);
        let checkpoint = checkpoint(&[&tensors[..], &tied].concat(), None);
        Plan::new(&checkpoint, &Rules::from_toml(rules).unwrap(), &world).unwrap()
    }

    #[test]
    fn ranks_wait_for_nobody_who_reads_for_others() {
        for rank in 0..4 {
            assert_eq!(stages(rank, false).partners(Rank(2)), [2, 3].map(Rank));
            assert_eq!(stages(rank, true).partners(Rank(2)), [0, 1, 2, 3].map(Rank));
            let mut rounds = Exchange::new(&stages(rank, false), 1 << 16).unwrap();
            assert!(rounds.all(|round| round.own.is_some() && round.received.len() == 1), "two ranks, equal parts");
        }
        let rounds = |rank| Exchange::new(&stages(rank, true), 1 << 16).unwrap().collect::<Vec<_>>();
        let (first, last) = (rounds(0), rounds(2));
        assert_eq!(first.len(), last.len());
        // What the last stage reads second comes when the first has sent what it reads first, but for a chunk.
        let sends = |rounds: &[Round]| rounds.iter().map(|round| round.own.is_some()).collect::<Vec<_>>();
        let (first, last) = (sends(&first), sends(&last));
        let ends = first.iter().take_while(|sends| **sends).count();
        assert!((32..=33).contains(&ends), "2 MiB: {first:?}");
        assert!(last[..ends - 2].iter().all(|sends| !sends), "{last:?}");
        assert!(last[ends - 2..].iter().filter(|sends| **sends).count() >= 32, "{last:?}");
    }

    #[test]
    fn what_several_want_travels_once() {
        let plan = plan(1, 4, &Rules::new().replicate("*"), Some(Cooperate::Always));
        let rounds: Vec<Round> = Exchange::new(&plan, 1 << 20).unwrap().collect();
        for round in rounds.iter().filter(|round| round.own.is_some()) {
            let [parcel] = &round.sent[..] else { panic!("{round:?}") };
            assert_eq!(parcel.to[..], [Rank(0), Rank(2), Rank(3)]);
        }
    }
}
