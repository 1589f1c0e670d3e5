//! The one list of methods.

use quant_core::SpecError;

use crate::awq::{Awq, AwqOptions, AwqScale};
use crate::bnb::{Bnb4, Bnb4Options, LlmInt8, LlmInt8Options};
use crate::floats::Floats;
use crate::ggml;
use crate::gptq::{Gptq, GptqOptions};
use crate::hqq::{Hqq, HqqOptions};
use crate::quantizer::Quantizer;
use crate::quanto::{Quanto, QuantoOptions};
use crate::rtn::{Rtn, RtnOptions};
use crate::sinq::{Sinq, SinqOptions};
use crate::smoothquant::SmoothQuant;
use crate::transform::Transform;
use crate::w8a8::{W8a8, W8a8Options};

/// Options of all methods; each takes its own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MethodOptions {
    /// Round to nearest.
    pub rtn: RtnOptions,
    /// GPTQ.
    pub gptq: GptqOptions,
    /// AWQ.
    pub awq: AwqOptions,
    /// W8A8.
    pub w8a8: W8a8Options,
    /// HQQ.
    pub hqq: HqqOptions,
    /// SINQ.
    pub sinq: SinqOptions,
    /// NF4 and FP4.
    pub bnb4: Bnb4Options,
    /// LLM.int8.
    pub llm_int8: LlmInt8Options,
    /// Quanto.
    pub quanto: QuantoOptions,
}

/// An entry of the registry.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Name on the command line and in recipes.
    pub name: &'static str,
    /// Makes the quantizer with its options.
    pub build: fn(&MethodOptions) -> Box<dyn Quantizer>,
}

/// Every method, in the order in which they are listed.
pub const METHODS: &[Method] = &[
    Method { name: "rtn", build: |o| Box::new(Rtn::new(o.rtn)) },
    Method { name: "gptq", build: |o| Box::new(Gptq::new(o.gptq)) },
    Method { name: "awq", build: |o| Box::new(Awq::new(o.awq)) },
    Method { name: "w8a8", build: |o| Box::new(W8a8::new(o.w8a8)) },
    Method { name: "hqq", build: |o| Box::new(Hqq::new(o.hqq)) },
    Method { name: "sinq", build: |o| Box::new(Sinq::new(o.sinq)) },
    Method { name: "nf4", build: |o| Box::new(Bnb4::nf4(o.bnb4)) },
    Method { name: "fp4", build: |o| Box::new(Bnb4::fp4(o.bnb4)) },
    Method { name: "llm-int8", build: |o| Box::new(LlmInt8::new(o.llm_int8)) },
    Method { name: "quanto", build: |o| Box::new(Quanto::new(o.quanto)) },
    Method { name: "fp8", build: |_| Box::new(Floats::Fp8) },
    Method { name: "mxfp4", build: |_| Box::new(Floats::Mxfp4) },
    Method { name: "nvfp4", build: |_| Box::new(Floats::Nvfp4) },
    Method { name: "q4_0", build: |_| Box::new(ggml::TYPES[0]) },
    Method { name: "q4_1", build: |_| Box::new(ggml::TYPES[1]) },
    Method { name: "q5_0", build: |_| Box::new(ggml::TYPES[2]) },
    Method { name: "q5_1", build: |_| Box::new(ggml::TYPES[3]) },
    Method { name: "q8_0", build: |_| Box::new(ggml::TYPES[4]) },
];

/// An entry of the list of transforms.
#[derive(Clone, Copy, Debug)]
pub struct TransformEntry {
    /// Name on the command line and in recipes.
    pub name: &'static str,
    /// Makes the transform with the options of the method it belongs to.
    pub build: fn(&MethodOptions) -> Box<dyn Transform>,
}

/// Every transform, in the order in which they are listed.
pub const TRANSFORMS: &[TransformEntry] = &[
    TransformEntry { name: "awq-scale", build: |o| Box::new(AwqScale::new(o.awq)) },
    TransformEntry {
        name: "smoothquant",
        build: |o| {
            let alpha = o.w8a8.alpha.unwrap_or(SmoothQuant::ALPHA);
            Box::new(SmoothQuant { alpha, outputs: o.w8a8.smooth_outputs })
        },
    },
];

/// The transform `name` with these options.
pub fn transform(name: &str, options: &MethodOptions) -> Result<Box<dyn Transform>, SpecError> {
    let entry = TRANSFORMS.iter().find(|entry| entry.name == name).ok_or_else(|| SpecError::Option {
        option: "transform",
        found: name.to_owned(),
        allowed: "awq-scale or smoothquant",
    })?;
    Ok((entry.build)(options))
}

/// No method has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown method {name:?}; known are {}", .known.join(", "))]
pub struct UnknownMethod {
    /// The name asked for.
    pub name: String,
    /// The names that exist.
    pub known: Vec<&'static str>,
}

/// The method `name` with these options.
pub fn quantizer(name: &str, options: &MethodOptions) -> Result<Box<dyn Quantizer>, UnknownMethod> {
    match METHODS.iter().find(|method| method.name == name) {
        Some(method) => Ok((method.build)(options)),
        None => {
            let known = METHODS.iter().map(|method| method.name).collect();
            Err(UnknownMethod { name: name.to_owned(), known })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_quantizers() {
        for method in METHODS {
            let quantizer = quantizer(method.name, &MethodOptions::default()).unwrap();
            assert_eq!(quantizer.name(), method.name);
            quantizer.validate(&quantizer.default_spec()).unwrap();
        }
        for entry in TRANSFORMS {
            assert_eq!(transform(entry.name, &MethodOptions::default()).unwrap().name(), entry.name);
            let error = transform("awk", &MethodOptions::default()).err().unwrap().to_string();
            assert!(error.contains(entry.name) && error.contains("awk"), "{error}");
        }
        let error = quantizer("gtpq", &MethodOptions::default()).err().unwrap();
        assert!(error.to_string().starts_with("unknown method \"gtpq\"; known are rtn, gptq"));
    }
}
