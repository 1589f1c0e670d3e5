//! Memory for packed weights: aligned, on huge pages where it is large, filled by all threads.

use std::alloc::{self, Layout};
use std::ptr::NonNull;

use rayon::prelude::*;

/// Alignment of small buffers: a cache line, which is also the widest vector.
const LINE: usize = 64;

/// A huge page. Larger buffers begin on one, since reading through pages of 4 KiB costs up to a quarter of the
/// memory's bandwidth.
const HUGE: usize = 2 << 20;

/// A buffer that is written once, when it is made.
pub(crate) struct Bytes {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is owned, and never written through a shared reference.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// `count` pieces of `size` bytes, each made from zeros by `fill(index, piece)`, several at a time.
    ///
    /// Panics if the size overflows; aborts if there is no memory, as every allocation of Rust does.
    pub(crate) fn filled(count: usize, size: usize, fill: impl Fn(usize, &mut [u8]) + Sync) -> Bytes {
        let len = count.checked_mul(size).expect("the size of a packed matrix");
        let align = if len >= HUGE { HUGE } else { LINE };
        let layout = Layout::from_size_align(len.max(1), align).expect("the size of a packed matrix");
        // SAFETY: the layout has at least one byte.
        let start = unsafe { alloc::alloc(layout) };
        let Some(start) = NonNull::new(start) else { alloc::handle_alloc_error(layout) };
        let bytes = Bytes { start, layout };
        advise_huge(&bytes);
        let address = start.as_ptr().expose_provenance();
        (0..count).into_par_iter().for_each(|i| {
            let start = std::ptr::with_exposed_provenance_mut::<u8>(address + i * size);
            // SAFETY: piece `i` lies inside the allocation of `count * size` bytes and no other call gets it; it is
            // written before a reference to it is made.
            let piece = unsafe {
                start.write_bytes(0, size);
                std::slice::from_raw_parts_mut(start, size)
            };
            fill(i, piece);
        });
        if len == 0 {
            // SAFETY: the one byte of an empty buffer.
            unsafe { start.as_ptr().write(0) };
        }
        bytes
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `filled` has written every byte of the allocation, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout by `filled`.
        unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.layout.size())
    }
}

/// Asks for huge pages, before the first byte is touched. Refusal does no harm.
#[cfg(target_os = "linux")]
fn advise_huge(bytes: &Bytes) {
    const MADV_HUGEPAGE: i32 = 14;
    // SAFETY: the signature is that of the C library, which every program of this system is linked with.
    unsafe extern "C" {
        fn madvise(address: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    if bytes.layout.align() == HUGE {
        // SAFETY: the range is allocated and page-aligned; the advice changes no contents.
        unsafe { madvise(bytes.start.as_ptr().cast(), bytes.layout.size(), MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_: &Bytes) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zeroed_filled_and_aligned() {
        for (count, size) in [(0, 64), (3, 0), (5, 192), (3, 1 << 20)] {
            let bytes = Bytes::filled(count, size, |i, piece| {
                assert!(piece.iter().all(|&x| x == 0));
                piece.fill(i as u8 + 1);
            });
            assert!(bytes.as_ptr().addr().is_multiple_of(64));
            for i in 0..count {
                assert!(bytes[i * size..][..size].iter().all(|&x| x == i as u8 + 1));
            }
        }
    }
}
