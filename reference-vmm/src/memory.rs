// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory: what `--memory` asks for, and the slots that it becomes.
//!
//! ```text
//!   with an irqchip (ACPI)                 without
//!   0        ordinary pages  ┐             0   ┐
//!   FIRMWARE read-only slot  │ 2 MiB           │ one slot
//!   1 MiB    the rest        ┘                 ┘
//!   MMIO_HOLE nothing                      MMIO_HOLE nothing
//!   4 GiB    the rest                      4 GiB    the rest
//! ```
//!
//! A slot is one kind of memory, so the firmware's cuts the low memory in two, and a huge page that it
//! would lie in is made of ordinary ones: the first 2 MiB, which KVM could not map as one page anyway.
//! So it is with shared memory and transparent huge pages, which a memfd has at multiples of their size.
//! A guest with 1 GiB pages keeps them, and has its firmware in RAM that it can write. What is above
//! 4 GiB is in slots of 4 TiB, for KVM takes fewer than 8 TiB in one.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;

use dirty_log::HostWrites;
use kvm_core::CheckExtension;
use memslots::{
    Backing, HugePageSize, HugePages, HugePool, MapError, Mapping, NewSlot, NumaPolicy,
    PrivateRanges, SetMemoryRegion, SlotFlags,
};
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use vm_memory::GuestAddress;

use crate::arch::layout;
use crate::config::{ConfigError, Size, field, object, parse_size};
use crate::host_memory::{self, Transparent};

/// A machine's memory slots. What this process writes there is noted where somebody asked for it
/// ([`tracking`](crate::vm::tracking)); where nobody did, that is a load and a branch a write.
pub type Memslots = memslots::Memslots<HostWrites>;

/// The memory slots of a VM: none yet.
pub fn slots_of(host: impl SetMemoryRegion + Send + Sync + 'static) -> Memslots {
    Memslots::with_policy(host, PrivateRanges::x86())
}

/// The slots at one moment.
pub type SlotTable = memslots::SlotTable<HostWrites>;
/// The memory as devices have it: live, with permissions.
pub type GuestRam = memslots::GuestRam<HostWrites>;
/// The memory of one moment, with permissions. A clone keeps it mapped.
pub type LoadedMemory = memslots::LoadedMemory<HostWrites>;

/// x86-64 has at most 52 bits of physical address; what this host's KVM takes may be less, and only
/// KVM can tell.
const MAX_ADDRESS_BITS: u32 = 52;

/// The largest slot. KVM takes 2³¹ − 1 pages, 4 KiB less than twice this.
const MAX_SLOT: u64 = 4 << 40;

/// `KVM_CAP_GUEST_MEMFD_FLAGS`, Linux 6.18, which kvm-bindings does not name yet.
pub(crate) const CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// `GUEST_MEMFD_FLAG_MMAP` and `GUEST_MEMFD_FLAG_INIT_SHARED`: what a guest_memfd that the monitor maps is made with.
pub(crate) const MAPPABLE: i32 = 0b11;

/// What KVM keeps for each page of a slot from its making on, where it keeps page tables of its own
/// (software KVM, nested guests): measured.
const KVM_BYTES_A_PAGE: u64 = 9;

/// A guest with so many times the host's memory is told to be one: of it KVM's
/// [own memory](KVM_BYTES_A_PAGE) is 2 % of the host's. Less than that is a plain overcommitment.
const EXCESS: u64 = 8;

/// The smallest guest: the first MiB is the PC's low memory, and a kernel needs a place above it.
const MIN_SIZE: u64 = 2 << 20;

/// More threads than this do not make memory present any faster: they wait for each other in the
/// kernel.
const MAX_PREFAULT_THREADS: usize = 16;

/// What is made present between two looks at whether to go on: a quarter of a second's work for one
/// thread, beside which the threads' start is nothing.
const PREFAULT_PIECE: u64 = 256 << 20;

/// Guest memory: how much, and of what.
///
/// As text (`--memory`, or in a JSON file): the size, then options with commas between them, such as
/// `2G,shared,hugepages=2M`. In a JSON file also a number of bytes, or an object with these fields.
///
/// ```
/// use reference_vmm::memory::Memory;
/// let memory: Memory = "1G,hugepages=2M,prefault".parse()?;
/// assert_eq!(memory.size, 1 << 30);
/// assert_eq!(memory.to_string(), "1073741824,hugepages=2097152,prefault");
/// # Ok::<(), reference_vmm::config::ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes, a multiple of 4 KiB and of `hugepages`.
    pub size: u64,
    /// In memfds that can be handed to other processes, instead of private to this one.
    pub shared: bool,
    /// Pages of this size from the host's pool, reserved before the guest starts.
    pub hugepages: Option<HugePageSize>,
    /// All of it made present before the guest starts, instead of when it is touched.
    pub prefault: bool,
    /// Whether transparent huge pages serve it.
    pub thp: HugePages,
    /// The host's NUMA node that all of it comes from. Huge pages are made present at once then: their
    /// reservation knows no nodes, and a guest that met a node without one left would be killed.
    pub numa: Option<u32>,
    /// In a guest_memfd that the monitor maps as well (Linux 6.18): KVM takes its pages from the file, whatever is mapped.
    /// No dirty log and no userfaultfd works on it, so there are neither incremental nor background snapshots of such a
    /// guest, nor migrations.
    pub guest_memfd: bool,
}

impl Memory {
    /// `size` bytes of the host's ordinary memory, private, given as it is touched.
    pub const fn new(size: u64) -> Self {
        Memory {
            size,
            shared: false,
            hugepages: None,
            prefault: false,
            thp: HugePages::Host,
            numa: None,
            guest_memfd: false,
        }
    }

    /// Checks what can be checked without a host.
    ///
    /// # Errors
    /// [`ConfigError::Memory`], with the size and what is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refused = |why: String| {
            let given = self.size;
            Err(ConfigError::Memory { given, why })
        };
        if self.size < MIN_SIZE {
            return refused(format!("a guest needs at least {MIN_SIZE}"));
        }
        if !self.size.is_multiple_of(layout::PAGE) {
            let page = layout::PAGE;
            return refused(format!("not a multiple of {page}, the page size"));
        }
        if self.size > 1 << (MAX_ADDRESS_BITS - 1) {
            return refused(format!(
                "more than the {} that {MAX_ADDRESS_BITS} address bits leave for it",
                1u64 << (MAX_ADDRESS_BITS - 1)
            ));
        }
        if self.guest_memfd {
            let others = [
                (
                    "shared",
                    self.shared,
                    "is a memfd, and the memory is in one file",
                ),
                (
                    "hugepages",
                    self.hugepages.is_some(),
                    "are of a pool, and KVM makes the pages",
                ),
                (
                    "thp",
                    self.thp != HugePages::Host,
                    "is advice that KVM does not ask for when it makes the pages",
                ),
                (
                    "numa",
                    self.numa.is_some(),
                    "is a policy that KVM does not ask for when it makes the pages",
                ),
            ];
            if let Some((name, _, why)) = others.into_iter().find(|(_, given, _)| *given) {
                return refused(format!(
                    "guest-memfd and {name}, which {why}: leave one of the two out"
                ));
            }
        }
        let Some(page) = self.hugepages else {
            return Ok(());
        };
        if !self.size.is_multiple_of(page.bytes()) || page.bytes() > layout::MMIO_HOLE.start {
            return refused(format!("not whole huge pages of {page}"));
        }
        let hole = layout::MMIO_HOLE.start;
        if self.size > hole && !hole.is_multiple_of(page.bytes()) {
            return refused(format!(
                "below the hole for devices there are {hole}, which are not whole huge pages of {page}"
            ));
        }
        if self.thp != HugePages::Host {
            return refused(format!(
                "thp is about ordinary pages, and with hugepages all of them have {page}: leave one of \
                 the two out"
            ));
        }
        Ok(())
    }

    /// Whether a guest with such memory can have its firmware in a slot of its own.
    pub fn can_have_firmware_slot(&self) -> bool {
        self.hugepages
            .is_none_or(|page| page.bytes() <= layout::HIGH_RAM.0 * 2)
    }

    /// The slots of a machine with this RAM (as from [`memslots::ram_layout`]), with one that the
    /// guest can only read for its firmware if `firmware` says so and the memory
    /// [allows it](Self::can_have_firmware_slot). In order of address. Of a guest_memfd they get their memory by
    /// [`provide`](Self::provide), when there is a VM.
    pub fn slots(&self, ram: &[(GuestAddress, u64)], firmware: bool) -> Vec<NewSlot> {
        let firmware = firmware && self.can_have_firmware_slot();
        let mut slots = Vec::with_capacity(ram.len() + 3);
        let mut add = |mut start: u64, end: u64, backing: &dyn Fn(u64) -> Backing, flags| {
            while start < end {
                let size = (end - start).min(MAX_SLOT);
                let backing = backing(size);
                slots.push(NewSlot {
                    start: GuestAddress(start),
                    backing,
                    flags,
                });
                start += size;
            }
        };
        let ordinary = Memory {
            hugepages: None,
            ..*self
        };
        let ordinary = |size| ordinary.backing(size);
        let all = |size| self.backing(size);
        for &(GuestAddress(start), size) in ram {
            let end = start.saturating_add(size);
            if start != 0 || !firmware {
                add(start, end, &all, SlotFlags::NONE);
                continue;
            }
            let rom = layout::FIRMWARE;
            add(0, rom.start, &ordinary, SlotFlags::NONE);
            add(
                rom.start,
                rom.end,
                &Backing::anonymous,
                SlotFlags::READ_ONLY,
            );
            let huge = match self.hugepages {
                Some(page) => page.bytes(),
                None if self.shared && self.thp != HugePages::Never => HugePageSize::MIB_2.bytes(),
                None => rom.end,
            };
            let huge = huge.min(end);
            add(rom.end, huge, &ordinary, SlotFlags::NONE);
            add(huge, end, &all, SlotFlags::NONE);
        }
        slots
    }

    /// Finds out whether this host has such memory, before anything of the VM exists: maps `slots`
    /// and lets go of them again, untouched. Only what the host may not have is asked for: huge pages,
    /// NUMA nodes.
    ///
    /// # Errors
    /// [`MapError`], with the nodes that there are, or how many huge pages all of the slots want and
    /// the numbers of the pool, none of them taken. (Another process may still take the pages a moment
    /// later; then the VM's memory is refused.)
    pub fn check_host(&self, slots: &[NewSlot]) -> Result<(), MapError> {
        if self.hugepages.is_none() && self.numa.is_none() {
            return Ok(());
        }
        let asked = slots.iter().filter(|slot| slot.flags == SlotFlags::NONE);
        let map = |slot: &NewSlot| Mapping::new(&slot.backing, slot.start);
        // All at once: they share the pool.
        let mapped = asked.map(map).collect::<Result<Vec<_>, _>>().map(drop);
        mapped.map_err(|error| match error {
            // Of the slot that failed alone, and with the pages of those before it reserved.
            MapError::NoHugePages { page_size, .. } => MapError::NoHugePages {
                page_size,
                wanted: self.huge_pages_of(slots),
                pool: HugePool::of_host(page_size),
            },
            other => other,
        })
    }

    /// Refuses a guest_memfd where the host's KVM has none that can be mapped: before there is a VM.
    ///
    /// # Errors
    /// [`ConfigError::Memory`], with KVM's answer and the remedy.
    pub fn check_kvm(&self, kvm: &impl CheckExtension) -> Result<(), ConfigError> {
        if !self.guest_memfd {
            return Ok(());
        }
        let flags = guest_memfd_flags(kvm);
        if flags & MAPPABLE == MAPPABLE {
            return Ok(());
        }
        Err(ConfigError::Memory {
            given: self.size,
            why: format!(
                "guest-memfd takes a KVM whose guest_memfds can be mapped (Linux 6.18 or later): \
                 KVM_CAP_GUEST_MEMFD_FLAGS is {flags} here, and {MAPPABLE} (MMAP and INIT_SHARED) is wanted; a guest that is \
                 made anew does without (leave guest-memfd out)"
            ),
        })
    }

    /// Gives the slots that are to be of a guest_memfd their parts of one, which is made here. Read-only slots keep memory of
    /// their own: KVM has no read-only slot of a guest_memfd.
    ///
    /// # Errors
    /// KVM's refusal; nothing is left behind.
    pub fn provide(
        &self,
        memslots: &Memslots,
        slots: &mut [NewSlot],
    ) -> Result<(), memslots::Error> {
        if !self.guest_memfd {
            return Ok(());
        }
        let parts = slots
            .iter_mut()
            .filter(|slot| slot.flags == SlotFlags::NONE);
        let mut parts: Vec<_> = parts.collect();
        let sizes = parts.iter().map(|slot| slot.backing.size());
        let file = memslots.create_mappable_guest_memfd(sizes.sum())?;
        let mut offset = 0;
        for slot in &mut parts {
            let size = slot.backing.size();
            slot.backing = Backing::guest_memfd(&file, offset, size);
            offset += size;
        }
        Ok(())
    }

    /// How many huge pages these slots are of.
    fn huge_pages_of(&self, slots: &[NewSlot]) -> u64 {
        let Some(page) = self.hugepages.map(HugePageSize::bytes) else {
            return 0;
        };
        let backings = slots.iter().map(|slot| &slot.backing);
        let huge = backings.filter(|backing| backing.page_size() == page);
        huge.map(|backing| backing.size() / page).sum()
    }

    /// How to tell that `thp=always` has no effect, which is no error: the host, as its sysfs says, gives
    /// such memory no transparent huge pages. `None` where it does, and where they were not asked for.
    pub fn thp_obstacle(&self, sysfs: &Path) -> Option<String> {
        if self.thp != HugePages::Advise {
            return None;
        }
        let host = Transparent::read(sysfs);
        let (kind, setting) = match self.shared {
            false => ("private", host.private),
            true => ("shared", host.shared),
        };
        // A kernel without such a file has none to give, and refuses the advice by itself.
        let setting = setting?;
        let (file, word) = setting.obstacle()?;
        let file = file.display();
        Some(format!(
            "thp=always has no effect on {kind} memory here: {file} is {word:?}"
        ))
    }

    /// How to tell that there is so much of it that even a guest that touches nothing may be too large for
    /// the host, which is no error: KVM keeps something for each page. `None` where there is not.
    pub fn excess(&self) -> Option<String> {
        self.excess_of(host_memory::total()?)
    }

    fn excess_of(&self, total: u64) -> Option<String> {
        let size = self.size;
        let kvms = size / layout::PAGE * KVM_BYTES_A_PAGE;
        (size / EXCESS > total).then(|| {
            format!(
                "{size} bytes of memory, and this host has {total}: KVM alone may take {kvms} for a guest of that size"
            )
        })
    }

    /// Refuses to make present what the host has not: ordinary memory that cannot be had is no error of
    /// a system call, the kernel kills a process for it.
    ///
    /// # Errors
    /// [`ConfigError::Memory`], with the host's number (`MemAvailable` of `/proc/meminfo`; a host that
    /// does not say is not asked further).
    pub fn check_available(&self) -> Result<(), ConfigError> {
        if !self.prefault || self.hugepages.is_some() {
            return Ok(());
        }
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        match available(&meminfo) {
            Some(available) if self.size > available => Err(ConfigError::Memory {
                given: self.size,
                why: format!(
                    "prefault makes all of it present, and this host has {available} to give"
                ),
            }),
            _ => Ok(()),
        }
    }

    /// `size` bytes of such memory.
    fn backing(&self, size: u64) -> Backing {
        let backing = match (self.hugepages, self.shared) {
            (None, false) => Backing::anonymous(size),
            (None, true) => Backing::memfd(size),
            (Some(page), false) => Backing::hugetlb(size, page),
            (Some(page), true) => Backing::hugetlb_memfd(size, page),
        };
        let backing = backing.huge_pages(self.thp);
        match self.numa {
            Some(node) => backing.numa(NumaPolicy::Bind(vec![node])),
            None => backing,
        }
    }

    /// Makes all of `table` present that this memory wants so, and not its read-only slots. Before each
    /// piece `go_on` is asked; where it says no, that is the end.
    ///
    /// # Errors
    /// [`MapError::Prefault`], with how far it came in the slot.
    pub fn make_present(
        &self,
        table: &SlotTable,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<(), MapError> {
        let must = self.hugepages.is_some() && self.numa.is_some();
        if !(self.prefault || must) {
            return Ok(());
        }
        let writable = table.regions().filter(|region| !region.is_read_only());
        for mapping in writable.map(|region| region.mapping()) {
            if !present(mapping, PREFAULT_PIECE, &mut go_on)? {
                break;
            }
        }
        Ok(())
    }
}

/// What KVM answers about guest_memfds that can be mapped: the flags that one can be made with, 0 of a KVM before Linux 6.18.
pub(crate) fn guest_memfd_flags(kvm: &impl CheckExtension) -> i32 {
    kvm.check_extension(CAP_GUEST_MEMFD_FLAGS).max(0)
}

/// Makes a mapping present, `piece` after `piece`; false if `go_on` ended it.
fn present(
    mapping: &Mapping,
    piece: u64,
    go_on: &mut impl FnMut() -> bool,
) -> Result<bool, MapError> {
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let most = NonZeroUsize::new(MAX_PREFAULT_THREADS).unwrap_or(NonZeroUsize::MIN);
    let threads = threads.min(most);
    // A page for each thread at least: of 1 GiB, one would keep one thread busy.
    let piece = piece.max(mapping.page_size().saturating_mul(threads.get() as u64));
    let piece = piece.next_multiple_of(mapping.page_size());
    let size = mapping.size();
    let mut start = 0;
    while start < size {
        if !go_on() {
            return Ok(false);
        }
        let end = start.saturating_add(piece).min(size);
        let populated = mapping.prefault(start..end, threads);
        populated.map_err(|error| match error {
            MapError::Prefault {
                populated, errno, ..
            } => MapError::Prefault {
                populated: start + populated,
                size,
                errno,
            },
            other => other,
        })?;
        start = end;
    }
    Ok(true)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

impl Default for Memory {
    /// 256 MiB.
    fn default() -> Self {
        Memory::new(256 << 20)
    }
}

impl From<u64> for Memory {
    fn from(size: u64) -> Self {
        Memory::new(size)
    }
}

impl FromStr for Memory {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut memory = Memory::default();
        let mut seen: Vec<&str> = Vec::new();
        for (index, part) in text.split(',').enumerate() {
            let wrong = |why: &str| ConfigError::MemoryOption {
                option: part.to_owned(),
                why: why.to_owned(),
            };
            let switch = |value: Option<&str>| match value {
                None | Some("on") => Ok(true),
                Some("off") => Ok(false),
                Some(_) => Err(wrong("on or off is wanted")),
            };
            let (mut key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (part, None),
            };
            match (key, value) {
                ("size", Some(size)) => memory.size = parse_size(size)?,
                ("shared", value) => memory.shared = switch(value)?,
                ("prefault", value) => memory.prefault = switch(value)?,
                ("guest-memfd", value) => memory.guest_memfd = switch(value)?,
                ("hugepages", Some("off")) => memory.hugepages = None,
                ("hugepages", None | Some("on")) => memory.hugepages = Some(HugePageSize::MIB_2),
                ("hugepages", Some(size)) => {
                    let page = parse_page(size).map_err(|why| wrong(&why))?;
                    memory.hugepages = Some(page);
                }
                ("thp", Some("always")) => memory.thp = HugePages::Advise,
                ("thp", Some("never")) => memory.thp = HugePages::Never,
                ("thp", _) => return Err(wrong("always or never is wanted")),
                ("numa", Some(node)) => {
                    let node = node.parse();
                    memory.numa = Some(node.map_err(|_| wrong("a node's number is wanted"))?);
                }
                ("numa", None) => return Err(wrong("a node's number is wanted: numa=NODE")),
                // The size itself comes first.
                (size, None) if index == 0 => {
                    memory.size = parse_size(size)?;
                    key = "size";
                }
                _ => {
                    return Err(wrong(
                        "not one of shared, hugepages[=2M|1G], prefault, thp=always|never, numa=NODE, \
                         guest-memfd",
                    ));
                }
            }
            if seen.contains(&key) {
                return Err(wrong("said twice"));
            }
            seen.push(key);
        }
        Ok(memory)
    }
}

impl fmt::Display for Memory {
    /// As [`from_str`](Self::from_str) takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.size)?;
        if self.shared {
            f.write_str(",shared")?;
        }
        if let Some(page) = self.hugepages {
            write!(f, ",hugepages={}", page.bytes())?;
        }
        if self.prefault {
            f.write_str(",prefault")?;
        }
        match self.thp {
            HugePages::Advise => f.write_str(",thp=always")?,
            HugePages::Never => f.write_str(",thp=never")?,
            _ => {}
        }
        if let Some(node) = self.numa {
            write!(f, ",numa={node}")?;
        }
        if self.guest_memfd {
            f.write_str(",guest-memfd")?;
        }
        Ok(())
    }
}

fn parse_page(text: &str) -> Result<HugePageSize, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    let page = HugePageSize::new(bytes);
    page.ok_or_else(|| "a page's size is wanted, such as 2M or 1G".to_owned())
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MemoryVisitor)
    }
}

struct MemoryVisitor;

impl<'de> Visitor<'de> for MemoryVisitor {
    type Value = Memory;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "memory (a size is a number of bytes, or text such as \"512M\"), or an object with a size",
        )
    }

    fn visit_u64<E: de::Error>(self, size: u64) -> Result<Memory, E> {
        Ok(Memory::new(size))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Memory, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Memory, A::Error> {
        const KEYS: &[&str] = &[
            "size",
            "shared",
            "hugepages",
            "prefault",
            "thp",
            "numa",
            "guest-memfd",
        ];
        let mut memory = Memory::default();
        object(map, KEYS, |key, map| {
            match key {
                "size" => memory.size = field::<Size, A>(map, key)?.0,
                "shared" => memory.shared = field(map, key)?,
                "hugepages" => memory.hugepages = field::<Page, A>(map, key)?.0,
                "prefault" => memory.prefault = field(map, key)?,
                "thp" => {
                    memory.thp = match field(map, key)? {
                        None => HugePages::Host,
                        Some(Thp::Always) => HugePages::Advise,
                        Some(Thp::Never) => HugePages::Never,
                    }
                }
                "numa" => memory.numa = field(map, key)?,
                "guest-memfd" => memory.guest_memfd = field(map, key)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(memory)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Thp {
    Always,
    Never,
}

/// A page's size, or what the text form takes beside it: on and off.
struct Page(Option<HugePageSize>);

impl<'de> Deserialize<'de> for Page {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PageVisitor)
    }
}

struct PageVisitor;

impl Visitor<'_> for PageVisitor {
    type Value = Page;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("on, off, or a page's size, such as \"2M\" or \"1G\"")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Page, E> {
        Ok(Page(None))
    }

    fn visit_bool<E: de::Error>(self, on: bool) -> Result<Page, E> {
        Ok(Page(on.then_some(HugePageSize::MIB_2)))
    }

    fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Page, E> {
        let page = HugePageSize::new(bytes);
        let wrong = || E::invalid_value(de::Unexpected::Unsigned(bytes), &self);
        page.ok_or_else(wrong).map(|page| Page(Some(page)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Page, E> {
        match text {
            "on" => self.visit_bool(true),
            "off" => self.visit_bool(false),
            size => self.visit_u64(parse_size(size).map_err(E::custom)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Memory {
        text.parse().unwrap()
    }

    #[test]
    fn what_the_host_has_to_give_is_read_in_bytes() {
        let meminfo = "MemTotal:  100 kB\nMemAvailable:      23 kB\nBuffers: 1 kB\n";
        assert_eq!(available(meminfo), Some(23 << 10));
        for text in [
            "",
            "MemAvailable: x kB",
            "MemAvailable: 18446744073709551615 kB",
        ] {
            assert_eq!(available(text), None, "{text}");
        }
    }

    /// The pages of a mapping that are present.
    fn resident(mapping: &Mapping) -> usize {
        let mut pages = vec![0u8; (mapping.size() / 4096) as usize];
        let size = mapping.size() as usize;
        // SAFETY: a mapping of that size, with a byte for each of its pages.
        let seen = unsafe { libc::mincore(mapping.host().0 as *mut _, size, pages.as_mut_ptr()) };
        assert_eq!(seen, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn making_present_ends_at_a_piece_when_it_is_told_to() {
        let backing = Backing::anonymous(40 << 12).huge_pages(HugePages::Never);
        let mapping = Mapping::new(&backing, GuestAddress(0)).unwrap();
        let piece = 16 << 12;
        let (mut asked, stop_at) = (0, 2);
        let mut go_on = || {
            asked += 1;
            asked < stop_at
        };
        assert!(!present(&mapping, piece, &mut go_on).unwrap());
        assert_eq!((asked, resident(&mapping)), (2, 16));
        // The last piece is a short one.
        let mut asked = 0;
        let mut go_on = || {
            asked += 1;
            true
        };
        assert!(present(&mapping, piece, &mut go_on).unwrap());
        assert_eq!((asked, resident(&mapping)), (3, 40));
    }

    #[test]
    fn a_wish_for_transparent_huge_pages_without_effect_is_told_with_the_setting() {
        let sysfs = tempfile::tempdir().unwrap();
        let folder = sysfs.path().join("kernel/mm/transparent_hugepage");
        let told = |memory: &str| parsed(memory).thp_obstacle(sysfs.path());
        // A kernel without them.
        assert_eq!(told("1G,thp=always"), None);
        std::fs::create_dir_all(&folder).unwrap();
        let set = |name: &str, words: &str| std::fs::write(folder.join(name), words).unwrap();
        let (private, shared) = ("1G,thp=always", "1G,shared,thp=always");
        set("enabled", "always madvise [never]");
        set("shmem_enabled", "always [advise] never");
        let text = told(private).unwrap();
        assert!(text.contains("private memory"), "{text}");
        assert!(
            text.ends_with("transparent_hugepage/enabled is \"never\""),
            "{text}"
        );
        for memory in [shared, "1G", "1G,thp=never", "1G,shared"] {
            assert_eq!(told(memory), None, "{memory}");
        }
        set("enabled", "always [madvise] never");
        set("shmem_enabled", "always advise [never]");
        let text = told(shared).unwrap();
        assert!(text.contains("shared memory"), "{text}");
        assert!(text.ends_with("/shmem_enabled is \"never\""), "{text}");
        assert_eq!(told(private), None);
    }

    #[test]
    fn text_has_a_size_and_options_in_any_order() {
        let memory = Memory::new(512 << 20);
        assert_eq!(parsed("512M"), memory);
        assert_eq!(parsed("size=512M"), memory);
        assert_eq!(parsed("prefault=off,size=512M,shared=off"), memory);
        let all = Memory {
            size: 2 << 30,
            shared: true,
            hugepages: Some(HugePageSize::GIB_1),
            prefault: true,
            thp: HugePages::Never,
            numa: Some(3),
            guest_memfd: true,
        };
        assert_eq!(
            parsed("2G,guest-memfd,hugepages=1G,thp=never,numa=3,shared,prefault=on"),
            all
        );
        assert_eq!(parsed(&all.to_string()), all);
        for two_mib in ["hugepages", "hugepages=on", "hugepages=2M"] {
            let memory = parsed(two_mib);
            assert_eq!(memory.hugepages, Some(HugePageSize::MIB_2));
            assert_eq!(memory.size, Memory::default().size);
        }
    }

    #[test]
    fn what_is_no_option_is_refused_with_the_word() {
        for (text, needle) in [
            ("lots", "\"lots\""),
            ("", "\"\""),
            ("512M,", "\"\""),
            ("512M,huge", "\"huge\""),
            ("512M,share=on", "\"share=on\""),
            ("512M,shared=yes", "on or off"),
            ("512M,hugepages=3M", "2M or 1G"),
            ("512M,hugepages=4K", "2M or 1G"),
            ("512M,hugepages=big", "\"big\""),
            ("512M,thp", "always or never"),
            ("512M,thp=madvise", "always or never"),
            ("512M,numa", "a node's number is wanted"),
            ("512M,numa=x", "\"numa=x\""),
            ("512M,1G", "\"1G\""),
            ("512M,size=1G", "twice"),
            ("512M,shared,shared", "twice"),
        ] {
            let error = text.parse::<Memory>().unwrap_err().to_string();
            assert!(
                error.contains(needle),
                "{text:?}: {error:?} has no {needle:?}"
            );
        }
    }

    #[test]
    fn json_has_the_same_as_a_number_text_or_an_object() {
        let json = |text: &str| serde_json::from_str::<Memory>(text);
        assert_eq!(json("1048576").unwrap(), Memory::new(1 << 20));
        assert_eq!(
            json("\"1G,shared\"").unwrap(),
            parsed("1073741824,shared=on")
        );
        let object = r#"{"size": "1G", "shared": true, "hugepages": "2M", "prefault": true,
            "thp": "always", "numa": 1, "guest-memfd": true}"#;
        let text = "1G,shared,hugepages=2M,prefault,thp=always,numa=1,guest-memfd";
        assert_eq!(json(object).unwrap(), parsed(text));
        assert_eq!(json("{}").unwrap(), Memory::default());
        for (text, needle) in [
            ("-1", "a size is"),
            ("true", "a size is"),
            ("\"lots\"", "lots"),
            (r#"{"size": "lots"}"#, "lots"),
            (
                r#"{"hugepages": 3}"#,
                "hugepages: invalid value: integer `3`",
            ),
            (r#"{"thp": "madvise"}"#, "madvise"),
            (r#"{"share": true}"#, "`share`"),
        ] {
            let error = json(text).unwrap_err().to_string();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }

    #[test]
    fn impossible_pairs_are_refused_with_both() {
        let refused = |text: &str| parsed(text).validate().unwrap_err().to_string();
        assert!(refused("513M,hugepages=2M").contains("2 MiB"));
        assert!(refused("1536M,hugepages=1G").contains("1 GiB"));
        assert!(refused("512M,hugepages=2M,thp=always").contains("leave one"));
        assert!(refused("512M,hugepages=2M,thp=never").contains("leave one"));
        parsed("6G,hugepages=1G").validate().unwrap();
        for with in ["shared", "hugepages=2M", "thp=never", "numa=0"] {
            let text = refused(&format!("512M,guest-memfd,{with}"));
            let (name, _) = with.split_once('=').unwrap_or((with, ""));
            let due = format!("536870912 bytes of memory: guest-memfd and {name}, which ");
            assert!(
                text.starts_with(&due) && text.ends_with("leave one of the two out"),
                "{text}"
            );
        }
        parsed("512M,guest-memfd,prefault").validate().unwrap();
    }

    fn shape(memory: &str, firmware: bool) -> Vec<(u64, u64, u64, bool)> {
        let memory = parsed(memory);
        let ram = memslots::ram_layout(memory.size, layout::MMIO_HOLE).unwrap();
        let slots = memory.slots(&ram, firmware);
        let one = |slot: &NewSlot| {
            let (start, backing) = (slot.start.0, &slot.backing);
            let read_only = slot.flags == SlotFlags::READ_ONLY;
            (start, backing.size(), backing.page_size(), read_only)
        };
        slots.iter().map(one).collect()
    }

    #[test]
    fn a_guest_far_larger_than_the_host_is_told_with_what_kvm_takes() {
        let gib = 1 << 30;
        for (memory, told) in [("184G", false), ("185G", true), ("4T", true)] {
            let text = parsed(memory).excess_of(23 * gib);
            assert_eq!(text.is_some(), told, "{memory}");
        }
        let text = parsed("4T").excess_of(23 * gib).unwrap();
        for number in ["4398046511104", "24696061952", "9663676416"] {
            assert!(text.contains(number), "{text}");
        }
    }

    #[test]
    fn a_slot_is_never_larger_than_kvm_takes() {
        let tib = 1 << 40;
        for memory in ["9T", "16T,hugepages=1G", "512T,shared", "9T,hugepages=2M"] {
            for firmware in [false, true] {
                let slots = shape(memory, firmware);
                let sizes = slots.iter().map(|slot| slot.1);
                assert!(sizes.clone().all(|size| size / 4096 < 1 << 31), "{slots:?}");
                assert_eq!(sizes.sum::<u64>(), parsed(memory).size);
            }
        }
        let high = shape("9T", false).into_iter().skip(1);
        let starts: Vec<_> = high.map(|slot| slot.0).collect();
        let four = 4u64 << 30;
        assert_eq!(starts, [four, four + 4 * tib, four + 8 * tib]);
        // One is as before.
        assert_eq!(shape("4T", false).len(), 2);
    }

    /// A KVM with this answer about guest_memfds that can be mapped, and none else.
    struct Flags(i32);

    impl CheckExtension for Flags {
        fn check_extension(&self, extension: u32) -> i32 {
            if extension == CAP_GUEST_MEMFD_FLAGS {
                self.0
            } else {
                0
            }
        }
    }

    #[test]
    fn a_kvm_without_mappable_guest_memfds_is_refused_with_its_answer() {
        for flags in [-1, 0, 1, 2] {
            parsed("1G").check_kvm(&Flags(flags)).unwrap();
            let refused = parsed("1G,guest-memfd")
                .check_kvm(&Flags(flags))
                .unwrap_err();
            let text = refused.to_string();
            let due = format!("KVM_CAP_GUEST_MEMFD_FLAGS is {} here, and 3", flags.max(0));
            assert!(text.contains(&due) && text.contains("Linux 6.18"), "{text}");
        }
        for flags in [3, 7] {
            parsed("1G,guest-memfd").check_kvm(&Flags(flags)).unwrap();
        }
    }

    #[test]
    fn the_slots_are_parts_of_one_guest_memfd_but_for_the_firmware() {
        let host = memslots::fake::FakeHost::new(8).with_guest_memfd();
        let slots = slots_of(host);
        let memory = parsed("6G,guest-memfd");
        let ram = memslots::ram_layout(memory.size, layout::MMIO_HOLE).unwrap();
        let mut new = memory.slots(&ram, true);
        memory.provide(&slots, &mut new).unwrap();
        let mut end = 0;
        for slot in &new {
            let slot = memslots::LayoutSlot::from(slot.clone());
            let Some((file, offset)) = slot.guest_memfd() else {
                assert_eq!(slot.slot.flags, SlotFlags::READ_ONLY);
                continue;
            };
            let firmware = layout::FIRMWARE.end - layout::FIRMWARE.start;
            assert_eq!((offset, file.size()), (end, memory.size - firmware));
            end += slot.size();
        }
        assert_eq!(slots.create_all(new).unwrap().len(), 4);
        // Where there is none, that is said, and other memory is left alone.
        let none = slots_of(memslots::fake::FakeHost::new(8));
        let mut new = memory.slots(&ram, true);
        let refused = memory.provide(&none, &mut new).unwrap_err();
        assert!(refused.to_string().contains("6.18"), "{refused}");
        parsed("6G").provide(&none, &mut new).unwrap();
        assert_eq!(new, parsed("6G").slots(&ram, true));
    }

    #[test]
    fn huge_pages_are_counted_over_all_slots() {
        for (memory, firmware, pages) in [
            ("4G,hugepages=2M", true, 2047),
            ("4G,hugepages=2M", false, 2048),
            ("4G,hugepages=1G", true, 4),
            ("4G", true, 0),
        ] {
            let memory = parsed(memory);
            let ram = memslots::ram_layout(memory.size, layout::MMIO_HOLE).unwrap();
            let slots = memory.slots(&ram, firmware);
            assert_eq!(memory.huge_pages_of(&slots), pages, "{memory}");
        }
    }

    #[test]
    fn the_firmware_is_read_only_and_cuts_the_low_memory() {
        const MIB: u64 = 1 << 20;
        let low = [(0, 0xe_0000, 4096, false), (0xe_0000, 0x2_0000, 4096, true)];
        let with = |rest: &[_]| [&low, rest].concat();
        assert_eq!(shape("128M", true), with(&[(MIB, 127 * MIB, 4096, false)]));
        assert_eq!(shape("128M", false), [(0, 128 * MIB, 4096, false)]);
        assert_eq!(
            shape("6G", true),
            with(&[
                (MIB, (3 << 30) - MIB, 4096, false),
                (4 << 30, 3 << 30, 4096, false)
            ])
        );
        let two = 2 * MIB;
        assert_eq!(
            shape("128M,hugepages=2M", true),
            with(&[(MIB, MIB, 4096, false), (two, 126 * MIB, two, false)])
        );
        assert_eq!(
            shape("2M,hugepages=2M", true),
            with(&[(MIB, MIB, 4096, false)])
        );
        // Where a huge page of the guest would begin, one of the memfd does.
        for memory in ["128M,shared", "128M,shared,thp=always"] {
            assert_eq!(
                shape(memory, true),
                with(&[(MIB, MIB, 4096, false), (two, 126 * MIB, 4096, false)])
            );
        }
        let never = shape("128M,shared,thp=never", true);
        assert_eq!(never, with(&[(MIB, 127 * MIB, 4096, false)]));
        let gib = 1 << 30;
        assert_eq!(shape("2G,hugepages=1G", true), [(0, 2 << 30, gib, false)]);
    }

    #[test]
    fn huge_pages_that_do_not_fit_below_the_hole_are_refused_in_the_users_numbers() {
        let error = parsed("4G,hugepages=2G").validate().unwrap_err();
        assert!(error.to_string().contains("4294967296"), "{error}");
        assert!(parsed("2G,hugepages=2G").validate().is_ok());
        assert!(parsed("4G,hugepages=1G").validate().is_ok());
    }

    #[test]
    fn a_file_switches_huge_pages_as_the_text_form_does() {
        for (value, page) in [
            ("\"off\"", None),
            ("null", None),
            ("false", None),
            ("true", Some(HugePageSize::MIB_2)),
            ("\"on\"", Some(HugePageSize::MIB_2)),
            ("\"2M\"", Some(HugePageSize::MIB_2)),
            ("2097152", Some(HugePageSize::MIB_2)),
        ] {
            let json = format!("{{\"size\": \"1G\", \"hugepages\": {value}}}");
            let memory: Memory = serde_json::from_str(&json).unwrap();
            assert_eq!(memory.hugepages, page, "{value}");
        }
    }

    proptest! {
        /// Whatever is asked for, the slots are the RAM, without gap or overlap.
        #[test]
        fn the_slots_are_all_of_the_ram(
            mib in prop_oneof![2u64..8 << 10, 2u64..64 << 20],
            page in prop::option::of(prop::sample::select(vec![2u64 << 20, 1 << 30])),
            shared in any::<bool>(),
            firmware in any::<bool>(),
        ) {
            let size = (mib << 20).next_multiple_of(page.unwrap_or(1));
            let memory = Memory {
                shared,
                hugepages: page.and_then(HugePageSize::new),
                ..Memory::new(size)
            };
            memory.validate().unwrap();
            let ram = memslots::ram_layout(size, layout::MMIO_HOLE).unwrap();
            let mut covered: Vec<(u64, u64)> = Vec::new();
            for slot in memory.slots(&ram, firmware) {
                let (start, len) = (slot.start.0, slot.backing.size());
                prop_assert!(start.is_multiple_of(slot.backing.page_size()));
                prop_assert!(len.is_multiple_of(slot.backing.page_size()));
                match covered.last_mut() {
                    Some((at, before)) if *at + *before == start => *before += len,
                    _ => covered.push((start, len)),
                }
            }
            let ram: Vec<_> = ram.iter().map(|(start, len)| (start.0, *len)).collect();
            prop_assert_eq!(covered, ram);
        }
    }
}
