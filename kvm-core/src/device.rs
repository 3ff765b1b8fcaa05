// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that live in the kernel (`struct kvm_device`): their kinds, and why one could not be had.
//! Documentation/virt/kvm/devices/; api.rst 4.79 and 4.80.

use std::fmt;

use kvm_bindings as kvm;
use vmm_sys_util::errno::Error as Errno;

const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EBADF: i32 = 9;
const EINVAL: i32 = 22;
const ENOENT: i32 = 2;
const ENXIO: i32 = 6;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $value:ident, $name:literal;)*) => {
        /// Which device (`KVM_DEV_TYPE_…`). Only [`DeviceKind::Vfio`] is one of x86.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DeviceKind {
            $($(#[$doc])* $kind,)*
            /// Another, or one newer than this crate, by its number.
            Other(u32),
        }

        impl DeviceKind {
            /// Those that have a name here.
            pub const NAMED: &'static [Self] = &[$(Self::$kind),*];

            /// `KVM_DEV_TYPE_…`.
            #[must_use]
            pub const fn number(self) -> u32 {
                match self {
                    $(Self::$kind => kvm::$value,)*
                    Self::Other(number) => number,
                }
            }

            /// By its `KVM_DEV_TYPE_…`.
            #[must_use]
            pub const fn from_number(number: u32) -> Self {
                match number {
                    $(kvm::$value => Self::$kind,)*
                    other => Self::Other(other),
                }
            }
        }

        impl fmt::Display for DeviceKind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$kind => f.write_str($name),)*
                    Self::Other(number) => write!(f, "device of kind {number}"),
                }
            }
        }
    };
}

kinds! {
    /// PowerPC: Freescale's MPIC 2.0.
    FslMpic20 = kvm_device_type_KVM_DEV_TYPE_FSL_MPIC_20, "Freescale MPIC 2.0";
    /// PowerPC: Freescale's MPIC 4.2.
    FslMpic42 = kvm_device_type_KVM_DEV_TYPE_FSL_MPIC_42, "Freescale MPIC 4.2";
    /// PowerPC: the XICS interrupt controller.
    Xics = kvm_device_type_KVM_DEV_TYPE_XICS, "XICS";
    /// VFIO: tells KVM which assigned devices a VM has.
    Vfio = kvm_device_type_KVM_DEV_TYPE_VFIO, "VFIO device";
    /// Arm: the GICv2.
    ArmVgicV2 = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, "GICv2";
    /// s390: floating interrupts.
    Flic = kvm_device_type_KVM_DEV_TYPE_FLIC, "FLIC";
    /// Arm: the GICv3.
    ArmVgicV3 = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, "GICv3";
    /// Arm: the GICv3's interrupt translation service.
    ArmVgicIts = kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, "GICv3 ITS";
    /// PowerPC: the XIVE interrupt controller.
    Xive = kvm_device_type_KVM_DEV_TYPE_XIVE, "XIVE";
    /// Arm: stolen time.
    ArmPvTime = kvm_device_type_KVM_DEV_TYPE_ARM_PV_TIME, "Arm PV time";
    /// RISC-V: the advanced interrupt architecture.
    RiscvAia = kvm_device_type_KVM_DEV_TYPE_RISCV_AIA, "RISC-V AIA";
    /// LoongArch: inter-processor interrupts.
    LoongarchIpi = kvm_device_type_KVM_DEV_TYPE_LOONGARCH_IPI, "LoongArch IPI";
    /// LoongArch: the extended I/O interrupt controller.
    LoongarchEiointc = kvm_device_type_KVM_DEV_TYPE_LOONGARCH_EIOINTC, "LoongArch EIOINTC";
    /// LoongArch: the bridge's interrupt controller.
    LoongarchPchpic = kvm_device_type_KVM_DEV_TYPE_LOONGARCH_PCHPIC, "LoongArch PCH-PIC";
}

/// An attribute of a device: a group, and a number in it. What lies behind it is the device's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceAttribute {
    /// `kvm_device_attr.group`.
    pub group: u32,
    /// `kvm_device_attr.attr`.
    pub attribute: u64,
}

impl fmt::Display for DeviceAttribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attribute {:#x} of group {}", self.attribute, self.group)
    }
}

/// Why a device in the kernel refused. It is what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// `KVM_CREATE_DEVICE`.
    #[error("KVM creates no {kind}: {errno}{}", match errno.errno() {
        ENODEV => " (this host's KVM has none)",
        EBUSY | EEXIST => " (the VM has one)",
        _ => "",
    })]
    Create {
        /// What was asked for.
        kind: DeviceKind,
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_SET_DEVICE_ATTR`.
    #[error("{attribute} cannot be set: {errno}{}", match errno.errno() {
        ENXIO => " (the device has none such)",
        _ => "",
    })]
    Set {
        /// Which.
        attribute: DeviceAttribute,
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_GET_DEVICE_ATTR`.
    #[error("{attribute} cannot be read: {errno}{}", match errno.errno() {
        ENXIO => " (the device has none such)",
        _ => "",
    })]
    Get {
        /// Which.
        attribute: DeviceAttribute,
        /// What KVM said.
        errno: Errno,
    },
    /// A file could not be added to the VFIO device.
    #[error("KVM takes no VFIO file {fd}: {errno}{}", match errno.errno() {
        EBADF | EINVAL => " (it is no VFIO group or device)",
        EEXIST => " (it was added already)",
        _ => "",
    })]
    AddFile {
        /// The file descriptor.
        fd: i32,
        /// What KVM said.
        errno: Errno,
    },
    /// A file could not be taken from the VFIO device.
    #[error("KVM does not let go of VFIO file {fd}: {errno}{}", match errno.errno() {
        ENOENT => " (it was not added)",
        _ => "",
    })]
    RemoveFile {
        /// The file descriptor.
        fd: i32,
        /// What KVM said.
        errno: Errno,
    },
}
