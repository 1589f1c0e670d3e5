//! Which vector instructions this process uses. The only place of the project that asks the CPU.
//!
//! The CPU is looked at once. The environment variable `QUANT_ISA` caps the choice, so that every machine can
//! run the code of every lesser machine; [`with_cap`] does the same for one closure on one thread.

use std::cell::Cell;
use std::sync::OnceLock;

use thiserror::Error;

/// The environment variable that caps the instruction set.
pub const ISA_VARIABLE: &str = "QUANT_ISA";

/// An instruction set that kernels are written for. Within a processor family a later one is preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain code for any processor.
    Scalar,
    /// AVX2 with FMA and F16C (x86-64-v3).
    Avx2,
    /// [`Isa::Avx2`] and 256-bit `vpdpbusd`.
    AvxVnni,
    /// AVX-512 F, BW, CD, DQ, VL (x86-64-v4).
    Avx512,
    /// [`Isa::Avx512`] and `vpdpbusd`.
    Avx512Vnni,
    /// [`Isa::Avx512Vnni`] and `vdpbf16ps`.
    Avx512Bf16,
    /// The base vector set of every 64-bit ARM.
    Neon,
    /// [`Isa::Neon`] and `sdot`.
    NeonDot,
    /// [`Isa::NeonDot`] and `smmla`.
    NeonI8mm,
}

impl Isa {
    /// All instruction sets, lesser first within a family.
    pub const ALL: [Isa; 9] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::AvxVnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Avx512Bf16,
        Isa::Neon,
        Isa::NeonDot,
        Isa::NeonI8mm,
    ];

    /// The name that `QUANT_ISA` understands.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Neon => "neon",
            Isa::NeonDot => "neondot",
            Isa::NeonI8mm => "neoni8mm",
        }
    }

    /// The instruction set of that name.
    pub fn parse(name: &str) -> Result<Isa, IsaError> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| IsaError::Unknown { found: name.to_owned() })
    }

    fn is_arm(self) -> bool {
        self >= Isa::Neon
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why `QUANT_ISA` cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IsaError {
    /// Not the name of an instruction set.
    #[error("{ISA_VARIABLE}={found}: no such instruction set; use one of {}", names(&Isa::ALL))]
    Unknown {
        /// The value found.
        found: String,
    },
    /// The name of an instruction set of another processor family.
    #[error("{ISA_VARIABLE}={found}: this processor has {}; use one of these", names(supported()))]
    OtherFamily {
        /// The value found.
        found: Isa,
    },
}

fn names(list: &[Isa]) -> String {
    list.iter().map(|isa| isa.name()).collect::<Vec<_>>().join("|")
}

/// What the processor offers, looked up once per process.
#[derive(Debug)]
pub struct CpuFeatures {
    /// Ascending; the first is always [`Isa::Scalar`].
    supported: Vec<Isa>,
    vectors: Vectors,
}

/// Proofs that the processor has the vectors of an instruction set. On x86-64 they also prove F16C, which pulp's
/// levels leave out although every processor with AVX2 has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vectors {
    #[cfg(target_arch = "x86_64")]
    pub(crate) v3: Option<pulp::x86::V3>,
    #[cfg(target_arch = "x86_64")]
    pub(crate) v4: Option<pulp::x86::V4>,
    #[cfg(target_arch = "aarch64")]
    pub(crate) neon: Option<pulp::aarch64::Neon>,
}

/// Proof that the processor has 512-bit `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16Dot(());

/// No other processor has a product of bf16 with the same order of additions.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bf16Dot {}

/// The product of bf16 pairs, where [`active`] allows it.
pub(crate) fn bf16_dot() -> Option<Bf16Dot> {
    #[cfg(target_arch = "x86_64")]
    return (active() == Isa::Avx512Bf16).then_some(Bf16Dot(()));
    #[cfg(not(target_arch = "x86_64"))]
    None
}

impl Vectors {
    fn detect() -> Vectors {
        Vectors {
            #[cfg(target_arch = "x86_64")]
            v3: pulp::x86::V3::try_new().filter(|_| std::arch::is_x86_feature_detected!("f16c")),
            #[cfg(target_arch = "x86_64")]
            v4: pulp::x86::V4::try_new().filter(|_| std::arch::is_x86_feature_detected!("f16c")),
            #[cfg(target_arch = "aarch64")]
            neon: pulp::aarch64::Neon::try_new(),
        }
    }
}

impl CpuFeatures {
    /// The features of this processor.
    pub fn detect() -> &'static CpuFeatures {
        static FEATURES: OnceLock<CpuFeatures> = OnceLock::new();
        FEATURES.get_or_init(|| CpuFeatures {
            supported: Isa::ALL.into_iter().filter(|&isa| processor_has(isa)).collect(),
            vectors: Vectors::detect(),
        })
    }

    /// Whether kernels for `isa` can run.
    pub fn has(&self, isa: Isa) -> bool {
        self.supported.contains(&isa)
    }

    #[cfg_attr(
        not(any(target_arch = "x86_64", target_arch = "aarch64")),
        expect(dead_code, reason = "scalar only")
    )]
    pub(crate) fn vectors(&self) -> Vectors {
        self.vectors
    }

    /// The greatest supported instruction set that is not above `cap`.
    fn capped(&self, cap: Isa) -> Isa {
        self.supported
            .iter()
            .copied()
            .rfind(|&isa| isa <= cap && (isa == Isa::Scalar || isa.is_arm() == cap.is_arm()))
            .unwrap_or(Isa::Scalar)
    }
}

#[cfg(target_arch = "x86_64")]
fn processor_has(isa: Isa) -> bool {
    use std::arch::is_x86_feature_detected as has;
    let v3 = || Vectors::detect().v3.is_some();
    let v4 = || v3() && Vectors::detect().v4.is_some();
    match isa {
        Isa::Scalar => true,
        Isa::Avx2 => v3(),
        Isa::AvxVnni => v3() && has!("avxvnni"),
        Isa::Avx512 => v4(),
        Isa::Avx512Vnni => v4() && has!("avx512vnni"),
        Isa::Avx512Bf16 => v4() && has!("avx512vnni") && has!("avx512bf16"),
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn processor_has(isa: Isa) -> bool {
    use std::arch::is_aarch64_feature_detected as has;
    // Kernels load words of packed weights, whose bytes are little-endian.
    let neon = cfg!(target_endian = "little") && has!("neon");
    match isa {
        Isa::Scalar => true,
        Isa::Neon => neon,
        Isa::NeonDot => neon && has!("dotprod"),
        Isa::NeonI8mm => neon && has!("dotprod") && has!("i8mm"),
        _ => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn processor_has(isa: Isa) -> bool {
    isa == Isa::Scalar
}

/// The instruction sets that this processor has, ascending, starting with [`Isa::Scalar`].
pub fn supported() -> &'static [Isa] {
    &CpuFeatures::detect().supported
}

/// The greatest instruction set of this processor, whatever the cap.
pub fn detected() -> Isa {
    supported().last().copied().unwrap_or(Isa::Scalar)
}

/// Reads the cap of `QUANT_ISA`. Programs call it at their start to refuse a bad value; [`active`] ignores one.
pub fn cap_from_environment() -> Result<Option<Isa>, IsaError> {
    match std::env::var_os(ISA_VARIABLE) {
        None => Ok(None),
        Some(value) => parse_cap(&value.to_string_lossy()).map(Some),
    }
}

fn parse_cap(value: &str) -> Result<Isa, IsaError> {
    let cap = Isa::parse(value)?;
    let here_arm = cfg!(target_arch = "aarch64");
    if cap != Isa::Scalar && cap.is_arm() != here_arm {
        return Err(IsaError::OtherFamily { found: cap });
    }
    Ok(cap)
}

thread_local! {
    static SCOPED_CAP: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// The instruction set in use: the detected one, capped by `QUANT_ISA` and by [`with_cap`].
pub fn active() -> Isa {
    static PROCESS: OnceLock<Isa> = OnceLock::new();
    let process = *PROCESS.get_or_init(|| match cap_from_environment() {
        Ok(Some(cap)) => CpuFeatures::detect().capped(cap),
        Ok(None) | Err(_) => detected(),
    });
    match SCOPED_CAP.get() {
        Some(cap) => CpuFeatures::detect().capped(cap).min(process),
        None => process,
    }
}

/// Runs `f` with the instruction set capped at `cap` for the products that `f` starts on this thread.
///
/// Kernels fix their instruction set where they are called, so the tasks that they hand to other threads follow.
pub fn with_cap<R>(cap: Isa, f: impl FnOnce() -> R) -> R {
    with_scoped_cap(Some(cap), f)
}

/// The cap of [`with_cap`] that holds here.
pub(crate) fn scoped_cap() -> Option<Isa> {
    SCOPED_CAP.get()
}

/// Runs `f` under the cap that holds on another thread.
pub(crate) fn with_scoped_cap<R>(cap: Option<Isa>, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Isa>);
    impl Drop for Restore {
        fn drop(&mut self) {
            SCOPED_CAP.set(self.0);
        }
    }
    let _restore = Restore(SCOPED_CAP.replace(cap));
    f()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_unknown_ones_list_the_choices() {
        for isa in Isa::ALL {
            assert_eq!(Isa::parse(isa.name()), Ok(isa));
        }
        let text = Isa::parse("sse9").unwrap_err().to_string();
        for isa in Isa::ALL {
            assert!(text.contains(isa.name()), "{text}");
        }
    }

    #[test]
    fn a_cap_of_another_family_is_refused() {
        let foreign = if cfg!(target_arch = "aarch64") { "avx2" } else { "neondot" };
        assert!(matches!(parse_cap(foreign), Err(IsaError::OtherFamily { .. })));
        assert_eq!(parse_cap("scalar"), Ok(Isa::Scalar));
    }

    #[test]
    fn scoped_caps_nest_and_are_undone() {
        let before = active();
        with_cap(Isa::Scalar, || {
            assert_eq!(active(), Isa::Scalar);
            with_cap(detected(), || assert_eq!(active(), before));
            assert_eq!(active(), Isa::Scalar);
        });
        let _ = std::panic::catch_unwind(|| with_cap(Isa::Scalar, || panic!("inside")));
        assert_eq!(active(), before);
    }

    #[test]
    fn caps_fall_to_what_the_processor_has() {
        let old =
            CpuFeatures { supported: vec![Isa::Scalar, Isa::Avx2, Isa::Avx512], vectors: Vectors::detect() };
        assert_eq!(old.capped(Isa::Avx512Bf16), Isa::Avx512);
        assert_eq!(old.capped(Isa::AvxVnni), Isa::Avx2);
        assert_eq!(old.capped(Isa::Neon), Isa::Scalar);
        let arm = CpuFeatures { supported: vec![Isa::Scalar, Isa::Neon], vectors: Vectors::detect() };
        assert_eq!(arm.capped(Isa::NeonI8mm), Isa::Neon);
        assert_eq!(arm.capped(Isa::Avx2), Isa::Scalar);
    }
}
