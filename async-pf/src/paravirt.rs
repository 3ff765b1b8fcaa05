// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's side of asynchronous page faults, as data: CPUID bits, MSRs, the shared structure.
//!
//! A guest that knows how is told "this page is not here yet" and runs another task meanwhile. It
//! sees the feature bits in CPUID, writes where and how it wants to be told into three MSRs, and
//! acknowledges each "it is here now". The exchange is KVM's (Documentation/virt/kvm/x86/msr.rst
//! and cpuid.rst); what a monitor has to do with it is build the CPUID entry, know which values a
//! guest may write, and carry the MSRs through a snapshot in an order that loses nothing.

use crate::WAKE_ALL_TOKEN;

/// The CPUID leaf with KVM's features, where KVM's leaves begin at 0x4000_0000.
pub const KVM_CPUID_FEATURES: u32 = 0x4000_0001;

/// `MSR_KVM_ASYNC_PF_EN`: where the shared structure is, and how to deliver.
pub const MSR_KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// `MSR_KVM_ASYNC_PF_INT`: the vector of the "page ready" interrupt.
pub const MSR_KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;
/// `MSR_KVM_ASYNC_PF_ACK`: the guest has seen a "page ready".
pub const MSR_KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;

/// Which parts of the protocol a guest is offered: bits of EAX of [`KVM_CPUID_FEATURES`].
///
/// # What KVM does of itself
/// A fault that would have KVM sleep (on a userfaultfd too) goes to a kernel worker, of up to 64 a vCPU, if the vCPU takes
/// interrupts and its local APIC is KVM's. That is so whether or not the guest takes part. If it does, and was in user mode
/// ([`AsyncPfEnable::send_always`] asks for kernel mode as well; Linux 6.1 and 6.12 do not), KVM injects a page fault, and counts
/// it in the vCPU's statistic `pf_guest`; otherwise it halts the vCPU until the page, or an interrupt, is there. So
/// the feature gives the time of the task that waits to others. Without it they have their share only, for the guest takes a task
/// that waits for one that runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AsyncPfFeatures {
    /// `KVM_FEATURE_ASYNC_PF`, bit 4: `MSR_KVM_ASYNC_PF_EN` is there.
    pub async_pf: bool,
    /// `KVM_FEATURE_ASYNC_PF_VMEXIT`, bit 10: to a nested hypervisor a page fault may be a VM exit.
    pub vmexit: bool,
    /// `KVM_FEATURE_ASYNC_PF_INT`, bit 14: "page ready" is an interrupt, and the MSRs `INT` and
    /// `ACK` are there. Guests since Linux 5.9 and hosts since 5.8 know this form only.
    pub interrupt: bool,
}

impl AsyncPfFeatures {
    const ASYNC_PF: u32 = 1 << 4;
    const VMEXIT: u32 = 1 << 10;
    const INTERRUPT: u32 = 1 << 14;

    /// All that the bits in EAX say, and nothing about the others.
    pub const fn from_eax(eax: u32) -> Self {
        Self {
            async_pf: eax & Self::ASYNC_PF != 0,
            vmexit: eax & Self::VMEXIT != 0,
            interrupt: eax & Self::INTERRUPT != 0,
        }
    }

    /// `eax` with these features, and with its other bits as they were.
    ///
    /// ```
    /// use async_pf::AsyncPfFeatures;
    /// // What the host offers, without the features of a guest that shall not have them:
    /// assert_eq!(AsyncPfFeatures::default().apply(0x0100_7efb), 0x0100_3aeb);
    /// ```
    pub const fn apply(self, eax: u32) -> u32 {
        let mut eax = eax & !(Self::ASYNC_PF | Self::VMEXIT | Self::INTERRUPT);
        if self.async_pf {
            eax |= Self::ASYNC_PF;
        }
        if self.vmexit {
            eax |= Self::VMEXIT;
        }
        if self.interrupt {
            eax |= Self::INTERRUPT;
        }
        eax
    }
}

/// Why a value cannot be in one of the MSRs. A guest that writes it gets #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsrError {
    /// Bits that have no meaning are set.
    #[error("MSR {msr:#x} = {value:#x}: reserved bits {bits:#x}")]
    Reserved {
        /// The MSR.
        msr: u32,
        /// The value.
        value: u64,
        /// Those of its bits that are reserved.
        bits: u64,
    },
    /// The value asks for a feature that the guest was not offered.
    #[error("MSR {msr:#x} = {value:#x}: bits {bits:#x} need a feature that CPUID does not offer")]
    NotOffered {
        /// The MSR.
        msr: u32,
        /// The value.
        value: u64,
        /// Those of its bits that need the feature; 0 where the MSR itself does.
        bits: u64,
    },
    /// The guest takes part, and the vector by which it is told is not known.
    #[error(
        "MSR {MSR_KVM_ASYNC_PF_EN:#x} = {enable:#x} takes part, and MSR {MSR_KVM_ASYNC_PF_INT:#x} with its vector is missing"
    )]
    NoVector {
        /// The value of [`MSR_KVM_ASYNC_PF_EN`].
        enable: u64,
    },
}

/// The value of [`MSR_KVM_ASYNC_PF_EN`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AsyncPfEnable {
    /// Bit 0: the guest takes part.
    pub enabled: bool,
    /// Bit 1: notifications also while the guest is in kernel mode.
    pub send_always: bool,
    /// Bit 2: to a nested hypervisor, as a VM exit.
    pub as_vmexit: bool,
    /// Bit 3: "page ready" as an interrupt. KVM delivers nothing without it any more.
    pub as_interrupt: bool,
    /// Bits 6 to 63: guest physical address of the shared [`ApfData`], a multiple of 64.
    address: u64,
}

impl AsyncPfEnable {
    const RESERVED: u64 = 0b11_0000;
    const ADDRESS: u64 = !0x3f;

    /// Takes part, with the structure at guest physical `address`, in the form that KVM of today
    /// delivers. `None` where the address is not a multiple of 64.
    pub const fn at(address: u64) -> Option<Self> {
        if address & !Self::ADDRESS != 0 {
            return None;
        }
        Some(Self {
            enabled: true,
            send_always: false,
            as_vmexit: false,
            as_interrupt: true,
            address,
        })
    }

    /// What the value says.
    ///
    /// # Errors
    /// [`MsrError`] for a value that KVM refuses whatever the address: reserved bits, or bits
    /// whose feature is not in `offered`.
    pub const fn decode(value: u64, offered: AsyncPfFeatures) -> Result<Self, MsrError> {
        let msr = MSR_KVM_ASYNC_PF_EN;
        if !offered.async_pf {
            return Err(MsrError::NotOffered {
                msr,
                value,
                bits: 0,
            });
        }
        if value & Self::RESERVED != 0 {
            return Err(MsrError::Reserved {
                msr,
                value,
                bits: value & Self::RESERVED,
            });
        }
        let this = Self {
            enabled: value & 1 != 0,
            send_always: value & 2 != 0,
            as_vmexit: value & 4 != 0,
            as_interrupt: value & 8 != 0,
            address: value & Self::ADDRESS,
        };
        if this.as_vmexit && !offered.vmexit {
            return Err(MsrError::NotOffered {
                msr,
                value,
                bits: 4,
            });
        }
        if this.as_interrupt && !offered.interrupt {
            return Err(MsrError::NotOffered {
                msr,
                value,
                bits: 8,
            });
        }
        Ok(this)
    }

    /// The MSR's value.
    pub const fn encode(self) -> u64 {
        self.address
            | self.enabled as u64
            | (self.send_always as u64) << 1
            | (self.as_vmexit as u64) << 2
            | (self.as_interrupt as u64) << 3
    }

    /// Guest physical address of the shared [`ApfData`].
    pub const fn address(self) -> u64 {
        self.address
    }

    /// Whether KVM delivers anything: the guest takes part, by interrupt.
    pub const fn is_active(self) -> bool {
        self.enabled && self.as_interrupt
    }
}

/// The value of [`MSR_KVM_ASYNC_PF_INT`]: the vector of the "page ready" interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AsyncPfVector(pub u8);

impl AsyncPfVector {
    /// What the value says.
    ///
    /// # Errors
    /// [`MsrError`] where bits above the vector are set, or the interrupt form is not offered.
    pub const fn decode(value: u64, offered: AsyncPfFeatures) -> Result<Self, MsrError> {
        let msr = MSR_KVM_ASYNC_PF_INT;
        if !offered.interrupt {
            return Err(MsrError::NotOffered {
                msr,
                value,
                bits: 0,
            });
        }
        if value >> 8 != 0 {
            return Err(MsrError::Reserved {
                msr,
                value,
                bits: value & !0xff,
            });
        }
        Ok(Self(value as u8))
    }

    /// The MSR's value.
    pub const fn encode(self) -> u64 {
        self.0 as u64
    }
}

/// The asynchronous-page-fault MSRs of one vCPU: what a snapshot keeps of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AsyncPfMsrs {
    /// [`MSR_KVM_ASYNC_PF_EN`].
    pub enable: AsyncPfEnable,
    /// [`MSR_KVM_ASYNC_PF_INT`].
    pub vector: AsyncPfVector,
}

impl AsyncPfMsrs {
    /// The MSRs to read when a vCPU is saved. `ACK` is a doorbell: it reads as zero.
    pub const SAVED: [u32; 2] = [MSR_KVM_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_EN];

    /// What a snapshot kept, from its MSRs as (index, value); others than these two are passed over. A snapshot without
    /// either is one of a guest that has not been offered them, and reads as switched off.
    ///
    /// # Errors
    /// [`MsrError`] of a value that KVM would refuse; [`MsrError::NoVector`] where the guest takes part and the snapshot
    /// has lost [`MSR_KVM_ASYNC_PF_INT`] (Firecracker 5738): a guest so restored would be told by vector 0, and whoever
    /// waits would wait for ever. Restore it with the vector, or refuse it.
    pub fn from_saved(
        msrs: impl IntoIterator<Item = (u32, u64)>,
        offered: AsyncPfFeatures,
    ) -> Result<Self, MsrError> {
        let (mut enable, mut vector) = (AsyncPfEnable::default(), None);
        for (index, value) in msrs {
            match index {
                // Zero is off, which is what a guest without the feature has.
                MSR_KVM_ASYNC_PF_EN if value != 0 => {
                    enable = AsyncPfEnable::decode(value, offered)?;
                }
                MSR_KVM_ASYNC_PF_INT if value == 0 => vector = Some(AsyncPfVector::default()),
                MSR_KVM_ASYNC_PF_INT => vector = Some(AsyncPfVector::decode(value, offered)?),
                _ => {}
            }
        }
        match vector {
            None if enable.is_active() => Err(MsrError::NoVector {
                enable: enable.encode(),
            }),
            vector => Ok(Self {
                enable,
                vector: vector.unwrap_or_default(),
            }),
        }
    }

    /// The MSRs to write when a vCPU is restored, as (index, value), in this order: enabling makes
    /// KVM queue a wake-up for every waiting task, since the tokens that the guest holds name
    /// nothing in the new VM, and that wake-up goes out by the vector.
    ///
    /// The guest memory with the shared structure must be there by then (or a pager that serves
    /// it): KVM touches it. It must be what it was when the MSRs were read, for a token that waits to
    /// be acknowledged is in it, and nothing more is told until it is.
    ///
    /// The local APIC goes before: where it is not enabled, the wake-up waits until the guest enables
    /// it, and on hosts before Linux 5.13 the vCPU spins meanwhile (cloud-hypervisor 2277; 2498
    /// therefore hid the feature, 5626 offers it again). A snapshot without all of this leaves tasks
    /// of the guest asleep for ever (Firecracker 3020; 5322 is of the same path).
    pub const fn restore(self) -> [(u32, u64); 2] {
        [
            (MSR_KVM_ASYNC_PF_INT, self.vector.encode()),
            (MSR_KVM_ASYNC_PF_EN, self.enable.encode()),
        ]
    }
}

/// `struct kvm_vcpu_pv_apf_data`: 64 bytes that KVM and a vCPU of the guest share, at
/// [`AsyncPfEnable::address`]. The last 56 are padding now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ApfData {
    /// Bytes 0 to 3: not zero while a "page not present" fault waits to be seen (bit 0).
    pub flags: u32,
    /// Bytes 4 to 7: not zero while a "page ready" waits to be acknowledged: its token.
    pub token: u32,
}

impl ApfData {
    /// How many bytes the structure has in guest memory.
    pub const SIZE: usize = 64;

    /// From the structure's first eight bytes.
    pub const fn from_bytes(bytes: [u8; 8]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            flags: u32::from_le_bytes([a, b, c, d]),
            token: u32::from_le_bytes([e, f, g, h]),
        }
    }

    /// The structure's first eight bytes.
    pub const fn to_bytes(self) -> [u8; 8] {
        (self.flags as u64 | (self.token as u64) << 32).to_le_bytes()
    }

    /// Whether the fault that the guest is taking means "not here yet".
    pub const fn not_present(self) -> bool {
        self.flags & 1 != 0
    }

    /// The token of a "page ready" that the guest has not acknowledged; [`WAKE_ALL_TOKEN`] means
    /// all of them.
    pub const fn ready(self) -> Option<u32> {
        if self.token == 0 {
            None
        } else {
            Some(self.token)
        }
    }

    /// What a wake-up of every waiter looks like.
    pub const fn wake_all() -> Self {
        Self {
            flags: 0,
            token: WAKE_ALL_TOKEN,
        }
    }
}
