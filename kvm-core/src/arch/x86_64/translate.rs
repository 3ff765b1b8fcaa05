// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a vCPU's linear addresses to guest physical ones, by its own page tables (`KVM_TRANSLATE`).

use kvm_bindings::kvm_translation;
use vm_memory::GuestAddress;
use vmm_sys_util::errno::Error as Errno;

/// Bytes of the smallest page: what is behind one translation is good to the end of such a page.
const PAGE: u64 = 4096;

/// `KVM_TRANSLATE`.
pub trait Translate {
    /// Where the vCPU finds the byte at a linear address, walked with a supervisor's rights by the page
    /// tables and in the mode that it is in now; `None` where nothing is mapped. Whether there is memory
    /// behind it is another question.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn translate(&self, linear: u64) -> Result<Option<GuestAddress>, Errno>;
}

/// The answer of the ioctl. Of its flags KVM fills `valid` alone; `writeable` and `usermode` are
/// constants, so they are not here.
#[must_use]
pub const fn translated(answer: &kvm_translation) -> Option<GuestAddress> {
    match answer.valid {
        0 => None,
        _ => Some(GuestAddress(answer.physical_address)),
    }
}

/// The `len` bytes from `linear` on, in pieces that lie in one page each: linear address and bytes. Each
/// has a translation of its own. Nothing past the end of the address space.
pub fn pages(linear: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut next = Some(linear);
    let mut left = len;
    std::iter::from_fn(move || {
        let at = next?;
        if left == 0 {
            return None;
        }
        let piece = left.min(PAGE - at % PAGE);
        left -= piece;
        next = at.checked_add(piece);
        Some((at, piece))
    })
}
