// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Greetings and messages over a connection, and no wait without an end.
//!
//! A connection comes back from a read or a write that does not get on after a [`TICK`]. Then it is asked whether the
//! migration is still wanted, and how long nothing has come: so a cancel is heard at once however long the other side is
//! silent, without another thread that would have to close a connection in use.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::callers::HangUp;
use super::message::{GREETING, Greeting, HEAD, Head, Kind, Message, MessageError, Side, TAIL};
use super::pages::{Parts, ReadPages, WritePages};
use crate::text::printable;

/// How often it is asked whether a wait is to go on.
pub const TICK: Duration = Duration::from_millis(50);

/// A connection, whose reads and writes fail with [`io::ErrorKind::WouldBlock`] or [`io::ErrorKind::TimedOut`] after a
/// [`TICK`] in which no byte got on, and can be made again.
pub trait Wire: ReadPages + WritePages + Send {
    /// The line as this end sees it, at most [`MOST_LINE`](super::message::MOST_LINE) bytes. That both ends say the same
    /// proves that nobody stands between them who passes on what they say; none proves nothing.
    fn line(&self) -> Option<String> {
        None
    }
    /// Who is at the other end, for messages.
    fn from(&self) -> Option<String> {
        None
    }

    /// The same connection for who reads on one thread and writes on another: pages are asked for over it.
    ///
    /// # Errors
    /// It is none for that.
    fn duplex(self) -> io::Result<Duplex>
    where
        Self: Sized,
    {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A connection over which pages are asked for.
pub type Duplex = Box<dyn async_pf::peer::Wire>;

/// What makes connections to the destination.
pub trait Connect: Sync {
    /// A connection.
    type Wire: Wire;
    /// Connects, within `patience`.
    ///
    /// # Errors
    /// [`io::ErrorKind::ConnectionRefused`] says that nobody listens there: who did is gone. That is the destination where the
    /// line to it was direct ([`Wire::line`]) and the way [is still](Self::is_still) the same; else it is another. A name that
    /// may lead to another host than the first connection's is not asked for again.
    fn connect(&self, patience: Duration) -> io::Result<Self::Wire>;
    /// Whether it still leads to where a connection had this [line](Wire::line), as far as this side can see.
    fn is_still(&self, line: &str) -> bool {
        let _ = line;
        true
    }
    /// Which way connections go now: another number, where somebody has named another address since ([`Orders`]). It stays the
    /// same where nobody can.
    ///
    /// [`Orders`]: super::orders::Orders
    fn way(&self) -> u64 {
        0
    }
    /// Whether a connection that is refused there proves that nobody listens. A firewall in the destination's place may refuse
    /// one while the destination lives.
    fn is_refusal_proof(&self) -> bool {
        true
    }
    /// What may be the reason where a connection breaks before the other side has said anything.
    fn hint(&self) -> Option<&str> {
        None
    }
}

/// Where connections of the source's come.
pub trait Accept: Send {
    /// A connection.
    type Wire: Wire;
    /// Somebody who has connected, and is not known yet.
    type Caller: Send;
    /// The next one; none if there is none within a [`TICK`].
    ///
    /// # Errors
    /// Nothing can be accepted any more. That one connection breaks off in its beginning is none.
    fn accept(&self) -> io::Result<Option<Self::Caller>>;
    /// Comes to know them, by TLS where that is wanted; none if they are nobody, which has been said then. Blocks for as long as
    /// they take, a few seconds at most, and no longer than `stop` lets it, which is asked a few times a second.
    fn answer(caller: Self::Caller, stop: &dyn Fn() -> bool) -> Option<Self::Wire>;
    /// Which host they come from, as far as it can be told: those of one share its part of the places
    /// ([`callers`](super::callers)).
    fn host(caller: &Self::Caller) -> String {
        let _ = caller;
        String::new()
    }
    /// What ends their connection at once, whatever [`answer`](Self::answer) waits for. Without it `stop` does, a moment later.
    fn hang_up(caller: &Self::Caller) -> HangUp {
        let _ = caller;
        Box::new(|| {})
    }
}

/// A connection is of no use any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// It broke.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// Nothing came, or nothing was taken.
    #[error("the other side has been silent for {} seconds", .0.as_secs())]
    Silent(Duration),
    /// Something came, or was taken, and not all of it.
    #[error("the other side has not said, or heard, all of it in {} ms", .0.as_millis())]
    Slow(Duration),
    /// What came is nothing.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    GivenUp(String),
    /// It said something that was not its turn to say.
    #[error("the other side said {said:?} where {due} was due")]
    Unexpected {
        /// What it said.
        said: Kind,
        /// What was due.
        due: &'static str,
    },
    /// It is not wanted any more.
    #[error("{0}")]
    Stopped(String),
}

impl LinkError {
    /// The same; of a connection that broke with `hint` behind it.
    pub fn hinted(self, hint: Option<&str>) -> Self {
        match (self, hint) {
            // What is no message, it says itself what it is.
            (LinkError::Broken(why), Some(hint)) if why.kind() != io::ErrorKind::InvalidData => {
                LinkError::Broken(io::Error::new(why.kind(), format!("{why}; {hint}")))
            }
            (other, _) => other,
        }
    }
}

/// How long a wait goes on.
pub struct Watch<'a> {
    /// As long as not all has come, or gone, that is waited for: a greeting, a message, a read or a write of pages. Bytes that
    /// drip do not lengthen it. A message for which there is no such limit has [`WHOLE`] once it has begun.
    pub quiet: Duration,
    /// Asked each [`TICK`], whatever comes meanwhile, and before each message: why it is to end, if it is.
    pub stop: &'a (dyn Fn() -> Option<String> + Sync),
}

/// How long a message may take that has begun to come: the longest, of 32 MiB, at half a megabyte a second.
pub const WHOLE: Duration = Duration::from_secs(60);

/// A wait for all of something.
struct Wait<'a> {
    watch: &'a Watch<'a>,
    quiet: Duration,
    since: Instant,
    asked: Instant,
    /// Bytes got on.
    moved: bool,
}

impl<'a> Wait<'a> {
    fn begin(watch: &'a Watch<'a>) -> Self {
        let since = Instant::now();
        Wait {
            watch,
            quiet: watch.quiet,
            since,
            asked: since,
            moved: false,
        }
    }

    /// What was waited for has begun to come.
    fn begun(&mut self) {
        if self.quiet > WHOLE {
            (self.quiet, self.since) = (WHOLE, Instant::now());
        }
    }

    /// Behind a try, whatever it did.
    fn tried(&mut self, moved: bool) -> Result<(), LinkError> {
        self.moved |= moved;
        let now = Instant::now();
        if moved && now.duration_since(self.asked) < TICK {
            return Ok(());
        }
        self.asked = now;
        self.ask()
    }

    fn ask(&self) -> Result<(), LinkError> {
        if let Some(why) = (self.watch.stop)() {
            return Err(LinkError::Stopped(why));
        }
        let quiet = self.since.elapsed();
        match (quiet >= self.quiet, self.moved) {
            (false, _) => Ok(()),
            (true, false) => Err(LinkError::Silent(quiet)),
            (true, true) => Err(LinkError::Slow(quiet)),
        }
    }

    /// Fills `bytes`.
    fn read(&mut self, wire: &mut impl Wire, mut bytes: &mut [u8]) -> Result<(), LinkError> {
        while !bytes.is_empty() {
            match wire.read(bytes) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(len) => {
                    bytes = bytes.get_mut(len..).unwrap_or_default();
                    if !bytes.is_empty() {
                        self.tried(true)?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_tick(&error) => self.tried(false)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn is_tick(error: &io::Error) -> bool {
    use io::ErrorKind::{TimedOut, WouldBlock};
    matches!(error.kind(), TimedOut | WouldBlock)
}

/// Sends `bytes`.
///
/// # Errors
/// [`LinkError`]. What of them has been sent is not known.
pub fn write_all(
    wire: &mut impl Wire,
    mut bytes: &[u8],
    watch: &Watch<'_>,
) -> Result<(), LinkError> {
    let mut wait = Wait::begin(watch);
    loop {
        let wrote = match bytes.is_empty() {
            true => wire.flush().map(|()| None),
            false => wire.write(bytes).map(Some),
        };
        match wrote {
            Ok(None) => return Ok(()),
            Ok(Some(0)) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            Ok(Some(len)) => {
                bytes = bytes.get(len..).unwrap_or_default();
                if !bytes.is_empty() {
                    wait.tried(true)?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_tick(&error) => wait.tried(false)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Greets.
///
/// # Errors
/// [`LinkError`].
pub fn greet(
    wire: &mut impl Wire,
    greeting: &Greeting,
    watch: &Watch<'_>,
) -> Result<(), LinkError> {
    Wait::begin(watch).ask()?;
    write_all(wire, &greeting.encode(), watch)
}

/// Waits for the greeting.
///
/// # Errors
/// [`LinkError`].
pub fn greeted(wire: &mut impl Wire, watch: &Watch<'_>) -> Result<Greeting, LinkError> {
    let mut bytes = [0; GREETING];
    Wait::begin(watch).read(wire, &mut bytes)?;
    Ok(Greeting::parse(&bytes)?)
}

/// Says `message`.
///
/// # Errors
/// [`LinkError`]. Whether the other side hears it is not known.
pub fn send(wire: &mut impl Wire, message: &Message, watch: &Watch<'_>) -> Result<(), LinkError> {
    Wait::begin(watch).ask()?;
    write_all(wire, &message.encode()?, watch)
}

/// Waits for a message of `side`'s. That it gives up is an error.
///
/// # Errors
/// [`LinkError`].
pub fn receive(wire: &mut impl Wire, side: Side, watch: &Watch<'_>) -> Result<Message, LinkError> {
    let mut wait = Wait::begin(watch);
    let mut head = [0; HEAD];
    let (first, rest) = head.split_at_mut(1);
    wait.read(wire, first)?;
    wait.begun();
    wait.read(wire, rest)?;
    receive_behind(wire, side, head, wait)
}

/// The message of `side`'s that has begun to come, if one does within a [`TICK`].
///
/// # Errors
/// [`LinkError`], as of [`receive`].
pub fn receive_now(
    wire: &mut impl Wire,
    side: Side,
    watch: &Watch<'_>,
) -> Result<Option<Message>, LinkError> {
    let mut wait = Wait::begin(watch);
    let mut head = [0; HEAD];
    let got = match wire.read(&mut head) {
        Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        Ok(got) => got,
        Err(error) if is_tick(&error) || error.kind() == io::ErrorKind::Interrupted => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    wait.begun();
    wait.read(wire, head.get_mut(got..).unwrap_or_default())?;
    receive_behind(wire, side, head, wait).map(Some)
}

fn receive_behind(
    wire: &mut impl Wire,
    side: Side,
    head: [u8; HEAD],
    mut wait: Wait<'_>,
) -> Result<Message, LinkError> {
    /// Who says that much will come gets that much memory when it comes.
    const STEP: usize = 1 << 20;
    let head = Head::parse(&head)?;
    if !head.kind.is_said_by(side) {
        let (said, due) = (head.kind, side.words());
        return Err(LinkError::Unexpected { said, due });
    }
    let (mut payload, mut left) = (Vec::new(), head.len as usize);
    while left > 0 {
        let (from, step) = (payload.len(), left.min(STEP));
        payload.resize(from + step, 0);
        wait.read(wire, payload.get_mut(from..).unwrap_or_default())?;
        left -= step;
    }
    let mut sum = [0; TAIL];
    wait.read(wire, &mut sum)?;
    match Message::parse(head, payload, sum)? {
        Message::GivenUp(why) => Err(LinkError::GivenUp(printable(&why))),
        message => Ok(message),
    }
}

/// A connection whose ticks are nobody's concern: for who reads frames from it, or writes them.
pub struct Patient<'a, W> {
    wire: &'a mut W,
    watch: Watch<'a>,
    /// When it was asked last whether this goes on.
    asked: Instant,
    /// Why it ended, if it was not the connection.
    stopped: Option<LinkError>,
}

impl<'a, W: Wire> Patient<'a, W> {
    /// `wire`, on which is waited as `watch` says.
    pub fn new(wire: &'a mut W, watch: Watch<'a>) -> Self {
        Patient {
            wire,
            watch,
            asked: Instant::now(),
            stopped: None,
        }
    }

    /// Why a read or a write failed with `error`.
    pub fn why(&mut self, error: io::Error) -> LinkError {
        self.stopped.take().unwrap_or(LinkError::Broken(error))
    }

    /// What stopped it, if anything did.
    pub fn stopped(&mut self) -> Option<LinkError> {
        self.stopped.take()
    }

    fn again<T>(&mut self, mut turn: impl FnMut(&mut W) -> io::Result<T>) -> io::Result<T> {
        let mut wait = Wait::begin(&self.watch);
        // Of one that never waits it is to be heard as well.
        wait.asked = self.asked;
        let result = loop {
            let tried = turn(self.wire);
            let moved = match &tried {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_tick(error) => false,
                Err(_) => break tried,
                Ok(_) => true,
            };
            match wait.tried(moved) {
                Ok(()) if moved => break tried,
                Ok(()) => {}
                Err(why) => break Err(stopped_by(why, &mut self.stopped)),
            }
        };
        self.asked = wait.asked;
        result
    }
}

/// An error in the words of `why`, which is kept for who wants more of it.
fn stopped_by(why: LinkError, kept: &mut Option<LinkError>) -> io::Error {
    let error = io::Error::other(why.to_string());
    *kept = Some(why);
    error
}

/// Who has something to send, and may not yet.
pub trait Rest {
    /// Waits for a [`TICK`], more or less, and looks at the connection meanwhile.
    ///
    /// # Errors
    /// Nothing can be sent any more, or need be.
    fn rest(&mut self) -> io::Result<()>;
}

impl<W: Wire> Rest for Patient<'_, W> {
    fn rest(&mut self) -> io::Result<()> {
        // However long it takes, it is not the other side's silence.
        let asked = Wait::begin(&self.watch).ask();
        asked.map_err(|why| stopped_by(why, &mut self.stopped))?;
        match self.wire.read(&mut [0]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Err(io::Error::other("the other side sends something back")),
            Err(error) if error.kind() == io::ErrorKind::Interrupted || is_tick(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl<W: Wire> Read for Patient<'_, W> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.again(|wire| wire.read(bytes))
    }
}

impl<W: Wire> Write for Patient<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.again(|wire| wire.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.again(|wire| wire.flush())
    }
}

impl<W: Wire> ReadPages for Patient<'_, W> {
    fn read_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        self.again(|wire| wire.read_pages(parts))
    }
}

impl<W: Wire> WritePages for Patient<'_, W> {
    fn write_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        self.again(|wire| wire.write_pages(parts))
    }
}
