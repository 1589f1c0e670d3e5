//! From a float checkpoint to a quantized one.
//!
//! [`plan`] looks at headers alone and says what would happen; [`quantize`] does it. Both begin with the same
//! [`Job`], so a plan cannot differ from the run.

mod activations;
mod inspector;
mod job;
mod memory;
mod pass;
mod run;
mod summary;
mod transform;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use quant_formats::{
    Checkpoint, CheckpointWriter, Container, ModelWriter, StoredModel, WriteOptions, planned_files,
};
use quant_methods::Needs;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::calibration::{self, Calibration, CalibrationSource};
use crate::config::QuantizeConfig;
use crate::error::{Error, Problem};
use crate::progress::Progress;
use job::Job;
use memory::{RunShape, Spill, StageShape};
use run::Run;
pub use summary::{LayerSummary, Plan, PlannedLayer, Summary};

/// What quantizing `model` with `config` would do. Reads headers only; problems are listed, not raised.
pub fn plan(model: &Path, config: &QuantizeConfig) -> Result<Plan, Error> {
    let job = Job::prepare(Checkpoint::open(model)?, config)?;
    let calibration_tokens = if job.is_calibrated() { job.tokens_at_most() } else { 0 };
    Ok(make_plan(&job, calibration_tokens)?.0)
}

/// Quantizes the checkpoint `model` into the directory `out`, or into the file `out` where the layout is GGUF.
///
/// The output appears whole or not at all. The same inputs give the same bytes on any number of threads; work runs on
/// the current rayon pool.
pub fn quantize(
    model: &Path,
    out: &Path,
    config: &QuantizeConfig,
    progress: &dyn Progress,
) -> Result<Summary, Error> {
    let start = Instant::now();
    let job = Job::prepare(Checkpoint::open(model)?, config)?;
    if !job.problems.is_empty() {
        // Before a calibration text is read, which may be long.
        return Err(Error::Problems(job.problems));
    }
    let calibration = match job.is_calibrated() {
        false => None,
        true => Some(job.calibration(progress)?),
    };
    let (plan, spill) = make_plan(&job, calibration.as_ref().map_or(0, Calibration::tokens))?;
    if !plan.problems.is_empty() {
        return Err(Error::Problems(plan.problems));
    }
    let (container, files) = (job.layout.container(), || job.source.model_files());
    let writer = ModelWriter::create(container, out, &job.outputs(), files, &job.write_options())?;
    let mut run = Run::new(&job, &writer, progress);
    run.carry_tensors()?;
    match &calibration {
        None => run.without_calibration()?,
        Some(calibration) => run.with_calibration(calibration, spill)?,
    }
    let (layers, zeroed) = (run.layers, run.zeroed);
    if zeroed > 0 {
        progress.note(&format!("{zeroed} weights were not finite and were replaced with zero"));
    }
    if let Some(directory) = writer.directory() {
        write_side_files(&job, directory)?;
    }
    let written = writer.finish()?;
    let dir = match container {
        Container::Directory => out,
        Container::Gguf => out.parent().unwrap_or(out),
    };
    Ok(Summary {
        method: config.method.clone(),
        bits: config.bits,
        group_size: config.group.as_config(),
        layout: job.layout.id().to_owned(),
        fallbacks: layers.iter().filter(|l| l.fallback.is_some()).count(),
        layers,
        zeroed,
        calibration_tokens: plan.calibration_tokens,
        bytes_in: plan.bytes_in,
        bytes_out: plan.bytes_out,
        bits_per_weight: plan.bits_per_weight,
        seconds: start.elapsed().as_secs_f64(),
        peak_rss_bytes: crate::system::peak_rss_bytes(),
        sha256: hash_files(dir, &written.files)?,
    })
}

impl Job<'_> {
    fn write_options(&self) -> WriteOptions {
        let QuantizeConfig { shard_size, overwrite, .. } = *self.config;
        let layers: Vec<_> =
            self.targets.iter().map(|target| target.layer(&self.spec, &self.input)).collect();
        let carried: Vec<_> = self.carried.iter().map(|tensor| &tensor.name[..]).collect();
        let index = self.layout.always_indexed();
        let mut options = WriteOptions { shard_size, overwrite, index, ..WriteOptions::default() };
        options.metadata.extend(self.layout.header_notes(&layers, &carried));
        options
    }

    /// Tokens per sample: what was asked for, at most the context of the model.
    fn seq_len(&self) -> usize {
        let context = self.arch.as_ref().map_or(usize::MAX, |arch| arch.max_positions);
        self.config.seq_len.min(context.max(1))
    }

    fn tokens_at_most(&self) -> usize {
        match &self.config.calibration {
            CalibrationSource::Ids(samples) => samples.iter().map(Vec::len).sum(),
            _ => self.config.samples * self.seq_len(),
        }
    }

    /// Reads, tokenizes and packs the calibration set.
    fn calibration(&self, progress: &dyn Progress) -> Result<Calibration, Error> {
        let arch = self.arch.as_ref().expect("a calibrated method has a model");
        let (config, seq_len) = (self.config, self.seq_len());
        if seq_len < config.seq_len {
            progress.note(&format!("calibration samples have {seq_len} tokens, the context of the model"));
        }
        let is_npy = |path: &Path| path.extension().is_some_and(|e| e == "npy");
        let calibration = match &config.calibration {
            CalibrationSource::Ids(samples) => from_ids(samples.clone())?,
            CalibrationSource::File(path) if is_npy(path) => {
                let ids = quant_formats::read_npy_ids(path)?;
                from_ids(ids.rows().into_iter().take(config.samples).map(|row| row.to_vec()).collect())?
            }
            text => {
                let documents = match text {
                    CalibrationSource::File(path) => {
                        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
                        calibration::documents(path, &text)?
                    }
                    _ => calibration::split_documents(calibration::BUILTIN).map(str::to_owned).collect(),
                };
                let tokenizer = crate::model::read_tokenizer(&self.source)?;
                let encode = |d: &String| tokenizer.encode(d, true).map_err(Error::from);
                let ids = documents.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
                calibration::pack(&ids, config.samples, seq_len, config.seed)
            }
        };
        for (sample, ids) in calibration.samples.iter().enumerate() {
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= arch.vocab_size) {
                return Err(Error::TokenId { sample, id, vocab_size: arch.vocab_size });
            }
        }
        if calibration.tokens() < config.samples * seq_len {
            let (n, tokens) = (calibration.samples.len(), calibration.tokens());
            progress.note(&format!("the calibration text gives {n} samples, {tokens} tokens"));
        }
        Ok(calibration)
    }

    /// The geometry that peak memory follows from.
    fn run_shape(&self, tokens: usize) -> Option<RunShape> {
        let arch = self.arch.as_ref()?;
        let width = self.targets.first().map_or(4, |t| t.stored_width);
        let inputs = |stage: usize| arch.stages.get(stage).map_or(0, |s| s.linears[0].in_features);
        let stages = arch.stages.iter().enumerate().map(|(i, stage)| StageShape {
            inputs: inputs(i),
            next_inputs: inputs(i + 1),
            linears: stage.linears.iter().map(|l| (l.out_features, l.in_features, width)).collect(),
            module: inspector::module_of(stage.kind, i),
        });
        Some(RunShape {
            tokens,
            chunk: pass::chunk_len(self.seq_len()).min(tokens),
            hidden: arch.hidden_size,
            twice: !self.config.true_sequential,
            sample: self.transforms.iter().map(|t| t.sample_tokens().min(tokens)).max(),
            stages: stages.collect(),
            embedding: arch.vocab_size * arch.hidden_size * width,
        })
    }

    /// Peak memory, and where activations go to stay below the limit.
    fn memory(&self, tokens: usize) -> (u64, Spill) {
        let calibrated = self.run_shape(tokens).filter(|_| self.is_calibrated());
        let Some(shape) = calibrated else {
            return (self.memory_without_calibration(), Spill::STEPS[0]);
        };
        let peak =
            |spill| self.carried_peak().max(shape.peak(self.quantizer.as_ref(), &self.spec, spill) as u64);
        let fits = |spill: &&Spill| self.config.max_memory.is_none_or(|limit| peak(**spill) <= limit);
        let spill = *Spill::STEPS.iter().find(fits).unwrap_or(&Spill::STEPS[2]);
        (peak(spill), spill)
    }

    fn carried_peak(&self) -> u64 {
        let largest = self.carried.iter().filter_map(|t| t.byte_len()).max().unwrap_or(0);
        memory::BASE as u64 + largest
    }

    fn memory_without_calibration(&self) -> u64 {
        let layer = |t: &job::Target| {
            let read = t.rows * t.cols * (4 + t.stored_width);
            read.max(self.quantizer.peak_bytes(&[(t.rows, t.cols)], &self.spec)) as u64
        };
        let largest = self.targets.iter().map(layer).max().unwrap_or(0);
        self.carried_peak().max(memory::BASE as u64 + largest)
    }
}

fn from_ids(samples: Vec<Vec<u32>>) -> Result<Calibration, Error> {
    let seq_len = samples.first().map_or(0, Vec::len);
    match samples.iter().position(|s| s.len() != seq_len || s.is_empty()) {
        Some(sample) => Err(Error::SampleLength { sample, expected: seq_len, found: samples[sample].len() }),
        None if samples.is_empty() => Err(Error::SampleLength { sample: 0, expected: 1, found: 0 }),
        None => Ok(Calibration { samples, seq_len }),
    }
}

fn make_plan(job: &Job<'_>, calibration_tokens: usize) -> Result<(Plan, Spill), Error> {
    let (peak, spill) = job.memory(calibration_tokens);
    let mut problems = job.problems.clone();
    if let Some(limit) = job.config.max_memory.filter(|&limit| peak > limit) {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let message = format!(
            "the run needs {} MiB, {} MiB are allowed; use fewer samples, or allow more",
            mib(peak),
            mib(limit)
        );
        problems.push(Problem { tensor: None, message });
    }
    let quantized = job.targets.iter().map(|t| PlannedLayer {
        name: t.module.clone(),
        shape: vec![t.rows, t.cols],
        method: job.config.method.clone(),
        bits: usize::from(job.spec.bits),
        bytes: t.weight_bytes(),
    });
    let kept = job.carried.iter().map(|t| PlannedLayer {
        name: t.name.clone(),
        shape: t.shape.clone(),
        method: "keep".to_owned(),
        bits: t.dtype.bits(),
        bytes: t.byte_len().unwrap_or(0),
    });
    let files = planned_files(&job.outputs(), &job.write_options())?;
    let plan = Plan {
        tensors: quantized.chain(kept).collect(),
        method: job.config.method.clone(),
        layout: job.layout.id().to_owned(),
        bytes_in: job.source.tensor_bytes(),
        bytes_out: files.iter().map(|(_, bytes)| bytes).sum(),
        bits_per_weight: job.bits_per_weight(),
        calibration_tokens,
        peak_rss_bytes: peak,
        seconds: job.predicted_seconds(calibration_tokens),
        problems,
    };
    Ok((plan, spill))
}

impl Job<'_> {
    /// Operations of the run over the speed of the dense kernels, measured here and now.
    fn predicted_seconds(&self, tokens: usize) -> f64 {
        let flops = |t: &job::Target| {
            let (n, k, t) = (t.rows as f64, t.cols as f64, tokens as f64);
            match self.quantizer.needs() {
                Needs::NONE => 0.0,
                // Forward pass; a share of the Hessian and its factorization; the column loop.
                Needs { hessian: true, .. } => {
                    2.0 * t * n * k + (t * k * k + k * k * k / 3.0) / 2.0 + n * k * k
                }
                _ => 2.0 * t * n * k,
            }
        };
        // Each transform runs the float model once, and its candidates on a sample.
        let transforms = self.transforms.iter().map(|transform| {
            let runs =
                tokens as f64 + (transform.candidates() * transform.sample_tokens().min(tokens)) as f64;
            let weights: f64 = self.targets.iter().map(|t| (t.rows * t.cols) as f64).sum();
            // Attention and MLP run whole for half of their weights.
            1.5 * 2.0 * runs * weights
        });
        let operations = self.targets.iter().map(flops).sum::<f64>() + transforms.sum::<f64>();
        // Reading, converting, rounding and packing: measured at 150 M weights a second.
        let weights: f64 = self.targets.iter().map(|t| (t.rows * t.cols) as f64).sum();
        operations / crate::system::dense_flops() + weights / 150e6
    }
}

/// `config.json` with the quantization noted, the tokenizer and whatever else belongs to the model.
fn write_side_files(job: &Job<'_>, writer: &CheckpointWriter) -> Result<(), Error> {
    let mut meta = Map::new();
    meta.insert("quantizer".to_owned(), json!([concat!("quant:", env!("CARGO_PKG_VERSION"))]));
    meta.insert("method".to_owned(), json!(job.config.method));
    meta.insert("true_sequential".to_owned(), json!(job.config.true_sequential));
    if !job.transforms.is_empty() {
        let names: Vec<_> = job.transforms.iter().map(|transform| transform.name()).collect();
        meta.insert("transforms".to_owned(), json!(names));
    }
    let mut exceptions = Vec::new();
    if let Some(arch) = &job.arch {
        for layer in 0..arch.layers {
            let path = arch.block_path(layer, &job.source);
            let modules = arch.linears().map(|linear| format!("{path}.{}", linear.name));
            exceptions.extend(modules.filter(|m| !job.by_module.contains_key(m)).map(|m| (m, None)));
        }
    }
    let stored = StoredModel { spec: &job.spec, input: &job.input, exceptions: &exceptions, meta: &meta };
    let quantization = job.layout.config(&stored);
    let layers = job.targets.iter().map(|target| target.layer(&job.spec, &job.input));
    for (name, bytes) in job.layout.side_files(&quantization, &layers.collect::<Vec<_>>()) {
        writer.write_file(&name, &bytes)?;
    }
    let mut config = job.source.config().as_object().cloned().unwrap_or_default();
    config.insert("quantization_config".to_owned(), quantization);
    writer.write_file("config.json", format!("{:#}\n", Value::Object(config)).as_bytes())?;
    for (name, bytes) in job.source.side_files()? {
        writer.write_file(name, &bytes)?;
    }
    Ok(())
}

fn hash_files(dir: &Path, names: &[String]) -> Result<BTreeMap<String, String>, Error> {
    let mut hashes = BTreeMap::new();
    let mut buffer = vec![0; 1 << 20];
    for name in names {
        let path = dir.join(name);
        let mut file = std::fs::File::open(&path).map_err(|e| Error::io(&path, e))?;
        let mut hash = Sha256::new();
        loop {
            match file.read(&mut buffer).map_err(|e| Error::io(&path, e))? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        hashes.insert(name.clone(), hash.finalize().iter().map(|b| format!("{b:02x}")).collect());
    }
    Ok(hashes)
}
