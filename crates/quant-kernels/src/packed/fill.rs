//! From a quantized matrix to the bytes of its panels.

use std::sync::Arc;

use quant_core::{Grid, Groups, Offset as Added, Params, QuantizedMatrix};

use super::blocks::{Blocks, LONGEST};
use super::panels::Place;
use super::params::Kind;
use super::planes::{self, OUTPUTS};
use crate::ukr::{Format, Offset, Table};

/// The greatest midpoint that kernels take.
const MIDPOINT: i32 = 256;

/// Writes the panels of a matrix.
pub(super) struct Packer<'a> {
    matrix: &'a QuantizedMatrix,
    groups: ColumnGroups,
    pub(super) format: Format,
    pub(super) blocks: Arc<Blocks>,
}

/// The groups of a matrix that are the same columns in all rows.
struct ColumnGroups {
    /// Column of the codes for each column of a panel, unless it is the same.
    order: Option<Vec<u32>>,
    list: Vec<Group>,
}

struct Group {
    /// Its first column or, with an index of groups, its number there.
    id: usize,
    /// Its columns.
    len: usize,
}

impl ColumnGroups {
    /// `None` if the groups differ between rows in more than their parameters.
    fn of(matrix: &QuantizedMatrix) -> Option<ColumnGroups> {
        let cols = matrix.cols();
        let run = match &matrix.groups {
            Groups::Tensor => cols,
            Groups::Row { len } | Groups::Tile { cols: len, .. } => *len,
            Groups::Flat { len } if len.is_multiple_of(cols.max(1)) => cols,
            Groups::Flat { len } if cols.is_multiple_of(*len) => *len,
            Groups::Index { of_col, count } => return Some(ColumnGroups::sorted(of_col, *count)),
            Groups::Flat { .. } | Groups::Strided { .. } => return None,
        };
        let list = (0..cols).step_by(run.max(1)).map(|id| Group { id, len: run.min(cols - id) }).collect();
        Some(ColumnGroups { order: None, list })
    }

    /// Columns sorted by their group.
    fn sorted(of_col: &[u32], count: usize) -> ColumnGroups {
        let mut order: Vec<u32> = (0..of_col.len() as u32).collect();
        order.sort_by_key(|&column| of_col[column as usize]);
        let mut list: Vec<Group> = (0..count).map(|id| Group { id, len: 0 }).collect();
        of_col.iter().for_each(|&group| list[group as usize].len += 1);
        list.retain(|group| group.len > 0);
        ColumnGroups { order: (!order.is_sorted()).then_some(order), list }
    }
}

impl Group {
    /// Index of its parameters in a row.
    #[inline]
    fn index(&self, matrix: &QuantizedMatrix, row: usize) -> usize {
        match &matrix.groups {
            Groups::Index { count, .. } => row * count + self.id,
            groups => groups.index(row, self.id, matrix.cols()),
        }
    }
}

impl<'a> Packer<'a> {
    /// `None` if panels do not suit the matrix.
    pub(super) fn new(matrix: &'a QuantizedMatrix) -> Option<Packer<'a>> {
        if matrix.col_scale.as_ref().is_some_and(|scale| scale.rows_per_block < matrix.rows()) {
            return None;
        }
        let groups = ColumnGroups::of(matrix)?;
        let lengths: Vec<usize> = groups.list.iter().map(|group| group.len).collect();
        let bits = usize::from(matrix.codes.bits());
        let widths = match matrix.grid {
            Grid::Table(_) if bits <= 4 => 4..=4,
            _ => bits..=8,
        };
        let cut = |width| Some((width, Blocks::new(&lengths, planes::unit(width))?));
        let (width, blocks) = widths.filter_map(cut).min_by_key(|(width, blocks)| blocks.padded() * width)?;
        let cols = matrix.cols();
        if blocks.padded() > cols + cols / 2 + planes::unit(width) {
            return None;
        }
        let format = format(matrix, &groups, width)?;
        Some(Packer { matrix, groups, format, blocks: Arc::new(blocks) })
    }

    /// Input feature of each column of a panel, unless it is the same.
    pub(super) fn gather(&self) -> Option<Arc<[u32]>> {
        let features = self.matrix.input_perm.as_ref().map(|perm| perm.features());
        match (&self.groups.order, features) {
            (None, features) => features.map(Arc::from),
            (Some(order), None) => Some(order[..].into()),
            (Some(order), Some(features)) => Some(order.iter().map(|&c| features[c as usize]).collect()),
        }
    }

    /// Writes a panel over zeros.
    pub(super) fn fill(&self, panel: usize, places: &[Place], bytes: &mut [u8]) {
        let rows = panel * OUTPUTS..self.matrix.rows().min((panel + 1) * OUTPUTS);
        let cols = self.matrix.cols();
        let mut codes = vec![0; cols];
        let mut ordered = vec![0; if self.groups.order.is_some() { cols } else { 0 }];
        for (output, row) in rows.clone().enumerate() {
            self.matrix.codes.unpack_row(row, &mut codes);
            let codes = match &self.groups.order {
                None => &codes,
                Some(order) => {
                    ordered.iter_mut().zip(order).for_each(|(to, &c)| *to = codes[c as usize]);
                    &ordered
                }
            };
            match self.format.width {
                1 => self.fill_codes::<1>(output, codes, places, bytes),
                2 => self.fill_codes::<2>(output, codes, places, bytes),
                3 => self.fill_codes::<3>(output, codes, places, bytes),
                4 => self.fill_codes::<4>(output, codes, places, bytes),
                5 => self.fill_codes::<5>(output, codes, places, bytes),
                6 => self.fill_codes::<6>(output, codes, places, bytes),
                7 => self.fill_codes::<7>(output, codes, places, bytes),
                _ => self.fill_codes::<8>(output, codes, places, bytes),
            }
        }
        let headers = self.blocks.list().iter().zip(places).filter(|(block, _)| block.first);
        for (group, (_, place)) in self.groups.list.iter().zip(headers) {
            let header = &mut bytes[place.header..][..self.format.header_bytes()];
            for (output, row) in rows.clone().enumerate() {
                self.fill_parameters(output, group.index(self.matrix, row), header);
            }
        }
    }

    fn fill_codes<const WIDTH: usize>(
        &self,
        output: usize,
        codes: &[u8],
        places: &[Place],
        bytes: &mut [u8],
    ) {
        let mut padded = [0; LONGEST];
        for (block, place) in self.blocks.list().iter().zip(places) {
            let (start, len) = (block.start as usize, block.len as usize);
            padded[..len].copy_from_slice(&codes[start..start + len]);
            padded[len..].fill(0);
            let steps = bytes[place.codes..].chunks_exact_mut(planes::step_bytes(WIDTH));
            let codes = padded[..block.padded as usize].chunks_exact(planes::unit(WIDTH));
            for (step, codes) in steps.zip(codes) {
                planes::write::<WIDTH>(codes, output, step);
            }
        }
    }

    fn fill_parameters(&self, output: usize, index: usize, header: &mut [u8]) {
        let mut put = |start: usize, kind: Kind, x: f32| {
            kind.write(x, &mut header[start + output * kind.size()..][..kind.size()]);
        };
        put(0, self.format.scale, self.matrix.scales.get(index));
        if let Some(kind) = self.format.offset.kind() {
            put(OUTPUTS * self.format.scale.size(), kind, offset(self.matrix, index));
        }
    }
}

/// What is stored beside the scale of a group.
#[inline]
fn offset(matrix: &QuantizedMatrix, index: usize) -> f32 {
    let midpoint = match matrix.grid {
        Grid::Int { midpoint } => Some(midpoint as f32),
        Grid::Table(_) => None,
    };
    match (&matrix.offset, midpoint) {
        (Added::Shift { param, sign }, _) => sign * param.get(index),
        (Added::Zero(zeros), Some(midpoint)) => zeros.get(index) + midpoint,
        (Added::Zero(zeros), None) => zeros.get(index),
        (Added::None, midpoint) => midpoint.unwrap_or(0.0),
    }
}

/// The format of a matrix, or `None` if its numbers need more than the formats offer.
fn format(matrix: &QuantizedMatrix, groups: &ColumnGroups, width: usize) -> Option<Format> {
    let rows = matrix.rows();
    let indices = || (0..rows).flat_map(|row| groups.list.iter().map(move |group| group.index(matrix, row)));
    let scale = match &matrix.scales {
        // Known without a look at each.
        Params::F16(_) => Kind::F16,
        Params::BF16(_) => Kind::Bf16,
        scales => Kind::narrowest(indices().map(|i| scales.get(i))),
    };
    let offsets = || indices().map(|i| offset(matrix, i));
    let usual = |midpoint: f32| midpoint == midpoint.trunc() && midpoint.abs() <= MIDPOINT as f32;

    let (offset, midpoint) = match (&matrix.offset, &matrix.grid) {
        (Added::Shift { .. }, Grid::Int { midpoint }) if midpoint.abs() > MIDPOINT => return None,
        (Added::Shift { .. }, Grid::Int { midpoint }) => {
            (Offset::Shift(Kind::narrowest(offsets())), *midpoint)
        }
        (Added::Shift { .. }, Grid::Table(_)) => (Offset::Shift(Kind::narrowest(offsets())), 0),
        (Added::None, Grid::Table(_)) => (Offset::None, 0),
        (Added::Zero(_), Grid::Table(_)) => (Offset::Zero(Kind::narrowest(offsets())), 0),
        // One zero for all, as symmetric layouts have, is the midpoint.
        (Added::None | Added::Zero(_), Grid::Int { .. }) => match offsets().next().unwrap_or(0.0) {
            first if usual(first) && offsets().all(|zero| zero == first) => (Offset::None, first as i32),
            _ => (Offset::Zero(Kind::narrowest(offsets())), 0),
        },
    };
    Some(match &matrix.grid {
        Grid::Int { .. } => Format { width, scale, offset, midpoint, table: None },
        Grid::Table(table) => Format { width, scale, offset, midpoint: 128, table: in_bytes(table) },
    })
}

/// A table of at most 16 finite numbers as multiples of a step: exactly if a power of two is such a step, otherwise
/// with the greatest magnitude as 127, off by up to half a step each.
fn in_bytes(table: &[f32]) -> Option<Table> {
    if table.len() > 16 || table.iter().any(|x| !x.is_finite()) {
        return None;
    }
    let max = table.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if max == 0.0 {
        return Some(Table { image: [128; 16], step: 1.0 });
    }
    let whole = |step: f32| table.iter().all(|x| (x / step).trunc() == x / step && (x / step).abs() <= 127.0);
    let step = (-12..=12).map(|e| 2f32.powi(e)).rev().find(|&step| whole(step)).unwrap_or(max / 127.0);
    let mut image = [128; 16];
    for (image, x) in image.iter_mut().zip(table) {
        *image = ((x / step).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
    }
    Some(Table { image, step })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_multiples_are_exact_in_bytes() {
        let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
        let table = in_bytes(&e2m1).unwrap();
        assert_eq!(table.step, 0.5);
        assert!(table.image.iter().zip(e2m1).all(|(&i, x)| (f32::from(i) - 128.0) * table.step == x));
        let table = in_bytes(&[-1.0, 0.3, 1.0]).unwrap();
        assert_eq!((table.step, &table.image[..4]), (1.0 / 127.0, &[1, 166, 255, 128][..]));
        assert_eq!(in_bytes(&[f32::NAN, 0.0]), None);
        assert_eq!(in_bytes(&[0.0; 17]), None);
    }
}
