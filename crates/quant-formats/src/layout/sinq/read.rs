//! Reading SINQ layers.

use std::collections::BTreeMap;

use quant_core::{
    Codes, ColScale, DType, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use serde_json::Value;

use super::meta::{Meta, Method};
use super::{SINQ, Tiles, packing_name};
use crate::error::FormatError;
use crate::layout::module::{self, FLOATS, Types};
use crate::layout::parts::Parts;
use crate::layout::sections::Packing;
use crate::layout::{Layout, Reader, TensorSource};

const F16: Types = Types(&[DType::F16], "F16");
const U8: Types = Types(&[DType::U8], "U8");

/// Reads one checkpoint.
#[derive(Debug)]
pub(super) struct SinqReader {
    modules: BTreeMap<String, Meta>,
    /// Settings of modules without an entry, from `quantization_config`.
    all: Meta,
}

/// What the tensors of a layer and its entry say.
struct Geometry {
    rows: usize,
    cols: usize,
    bits: u8,
    packing: Packing,
    /// Columns per group.
    len: usize,
    /// 2D tiling.
    tiles: Option<Tiles>,
    method: Method,
    dtype: Option<DType>,
}

impl SinqReader {
    pub(super) fn new(config: &Value) -> Result<Self, FormatError> {
        let modules = Meta::all(config.get("modules").unwrap_or(&Value::Null))?;
        Ok(Self { modules, all: Meta::parse(config)? })
    }

    fn geometry(&self, parts: &Parts<'_>, module: &str) -> Result<Geometry, FormatError> {
        let meta = self.modules.get(module).unwrap_or(&self.all);
        let scale2 = parts.require("meta.scale2", FLOATS)?;
        let words = parts.require("W_q", Types(&[DType::U8, DType::I32], "U8 or I32"))?;
        let positive = |part: &str, found: module::Part<'_>| match found.len() {
            0 => Err(parts.misfit(part, found, "elements".into(), "the layout".into())),
            n => Ok(n),
        };
        // Scales per group, plain or as 8-bit codes.
        let (part, scales) = match parts.look("meta.scale.x") {
            Some(_) => ("meta.scale.x", parts.require("meta.scale.x", U8)?),
            None => ("meta.scale", parts.require("meta.scale", FLOATS)?),
        };
        let count = positive(part, scales)?;
        let tile_len = match *scale2.shape {
            [_, 1, len] => Some(len),
            _ => None,
        };
        let (rows, cols) = match (meta.shape, tile_len) {
            (Some(shape), _) => shape,
            (None, Some(_)) => {
                let (found, expected) =
                    ("absent".to_owned(), "tiles need it in the file beside the index".to_owned());
                return Err(FormatError::Config { field: "shape".to_owned(), found, expected });
            }
            // 1D tiling: a factor per input, and rows of groups as long as those of the codes.
            (None, None) => {
                let cols = positive("meta.scale2", scale2)?;
                let len = words.shape.last().copied().unwrap_or(0);
                let rows = count.checked_mul(len).map_or(0, |n| n / cols);
                (rows, cols)
            }
        };
        let because = || format!("shape [{rows}, {cols}] and {count} scales");
        let elements = rows.checked_mul(cols).filter(|&n| n > 0 && n.is_multiple_of(count));
        let len = elements.map(|n| n / count).filter(|&len| cols.is_multiple_of(len));
        let (Some(elements), Some(len)) = (elements, len) else {
            return Err(parts.misfit(part, scales, "groups that divide the inputs".into(), because()));
        };
        let tiles = match tile_len {
            None => {
                parts.has_shape("meta.scale2", scale2, &[1, cols], &because)?;
                None
            }
            Some(_) => {
                let tiles = Tiles { len, down: rows / len, across: cols / len };
                if !rows.is_multiple_of(len) {
                    let expected = format!("tiles of {len} rows that divide {rows}");
                    return Err(parts.misfit("meta.scale2", scale2, expected, because()));
                }
                parts.has_shape("meta.scale2", scale2, &[tiles.count(), 1, len], &because)?;
                Some(tiles)
            }
        };
        self.check_aux(parts, "meta.scale", count, tiles, false)?;
        self.check_aux(parts, "meta.zero", count, tiles, true)?;

        // Codes that are not packed lie in bytes, whatever the packing says.
        let plain = words.dtype == DType::U8 && words.len() == elements;
        let guess = || {
            let fits = |bits: &u8| {
                let packing = packing_name(*bits).and_then(Packing::named);
                packing.is_some_and(|p| p.dtype() == words.dtype && p.word_rows(count) * len == words.len())
            };
            [4, 3, 2, 8, 5, 6, 1].into_iter().find(fits)
        };
        let wrong = || parts.misfit("W_q", words, format!("packed codes in rows of {len}"), because());
        let bits = match meta.method {
            Method::Nf3 => 3,
            _ => meta.bits.or_else(guess).ok_or_else(wrong)?,
        };
        let name = match (plain, meta.packing.as_deref()) {
            (true, _) => Some("8bit_u8"),
            (false, Some(name)) => Some(name),
            (false, None) => packing_name(bits),
        };
        let packing =
            name.and_then(Packing::named).filter(|p| p.bits >= bits).ok_or_else(|| FormatError::Config {
                field: "packing".into(),
                found: meta.packing.clone().unwrap_or_default(),
                expected: format!("{bits} bits are packed as {}", packing_name(bits).unwrap_or_default()),
            })?;
        if packing.dtype() != words.dtype {
            let expected = if packing.word == 1 { "U8" } else { "I32" };
            return Err(FormatError::TensorDType { tensor: parts.name("W_q"), expected, found: words.dtype });
        }
        if plain {
            // Any shape of as many elements.
        } else {
            parts.has_shape("W_q", words, &[packing.word_rows(count), len], &because)?;
        }
        parts.check_bias(rows)?;
        let dtype = meta.dtype.or(Some(DType::F16));
        Ok(Geometry { rows, cols, bits, packing, len, tiles, method: meta.method, dtype })
    }

    /// Checks scales or zero points: plain, or as 8-bit codes with a step and an offset per column, or one for all.
    fn check_aux(
        &self,
        parts: &Parts<'_>,
        part: &str,
        count: usize,
        tiles: Option<Tiles>,
        scalar: bool,
    ) -> Result<(), FormatError> {
        let name = |end: &str| format!("{part}.{end}");
        if parts.look(&name("x")).is_none() {
            let found = parts.require(part, FLOATS)?;
            if scalar && found.shape.is_empty() {
                return Ok(());
            }
            let expected = tiles.map_or(vec![count, 1], |t| vec![t.count(), t.len, 1]);
            return parts.has_shape(part, found, &expected, &|| format!("{count} groups"));
        }
        let codes = parts.require(&name("x"), U8)?;
        let columns = match *codes.shape {
            [rows, columns] if rows.checked_mul(columns) == Some(count) && count > 0 => columns,
            _ => {
                let because = format!("{count} groups");
                return Err(parts.misfit(&name("x"), codes, format!("{count} codes in rows"), because));
            }
        };
        for end in ["s", "m"] {
            let found = parts.require(&name(end), F16)?;
            parts.has_shape(&name(end), found, &[1, columns], &|| {
                format!("{} {:?}", name("x"), codes.shape)
            })?;
        }
        Ok(())
    }

    /// Reads scales or zero points, one per row and group.
    fn aux(&self, parts: &Parts<'_>, part: &str, tiles: Option<Tiles>) -> Result<Params, FormatError> {
        let params = match parts.look(&format!("{part}.x")) {
            None => parts.params(part)?,
            Some(_) => {
                let halves = |end: &str| match parts.params(&format!("{part}.{end}")) {
                    Ok(Params::F16(values)) => Ok(values),
                    Ok(_) => Ok(Vec::new()),
                    Err(e) => Err(e),
                };
                let x = parts.read(&format!("{part}.x"))?.bytes().to_vec();
                Params::Affine8 { x, scale: halves("s")?, min: halves("m")? }
            }
        };
        let Some(tiles) = tiles.filter(|_| params.len() > 1) else { return Ok(params) };
        // Eight-bit codes in another order have other columns: their values stay.
        let dtype = module::float_type(&params).or(Some(DType::F16));
        Ok(module::cast(&tiles.by_row(&params.to_vec()), dtype))
    }
}

impl Reader for SinqReader {
    fn layout(&self) -> &'static dyn Layout {
        &SINQ
    }

    fn spec(&self) -> Option<QuantSpec> {
        let meta = self.modules.values().next().unwrap_or(&self.all);
        let grid = if meta.method == Method::Nf4 { GridKind::Nf4 } else { GridKind::Int };
        let group = GroupSize::Columns(meta.group?);
        Some(QuantSpec {
            bits: meta.bits?,
            grid,
            group,
            scales: ParamsKind::F16,
            symmetric: false,
            act_order: false,
        })
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(&Parts { source, module, layout: "sinq" }, module).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "sinq" };
        let Geometry { rows, cols, bits, packing, len, tiles, method, dtype } =
            self.geometry(&parts, module)?;
        let mut codes = Codes::zeros(bits, rows, cols).map_err(|e| parts.invalid(e))?;
        packing.unpack(parts.read("W_q")?.bytes(), &mut codes).map_err(|e| parts.invalid(e))?;
        let scales = self.aux(&parts, "meta.scale", tiles)?;
        let zeros = self.aux(&parts, "meta.zero", tiles)?;
        // Values of tables are computed in the type of the scales, whatever the configuration names.
        let dtype = match method {
            Method::Int => dtype,
            Method::Nf4 | Method::Nf3 => module::float_type(&scales).or(Some(DType::F16)),
        };
        let mut grid = method.grid(dtype).unwrap_or(Grid::UNSIGNED);
        let offset = match (zeros.len() == 1 && scales.len() != 1, &grid) {
            (false, _) => Offset::Zero(zeros),
            // One zero point for all: the middle of the codes.
            (true, Grid::Int { .. }) => {
                let zero = zeros.get(0);
                if zero.fract() != 0.0 || !(0.0..=f32::from(codes.max())).contains(&zero) {
                    let expected = format!("one zero point for all is an integer from 0 to {}", codes.max());
                    return Err(parts.value_error("meta.zero", 0, zero, expected));
                }
                grid = Grid::Int { midpoint: zero as i32 };
                Offset::None
            }
            (true, Grid::Table(_)) => {
                let dtype = module::float_type(&zeros);
                Offset::Zero(module::cast(&vec![zeros.get(0); scales.len()], dtype))
            }
        };
        let scale2 = parts.params("meta.scale2")?;
        if let Some(i) = scale2.first_non_finite() {
            let expected = "weights and scales must be finite".to_owned();
            return Err(parts.value_error("meta.scale2", i, scale2.get(i), expected));
        }
        let rows_per_block = tiles.map_or(rows, |t| t.len);
        let mut weight = QuantizedMatrix::affine(codes, Groups::Row { len }, scales, offset, 0);
        weight.grid = grid;
        weight.col_scale = Some(ColScale { values: scale2.to_vec(), rows_per_block });
        weight.dtype = dtype;
        parts.linear(weight)
    }
}
