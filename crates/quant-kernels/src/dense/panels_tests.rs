//! That packed dense weights give the bits of the products that they stand for.

use half::{bf16, f16};
use ndarray::Array2;
use proptest::prelude::*;

use super::*;
use crate::isa;

fn matrix(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    Array2::from_shape_simple_fn((rows, cols), || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) | 1) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

type Product = fn(&DensePanels, ArrayView2<'_, f32>, ArrayViewMut2<'_, f32>) -> Result<(), ShapeError>;

fn assert_is(panels: &DensePanels, product: Product, x: &Array2<f32>, expected: &Array2<f32>) {
    for &cap in isa::supported() {
        let mut out = Array2::from_elem(expected.dim(), f32::NAN);
        isa::with_cap(cap, || product(panels, x.view(), out.view_mut())).unwrap();
        for ((at, found), expected) in out.indexed_iter().zip(expected) {
            assert_eq!(found.to_bits(), expected.to_bits(), "{found} for {expected} at {at:?} on {cap}");
        }
    }
}

fn check(m: usize, n: usize, k: usize, seed: u32) {
    let (x, w) = (matrix(m, k, seed), matrix(n, k, seed ^ 1));
    let (b, h) = (w.mapv(bf16::from_f32), w.mapv(f16::from_f32));
    let exact = |w: &Array2<f32>| {
        let mut out = Array2::zeros((m, n));
        matmul_nt(x.view(), w.view(), out.view_mut()).unwrap();
        out
    };
    let fast = |w: HalfView<'_>| {
        let mut out = Array2::zeros((m, n));
        matmul_nt_bf16(x.view(), w, out.view_mut()).unwrap();
        out
    };

    let panels = DensePanels::pack(DenseView::F32(w.view())).unwrap();
    assert_eq!(panels.bytes(), n.next_multiple_of(16) * k * 4);
    assert_is(&panels, DensePanels::matmul, &x, &exact(&w));
    assert_is(&panels, DensePanels::matmul_bf16, &x, &exact(&w));
    let panels = DensePanels::pack(DenseView::F16(h.view())).unwrap();
    assert_is(&panels, DensePanels::matmul, &x, &exact(&h.mapv(f16::to_f32)));
    assert_is(&panels, DensePanels::matmul_bf16, &x, &fast(HalfView::F16(h.view())));
    let panels = DensePanels::pack(DenseView::Bf16(b.view())).unwrap();
    assert_is(&panels, DensePanels::matmul, &x, &exact(&b.mapv(bf16::to_f32)));
    assert_is(&panels, DensePanels::matmul_bf16, &x, &fast(HalfView::Bf16(b.view())));
}

#[test]
fn tile_edges() {
    for m in [0, 1, 2, 5, 13] {
        for n in [0, 1, 15, 16, 17, 33, 129] {
            for k in [0, 1, 2, 7, 34] {
                check(m, n, k, 1);
            }
        }
    }
}

#[test]
fn rows_come_back() {
    let w = matrix(37, 11, 2);
    let (b, h) = (w.mapv(bf16::from_f32), w.mapv(f16::from_f32));
    let all = [
        (DenseView::F32(w.view()), w.clone()),
        (DenseView::F16(h.view()), h.mapv(f16::to_f32)),
        (DenseView::Bf16(b.view()), b.mapv(bf16::to_f32)),
    ];
    for (view, expected) in all {
        let panels = DensePanels::pack(view).unwrap();
        let mut row = vec![0.0; 11];
        for (r, expected) in expected.rows().into_iter().enumerate() {
            panels.dequantize_row(r, &mut row).unwrap();
            assert_eq!(row, expected.to_vec());
        }
        assert_eq!(panels.dequantize_row(37, &mut row), Err(ShapeError::Row { found: 37, rows: 37 }));
        let error = panels.dequantize_row(0, &mut row[1..]).unwrap_err();
        assert_eq!(error, ShapeError::Length { operand: "out", expected: 11, found: 10 });
        let x = matrix(2, 10, 3);
        let error = panels.matmul(x.view(), Array2::zeros((2, 37)).view_mut()).unwrap_err();
        assert_eq!(error, ShapeError::Shape { operand: "x", expected: [2, 11], found: [2, 10] });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_shape(m in 0usize..30, n in 0usize..150, k in 0usize..(2 * KC + 30), seed in any::<u32>()) {
        check(m, n, k, seed);
    }
}
