// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a pause and a resume of many vCPUs cost, beside a program that does the same signals and ioctls
//! and nothing else ([`Bare`]: futexes, `tgkill`, `KVM_RUN`, `KVM_KVMCLOCK_CTRL`). Same guests, same run.
//!
//! A cycle is over when each vCPU has been let go and is about to enter the guest again, so that the next
//! one finds them there; a cycle that begins while some are still parked would cost them no signal.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "pause/bare.rs"]
mod bare;
#[path = "pause/by_turns.rs"]
mod by_turns;
#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use bare::Bare;
use by_turns::by_turns;
use common::Machine;
use criterion::{Bencher, Criterion, criterion_group};
use kvm_core::{Exit, ExitHandler, Flow, Vcpu, VcpuSet, VcpuView};
use kvm_ioctls::VcpuFd;

/// Counts the vCPUs that enter the guest for the first time in a cycle; both programs have it.
pub struct Entries {
    /// Raised by who resumes, before it does.
    cycle: AtomicU64,
    entered: AtomicU64,
    vcpus: u64,
    waiter: Thread,
}

impl Entries {
    fn new(vcpus: u32) -> Arc<Self> {
        Arc::new(Self {
            cycle: AtomicU64::new(0),
            entered: AtomicU64::new(0),
            vcpus: vcpus.into(),
            waiter: thread::current(),
        })
    }

    /// On a vCPU's thread, before it enters; `last` is its own.
    pub fn entering(&self, last: &mut Option<u64>) {
        let cycle = self.cycle.load(Ordering::Relaxed);
        if last.replace(cycle) == Some(cycle) {
            return;
        }
        let entered = self.entered.fetch_add(1, Ordering::Release) + 1;
        if entered.is_multiple_of(self.vcpus) {
            self.waiter.unpark();
        }
    }

    fn next(&self) {
        self.cycle.fetch_add(1, Ordering::Relaxed);
    }

    fn wait(&self) {
        let all = (self.cycle.load(Ordering::Relaxed) + 1) * self.vcpus;
        while self.entered.load(Ordering::Acquire) < all {
            thread::park();
        }
    }
}

struct Counting(Arc<Entries>, Option<u64>);

impl ExitHandler<VcpuFd> for Counting {
    type Stop = ();

    fn exit(&mut self, _: &VcpuView<'_, VcpuFd>, _: Exit<'_>) -> Flow<()> {
        Flow::Continue
    }

    fn before_entry(&mut self, _: &VcpuView<'_, VcpuFd>) {
        self.0.entering(&mut self.1);
    }
}

fn cycles(n: u64, entries: &Entries, mut cycle: impl FnMut(&dyn Fn())) -> Duration {
    let start = Instant::now();
    for _ in 0..n {
        cycle(&|| entries.next());
        entries.wait();
    }
    start.elapsed()
}

fn with_kvm_core(b: &mut Bencher<'_>, vcpus: Vec<Vcpu>) {
    let entries = Entries::new(vcpus.len() as u32);
    let set = VcpuSet::new(kvm_core::Identity::vm("pause"));
    let threads: Vec<_> = vcpus
        .into_iter()
        .map(|vcpu| {
            let handler = Counting(entries.clone(), None);
            set.spawn("vcpu", vcpu, handler).unwrap()
        })
        .collect();
    entries.wait();
    b.iter_custom(|n| {
        cycles(n, &entries, |resuming| {
            let pause = set.pause().unwrap();
            resuming();
            pause.resume();
        })
    });
    set.stop().unwrap();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn with_bare_calls(b: &mut Bencher<'_>, vcpus: Vec<Vcpu>) {
    let entries = Entries::new(vcpus.len() as u32);
    let bare = Bare::start(vcpus, &entries);
    entries.wait();
    b.iter_custom(|n| {
        cycles(n, &entries, |resuming| {
            bare.pause();
            resuming();
            bare.resume();
        })
    });
    bare.stop();
}

fn halted(machine: &Machine, vcpus: u32) -> Vec<Vcpu> {
    (0..vcpus).map(|id| machine.runnable(id)).collect()
}

fn spinning(machine: &Machine, vcpus: u32) -> Vec<Vcpu> {
    (0..vcpus).map(|id| machine.vcpu(id)).collect()
}

fn pause_resume(c: &mut Criterion) {
    for vcpus in [1, 8, 64] {
        let mut group = c.benchmark_group(format!("pause and resume, {vcpus} halted"));
        group.bench_function("kvm-core", |b| {
            let machine = Machine::with_irqchip(guests::vcpu::halt());
            with_kvm_core(b, halted(&machine, vcpus));
        });
        group.bench_function("bare", |b| {
            let machine = Machine::with_irqchip(guests::vcpu::halt());
            with_bare_calls(b, halted(&machine, vcpus));
        });
        group.finish();
    }
    let mut group = c.benchmark_group("pause and resume, 64 spinning");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(20));
    group.bench_function("kvm-core", |b| {
        let machine = Machine::new(guests::vcpu::spin());
        with_kvm_core(b, spinning(&machine, 64));
    });
    group.bench_function("bare", |b| {
        let machine = Machine::new(guests::vcpu::spin());
        with_bare_calls(b, spinning(&machine, 64));
    });
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(5))
        .sample_size(30)
}

criterion_group! { name = benches; config = config(); targets = pause_resume }

/// Both programs' vCPUs live, and their threads sleep while the other's turn is.
fn halted_by_turns(vcpus: u32) {
    let machines = [(); 2].map(|()| Machine::with_irqchip(guests::vcpu::halt()));
    let entries = Entries::new(vcpus);
    let set = VcpuSet::new(kvm_core::Identity::vm("pause"));
    let threads: Vec<_> = halted(&machines[0], vcpus)
        .into_iter()
        .map(|vcpu| {
            let handler = Counting(entries.clone(), None);
            set.spawn("vcpu", vcpu, handler).unwrap()
        })
        .collect();
    entries.wait();
    let bare_entries = Entries::new(vcpus);
    let bare = Bare::start(halted(&machines[1], vcpus), &bare_entries);
    bare_entries.wait();
    let mut ours = || {
        cycles(1, &entries, |resuming| {
            let pause = set.pause().unwrap();
            resuming();
            pause.resume();
        })
    };
    let mut floor = || {
        cycles(1, &bare_entries, |resuming| {
            bare.pause();
            resuming();
            bare.resume();
        })
    };
    by_turns(
        &format!("pause and resume, {vcpus} halted, by turns"),
        2000,
        [("kvm-core", &mut ours), ("bare", &mut floor)],
    );
    bare.stop();
    set.stop().unwrap();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn main() {
    // `cargo test --benches` runs this too, without it.
    if std::env::args().any(|arg| arg == "--bench") {
        [1, 8, 64].into_iter().for_each(halted_by_turns);
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
