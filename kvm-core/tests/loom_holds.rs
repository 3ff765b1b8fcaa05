// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Holds under loom, whose clock stands still: a hold ends by nobody but who ends it, and a nudge that is lost leaves a
//! thread asleep for ever, which loom reports as a deadlock.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;
use std::time::Duration;

use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{Exit, Flow, HaltReason, Identity, VcpuId, VcpuSet, VcpuView};
use loom::thread;

const LONG: Duration = Duration::from_secs(24 * 3600);
const ZERO: VcpuId = VcpuId(0);

fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.check(test);
}

/// A set with one vCPU of this script, and its thread, which ends with `reason`.
fn start(script: &[Step], reason: HaltReason<Infallible>) -> (VcpuSet, thread::JoinHandle<()>) {
    let set = VcpuSet::new(Identity::vm("loom"));
    let runner = set.enroll(FakeVcpu::new(ZERO, script.to_vec())).unwrap();
    let vcpu = thread::spawn(move || {
        let block = |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<Infallible> { Flow::Block };
        let Err(halt) = runner.run(block);
        assert_eq!(halt.reason, reason);
    });
    (set, vcpu)
}

#[test]
fn a_pause_and_a_stop_reach_a_vcpu_on_its_way_into_its_hold() {
    model(2, || {
        let (set, vcpu) = start(&[], HaltReason::Stopped);
        set.hold(ZERO, LONG).unwrap();
        let pause = set.pause().unwrap();
        assert_eq!(set.active(), 0);
        drop(pause);
        set.stop().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_release_ends_a_hold_that_is_about_to_begin() {
    model(3, || {
        let (set, vcpu) = start(&[Step::shutdown()], HaltReason::Shutdown);
        // It may have left.
        let _ = set.hold(ZERO, LONG);
        let _ = set.release(ZERO);
        vcpu.join().unwrap();
    });
}

#[test]
fn a_wake_up_during_a_hold_is_not_lost_to_the_halt_behind_it() {
    model(2, || {
        let (set, vcpu) = start(&[Step::hlt(), Step::shutdown()], HaltReason::Shutdown);
        let waker = set.waker(ZERO).unwrap();
        let waking = thread::spawn(move || waker.wake());
        // It may have left.
        let _ = set.hold(ZERO, LONG);
        let _ = set.release(ZERO);
        waking.join().unwrap();
        vcpu.join().unwrap();
    });
}
