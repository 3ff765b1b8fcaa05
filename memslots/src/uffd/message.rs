// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the kernel tells: its messages, as data. Any 32 bytes decode to something, or to an error.

use crate::Hva;
use std::ops::Range;
use thiserror::Error;

/// `struct uffd_msg`, as it is read.
pub type RawMessage = [u8; 32];

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

const FLAG_WRITE: u64 = 1 << 0;
const FLAG_WP: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;

/// A thread that waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What it touched: the first address of the page, or with [`Features::EXACT_ADDRESS`](super::Features) the very
    /// byte.
    pub address: Hva,
    /// Why it waits.
    pub kind: FaultKind,
    /// Whether it writes.
    pub write: bool,
    /// Which thread (its `gettid`), with [`Features::THREAD_ID`](super::Features); without, 0.
    pub thread: u32,
}

/// Why a fault is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// The page is not there.
    Missing,
    /// The page cache has it, the mapping not.
    Minor,
    /// It is there and write-protected.
    WriteProtect,
}

/// What the kernel told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// A thread waits for a page.
    Fault(Fault),
    /// The process has forked, and the child's memory is told of by this descriptor, which is the reader's now.
    Fork {
        /// Its number.
        descriptor: u32,
    },
    /// Memory has moved within the process (`mremap`).
    Remap {
        /// Where it was.
        from: Hva,
        /// Where it is.
        to: Hva,
        /// How much, in bytes.
        size: u64,
    },
    /// Pages are given back: they are missing from now on.
    Remove(Range<usize>),
    /// Memory is unmapped.
    Unmap(Range<usize>),
}

/// A message of an unknown kind.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a userfaultfd message of the unknown kind {kind:#x}")]
pub struct UnknownMessage {
    /// Its first byte.
    pub kind: u8,
}

/// Decodes a message.
///
/// # Errors
/// [`UnknownMessage`].
pub fn decode(raw: &RawMessage) -> Result<Message, UnknownMessage> {
    // A kind, seven reserved bytes, and three words.
    let word = |index: usize| {
        let mut bytes = [0; 8];
        let from = raw.iter().skip(8 + index * 8);
        bytes
            .iter_mut()
            .zip(from)
            .for_each(|(to, from)| *to = *from);
        u64::from_ne_bytes(bytes)
    };
    let low = |index: usize| word(index).to_ne_bytes();
    // The first four bytes in memory, whatever the byte order.
    let half = |index: usize| {
        let [a, b, c, d, ..] = low(index);
        u32::from_ne_bytes([a, b, c, d])
    };
    let [kind, ..] = *raw;
    Ok(match kind {
        EVENT_PAGEFAULT => {
            let flags = word(0);
            let kind = if flags & FLAG_WP != 0 {
                FaultKind::WriteProtect
            } else if flags & FLAG_MINOR != 0 {
                FaultKind::Minor
            } else {
                FaultKind::Missing
            };
            Message::Fault(Fault {
                address: Hva(word(1) as usize),
                kind,
                write: flags & FLAG_WRITE != 0,
                thread: half(2),
            })
        }
        EVENT_FORK => Message::Fork {
            descriptor: half(0),
        },
        EVENT_REMAP => Message::Remap {
            from: Hva(word(0) as usize),
            to: Hva(word(1) as usize),
            size: word(2),
        },
        EVENT_REMOVE => Message::Remove(word(0) as usize..word(1) as usize),
        EVENT_UNMAP => Message::Unmap(word(0) as usize..word(1) as usize),
        kind => return Err(UnknownMessage { kind }),
    })
}

/// The kernel's form of a message: for fakes and tests.
pub fn encode(message: &Message) -> RawMessage {
    let (kind, words) = match message {
        Message::Fault(fault) => {
            let mut flags = if fault.write { FLAG_WRITE } else { 0 };
            flags |= match fault.kind {
                FaultKind::Missing => 0,
                FaultKind::Minor => FLAG_MINOR,
                FaultKind::WriteProtect => FLAG_WP,
            };
            (
                EVENT_PAGEFAULT,
                [flags, fault.address.0 as u64, in_first_half(fault.thread)],
            )
        }
        Message::Fork { descriptor } => (EVENT_FORK, [in_first_half(*descriptor), 0, 0]),
        Message::Remap { from, to, size } => (EVENT_REMAP, [from.0 as u64, to.0 as u64, *size]),
        Message::Remove(range) => (EVENT_REMOVE, [range.start as u64, range.end as u64, 0]),
        Message::Unmap(range) => (EVENT_UNMAP, [range.start as u64, range.end as u64, 0]),
    };
    let mut raw = [0; 32];
    let bytes = [kind, 0, 0, 0, 0, 0, 0, 0]
        .into_iter()
        .chain(words.into_iter().flat_map(u64::to_ne_bytes));
    raw.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    raw
}

fn in_first_half(value: u32) -> u64 {
    let [a, b, c, d] = value.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn messages() -> impl Strategy<Value = Message> {
        let kinds = prop_oneof![
            Just(FaultKind::Missing),
            Just(FaultKind::Minor),
            Just(FaultKind::WriteProtect)
        ];
        let faults = (any::<usize>(), kinds, any::<bool>(), any::<u32>()).prop_map(
            |(address, kind, write, thread)| {
                Message::Fault(Fault {
                    address: Hva(address),
                    kind,
                    write,
                    thread,
                })
            },
        );
        let ranges = (any::<usize>(), any::<usize>()).prop_map(|(start, end)| start..end);
        prop_oneof![
            faults,
            any::<u32>().prop_map(|descriptor| Message::Fork { descriptor }),
            (any::<usize>(), any::<usize>(), any::<u64>()).prop_map(|(from, to, size)| {
                Message::Remap {
                    from: Hva(from),
                    to: Hva(to),
                    size,
                }
            }),
            ranges.clone().prop_map(Message::Remove),
            ranges.prop_map(Message::Unmap),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes(message in messages()) {
            prop_assert_eq!(decode(&encode(&message)), Ok(message));
        }

        #[test]
        fn any_bytes_decode_to_something_or_to_an_error(raw: [u8; 32], kind in 0x10u8..0x18) {
            let _ = decode(&raw);
            let mut likely = raw;
            likely[0] = kind;
            prop_assert_eq!(decode(&likely).is_ok(), (0x12..=0x16).contains(&kind));
        }
    }

    /// As a kernel wrote it, byte by byte.
    #[test]
    fn a_write_protect_fault_of_the_kernel() {
        let mut raw = [0; 32];
        raw[0] = 0x12;
        raw[8] = 3;
        raw[16..24].copy_from_slice(&0x7f00_1234_5000u64.to_ne_bytes());
        raw[24..28].copy_from_slice(&77u32.to_ne_bytes());
        let fault = Fault {
            address: Hva(0x7f00_1234_5000),
            kind: FaultKind::WriteProtect,
            write: true,
            thread: 77,
        };
        assert_eq!(decode(&raw), Ok(Message::Fault(fault)));
    }
}
