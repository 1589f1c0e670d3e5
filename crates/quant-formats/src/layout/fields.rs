//! Fields of quantization configurations that several layouts have.

use serde_json::Value;

use quant_core::GroupSize;

use crate::error::FormatError;

/// The group size of a configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum GroupLen {
    Row,
    Columns(usize),
}

impl From<GroupLen> for GroupSize {
    fn from(group: GroupLen) -> Self {
        match group {
            GroupLen::Row => GroupSize::Row,
            GroupLen::Columns(len) => GroupSize::Columns(len),
        }
    }
}

/// The first of several names of a field that is present and not `null`.
pub(super) fn field<'a>(config: &'a Value, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
    names.iter().find_map(|&name| config.get(name).filter(|v| !v.is_null()).map(|v| (name, v)))
}

pub(super) fn wrong(field: &str, found: &Value, expected: &str) -> FormatError {
    let found = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
    FormatError::Config { field: field.to_owned(), found, expected: expected.to_owned() }
}

/// Bits per code, which must be among `allowed`.
pub(super) fn config_bits(config: &Value, allowed: &[u8], expected: &str) -> Result<Option<u8>, FormatError> {
    let Some((name, value)) = field(config, &["bits", "w_bit", "wbits", "num_bits"]) else { return Ok(None) };
    let bits = value.as_u64().and_then(|b| u8::try_from(b).ok()).filter(|b| allowed.contains(b));
    bits.map(Some).ok_or_else(|| wrong(name, value, expected))
}

/// Columns per group, or -1 for whole rows.
pub(super) fn config_group(config: &Value) -> Result<Option<GroupLen>, FormatError> {
    let Some((name, value)) = field(config, &["group_size", "q_group_size"]) else { return Ok(None) };
    match value.as_i64() {
        Some(-1) => Ok(Some(GroupLen::Row)),
        Some(len @ 1..) => Ok(Some(GroupLen::Columns(usize::try_from(len).unwrap_or(usize::MAX)))),
        _ => Err(wrong(name, value, "it must be positive, or -1 for whole rows")),
    }
}

/// A flag.
pub(super) fn config_flag(config: &Value, names: &[&'static str]) -> Result<Option<bool>, FormatError> {
    match field(config, names) {
        None => Ok(None),
        Some((name, value)) => {
            value.as_bool().map(Some).ok_or_else(|| wrong(name, value, "it must be a flag"))
        }
    }
}
