// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a state is not saved, not taken, or not restored.

#![forbid(unsafe_code)]

use vmm_sys_util::errno::Error as Errno;

use super::piece::VcpuPiece;

/// A piece was not saved. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the vCPU's {piece} cannot be read: {errno}")]
pub struct SaveError {
    /// Which.
    pub piece: VcpuPiece,
    /// What KVM said.
    pub errno: Errno,
}

/// Why a host, or a vCPU, cannot take a state. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The guest was told of features that this host's KVM does not have.
    #[error(
        "the guest has CPUID {function:#x}.{index} {register} bits {bits:#010x}, which this host's KVM \
         does not offer: restore it on a host that does, or start guests with a CPUID that all hosts have"
    )]
    Cpuid {
        /// EAX of the leaf.
        function: u32,
        /// ECX of the leaf.
        index: u32,
        /// The register's name, in capitals.
        register: &'static str,
        /// Those of its bits that are missing.
        bits: u32,
    },
    /// The guest hears by interrupt of pages that it waits for, and the state has lost the vector (Firecracker 5738): whoever
    /// waits would wait for ever.
    #[error(
        "the guest takes asynchronous page faults by interrupt (MSR 0x4b564d02 = {enable:#x}), and the state has no \
         vector for it (MSR 0x4b564d06): it was saved without that MSR"
    )]
    AsyncPfVector {
        /// What the MSR says that switches them on.
        enable: u64,
    },
    /// The guest was told of a wider physical address than this host has.
    #[error("the guest has physical addresses of {state} bits, this host of {host}")]
    PhysicalAddressBits {
        /// The guest's.
        state: u32,
        /// The host's.
        host: u32,
    },
    /// More leaves of CPUID than KVM takes.
    #[error("{0} leaves of CPUID, and KVM takes 256")]
    TooManyLeaves(usize),
    /// XCR0 or the XSAVE area has components that this host's KVM does not have.
    #[error("the guest uses XSAVE components {bits:#x}, which this host's KVM does not have")]
    XsaveComponents {
        /// Their bits, as in XCR0.
        bits: u64,
    },
    /// A component is elsewhere in this host's XSAVE area.
    #[error(
        "XSAVE component {component} is {} bytes at {} in the guest's area, {} at {} in this host's",
        state.0, state.1, host.0, host.1
    )]
    XsaveLayout {
        /// Its number.
        component: u32,
        /// Its size and offset in the guest's area.
        state: (u32, u32),
        /// The same in the host's.
        host: (u32, u32),
    },
    /// The XSAVE area ends before its header does, or before a component that it has.
    #[error("the XSAVE area has {len} bytes, and must have {needed}")]
    XsaveShort {
        /// Its length.
        len: usize,
        /// How much it needs.
        needed: usize,
    },
    /// The host has no such MSR, and its value is not 0.
    #[error("MSR {index:#x} = {value:#x} is none of those that this host's KVM has")]
    Msr {
        /// Its index.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// The host cannot run the guest's time-stamp counter at its frequency.
    #[error(
        "the guest's TSC has {state} kHz, this host's {host}, and KVM cannot scale it here \
         (KVM_CAP_TSC_CONTROL)"
    )]
    TscFrequency {
        /// The guest's, kHz.
        state: u32,
        /// The host's, kHz.
        host: u32,
    },
    /// The host lacks what a piece needs.
    #[error("the state has {piece}, and this host has no {capability}")]
    Capability {
        /// The piece.
        piece: VcpuPiece,
        /// The capability's name.
        capability: &'static str,
    },
    /// The nested state is larger than any of this host, or no nested state at all.
    #[error("a nested state of {len} bytes, and this host's have {min} to {max}")]
    NestedSize {
        /// Its length.
        len: usize,
        /// Of this host, at least.
        min: usize,
        /// And at most.
        max: usize,
    },
    /// The local APIC's page is none.
    #[error("a local APIC's state has 1024 bytes, not {0}")]
    LapicSize(usize),
    /// One of state and vCPU has its local APIC in the kernel, and the other has not.
    #[error("the state is of a vCPU {}, and this VM's is one {}", with(*state), with(!*state))]
    LapicPlace {
        /// Whether the state has one.
        state: bool,
    },
    /// The vCPU's present state could not be asked.
    #[error("the vCPU's {piece} cannot be read: {errno}")]
    Read {
        /// Which piece.
        piece: VcpuPiece,
        /// What KVM said.
        errno: Errno,
    },
}

fn with(lapic: bool) -> &'static str {
    if lapic {
        "with its local APIC in the kernel"
    } else {
        "without a local APIC in the kernel"
    }
}

/// Why a vCPU has not the state that it was to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The state is not for this host or vCPU. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// KVM did not take a piece. Those before it in [`VcpuPiece::RESTORE_ORDER`] are set: the vCPU is to
    /// be thrown away.
    #[error("KVM does not take the vCPU's {piece}: {errno}; the vCPU is not usable now")]
    Failed {
        /// Which.
        piece: VcpuPiece,
        /// What KVM said.
        errno: Errno,
    },
    /// KVM did not take an MSR, whose value is another now. The pieces before the MSRs are set: the
    /// vCPU is to be thrown away.
    #[error(
        "KVM does not take MSR {index:#x} = {value:#x} ({}); the vCPU is not usable now",
        has(host)
    )]
    Msr {
        /// Its index.
        index: u32,
        /// The state's value.
        value: u64,
        /// What the vCPU has instead, where KVM says.
        host: Option<u64>,
    },
}

fn has(host: &Option<u64>) -> String {
    match host {
        Some(value) => format!("it is {value:#x} here"),
        None => "it cannot be read here".into(),
    }
}
