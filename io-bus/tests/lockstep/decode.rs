// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as steps: any bytes are some steps, and small changes of them small changes.

use io_bus::{BusKind, Direction, IoRange, WriteLength, WriteMatch};

use super::{Later, Step, Temper, Way};

/// As many steps as the bytes are enough for.
pub fn steps(bytes: &[u8]) -> impl Iterator<Item = Step> {
    let mut bytes = Bytes(bytes);
    std::iter::from_fn(move || bytes.step()).take(400)
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn below(&mut self, end: u8) -> Option<u8> {
        Some(self.byte()? % end)
    }

    fn flag(&mut self) -> Option<bool> {
        // Seldom: the flags are refusals.
        Some(self.byte()?.is_multiple_of(4))
    }

    fn index(&mut self) -> Option<usize> {
        Some(usize::from(self.byte()?))
    }

    fn bus(&mut self) -> Option<BusKind> {
        Some(BusKind::ALL[usize::from(self.below(4)?)])
    }

    /// Around a few pages' ends, and the ends of the address spaces.
    fn address(&mut self) -> Option<u64> {
        let offset = u64::from(self.below(64)?);
        Some(match self.below(6)? {
            4 => u64::MAX - offset,
            5 => 0xffff - offset,
            page => u64::from(page) * 0x1000 + 0xfe0 + offset,
        })
    }

    fn range(&mut self) -> Option<IoRange> {
        let base = self.address()?;
        Some(match self.below(40)? {
            0 => IoRange::exact(base),
            size => IoRange::new(base, size.into()).unwrap_or(IoRange::exact(base)),
        })
    }

    fn writes(&mut self) -> Option<WriteMatch> {
        Some(match self.below(8)? {
            0 => WriteMatch::Any,
            1 => WriteMatch::Length(WriteLength::One),
            2 => WriteMatch::Length(WriteLength::Four),
            3 => WriteMatch::U8(1),
            4 => WriteMatch::U16(1),
            5 => WriteMatch::U32(1),
            6 => WriteMatch::U32(2),
            _ => WriteMatch::U64(1),
        })
    }

    /// After how many calls the kernel refuses one, or never.
    fn refusal(&mut self) -> Option<Option<usize>> {
        Some(match self.below(12)? {
            n @ 0..6 => Some(n.into()),
            _ => None,
        })
    }

    fn step(&mut self) -> Option<Step> {
        Some(match self.below(16)? {
            0 | 1 => {
                let temper = [Temper::Mild, Temper::Picky, Temper::Slow];
                let temper = temper[usize::from(self.below(3)?)];
                Step::Register(self.bus()?, self.range()?, temper)
            }
            2 => Step::Remove(self.index()?, self.flag()?),
            3 => Step::Move(self.index()?, self.address()?, self.refusal()?),
            4 => {
                let by = 4 * (self.below(7)? as i8 - 3);
                Step::Nudge(self.index()?, by, self.refusal()?)
            }
            5 => {
                let offset = 4 * u64::from(self.below(6)?);
                Step::Attach(self.index()?, offset, self.writes()?, self.flag()?)
            }
            6 => Step::Detach(self.index()?, self.index()?, self.flag()?),
            7..=10 => {
                let way = match self.below(4)? {
                    0 => Way::Plain(self.bus()?),
                    3 => Way::Repeated(self.below(5)?.into()),
                    _ => Way::Mmio,
                };
                let direction = match self.below(2)? {
                    0 => Direction::Read,
                    _ => Direction::Write,
                };
                let later = match self.below(6)? {
                    0 => Later::Decline,
                    1 => Later::Drop,
                    2 => Later::Abandon,
                    _ => Later::Complete,
                };
                Step::Access(
                    way,
                    direction,
                    self.address()?,
                    self.below(21)?.into(),
                    later,
                )
            }
            11 => {
                let bus = [BusKind::Mmio, BusKind::Pio][usize::from(self.below(2)?)];
                Step::Coalesced(bus, self.address()?, self.index()?)
            }
            12 => Step::BeforeExit,
            13 => match self.flag()? {
                true => Step::EndZone(self.index()?, self.flag()?),
                false => Step::Zone(self.bus()?, self.range()?, self.flag()?),
            },
            14 => Step::Count(!self.flag()?),
            _ => Step::Trace(!self.flag()?),
        })
    }
}
