//! What is asked of a quantizer, and its single validator.

use std::fmt;

use crate::error::SpecError;

/// How a weight matrix is, or is to be, quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuantSpec {
    /// Bits per code, 1 to 8.
    pub bits: u8,
    /// Integers, or a table of values.
    pub grid: GridKind,
    /// Elements that share a scale.
    pub group: GroupSize,
    /// One zero point in the middle of the code range, or one per group.
    pub symmetric: bool,
    /// Groups hold columns in order of activation size rather than consecutive ones (`desc_act`).
    pub act_order: bool,
}

impl Default for QuantSpec {
    fn default() -> Self {
        let group = GroupSize::Columns(128);
        Self { bits: 4, grid: GridKind::Int, group, symmetric: true, act_order: false }
    }
}

/// The kind of [`crate::Grid`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GridKind {
    /// Evenly spaced.
    Int,
    /// Values from a table.
    Table,
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
}

impl GroupSize {
    /// Columns per group in a row of `cols`.
    pub fn len(self, cols: usize) -> usize {
        match self {
            GroupSize::Columns(len) => len.min(cols.max(1)),
            GroupSize::Row | GroupSize::Tensor => cols.max(1),
        }
    }

    /// The number in configuration files: -1 for whole rows.
    pub fn as_config(self) -> i64 {
        match self {
            GroupSize::Columns(len) => i64::try_from(len).unwrap_or(i64::MAX),
            GroupSize::Row | GroupSize::Tensor => -1,
        }
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupSize::Tensor => f.write_str("tensor"),
            GroupSize::Row => f.write_str("row"),
            GroupSize::Columns(len) => write!(f, "{len}"),
        }
    }
}

impl std::str::FromStr for GroupSize {
    type Err = SpecError;

    fn from_str(s: &str) -> Result<Self, SpecError> {
        match s {
            "row" | "-1" => Ok(GroupSize::Row),
            "tensor" => Ok(GroupSize::Tensor),
            _ => match s.parse::<i64>() {
                Ok(n) if n > 0 => Ok(GroupSize::Columns(n as usize)),
                found => Err(SpecError::Group {
                    found: found.unwrap_or(0),
                    allowed: "give a number of columns, or -1 or row for whole rows",
                }),
            },
        }
    }
}

impl QuantSpec {
    /// Checks what holds for every method: bits 1 to 8 and a positive group.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(1..=8).contains(&self.bits) {
            return Err(SpecError::Bits { found: self.bits, allowed: &[1, 2, 3, 4, 5, 6, 7, 8] });
        }
        if self.group == GroupSize::Columns(0) {
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
        for text in ["row", "tensor", "64"] {
            assert_eq!(text.parse::<GroupSize>().unwrap().to_string(), text);
        }
        assert_eq!("-1".parse(), Ok(GroupSize::Row));
        for text in ["0", "-3", "x", ""] {
            assert!(text.parse::<GroupSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn specs_are_checked() {
        assert!(QuantSpec::default().validate().is_ok());
        assert!(QuantSpec { bits: 9, ..Default::default() }.validate().is_err());
        assert!(QuantSpec { group: GroupSize::Columns(0), ..Default::default() }.validate().is_err());
    }
}
