//! Options of methods that need no calibration, with the names of their libraries.

use clap::{Args, ValueEnum};
use quant::{
    Bnb4Options, HqqOptions, LlmInt8Options, Proximal, ProximalVersion, QuantoOptimizer, QuantoOptions,
    QuantoType, SinqOptions, SinqRounding,
};

/// Options of SINQ.
#[derive(Args)]
#[command(next_help_heading = "SINQ")]
pub(super) struct SinqArgs {
    /// Tiles that are evened out: groups of columns (1D) or squares (2D)
    #[arg(long, value_enum, default_value = "1D")]
    tiling_mode: TilingMode,
    /// How the rows of a tile are rounded
    #[arg(long, value_enum, default_value = "range")]
    sinq_rounding: RoundingName,
    /// Store scales and zero points in 8 bits [default: where there are zero points and 1D tiles]
    #[arg(long, value_name = "BOOL")]
    quant_aux: Option<bool>,
}

/// Shapes of tiles.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum TilingMode {
    #[value(name = "1D", alias = "1d")]
    Columns,
    #[value(name = "2D", alias = "2d")]
    Squares,
}

/// How the rows of a tile are rounded.
#[derive(Clone, Copy, ValueEnum)]
enum RoundingName {
    /// Integers between the least and the greatest weight
    Range,
    /// Integers around a fixed zero point
    Noz,
    /// NF4 around the mean
    Nf4,
    /// Integers with HQQ's zero points
    Hqq,
}

impl SinqArgs {
    pub(super) fn options(&self, compat: bool) -> SinqOptions {
        let rounding = match self.sinq_rounding {
            RoundingName::Range => SinqRounding::Range,
            RoundingName::Noz => SinqRounding::NoZero,
            RoundingName::Nf4 => SinqRounding::Nf4,
            RoundingName::Hqq => SinqRounding::Hqq,
        };
        SinqOptions { rounding, quant_aux: self.quant_aux.or(self.squares().then_some(false)), compat }
    }

    /// Tiles are squares.
    pub(super) fn squares(&self) -> bool {
        self.tiling_mode == TilingMode::Squares
    }
}

/// Options of HQQ.
#[derive(Args)]
#[command(next_help_heading = "HQQ")]
pub(super) struct HqqArgs {
    /// 1: groups along the inputs; 0: groups strided over the flattened matrix
    #[arg(long, value_name = "AXIS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub(super) axis: u8,
    /// Version of the solver; v2 undoes the last step [default: v2; legacy with --compat]
    #[arg(long, value_enum)]
    solver: Option<SolverName>,
    /// Norm of the errors, above 0 and at most 1
    #[arg(long, value_name = "P", default_value_t = Proximal::default().lp_norm)]
    lp_norm: f32,
    /// Weight of the penalty
    #[arg(long, default_value_t = Proximal::default().beta)]
    beta: f32,
    /// Growth of the penalty per step (v2)
    #[arg(long, default_value_t = Proximal::default().kappa)]
    kappa: f32,
    /// Steps at most
    #[arg(long, value_name = "N", default_value_t = Proximal::default().iters)]
    iters: usize,
    /// Take all steps, even if the error no longer falls
    #[arg(long)]
    no_early_stop: bool,
    /// First try scales up to 5 % smaller and larger [default: true; false with --compat]
    #[arg(long, value_name = "BOOL")]
    scale_gridsearch: Option<bool>,
    /// Begin at integer zero points or not [default: with 4 bits]
    #[arg(long, value_name = "BOOL")]
    round_zero: Option<bool>,
    /// Leave zero points where the range puts them
    #[arg(long)]
    no_optimize: bool,
}

/// Versions of HQQ's solver.
#[derive(Clone, Copy, ValueEnum)]
enum SolverName {
    Legacy,
    V2,
}

impl HqqArgs {
    pub(super) fn options(&self, compat: bool) -> HqqOptions {
        let &Self { lp_norm, beta, kappa, iters, .. } = self;
        let defaults = if compat { Proximal::library() } else { Proximal::default() };
        let version = match self.solver {
            None => defaults.version,
            Some(SolverName::Legacy) => ProximalVersion::Legacy,
            Some(SolverName::V2) => ProximalVersion::V2,
        };
        let early_stop = !self.no_early_stop;
        let scale_search = self.scale_gridsearch.unwrap_or(defaults.scale_search);
        let solver = Proximal { lp_norm, beta, kappa, iters, early_stop, version, scale_search };
        HqqOptions { solver: (!self.no_optimize).then_some(solver), round_zero: self.round_zero, compat }
    }
}

/// Options of NF4, FP4 and LLM.int8.
#[derive(Args)]
#[command(next_help_heading = "bitsandbytes")]
pub(super) struct BnbArgs {
    /// Nested scales: 0.37 bits per weight less (NF4, FP4)
    #[arg(long)]
    double_quant: bool,
    /// Features of an input that reach this magnitude stay float when the model runs; 0: none does (LLM.int8)
    #[arg(long, value_name = "SIZE", default_value_t = LlmInt8Options::default().threshold)]
    llm_int8_threshold: f32,
}

impl BnbArgs {
    pub(super) fn bnb4(&self) -> Bnb4Options {
        Bnb4Options { double_quant: self.double_quant }
    }

    pub(super) fn llm_int8(&self) -> LlmInt8Options {
        LlmInt8Options { threshold: self.llm_int8_threshold }
    }
}

/// Options of Quanto.
#[derive(Args)]
#[command(next_help_heading = "Quanto")]
pub(super) struct QuantoArgs {
    /// 8-bit floats instead of integers
    #[arg(long, value_enum, value_name = "FLOAT")]
    qfloat8: Option<Float8Name>,
    /// Where scales and shifts of 2 and 4 bits come from [default: hqq; max with --compat]
    #[arg(long, value_enum)]
    optimizer: Option<OptimizerName>,
}

/// 8-bit floats.
#[derive(Clone, Copy, ValueEnum)]
enum Float8Name {
    #[value(name = "e4m3fn")]
    E4m3fn,
    #[value(name = "e4m3fnuz")]
    E4m3fnuz,
    #[value(name = "e5m2")]
    E5m2,
}

/// Quanto's optimizers of scales and shifts.
#[derive(Clone, Copy, ValueEnum)]
enum OptimizerName {
    /// The range of the weights
    Max,
    /// HQQ's solver
    Hqq,
}

impl QuantoArgs {
    pub(super) fn options(&self, bits: Option<u8>, compat: bool) -> QuantoOptions {
        let weights = match (self.qfloat8, bits) {
            (Some(Float8Name::E4m3fn), _) => QuantoType::Qfloat8E4m3fn,
            (Some(Float8Name::E4m3fnuz), _) => QuantoType::Qfloat8E4m3fnuz,
            (Some(Float8Name::E5m2), _) => QuantoType::Qfloat8E5m2,
            (None, Some(2)) => QuantoType::Qint2,
            (None, Some(8)) => QuantoType::Qint8,
            (None, _) => QuantoType::Qint4,
        };
        let optimizer = self.optimizer.map(|name| match name {
            OptimizerName::Max => QuantoOptimizer::Max,
            OptimizerName::Hqq => QuantoOptimizer::Hqq,
        });
        QuantoOptions { weights, optimizer, compat }
    }
}
