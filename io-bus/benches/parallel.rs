// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a second vCPU costs the first: the same loop on one thread and on two at the same time, of
//! dispatch and of arithmetic alone, in one run.
//!
//! `cargo bench -p io-bus --bench parallel`. Two busy threads slow a loop that touches no memory too
//! (they share a core's units, or the host's): what dispatch loses beyond that is ours. Each of many
//! short rounds measures all four one after the other, and of each the tenth percentile counts: on a
//! host that others use, most of what is above it is theirs.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::{self, black_box};
use std::sync::atomic::{AtomicU64, Ordering};
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
    // Spun on: a thread that sleeps in a barrier would begin when the other is half done.
    let ready = AtomicU64::new(0);
    let times = thread::scope(|scope| {
        let spawned: Vec<_> = (0..threads)
            .map(|n| {
                let (ready, make) = (&ready, &make);
                scope.spawn(move || {
                    let mut turn = make(n);
                    for _ in 0..turns / 10 {
                        turn();
                    }
                    ready.fetch_add(1, Ordering::SeqCst);
                    while ready.load(Ordering::SeqCst) < threads {
                        hint::spin_loop();
                    }
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

fn tenth_percentile(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 10]
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--test" || arg == "--quick");
    let (rounds, turns) = if quick { (20, 20_000) } else { (400, 50_000) };

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
    let [alu_one, alu_two, one, two] = samples.map(tenth_percentile);
    let (control, ours) = (alu_two / alu_one, two / one);
    let percent = |ratio: f64| (ratio - 1.0) * 100.0;
    println!("                 one thread   two threads   slower by");
    println!(
        "arithmetic     {alu_one:9.2} ns  {alu_two:9.2} ns  {:9.1} %",
        percent(control)
    );
    println!(
        "io-bus         {one:9.2} ns  {two:9.2} ns  {:9.1} %",
        percent(ours)
    );
    println!(
        "io-bus beyond arithmetic: {:+.1} %",
        percent(ours / control)
    );
}
