//! Which layers each pipeline stage has (sharding.md section 6).

use std::fmt;
use std::ops::Range;

use super::world::divisor_of;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::RANKS_MAX;

/// How layers are divided over pipeline stages; engines differ where they do not divide evenly.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum StageSplit {
    /// The same number for each stage, else it is an error.
    #[default]
    Even,
    /// As vLLM: of the remaining layers one each to the last stage but one, the one before it, and so on.
    Vllm,
    /// As Hugging Face transformers: the last stage gets the remainder.
    Hf,
    /// As TensorRT-LLM: of the remaining layers one each to the first stages.
    Trt,
    /// So many layers for each stage.
    Counts(Vec<u64>),
}

impl StageSplit {
    /// The split of this name: `even`, `vllm`, `hf` or `trt`.
    pub fn named(name: &str) -> Option<StageSplit> {
        let named = [StageSplit::Even, StageSplit::Vllm, StageSplit::Hf, StageSplit::Trt];
        named.into_iter().find(|split| split.to_string() == name)
    }

    /// Parses [`StageSplit::Counts`]: a number of layers for each stage, between blanks, line ends or commas.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`] for anything else.
    pub fn from_counts(text: &str) -> Result<StageSplit> {
        let words = text.split(|char: char| char.is_whitespace() || char == ',').filter(|word| !word.is_empty());
        let counts = words.map(|word| {
            word.parse().map_err(|_| {
                broken("not a number of layers").with_expected("one number for each stage", format!("`{word}`"))
            })
        });
        Ok(StageSplit::Counts(counts.collect::<Result<_>>()?))
    }

    /// The layers of each of `pp` stages. Only counts of the caller's can leave a stage without any.
    ///
    /// # Errors
    /// [`ErrorKind::Rules`] if layers do not divide evenly where they must, counts are not those of so many stages and
    /// layers, or there are more stages than layers.
    pub fn stages(&self, layers: u64, pp: u32) -> Result<Vec<Range<u64>>> {
        let n = u64::from(pp);
        if let StageSplit::Counts(counts) = self {
            if counts.len() as u64 != n {
                return Err(
                    broken("layers are not counted for each stage").with_expected(format!("{n} numbers"), counts.len())
                );
            }
            let sum = counts.iter().try_fold(0u64, |sum, &count| sum.checked_add(count));
            if sum != Some(layers) {
                let found = sum.map_or_else(|| "more".to_owned(), |sum| sum.to_string());
                return Err(broken("layers of the stages are not those of the model").with_expected(layers, found));
            }
            return Ok(ranges(counts.iter().copied()));
        }
        let most = layers.min(RANKS_MAX.into());
        if !(1..=most).contains(&n) {
            return Err(broken("number of stages out of range").with_expected(format!("1 to {most}"), n));
        }
        let (each, rest) = (layers / n, layers % n);
        if *self == StageSplit::Even && rest > 0 {
            return Err(broken("layers do not divide evenly over the stages")
                .with_expected(divisor_of(layers, "layers"), format!("{n} stages")));
        }
        let more = |stage: u64| match self {
            StageSplit::Vllm => u64::from((n - 1 - rest..n - 1).contains(&stage)),
            StageSplit::Hf if stage == n - 1 => rest,
            StageSplit::Trt => u64::from(stage < rest),
            StageSplit::Even | StageSplit::Hf | StageSplit::Counts(_) => 0,
        };
        Ok(ranges((0..n).map(|stage| each + more(stage))))
    }
}

/// Ranges of these lengths, each after the one before.
fn ranges(lens: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut end = 0;
    lens.map(|len| {
        end += len;
        end - len..end
    })
    .collect()
}

impl fmt::Display for StageSplit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StageSplit::Even => f.write_str("even"),
            StageSplit::Vllm => f.write_str("vllm"),
            StageSplit::Hf => f.write_str("hf"),
            StageSplit::Trt => f.write_str("trt"),
            StageSplit::Counts(counts) => {
                let counts: Vec<String> = counts.iter().map(u64::to_string).collect();
                f.write_str(&counts.join(","))
            }
        }
    }
}

fn broken(message: &str) -> Error {
    Error::new(ErrorKind::Rules, message).with_rule("stages")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(how: &StageSplit, layers: u64, pp: u32) -> Vec<u64> {
        let stages = how.stages(layers, pp).unwrap();
        assert_eq!((stages[0].start, stages[stages.len() - 1].end), (0, layers));
        assert!(stages.windows(2).all(|pair| pair[0].end == pair[1].start));
        stages.into_iter().map(|stage| stage.end - stage.start).collect()
    }

    /// The table of sharding.md section 6.
    #[test]
    fn uneven_stages_are_those_of_the_engines() {
        use StageSplit::{Hf, Trt, Vllm};
        for (how, of_80, of_61, on_8) in [
            (Vllm, [27, 27, 26], [15, 15, 16, 15], [7, 7, 8, 8, 8, 8, 8, 7]),
            (Hf, [26, 26, 28], [15, 15, 15, 16], [7, 7, 7, 7, 7, 7, 7, 12]),
            (Trt, [27, 27, 26], [16, 15, 15, 15], [8, 8, 8, 8, 8, 7, 7, 7]),
        ] {
            assert_eq!(lens(&how, 80, 3), of_80);
            assert_eq!(lens(&how, 61, 4), of_61);
            assert_eq!(lens(&how, 61, 8), on_8);
        }
    }

    #[test]
    fn every_split_is_even_where_layers_divide() {
        for how in [StageSplit::Even, StageSplit::Vllm, StageSplit::Hf, StageSplit::Trt] {
            assert_eq!(lens(&how, 80, 4), [20; 4]);
            assert_eq!(lens(&how, 3, 3), [1; 3]);
            assert_eq!(lens(&how, 61, 1), [61]);
            for pp in [0, 4, u32::MAX] {
                let error = how.stages(3, pp).unwrap_err();
                assert_eq!((error.rule(), error.expected()), (Some("stages"), Some("1 to 3")));
            }
            assert_eq!(StageSplit::named(&how.to_string()), Some(how));
        }
        let error = StageSplit::Even.stages(61, 4).unwrap_err();
        assert_eq!((error.expected(), error.found()), (Some("a divisor of 61 layers: 1, 61"), Some("4 stages")));
    }

    #[test]
    fn stages_may_be_counted() {
        let counts = StageSplit::from_counts("16, 0\n15 30\n").unwrap();
        assert_eq!((counts.to_string().as_str(), lens(&counts, 61, 4)), ("16,0,15,30", vec![16, 0, 15, 30]));
        let refused = |layers, pp| counts.stages(layers, pp).unwrap_err();
        assert_eq!((refused(61, 3).expected(), refused(61, 3).found()), (Some("3 numbers"), Some("4")));
        assert_eq!((refused(60, 4).expected(), refused(60, 4).found()), (Some("60"), Some("61")));
        assert!(StageSplit::Counts(vec![u64::MAX, 1]).stages(0, 2).is_err());
        for wrong in ["16, x", "-1", "1.5"] {
            assert_eq!(StageSplit::from_counts(wrong).unwrap_err().rule(), Some("stages"));
        }
    }
}
