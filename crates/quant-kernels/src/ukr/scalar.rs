//! The definition of every kernel, in plain code.

use super::{Call, HEIGHTS, Kernel, Offset};
use crate::isa::Isa;
use crate::packed::planes::{self, OUTPUTS};

/// Kernels for any processor.
pub(super) const KERNELS: [Kernel; 9 * HEIGHTS.len()] = super::table::kernels!(
    Isa::Scalar, "scalar", 0, panel,
    [(1, 1; 1, 1), (2, 1; 1, 1), (4, 1; 1, 1), (8, 1; 1, 1), (12, 1; 1, 1)],
    [(1, 1; 1, 1), (2, 1; 1, 1), (4, 1; 1, 1), (8, 1; 1, 1), (12, 1; 1, 1)]
);

/// The entry of the table: one panel.
fn panel<const WIDTH: usize, const TABLE: bool, const PANELS: usize, const ROWS: usize, const COLS: usize>(
    call: &mut Call<'_>,
) {
    rows::<WIDTH>(call);
}

/// Any number of rows times one panel.
fn rows<const WIDTH: usize>(call: &mut Call<'_>) {
    let height = call.height;
    let Call { blocks, format, panels, rows, out, .. } = call;
    let (mut header, mut rest) = (&[][..], panels[0]);
    let mut codes = rows.codes;
    out.fill(0.0);
    for (b, block) in blocks.list().iter().enumerate() {
        if block.first {
            (header, rest) = rest.split_at(format.header_bytes());
        }
        let steps = block.padded as usize / planes::unit(WIDTH);
        let (weights, after) = rest.split_at(steps * planes::step_bytes(WIDTH));
        let (activations, codes_after) = codes.split_at(block.padded as usize / 4 * height);
        (rest, codes) = (after, codes_after);

        let mut acc = [[0; OUTPUTS]; HEIGHTS[HEIGHTS.len() - 1]];
        let acc = &mut acc[..height];
        for (r, acc) in acc.iter_mut().enumerate() {
            *acc = [rows.start[b * height + r]; OUTPUTS];
        }
        let fours = activations.chunks_exact(height);
        let fields = weights.chunks_exact(planes::step_bytes(WIDTH)).flat_map(|step| {
            (0..planes::fields(WIDTH)).map(|field| planes::read::<WIDTH, OUTPUTS>(step, field, 0))
        });
        for (words, fours) in fields.zip(fours) {
            for (acc, four) in acc.iter_mut().zip(fours) {
                for (acc, word) in acc.iter_mut().zip(words) {
                    for (code, q) in word.to_le_bytes().into_iter().zip(four) {
                        let image = match format.table {
                            Some(table) => table.image[usize::from(code)],
                            None => code,
                        };
                        *acc += i32::from(image) * i32::from(*q);
                    }
                }
            }
        }

        let stored: [f32; OUTPUTS] = format.scale.read(header);
        let second = &header[OUTPUTS * format.scale.size()..];
        let offset: [f32; OUTPUTS] = format.offset.kind().map_or([0.0; OUTPUTS], |kind| kind.read(second));
        let step = format.table.map_or(1.0, |table| table.step);
        for (r, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                let out = &mut out[r * OUTPUTS + n];
                *out = (*acc as f32 * (stored[n] * step)).mul_add(rows.scale[b * height + r], *out);
                match format.offset {
                    Offset::None => {}
                    Offset::Zero(_) => {
                        *out = rows.sum[b * height + r].mul_add(-(stored[n] * offset[n]), *out)
                    }
                    Offset::Shift(_) => *out = rows.sum[b * height + r].mul_add(offset[n], *out),
                }
            }
        }
    }
}
