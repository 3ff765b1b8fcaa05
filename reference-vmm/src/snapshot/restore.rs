// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading a snapshot, and what may differ in the machine that goes on from it.
//!
//! [`Snapshot::open`] reads and checks all of it: what is damaged, cut off, of another machine or of a newer build is
//! refused before there is a VM. [`Machine::restore`](crate::vm::Machine::restore) makes the machine.
//!
//! # Memory
//! Plain memory is mapped from the file, privately: guests of one snapshot share the host's page cache, and each has what
//! it writes. The file is to be left alone as long as they run, as an executable's is; that it is removed, or replaced
//! by a newer snapshot of the same name, is no matter. Memory that is shared, of huge pages, of one NUMA node or advised
//! to be huge is read instead, and so is a file that is compressed.
//!
//! Memory that [comes later](crate::lazy) is neither: the guest runs before it is read.
//!
//! Of a chain the first file is mapped, and what the later ones have is written over it, into the machine's own pages: a
//! private mapping costs a page for what was written, and nothing for what was not. Each page is read once, from the last
//! snapshot that has it. A long chain of a busy guest is better merged ([`merge`](super::merge)): then all of it is mapped.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use irq_routing::IrqchipStateError;
use irq_routing::ioapic::IoapicStateError;
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::state::{ClockError, ClockRestore, RestoreError as VcpuRestoreError};
use memslots::{Backing, HugePages, NewSlot};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError};
use super::disks::{self, DiskCopy, Provided};
use super::files::{MEMORY, STATE, absolute, same};
use super::format::{self, SnapshotId};
use super::link::Link;
use super::machine::{MachineState, StateError};
use super::pages::{self, HeaderError};
use super::tip::Tip;
use crate::config::Config;
use crate::devices::virtio::any::Devices;
use crate::devices::virtio::block::{DiskConfig, OpenError};
use crate::devices::virtio::console::config::{ConsoleConfig, PortConfig};
use crate::devices::virtio::list::DeviceError;
use crate::devices::virtio::net::Mac;
use crate::lazy::{LazyError, LazyRequest};
use crate::mapped_file::MappedFile;
use crate::memory::SlotTable;
use crate::vm::tracking::TrackError;

/// What a machine that goes on from a snapshot has of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Disks, by their place, whose image is this file: a copy of what the disk was when the snapshot was taken.
    pub disks: Vec<(usize, PathBuf)>,
    /// Network cards, by their place: another tap, another address. The guest's driver sees the address when it starts
    /// anew.
    pub nets: Vec<(usize, Option<String>, Option<Mac>)>,
    /// The guest's CID.
    pub cid: Option<u32>,
    /// The Unix socket of the vsock device.
    pub uds: Option<PathBuf>,
    /// Where hvc0 leads to.
    pub console: Option<ConsoleConfig>,
    /// Where ports lead to, by their names.
    pub ports: Vec<PortConfig>,
    /// The KVM device.
    pub kvm: Option<PathBuf>,
}

/// How a machine goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreRequest {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// What the machine has of its own.
    pub overrides: Overrides,
    /// What the guest sees of the time between.
    pub clock: ClockRestore,
    /// Guest memory is compared with its checksums, which reads all of the file. Without it what is damaged there is the
    /// guest's to find.
    pub verify: bool,
    /// Guest memory is mapped from the file, where it can be, and not read. A guest's that is mapped cannot be written in
    /// the [background](super::background).
    pub map: bool,
    /// What is written from the snapshot's moment on is tracked, so that an incremental snapshot may build on it.
    pub track: bool,
    /// Where disks that are in the snapshot are copied to, each unless [`Overrides::disks`] has it: the guest goes on with
    /// the copies.
    pub disks_to: Option<PathBuf>,
    /// The guest runs before its memory is read, which comes as [`lazy`](crate::lazy) says. It is not mapped then, and
    /// `verify` is of each piece before it is used.
    pub lazy: Option<LazyRequest>,
}

impl RestoreRequest {
    /// From `dir`, with all as it was, checked, and the clocks advanced.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        RestoreRequest {
            dir: dir.into(),
            overrides: Overrides::default(),
            clock: ClockRestore::Advanced,
            verify: true,
            map: true,
            track: false,
            disks_to: None,
            lazy: None,
        }
    }
}

/// What is where a snapshot was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoSnapshot {
    /// Nothing.
    Nothing,
    /// A directory without a file `state`.
    Folder,
    /// A file.
    File {
        /// The snapshot that it is of, if it is.
        within: Option<PathBuf>,
    },
}

impl fmt::Display for NoSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoSnapshot::Nothing => f.write_str("is not there"),
            NoSnapshot::Folder => {
                f.write_str("is a directory and no snapshot, for it has no file `state`")
            }
            NoSnapshot::File { within: None } => {
                f.write_str("is a file, and a snapshot is a directory")
            }
            NoSnapshot::File { within: Some(dir) } => write!(
                f,
                "is a file, and a snapshot is a directory: name {}",
                dir.display()
            ),
        }
    }
}

/// What helps where a snapshot that another builds on is not there.
fn put_back(child: &Path, source: &RestoreError) -> String {
    match source {
        RestoreError::NoSnapshot { .. } => format!(
            ". It is looked for there, and by its name beside {}: put it back, for without it there is no restore",
            child.display()
        ),
        _ => String::new(),
    }
}

/// Why a machine does not go on. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// There is no snapshot of this name.
    #[error("{dir} {what}")]
    NoSnapshot {
        /// What was named.
        dir: PathBuf,
        /// What is there.
        what: NoSnapshot,
    },
    /// A file of it cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// A file of it is no file.
    #[error("{path} is no regular file, which a snapshot's are")]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// It is the file `state` alone.
    #[error(
        "{dir} has the file `state` alone, and the guest's memory is not here: `restore` (and `ctl load`) with --page-server \
         ADDRESS has it brought by a `snapshot serve` that has all of the snapshot"
    )]
    NoMemory {
        /// Its directory.
        dir: PathBuf,
    },
    /// Its memory is to be of a kind that has not what was asked for.
    #[error(
        "{flag}: the guest's memory is a guest_memfd (the snapshot keeps `guest-memfd` of --memory), for which KVM has no {what}: \
         restore it without {without}"
    )]
    GuestMemfd {
        /// What was asked for.
        flag: &'static str,
        /// What that takes.
        what: &'static str,
        /// What is to be left out.
        without: &'static str,
    },
    /// The file `state` is none that can be read here.
    #[error("{path}: {source}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: StateError,
    },
    /// The file `memory` is not the one that belongs to it.
    #[error("{path}: {source}")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// The file `memory` has another length.
    #[error(
        "{path} has {has} bytes, and the state beside it is of {says}: it is cut off, or something was added"
    )]
    MemoryLength {
        /// The file.
        path: PathBuf,
        /// Its length.
        has: u64,
        /// What the state says.
        says: u64,
    },
    /// Something in the file `memory` is not what was written.
    #[error("{path} is damaged between byte {from} and {to}: {what}")]
    MemoryDamaged {
        /// The file.
        path: PathBuf,
        /// Where the piece begins.
        from: u64,
        /// Where it ends.
        to: u64,
        /// In what.
        what: String,
    },
    /// The file `memory` is not what it was while a guest is still being restored from it.
    #[error(
        "{path} was written to, or cut off, while it was read from: what was in it is not known any more"
    )]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A snapshot that it builds on cannot be read.
    #[error("{child} builds on {parent}: {source}{}", put_back(child, source))]
    Parent {
        /// The directory of the one that builds on it.
        child: PathBuf,
        /// Its directory.
        parent: PathBuf,
        /// Why not.
        source: Box<RestoreError>,
    },
    /// A snapshot that it builds on is not the one that it was.
    #[error("{child} does not go on where {parent} ends: {source}")]
    Chain {
        /// The directory of the one that builds on it.
        child: PathBuf,
        /// Its directory.
        parent: PathBuf,
        /// Why not.
        source: ChainError,
    },
    /// The first of those that are named builds on another.
    #[error(
        "{dir} is named first, and is no full snapshot: it builds on {id}, last seen in {parent}. Name the full one first, \
         and the others in the order in which they were taken; or only the last, whose chain is found"
    )]
    NotFull {
        /// Its directory.
        dir: PathBuf,
        /// What it builds on.
        id: SnapshotId,
        /// Where that was.
        parent: PathBuf,
    },
    /// There is no disk in the snapshot that could be copied.
    #[error(
        "--disks-to: there is no disk in the snapshot {0}, only what its disks were called: take it with --disks reflink or \
         copy"
    )]
    NoDisks(PathBuf),
    /// Its own writes cannot be tracked.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Memory cannot come later.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// A disk that is in the snapshot's directory has another length.
    #[error("{path} has {has} bytes, and {says} were written: it is cut off, or was written to")]
    DiskLength {
        /// The file.
        path: PathBuf,
        /// Its length.
        has: u64,
        /// What the state says.
        says: u64,
    },
    /// A disk of the snapshot's cannot be copied for the guest.
    #[error("cannot copy a disk of the snapshot, {path}: {source}")]
    DiskCopy {
        /// What cannot be read or written.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The memory that was saved is not where the machine's is.
    #[error("{path}: its memory is not that of a machine as its configuration describes: {what}")]
    Layout {
        /// The file `state`.
        path: PathBuf,
        /// The first difference.
        what: String,
    },
    /// What was asked for in place of the snapshot's there is not.
    #[error("{flag}: {why}")]
    Override {
        /// The flag.
        flag: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The clock cannot be restored.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// The host, or the vCPU, does not take a vCPU's state.
    #[error("vCPU {id}: {source}")]
    Vcpu {
        /// Which.
        id: VcpuId,
        /// Why.
        source: VcpuRestoreError,
    },
    /// The interrupt controllers do not take their state.
    #[error(transparent)]
    Irqchip(#[from] IrqchipStateError),
    /// The IOAPIC of the monitor's does not.
    #[error("the IOAPIC's state is not possible: {0}")]
    Ioapic(#[from] IoapicStateError),
    /// What was pending cannot be sent.
    #[error("what the IOAPIC had pending cannot be sent")]
    Pending(#[source] irq_routing::Error),
    /// A device does not take its state.
    #[error("the state of {device} is not possible: {why}")]
    Device {
        /// Which.
        device: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The guest's memory does not take what was saved.
    #[error("guest memory at {address:#x} cannot be written: {why}")]
    Memory {
        /// Guest physical address.
        address: u64,
        /// Why.
        why: String,
    },
    /// There is no number for the machine's new generation.
    #[error("the host gives no random number: {0}")]
    Random(io::Error),
}

impl RestoreError {
    /// The process's exit status: 2 the snapshot or the arguments are wrong, or not for this host; 1 the host refused.
    pub fn exit_status(&self) -> u8 {
        match self {
            RestoreError::Read { source, .. } | RestoreError::DiskCopy { source, .. } => {
                match source.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EIO | libc::ENOSPC) => {
                        1
                    }
                    _ => 2,
                }
            }
            RestoreError::Parent { source, .. } => source.exit_status(),
            RestoreError::Lazy(error) => error.exit_status(),
            RestoreError::Clock(ClockError::NoRealtime)
            | RestoreError::Vcpu {
                source: VcpuRestoreError::Refused(_),
                ..
            }
            | RestoreError::Irqchip(
                IrqchipStateError::Kind { .. } | IrqchipStateError::Ioapic(_),
            ) => 2,
            RestoreError::Clock(_)
            | RestoreError::Vcpu { .. }
            | RestoreError::Irqchip(_)
            | RestoreError::Pending(_)
            | RestoreError::Memory { .. }
            | RestoreError::Track(_)
            | RestoreError::Random(_) => 1,
            _ => 2,
        }
    }
}

/// Refuses what is asked for and the guest's kind of memory has not, which a restore cannot change.
fn check_memory(request: &RestoreRequest, config: &Config) -> Result<(), RestoreError> {
    if !config.memory.guest_memfd {
        return Ok(());
    }
    if let Some(lazy) = &request.lazy {
        let flag = match (lazy.page_server.is_some(), lazy.handler.is_some()) {
            (true, _) => "--page-server",
            (_, true) => "--page-handler",
            _ => "--lazy",
        };
        return Err(RestoreError::GuestMemfd {
            flag,
            what: "userfaultfd, by which memory comes later",
            without: "--lazy and what means it (--on-loss, --page-deadline, --record, --page-handler, --page-server), from a \
                      directory that has all of the snapshot",
        });
    }
    match request.track {
        true => Err(RestoreError::GuestMemfd {
            flag: "--track-dirty-pages",
            what: "dirty log",
            without: "it",
        }),
        false => Ok(()),
    }
}

/// A snapshot that was read and found whole.
#[derive(Debug)]
pub struct Snapshot {
    id: SnapshotId,
    /// All but memory.
    pub(crate) state: MachineState,
    /// What the machine is made of, with the overrides.
    pub(crate) config: Config,
    /// Disks whose image is declared to be a copy.
    copies: BTreeSet<usize>,
    pub(crate) clock: ClockRestore,
    chain: Arc<Chain>,
    /// What the disks were is in the snapshot, and the guest goes on with others.
    left: Vec<DiskCopy>,
    provided: Mutex<Provided>,
}

impl Snapshot {
    /// Reads what `request` names, checks all of it, and puts the overrides in.
    ///
    /// Blocks for the files; with [`verify`](RestoreRequest::verify) for all of guest memory that is not zero.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing has been made.
    pub fn open(request: &RestoreRequest) -> Result<Self, RestoreError> {
        let remote = request
            .lazy
            .as_ref()
            .and_then(|lazy| lazy.page_server.as_ref());
        let (mut chain, bytes) = match remote {
            Some(_) => Chain::open_state(&request.dir)?,
            None => Chain::open(&request.dir)?,
        };
        let path = request.dir.join(STATE);
        let (id, state, config) =
            MachineState::parse(&bytes).map_err(|source| RestoreError::State {
                path: path.clone(),
                source,
            })?;
        check_layout(&path, &state, &config)?;
        check_memory(request, &config)?;
        let container = format::parse(&bytes).map_err(StateError::from);
        let copies = container.and_then(|container| disks::of(&container));
        let copies = copies.map_err(|source| RestoreError::State { path, source })?;
        drop(bytes);
        match &request.lazy {
            // The server's to check.
            Some(_) if remote.is_some() => {}
            Some(_) => chain.check_as_read(request.verify)?,
            None if request.verify => chain.verify()?,
            None => {}
        }
        let mut overrides = request.overrides.clone();
        let others: BTreeSet<_> = overrides.disks.iter().map(|(number, _)| *number).collect();
        let copies = copies.into_iter();
        let left: Vec<_> = copies.filter(|copy| !others.contains(&copy.disk)).collect();
        let provided = match &request.disks_to {
            Some(_) if config.disks.iter().all(|disk| disk.readonly) => {
                return Err(RestoreError::Override {
                    flag: "--disks-to",
                    why: match config.disks.len() {
                        0 => "the guest has no disk".into(),
                        count => format!(
                            "the guest writes none of its {count} disks, and goes on with them"
                        ),
                    },
                });
            }
            Some(_) if left.is_empty() && others.is_empty() => {
                return Err(RestoreError::NoDisks(request.dir.clone()));
            }
            // What cannot be is found before anything is copied.
            Some(folder) => {
                overrides.apply(config.clone())?;
                disks::provide(&request.dir, &left, folder)?
            }
            None => Provided::default(),
        };
        overrides.disks.extend(provided.images().iter().cloned());
        let config = overrides.apply(config)?;
        check_own_disks(&chain, &config)?;
        Ok(Snapshot {
            id,
            config,
            state,
            copies: overrides.disks.iter().map(|(number, _)| *number).collect(),
            left: match request.disks_to {
                Some(_) => Vec::new(),
                None => left,
            },
            provided: Mutex::new(provided),
            clock: request.clock,
            chain: Arc::new(chain),
        })
    }

    /// Its number.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// What the machine is made of, with the overrides.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Opens the virtio devices in their states.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub(crate) fn devices(&self, stdout: impl AsFd) -> Result<Devices, DeviceError> {
        let states = &self.state.devices.virtio;
        let opened = Devices::open_from(&self.config, states, &self.copies, stdout);
        opened.map_err(|error| match error {
            DeviceError::Open {
                flag: flag @ "--disk",
                source,
                users_fault,
            } if !self.left.is_empty() => {
                let dir = self.chain.newest().map(|link| link.dir().to_owned());
                let source = Box::new(MovedOn {
                    source,
                    dir: dir.unwrap_or_default(),
                    disk: self.left.first().map_or(0, |copy| copy.disk),
                });
                DeviceError::Open {
                    flag,
                    source,
                    users_fault,
                }
            }
            DeviceError::Open {
                flag: flag @ "--disk",
                source,
                users_fault,
            } if matches!(source.downcast_ref(), Some(OpenError::InUse { .. }))
                && self.copies.is_empty() =>
            {
                let source = Box::new(InUse(source));
                DeviceError::Open {
                    flag,
                    source,
                    users_fault,
                }
            }
            error => error,
        })
    }

    /// It and those that it builds on.
    pub(crate) fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The end of the chain that it is.
    pub(crate) fn tip(&self) -> Tip {
        let newest = self.chain.newest();
        Tip {
            id: self.id,
            depth: newest.map_or(0, Link::depth),
            dir: newest.map(|link| absolute(link.dir())).unwrap_or_default(),
        }
    }

    /// The disks that were made for the guest are the guest's.
    pub(crate) fn keep_disks(&self) {
        let provided = self.provided.lock();
        provided.unwrap_or_else(PoisonError::into_inner).keep();
    }

    /// Has the slots mapped from the file, where they can be; whether they are.
    pub(crate) fn map(&self, slots: &mut [NewSlot]) -> bool {
        let memory = &self.config.memory;
        let plain = !memory.shared
            && !memory.guest_memfd
            && memory.hugepages.is_none()
            && memory.numa.is_none();
        if !plain || memory.thp == HugePages::Advise {
            return false;
        }
        let Some(base) = self.chain.base().filter(|base| !base.is_packed()) else {
            return false;
        };
        let Some(memory) = base.memory() else {
            return false;
        };
        for (slot, region) in slots.iter_mut().zip(&self.state.memory.regions) {
            slot.backing = Backing::file_private(memory.clone(), region.offset, region.len);
        }
        true
    }

    /// The file that [`map`](Self::map) maps.
    pub(crate) fn mapped_file(&self) -> Option<MappedFile> {
        let base = self.chain.base()?;
        let path = absolute(&base.dir().join(MEMORY));
        let regions = self.state.memory.regions.clone();
        Some(MappedFile::new(path, base.memory()?.clone(), regions))
    }

    /// Writes into the machine's memory what is not there yet: of memory that is mapped the pages that are not the first
    /// snapshot's, of new memory all that is not zero.
    ///
    /// # Errors
    /// [`RestoreError::Read`], [`RestoreError::MemoryDamaged`], [`RestoreError::Memory`].
    pub(crate) fn load(&self, table: &SlotTable, mapped: bool) -> Result<(), RestoreError> {
        let mut buffer = Vec::new();
        for place in self.state.memory.places().map(|(_, place)| place) {
            let piece = place.guest..place.guest + place.len;
            let wanted: Vec<_> = match mapped {
                true => self.chain.later_within(piece).collect(),
                false => vec![piece],
            };
            for range in wanted {
                buffer.clear();
                buffer.resize((range.end - range.start) as usize, 0);
                self.chain.read(range.clone(), &mut buffer)?;
                let runs = match mapped {
                    // What became zero is not zero in the file that is mapped.
                    true => vec![(0, buffer.len())],
                    false => pages::runs(&buffer),
                };
                for (start, len) in runs {
                    let address = range.start + start as u64;
                    let run = buffer.get(start..start + len).unwrap_or_default();
                    let written = table.write_slice(run, GuestAddress(address));
                    written.map_err(|error| RestoreError::Memory {
                        address,
                        why: error.to_string(),
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// A disk cannot go on, and the snapshot has what it was.
#[derive(Debug, thiserror::Error)]
#[error(
    "{source}; what the disks were is in the snapshot: restore it with --disks-to FOLDER, which copies them there, or copy \
     one (cp --reflink=auto {} FILE) and say --disk {disk}:path=FILE",
    dir.join(format!("disk{disk}")).display()
)]
struct MovedOn {
    source: Box<dyn std::error::Error + Send + Sync>,
    dir: PathBuf,
    disk: usize,
}

/// A disk is where it was when the snapshot was taken, and somebody has it: the guest of which that was, most likely.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0}. It is where the snapshot's guest has it: beside that one a guest goes on with a copy of what the disk was then \
     (--disk 0:path=COPY, --disk 1:…), or with one that is in the snapshot (ctl snapshot --disks copy, and --disks-to \
     FOLDER here)"
)]
struct InUse(Box<dyn std::error::Error + Send + Sync>);

/// Refuses a guest that would write to the snapshot's own files, or to those of one that it builds on, by whatever name.
fn check_own_disks(chain: &Chain, config: &Config) -> Result<(), RestoreError> {
    let disks = config.disks.iter().enumerate();
    for (number, disk) in disks.filter(|(_, disk)| !disk.readonly) {
        for dir in chain.links().iter().map(Link::dir) {
            let Some(own) = own_file(&disk.path, dir)? else {
                continue;
            };
            let (path, own) = (disk.path.display(), own.display());
            return Err(RestoreError::Override {
                flag: "--disk",
                why: format!(
                    "{path}, for disk {number}, is the snapshot's own file {own}, which no guest writes: --disks-to FOLDER \
                     copies it"
                ),
            });
        }
    }
    Ok(())
}

/// What `path` is in the snapshot in `dir`, if it is anything there: by another name, as a symbolic or a hard link.
fn own_file(path: &Path, dir: &Path) -> Result<Option<PathBuf>, RestoreError> {
    let cannot = |source| RestoreError::DiskCopy {
        path: dir.to_owned(),
        source,
    };
    for entry in std::fs::read_dir(dir).map_err(cannot)? {
        let entry = entry.map_err(cannot)?.path();
        if same(path, &entry) {
            return Ok(Some(entry));
        }
    }
    let within = path.parent().is_some_and(|folder| same(folder, dir));
    Ok(within.then(|| path.to_owned()))
}

/// Whether the regions are those of a machine with this configuration.
pub(super) fn check_layout(
    path: &Path,
    state: &MachineState,
    config: &Config,
) -> Result<(), RestoreError> {
    let path = path.to_owned();
    let fits = state.check_layout(config);
    fits.map_err(|what| RestoreError::Layout { path, what })
}

impl Overrides {
    /// The configuration with these in it.
    pub(crate) fn apply(&self, mut config: Config) -> Result<Config, RestoreError> {
        let wrong = |flag, why: String| RestoreError::Override { flag, why };
        for (number, path) in &self.disks {
            let count = config.disks.len();
            let disk = config.disks.get_mut(*number);
            let disk: &mut DiskConfig = disk.ok_or_else(|| {
                wrong(
                    "--disk",
                    format!("there is no disk {number}: the guest has {count}, from 0 on"),
                )
            })?;
            disk.path.clone_from(path);
        }
        for (number, tap, mac) in &self.nets {
            let count = config.nets.len();
            let net = config.nets.get_mut(*number);
            let net = net.ok_or_else(|| {
                wrong(
                    "--net",
                    format!("there is no network card {number}: the guest has {count}, from 0 on"),
                )
            })?;
            if let Some(tap) = tap {
                net.tap.clone_from(tap);
            }
            net.mac = mac.or(net.mac);
        }
        match &mut config.vsock {
            Some(vsock) => {
                vsock.cid = self.cid.unwrap_or(vsock.cid);
                if let Some(uds) = &self.uds {
                    vsock.uds.clone_from(uds);
                }
            }
            None if self.cid.is_some() || self.uds.is_some() => {
                return Err(wrong("--vsock", "the guest has no vsock device".into()));
            }
            None => {}
        }
        if let Some(console) = &self.console {
            if (*console == ConsoleConfig::Off) != (config.console == ConsoleConfig::Off) {
                let why = match config.console {
                    ConsoleConfig::Off => "the guest has no hvc0",
                    _ => {
                        "the guest has an hvc0, which has to lead somewhere: stdio, file=PATH, unix=PATH"
                    }
                };
                return Err(wrong("--console", why.into()));
            }
            config.console.clone_from(console);
        }
        for port in &self.ports {
            let mut ports = config.ports.iter_mut();
            let found = ports.find(|of| of.name == port.name);
            let found = found
                .ok_or_else(|| wrong("--port", format!("the guest has no port {:?}", port.name)))?;
            found.to.clone_from(&port.to);
        }
        if let Some(kvm) = &self.kvm {
            config.kvm.clone_from(kvm);
        }
        match config.validate() {
            Ok(()) => Ok(config),
            Err(error) => Err(wrong("the machine", error.to_string())),
        }
    }
}
