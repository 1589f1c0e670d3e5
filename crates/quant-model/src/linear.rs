//! Linear layers as the model sees them, whatever holds the weights.

use std::sync::Arc;

use half::{bf16, f16};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use quant_core::{
    ActGrid, ActGroup, ActSpec, DType, DenseTensor, LinearWeights, QuantizedLinear, QuantizedMatrix,
    WeightError,
};
use quant_kernels::{
    ActScales, Activations, DensePanels, DenseView, PackError, PackedMatrix, matmul_all, vec,
};

use crate::act;
use crate::error::ModelError;
use crate::rows::{Workspace, each_row_mut};

/// How products with quantized weights are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compute {
    /// In f32, with the bits of the dequantized weights.
    #[default]
    Exact,
    /// In integers, with activations rounded to eight bits, where there is such a product; else with activations and
    /// weights rounded to bf16, or as exact where the weights have 32 bits.
    Fast,
}

impl Compute {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Compute::Exact => "exact",
            Compute::Fast => "fast",
        }
    }
}

/// Activations that share a scale in fast products: those of a weight group, or of 128 columns where groups are longer.
const SCALES: ActScales = ActScales::Group;

/// A linear layer with weights `[out, in]`: `y = x · wᵀ + bias`.
///
/// A row of the result depends on the row of `x` alone, not on how many rows there are.
pub trait Linear: Send + Sync {
    /// `[out, in]`.
    fn shape(&self) -> (usize, usize);

    /// Bytes in memory.
    fn bytes(&self) -> usize;

    /// The exact product. `x`: `[t, in]`, `out`: `[t, out]`, both with contiguous rows.
    fn forward(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ModelError>;

    /// The product with operands rounded to bf16, or the exact one where that is all there is.
    fn forward_bf16(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ModelError> {
        self.forward(x, out)
    }

    /// Whether [`Compute::Fast`] is anything but the exact product.
    fn has_fast(&self) -> bool {
        false
    }

    /// A layer that may have a fast product.
    fn packed(&self) -> Option<Packed<'_>> {
        None
    }
}

/// A layer whose product may run in integers.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// The weights.
    pub matrix: &'a PackedMatrix,
    /// The bias `[out]`.
    pub bias: Option<&'a [f32]>,
    /// What shares a scale among its activations.
    pub scales: ActScales,
}

/// All linears of a stage: `outs[i] = linears[i](x)`, with activations rounded once for all that ask for the same.
pub(crate) fn forward_all(
    linears: &[&dyn Linear],
    x: ArrayView2<'_, f32>,
    compute: Compute,
    outs: Vec<ArrayViewMut2<'_, f32>>,
    work: &mut Workspace,
) -> Result<(), ModelError> {
    // Which of the activations each fast product takes.
    let mut used = 0;
    let mut fast = Vec::with_capacity(linears.len());
    for (linear, mut out) in linears.iter().zip(outs) {
        let packed = if compute == Compute::Fast { linear.packed() } else { None };
        let Some((Packed { matrix, bias, scales }, input)) =
            packed.and_then(|packed| Some((packed, packed.matrix.fast_input()?)))
        else {
            match compute {
                Compute::Exact => linear.forward(x, out.view_mut())?,
                Compute::Fast => linear.forward_bf16(x, out.view_mut())?,
            }
            continue;
        };
        let known =
            work.activations[..used].iter().position(|made| made.is_for(input) && made.scales() == scales);
        let at = match known {
            Some(at) => at,
            None => {
                if work.activations.len() == used {
                    work.activations.push(Activations::default());
                }
                work.activations[used].quantize(x, input, scales)?;
                used += 1;
                used - 1
            }
        };
        fast.push((matrix, bias, at, out));
    }
    for (at, x) in work.activations[..used].iter().enumerate() {
        let together = fast.iter_mut().filter(|product| product.2 == at);
        matmul_all(x, together.map(|(matrix, _, _, out)| (*matrix, out.view_mut())).collect())?;
    }
    fast.into_iter().for_each(|(_, bias, _, out)| add_bias(bias, out));
    Ok(())
}

/// A linear layer from the weights of a checkpoint. `module` appears in errors; with `conv1d` dense weights are
/// stored `[in, out]`.
pub fn linear(module: &str, weights: LinearWeights, conv1d: bool) -> Result<Box<dyn Linear>, ModelError> {
    match weights {
        LinearWeights::Dense { weight, bias } => {
            let weight = Arc::new(DenseMatrix::new(module, &weight, conv1d)?);
            let bias = read_bias(module, bias.as_ref(), weight.dim().0)?;
            Ok(Box::new(DenseLinear::new(weight, bias)))
        }
        LinearWeights::Quantized(layer) => Ok(Box::new(PackedLinear::new(module, *layer)?)),
    }
}

/// The weights `[out, in]` of a layer in f32, dequantized where they are quantized.
pub fn weight_f32(module: &str, weights: &LinearWeights, conv1d: bool) -> Result<Array2<f32>, ModelError> {
    match weights {
        LinearWeights::Dense { weight, .. } => Ok(dense_f32(module, weight, conv1d)?),
        LinearWeights::Quantized(layer) => Ok(layer.weight.dequantize()),
    }
}

fn read_bias(module: &str, bias: Option<&DenseTensor>, rows: usize) -> Result<Option<Vec<f32>>, ModelError> {
    let Some(bias) = bias else { return Ok(None) };
    let name = format!("{module}.bias");
    if bias.shape() != [rows] {
        let (expected, found) = (vec![rows], bias.shape().to_vec());
        return Err(WeightError::Shape { name, expected, found, because: "its weight".to_owned() }.into());
    }
    Ok(Some(bias.to_f32().map_err(|source| WeightError::Tensor { name, source })?))
}

/// A dense matrix in the type of the checkpoint: 16-bit weights stay 16 bits wide in memory. Eight-bit and 64-bit
/// floats become f32.
#[derive(Clone, Debug)]
pub struct DenseMatrix(DensePanels);

impl DenseMatrix {
    /// A matrix from the tensor `name` of rank two; `transpose` swaps its dimensions.
    pub fn new(name: &str, tensor: &DenseTensor, transpose: bool) -> Result<Self, WeightError> {
        let dim = dim(name, tensor)?;
        let halves = || tensor.bytes().as_chunks().0.iter();
        let packed = match tensor.dtype() {
            DType::F16 => {
                let w = shaped(dim, transpose, halves().map(|&b| f16::from_le_bytes(b)).collect());
                DensePanels::pack(DenseView::F16(w.view()))
            }
            DType::BF16 => {
                let w = shaped(dim, transpose, halves().map(|&b| bf16::from_le_bytes(b)).collect());
                DensePanels::pack(DenseView::Bf16(w.view()))
            }
            _ => return Ok(Self::from_f32(dense_f32(name, tensor, transpose)?.view())),
        };
        Ok(DenseMatrix(packed.expect("rows are contiguous")))
    }

    /// A matrix of these elements.
    pub fn from_f32(matrix: ArrayView2<'_, f32>) -> Self {
        DenseMatrix(DensePanels::pack(DenseView::F32(matrix)).expect("rows are contiguous"))
    }

    /// `[rows, cols]`.
    pub fn dim(&self) -> (usize, usize) {
        self.0.shape()
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Row `r` in f32. `out`: `[cols]`. Panics on another length, or if there is no such row.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        self.0.dequantize_row(r, out).expect("a row of the matrix");
    }

    /// `out = x · selfᵀ` with `x: [t, cols]`, `out: [t, rows]`.
    pub fn matmul(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ModelError> {
        Ok(self.0.matmul(x, out)?)
    }

    /// The same with operands rounded to bf16; exact where the weights have 32 bits.
    pub fn matmul_bf16(&self, x: ArrayView2<'_, f32>, out: ArrayViewMut2<'_, f32>) -> Result<(), ModelError> {
        Ok(self.0.matmul_bf16(x, out)?)
    }
}

/// The dimensions of a tensor of rank two.
fn dim(name: &str, tensor: &DenseTensor) -> Result<(usize, usize), WeightError> {
    match tensor.shape() {
        &[rows, cols] => Ok((rows, cols)),
        shape => {
            let reason = format!("shape {shape:?} where a matrix is needed");
            Err(WeightError::Layout { name: name.to_owned(), reason })
        }
    }
}

/// A tensor of rank two in f32; `transpose` swaps its dimensions.
fn dense_f32(name: &str, tensor: &DenseTensor, transpose: bool) -> Result<Array2<f32>, WeightError> {
    let dim = dim(name, tensor)?;
    let values = tensor.to_f32().map_err(|source| WeightError::Tensor { name: name.to_owned(), source })?;
    Ok(shaped(dim, transpose, values))
}

/// The elements of a matrix of these dimensions, turned over on demand.
fn shaped<T: Copy>(dim: (usize, usize), transpose: bool, values: Vec<T>) -> Array2<T> {
    let matrix = Array2::from_shape_vec(dim, values).expect("a tensor's bytes fit its shape");
    if transpose { matrix.t().as_standard_layout().into_owned() } else { matrix }
}

/// A linear layer of floats. The matrix may be shared: a tied head is the embedding.
#[derive(Clone, Debug)]
pub struct DenseLinear {
    weight: Arc<DenseMatrix>,
    bias: Option<Vec<f32>>,
}

impl DenseLinear {
    /// A layer of these weights `[out, in]` and this bias `[out]`. Panics if they do not fit.
    pub fn new(weight: Arc<DenseMatrix>, bias: Option<Vec<f32>>) -> Self {
        assert!(bias.as_ref().is_none_or(|bias| bias.len() == weight.dim().0), "one bias per output");
        Self { weight, bias }
    }

    /// A layer of these weights `[out, in]`, with contiguous rows, and this bias `[out]`.
    pub fn from_f32(weight: ArrayView2<'_, f32>, bias: Option<Vec<f32>>) -> Self {
        Self::new(Arc::new(DenseMatrix::from_f32(weight)), bias)
    }
}

impl Linear for DenseLinear {
    fn shape(&self) -> (usize, usize) {
        self.weight.dim()
    }

    fn bytes(&self) -> usize {
        self.weight.bytes() + bias_bytes(self.bias.as_deref())
    }

    fn forward(&self, x: ArrayView2<'_, f32>, mut out: ArrayViewMut2<'_, f32>) -> Result<(), ModelError> {
        self.weight.matmul(x, out.view_mut())?;
        add_bias(self.bias.as_deref(), out);
        Ok(())
    }

    fn forward_bf16(
        &self,
        x: ArrayView2<'_, f32>,
        mut out: ArrayViewMut2<'_, f32>,
    ) -> Result<(), ModelError> {
        self.weight.matmul_bf16(x, out.view_mut())?;
        add_bias(self.bias.as_deref(), out);
        Ok(())
    }

    fn has_fast(&self) -> bool {
        self.weight.0.has_bf16()
    }
}

/// A quantized linear layer. The exact product has the bits of its dequantized twin on the input that it sees: a layout
/// may ask for rounded inputs. The matrix may be shared: a tied head is the embedding.
#[derive(Clone, Debug)]
pub struct PackedLinear {
    weight: Arc<PackedMatrix>,
    input: ActSpec,
    bias: Option<Vec<f32>>,
}

impl PackedLinear {
    /// A layer ready to run. Fails on what no kernel here computes: low-rank corrections.
    pub fn new(module: &str, layer: QuantizedLinear) -> Result<Self, ModelError> {
        let unsupported = |reason: String| ModelError::Unsupported { module: module.to_owned(), reason };
        if layer.low_rank.is_some() {
            let reason = "it has a low-rank correction, which is not supported; merge it first";
            return Err(unsupported(reason.to_owned()));
        }
        let weight = Arc::new(pack(module, layer.weight)?);
        let bias = read_bias(module, layer.bias.as_ref(), weight.shape().0)?;
        Ok(Self { weight, input: layer.input, bias })
    }

    /// A layer without a bias that shares its matrix.
    pub(crate) fn shared(weight: Arc<PackedMatrix>) -> Self {
        Self { weight, input: ActSpec::Float, bias: None }
    }
}

/// Packs the matrix of a module.
pub(crate) fn pack(module: &str, matrix: QuantizedMatrix) -> Result<PackedMatrix, ModelError> {
    PackedMatrix::pack(matrix).map_err(|error| match error {
        PackError::Matrix(source) => WeightError::Matrix { name: module.to_owned(), source }.into(),
        other => ModelError::Unsupported { module: module.to_owned(), reason: other.to_string() },
    })
}

impl Linear for PackedLinear {
    fn shape(&self) -> (usize, usize) {
        self.weight.shape()
    }

    fn bytes(&self) -> usize {
        self.weight.bytes() + bias_bytes(self.bias.as_deref())
    }

    fn forward(&self, x: ArrayView2<'_, f32>, mut out: ArrayViewMut2<'_, f32>) -> Result<(), ModelError> {
        match self.input {
            ActSpec::Float => self.weight.matmul(x, out.view_mut())?,
            _ => self.weight.matmul(act::quantize(&self.input, x).view(), out.view_mut())?,
        }
        add_bias(self.bias.as_deref(), out);
        Ok(())
    }

    fn forward_bf16(
        &self,
        x: ArrayView2<'_, f32>,
        mut out: ArrayViewMut2<'_, f32>,
    ) -> Result<(), ModelError> {
        if self.input != ActSpec::Float {
            return self.forward(x, out);
        }
        self.weight.matmul_bf16(x, out.view_mut())?;
        add_bias(self.bias.as_deref(), out);
        Ok(())
    }

    fn has_fast(&self) -> bool {
        let integers = || self.packed().is_some_and(|packed| packed.matrix.fast_input().is_some());
        self.input == ActSpec::Float || integers()
    }

    fn packed(&self) -> Option<Packed<'_>> {
        let scales = match self.input {
            ActSpec::Float => SCALES,
            // What a layout asks to be rounded to integers has its scales; the rest is rounded as it says, not once more.
            ActSpec::Dynamic {
                grid: ActGrid::Int8,
                per: ActGroup::Token,
                symmetric: true,
                outlier_threshold: None,
            } => ActScales::Row,
            ActSpec::Static { grid: ActGrid::Int8, scale, zero: 0 } if scale.is_normal() && scale > 0.0 => {
                ActScales::Fixed(scale)
            }
            _ => return None,
        };
        Some(Packed { matrix: &self.weight, bias: self.bias.as_deref(), scales })
    }
}

fn bias_bytes(bias: Option<&[f32]>) -> usize {
    bias.map_or(0, |bias| 4 * bias.len())
}

fn add_bias(bias: Option<&[f32]>, out: ArrayViewMut2<'_, f32>) {
    let Some(bias) = bias else { return };
    each_row_mut(out, |_, row| vec::add(row, bias).expect("one bias per output"));
}
