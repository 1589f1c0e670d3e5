//! torchao's tensor subclasses, flattened to safetensors.
//!
//! | `_type` | `M._weight_qdata` | `M._weight_scale` | `M._weight_zero_point` |
//! |---|---|---|---|
//! | `Int8Tensor` | I8 `[N, K]` | floats `[N, 1]` | I8 `[N, 1]` |
//! | `IntxUnpackedToInt8Tensor` | I8 `[N, K]`, codes of 1 to 8 bits | floats `[N, K / g]` | I8 `[N, K / g]` |
//! | `Float8Tensor` | F8_E4M3 `[N, K]` | F32 `[N, 1]` or `[1, 1]` | |
//!
//! `W = (q - zero) * scale`, rounded to the type of the scales. The header of the file notes the type of every tensor
//! under its unflattened name, `M.weight`; where a note is absent, codes have eight bits.

use ndarray::Array2;
use quant_core::{
    Codes, DType, DenseTensor, Grid, GridKind, GroupSize, Groups, Offset, Params, QuantSpec, QuantizedLinear,
    QuantizedMatrix,
};
use serde_json::{Map, Value, json};

use super::ct::words;
use super::parts::{self, FLOATS, Parts, Writing, float_type, params, unsupported};
use super::{Layout, PlannedLayer, Reader, StoredModel, TensorSource, scales};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

pub(super) const TORCHAO: TorchAo = TorchAo;

const QDATA: &str = "_weight_qdata";
const SCALE: &str = "_weight_scale";
const ZERO: &str = "_weight_zero_point";

/// The layout.
#[derive(Debug)]
pub(super) struct TorchAo;

fn refuse(field: &'static str, found: impl ToString, remedy: &str) -> Result<(), Unsupported> {
    Err(unsupported(TORCHAO.id(), field, found, remedy))
}

fn check(spec: &QuantSpec, rows: usize, cols: usize) -> Result<(), Unsupported> {
    if rows == 0 || cols == 0 {
        return refuse("size", 0, "leave this module in float (--exclude)");
    }
    match (spec.grid, spec.group) {
        (GridKind::Int, GroupSize::Row) | (GridKind::E4M3, GroupSize::Row | GroupSize::Tensor) => {}
        (GridKind::Int, GroupSize::Columns(len)) if cols.is_multiple_of(len.min(cols)) => {}
        (GridKind::Int | GridKind::E4M3, group) => {
            return refuse("group size", group, "choose whole rows, or columns that divide the inputs");
        }
        (grid, _) => return refuse("grid", grid, "its values are integers or e4m3"),
    }
    if float_type(spec.scales).is_none() {
        return refuse("scales", format!("of {:?}", spec.scales), "it has scales of F16, BF16 or F32");
    }
    if spec.act_order {
        return refuse("act-order", "(desc_act)", "quantize without it, or choose gptq");
    }
    Ok(())
}

/// Shape of the scales.
fn scale_shape(group: GroupSize, rows: usize, cols: usize) -> Vec<usize> {
    if group == GroupSize::Tensor { vec![1, 1] } else { scales::shape(group, rows, cols) }
}

/// What the header notes of a weight.
fn note(layer: &PlannedLayer<'_>) -> Value {
    let spec = layer.spec;
    let dtype = match float_type(spec.scales) {
        Some(DType::F16) => "float16",
        Some(DType::BF16) => "bfloat16",
        _ => "float32",
    };
    let block = json!([1, spec.group.len(layer.cols)]);
    let typed = |name: &str| json!({ "_type": "torch.dtype", "_data": name });
    match (spec.grid, spec.group, spec.bits) {
        (GridKind::E4M3, ..) => json!({
            "_type": "Float8Tensor",
            "_data": { "block_size": block, "dtype": typed(dtype) },
            "_tensor_data_names": ["qdata", "scale"],
        }),
        (_, GroupSize::Row, 8) => json!({
            "_type": "Int8Tensor",
            "_data": { "act_quant_kwargs": null, "reduce_range": false, "block_size": block, "dtype": typed(dtype) },
            "_tensor_data_names": ["qdata", "scale", "zero_point"],
        }),
        (_, _, bits) => json!({
            "_type": "IntxUnpackedToInt8Tensor",
            "_data": {
                "target_dtype": typed(&format!("int{bits}")),
                "block_size": block,
                "dtype": typed(dtype),
                "activation_quantization": null,
            },
            "_tensor_data_names": ["qdata", "scale", "zero_point"],
        }),
    }
}

impl Layout for TorchAo {
    fn id(&self) -> &'static str {
        "torchao"
    }

    fn description(&self) -> &'static str {
        "torchao's int8, intx and float8 weights, one code in a byte"
    }

    fn methods(&self) -> &'static [&'static str] {
        &["torchao"]
    }

    fn marker(&self) -> &'static str {
        QDATA
    }

    fn module_of<'a>(&self, tensor: &'a str, _dtype: DType) -> Option<&'a str> {
        let (module, part) = tensor.rsplit_once('.')?;
        matches!(part, QDATA | SCALE | ZERO).then_some(module)
    }

    fn known_by(&self) -> &'static [&'static str] {
        &["._weight_qdata"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        check(layer.spec, layer.rows, layer.cols)?;
        parts::float_input(self.id(), layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, spec, .. } = layer;
        let shape = scale_shape(spec.group, rows, cols);
        let float = spec.grid == GridKind::E4M3;
        let mut plan = vec![
            layer.part(QDATA, if float { DType::F8E4M3 } else { DType::I8 }, &[rows, cols]),
            layer.part(SCALE, float_type(spec.scales).unwrap_or(DType::F32), &shape),
        ];
        if !float {
            plan.push(layer.part(ZERO, DType::I8, &shape));
        }
        plan.extend(layer.bias_part());
        plan
    }

    fn write(
        &self,
        linear: &QuantizedLinear,
        module: &str,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError> {
        let writing = Writing::new(self.id(), linear, module)?;
        writing.float_input()?;
        let matrix = &linear.weight;
        let (rows, cols, spec) = (matrix.rows(), matrix.cols(), matrix.spec());
        check(&spec, rows, cols)?;
        let shape = scale_shape(spec.group, rows, cols);
        let (scale_type, scale) = writing.plain_scales(&matrix.scales)?;
        let scale = writing.tensor(SCALE, scale_type, &shape, scale)?;
        let mut tensors = if spec.grid == GridKind::E4M3 {
            if matrix.offset != Offset::None {
                refuse("zero points", "beside a table", "choose an integer grid")?;
            }
            vec![writing.tensor(QDATA, DType::F8E4M3, &[rows, cols], matrix.codes.bytes())?, scale]
        } else {
            let middle = 1u8 << (spec.bits - 1);
            let zeros: Vec<u8> =
                writing.integer_zeros()?.iter().map(|zero| zero.wrapping_sub(middle)).collect();
            vec![
                writing.tensor(QDATA, DType::I8, &[rows, cols], words::signed_bytes(&matrix.codes))?,
                scale,
                writing.tensor(ZERO, DType::I8, &shape, zeros)?,
            ]
        };
        tensors.extend(writing.bias());
        Ok(tensors)
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let spec = model.spec;
        let (name, data) = match (spec.grid, spec.group, spec.bits) {
            (GridKind::E4M3, ..) => ("Float8WeightOnlyConfig", json!({})),
            (_, GroupSize::Row, 8) => ("Int8WeightOnlyConfig", json!({})),
            (_, group, bits) => {
                let granularity = match group {
                    GroupSize::Columns(len) => json!({ "_type": "PerGroup", "_data": { "group_size": len } }),
                    _ => json!({ "_type": "PerAxis", "_data": { "axis": 0 } }),
                };
                let weight = json!({ "_type": "torch.dtype", "_data": format!("int{bits}") });
                ("IntxWeightOnlyConfig", json!({ "weight_dtype": weight, "granularity": granularity }))
            }
        };
        let skipped: Vec<_> =
            model.exceptions.iter().filter(|(_, spec)| spec.is_none()).map(|(module, _)| module).collect();
        json!({
            "quant_method": "torchao",
            "quant_type": { "default": { "_type": name, "_data": data } },
            "modules_to_not_convert": if skipped.is_empty() { Value::Null } else { json!(skipped) },
        })
    }

    fn header_notes(&self, layers: &[PlannedLayer<'_>], others: &[&str]) -> Vec<(String, String)> {
        let weight = |layer: &PlannedLayer<'_>| (format!("{}.weight", layer.module), note(layer));
        let bias = |layer: &PlannedLayer<'_>| layer.bias.map(|_| format!("{}.bias", layer.module));
        let plain = layers.iter().filter_map(bias).chain(others.iter().map(|&name| name.to_owned()));
        let mut notes: Map<String, Value> = layers.iter().map(weight).collect();
        notes.extend(plain.map(|name| (name, json!({ "_type": "Tensor" }))));
        let names: Vec<String> = notes.keys().cloned().collect();
        let mut notes: Vec<_> = notes.into_iter().map(|(name, note)| (name, note.to_string())).collect();
        notes.push(("tensor_names".into(), json!(names).to_string()));
        notes
    }

    fn reader(&self, _config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(TorchAoReader))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        parts::rounded_to_scales(matrix)
    }
}

/// Reads one checkpoint: everything is beside the tensors.
#[derive(Debug)]
struct TorchAoReader;

/// What the headers of a layer's tensors say.
struct Geometry {
    rows: usize,
    cols: usize,
    bits: u8,
    float: bool,
    groups: Groups,
}

fn geometry(parts: &Parts<'_>) -> Result<Geometry, FormatError> {
    let (rows, cols) = parts.need_matrix(QDATA, &[DType::I8, DType::F8E4M3], "[outputs, inputs]")?;
    let float = parts.find(QDATA).is_some_and(|(dtype, _)| dtype == DType::F8E4M3);
    let scale = parts.need(SCALE, FLOATS)?;
    let groups = match *scale {
        [1, 1] if float && rows > 1 => Groups::Tensor,
        [count, 1] if count == rows => Groups::whole_row(cols),
        [count, per_row] if count == rows && per_row > 0 && cols.is_multiple_of(per_row) && !float => {
            Groups::Row { len: cols / per_row }
        }
        _ => {
            let because = format!("qdata of shape [{rows}, {cols}]");
            return Err(parts.misshapen(SCALE, scale, format!("[{rows}, groups]"), because));
        }
    };
    if parts.find(ZERO).is_some() {
        let because = || "one zero point for each scale".to_owned();
        parts.shaped(ZERO, parts.need(ZERO, &[DType::I8])?, scale, because)?;
    }
    parts.check_bias(rows)?;
    Ok(Geometry { rows, cols, bits: if float { 8 } else { bits(parts)? }, float, groups })
}

/// Bits per code: the note in the header, or eight.
fn bits(parts: &Parts<'_>) -> Result<u8, FormatError> {
    let Some(note) = parts.source.note(&parts.name("weight")) else { return Ok(8) };
    let note: Value = serde_json::from_str(note).unwrap_or_default();
    let wrong = |found: &Value, expected: &str| FormatError::Config {
        field: format!("note on {}", crate::display_name(&parts.name("weight"))),
        found: found.to_string(),
        expected: expected.into(),
    };
    match note["_type"].as_str() {
        Some("Int8Tensor") => Ok(8),
        Some("IntxUnpackedToInt8Tensor") => {
            let target = &note["_data"]["target_dtype"]["_data"];
            let bits = target.as_str().and_then(|name| name.strip_prefix("int")?.parse().ok());
            bits.filter(|bits| (1..=8).contains(bits))
                .ok_or_else(|| wrong(target, "target_dtype must be int1 to int8"))
        }
        _ => Err(wrong(
            &note["_type"],
            "this version reads Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor",
        )),
    }
}

impl Reader for TorchAoReader {
    fn layout(&self) -> &'static dyn Layout {
        &TORCHAO
    }

    fn spec(&self) -> Option<QuantSpec> {
        None
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        geometry(&Parts { source, module, layout: "torchao" }).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "torchao" };
        let Geometry { rows, cols, bits, float, groups } = geometry(&parts)?;
        let qdata = parts.read(QDATA)?;
        let mut codes = Codes::zeros(bits, rows, cols).map_err(|e| parts.invalid(e))?;
        if float {
            codes.row_chunks_mut(rows).for_each(|all| all.copy_from_slice(qdata.bytes()));
        } else {
            words::from_signed(qdata.bytes(), &mut codes).map_err(|index| FormatError::Value {
                tensor: parts.name(QDATA),
                index,
                found: (qdata.bytes()[index] as i8).to_string(),
                expected: format!("integers of {bits} bits are smaller"),
            })?;
        }
        let scales = params(&parts.read(SCALE)?);
        let scales = scales.map_err(|source| FormatError::Tensor { tensor: parts.name(SCALE), source })?;
        let mut weight = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0);
        weight.grid = if float { GridKind::E4M3.grid(8).unwrap_or(weight.grid) } else { Grid::signed(bits) };
        if !float && parts.find(ZERO).is_some() {
            let zeros = parts.read(ZERO)?;
            let middle = 1u8 << (bits - 1);
            let max = weight.codes.max();
            let unsigned: Vec<u8> = zeros.bytes().iter().map(|zero| zero.wrapping_add(middle)).collect();
            if let Some(index) = unsigned.iter().position(|&zero| zero > max) {
                return Err(FormatError::Value {
                    tensor: parts.name(ZERO),
                    index,
                    found: (zeros.bytes()[index] as i8).to_string(),
                    expected: format!("zero points of {bits} bits are smaller"),
                });
            }
            if unsigned.iter().any(|&zero| zero != middle) {
                weight.grid = Grid::UNSIGNED;
                weight.offset = Offset::Zero(Params::U8(unsigned));
            }
        }
        parts.linear(weight)
    }
}
