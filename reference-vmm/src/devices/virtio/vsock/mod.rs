// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-vsock, sockets between the guest and its host (virtio 1.2, 5.10), with Unix sockets at the host's end.
//!
//! ```text
//!   guest                                        host
//!   connect(CID 2, port P)  ─────────────────►   PATH_P, where a program listens
//!   listen(port P)          ◄─────────────────   connect(PATH), "CONNECT P\n"; the answer is "OK N\n"
//! ```
//!
//! It is the convention of Firecracker and cloud-hypervisor: what is written for them works here.
//!
//! # How to read it
//! [`packet`] (a packet's header), [`credit`] (how much may be under way) and [`state`] (a connection's life, as one
//! table) are numbers in and numbers out. [`connection`] has a socket beside them, [`switch`] has all connections and
//! whose turn it is, [`device`] is what the transport sees. [`handshake`] is the line that programs say first,
//! [`sockets`] are the paths, [`config`] is the command line, and [`guest`] a driver for tests.
//!
//! # Contract
//! - Streams only (`VIRTIO_VSOCK_F_STREAM`). A packet of another type, from or to another address, or of no connection
//!   is answered by an `RST`.
//! - Bytes arrive once, in order, and before the end of file behind them. What a side sends after the other has closed
//!   is lost, and it is told.
//! - A program on the host that does not read costs [`WINDOW`](credit::WINDOW) of memory, one in the guest nothing;
//!   neither keeps another connection waiting. [`switch`] says how many there can be.
//! - A guest that sends more than its credit, or more than its buffers hold, has its connection reset.
//! - A connection survives a pause. A driver that resets the device has none afterwards; nor has a restored guest, and
//!   that one is told (5.10.6.7) before it hears of a new one.
//!
//! # Threat model
//! Who can connect to the path (its user alone) can connect to every port of the guest's. The guest can connect to
//! every socket whose path is the given one with `_` and a number behind it: to give it less, give it a folder of its own.

pub mod config;
pub mod connection;
pub mod credit;
pub mod device;
pub mod guest;
pub mod handshake;
pub mod packet;
pub mod sockets;
pub mod state;
pub mod switch;
mod table;

pub use config::{VsockConfig, VsockError};
pub use device::{Vsock, VsockState};
