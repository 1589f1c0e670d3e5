//! What each layout can hold, found out by asking it.

use half::f16;
use quant_core::{
    ActSpec, Codes, Grid, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, Permutation, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{Layout, PlannedLayer, layouts};
use serde::Serialize;
use serde_json::json;

use super::search::Target;
use super::{ConvertConfig, Verdict};

/// What a layout holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayoutSupport {
    /// Id of the layout.
    pub name: &'static str,
    /// Bits per code that can be written; empty for a layout that is only read.
    pub bits: Vec<u8>,
    /// Kinds of quantized weights that are converted to it without changing a number; see [`KINDS`].
    pub exact: Vec<&'static str>,
}

/// Kinds of quantized weights that conversions are tried with: integers of 4 bits in groups of 128 around the middle,
/// with zero points, with columns in order of activity; of 8 bits for a whole row; NF4 in blocks of 64; MXFP4.
pub const KINDS: [&str; 6] = ["int4", "int4 + zeros", "int4 act-order", "int8 rows", "NF4", "MXFP4"];

/// Size of the matrices that are tried: every layout likes it.
const SIDE: usize = 256;

/// What every layout of this build can hold. Takes some tenths of a second.
pub fn layout_support() -> Vec<LayoutSupport> {
    let kinds: Vec<QuantizedMatrix> = KINDS.iter().map(|kind| example(kind)).collect();
    let of = |layout: &&'static dyn Layout| {
        let exact = KINDS.iter().zip(&kinds).filter(|(_, matrix)| holds(*layout, matrix));
        LayoutSupport {
            name: layout.id(),
            bits: (1..=8).filter(|&bits| writes(*layout, bits)).collect(),
            exact: exact.map(|(kind, _)| *kind).collect(),
        }
    };
    layouts().iter().map(of).collect()
}

fn holds(layout: &'static dyn Layout, matrix: &QuantizedMatrix) -> bool {
    let config = json!({ "hidden_size": SIDE });
    let mut target = Target::new(layout, &config, &ConvertConfig::new(layout.id()));
    let route = target.route("layer", &QuantizedLinear::new(matrix.clone()));
    route.is_ok_and(|route| route.verdict == Verdict::Identical)
}

/// True if some specification of this many bits can be stored.
fn writes(layout: &dyn Layout, bits: u8) -> bool {
    let grids = GridKind::TABLES.into_iter().chain([GridKind::Int]);
    let groups = [
        GroupSize::Row,
        GroupSize::Tensor,
        GroupSize::Columns(16),
        GroupSize::Columns(32),
        GroupSize::Columns(64),
        GroupSize::Columns(128),
        GroupSize::Flat(64),
        GroupSize::Tile { rows: 128, cols: 128 },
    ];
    let kinds = [
        ParamsKind::F16,
        ParamsKind::F32,
        ParamsKind::BF16,
        ParamsKind::E8M0,
        ParamsKind::E4M3,
        ParamsKind::Super,
        ParamsKind::Affine8,
    ];
    let fits = |spec: QuantSpec| {
        let layer = PlannedLayer { input: &ActSpec::Float, ..PlannedLayer::new("layer", &spec, SIDE, SIDE) };
        layout.can_store(&layer).is_ok()
    };
    grids.into_iter().any(|grid| {
        groups.iter().any(|&group| {
            kinds.iter().any(|&scales| {
                [true, false].into_iter().any(|symmetric| {
                    fits(QuantSpec { bits, grid, group, scales, symmetric, act_order: false })
                })
            })
        })
    })
}

/// A matrix of a kind, with every code in it.
fn example(kind: &str) -> QuantizedMatrix {
    let (rows, cols) = (SIDE, SIDE);
    let bits = if kind == "int8 rows" { 8 } else { 4 };
    let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 251 % (1 << bits)) as u8).collect();
    let codes = Codes::from_values(bits, rows, cols, &codes).expect("codes fit their bits");
    let groups = match kind {
        "int8 rows" => Groups::whole_row(cols),
        "NF4" => Groups::Flat { len: 64 },
        "MXFP4" => Groups::Row { len: 32 },
        _ => Groups::Row { len: 128 },
    };
    let count = groups.count(rows, cols);
    let sizes = (0..count).map(|g| 0.004 + 1e-5 * g as f32);
    let scales = match kind {
        "NF4" => Params::F32(sizes.collect()),
        "MXFP4" => Params::E8M0((0..count).map(|g| 115 + (g % 7) as u8).collect()),
        _ => Params::F16(sizes.map(f16::from_f32).collect()),
    };
    let zeros = (0..count).map(|g| if kind == "int4 + zeros" { (1 + g % 14) as u8 } else { 8 });
    let mut matrix = match kind {
        "NF4" | "MXFP4" => {
            let grid = if kind == "NF4" { GridKind::Nf4 } else { GridKind::E2M1 };
            let grid = grid.grid(bits).expect("a known table");
            QuantizedMatrix { grid, ..QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0) }
        }
        "int8 rows" => {
            let grid = Grid::signed(bits);
            QuantizedMatrix { grid, ..QuantizedMatrix::affine(codes, groups, scales, Offset::None, 0) }
        }
        _ => {
            let zeros = Offset::Zero(Params::U8(zeros.collect()));
            QuantizedMatrix::affine(codes, groups, scales, zeros, 0)
        }
    };
    if kind == "int4 act-order" {
        // Every third column after the other: no group stays together.
        let order = (0..3).flat_map(|from| (from..cols as u32).step_by(3)).collect();
        matrix.input_perm = Some(Permutation::new(order).expect("every column once"));
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_hold_their_own_kind() {
        let all = layout_support();
        let of = |name: &str| all.iter().find(|s| s.name == name).unwrap();
        assert_eq!(of("gptq").exact, ["int4", "int4 + zeros", "int4 act-order", "int8 rows", "MXFP4"]);
        assert!([2, 3, 4, 8].iter().all(|bits| of("gptq_v2").bits.contains(bits)));
        for kind in KINDS {
            assert!(example(kind).validate().is_ok(), "{kind}");
        }
    }
}
