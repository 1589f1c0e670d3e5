//! What a code stands for before it is scaled.

use std::fmt;
use std::sync::Arc;

use crate::minifloat;

/// The values a code can take. Two tables are equal if their entries are, bit by bit: those of small floats hold
/// NaN and two zeros.
#[derive(Clone, Debug)]
pub enum Grid {
    /// `code - midpoint`: integers. The midpoint is the code of zero in a signed grid (8 for 4 bits), or
    /// zero where the matrix carries its own zero points.
    Int {
        /// Subtracted from every code.
        midpoint: i32,
    },
    /// `table[code]`: NF4, FP4, E2M1, E4M3, IQ4, ternary or learned values.
    Table(Arc<[f32]>),
}

impl Grid {
    /// The plain unsigned grid, `value = code`.
    pub const UNSIGNED: Grid = Grid::Int { midpoint: 0 };

    /// Signed integers of `bits` bits, stored with an offset: code 0 is `-2^(bits-1)`.
    pub fn signed(bits: u8) -> Grid {
        Grid::Int { midpoint: 1 << (bits - 1) }
    }

    /// Value of a code. Panics if a table has no such entry; [`crate::QuantizedMatrix::validate`] excludes it.
    pub fn value(&self, code: u8) -> f32 {
        match self {
            Grid::Int { midpoint } => (i32::from(code) - midpoint) as f32,
            Grid::Table(table) => table[usize::from(code)],
        }
    }

    /// The kind of this grid: a table is found by its entries.
    pub fn kind(&self) -> GridKind {
        let Grid::Table(table) = self else { return GridKind::Int };
        let known = GridKind::TABLES.into_iter().find(|kind| kind.table().is_some_and(|t| same(&t, table)));
        known.unwrap_or(GridKind::Table)
    }
}

impl PartialEq for Grid {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Grid::Int { midpoint: a }, Grid::Int { midpoint: b }) => a == b,
            (Grid::Table(a), Grid::Table(b)) => same(a, b),
            _ => false,
        }
    }
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().map(|v| v.to_bits()).eq(b.iter().map(|v| v.to_bits()))
}

/// The kind of a [`Grid`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GridKind {
    /// Evenly spaced.
    Int,
    /// NormalFloat of 4 bits (bitsandbytes).
    Nf4,
    /// The 4-bit float of bitsandbytes, divided by 12.
    Fp4,
    /// The 4-bit float of MXFP4 and NVFP4.
    E2M1,
    /// The 6-bit float of MXFP6 with three mantissa bits.
    E2M3,
    /// The 6-bit float of MXFP6 with two mantissa bits.
    E3M2,
    /// FP8 with three mantissa bits ("fn").
    E4M3,
    /// FP8 with two mantissa bits.
    E5M2,
    /// FP8 with three mantissa bits and bias 8 ("fnuz").
    E4M3Fnuz,
    /// FP8 with two mantissa bits and bias 16 ("fnuz").
    E5M2Fnuz,
    /// The 16 values of GGUF's IQ4_NL and IQ4_XS.
    Iq4,
    /// Any other table of values.
    Table,
}

impl GridKind {
    /// The kinds whose tables are known.
    pub const TABLES: [GridKind; 10] = [
        GridKind::Nf4,
        GridKind::Fp4,
        GridKind::E2M1,
        GridKind::E2M3,
        GridKind::E3M2,
        GridKind::E4M3,
        GridKind::E5M2,
        GridKind::E4M3Fnuz,
        GridKind::E5M2Fnuz,
        GridKind::Iq4,
    ];

    /// The values by code. `None` for integers and unknown tables.
    pub fn table(self) -> Option<Arc<[f32]>> {
        let bytes = |decode: fn(u8) -> f32| Some((0..=u8::MAX).map(decode).collect());
        let sixes = |decode: fn(u8) -> f32| Some((0..64).map(decode).collect());
        match self {
            GridKind::Int | GridKind::Table => None,
            GridKind::Nf4 => Some(NF4.map(f32::from_bits).into()),
            GridKind::Fp4 => Some(FP4.map(f32::from_bits).into()),
            GridKind::E2M1 => Some(minifloat::E2M1.into()),
            GridKind::E2M3 => sixes(minifloat::e2m3_to_f32),
            GridKind::E3M2 => sixes(minifloat::e3m2_to_f32),
            GridKind::E4M3 => bytes(minifloat::e4m3_to_f32),
            GridKind::E5M2 => bytes(minifloat::e5m2_to_f32),
            GridKind::E4M3Fnuz => bytes(minifloat::e4m3fnuz_to_f32),
            GridKind::E5M2Fnuz => bytes(minifloat::e5m2fnuz_to_f32),
            GridKind::Iq4 => Some(IQ4.map(f32::from).into()),
        }
    }

    /// A grid of this kind; integers of `bits` bits are signed. `None` for unknown tables.
    pub fn grid(self, bits: u8) -> Option<Grid> {
        match self {
            GridKind::Int => Some(Grid::signed(bits)),
            _ => self.table().map(Grid::Table),
        }
    }
}

impl fmt::Display for GridKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GridKind::Int => "int",
            GridKind::Nf4 => "nf4",
            GridKind::Fp4 => "fp4",
            GridKind::E2M1 => "e2m1",
            GridKind::E2M3 => "e2m3",
            GridKind::E3M2 => "e3m2",
            GridKind::E4M3 => "e4m3",
            GridKind::E5M2 => "e5m2",
            GridKind::E4M3Fnuz => "e4m3fnuz",
            GridKind::E5M2Fnuz => "e5m2fnuz",
            GridKind::Iq4 => "iq4",
            GridKind::Table => "table",
        })
    }
}

/// Bits of the NF4 table of bitsandbytes.
const NF4: [u32; 16] = [
    0xbf80_0000,
    0xbf32_39b1,
    0xbf06_6b30,
    0xbeca_32a0,
    0xbe91_a24d,
    0xbe3d_353f,
    0xbdba_7871,
    0x0000_0000,
    0x3da2_faff,
    0x3e24_cae3,
    0x3e7c_04dd,
    0x3ead_033a,
    0x3ee1_a4b8,
    0x3f10_07ab,
    0x3f39_13b3,
    0x3f80_0000,
];

/// Bits of the FP4 table of bitsandbytes: neither sorted nor with a negative zero.
const FP4: [u32; 16] = [
    0x0000_0000,
    0x3baa_aaab,
    0x3f2a_aaab,
    0x3f80_0000,
    0x3eaa_aaab,
    0x3f00_0000,
    0x3e2a_aaab,
    0x3e80_0000,
    0x0000_0000,
    0xbbaa_aaab,
    0xbf2a_aaab,
    0xbf80_0000,
    0xbeaa_aaab,
    0xbf00_0000,
    0xbe2a_aaab,
    0xbe80_0000,
];

/// The table of IQ4_NL in llama.cpp.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_told_apart_by_their_entries() {
        for kind in GridKind::TABLES {
            let grid = kind.grid(4).unwrap();
            assert_eq!((grid.kind(), &grid), (kind, &grid.clone()), "NaN entries are equal to themselves");
        }
        assert_eq!(Grid::Table([0.0, 1.0].into()).kind(), GridKind::Table);
        assert_eq!(Grid::signed(4), Grid::Int { midpoint: 8 });
        assert_eq!(GridKind::Int.grid(8), Some(Grid::signed(8)));
        assert_ne!(Grid::Table([0.0].into()), Grid::Table([-0.0].into()));
    }

    #[test]
    fn values_of_the_published_tables() {
        let nf4 = GridKind::Nf4.table().unwrap();
        assert_eq!((nf4[1], nf4[7], nf4[14]), (-0.696_192_8, 0.0, 0.722_956_84));
        assert_eq!(GridKind::Fp4.table().unwrap()[9], -0.005_208_333_5);
        assert_eq!(GridKind::Iq4.table().unwrap()[8], 1.0);
        assert_eq!(GridKind::E2M3.table().unwrap()[31], 7.5);
        assert_eq!(GridKind::E3M2.table().unwrap()[31], 28.0);
    }
}
