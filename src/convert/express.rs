//! The same real numbers in another form.

use half::{bf16, f16};
use quant_core::{Codes, Grid, GridKind, Groups, Offset, Params, ParamsKind, QuantSpec, QuantizedMatrix};

/// How a matrix is to be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Bits, grid, groups and type of the scales.
    pub(super) spec: QuantSpec,
    /// Where zero lies.
    pub(super) offset: OffsetForm,
}

/// Where zero lies in a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OffsetForm {
    /// In the middle of the codes, unsaid.
    Middle,
    /// An integer per group.
    Integer,
    /// A number per group.
    Float(ParamsKind),
    /// `scale * code + sign * shift`, with a shift per group.
    Shift {
        /// 1 or -1.
        sign: i8,
        /// Type of the shifts.
        kind: ParamsKind,
    },
}

/// Grid values as integers times a power of two.
struct Levels {
    of_code: Vec<i32>,
    unit: f32,
}

impl Levels {
    /// `None` for a table that is not evenly divided, such as NF4.
    fn of(grid: &Grid, max: u8) -> Option<Self> {
        let table = match grid {
            Grid::Int { midpoint } => {
                return Some(Self {
                    of_code: (0..=i32::from(max)).map(|c| c - midpoint).collect(),
                    unit: 1.0,
                });
            }
            Grid::Table(table) => table,
        };
        const LARGEST: f32 = 255.0;
        let mut unit = 1.0f32;
        let whole = |unit: f32| table.iter().all(|v| (v / unit).fract() == 0.0);
        while !whole(unit) {
            unit /= 2.0;
            if table.iter().any(|v| (v / unit).abs() > LARGEST) {
                return None;
            }
        }
        let fits = table.iter().all(|v| (v / unit).abs() <= LARGEST);
        fits.then(|| Self { of_code: table.iter().map(|v| (v / unit) as i32).collect(), unit })
    }

    fn least(&self) -> i32 {
        self.of_code.iter().copied().min().unwrap_or(0)
    }
}

/// Puts `matrix` in a form, keeping its values as far as the form allows. `None` if the form needs other codes, other
/// groups or numbers that it cannot hold. Whether the result is the same matrix is for the caller to find out: scales
/// and offsets may have been rounded.
pub(super) fn express(matrix: &QuantizedMatrix, form: &Form) -> Option<QuantizedMatrix> {
    if *form == (Form { spec: matrix.spec(), offset: offset_form(&matrix.offset)? }) {
        return Some(matrix.clone());
    }
    let regrouped = Regrouped::new(matrix, &form.spec)?;
    let same_table = form.spec.grid == matrix.grid.kind() && form.spec.grid != GridKind::Int;
    let (codes, grid, offset, unit) = if same_table {
        if form.spec.bits != matrix.codes.bits() || form.offset != offset_form(&matrix.offset)? {
            return None;
        }
        let offset = match &matrix.offset {
            Offset::None => Offset::None,
            Offset::Zero(p) => Offset::Zero(regrouped.params(p, p.kind(), 1.0)?),
            Offset::Shift { param, sign } => {
                Offset::Shift { param: regrouped.params(param, param.kind(), 1.0)?, sign: *sign }
            }
        };
        (regrouped.codes(matrix.codes.bits(), |_, code| Some(code))?, matrix.grid.clone(), offset, 1.0)
    } else if form.spec.grid == GridKind::Int {
        let levels = Levels::of(&matrix.grid, matrix.codes.max())?;
        let (codes, grid, offset) = integers(matrix, form, &regrouped, &levels)?;
        (codes, grid, offset, levels.unit)
    } else {
        return None;
    };
    let scales = regrouped.params(&matrix.scales, form.spec.scales, unit)?;
    let mut result = QuantizedMatrix::affine(codes, regrouped.groups.clone(), scales, offset, 0);
    result.grid = grid;
    result.row_scale = matrix.row_scale.clone();
    result.col_scale = matrix.col_scale.clone();
    result.outliers = matrix.outliers.clone();
    result.dtype = matrix.dtype;
    if form.spec.act_order {
        result.input_perm = matrix.input_perm.clone();
    }
    result.validate().is_ok().then_some(result)
}

/// Bits of integer codes that hold those of a matrix: around the middle of the range for a symmetric grid, else from
/// zero on. `None` if its values are no integers times a scale.
pub(super) fn bits_needed(matrix: &QuantizedMatrix, symmetric: bool) -> Option<u8> {
    let levels = Levels::of(&matrix.grid, matrix.codes.max())?;
    if symmetric {
        let (mut low, mut high) = (0i64, 0i64);
        let cols = matrix.cols();
        let mut codes = vec![0; cols];
        for r in 0..matrix.rows() {
            matrix.codes.unpack_row(r, &mut codes);
            let mut c = 0;
            while c < cols {
                let end = matrix.groups.run_end(r, c, cols);
                let zero = zero_of(matrix, levels.unit, matrix.groups.index(r, c, cols));
                if zero.fract() != 0.0 || zero.abs() > 512.0 {
                    return None;
                }
                for &code in &codes[c..end] {
                    let level = i64::from(levels.of_code[usize::from(code)]) - zero as i64;
                    (low, high) = (low.min(level), high.max(level));
                }
                c = end;
            }
        }
        return (1..=8).find(|&bits| -(1 << (bits - 1)) <= low && high < 1 << (bits - 1));
    }
    let most = levels.of_code.iter().copied().max()?;
    (1..=8).find(|&bits| most - levels.least() < 1 << bits)
}

/// Where the zero of a group lies, in units of the grid. A quotient may be rounded here.
fn zero_of(matrix: &QuantizedMatrix, unit: f32, group: usize) -> f64 {
    match &matrix.offset {
        Offset::None => 0.0,
        Offset::Zero(zeros) => f64::from(zeros.get(group)) / f64::from(unit),
        Offset::Shift { param, sign } => {
            let scale = f64::from(matrix.scales.get(group)) * f64::from(unit);
            -f64::from(sign * param.get(group)) / scale
        }
    }
}

/// The form in which a matrix has its zero now.
pub(super) fn offset_form(offset: &Offset) -> Option<OffsetForm> {
    Some(match offset {
        Offset::None => OffsetForm::Middle,
        Offset::Zero(Params::U8(_)) => OffsetForm::Integer,
        Offset::Zero(params) => OffsetForm::Float(params.kind()),
        Offset::Shift { param, sign } => OffsetForm::Shift { sign: *sign as i8, kind: param.kind() },
    })
}

/// The shifts of a matrix that has them with this sign.
fn own_shift(matrix: &QuantizedMatrix, sign: i8) -> Option<&Params> {
    match &matrix.offset {
        Offset::Shift { param, sign: own } if *own == f32::from(sign) => Some(param),
        _ => None,
    }
}

/// Codes, grid and offset of an integer form.
fn integers(
    matrix: &QuantizedMatrix,
    form: &Form,
    regrouped: &Regrouped<'_>,
    levels: &Levels,
) -> Option<(Codes, Grid, Offset)> {
    let bits = form.spec.bits;
    let unit = f64::from(levels.unit);
    let zero = |g: usize| zero_of(matrix, levels.unit, g);
    if form.spec.symmetric {
        // Codes around the middle, whatever zero points there were: bits may be needed for it, reals are not lost.
        let middle = 1i32 << (bits - 1);
        let zeros: Vec<f64> = (0..matrix.scales.len()).map(zero).collect();
        if zeros.iter().any(|z| z.fract() != 0.0 || z.abs() > 512.0) {
            return None;
        }
        let shifted = |g: usize, code: u8| {
            let level = levels.of_code[usize::from(code)] - zeros[g] as i32 + middle;
            u8::try_from(level).ok()
        };
        let codes = regrouped.codes(bits, shifted)?;
        return match form.offset {
            OffsetForm::Middle => Some((codes, Grid::Int { midpoint: middle }, Offset::None)),
            OffsetForm::Integer => {
                let zeros = vec![middle as u8; regrouped.of_group.len()];
                Some((codes, Grid::UNSIGNED, Offset::Zero(Params::U8(zeros))))
            }
            _ => None,
        };
    }
    let least = levels.least();
    let raw = |_: usize, code: u8| u8::try_from(levels.of_code[usize::from(code)] - least).ok();
    let codes = regrouped.codes(bits, raw)?;
    // Zero and shift of the new groups, for codes that begin at zero.
    let start = f64::from(-least);
    let of_groups = |value: &dyn Fn(usize) -> f64| -> Vec<f64> {
        regrouped.of_group.iter().map(|&g| value(g as usize)).collect()
    };
    let offset = match form.offset {
        OffsetForm::Middle => return None,
        OffsetForm::Integer => {
            let whole = |z: f64| (z.fract() == 0.0 && (0.0..=255.0).contains(&z)).then_some(z as u8);
            let zeros = of_groups(&|g| zero(g) + start).into_iter().map(whole);
            Offset::Zero(Params::U8(zeros.collect::<Option<_>>()?))
        }
        OffsetForm::Float(kind) => Offset::Zero(rounded(&of_groups(&|g| zero(g) + start), kind)?),
        // Shifts that stay as they are may have two levels.
        OffsetForm::Shift { sign, kind } if start == 0.0 && own_shift(matrix, sign).is_some() => {
            let param = regrouped.params(own_shift(matrix, sign)?, kind, 1.0)?;
            Offset::Shift { param, sign: f32::from(sign) }
        }
        OffsetForm::Shift { sign, kind } => {
            let shift = of_groups(&|g| {
                let scale = f64::from(matrix.scales.get(g)) * unit;
                let sum = match &matrix.offset {
                    Offset::Shift { param, sign } => f64::from(sign * param.get(g)) - scale * start,
                    _ => -scale * (zero(g) + start),
                };
                f64::from(sign) * sum
            });
            Offset::Shift { param: rounded(&shift, kind)?, sign: f32::from(sign) }
        }
    };
    Some((codes, Grid::UNSIGNED, offset))
}

/// Elements in other groups, each of which lies inside one of the old ones.
struct Regrouped<'a> {
    matrix: &'a QuantizedMatrix,
    groups: Groups,
    /// The old group of each new one.
    of_group: Vec<u32>,
    /// The old column of each new one; `None` is the identity.
    order: Option<Vec<u32>>,
}

impl<'a> Regrouped<'a> {
    fn new(matrix: &'a QuantizedMatrix, spec: &QuantSpec) -> Option<Self> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let order = match &matrix.input_perm {
            Some(perm) if !spec.act_order => Some(perm.inverse()),
            _ => None,
        };
        let groups = match &matrix.groups {
            groups @ Groups::Index { .. } if spec.act_order => groups.clone(),
            _ => spec.group.groups(rows, cols),
        };
        const UNSET: u32 = u32::MAX;
        let mut of_group = vec![UNSET; groups.count(rows, cols)];
        for r in 0..rows {
            for c in 0..cols {
                let old = order.as_ref().map_or(c, |o| o[c] as usize);
                let from = matrix.groups.index(r, old, cols) as u32;
                let slot = &mut of_group[groups.index(r, c, cols)];
                match *slot {
                    UNSET => *slot = from,
                    known if known == from || same_params(matrix, known, from) => {}
                    _ => return None,
                }
            }
        }
        // A group without elements has no parameters to take.
        (!of_group.contains(&UNSET)).then_some(Self { matrix, groups, of_group, order })
    }

    /// Codes made by `map(old group, old code)`. `None` if one does not exist or does not fit.
    fn codes(&self, bits: u8, map: impl Fn(usize, u8) -> Option<u8>) -> Option<Codes> {
        let (rows, cols) = (self.matrix.rows(), self.matrix.cols());
        let mut codes = Codes::zeros(bits, rows, cols).ok()?;
        let (mut old, mut new) = (vec![0; cols], vec![0; cols]);
        for r in 0..rows {
            self.matrix.codes.unpack_row(r, &mut old);
            for (c, new) in new.iter_mut().enumerate() {
                let from = self.order.as_ref().map_or(c, |o| o[c] as usize);
                let group = self.matrix.groups.index(r, from, cols);
                *new = map(group, old[from]).filter(|&code| code <= codes.max())?;
            }
            codes.set_row(r, &new);
        }
        Some(codes)
    }

    /// Parameters of the new groups, times `unit`.
    fn params(&self, params: &Params, kind: ParamsKind, unit: f32) -> Option<Params> {
        let unmoved = || self.of_group.iter().enumerate().all(|(i, &g)| i == g as usize);
        if kind == params.kind() && unit == 1.0 && self.of_group.len() == params.len() && unmoved() {
            return Some(params.clone());
        }
        let values = self.of_group.iter().map(|&g| f64::from(params.get(g as usize)) * f64::from(unit));
        rounded(&values.collect::<Vec<_>>(), kind)
    }
}

fn same_params(matrix: &QuantizedMatrix, a: u32, b: u32) -> bool {
    let same = |p: &Params| p.get(a as usize).to_bits() == p.get(b as usize).to_bits();
    same(&matrix.scales)
        && match &matrix.offset {
            Offset::None => true,
            Offset::Zero(p) | Offset::Shift { param: p, .. } => same(p),
        }
}

/// Parameters of one level. Rounded to the nearest; powers of two and FP8 must be exact.
fn rounded(values: &[f64], kind: ParamsKind) -> Option<Params> {
    if values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    let finite = |p: Params| p.first_non_finite().is_none().then_some(p);
    let each = values.iter().copied();
    match kind {
        ParamsKind::F32 => finite(Params::F32(each.map(|v| v as f32).collect())),
        ParamsKind::F16 => finite(Params::F16(each.map(f16::from_f64).collect())),
        ParamsKind::BF16 => finite(Params::BF16(each.map(bf16::from_f64).collect())),
        ParamsKind::U8 => {
            let whole = |v: f64| (v.fract() == 0.0 && (0.0..=255.0).contains(&v)).then_some(v as u8);
            Some(Params::U8(each.map(whole).collect::<Option<_>>()?))
        }
        ParamsKind::E8M0 => {
            let power = |v: f64| {
                let exponent = v.log2();
                (exponent.fract() == 0.0 && (-127.0..=127.0).contains(&exponent))
                    .then(|| (exponent as i32 + 127) as u8)
            };
            Some(Params::E8M0(each.map(power).collect::<Option<_>>()?))
        }
        _ => None,
    }
}
