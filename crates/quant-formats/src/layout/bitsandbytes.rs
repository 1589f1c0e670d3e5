//! bitsandbytes: 4-bit tables (NF4, FP4), with or without nested scales, and LLM.int8.
//!
//! 4 bits, for a layer of `K` inputs and `N` outputs in blocks of `b` elements of the flattened matrix:
//!
//! | tensor | type | shape | content |
//! |---|---|---|---|
//! | `weight` | U8, or another type over the same bytes | `[ceil(N * K / 2), 1]` | codes; the even element in the high nibble |
//! | `weight.absmax` | F32, nested U8 | `[nb]`, `nb = ceil(N * K / b)` | |
//! | `weight.quant_map` | F32 | `[16]` | values of the codes |
//! | `weight.nested_absmax` | F32 | `[ceil(nb / 256)]` | nested only |
//! | `weight.nested_quant_map` | F32 | `[256]` | nested only |
//! | `weight.quant_state.bitsandbytes__nf4`, `__fp4` | U8 | text | JSON: block size, type, shape, nested offset |
//!
//! `W = quant_map[code] * absmax`, then rounded to the type in the JSON; a nested `absmax` is
//! `nested_quant_map[code] * nested_absmax[i / 256] + offset`.
//!
//! 8 bits: `weight` I8 `[N, K]`, `SCB` F32 `[N]`, `weight_format` U8 `[]` = 0. `W = weight * SCB / 127`.

mod read;
mod state;

use ndarray::Array2;
use quant_core::{
    ActGrid, ActGroup, ActSpec, DType, DenseTensor, Grid, GridKind, GroupSize, Groups, Params, ParamsKind,
    QuantSpec, QuantizedLinear, QuantizedMatrix,
};
use rayon::prelude::*;
use serde_json::{Value, json};

use self::read::BnbReader;
use self::state::State;
use super::module::{self, Tensors};
use super::parts;
use super::sections::unpack_flat;
use super::{Layout, PlannedLayer, Reader, StoredModel};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// NormalFloat of 4 bits.
pub(super) const NF4: Bnb = Bnb { kind: Kind::Nf4 };

/// The library's own 4-bit float.
pub(super) const FP4: Bnb = Bnb { kind: Kind::Fp4 };

/// LLM.int8.
pub(super) const INT8: Bnb = Bnb { kind: Kind::Int8 };

/// Block sizes of the library's 4-bit kernels.
const BLOCKS: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Scales that share a second-level scale.
const NESTED_BLOCK: usize = 256;

/// Factor of 8-bit codes in `SCB`.
const INT8_MAX: f32 = 127.0;

/// What the codes of a module are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nf4,
    Fp4,
    Int8,
}

/// The layout.
#[derive(Debug)]
pub(super) struct Bnb {
    kind: Kind,
}

impl Bnb {
    fn unsupported(&self, field: &'static str, found: impl ToString, remedy: impl ToString) -> Unsupported {
        parts::unsupported(self.id(), field, found, remedy)
    }

    fn grid(&self) -> (GridKind, u8) {
        match self.kind {
            Kind::Nf4 => (GridKind::Nf4, 4),
            Kind::Fp4 => (GridKind::Fp4, 4),
            Kind::Int8 => (GridKind::Int, 8),
        }
    }

    /// What the grid, the bits and the groups of a layer must be.
    fn check(&self, spec: &QuantSpec, cols: usize) -> Result<(), Unsupported> {
        let (grid, bits) = self.grid();
        if spec.bits != bits {
            return Err(self.unsupported("bits", spec.bits, format!("it has {bits}; choose another layout")));
        }
        if spec.grid != grid {
            return Err(self.unsupported(
                "grid",
                spec.grid,
                format!("its codes are {grid}; choose another layout"),
            ));
        }
        if self.kind == Kind::Int8 {
            return match spec.group {
                GroupSize::Row => Ok(()),
                other => Err(self.unsupported("group size", other, "it has one scale per row (-1)")),
            };
        }
        let remedy = "blocks of the flattened matrix (flat:64) have 32, 64, 128 ... 4096 elements";
        match spec.group {
            GroupSize::Flat(len) if BLOCKS.contains(&len) => Ok(()),
            GroupSize::Columns(len) if BLOCKS.contains(&len) && cols.is_multiple_of(len) => Ok(()),
            GroupSize::Row if BLOCKS.contains(&cols) => Ok(()),
            other => Err(self.unsupported("group size", other, remedy)),
        }
    }

    fn check_input(&self, input: &ActSpec) -> Result<(), Unsupported> {
        match (self.kind, input) {
            (_, ActSpec::Float) => Ok(()),
            (
                Kind::Int8,
                ActSpec::Dynamic { grid: ActGrid::Int8, per: ActGroup::Token, symmetric: true, .. },
            ) => Ok(()),
            _ => Err(self.unsupported("quantized activations", "of this form", "choose another layout")),
        }
    }

    fn write_4bit(&self, matrix: &QuantizedMatrix, tensors: &mut Tensors<'_>) -> Result<(), FormatError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let (Groups::Flat { len: block } | Groups::Row { len: block }) = matrix.groups else {
            let remedy = "it has blocks of the flattened matrix";
            return Err(self.unsupported("groups", "of this form", remedy).into());
        };
        let Grid::Table(table) = &matrix.grid else {
            return Err(self.unsupported("grid", "int", "it has tables of values").into());
        };
        let mut state = State {
            kind: self.kind,
            block,
            dtype: matrix.dtype.unwrap_or(DType::F32),
            rows,
            cols,
            nested_offset: None,
        };
        tensors.add("weight", DType::U8, &[(rows * cols).div_ceil(2), 1], nibbles(matrix))?;
        let floats = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        match &matrix.scales {
            Params::Nested { codes, table: nested_table, absmax, block: NESTED_BLOCK, offset } => {
                state.nested_offset = Some(*offset);
                tensors.add("weight.absmax", DType::U8, &[codes.len()], codes.clone())?;
                tensors.add("weight.nested_absmax", DType::F32, &[absmax.len()], floats(absmax))?;
                tensors.add("weight.nested_quant_map", DType::F32, &[256], floats(nested_table))?;
            }
            scales @ (Params::F32(_) | Params::F16(_) | Params::BF16(_)) => {
                tensors.add("weight.absmax", DType::F32, &[scales.len()], floats(&scales.to_vec()))?;
            }
            _ => {
                let remedy = "it has scales of F32, or nested ones in blocks of 256";
                return Err(self.unsupported("scales", "of this form", remedy).into());
            }
        }
        tensors.add("weight.quant_map", DType::F32, &[16], floats(table))?;
        let text = state.to_json();
        tensors.add(state.part(), DType::U8, &[text.len()], text.into_bytes())
    }

    fn write_8bit(&self, matrix: &QuantizedMatrix, tensors: &mut Tensors<'_>) -> Result<(), FormatError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let absmax = absmax(&matrix.scales).ok_or_else(|| {
            let remedy = "it stores the largest magnitude of each row, of which scales must be a 127th";
            self.unsupported("scales", "of another form", remedy)
        })?;
        tensors.add("weight", DType::I8, &[rows, cols], module::pack_signed(&matrix.codes))?;
        tensors.add_params("SCB", &[rows], &Params::F32(absmax), self.id())?;
        tensors.add("weight_format", DType::U8, &[], vec![0])
    }
}

impl Layout for Bnb {
    fn id(&self) -> &'static str {
        match self.kind {
            Kind::Nf4 => "bnb_nf4",
            Kind::Fp4 => "bnb_fp4",
            Kind::Int8 => "bnb_int8",
        }
    }

    fn description(&self) -> &'static str {
        match self.kind {
            Kind::Nf4 => "bitsandbytes NF4: 4-bit normal float in blocks, nested scales or plain",
            Kind::Fp4 => "bitsandbytes FP4: 4-bit float in blocks, nested scales or plain",
            Kind::Int8 => "bitsandbytes LLM.int8: 8 bits, a scale per row, 8-bit activations at run time",
        }
    }

    fn methods(&self) -> &'static [&'static str] {
        &["bitsandbytes"]
    }

    fn marker(&self) -> &'static str {
        match self.kind {
            Kind::Int8 => "SCB",
            Kind::Nf4 | Kind::Fp4 => "weight.absmax",
        }
    }

    fn module_of<'a>(&self, tensor: &'a str, dtype: DType) -> Option<&'a str> {
        const PARTS: [&str; 6] = [
            ".SCB",
            ".weight_format",
            ".weight.absmax",
            ".weight.quant_map",
            ".weight.nested_absmax",
            ".weight.nested_quant_map",
        ];
        let state = tensor.find(".weight.quant_state.bitsandbytes__").map(|at| &tensor[..at]);
        let known = PARTS.iter().find_map(|part| tensor.strip_suffix(part));
        let codes = || tensor.strip_suffix(".weight").filter(|_| dtype == DType::I8);
        state.or(known).or_else(codes)
    }

    fn known_by(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Nf4 => &[".weight.quant_state.bitsandbytes__nf4"],
            Kind::Fp4 => &[".weight.quant_state.bitsandbytes__fp4"],
            Kind::Int8 => &[".SCB"],
        }
    }

    fn packed_parts(&self) -> &'static [&'static str] {
        &["weight"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        self.check(layer.spec, layer.cols)?;
        self.check_input(layer.input)?;
        if !layer.spec.symmetric {
            return Err(self.unsupported("zero points", "beside codes", "choose a symmetric grid"));
        }
        let nested = self.kind != Kind::Int8 && layer.spec.scales == ParamsKind::Nested;
        match layer.spec.scales {
            ParamsKind::F32 => Ok(()),
            _ if nested => Ok(()),
            ParamsKind::F16 | ParamsKind::BF16 if self.kind != Kind::Int8 => Ok(()),
            _ => Err(self.unsupported("scales", "of this type", "it has scales of F32")),
        }
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { rows, cols, spec, .. } = layer;
        let mut plan = Vec::new();
        if self.kind == Kind::Int8 {
            plan.push(layer.part("weight", DType::I8, &[rows, cols]));
            plan.push(layer.part("SCB", DType::F32, &[rows]));
            plan.push(layer.part("weight_format", DType::U8, &[]));
        } else {
            let groups = spec.group.groups(rows, cols);
            let block = match groups {
                Groups::Flat { len } | Groups::Row { len } => len,
                _ => 64,
            };
            let count = groups.count(rows, cols);
            let nested = spec.scales == ParamsKind::Nested;
            plan.push(layer.part("weight", DType::U8, &[(rows * cols).div_ceil(2), 1]));
            plan.push(layer.part("weight.absmax", if nested { DType::U8 } else { DType::F32 }, &[count]));
            if nested {
                plan.push(layer.part("weight.nested_absmax", DType::F32, &[count.div_ceil(NESTED_BLOCK)]));
                plan.push(layer.part("weight.nested_quant_map", DType::F32, &[256]));
            }
            plan.push(layer.part("weight.quant_map", DType::F32, &[16]));
            let dtype = layer.dtype.unwrap_or(DType::F32);
            let nested_offset = nested.then_some(0.0);
            let state = State { kind: self.kind, block, dtype, rows, cols, nested_offset };
            plan.push(layer.part(state.part(), DType::U8, &[state.to_json().len()]));
        }
        plan.extend(layer.bias_part());
        plan
    }

    fn write(
        &self,
        linear: &QuantizedLinear,
        module: &str,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError> {
        let matrix = &linear.weight;
        module::check_plain(self.id(), linear, module)?;
        self.check(&matrix.spec(), matrix.cols())?;
        self.check_input(&linear.input)?;
        if !matrix.spec().symmetric {
            return Err(self.unsupported("zero points", "beside codes", "choose another layout").into());
        }
        let mut tensors = Tensors::new(module);
        match self.kind {
            Kind::Int8 => self.write_8bit(matrix, &mut tensors)?,
            Kind::Nf4 | Kind::Fp4 => self.write_4bit(matrix, &mut tensors)?,
        }
        Ok(tensors.finish(linear.bias.as_ref()))
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let threshold = match model.input {
            ActSpec::Dynamic { outlier_threshold, .. } => outlier_threshold.unwrap_or(0.0),
            _ => 6.0,
        };
        let eight = self.kind == Kind::Int8;
        let compute = model.meta.get("compute_dtype").and_then(Value::as_str).unwrap_or("float32");
        json!({
            "_load_in_4bit": !eight,
            "_load_in_8bit": eight,
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": if self.kind == Kind::Nf4 { "nf4" } else { "fp4" },
            "bnb_4bit_use_double_quant": model.spec.scales == ParamsKind::Nested,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": module::skipped(model),
            "llm_int8_threshold": threshold,
            "load_in_4bit": !eight,
            "load_in_8bit": eight,
            "quant_method": "bitsandbytes",
        })
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(BnbReader::new(config, self.kind)?))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        let mut weights = matrix.dequantize();
        if let Params::Scaled { base, factor, divide: true } = &matrix.scales {
            // The product first, then a true division.
            let middle = f32::from(1u8 << (matrix.codes.bits() - 1));
            let mut codes = vec![0; matrix.cols()];
            for (r, mut out) in weights.rows_mut().into_iter().enumerate() {
                matrix.codes.unpack_row(r, &mut codes);
                let scale = base.get(r);
                out.iter_mut()
                    .zip(&codes)
                    .for_each(|(w, &code)| *w = (f32::from(code) - middle) * scale / factor);
            }
        }
        weights.mapv_inplace(module::rounding(matrix.dtype));
        weights
    }
}

/// The numbers of which scales are a 127th, if there are such.
fn absmax(scales: &Params) -> Option<Vec<f32>> {
    if let Params::Scaled { base, factor, divide: true } = scales
        && *factor == INT8_MAX
    {
        return Some(base.to_vec());
    }
    let of = |scale: f32| {
        let near = scale * INT8_MAX;
        [near, near.next_up(), near.next_down()].into_iter().find(|absmax| absmax / INT8_MAX == scale)
    };
    scales.to_vec().into_iter().map(of).collect()
}

/// The packed nibbles of a matrix of 4-bit codes, the even element high; an odd last one is padded.
fn nibbles(matrix: &QuantizedMatrix) -> Vec<u8> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if cols.is_multiple_of(2) {
        // Rows are whole bytes, which hold the even element in the low nibble.
        return matrix.codes.bytes().par_iter().with_min_len(1 << 16).map(|b| b.rotate_left(4)).collect();
    }
    let mut flat = vec![0; rows * cols];
    unpack_flat(&matrix.codes, 0, &mut flat);
    let mut bytes = vec![0; flat.len().div_ceil(2)];
    quant_core::codes::pack(4, &flat, &mut bytes);
    bytes.iter_mut().for_each(|b| *b = b.rotate_left(4));
    bytes
}
