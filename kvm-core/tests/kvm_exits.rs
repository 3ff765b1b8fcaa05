// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Exits of a real guest on a real KVM, decoded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{LOAD, Machine, watchdog};
use kvm_core::arch::x86_64::BootState;
use kvm_core::{Exit, Flow, HaltReason, VcpuId, VcpuSet, VcpuView};
use vm_memory::GuestAddress;

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    In(u16, u8, usize),
    Out(u16, u8, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

#[test]
fn port_string_and_mmio_exits_are_decoded_whole_and_answers_arrive() {
    let (seen, regs) = watchdog(|| {
        let machine = Machine::new(guests::vcpu::exits());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let mut seen = Vec::new();
        let Err(halt) =
            set.enroll(machine.vcpu(0))
                .unwrap()
                .run(|_: &VcpuView<'_, _>, exit: Exit<'_>| {
                    match exit {
                        Exit::PioIn { port, size, data } => {
                            seen.push(Seen::In(port, size, data.len()));
                            for (i, byte) in data.iter_mut().enumerate() {
                                *byte = port as u8 + i as u8;
                            }
                        }
                        Exit::PioOut { port, size, data } => {
                            seen.push(Seen::Out(port, size, data.to_vec()));
                        }
                        Exit::MmioRead { addr, data } => {
                            seen.push(Seen::Read(addr.0, data.len()));
                            data.copy_from_slice(&0xa1b2_c3d4_u32.to_le_bytes());
                        }
                        Exit::MmioWrite { addr, data } => {
                            seen.push(Seen::Write(addr.0, data.to_vec()));
                        }
                        Exit::Hlt => return Flow::Stop("halted"),
                        other => panic!("{other:?}"),
                    }
                    Flow::Continue
                });
        assert_eq!(halt.reason, HaltReason::Handler("halted"));
        let registers = halt.vcpu.registers().unwrap();
        drop(halt);
        (seen, registers)
    });
    let expected = [
        Seen::Out(0x3f8, 1, vec![0x41]),
        Seen::Out(0x3f8, 2, vec![0x42, 0x43]),
        Seen::Out(0x3f8, 4, vec![0x44, 0x45, 0x46, 0x47]),
        Seen::In(0x60, 1, 1),
        Seen::Out(0x80, 1, vec![0x60]),
        Seen::In(0x64, 4, 4),
        Seen::Out(0x84, 4, vec![0x64, 0x65, 0x66, 0x67]),
        Seen::In(0x70, 1, 4),
        Seen::Out(0x90, 1, vec![0x70, 0x71, 0x72, 0x73]),
        Seen::In(0x72, 2, 6),
        Seen::Out(0x92, 2, vec![0x72, 0x73, 0x74, 0x75, 0x76, 0x77]),
        Seen::Write(0xd0000, vec![0x11]),
        Seen::Write(0xd0002, vec![0x33, 0x22]),
        Seen::Write(0xd0004, vec![0x77, 0x66, 0x55, 0x44]),
        Seen::Read(0xd0008, 4),
        Seen::Out(0xa0, 4, vec![0xd4, 0xc3, 0xb2, 0xa1]),
    ];
    // A host may hand a string out in several pieces: the bytes count, and their order.
    assert_eq!(joined(seen), joined(expected.into()));
    assert!(regs.to_string().contains("RAX 00000000a1b2c3d4"), "{regs}");
    assert_eq!(regs.mode(), "real mode");
}

/// Neighbours of the same port and size made one.
fn joined(seen: Vec<Seen>) -> Vec<Seen> {
    let mut all: Vec<Seen> = Vec::new();
    for next in seen {
        match (all.last_mut(), next) {
            (Some(Seen::In(port, size, len)), Seen::In(p, s, l)) if (*port, *size) == (p, s) => {
                *len += l;
            }
            (Some(Seen::Out(port, size, data)), Seen::Out(p, s, d)) if (*port, *size) == (p, s) => {
                data.extend(d);
            }
            (_, next) => all.push(next),
        }
    }
    all
}

#[test]
fn a_triple_fault_halts_with_the_registers_of_the_fault() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::triple_fault());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let vcpu = machine.vcpu(0);
        let reset = vcpu.sregs().unwrap();
        let entry = GuestAddress(LOAD.into());
        vcpu.set_boot_state(&BootState::protected_mode(&reset, entry, 0, 0))
            .unwrap();
        let Err(halt) = set
            .enroll(vcpu)
            .unwrap()
            .run(|_: &VcpuView<'_, _>, exit: Exit<'_>| -> Flow<()> { panic!("{exit:?}") });
        assert_eq!(halt.reason, HaltReason::Shutdown);
        let dump = halt.vcpu.registers().unwrap();
        // kvm_amd resets the vCPU at once, for AMD's processors leave its state undefined.
        if dump.regs.rip == 0xfff0 {
            assert_eq!(dump.mode(), "real mode", "{dump}");
            return;
        }
        assert_eq!(dump.regs.rax, 0xc0de, "{dump}");
        let end = u64::from(LOAD) + guests::vcpu::triple_fault().len() as u64;
        assert!((u64::from(LOAD)..end).contains(&dump.regs.rip), "{dump}");
        assert_eq!(dump.mode(), "32-bit protected mode");
    });
}

#[test]
fn sixty_four_vcpus_each_announce_themselves() {
    const VCPUS: u32 = 64;
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::announce());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let threads: Vec<_> = (0..VCPUS)
            .map(|id| {
                let mut said = None;
                let handler = move |_: &VcpuView<'_, kvm_ioctls::VcpuFd>, exit: Exit<'_>| match exit
                {
                    Exit::PioOut {
                        port: 0x10,
                        size: 4,
                        data,
                    } => {
                        said = data.try_into().ok().map(u32::from_le_bytes);
                        Flow::Continue
                    }
                    Exit::Hlt => Flow::Stop(said),
                    other => panic!("{other:?}"),
                };
                set.spawn(&format!("vcpu{id}"), machine.vcpu(id), handler)
                    .unwrap()
            })
            .collect();
        for (id, thread) in (0..VCPUS).zip(threads) {
            let halt = thread.join().unwrap();
            assert_eq!(halt.vcpu.id(), VcpuId(id));
            assert_eq!(halt.reason, HaltReason::Handler(Some(id)));
        }
        assert!(set.ids().is_empty());
    });
}

#[test]
fn a_vcpu_number_that_is_taken_or_too_high_is_an_error_that_says_so() {
    let machine = Machine::new(&[]);
    let _first = machine.vcpu(0);
    let taken = machine.vm.create_vcpu(VcpuId(0)).unwrap_err();
    assert!(
        taken.to_string().contains("has one of this number"),
        "{taken}"
    );
    let too_high = machine.vm.create_vcpu(VcpuId(u32::MAX)).unwrap_err();
    assert!(
        too_high.to_string().contains("vCPU 4294967295"),
        "{too_high}"
    );
}
