//! GPTQ of AutoGPTQ, GPTQModel, AutoRound and transformers.
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
//! kernels of its time added one; it can't tell a zero point of 0 from the greatest code plus one. The planar version
//! cuts codes in bit planes; see [`planes`].

mod auto_round;
mod config;
mod planes;
mod read;
mod words;

use ndarray::Array2;
use quant_core::{DType, DenseTensor, GridKind, GroupSize, Groups, QuantizedLinear, QuantizedMatrix, codes};
use serde_json::{Map, Value, json};

use self::read::GptqReader;
use super::parts::{self, Writing, float_type, transpose, transposed, unsupported};
use super::{Layout, PlannedLayer, Reader, StoredModel};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// Version 1.
pub(super) const V1: Gptq = Gptq { version: Version::V1 };

/// Version 2.
pub(super) const V2: Gptq = Gptq { version: Version::V2 };

/// The version with bit planes.
pub(super) const PLANAR: Gptq = Gptq { version: Version::Planar };

/// AutoRound's own, with any number of bits.
pub(super) const AUTO_ROUND: Gptq = Gptq { version: Version::AutoRound };

/// The same with the zero points of version 1, which AutoRound writes for symmetric models.
const AUTO_ROUND_V1: Gptq = Gptq { version: Version::AutoRoundV1 };

/// Bits per code that are read and written.
const BITS: [u8; 7] = [2, 3, 4, 5, 6, 7, 8];

/// Those of versions 1 and 2.
const STRAIGHT_BITS: [u8; 4] = [2, 3, 4, 8];

/// Group sizes that GPTQModel accepts, beside whole rows.
const GROUPS: [usize; 7] = [16, 32, 64, 128, 256, 512, 1024];

/// How zero points are stored, and how codes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// `zero - 1`, modulo the number of codes.
    V1,
    /// `zero`.
    V2,
    /// `zero`; codes and zero points are cut in bit planes.
    Planar,
    /// `zero`, any bits in one bit stream.
    AutoRound,
    /// `zero - 1`, any bits in one bit stream.
    AutoRoundV1,
}

impl Version {
    fn stores_minus_one(self) -> bool {
        matches!(self, Version::V1 | Version::AutoRoundV1)
    }

    fn bits(self) -> &'static [u8] {
        match self {
            Version::V1 | Version::V2 => &STRAIGHT_BITS,
            Version::Planar | Version::AutoRound | Version::AutoRoundV1 => &BITS,
        }
    }
}

/// The layout.
#[derive(Debug)]
pub(super) struct Gptq {
    version: Version,
}

impl Gptq {
    fn refuse(&self, field: &'static str, found: impl ToString, remedy: &str) -> Result<(), Unsupported> {
        Err(unsupported(self.id(), field, found, remedy))
    }

    fn check_geometry(&self, bits: u8, rows: usize, cols: usize) -> Result<(), Unsupported> {
        if !self.version.bits().contains(&bits) {
            let remedy = "choose 2, 3, 4 or 8; gptq_p and auto_round have 5, 6 and 7 too";
            return self.refuse("bits", bits, remedy);
        }
        for (field, n) in [("output size", rows), ("input size", cols)] {
            if n == 0 || !n.is_multiple_of(32) {
                let remedy = "sizes must be multiples of 32; leave this module in float (--exclude)";
                return self.refuse(field, n, remedy);
            }
        }
        Ok(())
    }

    /// Zero points `[out, groups]` as they are stored.
    fn stored_zeros(&self, writing: &Writing<'_>) -> Result<Vec<u8>, FormatError> {
        let mut zeros = writing.integer_zeros()?;
        if self.version.stores_minus_one() {
            if zeros.contains(&0) {
                let remedy = "version 1 stores zero - 1 and starts at 1; choose gptq_v2";
                return Err(writing.unsupported("zero point", 0, remedy).into());
            }
            zeros.iter_mut().for_each(|zero| *zero -= 1);
        }
        Ok(zeros)
    }
}

impl Layout for Gptq {
    fn id(&self) -> &'static str {
        match self.version {
            Version::V1 => "gptq",
            Version::V2 => "gptq_v2",
            Version::Planar => "gptq_p",
            Version::AutoRound | Version::AutoRoundV1 => "auto_round",
        }
    }

    fn description(&self) -> &'static str {
        match self.version {
            Version::V1 => "GPTQ version 1: integer codes of 2, 3, 4, 8 bits, symmetric, read by everybody",
            Version::V2 => "GPTQ version 2: the same with free zero points (asymmetric), read by GPTQModel",
            Version::Planar => "GPTQ in bit planes: 2 to 8 bits, read by GPTQModel from 7.4 on",
            Version::AutoRound | Version::AutoRoundV1 => "GPTQ as AutoRound packs it: 2 to 8 bits",
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        match self.version {
            Version::V1 | Version::V2 | Version::Planar => &["gptq"],
            Version::AutoRound | Version::AutoRoundV1 => &["auto-round", "intel/auto-round"],
        }
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
                return self.refuse("group size", other, remedy);
            }
        }
        if spec.grid != GridKind::Int {
            return self.refuse("grid", spec.grid, "choose a method with integer codes");
        }
        if float_type(spec.scales).is_none() {
            return self.refuse(
                "scales",
                format!("of {:?}", spec.scales),
                "it has scales of F16, BF16 or F32",
            );
        }
        if self.version.stores_minus_one() && !spec.symmetric {
            let remedy = "version 1 has no zero point of 0; choose gptq_v2, or a symmetric grid";
            return self.refuse("an asymmetric grid", "safely", remedy);
        }
        parts::float_input(self.id(), layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, spec, .. } = layer;
        let bits = usize::from(spec.bits);
        let groups = cols.div_ceil(spec.group.len(cols));
        let scales = float_type(spec.scales).unwrap_or(DType::F16);
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
        let writing = Writing::new(self.id(), linear, module)?;
        writing.float_input()?;
        let matrix = &linear.weight;
        let (rows, cols, bits) = (matrix.rows(), matrix.cols(), matrix.codes.bits());
        self.check_geometry(bits, rows, cols)?;
        let (count, stored_group): (usize, Box<dyn Fn(usize) -> usize>) = match &matrix.groups {
            &Groups::Row { len } => (cols.div_ceil(len), Box::new(move |c| c / len)),
            Groups::Index { of_col, count } => (*count, Box::new(|c| of_col[c] as usize)),
            _ => {
                let remedy = "gptq has groups of columns of one row only";
                return Err(writing.unsupported("groups", "of this form", remedy).into());
            }
        };
        let perm = matrix.input_perm.as_ref();
        let mut g_idx = vec![0; cols];
        for c in 0..cols {
            let feature = perm.map_or(c, |p| p.features()[c] as usize);
            g_idx[feature] = stored_group(c) as i32;
        }
        let planar = self.version == Version::Planar;
        let zeros = transpose(&self.stored_zeros(&writing)?, rows, count);
        let line = rows * usize::from(bits) / 8;
        let mut qzeros = vec![0; count * line];
        zeros.chunks(rows).zip(qzeros.chunks_mut(line)).for_each(|(z, out)| codes::pack(bits, z, out));
        if planar {
            planes::cut(bits, &mut qzeros);
        }
        let scales = transposed(&matrix.scales, rows, count).unwrap_or_else(|| matrix.scales.clone());
        let (scale_type, scales) = writing.plain_scales(&scales)?;
        let qweight = words::to_words(&matrix.codes, planar, perm);
        let g_idx: Vec<u8> = g_idx.iter().flat_map(|g: &i32| g.to_le_bytes()).collect();
        let mut tensors = vec![
            writing.tensor("qweight", DType::I32, &[cols * usize::from(bits) / 32, rows], qweight)?,
            writing.tensor("qzeros", DType::I32, &[count, line / 4], qzeros)?,
            writing.tensor("scales", scale_type, &[count, rows], scales)?,
            writing.tensor("g_idx", DType::I32, &[cols], g_idx)?,
        ];
        tensors.extend(writing.bias());
        Ok(tensors)
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        if let Version::AutoRound | Version::AutoRoundV1 = self.version {
            return auto_round::config(model, self.version);
        }
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

    fn side_files(&self, config: &Value, _layers: &[PlannedLayer<'_>]) -> Vec<(String, Vec<u8>)> {
        let name = match self.version {
            Version::V1 | Version::V2 | Version::Planar => "quantize_config.json",
            Version::AutoRound | Version::AutoRoundV1 => "quantization_config.json",
        };
        vec![(name.into(), format!("{config:#}\n").into_bytes())]
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        match self.version {
            Version::V1 | Version::V2 | Version::Planar => Ok(Box::new(GptqReader::new(config)?)),
            Version::AutoRound | Version::AutoRoundV1 => auto_round::reader(config),
        }
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        // The difference is an integer of at most nine bits.
        parts::rounded_to_scales(matrix)
    }
}
