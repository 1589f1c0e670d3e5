//! AWQ, as AutoAWQ and llm-awq pack it: three orders of the same 4-bit codes.
//!
//! For a layer of `K` inputs and `N` outputs in groups of `g` inputs, `G = K / g`:
//!
//! | layout | `qweight` | `qzeros` | `scales` |
//! |---|---|---|---|
//! | `awq` (GEMM) | I32 `[K, N / 8]` | I32 `[G, N / 8]` | F16 `[G, N]` |
//! | `awq_gemv` | I32 `[N, K / 8]` | I32 `[N, Zw]` | F16 `[N, 8 * Zw]` |
//! | `awq_gemv_fast` | I16 `[N / 4, K]` | F16 `[8 * Zw, N]` | F16 `[8 * Zw, N]` |
//!
//! `W[n, k] = scale * (code - zero)`, rounded to f16; the last one stores `-(scale * zero)` and adds it. `Zw` is the
//! number of words for `G` zero points, rounded up for the kernels; see [`zero_words`].

mod config;
mod pack;
mod read;

use half::f16;
use ndarray::Array2;
use quant_core::{
    DType, DenseTensor, GridKind, GroupSize, Offset, Params, ParamsKind, QuantizedLinear, QuantizedMatrix,
    codes,
};
use serde_json::{Value, json};

pub(super) use self::read::AwqReader;
use super::parts::{self, Writing, plain_bytes, transpose, transposed, unsupported};
use super::{Layout, PlannedLayer, Reader, StoredModel};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// The order of AutoAWQ's matrix kernel, its default.
pub(super) const GEMM: Awq = Awq { version: Version::Gemm };

/// The order of AutoAWQ's vector kernel.
pub(super) const GEMV: Awq = Awq { version: Version::Gemv };

/// The order of llm-awq.
pub(super) const GEMV_FAST: Awq = Awq { version: Version::GemvFast };

/// Order of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Gemm,
    Gemv,
    GemvFast,
}

/// The layout.
#[derive(Debug)]
pub(super) struct Awq {
    version: Version,
}

/// Words that hold one zero point per group, as AutoAWQ pads them: `None` for groups it has no kernel for.
fn zero_words(cols: usize, group: usize) -> Option<usize> {
    let multiple = match group {
        128.. => 1,
        64 => 2,
        32 => 4,
        _ => return None,
    };
    Some(cols.div_ceil(group).div_ceil(8).next_multiple_of(multiple))
}

impl Awq {
    fn refuse(&self, field: &'static str, found: impl ToString, remedy: &str) -> Result<(), Unsupported> {
        Err(unsupported(self.id(), field, found, remedy))
    }

    fn check_geometry(&self, bits: u8, rows: usize, cols: usize, group: usize) -> Result<(), Unsupported> {
        if bits != 4 {
            return self.refuse("bits", bits, "AWQ has 4 bits only; choose gptq");
        }
        let (row_unit, col_unit) = match self.version {
            Version::Gemm => (8, 1),
            Version::Gemv => (1, 8),
            Version::GemvFast => (4, 64),
        };
        for (field, n, unit) in [("output size", rows, row_unit), ("input size", cols, col_unit)] {
            if n == 0 || !n.is_multiple_of(unit) {
                let remedy =
                    format!("it must be a multiple of {unit}; leave this module in float (--exclude)");
                return self.refuse(field, n, &remedy);
            }
        }
        if !cols.is_multiple_of(group) {
            return self.refuse("group size", group, "it must divide the number of inputs");
        }
        if self.version != Version::Gemm && zero_words(cols, group).is_none() {
            return self.refuse("group size", group, "it must be 32, 64 or at least 128; or choose awq");
        }
        Ok(())
    }

    /// Codes in the order of this version.
    fn packed(&self, codes: &quant_core::Codes) -> Vec<u8> {
        match self.version {
            Version::Gemm => pack::to_gemm(codes),
            Version::Gemv => codes.bytes().to_vec(),
            Version::GemvFast => pack::to_strips(codes),
        }
    }
}

impl Layout for Awq {
    fn id(&self) -> &'static str {
        match self.version {
            Version::Gemm => "awq",
            Version::Gemv => "awq_gemv",
            Version::GemvFast => "awq_gemv_fast",
        }
    }

    fn description(&self) -> &'static str {
        match self.version {
            Version::Gemm => {
                "AWQ for matrix kernels: 4 bits with zero points, read by everybody that reads AWQ"
            }
            Version::Gemv => "AWQ for vector kernels, read by AutoAWQ",
            Version::GemvFast => "AWQ of llm-awq and of AutoAWQ's fast vector kernels",
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        &["awq"]
    }

    fn marker(&self) -> &'static str {
        "qweight"
    }

    fn module_of<'a>(&self, tensor: &'a str, _dtype: DType) -> Option<&'a str> {
        let (module, part) = tensor.rsplit_once('.')?;
        // `scales` is too common a name.
        matches!(part, "qweight" | "qzeros" | "scaled_zeros").then_some(module)
    }

    fn known_by(&self) -> &'static [&'static str] {
        &[".qweight"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        let spec = layer.spec;
        if !matches!(spec.group, GroupSize::Row | GroupSize::Columns(_)) {
            return self.refuse("group size", spec.group, "it has groups of columns, or -1 for whole rows");
        }
        self.check_geometry(spec.bits, layer.rows, layer.cols, spec.group.len(layer.cols))?;
        if spec.grid != GridKind::Int {
            return self.refuse("grid", spec.grid, "choose a method with integer codes");
        }
        if spec.scales != ParamsKind::F16 {
            return self.refuse("scales", format!("of {:?}", spec.scales), "its scales are F16");
        }
        if spec.act_order {
            return self.refuse("act-order", "(desc_act)", "quantize without it, or choose gptq");
        }
        parts::float_input(self.id(), layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, .. } = layer;
        let len = layer.spec.group.len(cols);
        let count = cols.div_ceil(len);
        let words = zero_words(cols, len).unwrap_or_default();
        let [qweight, qzeros, scales]: [(DType, [usize; 2]); 3] = match self.version {
            Version::Gemm => {
                [(DType::I32, [cols, rows / 8]), (DType::I32, [count, rows / 8]), (DType::F16, [count, rows])]
            }
            Version::Gemv => {
                [(DType::I32, [rows, cols / 8]), (DType::I32, [rows, words]), (DType::F16, [rows, 8 * words])]
            }
            Version::GemvFast => [
                (DType::I16, [rows / 4, cols]),
                (DType::F16, [8 * words, rows]),
                (DType::F16, [8 * words, rows]),
            ],
        };
        let parts = [("qweight", qweight), ("qzeros", qzeros), ("scales", scales)];
        let mut plan: Vec<_> =
            parts.into_iter().map(|(part, (dtype, shape))| layer.part(part, dtype, &shape)).collect();
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
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let (count, len) = writing.consecutive_groups()?;
        self.check_geometry(matrix.codes.bits(), rows, cols, len)?;
        writing.plain_scales(&matrix.scales)?;
        let qweight = self.packed(&matrix.codes);
        let mut tensors = match self.version {
            Version::Gemm => {
                let zeros = pack::to_gemm_order(&transpose(&writing.integer_zeros()?, rows, count));
                let (dtype, scales) = column_scales(&writing, count, count)?;
                vec![
                    writing.tensor("qweight", DType::I32, &[cols, rows / 8], qweight)?,
                    writing.tensor(
                        "qzeros",
                        DType::I32,
                        &[count, rows / 8],
                        packed_rows(&zeros, rows, rows / 2),
                    )?,
                    writing.tensor("scales", dtype, &[count, rows], scales)?,
                ]
            }
            Version::Gemv => {
                let words = zero_words(cols, len).unwrap_or_default();
                let zeros = packed_rows(&writing.integer_zeros()?, count, 4 * words);
                let scales = padded_rows(&matrix.scales, count, 8 * words);
                let (dtype, scales) = writing.plain_scales(&scales)?;
                vec![
                    writing.tensor("qweight", DType::I32, &[rows, cols / 8], qweight)?,
                    writing.tensor("qzeros", DType::I32, &[rows, words], zeros)?,
                    writing.tensor("scales", dtype, &[rows, 8 * words], scales)?,
                ]
            }
            Version::GemvFast => {
                let padded = 8 * zero_words(cols, len).unwrap_or_default();
                let (dtype, scales) = column_scales(&writing, count, padded)?;
                let shifts = transposed(&self.shifts(&writing)?, rows, count);
                let shifts = shifts.and_then(|s| plain_bytes(&s)).map(|(_, bytes)| bytes);
                let mut shifts = shifts.unwrap_or_default();
                shifts.resize(padded * rows * 2, 0);
                vec![
                    writing.tensor("qweight", DType::I16, &[rows / 4, cols], qweight)?,
                    writing.tensor("qzeros", DType::F16, &[padded, rows], shifts)?,
                    writing.tensor("scales", dtype, &[padded, rows], scales)?,
                ]
            }
        };
        tensors.extend(writing.bias());
        Ok(tensors)
    }

    fn mixes(&self) -> bool {
        false
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let version = match self.version {
            Version::Gemm => "gemm",
            Version::Gemv => "gemv",
            Version::GemvFast => "gemv_fast",
        };
        let skipped = model.exceptions.iter().filter(|(_, spec)| spec.is_none()).map(|(module, _)| module);
        let skipped: Vec<_> = skipped.collect();
        json!({
            "quant_method": "awq",
            "bits": model.spec.bits,
            "group_size": model.spec.group.as_config(),
            "zero_point": true,
            "version": version,
            "modules_to_not_convert": if skipped.is_empty() { Value::Null } else { json!(skipped) },
        })
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(AwqReader::new(config)?))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        let Offset::Shift { param, sign } = &matrix.offset else {
            return parts::rounded_to_scales(matrix);
        };
        // Product, then sum, each rounded to f16.
        let products = QuantizedMatrix { offset: Offset::None, ..matrix.clone() };
        let mut weights = parts::rounded_to_scales(&products);
        for ((r, c), w) in weights.indexed_iter_mut() {
            let shift = sign * param.get(matrix.groups.index(r, c, matrix.cols()));
            *w = f16::from_f32(*w + shift).to_f32();
        }
        weights
    }
}

impl Awq {
    /// `-(scale * zero)` in f16 for every group, or the shifts as they were read.
    fn shifts(&self, writing: &Writing<'_>) -> Result<Params, Unsupported> {
        let matrix = &writing.linear.weight;
        match &matrix.offset {
            Offset::Shift { param: param @ Params::F16(_), sign: 1.0 } => Ok(param.clone()),
            _ => {
                let zeros = writing.integer_zeros()?;
                let shift = |(i, &zero): (usize, &u8)| -f16::from_f32(matrix.scales.get(i) * f32::from(zero));
                Ok(Params::F16(zeros.iter().enumerate().map(shift).collect()))
            }
        }
    }
}

/// Codes of four bits `[n, len]`, each row packed and padded to `line` bytes.
fn packed_rows(values: &[u8], len: usize, line: usize) -> Vec<u8> {
    let rows = values.len().checked_div(len).unwrap_or(0);
    let mut bytes = vec![0; rows * line];
    let lines = values.chunks_exact(len.max(1)).zip(bytes.chunks_exact_mut(line.max(1)));
    lines.for_each(|(values, line)| codes::pack(4, values, line));
    bytes
}

/// Scales `[out, groups]` as `[padded, out]` with rows of zeros at the end.
fn column_scales(
    writing: &Writing<'_>,
    count: usize,
    padded: usize,
) -> Result<(DType, Vec<u8>), FormatError> {
    let scales = &writing.linear.weight.scales;
    let rows = writing.linear.weight.rows();
    let columns = transposed(scales, rows, count).unwrap_or_else(|| scales.clone());
    let (dtype, mut bytes) = writing.plain_scales(&columns)?;
    bytes.resize(padded * rows * dtype.bits() / 8, 0);
    Ok((dtype, bytes))
}

/// Parameters `[out, groups]` as `[out, padded]` with zeros at the end of each row.
fn padded_rows(params: &Params, count: usize, padded: usize) -> Params {
    fn pad<T: Copy + Default>(values: &[T], count: usize, padded: usize) -> Vec<T> {
        let fill = padded.saturating_sub(count);
        values
            .chunks_exact(count.max(1))
            .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(T::default(), fill)))
            .collect()
    }
    match params {
        Params::F32(v) => Params::F32(pad(v, count, padded)),
        Params::F16(v) => Params::F16(pad(v, count, padded)),
        Params::BF16(v) => Params::BF16(pad(v, count, padded)),
        other => other.clone(),
    }
}
