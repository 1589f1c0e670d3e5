//! The same through LAPACK: an oracle for the default, and a yardstick.

use ndarray::{Array2, ArrayViewMut2};
use ndarray_linalg::error::LinalgError;
use ndarray_linalg::{Cholesky as _, FactorizeCInto, InverseCInto, UPLO};

use super::{Cholesky, NotPositiveDefinite, square};

/// LAPACK of the system (feature `lapack`). It copies the matrix, which the default does not, and its bits depend on
/// the library and its threads. Its errors do not name the column.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lapack;

impl Cholesky for Lapack {
    fn name(&self) -> &'static str {
        "lapack"
    }

    fn reverse_factor(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        let n = square(&h);
        let reversed = Array2::from_shape_fn((n, n), |(i, j)| h[[n - 1 - i, n - 1 - j]]);
        let l = lower_factor(reversed)?;
        (0..n).for_each(|i| (i..n).for_each(|j| h[[i, j]] = l[[n - 1 - i, n - 1 - j]]));
        Ok(())
    }

    fn factor(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        let l = lower_factor(h.to_owned())?;
        (0..square(&h)).for_each(|i| (0..=i).for_each(|j| h[[i, j]] = l[[i, j]]));
        Ok(())
    }

    fn upper_factor_of_inverse(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        self.inverse(h.view_mut())?;
        // `UᵀU = h⁻¹`, so that `Uᵀ` is its lower factor.
        let l = lower_factor(h.to_owned())?;
        h.assign(&l.t());
        Ok(())
    }

    fn inverse(&self, mut h: ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
        let n = square(&h);
        // Only the upper triangle counts.
        let symmetric = Array2::from_shape_fn((n, n), |(i, j)| h[[i.min(j), i.max(j)]]);
        let factored = symmetric.factorizec_into(UPLO::Lower).map_err(refused)?;
        h.assign(&factored.invc_into().map_err(refused)?);
        finite(&h)
    }
}

/// The lower factor, with zeros above; reads the lower triangle.
fn lower_factor(h: Array2<f32>) -> Result<Array2<f32>, NotPositiveDefinite> {
    if h.is_empty() {
        return Ok(h);
    }
    let mut l = h.cholesky(UPLO::Lower).map_err(refused)?;
    finite(&l.view_mut()).map(|()| l)
}

/// LAPACK does not always stop at a NaN.
fn finite(m: &ArrayViewMut2<'_, f32>) -> Result<(), NotPositiveDefinite> {
    match m.diag().iter().position(|d| !d.is_finite()) {
        Some(column) => Err(NotPositiveDefinite { column }),
        None => Ok(()),
    }
}

/// The library's error does not let the column through, so that it reads 0.
fn refused(_: LinalgError) -> NotPositiveDefinite {
    NotPositiveDefinite { column: 0 }
}
