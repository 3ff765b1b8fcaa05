// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A packet's header (virtio 1.2, 5.10.6), and the numbers in it.
//!
//! The crate `virtio-vsock` has one as well. It reads a raw chain whose header and data are one descriptor each, or one
//! together; drivers may cut a packet as they like (2.7.4.1), and Linux does from 6.7 on, where it sends a program's
//! pages as they lie (`MSG_ZEROCOPY`). The chains of this transport, checked as a whole, have no such limit.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type that is offered.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_F_STREAM`: the feature's bit.
pub const F_STREAM: u32 = 0;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: its sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: its sender sends no more.
pub const SHUTDOWN_SEND: u32 = 1 << 1;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (5.10.6.7).
pub const EVENT_TRANSPORT_RESET: u32 = 0;

/// What a packet is for (5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Refuses it, or ends it at once.
    Rst = 3,
    /// Sends or receives no more, or both.
    Shutdown = 4,
    /// Data.
    Rw = 5,
    /// Nothing but the credit that each packet has.
    CreditUpdate = 6,
    /// Asks for a packet with credit.
    CreditRequest = 7,
}

impl Op {
    /// The operation of this number, if there is one.
    pub fn new(number: u16) -> Option<Self> {
        Some(match number {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`. Every value of every field is possible: it is the other side's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sends.
    pub src_cid: u64,
    /// To whom.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// [`TYPE_STREAM`].
    pub kind: u16,
    /// An [`Op`].
    pub op: u16,
    /// Of [`Op::Shutdown`].
    pub flags: u32,
    /// How many bytes the sender has room for, in this connection.
    pub buf_alloc: u32,
    /// How many bytes of this connection the sender has passed on, counted without end.
    pub fwd_cnt: u32,
}

impl Header {
    /// As it is in memory: little-endian, without gaps.
    pub fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The header that these bytes are.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        // The arrays' lengths are those of the types: the ends lie within 44.
        fn part<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
            std::array::from_fn(|byte| bytes[at + byte])
        }
        Header {
            src_cid: u64::from_le_bytes(part(bytes, 0)),
            dst_cid: u64::from_le_bytes(part(bytes, 8)),
            src_port: u32::from_le_bytes(part(bytes, 16)),
            dst_port: u32::from_le_bytes(part(bytes, 20)),
            len: u32::from_le_bytes(part(bytes, 24)),
            kind: u16::from_le_bytes(part(bytes, 28)),
            op: u16::from_le_bytes(part(bytes, 30)),
            flags: u32::from_le_bytes(part(bytes, 32)),
            buf_alloc: u32::from_le_bytes(part(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(part(bytes, 40)),
        }
    }

    /// The refusal of this packet, from where it was sent to.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            // A type that is unknown here is what its sender knows the connection by.
            kind: self.kind,
            op: Op::Rst as u16,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fields_are_where_the_standard_has_them() {
        let header = Header {
            src_cid: 0x0706_0504_0302_0100,
            dst_cid: 0x0f0e_0d0c_0b0a_0908,
            src_port: 0x1312_1110,
            dst_port: 0x1716_1514,
            len: 0x1b1a_1918,
            kind: 0x1d1c,
            op: 0x1f1e,
            flags: 0x2322_2120,
            buf_alloc: 0x2726_2524,
            fwd_cnt: 0x2b2a_2928,
        };
        let counting: [u8; HEADER_LEN] = std::array::from_fn(|at| at as u8);
        assert_eq!(header.bytes(), counting);
    }

    proptest! {
        #[test]
        fn any_44_bytes_are_a_header_and_come_back(bytes: [u8; 32], more: [u8; 12]) {
            let bytes: [u8; HEADER_LEN] = [&bytes[..], &more].concat().try_into().unwrap();
            let header = Header::from_bytes(&bytes);
            prop_assert_eq!(header.bytes(), bytes);
            let back = header.reset().reset();
            prop_assert_eq!((back.src_cid, back.src_port), (header.src_cid, header.src_port));
        }
    }

    #[test]
    fn operations_are_the_numbers_from_1_to_7() {
        for number in 0..=u16::MAX {
            let op = Op::new(number);
            assert_eq!(op.is_some(), (1..=7).contains(&number));
            assert!(op.is_none_or(|op| op as u16 == number));
        }
    }
}
