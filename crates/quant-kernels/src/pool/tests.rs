//! Regions of every kind, with workers that sleep at once, soon or never.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::*;

/// From workers that sleep before they look again to workers that hardly ever do.
const PATIENCES: [Patience; 4] = [
    Patience { spins: 0, yields: 0 },
    Patience { spins: 3, yields: 0 },
    Patience { spins: 50, yields: 20 },
    Patience { spins: 50, yields: 100_000 },
];

fn step(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize
}

/// Runs a region and returns how often each share ran.
fn counts(pool: &Pool, threads: usize, shares: usize) -> Vec<u32> {
    let counts: Vec<AtomicU32> = (0..shares).map(|_| AtomicU32::new(0)).collect();
    pool.run(threads, shares, &|i: usize| {
        counts[i].fetch_add(1, Ordering::Relaxed);
    });
    counts.into_iter().map(AtomicU32::into_inner).collect()
}

#[test]
fn every_share_runs_once_whatever_threads_and_timing() {
    for patience in PATIENCES {
        let pool = Pool::new(patience);
        let mut state = 1;
        for round in 0..400 {
            let (threads, shares) = (1 + step(&mut state) % 5, step(&mut state) % 9);
            assert_eq!(counts(&pool, threads, shares), vec![1; shares], "round {round}");
            if round % 100 == 0 {
                // Long enough for patient workers to fall asleep.
                thread::sleep(Duration::from_millis(3));
            }
        }
    }
}

/// What a share writes with plain stores must be there when the region ends, and what the leader writes before a
/// region must be there for its shares: sums over regions that each read what the one before wrote.
#[test]
fn regions_see_each_others_writes() {
    for patience in PATIENCES {
        let pool = Pool::new(patience);
        let (mut old, mut new) = ([1u64; 7], [0u64; 7]);
        for round in 0..300u64 {
            let mut cells: Vec<_> = new.iter_mut().enumerate().collect();
            pool.for_each(4, &mut cells, |(i, cell)| **cell = old[*i] + old[(*i + 1) % 7] + round);
            old = new.map(|x| x % 1_000_003);
        }
        let mut expected = [1u64; 7];
        for round in 0..300 {
            let before = expected;
            for i in 0..7 {
                expected[i] = (before[i] + before[(i + 1) % 7] + round) % 1_000_003;
            }
        }
        assert_eq!(old, expected);
    }
}

#[test]
fn several_leaders_at_once_do_not_wait_for_each_other() {
    for patience in PATIENCES {
        let pool = Pool::new(patience);
        thread::scope(|scope| {
            for leader in 0..4 {
                let pool = &pool;
                scope.spawn(move || {
                    let mut state = leader;
                    for _ in 0..100 {
                        let shares = step(&mut state) % 6;
                        assert_eq!(counts(pool, 3, shares), vec![1; shares]);
                    }
                });
            }
        });
    }
}

#[test]
fn regions_inside_regions_run_where_they_are() {
    let total = AtomicU32::new(0);
    let pool = Pool::new(PATIENCES[2]);
    pool.run(3, 6, &|_| {
        let me = thread::current().id();
        assert_eq!(threads(), 1);
        pool.run(3, 5, &|_| {
            assert_eq!(thread::current().id(), me);
            total.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(total.into_inner(), 30);
    // And from tasks of rayon, whose threads compete for the workers.
    let pools = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let total = AtomicU32::new(0);
    pools.install(|| {
        use rayon::prelude::*;
        (0..20).into_par_iter().for_each(|_| {
            run(4, |_| {
                total.fetch_add(1, Ordering::Relaxed);
            });
        });
    });
    assert_eq!(total.into_inner(), 80);
}

#[test]
fn panics_reach_the_caller_and_the_pool_goes_on() {
    for patience in PATIENCES {
        let pool = Pool::new(patience);
        for bad in 0..4 {
            let finished = AtomicU32::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(4, 4, &|i| {
                    if i == bad {
                        panic!("share {i}");
                    }
                    finished.fetch_add(1, Ordering::Relaxed);
                });
            }));
            let text = *result.unwrap_err().downcast::<String>().unwrap();
            assert_eq!((text, finished.into_inner()), (format!("share {bad}"), 3));
            assert_eq!(counts(&pool, 4, 8), [1; 8]);
        }
    }
}

#[test]
fn threads_follow_the_rayon_pool() {
    for count in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
        assert_eq!(pool.install(threads), count);
    }
}

#[test]
fn caps_of_the_caller_hold_for_all_shares() {
    let pool = Pool::new(PATIENCES[2]);
    isa::with_cap(isa::Isa::Scalar, || {
        pool.run(4, 8, &|_| assert_eq!(isa::active(), isa::Isa::Scalar));
    });
    let active = isa::active();
    pool.run(4, 8, &|_| assert_eq!(isa::active(), active));
}

#[test]
fn parts_cover_the_range_in_order() {
    for (len, unit, shares) in [(0, 1, 3), (10, 1, 3), (100, 16, 4), (33, 32, 2), (5, 8, 4), (64, 16, 4)] {
        let mut end = 0;
        for share in 0..shares {
            let part = part(len, unit, share, shares);
            assert_eq!(part.start, end);
            assert!(part.start.is_multiple_of(unit) || part.is_empty());
            end = part.end;
        }
        assert_eq!(end, len);
    }
}
