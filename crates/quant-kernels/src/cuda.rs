//! The product with weights of four bits on a CUDA device: optional, and loaded when the program runs.
//!
//! [`CudaMatrix::matmul`] keeps the contract of [`crate::PackedMatrix::matmul`]: the same order of additions and the
//! same roundings, so the same bits. The kernel's text is `cuda/matmul_u4.cu`; `cuda/matmul_u4.ptx` was made from
//! it by NVRTC for `compute_80` and is embedded, so that a machine needs a driver and nothing else. A machine
//! without one gets [`CudaError::NoLibrary`].

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use quant_core::{Grid, Groups, MatrixError, Offset, Permutation, QuantizedMatrix};
use thiserror::Error;

use crate::dense;
use crate::error::ShapeError;

/// The kernel, as the driver reads it.
const PTX: &str = include_str!("cuda/matmul_u4.ptx");

/// Name of the kernel in it.
const KERNEL: &str = "matmul_u4";

/// Rows and outputs of a thread block, and its threads: those of the kernel.
const TILE: usize = 64;
const THREADS: u32 = 256;

/// Why a product can't run on a CUDA device.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// There is no driver on this machine.
    #[error("the CUDA driver library was not found; install the driver of the device, or use the CPU")]
    NoLibrary,
    /// The driver refused.
    #[error("the CUDA driver says {0}")]
    Driver(#[from] DriverError),
    /// The kernel takes no such weights.
    #[error("the CUDA kernel takes weights of 4 bits in groups along the rows; found {found}; use the CPU")]
    Unsupported {
        /// What stands in the way.
        found: &'static str,
    },
    /// The weights do not fit each other.
    #[error("the quantized matrix is inconsistent")]
    Matrix(#[from] MatrixError),
    /// The operands do not fit each other.
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

/// A CUDA device with the kernel loaded.
#[derive(Clone, Debug)]
pub struct Cuda {
    stream: Arc<CudaStream>,
    kernel: CudaFunction,
}

impl Cuda {
    /// Opens device `ordinal`, counted from 0.
    pub fn open(ordinal: usize) -> Result<Cuda, CudaError> {
        // SAFETY: it opens a shared library and closes it again. What its initialisers do is the system's own.
        // Without this question, cudarc would panic where there is no library.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoLibrary);
        }
        let context = CudaContext::new(ordinal)?;
        let kernel = context.load_module(Ptx::from_src(PTX))?.load_function(KERNEL)?;
        Ok(Cuda { stream: context.default_stream(), kernel })
    }
}

/// A weight matrix `[out, in]` of four bits in the memory of a device.
#[derive(Debug)]
pub struct CudaMatrix {
    device: Cuda,
    rows: usize,
    cols: usize,
    group: usize,
    input_perm: Option<Permutation>,
    codes: CudaSlice<u8>,
    table: CudaSlice<f32>,
    scale: CudaSlice<f32>,
    zero: CudaSlice<f32>,
    shift: Option<CudaSlice<f32>>,
}

/// Parameters as the kernel reads them: `[out, groups of a row]`.
#[derive(Debug, PartialEq)]
struct Parameters {
    group: usize,
    table: Vec<f32>,
    scale: Vec<f32>,
    zero: Vec<f32>,
    shift: Option<Vec<f32>>,
}

impl Parameters {
    /// The parameters of a valid matrix.
    fn of(matrix: &QuantizedMatrix) -> Result<Parameters, CudaError> {
        let unsupported = |found| Err(CudaError::Unsupported { found });
        if matrix.codes.bits() != 4 {
            return unsupported("another number of bits");
        }
        if matrix.row_scale.is_some() || matrix.col_scale.is_some() || matrix.outliers.is_some() {
            return unsupported("factors of rows or columns, or outliers");
        }
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let group = match matrix.groups {
            Groups::Tensor => cols,
            Groups::Row { len } | Groups::Tile { cols: len, .. } => len,
            Groups::Flat { len } if len.is_multiple_of(cols.max(1)) => cols,
            Groups::Flat { len } if cols.is_multiple_of(len) => len,
            Groups::Flat { .. } | Groups::Strided { .. } | Groups::Index { .. } => {
                return unsupported("groups across rows");
            }
        };
        let group = group.clamp(1, cols.max(1));
        if u32::try_from(rows.max(cols)).is_err() {
            return unsupported("more than 2^32 rows or columns");
        }
        let groups = (0..rows).flat_map(|r| (0..cols.div_ceil(group)).map(move |g| (r, g * group)));
        let index = |(r, c)| matrix.groups.index(r, c, cols);
        let (midpoint, table) = match &matrix.grid {
            Grid::Int { midpoint } => (*midpoint as f32, (0u8..16).map(f32::from).collect()),
            Grid::Table(table) => (0.0, table.to_vec()),
        };
        let zero = |at| match &matrix.offset {
            Offset::Zero(zeros) => zeros.get(index(at)) + midpoint,
            Offset::None | Offset::Shift { .. } => midpoint,
        };
        // Integers with a shift are read as a table is: `(value - 0) * scale + shift`, where the difference is exact.
        let shift = match &matrix.offset {
            Offset::Shift { param, sign } => {
                Some(groups.clone().map(|at| sign * param.get(index(at))).collect())
            }
            Offset::None | Offset::Zero(_) => None,
        };
        Ok(Parameters {
            group,
            table,
            scale: groups.clone().map(|at| matrix.scales.get(index(at))).collect(),
            zero: groups.map(zero).collect(),
            shift,
        })
    }
}

impl CudaMatrix {
    /// Copies a matrix to a device.
    pub fn upload(device: &Cuda, matrix: &QuantizedMatrix) -> Result<CudaMatrix, CudaError> {
        matrix.validate()?;
        let parameters = Parameters::of(matrix)?;
        let copy = |numbers: &[f32]| device.stream.clone_htod(numbers);
        Ok(CudaMatrix {
            rows: matrix.rows(),
            cols: matrix.cols(),
            group: parameters.group,
            input_perm: matrix.input_perm.clone(),
            codes: device.stream.clone_htod(matrix.codes.bytes())?,
            table: copy(&parameters.table)?,
            scale: copy(&parameters.scale)?,
            zero: copy(&parameters.zero)?,
            shift: parameters.shift.as_deref().map(copy).transpose()?,
            device: device.clone(),
        })
    }

    /// `[out, in]`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// `out = x · wᵀ` with `x: [m, in]`, `out: [m, out]` in the memory of the CPU.
    pub fn matmul(&self, x: ArrayView2<'_, f32>, mut out: ArrayViewMut2<'_, f32>) -> Result<(), CudaError> {
        let (m, n, k) = (x.nrows(), self.rows, self.cols);
        dense::check_shape("x", [m, k], &x)?;
        dense::check_shape("out", [m, n], &out)?;
        if m == 0 || n == 0 || k == 0 {
            out.fill(0.0);
            return Ok(());
        }
        let x = match &self.input_perm {
            Some(perm) => {
                let columns: Vec<usize> = perm.features().iter().map(|&f| f as usize).collect();
                x.select(Axis(1), &columns)
            }
            None => x.to_owned(),
        };
        let x: Vec<f32> = x.iter().copied().collect();
        let Cuda { stream, kernel } = &self.device;
        let x = stream.clone_htod(&x)?;
        let mut result = stream.alloc_zeros::<f32>(m * n)?;
        let size =
            |n: usize| u32::try_from(n).map_err(|_| CudaError::Unsupported { found: "more than 2^32 rows" });
        let (m_arg, n_arg, k_arg, group) = (size(m)?, size(n)?, size(k)?, size(self.group)?);
        let config = LaunchConfig {
            grid_dim: (n_arg.div_ceil(TILE as u32), m_arg.div_ceil(TILE as u32), 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let null = 0u64;
        let mut launch = stream.launch_builder(kernel);
        launch.arg(&x).arg(&self.codes).arg(&self.table).arg(&self.scale).arg(&self.zero);
        match &self.shift {
            Some(shift) => launch.arg(shift),
            None => launch.arg(&null),
        };
        launch.arg(&mut result).arg(&m_arg).arg(&n_arg).arg(&k_arg).arg(&group);
        // SAFETY: the arguments are those of the kernel, in number, order and type, and its arrays have the lengths that
        // its text states: `Parameters::of` made them for this shape, and `x` and `result` were made above.
        unsafe { launch.launch(config) }?;
        let result =
            Array2::from_shape_vec((m, n), stream.clone_dtoh(&result)?).expect("as many as asked for");
        out.assign(&result);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
