//! Hostile configurations and tokenizers get their verdict.

use std::fs;

use crate::support::Tensors;
use quant_model::{Decoder, Tokenizer};
use quant_testkit::malformed::{Case, Verdict, cases};
use serde_json::Value;

/// Compares an outcome with what the case asks for.
fn judge(case: &Case, outcome: Result<(), String>) {
    match (&outcome, case.expected) {
        (Ok(()), Verdict::Reject) => panic!("{}: accepted, although: {}", case.id, case.wrong),
        (Err(text), Verdict::Accept) => panic!("{}: refused with: {text}", case.id),
        _ => {}
    }
    if let Err(text) = outcome {
        eprintln!("{}: {text}", case.id);
        let clear = case.mention.is_empty() || case.mention.iter().any(|word| text.contains(word.as_str()));
        assert!(clear, "{}: {text} mentions none of {:?}", case.id, case.mention);
        assert!(!text.chars().any(char::is_control), "{}: control characters in {text:?}", case.id);
    }
}

#[test]
fn configurations_are_judged() {
    for case in cases(&["config"]) {
        let scratch = tempfile::tempdir().unwrap();
        let dir = case.materialize(scratch.path());
        // Reading the file is the loader's part; so are the two cases about it.
        let Ok(text) = fs::read(dir.join("config.json")) else { continue };
        let Ok(config) = serde_json::from_slice::<Value>(&text) else { continue };
        let outcome = Decoder::load(&config, &Tensors::read(&dir)).and_then(|model| model.logits(&[1, 3, 4]));
        let outcome = outcome.map(|logits| assert!(logits.iter().all(|x| x.is_finite()), "{}", case.id));
        judge(&case, outcome.map_err(|e| e.to_string()));
    }
}

#[test]
fn tokenizers_are_judged() {
    for case in cases(&["tokenizer"]) {
        let scratch = tempfile::tempdir().unwrap();
        let dir = case.materialize(scratch.path());
        let outcome = Tokenizer::from_file(&dir.join("tokenizer.json")).and_then(|tokenizer| {
            // Long runs of one letter are what slow patterns choke on.
            for prompt in ["abc he", "今天天气如何?", "", &"a".repeat(5000)] {
                let ids = tokenizer.encode(prompt, true)?;
                tokenizer.decode(&ids, true)?;
            }
            Ok(())
        });
        judge(&case, outcome.map_err(|e| e.to_string()));
    }
}
