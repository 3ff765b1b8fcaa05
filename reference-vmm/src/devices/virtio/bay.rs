// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine's places for virtio devices: addresses, interrupts, doorbells.

use std::sync::Arc;

use io_bus::{IoEvent, IoEventAddress, IoEventFd, SetIoEventFd, WriteMatch};
use vm_device::bus::MmioAddress;
use vmm_sys_util::eventfd::EventFd;

use super::mmio::Doorbells;
use super::registers::QUEUE_NOTIFY;
use crate::arch::acpi::VirtioMmio;
use crate::arch::layout;

/// The interrupts that virtio devices get, in this order. The first are nobody's on a PC; behind them are those of ISA
/// that nothing in this machine has. An interrupt is one device's alone, so that it can be an edge.
const GSIS: [u32; 18] = [
    16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 14, 15, 3, 1,
];

/// So many virtio devices a machine can have.
pub const MOST: usize = GSIS.len();

/// Where the first `count` devices are. More than [`MOST`] there are none.
pub fn places(count: usize) -> Vec<VirtioMmio> {
    let len = layout::VIRTIO_MMIO_SIZE as u32;
    let first = layout::VIRTIO_MMIO.start as u32;
    let places = (0..).zip(GSIS).take(count);
    places
        .map(|(at, gsi)| VirtioMmio {
            address: first + at * len,
            len,
            gsi,
        })
        .collect()
}

const _: () = assert!(
    MOST as u64 * layout::VIRTIO_MMIO_SIZE <= layout::VIRTIO_MMIO.end - layout::VIRTIO_MMIO.start
);

/// ioeventfds on the notification register of the device at an address.
pub struct KvmDoorbells<H> {
    host: H,
    register: MmioAddress,
}

impl<H> KvmDoorbells<H> {
    /// Those of the device whose registers begin at `base`.
    pub fn new(host: H, base: u64) -> Self {
        let register = MmioAddress(base + QUEUE_NOTIFY);
        KvmDoorbells { host, register }
    }
}

impl<H: SetIoEventFd + Clone + Send + Sync + 'static> Doorbells for KvmDoorbells<H> {
    fn attach(&self, queue: u16, event: &EventFd) -> Result<Box<dyn Send>, io_bus::Error> {
        let at = IoEvent {
            address: IoEventAddress::Mmio(self.register),
            writes: WriteMatch::U32(queue.into()),
        };
        let event = event.try_clone().map(Arc::new);
        let event = event.map_err(|error| io_bus::Error::AssignIoEventFd {
            event: at,
            source: vmm_sys_util::errno::Error::new(error.raw_os_error().unwrap_or(libc::EMFILE)),
        })?;
        Ok(Box::new(IoEventFd::attach(self.host.clone(), at, event)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_devices_share_an_address_or_an_interrupt_and_none_is_anothers() {
        let places = places(MOST + 5);
        assert_eq!(places.len(), MOST);
        let gsis: HashSet<_> = places.iter().map(|place| place.gsi).collect();
        let addresses: HashSet<_> = places.iter().map(|place| place.address).collect();
        assert_eq!((gsis.len(), addresses.len()), (MOST, MOST));
        for taken in [layout::COM1_GSI, layout::GED_GSI, 0, 2, 8, 13] {
            assert!(!gsis.contains(&taken), "{taken}");
        }
        for gsi in gsis {
            assert!(gsi < layout::IOAPIC_PINS);
        }
    }
}
