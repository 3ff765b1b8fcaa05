// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A pager whose pages come from a peer, on a fake kernel: what breaks between the two reaches no memory that it should
//! not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod peers;

use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use async_pf::pager::{PagedSlot, Pager, PagerConfig};
use async_pf::peer::{PeerLanes, PeerSource};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::uffd::fake::{FakeUffd, Touch};
use memslots::uffd::{Call, Features, Message, Modes, Registration, Uffd, encode};
use memslots::{Backing, Gfn, Hva, Mapping, PAGE_SIZE};
use peers::{LONG, Named, connecting, patient, server, serving, until};
use vm_memory::GuestAddress;

/// Memory of 64 pages, of which none is there, and a userfaultfd that hears of what is given back.
fn registered() -> (FakeUffd, Uffd, Arc<Mapping>, Registration) {
    let fake = FakeUffd::new(Features::from_bits(0x1ffff));
    let uffd = Uffd::on(|| fake.open(), Features::EVENT_REMOVE, Features::NONE).unwrap();
    let memory = Mapping::new(&Backing::anonymous(64 * PAGE_SIZE), GuestAddress(0)).unwrap();
    let memory = Arc::new(memory);
    let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    (fake, uffd, memory, registration)
}

#[test]
fn an_answer_that_comes_again_is_not_placed_where_the_page_was_given_back_meanwhile() {
    let (fake, uffd, memory, registration) = registered();
    let at = |page: u64| Hva(memory.host().0 + (page * PAGE_SIZE) as usize);

    // The first connection greets, and what is asked on it is lost.
    let first = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&first);
    let (connect, _) = connecting(Arc::new(server(400)), move |ours, theirs, number| {
        if number == 0 {
            theirs.stall_after(32);
            *kept.lock().unwrap() = Some(ours.clone());
        }
        Ok(())
    });
    let source = Arc::new(PeerSource::connect(connect, patient()).unwrap());
    let slot = PagedSlot::new(&registration, Gfn(0x100), source.clone()).unwrap();
    let config = PagerConfig {
        deadline: LONG,
        ..PagerConfig::default()
    };
    let pager = Pager::start(&uffd, vec![slot], config).unwrap();

    // 0x100 + 4 is no page of zeros.
    assert_eq!(fake.touch(at(4), false), Touch::Sleeps);
    until("it is asked", || (source.stats().asks == 1).then_some(()));
    fake.tell(encode(&Message::Remove(at(4).0..at(5).0)));
    until("who waits has zeros", || {
        fake.asleep().is_empty().then_some(())
    });
    let wire = first.lock().unwrap().take().unwrap();
    async_pf::peer::Wire::shutdown(&wire);

    // It is asked again, and the answer comes to nothing.
    until("the answer has come", || {
        (source.stats().answers == 1).then_some(())
    });
    assert_eq!((source.stats().asks, source.stats().again), (2, 1));
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    let calls = fake.calls();
    let onto = |call: Call| {
        let made = calls.iter().filter(move |(made, _)| *made == call);
        made.filter(|(_, words)| words[0] == at(4).0 as u64).count()
    };
    assert_eq!((onto(Call::Copy), onto(Call::ZeroPage)), (0, 1));
    let stats = pager.stats();
    assert_eq!((stats.removed, stats.lost), (1, 0));
}

#[test]
fn a_peer_that_is_gone_poisons_what_it_had_and_hangs_nobody() {
    let fake = FakeUffd::new(Features::from_bits(0x1ffff));
    let uffd = Uffd::on(|| fake.open(), Features::EVENT_REMOVE, Features::NONE).unwrap();
    let memory = Mapping::new(&Backing::anonymous(4 * PAGE_SIZE), GuestAddress(0)).unwrap();
    let memory = Arc::new(memory);
    let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    let (connect, _) = connecting(Arc::new(server(400)), |_, theirs, number| {
        theirs.break_after(32);
        match number {
            0 => Ok(()),
            _ => Err(std::io::ErrorKind::ConnectionRefused.into()),
        }
    });
    let source = Arc::new(PeerSource::connect(connect, patient()).unwrap());
    let slot = PagedSlot::new(&registration, Gfn(0), source.clone()).unwrap();
    let pager = Pager::start(&uffd, vec![slot], PagerConfig::default()).unwrap();
    let touch = Hva(memory.host().0 + PAGE_SIZE as usize);
    until("it is poisoned", || {
        thread::yield_now();
        (fake.touch(touch, false) == Touch::Poisoned).then_some(())
    });
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(pager.progress().lost, 4);
}

/// Answers what nobody waits for when it is let.
struct Held {
    pages: Named,
    /// How many are held, and whether they are let go.
    gate: Arc<(Mutex<(usize, bool)>, Condvar)>,
}

impl PageSource for Held {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.pages.fetch(first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        if lane == Lane::Prefetch {
            let mut gate = self.gate.0.lock().unwrap();
            gate.0 += 1;
            drop(self.gate.1.wait_while(gate, |(_, open)| !*open).unwrap());
        }
        self.fetch(first, into)
    }
}

#[test]
fn a_fault_on_a_page_under_way_among_what_nobody_waits_for_is_served_before_that_comes() {
    for both in [false, true] {
        let (fake, uffd, memory, registration) = registered();
        let at = |page: u64| Hva(memory.host().0 + (page * PAGE_SIZE) as usize);
        let gate = Arc::new((Mutex::new((0, false)), Condvar::new()));
        let held = Held {
            pages: Named { pages: 400 },
            gate: Arc::clone(&gate),
        };
        let served = Arc::new(serving(held));
        let connect = || {
            let (connect, _) = connecting(Arc::clone(&served), |_, _, _| Ok(()));
            PeerSource::connect(connect, patient()).unwrap()
        };
        // By one connection, and by one for each lane.
        let source: Arc<dyn PageSource> = match both {
            false => Arc::new(connect()),
            true => Arc::new(PeerLanes::new(connect(), connect())),
        };
        let slot = PagedSlot::new(&registration, Gfn(0x100), source).unwrap();
        let config = PagerConfig {
            workers: 2,
            deadline: LONG,
            ahead: 64 * PAGE_SIZE,
            ..PagerConfig::default()
        };
        let pager = Pager::start(&uffd, vec![slot], config).unwrap();
        pager.prefetch_rest();
        until("all of it is under way", || {
            (gate.0.lock().unwrap().0 == 1).then_some(())
        });
        // 0x100 + 4 and 0x100 + 9 are no pages of zeros.
        for page in [4, 9, 4] {
            let touched = fake.touch(at(page), false);
            until("who waits goes on", || {
                fake.asleep().is_empty().then_some(())
            });
            assert!(
                matches!(touched, Touch::Sleeps | Touch::Done),
                "{touched:?}"
            );
        }
        let stats = pager.stats();
        assert_eq!((stats.raised, stats.joined, stats.placed), (2, 2, 2));
        assert!(!gate.0.lock().unwrap().1);
        // The other answer to these is dropped.
        gate.0.lock().unwrap().1 = true;
        gate.1.notify_all();
        assert!(pager.wait(LONG));
        let stats = pager.stats();
        assert_eq!((stats.placed, stats.lost, stats.unanswered), (64, 0, 0));
        let calls = fake.calls();
        for page in [4, 9] {
            let onto = calls.iter().filter(|(call, words)| {
                *call == Call::Copy
                    && (words[0]..words[0] + words[2]).contains(&(at(page).0 as u64))
            });
            assert_eq!(onto.count(), 1, "page {page}");
        }
        drop(pager);
    }
}

#[test]
fn of_several_connections_for_what_nobody_waits_for_each_has_its_part_and_one_that_stands_still_keeps_no_more()
 {
    let gates = [(); 3].map(|()| Arc::new((Mutex::new((0, false)), Condvar::new())));
    let servers = [0, 1, 2].map(|number| {
        Arc::new(serving(Held {
            pages: Named { pages: 400 },
            gate: Arc::clone(&gates[number]),
        }))
    });
    let connect = |number: usize| {
        let (connect, _) = connecting(Arc::clone(&servers[number]), |_, _, _| Ok(()));
        PeerSource::connect(connect, patient()).unwrap()
    };
    let lanes = PeerLanes::new(connect(0), connect(0));
    let lanes = lanes.and(connect(1)).and(connect(2));
    let held = |number: usize| gates[number].0.lock().unwrap().0;
    let open = |number: usize, open: bool| {
        gates[number].0.lock().unwrap().1 = open;
        gates[number].1.notify_all();
    };
    let fetch = |page: u64| {
        let mut into = [0; PAGE_SIZE as usize];
        let fetched = lanes.fetch_for(Lane::Prefetch, Gfn(page), &mut into);
        fetched.map(drop).unwrap();
    };
    thread::scope(|scope| {
        let first = [0, 1, 2].map(|page| scope.spawn(move || fetch(page)));
        until("each has one", || {
            ([0, 1, 2].map(held) == [1; 3]).then_some(())
        });
        // What somebody waits for comes meanwhile.
        let mut into = [0; PAGE_SIZE as usize];
        lanes.fetch(Gfn(9), &mut into).map(drop).unwrap();
        open(0, true);
        open(2, true);
        // As long as they are under way, each has as many as the one that stands still.
        until("those of the others have ended", || {
            let ended = first.iter().filter(|fetch| fetch.is_finished());
            (ended.count() == 2).then_some(())
        });
        for page in 10..30 {
            fetch(page);
        }
        assert_eq!(held(1), 1);
        assert_eq!(held(0) + held(2), 22);
        open(1, true);
    });
    let stats = lanes.stats(Lane::Prefetch);
    assert_eq!((stats.connections, stats.asks), (3, 23));
    assert_eq!(lanes.stats(Lane::Fault).asks, 1);
}
