//! What the file beside the weights says of each module, and the tables of values.

use std::collections::BTreeMap;

use quant_core::{DType, Grid, GridKind, ParamsKind, QuantSpec};
use serde_json::Value;

use crate::error::FormatError;
use crate::layout::module;

/// The file that describes every module.
pub(super) const SIDE_FILE: &str = "model.safetensors.index.json.meta.json";

/// The NF3 table, by its bits.
const NF3: [u32; 8] =
    [0xbf80_0000, 0xbf08_f740, 0xbe7c_db96, 0x0000_0000, 0x3e3b_bcd5, 0x3ec3_94b6, 0x3f1f_7bfd, 0x3f80_0000];

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Int,
    Nf4,
    Nf3,
}

impl Method {
    fn named(name: &str) -> Self {
        match name {
            name if name.contains("nf4") => Method::Nf4,
            name if name.contains("nf3") => Method::Nf3,
            _ => Method::Int,
        }
    }

    /// The method whose table, in any rounding, a grid has.
    pub(super) fn of(grid: &Grid) -> Option<Self> {
        let Grid::Table(_) = grid else { return Some(Method::Int) };
        let types = [None, Some(DType::F16), Some(DType::BF16)];
        let is = |method: &Method| types.iter().any(|&dtype| method.grid(dtype).as_ref() == Some(grid));
        [Method::Nf4, Method::Nf3].into_iter().find(is)
    }

    /// The values of the codes in the type of the computation; `None` for plain codes.
    pub(super) fn grid(self, dtype: Option<DType>) -> Option<Grid> {
        let table = match self {
            Method::Int => return None,
            Method::Nf4 => GridKind::Nf4.table()?,
            Method::Nf3 => NF3.map(f32::from_bits).into(),
        };
        let round = module::rounding(dtype);
        Some(Grid::Table(table.iter().map(|&v| round(v)).collect()))
    }
}

/// The library's name for what a specification asks for.
pub(super) fn method_name(spec: &QuantSpec) -> &'static str {
    match (spec.grid, spec.scales) {
        (GridKind::Nf4, _) => "sinq_nf4",
        (_, ParamsKind::Affine8) => "sinq_quantAux",
        _ if spec.symmetric => "sinq_noz",
        _ => "sinq",
    }
}

/// The entry of a module. What is absent follows from the tensors.
#[derive(Clone, Debug)]
pub(super) struct Meta {
    pub(super) bits: Option<u8>,
    pub(super) shape: Option<(usize, usize)>,
    pub(super) packing: Option<String>,
    pub(super) method: Method,
    /// What weights are computed in.
    pub(super) dtype: Option<DType>,
    pub(super) group: Option<usize>,
}

impl Meta {
    /// Parses an entry, or the settings of all modules in `quantization_config`.
    pub(super) fn parse(entry: &Value) -> Result<Self, FormatError> {
        let field = |name: &str| entry.get(name).filter(|v| !v.is_null());
        let wrong = |name: &str, expected: &str| FormatError::Config {
            field: name.to_owned(),
            found: field(name).map_or("absent".to_owned(), Value::to_string),
            expected: expected.to_owned(),
        };
        let bits = match field("nbits") {
            None => None,
            Some(value) => {
                let bits = value.as_u64().and_then(|n| u8::try_from(n).ok());
                let bits = bits.filter(|&bits| super::packing_name(bits).is_some());
                Some(bits.ok_or_else(|| wrong("nbits", "1, 2, 3, 4, 5, 6, 8 are possible"))?)
            }
        };
        let shape = match field("shape") {
            None => None,
            Some(value) => match value.as_array().map(Vec::as_slice) {
                Some([rows, cols]) => {
                    let size = |v: &Value| v.as_u64().filter(|&n| n > 0).map(|n| n as usize);
                    Some(size(rows).zip(size(cols)).ok_or_else(|| wrong("shape", "two positive sizes"))?)
                }
                _ => return Err(wrong("shape", "it must be [outputs, inputs]")),
            },
        };
        if field("axis").is_some_and(|v| v.as_i64() != Some(1)) {
            return Err(wrong("axis", "groups lie along inputs (1)"));
        }
        if field("awq_scale").is_some() {
            return Err(wrong("awq_scale", "it must be folded into scale2"));
        }
        if field("view_as_float").is_some_and(|v| v.as_bool() != Some(false)) {
            return Err(wrong("view_as_float", "codes must be stored as integers"));
        }
        let text = |name: &str| match field(name) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| wrong(name, "it must be a text")),
        };
        let group = match field("group_size") {
            None => None,
            // Whole rows.
            Some(value) if value.as_i64() == Some(-1) => None,
            Some(value) => {
                let len = value.as_u64().filter(|&n| n > 0).map(|n| n as usize);
                Some(len.ok_or_else(|| wrong("group_size", "it must be positive"))?)
            }
        };
        Ok(Self {
            bits,
            shape,
            packing: text("packing")?.map(str::to_owned),
            method: Method::named(text("method")?.unwrap_or_default()),
            dtype: text("compute_dtype")?.and_then(module::from_torch_name),
            group,
        })
    }

    /// The entries of the side file.
    pub(super) fn all(modules: &Value) -> Result<BTreeMap<String, Meta>, FormatError> {
        let entries = modules.as_object().into_iter().flatten();
        let entries = entries.filter_map(|(module, entry)| Some((module, entry.get("meta")?)));
        entries.map(|(module, meta)| Ok((module.clone(), Meta::parse(meta)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_entry_of_the_library() {
        let entry = json!({"nbits": 4, "group_size": 64, "shape": [128, 64], "awq_scale": null, "axis": 1,
            "packing": "4bit_u8", "method": "sinq_nf4", "compute_dtype": "torch.bfloat16", "view_as_float": false});
        let meta = Meta::parse(&entry).unwrap();
        assert_eq!((meta.bits, meta.shape, meta.method), (Some(4), Some((128, 64)), Method::Nf4));
        assert_eq!((meta.dtype, meta.group), (Some(DType::BF16), Some(64)));
        for (name, value) in [
            ("nbits", json!(7)),
            ("nbits", json!("4")),
            ("shape", json!([0, 4])),
            ("shape", json!([4])),
            ("axis", json!(0)),
            ("awq_scale", json!(1.5)),
            ("view_as_float", json!(true)),
            ("group_size", json!(0)),
        ] {
            let mut wrong = entry.clone();
            wrong[name] = value;
            assert!(Meta::parse(&wrong).unwrap_err().to_string().contains(name));
        }
    }

    #[test]
    fn tables_are_known_in_every_rounding() {
        for method in [Method::Nf4, Method::Nf3] {
            for dtype in [None, Some(DType::F16), Some(DType::BF16)] {
                assert_eq!(Method::of(&method.grid(dtype).unwrap()), Some(method));
            }
        }
        assert_eq!(Method::of(&Grid::Table([0.5].into())), None);
        let Some(Grid::Table(nf3)) = Method::Nf3.grid(None) else { panic!() };
        let published = [
            -1.0,
            -0.535_022_735_595_703_1,
            -0.246_931_403_875_351,
            0.0,
            0.183_337_524_533_271_8,
            0.381_993_949_413_299_6,
            0.622_985_661_029_815_7,
            1.0,
        ];
        assert_eq!(nf3.to_vec(), published.map(|v: f64| v as f32));
    }
}
