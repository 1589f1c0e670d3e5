//! Products of bytes in registers, as fast as 64-bit ARM has them.

use std::arch::aarch64::*;
use std::arch::asm;
use std::hint::black_box;

use super::CHAINS;
use crate::isa::Isa;

/// Operations of so many steps, done with the instructions of `isa`, which must come from [`crate::isa`].
pub(super) fn int8(isa: Isa, steps: usize) -> f64 {
    // SAFETY: `isa::active` names only what the processor has.
    unsafe {
        match isa {
            Isa::NeonI8mm => squares(steps),
            Isa::NeonDot => dots(steps),
            Isa::Neon => pairs(steps),
            _ => super::int8_plain(steps),
        }
    }
}

#[target_feature(enable = "neon")]
fn pairs(steps: usize) -> f64 {
    let mut sums = black_box([vdupq_n_s32(0); CHAINS]);
    let (a, b) = black_box(([vdup_n_s8(3); CHAINS], vdup_n_s8(5)));
    for _ in 0..steps {
        let a = black_box(&a);
        for (sum, a) in sums.iter_mut().zip(a) {
            *sum = vpadalq_s16(*sum, vmull_s8(*a, b));
        }
    }
    black_box(sums);
    (2 * 8 * CHAINS * steps) as f64
}

#[target_feature(enable = "neon,dotprod")]
fn dots(steps: usize) -> f64 {
    let mut sums = black_box([vdupq_n_s32(0); CHAINS]);
    let (a, b) = black_box((vdupq_n_s8(3), vdupq_n_s8(5)));
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: it touches registers only, and the function has its feature.
            unsafe {
                asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) *sum, in(vreg) a, in(vreg) b,
                     options(pure, nomem, nostack, preserves_flags));
            }
        }
    }
    black_box(sums);
    (2 * 16 * CHAINS * steps) as f64
}

#[target_feature(enable = "neon,i8mm")]
fn squares(steps: usize) -> f64 {
    let mut sums = black_box([vdupq_n_s32(0); CHAINS]);
    let (a, b) = black_box((vdupq_n_s8(3), vdupq_n_s8(5)));
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: it touches registers only, and the function has its feature.
            unsafe {
                asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) *sum, in(vreg) a, in(vreg) b,
                     options(pure, nomem, nostack, preserves_flags));
            }
        }
    }
    black_box(sums);
    (2 * 32 * CHAINS * steps) as f64
}
