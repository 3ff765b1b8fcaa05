// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ring's protocol under all interleavings and reorderings: a page that is handed out is watched
//! again, so that a write is in this copy or told next time; and an entry is read whole.
#![cfg(loom)]

use std::io;

use dirty_log::{
    DirtyBitmap, DirtyRings, DirtySource, PAGE_SIZE, ResetRings, RingEntry, RingMemory, SlotKey,
};
use loom::sync::Arc;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use memslots::{Hva, SlotExtent, SlotId};
use vm_memory::GuestAddress;

/// KVM: a page's write-protection is under its MMU lock, as the guest's fault is.
struct Kernel {
    entries: Vec<RingEntry>,
    watched: Mutex<[bool; 2]>,
    data: [AtomicU64; 2],
}

struct Ring(Arc<Kernel>);
struct Host(Arc<Kernel>);

impl RingMemory for Ring {
    fn entries(&self) -> &[RingEntry] {
        &self.0.entries
    }
}

impl ResetRings for Host {
    fn reset_dirty_rings(&self) -> io::Result<u32> {
        let mut watched = self.0.watched.lock().unwrap();
        let mut count = 0;
        for entry in &self.0.entries {
            if let Some((_, page)) = entry.reset() {
                watched[page as usize] = true;
                count += 1;
            }
        }
        Ok(count)
    }
}

/// A vCPU: a write to a watched page faults, and KVM makes the next entry; one that is not watched anymore
/// is written without anybody knowing. The store is under the lock as the fault is: a processor that has the
/// page writable in its TLB has stored before KVM's flush returns.
fn guest_writes(kernel: &Kernel, next: &mut usize, page: usize, value: u64) {
    let mut watched = kernel.watched.lock().unwrap();
    if watched[page] {
        watched[page] = false;
        assert!(kernel.entries[*next].push(SlotKey(3), page as u64));
        *next += 1;
    }
    kernel.data[page].store(value, Ordering::Relaxed);
}

#[test]
fn what_is_copied_after_a_harvest_is_old_only_if_the_next_harvest_tells_it_again() {
    loom::model(|| {
        let kernel = Arc::new(Kernel {
            entries: (0..4).map(|_| RingEntry::default()).collect(),
            watched: Mutex::new([true; 2]),
            data: [AtomicU64::new(0), AtomicU64::new(0)],
        });
        let rings = DirtyRings::new(Host(kernel.clone()));
        rings.add_vcpu(0, Ring(kernel.clone())).unwrap();
        // SAFETY: no VM has this slot; its numbers are all that is used.
        let extent = unsafe {
            SlotExtent::new(SlotId(3), GuestAddress(0), 2 * PAGE_SIZE, Hva(0x1000)).unwrap()
        };
        let mut source = rings.log(&extent).unwrap();
        let vcpu = {
            let kernel = kernel.clone();
            thread::spawn(move || {
                let mut next = 0;
                guest_writes(&kernel, &mut next, 1, 1);
                guest_writes(&kernel, &mut next, 1, 2);
            })
        };
        let mut copied = [0; 2];
        let mut harvest = || {
            let mut dirty = DirtyBitmap::new(2).unwrap();
            source.take(&mut dirty).unwrap();
            for run in dirty.runs() {
                for page in run.first..run.end() {
                    copied[page as usize] = kernel.data[page as usize].load(Ordering::Relaxed);
                }
            }
        };
        harvest();
        vcpu.join().unwrap();
        harvest();
        assert_eq!(copied, [0, 2], "a write was lost");
    });
}
