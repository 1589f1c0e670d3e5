//! Unpacking and packing layers in GB/s of their tensors' bytes, one layout after the other.
//!
//! `RAYON_NUM_THREADS=1 cargo bench --bench layouts -- gptq awq` times the layouts whose names hold one of the words,
//! all without any. A layout is given the first kind of matrix from a list that it can store; `copy` is what copying
//! as many bytes costs here. What is packed is read back and compared before it is timed.
#![expect(clippy::print_stdout, reason = "a report")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use half::f16;
use quant_core::{
    ActSpec, Codes, DenseTensor, Grid, GridKind, GroupSize, Offset, Params, ParamsKind, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{Layout, PlannedLayer, StoredModel, layouts};

const ROWS: usize = 8192;
const COLS: usize = 4096;

/// Seconds that each figure may take.
const BUDGET: f64 = 0.5;

/// Kinds of matrices, the usual ones of each layout first.
fn specs() -> Vec<QuantSpec> {
    use GridKind::{E2M1, E2M3, E4M3, Fp4, Int, Nf4};
    use GroupSize::{Columns, Flat, Row, Tensor};
    use ParamsKind::{E4M3 as BlockE4M3, E8M0, F16, F32};
    let kinds = [
        (Int, 4, Columns(128), F16),
        (Int, 4, Columns(64), F16),
        (Int, 4, Columns(32), F16),
        (Int, 3, Columns(128), F16),
        (Int, 5, Columns(128), F16),
        (Int, 8, Row, F32),
        (Int, 8, Row, F16),
        (Nf4, 4, Flat(64), F32),
        (Fp4, 4, Flat(64), F32),
        (E4M3, 8, GroupSize::Tile { rows: 128, cols: 128 }, F32),
        (E4M3, 8, Row, F32),
        (E4M3, 8, Tensor, F32),
        (E2M1, 4, Columns(16), BlockE4M3),
        (E2M1, 4, Columns(32), E8M0),
        (E2M3, 6, Columns(32), E8M0),
        (E4M3, 8, Columns(32), E8M0),
    ];
    let spec = |(grid, bits, group, scales)| QuantSpec {
        bits,
        grid,
        group,
        scales,
        symmetric: true,
        act_order: false,
    };
    kinds.map(spec).into()
}

fn matrix(spec: &QuantSpec) -> QuantizedMatrix {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    let table = spec.grid.table();
    let mut codes = Codes::zeros(spec.bits, ROWS, COLS).expect("the bits are possible");
    let mask = codes.max();
    let mut row = vec![0; COLS];
    for r in 0..ROWS {
        row.iter_mut().for_each(|code| *code = next() & mask);
        if let Some(table) = &table {
            row.iter_mut().filter(|code| !table[usize::from(**code)].is_finite()).for_each(|code| *code = 0);
        }
        codes.set_row(r, &row);
    }
    let groups = spec.group.groups(ROWS, COLS);
    let count = groups.count(ROWS, COLS);
    let scales = match spec.scales {
        ParamsKind::F16 => Params::F16(vec![f16::from_f32(0.25); count]),
        ParamsKind::E8M0 => Params::E8M0(vec![125; count]),
        ParamsKind::E4M3 => {
            Params::Scaled { base: Box::new(Params::E4M3(vec![0x38; count])), factor: 4.0, divide: true }
        }
        _ => Params::F32(vec![0.25; count]),
    };
    let mut matrix = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0);
    matrix.grid = spec.grid.grid(spec.bits).unwrap_or(Grid::UNSIGNED);
    matrix
}

/// GB/s of the fastest of several runs.
fn rate(bytes: usize, mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed().as_secs_f64() < BUDGET || best.is_infinite() {
        let run_start = Instant::now();
        run();
        best = best.min(run_start.elapsed().as_secs_f64());
    }
    bytes as f64 / best / 1e9
}

fn bench(layout: &'static dyn Layout) {
    let specs = specs();
    let fits = |spec: &&QuantSpec| layout.can_store(&PlannedLayer::new("m", spec, ROWS, COLS)).is_ok();
    let mut stored: Vec<_> = specs.iter().filter(fits).collect();
    stored.dedup_by_key(|spec| (spec.bits, spec.grid));
    for spec in stored.into_iter().take(3) {
        let linear = QuantizedLinear::new(matrix(spec));
        let tensors: BTreeMap<String, DenseTensor> =
            layout.write(&linear, "m").expect("it can store this").into_iter().collect();
        let bytes = tensors.values().map(|t| t.bytes().len()).sum();
        let meta = Default::default();
        let model = StoredModel { spec, input: &ActSpec::Float, exceptions: &[], meta: &meta };
        let reader = layout.reader(&layout.config(&model)).expect("its own configuration");
        let Ok(read) = reader.read(&tensors, "m") else {
            println!("{:<16} needs the sizes of a model: see the example `pack`", layout.id());
            return;
        };
        for r in [0, ROWS / 2 + 1, ROWS - 1] {
            let (mut ours, mut theirs) = (vec![0.0; COLS], vec![0.0; COLS]);
            linear.weight.dequantize_row(r, &mut ours);
            read.weight.dequantize_row(r, &mut theirs);
            assert_eq!(ours, theirs, "{}: row {r}", layout.id());
        }
        let unpack = rate(bytes, || drop(black_box(reader.read(&tensors, "m"))));
        let pack = rate(bytes, || drop(black_box(layout.write(&linear, "m"))));
        println!(
            "{:<16} {:>5} {} bits, {:<10} read {unpack:6.2} GB/s   write {pack:6.2} GB/s",
            layout.id(),
            spec.grid.to_string(),
            spec.bits,
            spec.group.to_string(),
        );
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let source = vec![1u8; ROWS * COLS / 2];
    println!("{:<44} {:6.2} GB/s", "copy", rate(source.len(), || drop(black_box(source.clone()))));
    let asked = |layout: &&&'static dyn Layout| {
        words.is_empty() || words.iter().any(|w| layout.id().contains(&w[..]))
    };
    layouts().iter().filter(asked).for_each(|layout| bench(*layout));
}
