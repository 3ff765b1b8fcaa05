// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Answers that come later: what the vCPU gets, and that it hangs on nobody.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use io_bus::{
    Answer, At, BusKind, Completion, IoBus, IoDevice, IoRange, MmioAddress, Outcome, PioAddress,
    defer,
};

/// Defers every access, and hands each completion to the test.
struct Slow {
    requests: Mutex<Sender<(u64, Vec<u8>, Completion)>>,
}

impl Slow {
    fn take(&self, at: At, data: &[u8]) -> Answer {
        let (completion, deferral) = defer();
        let request = (at.address(), data.to_vec(), completion);
        self.requests.lock().unwrap().send(request).unwrap();
        Answer::Deferred(deferral)
    }
}

impl IoDevice for Slow {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        data.fill(0x5a);
        self.take(at, &[])
    }

    fn write(&self, at: At, data: &[u8]) -> Answer {
        self.take(at, data)
    }
}

type Requests = Receiver<(u64, Vec<u8>, Completion)>;

fn slow() -> (Slow, Requests) {
    let (requests, inbox) = channel();
    let requests = Mutex::new(requests);
    (Slow { requests }, inbox)
}

fn bus_with(kind: BusKind) -> (IoBus, io_bus::Registration, Requests) {
    let bus = IoBus::new();
    let (device, requests) = slow();
    let range = IoRange::new(0x1000, 0x2000).unwrap();
    let registration = bus.register(kind, range, device).unwrap();
    (bus, registration, requests)
}

#[test]
fn a_read_is_all_ones_until_its_answer_comes_and_its_answer_then() {
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    let mut data = [0; 4];
    let outcome = io.mmio_read(MmioAddress(0x1010), &mut data);
    assert_eq!((outcome, data), (Outcome::Deferred, [0xff; 4]));
    assert!(!outcome.is_answered());
    // The access on the bus is over: this thread waits for nothing.
    assert!(!io_bus::is_inside_access());
    assert_eq!(io.poll_read(&mut data), Outcome::Deferred);

    let (at, _, completion) = requests.recv().unwrap();
    let other = thread::spawn(move || completion.complete(&[1, 2, 3, 4]));
    assert_eq!(io.wait_read(&mut data), Outcome::Answered);
    assert_eq!((at, data), (0x1010, [1, 2, 3, 4]));
    assert!(other.join().unwrap());
    // Fetched once.
    assert_eq!(io.wait_read(&mut data), Outcome::Unclaimed);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn a_write_is_over_when_it_is_completed() {
    let (bus, _registration, requests) = bus_with(BusKind::Pio);
    let mut io = bus.dispatcher();
    assert_eq!(io.pio_write(PioAddress(0x1000), &[7]), Outcome::Deferred);
    let (_, written, completion) = requests.recv().unwrap();
    assert_eq!(io.poll_write(&[7]), Outcome::Deferred);
    assert!(completion.complete(&[]));
    assert_eq!((io.wait_write(&[7]), written), (Outcome::Answered, vec![7]));
}

#[test]
fn whoever_drops_or_declines_makes_the_guest_read_all_ones() {
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    for decline in [true, false] {
        let mut data = [0; 8];
        assert_eq!(
            io.mmio_read(MmioAddress(0x1000), &mut data),
            Outcome::Deferred
        );
        let (_, _, completion) = requests.recv().unwrap();
        let other = thread::spawn(move || match decline {
            true => assert!(completion.decline()),
            // A thread that panics drops it too.
            false => panic!("with {completion:?}"),
        });
        assert_eq!(io.wait_read(&mut data), Outcome::Unclaimed);
        assert_eq!(data, [0xff; 8]);
        assert_eq!(other.join().is_ok(), decline);
    }
}

#[test]
fn a_device_that_goes_takes_its_completions_along_and_no_vcpu_hangs() {
    /// Keeps what it should complete.
    #[derive(Default)]
    struct Hoarder(Mutex<Vec<Completion>>);
    impl IoDevice for Hoarder {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            let (completion, deferral) = defer();
            self.0.lock().unwrap().push(completion);
            Answer::Deferred(deferral)
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            Answer::Accepted
        }
    }
    let bus = IoBus::new();
    let range = IoRange::new(0x60, 1).unwrap();
    let registration = bus
        .register(BusKind::Pio, range, Hoarder::default())
        .unwrap();
    let mut io = bus.dispatcher();
    let mut data = [0];
    assert_eq!(io.pio_read(PioAddress(0x60), &mut data), Outcome::Deferred);
    // Nobody waits for a deferred answer: the device is off at once, and dropped.
    assert!(registration.unregister().is_done());
    assert_eq!(io.wait_read(&mut data), Outcome::Unclaimed);
    assert_eq!(data, [0xff]);
}

#[test]
fn an_answer_outlives_the_devices_removal_and_its_move() {
    let (bus, mut registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    let mut data = [0; 2];
    assert_eq!(
        io.mmio_read(MmioAddress(0x1000), &mut data),
        Outcome::Deferred
    );
    assert!(registration.relocate(0x8000).unwrap().is_done());
    assert!(registration.unregister().is_done());
    let (_, _, completion) = requests.recv().unwrap();
    assert!(completion.complete(&[5, 6]));
    assert_eq!(io.wait_read(&mut data), Outcome::Answered);
    assert_eq!(data, [5, 6]);
}

#[test]
fn an_interruption_ends_the_wait_and_leaves_the_access_as_it_is() {
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    let interrupter = io.interrupter();
    let mut data = [0];
    assert_eq!(
        io.mmio_read(MmioAddress(0x1000), &mut data),
        Outcome::Deferred
    );
    // A moment early is not lost.
    interrupter.interrupt();
    assert_eq!(io.wait_read(&mut data), Outcome::Deferred);
    assert!(io.is_deferred());
    // From another thread, at whatever moment.
    let other = thread::spawn(move || interrupter.clone().interrupt());
    assert_eq!(io.wait_read(&mut data), Outcome::Deferred);
    other.join().unwrap();
    assert_eq!(data, [0xff]);
    let (_, _, completion) = requests.recv().unwrap();
    assert!(completion.complete(&[9]));
    assert_eq!((io.wait_read(&mut data), data), (Outcome::Answered, [9]));
}

/// Both have come: the answer counts, and the interruption stays for the next wait.
#[test]
fn an_answer_that_is_there_counts_more_than_an_interruption() {
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    let mut data = [0];
    assert_eq!(io.read(BusKind::Mmio, 0x1000, &mut data), Outcome::Deferred);
    let (_, _, completion) = requests.recv().unwrap();
    assert!(completion.complete(&[0x2a]));
    io.interrupter().interrupt();
    assert_eq!(io.wait_read(&mut data), Outcome::Answered);
    assert_eq!(data, [0x2a]);
    assert_eq!(io.read(BusKind::Mmio, 0x1000, &mut data), Outcome::Deferred);
    assert_eq!(io.wait_read(&mut data), Outcome::Deferred);
}

#[test]
fn a_vcpu_that_gives_up_is_told_to_the_completion() {
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    let mut data = [0];
    assert_eq!(
        io.mmio_read(MmioAddress(0x1000), &mut data),
        Outcome::Deferred
    );
    let (_, _, first) = requests.recv().unwrap();
    assert!(!first.is_abandoned());
    io.abandon();
    assert!(first.is_abandoned() && !first.complete(&[1]));
    assert_eq!(io.wait_read(&mut data), Outcome::Unclaimed);
    assert_eq!(data, [0xff]);

    // Also by another deferred access in its place, and by a dispatcher that goes.
    let _ = io.mmio_read(MmioAddress(0x1000), &mut data);
    let (_, _, second) = requests.recv().unwrap();
    let _ = io.mmio_read(MmioAddress(0x1001), &mut data);
    let (_, _, third) = requests.recv().unwrap();
    assert!(second.is_abandoned() && !third.is_abandoned());
    drop(io);
    assert!(third.is_abandoned());
}

#[test]
fn pieces_wait_for_the_ones_before_them_and_are_joined() {
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    // Four bytes before a page's end, then eight, then four.
    let mut data = [0; 16];
    let mut outcome = io.mmio_read(MmioAddress(0x1ffc), &mut data);
    let mut asked = Vec::new();
    for n in 1.. {
        assert_eq!(outcome, Outcome::Deferred);
        assert!(data.iter().skip(4).all(|byte| n > 1 || *byte == 0xff));
        let (at, _, completion) = requests.recv().unwrap();
        // The next piece is not asked for before this one is answered.
        assert!(requests.try_recv().is_err());
        asked.push(at);
        assert!(completion.complete(&[n; 8]));
        outcome = io.poll_read(&mut data);
        if outcome != Outcome::Deferred {
            break;
        }
    }
    assert_eq!(asked, [0x1ffc, 0x2000, 0x2008]);
    let expected = [vec![1; 4], vec![2; 8], vec![3; 4]].concat();
    assert_eq!((outcome, data.to_vec()), (Outcome::Answered, expected));

    // The same for a write, whose middle piece is declined.
    let written: Vec<u8> = (0..16).collect();
    let mut outcome = io.mmio_write(MmioAddress(0x1ffc), &written);
    let mut parts = Vec::new();
    while outcome == Outcome::Deferred {
        let (at, part, completion) = requests.recv().unwrap();
        parts.extend(part);
        assert!(match at {
            0x2000 => completion.decline(),
            _ => completion.complete(&[]),
        });
        outcome = io.poll_write(&written);
    }
    assert_eq!((outcome, parts), (Outcome::Partial, written));
}

#[test]
fn string_instructions_wait_item_by_item() {
    let (bus, _registration, requests) = bus_with(BusKind::Pio);
    let mut io = bus.dispatcher();
    let mut data = [0; 6];
    let mut outcome = io.pio_read_repeated(PioAddress(0x1000), 2, &mut data);
    let mut items = 0;
    while outcome == Outcome::Deferred {
        let (_, _, completion) = requests.recv().unwrap();
        items += 1;
        assert!(completion.complete(&[items, 0]));
        outcome = io.poll_read(&mut data);
    }
    assert_eq!((outcome, data), (Outcome::Answered, [1, 0, 2, 0, 3, 0]));
}

#[test]
fn other_accesses_go_on_while_one_waits() {
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    let mut data = [0];
    assert_eq!(
        io.mmio_read(MmioAddress(0x1000), &mut data),
        Outcome::Deferred
    );
    let mut other = [0];
    assert_eq!(
        io.pio_read(PioAddress(0x60), &mut other),
        Outcome::Unclaimed
    );
    // A wait in the wrong direction is a caller's slip, and gives nothing away.
    assert_eq!(io.wait_write(&[0]), Outcome::Unclaimed);
    requests.recv().unwrap().2.complete(&[3]);
    assert_eq!((io.wait_read(&mut data), data), (Outcome::Answered, [3]));
}

/// No wake-up is lost, whichever of completion and interruption comes when.
#[test]
fn completions_and_interruptions_race_and_none_is_lost() {
    let long = std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1");
    let rounds: u32 = if long { 200_000 } else { 5_000 };
    let (bus, _registration, requests) = bus_with(BusKind::Mmio);
    let mut io = bus.dispatcher();
    let interrupter = io.interrupter();
    let turn = Arc::new(Barrier::new(2));
    let their_turn = turn.clone();
    let kicker = thread::spawn(move || {
        for _ in 0..rounds {
            their_turn.wait();
            interrupter.interrupt();
        }
    });
    let answerer = thread::spawn(move || {
        for (at, _, completion) in requests {
            assert!(completion.complete(&(at as u32).to_le_bytes()));
        }
    });
    for round in 0..rounds {
        let at = 0x1000 + u64::from(round % 0x800);
        let mut data = [0; 4];
        assert_eq!(io.read(BusKind::Mmio, at, &mut data), Outcome::Deferred);
        turn.wait();
        let mut outcome = Outcome::Deferred;
        while outcome == Outcome::Deferred {
            outcome = io.wait_read(&mut data);
        }
        assert_eq!(outcome, Outcome::Answered);
        assert_eq!(u64::from(u32::from_le_bytes(data)), at);
    }
    kicker.join().unwrap();
    drop((io, _registration, bus));
    answerer.join().unwrap();
}
