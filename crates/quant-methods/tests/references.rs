//! Methods without calibration against the libraries that define them: the same weights, and what their files hold.

use std::collections::BTreeMap;
use std::path::PathBuf;

use half::f16;
use ndarray::{Array2, Axis, Ix2};
use quant_core::{
    DenseTensor, Grid, GridKind, GroupSize, LinearWeights, Offset, Params, QuantSpec, QuantizedMatrix,
    WeightSource,
};
use quant_formats::{Checkpoint, SafetensorsFile, layout};
use quant_math::sinkhorn::{STEPS, balance};
use quant_methods::{
    Bnb4Options, HqqOptions, LayerStats, LayerWeights, MethodOptions, QuantoOptions, QuantoType, SinqOptions,
    SinqRounding, quantizer,
};
use quant_testkit::{Golden, fixtures_dir};
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    fixtures_dir().join("golden").join(name)
}

/// Every quantized module of a golden checkpoint: its name, the float weights `[out, in]`, and the library's result.
fn modules(base: &str, name: &str) -> Vec<(String, Array2<f32>, QuantizedMatrix)> {
    let (base, peer) = (Checkpoint::open(golden(base)).unwrap(), Checkpoint::open(golden(name)).unwrap());
    let module = |module: &str| {
        let LinearWeights::Quantized(theirs) = peer.linear(module).unwrap() else { panic!("{module}") };
        let float = base.tensor(&format!("{module}.weight")).unwrap();
        let shape = (float.shape()[0], float.shape()[1]);
        let mut w = Array2::from_shape_vec(shape, float.to_f32().unwrap()).unwrap();
        if shape != (theirs.weight.rows(), theirs.weight.cols()) || base.config()["model_type"] == "gpt2" {
            w = w.reversed_axes().as_standard_layout().into_owned();
        }
        (module.to_owned(), w, theirs.weight)
    };
    let found: Vec<_> = peer.quantized_modules().map(module).collect();
    assert!(!found.is_empty());
    found
}

/// Our result for the same weights.
fn quantize(method: &str, options: &MethodOptions, spec: QuantSpec, w: Array2<f32>) -> QuantizedMatrix {
    let quantizer = quantizer(method, options).unwrap();
    let layers = vec![LayerWeights { w, spec }];
    let matrix = quantizer.quantize(layers, LayerStats::default()).unwrap().remove(0).matrix;
    matrix.validate().unwrap();
    matrix
}

/// Codes of a row.
fn codes(matrix: &QuantizedMatrix, row: usize) -> Vec<u8> {
    let mut codes = vec![0; matrix.cols()];
    matrix.codes.unpack_row(row, &mut codes);
    codes
}

fn zeros(matrix: &QuantizedMatrix) -> Vec<f32> {
    match &matrix.offset {
        Offset::Zero(zeros) => zeros.to_vec(),
        Offset::Shift { param, .. } => param.to_vec(),
        Offset::None => Vec::new(),
    }
}

/// Everything but the type that a file notes is equal.
fn assert_equal(ours: &QuantizedMatrix, theirs: &QuantizedMatrix, name: &str) {
    let rows = (0..ours.rows()).map(|r| (codes(ours, r), codes(theirs, r)));
    let differ: usize = rows.map(|(a, b)| a.iter().zip(&b).filter(|(a, b)| a != b).count()).sum();
    assert_eq!(differ, 0, "{name}: codes that differ");
    assert_eq!(ours.scales, theirs.scales, "{name}");
    assert_eq!(ours.offset, theirs.offset, "{name}");
    let dtype = theirs.dtype;
    assert_eq!(&QuantizedMatrix { dtype, ..ours.clone() }, theirs, "{name}");
}

#[test]
fn hqq() {
    for (name, bits, group) in [
        ("hqq-b4-g64-axis1", 4, GroupSize::Columns(64)),
        ("hqq-b3-g64-axis1", 3, GroupSize::Columns(64)),
        ("hqq-b1-g16-axis1", 1, GroupSize::Columns(16)),
        ("hqq-b4-g32-axis0", 4, GroupSize::Strided(32)),
    ] {
        let options = MethodOptions { hqq: HqqOptions::library(), ..Default::default() };
        let spec = QuantSpec { bits, group, ..quantizer("hqq", &options).unwrap().default_spec() };
        for (module, w, theirs) in modules("base-llama", name) {
            assert_equal(&quantize("hqq", &options, spec, w), &theirs, &format!("{name} {module}"));
        }
    }
}

/// Nearer to a tie than this, in steps, a code may be another one: the library's exponentials in f32 and ours differ in
/// the last bit, which moves a quotient of 2^b steps by 2^b 2^-23 or so.
const TIE: f32 = 1e-4;

/// An evened-out matrix as the library computes it: `m / cols / rows`, times both again where it is not evened out.
fn evened(m: &Array2<f32>, len: usize, even: bool) -> Array2<f32> {
    let mut out = m.clone();
    for mut tile in out.axis_chunks_iter_mut(Axis(1), len) {
        let cols = tile.ncols();
        let found = balance(&tile.iter().copied().collect::<Vec<_>>(), cols, STEPS);
        for ((r, c), w) in tile.indexed_iter_mut() {
            let (col, row) = (found.cols[c], found.rows[r]);
            *w = *w / col / row;
            if !even {
                *w = *w * col * row;
            }
        }
    }
    out
}

fn distance_to_half(steps: f32) -> f32 {
    ((steps - steps.floor()) - 0.5).abs()
}

/// Counts the codes that differ; every one of them must be at a tie.
fn sinq_ties(
    w: &Array2<f32>,
    ours: &QuantizedMatrix,
    theirs: &QuantizedMatrix,
    even: bool,
    name: &str,
) -> usize {
    let (bits, len) = (ours.codes.bits(), 64);
    let m = evened(&w.mapv(|w| f16::from_f32(w).to_f32()), len, even);
    let nf4 = even && matches!(theirs.grid, Grid::Table(_));
    let (our_zeros, their_zeros) = (zeros(ours), zeros(theirs));
    let mut differ = 0;
    for (r, row) in m.rows().into_iter().enumerate() {
        let (a, b) = (codes(ours, r), codes(theirs, r));
        for (g, group) in row.to_vec().chunks(len).enumerate() {
            let of = |codes: &[u8]| codes[g * len..][..len].to_vec();
            let (a, b, index) = (of(&a), of(&b), r * row.len() / len + g);
            let low = group.iter().copied().fold(f32::INFINITY, f32::min);
            let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let step = (high - low).max(1e-4) / ((1 << bits) - 1) as f32;
            // Eight-bit zero points of one step: a difference is a whole one, and all codes of the group move.
            if !nf4 && our_zeros[index] != their_zeros[index] {
                assert!(distance_to_half(low / step) < TIE, "{name} [{r}, {g}]: {}", low / step);
                differ += len;
                continue;
            }
            for (i, _) in a.iter().zip(&b).enumerate().filter(|(_, (a, b))| a != b) {
                differ += 1;
                let near = match nf4 {
                    false => distance_to_half(group[i] / step) < TIE,
                    true => {
                        let mean = group.iter().sum::<f32>() / len as f32;
                        let step = group.iter().fold(1e-4f32, |size, w| size.max((w - mean).abs()));
                        let table = GridKind::Nf4.table().unwrap();
                        let x = group[i] / step - mean / step;
                        table.windows(2).any(|pair| ((pair[0] + pair[1]) / 2.0 - x).abs() < TIE)
                    }
                };
                assert!(near, "{name} [{r}, {}]", g * len + i);
            }
        }
    }
    differ
}

/// Scales and factors differ by the last bit of f16 at most, and rarely.
fn same_scales(ours: &QuantizedMatrix, theirs: &QuantizedMatrix, name: &str) {
    let factors = |matrix: &QuantizedMatrix| matrix.col_scale.as_ref().unwrap().values.clone();
    for (a, b) in [(ours.scales.to_vec(), theirs.scales.to_vec()), (factors(ours), factors(theirs))] {
        let bits = |v: f32| i32::from(f16::from_f32(v).to_bits());
        let unequal: Vec<_> = a.iter().zip(&b).filter(|&(&a, &b)| bits(a) != bits(b)).collect();
        assert!(unequal.iter().all(|&(&a, &b)| bits(a).abs_diff(bits(b)) == 1), "{name}");
        assert!(unequal.len() * 100 <= a.len(), "{name}: {} of {}", unequal.len(), a.len());
    }
}

#[test]
fn sinq() {
    for (name, bits, rounding) in [
        ("sinq-b4-g64-1d", 4, SinqRounding::Range),
        ("sinq-b3-g64-1d", 3, SinqRounding::Range),
        ("sinq-b4-g64-nf4", 4, SinqRounding::Nf4),
    ] {
        let sinq = SinqOptions { rounding, compat: true, ..Default::default() };
        let options = MethodOptions { sinq, ..Default::default() };
        let spec = QuantSpec { bits, ..quantizer("sinq", &options).unwrap().default_spec() };
        let meta = std::fs::read(golden(name).join("meta.json")).unwrap();
        let meta: Value = serde_json::from_slice(&meta).unwrap();
        let (mut differ, mut of) = (0, 0);
        for (module, w, theirs) in modules("base-llama", name) {
            let ours = quantize("sinq", &options, spec, w.clone());
            // The library's own measure, which decides whether a layer is evened out.
            let even = meta["kurtosis"][&module].as_f64().unwrap() <= 5.0;
            same_scales(&ours, &theirs, &format!("{name} {module}"));
            differ += sinq_ties(&w, &ours, &theirs, even, &format!("{name} {module}"));
            of += w.len();
        }
        eprintln!("{name}: {differ} of {of} codes differ, all at ties");
        assert!(differ * 1000 < of, "{name}: {differ} of {of}");
    }
}

/// Matrices that the library made in memory: every rounding, 2 to 8 bits, and square tiles.
#[test]
fn sinq_in_memory() {
    let file = SafetensorsFile::open(golden("sinq-primitives").join("expected.safetensors")).unwrap();
    let read = |name: &str| file.read(name).unwrap();
    let w = Array2::from_shape_vec((96, 128), read("weight").to_f32().unwrap()).unwrap();
    for (key, bits, group, rounding) in [
        ("sinq.b2.g32.1D", 2, GroupSize::Columns(32), SinqRounding::Range),
        ("sinq.b3.g64.1D", 3, GroupSize::Columns(64), SinqRounding::Range),
        ("sinq.b4.g64.1D", 4, GroupSize::Columns(64), SinqRounding::Range),
        ("sinq.b5.g64.1D", 5, GroupSize::Columns(64), SinqRounding::Range),
        ("sinq.b6.g64.1D", 6, GroupSize::Columns(64), SinqRounding::Range),
        ("sinq.b8.g64.1D", 8, GroupSize::Columns(64), SinqRounding::Range),
        ("sinq.b4.g32.2D", 4, GroupSize::Tile { rows: 32, cols: 32 }, SinqRounding::Range),
        ("sinq_noz.b4.g64.1D", 4, GroupSize::Columns(64), SinqRounding::NoZero),
        ("sinq_nf4.b4.g64.1D", 4, GroupSize::Columns(64), SinqRounding::Nf4),
        ("sinq_hqq.b4.g64.1D", 4, GroupSize::Columns(64), SinqRounding::Hqq),
    ] {
        let sinq = SinqOptions { rounding, quant_aux: Some(false), compat: true };
        let options = MethodOptions { sinq, ..Default::default() };
        let default = quantizer("sinq", &options).unwrap().default_spec();
        let ours = quantize("sinq", &options, QuantSpec { bits, group, ..default }, w.clone());

        let half = |name: &str| {
            let tensor = read(&format!("{key}.{name}"));
            DenseTensor::from_f32_as_f16(tensor.shape(), &tensor.to_f32().unwrap())
        };
        let parts = [
            ("m.W_q", read(&format!("{key}.W_q"))),
            ("m.meta.scale", half("scale")),
            ("m.meta.zero", half("zero")),
            ("m.meta.scale2", half("scale2")),
        ];
        let tensors: BTreeMap<_, _> = parts.into_iter().map(|(name, t)| (name.to_owned(), t)).collect();
        let method = key.split('.').next().unwrap();
        let entry = json!({ "meta": { "nbits": bits, "group_size": group.len(128), "shape": [96, 128], "axis": 1,
            "method": method, "compute_dtype": "torch.float32" } });
        let reader = layout("sinq").unwrap().reader(&json!({ "modules": { "m": entry } })).unwrap();
        let theirs = reader.read(&tensors, "m").unwrap().weight;
        same_scales(&ours, &theirs, key);
        assert_eq!(zeros(&ours), zeros(&theirs), "{key}");
        for r in 0..w.nrows() {
            assert_eq!(codes(&ours, r), codes(&theirs, r), "{key} row {r}");
        }
    }
}

#[test]
fn bitsandbytes() {
    for (base, name, method, double_quant) in [
        ("base-llama", "bnb-nf4", "nf4", false),
        ("base-llama", "bnb-nf4-dq", "nf4", true),
        ("base-llama", "bnb-fp4", "fp4", false),
        ("base-gpt2", "bnb-gpt2-nf4", "nf4", false),
        ("base-llama", "bnb-int8", "llm-int8", false),
        ("base-bert", "bnb-bert-int8-t0", "llm-int8", false),
    ] {
        let options = MethodOptions { bnb4: Bnb4Options { double_quant }, ..Default::default() };
        let spec = quantizer(method, &options).unwrap().default_spec();
        for (module, w, theirs) in modules(base, name) {
            assert_equal(&quantize(method, &options, spec, w), &theirs, &format!("{name} {module}"));
        }
    }
}

/// Single calls of the library: blocks of every size, across row ends, the last one short.
#[test]
fn bitsandbytes_in_memory() {
    let golden = Golden::open("bnb-primitives");
    let w = golden.f32("input").into_dimensionality::<Ix2>().unwrap();
    for method in ["nf4", "fp4"] {
        for block in [32, 64, 128, 1024] {
            for double_quant in [false, true] {
                let options = MethodOptions { bnb4: Bnb4Options { double_quant }, ..Default::default() };
                let default = quantizer(method, &options).unwrap().default_spec();
                let spec = QuantSpec { group: GroupSize::Flat(block), ..default };
                let ours = quantize(method, &options, spec, w.clone());
                let key = format!("{method}.b{block}.{}", if double_quant { "dq" } else { "sq" });
                let packed = golden.u8(&format!("{key}.packed"));
                let nibbles: Vec<u8> = packed.iter().flat_map(|&byte| [byte >> 4, byte & 15]).collect();
                let found: Vec<u8> = (0..w.nrows()).flat_map(|r| codes(&ours, r)).collect();
                assert_eq!(found, nibbles, "{key}");
                let floats =
                    |name: &str| golden.f32(&format!("{key}.{name}")).iter().copied().collect::<Vec<_>>();
                match &ours.scales {
                    Params::F32(absmax) => assert_eq!(*absmax, floats("absmax"), "{key}"),
                    Params::Nested { codes, table, absmax, offset, .. } => {
                        let bytes: Vec<u8> = golden.u8(&format!("{key}.absmax_u8")).iter().copied().collect();
                        assert_eq!(
                            (codes, absmax, *offset),
                            (&bytes, &floats("state2_absmax"), floats("offset")[0]),
                            "{key}"
                        );
                        assert!(table.iter().copied().eq(golden.f32("dyn8.code").iter().copied()), "{key}");
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    let half = w.mapv(|w| f16::from_f32(w).to_f32());
    let options = MethodOptions::default();
    let spec = quantizer("llm-int8", &options).unwrap().default_spec();
    let ours = quantize("llm-int8", &options, spec, half);
    let file = SafetensorsFile::open(self::golden("bnb-primitives").join("expected.safetensors")).unwrap();
    let theirs = file.read("int8vec.CB").unwrap();
    let found: Vec<u8> = (0..w.nrows()).flat_map(|r| codes(&ours, r)).map(|code| code ^ 0x80).collect();
    assert!(found == theirs.bytes(), "int8");
    let Params::Scaled { base, .. } = &ours.scales else { panic!("{:?}", ours.scales) };
    assert!(base.to_vec().into_iter().eq(golden.f32("int8vec.SCB").iter().copied()));
}

#[test]
fn quanto() {
    for (base, name, weights) in [
        ("base-llama", "quanto-qint2", QuantoType::Qint2),
        ("base-llama", "quanto-qint4", QuantoType::Qint4),
        ("base-bert", "quanto-bert-qint4", QuantoType::Qint4),
        ("base-llama", "quanto-qint8", QuantoType::Qint8),
        ("base-llama", "quanto-qfloat8-e4m3fn", QuantoType::Qfloat8E4m3fn),
    ] {
        let quanto = QuantoOptions { weights, optimizer: None, compat: true };
        let options = MethodOptions { quanto, ..Default::default() };
        let spec = quantizer("quanto", &options).unwrap().default_spec();
        for (module, w, theirs) in modules(base, name) {
            assert_equal(&quantize("quanto", &options, spec, w), &theirs, &format!("{name} {module}"));
        }
    }
}
