// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which form a serialized state has, and which forms are read: kvm-core's policy, for these states.

#![forbid(unsafe_code)]

/// The version of a state's serialized form, its first field.
///
/// # Policy
/// - A build writes [`StateVersion::CURRENT`] and reads every version from [`StateVersion::OLDEST`] on.
///   Any other is refused with its number: a newer one may hold what this build would lose.
/// - What a version adds has a default that restores as the older version did. What cannot have one
///   makes that version the oldest, and is told in the CHANGELOG.
/// - A field that a version does not know is refused, never skipped.
/// - Defaults need a format that names fields (JSON, CBOR); in one that does not (bincode, postcard)
///   a state is for builds of the same version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(try_from = "u32", into = "u32"))]
pub struct StateVersion(u32);

impl StateVersion {
    /// What is written.
    pub const CURRENT: Self = Self(1);
    /// The oldest that is read.
    pub const OLDEST: Self = Self(1);

    /// The number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl Default for StateVersion {
    fn default() -> Self {
        Self::CURRENT
    }
}

/// A version that this build does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this state has version {0}; versions {oldest} to {newest} are read here: restore it with a build of its own age",
    oldest = StateVersion::OLDEST.0,
    newest = StateVersion::CURRENT.0
)]
pub struct UnknownVersion(pub u32);

impl TryFrom<u32> for StateVersion {
    type Error = UnknownVersion;

    fn try_from(number: u32) -> Result<Self, UnknownVersion> {
        let version = Self(number);
        if (Self::OLDEST..=Self::CURRENT).contains(&version) {
            Ok(version)
        } else {
            Err(UnknownVersion(number))
        }
    }
}

impl From<StateVersion> for u32 {
    fn from(version: StateVersion) -> Self {
        version.0
    }
}
