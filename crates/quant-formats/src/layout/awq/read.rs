//! Reading AWQ layers.

use quant_core::{
    Codes, DType, GridKind, Groups, Offset, Params, ParamsKind, QuantSpec, QuantizedLinear, QuantizedMatrix,
    TensorError, codes,
};
use serde_json::Value;

use super::config::Config;
use super::{GEMM, GEMV, GEMV_FAST, Version, pack, zero_words};
use crate::error::FormatError;
use crate::layout::fields::GroupLen;
use crate::layout::parts::{FLOATS, Parts, params, transpose, transposed};
use crate::layout::{Layout, Reader, TensorSource};

/// Reads one checkpoint.
#[derive(Debug)]
pub(in crate::layout) struct AwqReader {
    config: Config,
}

/// What the headers of a layer's tensors say. All sizes are positive.
struct Geometry {
    version: Version,
    rows: usize,
    cols: usize,
    /// Groups per row.
    count: usize,
    /// Columns per group.
    len: usize,
    /// Groups per row that are stored.
    stored: usize,
    /// The tensor of zero points.
    zeros: &'static str,
}

impl AwqReader {
    pub(in crate::layout) fn new(config: &Value) -> Result<Self, FormatError> {
        Ok(Self { config: Config::parse(config)? })
    }

    fn geometry(&self, parts: &Parts<'_>) -> Result<Geometry, FormatError> {
        let (a, b) = parts.need_matrix("qweight", &[DType::I32, DType::I16], "two dimensions")?;
        let scales = parts.need_matrix("scales", FLOATS, "two dimensions")?;
        let i16 = parts.find("qweight").is_some_and(|(dtype, _)| dtype == DType::I16);
        let version = self.config.version.unwrap_or(match i16 {
            true => Version::GemvFast,
            false if Some(scales.1) == b.checked_mul(8) => Version::Gemm,
            false => Version::Gemv,
        });
        parts.need("qweight", &[if version == Version::GemvFast { DType::I16 } else { DType::I32 }])?;
        let (rows, cols) = match version {
            Version::Gemm => (b.checked_mul(8), Some(a)),
            Version::Gemv => (Some(a), b.checked_mul(8)),
            Version::GemvFast => (a.checked_mul(4), Some(b)),
        };
        let (Some(rows), Some(cols)) = (rows, cols) else {
            return Err(parts.misshapen(
                "qweight",
                &[a, b],
                "a size that can be addressed",
                "the AWQ layout",
            ));
        };
        if version == Version::GemvFast && !cols.is_multiple_of(64) {
            return Err(parts.misshapen(
                "qweight",
                &[a, b],
                "[outputs / 4, a multiple of 64]",
                "strips of 64 inputs",
            ));
        }
        let (len, stored) = self.groups(parts, version, (rows, cols), scales)?;
        let count = cols / len;
        let zeros = self.check_parameters(parts, version, rows, stored, scales)?;
        parts.check_bias(rows)?;
        Ok(Geometry { version, rows, cols, count, len, stored, zeros })
    }

    /// Columns per group, and groups that are stored for each row.
    fn groups(
        &self,
        parts: &Parts<'_>,
        version: Version,
        (rows, cols): (usize, usize),
        scales: (usize, usize),
    ) -> Result<(usize, usize), FormatError> {
        let given = self.config.group.map(|group| match group {
            GroupLen::Row => cols,
            GroupLen::Columns(len) => len,
        });
        let found = if version == Version::Gemv { scales.1 } else { scales.0 };
        let misshapen = |because: String| {
            let expected = match version {
                Version::Gemm => format!("[inputs / group, {rows}]"),
                Version::Gemv => format!("[{rows}, groups, padded]"),
                Version::GemvFast => format!("[groups, padded, {rows}]"),
            };
            parts.misshapen("scales", &[scales.0, scales.1], expected, because)
        };
        if let Some(len) = given.filter(|&len| !cols.is_multiple_of(len)) {
            return Err(FormatError::Config {
                field: "group_size".into(),
                found: len.to_string(),
                expected: format!(
                    "it must divide the {cols} inputs that the shape of {} means",
                    crate::display_name(&parts.name("qweight"))
                ),
            });
        }
        let stored = |len: usize| match version {
            Version::Gemm => Some(cols / len),
            Version::Gemv | Version::GemvFast => zero_words(cols, len).map(|words| 8 * words),
        };
        let fits = |&len: &usize| cols.is_multiple_of(len) && stored(len) == Some(found);
        let len = match (given, version) {
            (Some(len), _) => Some(len),
            (None, Version::Gemm) => Some(cols / found),
            (None, _) => [128, 64, 32, cols].into_iter().find(fits),
        };
        let Some(len) = len.filter(|&len| len > 0 && fits(&len)) else {
            let group = given.map_or("any group size".to_owned(), |len| format!("group size {len}"));
            return Err(misshapen(format!("{cols} inputs (by the shape of qweight) and {group}")));
        };
        Ok((len, found))
    }

    /// Checks scales and zero points; gives the name of the latter.
    fn check_parameters(
        &self,
        parts: &Parts<'_>,
        version: Version,
        rows: usize,
        stored: usize,
        scales: (usize, usize),
    ) -> Result<&'static str, FormatError> {
        let because = || format!("{rows} outputs (by the shape of qweight) and {stored} stored groups");
        let expected = if version == Version::Gemv { [rows, stored] } else { [stored, rows] };
        parts.shaped("scales", &[scales.0, scales.1], &expected, because)?;
        let (name, types, expected): (_, &[DType], _) = match version {
            Version::Gemm => ("qzeros", &[DType::I32], [stored, rows / 8]),
            Version::Gemv => ("qzeros", &[DType::I32], [rows, stored / 8]),
            Version::GemvFast => {
                let llm_awq = parts.find("qzeros").is_none() && parts.find("scaled_zeros").is_some();
                (if llm_awq { "scaled_zeros" } else { "qzeros" }, &[DType::F16], [stored, rows])
            }
        };
        parts.shaped(name, parts.need(name, types)?, &expected, because)?;
        Ok(name)
    }
}

impl Reader for AwqReader {
    fn layout(&self) -> &'static dyn Layout {
        match self.config.version {
            None | Some(Version::Gemm) => &GEMM,
            Some(Version::Gemv) => &GEMV,
            Some(Version::GemvFast) => &GEMV_FAST,
        }
    }

    fn spec(&self) -> Option<QuantSpec> {
        Some(QuantSpec {
            bits: 4,
            grid: GridKind::Int,
            group: self.config.group?.into(),
            scales: ParamsKind::F16,
            symmetric: self.config.zero_point == Some(false),
            act_order: false,
        })
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(&Parts { source, module, layout: "awq" }).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "awq" };
        let geometry = self.geometry(&parts)?;
        let &Geometry { version, rows, cols, count, len, stored, zeros } = &geometry;
        let tensor_error =
            |part: &str, source: TensorError| FormatError::Tensor { tensor: parts.name(part), source };

        let qweight = parts.read("qweight")?;
        let mut codes = Codes::zeros(4, rows, cols).map_err(|e| parts.invalid(e))?;
        match version {
            Version::Gemm => pack::from_gemm(qweight.bytes(), &mut codes),
            Version::Gemv => codes.row_chunks_mut(rows).for_each(|all| all.copy_from_slice(qweight.bytes())),
            Version::GemvFast => pack::from_strips(qweight.bytes(), &mut codes),
        }
        let scales = params(&parts.read("scales")?).map_err(|e| tensor_error("scales", e))?;
        let scales = self.by_output(&geometry, &scales);
        let stored_zeros = parts.read(zeros)?;
        let offset = match version {
            Version::GemvFast => {
                let shifts = params(&stored_zeros).map_err(|e| tensor_error(zeros, e))?;
                Offset::Shift { param: self.by_output(&geometry, &shifts), sign: 1.0 }
            }
            Version::Gemm => {
                let mut values = vec![0; stored * rows];
                codes::unpack(4, stored_zeros.bytes(), &mut values);
                Offset::Zero(Params::U8(transpose(&pack::from_gemm_order(&values), count, rows)))
            }
            Version::Gemv => {
                let mut values = vec![0; rows * stored];
                codes::unpack(4, stored_zeros.bytes(), &mut values);
                let values = values.chunks_exact(stored).flat_map(|row| &row[..count]).copied();
                Offset::Zero(Params::U8(values.collect()))
            }
        };
        parts.linear(QuantizedMatrix::affine(codes, Groups::Row { len }, scales, offset, 0))
    }
}

impl AwqReader {
    /// Stored parameters as `[out, groups]`, without padding.
    fn by_output(&self, geometry: &Geometry, params: &Params) -> Params {
        let &Geometry { version, rows, count, stored, .. } = geometry;
        let natural = match version {
            Version::Gemv => Some(params.clone()),
            _ => transposed(params, stored, rows),
        };
        fn cut<T: Copy>(values: &[T], stored: usize, count: usize) -> Vec<T> {
            values.chunks_exact(stored).flat_map(|row| &row[..count]).copied().collect()
        }
        match natural {
            Some(Params::F32(v)) => Params::F32(cut(&v, stored, count)),
            Some(Params::F16(v)) => Params::F16(cut(&v, stored, count)),
            Some(Params::BF16(v)) => Params::BF16(cut(&v, stored, count)),
            _ => params.clone(),
        }
    }
}
