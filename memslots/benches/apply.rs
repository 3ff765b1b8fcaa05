// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a layout costs beside the system calls that it cannot do without, on the host's KVM, and what a change costs
//! that has nothing to do but to publish, on a host that costs nothing. `cargo bench -p memslots --bench apply`
//!
//! The other side of the comparison is a bare loop of the same system calls: one `mmap` with the same flags and size and
//! one `KVM_SET_USER_MEMORY_REGION` a slot, with no book kept. An `mmap` is no ioctl, but no layout goes without, so
//! both sides make it; the share of the ioctls alone is given too. Rounds of the two take turns, and the ratio is the
//! median of the rounds', so that what else the machine does meets both alike.

#![allow(
    missing_docs,
    reason = "criterion's macros make undocumented functions"
)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use memslots::fake::FakeHost;
use memslots::{Backing, Layout, Memslots, NewSlot, PAGE_SIZE, PrivateRanges, SlotFlags};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;

const SLOTS: u64 = 1000;
const SIZE: u64 = 4 * PAGE_SIZE;

fn slot(index: u64) -> NewSlot {
    NewSlot {
        start: GuestAddress(index * 2 * SIZE),
        backing: Backing::anonymous(SIZE),
        flags: SlotFlags::NONE,
    }
}

fn vm() -> Arc<VmFd> {
    let kvm = Kvm::new().expect("this bench needs /dev/kvm");
    Arc::new(kvm.create_vm().unwrap())
}

/// The system calls alone, and how long the ioctls of them took.
fn bare(vm: &VmFd, regions: &mut Vec<kvm_userspace_memory_region>) -> Duration {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    for index in 0..SLOTS {
        // SAFETY: a new mapping anywhere disturbs no other.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SIZE as usize,
                protection,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(host, libc::MAP_FAILED);
        regions.push(kvm_userspace_memory_region {
            slot: index as u32,
            flags: 0,
            guest_phys_addr: index * 2 * SIZE,
            memory_size: SIZE,
            userspace_addr: host as u64,
        });
    }
    let start = Instant::now();
    for region in regions {
        // SAFETY: the region is a mapping of its own, unmapped after the slot's deletion; the VM has no vCPU.
        unsafe { vm.set_user_memory_region(*region) }.unwrap();
    }
    start.elapsed()
}

fn undo(vm: &VmFd, regions: Vec<kvm_userspace_memory_region>) {
    for region in regions {
        let gone = kvm_userspace_memory_region {
            memory_size: 0,
            ..region
        };
        // SAFETY: a deletion.
        unsafe { vm.set_user_memory_region(gone) }.unwrap();
        // SAFETY: mapped by `bare`, and no slot's any more.
        unsafe { libc::munmap(region.userspace_addr as *mut libc::c_void, SIZE as usize) };
    }
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Rounds that take turns.
fn ratio(_: &mut Criterion) {
    let layout: Layout = (0..SLOTS).map(slot).collect();
    let (mut ratios, mut theirs, mut ours, mut ioctls) = (vec![], vec![], vec![], vec![]);
    for round in 0..61 {
        let mut time_bare = || {
            let (vm, mut regions) = (vm(), Vec::with_capacity(SLOTS as usize));
            let start = Instant::now();
            let of_ioctls = bare(&vm, &mut regions);
            let time = start.elapsed();
            undo(&vm, regions);
            ioctls.push(of_ioctls.as_secs_f64() * 1e6);
            time.as_secs_f64()
        };
        let time_layout = || {
            let memslots = Memslots::new(vm());
            let start = Instant::now();
            let applied = memslots.set_layout(&layout).unwrap();
            let time = start.elapsed();
            drop(black_box(applied));
            time.as_secs_f64()
        };
        let (bare, layout) = if round % 2 == 0 {
            let bare = time_bare();
            (bare, time_layout())
        } else {
            let layout = time_layout();
            (time_bare(), layout)
        };
        ratios.push(layout / bare);
        theirs.push(bare * 1e6);
        ours.push(layout * 1e6);
    }
    println!(
        "a layout of {SLOTS} slots: {:.0} us, the same mmaps and ioctls bare: {:.0} us (ioctls alone {:.0} us); \
         median ratio of 61 rounds {:.3}",
        median(ours),
        median(theirs),
        median(ioctls),
        median(ratios)
    );
}

fn layouts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a layout of 1,000 slots, KVM");
    let layout: Layout = (0..SLOTS).map(slot).collect();
    group.bench_function("planned again, nothing to do", |bench| {
        let memslots = Memslots::new(vm());
        memslots.set_layout(&layout).unwrap();
        bench.iter(|| black_box(memslots.plan(&layout).unwrap().is_empty()));
    });
    group.finish();
}

/// On a host that costs nothing: what is left is the book, the plan and the publication.
fn publication(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one slot made and deleted beside others, no KVM");
    for count in [16u64, 1000, 32_000] {
        let memslots = Memslots::<()>::with_policy(FakeHost::new(32_764), PrivateRanges::none());
        let layout: Layout = (0..count).map(slot).collect();
        memslots.set_layout(&layout).unwrap();
        group.bench_function(BenchmarkId::new("create, drop", count), |bench| {
            bench.iter(|| drop(memslots.create_all([slot(count)]).unwrap()));
        });
        let more = layout.clone().with(slot(count));
        group.bench_function(BenchmarkId::new("set_layout twice", count), |bench| {
            bench.iter(|| {
                memslots.set_layout(&more).unwrap();
                memslots.set_layout(&layout).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, ratio, layouts, publication);
criterion_main!(benches);
