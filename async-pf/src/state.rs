// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two state machines of the crate, each as one table.
//!
//! A *page* moves from a source into guest memory; a *request* is one vCPU's wait for one page (the
//! kernel's `struct kvm_async_pf`). Many requests may wait for one page.
//!
//! ```text
//!  page      Absent ──Prefetch──▶ Prefetching ──Start──┐
//!              │ ▲                    │ Fault          ▼
//!              │ └─Forget (anywhere)  ▼             Fetching ──Arrived──▶ Present
//!              └──────Fault───────▶ Wanted ──Start──▶  │ ├─────GaveUp──▶ Poisoned
//!                                     ▲────Retry───────┘
//!            Remove: any ──▶ Absent, but Wanted stays so; GaveUp: Wanted ──▶ Poisoned too
//!
//!  request   Free ──Setup──▶ Waiting ──Arrived──▶ Ready ──Taken──▶ Free
//!              │                └─────GaveUp────▶ Failed ─Taken──▶ Free
//!              └──WakeAll──▶ Ready                     (Clear: any ──▶ Free)
//! ```
//!
//! Whatever moves a page or a request asks its `after`; what the table does not name is refused by
//! the table, not by a check at the call.

/// Where a page is between the guest that wants it and the source that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageState {
    /// Not here, and nobody asks.
    Absent,
    /// In line behind all faults: someone thinks that it will be wanted.
    Prefetching,
    /// In line as a fault: someone waits for it.
    Wanted,
    /// A worker reads it.
    Fetching,
    /// In guest memory. Final, but for being given back.
    Present,
    /// The source cannot deliver it; whoever touches it is told. Final, but for being given back.
    Poisoned,
}

/// What happens to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageEvent {
    /// A guess asks for it.
    Prefetch,
    /// Someone touched it and waits.
    Fault,
    /// A worker takes it.
    Start,
    /// Its contents are in guest memory.
    Arrived,
    /// Reading it failed, someone waits for it, and it may be tried again.
    Retry,
    /// Nobody wants it any more: a guess that failed, or a wait that was given up.
    Forget,
    /// Reading it failed for good, or took too long.
    GaveUp,
    /// Its owner gave it back: it is not here, and whoever touches it next finds zeros.
    Remove,
}

impl PageState {
    /// Every state, for tests that walk the table.
    pub const ALL: [Self; 6] = [
        Self::Absent,
        Self::Prefetching,
        Self::Wanted,
        Self::Fetching,
        Self::Present,
        Self::Poisoned,
    ];

    /// The transition table: the state after `event`; `None` where it cannot happen in this state.
    pub const fn after(self, event: PageEvent) -> Option<Self> {
        use PageEvent as E;
        use PageState as S;
        match (self, event) {
            (S::Absent, E::Prefetch) => Some(S::Prefetching),
            (S::Absent | S::Prefetching, E::Fault) => Some(S::Wanted),
            (S::Prefetching | S::Wanted, E::Start) => Some(S::Fetching),
            (S::Fetching, E::Arrived) => Some(S::Present),
            (S::Fetching, E::Retry) => Some(S::Wanted),
            (S::Wanted | S::Fetching, E::GaveUp) => Some(S::Poisoned),
            // Who waits goes on waiting, for zeros.
            (S::Wanted, E::Remove) => Some(S::Wanted),
            (_, E::Remove) => Some(S::Absent),
            (S::Prefetching | S::Wanted | S::Fetching, E::Forget) => Some(S::Absent),
            // A request for what is under way, or decided, changes nothing.
            (S::Wanted | S::Fetching | S::Present | S::Poisoned, E::Fault) => Some(self),
            (S::Prefetching | S::Wanted | S::Fetching | S::Present | S::Poisoned, E::Prefetch) => {
                Some(self)
            }
            _ => None,
        }
    }

    /// Whether the page is in none of the lists: nothing about it is under way.
    pub const fn is_settled(self) -> bool {
        matches!(self, Self::Absent | Self::Present | Self::Poisoned)
    }
}

/// Where one vCPU's wait for one page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RequestState {
    /// No request.
    Free,
    /// On the queue list only: the page is under way.
    Waiting,
    /// On the done list too: the page is here, the vCPU has not been told.
    Ready,
    /// On the done list too: the page will not come, the vCPU has not been told.
    Failed,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RequestEvent {
    /// A vCPU begins to wait.
    Setup,
    /// The page is here.
    Arrived,
    /// The page will not come.
    GaveUp,
    /// A wake-up for every waiter in the guest is made, ready from the start.
    WakeAll,
    /// The vCPU has been told.
    Taken,
    /// The vCPU stops caring (reset, or its notifications were switched off).
    Clear,
}

impl RequestState {
    /// Every state, for tests that walk the table.
    pub const ALL: [Self; 4] = [Self::Free, Self::Waiting, Self::Ready, Self::Failed];

    /// The transition table: the state after `event`; `None` where it cannot happen in this state.
    pub const fn after(self, event: RequestEvent) -> Option<Self> {
        use RequestEvent as E;
        use RequestState as S;
        match (self, event) {
            (S::Free, E::Setup) => Some(S::Waiting),
            (S::Free, E::WakeAll) | (S::Waiting, E::Arrived) => Some(S::Ready),
            (S::Waiting, E::GaveUp) => Some(S::Failed),
            (S::Ready | S::Failed, E::Taken) => Some(S::Free),
            (S::Waiting | S::Ready | S::Failed, E::Clear) => Some(S::Free),
            _ => None,
        }
    }
}
