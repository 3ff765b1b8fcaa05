// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a lazy restore reads of a chain is what is in it, before and after the files' holes are known; what is damaged, cut
//! off or changed is no page. Without KVM.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chain_files;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use async_pf::{Fetched, PageSource, SourceError};
use chain_files::{Files, Memory, at, id, memory, page, page_addresses, parent};
use memslots::Gfn;
use proptest::prelude::*;
use reference_vmm::lazy::SnapshotSource;
use reference_vmm::snapshot::chain::Chain;
use reference_vmm::snapshot::files::HostFiles;
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::merge::{MergeRequest, merge};
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::ranges::Ranges;

const P: u64 = 4096;

/// A source of the chain that ends in `dir`.
fn source(dir: &Path, verify: bool) -> SnapshotSource {
    let (mut chain, _) = Chain::open(dir).unwrap();
    chain.check_as_read(verify).unwrap();
    SnapshotSource::new(Arc::new(chain))
}

/// Everything in runs as the source likes them, as a pager asks; each run is what `memory` has.
fn has(source: &SnapshotSource, memory: &Memory) {
    for (start, bytes) in memory {
        let (mut gfn, end) = (start / P, (start + bytes.len() as u64) / P);
        while gfn < end {
            let run = source.run(Gfn(gfn), (end - gfn).min(32));
            assert!((1..=32).contains(&run) && gfn + run <= end);
            let mut got = vec![0xee; (run * P) as usize];
            if source.fetch(Gfn(gfn), &mut got).unwrap() == Fetched::Zero {
                got.fill(0);
            }
            let from = (gfn * P - start) as usize;
            assert!(got == bytes[from..from + got.len()], "{gfn:#x} + {run}");
            gfn += run;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_is_read_as_it_is_in_any_form(
        first in proptest::collection::vec((0usize..10_000, any::<u8>()), 0..40),
        later in proptest::collection::vec((0usize..10_000, any::<u8>()), 1..40),
        verify: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let dir = |name: &str| folder.path().join(name);
        let mut memory = memory();
        let pages = page_addresses(&memory);
        for (which, fill) in &first {
            page(&mut memory, pages[which % pages.len()]).fill(*fill);
        }
        Files { dir: &dir("base"), id: id(1), parent: None, memory: &memory }.write();
        let full = memory.clone();
        let mut own = Vec::new();
        for (which, fill) in &later {
            let address = pages[which % pages.len()];
            page(&mut memory, address).fill(*fill);
            own.push(at(address));
        }
        let parent = Some((parent(&dir("base"), id(1), 1), Ranges::of(own)));
        Files { dir: &dir("top"), id: id(2), parent, memory: &memory }.write();
        for (name, expected) in [("base", &full), ("top", &memory)] {
            let source = source(&dir(name), verify);
            has(&source, expected);
            source.find_holes(|| true);
            has(&source, expected);
        }
    }
}

#[test]
fn a_compressed_one_is_read_as_it_is_with_its_duplicates() {
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let mut memory = memory();
    for (number, address) in page_addresses(&memory).into_iter().enumerate() {
        // Many are the same, some in other pieces, some zero.
        page(&mut memory, address).fill((number % 5) as u8);
    }
    Files {
        dir: &dir("plain"),
        id: id(1),
        parent: None,
        memory: &memory,
    }
    .write();
    let request = MergeRequest {
        dirs: vec![dir("plain")],
        to: dir("packed"),
        compression: Compression::Zstd,
    };
    merge(&request, &HostFiles).unwrap();
    for verify in [true, false] {
        let source = source(&dir("packed"), verify);
        has(&source, &memory);
        source.find_holes(|| true);
        has(&source, &memory);
    }
}

#[test]
fn a_hole_that_the_file_system_tells_of_is_zeros_only_if_it_was_read_as_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, file) = plain(folder.path());
    let (link, _) = Link::open(&dir).unwrap();
    let gfn = Gfn(2);
    let (_, place) = link.map().locate(gfn.0 * P).unwrap();
    let offset = place.offset + gfn.0 * P - place.guest;
    let mut written = vec![0; P as usize];
    file.read_exact_at(&mut written, offset).unwrap();
    // Whether the piece was compared with its checksum for another page's sake before.
    for before in [false, true] {
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: an open descriptor.
        let punched = unsafe { libc::fallocate(file.as_raw_fd(), how, offset as _, P as _) };
        assert_eq!(punched, 0);
        let modified = file.metadata().unwrap().modified().unwrap();
        let (checked, unchecked) = (source(&dir, true), source(&dir, false));
        // What is told to be a hole is one no more: as if the file system had lied.
        checked.find_holes(|| true);
        unchecked.find_holes(|| true);
        file.write_all_at(&written, offset).unwrap();
        let times = std::fs::FileTimes::new().set_modified(modified);
        file.set_times(times).unwrap();
        let mut bytes = vec![0; P as usize];
        if before {
            assert_eq!(checked.fetch(Gfn(3), &mut bytes).unwrap(), Fetched::Bytes);
        }
        assert_eq!(checked.fetch(gfn, &mut bytes).unwrap(), Fetched::Bytes);
        assert!(bytes == written);
        // As it is documented.
        assert_eq!(unchecked.fetch(gfn, &mut bytes).unwrap(), Fetched::Zero);
    }
}

/// A plain snapshot whose second region has something in each page, and its memory's file.
fn plain(folder: &Path) -> (std::path::PathBuf, File) {
    let dir = folder.join("s");
    let mut memory = memory();
    for (number, address) in page_addresses(&memory).into_iter().enumerate() {
        page(&mut memory, address).fill(number as u8 | 1);
    }
    Files {
        dir: &dir,
        id: id(1),
        parent: None,
        memory: &memory,
    }
    .write();
    let file = File::options()
        .read(true)
        .write(true)
        .open(dir.join("memory"));
    (dir, file.unwrap())
}

#[test]
fn what_is_damaged_is_no_page_and_asking_again_does_not_help() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, file) = plain(folder.path());
    file.write_all_at(&[0], 2 << 20).unwrap();
    let refused = source(&dir, true)
        .fetch(Gfn(5), &mut [0; 4096])
        .unwrap_err();
    assert!(
        !refused.is_transient() && refused.to_string().contains("checksum"),
        "{refused}"
    );
    // Of other pieces nothing is wrong, and unchecked nobody knows.
    assert!(source(&dir, true).fetch(Gfn(0x100), &mut [0; 4096]).is_ok());
    assert!(source(&dir, false).fetch(Gfn(5), &mut [0; 4096]).is_ok());
}

#[test]
fn a_hole_where_something_was_is_damage_and_no_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, file) = plain(folder.path());
    let (link, _) = Link::open(&dir).unwrap();
    let address = 2 * P;
    let (_, place) = link.map().locate(address).unwrap();
    let at = (place.offset + address - place.guest) as libc::off_t;
    let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: an open descriptor.
    let punched = unsafe { libc::fallocate(file.as_raw_fd(), how, at, P as libc::off_t) };
    assert_eq!(punched, 0);
    let mut bytes = vec![0; P as usize];
    let gfn = Gfn(address / P);
    let checked = source(&dir, true);
    checked.find_holes(|| true);
    let error = checked.fetch(gfn, &mut bytes).unwrap_err();
    let text = reference_vmm::end::Chain(&error).to_string();
    assert!(text.contains("is damaged between byte"), "{text}");
    assert!(!error.is_transient(), "{text}");
    // As it is documented.
    let unchecked = source(&dir, false);
    unchecked.find_holes(|| true);
    assert_eq!(unchecked.fetch(gfn, &mut bytes).unwrap(), Fetched::Zero);
}

#[test]
fn a_file_that_is_written_to_or_cut_off_meanwhile_is_found_out_at_the_next_read() {
    for cut in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (dir, file) = plain(folder.path());
        let source = source(&dir, false);
        assert!(source.fetch(Gfn(1), &mut [0; 4096]).is_ok());
        match cut {
            true => file.set_len((2 << 20) + 4096).unwrap(),
            false => {
                let times = std::fs::FileTimes::new();
                file.write_all_at(&[7], 2 << 20).unwrap();
                // Though it was in the same tick of the file system's clock.
                let now = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
                file.set_times(times.set_modified(now)).unwrap();
            }
        }
        for gfn in [0, 1, 0x100] {
            let refused = source.fetch(Gfn(gfn), &mut [0; 4096]).unwrap_err();
            assert!(!refused.is_transient(), "{refused}");
        }
    }
}

#[test]
fn a_file_whose_time_was_put_back_is_compared_anew_and_one_that_was_renamed_is_as_right_as_before()
{
    let folder = tempfile::tempdir().unwrap();
    let (dir, file) = plain(folder.path());
    let source = source(&dir, true);
    let before = file.metadata().unwrap();
    let changes = |what: &dyn Fn()| {
        // The file system's clock has ticks.
        let was = file.metadata().unwrap();
        let was = (was.ctime(), was.ctime_nsec());
        loop {
            what();
            let is = file.metadata().unwrap();
            if (is.ctime(), is.ctime_nsec()) != was {
                break;
            }
        }
    };
    let (mut bytes, mut again) = ([0; 4096], [0; 4096]);
    let _ = source.fetch(Gfn(1), &mut bytes).unwrap();
    let other = dir.join("other");
    changes(&|| {
        std::fs::rename(dir.join("memory"), &other).unwrap();
        std::fs::rename(&other, dir.join("memory")).unwrap();
    });
    let _ = source.fetch(Gfn(1), &mut again).unwrap();
    assert_eq!(bytes, again);
    changes(&|| {
        file.write_all_at(&[0xee], (2 << 20) + 4096).unwrap();
        let times = std::fs::FileTimes::new();
        let modified = before.modified().unwrap();
        file.set_times(times.set_modified(modified)).unwrap();
    });
    let error = source.fetch(Gfn(1), &mut again).unwrap_err();
    let text = reference_vmm::end::Chain(&error).to_string();
    assert!(text.contains("is damaged between byte"), "{text}");
}

#[test]
fn what_is_no_page_of_the_guests_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, _) = plain(folder.path());
    let source = source(&dir, true);
    for (gfn, bytes) in [
        (160, 4096),
        (159, 8192),
        (0x201, 4096),
        (u64::MAX, 4096),
        (u64::MAX / P, 8192),
    ] {
        let refused = source.fetch(Gfn(gfn), &mut vec![0; bytes]).unwrap_err();
        assert!(
            matches!(refused, SourceError::NoSuchPage { .. }),
            "{gfn:#x}: {refused}"
        );
    }
    for bytes in [0, 1, 4097] {
        let refused = source.fetch(Gfn(0), &mut vec![0; bytes]).unwrap_err();
        assert!(matches!(refused, SourceError::Buffer { .. }), "{refused}");
    }
}
