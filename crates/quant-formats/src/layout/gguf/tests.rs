//! Blocks against their definition, and there and back.

use std::collections::BTreeMap;

use half::f16;
use proptest::prelude::*;
use quant_core::{ActSpec, Codes, Groups, Offset, Params};

use super::*;

/// The blocks of the numbers `(i - 15.5) / 8`, as gguf-py 0.19.0 writes them, and the numbers they hold.
const VECTORS: [(GgmlType, &str); 5] = [
    (GgmlType::Q4_0, "c033809191a2a2b3b3c4c4d5d5e6e6f7f7f8"),
    (GgmlType::Q4_1, "2234c0bf80809191a2a2b3b3c4c4d5d5e6e6f7f7"),
    (GgmlType::Q5_0, "c02f0000ffff102132435465768798a9bacbdcedfeff"),
    (GgmlType::Q8_0, "d0238189919aa2aab2bac3cbd3dbe3ecf4fc040c141d252d353d464e565e666f777f"),
    (GgmlType::MXFP4, "7d0f1f2f3f4f5f5e6e6e6d7d7c7b7a7970"),
];

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn published_vectors_are_near_what_they_encode() {
    for (ty, hex) in VECTORS {
        let matrix = codec(ty).unwrap().read(&bytes(hex), 1, 32).unwrap();
        let step = if ty == GgmlType::MXFP4 { 1.0 } else { 2.0 * matrix.scales.get(0) };
        for (i, value) in ANY.dequantize_like_peer(&matrix).iter().enumerate() {
            let exact = (i as f32 - 15.5) / 8.0;
            assert!((value - exact).abs() <= step / 2.0 + 1e-3, "{ty} {i}: {value} for {exact}");
        }
    }
}

#[test]
fn table_and_types_agree() {
    for codec in &CODECS {
        assert_eq!(codec.ty.block_len() % codec.group, 0);
        assert!(ANY.known_by().contains(&part_name("", codec.ty).as_str()));
        assert!(ANY.type_for(&spec_of(codec)).is_ok(), "{}", codec.ty);
    }
}

fn source(ty: GgmlType, rows: usize, bytes: Vec<u8>) -> BTreeMap<String, DenseTensor> {
    let shape = vec![rows, bytes.len() / rows];
    [(part_name("m", ty), DenseTensor::new(DType::U8, shape, bytes).unwrap())].into()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn blocks_survive(
        (i, rows, bytes) in (0..CODECS.len(), 1usize..4, 1usize..3).prop_flat_map(|(i, rows, blocks)| {
            let len = rows * blocks * CODECS[i].ty.block_bytes();
            (Just(i), Just(rows), prop::collection::vec(any::<u8>(), len))
        }),
    ) {
        let codec = &CODECS[i];
        let stored = source(codec.ty, rows, bytes);
        let reader = ANY.reader(&json!({ "type": codec.ty.name() })).unwrap();
        prop_assert_eq!(reader.spec(), Some(spec_of(codec)));
        let linear = reader.read(&stored, "m").unwrap();
        prop_assert_eq!(linear.weight.spec().bits, codec.bits);
        let written = ANY.write(&linear, "m").unwrap();
        prop_assert_eq!(&written[0].0, &part_name("m", codec.ty));
        prop_assert_eq!(written[0].1.bytes(), stored[&written[0].0].bytes());
        prop_assert_eq!(written[0].1.shape(), stored[&written[0].0].shape());
    }

    /// A group-wise matrix of integers is stored exactly or refused.
    #[test]
    fn recoded_numbers_are_the_same(
        bits in 2u8..=8,
        symmetric: bool,
        group in prop_oneof![Just(32usize), Just(64), Just(128)],
        seeds in prop::collection::vec(any::<u8>(), 128),
        scales in prop::collection::vec(0u16..0x7c00, 8),
        zeros in prop::collection::vec(any::<u8>(), 8),
    ) {
        let max = u8::MAX >> (8 - bits);
        let values: Vec<u8> = seeds.iter().cycle().take(256).map(|v| v & max).collect();
        let codes = Codes::from_values(bits, 2, 128, &values).unwrap();
        let count = 256 / group;
        let scales = Params::F16(scales[..count].iter().map(|&s| f16::from_bits(s)).collect());
        let middle = 1u8 << (bits - 1);
        let zeros: Vec<u8> = zeros[..count].iter().map(|z| if symmetric { middle } else { z & max }).collect();
        let offset = Offset::Zero(Params::U8(zeros));
        let matrix = QuantizedMatrix::affine(codes, Groups::Row { len: group }, scales, offset, 0);
        let (spec, input) = (matrix.spec(), ActSpec::Float);
        let layer = PlannedLayer { input: &input, ..PlannedLayer::new("m", &spec, 2, 128) };
        let written = ANY.write(&QuantizedLinear::new(matrix.clone()), "m");
        match ANY.can_store(&layer) {
            Err(e) => {
                prop_assert!(bits == 8 && !spec.symmetric, "{}", e);
                prop_assert!(written.is_err());
            }
            Ok(()) => {
                let written = written.unwrap();
                prop_assert_eq!(&ANY.planned(&layer)[0].name, &written[0].0);
                prop_assert_eq!(&ANY.planned(&layer)[0].shape[..], written[0].1.shape());
                let stored: BTreeMap<_, _> = written.into_iter().collect();
                let back = ANY.reader(&Value::Null).unwrap().read(&stored, "m").unwrap();
                prop_assert!(back.weight.dequantize() == matrix.dequantize());
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_reason() {
    let scales = Params::F32(vec![0.1; 2]);
    let codes = Codes::zeros(4, 1, 64).unwrap();
    let matrix = QuantizedMatrix::affine(codes, Groups::Row { len: 32 }, scales, Offset::None, 8);
    let error = ANY.write(&QuantizedLinear::new(matrix.clone()), "m").unwrap_err().to_string();
    assert!(error.contains("scale 0.1") && error.contains("f16"), "{error}");

    let spec = QuantSpec { group: GroupSize::Columns(16), ..QuantSpec::default() };
    let error = ANY.can_store(&PlannedLayer::new("m", &spec, 4, 64)).unwrap_err().to_string();
    assert!(error.contains("group size 16"), "{error}");
    let error = ANY.can_store(&PlannedLayer::new("m", &QuantSpec::default(), 4, 48)).unwrap_err().to_string();
    assert!(error.contains("input size 48"), "{error}");

    let stored = source(GgmlType::IQ2_XXS, 1, vec![0; 66]);
    let error = ANY.reader(&Value::Null).unwrap().read(&stored, "m").unwrap_err().to_string();
    assert!(error.contains("IQ2_XXS (m)") && error.contains("Q4_K"), "{error}");
}

#[test]
fn a_fixed_type_is_kept() {
    let scales = Params::F16(vec![f16::ONE; 2]);
    let codes = Codes::from_values(4, 1, 64, &[11; 64]).unwrap();
    let matrix = QuantizedMatrix::affine(codes, Groups::Row { len: 32 }, scales, Offset::None, 8);
    let linear = QuantizedLinear::new(matrix.clone());
    for ty in [GgmlType::Q4_0, GgmlType::Q5_0, GgmlType::Q8_0] {
        let written = gguf_layout(ty).unwrap().write(&linear, "m").unwrap();
        assert_eq!(written[0].0, part_name("m", ty));
        let back =
            ANY.reader(&Value::Null).unwrap().read(&written.into_iter().collect::<BTreeMap<_, _>>(), "m");
        assert_eq!(back.unwrap().weight.dequantize(), matrix.dequantize());
    }
    assert!(gguf_layout(GgmlType::Q4_K).unwrap().write(&linear, "m").is_err());
    assert!(gguf_layout(GgmlType::F16).is_none() && gguf_layout(GgmlType::IQ1_S).is_none());
}
