//! What layouts share whose modules describe themselves: settings in small tensors, parameters as they are stored.

use half::{bf16, f16};
use quant_core::{
    Codes, DType, DenseTensor, Grid, GridKind, Offset, Params, ParamsKind, QuantizedLinear, QuantizedMatrix,
};
use rayon::prelude::*;
use serde_json::Value;

use super::StoredModel;
use super::parts::{self, Parts, unsupported};
use crate::error::FormatError;

/// Longest text in a tensor that a layout reads as its own description.
const TEXT_LIMIT: usize = 4096;

/// Types that a part may have, and how to name them.
#[derive(Clone, Copy)]
pub(super) struct Types(pub(super) &'static [DType], pub(super) &'static str);

/// Types of scales.
pub(super) const FLOATS: Types = Types(&[DType::F16, DType::BF16, DType::F32], "F16, BF16 or F32");

/// Types of settings that are whole numbers.
const INTEGERS: Types = Types(&[DType::U8, DType::Bool, DType::I32, DType::I64], "an integer type");

/// Type and shape of a part that exists.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    pub(super) dtype: DType,
    pub(super) shape: &'a [usize],
}

impl Part<'_> {
    /// Number of elements; headers with an overflowing product are refused when a file is opened.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl<'a> Parts<'a> {
    /// A part that may be absent.
    pub(super) fn look(&self, part: &str) -> Option<Part<'a>> {
        self.find(part).map(|(dtype, shape)| Part { dtype, shape })
    }

    /// A part that must exist and have one of these types.
    pub(super) fn require(&self, part: &str, types: Types) -> Result<Part<'a>, FormatError> {
        let found = self.look(part).ok_or_else(|| FormatError::Missing {
            tensor: self.name(part),
            because: format!(
                "{} has other parts of {} weights",
                crate::display_name(self.module),
                self.layout
            ),
        })?;
        self.of_types(part, found, types)
    }

    /// A part that may be absent, and has one of these types where it exists.
    pub(super) fn optional(&self, part: &str, types: Types) -> Result<Option<Part<'a>>, FormatError> {
        self.look(part).map(|found| self.of_types(part, found, types)).transpose()
    }

    fn of_types(&self, part: &str, found: Part<'a>, types: Types) -> Result<Part<'a>, FormatError> {
        if types.0.contains(&found.dtype) {
            return Ok(found);
        }
        Err(FormatError::TensorDType { tensor: self.name(part), expected: types.1, found: found.dtype })
    }

    /// Fails unless a part has this shape, which follows from `because`.
    pub(super) fn has_shape(
        &self,
        part: &str,
        found: Part<'_>,
        expected: &[usize],
        because: &dyn Fn() -> String,
    ) -> Result<(), FormatError> {
        if found.shape == expected {
            Ok(())
        } else {
            Err(self.misfit(part, found, format!("{expected:?}"), because()))
        }
    }

    /// A part of another shape than `expected`.
    pub(super) fn misfit(
        &self,
        part: &str,
        found: Part<'_>,
        expected: String,
        because: String,
    ) -> FormatError {
        FormatError::TensorShape { tensor: self.name(part), expected, found: found.shape.to_vec(), because }
    }

    /// Reads parameters as they are stored: F16, BF16, F32 or U8.
    pub(super) fn params(&self, part: &str) -> Result<Params, FormatError> {
        parts::params(&self.read(part)?)
            .map_err(|source| FormatError::Tensor { tensor: self.name(part), source })
    }

    /// A text in a U8 tensor, in which some layouts say what they are. `None` where there is no such part.
    pub(super) fn text(&self, part: &str) -> Result<Option<String>, FormatError> {
        let Some(found) = self.optional(part, Types(&[DType::U8], "U8"))? else { return Ok(None) };
        if found.len() > TEXT_LIMIT {
            let expected = format!("at most {TEXT_LIMIT} bytes");
            return Err(self.misfit(part, found, expected, "it is a text".into()));
        }
        let bytes = self.read(part)?.bytes().to_vec();
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(e) => {
                let index = e.utf8_error().valid_up_to();
                Err(self.value_error(part, index, "no UTF-8", "it must be a text in UTF-8".into()))
            }
        }
    }

    /// The integers in a tensor of at most four, in which some layouts store their settings. `None` where there is
    /// no such part.
    pub(super) fn integers(&self, part: &str) -> Result<Option<Vec<i64>>, FormatError> {
        let Some(found) = self.optional(part, INTEGERS)? else {
            return Ok(None);
        };
        if found.len() > 4 {
            return Err(self.misfit(part, found, "a few integers".into(), "it is a setting".into()));
        }
        let tensor = self.read(part)?;
        let bytes = tensor.bytes();
        Ok(Some(match found.dtype {
            DType::I32 => bytes.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b))).collect(),
            DType::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
            _ => bytes.iter().map(|&b| i64::from(b)).collect(),
        }))
    }

    /// The table of 8-bit floats, if all bytes of a part stand for finite ones.
    pub(super) fn float_grid(
        &self,
        part: &str,
        data: &DenseTensor,
        kind: GridKind,
    ) -> Result<Grid, FormatError> {
        let grid = kind.grid(8).unwrap_or(Grid::UNSIGNED);
        let finite: Vec<bool> = (0..=u8::MAX).map(|code| grid.value(code).is_finite()).collect();
        match data.bytes().par_iter().position_first(|&b| !finite[usize::from(b)]) {
            None => Ok(grid),
            Some(i) => {
                let found = grid.value(data.bytes()[i]);
                Err(self.value_error(part, i, found, "weights and scales must be finite".into()))
            }
        }
    }

    /// An element with an impossible value.
    pub(super) fn value_error(
        &self,
        part: &str,
        index: usize,
        found: impl ToString,
        expected: String,
    ) -> FormatError {
        FormatError::Value { tensor: self.name(part), index, found: found.to_string(), expected }
    }
}

/// Collects the tensors that are written for one module.
pub(super) struct Tensors<'a> {
    module: &'a str,
    tensors: Vec<(String, DenseTensor)>,
}

impl<'a> Tensors<'a> {
    pub(super) fn new(module: &'a str) -> Self {
        Self { module, tensors: Vec::new() }
    }

    /// Adds a part of these bytes.
    pub(super) fn add(
        &mut self,
        part: &str,
        dtype: DType,
        shape: &[usize],
        bytes: impl Into<std::sync::Arc<[u8]>>,
    ) -> Result<(), FormatError> {
        let name = format!("{}.{part}", self.module);
        match DenseTensor::new(dtype, shape.to_vec(), bytes) {
            Ok(tensor) => self.tensors.push((name, tensor)),
            Err(source) => return Err(FormatError::Tensor { tensor: name, source }),
        }
        Ok(())
    }

    /// Adds parameters as they are.
    pub(super) fn add_params(
        &mut self,
        part: &str,
        shape: &[usize],
        params: &Params,
        layout: &'static str,
    ) -> Result<(), FormatError> {
        let plain = parts::plain_bytes(params);
        match plain.filter(|(dtype, _)| FLOATS.0.contains(dtype) || *dtype == DType::U8) {
            Some((dtype, bytes)) => self.add(part, dtype, shape, bytes),
            None => {
                let remedy = format!("{layout} stores {part} as F16, BF16 or F32; choose another layout");
                Err(unsupported(layout, "parameters", "of two levels or one byte", remedy).into())
            }
        }
    }

    /// All tensors, the bias last.
    pub(super) fn finish(mut self, bias: Option<&DenseTensor>) -> Vec<(String, DenseTensor)> {
        self.tensors.extend(bias.map(|bias| (format!("{}.bias", self.module), bias.clone())));
        self.tensors
    }
}

/// Fails on what only few layouts have: factors per row or column, columns in another order, outliers, a low-rank part.
/// Checks that the matrix is consistent first.
pub(super) fn check_plain(
    layout: &'static str,
    linear: &QuantizedLinear,
    module: &str,
) -> Result<(), FormatError> {
    parts::check_parts(layout, linear, module)?;
    match linear.weight.input_perm {
        None => Ok(()),
        Some(_) => {
            let remedy = "choose another layout";
            Err(unsupported(layout, "columns in another order", "beside codes", remedy).into())
        }
    }
}

/// The zero points of integer codes in the type of the scales, which holds the integers among them exactly. `None`
/// for matrices without (shifts, tables) and for sums that would be rounded.
pub(super) fn zeros_like_scales(matrix: &QuantizedMatrix) -> Option<Params> {
    let (Grid::Int { midpoint }, dtype) = (&matrix.grid, float_type(&matrix.scales)) else { return None };
    let zeros = match &matrix.offset {
        Offset::None => vec![*midpoint as f32; matrix.scales.len()],
        Offset::Zero(zeros) if *midpoint == 0 || matches!(zeros, Params::U8(_)) => {
            zeros.to_vec().into_iter().map(|z| z + *midpoint as f32).collect()
        }
        _ => return None,
    };
    let round = rounding(dtype);
    if zeros.iter().any(|&z| round(z) != z) {
        return None;
    }
    Some(match dtype? {
        DType::F16 => Params::F16(zeros.into_iter().map(f16::from_f32).collect()),
        DType::BF16 => Params::BF16(zeros.into_iter().map(bf16::from_f32).collect()),
        _ => Params::F32(zeros),
    })
}

/// Codes of 8 bits around 128 from signed bytes.
pub(super) fn unpack_signed(bytes: &[u8], codes: &mut Codes) {
    let rows = codes.rows();
    let Some(out) = codes.row_chunks_mut(rows).next() else { return };
    out.par_iter_mut().zip(bytes).with_min_len(1 << 16).for_each(|(o, b)| *o = b ^ 0x80);
}

/// The inverse of [`unpack_signed`].
pub(super) fn pack_signed(codes: &Codes) -> Vec<u8> {
    codes.bytes().par_iter().with_min_len(1 << 16).map(|b| b ^ 0x80).collect()
}

/// Rounds an f32 to a narrower type and back. Other types leave it as it is.
pub(super) fn rounding(dtype: Option<DType>) -> fn(f32) -> f32 {
    match dtype {
        Some(DType::F16) => |v| f16::from_f32(v).to_f32(),
        Some(DType::BF16) => |v| bf16::from_f32(v).to_f32(),
        _ => |v| v,
    }
}

/// Values as parameters of a type, rounded to it; F32 where it is no narrower float.
pub(super) fn cast(values: &[f32], dtype: Option<DType>) -> Params {
    match dtype {
        Some(DType::F16) => Params::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
        Some(DType::BF16) => Params::BF16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
        _ => Params::F32(values.to_vec()),
    }
}

/// The type of plain float parameters of this kind.
pub(super) fn param_type(kind: ParamsKind) -> DType {
    match kind {
        ParamsKind::F32 => DType::F32,
        ParamsKind::BF16 => DType::BF16,
        _ => DType::F16,
    }
}

/// The modules that a configuration lists as left in float: those of the model that were, and the head; `null` where
/// only the library's own choice was left.
pub(super) fn skipped(model: &StoredModel<'_>) -> Value {
    let float = model.exceptions.iter().filter(|(_, spec)| spec.is_none());
    let mut names: Vec<&str> = float.map(|(name, _)| name.as_str()).collect();
    if names.is_empty() {
        return Value::Null;
    }
    if !names.contains(&"lm_head") {
        names.push("lm_head");
    }
    names.into()
}

/// Codes of 8 bits that are stored as they are.
pub(super) fn copy_bytes(bytes: &[u8], codes: &mut Codes) {
    let rows = codes.rows();
    codes.row_chunks_mut(rows).for_each(|out| out.copy_from_slice(bytes));
}

/// The type of parameters that are stored as plain floats.
pub(super) fn float_type(params: &Params) -> Option<DType> {
    match params {
        Params::F32(_) => Some(DType::F32),
        Params::F16(_) => Some(DType::F16),
        Params::BF16(_) => Some(DType::BF16),
        _ => None,
    }
}

/// The name that torch gives a type.
pub(super) fn torch_name(dtype: DType) -> Option<&'static str> {
    TORCH.iter().find(|(d, _)| *d == dtype).map(|(_, name)| *name)
}

/// The type of a name such as `float16` or `torch.float16`.
pub(super) fn from_torch_name(name: &str) -> Option<DType> {
    let name = name.strip_prefix("torch.").unwrap_or(name);
    TORCH.iter().find(|(_, n)| *n == name).map(|(dtype, _)| *dtype)
}

const TORCH: [(DType, &str); 4] =
    [(DType::F16, "float16"), (DType::BF16, "bfloat16"), (DType::F32, "float32"), (DType::F64, "float64")];
