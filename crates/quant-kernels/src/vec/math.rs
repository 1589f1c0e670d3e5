//! Exponentials as polynomials: straight-line code that compiles to vectors and rounds alike everywhere.

/// `e^x` with an error below 1.06 ulp where the result is normal (measured over all such `x`), 0 and infinity
/// beyond the range, NaN for NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln(2) / 2`; `e^r` is a polynomial of degree 6, minimax in relative error
/// (1.9e-9); the scaling by `2^n` rounds once, also into subnormals.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Beyond these the result is 0 or infinity anyway. Comparisons with NaN are false and keep it.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    // Adding 1.5 * 2^23 leaves the rounded number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-std::f32::consts::LN_2, x);
    // What ln 2 rounded to f32 lacks.
    let r = n.mul_add(1.904_654_3e-9, r);
    let p = 1.383_680_4e-3_f32;
    let p = p.mul_add(r, 8.374_858e-3);
    let p = p.mul_add(r, 4.166_823e-2);
    let p = p.mul_add(r, 1.666_642e-1);
    let p = p.mul_add(r, 4.999_999e-1);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    // 2^n in two factors, each in range.
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

/// `e^x` in f64 with an error below 2 ulp, 0 and infinity beyond the range, NaN for NaN. As [`exp`], with degree
/// 12 (relative error 4e-20 before rounding).
#[inline(always)]
pub(crate) fn exp_f64(x: f64) -> f64 {
    let x = if x > 710.0 { 710.0 } else { x };
    let x = if x < -746.0 { -746.0 } else { x };
    // 1.5 * 2^52
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let shifted = x.mul_add(std::f64::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-std::f64::consts::LN_2, x);
    // What ln 2 rounded to f64 lacks.
    let r = n.mul_add(-2.319_046_813_846_299_6e-17, r);
    let p = 2.083_199_552_863_907_6e-9_f64;
    let p = p.mul_add(r, 2.511_466_212_114_007_4e-8);
    let p = p.mul_add(r, 2.755_757_453_797_532e-7);
    let p = p.mul_add(r, 2.755_722_565_583_819_3e-6);
    let p = p.mul_add(r, 2.480_158_691_453_974_8e-5);
    let p = p.mul_add(r, 1.984_126_989_083_568e-4);
    let p = p.mul_add(r, 1.388_888_888_927_848_7e-3);
    let p = p.mul_add(r, 8.333_333_333_309_99e-3);
    let p = p.mul_add(r, 4.166_666_666_666_593e-2);
    let p = p.mul_add(r, 1.666_666_666_666_67e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    let n = (shifted.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
    let half = n >> 1;
    let power = |n: i64| f64::from_bits((n.wrapping_add(1023) as u64) << 52);
    p * power(half) * power(n.wrapping_sub(half))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The standard normal distribution beyond `|x|`, `erfc(|x| / sqrt 2) / 2`, with a relative error below 5e-7
/// down to 1e-35.
///
/// `e^(x^2/2) erfc(x / sqrt 2) = t Q(t)` with `t = 1 / (1 + 0.34375 x)` and `Q` a polynomial of degree 8, minimax
/// in relative error on `0 <= x <= 14.3` (2.4e-8), beyond which the result is 0. The square is taken in two parts,
/// since the exponential would magnify its rounding error.
#[inline(always)]
pub(crate) fn normal_tail(x: f32) -> f32 {
    let x = x.abs();
    let t = 1.0 / x.mul_add(0.343_75, 1.0);
    let q = -5.534_338_6e-2_f32;
    let q = q.mul_add(t, 2.864_317_6e-1);
    let q = q.mul_add(t, -5.409_639e-1);
    let q = q.mul_add(t, 3.792_024_9e-1);
    let q = q.mul_add(t, -7.691_742e-2);
    let q = q.mul_add(t, 2.246_477_3e-1);
    let q = q.mul_add(t, 2.336_378_2e-1);
    let q = q.mul_add(t, 2.750_645_3e-1);
    let q = q.mul_add(t, 2.742_404_4e-1);
    let square = x * x;
    let rest = x.mul_add(x, -square);
    // Infinity minus infinity must not become NaN where the result is 0.
    let rest = if square > 1e4 { 0.0 } else { rest };
    let gauss = exp(-0.5 * square);
    0.5 * t * q * (-0.5 * rest).mul_add(gauss, gauss)
}
