//! Products in integers: near the exact ones, and as independent of threads and cuts as they are.

use quant_formats::Checkpoint;
use quant_model::{Compute, Decoder};
use quant_testkit::synthetic::{self, Arch, Shape, Storage};
use quant_testkit::{Golden, fixtures_dir};

/// Quantized checkpoints of several bits, with zero points, an activity order, biases, tied heads.
const MODELS: [&str; 5] = [
    "gptq-b4-g128-sym",
    "gptq-b4-g64-asym-actorder-v2",
    "gptq-b3-g32-asym-v2",
    "gptq-gpt2-b4-g32-sym",
    "gptq-qwen3-b4-g64-sym",
];

fn load(name: &str) -> (Decoder, Vec<u32>) {
    let checkpoint = Checkpoint::open(fixtures_dir().join("golden").join(name)).unwrap();
    let model = Decoder::load(checkpoint.config(), &checkpoint).unwrap();
    (model, Golden::open(name).ids("input_ids"))
}

/// Rounding a group of 128 normal numbers to 127 steps of its largest (about 2.7 deviations) errs by
/// `2.7 / 127 / sqrt(12)` = 0.6 % of a deviation; a product of so many independent errors errs by as much of its own
/// size. The logits of two blocks stand behind nine such products whose errors add in squares: 1.8 %, of which twice
/// is allowed for distributions with longer tails.
#[test]
fn fast_logits_are_near_the_exact_ones() {
    for name in MODELS {
        let (mut model, ids) = load(name);
        let exact = model.logits(&ids).unwrap();
        assert_eq!(model.compute(), Compute::Exact);
        model.set_compute(Compute::Fast);
        assert_eq!(model.compute(), Compute::Fast);
        let fast = model.logits(&ids).unwrap();
        let squares =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let error = squares(&mut fast.iter().zip(&exact).map(|(a, b)| a - b));
        let share = (error / squares(&mut exact.iter().copied())).sqrt();
        assert!(share > 1e-5 && share < 0.036, "{name}: {share}");
    }
}

#[test]
fn fast_results_depend_on_neither_threads_nor_cuts() {
    for name in MODELS {
        let (mut model, ids) = load(name);
        model.set_compute(Compute::Fast);
        let run = |threads: usize, cuts: &[usize]| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut cache = model.new_cache();
                cuts.windows(2)
                    .map(|cut| model.next_logits(&ids[cut[0]..cut[1]], &mut cache).unwrap())
                    .last()
                    .unwrap()
            })
        };
        let len = ids.len();
        let whole = run(1, &[0, len]);
        for threads in [1, 2, 3] {
            assert_eq!(run(threads, &[0, len]), whole, "{name}, {threads} threads");
            assert_eq!(run(threads, &[0, 1, 5, 6, 7, len - 1, len]), whole, "{name}, {threads} threads");
        }
    }
}

/// Weights of 16 bits have no product of integers: they and their inputs are rounded to bf16, which errs by at most
/// 2^-9 of each. Independent errors of two operands, uniform up to that, add to `2^-9 * sqrt(2 / 3)` = 0.16 % of a
/// product; nine products to 0.5 %, of which twice is allowed.
#[test]
fn dense_models_are_near_the_exact_ones_in_bf16() {
    let dir = tempfile::tempdir().unwrap();
    for storage in [Storage::Bf16, Storage::F16, Storage::F32] {
        let path = dir.path().join(format!("{storage:?}"));
        synthetic::Checkpoint { storage, ..synthetic::Checkpoint::new(Shape::tiny(Arch::Llama)) }
            .write(&path)
            .unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let mut model = Decoder::load(checkpoint.config(), &checkpoint).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| i * 37 % 128).collect();
        let exact = model.logits(&ids).unwrap();
        model.set_compute(Compute::Fast);
        let fast = model.logits(&ids).unwrap();
        let square =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let error = square(&mut fast.iter().zip(&exact).map(|(a, b)| a - b));
        let share = (error / square(&mut exact.iter().copied())).sqrt();
        assert!(share < 0.01, "{storage:?}: {share}");
        assert!(share > 1e-5 || storage == Storage::F32, "{storage:?}: nothing was rounded");
    }
}
