//! Parameters of groups in 8 bits, as SINQ stores them (`quantAux`).

use half::f16;
use quant_core::Params;

/// Parameters that share a step and an offset.
const COLUMN: usize = 32;

/// Scales `[32, n / 32]`, in columns of 32 with a step and an offset each. Files hold multiples of 32 only.
pub(crate) fn by_columns(values: &[f16], compat: bool) -> Params {
    encode(values, (values.len() / COLUMN).max(1), compat)
}

/// Zero points with one step and one offset.
pub(crate) fn whole(values: &[f16], compat: bool) -> Params {
    encode(values, 1, compat)
}

/// Value `i` belongs to column `i % columns`.
fn encode(values: &[f16], columns: usize, compat: bool) -> Params {
    let half = |v: f32| f16::from_f32(v).to_f32();
    let mut steps = Vec::with_capacity(columns);
    let mut least = Vec::with_capacity(columns);
    for column in 0..columns {
        let of_column = || values.iter().skip(column).step_by(columns).map(|v| v.to_f32());
        let low = of_column().fold(f32::INFINITY, f32::min);
        let range = of_column().map(|v| half(v - low)).fold(0.0, f32::max);
        let integers = || of_column().all(|v| v.fract() == 0.0);
        let step = match compat {
            true => half(range / 255.0),
            // Exact for integers that fit, such as zero points.
            false if range <= 255.0 && integers() => 1.0,
            false => covering(range),
        };
        steps.push(f16::from_f32(step));
        least.push(f16::from_f32(low));
    }
    let code = |(i, v): (usize, &f16)| {
        let (step, low) = (steps[i % columns].to_f32(), least[i % columns].to_f32());
        let above = half(v.to_f32() - low);
        let steps = if step == 0.0 { 0.0 } else { above / step };
        (if compat { half(steps) } else { steps }).round_ties_even().clamp(0.0, 255.0) as u8
    };
    let x = values.iter().enumerate().map(code).collect();
    Params::Affine8 { x, scale: steps, min: least }
}

/// The least f16 of which 255 reach `range`: small ones have few bits, and the nearest may fall short.
fn covering(range: f32) -> f32 {
    let step = f16::from_f32(range / 255.0);
    let short = step.to_f32() * 255.0 < range;
    if short { f16::from_bits(step.to_bits() + 1).to_f32() } else { step.to_f32() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn integers_are_exact() {
        let zeros: Vec<f16> = [-120, 7, 8, 135, 0].map(|v| f16::from_f32(v as f32)).to_vec();
        assert_eq!(whole(&zeros, false).to_vec(), [-120.0, 7.0, 8.0, 135.0, 0.0]);
        let equal = whole(&[f16::from_f32(0.3); 4], true);
        assert_eq!(equal.to_vec(), [f16::from_f32(0.3).to_f32(); 4], "no division by zero");
    }

    proptest! {
        #[test]
        fn scales_are_near(values in prop::collection::vec(1e-4f32..1e-2, 96)) {
            let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            let Params::Affine8 { scale, .. } = by_columns(&halves, false) else { panic!() };
            let back = by_columns(&halves, false).to_vec();
            for (i, (v, back)) in halves.iter().zip(back).enumerate() {
                // Half a step, and three roundings to f16 of numbers up to the greatest value, 2^-12 of it each.
                let bound = 0.5 * scale[i % 3].to_f32() + 3.0 * 1e-2 / 4096.0;
                prop_assert!((v.to_f32() - back).abs() <= bound, "{} {}", v, back);
            }
        }
    }
}
