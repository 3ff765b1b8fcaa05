// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How KVM logs what the guest writes, when somebody asks ([`tracking`](crate::vm::tracking)): `--dirty-log`.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use dirty_log::{LogChoice, RingSize};
use serde::Deserialize;

/// Entries of a vCPU's ring where none were asked for: 1 MiB, the largest that KVM makes. A software KVM overruns smaller
/// ones.
const ENTRIES: u32 = 1 << 16;

/// A log's kind, for as long as the machine lives: KVM lets nobody change it, and has only one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum DirtyLogKind {
    /// A bit for each page: with manual protect where the host has it.
    #[default]
    Bitmap,
    /// A list for each vCPU, of so many entries: a look costs what was written and not what there is, and a vCPU whose
    /// list is full waits until it has been read.
    Ring(RingSize),
}

impl DirtyLogKind {
    /// What is chosen when the VM is made.
    pub(crate) fn at_creation(self) -> LogChoice {
        match self {
            // Manual protect is chosen when tracking begins.
            DirtyLogKind::Bitmap => LogChoice::Bitmap,
            DirtyLogKind::Ring(size) => LogChoice::Ring(size),
        }
    }
}

impl FromStr for DirtyLogKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ring = |entries| RingSize::new(entries).map(DirtyLogKind::Ring);
        match text.split_once('=') {
            None if text == "bitmap" => Ok(DirtyLogKind::Bitmap),
            None if text == "ring" => ring(ENTRIES).map_err(|error| error.to_string()),
            Some(("ring", entries)) => match entries.parse() {
                Ok(entries) => ring(entries).map_err(|error| format!("{text:?}: {error}")),
                Err(_) => Err(format!("{text:?}: ring=ENTRIES wants a number")),
            },
            _ => Err(format!("{text:?} is not one of bitmap, ring, ring=ENTRIES")),
        }
    }
}

impl TryFrom<String> for DirtyLogKind {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// As it is read.
impl fmt::Display for DirtyLogKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DirtyLogKind::Bitmap => f.write_str("bitmap"),
            DirtyLogKind::Ring(size) => write!(f, "ring={}", size.entries()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_read_as_it_is_written_and_nothing_else_is_one() {
        for text in ["bitmap", "ring=65536", "ring=1024"] {
            assert_eq!(text.parse::<DirtyLogKind>().unwrap().to_string(), text);
        }
        assert_eq!("ring".parse(), "ring=65536".parse::<DirtyLogKind>());
        for (text, needle) in [
            ("rings", "\"rings\""),
            ("", "\"\""),
            ("ring=", "a number"),
            ("ring=x", "\"ring=x\""),
            ("ring=1000", "1000"),
        ] {
            let error = text.parse::<DirtyLogKind>().unwrap_err();
            assert!(error.contains(needle), "{text}: {error}");
        }
    }
}
