//! Reading everything a checkpoint holds, to see whether it can be used.

use quant_core::DenseTensor;
use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::error::FormatError;
use crate::escape::display_name;
use crate::safetensors::TensorInfo;
use crate::values::{self, NonFinite};

/// Elements that are read at a time: tensors may be larger than memory.
const CHUNK: usize = 4 << 20;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The checkpoint can be used.
    Warning,
    /// It can't, or gives wrong results.
    Error,
}

/// Something that is wrong with a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// A fixed word for programs.
    pub code: &'static str,
    /// The tensor or module, made safe to print; empty where it is about the whole.
    pub tensor: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

impl Finding {
    pub(crate) fn warning(code: &'static str, tensor: &str, message: String, remedy: &str) -> Self {
        Self::new(Severity::Warning, code, tensor, message, remedy)
    }

    fn error(code: &'static str, tensor: &str, message: String, remedy: &str) -> Self {
        Self::new(Severity::Error, code, tensor, message, remedy)
    }

    fn new(severity: Severity, code: &'static str, tensor: &str, message: String, remedy: &str) -> Self {
        let tensor = if tensor.is_empty() { String::new() } else { display_name(tensor).to_string() };
        Self { severity, code, tensor, message, remedy: remedy.to_owned() }
    }
}

impl Checkpoint {
    /// Reads every tensor and every quantized layer. Empty if nothing is wrong.
    ///
    /// The order does not depend on the number of threads: notes on files, then tensors, then modules, by name.
    pub fn verify(&self) -> Vec<Finding> {
        let mut findings = self.notes().to_vec();
        let tensors: Vec<_> = self.tensor_infos().collect();
        findings.par_extend(tensors.par_iter().filter_map(|(name, info)| self.verify_tensor(name, info)));
        let reader = match self.reader() {
            Ok(reader) => reader,
            Err(error) => {
                let remedy = "use a checkpoint in a supported layout";
                findings.push(Finding::error("quantization", "", error.to_string(), remedy));
                None
            }
        };
        if reader.is_some() {
            let modules: Vec<_> = self.quantized_modules().collect();
            let broken = modules.par_iter().filter_map(|module| {
                let error = self.quantized_linear(module).err()?;
                let remedy = "quantize the model again or download it again";
                Some(Finding::error("layer", module, error.to_string(), remedy))
            });
            findings.par_extend(broken);
        }
        findings
    }

    fn verify_tensor(&self, name: &str, info: &TensorInfo) -> Option<Finding> {
        match self.scan(name, info) {
            Ok(None) => None,
            Ok(Some(found)) => {
                let NonFinite { first, value, count } = found;
                let message = format!("element {first} is {value}; {count} elements are not finite");
                let remedy = "download the model again, or quantize with --nan zero";
                Some(Finding::error("non-finite", name, message, remedy))
            }
            Err(error) => {
                Some(Finding::error("unreadable", name, error.to_string(), "download the file again"))
            }
        }
    }

    /// Reads a tensor in pieces. Tensors that are no floats are read too: the disk may fail.
    fn scan(&self, name: &str, info: &TensorInfo) -> Result<Option<NonFinite>, FormatError> {
        let Some(file) = self.file_of(name) else { return Ok(None) };
        if !info.dtype.bits().is_multiple_of(8) || self.holds_codes(name) {
            return file.read(name).map(|_: DenseTensor| None);
        }
        let mut found: Option<NonFinite> = None;
        for start in (0..info.elements()).step_by(CHUNK) {
            let end = (start + CHUNK).min(info.elements());
            if let Some(here) = values::non_finite(&file.read_flat(name, start..end)?) {
                let first = NonFinite { first: start + here.first, count: 0, ..here };
                found.get_or_insert(first).count += here.count;
            }
        }
        Ok(found)
    }
}
