// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine whose guest writes pages that are known in advance, by itself and on several vCPUs.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use dirty_log::{DirtyRings, Error, HostWrites, LogChoice, LogInForce, MappedRing, PAGE_SIZE};
use guests::{page_sequence, page_sequence_step};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memslots::{Backing, Hva, Mapping, SlotExtent, SlotId};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the pages that are written begin; the code is below it, in a slot of its own.
pub const DATA: u64 = 0x100_0000;
const CODE: u64 = 0x1000;
/// A number that is not 0, for the log's slot is not the code's.
pub const SLOT: SlotId = SlotId(5);

pub fn long() -> bool {
    std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1")
}

/// xorshift64*: the sequence is the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

/// What a vCPU is to do: so many steps from a state.
#[derive(Clone, Copy)]
pub struct Order {
    pub state: u32,
    pub steps: u32,
}

impl Order {
    /// The pages that it writes.
    pub fn pages(self, pages: u64) -> BTreeSet<u64> {
        let mut state = self.state;
        let step = |_| {
            let (next, page) = page_sequence_step(state, pages as u32);
            state = next;
            u64::from(page)
        };
        (0..self.steps).map(step).collect()
    }
}

/// A vCPU's thread: orders in, "done" out.
struct Worker {
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

pub struct Machine {
    pub vm: Arc<VmFd>,
    pub in_force: LogInForce,
    pub rings: DirtyRings<Arc<VmFd>>,
    pub writes: HostWrites,
    pub pages: u64,
    pub data: Arc<Mapping>,
    _code: GuestMemoryMmap,
    workers: Vec<Worker>,
    done: Receiver<usize>,
    vcpus: Vec<VcpuFd>,
    send_done: Sender<usize>,
}

impl Machine {
    /// The VM, logging as chosen, with the data not installed yet and no vCPU. `pages` is a power of two.
    pub fn new(choice: LogChoice, pages: u64) -> Self {
        let kvm = Kvm::new().expect("these tests need /dev/kvm, readable and writable");
        let vm = Arc::new(kvm.create_vm().unwrap());
        let in_force = choice.apply(&vm).unwrap();
        let code: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        code.write_slice(page_sequence(), GuestAddress(CODE))
            .unwrap();
        let host = vm_memory::GuestMemoryBackend::get_host_address(&code, GuestAddress(0)).unwrap();
        let data =
            Mapping::new(&Backing::anonymous(pages * PAGE_SIZE), GuestAddress(DATA)).unwrap();
        // SAFETY: the memory lives in the machine, whose threads end before it does.
        unsafe { vm.set_user_memory_region(region(0, 0, 0, 0x1_0000, host as u64)) }.unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        let (send_done, done) = channel();
        Self {
            rings: DirtyRings::new(vm.clone()),
            vm,
            in_force,
            writes: HostWrites::new(pages).unwrap(),
            pages,
            data: Arc::new(data),
            _code: code,
            workers: Vec::new(),
            done,
            vcpus: Vec::new(),
            send_done,
        }
    }

    pub fn extent(&self) -> SlotExtent {
        let host = Hva(self.data.host().0);
        // SAFETY: this is the slot as `log_dirty_pages` makes it.
        unsafe { SlotExtent::new(SLOT, GuestAddress(DATA), self.pages * PAGE_SIZE, host).unwrap() }
    }

    /// Installs the data's slot, with or without its log.
    pub fn install(&self, log: bool) {
        let flags = if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let host = self.data.host().0 as u64;
        let slot = region(SLOT.0, flags, DATA, self.pages * PAGE_SIZE, host);
        // SAFETY: as above.
        unsafe { self.vm.set_user_memory_region(slot) }.unwrap();
    }

    /// Makes the vCPUs and, in a VM with rings, adds these; starts their threads.
    pub fn start(&mut self, vcpus: usize) {
        for number in 0..vcpus {
            let vcpu = self.vm.create_vcpu(number as u64).unwrap();
            flat_32_bit(&vcpu);
            if let LogInForce::Ring(size) = self.in_force {
                let ring = MappedRing::map(&vcpu, number as u32, size).unwrap();
                self.rings.add_vcpu(number as u32, ring).unwrap();
            }
            self.vcpus.push(vcpu);
        }
        for (number, mut vcpu) in self.vcpus.drain(..).enumerate() {
            let (orders, inbox) = channel::<Order>();
            let (rings, done, mask) = (self.rings.clone(), self.send_done.clone(), self.pages - 1);
            let thread = thread::spawn(move || {
                for order in inbox {
                    run(&mut vcpu, &rings, order, number as u64, mask);
                    if done.send(number).is_err() {
                        return;
                    }
                }
            });
            self.workers.push(Worker {
                orders,
                thread: Some(thread),
            });
        }
    }

    pub fn vcpus(&self) -> usize {
        self.workers.len()
    }

    /// Has each vCPU do its order; returns at once.
    pub fn give(&self, orders: &[Order]) {
        for (worker, order) in self.workers.iter().zip(orders) {
            worker.orders.send(*order).unwrap();
        }
    }

    /// How many vCPUs have finished since the last call.
    pub fn finished(&self) -> usize {
        self.done.try_iter().count()
    }

    /// Waits for one vCPU more.
    pub fn wait_one(&self) {
        self.done.recv().unwrap();
    }

    /// The VMM writes a page, as vm-memory does it: the data, then the mark.
    pub fn vmm_writes(&self, page: u64, value: u64) {
        let at = self.data.host().0 + (page * PAGE_SIZE) as usize + 2048;
        // SAFETY: the data are mapped; who else writes or reads there does it volatile or in the guest.
        unsafe { (at as *mut u64).write_volatile(value) };
        self.writes
            .mark_dirty((page * PAGE_SIZE) as usize + 2048, 8);
    }

    /// Copies a page as it is now.
    pub fn copy(&self, page: u64, into: &mut [u8]) {
        let at = (self.data.host().0 + (page * PAGE_SIZE) as usize) as *const u64;
        for (index, chunk) in into.chunks_exact_mut(8).enumerate() {
            // SAFETY: mapped, aligned, inside the page; the guest may write meanwhile, so volatile.
            let word = unsafe { at.add(index).read_volatile() };
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// All of the data, with everything stopped.
    pub fn contents(&self) -> &[u8] {
        // SAFETY: callers have waited for the vCPUs, and write nothing while they look.
        unsafe {
            std::slice::from_raw_parts(
                self.data.host().0 as *const u8,
                (self.pages * PAGE_SIZE) as usize,
            )
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.orders = channel().0;
            if let Some(thread) = worker.thread.take() {
                let ended = thread.join();
                if !thread::panicking() {
                    ended.unwrap();
                }
            }
        }
    }
}

fn region(slot: u32, flags: u32, at: u64, size: u64, host: u64) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: at,
        memory_size: size,
        userspace_addr: host,
    }
}

pub fn flat_32_bit(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr0 |= 1;
    for segment in [
        &mut sregs.cs,
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.ss,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 16);
        (segment.g, segment.db, segment.s, segment.present) = (1, 1, 1, 1);
        segment.type_ = 3;
    }
    (sregs.cs.selector, sregs.cs.type_) = (8, 11);
    vcpu.set_sregs(&sregs).unwrap();
}

fn run(vcpu: &mut VcpuFd, rings: &DirtyRings<Arc<VmFd>>, order: Order, number: u64, mask: u64) {
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rflags: 2,
        rsi: u64::from(order.state),
        rcx: u64::from(order.steps),
        rdi: DATA,
        rbp: mask,
        rbx: number * 8,
        ..Default::default()
    })
    .unwrap();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return,
            // KVM_EXIT_DIRTY_RING_FULL.
            Ok(VcpuExit::Unsupported(31)) => match rings.full(number as u32) {
                Ok(_) => {}
                Err(Error::RingStuck { .. }) => return,
                Err(error) => panic!("{error}"),
            },
            Err(error) if error.errno() == libc::EINTR => {}
            other => panic!("{other:?}"),
        }
    }
}
