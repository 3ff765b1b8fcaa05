// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What of debugging this host's KVM really does, tried with a guest of a few bytes.
//!
//! No capability tells. A KVM that interprets guests accepts a watchpoint and never reports it; and at
//! an `int3` in protected mode it ends the guest. A debugger that trusted it would wait for ever, or
//! kill the guest that it debugs. A trial is a VM of its own and takes about a millisecond (more where
//! freeing a VM waits for a grace period), and is made when gdb first asks for what depends on it.

use std::path::Path;

use kvm_core::arch::x86_64::{
    Access, BootState, GuestDebug, HardwareBreakpoint, HardwareBreakpoints, gdt,
};
use kvm_core::{Exit, Flow, HaltReason, KickSignal, Kvm, VcpuId, VcpuSet, VcpuView};
use kvm_ioctls::VcpuFd;
use memslots::{Backing, SlotFlags};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::slots_of;

const MEMORY: u64 = 0x1_0000;
const GDT: u64 = 0x1000;
const CODE: u64 = 0x2000;
const DATA: u64 = 0x3000;

/// Whether a watchpoint stops a guest.
pub(super) fn watchpoints(kvm: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let mut hardware = HardwareBreakpoints::default();
    hardware.insert(HardwareBreakpoint::new(DATA, 4, Access::Write)?)?;
    let debug = GuestDebug {
        hardware,
        ..Default::default()
    };
    // mov [DATA], eax; nop; hlt
    debug_exit(kvm, &[0xa3, 0x00, 0x30, 0x00, 0x00, 0x90, 0xf4], &debug)
}

/// Whether an `int3` in protected mode comes out of the guest.
pub(super) fn software_breakpoints(kvm: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let debug = GuestDebug {
        software: true,
        ..Default::default()
    };
    // int3; hlt
    debug_exit(kvm, &[0xcc, 0xf4], &debug)
}

/// Runs `code` in flat 32-bit mode, which ends it in any case, and says whether that was a debug exit.
fn debug_exit(
    kvm: &Path,
    code: &[u8],
    debug: &GuestDebug,
) -> Result<bool, Box<dyn std::error::Error>> {
    let setup = Kvm::open_at(kvm)?.create_vm()?;
    let slots = slots_of(setup.fd().clone());
    let _slot = slots.create(GuestAddress(0), Backing::anonymous(MEMORY), SlotFlags::NONE)?;
    let memory = slots.snapshot();
    let gdt = gdt(false);
    memory.write_slice(&gdt, GuestAddress(GDT))?;
    memory.write_slice(code, GuestAddress(CODE))?;
    drop(memory);
    setup.set_tss_address(crate::arch::layout::TSS_ADDR)?;
    let vm = setup.kick_signal(KickSignal::new(libc::SIGURG)?).finish();
    let vcpu = vm.create_vcpu(VcpuId(0))?;
    let mut state = BootState::protected_mode(&vcpu.sregs()?, GuestAddress(CODE), 0, 0);
    (state.sregs.gdt.base, state.sregs.gdt.limit) = (GDT, gdt.len() as u16 - 1);
    vcpu.set_boot_state(&state)?;
    vcpu.set_guest_debug(debug)?;
    let runner = VcpuSet::new(vm.identity().clone()).enroll(vcpu)?;
    let Err(halt) = runner.run(|_: &VcpuView<'_, VcpuFd>, exit: Exit<'_>| {
        Flow::Stop(matches!(exit, Exit::Debug { .. }))
    });
    Ok(halt.reason == HaltReason::Handler(true))
}
