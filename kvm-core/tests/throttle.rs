// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vCPUs that are held out of the guest, and slowed down: who is on hold hears everything at once, and who has not run owes
//! nothing.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_core::fake::{FakeState, FakeVcpu, Step};
use kvm_core::{
    ControlError, Exit, Flow, GuestMode, Halt, HaltReason, Identity, Request, ThrottleError,
    VcpuId, VcpuSet, VcpuView,
};

/// Longer than any test.
const LONG: Duration = Duration::from_secs(24 * 3600);
const ZERO: VcpuId = VcpuId(0);

type Handler = fn(&VcpuView<'_, ()>, Exit<'_>) -> Flow<Infallible>;
type Thread = JoinHandle<Halt<FakeVcpu, Handler, Infallible>>;

fn carry_on(_: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<Infallible> {
    Flow::Continue
}

fn start(
    set: &VcpuSet,
    id: u32,
    script: impl IntoIterator<Item = Step>,
) -> (Arc<FakeState>, Thread) {
    let vcpu = FakeVcpu::new(VcpuId(id), script);
    let state = vcpu.state();
    let thread = set.spawn("vcpu", vcpu, carry_on as Handler).unwrap();
    (state, thread)
}

fn until(what: impl Fn() -> bool) {
    while !what() {
        std::thread::yield_now();
    }
}

fn stopped(set: &VcpuSet, thread: Thread) {
    set.stop().unwrap();
    assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
}

/// Out of the guest, for it is held.
fn held(set: &VcpuSet, state: &FakeState) {
    until(|| state.is_in_guest());
    set.hold(ZERO, LONG).unwrap();
    until(|| set.mode(ZERO) == Ok(GuestMode::OutsideGuestMode) && !state.is_in_guest());
}

#[test]
fn a_vcpu_on_hold_is_paused_resumed_kicked_and_stopped_and_runs_nothing_meanwhile() {
    let set = VcpuSet::new(Identity::vm("test"));
    let (state, thread) = start(&set, 0, []);
    held(&set, &state);
    let ran = state.log().guest;
    for _ in 0..50 {
        set.pause().unwrap().resume();
        set.kick(ZERO).unwrap();
        set.request_all_and_wait(Request::consumer(0).unwrap())
            .unwrap();
    }
    // It has served all that, and holds.
    assert_eq!(state.log().guest, ran);
    stopped(&set, thread);
}

#[test]
fn a_release_ends_a_hold_and_two_holds_are_one_that_is_longer() {
    let set = VcpuSet::new(Identity::vm("test"));
    let (state, thread) = start(&set, 0, []);
    for _ in 0..50 {
        held(&set, &state);
        set.hold(ZERO, LONG).unwrap();
        set.hold(ZERO, Duration::MAX).unwrap();
        set.release(ZERO).unwrap();
        until(|| state.is_in_guest());
    }
    // One that is over by itself.
    let ran = state.log().guest;
    set.hold(ZERO, Duration::from_millis(5)).unwrap();
    until(|| state.log().guest > ran);
    let nobody = Err(ControlError::NoSuchVcpu(VcpuId(7)));
    assert_eq!(set.hold(VcpuId(7), LONG), nobody);
    assert_eq!(set.release(VcpuId(7)), nobody);
    stopped(&set, thread);
}

#[test]
fn a_hold_comes_before_the_vcpus_first_entry() {
    let set = VcpuSet::new(Identity::vm("test"));
    let vcpu = FakeVcpu::new(ZERO, []);
    let state = vcpu.state();
    let runner = set.enroll(vcpu).unwrap();
    set.hold(ZERO, LONG).unwrap();
    let thread = std::thread::spawn(move || {
        let Err(halt) = runner.run(carry_on as Handler);
        halt
    });
    until(|| set.active() == 1);
    set.pause().unwrap().resume();
    assert_eq!(state.log().guest, 0);
    stopped(&set, thread);
}

#[test]
fn a_wake_up_that_comes_during_a_hold_is_there_for_the_halt_behind_it() {
    let set = VcpuSet::new(Identity::vm("test"));
    let vcpu = FakeVcpu::new(ZERO, [Step::Guest, Step::hlt(), Step::shutdown()]);
    let state = vcpu.state();
    let block = |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<Infallible> { Flow::Block };
    let thread = set.spawn("vcpu", vcpu, block).unwrap();
    held(&set, &state);
    set.waker(ZERO).unwrap().wake();
    set.release(ZERO).unwrap();
    assert_eq!(thread.join().unwrap().reason, HaltReason::Shutdown);
}

#[test]
fn a_throttle_brings_out_who_has_run_and_leaves_who_has_not() {
    let set = VcpuSet::new(Identity::vm("test"));
    let (busy, one) = start(&set, 0, []);
    let (idle, two) = start(&set, 1, []);
    until(|| busy.is_in_guest() && idle.is_in_guest());
    let throttle = set.throttle().unwrap();
    throttle.set(50).unwrap();
    let rings = busy.log().rings;
    for _ in 0..5 {
        let seen = busy.log().rings;
        // The first look only sees where it is.
        until(|| {
            // On hold it uses none.
            if busy.is_in_guest() {
                busy.has_run(Duration::from_millis(10));
            }
            busy.log().rings > seen
        });
    }
    assert!(busy.log().rings >= rings + 5);
    assert_eq!(idle.log().rings, 0);
    drop(throttle);
    until(|| busy.is_in_guest());
    set.stop().unwrap();
    for thread in [one, two] {
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    }
}

#[test]
fn less_of_a_throttle_and_its_end_wake_who_sleeps() {
    let set = VcpuSet::new(Identity::vm("test"));
    let (state, thread) = start(&set, 0, []);
    for lift in [
        |throttle: kvm_core::Throttle| throttle.set(98).unwrap(),
        |throttle: kvm_core::Throttle| throttle.set(0).unwrap(),
        drop,
    ] {
        let throttle = set.throttle().unwrap();
        throttle.set(99).unwrap();
        until(|| {
            state.has_run(Duration::from_millis(10));
            !state.is_in_guest()
        });
        // What it was charged for is of a second.
        lift(throttle);
        until(|| state.is_in_guest());
    }
    stopped(&set, thread);
}

#[test]
fn a_hold_outlives_the_throttle_and_less_of_it() {
    let set = VcpuSet::new(Identity::vm("test"));
    let (state, thread) = start(&set, 0, []);
    for lift in [
        |throttle: kvm_core::Throttle| throttle.set(98).unwrap(),
        |throttle: kvm_core::Throttle| throttle.set(0).unwrap(),
        drop,
    ] {
        let throttle = set.throttle().unwrap();
        throttle.set(99).unwrap();
        held(&set, &state);
        let ran = state.log().guest;
        lift(throttle);
        // It has heard of that, and of all before it.
        set.request_all_and_wait(Request::consumer(0).unwrap())
            .unwrap();
        set.pause().unwrap().resume();
        assert_eq!(state.log().guest, ran);
        set.release(ZERO).unwrap();
        until(|| state.is_in_guest());
    }
    stopped(&set, thread);
}

#[test]
fn a_throttle_is_one_at_a_time_and_refuses_what_is_none() {
    let set = VcpuSet::new(Identity::vm("test"));
    let throttle = set.throttle().unwrap();
    throttle.set(20).unwrap();
    for percent in [100, 255] {
        let error = throttle.set(percent).unwrap_err();
        assert!(
            error.to_string().contains(&format!("{percent} %")),
            "{error}"
        );
        assert_eq!(throttle.percent(), 20);
    }
    assert!(matches!(set.throttle(), Err(ThrottleError::Throttled)));
    drop(throttle);
    assert_eq!(set.throttle().unwrap().percent(), 0);
}
