//! Reference files, read with the `safetensors` crate rather than with the code under test.
//!
//! Everything here panics on a missing or unexpected file: a broken fixture is a broken test.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use ndarray::{ArrayD, ArrayView2, Axis, IxDyn, Slice};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The folder of committed fixtures.
pub fn fixtures_dir() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two folders below the root");
    root.join("fixtures")
}

/// A file or folder of the test assets that are not in the repository, below the folder named by the
/// environment variable `QUANT_TEST_ASSETS`.
///
/// `None` when the variable is unset, after saying so; the caller then returns:
///
/// ```
/// let Some(model) = quant_testkit::assets("models/stories260K") else { return };
/// assert!(model.join("config.json").exists());
/// ```
///
/// Panics when the variable is set and the path does not exist, so that a typing error cannot skip a test.
pub fn assets(path: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("QUANT_TEST_ASSETS") else {
        eprintln!("skipped: set QUANT_TEST_ASSETS to a folder that holds {path}");
        return None;
    };
    let full = Path::new(&root).join(path);
    assert!(full.exists(), "QUANT_TEST_ASSETS is set, but {} does not exist", full.display());
    Some(full)
}

/// A safetensors file of expected values.
pub struct Golden {
    file: PathBuf,
    bytes: Vec<u8>,
}

impl Golden {
    /// `fixtures/golden/NAME/expected.safetensors`.
    pub fn open(name: &str) -> Self {
        Self::read(&fixtures_dir().join("golden").join(name).join("expected.safetensors"))
    }

    /// Any safetensors file.
    pub fn read(file: &Path) -> Self {
        let bytes = fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        Self { file: file.to_path_buf(), bytes }
    }

    /// The folder of the file; golden checkpoints lie beside their expected values.
    pub fn dir(&self) -> &Path {
        self.file.parent().expect("a file has a folder")
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let tensors = self.tensors();
        let mut names: Vec<String> = tensors.names().into_iter().map(String::from).collect();
        names.sort();
        names
    }

    /// A tensor of F32, F16 or BF16 elements, exactly.
    pub fn f32(&self, name: &str) -> ArrayD<f32> {
        self.array(name, |dtype, bytes| match dtype {
            Dtype::F32 => Some(decode(bytes, f32::from_le_bytes)),
            Dtype::F16 => Some(decode(bytes, |b| f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Some(decode(bytes, |b| bf16::from_le_bytes(b).to_f32())),
            _ => None,
        })
    }

    /// A tensor of I32 or I64 elements that fit 32 bits.
    pub fn i32(&self, name: &str) -> ArrayD<i32> {
        self.array(name, |dtype, bytes| match dtype {
            Dtype::I32 => Some(decode(bytes, i32::from_le_bytes)),
            Dtype::I64 => {
                Some(decode(bytes, |b| i32::try_from(i64::from_le_bytes(b)).expect("values fit 32 bits")))
            }
            _ => None,
        })
    }

    /// Token ids: an integer tensor without negative values, flattened.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.i32(name).iter().map(|&id| u32::try_from(id).expect("ids are not negative")).collect()
    }

    /// A tensor of U8 elements.
    pub fn u8(&self, name: &str) -> ArrayD<u8> {
        self.array(name, |dtype, bytes| (dtype == Dtype::U8).then(|| bytes.to_vec()))
    }

    /// What the library decodes quantized weights to: `dequant.json` beside the file.
    pub fn dequantized(&self) -> Vec<Dequantized> {
        let file = self.dir().join("dequant.json");
        let broken = |what: &str| -> ! { panic!("{}: {what}", file.display()) };
        let text = fs::read_to_string(&file).unwrap_or_else(|e| broken(&e.to_string()));
        let entries: Value = serde_json::from_str(&text).unwrap_or_else(|e| broken(&e.to_string()));
        let entries = entries.as_object().unwrap_or_else(|| broken("an object was expected"));
        let entry = |(name, entry): (&String, &Value)| {
            let size = |axis: usize| entry["shape"][axis].as_u64().unwrap_or_else(|| broken(name)) as usize;
            let text = |key: &str| entry[key].as_str().unwrap_or_else(|| broken(name)).to_owned();
            let (shape, half) = ([size(0), size(1)], text("dtype") == "F16");
            Dequantized { file: file.clone(), name: name.clone(), shape, half, sha256: text("sha256") }
        };
        entries.iter().map(entry).collect()
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap_or_else(|e| panic!("{}: {e}", self.file.display()))
    }

    fn array<T>(&self, name: &str, decode: impl Fn(Dtype, &[u8]) -> Option<Vec<T>>) -> ArrayD<T> {
        let at = || format!("{}, tensor {name}", self.file.display());
        let tensors = self.tensors();
        let view: TensorView<'_> = tensors.tensor(name).unwrap_or_else(|e| panic!("{}: {e}", at()));
        let values = decode(view.dtype(), view.data());
        let values = values.unwrap_or_else(|| panic!("{}: dtype {:?} was not expected", at(), view.dtype()));
        ArrayD::from_shape_vec(IxDyn(view.shape()), values).expect("the reader has checked the size")
    }
}

/// A matrix that a library decoded, known by the SHA-256 of its elements: row by row, as f32 in little-endian bytes,
/// which hold the elements of narrower types exactly. The matrices themselves would be a fifth of the repository.
pub struct Dequantized {
    file: PathBuf,
    /// Module path.
    pub name: String,
    /// `[rows, in]`; of large matrices the first rows.
    pub shape: [usize; 2],
    /// The library rounds to f16.
    pub half: bool,
    sha256: String,
}

impl Dequantized {
    /// Panics unless the first rows of `weights`: `[out, in]` are this matrix to the bit.
    pub fn check(&self, weights: ArrayView2<'_, f32>) {
        let [rows, cols] = self.shape;
        let at = format!("{}, {}", self.file.display(), self.name);
        assert_eq!(weights.ncols(), cols, "{at}: columns");
        let mut hash = Sha256::new();
        for row in weights.slice_axis(Axis(0), Slice::from(..rows)).rows() {
            row.iter().for_each(|weight| hash.update(weight.to_le_bytes()));
        }
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, self.sha256, "{at}: the weights are not the library's");
    }
}

fn decode<const N: usize, T>(bytes: &[u8], element: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&b| element(b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_element_type_in_use() {
        let layer = Golden::open("gptq-layer");
        assert_eq!(layer.f32("b2.g32.asym.scales").shape(), [64, 4]);
        let actorder = Golden::open("gptq-b4-g128-sym-actorder");
        assert_eq!(actorder.ids("input_ids").len(), 24);
        let dequantized = actorder.dequantized();
        assert_eq!(
            (&*dequantized[1].name, dequantized[1].shape),
            ("model.layers.1.mlp.down_proj", [128, 256])
        );
        assert!(dequantized[1].half);
        let codes: Vec<String> = layer.names().into_iter().filter(|n| n.ends_with("codes")).collect();
        assert!(!codes.is_empty());
        for name in codes {
            let bits: u32 = name[1..2].parse().unwrap();
            assert!(layer.u8(&name).iter().all(|&c| u32::from(c) < 1 << bits), "{name}");
        }
        assert_eq!(Golden::open("base-llama").i32("calib_input_ids").shape(), [64, 64]);
    }

    #[test]
    fn one_bit_is_another_matrix() {
        let weights = ndarray::array![[1.0f32, -2.5], [0.0, 3.0], [7.0, 7.0]];
        let sha256 = "0".to_owned();
        let (file, name) = (PathBuf::new(), "m".to_owned());
        let mut matrix = Dequantized { file, name, shape: [2, 2], half: false, sha256 };
        let fails = |matrix: &Dequantized, weights: &ndarray::Array2<f32>| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| matrix.check(weights.view()))).is_err()
        };
        assert!(fails(&matrix, &weights));
        // sha256sum of the bytes 0000803f 000020c0 00000000 00004040.
        matrix.sha256 = "8b68fe0ce9b208fb73f4fdbaf82cb8de08a7795b1511b5243775ad33457b38f9".to_owned();
        assert!(!fails(&matrix, &weights), "rows beyond the first two do not count");
        let mut other = weights.clone();
        other[[1, 0]] = -0.0;
        assert!(fails(&matrix, &other), "nor is a negative zero the same");
    }

    #[test]
    #[should_panic(expected = "tensor nowhere")]
    fn a_missing_tensor_is_named() {
        Golden::open("base-llama").f32("nowhere");
    }
}
