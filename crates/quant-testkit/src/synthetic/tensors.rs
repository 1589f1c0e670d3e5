//! Names, shapes and statistics of a model's tensors.

use super::{Arch, Shape};

/// One channel of this many is an outlier, at least one.
const CHANNELS_PER_OUTLIER: usize = 1024;
/// Factor on outlier channels of a normalisation: about what trained models show.
pub(super) const NORM_OUTLIER: f32 = 20.0;
/// Factor on outlier outputs of a linear layer.
pub(super) const OUTPUT_OUTLIER: f32 = 4.0;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(super) struct TensorPlan {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) values: Values,
}

/// What a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Values {
    /// Normal with standard deviation `std`.
    Normal { std: f32 },
    /// The same, with some outputs [`OUTPUT_OUTLIER`] times larger. Stored `[in, out]` if `conv1d`.
    Linear { std: f32, conv1d: bool },
    /// Near one; with `outliers` some channels, the same in all blocks, are [`NORM_OUTLIER`] times larger.
    Norm { outliers: bool },
    /// The lower triangle of ones that GPT-2 checkpoints carry as f32; no parameter.
    CausalMask,
}

impl TensorPlan {
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub(super) fn is_parameter(&self) -> bool {
        self.values != Values::CausalMask
    }
}

/// Number of outliers among `channels`.
pub(super) fn outliers(channels: usize) -> usize {
    (channels / CHANNELS_PER_OUTLIER).max(1)
}

/// Collects the tensors of one model.
struct Plan {
    tensors: Vec<TensorPlan>,
    /// Layers that write into the residual stream are scaled so that all of them together add variance one.
    residual: f32,
}

impl Plan {
    fn add(&mut self, name: String, shape: &[usize], values: Values) {
        self.tensors.push(TensorPlan { name, shape: shape.to_vec(), values });
    }

    /// A linear layer `[out, in]`; `bias` adds one of standard deviation 0.02.
    fn linear(&mut self, module: String, out: usize, cols: usize, gain: f32, bias: bool) {
        let std = gain / (cols as f32).sqrt();
        self.add(format!("{module}.weight"), &[out, cols], Values::Linear { std, conv1d: false });
        if bias {
            self.add(format!("{module}.bias"), &[out], Values::Normal { std: 0.02 });
        }
    }

    /// GPT-2's `Conv1D`: weight `[in, out]` and bias.
    fn conv1d(&mut self, module: String, out: usize, cols: usize, gain: f32) {
        let std = gain / (cols as f32).sqrt();
        self.add(format!("{module}.weight"), &[cols, out], Values::Linear { std, conv1d: true });
        self.add(format!("{module}.bias"), &[out], Values::Normal { std: 0.02 });
    }
}

/// All tensors of a model, in file order.
pub(super) fn plan(shape: &Shape) -> Vec<TensorPlan> {
    let residual = 1.0 / (2.0 * shape.layers.max(1) as f32).sqrt();
    let mut plan = Plan { tensors: Vec::new(), residual };
    match shape.arch {
        Arch::Gpt2 => gpt2(&mut plan, shape),
        _ => llama(&mut plan, shape),
    }
    plan.tensors
}

fn embedding(shape: &Shape) -> Values {
    // The head is often the same matrix: logits of unit variance.
    Values::Normal { std: 1.0 / (shape.hidden as f32).sqrt() }
}

fn llama(plan: &mut Plan, shape: &Shape) {
    let Shape { arch, hidden, ffn, vocab, .. } = *shape;
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let (residual, bias) = (plan.residual, arch == Arch::Qwen2);
    let norm = |outliers| Values::Norm { outliers };
    plan.add("model.embed_tokens.weight".into(), &[vocab, hidden], embedding(shape));
    for layer in 0..shape.layers {
        let block = format!("model.layers.{layer}");
        let attn = format!("{block}.self_attn");
        plan.add(format!("{block}.input_layernorm.weight"), &[hidden], norm(true));
        plan.linear(format!("{attn}.q_proj"), q, hidden, 1.0, bias);
        plan.linear(format!("{attn}.k_proj"), kv, hidden, 1.0, bias);
        plan.linear(format!("{attn}.v_proj"), kv, hidden, 1.0, bias);
        if arch == Arch::Qwen3 {
            plan.add(format!("{attn}.q_norm.weight"), &[shape.head_dim], norm(false));
            plan.add(format!("{attn}.k_norm.weight"), &[shape.head_dim], norm(false));
        }
        plan.linear(format!("{attn}.o_proj"), hidden, q, residual, false);
        plan.add(format!("{block}.post_attention_layernorm.weight"), &[hidden], norm(true));
        plan.linear(format!("{block}.mlp.gate_proj"), ffn, hidden, 1.0, false);
        plan.linear(format!("{block}.mlp.up_proj"), ffn, hidden, 1.0, false);
        plan.linear(format!("{block}.mlp.down_proj"), hidden, ffn, residual, false);
    }
    plan.add("model.norm.weight".into(), &[hidden], norm(false));
    if !shape.tied {
        plan.add("lm_head.weight".into(), &[vocab, hidden], embedding(shape));
    }
}

fn gpt2(plan: &mut Plan, shape: &Shape) {
    let Shape { hidden, ffn, vocab, positions, .. } = *shape;
    let residual = plan.residual;
    let norm = |plan: &mut Plan, module: String, outliers| {
        plan.add(format!("{module}.weight"), &[hidden], Values::Norm { outliers });
        plan.add(format!("{module}.bias"), &[hidden], Values::Normal { std: 0.02 });
    };
    plan.add("wte.weight".into(), &[vocab, hidden], embedding(shape));
    plan.add("wpe.weight".into(), &[positions, hidden], Values::Normal { std: 0.01 });
    for layer in 0..shape.layers {
        let block = format!("h.{layer}");
        norm(plan, format!("{block}.ln_1"), true);
        plan.add(format!("{block}.attn.bias"), &[1, 1, positions, positions], Values::CausalMask);
        plan.conv1d(format!("{block}.attn.c_attn"), 3 * hidden, hidden, 1.0);
        plan.conv1d(format!("{block}.attn.c_proj"), hidden, hidden, residual);
        norm(plan, format!("{block}.ln_2"), true);
        plan.conv1d(format!("{block}.mlp.c_fc"), ffn, hidden, 1.0);
        plan.conv1d(format!("{block}.mlp.c_proj"), hidden, ffn, residual);
    }
    norm(plan, "ln_f".into(), false);
}
