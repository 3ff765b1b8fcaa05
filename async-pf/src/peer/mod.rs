// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages from another process or host: [`PeerSource`] asks for them over a connection, [`PageServer`] answers from a
//! [`PageSource`](crate::PageSource) of its own (a snapshot's file, or [`MemorySource`], a guest's memory).
//!
//! ```text
//!   Pager ── fetch ──▶ PeerSource                              PageServer ── fetch ──▶ PageSource
//!                         │  ask 7: gfn 0x40, 32 pages, demand ──▶ │
//!                         │  ask 8: gfn 0x900, 64 pages, prefetch ▶│
//!                         │ ◀── pages 7: 8 of bytes, 24 of zeros   │
//!                         │ ◀── beat            beat ──▶           │
//! ```
//!
//! Connections are the caller's: a [`Connect`] makes them (a path, an address, a closure that wraps TLS around one), and
//! whoever accepts them gives each to [`PageServer::serve`], on a thread of its own. Nothing here encrypts or
//! authenticates.
//!
//! # Example
//! ```
//! use async_pf::peer::{PageServer, PeerConfig, PeerSource, ServerConfig, UnixPeer};
//! use async_pf::{Fetched, FilePiece, PageSource, SparseSource};
//! use memslots::Gfn;
//! use std::io::Write;
//! use std::os::unix::net::UnixListener;
//! use std::sync::Arc;
//!
//! // Who has the pages.
//! let mut file = tempfile::tempfile()?;
//! file.write_all(&[7; 0x1000])?;
//! let piece = FilePiece { first: Gfn(3), pages: 1, offset: 0 };
//! let pages = SparseSource::new(file, [piece], Gfn(0)..Gfn(8))?;
//! let server = PageServer::new(Arc::new(pages), ServerConfig::default());
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("pages");
//! let listener = UnixListener::bind(&path)?;
//! std::thread::spawn(move || server.serve(&listener.accept()?.0).map_err(std::io::Error::other));
//!
//! // Who wants them; `Arc::new(source)` is what a pager's slot takes.
//! let source = PeerSource::connect(UnixPeer(path), PeerConfig::default())?;
//! let mut page = [0; 0x1000];
//! assert_eq!(source.fetch(Gfn(3), &mut page)?, Fetched::Bytes);
//! assert_eq!(page, [7; 0x1000]);
//! assert_eq!(source.fetch(Gfn(4), &mut page)?, Fetched::Zero);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The protocol
//! Version 1. All numbers are little-endian, checksums are CRC-32 (that of zlib). First each side sends a greeting of 32
//! bytes, the asking side first:
//!
//! ```text
//!    0   8  magic: 89 41 50 46 50 0d 0a 1a  ("\x89APFP\r\n\x1a")
//!    8   2  version: 1
//!   10   2  flags: bit 0, answers may be compressed (asking side: it understands; serving side: it will)
//!   12   2  asks that may be unanswered at once (serving side; else 0)
//!   14   2  0
//!   16   4  milliseconds after which this side says something at the latest
//!   20   8  which memory it is, a number of the serving side's choice (asking side: 0)
//!   28   4  checksum of bytes 0 to 27
//! ```
//!
//! Then each sends frames, in any order and without waiting:
//!
//! ```text
//!    0   1  kind
//!    1   1  detail, by kind
//!    2   2  0
//!    4   4  bytes of the body, n: no more than the kind may have
//!    8   8  id
//!   16   4  checksum of bytes 0 to 15 and of the body
//!   20   n  body
//! ```
//!
//! | kind | from | detail | id | body |
//! | --- | --- | --- | --- | --- |
//! | 1 ask | asking side | 0 demand, 1 prefetch | its own, larger than all before on this connection | first gfn (8), pages (4): 1 to [`MOST_PAGES`] |
//! | 2 pages | serving side | 0 plain, 1 zstd | the ask's | runs (2); of each its pages, with bit 31 set if they are zeros (4); then the bytes of those that are not, plain or as one zstd frame |
//! | 3 failed | serving side | 0 no such page, 1 may pass, 2 for good | the ask's | the page (8), why, in UTF-8 (at most [`MOST_WORDS`]) |
//! | 4 beat | both | 0 | 0 | none |
//!
//! Each ask has one answer, of all its pages, in whatever order: demand is served before prefetch. A connection ends by
//! being closed, between two frames. Whatever does not fit this ends it at once, with an error that has the value.
//!
//! # What both sides promise
//! * **Silence is found.** Who has nothing to say sends a beat each [`beat`](PeerConfig::beat); a peer from which nothing
//!   comes for [`silence`](PeerConfig::silence), or that takes nothing for so long, is given up. One that drips is not
//!   waited for either: from its first byte on, a frame's head has `silence` to be whole, and its body as long (the slowest
//!   link that serves is [`MOST_BODY`] bytes in `silence`). That a peer lives is not enough: an ask that is unanswered after
//!   [`answer`](PeerConfig::answer) ends the connection too.
//! * **A broken connection is made again** ([`Reconnect`]), and what was unanswered is asked again, under new ids. What an
//!   old connection still held is gone with it; and an answer fills only the buffer of the call that waits for it, so
//!   what becomes of pages that were given back meanwhile is the pager's to decide, as with any source.
//! * **Who lies is refused for good.** An answer that was not asked for, or twice, of the wrong length, with runs that do not
//!   add up: the source says so to every call from then on. Only a checksum that does not fit is damage, and asked again.
//! * **Memory is bounded**, whatever comes: no body is read into memory before its length is known to be one that this ask,
//!   or this kind, can have; and no more is unanswered at once than both sides agreed to.
//! * **Demand first**: waiting faults overtake what is prefetched on both sides, and wait on the link for one answer of
//!   at most [`MOST_PAGES`] at a time; with a connection of their own ([`PeerLanes`]) for none.

mod calls;
mod client;
mod error;
#[cfg(any(test, feature = "test-utilities"))]
pub mod fake;
mod frame;
mod lanes;
mod link;
mod memory;
mod server;
mod wire;

pub use client::{PeerConfig, PeerSource, PeerStats, Reconnect};
pub use error::PeerError;
pub use frame::{MOST_BODY, MOST_PAGES, MOST_WORDS};
pub use lanes::PeerLanes;
pub use memory::MemorySource;
pub use server::{PageServer, Served, ServerConfig};
pub use wire::{Connect, TcpPeer, UnixPeer, Wire};
