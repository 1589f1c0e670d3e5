//! What a product or a vector operation refuses.

use thiserror::Error;

/// An operand whose shape or memory order does not fit the operation.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// A matrix of the wrong shape.
    #[error("{operand} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The operand's name in the function's signature.
        operand: &'static str,
        /// The shape that the other operands ask for.
        expected: [usize; 2],
        /// The shape handed over.
        found: [usize; 2],
    },
    /// A slice of the wrong length.
    #[error("{operand} has length {found}, expected {expected}")]
    Length {
        /// The operand's name in the function's signature.
        operand: &'static str,
        /// The length that the other operands ask for.
        expected: usize,
        /// The length handed over.
        found: usize,
    },
    /// A row that the matrix does not have.
    #[error("row {found} of a matrix of {rows} rows")]
    Row {
        /// The row asked for.
        found: usize,
        /// How many there are.
        rows: usize,
    },
    /// A matrix whose rows are not contiguous.
    #[error(
        "rows of {operand} are not contiguous (stride {stride} between neighbours); copy it to standard order"
    )]
    Strided {
        /// The operand's name in the function's signature.
        operand: &'static str,
        /// The distance between neighbours within a row, in elements.
        stride: isize,
    },
}
