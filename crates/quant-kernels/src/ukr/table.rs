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

/// The list of an instruction set: `function::<WIDTH, TABLE, HEIGHT, PANELS, ROWS, COLS>` for all weights and the
/// tiles given as `(height, panels; rows, cols)`, where rows and cols are the part of a tile that the function keeps
/// in registers; `wide` is the center of codes of 8 bits and of tables.
macro_rules! kernels {
    ($isa:expr, $name:literal, $wide:expr, $function:ident, [$(($height:literal, $panels:tt; $rows:literal, $cols:literal)),+ $(,)?]) => {{
        use $crate::ukr::table::kernel;
        const LISTS: &[&[$crate::ukr::Kernel; 9]] = &[$(&[
            kernel!($isa, $name, 0, $function, "u1", 1, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u2", 2, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u3", 3, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u4", 4, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u5", 5, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u6", 6, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, 0, $function, "u7", 7, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, $wide, $function, "u8", 8, false, $height, $panels, $rows, $cols),
            kernel!($isa, $name, $wide, $function, "t4", 4, true, $height, $panels, $rows, $cols),
        ]),+];
        let mut all = [LISTS[0][0]; 9 * LISTS.len()];
        let mut i = 0;
        while i < all.len() {
            all[i] = LISTS[i / 9][i % 9];
            i += 1;
        }
        all
    }};
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
            function: $function::<$width, $table, $height, $panels, $rows, $cols>,
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
