//! Whether scales follow the codes under them.

use quant_core::{Groups, Offset, QuantizedMatrix};

/// How the scales of a layer fall with the size of its codes.
///
/// A group of weights of norm `n` under the scale `s` has codes of norm `n / s`. Most of what makes one scale larger
/// than the next is the group's largest weight, which does not change its norm much: of groups with like norms, the
/// one with twice the scale has codes of half the size. So the slope of `ln(scale)` over `ln(rms(codes - zero))` is
/// near -1, whatever the grid. Where codes lie under the scales of other groups it is near 0.
///
/// Means over the groups of a row and over the rows of a group are taken out before, for rows and columns of weights
/// have sizes of their own. Sums, so that layers can be taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct ScaleSlope {
    /// Of `ln(scale)` and `ln(rms)`.
    products: f64,
    /// Squares of `ln(rms)`.
    codes: f64,
    /// Squares of `ln(scale)`.
    scales: f64,
    /// Groups less the means taken out.
    freedom: f64,
}

impl ScaleSlope {
    /// Above this, scales do not follow the codes: halfway between the two cases.
    const LIMIT: f64 = -0.5;

    /// The standard error up to which a slope says anything.
    const ERROR: f64 = 0.1;

    /// Of one layer. Codes of one bit have no sizes.
    pub(super) fn of(matrix: &QuantizedMatrix) -> Self {
        if matrix.codes.bits() < 2 {
            return Self::default();
        }
        let per_row = per_row(&matrix.groups, matrix.cols());
        // Groups without any size have no logarithm; they leave with their row.
        let pairs: Vec<(f64, f64)> = code_sizes(matrix)
            .into_iter()
            .enumerate()
            .map(|(g, size)| (size.ln(), f64::from(matrix.scales.get(g)).abs().ln()))
            .collect();
        let finite = |row: &&[(f64, f64)]| row.iter().all(|(x, y)| x.is_finite() && y.is_finite());
        let rows: Vec<&[(f64, f64)]> = pairs.chunks_exact(per_row).filter(finite).collect();
        if rows.len() < 2 {
            return Self::default();
        }
        let mut means = vec![(0.0, 0.0); per_row];
        for row in &rows {
            for (mean, pair) in means.iter_mut().zip(*row) {
                mean.0 += pair.0 / rows.len() as f64;
                mean.1 += pair.1 / rows.len() as f64;
            }
        }
        let mut found = Self { freedom: ((rows.len() - 1) * (per_row - 1).max(1)) as f64, ..Self::default() };
        for row in &rows {
            let centered: Vec<_> = row.iter().zip(&means).map(|(p, m)| (p.0 - m.0, p.1 - m.1)).collect();
            let n = if per_row > 1 { per_row as f64 } else { f64::INFINITY };
            let (mx, my) = centered.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0 / n, sum.1 + p.1 / n));
            for (x, y) in centered.iter().map(|p| (p.0 - mx, p.1 - my)) {
                found.products += x * y;
                found.codes += x * x;
                found.scales += y * y;
            }
        }
        found
    }

    /// Of two layers together.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            products: self.products + other.products,
            codes: self.codes + other.codes,
            scales: self.scales + other.scales,
            freedom: self.freedom + other.freedom,
        }
    }

    /// The slope; 0 where there is nothing to measure.
    pub(super) fn value(&self) -> f64 {
        if self.codes > 0.0 { self.products / self.codes } else { 0.0 }
    }

    /// The standard error of the slope if there is none.
    pub(super) fn error(&self) -> f64 {
        let error = (self.scales / self.codes / self.freedom).sqrt();
        if error.is_finite() { error } else { f64::INFINITY }
    }

    /// True if the slope says anything.
    pub(super) fn is_certain(&self) -> bool {
        self.error() < Self::ERROR
    }

    /// True if scales certainly do not follow the codes.
    pub(super) fn is_absent(&self) -> bool {
        self.is_certain() && self.value() > Self::LIMIT
    }
}

/// Groups that lie side by side in a row, or in a row of tiles.
fn per_row(groups: &Groups, cols: usize) -> usize {
    let count = match *groups {
        Groups::Row { len } | Groups::Tile { cols: len, .. } => cols.div_ceil(len),
        Groups::Index { count, .. } => count,
        Groups::Flat { len } if cols.is_multiple_of(len) => cols / len,
        Groups::Flat { .. } | Groups::Strided { .. } | Groups::Tensor => 1,
    };
    count.max(1)
}

/// Root mean square of the codes of each group, less its zero point.
fn code_sizes(matrix: &QuantizedMatrix) -> Vec<f64> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let values: Vec<f64> = (0..=matrix.codes.max()).map(|code| f64::from(matrix.grid.value(code))).collect();
    let zero = |g: usize| match &matrix.offset {
        Offset::None => 0.0,
        Offset::Zero(zeros) => f64::from(zeros.get(g)),
        Offset::Shift { param, sign } => -f64::from(sign * param.get(g)) / f64::from(matrix.scales.get(g)),
    };
    let mut sums = vec![(0.0, 0usize); matrix.groups.count(rows, cols)];
    let mut codes = vec![0; cols];
    for r in 0..rows {
        matrix.codes.unpack_row(r, &mut codes);
        let mut c = 0;
        while c < cols {
            let end = matrix.groups.run_end(r, c, cols);
            let g = matrix.groups.index(r, c, cols);
            let zero = zero(g);
            let (sum, count) = &mut sums[g];
            *sum += codes[c..end].iter().map(|&code| (values[usize::from(code)] - zero).powi(2)).sum::<f64>();
            *count += end - c;
            c = end;
        }
    }
    sums.into_iter().map(|(sum, count)| (sum / count.max(1) as f64).sqrt()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use quant_core::{Codes, Params};

    #[test]
    fn slopes_by_hand() {
        // Two rows of two groups; every group has weights of one size, so that scales are exactly inverse to codes.
        let codes = Codes::from_values(4, 2, 4, &[9, 7, 10, 6, 12, 4, 9, 7]).unwrap();
        let scales = Params::F32(vec![4.0, 2.0, 1.0, 4.0]);
        let groups = Groups::Row { len: 2 };
        let matrix = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 8);
        assert_eq!(code_sizes(&matrix), [1.0, 2.0, 4.0, 1.0]);
        assert!((ScaleSlope::of(&matrix).value() + 1.0).abs() < 1e-12);
        // The rows of scales exchanged.
        let exchanged = QuantizedMatrix { scales: Params::F32(vec![1.0, 4.0, 4.0, 2.0]), ..matrix };
        assert!((ScaleSlope::of(&exchanged).value() - 1.0).abs() < 1e-12);
        assert!(!ScaleSlope::default().is_absent(), "nothing is no sign of a mistake");
    }
}
