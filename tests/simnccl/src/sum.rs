//! Reductions, in the order of the ranks. For tests of NCCL's callers, not for speed.

use crate::abi::{INVALID_ARGUMENT, Result};
use crate::sim::fail;

/// One result of what all ranks give, element by element.
pub(crate) fn reduce(parts: Vec<Vec<u8>>, data_type: i32, reduction: i32) -> Result<Vec<u8>> {
    macro_rules! by {
        ($($code:literal => $type:ty),*) => {
            match data_type {
                $($code => Ok(elements(parts, |a: [u8; size_of::<$type>()], b| {
                    let (a, b) = (<$type>::from_le_bytes(a), <$type>::from_le_bytes(b));
                    match reduction {
                        0 => a + b,
                        1 => a * b,
                        2 => if b > a { b } else { a },
                        _ => if b < a { b } else { a },
                    }
                    .to_le_bytes()
                })),)*
                _ => Err(fail(INVALID_ARGUMENT, "the twin does not reduce this type")),
            }
        };
    }
    if !(0..4).contains(&reduction) {
        return Err(fail(INVALID_ARGUMENT, "the twin does not have this reduction"));
    }
    by!(2 => i32, 3 => u32, 4 => i64, 5 => u64, 7 => f32, 8 => f64)
}

fn elements<const N: usize>(parts: Vec<Vec<u8>>, both: impl Fn([u8; N], [u8; N]) -> [u8; N]) -> Vec<u8> {
    let mut parts = parts.into_iter();
    let mut result = parts.next().unwrap_or_default();
    for part in parts {
        for (a, b) in result.chunks_exact_mut(N).zip(part.chunks_exact(N)) {
            let sum = both((&*a).try_into().expect("N bytes"), b.try_into().expect("N bytes"));
            a.copy_from_slice(&sum);
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_reduced_one_by_one() {
        let parts = |values: [[f32; 2]; 3]| values.map(|row| row.map(f32::to_le_bytes).concat()).to_vec();
        let all = parts([[1.0, -2.0], [3.0, 4.0], [5.0, 0.5]]);
        let result = |reduction| {
            let bytes = reduce(all.clone(), 7, reduction).unwrap();
            bytes.chunks(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect::<Vec<_>>()
        };
        assert_eq!([result(0), result(1), result(2), result(3)], [[9.0, 2.5], [15.0, -4.0], [5.0, 4.0], [1.0, -2.0]]);
        assert_eq!(reduce(all.clone(), 6, 0), Err(INVALID_ARGUMENT));
        assert_eq!(reduce(all, 7, 9), Err(INVALID_ARGUMENT));
    }
}
