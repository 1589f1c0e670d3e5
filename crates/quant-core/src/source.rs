//! Where a model gets its weights from, without knowing files or layouts.

use std::path::PathBuf;
use std::sync::Arc;

use crate::dtype::DenseTensor;
use crate::error::{MatrixError, TensorError};
use crate::linear::LinearWeights;

/// A checkpoint, seen by a model.
pub trait WeightSource: Sync {
    /// True if a tensor of this name exists.
    fn contains(&self, name: &str) -> bool;

    /// A tensor by its full name, such as `model.norm.weight`.
    fn tensor(&self, name: &str) -> Result<DenseTensor, WeightError>;

    /// A linear layer by its module path, such as `model.layers.0.mlp.up_proj`.
    fn linear(&self, module: &str) -> Result<LinearWeights, WeightError>;

    /// Shape of a linear layer's weight as [`WeightSource::linear`] would return it, without reading its data.
    fn linear_shape(&self, module: &str) -> Result<(usize, usize), WeightError>;
}

/// A checkpoint does not hold what was asked for. Cheap to clone, so that it can be reported from many threads.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// No such tensor.
    #[error("tensor {name} is missing from the checkpoint")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A tensor of another shape than the configuration implies.
    #[error("{name}: shape {found:?} where {expected:?} follows from {because}")]
    Shape {
        /// The tensor.
        name: String,
        /// Needed shape.
        expected: Vec<usize>,
        /// Present shape.
        found: Vec<usize>,
        /// The fields of the configuration that it follows from.
        because: String,
    },
    /// A tensor that can't be used as it is.
    #[error("{name}: {source}")]
    Tensor {
        /// The tensor.
        name: String,
        /// Why.
        source: TensorError,
    },
    /// A quantized layer that contradicts itself.
    #[error("{name}: {source}")]
    Matrix {
        /// The module.
        name: String,
        /// Why.
        source: MatrixError,
    },
    /// A quantized layer that its layout can't read.
    #[error("{name}: {reason}")]
    Layout {
        /// The module or tensor.
        name: String,
        /// Expected, found, and what to do.
        reason: String,
    },
    /// The file can't be read.
    #[error("{}: {source}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: Arc<std::io::Error>,
    },
}
