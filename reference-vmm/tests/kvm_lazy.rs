// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that run before their memory is read, over the real KVM: what they find is what the snapshot has, whatever form
//! that is in and whatever else is done meanwhile, or they are stopped with the reason.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_pf::working_set::{Recorder, WorkingSet};
use guests::verifier::{FIRST, PAGES, PASSES, key, verifier64};
use memslots::Gfn;
use reference_vmm::config::Irqchip;
use reference_vmm::end::GuestEnd;
use reference_vmm::lazy::{LazyRequest, LazyState, OnLoss, WORKING_SET, WORKING_SET_PAGES};
use reference_vmm::snapshot::info;
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotKind, SnapshotRequest};
use reference_vmm::vm::Running;
use support::keeper::{Guest, keeper, machine};
use support::{WATCHDOG, need_kvm};
use vm_memory::{Bytes, GuestAddress};

/// Where snapshots go.
fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("snapshot");
    (folder, dir)
}

/// A snapshot of a machine whose vCPUs compare all of their memory.
fn taken(cpus: u32, memory: &str, request: &SnapshotRequest) {
    let (_kernel, config) = machine(verifier64(), cpus, memory);
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    guest.snapshot(request);
    guest.leave();
}

fn lazy(dir: &Path) -> RestoreRequest {
    with(dir, LazyRequest::default())
}

fn with(dir: &Path, lazy: LazyRequest) -> RestoreRequest {
    RestoreRequest {
        lazy: Some(lazy),
        ..RestoreRequest::new(dir)
    }
}

/// Nothing comes but what is touched, a page at a time.
fn touched_only() -> LazyRequest {
    LazyRequest {
        record: Some(Duration::from_secs(3600)),
        ..LazyRequest::default()
    }
}

fn state(running: &Running) -> LazyState {
    running.lazy_progress().unwrap().state
}

/// Until all of it is there.
fn becomes_whole(running: &Running) {
    running.settle_memory().unwrap();
    assert_eq!(state(running), LazyState::Whole);
}

/// Until the other vCPUs have been so often through all of their memory, from now on.
fn passes(running: &Running, count: u32) {
    let begun = Instant::now();
    let memory = running.memory();
    let passes = || memory.read_obj::<u32>(GuestAddress(PASSES)).unwrap();
    let before = passes();
    loop {
        let more = passes() - before;
        if more >= count {
            return;
        }
        assert!(begun.elapsed() < WATCHDOG, "{more} passes of {count}");
        std::thread::yield_now();
    }
}

/// Waits for the guest's end.
fn ended(mut guest: Guest) -> Option<GuestEnd> {
    while !guest.end.is_told() {
        guest.listen();
    }
    guest.leave().1
}

fn failed(end: Option<GuestEnd>) -> String {
    match end {
        Some(GuestEnd::Failed(why)) => why,
        other => panic!("it did not fail: {other:?}"),
    }
}

#[test]
fn four_vcpus_find_all_of_their_memory_as_it_was_whatever_form_it_is_in() {
    need_kvm();
    for (memory, compression) in [
        ("16M", Compression::None),
        ("16M,shared", Compression::None),
        ("16M", Compression::Zstd),
    ] {
        for verify in [true, false] {
            let (_folder, dir) = place();
            let request = SnapshotRequest {
                compression,
                ..SnapshotRequest::new(&dir)
            };
            taken(4, memory, &request);
            // At the guest's heels, and where it has nothing that it did not ask for itself.
            for how in [LazyRequest::default(), touched_only()] {
                let by_itself = how.record.is_some();
                let restored = RestoreRequest {
                    verify,
                    ..with(&dir, how)
                };
                let mut guest = Guest::restore(&restored);
                guest.hear(2);
                passes(&guest.running, 6);
                becomes_whole(&guest.running);
                let stats = guest.running.lazy_stats().unwrap();
                let all = stats.by_fault + stats.ahead;
                assert_eq!(all, stats.progress.pages, "{stats:?}");
                assert!(stats.zeros > 0, "{stats:?}");
                assert!(!by_itself || stats.by_fault > 1800, "{stats:?}");
                guest.hear(2);
                guest.has_all();
            }
        }
    }
}

#[test]
fn a_guest_that_writes_goes_on_from_any_link_of_a_chain() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = |number: usize| folder.path().join(format!("s{number}"));
    let (_kernel, config) = keeper(4, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    for number in 0..4 {
        guest.hear(2);
        let mut request = SnapshotRequest::new(dir(number));
        request.compression = match number {
            2 => Compression::Zstd,
            _ => Compression::None,
        };
        match number {
            0 => request.track = Some(true),
            _ => {
                request.kind = SnapshotKind::Diff {
                    base: Some(dir(number - 1)),
                }
            }
        }
        guest.snapshot(&request);
    }
    guest.has_all();
    for number in 0..4 {
        let mut guest = Guest::restore(&lazy(&dir(number)));
        guest.hear(3);
        guest.has_all();
    }
    // One more on it, taken while memory is still to come, and one on that.
    let mut guest = Guest::restore(&RestoreRequest {
        track: true,
        ..with(&dir(3), touched_only())
    });
    guest.hear(1);
    assert_eq!(state(&guest.running), LazyState::Recording);
    let request = SnapshotRequest {
        kind: SnapshotKind::Diff { base: Some(dir(3)) },
        ..SnapshotRequest::new(dir(4))
    };
    guest.running.pause().unwrap();
    guest.snapshot(&request);
    guest.is_saved_in(&dir(4));
    guest.leave();
    let mut guest = Guest::restore(&lazy(&dir(4)));
    guest.hear(2);
    guest.has_all();
}

#[test]
fn only_what_is_touched_comes_until_somebody_wants_more() {
    need_kvm();
    let (_folder, dir) = place();
    taken(1, "64M", &SnapshotRequest::new(&dir));
    let mut guest = Guest::restore(&with(&dir, touched_only()));
    guest.hear(2);
    let progress = guest.running.lazy_progress().unwrap();
    assert_eq!(progress.state, LazyState::Recording);
    let missing = progress.missing.unwrap();
    // Of 16384 pages the guest has 2048 and a few.
    assert!((14_000..14_336).contains(&missing), "{progress:?}");
    // A snapshot is of all of it, and so are one in the background and a second one.
    let (_other, copy) = place();
    for background in [true, false] {
        let request = SnapshotRequest {
            background,
            ..SnapshotRequest::new(&copy)
        };
        guest.snapshot(&request);
        assert_eq!(state(&guest.running), LazyState::Whole);
        info::verify(&copy).unwrap();
    }
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&copy));
    guest.hear(2);
    guest.has_all();
}

#[test]
fn what_is_recorded_at_one_restore_is_read_ahead_at_the_next() {
    need_kvm();
    let (_folder, dir) = place();
    taken(1, "64M", &SnapshotRequest::new(&dir));
    let record = dir.join(WORKING_SET);
    let mut guest = Guest::restore(&with(&dir, touched_only()));
    // One pass is all that it touches.
    guest.hear(2);
    guest.running.settle_memory().unwrap();
    let recorded = WorkingSet::load(&record).unwrap();
    let first = FIRST / 4096;
    let touched: Vec<_> = recorded.order().map(|gfn| gfn.0).collect();
    let all = (first..first + PAGES).all(|gfn| touched.contains(&gfn));
    assert!(all && touched.len() < 2200, "{}", touched.len());
    // The pages are kept when all that somebody waited for was there.
    let kept = dir.join(WORKING_SET_PAGES);
    let begun = Instant::now();
    while !kept.exists() {
        assert!(begun.elapsed() < WATCHDOG);
        std::thread::yield_now();
    }
    // It belongs to the snapshot: who checks or replaces that is not in its way.
    info::verify(&dir).unwrap();
    guest.has_all();

    let mut guest = Guest::restore(&lazy(&dir));
    guest.hear(2);
    becomes_whole(&guest.running);
    let stats = guest.running.lazy_stats().unwrap();
    assert!(stats.ahead > stats.by_fault, "{stats:?}");
    let help = stats.progress.working_set.unwrap();
    assert!(help.read_ahead > PAGES / 2, "{help:?}");
    // Where all was wanted at once it is not known what of it the guest has touched.
    assert!(help.had <= help.touched, "{help:?}");
    guest.has_all();
    // What it touches first is kept, and read from there: in the snapshot it is lost by now.
    let whole = std::fs::read(dir.join("memory")).unwrap();
    let lost = memory(&dir);
    let first = offset(&dir, FIRST);
    for page in (first..first + PAGES * 4096).step_by(4096) {
        let is = &whole[page as usize..page as usize + 4096];
        if is.iter().any(|byte| *byte != 0) {
            lost.write_all_at(&[0xee; 4096], page).unwrap();
        }
    }
    let mut guest = Guest::restore_paused(&RestoreRequest {
        verify: false,
        ..lazy(&dir)
    });
    // What is touched before the record is read comes out of the snapshot. Some of it is held out, to see whether it is touched.
    let begun = Instant::now();
    while guest.running.lazy_stats().unwrap().ahead < touched.len() as u64 / 2 {
        assert!(begun.elapsed() < WATCHDOG);
        std::thread::yield_now();
    }
    guest.running.resume().unwrap();
    guest.hear(2);
    becomes_whole(&guest.running);
    guest.has_all();
    std::fs::write(dir.join("memory"), whole).unwrap();
    // And where a page of it is not as it was, the snapshot is read again.
    let len = std::fs::metadata(&kept).unwrap().len();
    let file = File::options().write(true).open(&kept).unwrap();
    file.write_all_at(&[0xee; 4096], len - 4096).unwrap();
    let mut guest = Guest::restore(&lazy(&dir));
    guest.hear(2);
    becomes_whole(&guest.running);
    // What nobody has checked is not kept, and nothing is while another one saves.
    std::fs::remove_file(&record).unwrap();
    std::fs::remove_file(&kept).unwrap();
    let unchecked = RestoreRequest {
        verify: false,
        ..with(&dir, touched_only())
    };
    let mut guest = Guest::restore(&unchecked);
    guest.hear(1);
    guest.quit();
    assert!(record.exists() && !kept.exists());
    std::fs::remove_file(&record).unwrap();
    let held = File::open(dir.join("state")).unwrap();
    held.lock().unwrap();
    let mut guest = Guest::restore(&with(&dir, touched_only()));
    guest.hear(1);
    guest.quit();
    assert!(!record.exists() && !kept.exists());
    drop(held);
    // The end of a guest saves what there is.
    let mut guest = Guest::restore(&with(&dir, touched_only()));
    guest.hear(1);
    guest.has_all();
    assert!(record.exists() && kept.exists());

    // One of another snapshot is passed over.
    let (_other, other) = place();
    taken(1, "64M", &SnapshotRequest::new(&other));
    std::fs::copy(&record, other.join(WORKING_SET)).unwrap();
    let mut guest = Guest::restore(&lazy(&other));
    guest.hear(2);
    // And a newer snapshot of the name takes it away.
    guest.snapshot(&SnapshotRequest::new(&other));
    assert!(!other.join(WORKING_SET).exists());
    guest.has_all();
}

#[test]
fn what_is_recorded_is_so_much_of_the_time_in_which_the_guest_runs() {
    need_kvm();
    let (_folder, dir) = place();
    taken(1, "64M", &SnapshotRequest::new(&dir));
    let second = Duration::from_secs(1);
    let request = with(
        &dir,
        LazyRequest {
            record: Some(second),
            ..LazyRequest::default()
        },
    );
    let mut guest = Guest::restore_paused(&request);
    let record = dir.join(WORKING_SET);
    // Longer than it is recorded; paused by now, and again before the second is over.
    std::thread::sleep(second * 3 / 2);
    assert_eq!(state(&guest.running), LazyState::Recording);
    guest.running.resume().unwrap();
    guest.running.pause().unwrap();
    std::thread::sleep(second);
    assert_eq!(state(&guest.running), LazyState::Recording);
    assert!(!record.exists());
    guest.running.resume().unwrap();
    guest.hear(1);
    comes_by_itself(&guest);
    assert!(WorkingSet::load(&record).unwrap().touched() > 16);
    guest.has_all();
}

/// A record of these pages of `dir`'s guest, all of them touched within the first millisecond but the last.
fn record_of(dir: &Path, pages: impl Iterator<Item = u64>, last: Duration) {
    let id = info::SnapshotInfo::read(dir).unwrap().id.0;
    let recorder = Recorder::new(Gfn(0), 16_384, 16_384, id).unwrap();
    let pages: Vec<_> = pages.map(Gfn).collect();
    let (end, others) = pages.split_last().unwrap();
    for page in others {
        recorder.touch_at(*page, Duration::ZERO);
    }
    recorder.touch_at(*end, last);
    recorder.finish().save(&dir.join(WORKING_SET)).unwrap();
}

/// Until all of it is there, without anybody's asking for that.
fn comes_by_itself(guest: &Guest) {
    let begun = Instant::now();
    while state(&guest.running) != LazyState::Whole {
        assert!(begun.elapsed() < WATCHDOG);
        std::thread::yield_now();
    }
}

#[test]
fn a_record_that_misses_much_is_extended_and_one_that_is_right_or_of_no_use_stays() {
    need_kvm();
    let (_folder, dir) = place();
    taken(1, "64M", &SnapshotRequest::new(&dir));
    let path = dir.join(WORKING_SET);
    let first = FIRST / 4096;
    // The guest is through with its pages in less, and is not there yet in a moment.
    let long = Duration::from_secs(3);
    let begun = Instant::now();

    // Few, so that it has missed much within a second on a slow host as well.
    record_of(&dir, first..first + 32, long);
    let had = WorkingSet::load(&path).unwrap();
    let mut guest = Guest::restore(&lazy(&dir));
    guest.hear(2);
    comes_by_itself(&guest);
    while WorkingSet::load(&path).unwrap() == had {
        assert!(begun.elapsed() < WATCHDOG);
        std::thread::yield_now();
    }
    let now = WorkingSet::load(&path).unwrap();
    assert_eq!(now.runs()[..had.runs().len()], *had.runs());
    assert!(now.touched() > had.touched() * 5 / 4, "{}", now.touched());
    guest.has_all();

    // What it touches, and what it does not: the one is kept, of the other it is only told.
    for from in [first, 8192] {
        record_of(&dir, from..from + PAGES, long);
        let had = WorkingSet::load(&path).unwrap();
        let mut guest = Guest::restore(&lazy(&dir));
        guest.hear(2);
        comes_by_itself(&guest);
        // The machine's end is behind the thread's that would save it.
        guest.has_all();
        assert_eq!(WorkingSet::load(&path).unwrap(), had);
    }
}

/// The offset of a page in the plain file `memory` of a guest with 16 MiB.
fn offset(dir: &Path, address: u64) -> u64 {
    let (link, _) = reference_vmm::snapshot::link::Link::open(dir).unwrap();
    let (_, place) = link.map().locate(address).unwrap();
    place.offset + (address - place.guest)
}

fn memory(dir: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(dir.join("memory"))
        .unwrap()
}

#[test]
fn memory_that_does_not_come_stops_the_guest_with_the_reason() {
    need_kvm();
    let page = FIRST + 1234 * 4096;
    type Break = fn(&File, u64);
    let breaks: [(&str, bool, Break); 3] = [
        ("the checksum is", true, |file, at| {
            // Before the restore.
            file.write_all_at(&[1], at + 100).unwrap();
        }),
        ("was written to, or cut off, while", true, |file, at| {
            file.write_all_at(&[1], at + 100).unwrap();
        }),
        ("memory", false, |file, at| file.set_len(at).unwrap()),
    ];
    for (number, (reason, verify, wreck)) in breaks.into_iter().enumerate() {
        let (_folder, dir) = place();
        taken(1, "16M", &SnapshotRequest::new(&dir));
        let at = offset(&dir, page);
        if number == 0 {
            wreck(&memory(&dir), at);
        }
        let request = RestoreRequest {
            verify,
            ..with(&dir, touched_only())
        };
        let begun = Instant::now();
        let guest = Guest::restore(&request);
        if number > 0 {
            wreck(&memory(&dir), at);
        }
        let why = failed(ended(guest));
        assert!(
            why.contains("does not come") && why.contains(reason),
            "{why}"
        );
        assert!(begun.elapsed() < WATCHDOG);
    }
}

#[test]
fn lost_memory_that_the_guest_does_not_touch_is_told_to_who_reads_all_of_it() {
    need_kvm();
    let (_folder, dir) = place();
    let (_kernel, config) = machine(verifier64(), 1, "32M");
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    let mine = GuestAddress(24 << 20);
    guest
        .running
        .memory()
        .write_slice(&[7; 4096], mine)
        .unwrap();
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.leave();
    memory(&dir)
        .write_all_at(&[8], offset(&dir, mine.0))
        .unwrap();
    let poison = LazyRequest {
        on_loss: OnLoss::Poison,
        ..LazyRequest::default()
    };
    let mut guest = Guest::restore(&with(&dir, poison));
    guest.hear(2);
    let refused = guest.running.settle_memory().unwrap_err().to_string();
    assert!(refused.contains("have not come"), "{refused}");
    assert!(refused.contains("checksum"), "{refused}");
    let (_other, copy) = place();
    let refused = guest.running.snapshot(&SnapshotRequest::new(&copy));
    assert!(refused.is_err() && !copy.exists());
    assert_eq!(state(&guest.running), LazyState::Damaged);
    // What it touches is there.
    guest.hear(3);
    guest.has_all();
    // With the other policy it is stopped, though it would never have touched it.
    let guest = Guest::restore(&lazy(&dir));
    assert!(failed(ended(guest)).contains("checksum"));
}

#[test]
fn the_pattern_is_what_it_says() {
    need_kvm();
    let (_kernel, config) = machine(verifier64(), 1, "16M");
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    let memory = guest.running.memory();
    let word = |at| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
    let page = FIRST + 9 * 4096;
    assert_eq!((word(page), word(page + 4092)), (key(page), !key(page)));
    assert_eq!(word(FIRST + 8 * 4096), 0);
    drop(memory);
    guest.has_all();
    // And a guest that finds something else says so.
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    let memory = guest.running.memory();
    memory.write_obj(1u32, GuestAddress(page + 4092)).unwrap();
    drop(memory);
    assert_eq!(ended(guest), Some(GuestEnd::DebugExit(1)));
}
