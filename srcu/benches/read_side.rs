// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The read side against what a VMM would use instead: arc-swap (load, and its cache) and `RwLock<Arc<T>>`; and what a
//! publication costs with and without a reader inside. `cargo bench -p srcu`

#![allow(
    missing_docs,
    reason = "criterion's macros make undocumented functions"
)]

use arc_swap::ArcSwap;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use srcu::Published;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;

fn table() -> Vec<u64> {
    (0..64).collect()
}

fn read(criterion: &mut Criterion) {
    srcu::prepare();
    let mut group = criterion.benchmark_group("read");
    let published = Published::new(table());
    let mut reader = published.reader();
    group.bench_function("srcu", |bench| {
        bench.iter(|| black_box(reader.enter()[black_box(17)]))
    });
    let fenced = Published::with_fences(table());
    let mut with_fences = fenced.reader();
    group.bench_function("srcu with fences", |bench| {
        bench.iter(|| black_box(with_fences.enter()[black_box(17)]))
    });
    group.bench_function("generation", |bench| {
        bench.iter(|| black_box(reader.generation()))
    });
    let direct = table();
    group.bench_function("no synchronisation at all", |bench| {
        bench.iter(|| black_box(black_box(&direct)[black_box(17)]))
    });
    let swap = ArcSwap::from_pointee(table());
    group.bench_function("arc-swap load", |bench| {
        bench.iter(|| black_box(swap.load()[black_box(17)]))
    });
    let full = || black_box(swap.load_full()[black_box(17)]);
    group.bench_function("arc-swap load_full", |bench| bench.iter(full));
    let locked = RwLock::new(Arc::new(table()));
    let lock = || match locked.read() {
        Ok(guard) => black_box(guard[black_box(17)]),
        Err(_) => 0,
    };
    group.bench_function("RwLock<Arc>", |bench| bench.iter(lock));
    group.finish();
}

fn publish(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("publish and wait");
    let published = Published::new(table());
    let _idle: Vec<_> = (0..64).map(|_| published.reader()).collect();
    group.bench_function("srcu, 64 readers outside", |bench| {
        bench.iter_batched(
            table,
            |next| published.publish(next).wait(),
            BatchSize::SmallInput,
        );
    });
    let mut reader = published.reader();
    group.bench_function("srcu, deferred past a reader inside", |bench| {
        bench.iter_batched(
            table,
            |next| {
                let guard = reader.enter();
                published.publish(next).defer(|| ());
                drop(guard);
            },
            BatchSize::SmallInput,
        );
    });
    let fenced = Published::with_fences(table());
    let _idle_too: Vec<_> = (0..64).map(|_| fenced.reader()).collect();
    group.bench_function("srcu with fences, 64 readers outside", |bench| {
        bench.iter_batched(
            table,
            |next| fenced.publish(next).wait(),
            BatchSize::SmallInput,
        );
    });
    // What a second thread of the process costs the writer: its CPU is interrupted.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        group.bench_function("srcu, 64 readers outside, one thread running", |bench| {
            bench.iter_batched(
                table,
                |next| published.publish(next).wait(),
                BatchSize::SmallInput,
            );
        });
        stop.store(true, Ordering::Relaxed);
    });
    let swap = ArcSwap::from_pointee(table());
    group.bench_function("arc-swap", |bench| {
        bench.iter_batched(
            table,
            |next| swap.store(Arc::new(next)),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, read, publish);
criterion_main!(benches);
