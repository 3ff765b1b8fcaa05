// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's bitmap with manual protect: looking forgets nothing, and clearing is a call of its own.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` in force (`LogChoice` enables it), `KVM_GET_DIRTY_LOG`
//! copies the bits and leaves them; `KVM_CLEAR_DIRTY_LOG` clears those that it is given and
//! write-protects their pages again (api.rst 4.8, 4.117, 7.9). So:
//!
//! * nothing is lost where the copy fails, not even before `EFAULT`;
//! * the MMU lock is held for a chunk, not for the slot;
//! * only what is handed out is cleared, and a page is watched again right before it is read.
//!
//! With *initially set*, logging starts with every bit set and no page protected: starting costs
//! nothing, the first round hands out the whole slot, and pages are protected as their chunks are
//! cleared. A migration sends everything once anyway; a snapshot that wants the changes since its start
//! does not want it.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use memslots::{SlotExtent, SlotId};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_ref};

use super::{GetDirtyLog, LogBuffer};
use crate::layout::{WORD_BITS, words_for};
use crate::source::{fits, part_after};
use crate::{DirtyBitmap, DirtySource, Error, PageRun};

const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    KVMIO,
    0xc0,
    size_of::<kvm_clear_dirty_log>() as u32,
);

/// Forgets dirty bits that were handed out, and watches their pages again: `KVM_CLEAR_DIRTY_LOG`
/// (Documentation/virt/kvm/api.rst, 4.117).
pub trait ClearDirtyLog: GetDirtyLog {
    /// Clears the bits that are set in `bits`, whose first is that of page `first` (a multiple of 64).
    /// `pages` is a multiple of 64, or reaches the slot's end; `bits` are
    /// [`dirty_bitmap_bytes`](crate::dirty_bitmap_bytes) of it. Blocks while KVM write-protects those
    /// pages, with the VM's slot lock held, and its MMU lock.
    ///
    /// # Errors
    /// The errno; nothing is cleared then.
    fn clear_dirty_log(&self, slot: SlotId, first: u64, pages: u32, bits: &[u64])
    -> io::Result<()>;
}

impl ClearDirtyLog for VmFd {
    fn clear_dirty_log(
        &self,
        slot: SlotId,
        first: u64,
        pages: u32,
        bits: &[u64],
    ) -> io::Result<()> {
        if bits.len() < words_for(u64::from(pages)) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let request = kvm_clear_dirty_log {
            slot: slot.0,
            num_pages: pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                // The kernel reads it alone.
                dirty_bitmap: bits.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the fd is a VM's; the request and the bits outlive the call. The kernel reads
        // ALIGN(num_pages, 64) / 8 bytes of them, which the check above says are there.
        match unsafe { ioctl_with_ref(self, KVM_CLEAR_DIRTY_LOG, &request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl<T: ClearDirtyLog + ?Sized> ClearDirtyLog for &T {
    fn clear_dirty_log(
        &self,
        slot: SlotId,
        first: u64,
        pages: u32,
        bits: &[u64],
    ) -> io::Result<()> {
        (**self).clear_dirty_log(slot, first, pages, bits)
    }
}

impl<T: ClearDirtyLog + ?Sized> ClearDirtyLog for Arc<T> {
    fn clear_dirty_log(
        &self,
        slot: SlotId,
        first: u64,
        pages: u32,
        bits: &[u64],
    ) -> io::Result<()> {
        (**self).clear_dirty_log(slot, first, pages, bits)
    }
}

/// What KVM saw written in one slot of a VM with manual protect in force.
///
/// [`take`](DirtySource::take) looks, and clears what it found chunk by chunk; of a round of parts
/// ([`DirtyLog::parts`](crate::DirtyLog::parts)), each part is cleared when it is handed out.
///
/// What a round noted and did not hand out (it was dropped half-way, a clear was refused) the next look hands
/// out with what is new: KVM has it still, or, of a VM without manual protect, nobody else has.
#[derive(Debug)]
pub struct KvmManualBitmap<H> {
    host: H,
    slot: SlotExtent,
    /// What the last look found, less what has been cleared since.
    seen: LogBuffer,
    chunk: u64,
}

impl<H: ClearDirtyLog> KvmManualBitmap<H> {
    /// Pages that one `KVM_CLEAR_DIRTY_LOG` is about, unless it is chosen: 256 MiB of guest memory,
    /// of which a call write-protects what is dirty.
    pub const CHUNK: u64 = 1 << 16;

    /// A source for `slot` of the VM behind `host`. Maps the buffer; makes no ioctl.
    ///
    /// Of a VM *without* manual protect, which a source cannot ask KVM about, each look forgets what it
    /// found, in KVM, and write-protects the whole slot. No bit is lost by it as long as the source lives,
    /// which has what it did not hand out; dropped before that, it takes it along.
    ///
    /// # Errors
    /// [`Error::Buffer`] where the host has no memory for it.
    pub fn new(host: H, slot: SlotExtent) -> Result<Self, Error> {
        let seen = LogBuffer::new(slot.pages())?;
        Ok(Self {
            host,
            slot,
            seen,
            chunk: Self::CHUNK,
        })
    }

    /// The same with chunks of `pages` pages, rounded up to a multiple of 64.
    #[must_use]
    pub fn with_chunk(mut self, pages: u64) -> Self {
        self.chunk = pages.clamp(1, 1 << 31).next_multiple_of(WORD_BITS);
        self
    }

    /// The slot.
    pub fn slot(&self) -> &SlotExtent {
        &self.slot
    }

    /// Moves the bits of one chunk: into `into` first, so that they are in one of the two places
    /// whatever the ioctl says.
    fn take_chunk(&mut self, chunk: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        let (first, end) = (
            (chunk.first / WORD_BITS) as usize,
            words_for(chunk.end().min(self.seen.pages())),
        );
        let Some(words) = self.seen.words_mut().get_mut(first..end) else {
            return Ok(());
        };
        // The span from the first word that is not clean to the last: the kernel reads no more.
        let Some(from) = words.iter().position(|word| *word != 0) else {
            return Ok(());
        };
        let to = words
            .iter()
            .rposition(|word| *word != 0)
            .map_or(0, |at| at + 1);
        let Some(span) = words.get_mut(from..to) else {
            return Ok(());
        };
        into.merge_at(first + from, span);
        let start = (first + from) as u64 * WORD_BITS;
        let pages = (span.len() as u64 * WORD_BITS).min(self.slot.pages() - start);
        let slot = self.slot.id();
        self.host
            .clear_dirty_log(slot, start, pages as u32, span)
            .map_err(|source| Error::ClearDirtyLog {
                slot,
                first: start,
                pages,
                source,
            })?;
        // Else the next look would hand it out again.
        span.fill(0);
        Ok(())
    }
}

impl<H: ClearDirtyLog> DirtySource for KvmManualBitmap<H> {
    fn pages(&self) -> u64 {
        self.seen.pages()
    }

    /// One ioctl that copies, and one for each chunk in which something is dirty; no allocation.
    ///
    /// # Errors
    /// [`Error::GetDirtyLog`]: nothing was forgotten. [`Error::ClearDirtyLog`]: earlier chunks are in
    /// `into` and cleared, this one is in `into` and in KVM, later ones are noted here.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        self.look(into)?;
        self.take_part(
            PageRun {
                first: 0,
                pages: self.slot.pages(),
            },
            into,
        )
    }

    fn look(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.pages(), into.pages())?;
        let slot = self.slot.id();
        // The look writes over it, and of a VM without manual protect it is nowhere else.
        into.merge_at(0, self.seen.words());
        if let Err(source) = self.host.get_dirty_log(slot, &mut self.seen) {
            // What it wrote is not to be trusted, and would be handed out by the next look.
            self.seen.words_mut().fill(0);
            if source.raw_os_error() == Some(libc::EFAULT) {
                // True without manual protect alone, which the source cannot see.
                into.set_all();
            }
            return Err(Error::GetDirtyLog { slot, source });
        }
        Ok(())
    }

    fn take_part(&mut self, part: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.pages(), into.pages())?;
        let end = part.end().min(self.pages());
        let mut done = part.first;
        while let Some(chunk) = part_after(done, self.chunk, end) {
            self.take_chunk(chunk, into)?;
            done = chunk.end();
        }
        Ok(())
    }
}
