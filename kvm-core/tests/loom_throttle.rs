// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A throttle under loom, whose clock stands still: its thread looks once behind each change, and a vCPU that it has put to
//! sleep is woken by a lift or never, which loom reports as a deadlock.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;
use std::time::Duration;

use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{Exit, Flow, HaltReason, Identity, Throttle, VcpuId, VcpuSet, VcpuView};
use loom::thread;

const ZERO: VcpuId = VcpuId(0);
/// More than a vCPU runs for before it is held.
const RAN: Duration = Duration::from_millis(40);

fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.check(test);
}

/// A set with one vCPU of this script, its thread, which ends with `reason`, and a throttle that may be about to hold it.
fn throttled(
    script: &[Step],
    reason: HaltReason<Infallible>,
) -> (VcpuSet, thread::JoinHandle<()>, Throttle) {
    let set = VcpuSet::new(Identity::vm("loom"));
    let vcpu = FakeVcpu::new(ZERO, script.to_vec());
    let state = vcpu.state();
    let runner = set.enroll(vcpu).unwrap();
    let throttle = set.throttle().unwrap();
    // What it ran before the first look costs it nothing.
    throttle.set(50).unwrap();
    let vcpu = thread::spawn(move || {
        let block = |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<Infallible> { Flow::Block };
        let Err(halt) = runner.run(block);
        assert_eq!(halt.reason, reason);
    });
    thread::yield_now();
    state.has_run(RAN);
    throttle.set(60).unwrap();
    (set, vcpu, throttle)
}

#[test]
fn a_throttle_that_is_dropped_leaves_no_vcpu_asleep() {
    model(2, || {
        let (set, vcpu, throttle) = throttled(&[Step::shutdown()], HaltReason::Shutdown);
        drop(throttle);
        vcpu.join().unwrap();
        // And there may be another one.
        drop(set.throttle().unwrap());
    });
}

#[test]
fn a_throttle_of_nothing_leaves_no_vcpu_asleep() {
    model(2, || {
        let (_set, vcpu, throttle) = throttled(&[Step::shutdown()], HaltReason::Shutdown);
        throttle.set(0).unwrap();
        vcpu.join().unwrap();
        drop(throttle);
    });
}

#[test]
fn a_pause_and_a_stop_reach_a_vcpu_that_a_throttle_holds_or_is_about_to() {
    model(2, || {
        let (set, vcpu, throttle) = throttled(&[], HaltReason::Stopped);
        let pause = set.pause().unwrap();
        assert_eq!(set.active(), 0);
        drop(pause);
        set.stop().unwrap();
        vcpu.join().unwrap();
        drop(throttle);
    });
}
