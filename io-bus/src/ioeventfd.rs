// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ioeventfd: a guest's write that KVM answers by itself, by signalling an eventfd.
//!
//! The vCPU does not leave the kernel, so a doorbell costs a microsecond where an exit costs
//! several. KVM looks through its own buses first; a write that an ioeventfd took is never seen by
//! a [`Dispatcher`](crate::Dispatcher).
//!
//! This file is the plain part: what can be asked for, as types that cannot say what KVM would
//! refuse as malformed, and the handle. The ioctl is behind [`SetIoEventFd`].

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_device::bus::{MmioAddress, PioAddress};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::Error;

/// The address whose writes are watched, and its bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoEventAddress {
    /// A guest physical address outside of memory.
    Mmio(MmioAddress),
    /// An x86 port.
    Pio(PioAddress),
    /// An s390 subchannel (`KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY`).
    CcwNotify(u64),
}

impl IoEventAddress {
    /// The address as a number on its bus.
    pub fn value(&self) -> u64 {
        match self {
            IoEventAddress::Mmio(address) => address.0,
            IoEventAddress::Pio(port) => u64::from(port.0),
            IoEventAddress::CcwNotify(subchannel) => *subchannel,
        }
    }
}

impl fmt::Display for IoEventAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IoEventAddress::Mmio(address) => write!(f, "MMIO {:#x}", address.0),
            IoEventAddress::Pio(port) => write!(f, "port {:#x}", port.0),
            IoEventAddress::CcwNotify(subchannel) => write!(f, "subchannel {subchannel:#x}"),
        }
    }
}

/// The length of a write in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum WriteLength {
    /// One byte.
    One = 1,
    /// Two bytes.
    Two = 2,
    /// Four bytes.
    Four = 4,
    /// Eight bytes.
    Eight = 8,
}

/// Which writes to the address count. The length is the value's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriteMatch {
    /// Every write that begins at the address, of any length and any data (KVM's length 0).
    ///
    /// On MMIO, KVM puts this on its fast MMIO bus too: it answers without decoding the
    /// instruction, which is the cheapest exit there is on hosts that can (Intel's EPT).
    Any,
    /// Every write of this length, whatever its data.
    Length(WriteLength),
    /// One-byte writes of this value.
    U8(u8),
    /// Two-byte writes of this value.
    U16(u16),
    /// Four-byte writes of this value. What a virtio-mmio queue's doorbell wants.
    U32(u32),
    /// Eight-byte writes of this value.
    U64(u64),
}

impl WriteMatch {
    /// The length as KVM takes it: 0 for any.
    pub fn length(&self) -> u32 {
        match self {
            WriteMatch::Any => 0,
            WriteMatch::Length(length) => *length as u32,
            WriteMatch::U8(_) => 1,
            WriteMatch::U16(_) => 2,
            WriteMatch::U32(_) => 4,
            WriteMatch::U64(_) => 8,
        }
    }

    /// The value that is compared, if one is.
    pub fn datamatch(&self) -> Option<u64> {
        match self {
            WriteMatch::Any | WriteMatch::Length(_) => None,
            WriteMatch::U8(value) => Some(u64::from(*value)),
            WriteMatch::U16(value) => Some(u64::from(*value)),
            WriteMatch::U32(value) => Some(u64::from(*value)),
            WriteMatch::U64(value) => Some(*value),
        }
    }
}

/// What an ioeventfd listens for (`struct kvm_ioeventfd` without its descriptor).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEvent {
    /// Where.
    pub address: IoEventAddress,
    /// Which writes there.
    pub writes: WriteMatch,
}

impl IoEvent {
    /// Whether KVM refuses to have both (EEXIST): one write could signal either.
    pub fn collides(&self, other: &IoEvent) -> bool {
        let (len, other_len) = (self.writes.length(), other.writes.length());
        let (value, other_value) = (self.writes.datamatch(), other.writes.datamatch());
        let values = value.is_none() || other_value.is_none() || value == other_value;
        self.address == other.address
            && (len == 0 || other_len == 0 || (len == other_len && values))
    }
}

impl fmt::Display for IoEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an ioeventfd at {} for ", self.address)?;
        match (self.writes.length(), self.writes.datamatch()) {
            (0, _) => f.write_str("every write"),
            (len, None) => write!(f, "{len}-byte writes"),
            (len, Some(value)) => write!(f, "{len}-byte writes of {value:#x}"),
        }
    }
}

/// The capability to attach and detach ioeventfds: `KVM_IOEVENTFD` on a VM's descriptor.
///
/// Implemented for [`kvm_ioctls::VmFd`] (feature `kvm`), and for references and `Arc`s of whatever
/// has it. A test implements it with whatever errno it wants to see handled.
///
/// # Contract
///
/// A call that fails has changed nothing. KVM keeps a reference of its own to the eventfd, so the
/// descriptor needs to be open only during a call.
///
/// [`kvm_ioctls::VmFd`]: https://docs.rs/kvm-ioctls/latest/kvm_ioctls/struct.VmFd.html
pub trait SetIoEventFd {
    /// Attaches `fd` (`attach`), or detaches it, which wants the very `event` that it was attached
    /// with.
    ///
    /// Attaching and detaching wait in KVM for an SRCU grace period: microseconds to milliseconds.
    ///
    /// # Errors
    ///
    /// EEXIST: a write could match this and one that is attached. ENOSPC: the bus is full. ENOENT:
    /// detaching what is not attached. EINVAL: the address and length wrap.
    fn set_ioeventfd(&self, event: &IoEvent, fd: RawFd, attach: bool) -> Result<(), errno::Error>;
}

impl<T: SetIoEventFd + ?Sized> SetIoEventFd for &T {
    fn set_ioeventfd(&self, event: &IoEvent, fd: RawFd, attach: bool) -> Result<(), errno::Error> {
        (**self).set_ioeventfd(event, fd, attach)
    }
}

impl<T: SetIoEventFd + ?Sized> SetIoEventFd for Arc<T> {
    fn set_ioeventfd(&self, event: &IoEvent, fd: RawFd, attach: bool) -> Result<(), errno::Error> {
        (**self).set_ioeventfd(event, fd, attach)
    }
}

/// An eventfd that KVM signals when the guest writes (`kvm_eventfd_init`, `kvm_ioeventfd`).
///
/// Dropping it detaches it. It owns `host` (a `VmFd`, or an `Arc` or a reference of one) and the
/// eventfd (an [`EventFd`], or an `Arc` of one that the device's event loop shares).
pub struct IoEventFd<S: SetIoEventFd, E: AsRawFd = EventFd> {
    host: S,
    fd: E,
    event: IoEvent,
    attached: bool,
    /// Where KVM has it though it should not: a move failed, and so did the undoing of a step.
    strays: Vec<IoEvent>,
}

impl<S: SetIoEventFd, E: AsRawFd> IoEventFd<S, E> {
    /// Attaches `fd` to the writes that `event` names.
    ///
    /// Attach late in a VM's set-up: once KVM's buses have changed, later changes to memory slots
    /// wait for them.
    ///
    /// # Errors
    ///
    /// [`Error::AssignIoEventFd`] with KVM's errno; then nothing is attached.
    pub fn attach(host: S, event: IoEvent, fd: E) -> Result<Self, Error> {
        host.set_ioeventfd(&event, fd.as_raw_fd(), true)
            .map_err(|source| Error::AssignIoEventFd { event, source })?;
        Ok(Self {
            host,
            fd,
            event,
            attached: true,
            strays: Vec::new(),
        })
    }

    /// What it listens for.
    pub fn event(&self) -> IoEvent {
        self.event
    }

    /// The eventfd.
    pub fn fd(&self) -> &E {
        &self.fd
    }

    /// Whether KVM signals it; false after [`detach`](Self::detach).
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Detaches it: on return KVM signals it no more. Detached already, it does nothing.
    ///
    /// # Errors
    ///
    /// [`Error::DeassignIoEventFd`]; then it is attached still, and dropping it tries again.
    pub fn detach(&mut self) -> Result<(), Error> {
        self.detach_strays()?;
        self.detach_event()
    }

    fn detach_event(&mut self) -> Result<(), Error> {
        if self.attached {
            self.set(&self.event, false)?;
            self.attached = false;
        }
        Ok(())
    }

    /// Moves it to another address. It is attached there before it is detached here, so no write to
    /// either goes by unseen.
    ///
    /// # Errors
    ///
    /// [`Error::AssignIoEventFd`] or [`Error::DeassignIoEventFd`]; then it listens where it did. If
    /// KVM refuses the undoing too, it listens at the new address as well, which is logged, until
    /// the next move, `detach` or the drop, each of which tries again. Until that has succeeded it
    /// does not move: the error is of that try.
    pub fn relocate(&mut self, address: IoEventAddress) -> Result<(), Error> {
        let moved = IoEvent {
            address,
            writes: self.event.writes,
        };
        self.detach_strays()?;
        if self.attached && moved != self.event {
            self.set(&moved, true)?;
            if let Err(error) = self.set(&self.event, false) {
                if let Err(undo) = self.set(&moved, false) {
                    log::error!("{undo}: it stays attached at both addresses for now");
                    self.strays.push(moved);
                }
                return Err(error);
            }
        }
        self.event = moved;
        Ok(())
    }

    /// Notes that KVM has it at `event` too, where it should not be.
    pub(crate) fn strayed(&mut self, event: IoEvent) {
        self.strays.push(event);
    }

    /// Notes that KVM does not have it, where it should be.
    pub(crate) fn lost(&mut self) {
        self.attached = false;
    }

    /// Detaches it wherever it should not be; what KVM refuses stays noted.
    pub(crate) fn detach_strays(&mut self) -> Result<(), Error> {
        let mut refused = None;
        for event in std::mem::take(&mut self.strays) {
            if let Err(error) = self.set(&event, false) {
                self.strays.push(event);
                refused.get_or_insert(error);
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Attaches it again if it was [lost](Self::lost).
    pub(crate) fn attach_lost(&mut self) -> Result<(), Error> {
        if !self.attached {
            self.set(&self.event, true)?;
            self.attached = true;
        }
        Ok(())
    }

    /// Notes that it is attached elsewhere now: for whoever moves several together.
    pub(crate) fn settle(&mut self, event: IoEvent) {
        self.event = event;
    }

    pub(crate) fn set(&self, event: &IoEvent, attach: bool) -> Result<(), Error> {
        let event = *event;
        self.host
            .set_ioeventfd(&event, self.fd.as_raw_fd(), attach)
            .map_err(|source| match attach {
                true => Error::AssignIoEventFd { event, source },
                false => Error::DeassignIoEventFd { event, source },
            })
    }
}

impl<S: SetIoEventFd, E: AsRawFd> Drop for IoEventFd<S, E> {
    fn drop(&mut self) {
        // Each is tried, whatever becomes of the others.
        for result in [self.detach_strays(), self.detach_event()] {
            if let Err(error) = result {
                log::error!("{error}");
            }
        }
    }
}

impl<S: SetIoEventFd, E: AsRawFd> fmt::Debug for IoEventFd<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoEventFd")
            .field("event", &self.event)
            .field("fd", &self.fd.as_raw_fd())
            .field("attached", &self.attached)
            .field("strays", &self.strays)
            .finish()
    }
}
