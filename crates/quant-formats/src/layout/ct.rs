//! compressed-tensors, as llm-compressor and vLLM use it.
//!
//! For a layer of `K` inputs and `N` outputs, with `G` scales in a row:
//!
//! | layout | `format` | weight | `weight_scale` |
//! |---|---|---|---|
//! | `ct_pack` | `pack-quantized` | `weight_packed` I32 `[N, K * bits / 32]` | floats `[N, G]` |
//! | `ct_int` | `int-quantized` | `weight` I8 `[N, K]` | floats `[N, G]`, `[1]`, blocks |
//! | `ct_float` | `float-quantized` | `weight` F8_E4M3 `[N, K]` | floats `[N, G]`, `[1]`, blocks |
//! | `ct_nvfp4` | `nvfp4-pack-quantized` | `weight_packed` U8 `[N, K / 2]` | F8_E4M3 `[N, K / 16]` |
//! | `ct_mxfp4` | `mxfp4-pack-quantized` | `weight_packed` U8 `[N, K / 2]` | U8 `[N, K / 32]` |
//! | `ct_mxfp6` | `mxfp6-pack-quantized` | `weight_packed` U8 `[N, K * 3 / 4]` | U8 `[N, K / 32]` |
//! | `ct_mxfp8` | `mxfp8-quantized` | `weight` F8_E4M3 `[N, K]` | U8 `[N, K / 32]` |
//!
//! Integers are signed, with a zero point in `weight_zero_point` if they are asymmetric; `W = (q - zero) * scale`.
//! NVFP4 divides its scales by `weight_global_scale`. One model may mix the formats.

mod config;
mod read;
pub(super) mod words;

use half::bf16;
use ndarray::Array2;
use quant_core::{
    ActSpec, DType, DenseTensor, GridKind, GroupSize, ParamsKind, QuantizedLinear, QuantizedMatrix,
};
use serde_json::Value;

use self::read::CtReader;
use super::fields::{field, wrong};
use super::parts::{self, Writing, float_type, unsupported};
use super::{Layout, PlannedLayer, Reader, StoredModel, scales};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

pub(super) const PACK: Ct = Ct { format: Format::Pack };
pub(super) const INT: Ct = Ct { format: Format::Int };
pub(super) const FLOAT: Ct = Ct { format: Format::Float };
pub(super) const NVFP4: Ct = Ct { format: Format::Nvfp4 };
pub(super) const MXFP4: Ct = Ct { format: Format::Mxfp4 };
pub(super) const MXFP6: Ct = Ct { format: Format::Mxfp6 };
pub(super) const MXFP8: Ct = Ct { format: Format::Mxfp8 };

/// How the tensors lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Pack,
    Int,
    Float,
    Nvfp4,
    Mxfp4,
    Mxfp6,
    Mxfp8,
}

impl Format {
    const ALL: [Format; 7] = [
        Format::Pack,
        Format::Int,
        Format::Float,
        Format::Nvfp4,
        Format::Mxfp4,
        Format::Mxfp6,
        Format::Mxfp8,
    ];

    fn name(self) -> &'static str {
        match self {
            Format::Pack => "pack-quantized",
            Format::Int => "int-quantized",
            Format::Float => "float-quantized",
            Format::Nvfp4 => "nvfp4-pack-quantized",
            Format::Mxfp4 => "mxfp4-pack-quantized",
            Format::Mxfp6 => "mxfp6-pack-quantized",
            Format::Mxfp8 => "mxfp8-quantized",
        }
    }

    /// The field `format`. `None` where it is absent or leaves the question to the tensors.
    fn parse(config: &Value) -> Result<Option<Format>, FormatError> {
        let Some((name, value)) = field(config, &["format"]) else { return Ok(None) };
        let known = Format::ALL.into_iter().find(|format| value == format.name());
        match (known, value.as_str()) {
            (Some(format), _) => Ok(Some(format)),
            (None, Some("mixed-precision" | "naive-quantized" | "dense")) => Ok(None),
            _ => {
                let names = Format::ALL.map(Format::name).join(", ");
                Err(wrong(name, value, &format!("this version reads {names} and mixtures of them")))
            }
        }
    }

    /// The layout of that format.
    fn layout(self) -> &'static Ct {
        match self {
            Format::Pack => &PACK,
            Format::Int => &INT,
            Format::Float => &FLOAT,
            Format::Nvfp4 => &NVFP4,
            Format::Mxfp4 => &MXFP4,
            Format::Mxfp6 => &MXFP6,
            Format::Mxfp8 => &MXFP8,
        }
    }

    /// Values, columns per group and scales of the formats that have one kind of each.
    fn fixed(self) -> Option<(GridKind, usize, ParamsKind)> {
        match self {
            Format::Pack | Format::Int | Format::Float => None,
            Format::Nvfp4 => Some((GridKind::E2M1, 16, ParamsKind::E4M3)),
            Format::Mxfp4 => Some((GridKind::E2M1, 32, ParamsKind::E8M0)),
            Format::Mxfp6 => Some((GridKind::E2M3, 32, ParamsKind::E8M0)),
            Format::Mxfp8 => Some((GridKind::E4M3, 32, ParamsKind::E8M0)),
        }
    }

    /// Tensor and type of the codes.
    fn weight(self) -> (&'static str, DType) {
        match self {
            Format::Pack => ("weight_packed", DType::I32),
            Format::Int => ("weight", DType::I8),
            Format::Float | Format::Mxfp8 => ("weight", DType::F8E4M3),
            Format::Nvfp4 | Format::Mxfp4 | Format::Mxfp6 => ("weight_packed", DType::U8),
        }
    }

    /// Shape of the codes.
    fn weight_shape(self, bits: u8, rows: usize, cols: usize) -> [usize; 2] {
        let bits = usize::from(bits);
        match self {
            Format::Pack => [rows, (cols * bits).div_ceil(32)],
            Format::Int | Format::Float | Format::Mxfp8 => [rows, cols],
            Format::Nvfp4 | Format::Mxfp4 | Format::Mxfp6 => [rows, cols * bits / 8],
        }
    }
}

/// The layout.
#[derive(Debug)]
pub(super) struct Ct {
    format: Format,
}

impl Ct {
    fn refuse(&self, field: &'static str, found: impl ToString, remedy: &str) -> Result<(), Unsupported> {
        Err(unsupported(self.id(), field, found, remedy))
    }

    /// Checks the kind of values and scales, and the group.
    fn check(
        &self,
        grid: GridKind,
        bits: u8,
        group: GroupSize,
        scales: ParamsKind,
        (rows, cols): (usize, usize),
    ) -> Result<(), Unsupported> {
        for (field, n) in [("output size", rows), ("input size", cols)] {
            if n == 0 {
                return self.refuse(field, n, "leave this module in float (--exclude)");
            }
        }
        if let Some((values, len, kind)) = self.format.fixed() {
            if grid != values {
                return self.refuse("grid", grid, &format!("its values are {values}"));
            }
            if group != GroupSize::Columns(len) && !(group == GroupSize::Row && cols == len) {
                return self.refuse("group size", group, &format!("its groups have {len} columns"));
            }
            if !cols.is_multiple_of(len) {
                return self.refuse("input size", cols, &format!("it must be a multiple of {len}"));
            }
            if scales != kind {
                return self.refuse("scales", format!("of {scales:?}"), &format!("its scales are {kind:?}"));
            }
            return Ok(());
        }
        let values = if self.format == Format::Float { GridKind::E4M3 } else { GridKind::Int };
        if grid != values {
            return self.refuse("grid", grid, &format!("its values are {values}"));
        }
        if self.format == Format::Pack && bits < 2 {
            return self.refuse("bits", bits, "it packs 2 to 8 bits");
        }
        let fits = match group {
            GroupSize::Row | GroupSize::Columns(_) => true,
            GroupSize::Tensor | GroupSize::Tile { .. } => self.format != Format::Pack,
            GroupSize::Flat(_) | GroupSize::Strided(_) => false,
        };
        if !fits {
            return self.refuse("group size", group, "choose columns per group, or -1 for whole rows");
        }
        if float_type(scales).is_none() {
            return self.refuse("scales", format!("of {scales:?}"), "it has scales of F16, BF16 or F32");
        }
        Ok(())
    }

    fn check_input(&self, input: &ActSpec) -> Result<(), Unsupported> {
        match input {
            ActSpec::Dynamic { outlier_threshold: Some(_), .. } => {
                self.refuse("outliers", "of the inputs", "choose bitsandbytes")
            }
            ActSpec::TwoLevel { .. } if self.format != Format::Nvfp4 => {
                self.refuse("quantized activations", "of two levels", "choose ct_nvfp4")
            }
            _ => Ok(()),
        }
    }

    /// Type of the scales on disk.
    fn scale_type(kind: ParamsKind) -> DType {
        match kind {
            ParamsKind::E4M3 => DType::F8E4M3,
            ParamsKind::E8M0 => DType::U8,
            kind => float_type(kind).unwrap_or(DType::F32),
        }
    }

    fn asymmetric(&self, symmetric: bool) -> bool {
        !symmetric && matches!(self.format, Format::Pack | Format::Int)
    }
}

impl Layout for Ct {
    fn id(&self) -> &'static str {
        match self.format {
            Format::Pack => "ct_pack",
            Format::Int => "ct_int",
            Format::Float => "ct_float",
            Format::Nvfp4 => "ct_nvfp4",
            Format::Mxfp4 => "ct_mxfp4",
            Format::Mxfp6 => "ct_mxfp6",
            Format::Mxfp8 => "ct_mxfp8",
        }
    }

    fn description(&self) -> &'static str {
        match self.format {
            Format::Pack => "compressed-tensors, packed integers of 2 to 8 bits, read by vLLM",
            Format::Int => "compressed-tensors, integers in bytes, often with quantized activations (W8A8)",
            Format::Float => "compressed-tensors, FP8 weights per tensor, row, group or block",
            Format::Nvfp4 => "compressed-tensors, NVFP4: E2M1 in blocks of 16 under E4M3 scales",
            Format::Mxfp4 => "compressed-tensors, MXFP4: E2M1 in blocks of 32 under powers of two",
            Format::Mxfp6 => "compressed-tensors, MXFP6: E2M3 in blocks of 32 under powers of two",
            Format::Mxfp8 => "compressed-tensors, MXFP8: E4M3 in blocks of 32 under powers of two",
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        &["compressed-tensors", "compressed_tensors"]
    }

    fn marker(&self) -> &'static str {
        "weight_scale"
    }

    fn module_of<'a>(&self, tensor: &'a str, dtype: DType) -> Option<&'a str> {
        let (module, part) = tensor.rsplit_once('.')?;
        match part {
            "weight_packed"
            | "weight_scale"
            | "weight_zero_point"
            | "weight_shape"
            | "weight_global_scale"
            | "weight_g_idx" => Some(module),
            "weight" => matches!(dtype, DType::I8 | DType::F8E4M3).then_some(module),
            _ => None,
        }
    }

    fn known_by(&self) -> &'static [&'static str] {
        &[".weight_packed", ".weight_scale"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        let spec = layer.spec;
        let group = match spec.group {
            GroupSize::Columns(len) => GroupSize::Columns(len.min(layer.cols)),
            group => group,
        };
        self.check(spec.grid, spec.bits, group, spec.scales, (layer.rows, layer.cols))?;
        if spec.act_order && self.format != Format::Pack {
            return self.refuse("act-order", "(desc_act)", "choose ct_pack");
        }
        self.check_input(layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, spec, .. } = layer;
        let (part, dtype) = self.format.weight();
        let scale_shape = scales::shape(spec.group, rows, cols);
        let mut plan = vec![
            layer.part(part, dtype, &self.format.weight_shape(spec.bits, rows, cols)),
            layer.part("weight_scale", Self::scale_type(spec.scales), &scale_shape),
        ];
        if self.asymmetric(spec.symmetric) {
            let (dtype, mut shape) =
                (if self.format == Format::Pack { DType::I32 } else { DType::I8 }, scale_shape);
            if self.format == Format::Pack {
                shape[0] = (rows * usize::from(spec.bits)).div_ceil(32);
            }
            plan.push(layer.part("weight_zero_point", dtype, &shape));
        }
        match self.format {
            Format::Pack => plan.push(layer.part("weight_shape", DType::I64, &[2])),
            Format::Nvfp4 => plan.push(layer.part("weight_global_scale", DType::F32, &[1])),
            _ => {}
        }
        if self.format == Format::Pack && spec.act_order {
            plan.push(layer.part("weight_g_idx", DType::I32, &[cols]));
        }
        match layer.input {
            ActSpec::Static { .. } => plan.push(layer.part("input_scale", DType::F32, &[1])),
            ActSpec::TwoLevel { .. } => plan.push(layer.part("input_global_scale", DType::F32, &[1])),
            _ => {}
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
        let matrix = &linear.weight;
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let spec = matrix.spec();
        self.check(spec.grid, spec.bits, spec.group, spec.scales, (rows, cols))?;
        self.check_input(&linear.input)?;
        let symmetric = matches!(matrix.offset, quant_core::Offset::None) || spec.symmetric;
        if self.format.fixed().is_some() && !symmetric {
            self.refuse("zero points", "beside a table", "choose ct_int")?;
        }
        let map = words::column_map(&writing, self.format == Format::Pack)?;

        let (part, dtype) = self.format.weight();
        let shape = self.format.weight_shape(spec.bits, rows, cols);
        let weight = match self.format {
            Format::Pack => words::padded(&matrix.codes, matrix.input_perm.as_ref()),
            Format::Int => words::signed_bytes(&matrix.codes),
            _ => matrix.codes.bytes().to_vec(),
        };
        let scale_shape = scales::shape(spec.group, rows, cols);
        let (blocks, global) = match self.format {
            Format::Nvfp4 => match scales::factored(&matrix.scales, true) {
                Some((blocks, factor)) => (Some(blocks.to_vec()), Some(factor)),
                None => (None, None),
            },
            _ => (parts::plain_bytes(&matrix.scales).map(|(_, bytes)| bytes), None),
        };
        let scale_type = Self::scale_type(spec.scales);
        let Some(blocks) = blocks else {
            return Err(writing
                .unsupported("scales", format!("of {:?}", spec.scales), "choose ct_pack")
                .into());
        };
        let mut tensors = vec![
            writing.tensor(part, dtype, &shape, weight)?,
            writing.tensor("weight_scale", scale_type, &scale_shape, blocks)?,
        ];
        if self.asymmetric(spec.symmetric) {
            let zeros = writing.integer_zeros()?;
            let per_row = zeros.len() / rows.max(1);
            tensors.push(match self.format {
                Format::Pack => {
                    let words = (rows * usize::from(spec.bits)).div_ceil(32);
                    let bytes = words::pack_columns(spec.bits, &zeros, rows, per_row);
                    writing.tensor("weight_zero_point", DType::I32, &[words, per_row], bytes)?
                }
                _ => {
                    let middle = 1 << (spec.bits - 1);
                    let bytes: Vec<u8> = zeros.iter().map(|zero| zero.wrapping_sub(middle)).collect();
                    writing.tensor("weight_zero_point", DType::I8, &scale_shape, bytes)?
                }
            });
        }
        if self.format == Format::Pack {
            let bytes: Vec<u8> = [rows, cols].iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
            tensors.push(writing.tensor("weight_shape", DType::I64, &[2], bytes)?);
        }
        if let Some(factor) = global {
            tensors.push(scales::scalar_tensor(&writing, "weight_global_scale", &[1], factor)?);
        }
        if let Some(map) = map {
            tensors.push(writing.tensor("weight_g_idx", DType::I32, &[cols], map)?);
        }
        match linear.input {
            ActSpec::Static { scale, .. } => {
                tensors.push(scales::scalar_tensor(&writing, "input_scale", &[1], scale)?);
            }
            ActSpec::TwoLevel { factor, divide, .. } => {
                let factor = if divide { factor } else { 1.0 / factor };
                tensors.push(scales::scalar_tensor(&writing, "input_global_scale", &[1], factor)?);
            }
            _ => {}
        }
        tensors.extend(writing.bias());
        Ok(tensors)
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        config::write(model, self.format)
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(CtReader::new(config)?))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        like_peer(matrix)
    }
}

/// Integers and FP8 in the type of their scales; MX and NVFP4 weights in bf16, from a product in f32.
pub(super) fn like_peer(matrix: &QuantizedMatrix) -> Array2<f32> {
    match matrix.scales.kind() {
        ParamsKind::E8M0 | ParamsKind::E4M3 => {
            let mut weights = matrix.dequantize();
            parts::round(&mut weights, |w| bf16::from_f32(w).to_f32());
            weights
        }
        _ => parts::rounded_to_scales(matrix),
    }
}
