// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock Linux that loses a page of a process: it has a machine check, kills that process and no other, never uses the
//! page again, and goes on; or, where it cannot, it panics, and its monitor says so.
//!
//! The process is `guest-io cold` (xtask/src/bin/guest_io/cold.rs), which writes its page before a snapshot. Restored, the
//! guest has its memory from a page-fault handler in this process, which knows that page by what it begins with and
//! poisons it, the first time. All others come at once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use async_pf::external::{HandOff, receive};
use support::lab::{alone, initrd_with_guest_io, scripted};
use support::uffd::{copy_page, poison_page};
use support::{Ended, Vmm, WATCHDOG};

const LIMIT: Duration = Duration::from_secs(240);

/// What the page begins with.
const MARK: &[u8] = b"guest: cold page";

/// A busybox that still does what it should is what the guest has left of its memory.
const SCRIPT: &str = "guest-io cold 1 || echo \"guest: it ended with $?\"
grep HardwareCorrupted /proc/meminfo | sed 's/^/guest: /'
echo \"guest: sum $(seq 100000 | md5sum)\"";

/// Serves until the monitor has ended, but for the first page with the mark.
fn serve(given: &HandOff, memory: &File, monitor: &UnixStream) {
    let mut faults = File::from(given.userfaultfd.try_clone().unwrap());
    let mut lost = None;
    loop {
        let mut fds = [monitor.as_raw_fd(), faults.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: two pollfds.
        assert!(unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } > 0);
        if fds[0].revents != 0 {
            return;
        }
        let mut message = [0; 32];
        match faults.read(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            read => assert_eq!(read.unwrap(), 32),
        }
        // `struct uffd_msg`: a page fault, and where.
        assert_eq!(message[0], 0x12);
        let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
        let (_, offset, page) = given.mappings.locate(address).unwrap();
        let mut bytes = [0; 4096];
        memory.read_exact_at(&mut bytes, offset).unwrap();
        if bytes.starts_with(MARK) && lost.is_none() {
            lost = Some(page);
            poison_page(&given.userfaultfd, page);
        } else if lost != Some(page) {
            copy_page(&given.userfaultfd, page, &bytes);
        }
    }
}

/// Boots a guest, snapshots it before its process touches the page again, and lets it go on without it.
fn loses_a_page(kernel: &str, model: Option<&str>) -> Ended {
    let folder = tempfile::tempdir().unwrap();
    let [api, frozen, socket] = ["api", "frozen", "handler"].map(|name| folder.path().join(name));
    let initrd = initrd_with_guest_io();
    let mut first = scripted(kernel, "", SCRIPT)
        .arg("--initrd")
        .arg(&*initrd)
        .arg("--api-sock")
        .arg(&api)
        .stdin_pipe()
        .limit(LIMIT);
    if let Some(model) = model {
        let file = folder.path().join("cpu.json");
        std::fs::write(&file, model).unwrap();
        first = first.arg("--cpu").arg(file);
    }
    let mut first = first.start();
    first.wait_for("guest: cold ready");
    ctl(&api, &["pause"]);
    ctl(&api, &["snapshot", frozen.to_str().unwrap()]);
    first.signal(libc::SIGTERM);
    first.wait().expect_status(0);

    let listener = UnixListener::bind(&socket).unwrap();
    let memory = File::open(frozen.join("memory")).unwrap();
    std::thread::spawn(move || {
        let (monitor, _) = listener.accept().unwrap();
        let hand_off = receive(&monitor, WATCHDOG).unwrap();
        serve(&hand_off, &memory, &monitor);
    });
    let mut running = Vmm::command(["restore", "--on-loss=poison", "--stats", "--from"])
        .arg(&frozen)
        .args(["--page-deadline", "240"])
        .arg("--page-handler")
        .arg(&socket)
        .stdin_pipe()
        .limit(LIMIT)
        .start();
    running.type_in(b"watch\n");
    running.wait()
}

fn ctl(api: &Path, words: &[&str]) {
    let asked = Vmm::command(["ctl", "--api-sock"]).arg(api).args(words);
    asked.limit(LIMIT).output().expect_status(0);
}

/// The process was killed by SIGBUS, and all else is as ever.
#[track_caller]
fn expect_it_goes_on(ended: &Ended) {
    ended.expect_status(0);
    let text = ended.text();
    for needle in [
        "Memory failure: 0x",
        // 128 and SIGBUS.
        "guest: it ended with 135",
        "guest: HardwareCorrupted:     4 kB",
        // seq 100000 | md5sum
        "guest: sum dea9193b768319cbb4ff1a137ac03113",
        "guest: script done",
    ] {
        assert!(text.contains(needle), "no {needle:?} in {ended}");
    }
    assert!(!text.contains("guest: cold touched all"), "{ended}");
    for needle in [
        "the guest has a machine check",
        "machine checks for lost memory: 1\n",
    ] {
        assert!(ended.stderr.contains(needle), "no {needle:?} in {ended}");
    }
    support::lab::no_complaints(ended);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_process_that_touches_a_lost_page_is_killed_and_its_linux_goes_on() {
    let _alone = alone();
    let ended = loses_a_page("vmlinuz-6.12", None);
    for line in ended
        .text()
        .lines()
        .filter(|line| !line.contains("cold step"))
    {
        println!("{line}");
    }
    expect_it_goes_on(&ended);
}

/// It has CR4.MCE set all the same, and dies of the first one.
#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_linux_that_was_built_without_machine_checks_panics() {
    let _alone = alone();
    let ended = loses_a_page("vmlinuz-cloud-6.1", None);
    ended.expect_status(3);
    let needle = "the guest has a machine check";
    assert!(ended.stderr.contains(needle), "{ended}");
}

/// What becomes of one that is not told that it can recover.
#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_linux_that_is_not_told_that_it_can_recover_panics() {
    let _alone = alone();
    let hidden = r#"{"clear": ["succor", "overflow_recov"]}"#;
    for kernel in ["vmlinuz-6.12", "vmlinuz-full-6.1"] {
        let ended = loses_a_page(kernel, Some(hidden));
        ended.expect_status(3);
        for needle in ["the guest has a machine check", "told by pvpanic"] {
            assert!(ended.stderr.contains(needle), "no {needle:?} in {ended}");
        }
        // Taken in the kernel (an interrupt came first) the check is as an NMI: what Linux says of it comes to its console
        // behind its word to pvpanic, with which this machine ends.
        let text = ended.text();
        let says_why = text.contains("Uncorrected error without MCA Recovery");
        assert!(says_why || !text.contains("Kernel panic"), "{ended}");
    }
}
