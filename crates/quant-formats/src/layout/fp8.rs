//! FP8 weights (E4M3) beside one scale for all, for each row, or for each block.
//!
//! | layout | `quant_method` | scale | `W` |
//! |---|---|---|---|
//! | `fp8` | `fp8` | `weight_scale_inv`: blocks `[N / 128, K / 128]`, rounded up, or one | `weight * scale` |
//! | `fp8_inverse` | `fp8` with `weight_scale_semantics: inverse` | `weight_scale_inv`, also `[N]` | `weight / scale` |
//! | `fbgemm_fp8` | `fbgemm_fp8` | `weight_scale` `[N, 1]` | `weight * scale` |
//!
//! The first is DeepSeek's and transformers', whose name for the scale does not mean what it says; the second is
//! GPTQModel's. All three quantize their inputs to E4M3 as well.

use ndarray::Array2;
use quant_core::{
    ActGrid, ActGroup, ActSpec, Codes, DType, DenseTensor, GridKind, GroupSize, Offset, Params, ParamsKind,
    QuantSpec, QuantizedLinear, QuantizedMatrix,
};
use serde_json::{Value, json};

use super::fields::{field, wrong};
use super::parts::{self, FLOATS, Parts, Writing, params, unsupported};
use super::{Layout, PlannedLayer, Reader, StoredModel, TensorSource, scales};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// DeepSeek's and transformers' layout.
pub(super) const FP8: Fp8 = Fp8 { kind: Kind::Plain };

/// GPTQModel's, which divides.
pub(super) const INVERSE: Fp8 = Fp8 { kind: Kind::Inverse };

/// One scale for each row.
pub(super) const FBGEMM: Fp8 = Fp8 { kind: Kind::Fbgemm };

/// What the scale means, and its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    Inverse,
    Fbgemm,
}

impl Kind {
    fn scale(self) -> &'static str {
        if self == Kind::Fbgemm { "weight_scale" } else { "weight_scale_inv" }
    }

    fn layout(self) -> &'static Fp8 {
        match self {
            Kind::Plain => &FP8,
            Kind::Inverse => &INVERSE,
            Kind::Fbgemm => &FBGEMM,
        }
    }
}

/// The layout.
#[derive(Debug)]
pub(super) struct Fp8 {
    kind: Kind,
}

impl Fp8 {
    fn refuse(&self, field: &'static str, found: impl ToString, remedy: &str) -> Result<(), Unsupported> {
        Err(unsupported(self.id(), field, found, remedy))
    }

    fn check(&self, spec: &QuantSpec, rows: usize, cols: usize) -> Result<(), Unsupported> {
        if rows == 0 || cols == 0 {
            return self.refuse("size", 0, "leave this module in float (--exclude)");
        }
        if spec.grid != GridKind::E4M3 {
            return self.refuse("grid", spec.grid, "its values are e4m3");
        }
        let (groups, remedy) = match self.kind {
            Kind::Fbgemm => (spec.group == GroupSize::Row, "it has one scale for each row"),
            Kind::Plain | Kind::Inverse => {
                let blocks = matches!(spec.group, GroupSize::Tensor | GroupSize::Tile { .. });
                (blocks, "choose blocks such as 128x128, or tensor")
            }
        };
        if !groups {
            return self.refuse("group size", spec.group, remedy);
        }
        match (spec.scales, self.kind) {
            (ParamsKind::F32, _) | (ParamsKind::E8M0, Kind::Plain) => Ok(()),
            (ParamsKind::BF16 | ParamsKind::F16, Kind::Plain | Kind::Fbgemm) => Ok(()),
            (other, _) => self.refuse("scales", format!("of {other:?}"), "its scales are F32"),
        }
    }

    /// Inputs are quantized by whoever runs the model, whether or not they were when it was made.
    fn check_input(&self, input: &ActSpec) -> Result<(), Unsupported> {
        match input {
            ActSpec::Static { .. } if self.kind == Kind::Fbgemm => self.refuse(
                "quantized activations",
                "with a static scale",
                "its inputs have a scale per token",
            ),
            ActSpec::Float
            | ActSpec::Static { grid: ActGrid::E4M3, zero: 0, .. }
            | ActSpec::Dynamic { grid: ActGrid::E4M3, symmetric: true, outlier_threshold: None, .. } => {
                Ok(())
            }
            _ => self.refuse("quantized activations", "of this kind", "it quantizes inputs to e4m3"),
        }
    }

    fn scale_shape(&self, group: GroupSize, rows: usize, cols: usize) -> Vec<usize> {
        if group == GroupSize::Tensor { Vec::new() } else { scales::shape(group, rows, cols) }
    }
}

impl Layout for Fp8 {
    fn id(&self) -> &'static str {
        match self.kind {
            Kind::Plain => "fp8",
            Kind::Inverse => "fp8_inverse",
            Kind::Fbgemm => "fbgemm_fp8",
        }
    }

    fn description(&self) -> &'static str {
        match self.kind {
            Kind::Plain => "FP8 in blocks of 128 x 128 or per tensor, of DeepSeek and transformers",
            Kind::Inverse => "FP8 of GPTQModel, whose scales divide",
            Kind::Fbgemm => "FP8 per row, of fbgemm",
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        if self.kind == Kind::Fbgemm { &["fbgemm_fp8"] } else { &["fp8"] }
    }

    fn marker(&self) -> &'static str {
        self.kind.scale()
    }

    fn module_of<'a>(&self, tensor: &'a str, dtype: DType) -> Option<&'a str> {
        let (module, part) = tensor.rsplit_once('.')?;
        let is_part = part == self.kind.scale() || part == "weight" && dtype == DType::F8E4M3;
        is_part.then_some(module)
    }

    fn known_by(&self) -> &'static [&'static str] {
        if self.kind == Kind::Plain { &[".weight_scale_inv"] } else { &[] }
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        self.check(layer.spec, layer.rows, layer.cols)?;
        self.check_input(layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, spec, .. } = layer;
        let scale_type = match spec.scales {
            ParamsKind::E8M0 => DType::F8E8M0,
            kind => parts::float_type(kind).unwrap_or(DType::F32),
        };
        let mut plan = vec![
            layer.part("weight", DType::F8E4M3, &[rows, cols]),
            layer.part(self.kind.scale(), scale_type, &self.scale_shape(spec.group, rows, cols)),
        ];
        if let ActSpec::Static { .. } = layer.input {
            plan.push(layer.part("activation_scale", DType::F32, &[]));
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
        let (rows, cols, spec) = (matrix.rows(), matrix.cols(), matrix.spec());
        self.check(&spec, rows, cols)?;
        self.check_input(&linear.input)?;
        if matrix.offset != Offset::None || matrix.input_perm.is_some() {
            self.refuse("zero points or act-order", "beside a table", "choose an integer layout")?;
        }
        let stored = match (&matrix.scales, self.kind) {
            (Params::Inverse(base), Kind::Inverse) => (**base).clone(),
            (Params::Inverse(_), _) | (_, Kind::Inverse) => Params::F32(
                matrix
                    .scales
                    .to_vec()
                    .into_iter()
                    .map(|scale| match self.kind {
                        Kind::Inverse => 1.0 / scale,
                        Kind::Plain | Kind::Fbgemm => scale,
                    })
                    .collect(),
            ),
            (plain, _) => plain.clone(),
        };
        let Some((scale_type, bytes)) = parts::plain_bytes(&stored) else {
            return Err(writing.unsupported("scales", "of two levels", "its scales are F32").into());
        };
        let scale_shape = self.scale_shape(spec.group, rows, cols);
        let mut tensors = vec![
            writing.tensor("weight", DType::F8E4M3, &[rows, cols], matrix.codes.bytes())?,
            writing.tensor(self.kind.scale(), scale_type, &scale_shape, bytes)?,
        ];
        if let ActSpec::Static { scale, .. } = linear.input {
            tensors.push(scales::scalar_tensor(&writing, "activation_scale", &[], scale)?);
        }
        tensors.extend(writing.bias());
        Ok(tensors)
    }

    fn mixes(&self) -> bool {
        false
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let mut skipped = vec!["lm_head"];
        skipped.extend(
            model.exceptions.iter().filter(|(_, spec)| spec.is_none()).map(|(module, _)| &module[..]),
        );
        if self.kind == Kind::Fbgemm {
            return json!({
                "quant_method": "fbgemm_fp8",
                "activation_scale_ub": 1200.0,
                "modules_to_not_convert": skipped,
            });
        }
        let scheme = if matches!(model.input, ActSpec::Static { .. }) { "static" } else { "dynamic" };
        let mut config = json!({
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": scheme,
            "weight_block_size": match model.spec.group {
                GroupSize::Tile { rows, cols } => json!([rows, cols]),
                _ => Value::Null,
            },
            "modules_to_not_convert": skipped,
        });
        if model.spec.scales == ParamsKind::E8M0 {
            config["scale_fmt"] = json!("ue8m0");
        }
        if self.kind == Kind::Inverse {
            config["method"] = json!("fp8");
            config["format"] = json!("float8_e4m3fn");
            config["weight_scale_method"] =
                if model.spec.group == GroupSize::Tensor { json!("tensor") } else { json!("block") };
            config["weight_scale_semantics"] = json!("inverse");
        }
        config
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(Fp8Reader::new(config, self.kind)?))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        let Params::Inverse(base) = &matrix.scales else { return parts::rounded_to_scales(matrix) };
        // A true division, not a product with the reciprocal.
        let ones = Params::F32(vec![1.0; base.len()]);
        let mut weights = QuantizedMatrix { scales: ones, ..matrix.clone() }.dequantize();
        for ((r, c), w) in weights.indexed_iter_mut() {
            *w /= base.get(matrix.groups.index(r, c, matrix.cols()));
        }
        weights
    }
}

/// Reads one checkpoint.
#[derive(Debug)]
struct Fp8Reader {
    kind: Kind,
    group: Option<GroupSize>,
    scales: ParamsKind,
    is_static: bool,
}

impl Fp8Reader {
    fn new(config: &Value, kind: Kind) -> Result<Self, FormatError> {
        if let Some((name, value)) = field(config, &["fmt"])
            && !matches!(value.as_str(), Some("e4m3" | "float8_e4m3fn"))
        {
            return Err(wrong(name, value, "this version reads e4m3"));
        }
        let kind = match field(config, &["weight_scale_semantics"]) {
            None => {
                if kind == Kind::Inverse {
                    Kind::Plain
                } else {
                    kind
                }
            }
            Some((_, value)) if value == "inverse" => Kind::Inverse,
            Some((name, value)) => return Err(wrong(name, value, "this version knows inverse")),
        };
        let group = match field(config, &["weight_block_size"]) {
            None => (kind == Kind::Fbgemm).then_some(GroupSize::Row),
            Some((name, value)) => {
                let size = |i: usize| {
                    value.get(i)?.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)
                };
                let block = size(0).zip(size(1)).map(|(rows, cols)| GroupSize::Tile { rows, cols });
                Some(block.ok_or_else(|| wrong(name, value, "it must be two positive sizes"))?)
            }
        };
        let is_static = match field(config, &["activation_scheme"]) {
            None => false,
            Some((_, value)) if value == "dynamic" || value == "static" => value == "static",
            Some((name, value)) => return Err(wrong(name, value, "it must be static or dynamic")),
        };
        let ue8m0 = field(config, &["scale_fmt"]).is_some_and(|(_, value)| value == "ue8m0");
        Ok(Self { kind, group, scales: if ue8m0 { ParamsKind::E8M0 } else { ParamsKind::F32 }, is_static })
    }

    fn geometry(&self, parts: &Parts<'_>) -> Result<(usize, usize, quant_core::Groups), FormatError> {
        let (rows, cols) = parts.need_matrix("weight", &[DType::F8E4M3], "[outputs, inputs]")?;
        let types: &[DType] = match self.kind {
            Kind::Plain => &[DType::F32, DType::BF16, DType::F16, DType::F8E8M0],
            Kind::Inverse | Kind::Fbgemm => FLOATS,
        };
        let found = parts.need(self.kind.scale(), types)?;
        let groups = scales::groups(parts, self.kind.scale(), found, (rows, cols), self.group)?;
        scales::check_scalar(parts, self.input_part(parts))?;
        parts.check_bias(rows)?;
        Ok((rows, cols, groups))
    }

    fn input_part(&self, parts: &Parts<'_>) -> &'static str {
        if parts.find("input_scale").is_some() { "input_scale" } else { "activation_scale" }
    }
}

impl Reader for Fp8Reader {
    fn layout(&self) -> &'static dyn Layout {
        self.kind.layout()
    }

    fn spec(&self) -> Option<QuantSpec> {
        let (grid, group) = (GridKind::E4M3, self.group.unwrap_or(GroupSize::Tensor));
        Some(QuantSpec { bits: 8, grid, group, scales: self.scales, symmetric: true, act_order: false })
    }

    fn input(&self) -> ActSpec {
        let grid = ActGrid::E4M3;
        if self.is_static {
            return ActSpec::Static { grid, scale: 1.0, zero: 0 };
        }
        let per = match self.group {
            Some(GroupSize::Tile { cols, .. }) => ActGroup::Columns(cols),
            _ => ActGroup::Token,
        };
        ActSpec::Dynamic { grid, per, symmetric: true, outlier_threshold: None }
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(&Parts { source, module, layout: "fp8" }).map(|(rows, cols, _)| (rows, cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "fp8" };
        let (rows, cols, groups) = self.geometry(&parts)?;
        let mut codes = Codes::zeros(8, rows, cols).map_err(|e| parts.invalid(e))?;
        let weight = parts.read("weight")?;
        codes.row_chunks_mut(rows).for_each(|all| all.copy_from_slice(weight.bytes()));
        let scale = self.kind.scale();
        let stored = params(&parts.read(scale)?);
        let stored = stored.map_err(|source| FormatError::Tensor { tensor: parts.name(scale), source })?;
        let scales = if self.kind == Kind::Inverse { Params::Inverse(Box::new(stored)) } else { stored };
        let mut weight = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0);
        weight.grid = GridKind::E4M3.grid(8).unwrap_or(weight.grid);
        let input = match self.is_static {
            true => scales::static_input(&parts, self.input_part(&parts), ActGrid::E4M3)?,
            false => None,
        };
        Ok(QuantizedLinear { input: input.unwrap_or_else(|| self.input()), ..parts.linear(weight)? })
    }
}
