// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Taking a snapshot of a machine.
//!
//! ```text
//!   asked first     a device that no restore could make? a debugger? the place, the configuration's paths
//!   paused          devices' disks synced, states read ─► memory written ─► the disks' clock has moved on
//!   (goes on)       files synced, renamed
//! ```
//!
//! One in the [`background`](super::background) writes memory when the guest goes on already.
//!
//! The order of reading: devices (they rest), the interrupt controllers, the vCPUs, the VM's clock. What a controller still
//! sends then is in the vCPUs' local APICs as well at worst, never in neither.

use std::cell::OnceCell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use irq_routing::IrqchipStateError;
use kvm_core::arch::x86_64::state::{ClockError, SaveError, StateHost};
use kvm_core::{Kvm, Pause, VcpuId, VcpuView};
use kvm_ioctls::VcpuFd;
use memslots::uffd::point_in_time::PointInTimeError;
use memslots::{Gfn, PAGE_SIZE};

use super::background::{BackgroundCost, ROOM};
use super::chain::Chain;
use super::config_form::{self, PathError};
use super::disks::{self, CopyError, DiskCopies, DiskCopy};
use super::files::{
    Draft, DraftFile, HostFiles, Locked, MEMORY, STATE, SnapshotFiles, WriteError, absolute,
    hold_parent, same,
};
use super::first::FirstPages;
use super::format::{Kind, SnapshotId};
use super::link::Link;
use super::machine::{DevicesSection, MachineState, StateError, VcpuSection, VmSection};
use super::memory_out::MemoryOut;
use super::packed::{self, Compression};
use super::pages::{self, PageMap};
use super::parent::{MOST_DEPTH, Parent, ParentError};
use super::ranges::Ranges;
use super::restore::RestoreError;
use super::tick::wait_for_a_tick;
use super::tip::Tip;
use super::written::Tracking;
use crate::arch::layout;
use crate::config::Irqchip;
use crate::devices::virtio::list::DeviceState;
use crate::devices::virtio::rng::random_id;
use crate::file_pages;
use crate::lazy::{LazyError, LazyMemory};
use crate::vm::control::PATIENCE;
use crate::vm::tracking::{TrackError, TrackUser};
use crate::vm::{ControlError, Running};

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The directory that the snapshot is to be: one that is not there, that is empty, or an older snapshot, which it
    /// replaces.
    pub dir: PathBuf,
    /// All of memory, or what was written since another one.
    pub kind: SnapshotKind,
    /// Whether writes behind it are tracked, so that an incremental one may build on it: begun in the same pause, or ended
    /// with it. None: as it was. While they are, each snapshot is what the next incremental one builds on.
    pub track: Option<bool>,
    /// The form of its memory.
    pub compression: Compression,
    /// What it does with disks that the guest writes.
    pub disks: DiskCopies,
    /// Whether memory is written when the guest goes on already ([`background`](super::background)).
    pub background: bool,
    /// The most bytes of pages that are kept then because the guest has written to them before they were on the disk.
    pub room: u64,
}

/// What of memory is in a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All of it.
    #[default]
    Full,
    /// What was written since the last snapshot, which this is: by its directory, or whichever that was.
    Diff {
        /// The last snapshot.
        base: Option<PathBuf>,
    },
}

impl SnapshotRequest {
    /// A full one in `dir`, mapped by who goes on from it, its disks named, memory written while the guest is paused.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        SnapshotRequest {
            dir: dir.into(),
            kind: SnapshotKind::Full,
            track: None,
            compression: Compression::None,
            disks: DiskCopies::Name,
            background: false,
            room: ROOM,
        }
    }
}

/// A snapshot that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotReport {
    /// Its number.
    pub id: SnapshotId,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Bytes that were written of it: whole pages that are not zero, of an incremental one those that are its own; of memory
    /// that is compressed, what came out.
    pub written: u64,
    /// How long the guest stood still for it; from the call on where it did already.
    pub paused: Duration,
    /// How long all of it took.
    pub took: Duration,
    /// Of one in the background, what it cost the guest.
    pub background: Option<BackgroundCost>,
    /// Of a guest that was restored with [`record`](crate::lazy::LazyRequest::record): the recording was not over, and ended
    /// with this, for all of memory was brought. What was recorded is saved.
    pub ended_recording: bool,
}

/// Why there is no snapshot. The machine is what it was, running or paused, and an older snapshot of the name too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A device that no configuration makes: a restore could not make it again. Found before anything was done.
    #[error("{0} is a device of this program's own, which no restore could make again")]
    Device(String),
    /// Memory that was to come later does not, or is another process's. Found before anything was done.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// A debugger is attached, whose breakpoints are in guest memory. Found before anything was done.
    #[error(
        "the guest is under a debugger, whose breakpoints would be in the snapshot: run it without --gdb"
    )]
    Debugger,
    /// Nobody knows what was written since another snapshot. Found before anything was done.
    #[error(
        "what the guest has written since the last snapshot is not known: take a full one with --track first (run and \
         restore with --track-dirty-pages do so by themselves)"
    )]
    NotTracked,
    /// Writes are tracked since another snapshot than that. Found before anything was done.
    #[error(
        "{base} is the snapshot {found}, and the guest's writes are tracked since the last one, {last} in {dir}: build on \
         that"
    )]
    Base {
        /// What was asked for.
        base: PathBuf,
        /// Its number.
        found: SnapshotId,
        /// The number of the last one.
        last: SnapshotId,
        /// Where that was put.
        dir: PathBuf,
    },
    /// Something else than the guest put another snapshot in the place of the last one. Found before anything was done.
    #[error(
        "{base} was the guest's last snapshot, {last}, and has been replaced since, by {found}: take a full one, which \
         begins a new chain"
    )]
    Replaced {
        /// Where the last one was put.
        base: PathBuf,
        /// The number of what is there.
        found: SnapshotId,
        /// The number of the last one.
        last: SnapshotId,
    },
    /// What it is to build on is not whole. Found before anything was done.
    #[error("the snapshot that it is to build on cannot be read: {0}")]
    Chain(#[source] Box<RestoreError>),
    /// Where that is cannot be written down. Found before anything was done.
    #[error("the snapshot that it is to build on cannot be named: {0}")]
    Parent(#[source] ParentError),
    /// Its chain is as long as one can be. Found before anything was done.
    #[error("{0} has {MOST_DEPTH} snapshots before it, which is the most: take a full one")]
    TooLong(PathBuf),
    /// It was to replace what it builds on. Found before anything was done.
    #[error("{0} is one of the chain that it is to build on: name another directory")]
    OntoItself(PathBuf),
    /// One is being taken in the background, or this one would be. Found before anything was done.
    #[error("another snapshot of this guest is being taken: ask again when it is done")]
    Underway,
    /// Memory cannot be kept as it is while the guest goes on. Found before anything was done, but for the host's
    /// refusal of a call later on.
    #[error(
        "memory cannot be written in the background: {0}; without --background it is written in a pause"
    )]
    Background(#[from] PointInTimeError),
    /// A guest that goes on from a file has that mapped, in which nothing can be protected. Found before anything was
    /// done.
    #[error(
        "memory cannot be written in the background: the guest has that of a snapshot mapped ({0}). Take it without \
         --background, or restore the guest with --map=off"
    )]
    Mapped(memslots::Unsupported),
    /// The guest has memory of its own in which nothing can be protected. Found before anything was done.
    #[error("memory cannot be written in the background: {0}. Take it without --background")]
    Unprotected(memslots::Unsupported),
    /// It was to replace what the guest's last snapshot builds on. Found before anything was done.
    #[error(
        "{dir} is what the guest's last snapshot, {last}, builds on, which would be worth nothing without it: name another \
         directory, or remove {last} first"
    )]
    OntoBase {
        /// Where it was to be.
        dir: PathBuf,
        /// The last one.
        last: PathBuf,
    },
    /// What was written cannot be known.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Found before anything was done.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The machine cannot be paused, or does not stay so.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// KVM cannot be asked what it can save.
    #[error("cannot ask KVM what it saves: {0}")]
    Kvm(String),
    /// The host did not keep what a device has with it.
    #[error("{device}: its host's side cannot be made durable: {source}")]
    Durable {
        /// Its name in the machine.
        device: String,
        /// The errno.
        source: io::Error,
    },
    /// A device does not say its state.
    #[error("{device} has no state: {why}")]
    DeviceState {
        /// Its name in the machine.
        device: String,
        /// Why.
        why: String,
    },
    /// The interrupt controllers' state cannot be read.
    #[error(transparent)]
    Irqchip(#[from] IrqchipStateError),
    /// A vCPU's state cannot be read.
    #[error("vCPU {id}: {source}")]
    Vcpu {
        /// Which.
        id: VcpuId,
        /// What of it.
        source: SaveError,
    },
    /// A vCPU cannot be asked: it has ended.
    #[error(transparent)]
    Vcpus(#[from] kvm_core::ControlError),
    /// The VM's clock cannot be read.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// Guest memory cannot be read.
    #[error("guest memory at {address:#x} cannot be read: {why}")]
    Memory {
        /// Guest physical address.
        address: u64,
        /// Why.
        why: String,
    },
    /// A disk cannot be had in the snapshot.
    #[error(transparent)]
    Disk(#[from] CopyError),
    /// Memory cannot be compressed.
    #[error("guest memory cannot be compressed: {0}")]
    Compress(io::Error),
    /// A state has no form in the file.
    #[error(transparent)]
    State(#[from] StateError),
    /// A random number cannot be had.
    #[error("the host gives no random number: {0}")]
    Random(io::Error),
    /// The files cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Whether the snapshot in `dir` is one that the last one builds on, and not that itself.
fn is_under(dir: &Path, tip: &Tip) -> bool {
    if !dir.join(STATE).exists() || same(dir, &tip.dir) {
        return false;
    }
    // Of a chain that is gone, or is another's now, there is nothing to be lost.
    let Ok((chain, _)) = Chain::open(&tip.dir) else {
        return false;
    };
    let is_last = chain.newest().is_some_and(|link| link.id() == tip.id);
    is_last && chain.links().iter().any(|link| same(link.dir(), dir))
}

impl Running {
    /// Writes a snapshot of the machine to `request.dir`. A machine that runs is paused for it and goes on when its memory
    /// is with the host, before that is on the disk; one that is paused stays so.
    ///
    /// Blocks until the snapshot is durable.
    ///
    /// # Errors
    /// [`SnapshotError`]; nothing is left behind.
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, SnapshotError> {
        self.snapshot_with(request, &HostFiles)
    }

    /// [`snapshot`](Self::snapshot) by way of `files`.
    ///
    /// # Errors
    /// [`SnapshotError`]; nothing is left behind.
    pub fn snapshot_with(
        &self,
        request: &SnapshotRequest,
        files: &impl SnapshotFiles,
    ) -> Result<SnapshotReport, SnapshotError> {
        self.snapshot_while(request, files, &|| true)
    }

    /// The same. Where memory has to come first, that is waited for as long as it is `wanted`.
    ///
    /// # Errors
    /// [`SnapshotError`]; nothing is left behind.
    pub(crate) fn snapshot_while(
        &self,
        request: &SnapshotRequest,
        files: &impl SnapshotFiles,
        wanted: &dyn Fn() -> bool,
    ) -> Result<SnapshotReport, SnapshotError> {
        let begun = Instant::now();
        self.check_for_snapshot()?;
        if request.background && self.lazy().is_some_and(LazyMemory::is_external) {
            return Err(LazyError::External("a background snapshot").into());
        }
        let ended_recording = self.settle_memory_while(wanted)?;
        // One at a time: what the next one builds on is the last.
        let tip = match request.background {
            false => self.chain().lock(),
            true => self.chain().try_lock(),
        };
        let mut tip = tip.ok_or(SnapshotError::Underway)?;
        let parent = self.parent(request, tip.as_ref())?;
        // Held until this one is there.
        let (parent, _held) = parent.unzip();
        let config = config_form::to_json(self.config())?;
        let host = self.state_host()?;
        let id = SnapshotId(random_id().map_err(SnapshotError::Random)?);
        let asked = Asked {
            request,
            is_link: parent.is_some(),
            config,
            host,
            id,
        };
        let taken = match request.background {
            true => self.take_in_background(asked, files)?,
            false => self.take_in_a_pause(asked, files)?,
        };
        let Taken {
            draft,
            captured,
            paused,
            background,
        } = taken;
        let Captured {
            state,
            tracking,
            own,
            memory,
            written,
            packed: mut more,
            disks,
            first,
        } = captured;
        let depth = parent.as_ref().map_or(0, |parent| parent.depth);
        if let (Some(parent), Some(own)) = (&parent, &own) {
            more.push((Kind::Parent, parent.encode()));
            more.push((Kind::PageSources, own.encode()));
        }
        more.push((Kind::FirstPages, first.encode()));
        let copies: Vec<_> = disks.iter().map(|(copy, _)| *copy).collect();
        more.extend(super::disks::section(&copies)?);
        let bytes = state.encode_with(id, more)?;
        let file = draft.create(STATE, bytes.len() as u64)?;
        draft.write(&file, &bytes, 0)?;
        let copied = disks.iter().map(|(_, file)| file);
        for file in copied.chain([&memory, &file]) {
            draft.sync(file)?;
        }
        draft.commit()?;
        // Behind this nothing fails: what the next one has begins here.
        *tip = tracking.is_on().then(|| Tip {
            id,
            depth,
            dir: absolute(&request.dir),
        });
        let memory = state.memory.regions.iter().map(|region| region.len).sum();
        tracking.commit();
        Ok(SnapshotReport {
            id,
            memory,
            written,
            paused,
            took: begun.elapsed(),
            background,
            ended_recording,
        })
    }

    /// Memory is written while the guest stands still.
    fn take_in_a_pause<'a, F: SnapshotFiles>(
        &'a self,
        asked: Asked<'_>,
        files: &'a F,
    ) -> Result<Taken<'a, F>, SnapshotError> {
        let Asked {
            request,
            is_link,
            config,
            host,
            id,
        } = asked;
        let draft = Draft::begin(files, &request.dir)?;
        let (captured, paused) = self.standing_still(|pause| {
            let mut state = self.capture(pause, config, host)?;
            let first = self.first_pages(&state.vcpus);
            let tracking = Tracking::of(self, request)?;
            let own = is_link.then(|| tracking.written());
            let memory = create_memory(&draft, request, &state.memory, id)?;
            let table = self.memory();
            // An end waits for this.
            let go_on = || self.go_on();
            let disks = self.copy_disks(&draft, request.disks, &state.devices.virtio)?;
            let places: Vec<_> = state.memory.places().collect();
            let out = MemoryOut::new(&draft, &memory, &mut state.memory).only(own.as_ref());
            let mut out = out.compressed(request.compression)?;
            out.write(&table, places, go_on)?;
            let (written, packed) = (out.written(), out.sections());
            Ok::<_, SnapshotError>(Captured {
                state,
                tracking,
                own,
                memory,
                written,
                packed,
                disks,
                first,
            })
        })?;
        Ok(Taken {
            draft,
            captured,
            paused,
            background: None,
        })
    }

    /// Calls `take` while the guest stands still; and for how long it did.
    ///
    /// # Errors
    /// It does not, or has ended, or `take`'s: it goes on in any case.
    pub(super) fn standing_still<T>(
        &self,
        take: impl FnOnce(&Pause) -> Result<T, SnapshotError>,
    ) -> Result<(T, Duration), SnapshotError> {
        let begun = Instant::now();
        let held = self.hold()?;
        let taken = self.while_paused(take);
        wait_for_a_tick(&self.config().disks);
        let stood = begun.elapsed();
        drop(held);
        Ok((taken.ok_or(ControlError::Ended)??, stood))
    }

    /// Whether writing goes on: an end waits for it.
    ///
    /// # Errors
    /// The guest has ended.
    pub(super) fn go_on(&self) -> Result<(), SnapshotError> {
        match self.is_stopping() {
            true => Err(ControlError::Ended.into()),
            false => Ok(()),
        }
    }

    /// What one that is asked for builds on, kept from being replaced; none of a full one.
    fn parent(
        &self,
        request: &SnapshotRequest,
        tip: Option<&Tip>,
    ) -> Result<Option<(Parent, Locked)>, SnapshotError> {
        let SnapshotKind::Diff { base } = &request.kind else {
            return match tip {
                Some(tip) if is_under(&request.dir, tip) => Err(SnapshotError::OntoBase {
                    dir: request.dir.clone(),
                    last: tip.dir.clone(),
                }),
                _ => Ok(None),
            };
        };
        let tip = tip.filter(|_| self.is_tracked(TrackUser::Snapshot));
        let tip = tip.ok_or(SnapshotError::NotTracked)?;
        let base = base.as_deref().unwrap_or(&tip.dir);
        // Before it is looked at: it stays then what it is.
        let held = hold_parent(base);
        let (chain, _) =
            Chain::open(base).map_err(|error| SnapshotError::Chain(Box::new(error)))?;
        let found = chain.newest().map_or(tip.id, Link::id);
        if found != tip.id && same(base, &tip.dir) {
            let (base, last) = (base.to_owned(), tip.id);
            return Err(SnapshotError::Replaced { base, found, last });
        }
        if found != tip.id {
            return Err(SnapshotError::Base {
                base: base.to_owned(),
                found,
                last: tip.id,
                dir: tip.dir.clone(),
            });
        }
        if tip.depth >= MOST_DEPTH {
            return Err(SnapshotError::TooLong(base.to_owned()));
        }
        let mut links = chain.links().iter();
        if links.any(|link| same(link.dir(), &request.dir)) {
            return Err(SnapshotError::OntoItself(request.dir.clone()));
        }
        let parent = Parent {
            id: tip.id,
            depth: tip.depth + 1,
            path: absolute(base),
        };
        parent.check().map_err(SnapshotError::Parent)?;
        Ok(Some((parent, held?)))
    }

    /// Has in the draft what the disks are that the guest writes. An end ends it.
    pub(super) fn copy_disks<F: SnapshotFiles>(
        &self,
        draft: &Draft<'_, F>,
        how: DiskCopies,
        states: &[DeviceState],
    ) -> Result<Vec<(DiskCopy, DraftFile)>, SnapshotError> {
        let mut copies = Vec::new();
        if how == DiskCopies::Name {
            return Ok(copies);
        }
        let copy = how == DiskCopies::Copy;
        for (number, disk) in self.config().disks.iter().enumerate() {
            if disk.readonly {
                continue;
            }
            let image = disks::open_as_it_was(&disk.path, number, states)?;
            let go_on = || self.go_on();
            copies.push(disks::copy_in(
                draft, &image, &disk.path, number, copy, go_on,
            )?);
        }
        Ok(copies)
    }

    /// What KVM can save of the vCPUs.
    pub(crate) fn state_host(&self) -> Result<StateHost, SnapshotError> {
        let kvm = |error: &dyn std::error::Error| {
            SnapshotError::Kvm(crate::end::Chain(error).to_string())
        };
        let device = Kvm::open_at(&self.config().kvm).map_err(|error| kvm(&error))?;
        let host = self.vm().state_host(&device);
        host.map_err(|error| kvm(&error))
    }

    /// The pages that these vCPUs touch first, read while the guest stands still.
    pub(super) fn first_pages(&self, vcpus: &[VcpuSection]) -> FirstPages {
        let table = self.memory();
        let renewed = self.config().irqchip != Irqchip::None;
        let also = renewed.then_some(Gfn(layout::GENERATION_ID.0 / PAGE_SIZE));
        let holes = OnceCell::new();
        let mut read = |gfn: Gfn, into: &mut [u8]| {
            let at = gfn.0.checked_mul(PAGE_SIZE);
            at.is_some_and(|at| file_pages::read_present(&table, &holes, at, into).is_ok())
        };
        FirstPages::take(vcpus, also, &mut read)
    }

    /// All of the machine but its memory, of which there are the places alone.
    pub(crate) fn capture(
        &self,
        pause: &Pause,
        config: serde_json::Value,
        host: StateHost,
    ) -> Result<MachineState, SnapshotError> {
        let (com1, rtc, power) = self.device_states();
        let mut virtio = Vec::new();
        for placed in self.virtio() {
            let device = placed.name().to_owned();
            let durable = placed.make_durable();
            if let Err(source) = durable {
                return Err(SnapshotError::Durable { device, source });
            }
            let none = |why: String| SnapshotError::DeviceState {
                device: device.clone(),
                why,
            };
            let state = placed
                .state()
                .ok_or_else(|| none("it does not rest".into()))?
                .map_err(|error| none(error.to_string()))?;
            virtio.push(DeviceState {
                name: device,
                state,
            });
        }
        let devices = DevicesSection {
            com1,
            rtc,
            power,
            virtio,
        };
        let irqchip = self.irqchip().state(self.vm().fd().as_ref())?;
        let ioapic = self.ioapic_state();
        let mut vcpus = Vec::new();
        // Right behind a start on a busy host a thread may not have come to its vCPU yet.
        pause.wait_started(PATIENCE);
        let save = move |vcpu: &VcpuView<'_, VcpuFd>| vcpu.state(&host);
        for (id, state) in pause.with_each(save)? {
            let state = state.map_err(|source| SnapshotError::Vcpu { id, source })?;
            vcpus.push(VcpuSection { id: id.0, state });
        }
        // A guest that has just ended, which nobody has been told yet: its vCPUs are not there any more.
        if vcpus.len() != self.config().cpus.count as usize {
            return Err(ControlError::Ended.into());
        }
        let vm = self.vm().state()?;
        let table = self.memory();
        let memory = PageMap::of(table.regions().map(|region| {
            let range = region.extent().guest_range();
            (range.start, range.end - range.start)
        }));
        Ok(MachineState {
            config,
            vm: VmSection {
                vm,
                irqchip,
                ioapic,
            },
            vcpus,
            devices,
            memory,
        })
    }
}

/// What is known before anything is done.
pub(super) struct Asked<'r> {
    pub(super) request: &'r SnapshotRequest,
    /// It builds on another one.
    pub(super) is_link: bool,
    pub(super) config: serde_json::Value,
    pub(super) host: StateHost,
    pub(super) id: SnapshotId,
}

/// What is in the files but for the state, and not durable yet.
pub(super) struct Taken<'a, F: SnapshotFiles> {
    pub(super) draft: Draft<'a, F>,
    pub(super) captured: Captured<'a>,
    pub(super) paused: Duration,
    pub(super) background: Option<BackgroundCost>,
}

/// What was taken in the pause, and memory's file.
pub(super) struct Captured<'a> {
    pub(super) state: MachineState,
    pub(super) tracking: Tracking<'a>,
    pub(super) own: Option<Ranges>,
    pub(super) memory: DraftFile,
    pub(super) written: u64,
    pub(super) packed: Vec<(Kind, Vec<u8>)>,
    pub(super) disks: Vec<(DiskCopy, DraftFile)>,
    pub(super) first: FirstPages,
}

/// The file of memory, with its header.
pub(super) fn create_memory<F: SnapshotFiles>(
    draft: &Draft<'_, F>,
    request: &SnapshotRequest,
    map: &PageMap,
    id: SnapshotId,
) -> Result<DraftFile, SnapshotError> {
    let len = match request.compression {
        Compression::None => map.file_len(),
        Compression::Zstd => packed::FIRST,
    };
    let memory = draft.create(MEMORY, len)?;
    draft.write(&memory, &pages::header(id), 0)?;
    Ok(memory)
}
