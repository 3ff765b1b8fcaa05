// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The transition tables say what the diagrams say, for every state and event.

use async_pf::{PageEvent, PageState, RequestEvent, RequestState};

const PAGE_EVENTS: [PageEvent; 7] = [
    PageEvent::Prefetch,
    PageEvent::Fault,
    PageEvent::Start,
    PageEvent::Arrived,
    PageEvent::Retry,
    PageEvent::Forget,
    PageEvent::GaveUp,
];

#[test]
fn the_page_table_is_this_one() {
    use PageState::*;
    // Columns: Prefetch, Fault, Start, Arrived, Retry, Forget, GaveUp.
    let table = [
        (
            Absent,
            [
                Some(Prefetching),
                Some(Wanted),
                None,
                None,
                None,
                None,
                None,
            ],
        ),
        (
            Prefetching,
            [
                Some(Prefetching),
                Some(Wanted),
                Some(Fetching),
                None,
                None,
                Some(Absent),
                None,
            ],
        ),
        (
            Wanted,
            [
                Some(Wanted),
                Some(Wanted),
                Some(Fetching),
                None,
                None,
                Some(Absent),
                None,
            ],
        ),
        (
            Fetching,
            [
                Some(Fetching),
                Some(Fetching),
                None,
                Some(Present),
                Some(Wanted),
                Some(Absent),
                Some(Poisoned),
            ],
        ),
        (
            Present,
            [Some(Present), Some(Present), None, None, None, None, None],
        ),
        (
            Poisoned,
            [Some(Poisoned), Some(Poisoned), None, None, None, None, None],
        ),
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
            next.extend(
                from.iter()
                    .flat_map(|s| PAGE_EVENTS.map(|e| s.after(e)))
                    .flatten(),
            );
            next
        };
        let end = reach(&reach(&[state]));
        assert!(end.iter().any(|s| s.is_settled()), "{state:?}");
        if matches!(state, PageState::Present | PageState::Poisoned) {
            assert!(end.iter().all(|s| *s == state), "{state:?} is final");
        }
    }
}
