//! The blocks of GGUF: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, the k-quants, IQ4_NL, IQ4_XS and MXFP4.
//!
//! A layer is one tensor of bytes `[out, bytes of a row]`, named after its type (`MODULE.q4_k`), and its bias. Each
//! row is a sequence of blocks of 32 or 256 inputs; `docs/layouts/gguf.md` draws them. Types may differ between
//! layers. The files are the matter of [`crate::gguf`].

mod blocks;
mod codec;
mod recode;
#[cfg(test)]
mod tests;

use ndarray::Array2;
use quant_core::{
    DType, DenseTensor, GridKind, GroupSize, ParamsKind, QuantSpec, QuantizedLinear, QuantizedMatrix,
};
use serde_json::{Value, json};

use self::codec::{CODECS, Codec, Form, GridOf, codec};
use super::{Container, Layout, PlannedLayer, Reader, StoredModel, TensorSource};
use super::{module as modules, parts};
use crate::error::{FormatError, Unsupported};
use crate::gguf::GgmlType;
use crate::sink::PlannedTensor;

/// Each layer in the type that its own form asks for.
pub(super) const ANY: Gguf = Gguf { ty: None };

/// All layers in one type.
static TYPED: [Gguf; CODECS.len()] = {
    let mut layouts = [const { Gguf { ty: None } }; CODECS.len()];
    let mut i = 0;
    while i < CODECS.len() {
        layouts[i].ty = Some(CODECS[i].ty);
        i += 1;
    }
    layouts
};

/// The layout that stores every layer as blocks of this type. `None` for plain numbers and types that are only
/// recognised.
pub fn gguf_layout(ty: GgmlType) -> Option<&'static dyn Layout> {
    TYPED.iter().find(|layout| layout.ty == Some(ty)).map(|layout| layout as &dyn Layout)
}

/// The layout.
#[derive(Debug)]
pub(super) struct Gguf {
    ty: Option<GgmlType>,
}

fn unsupported(field: &'static str, found: impl ToString, remedy: impl ToString) -> Unsupported {
    parts::unsupported("gguf", field, found, remedy)
}

/// The tensor that holds the blocks of a module.
pub(crate) fn part_name(module: &str, ty: GgmlType) -> String {
    format!("{module}.{}", ty.name().to_lowercase())
}

/// Module and type of a tensor of blocks.
pub(crate) fn parse_part(tensor: &str) -> Option<(&str, GgmlType)> {
    let (module, part) = tensor.rsplit_once('.')?;
    let ty = GgmlType::from_name(part).filter(|ty| ty.dtype().is_none())?;
    (!part.contains(char::is_uppercase)).then_some((module, ty))
}

/// What matrices of a type are.
fn spec_of(codec: &Codec) -> QuantSpec {
    QuantSpec {
        bits: codec.bits,
        grid: match codec.grid {
            GridOf::Int(_) => GridKind::Int,
            GridOf::Table(kind) => kind,
        },
        group: GroupSize::Columns(codec.group),
        scales: match codec.form {
            Form::Scale | Form::ScaleShift => ParamsKind::F16,
            Form::Super(..) | Form::SuperShift(_) => ParamsKind::Super,
            Form::Exponent => ParamsKind::E8M0,
        },
        symmetric: matches!(codec.form, Form::Scale | Form::Super(..) | Form::Exponent),
        act_order: false,
    }
}

impl Gguf {
    /// The type for matrices of this specification.
    fn type_for(&self, spec: &QuantSpec) -> Result<&'static Codec, Unsupported> {
        use GgmlType::*;
        let by_form = || {
            let one_of_a_kind = CODECS.iter().find(|c| {
                let of = spec_of(c);
                of.scales == ParamsKind::Super && of == QuantSpec { group: of.group, ..*spec }
            });
            let ty = match (spec.grid, spec.scales, spec.bits, spec.symmetric) {
                (_, ParamsKind::Super, ..) => one_of_a_kind?.ty,
                (GridKind::Iq4, ..) => IQ4_NL,
                (GridKind::E2M1, ParamsKind::E8M0, ..) => MXFP4,
                (GridKind::Int, _, ..=4, true) => Q4_0,
                (GridKind::Int, _, 5, true) | (GridKind::Int, _, ..=4, false) => Q5_0,
                (GridKind::Int, _, _, true) | (GridKind::Int, _, ..=7, false) => Q8_0,
                _ => return None,
            };
            codec(ty)
        };
        match self.ty {
            Some(ty) => codec(ty),
            None => by_form(),
        }
        .ok_or_else(|| {
            let remedy = "gguf holds integers of up to 8 bits, symmetric ones at 8, and its own tables";
            unsupported("grid", format!("{} of {} bits", spec.grid, spec.bits), remedy)
        })
    }
}

impl Layout for Gguf {
    fn id(&self) -> &'static str {
        "gguf"
    }

    fn description(&self) -> &'static str {
        "GGUF: blocks of 32 or 256 inputs (Q4_0 to Q8_0, k-quants, IQ4, MXFP4), read by llama.cpp"
    }

    fn methods(&self) -> &'static [&'static str] {
        &["gguf"]
    }

    fn container(&self) -> Container {
        Container::Gguf
    }

    fn marker(&self) -> &'static str {
        "q4_0 (or another type)"
    }

    fn module_of<'a>(&self, tensor: &'a str, dtype: DType) -> Option<&'a str> {
        parse_part(tensor).filter(|_| dtype == DType::U8).map(|(module, _)| module)
    }

    fn known_by(&self) -> &'static [&'static str] {
        &[
            ".q4_0", ".q4_1", ".q5_0", ".q5_1", ".q8_0", ".q2_k", ".q3_k", ".q4_k", ".q5_k", ".q6_k",
            ".iq4_nl", ".iq4_xs", ".mxfp4",
        ]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        let codec = self.type_for(layer.spec)?;
        let (ty, block) = (codec.ty, codec.ty.block_len());
        if layer.cols == 0 || !layer.cols.is_multiple_of(block) {
            let remedy =
                format!("rows of {ty} are blocks of {block} inputs; choose another type or --exclude it");
            return Err(unsupported("input size", layer.cols, remedy));
        }
        parts::float_input("gguf", layer.input)?;
        if *layer.spec == spec_of(codec) {
            return Ok(());
        }
        match layer.spec.group {
            GroupSize::Row | GroupSize::Tensor => {}
            GroupSize::Columns(len) if len.is_multiple_of(codec.group) => {}
            other => {
                let remedy = format!("groups of {ty} have {} inputs, or a multiple of them", codec.group);
                return Err(unsupported("group size", other, remedy));
            }
        }
        if layer.spec.act_order {
            let remedy = "gguf has consecutive groups only; choose a layout with act-order, or requantize";
            return Err(unsupported("groups", "in activation order", remedy));
        }
        recode::possible(layer.spec, codec)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let mut plan = Vec::new();
        if let Ok(codec) = self.type_for(layer.spec)
            && let Some(shape) = codec.ty.byte_shape(&[layer.rows, layer.cols])
        {
            plan.push(PlannedTensor::new(part_name(layer.module, codec.ty), DType::U8, &shape));
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
        modules::check_plain("gguf", linear, module)?;
        parts::float_input("gguf", &linear.input)?;
        let own = CODECS.iter().find(|codec| self.ty.is_none_or(|ty| ty == codec.ty) && codec.fits(matrix));
        let (codec, bytes) = match own {
            Some(codec) => (codec, codec.write(matrix)),
            None => {
                let codec = self.type_for(&matrix.spec())?;
                let codec = if self.ty.is_none() { recode::with_shift(matrix, codec) } else { codec };
                (codec, codec.write(&recode::recode(matrix, codec)?))
            }
        };
        let name = part_name(module, codec.ty);
        let shape = codec.ty.byte_shape(&[matrix.rows(), matrix.cols()]).unwrap_or_default();
        let tensor = DenseTensor::new(DType::U8, shape, bytes);
        let fail = |source| FormatError::Tensor { tensor: name.clone(), source };
        let mut tensors = vec![(name.clone(), tensor.map_err(fail)?)];
        tensors.extend(linear.bias.clone().map(|bias| (format!("{module}.bias"), bias)));
        Ok(tensors)
    }

    fn config(&self, _model: &StoredModel<'_>) -> Value {
        json!({ "quant_method": "gguf", "type": self.ty.map(GgmlType::name) })
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        let ty = config.get("type").and_then(Value::as_str).and_then(GgmlType::from_name);
        Ok(Box::new(GgufReader { ty }))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        let mut weights = matrix.dequantize();
        if matrix.grid.kind() == GridKind::E2M1 {
            // The table of llama.cpp holds integers, which have one zero.
            weights.mapv_inplace(|w| w + 0.0);
        }
        weights
    }
}

/// Reads one checkpoint.
#[derive(Debug)]
struct GgufReader {
    /// The type of most layers.
    ty: Option<GgmlType>,
}

/// A layer's tensor, checked.
struct Blocks {
    name: String,
    codec: &'static Codec,
    rows: usize,
    cols: usize,
}

impl GgufReader {
    fn blocks(&self, source: &dyn TensorSource, module: &str) -> Result<Blocks, FormatError> {
        let mut found = GgmlType::blocks().filter_map(|ty| {
            let name = part_name(module, ty);
            source.lookup(&name).map(|(dtype, shape)| (ty, name, dtype, shape))
        });
        let Some((ty, name, dtype, shape)) = found.next() else {
            let because = "the layer is stored as blocks of a gguf type".to_owned();
            return Err(FormatError::Missing { tensor: part_name(module, GgmlType::Q4_0), because });
        };
        if let Some((_, second, ..)) = found.next() {
            let expected = format!("one type; {second} exists too");
            return Err(FormatError::Config { field: name, found: ty.name().to_owned(), expected });
        }
        let Some(codec) = codec(ty) else {
            let known: Vec<_> = CODECS.iter().map(|codec| codec.ty.name()).collect();
            let remedy = format!("choose a file of these types: {}", known.join(", "));
            let found = format!("{ty} ({})", crate::display_name(module));
            return Err(unsupported("type", found, remedy).into());
        };
        if dtype != DType::U8 {
            return Err(FormatError::TensorDType { tensor: name, expected: "U8", found: dtype });
        }
        let &[rows, bytes] = shape else {
            let (expected, found) = ("[outputs, bytes of a row]".to_owned(), shape.to_vec());
            let because = "a linear layer".to_owned();
            return Err(FormatError::TensorShape { tensor: name, expected, found, because });
        };
        let cols = (bytes / ty.block_bytes()).checked_mul(ty.block_len());
        match cols.filter(|&cols| cols > 0 && rows > 0 && bytes.is_multiple_of(ty.block_bytes())) {
            Some(cols) => Ok(Blocks { name, codec, rows, cols }),
            None => Err(FormatError::TensorShape {
                expected: format!("rows of whole blocks of {} bytes", ty.block_bytes()),
                found: shape.to_vec(),
                because: format!("type {ty}"),
                tensor: name,
            }),
        }
    }
}

impl Reader for GgufReader {
    fn layout(&self) -> &'static dyn Layout {
        &ANY
    }

    fn spec(&self) -> Option<QuantSpec> {
        codec(self.ty?).map(spec_of)
    }

    fn shape(&self, source: &dyn TensorSource, module: &str) -> Result<(usize, usize), FormatError> {
        self.blocks(source, module).map(|blocks| (blocks.rows, blocks.cols))
    }

    fn read(&self, source: &dyn TensorSource, module: &str) -> Result<QuantizedLinear, FormatError> {
        let Blocks { name, codec, rows, cols } = self.blocks(source, module)?;
        let invalid = |source| FormatError::Matrix { module: module.to_owned(), source };
        let weight = codec.read(source.read(&name)?.bytes(), rows, cols).map_err(invalid)?;
        weight.validate().map_err(invalid)?;
        let bias = format!("{module}.bias");
        let bias = match source.lookup(&bias) {
            None => None,
            Some((_, shape)) if shape != [rows] => {
                let (expected, found) = (format!("[{rows}]"), shape.to_vec());
                return Err(FormatError::TensorShape { tensor: bias, expected, found, because: name });
            }
            Some(_) => Some(source.read(&bias)?),
        };
        Ok(QuantizedLinear { bias, ..QuantizedLinear::new(weight) })
    }
}
