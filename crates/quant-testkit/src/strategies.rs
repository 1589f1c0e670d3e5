//! Strategies for property tests.

use half::f16;
use proptest::prelude::*;
use quant_core::{Codes, Groups, Offset, Params, Permutation, QuantizedMatrix};

/// Sizes of a random matrix.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Outputs.
    pub rows: std::ops::Range<usize>,
    /// Inputs, in units of `cols_step`.
    pub cols: std::ops::Range<usize>,
    /// Number of inputs is a multiple of this.
    pub cols_step: usize,
    /// Bits to choose from.
    pub bits: &'static [u8],
}

/// Integer codes with f16 scales and integer zero points per row group, in natural or act-order: what GPTQ and
/// its relatives store. The last group of a row may be short.
pub fn grouped_matrix(sizes: Sizes) -> impl Strategy<Value = QuantizedMatrix> {
    let step = sizes.cols_step;
    let dims = (sizes.rows, sizes.cols, prop::sample::select(sizes.bits), 1usize..6);
    dims.prop_flat_map(move |(rows, cols, bits, units)| {
        let cols = cols * step;
        let groups = Groups::Row { len: (units * step).min(cols.max(1)) };
        let n = groups.count(rows, cols);
        let max = ((1u16 << bits) - 1) as u8;
        let zeros = prop_oneof![Just(vec![1u8 << (bits - 1); n]), prop::collection::vec(0..=max, n),];
        let codes = prop::collection::vec(0..=max, rows * cols);
        let scales = prop::collection::vec(2e-3f32..0.5, n);
        let perm = prop::option::of(Just((0..cols as u32).collect::<Vec<_>>()).prop_shuffle());
        (codes, scales, zeros, perm).prop_map(move |(codes, scales, zeros, perm)| {
            let codes = Codes::from_values(bits, rows, cols, &codes).expect("codes fit their bits");
            let scales = Params::F16(scales.into_iter().map(f16::from_f32).collect());
            let offset = Offset::Zero(Params::U8(zeros));
            let mut matrix = QuantizedMatrix::affine(codes, groups.clone(), scales, offset, 0);
            matrix.input_perm = perm.map(|p| Permutation::new(p).expect("a shuffle is a permutation"));
            matrix
        })
    })
}

/// Floats of every magnitude, with zeros, subnormal numbers and the largest ones, but neither NaN nor infinity.
pub fn finite_f32() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -10.0f32..10.0,
        1 => prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO,
        1 => Just(f32::MAX),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn generated_matrices_are_valid(
            q in grouped_matrix(Sizes { rows: 0..5, cols: 0..5, cols_step: 8, bits: &[2, 3, 4, 8] }),
            x in finite_f32(),
        ) {
            prop_assert!(q.validate().is_ok());
            prop_assert!(q.cols() % 8 == 0);
            prop_assert!(x.is_finite());
        }
    }
}
