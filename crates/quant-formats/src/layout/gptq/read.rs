//! Reading GPTQ layers.

use quant_core::{
    Codes, DType, GridKind, Groups, Offset, Params, ParamsKind, Permutation, QuantSpec, QuantizedLinear,
    QuantizedMatrix, codes,
};
use serde_json::Value;

use super::config::Config;
use super::{AUTO_ROUND, AUTO_ROUND_V1, BITS, PLANAR, STRAIGHT_BITS, V1, V2, Version, planes, words};
use crate::error::FormatError;
use crate::layout::fields::GroupLen;
use crate::layout::parts::{FLOATS, Parts, groups_of, params, transpose, transposed};
use crate::layout::{Layout, Reader, TensorSource};

/// Reads one checkpoint.
#[derive(Debug)]
pub(super) struct GptqReader {
    config: Config,
}

/// What the headers of a layer's tensors say. All sizes are positive.
struct Geometry {
    rows: usize,
    cols: usize,
    bits: u8,
    count: usize,
    /// Columns per group by the configuration, or an even division.
    group: usize,
    /// Codes are cut in bit planes.
    planar: bool,
    has_g_idx: bool,
}

impl GptqReader {
    pub(super) fn new(config: &Value) -> Result<Self, FormatError> {
        Ok(Self { config: Config::parse(config)? })
    }

    /// A reader of files that do not name their version.
    pub(super) fn of_version(config: &Value, version: Version) -> Result<Self, FormatError> {
        Ok(Self { config: Config::of_version(config, version)? })
    }

    fn geometry(&self, parts: &Parts<'_>) -> Result<Geometry, FormatError> {
        let (words, rows) = parts.need_matrix("qweight", &[DType::I32], "[inputs * bits / 32, outputs]")?;
        let settings = self.config.settings(parts.module);
        let g_idx = parts.find("g_idx");
        let shown = crate::display_name(parts.module);
        let bits = settings.bits.or_else(|| bits_of(words, g_idx?.1)).ok_or_else(|| FormatError::Config {
            field: "bits".into(),
            found: "absent".into(),
            expected: format!("it must be given where g_idx does not tell ({shown})"),
        })?;
        let planar = match self.config.version {
            Version::V1 if !STRAIGHT_BITS.contains(&bits) => {
                return Err(FormatError::Config {
                    field: "bits".into(),
                    found: bits.to_string(),
                    expected: format!(
                        "gptq has 2, 3, 4 and 8 bits, gptq_p and auto-round 5 to 7 too ({shown})"
                    ),
                });
            }
            // GPTQModel knows no other packing of these.
            Version::V2 => !STRAIGHT_BITS.contains(&bits),
            version => version == Version::Planar,
        };
        let b = usize::from(bits);
        let whole = |n: usize| n.checked_mul(b).is_some_and(|n| n.is_multiple_of(32));
        let cols = words.checked_mul(32).filter(|n| n.is_multiple_of(b)).map_or(0, |n| n / b);
        if cols == 0 || !whole(rows) || planar && !(rows.is_multiple_of(32) && cols.is_multiple_of(32)) {
            let expected = "whole words along inputs and outputs";
            return Err(parts.misshapen("qweight", &[words, rows], expected, format!("{bits} bits")));
        }
        let because = || format!("qweight [{words}, {rows}] at {bits} bits");
        if let Some((dtype, shape)) = g_idx {
            parts.typed("g_idx", dtype, &[DType::I32])?;
            parts.shaped("g_idx", shape, &[cols], because)?;
        }
        let scales = parts.need("scales", FLOATS)?;
        let count = match settings.group {
            Some(GroupLen::Row) => 1,
            Some(GroupLen::Columns(len)) => cols.div_ceil(len),
            None => scales.first().copied().unwrap_or(0).clamp(1, cols),
        };
        let group = match settings.group {
            Some(GroupLen::Columns(len)) => len.min(cols),
            _ => cols.div_ceil(count),
        };
        parts.shaped("scales", scales, &[count, rows], || {
            format!("{} and group size {group} of {cols} inputs", because())
        })?;
        parts.shaped("qzeros", parts.need("qzeros", &[DType::I32])?, &[count, rows * b / 32], || {
            format!("{count} groups, {rows} outputs, {bits} bits")
        })?;
        parts.check_bias(rows)?;
        Ok(Geometry { rows, cols, bits, count, group, planar, has_g_idx: g_idx.is_some() })
    }

    /// Groups in stored order and, for act-order, the permutation that sorts columns by group.
    fn groups(
        &self,
        parts: &Parts<'_>,
        geometry: &Geometry,
    ) -> Result<(Groups, Option<Permutation>), FormatError> {
        let &Geometry { count, group, .. } = geometry;
        if !geometry.has_g_idx {
            return Ok((Groups::Row { len: group }, None));
        }
        Ok(groups_of(parts.read_groups("g_idx", count)?, count, group))
    }
}

/// Bits per code, where the configuration does not say: by the number of inputs that share `words`.
fn bits_of(words: usize, g_idx: &[usize]) -> Option<u8> {
    let &[cols] = g_idx else { return None };
    BITS.into_iter().find(|&b| cols.checked_mul(usize::from(b)) == words.checked_mul(32) && cols > 0)
}

impl Reader for GptqReader {
    fn layout(&self) -> &'static dyn Layout {
        match self.config.version {
            Version::V1 => &V1,
            Version::V2 => &V2,
            Version::Planar => &PLANAR,
            Version::AutoRound => &AUTO_ROUND,
            Version::AutoRoundV1 => &AUTO_ROUND_V1,
        }
    }

    fn spec(&self) -> Option<QuantSpec> {
        let group = self.config.base.group?.into();
        Some(QuantSpec {
            bits: self.config.base.bits?,
            grid: GridKind::Int,
            group,
            scales: ParamsKind::F16,
            symmetric: self.config.symmetric.unwrap_or(true),
            act_order: self.config.act_order.unwrap_or(false),
        })
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(&Parts { source, module, layout: "gptq" }).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "gptq" };
        let geometry = self.geometry(&parts)?;
        let &Geometry { rows, cols, bits, count, planar, .. } = &geometry;

        let (groups, perm) = self.groups(&parts, &geometry)?;
        let mut codes = Codes::zeros(bits, rows, cols).map_err(|e| parts.invalid(e))?;
        words::from_words(parts.read("qweight")?.bytes(), &mut codes, planar, perm.as_ref());

        let mut qzeros = parts.read("qzeros")?.bytes().to_vec();
        if planar {
            planes::join(bits, &mut qzeros);
        }
        let mut zeros = vec![0; rows * count];
        let line = rows * usize::from(bits) / 8;
        zeros.chunks_mut(rows).zip(qzeros.chunks(line)).for_each(|(z, l)| codes::unpack(bits, l, z));
        if self.config.version.stores_minus_one() {
            zeros.iter_mut().for_each(|z| *z = z.wrapping_add(1) & codes.max());
        }
        let zeros = Params::U8(transpose(&zeros, count, rows));

        let scales = params(&parts.read("scales")?);
        let scales = scales.map_err(|source| FormatError::Tensor { tensor: parts.name("scales"), source })?;
        let scales = transposed(&scales, count, rows).unwrap_or(scales);
        let mut weight = QuantizedMatrix::affine(codes, groups, scales, Offset::Zero(zeros), 0);
        weight.input_perm = perm;
        parts.linear(weight)
    }
}
