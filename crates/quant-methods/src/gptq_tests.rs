use ndarray::Array2;
use proptest::prelude::*;
use quant_core::{GroupSize, Offset};
use quant_kernels::isa::{Isa, supported, with_cap};
use quant_math::HessianSum;

use super::*;
use crate::rtn::{Rtn, RtnOptions};

/// Uniform numbers in -1..1.
fn random(n: usize, k: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_simple_fn((n, k), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Correlated inputs as layers see them: a few directions shared by all features, some features much larger.
fn hessian(k: usize, seed: u64) -> Hessian {
    let rows = 2 * k;
    let mut x = random(rows, k, seed) + random(rows, 8, seed + 1).dot(&random(8, k, seed + 2));
    for (c, mut column) in x.columns_mut().into_iter().enumerate() {
        let scale = if c % 29 == 3 { 8.0 } else { 0.5 + (c * 7 % 13) as f32 / 13.0 };
        column.iter_mut().for_each(|x| *x *= scale);
    }
    let mut sum = HessianSum::new(k);
    sum.accumulate(x.view()).unwrap();
    sum.finish()
}

/// Half of `tr(E H Eᵀ)`: the mean of `‖E x‖²`.
fn output_error(w: &Array2<f32>, matrix: &quant_core::QuantizedMatrix, h: &Hessian) -> f64 {
    let e = w.mapv(f64::from) - matrix.dequantize().mapv(f64::from);
    (&e.dot(&h.matrix.mapv(f64::from)) * &e).sum() / 2.0
}

fn spec(bits: u8, group: GroupSize, symmetric: bool, options: &GptqOptions) -> QuantSpec {
    QuantSpec { bits, group, symmetric, ..Gptq::new(*options).default_spec() }
}

fn quantize(options: GptqOptions, spec: QuantSpec, w: &Array2<f32>, h: &Hessian) -> Quantized {
    let layers = vec![LayerWeights { w: w.clone(), spec }];
    Gptq::new(options)
        .quantize(layers, LayerStats { hessian: Some(h.clone()), ..LayerStats::default() })
        .unwrap()
        .remove(0)
}

/// Every combination of order and static groups.
fn every_option() -> impl Iterator<Item = GptqOptions> {
    [ColumnOrder::Natural, ColumnOrder::GroupAware, ColumnOrder::Activation].into_iter().flat_map(|order| {
        [false, true].map(|static_groups| GptqOptions { order, static_groups, ..GptqOptions::default() })
    })
}

#[test]
fn reports_and_specs_are_those_of_the_result() {
    let (n, k) = (35, 172);
    let (w, h) = (random(n, k, 1), hessian(k, 2));
    for options in every_option() {
        for (bits, group, symmetric) in [
            (4, GroupSize::Columns(32), true),
            (3, GroupSize::Columns(64), false),
            (2, GroupSize::Columns(16), false),
            (4, GroupSize::Columns(160), false),
            (8, GroupSize::Row, true),
        ] {
            let asked = spec(bits, group, symmetric, &options);
            let Quantized { matrix, report } = quantize(options, asked, &w, &h);
            matrix.validate().unwrap();
            // One group is in the order of activity whatever its columns are.
            let act_order = asked.act_order && group != GroupSize::Row;
            assert_eq!(matrix.spec(), QuantSpec { act_order, ..asked }, "{options:?}");
            assert!(matrix.scales.first_non_finite().is_none());

            let error = affine::square_error(w.view(), &matrix);
            let rel_error = affine::relative(error, affine::square_norm(w.view()));
            // The column loop subtracts and rounds once more than the f64 difference does.
            assert!((report.rel_error - rel_error).abs() <= 1e-6 * rel_error);
            let direct = output_error(&w, &matrix, &h);
            // The loss carries the rounding of the factor, 1e-5 relative to each feature's scale, and the difference
            // to the damped loss, which is at most a few times larger.
            let loss = report.loss.unwrap();
            assert!((loss - direct).abs() <= 1e-3 * direct, "{loss} {direct} {options:?} {asked:?}");
            assert_eq!((report.damp, report.retries, report.fallback), (Some(0.05), 0, None));
        }
    }
}

#[test]
fn quality_is_ordered_as_theory_says() {
    // Means over cases; each single case may go the other way.
    let (n, k, cases) = (48, 128, 6);
    let mean = |f: &dyn Fn(&Array2<f32>, &Hessian) -> f64| -> f64 {
        (0..cases).map(|case| f(&random(n, k, 10 * case), &hessian(k, 1000 + case)).ln()).sum::<f64>()
            / cases as f64
    };
    let group = GroupSize::Columns(32);
    for bits in [2, 3, 4] {
        let gptq = |order, symmetric, mse| {
            let options = GptqOptions { order, mse, ..GptqOptions::default() };
            mean(&|w, h| {
                output_error(w, &quantize(options, spec(bits, group, symmetric, &options), w, h).matrix, h)
            })
        };
        let rtn = |symmetric| {
            mean(&|w, h| {
                let spec = QuantSpec { bits, group, symmetric, ..QuantSpec::default() };
                let layers = vec![LayerWeights { w: w.clone(), spec }];
                let rtn = Rtn::new(RtnOptions::default());
                let quantized = rtn.quantize(layers, LayerStats::default()).unwrap().remove(0);
                output_error(w, &quantized.matrix, h)
            })
        };
        let natural = gptq(ColumnOrder::Natural, true, None);
        let group_aware = gptq(ColumnOrder::GroupAware, true, None);
        let activation = gptq(ColumnOrder::Activation, true, None);
        let asymmetric = gptq(ColumnOrder::Activation, false, None);
        assert!(natural < rtn(true) && asymmetric < rtn(false), "GPTQ beats rounding at {bits} bits");
        assert!(group_aware < natural, "order by groups helps at {bits} bits");
        assert!(activation < natural, "order by activity helps at {bits} bits");
        assert!(asymmetric <= activation, "zero points help at {bits} bits");
        if bits == 2 {
            assert!(
                gptq(ColumnOrder::Natural, true, Some(2.4)) < natural,
                "the range search helps at 2 bits"
            );
        }
    }
}

#[test]
fn layers_of_a_call_do_not_see_each_other() {
    let k = 96;
    let h = hessian(k, 5);
    let options = GptqOptions::default();
    // Group sizes differ, and with them the orders: the Hessian is restored in between.
    let groups = [GroupSize::Columns(16), GroupSize::Columns(32), GroupSize::Columns(16), GroupSize::Row];
    let weights: Vec<_> = (0..4).map(|i| random(20 + i, k, i as u64)).collect();
    let specs = groups.map(|group| spec(4, group, true, &options));
    let layers = weights.iter().zip(specs).map(|(w, spec)| LayerWeights { w: w.clone(), spec }).collect();
    let together = Gptq::new(options)
        .quantize(layers, LayerStats { hessian: Some(h.clone()), ..LayerStats::default() })
        .unwrap();
    for ((w, spec), together) in weights.iter().zip(specs).zip(together) {
        assert_eq!(quantize(options, spec, w, &h).matrix, together.matrix);
    }
}

#[test]
fn dead_features_become_zero() {
    let (n, k) = (12, 64);
    let mut h = hessian(k, 3);
    for dead in [0, 17, 40] {
        h.matrix.row_mut(dead).fill(0.0);
        h.matrix.column_mut(dead).fill(0.0);
    }
    let w = random(n, k, 8);
    for options in every_option() {
        for group in [GroupSize::Columns(16), GroupSize::Row] {
            let Quantized { matrix, report } = quantize(options, spec(4, group, true, &options), &w, &h);
            let back = matrix.dequantize();
            assert!(
                [0, 17, 40].iter().all(|&dead| back.column(dead).iter().all(|&v| v == 0.0)),
                "{options:?}"
            );
            let rel_error =
                affine::relative(affine::square_error(w.view(), &matrix), affine::square_norm(w.view()));
            assert!((report.rel_error - rel_error).abs() <= 1e-6 * rel_error);
        }
    }
}

#[test]
fn layers_without_usable_statistics_are_rounded() {
    let (n, k) = (5, 32);
    let w = random(n, k, 8);
    let rounded = {
        let layers = vec![LayerWeights { w: w.clone(), spec: QuantSpec::default() }];
        Rtn::new(RtnOptions { mse: GptqOptions::default().mse })
            .quantize(layers, LayerStats::default())
            .unwrap()
            .remove(0)
            .matrix
    };
    let good = hessian(k, 1);
    let with = |matrix: Array2<f32>, rows| Some(Hessian { matrix, rows });
    let mut nan = good.matrix.clone();
    nan[[3, 4]] = f32::NAN;
    nan[[4, 3]] = f32::NAN;
    let mut indefinite = good.matrix.clone();
    (indefinite[[0, 1]], indefinite[[1, 0]]) = (1e9, 1e9);
    for (hessian, reason) in [
        (None, Fallback::NoCalibration),
        (with(good.matrix.clone(), 0), Fallback::NoCalibration),
        (with(Array2::zeros((k, k)), 9), Fallback::NoCalibration),
        (with(nan, 9), Fallback::NonFiniteHessian),
        (with(indefinite, 9), Fallback::NotPositiveDefinite),
    ] {
        let layers = vec![LayerWeights { w: w.clone(), spec: QuantSpec::default() }; 2];
        for quantized in
            Gptq::default().quantize(layers, LayerStats { hessian, ..LayerStats::default() }).unwrap()
        {
            assert_eq!(quantized.report.fallback, Some(reason));
            assert_eq!(quantized.matrix, rounded);
        }
    }
}

#[test]
fn damping_that_grows_is_reported() {
    let k = 64;
    let mut h = hessian(k, 1);
    // A slightly indefinite matrix, as f32 sums over few tokens give.
    let mean = h.matrix.diag().mean().unwrap();
    h.matrix.diag_mut().iter_mut().for_each(|d| *d -= 0.2 * mean);
    let options = GptqOptions::default();
    let report =
        quantize(options, spec(4, GroupSize::Columns(16), true, &options), &random(8, k, 1), &h).report;
    assert!(report.damp.unwrap() > 0.05 && report.retries > 0 && report.fallback.is_none(), "{report:?}");
}

#[test]
fn bad_input_is_located() {
    let h = hessian(32, 1);
    let stats = || LayerStats { hessian: Some(h.clone()), ..LayerStats::default() };
    let layer = |w: &Array2<f32>| LayerWeights { w: w.clone(), spec: QuantSpec::default() };
    let good = random(4, 32, 1);
    let with = |value: f32| {
        let mut w = good.clone();
        w[[2, 30]] = value;
        Gptq::default().quantize(vec![layer(&good), layer(&w)], stats()).unwrap_err()
    };
    assert_eq!(
        with(f32::INFINITY),
        QuantizeError::NonFinite { layer: 1, row: 2, col: 30, value: f32::INFINITY }
    );
    assert!(matches!(with(f32::NAN), QuantizeError::NonFinite { layer: 1, row: 2, col: 30, .. }));
    assert!(matches!(with(-1e30), QuantizeError::ScaleOverflow { layer: 1, row: 2, col: 30, .. }));
    let wrong = Gptq::default().quantize(vec![layer(&random(4, 31, 1))], stats()).unwrap_err();
    assert_eq!(wrong, QuantizeError::StatsShape { layer: 0, expected: 32, found: 31 });
    let tensor =
        LayerWeights { spec: QuantSpec { group: GroupSize::Tensor, ..layer(&good).spec }, ..layer(&good) };
    assert_eq!(Gptq::default().quantize(vec![tensor], stats()).unwrap_err().layer(), 0);
}

#[test]
fn options_are_checked() {
    let refuses = |options: GptqOptions| {
        let gptq = Gptq::new(options);
        gptq.validate(&gptq.default_spec()).unwrap_err().to_string()
    };
    let default = GptqOptions::default();
    assert!(refuses(GptqOptions { damp: 0.0, ..default }).contains("damp is 0"));
    assert!(refuses(GptqOptions { damp: f64::NAN, ..default }).contains("damp is NaN"));
    assert!(refuses(GptqOptions { damp_increment: -0.1, ..default }).contains("damp_increment"));
    assert!(refuses(GptqOptions { block_size: 0, ..default }).contains("block_size"));
    assert!(refuses(GptqOptions { mse: Some(-1.0), ..default }).contains("mse"));
    let compat = GptqOptions { compat: Some(Compat::GptqModel), ..default };
    let odd = QuantSpec { group: GroupSize::Columns(96), ..QuantSpec::default() };
    assert!(Gptq::new(compat).validate(&odd).is_err());
    assert!(Gptq::new(default).validate(&odd).is_ok());
    assert!(Gptq::new(default).validate(&QuantSpec { act_order: true, ..odd }).is_err());
    assert!(Gptq::new(default).validate(&QuantSpec { bits: 1, ..odd }).is_err());
    let act_order = GptqOptions { order: ColumnOrder::Activation, ..default };
    assert!(Gptq::new(act_order).default_spec().act_order);
    assert!(!Gptq::new(GptqOptions { static_groups: true, ..act_order }).default_spec().act_order);
}

#[test]
fn empty_matrices_are_quantized_to_nothing() {
    let h = hessian(64, 1);
    for options in every_option() {
        let matrix =
            quantize(options, spec(4, GroupSize::Columns(32), true, &options), &Array2::zeros((0, 64)), &h);
        assert_eq!((matrix.matrix.rows(), matrix.matrix.cols()), (0, 64));
        assert_eq!(matrix.report.rel_error, 0.0);
    }
}

#[test]
fn instruction_sets_do_not_change_a_bit() {
    let (w, h) = (random(40, 172, 6), hessian(172, 7));
    // One thread, because a cap holds for the thread that sets it.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (options, symmetric) in every_option().zip([true, false].into_iter().cycle()) {
        let spec = spec(3, GroupSize::Columns(64), symmetric, &options);
        let run = |isa| pool.install(|| with_cap(isa, || quantize(options, spec, &w, &h)));
        let scalar = run(Isa::Scalar);
        for &isa in supported() {
            let Quantized { matrix, report } = run(isa);
            assert_eq!(matrix, scalar.matrix, "{isa:?} {options:?}");
            assert_eq!(report.loss, scalar.report.loss, "{isa:?} {options:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn threads_do_not_change_a_bit(
        n in 1usize..70, k in 8usize..180, len in 1usize..200, symmetric: bool, mse: bool, which in 0usize..6, seed: u64
    ) {
        let options = every_option().nth(which).unwrap();
        let options = GptqOptions { mse: mse.then_some(2.4), ..options };
        let (w, h) = (random(n, k, seed), hessian(k, seed >> 1));
        let spec = spec(4, GroupSize::Columns(len), symmetric, &options);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let Quantized { matrix, report } = pool.install(|| quantize(options, spec, &w, &h));
            (matrix, report.loss.map(f64::to_bits), report.rel_error.to_bits())
        };
        let one = run(1);
        prop_assert!(matches!(one.0.offset, Offset::Zero(_)));
        for threads in [2, 3, 7] {
            prop_assert!(run(threads) == one);
        }
    }
}
