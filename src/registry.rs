//! What this build can do, by name.
//!
//! ```
//! use quant::registry;
//!
//! assert!(registry::methods().iter().any(|method| method.name == "gptq"));
//! assert!(registry::architectures().iter().any(|arch| arch.name == "llama"));
//! ```

use quant_kernels::isa::{self, Isa, IsaError};
use quant_methods::MethodOptions;
use serde::Serialize;

pub use crate::convert::{KINDS, LayoutSupport, layout_support};

/// An entry of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// The name that options and configurations use.
    pub name: &'static str,
    /// One line for people.
    pub description: String,
    /// It can be used on this machine.
    pub available: bool,
}

impl Entry {
    fn new(name: &'static str, description: impl Into<String>) -> Self {
        Self { name, description: description.into(), available: true }
    }
}

/// Quantization methods.
pub fn methods() -> Vec<Entry> {
    let options = MethodOptions::default();
    let describe = |method: &quant_methods::Method| (method.build)(&options).description();
    quant_methods::METHODS.iter().map(|method| Entry::new(method.name, describe(method))).collect()
}

/// Layouts of quantized weights on disk.
pub fn layouts() -> Vec<Entry> {
    quant_formats::layouts().iter().map(|layout| Entry::new(layout.id(), layout.description())).collect()
}

/// Model architectures.
pub fn architectures() -> Vec<Entry> {
    let entry = |arch: &quant_model::Architecture| Entry::new(arch.model_type, arch.covers);
    quant_model::architectures().iter().map(entry).collect()
}

/// Instruction sets that the products are written for. [`info`] tells which is in use.
pub fn kernels() -> Vec<Entry> {
    let describe = |isa: Isa| match isa {
        Isa::Scalar => "plain code for any processor",
        Isa::Avx2 => "AVX2, FMA and F16C",
        Isa::AvxVnni => "AVX2 and 256-bit integer dot products",
        Isa::Avx512 => "AVX-512 F, BW, CD, DQ and VL",
        Isa::Avx512Vnni => "AVX-512 and integer dot products",
        Isa::Avx512Bf16 => "AVX-512, integer and bfloat16 dot products",
        Isa::Neon => "every 64-bit ARM",
        Isa::NeonDot => "ARM with integer dot products",
        Isa::NeonI8mm => "ARM with integer matrix products",
    };
    let entry = |isa: Isa| Entry {
        available: isa::supported().contains(&isa),
        ..Entry::new(isa.name(), describe(isa))
    };
    Isa::ALL.into_iter().map(entry).collect()
}

/// True if a method, layout, architecture or kernel of this name can be used on this machine.
///
/// ```
/// assert!(quant::registry::is_available("gptq"));
/// assert!(!quant::registry::is_available("magic"));
/// ```
pub fn is_available(name: &str) -> bool {
    let mut all = [methods(), layouts(), architectures(), kernels()].into_iter().flatten();
    all.any(|entry| entry.name == name && entry.available)
}

/// What [`info`] tells.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// Version of this library.
    pub version: &'static str,
    /// Processor family.
    pub arch: &'static str,
    /// Operating system.
    pub os: &'static str,
    /// The instruction set in use.
    pub isa: &'static str,
    /// All that the processor has.
    pub isas: Vec<&'static str>,
    /// The greatest of them, which is in use unless it is capped.
    pub detected: &'static str,
    /// The cap of the environment variable `QUANT_ISA`, if it is set.
    pub cap: Option<&'static str>,
    /// Threads of the current pool.
    pub threads: usize,
}

/// What this build and this machine are.
pub fn info() -> Info {
    Info {
        version: env!("CARGO_PKG_VERSION"),
        arch: std::env::consts::ARCH,
        os: std::env::consts::OS,
        isa: isa::active().name(),
        isas: isa::supported().iter().map(|isa| isa.name()).collect(),
        detected: isa::detected().name(),
        cap: isa::cap_from_environment().ok().flatten().map(Isa::name),
        threads: rayon::current_num_threads(),
    }
}

/// Refuses an environment that cannot be followed. Programs call it when they start; the library itself falls back
/// to the processor's best.
pub fn check_environment() -> Result<(), IsaError> {
    isa::cap_from_environment().map(|_| ())
}
