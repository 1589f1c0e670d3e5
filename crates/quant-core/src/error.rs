//! Errors of this crate.

use crate::dtype::DType;

/// A tensor is not what its reader needs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The bytes do not fit type and shape.
    #[error("{dtype} of shape {shape:?} needs {} bytes, found {found}", .expected.map_or("more than addressable".into(), |n| n.to_string()))]
    ByteLen {
        /// Declared type.
        dtype: DType,
        /// Declared shape.
        shape: Vec<usize>,
        /// Bytes that type and shape need, if that is a number at all.
        expected: Option<usize>,
        /// Bytes present.
        found: usize,
    },
    /// The elements are not floating-point numbers.
    #[error("dtype {dtype} is not a floating-point type")]
    NotFloat {
        /// The type found.
        dtype: DType,
    },
    /// Another element type is needed.
    #[error("dtype {found} where {expected} is needed")]
    DType {
        /// Needed.
        expected: DType,
        /// Found.
        found: DType,
    },
}

/// A quantized matrix is inconsistent.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MatrixError {
    /// Bits out of range.
    #[error("codes of {found} bits; 1 to 8 are possible")]
    Bits {
        /// The bits asked for.
        found: u8,
    },
    /// A code above the largest.
    #[error("code {found} above the largest, {max}")]
    Code {
        /// The code.
        found: u8,
        /// The largest code of that many bits.
        max: u8,
    },
    /// A size that cannot be addressed.
    #[error("a matrix of {rows} x {cols} codes is too large to address")]
    TooLarge {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// A part has a size that does not fit the matrix.
    #[error("{part}: expected {expected} entries, found {found}")]
    Size {
        /// The part, such as `scales`.
        part: &'static str,
        /// Entries needed.
        expected: usize,
        /// Entries present.
        found: usize,
    },
    /// An index out of range.
    #[error("{part}: index {found} out of range, {limit} exist")]
    Range {
        /// The part, such as `g_idx`.
        part: &'static str,
        /// Number of valid indices.
        limit: usize,
        /// The index.
        found: usize,
    },
}

/// A specification that no quantizer can follow.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Bits that the method or layout does not have.
    #[error("bits {found} is not possible here; choose one of {allowed:?}")]
    Bits {
        /// The bits asked for.
        found: u8,
        /// What is possible.
        allowed: &'static [u8],
    },
    /// A group size that is not one of the allowed ones.
    #[error("group size {found} is not possible; {allowed}")]
    Group {
        /// The size asked for.
        found: i64,
        /// What is possible, in words.
        allowed: &'static str,
    },
    /// An option outside its range.
    #[error("{option} is {found}; it must be {allowed}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Value asked for.
        found: String,
        /// What is possible, in words.
        allowed: &'static str,
    },
}
