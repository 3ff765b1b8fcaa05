// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The scheduler against a naive model, over random sequences of calls: one fetch a page, faults
//! before guesses, each waiter woken exactly once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use async_pf::{Error, FaultAnswer, Job, Lane, Outcome, PageState, Schedule};
use memslots::Gfn;
use proptest::prelude::*;

const FIRST: u64 = 0x100;
const PAGES: u64 = 12;
const BACKLOG: usize = 4;

#[derive(Clone, Debug)]
enum Call {
    Fault(u64),
    Prefetch(u64),
    Start,
    Finish(usize, Outcome),
    Cancel(u32),
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let page = FIRST..FIRST + PAGES;
    let outcome = prop_oneof![
        3 => Just(Outcome::Arrived), 3 => Just(Outcome::Retry), 1 => Just(Outcome::GaveUp)];
    let call = prop_oneof![
        4 => page.clone().prop_map(Call::Fault),
        4 => page.prop_map(Call::Prefetch),
        4 => Just(Call::Start),
        4 => (any::<usize>(), outcome).prop_map(|(nth, outcome)| Call::Finish(nth, outcome)),
        1 => (2u32..5).prop_map(Call::Cancel),
    ];
    proptest::collection::vec(call, 0..250)
}

#[derive(Default)]
struct Model {
    /// In order of line; the pages in them are disjoint.
    faults: Vec<u64>,
    guesses: Vec<u64>,
    fetching: Vec<u64>,
    present: BTreeSet<u64>,
    poisoned: BTreeSet<u64>,
    waiters: BTreeMap<u64, Vec<u32>>,
}

impl Model {
    fn state(&self, page: u64) -> PageState {
        let among = |list: &[u64]| list.contains(&page);
        match () {
            () if among(&self.faults) => PageState::Wanted,
            () if among(&self.guesses) => PageState::Prefetching,
            () if among(&self.fetching) => PageState::Fetching,
            () if self.present.contains(&page) => PageState::Present,
            () if self.poisoned.contains(&page) => PageState::Poisoned,
            () => PageState::Absent,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_lanes_and_waiters_agree_with_a_model(calls in calls()) {
        let mut pages = Schedule::<u32>::new(Gfn(FIRST), PAGES, BACKLOG).unwrap();
        let mut model = Model::default();
        let mut next_waiter = 0;
        for call in calls {
            match call {
                Call::Fault(page) => {
                    next_waiter += 1;
                    let expected = match model.state(page) {
                        PageState::Present => FaultAnswer::Present,
                        PageState::Poisoned => FaultAnswer::Poisoned,
                        state => {
                            model.waiters.entry(page).or_default().push(next_waiter);
                            let fetch =
                                matches!(state, PageState::Absent | PageState::Prefetching);
                            if fetch {
                                model.guesses.retain(|guess| *guess != page);
                                model.faults.push(page);
                            }
                            FaultAnswer::Waiting { fetch }
                        }
                    };
                    prop_assert_eq!(pages.fault(Gfn(page), next_waiter), Ok(expected));
                }
                Call::Prefetch(page) => {
                    let expected = if model.state(page) != PageState::Absent {
                        Ok(false)
                    } else if model.guesses.len() == BACKLOG {
                        Err(Error::Backlog { bound: BACKLOG })
                    } else {
                        model.guesses.push(page);
                        Ok(true)
                    };
                    prop_assert_eq!(pages.prefetch(Gfn(page)), expected);
                }
                Call::Start => {
                    let expected = if !model.faults.is_empty() {
                        Some((model.faults.remove(0), Lane::Fault))
                    } else if !model.guesses.is_empty() {
                        Some((model.guesses.remove(0), Lane::Prefetch))
                    } else {
                        None
                    };
                    let job = pages.start();
                    prop_assert_eq!(job.map(|job| (job.gfn.0, job.lane)), expected);
                    model.fetching.extend(expected.map(|(page, _)| page));
                }
                Call::Finish(nth, outcome) if model.fetching.is_empty() => {
                    // No one fetches: whatever the page, it is refused.
                    let page = FIRST + nth as u64 % PAGES;
                    prop_assert!(pages.finish(Gfn(page), outcome).is_err());
                }
                Call::Finish(nth, outcome) => {
                    let page = model.fetching.remove(nth % model.fetching.len());
                    let woken = pages.finish(Gfn(page), outcome).unwrap();
                    let waiting = model.waiters.get(&page).is_some_and(|w| !w.is_empty());
                    match outcome {
                        Outcome::Arrived => { model.present.insert(page); }
                        Outcome::GaveUp => { model.poisoned.insert(page); }
                        Outcome::Retry if waiting => model.faults.push(page),
                        _ => {}
                    }
                    let expected = match outcome {
                        Outcome::Retry => Vec::new(),
                        _ => model.waiters.remove(&page).unwrap_or_default(),
                    };
                    prop_assert_eq!(woken, expected);
                }
                Call::Cancel(modulus) => {
                    pages.cancel(|waiter| waiter % modulus == 0);
                    for waiters in model.waiters.values_mut() {
                        waiters.retain(|waiter| waiter % modulus != 0);
                    }
                    let waiters = &model.waiters;
                    model.faults.retain(|page| waiters.get(page).is_some_and(|w| !w.is_empty()));
                }
            }
            for page in FIRST..FIRST + PAGES {
                prop_assert_eq!(pages.state(Gfn(page)), Ok(model.state(page)));
            }
            let under_way = model.faults.len() + model.guesses.len() + model.fetching.len();
            prop_assert_eq!(pages.under_way(), under_way);
            prop_assert_eq!(pages.present(), model.present.len() as u64);
            prop_assert_eq!(pages.poisoned(), model.poisoned.len() as u64);
            prop_assert_eq!(
                pages.is_complete(),
                model.present.len() + model.poisoned.len() == PAGES as usize);
        }
    }
}

#[test]
fn a_page_that_keeps_failing_says_how_often() {
    let mut pages = Schedule::new(Gfn(0), 4, 4).unwrap();
    assert_eq!(
        pages.fault(Gfn(1), ()),
        Ok(FaultAnswer::Waiting { fetch: true })
    );
    for failures in 0..3 {
        assert_eq!(
            pages.start(),
            Some(Job {
                gfn: Gfn(1),
                lane: Lane::Fault,
                failures
            })
        );
        assert_eq!(pages.finish(Gfn(1), Outcome::Retry), Ok(vec![]));
    }
    pages.start().unwrap();
    assert_eq!(pages.finish(Gfn(1), Outcome::GaveUp), Ok(vec![()]));
    assert_eq!(pages.fault(Gfn(1), ()), Ok(FaultAnswer::Poisoned));
}

#[test]
fn a_page_elsewhere_is_an_error_and_changes_nothing() {
    let mut pages = Schedule::<()>::new(Gfn(10), 5, 4).unwrap();
    for gfn in [Gfn(9), Gfn(15), Gfn(0), Gfn(u64::MAX)] {
        let refused = Error::OutOfRange {
            gfn,
            first: 10,
            end: 15,
        };
        assert_eq!(pages.fault(gfn, ()), Err(refused.clone()));
        assert_eq!(pages.prefetch(gfn), Err(refused.clone()));
        assert_eq!(pages.finish(gfn, Outcome::Arrived), Err(refused.clone()));
        assert_eq!(pages.state(gfn), Err(refused));
    }
    assert_eq!((pages.under_way(), pages.start()), (0, None));
}

#[test]
fn guesses_that_were_overtaken_do_not_pile_up() {
    // A guest that faults on each guess: the prefetch lane must not keep their corpses.
    let mut pages = Schedule::new(Gfn(0), 100_000, 8).unwrap();
    for gfn in (0..100_000).map(Gfn) {
        assert_eq!(pages.prefetch(gfn), Ok(true));
        assert_eq!(
            pages.fault(gfn, ()),
            Ok(FaultAnswer::Waiting { fetch: true })
        );
    }
    let shown = format!("{pages:?}");
    let guesses = shown.split_once("guesses: [").unwrap().1;
    let kept = guesses.split(']').next().unwrap().matches('(').count();
    assert!(kept <= 2 * 8 + 1, "{kept} kept");
}

#[test]
fn more_pages_than_a_slot_can_have_are_refused_with_their_number() {
    let max = memslots::MAX_PAGES;
    for pages in [max + 1, u64::MAX] {
        let refused = Schedule::<()>::new(Gfn(0), pages, 1).unwrap_err();
        assert_eq!(refused, Error::TooManyPages { pages, max });
    }
    assert!(Schedule::<()>::new(Gfn(0), max, 1).is_ok());
}

#[test]
fn pages_beyond_the_last_frame_number_are_cut_off_and_cost_nothing() {
    let mut pages: Schedule<()> = Schedule::new(Gfn(u64::MAX - 3), u64::MAX, 1).unwrap();
    assert!(pages.fault(Gfn(u64::MAX), ()).is_err());
    for gfn in u64::MAX - 3..u64::MAX {
        assert!(!pages.is_complete());
        assert!(pages.fault(Gfn(gfn), ()).is_ok());
        let job = pages.start().unwrap();
        assert_eq!(pages.finish(job.gfn, Outcome::Arrived), Ok(vec![()]));
    }
    assert!(pages.is_complete());
}
