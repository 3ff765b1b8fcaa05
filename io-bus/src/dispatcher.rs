// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The readers' side: a vCPU thread hands its exits to a [`Dispatcher`] and gets an [`Outcome`].
//!
//! An access enters the published tables, tries the row that answered last on this bus (the
//! cookie), searches if that row cannot be the only answer, calls the device and leaves. It takes
//! no lock and allocates nothing. Between accesses a dispatcher holds nothing, so a vCPU that
//! sleeps in the guest keeps no device alive.
//!
//! What an access always does is inlined into the caller, whatever the compiler thinks of it
//! (`inline(always)`: a fifth of an access is the pushes and pops of functions in between); what it
//! does seldom is kept out of line.
//!
//! What is rare has files of its own: answers that come later are in `unfinished`, accesses that
//! someone looks on at in `observe`.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use srcu::Reader;
use vm_device::bus::{MmioAddress, PioAddress};

use crate::cookie::Cookies;
use crate::deferred::{Deferral, Interrupter, Parker};
use crate::device::{Answer, At};
use crate::fragment::is_whole;
use crate::inside::Inside;
use crate::observe;
use crate::range::BusKind;
use crate::table::{Row, Table};
use crate::tables::{Entry, Shared, Tables};
use crate::trace::Direction;
use crate::unfinished::{Shape, Unfinished, Whole};

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "an access that nobody answered is worth a count or a log line, one that is deferred a wait"]
#[non_exhaustive]
pub enum Outcome {
    /// A device answered.
    Answered,
    /// Nobody did: no range holds the access whole, or every device declined. A read's data is all
    /// ones.
    Unclaimed,
    /// The access came in several pieces, of which some were answered. The others read as all ones.
    Partial,
    /// A device took it and will answer later. The vCPU must not enter the guest before
    /// [`wait_read`](Dispatcher::wait_read) or [`wait_write`](Dispatcher::wait_write) (or their
    /// `poll_` twins) has given another outcome: until then a read's data is all ones, and pieces
    /// after the deferred one have not been carried out.
    Deferred,
}

impl Outcome {
    /// Whether a device answered all of it.
    pub fn is_answered(self) -> bool {
        self == Outcome::Answered
    }

    /// The outcome of two pieces of one access.
    pub(crate) fn and(self, other: Outcome) -> Outcome {
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
    /// The last access that a device deferred, until its answer is fetched.
    pub(crate) unfinished: Option<Unfinished>,
    /// Where this thread waits for that answer.
    pub(crate) parker: Arc<Parker>,
    /// Keeps the buses alive, and with them the registrations' way to take devices off.
    shared: Arc<Shared>,
}

/// An access that waits for its answer keeps waiting during a drain, also if a device panics: a
/// coalesced write takes nobody's place.
struct Aside<'a> {
    io: &'a mut Dispatcher,
    waiting: Option<Unfinished>,
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        self.io.unfinished = self.waiting.take();
    }
}

impl Dispatcher {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            reader: shared.tables.reader(),
            cookies: Cookies::NONE,
            unfinished: None,
            parker: Arc::new(Parker::new()),
            shared,
        }
    }

    /// A guest's read of device memory: `data.len()` bytes at `address`.
    ///
    /// More than 8 bytes, or bytes on both sides of a page's end, are cut into pieces as KVM cuts
    /// them ([`fragments`](crate::fragments)), each of which is an access of its own, and joined
    /// again in `data`. What `data` held before does not matter.
    #[inline(always)]
    pub fn mmio_read(&mut self, address: MmioAddress, data: &mut [u8]) -> Outcome {
        if is_whole(address.0, data.len()) {
            self.read(BusKind::Mmio, address.0, data)
        } else {
            self.in_pieces(
                BusKind::Mmio,
                address.0,
                Shape::Fragments,
                Bytes::Read(data),
            )
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
            self.in_pieces(
                BusKind::Mmio,
                address.0,
                Shape::Fragments,
                Bytes::Write(data),
            )
        }
    }

    /// A guest's `in` from `port`: `data.len()` bytes, 1, 2 or 4.
    ///
    /// One access. KVM reports `rep ins` as one exit with the data of several accesses to the same
    /// port: [`pio_read_repeated`](Self::pio_read_repeated). `kvm_ioctls::VcpuExit::IoIn` does not say
    /// how wide they are; with the feature `kvm`, `PioExit::of` does. Given all items at once, a
    /// device of one byte is not asked and the guest reads all ones.
    #[inline(always)]
    pub fn pio_read(&mut self, port: PioAddress, data: &mut [u8]) -> Outcome {
        self.read(BusKind::Pio, u64::from(port.0), data)
    }

    /// A guest's `out` to `port`: `data.len()` bytes, 1, 2 or 4.
    #[inline(always)]
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
        if width == data.len() {
            return self.pio_read(port, data);
        }
        let shape = Shape::Repeated(width);
        self.in_pieces(BusKind::Pio, u64::from(port.0), shape, Bytes::Read(data))
    }

    /// `rep outs`: the writes of `width` bytes that `data` holds, all to `port`, in order.
    pub fn pio_write_repeated(&mut self, port: PioAddress, width: usize, data: &[u8]) -> Outcome {
        if width == data.len() {
            return self.pio_write(port, data);
        }
        let shape = Shape::Repeated(width);
        self.in_pieces(BusKind::Pio, u64::from(port.0), shape, Bytes::Write(data))
    }

    /// One read on any bus, not cut into pieces (`kvm_io_bus_read`).
    ///
    /// `data` is made all ones before a device is asked, and again if it declined.
    #[inline(always)]
    pub fn read(&mut self, bus: BusKind, address: u64, data: &mut [u8]) -> Outcome {
        if fill_with_ones(data) {
            self.access(bus, address, data)
        } else {
            self.long_read(bus, address, data)
        }
    }

    /// A read of more than eight bytes. Out of line, and the last thing that [`read`](Self::read)
    /// does, so that its call of `memset` costs the others no register.
    #[cold]
    #[inline(never)]
    fn long_read(&mut self, bus: BusKind, address: u64, data: &mut [u8]) -> Outcome {
        wipe(data);
        self.access(bus, address, data)
    }

    /// One write on any bus, not cut into pieces (`kvm_io_bus_write`, `kvm_io_bus_write_cookie`).
    #[inline(always)]
    pub fn write(&mut self, bus: BusKind, address: u64, data: &[u8]) -> Outcome {
        self.access(bus, address, data)
    }

    /// To be called after each return of `KVM_RUN`, before its exit is dispatched: carries out the
    /// writes that KVM has coalesced since, in their order, by whichever vCPU they were made.
    ///
    /// Gives their number. On return every write that this vCPU made before its exit has been
    /// answered, by this thread or by another that was at it already (which is waited for). Where
    /// nothing was coalesced, or there is [no ring](crate::IoBus::attach_coalesced_ring), it costs
    /// two loads of one cache line. Inside an access it does nothing: what encloses it has done it.
    ///
    /// A thread that is no vCPU's may call it too, for guests that write and do not exit.
    #[inline]
    pub fn before_exit(&mut self) -> usize {
        if self.shared.coalescing.is_empty() {
            0
        } else {
            self.drain()
        }
    }

    /// Whether [`before_exit`](Self::before_exit) would find something to carry out, or another
    /// thread at it to wait for. For a caller that does something around a drain (it collects the
    /// bytes that the drain sends, say) and wants to do nothing around none.
    ///
    /// False means that every write which this vCPU made before its exit has been carried out. Costs
    /// what `before_exit` costs where nothing was coalesced, and takes no lock. Inside an access it
    /// may be true though `before_exit` does nothing there.
    #[inline]
    pub fn has_coalesced(&self) -> bool {
        !self.shared.coalescing.is_empty()
    }

    #[cold]
    fn drain(&mut self) -> usize {
        if crate::is_inside_access() {
            return 0;
        }
        let shared = Arc::clone(&self.shared);
        let waiting = self.unfinished.take();
        let aside = Aside { io: self, waiting };
        shared.coalescing.drain(|write| {
            // Nobody waits for a coalesced write: what defers it has taken it.
            let _ = match write.bus {
                BusKind::Mmio => (aside.io).mmio_write(MmioAddress(write.address), write.data()),
                bus => aside.io.write(bus, write.address, write.data()),
            };
            aside.io.unfinished = None;
        })
    }

    /// A handle for other threads to end this one's waits for deferred answers.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(Arc::clone(&self.parker))
    }

    /// Offers one access to the devices of one bus.
    #[inline(always)]
    fn access<'d>(&mut self, bus: BusKind, address: u64, data: impl Data<'d>) -> Outcome {
        let (direction, len) = (data.direction(), data.len());
        let found = {
            // Dropped after the guard: what the guard's leaving drops must not wait for accesses.
            let _inside = Inside::enter();
            let tables = self.reader.enter();
            match search(&tables, bus, &mut self.cookies, address, data) {
                None => return Outcome::Answered,
                Some(found) => found,
            }
        };
        self.outcome(found, bus, address, direction, len)
    }

    /// A write to MMIO, which the fast bus is offered first.
    #[inline]
    fn mmio_write_piece(&mut self, address: u64, data: &[u8]) -> Outcome {
        let found = {
            let _inside = Inside::enter();
            let tables = self.reader.enter();
            if tables.bus(BusKind::FastMmio).is_empty() {
                match search(&tables, BusKind::Mmio, &mut self.cookies, address, data) {
                    None => return Outcome::Answered,
                    Some(found) => found,
                }
            } else {
                let both = &[BusKind::FastMmio, BusKind::Mmio];
                search_on(&tables, both, &mut self.cookies, address, data)
            }
        };
        self.outcome(found, BusKind::Mmio, address, Direction::Write, data.len())
    }

    /// One piece of a larger access, as it would be alone.
    pub(crate) fn piece(&mut self, bus: BusKind, address: u64, bytes: Bytes<'_>) -> Outcome {
        match (bus, bytes) {
            (BusKind::Mmio, Bytes::Write(data)) => self.mmio_write_piece(address, data),
            (_, Bytes::Read(data)) => self.read(bus, address, data),
            (_, Bytes::Write(data)) => self.write(bus, address, data),
        }
    }

    #[inline(always)]
    fn outcome(
        &mut self,
        found: Found,
        bus: BusKind,
        address: u64,
        direction: Direction,
        len: usize,
    ) -> Outcome {
        match found {
            Found::Answered => Outcome::Answered,
            Found::Unclaimed => {
                unlikely();
                Outcome::Unclaimed
            }
            Found::Deferred(deferral) => {
                let shape = Shape::One;
                let whole = Whole {
                    bus,
                    address,
                    direction,
                    shape,
                };
                self.defer(Unfinished::new(deferral, whole, len))
            }
        }
    }

    #[cold]
    fn defer(&mut self, unfinished: Unfinished) -> Outcome {
        self.unfinished = Some(unfinished);
        Outcome::Deferred
    }

    /// Tells those who look on how a deferred piece ended.
    pub(crate) fn tell(&mut self, access: &crate::Access<'_>) {
        let _inside = Inside::enter();
        let tables = self.reader.enter();
        if let Some(hook) = tables.observers().and_then(|o| o.hook.as_ref()) {
            hook.access(access);
        }
    }
}

impl fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatcher")
            .field("unfinished", &self.unfinished)
            .finish_non_exhaustive()
    }
}

/// The data of one access to one device, of either direction; a type each, so that neither's path
/// carries the other.
trait Data<'d> {
    fn len(&self) -> usize;
    fn direction(&self) -> Direction;
    fn bytes(self) -> Bytes<'d>;
    /// Asks a device. One that does not accept may leave anything in a read's data.
    fn ask(&mut self, entry: &Entry, at: At) -> Answer;
    /// Makes a read's data all ones.
    fn wipe(&mut self);
    /// As [`ask`](Self::ask), and wipes out what a device leaves that does not accept.
    fn ask_and_wipe(&mut self, entry: &Entry, at: At) -> Answer {
        let answer = self.ask(entry, at);
        if !matches!(answer, Answer::Accepted) {
            self.wipe();
        }
        answer
    }
}

impl<'d> Data<'d> for &'d mut [u8] {
    #[inline]
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[inline]
    fn direction(&self) -> Direction {
        Direction::Read
    }

    fn bytes(self) -> Bytes<'d> {
        Bytes::Read(self)
    }

    #[inline]
    fn ask(&mut self, entry: &Entry, at: At) -> Answer {
        entry.device.read(at, self)
    }

    fn wipe(&mut self) {
        wipe(self);
    }
}

impl<'d> Data<'d> for &'d [u8] {
    #[inline]
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[inline]
    fn direction(&self) -> Direction {
        Direction::Write
    }

    fn bytes(self) -> Bytes<'d> {
        Bytes::Write(self)
    }

    #[inline]
    fn ask(&mut self, entry: &Entry, at: At) -> Answer {
        entry.device.write(at, self)
    }

    fn wipe(&mut self) {}
}

/// An access's data where both directions go the same way.
pub(crate) enum Bytes<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Bytes<'_> {
    pub(crate) fn len(&self) -> usize {
        self.data().len()
    }

    pub(crate) fn data(&self) -> &[u8] {
        match self {
            Bytes::Read(data) => data,
            Bytes::Write(data) => data,
        }
    }

    pub(crate) fn direction(&self) -> Direction {
        match self {
            Bytes::Read(_) => Direction::Read,
            Bytes::Write(_) => Direction::Write,
        }
    }

    /// A part of it.
    pub(crate) fn part(&mut self, range: Range<usize>) -> Option<Bytes<'_>> {
        Some(match self {
            Bytes::Read(data) => Bytes::Read(data.get_mut(range)?),
            Bytes::Write(data) => Bytes::Write(data.get(range)?),
        })
    }

    pub(crate) fn ask(&mut self, entry: &Entry, at: At) -> Answer {
        match self {
            Bytes::Read(data) => data.ask_and_wipe(entry, at),
            Bytes::Write(data) => data.ask_and_wipe(entry, at),
        }
    }
}

/// Who was found for an access.
pub(crate) enum Found {
    Answered,
    Unclaimed,
    Deferred(Deferral),
}

impl From<Answer> for Found {
    /// What one device's word is where no other is asked.
    #[inline(always)]
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Accepted => Found::Answered,
            Answer::Declined => Found::Unclaimed,
            Answer::Deferred(deferral) => Found::Deferred(deferral),
        }
    }
}

/// Asks the devices of one bus that hold the access, in order, until one takes it. `None`: the one
/// at the cookie has, so the caller can return from inside its guard, with nothing to carry out of it.
#[inline(always)]
fn search<'d>(
    tables: &Tables,
    bus: BusKind,
    cookies: &mut Cookies,
    address: u64,
    mut data: impl Data<'d>,
) -> Option<Found> {
    // The shortest way is for an access that nobody looks on at: no row of a table under observation
    // is at a cookie.
    let cookie = usize::from(*cookies.of(bus, address));
    if let Some(row) = tables.bus(bus).at_cookie(cookie, address, data.len()) {
        // No other row holds the access, so this device's word is final.
        return match offer(row, address, |entry, at| data.ask(entry, at)) {
            Answer::Accepted => None,
            other => Some(not_accepted(other, data)),
        };
    }
    unlikely();
    Some(search_on(tables, bus.alone(), cookies, address, data))
}

/// What a device that did not accept has left in a read's data is wiped out.
#[cold]
#[inline(never)]
fn not_accepted<'d>(answer: Answer, mut data: impl Data<'d>) -> Found {
    data.wipe();
    answer.into()
}

/// The search proper, on several buses those of the first one first. Out of line, so that a repeat
/// carries nothing of it.
#[inline(never)]
fn search_on<'d>(
    tables: &Tables,
    buses: &[BusKind],
    cookies: &mut Cookies,
    address: u64,
    mut data: impl Data<'d>,
) -> Found {
    if let Some(observers) = tables.observers() {
        let bytes = data.bytes();
        return observe::search(tables, observers, cookies, buses, address, bytes);
    }
    for bus in buses {
        let len = data.len();
        let cookie = cookies.of(*bus, address);
        // One bus has been asked by its cookie already; two have not.
        let row = match buses {
            [_] => None,
            _ => tables
                .bus(*bus)
                .at_cookie(usize::from(*cookie), address, len),
        };
        let ask = |entry: &Entry, at| data.ask_and_wipe(entry, at);
        let found = match row {
            Some(row) => offer(row, address, ask).into(),
            None => search_with(tables.bus(*bus), cookie, address, len, ask),
        };
        if !matches!(found, Found::Unclaimed) {
            return found;
        }
    }
    Found::Unclaimed
}

/// The search without the cookie, which is set to who was found; `ask` asks a device.
#[inline]
pub(crate) fn search_with(
    table: &Table<Entry>,
    cookie: &mut u16,
    address: u64,
    len: usize,
    mut ask: impl FnMut(&Entry, At) -> Answer,
) -> Found {
    for (index, row) in table.candidates(address, len) {
        let found = offer(row, address, &mut ask).into();
        if !matches!(found, Found::Unclaimed) {
            *cookie = index as u16;
            return found;
        }
    }
    Found::Unclaimed
}

#[inline]
fn offer(row: &Row<Entry>, address: u64, ask: impl FnOnce(&Entry, At) -> Answer) -> Answer {
    let base = row.range().base();
    let offset = address.wrapping_sub(base);
    ask(row.device(), At { base, offset })
}

/// Tells the compiler which way an access usually does not go, so that the usual one jumps less.
#[cold]
pub(crate) fn unlikely() {}

#[cold]
#[inline(never)]
fn wipe(data: &mut [u8]) {
    data.fill(0xff);
}

/// Makes up to eight bytes all ones, which is what guests read; of more, none, and answers false.
#[inline(always)]
fn fill_with_ones(data: &mut [u8]) -> bool {
    const ONES: [u8; 4] = [0xff; 4];
    if data.len() > 2 * ONES.len() {
        return false;
    }
    if let Some(first) = data.first_chunk_mut::<4>() {
        *first = ONES;
        // Over the first where they meet.
        if let Some(last) = data.last_chunk_mut::<4>() {
            *last = ONES;
        }
        return true;
    }
    if let Some(first) = data.first_chunk_mut::<2>() {
        *first = [0xff; 2];
    }
    if let Some(last) = data.last_mut() {
        *last = 0xff;
    }
    true
}
