// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ioctl: `KVM_IOEVENTFD` on a `kvm_ioctls::VmFd`.
//!
//! `VmFd::register_ioevent` takes length and datamatch from one type parameter, so it can say "any
//! length" and "this value", and not "any value of this length". Hence our own call.

use std::os::fd::RawFd;

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio, kvm_ioeventfd_flag_nr_virtio_ccw_notify,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::ioeventfd::{IoEvent, IoEventAddress, SetIoEventFd};

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// The structure that KVM reads.
fn request(event: &IoEvent, fd: RawFd, attach: bool) -> kvm_ioeventfd {
    let mut flags = match event.address {
        IoEventAddress::Mmio(_) => 0,
        IoEventAddress::Pio(_) => 1 << kvm_ioeventfd_flag_nr_pio,
        IoEventAddress::CcwNotify(_) => 1 << kvm_ioeventfd_flag_nr_virtio_ccw_notify,
    };
    if event.writes.datamatch().is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    if !attach {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    kvm_ioeventfd {
        datamatch: event.writes.datamatch().unwrap_or(0),
        addr: event.address.value(),
        len: event.writes.length(),
        fd,
        flags,
        ..Default::default()
    }
}

impl SetIoEventFd for VmFd {
    fn set_ioeventfd(&self, event: &IoEvent, fd: RawFd, attach: bool) -> Result<(), errno::Error> {
        let request = request(event, fd, attach);
        // SAFETY: `self` is a VM's descriptor and KVM_IOEVENTFD reads one `kvm_ioeventfd`, which
        // `request` is for the whole call. KVM checks the descriptor in it.
        let result = unsafe { ioctl_with_ref(self, KVM_IOEVENTFD(), &request) };
        if result == 0 {
            Ok(())
        } else {
            Err(errno::Error::last())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioeventfd::{WriteLength, WriteMatch};
    use vm_device::bus::{MmioAddress, PioAddress};

    #[test]
    fn every_combination_is_encoded_as_kvm_reads_it() {
        let cases = [
            (WriteMatch::Any, 0, None),
            (WriteMatch::Length(WriteLength::One), 1, None),
            (WriteMatch::Length(WriteLength::Two), 2, None),
            (WriteMatch::Length(WriteLength::Four), 4, None),
            (WriteMatch::Length(WriteLength::Eight), 8, None),
            (WriteMatch::U8(0), 1, Some(0)),
            (WriteMatch::U16(0xfffe), 2, Some(0xfffe)),
            (WriteMatch::U32(7), 4, Some(7)),
            (WriteMatch::U64(u64::MAX), 8, Some(u64::MAX)),
        ];
        let addresses = [
            (IoEventAddress::Mmio(MmioAddress(0x1000)), 0x1000, 0),
            (IoEventAddress::Pio(PioAddress(0xf4)), 0xf4, 2),
            (IoEventAddress::CcwNotify(3), 3, 8),
        ];
        for (writes, len, value) in cases {
            for (address, number, bus_flag) in addresses {
                for (attach, deassign_flag) in [(true, 0), (false, 4)] {
                    let got = request(&IoEvent { address, writes }, 9, attach);
                    let datamatch_flag = u32::from(value.is_some());
                    assert_eq!(got.flags, bus_flag | deassign_flag | datamatch_flag);
                    assert_eq!((got.addr, got.len, got.fd), (number, len, 9));
                    assert_eq!(got.datamatch, value.unwrap_or(0));
                }
            }
        }
    }
}
