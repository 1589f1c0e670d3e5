//! What holds for every layout of the table: whatever it says it can store is planned exactly, written, and read back
//! to the same weights; and parts that do not fit are an error, never a panic.

use std::collections::BTreeMap;

use half::{bf16, f16};
use proptest::prelude::*;
use quant_core::{
    ActGrid, ActGroup, ActSpec, Codes, DType, DenseTensor, GridKind, GroupSize, Offset, Params, ParamsKind,
    QuantSpec, QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{Layout, PlannedLayer, StoredModel, layouts};
use serde_json::{Value, json};

const GRIDS: [GridKind; 8] = [
    GridKind::Int,
    GridKind::Int,
    GridKind::Int,
    GridKind::Nf4,
    GridKind::Fp4,
    GridKind::E2M1,
    GridKind::E2M3,
    GridKind::E4M3,
];
const GROUPS: [GroupSize; 10] = [
    GroupSize::Tensor,
    GroupSize::Row,
    GroupSize::Columns(16),
    GroupSize::Columns(32),
    GroupSize::Columns(64),
    GroupSize::Columns(128),
    GroupSize::Tile { rows: 128, cols: 128 },
    GroupSize::Tile { rows: 32, cols: 64 },
    GroupSize::Flat(64),
    GroupSize::Strided(64),
];
const SCALES: [ParamsKind; 5] =
    [ParamsKind::F16, ParamsKind::BF16, ParamsKind::F32, ParamsKind::E8M0, ParamsKind::E4M3];

fn inputs() -> Vec<ActSpec> {
    let dynamic = |grid, per| ActSpec::Dynamic { grid, per, symmetric: true, outlier_threshold: None };
    vec![
        ActSpec::Float,
        dynamic(ActGrid::Int8, ActGroup::Token),
        dynamic(ActGrid::E4M3, ActGroup::Token),
        ActSpec::Static { grid: ActGrid::Int8, scale: 0.5, zero: 0 },
        ActSpec::Static { grid: ActGrid::E4M3, scale: 0.25, zero: 0 },
    ]
}

/// Small numbers that depend on the place alone.
fn noise(seed: u64, i: usize) -> usize {
    let mut x = seed ^ (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^= x >> 29;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (x >> 40) as usize
}

/// A matrix of that specification. Scales are powers of two, so that sums and products of layouts that store shifts
/// in place of zero points are exact.
fn matrix(spec: &QuantSpec, rows: usize, cols: usize, seed: u64) -> QuantizedMatrix {
    let kinds: usize = 1 << spec.bits;
    let finite = |code: usize| spec.grid.table().is_none_or(|table| table[code].is_finite());
    let value = |i| {
        let code = noise(seed, i) % kinds;
        if finite(code) { code as u8 } else { 0 }
    };
    let values: Vec<u8> = (0..rows * cols).map(value).collect();
    let codes = Codes::from_values(spec.bits, rows, cols, &values).unwrap();
    let groups = spec.group.groups(rows, cols);
    let count = groups.count(rows, cols);
    let power = |i: usize| f32::powi(2.0, noise(seed + 1, i) as i32 % 5 - 3);
    let scales = match spec.scales {
        ParamsKind::F16 => Params::F16((0..count).map(|i| f16::from_f32(power(i))).collect()),
        ParamsKind::BF16 => Params::BF16((0..count).map(|i| bf16::from_f32(power(i))).collect()),
        ParamsKind::E8M0 => Params::E8M0((0..count).map(|i| 120 + (noise(seed, i) % 10) as u8).collect()),
        ParamsKind::E4M3 => {
            let base = (0..count).map(|i| 0x28 + 8 * (noise(seed, i) % 5) as u8).collect();
            Params::Scaled { base: Box::new(Params::E4M3(base)), factor: 4.0, divide: true }
        }
        _ => Params::F32((0..count).map(power).collect()),
    };
    let middle = 1u8 << (spec.bits - 1);
    let zeros = |i: usize| match spec.symmetric {
        true => middle,
        // Of one bit only 0 is not the middle.
        false if spec.bits == 1 => 0,
        // One that is not in the middle comes first.
        false => ((noise(seed + 2, i) % (kinds - 1)) as u8 + 1) | u8::from(i == 0),
    };
    let mut matrix = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0);
    matrix.grid = spec.grid.grid(spec.bits).unwrap();
    if spec.grid == GridKind::Int && (!spec.symmetric || seed.is_multiple_of(2)) {
        matrix.grid = quant_core::Grid::UNSIGNED;
        matrix.offset = Offset::Zero(Params::U8((0..count).map(zeros).collect()));
    }
    matrix
}

fn check(layout: &dyn Layout, layer: &PlannedLayer<'_>, seed: u64) {
    let (spec, input) = (layer.spec, layer.input);
    let at = format!("{}: {spec:?}, {input:?}, {} x {}", layout.id(), layer.rows, layer.cols);
    let weight = matrix(spec, layer.rows, layer.cols, seed);
    weight.validate().unwrap();
    let bias = DenseTensor::from_f32(&[layer.rows], &vec![0.5; layer.rows]);
    let linear = QuantizedLinear { bias: Some(bias), input: input.clone(), ..QuantizedLinear::new(weight) };
    let layer = PlannedLayer { bias: Some(DType::F32), ..*layer };
    let written = layout.write(&linear, "a.b").unwrap_or_else(|e| panic!("{at}: {e}"));
    let made: Vec<_> = written.iter().map(|(n, t)| (n.clone(), t.dtype(), t.shape().to_vec())).collect();
    let plan: Vec<_> = layout.planned(&layer).into_iter().map(|p| (p.name, p.dtype, p.shape)).collect();
    assert_eq!(plan, made, "{at}");
    for (name, dtype, _) in &made {
        assert!(layout.module_of(name, *dtype).is_none_or(|m| m == "a.b"), "{at}: {name}");
    }
    assert!(made.iter().any(|(name, dtype, _)| layout.module_of(name, *dtype).is_some()), "{at}");

    let stored = StoredModel { spec, input, exceptions: &[], meta: &Default::default() };
    let source: BTreeMap<_, _> = written.into_iter().collect();
    let config = layout.config(&stored);
    for config in [config, Value::Null] {
        let reader = layout.reader(&config).unwrap_or_else(|e| panic!("{at}: {e}"));
        // Without a configuration some layouts can't tell everything.
        let read = match reader.read(&source, "a.b") {
            Err(_) if config.is_null() => continue,
            read => read.unwrap_or_else(|e| panic!("{at}: {e}\n{config:#}")),
        };
        assert_eq!(reader.shape(&source, "a.b").unwrap(), (layer.rows, layer.cols));
        let (ours, theirs) = (read.weight.dequantize(), linear.weight.dequantize());
        if config.is_null() {
            continue;
        }
        assert!(ours == theirs, "{at}: the weights differ\n{config:#}");
        // Whoever runs an FP8 checkpoint quantizes its inputs, in groups that follow from its weights.
        // LLM.int8 always rounds them.
        let implied = (layout.methods()[0].ends_with("fp8") || layout.id() == "bnb_int8")
            && !matches!(input, ActSpec::Static { .. });
        assert!(&read.input == input || implied, "{at}: {:?}", read.input);
        assert_eq!(reader.layout().id(), layout.id(), "{at}");
        let again: BTreeMap<_, _> = layout.write(&read, "a.b").unwrap().into_iter().collect();
        for (name, tensor) in &source {
            assert!(again[name].bytes() == tensor.bytes(), "{at}: {name} differs");
        }
        let peer = layout.dequantize_like_peer(&read.weight);
        assert!(peer.iter().all(|w| w.is_finite()), "{at}");
    }
}

#[test]
fn what_can_be_stored_comes_back() {
    let mut stored: BTreeMap<&str, usize> = BTreeMap::new();
    let inputs = inputs();
    for (l, layout) in layouts().iter().enumerate() {
        for (g, group) in GROUPS.into_iter().enumerate() {
            for (k, grid) in GRIDS.into_iter().enumerate() {
                for scales in SCALES {
                    let bits = match grid {
                        GridKind::Int => 1..=8,
                        grid => {
                            let bits = grid.table().unwrap().len().ilog2() as u8;
                            bits..=bits
                        }
                    };
                    for bits in bits {
                        let symmetric = grid != GridKind::Int || k == 0;
                        let spec = QuantSpec { bits, grid, group, scales, symmetric, act_order: false };
                        for (i, input) in inputs.iter().enumerate() {
                            let seed = (l + 3 * g + 5 * k + 7 * usize::from(bits) + 11 * i) as u64;
                            let (rows, cols) = [(32, 128), (64, 256), (160, 384)][seed as usize % 3];
                            let layer = PlannedLayer { input, ..PlannedLayer::new("a.b", &spec, rows, cols) };
                            if layout.can_store(&layer).is_ok() {
                                check(*layout, &layer, seed);
                                *stored.entry(layout.id()).or_default() += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    for layout in layouts() {
        assert!(stored.get(layout.id()).is_some_and(|&n| n > 0), "{} stores nothing here", layout.id());
    }
}

/// The parts that any layout knows, and some that it does not expect.
const PARTS: [&str; 32] = [
    "weight.absmax",
    "weight.quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "SCB",
    "W_q",
    "scale",
    "shape",
    "meta.scale",
    "meta.scale2",
    "weight._data",
    "weight._data._data",
    "weight._scale",
    "qweight",
    "qzeros",
    "scales",
    "scaled_zeros",
    "g_idx",
    "bias",
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "weight_global_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "_weight_qdata",
    "_weight_scale",
    "_weight_zero_point",
    "input_global_scale",
];
const TYPES: [DType; 11] = [
    DType::I32,
    DType::I16,
    DType::F16,
    DType::BF16,
    DType::F32,
    DType::U8,
    DType::I8,
    DType::F8E4M3,
    DType::F8E8M0,
    DType::I64,
    DType::F4,
];

fn any_tensor() -> impl Strategy<Value = DenseTensor> {
    let dims = prop::sample::select(vec![0usize, 1, 2, 4, 8, 16, 31, 32, 64, 128]);
    let shape = prop::collection::vec(dims, 0..4);
    (prop::sample::select(TYPES.to_vec()), shape, any::<u8>()).prop_filter_map(
        "whole bytes",
        |(dtype, shape, byte)| {
            let len = dtype.byte_len(&shape)?;
            DenseTensor::new(dtype, shape, vec![byte; len]).ok()
        },
    )
}

fn any_json() -> impl Strategy<Value = Value> {
    let words = vec![
        "int", "float", "group", "channel", "tensor", "block", "gemv", "static", "e4m3", "(((", "Linear",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..130).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(words).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let keys =
            vec!["group_0", "weights", "num_bits", "type", "strategy", "group_size", "targets", "symmetric"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            (prop::sample::select(keys), inner).prop_map(|(k, v)| json!({ k: v })),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Parts of random type, shape and content in place of those of a valid layer, and random settings.
    #[test]
    fn parts_that_do_not_fit_never_panic(
        which in any::<prop::sample::Index>(),
        parts in prop::collection::vec((prop::sample::select(PARTS.to_vec()), any_tensor()), 0..4),
        removed in prop::option::of(prop::sample::select(PARTS.to_vec())),
        fields in prop::collection::vec((0usize..12, any_json()), 0..3),
        valid in any::<bool>(),
        seed in 0u64..100,
    ) {
        const FIELDS: [&str; 12] = [
            "bits", "group_size", "version", "format", "config_groups", "ignore", "weight_block_size", "fmt",
            "activation_scheme", "modules_to_not_convert", "packing_format", "quantization",
        ];
        let layout = layouts()[which.index(layouts().len())];
        let mut source = BTreeMap::new();
        let mut config = json!({});
        if valid {
            let specs = GROUPS.iter().flat_map(|&group| {
                SCALES.iter().flat_map(move |&scales| GRIDS.iter().flat_map(move |&grid| (2..=8).map(move |bits| {
                    QuantSpec { bits, grid, group, scales, symmetric: true, act_order: false }
                })))
            });
            let inputs = inputs();
            let mut storable = specs.flat_map(|spec| inputs.iter().map(move |input| (spec, input))).filter(|(spec, input)| {
                let fits = spec.grid.table().is_none_or(|t| t.len() == 1 << spec.bits);
                fits && layout.can_store(&PlannedLayer { input, ..PlannedLayer::new("m", spec, 32, 128) }).is_ok()
            });
            if let Some((spec, input)) = storable.nth((seed % 3) as usize) {
                let weight = matrix(&spec, 32, 128, seed);
                let linear = QuantizedLinear { input: input.clone(), ..QuantizedLinear::new(weight) };
                source.extend(layout.write(&linear, "m").unwrap());
                config = layout.config(&StoredModel { spec: &spec, input, exceptions: &[], meta: &Default::default() });
            }
        }
        source.extend(parts.into_iter().map(|(part, tensor)| (format!("m.{part}"), tensor)));
        if let Some(part) = removed {
            source.remove(&format!("m.{part}"));
        }
        for (field, value) in fields {
            config[FIELDS[field]] = value;
        }
        for config in [config, Value::Null] {
            if let Ok(reader) = layout.reader(&config) {
                let shape = reader.shape(&source, "m");
                if let Ok(linear) = reader.read(&source, "m") {
                    prop_assert!(linear.weight.validate().is_ok());
                    prop_assert_eq!(shape.unwrap(), (linear.weight.rows(), linear.weight.cols()));
                    layout.dequantize_like_peer(&linear.weight);
                }
            }
        }
    }
}
