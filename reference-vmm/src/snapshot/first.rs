// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a machine touches first when it goes on: what the restore and KVM write, where its vCPUs stand, their stacks and tables, and
//! the page tables on the way there. Those pages are in the file `state` as well, in a section that an older build passes over, so
//! that a guest whose memory comes later ([`lazy`](crate::lazy)) begins without a search of the disk, or a word of the page server's.
//!
//! # The section
//! All numbers are little-endian.
//!
//! ```text
//!    0   4  how many pages, n: at most 512
//!    4   4  0
//!    8  8n  their frame numbers, in the order in which they are touched, each once
//!    …      the pages, 4096 bytes each, in that order
//! ```
//!
//! They are the snapshot's pages: the same bytes are in the file `memory` (of it, or of one that it builds on), and who reads that
//! alone misses nothing. (Of memory that another process writes while the guest stands still no snapshot has one moment.) What is not
//! found when the snapshot is taken is touched later, and comes as any other page.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use memslots::{Gfn, PAGE_SIZE};

use super::format::{u32_at, u64_at};
use super::machine::VcpuSection;
use super::pages::PageMap;

/// Of so many vCPUs. Of a larger machine the others wait at least as long for their turn.
const MOST_VCPUS: usize = 8;
/// More pages there are not: 2 MiB.
const MOST_PAGES: usize = 512;
/// So many entries has a page table, of eight bytes.
const ENTRIES: u64 = 512;
const PAGE: usize = PAGE_SIZE as usize;
/// Of the section, before the frame numbers.
const HEADER: usize = 8;

/// In an entry of a page table (SDM volume 3, 5.5): it is valid; it maps a larger page; and its address.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// MSRs of KVM's by which a guest has it write to memory (Documentation/virt/kvm/x86/msr.rst): the wall clock, when the MSR is
/// set; the rest where bit 0 enables it, when the vCPU runs: clock, asynchronous page faults, stolen time, end of interrupt.
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
const ENABLED: [u32; 5] = [0x12, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];

/// Where a vCPU goes on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
    /// Guest physical addresses that KVM touches for it.
    kvm: Vec<u64>,
    /// Linear addresses, in the order in which they are touched.
    touches: Vec<u64>,
    paging: Paging,
}

#[derive(Clone, Copy, Debug, Default)]
enum Paging {
    /// Linear addresses are physical ones.
    #[default]
    None,
    /// The paging of 64-bit mode: its root, and how many levels there are.
    Long { root: u64, levels: u32 },
    /// Another, whose guest is small.
    Other,
}

impl Start {
    pub(crate) fn of(vcpu: &VcpuSection) -> Self {
        let (general, system) = (&vcpu.state.registers, &vcpu.state.system);
        let is_long = system.efer & EFER_LMA != 0;
        let paging = match system.cr0 & CR0_PG != 0 {
            false => Paging::None,
            true if is_long => Paging::Long {
                root: system.cr3 & ADDRESS,
                levels: if system.cr4 & CR4_LA57 != 0 { 5 } else { 4 },
            },
            true => Paging::Other,
        };
        let code = match is_long {
            true => general.rip,
            false => system.cs.base.wrapping_add(general.rip),
        };
        let msr = |index| vcpu.state.msr(index).unwrap_or_default();
        let clocks = WALL_CLOCK.map(msr).into_iter().filter(|value| *value != 0);
        let enabled = ENABLED.map(msr).into_iter();
        Start {
            kvm: clocks
                .chain(enabled.filter(|value| value & 1 != 0))
                .collect(),
            // What is interrupted first looks for its handler.
            touches: vec![
                code,
                general.rsp,
                system.idt.base,
                system.gdt.base,
                system.tr.base,
            ],
            paging,
        }
    }
}

/// Reads a page of the guest's; whether there is one.
type Read<'a> = dyn FnMut(Gfn, &mut [u8]) -> bool + 'a;

/// The pages that these touch, in order, each once. What is on the way is read by `read`, and this blocks for it.
pub(crate) fn pages(starts: &[Start], read: &mut Read<'_>) -> Vec<Gfn> {
    let mut found = Found {
        read,
        tables: BTreeMap::new(),
        order: Vec::new(),
    };
    for start in starts.iter().take(MOST_VCPUS) {
        for at in &start.kvm {
            found.note(Gfn(at / PAGE_SIZE));
        }
        for touch in &start.touches {
            let at = match start.paging {
                Paging::None => Some(*touch),
                Paging::Long { root, levels } => found.translate(root, levels, *touch),
                Paging::Other => None,
            };
            if let Some(at) = at {
                found.note(Gfn(at / PAGE_SIZE));
            }
        }
    }
    found.order
}

struct Found<'a, 'r> {
    read: &'a mut Read<'r>,
    /// Page tables that were read; none where that did not go.
    tables: BTreeMap<Gfn, Option<Vec<u8>>>,
    order: Vec<Gfn>,
}

impl Found<'_, '_> {
    fn note(&mut self, gfn: Gfn) {
        if !self.order.contains(&gfn) {
            self.order.push(gfn);
        }
    }

    fn translate(&mut self, root: u64, levels: u32, linear: u64) -> Option<u64> {
        let mut table = root;
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let entry = self.entry(Gfn(table / PAGE_SIZE), linear >> shift & (ENTRIES - 1))?;
            let (within, next) = (linear & ((1 << shift) - 1), entry & ADDRESS);
            match entry & (PRESENT | LARGE) {
                PRESENT if level > 0 => table = next,
                // The lowest level's bit 7 is another.
                PRESENT => return Some(next | within),
                both if both == PRESENT | LARGE && level < 3 => {
                    return Some(next & !((1 << shift) - 1) | within);
                }
                _ => return None,
            }
        }
        None
    }

    fn entry(&mut self, table: Gfn, number: u64) -> Option<u64> {
        self.note(table);
        let read = &mut self.read;
        let bytes = self.tables.entry(table).or_insert_with(|| {
            let mut page = vec![0; PAGE];
            read(table, &mut page).then_some(page)
        });
        let (entries, _) = bytes.as_deref()?.as_chunks::<8>();
        entries
            .get(number as usize)
            .map(|entry| u64::from_le_bytes(*entry))
    }
}

/// Why bytes are no such section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FirstPagesError {
    /// It has another length than what is in it.
    #[error(
        "its section first-pages has {has} bytes, and {pages} pages, of which {MOST_PAGES} is the most"
    )]
    Length {
        /// The bytes that there are.
        has: usize,
        /// How many pages it says.
        pages: u32,
    },
    /// A page that the guest has not, or that is there twice.
    #[error(
        "its section first-pages has page {0:#x}, which is none of the guest's, or there before"
    )]
    Page(u64),
}

/// The pages that a snapshot has in its state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirstPages {
    order: Vec<Gfn>,
    /// The number of each page in `order`.
    numbers: BTreeMap<Gfn, usize>,
    bytes: Vec<u8>,
}

impl FirstPages {
    /// Those of a machine with these vCPUs, and `also`, which the restore writes to. What `read` does not read is left out.
    pub(super) fn take(vcpus: &[VcpuSection], also: Option<Gfn>, read: &mut Read<'_>) -> Self {
        let starts: Vec<_> = vcpus.iter().take(MOST_VCPUS).map(Start::of).collect();
        let order = also.into_iter().chain(pages(&starts, read));
        let mut taken = FirstPages::default();
        let mut page = vec![0; PAGE];
        for gfn in order {
            if taken.order.len() < MOST_PAGES && !taken.has(gfn) && read(gfn, &mut page) {
                taken.push(gfn, &page);
            }
        }
        taken
    }

    fn push(&mut self, gfn: Gfn, page: &[u8]) {
        self.numbers.insert(gfn, self.order.len());
        self.order.push(gfn);
        self.bytes.extend(page);
    }

    /// The section.
    pub fn encode(&self) -> Vec<u8> {
        // No more than fit.
        let mut section = (self.order.len() as u32).to_le_bytes().to_vec();
        section.extend(0_u32.to_le_bytes());
        section.extend(self.order.iter().flat_map(|gfn| gfn.0.to_le_bytes()));
        section.extend(&self.bytes);
        section
    }

    /// Reads the section of a snapshot whose memory is `map`.
    ///
    /// # Errors
    /// [`FirstPagesError`].
    pub fn parse(section: &[u8], map: &PageMap) -> Result<Self, FirstPagesError> {
        let (pages, zero) = (u32_at(section, 0), u32_at(section, 4));
        let count = pages as usize;
        let fits = count <= MOST_PAGES && section.len() == HEADER + count * (8 + PAGE);
        if !fits || zero != 0 {
            let has = section.len();
            return Err(FirstPagesError::Length { has, pages });
        }
        let mut order = Vec::with_capacity(count);
        let mut numbers = BTreeMap::new();
        for number in 0..count {
            let gfn = Gfn(u64_at(section, HEADER + number * 8));
            // Regions are whole pages.
            let at = gfn.0.checked_mul(PAGE_SIZE);
            let is_there = at.is_some_and(|at| map.locate(at).is_some());
            if !is_there || numbers.insert(gfn, number).is_some() {
                return Err(FirstPagesError::Page(gfn.0));
            }
            order.push(gfn);
        }
        let bytes = section.get(HEADER + count * 8..).unwrap_or_default();
        Ok(FirstPages {
            order,
            numbers,
            bytes: bytes.to_vec(),
        })
    }

    /// In the order in which they are touched.
    pub fn order(&self) -> &[Gfn] {
        &self.order
    }

    /// Whether this page is one of them.
    pub fn has(&self, gfn: Gfn) -> bool {
        self.numbers.contains_key(&gfn)
    }

    /// What is in this page, if it is one of them.
    pub fn get(&self, gfn: Gfn) -> Option<&[u8]> {
        let number = *self.numbers.get(&gfn)?;
        self.bytes.get(number * PAGE..(number + 1) * PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(paging: Paging, touches: &[u64]) -> Start {
        Start {
            kvm: Vec::new(),
            touches: touches.to_vec(),
            paging,
        }
    }

    /// Of page tables: `(page, entry, value)`.
    fn found(starts: &[Start], tables: &[(u64, u64, u64)]) -> Vec<u64> {
        let mut read = |gfn: Gfn, into: &mut [u8]| {
            into.fill(0);
            let own = tables.iter().filter(|(page, ..)| *page == gfn.0);
            let mut any = false;
            for (_, entry, value) in own {
                into[*entry as usize * 8..][..8].copy_from_slice(&value.to_le_bytes());
                any = true;
            }
            any
        };
        let pages = pages(starts, &mut read);
        pages.into_iter().map(|gfn| gfn.0).collect()
    }

    const LONG: Paging = Paging::Long {
        root: 0x1000,
        levels: 4,
    };
    /// The kernel's half: entry 511 of each level, but 3 of the lowest.
    const HIGH: u64 = 0xffff_ffff_ffe0_3000;

    #[test]
    fn the_page_tables_come_before_what_they_lead_to_and_each_page_once() {
        let tables = [
            (1, 511, 0x2003),
            (2, 511, 0x3003),
            (3, 511, 0x4003),
            (4, 3, 0x9003 | 1 << 63),
            // Bit 7 of the lowest level is no size.
            (4, 4, 0xa083),
        ];
        let both = [
            start(LONG, &[HIGH + 8, HIGH + 0x1000, HIGH]),
            start(LONG, &[HIGH]),
        ];
        assert_eq!(found(&both, &tables), [1, 2, 3, 4, 9, 10]);
    }

    #[test]
    fn larger_pages_end_the_way_and_what_is_not_mapped_is_left_out() {
        let tables = [
            (1, 0, 0x2003),
            (2, 0, 0x3003),
            (2, 1, 0x8000_0083),
            (3, 1, 0x60_0083),
            (3, 2, 0x60_0082),
        ];
        let touches = [0x21_2345, 0x4000_0000 + 0x54_3210, 0x40_0000, 1 << 39];
        let expected = [1, 2, 3, 0x612, 0x80543];
        assert_eq!(found(&[start(LONG, &touches)], &tables), expected);
        let five = Paging::Long {
            root: 0x7000,
            levels: 5,
        };
        let more: Vec<_> = [(7, 0, 0x1003)].into_iter().chain(tables).collect();
        assert_eq!(
            found(&[start(five, &[0x21_2345])], &more),
            [7, 1, 2, 3, 0x612]
        );
    }

    #[test]
    fn without_paging_addresses_are_physical_and_tables_that_cannot_be_read_end_it() {
        assert_eq!(found(&[start(Paging::None, &[0x7c00, 0x7c10])], &[]), [7]);
        assert!(found(&[start(Paging::Other, &[0x7c00])], &[]).is_empty());
        // It is tried, once: whoever touches it is told why it does not come.
        assert_eq!(found(&[start(LONG, &[0, HIGH])], &[]), [1]);
        // A table may lead to itself, and does not for ever.
        let selfish = [(1, 0, 0x1003)];
        assert_eq!(found(&[start(LONG, &[0])], &selfish), [1]);
    }

    #[test]
    fn no_more_vcpus_are_looked_at_than_some() {
        let starts: Vec<_> = (0..20)
            .map(|at| start(Paging::None, &[at * PAGE_SIZE]))
            .collect();
        assert_eq!(found(&starts, &[]).len(), MOST_VCPUS);
    }

    #[test]
    fn what_kvm_writes_to_comes_before_what_the_guest_touches() {
        let kvm = Start {
            kvm: vec![0x5001, 0x6041, 0x5801],
            ..start(Paging::None, &[0x7c00])
        };
        assert_eq!(found(&[kvm], &[]), [5, 6, 7]);
    }

    fn map() -> PageMap {
        PageMap::of([(0, 0x8000), (0x10_0000, 0x2000)])
    }

    fn some() -> FirstPages {
        let mut some = FirstPages::default();
        for (gfn, byte) in [(0x101, 3), (0, 1), (7, 2)] {
            some.push(Gfn(gfn), &[byte; PAGE]);
        }
        some
    }

    #[test]
    fn a_section_is_read_as_it_was_written() {
        let (some, none) = (some(), FirstPages::default());
        let read = FirstPages::parse(&some.encode(), &map()).unwrap();
        assert_eq!(read, some);
        assert_eq!(read.order(), [0x101, 0, 7].map(Gfn));
        assert_eq!(read.get(Gfn(7)), Some(&[2; PAGE][..]));
        assert_eq!(read.get(Gfn(6)), None);
        assert_eq!(FirstPages::parse(&none.encode(), &map()), Ok(none));
    }

    #[test]
    fn what_is_no_section_is_refused() {
        let section = some().encode();
        for len in 0..section.len() {
            let cut = FirstPages::parse(&section[..len], &map());
            assert!(matches!(cut, Err(FirstPagesError::Length { .. })), "{len}");
        }
        let with = |at: usize, bytes: &[u8]| {
            let mut section = section.clone();
            section[at..at + bytes.len()].copy_from_slice(bytes);
            FirstPages::parse(&section, &map()).unwrap_err()
        };
        let length = |pages| FirstPagesError::Length {
            has: section.len(),
            pages,
        };
        assert_eq!(with(0, &[4]), length(4));
        assert_eq!(with(0, &[0xff; 4]), length(u32::MAX));
        assert_eq!(with(4, &[1]), length(3));
        // Behind each region, far away, and one that is there.
        for page in [8, 0x102, u64::MAX, 1 << 52, (1 << 52) - 1, 7] {
            assert_eq!(
                with(HEADER, &page.to_le_bytes()),
                FirstPagesError::Page(page)
            );
        }
    }

    #[test]
    fn no_more_are_taken_than_fit_and_what_is_not_read_is_left_out() {
        let mut read = |gfn: Gfn, into: &mut [u8]| {
            into.fill(gfn.0 as u8);
            gfn.0 != 3
        };
        let taken = FirstPages::take(&[], Some(Gfn(2)), &mut read);
        assert_eq!(taken.order(), [Gfn(2)]);
        assert_eq!(taken.get(Gfn(2)), Some(&[2; PAGE][..]));
        assert_eq!(FirstPages::take(&[], Some(Gfn(3)), &mut read).order(), []);
    }
}
