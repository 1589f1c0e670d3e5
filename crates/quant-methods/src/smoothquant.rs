//! SmoothQuant: outliers of activations moved into the weights, where they are easier to round.
//!
//! Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
//! Language Models", 2022. Inputs behind a norm are divided by
//!
//! ```text
//! s_k = max|x_k|^α / max|w_k|^(1-α)            α: migration strength
//! ```
//!
//! with `w_k` the column `k` of all linears that share the input. The reference leaves attention's and the MLP's projections
//! back as they are; [`SmoothQuant::outputs`] smooths their inputs, too, and value and up projections take up the factors.

use ndarray::Axis;
use quant_core::Producer;
use quant_math::range::power;

use crate::stats::Needs;
use crate::transform::{Stage, StageRunner, Stopped, Transform};

/// The transform.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SmoothQuant {
    /// Migration strength `α`, 0 to 1: how much of the difficulty moves into the weights.
    pub alpha: f32,
    /// Smooth inputs that other linears make, too, not only those behind norms.
    pub outputs: bool,
}

impl SmoothQuant {
    /// The usual strength: half of the difficulty.
    pub const ALPHA: f32 = 0.5;
}

impl Transform for SmoothQuant {
    fn name(&self) -> &'static str {
        "smoothquant"
    }

    fn needs(&self) -> Needs {
        Needs::MAGNITUDES
    }

    fn sample_tokens(&self) -> usize {
        0
    }

    fn candidates(&self) -> usize {
        0
    }

    fn covers(&self, producer: &Producer) -> bool {
        match producer {
            Producer::Norm(_) => true,
            Producer::Outputs { .. } => self.outputs,
            Producer::Fixed { .. } => false,
        }
    }

    fn scales(&self, stage: &Stage<'_>, _: &mut dyn StageRunner) -> Result<Option<Vec<f32>>, Stopped> {
        let Some(magnitudes) = stage.magnitudes else { return Ok(None) };
        let mut weights = vec![0.0f32; magnitudes.max.len()];
        for row in stage.weights.iter().flat_map(|w| w.axis_iter(Axis(0))) {
            weights.iter_mut().zip(row).for_each(|(max, w)| *max = max.max(w.abs()));
        }
        let mut activations = magnitudes.max.clone();
        let largest = |values: &[f32]| values.iter().copied().fold(0.0, f32::max);
        stage.share(&mut activations, largest);
        stage.share(&mut weights, largest);
        Ok(Some(migration(&activations, &weights, self.alpha)))
    }
}

/// Factors that divide the inputs. `activations`, `weights`: largest magnitudes of each feature, `[in]`.
fn migration(activations: &[f32], weights: &[f32], alpha: f32) -> Vec<f32> {
    // Numbers of the reference, for features that are never active or have no weights.
    const LEAST: f32 = 1e-5;
    let each = activations.iter().zip(weights);
    each.map(|(&a, &w)| (power(a.max(LEAST), alpha) / power(w.max(LEAST), 1.0 - alpha)).max(LEAST)).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};

    use super::*;
    use crate::stats::Magnitudes;

    struct Never;

    impl StageRunner for Never {
        fn loss(&mut self, _: Vec<Array2<f32>>) -> Result<f64, Stopped> {
            panic!("nothing is tried")
        }
    }

    #[test]
    fn the_difficulty_is_shared() {
        let weights = [array![[1.0f32, -0.25], [0.5, 0.0]], array![[-4.0f32, 0.125]]];
        let magnitudes = Magnitudes { mean: vec![1.0, 1.0], max: vec![16.0, 9.0] };
        let producer = Producer::Fixed { because: "a test" };
        let stage =
            Stage { weights: &weights, specs: &[], producer: &producer, magnitudes: Some(&magnitudes) };
        let found = SmoothQuant { alpha: 0.5, outputs: false }.scales(&stage, &mut Never).unwrap().unwrap();
        // 4 / 2, and 3 / 0.5: afterwards both reach the same magnitude, 8 and 1.5.
        for (found, exact) in found.iter().zip([2.0, 6.0]) {
            assert!((found - exact).abs() < 2e-5 * exact, "{found} {exact}");
        }
        // Both inputs are made by one row: the largest magnitudes are 16 and 4.
        let producer = Producer::Outputs { slot: 0, rows: vec![0, 0] };
        let stage = Stage { producer: &producer, ..stage };
        let method = SmoothQuant { alpha: 0.5, outputs: true };
        let found = method.scales(&stage, &mut Never).unwrap().unwrap();
        assert!(found[0] == found[1] && (found[0] - 2.0).abs() < 4e-5, "{found:?}");
        assert!(method.covers(&producer) && !SmoothQuant { outputs: false, ..method }.covers(&producer));
        assert!(migration(&[0.0], &[0.0], 0.5)[0] >= 0.9, "a dead feature stays");
    }
}
