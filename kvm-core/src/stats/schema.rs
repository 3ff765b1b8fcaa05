// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What statistics there are: the header and the descriptors, read once and checked.

use std::fmt;
use std::ops::Range;

use kvm_bindings as kvm;

use super::{ReadStats, StatsError, StatsPart};

/// `sizeof(struct kvm_stats_header)`: six `u32`.
const HEADER: usize = size_of::<kvm::kvm_stats_header>();
/// `sizeof(struct kvm_stats_desc)`, behind which the name follows.
const DESCRIPTOR: usize = size_of::<kvm::kvm_stats_desc>();
/// A number of the data block.
pub(super) const NUMBER: usize = size_of::<u64>();

/// What the number of a statistic means (`KVM_STATS_TYPE_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A count that only grows (until somebody clears it through debugfs).
    Cumulative,
    /// A value of this moment, which rises and falls.
    Instant,
    /// The highest value that there has been.
    Peak,
    /// Counts of values, in buckets of equal width.
    LinearHistogram,
    /// Counts of values, in buckets that double.
    LogHistogram,
    /// One that this crate does not know.
    Other(u8),
}

/// What is counted (`KVM_STATS_UNIT_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unit {
    /// Things: exits, pages, faults.
    None,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
    /// Clock cycles of the processor.
    Cycles,
    /// 0 is no and 1 is yes.
    Boolean,
    /// One that this crate does not know.
    Other(u8),
}

/// What the exponent is a power of (`KVM_STATS_BASE_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Base {
    /// Ten.
    Ten,
    /// Two.
    Two,
    /// One that this crate does not know.
    Other(u8),
}

/// What a statistic's numbers are in: one of them is worth `base`^`exponent` of `unit`.
///
/// It shows itself as the unit's sign where there is one: `ns` of seconds and 10^-9, `KiB` of bytes and
/// 2^10; plain counts and booleans show nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scale {
    /// The unit.
    pub unit: Unit,
    /// The exponent's base.
    pub base: Base,
    /// The exponent.
    pub exponent: i16,
}

impl Scale {
    /// A number of this scale.
    #[must_use]
    pub const fn of(self, mantissa: i128) -> Scaled {
        Scaled {
            mantissa,
            scale: self,
        }
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match (self.unit, self.base, self.exponent) {
            (Unit::Seconds, Base::Ten, -3) => "ms",
            (Unit::Seconds, Base::Ten, -6) => "µs",
            (Unit::Seconds, Base::Ten, -9) => "ns",
            (Unit::Bytes, Base::Two, 10) => "KiB",
            (Unit::Bytes, Base::Two, 20) => "MiB",
            (Unit::Bytes, Base::Two, 30) => "GiB",
            (unit, base, exponent) => {
                let sign = match unit {
                    Unit::None | Unit::Boolean => "",
                    Unit::Bytes => "bytes",
                    Unit::Seconds => "s",
                    Unit::Cycles => "cycles",
                    Unit::Other(_) => "(unknown unit)",
                };
                let gap = if sign.is_empty() { "" } else { " " };
                return match (base, exponent) {
                    (_, 0) => f.write_str(sign),
                    (Base::Ten, _) => write!(f, "×10^{exponent}{gap}{sign}"),
                    (Base::Two, _) => write!(f, "×2^{exponent}{gap}{sign}"),
                    (Base::Other(_), _) => write!(f, "×(unknown base)^{exponent}{gap}{sign}"),
                };
            }
        };
        f.write_str(sign)
    }
}

/// A number with its scale: `mantissa` × `base`^`exponent` of the unit, exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scaled {
    /// KVM's number, or the difference of two.
    pub mantissa: i128,
    /// What it is in.
    pub scale: Scale,
}

impl Scaled {
    /// It in whole units (seconds, bytes, cycles, or things), to a double's precision. `None` where the
    /// base is one that this crate does not know. Beyond a double's range it is infinite, or zero.
    #[must_use]
    pub fn as_f64(self) -> Option<f64> {
        let exponent = i32::from(self.scale.exponent);
        let base: f64 = match self.scale.base {
            Base::Ten => 10.0,
            Base::Two => 2.0,
            Base::Other(_) if exponent == 0 => 1.0,
            Base::Other(_) => return None,
        };
        let mantissa = self.mantissa as f64;
        // Powers of ten are exact up to 10^22, their inverses never: so divide. 0 × ∞ is no number.
        let power = base.powi(exponent.abs());
        Some(match exponent {
            _ if self.mantissa == 0 => 0.0,
            0.. => mantissa * power,
            _ => mantissa / power,
        })
    }
}

impl fmt::Display for Scaled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = self.scale.to_string();
        match unit.chars().next() {
            None => write!(f, "{}", self.mantissa),
            Some('×') => write!(f, "{}{unit}", self.mantissa),
            Some(_) => write!(f, "{} {unit}", self.mantissa),
        }
    }
}

/// One statistic (`struct kvm_stats_desc`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statistic {
    name: Box<str>,
    flags: u32,
    exponent: i16,
    len: u16,
    offset: u32,
    bucket_size: u32,
}

impl Statistic {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (fixed, name) = bytes.split_at_checked(DESCRIPTOR)?;
        let (flags, rest) = fixed.split_first_chunk()?;
        let (exponent, rest) = rest.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (offset, rest) = rest.split_first_chunk()?;
        let (bucket_size, _) = rest.split_first_chunk()?;
        Some(Self {
            name: text(name),
            flags: u32::from_ne_bytes(*flags),
            exponent: i16::from_ne_bytes(*exponent),
            len: u16::from_ne_bytes(*len),
            offset: u32::from_ne_bytes(*offset),
            bucket_size: u32::from_ne_bytes(*bucket_size),
        })
    }

    /// Its name: `exits`, `halt_wait_hist`. Kernels add names and drop some; those of today are in
    /// `arch/x86/kvm/x86.c` (`kvm_vm_stats_desc`, `kvm_vcpu_stats_desc`) and `kvm_host.h`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Type, unit and base as KVM gives them.
    #[must_use]
    pub const fn flags(&self) -> u32 {
        self.flags
    }

    /// What its number means.
    #[inline]
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self.flags & kvm::KVM_STATS_TYPE_MASK {
            kvm::KVM_STATS_TYPE_CUMULATIVE => Kind::Cumulative,
            kvm::KVM_STATS_TYPE_INSTANT => Kind::Instant,
            kvm::KVM_STATS_TYPE_PEAK => Kind::Peak,
            kvm::KVM_STATS_TYPE_LINEAR_HIST => Kind::LinearHistogram,
            kvm::KVM_STATS_TYPE_LOG_HIST => Kind::LogHistogram,
            other => Kind::Other((other >> kvm::KVM_STATS_TYPE_SHIFT) as u8),
        }
    }

    /// What its numbers are in. Of a histogram, these are the bounds of the buckets; what is counted in
    /// them is times.
    #[must_use]
    pub const fn scale(&self) -> Scale {
        Scale {
            unit: match self.flags & kvm::KVM_STATS_UNIT_MASK {
                kvm::KVM_STATS_UNIT_NONE => Unit::None,
                kvm::KVM_STATS_UNIT_BYTES => Unit::Bytes,
                kvm::KVM_STATS_UNIT_SECONDS => Unit::Seconds,
                kvm::KVM_STATS_UNIT_CYCLES => Unit::Cycles,
                kvm::KVM_STATS_UNIT_BOOLEAN => Unit::Boolean,
                other => Unit::Other((other >> kvm::KVM_STATS_UNIT_SHIFT) as u8),
            },
            base: match self.flags & kvm::KVM_STATS_BASE_MASK {
                kvm::KVM_STATS_BASE_POW10 => Base::Ten,
                kvm::KVM_STATS_BASE_POW2 => Base::Two,
                other => Base::Other((other >> kvm::KVM_STATS_BASE_SHIFT) as u8),
            },
            exponent: self.exponent,
        }
    }

    /// How many numbers it has: 1, or a histogram's buckets.
    #[must_use]
    pub const fn values(&self) -> u16 {
        self.len
    }

    /// The width of a linear histogram's buckets, in its [`scale`](Self::scale); of no meaning elsewhere.
    #[must_use]
    pub const fn bucket_size(&self) -> u32 {
        self.bucket_size
    }

    /// Whether it is a histogram, of either kind.
    #[inline]
    #[must_use]
    pub const fn is_histogram(&self) -> bool {
        matches!(self.kind(), Kind::LinearHistogram | Kind::LogHistogram)
    }

    /// What a histogram's bucket `index` counts, in its [`scale`](Self::scale): values from the first
    /// number on and below the second, `None` being without end, as the last bucket is.
    ///
    /// api.rst: linear buckets are `[0, size)`, `[size, 2 × size)`, …; logarithmic ones `[0, 1)`,
    /// `[1, 2)`, `[2, 4)`, `[4, 8)`, …
    ///
    /// `None` where there is no such bucket: it is no histogram, has fewer, has a linear bucket size of
    /// 0, or its 66th would begin beyond `u64` and can count nothing.
    #[inline]
    #[must_use]
    pub fn bucket_range(&self, index: usize) -> Option<(u64, Option<u64>)> {
        if index >= usize::from(self.len) {
            return None;
        }
        let bound = |index: u64| match self.kind() {
            // At most 2^32 × 2^16.
            Kind::LinearHistogram => {
                (self.bucket_size > 0).then(|| u64::from(self.bucket_size) * index)
            }
            Kind::LogHistogram => match index {
                0 => Some(0),
                _ => 1_u64.checked_shl(u32::try_from(index - 1).ok()?),
            },
            _ => None,
        };
        let start = bound(index as u64)?;
        let last = index + 1 == usize::from(self.len);
        Some((start, if last { None } else { bound(index as u64 + 1) }))
    }

    /// Where its numbers are in the data block.
    #[inline]
    pub(super) fn range(&self) -> Range<usize> {
        // The schema has checked that the end fits.
        let start = self.offset as usize;
        start..start + usize::from(self.len) * NUMBER
    }

    fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.len) * NUMBER as u64
    }
}

/// All statistics of one VM or vCPU, in KVM's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatsSchema {
    id: Box<str>,
    flags: u32,
    statistics: Box<[Statistic]>,
    pub(super) data_offset: u32,
    data_len: usize,
}

impl StatsSchema {
    /// The bytes that the descriptors, and the data, may have at most: 1 MiB. Linux 6.18 has 3 KiB and
    /// 1.1 KiB.
    pub const LIMIT: usize = 1 << 20;

    /// Reads and checks the description in `file`: header, id, descriptors, a read each.
    ///
    /// A name without a NUL is as long as its field; one that is no UTF-8 has U+FFFD for what is not.
    ///
    /// # Errors
    /// [`StatsError::Read`], [`StatsError::Truncated`], [`StatsError::TooLarge`].
    pub fn read(file: &impl ReadStats) -> Result<Self, StatsError> {
        let mut header = [0; HEADER];
        read_whole(file, StatsPart::Header, &mut header, 0)?;
        let mut words = header.chunks_exact(size_of::<u32>()).map(word);
        let mut next = || words.next().unwrap_or(0);
        // The order of struct kvm_stats_header.
        let (flags, name_size, count) = (next(), next(), next());
        let (id_offset, desc_offset, data_offset) = (next(), next(), next());

        let mut id = buffer(StatsPart::Id, name_size.into())?;
        read_whole(file, StatsPart::Id, &mut id, id_offset)?;

        let each = DESCRIPTOR as u64 + u64::from(name_size);
        let bytes = each.saturating_mul(count.into());
        let mut block = buffer(StatsPart::Descriptors, bytes)?;
        read_whole(file, StatsPart::Descriptors, &mut block, desc_offset)?;
        // Neither 0 nor cut short as a usize: `name_size` has passed the limit.
        let statistics: Box<[_]> = block
            .chunks_exact(each as usize)
            .filter_map(Statistic::parse)
            .collect();

        let end = statistics.iter().map(Statistic::end).max().unwrap_or(0);
        Ok(Self {
            id: text(&id),
            flags,
            data_len: within_limit(StatsPart::Data, end)?,
            statistics,
            data_offset,
        })
    }

    /// What the statistics are of: `kvm-812` for a VM, `kvm-812/vcpu-0` for a vCPU, with the number of
    /// the process that made it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The header's flags: 0, so far.
    #[must_use]
    pub const fn flags(&self) -> u32 {
        self.flags
    }

    /// The statistics.
    #[must_use]
    pub const fn statistics(&self) -> &[Statistic] {
        &self.statistics
    }

    /// The index of a statistic, which holds for as long as its reader does. It goes through the names:
    /// who samples often asks once.
    #[must_use]
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.statistics.iter().position(|one| one.name() == name)
    }

    /// The bytes that a sample reads.
    #[must_use]
    pub const fn data_len(&self) -> usize {
        self.data_len
    }

    /// Where in the file they are.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        self.data_offset.into()
    }
}

/// Fills `buf` from `file`, in one read.
pub(super) fn read_whole(
    file: &impl ReadStats,
    part: StatsPart,
    buf: &mut [u8],
    offset: u32,
) -> Result<(), StatsError> {
    let wanted = buf.len();
    match file.read_at(buf, offset.into()) {
        Ok(got) if got == wanted => Ok(()),
        Ok(got) => Err(StatsError::Truncated { part, wanted, got }),
        Err(errno) => Err(StatsError::Read { part, errno }),
    }
}

fn within_limit(part: StatsPart, bytes: u64) -> Result<usize, StatsError> {
    usize::try_from(bytes)
        .ok()
        .filter(|len| *len <= StatsSchema::LIMIT)
        .ok_or(StatsError::TooLarge { part, bytes })
}

fn buffer(part: StatsPart, bytes: u64) -> Result<Vec<u8>, StatsError> {
    Ok(vec![0; within_limit(part, bytes)?])
}

fn word(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |word| u32::from_ne_bytes(*word))
}

/// The text before the first NUL.
fn text(field: &[u8]) -> Box<str> {
    let end = field.iter().position(|byte| *byte == 0);
    let text = &field[..end.unwrap_or(field.len())];
    String::from_utf8_lossy(text).into()
}
