//! One transformer block, run whole or stage by stage.

use std::sync::Arc;

use ndarray::{Array2, ArrayView2, Axis, Slice};
use quant_core::{WeightError, WeightSource};
use quant_kernels::{Heads, Mask, attend, vec};
use rayon::prelude::*;

use crate::arch::{Activation, ArchSpec, LinearSpec, NormKind, NormPlace, PositionSpec, StageKind};
use crate::error::ModelError;
use crate::kv::LayerCache;
use crate::linear::{Linear, linear};
use crate::norm::Norm;
use crate::rope::RopeTable;

/// Rows of activations as sequences of equal length, one after the other, all at the same positions.
#[derive(Clone, Debug)]
pub struct Sequences {
    start: usize,
    len: usize,
    rope: Option<RopeTable>,
}

impl Sequences {
    /// Sequences of `len` rows at the positions `start .. start + len`, up to which a text is known.
    pub fn new(spec: &ArchSpec, start: usize, len: usize) -> Result<Self, ModelError> {
        Self::within(spec, start, len, start + len)
    }

    /// Sequences of `len` rows from `start` on, out of texts known up to `text_len`.
    pub(crate) fn within(
        spec: &ArchSpec,
        start: usize,
        len: usize,
        text_len: usize,
    ) -> Result<Self, ModelError> {
        let rope = match &spec.positions {
            PositionSpec::Rope(rope) => Some(rope.table(start, len, text_len)),
            PositionSpec::Learned if start + len > spec.max_positions => {
                return Err(ModelError::Context { positions: start + len, limit: spec.max_positions });
            }
            PositionSpec::Learned => None,
        };
        Ok(Self { start, len, rope })
    }

    /// Position of the first row of a sequence.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Rows of a sequence.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// One transformer block.
///
/// Its linears lie in slots, one after the other in the order of [`ArchSpec::linears`], and can be replaced one by
/// one. [`Block::forward`] is [`Block::begin`] and then [`Block::advance`] for every stage; a quantizer that wants to
/// see the inputs of a stage makes the same calls itself:
///
/// ```text
/// input = block.begin(x)
/// for stage in 0..4:  (look at input, set the linears of the stage)
///     input = block.advance(stage, input, &mut x, sequences, cache)
/// ```
pub struct Block {
    spec: Arc<ArchSpec>,
    attention_norm: Norm,
    mlp_norm: Norm,
    qk_norm: Option<[Norm; 2]>,
    scale: f32,
    window: Option<usize>,
    slots: Vec<Slot>,
}

struct Slot {
    module: String,
    linear: Option<Box<dyn Linear>>,
}

impl Block {
    /// Block `layer` with all weights.
    pub fn load(spec: &Arc<ArchSpec>, layer: usize, src: &dyn WeightSource) -> Result<Self, ModelError> {
        let mut block = Self::load_without_linears(spec, layer, src)?;
        for (slot, linear_spec) in spec.linears().enumerate() {
            let module = block.module(slot);
            check_linear(linear_spec, module, spec.conv1d, src)?;
            let weights = src.linear(module)?;
            block.set_linear(slot, linear(module, weights, spec.conv1d)?)?;
        }
        Ok(block)
    }

    /// Block `layer` with its norms and empty slots. Only names and shapes of the linears are checked.
    pub fn load_without_linears(
        spec: &Arc<ArchSpec>,
        layer: usize,
        src: &dyn WeightSource,
    ) -> Result<Self, ModelError> {
        let path = spec.block_path(layer, src);
        let norm =
            |name: &str, size: usize, kind| load_norm(spec, &format!("{path}.{name}"), size, kind, src);
        let (hidden, kind, names) = (spec.hidden_size, spec.norm.kind, &spec.names);
        let qk_norm = match spec.qk_norm {
            true => Some([
                norm(names.q_norm, spec.head_dim, NormKind::Rms)?,
                norm(names.k_norm, spec.head_dim, NormKind::Rms)?,
            ]),
            false => None,
        };
        let slots = spec.linears().map(|linear| {
            let module = format!("{path}.{}", linear.name);
            check_linear(linear, &module, spec.conv1d, src)?;
            Ok(Slot { module, linear: None })
        });
        Ok(Self {
            attention_norm: norm(names.attention_norm, hidden, kind)?,
            mlp_norm: norm(names.mlp_norm, hidden, kind)?,
            qk_norm,
            scale: spec.attention_scale.of_layer(layer),
            window: spec.window.of_layer(layer),
            slots: slots.collect::<Result<_, ModelError>>()?,
            spec: spec.clone(),
        })
    }

    /// The architecture.
    pub fn spec(&self) -> &Arc<ArchSpec> {
        &self.spec
    }

    /// Full path of the linear in a slot, such as `model.layers.3.mlp.up_proj`.
    pub fn module(&self, slot: usize) -> &str {
        &self.slots[slot].module
    }

    /// The linear in a slot, if it was set.
    pub fn linear(&self, slot: usize) -> Option<&dyn Linear> {
        self.slots[slot].linear.as_deref()
    }

    /// Replaces the linear in a slot.
    pub fn set_linear(&mut self, slot: usize, linear: Box<dyn Linear>) -> Result<(), ModelError> {
        let spec = self.spec.linears().nth(slot).expect("the slot exists");
        let (out, inputs) = linear.shape();
        let Slot { module, linear: place } = &mut self.slots[slot];
        if (out, inputs) != (spec.out_features, spec.in_features) {
            return Err(wrong_shape(spec, module, (out, inputs)).into());
        }
        *place = Some(linear);
        Ok(())
    }

    /// Empties a slot and hands over what it held.
    pub fn take_linear(&mut self, slot: usize) -> Option<Box<dyn Linear>> {
        self.slots[slot].linear.take()
    }

    /// Bytes of all weights in memory.
    pub fn bytes(&self) -> usize {
        let norms = [&self.attention_norm, &self.mlp_norm].into_iter().chain(self.qk_norm.iter().flatten());
        let linears = self.slots.iter().filter_map(|slot| slot.linear.as_ref());
        norms.map(Norm::bytes).sum::<usize>() + linears.map(|linear| linear.bytes()).sum::<usize>()
    }

    /// Input of the first stage for the residual stream `x`: `[t, hidden]`.
    pub fn begin(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        match self.spec.norm.place {
            NormPlace::Before => self.attention_norm.forward(x),
            NormPlace::After => x.to_owned(),
        }
    }

    /// Runs one stage: its linears on `input` and what follows them. `x`: `[t, hidden]` is the residual stream, to
    /// which the second and fourth stage add. Returns the input of the next stage (after the last: nothing, `[0, 0]`).
    ///
    /// With a cache there is one sequence, and its keys and values are appended.
    pub fn advance(
        &self,
        stage: usize,
        input: ArrayView2<'_, f32>,
        x: &mut Array2<f32>,
        sequences: &Sequences,
        cache: Option<&mut LayerCache>,
    ) -> Result<Array2<f32>, ModelError> {
        let y = self.project(stage, input)?;
        match self.spec.stages[stage].kind {
            StageKind::Qkv => self.attend(y, sequences, cache),
            StageKind::AttentionOut => {
                *x += &y;
                if self.spec.norm.place == NormPlace::Before {
                    return Ok(self.mlp_norm.forward(x.view()));
                }
                *x = self.attention_norm.forward(x.view());
                Ok(x.clone())
            }
            StageKind::MlpIn => Ok(activated(&self.spec, y)),
            StageKind::MlpOut => {
                *x += &y;
                if self.spec.norm.place == NormPlace::After {
                    *x = self.mlp_norm.forward(x.view());
                }
                Ok(Array2::zeros((0, 0)))
            }
        }
    }

    /// The whole block on the residual stream `x`: `[t, hidden]`.
    pub fn forward(
        &self,
        x: &mut Array2<f32>,
        sequences: &Sequences,
        mut cache: Option<&mut LayerCache>,
    ) -> Result<(), ModelError> {
        let mut input = self.begin(x.view());
        for stage in 0..self.spec.stages.len() {
            input = self.advance(stage, input.view(), x, sequences, cache.as_deref_mut())?;
        }
        Ok(())
    }

    /// The linears of a stage, their outputs side by side: `[t, sum of out]`. Whether a checkpoint fuses query, key
    /// and value thus makes no difference afterwards.
    fn project(&self, stage: usize, input: ArrayView2<'_, f32>) -> Result<Array2<f32>, ModelError> {
        let width = self.spec.stages[stage].linears.iter().map(|linear| linear.out_features).sum();
        let mut y = Array2::zeros((input.nrows(), width));
        let mut column = 0;
        for slot in &self.slots[self.spec.slots(stage)] {
            let Some(linear) = &slot.linear else {
                return Err(ModelError::Empty { module: slot.module.clone() });
            };
            let end = column + linear.shape().0;
            linear.forward(input, y.slice_axis_mut(Axis(1), Slice::from(column..end)))?;
            column = end;
        }
        Ok(y)
    }

    /// From `qkv`: `[t, q | k | v]` to the attended values `[t, q]`.
    fn attend(
        &self,
        mut qkv: Array2<f32>,
        sequences: &Sequences,
        cache: Option<&mut LayerCache>,
    ) -> Result<Array2<f32>, ModelError> {
        let (q_size, kv_size) = (self.spec.q_size(), self.spec.kv_size());
        self.place(&mut qkv, sequences);
        let (q, kv) = qkv.view().split_at(Axis(1), q_size);
        let (k, v) = kv.split_at(Axis(1), kv_size);
        let heads = Heads { heads: self.spec.heads, kv_heads: self.spec.kv_heads, dim: self.spec.head_dim };
        let mut out = Array2::zeros((q.nrows(), q_size));
        match cache {
            Some(cache) => {
                let mask = Mask::Causal { offset: cache.len(), window: self.window };
                cache.append(k, v);
                let (k, v) = cache.views();
                attend(heads, mask, self.scale, q, k, v, out.view_mut())?;
            }
            None => {
                let mask = match self.spec.causal {
                    true => Mask::Causal { offset: 0, window: self.window },
                    false => Mask::All,
                };
                let len = sequences.len.max(1);
                let each = out.axis_chunks_iter_mut(Axis(0), len).into_par_iter().enumerate();
                each.try_for_each(|(i, out)| {
                    let rows = Slice::from(i * len..i * len + out.nrows());
                    let [q, k, v] = [&q, &k, &v].map(|all| all.slice_axis(Axis(0), rows));
                    attend(heads, mask, self.scale, q, k, v, out)
                })?;
            }
        }
        Ok(out)
    }

    /// Norm and rotation of the query and key heads.
    fn place(&self, qkv: &mut Array2<f32>, sequences: &Sequences) {
        let (q_size, kv_size, dim) = (self.spec.q_size(), self.spec.kv_size(), self.spec.head_dim);
        if self.qk_norm.is_none() && sequences.rope.is_none() {
            return;
        }
        qkv.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(r, mut row)| {
            let mut normed = vec![0.0; dim];
            let row = row.as_slice_mut().expect("rows are contiguous");
            let (q, kv) = row.split_at_mut(q_size);
            for (which, heads) in [q, &mut kv[..kv_size]].into_iter().enumerate() {
                for head in heads.chunks_exact_mut(dim) {
                    if let Some(norms) = &self.qk_norm {
                        norms[which].row(head, &mut normed);
                        head.copy_from_slice(&normed);
                    }
                    if let Some(rope) = &sequences.rope {
                        let t = r % sequences.len;
                        let (cos, sin) = (rope.cos.row(t), rope.sin.row(t));
                        let (cos, sin) = (cos.to_slice().expect("a row"), sin.to_slice().expect("a row"));
                        vec::rope(head, cos, sin).expect("an angle per pair");
                    }
                }
            }
        });
    }
}

/// `y`: `[t, gate | up]`, or without a gate `[t, intermediate]`, to `[t, intermediate]`.
fn activated(spec: &ArchSpec, mut y: Array2<f32>) -> Array2<f32> {
    let inner = spec.intermediate_size;
    y.axis_iter_mut(Axis(0)).into_par_iter().for_each(|mut row| {
        let row = row.as_slice_mut().expect("rows are contiguous");
        let (first, up) = row.split_at_mut(inner);
        match (spec.activation, spec.gated) {
            (Activation::Silu, true) => return vec::silu_mul(first, up).expect("halves are equal"),
            (Activation::Silu, false) => vec::silu(first),
            (Activation::Gelu, _) => vec::gelu_erf(first),
            (Activation::GeluTanh, _) => vec::gelu_tanh(first),
            (Activation::Relu, _) => vec::relu(first),
        }
        first.iter_mut().zip(up).for_each(|(gate, up)| *gate *= *up);
    });
    if spec.gated { y.slice_axis(Axis(1), Slice::from(..inner)).to_owned() } else { y }
}

/// Reads the norm at `path`, whose weight must be `[size]`.
pub(crate) fn load_norm(
    spec: &ArchSpec,
    path: &str,
    size: usize,
    kind: NormKind,
    src: &dyn WeightSource,
) -> Result<Norm, ModelError> {
    let read = |suffix: &str, old: &str| -> Result<Vec<f32>, ModelError> {
        let [name, old] = [suffix, old].map(|part| format!("{path}.{part}"));
        // What BERT's first files call them.
        let name = if !src.contains(&name) && src.contains(&old) { old } else { name };
        let tensor = src.tensor(&name)?;
        if tensor.shape() != [size] {
            let (found, because) = (tensor.shape().to_vec(), "hidden_size or head_dim".to_owned());
            return Err(WeightError::Shape { name, expected: vec![size], found, because }.into());
        }
        Ok(tensor.to_f32().map_err(|source| WeightError::Tensor { name, source })?)
    };
    let bias = if kind == NormKind::Layer { Some(read("bias", "beta")?) } else { None };
    Ok(Norm { kind, eps: spec.norm.eps, weight: read("weight", "gamma")?, bias })
}

/// Compares what is stored with the configuration before any weight is read.
fn check_linear(
    spec: &LinearSpec,
    module: &str,
    conv1d: bool,
    src: &dyn WeightSource,
) -> Result<(), ModelError> {
    let (out, inputs) = src.linear_shape(module)?;
    let bias = format!("{module}.bias");
    if spec.bias && !src.contains(&bias) {
        return Err(WeightError::Missing { name: bias }.into());
    }
    let fits = (out, inputs) == (spec.out_features, spec.in_features);
    // A dense Conv1D is stored transposed, a quantized one is not.
    if fits || conv1d && (inputs, out) == (spec.out_features, spec.in_features) {
        return Ok(());
    }
    Err(wrong_shape(spec, module, (out, inputs)).into())
}

fn wrong_shape(spec: &LinearSpec, module: &str, found: (usize, usize)) -> WeightError {
    WeightError::Shape {
        name: format!("{module}.weight"),
        expected: vec![spec.out_features, spec.in_features],
        found: vec![found.0, found.1],
        because: spec.because.to_owned(),
    }
}
