// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ioctls: the capabilities of [`kvm_ioctls::VmFd`]. All of the crate's `unsafe` is here.

#![allow(unsafe_code)]

pub mod abi;
mod routing_buffer;

use std::ffi::c_ulong;

use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC, KVM_CAP_IRQ_ROUTING, KVM_CAP_PIT2, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_XEN_HVM, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID, KVM_PIT_SPEAKER_DUMMY, KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL, KVMIO,
    kvm_enable_cap, kvm_irq_level, kvm_irq_routing, kvm_irqchip, kvm_msi, kvm_pit_config,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ptr};

use self::routing_buffer::RoutingBuffer;
use crate::gsi::Gsi;
use crate::host::{
    AccessIrqchip, AttachIrqfd, CreateIrqchip, Errno, SetGsiRouting, SetIrqLine, SignalMsi,
};
use crate::ioapic::IoapicState;
use crate::irqchip::{IrqchipKind, PicState, PitState};
use crate::route::Msi;
use crate::rules::Rules;
use crate::table::Table;

// kvm-ioctls has KVM_IRQ_LINE, which keeps the status to itself.
const KVM_IRQ_LINE_STATUS: c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    KVMIO,
    0x67,
    size_of::<kvm_irq_level>() as u32,
);

// kvm-ioctls takes the bindings' own buffer only (see `routing_buffer`).
const KVM_SET_GSI_ROUTING: c_ulong =
    ioctl_expr(_IOC_WRITE, KVMIO, 0x6a, size_of::<kvm_irq_routing>() as u32);

const EPERM: i32 = 1;
const ENXIO: i32 = 6;
const EOVERFLOW: i32 = 75;

impl CreateIrqchip for VmFd {
    fn has_pit2(&self) -> bool {
        self.check_extension_raw(c_ulong::from(KVM_CAP_PIT2)) > 0
    }

    fn has_split_irqchip(&self) -> bool {
        self.check_extension_raw(c_ulong::from(KVM_CAP_SPLIT_IRQCHIP)) > 0
    }

    fn create_irqchip(&self) -> Result<(), Errno> {
        self.create_irq_chip()
    }

    fn create_pit2(&self, speaker: bool) -> Result<(), Errno> {
        let flags = if speaker { KVM_PIT_SPEAKER_DUMMY } else { 0 };
        VmFd::create_pit2(
            self,
            kvm_pit_config {
                flags,
                ..Default::default()
            },
        )
    }

    fn create_split_irqchip(&self, pins: u32) -> Result<(), Errno> {
        self.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [u64::from(pins), 0, 0, 0],
            ..Default::default()
        })
    }
}

/// A chip of the in-kernel irqchip, zeroed.
fn irqchip(chip_id: u32) -> kvm_irqchip {
    kvm_irqchip {
        chip_id,
        ..Default::default()
    }
}

fn pic_id(pic: usize) -> Result<u32, Errno> {
    match pic {
        0 => Ok(KVM_IRQCHIP_PIC_MASTER),
        1 => Ok(KVM_IRQCHIP_PIC_SLAVE),
        _ => Err(Errno::new(ENXIO)),
    }
}

impl AccessIrqchip for VmFd {
    fn pic(&self, pic: usize) -> Result<PicState, Errno> {
        let mut chip = irqchip(pic_id(pic)?);
        self.get_irqchip(&mut chip)?;
        // SAFETY: a PIC's state is bytes, and all of the union was zeroed before KVM wrote to it.
        Ok(abi::pic_from_kvm(&unsafe { chip.chip.pic }))
    }

    fn set_pic(&self, pic: usize, state: &PicState) -> Result<(), Errno> {
        let mut chip = irqchip(pic_id(pic)?);
        chip.chip.pic = abi::pic_to_kvm(state);
        self.set_irqchip(&chip)
    }

    fn ioapic(&self) -> Result<IoapicState, Errno> {
        let mut chip = irqchip(KVM_IRQCHIP_IOAPIC);
        self.get_irqchip(&mut chip)?;
        // SAFETY: an IOAPIC's state is integers, and all of the union was zeroed before KVM wrote
        // to it.
        let state = unsafe { chip.chip.ioapic };
        abi::ioapic_from_kvm(&state).map_err(|_| Errno::new(EOVERFLOW))
    }

    fn set_ioapic(&self, state: &IoapicState) -> Result<(), Errno> {
        let mut chip = irqchip(KVM_IRQCHIP_IOAPIC);
        chip.chip.ioapic = abi::ioapic_to_kvm(state);
        self.set_irqchip(&chip)
    }

    fn pit(&self) -> Result<PitState, Errno> {
        Ok(abi::pit_from_kvm(&self.get_pit2()?))
    }

    fn set_pit(&self, state: &PitState) -> Result<(), Errno> {
        self.set_pit2(&abi::pit_to_kvm(state))
    }
}

impl SetGsiRouting for VmFd {
    fn rules(&self, irqchip: IrqchipKind) -> Rules {
        let ask = |cap| self.check_extension_raw(c_ulong::from(cap));
        // A capability below 0 is an error, and then there is none.
        let limit = u32::try_from(ask(KVM_CAP_IRQ_ROUTING)).unwrap_or(0);
        let xen = ask(KVM_CAP_XEN_HVM);
        let two_level = xen > 0 && xen as u32 & KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL != 0;
        Rules {
            hv_sint: ask(KVM_CAP_HYPERV_SYNIC) > 0,
            xen_evtchn: two_level,
            ..Rules::new(irqchip, limit)
        }
    }

    fn set_gsi_routing(&self, table: &Table) -> Result<(), Errno> {
        let routing = RoutingBuffer::of(table);
        // SAFETY: KVM reads the header and as many entries as it says, which are there.
        match unsafe { ioctl_with_ptr(self, KVM_SET_GSI_ROUTING, routing.as_ptr()) } {
            0 => Ok(()),
            _ => Err(Errno::last()),
        }
    }
}

impl AttachIrqfd for VmFd {
    fn attach_irqfd(
        &self,
        fd: &EventFd,
        resample: Option<&EventFd>,
        gsi: Gsi,
    ) -> Result<(), Errno> {
        match resample {
            None => self.register_irqfd(fd, gsi.0),
            Some(resample) => self.register_irqfd_with_resample(fd, resample, gsi.0),
        }
    }

    fn detach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Errno> {
        self.unregister_irqfd(fd, gsi.0)
    }
}

impl SetIrqLine for VmFd {
    fn set_irq_line(&self, gsi: Gsi, level: bool) -> Result<i32, Errno> {
        let mut line = kvm_irq_level {
            level: u32::from(level),
            ..Default::default()
        };
        line.__bindgen_anon_1.irq = gsi.0;
        // SAFETY: `self` is a VM's descriptor, and KVM reads and writes one `kvm_irq_level`, which
        // `line` is.
        let result = unsafe { ioctl_with_mut_ref(self, KVM_IRQ_LINE_STATUS, &mut line) };
        if result < 0 {
            return Err(Errno::last());
        }
        // SAFETY: both members of the union are 32-bit integers, and it was initialized above.
        Ok(unsafe { line.__bindgen_anon_1.status })
    }
}

impl SignalMsi for VmFd {
    fn signal_msi(&self, msi: Msi) -> Result<i32, Errno> {
        let (flags, devid) = match msi.devid {
            Some(devid) => (KVM_MSI_VALID_DEVID, devid),
            None => (0, 0),
        };
        let result = VmFd::signal_msi(
            self,
            kvm_msi {
                address_lo: msi.address as u32,
                address_hi: (msi.address >> 32) as u32,
                data: msi.data,
                flags,
                devid,
                ..Default::default()
            },
        );
        match result {
            // KVM's count for "no vCPU has that id" is -1, which leaves the system call as this
            // errno.
            Err(errno) if errno.errno() == EPERM => Ok(-1),
            other => other,
        }
    }
}
