// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a machine's guest and devices write is tracked, over the real KVM: nothing is missed, by no user.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use reference_vmm::config::{Config, DirtyLogKind, Irqchip};
use reference_vmm::end::{EndSignal, GuestEnd};
use reference_vmm::vm::tracking::{TrackError, TrackUser};
use reference_vmm::vm::{Machine, Running};
use support::keeper::keeper;
use support::tracked::{Copy, addresses, round};
use support::{WATCHDOG, long, need_kvm};

const PAGES: usize = (16 << 20) / 4096;

/// A guest that keeps 64 pages, and says a digit each time that it has rewritten them.
struct Guest {
    running: Running,
    end: Arc<EndSignal>,
    console: PipeReader,
    _kernel: tempfile::TempPath,
}

impl Guest {
    fn boot(cpus: u32, irqchip: Irqchip) -> Self {
        Self::with_log(cpus, irqchip, DirtyLogKind::Bitmap)
    }

    fn with_log(cpus: u32, irqchip: Irqchip, dirty_log: DirtyLogKind) -> Self {
        let (kernel, config) = keeper(cpus, irqchip);
        let config = Config {
            dirty_log,
            ..config
        };
        let end = Arc::new(EndSignal::new().unwrap());
        let (console, writer) = std::io::pipe().unwrap();
        let machine = Machine::build(&config, writer, &end).unwrap();
        let mut guest = Guest {
            running: machine.start().unwrap(),
            end,
            console,
            _kernel: kernel,
        };
        guest.passes(1);
        guest
    }

    /// Waits until it has rewritten its pages so many times from now on.
    fn passes(&mut self, count: usize) {
        if let Err(end) = self.try_passes(count) {
            panic!("{end:?}");
        }
    }

    /// The same; its end, if that comes first.
    fn try_passes(&mut self, count: usize) -> Result<(), GuestEnd> {
        let mut said = 0;
        // SAFETY: an open descriptor, and an int that the call writes.
        let asked = unsafe { libc::ioctl(self.console.as_raw_fd(), libc::FIONREAD, &raw mut said) };
        assert_eq!(asked, 0);
        let mut left = said as usize + count;
        while left > 0 {
            let mut fds = [self.console.as_raw_fd(), self.end.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: two pollfds.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, WATCHDOG.as_millis() as i32) };
            assert!(ready > 0, "it says nothing");
            if let Some(end) = self.end.get() {
                return Err(end.clone());
            }
            let mut heard = vec![0; left.min(64)];
            left -= self.console.read(&mut heard).unwrap();
        }
        Ok(())
    }

    /// Tracks from a pause on, and what memory was then.
    fn track(&self, user: TrackUser) -> Copy {
        self.running.pause().unwrap();
        self.running.start_tracking(user).unwrap();
        let copy = Copy::of(&self.running);
        self.running.resume().unwrap();
        copy
    }
}

#[test]
fn what_has_changed_between_two_harvests_is_in_the_second() {
    need_kvm();
    let rounds = if long() { 200 } else { 10 };
    let (bitmap, ring) = (DirtyLogKind::Bitmap, "ring".parse().unwrap());
    for (cpus, irqchip, log) in [
        (1, Irqchip::Split, bitmap),
        (4, Irqchip::Kernel, bitmap),
        (1, Irqchip::Kernel, ring),
        (4, Irqchip::Split, ring),
    ] {
        let mut guest = Guest::with_log(cpus, irqchip, log);
        let mut before = guest.track(TrackUser::Snapshot);
        for _ in 0..rounds {
            guest.passes(2);
            let told = round(&guest.running, TrackUser::Snapshot, &mut before);
            // Its 64, and a stack or two: not just all.
            assert!((64..200).contains(&told), "{told}");
        }
    }
}

#[test]
fn a_vcpu_whose_dirty_ring_is_full_goes_on_and_nothing_of_it_is_lost() {
    need_kvm();
    let small = "ring=4096".parse().unwrap();
    let mut guest = Guest::with_log(1, Irqchip::Split, small);
    let mut before = guest.track(TrackUser::Snapshot);
    for _ in 0..20 {
        match guest.try_passes(100) {
            Ok(()) => {}
            // A KVM that interprets the guest overruns rings, and such a vCPU never enters again. The lab's does not.
            Err(GuestEnd::Failed(why)) if why.contains("it was overrun") => {
                eprintln!("this host's KVM: {why}");
                return;
            }
            Err(end) => panic!("{end:?}"),
        }
        let told = round(&guest.running, TrackUser::Snapshot, &mut before);
        assert!(told >= 64, "{told}");
    }
}

#[test]
fn each_user_is_told_of_every_page_and_a_migration_of_all_to_begin_with() {
    need_kvm();
    let mut guest = Guest::boot(1, Irqchip::Split);
    let mut snapshot = guest.track(TrackUser::Snapshot);
    guest.passes(2);
    let mut migration = guest.track(TrackUser::Migration);
    assert_eq!(
        round(&guest.running, TrackUser::Migration, &mut migration),
        PAGES
    );
    guest.passes(2);
    let told = round(&guest.running, TrackUser::Migration, &mut migration);
    assert!((64..200).contains(&told), "{told}");
    // What the other one was told of is not lost to this one.
    let told = round(&guest.running, TrackUser::Snapshot, &mut snapshot);
    assert!((64..200).contains(&told), "{told}");
    guest.running.stop_tracking(TrackUser::Migration);
    guest.passes(2);
    round(&guest.running, TrackUser::Snapshot, &mut snapshot);

    // A migration that is alone has KVM begin with every page dirty.
    guest.running.stop_tracking(TrackUser::Snapshot);
    let mut migration = guest.track(TrackUser::Migration);
    for expected in [PAGES..=PAGES, 64..=200] {
        guest.passes(2);
        let told = round(&guest.running, TrackUser::Migration, &mut migration);
        assert!(expected.contains(&told), "{told}");
    }
}

fn is_off(running: &Running) -> bool {
    let off = running.harvest(TrackUser::Snapshot);
    matches!(off, Err(TrackError::Off))
}

#[test]
fn a_harvest_that_is_dropped_is_found_again_and_off_is_off() {
    need_kvm();
    let mut guest = Guest::boot(1, Irqchip::Split);
    assert!(is_off(&guest.running));
    guest.track(TrackUser::Snapshot);
    guest.passes(2);
    guest.running.pause().unwrap();
    let mut first = guest.running.harvest(TrackUser::Snapshot).unwrap();
    let all = addresses(&first);
    let slot = first.slots().iter().position(|slot| !slot.pages.is_clean());
    let slot = slot.unwrap();
    let run = first.slots()[slot].pages.runs().next().unwrap();
    first.forget(slot, run).unwrap();
    drop(first);
    let second = guest.running.harvest(TrackUser::Snapshot).unwrap();
    assert_eq!(
        addresses(&second).len() as u64,
        all.len() as u64 - run.pages
    );
    assert!(addresses(&second).is_subset(&all));
    second.commit();
    let none = guest.running.harvest(TrackUser::Snapshot).unwrap();
    assert_eq!(none.count(), 0);
    none.commit();
    guest.running.stop_tracking(TrackUser::Snapshot);
    assert!(is_off(&guest.running));
}
