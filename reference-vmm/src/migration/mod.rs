// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine that moves to another process while its guest runs.
//!
//! # What it travels on
//!
//! ```text
//!   address    Address: FromStr + Display           unix:PATH | tcp:HOST:PORT
//!   tls        TlsFiles { cert, key, ca, name }     Tls::load(&TlsFiles) -> Result<Tls, TlsError>
//!   transport  Listener::bind(&Address, Option<&Tls>) -> Result<Listener, BindError>
//!              Listener::accept(&self, deadline: Instant) -> Result<Connection, AcceptError>
//!              Listener::canceller(&self) -> Canceller
//!              connect(&Address, Option<&Tls>, deadline: Instant) -> Result<Connection, ConnectError>
//!              Connection: Read + Write + Send
//!                  peer() -> &str, canceller() -> Canceller, set_patience(Duration), set_deadline(Option<Instant>), finish()
//!              Canceller: Clone + Send + Sync, cancel(&self)
//!   codec      Encoder::new(Compression) -> io::Result<Encoder>
//!              Encoder::pages(address, len, |at, &mut [u8]| -> io::Result<()>, &mut impl Write) -> io::Result<()>
//!              Encoder::mark(u64, &mut impl Write), Encoder::flush(&mut impl Write), Encoder::counts() -> Counts
//!              Decoder::new() -> io::Result<Decoder>
//!              Decoder::frame(&mut impl Read, &mut impl Sink) -> Result<Frame, DecodeError>
//!              Frame::{Pages, Mark(u64), End},  trait Sink { pages(address, &[u8]), zeros(address, len) -> io::Result<()> }
//!   limit      TokenBucket (pure), Limiter::new(Option<NonZeroU64>), .set(..), .cancel(),
//!              Limited<W>: Write, over any Write and an Arc<Limiter>
//! ```

pub mod address;
pub mod codec;
pub mod limit;
mod plot;
pub mod progress;
pub mod record;
pub mod report;
pub mod tls;
pub mod transport;
pub mod units;
