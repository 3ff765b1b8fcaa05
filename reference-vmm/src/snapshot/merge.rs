// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm snapshot merge`: a chain as one full snapshot, without KVM.
//!
//! What comes out is what a restore of the chain's last snapshot would have: its machine, the memory of all links put
//! together, its disks. It has an id of its own and builds on nothing; the links are read and left alone.

use std::fs::File;
use std::path::PathBuf;

use super::chain::Chain;
use super::disks::{self, CopyError};
use super::files::{Draft, MEMORY, STATE, SnapshotFiles, WriteError, same};
use super::format::{self, Kind, SnapshotId};
use super::machine::StateError;
use super::memory_out::MemoryOut;
use super::packed::{Compression, FIRST};
use super::pages::{self, PageMap};
use super::restore::RestoreError;
use super::save::SnapshotError;
use crate::devices::virtio::rng::random_id;

/// What is to be merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeRequest {
    /// One snapshot, whose chain is followed; or all of a chain, the full one first.
    pub dirs: Vec<PathBuf>,
    /// The directory that comes out: new, empty, or an older snapshot that is none of the chain's and that none builds on,
    /// which it replaces.
    pub to: PathBuf,
    /// The form of its memory.
    pub compression: Compression,
}

/// What was merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeReport {
    /// The number of what came out.
    pub id: SnapshotId,
    /// How many snapshots went in.
    pub links: usize,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Bytes that were written of it, as [`SnapshotReport`](super::SnapshotReport::written) has them.
    pub written: u64,
}

/// Nothing was merged; nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A link cannot be read, is damaged, or is not of the chain.
    #[error(transparent)]
    Read(#[from] RestoreError),
    /// The result was to replace what it is made of.
    #[error("{0} is one of the chain that is merged: name another directory")]
    OntoItself(PathBuf),
    /// What comes out cannot be written.
    #[error(transparent)]
    Write(#[from] SnapshotError),
}

impl From<WriteError> for MergeError {
    fn from(error: WriteError) -> Self {
        MergeError::Write(error.into())
    }
}

impl From<CopyError> for MergeError {
    fn from(error: CopyError) -> Self {
        MergeError::Write(error.into())
    }
}

impl MergeError {
    /// The process's exit status: 2 what is to be merged is wrong; 1 the host refused.
    pub fn exit_status(&self) -> u8 {
        match self {
            MergeError::Read(error) => error.exit_status(),
            MergeError::OntoItself(_) => 2,
            // What is there is not for it, by what the command line says.
            MergeError::Write(SnapshotError::Write(
                WriteError::NoName(_)
                | WriteError::Within { .. }
                | WriteError::Occupied(_)
                | WriteError::Parent { .. }
                | WriteError::BuiltOn(_)
                | WriteError::Foreign { .. },
            )) => 2,
            MergeError::Write(_) => 1,
        }
    }
}

/// Merges, by way of `files`. Blocks until what comes out is durable.
///
/// # Errors
/// [`MergeError`].
pub fn merge(
    request: &MergeRequest,
    files: &impl SnapshotFiles,
) -> Result<MergeReport, MergeError> {
    let (chain, state) = Chain::open_all(&request.dirs)?;
    chain.verify()?;
    let Some(newest) = chain.newest() else {
        let none = StateError::Mismatch("no snapshot is named".into());
        return Err(SnapshotError::from(none).into());
    };
    if chain
        .links()
        .iter()
        .any(|link| same(link.dir(), &request.to))
    {
        return Err(MergeError::OntoItself(request.to.clone()));
    }
    let path = newest.dir().join(STATE);
    let unreadable = |source| RestoreError::State {
        path: path.clone(),
        source,
    };
    let container = format::parse(&state).map_err(|error| unreadable(error.into()))?;

    let id = SnapshotId(random_id().map_err(SnapshotError::Random)?);
    let draft = Draft::begin(files, &request.to)?;
    let regions = newest.map().regions.iter();
    let mut map = PageMap::of(regions.map(|region| (region.guest, region.len)));
    let len = match request.compression {
        Compression::None => map.file_len(),
        Compression::Zstd => FIRST,
    };
    let memory = draft.create(MEMORY, len)?;
    draft.write(&memory, &pages::header(id), 0)?;
    let places: Vec<_> = map.places().collect();
    let mut out = MemoryOut::new(&draft, &memory, &mut map).compressed(request.compression)?;
    for (number, place) in places {
        out.write_from(number, place, |range, bytes| {
            chain.read(range, bytes).map_err(MergeError::from)
        })?;
    }
    let (written, packed) = (out.written(), out.sections());

    let copies = disks::of(&container).map_err(unreadable)?;
    let mut copied = Vec::new();
    for copy in &copies {
        let path = newest.dir().join(copy.name());
        let image = File::open(&path).map_err(|source| CopyError::Read {
            path: path.clone(),
            source,
        })?;
        let go_on = || Ok::<_, MergeError>(());
        let (_, file) = disks::copy_in(&draft, &image, &path, copy.disk, true, go_on)?;
        copied.push(file);
    }
    let mut sections = Vec::new();
    for kind in [Kind::Config, Kind::Vm, Kind::Vcpus, Kind::Devices] {
        let bytes = container.section(kind);
        let bytes = bytes.map_err(|error| unreadable(error.into()))?;
        sections.push((kind, bytes.to_vec()));
    }
    sections.push((Kind::Memory, map.encode()));
    sections.extend(packed);
    if let Ok(first) = container.section(Kind::FirstPages) {
        sections.push((Kind::FirstPages, first.to_vec()));
    }
    sections.extend(disks::section(&copies).map_err(SnapshotError::from)?);
    let bytes = format::encode(id, &sections);
    let file = draft.create(STATE, bytes.len() as u64)?;
    draft.write(&file, &bytes, 0)?;
    for file in copied.iter().chain([&memory, &file]) {
        draft.sync(file)?;
    }
    draft.commit()?;
    Ok(MergeReport {
        id,
        links: chain.links().len(),
        memory: map.all().bytes(),
        written,
    })
}
