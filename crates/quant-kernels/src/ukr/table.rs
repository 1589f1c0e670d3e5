//! All kernels, and which of them serves a product.

use super::{Kernel, Weights, scalar};
use crate::isa::{self, Isa};

/// Every kind of weights that kernels exist for.
#[cfg(test)]
pub(crate) const WEIGHTS: [Weights; 9] = [
    Weights { width: 1, table: false },
    Weights { width: 2, table: false },
    Weights { width: 3, table: false },
    Weights { width: 4, table: false },
    Weights { width: 5, table: false },
    Weights { width: 6, table: false },
    Weights { width: 7, table: false },
    Weights { width: 8, table: false },
    Weights { width: 4, table: true },
];

/// The lists of all instruction sets of this architecture.
const LISTS: &[&[Kernel]] = &[
    &scalar::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &super::x86::AVX2,
    #[cfg(target_arch = "x86_64")]
    &super::x86::AVX_VNNI,
    #[cfg(target_arch = "x86_64")]
    &super::x86::AVX512,
    #[cfg(target_arch = "x86_64")]
    &super::x86::AVX512_VNNI,
    #[cfg(target_arch = "aarch64")]
    &super::arm::NEON,
    #[cfg(target_arch = "aarch64")]
    &super::arm::NEON_DOT,
    #[cfg(target_arch = "aarch64")]
    &super::arm::NEON_I8MM,
];

/// The kernels that this processor can run.
pub(crate) fn supported() -> impl Iterator<Item = &'static Kernel> {
    LISTS.iter().copied().flatten().filter(|kernel| isa::CpuFeatures::detect().has(kernel.isa))
}

/// The kernel for tiles of `height` rows under the cap `isa`: the one of the greatest instruction set.
pub(crate) fn select(isa: Isa, weights: Weights, height: usize) -> &'static Kernel {
    supported()
        .filter(|kernel| kernel.weights == weights && kernel.height == height)
        .filter(|kernel| kernel.isa <= isa)
        .max_by_key(|kernel| kernel.isa)
        .expect("scalar kernels exist for all weights and heights")
}

/// The list of an instruction set: `function::<WIDTH, TABLE, PANELS, ROWS, COLS>` for all weights and the tiles given
/// as `(height, panels; rows, cols)`, where rows and cols are the part of a tile that the function keeps in
/// registers. The second list of tiles is for widths that are rare, so that they share code; `wide` is the center
/// of codes of 8 bits and of tables.
macro_rules! kernels {
    ($isa:expr, $name:literal, $wide:expr, $function:ident,
     [$(($height:literal, $panels:tt; $rows:literal, $cols:literal)),+ $(,)?],
     [$(($rare_height:literal, $rare_panels:tt; $rare_rows:literal, $rare_cols:literal)),+ $(,)?]) => {{
        use $crate::ukr::table::kernel;
        const USUAL: &[[$crate::ukr::Kernel; 5]] = &[$([
            kernel!($isa, $name, 0, $function, "u2", 2, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u3", 3, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u4", 4, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, $wide, $function, "u8", 8, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, $wide, $function, "t4", 4, true, $height, $panels, $rows, $cols),
        ]),+];
        const RARE: &[[$crate::ukr::Kernel; 4]] = &[$([
            kernel!($isa, $name, 0, $function, "u1", 1, false, $rare_height, $rare_panels, $rare_rows, $rare_cols),
            kernel!($isa, $name, 0, $function, "u5", 5, false, $rare_height, $rare_panels, $rare_rows, $rare_cols),
            kernel!($isa, $name, 0, $function, "u6", 6, false, $rare_height, $rare_panels, $rare_rows, $rare_cols),
            kernel!($isa, $name, 0, $function, "u7", 7, false, $rare_height, $rare_panels, $rare_rows, $rare_cols),
        ]),+];
        $crate::ukr::table::joined(USUAL, RARE)
    }};
}

/// Two lists one after the other.
pub(super) const fn joined<const N: usize>(usual: &[[Kernel; 5]], rare: &[[Kernel; 4]]) -> [Kernel; N] {
    let (usual, rare) = (usual.as_flattened(), rare.as_flattened());
    assert!(usual.len() + rare.len() == N);
    let mut all = [usual[0]; N];
    let mut i = 0;
    while i < N {
        all[i] = if i < usual.len() { usual[i] } else { rare[i - usual.len()] };
        i += 1;
    }
    all
}

/// One entry of [`kernels`].
macro_rules! kernel {
    ($isa:expr, $name:literal, $center:expr, $function:ident, $weights:literal, $width:literal, $table:literal,
     $height:literal, $panels:tt, $rows:literal, $cols:literal) => {
        $crate::ukr::Kernel {
            name: concat!(
                "q8_",
                $weights,
                "_",
                $height,
                "x",
                $crate::ukr::table::columns!($panels),
                "_",
                $name
            ),
            isa: $isa,
            weights: $crate::ukr::Weights { width: $width, table: $table },
            height: $height,
            panels: $panels,
            center: $center,
            function: $function::<$width, $table, $panels, $rows, $cols>,
        }
    };
}

/// Columns of so many panels.
macro_rules! columns {
    (1) => {
        16
    };
    (2) => {
        32
    };
}

pub(crate) use {columns, kernel, kernels};
