//! Micro-kernels: a few rows of int8 activations times a few panels of packed weights.
//!
//! # What a kernel computes
//!
//! Integer arithmetic that every instruction set follows to the bit, for each row `r` and output `n`:
//!
//! ```text
//! acc = start[block, r] + sum over the block's columns of image(code[n, k]) * q[r, k]      (i32, never overflows)
//! out = fma(f32(acc) * scale[n], ascale[block, r], out)                                    blocks ascending
//! out = fma(u[block, r], offset[n], out)                       where the format has offsets, right after the above
//! ```
//!
//! from `out = 0`, where `scale[n]` and `offset[n]` belong to the group of the block:
//!
//! - `image(code)` is the code, or the entry of the format's table of bytes, less the kernel's `center`;
//! - `scale[n]` is the stored scale, times `table.step` (one rounding) where there is a table;
//! - `offset[n]` is `-(scale[n] * zero)` with the stored scale and zero (one rounding), or the stored shift.
//!
//! The caller makes `start = -(midpoint - center) * sum of q` and `u = ascale * f32(sum of q)`. A kernel may
//! take its codes less 128 (`center = 128`): instructions that multiply signed bytes need it for codes of 8 bits
//! and tables.
//!
//! # What a kernel reads
//!
//! A panel is the weights of 16 outputs: for each group its parameters (scales of 16 outputs, then zeros or shifts
//! of 16 outputs, each [`Kind::size`] bytes), then the codes of its blocks step by step as
//! [`crate::packed::planes`] draws them. It is aligned to 64 bytes as a whole; inside, vectors may lie at any multiple
//! of 16 bytes. A block of `padded` columns takes `padded / unit(width)` steps. Activations are dwords of four
//! columns, `[columns / 4, height]`, so field `f` of step `s` meets dwords `(s * fields(width) + f) * height ..`
//! counted from the start of the block.
//!
//! # How to add one
//!
//! Vectors whose lanes are outputs implement `tile::Vector` and get all formats from `tile::tile`. Any other
//! scheme is a function of its own. Either way the file exports a list of [`Kernel`]s made by `table::kernels`, one for
//! each of `table::WEIGHTS` and [`HEIGHTS`], and [`table`] names the list; the tests then hold each of them to
//! [`scalar`].

#[cfg(target_arch = "aarch64")]
mod arm;
pub(crate) mod scalar;
pub(crate) mod table;
#[cfg(test)]
mod tests;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::isa::Isa;
use crate::packed::blocks::Blocks;
use crate::packed::params::Kind;
use crate::packed::planes::{self, OUTPUTS};

/// Rows that a kernel may be asked for. Fewer rows are padded with zeros up to the next height; more make several
/// tiles of the greatest.
pub(crate) const HEIGHTS: [usize; 5] = [1, 2, 4, 8, 12];

/// The most panels that a kernel takes.
pub(crate) const MOST_PANELS: usize = 2;

/// How a panel is stored and what its codes mean.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Format {
    /// Bits of a stored code, 1 to 8.
    pub(crate) width: usize,
    /// Type of the scales.
    pub(crate) scale: Kind,
    /// What else is stored for each group.
    pub(crate) offset: Offset,
    /// Subtracted from the image of every code; at most 256 in magnitude.
    pub(crate) midpoint: i32,
    /// Images of the codes, if they are not the codes themselves. Only with a width of 4.
    pub(crate) table: Option<Table>,
}

/// What is added to the scaled code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offset {
    /// Nothing.
    None,
    /// `-(scale * zero)`.
    Zero(Kind),
    /// A number.
    Shift(Kind),
}

/// A table of 16 numbers in bytes: `number = step * (image - 128)` to within half a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Table {
    /// Numbers as multiples of the step, plus 128.
    pub(crate) image: [u8; 16],
    /// The step.
    pub(crate) step: f32,
}

impl Format {
    /// Bytes of the parameters of a group.
    pub(crate) fn header_bytes(&self) -> usize {
        OUTPUTS * (self.scale.size() + self.offset.kind().map_or(0, Kind::size))
    }

    /// Bytes of a panel.
    pub(crate) fn panel_bytes(&self, blocks: &Blocks) -> usize {
        let codes = blocks.padded() / planes::unit(self.width) * planes::step_bytes(self.width);
        (blocks.groups() * self.header_bytes() + codes).next_multiple_of(planes::VECTOR)
    }
}

impl Offset {
    /// Type of the stored numbers.
    pub(crate) fn kind(self) -> Option<Kind> {
        match self {
            Offset::None => None,
            Offset::Zero(kind) | Offset::Shift(kind) => Some(kind),
        }
    }
}

/// Rows of activations in the order of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    /// `[padded columns / 4, height]`, four columns each, none of them -128.
    pub(crate) codes: &'a [[i8; 4]],
    /// First summand of a block's integers `[blocks, height]`.
    pub(crate) start: &'a [i32],
    /// Scale of a block's activations `[blocks, height]`.
    pub(crate) scale: &'a [f32],
    /// Sum of a block's quantized activations `[blocks, height]`, scaled.
    pub(crate) sum: &'a [f32],
}

/// The operands of a kernel.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    /// The cut of the columns.
    pub(crate) blocks: &'a Blocks,
    /// The format of the panels.
    pub(crate) format: &'a Format,
    /// As many panels as the kernel takes, of [`Format::panel_bytes`] each. The same one may appear twice.
    pub(crate) panels: &'a [&'a [u8]],
    /// Rows of the tile.
    pub(crate) height: usize,
    /// As many rows of activations.
    pub(crate) rows: Rows<'a>,
    /// `[height, 16 * panels]`, overwritten.
    pub(crate) out: &'a mut [f32],
}

impl Call<'_> {
    /// Panics unless all lengths fit `kernel`, so that kernels need not look at them again.
    fn check(&self, kernel: &Kernel) {
        let (height, blocks) = (self.height, self.blocks.list().len());
        assert_eq!(height, kernel.height);
        assert_eq!(
            (self.format.width, self.format.table.is_some()),
            (kernel.weights.width, kernel.weights.table)
        );
        assert_eq!(self.panels.len(), kernel.panels);
        let bytes = self.format.panel_bytes(self.blocks);
        assert!(self.panels.iter().all(|panel| panel.len() == bytes));
        let unit = planes::unit(self.format.width);
        debug_assert!(self.blocks.list().iter().all(|block| (block.padded as usize).is_multiple_of(unit)));
        assert_eq!(self.rows.codes.len(), self.blocks.padded() / 4 * height);
        assert_eq!(self.rows.start.len(), blocks * height);
        assert_eq!(self.rows.scale.len(), blocks * height);
        assert_eq!(self.rows.sum.len(), blocks * height);
        assert_eq!(self.out.len(), height * OUTPUTS * kernel.panels);
    }
}

/// What a kernel multiplies by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Weights {
    /// Bits of a stored code.
    pub(crate) width: usize,
    /// Whether the codes are looked up.
    pub(crate) table: bool,
}

/// A micro-kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    /// Activation, weights, tile and instruction set, as `q8_u4_12x32_avx512vnni`.
    pub(crate) name: &'static str,
    /// The instructions it needs.
    pub(crate) isa: Isa,
    /// What it multiplies by.
    pub(crate) weights: Weights,
    /// Rows of a call.
    pub(crate) height: usize,
    /// Panels of a call.
    pub(crate) panels: usize,
    /// What is subtracted from the images of codes: 0 or 128.
    pub(crate) center: i32,
    /// The function. Its contract: the processor has `isa`, and [`Call::check`] has passed.
    pub(crate) function: unsafe fn(&mut Call<'_>),
}

impl Kernel {
    /// Computes a tile.
    #[inline]
    pub(crate) fn run(&self, mut call: Call<'_>) {
        call.check(self);
        debug_assert!(crate::isa::CpuFeatures::detect().has(self.isa));
        // SAFETY: the lengths are checked above; `table` hands out kernels of supported instruction sets only.
        unsafe { (self.function)(&mut call) }
    }
}
