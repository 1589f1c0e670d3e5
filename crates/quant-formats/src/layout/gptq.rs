//! GPTQ, versions 1 and 2, of AutoGPTQ, GPTQModel and transformers.
//!
//! For a layer of `K` inputs and `N` outputs in groups of `g` inputs:
//!
//! | tensor | type | shape | content |
//! |---|---|---|---|
//! | `qweight` | I32 | `[K * bits / 32, N]` | codes, packed along the inputs |
//! | `qzeros` | I32 | `[K / g, N * bits / 32]` | zero points, packed along the outputs |
//! | `scales` | F16, BF16, F32 | `[K / g, N]` | |
//! | `g_idx` | I32 | `[K]` | group of each input |
//!
//! `W[n, k] = scale * (code - zero)`, rounded to the type of the scales. Version 1 stores `zero - 1`, because the
//! kernels of its time added one; it can't tell a zero point of 0 from the greatest code plus one.

mod config;
mod read;
mod words;

use std::sync::Arc;

use half::{bf16, f16};
use ndarray::Array2;
use quant_core::{
    ActSpec, DType, DenseTensor, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind,
    QuantizedLinear, QuantizedMatrix, codes,
};
use serde_json::{Map, Value, json};

use self::read::GptqReader;
use super::{Layout, PlannedLayer, Reader, StoredModel};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// Version 1.
pub(super) const V1: Gptq = Gptq { version: Version::V1 };

/// Version 2.
pub(super) const V2: Gptq = Gptq { version: Version::V2 };

/// Bits per code that are read and written.
const BITS: [u8; 4] = [2, 3, 4, 8];

/// Group sizes that GPTQModel accepts, beside whole rows.
const GROUPS: [usize; 7] = [16, 32, 64, 128, 256, 512, 1024];

/// How zero points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// `zero - 1`, modulo the number of codes.
    V1,
    /// `zero`.
    V2,
}

/// The layout.
#[derive(Debug)]
pub(super) struct Gptq {
    version: Version,
}

impl Gptq {
    fn unsupported(&self, field: &'static str, found: impl ToString, remedy: impl ToString) -> Unsupported {
        Unsupported { layout: self.id(), field, found: found.to_string(), remedy: remedy.to_string() }
    }

    fn check_geometry(&self, bits: u8, rows: usize, cols: usize) -> Result<(), Unsupported> {
        if !BITS.contains(&bits) {
            return Err(self.unsupported("bits", bits, "choose 2, 3, 4 or 8"));
        }
        for (field, n) in [("output size", rows), ("input size", cols)] {
            if n == 0 || !n.is_multiple_of(32) {
                let remedy = "sizes must be multiples of 32; leave this module in float (--exclude)";
                return Err(self.unsupported(field, n, remedy));
            }
        }
        Ok(())
    }

    /// Zero points `[out, groups]` as they are stored.
    fn stored_zeros(&self, matrix: &QuantizedMatrix, count: usize) -> Result<Vec<u8>, FormatError> {
        let Grid::Int { midpoint } = matrix.grid else {
            let remedy = "gptq has evenly spaced codes; choose a layout with a table";
            return Err(self.unsupported("a table of values", "as grid", remedy).into());
        };
        let max = f32::from(matrix.codes.max());
        let mut stored = Vec::with_capacity(count);
        for i in 0..count {
            let zero = match &matrix.offset {
                Offset::None => 0.0,
                Offset::Zero(zeros) => zeros.get(i),
                Offset::Shift { .. } => {
                    let remedy = "gptq has integer zero points only";
                    return Err(self.unsupported("shifts", "that are added", remedy).into());
                }
            } + midpoint as f32;
            if zero.fract() != 0.0 || !(0.0..=max).contains(&zero) {
                let remedy = format!("zero points must be integers from 0 to {max}");
                return Err(self.unsupported("zero point", zero, remedy).into());
            }
            // Exact: an integer of at most 255.
            stored.push(match (self.version, zero as u8) {
                (Version::V1, 0) => {
                    let remedy = "version 1 stores zero - 1 and starts at 1; choose gptq_v2";
                    return Err(self.unsupported("zero point", 0, remedy).into());
                }
                (Version::V1, zero) => zero - 1,
                (Version::V2, zero) => zero,
            });
        }
        Ok(stored)
    }
}

impl Layout for Gptq {
    fn id(&self) -> &'static str {
        match self.version {
            Version::V1 => "gptq",
            Version::V2 => "gptq_v2",
        }
    }

    fn description(&self) -> &'static str {
        match self.version {
            Version::V1 => "GPTQ version 1: integer codes of 2, 3, 4, 8 bits, symmetric, read by everybody",
            Version::V2 => "GPTQ version 2: the same with free zero points (asymmetric), read by GPTQModel",
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        &["gptq", "auto-round", "intel/auto-round"]
    }

    fn marker(&self) -> &'static str {
        "qweight"
    }

    fn module_of<'a>(&self, tensor: &'a str, _dtype: DType) -> Option<&'a str> {
        let (module, part) = tensor.rsplit_once('.')?;
        // `scales` is too common a name.
        matches!(part, "qweight" | "qzeros" | "g_idx").then_some(module)
    }

    fn known_by(&self) -> &'static [&'static str] {
        &[".g_idx"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        let spec = layer.spec;
        self.check_geometry(spec.bits, layer.rows, layer.cols)?;
        match spec.group {
            GroupSize::Row => {}
            GroupSize::Columns(len) if GROUPS.contains(&len) => {}
            other => {
                let remedy = "its readers accept 16, 32, 64, 128, 256, 512, 1024 and -1 (whole rows)";
                return Err(self.unsupported("group size", other, remedy));
            }
        }
        if spec.grid != GridKind::Int {
            return Err(self.unsupported("grid", spec.grid, "choose a method with integer codes"));
        }
        if !matches!(spec.scales, ParamsKind::F16 | ParamsKind::BF16 | ParamsKind::F32) {
            let remedy = "gptq has scales of F16, BF16 or F32";
            return Err(self.unsupported("scales", format!("{:?}", spec.scales), remedy));
        }
        if *layer.input != ActSpec::Float {
            return Err(self.unsupported("quantized activations", "beside codes", "choose another layout"));
        }
        if self.version == Version::V1 && !spec.symmetric {
            let remedy = "version 1 has no zero point of 0; choose gptq_v2, or a symmetric grid";
            return Err(self.unsupported("an asymmetric grid", "safely", remedy));
        }
        Ok(())
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, spec, .. } = layer;
        let bits = usize::from(spec.bits);
        let groups = cols.div_ceil(spec.group.len(cols));
        let scales = match spec.scales {
            ParamsKind::F32 => DType::F32,
            ParamsKind::BF16 => DType::BF16,
            _ => DType::F16,
        };
        let mut plan = vec![
            layer.part("qweight", DType::I32, &[cols * bits / 32, rows]),
            layer.part("qzeros", DType::I32, &[groups, rows * bits / 32]),
            layer.part("scales", scales, &[groups, rows]),
            layer.part("g_idx", DType::I32, &[cols]),
        ];
        plan.extend(layer.bias_part());
        plan
    }

    fn write(
        &self,
        linear: &QuantizedLinear,
        module: &str,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError> {
        let matrix = &linear.weight;
        let invalid = |source| FormatError::Matrix { module: module.to_owned(), source };
        matrix.validate().map_err(invalid)?;
        let (rows, cols, bits) = (matrix.rows(), matrix.cols(), matrix.codes.bits());
        self.check_geometry(bits, rows, cols)?;
        let extra = [
            ("row scales", matrix.row_scale.is_some()),
            ("column scales", matrix.col_scale.is_some()),
            ("outlier columns", matrix.outliers.is_some()),
            ("a low-rank part", linear.low_rank.is_some()),
            ("quantized activations", linear.input != ActSpec::Float),
        ];
        if let Some((part, _)) = extra.iter().find(|(_, present)| *present) {
            return Err(self.unsupported(part, "beside codes", "choose another layout").into());
        }
        let (count, stored_group): (usize, Box<dyn Fn(usize) -> usize>) = match &matrix.groups {
            &Groups::Row { len } => (cols.div_ceil(len), Box::new(move |c| c / len)),
            Groups::Index { of_col, count } => (*count, Box::new(|c| of_col[c] as usize)),
            _ => {
                let remedy = "gptq has groups of columns of one row only";
                return Err(self.unsupported("groups", "of this form", remedy).into());
            }
        };
        let perm = matrix.input_perm.as_ref();
        let mut g_idx = vec![0; cols];
        for c in 0..cols {
            let feature = perm.map_or(c, |p| p.features()[c] as usize);
            g_idx[feature] = stored_group(c) as i32;
        }
        let zeros = transpose(&self.stored_zeros(matrix, rows * count)?, rows, count);
        let mut qzeros = vec![0; count * rows * usize::from(bits) / 8];
        if count > 0 {
            let line = rows * usize::from(bits) / 8;
            zeros.chunks(rows).zip(qzeros.chunks_mut(line)).for_each(|(z, out)| codes::pack(bits, z, out));
        }
        let (scale_type, scale_bytes) = self.scale_bytes(&matrix.scales, rows, count)?;
        let tensor = |part: &str, dtype, shape: Vec<usize>, bytes: Arc<[u8]>| {
            let name = format!("{module}.{part}");
            match DenseTensor::new(dtype, shape, bytes) {
                Ok(tensor) => Ok((name, tensor)),
                Err(source) => Err(FormatError::Tensor { tensor: name, source }),
            }
        };
        let bits = usize::from(bits);
        let g_idx = g_idx.iter().flat_map(|g: &i32| g.to_le_bytes()).collect();
        let mut tensors = vec![
            tensor(
                "qweight",
                DType::I32,
                vec![cols * bits / 32, rows],
                words::to_words(&matrix.codes, perm),
            )?,
            tensor("qzeros", DType::I32, vec![count, rows * bits / 32], qzeros.into())?,
            tensor("scales", scale_type, vec![count, rows], scale_bytes.into())?,
            tensor("g_idx", DType::I32, vec![cols], g_idx)?,
        ];
        tensors.extend(linear.bias.clone().map(|bias| (format!("{module}.bias"), bias)));
        Ok(tensors)
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let spec = model.spec;
        let mut meta = Map::new();
        meta.insert("quantizer".into(), json!([concat!("quant:", env!("CARGO_PKG_VERSION"))]));
        meta.insert("uri".into(), env!("CARGO_PKG_REPOSITORY").into());
        meta.extend(model.meta.clone());
        let mut config = json!({
            "bits": spec.bits,
            "group_size": spec.group.as_config(),
            "desc_act": spec.act_order,
            "lm_head": false,
            "method": "gptq",
            "quant_method": "gptq",
            "format": self.id(),
            "checkpoint_format": self.id(),
            "pack_dtype": "int32",
            "meta": meta,
            "sym": spec.symmetric,
        });
        let rules = model.exceptions.iter().map(|(module, exception)| {
            let path = regex::escape(module);
            match exception {
                None => (format!("-:^{path}$"), json!({})),
                Some(spec) => {
                    let group = spec.group.as_config();
                    let (bits, act_order, symmetric) = (spec.bits, spec.act_order, spec.symmetric);
                    let rule =
                        json!({ "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric });
                    (format!("+:^{path}$"), rule)
                }
            }
        });
        let rules: Map<String, Value> = rules.collect();
        if !rules.is_empty() {
            config["dynamic"] = rules.into();
        }
        config
    }

    fn side_files(&self, config: &Value) -> Vec<(String, Vec<u8>)> {
        vec![("quantize_config.json".into(), format!("{config:#}\n").into_bytes())]
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(GptqReader::new(config)?))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        // The difference is an integer of at most nine bits, so a product with an f16 or bf16 scale is exact in
        // f32, and rounding it once is what multiplying in the scale's own type does.
        let mut weights = matrix.dequantize();
        match matrix.scales {
            Params::F16(_) => weights.mapv_inplace(|w| f16::from_f32(w).to_f32()),
            Params::BF16(_) => weights.mapv_inplace(|w| bf16::from_f32(w).to_f32()),
            _ => {}
        }
        weights
    }
}

impl Gptq {
    /// Scales `[out, groups]` to the bytes of `[groups, out]`.
    fn scale_bytes(
        &self,
        scales: &Params,
        rows: usize,
        count: usize,
    ) -> Result<(DType, Vec<u8>), FormatError> {
        let bytes = |v: Vec<[u8; 2]>| v.as_flattened().to_vec();
        Ok(match scales {
            Params::F16(v) => {
                (DType::F16, bytes(transpose(v, rows, count).into_iter().map(f16::to_le_bytes).collect()))
            }
            Params::BF16(v) => {
                (DType::BF16, bytes(transpose(v, rows, count).into_iter().map(bf16::to_le_bytes).collect()))
            }
            Params::F32(v) => {
                (DType::F32, transpose(v, rows, count).into_iter().flat_map(f32::to_le_bytes).collect())
            }
            _ => {
                let remedy = "gptq has scales of F16, BF16 or F32";
                return Err(self.unsupported("scales", "of two levels or one byte", remedy).into());
            }
        })
    }
}

/// `[rows, cols]` to `[cols, rows]`.
fn transpose<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
}
