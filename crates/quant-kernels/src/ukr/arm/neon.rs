//! A vector is four outputs, a quarter of a panel.

use std::arch::aarch64::*;

use super::instructions::{sdot, sdot_lane, smmla};
use crate::isa::Isa;
use crate::packed::params::Kind;
use crate::ukr::tile::{Vector, accumulate_rows, presums, tile};
use crate::ukr::{Call, HEIGHTS, Kernel, table};

/// Kernels for every 64-bit ARM processor, with products in sixteen bits.
pub(in crate::ukr) const NEON: [Kernel; 9 * HEIGHTS.len()] = table::kernels!(
    Isa::Neon, "neon", 128, plain,
    [(1, 2; 1, 4), (2, 2; 2, 4), (4, 1; 4, 2), (8, 1; 4, 2), (12, 1; 6, 2)],
    [(1, 1; 1, 4), (2, 1; 1, 4), (4, 1; 4, 2), (8, 1; 4, 2), (12, 1; 4, 2)]
);

/// Kernels with `sdot`. A tile of 12 rows keeps 24 sums in 32 registers.
pub(in crate::ukr) const NEON_DOT: [Kernel; 9 * HEIGHTS.len()] = table::kernels!(
    Isa::NeonDot, "neondot", 128, with_sdot,
    [(1, 2; 1, 8), (2, 2; 2, 8), (4, 1; 4, 4), (8, 1; 8, 2), (12, 1; 12, 2)],
    [(1, 1; 1, 4), (2, 1; 1, 4), (4, 1; 4, 4), (8, 1; 4, 4), (12, 1; 4, 4)]
);

/// Kernels with `smmla`, for the heights at which it needs fewer instructions than `sdot`.
pub(in crate::ukr) const NEON_I8MM: [Kernel; 9 * 3] = table::kernels!(
    Isa::NeonI8mm, "neoni8mm", 128, with_smmla,
    [(4, 1; 4, 4), (8, 1; 8, 2), (12, 1; 12, 2)],
    [(4, 1; 4, 4), (8, 1; 4, 4), (12, 1; 4, 4)]
);

#[target_feature(enable = "neon")]
fn plain<const WIDTH: usize, const TABLE: bool, const PANELS: usize, const ROWS: usize, const COLS: usize>(
    call: &mut Call<'_>,
) {
    // SAFETY: this function has the features of the vector; `Kernel::run` has checked the call.
    unsafe { tile::<Neon<PLAIN>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

#[target_feature(enable = "neon,dotprod")]
fn with_sdot<
    const WIDTH: usize,
    const TABLE: bool,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
) {
    // SAFETY: this function has the features of the vector; `Kernel::run` has checked the call.
    unsafe { tile::<Neon<DOT>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

#[target_feature(enable = "neon,dotprod,i8mm")]
fn with_smmla<
    const WIDTH: usize,
    const TABLE: bool,
    const PANELS: usize,
    const ROWS: usize,
    const COLS: usize,
>(
    call: &mut Call<'_>,
) {
    // SAFETY: this function has the features of the vector; `Kernel::run` has checked the call.
    unsafe { tile::<Neon<MATRIX>, WIDTH, TABLE, PANELS, ROWS, COLS>(call) }
}

/// No product of four bytes.
const PLAIN: u8 = 0;
/// `sdot`.
const DOT: u8 = 1;
/// `smmla`: two rows are summed together. Vector `r` of a column holds, for even `r`, two outputs by rows `r` and
/// `r + 1`, for odd `r` the other two outputs by rows `r - 1` and `r`.
const MATRIX: u8 = 2;

/// Four words, and how their bytes are multiplied.
struct Neon<const PRODUCT: u8>;

/// The functions of [`Vector`] are inlined into those above, which have the features.
#[allow(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
impl<const PRODUCT: u8> Vector for Neon<PRODUCT> {
    const LANES: usize = 4;
    const CENTER: u8 = 128;
    type Int = int32x4_t;
    type Float = float32x4_t;

    #[inline(always)]
    fn fields(max: u8) -> usize {
        match PRODUCT {
            PLAIN => presums(max, 4),
            DOT => 1,
            _ => 2,
        }
    }
    #[inline(always)]
    unsafe fn load(at: *const u8) -> int32x4_t {
        vreinterpretq_s32_u8(vld1q_u8(at))
    }
    #[inline(always)]
    unsafe fn splat(word: i32) -> int32x4_t {
        vdupq_n_s32(word)
    }
    #[inline(always)]
    unsafe fn shift(words: int32x4_t, right: i32) -> int32x4_t {
        vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(words), vdupq_n_s32(-right)))
    }
    #[inline(always)]
    unsafe fn and(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vandq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vorrq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn xor(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        veorq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn table(entries: &[u8; 16]) -> int32x4_t {
        Self::load(entries.as_ptr())
    }
    #[inline(always)]
    unsafe fn lookup(table: int32x4_t, bytes: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(bytes)))
    }
    #[inline(always)]
    unsafe fn dot(acc: int32x4_t, w: [int32x4_t; 4], x: [int32x4_t; 4], n: usize, _: bool) -> int32x4_t {
        if PRODUCT != PLAIN {
            return sdot(acc, w[0], x[0]);
        }
        let (w, x) = (w.map(|w| vreinterpretq_s8_s32(w)), x.map(|x| vreinterpretq_s8_s32(x)));
        let mut low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0]));
        let mut high = vmull_high_s8(w[0], x[0]);
        if n > 1 {
            low = vmlal_s8(low, vget_low_s8(w[1]), vget_low_s8(x[1]));
            high = vmlal_high_s8(high, w[1], x[1]);
        }
        if n > 2 {
            low = vmlal_s8(low, vget_low_s8(w[2]), vget_low_s8(x[2]));
            high = vmlal_high_s8(high, w[2], x[2]);
            low = vmlal_s8(low, vget_low_s8(w[3]), vget_low_s8(x[3]));
            high = vmlal_high_s8(high, w[3], x[3]);
        }
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
    #[inline(always)]
    unsafe fn accumulate<const ROWS: usize, const COLS: usize>(
        acc: &mut [[int32x4_t; COLS]; ROWS],
        weights: &[[int32x4_t; 4]; COLS],
        activations: *const i32,
        height: usize,
        n: usize,
        wide: bool,
    ) {
        match PRODUCT {
            DOT if ROWS.is_multiple_of(4) => sum_four_rows(acc, weights.map(|w| w[0]), activations),
            MATRIX => {
                sum_two_rows(acc, weights.map(|w| [w[0], w[1]]), [activations, activations.add(height)])
            }
            _ => accumulate_rows::<Self, ROWS, COLS>(acc, weights, activations, height, n, wide),
        }
    }
    #[inline(always)]
    unsafe fn interleave<const ROWS: usize, const COLS: usize>(acc: &mut [[int32x4_t; COLS]; ROWS]) {
        if PRODUCT == MATRIX {
            for rows in acc.as_chunks_mut::<2>().0 {
                for c in 0..COLS {
                    let (a, b) = (rows[0][c], rows[1][c]);
                    (rows[0][c], rows[1][c]) = (vzip1q_s32(a, b), vzip2q_s32(a, b));
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn separate<const ROWS: usize, const COLS: usize>(acc: &mut [[int32x4_t; COLS]; ROWS]) {
        if PRODUCT == MATRIX {
            for rows in acc.as_chunks_mut::<2>().0 {
                for c in 0..COLS {
                    let (a, b) = (rows[0][c], rows[1][c]);
                    (rows[0][c], rows[1][c]) = (vuzp1q_s32(a, b), vuzp2q_s32(a, b));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn to_float(words: int32x4_t) -> float32x4_t {
        vcvtq_f32_s32(words)
    }
    #[inline(always)]
    unsafe fn splat_float(x: f32) -> float32x4_t {
        vdupq_n_f32(x)
    }
    #[inline(always)]
    unsafe fn load_params(kind: Kind, at: *const u8) -> float32x4_t {
        match kind {
            Kind::U8 => {
                let bytes = vcreate_u8(u64::from(at.cast::<u32>().read_unaligned()));
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
            }
            Kind::F16 => crate::simd::widen_f16x4(vld1_u16(at.cast())),
            Kind::Bf16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at.cast()))),
            Kind::F32 => vld1q_f32(at.cast()),
        }
    }
    #[inline(always)]
    unsafe fn load_float(at: *const f32) -> float32x4_t {
        vld1q_f32(at)
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmulq_f32(a, b)
    }
    #[inline(always)]
    unsafe fn neg_mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmulq_f32(a, vnegq_f32(b))
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        vfmaq_f32(c, a, b)
    }
    #[inline(always)]
    unsafe fn store(x: float32x4_t, at: *mut f32) {
        vst1q_f32(at, x);
    }
}

/// One field of weights by `ROWS` activations, four of which lie in a vector: `sdot` takes one as it takes a splat.
///
/// # Safety
/// NEON and the dot product; `activations` points at `ROWS` words.
#[inline(always)]
unsafe fn sum_four_rows<const ROWS: usize, const COLS: usize>(
    acc: &mut [[int32x4_t; COLS]; ROWS],
    weights: [int32x4_t; COLS],
    activations: *const i32,
) {
    for (i, rows) in acc.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let four = vreinterpretq_s32_u8(vld1q_u8(activations.add(4 * i).cast()));
            for (c, w) in weights.into_iter().enumerate() {
                rows[0][c] = sdot_lane::<0>(rows[0][c], w, four);
                rows[1][c] = sdot_lane::<1>(rows[1][c], w, four);
                rows[2][c] = sdot_lane::<2>(rows[2][c], w, four);
                rows[3][c] = sdot_lane::<3>(rows[3][c], w, four);
            }
        }
    }
}

/// Two fields of weights by two fields of `ROWS` activations, two rows at a time, in the order of [`MATRIX`].
///
/// # Safety
/// NEON and the matrix product; `activations` point at `ROWS` words.
#[inline(always)]
unsafe fn sum_two_rows<const ROWS: usize, const COLS: usize>(
    acc: &mut [[int32x4_t; COLS]; ROWS],
    weights: [[int32x4_t; 2]; COLS],
    activations: [*const i32; 2],
) {
    // SAFETY: the caller's.
    unsafe {
        // Eight columns of outputs 0 and 1, and of outputs 2 and 3.
        let pairs = weights.map(|[a, b]| [vzip1q_s32(a, b), vzip2q_s32(a, b)]);
        for (i, rows) in acc.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let two = |at: *const i32| vreinterpret_s32_u8(vld1_u8(at.add(2 * i).cast()));
            let [a, b] = activations.map(two);
            let x = vcombine_s32(vzip1_s32(a, b), vzip2_s32(a, b));
            for (c, pair) in pairs.into_iter().enumerate() {
                rows[0][c] = smmla(rows[0][c], pair[0], x);
                rows[1][c] = smmla(rows[1][c], pair[1], x);
            }
        }
    }
}
