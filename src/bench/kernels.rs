//! How fast the products with one quantized matrix are, beside what the machine can do at most.

use std::time::Instant;

use half::f16;
use ndarray::{Array2, ArrayViewMut2};
use quant_core::{Codes, GridKind, GroupSize, MatrixError, Offset, Params, QuantSpec, QuantizedMatrix};
use quant_kernels::roof::Roof;
use quant_kernels::{ActScales, Activations, Isa, PackedMatrix, isa};
use serde::Serialize;

use super::Machine;
use crate::error::Error;

/// A product to be measured: `[m, k]` activations times `[n, k]` weights.
#[derive(Clone, Copy, Debug)]
pub struct KernelShape {
    /// Rows of activations.
    pub m: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Bits of a code; tables have their own.
    pub bits: u8,
    /// Weights that share a scale.
    pub group: GroupSize,
    /// What codes stand for.
    pub grid: GridKind,
    /// Without zero points. Tables never have them.
    pub symmetric: bool,
}

/// The speed of one kernel.
#[derive(Clone, Debug, Serialize)]
pub struct KernelRow {
    /// Its name: activations, weights, tile, instruction set.
    pub kernel: String,
    /// Whether fast products use it here.
    pub chosen: bool,
    /// Rows of activations.
    pub m: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Median over the repetitions, from activations in f32 to results in f32.
    pub seconds: f64,
    /// Packed weights read, GB/s.
    pub gb_s: f64,
    /// Multiplications and additions, 10^12 a second.
    pub tops: f64,
    /// The least time that memory and arithmetic allow, over the time taken.
    pub roof_fraction: f64,
}

/// The speeds of all kernels that fit.
#[derive(Clone, Debug, Serialize)]
pub struct KernelReport {
    /// The limits.
    pub machine: Machine,
    /// One row per kernel, the fastest first.
    pub rows: Vec<KernelRow>,
}

impl KernelReport {
    /// How much longer the chosen kernel takes than the best one, as a share of the best one's time.
    pub fn behind(&self) -> f64 {
        let best = self.rows.iter().map(|row| row.seconds).fold(f64::INFINITY, f64::min);
        let chosen = self.rows.iter().find(|row| row.chosen).map_or(best, |row| row.seconds);
        chosen / best - 1.0
    }
}

/// Bytes of weights that few rows go through in turn: far more than a level-3 cache holds.
const WORKING_SET: usize = 512 << 20;

/// Rows up to which that is done: beyond, a product does not wait for memory.
const FEW: usize = 32;

/// Codes of a matrix at most; more would take more memory than a layer of any model.
const MOST: usize = 1 << 32;

/// Multiplications above which plain code is left out: it would take minutes.
const PLAIN: usize = 1 << 30;

/// Seconds that the measurement of all kernels takes, at least.
const DURATION: f64 = 2.0;

/// Times every kernel that fits on random weights and activations, round by round, and checks each once against the
/// weights in f32.
pub fn bench_kernels(shape: &KernelShape) -> Result<KernelReport, Error> {
    let copies = weights(shape)?;
    let x = Array2::from_shape_simple_fn((shape.m, shape.k), numbers(1));
    let roof = Roof::measure();
    let mut runs = candidates(&copies[0], shape);
    let mut out = Array2::zeros((shape.m, shape.n));
    for run in &mut runs {
        run.product(&copies[0], &x, out.view_mut())?;
        run.check(&copies[0], &x, &out)?;
    }

    let begin = Instant::now();
    let mut at = 0;
    while runs.iter().any(|run| run.seconds.len() < 5) || begin.elapsed().as_secs_f64() < DURATION {
        for run in &mut runs {
            at = (at + 1) % copies.len();
            let start = Instant::now();
            run.product(&copies[at], &x, out.view_mut())?;
            run.seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let bytes = copies[0].bytes() as f64;
    let mut rows: Vec<KernelRow> = runs.into_iter().map(|run| run.row(shape, bytes, &roof)).collect();
    rows.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    Ok(KernelReport { machine: Machine::of(&roof), rows })
}

/// A kernel and its times.
struct Run {
    kernel: String,
    chosen: bool,
    product: Product,
    /// Cap under which it is the one chosen.
    isa: Isa,
    activations: Activations,
    seconds: Vec<f64>,
}

/// The arithmetic of a kernel.
#[derive(Clone, Copy, PartialEq)]
enum Product {
    Int8,
    Bf16,
    F32,
}

/// Every kernel that fits, and which one fast products use.
fn candidates(packed: &PackedMatrix, shape: &KernelShape) -> Vec<Run> {
    let run = |kernel, product, isa| Run {
        kernel,
        chosen: false,
        product,
        isa,
        activations: Activations::default(),
        seconds: Vec::new(),
    };
    let active = isa::active();
    let work = shape.m.saturating_mul(shape.n).saturating_mul(shape.k);
    let mut runs: Vec<Run> = Vec::new();
    for &isa in isa::supported().iter().rev().filter(|&&isa| isa <= active) {
        let name = isa::with_cap(isa, || packed.kernel_name(shape.m.min(12)));
        let slow = isa == Isa::Scalar && isa != active && work > PLAIN;
        if let Some(name) = name.filter(|_| !slow)
            && runs.iter().all(|run| run.kernel != name)
        {
            runs.push(run(name.to_owned(), Product::Int8, isa));
        }
    }
    let weights =
        if shape.grid == GridKind::Int { format!("u{}", shape.bits) } else { shape.grid.to_string() };
    for (name, product) in [("bf16", Product::Bf16), ("f32", Product::F32)] {
        runs.push(run(format!("{name}_{weights}_panels_{active}"), product, active));
    }
    // The first is that of the instruction set in use, if there is one in integers; else the one in bf16.
    runs[0].chosen = true;
    runs
}

impl Run {
    fn product(
        &mut self,
        packed: &PackedMatrix,
        x: &Array2<f32>,
        out: ArrayViewMut2<'_, f32>,
    ) -> Result<(), Error> {
        isa::with_cap(self.isa, || match (self.product, packed.fast_input()) {
            (Product::Int8, Some(input)) => {
                self.activations.quantize(x.view(), input, ActScales::Group)?;
                packed.matmul_with(&self.activations, out)
            }
            (Product::Bf16, _) => packed.matmul_bf16(x.view(), out),
            (Product::F32, _) | (Product::Int8, None) => packed.matmul(x.view(), out),
        })
        .map_err(|error| Error::Bench { kernel: self.kernel.clone(), reason: error.to_string() })
    }

    /// Compares some outputs with sums in f64 over the weights in f32. With `e` the largest relative error of an
    /// operand and `t` the largest term of a sum, a product is off by `k * t * e` at most for each operand that is
    /// rounded, and by `k * eps` of the sum of magnitudes for the sum itself.
    fn check(&self, packed: &PackedMatrix, x: &Array2<f32>, out: &Array2<f32>) -> Result<(), Error> {
        let k = x.ncols();
        let mut weights = vec![0.0; k];
        let largest = |values: &[f32]| values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        for row in [0, x.nrows() / 2, x.nrows().saturating_sub(1)].into_iter().filter(|&r| r < x.nrows()) {
            let x = x.row(row).to_vec();
            for output in (0..out.ncols()).step_by(out.ncols() / 64 + 1) {
                packed.dequantize_row(output, &mut weights).expect("a row of the matrix");
                let terms = weights.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                // In eight bits, half a step of either operand; tables of bytes take codes that far, too.
                let operands = match self.product {
                    Product::Int8 => {
                        let half_step = 0.5 / 127.0 * 1.001;
                        k as f64 * f64::from(largest(&weights) * largest(&x)) * (2.0 * half_step)
                    }
                    Product::Bf16 => size * 2.0f64.powi(-8) * 1.01,
                    Product::F32 => 0.0,
                };
                let bound = operands + size * k as f64 * f64::from(f32::EPSILON);
                let found = f64::from(out[[row, output]]);
                if (found - sum).abs() > bound {
                    let reason = format!("output {output} is {found}, expected {sum} to within {bound}");
                    return Err(Error::Bench { kernel: self.kernel.clone(), reason });
                }
            }
        }
        Ok(())
    }

    fn row(mut self, shape: &KernelShape, bytes: f64, roof: &Roof) -> KernelRow {
        let KernelShape { m, n, k, .. } = *shape;
        self.seconds.sort_by(f64::total_cmp);
        let seconds = self.seconds[self.seconds.len() / 2];
        let operations = 2.0 * m as f64 * n as f64 * k as f64;
        let peak = match self.product {
            Product::Int8 => roof.int8,
            Product::Bf16 => roof.bf16,
            Product::F32 => roof.f32,
        };
        KernelRow {
            kernel: self.kernel,
            chosen: self.chosen,
            m,
            n,
            k,
            seconds,
            gb_s: bytes / seconds / 1e9,
            tops: operations / seconds / 1e12,
            roof_fraction: (bytes / roof.read).max(operations / peak) / seconds,
        }
    }
}

/// Random packed weights: for few rows as many copies as fill the working set.
fn weights(shape: &KernelShape) -> Result<Vec<PackedMatrix>, Error> {
    let matrix = random_matrix(shape)?;
    let pack = |matrix| {
        PackedMatrix::pack(matrix)
            .map_err(|error| Error::Bench { kernel: "pack".to_owned(), reason: error.to_string() })
    };
    let first = pack(matrix.clone())?;
    let count = if shape.m <= FEW { WORKING_SET.div_ceil(first.bytes().max(1)).min(256) } else { 1 };
    let mut copies = vec![first];
    for _ in 1..count {
        copies.push(pack(matrix.clone())?);
    }
    Ok(copies)
}

/// A random matrix with scales in f16.
fn random_matrix(shape: &KernelShape) -> Result<QuantizedMatrix, Error> {
    let &KernelShape { n, k, bits, group, grid, symmetric, .. } = shape;
    let invalid =
        |error: MatrixError| Error::Bench { kernel: "weights".to_owned(), reason: error.to_string() };
    let spec = QuantSpec { bits, group, ..QuantSpec::default() };
    spec.validate()?;
    if n.checked_mul(k).is_none_or(|codes| codes > MOST) {
        return Err(invalid(MatrixError::TooLarge { rows: n, cols: k }));
    }
    let bits = grid.table().map_or(bits, |table| table.len().ilog2() as u8);
    let groups = group.groups(n, k);
    let count = groups.count(n, k);
    let mut random = numbers(2);
    let mut codes = Codes::zeros(bits, n, k).map_err(invalid)?;
    let mut row = vec![0; k];
    let finite: Vec<u8> = (0..=codes.max())
        .filter(|&code| grid.table().is_none_or(|table| table[usize::from(code)].is_finite()))
        .collect();
    for r in 0..n {
        row.iter_mut().for_each(|code| *code = finite[((random() + 1.0) * 4096.0) as usize % finite.len()]);
        codes.set_row(r, &row);
    }
    let offset = match (grid, symmetric) {
        (GridKind::Int, false) => {
            let zero = |x: f32| ((x + 1.0) * 4096.0) as usize % (usize::from(codes.max()) + 1);
            Offset::Zero(Params::U8((0..count).map(|_| zero(random()) as u8).collect()))
        }
        _ => Offset::None,
    };
    let values = match (grid, &offset) {
        (GridKind::Int, Offset::Zero(_)) => quant_core::Grid::UNSIGNED,
        _ => grid.grid(bits).ok_or_else(|| Error::Bench {
            kernel: "weights".to_owned(),
            reason: "a table needs values; name a known one".to_owned(),
        })?,
    };
    Ok(QuantizedMatrix {
        codes,
        grid: values,
        groups,
        scales: Params::F16((0..count).map(|_| f16::from_f32(0.01 + 0.005 * random())).collect()),
        offset,
        row_scale: None,
        col_scale: None,
        input_perm: None,
        outliers: None,
        dtype: None,
    })
}

/// Uniform numbers in -1..1.
fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(m: usize, grid: GridKind, bits: u8, symmetric: bool) -> KernelShape {
        KernelShape { m, n: 70, k: 256, bits, group: GroupSize::Columns(64), grid, symmetric }
    }

    #[test]
    fn every_kind_of_weights_has_checked_kernels() {
        for (grid, bits, symmetric) in [
            (GridKind::Int, 4, true),
            (GridKind::Int, 3, false),
            (GridKind::Int, 8, true),
            (GridKind::Nf4, 4, true),
            (GridKind::E4M3, 8, true),
        ] {
            let shape = shape(3, grid, bits, symmetric);
            let packed = weights(&KernelShape { m: 64, ..shape }).unwrap().remove(0);
            let mut runs = candidates(&packed, &shape);
            assert_eq!(runs.iter().filter(|run| run.chosen).count(), 1);
            assert_eq!(runs.iter().any(|run| run.product == Product::Int8), grid != GridKind::E4M3);
            let x = Array2::from_shape_simple_fn((3, 256), numbers(1));
            for run in &mut runs {
                let mut out = Array2::zeros((3, 70));
                run.product(&packed, &x, out.view_mut()).unwrap();
                run.check(&packed, &x, &out).unwrap();
                out[[1, 0]] += 40.0;
                assert!(run.check(&packed, &x, &out).is_err(), "{} may be off by anything", run.kernel);
            }
        }
    }

    #[test]
    fn a_report_tells_how_far_the_choice_is_behind() {
        let roof = Roof { read: 1e9, int8: 1e12, bf16: 1e12, f32: 1e12 };
        let packed = weights(&KernelShape { m: 64, ..shape(1, GridKind::Int, 4, true) }).unwrap().remove(0);
        let mut runs = candidates(&packed, &shape(1, GridKind::Int, 4, true));
        for (i, run) in runs.iter_mut().enumerate() {
            run.seconds = vec![if i == 1 { 1.0 } else { 1.5 }];
        }
        let rows = runs.into_iter().map(|run| run.row(&shape(1, GridKind::Int, 4, true), 1e9, &roof));
        let report = KernelReport { machine: Machine::of(&roof), rows: rows.collect() };
        assert_eq!(report.behind(), 0.5);
        assert_eq!(report.rows[1].roof_fraction, 1.0);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let huge = KernelShape { n: usize::MAX, ..shape(1, GridKind::Int, 4, true) };
        assert!(bench_kernels(&huge).is_err());
        assert!(bench_kernels(&shape(1, GridKind::Int, 9, true)).is_err());
    }
}
