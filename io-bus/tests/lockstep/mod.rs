// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The whole safe interface, step by step beside a model that is a few plain lists.
//!
//! Three drivers share it: `tests/model.rs` makes steps with proptest, `tests/fuzz_bus.rs` and
//! `fuzz/fuzz_targets/bus.rs` decode them from bytes. Whatever is registered, moved, refused by the
//! kernel, deferred, coalesced, counted and removed in whatever order, a long-lived dispatcher (its
//! cookies warm and stale) asks the same devices in the same order, gives the same data, counts the
//! same, and KVM has the ioeventfds and zones that it should have.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod decode;
mod fakes;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use io_bus::{
    Access, BusKind, CoalescedZone, Completion, Direction, Dispatcher, Error, IoBus, IoEvent,
    IoEventAddress, IoEventId, IoRange, MmioAddress, Outcome, PioAddress, Registration, Removal,
    Trace, WriteMatch, fragments,
};

use fakes::{Device, Kernel, RING_ENTRIES, eventfd};

pub use fakes::Temper;

/// Small enough that full buses happen.
const CAPACITY: usize = 12;

/// How a deferred piece is answered.
#[derive(Clone, Copy, Debug)]
pub enum Later {
    Complete,
    Decline,
    Drop,
    /// The vCPU gives up.
    Abandon,
}

/// Which kind of access.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// `Dispatcher::read` or `write`.
    Plain(BusKind),
    /// `mmio_read` or `mmio_write`.
    Mmio,
    /// `pio_…_repeated` with this width.
    Repeated(usize),
}

#[derive(Clone, Debug)]
pub enum Step {
    Register(BusKind, IoRange, Temper),
    /// By `unregister`, or by dropping.
    Remove(usize, bool),
    /// The kernel refuses the call after so many.
    Move(usize, u64, Option<usize>),
    /// By so many bytes: doorbells come to lie where others of the same device lay.
    Nudge(usize, i8, Option<usize>),
    Attach(usize, u64, WriteMatch, bool),
    Detach(usize, usize, bool),
    Access(Way, Direction, u64, usize, Later),
    /// A guest's write in a zone, or beside one.
    Coalesced(BusKind, u64, usize),
    BeforeExit,
    Zone(BusKind, IoRange, bool),
    EndZone(usize, bool),
    Count(bool),
    Trace(bool),
}

/// One registration as the model knows it; its name is its age.
struct Known {
    name: usize,
    temper: Temper,
    bus: BusKind,
    range: IoRange,
    handle: Registration,
    bells: Vec<(IoEventId, u64, WriteMatch)>,
    /// Reads, writes, read bytes, written bytes, declined, deferred.
    counts: [u64; 6],
}

/// What the trace hook is to have seen.
type Event = (BusKind, u64, Direction, Vec<u8>, Outcome);

#[derive(Default)]
struct Recorder(Mutex<Vec<Event>>);

impl Trace for Recorder {
    fn access(&self, a: &Access<'_>) {
        assert!(io_bus::is_inside_access());
        let event = (a.bus, a.address, a.direction, a.data.to_vec(), a.outcome);
        self.0.lock().unwrap().push(event);
    }
}

/// The real thing and the model.
struct World {
    buses: IoBus,
    io: Dispatcher,
    kernel: Arc<Kernel>,
    log: fakes::Log,
    deferred: Arc<Mutex<VecDeque<Completion>>>,
    recorder: Arc<Recorder>,

    known: Vec<Known>,
    zones: Vec<(BusKind, IoRange, CoalescedZone<Arc<Kernel>>)>,
    /// What KVM keeps.
    ring: VecDeque<(BusKind, u64, Vec<u8>)>,
    drained: u64,
    counting: bool,
    tracing: bool,
    unclaimed: [(u64, Option<u64>); BusKind::COUNT],
    asked: Vec<usize>,
    events: Vec<Event>,
}

/// Runs the steps; panics where the bus and the model differ.
pub fn run(steps: impl IntoIterator<Item = Step>) {
    let mut world = World::new();
    for step in steps {
        world.step(step);
        world.compare();
    }
    world.end();
}

/// Runs the steps that some bytes stand for, whatever they are.
pub fn run_bytes(bytes: &[u8]) {
    run(decode::steps(bytes));
}

impl World {
    fn new() -> Self {
        let buses = IoBus::with_capacity(CAPACITY);
        let kernel = Arc::new(Kernel::new());
        buses.attach_coalesced_ring(kernel.ring.clone()).unwrap();
        Self {
            io: buses.dispatcher(),
            buses,
            kernel,
            log: fakes::Log::default(),
            deferred: Arc::default(),
            recorder: Arc::default(),
            known: Vec::new(),
            zones: Vec::new(),
            ring: VecDeque::new(),
            drained: 0,
            counting: false,
            tracing: false,
            unclaimed: Default::default(),
            asked: Vec::new(),
            events: Vec::new(),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Register(bus, range, temper) => self.register(bus, range, temper),
            Step::Remove(n, explicit) => self.remove(n, explicit),
            Step::Move(n, base, refuse) => self.relocate(n, base, refuse),
            Step::Nudge(n, by, refuse) => {
                if let Some(index) = n.checked_rem(self.known.len()) {
                    let base = self.known[index].range.base();
                    self.relocate(index, base.wrapping_add_signed(by.into()), refuse);
                }
            }
            Step::Attach(n, offset, writes, refuse) => self.attach(n, offset, writes, refuse),
            Step::Detach(n, which, refuse) => self.detach(n, which, refuse),
            Step::Access(way, direction, address, len, later) => {
                self.access(way, direction, address, len, later);
            }
            Step::Coalesced(bus, address, len) => self.coalesced(bus, address, len),
            Step::BeforeExit => self.before_exit(),
            Step::Zone(bus, range, refuse) => self.zone(bus, range, refuse),
            Step::EndZone(n, refuse) => self.end_zone(n, refuse),
            Step::Count(on) => {
                self.buses.count(on);
                self.counting = on;
                self.unclaimed = Default::default();
                for known in &mut self.known {
                    known.counts = Default::default();
                }
            }
            Step::Trace(on) => {
                let hook = on.then(|| self.recorder.clone() as Arc<dyn Trace>);
                assert!(self.buses.trace(hook).is_done());
                self.tracing = on;
            }
        }
    }

    fn register(&mut self, bus: BusKind, range: IoRange, temper: Temper) {
        let name = self.known.iter().map(|k| k.name + 1).max().unwrap_or(0);
        let device = Device {
            name,
            temper,
            log: self.log.clone(),
            deferred: self.deferred.clone(),
        };
        let count = self.known.iter().filter(|k| k.bus == bus).count();
        match self.buses.register(bus, range, device) {
            Ok(handle) => {
                assert!(count < CAPACITY && range.last() <= bus.last_address());
                self.known.push(Known {
                    name,
                    temper,
                    bus,
                    range,
                    handle,
                    bells: Vec::new(),
                    counts: Default::default(),
                });
            }
            Err(Error::OutsideBus { .. }) => assert!(range.last() > bus.last_address()),
            Err(Error::BusFull { .. }) => assert_eq!(count, CAPACITY),
            Err(error) => panic!("{error}"),
        }
    }

    fn remove(&mut self, n: usize, explicit: bool) {
        if self.known.is_empty() {
            return;
        }
        let gone = self.known.remove(n % self.known.len());
        if explicit {
            assert!(gone.handle.unregister().is_done());
        }
    }

    fn relocate(&mut self, n: usize, base: u64, refuse: Option<usize>) {
        let others: Vec<IoEvent> = self.kernel.events();
        let Some(index) = n.checked_rem(self.known.len()) else {
            return;
        };
        let known = &mut self.known[index];
        let fits = known
            .range
            .at(base)
            .is_ok_and(|r| r.last() <= known.bus.last_address());
        let mine: Vec<_> = known.handle.ioeventfds().map(|(_, event)| event).collect();
        let taken = |event: &IoEvent| {
            others
                .iter()
                .any(|other| !mine.contains(other) && other.collides(event))
        };
        let blocked = fits
            && known
                .bells
                .iter()
                .any(|(_, offset, writes)| taken(&event(known.bus, base, *offset, *writes)));
        self.kernel.refuse_after(refuse);
        let moved = known.handle.relocate(base);
        let refused = self.kernel.refuse_after(None);
        match moved {
            Ok(removal) => {
                assert!(fits && !blocked && !refused && removal.is_done());
                known.range = known.range.at(base).unwrap();
            }
            Err(Error::WrappingRange { .. } | Error::OutsideBus { .. }) => assert!(!fits),
            Err(Error::AssignIoEventFd { .. } | Error::DeassignIoEventFd { .. }) => {
                assert!(blocked || refused);
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(known.handle.range(), known.range);
    }

    fn attach(&mut self, n: usize, offset: u64, writes: WriteMatch, refuse: bool) {
        let there = self.kernel.events();
        let Some(index) = n.checked_rem(self.known.len()) else {
            return;
        };
        let known = &mut self.known[index];
        let len = writes.length().max(1) as usize;
        let inside = known
            .range
            .base()
            .checked_add(offset)
            .is_some_and(|at| known.range.holds(at, len));
        let blocked = inside
            && there
                .iter()
                .any(|other| other.collides(&event(known.bus, known.range.base(), offset, writes)));
        self.kernel.refuse_after(refuse.then_some(0));
        let host = self.kernel.clone();
        let attached = known
            .handle
            .attach_ioeventfd(host, offset, writes, eventfd());
        let refused = self.kernel.refuse_after(None);
        match attached {
            Ok(id) => {
                assert!(inside && !blocked && !refused);
                known.bells.push((id, offset, writes));
            }
            Err(Error::OutsideRange { .. }) => assert!(!inside),
            Err(Error::AssignIoEventFd { .. }) => assert!(blocked || refused),
            Err(error) => panic!("{error}"),
        }
    }

    fn detach(&mut self, n: usize, which: usize, refuse: bool) {
        let Some(index) = n.checked_rem(self.known.len()) else {
            return;
        };
        let known = &mut self.known[index];
        let Some(which) = which.checked_rem(known.bells.len()) else {
            return;
        };
        let (id, ..) = known.bells[which];
        self.kernel.refuse_after(refuse.then_some(0));
        let detached = known.handle.detach_ioeventfd(id);
        assert_eq!(self.kernel.refuse_after(None), detached.is_err());
        if detached.is_ok() {
            known.bells.remove(which);
            assert_eq!(known.handle.detach_ioeventfd(id), Err(Error::NoSuchIoEvent));
        }
    }

    /// What one piece meets: notes whom it asks, counts, and gives outcome and a read's bytes.
    fn expect_piece(
        &mut self,
        buses: &[BusKind],
        direction: Direction,
        address: u64,
        written: &[u8],
        later: Option<Later>,
    ) -> (Outcome, Vec<u8>) {
        let len = written.len();
        let ones = vec![0xff; len];
        let bytes_of = |outcome: &Vec<u8>| match direction {
            Direction::Read => outcome.clone(),
            Direction::Write => written.to_vec(),
        };
        let counting = u64::from(self.counting);
        for bus in buses {
            let mut holders: Vec<_> = self
                .known
                .iter_mut()
                .filter(|k| k.bus == *bus && k.range.holds(address, len))
                .collect();
            holders.sort_by_key(|k| (k.range.base(), k.range.last(), k.name));
            for holder in holders {
                self.asked.push(holder.name);
                let taken = match holder.temper.at(address) {
                    fakes::Mood::Declines => {
                        holder.counts[4] += counting;
                        continue;
                    }
                    fakes::Mood::Accepts => (Outcome::Answered, vec![holder.name as u8; len]),
                    fakes::Mood::Defers => {
                        holder.counts[5] += counting;
                        (Outcome::Deferred, ones.clone())
                    }
                };
                let (accesses, bytes) = match direction {
                    Direction::Read => (0, 2),
                    Direction::Write => (1, 3),
                };
                holder.counts[accesses] += counting;
                holder.counts[bytes] += counting * len as u64;
                let event = (*bus, address, direction, bytes_of(&taken.1), taken.0);
                self.events.push(event);
                if taken.0 == Outcome::Answered {
                    return taken;
                }
                let end = match later {
                    // A coalesced write is posted.
                    None => return (Outcome::Answered, ones),
                    Some(Later::Abandon) => return taken,
                    Some(Later::Complete) => {
                        let name = holder.name as u8;
                        (Outcome::Answered, fakes::late_bytes(name, len))
                    }
                    Some(Later::Decline | Later::Drop) => (Outcome::Unclaimed, ones),
                };
                // A late answer is told by the bus that the access was made on.
                let on = buses[buses.len() - 1];
                let event = (on, address, direction, bytes_of(&end.1), end.0);
                self.events.push(event);
                return end;
            }
        }
        let last = buses[buses.len() - 1];
        if self.counting {
            let (count, address_seen) = &mut self.unclaimed[last as usize];
            (*count, *address_seen) = (*count + 1, Some(address));
        }
        let bytes = bytes_of(&ones);
        self.events
            .push((last, address, direction, bytes, Outcome::Unclaimed));
        (Outcome::Unclaimed, ones)
    }

    fn access(&mut self, way: Way, direction: Direction, address: u64, len: usize, later: Later) {
        let (address, pieces) = pieces(way, address, len);
        let buses = match (way, direction) {
            (Way::Plain(bus), _) => vec![bus],
            (Way::Mmio, Direction::Read) => vec![BusKind::Mmio],
            (Way::Mmio, Direction::Write) => vec![BusKind::FastMmio, BusKind::Mmio],
            (Way::Repeated(_), _) => vec![BusKind::Pio],
        };

        // The model first: it ends at an abandoned piece.
        let written: Vec<u8> = (0..len).map(|n| n as u8 ^ 0x3c).collect();
        let mut expected_data = vec![0xff; len];
        let mut expected = None;
        for (at, bytes) in pieces {
            let part = written[bytes.clone()].to_vec();
            let (outcome, data) = self.expect_piece(&buses, direction, at, &part, Some(later));
            expected_data[bytes].copy_from_slice(&data);
            if outcome == Outcome::Deferred {
                expected = Some(Outcome::Deferred);
                break;
            }
            expected = Some(match expected {
                None => outcome,
                Some(before) if before == outcome => outcome,
                Some(_) => Outcome::Partial,
            });
        }
        let expected = expected.unwrap_or(Outcome::Unclaimed);

        // Then the bus.
        let mut data = vec![0x5a; len];
        let io = &mut self.io;
        let port = PioAddress(address as u16);
        let mut outcome = match (way, direction) {
            (Way::Plain(bus), Direction::Read) => io.read(bus, address, &mut data),
            (Way::Plain(bus), Direction::Write) => io.write(bus, address, &written),
            (Way::Mmio, Direction::Read) => io.mmio_read(MmioAddress(address), &mut data),
            (Way::Mmio, Direction::Write) => io.mmio_write(MmioAddress(address), &written),
            (Way::Repeated(w), Direction::Read) => io.pio_read_repeated(port, w, &mut data),
            (Way::Repeated(w), Direction::Write) => io.pio_write_repeated(port, w, &written),
        };
        while outcome == Outcome::Deferred {
            assert!(io.is_deferred());
            let completion = self.deferred.lock().unwrap().pop_front().unwrap();
            // Nothing changes while there is no answer.
            let again = match direction {
                Direction::Read => io.poll_read(&mut data),
                Direction::Write => io.poll_write(&written),
            };
            assert_eq!(again, Outcome::Deferred);
            assert!(!completion.is_abandoned());
            match later {
                Later::Complete => assert!(fakes::complete(completion, self.log.last_name())),
                Later::Decline => assert!(completion.decline()),
                Later::Drop => drop(completion),
                Later::Abandon => {
                    io.abandon();
                    assert!(completion.is_abandoned() && !completion.complete(&[0]));
                    break;
                }
            }
            // Not `wait_…`, which would wait for the next piece's answer too: it is ours to give.
            outcome = match direction {
                Direction::Read => io.poll_read(&mut data),
                Direction::Write => io.poll_write(&written),
            };
        }
        assert_eq!(outcome, expected);
        assert!(!io.is_deferred());
        if direction == Direction::Read {
            assert_eq!(data, expected_data);
        }
    }

    fn expect_coalesced(&mut self) {
        while let Some((bus, address, data)) = self.ring.pop_front() {
            let buses = match bus {
                BusKind::Mmio => vec![BusKind::FastMmio, BusKind::Mmio],
                bus => vec![bus],
            };
            // `is_whole` accesses only, as KVM's are.
            let _ = self.expect_piece(&buses, Direction::Write, address, &data, None);
            self.drained += 1;
        }
    }

    fn coalesced(&mut self, bus: BusKind, address: u64, len: usize) {
        let address = if bus == BusKind::Pio {
            address & 0xffff
        } else {
            address & !7
        };
        let data: Vec<u8> = (0..len.clamp(1, 8)).map(|n| n as u8).collect();
        let kept = self.kernel.write(bus, address, &data);
        assert_eq!(kept, self.ring.len() < RING_ENTRIES - 1);
        if kept {
            self.ring.push_back((bus, address, data));
        } else {
            // Full: the write leaves the guest, and comes after those in the ring.
            self.before_exit();
        }
    }

    fn before_exit(&mut self) {
        let kept = self.ring.len();
        self.expect_coalesced();
        assert_eq!(self.io.before_exit(), kept);
        // What was deferred is posted: its completion finds nobody.
        for completion in self.deferred.lock().unwrap().drain(..) {
            assert!(!completion.complete(&[1]));
        }
    }

    fn zone(&mut self, bus: BusKind, range: IoRange, refuse: bool) {
        let good = matches!(bus, BusKind::Mmio | BusKind::Pio)
            && !range.is_exact()
            && range.last() <= bus.last_address();
        let overlaps = self
            .zones
            .iter()
            .any(|(on, zone, _)| *on == bus && zone.overlaps(&range));
        self.kernel.refuse_after(refuse.then_some(0));
        let zone = self.buses.coalesce(self.kernel.clone(), bus, range);
        let refused = self.kernel.refuse_after(None);
        match zone {
            Ok(zone) => {
                assert!(good && !overlaps && !refused);
                assert_eq!((zone.bus(), zone.range()), (bus, range));
                self.zones.push((bus, range, zone));
            }
            Err(Error::NotCoalescible { .. }) => assert!(!good),
            Err(Error::ZoneOverlap { .. }) => assert!(overlaps),
            Err(Error::RegisterZone { .. }) => assert!(refused),
            Err(error) => panic!("{error}"),
        }
    }

    fn end_zone(&mut self, n: usize, refuse: bool) {
        let Some(index) = n.checked_rem(self.zones.len()) else {
            return;
        };
        self.kernel.refuse_after(refuse.then_some(0));
        let ended = self.zones[index].2.end();
        let refused = self.kernel.refuse_after(None);
        assert_eq!(refused, ended.is_err());
        if !refused {
            // What was kept has been carried out, by a dispatcher of its own.
            self.expect_coalesced();
            for completion in self.deferred.lock().unwrap().drain(..) {
                assert!(!completion.complete(&[1]));
            }
            self.zones.remove(index);
        }
    }

    /// Everything that can be seen from outside.
    fn compare(&mut self) {
        assert_eq!(self.log.take(), std::mem::take(&mut self.asked));
        let events = std::mem::take(&mut self.events);
        let recorded = std::mem::take(&mut *self.recorder.0.lock().unwrap());
        assert_eq!(recorded, if self.tracing { events } else { Vec::new() });

        let in_order = |bus: BusKind| {
            let mut known: Vec<_> = self.known.iter().filter(|k| k.bus == bus).collect();
            known.sort_by_key(|k| (k.range.base(), k.range.last(), k.name));
            known
        };
        for bus in BusKind::ALL {
            let ranges: Vec<_> = in_order(bus).iter().map(|k| k.range).collect();
            assert_eq!(self.buses.ranges(bus), ranges);
        }

        let stats = self.buses.stats();
        assert_eq!(stats.is_some(), self.counting);
        if let Some(stats) = stats {
            let counted = stats.ranges.iter().map(|s| {
                let counts = [
                    s.reads,
                    s.writes,
                    s.read_bytes,
                    s.written_bytes,
                    s.declined,
                    s.deferred,
                ];
                (s.bus, s.range, counts)
            });
            let known = BusKind::ALL.into_iter().flat_map(in_order);
            let known = known.map(|k| (k.bus, k.range, k.counts));
            assert_eq!(counted.collect::<Vec<_>>(), known.collect::<Vec<_>>());
            let unclaimed = stats.unclaimed.map(|u| (u.accesses, u.last_address));
            assert_eq!(unclaimed, self.unclaimed);
        }

        let mut events = self.kernel.events();
        let mut expected: Vec<_> = self
            .known
            .iter()
            .flat_map(|k| {
                let base = k.range.base();
                k.bells
                    .iter()
                    .map(move |(_, o, w)| event(k.bus, base, *o, *w))
            })
            .collect();
        let order = |event: &IoEvent| format!("{event}");
        events.sort_by_key(order);
        expected.sort_by_key(order);
        assert_eq!(events, expected);

        let zones: Vec<_> = self.zones.iter().map(|(b, r, _)| (*b, *r)).collect();
        assert_eq!(self.buses.coalesced_zones(), zones);
        assert_eq!(self.kernel.zones(), zones);
        assert_eq!(self.buses.coalesced_writes(), self.drained);
    }

    /// Everything goes: nothing is left in the kernel, and no deadlock on the way.
    fn end(self) {
        let kernel = self.kernel.clone();
        let removals: Vec<Removal> = self
            .known
            .into_iter()
            .map(|known| known.handle.unregister())
            .collect();
        assert!(removals.iter().all(Removal::is_done));
        drop(self.zones);
        drop((self.io, self.buses));
        assert_eq!((kernel.events(), kernel.zones()), (vec![], vec![]));
    }
}

/// A piece of an access: its address, and its bytes in the data.
type Piece = (u64, std::ops::Range<usize>);

/// How an access is cut, and where it begins on its bus.
fn pieces(way: Way, address: u64, len: usize) -> (u64, Vec<Piece>) {
    let port = address & 0xffff;
    match way {
        Way::Plain(_) => (address, vec![(address, 0..len)]),
        Way::Mmio if len == 0 => (address, vec![(address, 0..0)]),
        Way::Mmio => {
            let pieces = fragments(address, len).map(|f| (f.address, f.bytes()));
            (address, pieces.collect())
        }
        Way::Repeated(0) if len == 0 => (port, vec![(port, 0..0)]),
        Way::Repeated(0) => (port, Vec::new()),
        Way::Repeated(width) => {
            let starts = (0..len).step_by(width);
            let pieces = starts.map(|s| (port, s..(s + width).min(len)));
            (port, pieces.collect())
        }
    }
}

/// Where KVM has an ioeventfd.
fn event(bus: BusKind, base: u64, offset: u64, writes: WriteMatch) -> IoEvent {
    let at = base.wrapping_add(offset);
    let address = match bus {
        BusKind::Mmio | BusKind::FastMmio => IoEventAddress::Mmio(MmioAddress(at)),
        BusKind::Pio => IoEventAddress::Pio(PioAddress(at as u16)),
        BusKind::CcwNotify => IoEventAddress::CcwNotify(at),
    };
    IoEvent { address, writes }
}
