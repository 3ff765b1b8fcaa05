// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Modes`]: which faults of a range are told.

use super::{Features, RegisterError};
use crate::{Mechanism, MemoryKind, Support};
use std::fmt;
use std::ops::BitOr;

/// A set of registration modes (`UFFDIO_REGISTER_MODE_…`).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Modes(u8);

impl Modes {
    /// None.
    pub const NONE: Self = Self(0);
    /// A touch of a page that is not there waits ([`FillRole`](super::FillRole)).
    pub const MISSING: Self = Self(1 << 0);
    /// A write to a protected page waits ([`ProtectRole`](super::ProtectRole)).
    pub const WRITE_PROTECT: Self = Self(1 << 1);
    /// A touch of a page waits that the page cache has and the mapping has not ([`FillRole`](super::FillRole)).
    pub const MINOR: Self = Self(1 << 2);
    /// A write to a protected page takes its protection away and does not wait: `PAGEMAP_SCAN` finds those written. A
    /// descriptor does this or [`WRITE_PROTECT`](Self::WRITE_PROTECT), by [`Features::WP_ASYNC`].
    pub const ASYNC_WRITE_PROTECT: Self = Self(1 << 3);

    const NAMED: [(Self, &'static str, Mechanism); 4] = [
        (Self::MISSING, "MISSING", Mechanism::Missing),
        (
            Self::WRITE_PROTECT,
            "WRITE_PROTECT",
            Mechanism::WriteProtect,
        ),
        (Self::MINOR, "MINOR", Mechanism::Minor),
        (
            Self::ASYNC_WRITE_PROTECT,
            "ASYNC_WRITE_PROTECT",
            Mechanism::AsyncWriteProtect,
        ),
    ];

    /// Whether all of `other` are in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether some of `other` are in it.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The bits of the ioctl: the two kinds of write-protection are one there.
    pub(super) const fn to_kernel(self) -> u64 {
        let protect = (self.0 & Self::ASYNC_WRITE_PROTECT.0) >> 2;
        (self.0 & 0b111 | protect) as u64
    }

    /// Whether memory of this kind can be registered so with a descriptor of these features, those that the kernel has
    /// and those that are on.
    pub(super) fn check(
        self,
        kind: MemoryKind,
        available: Features,
        enabled: Features,
    ) -> Result<(), RegisterError> {
        if self.is_empty() {
            return Err(RegisterError::NoMode);
        }
        for (mode, _, mechanism) in Self::NAMED {
            if !self.contains(mode) {
                continue;
            }
            kind.check(mechanism)?;
            if let Support::Feature(bit) = kind.support(mechanism) {
                let feature = Features::from_bits(bit);
                if !available.contains(feature) {
                    return Err(RegisterError::Feature {
                        mechanism,
                        kind,
                        feature,
                    });
                }
            }
            let asynchronous = enabled.contains(Features::WP_ASYNC);
            let wrong = match mechanism {
                Mechanism::WriteProtect => asynchronous,
                Mechanism::AsyncWriteProtect => !asynchronous,
                _ => false,
            };
            if wrong {
                return Err(RegisterError::Synchrony { wanted: mechanism });
            }
        }
        Ok(())
    }
}

impl BitOr for Modes {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Modes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Self::NAMED
            .iter()
            .filter(|(mode, ..)| self.contains(*mode))
            .map(|(_, name, _)| *name);
        match names.collect::<Vec<_>>().join(" | ").as_str() {
            "" => f.write_str("NONE"),
            names => f.write_str(names),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_protections_are_one_bit_of_the_kernel() {
        assert_eq!(Modes::MISSING.to_kernel(), 1);
        assert_eq!(Modes::WRITE_PROTECT.to_kernel(), 2);
        assert_eq!(Modes::MINOR.to_kernel(), 4);
        assert_eq!(Modes::ASYNC_WRITE_PROTECT.to_kernel(), 2);
        assert_eq!((Modes::MISSING | Modes::ASYNC_WRITE_PROTECT).to_kernel(), 3);
    }

    #[test]
    fn what_a_kernel_lacks_is_named_with_the_kernel_that_has_it() {
        let linux_5_13 = Features::from_bits(0x3ff);
        let refused = |modes: Modes, kind, features| {
            modes
                .check(kind, features, features)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            refused(Modes::MINOR, MemoryKind::Shmem, linux_5_13),
            "minor faults on shared memory (memfd, tmpfs) needs the userfaultfd feature MINOR_SHMEM (Linux 5.14)"
        );
        let asynchronous = refused(
            Modes::WRITE_PROTECT,
            MemoryKind::Anonymous,
            Features::from_bits(0x1ffff),
        );
        assert!(asynchronous.contains("WP_ASYNC"), "{asynchronous}");
        assert!(
            Modes::MISSING
                .check(MemoryKind::External, Features::NONE, Features::NONE)
                .is_ok()
        );
    }
}
