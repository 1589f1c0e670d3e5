//! The ordinary errors, the kernel's text beside its PTX, and its bits where there is a device.

use half::f16;
use quant_core::{Codes, Params};

use super::*;
use crate::PackedMatrix;

fn matrix(rows: usize, cols: usize, len: usize, grid: Grid, offset: fn(usize) -> Offset) -> QuantizedMatrix {
    let values: Vec<u8> = (0..rows * cols).map(|i| (i * 7 + i / 5) as u8 % 16).collect();
    let groups = Groups::Row { len };
    let count = groups.count(rows, cols);
    QuantizedMatrix {
        codes: Codes::from_values(4, rows, cols, &values).unwrap(),
        grid,
        groups,
        scales: Params::F16((0..count).map(|i| f16::from_f32(0.01 + i as f32 / 512.0)).collect()),
        offset: offset(count),
        row_scale: None,
        col_scale: None,
        input_perm: None,
        outliers: None,
        dtype: None,
    }
}

fn zeros(count: usize) -> Offset {
    Offset::Zero(Params::U8((0..count).map(|i| i as u8 % 16).collect()))
}

fn shifts(count: usize) -> Offset {
    Offset::Shift { param: Params::F32((0..count).map(|i| i as f32 / 64.0).collect()), sign: -1.0 }
}

fn cases() -> Vec<QuantizedMatrix> {
    let table: Arc<[f32]> = (0..16).map(|i| (i as f32 - 7.5) / 8.0).collect();
    vec![
        matrix(70, 300, 64, Grid::UNSIGNED, zeros),
        matrix(5, 33, 16, Grid::signed(4), |_| Offset::None),
        matrix(64, 512, 32, Grid::Table(table.clone()), |_| Offset::None),
        matrix(3, 16, 16, Grid::Table(table), shifts),
        matrix(9, 40, 8, Grid::UNSIGNED, shifts),
    ]
}

/// The kernel's loops in Rust, so that what is handed to a device can be checked without one.
fn product(matrix: &QuantizedMatrix, parameters: &Parameters, x: &Array2<f32>) -> Array2<f32> {
    let (n, k) = (matrix.rows(), matrix.cols());
    let (bytes, groups) = (k.div_ceil(2), k.div_ceil(parameters.group));
    let weight = |j: usize, p: usize| {
        let byte = matrix.codes.bytes()[j * bytes + p / 2];
        let g = j * groups + p / parameters.group;
        let code = usize::from(byte >> (4 * (p & 1)) & 15);
        let w = (parameters.table[code] - parameters.zero[g]) * parameters.scale[g];
        parameters.shift.as_ref().map_or(w, |shift| w + shift[g])
    };
    Array2::from_shape_fn((x.nrows(), n), |(i, j)| {
        (0..k).step_by(256).fold(0.0, |total, block| {
            let columns = block..k.min(block + 256);
            total + columns.fold(0.0f32, |sum, p| x[[i, p]].mul_add(weight(j, p), sum))
        })
    })
}

#[test]
fn what_a_device_gets_gives_the_bits_of_the_exact_product() {
    for matrix in cases() {
        let x =
            Array2::from_shape_fn((3, matrix.cols()), |(i, p)| ((i * 31 + p * 17) % 23) as f32 * 0.37 - 4.0);
        let mut expected = Array2::zeros((3, matrix.rows()));
        PackedMatrix::pack(matrix.clone()).unwrap().matmul(x.view(), expected.view_mut()).unwrap();
        assert_eq!(product(&matrix, &Parameters::of(&matrix).unwrap(), &x), expected);
    }
}

#[test]
fn without_a_driver_there_is_an_ordinary_error_and_with_one_the_same_bits() {
    let device = match Cuda::open(0) {
        Ok(device) => device,
        Err(error) => {
            assert!(matches!(error, CudaError::NoLibrary | CudaError::Driver(_)), "{error}");
            eprintln!("skipped: {error}");
            return;
        }
    };
    for matrix in cases() {
        let on_device = CudaMatrix::upload(&device, &matrix).unwrap();
        let packed = PackedMatrix::pack(matrix.clone()).unwrap();
        for m in [0, 1, 65] {
            let x = Array2::from_shape_fn((m, matrix.cols()), |(i, p)| {
                ((i * 31 + p * 17) % 23) as f32 * 0.37 - 4.0
            });
            let (mut out, mut expected) =
                (Array2::zeros((m, matrix.rows())), Array2::zeros((m, matrix.rows())));
            on_device.matmul(x.view(), out.view_mut()).unwrap();
            packed.matmul(x.view(), expected.view_mut()).unwrap();
            assert_eq!(out, expected);
        }
    }
}

#[test]
fn other_weights_are_refused_with_the_reason() {
    let good = cases().remove(0);
    let mut scaled = good.clone();
    scaled.row_scale = Some(vec![1.0; good.rows()]);
    let mut strided = good.clone();
    strided.groups = Groups::Strided { count: good.scales.len() };
    let mut bits = good.clone();
    bits.codes = Codes::zeros(3, good.rows(), good.cols()).unwrap();
    for (matrix, word) in [(scaled, "factors"), (strided, "groups"), (bits, "bits")] {
        let error = Parameters::of(&matrix).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("use the CPU"), "{error}");
    }
}

/// Without comments, which name the build of the compiler.
fn code(ptx: &str) -> Vec<&str> {
    ptx.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).collect()
}

/// NVRTC that made the embedded PTX; another version may choose other instructions.
const NVRTC: (i32, i32) = (12, 9);

#[test]
fn the_embedded_ptx_is_made_from_the_text() {
    use cudarc::nvrtc;

    // SAFETY: as in `Cuda::open`.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        eprintln!("skipped: NVRTC is not installed");
        return;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: it writes two integers.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    if (major, minor) != NVRTC {
        eprintln!("skipped: NVRTC {major}.{minor} is installed, {NVRTC:?} made the PTX");
        return;
    }
    let options = nvrtc::CompileOptions { arch: Some("compute_80"), ..Default::default() };
    let made = nvrtc::compile_ptx_with_opts(include_str!("matmul_u4.cu"), options).unwrap().to_src();
    if let Some(path) = std::env::var_os("QUANT_WRITE_PTX") {
        std::fs::write(path, &made).unwrap();
        return;
    }
    assert_eq!(code(PTX), code(&made), "write it anew with QUANT_WRITE_PTX=<file>");
}
