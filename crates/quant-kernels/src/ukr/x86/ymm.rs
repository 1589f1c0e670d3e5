//! AVX2 and AVX-VNNI: a vector is eight outputs, half a panel.

use std::arch::x86_64::*;

use crate::isa::Isa;
use crate::packed::params::Kind;
use crate::ukr::tile::{Vector, presums, tile};
use crate::ukr::{Call, HEIGHTS, Kernel, table};

/// Kernels with the 256-bit `vpdpbusd` of AVX-VNNI: at most 12 sums in 16 registers.
pub(in crate::ukr) const AVX_VNNI: [Kernel; 9 * HEIGHTS.len()] = table::kernels!(
    Isa::AvxVnni, "avxvnni", 0, with_vnni,
    [(1, 2; 1, 4), (2, 1; 2, 2), (4, 1; 4, 2), (8, 1; 4, 2), (12, 1; 6, 2)],
    [(1, 1; 1, 2), (2, 1; 1, 2), (4, 1; 4, 2), (8, 1; 4, 2), (12, 1; 4, 2)]
);

/// Kernels with `vpmaddubsw`.
pub(in crate::ukr) const AVX2: [Kernel; 9 * HEIGHTS.len()] = table::kernels!(
    Isa::Avx2, "avx2", 128, without_vnni,
    [(1, 2; 1, 4), (2, 1; 2, 2), (4, 1; 4, 1), (8, 1; 4, 1), (12, 1; 6, 1)],
    [(1, 1; 1, 2), (2, 1; 1, 2), (4, 1; 4, 1), (8, 1; 4, 1), (12, 1; 4, 1)]
);

/// The kernels of [`AVX_VNNI`] with the 256-bit form of AVX-512, so that their code is tested on more machines.
#[cfg(test)]
pub(in crate::ukr) const AVX512_VNNI_YMM: [Kernel; 9 * 2] = table::kernels!(
    Isa::Avx512Vnni, "avx512vnni_ymm", 0, with_vnni_of_512,
    [(2, 1; 2, 2), (12, 1; 6, 2)],
    [(2, 1; 1, 2), (12, 1; 4, 2)]
);

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn with_vnni<
    const WIDTH: usize,
    const TABLE: bool,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
) {
    // SAFETY: this function has the features of the vector; `Kernel::run` has checked the call.
    unsafe { tile::<Ymm<AVX>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

#[cfg(test)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni")]
fn with_vnni_of_512<
    const WIDTH: usize,
    const TABLE: bool,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
) {
    // SAFETY: this function has the features of the vector; `Kernel::run` has checked the call.
    unsafe { tile::<Ymm<AVX512>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn without_vnni<
    const WIDTH: usize,
    const TABLE: bool,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
) {
    // SAFETY: this function has the features of the vector; `Kernel::run` has checked the call.
    unsafe { tile::<Ymm<NONE>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

/// No `vpdpbusd`.
const NONE: u8 = 0;
/// That of AVX-VNNI.
const AVX: u8 = 1;
/// That of AVX-512 VL and VNNI.
const AVX512: u8 = 2;

/// Eight words, with one `vpdpbusd` or the other.
struct Ymm<const VNNI: u8>;

/// The functions of [`Vector`] are inlined into those above, which have the features.
#[allow(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
impl<const VNNI: u8> Vector for Ymm<VNNI> {
    const LANES: usize = 8;
    const CENTER: u8 = if VNNI == NONE { 128 } else { 0 };
    type Int = __m256i;
    type Float = __m256;

    #[inline(always)]
    fn fields(max: u8) -> usize {
        if VNNI == NONE { presums(max, 4) } else { 1 }
    }
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m256i {
        _mm256_loadu_si256(at.cast())
    }
    #[inline(always)]
    unsafe fn splat(word: i32) -> __m256i {
        _mm256_set1_epi32(word)
    }
    #[inline(always)]
    unsafe fn shift(words: __m256i, right: i32) -> __m256i {
        match right {
            0.. => _mm256_srlv_epi32(words, _mm256_set1_epi32(right)),
            _ => _mm256_sllv_epi32(words, _mm256_set1_epi32(-right)),
        }
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        _mm256_and_si256(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        _mm256_or_si256(a, b)
    }
    #[inline(always)]
    unsafe fn xor(a: __m256i, b: __m256i) -> __m256i {
        _mm256_xor_si256(a, b)
    }
    #[inline(always)]
    unsafe fn table(entries: &[u8; 16]) -> __m256i {
        _mm256_broadcastsi128_si256(_mm_loadu_si128(entries.as_ptr().cast()))
    }
    #[inline(always)]
    unsafe fn lookup(table: __m256i, bytes: __m256i) -> __m256i {
        _mm256_shuffle_epi8(table, bytes)
    }
    #[inline(always)]
    unsafe fn dot(acc: __m256i, w: [__m256i; 4], x: [__m256i; 4], n: usize, wide: bool) -> __m256i {
        match VNNI {
            AVX => return _mm256_dpbusd_avx_epi32(acc, w[0], x[0]),
            AVX512 => return _mm256_dpbusd_epi32(acc, w[0], x[0]),
            _ => {}
        }
        let mut sum = pairs(w[0], x[0], wide);
        if n > 1 {
            sum = _mm256_add_epi16(sum, pairs(w[1], x[1], wide));
        }
        if n > 2 {
            sum = _mm256_add_epi16(sum, _mm256_add_epi16(pairs(w[2], x[2], wide), pairs(w[3], x[3], wide)));
        }
        _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)))
    }

    #[inline(always)]
    unsafe fn to_float(words: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(words)
    }
    #[inline(always)]
    unsafe fn splat_float(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load_params(kind: Kind, at: *const u8) -> __m256 {
        match kind {
            Kind::U8 => _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()))),
            Kind::F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            Kind::Bf16 => {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
            Kind::F32 => _mm256_loadu_ps(at.cast()),
        }
    }
    #[inline(always)]
    unsafe fn load_float(at: *const f32) -> __m256 {
        _mm256_loadu_ps(at)
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn neg_mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, _mm256_xor_ps(b, _mm256_set1_ps(-0.0)))
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn store(x: __m256, at: *mut f32) {
        _mm256_storeu_ps(at, x);
    }
}

/// Sums of neighbouring products in sixteen bits.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn pairs(weights: __m256i, activations: __m256i, signed: bool) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        match signed {
            // The first factor must be unsigned: its sign moves over to the activation.
            true => _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(activations, weights)),
            false => _mm256_maddubs_epi16(weights, activations),
        }
    }
}
