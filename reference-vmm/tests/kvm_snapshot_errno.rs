// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host that refuses any one of KVM's calls, or of those on the snapshot's files and disks. While a guest goes on from a
//! snapshot the monitor ends by itself with one line, or does without the call; while one is taken, it is refused with the
//! errno, the older one of the name stays, and the guest runs on. `LONG_TESTS=1` refuses every call; the short form each
//! kind's first and last.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use guests::{image, keeper::keeper64};
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::devices::virtio::block::DiskConfig;
use reference_vmm::end::EndSignal;
use reference_vmm::memory::Memory;
use reference_vmm::snapshot::SnapshotRequest;
use reference_vmm::snapshot::disks::DiskCopies;
use reference_vmm::snapshot::info;
use reference_vmm::vm::Machine;
use support::tracer::{Call, Inject, Kind, Trace, chosen, trace, trace_in};
use support::{Ended, Vmm, WATCHDOG, file, long, need_kvm, not_one_line};

const ERRNOS: [i32; 4] = [libc::EINVAL, libc::ENOMEM, libc::EPERM, libc::EIO];

/// What the host's file system may say.
const FILE_ERRNOS: [i32; 4] = [libc::EIO, libc::ENOSPC, libc::EMFILE, libc::EACCES];

/// Goes on from `dir` with a `q` at its console, at which the guest ends.
fn restore(dir: &str, inject: &[Inject]) -> Trace {
    let typed = file(b"q");
    let stdin: OwnedFd = File::open(&typed).unwrap().into();
    trace(&["restore", "--from", dir], Some(stdin), inject, WATCHDOG)
}

/// Makes `dir` a snapshot of a keeper.
fn taken(dir: &Path, irqchip: Irqchip) {
    taken_with(dir, irqchip, &[]);
}

/// The same, of one that has these disks, in the snapshot too.
fn taken_with(dir: &Path, irqchip: Irqchip, disks: &[&Path]) {
    let kernel = file(&image::elf64(keeper64()));
    let config = Config {
        cmdline: "1 ".into(),
        memory: Memory::new(16 << 20),
        irqchip,
        debug_exit: Some(0xf4),
        disks: disks.iter().map(|disk| DiskConfig::new(*disk)).collect(),
        ..Config::new(&*kernel)
    };
    let end = Arc::new(EndSignal::new().unwrap());
    let nowhere = File::create("/dev/null").unwrap();
    let machine = Machine::build(&config, nowhere, &end).unwrap();
    let running = machine.start().unwrap();
    let request = SnapshotRequest {
        disks: DiskCopies::Copy,
        ..SnapshotRequest::new(dir)
    };
    running.snapshot(&request).unwrap();
}

#[test]
fn each_call_that_is_refused_ends_a_restore_with_one_line_or_is_done_without() {
    need_kvm();
    for irqchip in [Irqchip::Split, Irqchip::Kernel] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        taken(&dir, irqchip);
        let dir = dir.to_str().unwrap();

        let good = restore(dir, &[]);
        assert_eq!(
            (good.status.code(), good.stderr.as_str()),
            (Some(1), ""),
            "{good}"
        );
        let calls = chosen(good.kvm().filter(|call| call.kind != Kind::kvm("KVM_RUN")));
        let kinds: BTreeSet<_> = calls.iter().map(|(kind, _)| kind).collect();
        assert!(kinds.len() > 24, "{calls:?}");
        let mut ended = 0;
        for (number, (kind, nth)) in calls.into_iter().enumerate() {
            let errno = ERRNOS[number % ERRNOS.len()];
            let inject = Inject { kind, nth, errno };
            let trace = restore(dir, std::slice::from_ref(&inject));
            assert_eq!(trace.hung, None, "{irqchip:?} {inject}: {trace}");
            // It hears the `q` at another moment each time, so not every run makes every call.
            if !trace.injected {
                continue;
            }
            if trace.stderr.is_empty() {
                assert_eq!(
                    trace.status.code(),
                    Some(1),
                    "{irqchip:?} {inject}: {trace}"
                );
                assert!(
                    trace.stdout.ends_with(b"!"),
                    "{irqchip:?} {inject}: {trace}"
                );
                continue;
            }
            ended += 1;
            assert_eq!(
                not_one_line(&trace.stderr),
                None,
                "{irqchip:?} {inject}: {trace}"
            );
            let status = trace.status.code();
            assert!(
                matches!(status, Some(1 | 2)),
                "{irqchip:?} {inject}: {trace}"
            );
            println!("{inject}\n    {}", trace.stderr.trim_end());
        }
        assert!(ended > 15, "{ended}");
    }
}

/// Has the guest of `dir` go on, takes a snapshot of it to `to`, and has the guest end: the monitor's trace, what was said of
/// the snapshot, and of the guest behind it.
fn save(dir: &Path, to: &Path, inject: &[Inject]) -> (Trace, Ended, Ended) {
    save_in(None, dir, to, inject)
}

/// The same, with the disks in the snapshot; calls on files below `place` are told apart.
fn save_in(
    place: Option<&Path>,
    dir: &Path,
    to: &Path,
    inject: &[Inject],
) -> (Trace, Ended, Ended) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("api");
    let ctl = || Vmm::command(["ctl", "--api-sock"]).arg(&socket);
    let (stdin, mut typed) = std::io::pipe().unwrap();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let begun = Instant::now();
            // It is there before it is listened at.
            while UnixStream::connect(&socket).is_err() {
                assert!(begun.elapsed() < WATCHDOG, "no socket");
                std::thread::yield_now();
            }
            let asked = ctl().arg("snapshot").arg(to).args(["--disks", "copy"]);
            let asked = asked.output();
            let state = ctl().arg("status").output();
            typed.write_all(b"q").unwrap();
            (asked, state)
        });
        let words: [&std::ffi::OsStr; 5] = [
            "restore".as_ref(),
            "--from".as_ref(),
            dir.as_os_str(),
            "--api-sock".as_ref(),
            socket.as_os_str(),
        ];
        let trace = trace_in(place, &words, Some(stdin.into()), inject, WATCHDOG);
        let (asked, state) = client.join().unwrap();
        (trace, asked, state)
    })
}

#[test]
fn each_call_of_a_save_that_is_refused_is_told_with_its_errno_and_the_guest_runs_on() {
    if support::lab_short() {
        return;
    }
    need_kvm();
    for irqchip in [Irqchip::Split, Irqchip::Kernel] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("s");
        taken(&dir, irqchip);
        let place = folder.path().join("place");
        std::fs::create_dir(&place).unwrap();
        let to = place.join("to");
        let (good, asked, _) = save(&dir, &to, &[]);
        asked.expect_status(0);
        assert_eq!(good.status.code(), Some(1), "{good}");
        std::fs::remove_dir_all(&to).unwrap();
        // The guest runs before the save is asked for: what comes behind its first entry is the save's.
        let runs = |call: &&Call| call.kind == Kind::kvm("KVM_RUN");
        let mut behind = good.kvm().skip_while(|call| !runs(call));
        let mut kinds = BTreeSet::new();
        let calls: Vec<_> = behind
            .by_ref()
            .filter(|call| call.kind.to_string().contains("KVM_GET_"))
            // Its answer is what counts, whatever it was refused with.
            .filter(|call| call.kind != Kind::kvm("KVM_GET_API_VERSION"))
            .filter(|call| long() || kinds.insert(call.kind.clone()))
            .map(|call| (call.kind.clone(), call.nth))
            .collect();
        assert!(calls.len() > 10, "{irqchip:?}: {calls:?}");
        let mut refused = 0;
        for (number, (kind, nth)) in calls.into_iter().enumerate() {
            let errno = ERRNOS[number % ERRNOS.len()];
            let inject = Inject { kind, nth, errno };
            let (trace, asked, state) = save(&dir, &to, std::slice::from_ref(&inject));
            let what = format!("{irqchip:?} {inject}: {asked} {trace}");
            assert!(trace.injected && trace.hung.is_none(), "{what}");
            // Whatever became of it, the guest has run on, and to its own end.
            assert_eq!(state.text(), "running\n", "{what}");
            assert_eq!(trace.status.code(), Some(1), "{what}");
            assert!(trace.stdout.ends_with(b"!"), "{what}");
            if asked.status.success() {
                // It did without.
                std::fs::remove_dir_all(&to).unwrap();
            } else {
                refused += 1;
                asked.expect_status(1);
                assert_eq!(not_one_line(&asked.stderr), None, "{what}");
                let said = format!("os error {errno}");
                assert!(asked.stderr.contains(&said), "{what}");
            }
            let left: Vec<_> = std::fs::read_dir(&place).unwrap().collect();
            assert!(left.is_empty(), "{left:?}: {what}");
            println!("{inject}\n    {}", asked.stderr.trim_end());
        }
        assert!(refused > 8, "{irqchip:?}: {refused}");
    }
}

/// The files of a folder, by their names.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap();
    let of = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        (name, std::fs::read(entry.path()).unwrap())
    };
    entries.map(of).collect()
}

#[test]
fn each_file_call_of_a_save_that_is_refused_leaves_the_older_snapshot_the_guest_and_nothing_else() {
    if support::lab_short() {
        return;
    }
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let (dir, place) = (folder.path().join("s"), folder.path().join("place"));
    std::fs::create_dir(&place).unwrap();
    let (image, to) = (place.join("image"), place.join("to"));
    std::fs::write(&image, vec![0x5a; 64 << 10]).unwrap();
    taken_with(&dir, Irqchip::Split, &[&image]);
    let save = |inject: &[Inject]| save_in(Some(&place), &dir, &to, inject);
    // The first makes the older one.
    save(&[]).1.expect_status(0);
    let (good, asked, _) = save(&[]);
    asked.expect_status(0);
    // The thread that makes the new one's directory does all that there is to it.
    let partial = ".to.partial";
    let made = |call: &&Call| call.kind == Kind::File(libc::SYS_mkdir, partial.into());
    let saver = good.calls.iter().find(made).unwrap().tid;
    let runs = |call: &&Call| call.kind == Kind::kvm("KVM_RUN");
    let behind = good.calls.iter().skip_while(|call| !runs(call));
    let calls = chosen(behind.filter(|call| {
        call.tid == saver && matches!(call.kind, Kind::File(..)) && call.result.is_some()
    }));
    assert!(calls.len() > 20, "{calls:?}");
    let (mut refused, mut told) = (0, BTreeSet::new());
    for (number, (kind, nth)) in calls.into_iter().enumerate() {
        let errno = FILE_ERRNOS[number % FILE_ERRNOS.len()];
        let inject = Inject { kind, nth, errno };
        let before = files(&to);
        let (trace, asked, state) = save(std::slice::from_ref(&inject));
        let what = format!("{inject}: {asked} {trace}");
        println!("{inject}\n    {}", asked.stderr.trim_end());
        assert!(trace.injected && trace.hung.is_none(), "{what}");
        assert_eq!(state.text(), "running\n", "{what}");
        assert_eq!(trace.status.code(), Some(1), "{what}");
        assert!(trace.stdout.ends_with(b"!"), "{what}");
        if asked.status.success() {
            info::verify(&to).unwrap();
        } else {
            refused += 1;
            told.insert(inject.kind);
            asked.expect_status(1);
            assert_eq!(not_one_line(&asked.stderr), None, "{what}");
            let said = format!("os error {errno}");
            assert!(asked.stderr.contains(&said), "{what}");
            assert!(files(&to) == before, "{what}");
        }
        let names: Vec<_> = std::fs::read_dir(&place).unwrap().flatten().collect();
        let left = names.iter().find(|left| left.file_name() == partial);
        if let Some(left) = left {
            // What is replaced and cannot be removed is told, and the next one removes it.
            assert!(trace.stderr.contains("is left in"), "{what}");
            std::fs::remove_dir_all(left.path()).unwrap();
        }
        let expected = 2 + usize::from(left.is_some());
        assert_eq!(names.len(), expected, "{names:?}: {what}");
        assert_eq!(std::fs::read(&image).unwrap(), vec![0x5a; 64 << 10]);
    }
    assert!(refused > 12, "{refused}");
    // Those without which there is no snapshot.
    for (nr, path) in [
        (libc::SYS_mkdir, partial),
        (libc::SYS_openat, ".to.partial/memory"),
        (libc::SYS_pwrite64, ".to.partial/memory"),
        (libc::SYS_fsync, ".to.partial/memory"),
        (libc::SYS_fsync, ".to.partial/state"),
        (libc::SYS_fsync, ".to.partial/disk0"),
        (libc::SYS_fsync, partial),
        (libc::SYS_renameat2, partial),
        (libc::SYS_fsync, ""),
    ] {
        let kind = Kind::File(nr, path.into());
        assert!(told.contains(&kind), "{kind} was not refused: {told:?}");
    }
}

#[test]
fn each_file_call_of_a_restore_that_is_refused_ends_it_with_one_line_and_leaves_no_disk() {
    if support::lab_short() {
        return;
    }
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (dir, to) = (at("s"), at("to"));
    std::fs::create_dir(&to).unwrap();
    std::fs::write(at("image"), vec![0x5a; 64 << 10]).unwrap();
    taken_with(&dir, Irqchip::Split, &[&at("image")]);
    let restore = |inject: &[Inject]| {
        let typed = file(b"q");
        let stdin: OwnedFd = File::open(&typed).unwrap().into();
        let words = ["restore".as_ref(), "--from".as_ref(), dir.as_os_str()];
        let words = [&words[..], &["--disks-to".as_ref(), to.as_os_str()]].concat();
        trace_in(Some(folder.path()), &words, Some(stdin), inject, WATCHDOG)
    };
    let disk = to.join("disk0");
    let good = restore(&[]);
    assert_eq!(
        (good.status.code(), good.stderr.as_str()),
        (Some(1), ""),
        "{good}"
    );
    std::fs::remove_file(&disk).unwrap();
    let before = files(&dir);
    // From its first instruction on the guest has the disk.
    let runs = |call: &&Call| call.kind == Kind::kvm("KVM_RUN");
    let ahead = good.calls.iter().take_while(|call| !runs(call));
    let calls = chosen(ahead.filter(|call| matches!(call.kind, Kind::File(..))));
    assert!(calls.len() > 12, "{calls:?}");
    let mut refused = 0;
    for (number, (kind, nth)) in calls.into_iter().enumerate() {
        let errno = FILE_ERRNOS[number % FILE_ERRNOS.len()];
        let inject = Inject { kind, nth, errno };
        let trace = restore(std::slice::from_ref(&inject));
        println!("{inject}\n    {}", trace.stderr.trim_end());
        assert!(trace.injected && trace.hung.is_none(), "{inject}: {trace}");
        if trace.stderr.is_empty() {
            assert_eq!(trace.status.code(), Some(1), "{inject}: {trace}");
            assert!(trace.stdout.ends_with(b"!"), "{inject}: {trace}");
            std::fs::remove_file(&disk).unwrap();
        } else {
            refused += 1;
            assert_eq!(not_one_line(&trace.stderr), None, "{inject}: {trace}");
            let status = trace.status.code();
            assert!(matches!(status, Some(1 | 2)), "{inject}: {trace}");
            assert!(!disk.exists(), "{inject}: {trace}");
        }
        assert!(files(&dir) == before, "{inject}: {trace}");
    }
    assert!(refused > 8, "{refused}");
}
