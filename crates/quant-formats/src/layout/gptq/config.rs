//! GPTQ's `quantization_config`, with the names that its libraries have given it over the years.

use regex::{RegexSet, RegexSetBuilder};
use serde_json::Value;

use super::{BITS, Version};
use crate::error::FormatError;
use crate::layout::fields::{GroupLen, config_bits, config_flag, config_group, field, wrong};

/// Memory that the compiled patterns of a file may take together.
const PATTERN_LIMIT: usize = 32 << 20;

/// What a file says about its modules. Everything is optional but the version: tensors tell the rest.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) version: Version,
    pub(super) base: Settings,
    pub(super) symmetric: Option<bool>,
    pub(super) act_order: Option<bool>,
    /// Patterns that match from the start of a module path; the first match wins.
    patterns: RegexSet,
    overrides: Vec<Settings>,
}

/// What can differ between modules.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Settings {
    pub(super) bits: Option<u8>,
    pub(super) group: Option<GroupLen>,
}

impl Config {
    /// `null` is a file without configuration: version 1, and everything else from the tensors.
    pub(super) fn parse(config: &Value) -> Result<Self, FormatError> {
        let format = field(config, &["checkpoint_format", "format", "version"]);
        let version = match format {
            None => Version::V1,
            Some((name, value)) => match value.as_str().map(str::to_lowercase).as_deref() {
                Some("gptq") => Version::V1,
                Some("gptq_v2") => Version::V2,
                Some("gptq_p") => Version::Planar,
                _ => return Err(wrong(name, value, "this version reads gptq, gptq_v2 and gptq_p")),
            },
        };
        Self::of_version(config, version)
    }

    /// The rest of a configuration whose version is known.
    pub(super) fn of_version(config: &Value, version: Version) -> Result<Self, FormatError> {
        refuse_unknown_storage(config)?;
        let symmetric = match config_flag(config, &["sym"])? {
            None => config_flag(config, &["zero_point"])?.map(|zero_point| !zero_point),
            some => some,
        };
        let rules = rules(config)?;
        let patterns = rules.iter().map(|(pattern, _)| pattern);
        let patterns = RegexSetBuilder::new(patterns).size_limit(PATTERN_LIMIT).build().map_err(|e| {
            let found = Value::from(e.to_string());
            wrong("dynamic", &found, "patterns must compile (without look-around and back-references)")
        })?;
        Ok(Self {
            version,
            base: Settings::parse(config)?,
            symmetric,
            act_order: config_flag(config, &["desc_act"])?,
            patterns,
            overrides: rules.into_iter().map(|(_, settings)| settings).collect(),
        })
    }

    /// The settings of a module: those of the first rule that matches it, then those of all.
    pub(super) fn settings(&self, module: &str) -> Settings {
        let rule = self.patterns.matches(module).iter().next();
        let rule = rule.and_then(|i| self.overrides.get(i).copied()).unwrap_or_default();
        Settings { bits: rule.bits.or(self.base.bits), group: rule.group.or(self.base.group) }
    }
}

impl Settings {
    fn parse(config: &Value) -> Result<Self, FormatError> {
        let bits = config_bits(config, &BITS, "gptq has 2 to 8 bits")?;
        let group = config_group(config)?;
        Ok(Self { bits, group })
    }
}

/// Variants of the layout that lie otherwise in their tensors.
fn refuse_unknown_storage(config: &Value) -> Result<(), FormatError> {
    if let Some((name, value)) = field(config, &["pack_dtype"])
        && value.as_str() != Some("int32")
    {
        return Err(wrong(name, value, "codes must be packed in int32"));
    }
    if let Some((name, value)) = field(config, &["is_marlin_format"])
        && value.as_bool() != Some(false)
    {
        return Err(wrong(name, value, "convert the Marlin file to plain gptq first"));
    }
    if let Some((name, value)) = field(config, &["rotation"])
        && !matches!(value.as_str(), Some("" | "none"))
    {
        return Err(wrong(name, value, "rotated models are not supported by this version"));
    }
    Ok(())
}

/// The rules of `dynamic` (patterns, GPTQModel) and of `extra_config` (names or patterns, AutoRound).
fn rules(config: &Value) -> Result<Vec<(String, Settings)>, FormatError> {
    let mut rules = Vec::new();
    for name in ["dynamic", "extra_config"] {
        let Some((name, value)) = field(config, &[name]) else { continue };
        // GPTQModel writes `false` for none.
        if value.as_bool() == Some(false) {
            continue;
        }
        let object =
            value.as_object().ok_or_else(|| wrong(name, value, "it must be an object of patterns"))?;
        for (pattern, settings) in object {
            let skip = pattern.starts_with("-:");
            let pattern = pattern.strip_prefix("-:").or(pattern.strip_prefix("+:")).unwrap_or(pattern);
            // A skipped module has no settings; should it be quantized all the same, its tensors tell. So have
            // AutoRound's entries of 16 bits.
            let float = settings.get("bits").and_then(Value::as_u64).is_some_and(|b| b >= 16);
            let settings = if skip || float { Settings::default() } else { Settings::parse(settings)? };
            rules.push((format!("^(?:{pattern})"), settings));
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn old_names_and_defaults() {
        let config = Config::parse(&json!({ "wbits": 3, "q_group_size": -1, "zero_point": true })).unwrap();
        assert_eq!(config.base, Settings { bits: Some(3), group: Some(GroupLen::Row) });
        assert_eq!((config.version, config.symmetric, config.act_order), (Version::V1, Some(false), None));
        let config = Config::parse(&json!({ "format": "GPTQ_v2", "bits": null })).unwrap();
        assert_eq!((config.version, config.base), (Version::V2, Settings::default()));
        assert_eq!(Config::parse(&Value::Null).unwrap().version, Version::V1);
    }

    #[test]
    fn the_first_rule_that_matches_from_the_start_wins() {
        let config = Config::parse(&json!({ "bits": 4, "group_size": 128, "dynamic": {
            "z.*down": { "bits": 2 },
            "+:.*down": { "bits": 8, "group_size": 64 },
            "a.*": { "bits": 3 },
            "-:b": { "bits": 77 },
        }}))
        .unwrap();
        let of = |module: &str| {
            let s = config.settings(module);
            (s.bits.unwrap(), s.group.unwrap())
        };
        assert_eq!(of("a.down_proj"), (8, GroupLen::Columns(64)));
        assert_eq!(of("a.up"), (3, GroupLen::Columns(128)));
        assert_eq!(of("xa.up"), (4, GroupLen::Columns(128)), "a pattern is anchored at the start");
        assert_eq!(of("b"), (4, GroupLen::Columns(128)));
    }

    #[test]
    fn what_cannot_be_is_refused_by_field() {
        for (config, word) in [
            (json!({ "bits": 9 }), "bits is 9"),
            (json!({ "bits": "4" }), "bits is 4"),
            (json!({ "group_size": 0 }), "group_size is 0"),
            (json!({ "group_size": -2 }), "group_size is -2"),
            (json!({ "checkpoint_format": "marlin" }), "checkpoint_format is marlin"),
            (json!({ "format": "gptq_x" }), "gptq_x"),
            (json!({ "pack_dtype": "int8" }), "pack_dtype"),
            (json!({ "rotation": "hadamard" }), "rotation"),
            (json!({ "sym": 1 }), "sym is 1"),
            (json!({ "dynamic": { "(?!x)a": {} } }), "dynamic"),
            (json!({ "dynamic": { "a": { "bits": 1 } } }), "bits is 1"),
            (json!({ "dynamic": [1] }), "dynamic"),
        ] {
            let error = Config::parse(&config).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(
            Config::parse(&json!({ "format": "GPTQ_P", "bits": 5 })).unwrap().version,
            Version::Planar
        );
    }
}
