//! Weights at the edges of f16 and f32: finite results, or an error that says where.

use ndarray::{Array2, Ix2};
use quant_core::{GroupSize, QuantSpec};
use quant_methods::{
    Hessian, LayerStats, LayerWeights, METHODS, MethodOptions, QuantizeError, Quantized, quantizer,
};
use quant_testkit::{Golden, fixtures_dir};

fn weights(name: &str) -> Array2<f32> {
    let file = fixtures_dir().join("malformed/numeric").join(format!("numeric-{name}.safetensors"));
    let w = Golden::read(&file).f32("model.layers.0.self_attn.q_proj.weight");
    w.into_dimensionality::<Ix2>().unwrap()
}

/// Types of GGUF.
const GGML: [&str; 5] = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"];

/// Mildly correlated inputs.
fn hessian(k: usize) -> Hessian {
    let matrix = Array2::from_shape_fn((k, k), |(i, j)| if i == j { 1.0 + i as f32 / k as f32 } else { 0.1 });
    Hessian { matrix, rows: 100 }
}

/// Every method as it is by default and at several bits, groups and symmetries.
fn quantize(name: &str) -> Vec<(String, Result<Quantized, QuantizeError>)> {
    let w = weights(name);
    let mut results = Vec::new();
    for method in METHODS {
        let own = quantizer(method.name, &MethodOptions::default()).unwrap().default_spec();
        let mut specs = vec![own];
        for (bits, group) in [(2, GroupSize::Columns(16)), (4, GroupSize::Columns(32)), (8, GroupSize::Row)] {
            specs.extend([true, false].map(|symmetric| QuantSpec { bits, group, symmetric, ..own }));
        }
        for spec in specs {
            for mse in [None, Some(2.4)] {
                let mut options = MethodOptions::default();
                (options.rtn.mse, options.gptq.mse) = (mse, mse);
                let quantizer = quantizer(method.name, &options).unwrap();
                // Types of GGUF have whole groups.
                let whole = w.ncols().is_multiple_of(spec.group.len(w.ncols()));
                if quantizer.validate(&spec).is_err() || GGML.contains(&method.name) && !whole {
                    continue;
                }
                let layers = vec![LayerWeights { w: w.clone(), spec }];
                let stats = LayerStats { hessian: Some(hessian(w.ncols())), ..LayerStats::default() };
                let result = quantizer.quantize(layers, stats).map(|mut all| all.remove(0));
                results.push((format!("{name} {} {spec:?} {mse:?}", method.name), result));
            }
        }
    }
    results
}

/// True of a case of a method among these.
fn is_of(case: &str, methods: &[&str]) -> bool {
    methods.iter().any(|method| case.split(' ').nth(1) == Some(method))
}

#[test]
fn extreme_weights_give_finite_results() {
    for name in ["all-zero", "constant", "zero-rows", "f16-max", "tiny-f32", "cols-33", "rows-0"] {
        let w = weights(name);
        for (case, result) in quantize(name) {
            let Quantized { matrix, report } = result.unwrap_or_else(|e| panic!("{case}: {e}"));
            matrix.validate().unwrap();
            let scales = matrix.scales.to_vec();
            // ggml and bitsandbytes give blocks of zeros the scale 0.
            let zero = is_of(&case, &GGML) || is_of(&case, &["nf4", "fp4", "llm-int8"]);
            assert!(scales.iter().all(|s| s.is_finite() && (*s != 0.0 || zero)), "{case}");
            let back = matrix.dequantize();
            assert_eq!(back.dim(), w.dim());
            assert!(back.iter().all(|v| v.is_finite()) && report.rel_error.is_finite(), "{case}");
            for (w, back) in w.rows().into_iter().zip(back.rows()) {
                assert!(w.iter().any(|&w| w != 0.0) || back.iter().all(|&v| v == 0.0), "{case}: zeros stay");
            }
        }
    }
}

#[test]
fn a_constant_is_kept() {
    // One step of an asymmetric grid spans the range from zero to the constant, whose scale is stored in f16.
    for (case, result) in
        quantize("constant").into_iter().filter(|(case, _)| case.contains("symmetric: false"))
    {
        let back = result.unwrap().matrix.dequantize();
        assert!(back.iter().all(|v| (v / 0.37 - 1.0).abs() < 1e-3), "{case}");
    }
}

#[test]
fn what_f16_scales_cannot_hold_is_located() {
    let w = weights("outlier");
    let (at, &worst) = w.indexed_iter().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap();
    for (case, result) in quantize("outlier") {
        // Scales of more bits.
        if is_of(&case, &["nf4", "fp4", "fp8", "mxfp4", "nvfp4"]) {
            assert!(result.unwrap().matrix.dequantize().iter().all(|w| w.is_finite()), "{case}");
            continue;
        }
        match result.unwrap_err() {
            QuantizeError::ScaleOverflow { layer: 0, row, col, value, .. } => {
                assert_eq!(((row, col), value), (at, worst), "{case}");
            }
            other => panic!("{case}: {other}"),
        }
    }
}

#[test]
fn what_is_not_finite_is_located() {
    for (name, found) in [("nan-one", "NaN"), ("inf-one", "inf")] {
        let w = weights(name);
        let (at, _) = w.indexed_iter().find(|(_, w)| !w.is_finite()).unwrap();
        for (case, result) in quantize(name) {
            let error = result.unwrap_err();
            assert!(
                matches!(error, QuantizeError::NonFinite { layer: 0, row, col, .. } if (row, col) == at),
                "{case}: {error}"
            );
            assert!(error.to_string().contains(&format!("[{}, {}] is {found}", at.0, at.1)), "{error}");
        }
    }
}
