//! Speed of GGUF: `cargo run --release -p quant-formats --example gguf [MODEL.gguf]`
//!
//! Reads and writes blocks of every type on one thread, in GB of blocks per second, and says how long a model takes
//! to open.
#![expect(clippy::print_stdout, reason = "a report")]

use std::collections::BTreeMap;
use std::time::Instant;

use quant_core::{DType, DenseTensor};
use quant_formats::{Checkpoint, GgmlType, gguf_layout, layout};

/// `[out, in]` of the layer.
const SHAPE: (usize, usize) = (4096, 4096);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(path) = std::env::args().nth(1) {
        let start = Instant::now();
        let checkpoint = Checkpoint::open(&path)?;
        let seconds = start.elapsed().as_secs_f64();
        println!("{path}: {:.2} GB opened in {seconds:.3} s", checkpoint.tensor_bytes() as f64 / 1e9);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let types = [
        "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
        "mxfp4",
    ];
    for name in types {
        let ty = GgmlType::from_name(name).ok_or("a type")?;
        let row = SHAPE.1 / ty.block_len() * ty.block_bytes();
        let bytes: Vec<u8> = (0..SHAPE.0 * row).map(|i| ((i * 73) >> 3) as u8).collect();
        let tensor = DenseTensor::new(DType::U8, vec![SHAPE.0, row], bytes)?;
        let source: BTreeMap<_, _> = [(format!("m.{name}"), tensor)].into();
        let reader = layout("gguf")?.reader(&serde_json::Value::Null)?;
        let writer = gguf_layout(ty).ok_or("a layout")?;
        let best = |work: &mut dyn FnMut()| {
            let times = (0..5).map(|_| {
                let start = Instant::now();
                work();
                start.elapsed().as_secs_f64()
            });
            (SHAPE.0 * row) as f64 / 1e9 / times.fold(f64::MAX, f64::min)
        };
        let linear = reader.read(&source, "m")?;
        let read = pool.install(|| best(&mut || drop(reader.read(&source, "m"))));
        let write = pool.install(|| best(&mut || drop(writer.write(&linear, "m"))));
        println!("{name:7} read {read:5.2} GB/s  write {write:5.2} GB/s of blocks, one thread");
    }
    Ok(())
}
