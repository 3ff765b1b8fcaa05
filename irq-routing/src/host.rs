// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the crate asks of KVM: one trait a capability, so that a test can pass a host that refuses.
//!
//! [`kvm_ioctls::VmFd`] has them all (feature `kvm`), and so have references and [`Arc`]s to
//! whatever has one; [`crate::fake::FakeHost`] is the one for tests.
//!
//! # Contract
//!
//! An `Err` has changed nothing in the VM. No call blocks on the guest; those that wait for a grace
//! period of the kernel's say so.
//!
//! [`kvm_ioctls::VmFd`]: https://docs.rs/kvm-ioctls/latest/kvm_ioctls/struct.VmFd.html

#![forbid(unsafe_code)]

use std::sync::Arc;

pub use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::gsi::Gsi;
use crate::ioapic::IoapicState;
use crate::irqchip::{IrqchipKind, PicState, PitState};
use crate::route::Msi;
use crate::rules::Rules;
use crate::table::Table;

/// Making a VM's interrupt controllers.
pub trait CreateIrqchip {
    /// Whether the host has the timer (`KVM_CAP_PIT2`).
    fn has_pit2(&self) -> bool;
    /// Whether the host has the split irqchip (`KVM_CAP_SPLIT_IRQCHIP`).
    fn has_split_irqchip(&self) -> bool;
    /// `KVM_CREATE_IRQCHIP`.
    fn create_irqchip(&self) -> Result<(), Errno>;
    /// `KVM_CREATE_PIT2`, with `KVM_PIT_SPEAKER_DUMMY` or without.
    fn create_pit2(&self, speaker: bool) -> Result<(), Errno>;
    /// `KVM_ENABLE_CAP` of `KVM_CAP_SPLIT_IRQCHIP` with this many IOAPIC pins.
    fn create_split_irqchip(&self, pins: u32) -> Result<(), Errno>;
}

/// The state of the controllers that are KVM's: ENXIO from all of these in a VM that has no such
/// one.
pub trait AccessIrqchip {
    /// `KVM_GET_IRQCHIP` of a PIC: 0 the first, 1 the second.
    fn pic(&self, pic: usize) -> Result<PicState, Errno>;
    /// `KVM_SET_IRQCHIP` of a PIC.
    fn set_pic(&self, pic: usize, state: &PicState) -> Result<(), Errno>;
    /// `KVM_GET_IRQCHIP` of the IOAPIC. EOVERFLOW where KVM was given what no register can hold.
    fn ioapic(&self) -> Result<IoapicState, Errno>;
    /// `KVM_SET_IRQCHIP` of the IOAPIC: sends what is pending.
    fn set_ioapic(&self, state: &IoapicState) -> Result<(), Errno>;
    /// `KVM_GET_PIT2`.
    fn pit(&self) -> Result<PitState, Errno>;
    /// `KVM_SET_PIT2`: the counters begin anew.
    fn set_pit(&self, state: &PitState) -> Result<(), Errno>;
}

/// The VM's routing table.
pub trait SetGsiRouting {
    /// What the host accepts in a VM with such an irqchip: its limit (`KVM_CAP_IRQ_ROUTING`) and
    /// kinds of entry.
    fn rules(&self, irqchip: IrqchipKind) -> Rules;
    /// `KVM_SET_GSI_ROUTING`: replaces the whole table. Waits for a grace period.
    fn set_gsi_routing(&self, table: &Table) -> Result<(), Errno>;
}

/// Eventfds that raise interrupts.
pub trait AttachIrqfd {
    /// `KVM_IRQFD`. With a resample eventfd the line is level-triggered and the guest's
    /// acknowledgement is told through that (`KVM_IRQFD_FLAG_RESAMPLE`). An interrupt pending in
    /// the eventfd arrives at once.
    fn attach_irqfd(&self, fd: &EventFd, resample: Option<&EventFd>, gsi: Gsi)
    -> Result<(), Errno>;
    /// `KVM_IRQFD` with `KVM_IRQFD_FLAG_DEASSIGN`: when it returns, no interrupt of this eventfd is
    /// under way. Waits for a grace period.
    fn detach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Errno>;
}

/// Levels on interrupt lines.
pub trait SetIrqLine {
    /// `KVM_IRQ_LINE_STATUS`: sets the level and returns the status that KVM reports, the number of
    /// vCPUs that got it, 0 when it merged with one that was pending, negative when no one takes
    /// it.
    fn set_irq_line(&self, gsi: Gsi, level: bool) -> Result<i32, Errno>;
}

/// Messages without a route.
pub trait SignalMsi {
    /// `KVM_SIGNAL_MSI`: returns how many vCPUs got it. (KVM says that no vCPU has the id by a -1 that
    /// leaves the system call as EPERM; one that a seccomp filter or a security module answers cannot
    /// be told from it.)
    fn signal_msi(&self, msi: Msi) -> Result<i32, Errno>;
}

macro_rules! through {
    ($($pointer:ty),*) => {$(
        impl<T: CreateIrqchip + ?Sized> CreateIrqchip for $pointer {
            fn has_pit2(&self) -> bool {
                (**self).has_pit2()
            }
            fn has_split_irqchip(&self) -> bool {
                (**self).has_split_irqchip()
            }
            fn create_irqchip(&self) -> Result<(), Errno> {
                (**self).create_irqchip()
            }
            fn create_pit2(&self, speaker: bool) -> Result<(), Errno> {
                (**self).create_pit2(speaker)
            }
            fn create_split_irqchip(&self, pins: u32) -> Result<(), Errno> {
                (**self).create_split_irqchip(pins)
            }
        }

        impl<T: AccessIrqchip + ?Sized> AccessIrqchip for $pointer {
            fn pic(&self, pic: usize) -> Result<PicState, Errno> {
                (**self).pic(pic)
            }
            fn set_pic(&self, pic: usize, state: &PicState) -> Result<(), Errno> {
                (**self).set_pic(pic, state)
            }
            fn ioapic(&self) -> Result<IoapicState, Errno> {
                (**self).ioapic()
            }
            fn set_ioapic(&self, state: &IoapicState) -> Result<(), Errno> {
                (**self).set_ioapic(state)
            }
            fn pit(&self) -> Result<PitState, Errno> {
                (**self).pit()
            }
            fn set_pit(&self, state: &PitState) -> Result<(), Errno> {
                (**self).set_pit(state)
            }
        }

        impl<T: SetGsiRouting + ?Sized> SetGsiRouting for $pointer {
            fn rules(&self, irqchip: IrqchipKind) -> Rules {
                (**self).rules(irqchip)
            }
            fn set_gsi_routing(&self, table: &Table) -> Result<(), Errno> {
                (**self).set_gsi_routing(table)
            }
        }

        impl<T: AttachIrqfd + ?Sized> AttachIrqfd for $pointer {
            fn attach_irqfd(
                &self,
                fd: &EventFd,
                resample: Option<&EventFd>,
                gsi: Gsi,
            ) -> Result<(), Errno> {
                (**self).attach_irqfd(fd, resample, gsi)
            }
            fn detach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Errno> {
                (**self).detach_irqfd(fd, gsi)
            }
        }

        impl<T: SetIrqLine + ?Sized> SetIrqLine for $pointer {
            fn set_irq_line(&self, gsi: Gsi, level: bool) -> Result<i32, Errno> {
                (**self).set_irq_line(gsi, level)
            }
        }

        impl<T: SignalMsi + ?Sized> SignalMsi for $pointer {
            fn signal_msi(&self, msi: Msi) -> Result<i32, Errno> {
                (**self).signal_msi(msi)
            }
        }
    )*};
}

through!(&T, Arc<T>);
