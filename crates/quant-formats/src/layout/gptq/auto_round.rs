//! AutoRound's checkpoints: integers in GPTQ's or AWQ's order, small floats as compressed-tensors stores them.

use serde_json::{Map, Value, json};

use super::Version;
use super::read::GptqReader;
use crate::detect::not_yet;
use crate::error::FormatError;
use crate::layout::awq::AwqReader;
use crate::layout::fields::field;
use crate::layout::{Reader, StoredModel};

/// Release of AutoRound whose configuration is written.
const RELEASE: &str = "0.16.1";

/// The reader for a `packing_format`.
pub(super) fn reader(config: &Value) -> Result<Box<dyn Reader>, FormatError> {
    let format =
        field(config, &["packing_format"]).map(|(_, v)| v.as_str().unwrap_or_default().to_lowercase());
    let gptq = |version| Ok(Box::new(GptqReader::of_version(config, version)?) as Box<dyn Reader>);
    match format.as_deref() {
        None | Some("auto" | "auto_round:auto_gptq" | "auto_round:gptq") => gptq(Version::AutoRoundV1),
        Some(
            "auto_round"
            | "auto_round:gptqmodel"
            | "auto_round:exllamav2"
            | "auto_round:triton"
            | "auto_round:tritonv2",
        ) => gptq(Version::AutoRound),
        Some("auto_round:auto_awq" | "auto_round:awq") => Ok(Box::new(AwqReader::new(config)?)),
        Some(other) => Err(not_yet("auto-round", format!("packing_format {}", crate::display_name(other)))),
    }
}

/// The `quantization_config` of AutoRound.
pub(super) fn config(model: &StoredModel<'_>, version: Version) -> Value {
    let spec = model.spec;
    let mut config = json!({
        "autoround_version": RELEASE,
        "bits": spec.bits,
        "data_type": "int",
        "group_size": spec.group.as_config(),
        "sym": spec.symmetric,
        "packing_format": match version {
            Version::AutoRoundV1 => "auto_round:auto_gptq",
            _ => "auto_round",
        },
        "quant_method": "auto-round",
    });
    let extra = model.exceptions.iter().map(|(module, exception)| {
        let settings = match exception {
            None => json!({ "bits": 16, "data_type": "float" }),
            Some(spec) => {
                json!({ "bits": spec.bits, "group_size": spec.group.as_config(), "sym": spec.symmetric })
            }
        };
        (module.clone(), settings)
    });
    let extra: Map<String, Value> = extra.collect();
    if !extra.is_empty() {
        config["extra_config"] = extra.into();
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_choose_the_layout() {
        for (format, id) in [
            (Value::Null, "auto_round"),
            (json!("auto_round:auto_gptq"), "auto_round"),
            (json!("auto_round:exllamav2"), "auto_round"),
            (json!("auto_round:gptqmodel"), "auto_round"),
            (json!("auto_round:auto_awq"), "awq"),
        ] {
            let config = json!({ "quant_method": "auto-round", "packing_format": format, "bits": 4 });
            assert_eq!(reader(&config).unwrap().layout().id(), id);
        }
        let error = reader(&json!({ "packing_format": "auto_round:zork" })).err().unwrap().to_string();
        assert!(error.contains("auto_round:zork"), "{error}");
    }
}
