//! The keys of a GGUF file: a typed map that keeps its order.

use std::collections::BTreeMap;

use crate::error::{FormatError, GgufError};

/// A value of a key.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum MetaValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
    Array(MetaArray),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A list of values of one type. The format allows lists of lists; nobody writes them, and they are refused.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum MetaArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Str(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl MetaValue {
    /// Name of the type, as in the specification.
    pub fn type_name(&self) -> &'static str {
        match self {
            MetaValue::U8(_) => "u8",
            MetaValue::I8(_) => "i8",
            MetaValue::U16(_) => "u16",
            MetaValue::I16(_) => "i16",
            MetaValue::U32(_) => "u32",
            MetaValue::I32(_) => "i32",
            MetaValue::F32(_) => "f32",
            MetaValue::Bool(_) => "bool",
            MetaValue::Str(_) => "string",
            MetaValue::Array(_) => "array",
            MetaValue::U64(_) => "u64",
            MetaValue::I64(_) => "i64",
            MetaValue::F64(_) => "f64",
        }
    }

    /// A whole number of any width.
    pub fn as_i128(&self) -> Option<i128> {
        Some(match *self {
            MetaValue::U8(v) => v.into(),
            MetaValue::I8(v) => v.into(),
            MetaValue::U16(v) => v.into(),
            MetaValue::I16(v) => v.into(),
            MetaValue::U32(v) => v.into(),
            MetaValue::I32(v) => v.into(),
            MetaValue::U64(v) => v.into(),
            MetaValue::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// A number. An f32 becomes the f64 with its shortest decimal form: 0.1, not 0.10000000149.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            MetaValue::F32(v) => v.to_string().parse().ok(),
            MetaValue::F64(v) => Some(*v),
            other => other.as_i128().map(|v| v as f64),
        }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            MetaValue::Str(text) => Some(text),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            MetaValue::Bool(v) => Some(*v),
            _ => None,
        }
    }
}

impl MetaArray {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            MetaArray::U8(v) => v.len(),
            MetaArray::I8(v) => v.len(),
            MetaArray::U16(v) => v.len(),
            MetaArray::I16(v) => v.len(),
            MetaArray::U32(v) => v.len(),
            MetaArray::I32(v) => v.len(),
            MetaArray::F32(v) => v.len(),
            MetaArray::Bool(v) => v.len(),
            MetaArray::Str(v) => v.len(),
            MetaArray::U64(v) => v.len(),
            MetaArray::I64(v) => v.len(),
            MetaArray::F64(v) => v.len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All keys of a file, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, MetaValue)>,
    index: BTreeMap<String, usize>,
}

impl Metadata {
    /// No keys.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key, or replaces its value.
    pub fn set(&mut self, key: impl Into<String>, value: MetaValue) {
        let key = key.into();
        match self.index.get(&key) {
            Some(&i) => self.entries[i].1 = value,
            None => {
                self.index.insert(key.clone(), self.entries.len());
                self.entries.push((key, value));
            }
        }
    }

    /// Adds a key of a file; none occurs twice.
    pub(crate) fn insert_new(&mut self, key: String, value: MetaValue) -> Result<(), GgufError> {
        if self.index.contains_key(&key) {
            return Err(GgufError::DuplicateKey { key });
        }
        self.set(key, value);
        Ok(())
    }

    /// Value of a key.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Keys and values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &MetaValue)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A text. `None` if the key is absent; another type is an error.
    pub fn text(&self, key: &str) -> Result<Option<&str>, FormatError> {
        self.typed(key, "a string", MetaValue::as_str)
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.typed(key, "true or false", MetaValue::as_bool)
    }

    /// A token id or size.
    pub fn number(&self, key: &str) -> Result<Option<u64>, FormatError> {
        let read = |v: &MetaValue| v.as_i128().and_then(|v| u64::try_from(v).ok());
        self.typed(key, "a whole number", read)
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, FormatError> {
        self.typed(key, "an array of strings", |v| match v {
            MetaValue::Array(MetaArray::Str(list)) => Some(&list[..]),
            _ => None,
        })
    }

    /// A list of f32.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>, FormatError> {
        self.typed(key, "an array of f32", |v| match v {
            MetaValue::Array(MetaArray::F32(list)) => Some(&list[..]),
            _ => None,
        })
    }

    /// A list of i32.
    pub fn integers(&self, key: &str) -> Result<Option<&[i32]>, FormatError> {
        self.typed(key, "an array of i32", |v| match v {
            MetaValue::Array(MetaArray::I32(list)) => Some(&list[..]),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a MetaValue) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || FormatError::Key {
            key: key.to_owned(),
            found: value.type_name().to_owned(),
            expected: expected.to_owned(),
        };
        read(value).map(Some).ok_or_else(wrong)
    }
}

impl<K: Into<String>> FromIterator<(K, MetaValue)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (K, MetaValue)>>(entries: I) -> Self {
        let mut metadata = Self::new();
        entries.into_iter().for_each(|(key, value)| metadata.set(key, value));
        metadata
    }
}

impl From<&str> for MetaValue {
    fn from(text: &str) -> Self {
        MetaValue::Str(text.to_owned())
    }
}

impl From<u32> for MetaValue {
    fn from(value: u32) -> Self {
        MetaValue::U32(value)
    }
}

impl From<f32> for MetaValue {
    fn from(value: f32) -> Self {
        MetaValue::F32(value)
    }
}

impl From<bool> for MetaValue {
    fn from(value: bool) -> Self {
        MetaValue::Bool(value)
    }
}
