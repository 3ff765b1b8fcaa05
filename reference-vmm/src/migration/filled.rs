// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of a machine that arrives.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dirty_log::DirtyBitmap;
use kvm_core::{PreFaultMemory, pre_fault};
use memslots::Snapshot;
use vm_memory::{Bytes, GuestAddress};

use super::codec::PAGE;
use super::guest::{ArrivingMemory, Refusal};
use crate::memory::SlotTable;

/// Bytes of a large page, which KVM has in one entry: what is asked of it at a time.
const LARGE: usize = 2 << 20;

/// Memory that is filled. It is zero as it was made, and what is not zero of it is noted: so zeros cost nothing where
/// nothing was, and make no page present.
pub struct Filled<'a> {
    memory: Snapshot<SlotTable>,
    /// Of each slot, in order: where it is, and a bit for each page that was written, and not made zero behind that.
    written: Vec<(Range<u64>, Vec<AtomicU64>)>,
    /// By whose leave it is taken into KVM's page tables, where KVM does that.
    vcpu: Option<&'a (dyn PreFaultMemory + Sync)>,
}

/// Where it is noted that a page was written.
struct Note<'a> {
    word: &'a AtomicU64,
    bit: u32,
    /// Pages from this one on that the word has.
    pages: u64,
}

impl<'a> Filled<'a> {
    /// All of `memory`, which nobody has written yet, of a machine with `vcpu`.
    pub(super) fn new(
        memory: Snapshot<SlotTable>,
        vcpu: Option<&'a (dyn PreFaultMemory + Sync)>,
    ) -> Self {
        let of = |region: &Arc<memslots::Region<_>>| {
            let range = region.extent().guest_range();
            let words = (range.end - range.start).div_ceil(PAGE as u64 * 64);
            (range, (0..words).map(|_| AtomicU64::new(0)).collect())
        };
        let written = memory.regions().map(of).collect();
        Filled {
            memory,
            written,
            vcpu,
        }
    }

    fn note(&self, address: u64) -> Result<Note<'_>, Refusal> {
        let behind = self
            .written
            .partition_point(|(range, _)| range.start <= address);
        let slot = self.written.get(behind.wrapping_sub(1));
        let (range, words) = slot
            .filter(|(range, _)| range.contains(&address))
            .ok_or_else(|| Refusal(format!("there is no guest memory at {address:#x}")))?;
        let page = (address - range.start) / PAGE as u64;
        let word = words.get((page / 64) as usize);
        let left = (range.end - address) / PAGE as u64;
        Ok(Note {
            word: word.ok_or_else(|| Refusal(format!("no page is at {address:#x}")))?,
            bit: (page % 64) as u32,
            pages: left.min(64 - page % 64),
        })
    }

    /// What was written, in runs that cross no multiple of a large page.
    fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.written.iter().flat_map(|(range, words)| {
            let blocks = (range.start..)
                .step_by(LARGE)
                .zip(words.chunks(LARGE / PAGE / 64));
            blocks.flat_map(|(start, words)| {
                // Relaxed, as those that set them: a page that is missed costs the guest an exit.
                let words: Vec<_> = words
                    .iter()
                    .map(|word| word.load(Ordering::Relaxed))
                    .collect();
                // Without memory for that the guest faults, as it would have.
                let runs = runs(&words).unwrap_or_default();
                runs.into_iter().map(move |pages| {
                    start + pages.start * PAGE as u64..start + pages.end * PAGE as u64
                })
            })
        })
    }
}

/// Bits that are set one behind the other, from the first word's lowest on.
fn runs(words: &[u64]) -> Result<Vec<Range<u64>>, dirty_log::Error> {
    let mut written = DirtyBitmap::new(words.len() as u64 * 64)?;
    written.merge_words(words)?;
    Ok(written.runs().map(|run| run.first..run.end()).collect())
}

// Relaxed: a page comes by one connection in all rounds, so its bit is one thread's. Others write the word's other bits, and
// no update of one is lost.
impl ArrivingMemory for Filled<'_> {
    fn page(&self, address: u64, bytes: &[u8]) -> Result<(), Refusal> {
        // Noted first: what fails half-way is not zero either.
        for at in (address..).step_by(PAGE).take(bytes.len() / PAGE) {
            let note = self.note(at)?;
            note.word.fetch_or(1 << note.bit, Ordering::Relaxed);
        }
        let written = self.memory.write_slice(bytes, GuestAddress(address));
        written.map_err(|error| Refusal(format!("at {address:#x}: {error}")))
    }

    fn zero(&self, address: u64, len: u64) -> Result<(), Refusal> {
        let mut at = 0;
        while at < len {
            let address = address.saturating_add(at);
            let note = self.note(address)?;
            let written = note.word.load(Ordering::Relaxed) >> note.bit;
            let clean = u64::from(written.trailing_zeros()).min(note.pages);
            at += clean * PAGE as u64;
            if clean == 0 {
                let done = self.memory.write_slice(&[0; PAGE], GuestAddress(address));
                done.map_err(|error| Refusal(format!("at {address:#x}: {error}")))?;
                // Or zeros that are said again and again were written as often.
                note.word.fetch_and(!(1 << note.bit), Ordering::Relaxed);
                at += PAGE as u64;
            }
        }
        Ok(())
    }

    fn pre_fault(&self, enough: &dyn Fn() -> bool) {
        let Some(vcpu) = self.vcpu else {
            return;
        };
        for run in self.runs() {
            if enough() {
                return;
            }
            if let Err(error) = pre_fault(vcpu, run) {
                // The guest faults, as it would have.
                log::debug!("{error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use memslots::fake::FakeHost;
    use memslots::{Backing, SlotFlags};

    use super::*;
    use crate::memory::slots_of;

    #[test]
    fn zeros_that_are_said_again_are_written_once() {
        let memslots = slots_of(FakeHost::new(8));
        let backing = Backing::anonymous(1 << 20);
        let slot = memslots.create(GuestAddress(0), backing, SlotFlags::NONE);
        let _slot = slot.unwrap();
        let filled = Filled::new(memslots.snapshot(), None);
        let written = || {
            filled
                .runs()
                .flat_map(|run| [run.start, run.end])
                .collect::<Vec<_>>()
        };
        filled.zero(0, 1 << 20).unwrap();
        assert!(written().is_empty());
        let page = [7; PAGE];
        [0x2000, 0x3000]
            .iter()
            .for_each(|at| filled.page(*at, &page).unwrap());
        assert_eq!(written(), [0x2000, 0x4000]);
        filled.zero(0x3000, 1 << 19).unwrap();
        assert_eq!(written(), [0x2000, 0x3000]);
        let mut has = [0xee; 2 * PAGE];
        let memory = memslots.snapshot();
        memory.read_slice(&mut has, GuestAddress(0x2000)).unwrap();
        assert!(has == [[7; PAGE], [0; PAGE]].concat()[..]);
    }

    #[test]
    fn runs_are_of_bits_that_touch_over_the_words_too() {
        let of = |words: &[u64]| runs(words).unwrap();
        assert_eq!(of(&[0, 0]), []);
        assert_eq!(of(&[0b1011_0110]), [1..3, 4..6, 7..8]);
        assert_eq!(of(&[1 << 63, 0b101]), [63..65, 66..67]);
        assert_eq!(of(&[u64::MAX; 8]), vec![0..512]);
    }
}
