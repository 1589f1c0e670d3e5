//! The table of block types, and whole matrices of them.

use std::ops::RangeInclusive;

use half::f16;
use quant_core::{Codes, Grid, GridKind, Groups, MatrixError, Offset, Params, QuantizedMatrix, codes};
use rayon::prelude::*;

use super::blocks::{self as b, Side};
use crate::gguf::GgmlType;

/// Bytes of blocks that one task decodes.
const TASK_BYTES: usize = 256 << 10;

/// What a block type is in terms of [`QuantizedMatrix`].
pub(super) struct Codec {
    pub(super) ty: GgmlType,
    pub(super) bits: u8,
    /// Columns that share a scale.
    pub(super) group: usize,
    pub(super) grid: GridOf,
    pub(super) form: Form,
    read: fn(&[u8], &mut [u8], &mut Side),
    write: fn(&[u8], &Side, &mut [u8]),
}

/// Values of the codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum GridOf {
    /// Integers around this code.
    Int(i32),
    /// A table.
    Table(GridKind),
}

/// What scales a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Form {
    /// `d * value`.
    Scale,
    /// `d * value + m`.
    ScaleShift,
    /// `(d * sub) * value`, with the possible values of `sub`.
    Super(i8, i8),
    /// `(d * sub) * value - m * min`, with the greatest `sub` and `min`.
    SuperShift(i8),
    /// `2^(e - 127) * value`.
    Exponent,
}

impl GridOf {
    /// The grid itself.
    pub(super) fn grid(self) -> Grid {
        match self {
            GridOf::Int(midpoint) => Grid::Int { midpoint },
            GridOf::Table(kind) => Grid::Table(kind.table().expect("the table is known")),
        }
    }
}

/// Every type that is read and written.
pub(super) static CODECS: [Codec; 13] = {
    use Form::*;
    use GgmlType::*;
    const IQ4: GridOf = GridOf::Table(GridKind::Iq4);
    const fn row(
        ty: GgmlType,
        (bits, group): (u8, usize),
        grid: GridOf,
        form: Form,
        read: fn(&[u8], &mut [u8], &mut Side),
        write: fn(&[u8], &Side, &mut [u8]),
    ) -> Codec {
        Codec { ty, bits, group, grid, form, read, write }
    }
    [
        row(Q4_0, (4, 32), GridOf::Int(8), Scale, b::read_q4_0, b::write_q4_0),
        row(Q4_1, (4, 32), GridOf::Int(0), ScaleShift, b::read_q4_1, b::write_q4_1),
        row(Q5_0, (5, 32), GridOf::Int(16), Scale, b::read_q5_0, b::write_q5_0),
        row(Q5_1, (5, 32), GridOf::Int(0), ScaleShift, b::read_q5_1, b::write_q5_1),
        row(Q8_0, (8, 32), GridOf::Int(128), Scale, b::read_q8_0, b::write_q8_0),
        row(Q2_K, (2, 16), GridOf::Int(0), SuperShift(15), b::read_q2_k, b::write_q2_k),
        row(Q3_K, (3, 16), GridOf::Int(4), Super(-32, 31), b::read_q3_k, b::write_q3_k),
        row(Q4_K, (4, 32), GridOf::Int(0), SuperShift(63), b::read_q4_k, b::write_q4_k),
        row(Q5_K, (5, 32), GridOf::Int(0), SuperShift(63), b::read_q5_k, b::write_q5_k),
        row(Q6_K, (6, 16), GridOf::Int(32), Super(-128, 127), b::read_q6_k, b::write_q6_k),
        row(IQ4_NL, (4, 32), IQ4, Scale, b::read_q4_0, b::write_q4_0),
        row(IQ4_XS, (4, 32), IQ4, Super(-32, 31), b::read_iq4_xs, b::write_iq4_xs),
        row(MXFP4, (4, 32), GridOf::Table(GridKind::E2M1), Exponent, b::read_mxfp4, b::write_mxfp4),
    ]
};

/// The codec of a type.
pub(super) fn codec(ty: GgmlType) -> Option<&'static Codec> {
    CODECS.iter().find(|codec| codec.ty == ty)
}

/// What scales the blocks of a matrix, in the order of the file.
#[derive(Default)]
struct Sides {
    d: Vec<u16>,
    m: Vec<u16>,
    sub: Vec<i8>,
    min: Vec<i8>,
}

impl Sides {
    fn append(&mut self, other: Sides) {
        self.d.extend(other.d);
        self.m.extend(other.m);
        self.sub.extend(other.sub);
        self.min.extend(other.min);
    }
}

impl Codec {
    /// Groups of a block.
    fn per_block(&self) -> usize {
        self.ty.block_len() / self.group
    }

    fn has_shift(&self) -> bool {
        matches!(self.form, Form::ScaleShift | Form::SuperShift(_))
    }

    fn has_sub(&self) -> bool {
        matches!(self.form, Form::Super(..) | Form::SuperShift(_))
    }

    /// The matrix of these blocks. `cols` is a multiple of the block, `bytes` has as many as the shape needs.
    pub(super) fn read(
        &self,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Result<QuantizedMatrix, MatrixError> {
        let mut packed = Codes::zeros(self.bits, rows, cols)?;
        let row_bytes = cols / self.ty.block_len() * self.ty.block_bytes();
        let per_task = (TASK_BYTES / row_bytes.max(1)).max(1);
        let tasks: Vec<_> =
            packed.row_chunks_mut(per_task).zip(bytes.chunks((row_bytes * per_task).max(1))).collect();
        let parts: Vec<Sides> =
            tasks.into_par_iter().map(|(packed, bytes)| self.read_rows(bytes, packed, cols)).collect();
        let mut sides = Sides::default();
        parts.into_iter().for_each(|part| sides.append(part));
        let (scales, offset) = self.params(sides);
        let mut matrix = QuantizedMatrix::affine(packed, Groups::Row { len: self.group }, scales, offset, 0);
        matrix.grid = self.grid.grid();
        Ok(matrix)
    }

    /// Whole rows of blocks to whole rows of packed codes.
    fn read_rows(&self, bytes: &[u8], packed: &mut [u8], cols: usize) -> Sides {
        let (len, size, per) = (self.ty.block_len(), self.ty.block_bytes(), self.per_block());
        let blocks = bytes.len() / size;
        let mut sides = Sides::default();
        sides.d.reserve(blocks);
        let (row_bytes, packed_row) = (cols / len * size, (cols * usize::from(self.bits)).div_ceil(8));
        let mut codes = vec![0; cols];
        let mut side = Side::default();
        for (bytes, packed) in bytes.chunks_exact(row_bytes).zip(packed.chunks_exact_mut(packed_row)) {
            for (block, codes) in bytes.chunks_exact(size).zip(codes.chunks_exact_mut(len)) {
                (self.read)(block, codes, &mut side);
                sides.d.push(side.d);
                if self.has_shift() {
                    sides.m.push(side.m);
                }
                if self.has_sub() {
                    sides.sub.extend_from_slice(&side.sub[..per]);
                    if self.has_shift() {
                        sides.min.extend_from_slice(&side.min[..per]);
                    }
                }
            }
            codes::pack(self.bits, &codes, packed);
        }
        sides
    }

    fn params(&self, sides: Sides) -> (Params, Offset) {
        let halves = |bits: Vec<u16>| bits.into_iter().map(f16::from_bits).collect();
        let per = self.per_block();
        match self.form {
            Form::Scale => (Params::F16(halves(sides.d)), Offset::None),
            Form::ScaleShift => (
                Params::F16(halves(sides.d)),
                Offset::Shift { param: Params::F16(halves(sides.m)), sign: 1.0 },
            ),
            Form::Super(..) => (Params::Super { q: sides.sub, d: halves(sides.d), per }, Offset::None),
            Form::SuperShift(_) => {
                let param = Params::Super { q: sides.min, d: halves(sides.m), per };
                (Params::Super { q: sides.sub, d: halves(sides.d), per }, Offset::Shift { param, sign: -1.0 })
            }
            Form::Exponent => (Params::E8M0(sides.d.into_iter().map(|e| e as u8).collect()), Offset::None),
        }
    }

    /// True if the matrix has exactly the form of this type, so that [`Codec::write`] can store it.
    pub(super) fn fits(&self, matrix: &QuantizedMatrix) -> bool {
        let within = |p: &Params, range: RangeInclusive<i8>| match p {
            Params::Super { q, per, .. } => *per == self.per_block() && q.iter().all(|q| range.contains(q)),
            _ => false,
        };
        let params = match (self.form, &matrix.scales, &matrix.offset) {
            (Form::Scale, Params::F16(_), Offset::None) => true,
            (Form::ScaleShift, Params::F16(_), Offset::Shift { param: Params::F16(_), sign }) => *sign == 1.0,
            (Form::Super(low, high), scales, Offset::None) => within(scales, low..=high),
            (Form::SuperShift(max), scales, Offset::Shift { param, sign }) => {
                *sign == -1.0 && within(scales, 0..=max) && within(param, 0..=max)
            }
            (Form::Exponent, Params::E8M0(_), Offset::None) => true,
            _ => false,
        };
        params
            && matrix.codes.bits() == self.bits
            && matrix.groups == Groups::Row { len: self.group }
            && matrix.grid == self.grid.grid()
            && matrix.cols().is_multiple_of(self.ty.block_len())
            && matrix.input_perm.is_none()
            && matrix.row_scale.is_none()
            && matrix.col_scale.is_none()
            && matrix.outliers.is_none()
    }

    /// The blocks of a matrix that [fits](Codec::fits).
    pub(super) fn write(&self, matrix: &QuantizedMatrix) -> Vec<u8> {
        let (len, size, per) = (self.ty.block_len(), self.ty.block_bytes(), self.per_block());
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let per_row = cols / len;
        let mut out = vec![0; rows * per_row * size];
        let rows = out.par_chunks_mut((per_row * size).max(1)).enumerate();
        rows.for_each_init(
            || vec![0; cols],
            |codes, (r, bytes)| {
                matrix.codes.unpack_row(r, codes);
                let blocks = bytes.chunks_exact_mut(size).zip(codes.chunks_exact(len)).enumerate();
                for (i, (block, codes)) in blocks {
                    let at = r * per_row + i;
                    let mut side = Side::default();
                    (side.d, side.sub) = of_block(&matrix.scales, at, per);
                    if let Offset::Shift { param, .. } = &matrix.offset {
                        (side.m, side.min) = of_block(param, at, per);
                    }
                    (self.write)(codes, &side, block);
                }
            },
        );
        out
    }
}

/// The parameters of block `at`.
fn of_block(params: &Params, at: usize, per: usize) -> (u16, [i8; 16]) {
    let mut sub = [0; 16];
    let d = match params {
        Params::F16(d) => d[at].to_bits(),
        Params::E8M0(e) => e[at].into(),
        Params::Super { q, d, .. } => {
            sub[..per].copy_from_slice(&q[at * per..][..per]);
            d[at].to_bits()
        }
        _ => unreachable!("the form has been checked"),
    };
    (d, sub)
}
