// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtio-mmio registers (virtio 1.2, 4.2.2) as plain data: a register write in, what has to happen out.
//!
//! ```text
//!   status   0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK
//!            ▲                              │ refused: the bit reads 0        │ Effect::Activate
//!            └──────────── a write of 0 ◄───┴─────────────────────────────────┘ Effect::Reset
//! ```

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// `Status`: the guest has noticed the device.
pub const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
/// `Status`: the guest has a driver for it.
pub const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
/// `Status`: the driver can drive it.
pub const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
/// `Status`: features are settled.
pub const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
/// `Status`: the device does nothing until it is reset.
pub const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
/// `Status`: the driver has given the device up.
pub const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The features that are the transport's and the queues', offered by each device.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Where the device's configuration space begins.
pub const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
/// The register that a driver writes a queue's number to.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// `MagicValue`: "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// `Version`: not the legacy interface.
const VERSION: u32 = 2;
/// `VendorID`: "RVMM". Drivers show it.
const VENDOR: u32 = u32::from_le_bytes(*b"RVMM");

/// A queue as the driver sets it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// The driver has set it up.
    pub ready: bool,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring, the driver's area.
    pub driver: u64,
    /// Used ring, the device's area.
    pub device: u64,
}

/// What a write asks of the device behind the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver is ready.
    Activate,
    /// The driver resets the device. [`Registers::reset`] completes it.
    Reset,
    /// There is something in this queue.
    Notify(u32),
    /// The driver has seen these bits of the interrupt status.
    Acknowledge(u32),
    /// The driver stops a queue that is served.
    StopQueue(u16),
}

/// What the driver has written. The registers that the device changes (interrupt status, configuration and its
/// generation) are not here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
}

/// What does not change: the device's answers to the driver.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// Device type.
    pub device_id: u32,
    /// All that is offered.
    pub features: u64,
    /// The largest size of each queue.
    pub queue_sizes: &'a [u16],
}

impl Registers {
    /// After reset, of a device with so many queues.
    pub fn new(queues: usize) -> Self {
        Registers {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: vec![QueueSetup::default(); queues],
        }
    }

    /// Of a device with so many queues: what a foreign state has more of goes, and what it lacks is not ready.
    pub(super) fn with_queues(mut self, queues: usize) -> Self {
        self.queues.resize(queues, QueueSetup::default());
        self
    }

    /// After the driver's reset.
    pub fn reset(&mut self) {
        *self = Registers::new(self.queues.len());
    }

    /// `Status`, without [`NEEDS_RESET`].
    pub fn status(&self) -> u32 {
        self.status
    }

    /// The features that the driver has accepted, settled or not.
    pub fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// The queues as the driver has set them up.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// Whether the driver has said that it is ready.
    pub fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Reads a register of the driver's or of the offer. None: not one of these; what is none at all reads 0.
    pub fn read(&self, offer: &Offer<'_>, offset: u64) -> Option<u32> {
        let queue = self.queues.get(self.queue_sel as usize);
        Some(match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => offer.device_id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(offer.features, self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let size = offer.queue_sizes.get(self.queue_sel as usize);
                size.copied().unwrap_or(0).into()
            }
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(|queue| queue.ready).into(),
            // No shared memory region: its length and base are all ones (4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_INTERRUPT_STATUS | VIRTIO_MMIO_STATUS | VIRTIO_MMIO_CONFIG_GENERATION => {
                return None;
            }
            _ => 0,
        })
    }

    /// Takes a write to a register. What the driver may not write at this moment is ignored (4.2.2.2 leaves it open).
    pub fn write(&mut self, offer: &Offer<'_>, offset: u64, value: u32) -> Effect {
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return Effect::Notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => return Effect::Acknowledge(value),
            VIRTIO_MMIO_STATUS => return self.write_status(offer, value),
            _ => return self.write_queue(offer, offset, value),
        }
        Effect::None
    }

    fn write_status(&mut self, offer: &Offer<'_>, value: u32) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // Bits are only ever added; one that the driver leaves out stays set.
        let mut new = value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        new &= !self.status;
        let version_1 = self.driver_features >> VIRTIO_F_VERSION_1 & 1 == 1;
        let acceptable = version_1 && self.driver_features & !offer.features == 0;
        if new & FEATURES_OK != 0 && !acceptable {
            new &= !FEATURES_OK;
        }
        // A driver that is ready before features are settled speaks an interface that this is not.
        if new & DRIVER_OK != 0 && (self.status | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.status |= new;
        if new & DRIVER_OK != 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    fn write_queue(&mut self, offer: &Offer<'_>, offset: u64, value: u32) -> Effect {
        let selected = self.queue_sel as usize;
        let (Some(queue), Some(most)) = (
            self.queues.get_mut(selected),
            offer.queue_sizes.get(selected),
        ) else {
            return Effect::None;
        };
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        if offset == VIRTIO_MMIO_QUEUE_READY {
            if self.status & DRIVER_OK == 0 {
                queue.ready = value & 1 == 1;
            } else if value & 1 == 0 && queue.ready {
                queue.ready = false;
                return Effect::StopQueue(selected as u16);
            }
            return Effect::None;
        }
        if queue.ready || self.status & DRIVER_OK != 0 {
            return Effect::None;
        }
        match offset {
            // A size that cannot be leaves 0, with which no queue can be used.
            VIRTIO_MMIO_QUEUE_NUM => {
                let size = u16::try_from(value).unwrap_or(0);
                let possible = size.is_power_of_two() && size <= *most;
                queue.size = if possible { size } else { 0 };
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.driver, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.driver, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.device, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.device, 1, value),
            _ => {}
        }
        Effect::None
    }
}

/// 32 bits of 64, by a selector beyond which there are zeros.
fn half(value: u64, selector: u32) -> u32 {
    match selector {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, selector: u32, half: u32) {
    match selector {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
