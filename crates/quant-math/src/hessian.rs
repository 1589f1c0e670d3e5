//! Second moments of a layer's input: `H = 2/n Σ x xᵀ`.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use quant_kernels::{ShapeError, mirror_upper_to_lower, syrk_tn_acc};
use rayon::prelude::*;

/// The sum while calibration data comes in; [`HessianSum::finish`] makes it a [`Hessian`].
#[derive(Clone, Debug)]
pub struct HessianSum {
    /// `Σ x xᵀ` `[k, k]`, upper triangle only.
    upper: Array2<f32>,
    rows: usize,
}

impl HessianSum {
    /// An empty sum for inputs of `k` features.
    pub fn new(k: usize) -> Self {
        Self { upper: Array2::zeros((k, k)), rows: 0 }
    }

    /// Adds a batch of input vectors. `x`: `[t, k]`.
    ///
    /// The bits of the sum depend on how the vectors are cut into batches, so callers keep to a fixed cut.
    pub fn accumulate(&mut self, x: ArrayView2<'_, f32>) -> Result<(), ShapeError> {
        syrk_tn_acc(x, 1.0, self.upper.view_mut())?;
        self.rows += x.nrows();
        Ok(())
    }

    /// Number of input vectors seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Divides by half the number of vectors and fills the lower triangle, in place.
    pub fn finish(mut self) -> Hessian {
        let scale = if self.rows == 0 { 0.0 } else { (2.0 / self.rows as f64) as f32 };
        self.upper.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(i, mut row)| {
            row.iter_mut().skip(i).for_each(|h| *h *= scale);
        });
        mirror_upper_to_lower(self.upper.view_mut()).expect("the matrix is square");
        Hessian { matrix: self.upper, rows: self.rows }
    }
}

/// `H = 2/n Σ x xᵀ` of `n` input vectors, as GPTQ defines it.
///
/// Damping is relative to the diagonal, so the factor 2 and the division only matter for the losses reported.
#[derive(Clone, Debug)]
pub struct Hessian {
    /// `[k, k]`, symmetric, both triangles filled.
    pub matrix: Array2<f32>,
    /// Number of input vectors, `n`.
    pub rows: usize,
}

impl Hessian {
    /// Number of input features, `k`.
    pub fn features(&self) -> usize {
        self.matrix.ncols()
    }
}

/// Mean of the diagonal of `h`, summed in f64.
pub fn mean_diagonal(h: ArrayView2<'_, f32>) -> f64 {
    let diag = h.diag();
    if diag.is_empty() { 0.0 } else { diag.iter().map(|&d| f64::from(d)).sum::<f64>() / diag.len() as f64 }
}

/// Features that no input vector ever activated: those with a zero on the diagonal.
pub fn dead_features(h: ArrayView2<'_, f32>) -> Vec<usize> {
    h.diag().iter().enumerate().filter(|&(_, &d)| d == 0.0).map(|(k, _)| k).collect()
}

/// Width of the column strips that [`permute_symmetric`] moves rows in; a strip of a row is two pages.
const STRIP: usize = 2048;

/// Applies `h[i, j] <- h[perm[i], perm[j]]` in place, with a row of scratch per thread. `h`: `[k, k]`.
///
/// Panics unless `perm` is a permutation of `0..k` and `h` has contiguous rows.
pub fn permute_symmetric(mut h: ArrayViewMut2<'_, f32>, perm: &[u32]) {
    assert_eq!(h.dim(), (perm.len(), perm.len()), "one index per row and column");
    h.axis_chunks_iter_mut(Axis(1), STRIP).into_par_iter().for_each(|strip| permute_rows(strip, perm));
    permute_columns(h, perm);
}

/// Applies `m[i, :] <- m[perm[i], :]` by swaps along each cycle.
fn permute_rows(mut m: ArrayViewMut2<'_, f32>, perm: &[u32]) {
    let mut done = vec![false; perm.len()];
    for start in 0..perm.len() {
        let mut to = start;
        while !done[to] {
            done[to] = true;
            let from = perm[to] as usize;
            if from != start {
                let (mut low, mut high) = m.view_mut().split_at(Axis(0), to.max(from));
                let (mut a, mut b) = (low.row_mut(to.min(from)), high.row_mut(0));
                a.iter_mut().zip(&mut b).for_each(|(a, b)| std::mem::swap(a, b));
            }
            to = from;
        }
    }
}

/// Applies `m[:, j] <- m[:, perm[j]]` in place. `m`: `[n, k]` with contiguous rows.
pub fn permute_columns(mut m: ArrayViewMut2<'_, f32>, perm: &[u32]) {
    assert_eq!(m.ncols(), perm.len(), "one index per column");
    m.axis_iter_mut(Axis(0)).into_par_iter().for_each_init(
        || vec![0.0; perm.len()],
        |old, mut row| {
            let row = row.as_slice_mut().expect("rows are contiguous");
            old.copy_from_slice(row);
            row.iter_mut().zip(perm).for_each(|(new, &from)| *new = old[from as usize]);
        },
    );
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_sum_is_that_of_outer_products() {
        let x = Array2::from_shape_fn((7, 5), |(i, j)| ((i * 5 + j * 3) % 11) as f32 - 5.0);
        let mut sum = HessianSum::new(5);
        let (first, second) = x.view().split_at(Axis(0), 3);
        sum.accumulate(first).unwrap();
        sum.accumulate(second).unwrap();
        assert_eq!(sum.rows(), 7);
        assert!(sum.accumulate(Array2::zeros((1, 4)).view()).is_err());
        let h = sum.finish();
        // Small integers: the products and sums are exact, the scaling rounds once.
        let exact = x.t().dot(&x);
        for (&h, &e) in h.matrix.iter().zip(&exact) {
            assert_eq!(h, e * (2.0f64 / 7.0) as f32);
        }
    }

    #[test]
    fn no_input_makes_every_feature_dead() {
        let h = HessianSum::new(3).finish();
        assert_eq!(dead_features(h.matrix.view()), [0, 1, 2]);
        assert_eq!(mean_diagonal(h.matrix.view()), 0.0);
        assert_eq!(mean_diagonal(Array2::zeros((0, 0)).view()), 0.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn permuting_in_place_gathers_rows_and_columns(
            perm in (0u32..40).prop_flat_map(|n| Just((0..n).collect::<Vec<_>>()).prop_shuffle())
        ) {
            let n = perm.len();
            let h = Array2::from_shape_fn((n, n), |(i, j)| (i * n + j) as f32);
            let mut moved = h.clone();
            permute_symmetric(moved.view_mut(), &perm);
            for ((i, j), &v) in moved.indexed_iter() {
                prop_assert_eq!(v, h[[perm[i] as usize, perm[j] as usize]]);
            }
        }
    }
}
