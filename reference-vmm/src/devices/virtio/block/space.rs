// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a disk tells its driver: features and the configuration space (virtio 1.2, 5.2.3 and 5.2.4), as plain data.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::config::{Cache, DiskConfig};
use super::image::{Image, Topology};

/// A sector, bytes: the unit of all positions (virtio 1.2, 5.2.6), whatever the block size.
pub const SECTOR: u64 = 512;
/// Descriptors of a queue.
pub const QUEUE_SIZE: u16 = 256;
/// `size_max`: the largest segment that a driver makes. It bounds nothing here: longer ones are served.
const SIZE_MAX: u32 = 1 << 20;
/// `seg_max`: with the header and the status as many as there are descriptors.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges of a discard.
pub const MAX_DISCARD_RANGES: u32 = 16;
/// Sectors of a range of a discard: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Ranges of a write of zeros.
pub const MAX_ZERO_RANGES: u32 = 1;
/// Sectors of it: 32 MiB. Where the host cannot do better they are written one by one, and a machine that is to pause
/// waits for that.
pub const MAX_ZERO_SECTORS: u32 = 1 << 16;

/// Where `writeback` is, the only field that a driver writes.
pub const WRITEBACK: u64 = 32;
/// Bytes of the configuration space, up to the fields of features that are not offered.
pub const LEN: usize = 60;

/// All that a driver may come to know of the disk. It is the same before and after a restore, whatever the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Feature bits, but for the transport's.
    pub features: u64,
    /// The size in [sectors](SECTOR).
    pub sectors: u64,
    /// Block sizes.
    pub topology: Topology,
    /// Queues.
    pub queues: u16,
    /// A write of zeros may give the space back to the host.
    pub zeroes_unmap: bool,
    /// The serial number, at most 20 bytes.
    pub serial: String,
}

impl Offer {
    /// What a disk of this image is.
    pub fn new(image: &Image, config: &DiskConfig) -> Self {
        let mut bits = vec![
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
        ];
        if image.is_readonly() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            // Always: a device that takes writes should (5.2.5.2), and a driver of one state meets the other one.
            bits.push(VIRTIO_BLK_F_FLUSH);
            bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
            if config.cache == Cache::Writeback {
                bits.push(VIRTIO_BLK_F_CONFIG_WCE);
            }
            if image.can_discard() {
                bits.push(VIRTIO_BLK_F_DISCARD);
            }
        }
        if config.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        Offer {
            features: bits.into_iter().fold(0, |all, bit| all | 1 << bit),
            sectors: image.sectors(),
            topology: image.topology(),
            queues: config.queues,
            zeroes_unmap: !image.is_readonly() && image.can_punch(),
            serial: config.id.clone().unwrap_or_default(),
        }
    }

    /// Whether a feature is offered.
    pub fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// The configuration space. Fields of features that are not offered are zero.
    pub fn space(&self, writeback: bool) -> [u8; LEN] {
        let mut space = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        // Bytes 16 to 19, the geometry, belong to a feature that is not offered.
        let Topology {
            logical,
            physical_exponent,
            alignment,
            min_io,
            optimal_io,
            ..
        } = self.topology;
        put(20, &logical.to_le_bytes());
        put(24, &[physical_exponent, alignment]);
        put(26, &min_io.to_le_bytes());
        put(28, &optimal_io.to_le_bytes());
        if self.has(VIRTIO_BLK_F_CONFIG_WCE) {
            put(WRITEBACK as usize, &[writeback.into()]);
        }
        if self.has(VIRTIO_BLK_F_MQ) {
            put(34, &self.queues.to_le_bytes());
        }
        if self.has(VIRTIO_BLK_F_DISCARD) {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_DISCARD_RANGES.to_le_bytes());
            put(44, &self.topology.discard_sectors.to_le_bytes());
        }
        if self.has(VIRTIO_BLK_F_WRITE_ZEROES) {
            put(48, &MAX_ZERO_SECTORS.to_le_bytes());
            put(52, &MAX_ZERO_RANGES.to_le_bytes());
            put(56, &[self.zeroes_unmap.into()]);
        }
        space
    }
}
