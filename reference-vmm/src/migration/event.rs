// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration tells while it goes: to whoever shows progress, keeps the record, or tests.

#![forbid(unsafe_code)]

use std::time::Duration;

use dirty_log::estimate::{Forecast, Throttle};

use super::postcopy::LastWord;
use super::postcopy::serve::Served;

/// A round that is over: the destination has its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundDone {
    /// From 0 on, which sends all.
    pub number: u32,
    /// From the end of the one before it.
    pub took: Duration,
    /// Pages that it had.
    pub pages: u64,
    /// Those of them that were zero, of which only that was sent.
    pub zero: u64,
    /// Pages that the guest has written meanwhile. Of the last there are none.
    pub dirtied: u64,
    /// Its time was over before all of it was sent: all of it is dirty still.
    pub cut: bool,
}

/// A step of the switch-over, done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// None yet: the guest is to stop now.
    Stopping,
    /// The guest stands still.
    Held,
    /// The last pages have been sent.
    PagesSent,
    /// The disks are let go of.
    Released,
    /// The state has been read.
    StateRead,
    /// And sent.
    StateSent,
    /// The destination could start.
    Prepared,
    /// It has the guest.
    Started,
}

/// Something happened.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The destination is connected with; that it takes the machine is waited for so long.
    Connected {
        /// Until it is given up.
        patience: Duration,
    },
    /// The destination takes the machine, whose memory has so many bytes.
    Accepted {
        /// Bytes of guest memory.
        memory: u64,
        /// How long the guest stood still for its state to be read.
        rehearsal: Duration,
    },
    /// A round begins.
    Round {
        /// From 0 on.
        number: u32,
        /// Pages that it has.
        pages: u64,
        /// The guest stands still: it is the last.
        stopped: bool,
    },
    /// Some more of it has been sent.
    Sent {
        /// Pages.
        pages: u64,
        /// Those of them that were zero.
        zero: u64,
        /// Bytes on the wire.
        bytes: u64,
    },
    /// A round is over.
    RoundDone(&'a RoundDone),
    /// How it will go on as far as can be told, with so many pages left.
    Ahead {
        /// Pages that are dirty now.
        left: u64,
        /// What comes of them.
        forecast: &'a Forecast,
    },
    /// The guest is slowed so from now on.
    Throttled(Throttle),
    /// A step of the switch-over has been done.
    Step(Step),
    /// The guest goes before its memory: so many pages are to follow it.
    PostCopy {
        /// Pages.
        missing: u64,
    },
    /// What was asked for behind that, so far, and why nobody can ask, if so.
    Served {
        /// How much.
        served: Served,
        /// Why there is no connection now.
        broken: Option<&'a str>,
    },
    /// The destination asks for no more, and says this.
    Enough(&'a LastWord),
    /// Where the guest is, is not known; why. It is asked again and again.
    InDoubt(&'a str),
    /// What was let go of for the migration cannot be taken back; why. The guest stands still.
    NotTakenBack(&'a str),
}

/// Who is told. Calls come from the migration's threads, and have it wait.
pub trait Observer: Sync {
    /// `event` happened.
    fn event(&self, event: Event<'_>);
}

impl Observer for () {
    fn event(&self, _: Event<'_>) {}
}
