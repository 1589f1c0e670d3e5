//! Verdicts held against arithmetic of their own.

use std::collections::BTreeMap;

use half::f16;
use proptest::prelude::*;
use quant_core::{
    Codes, Grid, GridKind, Groups, Offset, Params, Permutation, QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{Layout, StoredModel, layouts};
use quant_testkit::fixtures_dir;
use quant_testkit::strategies::{Sizes, grouped_matrix};
use serde_json::{Map, Value};

use super::search::Target;
use super::*;
use crate::progress::Silent;

/// The value of every weight in the order of input features, by the formula of [`QuantizedMatrix`]. In f64 this is exact
/// for codes of 8 bits and parameters of 11 bits within 2^-24 .. 2^16.
fn values(m: &QuantizedMatrix) -> Vec<f64> {
    let (rows, cols) = (m.rows(), m.cols());
    let mut all = vec![0.0; rows * cols];
    for r in 0..rows {
        for c in 0..cols {
            let feature = m.input_perm.as_ref().map_or(c, |p| p.features()[c] as usize);
            let g = m.groups.index(r, c, cols);
            let grid = f64::from(m.grid.value(m.codes.get(r, c)));
            let scale = f64::from(m.scales.get(g));
            let mut value = match &m.offset {
                Offset::None => grid * scale,
                Offset::Zero(z) => (grid - f64::from(z.get(g))) * scale,
                Offset::Shift { param, sign } => grid * scale + f64::from(*sign) * f64::from(param.get(g)),
            };
            if let Some(s) = &m.row_scale {
                value *= f64::from(s[r]);
            }
            if let Some(s) = &m.col_scale {
                value *= f64::from(s.values[r / s.rows_per_block.max(1) * cols + feature]);
            }
            all[r * cols + feature] = value;
        }
    }
    all
}

/// Converts one layer and checks what is said of it. `None` if it was refused.
fn judged(layout: &'static dyn Layout, matrix: &QuantizedMatrix, requantize: bool) -> Option<Verdict> {
    let config = serde_json::json!({ "hidden_size": matrix.cols() });
    let options = ConvertConfig { allow_requantize: requantize, ..ConvertConfig::new(layout.id()) };
    let mut target = Target::new(layout, &config, &options);
    let linear = QuantizedLinear::new(matrix.clone());
    let route = match target.route("m", &linear) {
        Ok(route) => route,
        Err(Error::Convert { because, .. }) => {
            assert!(!because.is_empty());
            return None;
        }
        Err(other) => panic!("{other}"),
    };
    let tensors = target.tensors("m", &linear, &route.step, &route.spec, &route.input).unwrap();
    let stored = StoredModel { spec: &route.spec, input: &route.input, exceptions: &[], meta: &Map::new() };
    let reader = layout.reader(&layout.config(&stored)).unwrap();
    let map: BTreeMap<_, _> = tensors.into_iter().collect();
    let planned: u64 = route.plan.iter().filter_map(PlannedTensor::byte_len).sum();
    assert_eq!(planned, map.values().map(|t| t.bytes().len() as u64).sum::<u64>(), "{}", layout.id());
    let read = reader.read(&map, "m").ok()?.weight;
    let (before, after) = (values(matrix), values(&read));
    let apart = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let said = route.difference.max_abs;
    match route.verdict {
        Verdict::Identical => assert!(apart == 0.0 && said == 0.0, "{}: {apart} {said}", layout.id()),
        // The bound is one, and no more than one.
        _ => {
            assert!(apart <= said && said <= apart * (1.0 + 1e-9) + 1e-300, "{}: {apart} {said}", layout.id())
        }
    }
    Some(route.verdict)
}

/// Matrices of the kinds that layouts have: integers with and without zero points, tables, shifts, short groups.
fn any_matrix() -> impl Strategy<Value = QuantizedMatrix> {
    let sizes = Sizes { rows: 32..33, cols: 1..5, cols_step: 32, bits: &[2, 3, 4, 8] };
    (grouped_matrix(sizes), 0..6usize, any::<bool>()).prop_map(|(mut m, kind, unorder)| {
        let groups = m.scales.len();
        if unorder {
            m.input_perm = None;
        }
        let scales = m.scales.to_vec();
        match kind {
            // As it is: integers around integer zero points.
            0 => {}
            1 => {
                m.offset = Offset::None;
                m.grid = Grid::Int { midpoint: 1 << (m.codes.bits() - 1) };
            }
            2 => m.scales = Params::F32(scales.iter().map(|s| s * 1.1).collect()),
            3 => {
                m.grid = Grid::UNSIGNED;
                let zeros = (0..groups).map(|g| f16::from_f32(g as f32 * 0.25)).collect();
                m.offset = Offset::Zero(Params::F16(zeros));
            }
            4 => {
                let shifts = scales.iter().map(|s| f16::from_f32(s * -7.3)).collect();
                m.offset = Offset::Shift { param: Params::F16(shifts), sign: 1.0 };
            }
            _ => {
                let mut codes = Codes::zeros(4, m.rows(), m.cols()).unwrap();
                for r in 0..m.rows() {
                    let row: Vec<u8> = (0..m.cols()).map(|c| m.codes.get(r, c) & 15).collect();
                    codes.set_row(r, &row);
                }
                m.codes = codes;
                m.grid = GridKind::E2M1.grid(4).unwrap();
                m.offset = Offset::None;
            }
        }
        m
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    /// The whole matrix of conversions: every kind of source to every layout, each verdict checked.
    #[test]
    fn verdicts_are_true(matrix in any_matrix()) {
        prop_assert!(matrix.validate().is_ok());
        for &layout in layouts() {
            let strict = judged(layout, &matrix, false);
            if strict.is_none() {
                prop_assert!(matches!(judged(layout, &matrix, true), None | Some(Verdict::Requantized)));
            }
        }
    }
}

fn four_bits(zero: Option<u8>, perm: bool) -> QuantizedMatrix {
    let (rows, cols) = (32, 128);
    let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 7 % 16) as u8).collect();
    let codes = Codes::from_values(4, rows, cols, &codes).unwrap();
    let groups = Groups::Row { len: 64 };
    let count = groups.count(rows, cols);
    let scales = Params::F16((0..count).map(|i| f16::from_f32(0.01 + i as f32 * 1e-3)).collect());
    let zeros = (0..count).map(|i| zero.unwrap_or((1 + i % 15) as u8)).collect();
    let mut m = QuantizedMatrix::affine(codes, groups, scales, Offset::Zero(Params::U8(zeros)), 0);
    m.input_perm = perm.then(|| Permutation::new((0..cols as u32).rev().collect()).unwrap());
    m
}

/// Maps that are known to be exact, for the layouts of this build.
#[test]
fn known_maps_are_exact() {
    let symmetric = four_bits(Some(8), false);
    let asymmetric = four_bits(None, false);
    let act_order = four_bits(Some(8), true);
    let exact: [(&str, &QuantizedMatrix); 13] = [
        ("gptq", &symmetric),
        ("gptq_v2", &symmetric),
        ("gptq", &act_order),
        ("gptq_v2", &act_order),
        ("gptq_v2", &asymmetric),
        ("awq", &symmetric),
        ("awq", &asymmetric),
        ("compressed-tensors", &symmetric),
        ("compressed-tensors", &asymmetric),
        ("hqq", &symmetric),
        ("hqq", &asymmetric),
        ("q4_0", &symmetric),
        ("q5_0", &asymmetric),
    ];
    for (id, matrix) in exact {
        let Some(&layout) = layouts().iter().find(|l| l.id() == id) else { continue };
        assert_eq!(judged(layout, matrix, false), Some(Verdict::Identical), "{id}");
    }
    // Version 1 has no zero point of 0; around the middle the same numbers take eight bits.
    let v1 = layouts().iter().find(|l| l.id() == "gptq").unwrap();
    assert_eq!(judged(*v1, &four_bits(Some(0), false), false), Some(Verdict::Identical));
    assert_eq!(judged(*v1, &eight_bits(), false), None);
    assert_eq!(judged(*v1, &eight_bits(), true), Some(Verdict::Requantized));
}

/// All codes of eight bits around zero points at their ends: no room to move zero to the middle.
fn eight_bits() -> QuantizedMatrix {
    let codes: Vec<u8> = (0..32 * 64).map(|i| i as u8).collect();
    let codes = Codes::from_values(8, 32, 64, &codes).unwrap();
    let zeros = (0..32).map(|i| 255 * (i % 2) as u8).collect();
    let scales = Params::F16(vec![f16::from_f32(0.01); 32]);
    QuantizedMatrix::affine(codes, Groups::whole_row(64), scales, Offset::Zero(Params::U8(zeros)), 0)
}

fn golden(name: &str) -> PathBuf {
    fixtures_dir().join("golden").join(name)
}

/// The f32 weights of a checkpoint.
fn weights(model: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let read = |module: &str| {
        let weight = checkpoint.quantized_linear(module).unwrap().unwrap().weight.dequantize();
        (module.to_owned(), weight.iter().copied().collect())
    };
    checkpoint.quantized_modules().map(read).collect()
}

#[test]
fn a_checkpoint_keeps_its_numbers_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["gptq-b4-g32-asym-v1", "gptq-b4-g128-sym-actorder", "gptq-gpt2-b4-g32-sym"] {
        let (v2, back) = (folder.path().join("v2"), folder.path().join("back"));
        let config = ConvertConfig { overwrite: true, ..ConvertConfig::new("gptq_v2") };
        let done = convert(&golden(name), &v2, &config, &Silent).unwrap();
        assert_eq!((done.layout_in, done.layout_out), ("gptq", "gptq_v2"));
        assert_eq!((done.bounded, done.requantized), (0, 0));
        assert_eq!(done.identical, done.tensors.len());
        assert_eq!(weights(&golden(name)), weights(&v2), "{name}");
        assert!(crate::verify(&v2).unwrap().ok);
        // The header of the output tells the verdicts.
        let header = std::fs::read(v2.join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(header[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&header[8..8 + length]).unwrap();
        let record = header["__metadata__"]["conversion"].as_str().unwrap();
        let record: Value = serde_json::from_str(record).unwrap();
        assert_eq!(record["tensors"], serde_json::to_value(&done.tensors).unwrap());
        // Back again, the tensors are those of the original, whose hash is known.
        let config = ConvertConfig { overwrite: true, ..ConvertConfig::new("gptq") };
        let again = convert(&v2, &back, &config, &Silent).unwrap();
        assert_eq!(again.identical, again.tensors.len());
        assert_eq!(weights(&golden(name)), weights(&back), "{name}");
        for (first, second) in done.tensors.iter().zip(&again.tensors) {
            assert_eq!(first.output_sha256, second.input_sha256);
            // Version 1 promises symmetric grids, so that asymmetric ones come back in more bits.
            let same = first.input_sha256 == second.output_sha256;
            assert_eq!(same, !name.contains("asym"), "{name} {}", first.name);
        }
    }
}

#[test]
fn blocks_of_gguf_stay_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    for ty in ["q4_0", "q5_1", "q2_k", "q3_k", "q4_k", "q4_k_m", "q5_k", "q6_k", "iq4_nl", "iq4_xs"] {
        let out = folder.path().join(format!("{ty}.gguf"));
        let from = golden(&format!("gguf-llama256-{ty}")).join("model.gguf");
        let done = convert(&from, &out, &ConvertConfig::new("gguf"), &Silent).unwrap();
        for layer in &done.tensors {
            assert_eq!(layer.verdict, Verdict::Identical, "{ty} {}", layer.name);
            assert_eq!(layer.input_sha256, layer.output_sha256, "{ty} {}", layer.name);
        }
    }
}

#[test]
fn auto_takes_gguf_where_the_output_is_named_so() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.gguf");
    let done = convert(&golden("gptq-b4-g128-sym"), &out, &ConvertConfig::new("auto"), &Silent).unwrap();
    assert_eq!((done.layout_out, done.identical), ("gguf", done.tensors.len()));
    assert!(Checkpoint::open(&out).unwrap().reader().unwrap().is_some());
}

#[test]
fn auto_takes_the_smallest_exact_layout() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let name = golden("gptq-b4-g32-asym-v1");
    let done = convert(&name, &out, &ConvertConfig::new("auto"), &Silent).unwrap();
    assert_eq!(done.identical, done.tensors.len());
    assert_eq!(weights(&name), weights(&out));
    for layout in layouts() {
        let other = folder.path().join(layout.id());
        let Ok(other) = convert(&name, &other, &ConvertConfig::new(layout.id()), &Silent) else { continue };
        assert!(other.bounded > 0 || done.bytes_out <= other.bytes_out, "{}", layout.id());
    }
}

#[test]
fn what_cannot_be_held_is_refused_or_rounded_anew() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let name = folder.path().join("eight");
    let quantize = crate::QuantizeConfig {
        bits: 8,
        symmetric: Some(false),
        group: crate::GroupSize::Columns(32),
        ..crate::QuantizeConfig::new("rtn").unwrap()
    };
    crate::quantize(&golden("base-llama"), &name, &quantize, &Silent).unwrap();
    let error = convert(&name, &out, &ConvertConfig::new("gptq"), &Silent).unwrap_err().to_string();
    assert!(error.contains("--allow-requantize"), "{error}");
    assert!(!out.exists());
    let config = ConvertConfig { allow_requantize: true, ..ConvertConfig::new("gptq") };
    let done = convert(&name, &out, &config, &Silent).unwrap();
    assert!(done.requantized > 0);
    for layer in done.tensors.iter().filter(|l| l.verdict == Verdict::Requantized) {
        let (before, after) = (weights(&name), weights(&out));
        let pairs = before[&layer.name].iter().zip(&after[&layer.name]);
        let apart = pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        assert!(apart > 0.0 && apart <= layer.max_abs_error * (1.0 + 1e-6), "{apart} {layer:?}");
    }
    let float = convert(&golden("base-llama"), &out, &ConvertConfig::new("gptq"), &Silent);
    assert!(float.unwrap_err().to_string().contains("no quantized layers"));
    let unknown = convert(&name, &out, &ConvertConfig::new("magic"), &Silent);
    assert!(unknown.unwrap_err().to_string().contains("magic"));
}
