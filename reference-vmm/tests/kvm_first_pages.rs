// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that a snapshot has in its state as well, over the real KVM: they are the snapshot's, however it was taken, and a guest
//! whose memory comes later begins with them alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guests::verifier::verifier64;
use memslots::{Gfn, PAGE_SIZE};
use reference_vmm::arch::layout;
use reference_vmm::lazy::{LazyRequest, OnLoss};
use reference_vmm::snapshot::chain::Chain;
use reference_vmm::snapshot::files::HostFiles;
use reference_vmm::snapshot::first::FirstPages;
use reference_vmm::snapshot::merge::{MergeRequest, merge};
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotKind, SnapshotRequest};
use support::keeper::{Guest, machine};
use support::need_kvm;
use vm_memory::{Bytes, GuestAddress};

/// Compares them with what the files `memory` have, and gives them.
fn first_pages(dir: &Path) -> FirstPages {
    let (chain, _) = Chain::open(dir).unwrap();
    let first = chain.newest().unwrap().first_pages().unwrap();
    for gfn in first.order() {
        let (at, mut page) = (gfn.0 * PAGE_SIZE, [0; PAGE_SIZE as usize]);
        chain.read(at..at + PAGE_SIZE, &mut page).unwrap();
        assert_eq!(first.get(*gfn), Some(&page[..]), "{gfn:?} of {first:?}");
    }
    let generation = Gfn(layout::GENERATION_ID.0 / PAGE_SIZE);
    assert_eq!(first.order().first(), Some(&generation));
    // Its page tables, code and stack.
    assert!(first.order().len() > 3, "{:?}", first.order());
    FirstPages::clone(first)
}

#[test]
fn they_are_the_snapshots_pages_however_it_was_taken() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (_kernel, config) = machine(verifier64(), 2, "16M");
    let mut guest = Guest::boot(&config);
    let mut take = |name: &str, change: fn(&mut SnapshotRequest)| {
        guest.hear(2);
        let mut request = SnapshotRequest::new(at(name));
        change(&mut request);
        guest.snapshot(&request);
        first_pages(&at(name))
    };
    take("paused", |_| {});
    take("background", |request| request.background = true);
    take("packed", |request| request.compression = Compression::Zstd);
    take("full", |request| request.track = Some(true));
    let diff = take("diff", |request| {
        request.kind = SnapshotKind::Diff { base: None }
    });
    guest.leave();

    let request = MergeRequest {
        dirs: vec![at("diff")],
        to: at("merged"),
        compression: Compression::None,
    };
    merge(&request, &HostFiles).unwrap();
    assert_eq!(first_pages(&at("merged")), diff);
}

#[test]
fn a_lazy_guest_begins_with_them_alone() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("snapshot");
    let (_kernel, config) = machine(verifier64(), 1, "16M");
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.leave();
    let first = first_pages(&dir);

    // No piece of the file is what it was.
    let (chain, _) = Chain::open(&dir).unwrap();
    let link = chain.newest().unwrap();
    let memory = File::options()
        .write(true)
        .open(dir.join("memory"))
        .unwrap();
    for (number, place) in link.map().places() {
        if link.map().pieces[number].checksum.is_some() {
            memory.write_all_at(&[0x5a; 64], place.offset).unwrap();
        }
    }
    let request = RestoreRequest {
        lazy: Some(LazyRequest {
            on_loss: OnLoss::Poison,
            ..LazyRequest::default()
        }),
        ..RestoreRequest::new(&dir)
    };
    // Without the page that it writes there would be no machine.
    let guest = Guest::restore_paused(&request);
    let table = guest.running.memory();
    for gfn in &first.order()[1..] {
        let mut page = [0; PAGE_SIZE as usize];
        table
            .read_slice(&mut page, GuestAddress(gfn.0 * PAGE_SIZE))
            .unwrap();
        assert_eq!(first.get(*gfn), Some(&page[..]), "{gfn:?}");
    }
    guest.leave();
}
