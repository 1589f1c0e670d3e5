//! Codes of GPTQModel 7.7 from the same weights and Hessian, every configuration of the golden layer.

use ndarray::{Array2, Ix1, Ix2};
use quant_core::{GroupSize, Offset, QuantSpec, QuantizedMatrix};
use quant_methods::{
    ColumnOrder, Compat, Gptq, GptqOptions, Hessian, LayerStats, LayerWeights, Needs, Quantizer,
};
use quant_testkit::Golden;

/// A configuration of `fixtures/golden/gptq-layer/meta.json`.
struct Config {
    key: &'static str,
    bits: u8,
    group: GroupSize,
    symmetric: bool,
    options: GptqOptions,
}

const PLAIN: GptqOptions = GptqOptions {
    order: ColumnOrder::Natural,
    static_groups: false,
    mse: None,
    damp: 0.05,
    damp_increment: 0.01,
    block_size: 128,
    compat: Some(Compat::GptqModel),
};
const ACT: GptqOptions = GptqOptions { order: ColumnOrder::Activation, ..PLAIN };
const GAR: GptqOptions = GptqOptions { order: ColumnOrder::GroupAware, ..PLAIN };
const MSE: GptqOptions = GptqOptions { mse: Some(2.4), ..PLAIN };
const STATIC: GptqOptions = GptqOptions { static_groups: true, ..ACT };
const DAMP: GptqOptions = GptqOptions { damp: 0.01, ..PLAIN };

const fn config(key: &'static str, bits: u8, group: usize, symmetric: bool, options: GptqOptions) -> Config {
    Config { key, bits, group: GroupSize::Columns(group), symmetric, options }
}

const CONFIGS: [Config; 12] = [
    config("b4.g128.sym", 4, 128, true, PLAIN),
    config("b4.g32.sym", 4, 32, true, PLAIN),
    config("b4.g32.asym", 4, 32, false, PLAIN),
    config("b4.g32.sym.act", 4, 32, true, ACT),
    config("b4.g32.asym.act", 4, 32, false, ACT),
    config("b4.g32.sym.gar", 4, 32, true, GAR),
    config("b3.g64.asym.act", 3, 64, false, ACT),
    config("b2.g32.asym", 2, 32, false, PLAIN),
    Config { group: GroupSize::Row, ..config("b8.g-1.sym", 8, 1, true, PLAIN) },
    config("b4.g32.sym.mse", 4, 32, true, MSE),
    config("b4.g32.sym.act.static", 4, 32, true, STATIC),
    config("b4.g32.sym.damp0.01", 4, 32, true, DAMP),
];

/// The golden layer: weights, Hessian and inputs.
struct Layer {
    golden: Golden,
    w: Array2<f32>,
    h: Array2<f32>,
}

impl Layer {
    fn open() -> Self {
        let golden = Golden::open("gptq-layer");
        let matrix = |name| golden.f32(name).into_dimensionality::<Ix2>().unwrap();
        let (w, h) = (matrix("weight"), matrix("hessian"));
        Self { golden, w, h }
    }

    fn quantize(&self, config: &Config, options: GptqOptions) -> QuantizedMatrix {
        let Config { bits, group, symmetric, .. } = *config;
        let gptq = Gptq::new(options);
        assert_eq!(gptq.needs(), Needs::HESSIAN);
        let spec = QuantSpec { bits, group, symmetric, ..gptq.default_spec() };
        let stats = LayerStats {
            hessian: Some(Hessian { matrix: self.h.clone(), rows: 224 }),
            ..LayerStats::default()
        };
        gptq.quantize(vec![LayerWeights { w: self.w.clone(), spec }], stats).unwrap().remove(0).matrix
    }

    /// `‖(W - Ŵ) Xᵀ‖² / ‖W Xᵀ‖²`.
    fn output_error(&self, rounded: &Array2<f32>) -> f64 {
        let x = self.golden.f32("inputs").into_dimensionality::<Ix2>().unwrap();
        let square = |w: Array2<f32>| w.dot(&x.t()).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        square(&self.w - rounded) / square(self.w.clone())
    }

    /// The peer's result in the original column order.
    fn peer(&self, key: &str) -> Peer {
        let matrix = |name: &str| self.golden.f32(&format!("{key}.{name}")).into_dimensionality().unwrap();
        let codes = self.golden.u8(&format!("{key}.codes")).into_dimensionality().unwrap();
        let g_idx = self.golden.i32(&format!("{key}.g_idx")).into_dimensionality::<Ix1>().unwrap();
        Peer { codes, g_idx: g_idx.to_vec(), scales: matrix("scales"), zeros: matrix("zeros") }
    }
}

struct Peer {
    codes: Array2<u8>,
    g_idx: Vec<i32>,
    scales: Array2<f32>,
    zeros: Array2<f32>,
}

impl Peer {
    fn scale(&self, row: usize, col: usize) -> f64 {
        f64::from(self.scales[[row, self.g_idx[col] as usize]])
    }

    fn weight(&self, row: usize, col: usize) -> f64 {
        let zero = self.zeros[[row, self.g_idx[col] as usize]];
        f64::from(self.codes[[row, col]] as f32 - zero) * self.scale(row, col)
    }
}

/// Codes in the original column order.
fn codes(matrix: &QuantizedMatrix) -> Array2<u8> {
    let stored = matrix.input_perm.as_ref().map(|p| p.inverse());
    let column = |c: usize| stored.as_ref().map_or(c, |s| s[c] as usize);
    Array2::from_shape_fn((matrix.rows(), matrix.cols()), |(r, c)| matrix.codes.get(r, column(c)))
}

/// Columns by descending diagonal, the order in which the peer rounds with `desc_act`; groups first for `gar`.
fn order(h: &Array2<f32>, config: &Config) -> Vec<usize> {
    let k = h.nrows();
    let by = |a: &usize, b: &usize| h[[*b, *b]].total_cmp(&h[[*a, *a]]);
    let mut order: Vec<usize> = (0..k).collect();
    match config.options.order {
        ColumnOrder::Natural => {}
        ColumnOrder::Activation => order.sort_by(by),
        ColumnOrder::GroupAware => {
            let mut groups: Vec<Vec<usize>> =
                order.chunks(config.group.len(k)).map(<[usize]>::to_vec).collect();
            groups.iter_mut().for_each(|g| g.sort_by(by));
            groups.sort_by(|a, b| by(&a[0], &b[0]));
            order = groups.concat();
        }
    }
    order
}

/// `R` with `R Rᵀ = H + damp · mean(diag H) · I`, upper, columns in `order`; f64.
fn reverse_factor(h: &Array2<f32>, order: &[usize], damp: f64) -> Array2<f64> {
    let k = order.len();
    let mut r = Array2::from_shape_fn((k, k), |(i, j)| f64::from(h[[order[i], order[j]]]));
    let mean = r.diag().sum() / k as f64;
    r.diag_mut().iter_mut().for_each(|d| *d += damp * mean);
    for c in (0..k).rev() {
        let tail = |r: &Array2<f64>, i: usize| (c + 1..k).map(|j| r[[i, j]] * r[[c, j]]).sum::<f64>();
        r[[c, c]] = (r[[c, c]] - tail(&r, c)).sqrt();
        (0..c).for_each(|i| r[[i, c]] = (r[[i, c]] - tail(&r, i)) / r[[c, c]]);
    }
    r
}

#[test]
fn codes_are_those_of_gptqmodel() {
    let layer = Layer::open();
    for config in &CONFIGS {
        let key = config.key;
        let (peer, ours) = (layer.peer(key), layer.quantize(config, config.options));
        let codes = codes(&ours);
        let differing = codes.iter().zip(&peer.codes).filter(|(a, b)| a != b).count();
        eprintln!("{key}: {differing} of {} codes differ", codes.len());
        // At least 99.9 % equal.
        assert!(differing * 1000 <= codes.len(), "{key}: {differing} codes differ");

        // The first difference of a row is a tie, were all computed exactly from the same errors so far.
        let order = order(&layer.h, config);
        let r = reverse_factor(&layer.h, &order, config.options.damp);
        for row in 0..codes.nrows() {
            let Some(p) = order.iter().position(|&c| codes[[row, c]] != peer.codes[[row, c]]) else {
                continue;
            };
            let c = order[p];
            let error = |c: usize| f64::from(layer.w[[row, c]]) - peer.weight(row, c);
            let earlier: f64 = (0..p).map(|i| error(order[i]) * r[[i, p]]).sum();
            let steps = (f64::from(layer.w[[row, c]]) + earlier / r[[p, p]]) / peer.scale(row, c);
            let from_tie = (steps - steps.floor() - 0.5).abs();
            eprintln!("{key}: row {row}, column {c}: {from_tie:e} steps from a tie");
            assert!(from_tie <= 1e-4, "{key}: row {row}, column {c}: {from_tie} steps from a tie");
        }

        // Scales are stored in f16; 2^-11 is half the spacing, and the f32 noise of a fit is far below.
        let groups = ours.scales.len() / codes.nrows();
        for (i, &scale) in peer.scales.iter().enumerate() {
            let (row, group) = (i / groups, i % groups);
            let ours_at = ours.scales.get(row * groups + group);
            assert!((ours_at - scale).abs() <= scale * (1.0 / 2048.0 + 1e-5), "{key}: scale {i}");
        }
        let Offset::Zero(zeros) = &ours.offset else { panic!("GPTQ has zero points") };
        assert!(peer.zeros.iter().enumerate().all(|(i, &z)| zeros.get(i) == z), "{key}: zero points");
    }
}

#[test]
fn the_default_is_better_than_the_peer() {
    let layer = Layer::open();
    let mut logs = 0.0;
    for config in &CONFIGS {
        let ours = layer.quantize(config, GptqOptions { compat: None, ..config.options });
        let peer = layer.peer(config.key);
        let theirs = Array2::from_shape_fn(layer.w.dim(), |(r, c)| peer.weight(r, c) as f32);
        let (ours, theirs) = (layer.output_error(&ours.dequantize()), layer.output_error(&theirs));
        eprintln!("{}: {ours:.6} against {theirs:.6}, {:.3}", config.key, ours / theirs);
        logs += (ours / theirs).ln();
    }
    // Fitting groups on up-to-date weights pays on average; single cases may go either way.
    assert!(logs < 0.0, "geometric mean of the ratios: {}", (logs / CONFIGS.len() as f64).exp());
}
