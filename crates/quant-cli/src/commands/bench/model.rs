//! `quant bench model`.

use clap::Args;
use clap::builder::PossibleValuesParser;
use quant::{
    GroupSize, Machine, Model, RandomLayout, RandomWeights, SHAPES, Shape, Speed, bench_model, synthetic,
};
use serde::Serialize;

use crate::commands::{Compute, model_path};
use crate::failure::Failure;
use crate::output::{Output, Table};
use crate::size::show;

/// Speed of reading a prompt and of generating, beside what the machine can do at most
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant bench model --synthetic llama-1.1b --bits 4 --group-size 128\n  \
    quant bench model models/llama-4bit --prompt 512 --generate 64 --threads 2 --json")]
pub(super) struct BenchModel {
    /// Model directory, float or quantized, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL", required_unless_present = "synthetic", conflicts_with = "synthetic")]
    model: Option<String>,
    /// Shape of a model with random weights instead
    #[arg(long, value_name = "SHAPE", value_parser = PossibleValuesParser::new(SHAPES.map(|shape| shape.name)))]
    synthetic: Option<String>,
    /// Grid of the random weights: that of this layout
    #[arg(long, default_value = "gptq", value_name = "LAYOUT", conflicts_with = "model",
        value_parser = PossibleValuesParser::new(RandomLayout::ALL.map(RandomLayout::name)))]
    layout: String,
    /// Bits of the random weights, those of embedding and head included
    #[arg(long, short, default_value_t = 4, conflicts_with = "model",
        value_parser = clap::value_parser!(u8).range(1..=8))]
    bits: u8,
    /// Random weights that share a scale; -1 or row for whole rows
    #[arg(
        long,
        short,
        default_value = "128",
        value_name = "N",
        conflicts_with = "model",
        allow_hyphen_values = true
    )]
    group_size: GroupSize,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_name = "N")]
    prompt: usize,
    /// Tokens generated after it
    #[arg(long, default_value_t = 64, value_name = "N")]
    generate: usize,
    /// Measured rounds, of which the median counts
    #[arg(long, default_value_t = 3, value_name = "N")]
    repeat: usize,
    /// How products are computed
    #[arg(long, value_enum, default_value = "fast")]
    compute: Compute,
}

/// The JSON result.
#[derive(Serialize)]
struct Report {
    shape: String,
    layout: String,
    bits: f64,
    group_size: i64,
    threads: usize,
    load_seconds: f64,
    #[serde(flatten)]
    speed: Speed,
    machine: Machine,
}

impl BenchModel {
    pub(super) fn run(&self, output: Output) -> Result<(), Failure> {
        let start = std::time::Instant::now();
        let (description, load_seconds, speed) = match (&self.model, &self.synthetic) {
            (Some(name), _) => {
                let path = model_path(name)?;
                let inspection = quant::inspect(&path)?;
                let mut model = Model::open(&path)?;
                let load_seconds = start.elapsed().as_secs_f64();
                model.set_compute(self.compute.into());
                let speed = bench_model(model.decoder(), self.prompt, self.generate, self.repeat)?;
                let made = inspection.quantization;
                let description = Description {
                    shape: name.clone(),
                    layout: inspection.layout.unwrap_or_else(|| "float".to_owned()),
                    bits: made.map_or(inspection.bits_per_weight, |made| f64::from(made.bits)),
                    group_size: made.map_or(-1, |made| made.group_size),
                };
                (description, load_seconds, speed)
            }
            (None, name) => {
                let shape = name.as_deref().and_then(Shape::find);
                let shape = shape.ok_or_else(|| Failure::Usage("give MODEL or --synthetic".to_owned()))?;
                let layout = RandomLayout::ALL.into_iter().find(|layout| layout.name() == self.layout);
                let layout = layout.expect("checked where arguments are read");
                let weights = RandomWeights { layout, bits: self.bits, group: self.group_size };
                let mut model = synthetic(&shape, weights)?;
                let load_seconds = start.elapsed().as_secs_f64();
                model.set_compute(self.compute.into());
                let speed = bench_model(&model, self.prompt, self.generate, self.repeat)?;
                let description = Description {
                    shape: shape.name.to_owned(),
                    layout: self.layout.clone(),
                    bits: f64::from(self.bits),
                    group_size: self.group_size.as_config(),
                };
                (description, load_seconds, speed)
            }
        };
        let Description { shape, layout, bits, group_size } = description;
        let machine = Machine::measure();
        let threads = machine.threads;
        let report = Report { shape, layout, bits, group_size, threads, load_seconds, speed, machine };
        output.result(&report, || report.table().to_string())
    }
}

/// What was measured.
struct Description {
    shape: String,
    layout: String,
    bits: f64,
    group_size: i64,
}

impl Report {
    fn table(&self) -> Table {
        let (speed, machine) = (&self.speed, &self.machine);
        let mut table = Table::plain();
        table.pair(
            "model",
            format!("{}, {}, {} bits, groups of {}", self.shape, self.layout, self.bits, self.group_size),
        );
        table.pair("compute", format!("{}, {} threads, {}", speed.compute, self.threads, machine.isa));
        let share = |part: f64, whole: f64| if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
        let of_roof = |tops: f64| format!(", {:.0}% of {tops:.2}", share(speed.effective_tops, tops));
        let prompt = format!(
            "{:.1} tokens a second ({} tokens), {:.2} TOPS{}",
            speed.prompt_tokens_per_second,
            speed.prompt_tokens,
            speed.effective_tops,
            of_roof(machine.int8_tops),
        );
        table.pair("prompt", prompt);
        table.pair(
            "generation",
            format!(
                "{:.1} tokens a second ({} tokens), {:.1} GB/s, {:.0}% of {:.1}",
                speed.generate_tokens_per_second,
                speed.generate_tokens,
                speed.effective_gb_s,
                share(speed.effective_gb_s, machine.read_gb_s),
                machine.read_gb_s,
            ),
        );
        table.pair(
            "memory",
            format!(
                "weights {}, cache {}, peak {}",
                show(speed.weight_bytes as u64),
                show(speed.cache_bytes as u64),
                show(speed.peak_rss_bytes),
            ),
        );
        table.pair("loading", format!("{:.2} s", self.load_seconds));
        table
    }
}
