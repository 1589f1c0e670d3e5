//! How fast layouts are read and written, in GB/s of packed bytes.
//!
//! `RAYON_NUM_THREADS=1 cargo run --release -p quant-formats --example pack` (with the name of a layout, only that
//! one). Tensors are in memory: this is the work between the disk and the matrix, codes and parameters. Medians of
//! several runs.
#![expect(clippy::print_stdout, reason = "a report")]

use std::collections::BTreeMap;
use std::time::Instant;

use quant_core::{
    ActSpec, Codes, ColScale, DenseTensor, Grid, GridKind, GroupSize, Offset, Params, ParamsKind, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{PlannedLayer, StoredModel, TensorSource, layout};
use serde_json::{Value, json};

const ROWS: usize = 4096;
const COLS: usize = 8192;
const RUNS: usize = 7;

/// Layout, bits, values and groups.
const CASES: [(&str, u8, GridKind, GroupSize); 15] = [
    ("gptq_v2", 4, GridKind::Int, GroupSize::Columns(128)),
    ("gptq_v2", 3, GridKind::Int, GroupSize::Columns(128)),
    ("bnb_nf4", 4, GridKind::Nf4, GroupSize::Flat(64)),
    ("bnb_int8", 8, GridKind::Int, GroupSize::Row),
    ("hqq", 8, GridKind::Int, GroupSize::Columns(64)),
    ("hqq", 4, GridKind::Int, GroupSize::Columns(64)),
    ("hqq", 3, GridKind::Int, GroupSize::Columns(64)),
    ("hqq", 2, GridKind::Int, GroupSize::Columns(64)),
    ("hqq", 1, GridKind::Int, GroupSize::Columns(64)),
    ("hqq", 4, GridKind::Int, GroupSize::Strided(64)),
    ("quanto", 8, GridKind::E4M3, GroupSize::Row),
    ("quanto", 4, GridKind::Int, GroupSize::Columns(128)),
    ("quanto", 2, GridKind::Int, GroupSize::Columns(128)),
    ("sinq", 4, GridKind::Int, GroupSize::Columns(64)),
    ("sinq", 5, GridKind::Int, GroupSize::Columns(64)),
];

struct Source {
    tensors: BTreeMap<String, DenseTensor>,
    config: Value,
}

impl TensorSource for Source {
    fn lookup(&self, name: &str) -> Option<(quant_core::DType, &[usize])> {
        self.tensors.lookup(name)
    }

    fn read(&self, name: &str) -> Result<DenseTensor, quant_formats::FormatError> {
        self.tensors.read(name)
    }

    fn model_config(&self) -> &Value {
        &self.config
    }
}

fn matrix(id: &str, bits: u8, grid: GridKind, group: GroupSize) -> QuantizedMatrix {
    let max = (1usize << bits) - 1;
    let values: Vec<u8> = (0..ROWS * COLS).map(|i| ((i * 7 / 3) & max) as u8 & 0x7E).collect();
    let codes = Codes::from_values(bits, ROWS, COLS, &values).expect("codes fit");
    let groups = group.groups(ROWS, COLS);
    let count = groups.count(ROWS, COLS);
    let halves = |value: f32| Params::F16(vec![half::f16::from_f32(value); count]);
    let (scales, offset) = match id {
        "bnb_nf4" => (Params::F32(vec![0.5; count]), Offset::None),
        "bnb_int8" => {
            let base = Box::new(Params::F32(vec![0.5; count]));
            (Params::Scaled { base, factor: 127.0, divide: true }, Offset::None)
        }
        "quanto" if bits == 8 => (halves(0.5), Offset::None),
        "quanto" => (halves(0.5), Offset::Shift { param: halves(1.0), sign: -1.0 }),
        "gptq_v2" => (halves(0.5), Offset::Zero(Params::U8(vec![3; count]))),
        _ => (halves(0.5), Offset::Zero(halves(3.5))),
    };
    let mut matrix = QuantizedMatrix::affine(codes, groups, scales, offset, 0);
    if grid != GridKind::Int || id == "bnb_int8" {
        matrix.grid = grid.grid(bits).unwrap_or(Grid::UNSIGNED);
    }
    if id == "sinq" {
        matrix.col_scale = Some(ColScale { values: vec![1.0; COLS], rows_per_block: ROWS });
    }
    matrix
}

/// Median seconds of a run.
fn time(mut run: impl FnMut()) -> f64 {
    let mut seconds: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[RUNS / 2]
}

fn main() -> Result<(), quant_formats::FormatError> {
    let only = std::env::args().nth(1);
    println!("{ROWS} x {COLS}, {} threads", rayon::current_num_threads());
    for (id, bits, grid, group) in CASES.into_iter().filter(|c| only.as_deref().is_none_or(|o| o == c.0)) {
        let layout = layout(id)?;
        let linear = QuantizedLinear::new(matrix(id, bits, grid, group));
        let spec = QuantSpec { scales: ParamsKind::F16, ..linear.weight.spec() };
        let input = ActSpec::Float;
        let stored = StoredModel { spec: &spec, input: &input, exceptions: &[], meta: &Default::default() };
        let mut config = layout.config(&stored);
        let layer = PlannedLayer::new("m", &spec, ROWS, COLS);
        if let Some((_, file)) = layout.side_files(&config, &[layer]).first().filter(|_| id != "gptq_v2") {
            config["modules"] = serde_json::from_slice(file).unwrap_or_default();
        }
        let tensors: BTreeMap<_, _> = layout.write(&linear, "m")?.into_iter().collect();
        let bytes: usize = tensors.values().map(|t| t.bytes().len()).sum();
        let source = Source { tensors, config: json!({ "hidden_size": COLS }) };
        let reader = layout.reader(&config)?;
        let read = time(|| drop(std::hint::black_box(reader.read(&source, "m"))));
        let write = time(|| drop(std::hint::black_box(layout.write(&linear, "m"))));
        assert!(reader.read(&source, "m")?.weight.codes == linear.weight.codes, "{id} comes back");
        let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
        println!(
            "{id:9} {bits} bits {:12} read {:6.2} GB/s, write {:6.2} GB/s",
            group.to_string(),
            rate(read),
            rate(write)
        );
    }
    Ok(())
}
