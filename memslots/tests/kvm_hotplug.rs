// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory comes and goes under a guest that runs: its other memory is never missed, a reader sees the layout before or
//! the layout after and nothing between, and what is plugged is memory for the guest, what is unplugged is none. What is
//! given back under it reads as zeros.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memslots::{Backing, Error, Layout, LayoutSlot, Memslots, NewSlot, SlotFlags};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// 16-bit code: adds 1 to the byte at `[ds:0]`, sends the byte at `[es:0]` to port 0x11 and its own to port 0x10.
const CODE: &[u8] = &[
    0xfe, 0x06, 0x00, 0x00, // incb [0]
    0x26, 0xa0, 0x00, 0x00, // mov al, es:[0]
    0xe6, 0x11, //             out 0x11, al
    0xa0, 0x00, 0x00, //       mov al, [0]
    0xe6, 0x10, //             out 0x10, al
    0xeb, 0xef, //             jmp start
];
const RAM: GuestAddress = GuestAddress(0);
const CODE_AT: GuestAddress = GuestAddress(0x1000);
const DATA_AT: GuestAddress = GuestAddress(0x2000);
const DIMM: GuestAddress = GuestAddress(0x10_0000);
const OTHER_DIMM: GuestAddress = GuestAddress(0x40_0000);
const IN_DIMM: u8 = 0x5a;
const NOBODY: u8 = 0xff;

fn slot(name: &str, start: GuestAddress, size: u64, flags: SlotFlags) -> LayoutSlot {
    let backing = Backing::anonymous(size);
    let new = NewSlot {
        start,
        backing,
        flags,
    };
    new.named(name)
}

fn machine(layout: &Layout) -> (VcpuFd, Memslots) {
    let kvm = Kvm::new()
        .expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out");
    let vm: Arc<VmFd> = Arc::new(kvm.create_vm().unwrap());
    let memslots = Memslots::new(Arc::clone(&vm));
    memslots.set_layout(layout).unwrap();
    memslots.snapshot().write_slice(CODE, CODE_AT).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    (sregs.ds.base, sregs.ds.selector) = (DATA_AT.0, (DATA_AT.0 >> 4) as u16);
    (sregs.es.base, sregs.es.selector) = (DIMM.0, 0xffff);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (CODE_AT.0, 2);
    vcpu.set_regs(&regs).unwrap();
    (vcpu, memslots)
}

/// A guest that hangs fails the test instead of hanging it. Nothing is timed: a test that ends, ends before.
fn within_reason(test: impl FnOnce() + Send + 'static) {
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        tell.send(()).unwrap();
    });
    if told.recv_timeout(Duration::from_secs(240)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("the guest hangs");
    }
    thread.join().unwrap();
}

/// Stops the vCPU however the other thread ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn memory_comes_and_goes_under_a_guest_that_runs() {
    let rounds = match std::env::var_os("LONG_TESTS") {
        Some(_) => 1000,
        None => 40,
    };
    within_reason(move || {
        let without = Layout::new().with(slot("ram", RAM, 0x1_0000, SlotFlags::NONE));
        // Two DIMMs at once, and a flag of what the guest is running on.
        let with = Layout::new()
            .with(slot("ram", RAM, 0x1_0000, SlotFlags::LOG_DIRTY_PAGES))
            .with(slot("dimm", DIMM, 0x20_0000, SlotFlags::NONE))
            .with(slot("other", OTHER_DIMM, 0x1000, SlotFlags::NONE));
        let (mut vcpu, memslots) = machine(&without);
        for layout in [&with, &without] {
            assert!(
                !memslots.plan(layout).unwrap().has_gap(),
                "vCPUs need not stop"
            );
        }
        let stop = AtomicBool::new(false);
        // How often the guest has read a DIMM, and how often nothing.
        let (read_dimm, read_nothing) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            let vcpu_thread = scope.spawn(|| {
                // Whoever waits for the guest does not wait for one that has failed.
                let _stop = Stop(&stop);
                let mut reader = memslots.reader();
                let mut last = None;
                while !stop.load(Ordering::Relaxed) {
                    match vcpu.run().unwrap() {
                        VcpuExit::IoOut(0x10, &[count]) => {
                            let next = last.map_or(count, |last: u8| last.wrapping_add(1));
                            assert_eq!(count, next, "the guest's own memory is as it left it");
                            last = Some(count);
                        }
                        VcpuExit::IoOut(0x11, &[IN_DIMM]) => {
                            read_dimm.fetch_add(1, Ordering::Relaxed);
                        }
                        VcpuExit::IoOut(0x11, &[NOBODY]) => {
                            read_nothing.fetch_add(1, Ordering::Relaxed);
                        }
                        // Plugged, and nothing written yet.
                        VcpuExit::IoOut(0x11, &[0]) => {}
                        VcpuExit::MmioRead(address, data) => {
                            assert_eq!(address, DIMM.0, "memory that was always there is missed");
                            data.fill(NOBODY);
                        }
                        other => panic!("an exit that this guest does not cause: {other:?}"),
                    }
                    let table = reader.enter();
                    let dimms = [DIMM, OTHER_DIMM].map(|at| table.find(at).is_some());
                    assert_eq!(dimms[0], dimms[1], "a half-made layout");
                    assert!(table.find(RAM).is_some());
                }
            });
            let stopping = Stop(&stop);
            let wait_for_more = |count: &AtomicU64| {
                let before = count.load(Ordering::Relaxed);
                // Two: the first may have been under way.
                while count.load(Ordering::Relaxed) < before + 2 && !stop.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
            };
            for _ in 0..rounds {
                memslots.set_layout(&with).unwrap();
                memslots.ram().memory().write_obj(IN_DIMM, DIMM).unwrap();
                wait_for_more(&read_dimm);
                memslots.set_layout(&without).unwrap();
                wait_for_more(&read_nothing);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            drop(stopping);
            vcpu_thread.join().unwrap();
        });
        assert!(read_dimm.into_inner() >= 2 * rounds);
        assert!(read_nothing.into_inner() >= 2 * rounds);
    });
}

/// The DIMM of `backing`, and the page that the guest counts in, given back again and again while it runs.
fn give_back_under_a_guest(backing: Backing, rounds: u64) {
    let dimm = NewSlot {
        start: DIMM,
        backing,
        flags: SlotFlags::NONE,
    };
    let layout = Layout::new()
        .with(slot("ram", RAM, 0x1_0000, SlotFlags::NONE))
        .with(dimm.named("dimm"));
    let (mut vcpu, memslots) = machine(&layout);
    let ram = memslots.ram();
    let page = |at: GuestAddress| at..GuestAddress(at.0 + 0x1000);
    let stop = AtomicBool::new(false);
    // How often the guest has read the DIMM as it was filled, and as zeros; how often its count began anew.
    let counts: [AtomicU64; 3] = std::array::from_fn(|_| AtomicU64::new(0));
    let [full, empty, anew] = &counts;
    thread::scope(|scope| {
        let vcpu_thread = scope.spawn(|| {
            let _stop = Stop(&stop);
            let mut last = 0;
            while !stop.load(Ordering::Relaxed) {
                match vcpu.run().unwrap() {
                    VcpuExit::IoOut(0x10, &[count]) => {
                        if count != u8::wrapping_add(last, 1) {
                            // Given back before it was counted up, or before it was read.
                            assert!(count <= 1, "{count} after {last}");
                            anew.fetch_add(1, Ordering::Relaxed);
                        }
                        last = count;
                    }
                    VcpuExit::IoOut(0x11, &[IN_DIMM]) => drop(full.fetch_add(1, Ordering::Relaxed)),
                    VcpuExit::IoOut(0x11, &[0]) => drop(empty.fetch_add(1, Ordering::Relaxed)),
                    other => panic!("an exit that this guest does not cause: {other:?}"),
                }
            }
        });
        let stopping = Stop(&stop);
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        // Two: the first may have been under way.
        let wait_for_more = |count: &AtomicU64| {
            let before = read(count);
            while read(count) < before + 2 && !stop.load(Ordering::Relaxed) {
                thread::yield_now();
            }
        };
        for _ in 0..rounds {
            memslots.snapshot().write_obj(IN_DIMM, DIMM).unwrap();
            wait_for_more(full);
            assert_eq!(ram.punch(&[page(DIMM)]), Ok(0x1000));
            wait_for_more(empty);
            let before = read(full);
            wait_for_more(empty);
            assert_eq!(read(full), before, "what was given back has come again");
            let before = read(anew);
            while read(anew) == before && !stop.load(Ordering::Relaxed) {
                assert_eq!(ram.punch(&[page(DATA_AT)]), Ok(0x1000));
                thread::yield_now();
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        drop(stopping);
        vcpu_thread.join().unwrap();
    });
    let [full, empty, anew] = counts.map(AtomicU64::into_inner);
    assert!(full >= 2 * rounds && empty >= 4 * rounds && anew >= rounds);
}

#[test]
fn memory_given_back_under_a_guest_that_runs_reads_as_zeros_and_the_guest_goes_on() {
    let rounds = match std::env::var_os("LONG_TESTS") {
        Some(_) => 2000,
        None => 40,
    };
    for backing in [Backing::anonymous(0x20_0000), Backing::memfd(0x20_0000)] {
        within_reason(move || give_back_under_a_guest(backing, rounds));
    }
}

#[test]
fn a_move_of_plugged_memory_takes_its_contents_along_while_the_guest_runs() {
    within_reason(|| {
        let ram = || slot("ram", RAM, 0x1_0000, SlotFlags::NONE);
        let dimm = |at| slot("dimm", at, 0x1000, SlotFlags::NONE);
        let elsewhere = Layout::new().with(ram()).with(dimm(OTHER_DIMM));
        let here = Layout::new().with(ram()).with(dimm(DIMM));
        let (mut vcpu, memslots) = machine(&elsewhere);
        memslots.snapshot().write_obj(IN_DIMM, OTHER_DIMM).unwrap();
        let plan = memslots.plan(&here).unwrap();
        assert!(
            plan.has_gap(),
            "a move is a moment in which the memory is nowhere"
        );
        memslots.apply(plan).unwrap();
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x11, &[byte]) => {
                    assert_eq!(byte, IN_DIMM);
                    break;
                }
                VcpuExit::IoOut(..) => {}
                other => panic!("an exit that this guest does not cause: {other:?}"),
            }
        }
    });
}

#[test]
fn a_slot_with_a_guest_memfd_is_memory_for_the_guest_where_the_host_has_them() {
    within_reason(|| {
        let ram = slot("ram", RAM, 0x1_0000, SlotFlags::NONE);
        let (mut vcpu, memslots) = machine(&Layout::new().with(ram.clone()));
        let file = match memslots.create_guest_memfd(0x1000) {
            Ok(file) => file,
            Err(Error::NoGuestMemfd) => return println!("{}", Error::NoGuestMemfd),
            Err(error) => panic!("{error}"),
        };
        let private = slot("dimm", DIMM, 0x1000, SlotFlags::NONE).with_guest_memfd(&file, 0);
        memslots
            .set_layout(&Layout::new().with(ram).with(private))
            .unwrap();
        drop(file); // The slot has it.
        // No page is private, so the guest sees the user mapping.
        memslots.snapshot().write_obj(IN_DIMM, DIMM).unwrap();
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x11, &[byte]) => {
                    assert_eq!(byte, IN_DIMM);
                    break;
                }
                VcpuExit::IoOut(..) => {}
                other => panic!("an exit that this guest does not cause: {other:?}"),
            }
        }
    });
}
