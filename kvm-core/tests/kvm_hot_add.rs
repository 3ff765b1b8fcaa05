// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vCPUs that come while others run: made, enrolled and spawned at any time, started by the guest with
//! INIT and SIPI as on hardware, and from then on as good as those that were there first.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Machine, watchdog};
use guests::vcpu::{AP_COUNTS, AP_PAGE, AP_SAYS, NEXT_AP};
use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_enable_cap};
use kvm_core::state::Passage;
use kvm_core::{
    Exit, ExitHandler, Flow, Halt, HaltReason, Identity, Kvm, Vcpu, VcpuId, VcpuSet, VcpuView, Vm,
};
use kvm_ioctls::VcpuFd;

/// What host and guest say to each other.
#[derive(Default)]
struct Talk {
    /// The APIC id to be started next; 0 is none. Taken by the boot vCPU.
    next: AtomicU32,
    /// How often the boot vCPU has asked for one: its APIC is set up by then.
    asked: AtomicU32,
    /// Each vCPU's rounds.
    rounds: [AtomicU32; 4],
    /// Which vCPUs have said where they began, a bit each.
    began: AtomicU32,
}

struct Handler(Arc<Talk>);

impl ExitHandler<VcpuFd> for Handler {
    type Stop = String;

    fn exit(&mut self, vcpu: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Flow<String> {
        let talk = &self.0;
        match exit {
            Exit::PioIn {
                port: NEXT_AP,
                data,
                ..
            } => {
                talk.asked.fetch_add(1, Ordering::Relaxed);
                let next = talk.next.swap(0, Ordering::Relaxed);
                data.copy_from_slice(&next.to_le_bytes());
            }
            Exit::PioOut {
                port: AP_SAYS,
                data,
                ..
            } => {
                let segment = u16::from_le_bytes(data.try_into().unwrap());
                if u64::from(segment) << 4 != AP_PAGE {
                    return Flow::Stop(format!("vCPU {} began at {segment:#x}:0", vcpu.id()));
                }
                talk.began.fetch_or(1 << vcpu.id().0, Ordering::Relaxed);
            }
            Exit::PioOut {
                port: AP_COUNTS, ..
            } => {
                talk.rounds[vcpu.id().0 as usize].fetch_add(1, Ordering::Relaxed);
            }
            other => return Flow::Stop(format!("vCPU {}: {other:?}", vcpu.id())),
        }
        Flow::Continue
    }
}

type Thread = std::thread::JoinHandle<Halt<Vcpu, Handler, String>>;

struct Guest {
    machine: Machine,
    set: VcpuSet,
    talk: Arc<Talk>,
    threads: Vec<Thread>,
}

impl Guest {
    fn start(mut machine: Machine) -> Self {
        machine.memory.write(AP_PAGE, guests::vcpu::ap());
        let vcpu = machine.protected_mode(0);
        let mut guest = Self::new(machine);
        guest.spawn(vcpu);
        guest
    }

    fn new(machine: Machine) -> Self {
        Self {
            set: VcpuSet::new(Identity::vm("hot-add")),
            talk: Arc::default(),
            threads: Vec::new(),
            machine,
        }
    }

    fn vm(&self) -> &Vm {
        &self.machine.vm
    }

    fn spawn(&mut self, vcpu: Vcpu) {
        let handler = Handler(self.talk.clone());
        let thread = self.set.spawn("vcpu", vcpu, handler).unwrap();
        self.threads.push(thread);
    }

    /// Makes a vCPU and leaves it as KVM made it, for the guest to start.
    fn add(&mut self, id: u32) {
        let vcpu = self.vm().create_vcpu(VcpuId(id)).unwrap();
        let state = vcpu.fd().get_mp_state().unwrap().mp_state;
        assert_eq!(state, KVM_MP_STATE_UNINITIALIZED);
        self.spawn(vcpu);
    }

    fn began(&self, id: u32) -> bool {
        self.talk.began.load(Ordering::Relaxed) & 1 << id != 0
    }

    fn rounds(&self, id: u32) -> u32 {
        self.talk.rounds[id as usize].load(Ordering::Relaxed)
    }

    /// Has the guest start it, and waits until it works: counts in memory that all share, and more.
    fn is_started_and_works(&self, id: u32) {
        self.talk.next.store(id, Ordering::Relaxed);
        let enough = self.rounds(id) + 3;
        self.wait(|| self.began(id) && self.rounds(id) >= enough);
    }

    /// Until it is so; a vCPU that halted says why.
    fn wait(&self, is_so: impl Fn() -> bool) {
        while !is_so() {
            assert!(!self.threads.iter().any(Thread::is_finished), "one halted");
            std::thread::yield_now();
        }
    }

    fn stop(self) {
        self.set.stop().unwrap();
        for thread in self.threads {
            assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        }
    }
}

/// Local APICs in KVM, and no more.
fn split() -> Machine {
    Machine::with(guests::vcpu::start_aps(), |setup| {
        let mut cap = kvm_enable_cap {
            cap: kvm_bindings::KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        cap.args[0] = 24;
        setup.fd().enable_cap(&cap).unwrap();
    })
}

fn in_kernel() -> Machine {
    Machine::with_irqchip(guests::vcpu::start_aps())
}

#[test]
fn a_vcpu_that_is_added_while_others_run_is_started_by_the_guest_and_works() {
    watchdog(|| {
        for machine in [in_kernel(), split()] {
            let mut guest = Guest::start(machine);
            guest.add(1);
            guest.is_started_and_works(1);
            guest.add(2);
            guest.is_started_and_works(2);
            // The first of them has not stopped for it.
            let before = guest.rounds(1);
            guest.wait(|| guest.rounds(1) > before);
            guest.stop();
        }
    });
}

#[test]
fn a_vcpu_that_is_added_during_a_pause_runs_nothing_before_its_end() {
    watchdog(|| {
        for machine in [in_kernel(), split()] {
            let mut guest = Guest::start(machine);
            guest.add(1);
            guest.is_started_and_works(1);
            let pause = guest.set.pause().unwrap();
            let before = guest.rounds(1);
            guest.add(2);
            // A second pause waits for nobody, the new one included.
            guest.set.pause().unwrap().resume();
            guest.talk.next.store(2, Ordering::Relaxed);
            assert_eq!(guest.set.active(), 0);
            assert_eq!((guest.began(2), guest.rounds(1)), (false, before));
            pause.resume();
            guest.wait(|| guest.began(2) && guest.rounds(2) >= 3 && guest.rounds(1) > before);
            // And from now on it is one of them.
            let pause = guest.set.pause().unwrap();
            assert_eq!(guest.set.active(), 0);
            pause.resume();
            guest.stop();
        }
    });
}

#[test]
fn a_vcpu_that_is_added_to_a_restored_vm_before_its_first_run_is_started_by_the_guest_and_works() {
    watchdog(|| {
        for make in [in_kernel, split] {
            let guest = Guest::start(make());
            guest.wait(|| guest.talk.asked.load(Ordering::Relaxed) > 0);
            let pause = guest.set.pause().unwrap();
            let host = guest.vm().state_host(&common::kvm()).unwrap();
            let save = {
                let host = host.clone();
                move |vcpu: &VcpuView<'_, VcpuFd>| vcpu.state(&host)
            };
            let state = pause.with_vcpu(VcpuId(0), save).unwrap().unwrap();
            let memory = guest.machine.memory.bytes();
            drop(pause);
            guest.stop();

            let mut guest = Guest::new(make());
            guest.machine.memory.write(0, &memory);
            let first = guest.vm().create_vcpu(VcpuId(0)).unwrap();
            first.restore(&host, &state, &Passage::default()).unwrap();
            // Its APIC is set up, and the guest will not do it again.
            guest.add(1);
            guest.spawn(first);
            guest.is_started_and_works(1);
            guest.stop();
        }
    });
}

#[test]
fn a_vcpu_is_added_while_its_vm_pauses_and_resumes_without_rest() {
    watchdog(|| {
        let mut guest = Guest::start(in_kernel());
        let set = guest.set.clone();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let pauses = std::thread::spawn(move || {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                set.pause().unwrap().resume();
            }
        });
        for id in 1..4 {
            guest.add(id);
            guest.is_started_and_works(id);
        }
        drop(stop);
        pauses.join().unwrap();
        guest.stop();
    });
}

#[test]
fn a_number_that_the_vm_has_is_refused_while_it_runs_and_nothing_else_happens() {
    watchdog(|| {
        let mut guest = Guest::start(in_kernel());
        guest.add(1);
        let error = guest.vm().create_vcpu(VcpuId(1)).unwrap_err();
        assert!(
            error.to_string().contains("has one of this number"),
            "{error}"
        );
        let most = Kvm::open().unwrap().capabilities().max_vcpu_id();
        let error = guest.vm().create_vcpu(VcpuId(most)).unwrap_err();
        assert!(error.to_string().contains(&most.to_string()), "{error}");
        guest.is_started_and_works(1);
        assert_eq!(guest.set.ids(), [VcpuId(0), VcpuId(1)]);
        guest.stop();
    });
}
