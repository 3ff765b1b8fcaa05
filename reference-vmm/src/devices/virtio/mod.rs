// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio devices on the MMIO transport (virtio 1.2, 4.2).
//!
//! ```text
//!   guest's driver ─ MMIO ─► mmio::MmioDevice ── activate ──► device::VirtioDevice   a file a kind of device:
//!        │  ▲                   registers                         │                   rng …
//!        │  └ irqfd ─ interrupt::DriverLink ◄──────────┐          ▼
//!        └ ioeventfd ─► queue::DeviceQueue ─► worker ─► device::Handler
//!                         chain::Chain         a thread each
//! ```
//!
//! A kind of device is one file: what it is ([`device::VirtioDevice`]) and what it does
//! ([`device::Handler`]). [`rng`] is the one to begin from.
//!
//! # What a driver can do wrong
//! Rings outside of memory, indices that run ahead, loops of descriptors, buffers where there is no memory or none to
//! write, lengths that overflow: the device is marked as needing a reset ([`fault::Fault`]), which is logged, up to 16
//! lines a device; the guest goes on, and can reset it. So it is where a handler panics. A chain is read once and checked
//! as a whole before a device sees it. A driver that adds buffers or notifies without end takes turns with the rest of
//! its device's work, on the device's own thread.

pub mod any;
pub mod bay;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod fake;
pub mod fault;
pub mod interrupt;
pub mod list;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod vsock;
pub mod worker;
