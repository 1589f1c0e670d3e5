//! Products in integers: near the exact ones, and as independent of threads and cuts as they are.

use ndarray::Array2;
use quant_core::{
    ActGrid, ActGroup, ActSpec, Codes, Groups, Offset, Params, QuantizedLinear, QuantizedMatrix,
};
use quant_formats::Checkpoint;
use quant_kernels::ActScales;
use quant_kernels::isa::{Isa, with_cap};
use quant_model::{Compute, Decoder, Linear, PackedLinear};
use quant_testkit::synthetic::{self, Arch, Shape, Storage};
use quant_testkit::{Golden, fixtures_dir};

/// Quantized checkpoints of several bits, with zero points, an activity order, biases, tied heads, rounded inputs.
const MODELS: [&str; 6] = [
    "ct-w8a8",
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

/// `‖a - b‖ / ‖b‖`.
fn apart(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut b.iter().copied())).sqrt()
}

/// Fast logits are those of plain code to the bit, whatever the instruction set. Each product is held to the exact one
/// by the tests of the kernels; through a whole model of random weights errors grow at will, so here it is only
/// asked that something is rounded and that the result still has to do with the exact one: two unrelated vectors of
/// one length are `sqrt(2)` of it apart.
fn check_fast(name: &str, model: &mut Decoder, ids: &[u32]) {
    let exact = model.logits(ids).unwrap();
    assert_eq!(model.compute(), Compute::Exact);
    model.set_compute(Compute::Fast);
    assert_eq!(model.compute(), Compute::Fast, "{name}");
    let fast = model.logits(ids).unwrap();
    let plain = with_cap(Isa::Scalar, || model.logits(ids).unwrap());
    assert!(fast.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
    let share = apart(&fast, &exact);
    assert!(share > 1e-5 && share < 0.5 * std::f64::consts::SQRT_2, "{name}: {share}");
}

#[test]
fn fast_logits_are_those_of_plain_code() {
    for name in MODELS {
        let (mut model, ids) = load(name);
        check_fast(name, &mut model, &ids);
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

/// Inputs that a layout rounds to integers are rounded with its scales; no other grid is.
#[test]
fn integer_products_take_the_scales_of_the_layout() {
    let dynamic = |grid, per, symmetric| ActSpec::Dynamic { grid, per, symmetric, outlier_threshold: None };
    let fixed = |grid, zero| ActSpec::Static { grid, scale: 0.25, zero };
    for (input, scales) in [
        (ActSpec::Float, Some(ActScales::Group)),
        (dynamic(ActGrid::Int8, ActGroup::Token, true), Some(ActScales::Row)),
        (fixed(ActGrid::Int8, 0), Some(ActScales::Fixed(0.25))),
        (dynamic(ActGrid::Int8, ActGroup::Token, false), None),
        (dynamic(ActGrid::Int8, ActGroup::Tensor, true), None),
        (dynamic(ActGrid::E4M3, ActGroup::Token, true), None),
        (fixed(ActGrid::Int8, 3), None),
        (fixed(ActGrid::E4M3, 0), None),
    ] {
        let codes = Codes::from_values(8, 2, 4, &[1, 255, 128, 7, 0, 3, 90, 200]).unwrap();
        let (groups, scale) = (Groups::Row { len: 4 }, Params::F32(vec![0.5, 2.0]));
        let matrix = QuantizedMatrix::affine(codes, groups, scale, Offset::None, 128);
        let layer = QuantizedLinear { input: input.clone(), ..QuantizedLinear::new(matrix) };
        let linear = PackedLinear::new("a.test", layer).unwrap();
        assert_eq!(linear.packed().map(|packed| packed.scales), scales, "{input:?}");
    }
}

/// Weights of 16 bits have no product of integers: they and their inputs are rounded to bf16. Those of 32 bits have the
/// exact product only, whatever is asked for.
#[test]
fn dense_models_run_in_bf16() {
    let dir = tempfile::tempdir().unwrap();
    let ids: Vec<u32> = (0..40).map(|i| i * 37 % 128).collect();
    let load = |storage| {
        let path = dir.path().join(format!("{storage:?}"));
        synthetic::Checkpoint { storage, ..synthetic::Checkpoint::new(Shape::tiny(Arch::Llama)) }
            .write(&path)
            .unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        Decoder::load(checkpoint.config(), &checkpoint).unwrap()
    };
    for storage in [Storage::Bf16, Storage::F16] {
        check_fast(&format!("{storage:?}"), &mut load(storage), &ids);
    }
    let mut model = load(Storage::F32);
    let exact = model.logits(&ids).unwrap();
    model.set_compute(Compute::Fast);
    assert_eq!((model.compute(), model.logits(&ids).unwrap()), (Compute::Exact, exact));
}
