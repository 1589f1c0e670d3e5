//! Likely mistakes, which no header shows: they are read off the weights themselves.
//!
//! A fault of a converter touches every layer, so each layer has a vote and the majority decides. What the statistics
//! are, what they cannot see, and how often they are right is in `docs/lint.md`.

mod codes;
mod columns;
mod rotary;
mod scales;
#[cfg(test)]
mod tests;

use std::path::Path;

use ndarray::{Array2, Axis};
use quant_core::WeightSource;
use quant_formats::{Checkpoint, Finding, Severity, display_name};
use quant_model::{ArchSpec, NormPlace, PositionSpec, StageKind, weight_f32};
use rayon::prelude::*;
use serde_json::Value;

use self::codes::CodeStatistics;
use self::columns::ColumnStatistics;
use self::rotary::RotaryStatistics;
use self::scales::ScaleSlope;
use crate::error::Error;
use crate::verify::Verification;

/// Looks for mistakes of converters in a checkpoint: zero points that are off by one (version 1 of GPTQ read as
/// version 2 and the other way round), codes in another order than their zero points (nibbles, groups), columns in
/// another order than their groups (act-order), codes under scales of other groups, columns in another order within
/// each eight, scales that cannot be, ties that are none, rows of queries and keys in
/// the order of another rotary embedding.
pub fn lint(model: &Path) -> Result<Verification, Error> {
    let checkpoint = Checkpoint::open(model)?;
    let mut findings = Vec::new();
    if checkpoint.reader()?.is_some() {
        findings.extend(lint_codes(&checkpoint)?);
        findings.extend(lint_act_order(&checkpoint)?);
    }
    if let Ok(arch) = ArchSpec::from_config(checkpoint.config()) {
        if checkpoint.reader()?.is_some() {
            findings.extend(lint_columns(&checkpoint, &arch)?);
        }
        findings.extend(lint_ties(&checkpoint, &arch)?);
        findings.extend(lint_rotary(&checkpoint, &arch)?);
    }
    Ok(Verification { ok: findings.iter().all(|f| f.severity != Severity::Error), findings })
}

fn finding(severity: Severity, code: &'static str, tensor: &str, message: String, remedy: &str) -> Finding {
    let tensor = if tensor.is_empty() { String::new() } else { display_name(tensor).to_string() };
    Finding { severity, code, tensor, message, remedy: remedy.to_owned() }
}

/// What a layer's codes say; at most one finding for each kind of mistake.
fn lint_codes(checkpoint: &Checkpoint) -> Result<Vec<Finding>, Error> {
    let modules: Vec<&str> = checkpoint.quantized_modules().collect();
    let statistics: Vec<Option<CodeStatistics>> = modules
        .par_iter()
        .map(|module| {
            let linear = checkpoint.quantized_linear(module)?;
            Ok(linear.map(|linear| CodeStatistics::of(&linear.weight)))
        })
        .collect::<Result<_, Error>>()?;
    let layers: Vec<(&str, &CodeStatistics)> =
        modules.iter().zip(&statistics).filter_map(|(m, s)| Some((*m, s.as_ref()?))).collect();
    let majority = |holds: &dyn Fn(&CodeStatistics) -> bool| {
        let mut with = layers.iter().filter(|(_, s)| holds(s));
        let count = with.clone().count();
        let first = with.next().map(|(module, s)| (*module, *s))?;
        (2 * count > layers.len()).then_some((count, first))
    };
    let of = |count: usize| format!("{count} of {} layers", layers.len());
    let mut findings = Vec::new();
    for (sign, read_as) in [(1.0, "too small"), (-1.0, "too large")] {
        if let Some((count, (module, s))) = majority(&|s| s.zeros_off(sign)) {
            let message = format!(
                "in {} the zero points are {read_as} by one: codes lie {:+.2} steps beside them in the middle",
                of(count),
                s.bias,
            );
            let remedy =
                "the file mixes up versions of GPTQ: try the other of gptq and gptq_v2 as checkpoint_format";
            findings.push(finding(Severity::Error, "zero-points", module, message, remedy));
        }
    }
    if let Some((count, (module, s))) = majority(&CodeStatistics::zeros_strange) {
        let value = s.overall.value;
        let message =
            format!("in {} the zero points do not follow the codes (correlation {value:.2})", of(count));
        let remedy =
            "codes or zero points are packed in another order (nibbles, rows); convert the model again";
        findings.push(finding(Severity::Error, "code-order", module, message, remedy));
    }
    if let Some((count, (module, s))) = majority(&CodeStatistics::groups_strange) {
        let value = s.within_rows.value;
        let message = format!(
            "in {} the zero points do not follow the codes from group to group (correlation {value:.2})",
            of(count)
        );
        let remedy =
            "columns are in another order than their groups (act-order, g_idx), or the group size is wrong";
        findings.push(finding(Severity::Error, "group-order", module, message, remedy));
    }
    findings.extend(lint_scales(&layers));
    for (module, s) in &layers {
        if let Some(problem) = &s.scale_problem {
            let remedy = "the block is damaged; quantize or download the model again";
            findings.push(finding(Severity::Warning, "scale", module, problem.clone(), remedy));
        }
    }
    Ok(findings)
}

/// Scales that do not follow their codes, in most of the layers that are large enough to tell, and in all together.
fn lint_scales(layers: &[(&str, &CodeStatistics)]) -> Option<Finding> {
    let together = layers.iter().fold(ScaleSlope::default(), |sum, (_, s)| sum.and(s.scale_slope));
    let certain: Vec<_> = layers.iter().filter(|(_, s)| s.scale_slope.is_certain()).collect();
    let absent: Vec<_> = certain.iter().filter(|(_, s)| s.scale_slope.is_absent()).collect();
    let (module, _) = absent.first().filter(|_| 2 * absent.len() > certain.len() && together.is_absent())?;
    let message = format!(
        "in {} of {} layers the scales do not follow the codes (slope {:.2} where -1 is expected)",
        absent.len(),
        certain.len(),
        together.value()
    );
    let remedy = "codes lie under scales of other groups: unpacked in another order, or g_idx or the group size is wrong";
    Some(finding(Severity::Error, "scale-order", module, message, remedy))
}

/// The configuration's word on the order of columns against the layers'.
fn lint_act_order(checkpoint: &Checkpoint) -> Result<Vec<Finding>, Error> {
    let Some(reader) = checkpoint.reader()? else { return Ok(Vec::new()) };
    let config = checkpoint.config().pointer("/quantization_config/desc_act").and_then(Value::as_bool);
    let (Some(said), Some(module)) = (config, checkpoint.quantized_modules().next()) else {
        return Ok(Vec::new());
    };
    let spec = match checkpoint.quantized_linear(module)? {
        Some(linear) => linear.weight.spec(),
        None => return Ok(Vec::new()),
    };
    if spec.act_order == said {
        return Ok(Vec::new());
    }
    let (message, severity) = match said {
        true => {
            ("desc_act is true, but columns are in natural order (as with static groups)", Severity::Warning)
        }
        false => ("desc_act is false, but g_idx puts columns in another order", Severity::Error),
    };
    // Programs that trust the flag ignore g_idx, and so compute nonsense.
    let message = format!("{}: {message}", reader.layout().id());
    let remedy = "set desc_act to what g_idx says";
    Ok(vec![finding(severity, "act-order", module, message, remedy)])
}

/// A head that should be the embedding, and one that should not be missing.
fn lint_ties(checkpoint: &Checkpoint, arch: &ArchSpec) -> Result<Vec<Finding>, Error> {
    if !arch.causal {
        return Ok(Vec::new());
    }
    let head = format!("{}.weight", arch.names.head);
    let embedding = format!("{}{}.weight", arch.names.prefix, arch.names.embedding);
    let quantized = checkpoint.quantized_modules().any(|module| module == arch.names.head);
    let stored = checkpoint.contains(&head);
    if arch.tied_embeddings && quantized {
        let message = "tie_word_embeddings is true, but the head is quantized on its own".to_owned();
        let remedy = "set tie_word_embeddings to false: else the embedding is used and the head is not";
        return Ok(vec![finding(Severity::Error, "tied-embeddings", arch.names.head, message, remedy)]);
    }
    if !arch.tied_embeddings && !stored && !quantized {
        let message = "tie_word_embeddings is false, but there is no head".to_owned();
        let remedy = "set tie_word_embeddings to true if the embedding serves as head";
        return Ok(vec![finding(Severity::Error, "tied-embeddings", arch.names.head, message, remedy)]);
    }
    if !(arch.tied_embeddings && stored && checkpoint.contains(&embedding)) {
        return Ok(Vec::new());
    }
    let (a, b) = (checkpoint.tensor(&head)?, checkpoint.tensor(&embedding)?);
    let same = match (a.to_f32(), b.to_f32()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    let message = "tie_word_embeddings is true, but head and embedding differ".to_owned();
    let remedy = "set tie_word_embeddings to false, or remove the head";
    Ok((!same)
        .then(|| finding(Severity::Error, "tied-embeddings", &head, message, remedy))
        .into_iter()
        .collect())
}

/// The weights `[out, in]` of a linear of a block, if it has this shape: it may be fused, of another architecture, or
/// missing.
fn weight(
    checkpoint: &Checkpoint,
    arch: &ArchSpec,
    module: &str,
    shape: (usize, usize),
) -> Result<Option<Array2<f32>>, Error> {
    let stored = checkpoint.linear_shape(module).ok();
    let conv1d = arch.conv1d && !checkpoint.quantized_modules().any(|quantized| quantized == module);
    let stored = stored.map(|(rows, cols)| if conv1d { (cols, rows) } else { (rows, cols) });
    if stored != Some(shape) {
        return Ok(None);
    }
    Ok(Some(weight_f32(module, &checkpoint.linear(module)?, conv1d)?))
}

/// The gains of a norm.
fn gains(checkpoint: &Checkpoint, norm: &str) -> Option<Vec<f32>> {
    WeightSource::tensor(checkpoint, &format!("{norm}.weight")).ok()?.to_f32().ok()
}

/// The order of columns within each eight, where codes that share a word may be mixed up.
fn lint_columns(checkpoint: &Checkpoint, arch: &ArchSpec) -> Result<Vec<Finding>, Error> {
    let mut statistics = ColumnStatistics::default();
    for layer in 0..arch.layers {
        let path = arch.block_path(layer, checkpoint);
        // What is met by the inputs of the next stage, feature by feature.
        let mut neurons = Vec::new();
        for stage in &arch.stages {
            let norm = match stage.kind {
                StageKind::Qkv => Some(arch.names.attention_norm),
                StageKind::MlpIn => Some(arch.names.mlp_norm),
                StageKind::AttentionOut | StageKind::MlpOut => None,
            };
            let norm = norm.filter(|_| arch.norm.place == NormPlace::Before);
            let gains =
                norm.and_then(|norm| gains(checkpoint, &format!("{path}.{norm}"))).unwrap_or_default();
            let beside = match stage.kind {
                StageKind::MlpOut => std::mem::take(&mut neurons),
                _ => gains.iter().map(|gain| f64::from(gain.abs()).ln()).collect(),
            };
            for linear in &stage.linears {
                let module = format!("{path}.{}", linear.name);
                let shape = (linear.out_features, linear.in_features);
                let Some(w) = weight(checkpoint, arch, &module, shape)? else { return Ok(Vec::new()) };
                statistics.add(w.view(), &beside);
                if stage.kind == StageKind::MlpIn {
                    neurons = columns::sizes(w.view(), Axis(1));
                }
            }
        }
    }
    let (number, other) = statistics.other();
    let message = format!(
        "columns go with their features if each eight of them is put back from the order {:?} ({other:.2}), not as they are ({:.2})",
        columns::ORDERS[number],
        statistics.stored(),
    );
    let remedy = "codes that share a word are packed in another order; convert the model again";
    let wrong = statistics.is_other();
    Ok(wrong.then(|| finding(Severity::Error, "column-order", "", message, remedy)).into_iter().collect())
}

/// The order of rows of queries and keys.
fn lint_rotary(checkpoint: &Checkpoint, arch: &ArchSpec) -> Result<Vec<Finding>, Error> {
    if !matches!(arch.positions, PositionSpec::Rope(_)) {
        return Ok(Vec::new());
    }
    let mut statistics = RotaryStatistics::default();
    for layer in 0..arch.layers {
        let path = arch.block_path(layer, checkpoint);
        let weight = |name: &str, heads: usize| {
            let shape = (heads * arch.head_dim, arch.hidden_size);
            weight(checkpoint, arch, &format!("{path}.{name}"), shape)
        };
        let norm = gains(checkpoint, &format!("{path}.{}", arch.names.attention_norm));
        let (q, k) = (weight("self_attn.q_proj", arch.heads)?, weight("self_attn.k_proj", arch.kv_heads)?);
        let (Some(q), Some(k), Some(norm)) = (q, k, norm) else { return Ok(Vec::new()) };
        statistics.add(q.view(), k.view(), &norm, arch.head_dim);
    }
    let message = format!(
        "rows of queries and keys lie in pairs ({:.2}), not in halves ({:.2}): the order of GGUF and of the original files",
        statistics.neighbours(),
        statistics.halves(),
    );
    let remedy = "permute the rows of q_proj and k_proj from interleaved to half-split order";
    let wrong = statistics.is_interleaved();
    Ok(wrong.then(|| finding(Severity::Error, "rotary-order", "", message, remedy)).into_iter().collect())
}
