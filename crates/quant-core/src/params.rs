//! Scales and zero points, with the bits they had on disk.

use std::sync::Arc;

use half::{bf16, f16};

use crate::minifloat;

/// Parameters of groups, stored as their layout stores them so that reading and writing is exact.
/// [`Params::get`] is the one way to read them.
#[derive(Clone, Debug, PartialEq)]
pub enum Params {
    /// Plain f32.
    F32(Vec<f32>),
    /// Plain f16.
    F16(Vec<f16>),
    /// Plain bf16.
    BF16(Vec<bf16>),
    /// Unsigned integers (zero points).
    U8(Vec<u8>),
    /// Powers of two `2^(e-127)` (MX).
    E8M0(Vec<u8>),
    /// FP8 E4M3 (NVFP4 block scales).
    E4M3(Vec<u8>),
    /// bitsandbytes double quantization: `table[code] * absmax[i / block] + offset`, two roundings in f32.
    Nested {
        /// One code per parameter.
        codes: Vec<u8>,
        /// 256 values.
        table: Arc<[f32]>,
        /// One factor per `block` parameters.
        absmax: Vec<f32>,
        /// Parameters per factor.
        block: usize,
        /// Added to each.
        offset: f32,
    },
    /// GGUF k-quants: `d[i / per] * q[i]` with f16 `d`.
    Super {
        /// Integer sub-scales.
        q: Vec<i8>,
        /// Super-block scales.
        d: Vec<f16>,
        /// Sub-scales per super-block.
        per: usize,
    },
    /// SINQ `quantAux`: `x[i] * scale[i % columns] + min[i % columns]`, each step rounded to f16.
    Affine8 {
        /// One code per parameter.
        x: Vec<u8>,
        /// Step of each column.
        scale: Vec<f16>,
        /// Offset of each column.
        min: Vec<f16>,
    },
    /// `base[i] * factor` or, NVFP4 in compressed-tensors, `base[i] / factor`.
    Scaled {
        /// Parameters before the global factor.
        base: Box<Params>,
        /// The global factor.
        factor: f32,
        /// Divide by the factor.
        divide: bool,
    },
    /// Reciprocals of what is stored (GPTQModel FP8).
    Inverse(Box<Params>),
}

/// How [`Params`] are stored, a global factor apart.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamsKind {
    F32,
    F16,
    BF16,
    U8,
    E8M0,
    E4M3,
    Nested,
    Super,
    Affine8,
}

impl Params {
    /// How these parameters are stored.
    pub fn kind(&self) -> ParamsKind {
        match self {
            Params::F32(_) => ParamsKind::F32,
            Params::F16(_) => ParamsKind::F16,
            Params::BF16(_) => ParamsKind::BF16,
            Params::U8(_) => ParamsKind::U8,
            Params::E8M0(_) => ParamsKind::E8M0,
            Params::E4M3(_) => ParamsKind::E4M3,
            Params::Nested { .. } => ParamsKind::Nested,
            Params::Super { .. } => ParamsKind::Super,
            Params::Affine8 { .. } => ParamsKind::Affine8,
            Params::Scaled { base, .. } | Params::Inverse(base) => base.kind(),
        }
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        match self {
            Params::F32(v) => v.len(),
            Params::F16(v) => v.len(),
            Params::BF16(v) => v.len(),
            Params::U8(v) | Params::E8M0(v) | Params::E4M3(v) => v.len(),
            Params::Nested { codes, .. } => codes.len(),
            Params::Super { q, .. } => q.len(),
            Params::Affine8 { x, .. } => x.len(),
            Params::Scaled { base, .. } | Params::Inverse(base) => base.len(),
        }
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Parameter `i` as f32.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Params::F32(v) => v[i],
            Params::F16(v) => v[i].to_f32(),
            Params::BF16(v) => v[i].to_f32(),
            Params::U8(v) => f32::from(v[i]),
            Params::E8M0(v) => minifloat::e8m0_to_f32(v[i]),
            Params::E4M3(v) => minifloat::e4m3_to_f32(v[i]),
            Params::Nested { codes, table, absmax, block, offset } => {
                table[usize::from(codes[i])] * absmax[i / block] + offset
            }
            Params::Super { q, d, per } => d[i / per].to_f32() * f32::from(q[i]),
            Params::Affine8 { x, scale, min } => {
                let column = i % scale.len();
                let product = f16::from_f32(f32::from(x[i]) * scale[column].to_f32());
                f16::from_f32(product.to_f32() + min[column].to_f32()).to_f32()
            }
            Params::Scaled { base, factor, divide: false } => base.get(i) * factor,
            Params::Scaled { base, factor, divide: true } => base.get(i) / factor,
            Params::Inverse(base) => 1.0 / base.get(i),
        }
    }

    /// All parameters as f32.
    pub fn to_vec(&self) -> Vec<f32> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    /// Bits that the parameters take as stored, with their own second-level parameters.
    pub fn bits(&self) -> usize {
        match self {
            Params::F32(v) => 32 * v.len(),
            Params::F16(v) => 16 * v.len(),
            Params::BF16(v) => 16 * v.len(),
            Params::U8(v) | Params::E8M0(v) | Params::E4M3(v) => 8 * v.len(),
            Params::Nested { codes, absmax, .. } => 8 * codes.len() + 32 * absmax.len() + 32,
            Params::Super { q, d, .. } => 8 * q.len() + 16 * d.len(),
            Params::Affine8 { x, scale, min } => 8 * x.len() + 16 * (scale.len() + min.len()),
            Params::Scaled { base, .. } => base.bits() + 32,
            Params::Inverse(base) => base.bits(),
        }
    }

    /// The first parameter that is NaN or infinite.
    pub fn first_non_finite(&self) -> Option<usize> {
        (0..self.len()).find(|&i| !self.get(i).is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_level_parameters() {
        let nested = Params::Nested {
            codes: vec![0, 1, 1],
            table: [-1.0, 0.5].into(),
            absmax: vec![2.0, 4.0],
            block: 2,
            offset: 0.25,
        };
        assert_eq!(nested.to_vec(), [-1.75, 1.25, 2.25]);
        let d = vec![f16::from_f32(0.5), f16::from_f32(2.0)];
        assert_eq!(Params::Super { q: vec![3, -4, 5], d, per: 2 }.to_vec(), [1.5, -2.0, 10.0]);
        let base = Box::new(Params::F32(vec![1.0, 4.0]));
        assert_eq!(Params::Scaled { base: base.clone(), factor: 2.0, divide: true }.to_vec(), [0.5, 2.0]);
        assert_eq!(Params::Inverse(base).to_vec(), [1.0, 0.25]);
        let affine = Params::Affine8 {
            x: vec![2, 3, 4],
            scale: vec![f16::ONE, f16::from_f32(2.0)],
            min: vec![f16::ZERO, f16::ONE],
        };
        assert_eq!(affine.to_vec(), [2.0, 7.0, 4.0]);
    }
}
