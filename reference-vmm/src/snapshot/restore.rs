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
//! to be huge is read instead.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use irq_routing::IrqchipStateError;
use irq_routing::ioapic::IoapicStateError;
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::state::{ClockError, ClockRestore, RestoreError as VcpuRestoreError};
use memslots::{Backing, HugePages, NewSlot};
use vm_memory::{Bytes, GuestAddress};

use super::files::{MEMORY, STATE};
use super::format::{self, SnapshotId};
use super::machine::{MachineState, StateError};
use super::pages::{self, HeaderError};
use crate::arch::layout;
use crate::config::{Config, Irqchip};
use crate::devices::virtio::any::Devices;
use crate::devices::virtio::block::DiskConfig;
use crate::devices::virtio::console::config::{ConsoleConfig, PortConfig};
use crate::devices::virtio::list::DeviceError;
use crate::devices::virtio::net::Mac;
use crate::memory::SlotTable;

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
}

impl RestoreRequest {
    /// From `dir`, with all as it was, checked, and the clocks advanced.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        RestoreRequest {
            dir: dir.into(),
            overrides: Overrides::default(),
            clock: ClockRestore::Advanced,
            verify: true,
        }
    }
}

/// Why a machine does not go on. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
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
            RestoreError::Read { source, .. } => match source.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EIO) => 1,
                _ => 2,
            },
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
            | RestoreError::Random(_) => 1,
            _ => 2,
        }
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
    memory: Arc<File>,
    dir: PathBuf,
}

impl Snapshot {
    /// Reads what `request` names, checks all of it, and puts the overrides in.
    ///
    /// Blocks for the files; with [`verify`](RestoreRequest::verify) for all of guest memory that is not zero.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing has been made.
    pub fn open(request: &RestoreRequest) -> Result<Self, RestoreError> {
        let dir = request.dir.clone();
        let path = dir.join(STATE);
        let (file, len) = open(&path)?;
        let wrong = |source| RestoreError::State {
            path: path.clone(),
            source,
        };
        if len > format::MOST_BYTES {
            return Err(wrong(format::FormatError::Long(len).into()));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        let read = |path: &Path| {
            let path = path.to_owned();
            move |source| RestoreError::Read { path, source }
        };
        file.read_exact_at(&mut bytes, 0).map_err(read(&path))?;
        let (id, state, config) = MachineState::parse(&bytes).map_err(wrong)?;
        drop(bytes);
        check_layout(&path, &state, &config)?;

        let path = dir.join(MEMORY);
        let (memory, has) = open(&path)?;
        let says = state.memory.file_len();
        if has != says {
            return Err(RestoreError::MemoryLength { path, has, says });
        }
        let mut head = [0; 32];
        memory.read_exact_at(&mut head, 0).map_err(read(&path))?;
        pages::check_header(&head, id).map_err(|source| RestoreError::Header {
            path: path.clone(),
            source,
        })?;
        if request.verify {
            verify(&memory, &path, &state)?;
        }
        let copies = request.overrides.disks.iter();
        Ok(Snapshot {
            id,
            config: request.overrides.apply(config)?,
            state,
            copies: copies.map(|(number, _)| *number).collect(),
            clock: request.clock,
            memory: Arc::new(memory),
            dir,
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
        Devices::open_from(&self.config, states, &self.copies, stdout)
    }

    /// Has the slots mapped from the file, where they can be; whether they are.
    pub(crate) fn map(&self, slots: &mut [NewSlot]) -> bool {
        let memory = &self.config.memory;
        let plain = !memory.shared && memory.hugepages.is_none() && memory.numa.is_none();
        if !plain || memory.thp == HugePages::Advise {
            return false;
        }
        for (slot, region) in slots.iter_mut().zip(&self.state.memory.regions) {
            slot.backing = Backing::file_private(self.memory.clone(), region.offset, region.len);
        }
        true
    }

    /// Reads what is not zero into new memory.
    ///
    /// # Errors
    /// [`RestoreError::Read`], [`RestoreError::Memory`].
    pub(crate) fn load(&self, table: &SlotTable) -> Result<(), RestoreError> {
        let map = &self.state.memory;
        let mut buffer = vec![0; map.piece as usize];
        for (place, piece) in map.each() {
            if piece.checksum.is_none() {
                continue;
            }
            let bytes = buffer.get_mut(..place.len as usize).unwrap_or_default();
            let read = self.memory.read_exact_at(bytes, place.offset);
            read.map_err(|source| RestoreError::Read {
                path: self.dir.join(MEMORY),
                source,
            })?;
            for (start, len) in pages::runs(bytes) {
                let address = place.guest + start as u64;
                let run = bytes.get(start..start + len).unwrap_or_default();
                let written = table.write_slice(run, GuestAddress(address));
                written.map_err(|error| RestoreError::Memory {
                    address,
                    why: error.to_string(),
                })?;
            }
        }
        Ok(())
    }
}

/// A file of a snapshot, and its length.
fn open(path: &Path) -> Result<(File, u64), RestoreError> {
    let read = |source| RestoreError::Read {
        path: path.to_owned(),
        source,
    };
    // Asked before the file is opened, because opening a pipe waits for its other end.
    let is = std::fs::metadata(path).map_err(read)?;
    if !is.is_file() {
        let path = path.to_owned();
        return Err(RestoreError::NotAFile { path });
    }
    let file = File::open(path).map_err(read)?;
    let len = file.metadata().map_err(read)?.len();
    Ok((file, len))
}

/// Whether the regions are those of a machine with this configuration.
fn check_layout(path: &Path, state: &MachineState, config: &Config) -> Result<(), RestoreError> {
    let wrong = |what: String| {
        let path = path.to_owned();
        RestoreError::Layout { path, what }
    };
    let ram = memslots::ram_layout(config.memory.size, layout::MMIO_HOLE);
    let ram = ram.map_err(|error| wrong(error.to_string()))?;
    let slots = config.memory.slots(&ram, config.irqchip != Irqchip::None);
    let regions = &state.memory.regions;
    if slots.len() != regions.len() {
        let (has, wanted) = (regions.len(), slots.len());
        return Err(wrong(format!("{has} regions, and it has {wanted}")));
    }
    for (slot, region) in slots.iter().zip(regions) {
        let wanted = (slot.start.0, slot.backing.size());
        if wanted != (region.guest, region.len) {
            let ((at, len), has) = (wanted, region);
            return Err(wrong(format!(
                "a region of {} bytes at {:#x}, and it has one of {len} at {at:#x}",
                has.len, has.guest
            )));
        }
    }
    Ok(())
}

/// Compares memory with its checksums.
fn verify(file: &File, path: &Path, state: &MachineState) -> Result<(), RestoreError> {
    let mut buffer = vec![0; state.memory.piece as usize];
    for (place, piece) in state.memory.each() {
        let (at, len) = (place.offset, place.len);
        let damaged = |what: String| RestoreError::MemoryDamaged {
            path: path.to_owned(),
            from: at,
            to: at + len,
            what,
        };
        if piece.checksum.is_none() && is_hole(file, at, len) {
            continue;
        }
        let bytes = buffer.get_mut(..len as usize).unwrap_or_default();
        let read = file.read_exact_at(bytes, at);
        read.map_err(|source| RestoreError::Read {
            path: path.to_owned(),
            source,
        })?;
        match piece.checksum {
            None if pages::is_zero(bytes) => {}
            None => return Err(damaged("it was zero, and is not".into())),
            Some(written) => {
                let found = format::checksum(bytes);
                if found != written {
                    return Err(damaged(format!(
                        "the checksum is {found:#010x}, and {written:#010x} was written"
                    )));
                }
            }
        }
    }
    Ok(())
}

/// Whether the file has nothing there. A file system that cannot say so has everything everywhere.
fn is_hole(file: &File, at: u64, len: u64) -> bool {
    use std::os::fd::AsRawFd;
    // SAFETY: an open descriptor; the position that it moves is nobody's, for all reads say theirs.
    let data = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
    match u64::try_from(data) {
        Ok(data) => data >= at + len,
        // Nothing from there to the end.
        Err(_) => io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO),
    }
}

impl Overrides {
    /// The configuration with these in it.
    fn apply(&self, mut config: Config) -> Result<Config, RestoreError> {
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
