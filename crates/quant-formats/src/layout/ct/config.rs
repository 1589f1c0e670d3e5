//! The `quantization_config` of compressed-tensors.

use quant_core::{ActGrid, ActGroup, ActSpec, GridKind, GroupSize, ParamsKind, QuantSpec};
use regex::{RegexSet, RegexSetBuilder};
use serde_json::{Value, json};

use super::Format;
use crate::error::FormatError;
use crate::layout::StoredModel;
use crate::layout::fields::{config_bits, config_flag, field, wrong};
use crate::layout::scales::BLOCK;

/// Release of compressed-tensors whose files are written. From 0.18.0 on codes are packed densely.
const RELEASE: &str = "0.20.0";

/// Memory that the compiled patterns of a file may take together.
const PATTERN_LIMIT: usize = 32 << 20;

/// What a file says about its modules.
#[derive(Debug)]
pub(super) struct Config {
    /// The groups of modules, in their order.
    groups: Vec<Group>,
    /// Patterns of targets; `pattern_of` gives the group of each.
    patterns: RegexSet,
    pattern_of: Vec<usize>,
    /// Codes of 3, 5, 6, 7 bits fill words without gaps, if the release says so.
    pub(super) dense: bool,
}

/// One of the `config_groups`.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) weights: Weights,
    pub(super) input: Input,
    /// How the tensors lie, if it is said.
    pub(super) format: Option<Format>,
    names: Vec<String>,
    /// Meant for every linear layer.
    all: bool,
}

/// How weights are quantized. Everything is optional: tensors tell the rest.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weights {
    pub(super) bits: Option<u8>,
    pub(super) symmetric: Option<bool>,
    pub(super) group: Option<GroupSize>,
    float: bool,
}

/// How inputs are quantized.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Input {
    Dynamic(ActSpec),
    /// With scales beside the weights.
    Static(ActGrid),
    /// With a factor beside the weights.
    TwoLevel {
        grid: ActGrid,
        len: usize,
    },
}

impl Config {
    pub(super) fn parse(config: &Value) -> Result<Self, FormatError> {
        for name in ["sparsity_config", "transform_config", "moe_sparsity_config"] {
            if let Some((name, value)) = field(config, &[name])
                && !(value.as_object().is_some_and(|o| o.is_empty()) || value["format"] == "dense")
            {
                return Err(wrong(name, value, "sparse and transformed weights are not supported"));
            }
        }
        let format = Format::parse(config)?;
        let mut groups = Vec::new();
        let (mut patterns, mut pattern_of) = (Vec::new(), Vec::new());
        if let Some((name, value)) = field(config, &["config_groups"]) {
            let object =
                value.as_object().ok_or_else(|| wrong(name, value, "it must be an object of groups"))?;
            for value in object.values() {
                let mut group = Group::parse(value)?;
                group.format = group.format.or(format);
                for target in targets(value)? {
                    match target.strip_prefix("re:") {
                        Some(pattern) => {
                            patterns.push(format!("^(?:{pattern})"));
                            pattern_of.push(groups.len());
                        }
                        None if target == "Linear" => group.all = true,
                        None => group.names.push(target.to_owned()),
                    }
                }
                groups.push(group);
            }
        }
        let patterns = RegexSetBuilder::new(patterns).size_limit(PATTERN_LIMIT).build().map_err(|e| {
            let expected = "patterns must compile (without look-around and back-references)";
            wrong("targets", &Value::from(e.to_string()), expected)
        })?;
        Ok(Self { groups, patterns, pattern_of, dense: dense(config) })
    }

    /// The group of a module: one that names it goes before one that means all.
    pub(super) fn group(&self, module: &str) -> Option<&Group> {
        let named = self.groups.iter().rposition(|group| group.names.iter().any(|name| name == module));
        let matched = self.patterns.matches(module).iter().map(|i| self.pattern_of[i]).max();
        let all = || self.groups.iter().rposition(|group| group.all);
        named.max(matched).or_else(all).and_then(|i| self.groups.get(i))
    }

    /// The group of most modules.
    pub(super) fn base(&self) -> Option<&Group> {
        self.groups.iter().find(|group| group.all).or(self.groups.first())
    }
}

fn targets(group: &Value) -> Result<Vec<&str>, FormatError> {
    let Some((name, value)) = field(group, &["targets"]) else { return Ok(Vec::new()) };
    let names = value.as_array().map(|names| names.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
    names.flatten().ok_or_else(|| wrong(name, value, "it must be a list of names"))
}

/// Whether the release that wrote the file packs densely.
fn dense(config: &Value) -> bool {
    let version = config.get("version").and_then(Value::as_str).unwrap_or_default();
    let mut numbers = version.split('.').map(|n| n.parse::<u64>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (0, 18)
}

impl Group {
    fn parse(group: &Value) -> Result<Self, FormatError> {
        if !group.is_object() {
            return Err(wrong("config_groups", group, "each group must be an object"));
        }
        let weights = match field(group, &["weights"]) {
            None => Weights::default(),
            Some((_, args)) => Weights::parse(args)?,
        };
        let input = match field(group, &["input_activations"]) {
            None => Input::Dynamic(ActSpec::Float),
            Some((_, args)) => Input::parse(args)?,
        };
        Ok(Self { weights, input, format: Format::parse(group)?, names: Vec::new(), all: false })
    }

    /// What is said of the weights.
    pub(super) fn spec(&self) -> Option<QuantSpec> {
        let Weights { bits, symmetric, group, float } = self.weights;
        let (grid, scales) = match self.format {
            Some(Format::Nvfp4) => (GridKind::E2M1, ParamsKind::E4M3),
            Some(Format::Mxfp4) => (GridKind::E2M1, ParamsKind::E8M0),
            Some(Format::Mxfp6) => (GridKind::E2M3, ParamsKind::E8M0),
            Some(Format::Mxfp8) => (GridKind::E4M3, ParamsKind::E8M0),
            _ if float => (GridKind::E4M3, ParamsKind::F32),
            _ => (GridKind::Int, ParamsKind::F32),
        };
        let (bits, symmetric) = (bits?, symmetric.unwrap_or(true));
        Some(QuantSpec { bits, grid, group: group?, scales, symmetric, act_order: false })
    }
}

/// True for small floats.
fn is_float(args: &Value) -> Result<bool, FormatError> {
    match field(args, &["type"]) {
        None => Ok(false),
        Some((name, value)) => match value.as_str() {
            Some("int") => Ok(false),
            Some("float") => Ok(true),
            _ => Err(wrong(name, value, "it must be int or float")),
        },
    }
}

/// The elements that share a scale, `None` where it is not said.
fn group_size(args: &Value) -> Result<Option<GroupSize>, FormatError> {
    let len = match field(args, &["group_size"]) {
        None => None,
        Some((name, value)) => Some(match value.as_i64() {
            Some(-1) => GroupSize::Row,
            Some(len @ 1..) => GroupSize::Columns(usize::try_from(len).unwrap_or(usize::MAX)),
            _ => return Err(wrong(name, value, "it must be positive, or -1 for whole rows")),
        }),
    };
    let Some((name, value)) = field(args, &["strategy"]) else { return Ok(len) };
    match value.as_str() {
        Some("tensor") => Ok(Some(GroupSize::Tensor)),
        Some("channel") => Ok(Some(GroupSize::Row)),
        Some("group" | "tensor_group") => match len {
            Some(len) => Ok(Some(len)),
            None => Err(wrong(name, value, "it needs a group_size")),
        },
        Some("block") => block(args).map(Some),
        Some("token" | "attn_head") => Ok(None),
        _ => Err(wrong(name, value, "it must be tensor, channel, group, tensor_group, block or token")),
    }
}

/// `block_structure`: `[128, 128]`, or `128x128` in old files.
fn block(args: &Value) -> Result<GroupSize, FormatError> {
    let Some((name, value)) = field(args, &["block_structure"]) else { return Ok(BLOCK) };
    let size = match (value.as_str(), value.as_array().map(Vec::as_slice)) {
        (Some(text), _) => text.parse().ok().filter(|size| matches!(size, GroupSize::Tile { .. })),
        (_, Some([rows, cols])) => {
            let positive = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
            positive(rows).zip(positive(cols)).map(|(rows, cols)| GroupSize::Tile { rows, cols })
        }
        _ => None,
    };
    size.ok_or_else(|| wrong(name, value, "it must be two positive sizes"))
}

impl Weights {
    fn parse(args: &Value) -> Result<Self, FormatError> {
        Ok(Self {
            bits: config_bits(args, &[1, 2, 3, 4, 5, 6, 7, 8], "it must be 1 to 8")?,
            symmetric: config_flag(args, &["symmetric"])?,
            group: group_size(args)?,
            float: is_float(args)?,
        })
    }
}

impl Input {
    fn parse(args: &Value) -> Result<Self, FormatError> {
        let bits = config_bits(args, &[4, 8], "inputs are quantized to 4 or 8 bits")?.unwrap_or(8);
        let grid = match (is_float(args)?, bits) {
            (false, 8) => ActGrid::Int8,
            (true, 8) => ActGrid::E4M3,
            (true, _) => ActGrid::E2M1,
            (false, bits) => return Err(wrong("num_bits", &json!(bits), "inputs of integers have 8 bits")),
        };
        let group = group_size(args)?;
        let len = match group {
            Some(GroupSize::Columns(len)) => Some(len),
            _ => None,
        };
        match field(args, &["dynamic"]).map(|(_, value)| value) {
            Some(value) if value.as_str() == Some("local") => Ok(Input::TwoLevel {
                grid,
                len: len.ok_or_else(|| wrong("dynamic", value, "it needs a group_size"))?,
            }),
            Some(Value::Bool(true)) => {
                let per = match (group, len) {
                    (_, Some(len)) => ActGroup::Columns(len),
                    (Some(GroupSize::Tensor), _) => ActGroup::Tensor,
                    _ => ActGroup::Token,
                };
                let symmetric = config_flag(args, &["symmetric"])?.unwrap_or(true);
                Ok(Input::Dynamic(ActSpec::Dynamic { grid, per, symmetric, outlier_threshold: None }))
            }
            None | Some(Value::Bool(false)) => Ok(Input::Static(grid)),
            Some(value) => Err(wrong("dynamic", value, "it must be true, false or local")),
        }
    }

    /// What most modules do; the numbers are each module's own.
    pub(super) fn spec(&self) -> ActSpec {
        match *self {
            Input::Dynamic(ref spec) => spec.clone(),
            Input::Static(grid) => ActSpec::Static { grid, scale: 1.0, zero: 0 },
            Input::TwoLevel { grid, len } => ActSpec::TwoLevel { grid, len, factor: 1.0, divide: true },
        }
    }
}

/// The configuration of a checkpoint in that format.
pub(super) fn write(model: &StoredModel<'_>, format: Format) -> Value {
    let group = |spec: &QuantSpec, targets: Vec<String>| {
        json!({
            "format": format.name(),
            "input_activations": input_args(model.input),
            "output_activations": null,
            "targets": targets,
            "weights": weight_args(spec, format),
        })
    };
    let mut groups = serde_json::Map::new();
    groups.insert("group_0".into(), group(model.spec, vec!["Linear".into()]));
    let mut ignore = vec!["lm_head"];
    for (module, exception) in model.exceptions {
        match exception {
            None => ignore.push(module),
            Some(spec) => {
                let name = format!("group_{}", groups.len());
                groups.insert(name, group(spec, vec![module.clone()]));
            }
        }
    }
    json!({
        "config_groups": groups,
        "format": format.name(),
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": RELEASE,
    })
}

fn weight_args(spec: &QuantSpec, format: Format) -> Value {
    let (strategy, group_size) = match spec.group {
        GroupSize::Tensor => ("tensor", None),
        GroupSize::Row => ("channel", None),
        GroupSize::Tile { .. } => ("block", None),
        _ if format == Format::Nvfp4 => ("tensor_group", Some(spec.group.as_config())),
        _ => ("group", Some(spec.group.as_config())),
    };
    let mut args = json!({
        "dynamic": false,
        "group_size": group_size,
        "num_bits": spec.bits,
        "strategy": strategy,
        "symmetric": spec.symmetric,
        "type": if spec.grid == GridKind::Int { "int" } else { "float" },
    });
    if let GroupSize::Tile { rows, cols } = spec.group {
        args["block_structure"] = json!([rows, cols]);
    }
    if spec.scales == ParamsKind::E8M0 {
        args["scale_dtype"] = json!("torch.uint8");
    }
    args
}

fn input_args(input: &ActSpec) -> Value {
    let of_grid = |grid: &ActGrid| match grid {
        ActGrid::Int8 => (8, "int"),
        ActGrid::E4M3 => (8, "float"),
        ActGrid::E2M1 => (4, "float"),
    };
    let (grid, strategy, len, dynamic, symmetric) = match input {
        ActSpec::Float => return Value::Null,
        ActSpec::Dynamic { grid, per, symmetric, .. } => {
            let (strategy, len) = match per {
                ActGroup::Tensor => ("tensor", None),
                ActGroup::Token => ("token", None),
                ActGroup::Columns(len) => ("group", Some(*len)),
            };
            (grid, strategy, len, json!(true), *symmetric)
        }
        ActSpec::TwoLevel { grid, len, .. } => (grid, "tensor_group", Some(*len), json!("local"), true),
        ActSpec::Static { grid, zero, .. } => (grid, "tensor", None, json!(false), *zero == 0),
    };
    let (bits, kind) = of_grid(grid);
    json!({
        "dynamic": dynamic,
        "group_size": len,
        "num_bits": bits,
        "strategy": strategy,
        "symmetric": symmetric,
        "type": kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(groups: Value) -> Value {
        json!({ "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups })
    }

    #[test]
    fn a_name_goes_before_a_pattern_and_a_pattern_before_all() {
        let weights = |bits: u8| json!({ "num_bits": bits, "group_size": 32, "strategy": "group" });
        let config = Config::parse(&config(json!({
            "group_0": { "targets": ["Linear"], "weights": weights(4) },
            "group_1": { "targets": ["re:.*down_proj$", "a.up"], "weights": weights(8) },
            "group_2": { "targets": ["b.down_proj"], "weights": weights(2) },
        })))
        .unwrap();
        for (module, bits) in [("a.q", 4), ("a.down_proj", 8), ("a.up", 8), ("b.down_proj", 2), ("xa.up", 4)]
        {
            assert_eq!(config.group(module).unwrap().weights.bits, Some(bits), "{module}");
        }
        assert_eq!(config.base().unwrap().spec().unwrap().bits, 4);
        assert!(!config.dense);
    }

    #[test]
    fn strategies_are_groups() {
        let group = |args: Value| group_size(&args).unwrap();
        assert_eq!(group(json!({ "strategy": "channel" })), Some(GroupSize::Row));
        assert_eq!(group(json!({ "strategy": "group", "group_size": 16 })), Some(GroupSize::Columns(16)));
        assert_eq!(
            group(json!({ "strategy": "block", "block_structure": "64x32" })),
            Some(GroupSize::Tile { rows: 64, cols: 32 })
        );
        assert_eq!(group(json!({ "strategy": "block", "block_structure": [128, 128] })), Some(BLOCK));
        assert_eq!(group(json!({ "group_size": -1 })), Some(GroupSize::Row));
        assert!(dense(&json!({ "version": "0.18.0" })) && dense(&json!({ "version": "1.0" })));
        assert!(!dense(&json!({ "version": "0.17.1" })));
    }

    #[test]
    fn what_cannot_be_is_refused_by_field() {
        let weights = |args: Value| config(json!({ "group_0": { "targets": ["Linear"], "weights": args } }));
        let input = |args: Value| config(json!({ "group_0": { "input_activations": args } }));
        for (config, word) in [
            (json!({ "format": "zork" }), "format is zork"),
            (json!({ "format": "marlin-24" }), "format is marlin-24"),
            (json!({ "sparsity_config": { "format": "sparse-bitmask" } }), "sparsity_config"),
            (config(json!([1])), "config_groups"),
            (config(json!({ "group_0": { "targets": "Linear" } })), "targets"),
            (config(json!({ "group_0": { "targets": ["re:((("] } })), "targets"),
            (weights(json!({ "num_bits": 9 })), "num_bits is 9"),
            (weights(json!({ "group_size": 0 })), "group_size is 0"),
            (weights(json!({ "strategy": "group" })), "strategy is group"),
            (weights(json!({ "strategy": "block", "block_structure": [0, 1] })), "block_structure"),
            (weights(json!({ "type": "complex" })), "type is complex"),
            (input(json!({ "num_bits": 4, "type": "int" })), "num_bits is 4"),
            (input(json!({ "dynamic": 3 })), "dynamic is 3"),
        ] {
            let error = Config::parse(&config).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
