//! Blocks run stage by stage, with replaced linears, on any number of threads.

use std::sync::Arc;

use ndarray::{Array2, Ix2, s};
use quant_core::{
    Codes, Groups, LinearWeights, Offset, Params, QuantizedLinear, QuantizedMatrix, WeightSource,
};
use quant_model::{ArchSpec, Block, Decoder, Embedding, ModelError, Sequences, linear, weight_f32};
use quant_testkit::Golden;

use crate::support::{Tensors, config};

struct Setup {
    spec: Arc<ArchSpec>,
    src: Tensors,
    ids: Array2<u32>,
}

fn setup(name: &str) -> Setup {
    let golden = Golden::open(name);
    let ids = golden.i32("calib_input_ids").into_dimensionality::<Ix2>().unwrap();
    Setup {
        spec: Arc::new(ArchSpec::from_config(&config(golden.dir())).unwrap()),
        src: Tensors::read(golden.dir()),
        ids: ids.slice(s![..2, ..]).mapv(|id| id as u32),
    }
}

/// What a calibrating quantizer does: empty blocks, whose linears come one stage at a time.
#[test]
fn stages_by_hand_are_the_forward_pass() {
    for name in ["base-qwen3", "base-gpt2"] {
        let Setup { spec, src, ids } = setup(name);
        let model = Decoder::load(&config(Golden::open(name).dir()), &src).unwrap();
        let expected = model.forward_batch(ids.view()).unwrap();

        let embedding = Embedding::load(&spec, &src).unwrap();
        let sequences = Sequences::new(&spec, 0, ids.ncols()).unwrap();
        let mut x = Array2::zeros((ids.len(), spec.hidden_size));
        for (n, row) in ids.rows().into_iter().enumerate() {
            x.slice_mut(s![n * 64..(n + 1) * 64, ..]).assign(&embedding.embed(&row.to_vec(), 0).unwrap());
        }
        for layer in 0..spec.layers {
            let mut block = Block::load_without_linears(&spec, layer, &src).unwrap();
            let mut input = block.begin(x.view());
            for stage in 0..spec.stages.len() {
                let early = block.advance(stage, input.view(), &mut x, &sequences, None);
                assert!(matches!(early, Err(ModelError::Empty { .. })), "{name}");
                for slot in spec.slots(stage) {
                    let module = block.module(slot).to_owned();
                    let weights = src.linear(&module).unwrap();
                    assert_eq!(weight_f32(&module, &weights, spec.conv1d).unwrap().ncols(), input.ncols());
                    block.set_linear(slot, linear(&module, weights, spec.conv1d).unwrap()).unwrap();
                }
                input = block.advance(stage, input.view(), &mut x, &sequences, None).unwrap();
            }
        }
        assert_eq!(x, expected, "{name}");
    }
}

/// An 8-bit matrix whose values are exact in f16, so that the dense twin has the same weights.
fn quantized(rows: usize, cols: usize) -> QuantizedMatrix {
    let values: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 251) as u8).collect();
    let codes = Codes::from_values(8, rows, cols, &values).unwrap();
    let scales = (0..rows * cols.div_ceil(32)).map(|i| (1 + i % 3) as f32 / 4096.0).collect();
    QuantizedMatrix::affine(codes, Groups::Row { len: 32 }, Params::F32(scales), Offset::None, 128)
}

#[test]
fn quantized_linears_have_the_bits_of_their_dense_twins() {
    let Setup { spec, src, ids } = setup("base-llama");
    let config = config(Golden::open("base-llama").dir());
    let (mut packed, mut dense) =
        (Decoder::load(&config, &src).unwrap(), Decoder::load(&config, &src).unwrap());
    for (slot, shape) in spec.linears().enumerate() {
        let matrix = quantized(shape.out_features, shape.in_features);
        let flat: Vec<f32> = matrix.dequantize().into_iter().collect();
        let twin = quant_core::DenseTensor::from_f32(&[shape.out_features, shape.in_features], &flat);
        let twin = LinearWeights::Dense { weight: twin, bias: None };
        let layer = LinearWeights::Quantized(Box::new(QuantizedLinear::new(matrix)));
        packed.blocks_mut()[0].set_linear(slot, linear("m", layer, false).unwrap()).unwrap();
        dense.blocks_mut()[0].set_linear(slot, linear("m", twin, false).unwrap()).unwrap();
    }
    let row = ids.row(0).to_vec();
    assert_eq!(packed.logits(&row).unwrap(), dense.logits(&row).unwrap());
    assert!(packed.memory_footprint().total() < dense.memory_footprint().total());
}

#[test]
fn a_linear_of_another_shape_is_refused() {
    let Setup { spec, src, .. } = setup("base-llama");
    let mut block = Block::load(&spec, 0, &src).unwrap();
    let other = block.take_linear(1).unwrap();
    assert_eq!(other.shape(), (64, 128));
    let text = block.set_linear(0, other).unwrap_err().to_string();
    assert!(text.contains("q_proj") && text.contains("[128, 128]") && text.contains("[64, 128]"), "{text}");
}

#[test]
fn results_do_not_depend_on_threads() {
    for name in ["base-mistral", "base-gpt2"] {
        let Setup { src, ids, .. } = setup(name);
        let model = Decoder::load(&config(Golden::open(name).dir()), &src).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                (model.logits(&ids.row(0).to_vec()).unwrap(), model.forward_batch(ids.view()).unwrap())
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert_eq!(run(threads), one, "{name} with {threads} threads");
        }
    }
}
