//! Whether columns lie in the order of the features that they multiply.

use ndarray::{ArrayView2, Axis};

/// Orders in which programs unpack eight codes that share a word, other than the right one: `order[i]` is the column
/// that is found at place `i`. Those of AWQ's two orders, of exchanged neighbours, halves and ends.
pub(super) const ORDERS: [[usize; 8]; 5] = [
    [0, 2, 4, 6, 1, 3, 5, 7],
    [0, 4, 1, 5, 2, 6, 3, 7],
    [1, 0, 3, 2, 5, 4, 7, 6],
    [4, 5, 6, 7, 0, 1, 2, 3],
    [7, 6, 5, 4, 3, 2, 1, 0],
];

/// Training gives a feature one size wherever it is met: the column of `down_proj` that reads a neuron grows with the
/// row of `up_proj` that writes it, and columns behind a norm with its gains. So the logarithms of the two sizes go
/// together, feature by feature, and if columns were unpacked in another order, they do so after the columns are put
/// back from it.
#[derive(Debug, Default)]
pub(super) struct ColumnStatistics {
    /// Sums of products of standardised sizes: as stored, then put back from each of the [`ORDERS`].
    products: [f64; 1 + ORDERS.len()],
    features: usize,
}

impl ColumnStatistics {
    /// Adds the columns of `w` `[out, in]` and what belongs to each, `[in]`, from elsewhere.
    pub(super) fn add(&mut self, w: ArrayView2<'_, f32>, beside: &[f64]) {
        let columns = w.ncols();
        if beside.len() != columns || !columns.is_multiple_of(8) {
            return;
        }
        let (Some(sizes), Some(beside)) = (standardised(&sizes(w, Axis(0))), standardised(beside)) else {
            return;
        };
        self.features += columns;
        self.products[0] += sizes.iter().zip(&beside).map(|(a, b)| a * b).sum::<f64>();
        for (product, order) in self.products[1..].iter_mut().zip(&ORDERS) {
            let at = |place: usize| place / 8 * 8 + order[place % 8];
            *product += sizes.iter().enumerate().map(|(place, size)| size * beside[at(place)]).sum::<f64>();
        }
    }

    /// Correlation of the columns as they are stored.
    pub(super) fn stored(&self) -> f64 {
        self.products[0] / self.features.max(1) as f64
    }

    /// The best of the other orders: its place in [`ORDERS`] and its correlation.
    pub(super) fn other(&self) -> (usize, f64) {
        let others = self.products[1..].iter().copied().enumerate();
        let (place, best) = others.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
        (place, best / self.features.max(1) as f64)
    }

    /// True if the columns certainly belong in another order. Random weights show none.
    pub(super) fn is_other(&self) -> bool {
        self.features >= 512 && self.other().1 > 0.35 && self.other().1 > self.stored() + 0.2
    }
}

/// Root mean square of each column (along `Axis(0)`) or row (along `Axis(1)`), as its logarithm.
pub(super) fn sizes(w: ArrayView2<'_, f32>, along: Axis) -> Vec<f64> {
    let n = w.len_of(along).max(1) as f64;
    let squares = w.fold_axis(along, 0.0, |sum, x| sum + f64::from(*x) * f64::from(*x));
    squares.iter().map(|sum| (sum / n).sqrt().ln()).collect()
}

/// With mean 0 and variance 1. `None` if that is not possible.
fn standardised(values: &[f64]) -> Option<Vec<f64>> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    let possible = deviation.is_finite() && deviation > 0.0;
    possible.then(|| values.iter().map(|v| (v - mean) / deviation).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    #[test]
    fn columns_in_another_order_are_put_back() {
        let size = |c: usize| 1.0 + (c * 37 % 64) as f32;
        let right = Array2::from_shape_fn((2, 512), |(_, c)| size(c));
        let beside = sizes(right.view(), Axis(0));
        let mut statistics = ColumnStatistics::default();
        statistics.add(right.view(), &beside);
        assert!((statistics.stored() - 1.0).abs() < 1e-9 && !statistics.is_other());
        for (number, order) in ORDERS.iter().enumerate() {
            let mixed = Array2::from_shape_fn((2, 512), |(_, c)| size(c / 8 * 8 + order[c % 8]));
            let mut statistics = ColumnStatistics::default();
            statistics.add(mixed.view(), &beside);
            assert!(statistics.is_other(), "{order:?}");
            assert_eq!(statistics.other().0, number);
        }
    }
}
