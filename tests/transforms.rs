//! Rewriting a model changes none of its outputs, and AWQ loses no more than the library it comes from.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ndarray::{Array2, Axis, Ix2, Slice};
use quant::{CalibrationSource, GroupSize, Model, QuantizeConfig, Silent};
use quant_core::{DenseTensor, LinearWeights, NormId, Producer, WeightError, WeightSource};
use quant_eval::score;
use quant_formats::Checkpoint;
use quant_methods::{Rewrite, transform};
use quant_model::{ArchSpec, Block, Embedding, Sequences};
use quant_testkit::{Golden, fixtures_dir};

fn golden(name: &str) -> PathBuf {
    fixtures_dir().join("golden").join(name)
}

/// Random numbers that stay the same.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// A float checkpoint of which some tensors are others.
struct Rewritten<'a> {
    base: &'a Checkpoint,
    tensors: BTreeMap<String, DenseTensor>,
}

impl Rewritten<'_> {
    fn change(&mut self, name: &str, change: impl FnOnce(&mut Vec<f32>)) {
        let tensor = self.tensor(name).unwrap();
        let mut values = tensor.to_f32().unwrap();
        change(&mut values);
        self.tensors.insert(name.to_owned(), DenseTensor::from_f32(tensor.shape(), &values));
    }

    /// Applies rewrites to the tensors of a block.
    fn apply(&mut self, spec: &ArchSpec, path: &str, rewrites: &[Rewrite]) {
        for norm in [NormId::Attention, NormId::Mlp] {
            for part in ["weight", "bias"] {
                let name = format!("{path}.{}.{part}", spec.norm_name(norm));
                if self.contains(&name) {
                    self.change(&name, |values| {
                        rewrites.iter().for_each(|r| {
                            r.norm(norm, values);
                        });
                    });
                }
            }
        }
        for (slot, linear) in spec.linears().enumerate() {
            let [weight, bias] = ["weight", "bias"].map(|part| format!("{path}.{}.{part}", linear.name));
            self.change(&weight, |values| {
                let dim = (linear.out_features, linear.in_features);
                let stored = if spec.conv1d { (dim.1, dim.0) } else { dim };
                let w = Array2::from_shape_vec(stored, values.clone()).unwrap();
                let mut w = if spec.conv1d { w.reversed_axes() } else { w };
                rewrites.iter().for_each(|rewrite| rewrite.weight(slot, &mut w));
                let w = if spec.conv1d { w.reversed_axes() } else { w };
                *values = w.as_standard_layout().iter().copied().collect();
            });
            if self.contains(&bias) {
                self.change(&bias, |values| {
                    rewrites.iter().for_each(|r| {
                        r.bias(slot, values);
                    });
                });
            }
        }
    }
}

impl WeightSource for Rewritten<'_> {
    fn contains(&self, name: &str) -> bool {
        WeightSource::contains(self.base, name)
    }

    fn tensor(&self, name: &str) -> Result<DenseTensor, WeightError> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => WeightSource::tensor(self.base, name),
        }
    }

    fn linear(&self, module: &str) -> Result<LinearWeights, WeightError> {
        let [weight, bias] = ["weight", "bias"].map(|part| format!("{module}.{part}"));
        let bias = self.contains(&bias).then(|| self.tensor(&bias)).transpose()?;
        Ok(LinearWeights::Dense { weight: self.tensor(&weight)?, bias })
    }

    fn linear_shape(&self, module: &str) -> Result<(usize, usize), WeightError> {
        self.base.linear_shape(module)
    }
}

/// Factors that are powers of two change exponents and round nothing: every architecture gives the same bits, with
/// biases, grouped heads, fused projections and norms of both kinds.
#[test]
fn folding_powers_of_two_changes_no_bit() {
    let mut random = Random(1);
    for (name, stages) in [
        ("base-llama", 4),
        ("base-mistral", 4),
        ("base-qwen2", 4),
        ("base-qwen3", 4),
        // What an activation function makes takes up nothing.
        ("base-gpt2", 3),
        // Nor do norms that also feed the residual stream.
        ("base-bert", 1),
    ] {
        let base = Checkpoint::open(golden(name)).unwrap();
        let spec = Arc::new(ArchSpec::from_config(base.config()).unwrap());
        let len = 12;
        let sequences = Sequences::new(&spec, 0, len).unwrap();
        let x = Array2::from_shape_simple_fn((2 * len, spec.hidden_size), || {
            random.below(2001) as f32 / 1000.0 - 1.0
        });
        for layer in 0..spec.layers {
            let path = spec.block_path(layer, &base);
            let mut rewritten = Rewritten { base: &base, tensors: BTreeMap::new() };
            let mut folded = 0;
            for stage in 0..spec.stages.len() {
                let producer = spec.producer(stage);
                let features = spec.stages[stage].linears[0].in_features;
                let mut scales: Vec<f32> =
                    (0..features).map(|_| (random.below(17) as f32 - 8.0).exp2()).collect();
                let outputs = match &producer {
                    Producer::Outputs { slot, rows } => {
                        // Features that share a row share the factor.
                        let first = |row| rows.iter().position(|r| r == row).unwrap();
                        scales = rows.iter().map(|row| scales[first(row)]).collect();
                        spec.linears().nth(*slot).unwrap().out_features
                    }
                    _ => 0,
                };
                let rewrites = transform::fold(&producer, outputs, spec.slots(stage), &scales);
                folded += usize::from(!rewrites.is_empty());
                rewritten.apply(&spec, &path, &rewrites);
            }
            assert_eq!(folded, stages, "{name}");
            assert!(rewritten.tensors.values().any(|tensor| !tensor.is_empty()));
            let run = |source: &dyn WeightSource| {
                let mut x = x.clone();
                let block = Block::load(&spec, layer, source).unwrap();
                block.forward(&mut x, &sequences, None).unwrap();
                x
            };
            let (before, after) = (run(&base), run(&rewritten));
            assert!(
                before.iter().zip(&after).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{name} layer {layer}"
            );
        }
    }
}

/// Other factors round: the norm's weight when it is divided, the linear's when it is multiplied, and the normalised
/// input anew. So each product is off by at most four roundings, and a sum of them by four roundings of its magnitudes.
#[test]
fn folding_any_factor_changes_four_roundings() {
    let mut random = Random(7);
    for name in ["base-llama", "base-qwen3"] {
        let base = Checkpoint::open(golden(name)).unwrap();
        let spec = Arc::new(ArchSpec::from_config(base.config()).unwrap());
        let path = spec.block_path(0, &base);
        let scales: Vec<f32> =
            (0..spec.hidden_size).map(|_| 0.01 + random.below(100_000) as f32 / 1000.0).collect();
        let rewrites = transform::fold(&spec.producer(0), 0, spec.slots(0), &scales);
        let mut rewritten = Rewritten { base: &base, tensors: BTreeMap::new() };
        rewritten.apply(&spec, &path, &rewrites);
        let x =
            Array2::from_shape_simple_fn((8, spec.hidden_size), || random.below(2001) as f32 / 500.0 - 2.0);
        let run = |source: &dyn WeightSource| {
            let normed = Block::load_without_linears(&spec, 0, source).unwrap().begin(x.view());
            let weight = source.tensor(&format!("{path}.self_attn.q_proj.weight")).unwrap().to_f32().unwrap();
            let dim = (spec.q_size(), spec.hidden_size);
            (normed.mapv(f64::from), Array2::from_shape_vec(dim, weight).unwrap().mapv(f64::from))
        };
        let ((n, w), (n_after, w_after)) = (run(&base), run(&rewritten));
        assert_ne!(w, w_after);
        let (before, after) = (n.dot(&w.t()), n_after.dot(&w_after.t()));
        let magnitudes = n.mapv(f64::abs).dot(&w.mapv(f64::abs).t());
        // Half an EPSILON each; a thousandth more for their products, and for sums in f64.
        let bound = 4.0 * 1.001 * 0.5 * f64::from(f32::EPSILON);
        for ((before, after), magnitude) in before.iter().zip(&after).zip(&magnitudes) {
            assert!((before - after).abs() <= bound * magnitude, "{name}: {before} {after}");
        }
    }
}

/// Mean KL divergence of a model's logits from those of the float model.
fn divergence(float: &Model, model: &Model, ids: &[u32]) -> f64 {
    let (expected, found) = (float.logits(ids).unwrap(), model.logits(ids).unwrap());
    let rows = expected.rows().into_iter().zip(found.rows());
    let kl = rows
        .map(|(p, q)| score(q.as_slice().unwrap(), Some(p.as_slice().unwrap()), 0).divergence.unwrap().kl);
    kl.sum::<f64>() / ids.len() as f64
}

/// Error of each block's output on the inputs that it has in the float model, relative to the output's norm.
fn block_errors(base: &Checkpoint, quantized: &Checkpoint, samples: &Array2<u32>) -> Vec<f64> {
    let spec = Arc::new(ArchSpec::from_config(base.config()).unwrap());
    let (count, len) = samples.dim();
    let embedding = Embedding::load(&spec, base).unwrap();
    let mut x = Array2::zeros((count * len, spec.hidden_size));
    for (i, ids) in samples.rows().into_iter().enumerate() {
        let rows = Slice::from(i * len..(i + 1) * len);
        x.slice_axis_mut(Axis(0), rows).assign(&embedding.embed(&ids.to_vec(), 0).unwrap());
    }
    let sequences = Sequences::new(&spec, 0, len).unwrap();
    let square = |m: Array2<f32>| m.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    let of_layer = |layer| {
        let before = x.clone();
        let mut found = x.clone();
        Block::load(&spec, layer, base).unwrap().forward(&mut x, &sequences, None).unwrap();
        Block::load(&spec, layer, quantized).unwrap().forward(&mut found, &sequences, None).unwrap();
        (square(found - &x) / square(&x - before)).sqrt()
    };
    (0..spec.layers).map(of_layer).collect()
}

/// On the same model, with the same calibration tokens, nothing comes out worse than from AutoAWQ.
#[test]
fn awq_loses_no_more_than_its_reference() {
    for (base, peer, group) in
        [("base-llama", "awq-gemm-b4-g128", 128), ("base-qwen3", "awq-qwen3-gemm-b4-g64", 64)]
    {
        let expected = Golden::open(base);
        let ids = expected.i32("calib_input_ids").into_dimensionality::<Ix2>().unwrap();
        let samples = ids.mapv(|id| u32::try_from(id).unwrap());
        let mut config = QuantizeConfig {
            group: GroupSize::Columns(group),
            calibration: CalibrationSource::Ids(samples.rows().into_iter().map(|row| row.to_vec()).collect()),
            ..QuantizeConfig::new("awq").unwrap()
        };
        // AutoAWQ tries its candidates on all of them.
        config.options.awq.tokens = samples.len();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let summary = quant::quantize(&golden(base), &out, &config, &Silent).unwrap();
        assert_eq!((summary.layout.as_str(), summary.fallbacks), ("awq", 0));

        let [float, theirs] = [base, peer].map(|name| Model::open(&golden(name)).unwrap());
        let ours = Model::open(&out).unwrap();
        let open = |path: PathBuf| Checkpoint::open(path).unwrap();
        let (reference, found) = (open(golden(base)), open(out));
        let errors = block_errors(&reference, &found, &samples);
        let peers = block_errors(&reference, &open(golden(peer)), &samples);
        for (layer, (error, peer)) in errors.iter().zip(&peers).enumerate() {
            assert!(error <= peer, "{base} layer {layer}: {error} against {peer}");
        }
        // The texts of the fixture and of the calibration.
        let mut texts: Vec<Vec<u32>> = samples.rows().into_iter().take(8).map(|row| row.to_vec()).collect();
        texts.push(expected.ids("input_ids"));
        let [mine, peers] =
            [&ours, &theirs].map(|model| texts.iter().map(|ids| divergence(&float, model, ids)).sum::<f64>());
        assert!(mine <= peers, "{base}: {mine} against {peers}");
    }
}
