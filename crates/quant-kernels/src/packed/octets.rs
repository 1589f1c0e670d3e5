//! Eight rows side by side: column after column, the codes of eight outputs in as many bytes as a code has bits.
//!
//! ```text
//! octet 0: | column 0: rows 0..8 | column 1: rows 0..8 | ...     codes of 1 to 4 bits take 1 to 4 bytes
//! octet 1: | column 0: rows 8..16 | ...                          per column, wider ones a byte each (8 bytes)
//! ```
//!
//! A column decodes into eight neighbouring numbers of a panel, so no transposition is left for the products, and
//! an octet is one stream of memory. Scales and zero points lie the same way, eight at a time for each group.

use std::ops::Range;

use half::{bf16, f16};
use quant_core::{Grid, Groups, Offset, QuantizedMatrix};
use rayon::prelude::*;

use crate::dense::Right;
use crate::simd::{Vector, Work, widen_f16};

/// A quantized matrix `[rows, cols]` by octets.
#[derive(Clone, Debug)]
pub(super) struct Octets {
    rows: usize,
    cols: usize,
    /// Bytes per column of an octet: 1 to 4, or 8.
    stored: usize,
    /// `[octets, cols, stored]`, columns in the order of the input features.
    codes: Vec<u8>,
    groups: ColumnGroups,
    /// Groups per row.
    count: usize,
    /// `[octets, count]`.
    scale: Lanes,
    meaning: Meaning,
}

/// Group of each column, the same in all rows.
#[derive(Clone, Debug)]
enum ColumnGroups {
    /// Runs of this many columns.
    Runs(usize),
    /// Any map (act-order).
    Map(Vec<u32>),
}

/// What a code stands for before it is scaled.
#[derive(Clone, Debug)]
enum Meaning {
    /// `(code - zero) * scale`.
    Integer { zero: Lanes },
    /// `(table[code] - zero) * scale + shift`.
    Table { table: Vec<f32>, zero: Lanes, shift: Lanes },
}

/// Parameters of eight rows at a time, in the narrowest type that holds all of them exactly.
#[derive(Clone, Debug)]
enum Lanes {
    Same(f32),
    U8(Vec<[u8; 8]>),
    F16(Vec<[f16; 8]>),
    Bf16(Vec<[bf16; 8]>),
    F32(Vec<[f32; 8]>),
}

impl Lanes {
    /// `get(r, g)` for all groups of all rows; rows beyond the last are zero.
    fn collect(rows: usize, count: usize, get: impl Fn(usize, usize) -> f32) -> Lanes {
        let all: Vec<[f32; 8]> = (0..rows.div_ceil(8) * count)
            .map(|i| {
                std::array::from_fn(|lane| match i / count * 8 + lane {
                    row if row < rows => get(row, i % count),
                    _ => 0.0,
                })
            })
            .collect();
        let first = if rows * count == 0 { 0.0 } else { all[0][0] };
        let each = |holds: fn(f32, f32) -> bool| {
            let mut real = all.iter().enumerate().flat_map(|(i, eight)| {
                let rows_here = (rows - i / count * 8).min(8);
                eight[..rows_here].iter()
            });
            real.all(|&x| holds(x, first))
        };
        if each(|x, first| x.to_bits() == first.to_bits()) {
            Lanes::Same(first)
        } else if each(|x, _| f32::from(x as u8).to_bits() == x.to_bits()) {
            Lanes::U8(all.iter().map(|eight| eight.map(|x| x as u8)).collect())
        } else if each(|x, _| f16::from_f32(x).to_f32().to_bits() == x.to_bits()) {
            Lanes::F16(all.iter().map(|eight| eight.map(f16::from_f32)).collect())
        } else if each(|x, _| bf16::from_f32(x).to_f32().to_bits() == x.to_bits()) {
            Lanes::Bf16(all.iter().map(|eight| eight.map(bf16::from_f32)).collect())
        } else {
            Lanes::F32(all)
        }
    }

    #[inline(always)]
    fn get(&self, i: usize) -> [f32; 8] {
        let mut out = [0.0; 8];
        match self {
            Lanes::Same(x) => out = [*x; 8],
            Lanes::U8(all) => out.iter_mut().zip(all[i]).for_each(|(out, x)| *out = f32::from(x)),
            Lanes::F16(all) => out.iter_mut().zip(all[i]).for_each(|(out, x)| *out = widen_f16(x.to_bits())),
            Lanes::Bf16(all) => {
                let wide = |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16);
                out.iter_mut().zip(all[i]).for_each(|(out, x)| *out = wide(x));
            }
            Lanes::F32(all) => out = all[i],
        }
        out
    }

    fn bytes(&self) -> usize {
        match self {
            Lanes::Same(_) => 4,
            Lanes::U8(all) => 8 * all.len(),
            Lanes::F16(all) => 16 * all.len(),
            Lanes::Bf16(all) => 16 * all.len(),
            Lanes::F32(all) => 32 * all.len(),
        }
    }
}

/// Shortest run of columns with parameters of their own that is worth a panel decoder.
const SHORTEST_RUN: usize = 8;

impl Octets {
    /// Packs a valid matrix, or `None` if its groups differ between rows in more than their parameters, or if
    /// more than scale and offset is applied to its elements.
    pub(super) fn pack(matrix: &QuantizedMatrix) -> Option<Octets> {
        if matrix.row_scale.is_some() || matrix.col_scale.is_some() || matrix.outliers.is_some() {
            return None;
        }
        let (rows, cols) = (matrix.rows(), matrix.cols());
        // Columns per group in stored order; with a map of groups, one.
        let run = match &matrix.groups {
            Groups::Tensor => cols,
            Groups::Row { len } | Groups::Tile { cols: len, .. } => *len,
            Groups::Flat { len } if len % cols.max(1) == 0 => cols,
            Groups::Flat { len } if cols.is_multiple_of(*len) => *len,
            Groups::Index { .. } => 1,
            Groups::Flat { .. } | Groups::Strided { .. } => return None,
        };
        let run = run.clamp(1, cols.max(1));
        let count = match &matrix.groups {
            Groups::Index { count, .. } => *count,
            _ => cols.div_ceil(run),
        };
        let group_of = |stored: usize| match &matrix.groups {
            Groups::Index { of_col, .. } => of_col[stored],
            _ => (stored / run) as u32,
        };
        let parameter = |row: usize, group: usize| match &matrix.groups {
            Groups::Index { count, .. } => row * count + group,
            groups => groups.index(row, group * run, cols),
        };

        let inverse = matrix.input_perm.as_ref().map(|perm| perm.inverse());
        let stored_of =
            |feature: usize| inverse.as_ref().map_or(feature, |inverse| inverse[feature] as usize);
        let map: Vec<u32> = (0..cols).map(|feature| group_of(stored_of(feature))).collect();
        let groups = ColumnGroups::of(map);
        if matches!(groups, ColumnGroups::Runs(run) if run < SHORTEST_RUN && run < cols) {
            return None;
        }

        let zero = |row, group| match &matrix.offset {
            Offset::Zero(zeros) => zeros.get(parameter(row, group)),
            Offset::None | Offset::Shift { .. } => 0.0,
        };
        let meaning = match (&matrix.grid, &matrix.offset) {
            (Grid::Int { midpoint }, Offset::None | Offset::Zero(_)) => {
                let midpoint = *midpoint as f32;
                Meaning::Integer { zero: Lanes::collect(rows, count, |r, g| zero(r, g) + midpoint) }
            }
            (grid, offset) => {
                let table = (0..=matrix.codes.max()).map(|code| grid.value(code)).collect();
                let shift = Lanes::collect(rows, count, |r, g| match offset {
                    Offset::Shift { param, sign } => sign * param.get(parameter(r, g)),
                    Offset::None | Offset::Zero(_) => 0.0,
                });
                Meaning::Table { table, zero: Lanes::collect(rows, count, zero), shift }
            }
        };
        let scale = Lanes::collect(rows, count, |r, g| matrix.scales.get(parameter(r, g)));

        let bits = usize::from(matrix.codes.bits());
        let stored = if bits <= 4 { bits } else { 8 };
        let mut codes = vec![0; rows.div_ceil(8) * cols * stored];
        codes.par_chunks_mut((cols * stored).max(1)).enumerate().for_each(|(octet, out)| {
            let mut row = vec![0; cols];
            for lane in 0..8.min(rows - octet * 8) {
                matrix.codes.unpack_row(octet * 8 + lane, &mut row);
                for (feature, out) in out.chunks_exact_mut(stored).enumerate() {
                    set_code(out, lane, row[stored_of(feature)]);
                }
            }
        });
        Some(Octets { rows, cols, stored, codes, groups, count, scale, meaning })
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    pub(super) fn bytes(&self) -> usize {
        let map = match &self.groups {
            ColumnGroups::Runs(_) => 0,
            ColumnGroups::Map(map) => size_of_val(&map[..]),
        };
        let meaning = match &self.meaning {
            Meaning::Integer { zero } => zero.bytes(),
            Meaning::Table { table, zero, shift } => size_of_val(&table[..]) + zero.bytes() + shift.bytes(),
        };
        self.codes.len() + map + self.scale.bytes() + meaning
    }

    /// `out[p * stride + lane] = weight[8 * octet + lane, depth[p]]`.
    #[inline(always)]
    fn decode(&self, octet: usize, depth: Range<usize>, stride: usize, out: &mut [f32]) {
        match self.stored {
            1 => self.decode_bits::<1>(octet, depth, stride, out),
            2 => self.decode_bits::<2>(octet, depth, stride, out),
            3 => self.decode_bits::<3>(octet, depth, stride, out),
            4 => self.decode_bits::<4>(octet, depth, stride, out),
            _ => self.decode_bits::<8>(octet, depth, stride, out),
        }
    }

    #[inline(always)]
    fn decode_bits<const B: usize>(&self, octet: usize, depth: Range<usize>, stride: usize, out: &mut [f32]) {
        let codes = &self.codes[octet * self.cols * B..][..self.cols * B].as_chunks::<B>().0;
        let first = octet * self.count;
        let start = depth.start;
        for (columns, group) in self.groups.runs(depth) {
            let scale = self.scale.get(first + group);
            let out = &mut out[(columns.start - start) * stride..];
            let columns = codes[columns].iter().zip(out.chunks_mut(stride));
            match &self.meaning {
                Meaning::Integer { zero } => {
                    let zero = zero.get(first + group);
                    for (codes, out) in columns {
                        let out = out.first_chunk_mut::<8>().expect("eight lanes");
                        for (i, code) in lanes(codes).into_iter().enumerate() {
                            out[i] = (code as f32 - zero[i]) * scale[i];
                        }
                    }
                }
                Meaning::Table { table, zero, shift } => {
                    let (zero, shift) = (zero.get(first + group), shift.get(first + group));
                    for (codes, out) in columns {
                        let out = out.first_chunk_mut::<8>().expect("eight lanes");
                        for (i, code) in lanes(codes).into_iter().enumerate() {
                            out[i] = (table[code as usize] - zero[i]) * scale[i] + shift[i];
                        }
                    }
                }
            }
        }
    }
}

impl ColumnGroups {
    fn of(map: Vec<u32>) -> ColumnGroups {
        let run = map.iter().position(|&group| group != 0).unwrap_or(map.len()).max(1);
        match map.iter().enumerate().all(|(column, &group)| group as usize == column / run) {
            true => ColumnGroups::Runs(run),
            false => ColumnGroups::Map(map),
        }
    }

    /// The columns `depth` cut where the group changes.
    #[inline(always)]
    fn runs(&self, depth: Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> {
        let mut column = depth.start;
        std::iter::from_fn(move || {
            if column >= depth.end {
                return None;
            }
            let (start, group) = (column, self.group(column));
            column = match self {
                ColumnGroups::Runs(run) => ((group + 1) * run).min(depth.end),
                ColumnGroups::Map(_) => column + 1,
            };
            Some((start..column, group))
        })
    }

    #[inline(always)]
    fn group(&self, column: usize) -> usize {
        match self {
            ColumnGroups::Runs(run) => column / run,
            ColumnGroups::Map(map) => map[column] as usize,
        }
    }
}

/// The eight codes of a column.
#[inline(always)]
fn lanes<const B: usize>(bytes: &[u8; B]) -> [i32; 8] {
    let mut out = [0; 8];
    if B == 8 {
        out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = i32::from(*byte));
    } else {
        let mut word = [0; 4];
        word[..B].copy_from_slice(bytes);
        let word = u32::from_le_bytes(word);
        for (i, out) in out.iter_mut().enumerate() {
            *out = (word >> (i * B) & ((1 << B) - 1)) as i32;
        }
    }
    out
}

/// The inverse of [`lanes`] for one code.
fn set_code(bytes: &mut [u8], lane: usize, code: u8) {
    if bytes.len() == 8 {
        bytes[lane] = code;
        return;
    }
    let at = lane * bytes.len();
    let word = u16::from(code) << (at % 8);
    bytes[at / 8] |= word as u8;
    if word > 0xff {
        bytes[at / 8 + 1] |= (word >> 8) as u8;
    }
}

impl Right for &Octets {
    const WIDE: bool = true;

    #[inline(always)]
    fn pack<V: Vector>(&self, _: V, j: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        for at in (0..width.min(self.rows - j)).step_by(8) {
            self.decode((j + at) / 8, depth.clone(), width, &mut panel[at..]);
        }
    }
}

/// Decodes one row.
pub(super) struct DecodeRow<'a> {
    pub(super) octets: &'a Octets,
    pub(super) row: usize,
    pub(super) out: &'a mut [f32],
}

impl Work for DecodeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        const COLUMNS: usize = 64;
        let mut eight = [[0.0; 8]; COLUMNS];
        for (i, out) in self.out.chunks_mut(COLUMNS).enumerate() {
            let depth = i * COLUMNS..i * COLUMNS + out.len();
            self.octets.decode(self.row / 8, depth, 8, eight.as_flattened_mut());
            for (out, eight) in out.iter_mut().zip(&eight) {
                *out = eight[self.row % 8];
            }
        }
    }
}
