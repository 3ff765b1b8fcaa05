// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration as one HTML file to look at: `ctl migrate --report FILE.html`.
//!
//! It holds all that it shows: no network, no script. Plots are inline SVG, in colours for light and dark and for paper.
//! It is XML as well as HTML, so that any parser can say whether it is well-formed. All that is not the report's own text
//! is escaped.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::plot;
use super::progress;
use super::record::{MigrationRecord, Outcome, Round, SwitchOver, Total, per_second};
use super::source::WhenStuck;
use crate::text::is_plain;
use crate::units;

/// Rows that a table of rounds has at most: the first ones, and the last.
const FIRST_ROWS: usize = 10;
const LAST_ROWS: usize = 90;

/// A report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// There is something of that name that is no regular file, and a report would replace it.
    #[error("--report {0:?} is no regular file: name a new one, or one that is to be replaced")]
    NoFile(PathBuf),
    /// The file cannot be made, written or renamed.
    #[error("--report {path:?} cannot be written: {source}")]
    Write {
        /// Which.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

/// Writes the report to `path`: under a temporary name beside it, synced, then renamed, so that under that name there is
/// what was there or the whole report. Of a symbolic link it is the file that it leads to. Blocks for the disk.
///
/// # Errors
/// [`ReportError`]; nothing is left behind.
pub fn write(record: &MigrationRecord, path: &Path) -> Result<(), ReportError> {
    let cannot = |source| ReportError::Write {
        path: path.into(),
        source,
    };
    let (place, partial) = places(path)?;
    let mut file = create(&partial).map_err(cannot)?;
    let written = file
        .write_all(html(record).as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&partial, &place));
    if let Err(error) = written {
        // Of a file that cannot be removed either there is nothing more to say.
        let _ = fs::remove_file(&partial);
        return Err(cannot(error));
    }
    Ok(())
}

/// Finds out whether a report can be [written](fn@write) to `path`, before there is one: a file is made beside it, and removed.
///
/// # Errors
/// [`ReportError`].
pub fn check(path: &Path) -> Result<(), ReportError> {
    let (_, partial) = places(path)?;
    create(&partial)
        .and_then(|_| fs::remove_file(&partial))
        .map_err(|source| ReportError::Write {
            path: path.into(),
            source,
        })
}

/// Where the file is to be, and where it is written before.
fn places(path: &Path) -> Result<(PathBuf, PathBuf), ReportError> {
    let place = match fs::canonicalize(path) {
        Ok(place) if place.is_file() => place,
        Ok(_) => return Err(ReportError::NoFile(path.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.into(),
        Err(source) => {
            let path = path.into();
            return Err(ReportError::Write { path, source });
        }
    };
    let Some(name) = place.file_name() else {
        return Err(ReportError::NoFile(path.into()));
    };
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = place.with_file_name(partial);
    Ok((place, partial))
}

/// A new file. What another process of this number has left under the name is in nobody's use any more.
fn create(path: &Path) -> io::Result<File> {
    let new = || OpenOptions::new().write(true).create_new(true).open(path);
    match new() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(path)?;
            new()
        }
        other => other,
    }
}

/// The whole file's text.
pub fn html(record: &MigrationRecord) -> String {
    let mut page = Page(String::new());
    let to = escape(&record.to);
    page.line(format_args!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>Migration to {to}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>"
    ));
    page.line(format_args!("<h1>Migration to {to}</h1>"));
    outcome(&mut page, record);
    key_figures(&mut page, record);
    page.figure(
        "Pages sent",
        "All rounds together; a page counts as often as it was sent. Numbers are the rounds'.",
        &plot::sent(record),
    );
    page.figure(
        "Rates",
        "The mean of each round. Rounds become shorter only while the guest dirties less than the wire carries.",
        &plot::rates(record),
    );
    if let Some(stop) = &record.switch_over {
        downtime(&mut page, record, stop);
    }
    rounds(&mut page, record);
    settings(&mut page, record);
    page.line(format_args!("</main>\n</body>\n</html>"));
    page.0
}

/// Text as it is between tags and in attributes. What XML does not have, a control character for instance, is shown as
/// U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            other if !is_plain(other) => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

struct Page(String);

impl Page {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // A string takes everything.
        let _ = self.0.write_fmt(line);
        self.0.push('\n');
    }

    fn figure(&mut self, title: &str, caption: &str, svg: &str) {
        self.line(format_args!(
            "<figure>\n<h2>{title}</h2>\n{svg}<figcaption>{caption}</figcaption>\n</figure>"
        ));
    }

    fn key(&mut self, name: &str, value: &str, more: &str) {
        self.line(format_args!(
            "<div><dt>{name}</dt><dd>{}</dd><dd class=\"more\">{}</dd></div>",
            escape(value),
            escape(more)
        ));
    }
}

/// How it ended, and when it began.
fn outcome(page: &mut Page, record: &MigrationRecord) {
    let (class, text) = match &record.outcome {
        None => ("going", "The migration is going on.".into()),
        Some(Outcome::Moved) if record.paused => (
            "good",
            "The guest is on the other side, paused as it was.".into(),
        ),
        Some(Outcome::Moved) => ("good", "The guest runs on the other side.".into()),
        Some(Outcome::Cancelled) => (
            "going",
            "It was called off; the guest is still here.".into(),
        ),
        Some(Outcome::Failed { why }) => ("bad", format!("It failed: {}", escape(why))),
        Some(Outcome::Lost { why }) => (
            "bad",
            format!("The guest had gone, and is lost: {}", escape(why)),
        ),
        Some(Outcome::Damaged { why }) => ("bad", escape(why)),
        Some(Outcome::Unsettled { why }) => (
            "bad",
            format!(
                "The other side may have the guest, which stays paused here: {}",
                escape(why)
            ),
        ),
    };
    page.line(format_args!("<p class=\"{class}\">{text}</p>"));
    page.line(format_args!(
        "<p class=\"more\">Began {}.</p>",
        units::utc(record.began_unix_s)
    ));
}

fn key_figures(page: &mut Page, record: &MigrationRecord) {
    let Total {
        rounds,
        pages_sent,
        zero_pages,
        wire_bytes,
    } = record.total;
    let aim = units::time(record.settings.downtime);
    page.line(format_args!("<dl class=\"keys\">"));
    match record.took {
        Some(took) => {
            let mean = units::rate(per_second(wire_bytes, took));
            page.key("Took", &units::time(took), &format!("{mean} in the mean"));
        }
        None => {
            let now = record.samples.last().map_or(Duration::ZERO, |last| last.at);
            let ahead = record.forecast.as_ref();
            let ahead = ahead.map_or(String::new(), |ahead| progress::forecast(ahead, now));
            page.key("So far", &units::time(now), &ahead);
        }
    }
    if let Some(downtime) = record.downtime() {
        let foretold = record
            .foretold()
            .map(|foretold| format!("; foretold {foretold}"));
        page.key(
            "Downtime",
            &units::time(downtime),
            &format!(
                "{aim} aimed at{}",
                foretold.unwrap_or_else(|| "; nothing was foretold".into())
            ),
        );
    }
    page.key(
        "Guest memory",
        &units::bytes(units::pages(record.memory_pages)),
        &format!("{} pages", units::count(record.memory_pages)),
    );
    page.key(
        "Sent",
        &format!("{} pages", units::count(pages_sent)),
        &format!("{} of them zeros", units::count(zero_pages)),
    );
    page.key(
        "On the wire",
        &units::bytes(wire_bytes),
        &format!("{} of pages", units::bytes(units::pages(pages_sent))),
    );
    let stop = match &record.switch_over {
        Some(_) => "the stop's as well",
        None => "the guest was not stopped",
    };
    page.key("Rounds", &units::count(rounds.into()), stop);
    if let Some(followed) = &record.postcopy {
        let pages = format!("{} pages", units::count(followed.missing_pages));
        let words = followed.words();
        page.key(
            "Followed the guest",
            &pages,
            words.trim_start_matches("post-copy: "),
        );
    }
    if record.throttle_percent > 0 {
        let value = format!("{} %", record.throttle_percent);
        page.key("Guest slowed by", &value, "of its vCPUs' time, at last");
    }
    page.line(format_args!("</dl>"));
}

fn downtime(page: &mut Page, record: &MigrationRecord, stop: &SwitchOver) {
    let all = stop.downtime();
    page.line(format_args!(
        "<figure>\n<h2>Downtime: {}</h2>\n{}<table>\n<thead><tr><th scope=\"col\">step</th>\
         <th scope=\"col\">took</th><th scope=\"col\">of the downtime</th></tr></thead>\n<tbody>",
        units::time(all),
        plot::downtime(stop, record.settings.downtime)
    ));
    for taken in &stop.steps {
        let part = match all.is_zero() {
            true => 0.0,
            false => taken.took.as_secs_f64() / all.as_secs_f64() * 100.0,
        };
        page.line(format_args!(
            "<tr><th scope=\"row\"><svg class=\"key\" viewBox=\"0 0 10 10\" aria-hidden=\"true\">\
             <rect class=\"{}\" width=\"10\" height=\"10\"/></svg> {}</th><td>{}</td><td>{part:.0} %</td></tr>",
            plot::class(taken.step),
            taken.step.name(),
            units::time(taken.took)
        ));
    }
    page.line(format_args!("</tbody>\n</table>\n</figure>"));
}

fn rounds(page: &mut Page, record: &MigrationRecord) {
    page.line(format_args!(
        "<section>\n<h2>Rounds</h2>\n<div class=\"wide\"><table>\n<thead><tr>\
         <th scope=\"col\">round</th><th scope=\"col\">began at</th><th scope=\"col\">took</th>\
         <th scope=\"col\">dirty pages</th><th scope=\"col\">sent</th><th scope=\"col\">of zeros</th>\
         <th scope=\"col\">on the wire</th><th scope=\"col\">throughput</th>\
         <th scope=\"col\">dirtied meanwhile</th><th scope=\"col\">pages dirtied a second</th>\
         <th scope=\"col\">guest slowed by</th></tr></thead>\n<tbody>"
    ));
    let all: Vec<&Round> = plot::rounds(record).collect();
    let left_out = all.len().saturating_sub(FIRST_ROWS + LAST_ROWS);
    let mut last = 0;
    for (at, round) in all.iter().enumerate() {
        if left_out > 0 && (FIRST_ROWS..FIRST_ROWS + left_out).contains(&at) {
            continue;
        }
        // The record has forgotten some, or they are left out here.
        if round.number > last + 1 {
            page.line(format_args!(
                "<tr><td colspan=\"11\" class=\"gap\">rounds {} to {} are left out</td></tr>",
                last + 1,
                round.number - 1
            ));
        }
        last = round.number;
        row(page, record, round);
    }
    page.line(format_args!("</tbody>\n</table></div>\n</section>"));
}

fn row(page: &mut Page, record: &MigrationRecord, round: &Round) {
    let going = record.at_work.as_ref() == Some(round);
    let name = match round.stopped {
        true => format!("{}, guest stopped", round.number),
        false => round.number.to_string(),
    };
    page.line(format_args!(
        "<tr><th scope=\"row\">{name}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>",
        units::time(round.began),
        if going { "going on".into() } else { units::time(round.took) },
        units::count(round.pages_to_send),
        units::count(round.pages_sent),
        units::count(round.zero_pages),
        units::bytes(round.wire_bytes),
    ));
    let known = !round.took.is_zero();
    let throughput = known.then(|| units::rate(round.throughput()));
    let dirtied = (known && !round.stopped).then(|| {
        (
            units::count(round.pages_dirtied),
            units::count(round.dirty_rate() as u64),
        )
    });
    let (dirtied, rate) = dirtied.unwrap_or_default();
    // One that stands still is not slowed.
    let slowed = match (round.stopped, round.throttle_percent) {
        (true, _) | (_, 0) => String::new(),
        (false, percent) => format!("{percent} %"),
    };
    page.line(format_args!(
        "<td>{}</td><td>{dirtied}</td><td>{rate}</td><td>{slowed}</td></tr>",
        throughput.unwrap_or_default()
    ));
}

fn settings(page: &mut Page, record: &MigrationRecord) {
    let settings = &record.settings;
    let limit = settings.limit_bytes_per_s;
    let limit = limit.map_or("none".into(), |limit| units::rate(limit as f64));
    let tls = if settings.tls { "yes" } else { "no" };
    let stuck = match settings.when_stuck {
        WhenStuck::Cancel => "cancel",
        WhenStuck::Throttle => "throttle",
        WhenStuck::Stop => "stop",
    };
    page.line(format_args!(
        "<section>\n<h2>Settings</h2>\n<table>\n<tbody>"
    ));
    for (name, value) in [
        ("to", record.to.clone()),
        ("downtime aimed at", units::time(settings.downtime)),
        ("bandwidth limit", limit),
        ("connections", settings.connections.to_string()),
        ("compression", settings.compression.clone()),
        ("TLS", tls.into()),
        ("--when-stuck", stuck.into()),
        ("--postcopy", settings.postcopy.to_string()),
    ] {
        page.line(format_args!(
            "<tr><th scope=\"row\">{name}</th><td class=\"text\">{}</td></tr>",
            escape(&value)
        ));
    }
    page.line(format_args!("</tbody>\n</table>\n</section>"));
}

/// Without a `<` or an `&`, so that it is the same to a parser of XML. On paper it is light: the dark colours are the
/// screen's alone.
const STYLE: &str = "\
:root {
  --page: #ffffff; --text: #1b1f24; --muted: #57606a; --grid: #d8dee4; --band: #eef1f4; --stop: #f3c0c0;
  --sent: #0b62c4; --dirty: #b35900; --limit: #57606a; --good: #116329; --bad: #a40e26;
  --step1: #4e79a7; --step2: #b5651d; --step3: #3f8f5f; --step4: #8a5a9e; --step5: #7d7d1f; --on: #ffffff;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #0f1318; --text: #e6edf3; --muted: #9aa4af; --grid: #2d333b; --band: #1a2028; --stop: #6b2530;
    --sent: #58a6ff; --dirty: #f0a04b; --limit: #9aa4af; --good: #56d364; --bad: #ff7b72;
    --step1: #7fa8d6; --step2: #e0a05e; --step3: #71c291; --step4: #c194d4; --step5: #c9c95a; --on: #0f1318;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 0.5rem; }
p { margin: 0.25rem 0; overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.going { font-weight: 600; }
.more, figcaption { color: var(--muted); font-size: 0.85rem; }
.keys { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.75rem; margin: 1.25rem 0; }
.keys div { border: 1px solid var(--grid); border-radius: 6px; padding: 0.5rem 0.75rem; }
dt { color: var(--muted); font-size: 0.85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
dd.more { font-size: 0.85rem; }
figure, section { margin: 2rem 0 0; }
svg { display: block; width: 100%; height: auto; }
svg.key { display: inline-block; width: 0.7rem; height: 0.7rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--grid); text-align: right; font-weight: 400; }
thead th { color: var(--muted); vertical-align: bottom; }
tbody th, thead th:first-child { text-align: left; }
td.text { text-align: left; overflow-wrap: anywhere; }
td.gap { text-align: center; color: var(--muted); }
.tick, .name { font: 12px system-ui, sans-serif; fill: var(--muted); }
.name { fill: var(--text); }
.on { font: 12px system-ui, sans-serif; fill: var(--on); }
.grid { stroke: var(--grid); }
.axis { stroke: var(--muted); }
.band { fill: var(--band); }
.stop { fill: var(--stop); }
.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 3 3; }
.sent { stroke: var(--sent); stroke-width: 2; fill: none; }
.dirty { stroke: var(--dirty); stroke-width: 2; stroke-dasharray: 7 3; fill: none; }
.step1 { fill: var(--step1); }
.step2 { fill: var(--step2); }
.step3 { fill: var(--step3); }
.step4 { fill: var(--step4); }
.step5 { fill: var(--step5); }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  figure, tr, .keys { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: 0.2rem 0.35rem; }
  rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
";
