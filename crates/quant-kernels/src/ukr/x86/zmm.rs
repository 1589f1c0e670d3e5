//! AVX-512: a vector is the sixteen outputs of a panel.

use std::arch::x86_64::*;

use crate::isa::Isa;
use crate::packed::params::Kind;
use crate::ukr::tile::{Vector, presums, tile};
use crate::ukr::{Call, HEIGHTS, Kernel, table};

/// Kernels with `vpdpbusd`. A tile of 12 rows and 2 panels has 24 sums in 32 registers.
pub(in crate::ukr) const AVX512_VNNI: [Kernel; 9 * HEIGHTS.len()] = table::kernels!(
    Isa::Avx512Vnni, "avx512vnni", 0, with_vnni,
    [(1, 2; 1, 2), (2, 2; 2, 2), (4, 2; 4, 2), (8, 2; 8, 2), (12, 2; 12, 2)],
    [(1, 2; 1, 2), (2, 2; 1, 2), (4, 2; 4, 2), (8, 2; 4, 2), (12, 2; 4, 2)]
);

/// Kernels without `vpdpbusd`.
pub(in crate::ukr) const AVX512: [Kernel; 9 * HEIGHTS.len()] = table::kernels!(
    Isa::Avx512, "avx512", 128, without_vnni,
    [(1, 2; 1, 2), (2, 2; 2, 2), (4, 2; 4, 2), (8, 1; 4, 1), (12, 1; 12, 1)],
    [(1, 2; 1, 2), (2, 2; 1, 2), (4, 2; 4, 2), (8, 2; 4, 2), (12, 2; 4, 2)]
);

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
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
    unsafe { tile::<Zmm<true>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
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
    unsafe { tile::<Zmm<false>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

/// Sixteen words, with or without `vpdpbusd`.
struct Zmm<const VNNI: bool>;

/// The functions of [`Vector`] are inlined into [`with_vnni`] and [`without_vnni`], which have the features.
#[allow(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
impl<const VNNI: bool> Vector for Zmm<VNNI> {
    const LANES: usize = 16;
    const CENTER: u8 = if VNNI { 0 } else { 128 };
    type Int = __m512i;
    type Float = __m512;

    #[inline(always)]
    fn fields(max: u8) -> usize {
        if VNNI { 1 } else { presums(max, 4) }
    }
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m512i {
        _mm512_loadu_si512(at.cast())
    }
    #[inline(always)]
    unsafe fn splat(word: i32) -> __m512i {
        _mm512_set1_epi32(word)
    }
    #[inline(always)]
    unsafe fn shift(words: __m512i, right: i32) -> __m512i {
        match right {
            0.. => _mm512_srlv_epi32(words, _mm512_set1_epi32(right)),
            _ => _mm512_sllv_epi32(words, _mm512_set1_epi32(-right)),
        }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
        _mm512_xor_si512(a, b)
    }
    #[inline(always)]
    unsafe fn table(entries: &[u8; 16]) -> __m512i {
        _mm512_broadcast_i32x4(_mm_loadu_si128(entries.as_ptr().cast()))
    }
    #[inline(always)]
    unsafe fn lookup(table: __m512i, bytes: __m512i) -> __m512i {
        _mm512_shuffle_epi8(table, bytes)
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, w: [__m512i; 4], x: [__m512i; 4], n: usize, wide: bool) -> __m512i {
        if VNNI {
            return _mm512_dpbusd_epi32(acc, w[0], x[0]);
        }
        let mut sum = pairs(w[0], x[0], wide);
        if n > 1 {
            sum = _mm512_add_epi16(sum, pairs(w[1], x[1], wide));
        }
        if n > 2 {
            sum = _mm512_add_epi16(sum, _mm512_add_epi16(pairs(w[2], x[2], wide), pairs(w[3], x[3], wide)));
        }
        _mm512_add_epi32(acc, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)))
    }

    #[inline(always)]
    unsafe fn to_float(words: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(words)
    }
    #[inline(always)]
    unsafe fn splat_float(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load_params(kind: Kind, at: *const u8) -> __m512 {
        match kind {
            Kind::U8 => _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()))),
            Kind::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
            Kind::Bf16 => {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
            Kind::F32 => _mm512_loadu_ps(at.cast()),
        }
    }
    #[inline(always)]
    unsafe fn load_float(at: *const f32) -> __m512 {
        _mm512_loadu_ps(at)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn neg_mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, _mm512_xor_ps(b, _mm512_set1_ps(-0.0)))
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn store(x: __m512, at: *mut f32) {
        _mm512_storeu_ps(at, x);
    }
}

/// Sums of neighbouring products in sixteen bits.
///
/// # Safety
/// AVX-512 BW.
#[inline(always)]
unsafe fn pairs(weights: __m512i, activations: __m512i, signed: bool) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        if !signed {
            return _mm512_maddubs_epi16(weights, activations);
        }
        // The first factor must be unsigned: its sign moves over to the activation.
        let negative = _mm512_movepi8_mask(weights);
        let activations = _mm512_mask_sub_epi8(activations, negative, _mm512_setzero_si512(), activations);
        _mm512_maddubs_epi16(_mm512_abs_epi8(weights), activations)
    }
}
