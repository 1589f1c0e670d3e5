//! What the codes of a layer say about its zero points, its groups and its scales.

use quant_core::{Grid, Offset, QuantizedMatrix};

use super::scales::ScaleSlope;

/// Rows that are looked at, evenly spread: more say nothing new.
const ROWS: usize = 256;

/// Statistics over the groups of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct CodeStatistics {
    /// Median over groups of the mean code minus the zero point. Weights have a mean near zero, so this is too, in
    /// steps of the grid.
    pub(super) bias: f64,
    /// Zero points are integers, so that a bias of one means something.
    integers: bool,
    /// The one zero point of all groups, less the middle of the range.
    uniform: Option<f64>,
    /// Zero points against mean codes, over all groups.
    pub(super) overall: Correlation,
    /// The same within rows: both less their means over the row.
    pub(super) within_rows: Correlation,
    /// Groups seen.
    groups: usize,
    /// Codes of a group, in the middle.
    group_len: usize,
    /// How scales fall with the codes.
    pub(super) scale_slope: ScaleSlope,
    /// Scales that no quantizer makes.
    pub(super) scale_problem: Option<String>,
}

impl CodeStatistics {
    pub(super) fn of(matrix: &QuantizedMatrix) -> Self {
        let (scale_problem, scale_slope) = (scale_problem(matrix), ScaleSlope::of(matrix));
        let mut found = Self { scale_problem, scale_slope, ..Self::default() };
        let Grid::Int { midpoint } = matrix.grid else { return found };
        let zero = |g: usize| match &matrix.offset {
            Offset::None => Some(f64::from(midpoint)),
            Offset::Zero(zeros) => Some(f64::from(zeros.get(g)) + f64::from(midpoint)),
            Offset::Shift { .. } => None,
        };
        let rows = row_groups(matrix, zero);
        let all: Vec<&GroupCodes> = rows.iter().flatten().collect();
        let Some(first) = all.first() else { return found };
        let middle = f64::from(1u16 << (matrix.codes.bits() - 1));
        found.groups = all.len();
        found.group_len = median(&mut all.iter().map(|g| g.len as f64).collect::<Vec<_>>()) as usize;
        found.integers = all.iter().all(|g| g.zero.fract() == 0.0);
        found.uniform = all.iter().all(|g| g.zero == first.zero).then_some(first.zero - middle);
        found.bias = median(&mut all.iter().map(|g| g.mean - g.zero).collect::<Vec<_>>());
        found.overall = Correlation::of(all.iter().map(|g| (g.mean, g.zero)));
        let centered = rows.iter().filter(|row| row.len() > 1).flat_map(|row| {
            let n = row.len() as f64;
            let mean = |of: fn(&GroupCodes) -> f64| row.iter().map(of).sum::<f64>() / n;
            let (codes, zeros) = (mean(|g| g.mean), mean(|g| g.zero));
            row.iter().map(move |g| (g.mean - codes, g.zero - zeros))
        });
        found.within_rows = Correlation::of(centered);
        found
    }

    /// Enough groups to judge by, each of enough codes that their mean says something.
    fn enough(&self) -> bool {
        self.groups >= 64 && self.group_len >= 16 && self.integers
    }

    /// True if zero points are off by one: too small for `sign` 1, too large for -1.
    pub(super) fn zeros_off(&self, sign: f64) -> bool {
        match self.uniform {
            // Around the middle there is nothing to measure.
            Some(zero) => zero == -sign,
            None => self.enough() && (self.bias - sign).abs() < 0.3,
        }
    }

    /// True if zero points differ between groups, but do not follow the codes.
    pub(super) fn zeros_strange(&self) -> bool {
        self.enough() && self.overall.is_absent()
    }

    /// True if they do not follow the codes from group to group of a row.
    pub(super) fn groups_strange(&self) -> bool {
        self.enough() && !self.overall.is_absent() && self.within_rows.is_absent()
    }
}

/// How two quantities go together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Correlation {
    /// Pearson's coefficient.
    pub(super) value: f64,
    /// Pairs seen.
    count: usize,
    /// Standard deviation of the second quantity.
    spread: f64,
}

impl Correlation {
    pub(super) fn of(pairs: impl Iterator<Item = (f64, f64)>) -> Self {
        let pairs: Vec<(f64, f64)> = pairs.collect();
        let n = pairs.len().max(1) as f64;
        let (ma, mb) =
            (pairs.iter().map(|p| p.0).sum::<f64>() / n, pairs.iter().map(|p| p.1).sum::<f64>() / n);
        let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
        for (a, b) in &pairs {
            ab += (a - ma) * (b - mb);
            aa += (a - ma).powi(2);
            bb += (b - mb).powi(2);
        }
        let value = if aa > 0.0 && bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 };
        Self { value, count: pairs.len(), spread: (bb / n).sqrt() }
    }

    /// True if two things that should go together do not, though both vary.
    fn is_absent(&self) -> bool {
        self.count >= 64 && self.spread > 0.2 && self.value < 0.3
    }
}

/// The codes of one group within one row.
struct GroupCodes {
    len: usize,
    mean: f64,
    zero: f64,
}

/// Groups of some rows, each cut at the ends of its row. Empty where there are no zero points.
fn row_groups(matrix: &QuantizedMatrix, zero: impl Fn(usize) -> Option<f64>) -> Vec<Vec<GroupCodes>> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let step = rows.div_ceil(ROWS).max(1);
    let mut codes = vec![0; cols];
    let mut found = Vec::new();
    for r in (0..rows).step_by(step) {
        matrix.codes.unpack_row(r, &mut codes);
        let mut row = Vec::new();
        let mut c = 0;
        while c < cols {
            let end = matrix.groups.run_end(r, c, cols);
            let sum: usize = codes[c..end].iter().map(|&code| usize::from(code)).sum();
            let len = end - c;
            if let Some(zero) = zero(matrix.groups.index(r, c, cols)) {
                row.push(GroupCodes { len, mean: sum as f64 / len as f64, zero });
            }
            c = end;
        }
        found.push(row);
    }
    found
}

/// A scale that is not finite, or far beyond all others.
fn scale_problem(matrix: &QuantizedMatrix) -> Option<String> {
    const FAR: f64 = 1e4;
    let mut sizes: Vec<f64> =
        (0..matrix.scales.len()).map(|i| f64::from(matrix.scales.get(i).abs())).collect();
    if let Some(at) = sizes.iter().position(|s| !s.is_finite()) {
        return Some(format!("scale {at} is not finite"));
    }
    let largest = sizes.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    let (at, largest) = largest?;
    sizes.retain(|s| *s > 0.0);
    let middle = median(&mut sizes);
    (middle > 0.0 && largest > FAR * middle).then(|| {
        format!("scale {at} is {largest:.3e}, {:.0e} times the median of the layer", largest / middle)
    })
}

/// The middle value; 0 of nothing.
fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}
