//! Activations of the whole calibration set at one point of the model, in memory or in a temporary file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use ndarray::{Array2, ArrayView2, Axis, Slice};

/// A matrix `[rows, cols]` of activations that is written and read in ranges of rows.
pub(crate) enum Activations {
    /// In memory.
    Memory(Array2<f32>),
    /// In an unlinked temporary file, for when memory is short.
    File {
        /// Nameless: it vanishes with the process, however that ends.
        file: File,
        /// Columns.
        cols: usize,
    },
}

impl Activations {
    /// Room for `rows` rows, in memory or in a file in the directory `spill`.
    pub(crate) fn new(rows: usize, cols: usize, spill: Option<&Path>) -> io::Result<Self> {
        match spill {
            None => Ok(Self::Memory(Array2::zeros((rows, cols)))),
            Some(dir) => Ok(Self::File { file: tempfile::tempfile_in(dir)?, cols }),
        }
    }

    /// Rows `rows`; those in memory are borrowed, others are read into `buffer`.
    pub(crate) fn read<'a>(
        &'a mut self,
        rows: Range<usize>,
        buffer: &'a mut Vec<f32>,
    ) -> io::Result<ArrayView2<'a, f32>> {
        match self {
            Self::Memory(all) => Ok(all.slice_axis(Axis(0), Slice::from(rows))),
            Self::File { file, cols } => {
                let n = rows.len() * *cols;
                buffer.resize(n, 0.0);
                file.seek(SeekFrom::Start((rows.start * *cols * 4) as u64))?;
                let mut bytes = vec![0; (n * 4).min(1 << 20)];
                for chunk in buffer.chunks_mut(1 << 18) {
                    let bytes = &mut bytes[..chunk.len() * 4];
                    file.read_exact(bytes)?;
                    let values = bytes.as_chunks::<4>().0;
                    chunk.iter_mut().zip(values).for_each(|(v, b)| *v = f32::from_le_bytes(*b));
                }
                Ok(ArrayView2::from_shape((rows.len(), *cols), buffer).expect("the buffer has that size"))
            }
        }
    }

    /// Replaces the rows from `start` on.
    pub(crate) fn write(&mut self, start: usize, values: ArrayView2<'_, f32>) -> io::Result<()> {
        match self {
            Self::Memory(all) => {
                let rows = Slice::from(start..start + values.nrows());
                all.slice_axis_mut(Axis(0), rows).assign(&values);
            }
            Self::File { file, cols } => {
                file.seek(SeekFrom::Start((start * *cols * 4) as u64))?;
                let mut bytes = Vec::with_capacity(*cols * 4);
                for row in values.rows() {
                    bytes.clear();
                    bytes.extend(row.iter().flat_map(|v| v.to_le_bytes()));
                    file.write_all(&bytes)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_hold_what_memory_holds() {
        let dir = tempfile::tempdir().unwrap();
        let values = Array2::from_shape_fn((7, 5), |(r, c)| (r * 5 + c) as f32 * 0.37);
        for spill in [None, Some(dir.path())] {
            let mut store = Activations::new(7, 5, spill).unwrap();
            store.write(4, values.slice_axis(Axis(0), Slice::from(4..))).unwrap();
            store.write(0, values.slice_axis(Axis(0), Slice::from(..4))).unwrap();
            let mut buffer = Vec::new();
            assert_eq!(store.read(2..6, &mut buffer).unwrap(), values.slice_axis(Axis(0), Slice::from(2..6)));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
