// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What knows about writes: one trait over every kind of log, and several of them as one.
//!
//! | source | sees | how it forgets |
//! | --- | --- | --- |
//! | `KvmBitmap` | the guest, and KVM for it | with the look, all of the slot in one call |
//! | `KvmManualBitmap` | the same | in chunks, and only what was handed out |
//! | `RingSource` | the same, by vCPU | all rings of the VM are reaped and reset together |
//! | [`HostWrites`](crate::HostWrites) | this process, through vm-memory | word by word |
//! | [`SharedSource`](crate::SharedSource) | other processes that log (vhost, vhost-user) | word by word |
//! | `WrittenPages` | whoever writes through this process's mapping, KVM included | with the look, in chunks |

use crate::layout::WORD_BITS;
use crate::{DirtyBitmap, Error, PageRun};

/// Something that knows which pages of one slot were written since it was last asked.
///
/// # Contract
/// [`take`](Self::take) *moves* bits: what it adds to `into` it no longer holds, and what it keeps
/// it will hand out next time. On an error every bit must be in one of the two places (both is
/// fine); where the source cannot know (the kernel took bits and lost them on the way), it adds all
/// pages that may be concerned. The bits that `into` had before stay.
///
/// When a call returns `Ok`, each page that it handed out is watched again: a write from then on is
/// told next time. So contents are read after it, never before.
///
/// A source that can forget a part at a time splits `take` in two, [`look`](Self::look) and
/// [`take_part`](Self::take_part): a copier then has a page watched again right before it reads it,
/// and what the guest writes while earlier parts are on the wire is sent once and not twice.
pub trait DirtySource {
    /// How many pages this source covers; constant.
    fn pages(&self) -> u64;

    /// Moves what became dirty into `into`, which covers [`pages`](Self::pages) pages.
    ///
    /// # Errors
    /// The source's own; no bit is lost by it.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error>;

    /// Begins a round of parts. A source that hands out everything at once does it here; one that
    /// can do parts notes what is dirty, and moves nothing.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn look(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        self.take(into)
    }

    /// Moves what the last [`look`](Self::look) noted in `part` into `into`. `part` begins at a
    /// multiple of 64 pages, and ends at one or at the slot's end.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn take_part(&mut self, part: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        let _ = (part, into);
        Ok(())
    }
}

impl<S: DirtySource + ?Sized> DirtySource for Box<S> {
    fn pages(&self) -> u64 {
        (**self).pages()
    }

    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        (**self).take(into)
    }

    fn look(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        (**self).look(into)
    }

    fn take_part(&mut self, part: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        (**self).take_part(part, into)
    }
}

/// Two writers, one view: for instance KVM's bitmap and [`HostWrites`](crate::HostWrites).
///
/// If the second fails, what the first gave is in the bitmap already and stays there.
impl<A: DirtySource, B: DirtySource> DirtySource for (A, B) {
    /// The first source's; [`take`](DirtySource::take) fails where the second differs.
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.0.pages(), self.1.pages())?;
        self.0.take(into)?;
        self.1.take(into)
    }

    fn look(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.0.pages(), self.1.pages())?;
        self.0.look(into)?;
        self.1.look(into)
    }

    fn take_part(&mut self, part: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        self.0.take_part(part, into)?;
        self.1.take_part(part, into)
    }
}

/// Any number of writers of one slot, chosen when tracking starts: KVM's log, the VMM's own writes,
/// the back ends that happen to be in other processes.
///
/// ```
/// use dirty_log::{DirtyBitmap, DirtySource, HostWrites, Union};
/// use vm_memory::bitmap::Bitmap;
/// let (net, disk) = (HostWrites::new(64)?, HostWrites::new(64)?);
/// let mut all = Union::new(64).with(net.clone())?.with(disk.clone())?;
/// net.mark_dirty(0x1000, 1);
/// disk.mark_dirty(0x3000, 1);
/// let mut dirty = DirtyBitmap::new(64)?;
/// all.take(&mut dirty)?;
/// assert_eq!(dirty.count(), 2);
/// # Ok::<(), dirty_log::Error>(())
/// ```
#[derive(Default)]
pub struct Union {
    pages: u64,
    sources: Vec<Box<dyn DirtySource + Send>>,
}

impl Union {
    /// A union of nothing, for a slot of `pages` pages: clean for ever.
    pub const fn new(pages: u64) -> Self {
        Self {
            pages,
            sources: Vec::new(),
        }
    }

    /// The union, and `source`.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] where it covers another number of pages.
    pub fn with(mut self, source: impl DirtySource + Send + 'static) -> Result<Self, Error> {
        self.add(source)?;
        Ok(self)
    }

    /// Adds a source: one that begins to log while a migration runs, a back end that connects.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] where it covers another number of pages; nothing is added.
    pub fn add(&mut self, source: impl DirtySource + Send + 'static) -> Result<(), Error> {
        fits(self.pages, source.pages())?;
        self.sources.push(Box::new(source));
        Ok(())
    }
}

impl DirtySource for Union {
    fn pages(&self) -> u64 {
        self.pages
    }

    /// Asks each in turn. After one that fails the others are not asked, and keep what they have.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        self.sources
            .iter_mut()
            .try_for_each(|source| source.take(into))
    }

    fn look(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        self.sources
            .iter_mut()
            .try_for_each(|source| source.look(into))
    }

    fn take_part(&mut self, part: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        self.sources
            .iter_mut()
            .try_for_each(|source| source.take_part(part, into))
    }
}

impl std::fmt::Debug for Union {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Union")
            .field("pages", &self.pages)
            .field("sources", &self.sources.len())
            .finish()
    }
}

/// Checks that two sizes are one.
pub(crate) const fn fits(want: u64, got: u64) -> Result<(), Error> {
    if want == got {
        Ok(())
    } else {
        Err(Error::SizeMismatch { want, got })
    }
}

/// The parts of `pages` pages, each of `each` (rounded up to whole words), the last one shorter.
pub(crate) fn part_after(done: u64, each: u64, pages: u64) -> Option<PageRun> {
    if done >= pages {
        return None;
    }
    let each = each.clamp(1, 1 << 62).next_multiple_of(WORD_BITS);
    Some(PageRun {
        first: done,
        pages: each.min(pages - done),
    })
}
