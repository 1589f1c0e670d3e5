//! Values that no weight can have: NaN and infinity.

use quant_core::{DenseTensor, Grid, Offset, QuantizedLinear, QuantizedMatrix};

use crate::error::FormatError;

/// Elements that are decoded at a time.
const BLOCK: usize = 4096;

const FINITE: &str = "weights and scales must be finite";

/// What a scan of a tensor found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NonFinite {
    /// Index of the first such element in the flattened tensor.
    pub first: usize,
    /// Its value.
    pub value: f32,
    /// How many there are.
    pub count: usize,
}

/// Looks for NaN and infinity in a tensor. Other types than floats have none, and F64 counts as it will be
/// used, in f32.
pub fn non_finite(tensor: &DenseTensor) -> Option<NonFinite> {
    if !tensor.dtype().is_float() {
        return None;
    }
    let len = tensor.len();
    let mut found: Option<NonFinite> = None;
    let mut block = vec![0.0; BLOCK.min(len)];
    for start in (0..len).step_by(BLOCK) {
        let end = (start + BLOCK).min(len);
        let block = &mut block[..end - start];
        if tensor.read_f32(start..end, block).is_err() {
            return None;
        }
        // Without an early exit, so that it is vectorised.
        if block.iter().fold(true, |finite, v| finite & v.is_finite()) {
            continue;
        }
        for (i, &value) in block.iter().enumerate().filter(|(_, v)| !v.is_finite()) {
            found.get_or_insert(NonFinite { first: start + i, value, count: 0 }).count += 1;
        }
    }
    found
}

/// Fails if a float tensor holds NaN or infinity, naming the first.
pub fn check_tensor(name: &str, tensor: &DenseTensor) -> Result<(), FormatError> {
    match non_finite(tensor) {
        None => Ok(()),
        Some(found) => Err(found.error(name)),
    }
}

/// Fails if a scale, zero point or bias of a layer is NaN or infinite, naming the first.
pub fn check_layer(module: &str, linear: &QuantizedLinear) -> Result<(), FormatError> {
    let weight = &linear.weight;
    let offset = match &weight.offset {
        Offset::None => None,
        Offset::Zero(p) => Some(("zeros", p)),
        Offset::Shift { param, .. } => Some(("shifts", param)),
    };
    for (part, params) in [("scales", &weight.scales)].into_iter().chain(offset) {
        let Some(index) = params.first_non_finite() else { continue };
        // Files often hold groups before outputs, so a flat index alone would mislead.
        let per_row = params.len().checked_div(weight.rows()).unwrap_or(0).max(1);
        let place = format!("output {}, group {}", index / per_row, index % per_row);
        let found = format!("{} ({place})", params.get(index));
        return Err(FormatError::Value {
            tensor: format!("{module}.{part}"),
            index,
            found,
            expected: FINITE.into(),
        });
    }
    check_codes(module, &linear.weight)?;
    match &linear.bias {
        Some(bias) => check_tensor(&format!("{module}.bias"), bias),
        None => Ok(()),
    }
}

/// Fails if a code stands for NaN or infinity, as some of FP8 do.
fn check_codes(module: &str, weight: &QuantizedMatrix) -> Result<(), FormatError> {
    let Grid::Table(table) = &weight.grid else { return Ok(()) };
    if table.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    let mut codes = vec![0; weight.cols()];
    for r in 0..weight.rows() {
        weight.codes.unpack_row(r, &mut codes);
        if let Some(c) = codes.iter().position(|&code| !table[usize::from(code)].is_finite()) {
            return Err(FormatError::Value {
                tensor: format!("{module}.weight"),
                index: r * weight.cols() + c,
                found: table[usize::from(codes[c])].to_string(),
                expected: FINITE.into(),
            });
        }
    }
    Ok(())
}

impl NonFinite {
    fn error(self, tensor: &str) -> FormatError {
        FormatError::Value {
            tensor: tensor.to_owned(),
            index: self.first,
            found: self.value.to_string(),
            expected: FINITE.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_found_and_all_are_counted() {
        let mut values = vec![1.0f32; 10_000];
        assert_eq!(non_finite(&DenseTensor::from_f32(&[100, 100], &values)), None);
        values[5000] = f32::INFINITY;
        values[9999] = f32::NAN;
        let found = non_finite(&DenseTensor::from_f32(&[100, 100], &values)).unwrap();
        assert_eq!(found, NonFinite { first: 5000, value: f32::INFINITY, count: 2 });
        let error =
            check_tensor("a.weight", &DenseTensor::from_f32_as_f16(&[2], &[0.0, f32::NAN])).unwrap_err();
        assert_eq!(error.to_string(), "a.weight: element 1 is NaN; weights and scales must be finite");
        assert_eq!(non_finite(&DenseTensor::from_i32(&[1], &[-1])), None);
    }
}
