//! Matrices of other layouts as blocks: the same real numbers, or a refusal.

use half::f16;
use quant_core::{
    Codes, Grid, GridKind, Groups, MatrixError, Offset, Params, ParamsKind, QuantSpec, QuantizedMatrix,
};

use super::codec::{Codec, Form, GridOf, codec};
use super::unsupported;
use crate::error::{FormatError, Unsupported};
use crate::gguf::GgmlType;

/// Whether matrices made to `spec` can be recoded, as far as that is no matter of their values.
pub(super) fn possible(spec: &QuantSpec, codec: &Codec) -> Result<(), Unsupported> {
    let ty = codec.ty;
    match (codec.form, codec.grid) {
        (Form::Super(..) | Form::SuperShift(_), _) => {
            let remedy = format!("{ty} has scales of two levels, which only its own quantizer makes");
            Err(unsupported("scales", format!("{:?}", spec.scales), remedy))
        }
        (_, GridOf::Table(kind)) if spec.grid != kind => {
            Err(unsupported("grid", spec.grid, format!("{ty} holds values of {kind}")))
        }
        (Form::Exponent, _) if spec.scales != ParamsKind::E8M0 => {
            Err(unsupported("scales", format!("{:?}", spec.scales), format!("{ty} has powers of two")))
        }
        (_, GridOf::Int(_)) if !matches!(spec.grid, GridKind::Int | GridKind::E2M1) => {
            Err(unsupported("grid", spec.grid, format!("{ty} holds integers")))
        }
        _ => Ok(()),
    }
}

/// For matrices whose offsets are added: the type with a shift, of as many bits.
pub(super) fn with_shift(matrix: &QuantizedMatrix, plain: &'static Codec) -> &'static Codec {
    let ty = match (&matrix.offset, matrix.codes.bits()) {
        (Offset::Shift { .. }, ..=4) => GgmlType::Q4_1,
        (Offset::Shift { .. }, 5) => GgmlType::Q5_1,
        _ => return plain,
    };
    codec(ty).unwrap_or(plain)
}

/// The same real numbers in the form of `codec`, of a matrix of codes, scales and offsets with its columns in order.
pub(super) fn recode(matrix: &QuantizedMatrix, codec: &Codec) -> Result<QuantizedMatrix, FormatError> {
    possible(&matrix.spec(), codec)?;
    let (rows, cols, group) = (matrix.rows(), matrix.cols(), codec.group);
    if !cols.is_multiple_of(codec.ty.block_len()) {
        let remedy = format!("rows of {} are blocks of {} inputs", codec.ty, codec.ty.block_len());
        return Err(unsupported("input size", cols, remedy).into());
    }
    // Values of small floats are halves.
    let unit =
        if matches!(codec.grid, GridOf::Int(_)) && matrix.grid.kind() == GridKind::E2M1 { 0.5 } else { 1.0 };
    let invalid = |source: MatrixError| FormatError::Matrix { module: String::new(), source };
    let mut out = Codes::zeros(codec.bits, rows, cols).map_err(invalid)?;
    let count = rows * cols / group;
    let (mut scales, mut shifts, mut exponents) = (Vec::with_capacity(count), Vec::new(), Vec::new());
    let (mut codes, mut row) = (vec![0; cols], vec![0; cols]);
    // What each code becomes, for the zero point of the group before: mostly they are alike.
    let (mut map, mut map_zero) = ([None; 256], f32::NAN);
    for r in 0..rows {
        matrix.codes.unpack_row(r, &mut codes);
        for start in (0..cols).step_by(group) {
            if matrix.groups.run_end(r, start, cols) < (start + group).min(cols) {
                let remedy = format!("groups of {} have {group} inputs or a multiple", codec.ty);
                return Err(unsupported("groups", "that end elsewhere", remedy).into());
            }
            let g = matrix.groups.index(r, start, cols);
            let scale = f64::from(matrix.scales.get(g) * unit);
            match (codec.form, &matrix.scales) {
                (Form::Exponent, Params::E8M0(stored)) => exponents.push(stored[g]),
                (Form::Exponent, _) => {
                    let remedy = format!("{} has powers of two and nothing above them", codec.ty);
                    return Err(unsupported("scales", "under a common factor", remedy).into());
                }
                _ => scales.push(exact_half("scale", scale, codec)?),
            }
            let zero = match (&matrix.offset, codec.form) {
                (Offset::None, _) => 0.0,
                (Offset::Zero(zeros), Form::ScaleShift) => {
                    // The product of two f32 is exact in f64.
                    let shift = -scale * f64::from(zeros.get(g));
                    shifts.push(exact_half("shift", shift, codec)?);
                    0.0
                }
                (Offset::Zero(zeros), _) => zeros.get(g),
                (Offset::Shift { param, sign }, Form::ScaleShift) => {
                    shifts.push(exact_half("shift", f64::from(sign * param.get(g)), codec)?);
                    0.0
                }
                (Offset::Shift { .. }, _) => {
                    let remedy = format!("{} has none; choose Q4_1 or Q5_1", codec.ty);
                    return Err(unsupported("shifts", "that are added", remedy).into());
                }
            };
            if zero != map_zero {
                let known = map.iter_mut().zip(0..=matrix.codes.max());
                known.for_each(|(new, code)| *new = recoded(matrix, code, zero, unit, codec));
                map_zero = zero;
            }
            for (new, &code) in row[start..].iter_mut().zip(&codes[start..start + group]) {
                let known = map[usize::from(code)];
                *new = known.ok_or_else(|| refused(steps(matrix, code, zero, unit), codec))?;
            }
        }
        out.set_row(r, &row);
    }
    let (scales, offset) = match codec.form {
        Form::Exponent => (Params::E8M0(exponents), Offset::None),
        Form::ScaleShift => {
            shifts.resize(scales.len(), f16::ZERO);
            (Params::F16(scales), Offset::Shift { param: Params::F16(shifts), sign: 1.0 })
        }
        _ => (Params::F16(scales), Offset::None),
    };
    let mut recoded = QuantizedMatrix::affine(out, Groups::Row { len: group }, scales, offset, 0);
    recoded.grid = codec.grid.grid();
    Ok(recoded)
}

/// Steps of the grid above zero that a code stands for.
fn steps(matrix: &QuantizedMatrix, code: u8, zero: f32, unit: f32) -> f32 {
    match &matrix.grid {
        Grid::Int { midpoint } => f32::from(code) - *midpoint as f32 - zero,
        Grid::Table(table) => (table[usize::from(code)] - zero) / unit,
    }
}

/// The greatest code of a type.
fn max_code(target: &Codec) -> f32 {
    f32::from(u8::MAX >> (8 - target.bits))
}

/// The code that stands for the same number, if there is one.
fn recoded(matrix: &QuantizedMatrix, code: u8, zero: f32, unit: f32, target: &Codec) -> Option<u8> {
    let GridOf::Int(midpoint) = target.grid else { return Some(code) };
    let value = steps(matrix, code, zero, unit) + midpoint as f32;
    (value.fract() == 0.0 && (0.0..=max_code(target)).contains(&value)).then_some(value as u8)
}

/// A number that a type does not hold.
fn refused(steps: f32, target: &Codec) -> Unsupported {
    let GridOf::Int(midpoint) = target.grid else {
        return unsupported("a value", steps, "choose another type");
    };
    let (low, high) = (-midpoint, max_code(target) as i32 - midpoint);
    let remedy = format!("{} holds whole steps from {low} to {high}; choose a wider type", target.ty);
    unsupported("a value", format!("of {steps} steps"), remedy)
}

/// A parameter that f16 holds exactly.
fn exact_half(part: &'static str, value: f64, codec: &Codec) -> Result<f16, Unsupported> {
    let rounded = f16::from_f64(value);
    match rounded.to_f64() == value {
        true => Ok(rounded),
        false => {
            let remedy = format!("{} stores f16, which does not hold it exactly; requantize", codec.ty);
            Err(unsupported(part, value, remedy))
        }
    }
}
