// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Halting in user space under loom: a lost wake-up leaves a thread asleep for ever, which loom reports as
//! a deadlock. Polling is off: it is the same look at the same word, any number of times.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{
    Blocker, Exit, ExitHandler, Flow, HaltPolling, HaltReason, Identity, Request, Requests, VcpuId,
    VcpuSet, VcpuView, Woken,
};
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.check(test);
}

#[test]
fn a_wake_up_is_seen_with_what_was_written_before_it() {
    model(4, || {
        let mut blocker = Blocker::new(HaltPolling::OFF);
        let (waker, written) = (blocker.waker(), Arc::new(AtomicU32::new(0)));
        let write = written.clone();
        let other = thread::spawn(move || {
            write.store(7, Ordering::Relaxed);
            waker.wake();
        });
        assert_eq!(blocker.block(), Woken::Event);
        assert_eq!(written.load(Ordering::Relaxed), 7);
        other.join().unwrap();
    });
}

#[test]
fn a_nudge_never_swallows_an_event() {
    model(3, || {
        let mut blocker = Blocker::new(HaltPolling::OFF);
        let (waker, nudger) = (blocker.waker(), blocker.waker());
        let one = thread::spawn(move || waker.wake());
        let two = thread::spawn(move || nudger.nudge());
        while blocker.block() != Woken::Event {}
        one.join().unwrap();
        two.join().unwrap();
    });
}

#[test]
fn two_waits_in_succession_take_an_event_each() {
    model(3, || {
        let mut blocker = Blocker::new(HaltPolling::OFF);
        let mut back = Blocker::new(HaltPolling::OFF);
        let (waker, to_back) = (blocker.waker(), back.waker());
        let other = thread::spawn(move || {
            waker.wake();
            assert_eq!(back.block(), Woken::Event);
            waker.wake();
        });
        assert_eq!(blocker.block(), Woken::Event);
        to_back.wake();
        assert_eq!(blocker.block(), Woken::Event);
        other.join().unwrap();
    });
}

/// Blocks at each exit; a request stops it.
struct Blocks;

impl ExitHandler<()> for Blocks {
    type Stop = &'static str;

    fn exit(&mut self, _: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<&'static str> {
        Flow::Block
    }

    fn requests(&mut self, _: &VcpuView<'_, ()>, _: Requests) -> Flow<&'static str> {
        Flow::Stop("asked")
    }
}

#[test]
fn a_request_reaches_a_vcpu_on_its_way_into_its_halt() {
    model(3, || {
        let set = VcpuSet::new(Identity::vm("loom"));
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), [Step::hlt()])).unwrap();
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(Blocks);
            assert_eq!(halt.reason, HaltReason::Handler("asked"));
        });
        set.request(VcpuId(0), Request::consumer(0).unwrap())
            .unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_pause_and_a_stop_reach_a_halted_vcpu() {
    model(2, || {
        let set = VcpuSet::new(Identity::vm("loom"));
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), [Step::hlt()])).unwrap();
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(Blocks);
            assert_eq!(halt.reason, HaltReason::Stopped);
        });
        let pause = set.pause().unwrap();
        assert_eq!(set.active(), 0);
        drop(pause);
        set.stop().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_woken_vcpu_goes_back_into_the_guest() {
    model(2, || {
        let set = VcpuSet::new(Identity::vm("loom"));
        let script = [Step::hlt(), Step::shutdown()];
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), script)).unwrap();
        let waker = runner.waker();
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(Blocks);
            assert_eq!(halt.reason, HaltReason::Shutdown);
        });
        waker.wake();
        set.wait().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_begins_halted_is_woken_and_said_to_be_halted_until_then() {
    model(2, || {
        let set = VcpuSet::new(Identity::vm("loom"));
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), [Step::shutdown()]));
        let runner = runner.unwrap().halted();
        let waker = set.waker(VcpuId(0)).unwrap();
        let pause = set.pause().unwrap();
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(Blocks);
            assert_eq!(halt.reason, HaltReason::Shutdown);
        });
        // One that has not started says nothing.
        let is_halted = || pause.with_vcpu(VcpuId(0), |vcpu: &VcpuView<'_, ()>| vcpu.is_halted());
        assert_ne!(is_halted().ok(), Some(false));
        waker.wake();
        assert_ne!(is_halted().ok(), Some(true));
        drop(pause);
        vcpu.join().unwrap();
    });
}
