//! Conversions between layouts, and what is said of the results.

use std::fs;

use quant_testkit::fixtures_dir;

use crate::support::{has_keys, quant, text};

#[test]
fn a_conversion_tells_a_verdict_for_every_layer() {
    let model = fixtures_dir().join("golden/gptq-b4-g32-asym-v1");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args = ["convert", text(&model), "--to", "gptq_v2", "--out", text(&out), "--json"];
    let report = quant(&args).ok().json();
    let keys = [("layout_in", 's'), ("layout_out", 's'), ("tensors", 'a')];
    has_keys(&report, &keys);
    has_keys(&report, &[("identical", 'n'), ("bounded", 'n'), ("requantized", 'n')]);
    for layer in report["tensors"].as_array().unwrap() {
        has_keys(layer, &[("name", 's'), ("verdict", 's'), ("max_abs_error", 'n'), ("note", 's')]);
        assert_eq!(layer["verdict"], "identical");
    }
    quant(&args).fails(&["exists"]);
    let shown = quant(&["convert", text(&model), "--to", "auto", "--out", text(&out), "--force"]).ok().stdout;
    assert!(shown.contains("identical") && shown.contains("q_proj"), "{shown}");
    quant(&["verify", text(&out)]).ok();

    // Both give the same numbers.
    let dequantized = |model: &str, name: &str| {
        let file = folder.path().join(name);
        quant(&["dequantize", model, "--out", text(&file)]).ok();
        fs::read(file).unwrap()
    };
    assert!(dequantized(text(&model), "a") == dequantized(text(&out), "b"));

    let float = fixtures_dir().join("golden/base-llama");
    quant(&["convert", text(&float), "--to", "gptq", "--out", text(&folder.path().join("c"))])
        .fails(&["no quantized layers", "quantize"]);
    quant(&["convert", text(&model), "--to", "magic", "--out", text(&folder.path().join("c"))])
        .fails(&["magic", "gptq_v2"]);
}

#[test]
fn lint_and_verify_speak_the_same_language() {
    let model = fixtures_dir().join("golden/gptq-b4-g128-sym");
    let sound = quant(&["lint", text(&model), "--json"]).ok().json();
    has_keys(&sound, &[("ok", 'b'), ("findings", 'a')]);
    assert_eq!((&sound["ok"], sound["findings"].as_array().unwrap().len()), (&true.into(), 0));

    let folder = tempfile::tempdir().unwrap();
    fs::copy(model.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    fs::write(
        folder.path().join("config.json"),
        config
            .replace("\"gptq\"", "\"gptq_v2\"")
            .replace("\"quant_method\": \"gptq_v2\"", "\"quant_method\": \"gptq\"")
            .replace("\"method\": \"gptq_v2\"", "\"method\": \"gptq\""),
    )
    .unwrap();
    let run = quant(&["lint", text(folder.path()), "--json"]);
    assert_eq!(run.code, Some(1), "{run:?}");
    let found = run.json();
    let finding = &found["findings"][0];
    has_keys(finding, &[("severity", 's'), ("tensor", 's'), ("message", 's'), ("remedy", 's')]);
    assert_eq!((&found["ok"], &finding["code"]), (&false.into(), &"zero-points".into()));
}
