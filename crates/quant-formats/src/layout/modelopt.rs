//! FP8 and NVFP4 of NVIDIA's ModelOpt.
//!
//! | layout | `weight` | `weight_scale` | `weight_scale_2` | `input_scale` |
//! |---|---|---|---|---|
//! | `modelopt_fp8` | F8_E4M3 `[N, K]` | F32 `[]` | | F32 `[]` |
//! | `modelopt_nvfp4` | U8 `[N, K / 2]` | F8_E4M3 `[N, K / 16]` | F32 `[]` | F32 `[]` |
//!
//! `W = weight * weight_scale * weight_scale_2`. Two E2M1 values lie in a byte, the even input in the low half.

use ndarray::Array2;
use quant_core::{
    ActGrid, ActSpec, Codes, DType, DenseTensor, GridKind, GroupSize, Groups, Offset, Params, ParamsKind,
    QuantSpec, QuantizedLinear, QuantizedMatrix,
};
use serde_json::{Value, json};

use super::fields::{field, wrong};
use super::parts::{self, Parts, Writing, params, unsupported};
use super::{Layout, PlannedLayer, Reader, StoredModel, TensorSource, ct, scales};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

pub(super) const FP8: ModelOpt = ModelOpt { algorithm: Algorithm::Fp8 };
pub(super) const NVFP4: ModelOpt = ModelOpt { algorithm: Algorithm::Nvfp4 };

/// Columns under one E4M3 scale.
const BLOCK: usize = 16;

/// The `quant_algo` of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Fp8,
    Nvfp4,
}

impl Algorithm {
    fn layout(self) -> &'static ModelOpt {
        if self == Algorithm::Fp8 { &FP8 } else { &NVFP4 }
    }

    fn spec(self) -> QuantSpec {
        let (bits, grid, group, scales) = match self {
            Algorithm::Fp8 => (8, GridKind::E4M3, GroupSize::Tensor, ParamsKind::F32),
            Algorithm::Nvfp4 => (4, GridKind::E2M1, GroupSize::Columns(BLOCK), ParamsKind::E4M3),
        };
        QuantSpec { bits, grid, group, scales, symmetric: true, act_order: false }
    }
}

/// The layout.
#[derive(Debug)]
pub(super) struct ModelOpt {
    algorithm: Algorithm,
}

impl ModelOpt {
    fn refuse(&self, field: &'static str, found: impl ToString, remedy: &str) -> Result<(), Unsupported> {
        Err(unsupported(self.id(), field, found, remedy))
    }

    fn check(&self, spec: &QuantSpec, rows: usize, cols: usize) -> Result<(), Unsupported> {
        let ours = self.algorithm.spec();
        if rows == 0 || cols == 0 || !cols.is_multiple_of(spec.group.len(cols)) {
            return self.refuse(
                "input size",
                cols,
                "it must be a positive multiple of the block; see --exclude",
            );
        }
        if spec.grid != ours.grid {
            return self.refuse("grid", spec.grid, &format!("its values are {}", ours.grid));
        }
        let whole = cols == BLOCK && spec.group == GroupSize::Row && self.algorithm == Algorithm::Nvfp4;
        if spec.group != ours.group && !whole {
            return self.refuse("group size", spec.group, &format!("its groups are {}", ours.group));
        }
        if spec.scales != ours.scales {
            return self.refuse(
                "scales",
                format!("of {:?}", spec.scales),
                &format!("its scales are {:?}", ours.scales),
            );
        }
        Ok(())
    }

    fn check_input(&self, input: &ActSpec) -> Result<(), Unsupported> {
        match (self.algorithm, input) {
            (_, ActSpec::Float)
            | (Algorithm::Fp8, ActSpec::Static { grid: ActGrid::E4M3, zero: 0, .. })
            | (Algorithm::Nvfp4, ActSpec::TwoLevel { grid: ActGrid::E2M1, len: BLOCK, .. }) => Ok(()),
            _ => self.refuse("quantized activations", "of this kind", "its inputs have a static scale"),
        }
    }
}

impl Layout for ModelOpt {
    fn id(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Fp8 => "modelopt_fp8",
            Algorithm::Nvfp4 => "modelopt_nvfp4",
        }
    }

    fn description(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Fp8 => "FP8 per tensor, of ModelOpt",
            Algorithm::Nvfp4 => "NVFP4 of ModelOpt: E2M1 in blocks of 16 under E4M3 scales",
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        &["modelopt", "modelopt_fp4"]
    }

    fn marker(&self) -> &'static str {
        "weight_scale"
    }

    fn module_of<'a>(&self, tensor: &'a str, dtype: DType) -> Option<&'a str> {
        let (module, part) = tensor.rsplit_once('.')?;
        let is_part = matches!(part, "weight_scale" | "weight_scale_2")
            || part == "weight" && matches!(dtype, DType::F8E4M3 | DType::U8);
        is_part.then_some(module)
    }

    fn known_by(&self) -> &'static [&'static str] {
        if self.algorithm == Algorithm::Nvfp4 { &[".weight_scale_2"] } else { &[] }
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        self.check(layer.spec, layer.rows, layer.cols)?;
        self.check_input(layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, .. } = layer;
        let mut plan = match self.algorithm {
            Algorithm::Fp8 => vec![
                layer.part("weight", DType::F8E4M3, &[rows, cols]),
                layer.part("weight_scale", DType::F32, &[]),
            ],
            Algorithm::Nvfp4 => vec![
                layer.part("weight", DType::U8, &[rows, cols / 2]),
                layer.part("weight_scale", DType::F8E4M3, &[rows, cols / BLOCK]),
                layer.part("weight_scale_2", DType::F32, &[]),
            ],
        };
        if *layer.input != ActSpec::Float {
            plan.push(layer.part("input_scale", DType::F32, &[]));
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
        self.check(&matrix.spec(), rows, cols)?;
        self.check_input(&linear.input)?;
        if matrix.offset != Offset::None || matrix.input_perm.is_some() {
            self.refuse("zero points or act-order", "beside a table", "choose an integer layout")?;
        }
        let codes = matrix.codes.bytes();
        let mut tensors = match self.algorithm {
            Algorithm::Fp8 => vec![
                writing.tensor("weight", DType::F8E4M3, &[rows, cols], codes)?,
                scales::scalar_tensor(&writing, "weight_scale", &[], matrix.scales.get(0))?,
            ],
            Algorithm::Nvfp4 => {
                let Some((blocks, factor)) = scales::factored(&matrix.scales, false) else {
                    let remedy = "its scales are E4M3 under one factor";
                    return Err(writing.unsupported("scales", "of this form", remedy).into());
                };
                vec![
                    writing.tensor("weight", DType::U8, &[rows, cols / 2], codes)?,
                    writing.tensor("weight_scale", DType::F8E4M3, &[rows, cols / BLOCK], blocks)?,
                    scales::scalar_tensor(&writing, "weight_scale_2", &[], factor)?,
                ]
            }
        };
        match linear.input {
            ActSpec::Static { scale, .. } => {
                tensors.push(scales::scalar_tensor(&writing, "input_scale", &[], scale)?);
            }
            ActSpec::TwoLevel { factor, divide, .. } => {
                let factor = if divide { 1.0 / factor } else { factor };
                tensors.push(scales::scalar_tensor(&writing, "input_scale", &[], factor)?);
            }
            _ => {}
        }
        tensors.extend(writing.bias());
        Ok(tensors)
    }

    fn mixes(&self) -> bool {
        false
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let mut ignore = vec!["lm_head"];
        ignore.extend(
            model.exceptions.iter().filter(|(_, spec)| spec.is_none()).map(|(module, _)| &module[..]),
        );
        let (name, group) = match self.algorithm {
            Algorithm::Fp8 => ("FP8", Value::Null),
            Algorithm::Nvfp4 => ("NVFP4", json!(BLOCK)),
        };
        json!({ "quant_method": "modelopt", "quant_algo": name, "group_size": group, "ignore": ignore })
    }

    fn side_files(&self, config: &Value, _layers: &[PlannedLayer<'_>]) -> Vec<(String, Vec<u8>)> {
        let file = json!({
            "producer": { "name": "modelopt" },
            "quantization": {
                "quant_algo": config["quant_algo"],
                "kv_cache_quant_algo": null,
                "group_size": config["group_size"],
                "exclude_modules": config["ignore"],
            },
        });
        vec![("hf_quant_config.json".into(), format!("{file:#}\n").into_bytes())]
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        let nested = config.get("quantization").unwrap_or(config);
        let algorithm = match field(nested, &["quant_algo"]) {
            None => None,
            Some((name, value)) => match value.as_str() {
                Some("FP8") => Some(Algorithm::Fp8),
                Some("NVFP4" | "NVFP4_W4A16" | "W4A16_NVFP4") => Some(Algorithm::Nvfp4),
                Some("MIXED_PRECISION") => None,
                _ => return Err(wrong(name, value, "this version reads FP8, NVFP4 and MIXED_PRECISION")),
            },
        };
        Ok(Box::new(ModelOptReader { algorithm }))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        if matrix.scales.kind() != ParamsKind::E4M3 {
            return ct::like_peer(matrix);
        }
        // NVFP4 in f32, for files do not tell the type of the computation. The table has no negative zero.
        let mut weights = matrix.dequantize();
        parts::round(&mut weights, |w| w + 0.0);
        weights
    }
}

/// Reads one checkpoint.
#[derive(Debug)]
struct ModelOptReader {
    /// `None` where layers differ.
    algorithm: Option<Algorithm>,
}

impl ModelOptReader {
    fn geometry(&self, parts: &Parts<'_>) -> Result<(Algorithm, usize, usize), FormatError> {
        let (rows, width) = parts.need_matrix("weight", &[DType::F8E4M3, DType::U8], "two dimensions")?;
        let algorithm = match parts.find("weight") {
            Some((DType::U8, _)) => Algorithm::Nvfp4,
            _ => Algorithm::Fp8,
        };
        if let Some(said) = self.algorithm.filter(|&said| said != algorithm) {
            let types: &[DType] = if said == Algorithm::Fp8 { &[DType::F8E4M3] } else { &[DType::U8] };
            parts.need("weight", types)?;
        }
        let cols = match algorithm {
            Algorithm::Fp8 => {
                let found = parts.need("weight_scale", &[DType::F32])?;
                scales::groups(parts, "weight_scale", found, (rows, width), Some(GroupSize::Tensor))?;
                width
            }
            Algorithm::Nvfp4 => {
                let cols =
                    width.checked_mul(2).filter(|cols| cols.is_multiple_of(BLOCK)).ok_or_else(|| {
                        parts.misshapen(
                            "weight",
                            &[rows, width],
                            "another width",
                            format!("blocks of {BLOCK} inputs"),
                        )
                    })?;
                let found = parts.need("weight_scale", &[DType::F8E4M3])?;
                parts.shaped("weight_scale", found, &[rows, cols / BLOCK], || {
                    format!("weight of shape [{rows}, {width}] and blocks of {BLOCK} inputs")
                })?;
                parts.need("weight_scale_2", &[DType::F32])?;
                scales::check_scalar(parts, "weight_scale_2")?;
                cols
            }
        };
        scales::check_scalar(parts, "input_scale")?;
        parts.check_bias(rows)?;
        Ok((algorithm, rows, cols))
    }
}

impl Reader for ModelOptReader {
    fn layout(&self) -> &'static dyn Layout {
        self.algorithm.unwrap_or(Algorithm::Nvfp4).layout()
    }

    fn spec(&self) -> Option<QuantSpec> {
        self.algorithm.map(Algorithm::spec)
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(&Parts { source, module, layout: "modelopt" }).map(|(_, rows, cols)| (rows, cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "modelopt" };
        let (algorithm, rows, cols) = self.geometry(&parts)?;
        let spec = algorithm.spec();
        let mut codes = Codes::zeros(spec.bits, rows, cols).map_err(|e| parts.invalid(e))?;
        let weight = parts.read("weight")?;
        codes.row_chunks_mut(rows).for_each(|all| all.copy_from_slice(weight.bytes()));
        let stored = params(&parts.read("weight_scale")?);
        let stored =
            stored.map_err(|source| FormatError::Tensor { tensor: parts.name("weight_scale"), source })?;
        let (groups, scales) = match algorithm {
            Algorithm::Fp8 => (Groups::Tensor, stored),
            Algorithm::Nvfp4 => {
                let factor = scales::scalar(&parts, "weight_scale_2")?;
                (Groups::Row { len: BLOCK }, Params::Scaled { base: Box::new(stored), factor, divide: false })
            }
        };
        let mut weight = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0);
        weight.grid = spec.grid.grid(spec.bits).unwrap_or(weight.grid);
        let input = match (parts.find("input_scale"), algorithm) {
            (None, _) => ActSpec::Float,
            (Some(_), Algorithm::Fp8) => {
                scales::static_input(&parts, "input_scale", ActGrid::E4M3)?.unwrap_or_default()
            }
            (Some(_), Algorithm::Nvfp4) => {
                let factor = scales::scalar(&parts, "input_scale")?;
                ActSpec::TwoLevel { grid: ActGrid::E2M1, len: BLOCK, factor, divide: false }
            }
        };
        Ok(QuantizedLinear { input, ..parts.linear(weight)? })
    }
}
