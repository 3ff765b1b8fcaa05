// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A throttle over the real KVM: a guest that spins gets on by its part, one that halts is left alone, and whoever sleeps for
//! it hears pauses and the end at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Machine, watchdog};
use guests::vcpu::{COUNTS_AT, counts, halt};
use kvm_core::{Doorbell, Exit, Flow, GuestMode, HaltReason, RunVcpu, VcpuId, VcpuSet, VcpuView};
use kvm_ioctls::VcpuFd;

fn carry_on(_: &VcpuView<'_, VcpuFd>, _: Exit<'_>) -> Flow<Infallible> {
    Flow::Continue
}

/// Two vCPUs that count, each in a set of its own.
struct Two {
    machine: Machine,
    sets: [VcpuSet; 2],
    first: Arc<dyn Doorbell>,
}

impl Two {
    fn counts(&self) -> [u32; 2] {
        [0, 1].map(|vcpu| self.machine.memory.word(COUNTS_AT + 4 * vcpu))
    }

    /// What the first gets on by while the second does by one, over a while, and the part of it for which it ran.
    fn ratio(&self) -> (f64, f64) {
        let ran = self.first.cpu_time().unwrap();
        let (before, begun) = (self.counts(), Instant::now());
        // Both run meanwhile, on a host that has others to serve: it is their ratio that counts.
        while begun.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let after = self.counts();
        let [one, two] = [0, 1].map(|vcpu| f64::from(after[vcpu].wrapping_sub(before[vcpu])));
        assert!(two > 0.0);
        let ran = self.first.cpu_time().unwrap() - ran;
        (one / two, ran.div_duration_f64(begun.elapsed()))
    }
}

#[test]
fn a_guest_that_spins_gets_on_by_its_part_and_as_before_when_the_throttle_is_lifted() {
    watchdog(|| {
        let machine = Machine::new(counts());
        let sets = [(); 2].map(|()| VcpuSet::new(machine.vm.identity().clone()));
        let vcpus: Vec<_> = (0..2).map(|id| machine.vcpu(id)).collect();
        let first = vcpus[0].doorbell();
        let threads: Vec<_> = std::iter::zip(vcpus, &sets)
            .map(|(vcpu, set)| set.spawn("vcpu", vcpu, carry_on).unwrap())
            .collect();
        let two = Two {
            machine,
            sets,
            first,
        };
        while two.counts().contains(&0) {
            std::thread::yield_now();
        }
        let free = two.ratio();
        let throttle = two.sets[0].throttle().unwrap();
        throttle.set(80).unwrap();
        let slowed = two.ratio();
        throttle.set(95).unwrap();
        let crawls = two.ratio();
        // A pause and its end take nothing off what it sleeps for.
        two.sets[0].pause().unwrap().resume();
        drop(throttle);
        let lifted = two.ratio();
        println!(
            "of another's progress: {free:.3?}, at 80 % {slowed:.3?}, at 95 % {crawls:.3?}, then {lifted:.3?}"
        );
        // On a host that has others to serve a vCPU sleeps its part of what it gets: no more than a fifth and a twentieth of
        // the time is run in any case, here by no more than twice that.
        assert!(slowed.1 < 0.4 && crawls.1 < 0.1, "{slowed:?} {crawls:?}");
        assert!(
            slowed.0 < 0.9 * free.0 && crawls.0 < 0.75 * slowed.0,
            "{free:?} {slowed:?} {crawls:?}"
        );
        assert!(
            crawls.0 > 0.0 && lifted.0 > 1.1 * slowed.0,
            "{lifted:?} behind {slowed:?}"
        );
        for (set, thread) in std::iter::zip(&two.sets, threads) {
            set.stop().unwrap();
            assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        }
    });
}

#[test]
fn a_guest_on_hold_pauses_and_ends_at_once_and_gets_on_when_it_is_released() {
    watchdog(|| {
        // It would wait for a day: the watchdog says if it does.
        let day = Duration::from_secs(24 * 3600);
        let machine = Machine::new(counts());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let thread = set.spawn("vcpu", machine.vcpu(0), carry_on).unwrap();
        let count = || machine.memory.word(COUNTS_AT);
        for _ in 0..20 {
            let before = count();
            while count() == before {
                std::thread::yield_now();
            }
            set.hold(VcpuId(0), day).unwrap();
            set.pause().unwrap().resume();
            let held = count();
            for _ in 0..20 {
                set.kick(VcpuId(0)).unwrap();
                set.pause().unwrap().resume();
            }
            assert_eq!(count(), held);
            set.release(VcpuId(0)).unwrap();
        }
        set.hold(VcpuId(0), day).unwrap();
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    });
}

#[test]
fn a_halted_guest_is_neither_woken_nor_charged() {
    watchdog(|| {
        let machine = Machine::with_irqchip(halt());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let thread = set.spawn("vcpu", machine.runnable(0), carry_on).unwrap();
        let in_guest = || set.mode(VcpuId(0)) == Ok(GuestMode::InGuestMode);
        while !in_guest() {
            std::thread::yield_now();
        }
        let throttle = set.throttle().unwrap();
        throttle.set(99).unwrap();
        // Held, it would be outside for 99 looks of a hundred.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(500) {
            assert!(in_guest());
            std::thread::sleep(Duration::from_millis(1));
        }
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    });
}
