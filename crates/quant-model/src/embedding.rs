//! From tokens to the residual stream.

use std::sync::Arc;

use ndarray::Array2;
use quant_core::{LinearWeights, WeightError, WeightSource};
use quant_kernels::PackedMatrix;

use crate::arch::{ArchSpec, NormPlace, PositionSpec};
use crate::block::load_norm;
use crate::error::ModelError;
use crate::linear::{DenseLinear, DenseMatrix, Linear, PackedLinear, pack};
use crate::norm::Norm;

/// Embedding of tokens, with what the architecture adds to it: token types, positions, a norm.
#[derive(Clone, Debug)]
pub struct Embedding {
    hidden: usize,
    tokens: Table,
    /// The vector of the first token type.
    token_type: Option<Vec<f32>>,
    positions: Option<DenseMatrix>,
    norm: Option<Norm>,
}

/// A vector per token, in floats or in codes.
#[derive(Clone, Debug)]
pub(crate) enum Table {
    Dense(Arc<DenseMatrix>),
    Packed(Arc<PackedMatrix>),
}

impl Table {
    /// The table at `path`, `[rows, hidden]`.
    fn load(path: &str, shape: (usize, usize), src: &dyn WeightSource) -> Result<Self, ModelError> {
        let found = src.linear_shape(path)?;
        if found != shape {
            return Err(ModelError::Weight(WeightError::Shape {
                name: format!("{path}.weight"),
                expected: vec![shape.0, shape.1],
                found: vec![found.0, found.1],
                because: "vocab_size and hidden_size".to_owned(),
            }));
        }
        Ok(match src.linear(path)? {
            LinearWeights::Dense { weight, .. } => {
                Table::Dense(Arc::new(DenseMatrix::new(&format!("{path}.weight"), &weight, false)?))
            }
            LinearWeights::Quantized(layer) => Table::Packed(Arc::new(pack(path, layer.weight)?)),
        })
    }

    fn rows(&self) -> usize {
        match self {
            Table::Dense(table) => table.dim().0,
            Table::Packed(table) => table.shape().0,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Table::Dense(table) => table.bytes(),
            Table::Packed(table) => table.bytes(),
        }
    }

    /// Row `r`, `out`: `[hidden]`.
    fn read_row(&self, r: usize, out: &mut [f32]) -> Result<(), ModelError> {
        match self {
            Table::Dense(table) => table.read_row(r, out),
            Table::Packed(table) => table.dequantize_row(r, out)?,
        }
        Ok(())
    }

    /// The linear layer of a tied head, in the same memory.
    pub(crate) fn linear(&self) -> Box<dyn Linear> {
        match self {
            Table::Dense(table) => Box::new(DenseLinear::new(table.clone(), None)),
            Table::Packed(table) => Box::new(PackedLinear::shared(table.clone())),
        }
    }
}

impl Embedding {
    /// Reads the tables of a checkpoint and checks their shapes.
    pub fn load(spec: &ArchSpec, src: &dyn WeightSource) -> Result<Self, ModelError> {
        let hidden = spec.hidden_size;
        let table = |module: &str, rows: usize, because: &str| -> Result<DenseMatrix, ModelError> {
            let name = format!("{}.weight", spec.module_path(module, src));
            let tensor = src.tensor(&name)?;
            if tensor.shape() != [rows, hidden] {
                let (expected, found) = (vec![rows, hidden], tensor.shape().to_vec());
                let because = because.to_owned();
                return Err(WeightError::Shape { name, expected, found, because }.into());
            }
            Ok(DenseMatrix::new(&name, &tensor, false)?)
        };
        let names = &spec.names;
        let positions = match spec.positions {
            PositionSpec::Learned => {
                let because =
                    "the number of positions (n_positions, max_position_embeddings) and hidden size";
                Some(table(names.positions, spec.max_positions, because)?)
            }
            PositionSpec::Rope(_) => None,
        };
        let token_type = match spec.token_types {
            0 => None,
            types => {
                let table = table(names.token_types, types, "type_vocab_size and hidden_size")?;
                let mut first = vec![0.0; hidden];
                table.read_row(0, &mut first);
                Some(first)
            }
        };
        let norm = match spec.norm.place {
            NormPlace::After => {
                let path = spec.module_path(names.embedding_norm, src);
                Some(load_norm(spec, &path, hidden, spec.norm.kind, src)?)
            }
            NormPlace::Before => None,
        };
        let path = spec.module_path(names.embedding, src);
        let tokens = Table::load(&path, (spec.vocab_size, hidden), src)?;
        Ok(Self { hidden, tokens, token_type, positions, norm })
    }

    /// Residual stream `[ids, hidden]` of tokens at the positions from `start` on.
    pub fn embed(&self, ids: &[u32], start: usize) -> Result<Array2<f32>, ModelError> {
        let (vocab, hidden) = (self.tokens.rows(), self.hidden);
        let mut x = Array2::zeros((ids.len(), hidden));
        let mut position = vec![0.0; hidden];
        let add = |row: &mut [f32], other: &[f32]| row.iter_mut().zip(other).for_each(|(x, o)| *x += o);
        for (t, (&id, mut row)) in ids.iter().zip(x.rows_mut()).enumerate() {
            if id as usize >= vocab {
                return Err(ModelError::Token { id, vocab });
            }
            let row = row.as_slice_mut().expect("rows are contiguous");
            self.tokens.read_row(id as usize, row)?;
            if let Some(token_type) = &self.token_type {
                add(row, token_type);
            }
            if let Some(table) = &self.positions {
                let limit = table.dim().0;
                if start + t >= limit {
                    return Err(ModelError::Context { positions: start + ids.len(), limit });
                }
                table.read_row(start + t, &mut position);
                add(row, &position);
            }
        }
        Ok(match &self.norm {
            Some(norm) => {
                let mut normed = Array2::zeros(x.dim());
                norm.forward(x.view(), &mut normed);
                normed
            }
            None => x,
        })
    }

    /// The token table.
    pub(crate) fn tokens(&self) -> &Table {
        &self.tokens
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.tokens.bytes()
            + self.positions.as_ref().map_or(0, DenseMatrix::bytes)
            + self.token_type.as_ref().map_or(0, |row| 4 * row.len())
            + self.norm.as_ref().map_or(0, Norm::bytes)
    }
}
