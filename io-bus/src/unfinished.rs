// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accesses that are not over at once: those in several pieces, and those whose answer comes later.
//!
//! Pieces are carried out in ascending order, each after the one before. If a device defers one,
//! the access stops there and its state is kept here; the answer, once it has come, is put where
//! that piece's bytes are, and the access goes on with the next piece, which may be deferred again.

use crate::Access;
use crate::deferred::{Deferral, Given};
use crate::dispatcher::{Bytes, Dispatcher, Outcome};
use crate::fragment::{Fragment, fragments};
use crate::range::BusKind;
use crate::trace::Direction;

/// How an access is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shape {
    /// Not at all.
    One,
    /// As KVM cuts MMIO.
    Fragments,
    /// Items of this many bytes, all at one address.
    Repeated(usize),
}

/// An access as the caller made it, without its data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whole {
    pub(crate) bus: BusKind,
    pub(crate) address: u64,
    pub(crate) direction: Direction,
    pub(crate) shape: Shape,
}

impl Whole {
    /// The piece that begins at byte `from` of `len`.
    fn piece(&self, from: usize, len: usize) -> Option<Fragment> {
        let rest = len.checked_sub(from)?;
        match self.shape {
            Shape::One => (from == 0).then_some(Fragment {
                address: self.address,
                offset: 0,
                len,
            }),
            // Cut from a piece's end, the rest falls into the pieces that it had.
            Shape::Fragments => {
                let address = self.address.wrapping_add(from as u64);
                let piece = fragments(address, rest).next()?;
                let offset = from;
                Some(Fragment { offset, ..piece })
            }
            Shape::Repeated(0) => None,
            Shape::Repeated(width) => (rest > 0).then_some(Fragment {
                address: self.address,
                offset: from,
                len: width.min(rest),
            }),
        }
    }
}

/// An access that a device deferred.
#[derive(Debug)]
pub(crate) struct Unfinished {
    deferral: Deferral,
    whole: Whole,
    /// The deferred piece.
    piece: Fragment,
    /// The outcome of the pieces before it.
    so_far: Option<Outcome>,
}

impl Unfinished {
    pub(crate) fn new(deferral: Deferral, whole: Whole, len: usize) -> Self {
        let piece = Fragment {
            address: whole.address,
            offset: 0,
            len,
        };
        Self {
            deferral,
            whole,
            piece,
            so_far: None,
        }
    }
}

/// # Answers that come later
///
/// A vCPU's thread may wait, or look now and then while it does other things; it must only not
/// enter the guest. `data` is the same piece of `kvm_run` each time.
///
/// ```
/// # use io_bus::{Dispatcher, MmioAddress, Outcome};
/// # fn stop_was_asked_for() -> bool { false }
/// # fn exit(io: &mut Dispatcher, address: MmioAddress, data: &mut [u8]) {
/// let mut outcome = io.mmio_read(address, data);
/// while outcome == Outcome::Deferred {
///     if stop_was_asked_for() {
///         io.abandon(); // The guest is not entered again, or reads all ones.
///         break;
///     }
///     // `Deferred` again after an `Interrupter::interrupt`, which goes with the stop.
///     outcome = io.wait_read(data);
/// }
/// # }
/// ```
///
/// A vCPU whose access is pending cannot be saved, because KVM completes the instruction only when
/// it is entered with the answer. Pausing one for a moment is no trouble: it comes back to the
/// wait.
impl Dispatcher {
    /// Blocks until the deferred read is over, and puts its bytes into `data`, the slice that it
    /// was begun with. [`Outcome::Deferred`] if an [`Interrupter`](crate::Interrupter) ended the
    /// wait; the read stays as it is.
    ///
    /// Where no read is pending, `data` becomes all ones and the outcome is
    /// [`Outcome::Unclaimed`]. An access that begins before another's answer was fetched may take
    /// its place, if it is deferred too.
    ///
    /// # Deadlock
    ///
    /// Inside a device's answer, this has everyone who unregisters a device wait for the answer.
    /// Whoever is to give it must not be among them.
    pub fn wait_read(&mut self, data: &mut [u8]) -> Outcome {
        self.finish(Bytes::Read(data), true)
    }

    /// Blocks until the deferred write is over; `data` is what it was begun with. As
    /// [`wait_read`](Self::wait_read) otherwise.
    pub fn wait_write(&mut self, data: &[u8]) -> Outcome {
        self.finish(Bytes::Write(data), true)
    }

    /// As [`wait_read`](Self::wait_read), but never blocks: [`Outcome::Deferred`] while there is no
    /// answer.
    pub fn poll_read(&mut self, data: &mut [u8]) -> Outcome {
        self.finish(Bytes::Read(data), false)
    }

    /// As [`wait_write`](Self::wait_write), but never blocks.
    pub fn poll_write(&mut self, data: &[u8]) -> Outcome {
        self.finish(Bytes::Write(data), false)
    }

    /// Gives up a deferred access: its completion is told that nobody waits, its read's data stays
    /// all ones from the deferred piece on, and its later pieces are not carried out.
    pub fn abandon(&mut self) {
        self.unfinished = None;
    }

    /// Whether the last deferred access still wants its answer fetched.
    pub fn is_deferred(&self) -> bool {
        self.unfinished.is_some()
    }

    /// An access in several pieces, from its beginning.
    #[cold]
    pub(crate) fn in_pieces(
        &mut self,
        bus: BusKind,
        address: u64,
        shape: Shape,
        bytes: Bytes<'_>,
    ) -> Outcome {
        let whole = Whole {
            bus,
            address,
            direction: bytes.direction(),
            shape,
        };
        self.carry_on(whole, bytes, 0, None)
    }

    /// Carries out the pieces from byte `from` on, whatever becomes of each, up to one that is
    /// deferred.
    fn carry_on(
        &mut self,
        whole: Whole,
        mut bytes: Bytes<'_>,
        mut from: usize,
        mut so_far: Option<Outcome>,
    ) -> Outcome {
        while let Some(piece) = whole.piece(from, bytes.len()) {
            let outcome = match bytes.part(piece.bytes()) {
                Some(part) => self.piece(whole.bus, piece.address, part),
                None => Outcome::Unclaimed,
            };
            from = piece.offset + piece.len;
            if outcome == Outcome::Deferred {
                if let Some(unfinished) = &mut self.unfinished {
                    (unfinished.whole, unfinished.piece) = (whole, piece);
                    unfinished.so_far = so_far;
                }
                fill_from(&mut bytes, from);
                return Outcome::Deferred;
            }
            so_far = Some(so_far.map_or(outcome, |before| before.and(outcome)));
        }
        // Bytes that belong to no piece: of a repeated read with a width of 0, all.
        fill_from(&mut bytes, from);
        so_far.unwrap_or(Outcome::Unclaimed)
    }

    fn finish(&mut self, mut bytes: Bytes<'_>, block: bool) -> Outcome {
        loop {
            // Taken only once there is an answer: an interrupted wait leaves everything in place.
            let Some(unfinished) = &self.unfinished else {
                fill_from(&mut bytes, 0);
                return Outcome::Unclaimed;
            };
            if unfinished.whole.direction != bytes.direction() {
                fill_from(&mut bytes, 0);
                return Outcome::Unclaimed;
            }
            let given = match block {
                true => self.parker.wait_for(&unfinished.deferral),
                false => unfinished.deferral.poll(),
            };
            let Some(given) = given else {
                return Outcome::Deferred;
            };
            let Some(unfinished) = self.unfinished.take() else {
                return Outcome::Unclaimed;
            };
            let outcome = self.put(&unfinished, &mut bytes, given);
            let so_far = unfinished
                .so_far
                .map_or(outcome, |before| before.and(outcome));
            let from = unfinished.piece.offset + unfinished.piece.len;
            if unfinished.whole.piece(from, bytes.len()).is_none() {
                return so_far;
            }
            let bytes = match &mut bytes {
                Bytes::Read(data) => Bytes::Read(data),
                Bytes::Write(data) => Bytes::Write(data),
            };
            let outcome = self.carry_on(unfinished.whole, bytes, from, Some(so_far));
            if outcome != Outcome::Deferred {
                return outcome;
            }
        }
    }

    /// Puts an answer where the deferred piece's bytes are.
    fn put(&mut self, unfinished: &Unfinished, bytes: &mut Bytes<'_>, given: Given) -> Outcome {
        let piece = unfinished.piece;
        let outcome = match given {
            Given::Done { .. } => Outcome::Answered,
            Given::Declined => Outcome::Unclaimed,
        };
        let end = (piece.offset + piece.len).min(bytes.len());
        let Some(mut part) = bytes.part(piece.offset.min(end)..end) else {
            return outcome;
        };
        if let Bytes::Read(data) = &mut part {
            data.fill(0xff);
            if let Given::Done { bytes, len } = given {
                for (to, from) in data.iter_mut().zip(bytes.iter().take(len)) {
                    *to = *from;
                }
            }
        }
        let (bus, direction) = (unfinished.whole.bus, unfinished.whole.direction);
        self.tell(&Access {
            bus,
            address: piece.address,
            direction,
            data: part.data(),
            outcome,
            duration: None,
        });
        outcome
    }
}

/// Of a read, all bytes from `from` on become ones.
fn fill_from(bytes: &mut Bytes<'_>, from: usize) {
    if let Bytes::Read(data) = bytes
        && let Some(rest) = data.get_mut(from..)
    {
        rest.fill(0xff);
    }
}
