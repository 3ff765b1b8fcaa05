// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that is saved half way and finished in another VM says what one says that nobody disturbed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use common::{LOAD, Machine, kvm, long_tests, watchdog};
use guests::state::{INPUT, INPUT_MMIO, RESULT, ROUND, ROUNDS, TICKS, WAITING};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_core::arch::x86_64::{BootState, CpuidPlan, Topology};
use kvm_core::state::{ClockRestore, StateHost, TscRestored, VcpuState, VmState};
use kvm_core::{
    Exit, ExitHandler, Flow, Halt, HaltReason, Pause, Request, Requests, Vcpu, VcpuId, VcpuSet,
    VcpuView,
};
use kvm_ioctls::VcpuFd;

const ROUNDS_DONE: u32 = 200;
const TICKS_AWAITED: u32 = 10;
/// So many exits, and a tick should have come long ago.
const PATIENCE: u32 = 500_000;

/// What the guest reads from its device: a number that follows from how often it has read.
fn input(count: u32) -> u32 {
    count.wrapping_mul(0x9e37_79b9) ^ count.rotate_left(7)
}

/// What a vCPU's device knows, which is saved with the vCPU.
#[derive(Clone, Copy, Debug, Default)]
struct DeviceState {
    reads: u32,
    result: Option<u32>,
}

/// What the test hears of.
enum Event {
    Paused(Pause),
    Result,
}

/// The device of one vCPU, and when to pause.
struct Device {
    state: Arc<Mutex<DeviceState>>,
    events: mpsc::Sender<Event>,
    exits: u32,
    waited: u32,
    /// At this exit the VM is paused, by this set, and the pause sent to the test.
    pause_at: Option<(u32, VcpuSet)>,
}

impl ExitHandler<VcpuFd> for Device {
    type Stop = Infallible;

    fn exit(&mut self, _: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Flow<Infallible> {
        self.exits += 1;
        if let Some((at, set)) = &self.pause_at
            && *at == self.exits
        {
            self.events.send(Event::Paused(set.begin_pause())).unwrap();
        }
        match exit {
            Exit::PioIn {
                port: INPUT, data, ..
            } => data.copy_from_slice(&self.read()),
            Exit::MmioRead { addr, data } if addr.0 == INPUT_MMIO => {
                data.copy_from_slice(&self.read());
            }
            Exit::PioOut { port: ROUND, .. } => {}
            Exit::PioOut { port: WAITING, .. } => {
                self.waited += 1;
                assert!(self.waited < PATIENCE, "the guest's timer is dead");
            }
            Exit::PioOut {
                port: RESULT, data, ..
            } => {
                // It halts next, with interrupts off, and stays there.
                let result = u32::from_le_bytes(data.try_into().unwrap());
                self.state.lock().unwrap().result = Some(result);
                // Nobody hears of it any more where the VM was paused meanwhile.
                let _ = self.events.send(Event::Result);
            }
            other => panic!("{other:?}"),
        }
        Flow::Continue
    }
}

impl Device {
    fn read(&self) -> [u8; 4] {
        let mut state = self.state.lock().unwrap();
        state.reads += 1;
        input(state.reads).to_le_bytes()
    }
}

/// All of a VM that is saved: in text, where there is serde.
struct Saved {
    vcpus: Vec<VcpuState>,
    vm: VmState,
    memory: Vec<u8>,
    devices: Vec<DeviceState>,
}

#[cfg(feature = "with-serde")]
fn through_text(state: (Vec<VcpuState>, VmState)) -> (Vec<VcpuState>, VmState) {
    let text = serde_json::to_string(&state).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[cfg(not(feature = "with-serde"))]
fn through_text(state: (Vec<VcpuState>, VmState)) -> (Vec<VcpuState>, VmState) {
    state
}

type Thread = JoinHandle<Halt<Vcpu, Device, Infallible>>;

struct Guest {
    machine: Machine,
    host: StateHost,
    set: VcpuSet,
    devices: Vec<Arc<Mutex<DeviceState>>>,
    threads: Vec<Thread>,
    events: mpsc::Receiver<Event>,
}

impl Guest {
    /// Starts the guest from its beginning.
    fn begin(vcpus: u32, pause_at: Option<u32>) -> Self {
        let mut machine = Machine::with_irqchip(guests::state::checksum());
        machine.memory.write(ROUNDS, &ROUNDS_DONE.to_le_bytes());
        machine.memory.write(TICKS, &TICKS_AWAITED.to_le_bytes());
        let made = (0..vcpus).map(|id| {
            let vcpu = machine.vm.create_vcpu(VcpuId(id)).unwrap();
            let plan = CpuidPlan {
                id: VcpuId(id),
                topology: Topology::flat(vcpus).unwrap(),
                tsc_deadline: true,
                arat: None,
                mca_recovery: false,
            };
            let supported = kvm().supported_cpuid().unwrap();
            vcpu.set_cpuid(&plan.apply(supported.as_slice()).unwrap())
                .unwrap();
            let mut state = BootState::real_mode(&vcpu.sregs().unwrap(), 0, LOAD);
            state.regs.rbx = id.into();
            vcpu.set_boot_state(&state).unwrap();
            let mp_state = KVM_MP_STATE_RUNNABLE;
            vcpu.fd().set_mp_state(kvm_mp_state { mp_state }).unwrap();
            vcpu
        });
        let made = made.collect();
        let devices = vec![DeviceState::default(); vcpus as usize];
        Self::start(machine, made, &devices, pause_at)
    }

    /// Starts it from where it was saved.
    fn restored(saved: &Saved, how: ClockRestore, pause_at: Option<u32>) -> Self {
        let mut machine = Machine::with_irqchip(&[]);
        machine.memory.write(0, &saved.memory);
        let listed = kvm().listed_host(machine.vm.fd()).unwrap();
        let ids = 0..saved.vcpus.len() as u32;
        let made = ids.map(|id| machine.vm.create_vcpu(VcpuId(id)).unwrap());
        let made: Vec<_> = made.collect();
        // Its CPUID is the saved one afterwards.
        let host = listed.complete_by(&made[0]).unwrap();
        let passage = machine.vm.restore(&saved.vm, how).unwrap();
        // KVM told when it was saved, of a VM with as many vCPUs.
        let told = saved.vm.clock.host_tsc.is_some();
        assert_eq!(passage.host_tsc.is_some(), told);
        for (vcpu, state) in made.iter().zip(&saved.vcpus) {
            let restored = vcpu.restore(&host, state, &passage).unwrap();
            assert!(restored.skipped_msrs.is_empty(), "{restored:?}");
            if told && state.tsc_offset.is_some() {
                assert_ne!(restored.tsc, TscRestored::Value);
            }
        }
        Self::start(machine, made, &saved.devices, pause_at)
    }

    fn start(
        machine: Machine,
        vcpus: Vec<Vcpu>,
        devices: &[DeviceState],
        pause_at: Option<u32>,
    ) -> Self {
        let host = machine.vm.state_host(&kvm()).unwrap();
        let set = VcpuSet::new(machine.vm.identity().clone());
        let devices: Vec<_> = devices.iter().map(|d| Arc::new(Mutex::new(*d))).collect();
        let (send, events) = mpsc::channel();
        // Paused until all have begun, so that the pause to come finds all.
        let hold = set.begin_pause();
        let start = |(vcpu, state): (Vcpu, &Arc<Mutex<DeviceState>>)| {
            let at = pause_at.filter(|_| vcpu.id() == VcpuId(0));
            let device = Device {
                state: state.clone(),
                events: send.clone(),
                exits: 0,
                waited: 0,
                pause_at: at.map(|at| (at, set.clone())),
            };
            set.spawn("vcpu", vcpu, device).unwrap()
        };
        let threads: Vec<Thread> = vcpus.into_iter().zip(&devices).map(start).collect();
        while hold.with_each(|_: &VcpuView<'_, VcpuFd>| ()).is_err() {
            std::thread::yield_now();
        }
        drop(hold);
        Self {
            machine,
            host,
            set,
            devices,
            threads,
            events,
        }
    }

    fn paused(&self) -> Pause {
        loop {
            if let Event::Paused(pause) = self.events.recv().unwrap() {
                return pause;
            }
        }
    }

    fn stop(&mut self) {
        self.set.stop().unwrap();
        for thread in self.threads.drain(..) {
            assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
        }
    }

    /// Waits for the pause, saves everything, and throws the VM away.
    fn save(mut self) -> Saved {
        let pause = self.paused();
        let host = self.host.clone();
        let states = pause.with_each(move |vcpu: &VcpuView<'_, VcpuFd>| vcpu.state(&host));
        let states: Vec<_> = states.unwrap().into_iter().map(|s| s.1.unwrap()).collect();
        let vm = self.machine.vm.state().unwrap();
        let (vcpus, vm) = through_text((states, vm));
        let saved = Saved {
            vcpus,
            vm,
            memory: self.machine.memory.bytes(),
            devices: self.devices.iter().map(|d| *d.lock().unwrap()).collect(),
        };
        self.stop();
        saved
    }

    /// Lets it run to its end: what each vCPU says.
    fn finish(mut self) -> Vec<u32> {
        let results = |guest: &Self| {
            let result = |device: &Arc<Mutex<DeviceState>>| device.lock().unwrap().result;
            guest.devices.iter().map(result).collect()
        };
        loop {
            let results: Option<Vec<u32>> = results(&self);
            if let Some(results) = results {
                self.stop();
                return results;
            }
            self.events.recv().unwrap();
        }
    }
}

/// Points spread over the guest's life, the same in every run.
fn points(count: u32) -> impl Iterator<Item = u32> {
    let mut seed = 0x2545_f491_u32;
    (0..count).map(move |_| {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        1 + seed % (3 * ROUNDS_DONE - 2)
    })
}

fn saved_and_finished(vcpus: u32, count: u32) {
    watchdog(move || {
        if !kvm().capabilities().tsc_deadline_timer() {
            return println!("NOT TRIED: this KVM has no TSC-deadline timer");
        }
        let undisturbed = Guest::begin(vcpus, None).finish();
        assert_eq!(undisturbed.len(), vcpus as usize);
        assert!(vcpus < 2 || undisturbed[0] != undisturbed[1]);
        for (at, n) in points(count).zip(0..) {
            let how = [ClockRestore::AsSaved, ClockRestore::Advanced][n % 2];
            let saved = Guest::begin(vcpus, Some(at)).save();
            let finished = Guest::restored(&saved, how, None).finish();
            assert_eq!(finished, undisturbed, "saved at exit {at}, {how:?}");
        }
    });
}

#[test]
fn saved_at_any_point_and_finished_in_a_new_vm_a_guest_says_the_same() {
    saved_and_finished(1, if long_tests() { 200 } else { 9 });
}

#[test]
fn two_vcpus_saved_at_once_and_finished_in_a_new_vm_say_the_same() {
    saved_and_finished(2, if long_tests() { 200 } else { 6 });
}

#[test]
fn a_guest_may_be_saved_and_restored_many_times_in_its_life() {
    watchdog(|| {
        if !kvm().capabilities().tsc_deadline_timer() {
            return println!("NOT TRIED: this KVM has no TSC-deadline timer");
        }
        let undisturbed = Guest::begin(1, None).finish();
        let mut guest = Guest::begin(1, Some(50));
        for _ in 0..8 {
            let saved = guest.save();
            guest = Guest::restored(&saved, ClockRestore::AsSaved, Some(60));
        }
        drop(guest.paused());
        assert_eq!(guest.finish(), undisturbed);
    });
}

/// Halts, and then says 7 on port 0x10; KVM has no local APIC for it.
const HALT_AND_SAY: [u8; 8] = [0xfa, 0xf4, 0xb0, 0x07, 0xe6, 0x10, 0xeb, 0xfe];

/// Blocks at the halt, and tells of all that it hears.
struct Blocking(mpsc::Sender<&'static str>);

impl ExitHandler<VcpuFd> for Blocking {
    type Stop = Infallible;

    fn exit(&mut self, _: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Flow<Infallible> {
        match exit {
            Exit::Hlt => {
                self.0.send("halted").unwrap();
                Flow::Block
            }
            Exit::PioOut { .. } => {
                self.0.send("ran").unwrap();
                Flow::Continue
            }
            other => panic!("{other:?}"),
        }
    }

    fn requests(&mut self, _: &VcpuView<'_, VcpuFd>, _: Requests) -> Flow<Infallible> {
        self.0.send("asked").unwrap();
        Flow::Continue
    }
}

#[test]
fn a_guest_that_was_given_all_is_taken_by_a_host_that_a_vcpu_or_a_scratch_vm_completed() {
    let kvm = kvm();
    let machine = Machine::with_irqchip(&[]);
    let vcpu = machine.vm.create_vcpu(VcpuId(0)).unwrap();
    let listed = kvm.listed_host(machine.vm.fd()).unwrap();
    let mut by_vcpu = listed.clone().complete_by(&vcpu).unwrap();
    let by_scratch = listed.complete(&kvm).unwrap();
    let supported = kvm.supported_cpuid().unwrap();
    vcpu.set_cpuid(&supported).unwrap();
    let guest = vcpu.state(&by_vcpu).unwrap();
    by_vcpu.check(&guest).unwrap();
    by_scratch.check(&guest).unwrap();
    machine.vm.state_host(&kvm).unwrap().check(&guest).unwrap();
    // And nothing else of it is another.
    by_vcpu.cpuid.clone_from(&by_scratch.cpuid);
    assert_eq!(by_vcpu, by_scratch);
}

#[test]
fn a_vcpu_that_is_halted_in_user_space_is_halted_when_it_is_restored() {
    watchdog(|| {
        let kvm = kvm();
        let (tell, told) = mpsc::channel();
        let machine = Machine::new(&HALT_AND_SAY);
        let host = machine.vm.state_host(&kvm).unwrap();
        let set = VcpuSet::new(machine.vm.identity().clone());
        let blocking = Blocking(tell.clone());
        let thread = set.spawn("vcpu", machine.vcpu(0), blocking).unwrap();
        assert_eq!(told.recv(), Ok("halted"));
        let pause = set.pause().unwrap();
        let save = move |vcpu: &VcpuView<'_, VcpuFd>| (vcpu.state(&host), vcpu.is_halted());
        let (state, halted) = pause.with_vcpu(VcpuId(0), save).unwrap();
        let (state, clock) = (state.unwrap(), machine.vm.state().unwrap());
        assert!(halted);
        assert_eq!(
            state.mp_state, KVM_MP_STATE_RUNNABLE,
            "KVM knows nothing of it"
        );
        set.stop().unwrap();
        thread.join().unwrap();

        let machine = Machine::new(&HALT_AND_SAY);
        let host = machine.vm.state_host(&kvm).unwrap();
        let passage = machine.vm.restore(&clock, ClockRestore::AsSaved).unwrap();
        let vcpu = machine.vm.create_vcpu(VcpuId(0)).unwrap();
        vcpu.restore(&host, &state, &passage).unwrap();
        let set = VcpuSet::new(machine.vm.identity().clone());
        let runner = set.enroll(vcpu).unwrap().halted();
        let waker = runner.waker();
        let thread =
            std::thread::spawn(move || runner.run(Blocking(tell)).map_err(|halt| halt.reason));
        set.request(VcpuId(0), Request::consumer(0).unwrap())
            .unwrap();
        assert_eq!(told.recv(), Ok("asked"));
        set.pause().unwrap().resume();
        assert!(told.try_recv().is_err(), "it ran");
        waker.wake();
        assert_eq!(told.recv(), Ok("ran"));
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap(), Err(HaltReason::Stopped));
    });
}
