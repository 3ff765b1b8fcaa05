// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole state: all that KVM knows of a vCPU, and of a VM's clock, as plain data; read and written in
//! the order that KVM needs; and refused, with its reason, by a host that cannot take it.
//!
//! ```text
//!   Vm::state_host ─► StateHost                     what this host saves and takes
//!   (Kvm::listed_host ─► ListedHost::complete_by ─► StateHost, where a vCPU is there to be asked)
//!   paused:  Pause::with_vcpu ─► VcpuView::state ─► VcpuState ──serde──► … ─┐
//!            Vm::state ───────────────────────────► VmState   ──serde──► … ─┤
//!   a new VM, its memory in place:                                          │
//!            Vm::create_vcpu, of all                                        │
//!            Vm::restore ─► Passage ◄───────────────────────────────────────┤
//!            Vcpu::restore (each vCPU, before it is enrolled) ◄─────────────┘
//! ```
//!
//! Guest memory and the interrupt controllers are not here: slots are memslots', PICs, IOAPIC and timer
//! irq-routing's, whose state has the same form (named fields, the same feature `with-serde`).
//!
//! # When
//!
//! All vCPUs are paused, and each has completed the access that it was at: `KVM_RUN` with
//! `immediate_exit` until it says `EINTR`, which is how this crate's vCPUs park. A state that is read
//! in the middle of an access has its registers before and its device after it. Other vCPUs must not
//! run either: an INIT or an NMI from one of them would arrive between two pieces.
//!
//! # The order of saving ([`VcpuPiece::SAVE_ORDER`])
//!
//! 1. **MP state**: its ioctl takes a pending INIT or SIPI, which resets or starts the vCPU: registers,
//!    segments and events are others afterwards.
//! 2. **Events**: in a VM without exception payloads their ioctl delivers the side effect of a pending
//!    exception: CR2 and DR6 are others afterwards.
//! 3. Registers of all kinds, in any order.
//! 4. **MSRs before the local APIC**: a deadline timer that expires clears `IA32_TSC_DEADLINE` and sets
//!    the interrupt in the APIC, at once on hosts that post it, vCPU paused or not. Read in this order
//!    it is in one of the two at least; the other way round it can be in neither, and the guest's timer
//!    is dead (seen by Firecracker, which replaces a deadline of 0 by the present).
//!
//! # The order of restoring ([`VcpuPiece::RESTORE_ORDER`])
//!
//! 1. **CPUID**: it decides which bits of CR4 and EFER, which XSAVE components and which MSRs exist.
//! 2. **TSC frequency**: TSC, deadline and kvm-clock are computed by it.
//! 3. **Machine check banks**: `MCG_CAP` says how many there are, and setting it resets them.
//! 4. **System registers**: the APIC base decides how the APIC page is read (x2APIC), EFER.SVME and
//!    CR4.VMXE whether nested state is taken.
//! 5. **XCRs, XSAVE**: before the MSRs, of which `IA32_XFD` closes components.
//! 6. **Debug and general registers**: `KVM_SET_REGS` forgets a pending exception, so before the events.
//! 7. **Local APIC** before the MSRs: a deadline is dropped, with success, while the APIC's timer is in
//!    another mode (kata-containers 13798).
//! 8. **TSC offset**, then the MSRs, `IA32_TSC` first and `IA32_TSC_DEADLINE` last: a deadline that is
//!    compared with a TSC not yet set fires at once or never (Firecracker 4666). A TSC that has its
//!    offset is not written a second time: two vCPUs whose offsets differ for a moment lose the VM its
//!    master clock (cloud-hypervisor 8383).
//! 9. **Other registers** of KVM, **nested state**: they need all of the above. Nested state loads what
//!    vmcs12 or vmcb12 say, which is what was saved.
//! 10. **Events** after what clears or queues them (registers, nested state, system registers).
//! 11. **MP state** behind those: it is refused where INIT and SIPI are not possible, by what the events say.
//! 12. **kvm-clock's gap**, behind its MSRs: what `KVM_KVMCLOCK_CTRL` told KVM when the vCPU was paused is in no state, and
//!     a guest that does not hear of it takes the time between for its own: soft lockups and RCU stalls of a minute.
//!
//! The VM's clock goes before the vCPUs' state: kvm-clock's MSRs are answered with the clock of that
//! moment, and it says by how much the TSCs are to move ([`Passage`]). But it goes after all vCPUs were
//! made: KVM tells the host's TSC beside the clock (`KVM_CLOCK_HOST_TSC`) only while the VM has a master
//! clock, which takes as many vCPUs with matching TSCs as there are vCPUs, and one at least
//! (`nr_vcpus_matched_tsc + 1 == online_vcpus`). Those that were just made match; a VM without any has no
//! master clock, so that a clock restored into it sends the TSCs by value. Memory slots go before everything: the
//! MSRs of kvm-clock, steal time and asynchronous page faults name guest memory, and KVM refuses them
//! where there is none. The in-kernel PICs and IOAPIC go after the local APICs.
//!
//! # MSRs
//!
//! [`StateHost`] has all that the host lists, kvm-clock's and those of asynchronous page faults among
//! them, and adds what the list leaves out: memory types (cloud-hypervisor 7944 lost them) and machine
//! check banks. One that is listed and cannot be read is named in [`VcpuState::unreadable_msrs`].
//!
//! # Asynchronous page faults
//!
//! A guest that takes part in them may wait, at the moment of a snapshot, for pages that were promised to it under tokens.
//! KVM has no call that says which, and a new VM knows none of them: so nothing of it is saved, and KVM, when the MSR that
//! switches them on is written at the restore, queues one "page ready" for all tokens. Whoever waits looks again, and
//! nobody waits for ever (Firecracker 3020, 5322). It takes that the vector is there before it (a state that lacks the vector is
//! refused: Firecracker 5738), that the local APIC was restored before, enabled as it was (before Linux 5.13 the vCPU would
//! spin until it is: cloud-hypervisor 2277, which 2498 answered by hiding the feature), and that the guest's memory is what
//! it was when the MSRs were read: the token that waits to be acknowledged is in it.
//!
//! # All or nothing
//!
//! [`StateHost::check`] compares a state with the host before the first ioctl that changes anything:
//! CPUID features, XSAVE components and their layout, MSRs, frequency, capabilities. What only KVM
//! knows comes out later, as [`RestoreError::Failed`] or [`RestoreError::Msr`]: these say which piece
//! it was, and the vCPU is then half one and half the other: throw it away, and its VM with it.

mod bytes;
mod check;
mod clock;
mod cpuid;
mod error;
mod events;
#[cfg(any(test, feature = "test-utilities"))]
pub mod fake;
mod host;
mod mirror;
mod msr;
mod piece;
mod registers;
mod restore;
mod save;
mod version;
mod xsave;

pub use bytes::StateBytes;
pub use clock::{AccessClock, ClockError, ClockRestore, ClockState, Passage, VmState};
pub use error::{Refusal, RestoreError, SaveError};
pub use events::{Events, ExceptionEvent, InterruptEvent, NmiEvent, SmiEvent};
pub use host::{AccessVcpu, StateHost};
pub use piece::VcpuPiece;
pub use registers::{
    CpuidLeaf, DebugRegisters, DescriptorTable, GeneralRegisters, Msr, OneRegister, Segment,
    SystemRegisters, Xcr,
};
pub use restore::{Restored, TscRestored};
pub use version::{StateVersion, UnknownVersion};

/// Bytes of a local APIC's page that have registers (`struct kvm_lapic_state`).
pub const LAPIC_BYTES: usize = 1024;

/// All that KVM knows of a vCPU.
///
/// Every field has its name in the serialized form; [`StateVersion`] has the policy of versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct VcpuState {
    /// The version of the form that it came in.
    pub version: StateVersion,
    /// What the guest sees by CPUID.
    pub cpuid: Vec<CpuidLeaf>,
    /// `KVM_MP_STATE_*`: runs, halted, waits for INIT or SIPI.
    pub mp_state: u32,
    /// What is being injected, or waits.
    pub events: Events,
    /// General registers.
    pub registers: GeneralRegisters,
    /// Segments, tables and control registers.
    pub system: SystemRegisters,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// Extended control registers; none on hosts without `KVM_CAP_XCRS`.
    pub xcrs: Vec<Xcr>,
    /// FPU and vector registers in XSAVE's standard form (SDM volume 1, 13.4): 4096 bytes, or as many
    /// as `KVM_CAP_XSAVE2` says.
    pub xsave: StateBytes,
    /// The local APIC's registers, [`LAPIC_BYTES`] of them; none where it is not in the kernel.
    pub lapic: Option<StateBytes>,
    /// The frequency of the time-stamp counter, kHz.
    pub tsc_khz: u32,
    /// What KVM adds to the host's time-stamp counter, where the host tells (Linux 5.16).
    pub tsc_offset: Option<u64>,
    /// `IA32_MCG_CAP`: how many machine check banks there are, and their kind.
    pub mcg_cap: Option<u64>,
    /// MSRs, in the host's order.
    pub msrs: Vec<Msr>,
    /// MSRs that the host lists and did not give: lost, if the guest had them at all.
    pub unreadable_msrs: Vec<u32>,
    /// Other registers of KVM's.
    pub one_registers: Vec<OneRegister>,
    /// What KVM knows of a guest's own guests (`struct kvm_nested_state`), on hosts that let a guest
    /// have them.
    pub nested: Option<StateBytes>,
}

impl VcpuState {
    /// The value of an MSR.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        let msr = self.msrs.iter().find(|msr| msr.index == index)?;
        Some(msr.value)
    }
}
