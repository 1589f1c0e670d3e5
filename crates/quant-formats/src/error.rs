//! Errors of this crate. All of them name the file or tensor, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quant_core::{DType, MatrixError, TensorError, WeightError};

use crate::escape::{display_name, display_path};
use crate::gguf::GgmlType;

/// A checkpoint can't be read or written. Cheap to clone, so that it can be kept and reported later.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", display_path(.file))]
    Io {
        /// What was tried, such as `open`.
        action: &'static str,
        /// The file or directory.
        file: PathBuf,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// A directory, pipe or device where a file is needed.
    #[error("{} is {found}, not a regular file", display_path(.file))]
    NotAFile {
        /// The path.
        file: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// A side file too large to be what its name says.
    #[error("{} has {found} bytes; at most {limit} are read", display_path(.file))]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its size.
        found: u64,
        /// The greatest accepted size.
        limit: u64,
    },
    /// A file that is no valid safetensors file.
    #[error("{}: {source}", display_path(.file))]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// A file that is no valid GGUF file.
    #[error("{}: {source}", display_path(.file))]
    Gguf {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        source: GgufError,
    },
    /// A key of a GGUF file with an impossible value.
    #[error("key {} is {}; {expected} is expected", display_name(.key), display_name(.found))]
    Key {
        /// The key.
        key: String,
        /// Its value or type.
        found: String,
        /// What is possible.
        expected: String,
    },
    /// A file that is no valid `.npy` file of ids.
    #[error("{}: {source}", display_path(.file))]
    Npy {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        source: NpyError,
    },
    /// A file that is no valid JSON, or JSON of another form.
    #[error("{}: {detail}", display_path(.file))]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and what.
        detail: String,
    },
    /// An entry of a shard index that can't be followed.
    #[error("{}: weight_map of {}: {source}", display_path(.file), display_name(.tensor))]
    Index {
        /// The index file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        source: IndexError,
    },
    /// One tensor in two files, without an index that says which.
    #[error("tensor {} is in {} and in {}; remove one of the files or add an index", display_name(.tensor), display_path(.first), display_path(.second))]
    TensorTwice {
        /// The tensor.
        tensor: String,
        /// A file that holds it.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// A directory without weights that can be read.
    #[error("{}: {problem}", display_path(.path))]
    NotACheckpoint {
        /// The directory or file.
        path: PathBuf,
        /// What is missing, and what to do.
        problem: &'static str,
    },
    /// A model name that the local cache does not hold.
    #[error("model {} not found: no such path, and {looked}", display_name(.name))]
    NotInCache {
        /// The name asked for.
        name: String,
        /// Where it was looked for.
        looked: String,
    },
    /// A tensor that must exist.
    #[error("tensor {} is missing ({because})", display_name(.tensor))]
    Missing {
        /// The tensor.
        tensor: String,
        /// Why it is needed.
        because: String,
    },
    /// A tensor that can't be used as it is.
    #[error("{}: {source}", display_name(.tensor))]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Why.
        source: TensorError,
    },
    /// A tensor of another element type.
    #[error("{}: dtype {found} where {expected} is needed", display_name(.tensor))]
    TensorDType {
        /// The tensor.
        tensor: String,
        /// What is possible.
        expected: &'static str,
        /// Present.
        found: DType,
    },
    /// A tensor of another shape than follows from others or from the configuration.
    #[error("{}: shape {found:?} where {expected} follows from {because}", display_name(.tensor))]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// The needed shape.
        expected: String,
        /// The present shape.
        found: Vec<usize>,
        /// What the needed shape follows from.
        because: String,
    },
    /// An element with an impossible value.
    #[error("{}: element {index} is {found}; {expected}", display_name(.tensor))]
    Value {
        /// The tensor.
        tensor: String,
        /// Index in the flattened tensor.
        index: usize,
        /// The value.
        found: String,
        /// What is possible.
        expected: String,
    },
    /// A quantized matrix whose parts do not fit each other.
    #[error("{}: {source}", display_name(.module))]
    Matrix {
        /// The module.
        module: String,
        /// Why.
        source: MatrixError,
    },
    /// A quantization method that nobody here knows.
    #[error("quant_method {} is unknown; supported: {supported}; recognised only: {recognised}", display_name(.found))]
    UnknownMethod {
        /// The name in the configuration.
        found: String,
        /// Methods whose files can be read.
        supported: String,
        /// Methods that are known by name.
        recognised: String,
    },
    /// A layout that this version can't read.
    #[error(
        "{layout} weights ({evidence}) are recognised but not supported by this version; supported: {supported}"
    )]
    NotYet {
        /// The layout.
        layout: &'static str,
        /// How it was recognised.
        evidence: String,
        /// Layouts that can be read.
        supported: String,
    },
    /// A layout name that does not exist.
    #[error("layout {} is unknown; choose one of {known}", display_name(.found))]
    UnknownLayout {
        /// The name asked for.
        found: String,
        /// The names that exist.
        known: String,
    },
    /// A field of the quantization configuration with an impossible value.
    #[error("quantization config: {field} is {}; {expected}", display_name(.found))]
    Config {
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What is possible.
        expected: String,
    },
    /// A configuration that promises quantized weights where there are none.
    #[error("the config says {layout}, but no tensor named *.{marker} exists: {} has a plain weight; remove quantization_config to read it as a float model", display_name(.example))]
    NotQuantized {
        /// The layout.
        layout: &'static str,
        /// The part that every quantized module has.
        marker: &'static str,
        /// A module with plain weights.
        example: String,
    },
    /// Something a layout can't hold.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The output is there already.
    #[error("{} exists already; choose another output or ask for it to be replaced", display_path(.path))]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// Replacing this directory was asked for, but it does not look like a model.
    #[error("{} is not replaced: {found}", display_path(.path))]
    NotReplaced {
        /// The path.
        path: PathBuf,
        /// Why it is left alone.
        found: &'static str,
    },
    /// A file name that is not a plain relative one.
    #[error("file name {} is not possible: {problem}", display_name(.name))]
    FileName {
        /// The name.
        name: String,
        /// Why.
        problem: &'static str,
    },
    /// A tensor that does not follow the plan of the output.
    #[error("output tensor {}: {problem}", display_name(.tensor))]
    Plan {
        /// The tensor.
        tensor: String,
        /// Why.
        problem: String,
    },
    /// Tensors of the plan that were never written.
    #[error("{count} planned tensors were not written, the first is {}", display_name(.first))]
    Unwritten {
        /// The first of them.
        first: String,
        /// How many.
        count: usize,
    },
}

/// Why a file is no safetensors file.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer than eight bytes.
    #[error("{found} bytes are too few for a safetensors file, whose header length alone takes 8")]
    Short {
        /// Size of the file.
        found: u64,
    },
    /// A file of another kind under this name.
    #[error("this is {found}, not a safetensors file; {remedy}")]
    Foreign {
        /// What it is.
        found: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A header length that can't be.
    #[error(
        "header length {found} is impossible; the file has room for {room} and the format allows {limit}"
    )]
    Length {
        /// The length word.
        found: u64,
        /// Bytes behind the length word.
        room: u64,
        /// Limit of the format.
        limit: u64,
    },
    /// No header of the right form.
    #[error("header is not valid JSON of the safetensors form: {detail}")]
    Json {
        /// Where and what.
        detail: String,
    },
    /// A key that occurs twice.
    #[error("duplicate key {} in the header", display_name(.name))]
    Duplicate {
        /// The key.
        name: String,
    },
    /// An element type that the format does not have.
    #[error("tensor {}: unknown dtype {}", display_name(.tensor), display_name(.found))]
    DType {
        /// The tensor.
        tensor: String,
        /// The name found.
        found: String,
    },
    /// More dimensions than any tensor has.
    #[error("tensor {}: shape of {found} dimensions; at most {limit} are possible", display_name(.tensor))]
    Rank {
        /// The tensor.
        tensor: String,
        /// Number of dimensions.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A range that ends before it begins.
    #[error("tensor {}: data offsets end at {end} before they begin at {begin}", display_name(.tensor))]
    Reversed {
        /// The tensor.
        tensor: String,
        /// First byte.
        begin: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// A range that does not fit type and shape.
    #[error("tensor {}: shape {shape:?} of dtype {dtype} {}, its data offsets hold {found} bytes", display_name(.tensor),
        .expected.map_or("overflows or is no whole number of bytes".into(), |n| format!("takes {n} bytes")))]
    Size {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes that both imply, if that is a number at all.
        expected: Option<usize>,
        /// Bytes in its range.
        found: u64,
    },
    /// A gap between tensors, or an overlap.
    #[error("tensor {}: data offset {found} where the tensor before ends at {expected} ({})", display_name(.tensor),
        if found > expected { "a hole" } else { "an overlap" })]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// Offset that must follow.
        expected: u64,
        /// Its offset.
        found: u64,
    },
    /// More or less data than the tensors need.
    #[error("tensors need {expected} bytes of data, the file holds {found} ({})",
        if found > expected { "bytes behind the last tensor" } else { "the file is cut short, or the data offsets are wrong" })]
    DataLength {
        /// Bytes that the header describes.
        expected: u64,
        /// Bytes behind the header.
        found: u64,
    },
}

/// Why a file is no GGUF file.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// Another beginning.
    #[error("magic {} instead of GGUF: this is no GGUF file", display_name(&String::from_utf8_lossy(.found)))]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A version that is not read.
    #[error("version {found} is not supported; versions 2 and 3 are, convert the model again")]
    Version {
        /// The version.
        found: u32,
    },
    /// A file for machines of the other byte order.
    #[error("the version is in big-endian order; convert the file with gguf-convert-endian")]
    BigEndian,
    /// The file ends early, or a length is wrong.
    #[error(
        "the file is truncated or a length is wrong: {needed} bytes are needed at byte {place}, the file has {file_len}"
    )]
    Cut {
        /// Where it was read.
        place: u64,
        /// Bytes that must follow.
        needed: u64,
        /// Size of the file.
        file_len: u64,
    },
    /// A header beyond any model's.
    #[error("the header is larger than {limit} bytes")]
    HeaderTooLarge {
        /// Bytes at most.
        limit: u64,
    },
    /// More of something than the file can hold.
    #[error("{found} {what} are impossible; the file has room for {possible}")]
    Count {
        /// What is counted.
        what: &'static str,
        /// Their number.
        found: u64,
        /// The greatest possible number.
        possible: u64,
    },
    /// A text that is no UTF-8.
    #[error("{what} at byte {place} is no valid UTF-8")]
    NotUtf8 {
        /// What it is.
        what: &'static str,
        /// Where it begins.
        place: u64,
    },
    /// A key that occurs twice.
    #[error("duplicate key {}", display_name(.key))]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A tensor that occurs twice.
    #[error("duplicate tensor name {}", display_name(.name))]
    DuplicateTensor {
        /// Its name.
        name: String,
    },
    /// A value of a type that does not exist.
    #[error("key {}: value type {found} does not exist", display_name(.key))]
    ValueType {
        /// The key.
        key: String,
        /// The number of the type.
        found: u32,
    },
    /// A list of lists.
    #[error("key {}: arrays of arrays are not supported", display_name(.key))]
    NestedArray {
        /// The key.
        key: String,
    },
    /// An alignment that is none.
    #[error("general.alignment is {}; a u32 that is a power of two is expected", display_name(.found))]
    Alignment {
        /// The value.
        found: String,
    },
    /// More dimensions than the format has.
    #[error("tensor {}: {found} dimensions; at most {limit} are possible", display_name(.tensor))]
    Dimensions {
        /// The tensor.
        tensor: String,
        /// Their number.
        found: u32,
        /// The limit.
        limit: u32,
    },
    /// A type that does not exist, or not any more.
    #[error("tensor {}: type {found} is no ggml type, or one that llama.cpp has removed; convert the model again", display_name(.tensor))]
    TensorType {
        /// The tensor.
        tensor: String,
        /// The number of the type.
        found: u32,
    },
    /// A shape that can't be stored.
    #[error("tensor {}: shape {shape:?} of {ty} overflows, or its rows are no multiple of blocks of {block} elements", display_name(.tensor))]
    Size {
        /// The tensor.
        tensor: String,
        /// Its type.
        ty: GgmlType,
        /// Its dimensions, slowest first.
        shape: Vec<u64>,
        /// Elements of a block.
        block: usize,
    },
    /// An offset beside the alignment.
    #[error("tensor {}: offset {offset} is no multiple of the alignment {alignment}", display_name(.tensor))]
    Misaligned {
        /// The tensor.
        tensor: String,
        /// Its offset.
        offset: u64,
        /// The alignment.
        alignment: u64,
    },
    /// A tensor that is not in the file.
    #[error("tensor {}: its data end at byte {end}, the file has {file_len} bytes (truncated, or a wrong offset)", display_name(.tensor))]
    PastEnd {
        /// The tensor.
        tensor: String,
        /// Behind its last byte.
        end: u64,
        /// Size of the file.
        file_len: u64,
    },
    /// Two tensors that share bytes.
    #[error("tensors {} and {} overlap", display_name(.first), display_name(.second))]
    Overlap {
        /// A tensor.
        first: String,
        /// Another.
        second: String,
    },
}

/// Why an entry of a shard index can't be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Not a plain file name.
    #[error("file name {} is refused: {problem}", display_name(.found))]
    FileName {
        /// The name.
        found: String,
        /// Why.
        problem: &'static str,
    },
    /// The shard lacks the tensor.
    #[error("shard {} does not hold this tensor", display_name(.shard))]
    NotInShard {
        /// File name of the shard.
        shard: String,
    },
    /// The tensor is listed twice, in different shards.
    #[error("listed twice, in {} and in {}", display_name(.first), display_name(.second))]
    Twice {
        /// A shard.
        first: String,
        /// Another.
        second: String,
    },
}

/// Why a file is no `.npy` file of token ids.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NpyError {
    /// No NumPy magic, or a version from the future.
    #[error("not a NumPy file of version 1, 2 or 3")]
    Magic,
    /// A header that does not parse.
    #[error("NumPy header: {0}")]
    Header(&'static str),
    /// Elements that are no integers.
    #[error("dtype {} is not possible; ids are integers such as <i4 or <i8", display_name(.0))]
    DType(String),
    /// Not one or two dimensions.
    #[error("shape of {0} dimensions; ids are [samples, length]")]
    Rank(usize),
    /// More or less data than the shape needs.
    #[error("shape {shape:?} does not fit {found} bytes of data")]
    Size {
        /// The shape.
        shape: Vec<usize>,
        /// Bytes present.
        found: usize,
    },
    /// A value that is no token id.
    #[error("id {found} at [{row}, {col}] is not between 0 and {}", u32::MAX)]
    Id {
        /// Sample.
        row: usize,
        /// Position.
        col: usize,
        /// The value.
        found: i128,
    },
}

/// A layout can't hold what it was asked to.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{layout} cannot store {field} {found}: {remedy}")]
pub struct Unsupported {
    /// The layout.
    pub layout: &'static str,
    /// The field of the specification, or part of the layer.
    pub field: &'static str,
    /// Its value.
    pub found: String,
    /// What is possible, and what can hold it instead.
    pub remedy: String,
}

impl FormatError {
    /// Wraps an error of the operating system.
    pub fn io(action: &'static str, file: &Path, source: io::Error) -> Self {
        FormatError::Io { action, file: file.to_path_buf(), source: Arc::new(source) }
    }

    /// The same error in the terms of a model that loads `name`, a tensor or module.
    pub fn into_weight_error(self, name: &str) -> WeightError {
        let shown = display_name(name).to_string();
        match self {
            FormatError::Io { file, source, .. } => WeightError::Io { file, source },
            FormatError::Tensor { source, .. } => WeightError::Tensor { name: shown, source },
            FormatError::Matrix { source, .. } => WeightError::Matrix { name: shown, source },
            other => WeightError::Layout { name: shown, reason: other.to_string() },
        }
    }
}
