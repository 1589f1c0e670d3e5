//! Reading HQQ layers.

use quant_core::{
    Codes, DType, GridKind, GroupSize, Offset, ParamsKind, QuantSpec, QuantizedLinear, QuantizedMatrix,
};
use serde_json::Value;

use super::{HQQ, View, packing_name};
use crate::error::FormatError;
use crate::layout::module::{self, FLOATS, Types};
use crate::layout::parts::Parts;
use crate::layout::sections::Packing;
use crate::layout::{Layout, Reader, TensorSource};

/// What the configuration says of all modules. `None` where there is none, or where modules differ.
pub(super) fn spec_of(config: &Value) -> Result<Option<QuantSpec>, FormatError> {
    let Some(params) = config.pointer("/quant_config/weight_quant_params") else { return Ok(None) };
    let field = |name: &str| params.get(name).filter(|v| !v.is_null());
    let number = |name: &str, allowed: fn(u64) -> bool, expected: &str| match field(name) {
        None => Ok(None),
        Some(value) => match value.as_u64().filter(|&n| allowed(n)) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(FormatError::Config {
                field: name.to_owned(),
                found: value.to_string(),
                expected: expected.to_owned(),
            }),
        },
    };
    // 1.58 bits are ternary codes in fields of two.
    let ternary = field("nbits").and_then(Value::as_f64) == Some(1.58);
    let bits = match ternary {
        true => Some(2),
        false => number("nbits", |n| [8, 6, 5, 4, 3, 2, 1].contains(&n), "8, 6, 5, 4, 3, 2, 1 are possible")?,
    };
    let axis = number("axis", |n| n <= 1, "0 and 1 are possible")?.unwrap_or(1);
    let group = number("group_size", |n| n > 0, "it must be positive, or null for whole rows")?;
    let Some(bits) = bits else { return Ok(None) };
    let group = match (group, axis) {
        (Some(len), 0) => GroupSize::Strided(len),
        (Some(len), _) => GroupSize::Columns(len),
        (None, _) => GroupSize::Row,
    };
    let (grid, scales) = (GridKind::Int, ParamsKind::F16);
    Ok(Some(QuantSpec { bits: bits as u8, grid, group, scales, symmetric: false, act_order: false }))
}

/// Reads one checkpoint: modules say everything themselves.
#[derive(Debug)]
pub(super) struct HqqReader {
    pub(super) spec: Option<QuantSpec>,
}

/// What the headers and the settings of a module say.
struct Geometry {
    rows: usize,
    cols: usize,
    bits: u8,
    packing: Packing,
    view: View,
    /// Type that the codes are viewed as, where it is another than that of the packing.
    compute: Option<DType>,
}

impl HqqReader {
    fn geometry(&self, parts: &Parts<'_>) -> Result<Geometry, FormatError> {
        let setting = |part: &str| -> Result<i64, FormatError> {
            parts.require(part, Types(&[DType::I32, DType::I64, DType::U8], "an integer type"))?;
            match parts.integers(part)?.as_deref() {
                Some(&[value]) => Ok(value),
                _ => Err(parts.value_error(part, 0, "no scalar", "it must be one number".into())),
            }
        };
        let bad = |part: &str, found: &dyn std::fmt::Display, expected: &str| {
            parts.value_error(part, 0, found, expected.to_owned())
        };
        let bits = match parts.look("nbits") {
            // Ternary codes of 1.58 bits.
            Some(found) if found.dtype == DType::F32 && found.len() == 1 => {
                match parts.params("nbits")?.get(0) {
                    bits if (1.5..1.6).contains(&bits) => 2,
                    bits => return Err(bad("nbits", &bits, "8, 6, 5, 4, 3, 2, 1.58 and 1 are possible")),
                }
            }
            _ => setting("nbits")?,
        };
        let named = u8::try_from(bits).ok().and_then(packing_name);
        let named = named.ok_or_else(|| bad("nbits", &bits, "8, 6, 5, 4, 3, 2, 1.58 and 1 are possible"))?;
        let text = parts.text("packing")?;
        let packing = Packing::named(text.as_deref().unwrap_or(named)).filter(|p| i64::from(p.bits) >= bits);
        let packing = packing.ok_or_else(|| {
            let found = text.unwrap_or_default();
            bad("packing", &crate::display_name(&found), &format!("{bits} bits are packed as {named}"))
        })?;
        let shape = parts.require("shape", Types(&[DType::I64, DType::I32], "I64"))?;
        let (rows, cols) = match parts.integers("shape")?.as_deref() {
            Some(&[rows, cols]) if rows > 0 && cols > 0 => (rows as usize, cols as usize),
            _ => {
                return Err(parts.misfit("shape", shape, "two positive sizes".into(), "the layout".into()));
            }
        };
        let axis = match setting("axis")? {
            axis @ (0 | 1) => axis as usize,
            axis => return Err(bad("axis", &axis, "0 and 1 are possible")),
        };
        let len = match parts.look("group_size") {
            None => {
                if axis == 0 {
                    rows
                } else {
                    cols
                }
            }
            Some(_) => usize::try_from(setting("group_size")?).unwrap_or(0),
        };
        for part in ["quant_scale", "quant_zero"] {
            if parts.integers(part)?.is_some_and(|v| v != [0]) {
                return Err(bad(part, &1, "quantized scales are not supported; save the model without them"));
            }
        }
        let elements = rows.checked_mul(cols);
        let view = elements.and_then(|n| View::new(n, len, axis)).ok_or_else(|| {
            bad("group_size", &len, &format!("it must divide the {rows} x {cols} weights of shape"))
        })?;
        let compute = parts.text("compute_dtype")?.as_deref().and_then(module::from_torch_name);

        // Codes may be viewed as floats of the same bytes.
        let words = parts.require(
            "W_q",
            Types(&[DType::U8, DType::I32, DType::F16, DType::BF16, DType::F32], "U8 or I32"),
        )?;
        let because = || format!("shape [{rows}, {cols}], {bits} bits, group_size {len}, axis {axis}");
        let line = view.cols.checked_mul(packing.word * 8).map(|bits| bits / words.dtype.bits());
        let expected = [packing.word_rows(view.rows), line.unwrap_or(0)];
        parts.has_shape("W_q", words, &expected, &because)?;
        if !(view.cols * packing.word).is_multiple_of(words.dtype.bits() / 8) {
            return Err(parts.misfit("W_q", words, "whole words".into(), because()));
        }
        for part in ["scale", "zero"] {
            parts.has_shape(part, parts.require(part, FLOATS)?, &view.params_shape(), &because)?;
        }
        parts.check_bias(rows)?;
        Ok(Geometry { rows, cols, bits: bits as u8, packing, view, compute })
    }
}

impl Reader for HqqReader {
    fn layout(&self) -> &'static dyn Layout {
        &HQQ
    }

    fn spec(&self) -> Option<QuantSpec> {
        self.spec
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(&Parts { source, module, layout: "hqq" }).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "hqq" };
        let Geometry { rows, cols, bits, packing, view, compute } = self.geometry(&parts)?;
        let mut codes = Codes::zeros(bits, rows, cols).map_err(|e| parts.invalid(e))?;
        packing.unpack(parts.read("W_q")?.bytes(), &mut codes).map_err(|e| parts.invalid(e))?;
        let (scales, zeros) = (parts.params("scale")?, Offset::Zero(parts.params("zero")?));
        let matrix = QuantizedMatrix::affine(codes, view.groups(cols), scales, zeros, 0);
        let weight = QuantizedMatrix { dtype: compute, ..matrix };
        parts.linear(weight)
    }
}
