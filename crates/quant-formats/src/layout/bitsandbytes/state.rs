//! The JSON text in which a 4-bit layer says what it is.

use quant_core::DType;
use serde::Deserialize;

use super::{BLOCKS, Kind, NESTED_BLOCK};
use crate::layout::module;

/// Characters that a nested offset takes: those of the longest f32. Shorter texts are padded with spaces behind the
/// object, so that the size of the tensor is known before the offset is.
const OFFSET_WIDTH: usize = 24;

/// What the text says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct State {
    pub(super) kind: Kind,
    pub(super) block: usize,
    /// What weights are decoded to.
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) nested_offset: Option<f32>,
}

#[derive(Deserialize)]
struct Raw {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// Why a text is not a state: the field, what was found, what is possible.
#[derive(Debug)]
pub(super) struct StateError {
    pub(super) field: &'static str,
    pub(super) found: String,
    pub(super) expected: String,
}

impl State {
    /// Parses a text. The shape is not yet compared with the packed codes.
    pub(super) fn parse(text: &str) -> Result<Self, StateError> {
        let fail =
            |field, found: String, expected: &str| StateError { field, found, expected: expected.to_owned() };
        let raw: Raw = serde_json::from_str(text).map_err(|e| {
            fail("quant_state", e.to_string(), "it must be JSON with quant_type, blocksize, dtype and shape")
        })?;
        let kind = match raw.quant_type.as_str() {
            "nf4" => Kind::Nf4,
            "fp4" => Kind::Fp4,
            _ => return Err(fail("quant_type", raw.quant_type, "nf4 and fp4 are possible")),
        };
        if !BLOCKS.contains(&raw.blocksize) {
            return Err(fail("blocksize", raw.blocksize.to_string(), "32, 64, 128 ... 4096 are possible"));
        }
        let Some(dtype) = module::from_torch_name(&raw.dtype) else {
            return Err(fail("dtype", raw.dtype, "float16, bfloat16 and float32 are possible"));
        };
        let &[rows, cols] = raw.shape.as_slice() else {
            return Err(fail("shape", format!("{:?}", raw.shape), "it must be [outputs, inputs]"));
        };
        if rows == 0 || cols == 0 || rows.checked_mul(cols).is_none() {
            return Err(fail(
                "shape",
                format!("[{rows}, {cols}]"),
                "its product must be positive and addressable",
            ));
        }
        if let Some(found) = raw.nested_blocksize.filter(|&b| b != NESTED_BLOCK) {
            return Err(fail("nested_blocksize", found.to_string(), "it must be 256"));
        }
        if let Some(found) = raw.nested_dtype.filter(|d| d != "float32") {
            return Err(fail("nested_dtype", found, "it must be float32"));
        }
        let nested_offset = raw.nested_offset.map(|offset| offset as f32);
        if let Some(found) = nested_offset.filter(|o| !o.is_finite()) {
            return Err(fail("nested_offset", found.to_string(), "it must be finite"));
        }
        Ok(Self { kind, block: raw.blocksize, dtype, rows, cols, nested_offset })
    }

    /// The text as the library writes it.
    pub(super) fn to_json(self) -> String {
        let (kind, block, rows, cols) = (self.quant_type(), self.block, self.rows, self.cols);
        let dtype = module::torch_name(self.dtype).unwrap_or("float32");
        let mut text = format!(
            r#"{{"quant_type": "{kind}", "blocksize": {block}, "dtype": "{dtype}", "shape": [{rows}, {cols}]"#
        );
        if let Some(offset) = self.nested_offset {
            let offset = python_float(offset.into());
            text += &format!(
                r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset}}}"#
            );
            let padding = OFFSET_WIDTH.saturating_sub(offset.len());
            text.extend(std::iter::repeat_n(' ', padding));
        } else {
            text.push('}');
        }
        text
    }

    /// The part that holds the text.
    pub(super) fn part(&self) -> &'static str {
        match self.kind {
            Kind::Fp4 => "weight.quant_state.bitsandbytes__fp4",
            Kind::Nf4 | Kind::Int8 => "weight.quant_state.bitsandbytes__nf4",
        }
    }

    fn quant_type(&self) -> &'static str {
        match self.kind {
            Kind::Fp4 => "fp4",
            Kind::Nf4 | Kind::Int8 => "nf4",
        }
    }
}

/// A number as Python prints it: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_print_as_in_python() {
        for (value, text) in [
            (0.246_898_651_123_046_88, "0.24689865112304688"),
            (2.0, "2.0"),
            (-0.0, "-0.0"),
            (1e-4, "0.0001"),
            (f64::from(1e-5f32), "9.999999747378752e-06"),
            (1e16, "1e+16"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (f64::from(f32::MIN_POSITIVE), "1.1754943508222875e-38"),
        ] {
            assert_eq!(python_float(value), text);
        }
        assert_eq!(python_float(f64::from(-f32::MIN_POSITIVE)).len(), 23);
        assert!(python_float(f64::from(-f32::from_bits(1))).len() <= OFFSET_WIDTH);
    }

    #[test]
    fn the_text_is_what_the_library_writes() {
        let state =
            State { kind: Kind::Nf4, block: 64, dtype: DType::F16, rows: 64, cols: 96, nested_offset: None };
        let text = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [64, 96]}"#;
        assert_eq!(state.to_json(), text);
        assert_eq!(State::parse(text).unwrap(), state);
        let nested = State { kind: Kind::Fp4, nested_offset: Some(2.650_462), ..state };
        let text = r#"{"quant_type": "fp4", "blocksize": 64, "dtype": "float16", "shape": [64, 96], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.6504619121551514}"#;
        assert_eq!(nested.to_json().trim_end(), text);
        assert_eq!(State::parse(&nested.to_json()).unwrap(), nested);
        // Every offset gives the same length.
        for offset in [0.0, -1.0e-30, 3.0e38, 0.1] {
            let other = State { nested_offset: Some(offset), ..nested };
            assert_eq!(other.to_json().len(), nested.to_json().len());
            assert_eq!(State::parse(&other.to_json()).unwrap(), other);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_field() {
        let text = |field: &str, value: &str| {
            let mut fields = [
                ("quant_type", r#""nf4""#),
                ("blocksize", "64"),
                ("dtype", r#""float16""#),
                ("shape", "[8, 8]"),
                ("nested_blocksize", "256"),
                ("nested_dtype", r#""float32""#),
                ("nested_offset", "0.5"),
            ];
            fields.iter_mut().filter(|(f, _)| *f == field).for_each(|f| f.1 = value);
            let fields: Vec<_> = fields.iter().map(|(f, v)| format!("{f:?}: {v}")).collect();
            format!("{{{}}}", fields.join(", "))
        };
        assert!(State::parse(&text("", "")).is_ok());
        for (field, value) in [
            ("quant_type", r#""nf5""#),
            ("blocksize", "0"),
            ("blocksize", "65"),
            ("dtype", r#""int8""#),
            ("shape", "[8]"),
            ("shape", "[0, 8]"),
            ("shape", "[4294967296, 4294967296]"),
            ("nested_blocksize", "0"),
            ("nested_dtype", r#""float16""#),
            ("nested_offset", "1e300"),
        ] {
            assert_eq!(State::parse(&text(field, value)).unwrap_err().field, field);
        }
        for (field, value) in
            [("blocksize", "-1"), ("shape", "[-8, 8]"), ("shape", "7"), ("nested_offset", "NaN")]
        {
            assert_eq!(State::parse(&text(field, value)).unwrap_err().field, "quant_state");
        }
        assert!(State::parse(&"[".repeat(4000)).is_err());
    }
}
