// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is read is what was there at the moment, whatever was written when: on a kernel that is played.

use super::*;
use crate::uffd::fake::{FakeUffd, Touch};
use crate::{Backing, Hva};
use proptest::prelude::*;
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;
const PAGES: usize = 8;
const AREAS: usize = 2;
/// Of a test for what does not come.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest of two mappings, whose writers wait as a kernel has them wait.
struct World {
    fake: FakeUffd,
    mappings: Vec<Arc<Mapping>>,
    shared: Arc<Shared>,
    messages: Messages,
    /// Writes that wait: a page, and what is to be there.
    waiting: Vec<((usize, usize), u64)>,
    next: u64,
}

impl World {
    fn new(room: u64) -> Self {
        let fake = FakeUffd::new(Features::from_bits(0x1ffff));
        let wanted = Features::PAGEFAULT_FLAG_WP | Features::WP_UNPOPULATED;
        let uffd = Uffd::on(|| fake.open(), wanted, Features::NONE).unwrap();
        let mapping = |at| {
            let backing = Backing::anonymous(PAGES as u64 * PAGE);
            let mapping = Mapping::new(&backing, GuestAddress(at)).unwrap();
            Arc::new(mapping)
        };
        let mappings: Vec<_> = (0..AREAS as u64).map(|at| mapping(at << 30)).collect();
        let shared = Arc::new(Shared::new(uffd, mappings.clone(), room).unwrap());
        let mut world = World {
            fake,
            mappings,
            shared,
            messages: Messages::with_capacity(3),
            waiting: Vec::new(),
            next: 1,
        };
        for page in world.pages() {
            world.fake.touch(world.host(page), false);
            world.write(page);
        }
        world
    }

    fn pages(&self) -> Vec<(usize, usize)> {
        let area = |area| (0..PAGES).map(move |page| (area, page));
        (0..AREAS).flat_map(area).collect()
    }

    fn host(&self, (area, page): (usize, usize)) -> Hva {
        Hva(self.mappings[area].host().0 + page * PAGE as usize)
    }

    fn put(&self, page: (usize, usize), value: u64) {
        // SAFETY: a page of a mapping that lives as long as `self`.
        unsafe { (self.host(page).0 as *mut u64).write_volatile(value) }
    }

    fn value(&self, (area, page): (usize, usize)) -> u64 {
        let mut bytes = [0; 8];
        self.mappings[area].read(page as u64 * PAGE, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn write(&mut self, page: (usize, usize)) {
        self.next += 1;
        match self.fake.touch(self.host(page), true) {
            Touch::Done => self.put(page, self.next),
            Touch::Sleeps => self.waiting.push((page, self.next)),
            Touch::Poisoned => unreachable!(),
        }
    }

    /// One read of the userfaultfd, and those that wake go on.
    fn answer(&mut self) {
        let shared = Arc::clone(&self.shared);
        shared.answer(&mut self.messages).unwrap();
        let asleep = self.fake.asleep();
        let (still, awake) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|(page, _)| asleep.contains(&self.host(*page)));
        self.waiting = still;
        for (page, value) in awake {
            match self.fake.touch(self.host(page), true) {
                Touch::Done => self.put(page, value),
                Touch::Sleeps => self.waiting.push((page, value)),
                Touch::Poisoned => unreachable!(),
            }
        }
    }

    /// The guest comes to rest: nobody waits any more.
    fn settle(&mut self) {
        while !self.waiting.is_empty() {
            self.answer();
        }
    }

    fn values(&self) -> Vec<u64> {
        self.pages().iter().map(|page| self.value(*page)).collect()
    }

    fn read(&self, (area, page): (usize, usize)) -> Result<u64, PointInTimeError> {
        let mut bytes = vec![0; PAGE as usize];
        self.shared.read(area, page as u64 * PAGE, &mut bytes)?;
        Ok(u64::from_le_bytes(*bytes.first_chunk().unwrap()))
    }

    fn is_protected(&self, page: (usize, usize)) -> bool {
        self.fake.page(self.host(page)) == Some(true)
    }
}

/// What may happen next.
#[derive(Clone, Debug)]
enum Next {
    Write(usize, usize),
    Answer,
    /// Lays the next page, or reads the next one of the order.
    GoOn,
}

fn next() -> impl Strategy<Value = Next> {
    prop_oneof![
        4 => (0..AREAS, 0..PAGES).prop_map(|(area, page)| Next::Write(area, page)),
        2 => Just(Next::Answer),
        3 => Just(Next::GoOn),
    ]
}

proptest! {
    #[test]
    fn each_page_is_read_once_as_it_was_at_the_moment(
        before in prop::collection::vec(next(), 0..60),
        behind in prop::collection::vec(next(), 0..60),
        order in Just((0..AREAS * PAGES).collect::<Vec<_>>()).prop_shuffle(),
        laid in 0..=AREAS * PAGES,
        stale in any::<bool>(),
    ) {
        let mut world = World::new(1 << 20);
        let all = world.pages();
        let mut to_lay = all.iter().take(laid);
        for step in before {
            match step {
                Next::Write(area, page) => world.write((area, page)),
                Next::Answer => world.answer(),
                Next::GoOn => if let Some((area, page)) = to_lay.next() {
                    let at = *page as u64 * PAGE;
                    world.shared.lay(*area, at..at + PAGE).unwrap();
                }
            }
        }
        world.settle();
        if stale {
            // Of a fault that another answer has woken.
            let address = world.host((0, 0));
            let kind = crate::uffd::FaultKind::WriteProtect;
            let fault = crate::uffd::Fault { address, kind, write: true, thread: 0 };
            world.fake.tell(crate::uffd::encode(&crate::uffd::Message::Fault(fault)));
        }
        let moment = world.values();
        let wanted: Vec<_> = (0..AREAS).map(|area| (area, 0..PAGES as u64 * PAGE)).collect();
        world.shared.freeze(&wanted).unwrap();
        prop_assert!(all.iter().all(|page| world.is_protected(*page)));
        let mut to_read = order.iter().copied();
        let mut read = Vec::new();
        for step in behind {
            match step {
                Next::Write(area, page) => world.write((area, page)),
                Next::Answer => world.answer(),
                Next::GoOn => if let Some(number) = to_read.next() {
                    read.push((number, world.read(all[number]).unwrap()));
                    let (area, page) = all[number];
                    let at = page as u64 * PAGE;
                    world.shared.done(area, at..at + PAGE).unwrap();
                    // From here on it is written without a fault.
                    prop_assert!(!world.is_protected((area, page)));
                }
            }
        }
        for number in to_read {
            read.push((number, world.read(all[number]).unwrap()));
        }
        prop_assert_eq!(read.len(), all.len());
        for (number, value) in read {
            prop_assert_eq!(value, moment[number], "{:?}", all[number]);
            prop_assert!(world.read(all[number]).is_err());
        }
        world.settle();
        prop_assert_eq!(world.shared.lock().book.urgent(), None);
        world.shared.free_all(None);
        prop_assert!(all.iter().all(|page| !world.is_protected(*page)));
    }
}

#[test]
fn what_was_not_written_since_is_not_protected_again() {
    let mut world = World::new(1 << 20);
    for area in 0..AREAS {
        world.shared.lay(area, 0..PAGES as u64 * PAGE).unwrap();
    }
    for page in [(0, 1), (0, 2), (1, 7)] {
        world.write(page);
        world.write(page);
    }
    world.settle();
    let calls = world.fake.calls().len();
    assert_eq!(world.shared.freeze(&[]).unwrap().pages, 3);
    // Two pages that lie together are one call.
    assert_eq!(world.fake.calls().len() - calls, 2);
    assert!(world.pages().iter().all(|page| world.is_protected(*page)));
}

#[test]
fn where_there_is_no_room_for_a_copy_a_writer_waits_for_the_reader() {
    let mut world = World::new(2 * PAGE);
    world.shared.lay(0, 0..PAGES as u64 * PAGE).unwrap();
    world.shared.freeze(&[]).unwrap();
    let moment = world.values();
    for page in 0..3 {
        world.write((0, page));
    }
    let shared = Arc::clone(&world.shared);
    let answers = std::thread::spawn(move || {
        let mut messages = Messages::with_capacity(8);
        shared.answer(&mut messages).unwrap();
    });
    // The third one's page is free when it has been read, as is the room when another has been.
    while world.shared.lock().book.urgent() != Some((0, 0)) {
        std::thread::yield_now();
    }
    for page in [2, 0, 1] {
        assert_eq!(world.read((0, page)).unwrap(), moment[page], "{page}");
    }
    answers.join().unwrap();
    assert!(world.fake.asleep().is_empty());
    world.settle();
}

#[test]
fn a_writer_that_waits_for_room_goes_on_when_a_copy_is_wanted_no_more() {
    // Often: now and then the writer comes late, and finds room without being told.
    for _ in 0..20 {
        let mut world = World::new(PAGE);
        world.shared.lay(0, 0..PAGES as u64 * PAGE).unwrap();
        world.shared.freeze(&[]).unwrap();
        for page in 0..2 {
            world.write((0, page));
        }
        let shared = Arc::clone(&world.shared);
        let (done, answered) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut messages = Messages::with_capacity(8);
            let _ = done.send(shared.answer(&mut messages).is_ok());
        });
        while world.shared.lock().book.urgent() != Some((0, 0)) {
            std::thread::yield_now();
        }
        world.shared.done(0, 0..PAGE).unwrap();
        assert_eq!(answered.recv_timeout(PATIENCE), Ok(true));
        assert!(world.fake.asleep().is_empty());
    }
}

#[test]
fn a_thread_that_panics_frees_all() {
    let mut world = World::new(1 << 20);
    world.shared.lay(0, 0..PAGES as u64 * PAGE).unwrap();
    world.shared.freeze(&[]).unwrap();
    world.write((0, 3));
    let shared = Arc::clone(&world.shared);
    let thread = std::thread::spawn(move || {
        let _free = FreeAtEnd(&shared);
        panic!("as a thread may end");
    });
    assert!(thread.join().is_err());
    assert!(world.fake.asleep().is_empty());
    assert!(world.pages().iter().all(|page| !world.is_protected(*page)));
    let lost = world.read((0, 0)).unwrap_err();
    assert!(matches!(lost, PointInTimeError::Lost(_)), "{lost}");
    assert!(world.shared.lay(0, 0..PAGE).is_err());
    assert!(world.shared.freeze(&[]).is_err());
}

#[test]
fn the_moment_is_one_and_nothing_is_added_to_it() {
    let mut world = World::new(1 << 20);
    world.shared.lay(0, 0..4 * PAGE).unwrap();
    world.shared.freeze(&[]).unwrap();
    let moment = world.values();
    world.write((0, 1));
    world.write((0, 6));
    world.settle();
    let calls = world.fake.calls().len();
    for again in [
        world.shared.lay(0, 0..PAGES as u64 * PAGE),
        world.shared.freeze(&[]).map(drop),
        world.shared.freeze(&[(0, 6 * PAGE..7 * PAGE)]).map(drop),
    ] {
        let frozen = again.unwrap_err();
        assert!(matches!(frozen, PointInTimeError::Frozen), "{frozen}");
    }
    assert_eq!(world.fake.calls().len(), calls);
    for (page, value) in moment.into_iter().enumerate().take(4) {
        assert_eq!(world.read((0, page)).unwrap(), value, "{page}");
    }
    let never = world.read((0, 6)).unwrap_err();
    assert!(matches!(never, PointInTimeError::NotKept { .. }), "{never}");
}

#[test]
fn a_thread_that_ends_frees_all() {
    let mut world = World::new(1 << 20);
    world.shared.lay(0, 0..PAGES as u64 * PAGE).unwrap();
    world.shared.freeze(&[]).unwrap();
    world.write((0, 3));
    let (stopped, stop) = io::pipe().unwrap();
    drop(stop);
    world.shared.run(stopped.as_raw_fd());
    assert!(world.fake.asleep().is_empty());
    assert!(world.pages().iter().all(|page| !world.is_protected(*page)));
    let lost = world.read((0, 0)).unwrap_err();
    assert!(lost.to_string().contains("its thread has ended"), "{lost}");
}

#[test]
fn a_refusal_frees_all_and_the_reader_is_told_why() {
    let mut world = World::new(1 << 20);
    world.shared.lay(0, 0..PAGES as u64 * PAGE).unwrap();
    world.shared.freeze(&[]).unwrap();
    world.write((0, 3));
    // The page is copied, and cannot be made writable.
    world.fake.fail(0, Errno(libc::ENOENT));
    let (stopped, _stop) = io::pipe().unwrap();
    // Not the thread's whole run: that frees whatever ends it.
    world.shared.serve(stopped.as_raw_fd());
    assert!(world.fake.asleep().is_empty());
    assert!(world.pages().iter().all(|page| !world.is_protected(*page)));
    let lost = world.read((0, 0)).unwrap_err();
    assert!(matches!(lost, PointInTimeError::Lost(_)), "{lost}");
    assert!(lost.to_string().contains("UFFDIO_WRITEPROTECT"), "{lost}");
}

#[test]
fn pages_of_which_a_writer_would_wait_for_a_copy_too_long_are_refused() {
    let fake = FakeUffd::new(Features::from_bits(0x1ffff));
    for (page_size, is_refused) in [(MOST_PAGE * 2, true), (1 << 30, true), (PAGE, false)] {
        let uffd = Uffd::on(|| fake.open(), Features::NONE, Features::NONE).unwrap();
        let mapping = Mapping::new(&Backing::anonymous(PAGE), GuestAddress(0)).unwrap();
        let mapping = Arc::new(mapping.pretend_page_size(page_size));
        match Shared::new(uffd, [mapping], 0) {
            Err(PointInTimeError::PageSize(of)) => assert_eq!((of, true), (page_size, is_refused)),
            other => assert!(other.is_ok() && !is_refused),
        }
    }
}

/// Linux before 6.4 protects only what is there: what is not is made readable first, laid or only frozen.
#[test]
fn a_kernel_that_protects_only_pages_that_are_there_has_them() {
    let holes = crate::mapping::Holes::open().unwrap();
    let all = Features::from_bits(0x1ffff);
    for (features, is_populated) in [(all, false), (all.without(Features::WP_UNPOPULATED), true)] {
        let fake = FakeUffd::new(features);
        let (needed, liked) = (Features::PAGEFAULT_FLAG_WP, Features::WP_UNPOPULATED);
        let uffd = Uffd::on(|| fake.open(), needed, liked).unwrap();
        let size = PAGES as u64 * PAGE;
        let mapping = Mapping::new(&Backing::anonymous(size), GuestAddress(0)).unwrap();
        let mapping = Arc::new(mapping);
        let shared = Shared::new(uffd, [Arc::clone(&mapping)], 0).unwrap();
        let there = |range: Range<u64>| holes.of(&mapping, range).unwrap().is_empty();
        shared.lay(0, 0..2 * PAGE).unwrap();
        assert_eq!(there(0..2 * PAGE), is_populated);
        assert!(!there(4 * PAGE..5 * PAGE));
        shared.freeze(&[(0, 4 * PAGE..5 * PAGE)]).unwrap();
        assert_eq!(there(4 * PAGE..5 * PAGE), is_populated);
        assert!(!there(6 * PAGE..7 * PAGE));
    }
}
