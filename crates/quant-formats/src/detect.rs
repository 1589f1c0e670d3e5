//! Finding out how a checkpoint is quantized.
//!
//! The configuration decides where it names a method; then come files that only one library writes; then the
//! names of tensors.

use std::path::Path;

use quant_core::DType;
use serde_json::{Value, json};

use crate::error::FormatError;
use crate::json as json_file;
use crate::layout::{self, Layout};

/// A layout that is known by its marks only.
struct Family {
    id: &'static str,
    methods: &'static [&'static str],
    suffixes: &'static [&'static str],
}

const FAMILIES: &[Family] = &[
    Family { id: "exl2", methods: &["exl2"], suffixes: &[".q_weight"] },
    Family { id: "exl3", methods: &["exl3"], suffixes: &[".trellis"] },
];

/// Files that hold a quantization configuration of their own, and the method where they do not name one.
const SIDE_FILES: [(&str, &str); 3] =
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")];

/// Files that describe each module by its name, and the method that writes them.
const MODULE_FILES: [(&str, &str); 2] =
    [("quanto_qmap.json", "quanto"), ("model.safetensors.index.json.meta.json", "sinq")];

/// The layout of a checkpoint and its configuration, which is `null` where tensors alone tell. `None`: floats.
pub(crate) type Detected = Option<(&'static dyn Layout, Value)>;

/// Looks at `config.json`, then at side files in `dir`, then at tensors.
pub(crate) fn detect<'a>(
    config: &Value,
    dir: Option<&Path>,
    tensors: impl Iterator<Item = (&'a str, DType, &'a [usize])> + Clone,
) -> Result<Detected, FormatError> {
    let embedded = ["quantization_config", "compression_config"];
    let embedded = embedded.iter().filter_map(|key| config.get(key)).find(|v| !v.is_null());
    if let Some(found) = embedded {
        if !found.is_object() {
            return Err(config_error("quantization_config", found, "it must be an object"));
        }
        return match method(found)? {
            Some(method) => by_method(&method, with_modules(&method, found.clone(), dir)?).map(Some),
            None => by_tensors(tensors, found.clone()),
        };
    }
    for (name, default) in SIDE_FILES {
        let Some(path) = dir.map(|d| d.join(name)).filter(|p| p.exists()) else { continue };
        let found: Value = json_file::read(&path, json_file::CONFIG_LIMIT)?;
        let method = method(&found)?.unwrap_or_else(|| default.to_owned());
        return by_method(&method, found).map(Some);
    }
    for (name, method) in MODULE_FILES {
        if dir.is_some_and(|d| d.join(name).exists()) {
            return by_method(method, with_modules(method, json!({}), dir)?).map(Some);
        }
    }
    by_tensors(tensors, Value::Null)
}

/// The same for one file. Its tensors decide whether it is quantized; if they say so, a configuration beside it
/// tells the details, such as the version.
pub(crate) fn detect_file<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, DType, &'a [usize])> + Clone,
) -> Result<Detected, FormatError> {
    let alone = by_tensors(tensors.clone(), Value::Null)?;
    let Some(dir) = path.parent().filter(|_| alone.is_some()) else { return Ok(None) };
    let config = dir.join("config.json");
    if !config.exists() {
        return Ok(alone);
    }
    detect(&json_file::read(&config, json_file::CONFIG_LIMIT)?, Some(dir), tensors)
}

/// A configuration with the description of each module that its method keeps in a file of its own.
fn with_modules(method: &str, mut config: Value, dir: Option<&Path>) -> Result<Value, FormatError> {
    let file = MODULE_FILES.iter().find(|(_, m)| *m == method).map(|(name, _)| name);
    if let Some(path) = file.and_then(|name| dir.map(|d| d.join(name))).filter(|p| p.exists()) {
        config["modules"] = json_file::read(&path, json_file::CONFIG_LIMIT)?;
    }
    Ok(config)
}

/// The method that a configuration names, in lower case.
fn method(config: &Value) -> Result<Option<String>, FormatError> {
    for key in ["quant_method", "method"] {
        match config.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(method)) => return Ok(Some(method.to_lowercase())),
            Some(other) => return Err(config_error(key, other, "it must be a string")),
        }
    }
    let modelopt = config.get("quant_algo").or_else(|| config.pointer("/quantization/quant_algo"));
    Ok(modelopt.map(|_| "modelopt".to_owned()))
}

fn by_method(method: &str, config: Value) -> Result<(&'static dyn Layout, Value), FormatError> {
    if let Some(layout) = layout::layouts().iter().find(|l| l.methods().contains(&method)) {
        return Ok((*layout, config));
    }
    if let Some(family) = FAMILIES.iter().find(|f| f.methods.contains(&method)) {
        return Err(not_yet(family.id, format!("quant_method {method}")));
    }
    let recognised: Vec<_> = FAMILIES.iter().flat_map(|f| f.methods.iter().copied()).collect();
    Err(FormatError::UnknownMethod {
        found: method.to_owned(),
        supported: supported_methods(),
        recognised: recognised.join(", "),
    })
}

/// Goes by the names of tensors, for files without a configuration or with one that names no method.
fn by_tensors<'a>(
    tensors: impl Iterator<Item = (&'a str, DType, &'a [usize])> + Clone,
    config: Value,
) -> Result<Detected, FormatError> {
    let ends =
        |suffixes: &[&str]| tensors.clone().map(|(name, ..)| name).find(|n| ends_with_any(n, suffixes));
    if let Some(layout) = layout::layouts().iter().find(|layout| ends(layout.known_by()).is_some()) {
        return Ok(Some((*layout, config)));
    }
    for family in FAMILIES {
        if let Some(name) = ends(family.suffixes) {
            return Err(not_yet(family.id, format!("tensor {}", crate::display_name(name))));
        }
    }
    Ok(None)
}

fn ends_with_any(name: &str, suffixes: &[&str]) -> bool {
    suffixes.iter().any(|suffix| name.ends_with(suffix))
}

fn supported_methods() -> String {
    let mut methods: Vec<_> = layout::layouts().iter().flat_map(|l| l.methods().iter().copied()).collect();
    methods.dedup();
    methods.sort_unstable();
    methods.dedup();
    methods.join(", ")
}

pub(crate) fn not_yet(layout: &'static str, evidence: String) -> FormatError {
    FormatError::NotYet { layout, evidence, supported: supported_methods() }
}

fn config_error(field: &str, found: &Value, expected: &str) -> FormatError {
    FormatError::Config { field: field.to_owned(), found: found.to_string(), expected: expected.to_owned() }
}
