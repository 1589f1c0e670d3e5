//! Generation on a trained model.

use std::ops::ControlFlow;

use quant_model::{
    Decoder, Finish, GenerateOptions, Generated, ModelError, Sampling, Tokenizer, eos_tokens, generate,
    generate_ids,
};
use quant_testkit::{Golden, assets, fixtures_dir};
use serde_json::json;

use crate::support::{Tensors, config};

fn stories() -> (Decoder, Tokenizer) {
    let dir = fixtures_dir().join("models/ts-llama-3.7M");
    let model = Decoder::load(&config(&dir), &Tensors::read(&dir)).unwrap();
    (model, Tokenizer::from_file(&dir.join("tokenizer.json")).unwrap())
}

fn run(
    model: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &GenerateOptions,
) -> (Generated, String) {
    let ids = tokenizer.encode(prompt, true).unwrap();
    let mut shown = String::new();
    let generated = generate(model, tokenizer, &ids, options, |text| {
        shown += text;
        ControlFlow::Continue(())
    });
    (generated.unwrap(), shown)
}

#[test]
fn text_is_streamed_and_repeatable() {
    let (model, tokenizer) = stories();
    let sampling = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, seed: 3, ..Default::default() };
    let options = GenerateOptions { max_new_tokens: 30, sampling, ..Default::default() };
    let (first, shown) = run(&model, &tokenizer, "once upon a time", &options);
    assert_eq!((first.ids.len(), first.finish), (30, Finish::Length));
    assert_eq!(first.text, shown);
    assert_eq!(first.text, tokenizer.decode(&first.ids, true).unwrap());
    let (second, _) = run(&model, &tokenizer, "once upon a time", &options);
    assert_eq!(first.ids, second.ids);
    let other = GenerateOptions { sampling: Sampling { seed: 4, ..sampling }, ..options };
    assert_ne!(run(&model, &tokenizer, "once upon a time", &other).0.ids, first.ids);
}

#[test]
fn greedy_is_what_transformers_says() {
    let Some(dir) = assets("models/stories260K") else { return };
    let model = Decoder::load(&config(&dir), &Tensors::read(&dir)).unwrap();
    let tokenizer = Tokenizer::from_file(&dir.join("tokenizer.json")).unwrap();
    let options = GenerateOptions { max_new_tokens: 70, ..Default::default() };
    let (generated, _) = run(&model, &tokenizer, "Once upon a time", &options);
    let expected = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a \
        big, red ball. She wanted to play with it, but it was too high.";
    assert!(generated.text.starts_with(expected), "{}", generated.text);
}

#[test]
fn texts_end_where_they_should() {
    let (model, tokenizer) = stories();
    let options = GenerateOptions { max_new_tokens: 40, ..Default::default() };
    let (whole, _) = run(&model, &tokenizer, "once upon a time", &options);
    // A stop text cuts, and is not shown even in part.
    let middle = whole.text.len() / 2;
    let stop: String = whole.text[middle..].chars().take(7).collect();
    let (cut, shown) = run(
        &model,
        &tokenizer,
        "once upon a time",
        &GenerateOptions { stop: vec![stop.clone()], ..options.clone() },
    );
    assert_eq!((cut.finish, &cut.text, &shown), (Finish::Stop, &shown, &cut.text));
    assert_eq!(cut.text, whole.text[..whole.text.find(&stop).unwrap()]);
    // A token of `eos` cuts before itself.
    let eos = vec![whole.ids[10]];
    let first = whole.ids.iter().position(|id| *id == eos[0]).unwrap();
    let (cut, _) = run(&model, &tokenizer, "once upon a time", &GenerateOptions { eos, ..options.clone() });
    assert_eq!((cut.finish, &cut.ids[..]), (Finish::Eos, &whole.ids[..first]));
    // So does the caller.
    let ids = tokenizer.encode("once upon a time", true).unwrap();
    let cut = generate_ids(&model, &ids, &options, |_| ControlFlow::Break(())).unwrap();
    assert_eq!((cut.finish, &cut.ids[..]), (Finish::Caller, &whole.ids[..1]));
}

#[test]
fn learned_positions_end_the_text() {
    let golden = Golden::open("base-gpt2");
    let model = Decoder::load(&config(golden.dir()), &Tensors::read(golden.dir())).unwrap();
    let options = GenerateOptions { max_new_tokens: 20, ..Default::default() };
    let run = |len: usize| generate_ids(&model, &vec![5; len], &options, |_| ControlFlow::Continue(()));
    // The token after the last position can still be predicted, but not be read.
    let generated = run(250).unwrap();
    assert_eq!((generated.finish, generated.ids.len()), (Finish::Context, 7));
    assert_eq!(run(236).unwrap().finish, Finish::Length);
    assert!(matches!(run(257), Err(ModelError::Context { positions: 257, limit: 256 })));
    assert!(run(0).is_err());
}

#[test]
fn bad_tokens_are_named() {
    let (model, _) = stories();
    assert!(matches!(model.logits(&[1, 2048]), Err(ModelError::Token { id: 2048, vocab: 2048 })));
}

#[test]
fn eos_comes_from_the_generation_config_first() {
    let (model, _) = stories();
    let spec = model.spec();
    assert_eq!(eos_tokens(spec, None).unwrap(), spec.eos);
    assert_eq!(eos_tokens(spec, Some(&json!({"eos_token_id": [7, 8]}))).unwrap(), [7, 8]);
    assert_eq!(eos_tokens(spec, Some(&json!({}))).unwrap(), spec.eos);
    assert!(eos_tokens(spec, Some(&json!({"eos_token_id": 99999}))).is_err());
}
