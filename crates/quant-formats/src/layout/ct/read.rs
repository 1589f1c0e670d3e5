//! Reading layers of compressed-tensors.

use quant_core::{
    ActGrid, ActSpec, Codes, DType, Grid, GridKind, Groups, Offset, Params, QuantSpec, QuantizedLinear,
    QuantizedMatrix, TensorError,
};
use serde_json::Value;

use super::config::{Config, Group, Input};
use super::{Format, words};
use crate::error::FormatError;
use crate::layout::parts::{FLOATS, Parts, groups_of, params};
use crate::layout::{Layout, Reader, TensorSource, scales};

/// Reads one checkpoint.
#[derive(Debug)]
pub(in crate::layout) struct CtReader {
    config: Config,
}

/// What the headers of a layer's tensors say. All sizes are positive.
struct Geometry {
    format: Format,
    rows: usize,
    cols: usize,
    bits: u8,
    groups: Groups,
    /// Words of codes have no gaps.
    dense: bool,
    has_zeros: bool,
    has_map: bool,
}

impl CtReader {
    pub(in crate::layout) fn new(config: &Value) -> Result<Self, FormatError> {
        Ok(Self { config: Config::parse(config)? })
    }

    /// The format of a layer, by its tensors.
    fn format(&self, parts: &Parts<'_>) -> Result<Format, FormatError> {
        let scale = parts.find("weight_scale").map(|(dtype, _)| dtype);
        let mx = matches!(scale, Some(DType::U8 | DType::F8E8M0));
        match (parts.find("weight_packed"), parts.find("weight")) {
            (Some((DType::I32, _)), _) => Ok(Format::Pack),
            (Some((DType::U8, packed)), _) if mx => {
                let widths =
                    packed.get(1).zip(parts.find("weight_scale").and_then(|(_, shape)| shape.get(1)));
                // Blocks of 32 values take 16 bytes of E2M1, 24 of E2M3.
                Ok(match widths {
                    Some((&bytes, &blocks)) if blocks.checked_mul(24) == Some(bytes) => Format::Mxfp6,
                    _ => Format::Mxfp4,
                })
            }
            (Some((DType::U8, _)), _) => Ok(Format::Nvfp4),
            (None, Some((DType::I8, _))) => Ok(Format::Int),
            (None, Some((DType::F8E4M3, _))) if mx => Ok(Format::Mxfp8),
            (None, Some((DType::F8E4M3, _))) => Ok(Format::Float),
            (None, None) => {
                let because = format!("{} has scales", crate::display_name(parts.module));
                Err(FormatError::Missing { tensor: parts.name("weight_packed"), because })
            }
            (Some((found, _)), _) => {
                let tensor = parts.name("weight_packed");
                Err(FormatError::TensorDType { tensor, expected: "I32 or U8", found })
            }
            (_, Some((found, _))) => Err(FormatError::TensorDType {
                tensor: parts.name("weight"),
                expected: "I8 or F8_E4M3",
                found,
            }),
        }
    }

    fn geometry(&self, parts: &Parts<'_>) -> Result<Geometry, FormatError> {
        let group = self.config.group(parts.module);
        let format = self.format(parts)?;
        let (part, dtype) = format.weight();
        let (rows, width) = parts.need_matrix(part, &[dtype], "two dimensions")?;
        let said = group.map(|group| group.weights).unwrap_or_default();
        let scale = parts.need("weight_scale", scale_types(format))?;
        let shape = self.weight_shape(parts)?;
        let misshapen = |because: String| parts.misshapen(part, &[rows, width], "another width", because);
        let (bits, cols, dense) = match format {
            Format::Pack => {
                let cols = shape.map(|[_, cols]| cols);
                self.packed_size(parts, said.bits, width, cols)?
            }
            Format::Int => (said.bits.unwrap_or(8), width, true),
            Format::Float | Format::Mxfp8 => (8, width, true),
            Format::Nvfp4 | Format::Mxfp4 => {
                (4, width.checked_mul(2).ok_or_else(|| misshapen("the size overflows".into()))?, true)
            }
            Format::Mxfp6 => (6, width / 3 * 4, true),
        };
        if let Some(found) = shape.filter(|&found| found != [rows, cols]) {
            let because = format!("{part} of shape [{rows}, {width}] at {bits} bits");
            return Err(FormatError::Value {
                tensor: parts.name("weight_shape"),
                index: 0,
                found: format!("{found:?}"),
                expected: format!("the shape must be [{rows}, {cols}], which follows from {because}"),
            });
        }
        let groups = match format.fixed() {
            Some((_, len, _)) => {
                if !cols.is_multiple_of(len) {
                    return Err(misshapen(format!("blocks of {len} inputs")));
                }
                parts.shaped("weight_scale", scale, &[rows, cols / len], || {
                    format!("{part} of shape [{rows}, {width}] and blocks of {len} inputs")
                })?;
                Groups::Row { len }
            }
            None => scales::groups(parts, "weight_scale", scale, (rows, cols), said.group)?,
        };
        if format == Format::Nvfp4 {
            let shape = parts.need("weight_global_scale", &[DType::F32])?;
            parts.shaped("weight_global_scale", shape, &[1], || "one factor for the layer".into())?;
        }
        let has_zeros = self.check_zeros(parts, format, said.symmetric, (rows, bits), scale)?;
        let has_map = format == Format::Pack && parts.find("weight_g_idx").is_some();
        if has_map {
            let map = parts.need("weight_g_idx", &[DType::I32])?;
            parts.shaped("weight_g_idx", map, &[cols], || format!("{cols} inputs"))?;
        }
        scales::check_scalar(parts, "input_scale")?;
        scales::check_scalar(parts, "input_global_scale")?;
        parts.check_bias(rows)?;
        Ok(Geometry { format, rows, cols, bits, groups, dense, has_zeros, has_map })
    }

    /// The tensor `weight_shape`, which packed weights have.
    fn weight_shape(&self, parts: &Parts<'_>) -> Result<Option<[usize; 2]>, FormatError> {
        if parts.find("weight_shape").is_none() {
            return Ok(None);
        }
        let shape = parts.need("weight_shape", &[DType::I64, DType::I32])?;
        parts.shaped("weight_shape", shape, &[2], || "a matrix has two sizes".into())?;
        let tensor = parts.read("weight_shape")?;
        let bytes = tensor.bytes();
        let sizes: Vec<i64> = match tensor.dtype() {
            DType::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
            _ => bytes.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b))).collect(),
        };
        let size = |i: usize| {
            let found = sizes.get(i).copied().unwrap_or(0);
            usize::try_from(found).ok().filter(|&n| n > 0).ok_or_else(|| FormatError::Value {
                tensor: parts.name("weight_shape"),
                index: i,
                found: found.to_string(),
                expected: "the shape of a weight is positive".into(),
            })
        };
        Ok(Some([size(0)?, size(1)?]))
    }

    /// Bits, inputs and packing of words that are `width` in a row.
    fn packed_size(
        &self,
        parts: &Parts<'_>,
        bits: Option<u8>,
        width: usize,
        cols: Option<usize>,
    ) -> Result<(u8, usize, bool), FormatError> {
        let missing = |tensor: &str| FormatError::Missing {
            tensor: parts.name(tensor),
            because: "packed weights do not tell the number of inputs".into(),
        };
        let cols = cols.ok_or_else(|| missing("weight_shape"))?;
        let fits = |bits: u8, dense| words::words_of(cols, bits, dense) == Some(width);
        let candidates = match bits {
            Some(bits) => bits..=bits,
            None => 2..=8,
        };
        for bits in candidates.rev() {
            match (fits(bits, true), fits(bits, false)) {
                (true, true) => return Ok((bits, cols, self.config.dense || 32 % bits == 0)),
                (true, false) => return Ok((bits, cols, true)),
                (false, true) => return Ok((bits, cols, false)),
                (false, false) => {}
            }
        }
        let found = parts.find("weight_packed").map(|(_, shape)| shape).unwrap_or_default();
        let bits = bits.map_or("2 to 8".to_owned(), |bits| bits.to_string());
        let because = format!("weight_shape, whose {cols} inputs have {bits} bits each");
        Err(parts.misshapen("weight_packed", found, "another width", because))
    }

    /// Whether the layer has zero points. They have the shape of the scales, packed along the outputs if the codes are.
    fn check_zeros(
        &self,
        parts: &Parts<'_>,
        format: Format,
        symmetric: Option<bool>,
        (rows, bits): (usize, u8),
        scale: &[usize],
    ) -> Result<bool, FormatError> {
        let found = parts.find("weight_zero_point");
        if symmetric == Some(true) || symmetric.is_none() && found.is_none() {
            return Ok(false);
        }
        let because = || format!("{bits} bits and scales of shape {scale:?}");
        match format {
            Format::Pack => {
                let found = parts.need("weight_zero_point", &[DType::I32])?;
                let [_, per_row] = *scale else {
                    return Err(parts.misshapen("weight_scale", scale, "two dimensions", because()));
                };
                let dense = words::words_of(rows, bits, true).is_some_and(|words| found == [words, per_row]);
                let gapped =
                    words::words_of(rows, bits, false).is_some_and(|words| found == [words, per_row]);
                if !dense && !gapped {
                    let words = words::words_of(rows, bits, true).unwrap_or_default();
                    return Err(parts.misshapen(
                        "weight_zero_point",
                        found,
                        format!("[{words}, {per_row}]"),
                        because(),
                    ));
                }
            }
            Format::Int => {
                let found = parts.need("weight_zero_point", &[DType::I8])?;
                parts.shaped("weight_zero_point", found, scale, because)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// How the inputs of a layer are quantized.
    fn input_of(
        &self,
        parts: &Parts<'_>,
        group: Option<&Group>,
        format: Format,
    ) -> Result<ActSpec, FormatError> {
        let grid = if format == Format::Int { ActGrid::Int8 } else { ActGrid::E4M3 };
        let said = match group.map(|group| &group.input) {
            Some(said) => said.clone(),
            None if parts.find("input_global_scale").is_some() => {
                Input::TwoLevel { grid: ActGrid::E2M1, len: 16 }
            }
            None if parts.find("input_scale").is_some() => Input::Static(grid),
            None => Input::Dynamic(ActSpec::Float),
        };
        match said {
            Input::Dynamic(spec) => Ok(spec),
            Input::TwoLevel { grid, len } => {
                let factor = scales::scalar(parts, "input_global_scale")?;
                Ok(ActSpec::TwoLevel { grid, len, factor, divide: true })
            }
            Input::Static(grid) => {
                let scale = scales::scalar(parts, "input_scale")?;
                Ok(ActSpec::Static { grid, scale, zero: self.input_zero(parts)? })
            }
        }
    }

    fn input_zero(&self, parts: &Parts<'_>) -> Result<i32, FormatError> {
        if parts.find("input_zero_point").is_none() {
            return Ok(0);
        }
        let shape = parts.need("input_zero_point", &[DType::I8])?;
        parts.shaped("input_zero_point", shape, &[1], || "one value for the whole layer".into())?;
        Ok(parts.read("input_zero_point")?.bytes().first().map_or(0, |&zero| i32::from(zero as i8)))
    }
}

fn scale_types(format: Format) -> &'static [DType] {
    match format {
        Format::Pack | Format::Int | Format::Float => FLOATS,
        Format::Nvfp4 => &[DType::F8E4M3],
        Format::Mxfp4 | Format::Mxfp6 | Format::Mxfp8 => &[DType::U8, DType::F8E8M0],
    }
}

impl Reader for CtReader {
    fn layout(&self) -> &'static dyn Layout {
        let said = self.config.base().and_then(|group| group.format);
        let by_values = || match self.config.base().and_then(Group::spec) {
            Some(spec) if spec.grid == GridKind::E4M3 => Format::Float,
            Some(spec) if spec.bits == 8 => Format::Int,
            _ => Format::Pack,
        };
        said.unwrap_or_else(by_values).layout()
    }

    fn spec(&self) -> Option<QuantSpec> {
        self.config.base()?.spec()
    }

    fn input(&self) -> ActSpec {
        self.config.base().map(|group| group.input.spec()).unwrap_or_default()
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.geometry(&Parts { source, module, layout: "compressed-tensors" }).map(|g| (g.rows, g.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let parts = Parts { source, module, layout: "compressed-tensors" };
        let geometry = self.geometry(&parts)?;
        let Geometry { format, rows, cols, bits, groups, dense, has_zeros, has_map } = geometry;
        let tensor_error =
            |part: &str, source: TensorError| FormatError::Tensor { tensor: parts.name(part), source };

        let stored = parts.read(format.weight().0)?;
        let mut codes = Codes::zeros(bits, rows, cols).map_err(|e| parts.invalid(e))?;
        match format {
            Format::Pack => words::from_words(stored.bytes(), &mut codes, dense),
            Format::Int => {
                words::from_signed(stored.bytes(), &mut codes).map_err(|index| FormatError::Value {
                    tensor: parts.name("weight"),
                    index,
                    found: (stored.bytes()[index] as i8).to_string(),
                    expected: format!("integers of {bits} bits are smaller"),
                })?
            }
            _ => codes.row_chunks_mut(rows).for_each(|all| all.copy_from_slice(stored.bytes())),
        }
        let (groups, perm) = match (has_map, &groups) {
            (true, &Groups::Row { len }) => {
                let count = cols.div_ceil(len);
                groups_of(parts.read_groups("weight_g_idx", count)?, count, len)
            }
            _ => (groups, None),
        };
        if let Some(perm) = &perm {
            words::reorder(&mut codes, perm);
        }
        let scale = parts.read("weight_scale")?;
        let per_row = scale.len() / rows;
        let scales = match format {
            Format::Mxfp4 | Format::Mxfp6 | Format::Mxfp8 => Params::E8M0(scale.bytes().to_vec()),
            _ => params(&scale).map_err(|e| tensor_error("weight_scale", e))?,
        };
        let scales = match format {
            Format::Nvfp4 => {
                let factor = scales::scalar(&parts, "weight_global_scale")?;
                Params::Scaled { base: Box::new(scales), factor, divide: true }
            }
            _ => scales,
        };
        let grid = match format.fixed() {
            Some((kind, ..)) => kind.grid(bits),
            None if format == Format::Float => GridKind::E4M3.grid(bits),
            None => None,
        };
        let mut weight = QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0);
        weight.grid = grid.unwrap_or(Grid::signed(bits));
        weight.input_perm = perm;
        if has_zeros {
            let stored = parts.read("weight_zero_point")?;
            let zeros = match format {
                Format::Pack => {
                    let gapless = words::words_of(rows, bits, true) == stored.shape().first().copied();
                    let gapped = words::words_of(rows, bits, false) == stored.shape().first().copied();
                    let dense = if gapless && gapped { dense } else { gapless };
                    words::unpack_columns(bits, stored.bytes(), rows, per_row, dense)
                }
                _ => {
                    let middle = 1u8 << (bits - 1);
                    stored.bytes().iter().map(|&zero| zero.wrapping_add(middle)).collect()
                }
            };
            weight.grid = Grid::UNSIGNED;
            weight.offset = Offset::Zero(Params::U8(zeros));
        }
        let input = self.input_of(&parts, self.config.group(module), format)?;
        Ok(QuantizedLinear { input, ..parts.linear(weight)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quant_core::DenseTensor;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn packed(cols: usize, words: usize) -> BTreeMap<String, DenseTensor> {
        let shape: Vec<u8> = [1i64, cols as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
        BTreeMap::from([
            ("m.weight_packed".into(), DenseTensor::from_i32(&[1, words], &vec![-1; words])),
            ("m.weight_scale".into(), DenseTensor::from_f32(&[1, 1], &[1.0])),
            ("m.weight_shape".into(), DenseTensor::new(DType::I64, vec![2], shape).unwrap()),
        ])
    }

    #[test]
    fn the_release_decides_where_both_packings_fit() {
        // 20 codes of 3 bits take two words either way.
        let source = packed(20, 2);
        for (version, dense) in [("0.17.0", false), ("0.18.0", true)] {
            let config = json!({ "version": version, "config_groups": { "group_0": {
                "targets": ["Linear"], "weights": { "num_bits": 3, "strategy": "channel" } } } });
            let reader = CtReader::new(&config).unwrap();
            let geometry = reader.geometry(&Parts { source: &source, module: "m", layout: "" }).unwrap();
            assert_eq!((geometry.bits, geometry.cols, geometry.dense), (3, 20, dense));
        }
        // 64 codes take six words densely and seven with gaps.
        for (words, dense) in [(6, true), (7, false)] {
            let reader = CtReader::new(&Value::Null).unwrap();
            let source = packed(64, words);
            let geometry = reader.geometry(&Parts { source: &source, module: "m", layout: "" }).unwrap();
            assert_eq!((geometry.bits, geometry.dense), (3, dense));
        }
    }
}
