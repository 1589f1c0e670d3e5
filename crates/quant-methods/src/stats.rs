//! What calibration tells a method about the input of a layer.

use ndarray::{ArrayView2, Axis, Slice};
use quant_math::{Hessian, HessianSum, Histogram, ShapeError};
use rayon::prelude::*;

/// The calibration statistics that a method uses: a set. Each costs time and memory, so a method names what it needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// [`LayerStats::hessian`].
    pub hessian: bool,
    /// [`LayerStats::group_hessians`].
    pub group_hessians: bool,
    /// [`LayerStats::magnitudes`].
    pub magnitudes: bool,
    /// [`LayerStats::histogram`].
    pub histogram: bool,
}

impl Needs {
    /// Nothing: no calibration data, no forward pass.
    pub const NONE: Self =
        Self { hessian: false, group_hessians: false, magnitudes: false, histogram: false };
    /// The second moments of all features.
    pub const HESSIAN: Self = Self { hessian: true, ..Self::NONE };
    /// The second moments inside groups.
    pub const GROUP_HESSIANS: Self = Self { group_hessians: true, ..Self::NONE };
    /// The magnitudes of features.
    pub const MAGNITUDES: Self = Self { magnitudes: true, ..Self::NONE };
    /// A histogram of all features together.
    pub const HISTOGRAM: Self = Self { histogram: true, ..Self::NONE };

    /// Bytes of the statistics of an input of `features` features in groups of `group_len`.
    pub fn bytes(self, features: usize, group_len: usize) -> usize {
        let if_needed = |needed: bool, floats: usize| if needed { 4 * floats } else { 0 };
        if_needed(self.hessian, features * features)
            + if_needed(self.group_hessians, features * group_len.min(features))
            + if_needed(self.magnitudes, 3 * features)
    }
}

/// Statistics of the input that the layers of a call share. What a method did not ask for is `None`.
#[derive(Clone, Debug, Default)]
pub struct LayerStats {
    /// Second moments `[in, in]`; consumed, because they are factored in place.
    pub hessian: Option<Hessian>,
    /// Second moments of the features of each weight group: the blocks on the diagonal of the Hessian. The last may be
    /// smaller.
    pub group_hessians: Option<Vec<Hessian>>,
    /// Mean and largest magnitude of every feature.
    pub magnitudes: Option<Magnitudes>,
    /// How often all features together have which magnitude.
    pub histogram: Option<Histogram>,
}

/// How large the features of an input are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Magnitudes {
    /// Mean of `|x|`, `[in]`.
    pub mean: Vec<f32>,
    /// Largest `|x|`, `[in]`.
    pub max: Vec<f32>,
}

/// Statistics while calibration data comes in; [`StatsSum::finish`] makes them [`LayerStats`].
#[derive(Clone, Debug)]
pub struct StatsSum {
    features: usize,
    hessian: Option<HessianSum>,
    groups: Option<(usize, Vec<HessianSum>)>,
    magnitudes: Option<MagnitudeSum>,
    histogram: Option<Histogram>,
}

impl StatsSum {
    /// Empty sums of what is needed, for an input of `features` features in weight groups of `group_len`.
    pub fn new(needs: Needs, features: usize, group_len: usize) -> Self {
        let len = group_len.clamp(1, features.max(1));
        let blocks = || (0..features).step_by(len).map(|start| HessianSum::new(len.min(features - start)));
        Self {
            features,
            hessian: needs.hessian.then(|| HessianSum::new(features)),
            groups: needs.group_hessians.then(|| (len, blocks().collect())),
            magnitudes: needs.magnitudes.then(|| MagnitudeSum::new(features)),
            histogram: needs.histogram.then(Histogram::default),
        }
    }

    /// Adds a batch of input vectors. `x`: `[t, features]` with contiguous rows.
    ///
    /// The bits of the sums depend on how the vectors are cut into batches, so callers keep to a fixed cut.
    pub fn accumulate(&mut self, x: ArrayView2<'_, f32>) -> Result<(), ShapeError> {
        if x.ncols() != self.features {
            let [expected, found] = [self.features, x.ncols()].map(|features| [x.nrows(), features]);
            return Err(ShapeError::Shape { operand: "x", expected, found });
        }
        if let Some(sum) = &mut self.hessian {
            sum.accumulate(x)?;
        }
        if let Some((len, sums)) = &mut self.groups {
            let parts = sums.par_iter_mut().enumerate();
            parts.try_for_each(|(i, sum)| {
                let end = x.ncols().min((i + 1) * *len);
                sum.accumulate(x.slice_axis(Axis(1), Slice::from(i * *len..end)))
            })?;
        }
        if let Some(sum) = &mut self.magnitudes {
            sum.accumulate(x);
        }
        if let Some(histogram) = &mut self.histogram {
            histogram.accumulate(x);
        }
        Ok(())
    }

    /// The statistics of all vectors seen.
    pub fn finish(self) -> LayerStats {
        LayerStats {
            hessian: self.hessian.map(HessianSum::finish),
            group_hessians: self.groups.map(|(_, sums)| sums.into_iter().map(HessianSum::finish).collect()),
            magnitudes: self.magnitudes.map(MagnitudeSum::finish),
            histogram: self.histogram,
        }
    }
}

/// Sums of magnitudes. In f64, whose rounding no method could notice.
#[derive(Clone, Debug)]
struct MagnitudeSum {
    sums: Vec<f64>,
    max: Vec<f32>,
    rows: usize,
}

impl MagnitudeSum {
    fn new(features: usize) -> Self {
        Self { sums: vec![0.0; features], max: vec![0.0; features], rows: 0 }
    }

    fn accumulate(&mut self, x: ArrayView2<'_, f32>) {
        /// Features of one piece of parallel work: a kilobyte of each row.
        const STRIP: usize = 256;
        let strips = self.sums.par_chunks_mut(STRIP).zip(self.max.par_chunks_mut(STRIP)).enumerate();
        strips.for_each(|(i, (sums, max))| {
            let strip = Slice::from(i * STRIP..i * STRIP + sums.len());
            for row in x.slice_axis(Axis(1), strip).rows() {
                for ((sum, max), x) in sums.iter_mut().zip(&mut *max).zip(row) {
                    *sum += f64::from(x.abs());
                    *max = max.max(x.abs());
                }
            }
        });
        self.rows += x.nrows();
    }

    fn finish(self) -> Magnitudes {
        let count = self.rows.max(1) as f64;
        Magnitudes { mean: self.sums.iter().map(|sum| (sum / count) as f32).collect(), max: self.max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array, concatenate};

    const ALL: Needs = Needs { hessian: true, group_hessians: true, magnitudes: true, histogram: true };

    #[test]
    fn only_what_is_needed_is_gathered() {
        let of = |needs| StatsSum::new(needs, 6, 4).finish();
        let none = of(Needs::NONE);
        assert!(none.hessian.is_none() && none.group_hessians.is_none() && none.magnitudes.is_none());
        assert!(of(Needs::HESSIAN).hessian.is_some() && of(Needs::MAGNITUDES).magnitudes.is_some());
        assert_eq!(Needs::NONE.bytes(6, 4), 0);
        assert_eq!(ALL.bytes(6, 4), 4 * (36 + 24 + 18));
    }

    #[test]
    fn groups_are_the_diagonal_blocks_of_the_hessian() {
        // Small integers, and 8 of them: sums and the factor 2/n are exact.
        let x = Array2::from_shape_fn((8, 7), |(t, k)| ((t * 5 + k * 3) % 9) as f32 - 4.0);
        let mut sum = StatsSum::new(ALL, 7, 3);
        let (first, second) = x.view().split_at(Axis(0), 5);
        sum.accumulate(first).unwrap();
        sum.accumulate(second).unwrap();
        let stats = sum.finish();
        let (whole, groups) = (stats.hessian.unwrap(), stats.group_hessians.unwrap());
        assert_eq!(groups.iter().map(Hessian::features).collect::<Vec<_>>(), [3, 3, 1]);
        for (i, group) in groups.iter().enumerate() {
            let part = Slice::from(3 * i..3 * i + group.features());
            let block = whole.matrix.slice_axis(Axis(0), part);
            assert_eq!(block.slice_axis(Axis(1), part), group.matrix);
            assert_eq!(group.rows, 8);
        }
        assert_eq!(stats.histogram.unwrap().count(), 56);
        let magnitudes = stats.magnitudes.unwrap();
        for (k, column) in x.columns().into_iter().enumerate() {
            let sizes: Vec<f32> = column.iter().map(|x| x.abs()).collect();
            assert_eq!(magnitudes.mean[k], sizes.iter().sum::<f32>() / 8.0);
            assert_eq!(magnitudes.max[k], sizes.iter().copied().fold(0.0, f32::max));
        }
    }

    #[test]
    fn an_input_of_another_width_is_refused() {
        let narrow = array![[1.0f32, 2.0]];
        let wide = concatenate![Axis(1), narrow, narrow];
        let mut sum = StatsSum::new(Needs::MAGNITUDES, 3, 2);
        assert!(sum.accumulate(narrow.view()).is_err() && sum.accumulate(wide.view()).is_err());
        assert!(sum.accumulate(wide.slice_axis(Axis(1), Slice::from(1..))).is_ok());
    }
}
