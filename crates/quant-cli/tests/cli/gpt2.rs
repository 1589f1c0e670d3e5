//! GPT-2 in its real size, with random weights and its real tokenizer.

use std::time::Instant;

use quant_testkit::assets;
use quant_testkit::synthetic::{Checkpoint, Shape};

use crate::support::{quant, text};

/// Quantized with groups of 128 and with whole rows, saved, read back, and continued in Chinese, which this
/// byte-level tokenizer spells byte by byte.
#[test]
#[ignore = "a minute, 500 MB of disk, and a tokenizer from the test assets"]
fn quantized_saved_and_continued() {
    let Some(tokenizer) = assets("models/tokenizers/gpt2/tokenizer.json") else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("gpt2");
    Checkpoint::new(Shape::GPT2).write(&model).unwrap();
    std::fs::copy(tokenizer, model.join("tokenizer.json")).unwrap();
    for group in ["128", "-1"] {
        let out = folder.path().join(group);
        let start = Instant::now();
        let done = quant(&[
            "quantize",
            text(&model),
            "--out",
            text(&out),
            "--group-size",
            group,
            "--samples",
            "8",
            "--seq-len",
            "256",
            "--json",
        ]);
        let done = done.ok().json();
        assert_eq!((done["layers"].as_array().unwrap().len(), &done["fallbacks"]), (48, &0.into()));
        eprintln!("group {group}: {:?}, {} bytes", start.elapsed(), done["bytes_out"]);
        quant(&["verify", text(&out)]).ok();
        let generate =
            ["generate", text(&out), "--prompt", "今天天气如何?", "--temperature", "0.7", "--json"];
        let story = quant(&generate).ok().json();
        assert_eq!(story["generated_tokens"], 50);
        assert!(story["text"].as_str().is_some_and(|t| !t.is_empty()), "{story}");
    }
}
