//! The weights of a matrix by group, wherever groups lie.

use rayon::prelude::*;

/// Groups of one piece of parallel work.
const CHUNK: usize = 64;

/// A flat row-major matrix cut into groups of weights.
#[derive(Clone, Copy, Debug)]
pub struct Grouped<'a> {
    w: &'a [f32],
    cut: Cut,
}

#[derive(Clone, Copy, Debug)]
enum Cut {
    /// Runs of `len` in lines of `line` elements; the last of a line may be short.
    Runs { line: usize, len: usize },
    /// Element `i` is in group `i % count`.
    Strided { count: usize },
}

impl<'a> Grouped<'a> {
    /// Runs of `len` elements in lines of `line`, the last run of a line possibly short. One line for all makes runs
    /// cross the ends of rows. Both lengths are positive.
    pub fn runs(w: &'a [f32], line: usize, len: usize) -> Self {
        Self { w, cut: Cut::Runs { line, len } }
    }

    /// `count` interleaved groups: element `i` is in group `i % count`.
    pub fn strided(w: &'a [f32], count: usize) -> Self {
        Self { w, cut: Cut::Strided { count } }
    }

    /// Number of groups.
    pub fn count(&self) -> usize {
        match self.cut {
            Cut::Runs { line, len } => self.w.len() / line * line.div_ceil(len),
            Cut::Strided { count } => count,
        }
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.w.len()
    }

    /// True if there are no weights.
    pub fn is_empty(&self) -> bool {
        self.w.is_empty()
    }

    /// Index in the flat matrix of element `i` of group `g`.
    pub fn index(&self, g: usize, i: usize) -> usize {
        match self.cut {
            Cut::Runs { line, len } => {
                let per_line = line.div_ceil(len);
                g / per_line * line + g % per_line * len + i
            }
            Cut::Strided { count } => i * count + g,
        }
    }

    /// `f(group, weights)` of every group, in the order of groups; runs in parallel.
    pub fn map<T: Copy + Send>(&self, f: impl Fn(usize, &[f32]) -> T + Sync) -> Vec<T> {
        let count = self.count();
        let chunk = |scratch: &mut Vec<f32>, first: usize| -> Vec<T> {
            let last = (first + CHUNK).min(count);
            match self.cut {
                Cut::Runs { line, len } => {
                    let run = |g: usize| {
                        let start = self.index(g, 0);
                        &self.w[start..start + len.min(line - start % line)]
                    };
                    (first..last).map(|g| f(g, run(g))).collect()
                }
                Cut::Strided { count } => {
                    // Whole cache lines are read; a group at a time would touch each of them once per weight.
                    let (width, lines) = (last - first, self.w.len() / count);
                    scratch.resize(lines * width, 0.0);
                    for i in 0..lines {
                        let line = &self.w[i * count + first..][..width];
                        line.iter().enumerate().for_each(|(j, &w)| scratch[j * lines + i] = w);
                    }
                    (first..last).map(|g| f(g, &scratch[(g - first) * lines..][..lines])).collect()
                }
            }
        };
        let chunks = (0..count.div_ceil(CHUNK)).into_par_iter();
        let results = chunks.map_init(Vec::new, |scratch, i| chunk(scratch, i * CHUNK));
        results.collect::<Vec<_>>().concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_weight_is_in_its_group() {
        let w: Vec<f32> = (0..6 * 200).map(|i| i as f32).collect();
        for groups in [
            Grouped::runs(&w, 200, 64),
            Grouped::runs(&w, 200, 500),
            Grouped::runs(&w, w.len(), 48),
            Grouped::strided(&w, 75),
            Grouped::strided(&w, 200),
        ] {
            let mut seen = vec![false; w.len()];
            let found = groups.map(|g, weights| {
                let fits = weights.iter().enumerate().all(|(i, &v)| v == groups.index(g, i) as f32);
                (fits, weights.len(), weights[0] as usize)
            });
            assert_eq!(found.len(), groups.count(), "{groups:?}");
            for (g, &(fits, len, _)) in found.iter().enumerate() {
                assert!(fits, "{groups:?}");
                (0..len).for_each(|i| assert!(!std::mem::replace(&mut seen[groups.index(g, i)], true)));
            }
            assert!(seen.into_iter().all(|seen| seen), "{groups:?}");
        }
        assert!(Grouped::runs(&[], 8, 4).map(|g, _| g).is_empty());
    }
}
