//! The forward pass in f64, written as plainly as possible and sharing only [`ArchSpec`] with the crate.

use ndarray::{Array1, Array2, Axis, concatenate, s};
use quant_core::WeightSource;
use quant_model::{Activation, ArchSpec, NormKind, NormPlace, PositionSpec};

use super::Tensors;

struct Model<'a> {
    spec: &'a ArchSpec,
    src: &'a Tensors,
}

/// Logits `[ids, vocab]` of a text, or the hidden states `[ids, hidden]` of an encoder, in f64 throughout.
pub(crate) fn logits(spec: &ArchSpec, src: &Tensors, ids: &[u32]) -> Array2<f64> {
    let model = Model { spec, src };
    let names = &spec.names;
    let table = model.matrix(&model.full(names.embedding), false);
    let mut x = Array2::from_shape_fn((ids.len(), spec.hidden_size), |(t, i)| table[[ids[t] as usize, i]]);
    let post = spec.norm.place == NormPlace::After;
    if spec.token_types > 0 {
        x += &model.matrix(&model.full(names.token_types), false).row(0);
    }
    if spec.positions == PositionSpec::Learned {
        let positions = model.matrix(&model.full(names.positions), false);
        x += &positions.slice(s![..ids.len(), ..]);
    }
    if post {
        x = model.norm(&x, &model.full(names.embedding_norm), spec.norm.kind);
    }
    for layer in 0..spec.layers {
        let path = spec.block_path(layer, src);
        let norm = |x: &Array2<f64>, name| model.norm(x, &format!("{path}.{name}"), spec.norm.kind);
        let h = if post { x.clone() } else { norm(&x, names.attention_norm) };
        let qkv = model.stage(&path, 0, &h);
        x += &model.stage(&path, 1, &model.attention(layer, &path, &qkv));
        if post {
            x = norm(&x, names.attention_norm);
        }
        let h = if post { x.clone() } else { norm(&x, names.mlp_norm) };
        let up = model.stage(&path, 2, &h);
        let inner = spec.intermediate_size;
        let act = Array2::from_shape_fn((ids.len(), inner), |(t, i)| {
            activation(spec.activation, up[[t, i]]) * if spec.gated { up[[t, inner + i]] } else { 1.0 }
        });
        x += &model.stage(&path, 3, &act);
        if post {
            x = norm(&x, names.mlp_norm);
        }
    }
    if !spec.causal {
        return x;
    }
    let x = model.norm(&x, &model.full(names.final_norm), spec.norm.kind);
    let head = if spec.tied_embeddings { table } else { model.matrix(names.head, false) };
    x.dot(&head.t())
}

fn activation(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::Silu => x / (1.0 + libm::exp(-x)),
        Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x / 2.0f64.sqrt())),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + libm::tanh((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))))
        }
        Activation::Relu => x.max(0.0),
    }
}

impl Model<'_> {
    fn full(&self, module: &str) -> String {
        let full = format!("{}{module}", self.spec.names.prefix);
        if self.src.contains(&format!("{full}.weight")) { full } else { module.to_owned() }
    }

    fn vector(&self, name: &str) -> Array1<f64> {
        self.src.tensor(name).unwrap().to_f32().unwrap().into_iter().map(f64::from).collect()
    }

    fn matrix(&self, module: &str, transposed: bool) -> Array2<f64> {
        let tensor = self.src.tensor(&format!("{module}.weight")).unwrap();
        let values = tensor.to_f32().unwrap().into_iter().map(f64::from).collect();
        let matrix = Array2::from_shape_vec((tensor.shape()[0], tensor.shape()[1]), values).unwrap();
        if transposed { matrix.reversed_axes() } else { matrix }
    }

    fn stage(&self, path: &str, stage: usize, x: &Array2<f64>) -> Array2<f64> {
        let outs: Vec<Array2<f64>> = (self.spec.stages[stage].linears.iter())
            .map(|linear| {
                let module = format!("{path}.{}", linear.name);
                let mut y = x.dot(&self.matrix(&module, self.spec.conv1d).t());
                if self.src.contains(&format!("{module}.bias")) {
                    y += &self.vector(&format!("{module}.bias"));
                }
                y
            })
            .collect();
        concatenate(Axis(1), &outs.iter().map(|y| y.view()).collect::<Vec<_>>()).unwrap()
    }

    fn norm(&self, x: &Array2<f64>, path: &str, kind: NormKind) -> Array2<f64> {
        let weight = self.vector(&format!("{path}.weight"));
        let mut y = x.clone();
        for mut row in y.rows_mut() {
            if kind == NormKind::Layer {
                let mean = row.mean().unwrap();
                row -= mean;
            }
            let variance = row.dot(&row) / row.len() as f64;
            row /= (variance + f64::from(self.spec.norm.eps)).sqrt();
            row *= &weight;
            if kind == NormKind::Layer {
                row += &self.vector(&format!("{path}.bias"));
            }
        }
        y
    }

    fn attention(&self, layer: usize, path: &str, qkv: &Array2<f64>) -> Array2<f64> {
        let spec = self.spec;
        let (t, d) = (qkv.nrows(), spec.head_dim);
        let head = |column: usize, norm: &str, rotate: bool| {
            let mut x = qkv.slice(s![.., column..column + d]).to_owned();
            if spec.qk_norm && rotate {
                x = self.norm(&x, &format!("{path}.{norm}"), NormKind::Rms);
            }
            match &spec.positions {
                PositionSpec::Rope(rope) if rotate => {
                    let inv = rope.frequencies(t);
                    Array2::from_shape_fn((t, d), |(p, i)| {
                        let angle = p as f64 * f64::from(inv[i % (d / 2)]);
                        let (a, b) = (x[[p, i]], x[[p, (i + d / 2) % d]]);
                        let b = if i < d / 2 { -b } else { b };
                        (a * libm::cos(angle) + b * libm::sin(angle)) * f64::from(rope.attention_factor())
                    })
                }
                _ => x,
            }
        };
        let mut out = Array2::zeros((t, spec.q_size()));
        for h in 0..spec.heads {
            let kv = h / (spec.heads / spec.kv_heads) * d;
            let q = head(h * d, spec.names.q_norm, true);
            let k = head(spec.q_size() + kv, spec.names.k_norm, true);
            let v = head(spec.q_size() + spec.kv_size() + kv, "", false);
            for i in 0..t {
                let first = spec.window.of_layer(layer).map_or(0, |w| (i + 1).saturating_sub(w));
                let scale = f64::from(spec.attention_scale.of_layer(layer));
                let last = if spec.causal { i } else { t - 1 };
                let scores: Vec<f64> = (first..=last).map(|j| scale * q.row(i).dot(&k.row(j))).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| libm::exp(s - max)).sum();
                for (j, s) in (first..=last).zip(scores) {
                    let p = libm::exp(s - max) / sum;
                    out.slice_mut(s![i, h * d..(h + 1) * d]).scaled_add(p, &v.row(j));
                }
            }
        }
        out
    }
}
