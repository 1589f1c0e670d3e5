//! Methods without calibration: planned, written, read again, and run.

use quant_testkit::synthetic::Arch;

use crate::support::{TinyModel, quant, text};

/// Options, the layout written, and what the divergence from the float model stays below: far less than that of a
/// model that was read wrongly, which knows nothing.
const CASES: [(&[&str], &str, f64); 19] = [
    (&["--method", "hqq"], "hqq", 0.5),
    (&["--method", "hqq", "--bits", "8", "--axis", "0"], "hqq", 0.05),
    (&["--method", "hqq", "--compat", "hqq", "--group-size", "32"], "hqq", 0.5),
    (&["--method", "sinq"], "sinq", 0.5),
    (&["--method", "sinq", "--bits", "8", "--quant-aux", "false"], "sinq", 0.05),
    (&["--method", "sinq", "--tiling-mode", "2D", "--group-size", "16"], "sinq", 0.5),
    (&["--method", "sinq", "--sinq-rounding", "nf4"], "sinq", 0.5),
    (&["--method", "sinq", "--sinq-rounding", "noz"], "sinq", 0.5),
    (&["--method", "sinq", "--sinq-rounding", "hqq"], "sinq", 0.5),
    (&["--method", "nf4", "--double-quant"], "bnb_nf4", 0.5),
    (&["--method", "fp4", "--group-size", "32"], "bnb_fp4", 0.5),
    (&["--method", "llm-int8"], "bnb_int8", 0.05),
    (&["--method", "quanto"], "quanto", 0.5),
    (&["--method", "quanto", "--bits", "8"], "quanto", 0.05),
    (&["--method", "quanto", "--qfloat8", "e4m3fn"], "quanto", 0.05),
    (&["--method", "fp8"], "fp8", 0.05),
    (&["--method", "fp8", "--group-size", "row"], "fbgemm_fp8", 0.05),
    (&["--method", "mxfp4"], "ct_mxfp4", 0.5),
    (&["--method", "nvfp4"], "ct_nvfp4", 0.5),
];

#[test]
fn every_method_is_planned_written_and_run() {
    let model = TinyModel::new(Arch::Llama);
    let (float, ids) = (model.path(), model.ids());
    for (i, (options, layout, limit)) in CASES.into_iter().enumerate() {
        let out = model.beside(&format!("out{i}"));
        let planned = quant(&[&["plan", text(&float), "--json"], options].concat()).ok().json();
        let quantize = ["quantize", text(&float), "--out", text(&out), "--json"];
        let done = quant(&[&quantize[..], options].concat()).ok().json();
        assert_eq!((&done["layout"], &planned["layout"]), (&layout.into(), &layout.into()), "{options:?}");
        assert_eq!(done["bytes_out"], planned["bytes_out"], "{options:?}");
        quant(&["verify", text(&out)]).ok();
        let eval = ["eval", text(&out), "--tokens", text(&ids), "--reference", text(&float)];
        let eval = quant(&[&eval[..], &["--seq-len", "32", "--json"]].concat()).ok().json();
        let kl = eval["kl_mean"].as_f64().unwrap();
        assert!(kl < limit, "{options:?}: {kl}");
    }
}

#[test]
fn options_are_checked() {
    let model = TinyModel::new(Arch::Llama);
    let (float, out) = (model.path(), model.beside("out"));
    for (options, word) in [
        (&["--method", "hqq", "--compat", "sinq"][..], "sinq"),
        (&["--method", "hqq", "--sym"], "symmetric"),
        (&["--method", "hqq", "--lp-norm", "2"], "lp_norm"),
        (&["--method", "rtn", "--axis", "0"], "group"),
        (&["--method", "sinq", "--bits", "7"], "7"),
        (&["--method", "nf4", "--bits", "3"], "4 bits"),
        (&["--method", "llm-int8", "--llm-int8-threshold=-1"], "threshold"),
        (&["--method", "quanto", "--bits", "3"], "2 and 4 bits"),
        (&["--method", "nvfp4", "--group-size", "64"], "own bits and groups"),
    ] {
        let run = quant(&[&["quantize", text(&float), "--out", text(&out)], options].concat());
        assert_ne!(run.code, Some(0), "{options:?}");
        assert!(run.stderr.contains(word), "{options:?}: {}", run.stderr);
    }
}
