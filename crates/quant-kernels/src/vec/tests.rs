//! Against f64 references with derived bounds, and every instruction set against the others.

use half::{bf16, f16};
use proptest::prelude::*;
use rayon::prelude::*;

use super::*;
use crate::isa;

const EPS: f64 = f32::EPSILON as f64;

/// Runs `f` on every instruction set and demands equal results.
fn same_everywhere<R: PartialEq + std::fmt::Debug>(f: impl Fn() -> R) -> R {
    let expected = isa::with_cap(isa::Isa::Scalar, &f);
    for &cap in isa::supported() {
        assert_eq!(isa::with_cap(cap, &f), expected, "{cap}");
    }
    expected
}

/// `f` in place on a copy; bits, so that zeros compare, with one NaN for all, since their bits are not defined.
fn mapped(x: &[f32], f: impl Fn(&mut [f32])) -> Vec<f32> {
    let bits = same_everywhere(|| {
        let mut x = x.to_vec();
        f(&mut x);
        x.iter().map(|x| if x.is_nan() { f32::NAN } else { *x }.to_bits()).collect::<Vec<_>>()
    });
    bits.into_iter().map(f32::from_bits).collect()
}

/// Every `step`-th f32 between two positive numbers, with both signs.
fn both_signs(from: f32, to: f32, step: usize) -> Vec<f32> {
    let magnitudes = (from.to_bits()..=to.to_bits()).step_by(step).map(f32::from_bits);
    magnitudes.flat_map(|x| [x, -x]).collect()
}

fn ulp(x: f32) -> f64 {
    let x = x.abs().max(f32::MIN_POSITIVE);
    f64::from(f32::from_bits(x.to_bits() + 1)) - f64::from(x)
}

/// Largest error of [`math::exp`] in units of the last place, over the given arguments.
fn exp_error(arguments: impl Iterator<Item = f32>) -> f64 {
    arguments
        .map(|x| {
            let (found, exact) = (math::exp(x), libm::exp(f64::from(x)));
            (f64::from(found) - exact).abs() / ulp(exact as f32)
        })
        .fold(0.0, f64::max)
}

#[test]
fn exponentials_keep_their_bound() {
    let arguments = both_signs(1e-10, 88.7, 9973).into_iter().chain(both_signs(87.0, 88.7, 101));
    assert!(exp_error(arguments) < 1.06);
    assert_eq!(exp_error([0.0, -0.0].into_iter()), 0.0);
    for (x, expected) in [
        (f32::INFINITY, f32::INFINITY),
        (f32::NEG_INFINITY, 0.0),
        (89.0, f32::INFINITY),
        (-104.5, 0.0),
        (f32::MAX, f32::INFINITY),
        (f32::MIN, 0.0),
    ] {
        assert_eq!(math::exp(x), expected, "{x}");
    }
    assert!(math::exp(f32::NAN).is_nan());
    for x in [-100.0f32, -95.5, -88.0] {
        let subnormal = math::exp(x);
        assert!(
            (f64::from(subnormal) - libm::exp(f64::from(x))).abs() <= f64::from(f32::from_bits(1)),
            "{x}"
        );
    }
}

#[test]
#[ignore = "all arguments take two minutes of two cores"]
fn exponentials_keep_their_bound_everywhere() {
    let finite = (0..=u32::MAX).into_par_iter().map(f32::from_bits).filter(|x| x.abs() < 87.3);
    let (error, x) = finite
        .map(|x| (exp_error(std::iter::once(x)), x))
        .reduce(|| (0.0, 0.0), |a, b| if a.0 > b.0 { a } else { b });
    assert!(error < 1.06, "{error} at {x}");
}

#[test]
fn exponentials_in_f64_keep_their_bound() {
    let mut x = -745.0f64;
    while x < 709.7 {
        let (found, exact) = (math::exp_f64(x), libm::exp(x));
        // libm's own error is below 1 ulp; below 1e-308 the unit is that of the subnormals.
        let unit = exact.max(f64::MIN_POSITIVE) * f64::EPSILON;
        assert!((found - exact).abs() <= 3.0 * unit, "{x}: {found} {exact}");
        x += 0.037_11;
    }
    assert_eq!(math::exp_f64(0.0), 1.0);
    assert_eq!(math::exp_f64(-800.0), 0.0);
    assert_eq!(math::exp_f64(800.0), f64::INFINITY);
    assert!(math::exp_f64(f64::NAN).is_nan());
}

#[test]
fn activations_are_near_their_formulas() {
    let x = both_signs(1e-6, 30.0, 20011);
    type Case = (fn(&mut [f32]), fn(f64) -> f64, f64);
    let cases: [Case; 3] = [
        // exp within 1.06 ulp, then an addition, a division and a product.
        (silu, |x| x / (1.0 + libm::exp(-x)), 3.0),
        // The argument of the exponential has a relative error of 3 eps, which its size magnifies: compare absolutely.
        (
            gelu_tanh,
            |x| {
                0.5 * x
                    * (1.0 + libm::tanh((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)))
            },
            3.0,
        ),
        // normal_tail within 5e-7 = 4.2 eps, relative to at most a half; then a subtraction and a product.
        (gelu_erf, |x| 0.5 * x * libm::erfc(-x / std::f64::consts::SQRT_2), 4.0),
    ];
    for (f, exact, bound) in cases {
        for (x, found) in x.iter().zip(mapped(&x, f)) {
            let error = (f64::from(found) - exact(f64::from(*x))).abs();
            assert!(error <= bound * EPS * f64::from(x.abs()), "{x}: {found} {}", exact(f64::from(*x)));
        }
    }
    assert_eq!(mapped(&[-1.0, -0.0, 0.0, 2.0], relu), [0.0, 0.0, 0.0, 2.0]);
    for f in [silu, gelu_tanh, gelu_erf, relu] {
        let found = mapped(&[f32::NAN, f32::INFINITY], f);
        assert!(found[0].is_nan());
        assert_eq!(found[1], f32::INFINITY);
    }
}

#[test]
fn tails_of_the_normal_distribution_are_relative() {
    for x in (0..1250).map(|i| i as f32 * 0.01) {
        let exact = 0.5 * libm::erfc(f64::from(x) / std::f64::consts::SQRT_2);
        let error = (f64::from(math::normal_tail(x)) - exact).abs() / exact;
        assert!(error < 5e-7, "{x}: {error}");
    }
    assert_eq!(math::normal_tail(f32::INFINITY), 0.0);
}

#[test]
fn every_16_bit_number_converts_as_in_half() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let mut out = vec![0.0; halves.len()];
    for &cap in isa::supported() {
        isa::with_cap(cap, || {
            f16_to_f32(&halves, &mut out).unwrap();
            assert!(halves.iter().zip(&out).all(|(x, y)| x.to_f32().to_bits() == y.to_bits()), "{cap}");
            bf16_to_f32(&brains, &mut out).unwrap();
            assert!(brains.iter().zip(&out).all(|(x, y)| x.to_f32().to_bits() == y.to_bits()), "{cap}");
        });
    }
}

#[test]
fn rounding_to_16_bits_is_that_of_half() {
    // Every exponent and sign with mantissas around every tie, and some from all over.
    let ties = (0..=0x1ff_u32).flat_map(|top| {
        [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0x8001, 0x7f_ffff]
            .map(|mantissa| f32::from_bits(top << 23 | mantissa))
    });
    let x: Vec<f32> = ties.chain((0..=u32::MAX).step_by(65_521).map(f32::from_bits)).collect();
    let (mut halves, mut brains) = (vec![f16::ZERO; x.len()], vec![bf16::ZERO; x.len()]);
    for &cap in isa::supported() {
        isa::with_cap(cap, || {
            f32_to_f16(&x, &mut halves).unwrap();
            f32_to_bf16(&x, &mut brains).unwrap();
        });
        for ((x, half), brain) in x.iter().zip(&halves).zip(&brains) {
            assert_eq!(half.to_bits(), f16::from_f32_const(*x).to_bits(), "{x} {:#x} {cap}", x.to_bits());
            assert_eq!(brain.to_bits(), bf16::from_f32(*x).to_bits(), "{x} {:#x} {cap}", x.to_bits());
        }
    }
}

#[test]
fn maxima_and_masks() {
    assert_eq!(absmax(&[]), 0.0);
    assert_eq!(absmax(&[1.0, -3.0, 2.0]), 3.0);
    assert_eq!(absmax(&[1.0, f32::NEG_INFINITY]), f32::INFINITY);
    assert!(absmax(&[f32::INFINITY, f32::NAN, 1.0]).is_nan());
    let mut row = [5.0, 1.0, 1.0, 7.0];
    softmax(&mut row, 1..3).unwrap();
    assert_eq!(row, [0.0, 0.5, 0.5, 0.0]);
    softmax(&mut row, 2..2).unwrap();
    assert_eq!(row, [0.0; 4]);
    assert!(softmax(&mut row, 0..5).is_err());
    assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
    assert_eq!(log_sum_exp(&[f32::NEG_INFINITY]), f64::NEG_INFINITY);
    assert_eq!(log_sum_exp(&[3.0]), 3.0);
}

#[test]
fn lengths_are_checked() {
    let mut three = [0.0; 3];
    let error = |operand, expected, found| Err(ShapeError::Length { operand, expected, found });
    assert_eq!(dot(&[0.0; 3], &[0.0; 2]).map(|_| ()), error("y", 3, 2));
    assert_eq!(rms_norm(&[0.0; 3], &[0.0; 2], 1e-5, &mut three), error("weight", 3, 2));
    assert_eq!(layer_norm(&[0.0; 3], &[0.0; 3], Some(&[]), 1e-5, &mut three), error("bias", 3, 0));
    assert_eq!(rope(&mut three, &[0.0; 1], &[0.0; 1]), error("heads", 2, 3));
}

proptest! {
    #![proptest_config(crate::at_most(64))]

    #[test]
    fn reductions_stay_within_their_bounds(x in prop::collection::vec(-9.0f32..9.0, 1..200), seed in any::<u32>()) {
        let y: Vec<f32> = x.iter().rev().map(|x| x * 0.7 + (seed % 7) as f32).collect();
        let n = x.len() as f64;
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (wx, wy) = (wide(&x), wide(&y));

        // n / 16 fused steps in a lane and 4 folds.
        let exact: f64 = wx.iter().zip(&wy).map(|(x, y)| x * y).sum();
        let size: f64 = wx.iter().zip(&wy).map(|(x, y)| (x * y).abs()).sum();
        let found = same_everywhere(|| dot(&x, &y).unwrap().to_bits());
        prop_assert!((f64::from(f32::from_bits(found)) - exact).abs() <= (n / 16.0 + 5.0) * EPS * size);

        let exact = libm::log(wx.iter().map(|x| libm::exp(*x)).sum());
        let found = f64::from_bits(same_everywhere(|| log_sum_exp(&x).to_bits()));
        prop_assert!((found - exact).abs() <= 1e-13);

        // The largest error: exp of a difference that is rounded, |difference| <= 18, then a sum and a division.
        let total: f64 = wx.iter().map(|x| libm::exp(*x)).sum();
        let found = mapped(&x, |x| softmax(x, 0..x.len()).unwrap());
        for (x, found) in wx.iter().zip(found) {
            let exact = libm::exp(*x) / total;
            prop_assert!((f64::from(found) - exact).abs() <= (2.0 * 18.0 / 2.0 + n / 16.0 + 8.0) * EPS * exact);
        }

        // One rounding of the factor and two products.
        let scale = 1.0 / (wx.iter().map(|x| x * x).sum::<f64>() / n + 1e-5f32 as f64).sqrt();
        let found = mapped(&x, |out| rms_norm(&x, &y, 1e-5, out).unwrap());
        for ((x, y), found) in wx.iter().zip(&wy).zip(found) {
            prop_assert!((f64::from(found) - x * scale * y).abs() <= 2.0 * EPS * (x * scale * y).abs());
        }

        let mean = wx.iter().sum::<f64>() / n;
        let scale = 1.0 / (wx.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n + 1e-5f32 as f64).sqrt();
        let found = mapped(&x, |out| layer_norm(&x, &y, Some(&y), 1e-5, out).unwrap());
        for ((x, y), found) in wx.iter().zip(&wy).zip(found) {
            let exact = (x - mean) * scale * y + y;
            prop_assert!((f64::from(found) - exact).abs() <= 2.0 * EPS * ((x - mean) * scale * y).abs().max(y.abs()) + 1e-13);
        }

        let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        prop_assert_eq!(same_everywhere(|| absmax(&x).to_bits()), max.to_bits());
    }

    #[test]
    fn elementwise_operations_are_their_formulas(x in prop::collection::vec(-9.0f32..9.0, 0..80), a in -3.0f32..3.0) {
        let y: Vec<f32> = x.iter().rev().map(|x| x + 0.5).collect();
        let pairs = || x.iter().zip(&y);
        let found = mapped(&x, |x| add(x, &y).unwrap());
        prop_assert_eq!(found, pairs().map(|(x, y)| x + y).collect::<Vec<_>>());
        let found = mapped(&y, |y| axpy(a, &x, y).unwrap());
        prop_assert_eq!(found, pairs().map(|(x, y)| a.mul_add(*x, *y)).collect::<Vec<_>>());
        let activated = mapped(&x, silu);
        let found = mapped(&x, |x| silu_mul(x, &y).unwrap());
        prop_assert_eq!(found, activated.iter().zip(&y).map(|(x, y)| x * y).collect::<Vec<_>>());

        let half = x.len() / 2;
        let (cos, sin) = (&y[..half], &y[half..2 * half]);
        let found = mapped(&x[..2 * half], |head| rope(head, cos, sin).unwrap());
        for i in 0..half {
            prop_assert_eq!(found[i], x[i] * cos[i] - x[i + half] * sin[i]);
            prop_assert_eq!(found[i + half], x[i + half] * cos[i] + x[i] * sin[i]);
        }
    }
}
