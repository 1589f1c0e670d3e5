//! HQQ, as its own library and transformers save it.
//!
//! The matrix of `N` outputs and `K` inputs is viewed as groups of `g`: `[N * K / g, g]` with parameters per row
//! (axis 1), or `[g, N * K / g]` with parameters per column (axis 0). Call the view `[R, C]`.
//!
//! | tensor | type | shape | content |
//! |---|---|---|---|
//! | `W_q` | U8, I32 for 3 bits | `[ceil(R / per), C]` | codes, packed by sections of rows, the first in the highest bits |
//! | `scale`, `zero` | F16, BF16, F32 | `[R, 1]` or `[1, C]` | |
//! | `nbits`, `group_size`, `axis` | I32 | `[]` | |
//! | `shape` | I64 | `[2]` | `[N, K]` |
//! | `packing`, `compute_dtype`, `unpack_view_dtype` | U8 | text | `4bit_u8`, `torch.float16`, `torch.uint8` |
//! | nine flags | U8 | `[]` | |
//!
//! `W = (code - zero) * scale`, each step rounded to the type of the scales; zero points are no integers.

mod read;

use ndarray::Array2;
use quant_core::{
    DType, DenseTensor, GridKind, GroupSize, Groups, ParamsKind, QuantizedLinear, QuantizedMatrix,
};
use serde_json::{Value, json};

use self::read::{HqqReader, spec_of};
use super::module::{self, Tensors};
use super::parts;
use super::sections::Packing;
use super::{Layout, PlannedLayer, Reader, StoredModel};
use crate::error::{FormatError, Unsupported};
use crate::sink::PlannedTensor;

/// The layout.
pub(super) const HQQ: Hqq = Hqq;

/// The layout.
#[derive(Debug)]
pub(super) struct Hqq;

/// Flags that every module carries.
const FLAGS: [&str; 9] = [
    "channel_wise",
    "optimize",
    "round_zero",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
];

/// The value of a flag that the library writes for weights as we store them.
fn flag(name: &str, bits: u8) -> bool {
    match name {
        "round_zero" => bits == 4,
        "channel_wise" | "optimize" | "encoded_state_dict" | "stores_quant_config" => true,
        _ => false,
    }
}

/// Name of the packing of that many bits.
fn packing_name(bits: u8) -> Option<&'static str> {
    Some(match bits {
        8 | 6 | 5 => "8bit_u8",
        4 => "4bit_u8",
        3 => "3bit_32",
        2 => "2bit_u8",
        1 => "1bit_u8",
        _ => return None,
    })
}

/// How a matrix is viewed: `[rows, cols]`, with one group per row (axis 1) or column (axis 0).
#[derive(Clone, Copy, Debug)]
struct View {
    rows: usize,
    cols: usize,
    axis: usize,
}

impl View {
    /// `None` if groups of `len` do not divide the elements.
    fn new(elements: usize, len: usize, axis: usize) -> Option<Self> {
        let count = elements.checked_div(len).filter(|&n| n > 0 && n * len == elements)?;
        Some(if axis == 0 {
            Self { rows: len, cols: count, axis }
        } else {
            Self { rows: count, cols: len, axis }
        })
    }

    /// The view of a matrix with these groups.
    fn of(groups: &Groups, rows: usize, cols: usize) -> Option<Self> {
        match *groups {
            Groups::Row { len } if !cols.is_multiple_of(len.min(cols.max(1))) => None,
            Groups::Row { len } => Self::new(rows * cols, len.min(cols), 1),
            Groups::Flat { len } => Self::new(rows * cols, len, 1),
            Groups::Strided { count } => Self::new(rows * cols, (rows * cols).checked_div(count)?, 0),
            _ => None,
        }
    }

    fn groups(&self, cols: usize) -> Groups {
        match self.axis {
            0 => Groups::Strided { count: self.cols },
            _ if cols.is_multiple_of(self.cols) => Groups::Row { len: self.cols },
            _ => Groups::Flat { len: self.cols },
        }
    }

    fn group_len(&self) -> usize {
        if self.axis == 0 { self.rows } else { self.cols }
    }

    fn params_shape(&self) -> [usize; 2] {
        if self.axis == 0 { [1, self.cols] } else { [self.rows, 1] }
    }
}

impl Hqq {
    fn unsupported(&self, field: &'static str, found: impl ToString, remedy: impl ToString) -> Unsupported {
        parts::unsupported(self.id(), field, found, remedy)
    }

    /// View and packing of a matrix that can be stored.
    fn plan(
        &self,
        bits: u8,
        groups: &Groups,
        rows: usize,
        cols: usize,
    ) -> Result<(View, Packing), Unsupported> {
        let packing = packing_name(bits).and_then(Packing::named);
        let packing =
            packing.ok_or_else(|| self.unsupported("bits", bits, "choose 8, 6, 5, 4, 3, 2 or 1"))?;
        let view = View::of(groups, rows, cols).ok_or_else(|| {
            let remedy =
                "groups must divide the weights evenly: rows (axis 1) or flat:N, or strided:N (axis 0)";
            self.unsupported("groups", "of this size", remedy)
        })?;
        Ok((view, packing))
    }
}

impl Layout for Hqq {
    fn id(&self) -> &'static str {
        "hqq"
    }

    fn description(&self) -> &'static str {
        "HQQ: 8, 4, 3, 2, 1 bits with float zero points, groups along inputs (axis 1) or strided (axis 0)"
    }

    fn methods(&self) -> &'static [&'static str] {
        &["hqq"]
    }

    fn marker(&self) -> &'static str {
        "W_q"
    }

    fn module_of<'a>(&self, tensor: &'a str, _dtype: DType) -> Option<&'a str> {
        tensor.strip_suffix(".W_q").or_else(|| tensor.strip_suffix(".nbits"))
    }

    fn known_by(&self) -> &'static [&'static str] {
        &[".W_q"]
    }

    fn packed_parts(&self) -> &'static [&'static str] {
        &["W_q"]
    }

    fn can_store(&self, layer: &PlannedLayer<'_>) -> Result<(), Unsupported> {
        let PlannedLayer { rows, cols, spec, input, .. } = *layer;
        self.plan(spec.bits, &spec.group.groups(rows, cols), rows, cols)?;
        if spec.grid != GridKind::Int {
            return Err(self.unsupported("grid", spec.grid, "its codes are integers; choose another layout"));
        }
        if spec.act_order {
            return Err(self.unsupported("act-order", "on", "groups are consecutive; choose another layout"));
        }
        if !matches!(spec.scales, ParamsKind::F16 | ParamsKind::BF16 | ParamsKind::F32) {
            return Err(self.unsupported("scales", "of this type", "it has scales of F16, BF16 or F32"));
        }
        parts::float_input(self.id(), input)
    }

    fn planned(&self, layer: &PlannedLayer<'_>) -> Vec<PlannedTensor> {
        let PlannedLayer { rows, cols, spec, .. } = *layer;
        let Ok((view, packing)) = self.plan(spec.bits, &spec.group.groups(rows, cols), rows, cols) else {
            return Vec::new();
        };
        let dtype = module::param_type(spec.scales);
        let text = |name: Option<&str>| "torch.".len() + name.unwrap_or("float16").len();
        let compute = text(module::torch_name(layer.dtype.unwrap_or(dtype)));
        let words = text(Some(words_name(&packing)));
        let mut plan = vec![
            layer.part("W_q", packing.dtype(), &[packing.word_rows(view.rows), view.cols]),
            layer.part("scale", dtype, &view.params_shape()),
            layer.part("zero", dtype, &view.params_shape()),
            layer.part("nbits", DType::I32, &[]),
            layer.part("group_size", DType::I32, &[]),
            layer.part("axis", DType::I32, &[]),
            layer.part("shape", DType::I64, &[2]),
            layer.part("packing", DType::U8, &[packing.name().len()]),
            layer.part("unpack_view_dtype", DType::U8, &[words]),
            layer.part("compute_dtype", DType::U8, &[compute]),
        ];
        plan.extend(FLAGS.iter().map(|name| layer.part(name, DType::U8, &[])));
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
        let (rows, cols, bits) = (matrix.rows(), matrix.cols(), matrix.codes.bits());
        let spec = matrix.spec();
        self.can_store(&PlannedLayer {
            input: &linear.input,
            ..PlannedLayer::new(module, &spec, rows, cols)
        })?;
        let (view, packing) = self.plan(bits, &matrix.groups, rows, cols)?;
        let zeros = module::zeros_like_scales(matrix).ok_or_else(|| {
            let remedy = "it has zero points in the type of its scales; choose another layout";
            self.unsupported("offsets", "of this form", remedy)
        })?;
        let dtype = matrix.dtype.or(module::float_type(&matrix.scales));
        let compute = dtype.and_then(module::torch_name).unwrap_or("float16");
        let shape = [packing.word_rows(view.rows), view.cols];

        let mut tensors = Tensors::new(module);
        tensors.add("W_q", packing.dtype(), &shape, packing.pack(&matrix.codes, shape[0] * shape[1]))?;
        tensors.add_params("scale", &view.params_shape(), &matrix.scales, self.id())?;
        tensors.add_params("zero", &view.params_shape(), &zeros, self.id())?;
        for (part, value) in [("nbits", bits.into()), ("group_size", view.group_len()), ("axis", view.axis)] {
            tensors.add(part, DType::I32, &[], (value as i32).to_le_bytes().to_vec())?;
        }
        let shape: Vec<u8> = [rows, cols].iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
        tensors.add("shape", DType::I64, &[2], shape)?;
        for (part, text) in [
            ("packing", packing.name().to_owned()),
            ("unpack_view_dtype", format!("torch.{}", words_name(&packing))),
            ("compute_dtype", format!("torch.{compute}")),
        ] {
            tensors.add(part, DType::U8, &[text.len()], text.into_bytes())?;
        }
        for part in FLAGS {
            tensors.add(part, DType::U8, &[], vec![u8::from(flag(part, bits))])?;
        }
        Ok(tensors.finish(linear.bias.as_ref()))
    }

    fn config(&self, model: &StoredModel<'_>) -> Value {
        let spec = model.spec;
        let axis = if matches!(spec.group, GroupSize::Strided(_)) { 0 } else { 1 };
        let group = match spec.group.as_config() {
            -1 => Value::Null,
            len => len.into(),
        };
        json!({
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": {
                    "nbits": spec.bits, "channel_wise": true, "group_size": group, "optimize": true,
                    "round_zero": spec.bits == 4, "axis": axis, "view_as_float": false,
                },
                "scale_quant_params": null,
                "zero_quant_params": null,
                "offload_meta": false,
            },
            "skip_modules": module::skipped(model),
        })
    }

    fn reader(&self, config: &Value) -> Result<Box<dyn Reader>, FormatError> {
        Ok(Box::new(HqqReader { spec: spec_of(config)? }))
    }

    fn dequantize_like_peer(&self, matrix: &QuantizedMatrix) -> Array2<f32> {
        matrix.dequantize_rounded(module::rounding(module::float_type(&matrix.scales)))
    }
}

fn words_name(packing: &Packing) -> &'static str {
    if packing.word == 1 { "uint8" } else { "int32" }
}
