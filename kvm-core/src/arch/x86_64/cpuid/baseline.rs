// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The levels of the x86-64 psABI as processor models: what programs compiled for a level need, and no
//! other instructions.

use std::fmt;
use std::str::FromStr;

/// A level of the x86-64 psABI (its table 3.1), each with all instructions of those before it.
///
/// As a [`Template`](super::Template) it is the promise that a guest's programs run on every host that
/// has the level: instructions beyond it are hidden. What is the operating system's (paging, interrupts,
/// mitigations, XSAVE, random numbers, time) stays the host's: [`FeatureKind`](super::FeatureKind) draws
/// the line. What one host has of these and another has not, a guest that moves between the two must not
/// see: take [`Template::without`](super::Template::without) for each such feature of any of the hosts
/// (`reference-vmm cpu --json` on each, or [`differences`](super::differences), shows what it has).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Baseline {
    /// Every 64-bit processor: SSE2.
    V1,
    /// About 2009: SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// About 2015: AVX2, BMI2, FMA.
    V3,
    /// AVX-512 of servers since 2017.
    V4,
}

const V1: &[&str] = &[
    "fpu", "cx8", "cmov", "mmx", "fxsr", "sse", "sse2", "syscall", "lm",
];
const V2: &[&str] = &[
    "pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt", "lahf_lm",
];
/// `xsave` is what OSXSAVE needs: that bit is the running system's.
const V3: &[&str] = &[
    "xsave", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe",
];
const V4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];

impl Baseline {
    /// All, ascending.
    pub const ALL: [Self; 4] = [Self::V1, Self::V2, Self::V3, Self::V4];

    /// What a command line calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V1 => "x86-64-v1",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// The names of the features that programs of this level use.
    pub fn features(self) -> impl Iterator<Item = &'static str> {
        let levels = match self {
            Self::V1 => &[V1][..],
            Self::V2 => &[V1, V2],
            Self::V3 => &[V1, V2, V3],
            Self::V4 => &[V1, V2, V3, V4],
        };
        levels.iter().copied().flatten().copied()
    }
}

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no baseline's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no processor model: x86-64-v1, -v2, -v3 or -v4, or host")]
pub struct UnknownBaseline(pub String);

impl FromStr for Baseline {
    type Err = UnknownBaseline;

    fn from_str(name: &str) -> Result<Self, UnknownBaseline> {
        let found = Self::ALL.into_iter().find(|level| level.name() == name);
        found.ok_or_else(|| UnknownBaseline(name.chars().take(80).collect()))
    }
}
