// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two things that one does with registered memory, each lent to one at a time: [`FillRole`] for whoever brings
//! pages, [`ProtectRole`] for whoever wants to know of writes. They work side by side without knowing each other.

use super::abi::{ALLOW_HOLES, DONTWAKE, PROTECT as MODE_PROTECT, PROTECTED};
use super::registration::{FILL, PROTECT, Registered};
use super::{Call, Cause, Features, LendError, Modes, OpError};
use crate::{Hva, Mapping};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use thiserror::Error;

/// `UFFDIO_WRITEPROTECT_MODE_DONTWAKE`.
const UNPROTECT_LATER: u64 = 2;

/// Whether an operation wakes who sleeps on its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wake {
    /// Yes.
    #[default]
    Now,
    /// No: [`FillRole::wake`] does later, for many pages at once.
    Later,
}

impl Wake {
    const fn bits(self, later: u64) -> u64 {
        match self {
            Self::Now => 0,
            Self::Later => later,
        }
    }
}

/// The role of a pager: brings the pages of a registration. Offsets are in bytes from the registration's start, and with
/// sizes multiples of [`Mapping::page_size`].
///
/// Each operation is one ioctl for any number of pages (more where the kernel does a part and says "again"), does not
/// wait for the guest, and may be called by several threads at once: of two that bring the same page, the second has
/// [`Cause::AlreadyThere`].
///
/// While a [`ProtectRole`] of the same registration is protecting, pages come write-protected, so that it hears of their
/// first write as of any other's.
///
/// Dropped, the role is free for another borrower. Who sleeps stays asleep until that one comes, or the
/// [`Registration`](super::Registration) goes.
pub struct FillRole {
    registered: Arc<Registered>,
}

impl FillRole {
    pub(super) fn lend(registered: &Arc<Registered>) -> Result<Self, LendError> {
        registered.lend(FILL, Modes::MISSING | Modes::MINOR)?;
        Ok(Self {
            registered: Arc::clone(registered),
        })
    }

    /// Its size in bytes: that of the registration.
    pub fn size(&self) -> u64 {
        self.registered.size()
    }

    /// The size of its pages in bytes.
    pub fn page_size(&self) -> u64 {
        self.registered.page_size()
    }

    /// The offset of the page that has the address; `None` outside the registration.
    pub fn page_of(&self, address: Hva) -> Option<u64> {
        let offset = address.0.checked_sub(self.registered.host_start())? as u64;
        (offset < self.size()).then(|| offset & !(self.page_size() - 1))
    }

    /// Places copies of `from` (`UFFDIO_COPY`).
    ///
    /// # Errors
    /// [`OpError`], which says how much is placed.
    pub fn copy(&self, offset: u64, from: &[u8], wake: Wake) -> Result<(), OpError> {
        let size = from.len() as u64;
        let at = self.registered.address(Call::Copy, offset, size)?;
        // SAFETY: checked to be whole pages of the registration; `from` has as many bytes.
        unsafe { self.copy_bytes(at, size, from.as_ptr() as usize, wake) }
    }

    /// Places copies of `size` bytes of another mapping, from `start` in it: of a snapshot's file, say. Its own pages
    /// come as they come: do not take one whose faults wait for this thread.
    ///
    /// # Errors
    /// [`OpError`], which says how much is placed.
    pub fn copy_from(
        &self,
        offset: u64,
        source: &Mapping,
        start: u64,
        size: u64,
        wake: Wake,
    ) -> Result<(), OpError> {
        let at = self.registered.address(Call::Copy, offset, size)?;
        let source = within(source, start, size).ok_or(self.out_of_range(Call::Copy, at, size))?;
        // SAFETY: as above; the source was checked to be readable memory of the mapping, which lives through the call.
        unsafe { self.copy_bytes(at, size, source, wake) }
    }

    /// # Safety
    /// As [`Registered::operate`].
    unsafe fn copy_bytes(
        &self,
        at: usize,
        size: u64,
        source: usize,
        wake: Wake,
    ) -> Result<(), OpError> {
        let protecting = self.registered.protecting();
        let mode = wake.bits(DONTWAKE) | if *protecting { PROTECTED } else { 0 };
        // SAFETY: the caller's promise.
        unsafe { self.registered.operate(Call::Copy, at, size, source, mode) }
    }

    /// Places pages of zeros: `UFFDIO_ZEROPAGE`, which takes no memory, where the memory has that and pages need not
    /// come write-protected; copies of a page of zeros otherwise.
    ///
    /// # Errors
    /// [`OpError`], which says how much is placed.
    pub fn zero(&self, range: Range<u64>, wake: Wake) -> Result<(), OpError> {
        let size = range.end.saturating_sub(range.start);
        let at = self.registered.address(Call::ZeroPage, range.start, size)?;
        let protecting = self.registered.protecting();
        if !*protecting && self.registered.has_zero_page() {
            // SAFETY: checked to be whole pages of the registration.
            return unsafe {
                self.registered
                    .operate(Call::ZeroPage, at, size, 0, wake.bits(DONTWAKE))
            };
        }
        let stopped = |done, cause| OpError {
            call: Call::ZeroPage,
            at: Hva(at),
            size,
            done,
            cause,
        };
        let zeros = self
            .registered
            .zeros()
            .map_err(|_| stopped(0, Cause::NoMemory))?;
        let mode = wake.bits(DONTWAKE) | if *protecting { PROTECTED } else { 0 };
        for done in (0..size).step_by(self.page_size() as usize) {
            let (at, source) = (at + done as usize, zeros.host().0);
            // SAFETY: a page of the registration, and one of zeros that nobody writes.
            unsafe {
                self.registered
                    .operate(Call::Copy, at, self.page_size(), source, mode)
            }
            .map_err(|error| stopped(done, error.cause))?;
        }
        Ok(())
    }

    /// Maps the pages that the page cache has (`UFFDIO_CONTINUE`): the answer to a
    /// [minor fault](super::FaultKind::Minor).
    ///
    /// # Errors
    /// [`OpError`], which says how much is mapped; [`Cause::NoSource`] where the page cache has none.
    pub fn continue_minor(&self, range: Range<u64>, wake: Wake) -> Result<(), OpError> {
        let size = range.end.saturating_sub(range.start);
        let at = self.registered.address(Call::Continue, range.start, size)?;
        let protecting = self.registered.protecting();
        let mode = wake.bits(DONTWAKE) | if *protecting { PROTECTED } else { 0 };
        // SAFETY: checked to be whole pages of the registration.
        unsafe { self.registered.operate(Call::Continue, at, size, 0, mode) }
    }

    /// Poisons pages (`UFFDIO_POISON`): who touches one has a memory error, SIGBUS in user space; in a guest, what its
    /// host makes of it (`EFAULT` of `KVM_RUN` on `kvm_amd`, an MMIO exit at an address of RAM elsewhere). The end of a
    /// source of pages that is gone for good.
    ///
    /// A page that was write-protected before there was one ([`Features::WP_UNPOPULATED`]) has a mark that the kernel does
    /// not overwrite; it is taken away first, while nothing is filled. Of another process's memory it cannot be told from a
    /// page: there it is [`Cause::AlreadyThere`], and who waits for it waits on.
    ///
    /// Nor can a page in swap be told from a mark: `mincore` has neither, `/proc/self/pagemap` calls both swapped, and the
    /// field that differs is for the privileged alone. It keeps its contents, is without its protection for a moment, and the
    /// answer is [`Cause::Changing`]. Who alone fills, and notes what, never poisons a page that there is.
    ///
    /// # Errors
    /// [`OpError`], which says how much is poisoned.
    pub fn poison(&self, range: Range<u64>, wake: Wake) -> Result<(), OpError> {
        let size = range.end.saturating_sub(range.start);
        let at = self.registered.address(Call::Poison, range.start, size)?;
        if !self.registered.has(Features::POISON) {
            return Err(self.refused(Call::Poison, at, size));
        }
        let stopped = |done, cause| OpError {
            cause,
            done,
            ..self.out_of_range(Call::Poison, at, size)
        };
        let mut done = 0;
        while done < size {
            let (at, left) = (at + done as usize, size - done);
            // SAFETY: checked to be whole pages of the registration, which are the guest's, error or not.
            let poisoned = unsafe {
                self.registered
                    .operate(Call::Poison, at, left, 0, wake.bits(DONTWAKE))
            };
            let Err(error) = poisoned else { break };
            done += error.done;
            if error.cause != Cause::AlreadyThere || !self.registered.has_marks() {
                return Err(stopped(done, error.cause));
            }
            let (at, left) = (at + error.done as usize, left - error.done);
            match self.poison_marked(at, left, wake) {
                Ok(0) => return Err(stopped(done, Cause::AlreadyThere)),
                Ok(marked) => done += marked,
                Err(cause) => return Err(stopped(done, cause)),
            }
        }
        Ok(())
    }

    /// Poisons pages that there are not, and that have a mark, from an address on: how much, up to the first page that there
    /// is. A mark alone is taken away, so that no page that there is loses its protection; that is sure as long as nothing is
    /// filled, for who touches one waits, with a mark or without.
    fn poison_marked(&self, at: usize, size: u64, wake: Wake) -> Result<u64, Cause> {
        let protecting = self.registered.nothing_is_filled();
        let absent = self.registered.absent(at, size).map_err(Cause::Refused)?;
        if absent == 0 {
            return Ok(0);
        }
        let of = &self.registered;
        // SAFETY: whole pages of the registration, as the caller has checked; nobody has them.
        unsafe { of.operate(Call::WriteProtect, at, absent, 0, UNPROTECT_LATER) }
            .map_err(|error| error.cause)?;
        // SAFETY: as above.
        let poisoned = unsafe { of.operate(Call::Poison, at, absent, 0, wake.bits(DONTWAKE)) };
        let Err(error) = poisoned else {
            return Ok(absent);
        };
        if *protecting {
            let (at, size) = (at + error.done as usize, absent - error.done);
            // SAFETY: as above. That it is refused leaves no more unprotected than it was: nothing, of memory that is not there.
            let _ = unsafe { of.operate(Call::WriteProtect, at, size, 0, MODE_PROTECT) };
        }
        match (error.done, error.cause) {
            // Protected again meanwhile, or in swap.
            (0, Cause::AlreadyThere) => Err(Cause::Changing),
            (0, cause) => Err(cause),
            (done, _) => Ok(done),
        }
    }

    /// Moves `size` bytes of pages in from another mapping of private anonymous memory, from `start` in it
    /// (`UFFDIO_MOVE`): no copy is made, and the source reads as zeros afterwards. A page of the source that is not there
    /// is skipped if `skip_holes`, and is [`Cause::NotRegistered`] otherwise.
    ///
    /// # Errors
    /// [`OpError`], which says how much is moved; [`Cause::Pinned`] of a page that is in use elsewhere, and
    /// [`Cause::Unprotected`] while a [`ProtectRole`] is protecting: copy these.
    pub fn move_from(
        &self,
        offset: u64,
        source: &Mapping,
        start: u64,
        size: u64,
        skip_holes: bool,
        wake: Wake,
    ) -> Result<(), OpError> {
        let at = self.registered.address(Call::Move, offset, size)?;
        let source = within(source, start, size).ok_or(self.out_of_range(Call::Move, at, size))?;
        if !self.registered.has(Features::MOVE) {
            return Err(self.refused(Call::Move, at, size));
        }
        let protecting = self.registered.protecting();
        if *protecting {
            return Err(OpError {
                cause: Cause::Unprotected,
                ..self.out_of_range(Call::Move, at, size)
            });
        }
        let mode = wake.bits(DONTWAKE) | if skip_holes { ALLOW_HOLES } else { 0 };
        // SAFETY: checked to be whole pages of the registration, and of a mapping, which is guest memory as well: that
        // its contents change behind everybody's back is its nature.
        unsafe { self.registered.operate(Call::Move, at, size, source, mode) }
    }

    /// Wakes who sleeps on these pages (`UFFDIO_WAKE`). Who finds no page sleeps again.
    ///
    /// # Errors
    /// [`OpError`].
    pub fn wake(&self, range: Range<u64>) -> Result<(), OpError> {
        let size = range.end.saturating_sub(range.start);
        let at = self.registered.address(Call::Wake, range.start, size)?;
        // SAFETY: checked to be whole pages of the registration; waking changes no memory.
        unsafe { self.registered.operate(Call::Wake, at, size, 0, 0) }
    }

    fn out_of_range(&self, call: Call, at: usize, size: u64) -> OpError {
        OpError {
            call,
            at: Hva(at),
            size,
            done: 0,
            cause: Cause::OutOfRange,
        }
    }

    /// What a kernel without the operation says.
    fn refused(&self, call: Call, at: usize, size: u64) -> OpError {
        OpError {
            cause: Cause::Refused(crate::Errno(libc::EINVAL)),
            ..self.out_of_range(call, at, size)
        }
    }
}

impl Drop for FillRole {
    fn drop(&mut self) {
        self.registered.take_back(FILL);
    }
}

/// The address of a part of a mapping.
fn within(mapping: &Mapping, start: u64, size: u64) -> Option<usize> {
    let end = start.checked_add(size)?;
    (end <= mapping.size()).then(|| mapping.host().0 + start as usize)
}

/// The role of a snapshot or a dirty log: write-protects the pages of a registration. Offsets and sizes as of
/// [`FillRole`].
///
/// Dropped, the protection of all of the registration is taken away, and who waited goes on. Where the kernel refuses
/// that, [`end`](Self::end) says so; dropping tries again while the memory [is being changed](Cause::Changing), for as
/// long as another thread may need to read the event, and then wakes who waits, so that each fault is told again: whoever
/// reads it borrows the role once more, and ends it.
pub struct ProtectRole {
    registered: Arc<Registered>,
    mapping: Arc<Mapping>,
    /// Whether nothing is protected any more.
    ended: bool,
}

/// A role that was not ended: here it is again, and protects as before.
#[derive(Debug, Error)]
#[error("the protection was not taken away: {reason}")]
pub struct EndError {
    /// It.
    pub role: ProtectRole,
    /// Why.
    #[source]
    pub reason: OpError,
}

impl ProtectRole {
    pub(super) fn lend(
        registered: &Arc<Registered>,
        mapping: &Arc<Mapping>,
    ) -> Result<Self, LendError> {
        registered.lend(PROTECT, Modes::WRITE_PROTECT | Modes::ASYNC_WRITE_PROTECT)?;
        Ok(Self {
            registered: Arc::clone(registered),
            mapping: Arc::clone(mapping),
            ended: false,
        })
    }

    /// Its size in bytes: that of the registration.
    pub fn size(&self) -> u64 {
        self.registered.size()
    }

    /// The memory, to read what is protected: [`Mapping`] of the registration.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Whether a write to a protected page waits for [`unprotect`](Self::unprotect); if not, it takes the protection
    /// away by itself, and nobody is told.
    pub fn is_synchronous(&self) -> bool {
        self.registered.modes().contains(Modes::WRITE_PROTECT)
    }

    /// Protects pages against writes (`UFFDIO_WRITEPROTECT`); and from now on what a [`FillRole`] brings comes
    /// protected, in all of the registration. Takes 20 ms for 1 GiB of pages of 4 KiB.
    ///
    /// Of anonymous memory, pages that are not there are protected only with [`Features::WP_UNPOPULATED`]; shared memory
    /// needs nothing for it.
    ///
    /// # Errors
    /// [`OpError`]; what was protected of the range before the refusal may stay so.
    pub fn protect(&self, range: Range<u64>) -> Result<(), OpError> {
        let size = range.end.saturating_sub(range.start);
        let at = self
            .registered
            .address(Call::WriteProtect, range.start, size)?;
        // First, and after whatever is being filled unprotected: that is protected below.
        self.registered.set_protecting(true);
        // SAFETY: checked to be whole pages of the registration; who writes them waits, and no more.
        unsafe {
            self.registered
                .operate(Call::WriteProtect, at, size, 0, MODE_PROTECT)
        }
    }

    /// Takes the protection of pages away.
    ///
    /// # Errors
    /// [`OpError`].
    pub fn unprotect(&self, range: Range<u64>, wake: Wake) -> Result<(), OpError> {
        let size = range.end.saturating_sub(range.start);
        let at = self
            .registered
            .address(Call::WriteProtect, range.start, size)?;
        // SAFETY: checked to be whole pages of the registration.
        unsafe {
            self.registered
                .operate(Call::WriteProtect, at, size, 0, wake.bits(UNPROTECT_LATER))
        }
    }
}

impl ProtectRole {
    /// Ends it, as dropping does, and says if it could not. Pages that are brought at the same time wait for it, 20 ms for
    /// 1 GiB of pages of 4 KiB.
    ///
    /// # Errors
    /// [`EndError`], with the role: [`Cause::Changing`] while an event has not been read, and then nothing has changed;
    /// after another refusal a part of the protection may be gone.
    pub fn end(mut self) -> Result<(), Box<EndError>> {
        let ended = self
            .registered
            .end_protecting(|| self.unprotect(0..self.size(), Wake::Now));
        match ended {
            Ok(()) => {
                self.ended = true;
                Ok(())
            }
            Err(reason) => Err(Box::new(EndError { role: self, reason })),
        }
    }

    /// How often a role that is dropped asks again, each time after others had their turn. Not for ever: the thread that
    /// drops it may be the one that reads the events.
    const TRIES: usize = 1000;

    fn end_at_last(&self) {
        // First, and after whatever is being filled protected: its protection is taken away below. The other way round a
        // page could stay protected with nobody to hear of its writer.
        self.registered.set_protecting(false);
        let mut ended = self.unprotect(0..self.size(), Wake::Now);
        for _ in 0..Self::TRIES {
            match ended {
                Err(OpError {
                    cause: Cause::Changing,
                    ..
                }) => thread::yield_now(),
                _ => break,
            }
            ended = self.unprotect(0..self.size(), Wake::Now);
        }
        if let Err(error) = ended {
            log::error!("{error}; who waits for it is woken, and told of again");
            // Protected or not, nobody sleeps on a fault whose message went to a holder of the role that is gone.
            if let Err(errno) = self.registered.wake_all() {
                log::error!("UFFDIO_WAKE: {errno}");
            }
        }
    }
}

impl Drop for ProtectRole {
    fn drop(&mut self) {
        if !self.ended {
            self.end_at_last();
        }
        self.registered.take_back(PROTECT);
    }
}

impl fmt::Debug for FillRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FillRole").field(&self.registered).finish()
    }
}

impl fmt::Debug for ProtectRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ProtectRole")
            .field(&self.registered)
            .finish()
    }
}
