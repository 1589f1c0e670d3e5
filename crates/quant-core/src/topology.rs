//! What rewriting a transformer block takes to know of it: where factors of a linear's inputs can be folded.

/// A norm of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormId {
    /// Before (or after) attention.
    Attention,
    /// Before (or after) the MLP.
    Mlp,
}

/// What makes the input that the linears of a stage share, and so where a division of its features can be folded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Producer {
    /// A norm that feeds nothing else: its weight, and its bias, are divided.
    Norm(NormId),
    /// Another linear of the block, whose outputs reach the input feature by feature, in proportion: its rows are
    /// divided.
    Outputs {
        /// The linear's slot.
        slot: usize,
        /// Row of that linear behind each input feature. Where features share a row they share the factor.
        rows: Vec<usize>,
    },
    /// Nothing that could take up factors.
    Fixed {
        /// What stands in the way.
        because: &'static str,
    },
}
