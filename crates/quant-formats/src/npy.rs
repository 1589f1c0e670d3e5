//! NumPy files: token ids in, vectors out.

use std::path::Path;

use ndarray::{Array2, ShapeBuilder};

use crate::error::{FormatError, NpyError};
use crate::file;

/// Largest file of ids that is read.
const NPY_LIMIT: u64 = 8 << 30;

/// Headers of real files have 128 bytes.
const HEADER_LIMIT: usize = 1 << 16;

/// Reads token ids `[samples, length]` from an `.npy` file of integers. One dimension is one sample.
pub fn read_npy_ids(path: &Path) -> Result<Array2<u32>, FormatError> {
    let bytes = file::read_limited(path, NPY_LIMIT)?;
    parse(&bytes).map_err(|source| FormatError::Npy { file: path.to_path_buf(), source })
}

/// A file of f32 values `[rows, cols]` in row-major order.
///
/// ```
/// let file = quant_formats::npy_f32([1, 2], &[0.5, -1.0]);
/// assert!(file.starts_with(b"\x93NUMPY") && file.len() == 128 + 8);
/// ```
pub fn npy_f32(shape: [usize; 2], values: &[f32]) -> Vec<u8> {
    let [rows, cols] = shape;
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    // Magic, version and length take ten bytes; data begins at a multiple of 64.
    let len = (10 + header.len() + 1).next_multiple_of(64).max(128) - 10;
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((len as u16).to_le_bytes());
    file.extend(format!("{header:<width$}\n", width = len - 1).into_bytes());
    file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    file
}

/// What a header says of the data.
#[derive(Debug, PartialEq)]
struct Layout {
    width: usize,
    signed: bool,
    big_endian: bool,
    fortran: bool,
    shape: Vec<usize>,
}

fn parse(bytes: &[u8]) -> Result<Array2<u32>, NpyError> {
    let rest = bytes.strip_prefix(b"\x93NUMPY").ok_or(NpyError::Magic)?;
    let (start, len): (usize, usize) = match *rest {
        [1, _, a, b, ..] => (4, usize::from(u16::from_le_bytes([a, b]))),
        [2 | 3, _, a, b, c, d, ..] => (6, u32::from_le_bytes([a, b, c, d]) as usize),
        _ => return Err(NpyError::Magic),
    };
    let header = rest.get(start..start.saturating_add(len)).filter(|h| h.len() <= HEADER_LIMIT);
    let header = header.ok_or(NpyError::Header("its length is impossible"))?;
    let text = str::from_utf8(header).map_err(|_| NpyError::Header("it is not text"))?;
    let layout = Layout::parse(text)?;
    layout.decode(&rest[start + len..])
}

impl Layout {
    /// Parses the Python dictionary `{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }`.
    fn parse(text: &str) -> Result<Self, NpyError> {
        let value = |key: &str| {
            let missing = NpyError::Header("descr, fortran_order or shape is missing");
            let at = text.find(&format!("'{key}'")).ok_or(missing)?;
            let after = &text[at + key.len() + 2..];
            after
                .trim_start()
                .strip_prefix(':')
                .map(str::trim_start)
                .ok_or(NpyError::Header("a colon is missing"))
        };
        let descr = value("descr")?.strip_prefix('\'').and_then(|t| t.split_once('\''));
        let (descr, _) = descr.ok_or(NpyError::Header("descr is not a plain type"))?;
        let (big_endian, signed, width) = match descr {
            "|i1" => (false, true, 1),
            "|u1" => (false, false, 1),
            _ => {
                let dtype = || NpyError::DType(descr.to_owned());
                let (order, rest) = descr.split_at_checked(1).ok_or_else(dtype)?;
                let big_endian = match order {
                    "<" => false,
                    ">" => true,
                    _ => return Err(dtype()),
                };
                match rest {
                    "i2" | "i4" | "i8" => (big_endian, true, usize::from(rest.as_bytes()[1] - b'0')),
                    "u2" | "u4" | "u8" => (big_endian, false, usize::from(rest.as_bytes()[1] - b'0')),
                    _ => return Err(dtype()),
                }
            }
        };
        let order = value("fortran_order")?;
        let fortran = order.starts_with("True");
        if !fortran && !order.starts_with("False") {
            return Err(NpyError::Header("fortran_order is neither True nor False"));
        }
        let shape = value("shape")?.strip_prefix('(').and_then(|t| t.split_once(')'));
        let (shape, _) = shape.ok_or(NpyError::Header("shape is not a tuple"))?;
        let dims = shape.split(',').map(str::trim).filter(|d| !d.is_empty()).map(str::parse);
        let shape = dims.collect::<Result<Vec<usize>, _>>();
        let shape = shape.map_err(|_| NpyError::Header("a dimension is not a number"))?;
        Ok(Self { width, signed, big_endian, fortran, shape })
    }

    fn decode(&self, data: &[u8]) -> Result<Array2<u32>, NpyError> {
        let (rows, cols) = match self.shape[..] {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => return Err(NpyError::Rank(self.shape.len())),
        };
        let size = || NpyError::Size { shape: self.shape.clone(), found: data.len() };
        let expected = rows.checked_mul(cols).and_then(|n| n.checked_mul(self.width));
        if expected != Some(data.len()) {
            return Err(size());
        }
        let mut ids = Vec::with_capacity(rows * cols);
        for (i, element) in data.chunks_exact(self.width).enumerate() {
            let found = self.integer(element);
            let (row, col) = if self.fortran { (i % rows, i / rows) } else { (i / cols, i % cols) };
            ids.push(u32::try_from(found).map_err(|_| NpyError::Id { row, col, found })?);
        }
        let shape = (rows, cols).set_f(self.fortran);
        Array2::from_shape_vec(shape, ids).map_err(|_| size())
    }

    fn integer(&self, element: &[u8]) -> i128 {
        let byte = |i: usize| if self.big_endian { element[i] } else { element[self.width - 1 - i] };
        let value = (0..self.width).fold(0u64, |value, i| value << 8 | u64::from(byte(i)));
        let unused = 64 - 8 * self.width as u32;
        if self.signed { i128::from((value << unused) as i64 >> unused) } else { i128::from(value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn npy(descr: &str, order: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
        while (header.len() + 11) % 64 != 0 {
            header.push(' ');
        }
        header.push('\n');
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn integers_of_every_width_and_order() {
        let i4: Vec<u8> = (0..6i32).flat_map(i32::to_le_bytes).collect();
        let ids = parse(&npy("<i4", "False", "(2, 3)", &i4)).unwrap();
        assert_eq!(ids, ndarray::array![[0, 1, 2], [3, 4, 5]]);
        let ids = parse(&npy("<i4", "True", "(2, 3)", &i4)).unwrap();
        assert_eq!(ids, ndarray::array![[0, 2, 4], [1, 3, 5]]);
        let i8: Vec<u8> = (7..9i64).flat_map(i64::to_be_bytes).collect();
        assert_eq!(parse(&npy(">i8", "False", "(2,)", &i8)).unwrap(), ndarray::array![[7, 8]]);
        assert_eq!(parse(&npy("|u1", "False", "(0, 4)", &[])).unwrap().dim(), (0, 4));
    }

    #[test]
    fn what_is_no_id_is_refused() {
        let minus: Vec<u8> = [1i64, -2].iter().flat_map(|v| v.to_le_bytes()).collect();
        let error = parse(&npy("<i8", "False", "(1, 2)", &minus)).unwrap_err();
        assert_eq!(error, NpyError::Id { row: 0, col: 1, found: -2 });
        for (descr, shape) in [("<f4", "(1,)"), ("<i4", "(1, 1, 1)"), ("<i4", "(9, 9)"), ("|O", "(1,)")] {
            assert!(parse(&npy(descr, "False", shape, &[0; 4])).is_err(), "{descr} {shape}");
        }
        let huge = format!("({}, {})", usize::MAX, usize::MAX);
        assert!(matches!(parse(&npy("<i8", "False", &huge, &[])), Err(NpyError::Size { .. })));
        assert_eq!(parse(b"PK"), Err(NpyError::Magic));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damage_never_panics(at in 0usize..140, with in any::<u8>(), cut in 0usize..160) {
            let mut bytes = npy("<i4", "False", "(2, 3)", &[0; 24]);
            let at = at % bytes.len();
            bytes[at] = with;
            bytes.truncate(bytes.len() - cut.min(bytes.len()));
            let _ = parse(&bytes);
        }
    }
}
