// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where an interrupt can go: every kind of entry that `struct kvm_irq_routing_entry` has, as typed
//! data.

#![forbid(unsafe_code)]

use crate::gsi::Gsi;

/// An interrupt controller in the kernel, by KVM's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chip(pub u32);

impl Chip {
    /// The first 8259A of an x86 PC (`KVM_IRQCHIP_PIC_MASTER`), 8 pins.
    pub const PIC_MASTER: Chip = Chip(0);
    /// The second 8259A, cascaded to pin 2 of the first (`KVM_IRQCHIP_PIC_SLAVE`), 8 pins.
    pub const PIC_SLAVE: Chip = Chip(1);
    /// The IOAPIC (`KVM_IRQCHIP_IOAPIC`), 24 pins.
    pub const IOAPIC: Chip = Chip(2);
}

/// A pin of an interrupt controller in the kernel (`KVM_IRQ_ROUTING_IRQCHIP`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChipPin {
    /// Which controller.
    pub chip: Chip,
    /// Which of its pins, from 0: the second PIC's are 0 to 7, not 8 to 15.
    pub pin: u32,
}

/// A message-signalled interrupt: the write that a device would do (`KVM_IRQ_ROUTING_MSI`, `struct
/// kvm_msi`).
///
/// On x86: Intel SDM vol. 3, "Message Signalled Interrupts" for the format of both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Msi {
    /// The address written to: on x86 `0xfee0_0000`, the destination APIC id in bits 12 to 19.
    pub address: u64,
    /// The word written: on x86 the vector in bits 0 to 7, the delivery mode in 8 to 10.
    pub data: u32,
    /// Who writes, where the interrupt controller asks (an Arm ITS; x86 ignores it): sets
    /// `KVM_MSI_VALID_DEVID`.
    pub devid: Option<u32>,
}

/// An s390 adapter interrupt (`KVM_IRQ_ROUTING_S390_ADAPTER`). Units and meaning:
/// `kvm_irq_routing_s390_adapter`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct S390Adapter {
    /// Guest address of the indicator.
    pub ind_addr: u64,
    /// Guest address of the summary indicator.
    pub summary_addr: u64,
    /// Bit offset of the indicator.
    pub ind_offset: u64,
    /// Bit offset of the summary indicator.
    pub summary_offset: u32,
    /// The adapter.
    pub adapter_id: u32,
}

/// A Hyper-V synthetic interrupt source (`KVM_IRQ_ROUTING_HV_SINT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HvSint {
    /// The virtual processor's index.
    pub vcpu: u32,
    /// The source, 0 to 15.
    pub sint: u32,
}

/// A Xen event channel (`KVM_IRQ_ROUTING_XEN_EVTCHN`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XenEvtchn {
    /// The event channel's port.
    pub port: u32,
    /// The vCPU's id.
    pub vcpu: u32,
    /// The delivery: KVM knows [`XenEvtchn::PRIO_2LEVEL`] alone.
    pub priority: u32,
}

impl XenEvtchn {
    /// Two-level delivery (`KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL`).
    pub const PRIO_2LEVEL: u32 = u32::MAX;
}

/// One destination of a GSI (`struct kvm_irq_routing_entry` without its GSI).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Route {
    /// A pin of a controller in the kernel.
    Pin(ChipPin),
    /// A message.
    Msi(Msi),
    /// An s390 adapter interrupt.
    S390Adapter(S390Adapter),
    /// A Hyper-V synthetic interrupt.
    HvSint(HvSint),
    /// A Xen event channel.
    XenEvtchn(XenEvtchn),
}

impl From<ChipPin> for Route {
    fn from(pin: ChipPin) -> Self {
        Route::Pin(pin)
    }
}

impl From<Msi> for Route {
    fn from(msi: Msi) -> Self {
        Route::Msi(msi)
    }
}

/// One line of the routing table: a GSI and one place that it goes to (`struct
/// kvm_irq_routing_entry`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// The GSI.
    pub gsi: Gsi,
    /// Where it goes.
    pub route: Route,
}
