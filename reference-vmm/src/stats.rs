// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest did, in numbers: what `--stats` shows at the end.
//!
//! A vCPU's exits are counted always: each thread adds to a line of its own, which costs a
//! nanosecond beside an exit's microseconds. Accesses by device are io-bus' own counters, which are
//! off unless [`Machine::count_accesses`](crate::vm::Machine::count_accesses) turns them on. KVM counts
//! for itself ([`kvm_stats`](crate::kvm_stats)).

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::SlotTable;
use io_bus::{BusKind, IoBus, IoRange};
use serde::Serialize;
use vm_memory::GuestAddress;

use crate::kvm_stats::KvmStats;
use crate::lazy::LazyStats;

/// What a vCPU came out of the guest for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// `in`, and `rep ins`: one however many bytes.
    PioIn,
    /// `out`, and `rep outs`.
    PioOut,
    /// A read of an address without memory.
    MmioRead,
    /// A write to an address without memory, or to memory that is read-only.
    MmioWrite,
    /// HLT, where the kernel has no local APIC for the guest.
    Hlt,
    /// Anything else.
    Other,
}

impl ExitKind {
    const COUNT: usize = 6;
}

/// The exits of one vCPU, counted by its thread.
///
/// On cache lines of its own: no other vCPU writes there.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ExitCounters {
    exits: [AtomicU64; ExitKind::COUNT],
    read_only_writes: AtomicU64,
    machine_checks: AtomicU64,
}

impl ExitCounters {
    /// Counts an exit. By the vCPU's own thread alone: nobody else writes, so no locked instruction
    /// is needed.
    pub fn count(&self, kind: ExitKind) {
        if let Some(counter) = self.exits.get(kind as usize) {
            // Relaxed: a counter orders nothing.
            counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    /// Counts a write to read-only memory, which was dropped.
    pub fn count_read_only_write(&self) {
        self.read_only_writes.fetch_add(1, Ordering::Relaxed);
    }

    /// How many such writes there were.
    pub fn read_only_writes(&self) -> u64 {
        self.read_only_writes.load(Ordering::Relaxed)
    }

    /// Counts a machine check that the guest was given; how many there were before.
    pub fn count_machine_check(&self) -> u64 {
        // Relaxed: a counter orders nothing.
        self.machine_checks.fetch_add(1, Ordering::Relaxed)
    }

    /// How many machine checks there were.
    pub fn machine_checks(&self) -> u64 {
        // Relaxed: as above.
        self.machine_checks.load(Ordering::Relaxed)
    }

    /// What has been counted.
    pub fn exits(&self) -> Exits {
        let [pio_in, pio_out, mmio_read, mmio_write, hlt, other] = self
            .exits
            .each_ref()
            .map(|counter| counter.load(Ordering::Relaxed));
        Exits {
            pio_in,
            pio_out,
            mmio_read,
            mmio_write,
            hlt,
            other,
        }
    }
}

/// Exits to the monitor by kind. Those that KVM serves by itself, and signals, are not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Exits {
    /// [`ExitKind::PioIn`].
    pub pio_in: u64,
    /// [`ExitKind::PioOut`].
    pub pio_out: u64,
    /// [`ExitKind::MmioRead`].
    pub mmio_read: u64,
    /// [`ExitKind::MmioWrite`].
    pub mmio_write: u64,
    /// [`ExitKind::Hlt`].
    pub hlt: u64,
    /// [`ExitKind::Other`].
    pub other: u64,
}

impl Exits {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.columns().iter().map(|(_, count)| count).sum()
    }

    fn columns(&self) -> [(&'static str, u64); ExitKind::COUNT] {
        [
            ("pio-in", self.pio_in),
            ("pio-out", self.pio_out),
            ("mmio-read", self.mmio_read),
            ("mmio-write", self.mmio_write),
            ("hlt", self.hlt),
            ("other", self.other),
        ]
    }
}

/// What one range of a bus was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceStats {
    /// The device's name.
    pub device: Cow<'static, str>,
    /// Its bus.
    pub bus: String,
    /// First address or port.
    pub base: u64,
    /// Last address or port.
    pub last: u64,
    /// Reads that it answered, and writes; bytes of each. An access in several pieces counts each.
    pub reads: u64,
    /// Writes that it took. Coalesced ones are among them.
    pub writes: u64,
    /// Bytes of the reads.
    pub read_bytes: u64,
    /// Bytes of the writes.
    pub written_bytes: u64,
}

/// What nobody answered on one bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct UnclaimedStats {
    /// The bus.
    pub bus: String,
    /// How many accesses.
    pub accesses: u64,
    /// The address or port of the last of them; `None` where a write to read-only memory came later.
    pub last_address: Option<u64>,
}

/// One memory slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SlotStats {
    /// KVM's number.
    pub id: u32,
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// What it is made of.
    pub backing: String,
    /// Bytes of one page of that.
    pub page_size: u64,
}

/// A snapshot of the numbers. While the guest runs each is right for some moment of the call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stats {
    /// Each vCPU's exits, in the order of their numbers, as the guest counts its processors.
    pub exits: Vec<Exits>,
    /// Writes that KVM kept in its ring, and that cost no exit of their own.
    pub coalesced_writes: u64,
    /// Writes to read-only memory, which were dropped.
    pub read_only_writes: u64,
    /// Machine checks that the guest was given, each for a touch of memory that did not come.
    pub machine_checks: u64,
    /// Each device, bus by bus in order of address; empty where accesses are not counted.
    pub devices: Vec<DeviceStats>,
    /// Each bus on which there was an access that nobody answered. Writes to read-only memory, which no
    /// device answers either, are not among them.
    pub unclaimed: Vec<UnclaimedStats>,
    /// Guest memory, by address.
    pub slots: Vec<SlotStats>,
    /// What KVM itself counted; `None` where it was not asked, or has no statistics.
    pub kvm: Option<KvmStats>,
    /// What memory's coming took, of a guest that ran before it was read; `None` of others.
    pub lazy: Option<LazyStats>,
}

/// A device's name and where it was registered, for [`Stats::collect`].
pub type Named = (Cow<'static, str>, BusKind, IoRange);

impl Stats {
    /// Those of a machine that was ended before it was built: nothing that its vCPUs did, and no memory.
    pub fn none(vcpus: u32) -> Self {
        Stats {
            exits: (0..vcpus).map(|_| Exits::default()).collect(),
            ..Stats::default()
        }
    }

    /// Reads all counters.
    pub fn collect<'a>(
        vcpus: impl IntoIterator<Item = &'a ExitCounters>,
        bus: &IoBus,
        names: &[Named],
        slots: &SlotTable,
    ) -> Self {
        // First: of a write, the bus counts before its vCPU does, so none to read-only memory is taken for another.
        let accesses = bus.stats();
        let mut exits = Vec::new();
        let (mut read_only_writes, mut machine_checks) = (0, 0);
        for counters in vcpus {
            exits.push(counters.exits());
            read_only_writes += counters.read_only_writes();
            machine_checks += counters.machine_checks();
        }
        let (mut devices, mut unclaimed) = (Vec::new(), Vec::new());
        if let Some(stats) = accesses {
            for range in stats.ranges {
                let named = names
                    .iter()
                    .find(|(_, bus, at)| (*bus, *at) == (range.bus, range.range));
                devices.push(DeviceStats {
                    device: named.map_or("?".into(), |(name, ..)| name.clone()),
                    bus: range.bus.to_string(),
                    base: range.range.base(),
                    last: range.range.last(),
                    reads: range.reads,
                    writes: range.writes,
                    read_bytes: range.read_bytes,
                    written_bytes: range.written_bytes,
                });
            }
            unclaimed.extend(stats.unclaimed.iter().map(|bus| {
                // The bus saw the writes to read-only memory first, and no device took them.
                let elsewhere = match bus.bus {
                    BusKind::Mmio => read_only_writes,
                    _ => 0,
                };
                let is_rom = |at: &u64| {
                    let region = slots.find(GuestAddress(*at));
                    region.is_some_and(|region| region.is_read_only())
                };
                UnclaimedStats {
                    bus: bus.bus.to_string(),
                    accesses: bus.accesses.saturating_sub(elsewhere),
                    last_address: bus.last_address.filter(|at| elsewhere == 0 || !is_rom(at)),
                }
            }));
            unclaimed.retain(|bus: &UnclaimedStats| bus.accesses > 0);
        }
        let slots = slots.regions().map(|region| {
            let extent = region.extent();
            SlotStats {
                id: extent.id().0,
                start: extent.start().0,
                size: extent.size(),
                read_only: region.is_read_only(),
                backing: region.mapping().kind().to_string(),
                page_size: region.mapping().page_size(),
            }
        });
        Stats {
            exits,
            coalesced_writes: bus.coalesced_writes(),
            read_only_writes,
            machine_checks,
            devices,
            unclaimed,
            slots: slots.collect(),
            kvm: None,
            lazy: None,
        }
    }

    /// One line of JSON, with the fields' names in kebab-case.
    pub fn json(&self) -> String {
        // Numbers and text: nothing that JSON has no form for.
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl fmt::Display for Stats {
    /// Tables, each with a line that says what it is. Numbers are decimal, addresses hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = Exits::default().columns().map(|(name, _)| name);
        let titles = ["exits", "total"].into_iter().chain(titles);
        let mut exits = vec![titles.map(str::to_owned).collect()];
        for (vcpu, counts) in self.exits.iter().enumerate() {
            let numbers = counts.columns().map(|(_, count)| count.to_string());
            let first = [format!("  vcpu{vcpu}"), counts.total().to_string()];
            exits.push(first.into_iter().chain(numbers).collect());
        }
        table(f, &exits)?;
        writeln!(f, "writes without an exit: {}", self.coalesced_writes)?;
        writeln!(f, "writes to read-only memory: {}", self.read_only_writes)?;
        if self.machine_checks > 0 {
            writeln!(f, "machine checks for lost memory: {}", self.machine_checks)?;
        }

        let titles = ["devices", "at", "reads", "bytes", "writes", "bytes"];
        let mut devices = vec![titles.map(str::to_owned).to_vec()];
        devices.extend(self.devices.iter().map(|device| {
            vec![
                format!("  {}", device.device),
                format!("{} {:#x}..={:#x}", device.bus, device.base, device.last),
                device.reads.to_string(),
                device.read_bytes.to_string(),
                device.writes.to_string(),
                device.written_bytes.to_string(),
            ]
        }));
        if !self.devices.is_empty() {
            table(f, &devices)?;
        }
        for bus in &self.unclaimed {
            write!(f, "nobody answered on {}: {}", bus.bus, bus.accesses)?;
            match bus.last_address {
                Some(at) => writeln!(f, ", the last at {at:#x}")?,
                None => f.write_char('\n')?,
            }
        }

        let titles = ["memory", "at", "bytes", "KiB a page"];
        let mut slots = vec![titles.map(str::to_owned).to_vec()];
        slots.extend(self.slots.iter().map(|slot| {
            let read_only = if slot.read_only { ", read-only" } else { "" };
            vec![
                format!("  slot {}: {}{read_only}", slot.id, slot.backing),
                format!("{:#x}", slot.start),
                slot.size.to_string(),
                (slot.page_size >> 10).to_string(),
            ]
        }));
        table(f, &slots)?;

        let mut kvm = self.kvm.iter().flat_map(KvmStats::tables);
        kvm.try_for_each(|rows| table(f, &rows))?;
        self.lazy.iter().try_for_each(|lazy| lazy.fmt(f))
    }
}

/// Rows of one length, each column as wide as its widest cell: the first to the left, the others to the
/// right.
fn table(f: &mut fmt::Formatter<'_>, rows: &[Vec<String>]) -> fmt::Result {
    let mut widths = vec![0; rows.first().map_or(0, Vec::len)];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            match column {
                0 => write!(f, "{cell:<width$}")?,
                _ => write!(f, "  {cell:>width$}")?,
            }
        }
        f.write_char('\n')?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::slots_of;
    use io_bus::{MmioAddress, PioAddress, PioRange};
    use memslots::fake::FakeHost;
    use memslots::{Backing, SlotFlags};
    use std::sync::Arc;
    use vm_device::DevicePio;

    struct Quiet;
    impl DevicePio for Quiet {
        fn pio_read(&self, _: PioAddress, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: PioAddress, _: u16, _: &[u8]) {}
    }

    #[test]
    fn each_number_is_where_it_belongs() {
        let bus = IoBus::new();
        let range = PioRange::new(PioAddress(0x70), 2).unwrap();
        let _clock = bus.register_pio(range, Arc::new(Quiet)).unwrap();
        bus.count(true);
        let mut io = bus.dispatcher();
        assert!(io.pio_read(PioAddress(0x71), &mut [0; 2]) != io_bus::Outcome::Answered);
        assert!(io.pio_write(PioAddress(0x70), &[0; 2]).is_answered());
        let memslots = slots_of(FakeHost::new(8));
        let rom = memslots
            .create(
                GuestAddress(0xe_0000),
                Backing::anonymous(0x2_0000),
                SlotFlags::READ_ONLY,
            )
            .unwrap();
        let counters = [ExitCounters::default(), ExitCounters::default()];
        counters[1].count(ExitKind::PioIn);
        counters[1].count(ExitKind::Hlt);
        counters[1].count(ExitKind::Hlt);
        let names: [Named; 1] = [("clock".into(), BusKind::Pio, range.into())];
        let stats = Stats::collect(&counters, &bus, &names, &memslots.snapshot());
        assert_eq!(stats.exits[0].total(), 0);
        assert_eq!((stats.exits[1].pio_in, stats.exits[1].hlt), (1, 2));
        assert_eq!(stats.devices[0].device, "clock");
        assert_eq!((stats.devices[0].reads, stats.devices[0].writes), (0, 1));
        assert_eq!(stats.devices[0].written_bytes, 2);
        assert_eq!(stats.unclaimed[0].last_address, Some(0x71));
        assert!(stats.slots[0].read_only);
        let text = stats.to_string();
        for needle in [
            "vcpu1",
            "clock",
            "0x70..=0x71",
            "the last at 0x71",
            "read-only",
        ] {
            assert!(text.contains(needle), "{needle}: {text}");
        }
        let json: serde_json::Value = serde_json::from_str(&stats.json()).unwrap();
        assert_eq!(json["exits"][1]["hlt"], 2);
        assert_eq!(json["devices"][0]["written-bytes"], 2);
        assert_eq!(json["slots"][0]["size"], 0x2_0000);
        drop(rom);
    }

    #[test]
    fn a_write_to_read_only_memory_counts_there_alone() {
        let bus = IoBus::new();
        bus.count(true);
        let memslots = slots_of(FakeHost::new(8));
        let rom = GuestAddress(0xe_0000);
        let backing = Backing::anonymous(0x2_0000);
        let _rom = memslots.create(rom, backing, SlotFlags::READ_ONLY).unwrap();
        let counters = [ExitCounters::default()];
        let mut io = bus.dispatcher();
        let mut write = |address: u64, rom: bool| {
            assert!(!io.mmio_write(MmioAddress(address), &[0]).is_answered());
            if rom {
                counters[0].count_read_only_write();
            }
            Stats::collect(&counters, &bus, &[], &memslots.snapshot())
        };
        let stats = write(rom.0, true);
        assert_eq!((stats.read_only_writes, stats.unclaimed), (1, vec![]));
        let unclaimed = |accesses, last_address| UnclaimedStats {
            bus: BusKind::Mmio.to_string(),
            accesses,
            last_address,
        };
        let stats = write(0xd000_0000, false);
        assert_eq!(stats.unclaimed, [unclaimed(1, Some(0xd000_0000))]);
        let stats = write(rom.0 + 8, true);
        assert_eq!(stats.read_only_writes, 2);
        assert_eq!(stats.unclaimed, [unclaimed(1, None)]);
    }

    #[test]
    fn columns_line_up_whatever_is_in_them() {
        let device = |device: &'static str, base, reads| DeviceStats {
            device: device.into(),
            bus: "MMIO".into(),
            base,
            last: base + 0xfff,
            reads,
            writes: 1,
            read_bytes: 2,
            written_bytes: 3,
        };
        let slot = |id, backing: &str, read_only| SlotStats {
            id,
            start: 1 << id,
            size: 1 << id,
            read_only,
            backing: backing.into(),
            page_size: 4096,
        };
        let stats = Stats {
            exits: vec![Exits::default(); 12],
            coalesced_writes: u64::MAX,
            read_only_writes: 0,
            machine_checks: 0,
            devices: vec![
                device("a", 0, 0),
                device(
                    "a µ-controller whose name is longer than all others",
                    1 << 51,
                    u64::MAX,
                ),
            ],
            unclaimed: vec![],
            slots: vec![
                slot(1, "memory", false),
                slot(40, "shared hugetlb pages", true),
            ],
            kvm: None,
            lazy: None,
        };
        let text = stats.to_string();
        let lines: Vec<&str> = text.lines().collect();
        for (title, rows) in [("exits", 12), ("devices", 2), ("memory", 2)] {
            let at = lines
                .iter()
                .position(|line| line.starts_with(title))
                .unwrap();
            let table = &lines[at..=at + rows];
            let width = |line: &&str| line.chars().count();
            assert!(
                table.iter().all(|line| width(line) == width(&table[0])),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_not_counted_is_not_shown() {
        let bus = IoBus::new();
        let memslots = slots_of(FakeHost::new(8));
        let stats = Stats::collect([], &bus, &[], &memslots.snapshot());
        assert!(stats.devices.is_empty() && stats.unclaimed.is_empty());
        assert!(!stats.to_string().contains("devices"));
    }
}
