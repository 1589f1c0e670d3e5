//! Perplexities of trained models against those of transformers, and the arithmetic of reports.

use std::fs;
use std::path::Path;

use quant_core::LinearWeights;
use quant_eval::{EvalError, Report, Windowing, evaluate, windows_of_ids};
use quant_formats::{Checkpoint, read_npy_ids};
use quant_model::{Decoder, Tokenizer, linear};
use quant_testkit::{assets, fixtures_dir};

fn model(dir: &Path) -> (Decoder, Tokenizer) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Decoder::load(checkpoint.config(), &checkpoint).unwrap();
    (model, Tokenizer::from_file(&dir.join("tokenizer.json")).unwrap())
}

fn stories_model() -> (Decoder, Tokenizer) {
    model(&fixtures_dir().join("models/ts-llama-3.7M"))
}

fn run(model: &Decoder, reference: Option<&Decoder>, windows: &[Vec<u32>]) -> Report {
    evaluate(model, reference, windows, |_, _| {}).unwrap()
}

/// References are printed to as many digits as stand here; they were computed in f32, whose rounding changes the mean
/// over thousands of tokens by less than 1e-5.
fn assert_perplexity(report: &Report, expected: f64, digits: i32) {
    eprintln!("{report:?}");
    let error = (report.perplexity - expected).abs();
    assert!(
        error < 0.5 * 10f64.powi(-digits) + 1e-5 * expected,
        "{} instead of {expected}",
        report.perplexity
    );
}

#[test]
fn stories_of_the_fixtures() {
    let (model, tokenizer) = stories_model();
    let text = fs::read_to_string(fixtures_dir().join("text/stories.txt")).unwrap();
    let windows = Windowing::stories(256).windows(&tokenizer, &text).unwrap();
    assert_eq!(windows.len(), 100);
    let report = run(&model, None, &windows);
    assert_eq!(report.tokens, 13_855);
    assert_perplexity(&report, 42.627, 3);
    assert_eq!(report.kl_mean, None);
}

#[test]
fn stories_of_the_test_set() {
    let Some(text) = assets("text/tinystories-lower/test.txt") else { return };
    let (model, tokenizer) = stories_model();
    let text = fs::read_to_string(text).unwrap();
    let windows = Windowing::stories(256).windows(&tokenizer, &text).unwrap();
    assert_perplexity(&run(&model, None, &windows), 19.5748, 4);
}

#[test]
fn the_smaller_story_model() {
    let (Some(dir), Some(text)) = (assets("models/stories260K"), assets("text/tinystories/test.txt")) else {
        return;
    };
    let (model, tokenizer) = model(&dir);
    let text = fs::read_to_string(text).unwrap();
    let windows = Windowing::stories(512).windows(&tokenizer, &text).unwrap();
    assert_eq!(windows.len(), 316);
    assert_perplexity(&run(&model, None, &windows[..150]), 4.7189, 4);
    let all = run(&model, None, &windows);
    assert_eq!(all.tokens, 126_962);
    assert_perplexity(&all, 4.7382, 4);
}

#[test]
fn fixed_ids() {
    let Some(ids) = assets("quality/eval_ids.npy") else { return };
    let (model, _) = stories_model();
    let ids = read_npy_ids(&ids).unwrap();
    let windows: Vec<Vec<u32>> = ids.rows().into_iter().map(|row| row.to_vec()).collect();
    let report = run(&model, None, &windows);
    assert_eq!(report.tokens, 12_240);
    // From transformers 5.23.0; the table beside the ids says 20.878.
    assert_perplexity(&report, 20.87942, 5);
}

fn windows() -> Vec<Vec<u32>> {
    let ids: Vec<u32> = (0..1000u32).map(|i| i * i * 7 % 2048).collect();
    let mut windows = windows_of_ids(&ids, 90);
    windows.extend([vec![1, 2, 3], vec![5], vec![6, 7]]);
    windows
}

#[test]
fn a_model_is_its_own_reference() {
    let (model, _) = stories_model();
    let mut last = (0, 0);
    let report = evaluate(&model, Some(&model), &windows(), |done, total| last = (done, total)).unwrap();
    assert_eq!(last, (11 * 90 + 6, 11 * 90 + 6));
    assert_eq!(report.tokens, 11 * 89 + 3);
    assert_eq!((report.kl_mean, report.kl_p99, report.kl_max), (Some(0.0), Some(0.0), Some(0.0)));
    assert_eq!(report.top1_agreement, Some(1.0));
    assert_eq!(report.reference_perplexity, Some(report.perplexity));
}

/// A coarser model: all its linears rounded to multiples of 2^-4.
fn coarse() -> Decoder {
    let checkpoint = Checkpoint::open(fixtures_dir().join("models/ts-llama-3.7M")).unwrap();
    let mut model = Decoder::load(checkpoint.config(), &checkpoint).unwrap();
    for block in model.blocks_mut() {
        for slot in 0..block.spec().linears().count() {
            let module = block.module(slot).to_owned();
            let weights = quant_core::WeightSource::linear(&checkpoint, &module).unwrap();
            let weight = quant_model::weight_f32(&module, &weights, false).unwrap();
            let rounded: Vec<f32> = weight.iter().map(|w| (w * 16.0).round() / 16.0).collect();
            let shape = [weight.nrows(), weight.ncols()];
            let weight = quant_core::DenseTensor::from_f32(&shape, &rounded);
            let dense = LinearWeights::Dense { weight, bias: None };
            block.set_linear(slot, linear(&module, dense, false).unwrap()).unwrap();
        }
    }
    model
}

/// Reports do not depend on the number of threads, nor on what else is in the batch.
#[test]
fn reports_are_the_same_on_any_number_of_threads() {
    let ((model, _), coarse, windows) = (stories_model(), coarse(), windows());
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let report = pool.install(|| run(&coarse, Some(&model), &windows));
        Report { seconds: 0.0, tokens_per_second: 0.0, ..report }
    };
    let one = run(1);
    let (mean, p99, max) = (one.kl_mean.unwrap(), one.kl_p99.unwrap(), one.kl_max.unwrap());
    assert!(0.0 < mean && mean < p99 && p99 < max, "{one:?}");
    assert!(one.top1_agreement.unwrap() < 1.0);
    for threads in [2, 3, 7] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
    let parts: Vec<Report> = windows
        .iter()
        .filter(|w| w.len() > 1)
        .map(|w| self::run(&coarse, Some(&model), std::slice::from_ref(w)))
        .collect();
    let nll: f64 = parts.iter().map(|r| r.nll * r.tokens as f64).sum::<f64>() / one.tokens as f64;
    // One rounding of a sum of a thousand terms more or less.
    assert!((nll - one.nll).abs() < 1e-12 * nll);
}

#[test]
fn what_cannot_be_scored_is_an_error() {
    let (model, _) = stories_model();
    let fail = |windows: &[Vec<u32>]| evaluate(&model, None, windows, |_, _| {}).unwrap_err();
    assert!(matches!(fail(&[]), EvalError::Empty));
    assert!(matches!(fail(&[vec![1]]), EvalError::Empty));
    assert!(matches!(fail(&[vec![1, 9999]]), EvalError::Model(_)));
    let golden = quant_testkit::Golden::open("base-llama");
    let (other, _) = self::model(golden.dir());
    let error = evaluate(&model, Some(&other), &windows(), |_, _| {}).unwrap_err();
    assert!(matches!(error, EvalError::Vocabulary { model: 2048, reference: 512 }));
}
