// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lifecycle, on vCPUs without KVM: nothing hangs, whatever fails; nothing runs that is paused;
//! no request is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/watchdog.rs"]
mod watchdog;

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{
    ControlError, Errno, Exit, ExitHandler, Flow, GuestMode, HaltReason, Identity, Request,
    Requests, VcpuId, VcpuSet, VcpuView,
};
use watchdog::within;

/// Fails a test that hangs, instead of hanging with it.
fn watchdog<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    within(Duration::from_secs(120), test)
}

fn set() -> VcpuSet {
    VcpuSet::new(Identity::vm("test"))
}

fn running(id: u32) -> FakeVcpu {
    FakeVcpu::new(VcpuId(id), [])
}

fn ignore(_: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<Infallible> {
    Flow::Continue
}

const CYCLES: usize = 2_000;

#[test]
fn thousands_of_pauses_find_no_vcpu_active_and_stop_ends_them_all() {
    watchdog(|| {
        let set = set();
        let threads: Vec<_> = (0..8)
            .map(|id| set.spawn("vcpu", running(id), ignore).unwrap())
            .collect();
        for cycle in 0..CYCLES {
            // Some pauses meet vCPUs in the guest, others meet them on their way.
            let in_guest = |id| set.mode(VcpuId(id)) == Ok(GuestMode::InGuestMode);
            while cycle % 2 == 0 && !(0..8).all(in_guest) {
                thread::yield_now();
            }
            let pause = set.pause().unwrap();
            assert_eq!(set.active(), 0);
            pause.resume();
        }
        set.stop().unwrap();
        for thread in threads {
            assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        }
        assert!(set.ids().is_empty());
    });
}

#[test]
fn no_vcpu_handles_an_exit_while_a_pause_holds() {
    watchdog(|| {
        let set = set();
        let paused = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for id in 0..4 {
            let paused = paused.clone();
            let script = vec![Step::pio_out(1, 1, &[0]); 20_000];
            let handler = move |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<Infallible> {
                assert!(!paused.load(Ordering::SeqCst));
                Flow::Continue
            };
            let vcpu = FakeVcpu::new(VcpuId(id), script);
            threads.push(set.spawn("vcpu", vcpu, handler).unwrap());
        }
        for _ in 0..200 {
            let pause = set.pause().unwrap();
            paused.store(true, Ordering::SeqCst);
            thread::yield_now();
            paused.store(false, Ordering::SeqCst);
            drop(pause);
        }
        set.stop().unwrap();
        // A handler's assertion fails on its own thread.
        for thread in threads {
            assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        }
    });
}

#[test]
fn a_pause_that_a_handler_keeps_waiting_is_given_up_and_the_others_run_on() {
    watchdog(|| {
        let set = set();
        let (leave, left) = mpsc::channel::<()>();
        let (at_work, begun) = mpsc::channel();
        let stuck = move |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<Infallible> {
            at_work.send(()).unwrap();
            let _ = left.recv();
            Flow::Continue
        };
        let vcpu = FakeVcpu::new(VcpuId(0), [Step::pio_out(1, 1, &[0])]);
        let stuck = set.spawn("stuck", vcpu, stuck).unwrap();
        let other = set.spawn("other", running(1), ignore).unwrap();
        begun.recv().unwrap();
        assert!(set.pause_within(Duration::ZERO).unwrap().is_none());
        assert!(
            set.pause_within(Duration::from_millis(20))
                .unwrap()
                .is_none()
        );
        // Nothing holds.
        while set.mode(VcpuId(1)) != Ok(GuestMode::InGuestMode) {
            thread::yield_now();
        }
        leave.send(()).unwrap();
        let pause = set.pause_within(Duration::from_secs(100)).unwrap();
        assert!(pause.is_some());
        assert_eq!(set.active(), 0);
        drop(pause);
        set.stop().unwrap();
        assert_eq!(stuck.join().unwrap().reason, HaltReason::Stopped);
        assert_eq!(other.join().unwrap().reason, HaltReason::Stopped);
    });
}

#[test]
fn pauses_nest_and_the_last_one_lets_go() {
    watchdog(|| {
        let set = set();
        let vcpu = running(0);
        let state = vcpu.state();
        set.spawn("vcpu", vcpu, ignore).unwrap();
        let first = set.pause().unwrap();
        let second = set.pause().unwrap();
        let guest = state.log().guest;
        drop(first);
        // Still paused: a request is not served.
        set.request_all_and_wait(Request::consumer(0).unwrap())
            .unwrap();
        assert_eq!((set.active(), state.log().guest), (0, guest));
        drop(second);
        set.stop().unwrap();
    });
}

#[test]
fn a_stop_ends_vcpus_that_a_pause_holds() {
    watchdog(|| {
        let set = set();
        let threads: Vec<_> = (0..3)
            .map(|id| set.spawn("vcpu", running(id), ignore).unwrap())
            .collect();
        let pause = set.pause().unwrap();
        set.stop().unwrap();
        for thread in threads {
            assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        }
        drop(pause);
    });
}

#[test]
fn vcpus_enrolled_in_a_paused_set_park_first() {
    watchdog(|| {
        let set = set();
        let pause = set.pause().unwrap();
        let vcpu = running(0);
        let state = vcpu.state();
        let thread = set.spawn("vcpu", vcpu, ignore).unwrap();
        // It neither runs nor keeps another pause waiting.
        set.pause().unwrap().resume();
        assert_eq!(state.log().runs, 0);
        drop(pause);
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    });
}

#[test]
fn a_vcpu_that_is_enrolled_but_never_run_keeps_nobody_waiting() {
    watchdog(|| {
        let set = set();
        let never_run = set.enroll(running(0)).unwrap();
        let thread = set.spawn("vcpu", running(1), ignore).unwrap();
        set.request_all_and_wait(Request::consumer(1).unwrap())
            .unwrap();
        set.pause().unwrap().resume();
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        assert_eq!(set.ids(), [VcpuId(0)]);
        drop(never_run);
        assert!(set.ids().is_empty());
    });
}

#[test]
fn a_vcpu_enrolled_after_the_stop_halts_at_once() {
    watchdog(|| {
        let set = set();
        set.stop().unwrap();
        let Err(halt) = set.enroll(running(0)).unwrap().run(ignore);
        assert_eq!(halt.reason, HaltReason::Stopped);
        assert_eq!(halt.vcpu.state().log().runs, 0);
    });
}

#[test]
fn a_pause_completes_the_pending_access_and_tells_the_clock() {
    watchdog(|| {
        for step in [Step::pio_in(0x60, 1, 1), Step::mmio_read(0xd000_0000, 4)] {
            let set = set();
            // The handler begins a pause while its access is pending; a fragment follows.
            let vcpu = FakeVcpu::new(VcpuId(0), [step]);
            let state = vcpu.state();
            let (hold, held) = mpsc::channel();
            let begin = set.clone();
            let handler = move |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<Infallible> {
                hold.send(begin.begin_pause()).unwrap();
                Flow::Continue
            };
            set.spawn("vcpu", vcpu, handler).unwrap();
            let pause = held.recv().unwrap();
            let both = set.pause().unwrap();
            let log = state.log();
            assert_eq!(
                (log.completed, log.clock, log.runs, log.guest),
                (1, 1, 2, 0)
            );
            drop((pause, both));
            set.stop().unwrap();
        }
    });
}

#[test]
fn any_errno_at_any_ioctl_ends_the_vcpu_alone_and_hangs_nobody() {
    watchdog(|| {
        for errno in 1..=133 {
            for at in 0..3 {
                let set = set();
                let mut script = vec![Step::pio_out(1, 1, &[0]); at];
                script.push(Step::Errno(errno));
                let vcpu = FakeVcpu::new(VcpuId(0), script);
                let state = vcpu.state();
                let broken = set.spawn("broken", vcpu, ignore).unwrap();
                set.spawn("sound", running(1), ignore).unwrap();
                set.pause().unwrap().resume();
                if matches!(errno, 4 | 11) {
                    // EINTR, or one EAGAIN: it goes round, and runs the guest.
                    while state.log().guest == 0 && !broken.is_finished() {
                        thread::yield_now();
                    }
                    set.pause().unwrap().resume();
                    assert_eq!(set.ids().len(), 2);
                    set.stop().unwrap();
                    assert_eq!(broken.join().unwrap().reason, HaltReason::Stopped);
                } else {
                    let reason = broken.join().unwrap().reason;
                    match (errno, &reason) {
                        // EFAULT and EHWPOISON: guest memory that the host cannot give.
                        (14 | 133, HaltReason::MemoryError(_)) => {}
                        _ => assert_eq!(reason, HaltReason::RunFailed(Errno::new(errno))),
                    }
                    assert_eq!(set.ids(), [VcpuId(1)]);
                    set.pause().unwrap().resume();
                    set.stop().unwrap();
                }
            }
            // Before the first KVM_RUN.
            let set = set();
            let broken = set
                .spawn("broken", running(0).attach_fails(errno), ignore)
                .unwrap();
            set.pause().unwrap().resume();
            assert_eq!(
                broken.join().unwrap().reason,
                HaltReason::StartFailed(Errno::new(errno))
            );
            // KVM_KVMCLOCK_CTRL fails: the vCPU pauses and runs on all the same.
            let sound = running(1).kvmclock_ctrl_fails(errno);
            let state = sound.state();
            set.spawn("sound", sound, ignore).unwrap();
            while state.log().clock < 2 {
                set.pause().unwrap().resume();
                assert_eq!(set.ids(), [VcpuId(1)]);
            }
            set.stop().unwrap();
        }
    });
}

#[test]
fn a_kvm_that_never_runs_the_vcpu_is_told_and_an_ap_that_is_woken_is_not_one() {
    let run = |vcpu: FakeVcpu| {
        let runner = set().enroll(vcpu).unwrap();
        let Err(halt) = runner.run(|_: &VcpuView<'_, ()>, exit: Exit<'_>| match exit {
            Exit::Hlt => Flow::Stop(()),
            _ => Flow::Continue,
        });
        (halt.reason, halt.vcpu.steps_left())
    };
    let again = |times: usize| vec![Step::Errno(11); times];
    let with = |steps: Vec<Step>| FakeVcpu::new(VcpuId(0), steps);
    // No worker thread for KVM: EAGAIN for ever, which is found soon.
    let (reason, left) = run(with(again(10_000)));
    assert_eq!(reason, HaltReason::Refused);
    assert!(left > 9_900, "{left}");
    let text = reason.to_string();
    for needle in ["KVM_RUN", "ulimit -u", "pids.max"] {
        assert!(text.contains(needle), "{text}");
    }
    // A shortage that ends; and one that comes again after KVM has run.
    let short = [again(10), vec![Step::pio_out(1, 1, &[0])]].concat();
    let steps = [&*short, &short, &[Step::hlt()]].concat();
    assert_eq!(run(with(steps)), (HaltReason::Handler(()), 0));
    // A signal gets through only where KVM has its thread.
    let short = [again(10), vec![Step::Errno(4)]].concat();
    let steps = [&*short, &short, &[Step::hlt()]].concat();
    assert_eq!(run(with(steps)), (HaltReason::Handler(()), 0));
    // An AP with an NMI pending: a wake at each entry until INIT, none after it.
    let steps = [again(10_000), vec![Step::hlt()]].concat();
    let ap = with(steps).waits_for_init(10_000);
    assert_eq!(run(ap), (HaltReason::Handler(()), 0));
}

#[test]
fn a_handler_that_panics_takes_its_vcpu_out_of_the_set() {
    watchdog(|| {
        let set = set();
        let vcpu = FakeVcpu::new(VcpuId(0), [Step::hlt()]);
        let handler =
            |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<Infallible> { panic!("as asked") };
        let thread = set.spawn("vcpu", vcpu, handler).unwrap();
        set.spawn("other", running(1), ignore).unwrap();
        set.pause().unwrap().resume();
        assert!(thread.join().is_err());
        set.pause().unwrap().resume();
        assert_eq!(set.ids(), [VcpuId(1)]);
        set.stop().unwrap();
    });
}

#[test]
fn fatal_exits_halt_with_their_reason_and_the_handler_never_sees_them() {
    let fatal = [
        (Step::shutdown(), "the guest shut down (triple fault)"),
        (Step::exit(17), "KVM internal error 0: of an unknown kind"),
        (
            Step::exit(9),
            "the hardware refused to enter the guest: reason 0x0 on physical CPU 0",
        ),
        (
            Step::exit(0),
            "KVM does not know the hardware's exit reason 0x0",
        ),
        (Step::pio_out(0x10, 3, &[0; 3]), "an exit that cannot be"),
        (Step::mmio_read(0x10, 9), "an exit that cannot be"),
    ];
    for (step, text) in fatal {
        let runner = set().enroll(FakeVcpu::new(VcpuId(0), [step])).unwrap();
        let Err(halt) = runner.run(|_: &VcpuView<'_, ()>, exit: Exit<'_>| -> Flow<()> {
            panic!("the handler saw {exit:?}")
        });
        assert!(halt.reason.to_string().starts_with(text), "{}", halt.reason);
    }
}

#[test]
fn a_halted_vcpu_comes_back_whole_and_can_be_enrolled_again() {
    let set = set();
    let vcpu = FakeVcpu::new(VcpuId(7), [Step::hlt(), Step::shutdown()]);
    let Err(halt) = set
        .enroll(vcpu)
        .unwrap()
        .run(|vcpu: &VcpuView<'_, ()>, _: Exit<'_>| Flow::Stop(vcpu.id()));
    assert_eq!(halt.reason, HaltReason::Handler(VcpuId(7)));
    let Err(halt) = set.enroll(halt.vcpu).unwrap().run(ignore);
    assert_eq!(halt.reason, HaltReason::Shutdown);
}

/// Counts requests served by each vCPU, and checks that what was written before is seen.
struct Served {
    count: Arc<AtomicUsize>,
    expected: Arc<AtomicUsize>,
}

impl<F: ?Sized> ExitHandler<F> for Served {
    type Stop = usize;

    fn exit(&mut self, _: &VcpuView<'_, F>, _: Exit<'_>) -> Flow<usize> {
        Flow::Continue
    }

    fn requests(&mut self, _: &VcpuView<'_, F>, requests: Requests) -> Flow<usize> {
        if requests.contains(Request::consumer(3).unwrap()) {
            self.count
                .store(self.expected.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        if requests.contains(Request::consumer(4).unwrap()) {
            return Flow::Stop(self.count.load(Ordering::Relaxed));
        }
        Flow::Continue
    }
}

#[test]
fn after_request_all_and_wait_every_running_vcpu_has_served_it() {
    watchdog(|| {
        let set = set();
        let expected = Arc::new(AtomicUsize::new(0));
        let mut counts = Vec::new();
        let mut threads = Vec::new();
        for id in 0..4 {
            let count = Arc::new(AtomicUsize::new(0));
            let vcpu = running(id);
            counts.push((vcpu.state(), count.clone()));
            let served = Served {
                count,
                expected: expected.clone(),
            };
            threads.push(set.spawn("vcpu", vcpu, served).unwrap());
        }
        for round in 1..=CYCLES {
            expected.store(round, Ordering::Relaxed);
            set.request_all_and_wait(Request::consumer(3).unwrap())
                .unwrap();
            for (state, count) in &counts {
                // Looked at first: one that enters later has served it by then.
                let in_guest = state.is_in_guest();
                assert!(count.load(Ordering::Relaxed) == round || !in_guest);
            }
        }
        set.request_all(Request::consumer(4).unwrap());
        for thread in threads {
            assert_eq!(thread.join().unwrap().reason, HaltReason::Handler(CYCLES));
        }
    });
}

#[test]
fn a_kick_costs_a_signal_only_in_the_guest() {
    watchdog(|| {
        let set = set();
        let vcpu = running(0);
        let state = vcpu.state();
        set.spawn("vcpu", vcpu, ignore).unwrap();
        let pause = set.pause().unwrap();
        let rings = state.log().rings;
        for _ in 0..100 {
            set.kick(VcpuId(0)).unwrap();
        }
        assert_eq!(state.log().rings, rings);
        assert_eq!(
            set.kick(VcpuId(9)),
            Err(ControlError::NoSuchVcpu(VcpuId(9)))
        );
        drop(pause);
        set.stop().unwrap();
    });
}

#[test]
fn a_handler_that_runs_another_vms_vcpu_cannot_wait_for_its_own_vm_before_or_after() {
    watchdog(|| {
        let (outer, inner) = (set(), set());
        let own = outer.clone();
        let vcpu = FakeVcpu::new(VcpuId(0), [Step::hlt()]);
        let runner = outer.enroll(vcpu).unwrap();
        let mut refused = Vec::new();
        let halt = runner.run(|_: &VcpuView<'_, ()>, _: Exit<'_>| {
            let vcpu = FakeVcpu::new(VcpuId(0), [Step::hlt()]);
            let runner = inner.enroll(vcpu).unwrap();
            let halt = runner.run(|_: &VcpuView<'_, ()>, _: Exit<'_>| {
                refused.push(own.pause().err());
                Flow::Stop(inner.pause().err())
            });
            let Err(halt) = halt;
            let reason = HaltReason::Handler(Some(ControlError::OnVcpuThread));
            assert_eq!(halt.reason, reason);
            drop(halt);
            refused.push(own.pause().err());
            Flow::Stop(inner.pause().err())
        });
        let Err(halt) = halt;
        assert_eq!(halt.reason, HaltReason::Handler(None));
        assert_eq!(refused, [Some(ControlError::OnVcpuThread); 2]);
        assert!(outer.pause().is_ok());
    });
}

#[test]
fn a_vcpu_thread_cannot_wait_for_itself() {
    watchdog(|| {
        let set = set();
        let own = set.clone();
        let other = VcpuSet::new(Identity::vm("other"));
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), [Step::hlt()])).unwrap();
        let Err(halt) = runner.run(move |_: &VcpuView<'_, ()>, _: Exit<'_>| {
            let refused = [
                own.pause().map(drop),
                own.stop(),
                own.wait(),
                own.request_all_and_wait(Request::consumer(0).unwrap()),
            ];
            assert_eq!(refused, [Err(ControlError::OnVcpuThread); 4]);
            // Another VM's vCPUs, and the forms that do not wait, are fine.
            other.pause().unwrap().resume();
            own.begin_pause().resume();
            own.begin_stop();
            Flow::<Infallible>::Continue
        });
        assert_eq!(halt.reason, HaltReason::Stopped);
        // And it is free again once it has halted.
        set.stop().unwrap();
    });
}

#[test]
fn one_number_is_enrolled_once() {
    let set = set();
    let first = set.enroll(running(3)).unwrap();
    assert_eq!(first.id(), VcpuId(3));
    let second = set.enroll(running(3)).err();
    assert_eq!(second, Some(ControlError::AlreadyEnrolled(VcpuId(3))));
    drop(first);
    assert!(set.enroll(running(3)).is_ok());
}

#[test]
fn pausing_resuming_kicking_and_stopping_from_many_threads_at_once_ends() {
    watchdog(|| {
        for _ in 0..20 {
            let set = set();
            let vcpus: Vec<_> = (0..6)
                .map(|id| set.spawn("vcpu", running(id), ignore).unwrap())
                .collect();
            let controllers: Vec<_> = (0..4)
                .map(|n| {
                    let set = set.clone();
                    thread::spawn(move || {
                        for i in 0..100 {
                            match (n + i) % 4 {
                                0 => set.pause().unwrap().resume(),
                                1 => drop(set.kick(VcpuId(i % 6))),
                                2 => {
                                    let request = Request::consumer(i as u8 % 56).unwrap();
                                    set.request_all_and_wait(request).unwrap();
                                }
                                _ => set.begin_pause().resume(),
                            }
                        }
                    })
                })
                .collect();
            for controller in controllers {
                controller.join().unwrap();
            }
            set.stop().unwrap();
            for vcpu in vcpus {
                assert_eq!(vcpu.join().unwrap().reason, HaltReason::Stopped);
            }
        }
    });
}
