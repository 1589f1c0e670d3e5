//! From an [`Isa`] to code compiled for it.
//!
//! pulp supplies the vectors and the functions that carry the target features; [`Vector`] adds the two things
//! that matrix products need beside them: a register tile and a transposition. A token of type `V3`, `V4` or
//! `Neon` proves that the processor has the instructions, so calling through it is safe.

#[cfg(target_arch = "aarch64")]
mod neon;
mod pairs;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub(crate) use self::neon::widen_f16x4;

use half::{bf16, f16};

pub(crate) use self::pairs::{pair, pair_tile, round_bf16};
use crate::isa::Isa;

/// Vectors of f32 with the shapes that suit their registers.
pub(crate) trait Vector: pulp::Simd {
    /// Greatest number of rows of a register tile.
    const MR: usize;
    /// Columns of a register tile; a multiple of 8.
    const NR: usize;

    /// Columns of a register tile that has few rows and stands alone: a multiple of `NR`, so that enough sums
    /// are under way to hide the latency of an addition.
    fn width(rows: usize) -> usize;

    /// `sums[r, j] = fma over p ascending of a[p, r] * b[p, j], from sums[r, j]`, with `a: [kc, rows]`,
    /// `b: [kc, width]`, `sums: [rows, width]`, `1 <= rows <= MR`, and `width` either `NR` or [`Vector::width`].
    fn tile(self, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]);

    /// `out[p * stride + r] = rows[r][p]` for 8 rows of equal length, `p` ascending: with a stride below 8 a
    /// column overwrites the end of the one before. What lies at `ahead` will be read next.
    fn transpose<E: Element>(self, rows: [&[E]; 8], ahead: [*const E; 8], out: &mut [f32], stride: usize);

    /// `out[i] = numbers[i]` for slices of equal length.
    fn widen(self, numbers: &[f16], out: &mut [f32]);
}

/// What rows are made of, and the words that packed operands get from it.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// The words of some elements, without rounding; written so that it compiles to vector instructions.
    fn widen<const N: usize>(numbers: &[Self; N]) -> [f32; N];
}

impl Element for f32 {
    #[inline(always)]
    fn widen<const N: usize>(numbers: &[f32; N]) -> [f32; N] {
        *numbers
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<const N: usize>(numbers: &[bf16; N]) -> [f32; N] {
        let mut out = [0.0; N];
        for (out, x) in out.iter_mut().zip(numbers) {
            *out = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
        out
    }
}

/// binary16 to binary32 without branches: the exponent is moved by a multiplication with 2^112, which is exact
/// and normalises subnormals; infinities and NaN get their exponent and quiet bit by hand.
#[inline(always)]
pub(crate) fn widen_f16(bits: u16) -> f32 {
    const TWO_112: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * TWO_112).to_bits();
    let quiet = if magnitude > 0x0f80_0000 { 0x0040_0000 } else { 0 };
    let special = magnitude | 0x7f80_0000 | quiet;
    let value = if magnitude >= 0x0f80_0000 { special } else { finite };
    f32::from_bits(value | (bits & 0x8000) << 16)
}

/// A piece of work written once for all vectors.
pub(crate) trait Work {
    /// What it returns.
    type Output;
    /// Does it. Implementations are `#[inline(always)]`, so that they compile with the features of `V`.
    fn run<V: Vector>(self, simd: V) -> Self::Output;
}

/// Runs `work` with the vectors of `isa`, which must come from [`crate::isa`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn run<W: Work>(isa: Isa, work: W) -> W::Output {
    let tokens = crate::isa::CpuFeatures::detect().vectors();
    match (tokens.v4, tokens.v3) {
        (Some(v4), _) if isa >= Isa::Avx512 => v4.vectorize(Call { work, simd: v4 }),
        (_, Some(v3)) if isa >= Isa::Avx2 => v3.vectorize(Call { work, simd: v3 }),
        _ => work.run(pulp::Scalar::new()),
    }
}

/// Runs `work` with the vectors of `isa`, which must come from [`crate::isa`].
#[cfg(target_arch = "aarch64")]
pub(crate) fn run<W: Work>(isa: Isa, work: W) -> W::Output {
    match crate::isa::CpuFeatures::detect().vectors().neon {
        Some(neon) if isa >= Isa::Neon => neon.vectorize(Call { work, simd: neon }),
        _ => work.run(pulp::Scalar::new()),
    }
}

/// Runs `work` with the vectors of `isa`, which must come from [`crate::isa`].
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn run<W: Work>(_: Isa, work: W) -> W::Output {
    work.run(pulp::Scalar::new())
}

#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    expect(dead_code, reason = "scalar only")
)]
struct Call<W, V> {
    work: W,
    simd: V,
}

impl<W: Work, V: Vector> pulp::NullaryFnOnce for Call<W, V> {
    type Output = W::Output;

    #[inline(always)]
    fn call(self) -> W::Output {
        self.work.run(self.simd)
    }
}

/// Runs `f` compiled for the widest vectors that may be used: for plain loops of other crates.
///
/// The compiler vectorises only what it inlines into `f`, so functions called from it are to be `#[inline(always)]`.
/// It never fuses or reorders float operations, so the bits are those of a plain call `f()`.
///
/// ```
/// let mut x = [1.0f32, 2.0, 3.0];
/// quant_kernels::vectorized(#[inline(always)] || x.iter_mut().for_each(|x| *x = *x * 2.0 + 1.0));
/// assert_eq!(x, [3.0, 5.0, 7.0]);
/// ```
pub fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    struct Plain<F>(F);
    impl<R, F: FnOnce() -> R> Work for Plain<F> {
        type Output = R;

        #[inline(always)]
        fn run<V: Vector>(self, _: V) -> R {
            (self.0)()
        }
    }
    run(crate::isa::active(), Plain(f))
}

/// Asks for the cache line at an address that will be read soon, if it is one.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch changes nothing that the program can see and faults on no address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch changes nothing that the program can see and faults on no address.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// The register tile of [`Vector::tile`] with `M` rows and `V` vectors in each.
#[inline(always)]
fn register_tile<S: pulp::Simd, const M: usize, const V: usize>(
    simd: S,
    a: &[f32],
    b: &[f32],
    sums: &mut [f32],
) {
    let sums =
        S::as_mut_simd_f32s(sums).0.as_chunks_mut::<V>().0.first_chunk_mut::<M>().expect("M rows of sums");
    let mut acc = *sums;
    let (b, _) = S::as_simd_f32s(b);
    for (a, b) in a.as_chunks::<M>().0.iter().zip(b.as_chunks::<V>().0) {
        for r in 0..M {
            let x = simd.splat_f32s(a[r]);
            for v in 0..V {
                acc[r][v] = simd.mul_add_f32s(x, b[v], acc[r][v]);
            }
        }
    }
    *sums = acc;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_as_in_half() {
        for bits in 0..=u16::MAX {
            assert_eq!(widen_f16(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits(), "{bits:#06x}");
        }
    }
}
