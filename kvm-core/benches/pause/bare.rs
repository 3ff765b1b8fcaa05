// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The floor: a counted barrier of two futexes around `KVM_RUN`, with the signals and ioctls that a pause
//! takes and no other. It can do nothing else: no request, no exit, no vCPU that leaves.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use kvm_core::{KickSignal, Vcpu};

use super::Entries;

const KVM_RUN: libc::c_ulong = 0xae80;
const KVM_KVMCLOCK_CTRL: libc::c_ulong = 0xaead;

#[derive(Default)]
struct Barrier {
    parked: AtomicU32,
    /// Raised to let go.
    generation: AtomicU32,
    stopping: AtomicBool,
}

pub struct Bare {
    barrier: Arc<Barrier>,
    /// Each vCPU's thread and `immediate_exit`.
    vcpus: Vec<(i32, &'static AtomicU8)>,
    threads: Vec<JoinHandle<()>>,
    signal: i32,
}

impl Bare {
    pub fn start(vcpus: Vec<Vcpu>, entries: &Arc<Entries>) -> Self {
        let signal = KickSignal::first_real_time().unwrap().number();
        let barrier = Arc::new(Barrier::default());
        let all = vcpus.len() as u32;
        let (mut handles, mut threads) = (Vec::new(), Vec::new());
        for vcpu in vcpus {
            let immediate_exit = immediate_exit(vcpu.fd().as_raw_fd());
            let thread = Arc::new(AtomicI32::new(0));
            let (barrier, entries, own) = (barrier.clone(), entries.clone(), thread.clone());
            threads.push(thread::spawn(move || {
                // SAFETY: only asks.
                own.store(unsafe { libc::gettid() }, Ordering::Release);
                run(&vcpu, immediate_exit, &barrier, all, &entries);
            }));
            while thread.load(Ordering::Acquire) == 0 {
                thread::yield_now();
            }
            handles.push((thread.load(Ordering::Relaxed), immediate_exit));
        }
        Self {
            barrier,
            vcpus: handles,
            threads,
            signal,
        }
    }

    pub fn pause(&self) {
        // SAFETY: only asks.
        let process = unsafe { libc::getpid() };
        for (thread, immediate_exit) in &self.vcpus {
            immediate_exit.store(1, Ordering::Relaxed);
            // SAFETY: a signal whose handler does nothing, to a thread of ours.
            unsafe { libc::syscall(libc::SYS_tgkill, process, *thread, self.signal) };
        }
        loop {
            let parked = self.barrier.parked.load(Ordering::Acquire);
            if parked == self.vcpus.len() as u32 {
                return;
            }
            wait(&self.barrier.parked, parked);
        }
    }

    pub fn resume(&self) {
        self.barrier.parked.store(0, Ordering::Relaxed);
        self.barrier.generation.fetch_add(1, Ordering::Release);
        wake_all(&self.barrier.generation);
    }

    pub fn stop(self) {
        self.pause();
        self.barrier.stopping.store(true, Ordering::Relaxed);
        self.resume();
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

fn run(vcpu: &Vcpu, immediate_exit: &AtomicU8, barrier: &Barrier, all: u32, entries: &Entries) {
    let fd = vcpu.fd().as_raw_fd();
    let mut last = None;
    while !barrier.stopping.load(Ordering::Relaxed) {
        entries.entering(&mut last);
        // SAFETY: KVM_RUN of a vCPU that nobody else runs; these guests exit for a kick alone.
        let run = unsafe { libc::ioctl(fd, KVM_RUN as _, 0 as libc::c_ulong) };
        assert_eq!(run, -1);
        immediate_exit.store(0, Ordering::Relaxed);
        let generation = barrier.generation.load(Ordering::Relaxed);
        // SAFETY: takes no argument. EINVAL: a guest without kvm-clock.
        unsafe { libc::ioctl(fd, KVM_KVMCLOCK_CTRL as _, 0 as libc::c_ulong) };
        if barrier.parked.fetch_add(1, Ordering::AcqRel) + 1 == all {
            wake_all(&barrier.parked);
        }
        while barrier.generation.load(Ordering::Acquire) == generation {
            wait(&barrier.generation, generation);
        }
    }
}

/// Byte 1 of the vCPU's `kvm_run`, mapped until the process ends.
fn immediate_exit(fd: RawFd) -> &'static AtomicU8 {
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing; the result is checked.
    let run = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    assert_ne!(run, libc::MAP_FAILED);
    // SAFETY: inside the mapping, which stays; only accessed atomically here.
    unsafe { AtomicU8::from_ptr(run.cast::<u8>().add(1)) }
}

fn wait(word: &AtomicU32, value: u32) {
    let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let no_limit = std::ptr::null::<libc::timespec>();
    // SAFETY: the word lives while we wait; it may come back for no reason, and callers look again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, no_limit) };
}

fn wake_all(word: &AtomicU32) {
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: only wakes.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, i32::MAX) };
}
