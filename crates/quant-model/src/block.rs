//! One transformer block, run whole or stage by stage.

use std::sync::Arc;

use ndarray::{Array2, ArrayView2, Axis, Slice};
use quant_core::{NormId, WeightError, WeightSource};
use quant_kernels::{Heads, KvStore, Mask, attend, attend_stored, pool, vec};

use crate::arch::{Activation, ArchSpec, LinearSpec, NormKind, NormPlace, PositionSpec, StageKind};
use crate::error::ModelError;
use crate::linear::{Compute, Linear, forward_all, linear};
use crate::norm::Norm;
use crate::rope::RopeTable;
use crate::rows::{Workspace, each_row, each_row_mut};

/// Rows of activations as sequences of equal length, one after the other, all at the same positions, and how products
/// with them are computed.
#[derive(Clone, Debug)]
pub struct Sequences {
    start: usize,
    len: usize,
    rope: Option<RopeTable>,
    compute: Compute,
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
        Ok(Self { start, len, rope, compute: Compute::Exact })
    }

    /// The same with other products; they are exact at first.
    #[must_use]
    pub fn computed(self, compute: Compute) -> Self {
        Self { compute, ..self }
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

    /// The linears that are set.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &dyn Linear> {
        self.slots.iter().filter_map(|slot| slot.linear.as_deref())
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

    /// Weight of a norm, and its bias if it has one, `[hidden]` each.
    pub fn norm(&self, norm: NormId) -> (&[f32], Option<&[f32]>) {
        let Norm { weight, bias, .. } = match norm {
            NormId::Attention => &self.attention_norm,
            NormId::Mlp => &self.mlp_norm,
        };
        (weight, bias.as_deref())
    }

    /// Changes the weight of a norm, and then its bias if it has one, `[hidden]` each.
    pub fn edit_norm(&mut self, norm: NormId, mut edit: impl FnMut(&mut [f32])) {
        let Norm { weight, bias, .. } = match norm {
            NormId::Attention => &mut self.attention_norm,
            NormId::Mlp => &mut self.mlp_norm,
        };
        edit(weight);
        bias.iter_mut().for_each(|bias| edit(bias));
    }

    /// Bytes of all weights in memory.
    pub fn bytes(&self) -> usize {
        let norms = [&self.attention_norm, &self.mlp_norm].into_iter().chain(self.qk_norm.iter().flatten());
        let linears = self.slots.iter().filter_map(|slot| slot.linear.as_ref());
        norms.map(Norm::bytes).sum::<usize>() + linears.map(|linear| linear.bytes()).sum::<usize>()
    }

    /// Input of the first stage for the residual stream `x`: `[t, hidden]`.
    pub fn begin(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        self.enter(x, &mut Workspace::default())
    }

    /// Runs one stage: its linears on `input` and what follows them. `x`: `[t, hidden]` is the residual stream, to
    /// which the second and fourth stage add. Returns the input of the next stage (after the last: nothing, `[0, 0]`).
    ///
    /// With a store there is one sequence, and its keys and values are appended.
    pub fn advance(
        &self,
        stage: usize,
        input: ArrayView2<'_, f32>,
        x: &mut Array2<f32>,
        sequences: &Sequences,
        store: Option<&mut KvStore>,
    ) -> Result<Array2<f32>, ModelError> {
        self.pass(stage, input, x, sequences, store, &mut Workspace::default())
    }

    /// The whole block on the residual stream `x`: `[t, hidden]`.
    pub fn forward(
        &self,
        x: &mut Array2<f32>,
        sequences: &Sequences,
        store: Option<&mut KvStore>,
    ) -> Result<(), ModelError> {
        self.forward_in(x, sequences, store, &mut Workspace::default())
    }

    /// [`Block::forward`] in memory that other blocks have used.
    pub(crate) fn forward_in(
        &self,
        x: &mut Array2<f32>,
        sequences: &Sequences,
        mut store: Option<&mut KvStore>,
        work: &mut Workspace,
    ) -> Result<(), ModelError> {
        let mut input = self.enter(x.view(), work);
        for stage in 0..self.spec.stages.len() {
            let next = self.pass(stage, input.view(), x, sequences, store.as_deref_mut(), work)?;
            work.recycle(std::mem::replace(&mut input, next));
        }
        Ok(())
    }

    fn enter(&self, x: ArrayView2<'_, f32>, work: &mut Workspace) -> Array2<f32> {
        let mut out = work.matrix(x.nrows(), x.ncols());
        match self.spec.norm.place {
            NormPlace::Before => self.attention_norm.forward(x, &mut out),
            NormPlace::After => out.assign(&x),
        }
        out
    }

    fn pass(
        &self,
        stage: usize,
        input: ArrayView2<'_, f32>,
        x: &mut Array2<f32>,
        sequences: &Sequences,
        store: Option<&mut KvStore>,
        work: &mut Workspace,
    ) -> Result<Array2<f32>, ModelError> {
        let mut y = self.project(stage, input, sequences.compute, work)?;
        let (t, hidden) = x.dim();
        let next = match self.spec.stages[stage].kind {
            StageKind::Qkv => {
                self.place(&mut y, sequences);
                let mut out = work.matrix(t, self.spec.q_size());
                self.attend(y.view(), sequences, store, &mut out)?;
                out
            }
            StageKind::AttentionOut => {
                let mut out = work.matrix(t, hidden);
                match self.spec.norm.place {
                    NormPlace::Before => self.mlp_norm.add_forward(x, y.view(), &mut out),
                    NormPlace::After => {
                        self.attention_norm.add_forward(x, y.view(), &mut out);
                        x.assign(&out);
                    }
                }
                out
            }
            StageKind::MlpIn => {
                let mut out = work.matrix(t, self.spec.intermediate_size);
                activate(&self.spec, y.view(), &mut out);
                out
            }
            StageKind::MlpOut => {
                match self.spec.norm.place {
                    NormPlace::Before => {
                        let add =
                            |_, y: &[f32], x: &mut [f32]| vec::add(x, y).expect("rows are of one width");
                        each_row(y.view(), x.view_mut(), add);
                    }
                    NormPlace::After => {
                        let mut out = work.matrix(t, hidden);
                        self.mlp_norm.add_forward(x, y.view(), &mut out);
                        work.recycle(std::mem::replace(x, out));
                    }
                }
                Array2::zeros((0, 0))
            }
        };
        work.recycle(y);
        Ok(next)
    }

    /// The linears of a stage, their outputs side by side: `[t, sum of out]`. Whether a checkpoint fuses query, key
    /// and value thus makes no difference afterwards.
    fn project(
        &self,
        stage: usize,
        input: ArrayView2<'_, f32>,
        compute: Compute,
        work: &mut Workspace,
    ) -> Result<Array2<f32>, ModelError> {
        let mut linears = Vec::with_capacity(3);
        for slot in &self.slots[self.spec.slots(stage)] {
            let empty = || ModelError::Empty { module: slot.module.clone() };
            linears.push(slot.linear.as_deref().ok_or_else(empty)?);
        }
        let width = linears.iter().map(|linear| linear.shape().0).sum();
        let mut y = work.matrix(input.nrows(), width);
        let mut outs = Vec::with_capacity(linears.len());
        let mut rest = y.view_mut();
        for linear in &linears {
            let (out, right) = rest.split_at(Axis(1), linear.shape().0);
            outs.push(out);
            rest = right;
        }
        forward_all(&linears, input, compute, outs, work)?;
        Ok(y)
    }

    /// From `qkv`: `[t, q | k | v]` to the attended values `[t, q]`.
    fn attend(
        &self,
        qkv: ArrayView2<'_, f32>,
        sequences: &Sequences,
        store: Option<&mut KvStore>,
        out: &mut Array2<f32>,
    ) -> Result<(), ModelError> {
        let (q, kv) = qkv.split_at(Axis(1), self.spec.q_size());
        let (k, v) = kv.split_at(Axis(1), self.spec.kv_size());
        let heads = Heads { heads: self.spec.heads, kv_heads: self.spec.kv_heads, dim: self.spec.head_dim };
        let mask = |offset| match self.spec.causal {
            true => Mask::Causal { offset, window: self.window },
            false => Mask::All,
        };
        if let Some(store) = store {
            let mask = mask(store.len());
            store.append(k, v)?;
            attend_stored(heads, mask, self.scale, q, store, out.view_mut())?;
            return Ok(());
        }
        let len = sequences.len.max(1);
        let each = out.axis_chunks_iter_mut(Axis(0), len).enumerate();
        let mut each: Vec<_> = each.map(|(i, out)| (i, out, Ok(()))).collect();
        pool::for_each(&mut each, |(i, out, result)| {
            let rows = Slice::from(*i * len..*i * len + out.nrows());
            let [q, k, v] = [&q, &k, &v].map(|all| all.slice_axis(Axis(0), rows));
            *result = attend(heads, mask(0), self.scale, q, k, v, out.view_mut());
        });
        Ok(each.into_iter().try_for_each(|(_, _, result)| result)?)
    }

    /// Norm and rotation of the query and key heads.
    fn place(&self, qkv: &mut Array2<f32>, sequences: &Sequences) {
        let (q_size, kv_size, dim) = (self.spec.q_size(), self.spec.kv_size(), self.spec.head_dim);
        if self.qk_norm.is_none() && sequences.rope.is_none() {
            return;
        }
        let heads = qkv.slice_axis_mut(Axis(1), Slice::from(..q_size + kv_size));
        each_row_mut(heads, |r, row| {
            let (q, k) = row.split_at_mut(q_size);
            for (which, heads) in [q, k].into_iter().enumerate() {
                if let Some(norms) = &self.qk_norm {
                    let mut normed = vec![0.0; dim];
                    for head in heads.chunks_exact_mut(dim) {
                        norms[which].row(head, &mut normed);
                        head.copy_from_slice(&normed);
                    }
                }
                if let Some(rope) = &sequences.rope {
                    let t = r % sequences.len;
                    let (cos, sin) = (rope.cos.row(t), rope.sin.row(t));
                    let (cos, sin) = (cos.to_slice().expect("a row"), sin.to_slice().expect("a row"));
                    vec::rope(heads, cos, sin).expect("an angle per pair");
                }
            }
        });
    }
}

/// `y`: `[t, gate | up]`, or without a gate `[t, intermediate]`, to `out`: `[t, intermediate]`.
fn activate(spec: &ArchSpec, y: ArrayView2<'_, f32>, out: &mut Array2<f32>) {
    let inner = spec.intermediate_size;
    each_row(y, out.view_mut(), |_, row, out| {
        let (first, up) = row.split_at(inner);
        out.copy_from_slice(first);
        match (spec.activation, spec.gated) {
            (Activation::Silu, true) => return vec::silu_mul(out, up).expect("halves are equal"),
            (Activation::Silu, false) => vec::silu(out),
            (Activation::Gelu, _) => vec::gelu_erf(out),
            (Activation::GeluTanh, _) => vec::gelu_tanh(out),
            (Activation::Relu, _) => vec::relu(out),
        }
        out.iter_mut().zip(up).for_each(|(gate, up)| *gate *= *up);
    });
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
