//! SINQ: codes in groups with a second scale per input.
//!
//! For `N` outputs and `K` inputs in groups of `g` inputs the matrix is viewed as `[R, g]`, `R = N * K / g`:
//!
//! | tensor | type | shape | content |
//! |---|---|---|---|
//! | `W_q` | U8, I32 for 3, 5, 6 bits | `[ceil(R / per), g]` | codes, packed by sections of rows, the first in the highest bits |
//! | `meta.scale`, `meta.zero` | F16 | `[R, 1]`; `zero` also `[]` | |
//! | `meta.scale.x`, `.s`, `.m` | U8, F16, F16 | `[32, R / 32]`, `[1, R / 32]` twice | 8-bit scales (`quantAux`): `x * s + m` by column |
//! | `meta.zero.x`, `.s`, `.m` | U8, F16, F16 | `[R, 1]`, `[1, 1]` twice | the same of zero points |
//! | `meta.scale2` | F16 | `[1, K]` | a factor per input |
//!
//! `W = ((value(code) - zero) * scale) * scale2`, each step rounded to the type of the computation; a value is the code,
//! or an entry of the NF4 or NF3 table. With 2D tiling there are `T = N / g * K / g` square tiles: scales and zero points
//! are `[T, g, 1]`, one per row of a tile, and `scale2` is `[T, 1, g]`.
//!
//! Bits, sizes, packing and method of each module are in `model.safetensors.index.json.meta.json`.

mod meta;
mod read;

use half::f16;
use ndarray::Array2;
use quant_core::{
    ColScale, DType, DenseTensor, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use serde_json::{Map, Value, json};

use self::meta::{Method, SIDE_FILE};
use self::read::SinqReader;
use super::module::{self, Tensors};
use super::parts;
use super::sections::Packing;
use super::{Layout, PlannedLayer, Reader, StoredModel};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// The layout.
pub(super) const SINQ: Sinq = Sinq;

/// The layout.
#[derive(Debug)]
pub(super) struct Sinq;

/// Rows of 8-bit scales: as many share a step and an offset.
const AUX_ROWS: usize = 32;

/// The type of the computation where values are those of the exact table: others round it.
const EXACT: &str = "torch.float32";

/// Name of the packing of that many bits.
fn packing_name(bits: u8) -> Option<&'static str> {
    Some(match bits {
        8 => "8bit_u8",
        6 => "6bit_32",
        5 => "5bit_32",
        4 => "4bit_u8",
        3 => "3bit_32",
        2 => "2bit_u8",
        1 => "1bit_u8",
        _ => return None,
    })
}

impl Sinq {
    fn unsupported(&self, field: &'static str, found: impl ToString, remedy: impl ToString) -> Unsupported {
        parts::unsupported(self.id(), field, found, remedy)
    }

    /// Packing and group length of a matrix made to `spec`.
    fn plan(&self, spec: &QuantSpec, cols: usize) -> Result<(Packing, usize), Unsupported> {
        let packing = packing_name(spec.bits).and_then(Packing::named);
        let packing =
            packing.ok_or_else(|| self.unsupported("bits", spec.bits, "choose 1, 2, 3, 4, 5, 6 or 8"))?;
        match spec.group {
            GroupSize::Columns(len) if cols > 0 && cols.is_multiple_of(len.min(cols)) => {
                Ok((packing, len.min(cols)))
            }
            GroupSize::Row if cols > 0 => Ok((packing, cols)),
            // Square tiles.
            GroupSize::Tile { rows, cols: len } if rows == len && cols > 0 && cols.is_multiple_of(len) => {
                Ok((packing, len))
            }
            other => {
                let remedy = format!("groups must divide the {cols} inputs");
                Err(self.unsupported("group size", other, remedy))
            }
        }
    }

    /// Adds scales or zero points `[count]` in the order of the file.
    fn add_params(
        &self,
        tensors: &mut Tensors<'_>,
        part: &str,
        params: &Params,
        tile: Option<Tiles>,
    ) -> Result<(), FormatError> {
        match (params, tile) {
            (Params::Affine8 { x, scale, min }, None) => {
                let halves = |v: &[f16]| -> Vec<u8> { v.iter().flat_map(|v| v.to_le_bytes()).collect() };
                let columns = scale.len();
                tensors.add(
                    &format!("{part}.x"),
                    DType::U8,
                    &[x.len() / columns.max(1), columns],
                    x.clone(),
                )?;
                tensors.add(&format!("{part}.s"), DType::F16, &[1, columns], halves(scale))?;
                tensors.add(&format!("{part}.m"), DType::F16, &[1, columns], halves(min))
            }
            (_, None) => tensors.add_params(part, &[params.len(), 1], params, self.id()),
            (_, Some(tiles)) => {
                let by_tile = tiles.by_tile(&params.to_vec());
                let params = module::cast(&by_tile, module::float_type(params));
                tensors.add_params(part, &[tiles.count(), tiles.len, 1], &params, self.id())
            }
        }
    }
}

/// Square tiles of a matrix, row-major.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    /// Rows and columns of a tile.
    len: usize,
    /// Tiles in the matrix, down and across.
    down: usize,
    across: usize,
}

impl Tiles {
    fn count(&self) -> usize {
        self.down * self.across
    }

    /// Parameters per row and column group `[rows, across]`, reordered to `[tile, row of the tile]`.
    fn by_tile<T: Copy>(&self, by_row: &[T]) -> Vec<T> {
        let at = |i: usize| {
            let (tile, row) = (i / self.len, i % self.len);
            (tile / self.across * self.len + row) * self.across + tile % self.across
        };
        (0..by_row.len()).map(|i| by_row[at(i)]).collect()
    }

    /// The inverse of [`Tiles::by_tile`].
    fn by_row<T: Copy>(&self, by_tile: &[T]) -> Vec<T> {
        let at = |i: usize| {
            let (row, across) = (i / self.across, i % self.across);
            (row / self.len * self.across + across) * self.len + row % self.len
        };
        (0..by_tile.len()).map(|i| by_tile[at(i)]).collect()
    }
}

impl Layout for Sinq {
    fn id(&self) -> &'static str {
        "sinq"
    }

    fn description(&self) -> &'static str {
        "SINQ: 1 to 6 and 8 bits or NF4, scales per group and per input, 8-bit scales or plain"
    }

    fn methods(&self) -> &'static [&'static str] {
        &["sinq"]
    }

    fn marker(&self) -> &'static str {
        "meta.scale2"
    }

    fn module_of<'a>(&self, tensor: &'a str, _dtype: DType) -> Option<&'a str> {
        tensor.strip_suffix(".W_q").or_else(|| tensor.strip_suffix(".meta.scale2"))
    }

    fn known_by(&self) -> &'static [&'static str] {
        &[".meta.scale2"]
    }

    fn packed_parts(&self) -> &'static [&'static str] {
        &["W_q"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        let spec = layer.spec;
        let (_, len) = self.plan(spec, layer.cols)?;
        let count = layer.rows * layer.cols / len;
        match spec.grid {
            GridKind::Int => {}
            // Values are computed in the type of the scales: others round the table.
            GridKind::Nf4 if spec.bits == 4 && spec.scales == ParamsKind::F32 => {}
            GridKind::Nf4 if spec.bits == 4 => {
                return Err(self.unsupported(
                    "scales",
                    "of 16 bits beside nf4",
                    "it takes scales of F32 there",
                ));
            }
            other => return Err(self.unsupported("grid", other, "it has integers and nf4 of 4 bits")),
        }
        let squares = matches!(spec.group, GroupSize::Tile { .. });
        if squares && !layer.rows.is_multiple_of(len) {
            let remedy = format!("square tiles must divide it by {len}; choose 1D tiles");
            return Err(self.unsupported("number of outputs", layer.rows, remedy));
        }
        match spec.scales {
            ParamsKind::F16 | ParamsKind::BF16 | ParamsKind::F32 => {}
            ParamsKind::Affine8 if squares => {
                return Err(self.unsupported("8-bit scales", "of square tiles", "choose plain scales"));
            }
            ParamsKind::Affine8 if count.is_multiple_of(AUX_ROWS) => {}
            ParamsKind::Affine8 => {
                let remedy = "8-bit scales need a multiple of 32 groups; choose plain scales";
                return Err(self.unsupported("number of groups", count, remedy));
            }
            _ => {
                return Err(self.unsupported(
                    "scales",
                    "of this type",
                    "it has F16 or 8-bit ones (quantAux)",
                ));
            }
        }
        if spec.act_order {
            return Err(self.unsupported("act-order", "on", "groups are consecutive; choose another layout"));
        }
        parts::float_input(self.id(), layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let PlannedLayer { rows, cols, spec, .. } = *layer;
        let Ok((packing, len)) = self.plan(spec, cols) else { return Vec::new() };
        let count = rows * cols / len;
        let mut plan = vec![layer.part("W_q", packing.dtype(), &[packing.word_rows(count), len])];
        if spec.scales == ParamsKind::Affine8 {
            let scale = [count / (count / AUX_ROWS).max(1), count / AUX_ROWS];
            for (part, [aux_rows, columns]) in [("meta.scale", scale), ("meta.zero", [count, 1])] {
                plan.push(layer.part(&format!("{part}.x"), DType::U8, &[aux_rows, columns]));
                plan.push(layer.part(&format!("{part}.s"), DType::F16, &[1, columns]));
                plan.push(layer.part(&format!("{part}.m"), DType::F16, &[1, columns]));
            }
            plan.push(layer.part("meta.scale2", DType::F16, &[1, cols]));
        } else {
            let dtype = module::param_type(spec.scales);
            let (params, second) = match spec.group {
                GroupSize::Tile { .. } => (vec![count / len, len, 1], vec![count / len, 1, len]),
                _ => (vec![count, 1], vec![1, cols]),
            };
            plan.push(layer.part("meta.scale", dtype, &params));
            let one = spec.symmetric && spec.grid == GridKind::Int;
            plan.push(layer.part("meta.zero", dtype, if one { &[] } else { &params[..] }));
            plan.push(layer.part("meta.scale2", DType::F16, &second));
        }
        plan.extend(layer.bias_part());
        plan
    }

    fn write(
        &self,
        linear: &QuantizedLinear,
        module: &str,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError> {
        let matrix = &linear.weight;
        let plain = QuantizedMatrix { col_scale: None, ..matrix.clone() };
        matrix.validate().map_err(|source| FormatError::Matrix { module: module.to_owned(), source })?;
        module::check_plain(self.id(), &QuantizedLinear { weight: plain, ..linear.clone() }, module)?;
        let (rows, cols, spec) = (matrix.rows(), matrix.cols(), matrix.spec());
        let (packing, len) = self.plan(&spec, cols)?;
        let Groups::Row { .. } = matrix.groups else {
            return Err(self.unsupported("groups", "of this form", "it has groups of one row").into());
        };
        let method = Method::of(&matrix.grid).ok_or_else(|| {
            self.unsupported("grid", spec.grid, "it has integers, nf4 of 4 bits and nf3 of 3")
        })?;
        let ones = ColScale { values: vec![1.0; cols], rows_per_block: rows };
        let scale2 = matrix.col_scale.as_ref().unwrap_or(&ones);
        let tiles =
            (scale2.rows_per_block < rows).then_some(Tiles { len, down: rows / len, across: cols / len });
        if tiles.is_some() && (scale2.rows_per_block != len || !rows.is_multiple_of(len)) {
            let remedy = "tiles are squares of the group size";
            return Err(self.unsupported("column scales", "of another block size", remedy).into());
        }

        let mut tensors = Tensors::new(module);
        let count = rows * cols / len;
        let words = packing.word_rows(count);
        tensors.add("W_q", packing.dtype(), &[words, len], packing.pack(&matrix.codes, words * len))?;
        self.add_params(&mut tensors, "meta.scale", &matrix.scales, tiles)?;
        let dtype = module::float_type(&matrix.scales).or(Some(DType::F16));
        match (&matrix.offset, &matrix.grid) {
            // One zero point for all.
            (Offset::None, Grid::Int { midpoint }) => {
                let zero = module::cast(&[*midpoint as f32], dtype);
                tensors.add_params("meta.zero", &[], &zero, self.id())?;
            }
            (Offset::Zero(_), Grid::Int { .. }) if spec.symmetric => {
                let zero = module::cast(&[f32::from(1u8 << (spec.bits - 1))], dtype);
                tensors.add_params("meta.zero", &[], &zero, self.id())?;
            }
            (Offset::None, Grid::Table(_)) => {
                self.add_params(&mut tensors, "meta.zero", &module::cast(&vec![0.0; count], dtype), tiles)?;
            }
            (Offset::Zero(zeros @ Params::Affine8 { .. }), _)
                if matrix.grid == Grid::UNSIGNED || method != Method::Int =>
            {
                self.add_params(&mut tensors, "meta.zero", zeros, tiles)?;
            }
            (Offset::Zero(zeros), Grid::Table(_)) => {
                self.add_params(&mut tensors, "meta.zero", zeros, tiles)?
            }
            _ => {
                let zeros = module::zeros_like_scales(matrix).ok_or_else(|| {
                    self.unsupported(
                        "offsets",
                        "of this form",
                        "it has zero points in the type of its scales",
                    )
                })?;
                self.add_params(&mut tensors, "meta.zero", &zeros, tiles)?;
            }
        }
        let shape: &[usize] = match &tiles {
            None => &[1, cols],
            Some(tiles) => &[tiles.count(), 1, len],
        };
        let second = module::cast(&scale2.values, Some(DType::F16));
        if second.to_vec() != scale2.values {
            let remedy = "factors per input are stored as F16; round them first";
            return Err(self.unsupported("column scales", "of more than 16 bits", remedy).into());
        }
        tensors.add_params("meta.scale2", shape, &second, self.id())?;
        Ok(tensors.finish(linear.bias.as_ref()))
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let method = match (model.spec.grid, model.spec.scales) {
            (GridKind::Nf4, _) => "sinq_nf4",
            _ => "sinq",
        };
        let mut config = json!({
            "quant_method": "sinq",
            "nbits": model.spec.bits,
            "group_size": model.spec.group.as_config(),
            "tiling_mode": if matches!(model.spec.group, GroupSize::Tile { .. }) { "2D" } else { "1D" },
            "method": method,
            "modules_to_not_convert": module::skipped(model),
        });
        if model.spec.grid == GridKind::Nf4 {
            config["compute_dtype"] = EXACT.into();
        }
        config
    }

    fn always_indexed(&self) -> bool {
        true
    }

    fn side_files(&self, _config: &Value, layers: &[PlannedLayer<'_>]) -> Vec<(String, Vec<u8>)> {
        let entry = |layer: &PlannedLayer<'_>| {
            let (packing, len) = self.plan(layer.spec, layer.cols).ok()?;
            let count = layer.rows * layer.cols / len;
            let dtype = module::torch_name(layer.dtype.unwrap_or(module::param_type(layer.spec.scales)));
            let dtype = format!("torch.{}", dtype.unwrap_or("float16"));
            let mut meta = json!({
                "nbits": layer.spec.bits,
                "group_size": len,
                "shape": [layer.rows, layer.cols],
                "awq_scale": null,
                "axis": 1,
                "packing": packing.name(),
                "method": meta::method_name(layer.spec),
                "compute_dtype": if layer.spec.grid == GridKind::Nf4 { EXACT } else { &dtype },
                "unpack_view_dtype": if packing.word == 1 { "torch.uint8" } else { "torch.int32" },
                "view_as_float": false,
            });
            if layer.spec.scales == ParamsKind::Affine8 {
                meta["scale.shape"] = json!([count, 1]);
                meta["zero.shape"] = json!([count, 1]);
            }
            Some((layer.module.to_owned(), json!({ "meta": meta })))
        };
        let map: Map<String, Value> = layers.iter().filter_map(entry).collect();
        vec![(SIDE_FILE.into(), Value::from(map).to_string().into_bytes())]
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(SinqReader::new(config)?))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        let dtype = matrix.dtype.or(module::float_type(&matrix.scales)).or(Some(DType::F16));
        matrix.dequantize_rounded(module::rounding(dtype))
    }
}
