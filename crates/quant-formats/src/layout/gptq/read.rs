//! Reading GPTQ layers.

use half::{bf16, f16};
use quant_core::{
    Codes, DType, DenseTensor, GridKind, GroupSize, Groups, MatrixError, Offset, Params, ParamsKind,
    Permutation, QuantSpec, QuantizedLinear, QuantizedMatrix, codes,
};
use serde_json::Value;

use super::config::{Config, GroupLen};
use super::{BITS, V1, V2, Version, transpose, words};
use crate::error::FormatError;
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
    has_g_idx: bool,
    has_bias: bool,
}

impl GptqReader {
    pub(super) fn new(config: &Value) -> Result<Self, FormatError> {
        Ok(Self { config: Config::parse(config)? })
    }

    fn geometry(&self, source: &dyn TensorSource, module: &str) -> Result<Geometry, FormatError> {
        let name = |part: &str| format!("{module}.{part}");
        let need = |part: &str| {
            let because = || format!("{} has other parts of a gptq layer", crate::display_name(module));
            source
                .lookup(&name(part))
                .ok_or_else(|| FormatError::Missing { tensor: name(part), because: because() })
        };
        let typed = |part: &str, dtype, expected, ok: bool| match ok {
            true => Ok(()),
            false => Err(FormatError::TensorDType { tensor: name(part), expected, found: dtype }),
        };
        let shaped = |part: &str, found: &[usize], expected: &[usize], because: &dyn Fn() -> String| {
            if found == expected {
                return Ok(());
            }
            let (expected, found) = (format!("{expected:?}"), found.to_vec());
            Err(FormatError::TensorShape { tensor: name(part), expected, found, because: because() })
        };

        let (dtype, qweight) = need("qweight")?;
        typed("qweight", dtype, "I32", dtype == DType::I32)?;
        let &[words, rows] = qweight else {
            return Err(FormatError::TensorShape {
                tensor: name("qweight"),
                expected: "[inputs * bits / 32, outputs]".into(),
                found: qweight.to_vec(),
                because: "the gptq layout".into(),
            });
        };
        let settings = self.config.settings(module);
        let g_idx = source.lookup(&name("g_idx"));
        let bits = settings.bits.or_else(|| bits_of(words, g_idx?.1)).ok_or_else(|| FormatError::Config {
            field: "bits".into(),
            found: "absent".into(),
            expected: format!("it must be given where g_idx does not tell ({})", crate::display_name(module)),
        })?;
        let b = usize::from(bits);
        let whole = |n: usize| n > 0 && (n.checked_mul(b)).is_some_and(|n| n.is_multiple_of(32));
        let cols = words.checked_mul(32).filter(|n| n.is_multiple_of(b)).map_or(0, |n| n / b);
        if cols == 0 || !whole(rows) {
            return Err(FormatError::TensorShape {
                tensor: name("qweight"),
                expected: "whole words along inputs and outputs".into(),
                found: qweight.to_vec(),
                because: format!("{bits} bits"),
            });
        }
        let because = || format!("qweight {qweight:?} at {bits} bits");
        if let Some((dtype, shape)) = g_idx {
            typed("g_idx", dtype, "I32", dtype == DType::I32)?;
            shaped("g_idx", shape, &[cols], &because)?;
        }
        let (dtype, scales) = need("scales")?;
        typed("scales", dtype, "F16, BF16 or F32", matches!(dtype, DType::F16 | DType::BF16 | DType::F32))?;
        let count = match settings.group {
            Some(GroupLen::Row) => 1,
            Some(GroupLen::Columns(len)) => cols.div_ceil(len),
            None => scales.first().copied().unwrap_or(0).clamp(1, cols),
        };
        let group = match settings.group {
            Some(GroupLen::Columns(len)) => len.min(cols),
            _ => cols.div_ceil(count),
        };
        shaped("scales", scales, &[count, rows], &|| {
            format!("qweight {qweight:?} at {bits} bits and group size {group} of {cols} inputs")
        })?;
        let (dtype, qzeros) = need("qzeros")?;
        typed("qzeros", dtype, "I32", dtype == DType::I32)?;
        shaped("qzeros", qzeros, &[count, rows * b / 32], &|| {
            format!("{count} groups, {rows} outputs, {bits} bits")
        })?;
        let bias = source.lookup(&name("bias"));
        if let Some((dtype, shape)) = bias {
            typed("bias", dtype, "a float type", dtype.is_float())?;
            shaped("bias", shape, &[rows], &because)?;
        }
        Ok(Geometry { rows, cols, bits, count, group, has_g_idx: g_idx.is_some(), has_bias: bias.is_some() })
    }

    /// Which columns share a scale, and the order in which columns are stored for that.
    fn groups(
        &self,
        source: &dyn TensorSource,
        module: &str,
        geometry: &Geometry,
    ) -> Result<(Groups, Option<Permutation>), FormatError> {
        let &Geometry { cols, count, group, has_g_idx, .. } = geometry;
        let consecutive = Groups::Row { len: group };
        if !has_g_idx {
            return Ok((consecutive, None));
        }
        let name = format!("{module}.g_idx");
        let g_idx = source.read(&name)?.to_i32();
        let g_idx = g_idx.map_err(|source| FormatError::Tensor { tensor: name.clone(), source })?;
        let of_col = g_idx.iter().enumerate().map(|(index, &g)| {
            let group = u32::try_from(g).ok().filter(|&g| (g as usize) < count);
            group.ok_or_else(|| FormatError::Value {
                tensor: name.clone(),
                index,
                found: g.to_string(),
                expected: format!("out of range: the layer has groups 0 to {}", count - 1),
            })
        });
        let of_col = of_col.collect::<Result<Vec<u32>, _>>()?;
        let trivial = of_col.iter().enumerate().all(|(c, &g)| g as usize == c / group);
        // Some writers leave g_idx at zero where columns are not reordered.
        if trivial || of_col.iter().all(|&g| g == 0) {
            return Ok((consecutive, None));
        }
        let mut sizes = vec![0; count];
        of_col.iter().for_each(|&g| sizes[g as usize] += 1);
        let full = |g: usize| if g + 1 < count { group } else { cols.saturating_sub(group * (count - 1)) };
        if sizes.iter().enumerate().all(|(g, &size)| size == full(g)) {
            return Ok((consecutive, Permutation::sorting_groups(&of_col)));
        }
        Ok((Groups::Index { of_col: of_col.into(), count }, None))
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
        }
    }

    fn spec(&self) -> Option<QuantSpec> {
        let group = match self.config.base.group? {
            GroupLen::Row => GroupSize::Row,
            GroupLen::Columns(len) => GroupSize::Columns(len),
        };
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
        self.geometry(source, module).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let geometry = self.geometry(source, module)?;
        let &Geometry { rows, cols, bits, count, .. } = &geometry;
        let read = |part: &str| source.read(&format!("{module}.{part}"));
        let invalid = |source: MatrixError| FormatError::Matrix { module: module.to_owned(), source };

        let (groups, perm) = self.groups(source, module, &geometry)?;
        let mut codes = Codes::zeros(bits, rows, cols).map_err(invalid)?;
        words::from_words(read("qweight")?.bytes(), &mut codes, perm.as_ref());

        let qzeros = read("qzeros")?;
        let mut zeros = vec![0; rows * count];
        let line = rows * usize::from(bits) / 8;
        zeros.chunks_mut(rows).zip(qzeros.bytes().chunks(line)).for_each(|(z, l)| codes::unpack(bits, l, z));
        if self.config.version == Version::V1 {
            zeros.iter_mut().for_each(|z| *z = z.wrapping_add(1) & codes.max());
        }
        let zeros = Params::U8(transpose(&zeros, count, rows));

        let scales = read("scales")?;
        let scales = match scales.dtype() {
            DType::F16 => Params::F16(elements(&scales, count, rows, f16::from_le_bytes)),
            DType::BF16 => Params::BF16(elements(&scales, count, rows, bf16::from_le_bytes)),
            _ => Params::F32(elements(&scales, count, rows, f32::from_le_bytes)),
        };
        let mut weight = QuantizedMatrix::affine(codes, groups, scales, Offset::Zero(zeros), 0);
        weight.input_perm = perm;
        weight.validate().map_err(invalid)?;
        let bias = if geometry.has_bias { Some(read("bias")?) } else { None };
        Ok(QuantizedLinear { bias, ..QuantizedLinear::new(weight) })
    }
}

/// Elements of `[count, rows]` as `[rows, count]`.
fn elements<const B: usize, T: Copy>(
    tensor: &DenseTensor,
    count: usize,
    rows: usize,
    decode: impl Fn([u8; B]) -> T,
) -> Vec<T> {
    let values: Vec<T> = tensor.bytes().as_chunks::<B>().0.iter().map(|&chunk| decode(chunk)).collect();
    transpose(&values, count, rows)
}
