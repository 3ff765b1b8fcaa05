// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a sample of KVM's statistics costs, beside what it cannot do without: a plain `pread` of the
//! same bytes of the same kind of file. Same VM, same run.
//!
//! "idle" is a vCPU that has not run; "in the guest" is one that another thread runs meanwhile.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use common::Machine;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use kvm_core::stats::{StatsFd, StatsReader};
use kvm_core::{Exit, Flow, VcpuSet, VcpuView};

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// The file as one gets it by hand.
fn by_hand(of: &impl AsRawFd) -> OwnedFd {
    // SAFETY: takes no argument; makes a descriptor, or fails.
    let fd = unsafe { libc::ioctl(of.as_raw_fd(), KVM_GET_STATS_FD, 0 as libc::c_ulong) };
    assert!(fd >= 0);
    // SAFETY: it is new, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn pair(
    group: &mut BenchmarkGroup<'_, WallTime>,
    reader: &mut StatsReader<StatsFd>,
    raw: &OwnedFd,
) {
    let offset = reader.schema().data_offset() as libc::off_t;
    let mut buffer = vec![0_u8; reader.schema().data_len()];
    group.bench_function("kvm-core sample", |b| {
        b.iter(|| {
            black_box(reader.sample().unwrap());
        });
    });
    group.bench_function("plain pread", |b| {
        b.iter(|| {
            let len = buffer.len();
            let to = buffer.as_mut_ptr().cast();
            // SAFETY: the buffer is as long as it says, and nobody else's.
            let read = unsafe { libc::pread(raw.as_raw_fd(), to, len, offset) };
            assert_eq!(read as usize, len);
            black_box(&buffer);
        });
    });
}

fn sample(c: &mut Criterion) {
    let machine = Machine::new(guests::vcpu::out_for_ever());
    if !common::kvm().capabilities().binary_stats() {
        return println!("NOT TRIED: this KVM has no KVM_CAP_BINARY_STATS_FD");
    }
    let mut reader = machine.vm.stats().unwrap();
    let mut group = c.benchmark_group("sample of a VM");
    pair(&mut group, &mut reader, &by_hand(machine.vm.fd().as_ref()));
    group.finish();

    let vcpu = machine.vcpu(0);
    let (mut reader, raw) = (vcpu.stats().unwrap(), by_hand(vcpu.fd()));
    let mut group = c.benchmark_group("sample of a vCPU, idle");
    pair(&mut group, &mut reader, &raw);
    group.finish();

    let set = VcpuSet::new(machine.vm.identity().clone());
    let handler = |_: &VcpuView<'_, _>, _: Exit<'_>| Flow::<()>::Continue;
    let thread = set.spawn("vcpu", vcpu, handler).unwrap();
    let mut group = c.benchmark_group("sample of a vCPU, in the guest");
    pair(&mut group, &mut reader, &raw);
    group.finish();
    set.stop().unwrap();
    thread.join().unwrap();
}

/// What a monitor does with one: a number, or the changes of all with the histograms' buckets.
fn read(c: &mut Criterion) {
    let machine = Machine::new(&[]);
    let Ok(mut reader) = machine.vcpu(0).stats() else {
        return;
    };
    let before = reader.latest().clone();
    let now = reader.sample().unwrap().clone();
    let exits = now.schema().index_of("exits").unwrap();
    let mut group = c.benchmark_group("read a sample of a vCPU");
    group.bench_function("one number by index", |b| {
        b.iter(|| black_box(&now).get(exits).and_then(|value| value.number()));
    });
    group.bench_function("one number by name", |b| {
        b.iter(|| {
            black_box(&now)
                .named("exits")
                .and_then(|value| value.number())
        });
    });
    group.bench_function("all changes and buckets", |b| {
        b.iter(|| {
            let changes = black_box(&now).since(&before).unwrap();
            let all = changes.iter().flat_map(|change| change.numbers());
            let buckets = changes.iter().flat_map(|change| change.buckets());
            all.sum::<i128>() + buckets.map(|bucket| bucket.count).sum::<i128>()
        });
    });
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .sample_size(50)
}

criterion_group! { name = benches; config = config(); targets = sample, read }
criterion_main!(benches);
