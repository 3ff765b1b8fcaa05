// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every piece of a vCPU's state that is set to something unusual is that in another VM, field by field;
//! and what a host or vCPU cannot take is refused, with its reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Machine, kvm, watchdog};
use kvm_bindings as kvm_abi;
use kvm_core::arch::x86_64::McgCap;
use kvm_core::state::{
    AccessVcpu, ClockRestore, Msr, Passage, Refusal, RestoreError, StateBytes, StateHost,
    TscRestored, VcpuPiece, VcpuState, Xcr,
};
use kvm_core::{Exit, Flow, HaltReason, Pause, Vcpu, VcpuId, VcpuSet, VcpuView};
use kvm_ioctls::VcpuFd;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const PAT: u32 = 0x277;
const LSTAR: u32 = 0xc000_0082;
const MTRR_BASE0: u32 = 0x200;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const KVM_ASYNC_PF: u32 = 0x4b56_4d02;
const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
const KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;

struct Fresh {
    machine: Machine,
    vcpu: Vcpu,
    host: StateHost,
}

/// A vCPU with a CPUID and a local APIC, that has not run.
fn with_cpuid() -> Fresh {
    let fresh = fresh();
    let mut cpuid = kvm().supported_cpuid().unwrap();
    for leaf in cpuid.as_mut_slice() {
        // x2APIC and the deadline timer, as any monitor offers them.
        if leaf.function == 1 {
            leaf.ecx |= 1 << 21 | 1 << 24;
        }
    }
    fresh.vcpu.set_cpuid(&cpuid).unwrap();
    fresh
}

fn fresh() -> Fresh {
    of(Machine::with_irqchip(&[]))
}

fn of(machine: Machine) -> Fresh {
    let vcpu = machine.vm.create_vcpu(VcpuId(0)).unwrap();
    let host = machine.vm.state_host(&kvm()).unwrap();
    Fresh {
        machine,
        vcpu,
        host,
    }
}

impl Fresh {
    fn state(&self) -> VcpuState {
        self.vcpu.state(&self.host).unwrap()
    }

    fn restore(&self, state: &VcpuState) -> Result<(), RestoreError> {
        let restored = self.vcpu.restore(&self.host, state, &Passage::default())?;
        assert!(restored.skipped_msrs.is_empty(), "{restored:?}");
        Ok(())
    }
}

/// Clocks: the TSC, and of Hyper-V's interface the vCPU's run time and the VM's reference time.
const CLOCKS: [u32; 3] = [IA32_TSC, 0x4000_0010, 0x4000_0020];

/// Without what time changes: clocks, and the count that is left of an APIC timer. Without what is made of the
/// rest: the APIC's processor priority, which KVM computes when it is looked at, and on AMD's processors, which
/// have one interrupt shadow, the other name of it.
fn still(mut state: VcpuState) -> VcpuState {
    /// Of a MOV to SS and of an STI.
    const BOTH_SHADOWS: u8 = 3;
    const STI_SHADOW: u8 = 2;
    if state.events.interrupt.shadow == BOTH_SHADOWS {
        state.events.interrupt.shadow = STI_SHADOW;
    }
    state.msrs.retain(|msr| !CLOCKS.contains(&msr.index));
    // The value was written, and KVM made an offset of it.
    state.tsc_offset = None;
    if let Some(page) = &mut state.lapic {
        page.0[0x390..0x394].fill(0);
        page.0[0xa0..0xa4].fill(0);
    }
    state
}

/// A line for each, with its number.
fn msrs(state: &VcpuState) -> String {
    let known = state.msrs.iter();
    let known = known.map(|msr| format!("MSR {:#x}: {:#x}\n", msr.index, msr.value));
    known.collect::<String>() + &format!("{:#x?}", state.unreadable_msrs)
}

/// Field by field, with the names of those that differ.
fn assert_same(there: &VcpuState, wanted: &VcpuState) {
    let (there, wanted) = (still(there.clone()), still(wanted.clone()));
    let differs: Vec<_> = [
        format!("{:#x?}", (&there.cpuid, &there.xcrs, &there.one_registers)),
        format!("{:#x?}", (there.mp_state, there.events, there.registers)),
        format!(
            "{:#x?}",
            (there.system, there.debug, there.tsc_khz, there.mcg_cap)
        ),
        msrs(&there),
    ]
    .into_iter()
    .zip([
        format!(
            "{:#x?}",
            (&wanted.cpuid, &wanted.xcrs, &wanted.one_registers)
        ),
        format!("{:#x?}", (wanted.mp_state, wanted.events, wanted.registers)),
        format!(
            "{:#x?}",
            (wanted.system, wanted.debug, wanted.tsc_khz, wanted.mcg_cap)
        ),
        msrs(&wanted),
    ])
    .flat_map(|(there, wanted)| {
        let lines = there.lines().zip(wanted.lines());
        let differ = lines.filter(|(there, wanted)| there != wanted);
        let differ = differ.map(|(there, wanted)| format!("{there} instead of {wanted}"));
        differ.collect::<Vec<_>>()
    })
    .collect();
    assert!(differs.is_empty(), "{differs:#?}");
    let bytes = |name: &str, there: &[u8], wanted: &[u8]| {
        let differ = (0..there.len().max(wanted.len())).find(|i| there.get(*i) != wanted.get(*i));
        assert_eq!(differ, None, "{name}");
    };
    bytes("XSAVE", &there.xsave, &wanted.xsave);
    let lapic = |state: &VcpuState| state.lapic.clone().unwrap_or_default().0;
    bytes("local APIC", &lapic(&there), &lapic(&wanted));
    // And whatever was not named here.
    assert_eq!(there, wanted);
}

/// Restores `state` in a new VM, reads it there, and restores what was read in a third.
fn travels(state: &VcpuState) {
    let second = fresh();
    second.restore(state).unwrap();
    let there = second.state();
    assert_same(&there, state);
    let third = fresh();
    third.restore(&there).unwrap();
    assert_same(&third.state(), &there);
}

#[test]
fn a_vcpu_that_has_only_a_cpuid_travels() {
    travels(&with_cpuid().state());
}

#[test]
fn general_registers_travel() {
    let mut state = with_cpuid().state();
    let r = &mut state.registers;
    let all = [
        &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rsp,
        &mut r.rbp, &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13,
        &mut r.r14, &mut r.r15, &mut r.rip,
    ];
    for (register, n) in all.into_iter().zip(1_u64..) {
        *register = n * 0x0101_0101_0101_0101;
    }
    r.rflags = 0x0000_08d7;
    travels(&state);
}

#[test]
fn system_registers_travel() {
    let mut state = with_cpuid().state();
    let s = &mut state.system;
    let segments = [&mut s.ds, &mut s.es, &mut s.fs, &mut s.gs];
    for (segment, n) in segments.into_iter().zip(1_u16..) {
        segment.base = u64::from(n) * 0x1_1000;
        segment.selector = n << 3;
        segment.limit = (0xf_ffff + u32::from(n) * 0x10_0000) | 0xfff;
        segment.g = 1;
        segment.db = 1;
        segment.avl = 1;
    }
    (s.gdt.base, s.gdt.limit) = (0x1234_5000, 0x7f);
    (s.idt.base, s.idt.limit) = (0x2345_6000, 0xfff);
    (s.ldt.base, s.ldt.selector) = (0x3456_7000, 0x28);
    (s.cr2, s.cr3, s.cr8) = (0xdead_b000, 0x7000, 5);
    // Of a local APIC that is enabled, at its place, x2APIC, of the boot processor.
    s.apic_base = 0xfee0_0000 | 0xd00;
    // CR8 is the APIC's task priority, and here its processor priority.
    let page = &mut state.lapic.as_mut().unwrap().0;
    page[0x80] = 0x50;
    page[0xa0] = 0x50;
    // In x2APIC mode the logical destination is a function of the id.
    page[0xd0..0xd4].copy_from_slice(&1_u32.to_le_bytes());
    travels(&state);
}

#[test]
fn page_directory_pointers_travel_whatever_memory_says() {
    let fresh = with_cpuid();
    if !fresh.host.sregs2 {
        return println!("NOT TRIED: this KVM has no KVM_CAP_SREGS2");
    }
    let mut state = fresh.state();
    let s = &mut state.system;
    (s.cr0, s.cr4, s.cr3) = (s.cr0 | 1 << 31 | 1, 1 << 5, 0x2000);
    s.pdptrs = Some([0x3001, 0x4001, 0x5001, 0x6001]);
    let to = with_cpuid();
    to.vcpu.fd().set_system(&state.system, true).unwrap();
    if to.state().system.cr0 != state.system.cr0 {
        return println!("NOT TRIED: this KVM has no paging outside long mode");
    }
    // Memory at CR3 is zeroes in the new VM.
    travels(&state);
}

#[test]
fn floating_point_and_vector_registers_travel() {
    let mut state = with_cpuid().state();
    let host = fresh().host;
    let leaf = host
        .cpuid
        .iter()
        .find(|leaf| leaf.function == 0xd && leaf.index == 0);
    let components = leaf.map_or(3, |leaf| u64::from(leaf.eax)) & 0xe7;
    if !state.xcrs.is_empty() {
        state.xcrs = vec![Xcr {
            index: 0,
            value: components,
        }];
    }
    let area = &mut state.xsave.0;
    area[0..2].copy_from_slice(&0x27f_u16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f81_u32.to_le_bytes());
    // ST0 and XMM15.
    area[32..42].fill(0x3f);
    area[160 + 15 * 16..176 + 15 * 16].fill(0xa5);
    if components & 4 != 0 {
        // The upper half of YMM3, where CPUID says that it is.
        let leaf = host
            .cpuid
            .iter()
            .find(|leaf| leaf.function == 0xd && leaf.index == 2);
        let at = leaf.unwrap().ebx as usize + 3 * 16;
        area[at..at + 16].fill(0x5a);
    }
    area[512..520].copy_from_slice(&(components & 7).to_le_bytes());
    // Twice is as once: KVM adds components that it always has, in their initial state.
    let second = fresh();
    second.restore(&state).unwrap();
    let there = second.state();
    assert_eq!(there.xcrs, state.xcrs);
    assert_eq!(there.xsave[..512 - 96], state.xsave[..512 - 96]);
    assert_eq!(there.xsave[576..], state.xsave[576..]);
    travels(&there);
}

#[test]
fn debug_registers_travel() {
    let mut state = with_cpuid().state();
    state.debug.db = [0x1111_0000, 0x2222_0000, 0x3333_0000, 0x4444_0000];
    (state.debug.dr6, state.debug.dr7) = (0xffff_0ff1, 0x0000_0401);
    travels(&state);
}

#[test]
fn what_is_being_injected_travels() {
    let first = with_cpuid().state();
    let mut nmi = first.clone();
    (nmi.events.nmi.pending, nmi.events.nmi.masked) = (1, 1);
    travels(&nmi);
    let mut interrupt = first.clone();
    (
        interrupt.events.interrupt.injected,
        interrupt.events.interrupt.vector,
    ) = (1, 0x31);
    travels(&interrupt);
    let mut shadow = first.clone();
    shadow.events.interrupt.shadow = kvm_abi::KVM_X86_SHADOW_INT_STI as u8;
    travels(&shadow);
    let mut exception = first;
    let event = &mut exception.events.exception;
    (event.injected, event.vector) = (1, 13);
    (event.has_error_code, event.error_code) = (1, 0x18);
    travels(&exception);
}

#[test]
fn every_mp_state_travels() {
    for mp_state in [
        kvm_abi::KVM_MP_STATE_RUNNABLE,
        kvm_abi::KVM_MP_STATE_UNINITIALIZED,
        kvm_abi::KVM_MP_STATE_INIT_RECEIVED,
        kvm_abi::KVM_MP_STATE_HALTED,
    ] {
        let mut state = with_cpuid().state();
        state.mp_state = mp_state;
        travels(&state);
    }
}

#[test]
fn the_local_apic_and_its_deadline_travel() {
    let mut state = with_cpuid().state();
    let page = &mut state.lapic.as_mut().unwrap().0;
    let mut set = |at: usize, value: u32| page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    set(0xf0, 0x1ff);
    set(0x350, 0x0000_0700);
    set(0x360, 0x0000_0400);
    set(0x320, 0x0004_0040);
    set(0x220, 0x0000_0100);
    set(0x110, 0x0000_0002);
    // So far away that no timer expires meanwhile.
    let deadline = u64::MAX >> 8;
    let msr = state.msrs.iter_mut().find(|m| m.index == IA32_TSC_DEADLINE);
    msr.expect("a deadline is listed").value = deadline;
    travels(&state);
    let there = fresh();
    there.restore(&state).unwrap();
    assert_eq!(there.state().msr(IA32_TSC_DEADLINE), Some(deadline));
}

#[test]
fn model_specific_registers_travel_those_that_no_list_has_too() {
    let mut state = with_cpuid().state();
    let set = [
        (PAT, 0x0007_0406_0007_0406),
        (LSTAR, 0xffff_ffff_8100_0000),
        (0x174, 0x10),
        (0xc000_0102, 0x7fff_1234_5000),
        (MTRR_BASE0, 0xc000_0006),
        (MTRR_BASE0 + 1, 0x7f_c000_0800),
        (0x250, 0x0606_0606_0606_0606),
        (MTRR_DEF_TYPE, 0xc06),
        // One register by two names.
        (KVM_SYSTEM_TIME, 0x3000 | 1),
        (KVM_SYSTEM_TIME_OLD, 0x3000 | 1),
        (KVM_STEAL_TIME, 0x4000 | 1),
        (KVM_ASYNC_PF_INT, 0xec),
        (KVM_ASYNC_PF, 0x5000 | 1 | 8),
        // The status of a machine check bank.
        (0x401, 0),
        (0x402, 0xabcd_e000),
    ];
    let (mut tried, mut not_there) = (0, Vec::new());
    for (index, value) in set {
        match state.msrs.iter_mut().find(|msr| msr.index == index) {
            Some(msr) => (msr.value, tried) = (value, tried + 1),
            None => not_there.push(index),
        }
    }
    println!("{tried} MSRs; not on this host: {not_there:x?}");
    assert!(tried >= 10);
    travels(&state);
    assert!(
        state
            .unreadable_msrs
            .iter()
            .all(|index| state.msr(*index).is_none())
    );
}

/// A guest that looks at the token of a "page ready" until there is one, and says it. Real mode; the structure that KVM
/// and a guest share for asynchronous page faults is at 0x5000.
const SAYS_THE_TOKEN: &[u8] = &[
    0x66, 0xa1, 0x04, 0x50, //  again: mov eax, [0x5004]
    0x66, 0x85, 0xc0, //        test eax, eax
    0x74, 0xf7, //              jz again
    0x66, 0xe7, 0x10, //        out 0x10, eax
    0xf4, //                    hlt
];

/// Firecracker 3020 and 5322: the pages that a guest's tasks wait for at a snapshot were promised by a VM that is no more.
#[test]
fn who_waits_for_a_page_is_woken_when_its_guest_is_restored() {
    const ALL: u32 = u32::MAX;
    const VECTOR: u32 = 0xec;
    watchdog(|| {
        let machine = Machine::with_irqchip(SAYS_THE_TOKEN);
        let (vcpu, host) = (machine.vcpu(0), machine.vm.state_host(&kvm()).unwrap());
        let mut state = vcpu.state(&host).unwrap();
        // Of a guest that has enabled its local APIC.
        let page = &mut state.lapic.as_mut().unwrap().0;
        page[0xf0..0xf4].copy_from_slice(&0x1ff_u32.to_le_bytes());
        for (index, value) in [
            (KVM_ASYNC_PF, 0x5000 | 1 | 8),
            (KVM_ASYNC_PF_INT, VECTOR.into()),
        ] {
            match state.msrs.iter_mut().find(|msr| msr.index == index) {
                Some(msr) => msr.value = value,
                None => return println!("NOT TRIED: this KVM has no asynchronous page faults"),
            }
        }
        let there = Machine::with_irqchip(SAYS_THE_TOKEN);
        let to = there.vcpu(0);
        to.restore(&host, &state, &Passage::default()).unwrap();
        let set = VcpuSet::new(there.vm.identity().clone());
        let handler = |view: &VcpuView<'_, VcpuFd>, exit: Exit<'_>| match exit {
            Exit::PioOut { data, .. } => {
                let lapic = view.fd().get_lapic().unwrap().regs;
                // The interrupt requests, 32 to a register.
                let at = 0x200 + VECTOR as usize / 32 * 0x10;
                let requests = lapic[at + (VECTOR as usize % 32) / 8] as u8;
                Flow::Stop((data.to_vec(), requests >> (VECTOR % 8) & 1))
            }
            exit => panic!("{exit:?}"),
        };
        let thread = set.spawn("vcpu", to, handler).unwrap();
        let told = (ALL.to_le_bytes().to_vec(), 1);
        assert_eq!(thread.join().unwrap().reason, HaltReason::Handler(told));
    });
}

/// Firecracker 5738.
#[test]
fn a_state_that_has_lost_the_vector_of_asynchronous_page_faults_is_refused() {
    let from = with_cpuid();
    let mut state = from.state();
    let Some(msr) = state.msrs.iter_mut().find(|msr| msr.index == KVM_ASYNC_PF) else {
        return println!("NOT TRIED: this KVM has no asynchronous page faults");
    };
    msr.value = 0x5000 | 1 | 8;
    state.msrs.retain(|msr| msr.index != KVM_ASYNC_PF_INT);
    let to = with_cpuid();
    let before = still(to.state());
    let refused = to.vcpu.restore(&to.host, &state, &Passage::default());
    let expected = Refusal::AsyncPfVector { enable: 0x5009 };
    assert_eq!(refused.unwrap_err(), RestoreError::Refused(expected));
    assert_same(&still(to.state()), &before);
    // Of a guest that is not told by interrupt, no vector is no loss.
    for off in [0, 0x5000 | 1] {
        let msr = state.msrs.iter_mut().find(|msr| msr.index == KVM_ASYNC_PF);
        msr.unwrap().value = off;
        assert_eq!(to.host.check(&state), Ok(()));
    }
}

#[test]
fn machine_check_banks_travel_with_their_number() {
    let mut state = with_cpuid().state();
    if state.mcg_cap.is_none() {
        return println!("NOT TRIED: this KVM has no machine check banks");
    }
    state.mcg_cap = Some(7);
    state
        .msrs
        .retain(|msr| !(0x400 + 4 * 7..0x480).contains(&msr.index));
    for msr in &mut state.msrs {
        match msr.index {
            0x400 => msr.value = u64::MAX,
            0x402 => msr.value = 0xabcd_e000,
            _ => {}
        }
    }
    travels(&state);
}

#[test]
fn when_a_bank_tells_of_corrected_errors_travels() {
    const MCG_CMCI_P: u64 = 1 << 10;
    if kvm().machine_check_support().unwrap().0 & MCG_CMCI_P == 0 {
        return println!("NOT TRIED: this KVM has no MCG_CMCI_P");
    }
    let from = with_cpuid();
    let cap = McgCap(MCG_CMCI_P | 7);
    from.vcpu.set_machine_check_cap(cap).unwrap();
    let mut state = from.state();
    let second = |msr: &&mut Msr| (0x280..0x287).contains(&msr.index);
    assert_eq!(state.msrs.iter_mut().filter(second).count(), 7);
    for msr in state.msrs.iter_mut().filter(second) {
        // CMCI_EN, and a threshold.
        msr.value = 1 << 30 | u64::from(msr.index);
    }
    travels(&state);
}

#[test]
fn a_frequency_of_the_time_stamp_counter_travels_where_it_can_be_scaled() {
    let mut state = with_cpuid().state();
    if !fresh().host.tsc_control {
        return println!("NOT TRIED: this KVM has no KVM_CAP_TSC_CONTROL");
    }
    state.tsc_khz = state.tsc_khz / 10 * 9;
    travels(&state);
}

#[test]
fn the_offset_of_the_time_stamp_counter_is_set_where_the_hosts_counter_is_known() {
    let from = with_cpuid();
    let mut state = from.state();
    if state.tsc_offset.is_none() {
        return println!("NOT TRIED: this KVM has no KVM_VCPU_TSC_OFFSET");
    }
    // SAFETY: RDTSC needs nothing.
    let host = unsafe { std::arch::x86_64::_rdtsc() };
    let guest = 1_000_000_000_000_u64;
    state.tsc_offset = Some(guest.wrapping_sub(host));
    for msr in &mut state.msrs {
        if msr.index == IA32_TSC {
            msr.value = guest;
        }
    }
    let passage = Passage {
        elapsed: 2_000_000,
        host_tsc: Some((host, host + 1000)),
    };
    let to = fresh();
    let restored = to.vcpu.restore(&to.host, &state, &passage).unwrap();
    if restored.tsc == TscRestored::HostsOwn {
        return println!("NOT TRIED: this KVM shows its guests the host's counter");
    }
    assert_eq!(restored.tsc, TscRestored::Offset);
    let moved = u64::from(state.tsc_khz) * 2;
    let expected = state
        .tsc_offset
        .unwrap()
        .wrapping_add(moved)
        .wrapping_sub(1000);
    assert_eq!(to.state().tsc_offset, Some(expected));
}

#[test]
fn the_vms_clock_goes_on_from_where_it_was_or_from_where_it_should_be() {
    let saved = {
        let from = fresh();
        let mut saved = from.machine.vm.state().unwrap();
        saved.clock.nanoseconds += 3_600_000_000_000;
        // Saved a minute ago.
        saved.clock.realtime -= 60_000_000_000;
        saved
    };
    let to = fresh();
    let passage = to
        .machine
        .vm
        .restore(&saved, ClockRestore::AsSaved)
        .unwrap();
    let now = to.machine.vm.state().unwrap().clock.nanoseconds;
    assert!(now >= saved.clock.nanoseconds + passage.elapsed);
    let to = fresh();
    let passage = to
        .machine
        .vm
        .restore(&saved, ClockRestore::Advanced)
        .unwrap();
    assert!(passage.elapsed >= 60_000_000_000, "{passage:?}");
}

#[test]
fn a_vcpu_may_be_taken_back_to_an_earlier_state_of_its_own_while_it_is_paused() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::spin());
        let host = machine.vm.state_host(&kvm()).unwrap();
        let set = VcpuSet::new(machine.vm.identity().clone());
        let handler = |_: &VcpuView<'_, VcpuFd>, _: Exit<'_>| Flow::<()>::Continue;
        let thread = set.spawn("vcpu", machine.vcpu(0), handler).unwrap();
        let counted = |pause: &Pause| {
            let count = |vcpu: &VcpuView<'_, VcpuFd>| vcpu.registers().unwrap().regs.rax;
            pause.with_vcpu(VcpuId(0), count).unwrap()
        };
        let begun = |set: &VcpuSet| loop {
            let pause = set.pause().unwrap();
            // Not before its thread has begun, and not before it has counted.
            let count = |vcpu: &VcpuView<'_, VcpuFd>| vcpu.registers().unwrap().regs.rax;
            match pause.with_vcpu(VcpuId(0), count) {
                Ok(1..) => return pause,
                _ => drop(pause),
            }
            std::thread::yield_now();
        };
        let pause = begun(&set);
        let early = {
            let host = host.clone();
            let state = move |vcpu: &VcpuView<'_, VcpuFd>| vcpu.state(&host).unwrap();
            pause.with_vcpu(VcpuId(0), state).unwrap()
        };
        let at = counted(&pause);
        assert_eq!(early.registers.rax, at);
        drop(pause);
        let pause = loop {
            let pause = set.pause().unwrap();
            if counted(&pause) != at {
                break pause;
            }
        };
        let back = early.clone();
        let restore = move |vcpu: &VcpuView<'_, VcpuFd>| {
            vcpu.restore(&host, &back, &Passage::default()).map(drop)
        };
        pause.with_vcpu(VcpuId(0), restore).unwrap().unwrap();
        assert_eq!(counted(&pause), at);
        drop(pause);
        set.stop().unwrap();
        assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    });
}

/// Pauses at each exit, and hands the pauses out.
fn states_at_every_exit(guest: &[u8]) -> Vec<(String, VcpuState)> {
    let machine = Machine::new(guest);
    let host = machine.vm.state_host(&kvm()).unwrap();
    let set = VcpuSet::new(machine.vm.identity().clone());
    let (send, pauses) = std::sync::mpsc::channel();
    let own = set.clone();
    // Gone at the end, although the handler lives on in the thread's result.
    let (mut send, mut count) = (Some(send), 0_u8);
    let handler = move |_: &VcpuView<'_, VcpuFd>, exit: Exit<'_>| -> Flow<()> {
        count += 1;
        let kind = match exit {
            Exit::PioIn { data, .. } | Exit::MmioRead { data, .. } => {
                data.fill(count);
                format!("read {count}")
            }
            Exit::Hlt => {
                send = None;
                return Flow::Stop(());
            }
            _ => "write".into(),
        };
        let send = send.as_ref().unwrap();
        send.send((kind, own.begin_pause())).unwrap();
        Flow::Continue
    };
    let thread = set.spawn("vcpu", machine.vcpu(0), handler).unwrap();
    let mut states = Vec::new();
    for (kind, pause) in pauses {
        let host = host.clone();
        let state = move |vcpu: &VcpuView<'_, VcpuFd>| vcpu.state(&host).unwrap();
        states.push((kind, pause.with_vcpu(VcpuId(0), state).unwrap()));
    }
    assert_eq!(thread.join().unwrap().reason, HaltReason::Handler(()));
    states
}

/// A guest that halts, before its first instruction.
fn halts() -> Fresh {
    let machine = Machine::new(guests::vcpu::halt());
    let (vcpu, host) = (machine.vcpu(0), machine.vm.state_host(&kvm()).unwrap());
    Fresh {
        machine,
        vcpu,
        host,
    }
}

/// What KVM writes of the time into kvm-clock's page, and with it what the guest is told beside: the page's flags.
fn clock_flags(of: Fresh, page: u64) -> u8 {
    let Fresh { machine, vcpu, .. } = of;
    let set = VcpuSet::new(machine.vm.identity().clone());
    let handler = |_: &VcpuView<'_, VcpuFd>, exit: Exit<'_>| -> Flow<()> {
        assert!(matches!(exit, Exit::Hlt), "{exit:?}");
        Flow::Stop(())
    };
    let thread = set.spawn("vcpu", vcpu, handler).unwrap();
    assert_eq!(thread.join().unwrap().reason, HaltReason::Handler(()));
    // `struct pvclock_vcpu_time_info`: the version, which an update makes even and not 0; tsc_shift, then flags.
    assert_ne!(machine.memory.word(page), 0, "the clock was never written");
    (machine.memory.word(page + 28) >> 8) as u8
}

#[test]
fn a_guest_with_kvm_clock_hears_that_it_stood_still_when_it_is_restored() {
    const GUEST_STOPPED: u8 = 1 << 1;
    const PAGE: u64 = 0x3000;
    watchdog(|| {
        let clock = [kvm_abi::kvm_msr_entry {
            index: KVM_SYSTEM_TIME,
            data: PAGE | 1,
            ..Default::default()
        }];
        let with_clock = || {
            let fresh = halts();
            assert_eq!(fresh.vcpu.set_msrs(&clock).unwrap(), []);
            fresh
        };
        let state = with_clock().state();
        assert_eq!(clock_flags(with_clock(), PAGE) & GUEST_STOPPED, 0);
        let restored = halts();
        restored.restore(&state).unwrap();
        assert_ne!(clock_flags(restored, PAGE) & GUEST_STOPPED, 0);
        // Who has no such clock is restored as well: the other tests' have none.
    });
}

#[test]
fn a_state_taken_in_the_middle_of_a_read_has_what_was_read_in_it() {
    watchdog(|| {
        let states = states_at_every_exit(guests::vcpu::exits());
        // IN of one byte, IN of four, and the MMIO read: the register is the device's answer, and RIP
        // is behind the instruction.
        let reads: Vec<_> = states
            .iter()
            .enumerate()
            .filter(|(_, (kind, _))| kind.starts_with("read"))
            .collect();
        assert!(reads.len() >= 3);
        let answer = |at: usize, bytes: u32| {
            let (kind, state) = &states[at];
            let count: u64 = kind["read ".len()..].parse().unwrap();
            let mask = if bytes == 1 { 0xff } else { 0xffff_ffff };
            assert_eq!(
                state.registers.rax & mask,
                (count * 0x0101_0101) & mask,
                "{kind}"
            );
            assert_ne!(state.registers.rip, states[at - 1].1.registers.rip);
        };
        answer(reads[0].0, 1);
        answer(reads[1].0, 4);
        answer(reads[reads.len() - 1].0, 4);
    });
}

#[test]
fn a_vcpu_without_the_local_apic_takes_no_state_that_has_one_and_the_other_way_round() {
    let with = with_cpuid();
    let without = of(Machine::new(&[]));
    let refused = |to: &Fresh, state: &VcpuState| {
        let before = still(to.state());
        let error = to.restore(state).unwrap_err();
        assert_eq!(still(to.state()), before);
        error
    };
    let place = |state| RestoreError::Refused(Refusal::LapicPlace { state });
    assert_eq!(refused(&without, &with.state()), place(true));
    assert_eq!(refused(&fresh(), &without.state()), place(false));
    // And one without, in a VM without, is fine.
    of(Machine::new(&[])).restore(&without.state()).unwrap();
}

#[test]
fn a_refused_state_names_its_reason_and_leaves_the_vcpu_as_it_was() {
    type Spoil = fn(&mut VcpuState, &StateHost);
    let cases: [(&str, Spoil); 7] = [
        ("CPUID 0x1.0 ECX bits 0x", |state, host| {
            let has = host
                .cpuid
                .iter()
                .find(|leaf| leaf.function == 1)
                .unwrap()
                .ecx;
            let missing = !has & !(1 << 21 | 1 << 24 | 1 << 27 | 1 << 31);
            for leaf in &mut state.cpuid {
                if leaf.function == 1 {
                    leaf.ecx |= missing & missing.wrapping_neg();
                }
            }
        }),
        ("MSR 0xdead = 0x17", |state, _| {
            let (index, value) = (0xdead, 0x17);
            state.msrs.push(Msr { index, value });
        }),
        ("XSAVE components 0x4000000000000000", |state, _| {
            state.xsave.0[519] |= 0x40;
        }),
        ("XSAVE area has 100 bytes", |state, _| {
            state.xsave.0.truncate(100)
        }),
        ("1024 bytes, not 3", |state, _| {
            state.lapic = Some(StateBytes(vec![0; 3]))
        }),
        ("physical addresses of 99 bits", |state, _| {
            for leaf in &mut state.cpuid {
                if leaf.function == 0x8000_0008 {
                    leaf.eax = leaf.eax & !0xff | 99;
                }
            }
        }),
        ("300 leaves", |state, _| {
            state.cpuid.resize(300, Default::default())
        }),
    ];
    let state = with_cpuid().state();
    for (text, spoil) in cases {
        let to = fresh();
        let before = still(to.state());
        let mut spoilt = state.clone();
        spoil(&mut spoilt, &to.host);
        let error = to.restore(&spoilt).unwrap_err();
        assert!(matches!(error, RestoreError::Refused(_)), "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert!(!error.to_string().contains('\n'));
        assert_eq!(still(to.state()), before);
        // And it can still be restored.
        to.restore(&state).unwrap();
    }
}

#[test]
fn an_msr_that_kvm_does_not_take_is_named_with_both_values() {
    /// Bits 4 and 5.
    const RESERVED: u64 = 0x5030;
    let mut state = with_cpuid().state();
    for msr in &mut state.msrs {
        if msr.index == KVM_ASYNC_PF {
            msr.value = RESERVED;
        }
    }
    let to = fresh();
    let error = to.restore(&state).unwrap_err();
    let RestoreError::Msr { index, value, host } = error else {
        panic!("{error}");
    };
    assert_eq!((index, value, host), (KVM_ASYNC_PF, RESERVED, Some(0)));
    let text = "MSR 0x4b564d02 = 0x5030 (it is 0x0 here)";
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn a_piece_that_kvm_does_not_take_is_named() {
    let mut state = with_cpuid().state();
    state.mp_state = 0x7777;
    let error = fresh().restore(&state).unwrap_err();
    let piece = VcpuPiece::MpState;
    assert!(
        matches!(error, RestoreError::Failed { piece: p, .. } if p == piece),
        "{error}"
    );
}

#[test]
fn a_register_of_another_size_is_refused_before_kvm_writes_it() {
    let fresh = fresh();
    let register = kvm_core::state::OneRegister {
        id: 0x2010_0000_0000_0000,
        value: 0,
    };
    let error = fresh.vcpu.fd().set_one_register(&register).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
    for nested in [&[][..], &[0xff; 128]] {
        let error = fresh.vcpu.fd().set_nested(nested).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
    }
}
