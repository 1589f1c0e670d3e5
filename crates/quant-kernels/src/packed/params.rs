//! Parameters of groups in the narrowest type that holds all of them exactly.

use half::{bf16, f16};

use crate::simd::widen_f16;

/// How parameters are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An unsigned integer below 256.
    U8,
    /// IEEE binary16.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Plain f32.
    F32,
}

impl Kind {
    /// The narrowest type that holds every number exactly, to the bit.
    pub(crate) fn narrowest(numbers: impl Iterator<Item = f32>) -> Kind {
        let (mut u8_holds, mut f16_holds, mut bf16_holds) = (true, true, true);
        for x in numbers {
            u8_holds &= f32::from(x as u8).to_bits() == x.to_bits();
            f16_holds &= widen_f16(f16::from_f32(x).to_bits()).to_bits() == x.to_bits();
            bf16_holds &= x.to_bits() & 0xffff == 0;
        }
        match (u8_holds, f16_holds, bf16_holds) {
            (true, ..) => Kind::U8,
            (_, true, _) => Kind::F16,
            (.., true) => Kind::Bf16,
            _ => Kind::F32,
        }
    }

    /// Bytes of one parameter.
    pub(crate) const fn size(self) -> usize {
        match self {
            Kind::U8 => 1,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::F32 => 4,
        }
    }

    /// Writes a number that this type holds exactly. `bytes`: [`Kind::size`].
    pub(crate) fn write(self, x: f32, bytes: &mut [u8]) {
        match self {
            Kind::U8 => bytes.copy_from_slice(&[x as u8]),
            Kind::F16 => bytes.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            Kind::Bf16 => bytes.copy_from_slice(&bf16::from_bits((x.to_bits() >> 16) as u16).to_le_bytes()),
            Kind::F32 => bytes.copy_from_slice(&x.to_le_bytes()),
        }
    }

    /// Reads `L` numbers from the start of `bytes`.
    #[inline(always)]
    pub(crate) fn read<const L: usize>(self, bytes: &[u8]) -> [f32; L] {
        let mut out = [0.0; L];
        match self {
            Kind::U8 => out.iter_mut().zip(&bytes[..L]).for_each(|(out, &x)| *out = f32::from(x)),
            Kind::F16 => {
                let numbers = bytes[..2 * L].as_chunks::<2>().0;
                out.iter_mut().zip(numbers).for_each(|(out, x)| *out = widen_f16(u16::from_le_bytes(*x)));
            }
            Kind::Bf16 => {
                let wide = |x: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16);
                let numbers = bytes[..2 * L].as_chunks::<2>().0;
                out.iter_mut().zip(numbers).for_each(|(out, x)| *out = wide(x));
            }
            Kind::F32 => {
                let numbers = bytes[..4 * L].as_chunks::<4>().0;
                out.iter_mut().zip(numbers).for_each(|(out, x)| *out = f32::from_le_bytes(*x));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_exact_type_is_found_and_reads_back() {
        let cases = [
            (vec![0.0, 255.0, 8.0], Kind::U8),
            (vec![0.5, -2.0, f32::INFINITY], Kind::F16),
            (vec![2f32.powi(100), 0.5], Kind::Bf16),
            (vec![0.1, 1.0], Kind::F32),
            (vec![-0.0, 1.0], Kind::F16),
        ];
        for (numbers, kind) in cases {
            assert_eq!(Kind::narrowest(numbers.iter().copied()), kind, "{numbers:?}");
            for x in numbers {
                let mut bytes = [0; 4];
                kind.write(x, &mut bytes[..kind.size()]);
                assert_eq!(kind.read::<1>(&bytes)[0].to_bits(), x.to_bits());
            }
        }
    }
}
