//! Writes checkpoints with random weights.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use quant_testkit::synthetic::{self, Arch, Checkpoint, Shape, Storage};

/// Write a Hugging Face checkpoint of any shape with random weights.
#[derive(Parser)]
#[command(
    name = "synth",
    after_help = "Examples:\n  synth --shape llama-8b-l8 --out model --ids-out ids.npy\n  \
                  synth --shape gpt2 --dtype f32 --tokenizer assets/gpt2 --out model"
)]
struct Args {
    /// Sizes to start from; the options below change them.
    #[arg(long, value_parser = named_shape, default_value = "llama-1.1b",
          help = format!("Sizes to start from [{}]", Shape::NAMED.map(|(name, _)| name).join(", ")))]
    shape: Shape,
    /// Folder to write; it must be empty or absent.
    #[arg(long)]
    out: PathBuf,
    /// Architecture.
    #[arg(long)]
    arch: Option<ArchName>,
    /// Width of the residual stream.
    #[arg(long)]
    hidden: Option<usize>,
    /// Number of blocks.
    #[arg(long)]
    layers: Option<usize>,
    /// Width of the feed-forward part.
    #[arg(long)]
    ffn: Option<usize>,
    /// Query heads.
    #[arg(long)]
    heads: Option<usize>,
    /// Key and value heads.
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Features per head.
    #[arg(long)]
    head_dim: Option<usize>,
    /// Tokens.
    #[arg(long)]
    vocab: Option<usize>,
    /// Longest sequence.
    #[arg(long)]
    positions: Option<usize>,
    /// The output layer shares the embedding.
    #[arg(long)]
    tied: bool,
    /// Element type of the weights.
    #[arg(long, default_value = "bf16")]
    dtype: DtypeName,
    /// Seed of all values.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Largest file, in bytes of tensors.
    #[arg(long, default_value_t = 5_000_000_000)]
    shard_size: u64,
    /// Folder whose tokenizer files are copied.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Also write random token ids, int32 `[samples, seq-len]`.
    #[arg(long)]
    ids_out: Option<PathBuf>,
    /// Rows of ids.
    #[arg(long, default_value_t = 16)]
    samples: usize,
    /// Ids per row.
    #[arg(long, default_value_t = 512)]
    seq_len: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum ArchName {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gpt2,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeName {
    Bf16,
    F16,
    F32,
}

fn named_shape(name: &str) -> Result<Shape, String> {
    let found = Shape::NAMED.iter().find(|(known, _)| *known == name).map(|(_, shape)| *shape);
    found.ok_or_else(|| format!("known shapes: {}", Shape::NAMED.map(|(name, _)| name).join(", ")))
}

impl Args {
    fn shape(&self) -> Shape {
        let base = self.shape;
        let heads = self.heads.unwrap_or(base.heads);
        let hidden = self.hidden.unwrap_or(base.hidden);
        let resized = self.hidden.is_some() || self.heads.is_some();
        Shape {
            arch: match self.arch {
                None => base.arch,
                Some(ArchName::Llama) => Arch::Llama,
                Some(ArchName::Mistral) => Arch::Mistral,
                Some(ArchName::Qwen2) => Arch::Qwen2,
                Some(ArchName::Qwen3) => Arch::Qwen3,
                Some(ArchName::Gpt2) => Arch::Gpt2,
            },
            hidden,
            layers: self.layers.unwrap_or(base.layers),
            ffn: self.ffn.unwrap_or(base.ffn),
            heads,
            kv_heads: self.kv_heads.unwrap_or(base.kv_heads.min(heads)),
            head_dim: self.head_dim.unwrap_or(if resized { hidden / heads.max(1) } else { base.head_dim }),
            vocab: self.vocab.unwrap_or(base.vocab),
            positions: self.positions.unwrap_or(base.positions),
            rope_theta: base.rope_theta,
            tied: self.tied || base.tied,
        }
    }
}

fn copy_tokenizer(from: &Path, to: &Path) -> io::Result<()> {
    const FILES: [&str; 6] = [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    ];
    for name in FILES.into_iter().filter(|name| from.join(name).exists()) {
        fs::write(to.join(name), fs::read(from.join(name))?)?;
    }
    Ok(())
}

fn run(args: &Args) -> io::Result<()> {
    let storage = match args.dtype {
        DtypeName::Bf16 => Storage::Bf16,
        DtypeName::F16 => Storage::F16,
        DtypeName::F32 => Storage::F32,
    };
    let shape = args.shape();
    let checkpoint = Checkpoint { shape, storage, seed: args.seed, shard_bytes: args.shard_size };
    checkpoint.write(&args.out)?;
    if let Some(from) = &args.tokenizer {
        copy_tokenizer(from, &args.out)?;
    }
    if let Some(file) = &args.ids_out {
        let ids = synthetic::random_ids(args.seed, args.samples, args.seq_len, shape.vocab);
        synthetic::write_npy(file, [args.samples, args.seq_len], &ids)?;
    }
    eprintln!("{}: {} parameters", args.out.display(), checkpoint.parameters());
    Ok(())
}

fn main() -> std::process::ExitCode {
    match run(&Args::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
