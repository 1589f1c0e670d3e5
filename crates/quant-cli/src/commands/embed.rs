//! `quant embed`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use ndarray::Array2;
use quant::{Embedder, Pooling};
use serde::Serialize;

use super::model_path;
use crate::failure::Failure;
use crate::output::Output;

/// Texts that are held in memory at a time, with their vectors.
const BATCH: usize = 256;

/// Turn texts into vectors
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant embed models/all-MiniLM-L6-v2 --text \"a cat sits on the mat\"\n  \
    quant embed models/bge-small --file lines.txt --normalize --format npy --out vectors.npy")]
pub(crate) struct Embed {
    /// Model directory, an encoder or a decoder, or a name in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// A text; may be given again
    #[arg(long, short, value_name = "TEXT", required_unless_present = "file", conflicts_with = "file")]
    text: Vec<String>,
    /// File with a text on each line
    #[arg(long, short, value_name = "LINES")]
    file: Option<PathBuf>,
    /// How the vectors of tokens become one [default: what the model's files ask for; else the mean, in a decoder the
    /// last token]
    #[arg(long, value_enum)]
    pooling: Option<PoolingOption>,
    /// Scale vectors to length 1 even if the model's files do not ask for it
    #[arg(long)]
    normalize: bool,
    /// How vectors are written
    #[arg(long, value_enum, default_value = "jsonl")]
    format: Format,
    /// File to write [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// How the vectors of tokens become one.
#[derive(Clone, Copy, ValueEnum)]
enum PoolingOption {
    /// Their mean
    Mean,
    /// The first token
    Cls,
    /// The last token
    Last,
}

/// How vectors are written.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    /// A JSON array on each line
    Jsonl,
    /// One NumPy file of f32 [texts, hidden]
    Npy,
}

/// The JSON result.
#[derive(Serialize)]
struct Report {
    texts: usize,
    tokens: usize,
    hidden_size: usize,
    pooling: &'static str,
    normalize: bool,
    /// Texts that lost their ends.
    cut: usize,
    seconds: f64,
    /// Absent where they went to a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    embeddings: Option<Vec<Vec<f32>>>,
}

impl Embed {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let to_terminal = self.out.is_none() && std::io::stdout().is_terminal();
        if self.format == Format::Npy && (output.json || to_terminal) && self.out.is_none() {
            return Err(Failure::Usage("--format npy is binary: give a file with --out".to_owned()));
        }
        let pooling = self.pooling.map(|pooling| match pooling {
            PoolingOption::Mean => Pooling::Mean,
            PoolingOption::Cls => Pooling::Cls,
            PoolingOption::Last => Pooling::Last,
        });
        let mut embedder = Embedder::open(&model_path(&self.model)?, pooling)?;
        embedder.normalize |= self.normalize;
        let texts = match &self.file {
            None => self.text.clone(),
            Some(file) => {
                let text = std::fs::read_to_string(file).map_err(|e| quant::Error::io(file, e))?;
                text.lines().map(str::to_owned).collect()
            }
        };
        let start = Instant::now();
        let mut report = Report {
            texts: texts.len(),
            tokens: 0,
            hidden_size: 0,
            pooling: match embedder.pooling {
                Pooling::Mean => "mean",
                Pooling::Cls => "cls",
                Pooling::Last => "last",
            },
            normalize: embedder.normalize,
            cut: 0,
            seconds: 0.0,
            embeddings: (output.json && self.out.is_none()).then(Vec::new),
        };
        let mut sink = Sink::new(self, output)?;
        for batch in texts.chunks(BATCH) {
            let found = embedder.embed(batch)?;
            report.tokens += found.tokens;
            report.cut += found.cut;
            report.hidden_size = found.vectors.ncols();
            if let Some(all) = &mut report.embeddings {
                all.extend(found.vectors.rows().into_iter().map(|row| row.to_vec()));
            }
            sink.write(&found.vectors)?;
        }
        sink.finish()?;
        report.seconds = start.elapsed().as_secs_f64();
        if report.cut > 0 {
            output.note(format!("{} texts were cut to {} tokens", report.cut, embedder.max_tokens));
        }
        if output.json { output.result(&report, String::new) } else { Ok(()) }
    }
}

/// Where vectors go.
struct Sink<'a> {
    options: &'a Embed,
    /// With `--json` and without `--out` they are in the report.
    silent: bool,
    bytes: Vec<u8>,
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl<'a> Sink<'a> {
    fn new(options: &'a Embed, output: Output) -> Result<Self, Failure> {
        let silent = output.json && options.out.is_none();
        Ok(Self { options, silent, bytes: Vec::new(), rows: 0, cols: 0, values: Vec::new() })
    }

    fn write(&mut self, vectors: &Array2<f32>) -> Result<(), Failure> {
        if self.silent {
            return Ok(());
        }
        self.rows += vectors.nrows();
        self.cols = vectors.ncols();
        match self.options.format {
            Format::Npy => self.values.extend(vectors),
            Format::Jsonl => {
                for row in vectors.rows() {
                    let line = serde_json::to_string(&row.to_vec()).expect("numbers are plain data");
                    self.bytes.extend(line.as_bytes());
                    self.bytes.push(b'\n');
                }
                if self.options.out.is_none() {
                    self.print()?;
                }
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), Failure> {
        if self.silent {
            return Ok(());
        }
        if self.options.format == Format::Npy {
            self.bytes = quant::npy_f32([self.rows, self.cols], &self.values);
        }
        match &self.options.out {
            None => self.print(),
            Some(file) => Ok(quant::write_file(file, &self.bytes).map_err(quant::Error::from)?),
        }
    }

    fn print(&mut self) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        out.write_all(&self.bytes).and_then(|()| out.flush()).map_err(Failure::stdout)?;
        self.bytes.clear();
        Ok(())
    }
}
