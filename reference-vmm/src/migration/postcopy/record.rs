// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What followed a guest that went before its memory, as plain data: a part of [`MigrationRecord`].

#![forbid(unsafe_code)]

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::serve::Served;
use super::{Faults, LastWord};
use crate::migration::record::{MigrationRecord, micros};
use crate::text::printable;
use crate::units;

/// Memory that follows the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Followed {
    /// When the switch was, since the migration's beginning.
    #[serde(rename = "began-us", with = "micros")]
    pub began: Duration,
    /// Pages that the destination did not have, or not as they were.
    pub missing_pages: u64,
    /// Pages that were asked for because somebody waited for them, or for one near.
    pub demand_pages: u64,
    /// Pages that were asked for before.
    pub bulk_pages: u64,
    /// Of both, those that were nothing but zeros, of which only that was told.
    #[serde(default)]
    pub zero_pages: u64,
    /// Bytes of both; pieces of zeros have none.
    pub bytes: u64,
    /// Why nobody can ask now, in one line: the connection is made again and again.
    pub broken: Option<String>,
    /// Where connections go, if that was said behind the switch (`ctl migrate-recover`).
    #[serde(default)]
    pub recovered_to: Option<String>,
    /// When the destination wanted no more, since the migration's beginning.
    #[serde(rename = "ended-us", with = "micros::optional")]
    pub ended: Option<Duration>,
    /// How long those waited at the destination who waited.
    pub faults: Option<Faults>,
    /// Why the destination wanted no more before it had all, in one line.
    #[serde(default)]
    pub unwanted: Option<String>,
}

impl Followed {
    /// Pages that are left.
    pub fn pages_left(&self) -> u64 {
        match self.ended {
            Some(_) => 0,
            None => (self.missing_pages).saturating_sub(self.demand_pages + self.bulk_pages),
        }
    }

    /// Of a migration that is under way, in the line of its progress.
    pub(in crate::migration) fn far(&self) -> String {
        let left = units::bytes(units::pages(self.pages_left()));
        let broken = match &self.broken {
            None => String::new(),
            Some(why) => format!(
                ", no connection, tries again ({}); if it is elsewhere now: ctl migrate-recover",
                printable(why)
            ),
        };
        format!("the guest has gone, and {left} of its memory are to follow it still{broken}")
    }

    /// A line in words.
    pub(in crate::migration) fn words(&self) -> String {
        let mut text = format!(
            "post-copy: {} pages were missing; {} were sent because somebody waited, {} before anybody asked ({} of both were \
             zeros)",
            units::count(self.missing_pages),
            units::count(self.demand_pages),
            units::count(self.bulk_pages),
            units::count(self.zero_pages)
        );
        if let Some(ended) = self.ended {
            let took = ended.saturating_sub(self.began);
            let took = units::time(took);
            text += &match &self.unwanted {
                None => format!("; all there after {took}"),
                Some(why) => format!("; no more was wanted after {took}: {}", printable(why)),
            };
        }
        if let Some(faults) = self.faults.filter(|faults| faults.count > 0) {
            let of = |nanos| units::time(Duration::from_nanos(nanos));
            text += &format!(
                "; {} faults, half within {}, 99 of 100 within {}, the longest {}",
                units::count(faults.count),
                of(faults.p50_ns),
                of(faults.p99_ns),
                of(faults.max_ns)
            );
        }
        if let Some(to) = &self.recovered_to {
            text += &format!("; its connections went to {} at last", printable(to));
        }
        if let Some(why) = &self.broken {
            text += &format!("; nobody can ask now: {}", printable(why));
        }
        text
    }
}

impl MigrationRecord {
    /// The guest goes before its memory, of which so many pages are missing there.
    pub fn goes_before(&mut self, at: Duration, missing_pages: u64) {
        self.postcopy = Some(Followed {
            began: at,
            missing_pages,
            ..Followed::default()
        });
    }

    /// So much of it has been served, and `broken` says why no more is. Nothing happens where the guest did not go before its memory.
    pub fn served(&mut self, at: Duration, served: Served, broken: Option<&str>) {
        let Some(of) = &mut self.postcopy else {
            return;
        };
        let before = of.demand_pages + of.bulk_pages;
        let (pages, zero, bytes) = (
            (served.demand + served.bulk).saturating_sub(before),
            served.zero.saturating_sub(of.zero_pages),
            served.bytes.saturating_sub(of.bytes),
        );
        (of.demand_pages, of.bulk_pages) = (served.demand, served.bulk);
        (of.zero_pages, of.bytes) = (served.zero, served.bytes);
        of.broken = broken.map(str::to_owned);
        self.sent(at, pages, zero, bytes);
    }

    /// All of it is there, or no more of it is wanted.
    pub fn no_more_is_wanted(&mut self, at: Duration, word: &LastWord) {
        if let Some(of) = &mut self.postcopy {
            (of.ended, of.faults, of.broken) = (Some(at), Some(word.faults), None);
            of.unwanted = (word.missing + word.lost > 0).then(|| word.why.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_is_said_with_its_numbers() {
        let mut followed = Followed {
            began: Duration::from_secs(1),
            missing_pages: 1000,
            demand_pages: 40,
            bulk_pages: 460,
            zero_pages: 12,
            broken: Some("the line\nis cut".into()),
            ..Followed::default()
        };
        assert_eq!(followed.pages_left(), 500);
        let far = followed.far();
        assert!(
            far.contains("and 1.95 MiB of its memory are to follow it still"),
            "{far}"
        );
        assert!(far.contains(r"the line\nis cut"), "{far}");
        followed.ended = Some(Duration::from_secs(3));
        followed.broken = None;
        followed.faults = Some(Faults {
            count: 7,
            p50_ns: 1_000_000,
            p99_ns: 2_000_000,
            max_ns: 3_000_000,
        });
        assert_eq!(followed.pages_left(), 0);
        followed.unwanted = Some("it powered\noff".into());
        let words = followed.words();
        let ended = r"no more was wanted after 2.00 s: it powered\noff";
        assert!(words.contains(ended), "{words}");
        followed.unwanted = None;
        let words = followed.words();
        assert!(words.contains("all there after"), "{words}");
        for needle in [
            "1,000 pages were missing",
            "40 were sent because somebody waited, 460 before anybody asked (12 of both were zeros)",
            "after 2.00 s",
            "7 faults",
        ] {
            assert!(words.contains(needle), "{words}");
        }
    }
}
