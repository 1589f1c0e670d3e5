//! Keys and values of the positions already seen.

use ndarray::ArrayView2;

use crate::arch::ArchSpec;

/// Rows by which a cache grows at least.
const CHUNK: usize = 256;

/// Keys and values of one text in all layers, in f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    len: usize,
}

impl KvCache {
    /// An empty cache for a model of `layers` blocks.
    pub fn new(spec: &ArchSpec, layers: usize) -> Self {
        Self { layers: vec![LayerCache::new(spec.kv_size()); layers], len: 0 }
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
        self.layers.iter().map(|layer| 4 * (layer.keys.capacity() + layer.values.capacity())).sum()
    }

    /// The cache of a block, to be handed to its forward pass.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    /// Takes note of rows that all layers have appended.
    pub(crate) fn advance(&mut self, rows: usize) {
        self.len += rows;
        debug_assert!(self.layers.iter().all(|layer| layer.keys.len() == self.len * layer.width));
    }
}

/// Keys (after rope) and values of one layer.
#[derive(Clone, Debug)]
pub struct LayerCache {
    width: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl LayerCache {
    /// An empty cache for rows of `width` = kv heads * head dim.
    pub fn new(width: usize) -> Self {
        Self { width, keys: Vec::new(), values: Vec::new() }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.keys.len() / self.width
    }

    /// True if nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Adds rows, `keys` and `values`: `[t, width]`.
    pub(crate) fn append(&mut self, keys: ArrayView2<'_, f32>, values: ArrayView2<'_, f32>) {
        for (store, rows) in [(&mut self.keys, keys), (&mut self.values, values)] {
            if store.capacity() - store.len() < rows.len() {
                let chunk = (CHUNK * self.width).max(store.len() / 4);
                store.reserve_exact(rows.len().max(chunk));
            }
            rows.rows().into_iter().for_each(|row| store.extend(row));
        }
    }

    /// All keys and all values, `[len, width]` each.
    pub(crate) fn views(&self) -> (ArrayView2<'_, f32>, ArrayView2<'_, f32>) {
        let view = |store| ArrayView2::from_shape((self.len(), self.width), store).expect("whole rows");
        (view(&self.keys), view(&self.values))
    }
}
