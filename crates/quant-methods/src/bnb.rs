//! bitsandbytes: NF4 and FP4 in blocks, with plain or nested scales, and LLM.int8. No calibration data.
//!
//! | method | scale | code | weight |
//! |---|---|---|---|
//! | `nf4`, `fp4` | `a = max abs(w)` of a block of the flattened matrix | nearest entry of the table to `w / a` | `table[code] a` |
//! | `llm-int8` | `a = max abs(w)` of a row, of the weights in f16 | `rne(127 w / a)` | `code a / 127` |
//!
//! NF4's sixteen values are quantiles of the normal distribution (Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA",
//! 2023). Nested scales: `a - mean(a)` in blocks of 256, each divided by its largest magnitude and put on a table of 256
//! values. LLM.int8 keeps features of the input that hold a value of at least a threshold out of the integer product when
//! a model runs (Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8()", 2022).
//!
//! Codes and scales are those of the library on a CPU.

use half::f16;
use ndarray::ArrayView2;
use quant_core::{
    ActGrid, ActGroup, ActSpec, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec,
    QuantizedMatrix, SpecError,
};
use quant_math::affine::code_bits;
use quant_math::{Codebook, Grouped};
use std::sync::Arc;

use crate::affine;
use crate::quantizer::{LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::stats::{LayerStats, Needs};

/// Scales that share a second-level scale.
const NESTED_BLOCK: usize = 256;

/// Largest code of 8 bits.
const INT8_MAX: f32 = 127.0;

/// A 4-bit table in blocks.
#[derive(Clone, Copy, Debug)]
pub struct Bnb4 {
    grid: GridKind,
    options: Bnb4Options,
}

/// Options of NF4 and FP4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bnb4Options {
    /// Nested scales (`bnb_4bit_use_double_quant`): 4.13 bits per weight instead of 4.5 in blocks of 64.
    pub double_quant: bool,
}

impl Bnb4 {
    /// NF4.
    pub fn nf4(options: Bnb4Options) -> Self {
        Self { grid: GridKind::Nf4, options }
    }

    /// FP4.
    pub fn fp4(options: Bnb4Options) -> Self {
        Self { grid: GridKind::Fp4, options }
    }

    fn encode(
        &self,
        layer: usize,
        w: ArrayView2<'_, f32>,
        spec: &QuantSpec,
    ) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let flat = w.to_slice().expect("rows are contiguous");
        let len = match spec.group {
            GroupSize::Flat(len) | GroupSize::Columns(len) => len,
            _ => cols.max(1),
        };
        let absmax = Grouped::runs(flat, flat.len().max(1), len).map(|_, w| largest(w));
        let table = self.grid.table().unwrap_or_default();
        let book = Codebook::new(&table);
        let codes = affine::pack_rows(4, rows, cols, |r, codes| {
            let mut start = 0;
            while start < cols {
                let at = r * cols + start;
                let block = at / len;
                let end = (start + len - at % len).min(cols);
                let absmax = absmax[block];
                let weights = flat[at..at + end - start].iter().zip(&mut codes[start..end]);
                let inverse = 1.0 / absmax.max(1e-38);
                if block * len + len <= flat.len() {
                    weights.for_each(|(&w, code)| *code = book.code((w * inverse).clamp(-1.0, 1.0)));
                } else {
                    // The library divides in a last block that is short.
                    let absmax = absmax.max(1e-38);
                    weights.for_each(|(&w, code)| *code = book.code((w / absmax).clamp(-1.0, 1.0)));
                }
                start = end;
            }
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;
        let scales = if self.options.double_quant { nested(&absmax) } else { Params::F32(absmax) };
        let mut matrix = QuantizedMatrix::affine(codes, Groups::Flat { len }, scales, Offset::None, 0);
        matrix.grid = Grid::Table(table);
        Ok(matrix)
    }
}

fn largest(w: &[f32]) -> f32 {
    w.iter().fold(0.0, |largest, w| largest.max(w.abs()))
}

/// Scales on the library's table of 256 values, in blocks of 256.
fn nested(absmax: &[f32]) -> Params {
    let offset = mean(absmax);
    let table: Arc<[f32]> = dynamic_table().into();
    let book = Codebook::new(&table);
    let mut codes = Vec::with_capacity(absmax.len());
    let mut outer = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
    for block in absmax.chunks(NESTED_BLOCK) {
        let above: Vec<f32> = block.iter().map(|a| a - offset).collect();
        let largest = largest(&above);
        let inverse = 1.0 / largest.max(1e-38);
        codes.extend(above.iter().map(|a| {
            let x = (a * inverse).clamp(-1.0, 1.0);
            // The library looks values up on a grid of 16 bits.
            let point = ((x + 1.0) * 32767.5).round_ties_even();
            book.code(point / 32767.5 - 1.0)
        }));
        outer.push(largest);
    }
    Params::Nested { codes, table, absmax: outer, block: NESTED_BLOCK, offset }
}

/// The mean in f32, summed as the library sums: 32 lanes, partial sums of 16 rows of them, and sums of those, so that
/// errors do not grow with the length.
fn mean(values: &[f32]) -> f32 {
    const LANES: usize = 32;
    const LEVELS: usize = 4;
    let (rows, rest) = values.as_chunks::<LANES>();
    let power = (rows.len().next_power_of_two().ilog2() as usize / LEVELS).max(4);
    let step = 1usize << power;
    let mut levels = [[0.0f32; LANES]; LEVELS];
    let add = |sum: &mut [f32; LANES], row: &[f32]| sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    let (blocks, last) = rows.split_at(rows.len() / step * step);
    for (i, block) in blocks.chunks_exact(step).enumerate() {
        block.iter().for_each(|row| add(&mut levels[0], row));
        for level in 1..LEVELS {
            let below = std::mem::replace(&mut levels[level - 1], [0.0; LANES]);
            add(&mut levels[level], &below);
            // A level passes its sum on when it holds as many.
            if !(i + 1).is_multiple_of(1 << (power * level)) {
                break;
            }
        }
    }
    let [mut lanes, above @ ..] = levels;
    last.iter().for_each(|row| add(&mut lanes, row));
    above.iter().for_each(|sum| add(&mut lanes, sum));
    let (eights, single) = rest.as_chunks::<8>();
    eights.iter().for_each(|eight| add(&mut lanes, eight));
    let mut sum: f32 = single.iter().fold(0.0, |sum, v| sum + v);
    (0..8).for_each(|i| sum += ((lanes[i] + lanes[i + 8]) + lanes[i + 16]) + lanes[i + 24]);
    sum / values.len().max(1) as f32
}

/// The 256 values of nested scales, whose spacing grows with their size.
fn dynamic_table() -> Vec<f32> {
    let positive = DYNAMIC.map(f32::from_bits);
    let negative = positive.iter().rev().map(|v| -v);
    negative.chain([0.0]).chain(positive).chain([1.0]).collect()
}

impl Quantizer for Bnb4 {
    fn name(&self) -> &'static str {
        if self.grid == GridKind::Nf4 { "nf4" } else { "fp4" }
    }

    fn description(&self) -> &'static str {
        match self.grid {
            GridKind::Nf4 => "4-bit normal float of bitsandbytes and QLoRA; no calibration",
            _ => "4-bit float of bitsandbytes; no calibration",
        }
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn layouts(&self) -> &'static [&'static str] {
        if self.grid == GridKind::Nf4 { &["bnb_nf4"] } else { &["bnb_fp4"] }
    }

    fn default_spec(&self) -> QuantSpec {
        let scales = if self.options.double_quant { ParamsKind::Nested } else { ParamsKind::F32 };
        let group = GroupSize::Flat(64);
        QuantSpec { bits: 4, grid: self.grid, group, scales, symmetric: true, act_order: false }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        spec.validate()?;
        let group = spec.group;
        if !matches!(group, GroupSize::Flat(_)) {
            let allowed = "give a number of weights: blocks of the flattened matrix";
            return Err(SpecError::Group { found: group.as_config(), allowed });
        }
        own(spec, QuantSpec { group, ..self.default_spec() }, "4 bits, symmetric")
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        let of = |&(rows, cols): &(usize, usize)| {
            let blocks = spec.group.groups(rows, cols).count(rows, cols);
            4 * rows * cols + rows * cols.div_ceil(2) + 12 * blocks
        };
        shapes.iter().map(of).sum()
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        affine::each_layer(self, layers, |layer, w, spec| self.encode(layer, w, spec))
    }
}

/// Fails unless `spec` is the one that a method has.
fn own(spec: &QuantSpec, own: QuantSpec, allowed: &'static str) -> Result<(), SpecError> {
    if *spec == own {
        return Ok(());
    }
    let found = format!(
        "{} bits of {} in groups of {}, symmetric: {}",
        spec.bits, spec.grid, spec.group, spec.symmetric
    );
    Err(SpecError::Option { option: "type", found, allowed })
}

/// LLM.int8: eight bits per row, activations rounded at run time, outlying features apart.
#[derive(Clone, Copy, Debug, Default)]
pub struct LlmInt8 {
    options: LlmInt8Options,
}

/// Options of LLM.int8.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LlmInt8Options {
    /// Features of an input with a value of at least this magnitude stay float (`llm_int8_threshold`); 0: none does.
    pub threshold: f32,
}

impl Default for LlmInt8Options {
    fn default() -> Self {
        Self { threshold: 6.0 }
    }
}

impl LlmInt8 {
    /// With these options.
    pub fn new(options: LlmInt8Options) -> Self {
        Self { options }
    }

    fn encode(&self, layer: usize, w: ArrayView2<'_, f32>) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let flat = w.to_slice().expect("rows are contiguous");
        let half = |w: f32| f16::from_f32(w).to_f32();
        let absmax = Grouped::runs(flat, cols.max(1), cols.max(1)).map(|_, w| half(largest(w)));
        if let Some(row) = absmax.iter().position(|absmax| !absmax.is_finite()) {
            let weights = &flat[row * cols..][..cols];
            let worst = weights.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
            let (col, &value) = worst.unwrap_or((0, &f32::NAN));
            return Err(QuantizeError::ScaleOverflow {
                layer,
                row,
                col,
                value,
                scale: value.abs() / INT8_MAX,
            });
        }
        let codes = affine::pack_rows(8, rows, cols, |r, codes| {
            // The reciprocal is rounded first.
            let factor = if absmax[r] > 0.0 { 1.0 / absmax[r] * INT8_MAX } else { 0.0 };
            let weights = flat[r * cols..][..cols].iter().zip(codes);
            weights.for_each(|(&w, code)| *code = code_bits((half(w) * factor).round_ties_even() + 128.0));
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;
        let base = Box::new(Params::F32(absmax));
        let scales = Params::Scaled { base, factor: INT8_MAX, divide: true };
        Ok(QuantizedMatrix::affine(codes, Groups::whole_row(cols), scales, Offset::None, 128))
    }
}

impl Quantizer for LlmInt8 {
    fn name(&self) -> &'static str {
        "llm-int8"
    }

    fn description(&self) -> &'static str {
        "8 bits per row, 8-bit activations at run time but for outlying features; no calibration"
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["bnb_int8"]
    }

    fn input(&self, _: &LayerStats) -> ActSpec {
        let outlier_threshold = Some(self.options.threshold).filter(|&threshold| threshold > 0.0);
        ActSpec::Dynamic { grid: ActGrid::Int8, per: ActGroup::Token, symmetric: true, outlier_threshold }
    }

    fn default_spec(&self) -> QuantSpec {
        let (bits, group, scales) = (8, GroupSize::Row, ParamsKind::F32);
        QuantSpec { bits, group, scales, ..QuantSpec::default() }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        let threshold = self.options.threshold;
        if !(threshold >= 0.0 && threshold.is_finite()) {
            let (found, allowed) = (threshold.to_string(), "at least 0");
            return Err(SpecError::Option { option: "threshold", found, allowed });
        }
        own(spec, self.default_spec(), "8 bits, whole rows (-1), symmetric")
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], _: &QuantSpec) -> usize {
        shapes.iter().map(|&(rows, cols)| rows * (5 * cols + 8)).sum()
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        affine::each_layer(self, layers, |layer, w, _| self.encode(layer, w))
    }
}

/// Bits of the positive values of bitsandbytes' signed dynamic map below 1: for `i` from 0 to 6 the means of the `2^i`
/// equal cells of `[0.1, 1]`, times `10^(i-6)`, with the library's own rounding.
#[rustfmt::skip]
const DYNAMIC: [u32; 127] = [
    0x3513_a3b7, 0x365a_1a94, 0x3702_05ff, 0x37b2_4206, 0x3837_8034, 0x388a_efb3, 0x38ba_1f4b, 0x3923_d70b,
    0x398c_e705, 0x39c7_e283, 0x3a01_6f01, 0x3a1e_ecc1, 0x3a3c_6a80, 0x3a59_e83e, 0x3a77_65ff, 0x3aa7_ef9d,
    0x3af1_a9fc, 0x3b1d_b22d, 0x3b42_8f5c, 0x3b67_6c8a, 0x3b86_24dd, 0x3b98_9374, 0x3bab_020d, 0x3bbd_70a4,
    0x3bcf_df3b, 0x3be2_4dd3, 0x3bf4_bc6a, 0x3c03_9581, 0x3c0c_cccd, 0x3c16_0418, 0x3c1f_3b64, 0x3c3a_e148,
    0x3c68_f5c3, 0x3c8b_851f, 0x3ca2_8f5d, 0x3cb9_999a, 0x3cd0_a3d7, 0x3ce7_ae15, 0x3cfe_b852, 0x3d0a_e148,
    0x3d16_6667, 0x3d21_eb85, 0x3d2d_70a3, 0x3d38_f5c3, 0x3d44_7ae1, 0x3d50_0000, 0x3d5b_851f, 0x3d67_0a3d,
    0x3d72_8f5d, 0x3d7e_147b, 0x3d84_cccd, 0x3d8a_8f5d, 0x3d90_51eb, 0x3d96_147b, 0x3d9b_d70a, 0x3da1_999a,
    0x3da7_5c2a, 0x3dad_1eb8, 0x3db2_e148, 0x3db8_a3d7, 0x3dbe_6667, 0x3dc4_28f7, 0x3dc9_eb85, 0x3ddb_3334,
    0x3df8_0000, 0x3e0a_6666, 0x3e18_cccd, 0x3e27_3333, 0x3e35_999a, 0x3e44_0000, 0x3e52_6666, 0x3e60_cccd,
    0x3e6f_3333, 0x3e7d_9999, 0x3e86_0000, 0x3e8d_3334, 0x3e94_6666, 0x3e9b_999a, 0x3ea2_cccc, 0x3eaa_0000,
    0x3eb1_3333, 0x3eb8_6666, 0x3ebf_999a, 0x3ec6_cccc, 0x3ece_0000, 0x3ed5_3333, 0x3edc_6666, 0x3ee3_999a,
    0x3eea_cccc, 0x3ef2_0000, 0x3ef9_3332, 0x3f00_3333, 0x3f03_cccc, 0x3f07_6666, 0x3f0b_0000, 0x3f0e_999a,
    0x3f12_3334, 0x3f15_cccd, 0x3f19_6666, 0x3f1d_0000, 0x3f20_999a, 0x3f24_3334, 0x3f27_cccd, 0x3f2b_6666,
    0x3f2f_0000, 0x3f32_999a, 0x3f36_3334, 0x3f39_cccd, 0x3f3d_6666, 0x3f41_0000, 0x3f44_999a, 0x3f48_3333,
    0x3f4b_cccd, 0x3f4f_6666, 0x3f53_0000, 0x3f56_999a, 0x3f5a_3333, 0x3f5d_cccd, 0x3f61_6666, 0x3f65_0000,
    0x3f68_999a, 0x3f6c_3333, 0x3f6f_cccd, 0x3f73_6666, 0x3f77_0000, 0x3f7a_999a, 0x3f7e_3333,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dynamic_table_follows_its_rule() {
        let table = dynamic_table();
        assert_eq!((table.len(), table[127], table[255]), (256, 0.0, 1.0));
        let mut i = 128;
        for exponent in 0..7 {
            let cells = 1 << exponent;
            let width = 0.9 / f64::from(cells);
            for cell in 0..cells {
                let exact = (0.1 + (f64::from(cell) + 0.5) * width) * 10f64.powi(exponent - 6);
                // Single precision, a few operations.
                assert!((f64::from(table[i]) - exact).abs() <= 4.0 * f64::from(f32::EPSILON) * exact, "{i}");
                assert_eq!(table[254 - i], -table[i]);
                i += 1;
            }
        }
        assert_eq!(i, 255);
    }

    #[test]
    fn means_of_any_length() {
        for n in [1, 7, 40, 512, 1000, 40_000] {
            let values: Vec<f32> = (0..n).map(|i| (i % 8) as f32).collect();
            let exact = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
            // All partial sums are small integers; only the quotient is rounded.
            assert_eq!(mean(&values), exact as f32, "{n}");
        }
    }
}
