// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file that a guest's memory is mapped from, where something of it is lost: it was cut off, or its disk cannot read any
//! more.
//!
//! KVM says one of two things then. For what the guest reads or writes a [`MemoryError`](kvm_core::MemoryError); where the
//! processor itself needs memory (instructions, page tables, the table of interrupts) it may be what a guest's own crash
//! looks like. So a vCPU that crashed is asked what it needed, and whether that can be had.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_core::arch::x86_64::RegisterDump;
use memslots::MemoryKind;
use vm_memory::GuestAddress;

use crate::memory::SlotTable;
use crate::snapshot::pages::{PAGE, Region};

/// What of guest memory is which part of a file.
#[derive(Clone, Debug)]
pub(crate) struct MappedFile {
    /// Where it was.
    path: PathBuf,
    file: Arc<File>,
    regions: Vec<Region>,
}

impl MappedFile {
    pub(crate) fn new(path: PathBuf, file: Arc<File>, regions: Vec<Region>) -> Self {
        MappedFile {
            path,
            file,
            regions,
        }
    }

    /// What of it is lost, in words: at one of `needed`, guest physical addresses, or, where the file was cut off, the first
    /// that is lost. None: nothing is known to be.
    pub(crate) fn lost(
        &self,
        table: &SlotTable,
        needed: impl IntoIterator<Item = u64>,
    ) -> Option<String> {
        let has = self.file.metadata().map_or(u64::MAX, |file| file.len());
        let had = self.regions.iter().map(|region| region.offset + region.len);
        let had = had.max().unwrap_or_default();
        let mut needed = needed.into_iter();
        let at = needed.find(|at| self.is_mapped(*at) && is_lost(table, *at));
        let at = at.or_else(|| self.first_behind(has))?;
        let why = match has < had {
            true => format!("it was cut off, to {has} bytes of {had}"),
            false => "the host cannot bring that page".into(),
        };
        Some(format!(
            "the memory file {} cannot be read at guest address {at:#x}: {why}",
            self.path.display()
        ))
    }

    fn is_mapped(&self, at: u64) -> bool {
        let mut regions = self.regions.iter();
        regions.any(|region| (region.guest..region.guest + region.len).contains(&at))
    }

    /// The lowest address whose page is not in a file of so many bytes.
    fn first_behind(&self, has: u64) -> Option<u64> {
        // The last page of a file is there if any of it is.
        let has = has.checked_next_multiple_of(PAGE)?;
        let behind = self.regions.iter().filter_map(|region| {
            let first = has.saturating_sub(region.offset);
            (first < region.len).then_some(region.guest + first)
        });
        behind.min()
    }
}

/// Whether a page of guest memory cannot be had. It is not touched: that would be a `SIGBUS`.
fn is_lost(table: &SlotTable, at: u64) -> bool {
    let Some(region) = table.find(GuestAddress(at)) else {
        return false;
    };
    let mapping = region.mapping();
    if mapping.kind() != MemoryKind::FilePrivate {
        return false;
    }
    let offset = at - region.extent().guest_range().start;
    let mut byte = 0_u8;
    let local = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: (mapping.host().0 + offset as usize) as *mut libc::c_void,
        iov_len: 1,
    };
    // SAFETY: `local` is a byte of this function's that is written; what is at `remote` the kernel looks for itself, and
    // says EFAULT where it cannot have it. That it is the guest's, which writes to it, is no matter to the kernel.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    // Where the call is not permitted nothing is known.
    read < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

/// What a processor needs at these registers: its instruction, its stack, its tables. Guest physical addresses, as far as
/// `translate` knows them of linear ones.
pub(crate) fn needed(registers: &RegisterDump, translate: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    let RegisterDump { regs, sregs } = registers;
    let linear = [
        sregs.cs.base.wrapping_add(regs.rip),
        sregs.ss.base.wrapping_add(regs.rsp),
        sregs.idt.base,
        sregs.gdt.base,
    ];
    let tables = Some(sregs.cr3 & FRAME);
    linear
        .into_iter()
        .map(translate)
        .chain([tables])
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use memslots::fake::FakeHost;
    use memslots::{Backing, SlotFlags};

    use super::*;
    use crate::memory::slots_of;
    use crate::snapshot::pages::PageMap;

    #[test]
    fn the_first_page_that_a_shorter_file_has_not_is_the_lowest_of_the_guests() {
        let map = PageMap::of([(0, 4 * PAGE), (16 * PAGE, 4 * PAGE)]);
        let file = tempfile::tempfile().unwrap();
        let regions = map.regions.clone();
        let mapped = MappedFile::new("/m".into(), Arc::new(file), regions.clone());
        let [low, high] = [&regions[0], &regions[1]];
        assert_eq!(mapped.first_behind(map.file_len()), None);
        assert_eq!(mapped.first_behind(0), Some(0));
        for (has, first) in [
            (low.offset + 1, PAGE),
            (low.offset + PAGE, PAGE),
            (high.offset, 16 * PAGE),
            (high.offset + 3 * PAGE, 19 * PAGE),
        ] {
            assert_eq!(mapped.first_behind(has), Some(first));
        }
    }

    #[test]
    fn of_a_file_that_was_cut_off_it_is_said_which_needed_address_is_lost_and_none_is_touched() {
        // Two slots of the file, and one that is none of it.
        let map = PageMap::of([(0, 2 * PAGE), (16 * PAGE, 4 * PAGE)]);
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(map.file_len()).unwrap();
        let slots = slots_of(FakeHost::new(8));
        let backing =
            |region: &Region| Backing::file_private(file.clone(), region.offset, region.len);
        let of_file = map
            .regions
            .iter()
            .map(|region| (region.guest, backing(region)));
        let others = [(32 * PAGE, Backing::anonymous(PAGE))];
        let made = of_file
            .chain(others)
            .map(|(guest, backing)| slots.create(GuestAddress(guest), backing, SlotFlags::NONE));
        let _made: Vec<_> = made.map(Result::unwrap).collect();
        let table = slots.snapshot();
        let every = |table: &SlotTable| {
            let pages = (0..40).map(|page| page * PAGE + 0xff8);
            pages.filter(|at| is_lost(table, *at)).collect::<Vec<_>>()
        };
        let mapped = MappedFile::new("/m".into(), file.clone(), map.regions.clone());
        assert_eq!(every(&table), [0_u64; 0]);
        assert_eq!(
            mapped.lost(&table, [0, 16 * PAGE, 32 * PAGE, 1 << 40]),
            None
        );

        // The last two pages of the second.
        let has = map.regions[1].offset + 2 * PAGE;
        file.set_len(has).unwrap();
        assert_eq!(every(&table), [18 * PAGE + 0xff8, 19 * PAGE + 0xff8]);
        // Of those that are needed the one that is lost, to the byte; of none of them the first of all.
        for (needed, said) in [
            ([8, 17 * PAGE, 19 * PAGE + 0x123], 19 * PAGE + 0x123),
            ([18 * PAGE + 8, 19 * PAGE, 32 * PAGE], 18 * PAGE + 8),
            ([0, 32 * PAGE, 1 << 40], 18 * PAGE),
        ] {
            let why = mapped.lost(&table, needed).unwrap();
            let cut = format!("cut off, to {has} bytes of {}", map.file_len());
            let at = format!("the memory file /m cannot be read at guest address {said:#x}: ");
            assert!(why.starts_with(&at) && why.ends_with(&cut), "{why}");
        }
    }
}
