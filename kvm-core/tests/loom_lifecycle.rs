// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lifecycle under loom: every interleaving of a few preemptions (the first argument of `model`),
//! and every stale value that the orderings allow. A lost kick or request leaves a vCPU in the guest for ever, which loom reports as a deadlock.
//!
//! The vCPU is the scripted one, whose `KVM_RUN` behaves as the kernel's at its worst: a signal that
//! arrives before it is taken in user space and gone, `immediate_exit` is a relaxed read, and then
//! only a signal ends it.
#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::convert::Infallible;
use std::sync::Arc;

use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{
    ControlError, Doorbell, Exit, ExitHandler, Flow, HaltReason, Identity, Request, Requests,
    RunVcpu, Runner, VcpuId, VcpuSet, VcpuView,
};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.check(test);
}

fn carry_on(_: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<Infallible> {
    Flow::Continue
}

fn enrolled(script: impl IntoIterator<Item = Step>) -> (VcpuSet, Runner<FakeVcpu>) {
    let set = VcpuSet::new(Identity::vm("loom"));
    let runner = set.enroll(FakeVcpu::new(VcpuId(0), script)).unwrap();
    (set, runner)
}

fn run_until_stopped(runner: Runner<FakeVcpu>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let Err(halt) = runner.run(carry_on);
        assert_eq!(halt.reason, HaltReason::Stopped);
    })
}

/// Ends when it is asked, and checks that what the asker wrote before is there.
struct UntilAsked(Arc<AtomicU32>);

impl ExitHandler<()> for UntilAsked {
    type Stop = u32;

    fn exit(&mut self, _: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<u32> {
        Flow::Continue
    }

    fn requests(&mut self, _: &VcpuView<'_, ()>, requests: Requests) -> Flow<u32> {
        assert!(requests.contains(Request::consumer(0).unwrap()));
        Flow::Stop(self.0.load(Ordering::Relaxed))
    }
}

#[test]
fn a_request_is_served_with_what_was_written_before_it() {
    model(4, || {
        let (set, runner) = enrolled([]);
        let written = Arc::new(AtomicU32::new(0));
        let handler = UntilAsked(written.clone());
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(handler);
            assert_eq!(halt.reason, HaltReason::Handler(7));
        });
        written.store(7, Ordering::Relaxed);
        set.request_all(Request::consumer(0).unwrap());
        vcpu.join().unwrap();
    });
}

#[test]
fn a_stop_reaches_a_vcpu_wherever_it_is() {
    model(4, || {
        let (set, runner) = enrolled([Step::hlt()]);
        let vcpu = run_until_stopped(runner);
        set.stop().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn two_kickers_at_once_lose_neither_request() {
    model(3, || {
        let (set, runner) = enrolled([]);
        let vcpu = run_until_stopped(runner);
        let other = set.clone();
        let kicker = thread::spawn(move || other.kick(VcpuId(0)).is_ok());
        set.begin_stop();
        kicker.join().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_pause_ends_with_no_vcpu_active_and_a_resume_lets_it_go_on() {
    model(3, || {
        let (set, runner) = enrolled([]);
        let vcpu = run_until_stopped(runner);
        let pause = set.pause().unwrap();
        assert_eq!(set.active(), 0);
        drop(pause);
        set.stop().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_vcpu_that_dies_leaves_no_pause_waiting() {
    model(3, || {
        let (set, runner) = enrolled([Step::Errno(5)]);
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(carry_on);
            assert!(matches!(
                halt.reason,
                HaltReason::RunFailed(_) | HaltReason::Stopped
            ));
        });
        set.pause().unwrap().resume();
        set.wait().unwrap();
        // Whoever had not begun by then halts by itself.
        vcpu.join().unwrap();
    });
}

#[test]
fn who_waits_for_a_request_finds_it_served_or_the_vcpu_outside() {
    model(2, || {
        let (set, runner) = enrolled([]);
        let vcpu = run_until_stopped(runner);
        set.request_all_and_wait(Request::consumer(0).unwrap())
            .unwrap();
        set.begin_stop();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_stop_reaches_a_vcpu_that_is_parked() {
    model(3, || {
        let (set, runner) = enrolled([]);
        let vcpu = run_until_stopped(runner);
        let pause = set.begin_pause();
        set.stop().unwrap();
        vcpu.join().unwrap();
        drop(pause);
    });
}

#[test]
fn a_task_for_a_paused_vcpu_is_done_before_it_goes_on() {
    model(3, || {
        let (set, runner) = enrolled([]);
        let vcpu = run_until_stopped(runner);
        // Not waited for: the vCPU may be anywhere, and may not have begun.
        let pause = set.begin_pause();
        let done = Arc::new(AtomicU32::new(0));
        let by_vcpu = done.clone();
        let answer = pause.with_vcpu(VcpuId(0), move |_: &VcpuView<'_, ()>| {
            by_vcpu.store(7, Ordering::Relaxed);
            5
        });
        match answer {
            Ok(answer) => assert_eq!((answer, done.load(Ordering::Relaxed)), (5, 7)),
            Err(error) => assert_eq!(error, ControlError::NotStarted(VcpuId(0))),
        }
        drop(pause);
        set.stop().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn a_task_for_a_vcpu_that_leaves_is_done_or_refused_and_nobody_waits() {
    model(3, || {
        let (set, runner) = enrolled([Step::Errno(5)]);
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(carry_on);
            assert!(matches!(
                halt.reason,
                HaltReason::RunFailed(_) | HaltReason::Stopped
            ));
        });
        let pause = set.begin_pause();
        match pause.with_vcpu(VcpuId(0), |_: &VcpuView<'_, ()>| 5) {
            Ok(answer) => assert_eq!(answer, 5),
            Err(error) => assert!(matches!(
                error,
                ControlError::NotStarted(_) | ControlError::Left(_) | ControlError::NoSuchVcpu(_)
            )),
        }
        drop(pause);
        vcpu.join().unwrap();
    });
}

#[test]
fn a_task_and_a_stop_at_once_leave_nobody_waiting() {
    model(2, || {
        let (set, runner) = enrolled([]);
        let vcpu = run_until_stopped(runner);
        let pause = set.begin_pause();
        let other = set.clone();
        let stopper = thread::spawn(move || other.begin_stop());
        let _ = pause.with_vcpu(VcpuId(0), |_: &VcpuView<'_, ()>| 5);
        stopper.join().unwrap();
        drop(pause);
        vcpu.join().unwrap();
    });
}

/// What a test may see of a vCPU: whether it is in `KVM_RUN`, and the requests that it has served.
#[derive(Default)]
struct Seen {
    running: bool,
    served: Requests,
}

/// The scripted vCPU, with a look at whether it is in `KVM_RUN`.
struct Watched(FakeVcpu, Arc<Mutex<Seen>>);

impl RunVcpu for Watched {
    type Fd = ();

    fn id(&self) -> VcpuId {
        self.0.id()
    }

    fn doorbell(&self) -> Arc<dyn Doorbell> {
        self.0.doorbell()
    }

    fn attach(&mut self) -> Result<(), vmm_sys_util::errno::Error> {
        self.0.attach()
    }

    fn run(&mut self) -> Result<(), vmm_sys_util::errno::Error> {
        self.1.lock().unwrap().running = true;
        let result = self.0.run();
        self.1.lock().unwrap().running = false;
        result
    }

    fn exit_area(&mut self) -> (&mut [u8], &()) {
        self.0.exit_area()
    }

    fn kvmclock_ctrl(&mut self) -> Result<(), vmm_sys_util::errno::Error> {
        self.0.kvmclock_ctrl()
    }
}

/// Notes what it served.
struct Notes(Arc<Mutex<Seen>>);

impl ExitHandler<()> for Notes {
    type Stop = Infallible;

    fn exit(&mut self, _: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<Infallible> {
        Flow::Continue
    }

    fn requests(&mut self, _: &VcpuView<'_, ()>, requests: Requests) -> Flow<Infallible> {
        let mut seen = self.0.lock().unwrap();
        seen.served = requests.iter().fold(seen.served, Requests::with);
        Flow::Continue
    }
}

#[test]
fn one_waiter_does_not_take_the_acknowledgement_of_another_for_its_own() {
    model(2, || {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let set = VcpuSet::new(Identity::vm("loom"));
        let vcpu = Watched(FakeVcpu::new(VcpuId(0), []), seen.clone());
        let runner = set.enroll(vcpu).unwrap();
        let handler = Notes(seen.clone());
        let vcpu = thread::spawn(move || {
            let Err(halt) = runner.run(handler);
            assert_eq!(halt.reason, HaltReason::Stopped);
        });
        let other = set.clone();
        let waiter = thread::spawn(move || {
            let request = Request::consumer(1).unwrap();
            other.request_all_and_wait(request).unwrap();
        });
        let request = Request::consumer(0).unwrap();
        set.request_all_and_wait(request).unwrap();
        {
            let seen = seen.lock().unwrap();
            assert!(!seen.running || seen.served.contains(request));
        }
        waiter.join().unwrap();
        set.begin_stop();
        vcpu.join().unwrap();
    });
}
