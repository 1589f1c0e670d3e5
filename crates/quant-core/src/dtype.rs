//! Element types of tensors on disk, and a dense tensor that owns its bytes.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::error::TensorError;
use crate::minifloat;

/// Element type of a stored tensor. The order is that of the safetensors specification, which its
/// writer sorts by.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    Bool,
    F4,
    F6E2M3,
    F6E3M2,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    F8E8M0,
    F8E4M3Fnuz,
    F8E5M2Fnuz,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl DType {
    /// Every type with its name in a safetensors header and its width in bits.
    pub const ALL: [(DType, &'static str, usize); 22] = [
        (DType::Bool, "BOOL", 8),
        (DType::F4, "F4", 4),
        (DType::F6E2M3, "F6_E2M3", 6),
        (DType::F6E3M2, "F6_E3M2", 6),
        (DType::U8, "U8", 8),
        (DType::I8, "I8", 8),
        (DType::F8E5M2, "F8_E5M2", 8),
        (DType::F8E4M3, "F8_E4M3", 8),
        (DType::F8E8M0, "F8_E8M0", 8),
        (DType::F8E4M3Fnuz, "F8_E4M3FNUZ", 8),
        (DType::F8E5M2Fnuz, "F8_E5M2FNUZ", 8),
        (DType::I16, "I16", 16),
        (DType::U16, "U16", 16),
        (DType::F16, "F16", 16),
        (DType::BF16, "BF16", 16),
        (DType::I32, "I32", 32),
        (DType::U32, "U32", 32),
        (DType::F32, "F32", 32),
        (DType::C64, "C64", 64),
        (DType::F64, "F64", 64),
        (DType::I64, "I64", 64),
        (DType::U64, "U64", 64),
    ];

    fn row(self) -> (DType, &'static str, usize) {
        Self::ALL[self as usize]
    }

    /// Width of one element in bits.
    pub fn bits(self) -> usize {
        self.row().2
    }

    /// The name in a safetensors header, such as `F8_E4M3`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The type of that header name.
    pub fn from_name(name: &str) -> Option<DType> {
        Self::ALL.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// Bytes of a tensor of this shape. `None` when the size overflows or is no whole number of bytes.
    /// This is the one place where byte sizes of tensors are computed.
    pub fn byte_len(self, shape: &[usize]) -> Option<usize> {
        if shape.contains(&0) {
            return Some(0);
        }
        let elements = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// True for the types whose elements [`DenseTensor::to_f32`] understands.
    pub fn is_float(self) -> bool {
        matches!(
            self,
            DType::F8E5M2
                | DType::F8E4M3
                | DType::F8E8M0
                | DType::F8E4M3Fnuz
                | DType::F8E5M2Fnuz
                | DType::F16
                | DType::BF16
                | DType::F32
                | DType::F64
        )
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor as it lies on disk: type, shape and little-endian bytes. Cloning shares the bytes.
#[derive(Clone)]
pub struct DenseTensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Arc<[u8]>,
}

impl fmt::Debug for DenseTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DenseTensor({} {:?})", self.dtype, self.shape)
    }
}

impl DenseTensor {
    /// A tensor over these bytes, whose count must fit type and shape.
    pub fn new(dtype: DType, shape: Vec<usize>, bytes: impl Into<Arc<[u8]>>) -> Result<Self, TensorError> {
        let bytes = bytes.into();
        match dtype.byte_len(&shape) {
            Some(len) if len == bytes.len() => Ok(Self { dtype, shape, bytes }),
            expected => Err(TensorError::ByteLen { dtype, shape, expected, found: bytes.len() }),
        }
    }

    /// An F32 tensor. Panics if `values` does not fit `shape`.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Self {
        Self::from_le(DType::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()))
    }

    /// An F16 tensor, rounded to nearest even. Panics if `values` does not fit `shape`.
    pub fn from_f32_as_f16(shape: &[usize], values: &[f32]) -> Self {
        Self::from_le(DType::F16, shape, values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()))
    }

    /// A tensor of a plain float type, rounded to nearest even. `None` for other types. Panics if `values` does not fit
    /// `shape`.
    pub fn from_f32_as(dtype: DType, shape: &[usize], values: &[f32]) -> Option<Self> {
        let bf16s = || values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes());
        match dtype {
            DType::F32 => Some(Self::from_f32(shape, values)),
            DType::F16 => Some(Self::from_f32_as_f16(shape, values)),
            DType::BF16 => Some(Self::from_le(dtype, shape, bf16s())),
            DType::F64 => {
                Some(Self::from_le(dtype, shape, values.iter().flat_map(|&v| f64::from(v).to_le_bytes())))
            }
            _ => None,
        }
    }

    /// An I32 tensor. Panics if `values` does not fit `shape`.
    pub fn from_i32(shape: &[usize], values: &[i32]) -> Self {
        Self::from_le(DType::I32, shape, values.iter().flat_map(|v| v.to_le_bytes()))
    }

    fn from_le(dtype: DType, shape: &[usize], bytes: impl Iterator<Item = u8>) -> Self {
        Self::new(dtype, shape.to_vec(), bytes.collect::<Vec<u8>>()).expect("values fit the shape")
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The bytes, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True if a dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same elements under another shape of equal element count.
    pub fn reshaped(&self, shape: Vec<usize>) -> Result<Self, TensorError> {
        Self::new(self.dtype, shape, self.bytes.clone())
    }

    /// All elements as f32 (exact for every float type but F64).
    pub fn to_f32(&self) -> Result<Vec<f32>, TensorError> {
        let mut out = vec![0.0; self.len()];
        self.read_f32(0..self.len(), &mut out)?;
        Ok(out)
    }

    /// Elements `range` of the flattened tensor as f32 into `out`, which must have the same length.
    /// Panics if the range lies outside the tensor.
    pub fn read_f32(&self, range: Range<usize>, out: &mut [f32]) -> Result<(), TensorError> {
        assert_eq!(range.len(), out.len(), "the output holds the range");
        if !self.dtype.is_float() {
            return Err(TensorError::NotFloat { dtype: self.dtype });
        }
        let width = self.dtype.bits() / 8;
        let bytes = &self.bytes[range.start * width..range.end * width];
        let table = |bytes: &[u8], out: &mut [f32], decode: fn(u8) -> f32| {
            bytes.iter().zip(out).for_each(|(&b, o)| *o = decode(b));
        };
        match self.dtype {
            DType::F32 => each(bytes, out, f32::from_le_bytes),
            DType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
            DType::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            DType::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            DType::F8E4M3 => table(bytes, out, minifloat::e4m3_to_f32),
            DType::F8E5M2 => table(bytes, out, minifloat::e5m2_to_f32),
            DType::F8E8M0 => table(bytes, out, minifloat::e8m0_to_f32),
            DType::F8E4M3Fnuz => table(bytes, out, minifloat::e4m3fnuz_to_f32),
            DType::F8E5M2Fnuz => table(bytes, out, minifloat::e5m2fnuz_to_f32),
            _ => return Err(TensorError::NotFloat { dtype: self.dtype }),
        }
        Ok(())
    }

    /// All elements of an I32 tensor.
    pub fn to_i32(&self) -> Result<Vec<i32>, TensorError> {
        if self.dtype != DType::I32 {
            return Err(TensorError::DType { expected: DType::I32, found: self.dtype });
        }
        let mut out = vec![0; self.len()];
        each(&self.bytes, &mut out, i32::from_le_bytes);
        Ok(out)
    }
}

/// Decodes little-endian elements of `N` bytes.
fn each<const N: usize, T>(bytes: &[u8], out: &mut [T], decode: impl Fn([u8; N]) -> T) {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().zip(out).for_each(|(&chunk, o)| *o = decode(chunk));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_in_enum_order() {
        for (i, row) in DType::ALL.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(DType::from_name(row.1), Some(row.0));
        }
    }

    #[test]
    fn sizes_overflow_to_none() {
        assert_eq!(DType::F32.byte_len(&[1 << 32, 1 << 32]), None);
        assert_eq!(DType::F4.byte_len(&[3]), None);
        assert_eq!(DType::F32.byte_len(&[]), Some(4));
        assert_eq!(DType::F32.byte_len(&[usize::MAX, 0]), Some(0));
    }

    /// A million shapes of sizes from nothing to far beyond any memory, against 128-bit integers.
    #[test]
    fn byte_len_is_exact() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 11
        };
        let (mut sizes, mut refused) = (0, 0);
        let mut shape = Vec::new();
        for _ in 0..1_000_000 {
            let dtype = DType::ALL[(next() % 22) as usize].0;
            shape.clear();
            for _ in 0..next() % 6 {
                // Every magnitude is as likely; one in 50 is zero.
                let size = next() >> (next() % 53);
                shape.push(if next() % 50 == 0 { 0 } else { size as usize });
            }
            let exact = if shape.contains(&0) {
                Some(0)
            } else {
                let bits =
                    shape.iter().try_fold(dtype.bits() as u128, |bits, &dim| bits.checked_mul(dim as u128));
                bits.filter(|bits| bits % 8 == 0 && *bits <= usize::MAX as u128)
                    .map(|bits| (bits / 8) as usize)
            };
            assert_eq!(dtype.byte_len(&shape), exact, "{dtype} {shape:?}");
            *if exact.is_some() { &mut sizes } else { &mut refused } += 1;
        }
        assert!(sizes > 100_000 && refused > 100_000, "{sizes} sizes, {refused} refused");
    }

    proptest! {
        #[test]
        fn halves_round_trip(values in prop::collection::vec(-1000.0f32..1000.0, 0..40)) {
            let t = DenseTensor::from_f32_as_f16(&[values.len()], &values);
            let back = t.to_f32().unwrap();
            for (v, b) in values.iter().zip(back) {
                prop_assert_eq!(f16::from_f32(*v).to_f32(), b);
            }
        }
    }
}
