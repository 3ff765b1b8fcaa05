// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All rings of a VM, reaped together: what they told goes to the slots, then the pages are watched
//! again, then a slot's log may hand them out.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memslots::SlotExtent;

use super::entry::{Cursor, RingMemory, SlotKey};
use crate::source::fits;
use crate::{DirtyBitmap, DirtySource, Error, PageRun};

/// Has the pages of all entries that user space has taken watched again: `KVM_RESET_DIRTY_RINGS`.
///
/// Implemented for kvm-ioctls' `VmFd` (feature `kvm`); a test implements it with a fake that answers any
/// errno.
pub trait ResetRings {
    /// How many entries were reset. Blocks while KVM write-protects their pages, with the VM's slot lock
    /// held. Whoever implements it keeps signals away meanwhile (see [`DirtyRings`]).
    ///
    /// # Errors
    /// The errno. `EINTR`: some of the entries may be free without their pages being watched.
    fn reset_dirty_rings(&self) -> io::Result<u32>;
}

impl<T: ResetRings + ?Sized> ResetRings for &T {
    fn reset_dirty_rings(&self) -> io::Result<u32> {
        (**self).reset_dirty_rings()
    }
}

impl<T: ResetRings + ?Sized> ResetRings for Arc<T> {
    fn reset_dirty_rings(&self) -> io::Result<u32> {
        (**self).reset_dirty_rings()
    }
}

/// An entry about a page that belongs to no slot whose log is registered: of a slot that was deleted
/// since, that logs without a log here, or that is smaller than the entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownEntry {
    /// Whose ring it was in.
    pub vcpu: u32,
    /// The slot that it names.
    pub slot: SlotKey,
    /// The page, from the slot's start.
    pub offset: u64,
}

/// What a reap found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    /// Entries taken, of all rings. A page that two vCPUs wrote has two.
    pub entries: u64,
    /// How many of them are of no registered slot: see [`DirtyRings::unknown`].
    pub unknown: u64,
    /// The reset was interrupted: some of these pages may not be watched any more, and KVM has no call
    /// to watch them again but turning the slot's log off and on. All that this reap found counts as
    /// dirty in every later harvest, until [`DirtyRings::trust`]. Not seen with signals blocked.
    pub suspect: bool,
    /// A ring was overrun: KVM wrote over entries that nobody had taken, and which pages these were
    /// nobody knows. Every page of every slot counts as dirty in this harvest and each later one: a
    /// migration can still stop the guest and copy everything. KVM promises that it does not happen, and a
    /// software KVM that interprets the guest was seen to do it: use the largest ring there, and reap often.
    pub overrun: bool,
}

/// The dirty rings of one VM. Clones are the same; each may be called from any thread, also from the
/// vCPU's own whose ring is full. One lock is held for a reap, since the kernel has one as well.
///
#[cfg_attr(feature = "kvm", doc = "```no_run")]
#[cfg_attr(not(feature = "kvm"), doc = "```ignore")]
/// # fn f(vm: std::sync::Arc<kvm_ioctls::VmFd>, vcpu: kvm_ioctls::VcpuFd, extent: memslots::SlotExtent)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// use dirty_log::{DirtyLog, DirtyRings, LogChoice, LogInForce, MappedRing, RingSize};
/// # let size = RingSize::new(4096)?;
/// // In the creation stage: LogChoice::Ring(size).apply(&vm)?; then for each vCPU:
/// let rings = DirtyRings::new(vm);
/// rings.add_vcpu(0, MappedRing::map(&vcpu, 0, size)?)?;
/// // For each slot, before it begins to log:
/// let mut log = DirtyLog::new(extent.clone(), rings.log(&extent)?)?;
/// // On KVM_EXIT_DIRTY_RING_FULL, in whichever thread: rings.full(0)?, and enter again.
/// let harvest = log.harvest()?; // reaps all rings
/// # harvest.commit(); Ok(()) }
/// ```
///
/// # The last harvest
/// Hosts with page-modification logging keep up to 512 pages of a vCPU in the processor until it leaves
/// the guest: the harvest that has to be complete comes after every vCPU was made to leave (a pause).
/// KVM's own writes (a clock's page, a steal-time record) are in the ring of the vCPU that runs then;
/// state that is set from outside (`KVM_SET_…` of a device) is set while logging is off.
pub struct DirtyRings<H> {
    inner: Arc<Mutex<Inner<H>>>,
}

impl<H> Clone for DirtyRings<H> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

struct Inner<H> {
    host: H,
    vcpus: Vec<Vcpu>,
    slots: Vec<Slot>,
    unknown: u64,
    /// The first of them.
    examples: Vec<UnknownEntry>,
}

struct Vcpu {
    id: u32,
    cursor: Cursor<Box<dyn RingMemory>>,
    told: u64,
    /// It was overrun: its order is lost, and its pages are not known.
    overrun: bool,
    /// What it had told when it was last full, and how often in a row that was the same.
    at_full: (u64, u32),
}

struct Slot {
    key: SlotKey,
    /// What the rings told and no harvest has taken. Leaves only when all that was taken is reset.
    staged: DirtyBitmap,
    /// What may not be watched any more. Made when it is first needed.
    suspect: Option<DirtyBitmap>,
}

impl<H: ResetRings> DirtyRings<H> {
    /// How often a reset is made again that left entries or was interrupted.
    const TRIES: usize = 8;
    /// Exits of a full ring with nothing in it, in a row, that are no coincidence.
    const STUCK: u32 = 3;
    /// How many unknown entries are remembered.
    const EXAMPLES: usize = 16;

    /// The rings of the VM behind `host`; none yet.
    pub fn new(host: H) -> Self {
        Self {
            inner: Arc::new(Mutex::new(Inner {
                host,
                vcpus: Vec::new(),
                slots: Vec::new(),
                unknown: 0,
                examples: Vec::with_capacity(Self::EXAMPLES),
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<H>> {
        // A holder that panicked (in a fake) left bits staged or taken, as an error does.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a vCPU's ring: a new one, before the vCPU runs. KVM has no call that removes a vCPU, and
    /// neither is a ring removed.
    ///
    /// # Errors
    /// [`Error::Twice`].
    pub fn add_vcpu(&self, id: u32, ring: impl RingMemory + 'static) -> Result<(), Error> {
        let mut inner = self.lock();
        if inner.vcpus.iter().any(|vcpu| vcpu.id == id) {
            return Err(Error::Twice {
                what: "vCPU",
                number: id,
            });
        }
        inner.vcpus.push(Vcpu {
            id,
            cursor: Cursor::new(Box::new(ring)),
            told: 0,
            overrun: false,
            at_full: (0, 0),
        });
        Ok(())
    }

    /// The source of a slot, which is registered for as long as that lives: before the slot begins to
    /// log, or what it told until then is unknown. Allocates the slot's bitmap.
    ///
    /// # Errors
    /// [`Error::Twice`] while there is another of this slot; [`Error::Memory`].
    pub fn log(&self, slot: &SlotExtent) -> Result<RingSource<H>, Error> {
        let key = SlotKey(slot.id().0);
        let mut inner = self.lock();
        if inner.slots.iter().any(|slot| slot.key == key) {
            return Err(Error::Twice {
                what: "slot",
                number: key.0,
            });
        }
        inner.slots.push(Slot {
            key,
            // Of no page yet, also where a ring was overrun: each reap says that anew of every slot.
            staged: DirtyBitmap::new(slot.pages())?,
            suspect: None,
        });
        Ok(RingSource {
            rings: self.clone(),
            key,
            pages: slot.pages(),
        })
    }

    /// Reaps for a vCPU that left the guest with `KVM_EXIT_DIRTY_RING_FULL`; it may enter again after it.
    ///
    /// # Errors
    /// As [`reap`](Self::reap); and [`Error::RingStuck`], if KVM says "full" of a ring that has had
    /// nothing to take since the last time it said so: after an overrun KVM's own count is off by so much
    /// that this vCPU never enters again. What has been taken is kept.
    pub fn full(&self, vcpu: u32) -> Result<Reaped, Error> {
        let mut inner = self.lock();
        let reaped = inner.reap()?;
        if let Some(at) = inner.vcpus.iter_mut().find(|at| at.id == vcpu) {
            let (told, same) = at.at_full;
            // One such exit may be another thread's reap between the exit and this call.
            at.at_full = (at.told, if told == at.told { same + 1 } else { 0 });
            if at.at_full.1 >= Self::STUCK {
                at.at_full.1 = 0;
                // Each reap from now on has every page of every slot count as dirty.
                at.overrun = true;
                return Err(Error::RingStuck { vcpu });
            }
        }
        Ok(reaped)
    }

    /// Takes all entries of all rings, and has their pages watched again. For a thread that keeps rings
    /// from filling; a harvest does it too.
    ///
    /// # Errors
    /// [`Error::ResetRings`], [`Error::NotReset`]. What was taken is kept, and the next reap tries again.
    pub fn reap(&self) -> Result<Reaped, Error> {
        self.lock().reap()
    }

    /// How many entries the ring of each vCPU has told so far, by number: `each(vCPU, entries)`. Two
    /// samples make a [dirty rate](crate::estimate) by vCPU.
    pub fn told(&self, mut each: impl FnMut(u32, u64)) {
        self.lock()
            .vcpus
            .iter()
            .for_each(|vcpu| each(vcpu.id, vcpu.told));
    }

    /// How many entries of no registered slot there were so far, and the first of them (16 at most).
    pub fn unknown(&self) -> (u64, Vec<UnknownEntry>) {
        let inner = self.lock();
        (inner.unknown, inner.examples.clone())
    }

    /// Ends the suspicion that an interrupted reset left ([`Reaped::suspect`]): the slots' logs were
    /// turned off and on, and so every page is watched. An overrun is for good, and this changes nothing
    /// then; says whether it did.
    pub fn trust(&self) -> bool {
        let mut inner = self.lock();
        if inner.vcpus.iter().any(|vcpu| vcpu.overrun) {
            return false;
        }
        inner.slots.iter_mut().for_each(|slot| slot.suspect = None);
        true
    }
}

impl<H: ResetRings> Inner<H> {
    fn reap(&mut self) -> Result<Reaped, Error> {
        let mut reaped = Reaped::default();
        let mut swept = 0;
        let (slots, examples) = (&mut self.slots, &mut self.examples);
        for vcpu in &mut self.vcpus {
            let id = vcpu.id;
            let mut unknown = 0;
            let mut each = |key: SlotKey, offset| {
                let page = PageRun {
                    first: offset,
                    pages: 1,
                };
                let slot = slots.iter_mut().find(|slot| slot.key == key);
                if slot.is_none_or(|slot| slot.staged.set(page).is_err()) {
                    unknown += 1;
                    if examples.len() < DirtyRings::<H>::EXAMPLES {
                        examples.push(UnknownEntry {
                            vcpu: id,
                            slot: key,
                            offset,
                        });
                    }
                }
            };
            let taken = if vcpu.overrun {
                vcpu.cursor.sweep(&mut each)
            } else {
                vcpu.cursor.drain(&mut each)
            };
            // KVM keeps entries back, so that a ring is never taken full: one that is was overrun.
            vcpu.overrun |= taken > 0 && vcpu.cursor.is_whole_lap();
            reaped.overrun |= vcpu.overrun;
            swept += if vcpu.overrun { u64::from(taken) } else { 0 };
            vcpu.told += u64::from(taken);
            reaped.entries += u64::from(taken);
            reaped.unknown += unknown;
        }
        self.unknown += reaped.unknown;
        if reaped.overrun {
            self.distrust();
        }
        self.reset(&mut reaped, swept)?;
        Ok(reaped)
    }

    /// Has what was taken watched again, and says in `reaped` what went wrong with it. `swept` entries are
    /// of rings that were overrun, whose pages are dirty anyway.
    fn reset(&mut self, reaped: &mut Reaped, swept: u64) -> Result<(), Error> {
        let wanted: u64 = self
            .vcpus
            .iter()
            .map(|vcpu| u64::from(vcpu.cursor.unreset()))
            .sum();
        if wanted == 0 && swept == 0 {
            return Ok(());
        }
        let (mut done, mut left, mut signal) = (0, None, false);
        for _ in 0..DirtyRings::<H>::TRIES {
            signal = match self.host.reset_dirty_rings() {
                Ok(count) => {
                    done += u64::from(count);
                    false
                }
                Err(error) if error.raw_os_error() == Some(EINTR) => true,
                Err(source) => return Err(Error::ResetRings { source }),
            };
            left = None;
            for vcpu in self.vcpus.iter_mut().filter(|vcpu| !vcpu.overrun) {
                match vcpu.cursor.check_reset() {
                    0 => {}
                    some => left = left.or(Some((vcpu.id, some))),
                }
            }
            if signal || left.is_some() {
                self.suspect()?;
                reaped.suspect = true;
            }
            if left.is_none() {
                // Fewer than were taken, and none of them waits: one was written over in between, and KVM
                // waits for it to be taken again.
                if done < wanted && !reaped.suspect && !reaped.overrun {
                    self.overrun(reaped, |_| true);
                }
                return Ok(());
            }
        }
        if !signal {
            // KVM is at an entry behind the cursor that it wrote over, and goes no further.
            self.overrun(reaped, |vcpu| vcpu.cursor.unreset() > 0);
            return Ok(());
        }
        let (vcpu, left) = left.unwrap_or_default();
        Err(Error::NotReset { vcpu, left })
    }

    fn overrun(&mut self, reaped: &mut Reaped, which: impl Fn(&Vcpu) -> bool) {
        reaped.overrun = true;
        self.vcpus
            .iter_mut()
            .filter(|vcpu| which(vcpu))
            .for_each(|vcpu| vcpu.overrun = true);
        self.distrust();
    }

    /// Believes no ring any more: every page is dirty, and stays so.
    fn distrust(&mut self) {
        for slot in &mut self.slots {
            slot.staged.set_all();
            slot.suspect
                .get_or_insert_with(|| slot.staged.clone())
                .set_all();
        }
    }

    /// Remembers what was taken and may not be watched: all that is staged, which is more.
    fn suspect(&mut self) -> Result<(), Error> {
        for slot in &mut self.slots {
            match &mut slot.suspect {
                Some(suspect) => suspect.merge(&slot.staged)?,
                none => *none = Some(slot.staged.clone()),
            }
        }
        Ok(())
    }
}

/// The same number on every Linux.
const EINTR: i32 = 4;

impl<H> fmt::Debug for DirtyRings<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyRings").finish_non_exhaustive()
    }
}

/// What a VM's dirty rings tell of one slot. Made by [`DirtyRings::log`]; dropped, the slot is unknown.
#[derive(Debug)]
pub struct RingSource<H: ResetRings> {
    rings: DirtyRings<H>,
    key: SlotKey,
    pages: u64,
}

impl<H: ResetRings> DirtySource for RingSource<H> {
    fn pages(&self) -> u64 {
        self.pages
    }

    /// Reaps all rings of the VM, for all of its slots, and moves what they told of this one. One ioctl
    /// (with two system calls around it) where there is something; no allocation.
    ///
    /// # Errors
    /// As [`DirtyRings::reap`]; nothing is moved then, since the pages may not be watched yet.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.pages, into.pages())?;
        let mut inner = self.rings.lock();
        inner.reap()?;
        if let Some(slot) = inner.slots.iter_mut().find(|slot| slot.key == self.key) {
            into.merge(&slot.staged)?;
            slot.staged.clear_all();
            if let Some(suspect) = &slot.suspect {
                into.merge(suspect)?;
            }
        }
        Ok(())
    }
}

impl<H: ResetRings> Drop for RingSource<H> {
    fn drop(&mut self) {
        self.rings.lock().slots.retain(|slot| slot.key != self.key);
    }
}
