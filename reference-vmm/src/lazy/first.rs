// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What vCPUs touch first when they go on: where they stand, their stacks and tables, and the page tables on the way there. All
//! of it can be read off a snapshot, and so comes while the machine is still being made. What is not found is touched later.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use async_pf::PageSource;
use memslots::{Gfn, PAGE_SIZE};

use crate::snapshot::machine::VcpuSection;

/// Of so many vCPUs. Of a larger machine the others wait at least as long for their turn.
const MOST_VCPUS: usize = 8;
/// So many entries has a page table, of eight bytes.
const ENTRIES: u64 = 512;

/// In an entry of a page table (SDM volume 3, 5.5): it is valid; it maps a larger page; and its address.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// Where a vCPU goes on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
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
        Start {
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

/// The pages that these touch, in order, each once. What is read on the way is `source`'s, and blocks for it.
pub(super) fn pages(starts: &[Start], source: &dyn PageSource) -> Vec<Gfn> {
    let mut found = Found {
        source,
        tables: BTreeMap::new(),
        order: Vec::new(),
    };
    for start in starts.iter().take(MOST_VCPUS) {
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

struct Found<'a> {
    source: &'a dyn PageSource,
    /// Page tables that were read; none where that did not go.
    tables: BTreeMap<Gfn, Option<Vec<u8>>>,
    order: Vec<Gfn>,
}

impl Found<'_> {
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
        let source = self.source;
        let bytes = self.tables.entry(table).or_insert_with(|| {
            let mut page = vec![0; PAGE_SIZE as usize];
            match source.fetch(table, &mut page) {
                Ok(async_pf::Fetched::Bytes) => Some(page),
                // A table without an entry.
                Ok(_) | Err(_) => None,
            }
        });
        let (entries, _) = bytes.as_deref()?.as_chunks::<8>();
        entries
            .get(number as usize)
            .map(|entry| u64::from_le_bytes(*entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_pf::{Fetched, SourceError};

    /// Page tables: `(page, entry, value)`.
    struct Tables(Vec<(u64, u64, u64)>);

    impl PageSource for Tables {
        fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
            let own: Vec<_> = self
                .0
                .iter()
                .filter(|(page, ..)| *page == first.0)
                .collect();
            if own.is_empty() {
                return Err(SourceError::NoSuchPage { gfn: first });
            }
            into.fill(0);
            for (_, entry, value) in own {
                into[*entry as usize * 8..][..8].copy_from_slice(&value.to_le_bytes());
            }
            Ok(Fetched::Bytes)
        }
    }

    fn start(paging: Paging, touches: &[u64]) -> Start {
        Start {
            touches: touches.to_vec(),
            paging,
        }
    }

    fn found(starts: &[Start], tables: &[(u64, u64, u64)]) -> Vec<u64> {
        let pages = pages(starts, &Tables(tables.to_vec()));
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
}
