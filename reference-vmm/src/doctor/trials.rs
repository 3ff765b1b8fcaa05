// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is checked, crate by crate: each function builds a VM, has the guest use one thing, compares
//! what came of it with what should have, and returns the time that the thing took.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use async_pf::{FaultAnswer, Fetched, Outcome, PageSource, Schedule, SourceError};
use dirty_log::{DirtyLog, KvmBitmap};
use io_bus::{IoEvent, IoEventAddress, IoEventFd, WriteLength, WriteMatch};
use irq_routing::{Arrival, Msi};
use kvm_bindings as kvm;
use memslots::uffd::{Event, Features, FillRole, Messages, Modes, OpError, Uffd, Wake};
use memslots::{Backing, Gfn, HugePages, Hva, PAGE_SIZE, SlotExtent, SlotFlags};
use vm_device::bus::{
    MmioAddress, MmioAddressOffset, MmioRange, PioAddress, PioAddressOffset, PioRange,
};
use vm_device::{DeviceMmio, DevicePio};
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::checks::{Checked, LIMIT, Trouble};
use super::guest::{Guest, LOW_MEMORY, Order, READY, VECTOR};

/// One thing to check.
pub(super) struct Trial {
    /// The crate that it goes through.
    pub tries: &'static str,
    pub name: &'static str,
    /// What the time is the time of.
    pub measured: &'static str,
    pub run: fn(&Path) -> Checked,
}

macro_rules! trials {
    ($($krate:literal $name:literal $measured:literal $run:ident)*) => {
        &[$(Trial { tries: $krate, name: $name, measured: $measured, run: $run }),*]
    };
}

/// All of them, in the order of a machine's growth.
pub(super) const TRIALS: &[Trial] = trials! {
    "kvm-core" "vm" "from nothing to the guest's first word" vm
    "kvm-core" "pause" "bringing a busy vCPU out of the guest" pause
    "memslots" "slots" "making and removing 1 MiB under a running guest" slots
    "memslots" "guest_memfd" "making 1 MiB of one under a running guest" guest_memfd
    "io-bus" "pio" "a port access and back" pio
    "io-bus" "mmio" "an MMIO access and back" mmio
    "io-bus" "ioeventfd" "a write that KVM takes" ioeventfd
    "irq-routing" "irqfd" "from the eventfd to a busy guest's handler" irqfd
    "irq-routing" "msi" "from the ioctl to a busy guest's handler" msi
    "dirty-log" "dirty log" "a harvest of 4096 pages" dirty_log
    "async-pf" "page fault" "a page served by a thread, inside KVM_RUN" page_fault
};

fn expect<T: PartialEq + fmt::Debug>(what: &str, got: T, wanted: T) -> Result<(), Trouble> {
    if got == wanted {
        return Ok(());
    }
    Err(Trouble::Failed(format!(
        "{what}: {got:?} where {wanted:?} was expected"
    )))
}

/// A word of memory, to be shown as such.
#[derive(PartialEq)]
struct Hex(u32);

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// An address in the middle of the slot at 0 that the guest does not use.
const SCRATCH: u64 = 0x9000;

fn vm(kvm_path: &Path) -> Checked {
    let start = Instant::now();
    let guest = Guest::start(kvm_path)?;
    let said = guest.ask(Order::Write(SCRATCH, 3))?;
    let time = start.elapsed();
    expect("the guest's first word", said, 3)?;
    let value: u32 = guest.slots()?.snapshot().read_obj(GuestAddress(SCRATCH))?;
    expect("what the guest wrote", value, 1)?;
    Ok(time)
}

fn pause(kvm_path: &Path) -> Checked {
    let guest = Guest::start(kvm_path)?;
    guest.order(Order::WaitForInterrupt);
    expect("the guest's word", guest.answer()?, READY)?;
    let mut times = Vec::new();
    for _ in 0..10 {
        guest.is_running()?;
        let start = Instant::now();
        let pause = guest.vcpus().pause()?;
        times.push(start.elapsed());
        expect("vCPUs that run while paused", guest.vcpus().active(), 0)?;
        pause.resume();
    }
    // It has lost nothing: an interrupt still ends its wait.
    guest.routing()?.signal_msi(message())?;
    expect("the vector", guest.answer()?, VECTOR.into())?;
    Ok(median(times))
}

fn slots(kvm_path: &Path) -> Checked {
    const AT: u64 = 0x100_0000;
    let guest = Guest::start(kvm_path)?;
    let slots = guest.slots()?;
    let mut times = Vec::new();
    for round in 0..5_u32 {
        let start = Instant::now();
        let slot = slots.create(
            GuestAddress(AT),
            Backing::anonymous(1 << 20),
            SlotFlags::NONE,
        )?;
        let mut time = start.elapsed();
        expect("new memory", guest.ask(Order::Read(AT + 0xf_f000, 1))?, 0)?;
        slots
            .snapshot()
            .write_obj(0xcafe_0000 | round, GuestAddress(AT + 8))?;
        expect(
            "what the monitor wrote",
            guest.ask(Order::Read(AT + 8, 1))?,
            0xcafe_0000 | round,
        )?;
        guest.ask(Order::Write(AT + 0x5000, 2))?;
        let value: u32 = slots.snapshot().read_obj(GuestAddress(AT + 0x5000))?;
        expect("what the guest wrote", value, 1)?;
        let start = Instant::now();
        let grace = slot.remove().map_err(|error| Trouble::from(*error))?;
        grace.wait();
        time += start.elapsed();
        times.push(time);
        expect(
            "memory that is gone",
            guest.ask(Order::Read(AT + 8, 1))?,
            u32::MAX,
        )?;
    }
    Ok(median(times))
}

/// Memory of the VM's own, which the monitor maps as well.
fn guest_memfd(kvm_path: &Path) -> Checked {
    const AT: u64 = 0x100_0000;
    let guest = Guest::start(kvm_path)?;
    let slots = guest.slots()?;
    let start = Instant::now();
    let file = match slots.create_mappable_guest_memfd(1 << 20) {
        // Says what it takes.
        Err(error @ memslots::Error::NoMappableGuestMemfd) => {
            return Err(Trouble::Unavailable(error.to_string()));
        }
        file => file?,
    };
    let backing = Backing::guest_memfd(&file, 0, 1 << 20);
    let _slot = slots.create(GuestAddress(AT), backing, SlotFlags::NONE)?;
    let time = start.elapsed();
    let said = guest.ask(Order::Read(AT + 0xf_f000, 1))?;
    expect("new memory", said, 0)?;
    let memory = slots.snapshot();
    memory.write_obj(0xcafe_u32, GuestAddress(AT + 8))?;
    let said = guest.ask(Order::Read(AT + 8, 1))?;
    expect("what the monitor wrote", said, 0xcafe)?;
    guest.ask(Order::Write(AT + 0x5000, 2))?;
    let value: u32 = memory.read_obj(GuestAddress(AT + 0x5000))?;
    expect("what the guest wrote", value, 1)?;
    Ok(time)
}

/// Answers each read with its number.
struct Counter(std::sync::atomic::AtomicU32);

impl Counter {
    fn next(&self, data: &mut [u8]) {
        // Relaxed: one vCPU counts.
        let value = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        data.iter_mut()
            .zip(value.to_le_bytes())
            .for_each(|(byte, value)| *byte = value);
    }
}

impl DevicePio for Counter {
    fn pio_read(&self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
        self.next(data);
    }

    fn pio_write(&self, _: PioAddress, _: PioAddressOffset, _: &[u8]) {}
}

impl DeviceMmio for Counter {
    fn mmio_read(&self, _: MmioAddress, _: MmioAddressOffset, data: &mut [u8]) {
        self.next(data);
    }

    fn mmio_write(&self, _: MmioAddress, _: MmioAddressOffset, _: &[u8]) {}
}

const ACCESSES: u32 = 200;
const MMIO: u64 = 0xd000_0000;

fn pio(kvm_path: &Path) -> Checked {
    const PORT: u16 = 0x510;
    let guest = Guest::start(kvm_path)?;
    expect(
        "a port that nobody has",
        guest.ask(Order::ReadPort(PORT, 1))?,
        u32::MAX,
    )?;
    let range = PioRange::new(PioAddress(PORT), 4)?;
    let device = guest.bus()?.register_pio(range, Counter(0.into()))?;
    let start = Instant::now();
    expect(
        "the last read",
        guest.ask(Order::ReadPort(PORT, ACCESSES))?,
        ACCESSES,
    )?;
    let time = start.elapsed() / ACCESSES;
    drop(device);
    expect(
        "a port whose device is gone",
        guest.ask(Order::ReadPort(PORT, 1))?,
        u32::MAX,
    )?;
    Ok(time)
}

fn mmio(kvm_path: &Path) -> Checked {
    let guest = Guest::start(kvm_path)?;
    expect(
        "an address that nobody has",
        guest.ask(Order::Read(MMIO, 1))?,
        u32::MAX,
    )?;
    let range = MmioRange::new(MmioAddress(MMIO), 0x1000)?;
    let device = guest.bus()?.register_mmio(range, Counter(0.into()))?;
    let start = Instant::now();
    expect(
        "the last read",
        guest.ask(Order::Read(MMIO + 16, ACCESSES))?,
        ACCESSES,
    )?;
    let time = start.elapsed() / ACCESSES;
    drop(device);
    expect(
        "an address whose device is gone",
        guest.ask(Order::Read(MMIO, 1))?,
        u32::MAX,
    )?;
    Ok(time)
}

fn ioeventfd(kvm_path: &Path) -> Checked {
    let guest = Guest::start(kvm_path)?;
    guest.needs("IOEVENTFD", kvm::KVM_CAP_IOEVENTFD)?;
    let attach = |address, writes| -> Result<_, Trouble> {
        let address = IoEventAddress::Mmio(MmioAddress(address));
        let fd = EventFd::new(EFD_NONBLOCK)?;
        Ok(IoEventFd::attach(
            guest.fd()?.clone(),
            IoEvent { address, writes },
            fd,
        )?)
    };
    let all = attach(MMIO, WriteMatch::Length(WriteLength::Four))?;
    let start = Instant::now();
    expect(
        "writes made",
        guest.ask(Order::Write(MMIO, ACCESSES))?,
        ACCESSES,
    )?;
    let time = start.elapsed() / ACCESSES;
    expect(
        "writes counted",
        all.fd().read().unwrap_or(0),
        ACCESSES.into(),
    )?;

    // Of the writes 10, 9… 1 one is a 7.
    let seven = attach(MMIO + 8, WriteMatch::U32(7))?;
    guest.ask(Order::Write(MMIO + 8, 10))?;
    expect("writes of 7", seven.fd().read().unwrap_or(0), 1)?;
    let mut seven = seven;
    seven.detach()?;
    guest.ask(Order::Write(MMIO + 8, 10))?;
    expect(
        "writes of 7 after detaching",
        seven.fd().read().unwrap_or(0),
        0,
    )?;
    Ok(time)
}

/// [`VECTOR`], edge-triggered, to the local APIC 0 (Intel SDM volume 3, 12.11).
fn message() -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: VECTOR.into(),
        devid: None,
    }
}

/// Has the guest wait, raises, and takes the time until its handler says the vector.
fn interrupts(
    guest: &Guest,
    mut raise: impl FnMut() -> Result<(), Trouble>,
) -> Result<Duration, Trouble> {
    let mut times = Vec::new();
    for _ in 0..10 {
        guest.order(Order::WaitForInterrupt);
        expect("the guest's word", guest.answer()?, READY)?;
        let start = Instant::now();
        raise()?;
        let vector = guest.answer()?;
        times.push(start.elapsed());
        expect("the vector", vector, VECTOR.into())?;
    }
    Ok(median(times))
}

fn irqfd(kvm_path: &Path) -> Checked {
    let guest = Guest::start(kvm_path)?;
    guest.needs("IRQFD", kvm::KVM_CAP_IRQFD)?;
    let routing = guest.routing()?;
    let gsi = routing.allocate()?;
    let _ = routing.route(&gsi, message())?;
    let irqfd = routing.irqfd(&gsi)?;
    interrupts(&guest, || Ok(irqfd.trigger()?))
}

fn msi(kvm_path: &Path) -> Checked {
    let guest = Guest::start(kvm_path)?;
    guest.needs("SIGNAL_MSI", kvm::KVM_CAP_SIGNAL_MSI)?;
    let routing = guest.routing()?;
    interrupts(&guest, || {
        expect(
            "the message",
            routing.signal_msi(message())?,
            Arrival::Delivered { to: 1 },
        )
    })
}

fn dirty_log(kvm_path: &Path) -> Checked {
    const AT: u64 = 0x200_0000;
    let guest = Guest::start(kvm_path)?;
    let slots = guest.slots()?;
    let slot = slots.create(
        GuestAddress(AT),
        Backing::anonymous(4096 * PAGE_SIZE),
        SlotFlags::LOG_DIRTY_PAGES,
    )?;
    let memory = slots.snapshot();
    let region = memory
        .by_id(slot.extent().id())
        .ok_or_else(|| Trouble::Failed("the slot is not in the table".into()))?;
    let ours = region.bitmap().log();
    ours.start()?;
    let kvms = KvmBitmap::new(guest.fd()?.clone(), slot.extent().clone())?;
    let mut log = DirtyLog::new(slot.extent().clone(), (kvms, ours))?;
    let at = |page: u64| AT + page * PAGE_SIZE;

    let by_guest = [0, 1, 2, 63, 64, 127, 700, 2048, 4095];
    for page in by_guest {
        guest.ask(Order::Write(at(page), 1))?;
    }
    memory.write_obj(1_u64, GuestAddress(at(500) - 4))?; // on both sides of a page's end
    let wanted: BTreeSet<u64> = by_guest.into_iter().chain([499, 500]).collect();

    let start = Instant::now();
    let harvest = log.harvest()?;
    let time = start.elapsed();
    drop(harvest); // which puts every page back
    let harvest = log.harvest()?;
    let got: BTreeSet<u64> = harvest
        .runs()
        .flat_map(|run| run.first..run.end())
        .collect();
    expect("the pages written", got, wanted)?;
    harvest.commit();
    guest.ask(Order::Write(at(9), 1))?;
    let harvest = log.harvest()?;
    let got: BTreeSet<u64> = harvest
        .runs()
        .flat_map(|run| run.first..run.end())
        .collect();
    expect("the pages written later", got, BTreeSet::from([9]))?;
    Ok(time)
}

/// Every other page is zeros, the rest say their number.
struct Pattern;

impl Pattern {
    fn word(gfn: Gfn) -> u32 {
        if gfn.0.is_multiple_of(2) {
            gfn.0 as u32 ^ 0x5a5a_0000
        } else {
            0
        }
    }
}

impl PageSource for Pattern {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let word = Self::word(first);
        if word == 0 {
            return Ok(Fetched::Zero);
        }
        into.chunks_mut(4).for_each(|chunk| {
            chunk
                .iter_mut()
                .zip(word.to_le_bytes())
                .for_each(|(byte, value)| *byte = value);
        });
        Ok(Fetched::Bytes)
    }
}

fn page_fault(kvm_path: &Path) -> Checked {
    const AT: u64 = 0x300_0000;
    const PAGES: u64 = 32;
    let guest = Guest::start(kvm_path)?;
    let uffd = Uffd::open(Features::NONE, Features::NONE)
        .map_err(|error| Trouble::Unavailable(super::coming::advice(&error)))?;
    let backing = Backing::anonymous(PAGES * PAGE_SIZE).huge_pages(HugePages::Never);
    let slot = guest
        .slots()?
        .create(GuestAddress(AT), backing, SlotFlags::NONE)?;
    let extent = slot.extent().clone();
    let snapshot = guest.slots()?.snapshot();
    let memory = snapshot
        .by_id(extent.id())
        .ok_or_else(|| io::Error::other("a slot that was just made is not there"))?
        .mapping();
    let registration = uffd
        .register_all(memory, Modes::MISSING)
        .map_err(io::Error::other)?;
    let role = registration.lend_fill().map_err(io::Error::other)?;
    let (tell, told) = mpsc::channel();
    // It ends by itself when every page is there or no fault comes for a while; its role goes with
    // it, and the registration, which is its own too: that wakes a vCPU that waits.
    thread::Builder::new()
        .name("doctor-pager".into())
        .spawn(move || {
            let served = serve(&uffd, &role, &extent);
            drop((role, registration));
            let _ = tell.send(served);
        })?;
    let mut times = Vec::new();
    for page in 0..PAGES {
        let address = AT + page * PAGE_SIZE;
        let start = Instant::now();
        let word = Hex(guest.ask(Order::Read(address, 1))?);
        times.push(start.elapsed());
        expect(
            "a served page",
            word,
            Hex(Pattern::word(Gfn(address / PAGE_SIZE))),
        )?;
    }
    let served = told.recv()??;
    expect("pages served", served, PAGES)?;
    // And once more, without a fault.
    let word = Hex(guest.ask(Order::ReadPages(AT, PAGES as u32))?);
    expect(
        "the last page",
        word,
        Hex(Pattern::word(Gfn(AT / PAGE_SIZE + PAGES - 1))),
    )?;
    Ok(median(times))
}

/// A pager: serves faults of the slot until all of it is there. Returns how many pages it served.
fn serve(uffd: &Uffd, role: &FillRole, slot: &SlotExtent) -> io::Result<u64> {
    let mut schedule: Schedule<()> = Schedule::for_slot(slot, 8).map_err(io::Error::other)?;
    let mut messages = Messages::with_capacity(8);
    let mut page = [0; PAGE_SIZE as usize];
    let kernel = |errno: memslots::Errno| io::Error::from_raw_os_error(errno.0);
    while !schedule.is_complete() {
        if !uffd.wait(Some(LIMIT / 10)).map_err(kernel)? {
            return Err(io::Error::other("no fault came"));
        }
        uffd.read(&mut messages).map_err(kernel)?;
        for event in &mut messages {
            let Event::Fault(fault) = event else {
                continue;
            };
            let gfn = gfn_of(slot, fault.address)?;
            if let FaultAnswer::Waiting { .. } =
                schedule.fault(gfn, ()).map_err(io::Error::other)?
            {
                place_all(&mut schedule, role, slot, &mut page)?;
            }
        }
    }
    Ok(schedule.present())
}

fn gfn_of(slot: &SlotExtent, address: Hva) -> io::Result<Gfn> {
    slot.guest_address(address)
        .map(Gfn::containing)
        .ok_or_else(|| io::Error::other(format!("a fault at {address}, outside the slot")))
}

/// Brings the pages whose turn it is.
fn place_all(
    schedule: &mut Schedule<()>,
    role: &FillRole,
    slot: &SlotExtent,
    page: &mut [u8; PAGE_SIZE as usize],
) -> io::Result<()> {
    while let Some(job) = schedule.start() {
        let fetched = Pattern.fetch(job.gfn, page).map_err(io::Error::other)?;
        let offset = slot
            .page_index(job.gfn)
            .map(|index| index * PAGE_SIZE)
            .ok_or_else(|| io::Error::other("a page outside the slot"))?;
        let placed: Result<(), OpError> = match fetched {
            Fetched::Bytes => role.copy(offset, page, Wake::Now),
            Fetched::Zero => role.zero(offset..offset + PAGE_SIZE, Wake::Now),
            other => return Err(io::Error::other(format!("the source says {other:?}"))),
        };
        placed.map_err(io::Error::other)?;
        let _woken = schedule
            .finish(job.gfn, Outcome::Arrived)
            .map_err(io::Error::other)?;
    }
    Ok(())
}

const _: () = assert!(SCRATCH < LOW_MEMORY);
