// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What memory costs to have: mapping it, making it present, bringing a page; each beside the bare system calls.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use memslots::uffd::{Call, Features, Modes, Uffd, Wake};
use memslots::{Backing, HugePages, Mapping, PAGE_SIZE};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vm_memory::GuestAddress;

const SIZE: u64 = 64 << 20;
const P: u64 = PAGE_SIZE;

/// `mmap` and `munmap`, and nothing else.
fn bare(size: u64, more_flags: i32) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | more_flags;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping disturbs no other, and nobody has it when it goes.
    unsafe {
        let base = libc::mmap(
            std::ptr::null_mut(),
            size as usize,
            protection,
            flags,
            -1,
            0,
        );
        assert_ne!(base, libc::MAP_FAILED);
        libc::munmap(base, size as usize);
    }
}

fn map(c: &mut Criterion) {
    let mut group = c.benchmark_group("map and unmap 64 MiB");
    group.bench_function("bare mmap", |b| b.iter(|| bare(SIZE, 0)));
    let backings = [
        ("anonymous", Backing::anonymous(SIZE)),
        ("anonymous, guarded", Backing::anonymous(SIZE).guarded()),
        ("memfd", Backing::memfd(SIZE)),
        ("memfd, guarded", Backing::memfd(SIZE).guarded()),
    ];
    for (name, backing) in backings {
        group.bench_function(name, |b| {
            b.iter(|| Mapping::new(&backing, GuestAddress(0)).unwrap());
        });
    }
    group.finish();
}

fn prefault(c: &mut Criterion) {
    let mut group = c.benchmark_group("make 64 MiB of small pages present");
    group.sample_size(10);
    group.bench_function("bare mmap with MAP_POPULATE", |b| {
        b.iter(|| bare(SIZE, libc::MAP_POPULATE))
    });
    for threads in [1, 2] {
        let backing = Backing::anonymous(SIZE)
            .huge_pages(HugePages::Never)
            .prefault(NonZeroUsize::new(threads).unwrap());
        group.bench_function(BenchmarkId::new("prefault, threads", threads), |b| {
            b.iter(|| Mapping::new(&backing, GuestAddress(0)).unwrap());
        });
    }
    group.finish();
}

fn fill(c: &mut Criterion) {
    let uffd = Uffd::open(Features::NONE, Features::NONE).expect("a userfaultfd");
    let backing = Backing::anonymous(P).huge_pages(HugePages::Never);
    let memory = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
    let mut group = c.benchmark_group("userfaultfd");
    group.bench_function("register and unregister", |b| {
        b.iter(|| uffd.register_all(&memory, Modes::MISSING).unwrap());
    });
    let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    let role = registration.lend_fill().unwrap();
    let page = [1; P as usize];
    let give_back = || {
        // SAFETY: this bench's own memory.
        unsafe { libc::madvise(memory.host().0 as *mut _, P as usize, libc::MADV_DONTNEED) };
    };
    group.bench_function("a page, bare UFFDIO_COPY", |b| {
        b.iter_batched(
            give_back,
            |()| {
                let mut argument = [memory.host().0 as u64, page.as_ptr() as u64, P, 0, 0u64];
                let request = Call::Copy.request() as _;
                // SAFETY: the argument is as long as the request says, and names this bench's own memory.
                let result =
                    unsafe { libc::ioctl(uffd.as_raw_fd(), request, argument.as_mut_ptr()) };
                assert_eq!(result, 0);
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("a page, FillRole::copy", |b| {
        b.iter_batched(
            give_back,
            |()| role.copy(0, &page, Wake::Now).unwrap(),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, map, prefault, fill);
criterion_main!(benches);
