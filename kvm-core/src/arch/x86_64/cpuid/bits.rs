// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The written form of an edit of 32 bits: a pattern of `0`, `1` and `x`.

use std::fmt;
use std::str::FromStr;

/// Which bits to set and which to clear; the others are left. As text `0b` and 32 characters, bit 31
/// first: `1` sets, `0` clears, `x` leaves, and `_` may stand between any two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitPattern {
    set: u32,
    clear: u32,
}

/// Why text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitPatternError {
    /// It does not begin with `0b`.
    #[error("bit pattern {0:?}: it begins with 0b")]
    Prefix(String),
    /// A character that has no meaning.
    #[error("bit pattern {pattern:?}: {found:?} is not 0, 1, x or _")]
    Character {
        /// The text.
        pattern: String,
        /// What is in it.
        found: char,
    },
    /// Too few bits, or too many.
    #[error("bit pattern {pattern:?}: it has {found} bits, and a register has 32")]
    Length {
        /// The text.
        pattern: String,
        /// How many it has.
        found: usize,
    },
}

impl BitPattern {
    /// Sets and clears these bits; `None` where a bit is in both.
    #[must_use]
    pub const fn new(set: u32, clear: u32) -> Option<Self> {
        match set & clear {
            0 => Some(Self { set, clear }),
            _ => None,
        }
    }

    /// The register is to have this value.
    #[must_use]
    pub const fn value(value: u32) -> Self {
        Self {
            set: value,
            clear: !value,
        }
    }

    /// The bits that it sets.
    #[must_use]
    pub const fn set(self) -> u32 {
        self.set
    }

    /// The bits that it clears.
    #[must_use]
    pub const fn clear(self) -> u32 {
        self.clear
    }

    /// What becomes of a register.
    #[must_use]
    pub const fn apply(self, word: u32) -> u32 {
        word & !self.clear | self.set
    }
}

impl FromStr for BitPattern {
    type Err = BitPatternError;

    fn from_str(text: &str) -> Result<Self, BitPatternError> {
        let shown = || text.chars().take(80).collect::<String>();
        let bits = text
            .strip_prefix("0b")
            .ok_or_else(|| BitPatternError::Prefix(shown()))?;
        let (mut pattern, mut found) = (Self::default(), 0);
        for character in bits.chars().filter(|character| *character != '_') {
            let (set, clear) = match character {
                '1' => (1, 0),
                '0' => (0, 1),
                'x' => (0, 0),
                found => {
                    let pattern = shown();
                    return Err(BitPatternError::Character { pattern, found });
                }
            };
            // What there is too much of falls out at the top.
            pattern.set = pattern.set << 1 | set;
            pattern.clear = pattern.clear << 1 | clear;
            found += 1;
        }
        if found != 32 {
            let pattern = shown();
            return Err(BitPatternError::Length { pattern, found });
        }
        Ok(pattern)
    }
}

/// The text that [`FromStr`] takes, in groups of eight.
impl fmt::Display for BitPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        for bit in (0..32).rev() {
            let mask = 1 << bit;
            f.write_str(match (self.set & mask, self.clear & mask) {
                (0, 0) => "x",
                (0, _) => "0",
                _ => "1",
            })?;
            if bit % 8 == 0 && bit > 0 {
                f.write_str("_")?;
            }
        }
        Ok(())
    }
}
