// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's side: ioctls, mappings, and the traits that stand for them in tests. Here is KVM's plain
//! bitmap; each other log has a file.
//!
//! All of the crate's `unsafe` is in this folder.

mod buffer;
mod choice;
mod manual;
#[cfg_attr(any(loom, miri), allow(dead_code))]
pub(crate) mod membarrier;
mod ring;
mod shared;
#[cfg(feature = "uffd")]
mod written;

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVMIO, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use memslots::{SlotExtent, SlotId};
use vmm_sys_util::ioctl::{_IOC_WRITE, ioctl_expr, ioctl_with_ref};

pub use buffer::LogBuffer;
pub use choice::{ChooseLog, LogChoice, LogInForce};
pub use manual::{ClearDirtyLog, KvmManualBitmap};
pub use ring::MappedRing;
pub use shared::SharedLog;
#[cfg(feature = "uffd")]
pub use written::{PageRegion, ScanPages, Scanned, WrittenPages};

use crate::source::fits;
use crate::{DirtyBitmap, DirtySource, Error};

const KVM_GET_DIRTY_LOG: libc::c_ulong =
    ioctl_expr(_IOC_WRITE, KVMIO, 0x42, size_of::<kvm_dirty_log>() as u32);

/// Hands out, and forgets, the dirty bits of one slot: `KVM_GET_DIRTY_LOG`
/// (Documentation/virt/kvm/api.rst, 4.8).
///
/// Implemented for [`VmFd`]; a test implements it with a fake that answers any errno.
pub trait GetDirtyLog {
    /// Writes the slot's dirty bits into `buffer` and forgets them. Blocks for as long as KVM
    /// write-protects the pages again, with the VM's slot lock held.
    ///
    /// # Errors
    /// The errno. Before `EFAULT` the kernel may have forgotten bits; before any other it has not.
    fn get_dirty_log(&self, slot: SlotId, buffer: &mut LogBuffer) -> io::Result<()>;
}

impl GetDirtyLog for VmFd {
    fn get_dirty_log(&self, slot: SlotId, buffer: &mut LogBuffer) -> io::Result<()> {
        let request = kvm_dirty_log {
            slot: slot.0,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: buffer.as_mut_ptr().cast(),
            },
        };
        // SAFETY: the fd is a VM's; the request outlives the call. The kernel writes as many bytes
        // as the slot has now, which it alone knows: from the buffer's start these reach at most
        // into the buffer's guard, where the copy ends with EFAULT (see `LogBuffer`).
        match unsafe { ioctl_with_ref(self, KVM_GET_DIRTY_LOG, &request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl<T: GetDirtyLog + ?Sized> GetDirtyLog for &T {
    fn get_dirty_log(&self, slot: SlotId, buffer: &mut LogBuffer) -> io::Result<()> {
        (**self).get_dirty_log(slot, buffer)
    }
}

impl<T: GetDirtyLog + ?Sized> GetDirtyLog for Arc<T> {
    fn get_dirty_log(&self, slot: SlotId, buffer: &mut LogBuffer) -> io::Result<()> {
        (**self).get_dirty_log(slot, buffer)
    }
}

/// What KVM saw the guest (and the kernel on its behalf) write in one slot.
///
/// The slot must have been created, or changed, with KVM's flag to log dirty pages: memslots'
/// [`SlotFlags`](memslots::SlotFlags). Setting the flag starts with everything clean.
#[derive(Debug)]
pub struct KvmBitmap<H> {
    host: H,
    slot: SlotExtent,
    buffer: LogBuffer,
}

impl<H: GetDirtyLog> KvmBitmap<H> {
    /// A source for `slot` of the VM behind `host`. Maps the buffer; makes no ioctl.
    ///
    /// # Errors
    /// [`Error::Buffer`] where the host has no memory for it.
    pub fn new(host: H, slot: SlotExtent) -> Result<Self, Error> {
        let buffer = LogBuffer::new(slot.pages())?;
        Ok(Self { host, slot, buffer })
    }

    /// The slot.
    pub fn slot(&self) -> &SlotExtent {
        &self.slot
    }
}

impl<H: GetDirtyLog> DirtySource for KvmBitmap<H> {
    fn pages(&self) -> u64 {
        self.buffer.pages()
    }

    /// One ioctl, then one pass over the bits; no allocation.
    ///
    /// # Errors
    /// [`Error::GetDirtyLog`]. `EFAULT` is the one errno before which KVM may have forgotten bits
    /// (it clears them, then copies them out): the whole slot counts as dirty from then on.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.pages(), into.pages())?;
        let slot = self.slot.id();
        match self.host.get_dirty_log(slot, &mut self.buffer) {
            Ok(()) => into.merge_words(self.buffer.words()),
            Err(source) => {
                if source.raw_os_error() == Some(libc::EFAULT) {
                    into.set_all();
                }
                Err(Error::GetDirtyLog { slot, source })
            }
        }
    }
}
