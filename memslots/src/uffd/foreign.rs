// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`ForeignRange`]: registered memory of another process, which has handed its userfaultfd to this one.

use super::registration::Registered;
use super::{FillRole, LendError, Modes, RegisterError, Uffd};
use crate::PAGE_SIZE;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A range of another process's memory that it has registered with a userfaultfd, and told this process of.
///
/// Dropped, nothing changes there: who sleeps on a page sleeps on, until another copy of the descriptor answers, or all of
/// them are closed. That the range is registered, and how, is the other process's word: what it is not is refused when it
/// is filled ([`Cause::NotRegistered`](super::Cause)), and when the process has ended, all is
/// ([`Cause::ProcessGone`](super::Cause)). Of that end the userfaultfd tells nothing: watch the process (the socket that the
/// descriptor came through, a pidfd).
///
/// ```
/// use memslots::uffd::fake::{FakeUffd, Touch};
/// use memslots::uffd::{Call, Features, ForeignRange, Modes, Uffd, Wake};
/// use memslots::{Backing, Mapping};
/// use std::sync::Arc;
/// use vm_memory::GuestAddress;
///
/// // The other process has opened and registered it.
/// let fake = FakeUffd::new(Features::from_bits(0x1ffff));
/// let theirs = Uffd::on(|| fake.open(), Features::NONE, Features::NONE)?;
/// let memory = Arc::new(Mapping::new(&Backing::anonymous(0x4000), GuestAddress(0))?);
/// let registration = theirs.register_all(&memory, Modes::MISSING)?;
///
/// // This one knows the addresses.
/// let uffd = Uffd::foreign(fake.open_again(), Features::from_bits(0x1ffff));
/// let range = ForeignRange::new(&uffd, registration.host_range(), 4096, Modes::MISSING)?;
/// assert_eq!(fake.touch(memory.host(), false), Touch::Sleeps);
/// range.lend_fill()?.copy(0, &[7; 4096], Wake::Now)?;
/// assert_eq!(fake.touch(memory.host(), false), Touch::Done);
/// drop(range);
/// assert_eq!(fake.ranges().len(), 1, "it is registered still");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ForeignRange {
    registered: Arc<Registered>,
}

impl ForeignRange {
    /// The range of these addresses in the process of `uffd`, with pages of so many bytes: 4096 or a hugetlb size.
    ///
    /// # Errors
    /// [`RegisterError::Whose`], [`RegisterError::ForeignRange`], [`RegisterError::Overlap`], [`RegisterError::NoMode`].
    pub fn new(
        uffd: &Uffd,
        range: Range<usize>,
        page_size: u64,
        modes: Modes,
    ) -> Result<Self, RegisterError> {
        let inner = &uffd.inner;
        if !inner.foreign {
            return Err(RegisterError::Whose { foreign: false });
        }
        if !modes.intersects(Modes::MISSING | Modes::MINOR) {
            return Err(RegisterError::NoMode);
        }
        let whole = (range.start as u64 | range.end as u64).is_multiple_of(page_size.max(1));
        let fits = page_size.is_power_of_two() && page_size >= PAGE_SIZE;
        if !whole || !fits || range.start >= range.end {
            return Err(RegisterError::ForeignRange { range, page_size });
        }
        let mut ranges = inner.ranges();
        if let Some(with) = ranges.overlap(&range) {
            return Err(RegisterError::Overlap { range, with });
        }
        ranges.insert(range.clone(), modes);
        drop(ranges);
        Ok(Self {
            registered: Arc::new(Registered::foreign(inner, range, page_size)),
        })
    }

    /// The addresses, in the other process.
    pub fn host_range(&self) -> Range<usize> {
        self.registered.range()
    }

    /// The modes that it was said to be registered in.
    pub fn modes(&self) -> Modes {
        self.registered.modes()
    }

    /// Borrows the role of a pager: it fills pages.
    ///
    /// # Errors
    /// [`LendError::Lent`].
    pub fn lend_fill(&self) -> Result<FillRole, LendError> {
        FillRole::lend(&self.registered)
    }
}

impl fmt::Debug for ForeignRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignRange")
            .field("range", &self.host_range())
            .field("page_size", &self.registered.page_size())
            .finish()
    }
}
