//! Models on disk: safetensors files and checkpoint directories, and every layout of quantized weights.
//!
//! [`Checkpoint::open`] checks all headers of a model and reads tensors when they are asked for;
//! [`CheckpointWriter`] writes a model directory completely or not at all. A [`Layout`] turns the tensors of one
//! quantized linear layer into a [`QuantizedLinear`](quant_core::QuantizedLinear) and back; [`layouts`] lists
//! them. Files are hostile until checked: sizes are computed without overflow, nothing is allocated by a number
//! that the file's own length does not back, and an error names the file, the tensor, what was expected and what
//! was found.
//!
//! ```
//! use quant_core::{ActSpec, Codes, DType, Groups, Offset, Params, QuantSpec, QuantizedLinear, QuantizedMatrix};
//! use quant_formats::{Checkpoint, CheckpointWriter, PlannedLayer, StoredModel, WriteOptions, layout};
//!
//! // A 32 x 32 matrix of codes 8 around a zero point of 8, in groups of 16 columns.
//! let codes = Codes::from_values(4, 32, 32, &[9; 1024])?;
//! let (scales, zeros) = (Params::F16(vec![half::f16::ONE; 64]), Params::U8(vec![8; 64]));
//! let matrix = QuantizedMatrix::affine(codes, Groups::Row { len: 16 }, scales, Offset::Zero(zeros), 0);
//! let linear = QuantizedLinear::new(matrix);
//!
//! let gptq = layout("gptq")?;
//! let spec = linear.weight.spec();
//! let plan = gptq.planned(&PlannedLayer::new("up_proj", &spec, 32, 32));
//! # let dir = tempfile::tempdir()?;
//! # let out = dir.path().join("model");
//! let writer = CheckpointWriter::create(&out, &plan, &WriteOptions::default())?;
//! for (name, tensor) in gptq.write(&linear, "up_proj")? {
//!     writer.write(&name, &tensor)?;
//! }
//! let stored = StoredModel { spec: &spec, input: &ActSpec::Float, exceptions: &[], meta: &Default::default() };
//! let config = serde_json::json!({ "quantization_config": gptq.config(&stored) });
//! writer.write_file("config.json", config.to_string().as_bytes())?;
//! writer.finish()?;
//!
//! let model = Checkpoint::open(&out)?;
//! assert!(model.verify().is_empty());
//! let read = model.quantized_linear("up_proj")?.expect("it is quantized");
//! assert_eq!(read.weight, linear.weight);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod checkpoint;
mod checkpoint_writer;
mod detect;
mod error;
mod escape;
mod file;
mod gguf;
mod hf_cache;
mod index;
mod json;
mod layout;
mod model_writer;
mod npy;
mod safetensors;
mod sink;
mod values;
mod verify;
mod weight_file;

pub use checkpoint::Checkpoint;
pub use checkpoint_writer::{CheckpointWriter, WriteOptions, Written, planned_files};
pub use error::{FormatError, GgufError, HeaderError, IndexError, NpyError, Unsupported};
pub use escape::{DisplayName, display_name, display_path};
pub use file::{remove_unfinished, write_file};
pub use gguf::{
    GgmlType, GgufFile, GgufModelWriter, GgufTensor, GgufView, GgufWriter, MetaArray, MetaValue, Metadata,
    ModelFiles,
};
pub use hf_cache::resolve_model;
pub use layout::{
    Container, Layout, PlannedLayer, Reader, StoredModel, TensorSource, gguf_layout, layout, layout_for,
    layouts,
};
pub use model_writer::ModelWriter;
pub use npy::{npy_f32, read_npy_ids};
pub use safetensors::{SafetensorsFile, TensorInfo};
pub use sink::{PlannedTensor, SafetensorsWriter, write_safetensors};
pub use values::{NonFinite, check_layer, check_tensor, non_finite};
pub use verify::{Finding, Severity};
pub use weight_file::WeightFile;
