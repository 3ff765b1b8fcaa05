// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Greetings and messages over a connection, and no wait without an end.
//!
//! A connection comes back from a read or a write that does not get on after a [`TICK`]. Then it is asked whether the
//! migration is still wanted, and how long nothing has come: so a cancel is heard at once however long the other side is
//! silent, without another thread that would have to close a connection in use.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::message::{GREETING, Greeting, HEAD, Head, Kind, Message, MessageError, TAIL};

/// How often it is asked whether a wait is to go on.
pub const TICK: Duration = Duration::from_millis(50);

/// A connection, whose reads and writes fail with [`io::ErrorKind::WouldBlock`] or [`io::ErrorKind::TimedOut`] after a
/// [`TICK`] in which no byte got on, and can be made again.
pub trait Wire: Read + Write + Send {
    /// The line as this end sees it, at most [`MOST_LINE`](super::message::MOST_LINE) bytes. That both ends say the same
    /// proves that nobody stands between them who passes on what they say; none proves nothing.
    fn line(&self) -> Option<String> {
        None
    }
}

/// What makes connections to the destination.
pub trait Connect: Sync {
    /// A connection.
    type Wire: Wire;
    /// Connects, within `patience`.
    ///
    /// # Errors
    /// [`io::ErrorKind::ConnectionRefused`] says that nobody listens there: who did is gone. That is the destination where the
    /// line to it was direct ([`Wire::line`]), and else who stood between.
    fn connect(&self, patience: Duration) -> io::Result<Self::Wire>;
    /// What may be the reason where a connection breaks before the other side has said anything.
    fn hint(&self) -> Option<&str> {
        None
    }
}

/// Where connections of the source's come.
pub trait Accept: Send {
    /// A connection.
    type Wire: Wire;
    /// The next one; none if there is none within a [`TICK`].
    ///
    /// # Errors
    /// Nothing can be accepted any more. That one connection breaks off in its beginning is none.
    fn accept(&self) -> io::Result<Option<Self::Wire>>;
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
            (LinkError::Broken(why), Some(hint)) => {
                LinkError::Broken(io::Error::new(why.kind(), format!("{why}; {hint}")))
            }
            (other, _) => other,
        }
    }
}

/// How long a wait goes on.
pub struct Watch<'a> {
    /// As long as no byte gets on.
    pub quiet: Duration,
    /// Asked each [`TICK`], and before each message: why it is to end, if it is.
    pub stop: &'a (dyn Fn() -> Option<String> + Sync),
}

impl Watch<'_> {
    fn ask(&self, since: Instant) -> Result<(), LinkError> {
        if let Some(why) = (self.stop)() {
            return Err(LinkError::Stopped(why));
        }
        let quiet = since.elapsed();
        match quiet >= self.quiet {
            true => Err(LinkError::Silent(quiet)),
            false => Ok(()),
        }
    }
}

fn is_tick(error: &io::Error) -> bool {
    use io::ErrorKind::{TimedOut, WouldBlock};
    matches!(error.kind(), TimedOut | WouldBlock)
}

/// Fills `bytes`.
///
/// # Errors
/// [`LinkError`]; the end of the connection is [`LinkError::Broken`].
pub fn read_exact(
    wire: &mut impl Wire,
    mut bytes: &mut [u8],
    watch: &Watch<'_>,
) -> Result<(), LinkError> {
    let mut since = Instant::now();
    while !bytes.is_empty() {
        match wire.read(bytes) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(len) => {
                bytes = bytes.get_mut(len..).unwrap_or_default();
                since = Instant::now();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_tick(&error) => watch.ask(since)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
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
    let mut since = Instant::now();
    while !bytes.is_empty() {
        match wire.write(bytes) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            Ok(len) => {
                bytes = bytes.get(len..).unwrap_or_default();
                since = Instant::now();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_tick(&error) => watch.ask(since)?,
            Err(error) => return Err(error.into()),
        }
    }
    loop {
        match wire.flush() {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_tick(&error) => watch.ask(since)?,
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
    watch.ask(Instant::now())?;
    write_all(wire, &greeting.encode(), watch)
}

/// Waits for the greeting, all of which comes within the watch's quiet time.
///
/// # Errors
/// [`LinkError`].
pub fn greeted(wire: &mut impl Wire, watch: &Watch<'_>) -> Result<Greeting, LinkError> {
    let mut bytes = [0; GREETING];
    read_exact(&mut Hasty::new(wire, watch.quiet), &mut bytes, watch)?;
    Ok(Greeting::parse(&bytes)?)
}

/// Says `message`.
///
/// # Errors
/// [`LinkError`]. Whether the other side hears it is not known.
pub fn send(wire: &mut impl Wire, message: &Message, watch: &Watch<'_>) -> Result<(), LinkError> {
    watch.ask(Instant::now())?;
    write_all(wire, &message.encode()?, watch)
}

/// Waits for a message. That the other side gives up is an error.
///
/// # Errors
/// [`LinkError`].
pub fn receive(wire: &mut impl Wire, watch: &Watch<'_>) -> Result<Message, LinkError> {
    let mut head = [0; HEAD];
    read_exact(wire, &mut head, watch)?;
    receive_behind(wire, head, watch)
}

/// [`receive`], where all of the message is to come within the watch's quiet time: of who has not shown yet that he is worth
/// a longer wait.
///
/// # Errors
/// [`LinkError`].
pub fn receive_hasty(wire: &mut impl Wire, watch: &Watch<'_>) -> Result<Message, LinkError> {
    receive(&mut Hasty::new(wire, watch.quiet), watch)
}

/// A connection that is read until a certain moment, however little is missing then: bytes that drip do not lengthen it.
struct Hasty<'a, W> {
    wire: &'a mut W,
    patience: Duration,
    since: Instant,
}

impl<'a, W: Wire> Hasty<'a, W> {
    fn new(wire: &'a mut W, patience: Duration) -> Self {
        let since = Instant::now();
        Hasty {
            wire,
            patience,
            since,
        }
    }
}

impl<W: Wire> Read for Hasty<'_, W> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.since.elapsed() >= self.patience {
            let why = format!("it has not said all within {:?}", self.patience);
            return Err(io::Error::other(why));
        }
        self.wire.read(bytes)
    }
}

impl<W: Wire> Write for Hasty<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wire.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wire.flush()
    }
}

impl<W: Wire> Wire for Hasty<'_, W> {}

/// The message that has begun to come, if one does within a [`TICK`].
///
/// # Errors
/// [`LinkError`], as of [`receive`].
pub fn receive_now(wire: &mut impl Wire, watch: &Watch<'_>) -> Result<Option<Message>, LinkError> {
    let mut head = [0; HEAD];
    let got = match wire.read(&mut head) {
        Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        Ok(got) => got,
        Err(error) if is_tick(&error) || error.kind() == io::ErrorKind::Interrupted => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    read_exact(wire, head.get_mut(got..).unwrap_or_default(), watch)?;
    receive_behind(wire, head, watch).map(Some)
}

fn receive_behind(
    wire: &mut impl Wire,
    head: [u8; HEAD],
    watch: &Watch<'_>,
) -> Result<Message, LinkError> {
    /// Who says that much will come gets that much memory when it comes.
    const STEP: usize = 1 << 20;
    let head = Head::parse(&head)?;
    let (mut payload, mut left) = (Vec::new(), head.len as usize);
    while left > 0 {
        let (from, step) = (payload.len(), left.min(STEP));
        payload.resize(from + step, 0);
        read_exact(wire, payload.get_mut(from..).unwrap_or_default(), watch)?;
        left -= step;
    }
    let mut sum = [0; TAIL];
    read_exact(wire, &mut sum, watch)?;
    match Message::parse(head, payload, sum)? {
        Message::GivenUp(why) => Err(LinkError::GivenUp(why)),
        message => Ok(message),
    }
}

/// A connection whose ticks are nobody's concern: for who reads frames from it, or writes them.
pub struct Patient<'a, W> {
    wire: &'a mut W,
    watch: Watch<'a>,
    /// Why it ended, if it was not the connection.
    stopped: Option<LinkError>,
}

impl<'a, W: Wire> Patient<'a, W> {
    /// `wire`, on which is waited as `watch` says.
    pub fn new(wire: &'a mut W, watch: Watch<'a>) -> Self {
        Patient {
            wire,
            watch,
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
        let since = Instant::now();
        loop {
            match turn(self.wire) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_tick(&error) => {
                    if let Err(stopped) = self.watch.ask(since) {
                        let error = io::Error::other(stopped.to_string());
                        self.stopped = Some(stopped);
                        return Err(error);
                    }
                }
                other => return other,
            }
        }
    }
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
        if let Err(stopped) = self.watch.ask(Instant::now()) {
            let error = io::Error::other(stopped.to_string());
            self.stopped = Some(stopped);
            return Err(error);
        }
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
