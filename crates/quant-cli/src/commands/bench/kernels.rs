//! `quant bench kernels`.

use std::str::FromStr;

use clap::Args;
use quant::{GridKind, GroupSize, KernelShape, bench_kernels};

use crate::failure::Failure;
use crate::output::{Output, Table};

/// How far behind the best kernel the chosen one may be, as a share of its time.
const SLACK: f64 = 0.05;

/// Speed of every product that fits some weights, beside what the machine can do at most
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    quant bench kernels --shape 1x14336x4096 --bits 4 --group-size 128\n  \
    quant bench kernels --shape 512x14336x4096 --type nf4 --group-size 64 --json --assert")]
pub(crate) struct BenchKernels {
    /// Rows of activations, outputs and inputs
    #[arg(long, value_name = "MxNxK")]
    shape: Shape,
    /// Bits per weight code
    #[arg(long, short, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=8))]
    bits: u8,
    /// Weights that share a scale; -1 or row for whole rows
    #[arg(long, short, default_value = "128", value_name = "N", allow_hyphen_values = true)]
    group_size: GroupSize,
    /// What codes stand for: int, nf4, fp4, e2m1, iq4, e4m3, ...; tables have their own number of bits
    #[arg(long = "type", default_value = "int", value_name = "TYPE", value_parser = grid)]
    grid: GridKind,
    /// Grids with a zero point
    #[arg(long)]
    asym: bool,
    /// Fail if the chosen kernel takes over 5 % longer than the best
    #[arg(long)]
    assert: bool,
}

/// `MxNxK`.
#[derive(Clone, Copy)]
struct Shape([usize; 3]);

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sizes: Result<Vec<usize>, _> = text.split('x').map(str::parse).collect();
        match sizes.as_deref() {
            Ok(&[m, n, k]) if m > 0 && n > 0 && k > 0 => Ok(Shape([m, n, k])),
            _ => Err("give three positive numbers, such as 512x14336x4096".to_owned()),
        }
    }
}

/// The grid of a name.
fn grid(name: &str) -> Result<GridKind, String> {
    let mut known = std::iter::once(GridKind::Int).chain(GridKind::TABLES);
    known.find(|kind| kind.to_string() == name).ok_or_else(|| {
        let names: Vec<String> = GridKind::TABLES.iter().map(ToString::to_string).collect();
        format!("use int or one of {}", names.join(", "))
    })
}

impl BenchKernels {
    /// Runs the command.
    pub(crate) fn run(&self, output: Output) -> Result<(), Failure> {
        let Shape([m, n, k]) = self.shape;
        let (bits, group, grid, symmetric) = (self.bits, self.group_size, self.grid, !self.asym);
        let report = bench_kernels(&KernelShape { m, n, k, bits, group, grid, symmetric })?;
        output.result(&report, || {
            let machine = &report.machine;
            let mut table = Table::with_head(&["kernel", "ms", "GB/s", "TOPS", "% of roof", ""]);
            for row in &report.rows {
                table.row([
                    row.kernel.clone(),
                    format!("{:.3}", row.seconds * 1e3),
                    format!("{:.1}", row.gb_s),
                    format!("{:.3}", row.tops),
                    format!("{:.0}", row.roof_fraction * 100.0),
                    if row.chosen { "chosen".to_owned() } else { String::new() },
                ]);
            }
            let roof = format!(
                "{} with {} threads: {:.1} GB/s read, {:.3} TOPS in int8",
                machine.isa, machine.threads, machine.read_gb_s, machine.int8_tops
            );
            format!("{roof}\n{table}")
        })?;
        if self.assert && report.behind() > SLACK {
            let percent = report.behind() * 100.0;
            return Err(Failure::Found(format!(
                "the chosen kernel takes {percent:.0} % longer than {}; {:.0} % are allowed",
                report.rows[0].kernel,
                SLACK * 100.0
            )));
        }
        Ok(())
    }
}
