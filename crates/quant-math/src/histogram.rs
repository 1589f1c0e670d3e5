//! Histograms of magnitudes, and the clipping thresholds that follow from them.
//!
//! Static quantization of activations needs one number: the magnitude `a` that the largest code stands for. The largest
//! value seen wastes codes on outliers; the thresholds here clip some of them. Percentile, least squares and entropy
//! follow NVIDIA's calibrators; histograms grow as theirs do, by appending bins, and stay bounded.

use ndarray::{ArrayView2, Axis};
use rayon::prelude::*;

/// Bins up to the largest value of the first batch.
const BINS: usize = 2048;
/// Bins at most; beyond that, neighbours are joined.
const MOST_BINS: usize = 16 * BINS;
/// Thresholds below so many bins are not tried: they would clip nearly everything.
const FIRST: usize = 128;

/// Counts of `|x|` in bins of equal width from 0 on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    width: f32,
    counts: Vec<u64>,
    max: f32,
}

impl Histogram {
    /// Counts a batch. Values that are not finite are left out. The bins depend on the first batch with a value other
    /// than zero, so callers keep to a fixed cut.
    pub fn accumulate(&mut self, x: ArrayView2<'_, f32>) {
        let rows = || x.axis_iter(Axis(0)).into_par_iter();
        let finite = |x: &f32| Some(x.abs()).filter(|x| x.is_finite());
        // Maxima and counts are exact, so that their order does not matter.
        let max =
            rows().map(|row| row.iter().filter_map(finite).fold(0.0, f32::max)).reduce(|| 0.0, f32::max);
        self.max = self.max.max(max);
        if self.width == 0.0 {
            self.width = max / BINS as f32;
            self.counts = vec![0; BINS];
        }
        if self.width == 0.0 {
            // Nothing but zeros, or numbers too small to tell from it.
            self.counts.clear();
            return;
        }
        while max / self.width >= MOST_BINS as f32 {
            self.counts = self.counts.chunks(2).map(|pair| pair.iter().sum()).collect();
            self.width *= 2.0;
        }
        let width = self.width;
        let bin = move |x: f32| (x / width) as usize;
        let bins = self.counts.len().max(bin(max) + 1);
        self.counts.resize(bins, 0);
        let counted = rows().fold(
            || vec![0u64; bins],
            |mut counts, row| {
                // The largest value of the first batch lies on the last edge.
                row.iter().filter_map(finite).for_each(|x| counts[bin(x).min(bins - 1)] += 1);
                counts
            },
        );
        let counted = counted.reduce(
            || vec![0; bins],
            |mut counts, others| {
                counts.iter_mut().zip(others).for_each(|(count, other)| *count += other);
                counts
            },
        );
        self.counts.iter_mut().zip(counted).for_each(|(count, new)| *count += new);
    }

    /// The largest magnitude.
    pub fn max(&self) -> f32 {
        self.max
    }

    /// Values counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The upper edge of a bin, at most the largest magnitude.
    fn edge(&self, bin: usize) -> f32 {
        ((bin + 1) as f32 * self.width).min(self.max)
    }

    /// The least bin edge that a share of the values lies below.
    pub fn percentile(&self, share: f64) -> f32 {
        let wanted = (self.count() as f64 * share).ceil() as u64;
        let mut seen = 0;
        let reached = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        reached.map_or(self.max, |bin| self.edge(bin))
    }

    /// The threshold that loses least in the sum of squares when magnitudes are rounded to `levels` steps.
    pub fn least_squares(&self, levels: u32) -> f32 {
        let centers: Vec<(f64, f64)> =
            self.occupied().map(|(bin, count)| ((bin as f64 + 0.5), count)).collect();
        self.best(|bins| {
            let step = bins as f64 / f64::from(levels);
            let error = |&(x, count): &(f64, f64)| {
                let rounded = (x / step).round_ties_even().min(f64::from(levels)) * step;
                count * (rounded - x).powi(2)
            };
            centers.iter().map(error).sum()
        })
    }

    /// The threshold that keeps most of the information: the least divergence of the counts up to it, what lies beyond
    /// put into the last bin, from the same counts in `levels` cells, each spread evenly over its bins that are not empty.
    /// (What lies beyond is not put into the cells, as in the original.)
    pub fn entropy(&self, levels: u32) -> f32 {
        let levels = levels.max(1) as usize;
        let mut counts: Vec<f64> = self.counts.iter().map(|&count| count as f64).collect();
        // Exact zeros are no part of the distribution.
        if let [zero, one, ..] = &mut counts[..] {
            *zero = *one;
        }
        let total: f64 = counts.iter().sum();
        self.best(|bins| {
            let kept = &counts[..bins];
            let inside: f64 = kept.iter().sum();
            let cell = |level: usize| level * bins / levels..(level + 1) * bins / levels;
            let mut divergence = 0.0;
            for cell in (0..levels.min(bins)).map(cell) {
                let sum: f64 = kept[cell.clone()].iter().sum();
                let full = kept[cell.clone()].iter().filter(|&&c| c > 0.0).count();
                for bin in cell {
                    let beyond = if bin + 1 == bins { total - inside } else { 0.0 };
                    let (p, q) = ((kept[bin] + beyond) / total, sum / full as f64 / inside);
                    if p > 0.0 {
                        // Mass where the cells have none: infinitely far apart.
                        divergence += if kept[bin] > 0.0 { p * libm::log(p / q) } else { f64::INFINITY };
                    }
                }
            }
            divergence
        })
    }

    fn occupied(&self) -> impl Iterator<Item = (usize, f64)> + '_ {
        self.counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(|(bin, &count)| (bin, count as f64))
    }

    /// The edge of the last bin with the least loss, tried at most [`BINS`] times at equal distances.
    fn best(&self, loss: impl Fn(usize) -> f64 + Sync) -> f32 {
        let bins = self.counts.len();
        let stride = bins.div_ceil(BINS).max(1);
        let tried: Vec<usize> =
            (FIRST.min(bins)..=bins).rev().step_by(stride).filter(|&bins| bins > 0).collect();
        let losses: Vec<f64> = tried.par_iter().map(|&bins| loss(bins)).collect();
        let best =
            tried.iter().zip(&losses).reduce(|best, other| if other.1 < best.1 { other } else { best });
        best.map_or(self.max, |(bins, _)| self.edge(bins - 1))
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    fn of(values: Vec<f32>) -> Histogram {
        let mut histogram = Histogram::default();
        histogram.accumulate(Array2::from_shape_vec((1, values.len()), values).unwrap().view());
        histogram
    }

    /// 4096 values spread evenly over `[-1, 1]`, and what is asked for beyond.
    fn spread(outliers: &[f32]) -> Histogram {
        let even = (0..4096).map(|i| (i as f32 + 0.5) / 2048.0 - 1.0);
        of(even.chain(outliers.iter().copied()).collect())
    }

    #[test]
    fn percentiles_are_bin_edges() {
        let histogram = of((1..=100).map(|i| i as f32).collect());
        assert_eq!((histogram.max(), histogram.count()), (100.0, 100));
        let width = 100.0 / 2048.0;
        for (share, value) in [(0.5, 50.0), (0.9, 90.0), (1.0, 100.0)] {
            let found = histogram.percentile(share);
            assert!(found >= value && found <= value + width, "{share}: {found}");
        }
        assert_eq!(Histogram::default().percentile(0.5), 0.0);
    }

    #[test]
    fn bins_are_appended_and_joined() {
        let mut histogram = of(vec![1.0, 0.25]);
        for (value, width) in [(3.0, 1.0 / 2048.0), (1000.0, 64.0 / 2048.0), (f32::NAN, 64.0 / 2048.0)] {
            histogram.accumulate(Array2::from_elem((1, 1), value).view());
            assert_eq!(histogram.width, width);
            assert!(histogram.counts.len() <= MOST_BINS);
        }
        assert_eq!((histogram.count(), histogram.max()), (4, 1000.0));
        let none = of(vec![0.0; 5]);
        assert_eq!((none.least_squares(127), none.entropy(128), none.percentile(0.9)), (0.0, 0.0, 0.0));
    }

    #[test]
    fn an_outlier_is_clipped_where_it_costs_less() {
        // One value at 4 among 4096: covering it makes the steps of all others four times as long.
        // Squares: clipping costs 3² = 9, covering 4096 * 15 (1/7)² / 12 = 104 with 7 levels.
        let clipped = spread(&[4.0]).least_squares(7);
        assert!((0.9..1.3).contains(&clipped), "{clipped}");
        // With 127 levels covering costs 4096 * 15 (1/127)² / 12 = 0.3.
        let covered = spread(&[4.0]).least_squares(127);
        assert!(covered > 3.5, "{covered}");
        assert!(spread(&[]).least_squares(127) > 0.98);
    }

    #[test]
    fn entropy_keeps_an_even_distribution_whole() {
        assert!(spread(&[]).entropy(128) > 0.98);
    }

    #[test]
    fn entropy_clips_what_cells_tell_badly() {
        // 128 even bins, then 128 of 1 and 9 in turn. All of them take cells of two bins, which blur the tail: with
        // N = 128,640 a divergence of 64 (ln(1/5) + 9 ln(9/5)) / N = 0.0018. Half of them fit the cells; the tail of 640
        // in their last bin costs 1640/N ln(1640 128/N) + 127,000/N ln(128,000/N) = 0.0013.
        let tail = (0..128).map(|i| if i % 2 == 0 { 1 } else { 9 });
        let counts = std::iter::repeat_n(1000, 128).chain(tail).collect();
        let histogram = Histogram { width: 1.0 / 256.0, counts, max: 1.0 };
        assert_eq!(histogram.entropy(128), 0.5);
    }

    #[test]
    fn batches_and_threads_change_nothing() {
        let x = Array2::from_shape_fn((33, 70), |(i, j)| ((i * 70 + j) * 37 % 501) as f32 - 250.0);
        let mut apart = Histogram::default();
        apart.accumulate(x.slice_axis(Axis(0), (..20).into()));
        apart.accumulate(x.slice_axis(Axis(0), (20..).into()));
        let mut together = Histogram::default();
        together.accumulate(x.view());
        assert_eq!(apart.counts.iter().sum::<u64>(), 33 * 70);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let mut threaded = Histogram::default();
        pool.install(|| threaded.accumulate(x.view()));
        assert_eq!(threaded, together);
    }
}
