// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Registration`]: a range of a mapping whose faults one userfaultfd is told of; what lends the roles.

use super::outcome::{Step, settle};
use super::roles::{FillRole, ProtectRole};
use super::uffd::Inner;
use super::{Call, Cause, Features, LendError, Modes, OpError, RegisterError};
use crate::{Backing, Errno, Hva, MapError, Mapping, Mechanism, Support};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use thiserror::Error;
use vm_memory::GuestAddress;

/// The role of filling is lent.
pub(super) const FILL: u8 = 1;
/// The role of protecting is lent.
pub(super) const PROTECT: u8 = 2;

/// Pages of 4 KiB that are looked at at once.
const BATCH: usize = 512;

/// A registered range. Dropped, it is unregistered, as soon as no role of it is lent any more; and its memory is
/// unmapped after that at the earliest.
///
/// Who sleeps on a page of it wakes then, and the kernel serves the page as if there had never been a userfaultfd: a
/// page that was still to be fetched reads as **zeros** (of a file, as the file). So before a registration with missing
/// pages goes, either the guest is stopped for good, or what is missing has been [poisoned](FillRole::poison).
#[must_use = "dropping a registration ends it"]
pub struct Registration {
    registered: Arc<Registered>,
    /// That of `registered`.
    mapping: Arc<Mapping>,
}

/// A registration that was not ended: here it is again, unchanged.
#[derive(Debug, Error)]
#[error("{:#x}..{:#x} was not unregistered: {reason}", registration.host_range().start, registration.host_range().end)]
pub struct UnregisterError {
    /// It.
    pub registration: Registration,
    /// Why.
    #[source]
    pub reason: UnregisterReason,
}

/// Why a registration was not ended.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnregisterReason {
    /// A role of it is lent.
    #[error("a role of it is lent")]
    Lent,
    /// The kernel refused.
    #[error(transparent)]
    Refused(Errno),
}

/// Whose memory it is.
pub(super) enum Memory {
    Ours(Arc<Mapping>),
    /// Another process's: nothing of it can be looked at, and what is known of it was told.
    Foreign {
        page_size: u64,
    },
}

pub(super) struct Registered {
    uffd: Arc<Inner>,
    memory: Memory,
    /// Addresses.
    range: Range<usize>,
    /// The roles that are lent. Each is taken and given back by one atomic operation; `AcqRel` there, so that who
    /// borrows a role sees all that its last holder did.
    lent: AtomicU8,
    /// Whether pages that are filled come write-protected. Held for reading while a page is filled, for writing while
    /// it is changed: so no page that is being filled unprotected outlives the moment at which protection begins.
    protecting: RwLock<bool>,
    /// A page of zeros, for memory that has no `UFFDIO_ZEROPAGE`, or comes write-protected.
    zeros: OnceLock<Mapping>,
    /// Whether the kernel has it no more.
    ended: bool,
}

impl Registration {
    pub(super) fn new(
        uffd: &Arc<Inner>,
        mapping: &Arc<Mapping>,
        range: Range<u64>,
        modes: Modes,
    ) -> Result<Self, RegisterError> {
        if uffd.foreign {
            return Err(RegisterError::Whose { foreign: true });
        }
        let (page_size, size) = (mapping.page_size(), mapping.size());
        // A mapping that is a part of another may begin within a page.
        let host = mapping.host().0 as u64;
        let is_page = |offset: u64| host.wrapping_add(offset).is_multiple_of(page_size);
        if !is_page(range.start)
            || !is_page(range.end)
            || range.start >= range.end
            || range.end > size
        {
            let Range { start, end } = range;
            return Err(RegisterError::Range {
                start,
                end,
                page_size,
                size,
                host: mapping.host(),
            });
        }
        let start = mapping.host().0;
        let range = start + range.start as usize..start + range.end as usize;
        modes.check(mapping.kind(), uffd.available, uffd.enabled)?;
        let mut ranges = uffd.ranges();
        if let Some(with) = ranges.overlap(&range) {
            return Err(RegisterError::Overlap { range, with });
        }
        register(uffd, &range, modes)?;
        ranges.insert(range.clone(), modes);
        drop(ranges);
        Ok(Self {
            registered: Arc::new(Registered {
                uffd: Arc::clone(uffd),
                memory: Memory::Ours(Arc::clone(mapping)),
                range,
                lent: AtomicU8::new(0),
                protecting: RwLock::new(false),
                zeros: OnceLock::new(),
                ended: false,
            }),
            mapping: Arc::clone(mapping),
        })
    }

    /// The addresses, in this process.
    pub fn host_range(&self) -> Range<usize> {
        self.registered.range.clone()
    }

    /// How it is registered now.
    pub fn modes(&self) -> Modes {
        self.registered.modes()
    }

    /// The memory that it is a part of.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Registers it in further modes as well, without a moment in which a fault of the present ones goes untold: a
    /// snapshot that begins while memory is still being restored. Modes are not taken away again: the kernel could do it
    /// only by unregistering, and in that moment a missing page would read as zeros. A mode whose role is given back
    /// costs nothing but that it stays.
    ///
    /// # Errors
    /// [`RegisterError`]; then nothing has changed.
    pub fn add(&self, modes: Modes) -> Result<(), RegisterError> {
        let Registered { uffd, range, .. } = &*self.registered;
        let mapping = &self.mapping;
        let mut ranges = uffd.ranges();
        let now = ranges.modes(range.start);
        let wanted = now | modes;
        wanted.check(mapping.kind(), uffd.available, uffd.enabled)?;
        if wanted != now {
            register(uffd, range, wanted)?;
            ranges.set_modes(range.start, wanted);
        }
        Ok(())
    }

    /// Borrows the role of a pager: it fills pages.
    ///
    /// # Errors
    /// [`LendError`], if someone has it, or neither [`Modes::MISSING`] nor [`Modes::MINOR`] is registered.
    pub fn lend_fill(&self) -> Result<FillRole, LendError> {
        FillRole::lend(&self.registered)
    }

    /// Borrows the role of a snapshot or a dirty log: it write-protects pages.
    ///
    /// # Errors
    /// [`LendError`], if someone has it, or no write-protection is registered.
    pub fn lend_protect(&self) -> Result<ProtectRole, LendError> {
        ProtectRole::lend(&self.registered, &self.mapping)
    }

    /// Wakes whoever sleeps on a page of it. Who still has no page sleeps again, and is told of again.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn wake_all(&self) -> Result<(), Errno> {
        self.registered.wake_all()
    }

    /// Ends it, as dropping does, and says if it could not. Blocks as long as it takes to remove the write-protection
    /// of what is protected (20 ms for 1 GiB).
    ///
    /// # Errors
    /// [`UnregisterError`], with the registration: a role is lent, or the kernel refused.
    pub fn unregister(self) -> Result<(), Box<UnregisterError>> {
        let mapping = self.mapping;
        let refused = |registered, reason| {
            Err(Box::new(UnregisterError {
                registration: Self {
                    registered,
                    mapping,
                },
                reason,
            }))
        };
        let mut registered = match Arc::try_unwrap(self.registered) {
            Ok(registered) => registered,
            Err(registered) => return refused(registered, UnregisterReason::Lent),
        };
        match registered.end() {
            Ok(()) => Ok(()),
            Err(errno) => refused(Arc::new(registered), UnregisterReason::Refused(errno)),
        }
    }
}

fn register(uffd: &Inner, range: &Range<usize>, modes: Modes) -> Result<(), RegisterError> {
    let size = range.end - range.start;
    let mut argument = [range.start as u64, size as u64, modes.to_kernel(), 0];
    // SAFETY: the range is guest memory of a mapping; how its faults are served, a guest cannot rely on.
    unsafe { uffd.call(Call::Register, &mut argument) }.map_err(|errno| {
        let range = range.clone();
        match errno.0 {
            libc::EBUSY => RegisterError::Busy { range },
            _ => RegisterError::Refused { range, errno },
        }
    })
}

impl Registered {
    /// Of another process, which has registered it.
    pub fn foreign(uffd: &Arc<Inner>, range: Range<usize>, page_size: u64) -> Self {
        Self {
            uffd: Arc::clone(uffd),
            memory: Memory::Foreign { page_size },
            range,
            lent: AtomicU8::new(0),
            protecting: RwLock::new(false),
            zeros: OnceLock::new(),
            ended: false,
        }
    }

    pub fn lend(&self, role: u8, one_of: Modes) -> Result<(), LendError> {
        let what = if role == FILL { "fills" } else { "protects" };
        let range = self.range.clone();
        let modes = self.modes();
        if !modes.intersects(one_of) {
            return Err(LendError::NoMode {
                role: what,
                range,
                wanted: one_of,
                modes,
            });
        }
        // Pairs with the one in `take_back`.
        match self.lent.fetch_or(role, Ordering::AcqRel) & role {
            0 => Ok(()),
            _ => Err(LendError::Lent { role: what, range }),
        }
    }

    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    pub fn modes(&self) -> Modes {
        self.uffd.ranges().modes(self.range.start)
    }

    pub fn size(&self) -> u64 {
        (self.range.end - self.range.start) as u64
    }

    pub fn host_start(&self) -> usize {
        self.range.start
    }

    pub fn page_size(&self) -> u64 {
        match &self.memory {
            Memory::Ours(mapping) => mapping.page_size(),
            Memory::Foreign { page_size } => *page_size,
        }
    }

    /// Whether the kernel has a feature.
    pub fn has(&self, feature: Features) -> bool {
        self.uffd.available.contains(feature)
    }

    /// Whether `UFFDIO_ZEROPAGE` works on this memory; of a consumer's own mapping that is not known, and copying works.
    /// Of another process's pages the size says it: hugetlb pages alone have none.
    pub fn has_zero_page(&self) -> bool {
        match &self.memory {
            Memory::Ours(mapping) => !matches!(
                mapping.kind().support(Mechanism::ZeroPage),
                Support::No(_) | Support::Unknown
            ),
            Memory::Foreign { page_size } => *page_size == crate::PAGE_SIZE,
        }
    }

    /// Whether pages come write-protected, for as long as the answer is held.
    pub fn protecting(&self) -> RwLockReadGuard<'_, bool> {
        self.protecting
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether pages come write-protected; and nothing is filled for as long as the answer is held.
    pub fn nothing_is_filled(&self) -> RwLockWriteGuard<'_, bool> {
        self.protecting
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a page that there is not may have a mark that says how it is to come: of another process's, nobody knows.
    pub fn has_marks(&self) -> bool {
        let protects = Modes::WRITE_PROTECT | Modes::ASYNC_WRITE_PROTECT;
        matches!(self.memory, Memory::Ours(_)) && self.modes().intersects(protects)
    }

    /// How many bytes of pages from an address on there are not, up to the first that there is, of `size` at most.
    pub fn absent(&self, at: usize, size: u64) -> Result<u64, Errno> {
        let each = (self.page_size() / crate::PAGE_SIZE) as usize;
        let pages = (size / crate::PAGE_SIZE) as usize;
        let mut present = vec![0; pages.min(each.max(BATCH))];
        self.uffd.host.present(at, &mut present)?;
        let absent = present.chunks(each).take_while(|page| {
            let there = |page: &u8| *page != 0;
            !page.iter().any(there)
        });
        Ok(absent.count() as u64 * self.page_size())
    }

    /// Changes it, after whatever is being filled.
    pub fn set_protecting(&self, on: bool) {
        *self
            .protecting
            .write()
            .unwrap_or_else(PoisonError::into_inner) = on;
    }

    /// Turns it off if `unprotect` succeeds, and changes nothing if not: nothing is filled meanwhile.
    pub fn end_protecting<E>(&self, unprotect: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut protecting = self
            .protecting
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        unprotect()?;
        *protecting = false;
        Ok(())
    }

    pub fn wake_all(&self) -> Result<(), Errno> {
        let mut argument = [self.range.start as u64, self.size()];
        // SAFETY: the range is of a registration, and waking changes no memory.
        unsafe { self.uffd.call(Call::Wake, &mut argument) }
    }

    pub fn take_back(&self, role: u8) {
        // Pairs with the one in `lend`.
        self.lent.fetch_and(!role, Ordering::AcqRel);
    }

    /// A page of zeros.
    pub fn zeros(&self) -> Result<&Mapping, MapError> {
        if let Some(zeros) = self.zeros.get() {
            return Ok(zeros);
        }
        let zeros = Mapping::new(&Backing::anonymous(self.page_size()), GuestAddress(0))?;
        // Two that are made at once are alike.
        Ok(self.zeros.get_or_init(|| zeros))
    }

    /// The address of `size` bytes from `offset`, if they are whole pages of it.
    pub fn address(&self, call: Call, offset: u64, size: u64) -> Result<usize, OpError> {
        let page = self.page_size();
        let end = offset.checked_add(size);
        let whole = offset.is_multiple_of(page) && size.is_multiple_of(page) && size > 0;
        let address = self.range.start.wrapping_add(offset as usize);
        if whole && end.is_some_and(|end| end <= self.size()) {
            Ok(address)
        } else {
            Err(OpError {
                call,
                at: Hva(address),
                size,
                done: 0,
                cause: Cause::OutOfRange,
            })
        }
    }

    /// Runs an operation on `size` bytes from `at` to its end, as often as the kernel says "again" after a part of it.
    ///
    /// # Safety
    /// `size` bytes from `at` are whole pages of this registration, and `source`, if the call takes one, has as many
    /// readable bytes; for [`Call::Move`], guest memory.
    pub unsafe fn operate(
        &self,
        call: Call,
        at: usize,
        size: u64,
        source: usize,
        mode: u64,
    ) -> Result<(), OpError> {
        let mut done = 0u64;
        loop {
            let (from, left) = (at as u64 + done, size - done);
            let source = source as u64 + done;
            let mut argument = match call {
                Call::Copy | Call::Move => [from, source, left, mode, 0],
                _ => [from, left, mode, 0, 0],
            };
            let words = call.words();
            let argument = argument.get_mut(..words).unwrap_or_default();
            // SAFETY: the caller's promise, of the part that is left.
            let result = unsafe { self.uffd.call(call, argument) };
            // The last word is the kernel's count, where the call has one.
            let field = match call {
                Call::WriteProtect | Call::Wake => 0,
                _ => argument.last().map_or(0, |field| *field as i64),
            };
            match settle(result, field, left) {
                Step::Done => return Ok(()),
                Step::GoOn(part) => done += part,
                Step::Stop(cause) => {
                    return Err(OpError {
                        call,
                        at: Hva(at),
                        size,
                        done,
                        cause,
                    });
                }
            }
        }
    }

    /// Unregisters it, once.
    fn end(&mut self) -> Result<(), Errno> {
        if self.ended {
            return Ok(());
        }
        let mut ranges = self.uffd.ranges();
        if let Memory::Foreign { .. } = self.memory {
            // It stays registered: that is the other process's affair, and what is missing would read as zeros there.
            ranges.remove(self.range.start);
            self.ended = true;
            return Ok(());
        }
        let mut argument = [self.range.start as u64, self.size()];
        // SAFETY: the range is of this registration and nobody fills it any more; its memory is a guest's, which cannot
        // rely on how its faults are served.
        unsafe { self.uffd.call(Call::Unregister, &mut argument) }?;
        ranges.remove(self.range.start);
        drop(ranges);
        self.ended = true;
        Ok(())
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Err(errno) = self.end() {
            // It stays noted, so that nobody registers it again; closing the descriptor ends it.
            log::error!(
                "UFFDIO_UNREGISTER of {:#x}..{:#x}: {errno}",
                self.range.start,
                self.range.end
            );
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.registered.fmt(f)
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Registration");
        debug.field("range", &self.range).finish_non_exhaustive()
    }
}
