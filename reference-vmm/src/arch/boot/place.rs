// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who gets which part of the RAM below the MMIO hole: every part of a kernel is claimed here, so
//! that none lies outside RAM or over another.

use std::ops::Range;

use vm_memory::GuestAddress;

use super::{BootError, FileCopy, InitrdFile, Source};
use crate::arch::layout;

struct Claim {
    what: &'static str,
    range: Range<u64>,
}

/// The RAM below the MMIO hole and what of it is taken.
pub(super) struct Placement {
    ram_end: u64,
    memory: u64,
    claims: Vec<Claim>,
}

/// Where an initrd went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Placement {
    /// All RAM free but what the monitor itself puts into it.
    pub(super) fn new(ram: &[(GuestAddress, u64)]) -> Result<Self, BootError> {
        let (start, len) = ram.first().copied().unwrap_or((GuestAddress(0), 0));
        let bad = |problem| Err(BootError::RamLayout { problem, len });
        if start.0 != 0 {
            return bad("no RAM at address 0");
        }
        if len <= layout::HIGH_RAM.0 {
            return bad("kernels are loaded above 1 MiB");
        }
        // Enough for every protocol's structures, and far more than a machine has.
        if ram.len() > 32 {
            return bad("it has more than 32 ranges");
        }
        Ok(Placement {
            ram_end: len.min(layout::MMIO_HOLE.start),
            memory: ram
                .iter()
                .fold(0, |sum: u64, (_, len)| sum.saturating_add(*len)),
            claims: vec![
                Claim {
                    what: "the monitor's boot data",
                    range: layout::BOOT_DATA,
                },
                Claim {
                    what: "the BIOS area",
                    range: layout::EBDA.start..layout::HIGH_RAM.0,
                },
            ],
        })
    }

    /// First address without RAM.
    pub(super) fn ram_end(&self) -> u64 {
        self.ram_end
    }

    /// End of all that is claimed.
    pub(super) fn top(&self) -> u64 {
        self.claims
            .iter()
            .map(|claim| claim.range.end)
            .max()
            .unwrap_or(0)
    }

    /// Checks that `len` bytes at `start` are RAM.
    pub(super) fn check_ram(
        &self,
        image: impl Fn() -> String,
        what: &'static str,
        start: u64,
        len: u64,
    ) -> Result<Range<u64>, BootError> {
        match start.checked_add(len) {
            Some(end) if end <= self.ram_end => Ok(start..end),
            _ => Err(BootError::OutsideRam {
                image: image(),
                what,
                start: u128::from(start),
                end: u128::from(start) + u128::from(len),
                ram_end: self.ram_end,
            }),
        }
    }

    /// Takes `len` bytes at `start` for `what` of `image`.
    pub(super) fn claim(
        &mut self,
        image: impl Fn() -> String,
        what: &'static str,
        start: u64,
        len: u64,
    ) -> Result<(), BootError> {
        let range = self.check_ram(&image, what, start, len)?;
        if range.is_empty() {
            return Ok(());
        }
        if let Some(other) = self
            .claims
            .iter()
            .find(|claim| overlap(&claim.range, &range))
        {
            return Err(BootError::Overlap {
                image: image(),
                what,
                start: range.start,
                end: range.end,
                other: other.what,
                other_start: other.range.start,
                other_end: other.range.end,
            });
        }
        self.claims.push(Claim { what, range });
        Ok(())
    }

    /// Takes the highest free place of `len` bytes above 1 MiB that starts on a page and ends at
    /// `limit` at the latest.
    fn claim_highest(&mut self, len: u64, limit: u64) -> Option<u64> {
        let mut end = limit.min(self.ram_end);
        loop {
            let start = end.checked_sub(len)? / layout::PAGE * layout::PAGE;
            if start < layout::HIGH_RAM.0 {
                return None;
            }
            let range = start..start + len;
            // Each round goes below one claim, so there are at most as many rounds as claims.
            match self
                .claims
                .iter()
                .find(|claim| overlap(&claim.range, &range))
            {
                Some(claim) => end = claim.range.start,
                None => {
                    self.claims.push(Claim {
                        what: "an initrd",
                        range,
                    });
                    return Some(start);
                }
            }
        }
    }

    /// Places initrds one after the other, each on a 4-byte boundary, as Linux unpacks them. `None`
    /// without initrds. `limit` is the address at which they must end.
    pub(super) fn joined_initrd(
        &mut self,
        files: &[InitrdFile],
        limit: u64,
        copies: &mut Vec<FileCopy>,
    ) -> Result<Option<Initrd>, BootError> {
        let Some(last) = files.last() else {
            return Ok(None);
        };
        let too_large = |len, memory| BootError::InitrdTooLarge {
            image: last.name.clone(),
            len,
            memory,
            limit,
        };
        let mut offsets = Vec::with_capacity(files.len());
        let mut len = 0_u64;
        for file in files {
            len = len.checked_next_multiple_of(4).unwrap_or(u64::MAX);
            offsets.push(len);
            len = len.saturating_add(file.len);
        }
        let start = self
            .claim_highest(len, limit)
            .ok_or_else(|| too_large(len, self.memory))?;
        for (index, (file, offset)) in files.iter().zip(offsets).enumerate() {
            copies.push(FileCopy {
                source: Source::Initrd(index),
                offset: 0,
                len: file.len,
                to: GuestAddress(start + offset),
            });
        }
        Ok(Some(Initrd { start, len }))
    }

    /// Places each initrd as a module of its own, on a page.
    pub(super) fn modules(
        &mut self,
        files: &[InitrdFile],
        copies: &mut Vec<FileCopy>,
    ) -> Result<Vec<Initrd>, BootError> {
        let limit = self.ram_end;
        let mut modules = Vec::with_capacity(files.len());
        for (index, file) in files.iter().enumerate() {
            let start =
                self.claim_highest(file.len, limit)
                    .ok_or_else(|| BootError::InitrdTooLarge {
                        image: file.name.clone(),
                        len: file.len,
                        memory: self.memory,
                        limit,
                    })?;
            modules.push(Initrd {
                start,
                len: file.len,
            });
            copies.push(FileCopy {
                source: Source::Initrd(index),
                offset: 0,
                len: file.len,
                to: GuestAddress(start),
            });
        }
        Ok(modules)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(len: u64) -> Placement {
        Placement::new(&[(GuestAddress(0), len)]).unwrap()
    }

    fn file(len: u64) -> InitrdFile {
        InitrdFile {
            name: "initrd x".to_owned(),
            path: "x".to_owned(),
            len,
        }
    }

    #[test]
    fn an_initrd_goes_as_high_as_it_may_on_a_page() {
        let mut place = place(64 << 20);
        let mut copies = Vec::new();
        let initrd = place
            .joined_initrd(&[file(5000)], u64::MAX, &mut copies)
            .unwrap()
            .unwrap();
        assert_eq!(
            initrd,
            Initrd {
                start: (64 << 20) - 8192,
                len: 5000
            }
        );
        let next = place
            .joined_initrd(&[file(1)], 0x200_0001, &mut copies)
            .unwrap()
            .unwrap();
        assert_eq!(next.start, 0x200_0000);
        assert_eq!(copies.len(), 2);
    }

    #[test]
    fn an_initrd_goes_below_a_kernel_that_is_in_its_way() {
        let mut place = place(4 << 20);
        place
            .claim(String::new, "kernel", 0x20_0000, 0x20_0000)
            .unwrap();
        let mut copies = Vec::new();
        let initrd = place
            .joined_initrd(&[file(0x10_0000)], u64::MAX, &mut copies)
            .unwrap();
        assert_eq!(initrd.unwrap().start, 0x10_0000);
        let full = place.joined_initrd(&[file(1)], u64::MAX, &mut copies);
        assert!(matches!(
            full,
            Err(BootError::InitrdTooLarge {
                len: 1,
                memory: 0x40_0000,
                ..
            })
        ));
    }

    #[test]
    fn initrds_are_joined_on_four_byte_boundaries() {
        let mut place = place(4 << 20);
        let mut copies = Vec::new();
        let initrd = place
            .joined_initrd(&[file(5), file(4), file(1)], u64::MAX, &mut copies)
            .unwrap()
            .unwrap();
        assert_eq!(initrd.len, 13);
        let at: Vec<u64> = copies.iter().map(|copy| copy.to.0 - initrd.start).collect();
        assert_eq!(at, [0, 8, 12]);
    }

    #[test]
    fn a_claim_that_wraps_or_leaves_the_ram_or_overlaps_is_refused() {
        let mut place = place(4 << 20);
        let mut claim = |start, len| place.claim(String::new, "x", start, len);
        assert!(matches!(
            claim(u64::MAX, 2),
            Err(BootError::OutsideRam { .. })
        ));
        assert!(matches!(
            claim(0x3f_ffff, 2),
            Err(BootError::OutsideRam { .. })
        ));
        assert!(matches!(claim(0x1_0000, 2), Err(BootError::Overlap { .. })));
        claim(0x20_0000, 16).unwrap();
        assert!(matches!(
            claim(0x20_000f, 1),
            Err(BootError::Overlap { .. })
        ));
        claim(0x20_0010, 1).unwrap();
    }
}
