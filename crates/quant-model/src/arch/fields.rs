//! Reading fields of a configuration that nobody vouches for.

use serde_json::{Map, Value};

use crate::error::ConfigError;

/// Largest size that a field may name: all products of two still fit 64 bits.
const MAX_COUNT: u64 = 1 << 31;

/// An object of the configuration. A field that is `null` counts as absent, as it does in transformers.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Path of this object, `""` or such as `rope_scaling.`
    path: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn root(config: &'a Value) -> Result<Self, ConfigError> {
        match config {
            Value::Object(map) => Ok(Self { map, path: "" }),
            other => Err(ConfigError::NotAnObject { found: printable(other) }),
        }
    }

    /// The object in field `name`; `path` is `name` with a dot.
    pub(crate) fn object(self, name: &str, path: &'static str) -> Result<Option<Self>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, path })),
            Some(found) => Err(self.bad(name, "an object", found)),
        }
    }

    pub(crate) fn get(self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn bad(self, name: &str, expected: impl Into<String>, found: &Value) -> ConfigError {
        let field = format!("{}{name}", self.path);
        ConfigError::Value { field, expected: expected.into(), found: printable(found) }
    }

    pub(crate) fn missing(self, name: &str, expected: impl Into<String>) -> ConfigError {
        ConfigError::Missing { field: format!("{}{name}", self.path), expected: expected.into() }
    }

    /// A positive size that must be there.
    pub(crate) fn count(self, name: &str) -> Result<usize, ConfigError> {
        self.optional_count(name)?.ok_or_else(|| self.missing(name, "a positive number"))
    }

    pub(crate) fn count_or(self, name: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.optional_count(name)?.unwrap_or(default))
    }

    pub(crate) fn optional_count(self, name: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(n @ 1..=MAX_COUNT) => Ok(Some(n as usize)),
            _ => Err(self.bad(name, format!("a whole number from 1 to {MAX_COUNT}"), value)),
        }
    }

    /// A finite number above zero.
    pub(crate) fn positive(self, name: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(Some(x)),
            _ => Err(self.bad(name, "a finite number above 0", value)),
        }
    }

    pub(crate) fn positive_or(self, name: &str, default: f64) -> Result<f64, ConfigError> {
        Ok(self.positive(name)?.unwrap_or(default))
    }

    pub(crate) fn flag_or(self, name: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(found) => Err(self.bad(name, "true or false", found)),
        }
    }

    pub(crate) fn text(self, name: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(found) => Err(self.bad(name, "a string", found)),
        }
    }

    /// Token ids: absent, one, or a list; all below `vocab`.
    pub(crate) fn token_ids(self, name: &str, vocab: usize) -> Result<Vec<u32>, ConfigError> {
        let one = |value: &Value| match value.as_u64() {
            Some(id) if id < vocab as u64 => Ok(id as u32),
            _ => Err(self.bad(name, format!("token ids below vocab_size {vocab}"), value)),
        };
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(one).collect(),
            Some(id) => Ok(vec![one(id)?]),
        }
    }
}

/// A value from a file, fit for a terminal: no control characters, and no more than a line.
fn printable(value: &Value) -> String {
    const MAX: usize = 60;
    let text = match value {
        Value::Array(items) => return format!("a list of {} items", items.len()),
        Value::Object(map) => return format!("an object of {} fields", map.len()),
        Value::String(text) => text.as_str(),
        other => &other.to_string(),
    };
    let mut short: String = text.chars().take(MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    if value.is_string() { format!("{short:?}") } else { short }
}
