//! Working memory of a thread.

use std::cell::RefCell;

thread_local! {
    /// Kept between products, since the pages of a fresh allocation cost more than a small product.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The thread's working memory; it goes back when dropped.
pub(crate) struct Scratch(Vec<f32>);

impl Scratch {
    pub(crate) fn take() -> Scratch {
        Scratch(SCRATCH.take())
    }

    /// Slices of the given lengths, each on a cache line of its own, with any contents.
    pub(crate) fn split<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        const LINE: usize = 16;
        let total = lengths.iter().map(|length| length.next_multiple_of(LINE)).sum::<usize>() + LINE;
        if self.0.len() < total {
            self.0.resize(total, 0.0);
        }
        let start = self.0.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let mut rest = &mut self.0[start..];
        lengths.map(|length| {
            let (slice, after) = std::mem::take(&mut rest).split_at_mut(length.next_multiple_of(LINE));
            rest = after;
            &mut slice[..length]
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_aligned_and_memory_is_kept() {
        let mut scratch = Scratch::take();
        let slices = scratch.split([3, 0, 17, 1]);
        assert_eq!(slices.each_ref().map(|slice| slice.len()), [3, 0, 17, 1]);
        assert!(slices.iter().all(|slice| slice.as_ptr().addr().is_multiple_of(64)));
        let first = slices[0].as_ptr();
        drop(scratch);
        assert_eq!(Scratch::take().split([5])[0].as_ptr(), first);
    }
}
