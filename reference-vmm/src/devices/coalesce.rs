// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Coalesced serial output: a guest that polls its serial port leaves the kernel once for many bytes.
//!
//! KVM can keep the writes to a port in a ring until the next exit ([`IoBus::coalesce`]). For a
//! serial port's transmit register that is cheap and right as long as the guest polls: whatever it
//! asks the port (the line status, say) is an exit, before which the ring is drained, so that it
//! never sees a port that lags behind. Three kinds of guest must not notice:
//!
//! - One that writes a little and ends, as a tiny guest does. A zone is a device on KVM's own bus:
//!   registering it, and the end of a VM that has one, wait for a grace period. So there is no zone
//!   before [`THRESHOLD`] bytes have been written, each by an exit.
//! - One that writes and then asks nothing: it halts, or computes. A thread drains the ring every
//!   [`TICK`].
//! - One that waits for the interrupt that tells of an empty transmitter (IER's THRI), as Linux's
//!   driver does for user space. It would get it when its byte is drained, a tick late. A tick that
//!   finds THRI set ends the zone for good. (Not THRI's setting itself: a driver that looks for the
//!   port sets every bit for a moment, in the middle of the kernel's polled output.)
//!
//! ```text
//!   Watching ──THRESHOLD bytes, by exits──► On ──THRI at a tick, or KVM refuses──► Off
//!       ▲                                   │
//!       └────────nothing for IDLE ticks─────┘
//! ```
//!
//! The vCPU that writes the byte that is one too many maps the ring and starts the thread `com1-drain`,
//! which registers the zone (the grace period is its own, not the guest's), drains, ends the zone and
//! ends itself. A host without `KVM_CAP_COALESCED_PIO` stays as it is, with a debug line.
//!
//! # Order
//!
//! The port sees all writes in the guest's order, also those that are kept: every other access to it
//! is an exit, and comes after them. So a divisor's low byte, which goes to the same address, still
//! comes between the two writes to the line control register that put it there, and loop-back mode
//! has the bytes that were written in it and no others.
//!
//! # What it costs
//!
//! A drain is one write to the console, however many bytes it brings, and that write is made when the
//! ring is free again: a console that takes no more holds up the vCPU that has drained, and not those
//! that find the ring empty. (Which of the vCPUs had written nobody knows.)

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use io_bus::{
    BusKind, CoalescedZone, Dispatcher, Error, IoBus, IoRange, RingMemory, SetCoalescedZone,
};

use crate::end::Chain;

/// Bytes that a guest writes by exits before there is a zone.
pub const THRESHOLD: u32 = 256;

/// The longest that a byte stays in the ring.
pub const TICK: Duration = Duration::from_millis(10);

/// After so many ticks without a byte the zone, and the thread with it, goes until it is worth it
/// again.
pub const IDLE_TICKS: u32 = 100;

/// A port whose output may be coalesced: what has to be known of it.
pub trait PolledOutput: Send + Sync {
    /// Bytes that the guest has sent while it did not wait for the transmitter's interrupt, since
    /// the last [`restart`](Self::restart).
    fn polled_bytes(&self) -> u32;
    /// Counts from zero again.
    fn restart(&self);
    /// Whether the guest waits for the transmitter's interrupt.
    fn is_interrupt_driven(&self) -> bool;
    /// What the guest sends from now on may wait for [`release`](Self::release): many bytes, one
    /// write to the console.
    fn hold(&self);
    /// What was sent goes out, unless another holds it too. Blocks while the console is full.
    fn release(&self);
    /// Ends a [`hold`](Self::hold) and brings nothing out: the next who releases, syncs or sends does. Does not block.
    fn let_go(&self);
    /// What was sent before goes out, held or not, also what another thread is at. Blocks while the
    /// console is full, until the guest's end has been told.
    fn sync(&self);
}

const WATCHING: u8 = 0;
const ON: u8 = 1;
const OFF: u8 = 2;

/// Decides when a port's output is coalesced, and does it. One a port.
pub struct Coalescing<H: SetCoalescedZone, P> {
    host: H,
    port: Arc<P>,
    range: IoRange,
    state: AtomicU8,
    /// A ring is attached to the bus.
    has_ring: AtomicBool,
    shared: Mutex<Shared<H>>,
    changed: Condvar,
}

struct Shared<H: SetCoalescedZone> {
    /// The machine stops: no more threads.
    stopped: bool,
    thread: Option<JoinHandle<()>>,
    /// The zone of a machine that has stopped, which need not be ended: its VM goes.
    left: Option<CoalescedZone<H>>,
}

impl<H, P> Coalescing<H, P>
where
    H: SetCoalescedZone + Clone + Send + Sync + 'static,
    P: PolledOutput + 'static,
{
    /// Watches `port`, whose transmit register is the I/O port `at`. Nothing is asked of `host` yet.
    pub fn new(host: H, port: Arc<P>, at: IoRange) -> Arc<Self> {
        Arc::new(Coalescing {
            host,
            port,
            range: at,
            state: AtomicU8::new(WATCHING),
            has_ring: AtomicBool::new(false),
            shared: Mutex::new(Shared {
                stopped: false,
                thread: None,
                left: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// To be called after each write that a guest has left the kernel for; costs two loads. `bus` has
    /// the port, and `ring` maps KVM's ring for it, through the vCPU that wrote.
    #[inline]
    pub fn after_write<R: RingMemory + 'static>(
        self: &Arc<Self>,
        bus: &IoBus,
        ring: impl FnOnce(&H) -> Result<R, Error>,
    ) {
        if self.state.load(Ordering::Relaxed) == WATCHING && self.port.polled_bytes() >= THRESHOLD {
            self.begin(bus, ring);
        }
    }

    /// Never begins: every byte is an exit. To be called before the first vCPU runs.
    pub fn leave_off(&self) {
        // Relaxed: the vCPUs' threads are made later.
        self.state.store(OFF, Ordering::Relaxed);
    }

    /// To be called after each return of `KVM_RUN`, before its exit is dispatched: carries out what
    /// KVM has kept, as [`Dispatcher::before_exit`] does, and has the console get it in one piece.
    #[inline]
    pub fn before_exit(&self, io: &mut Dispatcher) {
        // Acquire: pairs with the Release of the thread that has ended the zone and drained the ring.
        // Whoever sees that it is ended sees what was in it carried out. Nobody holds the console's output
        // together where nothing was kept.
        if self.state.load(Ordering::Acquire) == ON && io.has_coalesced() {
            self.drain(io);
        }
    }

    /// Brings out what the guest has written so far: to be called before its end is told, by which
    /// the console gives up waiting. Another thread may be at it, and is waited for. Not for a device.
    pub fn finish(&self, bus: &IoBus) {
        if self.has_ring.load(Ordering::Relaxed) {
            self.drain(&mut bus.dispatcher());
        }
        self.port.sync();
    }

    /// With all vCPUs out of the guest: carries out what KVM has kept, and waits for no console. What it brought is on the
    /// console a [`TICK`] later, or when that takes it.
    pub fn settle(&self, bus: &IoBus) {
        let mut io = bus.dispatcher();
        if self.has_ring.load(Ordering::Relaxed) && io.has_coalesced() {
            self.port.hold();
            io.before_exit();
            // As long as there is something in the ring there is the thread that takes it out, and it finds the bytes.
            self.port.let_go();
        }
    }

    /// As [`finish`](Self::finish), after [`before_exit`](Self::before_exit).
    pub fn sync(&self) {
        self.port.sync();
    }

    fn drain(&self, io: &mut Dispatcher) {
        /// Also when a device panics.
        struct Held<'a, P: PolledOutput>(&'a P);
        impl<P: PolledOutput> Drop for Held<'_, P> {
            fn drop(&mut self) {
                self.0.release();
            }
        }
        self.port.hold();
        let _held = Held(&*self.port);
        io.before_exit();
    }

    #[cold]
    fn begin<R: RingMemory + 'static>(
        self: &Arc<Self>,
        bus: &IoBus,
        ring: impl FnOnce(&H) -> Result<R, Error>,
    ) {
        let mut shared = self.shared();
        // Under the lock: of two vCPUs one begins.
        if shared.stopped || self.state.load(Ordering::Relaxed) != WATCHING {
            return;
        }
        // Relaxed: a vCPU has something in the ring only by a zone, and that is made, by a call of KVM,
        // after this; so who comes out with something in the ring sees it.
        self.state.store(ON, Ordering::Relaxed);
        if !self.has_ring.load(Ordering::Relaxed) {
            match ring(&self.host).and_then(|ring| bus.attach_coalesced_ring(ring)) {
                Ok(()) => self.has_ring.store(true, Ordering::Relaxed),
                Err(error) => return self.give_up(&error),
            }
        }
        let (this, bus) = (self.clone(), bus.clone());
        let thread = std::thread::Builder::new().name("com1-drain".into());
        match thread.spawn(move || this.serve(bus)) {
            // In the place of one that has ended by itself, and is done but for its last instructions.
            Ok(thread) => shared.thread = Some(thread),
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&self, why: &dyn std::error::Error) {
        log::debug!("serial output is not coalesced: {}", Chain(why));
        self.state.store(OFF, Ordering::Relaxed);
    }

    /// The thread.
    fn serve(&self, bus: IoBus) {
        let mut zone = match bus.coalesce(self.host.clone(), BusKind::Pio, self.range) {
            Ok(zone) => zone,
            Err(error) => return self.give_up(&error),
        };
        log::debug!("serial output is coalesced");
        let mut io = bus.dispatcher();
        let (mut seen, mut idle) = (bus.coalesced_writes(), 0);
        let next = loop {
            if let Some(mut stopped) = self.stopped_in_a_tick() {
                stopped.left = Some(zone);
                return;
            }
            // Before the drain, whose interrupt lets a guest with little to say take THRI back at once.
            let by_interrupt = self.port.is_interrupt_driven();
            self.drain(&mut io);
            let now = bus.coalesced_writes();
            idle = if now == seen { idle + 1 } else { 0 };
            seen = now;
            if by_interrupt {
                break OFF;
            }
            if idle >= IDLE_TICKS {
                break WATCHING;
            }
        };
        // What it has kept is carried out by this.
        if let Err(error) = zone.end() {
            log::debug!("{}", Chain(&error));
            // There still: somebody must go on draining it, and at the machine's end.
            return self.keep_draining(zone, &bus);
        }
        log::debug!("serial output is coalesced no more");
        self.port.restart();
        // Release: pairs with the Acquire of `before_exit`.
        self.state.store(next, Ordering::Release);
    }

    /// KVM does not let go of the zone.
    fn keep_draining(&self, zone: CoalescedZone<H>, bus: &IoBus) {
        let mut io = bus.dispatcher();
        let mut stopped = loop {
            self.drain(&mut io);
            if let Some(stopped) = self.stopped_in_a_tick() {
                break stopped;
            }
        };
        stopped.left = Some(zone);
    }

    /// Waits for a tick, or less if the machine stops: then what is shared, for the zone to be left in.
    fn stopped_in_a_tick(&self) -> Option<MutexGuard<'_, Shared<H>>> {
        let running = |shared: &mut Shared<H>| !shared.stopped;
        let (shared, _) = self
            .changed
            .wait_timeout_while(self.shared(), TICK, running)
            .unwrap_or_else(PoisonError::into_inner);
        shared.stopped.then_some(shared)
    }

    /// Ends the thread, when no vCPU runs any more, and has what is left in the ring carried out.
    /// Waits for the console's reader if that has to be, until the guest's end has been told. A
    /// second call does nothing.
    pub fn stop(&self, bus: &IoBus) {
        let thread = {
            let mut shared = self.shared();
            shared.stopped = true;
            shared.thread.take()
        };
        self.changed.notify_all();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            log::error!("the thread that drains serial output panicked");
        }
        if self.has_ring.load(Ordering::Relaxed) {
            self.drain(&mut bus.dispatcher());
        }
    }

    /// Forgets the zone, for a process that closes its VM next: ending it would wait for a grace
    /// period and change nothing. What holds the VM open is not given back.
    pub fn forget(&self) {
        std::mem::forget(self.shared().left.take());
    }

    fn shared(&self) -> MutexGuard<'_, Shared<H>> {
        // A flag and two handles: whole at any moment.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H: SetCoalescedZone, P> std::fmt::Debug for Coalescing<H, P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coalescing")
            .field("range", &self.range)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, AtomicUsize};
    use vmm_sys_util::errno;

    /// A port of which only the numbers matter.
    #[derive(Default)]
    struct Port {
        polled: AtomicU32,
        interrupts: AtomicBool,
    }

    impl PolledOutput for Port {
        fn polled_bytes(&self) -> u32 {
            self.polled.load(Ordering::Relaxed)
        }
        fn restart(&self) {
            self.polled.store(0, Ordering::Relaxed);
        }
        fn is_interrupt_driven(&self) -> bool {
            self.interrupts.load(Ordering::Relaxed)
        }
        fn hold(&self) {}
        fn release(&self) {}
        fn let_go(&self) {}
        fn sync(&self) {}
    }

    /// KVM's side, with the events in order.
    struct Host {
        events: Mutex<Vec<bool>>,
        happened: Condvar,
        refuse: AtomicUsize,
        can: bool,
    }

    impl Host {
        fn new(can: bool) -> Arc<Self> {
            Arc::new(Host {
                events: Mutex::default(),
                happened: Condvar::new(),
                refuse: AtomicUsize::new(usize::MAX),
                can,
            })
        }

        /// Waits until so many zones were made and ended, together.
        fn wait_for(&self, events: usize) -> Vec<bool> {
            let guard = self.events.lock().unwrap();
            let (guard, limit) = self
                .happened
                .wait_timeout_while(guard, Duration::from_secs(30), |e| e.len() < events)
                .unwrap();
            assert!(!limit.timed_out(), "{guard:?}");
            guard.clone()
        }
    }

    impl SetCoalescedZone for Host {
        fn can_coalesce(&self, bus: BusKind) -> bool {
            self.can && bus == BusKind::Pio
        }
        fn set_coalesced_zone(
            &self,
            bus: BusKind,
            address: u64,
            size: u32,
            register: bool,
        ) -> Result<(), errno::Error> {
            assert_eq!((bus, address, size), (BusKind::Pio, 0x3f8, 1));
            let mut events = self.events.lock().unwrap();
            events.push(register);
            self.happened.notify_all();
            match events.len() > self.refuse.load(Ordering::Relaxed) {
                true => Err(errno::Error::new(libc::ENOSPC)),
                false => Ok(()),
            }
        }
    }

    type Tested = Coalescing<Arc<Host>, Port>;

    fn words() -> Box<[std::sync::atomic::AtomicU32]> {
        (0..1024).map(|_| AtomicU32::new(0)).collect()
    }

    fn tested(can: bool) -> (Arc<Host>, Arc<Port>, Arc<Tested>, IoBus) {
        let (host, port) = (Host::new(can), Arc::new(Port::default()));
        let at = IoRange::new(0x3f8, 1).unwrap();
        let coalescing = Coalescing::new(host.clone(), port.clone(), at);
        (host, port, coalescing, IoBus::new())
    }

    fn wait_for_state(coalescing: &Tested, state: u8) {
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while coalescing.state.load(Ordering::Relaxed) != state {
            assert!(std::time::Instant::now() < deadline, "{coalescing:?}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn there_is_no_ring_and_no_zone_for_a_guest_that_writes_little() {
        let (host, port, coalescing, bus) = tested(true);
        port.polled.store(THRESHOLD - 1, Ordering::Relaxed);
        coalescing.after_write(&bus, |_| -> Result<Box<[_]>, _> { panic!("too early") });
        coalescing.stop(&bus);
        assert!(host.events.lock().unwrap().is_empty());
    }

    #[test]
    fn a_guest_that_waits_for_interrupts_ends_the_zone_for_good() {
        let (host, port, coalescing, bus) = tested(true);
        port.polled.store(THRESHOLD, Ordering::Relaxed);
        coalescing.after_write(&bus, |_| Ok(words()));
        assert_eq!(host.wait_for(1), [true]);
        port.interrupts.store(true, Ordering::Relaxed);
        assert_eq!(host.wait_for(2), [true, false]);
        wait_for_state(&coalescing, OFF);
        port.interrupts.store(false, Ordering::Relaxed);
        port.polled.store(THRESHOLD, Ordering::Relaxed);
        coalescing.after_write(&bus, |_| -> Result<Box<[_]>, _> { panic!("again") });
        coalescing.stop(&bus);
        assert_eq!(host.wait_for(2).len(), 2);
    }

    #[test]
    fn a_guest_that_falls_silent_loses_the_zone_until_it_writes_much_again() {
        let (host, port, coalescing, bus) = tested(true);
        for round in 1..=2 {
            port.polled.store(THRESHOLD, Ordering::Relaxed);
            coalescing.after_write(&bus, |_| Ok(words()));
            host.wait_for(2 * round);
            wait_for_state(&coalescing, WATCHING);
            assert_eq!(port.polled_bytes(), 0);
            coalescing.after_write(&bus, |_| -> Result<Box<[_]>, _> { panic!("too early") });
        }
        coalescing.stop(&bus);
        assert_eq!(*host.events.lock().unwrap(), [true, false, true, false]);
    }

    #[test]
    fn a_machine_that_stops_keeps_its_zone_until_it_is_forgotten_or_dropped() {
        for forget in [false, true] {
            let (host, port, coalescing, bus) = tested(true);
            port.polled.store(THRESHOLD, Ordering::Relaxed);
            coalescing.after_write(&bus, |_| Ok(words()));
            host.wait_for(1);
            coalescing.stop(&bus);
            coalescing.stop(&bus);
            assert_eq!(*host.events.lock().unwrap(), [true]);
            if forget {
                coalescing.forget();
            }
            drop(coalescing);
            let ended = host.events.lock().unwrap().len() - 1;
            assert_eq!(ended, usize::from(!forget));
        }
    }

    /// Notes what it is written, and how many zones had been made and ended by then.
    struct Seen(Arc<Host>, std::sync::mpsc::Sender<(u8, usize)>);
    impl vm_device::DevicePio for Seen {
        fn pio_read(&self, _: io_bus::PioAddress, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: io_bus::PioAddress, _: u16, data: &[u8]) {
            let events = self.0.events.lock().unwrap().len();
            self.1.send((data[0], events)).unwrap();
        }
    }

    #[test]
    fn what_kvm_keeps_is_carried_out_while_the_guest_asks_nothing() {
        let (host, port, coalescing, bus) = tested(true);
        let (sender, seen) = std::sync::mpsc::channel();
        let range = io_bus::PioRange::new(io_bus::PioAddress(0x3f8), 8).unwrap();
        let _device = bus.register_pio(range, Seen(host.clone(), sender)).unwrap();
        let ring = Arc::new(words());
        port.polled.store(THRESHOLD, Ordering::Relaxed);
        coalescing.after_write(&bus, |_| Ok(ring.clone()));
        host.wait_for(1);
        for byte in [b'x', b'y'] {
            // As KVM does: the entry (address, length, PIO, data), then `last`.
            let last = ring[1].load(Ordering::Relaxed);
            let entry = [0x3f8, 0, 1, 1, u32::from(byte), 0];
            for (word, value) in ring[2 + 6 * last as usize..].iter().zip(entry) {
                word.store(value, Ordering::Relaxed);
            }
            ring[1].store(last + 1, Ordering::Release);
            let limit = Duration::from_secs(30);
            // The zone is there still: its end would have brought the byte as well, late.
            assert_eq!(seen.recv_timeout(limit).unwrap(), (byte, 1));
        }
        coalescing.stop(&bus);
    }

    #[test]
    fn a_host_that_cannot_or_does_not_want_to_is_asked_once() {
        for (can, ring, asked) in [(false, true, 0), (true, false, 0), (true, true, 1)] {
            let (host, port, coalescing, bus) = tested(can);
            host.refuse.store(0, Ordering::Relaxed);
            port.polled.store(THRESHOLD, Ordering::Relaxed);
            coalescing.after_write(&bus, |_| match ring {
                true => Ok(words()),
                false => Err(Error::MapRing {
                    source: errno::Error::new(libc::ENOSYS),
                }),
            });
            wait_for_state(&coalescing, OFF);
            coalescing.after_write(&bus, |_| -> Result<Box<[_]>, _> { panic!("again") });
            coalescing.stop(&bus);
            assert_eq!(host.events.lock().unwrap().len(), asked);
        }
    }

    #[test]
    fn a_zone_that_kvm_does_not_end_is_drained_until_the_machine_stops() {
        let (host, port, coalescing, bus) = tested(true);
        host.refuse.store(1, Ordering::Relaxed);
        port.polled.store(THRESHOLD, Ordering::Relaxed);
        port.interrupts.store(true, Ordering::Relaxed);
        coalescing.after_write(&bus, |_| Ok(words()));
        host.wait_for(2);
        assert_eq!(coalescing.state.load(Ordering::Relaxed), ON);
        coalescing.stop(&bus);
        assert!(coalescing.shared().left.is_some());
        coalescing.forget();
    }
}
