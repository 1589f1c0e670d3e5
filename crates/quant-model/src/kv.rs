//! Keys and values of the positions already seen.

use quant_kernels::{KvStore, KvType};

use crate::arch::ArchSpec;

/// Keys (after rope) and values of one text in all layers.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<KvStore>,
    len: usize,
}

impl KvCache {
    /// An empty cache for a model of `layers` blocks.
    pub fn new(spec: &ArchSpec, layers: usize, kind: KvType) -> Self {
        Self { layers: vec![KvStore::new(spec.kv_heads, spec.head_dim, kind); layers], len: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(KvStore::bytes).sum()
    }

    /// The store of a block, to be handed to its forward pass.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut KvStore {
        &mut self.layers[layer]
    }

    /// Takes note of rows that all layers have appended.
    pub(crate) fn advance(&mut self, rows: usize) {
        self.len += rows;
        debug_assert!(self.layers.iter().all(|layer| layer.len() == self.len));
    }
}
