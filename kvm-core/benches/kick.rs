// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the run loop and the kick cost, beside what there is without them: `VcpuFd::run` of
//! kvm-ioctls, and a bare `tgkill` with `immediate_exit` set by hand. Same guests, same run.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::Machine;
use criterion::{Criterion, criterion_group, criterion_main};
use kvm_core::{Exit, Flow, GuestMode, KickSignal, Request, VcpuId, VcpuSet, VcpuView};
use kvm_ioctls::{VcpuExit, VcpuFd};

fn exit_round_trip(c: &mut Criterion) {
    let mut group = c.benchmark_group("port write to user space and back");
    group.bench_function("kvm-core run loop", |b| {
        let machine = Machine::new(guests::vcpu::out_for_ever());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let mut vcpu = Some(machine.vcpu(0));
        b.iter_custom(|n| {
            let runner = set.enroll(vcpu.take().unwrap()).unwrap();
            let mut left = n;
            let start = Instant::now();
            let Err(halt) = runner.run(|_: &VcpuView<'_, VcpuFd>, exit: Exit<'_>| {
                black_box(&exit);
                left -= 1;
                if left == 0 {
                    Flow::Stop(start.elapsed())
                } else {
                    Flow::Continue
                }
            });
            vcpu = Some(halt.vcpu);
            let kvm_core::HaltReason::Handler(time) = halt.reason else {
                panic!()
            };
            time
        });
    });
    group.bench_function("kvm-ioctls VcpuFd::run", |b| {
        let machine = Machine::new(guests::vcpu::out_for_ever());
        let ours = machine.vcpu(0);
        // The same registers, in a vCPU of theirs.
        let mut vcpu = machine.vm.fd().create_vcpu(1).unwrap();
        vcpu.set_sregs(&ours.fd().get_sregs().unwrap()).unwrap();
        vcpu.set_regs(&ours.fd().get_regs().unwrap()).unwrap();
        b.iter_custom(|n| {
            let start = Instant::now();
            for _ in 0..n {
                let VcpuExit::IoOut(port, data) = vcpu.run().unwrap() else {
                    panic!()
                };
                black_box((port, data));
            }
            start.elapsed()
        });
    });
    group.finish();
}

/// Lets a vCPU that entered fall asleep in its HLT; the moment from which to measure.
fn settle() -> Instant {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_micros(100) {
        std::hint::spin_loop();
    }
    Instant::now()
}

/// One who waits until a count is reached.
#[derive(Default)]
struct Count {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Count {
    fn add(&self) {
        *self.count.lock().unwrap() += 1;
        self.changed.notify_all();
    }

    fn now(&self) -> u64 {
        *self.count.lock().unwrap()
    }

    fn wait_for(&self, count: u64) {
        let guard = self.count.lock().unwrap();
        drop(self.changed.wait_while(guard, |now| *now < count).unwrap());
    }
}

fn kick(c: &mut Criterion) {
    let mut group = c.benchmark_group("kick a halted vCPU and hear from it");
    let request = Request::consumer(0).unwrap();
    group.bench_function("kvm-core request_all_and_wait", |b| {
        let machine = Machine::with_irqchip(guests::vcpu::halt());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let handler = |_: &VcpuView<'_, VcpuFd>, _: Exit<'_>| Flow::<()>::Continue;
        let thread = set.spawn("vcpu", machine.vcpu(0), handler).unwrap();
        b.iter_custom(|n| {
            (0..n)
                .map(|_| {
                    while set.mode(VcpuId(0)).unwrap() != GuestMode::InGuestMode {
                        thread::yield_now();
                    }
                    let start = settle();
                    set.request_all_and_wait(request).unwrap();
                    start.elapsed()
                })
                .sum()
        });
        set.stop().unwrap();
        thread.join().unwrap();
    });
    group.bench_function("bare tgkill", |b| {
        bare_tgkill(b, &Machine::with_irqchip(guests::vcpu::halt()))
    });
    group.finish();
}

fn bare_tgkill(b: &mut criterion::Bencher<'_>, machine: &Machine) {
    let signal = KickSignal::first_real_time().unwrap().number();
    let vcpu = machine.vcpu(0);
    let fd = vcpu.fd().as_raw_fd();
    // SAFETY: maps the first page of this vCPU's kvm_run, which stays mapped until the process ends.
    let run = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    assert_ne!(run, libc::MAP_FAILED);
    // SAFETY: byte 1 of the mapping, immediate_exit; only accessed atomically.
    let immediate_exit: &'static AtomicU8 = unsafe { AtomicU8::from_ptr(run.cast::<u8>().add(1)) };
    let (exits, tid) = (Arc::new(Count::default()), Arc::new(AtomicU64::new(0)));
    let done = Arc::new(AtomicBool::new(false));
    let worker = {
        let (exits, tid, done) = (exits.clone(), tid.clone(), done.clone());
        thread::spawn(move || {
            // SAFETY: only asks.
            tid.store(unsafe { libc::gettid() } as u64, Ordering::Release);
            while !done.load(Ordering::Acquire) {
                // SAFETY: KVM_RUN of a vCPU that nobody else runs.
                unsafe { libc::ioctl(vcpu.fd().as_raw_fd(), 0xae80, 0) };
                immediate_exit.store(0, Ordering::Relaxed);
                exits.add();
            }
        })
    };
    while tid.load(Ordering::Acquire) == 0 {
        thread::yield_now();
    }
    let signal_worker = || {
        immediate_exit.store(1, Ordering::SeqCst);
        let worker = tid.load(Ordering::Relaxed);
        // SAFETY: a signal whose handler does nothing, to a thread of ours.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), worker, signal) };
    };
    let kick = || {
        let before = exits.now();
        signal_worker();
        exits.wait_for(before + 1);
    };
    b.iter_custom(|n| {
        (0..n)
            .map(|_| {
                let start = settle();
                kick();
                start.elapsed()
            })
            .sum()
    });
    done.store(true, Ordering::Release);
    while !worker.is_finished() {
        signal_worker();
        thread::yield_now();
    }
    worker.join().unwrap();
}

fn config() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(50)
}

criterion_group! { name = benches; config = config(); targets = exit_round_trip, kick }
criterion_main!(benches);
