// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The transition tables say what the diagrams say, for every state and event.

use async_pf::{PageEvent, PageState, RequestEvent, RequestState};

const PAGE_EVENTS: [PageEvent; 8] = [
    PageEvent::Prefetch,
    PageEvent::Fault,
    PageEvent::Start,
    PageEvent::Arrived,
    PageEvent::Retry,
    PageEvent::Forget,
    PageEvent::GaveUp,
    PageEvent::Remove,
];

#[test]
fn the_page_table_is_this_one() {
    use PageState::*;
    const NO: Option<PageState> = None;
    let [absent, prefetching, wanted, fetching, present, poisoned] = PageState::ALL.map(Some);
    // Columns: Prefetch, Fault, Start, Arrived, Retry, Forget, GaveUp, Remove.
    #[rustfmt::skip]
    let table = [
        (Absent, [prefetching, wanted, NO, NO, NO, NO, NO, absent]),
        (Prefetching, [prefetching, wanted, fetching, NO, NO, absent, NO, absent]),
        (Wanted, [wanted, wanted, fetching, NO, NO, absent, poisoned, wanted]),
        (Fetching, [fetching, fetching, NO, present, wanted, absent, poisoned, absent]),
        (Present, [present, present, NO, NO, NO, NO, NO, absent]),
        (Poisoned, [poisoned, poisoned, NO, NO, NO, NO, NO, absent]),
    ];
    assert_eq!(table.map(|(state, _)| state), PageState::ALL);
    for (state, row) in table {
        assert_eq!(
            PAGE_EVENTS.map(|event| state.after(event)),
            row,
            "{state:?}"
        );
    }
}

#[test]
fn the_request_table_is_this_one() {
    use RequestState::*;
    let events = [
        RequestEvent::Setup,
        RequestEvent::Arrived,
        RequestEvent::GaveUp,
        RequestEvent::WakeAll,
        RequestEvent::Taken,
        RequestEvent::Clear,
    ];
    let table = [
        (Free, [Some(Waiting), None, None, Some(Ready), None, None]),
        (
            Waiting,
            [None, Some(Ready), Some(Failed), None, None, Some(Free)],
        ),
        (Ready, [None, None, None, None, Some(Free), Some(Free)]),
        (Failed, [None, None, None, None, Some(Free), Some(Free)]),
    ];
    assert_eq!(table.map(|(state, _)| state), RequestState::ALL);
    for (state, row) in table {
        assert_eq!(events.map(|event| state.after(event)), row, "{state:?}");
    }
}

#[test]
fn a_page_can_always_come_to_rest_and_a_settled_one_stays_or_is_asked_for() {
    for state in PageState::ALL {
        // Breadth-first over three events: no state is a trap.
        let reach = |from: &[PageState]| -> Vec<PageState> {
            let mut next: Vec<_> = from.to_vec();
            let kept = PAGE_EVENTS.iter().filter(|e| **e != PageEvent::Remove);
            next.extend(kept.flat_map(|e| from.iter().filter_map(|s| s.after(*e))));
            next
        };
        let end = reach(&reach(&[state]));
        assert!(end.iter().any(|s| s.is_settled()), "{state:?}");
        if matches!(state, PageState::Present | PageState::Poisoned) {
            assert!(
                end.iter().all(|s| *s == state),
                "{state:?} is final until it is given back"
            );
        }
    }
}
