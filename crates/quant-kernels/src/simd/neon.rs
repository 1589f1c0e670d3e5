//! NEON, 128-bit vectors.

use std::arch::aarch64::{float32x4_t, uint16x4_t};
use std::arch::asm;

use half::f16;
use pulp::aarch64::Neon;

use super::{Element, Vector, register_tile, widen_f16};

impl Vector for Neon {
    // 24 accumulators, 4 vectors of b, 1 broadcast of a: 29 of the 32 registers.
    const MR: usize = 6;
    const NR: usize = 16;

    #[inline(always)]
    fn width(rows: usize) -> usize {
        match rows {
            1 => 64,
            2 => 32,
            _ => 16,
        }
    }

    #[inline(always)]
    fn tile(self, rows: usize, width: usize, a: &[f32], b: &[f32], sums: &mut [f32]) {
        match (rows, width) {
            (1, 64) => register_tile::<Self, 1, 16>(self, a, b, sums),
            (2, 32) => register_tile::<Self, 2, 8>(self, a, b, sums),
            (1, _) => register_tile::<Self, 1, 4>(self, a, b, sums),
            (2, _) => register_tile::<Self, 2, 4>(self, a, b, sums),
            (3, _) => register_tile::<Self, 3, 4>(self, a, b, sums),
            (4, _) => register_tile::<Self, 4, 4>(self, a, b, sums),
            (5, _) => register_tile::<Self, 5, 4>(self, a, b, sums),
            _ => register_tile::<Self, 6, 4>(self, a, b, sums),
        }
    }

    #[inline(always)]
    fn transpose<E: Element>(self, rows: [&[E]; 8], _: [*const E; 8], out: &mut [f32], stride: usize) {
        let kc = rows[0].len();
        for row in rows {
            assert_eq!(row.len(), kc);
        }
        assert!(kc == 0 || out.len() >= (kc - 1) * stride + 8);
        let at = |r: usize, p: usize| -> float32x4_t {
            debug_assert!(p + 4 <= kc);
            // SAFETY: `p + 4 <= kc`, the length of every row; an array is aligned as its element.
            pulp::cast(E::widen(unsafe { &*rows[r].as_ptr().add(p).cast::<[E; 4]>() }))
        };
        for p in (0..kc / 4 * 4).step_by(4) {
            let upper = transpose_4x4(self, [at(0, p), at(1, p), at(2, p), at(3, p)]);
            let lower = transpose_4x4(self, [at(4, p), at(5, p), at(6, p), at(7, p)]);
            for i in 0..4 {
                let eight = pulp::cast([upper[i], lower[i]]);
                // SAFETY: `p + i < kc`, and `(kc - 1) * stride + 8` numbers are in `out`; arrays are aligned as f32.
                unsafe { *out.as_mut_ptr().add((p + i) * stride).cast::<[f32; 8]>() = eight };
            }
        }
        for p in kc / 4 * 4..kc {
            for r in 0..8 {
                out[p * stride + r] = E::widen(&[rows[r][p]])[0];
            }
        }
    }

    #[inline(always)]
    fn widen(self, numbers: &[f16], out: &mut [f32]) {
        let (fours, rest) = numbers.as_chunks::<4>();
        let (out_fours, out_rest) = out.as_chunks_mut::<4>();
        for (out, four) in out_fours.iter_mut().zip(fours) {
            // SAFETY: every processor with NEON, which `self` proves, converts.
            *out = unsafe { pulp::cast(widen_f16x4(pulp::cast(*four))) };
        }
        for (out, x) in out_rest.iter_mut().zip(rest) {
            *out = widen_f16(x.to_bits());
        }
    }
}

/// Four numbers in binary16, widened by the instruction that the standard library does not offer yet.
///
/// # Safety
/// NEON.
#[inline(always)]
pub(crate) unsafe fn widen_f16x4(numbers: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: an instruction on registers, which the caller says the processor has.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) numbers,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}

#[inline(always)]
fn transpose_4x4(simd: Neon, [r0, r1, r2, r3]: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let neon = simd.neon;
    let (l02, h02) = (neon.vzip1q_f32(r0, r2), neon.vzip2q_f32(r0, r2));
    let (l13, h13) = (neon.vzip1q_f32(r1, r3), neon.vzip2q_f32(r1, r3));
    [
        neon.vzip1q_f32(l02, l13),
        neon.vzip2q_f32(l02, l13),
        neon.vzip1q_f32(h02, h13),
        neon.vzip2q_f32(h02, h13),
    ]
}
