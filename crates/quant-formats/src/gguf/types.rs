//! Element types of GGUF tensors.

use std::fmt;

use quant_core::DType;

/// Element type of a tensor in a GGUF file. Elements are stored in blocks along the rows; plain numbers are blocks
/// of one. The number of a variant is its number in a file.
#[allow(missing_docs, non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum GgmlType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

/// One row of the table: type, name, elements and bytes of a block.
type Row = (GgmlType, &'static str, usize, usize);

impl GgmlType {
    /// Every type of the format, by number.
    #[rustfmt::skip]
    const ALL: [Row; 35] = {
        use GgmlType::*;
        [
            (F32, "F32", 1, 4), (F16, "F16", 1, 2), (Q4_0, "Q4_0", 32, 18), (Q4_1, "Q4_1", 32, 20),
            (Q5_0, "Q5_0", 32, 22), (Q5_1, "Q5_1", 32, 24), (Q8_0, "Q8_0", 32, 34), (Q8_1, "Q8_1", 32, 36),
            (Q2_K, "Q2_K", 256, 84), (Q3_K, "Q3_K", 256, 110), (Q4_K, "Q4_K", 256, 144),
            (Q5_K, "Q5_K", 256, 176), (Q6_K, "Q6_K", 256, 210), (Q8_K, "Q8_K", 256, 292),
            (IQ2_XXS, "IQ2_XXS", 256, 66), (IQ2_XS, "IQ2_XS", 256, 74), (IQ3_XXS, "IQ3_XXS", 256, 98),
            (IQ1_S, "IQ1_S", 256, 50), (IQ4_NL, "IQ4_NL", 32, 18), (IQ3_S, "IQ3_S", 256, 110),
            (IQ2_S, "IQ2_S", 256, 82), (IQ4_XS, "IQ4_XS", 256, 136), (I8, "I8", 1, 1), (I16, "I16", 1, 2),
            (I32, "I32", 1, 4), (I64, "I64", 1, 8), (F64, "F64", 1, 8), (IQ1_M, "IQ1_M", 256, 56),
            (BF16, "BF16", 1, 2), (TQ1_0, "TQ1_0", 256, 54), (TQ2_0, "TQ2_0", 256, 66),
            (MXFP4, "MXFP4", 32, 17), (NVFP4, "NVFP4", 64, 36), (Q1_0, "Q1_0", 128, 18), (Q2_0, "Q2_0", 64, 18),
        ]
    };

    fn row(self) -> &'static Row {
        Self::ALL.iter().find(|row| row.0 == self).expect("every type has a row")
    }

    /// The type of that number in a file. Types that llama.cpp has removed have none.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().find(|row| row.0 as u32 == id).map(|row| row.0)
    }

    /// The type of that name, such as `Q4_K`, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|row| row.1.eq_ignore_ascii_case(name)).map(|row| row.0)
    }

    /// The types of quantized weights.
    pub(crate) fn blocks() -> impl Iterator<Item = Self> {
        Self::ALL.iter().map(|row| row.0).filter(|ty| ty.dtype().is_none())
    }

    /// Number in a file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The name that llama.cpp gives it.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Elements of a block.
    pub fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// The same type outside GGUF, for those that are plain numbers.
    pub fn dtype(self) -> Option<DType> {
        Some(match self {
            GgmlType::F32 => DType::F32,
            GgmlType::F16 => DType::F16,
            GgmlType::BF16 => DType::BF16,
            GgmlType::F64 => DType::F64,
            GgmlType::I8 => DType::I8,
            GgmlType::I16 => DType::I16,
            GgmlType::I32 => DType::I32,
            GgmlType::I64 => DType::I64,
            _ => return None,
        })
    }

    /// The type of plain numbers that have a type here.
    pub fn from_dtype(dtype: DType) -> Option<Self> {
        Self::ALL.iter().map(|row| row.0).find(|ty| ty.dtype() == Some(dtype))
    }

    /// The shape of a tensor's blocks as bytes: that of its elements with a row's bytes for its elements. `None` if
    /// rows are no whole number of blocks.
    pub(crate) fn byte_shape(self, shape: &[usize]) -> Option<Vec<usize>> {
        let mut shape = shape.to_vec();
        let row = shape.last_mut()?;
        if !row.is_multiple_of(self.block_len()) {
            return None;
        }
        *row = (*row / self.block_len()).checked_mul(self.block_bytes())?;
        Some(shape)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_lead_to_the_type() {
        for &(ty, name, ..) in &GgmlType::ALL {
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
            assert_eq!(GgmlType::from_name(&name.to_lowercase()), Some(ty));
            assert_eq!(ty.dtype().map_or(Some(ty), GgmlType::from_dtype), Some(ty));
        }
        for removed in [4, 5, 31, 33, 36, 38, 43, u32::MAX] {
            assert_eq!(GgmlType::from_id(removed), None);
        }
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(GgmlType::Q4_K.byte_shape(&[3, 512]), Some(vec![3, 288]));
        assert_eq!(GgmlType::Q4_0.byte_shape(&[2, 33]), None);
        assert_eq!(GgmlType::Q8_0.byte_shape(&[usize::MAX - 31]), None);
    }
}
