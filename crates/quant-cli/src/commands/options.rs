//! Options that `quantize` and `plan` share.

mod library;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use quant::{
    Activations, AwqOptions, CalibrationSource, ColumnOrder, Compat, GptqOptions, GroupSize, MethodOptions,
    NonFinite, Observer, QuantizeConfig, W8a8Options,
};
use regex::Regex;

use self::library::{BnbArgs, HqqArgs, QuantoArgs, SinqArgs};
use crate::failure::Failure;
use crate::size;

/// How to quantize.
#[derive(Args)]
pub(crate) struct QuantizeOptions {
    /// Method; `quant list methods` tells them all [default: gptq, or that of --type]
    #[arg(long, short, value_name = "NAME")]
    method: Option<String>,
    /// Bits per weight code [default: 4, or the method's own]
    #[arg(long, short)]
    bits: Option<u8>,
    /// Weights that share a scale; -1 or row for whole rows [default: 128, or the method's own]
    #[arg(long, short, value_name = "N", allow_hyphen_values = true)]
    group_size: Option<GroupSize>,
    /// Symmetric grids around zero [default for gptq]
    #[arg(long, conflicts_with = "asym")]
    sym: bool,
    /// Grids with a zero point
    #[arg(long)]
    asym: bool,
    /// Rewrite the model first so that it is easier to quantize: awq-scale, smoothquant, or none; may be given again
    /// [default: the method's own]
    #[arg(long, value_name = "NAME")]
    transform: Vec<String>,
    /// Layout of the output [default: the method's own]; `quant list layouts`
    #[arg(long, value_name = "LAYOUT")]
    format: Option<String>,
    /// Type of the blocks of a GGUF file, such as q4_0; without --method it is rounded as llama.cpp does
    #[arg(long, value_name = "TYPE", requires = "format")]
    r#type: Option<String>,
    /// Calibration text (.txt, .jsonl) or token ids (.npy) [default: a small built-in text]
    #[arg(long, value_name = "FILE", help_heading = "Calibration")]
    calibration: Option<PathBuf>,
    /// Calibration samples at most
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = "Calibration")]
    samples: usize,
    /// Tokens per calibration sample
    #[arg(long, default_value_t = 512, value_name = "N", help_heading = "Calibration")]
    seq_len: usize,
    /// Chooses among the samples of a long text
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Calibration")]
    seed: u64,
    /// Quantize only modules whose path matches; may be given again
    #[arg(long, value_name = "REGEX")]
    include: Vec<Regex>,
    /// Leave modules whose path matches in float; may be given again
    #[arg(long, value_name = "REGEX")]
    exclude: Vec<Regex>,
    /// Memory to stay below, such as 4GiB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    max_memory: Option<u64>,
    /// Largest output file
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "5GB")]
    shard_size: u64,
    /// What to do with weights that are NaN or infinite
    #[arg(long, value_enum, default_value = "refuse")]
    nan: Nan,
    /// Round columns by activity; groups then need an index (GPTQ)
    #[arg(long, conflicts_with = "act_group_aware", help_heading = "GPTQ")]
    desc_act: bool,
    /// Order groups by activity [default]
    #[arg(long, overrides_with = "no_act_group_aware", help_heading = "GPTQ")]
    act_group_aware: bool,
    /// Round columns as stored
    #[arg(long, help_heading = "GPTQ")]
    no_act_group_aware: bool,
    /// Fit all groups before the first column is rounded
    #[arg(long, help_heading = "GPTQ")]
    static_groups: bool,
    /// Shrink ranges for the least error of this norm; 0 is off [default: 2.4; off with --compat]
    #[arg(long, value_name = "NORM", help_heading = "GPTQ")]
    mse: Option<f32>,
    /// Damping, as a fraction of the mean of the Hessian's diagonal
    #[arg(long, default_value_t = GptqOptions::default().damp, value_name = "SHARE", help_heading = "GPTQ")]
    damp: f64,
    /// Columns per block of the lazy update
    #[arg(long, default_value_t = GptqOptions::default().block_size, value_name = "N", help_heading = "GPTQ")]
    block_size: usize,
    /// Observe each layer behind the quantized layers before it in its block [default]
    #[arg(long, overrides_with = "no_true_sequential", help_heading = "GPTQ")]
    true_sequential: bool,
    /// Observe all layers of a block before the first is quantized
    #[arg(long, help_heading = "GPTQ")]
    no_true_sequential: bool,
    /// Reproduce the codes of another implementation of the method
    #[arg(long, value_enum)]
    compat: Option<CompatName>,
    /// Exponents tried in the search for factors of inputs
    #[arg(long, default_value_t = AwqOptions::default().steps, value_name = "N", help_heading = "AWQ")]
    n_grid: usize,
    /// Choose factors of inputs by activations alone, without the weights
    #[arg(long, help_heading = "AWQ")]
    no_duo_scaling: bool,
    /// Keep the whole range of each group
    #[arg(long, help_heading = "AWQ")]
    no_clip: bool,
    /// Calibration tokens on which factors of inputs are tried
    #[arg(long, default_value_t = AwqOptions::default().tokens, value_name = "N", help_heading = "AWQ")]
    search_tokens: usize,
    /// Migration strength of SmoothQuant, 0 to 1: how much of the difficulty moves from activations into weights; off
    /// leaves them as they are [default: 0.5]
    #[arg(long, value_name = "ALPHA", value_parser = smooth, help_heading = "W8A8")]
    smooth: Option<Smooth>,
    /// Smooth inputs behind norms only, not those of attention's and the MLP's projections back
    #[arg(long, help_heading = "W8A8")]
    no_smooth_outputs: bool,
    /// Where the scale of static activations comes from; without it each token has its own at run time
    #[arg(long, value_enum, value_name = "OBSERVER", help_heading = "W8A8")]
    static_activations: Option<ObserverName>,
    /// Percentile of the observer of that name
    #[arg(long, default_value_t = 99.99, value_name = "PERCENT", help_heading = "W8A8")]
    percentile: f64,
    #[command(flatten)]
    hqq: HqqArgs,
    #[command(flatten)]
    sinq: SinqArgs,
    #[command(flatten)]
    bnb: BnbArgs,
    #[command(flatten)]
    quanto: QuantoArgs,
}

/// A migration strength, or none.
#[derive(Clone, Copy)]
struct Smooth(Option<f32>);

fn smooth(text: &str) -> Result<Smooth, String> {
    match text {
        "off" => Ok(Smooth(None)),
        text => text.parse().map(|alpha| Smooth(Some(alpha))).map_err(|_| "a number, or off".to_owned()),
    }
}

/// Observers of activations.
#[derive(Clone, Copy, ValueEnum)]
enum ObserverName {
    /// The largest value
    Minmax,
    /// A percentile of the values
    Percentile,
    /// Least squared error
    Mse,
    /// Least loss of information
    Entropy,
}

/// What to do with NaN and infinity.
#[derive(Clone, Copy, ValueEnum)]
enum Nan {
    /// Stop and name the first
    Refuse,
    /// Replace them with zero and count them
    Zero,
}

/// Implementations that can be reproduced.
#[derive(Clone, Copy, ValueEnum)]
enum CompatName {
    /// GPTQModel 7 (gptq)
    Gptqmodel,
    /// hqq 0.2.8 (hqq)
    Hqq,
    /// sinq 0.2.0 (sinq)
    Sinq,
    /// optimum-quanto 0.2.7 (quanto)
    Quanto,
}

impl CompatName {
    /// The method whose codes it reproduces.
    fn method(self) -> &'static str {
        match self {
            CompatName::Gptqmodel => "gptq",
            CompatName::Hqq => "hqq",
            CompatName::Sinq => "sinq",
            CompatName::Quanto => "quanto",
        }
    }
}

impl QuantizeOptions {
    /// The configuration, checked as far as it can be without a model.
    pub(crate) fn config(&self, overwrite: bool) -> Result<QuantizeConfig, Failure> {
        let order = match (self.desc_act, self.no_act_group_aware) {
            (true, _) => ColumnOrder::Activation,
            (false, true) => ColumnOrder::Natural,
            (false, false) => ColumnOrder::GroupAware,
        };
        let method = self.method.as_deref().or(self.r#type.as_deref()).unwrap_or("gptq").to_lowercase();
        if let Some(compat) = self.compat.filter(|compat| compat.method() != method) {
            let message = format!("this --compat is for --method {}, not {method}", compat.method());
            return Err(Failure::Usage(message));
        }
        let compat = self.compat.is_some();
        let like = (compat && method == "gptq").then_some(Compat::GptqModel);
        let defaults = like.map_or_else(GptqOptions::default, GptqOptions::like);
        let gptq = GptqOptions {
            order,
            static_groups: self.static_groups,
            mse: self.mse.map_or(defaults.mse, |norm| Some(norm).filter(|&norm| norm != 0.0)),
            damp: self.damp,
            block_size: self.block_size,
            ..defaults
        };
        let awq = AwqOptions {
            steps: self.n_grid,
            duo_scaling: !self.no_duo_scaling,
            clip: !self.no_clip,
            tokens: self.search_tokens,
        };
        let observer = self.static_activations.map(|name| match name {
            ObserverName::Minmax => Observer::MinMax,
            ObserverName::Percentile => Observer::Percentile(self.percentile / 100.0),
            ObserverName::Mse => Observer::LeastSquares,
            ObserverName::Entropy => Observer::Entropy,
        });
        let w8a8 = W8a8Options {
            alpha: self.smooth.map_or(W8a8Options::default().alpha, |Smooth(alpha)| alpha),
            smooth_outputs: !self.no_smooth_outputs,
            activations: observer.map_or(Activations::Dynamic, Activations::Static),
        };
        let symmetric = match (self.sym, self.asym) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        };
        let options = MethodOptions {
            gptq,
            awq,
            w8a8,
            hqq: self.hqq.options(compat),
            sinq: self.sinq.options(compat),
            bnb4: self.bnb.bnb4(),
            llm_int8: self.bnb.llm_int8(),
            quanto: self.quanto.options(self.bits, compat),
            ..MethodOptions::default()
        };
        let defaults = QuantizeConfig { options, ..QuantizeConfig::new(&method)? };
        let own = defaults.default_spec()?;
        let layout = match (&self.format, &self.r#type) {
            (Some(format), Some(ty)) => Some(format!("{format}:{ty}")),
            (format, _) => format.clone(),
        };
        let config = QuantizeConfig {
            bits: self.bits.unwrap_or(own.bits),
            group: match self.group_size.unwrap_or(own.group) {
                GroupSize::Columns(len) if self.hqq.axis == 0 => GroupSize::Strided(len),
                GroupSize::Columns(len) if self.sinq.squares() => GroupSize::Tile { rows: len, cols: len },
                group => group,
            },
            symmetric,
            transforms: match &self.transform[..] {
                [] => None,
                [one] if one == "none" => Some(Vec::new()),
                names => Some(names.to_vec()),
            },
            layout,
            calibration: self.calibration.clone().map_or(CalibrationSource::Builtin, CalibrationSource::File),
            samples: self.samples,
            seq_len: self.seq_len,
            seed: self.seed,
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            true_sequential: !self.no_true_sequential,
            non_finite: match self.nan {
                Nan::Refuse => NonFinite::Refuse,
                Nan::Zero => NonFinite::Zero,
            },
            max_memory: self.max_memory,
            shard_size: self.shard_size,
            overwrite,
            ..defaults
        };
        config.validate()?;
        Ok(config)
    }
}
