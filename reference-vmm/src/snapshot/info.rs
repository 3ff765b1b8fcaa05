// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm snapshot info` and `verify`: what a snapshot is, without KVM.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use async_pf::working_set::WorkingSet;
use serde_json::{Value, json};

use super::chain::Chain;
use super::children;
use super::disks::{self, DiskCopy};
use super::files::{STATE, WORKING_SET};
use super::format::{self, SnapshotId};
use super::link::{self, Link};
use super::machine::MachineState;
use super::parent::Parent;
use super::restore::RestoreError;
use crate::config::Config;
use crate::text::printable;
use crate::units;

/// What a snapshot is.
#[derive(Clone, Debug)]
pub struct SnapshotInfo {
    /// Its directory.
    pub dir: PathBuf,
    /// Its number.
    pub id: SnapshotId,
    /// What it builds on, if it is an incremental one.
    pub parent: Option<Parent>,
    /// The moment that it is of, by the host's clock: as KVM told it with the guest's; where it did not, when the file
    /// `state` was written.
    pub taken: Option<SystemTime>,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Bytes of it that are this snapshot's own, be they zero: all of a full one.
    pub own: u64,
    /// Bytes that the file of memory takes on the host's disk, in its blocks. What was written into it was no more, and a copy
    /// of the file may take another number. None: there is no such file, and memory is elsewhere.
    pub on_disk: Option<u64>,
    /// Whether memory is compressed.
    pub compressed: bool,
    /// Bytes of memory that are the same as others of it, and not written again.
    pub duplicates: u64,
    /// What the machine is made of.
    pub config: Config,
    /// The virtio devices' names.
    pub devices: Vec<String>,
    /// The disks that are in the directory.
    pub disks: Vec<DiskCopy>,
    /// The snapshots that it builds on, the nearest first, by directory and number.
    pub chain: Vec<(PathBuf, SnapshotId)>,
    /// The snapshots beside it that build on it, by directory ([`children`]).
    pub children: Vec<PathBuf>,
    /// Why one of those that it builds on is not there, if so.
    pub broken: Option<String>,
    /// What a guest touched first when it went on from it, where that was recorded.
    pub working_set: Option<WorkingSet>,
}

impl SnapshotInfo {
    /// Of the snapshot in `dir`: its state and the header of its memory are checked, memory's contents are not read. A
    /// chain that is broken is told, and no error; nor is it that there is no memory, of which the chain is not looked for then.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn read(dir: &Path) -> Result<Self, RestoreError> {
        let (link, bytes) = match Link::open(dir) {
            Err(RestoreError::NoMemory { .. }) => Link::open_state(dir)?,
            opened => opened?,
        };
        let path = dir.join(STATE);
        let wrong = |source| RestoreError::State {
            path: path.clone(),
            source,
        };
        let (_, state, config) = MachineState::parse(&bytes).map_err(wrong)?;
        let disks = format::parse(&bytes).map_err(|error| wrong(error.into()))?;
        let disks = disks::of(&disks).map_err(wrong)?;
        let (chain, broken) = match link.parent().and(link.memory()).map(|_| Chain::open(dir)) {
            None => (Vec::new(), None),
            Some(Ok((chain, _))) => {
                let before = chain.links().iter().rev().skip(1);
                let before = before.map(|link| (link.dir().to_owned(), link.id()));
                (before.collect(), None)
            }
            Some(Err(error)) => (Vec::new(), Some(crate::end::Chain(&error).to_string())),
        };
        let file = link.memory().and_then(|memory| memory.metadata().ok());
        let devices = state.devices.virtio.into_iter();
        Ok(SnapshotInfo {
            dir: dir.to_owned(),
            id: link.id(),
            parent: link.parent().cloned(),
            taken: moment(state.vm.vm.clock.realtime).or_else(|| {
                let file = std::fs::metadata(&path);
                file.and_then(|file| file.modified()).ok()
            }),
            memory: link.map().all().bytes(),
            own: link.own().bytes(),
            on_disk: file.map(|file| file.blocks() * 512),
            compressed: link.is_packed(),
            duplicates: link.duplicates().bytes(),
            config,
            devices: devices.map(|device| device.name).collect(),
            disks,
            chain,
            children: children::of(dir, link.id()),
            broken,
            // One that cannot be read is none: it is a hint.
            working_set: WorkingSet::load_of(&dir.join(WORKING_SET), link.id().0).ok(),
        })
    }

    /// The same as JSON.
    pub fn json(&self) -> Value {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let taken = self.taken.map(since_1970).map(|taken| taken.as_secs());
        let places = self.config.disks.iter().enumerate();
        let disks = places.map(|(number, disk)| {
            json!({
                "path": path(&disk.path),
                "is_read_only": disk.readonly,
                "copy": self.copy(number).map(|copy| path(&self.dir.join(copy.name()))),
            })
        });
        let chain = self.chain.iter();
        json!({
            "path": path(&self.dir),
            "id": self.id.to_string(),
            "snapshot_type": match self.parent {
                Some(_) => "Diff",
                None => "Full",
            },
            "parent": self.parent.as_ref().map(|parent| json!({
                "id": parent.id.to_string(), "path": path(&parent.path), "depth": parent.depth,
            })),
            "chain": chain.map(|(dir, id)| json!({"path": path(dir), "id": id.to_string()})).collect::<Vec<_>>(),
            "children": self.children.iter().map(|dir| path(dir)).collect::<Vec<_>>(),
            "broken": self.broken,
            "taken": taken,
            "memory_bytes": self.memory,
            "memory_is_here": self.on_disk.is_some(),
            "memory": self.config.memory.to_string(),
            "own_bytes": self.own,
            "on_disk_bytes": self.on_disk,
            "compressed": self.compressed,
            "duplicate_bytes": self.duplicates,
            "vcpus": self.config.cpus.count,
            "devices": self.devices,
            "disks": disks.collect::<Vec<_>>(),
            "working_set_pages": self.working_set.as_ref().map(WorkingSet::touched),
        })
    }

    fn copy(&self, number: usize) -> Option<DiskCopy> {
        self.disks.iter().find(|copy| copy.disk == number).copied()
    }
}

impl fmt::Display for SnapshotInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A terminal obeys control characters.
        let path = |path: &Path| printable(&path.to_string_lossy());
        writeln!(f, "id          {}", self.id)?;
        match &self.parent {
            None => writeln!(f, "type        full")?,
            Some(parent) => {
                let (count, id) = (parent.depth, parent.id);
                writeln!(
                    f,
                    "type        incremental, number {count} behind a full one"
                )?;
                writeln!(f, "parent      {id} in {}", path(&parent.path))?;
            }
        }
        for (dir, id) in &self.chain {
            writeln!(f, "builds on   {id} in {}", path(dir))?;
        }
        for dir in &self.children {
            writeln!(f, "parent of   {}", path(dir))?;
        }
        if let Some(broken) = &self.broken {
            writeln!(f, "broken      {broken}")?;
        }
        if let Some(taken) = self.taken {
            let seconds = since_1970(taken).as_secs();
            writeln!(f, "taken       {}", units::utc(seconds))?;
        }
        let bytes = units::bytes;
        // As `--memory` has it, whose size may be in another unit; the rest is what kind of memory a restore makes.
        let kind = self.config.memory.to_string();
        let kind = kind
            .split_once(',')
            .map_or(String::new(), |(_, kind)| format!(", {kind}"));
        writeln!(f, "memory      {}{kind}", bytes(self.memory))?;
        if self.parent.is_some() {
            writeln!(f, "own         {} of it", bytes(self.own))?;
        }
        let compressed = if self.compressed { ", compressed" } else { "" };
        match self.on_disk {
            Some(on_disk) => writeln!(f, "on disk     {}{compressed}", bytes(on_disk))?,
            None => writeln!(
                f,
                "on disk     nothing{compressed}: memory is not here, and --page-server ADDRESS has a restore get it from a \
                 `snapshot serve`"
            )?,
        }
        if self.duplicates > 0 {
            writeln!(f, "duplicates  {} left out", bytes(self.duplicates))?;
        }
        writeln!(f, "vcpus       {}", self.config.cpus.count)?;
        for device in &self.devices {
            writeln!(f, "device      {}", printable(device))?;
        }
        for (number, disk) in self.config.disks.iter().enumerate() {
            let is = match (disk.readonly, self.copy(number)) {
                (true, _) => " (readonly)".into(),
                (false, None) => String::new(),
                (false, Some(copy)) => format!(", as it was in {}", copy.name()),
            };
            writeln!(f, "disk {number:<6} {}{is}", path(&disk.path))?;
        }
        if let Some(record) = &self.working_set {
            writeln!(f, "working set {} pages", record.touched())?;
        }
        Ok(())
    }
}

/// Reads all of the snapshot in `dir` and of those that it builds on, and compares it with its checksums: how many
/// snapshots that are.
///
/// # Errors
/// [`RestoreError`], with the file's name in it.
pub fn verify(dir: &Path) -> Result<usize, RestoreError> {
    let (chain, bytes) = Chain::open(dir)?;
    let path = dir.join(STATE);
    let wrong = |source| RestoreError::State {
        path: path.clone(),
        source,
    };
    let (_, state, config) = MachineState::parse(&bytes).map_err(wrong)?;
    super::restore::check_layout(&path, &state, &config)?;
    chain.verify()?;
    let container = format::parse(&bytes).map_err(|error| wrong(error.into()))?;
    for copy in disks::of(&container).map_err(wrong)? {
        let path = dir.join(copy.name());
        let (_, has) = link::open(&path)?;
        if has != copy.len {
            return Err(RestoreError::DiskLength {
                path,
                has,
                says: copy.len,
            });
        }
    }
    Ok(chain.links().len())
}

/// Nanoseconds since 1970; 0: not known.
fn moment(nanoseconds: u64) -> Option<SystemTime> {
    let since = (nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds))?;
    SystemTime::UNIX_EPOCH.checked_add(since)
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}
