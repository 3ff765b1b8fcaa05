// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What KVM's ABI has for it, both ways: entries of every kind that `struct kvm_irq_routing_entry`
//! can hold, and the states of a PIC, an IOAPIC and the timer.

use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI,
    KVM_IRQ_ROUTING_S390_ADAPTER, KVM_IRQ_ROUTING_XEN_EVTCHN, KVM_MSI_VALID_DEVID,
    kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1 as RedirectionBits, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1 as Payload, kvm_irq_routing_hv_sint,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1 as MsiDevice,
    kvm_irq_routing_s390_adapter, kvm_irq_routing_xen_evtchn, kvm_pic_state, kvm_pit_channel_state,
    kvm_pit_state2,
};
use thiserror::Error;

use crate::gsi::Gsi;
use crate::ioapic::{IOAPIC_BASE, IoapicState, IoapicStateError, Redirection};
use crate::irqchip::{PicState, PitChannelState, PitState};
use crate::route::{Chip, ChipPin, Entry, HvSint, Msi, Route, S390Adapter, XenEvtchn};
use crate::version::StateVersion;

/// Why an entry of KVM's form is none of ours. KVM refuses both as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AbiError {
    /// The type is not one that the ABI has.
    #[error("no routing entry has type {0}")]
    UnknownType(u32),
    /// A flag that entries of this type do not have.
    #[error("a routing entry of type {kind} has no flags {flags:#x}")]
    UnknownFlags {
        /// `KVM_IRQ_ROUTING_*`.
        kind: u32,
        /// All of the entry's flags.
        flags: u32,
    },
}

/// An entry in KVM's form.
#[inline]
pub fn to_kvm(entry: &Entry) -> kvm_irq_routing_entry {
    let mut flags = 0;
    // Zero throughout, so that the part of the union that a kind does not use is defined.
    let mut u = Payload::default();
    let type_ = match entry.route {
        Route::Pin(ChipPin { chip, pin }) => {
            u.irqchip = kvm_irq_routing_irqchip {
                irqchip: chip.0,
                pin,
            };
            KVM_IRQ_ROUTING_IRQCHIP
        }
        Route::Msi(Msi {
            address,
            data,
            devid,
        }) => {
            if devid.is_some() {
                flags = KVM_MSI_VALID_DEVID;
            }
            u.msi = kvm_irq_routing_msi {
                address_lo: address as u32,
                address_hi: (address >> 32) as u32,
                data,
                __bindgen_anon_1: MsiDevice {
                    devid: devid.unwrap_or(0),
                },
            };
            KVM_IRQ_ROUTING_MSI
        }
        Route::S390Adapter(adapter) => {
            u.adapter = kvm_irq_routing_s390_adapter {
                ind_addr: adapter.ind_addr,
                summary_addr: adapter.summary_addr,
                ind_offset: adapter.ind_offset,
                summary_offset: adapter.summary_offset,
                adapter_id: adapter.adapter_id,
            };
            KVM_IRQ_ROUTING_S390_ADAPTER
        }
        Route::HvSint(HvSint { vcpu, sint }) => {
            u.hv_sint = kvm_irq_routing_hv_sint { vcpu, sint };
            KVM_IRQ_ROUTING_HV_SINT
        }
        Route::XenEvtchn(XenEvtchn {
            port,
            vcpu,
            priority,
        }) => {
            u.xen_evtchn = kvm_irq_routing_xen_evtchn {
                port,
                vcpu,
                priority,
            };
            KVM_IRQ_ROUTING_XEN_EVTCHN
        }
    };
    kvm_irq_routing_entry {
        gsi: entry.gsi.0,
        type_,
        flags,
        pad: 0,
        u,
    }
}

/// An entry from KVM's form: from another VMM's table, or a test's.
///
/// # Errors
///
/// [`AbiError`] for what the ABI does not have. Whether a VM takes the entry is
/// [`Rules`](crate::Rules)' to say.
///
/// # Safety
///
/// Every byte of `entry.u` is initialized: it came from KVM, from [`to_kvm`], or was zeroed
/// (`Default`) before a member was set. One made from a single small member (`Payload { hv_sint }`)
/// is not, and its type may say to read a larger one.
pub unsafe fn from_kvm(entry: &kvm_irq_routing_entry) -> Result<Entry, AbiError> {
    let kind = entry.type_;
    let known_flags = match kind {
        KVM_IRQ_ROUTING_MSI => KVM_MSI_VALID_DEVID,
        KVM_IRQ_ROUTING_IRQCHIP
        | KVM_IRQ_ROUTING_S390_ADAPTER
        | KVM_IRQ_ROUTING_HV_SINT
        | KVM_IRQ_ROUTING_XEN_EVTCHN => 0,
        unknown => return Err(AbiError::UnknownType(unknown)),
    };
    if entry.flags & !known_flags != 0 {
        let flags = entry.flags;
        return Err(AbiError::UnknownFlags { kind, flags });
    }
    // SAFETY: every member of both unions is made of integers alone, for which any initialized
    // bytes are a value, and the caller vouches that they are initialized.
    let route = unsafe {
        match kind {
            KVM_IRQ_ROUTING_IRQCHIP => {
                let kvm_irq_routing_irqchip { irqchip, pin } = entry.u.irqchip;
                let chip = Chip(irqchip);
                Route::Pin(ChipPin { chip, pin })
            }
            KVM_IRQ_ROUTING_MSI => {
                let msi = entry.u.msi;
                let has_devid = entry.flags & KVM_MSI_VALID_DEVID != 0;
                Route::Msi(Msi {
                    address: u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo),
                    data: msi.data,
                    devid: has_devid.then_some(msi.__bindgen_anon_1.devid),
                })
            }
            KVM_IRQ_ROUTING_S390_ADAPTER => {
                let adapter = entry.u.adapter;
                Route::S390Adapter(S390Adapter {
                    ind_addr: adapter.ind_addr,
                    summary_addr: adapter.summary_addr,
                    ind_offset: adapter.ind_offset,
                    summary_offset: adapter.summary_offset,
                    adapter_id: adapter.adapter_id,
                })
            }
            KVM_IRQ_ROUTING_HV_SINT => {
                let kvm_irq_routing_hv_sint { vcpu, sint } = entry.u.hv_sint;
                Route::HvSint(HvSint { vcpu, sint })
            }
            _ => {
                let evtchn = entry.u.xen_evtchn;
                Route::XenEvtchn(XenEvtchn {
                    port: evtchn.port,
                    vcpu: evtchn.vcpu,
                    priority: evtchn.priority,
                })
            }
        }
    };
    Ok(Entry {
        gsi: Gsi(entry.gsi),
        route,
    })
}

/// The state of an IOAPIC in KVM's form, for `KVM_SET_IRQCHIP` in a VM whose IOAPIC is KVM's.
///
/// KVM delivers at once what `irr` says and is not masked; the high lines of unmasked
/// edge-triggered pins were delivered when they rose, or lost, and are left out.
pub fn ioapic_to_kvm(state: &IoapicState) -> kvm_ioapic_state {
    let waits = |bits| {
        let entry = Redirection::from_bits(bits, true);
        entry.is_level() || entry.is_masked()
    };
    let pins = (0..).zip(state.redirections);
    let waiting = pins.filter(|&(_, bits)| waits(bits));
    let waiting = waiting.fold(0, |set, (pin, _)| set | 1u32 << pin);
    kvm_ioapic_state {
        base_address: IOAPIC_BASE,
        ioregsel: state.ioregsel.into(),
        id: state.id.into(),
        irr: state.lines & waiting,
        pad: 0,
        redirtbl: state.redirections.map(|bits| RedirectionBits { bits }),
    }
}

/// The state of KVM's IOAPIC (`KVM_GET_IRQCHIP`) for one in user space. Where KVM's was
/// (`base_address`) is not the chip's to know, but its bus's.
///
/// # Errors
///
/// [`IoapicStateError`] for what no register can hold;
/// [`restore`](crate::ioapic::SplitIoapic::restore) looks at the rest.
pub fn ioapic_from_kvm(state: &kvm_ioapic_state) -> Result<IoapicState, IoapicStateError> {
    let select = u8::try_from(state.ioregsel);
    let id = u8::try_from(state.id);
    Ok(IoapicState {
        version: StateVersion::CURRENT,
        ioregsel: select.map_err(|_| IoapicStateError::Select(state.ioregsel))?,
        id: id.map_err(|_| IoapicStateError::Id(state.id))?,
        lines: state.irr,
        redirections: state.redirtbl.map(|entry| {
            // SAFETY: both members of the union are eight bytes of integers without padding, so
            // whichever was set, all of it is.
            unsafe { entry.bits }
        }),
    })
}

/// The state of a PIC in KVM's form.
pub fn pic_to_kvm(state: &PicState) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: state.last_irr,
        irr: state.irr,
        imr: state.imr,
        isr: state.isr,
        priority_add: state.priority_add,
        irq_base: state.irq_base,
        read_reg_select: state.read_reg_select,
        poll: state.poll,
        special_mask: state.special_mask,
        init_state: state.init_state,
        auto_eoi: state.auto_eoi,
        rotate_on_auto_eoi: state.rotate_on_auto_eoi,
        special_fully_nested_mode: state.special_fully_nested_mode,
        init4: state.init4,
        elcr: state.elcr,
        elcr_mask: state.elcr_mask,
    }
}

/// The state of a PIC (`KVM_GET_IRQCHIP`).
pub fn pic_from_kvm(state: &kvm_pic_state) -> PicState {
    PicState {
        last_irr: state.last_irr,
        irr: state.irr,
        imr: state.imr,
        isr: state.isr,
        priority_add: state.priority_add,
        irq_base: state.irq_base,
        read_reg_select: state.read_reg_select,
        poll: state.poll,
        special_mask: state.special_mask,
        init_state: state.init_state,
        auto_eoi: state.auto_eoi,
        rotate_on_auto_eoi: state.rotate_on_auto_eoi,
        special_fully_nested_mode: state.special_fully_nested_mode,
        init4: state.init4,
        elcr: state.elcr,
        elcr_mask: state.elcr_mask,
    }
}

/// The state of the timer in KVM's form.
pub fn pit_to_kvm(state: &PitState) -> kvm_pit_state2 {
    kvm_pit_state2 {
        channels: state.channels.map(|state| kvm_pit_channel_state {
            count: state.count,
            latched_count: state.latched_count,
            count_latched: state.count_latched,
            status_latched: state.status_latched,
            status: state.status,
            read_state: state.read_state,
            write_state: state.write_state,
            write_latch: state.write_latch,
            rw_mode: state.rw_mode,
            mode: state.mode,
            bcd: state.bcd,
            gate: state.gate,
            count_load_time: state.count_load_time,
        }),
        flags: state.flags,
        reserved: [0; 9],
    }
}

/// The state of the timer (`KVM_GET_PIT2`).
pub fn pit_from_kvm(state: &kvm_pit_state2) -> PitState {
    PitState {
        channels: state.channels.map(|state| PitChannelState {
            count: state.count,
            latched_count: state.latched_count,
            count_latched: state.count_latched,
            status_latched: state.status_latched,
            status: state.status,
            read_state: state.read_state,
            write_state: state.write_state,
            write_latch: state.write_latch,
            rw_mode: state.rw_mode,
            mode: state.mode,
            bcd: state.bcd,
            gate: state.gate,
            count_load_time: state.count_load_time,
        }),
        flags: state.flags,
    }
}
