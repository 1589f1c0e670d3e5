//! A checkpoint in memory, and the forward pass once more in f64.

pub(crate) mod exact;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use quant_core::{DType, DenseTensor, LinearWeights, WeightError, WeightSource};
use safetensors::SafeTensors;
use serde_json::Value;

/// All tensors of a `model.safetensors`; linears are dense.
#[derive(Clone, Default)]
pub(crate) struct Tensors(pub(crate) HashMap<String, DenseTensor>);

impl Tensors {
    /// Reads a safetensors file, or `model.safetensors` of a folder.
    pub(crate) fn read(path: &Path) -> Self {
        let file = if path.is_dir() { path.join("model.safetensors") } else { path.to_owned() };
        let bytes = fs::read(file).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let dtype = DType::from_name(&view.dtype().to_string()).unwrap();
            (name.to_owned(), DenseTensor::new(dtype, view.shape().to_vec(), view.data()).unwrap())
        });
        Self(tensors.collect())
    }
}

impl WeightSource for Tensors {
    fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<DenseTensor, WeightError> {
        self.0.get(name).cloned().ok_or_else(|| WeightError::Missing { name: name.to_owned() })
    }

    fn linear(&self, module: &str) -> Result<LinearWeights, WeightError> {
        let weight = self.tensor(&format!("{module}.weight"))?;
        Ok(LinearWeights::Dense { weight, bias: self.0.get(&format!("{module}.bias")).cloned() })
    }

    fn linear_shape(&self, module: &str) -> Result<(usize, usize), WeightError> {
        let weight = self.tensor(&format!("{module}.weight"))?;
        Ok((weight.shape()[0], weight.shape()[1]))
    }
}

/// `config.json` of a folder.
pub(crate) fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}
