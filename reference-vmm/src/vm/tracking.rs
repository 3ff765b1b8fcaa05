// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages of a machine have been written: what an incremental snapshot holds, and what a migration sends again.
//!
//! ```text
//!   KVM's log of each slot ──┐  (guest, and KVM for it)
//!                            ├── collect ──► pages of the user Snapshot  ── harvest ──► Harvested
//!   HostWrites of each slot ─┘           └─► pages of the user Migration ── harvest ──► Harvested
//!                               (devices, gdb: this process's own writes)
//! ```
//!
//! A log forgets what it hands out, so there is one reader of it, and each user has a set of its own: a migration that
//! comes and goes takes nothing from the chain of snapshots.
//!
//! # Which log
//! With `--dirty-log ring` the vCPUs' lists, which a harvest reads as a whole; a vCPU whose list is full reads them itself
//! and keeps what they say for the harvest. Else KVM's bitmap, with manual protect where the host has it: a harvest has KVM watch pages again in chunks of 256 MiB, so
//! that no call holds the VM's MMU lock for long. Where a migration is the first user, *initially set* is asked for as
//! well: it sends every page once anyway, so none has to be protected before the guest writes it. KVM takes the choice
//! anew each time that slots begin to log.
//!
//! # What it costs
//! Off, a load and a branch for each write of a device, and no memory. On, KVM maps guest memory by pages of 4 KiB and
//! faults once at each page between two harvests.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dirty_log::{
    DirtyBitmap, DirtyLog, DirtyRings, DirtySource, HostWrites, KvmBitmap, KvmManualBitmap,
    LogChoice, LogInForce, MappedRing, PageRun, RingSize, Union,
};
use kvm_core::Vcpu;
use memslots::{Mechanism, Slot, SlotExtent, SlotFlags};
use vm_memory::GuestMemoryRegion;

use super::{Host, Running};
use crate::config::DirtyLogKind;
use crate::memory::SlotTable;

/// Who wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TrackUser {
    /// A chain of snapshots: what was written since the start.
    Snapshot,
    /// A migration: all of memory at first, then what was written since the last harvest.
    Migration,
}

const USERS: usize = 2;

/// Why it is not known what was written. What was known before still is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// KVM does not begin, or end, to log a slot.
    #[error("KVM does not change whether it logs the guest's writes: {0}")]
    Slot(#[from] memslots::Error),
    /// A log cannot be made or read.
    #[error(transparent)]
    Log(#[from] dirty_log::Error),
    /// KVM does not log the guest's writes to such memory. Found before anything was done.
    #[error(
        "the guest's writes cannot be tracked: {0}. It can have a whole snapshot (without --track and --base), and no \
         migration: for those a guest is started with another --memory"
    )]
    Memory(memslots::Unsupported),
    /// Nobody has begun to.
    #[error("the guest's writes are not tracked")]
    Off,
}

/// What a machine's slots and their logs are kept in.
pub(super) struct Tracker {
    state: Mutex<State>,
    /// With `--dirty-log ring`, and of which size each is.
    rings: Option<(DirtyRings<Host>, RingSize)>,
}

struct State {
    /// Dropped, they are deleted.
    slots: Vec<Slot>,
    /// While there is a user; in the slots' order.
    logs: Option<Vec<Log>>,
    users: [Option<Vec<DirtyBitmap>>; USERS],
}

/// Where KVM says what the guest wrote.
enum Guests<'a> {
    Bitmaps(&'a Host, LogInForce),
    Rings(&'a DirtyRings<Host>),
}

struct Log {
    of: DirtyLog<Union>,
    writes: HostWrites,
}

impl Tracker {
    /// Nobody wants to know yet. Chooses the kind of log, and so comes before the first vCPU.
    ///
    /// # Errors
    /// The host has not this kind.
    pub(super) fn new(
        slots: Vec<Slot>,
        vm: &Host,
        kind: DirtyLogKind,
    ) -> Result<Self, dirty_log::Error> {
        let (logs, users) = (None, [const { None }; USERS]);
        let state = Mutex::new(State { slots, logs, users });
        let rings = match kind.at_creation().apply(vm)? {
            LogInForce::Ring(size) => Some((DirtyRings::new(vm.clone()), size)),
            _ => None,
        };
        Ok(Tracker { state, rings })
    }

    /// Takes the vCPUs' lists, where the VM has such: before a vCPU runs.
    ///
    /// # Errors
    /// One cannot be mapped.
    pub(super) fn add_vcpus(&self, vcpus: &[Vcpu]) -> Result<(), dirty_log::Error> {
        let Some((rings, size)) = &self.rings else {
            return Ok(());
        };
        vcpus.iter().try_for_each(|vcpu| {
            let id = vcpu.id().0;
            rings.add_vcpu(id, MappedRing::map(vcpu.fd(), id, *size)?)
        })
    }

    /// The vCPUs' lists, where the VM has such.
    pub(super) fn rings(&self) -> Option<&DirtyRings<Host>> {
        self.rings.as_ref().map(|(rings, _)| rings)
    }

    /// Unmaps the lists: nothing is tracked any more.
    pub(super) fn forget_rings(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.logs = None;
        self.rings = None;
    }

    /// Begins to track, before there is a machine.
    pub(super) fn start(
        &self,
        user: TrackUser,
        vm: &Host,
        table: &SlotTable,
    ) -> Result<(), TrackError> {
        self.lock().start(user, (vm, self.rings()), table)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn start(
        &mut self,
        user: TrackUser,
        (vm, rings): (&Host, Option<&DirtyRings<Host>>),
        table: &SlotTable,
    ) -> Result<(), TrackError> {
        check(table)?;
        let pages = self.slots.iter().map(|slot| {
            let mut pages = DirtyBitmap::new(slot.extent().pages())?;
            if user == TrackUser::Migration {
                pages.set_all();
            }
            Ok(pages)
        });
        // First, so that where there is no memory for them nothing has begun.
        let pages = pages.collect::<Result<Vec<_>, dirty_log::Error>>()?;
        match (&self.logs, rings) {
            (Some(_), _) => self.collect()?,
            (None, Some(rings)) => self.begin(&Guests::Rings(rings), table)?,
            (None, None) => {
                let initially_set = user == TrackUser::Migration;
                let log = LogChoice::BestBitmap { initially_set }.apply(vm)?;
                self.begin(&Guests::Bitmaps(vm, log), table)?;
            }
        }
        self.users[user as usize] = Some(pages);
        Ok(())
    }

    /// Has all slots log. What was refused has been undone.
    fn begin(&mut self, guests: &Guests<'_>, table: &SlotTable) -> Result<(), TrackError> {
        let logs = self.slots.iter();
        let logs = logs.map(|slot| Log::new(slot.extent(), guests, table));
        let logs = logs.collect::<Result<Vec<_>, _>>()?;
        let begun = self.switch_on(&logs);
        self.logs = Some(logs);
        if begun.is_err() {
            self.end();
        }
        begun
    }

    fn switch_on(&mut self, logs: &[Log]) -> Result<(), TrackError> {
        for log in logs {
            log.writes.start()?;
        }
        for slot in &mut self.slots {
            let flags = slot.flags();
            if !flags.contains(SlotFlags::READ_ONLY) {
                // Who sees the flags of before writes all the same, and KVM logs that.
                drop(slot.set_flags(flags.with(SlotFlags::LOG_DIRTY_PAGES, true))?);
            }
        }
        Ok(())
    }

    /// Has no slot log any more.
    fn end(&mut self) {
        for slot in &mut self.slots {
            let flags = slot.flags();
            if flags.contains(SlotFlags::LOG_DIRTY_PAGES)
                && let Err(error) = slot.set_flags(flags.with(SlotFlags::LOG_DIRTY_PAGES, false))
            {
                // It goes on to cost what it costs, and nothing is wrong by it.
                log::warn!("KVM goes on to log the guest's writes: {error}");
            }
        }
        for log in self.logs.take().into_iter().flatten() {
            log.writes.stop();
        }
    }

    /// Moves what the logs know to all users.
    fn collect(&mut self) -> Result<(), TrackError> {
        let logs = self.logs.as_mut().ok_or(TrackError::Off)?;
        for (at, log) in logs.iter_mut().enumerate() {
            let harvest = log.of.harvest()?;
            for user in self.users.iter_mut().flatten() {
                if let Some(pages) = user.get_mut(at) {
                    pages.merge(harvest.bitmap())?;
                }
            }
            harvest.commit();
        }
        Ok(())
    }
}

impl Log {
    fn new(slot: &SlotExtent, guests: &Guests<'_>, table: &SlotTable) -> Result<Self, TrackError> {
        let region = table.by_id(slot.id());
        let writes = region.map_or_else(
            || HostWrites::off(slot.pages()),
            |region| region.bitmap().log(),
        );
        // What was marked when it was last on.
        writes.clone().take(&mut DirtyBitmap::new(slot.pages())?)?;
        let mut all = Union::new(slot.pages()).with(writes.clone())?;
        // The guest does not write to one that is read-only, and KVM keeps no log of it.
        if region.is_some_and(|region| !region.is_read_only()) {
            match *guests {
                Guests::Rings(rings) => all.add(rings.log(slot)?)?,
                Guests::Bitmaps(vm, LogInForce::ManualProtect { .. }) => {
                    all.add(KvmManualBitmap::new(vm.clone(), slot.clone())?)?;
                }
                Guests::Bitmaps(vm, _) => all.add(KvmBitmap::new(vm.clone(), slot.clone())?)?,
            }
        }
        let of = DirtyLog::new(slot.clone(), all)?;
        Ok(Log { of, writes })
    }
}

/// Refuses memory to which KVM does not log the guest's writes.
fn check(table: &SlotTable) -> Result<(), TrackError> {
    let writable = table.regions().filter(|region| !region.is_read_only());
    for kind in writable.map(|region| region.mapping().kind()) {
        kind.check(Mechanism::DirtyLog)
            .map_err(TrackError::Memory)?;
    }
    Ok(())
}

/// The pages of one slot.
#[derive(Clone, Debug)]
pub struct DirtySlot {
    /// Where the slot is.
    pub extent: SlotExtent,
    /// Which of its pages.
    pub pages: DirtyBitmap,
}

/// Pages that were written, for one user to deal with. Dropped, all that has not been [forgotten](Self::forget) is the
/// user's to find again.
#[must_use = "dropped, it gives back what it has"]
pub struct Harvested<'a> {
    tracker: &'a Tracker,
    user: TrackUser,
    slots: Vec<DirtySlot>,
}

impl Harvested<'_> {
    /// The slots, in order of address, and what of each was written.
    pub fn slots(&self) -> &[DirtySlot] {
        &self.slots
    }

    /// How many pages.
    pub fn count(&self) -> u64 {
        self.slots.iter().map(|slot| slot.pages.count()).sum()
    }

    /// Forgets a run of slot number `slot` that has been dealt with.
    ///
    /// # Errors
    /// [`dirty_log::Error::OutOfRange`]; nothing is forgotten.
    pub fn forget(&mut self, slot: usize, run: PageRun) -> Result<(), TrackError> {
        let pages = self.slots.get_mut(slot).map(|slot| &mut slot.pages);
        // A slot that there is not has no pages.
        let nowhere = &mut DirtyBitmap::new(0)?;
        Ok(pages.unwrap_or(nowhere).clear(run)?)
    }

    /// Forgets all: what the pages held is safe elsewhere.
    pub fn commit(mut self) {
        self.slots.clear();
    }
}

impl Drop for Harvested<'_> {
    fn drop(&mut self) {
        let mut state = self.tracker.lock();
        let Some(mine) = state.users[self.user as usize].as_mut() else {
            return;
        };
        for (mine, slot) in mine.iter_mut().zip(&self.slots) {
            // The slot's own size, always.
            let _ = mine.merge(&slot.pages);
        }
    }
}

impl fmt::Debug for Harvested<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harvested")
            .field("user", &self.user)
            .field("pages", &self.count())
            .finish_non_exhaustive()
    }
}

impl Running {
    /// Whether what is written could be tracked: what is asked before anything of it is begun.
    ///
    /// # Errors
    /// [`TrackError::Memory`].
    pub fn can_track(&self) -> Result<(), TrackError> {
        check(&self.parts.memslots.snapshot())
    }

    /// Begins to track what is written, for `user`; one that had begun begins anew. What is written once this has returned
    /// is in its next [`harvest`](Self::harvest); a [`TrackUser::Migration`] has every page in its first one besides.
    ///
    /// Blocks while KVM switches each slot over, a grace period of its own for each (milliseconds); without *initially set*
    /// it write-protects all of memory meanwhile. The guest runs on.
    ///
    /// # Errors
    /// [`TrackError`]; what was tracked before still is.
    pub fn start_tracking(&self, user: TrackUser) -> Result<(), TrackError> {
        let (vm, table) = (self.parts.vm.fd(), self.parts.memslots.snapshot());
        self.parts.tracker.start(user, vm, &table)
    }

    /// Ends it for `user`; the last one's end has KVM log no more.
    pub fn stop_tracking(&self, user: TrackUser) {
        let mut state = self.parts.tracker.lock();
        state.users[user as usize] = None;
        if state.users.iter().all(Option::is_none) {
            state.end();
        }
    }

    /// Whether it is tracked for `user`.
    pub fn is_tracked(&self, user: TrackUser) -> bool {
        self.parts.tracker.lock().users[user as usize].is_some()
    }

    /// What was written since `user`'s last harvest, or its start, and what it gave back of that one. Each page is watched
    /// again when this returns, so its contents are read behind it.
    ///
    /// In a running guest the next harvest has more; that of a paused one ([`pause`](Self::pause)) is the last word:
    /// vCPUs are out of KVM then, and devices rest.
    ///
    /// Blocks while KVM writes pages of what was written protected again.
    ///
    /// # Errors
    /// [`TrackError`]; nothing is lost.
    pub fn harvest(&self, user: TrackUser) -> Result<Harvested<'_>, TrackError> {
        let mut state = self.parts.tracker.lock();
        if state.users[user as usize].is_none() {
            return Err(TrackError::Off);
        }
        state.collect()?;
        let State { slots, users, .. } = &mut *state;
        let extents = slots.iter().map(|slot| slot.extent().clone());
        let clean = extents.clone().map(|slot| DirtyBitmap::new(slot.pages()));
        let clean = clean.collect::<Result<Vec<_>, _>>()?;
        let pages = users[user as usize].replace(clean);
        let pages = extents.zip(pages.unwrap_or_default());
        let pages = pages.map(|(extent, pages)| DirtySlot { extent, pages });
        Ok(Harvested {
            tracker: &self.parts.tracker,
            user,
            slots: pages.collect(),
        })
    }
}
