// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The book against a naive account of the same story, over random ones.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

const SIZES: [u64; 2] = [24, 9];
/// The slot whose source lets faults overtake.
const OVERTAKES: usize = 0;
const LIMITS: Limits = Limits {
    deadline: Duration::from_millis(100),
    retries: Some(2),
    backoff: Duration::from_millis(1),
    longest_backoff: Duration::from_millis(5),
    backlog: 4,
};

#[derive(Clone, Debug)]
enum Step {
    Fault(usize, u64),
    Guess(usize, u64, u64),
    Rest,
    StartFault(u64),
    StartAhead,
    /// A job (by its place among those under way) places so many of its pages and goes on.
    Arrive(usize, u64),
    /// A job ends in failure, which passes or not.
    Fail(usize, bool),
    Remove(usize, u64, u64),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..2usize, 0..24u64).prop_map(|(slot, page)| Step::Fault(slot, page)),
        1 => (0..2usize, 0..24u64, 0..12u64).prop_map(|(slot, page, n)| Step::Guess(slot, page, n)),
        1 => Just(Step::Rest),
        4 => (1..8u64).prop_map(Step::StartFault),
        2 => Just(Step::StartAhead),
        4 => (0..4usize, 1..8u64).prop_map(|(job, pages)| Step::Arrive(job, pages)),
        2 => (0..4usize, any::<bool>()).prop_map(|(job, passes)| Step::Fail(job, passes)),
        1 => (0..2usize, 0..24u64, 1..6u64).prop_map(|(slot, page, n)| Step::Remove(slot, page, n)),
        1 => (0..60u64).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..120)
}

/// Who waits, what is there, what was given back: by name, in sets.
#[derive(Default)]
struct Account {
    waiting: BTreeSet<(usize, u64)>,
    there: BTreeSet<(usize, u64)>,
    lost: BTreeSet<(usize, u64)>,
    zero: BTreeSet<(usize, u64)>,
}

struct Story {
    book: Book,
    account: Account,
    jobs: Vec<(Job, u64)>,
    now: Instant,
}

impl Story {
    fn lose(&mut self, places: Vec<Place>) {
        for place in places {
            let page = (place.slot, place.page);
            assert!(!self.account.zero.contains(&page), "zeros need no source");
            self.account.waiting.remove(&page);
            assert!(self.account.lost.insert(page), "{place:?} is lost once");
        }
    }

    /// How many jobs have this page still, and are not of zeros.
    fn fetched(&self, slot: usize, page: u64) -> usize {
        let has = |(job, from): &&(Job, u64)| {
            job.slot == slot && !job.zero && job.pages.contains(&page) && page >= *from
        };
        self.jobs.iter().filter(has).count()
    }

    fn begin(&mut self, job: Option<Job>) {
        let Some(job) = job else { return };
        assert!(!job.pages.is_empty());
        for page in job.pages.clone() {
            let zero = self.account.zero.contains(&(job.slot, page));
            assert_eq!(zero, job.zero, "page {page} of {job:?}");
            assert!(!self.account.there.contains(&(job.slot, page)));
            // Zeros may be: given back again, and touched again. The first that places them is enough.
            let twice = !zero
                && self.jobs.iter().any(|(other, from)| {
                    other.slot == job.slot
                        && other.zero == job.zero
                        && other.pages.contains(&page)
                        && page >= *from
                });
            // Someone waits for what is under way for nobody: once more, if that may overtake.
            let raised = job.slot == OVERTAKES
                && job.why == Why::Fault
                && job.pages.end - job.pages.start == 1;
            let raised = raised && self.fetched(job.slot, page) == 1;
            assert!(
                !twice || raised,
                "page {page} of {job:?} is fetched already"
            );
        }
        let from = job.pages.start;
        self.jobs.push((job, from));
    }

    fn arrive(&mut self, at: usize, most: u64) {
        let Some((job, from)) = self.jobs.get(at).cloned() else {
            return;
        };
        let Some(run) = self.book.own(&job, from) else {
            self.jobs.remove(at);
            return;
        };
        let end = run.end.min(run.start + most);
        for page in run.start..end {
            let page = (job.slot, page);
            assert_eq!(
                self.account.zero.contains(&page),
                job.zero,
                "{page:?} would be placed with what it should not have"
            );
            self.account.waiting.remove(&page);
            assert!(self.account.there.insert(page), "{page:?} is placed once");
        }
        self.book.arrived(&job, run.start..end, self.now);
        if end == job.pages.end {
            self.jobs.remove(at);
        } else if let Some((_, from)) = self.jobs.get_mut(at) {
            *from = end;
        }
    }

    fn take(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Fault(slot, page) => {
                let known = (slot, page);
                let expected = if page >= SIZES[slot] {
                    Told::Nowhere
                } else if self.account.there.contains(&known) {
                    Told::Placed
                } else if self.account.lost.contains(&known) {
                    Told::Lost
                } else {
                    self.account.waiting.insert(known);
                    Told::InLine
                };
                assert_eq!(self.book.fault(Place { slot, page }, now), expected);
            }
            Step::Guess(slot, page, pages) => drop(self.book.guess(slot, page..page + pages)),
            Step::Rest => self.book.want_rest(),
            Step::StartFault(cut) => {
                let job = self.book.start_fault(|_, most| most.min(cut));
                self.begin(job);
            }
            Step::StartAhead => {
                let job = self.book.start_ahead(|_| 4, |_, most| most);
                self.begin(job);
            }
            Step::Arrive(job, pages) => self.arrive(job, pages),
            Step::Fail(at, passes) => {
                if at < self.jobs.len() {
                    let (job, from) = self.jobs.remove(at);
                    // No source is asked for zeros.
                    let lost = self.book.failed(&job, from, passes || job.zero, now);
                    if job.zero {
                        // Placing fails too, for want of memory.
                        for place in &lost {
                            self.account.zero.remove(&(place.slot, place.page));
                        }
                    }
                    self.lose(lost);
                }
            }
            Step::Remove(slot, page, pages) => {
                self.book.removed(slot, page..page + pages);
                for page in (page..page + pages).filter(|page| *page < SIZES[slot]) {
                    let page = (slot, page);
                    self.account.there.remove(&page);
                    self.account.lost.remove(&page);
                    self.account.zero.insert(page);
                }
            }
            Step::Wait(millis) => {
                self.now += Duration::from_millis(millis);
                self.book.put_due_in_line(self.now);
                let late = self.book.late(self.now);
                assert!(late.iter().all(|place| self.book.is_awaited(*place)));
                assert!(late.iter().all(|place| self.book.lose(*place)));
                self.lose(late);
            }
        }
    }

    fn check(&self) {
        let all: u64 = SIZES.iter().sum();
        let untouched = self.account.zero.iter().filter(|page| {
            let of = &self.account;
            !of.there.contains(page) && !of.lost.contains(page)
        });
        // A page that was given back counts as done until someone waits for it.
        let waiting_or_begun = untouched.clone().filter(|(slot, page)| {
            let place = Place {
                slot: *slot,
                page: *page,
            };
            let state = self.book.get(place).map(Page::state);
            state != Some(PageState::Absent)
        });
        let settled =
            self.account.there.len() + self.account.lost.len() + untouched.clone().count()
                - waiting_or_begun.count();
        let (missing, lost, total) = self.book.totals();
        assert_eq!(
            (missing, lost, total),
            (all - settled as u64, self.account.lost.len() as u64, all)
        );
        assert_eq!(self.book.waits.len(), self.account.waiting.len());
    }
}

proptest! {
    /// However the runs of what is to come lie: over each other, in any order, past the end.
    #[test]
    fn only_what_is_to_come_is_missing(
        runs in proptest::collection::vec((0..30u64, 0..30u64), 0..6),
    ) {
        let runs: Vec<_> = runs.iter().map(|(start, end)| *start..*end).collect();
        let windows = SIZES.map(|pages| (pages, [1, 4]));
        let mut book = Book::new(windows, LIMITS);
        book.only(0, &runs);
        let comes = |page: u64| runs.iter().any(|run| run.contains(&page));
        let mut missing = SIZES[1];
        for page in 0..SIZES[0] {
            let of = book.get(Place { slot: 0, page }).unwrap();
            let state = if comes(page) { PageState::Absent } else { PageState::Present };
            prop_assert_eq!(of.state(), state, "page {}", page);
            missing += u64::from(comes(page));
        }
        prop_assert_eq!(book.total - book.settled, missing);
    }

    #[test]
    fn whatever_happens_nothing_is_forgotten_placed_twice_or_wrong(steps in steps()) {
        let sizes = SIZES.map(|pages| (pages, [1, 4]));
        let mut story = Story {
            book: Book::new(sizes, LIMITS),
            account: Account::default(),
            jobs: Vec::new(),
            now: Instant::now(),
        };
        story.book.overtakes(OVERTAKES);
        for step in steps {
            story.take(step);
            story.check();
        }
        // From here on all goes well: everybody gets a page, and everything comes.
        story.book.want_rest();
        for _ in 0..1000 {
            story.take(Step::Wait(6));
            story.take(Step::StartFault(8));
            story.take(Step::StartAhead);
            while !story.jobs.is_empty() {
                story.take(Step::Arrive(0, 3));
            }
            if story.book.is_complete() && story.account.waiting.is_empty() {
                break;
            }
        }
        story.check();
        prop_assert!(story.book.is_complete());
        prop_assert!(story.account.waiting.is_empty());
        prop_assert!(!story.book.has_ahead() || story.book.start_ahead(|_| 4, |_, most| most).is_none());
    }
}

#[test]
fn a_fault_on_what_is_under_way_for_nobody_is_fetched_once_more_and_the_first_that_comes_is_the_page()
 {
    let now = Instant::now();
    let place = |page| Place { slot: 0, page };
    for raised_first in [true, false] {
        for overtakes in [true, false] {
            let mut book = Book::new([(8, [1, 4])], LIMITS);
            if overtakes {
                book.overtakes(0);
            }
            book.want_rest();
            let bulk = book.start_ahead(|_| 8, |_, most| most).unwrap();
            assert_eq!(bulk.pages, 0..8);
            assert_eq!(book.fault(place(3), now), Told::InLine);
            assert_eq!(book.fault(place(3), now), Told::InLine);
            let raised = book.start_fault(|_, most| most);
            assert!(book.start_fault(|_, most| most).is_none());
            let Some(raised) = raised else {
                assert!(!overtakes);
                continue;
            };
            assert!(overtakes);
            assert_eq!((raised.pages.clone(), raised.why), (3..4, Why::Fault));
            let (first, second) = match raised_first {
                true => (&raised, &bulk),
                false => (&bulk, &raised),
            };
            let run = book.own(first, first.pages.start).unwrap();
            book.arrived(first, run, now);
            // It is nobody's, whichever way it ends.
            let own: Vec<_> = std::iter::successors(book.own(second, second.pages.start), |run| {
                book.own(second, run.end)
            })
            .collect();
            assert!(own.iter().all(|run| !run.contains(&3)), "{own:?}");
            assert_eq!(book.failed(&raised, 3, false, now), []);
            assert_eq!((book.stats.raised, book.stats.lost), (1, 0));
        }
    }
}

#[test]
fn of_two_fetches_of_a_page_one_may_fail() {
    let now = Instant::now();
    let place = Place { slot: 0, page: 3 };
    for raised_fails in [true, false] {
        let mut book = Book::new([(8, [1, 4])], LIMITS);
        book.overtakes(0);
        book.want_rest();
        let bulk = book.start_ahead(|_| 8, |_, most| most).unwrap();
        book.fault(place, now);
        let raised = book.start_fault(|_, most| most).unwrap();
        let (fails, comes) = match raised_fails {
            true => (&raised, &bulk),
            false => (&bulk, &raised),
        };
        assert_eq!(book.failed(fails, fails.pages.start, false, now), []);
        let run = book.own(comes, 3).unwrap();
        assert!(run.contains(&3));
        book.arrived(comes, 3..4, now);
        assert!(book.waits.is_empty());
        assert_eq!(book.get(place).map(Page::state), Some(PageState::Present));
    }
}

#[test]
fn without_a_number_a_page_is_tried_again_for_as_long_as_its_deadline_says() {
    let limits = Limits {
        retries: None,
        ..LIMITS
    };
    let (begun, ms) = (Instant::now(), Duration::from_millis);
    let place = Place { slot: 0, page: 0 };
    let mut book = Book::new([(1, [1, 1])], limits);
    book.want_rest();
    let (mut now, mut tries) = (begun, 0);
    let lost = loop {
        let job = book.start_ahead(|_| 1, |_, most| most).unwrap();
        tries += 1;
        let lost = book.failed(&job, 0, true, now);
        if !lost.is_empty() {
            break lost;
        }
        let due = book.next_due().unwrap();
        assert_eq!(due - now, limits.longest_backoff, "nobody waits");
        now = due;
        book.put_due_in_line(now);
    };
    assert_eq!((lost, now - begun), (vec![place], limits.deadline));
    assert_eq!(tries, 21);

    // Someone begins to wait late: it is their time that counts then.
    let mut book = Book::new([(1, [1, 1])], limits);
    book.want_rest();
    let job = book.start_ahead(|_| 1, |_, most| most).unwrap();
    assert_eq!(book.failed(&job, 0, true, begun), []);
    let touched = begun + ms(90);
    book.fault(place, touched);
    let mut now = touched;
    while book.late(now).is_empty() {
        if let Some(job) = book.start_fault(|_, most| most) {
            assert_eq!(book.failed(&job, 0, true, now), []);
        }
        now = book.next_due().unwrap();
        book.put_due_in_line(now);
    }
    assert_eq!(now - touched, limits.deadline);
}

#[test]
fn while_many_pages_are_to_be_tried_again_no_others_are_begun_for_nobody_and_guesses_have_their_line()
 {
    let limits = Limits {
        retries: None,
        deadline: Duration::MAX,
        ..LIMITS
    };
    let mut now = Instant::now();
    let mut book = Book::new([(1000, [1, 4])], limits);
    book.want_rest();
    let fail_all = |book: &mut Book, now| {
        while let Some(job) = book.start_ahead(|_| 8, |_, most| most) {
            assert_eq!(book.failed(&job, job.pages.start, true, now), []);
        }
        assert!(!book.has_ahead(), "a worker would ask for ever");
        // A piece of 8, and what was there before it.
        let bound = limits.backlog + 8;
        assert!(book.delayed.len() <= bound, "{}", book.delayed.len());
        assert!(book.failures.len() <= bound, "{}", book.failures.len());
        assert!(book.again.is_empty());
    };
    for _ in 0..20 {
        fail_all(&mut book, now);
        now = book.next_due().unwrap();
        book.put_due_in_line(now);
        assert!(book.has_ahead());
    }
    fail_all(&mut book, now);
    for page in 0..limits.backlog as u64 {
        let begin = 900 + 2 * page;
        assert!(book.guess(0, begin..begin + 1), "there is room in its line");
    }
    assert!(!book.guess(0, 950..951));
    // Who touches one has it before all that.
    assert_eq!(book.fault(Place { slot: 0, page: 500 }, now), Told::InLine);
    let job = book.start_fault(|_, most| most).unwrap();
    assert_eq!(job.pages.start, 500);
    book.arrived(&job, job.pages.clone(), now);
    // It is back: everything comes.
    while !book.is_complete() {
        while let Some(job) = book.start_ahead(|_| 8, |_, most| most) {
            book.arrived(&job, job.pages.clone(), now);
        }
        now = book.next_due().unwrap_or(now);
        book.put_due_in_line(now);
    }
    assert!(book.failures.is_empty());
}

#[test]
fn who_waits_waits_so_much_longer_as_nobody_could_be_served() {
    let mut book = Book::new([(8, [0, 1])], LIMITS);
    let place = Place { slot: 0, page: 3 };
    let begun = Instant::now();
    assert_eq!(book.fault(place, begun), Told::InLine);
    let over = Duration::from_secs(12);
    book.excuse(over);
    assert!(book.late(begun + over).is_empty());
    assert!(
        book.late(begun + over + LIMITS.deadline - Duration::from_millis(1))
            .is_empty()
    );
    assert_eq!(book.late(begun + over + LIMITS.deadline), [place]);
}
