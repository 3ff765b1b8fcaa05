// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Huge pages of the hugetlb pools: their sizes, and what a pool has left.

use std::fmt;
use std::fs;
use std::path::Path;

/// Where the kernel shows its pools.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// A size of hugetlb pages. Which ones a host has, `/sys/kernel/mm/hugepages` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HugePageSize {
    shift: u32,
}

impl HugePageSize {
    /// 2 MiB, on x86-64 and on arm64 with pages of 4 KiB.
    pub const MIB_2: Self = Self { shift: 21 };
    /// 1 GiB, likewise.
    pub const GIB_1: Self = Self { shift: 30 };

    /// Pages of `bytes`; `None` unless it is a power of two above 4096 (arm64 has 64 KiB, 32 MiB and others).
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes > crate::PAGE_SIZE {
            Some(Self {
                shift: bytes.trailing_zeros(),
            })
        } else {
            None
        }
    }

    /// The sizes that the host has pools of, the least first: they may be empty, as [`HugePool::of_host`] tells. None
    /// without hugetlb pages, or without sysfs.
    pub fn of_host() -> Vec<Self> {
        let pools = fs::read_dir(POOLS).into_iter().flatten().flatten();
        let mut sizes: Vec<_> = pools
            .filter_map(|pool| Self::of_directory(pool.file_name().to_str()?))
            .collect();
        sizes.sort_unstable();
        sizes
    }

    /// Whose directory has this name, as `hugepages-2048kB`.
    fn of_directory(name: &str) -> Option<Self> {
        let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
        Self::new(kib.parse::<u64>().ok()?.checked_mul(1 << 10)?)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// As `mmap` and `memfd_create` take it: log2 in bits 26 to 31 of their flags.
    pub(super) const fn flag(self) -> u32 {
        self.shift << libc::MAP_HUGE_SHIFT
    }

    pub(super) fn directory(self) -> String {
        format!("{POOLS}/hugepages-{}kB", self.bytes() >> 10)
    }
}

impl fmt::Display for HugePageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shift {
            30.. => write!(f, "{} GiB", self.bytes() >> 30),
            20.. => write!(f, "{} MiB", self.bytes() >> 20),
            _ => write!(f, "{} KiB", self.bytes() >> 10),
        }
    }
}

/// A pool of huge pages, as sysfs shows it (Documentation/admin-guide/mm/hugetlbpage.rst). All in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugePool {
    /// `nr_hugepages`: all of the pool, surplus included.
    pub total: u64,
    /// `free_hugepages`: in no mapping.
    pub free: u64,
    /// `resv_hugepages`: free, and promised to mappings.
    pub reserved: u64,
    /// `surplus_hugepages`: beyond the persistent ones.
    pub surplus: u64,
    /// `nr_overcommit_hugepages`: how many surplus ones there may be.
    pub overcommit: u64,
}

impl HugePool {
    /// The pool of the host. `None` where it has no pages of this size, or shows none (no sysfs in a jail).
    pub fn of_host(page_size: HugePageSize) -> Option<Self> {
        Self::read(Path::new(&page_size.directory()))
    }

    fn read(directory: &Path) -> Option<Self> {
        let number = |name: &str| {
            let text = fs::read_to_string(directory.join(name)).ok()?;
            text.trim().parse().ok()
        };
        Some(Self {
            total: number("nr_hugepages")?,
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
            surplus: number("surplus_hugepages")?,
            overcommit: number("nr_overcommit_hugepages")?,
        })
    }

    /// How many pages there are for a mapping made now, without a surplus one.
    pub(super) const fn ready(&self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }

    /// How many pages a mapping made now could get, if the host has the memory for the surplus ones among them.
    pub const fn available(&self) -> u64 {
        self.ready()
            .saturating_add(self.overcommit.saturating_sub(self.surplus))
    }

    pub(super) fn describe(pool: Option<Self>, page_size: HugePageSize) -> String {
        let directory = page_size.directory();
        match pool {
            Some(pool) => format!(
                "{} to be had ({} in all, {} free, {} of those reserved, {} surplus of {} allowed): raise \
                 {directory}/nr_hugepages",
                pool.available(),
                pool.total,
                pool.free,
                pool.reserved,
                pool.surplus,
                pool.overcommit,
            ),
            None => format!("and the host has fewer: raise {directory}/nr_hugepages"),
        }
    }
}

/// If sysfs is there and says that the host has no pages of this size: those that it has.
pub(super) fn missing(page_size: HugePageSize) -> Option<Vec<HugePageSize>> {
    let is_missing = Path::new(POOLS).is_dir() && !Path::new(&page_size.directory()).is_dir();
    is_missing.then(HugePageSize::of_host)
}

/// Sizes for a message.
pub(super) fn list(sizes: &[HugePageSize]) -> String {
    match sizes {
        [] => "no size".to_owned(),
        sizes => {
            let sizes: Vec<_> = sizes.iter().map(HugePageSize::to_string).collect();
            sizes.join(", ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_a_power_of_two_above_a_page() {
        assert_eq!(HugePageSize::new(2 << 20), Some(HugePageSize::MIB_2));
        assert_eq!(HugePageSize::new(1 << 30), Some(HugePageSize::GIB_1));
        for bytes in [0, 1, 4096, 3 << 20, u64::MAX] {
            assert_eq!(HugePageSize::new(bytes), None, "{bytes:#x}");
        }
        let text = |bytes| HugePageSize::new(bytes).map(|size| size.to_string());
        assert_eq!(text(64 << 10).as_deref(), Some("64 KiB"));
        assert_eq!(text(2 << 20).as_deref(), Some("2 MiB"));
        assert_eq!(text(1 << 30).as_deref(), Some("1 GiB"));
        assert_eq!(HugePageSize::MIB_2.flag(), libc::MAP_HUGE_2MB as u32);
        assert_eq!(HugePageSize::GIB_1.flag(), libc::MAP_HUGE_1GB as u32);
    }

    #[test]
    fn a_pools_directory_tells_its_size() {
        assert_eq!(
            HugePageSize::of_directory("hugepages-2048kB"),
            Some(HugePageSize::MIB_2)
        );
        for name in ["hugepages-3kB", "hugepages-x", "hugepages-2048", "2048kB"] {
            assert_eq!(HugePageSize::of_directory(name), None, "{name}");
        }
        for size in HugePageSize::of_host() {
            assert_eq!(missing(size), None, "{size}");
        }
        assert_eq!(
            list(&[HugePageSize::MIB_2, HugePageSize::GIB_1]),
            "2 MiB, 1 GiB"
        );
        assert_eq!(list(&[]), "no size");
    }

    #[test]
    fn what_is_available_leaves_out_what_is_promised() {
        let pool = HugePool {
            total: 8,
            free: 5,
            reserved: 2,
            surplus: 1,
            overcommit: 4,
        };
        assert_eq!((pool.ready(), pool.available()), (3, 6));
        let odd = HugePool {
            free: 1,
            reserved: 3,
            surplus: 9,
            ..HugePool::default()
        };
        assert_eq!((odd.ready(), odd.available()), (0, 0));
    }

    #[test]
    fn a_pool_is_read_whole_or_not_at_all() {
        let directory = std::env::temp_dir().join(format!("memslots-pool-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let names = [
            "nr_hugepages",
            "free_hugepages",
            "resv_hugepages",
            "surplus_hugepages",
            "nr_overcommit_hugepages",
        ];
        for (value, name) in names.iter().enumerate() {
            assert_eq!(HugePool::read(&directory), None);
            fs::write(directory.join(name), format!("{}\n", value + 1)).unwrap();
        }
        let expected = HugePool {
            total: 1,
            free: 2,
            reserved: 3,
            surplus: 4,
            overcommit: 5,
        };
        assert_eq!(HugePool::read(&directory), Some(expected));
        fs::remove_dir_all(&directory).unwrap();
    }
}
