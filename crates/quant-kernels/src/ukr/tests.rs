//! Every kernel of this processor gives the bits of the scalar one.

use proptest::prelude::*;

use super::table;
use super::*;

/// Numbers that look random, from a seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// A parameter of a type; now and then an extreme one.
    fn parameter(&mut self, kind: Kind) -> f32 {
        let x = match self.next() % 16 {
            0 => 0.0,
            1 => f32::INFINITY,
            _ => (self.next() % 4096) as f32 / 1024.0 - 2.0,
        };
        match kind {
            Kind::U8 => (self.next() % 256) as f32,
            Kind::Bf16 => f32::from_bits(x.to_bits() & 0xffff_0000),
            Kind::F32 => x * 1.000_001,
            Kind::F16 => x,
        }
    }

    fn panel(&mut self, format: &Format, blocks: &Blocks, extreme: bool) -> Vec<u8> {
        let mut panel = Vec::new();
        for block in blocks.list() {
            let kinds = [Some(format.scale), format.offset.kind()];
            for kind in kinds.into_iter().flatten().filter(|_| block.first) {
                for _ in 0..OUTPUTS {
                    let at = panel.len();
                    panel.resize(at + kind.size(), 0);
                    kind.write(self.parameter(kind), &mut panel[at..]);
                }
            }
            let steps = block.padded as usize / planes::unit(format.width);
            let codes = steps * planes::step_bytes(format.width);
            panel.extend((0..codes).map(|_| if extreme { 0xff } else { self.next() as u8 }));
        }
        panel.resize(format.panel_bytes(blocks), 0);
        panel
    }
}

#[derive(Clone, Debug)]
struct Case {
    groups: Vec<usize>,
    offset: Offset,
    scale: Kind,
    midpoint: i32,
    seed: u64,
    /// All codes and activations at their extremes, the activations of this sign.
    extreme: Option<i8>,
}

fn any_case() -> impl Strategy<Value = Case> {
    let kind = prop_oneof![Just(Kind::U8), Just(Kind::F16), Just(Kind::Bf16), Just(Kind::F32)];
    let offset = prop_oneof![
        Just(Offset::None),
        kind.clone().prop_map(Offset::Zero),
        kind.clone().prop_map(Offset::Shift)
    ];
    let groups = prop_oneof![
        prop::collection::vec(1usize..300, 0..4),
        (prop_oneof![Just(16usize), Just(32), Just(64), Just(128)], 1usize..4).prop_map(|(g, n)| vec![g; n]),
    ];
    let extreme = prop_oneof![3 => Just(None), 1 => Just(Some(1)), 1 => Just(Some(-1))];
    (groups, offset, kind, -256i32..=256, any::<u64>(), extreme).prop_map(
        |(groups, offset, scale, midpoint, seed, extreme)| Case {
            groups,
            offset,
            scale,
            midpoint,
            seed,
            extreme,
        },
    )
}

fn check(kernel: &Kernel, case: &Case) {
    let Weights { width, table } = kernel.weights;
    let mut numbers = Numbers(case.seed);
    let blocks = Blocks::new(&case.groups, planes::unit(width)).unwrap();
    let image = std::array::from_fn(|i| match case.extreme {
        None => (numbers.next() % 255) as u8 + 1,
        Some(_) => {
            if i < 8 {
                1
            } else {
                255
            }
        }
    });
    let table = table.then_some(Table { image, step: 0.37 });
    let Case { offset, scale, midpoint, .. } = *case;
    let format = Format { width, scale, offset, midpoint, table };
    let panels: Vec<_> =
        (0..kernel.panels).map(|_| numbers.panel(&format, &blocks, case.extreme.is_some())).collect();

    let (height, count) = (kernel.height, blocks.list().len());
    let codes: Vec<[i8; 4]> = (0..blocks.padded() / 4 * height)
        .map(|_| {
            std::array::from_fn(|_| case.extreme.map_or((numbers.next() % 255) as i8, |sign| 127 * sign))
        })
        .map(|four| four.map(|q: i8| q.max(-127)))
        .collect();
    let mut sums = vec![0i32; count * height];
    let mut at = 0;
    for (b, block) in blocks.list().iter().enumerate() {
        for _ in 0..block.padded / 4 {
            for r in 0..height {
                sums[b * height + r] += codes[at].iter().map(|&q| i32::from(q)).sum::<i32>();
                at += 1;
            }
        }
    }
    let ascale: Vec<f32> = (0..count * height).map(|_| (numbers.next() % 1000) as f32 / 3e4).collect();
    let scaled: Vec<f32> = ascale.iter().zip(&sums).map(|(scale, sum)| scale * *sum as f32).collect();
    let starts = |center: i32| sums.iter().map(|sum| (center - midpoint) * sum).collect::<Vec<_>>();

    let run = |kernel: &Kernel, panels: &[&[u8]]| {
        let start = starts(kernel.center);
        let mut out = vec![f32::NAN; height * OUTPUTS * panels.len()];
        let rows = Rows { codes: &codes, start: &start, scale: &ascale, sum: &scaled };
        kernel.run(Call { blocks: &blocks, format: &format, panels, height, rows, out: &mut out });
        out
    };
    let streams: Vec<&[u8]> = panels.iter().map(|panel| &panel[..]).collect();
    let out = run(kernel, &streams);
    let scalar = table::select(Isa::Scalar, kernel.weights, height);
    for (p, panel) in streams.iter().enumerate() {
        let expected = run(scalar, &[panel]);
        for r in 0..height {
            for n in 0..OUTPUTS {
                let (a, b) = (out[r * OUTPUTS * kernel.panels + p * OUTPUTS + n], expected[r * OUTPUTS + n]);
                assert!(
                    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
                    "{} row {r} panel {p} output {n}: {a} instead of {b}, {case:?}",
                    kernel.name
                );
            }
        }
    }
}

/// Kernels of the table, and those that no processor selects.
fn all() -> impl Iterator<Item = Kernel> {
    #[cfg(target_arch = "x86_64")]
    let more = x86::AVX512_VNNI_YMM.into_iter();
    #[cfg(not(target_arch = "x86_64"))]
    let more = std::iter::empty::<Kernel>();
    table::supported().copied().chain(more.filter(|kernel| crate::isa::CpuFeatures::detect().has(kernel.isa)))
}

proptest! {
    #![proptest_config(crate::at_most(24))]

    #[test]
    fn every_kernel_follows_the_scalar_one(case in any_case()) {
        for kernel in all() {
            check(&kernel, &case);
        }
    }
}

#[test]
fn the_table_serves_all_weights_and_heights_under_every_cap() {
    for &isa in crate::isa::supported() {
        for weights in table::WEIGHTS {
            for height in HEIGHTS {
                let kernel = table::select(isa, weights, height);
                assert!(kernel.isa <= isa && kernel.weights == weights && kernel.height == height);
                assert!(kernel.panels <= MOST_PANELS);
                assert_eq!(kernel.center, table::select(isa, weights, 1).center, "one center per list");
            }
        }
    }
}

#[test]
fn names_are_unique() {
    let mut names: Vec<_> = all().map(|kernel| kernel.name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    assert!(names.contains(&"q8_u4_12x16_scalar"));
}
