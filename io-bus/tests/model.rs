// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bus against a model that is a plain list: whatever is registered, moved and removed in
//! whatever order, a long-lived dispatcher (its cookies warm and stale) asks the same devices in
//! the same order.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use io_bus::{Answer, At, BusKind, Error, IoBus, IoDevice, IoRange, Outcome, Registration};
use proptest::prelude::*;

const CAPACITY: usize = 12;

type Log = Arc<Mutex<Vec<(usize, u64, u64)>>>;

/// Declines accesses at odd addresses if it is picky.
struct Device {
    name: usize,
    picky: bool,
    log: Log,
}

impl Device {
    fn take(&self, at: At) -> Answer {
        self.log
            .lock()
            .unwrap()
            .push((self.name, at.base, at.offset));
        if declines(self.picky, at.address()) {
            Answer::Declined
        } else {
            Answer::Accepted
        }
    }
}

fn declines(picky: bool, address: u64) -> bool {
    picky && address % 2 == 1
}

impl IoDevice for Device {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        data.fill(self.name as u8);
        self.take(at)
    }

    fn write(&self, at: At, _: &[u8]) -> Answer {
        self.take(at)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Register(BusKind, IoRange, bool),
    Remove(usize, bool),
    Move(usize, u64),
    Read(BusKind, u64, usize),
    Write(BusKind, u64, usize),
}

fn range() -> impl Strategy<Value = IoRange> {
    (address(), 0u64..24).prop_map(|(base, size)| match size {
        0 => IoRange::exact(base),
        size => IoRange::new(base, size).unwrap_or(IoRange::exact(base)),
    })
}

/// A few pages' edges, so that cookies share places and do not.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..4, 0u64..32).prop_map(|(page, offset)| page * 0x1000 + 0xff0 + offset),
        1 => (0u64..32).prop_map(|back| u64::MAX - back),
        1 => (0u64..32).prop_map(|back| 0xffff - back),
    ]
}

fn bus() -> impl Strategy<Value = BusKind> {
    prop::sample::select(&BusKind::ALL[..])
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop::sample::select(vec![0usize, 1, 2, 3, 4, 8]);
    prop_oneof![
        3 => (bus(), range(), any::<bool>()).prop_map(|(b, r, p)| Step::Register(b, r, p)),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(n, explicit)| Step::Remove(n, explicit)),
        1 => (any::<usize>(), address()).prop_map(|(n, base)| Step::Move(n, base)),
        8 => (bus(), address(), len.clone()).prop_map(|(b, a, l)| Step::Read(b, a, l)),
        4 => (bus(), address(), len).prop_map(|(b, a, l)| Step::Write(b, a, l)),
    ]
}

/// One registration as the model knows it; its place in the list is its age.
struct Known {
    name: usize,
    picky: bool,
    bus: BusKind,
    range: IoRange,
    handle: Registration,
}

/// Whom an access asks, and what becomes of it.
fn expected(known: &[Known], bus: BusKind, address: u64, len: usize) -> (Vec<usize>, Outcome) {
    let mut holders: Vec<_> = known
        .iter()
        .filter(|k| k.bus == bus && k.range.holds(address, len))
        .collect();
    holders.sort_by_key(|k| (k.range.base(), k.range.last(), k.name));
    let mut asked = Vec::new();
    for holder in holders {
        asked.push(holder.name);
        if !declines(holder.picky, address) {
            return (asked, Outcome::Answered);
        }
    }
    (asked, Outcome::Unclaimed)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_bus_does_what_a_list_would(steps in prop::collection::vec(step(), 1..120)) {
        let buses = IoBus::with_capacity(CAPACITY);
        let mut io = buses.dispatcher();
        let log = Log::default();
        let mut known: Vec<Known> = Vec::new();

        for (name, step) in steps.into_iter().enumerate() {
            match step {
                Step::Register(bus, range, picky) => {
                    let device = Device { name, picky, log: log.clone() };
                    let count = known.iter().filter(|k| k.bus == bus).count();
                    match buses.register(bus, range, device) {
                        Ok(handle) => {
                            prop_assert!(count < CAPACITY && range.last() <= bus.last_address());
                            known.push(Known { name, picky, bus, range, handle });
                        }
                        Err(Error::OutsideBus { .. }) => {
                            prop_assert!(range.last() > bus.last_address());
                        }
                        Err(error) => {
                            prop_assert_eq!(error, Error::BusFull { bus, capacity: CAPACITY });
                            prop_assert_eq!(count, CAPACITY);
                        }
                    }
                }
                Step::Remove(n, explicit) if !known.is_empty() => {
                    let gone = known.remove(n % known.len());
                    if explicit {
                        prop_assert!(gone.handle.unregister().is_done());
                    }
                }
                Step::Move(n, base) if !known.is_empty() => {
                    let n = n % known.len();
                    let k = &mut known[n];
                    let fits = k.range.at(base).is_ok_and(|r| r.last() <= k.bus.last_address());
                    match k.handle.relocate(base) {
                        Ok(removal) => {
                            prop_assert!(fits && removal.is_done());
                            k.range = k.range.at(base).unwrap();
                        }
                        Err(_) => prop_assert!(!fits),
                    }
                    prop_assert_eq!(k.handle.range(), k.range);
                }
                Step::Remove(..) | Step::Move(..) => {}
                Step::Read(bus, address, len) => {
                    let (asked, outcome) = expected(&known, bus, address, len);
                    let mut data = vec![0x5a; len];
                    prop_assert_eq!(io.read(bus, address, &mut data), outcome);
                    let byte = match outcome {
                        Outcome::Answered => asked[asked.len() - 1] as u8,
                        _ => 0xff,
                    };
                    prop_assert_eq!(data, vec![byte; len]);
                    let seen = std::mem::take(&mut *log.lock().unwrap());
                    prop_assert!(seen.iter().all(|(_, base, offset)| base + offset == address));
                    let seen: Vec<_> = seen.into_iter().map(|(name, ..)| name).collect();
                    prop_assert_eq!(seen, asked);
                }
                Step::Write(bus, address, len) => {
                    let (asked, outcome) = expected(&known, bus, address, len);
                    prop_assert_eq!(io.write(bus, address, &vec![0; len]), outcome);
                    let seen = std::mem::take(&mut *log.lock().unwrap());
                    let seen: Vec<_> = seen.into_iter().map(|(name, ..)| name).collect();
                    prop_assert_eq!(seen, asked);
                }
            }
            for bus in BusKind::ALL {
                let mut ranges: Vec<_> =
                    known.iter().filter(|k| k.bus == bus).map(|k| k.range).collect();
                ranges.sort_by_key(|r| (r.base(), r.last()));
                let mut listed = buses.ranges(bus);
                listed.sort_by_key(|r| (r.base(), r.last(), !r.is_exact()));
                ranges.sort_by_key(|r| (r.base(), r.last(), !r.is_exact()));
                prop_assert_eq!(listed, ranges);
            }
        }
    }
}
