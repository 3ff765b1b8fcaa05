// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What saving and restoring a vCPU costs, beside the same ioctls alone, on buffers that were made
//! before. Same vCPU, same run. And the serialized form, where there is one.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::time::Duration;

use common::{Machine, kvm};
use criterion::{Criterion, criterion_group, criterion_main};
use kvm_core::state::{Passage, StateHost, VcpuState};
use kvm_core::{Exit, Flow, Vcpu, VcpuId, VcpuSet, VcpuView};
use kvm_ioctls::VcpuFd;

/// An ioctl and its argument, ready to be made again and again.
struct Call {
    request: u64,
    argument: Vec<u64>,
    /// The first word, which KVM writes in some.
    first: u64,
}

const fn ioc(direction: u64, number: u64, size: u64) -> u64 {
    direction << 30 | size << 16 | 0xae << 8 | number
}

impl Call {
    fn new(request: u64, argument: Vec<u64>) -> Self {
        let first = argument.first().copied().unwrap_or(0);
        Self {
            request,
            argument,
            first,
        }
    }

    fn make(&mut self, vcpu: &VcpuFd) {
        if let Some(first) = self.argument.first_mut() {
            *first = self.first;
        }
        let argument = self.argument.as_mut_ptr();
        // SAFETY: each argument below is as long as its ioctl reads and writes.
        let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), self.request, argument) };
        assert!(
            done >= 0,
            "{:#x}: {}",
            self.request,
            std::io::Error::last_os_error()
        );
    }
}

fn msrs(of: impl Iterator<Item = (u32, u64)>) -> Vec<u64> {
    let entries: Vec<_> = of.collect();
    let mut words = vec![entries.len() as u64];
    for (index, value) in entries {
        words.extend([u64::from(index), value]);
    }
    words
}

/// Words of a buffer that is long enough for any of the structures.
const LONG: usize = 2048;

/// The ioctls of a save: nothing is read out of their buffers.
fn reading(host: &StateHost, state: &VcpuState) -> Vec<Call> {
    let zeroes = || vec![0; LONG];
    let count = |n| {
        let mut words = zeroes();
        words[0] = n;
        words
    };
    let mut calls = vec![
        Call::new(ioc(2, 0x98, 4), zeroes()),   // MP state
        Call::new(ioc(2, 0x9f, 64), zeroes()),  // events
        Call::new(ioc(2, 0x81, 144), zeroes()), // registers
        Call::new(ioc(2, 0xa1, 128), zeroes()), // debug registers
        Call::new(ioc(3, 0x91, 8), count(256)), // CPUID
        Call::new(0xaea3, Vec::new()),          // frequency
        Call::new(ioc(3, 0x88, 8), msrs([(0x179, 0)].into_iter())),
        Call::new(
            ioc(3, 0x88, 8),
            msrs(state.msrs.iter().map(|msr| (msr.index, 0))),
        ),
    ];
    calls.push(match host.sregs2 {
        true => Call::new(ioc(2, 0xcc, 320), zeroes()),
        false => Call::new(ioc(2, 0x83, 312), zeroes()),
    });
    calls.push(match host.xsave2 {
        true => Call::new(ioc(2, 0xcf, 4096), zeroes()),
        false => Call::new(ioc(2, 0xa4, 4096), zeroes()),
    });
    if host.xcrs {
        calls.push(Call::new(ioc(2, 0xa6, 392), zeroes()));
    }
    if host.one_reg {
        calls.push(Call::new(ioc(3, 0xb0, 8), count(64)));
    }
    if state.lapic.is_some() {
        calls.push(Call::new(ioc(2, 0x8e, 1024), zeroes()));
    }
    calls
}

/// The ioctls of a restore, with what the reading ones have read.
fn writing(read: &[Call], state: &VcpuState) -> Vec<Call> {
    let of = |number: u64| read.iter().find(|call| call.request & 0xff == number);
    let write = |from: u64, number: u64, size: u64| {
        of(from).map(|call| Call::new(ioc(1, number, size), call.argument.clone()))
    };
    let all = state.msrs.iter().map(|msr| (msr.index, msr.value));
    [
        write(0x91, 0x90, 8),
        write(0xcc, 0xcd, 320),
        write(0x83, 0x84, 312),
        write(0xa6, 0xa7, 392),
        write(0xcf, 0xa5, 4096).or_else(|| write(0xa4, 0xa5, 4096)),
        write(0xa1, 0xa2, 128),
        write(0x81, 0x82, 144),
        write(0x8e, 0x8f, 1024),
        Some(Call::new(ioc(1, 0x89, 8), msrs(all))),
        write(0x9f, 0xa0, 64),
        write(0x98, 0x99, 4),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn vcpu(machine: &Machine) -> Vcpu {
    let vcpu = machine.vcpu(0);
    vcpu.set_cpuid(&kvm().supported_cpuid().unwrap()).unwrap();
    vcpu
}

fn save_and_restore(c: &mut Criterion) {
    let machine = Machine::with_irqchip(&[]);
    let vcpu = vcpu(&machine);
    let host = machine.vm.state_host(&kvm()).unwrap();
    let state = vcpu.state(&host).unwrap();
    let mut reads = reading(&host, &state);

    let mut group = c.benchmark_group("save a vCPU");
    group.bench_function("kvm-core", |b| {
        b.iter(|| black_box(vcpu.state(&host).unwrap()));
    });
    group.bench_function("the ioctls alone", |b| {
        b.iter(|| reads.iter_mut().for_each(|call| call.make(vcpu.fd())));
    });
    group.finish();

    let passage = Passage::default();
    let mut writes = writing(&reads, &state);
    let mut group = c.benchmark_group("restore a vCPU");
    group.bench_function("kvm-core", |b| {
        b.iter(|| black_box(vcpu.restore(&host, &state, &passage).unwrap()));
    });
    group.bench_function("the ioctls alone", |b| {
        b.iter(|| writes.iter_mut().for_each(|call| call.make(vcpu.fd())));
    });
    group.finish();
}

/// Asking four paused vCPUs: nothing, one of them, and all of them for their whole state.
fn access(c: &mut Criterion) {
    let machine = Machine::with_irqchip(guests::vcpu::halt());
    let host = machine.vm.state_host(&kvm()).unwrap();
    let set = VcpuSet::new(machine.vm.identity().clone());
    let handler = |_: &VcpuView<'_, VcpuFd>, _: Exit<'_>| Flow::<()>::Continue;
    let spawn = |id| set.spawn("vcpu", machine.vcpu(id), handler).unwrap();
    let threads: Vec<_> = (0..4).map(spawn).collect();
    while set.active() < 4 {
        std::thread::yield_now();
    }
    let pause = set.pause().unwrap();
    let mut group = c.benchmark_group("ask paused vCPUs");
    group.bench_function("one of four, for nothing", |b| {
        b.iter(|| pause.with_vcpu(VcpuId(2), |_: &VcpuView<'_, VcpuFd>| ()));
    });
    group.bench_function("four of four, for nothing", |b| {
        b.iter(|| pause.with_each(|_: &VcpuView<'_, VcpuFd>| ()));
    });
    group.bench_function("four of four, for their state", |b| {
        b.iter(|| {
            let host = host.clone();
            pause.with_each(move |vcpu: &VcpuView<'_, VcpuFd>| vcpu.state(&host).unwrap())
        });
    });
    group.finish();
    drop(pause);
    set.stop().unwrap();
    threads
        .into_iter()
        .for_each(|thread| drop(thread.join().unwrap()));
}

#[cfg(feature = "with-serde")]
fn text(c: &mut Criterion) {
    let machine = Machine::with_irqchip(&[]);
    let host = machine.vm.state_host(&kvm()).unwrap();
    let state = vcpu(&machine).state(&host).unwrap();
    let text = serde_json::to_string(&state).unwrap();
    println!("a vCPU's state is {} bytes of JSON", text.len());
    let mut group = c.benchmark_group("a vCPU's state as JSON");
    group.bench_function("write", |b| {
        b.iter(|| serde_json::to_string(black_box(&state)).unwrap());
    });
    group.bench_function("read", |b| {
        b.iter(|| serde_json::from_str::<VcpuState>(black_box(&text)).unwrap());
    });
    group.finish();
}

#[cfg(not(feature = "with-serde"))]
fn text(_: &mut Criterion) {}

fn config() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(50)
}

criterion_group! { name = benches; config = config(); targets = save_and_restore, access, text }
criterion_main!(benches);
