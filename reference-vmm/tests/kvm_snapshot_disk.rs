// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots of a guest at its disk: requests under way, and a disk that has moved on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faulty_files;
mod support;

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use faulty_files::{Faulty, before, before_those_of};
use guests::virtio::{INTERRUPTS, MEMORY, Op, REGISTERS, driver};
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::devices::virtio::block::{DiskConfig, Io};
use reference_vmm::devices::virtio::registers::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use reference_vmm::end::{EndSignal, GuestEnd};
use reference_vmm::memory::Memory;
use reference_vmm::migration::address::Address;
use reference_vmm::migration::guest::SourceGuest;
use reference_vmm::migration::incoming::{Incoming, IncomingRequest};
use reference_vmm::migration::live::LiveGuest;
use reference_vmm::migration::outgoing::{MigrateRequest, Outgoing};
use reference_vmm::snapshot::chain::Chain;
use reference_vmm::snapshot::disks::DiskCopies;
use reference_vmm::snapshot::files::HostFiles;
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::merge::{MergeRequest, merge};
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotError, SnapshotKind, SnapshotRequest};
use reference_vmm::vm::tracking::TrackUser;
use reference_vmm::vm::{BuildError, Machine, RunState, Running};
use support::tracked::{Copy, round};
use support::{Vmm, WATCHDOG, file, long, need_kvm};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const ENTRIES: u32 = 8;
const AVAILABLE: u32 = MEMORY + 0x1000;
/// Far from the rest, as `DATA` is: in other steps of a snapshot in the background.
const USED: u32 = 0x80_0000;
/// Of each request, 16 bytes.
const HEADERS: u32 = MEMORY + 0x3000;
const STATUS: u32 = MEMORY + 0x3800;
const DATA: u32 = 0xa0_0000;
const NEXT: u32 = 1;
const WRITE: u32 = 2;
const SECTORS: u32 = 40;

/// What is written to a sector, each 32 bits of it.
fn word(sector: u32) -> u32 {
    0x5eed_0000 | sector
}

/// A guest that writes each sector and reads it back, by interrupts; debug-exit value 0.
fn writer() -> Vec<u8> {
    writer_of(1)
}

/// The same, so many times.
fn writer_of(passes: u32) -> Vec<u8> {
    let mut ops = Vec::new();
    let register = |register, value| Op::Write(REGISTERS + register, value);
    ops.extend([
        register(VIRTIO_MMIO_STATUS, 0),
        register(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER),
        register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        register(VIRTIO_MMIO_DRIVER_FEATURES, 1),
        register(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        register(VIRTIO_MMIO_QUEUE_SEL, 0),
        register(VIRTIO_MMIO_QUEUE_NUM, ENTRIES),
        register(VIRTIO_MMIO_QUEUE_DESC_LOW, MEMORY),
        register(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
        register(VIRTIO_MMIO_QUEUE_USED_LOW, USED),
        register(VIRTIO_MMIO_QUEUE_READY, 1),
        register(VIRTIO_MMIO_STATUS, READY),
    ]);
    let mut requests = 0;
    let mut request = |ops: &mut Vec<Op>, read: bool, sector: u32| {
        let descriptor = |number: u32, address, len, flags| {
            let at = MEMORY + 16 * number;
            [
                Op::Write(at, address),
                Op::Write(at + 8, len),
                Op::Write(at + 12, flags | (number + 1) << 16),
            ]
        };
        ops.extend([
            Op::Write(HEADERS, u32::from(!read)),
            Op::Write(HEADERS + 8, sector),
            Op::Write(STATUS, 0xff),
        ]);
        let data = if read { WRITE } else { 0 };
        ops.extend(descriptor(0, HEADERS, 16, NEXT));
        ops.extend(descriptor(1, DATA, 512, NEXT | data));
        ops.extend(descriptor(2, STATUS, 1, WRITE));
        ops.push(Op::Write16(AVAILABLE + 4 + 2 * (requests % ENTRIES), 0));
        requests += 1;
        ops.push(Op::Write16(AVAILABLE + 2, requests as u16));
        ops.push(register(VIRTIO_MMIO_QUEUE_NOTIFY, 0));
        // Asleep, until the interrupt for this request has come: one that is lost is the end of it.
        ops.push(Op::Sleep {
            address: USED,
            value: requests << 16,
            mask: 0xffff_0000,
        });
        ops.push(Op::Poll {
            address: STATUS,
            value: 0,
            mask: 0xff,
        });
    };
    for sector in (0..passes).flat_map(|_| 0..SECTORS) {
        for at in (0..512).step_by(128) {
            ops.push(Op::Write(DATA + at, word(sector)));
        }
        request(&mut ops, false, sector);
        ops.extend((0..512).step_by(128).map(|at| Op::Write(DATA + at, 0)));
        request(&mut ops, true, sector);
        for at in (0..512).step_by(128) {
            ops.push(Op::Poll {
                address: DATA + at,
                value: word(sector),
                mask: u32::MAX,
            });
        }
        ops.push(Op::Say(b'.'));
    }
    ops.push(Op::Show(INTERRUPTS));
    ops.push(Op::End(0));
    driver(&ops)
}

struct Guest {
    running: Running,
    end: Arc<EndSignal>,
}

impl Guest {
    fn of(machine: impl FnOnce(&File, &Arc<EndSignal>) -> Result<Machine, BuildError>) -> Self {
        let end = Arc::new(EndSignal::new().unwrap());
        let nowhere = File::create("/dev/null").unwrap();
        let running = machine(&nowhere, &end).unwrap().start().unwrap();
        Guest { running, end }
    }

    /// Waits for its end for so many milliseconds; whether it came.
    fn ends_within(&self, ms: i32) -> bool {
        use std::os::fd::AsRawFd;
        let mut fd = libc::pollfd {
            fd: self.end.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&raw mut fd, 1, ms) > 0 }
    }
}

fn disk(sectors: u64) -> tempfile::TempPath {
    let path = file(&[]);
    let image = File::options().write(true).open(&path).unwrap();
    image.set_len(sectors * 512).unwrap();
    path
}

fn config(kernel: &Path, irqchip: Irqchip, disk: DiskConfig) -> Config {
    Config {
        memory: Memory::new(16 << 20),
        irqchip,
        debug_exit: Some(0xf4),
        disks: vec![disk],
        ..Config::new(kernel)
    }
}

#[test]
fn a_disks_requests_are_neither_lost_nor_done_twice_wherever_the_guest_is_stopped() {
    need_kvm();
    let rounds = if long() { 40 } else { 6 };
    let kernel = file(&writer());
    for irqchip in [Irqchip::Split, Irqchip::Kernel] {
        let image = disk(u64::from(SECTORS));
        let config = config(&kernel, irqchip, DiskConfig::new(&*image));
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        let mut guest = Guest::of(|console, end| Machine::build(&config, console, end));
        let mut restores = 0;
        for round in 0..rounds {
            // Wherever it is then.
            if guest.ends_within(round * 7 % 23) {
                break;
            }
            let request = SnapshotRequest::new(dir.clone());
            let paused = guest.running.pause().map_err(SnapshotError::Control);
            match paused.and_then(|()| guest.running.snapshot(&request)) {
                // It was done before, or has just been.
                _ if guest.end.is_told() => break,
                saved => saved.unwrap(),
            };
            // It lets go of the disk.
            drop(guest);
            let request = RestoreRequest::new(&dir);
            guest = Guest::of(|console, end| Machine::restore(&request, console, end));
            restores += 1;
        }
        assert!(
            guest.ends_within(WATCHDOG.as_millis() as i32),
            "{irqchip:?}: it stands still"
        );
        assert_eq!(
            guest.end.get(),
            Some(&GuestEnd::DebugExit(0)),
            "{irqchip:?}"
        );
        assert!(restores > 1, "{restores}");
        let image = File::open(&image).unwrap();
        for sector in 0..SECTORS {
            let mut bytes = [0; 4];
            image
                .read_exact_at(&mut bytes, u64::from(sector) * 512)
                .unwrap();
            assert_eq!(u32::from_le_bytes(bytes), word(sector));
        }
    }
}

#[test]
fn what_the_disk_writes_to_guest_memory_is_tracked_as_what_the_guest_writes() {
    need_kvm();
    let kernel = file(&writer());
    for io in [Io::Uring, Io::Threads] {
        let image = disk(u64::from(SECTORS));
        let disk = DiskConfig {
            io,
            ..DiskConfig::new(&*image)
        };
        let config = config(&kernel, Irqchip::Split, disk);
        let guest = Guest::of(|console, end| Machine::build(&config, console, end));
        guest.running.pause().unwrap();
        guest.running.start_tracking(TrackUser::Snapshot).unwrap();
        let mut before = Copy::of(&guest.running);
        guest.running.resume().unwrap();
        // The guest writes each page of a request as well, but for the sector that it reads back behind a pause.
        let mut pauses = 0;
        // Each round copies all of its memory, which takes an emulated machine a second.
        while pauses < 20 && !guest.ends_within(pauses % 3) {
            round(&guest.running, TrackUser::Snapshot, &mut before);
            pauses += 1;
        }
        assert!(pauses > 2, "{pauses}");
    }
}

#[test]
fn a_guest_stands_still_until_what_it_writes_then_has_another_time_than_what_it_wrote_before() {
    need_kvm();
    let kernel = file(&writer());
    let image = disk(u64::from(SECTORS));
    let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::of(|console, end| Machine::build(&config, console, end));
    // It has to wait for the guest's first tries.
    guest.running.pause().unwrap();
    let times = File::options().write(true).open(&image).unwrap();
    // The last that is looked at is written, so that nothing else takes time behind its write.
    let last = GuestAddress((16 << 20) - 4096);
    let ram = guest.running.memory();
    ram.write_slice(&[7; 4096], last).unwrap();
    for number in 0..10 {
        // No clock comes behind this, so that as much is waited as is at most.
        let written = SystemTime::now() + Duration::from_secs(3600);
        times.set_modified(written).unwrap();
        let request = SnapshotRequest::new(folder.path().join(number.to_string()));
        let files = Faulty::none();
        guest.running.snapshot_with(&request, &files).unwrap();
        // Between memory, which is written as the guest stands still, and the state, which is not. By that clock itself: its
        // ticks may be late by any other.
        let waited = files.idle.get();
        assert!(waited > TICK, "{number}: {waited:?}");
    }
}

/// The clock by which file systems tell the time of a write moves as often at least.
const TICK: Duration = Duration::from_millis(10);

#[test]
fn a_disk_that_has_moved_on_is_refused_and_a_copy_of_what_it_was_is_taken() {
    need_kvm();
    let kernel = file(&writer());
    for readonly in [false, true] {
        let image = disk(u64::from(SECTORS) + 8);
        let disk = DiskConfig {
            readonly,
            ..DiskConfig::new(&*image)
        };
        let config = config(&kernel, Irqchip::Split, disk);
        let folder = tempfile::tempdir().unwrap();
        let (dir, copy) = (folder.path().join("s"), folder.path().join("copy"));
        let guest = Guest::of(|console, end| Machine::build(&config, console, end));
        // It has to wait for the guest's first tries.
        guest.running.pause().unwrap();
        let request = SnapshotRequest::new(dir.clone());
        guest.running.snapshot(&request).unwrap();
        drop(guest);
        std::fs::copy(&image, &copy).unwrap();

        let restore = |request: &RestoreRequest| {
            let end = Arc::new(EndSignal::new().unwrap());
            let nowhere = File::create("/dev/null").unwrap();
            Machine::restore(request, nowhere, &end).map(drop)
        };
        let request = RestoreRequest::new(&dir);
        if !readonly {
            // Another has it, as the guest that was saved would; a reader leaves its times alone.
            let beside = DiskConfig {
                readonly: true,
                ..DiskConfig::new(&*image)
            };
            let _beside = beside.open().unwrap();
            let error = restore(&request).unwrap_err();
            let text = reference_vmm::end::Chain(&error).to_string();
            assert!(text.contains("in use by another VMM"), "{text}");
            assert!(text.contains("--disk 0:path=COPY"), "{text}");
            assert!(text.contains("--disks-to FOLDER"), "{text}");
        }
        // As often as one likes.
        restore(&request).unwrap();
        restore(&request).unwrap();
        let mut elsewhere = request.clone();
        elsewhere.overrides.disks = vec![(0, copy)];
        restore(&elsewhere).unwrap();

        let file = File::options().write(true).open(&image).unwrap();
        file.write_all_at(b"moved on", 512 * u64::from(SECTORS))
            .unwrap();
        let refused = |request: &RestoreRequest, needles: &[&str]| {
            let error = restore(request).unwrap_err();
            assert_eq!(error.exit_status(), 2);
            let text = reference_vmm::end::Chain(&error).to_string();
            for needle in needles {
                assert!(text.contains(needle), "{text}");
            }
        };
        let name = image.to_str().unwrap();
        refused(&request, &["--disk", name, "has been written since"]);
        restore(&elsewhere).unwrap();
        // To call it a copy does not make it one.
        let mut same = request.clone();
        same.overrides.disks = vec![(0, image.to_path_buf())];
        refused(&same, &["has been written since"]);
        file.set_len(512).unwrap();
        refused(&request, &["it had", "bytes and has 512"]);
        std::fs::remove_file(&image).unwrap();
        refused(&request, &["No such file"]);
        std::fs::write(&image, vec![0; 512 * (SECTORS as usize + 8)]).unwrap();
        refused(&request, &["since"]);
    }
}

/// By the time of its last write a restore tells a disk that has moved on, so the clock of file systems has moved on from
/// what was written within the pause when the guest goes on.
#[test]
fn a_guest_goes_on_when_a_write_to_its_disk_has_another_time_than_the_last_one_before() {
    need_kvm();
    let never = Op::Poll {
        address: MEMORY,
        value: 1,
        mask: u32::MAX,
    };
    let kernel = file(&driver(&[never]));
    let image = disk(8);
    let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::of(|console, end| Machine::build(&config, console, end));
    // The last of its memory is what is written last in the pause.
    let last = GuestAddress((16 << 20) - 4);
    guest.running.memory().write_obj(1u32, last).unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    // Relaxed, both: the mutex has what they speak of.
    let (looks, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let written = Mutex::new(Duration::ZERO);
    let files = before(|| {
        while !looks.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        file.write_all_at(b"x", 0).unwrap();
        *written.lock().unwrap() = coarse_time();
    });
    // A tick may come by chance.
    for number in 0..20 {
        looks.store(false, Ordering::Relaxed);
        over.store(false, Ordering::Relaxed);
        let is = |state| guest.running.state() == state && !over.load(Ordering::Relaxed);
        thread::scope(|scope| {
            let goes_on = scope.spawn(|| {
                while is(RunState::Running) {
                    thread::yield_now();
                }
                looks.store(true, Ordering::Relaxed);
                while is(RunState::Paused) {
                    std::hint::spin_loop();
                }
                coarse_time()
            });
            let request = SnapshotRequest::new(folder.path().join(number.to_string()));
            let taken = guest.running.snapshot_with(&request, &files);
            over.store(true, Ordering::Relaxed);
            taken.unwrap();
            let goes_on = goes_on.join().unwrap();
            assert!(goes_on > *written.lock().unwrap(), "{goes_on:?}");
        });
    }
}

/// By which file systems tell the time of a write.
fn coarse_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a timespec that lives through the call.
    let asked = unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut time) };
    assert_eq!(asked, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Waits until the guest has written the disk, or has ended.
fn until_written(guest: &Guest, image: &Path, sector: u32) {
    let image = File::open(image).unwrap();
    for _ in 0..WATCHDOG.as_millis() {
        let mut bytes = [0; 4];
        let at = u64::from(sector) * 512;
        image.read_exact_at(&mut bytes, at).unwrap();
        if u32::from_le_bytes(bytes) == word(sector) {
            return;
        }
        guest.ends_within(1);
    }
    panic!("sector {sector} is not written");
}

#[test]
fn what_a_disk_writes_to_guest_memory_behind_the_pause_is_not_in_a_snapshot_in_the_background() {
    need_kvm();
    // However late this comes, it writes on.
    let kernel = file(&writer_of(2));
    for io in [Io::Uring, Io::Threads] {
        let image = disk(u64::from(SECTORS));
        let disk = DiskConfig {
            io,
            ..DiskConfig::new(&*image)
        };
        let config = config(&kernel, Irqchip::Split, disk);
        let folder = tempfile::tempdir().unwrap();
        let (dir, to) = (folder.path().join("s"), folder.path().join("to"));
        let guest = Guest::of(|console, end| Machine::build(&config, console, end));
        until_written(&guest, &image, 2);
        let (at, turns) = (Cell::new(4), Cell::new(0));
        let files = before(|| {
            // The disk is at work between any two pieces.
            turns.set(turns.get() + 1);
            at.set((at.get() + 4).min(SECTORS - 1));
            until_written(&guest, &image, at.get());
        });
        let request = SnapshotRequest {
            disks: DiskCopies::Copy,
            background: true,
            ..SnapshotRequest::new(&dir)
        };
        let report = guest.running.snapshot_with(&request, &files).unwrap();
        // The device's page and the sector's, at least.
        assert!(report.background.unwrap().copied >= 2, "{report:?}");
        assert!(turns.get() > 2, "{turns:?}");
        assert!(guest.ends_within(WATCHDOG.as_millis() as i32));
        assert_eq!(guest.end.get(), Some(&GuestEnd::DebugExit(0)));
        // It looks at the guest.
        drop(files);
        drop(guest);
        std::fs::create_dir(&to).unwrap();
        let restore = RestoreRequest {
            disks_to: Some(to),
            ..RestoreRequest::new(&dir)
        };
        let guest = Guest::of(|console, end| Machine::restore(&restore, console, end));
        assert!(guest.ends_within(WATCHDOG.as_millis() as i32));
        assert_eq!(guest.end.get(), Some(&GuestEnd::DebugExit(0)));
    }
}

#[test]
fn what_a_disk_wrote_to_guest_memory_is_in_the_link_of_a_chain_that_follows() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    // However late this comes, it writes on.
    let kernel = file(&writer_of(2));
    let image = disk(u64::from(SECTORS));
    let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
    let folder = tempfile::tempdir().unwrap();
    let dir = |number: u32| folder.path().join(format!("s{number}"));
    let guest = Guest::of(|console, end| Machine::build(&config, console, end));
    let links = 5;
    for number in 0..links {
        // It has read the sectors before this one, too: the disk wrote them to its memory.
        until_written(&guest, &image, number * 6 + 2);
        guest.running.pause().unwrap();
        guest
            .running
            .snapshot(&SnapshotRequest {
                kind: match number {
                    0 => SnapshotKind::Full,
                    _ => SnapshotKind::Diff {
                        base: Some(dir(number - 1)),
                    },
                },
                track: Some(true),
                disks: DiskCopies::Copy,
                ..SnapshotRequest::new(dir(number))
            })
            .unwrap();
        let (chain, _) = Chain::open(&dir(number)).unwrap();
        chain.verify().unwrap();
        let table = guest.running.memory();
        for page in (0..16 << 20).step_by(4096) {
            let (mut has, mut saved) = ([0; 4096], [0xee; 4096]);
            if table.read_slice(&mut has, GuestAddress(page)).is_ok() {
                chain.read(page..page + 4096, &mut saved).unwrap();
                assert!(has == saved, "{page:#x} of link {number}");
            }
        }
        guest.running.resume().unwrap();
    }
    assert!(guest.ends_within(WATCHDOG.as_millis() as i32));
    assert_eq!(guest.end.get(), Some(&GuestEnd::DebugExit(0)));
    drop(guest);
    // The disk has moved on from all of them, and each has what it was.
    for number in [0, links - 1] {
        let request = RestoreRequest::new(dir(number));
        let refused = |request: &RestoreRequest, needles: &[&str]| {
            let end = Arc::new(EndSignal::new().unwrap());
            let nowhere = File::create("/dev/null").unwrap();
            let error = Machine::restore(request, nowhere, &end).map(drop);
            let error = error.unwrap_err();
            let text = reference_vmm::end::Chain(&error).to_string();
            for needle in needles {
                assert!(text.contains(needle), "{text}");
            }
            assert_eq!(error.exit_status(), 2, "{text}");
        };
        let own = dir(number).join("disk0");
        let before = std::fs::read(&own).unwrap();
        let needles = ["since", "--disks-to", own.to_str().unwrap()];
        refused(&request, &needles);
        let mut onto = request.clone();
        onto.overrides.disks = vec![(0, own.clone())];
        refused(&onto, &["the snapshot's own file"]);
        // By other names, and of what it builds on too.
        for link in [number, 0] {
            let own = dir(link).join("disk0");
            let (symbolic, hard) = (folder.path().join("symbolic"), folder.path().join("hard"));
            std::os::unix::fs::symlink(&own, &symbolic).unwrap();
            std::fs::hard_link(&own, &hard).unwrap();
            for name in [own.clone(), symbolic.clone(), hard.clone()] {
                onto.overrides.disks = vec![(0, name.clone())];
                let needles = ["the snapshot's own file", own.to_str().unwrap()];
                refused(&onto, &[&needles[..], &[name.to_str().unwrap()]].concat());
            }
            std::fs::remove_file(symbolic).unwrap();
            std::fs::remove_file(hard).unwrap();
        }
        let to = folder.path().join(format!("to{number}"));
        std::fs::create_dir(&to).unwrap();
        let elsewhere = RestoreRequest {
            disks_to: Some(to.clone()),
            ..request
        };
        let guest = Guest::of(|console, end| Machine::restore(&elsewhere, console, end));
        assert!(guest.ends_within(WATCHDOG.as_millis() as i32));
        assert_eq!(guest.end.get(), Some(&GuestEnd::DebugExit(0)));
        drop(guest);
        let now = File::open(to.join("disk0")).unwrap();
        for sector in 0..SECTORS {
            let mut bytes = [0; 4];
            now.read_exact_at(&mut bytes, u64::from(sector) * 512)
                .unwrap();
            assert_eq!(u32::from_le_bytes(bytes), word(sector));
        }
        // Of the snapshot nothing was written, and nothing is written over.
        assert!(std::fs::read(&own).unwrap() == before);
        refused(&elsewhere, &["disk0", "File exists"]);
        assert!(to.join("disk0").exists());
        // A copy that was cut off.
        let file = File::options().write(true).open(&own).unwrap();
        file.set_len(512).unwrap();
        std::fs::remove_file(to.join("disk0")).unwrap();
        refused(&elsewhere, &["disk0", "cut off"]);
        assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0);
    }
}

#[test]
fn a_disk_that_needs_memory_which_does_not_come_has_the_monitor_end_with_the_reason() {
    need_kvm();
    let kernel = file(&writer_of(200));
    let image = disk(u64::from(SECTORS));
    let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let guest = Guest::of(|console, end| Machine::build(&config, console, end));
    until_written(&guest, &image, 0);
    let request = SnapshotRequest::new(&dir);
    guest.running.pause().unwrap();
    guest.running.snapshot(&request).unwrap();
    drop(guest);
    let (link, _) = Link::open(&dir).unwrap();
    let memory = File::options().write(true).open(dir.join("memory"));
    let memory = memory.unwrap();
    // Where it finds requests, and where it says that they are done: neither is zeros by now, which would not be read.
    for lost in [AVAILABLE, USED] {
        let (_, piece) = link.map().locate(lost.into()).unwrap();
        let at = piece.offset + (u64::from(lost) - piece.guest);
        let mut before = [0; 8];
        let file = File::open(dir.join("memory")).unwrap();
        file.read_exact_at(&mut before, at).unwrap();
        memory.write_all_at(&[0xee; 8], at).unwrap();
        for on_loss in ["stop", "poison"] {
            let ended = Vmm::command(["restore", "--record=3600", "--from"])
                .arg(&dir)
                .args(["--on-loss", on_loss])
                .output();
            let last = ended.stderr.lines().last().unwrap();
            assert!(last.contains("is damaged between byte"), "{ended}");
            match (on_loss, ended.status.code()) {
                // Without its page tables it has crashed, as far as KVM says.
                ("poison", Some(3)) => {}
                _ => {
                    ended.expect_status(1);
                }
            }
        }
        memory.write_all_at(&before, at).unwrap();
    }
}

#[test]
fn a_second_disk_is_none_of_the_snapshots_own_files_either() {
    need_kvm();
    let kernel = file(&writer());
    let images = [disk(u64::from(SECTORS)), disk(8)];
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let mut config = config(&kernel, Irqchip::Split, DiskConfig::new(&*images[0]));
    config.disks.push(DiskConfig::new(&*images[1]));
    let guest = Guest::of(|console, end| Machine::build(&config, console, end));
    guest.running.pause().unwrap();
    let request = SnapshotRequest {
        disks: DiskCopies::Copy,
        ..SnapshotRequest::new(&dir)
    };
    guest.running.snapshot(&request).unwrap();
    drop(guest);
    for (number, own) in [(1, "disk1"), (1, "disk0"), (0, "disk1"), (1, "memory")] {
        let mut request = RestoreRequest::new(&dir);
        request.overrides.disks = vec![(number, dir.join(own))];
        let end = Arc::new(EndSignal::new().unwrap());
        let nowhere = File::create("/dev/null").unwrap();
        let error = Machine::restore(&request, nowhere, &end).map(drop);
        let text = reference_vmm::end::Chain(&error.unwrap_err()).to_string();
        let disk = format!("for disk {number}, is the snapshot's own file");
        assert!(text.contains(&disk), "{text}");
    }
}

#[test]
fn a_disk_that_cannot_be_had_leaves_no_snapshot_and_a_merge_takes_it_along() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let kernel = file(&writer());
    let image = disk(u64::from(SECTORS));
    let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
    let folder = tempfile::tempdir().unwrap();
    let (dir, out) = (folder.path().join("s"), folder.path().join("out"));
    let guest = Guest::of(|console, end| Machine::build(&config, console, end));
    guest.running.pause().unwrap();
    let request = |disks| SnapshotRequest {
        disks,
        ..SnapshotRequest::new(&dir)
    };
    // A file system that does not clone says so; one that does has done it.
    if let Err(error) = guest.running.snapshot(&request(DiskCopies::Reflink)) {
        let text = reference_vmm::end::Chain(&error).to_string();
        assert!(text.contains("--disks copy"), "{text}");
        assert!(!dir.exists());
    }
    guest.running.snapshot(&request(DiskCopies::Copy)).unwrap();
    assert!(std::fs::read(dir.join("disk0")).unwrap() == std::fs::read(&image).unwrap());
    // Another file of the name is not the guest's disk.
    let aside = folder.path().join("aside");
    std::fs::rename(&image, &aside).unwrap();
    std::fs::copy(&aside, &image).unwrap();
    let error = guest.running.snapshot(&request(DiskCopies::Copy));
    let text = reference_vmm::end::Chain(&error.unwrap_err()).to_string();
    assert!(text.contains("is not the guest's any more"), "{text}");
    drop(guest);
    let merged = MergeRequest {
        dirs: vec![dir.clone()],
        to: out.clone(),
        compression: Compression::Zstd,
    };
    merge(&merged, &HostFiles).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let to = folder.path().join("to");
    std::fs::create_dir(&to).unwrap();
    let request = RestoreRequest {
        disks_to: Some(to),
        ..RestoreRequest::new(&out)
    };
    let guest = Guest::of(|console, end| Machine::restore(&request, console, end));
    assert!(guest.ends_within(WATCHDOG.as_millis() as i32));
    assert_eq!(guest.end.get(), Some(&GuestEnd::DebugExit(0)));
}

#[test]
fn a_guest_does_not_go_on_at_a_disk_that_was_written_while_it_was_given_away() {
    need_kvm();
    let kernel = file(&writer_of(40));
    let image = disk(u64::from(SECTORS));
    let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
    let guest = Guest::of(|console, end| Machine::build(&config, console, end));
    let live = LiveGuest::new(&guest.running, &guest.end);
    live.hold().unwrap();
    live.release().unwrap();
    let other = config.disks[0].open().unwrap();
    let taken = live.take_back().unwrap_err().to_string();
    assert!(taken.contains("lock"), "{taken}");
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(b"elsewhere", 512).unwrap();
    drop(other);
    // However often.
    for _ in 0..2 {
        let refused = live.take_back().unwrap_err().to_string();
        assert!(refused.contains("seems to have run elsewhere"), "{refused}");
        assert_eq!(guest.running.state(), RunState::Paused);
        assert!(guest.running.resume().is_err());
        // And who has run it can have the disk again.
        drop(config.disks[0].open().unwrap());
    }
}

#[test]
fn a_disk_goes_along_with_a_guest_that_migrates_and_is_never_locked_twice() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let hops = if long() { 20 } else { 4 };
    // Some seconds of it.
    let kernel = file(&writer_of(40));
    let image = disk(u64::from(SECTORS));
    let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
    let mut guest = Guest::of(|console, end| Machine::build(&config, console, end));
    let mut moves = 0;
    for hop in 0..hops {
        if guest.ends_within(hop * 7 % 23) {
            break;
        }
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("incoming"));
        let incoming = Incoming::bind(&IncomingRequest::new(address.clone())).unwrap();
        let request = MigrateRequest::new(address.to_string());
        let end = Arc::new(EndSignal::new().unwrap());
        let gone = AtomicBool::new(false);
        let (here, there) = std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                let stop = || gone.load(Ordering::Relaxed).then(|| "it stays".to_owned());
                let nowhere = File::create("/dev/null").unwrap();
                incoming.receive(nowhere, &end, &stop, Machine::start)
            });
            let here = Outgoing::default().migrate(&guest.running, &guest.end, &request);
            gone.store(here.is_err(), Ordering::Relaxed);
            (here, there.join().unwrap())
        });
        match (here, there) {
            (Ok(_), Ok(running)) => {
                assert_eq!(guest.end.get(), None);
                guest = Guest { running, end };
                moves += 1;
            }
            // It came to its end before it could go.
            (Err(_), Err(_)) if guest.end.is_told() => break,
            (here, there) => panic!("{here:?} {:?}", there.err()),
        }
    }
    assert!(
        guest.ends_within(WATCHDOG.as_millis() as i32),
        "it stands still"
    );
    assert_eq!(guest.end.get(), Some(&GuestEnd::DebugExit(0)));
    assert!(moves > 1, "{moves}");
    let image = File::open(&image).unwrap();
    for sector in 0..SECTORS {
        let mut bytes = [0; 4];
        image
            .read_exact_at(&mut bytes, u64::from(sector) * 512)
            .unwrap();
        assert_eq!(u32::from_le_bytes(bytes), word(sector));
    }
}

#[test]
fn an_end_of_the_guest_does_not_wait_for_the_rest_of_its_disks_to_be_copied() {
    need_kvm();
    const MIB: u64 = 1 << 20;
    let kernel = file(&writer_of(40));
    for background in [false, true] {
        let image = disk(8 * MIB / 512);
        File::options()
            .write(true)
            .open(&*image)
            .unwrap()
            .write_all_at(&[0xda; 8 << 20], 0)
            .unwrap();
        let config = config(&kernel, Irqchip::Split, DiskConfig::new(&*image));
        let guest = Guest::of(|console, end| Machine::build(&config, console, end));
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        let request = SnapshotRequest {
            disks: DiskCopies::Copy,
            background,
            ..SnapshotRequest::new(&dir)
        };
        let written = Cell::new(0);
        let error = std::thread::scope(|scope| {
            let files = before_those_of("disk0", |_| {
                written.set(written.get() + 1);
                if written.get() > 1 {
                    return;
                }
                scope.spawn(|| guest.running.stop());
                while LiveGuest::new(&guest.running, &guest.end).over().is_none() {
                    std::thread::yield_now();
                }
            });
            guest.running.snapshot_with(&request, &files).unwrap_err()
        });
        let text = reference_vmm::end::Chain(&error).to_string();
        assert!(text.contains("ended"), "{text}");
        assert_eq!(written.get(), 1, "of eight");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
