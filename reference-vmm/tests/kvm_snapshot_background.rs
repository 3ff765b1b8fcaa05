// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots whose memory is written while the guest goes on, over the real KVM: they are of one moment, and whatever goes
//! wrong, the guest goes on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faulty_files;
mod support;

use std::cell::{Cell, RefCell};
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use faulty_files::{Faulty, before, before_those_of};
use guests::image;
use guests::scribe::{PAGES, scribe64};
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::devices::virtio::block::DiskConfig;
use reference_vmm::end::GuestEnd;
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::background::ROOM;
use reference_vmm::snapshot::chain::Chain;
use reference_vmm::snapshot::files::MEMORY;
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{
    RestoreRequest, SnapshotError, SnapshotKind, SnapshotReport, SnapshotRequest, info,
};
use reference_vmm::vm::tracking::TrackUser;
use reference_vmm::vm::{ControlError, RunState};
use support::keeper::{Guest, keeper};
use support::{Vmm, WATCHDOG, file, long, need_kvm};
use vm_memory::{Bytes, GuestAddress};

/// A guest that writes without rest.
fn scribe(memory: &str, irqchip: Irqchip) -> (tempfile::TempPath, Config) {
    let kernel = file(&image::elf64(scribe64()));
    let config = Config {
        memory: memory.parse::<Memory>().unwrap(),
        irqchip,
        debug_exit: Some(0xf4),
        ..Config::new(&*kernel)
    };
    (kernel, config)
}

fn background(dir: &Path) -> SnapshotRequest {
    SnapshotRequest {
        background: true,
        ..SnapshotRequest::new(dir)
    }
}

/// From a file that is read: what is mapped cannot be protected.
fn unmapped(dir: &Path) -> RestoreRequest {
    RestoreRequest {
        map: false,
        ..RestoreRequest::new(dir)
    }
}

/// Waits until the guest has said so many bytes more than it has by now.
fn passes(console: &PipeReader, count: usize) {
    let mut said = 0;
    // SAFETY: an open descriptor, and an int that the call writes.
    let asked = unsafe { libc::ioctl(console.as_raw_fd(), libc::FIONREAD, &raw mut said) };
    assert_eq!(asked, 0);
    let mut left = said as usize + count;
    while left > 0 {
        let mut polled = libc::pollfd {
            fd: console.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd.
        let ready = unsafe { libc::poll(&raw mut polled, 1, WATCHDOG.as_millis() as i32) };
        assert!(ready > 0, "it says nothing");
        let mut heard = [0; 64];
        let room = left.min(heard.len());
        let mut console = console;
        let got = (&mut console).read(&mut heard[..room]).unwrap();
        assert!(got > 0, "it has ended");
        left -= got;
    }
}

/// Takes one while the guest rewrites all of its pages before each piece that is written.
fn among_writes(guest: &Guest, request: &SnapshotRequest) -> SnapshotReport {
    let turns = Cell::new(0);
    let files = before(|| {
        passes(&guest.console, 2);
        turns.set(turns.get() + 1);
    });
    let report = guest.running.snapshot_with(request, &files).unwrap();
    assert!(turns.get() > 2, "{}", turns.get());
    report
}

#[test]
fn a_guest_that_writes_all_the_time_goes_on_from_one_moment() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for (memory, irqchip, compression) in [
        ("16M", Irqchip::Split, Compression::None),
        ("16M,shared", Irqchip::Kernel, Compression::None),
        ("16M,thp=always", Irqchip::Split, Compression::Zstd),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("1"), folder.path().join("2"));
        let (_kernel, config) = scribe(memory, irqchip);
        let mut guest = Guest::boot(&config);
        guest.hear(2);
        let request = SnapshotRequest {
            compression,
            ..background(&first)
        };
        let report = among_writes(&guest, &request);
        let cost = report.background.unwrap();
        assert!(cost.copied >= PAGES / 2, "{cost:?}");
        // Its pages, and what else it may have written: not just all.
        assert!(cost.protected < 2 * PAGES, "{cost:?}");
        // One that is not in the background, and another one.
        guest.snapshot(&SnapshotRequest::new(&second));
        info::verify(&second).unwrap();
        among_writes(&guest, &background(&second));
        guest.has_all();
        for dir in [&first, &second] {
            info::verify(dir).unwrap();
            let mut guest = Guest::restore(&unmapped(dir));
            guest.hear(3);
            // One of a guest that was restored.
            among_writes(&guest, &background(&folder.path().join("3")));
            guest.has_all();
        }
        let mut guest = Guest::restore(&RestoreRequest::new(folder.path().join("3")));
        guest.hear(3);
        guest.has_all();
    }
}

/// The guest's pages.
const WRITTEN: std::ops::Range<u64> = 0x40_0000..0x60_0000;

/// A guest that writes without rest, and has 2 MiB before its pages that are no zeros either.
fn filled_scribe() -> (tempfile::TempPath, Config) {
    let mut code = scribe64().to_vec();
    code.resize(5 << 19, 0x90);
    let kernel = file(&image::elf64(&code));
    let (_, config) = scribe("16M", Irqchip::Split);
    let at = Some(kernel.to_path_buf());
    (
        kernel,
        Config {
            kernel: at,
            ..config
        },
    )
}

/// How many of the guest's pages have changed since their words were these.
fn changed(guest: &Guest, before: &mut Vec<u64>) -> usize {
    let table = guest.running.memory();
    let words = WRITTEN.step_by(4096);
    let words = words.map(|page| table.read_obj(GuestAddress(page)).unwrap());
    let now: Vec<u64> = words.collect();
    if before.is_empty() {
        before.clone_from(&now);
    }
    before
        .iter()
        .zip(&now)
        .filter(|(one, other)| one != other)
        .count()
}

#[test]
fn what_is_copied_is_written_first_when_half_of_the_room_is_taken_up() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (_kernel, config) = filled_scribe();
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    for (room, in_order) in [(2 * PAGES * 4096, false), (ROOM, true)] {
        let offsets = RefCell::new(Vec::new());
        let files = before_those_of(MEMORY, |offset| {
            if offset > 0 {
                if offsets.borrow().is_empty() {
                    // Each of its pages is copied then.
                    passes(&guest.console, 2);
                }
                offsets.borrow_mut().push(offset);
            }
        });
        let request = SnapshotRequest {
            room,
            ..background(&dir)
        };
        guest.running.snapshot_with(&request, &files).unwrap();
        drop(files);
        let offsets = offsets.into_inner();
        assert!(offsets.len() > 2, "{offsets:x?}");
        assert_eq!(offsets.is_sorted(), in_order, "{offsets:x?}");
        info::verify(&dir).unwrap();
    }
    guest.has_all();
}

#[test]
fn a_guests_writes_wait_when_there_is_no_room_for_more_copies() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (_kernel, config) = filled_scribe();
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let held = Cell::new(false);
    let files = before(|| {
        if held.replace(true) {
            return;
        }
        let mut words = Vec::new();
        // Until it gets on no more, by all that is seen.
        let (mut most, mut still) = (0, 0);
        while still < 300 {
            let now = changed(&guest, &mut words);
            still = if now > most { 0 } else { still + 1 };
            most = most.max(now);
            std::thread::yield_now();
            assert!(most <= PAGES as usize / 2, "{most} pages were written");
        }
    });
    let request = SnapshotRequest {
        room: PAGES / 2 * 4096,
        ..background(&dir)
    };
    let report = guest.running.snapshot_with(&request, &files).unwrap();
    drop(files);
    assert!(held.get() && report.background.unwrap().copied > 0);
    // They are made behind that.
    guest.hear(2);
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    guest.hear(2);
    guest.has_all();
}

#[test]
fn disks_are_written_back_before_the_pause_and_what_is_written_before_it_is_not_in_the_next_link() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let image = at("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    let (_kernel, mut config) = scribe("16M", Irqchip::Split);
    config.disks = vec![DiskConfig::new(&image)];
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    // Who opens this waits for who writes to it; the device has the image open.
    std::fs::remove_file(&image).unwrap();
    let name = std::ffi::CString::new(image.as_os_str().as_bytes()).unwrap();
    // SAFETY: a name that ends with a NUL.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let request = SnapshotRequest {
        track: Some(true),
        ..background(&at("s"))
    };
    // A page that the guest leaves alone.
    let page = 0x80_0000;
    let opened = std::thread::scope(|scope| {
        let taken = scope.spawn(|| guest.running.snapshot(&request));
        while !guest.running.is_tracked(TrackUser::Snapshot) && !taken.is_finished() {
            std::thread::yield_now();
        }
        // It is not paused, and goes on.
        passes(&guest.console, 2);
        assert_eq!(guest.running.state(), RunState::Running);
        let table = guest.running.memory();
        table.write_obj(1_u64, GuestAddress(page)).unwrap();
        let mut options = std::fs::File::options();
        options.write(true).custom_flags(libc::O_NONBLOCK);
        let mut opened = false;
        while !opened && !taken.is_finished() {
            opened = options.open(&image).is_ok();
        }
        taken.join().unwrap().unwrap();
        opened
    });
    assert!(opened);
    let next = SnapshotRequest {
        kind: SnapshotKind::Diff { base: None },
        ..SnapshotRequest::new(at("d"))
    };
    guest.snapshot(&next);
    let (chain, _) = Chain::open(&next.dir).unwrap();
    let has = |number: usize| {
        let link: &Link = chain.links().get(number).unwrap();
        link.own().within(page..page + 4096).next().is_some()
    };
    assert_eq!([has(0), has(1)], [true, false]);
    let mut bytes = [0; 8];
    chain.read(page..page + 8, &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 1);
    guest.has_all();
}

#[test]
fn what_is_protected_in_the_pause_does_not_grow_with_memory() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let sizes: &[_] = match long() {
        true => &["256M", "1G"],
        false => &["64M", "256M"],
    };
    for memory in sizes {
        let folder = tempfile::tempdir().unwrap();
        let (_kernel, config) = scribe(memory, Irqchip::Split);
        let mut guest = Guest::boot(&config);
        guest.hear(1);
        let request = background(&folder.path().join("s"));
        let report = guest.running.snapshot(&request).unwrap();
        println!("{memory}: {report:?}");
        let cost = report.background.unwrap();
        assert!(cost.protected < 2 * PAGES, "{memory}: {cost:?}");
        guest.has_all();
    }
}

#[test]
fn one_of_a_paused_guest_is_byte_by_byte_what_it_has_and_it_stays_paused() {
    need_kvm();
    for memory in ["16M", "16M,shared"] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        let (_kernel, config) = scribe(memory, Irqchip::Split);
        let mut guest = Guest::boot(&config);
        guest.hear(1);
        guest.running.pause().unwrap();
        guest.snapshot(&background(&dir));
        assert_eq!(guest.running.state(), RunState::Paused);
        guest.is_saved_in(&dir);
        guest.running.resume().unwrap();
        guest.hear(1);
        guest.has_all();
    }
}

#[test]
fn links_of_a_chain_are_taken_in_the_background_and_in_a_pause() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = |number: usize| folder.path().join(format!("s{number}"));
    let (_kernel, config) = scribe("16M", Irqchip::Split);
    let mut guest = Guest::boot(&config);
    let links = if long() { 12 } else { 6 };
    for number in 0..links {
        guest.hear(1);
        let request = SnapshotRequest {
            kind: match number {
                0 => SnapshotKind::Full,
                _ => SnapshotKind::Diff { base: None },
            },
            track: Some(true),
            compression: match number % 3 {
                2 => Compression::Zstd,
                _ => Compression::None,
            },
            background: number % 2 == 0,
            ..SnapshotRequest::new(dir(number))
        };
        match number {
            // Of a guest that stands still, it can be compared.
            4 => {
                guest.running.pause().unwrap();
                guest.snapshot(&request);
                guest.is_saved_in(&dir(number));
                guest.running.resume().unwrap();
            }
            _ if request.background => {
                let files = before(|| passes(&guest.console, 1));
                let report = guest.running.snapshot_with(&request, &files).unwrap();
                let written = report.written;
                assert!(number == 0 || written < 6 << 20, "{written}");
            }
            _ => guest.snapshot(&request),
        }
    }
    guest.has_all();
    assert_eq!(info::verify(&dir(links - 1)).unwrap(), links);
    for number in 0..links {
        let mut guest = Guest::restore(&RestoreRequest::new(dir(number)));
        guest.hear(2);
        guest.has_all();
    }
}

#[test]
fn a_host_that_refuses_a_write_leaves_the_older_one_and_a_guest_that_goes_on() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (_kernel, config) = scribe("16M", Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let files = Faulty::new(usize::MAX, None);
    let request = SnapshotRequest {
        track: Some(true),
        ..background(&dir)
    };
    guest.running.snapshot_with(&request, &files).unwrap();
    let id = info::SnapshotInfo::read(&dir).unwrap().id;
    let calls = files.calls.get();
    assert!(calls > 12, "{calls}");
    for (at, errno) in (0..calls + 2).zip([libc::ENOSPC, libc::EIO].into_iter().cycle()) {
        let files = Faulty::new(at, Some(errno));
        let taken = guest.running.snapshot_with(&request, &files);
        match taken {
            // What it replaces may lie there still.
            Ok(_) => break,
            Err(error) => {
                let text = reference_vmm::end::Chain(&error).to_string();
                assert!(text.contains(&format!("(os error {errno})")), "{text}");
            }
        }
        assert_eq!(info::SnapshotInfo::read(&dir).unwrap().id, id, "{at}");
        let there = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(there, 1, "{at}");
        guest.hear(1);
    }
    // What was tracked is not lost by any of them.
    let next = SnapshotRequest {
        kind: SnapshotKind::Diff { base: None },
        ..background(&folder.path().join("d"))
    };
    guest.snapshot(&next);
    guest.hear(1);
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&next.dir));
    guest.hear(2);
    guest.has_all();
}

/// Has one written that waits with its first piece until it may go on.
fn held<T>(
    guest: &Guest,
    request: &SnapshotRequest,
    meanwhile: impl FnOnce() -> T,
) -> (Result<SnapshotReport, SnapshotError>, T) {
    let (come, came) = channel();
    let (go, gone): (Sender<()>, Receiver<()>) = channel();
    let at_work = Mutex::new((come, gone));
    std::thread::scope(|scope| {
        let taken = scope.spawn(move || {
            let files = before(|| {
                let at_work = at_work.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = at_work.0.send(());
                // When the other side is gone it goes on, and on.
                let _ = at_work.1.recv();
            });
            guest.running.snapshot_with(request, &files)
        });
        came.recv_timeout(WATCHDOG).unwrap();
        let of = meanwhile();
        drop(go);
        (taken.join().unwrap(), of)
    })
}

#[test]
fn the_guest_is_paused_and_resumed_meanwhile_and_no_other_snapshot_is_taken() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let (dir, other) = (folder.path().join("s"), folder.path().join("o"));
    let (_kernel, config) = scribe("16M", Irqchip::Kernel);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let (taken, ()) = held(&guest, &background(&dir), || {
        for request in [SnapshotRequest::new(&other), background(&other)] {
            let refused = guest.running.snapshot(&request).unwrap_err();
            assert!(matches!(refused, SnapshotError::Underway), "{refused}");
        }
        for _ in 0..5 {
            guest.running.pause().unwrap();
            guest.running.resume().unwrap();
            passes(&guest.console, 1);
        }
        guest.running.pause().unwrap();
    });
    taken.unwrap();
    assert_eq!(guest.running.state(), RunState::Paused);
    guest.running.resume().unwrap();
    // Now it is.
    guest.snapshot(&SnapshotRequest::new(&other));
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    guest.hear(2);
    guest.has_all();
}

#[test]
fn an_end_of_the_guest_ends_it_and_leaves_nothing() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (_kernel, config) = scribe("16M", Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let (taken, ()) = held(&guest, &background(&dir), || guest.running.stop());
    let error = taken.unwrap_err();
    assert!(
        matches!(error, SnapshotError::Control(ControlError::Ended)),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let (_, end) = guest.leave();
    assert_eq!(end, None);
}

#[test]
fn memory_that_cannot_be_protected_is_refused_with_what_helps() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let (dir, other) = (folder.path().join("s"), folder.path().join("o"));
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    guest.snapshot(&background(&dir));
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    let refused = guest.running.snapshot(&background(&other)).unwrap_err();
    let text = refused.to_string();
    for needle in ["mapped", "--map=off", "write-protect faults"] {
        assert!(text.contains(needle), "{text}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    guest.snapshot(&SnapshotRequest::new(&other));
    guest.hear(1);
    guest.has_all();
}

#[test]
fn a_monitor_that_is_killed_leaves_the_older_one_and_its_socket_says_what_one_cost() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let kernel = file(&image::elf64(scribe64()));
    let start = |vmm: Vmm| {
        // Linux 6.1 ends the VM of a process that was killed behind an rcu_barrier, in which an emulated host was seen to
        // be for 30 seconds.
        let vmm = vmm.limit(Duration::from_secs(120));
        let mut vmm = vmm.arg("--api-sock").arg(at("api")).stdin_pipe().start();
        vmm.wait_for("1");
        vmm
    };
    let ctl = |words: &[&str]| {
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(at("api"));
        ctl.args(words)
    };
    let dir = at("s");
    let dir = dir.to_str().unwrap();
    let vmm = start(Vmm::run(&kernel).args(["--memory", "64M", "--debug-exit"]));
    let told = ctl(&["snapshot", dir, "--background", "--json"]).output();
    let told = told.expect_status(0).text().to_owned();
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    for number in ["pause_us", "protected_pages", "total_us"] {
        assert!(told[number].is_number(), "{told}");
    }
    // Of none there is nothing to be told of each.
    let none = told["protected_pages"] == 0;
    assert_eq!(told["us_per_page"].is_null(), none, "{told}");
    assert_eq!(told["snapshot_path"], dir, "{told}");
    let words = ctl(&["snapshot", dir, "--background"]).output();
    let words = words.expect_status(0).text();
    let each = words.contains("us each") || words.contains("no page had to be protected");
    assert!(words.contains("stood still for") && each, "{words}");
    let id = || info::SnapshotInfo::read(Path::new(dir)).map(|info| info.id);
    let before = id().unwrap();
    let asked = ctl(&["snapshot", dir, "--background"]).start();
    while !at(".s.partial").exists() && id().is_ok_and(|id| id == before) {
        std::thread::yield_now();
    }
    vmm.signal(libc::SIGKILL);
    vmm.wait();
    drop(asked);
    assert!(info::verify(Path::new(dir)).is_ok());
    let mut guest = Guest::restore(&RestoreRequest::new(dir));
    guest.hear(2);
    guest.has_all();
}

#[test]
fn a_guest_that_has_ended_itself_leaves_no_snapshot_without_vcpus() {
    use reference_vmm::main_loop::GuestSide;
    need_kvm();
    for in_background in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (_kernel, config) = scribe("16M", Irqchip::Split);
        let mut guest = Guest::boot(&config);
        guest.hear(1);
        assert_eq!(guest.running.input(b"q"), 1);
        while !guest.end.is_told() {
            guest.listen();
        }
        let request = SnapshotRequest {
            background: in_background,
            ..SnapshotRequest::new(folder.path().join("s"))
        };
        let refused = guest.running.snapshot(&request).unwrap_err();
        let ended = matches!(refused, SnapshotError::Control(ControlError::Ended));
        assert!(ended, "{refused}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_guest_that_ends_itself_meanwhile_ends_as_it_is_to() {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let (_kernel, config) = scribe("16M", Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let (taken, end) = held(&guest, &background(&dir), || {
        use reference_vmm::main_loop::GuestSide;
        assert_eq!(guest.running.input(b"q"), 1);
        while !guest.end.is_told() {
            std::thread::yield_now();
        }
        guest.end.get().cloned()
    });
    assert_eq!(end, Some(GuestEnd::DebugExit(0)));
    // Of the moment before.
    taken.unwrap();
    drop(guest);
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    guest.hear(2);
    guest.has_all();
}
