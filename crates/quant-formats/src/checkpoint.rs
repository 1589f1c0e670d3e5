//! A model on disk: its tensors, its configuration, and what its layers are stored as.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use quant_core::{DType, DenseTensor, LinearWeights, QuantizedLinear, WeightError, WeightSource};
use serde_json::Value;

use crate::detect;
use crate::error::{FormatError, IndexError};
use crate::file;
use crate::gguf::{self, GgufModel, Metadata, ModelFiles};
use crate::index::ShardIndex;
use crate::json;
use crate::layout::{self, Reader, TensorSource};
use crate::safetensors::{SafetensorsFile, TensorInfo};
use crate::values;
use crate::verify::Finding;
use crate::weight_file::WeightFile;

/// Files beside the weights that belong to a model whatever its weights are stored as.
const SIDE_FILES: [&str; 27] = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Normalize/config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// A checkpoint whose files and headers have been checked: a Hugging Face directory, a GGUF file, or one safetensors
/// file.
///
/// Tensors are read when they are asked for, from any thread, and never kept.
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    files: Vec<WeightFile>,
    /// Tensor to index in `files`.
    tensors: BTreeMap<String, usize>,
    /// Modules with quantized parts.
    modules: BTreeSet<String>,
    reader: Result<Option<Box<dyn Reader>>, FormatError>,
    notes: Vec<Finding>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl Checkpoint {
    /// Opens a checkpoint for use: all of its headers, its index, its configuration, and the names, types and
    /// shapes of the parts of every quantized layer are consistent. No weights are read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        let checkpoint = Self::open_container(path)?;
        if let Some(reader) = checkpoint.reader()? {
            for module in &checkpoint.modules {
                reader.shape(&checkpoint, module)?;
            }
        }
        Ok(checkpoint)
    }

    /// Opens a checkpoint to look at it: whatever is wrong with its quantization is told by
    /// [`Checkpoint::reader`] later.
    pub fn open_container(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        let path = path.as_ref().to_path_buf();
        let metadata = fs::metadata(&path).map_err(|e| FormatError::io("open", &path, e))?;
        let mut checkpoint = Self {
            config: Value::Null,
            files: Vec::new(),
            tensors: BTreeMap::new(),
            modules: BTreeSet::new(),
            reader: Ok(None),
            notes: Vec::new(),
            path,
        };
        if metadata.is_dir() {
            checkpoint.config = json::read(&checkpoint.path.join("config.json"), json::CONFIG_LIMIT)?;
            if !checkpoint.config.is_object() {
                let file = checkpoint.path.join("config.json");
                return Err(FormatError::Json { file, detail: "the configuration must be an object".into() });
            }
            checkpoint.open_directory()?;
        } else if gguf::is_gguf(&checkpoint.path) {
            checkpoint.open_gguf()?;
            return Ok(checkpoint);
        } else {
            checkpoint.add_safetensors(checkpoint.path.clone())?;
        }
        checkpoint.reader = checkpoint.detect();
        Ok(checkpoint)
    }

    fn open_directory(&mut self) -> Result<(), FormatError> {
        let dir = self.path.clone();
        let names = list(&dir)?;
        if names.contains("model.safetensors") {
            return self.add_safetensors(dir.join("model.safetensors"));
        }
        let mut indices = names.iter().filter(|n| n.ends_with(".safetensors.index.json"));
        let standard = "model.safetensors.index.json".to_owned();
        let index = if names.contains(&standard) { Some(&standard) } else { indices.next() };
        if let Some(index) = index {
            return self.open_shards(&dir, index);
        }
        // AutoGPTQ names the file, or the beginning of the names of all shards, in the configuration.
        let base = self.config.pointer("/quantization_config/model_file_base_name").and_then(Value::as_str);
        let base = base.filter(|b| names.iter().any(|n| n.starts_with(b) && n.ends_with(".safetensors")));
        let base = base.unwrap_or_default().to_owned();
        for name in names.iter().filter(|n| n.ends_with(".safetensors") && n.starts_with(&base)) {
            self.add_safetensors(dir.join(name))?;
        }
        if self.files.is_empty() {
            let has = |end: &str| names.iter().any(|n| n.ends_with(end));
            let problem = if has(".bin") || has(".pt") || has(".pth") {
                "no safetensors files, only pickled ones, which can run code; convert them to safetensors first"
            } else if has(".gguf") {
                "no safetensors files; name the .gguf file itself"
            } else {
                "no safetensors files (model.safetensors, or shards with model.safetensors.index.json)"
            };
            return Err(FormatError::NotACheckpoint { path: dir, problem });
        }
        Ok(())
    }

    /// A GGUF file is a whole model: its keys are the configuration, and each tensor has the type it names.
    fn open_gguf(&mut self) -> Result<(), FormatError> {
        let GgufModel { files, config, main_type } = GgufModel::open(&self.path)?;
        self.config = config;
        files.into_iter().try_for_each(|file| self.add_file(WeightFile::Gguf(file)))?;
        if let Some(main_type) = main_type {
            let layout = layout::layout("gguf")?;
            let modules = self.tensor_infos().filter_map(|(name, info)| layout.module_of(name, info.dtype));
            self.modules = modules.map(str::to_owned).collect();
            self.reader = layout.reader(&serde_json::json!({ "type": main_type.name() })).map(Some);
        }
        Ok(())
    }

    fn add_safetensors(&mut self, path: PathBuf) -> Result<(), FormatError> {
        self.add_file(WeightFile::Safetensors(SafetensorsFile::open(path)?))
    }

    /// All tensors of a file; none may be known already.
    fn add_file(&mut self, file: WeightFile) -> Result<(), FormatError> {
        for name in file.names() {
            if let Some(first) = self.tensors.insert(name.to_owned(), self.files.len()) {
                let first = self.files[first].path().to_path_buf();
                let (tensor, second) = (name.to_owned(), file.path().to_path_buf());
                return Err(FormatError::TensorTwice { tensor, first, second });
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// The shards of an index. Where a tensor is in several shards, the index decides; tensors that it does not
    /// name are used too, as transformers does.
    fn open_shards(&mut self, dir: &Path, index_name: &str) -> Result<(), FormatError> {
        let index_path = dir.join(index_name);
        let index = ShardIndex::read(&index_path)?;
        let shards: BTreeSet<&String> = index.weight_map.values().collect();
        let mut number = BTreeMap::new();
        for shard in shards {
            number.insert(shard, self.files.len());
            self.files.push(WeightFile::Safetensors(SafetensorsFile::open(dir.join(shard))?));
        }
        for (tensor, shard) in &index.weight_map {
            let i = number[shard];
            if self.files[i].info(tensor).is_none() {
                let source = IndexError::NotInShard { shard: shard.clone() };
                return Err(FormatError::Index { file: index_path, tensor: tensor.clone(), source });
            }
            self.tensors.insert(tensor.clone(), i);
        }
        for (i, file) in self.files.iter().enumerate() {
            for name in file.names() {
                match self.tensors.get(name) {
                    None => {
                        self.tensors.insert(name.to_owned(), i);
                        let message =
                            format!("{} holds it, but the index does not name it", shown(file.path()));
                        self.notes.push(Finding::warning(
                            "unlisted-tensor",
                            name,
                            message,
                            "rewrite the index",
                        ));
                    }
                    Some(&used) if used != i => {
                        let used = shown(self.files[used].path());
                        let message = format!("also in {}; the index says {used}", shown(file.path()));
                        let remedy = "remove the other copy: programs differ in which one they use";
                        self.notes.push(Finding::warning("tensor-twice", name, message, remedy));
                    }
                    Some(_) => {}
                }
            }
        }
        let total = self.tensor_bytes();
        if let Some(declared) = index.total_size.filter(|&declared| declared != total) {
            let message = format!("{index_name}: total_size is {declared}, the tensors have {total} bytes");
            self.notes.push(Finding::warning("total-size", "", message, "rewrite the index"));
        }
        Ok(())
    }

    /// Finds the layout and its modules.
    fn detect(&mut self) -> Result<Option<Box<dyn Reader>>, FormatError> {
        let infos = self.tensor_infos().map(|(name, info)| (name, info.dtype, &info.shape[..]));
        let detected = if self.path.is_dir() {
            detect::detect(&self.config, Some(&self.path), infos)?
        } else {
            detect::detect_file(&self.path, infos)?
        };
        let Some((layout, config)) = detected else { return Ok(None) };
        let reader = layout.reader(&config)?;
        let modules = self.tensor_infos().filter_map(|(name, info)| layout.module_of(name, info.dtype));
        self.modules = modules.map(str::to_owned).collect();
        if self.modules.is_empty() {
            let example = self.example_linear().unwrap_or_default();
            return Err(FormatError::NotQuantized { layout: layout.id(), marker: layout.marker(), example });
        }
        Ok(Some(reader))
    }

    /// A module with a plain weight that looks like a linear layer.
    fn example_linear(&self) -> Option<String> {
        let mut modules = self.tensor_infos().filter_map(|(name, info)| {
            name.strip_suffix(".weight").filter(|m| info.shape.len() == 2 && !m.contains("embed"))
        });
        modules.next().map(str::to_owned)
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`; `null` for a bare file.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The weight files.
    pub fn files(&self) -> &[WeightFile] {
        &self.files
    }

    /// All tensors, sorted by name.
    pub fn tensor_infos(&self) -> impl Iterator<Item = (&str, &TensorInfo)> + Clone {
        let info = |(name, &i): (_, &usize)| self.files[i].info(name).map(|info| (name, info));
        self.tensors.iter().map(|(name, i)| (name.as_str(), i)).filter_map(info)
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, tensor: &str) -> Option<&WeightFile> {
        self.tensors.get(tensor).map(|&i| &self.files[i])
    }

    /// Type, shape and place of a tensor.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        self.file_of(name).and_then(|file| file.info(name))
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensor_infos().map(|(_, info)| info.byte_len()).sum()
    }

    /// Reads a tensor.
    pub fn tensor(&self, name: &str) -> Result<DenseTensor, FormatError> {
        match self.file_of(name) {
            Some(file) => file.read(name),
            None => Err(FormatError::Missing {
                tensor: name.to_owned(),
                because: format!("{} does not hold it", shown(&self.path)),
            }),
        }
    }

    /// How quantized layers are read. `None` for a float checkpoint; an error if its quantization is unknown,
    /// not supported or contradictory.
    pub fn reader(&self) -> Result<Option<&dyn Reader>, FormatError> {
        self.reader.as_ref().map(Option::as_deref).map_err(FormatError::clone)
    }

    /// Modules with quantized parts, sorted.
    pub fn quantized_modules(&self) -> impl ExactSizeIterator<Item = &str> {
        self.modules.iter().map(String::as_str)
    }

    /// The quantized module that a tensor is a part of: codes, scales, whatever its layout keeps below the module's
    /// name, but not the bias.
    pub fn part_of<'a>(&self, tensor: &'a str) -> Option<&'a str> {
        if let Some(module) = self.module_of(tensor) {
            return Some(module);
        }
        let above = tensor.match_indices('.').map(|(dot, _)| tensor.split_at(dot));
        let mut owners = above.filter(|(module, part)| *part != ".bias" && self.modules.contains(*module));
        owners.next().map(|(module, _)| module)
    }

    /// The quantized module that the layout finds in a tensor's name.
    fn module_of<'a>(&self, tensor: &'a str) -> Option<&'a str> {
        let (reader, info) = (self.reader.as_ref().ok()?.as_ref()?, self.tensor_info(tensor)?);
        reader.layout().module_of(tensor, info.dtype).filter(|module| self.modules.contains(*module))
    }

    /// True for packed codes, which may be viewed as floats.
    pub(crate) fn holds_codes(&self, tensor: &str) -> bool {
        let Ok(Some(reader)) = &self.reader else { return false };
        let module = |part: &&str| tensor.strip_suffix(*part).and_then(|m| m.strip_suffix('.'));
        let packed = reader.layout().packed_parts();
        packed.iter().filter_map(module).any(|module| self.modules.contains(module))
    }

    /// Reads a quantized layer and checks that its scales are finite. `None` if the module is not quantized.
    pub fn quantized_linear(&self, module: &str) -> Result<Option<QuantizedLinear>, FormatError> {
        let Some(reader) = self.reader()?.filter(|_| self.modules.contains(module)) else { return Ok(None) };
        let linear = reader.read(self, module)?;
        values::check_layer(module, &linear)?;
        Ok(Some(linear))
    }

    /// Small files to copy beside new weights: tokenizer, generation settings, templates, licence. With the name
    /// relative to the checkpoint, and the path.
    pub fn files_to_carry(&self) -> Vec<(&'static str, PathBuf)> {
        if !self.path.is_dir() {
            return Vec::new();
        }
        let files = SIDE_FILES.iter().map(|&name| (name, self.path.join(name)));
        files.filter(|(_, path)| path.is_file()).collect()
    }

    /// The keys of a GGUF file.
    pub fn gguf_metadata(&self) -> Option<&Metadata> {
        self.files.first().and_then(WeightFile::gguf).map(|view| view.file().metadata())
    }

    /// `tokenizer.json`, or what the keys of a GGUF file say in its terms.
    pub fn tokenizer(&self) -> Result<Option<Value>, FormatError> {
        match self.gguf_metadata() {
            Some(metadata) => gguf::tokenizer_json(metadata),
            None => {
                let path = self.path.join("tokenizer.json");
                if path.is_file() { json::read(&path, json::TOKENIZER_LIMIT).map(Some) } else { Ok(None) }
            }
        }
    }

    /// What the model is besides its tensors.
    pub fn model_files(&self) -> Result<ModelFiles, FormatError> {
        let template = match self.gguf_metadata() {
            Some(metadata) => metadata.text("tokenizer.chat_template")?.map(str::to_owned),
            None => {
                let path = self.path.join("chat_template.jinja");
                let read = || file::read_limited(&path, json::CONFIG_LIMIT);
                let bytes = if path.is_file() { Some(read()?) } else { None };
                bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            }
        };
        let own_name = self.gguf_metadata().and_then(|m| m.get("general.name")?.as_str());
        let stem = self.path.file_stem().and_then(|name| name.to_str());
        Ok(ModelFiles {
            config: self.config.clone(),
            tokenizer: self.tokenizer()?,
            tokenizer_config: self.json_file("tokenizer_config.json")?,
            generation_config: self.json_file("generation_config.json")?,
            pooling: self.json_file("1_Pooling/config.json")?,
            chat_template: template,
            name: own_name.or(stem).unwrap_or_default().to_owned(),
        })
    }

    /// The small files to put beside new weights, with their content. Those of a GGUF file are made from its keys.
    pub fn side_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, FormatError> {
        if self.gguf_metadata().is_some() {
            let made = [
                ("tokenizer.json", self.tokenizer()?),
                ("tokenizer_config.json", self.json_file("tokenizer_config.json")?),
            ];
            let made = made.into_iter().filter_map(|(name, json)| Some((name, json?)));
            return Ok(made.map(|(name, json)| (name, format!("{json:#}\n").into_bytes())).collect());
        }
        let files = self.files_to_carry().into_iter();
        let read = |(name, path): (&'static str, PathBuf)| {
            fs::read(&path).map(|bytes| (name, bytes)).map_err(|e| FormatError::io("read", &path, e))
        };
        files.map(read).collect()
    }

    /// A JSON file beside the weights, such as `generation_config.json`, if there is one.
    pub fn json_file(&self, name: &str) -> Result<Option<Value>, FormatError> {
        if let Some(metadata) = self.gguf_metadata() {
            return match name {
                "tokenizer_config.json" => gguf::tokenizer_config(metadata),
                _ => Ok(None),
            };
        }
        let path = self.path.join(name);
        if path.is_file() { json::read(&path, json::CONFIG_LIMIT).map(Some) } else { Ok(None) }
    }

    /// A small text file beside the weights, such as `chat_template.jinja`, if there is one.
    pub fn text_file(&self, name: &str) -> Result<Option<String>, FormatError> {
        let path = self.path.join(name);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = file::read_limited(&path, json::CONFIG_LIMIT)?;
        let detail = || "the text must be UTF-8".to_owned();
        String::from_utf8(bytes).map(Some).map_err(|_| FormatError::Json { file: path, detail: detail() })
    }

    /// What was noticed when opening.
    pub(crate) fn notes(&self) -> &[Finding] {
        &self.notes
    }
}

impl TensorSource for Checkpoint {
    fn lookup(&self, name: &str) -> Option<(DType, &[usize])> {
        self.tensor_info(name).map(|info| (info.dtype, &info.shape[..]))
    }

    fn read(&self, name: &str) -> Result<DenseTensor, FormatError> {
        self.tensor(name)
    }

    fn note(&self, key: &str) -> Option<&str> {
        self.files.iter().find_map(|file| file.note(key))
    }

    fn model_config(&self) -> &Value {
        &self.config
    }
}

impl WeightSource for Checkpoint {
    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<DenseTensor, WeightError> {
        if !self.contains(name) {
            return Err(WeightError::Missing { name: crate::display_name(name).to_string() });
        }
        Checkpoint::tensor(self, name).map_err(|e| e.into_weight_error(name))
    }

    fn linear(&self, module: &str) -> Result<LinearWeights, WeightError> {
        if let Some(linear) = self.quantized_linear(module).map_err(|e| e.into_weight_error(module))? {
            return Ok(LinearWeights::Quantized(Box::new(linear)));
        }
        let weight = WeightSource::tensor(self, &format!("{module}.weight"))?;
        let bias = format!("{module}.bias");
        let bias = if self.contains(&bias) { Some(WeightSource::tensor(self, &bias)?) } else { None };
        Ok(LinearWeights::Dense { weight, bias })
    }

    fn linear_shape(&self, module: &str) -> Result<(usize, usize), WeightError> {
        let fail = |e: FormatError| e.into_weight_error(module);
        if let Some(reader) = self.reader().map_err(fail)?.filter(|_| self.modules.contains(module)) {
            return reader.shape(self, module).map_err(fail);
        }
        let name = format!("{module}.weight");
        match self.tensor_info(&name).map(|info| &info.shape[..]) {
            Some(&[rows, cols]) => Ok((rows, cols)),
            Some(found) => Err(fail(FormatError::TensorShape {
                tensor: name,
                expected: "two dimensions".into(),
                found: found.to_vec(),
                because: "a linear layer".into(),
            })),
            None => Err(WeightError::Missing { name: crate::display_name(&name).to_string() }),
        }
    }
}

/// Names in a directory that are valid UTF-8, sorted.
fn list(dir: &Path) -> Result<BTreeSet<String>, FormatError> {
    let io = |e| FormatError::io("read", dir, e);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    Ok(names)
}

fn shown(path: &Path) -> String {
    crate::escape::display_path(path)
}
