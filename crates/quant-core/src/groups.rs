//! Which elements share a scale.

use std::sync::Arc;

/// Maps an element `(row, col)` of an `[rows, cols]` matrix to the index of its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Groups {
    /// One group for the whole matrix.
    Tensor,
    /// Each row cut in runs of `len` columns; the last may be short. Index `row * ceil(cols/len) + col/len`.
    Row {
        /// Columns per group.
        len: usize,
    },
    /// Blocks of `rows` x `cols` elements, row-major; those at the edges may be short.
    Tile {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
    },
    /// Runs of `len` elements of the flattened matrix, across row ends (bitsandbytes).
    Flat {
        /// Elements per group.
        len: usize,
    },
    /// `count` interleaved groups of the flattened matrix: element `i` is in group `i % count` (HQQ axis 0).
    Strided {
        /// Number of groups.
        count: usize,
    },
    /// Any map of columns to groups, equal in all rows: index `row * count + of_col[col]` (GPTQ act-order).
    Index {
        /// Group of each column.
        of_col: Arc<[u32]>,
        /// Groups per row.
        count: usize,
    },
}

impl Groups {
    /// One group per row.
    pub fn whole_row(cols: usize) -> Groups {
        Groups::Row { len: cols.max(1) }
    }

    /// Number of groups of an `[rows, cols]` matrix.
    pub fn count(&self, rows: usize, cols: usize) -> usize {
        match *self {
            Groups::Tensor => 1,
            Groups::Row { len } => rows * cols.div_ceil(len),
            Groups::Tile { rows: tr, cols: tc } => rows.div_ceil(tr) * cols.div_ceil(tc),
            Groups::Flat { len } => (rows * cols).div_ceil(len),
            Groups::Strided { count } => count,
            Groups::Index { count, .. } => rows * count,
        }
    }

    /// Group of the element `(r, c)` of a matrix with `cols` columns.
    pub fn index(&self, r: usize, c: usize, cols: usize) -> usize {
        match *self {
            Groups::Tensor => 0,
            Groups::Row { len } => r * cols.div_ceil(len) + c / len,
            Groups::Tile { rows: tr, cols: tc } => (r / tr) * cols.div_ceil(tc) + c / tc,
            Groups::Flat { len } => (r * cols + c) / len,
            Groups::Strided { count } => (r * cols + c) % count,
            Groups::Index { ref of_col, count } => r * count + of_col[c] as usize,
        }
    }

    /// End of the run of columns from `c` on in row `r` that certainly share the group of `(r, c)`.
    pub fn run_end(&self, r: usize, c: usize, cols: usize) -> usize {
        let end = match *self {
            Groups::Tensor => cols,
            Groups::Row { len } | Groups::Tile { cols: len, .. } => (c / len + 1).saturating_mul(len),
            Groups::Flat { len } => c + len - (r * cols + c) % len,
            Groups::Strided { .. } => c + 1,
            Groups::Index { ref of_col, .. } => {
                of_col[c..].iter().position(|&g| g != of_col[c]).map_or(cols, |n| c + n)
            }
        };
        end.min(cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_groups(rows: usize, cols: usize) -> impl Strategy<Value = Groups> {
        prop_oneof![
            Just(Groups::Tensor),
            (1usize..9).prop_map(|len| Groups::Row { len }),
            (1usize..5, 1usize..9).prop_map(|(rows, cols)| Groups::Tile { rows, cols }),
            (1usize..9).prop_map(|len| Groups::Flat { len }),
            (1..=rows * cols).prop_map(|count| Groups::Strided { count }),
            prop::collection::vec(0u32..3, cols).prop_map(|v| Groups::Index { of_col: v.into(), count: 3 }),
        ]
    }

    proptest! {
        #[test]
        fn indices_and_runs_agree(
            (rows, cols, groups) in (1usize..6, 1usize..20)
                .prop_flat_map(|(r, c)| (Just(r), Just(c), any_groups(r, c))),
        ) {
            for r in 0..rows {
                let mut c = 0;
                while c < cols {
                    let (g, end) = (groups.index(r, c, cols), groups.run_end(r, c, cols));
                    prop_assert!(g < groups.count(rows, cols));
                    prop_assert!(end > c && end <= cols);
                    prop_assert!((c..end).all(|k| groups.index(r, k, cols) == g));
                    c = end;
                }
            }
        }
    }
}
