// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can sit on a bus.
//!
//! Most devices are `vm-device`'s: [`DeviceMmio`] and [`DevicePio`], which answer every access in
//! their range. [`IoDevice`] is for the few that may decline one, so that the next device of a
//! shared range is asked; the others are adapted to it here and always accept.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
use vm_device::{DeviceMmio, DevicePio, MutDeviceMmio, MutDevicePio};

use crate::deferred::Deferral;

/// Whether a device took an access.
#[derive(Debug)]
#[must_use]
#[non_exhaustive]
pub enum Answer {
    /// The access is done; nobody else is asked.
    Accepted,
    /// Not this device's: the next one that shares the range is asked (KVM's `-EOPNOTSUPP`).
    Declined,
    /// This device's, but its answer comes later, through the [`Completion`](crate::Completion)
    /// that [`defer`](crate::defer) made with this. Nobody else is asked. What the device has
    /// written into a read's data by now counts for nothing.
    ///
    /// For reads and writes of up to 8 bytes, which all of a guest's are; of a longer read, the
    /// bytes after those are all ones.
    Deferred(Deferral),
}

/// Where in a device's range an access begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The first address of the range that was found. A device with several ranges tells them
    /// apart by it.
    pub base: u64,
    /// How far into the range the access begins, in bytes.
    pub offset: u64,
}

impl At {
    /// The access's first address on the bus.
    pub fn address(&self) -> u64 {
        self.base.wrapping_add(self.offset)
    }
}

/// A device that may decline an access (`struct kvm_io_device`).
///
/// # Contract
///
/// - The access lies whole in the range that the device was registered with. `data` has as many
///   bytes as the access: 1, 2, 4 or 8 from a guest's plain instructions, but any number from 1 to
///   8 may come (an access cut at a page's end, see [`fragments`](crate::fragments)); a device
///   answers lengths that it does not know with whatever its hardware would.
/// - For a read, `data` is all ones when the device is asked, so what a device leaves untouched
///   reads as an empty bus does.
/// - Several vCPUs may call at the same time.
/// - A device may register, unregister and move devices, itself included, from inside a call; see
///   [`Removal`](crate::Removal).
/// - A call runs on a vCPU's thread: while it lasts, that vCPU does nothing else, and whoever
///   unregisters a device waits. A device that would take long [defers](Answer::Deferred).
/// - A write that an ioeventfd of the device's range would take can come here all the same: while
///   the ioeventfd is attached, moved or detached, from an access that left KVM before. The device
///   treats it as what the ioeventfd means.
/// - A write that was coalesced comes after the guest has gone on. Nobody waits for its answer, so
///   one that is deferred is taken as accepted.
pub trait IoDevice: Send + Sync {
    /// Answers a read by filling `data`, declines, or defers.
    fn read(&self, at: At, data: &mut [u8]) -> Answer;

    /// Takes a write, declines, or defers its completion.
    fn write(&self, at: At, data: &[u8]) -> Answer;
}

impl<T: IoDevice + ?Sized> IoDevice for std::sync::Arc<T> {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        (**self).read(at, data)
    }

    fn write(&self, at: At, data: &[u8]) -> Answer {
        (**self).write(at, data)
    }
}

/// A `vm-device` MMIO device as an [`IoDevice`] that accepts everything.
#[derive(Clone, Debug)]
pub struct Mmio<D>(pub D);

impl<D: DeviceMmio + Send + Sync> IoDevice for Mmio<D> {
    #[inline]
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        self.0.mmio_read(MmioAddress(at.base), at.offset, data);
        Answer::Accepted
    }

    #[inline]
    fn write(&self, at: At, data: &[u8]) -> Answer {
        self.0.mmio_write(MmioAddress(at.base), at.offset, data);
        Answer::Accepted
    }
}

/// A `vm-device` port device as an [`IoDevice`] that accepts everything.
///
/// It declines where base or offset are no port numbers, which no access on the PIO bus does.
#[derive(Clone, Debug)]
pub struct Pio<D>(pub D);

impl<D: DevicePio + Send + Sync> IoDevice for Pio<D> {
    #[inline]
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        let (Ok(base), Ok(offset)) = (u16::try_from(at.base), u16::try_from(at.offset)) else {
            return Answer::Declined;
        };
        self.0.pio_read(PioAddress(base), offset, data);
        Answer::Accepted
    }

    #[inline]
    fn write(&self, at: At, data: &[u8]) -> Answer {
        let (Ok(base), Ok(offset)) = (u16::try_from(at.base), u16::try_from(at.offset)) else {
            return Answer::Declined;
        };
        self.0.pio_write(PioAddress(base), offset, data);
        Answer::Accepted
    }
}

/// A mutable `vm-device` device behind a lock, for one that keeps `&mut self` methods.
///
/// `vm-device` implements its immutable traits for `Mutex<T>` too, but that one panics in every
/// later access once a device has panicked in one. Here such a device is asked again, in whatever
/// state it was left: one broken device does not take the vCPUs with it.
///
/// ```
/// use std::sync::Arc;
/// use io_bus::{IoBus, Locked, MmioAddress, MmioRange};
/// use vm_device::MutDeviceMmio;
///
/// struct Counter(u8);
/// impl MutDeviceMmio for Counter {
///     fn mmio_read(&mut self, _: MmioAddress, _: u64, data: &mut [u8]) {
///         self.0 += 1;
///         data.fill(self.0);
///     }
///     fn mmio_write(&mut self, _: MmioAddress, _: u64, _: &[u8]) {}
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bus = IoBus::new();
/// let counter = Arc::new(Locked::new(Counter(0)));
/// let range = MmioRange::new(MmioAddress(0xd000_0000), 0x1000)?;
/// let _registration = bus.register_mmio(range, counter.clone())?;
///
/// let mut data = [0];
/// assert!(bus.dispatcher().mmio_read(MmioAddress(0xd000_0000), &mut data).is_answered());
/// assert_eq!((data, counter.lock().0), ([1], 1));
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct Locked<T: ?Sized>(Mutex<T>);

impl<T> Locked<T> {
    /// Puts `device` behind a lock of its own.
    pub const fn new(device: T) -> Self {
        Self(Mutex::new(device))
    }

    /// The device again.
    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Locked<T> {
    /// Locks the device, for whoever else works on it (an event loop, a snapshot). Blocks while an
    /// access is inside.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> fmt::Debug for Locked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Locked").finish_non_exhaustive()
    }
}

impl<T: MutDeviceMmio + ?Sized> DeviceMmio for Locked<T> {
    fn mmio_read(&self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        self.lock().mmio_read(base, offset, data);
    }

    fn mmio_write(&self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        self.lock().mmio_write(base, offset, data);
    }
}

impl<T: MutDevicePio + ?Sized> DevicePio for Locked<T> {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        self.lock().pio_read(base, offset, data);
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        self.lock().pio_write(base, offset, data);
    }
}
