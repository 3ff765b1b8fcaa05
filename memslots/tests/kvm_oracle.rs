// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel is the oracle: the same random requests to the classifier and to the host's KVM, the same verdict each
//! time, and the same layout after. KVM cannot read slots back, so that is probed: which pages are taken, which ids have
//! a dirty log, which pages of a guest_memfd are bound. No vCPU exists, so nothing is ever read or written through the
//! slots.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_ioctls::{Kvm, VmFd};
use memslots::{
    Change, Errno, Gfn, GuestMemfdRange, Hva, Limits, MAX_PAGES, MemoryRegion, PAGE_SHIFT,
    PAGE_SIZE, Refusal, SetMemoryRegion, SlotFlags, SlotId, SlotMap,
};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use vm_memory::GuestAddress;

/// A page-aligned user address; what is there does not matter.
const HOST: usize = 0x10_0000_0000;
/// The id that probes use, out of the way of the random ones.
const PROBE: SlotId = SlotId(100);

fn kvm() -> Kvm {
    Kvm::new().expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out")
}

fn vm() -> VmFd {
    kvm().create_vm().unwrap()
}

/// A guest_memfd of the host's KVM.
struct File {
    fd: OwnedFd,
    pages: u64,
}

impl File {
    fn range(&self, offset: u64) -> GuestMemfdRange {
        GuestMemfdRange {
            fd: self.fd.as_raw_fd(),
            offset,
            file_size: self.pages * PAGE_SIZE,
        }
    }
}

/// Two small files, of a VM that can have them.
fn files(vm: &VmFd) -> Vec<File> {
    let file = |pages| File {
        fd: SetMemoryRegion::create_guest_memfd(vm, pages * PAGE_SIZE).unwrap(),
        pages,
    };
    match vm.has_guest_memfd() {
        true => vec![file(16), file(5)],
        false => Vec::new(),
    }
}

fn ask(vm: &VmFd, request: &MemoryRegion) -> Result<(), i32> {
    // SAFETY: the VM has no vCPU, so nothing uses the memory that a slot names.
    unsafe { vm.set_memory_region(request) }.map_err(|Errno(errno)| errno)
}

/// Whether KVM makes a one-page slot there (it is deleted again).
fn probe(vm: &VmFd, gfn: Gfn) -> Result<(), i32> {
    let start = gfn.address().unwrap();
    let request = MemoryRegion {
        id: PROBE,
        flags: SlotFlags::NONE,
        start,
        size: PAGE_SIZE,
        host: Hva(HOST),
        guest_memfd: None,
    };
    ask(vm, &request)?;
    ask(vm, &MemoryRegion { size: 0, ..request })
}

/// What the host can do: slots, and the last frame, found by asking.
fn limits(vm: &VmFd) -> Limits {
    let slots = u32::try_from(vm.max_slots()).unwrap();
    let bits = (32..=52)
        .take_while(|bits| probe(vm, Gfn((1 << (bits - PAGE_SHIFT)) - 1)).is_ok())
        .last()
        .unwrap();
    Limits {
        last_gfn: Gfn((1 << (bits - PAGE_SHIFT)) - 1),
        guest_memfd: vm.has_guest_memfd(),
        ..Limits::new(slots)
    }
}

/// xorshift64*: reproducible, and good enough to mix cases.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, chance: u64) -> bool {
        self.below(chance) == 0
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Mostly legal, or nearly.
    fn request(&mut self, slots: &SlotMap, files: &[File]) -> MemoryRegion {
        let limits = *slots.limits();
        let id = SlotId(self.below(8) as u32);
        let mut request = MemoryRegion {
            id,
            flags: SlotFlags::from_bits(self.of(&[0, 0, 0, 1, 1, 2, 3])),
            start: GuestAddress(self.below(64) * PAGE_SIZE),
            size: self.of(&[0, 1, 1, 2, 3, 4, 8]) * PAGE_SIZE,
            host: Hva(HOST + self.below(3) as usize * 0x10_0000),
            guest_memfd: None,
        };
        // Often a change of what is there, or moves and flag changes would be rare.
        if let Some(old) = slots.get(id)
            && !self.one_in(3)
        {
            (request.size, request.host) = (old.size, old.host);
            if self.one_in(2) {
                request.start = old.start;
            }
            if self.one_in(2) {
                request.flags = old.flags.with(SlotFlags::LOG_DIRTY_PAGES, self.one_in(2));
            }
        }
        match files {
            [] if self.one_in(50) => request.flags = request.flags | SlotFlags::GUEST_MEMFD,
            [] => {}
            files if self.one_in(3) => {
                let file = &files[self.below(files.len() as u64) as usize];
                let page = self.below(file.pages + 2);
                // Mostly for an id that is free: of a slot that is there, KVM looks at no file.
                let free = (0..8).map(SlotId).find(|id| slots.get(*id).is_none());
                if let Some(id) = free.filter(|_| !self.one_in(3)) {
                    request.id = id;
                    request.size = (1 + self.below(4)) * PAGE_SIZE;
                }
                request.guest_memfd = Some(file.range(page * PAGE_SIZE));
                // Without the flag the newer call looks at none of it.
                request.flags = SlotFlags::from_bits(self.of(&[4, 4, 4, 4, 4, 4, 5, 6, 0, 1]));
            }
            // With the flag and without the file: the older call.
            _ if self.one_in(50) => request.flags = request.flags | SlotFlags::GUEST_MEMFD,
            _ => {}
        }
        if self.one_in(6) {
            self.spoil(&mut request, &limits);
        }
        if let (Some(memory), true) = (&mut request.guest_memfd, self.one_in(12)) {
            memory.offset = self.of(&[1, 0x800, 1 << 63, !0xfff, 1 << 40, 3 << 62]);
        }
        request
    }

    /// One number of the request becomes a special one.
    fn spoil(&mut self, request: &mut MemoryRegion, limits: &Limits) {
        let bit = 1 << self.below(12);
        match self.below(9) {
            0 => request.flags = SlotFlags::from_bits(self.of(&[4, 5, 8, 1 << 31, u32::MAX])),
            1 => request.start = GuestAddress(request.start.0 | bit),
            2 => request.size |= bit,
            3 => request.host = Hva(request.host.0 | bit as usize),
            4 => request.host = Hva(self.of(&[1 << 63, 0xffff_8880_0000_0000, !0xfffusize])),
            5 => {
                request.id = SlotId(self.of(&[
                    limits.slots - 1,
                    limits.slots,
                    0x7fff,
                    0xffff,
                    0x5_0000,
                    u32::MAX,
                ]))
            }
            6 => request.start = GuestAddress(!0xfff & !(self.below(4) << 12)),
            7 => request.start = GuestAddress((limits.last_gfn.0 - self.below(8)) << PAGE_SHIFT),
            _ => request.size = self.of(&[MAX_PAGES + 1, 1 << 40, u64::MAX >> 12]) << PAGE_SHIFT,
        }
    }
}

fn compare_layouts(vm: &VmFd, slots: &SlotMap, files: &[File]) {
    for page in 0..80 {
        let inside = |start: u64, size: u64| (start..start + size).contains(&(page << PAGE_SHIFT));
        let taken = slots
            .iter()
            .any(|(_, shape)| inside(shape.start.0, shape.size));
        let expected = if taken { Err(libc::EEXIST) } else { Ok(()) };
        assert_eq!(probe(vm, Gfn(page)), expected, "page {page:#x}");
    }
    for id in (0..8).map(SlotId) {
        // One word for each 64 pages, and no slot here has more.
        let log = vm.get_dirty_log(id.0, 64 * PAGE_SIZE as usize);
        let logs = slots
            .get(id)
            .is_some_and(|shape| shape.flags.contains(SlotFlags::LOG_DIRTY_PAGES));
        let expected = if logs { Ok(()) } else { Err(libc::ENOENT) };
        assert_eq!(
            log.map(drop).map_err(|error| error.errno()),
            expected,
            "{id}'s dirty log"
        );
    }
    for file in files {
        for page in 0..file.pages {
            let offset = page * PAGE_SIZE;
            let bound = slots.iter().any(|(_, shape)| {
                shape.guest_memfd.is_some_and(|memory| {
                    memory.fd == file.fd.as_raw_fd()
                        && (memory.offset..memory.offset + shape.size).contains(&offset)
                })
            });
            let request = MemoryRegion {
                id: PROBE,
                flags: SlotFlags::GUEST_MEMFD,
                start: GuestAddress(1 << 30),
                size: PAGE_SIZE,
                host: Hva(HOST),
                guest_memfd: Some(file.range(offset)),
            };
            let expected = if bound { Err(libc::EINVAL) } else { Ok(()) };
            assert_eq!(ask(vm, &request), expected, "page {page} of a guest_memfd");
            if !bound {
                let deletion = MemoryRegion {
                    size: 0,
                    flags: SlotFlags::NONE,
                    guest_memfd: None,
                    ..request
                };
                ask(vm, &deletion).unwrap();
            }
        }
    }
}

/// So many random requests to this VM and to the classifier.
fn same_verdicts(vm: &VmFd, count: usize) {
    let limits = limits(vm);
    let files = files(vm);
    let mut slots = SlotMap::new(limits);
    let mut random = Random(0x5eed_0001);
    let mut seen = BTreeMap::new();
    let mut private = BTreeMap::new();
    for number in 0..count {
        let request = random.request(&slots, &files);
        let answer = slots.apply(&request);
        let verdict = answer.map_err(|refusal| refusal.errno());
        let kvm = ask(vm, &request);
        assert_eq!(
            kvm,
            verdict.map(drop),
            "request {number}: {request:?}, with {slots:?}"
        );
        *seen.entry(format!("{verdict:?}")).or_insert(0) += 1;
        if request.guest_memfd.is_some() {
            // Which refusal, in a word.
            let why = match answer {
                Ok(change) => format!("{change:?}"),
                Err(Refusal::GuestMemfdBound { .. }) => "bound already".into(),
                Err(Refusal::GuestMemfdRange { .. }) => "beyond the file".into(),
                Err(Refusal::GuestMemfdFixed { .. }) => "fixed".into(),
                Err(Refusal::Flags { .. }) => "flags".into(),
                Err(Refusal::Unaligned { .. }) => "unaligned".into(),
                Err(_) => "other".into(),
            };
            *private.entry(why).or_insert(0) += 1;
        }
        if number % 1000 == 0 {
            compare_layouts(vm, &slots, &files);
        }
    }
    compare_layouts(vm, &slots, &files);
    println!(
        "{count} requests, last frame {:#x}: {seen:?}; with a guest_memfd: {private:?}",
        limits.last_gfn.0
    );
    let verdicts = [
        Ok(Change::Create),
        Ok(Change::Delete),
        Ok(Change::Move),
        Ok(Change::FlagsOnly),
        Ok(Change::Nothing),
    ];
    let of_all = verdicts
        .into_iter()
        .chain([Err(libc::EINVAL), Err(libc::EEXIST)]);
    for verdict in of_all.map(|verdict| format!("{verdict:?}")) {
        let times = seen.get(&verdict).copied().unwrap_or(0);
        let text = "came up only so many times: the requests are too dull";
        assert!(times * 200 > count, "{verdict} {text}: {times}");
    }
    if !files.is_empty() {
        for what in [
            "Create",
            "bound already",
            "beyond the file",
            "fixed",
            "flags",
            "unaligned",
        ] {
            let times = private.get(what).copied().unwrap_or(0);
            assert!(times * 1000 > count, "{what} came up only {times} times");
        }
    }
    // What the model has, KVM has, and no more.
    for id in (0..limits.slots)
        .map(SlotId)
        .take(200)
        .chain([SlotId(limits.slots - 1)])
    {
        let expected = if slots.get(id).is_some() {
            Ok(())
        } else {
            Err(libc::EINVAL)
        };
        let deletion = MemoryRegion {
            id,
            flags: SlotFlags::NONE,
            start: GuestAddress(0),
            size: 0,
            host: Hva(0),
            guest_memfd: None,
        };
        assert_eq!(ask(vm, &deletion), expected, "{id}");
    }
}

fn count() -> usize {
    match std::env::var_os("LONG_TESTS") {
        Some(_) => 200_000,
        None => 6_000,
    }
}

#[test]
fn kvm_gives_the_verdicts_that_the_classifier_gives() {
    same_verdicts(&vm(), count());
}

/// Some kernels give guest_memfds to VMs of certain types only; software-protected ones need no hardware.
#[test]
fn kvm_gives_the_same_verdicts_for_a_protected_vm() {
    const KVM_X86_SW_PROTECTED_VM: u64 = 1;
    match kvm().create_vm_with_type(KVM_X86_SW_PROTECTED_VM) {
        Ok(vm) => same_verdicts(&vm, count() / 4),
        Err(error) => println!("this host makes no software-protected VM: {error}"),
    }
}

#[test]
fn a_host_says_what_it_lacks_and_has_what_it_says() {
    let memslots = memslots::Memslots::new(std::sync::Arc::new(vm()));
    let size = 4 * PAGE_SIZE;
    let new = |start| memslots::NewSlot {
        start: GuestAddress(start),
        backing: memslots::Backing::anonymous(size),
        flags: SlotFlags::NONE,
    };
    match memslots.create_guest_memfd(2 * size) {
        Ok(file) => {
            assert!(vm().has_guest_memfd());
            let private = [
                new(0).with_guest_memfd(&file, 0),
                new(1 << 20).with_guest_memfd(&file, size),
            ];
            let mut slots = memslots.create_all(private).unwrap();
            slots[0].relocate(GuestAddress(1 << 30)).unwrap_err();
            slots[0].set_flags(SlotFlags::LOG_DIRTY_PAGES).unwrap_err();
            slots[0].set_flags(SlotFlags::NONE).unwrap().wait();
            // Bound again, elsewhere, once it is free.
            drop(slots);
            let layout: memslots::Layout = [new(1 << 30).with_guest_memfd(&file, 0)]
                .into_iter()
                .collect();
            memslots.set_layout(&layout).unwrap();
            memslots.set_layout(&memslots::Layout::new()).unwrap();
        }
        Err(error) => {
            assert!(!vm().has_guest_memfd(), "{error}");
            assert!(matches!(error, memslots::Error::NoGuestMemfd), "{error}");
            println!("{error}");
        }
    }
    // With or without: what has no private memory works the same.
    drop(memslots.create_all([new(0)]).unwrap());
}

#[test]
fn as_many_slots_as_the_host_promises_fit_and_one_more_is_refused_unasked() {
    // A few hundred by default: the last ids are what matters, and those are tried by the test above.
    let long = std::env::var_os("LONG_TESTS").is_some();
    let memslots = memslots::Memslots::new(std::sync::Arc::new(vm()));
    let count = if long { memslots.limit() } else { 512 };
    let new = |index: u32| memslots::NewSlot {
        start: GuestAddress(u64::from(index) * 2 * PAGE_SIZE),
        backing: memslots::Backing::anonymous(PAGE_SIZE),
        flags: SlotFlags::NONE,
    };
    let slots = memslots.create_all((0..count).map(new)).unwrap();
    assert_eq!(memslots.snapshot().regions().len(), count as usize);
    if long {
        let error = memslots.create_all([new(count)]).unwrap_err();
        assert!(matches!(error, memslots::Error::NoFreeId { .. }), "{error}");
    }
    // The VM goes first here, or each deletion would be an ioctl.
    slots.into_iter().for_each(|slot| drop(slot.keep()));
    std::mem::forget(memslots);
}
