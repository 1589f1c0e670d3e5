//! Frequencies and tables of every rope variant against transformers.

use std::fs;

use ndarray::Ix2;
use quant_model::{ArchSpec, PositionSpec, RopeSpec};
use quant_testkit::Golden;
use serde_json::{Value, json};

const EPS: f64 = f32::EPSILON as f64;

/// The rope of a Llama with these fields in its configuration.
fn rope(fields: &Value) -> RopeSpec {
    let mut config =
        json!({"model_type": "llama", "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1});
    for (name, value) in fields.as_object().unwrap() {
        config[name] = value.clone();
    }
    match ArchSpec::from_config(&config).unwrap().positions {
        PositionSpec::Rope(rope) => rope,
        other => panic!("{other:?}"),
    }
}

/// Ours are rounded once to f32. The reference rounds each step: at most eight, of half an ulp each, and of the
/// subtraction in llama3's blend (`periods - low`, then up to seven times that in a frequency of an eighth) comes
/// the largest factor. Together less than 32 half ulps. A sine differs by as much as its angle, whose size is
/// `position * frequency` and which both round once more, and by its own rounding.
#[test]
fn tables_are_those_of_the_reference() {
    let golden = Golden::open("rope");
    let meta = fs::read(golden.dir().join("meta.json")).unwrap();
    let meta: Value = serde_json::from_slice(&meta).unwrap();
    let (mut worst_frequency, mut worst_table) = (0.0f64, 0.0f64);
    for (name, case) in meta["cases"].as_object().unwrap() {
        let rope_new = rope(&case["config"]);
        if case["config_before_5"].is_object() {
            assert_eq!(rope(&case["config_before_5"]), rope_new, "{name}: both spellings");
        }
        let cos = golden.f32(&format!("{name}.cos")).into_dimensionality::<Ix2>().unwrap();
        let sin = golden.f32(&format!("{name}.sin")).into_dimensionality::<Ix2>().unwrap();
        let len = cos.nrows();
        let factor = f64::from(golden.f32(&format!("{name}.attention_factor"))[0]);
        assert!((f64::from(rope_new.attention_factor()) - factor).abs() < EPS, "{name}");

        let frequencies = rope_new.frequencies(len);
        for (i, (&ours, &theirs)) in
            frequencies.iter().zip(&golden.f32(&format!("{name}.inv_freq"))).enumerate()
        {
            let error = (f64::from(ours) / f64::from(theirs) - 1.0).abs();
            worst_frequency = worst_frequency.max(error / EPS);
            assert!(error <= 16.0 * EPS, "{name}: frequency {i} is {ours}, of the reference {theirs}");
        }
        let table = rope_new.table(0, len, len);
        for (ours, theirs) in [(&table.cos, &cos), (&table.sin, &sin)] {
            for ((t, i), &value) in ours.indexed_iter() {
                let error = (f64::from(value) - f64::from(theirs[[t, i]])).abs();
                let bound = factor * EPS * (1.0 + 17.0 * t as f64 * f64::from(frequencies[i]));
                worst_table = worst_table.max(error / bound);
                assert!(error <= bound, "{name}: {value} at {t}, {i}, of the reference {}", theirs[[t, i]]);
            }
        }
    }
    eprintln!("frequencies within {worst_frequency:.1} ulp, tables within {worst_table:.2} of the bound");
}

#[test]
fn a_table_of_later_positions_continues_the_first() {
    let rope = rope(&json!({"hidden_size": 32, "num_attention_heads": 4}));
    let (whole, tail) = (rope.table(0, 9, 9), rope.table(5, 4, 9));
    for t in 0..4 {
        assert_eq!((whole.cos.row(5 + t), whole.sin.row(5 + t)), (tail.cos.row(t), tail.sin.row(t)));
    }
}
