// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel is the oracle: a guest writes pages that the test chooses, the VMM writes others, and
//! each harvest is exactly what was written since the one before.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use dirty_log::{DirtyLog, DirtySource, Error, HostWrites, KvmBitmap, PAGE_SIZE};
use guests::{PAGE_WRITER_PORT, PAGE_WRITER_STOP, page_writer};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memslots::{Backing, Hva, Memslots, PrivateRanges, SlotExtent, SlotFlags, SlotId};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

const CODE: u64 = 0x1000;

struct Guest {
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap<HostWrites>,
    writes: HostWrites,
    pages: u64,
}

impl Guest {
    /// One logged slot of `pages` pages at 0, one vCPU in flat 32-bit mode at the page writer.
    fn new(pages: u64) -> Self {
        let kvm = Kvm::new().expect("these tests need /dev/kvm, readable and writable");
        let vm = Arc::new(kvm.create_vm().unwrap());
        let writes = HostWrites::new(pages).unwrap();
        let region =
            MmapRegionBuilder::new_with_bitmap((pages * PAGE_SIZE) as usize, writes.clone())
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
                .unwrap();
        let host = region.as_ptr() as u64;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        memory
            .write_slice(page_writer(), GuestAddress(CODE))
            .unwrap();
        // SAFETY: the memory lives in the same struct as the VM and its vCPU, which alone runs it.
        unsafe {
            vm.set_user_memory_region(kvm_userspace_memory_region {
                slot: 0,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr: 0,
                memory_size: pages * PAGE_SIZE,
                userspace_addr: host,
            })
            .unwrap();
        }
        vm.set_tss_address(0xfffb_d000).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        common::flat_32_bit(&vcpu);
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs).unwrap();
        Self {
            vcpu,
            vm,
            memory,
            writes,
            pages,
        }
    }

    fn extent(&self) -> SlotExtent {
        let host = Hva(self.memory.iter().next().unwrap().as_ptr() as usize);
        // SAFETY: this is slot 0 as it was made above; it is not changed.
        unsafe {
            SlotExtent::new(SlotId(0), GuestAddress(0), self.pages * PAGE_SIZE, host).unwrap()
        }
    }

    /// Lets the guest write one byte in each of the pages, in this order.
    fn write_pages(&mut self, pages: impl IntoIterator<Item = u64>) {
        let mut orders = pages
            .into_iter()
            .map(|page| (page * PAGE_SIZE) as u32 + 0x123);
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoIn(PAGE_WRITER_PORT, data) => {
                    let order = orders.next().unwrap_or(PAGE_WRITER_STOP);
                    data.copy_from_slice(&order.to_le_bytes());
                }
                VcpuExit::Hlt => return,
                other => panic!("{other:?}"),
            }
        }
    }
}

/// xorshift64*: the sequence is the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

fn harvested<S: DirtySource>(log: &mut DirtyLog<S>) -> BTreeSet<u64> {
    let harvest = log.harvest().unwrap();
    let pages = harvest
        .gfns()
        .flat_map(|run| run.start.0..run.end.0)
        .collect();
    harvest.commit();
    pages
}

#[test]
fn a_harvest_is_exactly_what_the_guest_and_the_vmm_wrote() {
    let mut guest = Guest::new(16 << 8 | 5); // 16 MiB, and a last word that is partly used
    let kvm = KvmBitmap::new(guest.vm.clone(), guest.extent()).unwrap();
    let mut log = DirtyLog::new(guest.extent(), (kvm, guest.writes.clone())).unwrap();
    guest.write_pages([]);
    harvested(&mut log); // what loading the guest wrote

    let mut random = Random(0x1234_5678_9abc_def1);
    let rounds = if std::env::var_os("LONG_TESTS").is_some() {
        5000
    } else {
        200
    };
    for round in 0..rounds {
        let mut wrote = BTreeSet::new();
        let lone: Vec<u64> = (0..random.below(12))
            .map(|_| random.below(guest.pages))
            .collect();
        let start = random.below(guest.pages);
        let stretch: Vec<u64> = (start..guest.pages.min(start + random.below(150))).collect();
        // The guest's own page of code stays as it is.
        let by_guest: Vec<u64> = lone
            .into_iter()
            .chain(stretch)
            .filter(|page| *page != CODE / PAGE_SIZE)
            .collect();
        wrote.extend(&by_guest);
        guest.write_pages(by_guest);
        for _ in 0..random.below(4) {
            let (first, count) = (2 + random.below(guest.pages - 40), random.below(30));
            let bytes = vec![round as u8; (count * PAGE_SIZE + 1) as usize];
            guest
                .memory
                .write_slice(&bytes, GuestAddress(first * PAGE_SIZE + 7))
                .unwrap();
            wrote.extend(first..=first + count);
        }
        assert_eq!(harvested(&mut log), wrote, "round {round}");
    }
    assert!(log.harvest().unwrap().bitmap().is_clean());
}

#[test]
fn a_dropped_harvest_and_the_next_one_together_miss_nothing() {
    let mut guest = Guest::new(1024);
    let kvm = KvmBitmap::new(guest.vm.clone(), guest.extent()).unwrap();
    let mut log = DirtyLog::new(guest.extent(), kvm).unwrap();
    guest.write_pages([]);
    harvested(&mut log);

    guest.write_pages([100, 101, 900]);
    drop(log.harvest().unwrap());
    guest.write_pages([101, 102]);
    let mut harvest = log.harvest().unwrap();
    let runs: Vec<_> = harvest.runs().map(|run| (run.first, run.pages)).collect();
    assert_eq!(runs, [(100, 3), (900, 1)]);
    harvest.forget(harvest.runs().next().unwrap()).unwrap();
    drop(harvest);
    assert_eq!(harvested(&mut log), BTreeSet::from([900]));
}

#[test]
fn a_slot_that_is_larger_than_its_extent_says_overruns_nothing() {
    let mut guest = Guest::new(4096 * 16);
    let truth = guest.extent();
    // SAFETY: it is not: this is the mistake that the buffer's guard is for.
    let lie = unsafe {
        SlotExtent::new(
            SlotId(0),
            GuestAddress(0),
            64 * PAGE_SIZE,
            truth.host_start(),
        )
        .unwrap()
    };
    let mut log = DirtyLog::new(lie.clone(), KvmBitmap::new(&*guest.vm, lie).unwrap()).unwrap();
    match log.harvest() {
        Err(Error::GetDirtyLog {
            slot: SlotId(0),
            source,
        }) => {
            assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        log.pending().count(),
        64,
        "what may have been forgotten counts as dirty"
    );
    drop(log);
    guest.write_pages([9]);
}

#[test]
fn a_slot_that_does_not_log_or_does_not_exist_is_an_error_with_its_number() {
    let guest = Guest::new(64);
    let host = guest.extent().host_start();
    // SAFETY: the VM has no slot 7.
    let missing =
        unsafe { SlotExtent::new(SlotId(7), GuestAddress(0), 64 * PAGE_SIZE, host).unwrap() };
    let mut log = DirtyLog::new(
        missing.clone(),
        KvmBitmap::new(&*guest.vm, missing).unwrap(),
    )
    .unwrap();
    let error = log.harvest().unwrap_err();
    assert!(
        error.to_string().starts_with("KVM_GET_DIRTY_LOG of slot 7"),
        "{error}"
    );
    assert!(log.pending().is_clean());
}

#[test]
fn a_slot_of_memslots_brings_its_own_log_of_the_vmms_writes() {
    let kvm = Kvm::new().expect("these tests need /dev/kvm, readable and writable");
    let vm = Arc::new(kvm.create_vm().unwrap());
    let slots = Memslots::<HostWrites>::with_policy(vm.clone(), PrivateRanges::x86());
    let backing = Backing::anonymous(300 * PAGE_SIZE);
    let slot = slots
        .create(GuestAddress(0x10_0000), backing, SlotFlags::LOG_DIRTY_PAGES)
        .unwrap();
    let memory = slots.snapshot();
    let writes = memory.by_id(slot.extent().id()).unwrap().bitmap().log();
    memory.write_slice(&[1], GuestAddress(0x10_0000)).unwrap();
    writes.start().unwrap();
    let kvm = KvmBitmap::new(vm, slot.extent().clone()).unwrap();
    let mut log = DirtyLog::new(slot.extent().clone(), (kvm, writes)).unwrap();
    memory
        .write_slice(&[1; 0x1001], GuestAddress(0x11_0000))
        .unwrap();
    assert_eq!(harvested(&mut log), BTreeSet::from([0x110, 0x111]));
}
