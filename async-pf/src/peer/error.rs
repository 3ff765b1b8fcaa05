// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a peer's pages did not come.

use std::io;
use std::time::Duration;

use memslots::Gfn;

use super::frame::GREETING;

/// Why a peer is of no use, or an ask was not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// No connection can be made.
    #[error("cannot connect to the peer: {0}")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("the connection to the peer broke: {0}")]
    Broken(#[source] io::Error),
    /// The other side closed it within a greeting or a frame, or while an answer was due.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing whole came from it, or it took nothing, for so long.
    #[error("the peer has been silent for {:.1} s", .0.as_secs_f64())]
    Silent(Duration),
    /// It has begun to greet, and has not ended that.
    #[error(
        "the peer has said {got} of the {GREETING} bytes of a greeting within {:.1} s", .after.as_secs_f64()
    )]
    HalfGreeting {
        /// The bytes that came.
        got: usize,
        /// How long it had for the rest.
        after: Duration,
    },
    /// It lives and does not answer.
    #[error("ask {id} (gfn {:#x}) has had no answer for {:.1} s", gfn.0, after.as_secs_f64())]
    NoAnswer {
        /// The ask.
        id: u64,
        /// Its first page.
        gfn: Gfn,
        /// How long.
        after: Duration,
        /// And how long nothing else that was asked for has had one: less where the peer is at work.
        quiet: Duration,
    },
    /// A checksum does not fit: damage.
    #[error("a checksum of {found:#010x} where {said:#010x} was said")]
    Checksum {
        /// What the bytes say.
        said: u32,
        /// What they have.
        found: u32,
    },
    /// Its first bytes are not this protocol's.
    #[error("the peer begins with {magic:02x?}, which is another protocol")]
    NotOurs {
        /// They.
        magic: [u8; 8],
    },
    /// It speaks another version.
    #[error("the peer speaks version {theirs} of the protocol, this side {ours}")]
    Version {
        /// Its.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
    /// It has another memory than was expected, or than it had before.
    #[error("the peer has memory {theirs:#x}, expected was {expected:#x}")]
    Image {
        /// Its.
        theirs: u64,
        /// What was expected.
        expected: u64,
    },
    /// It would be silent for longer than it may.
    #[error(
        "the peer says something each {beat:?} only, and is given up after {silence:?}: that has to be twice as long at least"
    )]
    Beat {
        /// How often it says something at least.
        beat: Duration,
        /// After what silence it would be given up.
        silence: Duration,
    },
    /// It takes no asks.
    #[error("the peer takes {window} asks at once")]
    Window {
        /// What it said.
        window: u16,
    },
    /// No kind of frame, or none that this side is sent.
    #[error("a frame of the kind {kind}, detail {detail}, which is none that this side is sent")]
    Kind {
        /// Its kind.
        kind: u8,
        /// Its detail.
        detail: u8,
    },
    /// A frame's length, or its reserved bytes, are none that it can have.
    #[error("a frame of the kind {kind} with {len} bytes (id {id}), which it cannot have")]
    Length {
        /// Its kind.
        kind: u8,
        /// Its id.
        id: u64,
        /// Its length.
        len: u32,
    },
    /// An answer to nothing that was asked, or to what was answered before.
    #[error("an answer to {id}, which is not asked, or was answered already")]
    Unasked {
        /// Its id.
        id: u64,
    },
    /// An answer that is not of the pages that were asked for.
    #[error("the answer to {id} has {covered} of {pages} pages, in {runs} runs")]
    Runs {
        /// Its id.
        id: u64,
        /// The runs that it says it has.
        runs: u32,
        /// The pages of those that were looked at.
        covered: u64,
        /// The pages asked for.
        pages: u32,
    },
    /// An answer with other bytes than its runs have.
    #[error("the answer to {id} has {got} bytes for runs of {want}")]
    Bytes {
        /// Its id.
        id: u64,
        /// What came, unpacked.
        got: u64,
        /// What its runs have.
        want: u64,
    },
    /// An answer that is compressed, and was not to be, or cannot be unpacked.
    #[error("the answer to {id} cannot be unpacked: {why}")]
    Packed {
        /// Its id.
        id: u64,
        /// What is wrong with it.
        why: String,
    },
    /// An ask of no pages, too many, or beyond the last.
    #[error("ask {id} of {pages} pages from gfn {:#x} on", gfn.0)]
    Ask {
        /// Its id.
        id: u64,
        /// Its first page.
        gfn: Gfn,
        /// Its pages.
        pages: u32,
    },
    /// An ask under a number that is not larger than those before.
    #[error("ask {id} comes behind ask {before}")]
    Order {
        /// Its id.
        id: u64,
        /// The last before it.
        before: u64,
    },
    /// More asks than were agreed to.
    #[error("ask {id} is one more than the {window} that may be unanswered")]
    TooMany {
        /// Its id.
        id: u64,
        /// The bound.
        window: u16,
    },
    /// The peer's own source failed.
    #[error("the peer cannot read gfn {:#x}: {words}", gfn.0)]
    Told {
        /// The page.
        gfn: Gfn,
        /// What it said.
        words: String,
        /// Whether it may pass.
        transient: bool,
    },
    /// A thread cannot be made.
    #[error("cannot make the thread {name}: {source}")]
    Thread {
        /// Its name.
        name: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// This side has ended it.
    #[error("the connection was ended by this side")]
    Ended,
}

impl PeerError {
    /// Whether another connection, or another try, may do better: the link failed, and nobody lied.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(_)
            | Self::Broken(_)
            | Self::Closed
            | Self::Silent(_)
            | Self::HalfGreeting { .. }
            | Self::NoAnswer { .. }
            | Self::Checksum { .. }
            | Self::Thread { .. } => true,
            Self::Told { transient, .. } => *transient,
            _ => false,
        }
    }
}
