// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A chain of snapshots is its links put together, and one that does not hold is refused with the link's name.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chain_files;
mod faulty_files;

use std::fs;
use std::path::{Path, PathBuf};

use chain_files::{Files, Memory, at, id, memory, page, page_addresses, parent, tree};
use faulty_files::Faulty;
use proptest::prelude::*;
use reference_vmm::end::Chain as ErrorChain;
use reference_vmm::snapshot::RestoreError;
use reference_vmm::snapshot::chain::{Chain, ChainError};
use reference_vmm::snapshot::files::{HostFiles, Locked, SnapshotFiles};
use reference_vmm::snapshot::format::{self, Kind, SnapshotId};
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::merge::{MergeError, MergeRequest, merge};
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::pages::PAGE;
use reference_vmm::snapshot::parent::{MOST_DEPTH, Parent};
use reference_vmm::snapshot::ranges::Ranges;

/// What a chain says the guest has.
fn composed(chain: &Chain, like: &Memory) -> Memory {
    let read = |(start, bytes): &(u64, Vec<u8>)| {
        let mut out = vec![0xee; bytes.len()];
        let end = start + bytes.len() as u64;
        chain.read(*start..end, &mut out).unwrap();
        (*start, out)
    };
    like.iter().map(read).collect()
}

fn request(dirs: &[&Path], to: &Path, compression: Compression) -> MergeRequest {
    MergeRequest {
        dirs: dirs.iter().map(|dir| dir.to_path_buf()).collect(),
        to: to.to_owned(),
        compression,
    }
}

/// What a guest does to a page between two snapshots: which, and with what it is filled; 0 is zero.
type Write = (prop::sample::Index, u8);

fn links() -> impl Strategy<Value = Vec<Vec<Write>>> {
    let write = (any::<prop::sample::Index>(), 0_u8..6);
    let writes = prop::collection::vec(write, 0..40);
    prop::collection::vec(writes, 1..11)
}

/// Writes a chain; its directories, and what the guest has at its end.
fn written(folder: &Path, links: &[Vec<Write>]) -> (Vec<PathBuf>, Memory) {
    let mut memory = memory();
    let pages = page_addresses(&memory);
    let mut dirs: Vec<PathBuf> = Vec::new();
    for (number, writes) in links.iter().enumerate() {
        let written = writes.iter().map(|(which, fill)| {
            let address = *which.get(&pages);
            let bytes = page(&mut memory, address);
            bytes.fill(*fill);
            // Some pages are the same, others are not.
            if fill.is_multiple_of(2) && *fill > 0 {
                bytes[..8].copy_from_slice(&address.to_le_bytes());
            }
            at(address)
        });
        let own = Ranges::of(written.collect::<Vec<_>>());
        let dir = folder.join(format!("s{number}"));
        let before = dirs.last().map(|dir| {
            let parent = parent(dir, id(number as u8), number as u32);
            (parent, own)
        });
        Files {
            dir: &dir,
            id: id(number as u8 + 1),
            parent: before,
            memory: &memory,
        }
        .write();
        dirs.push(dir);
    }
    (dirs, memory)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("LONG_TESTS").is_some() { 200 } else { 8 }))]

    #[test]
    fn a_chain_and_what_it_is_merged_to_have_what_the_guest_had(links in links()) {
        let folder = tempfile::tempdir().unwrap();
        let (dirs, memory) = written(folder.path(), &links);
        let before = tree(folder.path());
        let newest = dirs.last().unwrap();
        let (chain, _) = Chain::open(newest).unwrap();
        chain.verify().unwrap();
        prop_assert_eq!(chain.links().len(), links.len());
        prop_assert!(composed(&chain, &memory) == memory);
        // What is not the first link's is what the first one has otherwise, and what came back to it.
        let later = Ranges::of(chain.later());
        let first = composed(&Chain::open(&dirs[0]).unwrap().0, &memory);
        for address in page_addresses(&memory) {
            if later.within(at(address)).next().is_none() {
                prop_assert!(page(&mut memory.clone(), address) == page(&mut first.clone(), address));
            }
        }

        let all: Vec<_> = dirs.iter().map(PathBuf::as_path).collect();
        for compression in [Compression::None, Compression::Zstd] {
            for dirs in [&[newest.as_path()][..], &all] {
                let to = folder.path().join("out");
                let report = merge(&request(dirs, &to, compression), &HostFiles).unwrap();
                prop_assert_eq!(report.links, links.len());
                let (merged, state) = Chain::open(&to).unwrap();
                merged.verify().unwrap();
                prop_assert_eq!(merged.links().len(), 1);
                prop_assert_eq!(merged.links()[0].id(), report.id);
                prop_assert_eq!(merged.links()[0].is_packed(), compression == Compression::Zstd);
                prop_assert!(composed(&merged, &memory) == memory);
                // The machine is the newest's.
                let state = format::parse(&state).unwrap();
                let vcpus = format!("vcpus of {}", id(links.len() as u8));
                prop_assert_eq!(state.section(Kind::Vcpus).unwrap(), vcpus.as_bytes());
                // What was compressed goes on as a base, too.
                let again = folder.path().join("again");
                merge(&request(&[&to], &again, Compression::None), &HostFiles).unwrap();
                prop_assert!(composed(&Chain::open(&again).unwrap().0, &memory) == memory);
                fs::remove_dir_all(to).unwrap();
                fs::remove_dir_all(again).unwrap();
            }
        }
        prop_assert!(tree(folder.path()) == before);
    }
}

/// Three links, and something in each.
fn three() -> (tempfile::TempDir, Vec<PathBuf>, Memory) {
    let folder = tempfile::tempdir().unwrap();
    let mut memory = memory();
    let mut dirs = Vec::new();
    for number in 0..3_u8 {
        page(&mut memory, u64::from(number) * PAGE).fill(number + 1);
        let dir = folder.path().join(format!("s{number}"));
        let own = Ranges::of([at(u64::from(number) * PAGE)]);
        let before = dirs.last().map(|dir: &PathBuf| {
            let parent = parent(dir, id(number - 1), number.into());
            (parent, own)
        });
        Files {
            dir: &dir,
            id: id(number),
            parent: before,
            memory: &memory,
        }
        .write();
        dirs.push(dir);
    }
    (folder, dirs, memory)
}

fn refused(dir: &Path) -> (RestoreError, String) {
    let error = Chain::open(dir).unwrap_err();
    let text = ErrorChain(&error).to_string();
    assert!(!text.contains('\n'), "{text}");
    assert_eq!(error.exit_status(), 2, "{text}");
    (error, text)
}

fn why(error: RestoreError) -> ChainError {
    match error {
        RestoreError::Chain { source, .. } => source,
        other => panic!("{other}"),
    }
}

/// Has the link `number` say this of its parent.
fn say(dirs: &[PathBuf], number: usize, parent: &Parent) {
    let dir = &dirs[number];
    let bytes = fs::read(dir.join("state")).unwrap();
    let of = format::parse(&bytes).unwrap();
    let sections: Vec<_> = Kind::ALL
        .into_iter()
        .filter_map(|kind| match kind {
            Kind::Parent => Some((kind, parent.encode())),
            _ => Some((kind, of.section(kind).ok()?.to_vec())),
        })
        .collect();
    fs::write(dir.join("state"), format::encode(of.id, &sections)).unwrap();
}

#[test]
fn a_link_that_is_missing_is_named_with_the_one_that_wants_it() {
    let (_folder, dirs, _) = three();
    fs::remove_dir_all(&dirs[0]).unwrap();
    let (error, text) = refused(&dirs[2]);
    assert!(matches!(error, RestoreError::Parent { .. }), "{text}");
    for dir in &dirs[..2] {
        assert!(text.contains(dir.to_str().unwrap()), "{text}");
    }
    let says = format!("{} is not there", dirs[0].display());
    assert!(text.contains(&says), "{text}");
    assert!(text.contains("put it back"), "{text}");
    // What does not build on it is as good as it was.
    let (_folder, dirs, _) = three();
    fs::remove_dir_all(&dirs[2]).unwrap();
    assert_eq!(Chain::open(&dirs[1]).unwrap().0.links().len(), 2);
}

#[test]
fn what_is_no_snapshot_is_said_to_be_what_it_is() {
    let (folder, dirs, _) = three();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    for (named, says) in [
        (folder.path().join("nothing"), "is not there".to_owned()),
        (empty, "has no file `state`".to_owned()),
        (file, "is a file, and a snapshot is a directory".to_owned()),
        (
            dirs[0].join("memory"),
            format!("name {}", dirs[0].display()),
        ),
    ] {
        let (error, text) = refused(&named);
        assert!(matches!(error, RestoreError::NoSnapshot { .. }), "{text}");
        assert_eq!(error.exit_status(), 2);
        assert!(text.contains(named.to_str().unwrap()), "{text}");
        assert!(text.contains(&says), "{text}");
    }
}

#[test]
fn a_chain_may_be_moved_as_a_whole_and_a_link_that_was_replaced_is_told() {
    let (folder, dirs, memory) = three();
    let moved = tempfile::tempdir().unwrap();
    for dir in &dirs {
        let to = moved.path().join(dir.file_name().unwrap());
        fs::create_dir(&to).unwrap();
        for name in ["state", "memory"] {
            fs::copy(dir.join(name), to.join(name)).unwrap();
        }
    }
    // What is at the old place now is another snapshot.
    let other = Files {
        dir: &dirs[1],
        id: id(99),
        parent: None,
        memory: &memory,
    };
    other.write();
    let (chain, _) = Chain::open(&moved.path().join("s2")).unwrap();
    assert!(composed(&chain, &memory) == memory);
    let (error, text) = refused(&dirs[2]);
    let (found, wanted) = (id(99), id(1));
    assert!(text.contains(dirs[1].to_str().unwrap()), "{text}");
    assert_eq!(why(error), ChainError::Id { found, wanted });
    drop(folder);
    assert_eq!(
        Chain::open(&moved.path().join("s2"))
            .unwrap()
            .0
            .links()
            .len(),
        3
    );
}

#[test]
fn links_that_do_not_go_together_are_refused() {
    let (_folder, dirs, memory) = three();
    // It counts wrong.
    say(&dirs, 1, &parent(&dirs[0], id(0), 5));
    let (says, wanted) = (5, 1);
    assert_eq!(why(refused(&dirs[2]).0), ChainError::Depth { says, wanted });
    let (says, wanted) = (0, 4);
    assert_eq!(why(refused(&dirs[1]).0), ChainError::Depth { says, wanted });
    // In a circle, in which nobody can count right.
    say(&dirs, 1, &parent(&dirs[2], id(2), 1));
    assert!(matches!(why(refused(&dirs[2]).0), ChainError::Depth { .. }));
    say(&dirs, 1, &parent(&dirs[1], id(1), 1));
    assert!(matches!(why(refused(&dirs[1]).0), ChainError::Depth { .. }));
    // Another machine's.
    say(&dirs, 1, &parent(&dirs[0], id(0), 1));
    assert_eq!(Chain::open(&dirs[2]).unwrap().0.links().len(), 3);
    let smaller = memory[..1].to_vec();
    let other = Files {
        dir: &dirs[0],
        id: id(0),
        parent: None,
        memory: &smaller,
    };
    other.write();
    assert_eq!(why(refused(&dirs[2]).0), ChainError::Layout);
}

#[test]
fn a_number_that_comes_again_in_its_own_chain_is_refused() {
    let (folder, dirs, memory) = three();
    // A full one with the newest's number, on which the chain is said to build.
    let copy = folder.path().join("again");
    let full = Files {
        dir: &copy,
        id: id(2),
        parent: None,
        memory: &memory,
    };
    full.write();
    say(&dirs, 1, &parent(&copy, id(2), 1));
    assert_eq!(why(refused(&dirs[2]).0), ChainError::Cycle(id(2)));
}

#[test]
fn what_is_damaged_in_any_link_is_found_with_its_name() {
    use std::os::unix::fs::FileExt;
    let (_folder, dirs, _) = three();
    for (number, dir) in dirs.iter().enumerate() {
        let path = dir.join("memory");
        let file = fs::File::options().write(true).open(&path).unwrap();
        let place = (2 << 20) + number as u64 * PAGE;
        file.write_all_at(&[0xff], place).unwrap();
        let (chain, _) = Chain::open(&dirs[2]).unwrap();
        let error = chain.verify().unwrap_err();
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
        assert!(matches!(error, RestoreError::MemoryDamaged { .. }));
        file.write_all_at(&[number as u8 + 1], place).unwrap();
        chain.verify().unwrap();
        // Its state.
        let path = dir.join("state");
        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        let (_, text) = refused(&dirs[2]);
        let named = text.contains(path.to_str().unwrap()) && text.contains("cut off");
        assert!(named, "{text}");
        fs::write(&path, good).unwrap();
    }
    // Pages where there is no memory.
    let bytes = fs::read(dirs[2].join("state")).unwrap();
    let of = format::parse(&bytes).unwrap();
    let sections: Vec<_> = Kind::ALL
        .into_iter()
        .filter_map(|kind| match kind {
            Kind::PageSources => Some((kind, Ranges::of([at(0xa_0000)]).encode())),
            _ => Some((kind, of.section(kind).ok()?.to_vec())),
        })
        .collect();
    fs::write(dirs[2].join("state"), format::encode(of.id, &sections)).unwrap();
    let (_, text) = refused(&dirs[2]);
    assert!(text.contains("0xa0000"), "{text}");
}

#[test]
fn what_is_written_where_no_memory_is_is_found() {
    use std::os::unix::fs::FileExt;
    let (folder, dirs, _) = three();
    let zstd = folder.path().join("zstd");
    merge(&request(&[&dirs[2]], &zstd, Compression::Zstd), &HostFiles).unwrap();
    // The header's rest, and between the two regions.
    let plain = [
        32,
        100,
        4095,
        4096,
        5000,
        (2 << 20) - 1,
        (2 << 20) + (640 << 10),
        (4 << 20) - 1,
    ];
    for (dir, places) in [
        (&dirs[0], &plain[..]),
        (&dirs[2], &plain),
        (&zstd, &[32, 282, 1792, 4095]),
    ] {
        let path = dir.join("memory");
        let file = fs::File::options().write(true).open(&path).unwrap();
        for place in places {
            file.write_all_at(&[0x10], *place).unwrap();
            let (chain, _) = Chain::open(dir).unwrap();
            let error = chain.verify().unwrap_err();
            let RestoreError::MemoryDamaged { from, to, .. } = error else {
                panic!("{error}");
            };
            assert!((from..to).contains(place), "{place}: {from} to {to}");
            file.write_all_at(&[0], *place).unwrap();
            chain.verify().unwrap();
        }
    }
}

#[test]
fn only_a_chain_in_its_order_is_merged_and_never_onto_itself() {
    let (folder, dirs, _) = three();
    let before = tree(folder.path());
    let to = folder.path().join("out");
    let [first, second, third] = [&*dirs[0], &*dirs[1], &*dirs[2]];
    for (dirs, needle) in [
        (vec![second, third], "Name the full one first"),
        (vec![first, third], "is wanted"),
        (vec![second, first], "Name the full one first"),
        (
            vec![first, third, second],
            "has to be named right before it",
        ),
        (vec![first, first], "builds on no other"),
    ] {
        let request = request(&dirs, &to, Compression::None);
        let error = merge(&request, &HostFiles).unwrap_err();
        let text = ErrorChain(&error).to_string();
        assert!(text.contains(needle), "{dirs:?}: {text}");
        assert_eq!(error.exit_status(), 2);
        // Against itself only where it is named twice.
        let twice = format!("{0} does not go on where {0}", dirs[0].display());
        assert_eq!(text.contains(&twice), dirs[0] == dirs[1], "{text}");
    }
    for to in [first, second, third] {
        let request = request(&[third], to, Compression::None);
        let error = merge(&request, &HostFiles).unwrap_err();
        assert!(matches!(error, MergeError::OntoItself(_)), "{error}");
    }
    for to in [
        first.join("out"),
        second.join("new/out"),
        third.join("../s1/out"),
    ] {
        let request = request(&[third], &to, Compression::None);
        let error = merge(&request, &HostFiles).unwrap_err();
        assert!(
            error.to_string().contains("is within the snapshot"),
            "{error}"
        );
        assert_eq!(error.exit_status(), 2);
    }
    // A place that is taken.
    let taken = tempfile::tempdir().unwrap();
    fs::write(taken.path().join("file"), "").unwrap();
    let request = request(&[third], taken.path(), Compression::None);
    let error = merge(&request, &HostFiles).unwrap_err();
    assert!(error.to_string().contains("is no snapshot"), "{error}");
    assert_eq!(error.exit_status(), 2);
    assert!(tree(folder.path()) == before);
}

#[test]
fn a_merge_that_is_refused_any_call_leaves_its_links_and_an_older_snapshot_whole() {
    let (folder, dirs, _) = three();
    let to = folder.path().join("out");
    merge(&request(&[&dirs[1]], &to, Compression::None), &HostFiles).unwrap();
    let before = tree(folder.path());
    let mut refused = 0;
    for (compression, errnos) in [
        (Compression::None, vec![Some(libc::ENOSPC), None]),
        (Compression::Zstd, vec![Some(libc::EIO)]),
    ] {
        for errno in errnos {
            for at in 0.. {
                let files = Faulty::new(at, errno);
                let request = request(&[&dirs[2]], &to, compression);
                let merged = merge(&request, &files);
                if files.calls.get() <= at {
                    merged.unwrap();
                    fs::remove_dir_all(&to).unwrap();
                    merge(
                        &self::request(&[&dirs[1]], &to, Compression::None),
                        &HostFiles,
                    )
                    .unwrap();
                    break;
                }
                match (merged, errno) {
                    // A short write is gone on with.
                    (Ok(_), None) => {}
                    (Err(error), Some(errno)) => {
                        let text = ErrorChain(&error).to_string();
                        assert!(text.contains(&format!("os error {errno}")), "{at}: {text}");
                        assert_eq!(error.exit_status(), 1);
                        let now = tree(folder.path());
                        let names = |tree: &[(PathBuf, Vec<u8>)]| -> Vec<PathBuf> {
                            tree.iter().map(|(name, _)| name.clone()).collect()
                        };
                        assert_eq!(names(&now), names(&before), "{at}");
                        Chain::open(&to).unwrap().0.verify().unwrap();
                        refused += 1;
                    }
                    (merged, _) => panic!("{at}: {merged:?}"),
                }
            }
        }
    }
    assert!(refused > 25, "{refused}");
    Chain::open(&dirs[2]).unwrap().0.verify().unwrap();
}

#[test]
fn a_compressed_file_whose_frames_lie_is_refused() {
    use std::os::unix::fs::FileExt;
    let folder = tempfile::tempdir().unwrap();
    let mut memory = memory();
    for (number, address) in page_addresses(&memory).into_iter().enumerate() {
        page(&mut memory, address)[..8].copy_from_slice(&number.to_le_bytes());
    }
    let dir = folder.path().join("s");
    let of = Files {
        dir: &dir,
        id: id(1),
        parent: None,
        memory: &memory,
    };
    of.write();
    let to = folder.path().join("z");
    merge(&request(&[&dir], &to, Compression::Zstd), &HostFiles).unwrap();
    let (path, state) = (to.join("memory"), to.join("state"));
    let (good, state_good) = (fs::read(&path).unwrap(), fs::read(&state).unwrap());
    assert!((good.len() as u64) < 1 << 20, "{}", good.len());
    let verified = || Link::open(&to).and_then(|(link, _)| link.verify());
    verified().unwrap();
    let container = format::parse(&state_good).unwrap();
    let packed = container.section(Kind::Packed).unwrap().to_vec();
    let first = u32::from_le_bytes(packed[12..16].try_into().unwrap());
    // A frame of a GiB of zeros, of one byte, and none at all, in the first one's place.
    for bytes in [vec![0; 1 << 30], vec![0], Vec::new()] {
        let mut frame = zstd::bulk::compress(&bytes, 1).unwrap();
        assert!(frame.len() < 1 << 20);
        frame.truncate(first as usize);
        let mut file = good.clone();
        let rest = file.split_off(4096 + first as usize);
        file.truncate(4096);
        file.extend(&frame);
        file.extend(rest);
        fs::write(&path, file).unwrap();
        let mut packed = packed.clone();
        packed[12..16].copy_from_slice(&(frame.len() as u32).to_le_bytes());
        let sections: Vec<_> = Kind::ALL
            .into_iter()
            .filter_map(|kind| match kind {
                Kind::Packed => Some((kind, packed.clone())),
                _ => Some((kind, container.section(kind).ok()?.to_vec())),
            })
            .collect();
        fs::write(&state, format::encode(container.id, &sections)).unwrap();
        let error = verified().unwrap_err();
        assert!(
            matches!(error, RestoreError::MemoryDamaged { .. }),
            "{error}"
        );
    }
    fs::write(&state, &state_good).unwrap();
    fs::write(&path, &good).unwrap();
    verified().unwrap();
    // One byte of it anywhere.
    for at in (4096..good.len() as u64).step_by(997) {
        let file = fs::File::options().write(true).open(&path).unwrap();
        let byte = good[at as usize];
        file.write_all_at(&[!byte], at).unwrap();
        assert!(verified().is_err(), "{at}");
        file.write_all_at(&[byte], at).unwrap();
    }
}

#[test]
fn a_parent_and_its_path_are_read_back_and_anything_else_is_refused() {
    let of = parent(Path::new("/a/b"), SnapshotId(*b"0123456789abcdef"), 3);
    let bytes = of.encode();
    assert_eq!(bytes, b"0123456789abcdef\x03\0\0\0\x04\0\0\0/a/b");
    assert_eq!(Parent::parse(&bytes).unwrap(), of);
    assert_eq!(
        of.places(Path::new("/c/d")),
        [Path::new("/a/b"), Path::new("/c/b")]
    );
    assert_eq!(of.places(Path::new("/a/d")), [Path::new("/a/b")]);
    for len in 0..bytes.len() {
        assert!(Parent::parse(&bytes[..len]).is_err(), "{len}");
    }
    for (at, value) in [
        (16, 0),
        (16, MOST_DEPTH as u8 + 1),
        (20, 3),
        (20, 5),
        (24, 0),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        assert!(Parent::parse(&bytes).is_err(), "{at} {value}");
    }
}

/// The host's files on a file system that clones.
struct Cloning(std::cell::Cell<u32>);

impl SnapshotFiles for Cloning {
    fn create_dir(&self, path: &Path) -> std::io::Result<Locked> {
        HostFiles.create_dir(path)
    }
    fn create(&self, path: &Path) -> std::io::Result<fs::File> {
        HostFiles.create(path)
    }
    fn set_len(&self, file: &fs::File, len: u64) -> std::io::Result<()> {
        HostFiles.set_len(file, len)
    }
    fn write_at(&self, file: &fs::File, bytes: &[u8], offset: u64) -> std::io::Result<usize> {
        HostFiles.write_at(file, bytes, offset)
    }
    fn sync(&self, file: &fs::File) -> std::io::Result<()> {
        HostFiles.sync(file)
    }
    fn open_dir(&self, path: &Path) -> std::io::Result<fs::File> {
        HostFiles.open_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        HostFiles.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> std::io::Result<()> {
        HostFiles.exchange(one, other)
    }
    fn reflink(&self, from: &fs::File, to: &fs::File) -> std::io::Result<()> {
        self.0.set(self.0.get() + 1);
        use std::io::{Seek, SeekFrom};
        let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
        from.seek(SeekFrom::Start(0))?;
        std::io::copy(&mut from, &mut to).map(drop)
    }
    fn remove(&self, path: &Path) -> std::io::Result<()> {
        HostFiles.remove(path)
    }
}

#[test]
fn disks_go_along_cloned_or_copied_with_their_holes() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let (folder, dirs, memory) = three();
    let of = Files {
        dir: &dirs[0],
        id: id(0),
        parent: None,
        memory: &memory,
    };
    let mut sections = of.write();
    let copies = br#"[{"disk":3,"len":67108864}]"#;
    sections.push((Kind::Disks, copies.to_vec()));
    of.seal(&sections);
    let disk = fs::File::create_new(dirs[0].join("disk3")).unwrap();
    disk.set_len(64 << 20).unwrap();
    for at in [0, 5 << 20, (64 << 20) - 7] {
        disk.write_all_at(b"written", at).unwrap();
    }
    let to = folder.path().join("out");
    let request = request(&[&dirs[0]], &to, Compression::None);
    let check = || {
        let (_, state) = Link::open(&to).unwrap();
        let state = format::parse(&state).unwrap();
        assert_eq!(state.section(Kind::Disks).unwrap(), copies);
        assert!(fs::read(to.join("disk3")).unwrap() == fs::read(dirs[0].join("disk3")).unwrap());
    };
    merge(&request, &HostFiles).unwrap();
    check();
    let blocks = fs::metadata(to.join("disk3")).unwrap().blocks();
    assert!(blocks * 512 < 1 << 20, "{blocks}");
    let files = Cloning(0.into());
    merge(&request, &files).unwrap();
    check();
    assert_eq!(files.0.get(), 1);
    // One that is not there, and a list that is none.
    fs::remove_file(dirs[0].join("disk3")).unwrap();
    let text = ErrorChain(&merge(&request, &HostFiles).unwrap_err()).to_string();
    assert!(text.contains("disk3"), "{text}");
    check_older(&to);
    for (copies, needle) in [
        (&br#"[{"disk":3,"len":1},{"disk":3,"len":1}]"#[..], "twice"),
        (br#"[{"disk":-1,"len":1}]"#, "section disks"),
        (br#"{"#, "section disks"),
    ] {
        sections.pop();
        sections.push((Kind::Disks, copies.to_vec()));
        of.seal(&sections);
        let text = ErrorChain(&merge(&request, &HostFiles).unwrap_err()).to_string();
        assert!(text.contains(needle), "{text}");
        check_older(&to);
    }
}

/// What a merge was to replace is what it was.
fn check_older(dir: &Path) {
    assert_eq!(fs::read_dir(dir).unwrap().count(), 3);
    Chain::open(dir).unwrap().0.verify().unwrap();
}
