// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration's report: one file that holds all that it shows, is well-formed, and takes any record.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, SystemTime};

use dirty_log::estimate::{Forecast, Outcome as ForecastOutcome, Span};
use reference_vmm::migration::postcopy::{Faults, LastWord, When, serve::Served};
use reference_vmm::migration::record::{MigrationRecord, Outcome, Settings, Step};
use reference_vmm::migration::report::{self, ReportError};
use reference_vmm::migration::source::WhenStuck;

const EXPECTED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/migration_report/expected.html"
);

fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

fn settings() -> Settings {
    Settings {
        limit_bytes_per_s: Some(200 << 20),
        downtime: us(100_000),
        connections: 2,
        compression: "zstd".into(),
        tls: true,
        when_stuck: WhenStuck::Throttle,
        postcopy: When::Never,
    }
}

/// 1 GiB, a third of it zeros, a guest that writes 5,000 pages again and again: three rounds and a stop.
fn record() -> MigrationRecord {
    let began = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_901_675);
    let mut record = MigrationRecord::new("tcp:192.0.2.7:4444".into(), 1 << 18, settings(), began);
    let mut at = 40_000;
    for (pages, dirtied) in [(1 << 18, 21_000), (21_000, 6_500), (6_500, 5_100)] {
        if pages == 6_500 {
            record.throttled(20);
        }
        record.round_begins(us(at), pages, false);
        let mut left = pages;
        while left > 0 {
            let batch = left.min(1024);
            left -= batch;
            let zeros = if pages == 1 << 18 && left < 80_000 {
                batch
            } else {
                0
            };
            let bytes = (batch - zeros) * 2_900 + zeros * 16;
            at += bytes / 170 + 50;
            record.sent(us(at), batch, zeros, bytes);
        }
        record.round_ends(us(at), dirtied);
    }
    record.stop_begins(us(at));
    at += 900;
    record.step_ends(Step::Pause, us(at));
    record.round_begins(us(at), 5_100, true);
    at += 81_000;
    record.sent(us(at), 5_100, 0, 5_100 * 2_900);
    record.round_ends(us(at), 0);
    record.step_ends(Step::LastPages, us(at));
    for (step, took) in [
        (Step::State, 4_300),
        (Step::HandOver, 1_150),
        (Step::Start, 2_050),
    ] {
        at += took;
        record.step_ends(step, us(at));
    }
    record.ends(us(at + 500), Outcome::Moved);
    record
}

#[test]
fn what_followed_a_guest_that_went_before_its_memory_is_marked_and_said() {
    let mut record = record();
    let at = record.took.unwrap();
    (record.took, record.outcome) = (None, None);
    record.goes_before(at, 1000);
    let zeros_before = record.total.zero_pages;
    for (step, demand) in [(1, 100), (2, 150)] {
        let served = Served {
            demand,
            bulk: step * 425 - demand / 3,
            zero: step * 10,
            bytes: step << 20,
        };
        record.served(at + us(step * 100_000), served, None);
    }
    let faults = Faults {
        count: 12,
        p50_ns: 700_000,
        p99_ns: 900_000,
        max_ns: 1_000_000,
    };
    let word = LastWord {
        faults,
        ..LastWord::default()
    };
    record.no_more_is_wanted(at + us(300_000), &word);
    record.ends(at + us(300_000), Outcome::Moved);
    assert_eq!(record.total.zero_pages, zeros_before + 20);
    let html = report::html(&record);
    for needle in [
        "Followed the guest",
        "1,000 pages",
        "(20 of both were zeros)",
        "12 faults",
        "switch to post-copy",
        "pages that were waited for",
        "Bytes a second in each round, and behind the switch",
        "--when-stuck",
        "--postcopy",
    ] {
        assert!(html.contains(needle), "{needle}");
    }
    let without = report::html(&self::record());
    assert!(!without.contains("post-copy"));
    // The rate behind the switch is a line of its own.
    let lines = |html: &str| html.matches(r#"<path class="sent""#).count();
    assert_eq!(lines(&html), lines(&without) + 1);
}

fn span<T>(low: T, mean: T, high: T) -> Span<T> {
    Span { low, mean, high }
}

#[test]
fn a_report_is_as_it_is_kept() {
    let html = report::html(&record());
    if std::env::var_os("UPDATE_EXPECTED").is_some() {
        std::fs::write(EXPECTED, &html).unwrap();
    }
    let expected = std::fs::read_to_string(EXPECTED).unwrap();
    let differs = html
        .lines()
        .zip(expected.lines())
        .find(|(is, kept)| is != kept);
    assert!(
        differs.is_none() && html == expected,
        "{differs:?}\nLook at the new one, and keep it: \
         UPDATE_EXPECTED=1 cargo test -p reference-vmm --test migration_report"
    );
}

#[test]
fn it_needs_nothing_from_elsewhere_and_runs_nothing() {
    let html = report::html(&record());
    let rest = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for needle in [
        "http", "//", "src=", "href", "url(", "@import", "<script", "<link", "<img", "<iframe",
    ] {
        assert!(!rest.contains(needle), "{needle}");
    }
    // No attribute that a browser would run.
    assert!(tags(&html).iter().all(|tag| !tag.contains(" on")), "on…=");
}

#[test]
fn it_is_well_formed_whatever_is_in_the_record() {
    well_formed(&report::html(&record()));
    let mut each = Vec::new();
    let nasty = "<script>alert(\"&amp;\")</script> ]]> ' \u{0}\u{1b}[31m\u{ffff} \u{202e}";
    for outcome in [
        None,
        Some(Outcome::Moved),
        Some(Outcome::Cancelled),
        Some(Outcome::Failed { why: nasty.into() }),
        Some(Outcome::Unsettled { why: nasty.into() }),
    ] {
        let mut empty = MigrationRecord::new(
            nasty.into(),
            0,
            Settings {
                compression: nasty.into(),
                ..settings()
            },
            SystemTime::UNIX_EPOCH,
        );
        empty.outcome.clone_from(&outcome);
        let mut huge = record();
        huge.took = None;
        huge.to = nasty.into();
        huge.round_begins(us(1), u64::MAX, false);
        huge.sent(Duration::MAX, u64::MAX, u64::MAX, u64::MAX);
        huge.round_ends(Duration::MAX, u64::MAX);
        huge.round_begins(us(1), u64::MAX, false);
        let forever = Duration::from_secs(7 * 24 * 3600);
        huge.forecast_is(
            us(5),
            &Forecast {
                outcome: ForecastOutcome::Diverges,
                rounds: span(0, 0, u32::MAX),
                time: span(us(0), us(1), forever),
                pages: span(0, 0, u64::MAX),
                downtime: span(us(0), us(1), forever),
            },
        );
        huge.memory_pages = u64::MAX;
        huge.began_unix_s = u64::MAX;
        huge.outcome = outcome;
        each.extend([empty, huge]);
    }
    for record in each {
        let html = report::html(&record);
        well_formed(&html);
        assert!(!html.contains("<script") && !html.contains('\u{1b}') && !html.contains("NaN"));
        assert!(!html.contains("\"inf") && !html.contains(" inf"));
    }
}

#[test]
fn of_very_many_rounds_the_table_has_the_first_and_the_last() {
    let mut record =
        MigrationRecord::new("unix:/x".into(), 1000, settings(), SystemTime::UNIX_EPOCH);
    for round in 0..5000 {
        record.round_begins(us(round * 100), 10, false);
        record.sent(us(round * 100 + 50), 10, 0, 40_960);
        record.round_ends(us(round * 100 + 100), 10);
    }
    let html = report::html(&record);
    well_formed(&html);
    assert!(
        html.contains("<th scope=\"row\">1</th>") && html.contains("<th scope=\"row\">5000</th>")
    );
    assert!(html.contains("are left out"));
    assert!(html.len() < 300_000, "{}", html.len());
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.html");
    std::fs::write(&path, "older").unwrap();
    let link = dir.path().join("link.html");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let stale = format!(".report.html.{}.partial", std::process::id());
    std::fs::write(dir.path().join(stale), "half of a re").unwrap();
    report::write(&record(), &link).unwrap();
    assert!(link.is_symlink(), "it is what the link leads to");
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        report::html(&record())
    );

    for special in ["/dev/null".into(), dir.path().to_path_buf()] {
        let refused = report::write(&record(), &special).unwrap_err();
        assert!(matches!(refused, ReportError::NoFile(_)), "{refused}");
    }
    let nowhere = dir.path().join("nowhere/report.html");
    let refused = report::write(&record(), &nowhere).unwrap_err().to_string();
    assert!(
        refused.contains("--report") && refused.contains("nowhere"),
        "{refused}"
    );
    // Nothing is left beside it, also of a process that died in the middle.
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["link.html", "report.html"]);
}

/// The tags of a text, each without its angles.
fn tags(text: &str) -> Vec<&str> {
    text.split('<')
        .skip(1)
        .map(|piece| piece.split_once('>').expect("a tag ends").0)
        .collect()
}

/// XML's rules as far as the report uses XML: one root, tags that nest and are closed, attributes in double quotes and
/// each once, the five entities, characters that XML has.
fn well_formed(text: &str) {
    let text = text.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text.trim();
    while let Some((before, behind)) = rest.split_once('<') {
        characters(before);
        assert!(!before.contains('>'), "a loose >: {before}");
        assert!(
            !open.is_empty() || before.trim().is_empty(),
            "text outside: {before}"
        );
        let (tag, after) = behind.split_once('>').expect("a tag ends");
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(
                open.pop(),
                Some(name),
                "what is closed is what was opened last"
            );
            assert!(!open.is_empty() || rest.trim().is_empty(), "a second root");
            continue;
        }
        let (tag, closed) = match tag.strip_suffix('/') {
            Some(tag) => (tag, true),
            None => (tag, false),
        };
        let name = tag.split_whitespace().next().expect("a name");
        assert!(
            name.chars().all(|letter| letter.is_ascii_alphanumeric()),
            "{name}"
        );
        attributes(tag[name.len()..].trim());
        if !closed {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
    assert!(rest.trim().is_empty(), "{rest}");
}

fn attributes(mut text: &str) {
    let mut names = Vec::new();
    while !text.is_empty() {
        let (name, behind) = text.split_once("=\"").expect("name=\"value\"");
        let (value, after) = behind.split_once('"').expect("a value ends");
        let of_a_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '-';
        assert!(!name.is_empty() && name.chars().all(of_a_name), "{name}");
        assert!(!names.contains(&name), "{name} twice");
        names.push(name);
        characters(value);
        assert!(after.is_empty() || after.starts_with(' '), "{after}");
        text = after.trim_start();
    }
}

fn characters(text: &str) {
    for (at, _) in text.match_indices('&') {
        let entities = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;"];
        let known = entities.iter().any(|entity| text[at..].starts_with(entity));
        assert!(known, "{}", &text[at..]);
    }
    let bad = |letter: char| {
        letter.is_control() && letter != '\n' || letter > '\u{fffd}' && letter < '\u{10000}'
    };
    assert!(!text.contains(bad), "{text:?}");
}
