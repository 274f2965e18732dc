//! What the pieces of a destination in `plan --json` say, worked out from the contract alone: nothing of the library.

use serde_json::Value;

/// Some bytes of a tensor, from the first to behind the last.
pub(crate) type Range = (String, u64, u64);

/// More runs than any case has: a table that is wrong must not fill the memory.
const RUNS_MAX: u64 = 1 << 21;

/// A piece whose source counts from the tensor's first byte.
pub(crate) struct Piece {
    tensor: String,
    src: u64,
    dst: u64,
    /// Count, stride of the source, stride of the destination.
    loops: Vec<[u64; 3]>,
    run: u64,
}

impl Piece {
    /// `start` is where the named tensor begins in the named file.
    pub(crate) fn parse(piece: &Value, start: impl Fn(&str, &str) -> u64) -> Piece {
        let text = |key: &str| piece[key].as_str().unwrap_or_else(|| panic!("no {key}: {piece}"));
        let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("no number: {piece}"));
        let loops = piece["loops"].as_array().expect("a list").iter();
        let tensor = text("tensor").to_owned();
        Piece {
            src: number(&piece["file_offset"]) - start(text("file"), &tensor),
            dst: number(&piece["dst_offset"]),
            loops: loops.map(|each| [0, 1, 2].map(|at| number(&each[at]))).collect(),
            run: number(&piece["run"]),
            tensor,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.loops.iter().map(|&[count, ..]| count).product::<u64>() * self.run
    }

    /// The byte behind the last that it reads, or writes: the stride is number `at` of a loop.
    fn end(&self, start: u64, at: usize) -> u64 {
        start + self.loops.iter().map(|each| (each[0] - 1) * each[at]).sum::<u64>() + self.run
    }

    pub(crate) fn source_end(&self) -> (&str, u64) {
        (&self.tensor, self.end(self.src, 1))
    }

    pub(crate) fn destination_end(&self) -> u64 {
        self.end(self.dst, 2)
    }

    /// Where it takes this byte of the destination from, if it writes it.
    fn source_of(&self, byte: u64) -> Option<(&str, u64)> {
        let mut loops = self.loops.clone();
        loops.sort_by_key(|&[.., stride]| std::cmp::Reverse(stride));
        let (mut left, mut src) = (byte.checked_sub(self.dst)?, self.src);
        for [count, src_stride, dst_stride] in loops {
            let index = left / dst_stride;
            if index >= count {
                return None;
            }
            (left, src) = (left - index * dst_stride, src + index * src_stride);
        }
        (left < self.run).then_some((&self.tensor, src + left))
    }

    /// The same with its loops in the order of the source, and those that continue each other as one.
    fn unpermuted(&self) -> Piece {
        let mut loops = self.loops.clone();
        loops.sort_by_key(|&[_, stride, _]| std::cmp::Reverse(stride));
        let mut run = self.run;
        while let Some(&[count, stride, _]) = loops.last()
            && stride == run
        {
            run *= count;
            loops.pop();
        }
        Piece { tensor: self.tensor.clone(), src: self.src, dst: self.dst, loops, run }
    }

    /// The destination and source of each run.
    fn runs(&self) -> Vec<(u64, u64)> {
        let count: u64 = self.loops.iter().map(|&[count, ..]| count).product();
        assert!(count <= RUNS_MAX, "{}: {count} runs", self.tensor);
        let mut runs = vec![(self.dst, self.src)];
        for &[count, src, dst] in &self.loops {
            runs = runs
                .iter()
                .flat_map(|&(to, from)| (0..count).map(move |at| (to + at * dst, from + at * src)))
                .collect();
        }
        runs
    }
}

/// What is read, in the order of the tensors and their bytes: nothing says where it lands.
pub(crate) fn file_side(pieces: &[Piece]) -> Vec<Range> {
    let ranges = pieces.iter().map(Piece::unpermuted).flat_map(|piece| {
        let range = |(_, src)| (piece.tensor.clone(), src, src + piece.run);
        piece.runs().into_iter().map(range).collect::<Vec<_>>()
    });
    let mut ranges: Vec<Range> = ranges.collect();
    ranges.sort();
    joined(ranges)
}

/// Ranges as one where the next continues the last.
pub(crate) fn joined(ranges: Vec<Range>) -> Vec<Range> {
    join(ranges.into_iter().map(|range| (0, range)), |_, _| true)
}

/// What is read, in the order of the destination: one range where both sides continue.
pub(crate) fn landing(pieces: &[Piece]) -> Vec<Range> {
    let runs = pieces.iter().flat_map(|piece| {
        let placed = |(dst, src)| (dst, (piece.tensor.clone(), src, src + piece.run));
        piece.runs().into_iter().map(placed).collect::<Vec<_>>()
    });
    let mut runs: Vec<(u64, Range)> = runs.collect();
    runs.sort_by_key(|&(dst, _)| dst);
    for pair in runs.windows(2) {
        let [(dst, (tensor, from, to)), (next, _)] = pair else { unreachable!("windows of two") };
        assert!(dst + (to - from) <= *next, "{tensor}: byte {next} of the destination is written twice");
    }
    join(runs, |end, start| end == start)
}

/// Ranges as one where the next continues the last, and `continues` says so of their destinations, too.
fn join(runs: impl IntoIterator<Item = (u64, Range)>, continues: impl Fn(u64, u64) -> bool) -> Vec<Range> {
    let mut joined: Vec<Range> = Vec::new();
    let mut end = 0;
    for (dst, (tensor, from, to)) in runs {
        match joined.last_mut() {
            Some((last, _, at)) if *last == tensor && *at == from && continues(end, dst) => *at = to,
            _ => joined.push((tensor, from, to)),
        }
        end = dst + (to - from);
    }
    joined
}

/// Where this byte of the destination comes from; `None` if nothing writes it.
pub(crate) fn source_of(pieces: &[Piece], byte: u64) -> Option<(&str, u64)> {
    pieces.iter().find_map(|piece| piece.source_of(byte))
}
