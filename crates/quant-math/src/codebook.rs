//! The nearest value of a table.

/// A table of values, ready to find the nearest one.
///
/// The borders between values are their midpoints in f32; a number on a border gets the smaller value. Of equal values
/// the one with the smaller code takes the border itself, the other what lies above: that is how bitsandbytes tells the
/// two zeros of its 4-bit float apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebook {
    /// Midpoints of neighbours, ascending.
    borders: Vec<f32>,
    /// Codes by ascending value.
    codes: Vec<u8>,
}

impl Codebook {
    /// Of the values by code, at most 256, none of them NaN.
    pub fn new(table: &[f32]) -> Self {
        let mut codes: Vec<u8> = (0..=u8::MAX).take(table.len()).collect();
        codes.sort_by(|&a, &b| table[usize::from(a)].total_cmp(&(table[usize::from(b)])));
        let value = |code: u8| table[usize::from(code)];
        let borders = codes.windows(2).map(|pair| (value(pair[0]) + value(pair[1])) / 2.0).collect();
        Self { borders, codes }
    }

    /// The code of the nearest value.
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        // Few borders are counted, which vectorises; many are searched.
        let below = match self.borders.len() {
            0..=15 => self.borders.iter().map(|&border| usize::from(border < x)).sum(),
            _ => self.borders.partition_point(|&border| border < x),
        };
        self.codes[below]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use quant_core::GridKind;

    use super::*;

    #[test]
    fn borders_belong_to_the_smaller_value() {
        let book = Codebook::new(&[0.0, 1.0, -1.0, 4.0]);
        for (x, code) in [(-9.0, 2), (-0.5, 2), (-0.4, 0), (0.5, 0), (0.6, 1), (2.5, 1), (2.6, 3), (9.0, 3)] {
            assert_eq!(book.code(x), code, "{x}");
        }
    }

    #[test]
    fn both_zeros_are_used() {
        let book = Codebook::new(&GridKind::Fp4.table().unwrap());
        assert_eq!((book.code(-0.002), book.code(0.0), book.code(0.002)), (0, 0, 8));
        assert_eq!((book.code(-0.003), book.code(0.003), book.code(-1.0)), (9, 1, 11));
    }

    proptest! {
        #[test]
        fn no_value_is_nearer(table in prop::collection::vec(-1.0f32..1.0, 1..40), x in -1.5f32..1.5) {
            let found = table[usize::from(Codebook::new(&table).code(x))];
            // A border is rounded to f32, which moves it by at most 2^-24.
            for &value in &table {
                prop_assert!((x - found).abs() <= (x - value).abs() + 1.2e-7, "{} {} {}", x, found, value);
            }
        }
    }
}
