//! Activations of the whole calibration set at one point of the model, in memory or in a temporary file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis, Slice};

use super::memory::Spill;
use crate::error::Error;

/// Makes the stores of a run.
#[derive(Clone, Copy)]
pub(crate) struct Stores {
    /// Calibration tokens: rows of every store.
    pub(crate) tokens: usize,
    /// What is kept in files.
    pub(crate) spill: Spill,
}

impl Stores {
    /// A store for the residual stream.
    pub(crate) fn residual(self, hidden: usize) -> Result<Activations, Error> {
        Activations::new(self.tokens, hidden, self.spill.residual)
    }

    /// A store for the inputs of a stage.
    pub(crate) fn inputs(self, features: usize) -> Result<Activations, Error> {
        Activations::new(self.tokens, features, self.spill.inputs)
    }
}

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
    /// Room for `rows` rows, in memory or in a temporary file.
    pub(crate) fn new(rows: usize, cols: usize, spill: bool) -> Result<Self, Error> {
        match spill {
            false => Ok(Self::Memory(Array2::zeros((rows, cols)))),
            true => Ok(Self::File { file: tempfile::tempfile().map_err(failed)?, cols }),
        }
    }

    /// Rows `rows`; those in memory are borrowed, others are read into `buffer`.
    pub(crate) fn read<'a>(
        &'a mut self,
        rows: Range<usize>,
        buffer: &'a mut Vec<f32>,
    ) -> Result<ArrayView2<'a, f32>, Error> {
        match self {
            Self::Memory(all) => Ok(all.slice_axis(Axis(0), Slice::from(rows))),
            Self::File { file, cols } => {
                buffer.resize(rows.len() * *cols, 0.0);
                read_floats(file, rows.start * *cols, buffer).map_err(failed)?;
                Ok(ArrayView2::from_shape((rows.len(), *cols), buffer).expect("the buffer has that size"))
            }
        }
    }

    /// Replaces the rows from `start` on.
    pub(crate) fn write(&mut self, start: usize, values: ArrayView2<'_, f32>) -> Result<(), Error> {
        match self {
            Self::Memory(all) => {
                let rows = Slice::from(start..start + values.nrows());
                all.slice_axis_mut(Axis(0), rows).assign(&values);
                Ok(())
            }
            Self::File { file, cols } => write_floats(file, start * *cols, values).map_err(failed),
        }
    }
}

fn failed(source: io::Error) -> Error {
    Error::io(std::env::temp_dir(), source)
}

/// Reads floats from the one with index `start` on.
fn read_floats(file: &mut File, start: usize, out: &mut [f32]) -> io::Result<()> {
    file.seek(SeekFrom::Start(start as u64 * 4))?;
    let mut bytes = vec![0; (out.len() * 4).min(1 << 20)];
    for chunk in out.chunks_mut(1 << 18) {
        let bytes = &mut bytes[..chunk.len() * 4];
        file.read_exact(bytes)?;
        let values = bytes.as_chunks::<4>().0;
        chunk.iter_mut().zip(values).for_each(|(v, b)| *v = f32::from_le_bytes(*b));
    }
    Ok(())
}

/// Writes rows of floats, the first at index `start`.
fn write_floats(file: &mut File, start: usize, rows: ArrayView2<'_, f32>) -> io::Result<()> {
    file.seek(SeekFrom::Start(start as u64 * 4))?;
    let mut bytes = Vec::with_capacity(rows.ncols() * 4);
    for row in rows.rows() {
        bytes.clear();
        bytes.extend(row.iter().flat_map(|v| v.to_le_bytes()));
        file.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_hold_what_memory_holds() {
        let values = Array2::from_shape_fn((7, 5), |(r, c)| (r * 5 + c) as f32 * 0.37);
        for spill in [false, true] {
            let mut store = Activations::new(7, 5, spill).unwrap();
            store.write(4, values.slice_axis(Axis(0), Slice::from(4..))).unwrap();
            store.write(0, values.slice_axis(Axis(0), Slice::from(..4))).unwrap();
            let mut buffer = Vec::new();
            assert_eq!(store.read(2..6, &mut buffer).unwrap(), values.slice_axis(Axis(0), Slice::from(2..6)));
        }
    }
}
