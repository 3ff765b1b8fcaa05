// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What two monitors say to each other: bytes into values and values into bytes. All numbers are little-endian.
//!
//! Each connection begins with a greeting from the source, of a fixed length:
//!
//! ```text
//!    0   8  magic: 89 52 56 4d 57 0d 0a 1a  ("\x89RVMW\r\n\x1a")
//!    8   4  version: 2
//!   12   4  role: 1 control, 2 data, 3 settle, 4 pages (post-copy)
//!   16  16  of control and data the migration's number, random, which is its secret; of the others a number of the
//!           connection's own, by which both sides prove that they know that one (Known, Proof)
//!   32   4  of a data connection its number, from 0 on; of one for pages 0 for what is waited for, from 1 on for all else;
//!           else 0
//!   36   4  checksum of bytes 0 to 35
//! ```
//!
//! Behind it come messages, and on a data connection the [`codec`](super::codec)'s frames:
//!
//! ```text
//!    0   2  kind
//!    2   2  0
//!    4   4  bytes of the payload, n: for each kind no more than that kind may have
//!    8   n  the payload
//!  8+n   4  checksum of bytes 0 to 7+n: CRC-32, as of a snapshot's file
//! ```
//!
//! The checksum is against damage; who is at the other end is the transport's to find out.
//!
//! # What a reader promises
//! Whatever the bytes are, [`Greeting::parse`], [`Head::parse`] and [`Message::parse`] do not panic, and the most that is
//! allocated for a message is what its kind may have, of which no more than has arrived.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;

use super::postcopy::missing::MOST_RUNS;
use super::postcopy::{Faults, LastWord};
use super::proof::image;
use crate::snapshot::format::{checksum, u32_at, u64_at};

/// What a connection begins with.
pub const MAGIC: [u8; 8] = *b"\x89RVMW\r\n\x1a";
/// The version that is spoken, and the only one that is understood.
pub const VERSION: u32 = 2;
/// Bytes of a greeting.
pub const GREETING: usize = 40;
/// Bytes of a message before its payload.
pub const HEAD: usize = 8;
/// Bytes of a message behind its payload.
pub const TAIL: usize = 4;
/// A machine's state is no longer. On a host of the project's (software KVM) 64 vCPUs are 1.4 MiB of it, and 255, which are the
/// most, 5.6; a processor with more state (AMX has 8 KiB in XSAVE) has more, and devices keep kilobytes. Whoever may connect
/// to a destination that waits can have it keep so much.
pub const MOST_STATE: u32 = 32 << 20;
/// A reason is no longer; what is longer is cut when it is sent.
pub const MOST_TEXT: u32 = 4096;
/// A destination's words for the line to it are no longer.
pub const MOST_LINE: u32 = 256;
/// Bytes of a number by chance in a message, and of what is proven by it.
const CHANCE: usize = 16;
/// Bytes of a proof that the migration's number is known.
pub const PROOF: usize = 32;
/// Bytes of a run in a message.
const RUN: usize = 16;
/// Bytes of a last word before its text.
const LAST_WORD: usize = 48;
/// Of an offer: pages may be compressed.
const COMPRESSED: u32 = 1;
/// Of an offer: the guest may come before all of its memory has. A build that knows nothing of it refuses the number.
const POSTCOPY: u32 = 2;
/// Data connections there may be.
pub const MOST_CONNECTIONS: u32 = 64;

/// A migration's own number, made by chance, and its secret: who knows it is one of the two. In words it is a name that is made
/// of it, by which one is told from another, and that tells nothing of the number.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", image(*self) >> 32)
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The conversation.
    Control,
    /// Guest memory, of which this connection has its part.
    Data(u32),
    /// The question of how it ended.
    Settle,
    /// Pages that are asked for behind the hand-over: 0 those that somebody waits for, from 1 to [`MOST_CONNECTIONS`] the
    /// others.
    Pages(u32),
}

impl Role {
    /// What stands for it in a greeting.
    pub(super) fn numbers(self) -> (u32, u32) {
        match self {
            Role::Control => (1, 0),
            Role::Data(number) => (2, number),
            Role::Settle => (3, 0),
            Role::Pages(number) => (4, number),
        }
    }
}

/// What a connection begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Which migration it belongs to; of [`Role::Settle`] and [`Role::Pages`] a number of the connection's own.
    pub id: MigrationId,
    /// What it is for.
    pub role: Role,
}

/// Why bytes are not what they should be. The connection is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// It begins with something else.
    #[error("the other side is no monitor that migrates: it begins with {0:02x?}")]
    Magic([u8; 8]),
    /// A version that this build does not speak.
    #[error("the other side speaks version {0} of the protocol, and this build version {VERSION}")]
    Version(u32),
    /// A checksum is another one.
    #[error(
        "{what} was damaged on its way: the checksum is {found:#010x}, and {sent:#010x} was sent"
    )]
    Checksum {
        /// Of what.
        what: &'static str,
        /// That of the bytes.
        found: u32,
        /// That in the bytes.
        sent: u32,
    },
    /// A role that there is not.
    #[error("a connection has the role {0}, and number {1}, which there is not")]
    Role(u32, u32),
    /// An answer of HTTP's.
    #[error(
        "the other side answers by HTTP: it is a control socket (--api-sock), and no address of --incoming"
    )]
    Http,
    /// A kind of message that there is not.
    #[error("a message has the kind {0}, which there is not")]
    Kind(u16),
    /// Its payload has a length that its kind cannot have.
    #[error("a message of the kind {kind:?} has {len} bytes")]
    Length {
        /// Its kind.
        kind: Kind,
        /// Bytes of the payload.
        len: u32,
    },
    /// What is in it cannot be.
    #[error("a message of the kind {kind:?} says {what}")]
    Payload {
        /// Its kind.
        kind: Kind,
        /// What it says.
        what: String,
    },
}

impl Greeting {
    /// Its bytes.
    pub fn encode(&self) -> [u8; GREETING] {
        let (role, number) = self.role.numbers();
        let mut bytes = [0; GREETING];
        let parts: [&[u8]; 5] = [
            &MAGIC,
            &VERSION.to_le_bytes(),
            &role.to_le_bytes(),
            &self.id.0,
            &number.to_le_bytes(),
        ];
        let from = parts.into_iter().flatten();
        bytes
            .iter_mut()
            .zip(from)
            .for_each(|(to, from)| *to = *from);
        let (covered, sum) = bytes.split_at_mut(GREETING - 4);
        sum.copy_from_slice(&checksum(covered).to_le_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8; GREETING]) -> Result<Self, MessageError> {
        let magic = first(bytes);
        if magic != MAGIC {
            return Err(MessageError::Magic(magic));
        }
        // Before the checksum: another version may have it elsewhere.
        match u32_at(bytes, 8) {
            VERSION => {}
            version => return Err(MessageError::Version(version)),
        }
        let covered = bytes.split_at(GREETING - 4).0;
        verify("a greeting", covered, u32_at(bytes, GREETING - 4))?;
        let role = match (u32_at(bytes, 12), u32_at(bytes, 32)) {
            (1, 0) => Role::Control,
            (2, number) if number < MOST_CONNECTIONS => Role::Data(number),
            (3, 0) => Role::Settle,
            (4, number) if number <= MOST_CONNECTIONS => Role::Pages(number),
            (role, number) => return Err(MessageError::Role(role, number)),
        };
        let id = MigrationId(first(bytes.get(16..).unwrap_or_default()));
        Ok(Greeting { id, role })
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// The source's first.
    Offer = 1,
    /// The destination's answer.
    Ready = 2,
    /// All pages of a round have been taken.
    Taken = 3,
    /// The state.
    State = 4,
    /// The destination could start.
    Prepared = 5,
    /// The source has no guest any more.
    Go = 6,
    /// The destination has the guest.
    Started = 7,
    /// The source has heard it.
    Done = 8,
    /// One side gives up.
    GivenUp = 9,
    /// How it ended.
    Settled = 10,
    /// All pages of a round have been sent.
    Round = 11,
    /// Pages that the destination does not have.
    Missing = 12,
    /// Pages will be asked for on this connection.
    Wanted = 13,
    /// No more pages will be.
    Enough = 14,
    /// The destination knows the migration.
    Known = 15,
    /// And so does the source.
    Proof = 16,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 16] = [
        Kind::Offer,
        Kind::Ready,
        Kind::Taken,
        Kind::State,
        Kind::Prepared,
        Kind::Go,
        Kind::Started,
        Kind::Done,
        Kind::GivenUp,
        Kind::Settled,
        Kind::Round,
        Kind::Missing,
        Kind::Wanted,
        Kind::Enough,
        Kind::Known,
        Kind::Proof,
    ];

    /// Whether it is this side's to say.
    pub fn is_said_by(self, side: Side) -> bool {
        match self {
            Kind::GivenUp => true,
            Kind::Offer
            | Kind::State
            | Kind::Round
            | Kind::Missing
            | Kind::Go
            | Kind::Done
            | Kind::Proof => side == Side::Source,
            Kind::Ready
            | Kind::Taken
            | Kind::Prepared
            | Kind::Started
            | Kind::Settled
            | Kind::Wanted
            | Kind::Known
            | Kind::Enough => side == Side::Destination,
        }
    }

    /// The bytes that a payload may have, at least and at most.
    fn lengths(self) -> (u32, u32) {
        match self {
            Kind::Offer => (8, 8 + MOST_STATE),
            Kind::State => (4, 4 + MOST_STATE),
            Kind::Taken | Kind::Round => (4, 4),
            Kind::GivenUp => (0, MOST_TEXT),
            Kind::Settled => (1, 1),
            Kind::Ready => (0, MOST_LINE),
            Kind::Known => ((CHANCE + PROOF) as u32, (CHANCE + PROOF) as u32),
            Kind::Proof => (PROOF as u32, PROOF as u32),
            Kind::Missing => (RUN as u32, (RUN * MOST_RUNS) as u32),
            Kind::Enough => (LAST_WORD as u32, LAST_WORD as u32 + MOST_TEXT),
            Kind::Prepared | Kind::Go | Kind::Started | Kind::Done | Kind::Wanted => (0, 0),
        }
    }
}

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Destination,
}

impl Side {
    /// What it says.
    pub(super) fn words(self) -> &'static str {
        match self {
            Side::Source => "a word of the source's",
            Side::Destination => "a word of the destination's",
        }
    }
}

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// Bytes of the payload.
    pub len: u32,
}

impl Head {
    /// Reads one. What it says of the length is possible.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(bytes: &[u8; HEAD]) -> Result<Self, MessageError> {
        if bytes.starts_with(b"HTTP/") {
            return Err(MessageError::Http);
        }
        let number = u16::from_le_bytes(first(bytes));
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u16 == number);
        // What has no meaning yet is another kind.
        let kind = kind.filter(|_| bytes.get(2..4) == Some(&[0, 0]));
        let kind = kind.ok_or(MessageError::Kind(number))?;
        let len = u32_at(bytes, 4);
        let (least, most) = kind.lengths();
        match (least..=most).contains(&len) {
            true => Ok(Head { kind, len }),
            false => Err(MessageError::Length { kind, len }),
        }
    }

    fn encode(self) -> [u8; HEAD] {
        let (kind, len) = ((self.kind as u16).to_le_bytes(), self.len.to_le_bytes());
        [kind[0], kind[1], 0, 0, len[0], len[1], len[2], len[3]]
    }
}

/// How a migration ended, as the destination knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// The guest is here.
    Started,
    /// It is not, and never will be: a pledge. Nothing of the guest's is held here any more.
    Never,
    /// Of this migration nothing is known here: who took part in it is gone.
    Unknown,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: how pages will come, and the machine as it is now, in the form of a snapshot's file `state`. Registers are
    /// for a rehearsal.
    Offer {
        /// How many data connections there will be, 1 to [`MOST_CONNECTIONS`].
        connections: u32,
        /// Pages may be compressed.
        compressed: bool,
        /// The guest may come before all of its memory has.
        postcopy: bool,
        /// [`MachineState::encode`](crate::snapshot::machine::MachineState::encode).
        state: Vec<u8>,
    },
    /// Destination: such a machine can be here. Pages may come. With what it sees of the line
    /// ([`Wire::line`](super::link::Wire::line)), or nothing.
    Ready(String),
    /// Destination: all pages of this round are in memory.
    Taken(u32),
    /// Source, whose guest stands still from here on, and has let go of its disks: the machine. Its pages are those of the
    /// rounds up to this one.
    State {
        /// The last round.
        round: u32,
        /// A byte, 1 where somebody has paused the guest, who is to find it so, else 0; behind it
        /// [`MachineState::encode`](crate::snapshot::machine::MachineState::encode).
        state: Vec<u8>,
    },
    /// Destination: the machine is whole, and holds its disks. One word starts it.
    Prepared,
    /// Source: the guest is not mine any more.
    Go,
    /// Destination: it is mine. Said before it runs.
    Started,
    /// Source: I have heard it, and shall not ask.
    Done,
    /// Either, before [`Message::Go`]: I give up; why.
    GivenUp(String),
    /// Destination, on a connection that asks for it.
    Settled(Ending),
    /// Source: all pages of this round have been sent, and a mark behind them on each data connection.
    Round(u32),
    /// Source, before the state: the destination does not have these pages, or not as they are, and is to ask for them. As
    /// many messages as it takes, with runs of guest physical addresses in order.
    Missing(Vec<Range<u64>>),
    /// Destination, on a connection for pages: it will ask for them here.
    Wanted,
    /// Destination, on a connection for pages: it asks for no more, and what came of it.
    Enough(LastWord),
    /// Destination, on a connection that asks how it ended or is for pages: the migration's number is known here.
    Known {
        /// A number of the connection's own.
        chance: [u8; CHANCE],
        /// HMAC-SHA-256 by the migration's number.
        proof: [u8; PROOF],
    },
    /// Source: and here.
    Proof([u8; PROOF]),
}

impl Message {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Offer { .. } => Kind::Offer,
            Message::Ready(_) => Kind::Ready,
            Message::Taken(_) => Kind::Taken,
            Message::State { .. } => Kind::State,
            Message::Prepared => Kind::Prepared,
            Message::Go => Kind::Go,
            Message::Started => Kind::Started,
            Message::Done => Kind::Done,
            Message::GivenUp(_) => Kind::GivenUp,
            Message::Settled(_) => Kind::Settled,
            Message::Round(_) => Kind::Round,
            Message::Missing(_) => Kind::Missing,
            Message::Wanted => Kind::Wanted,
            Message::Enough(_) => Kind::Enough,
            Message::Known { .. } => Kind::Known,
            Message::Proof(_) => Kind::Proof,
        }
    }

    /// Its bytes, head and checksum with them.
    ///
    /// # Errors
    /// [`MessageError::Length`]: a state, or a line, that is longer than any may be.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let kind = self.kind();
        let mut bytes = vec![0; HEAD];
        match self {
            Message::Offer {
                connections,
                compressed,
                postcopy,
                state,
            } => {
                let how = u32::from(*compressed) | if *postcopy { POSTCOPY } else { 0 };
                bytes.extend(connections.to_le_bytes());
                bytes.extend(how.to_le_bytes());
                bytes.extend(state);
            }
            Message::State { round, state } => {
                bytes.extend(round.to_le_bytes());
                bytes.extend(state);
            }
            Message::Taken(round) | Message::Round(round) => bytes.extend(round.to_le_bytes()),
            Message::GivenUp(why) => bytes.extend(cut(why).bytes()),
            Message::Ready(line) => bytes.extend(line.bytes()),
            Message::Settled(ending) => bytes.push(match ending {
                Ending::Started => 1,
                Ending::Never => 2,
                Ending::Unknown => 3,
            }),
            Message::Missing(runs) => {
                let ends = runs.iter().flat_map(|run| [run.start, run.end]);
                bytes.extend(ends.flat_map(u64::to_le_bytes));
            }
            Message::Enough(word) => {
                let of = &word.faults;
                let faults = [of.count, of.p50_ns, of.p99_ns, of.max_ns];
                let numbers = faults.into_iter().chain([word.missing, word.lost]);
                bytes.extend(numbers.flat_map(u64::to_le_bytes));
                bytes.extend(cut(&word.why).bytes());
            }
            Message::Known { chance, proof } => {
                bytes.extend(chance);
                bytes.extend(proof);
            }
            Message::Proof(proof) => bytes.extend(proof),
            Message::Prepared
            | Message::Go
            | Message::Started
            | Message::Done
            | Message::Wanted => {}
        }
        let len = u32::try_from(bytes.len() - HEAD).unwrap_or(u32::MAX);
        let (_, most) = kind.lengths();
        if len > most {
            return Err(MessageError::Length { kind, len });
        }
        let head = Head { kind, len }.encode();
        bytes.iter_mut().zip(head).for_each(|(to, from)| *to = from);
        let sum = checksum(&bytes);
        bytes.extend(sum.to_le_bytes());
        Ok(bytes)
    }

    /// Reads one: its head, as many bytes as that says, and the checksum behind them.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn parse(head: Head, payload: Vec<u8>, sum: [u8; TAIL]) -> Result<Self, MessageError> {
        let kind = head.kind;
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if len != head.len {
            return Err(MessageError::Length { kind, len });
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&head.encode());
        hasher.update(&payload);
        let (found, sent) = (hasher.finalize(), u32::from_le_bytes(sum));
        if found != sent {
            let what = "a message";
            return Err(MessageError::Checksum { what, found, sent });
        }
        let wrong = |what: String| MessageError::Payload { kind, what };
        Ok(match kind {
            Kind::Offer => {
                let (connections, how) = (u32_at(&payload, 0), u32_at(&payload, 4));
                if !(1..=MOST_CONNECTIONS).contains(&connections) || how > COMPRESSED | POSTCOPY {
                    return Err(wrong(format!(
                        "{connections} connections, and {how} for compression and post-copy"
                    )));
                }
                Message::Offer {
                    connections,
                    compressed: how & COMPRESSED != 0,
                    postcopy: how & POSTCOPY != 0,
                    state: behind(payload, 8),
                }
            }
            Kind::State => Message::State {
                round: u32_at(&payload, 0),
                state: behind(payload, 4),
            },
            Kind::Taken => Message::Taken(u32_at(&payload, 0)),
            Kind::Round => Message::Round(u32_at(&payload, 0)),
            Kind::GivenUp => Message::GivenUp(String::from_utf8_lossy(&payload).into_owned()),
            Kind::Settled => Message::Settled(match payload.first() {
                Some(1) => Ending::Started,
                Some(2) => Ending::Never,
                Some(3) => Ending::Unknown,
                other => return Err(wrong(format!("{other:?}"))),
            }),
            Kind::Ready => Message::Ready(String::from_utf8_lossy(&payload).into_owned()),
            Kind::Prepared => Message::Prepared,
            Kind::Go => Message::Go,
            Kind::Started => Message::Started,
            Kind::Done => Message::Done,
            Kind::Missing => {
                let (runs, rest) = payload.as_chunks::<RUN>();
                if !rest.is_empty() {
                    return Err(wrong(format!("{} bytes, which are no runs", payload.len())));
                }
                Message::Missing(
                    runs.iter()
                        .map(|run| u64_at(run, 0)..u64_at(run, 8))
                        .collect(),
                )
            }
            Kind::Wanted => Message::Wanted,
            Kind::Known => Message::Known {
                chance: first(&payload),
                proof: first(payload.get(CHANCE..).unwrap_or_default()),
            },
            Kind::Proof => Message::Proof(first(&payload)),
            Kind::Enough => {
                let number = |at: usize| u64_at(&payload, at * 8);
                let faults = Faults {
                    count: number(0),
                    p50_ns: number(1),
                    p99_ns: number(2),
                    max_ns: number(3),
                };
                let (missing, lost) = (number(4), number(5));
                let why = String::from_utf8_lossy(&behind(payload, LAST_WORD)).into_owned();
                Message::Enough(LastWord {
                    faults,
                    missing,
                    lost,
                    why,
                })
            }
        })
    }
}

/// What of `text` is sent.
fn cut(text: &str) -> &str {
    let fits = |end: &usize| *end <= MOST_TEXT as usize;
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    let end = ends.take_while(fits).last().unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

fn behind(mut payload: Vec<u8>, len: usize) -> Vec<u8> {
    payload.drain(..len.min(payload.len()));
    payload
}

/// The bytes at the beginning; 0 where there are none.
fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

fn verify(what: &'static str, bytes: &[u8], sent: u32) -> Result<(), MessageError> {
    match checksum(bytes) {
        found if found == sent => Ok(()),
        found => Err(MessageError::Checksum { what, found, sent }),
    }
}
