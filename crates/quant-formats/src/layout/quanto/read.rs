//! Reading Quanto layers.

use std::collections::BTreeMap;

use quant_core::{
    ActGrid, ActSpec, Codes, DType, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use serde_json::Value;

use super::{QUANTO, TYPES, group_len, groups, packing};
use crate::error::FormatError;
use crate::layout::module::{self, FLOATS, Types};
use crate::layout::parts::Parts;
use crate::layout::{Layout, Reader, TensorSource};

const PACKED: &str = "weight._data._data";
const PLAIN: &str = "weight._data";
const SCALE: &str = "weight._scale";
const SHIFT: &str = "weight._shift";

/// Reads one checkpoint.
#[derive(Debug)]
pub(super) struct QuantoReader {
    /// Types of weights and activations of each module, from the library's own file.
    modules: BTreeMap<String, Kinds>,
    /// Those of all modules, from `quantization_config`.
    all: Option<Kinds>,
}

#[derive(Clone, Copy, Debug)]
struct Kinds {
    /// Index in [`TYPES`].
    weights: usize,
    activations: Option<ActGrid>,
}

/// What the headers of a layer and the model's configuration say.
struct Geometry {
    rows: usize,
    cols: usize,
    bits: u8,
    grid: GridKind,
}

impl QuantoReader {
    pub(super) fn new(config: &Value) -> Result<Self, FormatError> {
        let mut modules = BTreeMap::new();
        for (module, entry) in config.get("modules").and_then(Value::as_object).into_iter().flatten() {
            if let Some(kinds) = kinds(entry)? {
                modules.insert(module.clone(), kinds);
            }
        }
        Ok(Self { modules, all: kinds(config)? })
    }

    fn kinds(&self, module: &str) -> Option<Kinds> {
        self.modules.get(module).copied().or(self.all)
    }

    fn geometry(
        &self,
        source: &dyn TensorSource,
        parts: &Parts<'_>,
        module: &str,
    ) -> Result<Geometry, FormatError> {
        if parts.look(PACKED).is_some() {
            return self.geometry_packed(source, parts, module);
        }
        let types =
            Types(&[DType::I8, DType::F8E4M3, DType::F8E4M3Fnuz, DType::F8E5M2], "I8 or an 8-bit float");
        let data = parts.require(PLAIN, types)?;
        let (rows, cols) = match *data.shape {
            [rows, cols] if rows > 0 && cols > 0 => (rows, cols),
            _ => {
                let expected = "[outputs, inputs]".to_owned();
                return Err(parts.misfit(PLAIN, data, expected, "the layout".into()));
            }
        };
        let because = || format!("{PLAIN} [{rows}, {cols}]");
        parts.has_shape(SCALE, parts.require(SCALE, FLOATS)?, &[rows, 1], &because)?;
        parts.check_bias(rows)?;
        let (_, bits, grid, _) = TYPES.into_iter().find(|t| t.3 == data.dtype).unwrap_or(TYPES[2]);
        Ok(Geometry { rows, cols, bits, grid })
    }

    /// Sizes of a layer of narrow codes, which its tensors leave open: with groups of 128, 512 of them may be
    /// 512 x 128 weights or 256 x 256.
    fn geometry_packed(
        &self,
        source: &dyn TensorSource,
        parts: &Parts<'_>,
        module: &str,
    ) -> Result<Geometry, FormatError> {
        let data = parts.require(PACKED, Types(&[DType::U8], "U8"))?;
        let scale = parts.require(SCALE, FLOATS)?;
        let (&[word_rows, view_cols], &[view_rows, 1]) = (data.shape, scale.shape) else {
            let (part, found) = if data.shape.len() == 2 { (SCALE, scale) } else { (PACKED, data) };
            return Err(parts.misfit(part, found, "two dimensions".into(), "the layout".into()));
        };
        let fits =
            |bits: &u8| packing(*bits).word_rows(view_rows) == word_rows && view_rows > 0 && view_cols > 0;
        let declared = self.kinds(module).map(|kinds| TYPES[kinds.weights].1).filter(fits);
        let bits = declared.or_else(|| [4, 2].into_iter().find(fits)).ok_or_else(|| {
            let expected = format!("[{} or {}, columns]", view_rows.div_ceil(2), view_rows.div_ceil(4));
            parts.misfit(PACKED, data, expected, format!("{view_rows} scales at 4 or 2 bits"))
        })?;
        let shift = parts
            .require(SHIFT, Types(&[DType::F16, DType::BF16, DType::F32, DType::U8], "a float type or U8"))?;
        parts.has_shape(SHIFT, shift, &[view_rows, 1], &|| format!("{view_rows} scales"))?;

        // The file holds words for this many codes, so the product is addressable.
        let elements = view_rows * view_cols;
        let by_bias = parts.look("bias").and_then(|bias| elements.checked_div(bias.len()));
        let by_config = || inputs(source.model_config(), module);
        let grouped =
            |cols: &usize| group_len(*cols).unwrap_or(*cols) == view_cols && elements.is_multiple_of(*cols);
        let ungrouped = Some(view_cols).filter(|&cols| cols > 128);
        let known = by_bias.or_else(by_config).or(ungrouped).filter(|&cols| cols > 0);
        let Some(cols) = known.filter(grouped) else {
            let found = known.map_or("nothing".to_owned(), |cols| format!("{cols} inputs"));
            let expected = format!("inputs whose groups have {view_cols} columns");
            let because = format!("the model's configuration, which gives {found} for this module");
            return Err(parts.misfit(PACKED, data, expected, because));
        };
        let rows = elements / cols;
        parts.check_bias(rows)?;
        Ok(Geometry { rows, cols, bits, grid: GridKind::Int })
    }
}

/// The types that an entry names; `None` where it names none.
fn kinds(entry: &Value) -> Result<Option<Kinds>, FormatError> {
    let text = |name: &str| entry.get(name).and_then(Value::as_str).filter(|t| *t != "none");
    let Some(weights) = text("weights") else { return Ok(None) };
    // transformers leaves the q away, and says float8 for one of the kinds.
    let full = match weights {
        "float8" => "qfloat8_e4m3fn".to_owned(),
        "qfloat8" => "qfloat8_e4m3fn".to_owned(),
        name if name.starts_with('q') => name.to_owned(),
        name => format!("q{name}"),
    };
    let wrong = |field: &str, found: &str, expected: &str| FormatError::Config {
        field: field.to_owned(),
        found: found.to_owned(),
        expected: expected.to_owned(),
    };
    let weights = TYPES.iter().position(|t| t.0 == full).ok_or_else(|| {
        wrong(
            "weights",
            weights,
            "qint2, qint4, qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2 are possible",
        )
    })?;
    let activations = match text("activations") {
        None => None,
        Some("qint8" | "int8") => Some(ActGrid::Int8),
        Some("qfloat8" | "float8" | "qfloat8_e4m3fn") => Some(ActGrid::E4M3),
        Some(other) => {
            return Err(wrong("activations", other, "none, qint8 and qfloat8_e4m3fn are possible"));
        }
    };
    Ok(Some(Kinds { weights, activations }))
}

/// Inputs of a module by the model's configuration: the names of linear layers tell which of its sizes they take.
fn inputs(config: &Value, module: &str) -> Option<usize> {
    let config = config.get("text_config").filter(|c| c.is_object()).unwrap_or(config);
    let number = |names: &[&str]| names.iter().find_map(|n| config.get(n)?.as_u64()).map(|n| n as usize);
    let hidden = number(&["hidden_size", "n_embd", "d_model"])?;
    let mut path = module.rsplit('.');
    let (last, parent, above) = (path.next()?, path.next().unwrap_or(""), path.next().unwrap_or(""));
    let inner = matches!(last, "down_proj" | "w2" | "fc2" | "fc_out")
        || (last == "c_proj" && parent == "mlp")
        || (last == "dense" && parent == "output" && above != "attention");
    if inner {
        return number(&["intermediate_size", "n_inner", "ffn_dim"]).or_else(|| hidden.checked_mul(4));
    }
    if last == "o_proj" {
        let heads = number(&["num_attention_heads", "n_head"]);
        return heads.zip(number(&["head_dim"])).map_or(Some(hidden), |(n, dim)| n.checked_mul(dim));
    }
    Some(hidden)
}

impl Reader for QuantoReader {
    fn layout(&self) -> &'static dyn Layout {
        &QUANTO
    }

    fn spec(&self) -> Option<QuantSpec> {
        let first = self.all.or(self.modules.values().next().copied())?;
        let (_, bits, grid, _) = TYPES[first.weights];
        let group = if bits == 8 { GroupSize::Row } else { GroupSize::Columns(128) };
        let scales = ParamsKind::F32;
        Some(QuantSpec { bits, grid, group, scales, symmetric: bits == 8, act_order: false })
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(source, &Parts { source, module, layout: "quanto" }, module).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "quanto" };
        let Geometry { rows, cols, bits, grid, .. } = self.geometry(source, &parts, module)?;
        let mut codes = Codes::zeros(bits, rows, cols).map_err(|e| parts.invalid(e))?;
        let scales = parts.params(SCALE)?;
        let (grid, groups, offset) = if bits < 8 {
            packing(bits).unpack(parts.read(PACKED)?.bytes(), &mut codes).map_err(|e| parts.invalid(e))?;
            let offset = match parts.params(SHIFT)? {
                zeros @ Params::U8(_) => Offset::Zero(zeros),
                param => Offset::Shift { param, sign: -1.0 },
            };
            (Grid::UNSIGNED, groups(cols), offset)
        } else {
            let data = parts.read(PLAIN)?;
            let grid =
                if grid == GridKind::Int { Grid::signed(8) } else { parts.float_grid(PLAIN, &data, grid)? };
            match grid {
                Grid::Int { .. } => module::unpack_signed(data.bytes(), &mut codes),
                Grid::Table(_) => module::copy_bytes(data.bytes(), &mut codes),
            }
            (grid, Groups::whole_row(cols), Offset::None)
        };
        let weight = QuantizedMatrix { grid, ..QuantizedMatrix::affine(codes, groups, scales, offset, 0) };
        let input = match self.kinds(module).and_then(|kinds| kinds.activations) {
            None => ActSpec::Float,
            Some(grid) => {
                let scale = match parts.optional("input_scale", FLOATS)? {
                    Some(found) if found.len() == 1 => parts.params("input_scale")?.get(0),
                    _ => 1.0,
                };
                if !scale.is_finite() || scale <= 0.0 {
                    return Err(parts.value_error("input_scale", 0, scale, "it must be positive".into()));
                }
                ActSpec::Static { grid, scale, zero: 0 }
            }
        };
        Ok(QuantizedLinear { input, ..parts.linear(weight)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn groups_follow_the_rule_of_the_library() {
        assert_eq!(
            [64, 128, 256, 384, 192, 160, 320, 144, 130].map(group_len),
            [None, None, Some(128), Some(128), Some(96), Some(32), Some(64), None, None,]
        );
    }

    #[test]
    fn names_tell_the_inputs() {
        let llama =
            json!({ "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 32 });
        let of = |config: &Value, module: &str| inputs(config, module).unwrap();
        assert_eq!(of(&llama, "model.layers.0.mlp.down_proj"), 160);
        assert_eq!(of(&llama, "model.layers.0.self_attn.o_proj"), 128);
        assert_eq!(of(&llama, "model.layers.0.self_attn.q_proj"), 64);
        assert_eq!(of(&json!({ "text_config": llama }), "lm_head"), 64);
        let bert = json!({ "hidden_size": 64, "intermediate_size": 160 });
        assert_eq!(of(&bert, "encoder.layer.0.output.dense"), 160);
        assert_eq!(of(&bert, "encoder.layer.0.attention.output.dense"), 64);
        assert_eq!(of(&json!({ "n_embd": 64 }), "h.0.mlp.c_proj"), 256);
        assert_eq!(of(&json!({ "n_embd": 64 }), "h.0.attn.c_proj"), 64);
        assert_eq!(inputs(&Value::Null, "lm_head"), None);
    }

    #[test]
    fn types_by_either_spelling() {
        for (name, bits) in [("int2", 2), ("qint4", 4), ("float8", 8), ("qfloat8_e5m2", 8)] {
            let kinds = kinds(&json!({ "weights": name, "activations": "none" })).unwrap().unwrap();
            assert_eq!(TYPES[kinds.weights].1, bits);
        }
        assert!(kinds(&json!({ "weights": "int3" })).is_err());
        assert!(kinds(&json!({ "weights": "int8", "activations": "int4" })).is_err());
        assert!(kinds(&json!({})).unwrap().is_none());
    }
}
