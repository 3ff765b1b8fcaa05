// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What it costs to begin to log, of memory that a guest has written to the last page: the plain bitmap, manual protect,
//! manual protect with initially-set, the ring; by turns in one run. `cargo bench -p dirty-log --bench start [-- MIB]`, 8,192 MiB
//! unless said otherwise; in the lab by `cargo xtask lab --memory 3G -- target/release/deps/start-… 1024`.
//!
//! The guest writes each page before each start: a page that is protected already costs less.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout
)]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dirty_log::{
    DirtyLog, DirtyRings, DirtySource, KvmBitmap, KvmManualBitmap, LogChoice, LogInForce,
    MappedRing, PAGE_SIZE, RingSize,
};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memslots::{Backing, HugePages, Hva, Mapping, SlotExtent, SlotId};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const ROUNDS: usize = 5;

/// What is cleared at a time.
const PART: u64 = 64 << 20 >> 12;

const CODE: u64 = 0x1000;
const TABLES: u64 = 0x2000;
const LOW: usize = 0x10_0000;
const DATA: u64 = 1 << 32;
const SLOT: SlotId = SlotId(1);

/// Long mode; a byte to each of RCX pages from RDI on:
/// `1: mov [rdi], al; add rdi, 4096; dec rcx; jnz 1b; hlt`
const GUEST: [u8; 15] = [
    0x88, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xf2, 0xf4,
];

struct Machine {
    name: &'static str,
    in_force: LogInForce,
    rings: DirtyRings<Arc<VmFd>>,
    vm: Arc<VmFd>,
    vcpu: VcpuFd,
    _low: GuestMemoryMmap,
    data: Arc<Mapping>,
}

/// What a round came to.
#[derive(Default)]
struct Figures {
    start: Vec<Duration>,
    first_pass: Vec<Duration>,
    longest: Vec<Duration>,
}

impl Machine {
    fn new(name: &'static str, choice: LogChoice, data: &Arc<Mapping>) -> Self {
        let kvm = Kvm::new().expect("needs /dev/kvm, readable and writable");
        let vm = Arc::new(kvm.create_vm().unwrap());
        let in_force = choice.apply(&vm).unwrap();
        let rings = DirtyRings::new(vm.clone());
        vm.set_tss_address(0xfffb_d000).unwrap();
        let low: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LOW)]).unwrap();
        low.write_slice(&GUEST, GuestAddress(CODE)).unwrap();
        page_tables(&low, DATA + data.size());
        let host = low.get_host_address(GuestAddress(0)).unwrap() as u64;
        let vcpu = vm.create_vcpu(0).unwrap();
        if let LogInForce::Ring(size) = in_force {
            let ring = MappedRing::map(&vcpu, 0, size).unwrap();
            rings.add_vcpu(0, ring).unwrap();
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8000_0011, TABLES, 0x20);
        sregs.efer = 0x500;
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
        (sregs.cs.selector, sregs.cs.type_, sregs.cs.db, sregs.cs.l) = (8, 11, 0, 1);
        vcpu.set_sregs(&sregs).unwrap();
        let machine = Machine {
            name,
            in_force,
            rings,
            vm,
            vcpu,
            _low: low,
            data: data.clone(),
        };
        machine.region(0, 0, 0, LOW as u64, host);
        machine.log(false);
        machine
    }

    fn region(&self, slot: u32, flags: u32, at: u64, size: u64, host: u64) {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: at,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the memory lives in the machine, behind its VM.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    fn log(&self, on: bool) {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let host = self.data.host().0 as u64;
        self.region(SLOT.0, flags, DATA, self.data.size(), host);
    }

    /// The guest writes each page.
    fn write_all(&mut self) {
        self.vcpu
            .set_regs(&kvm_regs {
                rip: CODE,
                rflags: 2,
                rdi: DATA,
                rcx: self.data.size() / PAGE_SIZE,
                ..kvm_regs::default()
            })
            .unwrap();
        match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => {}
            other => println!("the guest did not halt: {other:?}"),
        }
        let regs = self.vcpu.get_regs().unwrap();
        assert_eq!(regs.rdi, DATA + self.data.size(), "it has written them all");
    }

    fn round(&mut self, figures: &mut Figures) {
        self.write_all();
        let (time, ()) = timed(|| self.log(true));
        figures.start.push(time);
        // SAFETY: this is the slot as `log` makes it, and it stays until the round ends.
        let extent = unsafe {
            SlotExtent::new(
                SLOT,
                GuestAddress(DATA),
                self.data.size(),
                Hva(self.data.host().0),
            )
        }
        .unwrap();
        let pages = self.data.size() / PAGE_SIZE;
        let source: Box<dyn DirtySource> = match self.in_force {
            LogInForce::Ring(_) => Box::new(self.rings.log(&extent).unwrap()),
            LogInForce::ManualProtect { .. } => {
                Box::new(KvmManualBitmap::new(self.vm.clone(), extent.clone()).unwrap())
            }
            _ => Box::new(KvmBitmap::new(self.vm.clone(), extent.clone()).unwrap()),
        };
        pass(DirtyLog::new(extent, source).unwrap(), pages, figures);
        self.log(false);
    }
}

/// The first pass over all: the look, and then part for part.
fn pass(mut log: DirtyLog<impl DirtySource>, pages: u64, figures: &mut Figures) {
    let mut longest = Duration::ZERO;
    let mut all = Duration::ZERO;
    let mut count = |time: Duration| {
        longest = longest.max(time);
        all += time;
    };
    let (time, parts) = timed(|| log.parts(PART));
    count(time);
    let mut parts = parts.unwrap();
    let mut found = 0;
    loop {
        let (time, part) = timed(|| parts.next_part());
        count(time);
        let Some(part) = part.unwrap() else {
            break;
        };
        found += part.count();
        part.commit();
    }
    assert!(found <= pages);
    figures.first_pass.push(all);
    figures.longest.push(longest);
}

fn timed<T>(run: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let value = run();
    (start.elapsed(), value)
}

/// All below `end` as it is, in pages of 2 MiB.
fn page_tables(low: &GuestMemoryMmap, end: u64) {
    let entry = |table: u64, index: u64, value: u64| {
        low.write_obj(value, GuestAddress(table + index * 8))
            .unwrap();
    };
    let (pointers, directories) = (TABLES + 0x1000, TABLES + 0x2000);
    entry(TABLES, 0, pointers | 3);
    for gib in 0..end.div_ceil(1 << 30) {
        let directory = directories + gib * 0x1000;
        entry(pointers, gib, directory | 3);
        for part in 0..512 {
            entry(directory, part, gib << 30 | part << 21 | 0x83);
        }
    }
}

/// The median, with the least and the greatest.
fn told(times: &mut [Duration]) -> String {
    times.sort();
    let millis = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
    format!(
        "{:.2} ms ({:.2} to {:.2})",
        millis(times.get(times.len() / 2)),
        millis(times.first()),
        millis(times.last())
    )
}

fn main() {
    let mib = std::env::args().find_map(|word| word.parse::<u64>().ok());
    let mib = mib.unwrap_or(8192);
    let backing = Backing::anonymous(mib << 20)
        .huge_pages(HugePages::Never)
        .prefault(NonZeroUsize::MIN);
    let data = Arc::new(Mapping::new(&backing, GuestAddress(DATA)).unwrap());
    let manual = |initially_set| LogChoice::ManualProtect { initially_set };
    let mut machines = [
        ("plain bitmap", LogChoice::Bitmap),
        ("manual protect", manual(false)),
        ("manual protect, initially-set", manual(true)),
        ("ring", LogChoice::Ring(RingSize::MAX)),
    ]
    .map(|(name, choice)| (Machine::new(name, choice, &data), Figures::default()));
    for _ in 0..ROUNDS {
        for (machine, figures) in &mut machines {
            machine.round(figures);
        }
    }
    println!("{mib} MiB, pages of 4 KiB, medians of {ROUNDS} (least to most)\n");
    println!("| | start | first pass, all calls | its longest call |\n| --- | --- | --- | --- |");
    for (machine, figures) in &mut machines {
        println!(
            "| {} | {} | {} | {} |",
            machine.name,
            told(&mut figures.start),
            told(&mut figures.first_pass),
            told(&mut figures.longest)
        );
    }
}
