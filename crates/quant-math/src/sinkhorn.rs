//! Factors per row and per column that even out the standard deviations of a matrix: the normalisation of SINQ.
//!
//! `M ≈ diag(rows) M̂ diag(cols)`, found in the manner of Sinkhorn and Knopp, in logarithms `u` of the column factors
//! and `v` of the row factors (Müller et al., "SINQ: Sinkhorn-Normalized Quantization for Calibration-Free Low-Precision
//! LLM Weights", 2025). With `C = M / e^u / e^v` and its deviations `σ`, a step is
//!
//! ```text
//! u += ln clamp(σ_col(C) / t, 0.7, 2)     v += ln clamp(σ_row(C) / t, 0.7, 2)     t = the least σ of M
//! ```
//!
//! The factors kept are those of the least imbalance `max σ / min σ` on the way; steps end when it rises.

use quant_kernels::vectorized;

/// Steps that the reference takes.
pub const STEPS: usize = 16;

/// Factors of a matrix: `M[i, j] = M̂[i, j] * cols[j] * rows[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// One factor per row (`mu2`).
    pub rows: Vec<f32>,
    /// One factor per column (`mu1`).
    pub cols: Vec<f32>,
}

impl Balance {
    /// No change.
    pub fn identity(rows: usize, cols: usize) -> Self {
        Self { rows: vec![1.0; rows], cols: vec![1.0; cols] }
    }
}

/// Even out `m`, a row-major matrix of `cols` columns, in at most `steps` steps.
///
/// Sums are f64 and run in the order of rows, on the calling thread.
pub fn balance(m: &[f32], cols: usize, steps: usize) -> Balance {
    let rows = m.len().checked_div(cols).unwrap_or(0);
    let mut best = Balance::identity(rows, cols);
    if m.is_empty() {
        return best;
    }
    let (mut u, mut v) = (vec![0.0f32; cols], vec![0.0f32; rows]);
    let mut now = best.clone();
    let mut target = None;
    let mut least = f32::INFINITY;
    for _ in 0..steps {
        let deviations = Deviations::of(m, &now);
        let imbalance = deviations.imbalance();
        if imbalance > least {
            break;
        }
        least = imbalance;
        best.clone_from(&now);
        let target = *target.get_or_insert_with(|| deviations.least() + 1e-6);
        let step = |log: &mut f32, deviation: f32, factor: &mut f32| {
            let ratio = (limited(deviation) / target).clamp(0.7, 2.0);
            *log = (*log + libm::log(f64::from(ratio)) as f32).clamp(-0.3, 10.0);
            *factor = libm::exp(f64::from(*log)) as f32;
        };
        let of_cols = u.iter_mut().zip(&deviations.cols).zip(&mut now.cols);
        of_cols.for_each(|((log, &deviation), factor)| step(log, deviation, factor));
        let of_rows = v.iter_mut().zip(&deviations.rows).zip(&mut now.rows);
        of_rows.for_each(|((log, &deviation), factor)| step(log, deviation, factor));
    }
    best
}

fn limited(deviation: f32) -> f32 {
    deviation.clamp(1e-3, 1e3)
}

/// Standard deviations, with `n - 1` in the denominator.
struct Deviations {
    rows: Vec<f32>,
    cols: Vec<f32>,
}

impl Deviations {
    /// Those of `m / cols / rows`.
    fn of(m: &[f32], by: &Balance) -> Self {
        let n = by.cols.len();
        let mut rows = Vec::with_capacity(by.rows.len());
        let (mut sums, mut squares) = (vec![0.0f64; n], vec![0.0f64; n]);
        for (row, &factor) in m.chunks_exact(n).zip(&by.rows) {
            let (sum, square) = vectorized(
                #[inline(always)]
                || accumulate(row, &by.cols, factor, &mut sums, &mut squares),
            );
            rows.push(deviation(sum, square, n));
        }
        let cols = sums.iter().zip(&squares).map(|(&sum, &square)| deviation(sum, square, rows.len()));
        Self { cols: cols.collect(), rows }
    }

    fn all(&self) -> impl Iterator<Item = f32> {
        self.rows.iter().chain(&self.cols).copied()
    }

    fn least(&self) -> f32 {
        self.all().map(limited).fold(f32::INFINITY, f32::min)
    }

    fn imbalance(&self) -> f32 {
        self.all().fold(0.0, f32::max) / self.all().fold(f32::INFINITY, f32::min).max(1e-12)
    }
}

/// Adds a row of `m / cols / row` to the sums of columns; returns its own.
#[inline(always)]
fn accumulate(row: &[f32], cols: &[f32], factor: f32, sums: &mut [f64], squares: &mut [f64]) -> (f64, f64) {
    const LANES: usize = 8;
    let (mut sum, mut square) = ([0.0f64; LANES], [0.0f64; LANES]);
    let one = |w: f32, col: f32, total: &mut f64, total_square: &mut f64| {
        let value = f64::from(w / col / factor);
        *total += value;
        *total_square += value * value;
        (value, value * value)
    };
    let (ws, w_rest) = row.as_chunks::<LANES>();
    let (cs, c_rest) = cols.as_chunks::<LANES>();
    let (totals, t_rest) = sums.as_chunks_mut::<LANES>();
    let (total_squares, s_rest) = squares.as_chunks_mut::<LANES>();
    for (((w, c), t), s) in ws.iter().zip(cs).zip(totals).zip(total_squares) {
        for i in 0..LANES {
            let (value, squared) = one(w[i], c[i], &mut t[i], &mut s[i]);
            sum[i] += value;
            square[i] += squared;
        }
    }
    for (((&w, &c), t), s) in w_rest.iter().zip(c_rest).zip(t_rest).zip(s_rest) {
        let (value, squared) = one(w, c, t, s);
        sum[0] += value;
        square[0] += squared;
    }
    (sum.iter().sum(), square.iter().sum())
}

/// From the sum and the sum of squares of `n` numbers; 0 for fewer than two.
fn deviation(sum: f64, square: f64, n: usize) -> f32 {
    let n = n as f64;
    ((square - sum * sum / n).max(0.0) / (n - 1.0).max(1.0)).sqrt() as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn deviations_by_hand() {
        let Deviations { rows, cols } = Deviations::of(&[1.0, 3.0, 2.0, 8.0], &Balance::identity(2, 2));
        assert_eq!(rows, [2.0f32.sqrt(), 18.0f32.sqrt()]);
        assert_eq!(cols, [0.5f32.sqrt(), 12.5f32.sqrt()]);
        let halved = Balance { rows: vec![1.0, 2.0], cols: vec![1.0, 0.5] };
        let Deviations { rows, .. } = Deviations::of(&[1.0, 3.0, 2.0, 8.0], &halved);
        assert_eq!(rows, [12.5f32.sqrt(), 24.5f32.sqrt()], "rows (1, 6) and (1, 8)");
    }

    #[test]
    fn scaled_columns_are_found() {
        // A matrix of one deviation whose column 3 was multiplied by 8: three steps of 2 undo it.
        let m =
            |r: usize, c: usize| (((r * 37 + c * 101) % 64) as f32 - 31.5) * if c == 3 { 8.0 } else { 1.0 };
        let m: Vec<f32> = (0..64 * 16).map(|i| m(i / 16, i % 16)).collect();
        let found = balance(&m, 16, STEPS);
        let ratio = found.cols[3] / found.cols[4];
        assert!((ratio - 8.0).abs() < 1.0, "{ratio}");
    }

    #[test]
    fn nothing_and_constants_are_left_alone() {
        assert_eq!(balance(&[], 4, STEPS), Balance::identity(0, 4));
        let constant = balance(&[2.0; 12], 4, STEPS);
        assert!(constant.rows.iter().chain(&constant.cols).all(|f| f.is_finite() && *f > 0.0));
        assert!(balance(&[1.0, 2.0, 3.0], 3, STEPS).cols.iter().all(|f| f.is_finite()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn imbalance_never_grows(m in prop::collection::vec(-1.0f32..1.0, 24 * 9), wide in 0usize..9) {
            let m: Vec<f32> = m.iter().enumerate().map(|(i, m)| if i % 9 == wide { 5.0 * m } else { *m }).collect();
            let before = Deviations::of(&m, &Balance::identity(24, 9)).imbalance();
            let after = Deviations::of(&m, &balance(&m, 9, STEPS)).imbalance();
            prop_assert!(after <= before, "{} {}", after, before);
        }
    }
}
