//! Elementwise operations.

use super::{Operation, apply, check_length, math};
use crate::error::ShapeError;

/// A function of one number, applied to each element.
trait Map {
    fn map(x: f32) -> f32;
}

struct InPlace<'a, M> {
    x: &'a mut [f32],
    map: std::marker::PhantomData<M>,
}

impl<M: Map> Operation for InPlace<'_, M> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.x {
            *x = M::map(*x);
        }
    }
}

fn map<M: Map>(x: &mut [f32]) {
    apply(InPlace { x, map: std::marker::PhantomData::<M> });
}

/// `x = x * sigmoid(x)`.
pub fn silu(x: &mut [f32]) {
    map::<Silu>(x);
}

struct Silu;

impl Map for Silu {
    #[inline(always)]
    fn map(x: f32) -> f32 {
        x * math::sigmoid(x)
    }
}

/// `x = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`.
pub fn gelu_tanh(x: &mut [f32]) {
    map::<GeluTanh>(x);
}

struct GeluTanh;

impl Map for GeluTanh {
    #[inline(always)]
    fn map(x: f32) -> f32 {
        // (1 + tanh u) / 2 is the logistic function of 2 u.
        const SCALE: f32 = 1.595_769; // 2 sqrt(2 / pi)
        let cube = 0.044_715 * x * x * x;
        x * math::sigmoid(SCALE * (x + cube))
    }
}

/// `x = x * (1 + erf(x / sqrt 2)) / 2`.
pub fn gelu_erf(x: &mut [f32]) {
    map::<GeluErf>(x);
}

struct GeluErf;

impl Map for GeluErf {
    #[inline(always)]
    fn map(x: f32) -> f32 {
        let tail = math::normal_tail(x);
        x * if x < 0.0 { tail } else { 1.0 - tail }
    }
}

/// `x = max(x, 0)`; NaN stays.
pub fn relu(x: &mut [f32]) {
    map::<Relu>(x);
}

struct Relu;

impl Map for Relu {
    #[inline(always)]
    fn map(x: f32) -> f32 {
        if x < 0.0 { 0.0 } else { x }
    }
}

/// `gate = gate * sigmoid(gate) * up`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) -> Result<(), ShapeError> {
    check_length("up", gate.len(), up.len())?;
    apply(SiluMul { gate, up });
    Ok(())
}

struct SiluMul<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Operation for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (x, up) in self.gate.iter_mut().zip(self.up) {
            *x = *x * math::sigmoid(*x) * up;
        }
    }
}

/// `x = x + y`.
pub fn add(x: &mut [f32], y: &[f32]) -> Result<(), ShapeError> {
    check_length("y", x.len(), y.len())?;
    apply(Add { x, y });
    Ok(())
}

struct Add<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl Operation for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (x, y) in self.x.iter_mut().zip(self.y) {
            *x += y;
        }
    }
}

/// `y = fma(a, x, y)`.
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    check_length("y", x.len(), y.len())?;
    apply(Axpy { a, x, y });
    Ok(())
}

struct Axpy<'a> {
    a: f32,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Operation for Axpy<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (y, x) in self.y.iter_mut().zip(self.x) {
            *y = self.a.mul_add(*x, *y);
        }
    }
}

/// Rotates the pairs `(x[i], x[i + d/2])` of heads `[heads, d]` by the angles of their position; `cos`, `sin`: `[d/2]`.
pub fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) -> Result<(), ShapeError> {
    let dim = 2 * cos.len();
    check_length("sin", cos.len(), sin.len())?;
    check_length("heads", heads.len() / dim.max(1) * dim, heads.len())?;
    apply(Rope { heads, cos, sin });
    Ok(())
}

struct Rope<'a> {
    heads: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Operation for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for head in self.heads.chunks_exact_mut((2 * self.cos.len()).max(1)) {
            let (low, high) = head.split_at_mut(self.cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
                // Rounded step by step, as the reference implementations do.
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
    }
}
