// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How late a halted vCPU's thread wakes up: from the wake to the return of the wait. Polled for and not,
//! beside what one would take instead: a mutex and a condition variable, and a blocking eventfd. Same
//! threads, same run, for wake-ups that come soon (20 µs after the halt) and late (1 ms).
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kvm_core::{Blocker, HaltPolling, Woken};
use vmm_sys_util::eventfd::EventFd;

type Wake = Box<dyn Fn() + Send + Sync>;
type Wait = Box<dyn FnMut() + Send>;

fn blocker(polling: HaltPolling) -> (Wake, Wait) {
    let mut blocker = Blocker::new(polling);
    let waker = blocker.waker();
    (
        Box::new(move || waker.wake()),
        Box::new(move || while blocker.block() != Woken::Event {}),
    )
}

fn condition_variable() -> (Wake, Wait) {
    let shared = Arc::new((Mutex::new(false), Condvar::new()));
    let other = shared.clone();
    (
        Box::new(move || {
            *shared.0.lock().unwrap() = true;
            shared.1.notify_one();
        }),
        Box::new(move || {
            let mut event = other.0.lock().unwrap();
            while !*event {
                event = other.1.wait(event).unwrap();
            }
            *event = false;
        }),
    )
}

fn eventfd() -> (Wake, Wait) {
    let fd = EventFd::new(0).unwrap();
    let other = fd.try_clone().unwrap();
    (
        Box::new(move || fd.write(1).unwrap()),
        Box::new(move || {
            other.read().unwrap();
        }),
    )
}

/// `n` times the median of `n` latencies, each with a wake-up that comes so long after the wait began. The
/// median, because one thread that loses its processor for a while is not what is measured.
fn latency(n: u64, after: Duration, (wake, mut wait): (Wake, Wait)) -> Duration {
    let start = Instant::now();
    let (woken_at, waiting) = (AtomicU64::new(0), AtomicBool::new(false));
    let nanos = || start.elapsed().as_nanos() as u64;
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let mut each = Vec::with_capacity(n as usize);
            for _ in 0..n {
                waiting.store(true, Ordering::Release);
                wait();
                each.push(nanos() - woken_at.load(Ordering::Acquire));
            }
            each.sort_unstable();
            each.get(each.len() / 2).copied().unwrap_or(0) * n
        });
        for _ in 0..n {
            while !waiting.swap(false, Ordering::AcqRel) {
                std::hint::spin_loop();
            }
            let halted = Instant::now();
            while halted.elapsed() < after {
                std::hint::spin_loop();
            }
            woken_at.store(nanos(), Ordering::Release);
            wake();
        }
        Duration::from_nanos(waiter.join().unwrap())
    })
}

fn wake_up(c: &mut Criterion) {
    for after in [Duration::from_micros(20), Duration::from_millis(1)] {
        let mut group = c.benchmark_group(format!("wake-up {after:?} after the halt"));
        group.measurement_time(Duration::from_secs(3));
        group.sample_size(20);
        let mut bench = |name: &str, make: &dyn Fn() -> (Wake, Wait)| {
            group.bench_function(name, |b| b.iter_custom(|n| latency(n, after, make())));
        };
        bench("Blocker, polled for", &|| blocker(HaltPolling::KERNEL));
        bench("Blocker, not polled for", &|| blocker(HaltPolling::OFF));
        bench("mutex and condition variable", &condition_variable);
        bench("eventfd", &eventfd);
        group.finish();
    }
}

criterion_group!(benches, wake_up);
criterion_main!(benches);
