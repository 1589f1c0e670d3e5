//! optimum-quanto: qint2, qint4, qint8 and three kinds of qfloat8.
//!
//! For `N` outputs and `K` inputs; narrow codes are viewed as `[R, C]`, `C` being the group size, or `K` where rows are
//! not cut in groups:
//!
//! | tensor | type | shape | content |
//! |---|---|---|---|
//! | `weight._data` | I8, F8_E4M3, F8_E4M3FNUZ, F8_E5M2 | `[N, K]` | codes of 8 bits |
//! | `weight._data._data` | U8 | `[ceil(R * bits / 8), C]` | codes of 2 and 4 bits, packed by sections, the first in the lowest bits |
//! | `weight._scale` | F16, BF16, F32 | `[N, 1]`, `[R, 1]` | |
//! | `weight._shift` | as the scales, or U8 | `[R, 1]` | 2 and 4 bits only |
//! | `input_scale`, `output_scale` | as the scales | `[]` | of the activations, 1 where they are floats |
//!
//! `W = scale * code`, 2 and 4 bits `scale * code - shift`, or `scale * (code - shift)` where shifts are integers.
//! Neither the sizes nor the groups of narrow codes are stored: they follow from `config.json`.

mod read;

use ndarray::Array2;
use quant_core::{
    DType, DenseTensor, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use serde_json::{Map, Value, json};

use self::read::QuantoReader;
use super::module::{self, Tensors};
use super::parts;
use super::sections::Packing;
use super::{Layout, PlannedLayer, Reader, StoredModel};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// The layout.
pub(super) const QUANTO: Quanto = Quanto;

/// The layout.
#[derive(Debug)]
pub(super) struct Quanto;

/// Types of weights: name, bits, grid, and the type of their tensor.
const TYPES: [(&str, u8, GridKind, DType); 6] = [
    ("qint2", 2, GridKind::Int, DType::U8),
    ("qint4", 4, GridKind::Int, DType::U8),
    ("qint8", 8, GridKind::Int, DType::I8),
    ("qfloat8_e4m3fn", 8, GridKind::E4M3, DType::F8E4M3),
    ("qfloat8_e4m3fnuz", 8, GridKind::E4M3Fnuz, DType::F8E4M3Fnuz),
    ("qfloat8_e5m2", 8, GridKind::E5M2, DType::F8E5M2),
];

/// Name and tensor type of weights of these bits and values.
fn type_of(bits: u8, grid: GridKind) -> Option<(&'static str, DType)> {
    TYPES.iter().find(|t| (t.1, t.2) == (bits, grid)).map(|t| (t.0, t.3))
}

/// How codes of 2 and 4 bits are packed.
fn packing(bits: u8) -> Packing {
    Packing { bits, per: usize::from(8 / bits), word: 1, high_first: false }
}

/// Inputs per group of narrow codes, by the library's rule; `None` for whole rows.
fn group_len(cols: usize) -> Option<usize> {
    let mut len = 128;
    while !cols.is_multiple_of(len) && len > 32 {
        len -= 32;
    }
    (cols > 128 && cols.is_multiple_of(len)).then_some(len)
}

impl Quanto {
    fn unsupported(&self, field: &'static str, found: impl ToString, remedy: impl ToString) -> Unsupported {
        parts::unsupported(self.id(), field, found, remedy)
    }

    fn type_of(&self, spec: &QuantSpec) -> Result<(&'static str, DType), Unsupported> {
        type_of(spec.bits, spec.grid).ok_or_else(|| {
            let remedy = "it has integers of 2, 4, 8 bits and floats of 8";
            self.unsupported("values", format!("{} of {} bits", spec.grid, spec.bits), remedy)
        })
    }

    fn check_groups(&self, spec: &QuantSpec, cols: usize) -> Result<(), Unsupported> {
        let needed = if spec.bits == 8 { None } else { group_len(cols) };
        let fits = match (spec.group, needed) {
            (GroupSize::Row, None) => true,
            (GroupSize::Row, Some(len)) => cols == len,
            (GroupSize::Columns(len), None) => len >= cols,
            (GroupSize::Columns(len), Some(needed)) => len == needed,
            _ => false,
        };
        let needed = needed.map_or("-1 (whole rows)".to_owned(), |len| len.to_string());
        let remedy = || format!("its rule gives {needed} for {cols} inputs");
        if fits { Ok(()) } else { Err(self.unsupported("group size", spec.group, remedy())) }
    }

    /// Zero points as they are stored: float shifts, or integers as bytes where the grid is symmetric or floats would
    /// change a weight.
    fn shifts(&self, matrix: &QuantizedMatrix) -> Result<Params, Unsupported> {
        let remedy = "it has float shifts that are subtracted, or integer zero points";
        let refuse = || self.unsupported("offsets", "of this form", remedy);
        let Grid::Int { midpoint } = matrix.grid else { return Err(refuse()) };
        let zeros = match &matrix.offset {
            Offset::Shift { param, sign } if *sign == -1.0 && midpoint == 0 => return Ok(param.clone()),
            Offset::Zero(zeros) => zeros.to_vec(),
            Offset::None => vec![0.0; matrix.scales.len()],
            Offset::Shift { .. } => return Err(refuse()),
        };
        let zeros: Vec<f32> = zeros.into_iter().map(|zero| zero + midpoint as f32).collect();
        let integers = zeros.iter().all(|z| z.fract() == 0.0 && (0.0..=255.0).contains(z));
        if !matrix.spec().symmetric
            && let Some(shifts) = exact_shifts(matrix, &zeros)
        {
            return Ok(shifts);
        }
        if !integers {
            return Err(refuse());
        }
        Ok(Params::U8(zeros.into_iter().map(|zero| zero as u8).collect()))
    }
}

/// Shifts that give the same weights as these zero points, in f32 and in the type of the scales. `None` if a product is
/// rounded.
fn exact_shifts(matrix: &QuantizedMatrix, zeros: &[f32]) -> Option<Params> {
    let dtype = module::float_type(&matrix.scales)?;
    let (plain, round): (fn(f32) -> f32, _) = (|v| v, module::rounding(Some(dtype)));
    let shifts: Vec<f32> =
        zeros.iter().enumerate().map(|(g, zero)| round(matrix.scales.get(g) * zero)).collect();
    let same = |(g, &zero): (usize, &f32)| {
        let scale = matrix.scales.get(g);
        (0..=matrix.codes.max()).map(f32::from).all(|code| {
            [plain, round]
                .into_iter()
                .all(|round| round(round(code * scale) - shifts[g]) == round(round(code - zero) * scale))
        })
    };
    zeros.iter().enumerate().all(same).then(|| module::cast(&shifts, Some(dtype)))
}

impl Layout for Quanto {
    fn id(&self) -> &'static str {
        "quanto"
    }

    fn description(&self) -> &'static str {
        "optimum-quanto: 2 and 4 bits in groups with float shifts, 8-bit integers and floats per row"
    }

    fn methods(&self) -> &'static [&'static str] {
        &["quanto"]
    }

    fn marker(&self) -> &'static str {
        "weight._data"
    }

    fn module_of<'a>(&self, tensor: &'a str, _dtype: DType) -> Option<&'a str> {
        const PARTS: [&str; 4] = [".weight._data", ".weight._data._data", ".weight._scale", ".weight._shift"];
        PARTS.iter().find_map(|part| tensor.strip_suffix(part))
    }

    fn known_by(&self) -> &'static [&'static str] {
        &[".weight._data", ".weight._data._data"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        let spec = layer.spec;
        self.type_of(spec)?;
        self.check_groups(spec, layer.cols)?;
        if spec.act_order {
            return Err(self.unsupported("act-order", "on", "groups are consecutive; choose another layout"));
        }
        if !matches!(spec.scales, ParamsKind::F16 | ParamsKind::BF16 | ParamsKind::F32) {
            return Err(self.unsupported("scales", "of this type", "it has scales of F16, BF16 or F32"));
        }
        if spec.bits == 8 && !spec.symmetric {
            return Err(self.unsupported("zero points", "with 8 bits", "choose a symmetric grid"));
        }
        parts::float_input(self.id(), layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let PlannedLayer { rows, cols, spec, .. } = *layer;
        let dtype = module::param_type(spec.scales);
        let mut plan = match type_of(spec.bits, spec.grid) {
            Some((_, DType::U8)) => {
                let view_cols = group_len(cols).unwrap_or(cols);
                let view_rows = rows * cols / view_cols.max(1);
                let shift = if spec.symmetric { DType::U8 } else { dtype };
                vec![
                    layer.part(
                        "weight._data._data",
                        DType::U8,
                        &[packing(spec.bits).word_rows(view_rows), view_cols],
                    ),
                    layer.part("weight._scale", dtype, &[view_rows, 1]),
                    layer.part("weight._shift", shift, &[view_rows, 1]),
                ]
            }
            Some((_, data)) => vec![
                layer.part("weight._data", data, &[rows, cols]),
                layer.part("weight._scale", dtype, &[rows, 1]),
            ],
            None => Vec::new(),
        };
        plan.extend(["input_scale", "output_scale"].map(|part| layer.part(part, dtype, &[])));
        plan.extend(layer.bias_part());
        plan
    }

    fn write(
        &self,
        linear: &QuantizedLinear,
        module: &str,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError> {
        let matrix = &linear.weight;
        module::check_plain(self.id(), linear, module)?;
        let (rows, cols, spec) = (matrix.rows(), matrix.cols(), matrix.spec());
        self.can_store(&PlannedLayer {
            input: &linear.input,
            ..PlannedLayer::new(module, &spec, rows, cols)
        })?;
        let (_, dtype) = self.type_of(&spec)?;
        let mut tensors = Tensors::new(module);
        if dtype == DType::U8 {
            let view_cols = group_len(cols).unwrap_or(cols);
            let view_rows = rows * cols / view_cols;
            let packing = packing(spec.bits);
            let shape = [packing.word_rows(view_rows), view_cols];
            let data = packing.pack(&matrix.codes, shape[0] * shape[1]);
            tensors.add("weight._data._data", dtype, &shape, data)?;
            tensors.add_params("weight._scale", &[view_rows, 1], &matrix.scales, self.id())?;
            tensors.add_params("weight._shift", &[view_rows, 1], &self.shifts(matrix)?, self.id())?;
        } else {
            let data = match dtype {
                DType::I8 => module::pack_signed(&matrix.codes),
                _ => matrix.codes.bytes().to_vec(),
            };
            tensors.add("weight._data", dtype, &[rows, cols], data)?;
            tensors.add_params("weight._scale", &[rows, 1], &matrix.scales, self.id())?;
        }
        // Activations are floats.
        let one = module::cast(&[1.0], module::float_type(&matrix.scales));
        tensors.add_params("input_scale", &[], &one, self.id())?;
        tensors.add_params("output_scale", &[], &one, self.id())?;
        Ok(tensors.finish(linear.bias.as_ref()))
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let weights = match model.spec.grid {
            GridKind::Int => format!("int{}", model.spec.bits),
            _ => "float8".to_owned(),
        };
        json!({
            "quant_method": "quanto",
            "weights": weights,
            "activations": null,
            "modules_to_not_convert": module::skipped(model),
        })
    }

    fn side_files(&self, _config: &Value, layers: &[PlannedLayer<'_>]) -> Vec<(String, Vec<u8>)> {
        let entry = |layer: &PlannedLayer<'_>| {
            let (name, _) = type_of(layer.spec.bits, layer.spec.grid)?;
            Some((layer.module.to_owned(), json!({ "weights": name, "activations": "none" })))
        };
        let map: Map<String, Value> = layers.iter().filter_map(entry).collect();
        vec![("quanto_qmap.json".into(), format!("{:#}", Value::from(map)).into_bytes())]
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(QuantoReader::new(config)?))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        matrix.dequantize_rounded(module::rounding(module::float_type(&matrix.scales)))
    }
}

/// The groups of narrow codes of that many inputs.
fn groups(cols: usize) -> Groups {
    Groups::Row { len: group_len(cols).unwrap_or(cols.max(1)) }
}
