//! The quantizers of llama.cpp for its types of one scale per 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! For the weights `x` of a block, with `x*` the first of the greatest magnitude:
//!
//! | type | scale `d` | code | weight |
//! |---|---|---|---|
//! | Q4_0, Q5_0 | `x* / -2^(b-1)` | `min(trunc(x / d + 2^(b-1) + 1/2), 2^b - 1)` | `d (code - 2^(b-1))` |
//! | Q4_1, Q5_1 | `(max - min) / (2^b - 1)` | `min(trunc((x - min) / d + 1/2), 2^b - 1)` | `d code + min` |
//! | Q8_0 | `abs(x*) / 127` | `round(x / d) + 128`, halves away from zero | `d (code - 128)` |
//!
//! Codes are chosen with the scale in f32 (multiplying with `1 / d`), which is then rounded to f16: the bytes are those
//! of `ggml_quantize_chunk` without an importance matrix (`ggml/src/ggml-quants.c` in llama.cpp), and no better.

use half::f16;
use ndarray::ArrayView2;
use quant_core::{
    Codes, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec, QuantizedMatrix, SpecError,
    codes,
};
use rayon::prelude::*;

use crate::affine;
use crate::quantizer::{LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::stats::{LayerStats, Needs};

/// Weights of a block.
const BLOCK: usize = 32;

/// One type.
#[derive(Clone, Copy, Debug)]
pub struct Ggml {
    name: &'static str,
    description: &'static str,
    bits: u8,
    /// Codes of a block, its scale and its shift.
    encode: fn(&[f32], &mut [u8]) -> (f32, f32),
    shift: bool,
}

/// The types, with the names that llama.cpp gives them.
pub const TYPES: [Ggml; 5] = [
    Ggml {
        name: "q4_0",
        description: "GGUF Q4_0 as llama.cpp rounds: 4 bits and a scale for 32 weights",
        bits: 4,
        encode: from_extreme::<8>,
        shift: false,
    },
    Ggml {
        name: "q4_1",
        description: "GGUF Q4_1 as llama.cpp rounds: 4 bits, a scale and a minimum for 32 weights",
        bits: 4,
        encode: from_range::<15>,
        shift: true,
    },
    Ggml {
        name: "q5_0",
        description: "GGUF Q5_0 as llama.cpp rounds: 5 bits and a scale for 32 weights",
        bits: 5,
        encode: from_extreme::<16>,
        shift: false,
    },
    Ggml {
        name: "q5_1",
        description: "GGUF Q5_1 as llama.cpp rounds: 5 bits, a scale and a minimum for 32 weights",
        bits: 5,
        encode: from_range::<31>,
        shift: true,
    },
    Ggml {
        name: "q8_0",
        description: "GGUF Q8_0 as llama.cpp rounds: 8 bits and a scale for 32 weights",
        bits: 8,
        encode: from_magnitude,
        shift: false,
    },
];

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// `HALF` is the code of zero; the weight of the greatest magnitude gets code 0.
fn from_extreme<const HALF: u8>(x: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let (mut greatest, mut extreme) = (0.0, 0.0);
    for &x in x {
        if x.abs() > greatest {
            (greatest, extreme) = (x.abs(), x);
        }
    }
    let d = extreme / -f32::from(HALF);
    let (id, middle) = (inverse(d), f32::from(HALF) + 0.5);
    // Not below 1/2, so that the cast rounds down.
    codes.iter_mut().zip(x).for_each(|(code, &x)| *code = ((x * id + middle) as u8).min(2 * HALF - 1));
    (d, 0.0)
}

/// `MAX` is the code of the greatest weight, 0 that of the least.
fn from_range<const MAX: u8>(x: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let least = x.iter().copied().fold(f32::MAX, f32::min);
    let greatest = x.iter().copied().fold(-f32::MAX, f32::max);
    let d = (greatest - least) / f32::from(MAX);
    let id = inverse(d);
    codes.iter_mut().zip(x).for_each(|(code, &x)| *code = (((x - least) * id + 0.5) as u8).min(MAX));
    (d, least)
}

fn from_magnitude(x: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let d = x.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs())) / 127.0;
    let id = inverse(d);
    codes.iter_mut().zip(x).for_each(|(code, &x)| *code = ((x * id).round() + 128.0) as u8);
    (d, 0.0)
}

impl Ggml {
    fn encode(&self, layer: usize, w: ArrayView2<'_, f32>) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let invalid = |source| QuantizeError::Matrix { layer, source };
        let mut packed = Codes::zeros(self.bits, rows, cols).map_err(invalid)?;
        let bits = self.bits;
        let encoded =
            packed.row_chunks_mut(1).enumerate().collect::<Vec<_>>().into_par_iter().map(|(r, packed)| {
                let row = w.row(r);
                let row = row.to_slice().expect("rows are contiguous");
                let mut values = vec![0; cols];
                let blocks = row.chunks(BLOCK).zip(values.chunks_mut(BLOCK)).enumerate();
                let sides = blocks.map(|(b, (x, values))| {
                    let (d, m) = (self.encode)(x, values);
                    self.half(layer, r, b, x, d).and_then(|d| Ok((d, self.half(layer, r, b, x, m)?)))
                });
                let sides = sides.collect::<Result<Vec<_>, _>>()?;
                codes::pack(bits, &values, packed);
                Ok(sides)
            });
        let sides = encoded.collect::<Result<Vec<_>, QuantizeError>>()?.concat();
        let scales = Params::F16(sides.iter().map(|side| side.0).collect());
        let groups = Groups::Row { len: BLOCK };
        if self.shift {
            let param = Params::F16(sides.iter().map(|side| side.1).collect());
            return Ok(QuantizedMatrix::affine(
                packed,
                groups,
                scales,
                Offset::Shift { param, sign: 1.0 },
                0,
            ));
        }
        Ok(QuantizedMatrix::affine(packed, groups, scales, Offset::None, 1 << (bits - 1)))
    }

    /// A parameter as it is stored, unless it is beyond f16.
    fn half(
        &self,
        layer: usize,
        row: usize,
        block: usize,
        x: &[f32],
        scale: f32,
    ) -> Result<f16, QuantizeError> {
        let stored = f16::from_f32(scale);
        if stored.is_finite() {
            return Ok(stored);
        }
        let greatest = x.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
        let (index, &value) = greatest.unwrap_or((0, &scale));
        Err(QuantizeError::ScaleOverflow { layer, row, col: block * BLOCK + index, value, scale })
    }
}

impl Quantizer for Ggml {
    fn name(&self) -> &'static str {
        self.name
    }

    fn description(&self) -> &'static str {
        self.description
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn default_spec(&self) -> QuantSpec {
        QuantSpec {
            bits: self.bits,
            grid: GridKind::Int,
            group: GroupSize::Columns(BLOCK),
            scales: ParamsKind::F16,
            symmetric: !self.shift,
            act_order: false,
        }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        spec.validate()?;
        let own = self.default_spec();
        if *spec == own {
            return Ok(());
        }
        let found = format!("{} bits in groups of {}, symmetric: {}", spec.bits, spec.group, spec.symmetric);
        let allowed = "the type's own: its bits, groups of 32, symmetric for _0 and asymmetric for _1";
        Err(SpecError::Option { option: "type", found, allowed })
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], _: &QuantSpec) -> usize {
        // Weights, packed codes, and both parameters of each block twice while they are put together.
        let of = |&(rows, cols): &(usize, usize)| {
            rows * (4 * cols + (cols * usize::from(self.bits)).div_ceil(8) + 8 * cols.div_ceil(BLOCK))
        };
        shapes.iter().map(of).sum()
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        affine::each_layer(self, layers, |layer, w, _| self.encode(layer, w))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ty(name: &str) -> Ggml {
        TYPES.into_iter().find(|ty| ty.name == name).unwrap()
    }

    /// The published vector of the numbers `(i - 15.5) / 8`.
    #[test]
    fn codes_of_a_known_block() {
        let x: Vec<f32> = (0..32).map(|i| (i as f32 - 15.5) / 8.0).collect();
        let w = ArrayView2::from_shape((1, 32), &x).unwrap();
        let q4_0 = ty("q4_0").encode(0, w).unwrap();
        assert_eq!(q4_0.scales, Params::F16(vec![f16::from_bits(0x33c0)]));
        assert_eq!((q4_0.codes.get(0, 0), q4_0.codes.get(0, 16), q4_0.codes.get(0, 31)), (0, 8, 15));
        let q5_0 = ty("q5_0").encode(0, w).unwrap();
        assert_eq!(q5_0.scales, Params::F16(vec![f16::from_bits(0x2fc0)]));
        assert_eq!((q5_0.codes.get(0, 1), q5_0.codes.get(0, 31)), (1, 31));
        let q4_1 = ty("q4_1").encode(0, w).unwrap();
        assert_eq!(q4_1.scales, Params::F16(vec![f16::from_bits(0x3422)]));
        let shift = Offset::Shift { param: Params::F16(vec![f16::from_bits(0xbfc0)]), sign: 1.0 };
        assert_eq!(q4_1.offset, shift);
        let q8_0 = ty("q8_0").encode(0, w).unwrap();
        assert_eq!(q8_0.scales, Params::F16(vec![f16::from_bits(0x23d0)]));
        assert_eq!((q8_0.codes.get(0, 0), q8_0.codes.get(0, 31)), (1, 255));
    }

    #[test]
    fn zeros_and_extremes() {
        for ty in TYPES {
            let zeros = ty.encode(0, ArrayView2::from_shape((1, 32), &[0.0; 32]).unwrap()).unwrap();
            assert!(zeros.dequantize().iter().all(|&w| w == 0.0), "{}", ty.name);
            let huge = ty.encode(3, ArrayView2::from_shape((1, 32), &[1e30; 32]).unwrap());
            assert!(
                matches!(huge, Err(QuantizeError::ScaleOverflow { layer: 3, row: 0, .. })),
                "{}",
                ty.name
            );
        }
    }

    proptest! {
        /// Each weight is near its point: half a step, and what rounding the parameters to f16 moves it by (its
        /// relative 2^-11 of at most 2^b steps, and of the shift). The type without a shift cuts its greatest code:
        /// a weight opposite to the extreme is off by one step at most.
        #[test]
        fn errors_are_bounded(values in prop::collection::vec(-8.0f32..8.0, 64), i in 0..TYPES.len()) {
            let ty = TYPES[i];
            let w = ArrayView2::from_shape((2, 32), &values).unwrap();
            let matrix = ty.encode(0, w).unwrap();
            for (r, (row, exact)) in matrix.dequantize().rows().into_iter().zip(w.rows()).enumerate() {
                let d = matrix.scales.get(r).abs();
                let span = d * f32::from(matrix.codes.max());
                let bound = if ty.shift || ty.bits == 8 { 0.5 * d } else { d };
                let bound = bound * 1.001 + (span + 8.0) / 1024.0;
                for (w, x) in row.iter().zip(exact) {
                    prop_assert!((w - x).abs() <= bound, "{} {w} for {x}, step {d}", ty.name);
                }
            }
        }
    }
}
