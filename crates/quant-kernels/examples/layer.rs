//! Speed of fast and exact products with one layer, against what the processor can do.
//!
//! ```sh
//! cargo run --release -p quant-kernels --example layer -- [out] [in] [bits] [group] [m,m,...]
//! ```
//!
//! `bits` is 1 to 8, or `nf4`; group 0 is a whole row. Products with few rows go through 512 MB of distinct copies.

#![expect(clippy::print_stdout, reason = "a report")]

use std::sync::Arc;
use std::time::Instant;

use half::f16;
use ndarray::Array2;
use quant_core::{Codes, Grid, Groups, Offset, Params, QuantizedMatrix};
use quant_kernels::{ActScales, Activations, PackedMatrix, isa, roof};

fn matrix(rows: usize, cols: usize, bits: &str, group: usize, seed: u64) -> QuantizedMatrix {
    let width = bits.parse().unwrap_or(4u8);
    let mut codes = Codes::zeros(width, rows, cols).unwrap();
    let mut state = seed;
    let mut row = vec![0u8; cols];
    for r in 0..rows {
        for code in &mut row {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *code = (state >> 40) as u8 & codes.max();
        }
        codes.set_row(r, &row);
    }
    let groups = Groups::Row { len: if group == 0 { cols } else { group } };
    let n = groups.count(rows, cols);
    let scales = Params::F16((0..n).map(|i| f16::from_f32(0.01 + (i % 13) as f32 / 1000.0)).collect());
    let mut matrix = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 1 << (width - 1));
    if bits == "nf4" {
        let table: Arc<[f32]> = (0..16).map(|i| ((i as f32 - 7.5) / 7.5).powi(3)).collect();
        matrix.grid = Grid::Table(table);
    }
    matrix
}

/// The median time of some runs, in seconds.
fn median(mut run: impl FnMut()) -> f64 {
    let mut times = Vec::new();
    let begin = Instant::now();
    while times.len() < 5 || (begin.elapsed().as_secs_f64() < 0.7 && times.len() < 200) {
        let start = Instant::now();
        run();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default, |s| s).to_owned();
    let number = |i: usize, default: &str| arg(i, default).parse::<usize>().unwrap();
    let (rows, cols) = (number(0, "14336"), number(1, "4096"));
    let bits = arg(2, "4");
    let group = number(3, "128");
    let heights: Vec<usize> = arg(4, "1,2,4,8,16,64,512").split(',').map(|m| m.parse().unwrap()).collect();

    let first = matrix(rows, cols, &bits, group, 1);
    let start = Instant::now();
    let first = PackedMatrix::pack(first).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    let (packed_bytes, weights) = (first.bytes() as f64, (rows * cols) as f64);
    println!("isa {}, {} threads", isa::active(), rayon::current_num_threads());
    println!(
        "{rows} x {cols}, {bits} bits, groups of {group}: {:.3} bits per weight, packed in {:.1} ms",
        packed_bytes * 8.0 / weights,
        seconds * 1e3
    );
    let read = roof::read_bytes_per_second();
    println!("read {:.1} GB/s", read / 1e9);
    let copies = (512e6 / packed_bytes).ceil() as usize;
    let mut layers = vec![first];
    for i in 1..copies {
        layers.push(PackedMatrix::pack(matrix(rows, cols, &bits, group, 1 + (i as u64 % 2))).unwrap());
    }
    for m in heights {
        let x = Array2::from_shape_fn((m, cols), |(i, k)| ((i * 31 + k * 17) % 255) as f32 / 64.0 - 2.0);
        let mut out = Array2::zeros((m, rows));
        let input = layers[0].fast_input().unwrap();
        let mut activations = Activations::default();
        let quantize = median(|| activations.quantize(x.view(), input, ActScales::Group).unwrap());
        let mut at = 0;
        let seconds = median(|| {
            layers[at].matmul_with(&activations, out.view_mut()).unwrap();
            at = (at + 1) % if m <= 32 { copies } else { 1 };
        });
        println!(
            "m = {m:4}: {:9.3} ms, {:6.3} TOPS, {:5.1} GB/s ({:3.0} % of read), quantizing {:.3} ms, {}",
            seconds * 1e3,
            2.0 * m as f64 * weights / seconds / 1e12,
            packed_bytes / seconds / 1e9,
            100.0 * packed_bytes / seconds / read,
            quantize * 1e3,
            layers[0].kernel_name(m.min(12)).unwrap()
        );
    }
}
