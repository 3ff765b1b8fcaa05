// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the control plane asks of a paused vCPU is done by the vCPU's thread, and whoever asks is never
//! left waiting.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/watchdog.rs"]
mod watchdog;

use std::convert::Infallible;
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread::{self, ThreadId};
use std::time::Duration;

use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{
    BusError, BusErrorCode, ControlError, During, Exit, ExitHandler, Flow, GuestMode, HaltReason,
    HostAddress, Identity, MemoryError, MemoryErrorSource, Pause, Remedy, VcpuId, VcpuSet,
    VcpuView,
};
use watchdog::within;

type View<'a> = VcpuView<'a, ()>;

/// Fails a test that hangs, instead of hanging with it.
fn watchdog<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    within(Duration::from_secs(120), test)
}

fn set() -> VcpuSet {
    VcpuSet::new(Identity::vm("test"))
}

fn ignore(_: &View<'_>, _: Exit<'_>) -> Flow<Infallible> {
    Flow::Continue
}

/// `count` vCPUs that are in the guest, and their threads.
fn running(set: &VcpuSet, count: u32) -> Vec<thread::JoinHandle<HaltReason<Infallible>>> {
    let threads = (0..count).map(|id| {
        let runner = set.enroll(FakeVcpu::new(VcpuId(id), [])).unwrap();
        thread::spawn(move || {
            let Err(halt) = runner.run(ignore);
            halt.reason
        })
    });
    let threads = threads.collect();
    while (0..count).any(|id| set.mode(VcpuId(id)) != Ok(GuestMode::InGuestMode)) {
        thread::yield_now();
    }
    threads
}

fn number(pause: &Pause, id: u32) -> Result<u32, ControlError> {
    pause.with_vcpu(VcpuId(id), |vcpu: &View<'_>| vcpu.id().0)
}

#[test]
fn a_task_is_done_on_the_vcpus_own_thread_while_it_is_paused() {
    watchdog(|| {
        let set = set();
        let threads = running(&set, 3);
        let pause = set.pause().unwrap();
        let whose = |id| {
            let whose = |_: &View<'_>| thread::current().id();
            pause.with_vcpu(VcpuId(id), whose).unwrap()
        };
        let own: Vec<ThreadId> = (0..3).map(whose).collect();
        let expected: Vec<_> = threads.iter().map(|t| t.thread().id()).collect();
        assert_eq!(own, expected);
        assert_eq!(set.active(), 0);
        // Again and again, and of all at once.
        assert_eq!(
            (0..100).map(|n| number(&pause, n % 3).unwrap()).max(),
            Some(2)
        );
        let each = pause.with_each(|vcpu: &View<'_>| vcpu.id().0 * 2).unwrap();
        assert_eq!(each, [(VcpuId(0), 0), (VcpuId(1), 2), (VcpuId(2), 4)]);
        drop(pause);
        set.stop().unwrap();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), HaltReason::Stopped);
        }
    });
}

#[test]
fn all_vcpus_do_their_tasks_at_the_same_time() {
    watchdog(|| {
        let set = set();
        let threads = running(&set, 4);
        let pause = set.pause().unwrap();
        // Each waits for the others: one after the other would never end.
        let all = Arc::new(Barrier::new(4));
        let each = move |_: &View<'_>| all.wait().is_leader();
        let leaders = pause.with_each(each).unwrap();
        assert_eq!(leaders.iter().filter(|leader| leader.1).count(), 1);
        drop(pause);
        set.stop().unwrap();
        threads
            .into_iter()
            .for_each(|thread| drop(thread.join().unwrap()));
    });
}

#[test]
fn a_vcpu_that_starts_while_a_pause_holds_does_tasks_too() {
    watchdog(|| {
        let set = set();
        let pause = set.pause().unwrap();
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), [])).unwrap();
        assert_eq!(number(&pause, 0), Err(ControlError::NotStarted(VcpuId(0))));
        assert!(!pause.wait_started(Duration::from_millis(1)));
        let thread = thread::spawn(move || {
            let Err(halt) = runner.run(ignore);
            halt.reason
        });
        assert!(pause.wait_started(Duration::from_secs(60)));
        assert_eq!(number(&pause, 0), Ok(0));
        assert_eq!(set.active(), 0);
        drop(pause);
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap(), HaltReason::Stopped);
    });
}

#[test]
fn one_vcpu_that_cannot_be_asked_means_that_none_is() {
    watchdog(|| {
        let set = set();
        let threads = running(&set, 2);
        let idle = set.enroll(FakeVcpu::new(VcpuId(7), [])).unwrap();
        let pause = set.pause().unwrap();
        let calls = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let counted = calls.clone();
        let count = move |_: &View<'_>| {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        };
        let error = pause.with_each(count).unwrap_err();
        assert_eq!(error, ControlError::NotStarted(VcpuId(7)));
        assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 0);
        drop(idle);
        assert_eq!(pause.with_each(|_: &View<'_>| ()).unwrap().len(), 2);
        let text = pause.with_vcpu(VcpuId(0), |vcpu: &VcpuView<'_, String>| vcpu.fd().len());
        assert_eq!(text, Err(ControlError::OtherFd(VcpuId(0))));
        assert_eq!(number(&pause, 9), Err(ControlError::NoSuchVcpu(VcpuId(9))));
        drop(pause);
        set.stop().unwrap();
        threads
            .into_iter()
            .for_each(|thread| drop(thread.join().unwrap()));
    });
}

#[test]
fn a_vcpu_thread_does_not_wait_for_its_own_set() {
    watchdog(|| {
        let set = set();
        let own = set.clone();
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), [Step::hlt()])).unwrap();
        let Err(halt) = runner.run(move |_: &View<'_>, _: Exit<'_>| {
            let pause = own.begin_pause();
            let refused = number(&pause, 0);
            let each = pause.with_each(|_: &View<'_>| ()).map(drop);
            Flow::Stop((refused, each))
        });
        let refused = ControlError::OnVcpuThread;
        assert_eq!(
            halt.reason,
            HaltReason::Handler((Err(refused), Err(refused)))
        );
        // Nor does a task.
        let threads = running(&set, 1);
        let pause = Arc::new(set.pause().unwrap());
        let within = pause.clone();
        let nested = pause.with_vcpu(VcpuId(0), move |_: &View<'_>| number(&within, 0));
        assert_eq!(nested, Ok(Err(refused)));
        drop(pause);
        set.stop().unwrap();
        threads
            .into_iter()
            .for_each(|thread| drop(thread.join().unwrap()));
    });
}

#[test]
fn who_asks_a_vcpu_that_is_stopped_meanwhile_is_told() {
    watchdog(|| {
        for _ in 0..200 {
            let set = set();
            let threads = running(&set, 2);
            let pause = set.pause().unwrap();
            set.begin_stop();
            for id in [0, 1] {
                let vcpu = VcpuId(id);
                let left = [ControlError::Left(vcpu), ControlError::NoSuchVcpu(vcpu)];
                let answer = number(&pause, id);
                assert!(answer == Ok(id) || answer.is_err_and(|e| left.contains(&e)));
            }
            for thread in threads {
                assert_eq!(thread.join().unwrap(), HaltReason::Stopped);
            }
            assert_eq!(number(&pause, 0), Err(ControlError::NoSuchVcpu(VcpuId(0))));
        }
    });
}

#[test]
fn a_handler_that_ends_its_vcpu_or_panics_leaves_nobody_waiting_for_a_task() {
    watchdog(|| {
        for panics in [false, true] {
            let set = set();
            let (inside, entered) = mpsc::channel();
            let (go_on, wait) = mpsc::channel::<()>();
            let runner = set.enroll(FakeVcpu::new(VcpuId(0), [Step::hlt()])).unwrap();
            let thread = thread::spawn(move || {
                let Err(halt) = runner.run(move |_: &View<'_>, _: Exit<'_>| {
                    inside.send(()).unwrap();
                    wait.recv().unwrap();
                    assert!(!panics, "as it should");
                    Flow::Stop(())
                });
                halt.reason
            });
            entered.recv().unwrap();
            // It is in its handler, and will not park.
            let pause = set.begin_pause();
            let asking = thread::spawn(move || number(&pause, 0));
            go_on.send(()).unwrap();
            let left = [
                Err(ControlError::Left(VcpuId(0))),
                Err(ControlError::NoSuchVcpu(VcpuId(0))),
            ];
            assert!(left.contains(&asking.join().unwrap()));
            assert_eq!(thread.join().is_err(), panics);
            set.wait().unwrap();
        }
    });
}

/// Calls back into the set when it is dropped.
struct Asks(VcpuSet);

impl Drop for Asks {
    fn drop(&mut self) {
        let _ = self.0.active();
    }
}

#[test]
fn a_task_that_is_never_done_may_hold_what_uses_the_set() {
    watchdog(|| {
        let set = set();
        let (inside, entered) = mpsc::channel();
        let (go_on, wait) = mpsc::channel::<()>();
        let runner = set.enroll(FakeVcpu::new(VcpuId(0), [Step::hlt()])).unwrap();
        let thread = thread::spawn(move || {
            let Err(halt) = runner.run(move |_: &View<'_>, _: Exit<'_>| {
                inside.send(()).unwrap();
                wait.recv().unwrap();
                Flow::Stop(())
            });
            halt.reason
        });
        entered.recv().unwrap();
        // It is in its handler, and will not park.
        let pause = set.begin_pause();
        let holds = Asks(set.clone());
        let asking =
            thread::spawn(move || pause.with_vcpu(VcpuId(0), move |_: &View<'_>| drop(holds)));
        while !format!("{set:?}").contains("1 posted") {
            thread::yield_now();
        }
        go_on.send(()).unwrap();
        assert_eq!(asking.join().unwrap(), Err(ControlError::Left(VcpuId(0))));
        assert_eq!(thread.join().unwrap(), HaltReason::Handler(()));
    });
}

#[test]
fn a_task_that_panics_ends_its_vcpu_and_tells_who_asked() {
    watchdog(|| {
        let set = set();
        let mut threads = running(&set, 2);
        let pause = set.pause().unwrap();
        let answer: Result<(), _> =
            pause.with_vcpu(VcpuId(0), |_: &View<'_>| panic!("as it should"));
        assert_eq!(answer, Err(ControlError::Left(VcpuId(0))));
        assert!(threads.remove(0).join().is_err());
        // The count of those that are active is right: a pause still ends, and so does a stop.
        assert_eq!(set.active(), 0);
        assert_eq!(number(&pause, 1), Ok(1));
        drop(pause);
        set.pause().unwrap().resume();
        set.stop().unwrap();
        assert_eq!(threads.remove(0).join().unwrap(), HaltReason::Stopped);
    });
}

#[test]
fn tasks_pauses_kicks_and_a_stop_from_many_threads_end() {
    watchdog(|| {
        for _ in 0..20 {
            let set = set();
            let vcpus = running(&set, 4);
            let askers: Vec<_> = (0..4)
                .map(|n| {
                    let set = set.clone();
                    thread::spawn(move || {
                        for i in 0..100 {
                            let pause = set.pause().unwrap();
                            match (n + i) % 3 {
                                0 => assert_eq!(number(&pause, i % 4), Ok(i % 4)),
                                1 => {
                                    assert_eq!(pause.with_each(|_: &View<'_>| 1).unwrap().len(), 4)
                                }
                                _ => set.kick(VcpuId(i % 4)).unwrap(),
                            }
                        }
                    })
                })
                .collect();
            askers.into_iter().for_each(|asker| asker.join().unwrap());
            set.stop().unwrap();
            for vcpu in vcpus {
                assert_eq!(vcpu.join().unwrap(), HaltReason::Stopped);
            }
        }
    });
}

/// Has no remedy but to note what it is told.
struct Notes(Arc<Mutex<Vec<MemoryError>>>);

impl ExitHandler<()> for Notes {
    type Stop = Infallible;

    fn exit(&mut self, _: &View<'_>, _: Exit<'_>) -> Flow<Infallible> {
        Flow::Continue
    }

    fn memory_error(&mut self, _: &View<'_>, error: &MemoryError) -> Remedy<Infallible> {
        self.0.lock().unwrap().push(*error);
        Remedy::RunOn
    }
}

fn bus_error(code: BusErrorCode) -> BusError {
    BusError {
        address: HostAddress(0x7f00_0000_5000),
        code,
        bytes: 4096,
        during: During::Handler,
    }
}

#[test]
fn what_was_computed_from_lost_memory_is_no_answer_and_the_vcpu_is_told() {
    watchdog(|| {
        let set = set();
        let told = Arc::new(Mutex::new(Vec::new()));
        let vcpus = [0, 1].map(|id| FakeVcpu::new(VcpuId(id), []));
        let fake = vcpus[1].state();
        let threads = vcpus.map(|vcpu| {
            let runner = set.enroll(vcpu).unwrap();
            let handler = Notes(told.clone());
            thread::spawn(move || {
                let Err(halt) = runner.run(handler);
                halt.reason
            })
        });
        while (0..2).any(|id| set.mode(VcpuId(id)) != Ok(GuestMode::InGuestMode)) {
            thread::yield_now();
        }
        let pause = set.pause().unwrap();
        let lost = bus_error(BusErrorCode::NoSuchAddress);
        let touches = |error| {
            let fake = fake.clone();
            move |vcpu: &View<'_>| {
                if vcpu.id() == VcpuId(1) {
                    fake.bus_error(error);
                }
            }
        };
        let refused = ControlError::MemoryError(VcpuId(1));
        assert_eq!(pause.with_vcpu(VcpuId(1), touches(lost)), Err(refused));
        assert_eq!(pause.with_each(touches(lost)), Err(refused));
        // The next that touches nothing is answered, and so is one that was told of a page early.
        assert_eq!(number(&pause, 1), Ok(1));
        let early = bus_error(BusErrorCode::ActionOptional);
        assert_eq!(pause.with_vcpu(VcpuId(1), touches(early)), Ok(()));
        assert_eq!(told.lock().unwrap().len(), 0);
        drop(pause);
        while told.lock().unwrap().len() < 3 {
            thread::yield_now();
        }
        let expected = [lost, lost, early].map(MemoryErrorSource::Signal);
        let sources: Vec<_> = told.lock().unwrap().iter().map(|e| e.source).collect();
        assert_eq!(sources, expected);
        set.stop().unwrap();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), HaltReason::Stopped);
        }
    });
}
