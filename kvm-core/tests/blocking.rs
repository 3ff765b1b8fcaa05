// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU that is halted in user space: woken by what is for it, and by nothing else; no wake-up is lost.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{
    Blocker, ControlError, Exit, ExitHandler, Flow, HaltPolling, HaltReason, Identity, Pause,
    Request, Requests, Runner, VcpuId, VcpuSet, VcpuView, Woken,
};
use proptest::prelude::*;

/// The kernel's own words (`kvm_vcpu_halt`, `grow_halt_poll_ns`, `shrink_halt_poll_ns`), in nanoseconds.
fn kernel(max: u64, start: u64, grow: u64, shrink: u64, window: u64, blocked: u64) -> u64 {
    let grown = || match grow {
        0 => window,
        _ => (window * grow).max(start).min(max),
    };
    let shrunk = || match shrink {
        0 => 0,
        _ if window / shrink < start => 0,
        _ => window / shrink,
    };
    if max == 0 {
        0
    } else if blocked <= window {
        window
    } else if window != 0 && blocked > max {
        shrunk()
    } else if window < max && blocked < max {
        grown()
    } else {
        window
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn the_window_is_the_kernels_after_any_halts(
        max in 0_u64..1_000_000,
        start in 0_u64..50_000,
        grow in 0_u32..5,
        shrink in 0_u32..5,
        halts in proptest::collection::vec(0_u64..2_000_000, 0..60),
    ) {
        let ns = Duration::from_nanos;
        let rule = HaltPolling { max: ns(max), grow_start: ns(start), grow, shrink };
        let (mut window, mut expected) = (Duration::ZERO, 0);
        for blocked in halts {
            window = rule.next(window, ns(blocked));
            expected = kernel(max, start, grow.into(), shrink.into(), expected, blocked);
            prop_assert_eq!(window, ns(expected));
            prop_assert!(window <= rule.max);
        }
    }

    #[test]
    fn no_numbers_make_the_rule_overflow_or_exceed_its_bound(
        max: Duration, start: Duration, grow: u32, shrink: u32, window: Duration, blocked: Duration,
    ) {
        let rule = HaltPolling { max, grow_start: start, grow, shrink };
        prop_assert!(rule.next(window, blocked) <= max);
    }
}

#[test]
fn a_wake_up_before_the_halt_ends_it_at_once_and_once() {
    for polling in [HaltPolling::OFF, HaltPolling::KERNEL] {
        let mut blocker = Blocker::new(polling);
        let waker = blocker.waker();
        waker.wake();
        waker.wake();
        waker.nudge();
        assert_eq!(blocker.block(), Woken::Event);
        waker.nudge();
        assert_eq!(blocker.block(), Woken::Nudge);
    }
}

#[test]
fn threads_that_wake_each_other_never_wait_for_ever() {
    // Each wakes the other once for each wake-up: one lost, and both hang.
    for polling in [HaltPolling::OFF, HaltPolling::KERNEL] {
        let (mut ping, mut pong) = (Blocker::new(polling), Blocker::new(polling));
        let (to_ping, to_pong) = (ping.waker(), pong.waker());
        let rounds = 20_000;
        let other = thread::spawn(move || {
            for _ in 0..rounds {
                while pong.block() != Woken::Event {}
                to_ping.wake();
            }
        });
        let nudge = ping.waker();
        for round in 0..rounds {
            to_pong.wake();
            if round % 3 == 0 {
                nudge.nudge();
            }
            while ping.block() != Woken::Event {}
        }
        other.join().unwrap();
    }
}

/// Blocks at each HLT and stops at the port write behind the last.
struct Handler {
    events: Arc<AtomicUsize>,
    told: Sender<&'static str>,
    asked: usize,
}

impl ExitHandler<()> for Handler {
    type Stop = usize;

    fn exit(&mut self, _: &VcpuView<'_, ()>, exit: Exit<'_>) -> Flow<usize> {
        match exit {
            Exit::Hlt => {
                self.told.send("halted").unwrap();
                Flow::Block
            }
            Exit::PioOut { .. } => {
                self.told.send("ran").unwrap();
                Flow::Continue
            }
            _ => Flow::Stop(self.asked),
        }
    }

    fn requests(&mut self, _: &VcpuView<'_, ()>, _: Requests) -> Flow<usize> {
        self.told.send("asked").unwrap();
        Flow::Continue
    }

    fn runnable(&mut self, _: &VcpuView<'_, ()>) -> bool {
        self.asked += 1;
        let before = self.events.load(Ordering::Relaxed);
        if before == 0 {
            self.told.send("not yet").unwrap();
            return false;
        }
        self.events.store(before - 1, Ordering::Relaxed);
        true
    }
}

struct Halted {
    set: VcpuSet,
    waker: kvm_core::Waker,
    events: Arc<AtomicUsize>,
    told: mpsc::Receiver<&'static str>,
    thread: thread::JoinHandle<HaltReason<usize>>,
}

fn start(polling: HaltPolling, script: impl IntoIterator<Item = Step>) -> Halted {
    start_as(|runner| runner.halt_polling(polling), script)
}

fn start_as(
    so: impl FnOnce(Runner<FakeVcpu>) -> Runner<FakeVcpu>,
    script: impl IntoIterator<Item = Step>,
) -> Halted {
    start_vcpu(so, FakeVcpu::new(VcpuId(0), script))
}

fn start_vcpu(so: impl FnOnce(Runner<FakeVcpu>) -> Runner<FakeVcpu>, vcpu: FakeVcpu) -> Halted {
    let set = VcpuSet::new(Identity::vm("test"));
    let runner = so(set.enroll(vcpu).unwrap());
    let (tell, told) = mpsc::channel();
    let (waker, events) = (runner.waker(), Arc::new(AtomicUsize::new(0)));
    let handler = Handler {
        events: events.clone(),
        told: tell,
        asked: 0,
    };
    let thread = thread::spawn(move || {
        let Err(halt) = runner.run(handler);
        halt.reason
    });
    Halted {
        set,
        waker,
        events,
        told,
        thread,
    }
}

impl Halted {
    fn expect(&self, what: &str) {
        // A time limit for a broken crate, not a measure of a sound one.
        assert_eq!(self.told.recv_timeout(Duration::from_secs(60)), Ok(what));
    }
}

fn halt_then_out() -> [Step; 3] {
    [
        Step::hlt(),
        Step::pio_out(1, 1, &[1]),
        Step::exit(kvm_bindings::KVM_EXIT_NMI),
    ]
}

#[test]
fn a_halted_vcpu_runs_no_guest_code_until_it_is_woken_for_something() {
    for polling in [HaltPolling::OFF, HaltPolling::KERNEL] {
        let vcpu = start(polling, halt_then_out());
        vcpu.expect("halted");
        vcpu.waker.wake();
        vcpu.expect("not yet");
        vcpu.waker.wake();
        vcpu.expect("not yet");
        vcpu.events.store(1, Ordering::Relaxed);
        vcpu.waker.wake();
        vcpu.expect("ran");
        assert_eq!(vcpu.thread.join().unwrap(), HaltReason::Handler(3));
    }
}

#[test]
fn requests_kicks_and_pauses_reach_a_halted_vcpu_and_leave_it_halted() {
    let vcpu = start(HaltPolling::OFF, halt_then_out());
    vcpu.expect("halted");
    let request = Request::consumer(0).unwrap();
    for _ in 0..100 {
        vcpu.set.request(VcpuId(0), request).unwrap();
        vcpu.expect("asked");
        vcpu.set.kick(VcpuId(0)).unwrap();
        let pause = vcpu.set.pause().unwrap();
        assert_eq!(vcpu.set.active(), 0);
        pause.resume();
    }
    // Nothing but what was asked for: it did not run, and nobody asked whether it could.
    assert_eq!(vcpu.told.try_recv().ok(), None);
    vcpu.events.store(1, Ordering::Relaxed);
    vcpu.waker.wake();
    vcpu.expect("ran");
    assert_eq!(vcpu.thread.join().unwrap(), HaltReason::Handler(1));
}

#[test]
fn an_nmi_ends_a_halt_and_one_that_is_refused_does_not() {
    let vcpu = start(HaltPolling::OFF, halt_then_out());
    vcpu.expect("halted");
    vcpu.set.nmi(VcpuId(0)).unwrap();
    // Nobody is asked: it is for the guest, whatever else there is.
    vcpu.expect("ran");
    vcpu.thread.join().unwrap();

    let refusing = FakeVcpu::new(VcpuId(0), halt_then_out()).nmi_fails(22);
    let vcpu = start_vcpu(|runner| runner, refusing);
    vcpu.expect("halted");
    vcpu.set.nmi(VcpuId(0)).unwrap();
    vcpu.set
        .request(VcpuId(0), Request::consumer(0).unwrap())
        .unwrap();
    vcpu.expect("asked");
    drop(vcpu.set.pause().unwrap());
    assert_eq!(vcpu.told.try_recv().ok(), None);
    vcpu.set.stop().unwrap();
}

#[test]
fn a_wake_up_while_a_pause_holds_counts_when_it_is_over() {
    let vcpu = start(HaltPolling::OFF, halt_then_out());
    vcpu.expect("halted");
    let pause = vcpu.set.pause().unwrap();
    vcpu.events.store(1, Ordering::Relaxed);
    vcpu.waker.wake();
    assert_eq!(vcpu.told.try_recv().ok(), None);
    pause.resume();
    vcpu.expect("ran");
    assert_eq!(vcpu.thread.join().unwrap(), HaltReason::Handler(1));
}

#[test]
fn a_stop_ends_a_halted_vcpu() {
    let vcpu = start(HaltPolling::KERNEL, [Step::hlt()]);
    vcpu.expect("halted");
    vcpu.set.stop().unwrap();
    assert_eq!(vcpu.thread.join().unwrap(), HaltReason::Stopped);
}

#[test]
fn a_request_that_finds_the_vcpu_at_its_halt_is_not_lost() {
    // Requests at every moment of a guest that halts all the time; each is waited for.
    let rounds = 2_000;
    let script = (0..4 * rounds).map(|_| Step::hlt());
    let vcpu = start(HaltPolling::OFF, script);
    let request = Request::consumer(0).unwrap();
    let told = |what| loop {
        let found = vcpu.told.recv_timeout(Duration::from_secs(60)).unwrap();
        if found == what {
            break;
        }
    };
    for round in 0..rounds {
        vcpu.events.store(1, Ordering::Relaxed);
        vcpu.waker.wake();
        if round % 2 == 0 {
            told("halted");
        }
        vcpu.set.request(VcpuId(0), request).unwrap();
        told("asked");
    }
    vcpu.set.stop().unwrap();
    assert_eq!(vcpu.thread.join().unwrap(), HaltReason::Stopped);
}

fn is_halted(pause: &Pause) -> bool {
    let halted = |vcpu: &VcpuView<'_, ()>| vcpu.is_halted();
    pause.with_vcpu(VcpuId(0), halted).unwrap()
}

#[test]
fn a_halted_vcpu_that_is_saved_and_restored_runs_no_guest_code_until_it_is_woken() {
    let saved = start(HaltPolling::OFF, halt_then_out());
    saved.expect("halted");
    let pause = saved.set.pause().unwrap();
    assert!(is_halted(&pause));
    saved.set.stop().unwrap();
    assert_eq!(saved.thread.join().unwrap(), HaltReason::Stopped);

    let restored = start_as(Runner::halted, halt_then_out().into_iter().skip(1));
    let request = Request::consumer(0).unwrap();
    restored.set.request(VcpuId(0), request).unwrap();
    restored.expect("asked");
    let pause = restored.set.pause().unwrap();
    assert!(is_halted(&pause), "and it can be saved again");
    pause.resume();
    assert_eq!(restored.told.try_recv().ok(), None);
    restored.events.store(1, Ordering::Relaxed);
    restored.waker.wake();
    restored.expect("ran");
    assert_eq!(restored.thread.join().unwrap(), HaltReason::Handler(1));
}

#[test]
fn a_vcpu_that_is_not_halted_or_that_was_woken_is_not_said_to_be_halted() {
    let running = start(HaltPolling::OFF, [Step::pio_out(1, 1, &[1])]);
    running.expect("ran");
    assert!(!is_halted(&running.set.pause().unwrap()));
    running.set.stop().unwrap();

    let woken = start(HaltPolling::OFF, halt_then_out());
    woken.expect("halted");
    let pause = woken.set.pause().unwrap();
    assert!(is_halted(&pause));
    woken.waker.wake();
    assert!(!is_halted(&pause), "no state would hold the wake-up");
    woken.set.stop().unwrap();
}

#[test]
fn a_wake_up_before_a_restored_vcpus_thread_starts_ends_its_halt() {
    let woken = |runner: Runner<_>| {
        runner.waker().wake();
        runner.halted()
    };
    let vcpu = start_as(woken, halt_then_out().into_iter().skip(1));
    vcpu.expect("not yet");
    vcpu.events.store(1, Ordering::Relaxed);
    vcpu.waker.wake();
    vcpu.expect("ran");
    assert_eq!(vcpu.thread.join().unwrap(), HaltReason::Handler(2));
}

#[test]
fn a_vcpu_that_is_stopped_in_its_halt_can_be_enrolled_again_halted() {
    let set = VcpuSet::new(Identity::vm("test"));
    let runner = set.enroll(FakeVcpu::new(VcpuId(0), [])).unwrap();
    set.begin_stop();
    let block = |_: &VcpuView<'_, ()>, _: Exit<'_>| Flow::<()>::Block;
    let Err(halt) = runner.halted().run(block);
    assert!(halt.halted);

    let set = VcpuSet::new(Identity::vm("test"));
    let runner = set.enroll(halt.vcpu).unwrap();
    set.begin_stop();
    let Err(halt) = runner.run(block);
    assert!(!halt.halted, "it was not said to be");
}

#[test]
fn a_spawned_vcpu_is_woken_through_its_set_while_it_is_enrolled() {
    let set = VcpuSet::new(Identity::vm("test"));
    let no_such = Some(ControlError::NoSuchVcpu(VcpuId(0)));
    assert_eq!(set.waker(VcpuId(0)).err(), no_such);
    let (told, halted) = mpsc::channel();
    let script = [Step::hlt(), Step::pio_out(1, 1, &[1])];
    let handler = move |_: &VcpuView<'_, ()>, exit: Exit<'_>| match exit {
        Exit::Hlt => {
            told.send(()).unwrap();
            Flow::Block
        }
        _ => Flow::Stop("ran"),
    };
    let vcpu = FakeVcpu::new(VcpuId(0), script);
    let thread = set.spawn("vcpu", vcpu, handler).unwrap();
    halted.recv_timeout(Duration::from_secs(60)).unwrap();
    let waker = set.waker(VcpuId(0)).unwrap();
    waker.wake();
    assert_eq!(thread.join().unwrap().reason, HaltReason::Handler("ran"));
    assert_eq!(set.waker(VcpuId(0)).err(), no_such);
    waker.wake();
}
