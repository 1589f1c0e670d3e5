//! What layouts share: looking at the tensors of a layer before they are read, and making those that are written.

use half::{bf16, f16};
use ndarray::Array2;
use quant_core::{
    ActSpec, DType, DenseTensor, Grid, Groups, MatrixError, Offset, Params, ParamsKind, Permutation,
    QuantizedLinear, QuantizedMatrix,
};
use rayon::prelude::*;

use super::TensorSource;
use crate::error::{FormatError, Unsupported};

/// Types of plain floating-point parameters.
pub(super) const FLOATS: &[DType] = &[DType::F16, DType::BF16, DType::F32];

/// The tensors of one layer of a checkpoint.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) source: &'a dyn TensorSource,
    pub(super) module: &'a str,
    /// Id of the layout, for messages.
    pub(super) layout: &'static str,
}

impl<'a> Parts<'a> {
    pub(super) fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.module)
    }

    /// Type and shape of a part that may be absent.
    pub(super) fn find(&self, part: &str) -> Option<(DType, &'a [usize])> {
        self.source.lookup(&self.name(part))
    }

    /// Shape of a part that must exist and have one of these types.
    pub(super) fn need(&self, part: &str, types: &[DType]) -> Result<&'a [usize], FormatError> {
        let because =
            || format!("{} has other parts of a {} layer", crate::display_name(self.module), self.layout);
        let found = self.find(part);
        let (dtype, shape) =
            found.ok_or_else(|| FormatError::Missing { tensor: self.name(part), because: because() })?;
        self.typed(part, dtype, types)?;
        Ok(shape)
    }

    /// Fails if a part has none of these types.
    pub(super) fn typed(&self, part: &str, found: DType, types: &[DType]) -> Result<(), FormatError> {
        if types.contains(&found) {
            return Ok(());
        }
        let expected = match types {
            [one] => one.name(),
            [DType::I32, DType::I16] => "I32 or I16",
            [DType::F8E4M3, DType::U8] => "F8_E4M3 or U8",
            [DType::I8, DType::F8E4M3] => "I8 or F8_E4M3",
            [DType::U8, DType::F8E8M0] => "U8 or F8_E8M0",
            [DType::I64, DType::I32] => "I64 or I32",
            types if types.contains(&DType::F8E8M0) => "F16, BF16, F32 or F8_E8M0",
            _ => "F16, BF16 or F32",
        };
        Err(FormatError::TensorDType { tensor: self.name(part), expected, found })
    }

    /// Two dimensions of a part, both positive. `meaning` is what they stand for.
    pub(super) fn need_matrix(
        &self,
        part: &str,
        types: &[DType],
        meaning: &str,
    ) -> Result<(usize, usize), FormatError> {
        match self.need(part, types)? {
            &[rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
            found => Err(self.misshapen(part, found, meaning, format!("the {} layout", self.layout))),
        }
    }

    /// Fails if a part has another shape than `expected`, which follows from `because`.
    pub(super) fn shaped(
        &self,
        part: &str,
        found: &[usize],
        expected: &[usize],
        because: impl FnOnce() -> String,
    ) -> Result<(), FormatError> {
        if found == expected {
            return Ok(());
        }
        Err(self.misshapen(part, found, format!("{expected:?}"), because()))
    }

    pub(super) fn misshapen(
        &self,
        part: &str,
        found: &[usize],
        expected: impl Into<String>,
        because: impl Into<String>,
    ) -> FormatError {
        FormatError::TensorShape {
            tensor: self.name(part),
            expected: expected.into(),
            found: found.to_vec(),
            because: because.into(),
        }
    }

    /// Checks the bias, if there is one.
    pub(super) fn check_bias(&self, rows: usize) -> Result<(), FormatError> {
        let Some((dtype, shape)) = self.find("bias") else { return Ok(()) };
        if !dtype.is_float() {
            let expected = "a float type";
            return Err(FormatError::TensorDType { tensor: self.name("bias"), expected, found: dtype });
        }
        self.shaped("bias", shape, &[rows], || format!("{rows} outputs"))
    }

    pub(super) fn read(&self, part: &str) -> Result<DenseTensor, FormatError> {
        self.source.read(&self.name(part))
    }

    /// A checked matrix as a layer, with its bias.
    pub(super) fn linear(&self, weight: QuantizedMatrix) -> Result<QuantizedLinear, FormatError> {
        weight.validate().map_err(|source| self.invalid(source))?;
        let bias = if self.find("bias").is_some() { Some(self.read("bias")?) } else { None };
        Ok(QuantizedLinear { bias, ..QuantizedLinear::new(weight) })
    }

    pub(super) fn invalid(&self, source: MatrixError) -> FormatError {
        FormatError::Matrix { module: self.module.to_owned(), source }
    }

    /// All elements of an I32 part that maps inputs to groups; every one must be below `count`.
    pub(super) fn read_groups(&self, part: &str, count: usize) -> Result<Vec<u32>, FormatError> {
        let tensor = self.name(part);
        let g_idx = self.read(part)?.to_i32();
        let g_idx = g_idx.map_err(|source| FormatError::Tensor { tensor: tensor.clone(), source })?;
        let of_col = g_idx.iter().enumerate().map(|(index, &g)| {
            let group = u32::try_from(g).ok().filter(|&g| (g as usize) < count);
            group.ok_or_else(|| FormatError::Value {
                tensor: tensor.clone(),
                index,
                found: g.to_string(),
                expected: format!("out of range: the layer has groups 0 to {}", count.saturating_sub(1)),
            })
        });
        of_col.collect()
    }
}

/// Groups of columns that follow a map: runs of `len`, in their order or permuted, or else the map itself.
pub(super) fn groups_of(of_col: Vec<u32>, count: usize, len: usize) -> (Groups, Option<Permutation>) {
    let (cols, consecutive) = (of_col.len(), Groups::Row { len });
    let trivial = of_col.iter().enumerate().all(|(c, &g)| g as usize == c / len);
    // Some writers leave the map at zero where columns are not reordered.
    if trivial || of_col.iter().all(|&g| g == 0) {
        return (consecutive, None);
    }
    let mut sizes = vec![0; count];
    of_col.iter().for_each(|&g| sizes[g as usize] += 1);
    let full = |g: usize| if g + 1 < count { len } else { cols.saturating_sub(len * (count - 1)) };
    if sizes.iter().enumerate().all(|(g, &size)| size == full(g)) {
        return (consecutive, Permutation::sorting_groups(&of_col));
    }
    (Groups::Index { of_col: of_col.into(), count }, None)
}

/// Parameters as they are stored: floats of any width, or bytes.
pub(super) fn params(tensor: &DenseTensor) -> Result<Params, quant_core::TensorError> {
    let bytes = tensor.bytes();
    Ok(match tensor.dtype() {
        DType::F16 => Params::F16(elements(bytes, f16::from_le_bytes)),
        DType::BF16 => Params::BF16(elements(bytes, bf16::from_le_bytes)),
        DType::F8E8M0 => Params::E8M0(bytes.to_vec()),
        DType::F8E4M3 => Params::E4M3(bytes.to_vec()),
        DType::U8 => Params::U8(bytes.to_vec()),
        _ => Params::F32(tensor.to_f32()?),
    })
}

/// Little-endian elements.
fn elements<const B: usize, T>(bytes: &[u8], decode: impl Fn([u8; B]) -> T) -> Vec<T> {
    bytes.as_chunks::<B>().0.iter().map(|&chunk| decode(chunk)).collect()
}

/// The parameters `[rows, cols]` as `[cols, rows]`, if they are plain floats.
pub(super) fn transposed(params: &Params, rows: usize, cols: usize) -> Option<Params> {
    match params {
        Params::F32(v) => Some(Params::F32(transpose(v, rows, cols))),
        Params::F16(v) => Some(Params::F16(transpose(v, rows, cols))),
        Params::BF16(v) => Some(Params::BF16(transpose(v, rows, cols))),
        _ => None,
    }
}

/// `[rows, cols]` to `[cols, rows]`.
pub(super) fn transpose<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
}

/// Type and bytes of parameters that are one plain tensor.
pub(super) fn plain_bytes(params: &Params) -> Option<(DType, Vec<u8>)> {
    let two = |v: Vec<[u8; 2]>| v.as_flattened().to_vec();
    Some(match params {
        Params::F32(v) => (DType::F32, v.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Params::F16(v) => (DType::F16, two(v.iter().map(|v| v.to_le_bytes()).collect())),
        Params::BF16(v) => (DType::BF16, two(v.iter().map(|v| v.to_le_bytes()).collect())),
        Params::E8M0(v) => (DType::F8E8M0, v.clone()),
        Params::E4M3(v) => (DType::F8E4M3, v.clone()),
        Params::U8(v) => (DType::U8, v.clone()),
        _ => return None,
    })
}

/// The type that scales of this kind are stored as, if they are one plain tensor of floats.
pub(super) fn float_type(kind: ParamsKind) -> Option<DType> {
    match kind {
        ParamsKind::F32 => Some(DType::F32),
        ParamsKind::F16 => Some(DType::F16),
        ParamsKind::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// What a layer is made of, for a layout that stores codes, scales and zero points only.
pub(super) struct Writing<'a> {
    pub(super) linear: &'a QuantizedLinear,
    pub(super) module: &'a str,
    /// Id of the layout, for messages.
    pub(super) layout: &'static str,
}

impl<'a> Writing<'a> {
    /// Checks the layer and refuses parts beside codes, scales and zero points. Activations and a permutation of
    /// inputs are left to the layout.
    pub(super) fn new(
        layout: &'static str,
        linear: &'a QuantizedLinear,
        module: &'a str,
    ) -> Result<Self, FormatError> {
        check_parts(layout, linear, module)?;
        Ok(Self { linear, module, layout })
    }

    pub(super) fn unsupported(
        &self,
        field: &'static str,
        found: impl ToString,
        remedy: impl ToString,
    ) -> Unsupported {
        unsupported(self.layout, field, found, remedy)
    }

    /// Refuses quantized activations.
    pub(super) fn float_input(&self) -> Result<(), Unsupported> {
        float_input(self.layout, &self.linear.input)
    }

    /// Refuses act-order, and gives the number of groups in a row and columns in a group.
    pub(super) fn consecutive_groups(&self) -> Result<(usize, usize), Unsupported> {
        let matrix = &self.linear.weight;
        let cols = matrix.cols();
        let len = match matrix.groups {
            Groups::Row { len } => len.min(cols.max(1)),
            _ => return Err(self.unsupported("groups", "of this form", "groups must be runs of one row")),
        };
        if matrix.input_perm.is_some() {
            let remedy = "this layout keeps inputs in order; quantize without it, or choose gptq_v2";
            return Err(self.unsupported("act-order", "(desc_act)", remedy));
        }
        Ok((cols.div_ceil(len), len))
    }

    /// The zero points of all groups as codes: integers from 0 to the greatest code.
    pub(super) fn integer_zeros(&self) -> Result<Vec<u8>, Unsupported> {
        let matrix = &self.linear.weight;
        let Grid::Int { midpoint } = matrix.grid else {
            let remedy = "it has evenly spaced codes; choose a layout with a table";
            return Err(self.unsupported("grid", matrix.grid.kind(), remedy));
        };
        let max = f32::from(matrix.codes.max());
        let zero = |i: usize| {
            let zero = match &matrix.offset {
                Offset::None => 0.0,
                Offset::Zero(zeros) => zeros.get(i),
                Offset::Shift { .. } => {
                    let remedy = "it has integer zero points only";
                    return Err(self.unsupported("shifts", "that are added", remedy));
                }
            } + midpoint as f32;
            if zero.fract() != 0.0 || !(0.0..=max).contains(&zero) {
                let remedy = format!("zero points must be integers from 0 to {max}");
                return Err(self.unsupported("zero point", zero, remedy));
            }
            // Exact: an integer of at most 255.
            Ok(zero as u8)
        };
        (0..matrix.scales.len()).map(zero).collect()
    }

    /// Fails unless the scales are one plain tensor of floats; gives its type and bytes.
    pub(super) fn plain_scales(&self, scales: &Params) -> Result<(DType, Vec<u8>), Unsupported> {
        let plain = plain_bytes(scales).filter(|(dtype, _)| FLOATS.contains(dtype));
        plain.ok_or_else(|| {
            self.unsupported("scales", "of two levels or one byte", "it has scales of F16, BF16 or F32")
        })
    }

    pub(super) fn tensor(
        &self,
        part: &str,
        dtype: DType,
        shape: &[usize],
        bytes: impl Into<std::sync::Arc<[u8]>>,
    ) -> Result<(String, DenseTensor), FormatError> {
        let name = format!("{}.{part}", self.module);
        match DenseTensor::new(dtype, shape.to_vec(), bytes) {
            Ok(tensor) => Ok((name, tensor)),
            Err(source) => Err(FormatError::Tensor { tensor: name, source }),
        }
    }

    /// The bias, if there is one.
    pub(super) fn bias(&self) -> Option<(String, DenseTensor)> {
        self.linear.bias.clone().map(|bias| (format!("{}.bias", self.module), bias))
    }
}

/// Fails on what only few layouts have beside codes, scales and offsets: factors per row or column, outliers, a low-rank
/// part. Checks that the matrix is consistent first.
pub(super) fn check_parts(
    layout: &'static str,
    linear: &QuantizedLinear,
    module: &str,
) -> Result<(), FormatError> {
    let matrix = &linear.weight;
    matrix.validate().map_err(|source| FormatError::Matrix { module: module.to_owned(), source })?;
    let extra = [
        ("row scales", matrix.row_scale.is_some()),
        ("column scales", matrix.col_scale.is_some()),
        ("outlier columns", matrix.outliers.is_some()),
        ("a low-rank part", linear.low_rank.is_some()),
    ];
    match extra.into_iter().find(|(_, present)| *present) {
        Some((part, _)) => Err(unsupported(layout, part, "beside codes", "choose another layout").into()),
        None => Ok(()),
    }
}

/// A refusal of a layout.
pub(super) fn unsupported(
    layout: &'static str,
    field: &'static str,
    found: impl ToString,
    remedy: impl ToString,
) -> Unsupported {
    Unsupported { layout, field, found: found.to_string(), remedy: remedy.to_string() }
}

/// Refuses quantized activations.
pub(super) fn float_input(layout: &'static str, input: &ActSpec) -> Result<(), Unsupported> {
    if *input == ActSpec::Float {
        return Ok(());
    }
    let remedy = "choose a layout that records how inputs are quantized, such as ct_int or ct_float";
    Err(unsupported(layout, "quantized activations", "beside codes", remedy))
}

/// The weights, rounded to the type of the scales: what a product in that type gives, because the other factor has
/// few enough bits for the product to be exact in f32.
pub(super) fn rounded_to_scales(matrix: &QuantizedMatrix) -> Array2<f32> {
    let mut weights = matrix.dequantize();
    match matrix.scales.kind() {
        ParamsKind::F16 => round(&mut weights, |w| f16::from_f32(w).to_f32()),
        ParamsKind::BF16 => round(&mut weights, |w| bf16::from_f32(w).to_f32()),
        _ => {}
    }
    weights
}

/// Applies a rounding to all weights.
pub(super) fn round(weights: &mut Array2<f32>, rounding: impl Fn(f32) -> f32 + Sync) {
    if let Some(weights) = weights.as_slice_mut() {
        weights.par_chunks_mut(1 << 14).for_each(|chunk| chunk.iter_mut().for_each(|w| *w = rounding(*w)));
    }
}
