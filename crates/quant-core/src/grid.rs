//! What a code stands for before it is scaled.

use std::sync::Arc;

/// The values a code can take.
#[derive(Clone, Debug, PartialEq)]
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

    /// Value of a code. Panics if a table has no such entry; [`crate::QuantizedMatrix::validate`] excludes it.
    pub fn value(&self, code: u8) -> f32 {
        match self {
            Grid::Int { midpoint } => (i32::from(code) - midpoint) as f32,
            Grid::Table(table) => table[usize::from(code)],
        }
    }
}
