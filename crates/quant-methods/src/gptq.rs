//! GPTQ: rounding column by column, each column's error made up for by the columns that follow.

/// Options of GPTQ. The names in brackets are those of the reference implementations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqOptions {
    /// Order in which columns are rounded.
    pub order: ColumnOrder,
    /// Fit every group on the original weights before the first column is rounded (`static_groups`).
    pub static_groups: bool,
    /// Shrink each group's range for the least `Σ |w - ŵ|^norm` (`mse`, 2.4 in the papers' code); `None` is off.
    pub mse: Option<f32>,
    /// Added to the diagonal, as a fraction of its mean (`damp_percent`).
    pub damp: f64,
    /// Step by which the damping grows while the Hessian is not positive definite (`damp_auto_increment`).
    pub damp_increment: f64,
    /// Columns per block of the lazy update (`blocksize`). The result depends on it only through rounding of f32.
    pub block_size: usize,
    /// Reproduce the codes of another implementation.
    pub compat: Option<Compat>,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self {
            order: ColumnOrder::GroupAware,
            static_groups: false,
            mse: None,
            damp: 0.05,
            damp_increment: 0.01,
            block_size: 128,
            compat: None,
        }
    }
}

/// Order in which columns are rounded. The earlier a column, the more others can make up for its error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColumnOrder {
    /// As stored.
    Natural,
    /// Groups in order of their most active column, columns by activity inside each (`act_group_aware`): most of
    /// the gain of [`ColumnOrder::Activation`], with groups of consecutive columns.
    GroupAware,
    /// All columns by activity (`desc_act`); groups hold columns of similar activity, the layout needs `g_idx`.
    Activation,
}

/// An implementation whose codes can be reproduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compat {
    /// GPTQModel 7: groups that start inside a block are fitted without the updates of that block, codes are chosen
    /// for f32 scales.
    GptqModel,
}
