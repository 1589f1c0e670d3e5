//! Reading bitsandbytes layers.

use quant_core::{
    ActGrid, ActGroup, ActSpec, Codes, DType, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind,
    QuantSpec, QuantizedLinear, QuantizedMatrix, codes,
};
use rayon::prelude::*;
use serde_json::Value;

use super::state::State;
use super::{Bnb, FP4, INT8, INT8_MAX, Kind, NESTED_BLOCK, NF4};
use crate::error::FormatError;
use crate::layout::module::{self, Part, Types};
use crate::layout::parts::Parts;
use crate::layout::{Layout, Reader, TensorSource};

/// Types of packed 4-bit codes: all but U8 are other views of the same bytes.
const STORAGE: Types =
    Types(&[DType::U8, DType::I8, DType::F16, DType::BF16, DType::F32], "U8 or a type of quant_storage");

const F32: Types = Types(&[DType::F32], "F32");
const U8: Types = Types(&[DType::U8], "U8");

/// Reads one checkpoint.
#[derive(Debug)]
pub(super) struct BnbReader {
    kind: Kind,
    nested: bool,
    /// Magnitude from which on input features stay float; only for 8 bits.
    threshold: f32,
}

/// What the headers of a layer say.
enum Geometry {
    Four(State),
    Eight { rows: usize, cols: usize },
}

impl BnbReader {
    pub(super) fn new(config: &Value, by_tensors: Kind) -> Result<Self, FormatError> {
        let wrong = |field: &str, found: &Value, expected: &str| FormatError::Config {
            field: field.to_owned(),
            found: found.to_string(),
            expected: expected.to_owned(),
        };
        let flag = |name: &str| match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_bool().map(Some).ok_or_else(|| wrong(name, value, "it must be a flag")),
        };
        let quant_type = match config.get("bnb_4bit_quant_type") {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) if name == "nf4" => Some(Kind::Nf4),
            Some(Value::String(name)) if name == "fp4" => Some(Kind::Fp4),
            Some(other) => return Err(wrong("bnb_4bit_quant_type", other, "nf4 and fp4 are possible")),
        };
        let kind = match (flag("load_in_8bit")?, flag("load_in_4bit")?) {
            (Some(true), Some(true)) => {
                return Err(wrong(
                    "load_in_8bit",
                    &Value::Bool(true),
                    "load_in_4bit is true too; only one can be",
                ));
            }
            (Some(true), _) => Kind::Int8,
            (_, Some(true)) => quant_type.unwrap_or(Kind::Fp4),
            _ => by_tensors,
        };
        let threshold = match config.get("llm_int8_threshold") {
            None | Some(Value::Null) => 6.0,
            Some(value) => match value.as_f64() {
                Some(t) if (0.0..=f64::from(f32::MAX)).contains(&t) => t as f32,
                _ => return Err(wrong("llm_int8_threshold", value, "it must not be negative")),
            },
        };
        Ok(Self { kind, nested: flag("bnb_4bit_use_double_quant")?.unwrap_or(false), threshold })
    }

    /// Activations are rounded at run time, but for features that reach the threshold.
    fn input_8bit(&self) -> ActSpec {
        // Also of 0, which means no outliers: the steps of LLM.int8 are a 127th of the largest number.
        let (grid, per, outlier_threshold) = (ActGrid::Int8, ActGroup::Token, Some(self.threshold));
        ActSpec::Dynamic { grid, per, symmetric: true, outlier_threshold }
    }

    fn geometry(&self, parts: &Parts<'_>) -> Result<Geometry, FormatError> {
        let four = ["weight.absmax", "weight.quant_map"].iter().any(|p| parts.look(p).is_some());
        let eight = parts.look("SCB").is_some() || parts.look("weight").is_some_and(|w| w.dtype == DType::I8);
        if eight && !four {
            return self.geometry_8bit(parts);
        }
        let state = self.state(parts)?;
        let State { rows, cols, block, .. } = state;
        let count = (rows * cols).div_ceil(block);
        let weight = parts.require("weight", STORAGE)?;
        check_packed(parts, weight, rows, cols)?;
        let because = || format!("shape [{rows}, {cols}] and blocksize {block} in quant_state");
        let nested = state.nested_offset.is_some();
        let absmax = parts.require("weight.absmax", if nested { U8 } else { F32 })?;
        parts.has_shape("weight.absmax", absmax, &[count], &because)?;
        parts.has_shape("weight.quant_map", parts.require("weight.quant_map", F32)?, &[16], &|| {
            "4 bits".into()
        })?;
        if nested {
            let part = "weight.nested_absmax";
            parts.has_shape(part, parts.require(part, F32)?, &[count.div_ceil(NESTED_BLOCK)], &because)?;
            let part = "weight.nested_quant_map";
            parts.has_shape(part, parts.require(part, F32)?, &[256], &|| "8-bit scales".into())?;
        }
        parts.check_bias(rows)?;
        Ok(Geometry::Four(state))
    }

    /// The text of a 4-bit layer.
    fn state(&self, parts: &Parts<'_>) -> Result<State, FormatError> {
        const NAMES: [&str; 2] =
            ["weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"];
        let name = NAMES.into_iter().find(|name| parts.look(name).is_some()).unwrap_or(match self.kind {
            Kind::Fp4 => NAMES[1],
            Kind::Nf4 | Kind::Int8 => NAMES[0],
        });
        parts.require(name, U8)?;
        let text = parts.text(name)?.unwrap_or_default();
        State::parse(&text)
            .map_err(|e| parts.value_error(name, 0, format!("{} {}", e.field, e.found), e.expected))
    }

    fn geometry_8bit(&self, parts: &Parts<'_>) -> Result<Geometry, FormatError> {
        let weight = parts.require("weight", Types(&[DType::I8], "I8"))?;
        let &[rows, cols] = weight.shape else {
            let expected = "[outputs, inputs]".to_owned();
            return Err(parts.misfit("weight", weight, expected, "the layout".into()));
        };
        if rows == 0 || cols == 0 {
            let expected = "positive sizes".to_owned();
            return Err(parts.misfit("weight", weight, expected, "the layout".into()));
        }
        parts
            .has_shape("SCB", parts.require("SCB", F32)?, &[rows], &|| format!("weight [{rows}, {cols}]"))?;
        if let Some(format) = parts.integers("weight_format")?
            && format != [0]
        {
            let expected =
                "only the row format (0) is supported; save the model again with a current library";
            let found = format.first().map_or("nothing".to_owned(), i64::to_string);
            return Err(parts.value_error("weight_format", 0, found, expected.into()));
        }
        parts.check_bias(rows)?;
        Ok(Geometry::Eight { rows, cols })
    }

    fn read_4bit(&self, parts: &Parts<'_>, state: State) -> Result<QuantizedMatrix, FormatError> {
        let State { rows, cols, block, dtype, nested_offset, .. } = state;
        let mut codes = Codes::zeros(4, rows, cols).map_err(|e| parts.invalid(e))?;
        fill(parts.read("weight")?.bytes(), &mut codes);
        let floats = |part: &str| -> Result<Vec<f32>, FormatError> {
            let values = parts.params(part)?.to_vec();
            match values.iter().position(|v| !v.is_finite()) {
                None => Ok(values),
                Some(i) => {
                    Err(parts.value_error(part, i, values[i], "weights and scales must be finite".into()))
                }
            }
        };
        let scales = match nested_offset {
            None => Params::F32(floats("weight.absmax")?),
            Some(offset) => Params::Nested {
                codes: parts.read("weight.absmax")?.bytes().to_vec(),
                table: floats("weight.nested_quant_map")?.into(),
                absmax: floats("weight.nested_absmax")?,
                block: NESTED_BLOCK,
                offset,
            },
        };
        // The table of the file, which is another than that of its name in files of other programs.
        let grid = Grid::Table(floats("weight.quant_map")?.into());
        let matrix = QuantizedMatrix::affine(codes, Groups::Flat { len: block }, scales, Offset::None, 0);
        Ok(QuantizedMatrix { grid, dtype: Some(dtype), ..matrix })
    }

    fn read_8bit(&self, parts: &Parts<'_>, rows: usize, cols: usize) -> Result<QuantizedMatrix, FormatError> {
        let mut codes = Codes::zeros(8, rows, cols).map_err(|e| parts.invalid(e))?;
        module::unpack_signed(parts.read("weight")?.bytes(), &mut codes);
        let base = Box::new(parts.params("SCB")?);
        let scales = Params::Scaled { base, factor: INT8_MAX, divide: true };
        let matrix = QuantizedMatrix::affine(codes, Groups::whole_row(cols), scales, Offset::None, 0);
        Ok(QuantizedMatrix { grid: Grid::signed(8), ..matrix })
    }
}

/// Fails unless the packed tensor has the bytes of `rows * cols` nibbles; wider storage may pad its last element.
fn check_packed(parts: &Parts<'_>, weight: Part<'_>, rows: usize, cols: usize) -> Result<(), FormatError> {
    let width = weight.dtype.bits() / 8;
    let elements = (rows * cols).div_ceil(2).div_ceil(width);
    let column = [elements, 1];
    // Some versions keep a row instead of a column.
    if weight.shape == column || weight.shape == [1, elements] || weight.shape == [elements] {
        return Ok(());
    }
    let because = format!("shape [{rows}, {cols}] in quant_state");
    Err(parts.misfit("weight", weight, format!("{column:?}"), because))
}

/// Codes from nibbles whose even element is high.
fn fill(bytes: &[u8], codes: &mut Codes) {
    let (rows, cols, row_bytes) = (codes.rows(), codes.cols(), codes.row_bytes());
    if cols.is_multiple_of(2) {
        let at_once = ((1 << 16) / row_bytes).max(1);
        let chunks: Vec<&mut [u8]> = codes.row_chunks_mut(at_once).collect();
        chunks.into_par_iter().zip(bytes.par_chunks(at_once * row_bytes)).for_each(|(out, bytes)| {
            out.iter_mut().zip(bytes).for_each(|(o, b)| *o = b.rotate_left(4));
        });
        return;
    }
    let swapped: Vec<u8> = bytes.iter().map(|b| b.rotate_left(4)).collect();
    let mut flat = vec![0; rows * cols];
    codes::unpack(4, &swapped, &mut flat);
    flat.chunks(cols).enumerate().for_each(|(r, row)| codes.set_row(r, row));
}

impl Reader for BnbReader {
    fn layout(&self) -> &'static dyn Layout {
        const LAYOUTS: [&Bnb; 3] = [&NF4, &FP4, &INT8];
        LAYOUTS[self.kind as usize]
    }

    fn spec(&self) -> Option<QuantSpec> {
        let (grid, bits, group, scales) = match self.kind {
            Kind::Int8 => (GridKind::Int, 8, GroupSize::Row, ParamsKind::F32),
            kind => {
                let grid = if kind == Kind::Nf4 { GridKind::Nf4 } else { GridKind::Fp4 };
                let scales = if self.nested { ParamsKind::Nested } else { ParamsKind::F32 };
                // The block size is in the tensors; this is what transformers makes.
                (grid, 4, GroupSize::Flat(64), scales)
            }
        };
        Some(QuantSpec { bits, grid, group, scales, symmetric: true, act_order: false })
    }

    fn input(&self) -> ActSpec {
        if self.kind == Kind::Int8 { self.input_8bit() } else { ActSpec::Float }
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        Ok(match self.geometry(&Parts { source, module, layout: "bitsandbytes" })? {
            Geometry::Four(state) => (state.rows, state.cols),
            Geometry::Eight { rows, cols } => (rows, cols),
        })
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "bitsandbytes" };
        let (weight, input) = match self.geometry(&parts)? {
            Geometry::Four(state) => (self.read_4bit(&parts, state)?, ActSpec::Float),
            Geometry::Eight { rows, cols } => (self.read_8bit(&parts, rows, cols)?, self.input_8bit()),
        };
        Ok(QuantizedLinear { input, ..parts.linear(weight)? })
    }
}
