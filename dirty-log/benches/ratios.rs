// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The README's table: each thing and what one would use instead, by turns in one run, the least time of
//! each. For hosts that others use too, where two means of a minute each say little about one another.
//! `cargo bench -p dirty-log --bench ratios`.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

mod peers;

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use dirty_log::{DirtyBitmap, HostWrites, PAGE_SIZE, PageRun};
use peers::{bit_by_bit, read};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// 512 GiB of guest memory: 16 MiB of bitmap.
const PAGES: u64 = 512 << 30 >> 12;

fn keep<T>(value: T) {
    black_box(value);
}

/// The least time of each, by turns.
fn least<const N: usize>(rounds: u32, mut each: [&mut dyn FnMut(); N]) -> [Duration; N] {
    let mut least = [Duration::MAX; N];
    for _ in 0..rounds {
        for (least, run) in least.iter_mut().zip(&mut each) {
            let start = Instant::now();
            run();
            *least = (*least).min(start.elapsed());
        }
    }
    least
}

fn row(what: &str, ours: Duration, instead: &str, theirs: Duration, times: u32) {
    let each = |time: Duration| {
        let nanos = time.as_secs_f64() * 1e9 / f64::from(times);
        if nanos < 1e5 {
            format!("{nanos:.1} ns")
        } else {
            format!("{:.2} ms", nanos / 1e6)
        }
    };
    let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
    println!(
        "| {what} | {} | {}, {instead} | {ratio:.2} |",
        each(ours),
        each(theirs)
    );
}

fn main() {
    let mut sparse = DirtyBitmap::new(PAGES).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..PAGES / 100 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let first = state % PAGES;
        sparse.set(PageRun { first, pages: 1 }).unwrap();
    }
    let mut full = DirtyBitmap::new(PAGES).unwrap();
    full.set_all();
    // Written once: memory that nobody has touched is one page of zeros, and always in the cache.
    let mut clean = full.clone();
    clean.clear_all();

    println!("| | dirty-log | instead | times |\n| --- | --- | --- | --- |");
    for (name, bitmap, rounds) in [("clean", &clean, 30), ("all dirty", &full, 30)] {
        let [ours, theirs] = least(
            rounds,
            [&mut || black_box(bitmap).runs().for_each(keep), &mut || {
                keep(read(black_box(bitmap).words()))
            }],
        );
        row(&format!("512 GiB, {name}"), ours, "a plain read", theirs, 1);
    }
    let [ours, theirs] = least(
        8,
        [
            &mut || black_box(&sparse).runs().for_each(keep),
            &mut || bit_by_bit(black_box(&sparse).words(), keep),
        ],
    );
    row("512 GiB, 1 % dirty", ours, "bit by bit", theirs, 1);

    let (log, at) = (HostWrites::new(1 << 18).unwrap(), 37 * PAGE_SIZE as usize);
    let off = HostWrites::off(1 << 18);
    let theirs = AtomicBitmap::new(1 << 30, NonZeroUsize::new(PAGE_SIZE as usize).unwrap());
    for (name, len) in [("256 pages", 256 * PAGE_SIZE as usize), ("one page", 8)] {
        let times = 1000;
        let [ours, atomic, is_off, none] = least(
            50,
            [
                &mut || (0..times).for_each(|_| log.mark_dirty(black_box(at), len)),
                &mut || (0..times).for_each(|_| theirs.mark_dirty(black_box(at), len)),
                &mut || (0..times).for_each(|_| off.mark_dirty(black_box(at), len)),
                &mut || (0..times).for_each(|_| ().mark_dirty(black_box(at), len)),
            ],
        );
        let marking = |what: &str| format!("marking {name}{what}");
        row(&marking(""), ours, "`AtomicBitmap`", atomic, times);
        row(&marking(", off"), is_off, "no bitmap", none, times);
    }

    // What a device does with it: the mark is a part of the write.
    let ram = [(GuestAddress(0), 1 << 20)];
    let off = GuestMemoryMmap::<HostWrites>::from_ranges(&ram).unwrap();
    let none = GuestMemoryMmap::<()>::from_ranges(&ram).unwrap();
    let block = [1; PAGE_SIZE as usize];
    for (name, len) in [
        ("a used ring's entry", 8),
        ("a packet of 1500 bytes", 1500),
        ("a page", block.len()),
    ] {
        let times = 1000;
        let (bytes, at) = (&block[..len], GuestAddress(37 * PAGE_SIZE));
        let [is_off, plain] = least(
            200,
            [
                &mut || (0..times).for_each(|_| off.write_slice(bytes, black_box(at)).unwrap()),
                &mut || (0..times).for_each(|_| none.write_slice(bytes, black_box(at)).unwrap()),
            ],
        );
        let what = format!("{name} into guest memory, off");
        row(&what, is_off, "memory without a log", plain, times);
    }
}
