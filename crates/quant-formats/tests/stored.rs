//! Layers of the layouts of bitsandbytes, HQQ, Quanto and SINQ: written, planned and read back, and parts that do not fit.

use std::collections::BTreeMap;

use half::{bf16, f16};
use proptest::prelude::*;
use quant_core::{
    ActGrid, ActGroup, ActSpec, Codes, ColScale, DType, DenseTensor, Grid, GridKind, Groups, Offset, Params,
    QuantizedLinear, QuantizedMatrix,
};
use quant_formats::{PlannedLayer, StoredModel, TensorSource, layout};
use serde_json::{Value, json};

const IDS: [&str; 6] = ["bnb_nf4", "bnb_fp4", "bnb_int8", "hqq", "quanto", "sinq"];

/// Tensors and the model's configuration.
#[derive(Clone)]
struct Source {
    tensors: BTreeMap<String, DenseTensor>,
    config: Value,
}

impl TensorSource for Source {
    fn lookup(&self, name: &str) -> Option<(DType, &[usize])> {
        self.tensors.lookup(name)
    }

    fn read(&self, name: &str) -> Result<DenseTensor, quant_formats::FormatError> {
        self.tensors.read(name)
    }

    fn model_config(&self) -> &Value {
        &self.config
    }
}

/// A stream of numbers.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize
    }

    fn float(&mut self) -> f32 {
        (self.next() % 4001) as f32 / 1000.0 - 2.0
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.next() % all.len()]
    }

    fn floats(&mut self, count: usize, dtype: DType) -> Params {
        let values = (0..count).map(|_| self.float());
        match dtype {
            DType::F16 => Params::F16(values.map(f16::from_f32).collect()),
            DType::BF16 => Params::BF16(values.map(bf16::from_f32).collect()),
            _ => Params::F32(values.collect()),
        }
    }

    fn codes(&mut self, bits: u8, rows: usize, cols: usize) -> Codes {
        let max = (1usize << bits) - 1;
        let values: Vec<u8> = (0..rows * cols).map(|_| (self.next() & max) as u8).collect();
        Codes::from_values(bits, rows, cols, &values).unwrap()
    }
}

/// A layer that the layout holds, with sizes of every kind that it has.
fn layer(id: &str, noise: &mut Noise) -> QuantizedLinear {
    let dtype = noise.pick(&[DType::F16, DType::BF16, DType::F32]);
    let rows = 1 + noise.next() % 70;
    let mut linear = QuantizedLinear::new(match id {
        "bnb_nf4" | "bnb_fp4" => {
            let (cols, block) = (1 + noise.next() % 200, noise.pick(&[32, 64, 128]));
            let count = (rows * cols).div_ceil(block);
            let scales = match noise.next() % 2 {
                0 => noise.floats(count, DType::F32),
                _ => Params::Nested {
                    codes: (0..count).map(|_| noise.next() as u8).collect(),
                    table: (0..256).map(|_| noise.float()).collect(),
                    absmax: (0..count.div_ceil(256)).map(|_| noise.float()).collect(),
                    block: 256,
                    offset: noise.float() * noise.pick(&[1.0, 1e-7, 1e20]),
                },
            };
            let codes = noise.codes(4, rows, cols);
            let matrix = QuantizedMatrix::affine(codes, Groups::Flat { len: block }, scales, Offset::None, 0);
            let kind = if id == "bnb_nf4" { GridKind::Nf4 } else { GridKind::Fp4 };
            QuantizedMatrix { grid: kind.grid(4).unwrap(), dtype: Some(dtype), ..matrix }
        }
        "bnb_int8" => {
            let cols = 1 + noise.next() % 100;
            let base = Box::new(noise.floats(rows, DType::F32));
            let scales = Params::Scaled { base, factor: 127.0, divide: true };
            let codes = noise.codes(8, rows, cols);
            let matrix = QuantizedMatrix::affine(codes, Groups::whole_row(cols), scales, Offset::None, 0);
            QuantizedMatrix { grid: Grid::signed(8), ..matrix }
        }
        "hqq" => {
            let (bits, len) = (noise.pick(&[8, 6, 5, 4, 3, 2, 1]), noise.pick(&[8, 16, 24]));
            let (rows, cols) = (rows * len, noise.pick(&[len, 2 * len, 5, 12]));
            let count = rows * cols / len;
            let groups = match noise.next() % 2 {
                0 if cols.is_multiple_of(len) => Groups::Row { len },
                0 => Groups::Flat { len },
                _ => Groups::Strided { count },
            };
            let (scales, zeros) = (noise.floats(count, dtype), Offset::Zero(noise.floats(count, dtype)));
            let matrix = QuantizedMatrix::affine(noise.codes(bits, rows, cols), groups, scales, zeros, 0);
            QuantizedMatrix { dtype: Some(dtype), ..matrix }
        }
        "quanto" => {
            let cols = noise.pick(&[64, 128, 192, 256, 130, 160]);
            let len = match cols {
                192 => 96,
                256 => 128,
                160 => 32,
                cols => cols,
            };
            let count = rows * cols / len;
            match noise.pick(&[2, 4, 8, 9, 10]) {
                bits @ (2 | 4) => {
                    let offset = match noise.next() % 2 {
                        0 => Offset::Shift { param: noise.floats(count, dtype), sign: -1.0 },
                        _ => Offset::Zero(Params::U8((0..count).map(|_| noise.next() as u8 & 3).collect())),
                    };
                    let (codes, scales) = (noise.codes(bits, rows, cols), noise.floats(count, dtype));
                    QuantizedMatrix::affine(codes, Groups::Row { len }, scales, offset, 0)
                }
                bits => {
                    let kind = [GridKind::Int, GridKind::E4M3, GridKind::E5M2][usize::from(bits) - 8];
                    let finite = |code: u8| kind.grid(8).unwrap().value(code).is_finite();
                    let values = (0..rows * cols).map(|_| noise.next() as u8);
                    let values: Vec<u8> = values.map(|code| if finite(code) { code } else { 0 }).collect();
                    let codes = Codes::from_values(8, rows, cols, &values).unwrap();
                    let scales = noise.floats(rows, dtype);
                    let matrix =
                        QuantizedMatrix::affine(codes, Groups::whole_row(cols), scales, Offset::None, 0);
                    QuantizedMatrix { grid: kind.grid(8).unwrap(), ..matrix }
                }
            }
        }
        _ => {
            let (bits, len) = (noise.pick(&[8, 6, 5, 4, 3, 2, 1]), noise.pick(&[16, 32]));
            let (rows, cols) = (rows.div_ceil(8) * 32, len * (1 + noise.next() % 3));
            let count = rows * cols / len;
            let halves = |noise: &mut Noise, n: usize| (0..n).map(|_| f16::from_f32(noise.float())).collect();
            let tiled = noise.next().is_multiple_of(3);
            let (scales, zeros) = match noise.next() % 2 {
                0 if !tiled => {
                    let x = |noise: &mut Noise| (0..count).map(|_| noise.next() as u8).collect();
                    let columns = count / 32;
                    let (scale, min) = (halves(noise, columns), halves(noise, columns));
                    let scales = Params::Affine8 { x: x(noise), scale, min };
                    let (scale, min) = (halves(noise, 1), halves(noise, 1));
                    (scales, Offset::Zero(Params::Affine8 { x: x(noise), scale, min }))
                }
                _ => {
                    let zeros = Offset::Zero(noise.floats(count, DType::F16));
                    (
                        noise.floats(count, DType::F16),
                        if noise.next().is_multiple_of(3) { Offset::None } else { zeros },
                    )
                }
            };
            let mut matrix =
                QuantizedMatrix::affine(noise.codes(bits, rows, cols), Groups::Row { len }, scales, zeros, 0);
            if matrix.offset == Offset::None {
                matrix.grid = Grid::Int { midpoint: (noise.next() % (1 << bits)) as i32 };
            }
            let (blocks, rows_per_block) = if tiled && rows > len { (rows / len, len) } else { (1, rows) };
            let values = noise.floats(blocks * cols, DType::F16).to_vec();
            matrix.col_scale = Some(ColScale { values, rows_per_block });
            matrix.dtype = Some(dtype);
            matrix
        }
    });
    if id == "bnb_int8" {
        let (grid, per) = (ActGrid::Int8, ActGroup::Token);
        linear.input = ActSpec::Dynamic { grid, per, symmetric: true, outlier_threshold: Some(5.5) };
    }
    if noise.next().is_multiple_of(2) {
        let rows = linear.weight.rows();
        linear.bias = Some(DenseTensor::from_f32_as_f16(&[rows], &vec![0.25; rows]));
    }
    linear
}

/// The layer as a file holds it, with the configuration that its reader needs.
fn store(id: &str, linear: &QuantizedLinear) -> (Source, Value) {
    let layout = layout(id).unwrap();
    let spec = linear.weight.spec();
    let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
    let layer = PlannedLayer {
        bias: linear.bias.as_ref().map(DenseTensor::dtype),
        dtype: linear.weight.dtype,
        input: &linear.input,
        ..PlannedLayer::new("m", &spec, rows, cols)
    };
    let stored =
        StoredModel { spec: &spec, input: &linear.input, exceptions: &[], meta: &Default::default() };
    let mut config = layout.config(&stored);
    if let Some((_, side_file)) = layout.side_files(&config, &[layer]).first() {
        config["modules"] = serde_json::from_slice(side_file).unwrap();
    }
    let tensors = layout.write(linear, "m").unwrap().into_iter().collect();
    (Source { tensors, config: json!({ "hidden_size": cols }) }, config)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn what_is_written_reads_back(which in 0..IDS.len(), seed in any::<u64>()) {
        let id = IDS[which];
        let linear = layer(id, &mut Noise(seed));
        linear.weight.validate().unwrap();
        let (source, config) = store(id, &linear);
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let layout = layout(id).unwrap();
        let reader = layout.reader(&config).unwrap();
        prop_assert_eq!(reader.layout().id(), id);
        prop_assert_eq!(reader.shape(&source, "m").unwrap(), (rows, cols));
        let read = reader.read(&source, "m").unwrap();
        prop_assert_eq!(&read.input, &linear.input);
        let (weight, expected) = (&read.weight, &linear.weight);
        prop_assert_eq!(&weight.codes, &expected.codes);
        prop_assert_eq!(&weight.grid, &expected.grid);
        prop_assert_eq!(weight.dequantize(), expected.dequantize());
        prop_assert_eq!(layout.dequantize_like_peer(weight), layout.dequantize_like_peer(expected));
        let again: BTreeMap<_, _> = layout.write(&read, "m").unwrap().into_iter().collect();
        prop_assert_eq!(again.len(), source.tensors.len());
        for (name, tensor) in again {
            let stored = &source.tensors[&name];
            prop_assert_eq!((tensor.dtype(), tensor.shape()), (stored.dtype(), stored.shape()), "{}", name);
            prop_assert!(tensor.bytes() == stored.bytes(), "{}", name);
        }
    }

    /// A plan gives the tensors that are written, where the specification says all that they depend on.
    #[test]
    fn a_plan_is_what_is_written(which in 0..IDS.len(), seed in any::<u64>()) {
        let id = IDS[which];
        let linear = layer(id, &mut Noise(seed));
        let (matrix, spec) = (&linear.weight, linear.weight.spec());
        let tiled = matrix.col_scale.as_ref().is_some_and(|s| s.rows_per_block < matrix.rows());
        // Zero points of one kind where the specification says symmetric or not.
        let usual = match (id, &matrix.offset) {
            ("sinq", Offset::None) | ("quanto", Offset::Zero(_)) => spec.symmetric,
            ("sinq", Offset::Zero(_)) => !spec.symmetric,
            _ => true,
        };
        prop_assume!(!tiled && usual);
        let layer = PlannedLayer {
            bias: linear.bias.as_ref().map(DenseTensor::dtype),
            dtype: matrix.dtype,
            input: &linear.input,
            ..PlannedLayer::new("m", &spec, matrix.rows(), matrix.cols())
        };
        let layout = layout(id).unwrap();
        layout.can_store(&layer).unwrap();
        let plan: Vec<_> = layout.planned(&layer).into_iter().map(|p| (p.name, p.dtype, p.shape)).collect();
        let written = layout.write(&linear, "m").unwrap();
        let written: Vec<_> = written.into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec())).collect();
        prop_assert_eq!(plan, written);
    }

    /// Parts of other types, shapes or bytes, or absent, and other settings: an error or a layer, never a panic.
    #[test]
    fn parts_that_do_not_fit_never_panic(
        which in 0..IDS.len(),
        seed in any::<u64>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 0u8..5, any::<u8>(), 0usize..70), 1..4),
        setting in prop::option::of((any::<prop::sample::Index>(), 0usize..8)),
    ) {
        const TYPES: [DType; 7] =
            [DType::U8, DType::I8, DType::I32, DType::I64, DType::F16, DType::F32, DType::F8E4M3];
        let id = IDS[which];
        let linear = layer(id, &mut Noise(seed));
        let (mut source, mut config) = store(id, &linear);
        let names: Vec<String> = source.tensors.keys().cloned().collect();
        for (at, kind, byte, size) in damage {
            let name = &names[at.index(names.len())];
            let Some(old) = source.tensors.get(name) else { continue };
            let (dtype, mut shape, mut bytes) = (old.dtype(), old.shape().to_vec(), old.bytes().to_vec());
            match kind {
                0 => { source.tensors.remove(name); continue }
                1 => {
                    let at = usize::from(byte) * 31 % bytes.len().max(1);
                    if let Some(b) = bytes.get_mut(at) { *b = byte }
                }
                2 => {
                    shape.pop();
                    shape.push(size);
                }
                3 => shape.reverse(),
                _ => shape = vec![size, usize::from(byte) % 5],
            }
            let dtype = if kind == 4 { TYPES[usize::from(byte) % 7] } else { dtype };
            let Some(len) = dtype.byte_len(&shape) else { continue };
            bytes.resize(len, byte);
            source.tensors.insert(name.clone(), DenseTensor::new(dtype, shape, bytes).unwrap());
        }
        if let Some((at, value)) = setting {
            let values = [json!(0), json!(-1), json!(3), json!(1u64 << 62), json!("zork"), json!([]), json!({}), json!(1.5)];
            let target = match config.pointer_mut("/modules/m/meta") {
                Some(meta) => meta,
                None => &mut config,
            };
            let fields = target.as_object_mut().unwrap();
            let name = fields.keys().nth(at.index(fields.len())).cloned().unwrap();
            fields.insert(name, values[value].clone());
        }
        let Ok(reader) = layout(id).unwrap().reader(&config) else { return Ok(()) };
        let shape = reader.shape(&source, "m");
        if let Ok(read) = reader.read(&source, "m") {
            prop_assert_eq!(shape.unwrap(), (read.weight.rows(), read.weight.cols()));
            read.weight.validate().unwrap();
            read.weight.dequantize();
        }
    }
}
