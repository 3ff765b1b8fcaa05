// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a second vCPU costs the first: the same loop on one thread and on two at the same time, of
//! dispatch and of arithmetic alone, in one run.
//!
//! `cargo bench -p io-bus --bench parallel`. Two busy threads slow a loop that touches no memory too
//! (they share a core's units, or the host's): what dispatch loses beyond that is ours. Each round
//! measures all four one after the other; the table has the medians over the rounds.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use io_bus::{IoBus, MmioAddress, MmioRange};
use vm_device::DeviceMmio;

struct Empty;

impl DeviceMmio for Empty {
    fn mmio_read(&self, _: MmioAddress, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
}

/// Arithmetic in registers, as long as a dispatch.
fn arithmetic(n: u64) -> impl FnMut() {
    let mut x = n | 1;
    move || {
        for _ in 0..4 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
        black_box(x);
    }
}

/// Nanoseconds a turn of the slower of `threads` that each do `turns` of what `make` makes, all at
/// the same time.
fn measure<F: FnMut()>(threads: u64, turns: u32, make: impl Fn(u64) -> F + Sync) -> f64 {
    let start = Barrier::new(threads as usize);
    let times = thread::scope(|scope| {
        let spawned: Vec<_> = (0..threads)
            .map(|n| {
                let (start, make) = (&start, &make);
                scope.spawn(move || {
                    let mut turn = make(n);
                    for _ in 0..turns / 10 {
                        turn();
                    }
                    start.wait();
                    let begun = Instant::now();
                    for _ in 0..turns {
                        turn();
                    }
                    begun.elapsed().as_nanos() as f64 / f64::from(turns)
                })
            })
            .collect();
        spawned
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<_>>()
    });
    times.into_iter().fold(0.0, f64::max)
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--test" || arg == "--quick");
    let (rounds, turns) = if quick { (5, 100_000) } else { (41, 1_000_000) };

    let bus = IoBus::new();
    let ranges: Vec<_> = (0..64_u64)
        .map(|n| MmioRange::new(MmioAddress(0xd000_0000 + n * 0x2000), 0x1000).unwrap())
        .collect();
    for range in &ranges {
        bus.register_mmio(*range, Empty).unwrap().keep();
    }
    let dispatch = |n: u64| {
        let mut io = bus.dispatcher();
        let mut x = n * 0x9e37_79b9 + 1;
        let ranges = &ranges;
        move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let address = MmioAddress(ranges[(x >> 20) as usize % 64].base().0 + (x >> 40) % 0xff0);
            let mut data = [0; 4];
            assert!(io.mmio_read(address, black_box(&mut data)).is_answered());
        }
    };

    let mut samples = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        samples[0].push(measure(1, turns, arithmetic));
        samples[1].push(measure(2, turns, arithmetic));
        samples[2].push(measure(1, turns, dispatch));
        samples[3].push(measure(2, turns, dispatch));
    }
    let slowed = |one: usize, two: usize| -> Vec<f64> {
        samples[one]
            .iter()
            .zip(&samples[two])
            .map(|(one, two)| two / one)
            .collect()
    };
    let (control, ours) = (slowed(0, 1), slowed(2, 3));
    let [alu_one, alu_two, one, two] = samples.clone().map(median);
    let beyond = median(
        ours.iter()
            .zip(&control)
            .map(|(ours, control)| ours / control)
            .collect(),
    );
    let (control, ours) = (median(control), median(ours));
    println!("                 one thread   two threads   slowed by");
    println!(
        "arithmetic     {alu_one:9.2} ns  {alu_two:9.2} ns  {:9.1} %",
        (control - 1.0) * 100.0
    );
    println!(
        "io-bus         {one:9.2} ns  {two:9.2} ns  {:9.1} %",
        (ours - 1.0) * 100.0
    );
    println!(
        "io-bus beyond arithmetic, median of rounds: {:+.1} %",
        (beyond - 1.0) * 100.0
    );
}
