//! AWQ's `quantization_config`, with the names of AutoAWQ, llm-awq, GPTQModel and AutoRound.

use serde_json::Value;

use super::Version;
use crate::error::FormatError;
use crate::layout::fields::{GroupLen, config_bits, config_flag, config_group, field, wrong};

/// What a file says. Everything is optional: tensors tell the rest.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) version: Option<Version>,
    pub(super) group: Option<GroupLen>,
    pub(super) zero_point: Option<bool>,
}

impl Config {
    pub(super) fn parse(config: &Value) -> Result<Self, FormatError> {
        config_bits(config, &[4], "AWQ has 4 bits")?;
        let zero_point = match config_flag(config, &["zero_point"])? {
            None => config_flag(config, &["sym"])?.map(|symmetric| !symmetric),
            some => some,
        };
        Ok(Self { version: version(config)?, group: config_group(config)?, zero_point })
    }
}

fn version(config: &Value) -> Result<Option<Version>, FormatError> {
    if let Some((_, backend)) = field(config, &["backend"])
        && backend.as_str() == Some("llm-awq")
    {
        return Ok(Some(Version::GemvFast));
    }
    let Some((name, value)) = field(config, &["version", "format", "checkpoint_format"]) else {
        return Ok(None);
    };
    match value.as_str().map(str::to_lowercase).as_deref() {
        Some("gemm") => Ok(Some(Version::Gemm)),
        Some("gemv") => Ok(Some(Version::Gemv)),
        Some("gemv_fast" | "llm-awq") => Ok(Some(Version::GemvFast)),
        _ => Err(wrong(name, value, "this version reads gemm, gemv and gemv_fast")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_of_all_writers() {
        let parse = |value| Config::parse(&value).unwrap();
        let config = parse(json!({ "w_bit": 4, "q_group_size": 64, "version": "GEMV", "sym": true }));
        assert_eq!(config.version, Some(Version::Gemv));
        assert_eq!((config.group, config.zero_point), (Some(GroupLen::Columns(64)), Some(false)));
        assert_eq!(
            parse(json!({ "backend": "llm-awq", "version": "gemm" })).version,
            Some(Version::GemvFast)
        );
        assert_eq!(parse(json!({ "group_size": -1 })).group, Some(GroupLen::Row));
        assert_eq!(parse(Value::Null).version, None);
        for (config, word) in [
            (json!({ "bits": 3 }), "bits is 3"),
            (json!({ "version": "marlin" }), "version is marlin"),
            (json!({ "group_size": 0 }), "group_size is 0"),
            (json!({ "zero_point": 1 }), "zero_point is 1"),
        ] {
            let error = Config::parse(&config).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
