// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pause, resume, kick and stop of real vCPUs: halted, spinning, waiting for their start-up interrupt,
//! and busy exiting. A lost kick hangs one of these tests, and the watchdog says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::convert::Infallible;

use common::{Machine, long_tests, watchdog};
use kvm_core::{
    Exit, ExitHandler, Flow, GuestMode, Halt, HaltReason, KickSignal, Request, Requests, Vcpu,
    VcpuId, VcpuSet, VcpuView,
};
use kvm_ioctls::VcpuFd;

/// How often: `short`, or `long` in the long form, of which an emulated host does a fiftieth.
fn cycles(short: usize, long: usize) -> usize {
    if !long_tests() {
        short
    } else if std::env::var_os("REFERENCE_VMM_LAB").is_some() {
        (long / 50).max(short)
    } else {
        long
    }
}

fn carry_on(_: &VcpuView<'_, VcpuFd>, _: Exit<'_>) -> Flow<Infallible> {
    Flow::Continue
}

type Thread<H, S> = std::thread::JoinHandle<Halt<Vcpu, H, S>>;

fn start<H>(
    machine: &Machine,
    vcpus: impl IntoIterator<Item = Vcpu>,
    handler: impl Fn() -> H,
) -> (VcpuSet, Vec<Thread<H, H::Stop>>)
where
    H: ExitHandler<VcpuFd> + Send + 'static,
    H::Stop: Send + 'static,
{
    let set = VcpuSet::new(machine.vm.identity().clone());
    // All of them before the first runs.
    let vcpus: Vec<_> = vcpus.into_iter().collect();
    let spawn = |vcpu: Vcpu| set.spawn("vcpu", vcpu, handler()).unwrap();
    let threads = vcpus.into_iter().map(spawn).collect();
    (set, threads)
}

/// Cycles of pause and resume. Of three, the first pauses vCPUs that are inside the guest, the second
/// those on their way there, the third those that have hardly been resumed.
fn pause_resume_stop(machine: Machine, vcpus: Vec<Vcpu>, cycles: usize) {
    watchdog(move || {
        let count = vcpus.len();
        let (set, threads) = start(&machine, vcpus, || carry_on);
        let ids = set.ids();
        let all_in_guest = |set: &VcpuSet| {
            let in_guest = |id: &VcpuId| set.mode(*id) == Ok(GuestMode::InGuestMode);
            ids.iter().all(in_guest)
        };
        for cycle in 0..cycles {
            while match cycle % 3 {
                0 => !all_in_guest(&set),
                1 => set.active() < count,
                _ => false,
            } {
                std::thread::yield_now();
            }
            let pause = set.pause().unwrap();
            assert_eq!(set.active(), 0);
            pause.resume();
        }
        set.stop().unwrap();
        for thread in threads {
            assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        }
    });
}

#[test]
fn halted_vcpus_pause_resume_and_stop_with_no_kick_lost() {
    // Each sleeps in HLT, inside KVM.
    let machine = Machine::with_irqchip(guests::vcpu::halt());
    let vcpus = (0..4).map(|id| machine.runnable(id)).collect();
    pause_resume_stop(machine, vcpus, cycles(400, 100_000));
}

#[test]
fn vcpus_that_wait_for_their_start_up_interrupt_pause_resume_and_stop_with_no_kick_lost() {
    let machine = Machine::with_irqchip(guests::vcpu::halt());
    let mut vcpus: Vec<_> = (0..4).map(|id| machine.vcpu(id)).collect();
    // The first is the one that runs at once.
    drop(vcpus.remove(0));
    pause_resume_stop(machine, vcpus, cycles(400, 100_000));
}

#[test]
fn spinning_vcpus_pause_resume_and_stop_with_no_kick_lost() {
    let machine = Machine::new(guests::vcpu::spin());
    let vcpus = (0..2).map(|id| machine.vcpu(id)).collect();
    pause_resume_stop(machine, vcpus, cycles(200, 100_000));
}

#[test]
fn vcpus_that_exit_all_the_time_pause_resume_and_stop_with_no_kick_lost() {
    let machine = Machine::new(guests::vcpu::out_for_ever());
    let vcpus = (0..2).map(|id| machine.vcpu(id)).collect();
    pause_resume_stop(machine, vcpus, cycles(200, 20_000));
}

#[test]
fn sixty_four_halted_vcpus_pause_and_resume() {
    let machine = Machine::with_irqchip(guests::vcpu::halt());
    let vcpus = (0..64).map(|id| machine.runnable(id)).collect();
    pause_resume_stop(machine, vcpus, cycles(20, 2_000));
}

#[test]
fn a_standard_signal_of_the_consumers_choice_kicks_as_well() {
    watchdog(|| {
        let kvm = common::kvm();
        let signal = KickSignal::new(libc::SIGUSR2).unwrap();
        let setup = kvm.create_vm().unwrap().kick_signal(signal);
        setup.fd().create_irq_chip().unwrap();
        let vm = setup.finish();
        let set = VcpuSet::new(vm.identity().clone());
        // vCPU 1 of a VM with KVM's irqchip waits for its start-up interrupt.
        let _first = vm.create_vcpu(VcpuId(0)).unwrap();
        let waiting = vm.create_vcpu(VcpuId(1)).unwrap();
        let thread = set.spawn("vcpu", waiting, carry_on).unwrap();
        for _ in 0..50 {
            set.pause().unwrap().resume();
        }
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    });
}

#[test]
fn a_signal_that_cannot_be_caught_is_refused() {
    for number in [0, -1, 65, libc::SIGKILL, libc::SIGSTOP] {
        let error = KickSignal::new(number).unwrap_err();
        assert!(error.to_string().contains(&number.to_string()), "{error}");
    }
}

/// Stops when it is asked, counting.
struct Counting(usize);

impl ExitHandler<VcpuFd> for Counting {
    type Stop = usize;

    fn exit(&mut self, _: &VcpuView<'_, VcpuFd>, _: Exit<'_>) -> Flow<usize> {
        Flow::Continue
    }

    fn requests(&mut self, _: &VcpuView<'_, VcpuFd>, requests: Requests) -> Flow<usize> {
        self.0 += usize::from(requests.contains(Request::consumer(0).unwrap()));
        match requests.contains(Request::consumer(1).unwrap()) {
            true => Flow::Stop(self.0),
            false => Flow::Continue,
        }
    }
}

#[test]
fn every_request_that_is_waited_for_is_served_by_vcpus_in_the_guest() {
    let rounds = cycles(200, 20_000);
    watchdog(move || {
        let machine = Machine::new(guests::vcpu::spin());
        let vcpus: Vec<_> = (0..2).map(|id| machine.vcpu(id)).collect();
        let (set, threads) = start(&machine, vcpus, || Counting(0));
        // Both are inside `run` from here on.
        while set.active() < 2 {
            std::thread::yield_now();
        }
        for _ in 0..rounds {
            set.request_all_and_wait(Request::consumer(0).unwrap())
                .unwrap();
        }
        set.request_all(Request::consumer(1).unwrap());
        for thread in threads {
            let reason = thread.join().unwrap().reason;
            let HaltReason::Handler(served) = reason else {
                panic!("{reason}")
            };
            // Two that came while a vCPU was on its way in are served together.
            assert!((1..=rounds).contains(&served), "{served}");
        }
    });
}

#[test]
fn a_pause_in_the_middle_of_an_access_leaves_the_registers_behind_it() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::exits());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let own = set.clone();
        // Pauses at each exit, and looks at the registers in the next: what was read has arrived.
        let mut rips = Vec::new();
        let runner = set.enroll(machine.vcpu(0)).unwrap();
        let Err(halt) = runner.run(|vcpu: &VcpuView<'_, VcpuFd>, exit: Exit<'_>| {
            if exit == Exit::Hlt {
                return Flow::Stop(());
            }
            rips.push(vcpu.fd().get_regs().unwrap().rip);
            own.begin_pause().resume();
            Flow::Continue
        });
        assert_eq!(halt.reason, HaltReason::Handler(()));
        assert!(rips.is_sorted() && rips.len() >= 16, "{rips:x?}");
    });
}
