// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file `state` of a snapshot, and the sections of it that say where guest memory is. The input is one of these: with
//! its checksums made right, so that what is behind them is met as well.

#![no_main]

use libfuzzer_sys::fuzz_target;
use reference_vmm::snapshot::format::{self, Kind, SnapshotId, checksum};
use reference_vmm::snapshot::machine::MachineState;
use reference_vmm::snapshot::packed::{Duplicates, Packed};
use reference_vmm::snapshot::pages::{PageMap, Piece};
use reference_vmm::snapshot::parent::Parent;
use reference_vmm::snapshot::ranges::Ranges;

fuzz_target!(|bytes: &[u8]| {
    let Some((&form, bytes)) = bytes.split_first() else {
        return;
    };
    match form % 7 {
        0 => drop(format::parse(bytes)),
        1 => {
            if let Ok(map) = PageMap::parse(bytes) {
                assert_eq!(map.encode(), bytes);
                assert_eq!(map.each().count() as u64, map.expected());
            }
        }
        2 => {
            let mut file = bytes.to_vec();
            if file.len() < 48 {
                return;
            }
            file[..8].copy_from_slice(&format::MAGIC);
            let len = file.len() as u64;
            file[32..40].copy_from_slice(&len.to_le_bytes());
            let count = u32::from_le_bytes([file[12], file[13], file[14], file[15]]) as usize;
            let end = file.len().min(48 + 32 * count.min(64));
            let sum = checksum(&file[48..end]);
            file[40..44].copy_from_slice(&sum.to_le_bytes());
            let sum = checksum(&file[..44]);
            file[44..48].copy_from_slice(&sum.to_le_bytes());
            drop(MachineState::parse(&file));
        }
        3 => {
            if let Ok(parent) = Parent::parse(bytes) {
                assert_eq!(parent.encode(), bytes);
            }
        }
        4 => {
            if let Ok(ranges) = Ranges::parse(bytes) {
                assert_eq!(ranges.encode(), bytes);
                assert_eq!(Ranges::of(ranges.iter()), ranges);
            }
        }
        5 => {
            let mut map = PageMap::of([(0, 3 << 20), (4 << 20, 4096)]);
            map.pieces = vec![Piece { checksum: Some(1) }; map.expected() as usize];
            if let Ok(packed) = Packed::parse(bytes, &map) {
                assert_eq!(packed.encode(), bytes);
            }
            if let Ok(duplicates) = Duplicates::parse(bytes, &map.all()) {
                assert_eq!(duplicates.encode(), bytes);
            }
        }
        // Sections, a byte of zero between them.
        _ => {
            let bodies = bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec);
            let sections: Vec<_> = Kind::ALL.into_iter().zip(bodies).collect();
            let file = format::encode(SnapshotId([0; 16]), &sections);
            drop(MachineState::parse(&file));
        }
    }
});
