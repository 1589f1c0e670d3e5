//! W8A8: weights of 8 bits with a scale per output, activations of 8 bits with a scale per token or per tensor.
//!
//! Products then run in integers. Weights are rounded to nearest on symmetric grids; outliers of activations are moved
//! into them first by [`SmoothQuant`]. A static scale of the activations follows from a histogram of what calibration
//! saw at each input.

use quant_core::{ActGrid, ActGroup, ActSpec, GroupSize, QuantSpec, SpecError};
use quant_math::Histogram;

use crate::quantizer::{LayerWeights, QuantizeError, Quantized, Quantizer};
use crate::rtn::{Rtn, RtnOptions};
use crate::smoothquant::SmoothQuant;
use crate::stats::{LayerStats, Needs};
use crate::transform::Transform;

/// Options of W8A8.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct W8a8Options {
    /// Migration strength of SmoothQuant; `None` leaves activations as they are.
    pub alpha: Option<f32>,
    /// Smooth the inputs of attention's and the MLP's projections back, too.
    pub smooth_outputs: bool,
    /// How activations are rounded.
    pub activations: Activations,
}

impl Default for W8a8Options {
    /// Half of the difficulty migrates, for all inputs; scales of tokens are found when a model runs.
    fn default() -> Self {
        Self { alpha: Some(SmoothQuant::ALPHA), smooth_outputs: true, activations: Activations::Dynamic }
    }
}

/// Where the scale of activations comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activations {
    /// Each token's largest magnitude, at run time.
    Dynamic,
    /// One number per input, from calibration.
    Static(Observer),
}

/// How the largest magnitude to be represented follows from a histogram. See [`quant_math::histogram`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Observer {
    /// The largest seen.
    MinMax,
    /// This share of the values lies below.
    Percentile(f64),
    /// Least sum of squared errors.
    LeastSquares,
    /// Least loss of information.
    Entropy,
}

impl Observer {
    /// Scale of activations for signed bytes, `a / 127.5` as compressed-tensors has it; 1 where all were zero.
    fn scale(self, histogram: &Histogram) -> f32 {
        let largest = match self {
            Observer::MinMax => histogram.max(),
            Observer::Percentile(share) => histogram.percentile(share),
            Observer::LeastSquares => histogram.least_squares(127),
            Observer::Entropy => histogram.entropy(128),
        };
        if largest > 0.0 { (largest / 127.5).max(f32::MIN_POSITIVE) } else { 1.0 }
    }
}

/// The method.
#[derive(Clone, Copy, Debug, Default)]
pub struct W8a8 {
    options: W8a8Options,
    rtn: Rtn,
}

impl W8a8 {
    /// With these options.
    pub fn new(options: W8a8Options) -> Self {
        Self { options, rtn: Rtn::new(RtnOptions::default()) }
    }
}

impl Quantizer for W8a8 {
    fn name(&self) -> &'static str {
        "w8a8"
    }

    fn description(&self) -> &'static str {
        "8-bit weights and activations, smoothed by SmoothQuant"
    }

    fn needs(&self) -> Needs {
        match self.options.activations {
            Activations::Dynamic => Needs::NONE,
            Activations::Static(_) => Needs::HISTOGRAM,
        }
    }

    fn transforms(&self) -> Vec<Box<dyn Transform>> {
        let smooth = |alpha| {
            Box::new(SmoothQuant { alpha, outputs: self.options.smooth_outputs }) as Box<dyn Transform>
        };
        self.options.alpha.map(smooth).into_iter().collect()
    }

    fn layouts(&self) -> &'static [&'static str] {
        &["ct_int"]
    }

    fn input(&self, stats: &LayerStats) -> ActSpec {
        let grid = ActGrid::Int8;
        match self.options.activations {
            Activations::Dynamic => {
                let per = ActGroup::Token;
                ActSpec::Dynamic { grid, per, symmetric: true, outlier_threshold: None }
            }
            Activations::Static(observer) => {
                let scale = stats.histogram.as_ref().map_or(1.0, |histogram| observer.scale(histogram));
                ActSpec::Static { grid, scale, zero: 0 }
            }
        }
    }

    fn default_spec(&self) -> QuantSpec {
        QuantSpec { bits: 8, group: GroupSize::Row, ..QuantSpec::default() }
    }

    fn validate(&self, spec: &QuantSpec) -> Result<(), SpecError> {
        let option = |option, found: String, allowed| Err(SpecError::Option { option, found, allowed });
        if spec.bits != 8 {
            return Err(SpecError::Bits { found: spec.bits, allowed: &[8] });
        }
        if !spec.symmetric {
            return option("symmetric", "false".to_owned(), "true: integer products have no zero points");
        }
        match self.options.alpha {
            Some(alpha) if !(0.0..=1.0).contains(&alpha) => {
                return option("smooth", alpha.to_string(), "0 to 1");
            }
            _ => {}
        }
        match self.options.activations {
            Activations::Static(Observer::Percentile(share)) if !(share > 0.0 && share <= 1.0) => {
                option("percentile", (100.0 * share).to_string(), "above 0, at most 100")
            }
            _ => self.rtn.validate(spec),
        }
    }

    fn peak_bytes(&self, shapes: &[(usize, usize)], spec: &QuantSpec) -> usize {
        self.rtn.peak_bytes(shapes, spec)
    }

    fn quantize(
        &self,
        layers: Vec<LayerWeights>,
        stats: LayerStats,
    ) -> Result<Vec<Quantized>, QuantizeError> {
        self.rtn.quantize(layers, stats)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    #[test]
    fn static_scales_cover_what_the_observer_says() {
        // A thousand values up to 1, one of 100.
        let x = Array2::from_shape_fn(
            (1, 1001),
            |(_, i)| if i == 1000 { 100.0 } else { (i + 1) as f32 / 1000.0 },
        );
        let mut histogram = Histogram::default();
        histogram.accumulate(x.view());
        let of = |observer| {
            let options = W8a8Options { activations: Activations::Static(observer), ..Default::default() };
            let stats = LayerStats { histogram: Some(histogram.clone()), ..LayerStats::default() };
            match W8a8::new(options).input(&stats) {
                ActSpec::Static { grid: ActGrid::Int8, scale, zero: 0 } => 127.5 * scale,
                other => panic!("{other:?}"),
            }
        };
        assert!((of(Observer::MinMax) - 100.0).abs() < 1e-4);
        // A bin is 100 / 2048 wide.
        assert!((of(Observer::Percentile(0.999)) - 1.0).abs() < 0.05);
        assert!(of(Observer::Entropy) <= 100.0);
        assert!(matches!(W8a8::default().input(&LayerStats::default()), ActSpec::Dynamic { .. }));
    }

    #[test]
    fn specifications_are_checked() {
        let method = W8a8::default();
        let good = method.default_spec();
        assert!(method.validate(&good).is_ok());
        for bad in [QuantSpec { bits: 4, ..good }, QuantSpec { symmetric: false, ..good }] {
            assert!(method.validate(&bad).is_err(), "{bad:?}");
        }
        let alpha = W8a8Options { alpha: Some(1.5), ..Default::default() };
        let share = Activations::Static(Observer::Percentile(0.0));
        for options in [alpha, W8a8Options { activations: share, ..Default::default() }] {
            assert!(W8a8::new(options).validate(&good).is_err(), "{options:?}");
        }
    }
}
