//! Quantized weights as real numbers, without rounding.
//!
//! A verdict on a conversion is a statement about real numbers, so nothing here rounds: every parameter is an f32,
//! that is an integer times a power of two, and so are sums and products of them.

use half::f16;
use quant_core::{Offset, QuantizedMatrix};
use rayon::prelude::*;

/// `mantissa * 2^exponent`, with an odd mantissa or zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dyadic {
    mantissa: i128,
    exponent: i32,
}

impl Dyadic {
    /// `None` for NaN and infinity.
    pub(super) fn of(x: f32) -> Option<Self> {
        let bits = x.to_bits();
        let (exponent, fraction) = ((bits >> 23 & 0xff) as i32, i128::from(bits & 0x7f_ffff));
        let (mantissa, exponent) = match exponent {
            0xff => return None,
            0 => (fraction, -149),
            e => (fraction | 1 << 23, e - 150),
        };
        Some(Self { mantissa: if x < 0.0 { -mantissa } else { mantissa }, exponent }.normal())
    }

    fn normal(self) -> Self {
        if self.mantissa == 0 {
            return Self { mantissa: 0, exponent: 0 };
        }
        let zeros = self.mantissa.trailing_zeros();
        Self { mantissa: self.mantissa >> zeros, exponent: self.exponent + zeros as i32 }
    }

    /// `None` where the mantissa does not fit 127 bits.
    fn times(self, other: Self) -> Option<Self> {
        let mantissa = self.mantissa.checked_mul(other.mantissa)?;
        Some(Self { mantissa, exponent: self.exponent + other.exponent }.normal())
    }

    /// `None` where the mantissa does not fit 127 bits.
    fn plus(self, other: Self) -> Option<Self> {
        if self.mantissa == 0 || other.mantissa == 0 {
            return Some(if self.mantissa == 0 { other } else { self });
        }
        let (low, high) = if self.exponent <= other.exponent { (self, other) } else { (other, self) };
        let shift = (high.exponent - low.exponent) as u32;
        let room = high.mantissa.unsigned_abs().leading_zeros();
        let raised = (shift + 1 < room).then(|| high.mantissa << shift)?;
        Some(Self { mantissa: low.mantissa.checked_add(raised)?, exponent: low.exponent }.normal())
    }

    fn negated(self) -> Self {
        Self { mantissa: -self.mantissa, ..self }
    }

    /// The nearest f64, except that one which is not exact has an odd last bit: rounding it again, to f16, gives what
    /// rounding the number itself gives.
    fn to_f64(self) -> f64 {
        let size = 128 - self.mantissa.unsigned_abs().leading_zeros();
        let cut = size.saturating_sub(53);
        let magnitude = self.mantissa.unsigned_abs();
        let kept = (magnitude >> cut) as u64 | u64::from(cut > 0);
        // Scaled in two steps: one factor could be too small for an f64.
        let exponent = self.exponent + cut as i32;
        let half = exponent / 2;
        let value = kept as f64 * (f64::from(half)).exp2() * f64::from(exponent - half).exp2();
        if self.mantissa < 0 { -value } else { value }
    }

    fn to_f16(self) -> f16 {
        f16::from_f64(self.to_f64())
    }
}

/// How far two matrices are apart, element by element.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Difference {
    /// Elements that are different real numbers.
    pub(super) reals: usize,
    /// Elements that are different numbers after rounding to f16.
    pub(super) halves: usize,
    /// Greatest difference, rounded up.
    pub(super) max_abs: f64,
}

impl Difference {
    fn join(self, other: Self) -> Self {
        Self {
            reals: self.reals + other.reals,
            halves: self.halves + other.halves,
            max_abs: self.max_abs.max(other.max_abs),
        }
    }

    fn of(a: &Term, b: &Term) -> Self {
        match (a.exact, b.exact) {
            (Some(x), Some(y)) if x == y => Self::default(),
            (Some(x), Some(y)) => {
                let apart = x.plus(y.negated()).map_or_else(|| a.apart(b), |d| d.to_f64().abs());
                // `to_f64` may have cut; the next number up is above in any case.
                Self { reals: 1, halves: usize::from(x.to_f16() != y.to_f16()), max_abs: apart.next_up() }
            }
            // Too long for the exact form, so not proven equal, which is what counts.
            _ => Self { reals: 1, halves: 1, max_abs: a.apart(b).next_up() },
        }
    }
}

/// An element: exactly where that fits, and rounded, with the size of what was added up.
#[derive(Clone, Copy)]
struct Term {
    exact: Option<Dyadic>,
    rounded: f64,
    size: f64,
}

impl Term {
    /// A bound of the difference in f64: at most eight roundings of 2^-53 of the sizes.
    fn apart(&self, other: &Term) -> f64 {
        (self.rounded - other.rounded).abs() + (self.size + other.size) * f64::EPSILON * 8.0
    }

    fn plain(x: f32) -> Self {
        Self { exact: Dyadic::of(x), rounded: f64::from(x), size: f64::from(x.abs()) }
    }
}

/// One row of a matrix in the order of input features.
struct Row<'a> {
    matrix: &'a QuantizedMatrix,
    row: usize,
    codes: Vec<u8>,
    groups: Vec<u32>,
    kept: Vec<Option<f32>>,
}

impl<'a> Row<'a> {
    fn new(matrix: &'a QuantizedMatrix, row: usize) -> Self {
        let cols = matrix.cols();
        let mut stored = vec![0; cols];
        matrix.codes.unpack_row(row, &mut stored);
        let (mut codes, mut groups) = (vec![0; cols], vec![0; cols]);
        for (c, &code) in stored.iter().enumerate() {
            let feature = matrix.input_perm.as_ref().map_or(c, |p| p.features()[c] as usize);
            codes[feature] = code;
            groups[feature] = matrix.groups.index(row, c, cols) as u32;
        }
        let mut kept = Vec::new();
        if let Some(outliers) = &matrix.outliers {
            kept = vec![None; cols];
            let n = outliers.columns.len();
            let mut values = vec![0.0; n];
            outliers.values.read_f32(row * n..(row + 1) * n, &mut values).expect("outliers are floats");
            outliers.columns.iter().zip(values).for_each(|(&c, v)| kept[c as usize] = Some(v));
        }
        Self { matrix, row, codes, groups, kept }
    }

    /// True if an element follows from its group and its code alone.
    fn uniform(&self) -> bool {
        self.matrix.col_scale.is_none() && self.kept.is_empty()
    }

    fn term(&self, feature: usize) -> Term {
        if let Some(Some(value)) = self.kept.get(feature) {
            return Term::plain(*value);
        }
        let m = self.matrix;
        let g = self.groups[feature] as usize;
        let (grid, scale) = (m.grid.value(self.codes[feature]), m.scales.get(g));
        let (zero, shift) = match &m.offset {
            Offset::None => (0.0, 0.0),
            Offset::Zero(zeros) => (zeros.get(g), 0.0),
            Offset::Shift { param, sign } => (0.0, sign * param.get(g)),
        };
        let factors = [
            m.row_scale.as_ref().map(|s| s[self.row]),
            m.col_scale.as_ref().map(|s| {
                let block = self.row / s.rows_per_block.max(1);
                s.values[block * m.cols() + feature]
            }),
        ];
        let exact = || {
            let level = Dyadic::of(grid)?.plus(Dyadic::of(-zero)?)?;
            let mut value = level.times(Dyadic::of(scale)?)?.plus(Dyadic::of(shift)?)?;
            for factor in factors.into_iter().flatten() {
                value = value.times(Dyadic::of(factor)?)?;
            }
            Some(value)
        };
        let product = (f64::from(grid) - f64::from(zero)) * f64::from(scale);
        let factor: f64 = factors.into_iter().flatten().map(f64::from).product();
        Term {
            exact: exact(),
            rounded: (product + f64::from(shift)) * factor,
            size: (product.abs() + f64::from(shift.abs())) * factor.abs(),
        }
    }
}

/// Compares two matrices of one shape as real numbers, in parallel over rows.
pub(super) fn difference(a: &QuantizedMatrix, b: &QuantizedMatrix) -> Difference {
    let rows = (0..a.rows()).into_par_iter();
    rows.map(|r| compare_row(&Row::new(a, r), &Row::new(b, r))).reduce(Difference::default, Difference::join)
}

fn compare_row(a: &Row<'_>, b: &Row<'_>) -> Difference {
    let mut total = Difference::default();
    // Where elements follow from group and code, each pair of them is looked at once.
    let memo_holds = a.uniform() && b.uniform();
    let mut memo: [Option<(u8, Difference)>; 256] = [None; 256];
    let mut memo_groups = (u32::MAX, u32::MAX);
    for f in 0..a.codes.len() {
        let groups = (a.groups[f], b.groups[f]);
        if groups != memo_groups {
            memo = [None; 256];
            memo_groups = groups;
        }
        let known = &mut memo[usize::from(a.codes[f])];
        let here = match known {
            Some((code, found)) if memo_holds && *code == b.codes[f] => *found,
            _ => {
                let found = Difference::of(&a.term(f), &b.term(f));
                *known = Some((b.codes[f], found));
                found
            }
        };
        total = total.join(here);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use quant_core::{Codes, Groups, Params};

    fn matrix(scale: f32, zero: f32, codes: &[u8]) -> QuantizedMatrix {
        let codes = Codes::from_values(4, 1, codes.len(), codes).unwrap();
        let groups = Groups::whole_row(codes.cols());
        let zeros = Offset::Zero(Params::F32(vec![zero]));
        QuantizedMatrix::affine(codes, groups, Params::F32(vec![scale]), zeros, 0)
    }

    #[test]
    fn nothing_is_lost() {
        // (1 + 2^-23)^2 is no f32, and differs from its rounding.
        let tiny = f32::EPSILON;
        let exact = matrix(1.0 + tiny, -tiny, &[1]);
        let rounded = matrix(1.0, 0.0, &[1]);
        let found = difference(&exact, &rounded);
        assert_eq!((found.reals, found.halves), (1, 0));
        let expected = 2.0 * f64::from(tiny) + f64::from(tiny).powi(2);
        assert!(found.max_abs >= expected && found.max_abs < expected * (1.0 + 1e-12), "{found:?}");
        assert_eq!(difference(&exact, &exact), Difference::default());
        // The same numbers in another form: (2 - 1) * 0.5 and (3 - 2.5) * 1.
        assert_eq!(difference(&matrix(0.5, 1.0, &[2]), &matrix(1.0, 2.5, &[3])), Difference::default());
    }

    #[test]
    fn what_does_not_fit_is_not_called_equal() {
        let wide = matrix(1.0, f32::from_bits(1), &[15]);
        let found = difference(&wide, &wide);
        assert!(found.reals == 1 && found.max_abs > 0.0, "{found:?}");
        assert!(found.max_abs < 1e-13);
        assert_eq!(Dyadic::of(f32::NAN), None);
    }

    proptest! {
        #[test]
        fn sums_and_products_are_those_of_f64_where_it_is_exact(
            a in -1000i32..1000, b in -1000i32..1000, e in -40i32..40, f in -40i32..40,
        ) {
            let (x, y) = (a as f32 * (e as f32).exp2(), b as f32 * (f as f32).exp2());
            let (dx, dy) = (Dyadic::of(x).unwrap(), Dyadic::of(y).unwrap());
            prop_assert_eq!(dx.to_f64(), f64::from(x));
            prop_assert_eq!(dx.times(dy).unwrap().to_f64(), f64::from(x) * f64::from(y));
            if (e - f).abs() < 30 {
                prop_assert_eq!(dx.plus(dy).unwrap().to_f64(), f64::from(x) + f64::from(y));
            }
            prop_assert_eq!(dx.to_f16(), f16::from_f32(x));
        }
    }
}
