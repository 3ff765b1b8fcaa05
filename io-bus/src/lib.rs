// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The I/O buses of a KVM virtual machine: lock-free MMIO and PIO dispatch, ioeventfd

#![cfg_attr(not(feature = "kvm"), forbid(unsafe_code))]
#![deny(unsafe_code)]

mod bus;
mod device;
mod dispatcher;
mod error;
mod fragment;
mod inside;
mod ioeventfd;
#[cfg(feature = "kvm")]
#[allow(unsafe_code)]
mod kvm;
mod range;
mod table;

pub use bus::{IoBus, NR_IOBUS_DEVS, Pending, Registration, Removal};
pub use device::{Answer, At, IoDevice, Locked, Mmio, Pio};
pub use dispatcher::{Dispatcher, Outcome};
pub use error::Error;
pub use fragment::{Fragment, MMIO_SIZE, PAGE_SIZE, fragments, is_whole};
pub use inside::is_inside_access;
pub use ioeventfd::{IoEvent, IoEventAddress, IoEventFd, SetIoEventFd, WriteLength, WriteMatch};
pub use range::{BusKind, IoRange};
pub use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
