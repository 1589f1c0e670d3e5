//! The order of a tensor's elements in a GGUF file and in the checkpoint.

use super::GgmlType;
use super::arch::GgufArch;

/// How a tensor of the file and the one of the checkpoint differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Not at all.
    Same,
    /// The rows of each head of `dim` rows: the file interleaves the two halves that rotary embeddings pair.
    Interleaved {
        /// Rows of a head.
        dim: usize,
    },
    /// A transposed matrix.
    Transposed,
}

impl Order {
    /// The order of a module of the checkpoint whose tensor in the file has this shape and type. `heads` tells the
    /// number of query heads, or of key heads.
    pub(super) fn of(
        arch: &GgufArch,
        module: &str,
        shape: &[usize],
        ty: GgmlType,
        heads: impl Fn(bool) -> Option<usize>,
    ) -> Self {
        let Some(rest) = arch.names.below_block(module) else { return Order::Same };
        let keys = match rest {
            "self_attn.q_proj" => false,
            "self_attn.k_proj" => true,
            _ if arch.transposed && ty.dtype().is_some() && shape.len() == 2 => return Order::Transposed,
            _ => return Order::Same,
        };
        let (Some(heads), Some(&rows)) = (heads(keys).filter(|_| arch.interleaved), shape.first()) else {
            return Order::Same;
        };
        // Anything else does not fit the model and will be refused with its shape.
        match rows.checked_div(heads) {
            Some(dim) if rows.is_multiple_of(heads) && dim.is_multiple_of(2) && dim > 0 => {
                Order::Interleaved { dim }
            }
            _ => Order::Same,
        }
    }

    /// The shape in the checkpoint.
    pub(super) fn shape(self, stored: &[usize]) -> Vec<usize> {
        let mut shape = stored.to_vec();
        if self == Order::Transposed {
            shape.reverse();
        }
        shape
    }

    /// Bytes of the file in the order of the checkpoint. `shape` is the one in the file.
    pub(super) fn to_checkpoint(self, bytes: Vec<u8>, shape: &[usize], ty: GgmlType) -> Vec<u8> {
        match self {
            Order::Same => bytes,
            // Row `j dim/2 + i` of the checkpoint is row `2 i + j` of the file.
            Order::Interleaved { dim } => {
                rows(&bytes, shape[0], |r| r / dim * dim + r % dim % (dim / 2) * 2 + r % dim / (dim / 2))
            }
            Order::Transposed => transpose(&bytes, shape, ty),
        }
    }

    /// Bytes of the checkpoint in the order of the file. `shape` is the one in the checkpoint.
    pub(super) fn to_file(self, bytes: &[u8], shape: &[usize], ty: GgmlType) -> Vec<u8> {
        match self {
            Order::Same => bytes.to_vec(),
            Order::Interleaved { dim } => {
                rows(bytes, shape[0], |r| r / dim * dim + r % dim % 2 * (dim / 2) + r % dim / 2)
            }
            Order::Transposed => transpose(bytes, shape, ty),
        }
    }
}

/// The rows in another order: row `r` of the result is row `from(r)`.
fn rows(bytes: &[u8], count: usize, from: impl Fn(usize) -> usize) -> Vec<u8> {
    let len = bytes.len().checked_div(count).unwrap_or(0);
    let mut out = Vec::with_capacity(bytes.len());
    (0..count).for_each(|r| out.extend_from_slice(&bytes[from(r) * len..][..len]));
    out
}

fn transpose(bytes: &[u8], shape: &[usize], ty: GgmlType) -> Vec<u8> {
    let (height, width, size) = (shape[0], shape[1], ty.block_bytes());
    let mut out = Vec::with_capacity(bytes.len());
    for c in 0..width {
        (0..height).for_each(|r| out.extend_from_slice(&bytes[(r * width + c) * size..][..size]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn orders_are_undone(heads in 1usize..4, half in 1usize..5, width in 1usize..4) {
            let (dim, rows) = (2 * half, heads * 2 * half);
            let bytes: Vec<u8> = (0..rows * width).map(|i| i as u8).collect();
            for order in [Order::Same, Order::Interleaved { dim }, Order::Transposed] {
                let stored = order.to_file(&bytes, &[rows, width], GgmlType::I8);
                let shape = order.shape(&[rows, width]);
                prop_assert_eq!(&order.to_checkpoint(stored, &shape, GgmlType::I8), &bytes);
            }
        }
    }

    #[test]
    fn halves_are_interleaved() {
        let order = Order::Interleaved { dim: 4 };
        assert_eq!(order.to_file(&[0, 1, 2, 3, 4, 5, 6, 7], &[8, 1], GgmlType::I8), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(Order::Transposed.to_file(&[0, 1, 2, 3, 4, 5], &[2, 3], GgmlType::I8), [0, 3, 1, 4, 2, 5]);
    }
}
