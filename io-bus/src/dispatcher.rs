// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The readers' side: a vCPU thread hands its exits to a [`Dispatcher`] and gets an [`Outcome`].
//!
//! An access enters the published tables, tries the row that answered last on this bus (the
//! cookie), searches if that row cannot be the only answer, calls the device and leaves. It takes
//! no lock and allocates nothing. Between accesses a dispatcher holds nothing, so a vCPU that
//! sleeps in the guest keeps no device alive.

use std::fmt;
use std::sync::Arc;

use srcu::Reader;
use vm_device::bus::{MmioAddress, PioAddress};

use crate::bus::{Shared, Tables};
use crate::device::{Answer, At, IoDevice};
use crate::fragment::{fragments, is_whole};
use crate::inside::Inside;
use crate::range::BusKind;
use crate::table::{Row, Table};

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "an access that nobody answered is worth a count or a log line"]
#[non_exhaustive]
pub enum Outcome {
    /// A device answered.
    Answered,
    /// Nobody did: no range holds the access whole, or every device declined. A read's data is all
    /// ones.
    Unclaimed,
    /// The access came in several pieces, of which some were answered. The others read as all ones.
    Partial,
}

impl Outcome {
    /// Whether a device answered all of it.
    pub fn is_answered(self) -> bool {
        self == Outcome::Answered
    }

    /// The outcome of two pieces of one access.
    fn and(self, other: Outcome) -> Outcome {
        if self == other {
            self
        } else {
            Outcome::Partial
        }
    }
}

/// A thread's way to the buses: one a vCPU thread, from [`IoBus::dispatcher`].
///
/// Methods take `&mut self`, so an access cannot begin inside another of the same dispatcher. A
/// device that itself reads or writes the bus has a dispatcher of its own.
///
/// Some 3 KiB, most of it cookies; aligned so that two dispatchers never share a cache line.
///
/// [`IoBus::dispatcher`]: crate::IoBus::dispatcher
#[repr(align(128))]
pub struct Dispatcher {
    reader: Reader<Tables>,
    cookies: Cookies,
    /// Keeps the buses alive, and with them the registrations' way to take devices off.
    _shared: Arc<Shared>,
}

impl Dispatcher {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            reader: shared.tables.reader(),
            cookies: Cookies::NONE,
            _shared: shared,
        }
    }

    /// A guest's read of device memory: `data.len()` bytes at `address`.
    ///
    /// More than 8 bytes, or bytes on both sides of a page's end, are cut into pieces as KVM cuts
    /// them ([`fragments`]), each of which is an access of its own. What `data` held before does
    /// not matter.
    #[inline]
    pub fn mmio_read(&mut self, address: MmioAddress, data: &mut [u8]) -> Outcome {
        if is_whole(address.0, data.len()) {
            self.read(BusKind::Mmio, address.0, data)
        } else {
            self.mmio_read_in_pieces(address.0, data)
        }
    }

    /// A guest's write to device memory, cut into pieces as for [`mmio_read`](Self::mmio_read).
    ///
    /// The fast MMIO bus is asked first.
    #[inline]
    pub fn mmio_write(&mut self, address: MmioAddress, data: &[u8]) -> Outcome {
        if is_whole(address.0, data.len()) {
            self.mmio_write_piece(address.0, data)
        } else {
            self.mmio_write_in_pieces(address.0, data)
        }
    }

    /// A guest's `in` from `port`: `data.len()` bytes, 1, 2 or 4.
    ///
    /// One access. KVM reports `rep ins` as one exit with the data of several accesses to the same
    /// port: [`pio_read_repeated`](Self::pio_read_repeated).
    #[inline]
    pub fn pio_read(&mut self, port: PioAddress, data: &mut [u8]) -> Outcome {
        self.read(BusKind::Pio, u64::from(port.0), data)
    }

    /// A guest's `out` to `port`: `data.len()` bytes, 1, 2 or 4.
    #[inline]
    pub fn pio_write(&mut self, port: PioAddress, data: &[u8]) -> Outcome {
        self.write(BusKind::Pio, u64::from(port.0), data)
    }

    /// `rep ins`: as many reads of `width` bytes as `data` has room for, all from `port`, in order.
    ///
    /// A width of 0 reads nothing: `data` becomes all ones.
    pub fn pio_read_repeated(
        &mut self,
        port: PioAddress,
        width: usize,
        data: &mut [u8],
    ) -> Outcome {
        if width == 0 {
            data.fill(0xff);
            return Outcome::Unclaimed;
        }
        together(data.chunks_mut(width).map(|item| self.pio_read(port, item)))
    }

    /// `rep outs`: the writes of `width` bytes that `data` holds, all to `port`, in order.
    pub fn pio_write_repeated(&mut self, port: PioAddress, width: usize, data: &[u8]) -> Outcome {
        if width == 0 {
            return Outcome::Unclaimed;
        }
        together(data.chunks(width).map(|item| self.pio_write(port, item)))
    }

    /// One read on any bus, not cut into pieces (`kvm_io_bus_read`).
    ///
    /// `data` is made all ones before a device is asked, and again if it declined.
    #[inline]
    pub fn read(&mut self, bus: BusKind, address: u64, data: &mut [u8]) -> Outcome {
        fill_with_ones(data);
        let len = data.len();
        self.offer(bus, address, len, |device, at| {
            let answer = device.read(at, data);
            if answer == Answer::Declined {
                data.fill(0xff);
            }
            answer
        })
    }

    /// One write on any bus, not cut into pieces (`kvm_io_bus_write`, `kvm_io_bus_write_cookie`).
    #[inline]
    pub fn write(&mut self, bus: BusKind, address: u64, data: &[u8]) -> Outcome {
        self.offer(bus, address, data.len(), |device, at| {
            device.write(at, data)
        })
    }

    /// Offers one access to the devices of one bus.
    #[inline]
    fn offer(
        &mut self,
        bus: BusKind,
        address: u64,
        len: usize,
        ask: impl FnMut(&dyn IoDevice, At) -> Answer,
    ) -> Outcome {
        // Dropped after the guard: what the guard's leaving drops must not wait for accesses.
        let _inside = Inside::enter();
        let tables = self.reader.enter();
        let cookie = self.cookies.of(bus, address);
        search(tables.bus(bus), cookie, address, len, ask)
    }

    #[inline]
    fn mmio_write_piece(&mut self, address: u64, data: &[u8]) -> Outcome {
        let _inside = Inside::enter();
        let tables = self.reader.enter();
        let mut offer = |bus: BusKind| {
            let cookie = self.cookies.of(bus, address);
            search(
                tables.bus(bus),
                cookie,
                address,
                data.len(),
                |device, at| device.write(at, data),
            )
        };
        if !tables.bus(BusKind::FastMmio).is_empty() && offer(BusKind::FastMmio).is_answered() {
            return Outcome::Answered;
        }
        offer(BusKind::Mmio)
    }

    #[cold]
    fn mmio_read_in_pieces(&mut self, address: u64, data: &mut [u8]) -> Outcome {
        together(
            fragments(address, data.len()).map(|piece| match data.get_mut(piece.bytes()) {
                Some(bytes) => self.read(BusKind::Mmio, piece.address, bytes),
                None => Outcome::Unclaimed,
            }),
        )
    }

    #[cold]
    fn mmio_write_in_pieces(&mut self, address: u64, data: &[u8]) -> Outcome {
        together(
            fragments(address, data.len()).map(|piece| match data.get(piece.bytes()) {
                Some(bytes) => self.mmio_write_piece(piece.address, bytes),
                None => Outcome::Unclaimed,
            }),
        )
    }
}

impl fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatcher").finish_non_exhaustive()
    }
}

/// The rows that answered last, by address: a vCPU goes back and forth between a few devices, each
/// of which keeps its own place here. A hint and no more, see `Table::by_cookie`; so row numbers are
/// cut to 16 bits, and places are shared.
struct Cookies {
    mmio: [u16; 1024],
    pio: [u16; 256],
    ccw_notify: [u16; 16],
    fast_mmio: [u16; 64],
}

impl Cookies {
    const NONE: Self = Self {
        mmio: [0; 1024],
        pio: [0; 256],
        ccw_notify: [0; 16],
        fast_mmio: [0; 64],
    };

    /// Addresses that are one device's share a place: those of a page, of eight ports.
    #[inline]
    fn of(&mut self, bus: BusKind, address: u64) -> &mut u16 {
        match bus {
            BusKind::Mmio => place(&mut self.mmio, address >> 12),
            BusKind::Pio => place(&mut self.pio, address >> 3),
            BusKind::CcwNotify => place(&mut self.ccw_notify, address),
            BusKind::FastMmio => place(&mut self.fast_mmio, address >> 2),
        }
    }
}

#[inline]
fn place<const N: usize>(rows: &mut [u16; N], number: u64) -> &mut u16 {
    // Folded, so that strides of a power of two spread as well.
    &mut rows[(number ^ (number >> N.ilog2())) as usize % N]
}

/// Asks the devices that hold the access, in order, until one accepts.
#[inline]
fn search(
    table: &Table<Arc<dyn IoDevice>>,
    cookie: &mut u16,
    address: u64,
    len: usize,
    mut ask: impl FnMut(&dyn IoDevice, At) -> Answer,
) -> Outcome {
    let mut accepts = |row: &Row<Arc<dyn IoDevice>>| {
        let base = row.range().base();
        let offset = address.wrapping_sub(base);
        ask(&**row.device(), At { base, offset }) == Answer::Accepted
    };
    if let Some(row) = table.by_cookie(usize::from(*cookie), address, len) {
        // No other row holds the access, so this device's word is final.
        return match accepts(row) {
            true => Outcome::Answered,
            false => Outcome::Unclaimed,
        };
    }
    for (index, row) in table.candidates(address, len) {
        if accepts(row) {
            *cookie = index as u16;
            return Outcome::Answered;
        }
    }
    Outcome::Unclaimed
}

/// The outcome of all pieces, each of which is carried out whatever became of the others.
fn together(pieces: impl Iterator<Item = Outcome>) -> Outcome {
    pieces.reduce(Outcome::and).unwrap_or(Outcome::Unclaimed)
}

/// All ones, without a call to `memset` for the lengths that guests use.
#[inline]
fn fill_with_ones(data: &mut [u8]) {
    if let Ok(byte) = <&mut [u8; 1]>::try_from(&mut *data) {
        *byte = [0xff; 1];
    } else if let Ok(long) = <&mut [u8; 4]>::try_from(&mut *data) {
        *long = [0xff; 4];
    } else if let Ok(quad) = <&mut [u8; 8]>::try_from(&mut *data) {
        *quad = [0xff; 8];
    } else {
        data.fill(0xff);
    }
}
