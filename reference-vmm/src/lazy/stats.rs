// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far memory has come, and what that took.

use std::fmt;
use std::time::Duration;

use async_pf::pager;
use serde::Serialize;
use serde_json::Value;

use crate::text::printable;

/// How far memory has come. Pages are of the size that the memory has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LazyProgress {
    /// What is being done.
    pub state: LazyState,
    /// All pages; of a handler in another process nothing more is known.
    pub pages: u64,
    /// Those that have to come still.
    pub missing: Option<u64>,
    /// Those that will not come.
    pub lost: Option<u64>,
    /// Seconds for which a migration's source has been waited for, whose connection broke.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for_source_s: Option<u64>,
    /// While that is so: for so many seconds, from its touch on, who touches what is missing waits for it, and then it is lost
    /// (the page deadline). What nobody touches is waited for without an end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_given_up_after_s: Option<u64>,
    /// The page server that is waited for, while it is away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for_server: Option<ServerAway>,
    /// What a record of what a guest touches first was good for, where one was read ahead by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetHelp>,
}

/// What a recorded working set was good for, pages of 4 KiB. What was read ahead nobody sees the guest touch; so of what was
/// recorded one page in 32 is not, and stands for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct WorkingSetHelp {
    /// Pages that were read ahead for it.
    pub read_ahead: u64,
    /// About so many the guest has touched while that was looked at, for a second at most; none where that is not known, or
    /// not yet.
    pub touched: Option<u64>,
    /// Of them, about so many were recorded.
    pub had: Option<u64>,
}

impl fmt::Display for WorkingSetHelp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let read_ahead = self.read_ahead;
        write!(f, "a recorded working set: {read_ahead} pages read ahead")?;
        match (self.touched, self.had) {
            (Some(touched), Some(had)) => {
                let percent = u128::from(had) * 100 / u128::from(touched.max(1));
                write!(f, "; of about {touched} touched it had {had} ({percent} %)")
            }
            _ => Ok(()),
        }
    }
}

/// A page server that is away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ServerAway {
    /// Where it listened.
    pub address: String,
    /// For so many seconds.
    pub away_s: u64,
    /// After so many it is given up, and what is missing is lost.
    pub given_up_after_s: u64,
}

impl LazyProgress {
    /// Whether what is missing waits for somebody who is away.
    pub fn is_cut_off(&self) -> bool {
        self.waits_for_source_s.is_some() || self.waits_for_server.is_some()
    }

    /// As it is said of a guest, behind its state; nothing where memory is all there.
    pub(crate) fn words(&self) -> Option<String> {
        coming(&serde_json::to_value(self).ok()?)
    }
}

/// Whether memory is still coming.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LazyState {
    /// What is touched is recorded, and nothing else is brought.
    Recording,
    /// It comes.
    Bringing,
    /// All of it is there.
    Whole,
    /// Some of it will not come.
    Damaged,
    /// Another process brings it.
    External,
    /// The machine ended before.
    Ended,
}

/// What is said of `lazy` in a monitor's answer to `GET /`, behind its state; nothing where memory is all there.
pub(crate) fn coming(lazy: &Value) -> Option<String> {
    let number = |of: &str| lazy[of].as_u64();
    let pages = number("pages")?;
    match (lazy["state"].as_str()?, number("missing")) {
        ("whole", _) => None,
        ("external", _) => Some(", its memory comes from another process".into()),
        (_, Some(missing)) => {
            let lost = match number("lost") {
                None | Some(0) => String::new(),
                Some(lost) => format!(", {lost} pages are lost"),
            };
            let lost_pages = number("lost").unwrap_or_default();
            let there = pages.saturating_sub(missing).saturating_sub(lost_pages);
            // In numbers that hold it, whatever they are.
            let percent = u128::from(there) * 100 / u128::from(pages.max(1));
            let server = &lazy["waits-for-server"];
            let of = |name: &str| server[name].as_u64().unwrap_or_default();
            let waits = match (number("waits-for-source-s"), server["address"].as_str()) {
                (None, None) => String::new(),
                (Some(since), _) => {
                    let until = number("source-given-up-after-s")
                        .map_or_else(String::new, |after| {
                            format!("; who touches that waits for {after} s at most")
                        });
                    format!(
                        ", and the rest waits for the migration's source, whose connection broke {since} s ago and which \
                         makes a new one by itself{until}"
                    )
                }
                (None, Some(address)) => format!(
                    ", and the rest waits for the page server at {}, away for {} s, given up after {} s",
                    printable(address),
                    of("away-s"),
                    of("given-up-after-s")
                ),
            };
            let recording = match lazy["state"].as_str() {
                Some("recording") => ", what it touches first is recorded",
                _ => "",
            };
            Some(format!(
                "{recording}, {percent} % of its memory is there{lost}{waits}"
            ))
        }
        (_, None) => None,
    }
}

/// What was done, in numbers. Pages are of the size that the memory has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LazyStats {
    /// How far it has come.
    pub progress: LazyProgress,
    /// Pages that were brought because someone waited for them, or for one near.
    pub by_fault: u64,
    /// Pages that were brought before.
    pub ahead: u64,
    /// Of both, pages of zeros, which took no memory.
    pub zeros: u64,
    /// Faults on pages that were missing.
    pub faults: u64,
    /// Faults on pages that were under way.
    pub joined: u64,
    /// Reads of the source.
    pub fetches: u64,
    /// Reads that were tried again.
    pub retries: u64,
    /// Pages that were given back.
    pub removed: u64,
    /// How long faults waited: nanoseconds that half of them took at most, 99 of 100, and all.
    pub latency_p50_ns: u64,
    /// See there.
    pub latency_p99_ns: u64,
    /// See there.
    pub latency_max_ns: u64,
    /// How many faults took less than so many nanoseconds, and as long as the entry before it or longer.
    pub latency: Vec<(u64, u64)>,
    /// Microseconds until all of it was there.
    pub took_us: Option<u64>,
}

fn nanos(of: Duration) -> u64 {
    u64::try_from(of.as_nanos()).unwrap_or(u64::MAX)
}

impl LazyStats {
    pub(super) fn of(progress: LazyProgress, stats: &pager::Stats, took: Option<Duration>) -> Self {
        let latency = &stats.latency;
        LazyStats {
            progress,
            by_fault: stats.placed.saturating_sub(stats.ahead),
            ahead: stats.ahead,
            zeros: stats.zeros,
            faults: stats.faults,
            joined: stats.joined,
            fetches: stats.fetches,
            retries: stats.retries,
            removed: stats.removed,
            latency_p50_ns: nanos(latency.percentile(50.0)),
            latency_p99_ns: nanos(latency.percentile(99.0)),
            latency_max_ns: nanos(latency.max()),
            latency: latency
                .buckets()
                .map(|(below, count)| (nanos(below), count))
                .collect(),
            took_us: took.map(|took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
        }
    }
}

/// A time in the unit in which it is short.
fn short(nanos: u64) -> String {
    match nanos {
        0..1_000 => format!("{nanos} ns"),
        1_000..1_000_000 => format!("{:.1} us", nanos as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", nanos as f64 / 1e6),
        _ => format!("{:.1} s", nanos as f64 / 1e9),
    }
}

impl fmt::Display for LazyStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LazyProgress {
            state,
            pages,
            missing,
            lost,
            ..
        } = &self.progress;
        write!(f, "memory that came later: {pages} pages, ")?;
        match state {
            LazyState::External => return writeln!(f, "brought by another process"),
            LazyState::Whole => {
                let took = self.took_us.unwrap_or_default();
                writeln!(f, "all there after {:.1} ms", took as f64 / 1e3)?;
            }
            _ => {
                let (missing, lost) = (missing.unwrap_or_default(), lost.unwrap_or_default());
                writeln!(f, "{missing} missing, {lost} lost")?;
            }
        }
        let LazyStats {
            by_fault,
            ahead,
            zeros,
            removed,
            ..
        } = self;
        writeln!(
            f,
            "  by fault {by_fault}, ahead {ahead} (zeros {zeros}), given back {removed}"
        )?;
        let LazyStats {
            faults,
            joined,
            fetches,
            retries,
            ..
        } = self;
        writeln!(
            f,
            "  faults {faults}, and {joined} on what was under way; reads {fetches}, again {retries}"
        )?;
        if let Some(help) = &self.progress.working_set {
            writeln!(f, "  {help}")?;
        }
        if self.latency.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "  a fault waited: half up to {}, 99 of 100 up to {}, the longest {}",
            short(self.latency_p50_ns),
            short(self.latency_p99_ns),
            short(self.latency_max_ns)
        )?;
        let most = self.latency.iter().map(|(_, count)| *count).max();
        let most = most.unwrap_or(1).max(1);
        for (below, count) in &self.latency {
            let bar = "#".repeat((count * 40).div_ceil(most) as usize);
            writeln!(f, "  < {:>9} {count:>9} {bar}", short(*below))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_said_in_lines_and_in_json() {
        let mut stats = pager::Stats::default();
        (stats.placed, stats.ahead, stats.zeros, stats.faults) = (12, 8, 3, 2);
        stats.latency.record(Duration::from_micros(3));
        stats.latency.record(Duration::from_millis(3));
        let progress = LazyProgress {
            state: LazyState::Whole,
            pages: 12,
            missing: Some(0),
            lost: Some(0),
            waits_for_source_s: None,
            source_given_up_after_s: None,
            waits_for_server: None,
            working_set: Some(WorkingSetHelp {
                read_ahead: 9,
                touched: Some(8),
                had: Some(7),
            }),
        };
        let stats = LazyStats::of(progress, &stats, Some(Duration::from_micros(1500)));
        let text = stats.to_string();
        for line in [
            "memory that came later: 12 pages, all there after 1.5 ms\n",
            "  by fault 4, ahead 8 (zeros 3), given back 0\n",
            "  a recorded working set: 9 pages read ahead; of about 8 touched it had 7 (87 %)\n",
            "  a fault waited: half up to 4.1 us, 99 of 100 up to 3.0 ms, the longest 3.0 ms\n",
            "  <    4.1 us         1 ####",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert_eq!(
            coming(&serde_json::to_value(&stats.progress).unwrap()),
            None
        );
        let half = LazyProgress {
            state: LazyState::Bringing,
            missing: Some(6),
            lost: Some(1),
            waits_for_source_s: None,
            ..stats.progress.clone()
        };
        let half = coming(&serde_json::to_value(half).unwrap()).unwrap();
        assert_eq!(half, ", 41 % of its memory is there, 1 pages are lost");
        let cut_off = LazyProgress {
            state: LazyState::Bringing,
            missing: Some(6),
            lost: Some(0),
            pages: 12,
            waits_for_source_s: Some(7),
            source_given_up_after_s: Some(300),
            waits_for_server: None,
            working_set: None,
        };
        let cut_off = coming(&serde_json::to_value(cut_off).unwrap()).unwrap();
        for needle in [
            "broke 7 s ago",
            "; who touches that waits for 300 s at most",
        ] {
            assert!(cut_off.contains(needle), "{cut_off}");
        }
        let away = LazyProgress {
            state: LazyState::Bringing,
            missing: Some(6),
            waits_for_server: Some(ServerAway {
                address: "unix:/s".into(),
                away_s: 3,
                given_up_after_s: 10,
            }),
            ..stats.progress.clone()
        };
        assert!(away.is_cut_off());
        assert_eq!(
            away.words().unwrap(),
            ", 50 % of its memory is there, and the rest waits for the page server at unix:/s, away for 3 s, given up after \
             10 s"
        );
        assert_eq!(coming(&Value::Null), None);
        let json = serde_json::to_value(&stats).unwrap();
        assert_eq!(json["by-fault"], 4);
        assert_eq!(json["progress"]["state"], "whole");
        let help = serde_json::json!({ "read-ahead": 9, "touched": 8, "had": 7 });
        assert_eq!(json["progress"]["working-set"], help);
        assert_eq!(json["latency"][0], serde_json::json!([4096, 1]));
    }
}
