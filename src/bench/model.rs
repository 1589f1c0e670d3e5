//! How fast a model runs.

use std::time::Instant;

use quant_model::Decoder;
use serde::Serialize;

use crate::error::Error;
use crate::system::peak_rss_bytes;

/// The speed of a model.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// How products were computed.
    pub compute: &'static str,
    /// Bytes of all weights in memory.
    pub weight_bytes: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Median over the repetitions.
    pub prompt_tokens_per_second: f64,
    /// Tokens generated after it.
    pub generate_tokens: usize,
    /// Median over the repetitions.
    pub generate_tokens_per_second: f64,
    /// Weights and cache read while generating, GB/s: everything but the embedding, once a token.
    pub effective_gb_s: f64,
    /// Multiplications and additions by the weights of the blocks while reading the prompt, 10^12 a second.
    pub effective_tops: f64,
    /// Bytes of keys and values at the end.
    pub cache_bytes: usize,
    /// Peak of resident memory so far.
    pub peak_rss_bytes: u64,
}

/// Reads a prompt of random tokens and generates greedily, `repeat` times and once before to warm up.
pub fn bench_model(model: &Decoder, prompt: usize, generate: usize, repeat: usize) -> Result<Speed, Error> {
    let vocab = model.spec().vocab_size as u64;
    let ids: Vec<u32> = (0..prompt.max(1) as u64).map(|i| ((i * 7919 + 13) % vocab) as u32).collect();
    let (mut reading, mut generating, mut cache_bytes) = (Vec::new(), Vec::new(), 0);
    for round in 0..=repeat.max(1) {
        let mut cache = model.new_cache();
        let start = Instant::now();
        let mut logits = model.next_logits(&ids, &mut cache)?;
        let read = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for _ in 0..generate {
            let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
            logits = model.next_logits(&[best.unwrap_or(0) as u32], &mut cache)?;
        }
        if round > 0 {
            reading.push(read);
            generating.push(start.elapsed().as_secs_f64());
        }
        cache_bytes = cache.bytes();
    }
    let memory = model.memory_footprint();
    let [read, generated] = [reading, generating].map(median);
    let rate = |count: usize, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    // On average half of what the generated tokens add is read, too; the cache's share is that of its middle.
    let positions = prompt + generate / 2;
    let of_cache = cache_bytes as f64 * positions as f64 / (prompt + generate).max(1) as f64;
    // A tied head is the embedding.
    let head = if model.spec().tied_embeddings { memory.embedding } else { memory.head };
    let per_token = (memory.blocks + head) as f64 + of_cache;
    let spec = model.spec();
    let weights: usize = spec.linears().map(|l| l.out_features * l.in_features).sum();
    let generate_rate = rate(generate, generated);
    Ok(Speed {
        compute: model.compute().name(),
        weight_bytes: memory.total(),
        prompt_tokens: ids.len(),
        prompt_tokens_per_second: rate(ids.len(), read),
        generate_tokens: generate,
        generate_tokens_per_second: generate_rate,
        effective_gb_s: per_token * generate_rate / 1e9,
        effective_tops: 2.0 * (weights * spec.layers) as f64 * rate(ids.len(), read) / 1e12,
        cache_bytes,
        peak_rss_bytes: peak_rss_bytes(),
    })
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
