//! Sixteen outputs side by side: the one layout of packed weights, for every instruction set and any number of
//! rows of activations.
//!
//! ```text
//! panel: | group 0: 16 scales | 16 zeros or shifts | codes, step by step | group 1: ... | to a multiple of 64 bytes
//! ```
//!
//! Columns lie in stored order, in which groups are contiguous. [`super::blocks`] says how they are cut,
//! [`super::planes`] how codes lie in a step.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2, Axis};
use quant_core::{Grid, QuantizedMatrix};

use super::act::{Input, Outlier};
use super::blocks::{Block, Blocks};
use super::fill::Packer;
use super::params::Kind;
use super::planes::{self, OUTPUTS};
use crate::dense::Right;
use crate::mem::Bytes;
use crate::simd::{Vector, Work};
use crate::ukr::{Format, Offset, Weights};

/// A quantized matrix by panels.
#[derive(Clone, Debug)]
pub(super) struct Panels {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) format: Format,
    pub(super) blocks: Arc<Blocks>,
    /// Where the parameters and the codes of each block begin in a panel.
    places: Arc<[Place]>,
    bytes: Arc<Bytes>,
    /// Numbers that codes stand for, unless they are integers.
    table: Option<Arc<[f32]>>,
    /// A factor per output, padded to whole panels.
    pub(super) row_scale: Option<Arc<[f32]>>,
    /// A factor per stored column.
    col_scale: Option<Arc<[f32]>>,
    /// Columns that replace the codes, `[outliers, outputs of whole panels]`.
    pub(super) outliers: Arc<[f32]>,
    pub(super) input: Input,
}

/// Where a block begins in a panel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The parameters of its group.
    pub(super) header: usize,
    /// Its codes.
    pub(super) codes: usize,
}

/// The places of all blocks.
fn places(format: &Format, blocks: &Blocks) -> Arc<[Place]> {
    let (mut header, mut at) = (0, 0);
    let place = |block: &Block| {
        if block.first {
            header = at;
            at += format.header_bytes();
        }
        let place = Place { header, codes: at };
        at += block.padded as usize / planes::unit(format.width) * planes::step_bytes(format.width);
        place
    };
    blocks.list().iter().map(place).collect()
}

/// The outliers of a matrix and their weights `[outliers, outputs of whole panels]`; of a feature that is listed
/// twice, the last counts.
fn outliers(matrix: &QuantizedMatrix, feature: impl Fn(usize) -> usize) -> (Arc<[Outlier]>, Arc<[f32]>) {
    let Some(outliers) = &matrix.outliers else { return (Arc::new([]), Arc::new([])) };
    let (rows, cols, listed) = (matrix.rows(), matrix.cols(), outliers.columns.len());
    let mut columns = vec![0; cols];
    (0..cols).for_each(|column| columns[feature(column)] = column as u32);
    let last: Vec<usize> =
        (0..listed).filter(|&i| !outliers.columns[i + 1..].contains(&outliers.columns[i])).collect();
    let list = last.iter().map(|&i| outliers.columns[i]);
    let list = list.map(|feature| Outlier { feature, column: columns[feature as usize] }).collect();

    let padded = rows.next_multiple_of(OUTPUTS);
    let mut weights = vec![0.0; last.len() * padded];
    let mut of_row = vec![0.0; listed];
    for row in 0..rows {
        outliers.values.read_f32(row * listed..(row + 1) * listed, &mut of_row).expect("outliers are floats");
        last.iter().enumerate().for_each(|(to, &i)| weights[to * padded + row] = of_row[i]);
    }
    (list, weights.into())
}

impl Panels {
    /// Packs a valid matrix, or `None` if its groups do not lie along the columns of all rows alike, or are so
    /// short that padding them would waste more than half.
    pub(super) fn pack(matrix: &QuantizedMatrix) -> Option<Panels> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let packer = Packer::new(matrix)?;
        let places = places(&packer.format, &packer.blocks);
        let panel_bytes = packer.format.panel_bytes(&packer.blocks);
        let bytes = Bytes::filled(rows.div_ceil(OUTPUTS), panel_bytes, |panel, bytes| {
            packer.fill(panel, &places, bytes);
        });

        let gather = packer.gather();
        let feature = |column: usize| gather.as_ref().map_or(column, |gather| gather[column] as usize);
        let (outliers, outlier_weights) = outliers(matrix, feature);
        let col_scale: Option<Arc<[f32]>> = matrix
            .col_scale
            .as_ref()
            .map(|scale| (0..cols).map(|column| scale.values[feature(column)]).collect());
        let padded = |scale: &Vec<f32>| {
            let padding = rows.next_multiple_of(OUTPUTS) - rows;
            scale.iter().copied().chain(std::iter::repeat_n(0.0, padding)).collect()
        };
        let Packer { format, blocks, .. } = packer;
        let multiply = col_scale.clone();
        Some(Panels {
            rows,
            cols,
            format,
            places,
            bytes: Arc::new(bytes),
            table: match &matrix.grid {
                Grid::Table(table) => Some(table.clone()),
                Grid::Int { .. } => None,
            },
            row_scale: matrix.row_scale.as_ref().map(padded),
            col_scale,
            outliers: outlier_weights,
            input: Input { cols, blocks: blocks.clone(), gather, multiply, outliers },
            blocks,
        })
    }

    /// Activations in stored order, if that is not the order of the features.
    pub(super) fn gathered(&self, x: ArrayView2<'_, f32>) -> Option<Array2<f32>> {
        let features = self.input.gather.as_ref()?;
        let columns: Vec<usize> = features.iter().map(|&f| f as usize).collect();
        Some(x.select(Axis(1), &columns).as_standard_layout().into_owned())
    }

    pub(super) fn bytes(&self) -> usize {
        let gather = self.input.gather.as_ref().map_or(0, |gather| 4 * gather.len());
        let factors = |factors: &Option<Arc<[f32]>>| factors.as_ref().map_or(0, |factors| 4 * factors.len());
        self.bytes.len()
            + gather
            + factors(&self.table)
            + factors(&self.row_scale)
            + factors(&self.col_scale)
            + 4 * self.outliers.len()
    }

    /// Number of panels.
    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(OUTPUTS)
    }

    /// The bytes of a panel.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let size = self.format.panel_bytes(&self.blocks);
        &self.bytes[panel * size..][..size]
    }

    /// The kernels' name for these weights, if there are kernels.
    pub(super) fn weights(&self) -> Option<Weights> {
        match (&self.table, self.format.table) {
            (Some(_), None) => None,
            (table, _) => Some(Weights { width: self.format.width, table: table.is_some() }),
        }
    }

    /// `out[p * stride + lane] = weight[first + lane, depth[p]]` for `L` outputs of one panel, in stored order.
    #[inline(always)]
    fn decode<const L: usize>(&self, first: usize, depth: Range<usize>, stride: usize, out: &mut [f32]) {
        match self.format.width {
            1 => self.decode_width::<1, L>(first, depth, stride, out),
            2 => self.decode_width::<2, L>(first, depth, stride, out),
            3 => self.decode_width::<3, L>(first, depth, stride, out),
            4 => self.decode_width::<4, L>(first, depth, stride, out),
            5 => self.decode_width::<5, L>(first, depth, stride, out),
            6 => self.decode_width::<6, L>(first, depth, stride, out),
            7 => self.decode_width::<7, L>(first, depth, stride, out),
            _ => self.decode_width::<8, L>(first, depth, stride, out),
        }
    }

    /// [`Panels::decode`] for codes of `WIDTH` bits.
    #[inline(always)]
    fn decode_width<const WIDTH: usize, const L: usize>(
        &self,
        first: usize,
        depth: Range<usize>,
        stride: usize,
        out: &mut [f32],
    ) {
        let (panel, lane) = (self.panel(first / OUTPUTS), first % OUTPUTS);
        let begin =
            self.blocks.list().partition_point(|block| (block.start + block.len) as usize <= depth.start);
        for (block, place) in self.blocks.list().iter().zip(&self.places[..]).skip(begin) {
            let columns = block.start as usize..(block.start + block.len) as usize;
            if columns.start >= depth.end {
                break;
            }
            let here = columns.start.max(depth.start)..columns.end.min(depth.end);
            let meaning = self.meaning::<L>(&panel[place.header..], lane);
            let unit = planes::unit(WIDTH);
            let (first_step, end_step) =
                ((here.start - columns.start) / unit, (here.end - columns.start).div_ceil(unit));
            for s in first_step..end_step {
                let step = &panel[place.codes + s * planes::step_bytes(WIDTH)..][..planes::step_bytes(WIDTH)];
                for field in 0..planes::fields(WIDTH) {
                    let words = planes::read::<WIDTH, L>(step, field, lane);
                    for i in 0..4 {
                        let column = columns.start + s * unit + 4 * field + i;
                        if here.contains(&column) {
                            let at = (column - depth.start) * stride;
                            let out = out[at..].first_chunk_mut::<L>().expect("room for the outputs");
                            self.numbers(&meaning, words, 8 * i as u32, out);
                        }
                    }
                }
            }
        }
        self.finish::<L>(first, depth, stride, out);
    }

    /// The parameters of `L` outputs of a group.
    #[inline(always)]
    fn meaning<const L: usize>(&self, header: &[u8], lane: usize) -> Meaning<L> {
        let at = |kind: Kind, start: usize| kind.read::<L>(&header[start + lane * kind.size()..]);
        let second = OUTPUTS * self.format.scale.size();
        let (mut zero, mut shift) = ([self.format.midpoint as f32; L], None);
        if self.table.is_some() {
            zero = [0.0; L];
        }
        match self.format.offset {
            Offset::None => {}
            Offset::Zero(kind) => zero = at(kind, second),
            Offset::Shift(kind) => shift = Some(at(kind, second)),
        }
        Meaning { scale: at(self.format.scale, 0), zero, shift }
    }

    /// The numbers of one column, whose codes are in a byte of the words: the steps of
    /// [`QuantizedMatrix::dequantize`], one by one.
    #[inline(always)]
    fn numbers<const L: usize>(&self, meaning: &Meaning<L>, words: [u32; L], shift: u32, out: &mut [f32; L]) {
        let mut x = [0.0; L];
        match &self.table {
            None => {
                for (x, word) in x.iter_mut().zip(words) {
                    *x = ((word >> shift) & 0xff) as i32 as f32;
                }
            }
            Some(table) => {
                for (x, word) in x.iter_mut().zip(words) {
                    *x = table[((word >> shift) & 0xff) as usize];
                }
            }
        }
        for (x, (zero, scale)) in x.iter_mut().zip(meaning.zero.iter().zip(&meaning.scale)) {
            *x = (*x - zero) * scale;
        }
        if let Some(shift) = &meaning.shift {
            x.iter_mut().zip(shift).for_each(|(x, shift)| *x += shift);
        }
        *out = x;
    }

    /// Factors of rows and columns, then outliers.
    #[inline(always)]
    fn finish<const L: usize>(&self, first: usize, depth: Range<usize>, stride: usize, out: &mut [f32]) {
        if let Some(scale) = &self.row_scale {
            let scale = scale[first..].first_chunk::<L>().expect("padded");
            for out in out.chunks_mut(stride).take(depth.len()) {
                out.iter_mut().zip(scale).for_each(|(out, scale)| *out *= scale);
            }
        }
        if let Some(factors) = &self.col_scale {
            for (out, factor) in out.chunks_mut(stride).zip(&factors[depth.clone()]) {
                out.iter_mut().take(L).for_each(|out| *out *= factor);
            }
        }
        let padded = self.count() * OUTPUTS;
        for (i, outlier) in self.input.outliers.iter().enumerate() {
            let column = outlier.column as usize;
            if depth.contains(&column) {
                let out = &mut out[(column - depth.start) * stride..][..L];
                out.copy_from_slice(&self.outliers[i * padded + first..][..L]);
            }
        }
    }
}

/// The parameters of `L` outputs of a group.
struct Meaning<const L: usize> {
    scale: [f32; L],
    zero: [f32; L],
    shift: Option<[f32; L]>,
}

impl Right for &Panels {
    const WIDE: bool = true;

    #[inline(always)]
    fn pack<V: Vector>(&self, _: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        let mut at = 0;
        while at < width && j + at < self.rows {
            if (j + at).is_multiple_of(OUTPUTS) && width - at >= OUTPUTS {
                self.decode::<OUTPUTS>(j + at, depth.clone(), width, &mut panel[at..]);
                at += OUTPUTS;
            } else {
                self.decode::<8>(j + at, depth.clone(), width, &mut panel[at..]);
                at += 8;
            }
        }
    }
}

/// Decodes one row, in the order of the input features.
pub(super) struct DecodeRow<'a> {
    pub(super) panels: &'a Panels,
    pub(super) row: usize,
    pub(super) out: &'a mut [f32],
}

impl Work for DecodeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        const COLUMNS: usize = 64;
        let mut columns = [[0.0; OUTPUTS]; COLUMNS];
        for start in (0..self.panels.cols).step_by(COLUMNS) {
            let depth = start..self.panels.cols.min(start + COLUMNS);
            let first = self.row / OUTPUTS * OUTPUTS;
            self.panels.decode::<OUTPUTS>(first, depth.clone(), OUTPUTS, columns.as_flattened_mut());
            for (column, numbers) in depth.zip(&columns) {
                let feature =
                    self.panels.input.gather.as_ref().map_or(column, |gather| gather[column] as usize);
                self.out[feature] = numbers[self.row % OUTPUTS];
            }
        }
    }
}
