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
    /// Borders belong to the even code.
    even: bool,
}

impl Codebook {
    /// Of the values by code, at most 256. Codes of NaN and infinity are never used.
    pub fn new(table: &[f32]) -> Self {
        let mut codes: Vec<u8> = (0..=u8::MAX).take(table.len()).collect();
        codes.retain(|&code| table[usize::from(code)].is_finite());
        codes.sort_by(|&a, &b| table[usize::from(a)].total_cmp(&(table[usize::from(b)])));
        let value = |code: u8| table[usize::from(code)];
        let borders = codes.windows(2).map(|pair| (value(pair[0]) + value(pair[1])) / 2.0).collect();
        Self { borders, codes, even: false }
    }

    /// Of a table of floats by their bits: borders belong to the even code, and zeros keep their sign.
    pub fn of_floats(table: &[f32]) -> Self {
        Self { even: true, ..Self::new(table) }
    }

    /// The code of the nearest value.
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        // Few borders are counted, which vectorises; many are searched.
        let below = match self.borders.len() {
            0..=15 => self.borders.iter().map(|&border| usize::from(border < x)).sum(),
            _ => self.borders.partition_point(|&border| border < x),
        };
        if self.even && self.borders.get(below) == Some(&x) {
            let upper = if x == 0.0 { x.is_sign_positive() } else { self.codes[below] % 2 == 1 };
            return self.codes[below + usize::from(upper)];
        }
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

    #[test]
    fn floats_are_rounded_to_even() {
        let book = Codebook::of_floats(&GridKind::E2M1.table().unwrap());
        for (x, code) in [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (9.0, 7)]
        {
            assert_eq!((book.code(x), book.code(-x)), (code, code + 8), "{x}");
        }
        assert_eq!((book.code(0.0), book.code(-0.0), book.code(-0.1)), (0, 8, 8));
        let book = Codebook::of_floats(&GridKind::E4M3.table().unwrap());
        assert_eq!((book.code(1e9), book.code(-1e9)), (0x7E, 0xFE), "NaN is no value");
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
