// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a host's KVM saves and takes, as data; and the calls that save and set, as a trait.

#![forbid(unsafe_code)]

use vmm_sys_util::errno::Error as Errno;

use super::events::Events;
use super::registers::{
    CpuidLeaf, DebugRegisters, GeneralRegisters, Msr, OneRegister, SystemRegisters, Xcr,
};

/// What a host's KVM can save of a vCPU, and take back. One for a VM and all its vCPUs: made by
/// `Vm::state_host`, or by a vCPU that is there already `ListedHost::complete_by`.
///
/// The fields are public, because a consumer may know more than KVM says: a CPUID bit that it gives
/// its guests although `KVM_GET_SUPPORTED_CPUID` has it not is added to [`StateHost::cpuid`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateHost {
    /// `KVM_GET_SUPPORTED_CPUID`, and what a KVM without hardware virtualization gives besides.
    pub cpuid: Vec<CpuidLeaf>,
    /// MSRs to be saved: `KVM_GET_MSR_INDEX_LIST`, and after it those of
    /// [`StateHost::with_unlisted_msrs`].
    pub msrs: Vec<u32>,
    /// Bytes of an XSAVE area, `KVM_CAP_XSAVE2`'s answer or 4096.
    pub xsave_bytes: usize,
    /// `KVM_CAP_XSAVE2` is there (Linux 5.17).
    pub xsave2: bool,
    /// `KVM_CAP_XCRS` is there.
    pub xcrs: bool,
    /// `KVM_CAP_SREGS2` is there (Linux 5.14).
    pub sregs2: bool,
    /// `KVM_CAP_ONE_REG` is there (x86: Linux 6.18).
    pub one_reg: bool,
    /// `KVM_CAP_TSC_CONTROL`: a TSC can be scaled.
    pub tsc_control: bool,
    /// `KVM_CAP_TSC_DEADLINE_TIMER`: a guest may have that timer whatever `cpuid` says.
    pub tsc_deadline: bool,
    /// `KVM_CAP_X86_DISABLE_EXITS`' answer: a guest may have MWAIT if bit 0 is set.
    pub disable_exits: u32,
    /// `KVM_CAP_NESTED_STATE`'s answer: bytes of a nested state at most, 0 where there is none.
    pub nested_bytes: usize,
}

const MTRR_PHYS: std::ops::Range<u32> = 0x200..0x210;
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
const MTRR_DEF_TYPE: u32 = 0x2ff;

impl StateHost {
    /// Adds the MSRs that every KVM has and that hosts leave out of their list: memory types, eight
    /// pairs of ranges and all fixed ones (SDM volume 3, 12.11.2). Machine check banks are added at each
    /// save, as many as the vCPU has.
    #[must_use]
    pub fn with_unlisted_msrs(mut self) -> Self {
        for index in MTRR_PHYS.chain(MTRR_FIXED).chain([MTRR_DEF_TYPE]) {
            if !self.msrs.contains(&index) {
                self.msrs.push(index);
            }
        }
        self
    }

    pub(super) fn has_msr(&self, index: u32, mcg_cap: Option<u64>) -> bool {
        self.msrs.contains(&index) || super::msr::banks(mcg_cap).any(|bank| bank == index)
    }
}

/// The ioctls that read and write a vCPU's state. Implemented for `kvm_ioctls::VcpuFd`, and by
/// `fake::FakeState` (feature `test-utilities`).
///
/// # Contract
/// Each call is one ioctl but for [`AccessVcpu::one_registers`] (a list, and one for each), and one that
/// fails has changed nothing. Lengths of areas are the caller's to check (see [`StateHost`]).
#[allow(clippy::missing_errors_doc, reason = "always the errno of the ioctl")]
pub trait AccessVcpu {
    /// `KVM_GET_CPUID2`.
    fn cpuid(&self) -> Result<Vec<CpuidLeaf>, Errno>;
    /// `KVM_SET_CPUID2`.
    fn set_cpuid(&self, leaves: &[CpuidLeaf]) -> Result<(), Errno>;
    /// `KVM_GET_MP_STATE`.
    fn mp_state(&self) -> Result<u32, Errno>;
    /// `KVM_SET_MP_STATE`.
    fn set_mp_state(&self, state: u32) -> Result<(), Errno>;
    /// `KVM_GET_VCPU_EVENTS`.
    fn events(&self) -> Result<Events, Errno>;
    /// `KVM_SET_VCPU_EVENTS`.
    fn set_events(&self, events: &Events) -> Result<(), Errno>;
    /// `KVM_GET_REGS`.
    fn registers(&self) -> Result<GeneralRegisters, Errno>;
    /// `KVM_SET_REGS`.
    fn set_registers(&self, registers: &GeneralRegisters) -> Result<(), Errno>;
    /// `KVM_GET_SREGS2`, or with `sregs2` false `KVM_GET_SREGS`.
    fn system(&self, sregs2: bool) -> Result<SystemRegisters, Errno>;
    /// `KVM_SET_SREGS2`, or with `sregs2` false `KVM_SET_SREGS`.
    fn set_system(&self, registers: &SystemRegisters, sregs2: bool) -> Result<(), Errno>;
    /// `KVM_GET_DEBUGREGS`.
    fn debug(&self) -> Result<DebugRegisters, Errno>;
    /// `KVM_SET_DEBUGREGS`.
    fn set_debug(&self, registers: &DebugRegisters) -> Result<(), Errno>;
    /// `KVM_GET_XCRS`.
    fn xcrs(&self) -> Result<Vec<Xcr>, Errno>;
    /// `KVM_SET_XCRS`, of sixteen at most (`EINVAL`).
    fn set_xcrs(&self, xcrs: &[Xcr]) -> Result<(), Errno>;
    /// `KVM_GET_XSAVE2`, or with `xsave2` false `KVM_GET_XSAVE`: as many bytes as KVM writes, and
    /// perhaps zeroes behind them.
    fn xsave(&self, xsave2: bool) -> Result<Vec<u8>, Errno>;
    /// `KVM_SET_XSAVE`. An area that is shorter than this host's is as if zeroes followed, and of a
    /// longer one only this host's length is read.
    fn set_xsave(&self, area: &[u8]) -> Result<(), Errno>;
    /// `KVM_GET_LAPIC`; `EINVAL` where it is not in the kernel.
    fn lapic(&self) -> Result<Vec<u8>, Errno>;
    /// `KVM_SET_LAPIC`, of [`LAPIC_BYTES`](super::LAPIC_BYTES) (`EINVAL`).
    fn set_lapic(&self, page: &[u8]) -> Result<(), Errno>;
    /// `KVM_GET_TSC_KHZ`.
    fn tsc_khz(&self) -> Result<u32, Errno>;
    /// `KVM_SET_TSC_KHZ`.
    fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno>;
    /// The attribute `KVM_VCPU_TSC_OFFSET`; `ENXIO` or `ENOTTY` where there is none.
    fn tsc_offset(&self) -> Result<u64, Errno>;
    /// The same, set.
    fn set_tsc_offset(&self, offset: u64) -> Result<(), Errno>;
    /// `KVM_GET_MSRS`: fills in values until one cannot be read; how many were.
    fn get_msrs(&self, msrs: &mut [Msr]) -> Result<usize, Errno>;
    /// `KVM_SET_MSRS`: sets until one is refused; how many were.
    fn put_msrs(&self, msrs: &[Msr]) -> Result<usize, Errno>;
    /// `KVM_X86_SETUP_MCE`.
    fn set_up_mce(&self, mcg_cap: u64) -> Result<(), Errno>;
    /// `KVM_GET_REG_LIST` and `KVM_GET_ONE_REG` of each.
    fn one_registers(&self) -> Result<Vec<OneRegister>, Errno>;
    /// `KVM_SET_ONE_REG`.
    fn set_one_register(&self, register: &OneRegister) -> Result<(), Errno>;
    /// `KVM_GET_NESTED_STATE`, of `max` bytes at most.
    fn nested(&self, max: usize) -> Result<Vec<u8>, Errno>;
    /// `KVM_SET_NESTED_STATE`.
    fn set_nested(&self, state: &[u8]) -> Result<(), Errno>;
    /// `KVM_KVMCLOCK_CTRL`; `EINVAL` of a guest without kvm-clock.
    fn tell_clock_gap(&self) -> Result<(), Errno>;
}
