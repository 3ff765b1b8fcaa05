// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel is the oracle: the same random requests to the classifier and to the host's KVM, the same verdict each
//! time, and the same layout after (probed page by page: KVM cannot read slots back). No vCPU exists, so nothing is
//! ever read or written through the slots.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_ioctls::{Kvm, VmFd};
use memslots::{
    Change, Errno, Gfn, Hva, Limits, MAX_PAGES, MemoryRegion, PAGE_SHIFT, PAGE_SIZE,
    SetMemoryRegion, SlotFlags, SlotId, SlotMap,
};
use vm_memory::GuestAddress;

/// A page-aligned user address; what is there does not matter.
const HOST: usize = 0x10_0000_0000;
/// The id that probes use, out of the way of the random ones.
const PROBE: SlotId = SlotId(100);

fn vm() -> VmFd {
    let kvm = Kvm::new()
        .expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out");
    kvm.create_vm().unwrap()
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
    fn request(&mut self, slots: &SlotMap) -> MemoryRegion {
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
        if self.one_in(6) {
            self.spoil(&mut request, &limits);
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

fn compare_layouts(vm: &VmFd, slots: &SlotMap) {
    for page in 0..80 {
        let inside = |start: u64, size: u64| (start..start + size).contains(&(page << PAGE_SHIFT));
        let taken = slots
            .iter()
            .any(|(_, shape)| inside(shape.start.0, shape.size));
        let expected = if taken { Err(libc::EEXIST) } else { Ok(()) };
        assert_eq!(probe(vm, Gfn(page)), expected, "page {page:#x}");
    }
}

#[test]
fn kvm_gives_the_verdicts_that_the_classifier_gives() {
    let count = if std::env::var_os("LONG_TESTS").is_some() {
        100_000
    } else {
        20_000
    };
    let vm = vm();
    let limits = limits(&vm);
    let mut slots = SlotMap::new(limits);
    let mut random = Random(0x5eed_0001);
    let mut seen = std::collections::BTreeMap::new();
    for number in 0..count {
        let request = random.request(&slots);
        let verdict = slots.apply(&request).map_err(|refusal| refusal.errno());
        let kvm = ask(&vm, &request);
        assert_eq!(
            kvm,
            verdict.map(drop),
            "request {number}: {request:?}, with {slots:?}"
        );
        *seen.entry(format!("{verdict:?}")).or_insert(0) += 1;
        if number % 1000 == 0 {
            compare_layouts(&vm, &slots);
        }
    }
    compare_layouts(&vm, &slots);
    println!(
        "{count} requests, last frame {:#x}: {seen:?}",
        limits.last_gfn.0
    );
    let verdicts = [
        Ok(Change::Create),
        Ok(Change::Delete),
        Ok(Change::Move),
        Ok(Change::FlagsOnly),
        Ok(Change::Nothing),
    ];
    for verdict in verdicts
        .into_iter()
        .chain([Err(libc::EINVAL), Err(libc::EEXIST)])
    {
        let times = seen.get(&format!("{verdict:?}")).copied().unwrap_or(0);
        assert!(
            times * 100 > count,
            "{verdict:?} came up only {times} times: the requests are too dull"
        );
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
        assert_eq!(ask(&vm, &deletion), expected, "{id}");
    }
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
