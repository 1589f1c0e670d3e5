//! Properties of the GPTQ layout over matrices of every kind it has.

use std::collections::BTreeMap;

use half::{bf16, f16};
use proptest::prelude::*;
use quant_core::{
    ActSpec, Codes, DType, DenseTensor, GroupSize, Groups, Offset, Params, Permutation, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{Checkpoint, FormatError, PlannedLayer, StoredModel, layout, layout_for};
use serde_json::{Value, json};

/// Anything the planar version can hold; version 2 at 2, 3, 4, 8 bits; version 1 where no zero point is 0.
fn any_matrix() -> impl Strategy<Value = QuantizedMatrix> {
    let dims = (2u8..=8, 1usize..4, 1usize..5, 1usize..140);
    dims.prop_flat_map(|(bits, row_blocks, col_blocks, group)| {
        let (rows, cols) = (32 * row_blocks, 32 * col_blocks);
        let group = group.min(cols);
        let count = cols.div_ceil(group);
        let max = ((1u16 << bits) - 1) as u8;
        let codes = prop::collection::vec(0..=max, rows * cols);
        let scales = prop::collection::vec(-2.0f32..2.0, rows * count);
        let zeros = prop::collection::vec(0..=max, rows * count);
        let order = Just((0..cols as u32).collect::<Vec<_>>()).prop_shuffle();
        let index = prop::collection::vec(0..count as u32, cols);
        (codes, scales, zeros, order, index, 0u8..3, 0u8..3).prop_map(
            move |(codes, scales, zeros, order, index, dtype, form)| {
                let codes = Codes::from_values(bits, rows, cols, &codes).unwrap();
                let scales = match dtype {
                    0 => Params::F32(scales),
                    1 => Params::F16(scales.into_iter().map(f16::from_f32).collect()),
                    _ => Params::BF16(scales.into_iter().map(bf16::from_f32).collect()),
                };
                let groups = match form {
                    2 => Groups::Index { of_col: index.into(), count },
                    _ => Groups::Row { len: group },
                };
                let mut matrix =
                    QuantizedMatrix::affine(codes, groups, scales, Offset::Zero(Params::U8(zeros)), 0);
                matrix.input_perm = (form == 1).then(|| Permutation::new(order).unwrap());
                matrix
            },
        )
    })
}

fn store(id: &str, linear: &QuantizedLinear) -> Result<BTreeMap<String, DenseTensor>, FormatError> {
    layout(id)?.write(linear, "m").map(|tensors| tensors.into_iter().collect())
}

fn config(id: &str, matrix: &QuantizedMatrix) -> Value {
    let group = match matrix.groups {
        Groups::Row { len } => len,
        _ => 0,
    };
    let (bits, group) = (matrix.codes.bits(), (group > 0).then_some(group));
    match id {
        "auto_round" => {
            json!({ "bits": bits, "packing_format": "auto_round:exllamav2", "group_size": group })
        }
        _ => json!({ "bits": bits, "checkpoint_format": id, "group_size": group }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_written_reads_back(matrix in any_matrix(), bias in any::<bool>()) {
        let mut linear = QuantizedLinear::new(matrix);
        let matrix = &linear.weight;
        if bias {
            linear.bias = Some(DenseTensor::from_f32_as_f16(&[matrix.rows()], &vec![0.5; matrix.rows()]));
        }
        let Offset::Zero(zeros) = &matrix.offset else { unreachable!() };
        let zero_at_zero = (0..zeros.len()).any(|i| zeros.get(i) == 0.0);
        for id in ["gptq", "gptq_v2", "gptq_p", "auto_round"] {
            let stored = store(id, &linear);
            if id.starts_with("gptq") && id != "gptq_p" && (5..8).contains(&matrix.codes.bits()) {
                let error = stored.unwrap_err().to_string();
                prop_assert!(error.contains("gptq_p and auto_round"), "{}", error);
                continue;
            }
            if id == "gptq" && zero_at_zero {
                let error = stored.unwrap_err().to_string();
                prop_assert!(error.contains("choose gptq_v2"), "{}", error);
                continue;
            }
            let stored = stored.unwrap();
            let reader = layout(id).unwrap().reader(&config(id, matrix)).unwrap();
            prop_assert_eq!(reader.layout().id(), id);
            prop_assert_eq!(reader.shape(&stored, "m").unwrap(), (matrix.rows(), matrix.cols()));
            let read = reader.read(&stored, "m").unwrap();
            prop_assert_eq!(read.bias.is_some(), bias);
            prop_assert_eq!(read.weight.dequantize(), matrix.dequantize());
            if matrix.input_perm.is_none() && matches!(matrix.groups, Groups::Row { .. }) {
                prop_assert_eq!(&read.weight, matrix);
            }
            let again = store(id, &read).unwrap();
            for (name, tensor) in &stored {
                // An index that leaves g_idx all zero means consecutive groups.
                prop_assert!(again[name].bytes() == tensor.bytes() || name == "m.g_idx");
            }
        }
    }

    /// Parts of random type and shape, in place of those of a valid layer or alone, and random settings: an error
    /// or a layer, never a panic.
    #[test]
    fn parts_that_do_not_fit_never_panic(
        parts in prop::collection::vec((0usize..5, 0usize..6, any_shape(), any::<u8>()), 0..4),
        fields in prop::collection::vec((0usize..8, any_json()), 0..4),
        valid in any::<bool>(),
    ) {
        const PARTS: [&str; 5] = ["qweight", "qzeros", "scales", "g_idx", "bias"];
        const TYPES: [DType; 6] = [DType::I32, DType::I32, DType::F16, DType::F32, DType::F4, DType::U8];
        const FIELDS: [&str; 8] =
            ["bits", "group_size", "dynamic", "checkpoint_format", "desc_act", "sym", "pack_dtype", "quant_method"];
        let mut source = BTreeMap::new();
        if valid {
            let codes = Codes::zeros(4, 32, 32).unwrap();
            let (scales, zeros) = (Params::F32(vec![1.0; 64]), Offset::Zero(Params::U8(vec![8; 64])));
            let matrix = QuantizedMatrix::affine(codes, Groups::Row { len: 16 }, scales, zeros, 0);
            source = store("gptq", &QuantizedLinear::new(matrix)).unwrap();
        }
        for (part, dtype, shape, byte) in parts {
            let Some(len) = TYPES[dtype].byte_len(&shape) else { continue };
            let tensor = DenseTensor::new(TYPES[dtype], shape, vec![byte; len]).unwrap();
            source.insert(format!("m.{}", PARTS[part]), tensor);
        }
        let config: Value = fields.into_iter().map(|(f, v)| (FIELDS[f].to_owned(), v)).collect();
        if let Ok(reader) = layout("gptq").unwrap().reader(&config)
            && let Ok(linear) = reader.read(&source, "m")
        {
            prop_assert!(linear.weight.validate().is_ok());
        }
    }
}

fn any_shape() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop::sample::select(vec![0usize, 1, 2, 3, 4, 8, 31, 32, 64]), 0..4)
}

fn any_json() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..130).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec!["gptq", "gptq_v2", "int32", "auto-round", "((("]).prop_map(Value::from),
        (".{0,9}", 0i64..20).prop_map(|(k, v)| json!({ k: { "bits": v } })),
        Just(json!([[], {}])),
    ]
}

#[test]
fn what_cannot_be_stored_says_why_and_what_instead() {
    let spec = QuantSpec::default();
    let refusal = |id: &str, spec: &QuantSpec, rows, cols| {
        layout(id).unwrap().can_store(&PlannedLayer::new("", spec, rows, cols)).unwrap_err().to_string()
    };
    assert!(layout("gptq").unwrap().can_store(&PlannedLayer::new("", &spec, 64, 128)).is_ok());
    assert!(refusal("gptq", &QuantSpec { bits: 5, ..spec }, 64, 128).contains("gptq_p and auto_round"));
    assert!(refusal("gptq", &spec, 64, 172).contains("input size 172"));
    assert!(refusal("gptq", &spec, 50, 128).contains("output size 50"));
    let group = GroupSize::Columns(48);
    assert!(refusal("gptq", &QuantSpec { group, ..spec }, 64, 128).contains("group size 48"));
    let asymmetric = QuantSpec { symmetric: false, ..spec };
    assert!(refusal("gptq", &asymmetric, 64, 128).contains("gptq_v2"));
    assert_eq!(layout_for(&PlannedLayer::new("", &spec, 64, 128)).unwrap().id(), "gptq");
    assert_eq!(layout_for(&PlannedLayer::new("", &asymmetric, 64, 128)).unwrap().id(), "gptq_v2");
    let error = layout("zork").err().unwrap().to_string();
    assert!(error.starts_with("layout zork is unknown; choose one of gptq, gptq_v2, "), "{error}");
}

#[test]
fn exceptions_become_rules_that_read_back() {
    let spec = QuantSpec::default();
    let other = QuantSpec { bits: 8, group: GroupSize::Row, ..spec };
    let exceptions = [("layers.1.down".to_owned(), Some(other)), ("layers.1.up".to_owned(), None)];
    let stored = StoredModel {
        spec: &spec,
        input: &ActSpec::Float,
        exceptions: &exceptions,
        meta: &Default::default(),
    };
    let gptq = layout("gptq").unwrap();
    let config = gptq.config(&stored);
    assert_eq!(config["dynamic"]["-:^layers\\.1\\.up$"], json!({}));

    let matrix = |bits, group| {
        let codes = Codes::zeros(bits, 32, 128).unwrap();
        let count = 32 * 128usize.div_ceil(group);
        let middle = 1u8 << (bits - 1);
        let zeros = Offset::Zero(Params::U8(vec![middle; count]));
        let scales = Params::F16(vec![f16::ONE; count]);
        QuantizedLinear::new(QuantizedMatrix::affine(codes, Groups::Row { len: group }, scales, zeros, 0))
    };
    let reader = gptq.reader(&config).unwrap();
    for (module, bits, group) in
        [("layers.1.down", 8, 128), ("layers.10.down", 4, 128), ("layers.1.down2", 4, 128)]
    {
        let linear = matrix(bits, group);
        let source: BTreeMap<_, _> = gptq.write(&linear, module).unwrap().into_iter().collect();
        assert_eq!(reader.read(&source, module).unwrap().weight, linear.weight, "{module}");
    }
    let (name, bytes) = &gptq.side_files(&config, &[])[0];
    assert_eq!(name, "quantize_config.json");
    assert_eq!(serde_json::from_slice::<Value>(bytes).unwrap(), config);
}

/// Files without any configuration: the tensors tell all but the version, which is the first.
#[test]
fn tensors_alone_are_enough() {
    let codes = Codes::from_values(3, 32, 64, &[5; 2048]).unwrap();
    let zeros = Offset::Zero(Params::U8(vec![4; 128]));
    let matrix =
        QuantizedMatrix::affine(codes, Groups::Row { len: 16 }, Params::F32(vec![0.5; 128]), zeros, 0);
    let tensors = layout("gptq").unwrap().write(&QuantizedLinear::new(matrix.clone()), "a.b").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    quant_formats::write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.quantized_modules().collect::<Vec<_>>(), ["a.b"]);
    assert_eq!(checkpoint.quantized_linear("a.b").unwrap().unwrap().weight, matrix);
    assert!(checkpoint.files_to_carry().is_empty());
}
