// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The real KVM's statistics of a real guest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use common::{Machine, kvm, watchdog};
use kvm_core::stats::{Kind, StatsError, StatsFd, StatsReader, Unit};
use kvm_core::{Exit, Flow, HaltReason, Vcpu, VcpuSet, VcpuView};

/// Whether the host has them; where not, opening must say so.
fn has_statistics(machine: &Machine) -> bool {
    let has = kvm().capabilities().binary_stats();
    if !has {
        println!("NOT TRIED: this KVM has no KVM_CAP_BINARY_STATS_FD");
        assert_eq!(machine.vm.stats().unwrap_err(), StatsError::Unsupported);
        let vcpu = machine.vcpu(0);
        assert_eq!(vcpu.stats().unwrap_err(), StatsError::Unsupported);
    }
    has
}

/// Runs `guests::vcpu::out_for_ever` for so many port writes.
fn writes(machine: &Machine, vcpu: Vcpu, count: u64) -> Vcpu {
    let set = VcpuSet::new(machine.vm.identity().clone());
    let mut left = count;
    let Err(halt) =
        set.enroll(vcpu)
            .unwrap()
            .run(|_: &VcpuView<'_, _>, exit: Exit<'_>| match exit {
                Exit::PioOut { .. } if left > 1 => {
                    left -= 1;
                    Flow::Continue
                }
                Exit::PioOut { .. } => Flow::Stop("enough"),
                other => panic!("{other:?}"),
            });
    assert_eq!(halt.reason, HaltReason::Handler("enough"));
    halt.vcpu
}

fn number(reader: &StatsReader<StatsFd>, name: &str) -> u64 {
    reader.latest().named(name).unwrap().number().unwrap()
}

#[test]
fn a_guests_exits_are_counted() {
    const WRITES: u64 = 200;
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::out_for_ever());
        if !has_statistics(&machine) {
            return;
        }
        let vcpu = machine.vcpu(0);
        let mut reader = vcpu.stats().unwrap();
        let before = reader.latest().clone();
        let vcpu = writes(&machine, vcpu, WRITES);
        let now = reader.sample().unwrap();
        let changes = now.since(&before).unwrap();
        let exits = changes.named("exits").unwrap().number().unwrap();
        let seen: Vec<_> = changes
            .iter()
            .filter(|c| !c.is_zero())
            .map(|c| (c.statistic().name(), c.number()))
            .collect();
        println!("{WRITES} port writes: {seen:?}");
        // One for each write; page faults and the host's interrupts add to them.
        assert!(exits >= i128::from(WRITES), "{seen:?}");
        // An idle vCPU adds nothing.
        let before = now.clone();
        let idle = reader.sample().unwrap().since(&before).unwrap();
        assert_eq!(idle.named("exits").unwrap().number(), Some(0));
        drop(vcpu);
    });
}

#[test]
fn the_statistics_say_what_they_are_of_and_in() {
    let machine = Machine::with_irqchip(&[]);
    if !has_statistics(&machine) {
        return;
    }
    let vm = machine.vm.stats().unwrap();
    let second = machine.vcpu(1);
    let vcpu = second.stats().unwrap();
    let kvm_id = vm.schema().id();
    assert!(kvm_id.starts_with("kvm-"), "{kvm_id}");
    assert_eq!(vcpu.schema().id(), format!("{kvm_id}/vcpu-1"));
    for reader in [&vm, &vcpu] {
        let schema = reader.schema();
        assert!(!schema.statistics().is_empty() && schema.flags() == 0);
        for (index, statistic) in schema.statistics().iter().enumerate() {
            // What the kernel's own test of this file holds of all of them.
            assert!(!statistic.name().is_empty());
            assert_eq!(schema.index_of(statistic.name()), Some(index));
            assert!(statistic.is_histogram() || statistic.values() == 1);
            assert!(statistic.kind() != Kind::LinearHistogram || statistic.bucket_size() > 0);
            assert!(!matches!(statistic.scale().unit, Unit::Other(_)));
        }
    }
    let Some(waits) = vcpu.latest().named("halt_wait_hist") else {
        return println!("NOT TRIED: this KVM has no halt_wait_hist (Linux 5.15)");
    };
    assert_eq!(waits.statistic().kind(), Kind::LogHistogram);
    assert_eq!(waits.statistic().scale().to_string(), "ns");
    assert_eq!(
        waits.buckets().count(),
        usize::from(waits.statistic().values())
    );
}

#[test]
fn another_thread_samples_a_vcpu_that_runs() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::out_for_ever());
        if !has_statistics(&machine) {
            return;
        }
        let vcpu = machine.vcpu(0);
        let mut of_vm = machine.vm.stats().unwrap();
        let mut of_vcpu = vcpu.stats().unwrap();
        let set = VcpuSet::new(machine.vm.identity().clone());
        let handler = |_: &VcpuView<'_, _>, _: Exit<'_>| Flow::<()>::Continue;
        let thread = set.spawn("vcpu", vcpu, handler).unwrap();
        let sampler = thread::spawn(move || {
            let exits = of_vcpu.schema().index_of("exits").unwrap();
            let mut highest = 0;
            for grown in 0..100 {
                loop {
                    of_vm.sample().unwrap();
                    let now = of_vcpu.sample().unwrap().get(exits).unwrap();
                    let now = now.number().unwrap();
                    assert!(now >= highest, "{now} after {highest}");
                    if now > highest {
                        highest = now;
                        break;
                    }
                    thread::yield_now();
                }
                assert!(highest > grown);
            }
        });
        sampler.join().unwrap();
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    });
}

#[test]
fn sampling_neither_waits_for_the_vcpu_nor_brings_it_out() {
    watchdog(|| {
        let machine = Machine::with_irqchip(guests::vcpu::halt());
        if !has_statistics(&machine) {
            return;
        }
        let vcpu = machine.vcpu(0);
        let mut reader = vcpu.stats().unwrap();
        let blocking = reader.schema().index_of("blocking");
        let left = Arc::new(AtomicBool::new(false));
        let set = VcpuSet::new(machine.vm.identity().clone());
        let handler = {
            let left = left.clone();
            move |_: &VcpuView<'_, _>, _: Exit<'_>| {
                left.store(true, Ordering::Relaxed);
                Flow::<()>::Continue
            }
        };
        let thread = set.spawn("vcpu", vcpu, handler).unwrap();
        // Asleep in HLT inside KVM_RUN: KVM says so of itself where it has that statistic.
        while blocking.is_some_and(|at| {
            let asleep = reader.sample().unwrap().get(at).unwrap();
            asleep.number() == Some(0)
        }) {
            thread::yield_now();
        }
        for _ in 0..1000 {
            reader.sample().unwrap();
        }
        assert!(!left.load(Ordering::Relaxed));
        set.stop().unwrap();
        thread.join().unwrap();
    });
}

#[test]
fn a_reader_outlives_its_vm_and_vcpu_and_is_not_inherited() {
    let machine = Machine::new(guests::vcpu::out_for_ever());
    if !has_statistics(&machine) {
        return;
    }
    let vcpu = machine.vcpu(0);
    let mut of_vm = machine.vm.stats().unwrap();
    let mut of_vcpu = vcpu.stats().unwrap();
    for reader in [&of_vm, &of_vcpu] {
        let fd = reader.file().as_fd().as_raw_fd();
        // SAFETY: only asks.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
    drop(writes(&machine, vcpu, 10));
    of_vcpu.sample().unwrap();
    let exits = number(&of_vcpu, "exits");
    let (send, receive) = mpsc::channel();
    drop(machine);
    thread::spawn(move || {
        of_vm.sample().unwrap();
        of_vcpu.sample().unwrap();
        send.send(number(&of_vcpu, "exits")).unwrap();
    });
    assert_eq!(receive.recv().unwrap(), exits);
}
