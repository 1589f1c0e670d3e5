//! Small floats: FP8, MXFP4 and NVFP4. No calibration data.
//!
//! | method | scale | code |
//! |---|---|---|
//! | `fp8` | `max abs(w) / 448` of a block, a row or the matrix | nearest E4M3 to `w / s` |
//! | `mxfp4` | of 32 weights: `2^(floor(log2 max abs(w)) - 2)` or twice that | nearest E2M1 to `w / s` |
//! | `nvfp4` | of 16 weights: `max abs(w) / 6` or `/ 4`, as E4M3 over a factor for all | nearest E2M1 to `w / s` |
//!
//! Ties go to the even code. Of the two scales of the 4-bit formats (the first is what OCP's and NVIDIA's rules say) the
//! one with the smaller squared error is taken: the grid's last gap, from 4 to 6, is wide.

use ndarray::ArrayView2;
use quant_core::minifloat::{e4m3_to_f32, e8m0_to_f32};
use quant_core::{
    Grid, GridKind, GroupSize, Offset, Params, ParamsKind, QuantSpec, QuantizedMatrix, SpecError,
};
use quant_math::{Codebook, Grouped};

use crate::affine;
use crate::quantizer::{LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::stats::{LayerStats, Needs};

/// Largest E4M3 and E2M1.
const E4M3_MAX: f32 = 448.0;
const E2M1_MAX: f32 = 6.0;

/// A format of small floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floats {
    /// E4M3 under f32 scales.
    Fp8,
    /// E2M1 in blocks of 32 under powers of two.
    Mxfp4,
    /// E2M1 in blocks of 16 under E4M3 scales and a factor for the matrix.
    Nvfp4,
}

impl Floats {
    fn encode(
        &self,
        layer: usize,
        w: ArrayView2<'_, f32>,
        spec: &QuantSpec,
    ) -> Result<QuantizedMatrix, QuantizeError> {
        let (rows, cols) = w.dim();
        let flat = w.to_slice().expect("rows are contiguous");
        let table = spec.grid.table().unwrap_or_default();
        let book = Codebook::of_floats(&table);
        let groups = spec.group.groups(rows, cols);
        let scales = match self {
            Floats::Fp8 => {
                let mut absmax = vec![0.0f32; groups.count(rows, cols)];
                for r in 0..rows {
                    let mut start = 0;
                    while start < cols {
                        let end = groups.run_end(r, start, cols);
                        let slot = &mut absmax[groups.index(r, start, cols)];
                        *slot = largest(&flat[r * cols + start..r * cols + end]).max(*slot);
                        start = end;
                    }
                }
                Params::F32(absmax.into_iter().map(|a| (a / E4M3_MAX).max(f32::MIN_POSITIVE)).collect())
            }
            Floats::Mxfp4 => {
                let of = |w: &[f32]| {
                    // The exponent of the largest magnitude, two below: E2M1 reaches 2^2 times 1.5.
                    let first = ((largest(w).to_bits() >> 23) as u8).saturating_sub(2);
                    let better = |e: u8| error(&book, &table, w, e8m0_to_f32(e));
                    if first < 254 && better(first + 1) < better(first) { first + 1 } else { first }
                };
                Params::E8M0(Grouped::runs(flat, cols.max(1), spec.group.len(cols)).map(|_, w| of(w)))
            }
            Floats::Nvfp4 => {
                let all = largest(flat);
                let factor = if all > 0.0 {
                    (E4M3_MAX * E2M1_MAX / all).clamp(f32::MIN_POSITIVE, f32::MAX)
                } else {
                    1.0
                };
                let blocks = Codebook::of_floats(&GridKind::E4M3.table().unwrap_or_default());
                let of = |w: &[f32]| {
                    let a = largest(w);
                    // The least positive scale rather than none.
                    let code = |reach: f32| blocks.code(factor * a / reach).max(1);
                    let better = |code: u8| error(&book, &table, w, e4m3_to_f32(code) / factor);
                    let (first, second) = (code(E2M1_MAX), code(4.0));
                    if better(second) < better(first) { second } else { first }
                };
                let base = Grouped::runs(flat, cols.max(1), spec.group.len(cols)).map(|_, w| of(w));
                Params::Scaled { base: Box::new(Params::E4M3(base)), factor, divide: true }
            }
        };
        let codes = affine::pack_rows(spec.bits, rows, cols, |r, codes| {
            let mut start = 0;
            while start < cols {
                let end = groups.run_end(r, start, cols);
                let scale = scales.get(groups.index(r, start, cols));
                let run = flat[r * cols + start..r * cols + end].iter().zip(&mut codes[start..end]);
                run.for_each(|(&w, code)| *code = book.code(w / scale));
                start = end;
            }
        })
        .map_err(|source| QuantizeError::Matrix { layer, source })?;
        let mut matrix = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0);
        matrix.grid = Grid::Table(table);
        Ok(matrix)
    }
}

fn largest(w: &[f32]) -> f32 {
    w.iter().fold(0.0, |largest, w| largest.max(w.abs()))
}

/// `Σ (w - ŵ)²` in steps of the scale of the largest, so that nothing underflows.
fn error(book: &Codebook, table: &[f32], w: &[f32], scale: f32) -> f32 {
    let unit = scale / largest(w).max(f32::MIN_POSITIVE);
    let of = |&w: &f32| ((w / scale - table[usize::from(book.code(w / scale))]) * unit).powi(2);
    w.iter().map(of).sum()
}

impl Quantizer for Floats {
    fn name(&self) -> &'static str {
        match self {
            Floats::Fp8 => "fp8",
            Floats::Mxfp4 => "mxfp4",
            Floats::Nvfp4 => "nvfp4",
        }
    }

    fn description(&self) -> &'static str {
        match self {
            Floats::Fp8 => "FP8 (E4M3) in blocks of 128x128, per row or per tensor; no calibration",
            Floats::Mxfp4 => "MXFP4: E2M1 in blocks of 32 under powers of two; no calibration",
            Floats::Nvfp4 => "NVFP4: E2M1 in blocks of 16 under E4M3 scales; no calibration",
        }
    }

    fn needs(&self) -> Needs {
        Needs::NONE
    }

    fn layouts(&self) -> &'static [&'static str] {
        match self {
            Floats::Fp8 => &["fp8", "fbgemm_fp8", "ct_float"],
            Floats::Mxfp4 => &["ct_mxfp4"],
            Floats::Nvfp4 => &["ct_nvfp4"],
        }
    }

    fn default_spec(&self) -> QuantSpec {
        let (bits, grid, group, scales) = match self {
            Floats::Fp8 => (8, GridKind::E4M3, GroupSize::Tile { rows: 128, cols: 128 }, ParamsKind::F32),
            Floats::Mxfp4 => (4, GridKind::E2M1, GroupSize::Columns(32), ParamsKind::E8M0),
            Floats::Nvfp4 => (4, GridKind::E2M1, GroupSize::Columns(16), ParamsKind::E4M3),
        };
        QuantSpec { bits, grid, group, scales, symmetric: true, act_order: false }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        spec.validate()?;
        let own = self.default_spec();
        let group = match spec.group {
            GroupSize::Flat(_) | GroupSize::Strided(_) => own.group,
            group if *self == Floats::Fp8 => group,
            _ => own.group,
        };
        if *spec == (QuantSpec { group, ..own }) {
            return Ok(());
        }
        let found = format!("{} bits in groups of {}, symmetric: {}", spec.bits, spec.group, spec.symmetric);
        let allowed =
            "the format's own bits and groups, symmetric; fp8 also -1, tensor, or blocks such as 128x128";
        Err(SpecError::Option { option: "type", found, allowed })
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        let of = |&(rows, cols): &(usize, usize)| {
            let groups = spec.group.groups(rows, cols).count(rows, cols);
            rows * (4 * cols + (cols * usize::from(spec.bits)).div_ceil(8)) + 8 * groups
        };
        shapes.iter().map(of).sum()
    }

    fn quantize(&self, layers: Vec<LayerWeights>, _: LayerStats) -> Result<Vec<Quantized>, QuantizeError> {
        affine::each_layer(self, layers, |layer, w, spec| self.encode(layer, w, spec))
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    #[test]
    fn a_block_by_hand() {
        let w = Array2::from_shape_fn((1, 32), |(_, c)| if c == 3 { -6.5 } else { 0.26 * c as f32 / 31.0 });
        let mxfp4 = Floats::Mxfp4.encode(0, w.view(), &Floats::Mxfp4.default_spec()).unwrap();
        // 6.5 has the exponent 2: a scale of 1 cuts it to 6, one of 2 rounds it to 6 as well, and the rest more coarsely.
        assert_eq!((mxfp4.scales.get(0), mxfp4.codes.get(0, 3)), (1.0, 15));
        let back = mxfp4.dequantize();
        assert_eq!((back[[0, 3]], back[[0, 0]], back[[0, 31]]), (-6.0, 0.0, 0.5));
    }

    #[test]
    fn scales_reach_the_largest_weight() {
        let w = Array2::from_shape_fn((8, 64), |(r, c)| ((r * 71 + c * 37) % 101) as f32 / 50.0 - 1.0);
        for group in
            [GroupSize::Tensor, GroupSize::Row, GroupSize::Tile { rows: 4, cols: 16 }, GroupSize::Columns(32)]
        {
            let spec = QuantSpec { group, ..Floats::Fp8.default_spec() };
            let back = Floats::Fp8.encode(0, w.view(), &spec).unwrap().dequantize();
            for (w, back) in w.iter().zip(&back) {
                // Half of the last place of four significant bits, or of the least subnormal: 2^-10 of the scale.
                let bound = w.abs() / 16.0 + 2f32.powi(-10) / E4M3_MAX;
                assert!((w - back).abs() <= bound * (1.0 + 1e-5), "{w} {back} {group}");
            }
        }
    }
}
