// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection's life as one table: [`next`].
//!
//! ```text
//!   host connects ─► Requested ─ accepted ─┐         ┌─ guest connects
//!                                          ▼         ▼
//!                                     ┌─────── Open ───────┐
//!        guest sends no more, or      │                    │  host sends no more, or
//!        host takes no more           ▼                    ▼  guest takes no more
//!                                  Inbound              Outbound
//!                                     │                    │
//!        the guest has shut both: ────┴──┬──────────┬──────┴──── else: it is told, and
//!        the rest goes to the host       ▼          ▼            its answer awaited
//!                                   Finishing    Parting
//!                                        └─── Over ──┘  ◄── RST from anywhere
//! ```
//!
//! Inbound is what the guest still receives, Outbound what it still sends. Both ways of a stream end by themselves, as
//! those of a Unix socket do; a connection is over by the `RST` of the side that was told that the other has ended
//! both (virtio 1.2, 5.10.6.6).

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The guest was asked, and has not answered.
    Requested,
    /// Both send.
    Open,
    /// The guest sends no more, or nobody takes it any more. What it sent before may be on its way to the host still.
    Inbound,
    /// The host sends no more, or the guest takes no more.
    Outbound,
    /// Neither sends, and the guest waits for an `RST` when all that it sent is with the host.
    Finishing,
    /// Neither sends, and the guest's `RST` is awaited.
    Parting,
    /// There is no connection.
    Over,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The guest accepts: `RESPONSE`.
    Accepted,
    /// The guest sends data: `RW`.
    Data,
    /// The guest sends no more: the first `SHUTDOWN` that says so.
    ShutSend,
    /// The guest takes no more.
    ShutReceive,
    /// The guest does neither any more, by one `SHUTDOWN` or two.
    ShutBoth,
    /// The guest refuses or ends: `RST`.
    Rst,
    /// What makes no sense here: a second `REQUEST`, data beyond its credit or its buffers.
    Nonsense,
    /// The host sends no more: its end of file, behind all its data.
    Eof,
    /// The host takes no more.
    Deaf,
    /// The host's end has failed, or hung up before the guest answered.
    Broken,
    /// All that the guest has sent is with the host.
    Drained,
}

/// What is to be done, together with a change of state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Actions(u8);

impl Actions {
    /// Nothing.
    pub const NONE: Actions = Actions(0);
    /// The host's end hears `OK`.
    pub const ANSWER: Actions = Actions(1 << 0);
    /// The packet's data goes to the host, behind what is kept.
    pub const DELIVER: Actions = Actions(1 << 1);
    /// When all that is kept is with the host, it is told the end of file.
    pub const FINISH: Actions = Actions(1 << 2);
    /// What is kept for the host is thrown away, for nobody takes it.
    pub const DISCARD: Actions = Actions(1 << 3);
    /// The host can send no more.
    pub const STOP_READING: Actions = Actions(1 << 4);
    /// The guest is told by a `SHUTDOWN` that the host sends no more.
    pub const TELL_SEND: Actions = Actions(1 << 5);
    /// The guest is told by a `SHUTDOWN` that the host takes no more.
    pub const TELL_RECEIVE: Actions = Actions(1 << 6);
    /// The guest is sent an `RST`.
    pub const RESET: Actions = Actions(1 << 7);

    /// These and those.
    pub const fn and(self, other: Actions) -> Actions {
        Actions(self.0 | other.0)
    }

    /// Whether all of `other` is among these.
    pub const fn has(self, other: Actions) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The table: where a connection is after an event, and what is to be done. Data that comes when the guest can send no
/// more is thrown away: the guest may have sent it before it was told.
pub const fn next(state: State, event: Event) -> (State, Actions) {
    use Event::*;
    use State::*;
    const NONE: Actions = Actions::NONE;
    const FAIL: Actions = Actions::RESET.and(Actions::DISCARD);
    const TELL_BOTH: Actions = Actions::TELL_SEND.and(Actions::TELL_RECEIVE);
    match (state, event) {
        (Over, _) => (Over, NONE),
        // A reset is not answered. What the guest has finished sending goes to the host all the same.
        (_, Rst) => (Over, NONE),
        (_, Nonsense) => (Over, Actions::RESET),
        (_, Broken) => (Over, FAIL),

        (Requested, Accepted) => (Open, Actions::ANSWER),
        (Requested, Data | ShutSend | ShutReceive | ShutBoth) => (Over, Actions::RESET),
        (Requested, Eof | Deaf | Drained) => (Requested, NONE),
        (_, Accepted) => (Over, Actions::RESET),

        (Open, Data) => (Open, Actions::DELIVER),
        (Open, ShutSend) => (Inbound, Actions::FINISH),
        (Open, ShutReceive) => (Outbound, Actions::STOP_READING),
        (Open, ShutBoth) => (Finishing, Actions::STOP_READING.and(Actions::FINISH)),
        (Open, Eof) => (Outbound, Actions::TELL_SEND),
        (Open, Deaf) => (Inbound, Actions::DISCARD.and(Actions::TELL_RECEIVE)),
        (Open, Drained) => (Open, NONE),

        (Inbound, Data | ShutSend | Drained) => (Inbound, NONE),
        (Inbound, ShutReceive | ShutBoth) => (Finishing, Actions::STOP_READING),
        (Inbound, Eof) => (Parting, TELL_BOTH),
        (Inbound, Deaf) => (Inbound, Actions::DISCARD),

        (Outbound, Data) => (Outbound, Actions::DELIVER),
        (Outbound, ShutSend) => (Parting, Actions::FINISH.and(TELL_BOTH)),
        (Outbound, ShutBoth) => (Finishing, Actions::FINISH),
        (Outbound, ShutReceive | Eof | Drained) => (Outbound, NONE),
        (Outbound, Deaf) => (Parting, Actions::DISCARD.and(TELL_BOTH)),

        (Finishing, Drained) => (Over, Actions::RESET),
        (Finishing, Deaf) => (Over, FAIL),
        (Finishing, Data | ShutSend | ShutReceive | ShutBoth | Eof) => (Finishing, NONE),

        (Parting, ShutBoth) => (Finishing, NONE),
        (Parting, Deaf) => (Parting, Actions::DISCARD),
        (Parting, Data | ShutSend | ShutReceive | Eof | Drained) => (Parting, NONE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STATES: [State; 7] = [
        State::Requested,
        State::Open,
        State::Inbound,
        State::Outbound,
        State::Finishing,
        State::Parting,
        State::Over,
    ];
    const EVENTS: [Event; 11] = [
        Event::Accepted,
        Event::Data,
        Event::ShutSend,
        Event::ShutReceive,
        Event::ShutBoth,
        Event::Rst,
        Event::Nonsense,
        Event::Eof,
        Event::Deaf,
        Event::Broken,
        Event::Drained,
    ];

    fn event() -> impl Strategy<Value = Event> {
        proptest::sample::select(&EVENTS[..])
    }

    #[test]
    fn an_rst_ends_everything_and_is_never_answered() {
        for state in STATES {
            assert_eq!(next(state, Event::Rst), (State::Over, Actions::NONE));
        }
    }

    #[test]
    fn what_is_over_stays_over_and_does_nothing() {
        for event in EVENTS {
            assert_eq!(next(State::Over, event), (State::Over, Actions::NONE));
        }
    }

    #[test]
    fn a_guest_that_shuts_both_is_answered_by_an_rst_when_its_data_is_delivered() {
        for state in STATES {
            if matches!(state, State::Requested | State::Over) {
                continue;
            }
            let (shut, actions) = next(state, Event::ShutBoth);
            assert!(!actions.has(Actions::RESET) && !actions.has(Actions::DISCARD));
            assert_eq!(
                next(shut, Event::Drained),
                (State::Over, Actions::RESET),
                "{state:?}"
            );
        }
    }

    /// The state, once more, as the ways that are open: the guest's to send, and the host's.
    fn ways(state: State) -> (bool, bool) {
        match state {
            State::Open => (true, true),
            State::Inbound => (false, true),
            State::Outbound => (true, false),
            _ => (false, false),
        }
    }

    proptest! {
        #[test]
        fn whatever_happens_in_whatever_order_each_promise_holds(
            from_host: bool,
            events in proptest::collection::vec(event(), 0..40),
        ) {
            let mut state = if from_host { State::Requested } else { State::Open };
            let (mut resets, mut finished, mut discarded, mut answered) = (0, 0, false, 0);
            for event in events {
                let (to, actions) = next(state, event);
                let has = |action| actions.has(action);
                // Data is delivered where the guest can send, and only then.
                let delivers = event == Event::Data && ways(state).0;
                prop_assert_eq!(has(Actions::DELIVER), delivers);
                prop_assert!(!delivers || finished == 0 && !discarded);
                // An end is the host's to know once.
                finished += u32::from(has(Actions::FINISH));
                prop_assert!(finished <= 1);
                discarded |= has(Actions::DISCARD);
                // OK is said once, when the guest accepts.
                answered += u32::from(has(Actions::ANSWER));
                prop_assert!(answered <= u32::from(from_host));
                prop_assert_eq!(has(Actions::ANSWER), (state, to) == (State::Requested, State::Open));
                // A reset goes with the end.
                resets += u32::from(has(Actions::RESET));
                prop_assert!(!has(Actions::RESET) || to == State::Over);
                // A way that has ended does not open again.
                if state != State::Requested {
                    prop_assert!(!ways(to).0 || ways(state).0);
                    prop_assert!(!ways(to).1 || ways(state).1);
                }
                // What the guest did not end itself it is told.
                let told = has(Actions::TELL_SEND) || has(Actions::TELL_RECEIVE) || has(Actions::RESET);
                if matches!(event, Event::Eof | Event::Deaf | Event::Broken) && to != state {
                    prop_assert!(told);
                }
                // It is never thrown away what the guest sent, unless nobody can take it.
                if has(Actions::DISCARD) {
                    prop_assert!(matches!(event, Event::Deaf | Event::Broken));
                }
                state = to;
            }
            prop_assert!(resets <= 1);
        }
    }
}
