// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots as plain files, written by a test from memory that it makes up, and by code of its own.

#![allow(dead_code, clippy::unwrap_used)]

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use reference_vmm::snapshot::format::{Kind, SnapshotId, checksum, encode};
use reference_vmm::snapshot::pages::{self, PAGE, PageMap, Piece};
use reference_vmm::snapshot::parent::Parent;
use reference_vmm::snapshot::ranges::Ranges;

/// A guest's memory: regions by their addresses.
pub type Memory = Vec<(u64, Vec<u8>)>;

/// Two regions with a hole between, whose lengths are no whole pieces.
pub fn memory() -> Memory {
    vec![
        (0, vec![0; 640 << 10]),
        (1 << 20, vec![0; (1 << 20) + 4096]),
    ]
}

/// Each page's address.
pub fn page_addresses(memory: &Memory) -> Vec<u64> {
    let of = |(start, bytes): &(u64, Vec<u8>)| {
        let end = start + bytes.len() as u64;
        (*start..end).step_by(PAGE as usize)
    };
    memory.iter().flat_map(of).collect()
}

/// The bytes at a page's address.
pub fn page(memory: &mut Memory, address: u64) -> &mut [u8] {
    let of = |(start, bytes): &&mut (u64, Vec<u8>)| {
        (*start..*start + bytes.len() as u64).contains(&address)
    };
    let (start, bytes) = memory.iter_mut().find(of).unwrap();
    let at = (address - *start) as usize;
    &mut bytes[at..at + PAGE as usize]
}

/// A snapshot's number.
pub fn id(number: u8) -> SnapshotId {
    SnapshotId([number; 16])
}

/// A snapshot to be written.
pub struct Files<'a> {
    pub dir: &'a Path,
    pub id: SnapshotId,
    /// Of an incremental one: what it builds on, and the pages that it has.
    pub parent: Option<(Parent, Ranges)>,
    pub memory: &'a Memory,
}

/// What builds on the snapshot `id` in `dir`.
pub fn parent(dir: &Path, id: SnapshotId, depth: u32) -> Parent {
    let path = dir.to_owned();
    Parent { id, depth, path }
}

impl Files<'_> {
    /// Writes it; the bytes of its sections.
    pub fn write(&self) -> Vec<(Kind, Vec<u8>)> {
        fs::create_dir_all(self.dir).unwrap();
        let regions = self.memory.iter();
        let mut map = PageMap::of(regions.map(|(start, bytes)| (*start, bytes.len() as u64)));
        let path = self.dir.join("memory");
        let file = File::create(path).unwrap();
        file.set_len(map.file_len()).unwrap();
        file.write_all_at(&pages::header(self.id), 0).unwrap();
        let is_own = |page: u64| match &self.parent {
            None => true,
            Some((_, own)) => own.within(page..page + PAGE).next().is_some(),
        };
        let places: Vec<_> = map.places().collect();
        for (_, place) in places {
            let region = self.memory.iter();
            let mut region = region.filter(|(start, bytes)| {
                (*start..*start + bytes.len() as u64).contains(&place.guest)
            });
            let (start, bytes) = region.next().unwrap();
            let at = (place.guest - start) as usize;
            let mut piece = bytes[at..at + place.len as usize].to_vec();
            for (number, page) in piece.chunks_mut(PAGE as usize).enumerate() {
                if !is_own(place.guest + number as u64 * PAGE) {
                    page.fill(0);
                }
            }
            let zero = piece.iter().all(|byte| *byte == 0);
            if !zero {
                file.write_all_at(&piece, place.offset).unwrap();
            }
            map.pieces.push(Piece {
                checksum: (!zero).then(|| checksum(&piece)),
            });
        }
        let mut sections = vec![
            (Kind::Config, b"config".to_vec()),
            (Kind::Vm, b"vm".to_vec()),
            (Kind::Vcpus, format!("vcpus of {}", self.id).into()),
            (Kind::Devices, b"devices".to_vec()),
            (Kind::Memory, map.encode()),
        ];
        if let Some((parent, own)) = &self.parent {
            sections.push((Kind::Parent, parent.encode()));
            sections.push((Kind::PageSources, own.encode()));
        }
        self.seal(&sections);
        sections
    }

    /// Writes its file `state` with these sections.
    pub fn seal(&self, sections: &[(Kind, Vec<u8>)]) {
        fs::write(self.dir.join("state"), encode(self.id, sections)).unwrap();
    }
}

/// Each file below, and what is in it.
pub fn tree(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(tree(&path)),
            false => found.push((path.clone(), fs::read(&path).unwrap())),
        }
    }
    found.sort();
    found
}

/// One page's addresses.
pub fn at(page: u64) -> Range<u64> {
    page..page + PAGE
}
