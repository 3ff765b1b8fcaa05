// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a device stops.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{GuestAddress, GuestMemoryError};

/// A device cannot go on: it is marked as needing a reset (virtio 1.2, 2.1.1), the driver is told, and its queues rest
/// until the driver has reset it. The guest goes on, and so do the other devices.
///
/// It is not for a request that fails. A disk that cannot be read answers that request with an error status and serves
/// the next one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The driver broke the rules of the queue: an index out of range, a ring outside of memory.
    #[error("queue {queue}: {source}")]
    Queue {
        /// The queue's number.
        queue: u16,
        /// virtio-queue's verdict.
        source: virtio_queue::Error,
    },
    /// The driver has put a ring where there is no memory, or none that can be written.
    #[error(
        "queue {queue}: the {ring}, {len} bytes at {address:#x}, is not in memory that can be {}",
        if *written { "written" } else { "read" },
        address = address.0
    )]
    Ring {
        /// The queue's number.
        queue: u16,
        /// Which of its three parts.
        ring: &'static str,
        /// Where the driver says that it is.
        address: GuestAddress,
        /// How long it is for the queue's size, bytes.
        len: u64,
        /// The device has to write it.
        written: bool,
    },
    /// The driver made available what is no chain of buffers.
    #[error("queue {queue}, descriptor {head}: {what}")]
    Chain {
        /// The queue's number.
        queue: u16,
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        what: BadChain,
    },
    /// A buffer is not in guest memory, or may not be written.
    #[error("a buffer at {address:#x}: {source}", address = address.0)]
    Buffer {
        /// The first address of the part that cannot be accessed.
        address: GuestAddress,
        /// Why.
        source: GuestMemoryError,
    },
    /// What the driver asks in a queue makes no sense, and no answer to it can say so.
    #[error("{0}")]
    Driver(String),
    /// The device's own handler panicked: a bug of this program, which the panic's message has.
    #[error("its handler panicked")]
    Panicked,
    /// The host refused what the device cannot do without.
    #[error("cannot {what}: {source}")]
    Host {
        /// What it was for.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

/// What is wrong with a chain of descriptors (virtio 1.2, 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadChain {
    /// The first descriptor is none of the table.
    #[error("it is beyond the table's {size} descriptors")]
    Head {
        /// Entries of the table.
        size: u16,
    },
    /// It ends although its last descriptor says that there is a next: a loop, a next descriptor or an indirect table
    /// that cannot be, or more than 2^32 bytes.
    #[error(
        "the chain breaks off after {after} descriptors: a loop, a bad index or table, or 4 GiB of buffers"
    )]
    Broken {
        /// Descriptors that could be followed.
        after: usize,
    },
    /// More descriptors than a chain may have (2.7.5.3.1).
    #[error("the chain has more than {most} descriptors")]
    Long {
        /// So many it may have.
        most: usize,
    },
    /// A buffer for the device to read behind one for it to write (2.7.4.2).
    #[error("a buffer to read comes behind one to write")]
    Order,
}

/// So many lines about one device are logged.
const MOST_LINES: u32 = 16;

/// What is logged about a device. A driver can break it, reset it and break it again for ever: after some lines there
/// are no more. Clones are of the same device.
#[derive(Clone, Debug)]
pub(super) struct Complaints {
    device: String,
    lines: Arc<AtomicU32>,
}

impl Complaints {
    /// About the device of this name and kind.
    pub(super) fn of(name: &str, kind: &str) -> Self {
        Complaints {
            device: format!("{name} ({kind})"),
            lines: Arc::default(),
        }
    }

    /// Logs a line that begins with the device.
    pub(super) fn line(&self, level: log::Level, text: fmt::Arguments<'_>) {
        // Relaxed: a count and nothing else.
        let before = self
            .lines
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |lines| {
                (lines < MOST_LINES).then_some(lines + 1)
            });
        let Ok(before) = before else {
            return;
        };
        let last = match before + 1 == MOST_LINES {
            true => "; no more is said of this device",
            false => "",
        };
        log::log!(level, "{} {text}{last}", self.device);
    }
}
