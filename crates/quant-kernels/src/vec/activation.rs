//! Elementwise operations.

use super::{apply, check_length, math};
use crate::error::ShapeError;

/// `x = x * sigmoid(x)`.
pub fn silu(x: &mut [f32]) {
    apply(x, silu_body);
}

#[inline(always)]
fn silu_body(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x *= math::sigmoid(*x));
}

/// `gate = gate * sigmoid(gate) * up`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) -> Result<(), ShapeError> {
    check_length("up", gate.len(), up.len())?;
    apply((gate, up), silu_mul_body);
    Ok(())
}

#[inline(always)]
fn silu_mul_body((gate, up): (&mut [f32], &[f32])) {
    gate.iter_mut().zip(up).for_each(|(x, up)| *x = *x * math::sigmoid(*x) * up);
}

/// `x = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`.
pub fn gelu_tanh(x: &mut [f32]) {
    apply(x, gelu_tanh_body);
}

#[inline(always)]
fn gelu_tanh_body(x: &mut [f32]) {
    // (1 + tanh u) / 2 is the logistic function of 2 u.
    const SCALE: f32 = 1.595_769; // 2 sqrt(2 / pi)
    x.iter_mut().for_each(|x| {
        let cube = 0.044_715 * *x * *x * *x;
        *x *= math::sigmoid(SCALE * (*x + cube));
    });
}

/// `x = x * (1 + erf(x / sqrt 2)) / 2`.
pub fn gelu_erf(x: &mut [f32]) {
    apply(x, gelu_erf_body);
}

#[inline(always)]
fn gelu_erf_body(x: &mut [f32]) {
    x.iter_mut().for_each(|x| {
        let tail = math::normal_tail(*x);
        *x *= if *x < 0.0 { tail } else { 1.0 - tail };
    });
}

/// `x = max(x, 0)`; NaN stays.
pub fn relu(x: &mut [f32]) {
    apply(x, relu_body);
}

#[inline(always)]
fn relu_body(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
}

/// `x = x + y`.
pub fn add(x: &mut [f32], y: &[f32]) -> Result<(), ShapeError> {
    check_length("y", x.len(), y.len())?;
    apply((x, y), add_body);
    Ok(())
}

#[inline(always)]
fn add_body((x, y): (&mut [f32], &[f32])) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `y = fma(a, x, y)`.
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    check_length("y", x.len(), y.len())?;
    apply((a, x, y), axpy_body);
    Ok(())
}

#[inline(always)]
fn axpy_body((a, x, y): (f32, &[f32], &mut [f32])) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = a.mul_add(*x, *y));
}

/// Rotates the pairs `(x[i], x[i + d/2])` of a head `[d]` by the angles of its position; `cos`, `sin`: `[d/2]`.
pub fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) -> Result<(), ShapeError> {
    check_length("head", 2 * cos.len(), head.len())?;
    check_length("sin", cos.len(), sin.len())?;
    apply((head, cos, sin), rope_body);
    Ok(())
}

#[inline(always)]
fn rope_body((head, cos, sin): (&mut [f32], &[f32], &[f32])) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        // Rounded step by step, as the reference implementations do.
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}
