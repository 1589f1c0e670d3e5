//! Which rows of queries and keys belong together.

use ndarray::ArrayView2;

use super::codes::Correlation;

/// A rotary embedding turns two rows of a head, `a` and `b`, by one angle. The score of two tokens at a distance is
/// `(q_a k_a + q_b k_b) cos + (q_b k_a - q_a k_b) sin`, and training leaves little of the second term, which would make
/// a head look sideways: `q_a k_b` and `q_b k_a` come out alike, and so do `q_a k_a` and `q_b k_b`, which training moves
/// together. For rows that are not turned together neither holds.
///
/// The pairs are rows `i` and `i + dim/2` in the half-split order of Hugging Face, `2i` and `2i + 1` in the interleaved
/// one.
#[derive(Debug, Default)]
pub(super) struct RotaryStatistics {
    halves: Pairs,
    neighbours: Pairs,
}

/// Products of the rows of pairs: `(q_a k_a, q_b k_b)` less their means in the head, and `(q_a k_b, q_b k_a)`.
#[derive(Debug, Default)]
struct Pairs {
    same: Vec<(f64, f64)>,
    crossed: Vec<(f64, f64)>,
}

impl Pairs {
    /// Adds the pairs `(a, b)` of a head.
    fn add(&mut self, q: &[Vec<f64>], k: &[Vec<f64>], pairs: impl Iterator<Item = (usize, usize)>) {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut same = Vec::new();
        for (a, b) in pairs {
            same.push((dot(&q[a], &k[a]), dot(&q[b], &k[b])));
            self.crossed.push((dot(&q[a], &k[b]), dot(&q[b], &k[a])));
        }
        // What all rows of a head have in common says nothing about pairs.
        let n = same.len().max(1) as f64;
        let (ma, mb) = (same.iter().map(|p| p.0).sum::<f64>() / n, same.iter().map(|p| p.1).sum::<f64>() / n);
        self.same.extend(same.into_iter().map(|(a, b)| (a - ma, b - mb)));
    }

    fn value(&self) -> f64 {
        let of = |pairs: &[(f64, f64)]| Correlation::of(pairs.iter().copied()).value;
        (of(&self.same) + of(&self.crossed)) / 2.0
    }
}

impl RotaryStatistics {
    /// Adds a layer. `q`: `[heads * dim, in]`, `k`: `[kv_heads * dim, in]`, `norm`: `[in]`, what inputs are multiplied
    /// with before.
    pub(super) fn add(&mut self, q: ArrayView2<'_, f32>, k: ArrayView2<'_, f32>, norm: &[f32], dim: usize) {
        let rows = |w: ArrayView2<'_, f32>| -> Vec<Vec<f64>> {
            let scaled = |row: ndarray::ArrayView1<'_, f32>| {
                let row: Vec<f64> =
                    row.iter().zip(norm).map(|(&x, &n)| f64::from(x) * f64::from(n)).collect();
                let size = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
                row.into_iter().map(|x| x / size).collect()
            };
            w.rows().into_iter().map(scaled).collect()
        };
        let (q, k) = (rows(q), rows(k));
        let group = (q.len() / k.len().max(1)).max(1);
        for (head, q) in q.chunks_exact(dim).enumerate() {
            let Some(k) = k.chunks_exact(dim).nth(head / group) else { return };
            self.halves.add(q, k, (0..dim / 2).map(|i| (i, i + dim / 2)));
            self.neighbours.add(q, k, (0..dim / 2).map(|i| (2 * i, 2 * i + 1)));
        }
    }

    /// How alike the products of rows `i` and `i + dim/2` are: near 1 for pairs of a trained model.
    pub(super) fn halves(&self) -> f64 {
        self.halves.value()
    }

    /// The same of rows `2i` and `2i + 1`.
    pub(super) fn neighbours(&self) -> f64 {
        self.neighbours.value()
    }

    /// Random and barely trained weights show neither order.
    pub(super) fn is_interleaved(&self) -> bool {
        self.halves.crossed.len() >= 64 && self.neighbours() > 0.35 && self.halves() < 0.2
    }
}
