// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any sequence of what a control plane does (pauses that nest, requests with and without a wait, kicks,
//! vCPUs added, vCPUs that halt by themselves, a stop) beside a model of a few counters, on vCPUs without
//! KVM: what is waited for has come, what a pause holds does not run, and nothing hangs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/watchdog.rs"]
mod watchdog;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_core::fake::{FakeState, FakeVcpu};
use kvm_core::{
    ControlError, Exit, ExitHandler, Flow, GuestMode, Halt, HaltReason, Identity, Pause, Request,
    Requests, VcpuId, VcpuSet, VcpuView,
};
use proptest::collection::vec;
use proptest::prelude::*;
use watchdog::within;

/// Numbers that vCPUs may have.
const VCPUS: u32 = 5;

/// A step; a number that is not enrolled, or is already, is part of it.
#[derive(Clone, Debug)]
enum Step {
    Add(u32),
    Pause,
    BeginPause,
    Resume,
    Kick(u32),
    Request(u32),
    RequestAll,
    RequestAllAndWait,
    /// The vCPU's handler stops it.
    Halt(u32),
    /// Waits until all that may run are in the guest.
    Settle,
}

fn step() -> impl Strategy<Value = Step> {
    let id = 0..VCPUS;
    prop_oneof![
        4 => id.clone().prop_map(Step::Add),
        2 => Just(Step::Pause),
        1 => Just(Step::BeginPause),
        3 => Just(Step::Resume),
        1 => id.clone().prop_map(Step::Kick),
        1 => id.clone().prop_map(Step::Request),
        1 => Just(Step::RequestAll),
        4 => Just(Step::RequestAllAndWait),
        1 => id.prop_map(Step::Halt),
        3 => Just(Step::Settle),
    ]
}

/// The request that is counted, and the one that halts.
fn requests() -> [Request; 2] {
    [0, 1].map(|n| Request::consumer(n).unwrap())
}

/// Notes which round of requests was the newest when it last served one.
struct Notes {
    asked: Arc<AtomicUsize>,
    served: Arc<AtomicUsize>,
}

impl ExitHandler<()> for Notes {
    type Stop = &'static str;

    fn exit(&mut self, _: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<&'static str> {
        Flow::Continue
    }

    fn requests(&mut self, _: &VcpuView<'_, ()>, taken: Requests) -> Flow<&'static str> {
        let [count, halt] = requests();
        if taken.contains(count) {
            let asked = self.asked.load(Ordering::Relaxed);
            self.served.store(asked, Ordering::Relaxed);
        }
        match taken.contains(halt) {
            true => Flow::Stop("as asked"),
            false => Flow::Continue,
        }
    }
}

struct Member {
    state: Arc<FakeState>,
    served: Arc<AtomicUsize>,
    thread: JoinHandle<Halt<FakeVcpu, Notes, &'static str>>,
}

/// The set, and what it should be.
struct Model {
    set: VcpuSet,
    asked: Arc<AtomicUsize>,
    members: BTreeMap<u32, Member>,
    pauses: Vec<Pause>,
}

impl Model {
    fn new() -> Self {
        Self {
            set: VcpuSet::new(Identity::vm("any")),
            asked: Arc::default(),
            members: BTreeMap::new(),
            pauses: Vec::new(),
        }
    }

    fn add(&mut self, id: u32) {
        let vcpu = FakeVcpu::new(VcpuId(id), []);
        let (state, served) = (vcpu.state(), Arc::new(AtomicUsize::new(0)));
        let notes = Notes {
            asked: self.asked.clone(),
            served: served.clone(),
        };
        match self.set.spawn("vcpu", vcpu, notes) {
            Ok(thread) => {
                assert!(!self.members.contains_key(&id), "{id} is there twice");
                let member = Member {
                    state,
                    served,
                    thread,
                };
                self.members.insert(id, member);
            }
            Err(_) => assert!(self.members.contains_key(&id), "{id} was refused"),
        }
    }

    /// What the guest did while `meanwhile` ran: nothing, if a pause holds.
    fn paused(&self, meanwhile: impl FnOnce()) {
        let runs = || -> Vec<_> {
            let members = self.members.values();
            members.map(|member| member.state.log().guest).collect()
        };
        let before = runs();
        meanwhile();
        assert_eq!(runs(), before, "a vCPU ran during a pause");
        assert_eq!(self.set.active(), 0);
    }

    fn control(&self, id: u32, answer: Result<(), ControlError>) {
        match self.members.contains_key(&id) {
            true => assert_eq!(answer, Ok(())),
            false => assert_eq!(answer, Err(ControlError::NoSuchVcpu(VcpuId(id)))),
        }
    }

    fn request_all_and_wait(&self) {
        let [count, _] = requests();
        let round = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        self.set.request_all_and_wait(count).unwrap();
        for (id, member) in &self.members {
            // Looked at first: one that enters later has served it by then.
            let in_guest = member.state.is_in_guest();
            let served = member.served.load(Ordering::Relaxed) == round;
            assert!(served || !in_guest, "vCPU {id}");
        }
    }

    fn step(&mut self, step: &Step) {
        let [count, halt] = requests();
        match *step {
            Step::Add(id) => self.add(id),
            Step::Pause => {
                self.pauses.push(self.set.pause().unwrap());
                self.paused(thread::yield_now);
            }
            Step::BeginPause => self.pauses.push(self.set.begin_pause()),
            Step::Resume => drop(self.pauses.pop()),
            Step::Kick(id) => self.control(id, self.set.kick(VcpuId(id))),
            Step::Request(id) => self.control(id, self.set.request(VcpuId(id), count)),
            Step::RequestAll => self.set.request_all(count),
            Step::RequestAllAndWait => self.request_all_and_wait(),
            Step::Halt(id) => {
                // One that is parked, or has not begun, serves it at the resume.
                if self.pauses.is_empty()
                    && let Some(member) = self.members.remove(&id)
                {
                    self.set.request(VcpuId(id), halt).unwrap();
                    let reason = member.thread.join().unwrap().reason;
                    assert_eq!(reason, HaltReason::Handler("as asked"));
                }
            }
            Step::Settle => {
                let in_guest = |id: &u32| self.set.mode(VcpuId(*id)) == Ok(GuestMode::InGuestMode);
                while self.pauses.is_empty() && !self.members.keys().all(in_guest) {
                    thread::yield_now();
                }
            }
        }
        let mut ids: Vec<_> = self.set.ids().into_iter().map(|id| id.0).collect();
        ids.sort_unstable();
        assert!(ids.iter().eq(self.members.keys()), "{ids:?}");
    }

    fn stop(self) {
        self.set.stop().unwrap();
        // A thread that had not begun by then halts as soon as it does.
        for member in self.members.into_values() {
            assert_eq!(member.thread.join().unwrap().reason, HaltReason::Stopped);
        }
        assert_eq!((self.set.active(), self.set.ids().len()), (0, 0));
        drop(self.pauses);
    }
}

/// Fails a case that hangs, instead of hanging with it.
fn within_two_minutes(case: impl FnOnce() + Send + 'static) {
    within(Duration::from_secs(120), case)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_sequence_of_pauses_requests_and_new_vcpus_keeps_what_each_promises(
        steps in vec(step(), 1..60)
    ) {
        within_two_minutes(move || {
            let mut model = Model::new();
            for step in &steps {
                model.step(step);
            }
            model.stop();
        });
    }

    #[test]
    fn requests_that_several_wait_for_at_once_are_all_served_while_vcpus_come_and_go(
        waiters in 1usize..4, rounds in 1usize..20, added in 1u32..VCPUS
    ) {
        within_two_minutes(move || {
            let mut model = Model::new();
            model.add(0);
            let waiting: Vec<_> = (0..waiters)
                .map(|_| {
                    let set = model.set.clone();
                    let [count, _] = requests();
                    thread::spawn(move || {
                        for _ in 0..rounds {
                            set.request_all_and_wait(count).unwrap();
                        }
                    })
                })
                .collect();
            for id in 1..=added {
                model.step(&Step::Add(id));
                model.step(&Step::Pause);
                model.step(&Step::Resume);
            }
            model.step(&Step::Halt(added));
            for waiter in waiting {
                waiter.join().unwrap();
            }
            model.stop();
        });
    }
}
