// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of a machine that arrives.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dirty_log::DirtyBitmap;
use kvm_core::{PreFaultMemory, pre_fault};
use memslots::Snapshot;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::codec::PAGE;
use super::guest::{ArrivingMemory, Refusal};
use super::pages::unnoted;
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

    /// Notes all pages of `run` as written.
    fn note_run(&self, run: Range<u64>) -> Result<(), Refusal> {
        let mut at = run.start;
        while at < run.end {
            let note = self.note(at)?;
            let pages = note.pages.min((run.end - at) / PAGE as u64).max(1);
            let bits = u64::MAX >> (64 - pages.min(64)) << note.bit;
            note.word.fetch_or(bits, Ordering::Relaxed);
            at += pages * PAGE as u64;
        }
        Ok(())
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
        self.note_run(address..address.saturating_add(bytes.len() as u64))?;
        let written = self.memory.write_slice(bytes, GuestAddress(address));
        written.map_err(|error| Refusal(format!("at {address:#x}: {error}")))
    }

    fn lend(
        &self,
        runs: &[Range<u64>],
        fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> Result<bool, Refusal> {
        let mut lent = Vec::with_capacity(runs.len());
        for run in runs {
            let len = usize::try_from(run.end.saturating_sub(run.start)).unwrap_or(usize::MAX);
            for slice in GuestMemoryBackend::get_slices(&*self.memory, GuestAddress(run.start), len)
            {
                lent.push(slice.map_err(|error| Refusal(format!("at {:#x}: {error}", run.start)))?);
            }
        }
        // Noted first: what is filled half-way is not zero either.
        for run in runs {
            self.note_run(run.clone())?;
        }
        let unnoted: Vec<_> = lent.iter().map(unnoted).collect();
        fill(&unnoted);
        for slice in lent {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        Ok(true)
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
    #![allow(clippy::unwrap_used, clippy::panic)]

    use memslots::fake::FakeHost;
    use memslots::{Backing, SlotFlags};

    use super::*;
    use crate::memory::{Memory, slots_of};

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
    fn memory_that_was_lent_is_written_memory_whatever_became_of_it() {
        let page = PAGE as u64;
        let slots = slots_of(FakeHost::new(8));
        let ram = [(GuestAddress(0), 8 << 20)];
        // The firmware's slot is a seam within it.
        let made = Memory::new(8 << 20).slots(&ram, true).into_iter();
        let made = made.map(|slot| slots.create(slot.start, slot.backing, slot.flags));
        let _made: Vec<_> = made.map(Result::unwrap).collect();
        let filled = Filled::new(slots.snapshot(), None);
        let seam = filled.written[1].0.start;
        let runs = [seam - 2 * page..seam + 70 * page, 3 << 20..(3 << 20) + page];
        let mut given = 0;
        let lent = filled.lend(&runs, &mut |memory| {
            given += memory.iter().map(VolatileSlice::len).sum::<usize>();
            // The connection breaks in the second piece.
            memory[0].copy_from(&[7_u8; 2 * PAGE]);
            memory[1].copy_from(&[8_u8; 10]);
        });
        assert_eq!((lent, given), (Ok(true), 73 * PAGE));
        let mut found: Vec<_> = filled.runs().collect();
        found.sort_by_key(|run| run.start);
        let written: u64 = found.iter().map(|run| run.end - run.start).sum();
        assert_eq!(written, 73 * page, "{found:x?}");
        for run in &runs {
            filled.zero(run.start, run.end - run.start).unwrap();
            let mut bytes = vec![1; (run.end - run.start) as usize];
            filled
                .memory
                .read_slice(&mut bytes, GuestAddress(run.start))
                .unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        let none = filled.lend(
            &[0..page, (8 << 20) - page..(8 << 20) + page],
            &mut |_| panic!(),
        );
        assert!(none.unwrap_err().0.contains("at 0x7ff000"));
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
