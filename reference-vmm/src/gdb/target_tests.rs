// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The target against vCPUs without KVM: what gdb's words do to registers, memory and breakpoints; and
//! any bytes at all, through gdbstub.

use gdbstub::common::Tid;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as Machine;
use gdbstub::stub::{GdbStubBuilder, MultiThreadStopReason};
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadSchedulerLocking, MultiThreadSingleStep,
};
use gdbstub::target::ext::breakpoints::{HwWatchpoint, SwBreakpoint, WatchKind};
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::{Access, DebugCause, HardwareBreakpoint};
use proptest::prelude::*;

use super::fake::{Fake, LEN, MAPPED};
use super::link::Event;
use super::target::GuestTarget;

const FIRST: Tid = Tid::MIN;

fn attached(fake: Fake) -> GuestTarget<Fake> {
    let mut target = GuestTarget::new(fake);
    target.attach().unwrap();
    target
}

fn event(vcpu: u32, cause: DebugCause) -> Event {
    let vcpu = VcpuId(vcpu);
    Event { vcpu, cause }
}

#[test]
fn memory_is_read_as_far_as_it_is_mapped_and_written_whole_or_not_at_all() {
    let mut target = attached(Fake::new(1));
    let mut bytes = [0; 10];
    let read = target.read_addrs(MAPPED + 4090, &mut bytes, FIRST);
    assert_eq!(read.ok(), Some(10));
    assert_eq!(bytes, [250, 251, 252, 253, 254, 255, 0, 1, 2, 3]);
    let read = target.read_addrs(MAPPED + LEN - 4, &mut bytes, FIRST);
    assert_eq!(read.ok(), Some(4));
    for unmapped in [0, MAPPED - 1, MAPPED + LEN, u64::MAX - 3] {
        assert!(target.read_addrs(unmapped, &mut bytes, FIRST).is_err());
    }
    let before = target.vcpus().memory.borrow().clone();
    for (at, len) in [(MAPPED + LEN - 4, 5), (u64::MAX, 2), (MAPPED - 1, 2)] {
        assert!(target.write_addrs(at, &vec![0xff; len], FIRST).is_err());
    }
    assert_eq!(*target.vcpus().memory.borrow(), before);
    target
        .write_addrs(MAPPED + 4095, &[7, 8], FIRST)
        .ok()
        .unwrap();
    assert_eq!(target.vcpus().memory.borrow()[4095..4097], [7, 8]);
    let nobody = Tid::new(9).unwrap();
    assert!(target.read_addrs(MAPPED, &mut bytes, nobody).is_err());
}

#[test]
fn int3s_are_in_memory_only_while_the_guest_runs() {
    let mut target = attached(Fake::new(2));
    let before = target.vcpus().memory.borrow().clone();
    for n in 0..6 {
        let added = target.add_sw_breakpoint(MAPPED + 16 * n, 1);
        assert_eq!(added.ok(), Some(true), "{n}");
    }
    // Unmapped, so it takes a register, and two of the others move.
    assert_eq!(target.add_sw_breakpoint(0x1000, 1).ok(), Some(true));
    assert_eq!(*target.vcpus().memory.borrow(), before);
    target.clear_resume_actions().unwrap();
    target.resume().unwrap();
    let patched: Vec<_> = {
        let memory = target.vcpus().memory.borrow();
        (0..LEN as usize)
            .filter(|n| memory[*n] != before[*n])
            .collect()
    };
    assert_eq!(patched, [48, 64, 80]);
    assert!(
        patched
            .iter()
            .all(|at| target.vcpus().memory.borrow()[*at] == 0xcc)
    );
    for (debug, patches) in target.vcpus().armed.borrow().values() {
        assert_eq!(
            (debug.hardware.iter().count(), debug.software, *patches),
            (4, true, 3)
        );
    }
    // The guest has overwritten one of them, and keeps what it wrote.
    target.vcpus().memory.borrow_mut()[64] = 0x90;
    target.vcpus_mut().events = vec![event(1, DebugCause::Software)];
    let stopped = target.happened().unwrap();
    assert_eq!(
        stopped,
        Some(MultiThreadStopReason::SwBreak(Tid::new(2).unwrap()))
    );
    let mut expected = before;
    expected[64] = 0x90;
    assert_eq!(*target.vcpus().memory.borrow(), expected);
}

#[test]
fn a_host_without_int3s_and_a_vcpu_in_real_mode_get_four_and_no_fifth() {
    for real_mode in [false, true] {
        let mut fake = Fake::new(1);
        fake.software = real_mode;
        if real_mode {
            fake.states
                .borrow_mut()
                .values_mut()
                .for_each(|state| state.sregs.cr0 = 0);
        }
        let mut target = attached(fake);
        for n in 0..4 {
            assert_eq!(target.add_sw_breakpoint(MAPPED + n, 1).ok(), Some(true));
        }
        assert!(target.add_sw_breakpoint(MAPPED + 4, 1).is_err());
        assert_eq!(target.remove_sw_breakpoint(MAPPED, 1).ok(), Some(true));
        assert_eq!(target.add_sw_breakpoint(MAPPED + 4, 1).ok(), Some(true));
    }
}

#[test]
fn a_step_is_of_one_vcpu_and_the_others_stand_still_where_gdb_says_so() {
    let mut target = attached(Fake::new(3));
    let second = Tid::new(2).unwrap();
    target.clear_resume_actions().unwrap();
    target.set_resume_action_step(second, None).unwrap();
    target.set_resume_action_scheduler_lock().unwrap();
    target.resume().unwrap();
    assert_eq!(target.vcpus().gone, [VcpuId(1)]);
    let (debug, _) = target.vcpus().armed.borrow()[&VcpuId(1)];
    assert!(debug.single_step && debug.block_interrupts);
    target.interrupt().unwrap();

    target.clear_resume_actions().unwrap();
    target.set_resume_action_step(second, None).unwrap();
    target.resume().unwrap();
    assert_eq!(target.vcpus().gone, [0, 1, 2].map(VcpuId));
    let stepping: Vec<_> = {
        let armed = target.vcpus().armed.borrow();
        armed.values().map(|(debug, _)| debug.single_step).collect()
    };
    assert_eq!(stepping, [false, true, false]);
}

#[test]
fn a_watchpoint_met_beside_another_stop_is_told_at_the_next_resume() {
    let mut target = attached(Fake::new(2));
    let added = target.add_hw_watchpoint(MAPPED, 4, WatchKind::Write);
    assert_eq!(added.ok(), Some(true));
    let watch = HardwareBreakpoint::new(MAPPED, 4, Access::Write).unwrap();
    target.clear_resume_actions().unwrap();
    target.resume().unwrap();
    target.vcpus_mut().events = vec![
        event(0, DebugCause::Step),
        event(1, DebugCause::Hardware(watch)),
    ];
    assert!(target.happened().unwrap().is_some());
    assert_eq!(target.next_untold().map(|_| ()), Some(()));
    assert_eq!(target.next_untold(), None);
}

#[test]
fn a_debugger_that_goes_leaves_nothing_behind() {
    let mut target = attached(Fake::new(1));
    let before = target.vcpus().memory.borrow().clone();
    for n in 0..6 {
        assert_eq!(target.add_sw_breakpoint(MAPPED + n, 1).ok(), Some(true));
    }
    // One that never had the guest run leaves it waiting.
    target.detach(false).unwrap();
    assert!(target.vcpus().gone.is_empty());
    target.attach().unwrap();
    assert_eq!(target.add_sw_breakpoint(MAPPED, 1).ok(), Some(true));
    target.clear_resume_actions().unwrap();
    target.resume().unwrap();
    target.detach(false).unwrap();
    assert_eq!(target.vcpus().gone, [VcpuId(0)]);
    assert!(target.vcpus().armed.borrow()[&VcpuId(0)].0.is_off());
    assert_eq!(*target.vcpus().memory.borrow(), before);
}

#[test]
fn a_call_that_kvm_refuses_is_told_and_stops_no_vcpu() {
    let mut target = attached(Fake::new(1));
    target.vcpus_mut().arm_fails = Some(libc::EINVAL);
    target.clear_resume_actions().unwrap();
    let error = target.resume().unwrap_err().to_string();
    assert!(
        error.starts_with("KVM_SET_GUEST_DEBUG of vCPU 0 failed"),
        "{error}"
    );
    assert_eq!(target.vcpus().gone, [VcpuId(0)]);
}

/// A peer that hears nothing.
struct Nobody;

impl Connection for Nobody {
    type Error = ();
    fn write(&mut self, _: u8) -> Result<(), ()> {
        Ok(())
    }
    fn flush(&mut self) -> Result<(), ()> {
        Ok(())
    }
}

/// A session of these bytes, to its end or theirs.
fn session(target: &mut GuestTarget<Fake>, bytes: &[u8]) {
    target.attach().unwrap();
    let stub = GdbStubBuilder::new(Nobody).packet_buffer_size(1024).build();
    let Ok(mut machine) = stub.unwrap().run_state_machine(target) else {
        return;
    };
    let mut bytes = bytes.iter();
    loop {
        let step = match machine {
            Machine::Idle(idle) => match bytes.next() {
                Some(byte) => idle.incoming_data(target, *byte),
                None => return,
            },
            Machine::Running(running) => match target.next_untold() {
                Some(reason) => running.report_stop(target, reason),
                None => match bytes.next() {
                    Some(byte) => running.incoming_data(target, *byte),
                    None => return,
                },
            },
            Machine::CtrlCInterrupt(interrupt) => {
                let reason = target.is_running().then(|| target.interrupt().unwrap());
                interrupt.interrupt_handled(target, reason)
            }
            Machine::Disconnected(_) => return,
        };
        match step {
            Ok(next) => machine = next,
            Err(_) => return,
        }
    }
}

fn packet(body: &[u8]) -> Vec<u8> {
    let sum = body.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", body, format!("#{sum:02x}").as_bytes()].concat()
}

/// Bodies near to those that mean something.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        Just("m"),
        Just("M"),
        Just("X"),
        Just("g"),
        Just("G"),
        Just("p"),
        Just("P"),
        Just("Z0,"),
        Just("Z1,"),
        Just("Z2,"),
        Just("z0,"),
        Just("Hg"),
        Just("Hc"),
        Just("T"),
        Just("?"),
        Just("vCont;c"),
        Just("vCont;s:"),
        Just("vCont;"),
        Just("qSupported:"),
        Just("c"),
        Just("s"),
        Just("qXfer:features:read:target.xml:"),
        Just("qThreadExtraInfo,"),
        Just("qfThreadInfo"),
        Just("vFile:"),
        Just("QStartNoAckMode"),
        Just("D"),
        Just("qRcmd,"),
        Just("vMustReplyEmpty"),
    ];
    let number = prop_oneof![
        any::<u64>().prop_map(|n| format!("{n:x}")),
        (0..300u64).prop_map(|n| format!("{n:x}")),
        (0..300u64).prop_map(|n| format!("{:x}", MAPPED + n)),
        (0..300u64).prop_map(|n| format!("{:x}", u64::MAX - n)),
        "[0-9a-fp.,:;*}#$-]{0,12}",
    ];
    let tail = prop::collection::vec(
        (
            number,
            prop_oneof![Just(","), Just(":"), Just(""), Just("=")],
        ),
        0..4,
    );
    (word, tail).prop_map(|(word, tail)| {
        let tail: String = tail.into_iter().map(|(number, end)| number + end).collect();
        (word.to_owned() + &tail).into_bytes()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_packets_panic_and_none_leaves_an_int3_behind(
        bodies in prop::collection::vec(body(), 1..12),
    ) {
        let bytes: Vec<_> = bodies.iter().flat_map(|body| packet(body)).collect();
        let mut target = GuestTarget::new(Fake::new(2));
        session(&mut target, &bytes);
        target.detach(true).unwrap();
        prop_assert!(target.vcpus().armed.borrow().values().all(|(debug, n)| debug.is_off() && *n == 0));
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        session(&mut GuestTarget::new(Fake::new(1)), &bytes);
    }
}
