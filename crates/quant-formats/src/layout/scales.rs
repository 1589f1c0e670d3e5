//! Scales beside weights that lie on disk as a matrix `[out, in]`: compressed-tensors, FP8 and ModelOpt.

use quant_core::{ActGrid, ActSpec, DType, DenseTensor, GroupSize, Groups, Params};

use super::parts::{FLOATS, Parts, Writing};
use crate::error::FormatError;

/// Size of the blocks that DeepSeek's models have, taken where nothing says another.
pub(super) const BLOCK: GroupSize = GroupSize::Tile { rows: 128, cols: 128 };

/// Shape of the tensor of scales.
pub(super) fn shape(group: GroupSize, rows: usize, cols: usize) -> Vec<usize> {
    match group {
        GroupSize::Tensor => vec![1],
        GroupSize::Tile { rows: r, cols: c } => vec![rows.div_ceil(r), cols.div_ceil(c)],
        group => vec![rows, cols.div_ceil(group.len(cols).max(1))],
    }
}

/// The groups that scales of that shape mean, by the configuration or else by the shape alone.
pub(super) fn groups(
    parts: &Parts<'_>,
    part: &str,
    found: &[usize],
    (rows, cols): (usize, usize),
    known: Option<GroupSize>,
) -> Result<Groups, FormatError> {
    let elements: Option<usize> = found.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let one = elements == Some(1) && found.len() <= 2;
    let fits = |group: GroupSize| match group {
        GroupSize::Tensor => one,
        GroupSize::Row => found == [rows, 1] || found == [rows],
        group => found == shape(group, rows, cols),
    };
    let by_shape = || match *found {
        _ if one && (rows > 1 || found.len() < 2) => Some(GroupSize::Tensor),
        [count] | [count, 1] if count == rows => Some(GroupSize::Row),
        [count, runs] if count == rows && (1..=cols).contains(&runs) => {
            Some(GroupSize::Columns(cols.div_ceil(runs)))
        }
        _ => Some(BLOCK),
    };
    match known.or_else(by_shape).filter(|&group| fits(group)) {
        Some(group) => Ok(group.groups(rows, cols)),
        None => {
            let because = match known {
                Some(group) => format!("a weight of shape [{rows}, {cols}] and groups of {group}"),
                None => format!("a weight of shape [{rows}, {cols}]"),
            };
            let expected = known.map_or("one scale, one for each row, group or block".to_owned(), |group| {
                format!("{:?}", shape(group, rows, cols))
            });
            Err(parts.misshapen(part, found, expected, because))
        }
    }
}

/// The one number of a part with one element.
pub(super) fn scalar(parts: &Parts<'_>, part: &str) -> Result<f32, FormatError> {
    one_element(parts, part)?;
    let values = parts.read(part)?.to_f32();
    let values = values.map_err(|source| FormatError::Tensor { tensor: parts.name(part), source })?;
    match values.first() {
        Some(&value) if value.is_finite() => Ok(value),
        found => Err(FormatError::Value {
            tensor: parts.name(part),
            index: 0,
            found: found.map_or_else(|| "absent".to_owned(), f32::to_string),
            expected: "it must be finite".into(),
        }),
    }
}

/// Checks the type and shape of a part with one element, if there is one.
pub(super) fn check_scalar(parts: &Parts<'_>, part: &str) -> Result<(), FormatError> {
    match parts.find(part) {
        None => Ok(()),
        Some(_) => one_element(parts, part),
    }
}

/// Checks the type and shape of a part with one element.
fn one_element(parts: &Parts<'_>, part: &str) -> Result<(), FormatError> {
    let shape = parts.need(part, FLOATS)?;
    match shape.iter().all(|&dim| dim == 1) {
        true => Ok(()),
        false => Err(parts.misshapen(part, shape, "[1]", "one value for the whole layer")),
    }
}

/// A static scale of the inputs, if the layer has one.
pub(super) fn static_input(
    parts: &Parts<'_>,
    part: &str,
    grid: ActGrid,
) -> Result<Option<ActSpec>, FormatError> {
    match parts.find(part) {
        None => Ok(None),
        Some(_) => Ok(Some(ActSpec::Static { grid, scale: scalar(parts, part)?, zero: 0 })),
    }
}

/// A tensor with one F32 element.
pub(super) fn scalar_tensor(
    writing: &Writing<'_>,
    part: &str,
    shape: &[usize],
    value: f32,
) -> Result<(String, DenseTensor), FormatError> {
    writing.tensor(part, DType::F32, shape, value.to_le_bytes().to_vec())
}

/// Scales with one global factor, as the block scales and a factor that they are divided by or multiplied with. The
/// reciprocal of a factor is rounded.
pub(super) fn factored(scales: &Params, divide: bool) -> Option<(&[u8], f32)> {
    match scales {
        Params::Scaled { base, factor, divide: found } => match &**base {
            Params::E4M3(blocks) => Some((blocks, if *found == divide { *factor } else { 1.0 / factor })),
            _ => None,
        },
        Params::E4M3(blocks) => Some((blocks, 1.0)),
        _ => None,
    }
}
