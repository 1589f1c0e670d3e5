//! From one layout to another: codes to codes wherever the target can hold the same real numbers.
//!
//! Nothing here knows a pair of layouts. A layer is put in every [form](express) that the target says it stores,
//! smallest first; written; read back by the target's own reader; and compared with the source as
//! [real numbers](exact). What comes out equal is called identical because it was shown to be.

mod exact;
mod express;
mod search;
mod support;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use quant_core::{ActSpec, DenseTensor, QuantSpec, QuantizedLinear, WeightSource};
use quant_formats::{
    Checkpoint, CheckpointWriter, Container, FormatError, Layout, ModelWriter, PlannedLayer, PlannedTensor,
    StoredModel, WriteOptions, layouts,
};
use quant_model::ArchSpec;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

pub use self::support::{KINDS, LayoutSupport, layout_support};

use self::search::{Route, Target};
use crate::error::Error;
use crate::hash::hex;
use crate::progress::Progress;

/// How to convert.
#[derive(Clone, Debug)]
pub struct ConvertConfig {
    /// Id of the layout to write, or `auto` for the smallest that holds every layer identically: of those of GGUF files
    /// if the output's name ends in `.gguf`, else of those of directories.
    pub to: String,
    /// Numbers that are equal after rounding to f16, in which most libraries compute, count as identical.
    pub as_f16: bool,
    /// Round layers anew that the layout cannot hold.
    pub allow_requantize: bool,
    /// Largest size of an output file in bytes.
    pub shard_size: u64,
    /// Replace an existing output.
    pub overwrite: bool,
}

impl ConvertConfig {
    /// To a layout, with nothing allowed.
    pub fn new(to: impl Into<String>) -> Self {
        let shard_size = 5_000_000_000;
        Self { to: to.into(), as_f16: false, allow_requantize: false, shard_size, overwrite: false }
    }
}

/// What became of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every weight is the same real number, or the same f16 where that was asked for.
    Identical,
    /// The same codes, with scales or offsets rounded to what the layout stores.
    Bounded,
    /// Codes made anew.
    Requantized,
}

/// A converted layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConvertedLayer {
    /// Module path.
    pub name: String,
    /// What became of it.
    pub verdict: Verdict,
    /// Greatest difference of a weight, rounded up; 0 for the same real numbers.
    pub max_abs_error: f64,
    /// What changed: bits, groups, order.
    pub note: String,
    /// SHA-256 over names and bytes of its tensors in the input.
    pub input_sha256: String,
    /// The same of the output.
    pub output_sha256: String,
}

/// What [`convert`] did.
#[derive(Clone, Debug, Serialize)]
pub struct Conversion {
    /// Layout of the input.
    pub layout_in: &'static str,
    /// Layout of the output.
    pub layout_out: &'static str,
    /// Every quantized layer, by name.
    pub tensors: Vec<ConvertedLayer>,
    /// Layers with [`Verdict::Identical`].
    pub identical: usize,
    /// Layers with [`Verdict::Bounded`].
    pub bounded: usize,
    /// Layers with [`Verdict::Requantized`].
    pub requantized: usize,
    /// Bytes of all input tensors.
    pub bytes_in: u64,
    /// Bytes of all output tensors.
    pub bytes_out: u64,
    /// The replaced output, if it could not be removed.
    pub leftover: Option<PathBuf>,
}

/// A layer and where it goes.
struct Planned {
    module: String,
    route: Route,
    note: String,
    input_sha256: String,
    output_sha256: String,
}

impl Planned {
    /// What it is to its new layout.
    fn layer(&self, source: &Checkpoint) -> Result<PlannedLayer<'_>, Error> {
        let (rows, cols) = source.linear_shape(&self.module)?;
        let bias = format!("{}.bias", self.module);
        let bias = self.route.plan.iter().find(|tensor| tensor.name == bias).map(|tensor| tensor.dtype);
        let layer = PlannedLayer::new(&self.module, &self.route.spec, rows, cols);
        Ok(PlannedLayer { bias, input: &self.route.input, ..layer })
    }
}

/// Converts a quantized checkpoint to another layout. Layers are read twice, once to find their form and once to write
/// them; one is in memory at a time. Verdicts and hashes go into the headers of the output's files, too.
pub fn convert(
    model: &Path,
    out: &Path,
    config: &ConvertConfig,
    progress: &dyn Progress,
) -> Result<Conversion, Error> {
    let source = Checkpoint::open(model)?;
    let Some(layout_in) = source.reader()?.map(|reader| reader.layout()) else {
        return Err(Error::NotQuantized { model: quant_formats::display_path(model) });
    };
    let (layout, planned) = match config.to.as_str() {
        "auto" => smallest(&source, container_of(out), config, progress)?,
        id => {
            let layout = quant_formats::layout(id)?;
            (layout, plan(&source, layout, config, progress)?)
        }
    };
    let conversion = write(&source, layout_in, layout, planned, out, config, progress)?;
    Ok(conversion)
}

/// What an output of this name is.
fn container_of(out: &Path) -> Container {
    let gguf = out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if gguf { Container::Gguf } else { Container::Directory }
}

/// The layout with the fewest bytes among those of this container that hold every layer identically.
fn smallest(
    source: &Checkpoint,
    container: Container,
    config: &ConvertConfig,
    progress: &dyn Progress,
) -> Result<(&'static dyn Layout, Vec<Planned>), Error> {
    let exact = ConvertConfig { allow_requantize: false, ..config.clone() };
    let mut best: Option<(u64, &'static dyn Layout, Vec<Planned>)> = None;
    for &layout in layouts().iter().filter(|layout| layout.container() == container) {
        let Ok(planned) = plan(source, layout, &exact, progress) else { continue };
        if planned.iter().any(|p| p.route.verdict != Verdict::Identical) {
            continue;
        }
        let bytes = planned.iter().flat_map(|p| &p.route.plan).filter_map(PlannedTensor::byte_len).sum();
        if best.as_ref().is_none_or(|(least, ..)| bytes < *least) {
            best = Some((bytes, layout, planned));
        }
    }
    let (_, layout, planned) = best.ok_or(Error::NoExactLayout)?;
    Ok((layout, planned))
}

/// Finds the form of every layer and proves it.
fn plan(
    source: &Checkpoint,
    layout: &'static dyn Layout,
    config: &ConvertConfig,
    progress: &dyn Progress,
) -> Result<Vec<Planned>, Error> {
    let mut target = Target::new(layout, source.config(), config);
    let modules: Vec<&str> = source.quantized_modules().collect();
    progress.begin(&format!("comparing with {}", layout.id()), modules.len() as u64);
    let mut planned = Vec::with_capacity(modules.len());
    for module in modules {
        let linear = read(source, module)?;
        let route = target.route(module, &linear)?;
        let tensors = target.tensors(module, &linear, &route.step, &route.spec, &route.input)?;
        planned.push(Planned {
            module: module.to_owned(),
            note: route.note(&linear),
            input_sha256: hash(&stored_parts(source, module)?),
            output_sha256: hash(&tensors),
            route,
        });
        progress.advance(module, 1);
    }
    progress.end();
    Ok(planned)
}

fn read(source: &Checkpoint, module: &str) -> Result<QuantizedLinear, Error> {
    let because = || "the layer has just been listed".to_owned();
    let missing = || FormatError::Missing { tensor: module.to_owned(), because: because() };
    Ok(source.quantized_linear(module)?.ok_or_else(missing)?)
}

/// The tensors of a layer as they are stored, its bias included.
fn stored_parts(source: &Checkpoint, module: &str) -> Result<Vec<(String, DenseTensor)>, Error> {
    let bias = format!("{module}.bias");
    let names = source.tensor_infos().map(|(name, _)| name);
    let own = names.filter(|name| source.part_of(name) == Some(module) || *name == bias);
    own.map(|name| Ok((name.to_owned(), source.tensor(name)?))).collect()
}

/// SHA-256 over the names, types, shapes and bytes of some tensors in the order of their names.
fn hash(tensors: &[(String, DenseTensor)]) -> String {
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut hash = Sha256::new();
    for (name, tensor) in sorted {
        hash.update(format!("{name} {} {:?}\n", tensor.dtype(), tensor.shape()));
        hash.update(tensor.bytes());
    }
    hex(&hash.finalize())
}

/// Writes the converted checkpoint.
fn write(
    source: &Checkpoint,
    layout_in: &'static dyn Layout,
    layout: &'static dyn Layout,
    planned: Vec<Planned>,
    out: &Path,
    config: &ConvertConfig,
    progress: &dyn Progress,
) -> Result<Conversion, Error> {
    check_mixture(layout, &planned)?;
    let carried: Vec<PlannedTensor> = carried(source, &planned);
    let mut plan = carried.clone();
    plan.extend(planned.iter().flat_map(|p| p.route.plan.iter().cloned()));
    let mut conversion = summary(source, layout_in, layout, &planned, &plan);
    let mut metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("conversion".to_owned(), record(&conversion).to_string()),
    ]);
    let layers = planned.iter().map(|p| p.layer(source)).collect::<Result<Vec<_>, Error>>()?;
    let others: Vec<_> = carried.iter().map(|tensor| &tensor.name[..]).collect();
    metadata.extend(layout.header_notes(&layers, &others));
    let options = WriteOptions {
        shard_size: config.shard_size,
        metadata,
        overwrite: config.overwrite,
        index: layout.always_indexed(),
    };
    let files = || source.model_files();
    let writer = ModelWriter::create(layout.container(), out, &plan, files, &options)?;
    let bytes = |plan: &[PlannedTensor]| plan.iter().filter_map(PlannedTensor::byte_len).sum::<u64>();
    progress.begin("writing", bytes(&plan));
    for tensor in &carried {
        writer.write(&tensor.name, &source.tensor(&tensor.name)?)?;
        progress.advance(&tensor.name, tensor.byte_len().unwrap_or(0));
    }
    let target = Target::new(layout, source.config(), config);
    for Planned { module, route, .. } in &planned {
        let linear = read(source, module)?;
        for (name, tensor) in target.tensors(module, &linear, &route.step, &route.spec, &route.input)? {
            writer.write(&name, &tensor)?;
        }
        progress.advance(module, bytes(&route.plan));
    }
    if let Some(directory) = writer.directory() {
        write_side_files(source, layout, &planned, &conversion, directory)?;
    }
    conversion.leftover = writer.finish()?.leftover;
    progress.end();
    Ok(conversion)
}

/// Fails if layers differ where the layout has one kind for all.
fn check_mixture(layout: &'static dyn Layout, planned: &[Planned]) -> Result<(), Error> {
    let kind = |p: &Planned| (p.route.spec.bits, p.route.spec.grid, p.route.spec.group, p.route.spec.scales);
    let odd = planned.windows(2).find(|pair| !layout.mixes() && kind(&pair[0]) != kind(&pair[1]));
    let Some([first, other]) = odd else { return Ok(()) };
    let because = format!(
        "its groups are {}, those of {} are {}, and this layout has one kind for all layers",
        other.route.spec.group, first.module, first.route.spec.group
    );
    Err(Error::Convert { module: other.module.clone(), layout: layout.id(), because })
}

/// Tensors that stay as they are: all that belong to no quantized layer.
fn carried(source: &Checkpoint, planned: &[Planned]) -> Vec<PlannedTensor> {
    let written: std::collections::BTreeSet<&str> =
        planned.iter().flat_map(|p| p.route.plan.iter().map(|t| t.name.as_str())).collect();
    let infos = source.tensor_infos();
    let kept = infos.filter(|(name, _)| source.part_of(name).is_none() && !written.contains(name));
    kept.map(|(name, info)| PlannedTensor::new(name, info.dtype, &info.shape)).collect()
}

fn summary(
    source: &Checkpoint,
    layout_in: &'static dyn Layout,
    layout: &'static dyn Layout,
    planned: &[Planned],
    plan: &[PlannedTensor],
) -> Conversion {
    let tensors: Vec<ConvertedLayer> = planned
        .iter()
        .map(|p| ConvertedLayer {
            name: p.module.clone(),
            verdict: p.route.verdict,
            max_abs_error: p.route.difference.max_abs,
            note: p.note.clone(),
            input_sha256: p.input_sha256.clone(),
            output_sha256: p.output_sha256.clone(),
        })
        .collect();
    let count = |verdict| tensors.iter().filter(|t| t.verdict == verdict).count();
    Conversion {
        layout_in: layout_in.id(),
        layout_out: layout.id(),
        identical: count(Verdict::Identical),
        bounded: count(Verdict::Bounded),
        requantized: count(Verdict::Requantized),
        bytes_in: source.tensor_bytes(),
        bytes_out: plan.iter().filter_map(PlannedTensor::byte_len).sum(),
        leftover: None,
        tensors,
    }
}

/// What the headers of the output say.
fn record(conversion: &Conversion) -> Value {
    json!({
        "by": concat!("quant ", env!("CARGO_PKG_VERSION")),
        "layout_in": conversion.layout_in,
        "layout_out": conversion.layout_out,
        "tensors": conversion.tensors,
    })
}

/// The configuration with the new layout in it, and whatever else belongs to the model.
fn write_side_files(
    source: &Checkpoint,
    layout: &'static dyn Layout,
    planned: &[Planned],
    conversion: &Conversion,
    writer: &CheckpointWriter,
) -> Result<(), Error> {
    let spec = most_common(planned.iter().map(|p| p.route.spec)).unwrap_or_default();
    let input = most_common(planned.iter().map(|p| p.route.input.clone())).unwrap_or(ActSpec::Float);
    let differs = planned.iter().filter(|p| p.route.spec != spec);
    let mut exceptions: Vec<(String, Option<QuantSpec>)> =
        differs.map(|p| (p.module.clone(), Some(p.route.spec))).collect();
    exceptions.extend(float_modules(source).into_iter().map(|module| (module, None)));
    let mut meta = Map::new();
    meta.insert("converted_from".into(), conversion.layout_in.into());
    for (key, count) in [
        ("identical", conversion.identical),
        ("bounded", conversion.bounded),
        ("requantized", conversion.requantized),
    ] {
        meta.insert(key.into(), count.into());
    }
    let stored = StoredModel { spec: &spec, input: &input, exceptions: &exceptions, meta: &meta };
    let quantization = layout.config(&stored);
    let layers = planned.iter().map(|p| p.layer(source)).collect::<Result<Vec<_>, Error>>()?;
    for (name, bytes) in layout.side_files(&quantization, &layers) {
        writer.write_file(&name, &bytes)?;
    }
    let mut config = source.config().as_object().cloned().unwrap_or_default();
    config.remove("compression_config");
    config.remove("quantization_config");
    if !quantization.is_null() {
        config.insert("quantization_config".to_owned(), quantization);
    }
    writer.write_file("config.json", format!("{:#}\n", Value::Object(config)).as_bytes())?;
    for (name, bytes) in source.side_files()? {
        writer.write_file(name, &bytes)?;
    }
    Ok(())
}

/// Linear layers of the blocks that are not quantized.
fn float_modules(source: &Checkpoint) -> Vec<String> {
    let Ok(arch) = ArchSpec::from_config(source.config()) else { return Vec::new() };
    let ends: Vec<String> = arch.linears().map(|linear| format!(".{}", linear.name)).collect();
    let weights = source.tensor_infos().filter(|(name, info)| {
        info.shape.len() == 2 && info.dtype.is_float() && source.part_of(name).is_none()
    });
    let modules = weights.filter_map(|(name, _)| name.strip_suffix(".weight"));
    modules.filter(|module| ends.iter().any(|end| module.ends_with(end))).map(str::to_owned).collect()
}

fn most_common<T: PartialEq>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: Vec<(T, usize)> = Vec::new();
    for value in values {
        match counts.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    // The first of those that are equally common.
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(value, _)| value)
}
