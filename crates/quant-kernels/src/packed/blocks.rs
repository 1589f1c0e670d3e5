//! How the columns of a packed matrix are cut, which weights, activations and kernels all follow.

/// Most columns of a block: longer groups are cut, because the activations of a block share a scale, and because
/// its integer sums then are far from overflow (`2 * 256 * 127 * 128 < 2^23`, exact in f32 as well).
pub(crate) const LONGEST: usize = 128;

/// Columns, in stored order, that are summed as integers before they are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// The first column.
    pub(crate) start: u32,
    /// How many.
    pub(crate) len: u32,
    /// How many with the padding, whose activations are zero.
    pub(crate) padded: u32,
    /// Whether a group begins here: its parameters lie before the codes.
    pub(crate) first: bool,
}

/// All blocks of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    list: Vec<Block>,
    padded: usize,
    groups: usize,
}

impl Blocks {
    /// Cuts groups of these lengths, padding each block to a multiple of `unit` columns. `None` if there are
    /// more columns than a `u32` counts.
    pub(crate) fn new(groups: &[usize], unit: usize) -> Option<Blocks> {
        let mut blocks = Blocks { list: Vec::new(), padded: 0, groups: groups.len() };
        let mut start = 0u32;
        for &group in groups {
            for at in (0..group).step_by(LONGEST) {
                let len = LONGEST.min(group - at);
                let padded = len.next_multiple_of(unit);
                let block = Block { start, len: len as u32, padded: padded as u32, first: at == 0 };
                blocks.list.push(block);
                blocks.padded += padded;
                start = start.checked_add(block.len)?;
            }
        }
        Some(blocks)
    }

    /// The blocks, ascending.
    pub(crate) fn list(&self) -> &[Block] {
        &self.list
    }

    /// Columns with all padding.
    pub(crate) fn padded(&self) -> usize {
        self.padded
    }

    /// Groups of a row.
    pub(crate) fn groups(&self) -> usize {
        self.groups
    }
}
