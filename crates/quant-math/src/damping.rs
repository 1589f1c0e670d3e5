//! Factoring a Hessian that may need help to be positive definite.

use ndarray::ArrayViewMut2;
use quant_kernels::mirror_upper_to_lower;

use crate::cholesky::Cholesky;
use crate::hessian::mean_diagonal;

/// Rounds with an absolute floor under the diagonal, after relative damping alone has failed.
const FLOORS: usize = 6;

/// The first floor, as a fraction of the largest diagonal element; each next is ten times the one before.
const FIRST_FLOOR: f64 = 1e-6;

/// How much is added to the diagonal of a Hessian, as a fraction of its mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Damping {
    /// What is tried first.
    pub initial: f64,
    /// Step by which it grows, below 1, while the matrix is not positive definite; 0 for no growth.
    pub increment: f64,
}

/// What it took to factor a Hessian.
#[derive(Clone, Debug, PartialEq)]
pub struct Damped {
    /// The damping that succeeded.
    pub damp: f64,
    /// The floor that was added first; normally 0.
    pub floor: f64,
    /// What was added to the diagonal in all, where no element was below the floor.
    pub added: f64,
    /// Factorizations that failed.
    pub retries: usize,
    /// The diagonal as it was, for [`restore`].
    pub diagonal: Vec<f32>,
}

/// A Hessian that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DampingError {
    /// It holds NaN or infinity.
    #[error("the Hessian is not finite")]
    NonFinite,
    /// Nothing makes it positive definite.
    #[error("the Hessian is not positive definite at any damping")]
    NotPositiveDefinite,
}

/// Puts the reverse factor of the damped `h` into its upper triangle, with as little damping as succeeds.
///
/// Tried in turn: `damp = initial, initial + increment, ...` below 1; then the same with a floor of `1e-6` to `1e-1`
/// of the largest diagonal element added first. Success is monotone in `damp`, so the least one is found by bisection.
/// `h`: `[k, k]`, both triangles filled. The strict lower triangle is kept, and with it everything [`restore`] needs:
/// a second matrix is never made.
pub fn factor_damped(
    mut h: ArrayViewMut2<'_, f32>,
    damping: Damping,
    backend: &dyn Cholesky,
) -> Result<Damped, DampingError> {
    let diagonal = h.diag().to_vec();
    let largest = diagonal.iter().fold(0.0f64, |a, &d| a.max(f64::from(d.abs())));
    // NaN is lost in the maximum, but not in the sum.
    if !diagonal.iter().sum::<f32>().is_finite() {
        return Err(DampingError::NonFinite);
    }
    let (mut retries, mut touched) = (0, false);
    for floor in 0..=FLOORS {
        let floor =
            if floor == 0 { 0.0 } else { FIRST_FLOOR * 10f64.powi(floor as i32 - 1) * largest.max(1e-30) };
        let raised = |d: f32| if floor > 0.0 { (f64::from(d) + floor).max(floor) } else { f64::from(d) };
        let mut attempt = |damp: f64| {
            // Whether the last attempt failed or not, it has overwritten the upper triangle.
            if std::mem::replace(&mut touched, true) {
                restore(h.view_mut(), &diagonal);
            }
            h.diag_mut().iter_mut().zip(&diagonal).for_each(|(h, &d)| *h = raised(d) as f32);
            let added = damp * mean_diagonal(h.view());
            h.diag_mut().iter_mut().for_each(|h| *h += added as f32);
            let factored = backend.reverse_factor(h.view_mut()).is_ok();
            retries += usize::from(!factored);
            factored
        };
        if let Some(damp) = least_damping(damping, &mut attempt) {
            let mean = diagonal.iter().map(|&d| raised(d)).sum::<f64>() / diagonal.len().max(1) as f64;
            return Ok(Damped { damp, floor, added: floor + damp * mean, retries, diagonal });
        }
        restore(h.view_mut(), &diagonal);
        if h.iter().any(|v| !v.is_finite()) {
            return Err(DampingError::NonFinite);
        }
    }
    Err(DampingError::NotPositiveDefinite)
}

/// The least damping on the grid whose attempt succeeds; that attempt is the last one made.
fn least_damping(damping: Damping, attempt: &mut dyn FnMut(f64) -> bool) -> Option<f64> {
    let mut grid = vec![damping.initial];
    if damping.increment > 0.0 {
        // At most a thousand steps, whatever the options say.
        let next = |damp: &f64| Some(damp + damping.increment.max(1e-3)).filter(|&damp| damp < 1.0);
        grid.extend(std::iter::successors(next(&damping.initial), next));
    }
    if attempt(grid[0]) {
        return Some(grid[0]);
    }
    let mut worst = 0;
    let mut best = grid.len() - 1;
    if best == 0 || !attempt(grid[best]) {
        return None;
    }
    let mut factored = best;
    while best - worst > 1 {
        let middle = (worst + best) / 2;
        if attempt(grid[middle]) {
            (best, factored) = (middle, middle);
        } else {
            (worst, factored) = (middle, worst);
        }
    }
    // A failure after the best success has undone it.
    (factored == best || attempt(grid[best])).then_some(grid[best])
}

/// Makes `h` what it was before [`factor_damped`], from its strict lower triangle and the diagonal kept.
pub fn restore(mut h: ArrayViewMut2<'_, f32>, diagonal: &[f32]) {
    mirror_upper_to_lower(h.view_mut().reversed_axes()).expect("the matrix is square");
    h.diag_mut().iter_mut().zip(diagonal).for_each(|(h, &d)| *h = d);
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::cholesky::Blocked;
    use crate::cholesky::tests::positive_definite;

    const DEFAULT: Damping = Damping { initial: 0.05, increment: 0.01 };

    fn factor(h: &Array2<f32>) -> Result<Damped, DampingError> {
        factor_damped(h.clone().view_mut(), DEFAULT, &Blocked)
    }

    #[test]
    fn a_good_hessian_takes_one_attempt() {
        let h = positive_definite(40, 20, 0.0, 1);
        let mut r = h.clone();
        let damped = factor_damped(r.view_mut(), DEFAULT, &Blocked).unwrap();
        assert_eq!((damped.damp, damped.floor, damped.retries), (0.05, 0.0, 0));
        restore(r.view_mut(), &damped.diagonal);
        assert_eq!(r, h);
    }

    #[test]
    fn damping_grows_to_the_least_that_succeeds() {
        // Smallest eigenvalue -0.3 with a unit diagonal.
        let mut h = Array2::<f32>::eye(2);
        (h[[0, 1]], h[[1, 0]]) = (1.3, 1.3);
        let mut r = h.clone();
        let damped = factor_damped(r.view_mut(), DEFAULT, &Blocked).unwrap();
        // At 0.30 the smallest eigenvalue is zero up to rounding of the f32 matrix.
        assert!((0.295..0.315).contains(&damped.damp), "{}", damped.damp);
        assert_eq!(damped.floor, 0.0);
        assert!(damped.retries > 0);
        // What is left is the factor of the damped matrix, not of a failed attempt.
        let damp = 1.0 + damped.damp;
        assert!((f64::from(r[[1, 1]]).powi(2) - damp).abs() < 1e-6);
        assert!((f64::from(r[[0, 1]]) * f64::from(r[[1, 1]]) - 1.3).abs() < 1e-6);
        restore(r.view_mut(), &damped.diagonal);
        assert_eq!(r, h);
    }

    #[test]
    fn a_floor_helps_where_damping_cannot() {
        // All damping is relative to a mean of zero.
        let h = Array2::zeros((3, 3));
        assert!(factor(&h).unwrap().floor > 0.0);
        // A negative element too small for the mean to make up for it at any damping.
        let mut h = Array2::<f32>::eye(100) * 1e-3;
        h[[50, 50]] = -1.0;
        let damped = factor(&h).unwrap();
        assert!(damped.floor > 0.0);
        assert_eq!(damped.retries, 2, "both ends of the range of dampings without a floor");
    }

    #[test]
    fn hopeless_hessians_are_named() {
        let mut h = positive_definite(5, 10, 0.1, 1);
        (h[[0, 1]], h[[1, 0]]) = (1e6, 1e6);
        assert_eq!(factor(&h), Err(DampingError::NotPositiveDefinite));
        (h[[0, 1]], h[[1, 0]]) = (f32::NAN, f32::NAN);
        assert_eq!(factor(&h), Err(DampingError::NonFinite));
        h[[2, 2]] = f32::INFINITY;
        assert_eq!(factor(&h), Err(DampingError::NonFinite));
    }
}
