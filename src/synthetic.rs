//! Models of known shapes with random weights, made in their packed form.

use half::f16;
use quant_core::{
    Codes, DenseTensor, Grid, LinearWeights, Offset, Params, QuantizedLinear, QuantizedMatrix, WeightError,
    WeightSource,
};
use quant_model::{ArchSpec, Decoder};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::GroupSize;
use crate::error::Error;

/// The shape of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its name on the command line.
    pub name: &'static str,
    model_type: &'static str,
    hidden: usize,
    layers: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    rope_theta: f64,
    tied: bool,
}

/// TinyLlama.
const LLAMA_1_1B: Shape = Shape {
    name: "llama-1.1b",
    model_type: "llama",
    hidden: 2048,
    layers: 22,
    ffn: 5632,
    heads: 32,
    kv_heads: 4,
    head_dim: 64,
    vocab: 32_000,
    rope_theta: 1e4,
    tied: false,
};

/// Llama 3 8B.
const LLAMA_8B: Shape = Shape {
    name: "llama-8b",
    hidden: 4096,
    layers: 32,
    ffn: 14_336,
    kv_heads: 8,
    head_dim: 128,
    vocab: 128_256,
    rope_theta: 5e5,
    ..LLAMA_1_1B
};

/// The shapes that have a name.
pub const SHAPES: [Shape; 5] = [
    LLAMA_1_1B,
    LLAMA_8B,
    // Eight of its blocks, with Llama 2's vocabulary.
    Shape { name: "llama-8b-l8", layers: 8, vocab: 32_000, ..LLAMA_8B },
    Shape {
        name: "qwen3-0.6b",
        model_type: "qwen3",
        hidden: 1024,
        layers: 28,
        ffn: 3072,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        vocab: 151_936,
        rope_theta: 1e6,
        tied: true,
    },
    // Two blocks that run in no time.
    Shape { name: "tiny", hidden: 256, layers: 2, ffn: 512, heads: 4, kv_heads: 2, vocab: 512, ..LLAMA_1_1B },
];

impl Shape {
    /// The shape of that name.
    pub fn find(name: &str) -> Option<Shape> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    fn config(&self) -> Value {
        json!({
            "model_type": self.model_type, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "intermediate_size": self.ffn, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocab, "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "max_position_embeddings": 1 << 17,
        })
    }
}

/// The layouts whose grids random weights can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RandomLayout {
    /// Symmetric integers.
    Gptq,
    /// Integers with zero points.
    Awq,
    /// The table of 16 numbers of bitsandbytes.
    Nf4,
}

impl RandomLayout {
    /// All of them.
    pub const ALL: [RandomLayout; 3] = [RandomLayout::Gptq, RandomLayout::Awq, RandomLayout::Nf4];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            RandomLayout::Gptq => "gptq",
            RandomLayout::Awq => "awq",
            RandomLayout::Nf4 => "nf4",
        }
    }
}

/// How random weights are held, embedding and head included.
#[derive(Clone, Copy, Debug)]
pub struct RandomWeights {
    /// Their grid.
    pub layout: RandomLayout,
    /// Bits per code, 1 to 8; NF4 has 4 whatever is said here.
    pub bits: u8,
    /// Weights that share a scale.
    pub group: GroupSize,
}

/// A model of random weights, made layer by layer: neither a float model nor two copies of a packed one exist at any
/// time.
pub fn synthetic(shape: &Shape, weights: RandomWeights) -> Result<Decoder, Error> {
    let config = shape.config();
    let spec = ArchSpec::from_config(&config)?;
    Ok(Decoder::load(&config, &Source { spec, weights })?)
}

/// Weights by name.
struct Source {
    spec: ArchSpec,
    weights: RandomWeights,
}

impl Source {
    fn matrix(
        &self,
        seed: u64,
        rows: usize,
        cols: usize,
    ) -> Result<QuantizedMatrix, quant_core::MatrixError> {
        let RandomWeights { layout, bits, group } = self.weights;
        let bits = if layout == RandomLayout::Nf4 { 4 } else { bits };
        let mut codes = Codes::zeros(bits, rows, cols)?;
        let chunks: Vec<&mut [u8]> = codes.row_chunks_mut(64).collect();
        chunks.into_par_iter().enumerate().for_each(|(i, bytes)| {
            let mut random = seed ^ (i as u64) << 20;
            for word in bytes.chunks_mut(8) {
                word.copy_from_slice(&next(&mut random).to_le_bytes()[..word.len()]);
            }
        });
        let groups = group.groups(rows, cols);
        let count = groups.count(rows, cols);
        // Codes are uniform; this keeps activations near one.
        let deviation = if layout == RandomLayout::Nf4 { 0.5 } else { f64::from(codes.max()) / 12f64.sqrt() };
        let step = 1.0 / (deviation * (cols as f64).sqrt());
        let mut random = seed;
        let scales = (0..count).map(|_| {
            let factor = 0.75 + 0.5 * (next(&mut random) >> 40) as f64 / (1u64 << 24) as f64;
            f16::from_f64(step * factor)
        });
        let scales = Params::F16(scales.collect());
        let middle = 1 << (bits - 1);
        Ok(match layout {
            RandomLayout::Awq => {
                let zeros =
                    (0..count).map(|_| (middle - 1 + (next(&mut random) >> 63) as i32) as u8).collect();
                QuantizedMatrix::affine(codes, groups, scales, Offset::Zero(Params::U8(zeros)), 0)
            }
            RandomLayout::Nf4 => QuantizedMatrix {
                grid: Grid::Table(NF4.into()),
                ..QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0)
            },
            RandomLayout::Gptq => QuantizedMatrix::affine(codes, groups, scales, Offset::None, middle),
        })
    }
}

/// Quantiles of a normal distribution (Dettmers et al., QLoRA, appendix E), to five digits.
const NF4: [f32; 16] = [
    -1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0, 0.07958, 0.16093, 0.24611,
    0.33792, 0.44071, 0.56262, 0.72296, 1.0,
];

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl WeightSource for Source {
    fn contains(&self, name: &str) -> bool {
        name.ends_with(".weight")
    }

    fn tensor(&self, name: &str) -> Result<DenseTensor, WeightError> {
        let names = &self.spec.names;
        let of_head =
            [names.q_norm, names.k_norm].iter().any(|norm| name.ends_with(&format!(".{norm}.weight")));
        let size = if of_head { self.spec.head_dim } else { self.spec.hidden_size };
        Ok(DenseTensor::from_f32(&[size], &vec![1.0; size]))
    }

    fn linear(&self, module: &str) -> Result<LinearWeights, WeightError> {
        let (rows, cols) = self.linear_shape(module)?;
        let seed =
            module.bytes().fold(1, |seed: u64, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let matrix = self.matrix(seed, rows, cols);
        let matrix = matrix.map_err(|source| WeightError::Matrix { name: module.to_owned(), source })?;
        Ok(LinearWeights::Quantized(Box::new(QuantizedLinear::new(matrix))))
    }

    fn linear_shape(&self, module: &str) -> Result<(usize, usize), WeightError> {
        let of_block = self.spec.linears().find(|linear| module.ends_with(linear.name));
        Ok(of_block
            .map_or((self.spec.vocab_size, self.spec.hidden_size), |l| (l.out_features, l.in_features)))
    }
}

#[cfg(test)]
mod tests {
    use quant_model::Compute;

    use super::*;

    #[test]
    fn random_models_run_in_every_layout() {
        for layout in RandomLayout::ALL {
            for group in [GroupSize::Columns(32), GroupSize::Row] {
                let weights = RandomWeights { layout, bits: 4, group };
                let mut model = synthetic(&Shape::find("tiny").unwrap(), weights).unwrap();
                // Four bits and a scale for each, embedding and head included.
                let (spec, bytes) = (model.spec().clone(), model.memory_footprint().total());
                let linears: usize = spec.linears().map(|l| l.out_features * l.in_features).sum();
                let weights = 2 * linears + 2 * spec.vocab_size * spec.hidden_size;
                assert!(
                    bytes >= weights / 2 && bytes < weights * 3 / 4,
                    "{layout:?} {group:?}: {bytes} of {weights}"
                );
                for compute in [Compute::Exact, Compute::Fast] {
                    model.set_compute(compute);
                    assert_eq!(model.compute(), compute);
                    let logits = model.logits(&[1, 2, 3]).unwrap();
                    let mean = logits.iter().map(|x| x * x).sum::<f32>() / logits.len() as f32;
                    assert!((0.1..10.0).contains(&mean), "{layout:?} {compute:?}: {mean}");
                }
            }
        }
    }
}
