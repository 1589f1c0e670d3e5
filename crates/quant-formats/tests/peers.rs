//! Single matrices that libraries made in memory, stored as a file would hold them: read, and equal to what the
//! libraries make of them, bit for bit.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use quant_core::{DType, DenseTensor};
use quant_formats::{SafetensorsFile, TensorSource, layout};
use quant_testkit::{Dequantized, Golden};
use serde_json::json;

fn golden(name: &str) -> SafetensorsFile {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden");
    SafetensorsFile::open(folder.join(name).join("expected.safetensors")).unwrap()
}

/// A U8 tensor of a text.
fn text(text: &str) -> DenseTensor {
    DenseTensor::new(DType::U8, vec![text.len()], text.as_bytes()).unwrap()
}

/// What the library decoded, by key.
fn decoded(name: &str) -> BTreeMap<String, Dequantized> {
    Golden::open(name).dequantized().into_iter().map(|peer| (peer.name.clone(), peer)).collect()
}

#[test]
fn bitsandbytes_blocks_of_every_size_nested_and_plain() {
    let (file, decoded) = (golden("bnb-primitives"), decoded("bnb-primitives"));
    let read = |name: &str| file.read(name).unwrap();
    let mut count = 0;
    for name in file.names().filter(|n| n.ends_with(".packed")) {
        let key = name.strip_suffix(".packed").unwrap();
        let [kind, block, form] = key.split('.').collect::<Vec<_>>()[..] else { panic!("{key}") };
        let (block, nested) = (&block[1..], form == "dq");
        let mut state = format!(
            r#"{{"quant_type": "{kind}", "blocksize": {block}, "dtype": "float32", "shape": [40, 136]"#
        );
        let mut tensors = BTreeMap::new();
        let mut add = |part: &str, tensor: DenseTensor| drop(tensors.insert(format!("m.{part}"), tensor));
        let packed = read(name);
        add("weight", packed.reshaped(vec![packed.len(), 1]).unwrap());
        add("weight.quant_map", read(&format!("{kind}.code")));
        if nested {
            let offset = read(&format!("{key}.offset")).to_f32().unwrap()[0];
            state += &format!(
                r#", "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {}"#,
                f64::from(offset)
            );
            add("weight.absmax", read(&format!("{key}.absmax_u8")));
            add("weight.nested_absmax", read(&format!("{key}.state2_absmax")));
            add("weight.nested_quant_map", read("dyn8.code"));
        } else {
            add("weight.absmax", read(&format!("{key}.absmax")));
        }
        add(&format!("weight.quant_state.bitsandbytes__{kind}"), text(&(state + "}")));

        let layout = layout(&format!("bnb_{kind}")).unwrap();
        let reader = layout.reader(&serde_json::Value::Null).unwrap();
        let linear = reader.read(&tensors, "m").unwrap();
        decoded[key].check(layout.dequantize_like_peer(&linear.weight).view());
        for (name, tensor) in layout.write(&linear, "m").unwrap() {
            let stored = TensorSource::read(&tensors, &name).unwrap();
            assert_eq!(tensor.bytes().trim_ascii_end(), stored.bytes().trim_ascii_end(), "{key}: {name}");
        }
        count += 1;
    }
    assert_eq!(count, 16);
}

#[test]
fn sinq_matrices_of_every_method() {
    let (file, decoded) = (golden("sinq-primitives"), decoded("sinq-primitives"));
    let read = |name: &str| file.read(name).unwrap();
    let mut count = 0;
    for name in file.names().filter(|n| n.ends_with(".W_q")) {
        let key = name.strip_suffix(".W_q").unwrap();
        let [method, bits, group, _tiling] = key.split('.').collect::<Vec<_>>()[..] else { panic!("{key}") };
        let (bits, group): (u8, usize) = (bits[1..].parse().unwrap(), group[1..].parse().unwrap());
        let packing = match bits {
            3 => "3bit_32".to_owned(),
            5 | 6 => format!("{bits}bit_32"),
            bits => format!("{bits}bit_u8"),
        };
        let mut tensors = BTreeMap::new();
        let mut add = |part: &str, tensor: DenseTensor| drop(tensors.insert(format!("m.{part}"), tensor));
        add("W_q", read(name));
        add("meta.scale2", read(&format!("{key}.scale2")));
        // In memory the auxiliary values are f32; the triples of quantAux exist in files only, as f16.
        if method == "sinq_quantAux" {
            for part in ["scale", "zero"] {
                add(&format!("meta.{part}.x"), read(&format!("{key}.{part}.0")));
                for (end, index) in [("s", 1), ("m", 2)] {
                    let values = read(&format!("{key}.{part}.{index}"));
                    let halves = DenseTensor::from_f32_as_f16(values.shape(), &values.to_f32().unwrap());
                    add(&format!("meta.{part}.{end}"), halves);
                }
            }
        } else {
            add("meta.scale", read(&format!("{key}.scale")));
            add("meta.zero", read(&format!("{key}.zero")));
        }
        let entry = json!({ "meta": { "nbits": bits, "group_size": group, "shape": [96, 128], "axis": 1, "awq_scale": null,
            "packing": packing, "method": method, "compute_dtype": "torch.float32" } });
        let layout = layout("sinq").unwrap();
        let reader = layout.reader(&json!({ "modules": { "m": entry } })).unwrap();
        assert_eq!(reader.shape(&tensors, "m").unwrap(), (96, 128), "{key}");
        let linear = reader.read(&tensors, "m").unwrap();
        let again: BTreeMap<_, _> = layout.write(&linear, "m").map_or_else(
            // Factors per input are f16 in files, and f32 in memory.
            |error| {
                assert!(error.to_string().contains("F16"), "{error}");
                BTreeMap::new()
            },
            |tensors| tensors.into_iter().collect(),
        );
        for (name, tensor) in again.into_iter().filter(|(name, _)| name != "m.meta.scale2") {
            assert!(tensor.bytes() == TensorSource::read(&tensors, &name).unwrap().bytes(), "{key}: {name}");
        }
        // Aux values in f16 are another computation, which `golden.rs` compares with files.
        if method == "sinq_quantAux" {
            continue;
        }
        let peer = &decoded[key];
        let rounded = |w: f32| if peer.half { f16::from_f32(w).to_f32() } else { w };
        peer.check(linear.weight.dequantize().mapv(rounded).view());
        count += 1;
    }
    assert!(count >= 12, "{count}");
}
