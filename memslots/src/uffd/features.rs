// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Features`]: what a userfaultfd can do beyond the least, and which kernel brought it.

use std::fmt;
use std::ops::BitOr;

/// A set of `UFFD_FEATURE_…` (userfaultfd(2), linux/userfaultfd.h).
///
/// ```
/// use memslots::uffd::Features;
/// let wanted = Features::POISON | Features::THREAD_ID;
/// let missing = wanted.without(Features::from_bits(0x1fff)); // Linux 6.1
/// assert_eq!(missing.to_string(), "POISON (Linux 6.6)");
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $kernel:literal;)*) => {
        impl Features {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            /// Name and kernel of each known bit.
            const KNOWN: &'static [(Self, &'static str, &'static str)] =
                &[$((Self::$name, stringify!($name), $kernel)),*];
        }
    };
}

features! {
    /// Write-protect faults of anonymous memory.
    PAGEFAULT_FLAG_WP = 0, "5.7";
    /// Told when the process forks; needs `CAP_SYS_PTRACE`. The fork waits until it is read.
    EVENT_FORK = 1, "4.11";
    /// Told of `mremap`, which waits until it is read.
    EVENT_REMAP = 2, "4.11";
    /// Told when pages are given back (`MADV_DONTNEED`, `MADV_REMOVE`), which waits until it is read.
    EVENT_REMOVE = 3, "4.11";
    /// Missing-page faults of hugetlb pages.
    MISSING_HUGETLBFS = 4, "4.11";
    /// Missing-page faults of shared memory.
    MISSING_SHMEM = 5, "4.11";
    /// Told of `munmap`, which waits until it is read.
    EVENT_UNMAP = 6, "4.11";
    /// Who faults gets a SIGBUS, and nobody is asked.
    SIGBUS = 7, "4.14";
    /// A fault says which thread it is.
    THREAD_ID = 8, "4.14";
    /// Minor faults of hugetlb pages.
    MINOR_HUGETLBFS = 9, "5.13";
    /// Minor faults of shared memory.
    MINOR_SHMEM = 10, "5.14";
    /// A fault's address is exact, and not the page's.
    EXACT_ADDRESS = 11, "5.18";
    /// Write-protect faults of shared memory and hugetlb pages.
    WP_HUGETLBFS_SHMEM = 12, "5.19";
    /// Anonymous pages that are not there yet can be write-protected.
    WP_UNPOPULATED = 13, "6.4";
    /// Pages can be poisoned.
    POISON = 14, "6.6";
    /// Write-protection of this descriptor is asynchronous, on any memory: a first write is noted, and nobody asked.
    WP_ASYNC = 15, "6.7";
    /// Pages can be moved in.
    MOVE = 16, "6.8";
}

impl Features {
    /// None.
    pub const NONE: Self = Self(0);

    /// From the raw bits, unknown ones included.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The raw bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `other` are in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those that are in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Each by name, with the first kernel that has it.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut separator = "";
        for (feature, name, kernel) in Self::KNOWN {
            if self.contains(*feature) {
                write!(f, "{separator}{name} (Linux {kernel})")?;
                separator = ", ";
                rest = rest.without(*feature);
            }
        }
        match (rest.is_empty(), separator.is_empty()) {
            (false, _) => write!(f, "{separator}{:#x}", rest.0),
            (true, true) => f.write_str("none"),
            (true, false) => Ok(()),
        }
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Self::KNOWN
            .iter()
            .filter(|(feature, ..)| self.contains(*feature))
            .map(|(_, name, _)| *name);
        write!(f, "{:#x} ", self.0)?;
        f.debug_set().entries(names).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_the_headers_bits_in_order() {
        for (bit, (feature, name, _)) in Features::KNOWN.iter().enumerate() {
            assert_eq!(feature.bits(), 1 << bit, "{name}");
        }
        assert_eq!(Features::KNOWN.len(), 17);
        assert_eq!(Features::NONE.to_string(), "none");
        assert_eq!(Features::from_bits(1 << 40).to_string(), "0x10000000000");
    }
}
