//! MXFP4 as gpt-oss stores its experts.
//!
//! For a matrix `X` of `N` outputs and `K` inputs: `X_blocks` U8 `[N, K / 32, 16]`, two E2M1 values in a byte, the even
//! input in the low half; `X_scales` U8 `[N, K / 32]`, E8M0; `X_bias`. Experts are a first dimension of all three; they
//! are read as one matrix, expert after expert.
//!
//! `W = e2m1 * 2^(scale - 127)`, rounded to bf16.

use ndarray::Array2;
use quant_core::{
    Codes, DType, DenseTensor, GridKind, GroupSize, Groups, Offset, Params, ParamsKind, QuantSpec,
    QuantizedLinear, QuantizedMatrix,
};
use serde_json::{Value, json};

use super::parts::{self, Parts, Writing, unsupported};
use super::{Layout, PlannedLayer, Reader, StoredModel, TensorSource, ct};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

pub(super) const MXFP4: Mxfp4 = Mxfp4;

/// Inputs under one scale.
const BLOCK: usize = 32;

const SPEC: QuantSpec = QuantSpec {
    bits: 4,
    grid: GridKind::E2M1,
    group: GroupSize::Columns(BLOCK),
    scales: ParamsKind::E8M0,
    symmetric: true,
    act_order: false,
};

/// The layout.
#[derive(Debug)]
pub(super) struct Mxfp4;

impl Mxfp4 {
    fn check(&self, spec: &QuantSpec, rows: usize, cols: usize) -> Result<(), Unsupported> {
        let refuse = |field, found: &dyn ToString, remedy| {
            Err(unsupported(self.id(), field, found.to_string(), remedy))
        };
        if rows == 0 || cols == 0 || !cols.is_multiple_of(BLOCK) {
            return refuse(
                "input size",
                &cols,
                "it must be a multiple of 32; leave this module in float (--exclude)",
            );
        }
        if spec.grid != SPEC.grid {
            return refuse("grid", &spec.grid, "its values are e2m1");
        }
        if spec.group != SPEC.group && !(cols == BLOCK && spec.group == GroupSize::Row) {
            return refuse("group size", &spec.group, "its groups have 32 columns");
        }
        if spec.scales != SPEC.scales {
            return refuse("scales", &format!("of {:?}", spec.scales), "its scales are powers of two");
        }
        Ok(())
    }
}

/// Names without a dot before the part.
fn name(module: &str, part: &str) -> String {
    format!("{module}_{part}")
}

impl Layout for Mxfp4 {
    fn id(&self) -> &'static str {
        "mxfp4"
    }

    fn description(&self) -> &'static str {
        "MXFP4 of gpt-oss: E2M1 in blocks of 32 under powers of two"
    }

    fn methods(&self) -> &'static [&'static str] {
        &["mxfp4"]
    }

    fn marker(&self) -> &'static str {
        "*_blocks"
    }

    fn module_of<'a>(&self, tensor: &'a str, dtype: DType) -> Option<&'a str> {
        let module = tensor.strip_suffix("_blocks").or_else(|| tensor.strip_suffix("_scales"))?;
        (dtype == DType::U8).then_some(module)
    }

    fn known_by(&self) -> &'static [&'static str] {
        &["_blocks"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        self.check(layer.spec, layer.rows, layer.cols)?;
        parts::float_input(self.id(), layer.input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let &PlannedLayer { module, rows, cols, .. } = layer;
        let blocks = cols / BLOCK;
        let mut plan = vec![
            PlannedTensor::new(name(module, "blocks"), DType::U8, &[rows, blocks, BLOCK / 2]),
            PlannedTensor::new(name(module, "scales"), DType::U8, &[rows, blocks]),
        ];
        plan.extend(layer.bias.map(|dtype| PlannedTensor::new(name(module, "bias"), dtype, &[rows])));
        plan
    }

    fn write(
        &self,
        linear: &QuantizedLinear,
        module: &str,
    ) -> Result<Vec<(String, DenseTensor)>, FormatError> {
        let writing = Writing::new(self.id(), linear, module)?;
        writing.float_input()?;
        let matrix = &linear.weight;
        let (rows, cols) = (matrix.rows(), matrix.cols());
        self.check(&matrix.spec(), rows, cols)?;
        let (Params::E8M0(scales), Offset::None, None) = (&matrix.scales, &matrix.offset, &matrix.input_perm)
        else {
            let remedy = "its scales are powers of two without zero points";
            return Err(writing.unsupported("scales", "of this form", remedy).into());
        };
        let tensor = |part: &str, shape: &[usize], bytes: &[u8]| {
            let tensor = name(module, part);
            match DenseTensor::new(DType::U8, shape.to_vec(), bytes) {
                Ok(made) => Ok((tensor, made)),
                Err(source) => Err(FormatError::Tensor { tensor, source }),
            }
        };
        let mut tensors = vec![
            tensor("blocks", &[rows, cols / BLOCK, BLOCK / 2], matrix.codes.bytes())?,
            tensor("scales", &[rows, cols / BLOCK], scales)?,
        ];
        tensors.extend(linear.bias.clone().map(|bias| (name(module, "bias"), bias)));
        Ok(tensors)
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let mut skipped = vec!["model.embed_tokens", "lm_head"];
        skipped.extend(
            model.exceptions.iter().filter(|(_, spec)| spec.is_none()).map(|(module, _)| &module[..]),
        );
        json!({ "quant_method": "mxfp4", "modules_to_not_convert": skipped })
    }

    fn reader(&self, _config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(Mxfp4Reader))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        ct::like_peer(matrix)
    }
}

/// Reads one checkpoint.
#[derive(Debug)]
struct Mxfp4Reader;

/// Checks the headers of a layer's tensors; gives outputs of all experts together, and inputs.
fn geometry(source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
    let find = |part: &str| {
        let because = || format!("{} has other parts of an mxfp4 layer", crate::display_name(module));
        let missing = || FormatError::Missing { tensor: name(module, part), because: because() };
        let (dtype, shape) = source.lookup(&name(module, part)).ok_or_else(missing)?;
        match dtype {
            DType::U8 => Ok(shape),
            found => Err(FormatError::TensorDType { tensor: name(module, part), expected: "U8", found }),
        }
    };
    let misshapen = |part: &str, found: &[usize], expected: String, because: &str| FormatError::TensorShape {
        tensor: name(module, part),
        expected,
        found: found.to_vec(),
        because: because.into(),
    };
    let blocks = find("blocks")?;
    let (outer, rows, per_row) = match *blocks {
        [rows, per_row, 16] => (1, rows, per_row),
        [experts, rows, per_row, 16] => (experts, rows, per_row),
        _ => {
            let expected = "[outputs, blocks, 16] or [experts, outputs, blocks, 16]".to_owned();
            return Err(misshapen("blocks", blocks, expected, "blocks of 32 values in 16 bytes"));
        }
    };
    let sizes =
        outer.checked_mul(rows).zip(per_row.checked_mul(BLOCK)).filter(|&(rows, cols)| rows > 0 && cols > 0);
    let Some(sizes) = sizes else {
        return Err(misshapen("blocks", blocks, "positive sizes".to_owned(), "a weight has elements"));
    };
    let (scales, leading) = (find("scales")?, &blocks[..blocks.len() - 1]);
    if scales != leading {
        return Err(misshapen(
            "scales",
            scales,
            format!("{leading:?}"),
            "the blocks, which have one scale each",
        ));
    }
    if let Some((dtype, shape)) = source.lookup(&name(module, "bias")) {
        let expected = &blocks[..blocks.len() - 2];
        if !dtype.is_float() {
            return Err(FormatError::TensorDType {
                tensor: name(module, "bias"),
                expected: "a float type",
                found: dtype,
            });
        }
        if shape != expected {
            return Err(misshapen("bias", shape, format!("{expected:?}"), "one value for each output"));
        }
    }
    Ok(sizes)
}

impl Reader for Mxfp4Reader {
    fn layout(&self) -> &'static dyn Layout {
        &MXFP4
    }

    fn spec(&self) -> Option<QuantSpec> {
        Some(SPEC)
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        geometry(source, module)
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let (rows, cols) = geometry(source, module)?;
        let parts = Parts { source, module, layout: "mxfp4" };
        let mut codes = Codes::zeros(4, rows, cols).map_err(|e| parts.invalid(e))?;
        let blocks = source.read(&name(module, "blocks"))?;
        codes.row_chunks_mut(rows).for_each(|all| all.copy_from_slice(blocks.bytes()));
        let scales = Params::E8M0(source.read(&name(module, "scales"))?.bytes().to_vec());
        let mut weight = QuantizedMatrix::affine(codes, Groups::Row { len: BLOCK }, scales, Offset::None, 0);
        weight.grid = GridKind::E2M1.grid(4).unwrap_or(weight.grid);
        weight.validate().map_err(|e| parts.invalid(e))?;
        let bias = match source.lookup(&name(module, "bias")) {
            None => None,
            Some(_) => {
                let flat = source.read(&name(module, "bias"))?.reshaped(vec![rows]);
                Some(flat.map_err(|source| FormatError::Tensor { tensor: name(module, "bias"), source })?)
            }
        };
        Ok(QuantizedLinear { bias, ..QuantizedLinear::new(weight) })
    }
}
