// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One round of pages, over all data connections at once.
//!
//! Which connection a page takes is its address's: stripes of [`STRIPE`] bytes in turn. So a page takes the same one in each
//! round, and what was sent of it later arrives later, without the rounds waiting for each other.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::codec::{Compression, Counts, Encoder, MOST_CONTENTS};
use super::event::{Event, Observer};
use super::guest::{Dirty, Refusal, SourceGuest};
use super::limit::{Limited, Limiter};
use super::link::{LinkError, Patient, Watch, Wire};
use super::pages::{WritePages, is_fault};
use super::source::{Settings, Why};

/// What goes over one connection before it is the next one's turn, bytes.
pub const STRIPE: u64 = 256 << 10;
/// In a mark: no more comes on this connection.
pub const LAST: u64 = 1 << 32;
/// The mark of the round that sends all of memory.
const FIRST: u64 = 0;

/// A data connection, and what makes frames for it.
pub(super) struct Lane<W> {
    wire: W,
    encoder: Encoder,
}

impl<W: Wire> Lane<W> {
    /// # Errors
    /// There is no memory for it, or no such compression.
    pub(super) fn new(wire: W, compression: Compression) -> io::Result<Self> {
        let mut encoder = Encoder::new(compression)?;
        // It goes through memory, or TLS, which knows what was changed.
        encoder.set_checksums(false);
        Ok(Lane { wire, encoder })
    }
}

/// What has been sent of a round, by all connections.
pub(super) struct Tally<'a> {
    observer: &'a dyn Observer,
    pages: AtomicU64,
    zero: AtomicU64,
    /// No more of it is to be sent: asked before each stripe.
    enough: &'a (dyn Fn() -> bool + Sync),
    /// And some was not.
    cut: AtomicBool,
    /// What was not.
    left: Mutex<Vec<Range<u64>>>,
}

impl<'a> Tally<'a> {
    pub(super) fn new(observer: &'a dyn Observer, enough: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Tally {
            observer,
            pages: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            enough,
            cut: AtomicBool::new(false),
            left: Mutex::default(),
        }
    }

    /// Pages, so far.
    pub(super) fn pages(&self) -> u64 {
        // Relaxed: the threads that counted have been joined.
        self.pages.load(Ordering::Relaxed)
    }

    /// Not all of the round was sent.
    pub(super) fn is_cut(&self) -> bool {
        // Relaxed: the threads that set it have been joined.
        self.cut.load(Ordering::Relaxed)
    }

    /// What has not been sent of a round that is cut.
    pub(super) fn take_left(&self) -> Vec<Range<u64>> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *left)
    }

    fn leave(&self, runs: impl IntoIterator<Item = Range<u64>>) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.extend(runs);
    }

    /// Whether the rest is not to be sent.
    fn is_enough(&self) -> bool {
        let enough = (self.enough)();
        if enough {
            // Relaxed: it is read when this thread has been joined.
            self.cut.store(true, Ordering::Relaxed);
        }
        enough
    }

    /// Pages that were zero, so far.
    pub(super) fn zero(&self) -> u64 {
        // Relaxed: the threads that counted have been joined.
        self.zero.load(Ordering::Relaxed)
    }

    fn add(&self, before: Counts, now: Counts) {
        let zero = now.zero_pages - before.zero_pages;
        let pages = now.data_pages - before.data_pages + zero;
        // Relaxed: counts.
        self.zero.fetch_add(zero, Ordering::Relaxed);
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.observer.event(Event::Sent {
            pages,
            zero,
            bytes: now.wire_bytes - before.wire_bytes,
        });
    }
}

/// Sends what is dirty, and behind it `mark` on each connection: the round's number, and [`LAST`] if it is the last. The tally
/// may cut it short.
///
/// # Errors
/// The first that went wrong.
pub(super) fn send_round<G: SourceGuest, D: Dirty, W: Wire>(
    guest: &G,
    dirty: &D,
    mark: u64,
    lanes: &mut [Lane<W>],
    settings: &Settings,
    stop: &(dyn Fn() -> Option<String> + Sync),
    tally: &Tally<'_>,
) -> Result<(), Why> {
    let count = lanes.len() as u64;
    // Relaxed: a hint to the others that what they do is in vain.
    let failed = AtomicBool::new(false);
    let first = Mutex::new(None);
    std::thread::scope(|scope| {
        let (failed, first) = (&failed, &first);
        let mut others = Vec::new();
        for (number, lane) in lanes.iter_mut().enumerate() {
            let mut work = move || {
                let stripes = Stripes {
                    of: count,
                    number: number as u64,
                };
                let sent = stripes.send(guest, dirty, mark, lane, settings, stop, failed, tally);
                if let Err(why) = sent {
                    failed.store(true, Ordering::Relaxed);
                    let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(why);
                }
            };
            // The last is this thread's own, which for one connection costs no thread.
            if number as u64 + 1 == count {
                work();
                continue;
            }
            let builder = std::thread::Builder::new().name("migrate".into());
            match builder.spawn_scoped(scope, work) {
                Ok(thread) => others.push(thread),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(Why::Link {
                        doing: "cannot start a thread that sends",
                        source: LinkError::Broken(error),
                    });
                    break;
                }
            }
        }
    });
    let first = first.into_inner().unwrap_or_else(PoisonError::into_inner);
    match first {
        Some(why) => Err(why),
        None => Ok(()),
    }
}

/// Pages that are to be sent on one connection, as many as a frame has: so what few pages lie together need no frame of
/// their own.
struct Batch {
    pages: Vec<Range<u64>>,
    bytes: u64,
    /// The guest's memory is lent. Else it is copied at once into a frame, which may wait itself.
    lent: bool,
    /// Why the guest did not give them.
    refused: Option<Refusal>,
}

impl Batch {
    fn of<G: SourceGuest>(guest: &G) -> Self {
        Batch {
            pages: Vec::new(),
            bytes: 0,
            // An error comes again with pages.
            lent: guest.lend(&[], &mut |_| {}).unwrap_or(true),
            refused: None,
        }
    }

    fn add(&mut self, pages: Range<u64>) {
        self.bytes += pages.end - pages.start;
        match self.pages.last_mut() {
            _ if pages.is_empty() => {}
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ => self.pages.push(pages),
        }
    }

    /// As many as are sent at once. What is slowed goes in small pieces: it is asked between them whether it is enough.
    fn is_full(&self, limit: &Limiter) -> bool {
        let full = match limit.is_set() {
            true => STRIPE,
            false => MOST_CONTENTS as u64,
        };
        !self.lent || self.bytes >= full
    }

    /// Sends them, from the guest's own memory where it is lent.
    fn send<G: SourceGuest, W: WritePages>(
        &mut self,
        guest: &G,
        encoder: &mut Encoder,
        out: &mut W,
    ) -> io::Result<()> {
        let Batch { pages, refused, .. } = self;
        if pages.is_empty() {
            return Ok(());
        }
        let mut refuse = |why: Refusal| {
            let error = io::Error::other(why.to_string());
            *refused = Some(why);
            error
        };
        let mut sent = Ok(());
        let lent = guest.lend(pages, &mut |memory| sent = encoder.lent(memory, out));
        let lent = lent.map_err(&mut refuse)?;
        sent?;
        if !lent {
            for Range { start, end } in pages.iter().cloned() {
                let fill = |at: u64, into: &mut [u8]| guest.read(at, into).map_err(&mut refuse);
                encoder.pages(start, end - start, fill, out)?;
            }
        }
        self.clear();
        Ok(())
    }

    fn clear(&mut self) {
        self.pages.clear();
        self.bytes = 0;
    }
}

/// The stripes of one connection.
struct Stripes {
    of: u64,
    number: u64,
}

impl Stripes {
    #[allow(clippy::too_many_arguments)]
    fn send<G: SourceGuest, D: Dirty, W: Wire>(
        &self,
        guest: &G,
        dirty: &D,
        mark: u64,
        lane: &mut Lane<W>,
        settings: &Settings,
        stop: &(dyn Fn() -> Option<String> + Sync),
        failed: &AtomicBool,
        tally: &Tally<'_>,
    ) -> Result<(), Why> {
        let doing = "cannot send the guest's memory";
        let in_vain = || match failed.load(Ordering::Relaxed) {
            true => Some("another connection failed".to_owned()),
            false => stop(),
        };
        let watch = Watch {
            quiet: settings.patience.pages,
            stop: &in_vain,
        };
        let Lane { wire, encoder } = lane;
        let patient = Patient::new(wire, watch);
        let mut out = Limited::new(patient, settings.limit.clone());
        let mut batch = Batch::of(guest);
        let mut result = Ok(());
        let mut cut = false;
        let mut before = encoder.counts();
        let mut count = |now: Counts| {
            // A frame is out only now and then.
            if now.frames != before.frames {
                tally.add(before, now);
                before = now;
            }
        };
        dirty.runs(&mut |run| {
            let mut at = run.start;
            while at < run.end {
                let stripe = at / STRIPE;
                let end = run.end.min((stripe + 1) * STRIPE);
                let piece = at..end;
                at = end;
                if stripe % self.of != self.number {
                    continue;
                }
                if let Some(why) = in_vain() {
                    result = Err(io::Error::other(why));
                    return false;
                }
                cut = cut || tally.is_enough();
                if cut {
                    tally.leave(batch.pages.drain(..).chain([piece]));
                    batch.clear();
                    continue;
                }
                let holes = match mark {
                    // What is dirty later has been written.
                    FIRST => guest.holes(piece.clone()),
                    _ => Vec::new(),
                };
                let mut from = piece.start;
                let after = piece.end..piece.end;
                for hole in holes.into_iter().chain([after]) {
                    let Range { start, end } = hole;
                    batch.add(from..start.max(from));
                    let sent = match batch.is_full(&settings.limit) {
                        true => batch.send(guest, encoder, &mut out),
                        false => Ok(()),
                    };
                    result = sent.and_then(|()| encoder.zeros(start, end - start, &mut out));
                    if result.is_err() {
                        return false;
                    }
                    from = end;
                }
                count(encoder.counts());
            }
            true
        });
        let sent = result
            .and_then(|()| batch.send(guest, encoder, &mut out))
            .and_then(|()| encoder.mark(mark, &mut out));
        count(encoder.counts());
        sent.map_err(|error| {
            let refused = batch.refused.take();
            let fault = is_fault(&error).then(|| Refusal(error.to_string()));
            match refused.or(fault) {
                Some(source) => Why::Guest {
                    doing: "cannot read the guest's memory",
                    source,
                },
                None => Why::Link {
                    doing,
                    source: out.get_mut().why(error),
                },
            }
        })
    }
}
