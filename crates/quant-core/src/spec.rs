//! What is asked of a quantizer, and its single validator.

use std::fmt;

use crate::error::SpecError;
use crate::grid::GridKind;
use crate::groups::Groups;
use crate::params::ParamsKind;

/// How a weight matrix is, or is to be, quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantSpec {
    /// Bits per code, 1 to 8.
    pub bits: u8,
    /// Integers, or a table of values.
    pub grid: GridKind,
    /// Elements that share a scale.
    pub group: GroupSize,
    /// How scales are stored.
    pub scales: ParamsKind,
    /// One zero point in the middle of the code range, or one per group.
    pub symmetric: bool,
    /// Groups hold columns in order of activation size rather than consecutive ones (`desc_act`).
    pub act_order: bool,
}

impl Default for QuantSpec {
    fn default() -> Self {
        let group = GroupSize::Columns(128);
        let (grid, scales) = (GridKind::Int, ParamsKind::F16);
        Self { bits: 4, grid, group, scales, symmetric: true, act_order: false }
    }
}

/// Elements that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupSize {
    /// The whole matrix.
    Tensor,
    /// Each output row (written `-1` or `row`).
    Row,
    /// This many consecutive inputs of a row.
    Columns(usize),
    /// Blocks of outputs times inputs (written `128x128`).
    Tile {
        /// Outputs of a block.
        rows: usize,
        /// Inputs of a block.
        cols: usize,
    },
    /// This many consecutive elements of the flattened matrix, across row ends (written `flat:64`).
    Flat(usize),
    /// This many elements of the flattened matrix at equal distances (written `strided:64`).
    Strided(usize),
}

impl GroupSize {
    /// Columns per group in a row of `cols`, one where groups do not follow rows.
    pub fn len(self, cols: usize) -> usize {
        match self {
            GroupSize::Columns(len) | GroupSize::Tile { cols: len, .. } => len.min(cols.max(1)),
            GroupSize::Row | GroupSize::Tensor => cols.max(1),
            GroupSize::Flat(_) | GroupSize::Strided(_) => 1,
        }
    }

    /// The groups of a matrix of `cols` inputs and `rows` outputs. The size must be positive.
    pub fn groups(self, rows: usize, cols: usize) -> Groups {
        match self {
            GroupSize::Tensor => Groups::Tensor,
            GroupSize::Row => Groups::whole_row(cols),
            GroupSize::Columns(len) => Groups::Row { len: len.min(cols.max(1)) },
            GroupSize::Tile { rows, cols } => Groups::Tile { rows, cols },
            GroupSize::Flat(len) => Groups::Flat { len },
            GroupSize::Strided(len) => Groups::Strided { count: (rows * cols).div_ceil(len).max(1) },
        }
    }

    /// The number in configuration files: -1 for whole rows.
    pub fn as_config(self) -> i64 {
        match self {
            GroupSize::Row | GroupSize::Tensor => -1,
            GroupSize::Columns(len)
            | GroupSize::Tile { cols: len, .. }
            | GroupSize::Flat(len)
            | GroupSize::Strided(len) => i64::try_from(len).unwrap_or(i64::MAX),
        }
    }

    /// True if a length is zero.
    fn is_empty(self) -> bool {
        match self {
            GroupSize::Tensor | GroupSize::Row => false,
            GroupSize::Columns(len) | GroupSize::Flat(len) | GroupSize::Strided(len) => len == 0,
            GroupSize::Tile { rows, cols } => rows == 0 || cols == 0,
        }
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupSize::Tensor => f.write_str("tensor"),
            GroupSize::Row => f.write_str("row"),
            GroupSize::Columns(len) => write!(f, "{len}"),
            GroupSize::Tile { rows, cols } => write!(f, "{rows}x{cols}"),
            GroupSize::Flat(len) => write!(f, "flat:{len}"),
            GroupSize::Strided(len) => write!(f, "strided:{len}"),
        }
    }
}

impl std::str::FromStr for GroupSize {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        let positive = |text: &str| match text.parse::<usize>() {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(SpecError::Group {
                found: text.parse().unwrap_or(0),
                allowed: "give a number of columns, -1 or row for whole rows, tensor, or a block such as 128x128",
            }),
        };
        if let Some((rows, cols)) = s.split_once('x') {
            return Ok(GroupSize::Tile { rows: positive(rows)?, cols: positive(cols)? });
        }
        match (s, s.split_once(':')) {
            ("row" | "-1", _) => Ok(GroupSize::Row),
            ("tensor", _) => Ok(GroupSize::Tensor),
            (_, Some(("flat", len))) => positive(len).map(GroupSize::Flat),
            (_, Some(("strided", len))) => positive(len).map(GroupSize::Strided),
            _ => positive(s).map(GroupSize::Columns),
        }
    }
}

impl QuantSpec {
    /// Checks what holds for every method: bits 1 to 8 and a positive group.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(1..=8).contains(&self.bits) {
            return Err(SpecError::Bits { found: self.bits, allowed: &[1, 2, 3, 4, 5, 6, 7, 8] });
        }
        if self.group.is_empty() {
            return Err(SpecError::Group { found: 0, allowed: "it must be positive, or -1 for whole rows" });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_sizes_parse_and_print() {
        for text in ["row", "tensor", "64", "128x64", "flat:64", "strided:32"] {
            assert_eq!(text.parse::<GroupSize>().unwrap().to_string(), text);
        }
        assert_eq!("-1".parse(), Ok(GroupSize::Row));
        for text in ["0", "-3", "x", "", "0x2", "3x", "flat:0", "flat", "rows:2"] {
            assert!(text.parse::<GroupSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_groups() {
        assert_eq!(GroupSize::Columns(64).groups(2, 48), Groups::Row { len: 48 });
        assert_eq!(GroupSize::Strided(16).groups(2, 48), Groups::Strided { count: 6 });
        assert_eq!(GroupSize::Row.groups(2, 0), Groups::Row { len: 1 });
        assert_eq!((GroupSize::Flat(64).len(48), GroupSize::Tile { rows: 2, cols: 64 }.len(48)), (1, 48));
    }

    #[test]
    fn specs_are_checked() {
        assert!(QuantSpec::default().validate().is_ok());
        assert!(QuantSpec { bits: 9, ..Default::default() }.validate().is_err());
        assert!(QuantSpec { group: GroupSize::Columns(0), ..Default::default() }.validate().is_err());
        let group = GroupSize::Tile { rows: 128, cols: 0 };
        assert!(QuantSpec { group, ..Default::default() }.validate().is_err());
    }
}
