// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration's plots as SVG: what was sent by when, the rates of each round, where the downtime goes.
//!
//! Colours are the page's (classes and CSS variables, see [`report`](super::report)); who reads without colours tells
//! series apart by their dashes. All numbers of a record are possible: what is too large ends at the plot's edge.

use std::fmt::Write as _;
use std::time::Duration;

use super::record::{MigrationRecord, Round, Step, SwitchOver};
use super::report::escape;
use crate::units;

const WIDTH: f64 = 760.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;

/// Ticks that are aimed at: there are two more at most.
const TICKS: f64 = 5.0;

/// A round that is narrower has no number on it.
const NUMBERED: f64 = 14.0;

/// Steps of the rate behind a switch to post-copy, at most: the more there are, the more each is of what came about by chance.
const STEPS: usize = 48;

/// Where values are: from 0 to `end`, with a tick each `step`, named in units of `unit`.
#[derive(Clone, Debug, PartialEq)]
struct Axis {
    title: String,
    end: f64,
    step: f64,
    unit: f64,
}

impl Axis {
    /// Up to `most`, in the first of `names` (each with what it is of the value's own unit, the least first) of which
    /// there is one at least. `whole`: it ends at a tick.
    fn new(what: &str, most: f64, names: &[(f64, &str)], whole: bool) -> Self {
        let most = if most.is_finite() {
            most.clamp(0.0, 1e300)
        } else {
            0.0
        };
        let fits = names.iter().rfind(|(unit, _)| *unit <= most);
        let (unit, name) = fits
            .or(names.first())
            .map_or((1.0, ""), |&(unit, name)| (unit, name));
        let most = if most > 0.0 { most } else { unit };
        let step = nice(most / TICKS / unit) * unit;
        let end = if whole {
            (most / step).ceil() * step
        } else {
            most
        };
        let title = match name {
            "" => what.into(),
            name => format!("{what}, {name}"),
        };
        Axis {
            title,
            end,
            step,
            unit,
        }
    }

    fn time(what: &str, most: Duration) -> Self {
        let names = [(1e-6, "us"), (1e-3, "ms"), (1.0, "s"), (3600.0, "h")];
        Axis::new(what, most.as_secs_f64(), &names, false)
    }

    fn pages(what: &str, most: u64) -> Self {
        let names = [
            (1.0, ""),
            (1e3, "thousands"),
            (1e6, "millions"),
            (1e9, "billions"),
        ];
        Axis::new(what, (most as f64).max(TICKS), &names, true)
    }

    fn rate(what: &str, most: f64) -> Self {
        let names = [
            (1.0, "B/s"),
            (1024.0, "KiB/s"),
            (1048576.0, "MiB/s"),
            (1073741824.0, "GiB/s"),
        ];
        Axis::new(what, most, &names, true)
    }

    /// Each tick's value, and what is written at it.
    fn ticks(&self) -> impl Iterator<Item = (f64, String)> {
        let decimals = (-(self.step / self.unit).log10().floor()).clamp(0.0, 6.0) as usize;
        let count = (self.end / self.step * (1.0 + 1e-9)).floor().min(20.0) as u32;
        (0..=count).map(move |tick| {
            let value = f64::from(tick) * self.step;
            (value, format!("{:.decimals$}", value / self.unit))
        })
    }

    /// The part of the axis that `value` is at.
    fn part(&self, value: f64) -> f64 {
        let part = value / self.end;
        // A NaN is no number to clamp.
        if part > 0.0 { part.min(1.0) } else { 0.0 }
    }
}

/// 1, 2 or 5 times a power of ten, `least` or the next above.
fn nice(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    let fits = factors
        .iter()
        .find(|factor| **factor * power >= least * (1.0 - 1e-9));
    fits.copied().unwrap_or(10.0) * power
}

/// A plot's rectangle with its two axes.
struct Frame {
    x: Axis,
    y: Axis,
    top: f64,
    height: f64,
}

impl Frame {
    fn x(&self, time: Duration) -> f64 {
        LEFT + self.x.part(time.as_secs_f64()) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        self.top + (1.0 - self.y.part(value)) * self.height
    }

    fn bottom(&self) -> f64 {
        self.top + self.height
    }

    /// The axes, their ticks and names. Grid lines are across.
    fn axes(&self, svg: &mut String) {
        let (right, bottom) = (WIDTH - RIGHT, self.bottom());
        for (value, label) in self.y.ticks() {
            let y = self.y(value);
            put(
                svg,
                format_args!(
                    r#"<line class="grid" x1="{LEFT}" y1="{y:.1}" x2="{right}" y2="{y:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#,
                    LEFT - 8.0,
                    y + 4.0
                ),
            );
        }
        for (value, label) in self.x.ticks() {
            let x = LEFT + self.x.part(value) * (right - LEFT);
            put(
                svg,
                format_args!(
                    r#"<line class="axis" x1="{x:.1}" y1="{bottom:.1}" x2="{x:.1}" y2="{:.1}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#,
                    bottom + 5.0,
                    bottom + 18.0
                ),
            );
        }
        put(
            svg,
            format_args!(
                r#"<line class="axis" x1="{LEFT}" y1="{bottom:.1}" x2="{right}" y2="{bottom:.1}"/><text class="name" x="{right}" y="{:.1}" text-anchor="end">{}</text><text class="name" x="{LEFT}" y="{:.1}">{}</text>"#,
                bottom + 36.0,
                escape(&self.x.title),
                self.top - 10.0,
                escape(&self.y.title)
            ),
        );
    }

    /// Each round's time, every second one shaded, with its number; the stop.
    fn rounds(&self, svg: &mut String, record: &MigrationRecord) {
        for round in rounds(record) {
            let (from, to) = (self.x(round.began), self.x(round.ended()));
            if round.number.is_multiple_of(2) && !round.stopped {
                self.band(svg, "band", from, to);
            }
            if to - from >= NUMBERED && !round.stopped {
                put(
                    svg,
                    format_args!(
                        r#"<text class="tick" x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                        (from + to) / 2.0,
                        self.top + 12.0,
                        round.number
                    ),
                );
            }
        }
        if let Some(stop) = &record.switch_over {
            let (from, to) = (self.x(stop.began), self.x(stop.ended()));
            self.band(svg, "stop", from.min(WIDTH - RIGHT - 2.0), to.max(from));
        }
    }

    /// What lasts next to no time is seen all the same.
    fn band(&self, svg: &mut String, class: &str, from: f64, to: f64) {
        put(
            svg,
            format_args!(
                r#"<rect class="{class}" x="{from:.1}" y="{:.1}" width="{:.1}" height="{:.1}"/>"#,
                self.top,
                (to - from).max(if class == "stop" { 2.0 } else { 0.2 }),
                self.height
            ),
        );
    }
}

/// The rounds that are done, and the one at work.
pub(super) fn rounds(record: &MigrationRecord) -> impl Iterator<Item = &Round> {
    record.rounds.iter().chain(&record.at_work)
}

/// When the last thing of which the record knows was.
fn end(record: &MigrationRecord) -> Duration {
    let rounds = rounds(record).map(Round::ended);
    let samples = record.samples.iter().map(|sample| sample.at);
    let stop = record.switch_over.iter().map(SwitchOver::ended);
    let all = rounds.chain(samples).chain(stop).chain(record.took);
    all.max().unwrap_or_default()
}

fn put(svg: &mut String, piece: std::fmt::Arguments<'_>) {
    // A string takes everything.
    let _ = svg.write_fmt(piece);
    svg.push('\n');
}

/// The whole element: `what` is for who cannot see it.
fn open(what: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n<title>{}</title>\n",
        escape(what)
    )
}

/// A legend in one line: a class and a name each.
fn legend(svg: &mut String, top: f64, entries: &[(&str, &str)]) {
    let mut x = WIDTH - RIGHT;
    for (class, name) in entries.iter().rev() {
        // Letters are about so wide; a browser has the last word.
        x -= name.chars().count() as f64 * 7.2 + 36.0;
        let shape = match *class {
            "band" | "stop" => format!(
                r#"<rect class="{class}" x="{x:.1}" y="{:.1}" width="18" height="10"/>"#,
                top - 9.0
            ),
            line => format!(
                r#"<line class="{line}" x1="{x:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}"/>"#,
                top - 4.0,
                x + 18.0,
                top - 4.0
            ),
        };
        put(
            svg,
            format_args!(
                r#"{shape}<text class="tick" x="{:.1}" y="{top:.1}">{}</text>"#,
                x + 23.0,
                escape(name)
            ),
        );
    }
}

/// Pages sent by when, with the rounds behind and guest memory's size.
pub(super) fn sent(record: &MigrationRecord) -> String {
    let frame = Frame {
        x: Axis::time("time", end(record)),
        y: Axis::pages(
            "pages sent",
            record.total.pages_sent.max(record.memory_pages),
        ),
        top: 36.0,
        height: 210.0,
    };
    let mut svg = open("Pages sent over time, all rounds together", 292.0);
    frame.rounds(&mut svg, record);
    frame.axes(&mut svg);
    let memory = frame.y(record.memory_pages as f64);
    put(
        &mut svg,
        format_args!(
            r#"<line class="limit" x1="{LEFT}" y1="{memory:.1}" x2="{}" y2="{memory:.1}"/>"#,
            WIDTH - RIGHT
        ),
    );
    let points = record
        .samples
        .iter()
        .map(|sample| (sample.at, sample.pages_sent as f64));
    line(&mut svg, &frame, "sent", points);
    let mut entries = vec![
        ("sent", "pages sent"),
        ("limit", "guest memory"),
        ("band", "every second round"),
        ("stop", "guest stopped"),
    ];
    if let Some(followed) = &record.postcopy {
        let behind = record.samples.iter();
        let behind = behind.filter(|sample| sample.at >= followed.began);
        let points = behind.map(|sample| (sample.at, sample.demand_pages as f64));
        line(&mut svg, &frame, "dirty", points);
        entries.pop();
        entries.extend([
            ("stop", "switch to post-copy"),
            ("dirty", "pages that were waited for"),
        ]);
    }
    legend(&mut svg, 14.0, &entries);
    svg + "</svg>\n"
}

/// Bytes a second on the wire behind a switch to post-copy, which has no rounds: as many steps at most as can be told apart.
fn behind(record: &MigrationRecord) -> Vec<(Duration, f64)> {
    let Some(followed) = &record.postcopy else {
        return Vec::new();
    };
    let ended = followed.ended.unwrap_or(Duration::MAX);
    let samples = record.samples.iter();
    let samples = samples.filter(|sample| (followed.began..=ended).contains(&sample.at));
    let samples: Vec<_> = samples.collect();
    let each = samples.len().div_ceil(STEPS).max(1);
    let ends: Vec<_> = samples
        .iter()
        .step_by(each)
        .chain(samples.last().filter(|_| (samples.len() - 1) % each > 0))
        .collect();
    let steps = ends.windows(2).filter_map(|two| {
        let [from, to] = two else { return None };
        let took = to.at.saturating_sub(from.at).as_secs_f64();
        let bytes = to.wire_bytes.saturating_sub(from.wire_bytes) as f64;
        let rate = bytes / took;
        rate.is_finite().then_some([(from.at, rate), (to.at, rate)])
    });
    steps.flatten().collect()
}

/// Bytes a second of each round: on the wire, and what the guest wrote.
pub(super) fn rates(record: &MigrationRecord) -> String {
    let wire = |round: &Round| round.throughput();
    let dirtied = |round: &Round| round.dirty_rate() * units::pages(1) as f64;
    let behind = behind(record);
    let most = rounds(record)
        .map(|round| wire(round).max(dirtied(round)))
        .chain(behind.iter().map(|(_, rate)| *rate))
        .fold(0.0, f64::max);
    let limit = record.settings.limit_bytes_per_s.map(|limit| limit as f64);
    // A limit far above says nothing of where it is.
    let limit = limit.filter(|limit| *limit <= most * 2.0);
    let frame = Frame {
        x: Axis::time("time", end(record)),
        y: Axis::rate("rate", most.max(limit.unwrap_or(0.0))),
        top: 36.0,
        height: 180.0,
    };
    let title = match record.postcopy {
        None => "Bytes a second in each round: on the wire, and dirtied by the guest",
        Some(_) => {
            "Bytes a second in each round, and behind the switch to post-copy: on the wire, and dirtied by the guest"
        }
    };
    let mut svg = open(title, 262.0);
    frame.rounds(&mut svg, record);
    frame.axes(&mut svg);
    let mut entries = vec![("sent", "on the wire"), ("dirty", "dirtied by the guest")];
    if let Some(limit) = limit {
        let y = frame.y(limit);
        put(
            &mut svg,
            format_args!(
                r#"<line class="limit" x1="{LEFT}" y1="{y:.1}" x2="{}" y2="{y:.1}"/>"#,
                WIDTH - RIGHT
            ),
        );
        entries.push(("limit", "limit"));
    }
    entries.push(match record.postcopy {
        None => ("stop", "guest stopped"),
        Some(_) => ("stop", "switch to post-copy"),
    });
    let steps = |of: &dyn Fn(&Round) -> f64, stopped: bool| -> Vec<(Duration, f64)> {
        rounds(record)
            .filter(|round| !round.took.is_zero() && (stopped || !round.stopped))
            .flat_map(|round| [(round.began, of(round)), (round.ended(), of(round))])
            .collect()
    };
    line(&mut svg, &frame, "sent", steps(&wire, true));
    line(&mut svg, &frame, "sent", behind);
    line(&mut svg, &frame, "dirty", steps(&dirtied, false));
    legend(&mut svg, 14.0, &entries);
    svg + "</svg>\n"
}

/// A line from point to point; of one point alone there is none.
fn line(
    svg: &mut String,
    frame: &Frame,
    class: &str,
    points: impl IntoIterator<Item = (Duration, f64)>,
) {
    let mut path = String::new();
    for (at, value) in points {
        let command = if path.is_empty() { 'M' } else { 'L' };
        let (x, y) = (frame.x(at), frame.y(value));
        let _ = write!(path, "{command}{x:.1} {y:.1}");
    }
    if path.contains('L') {
        put(svg, format_args!(r#"<path class="{class}" d="{path}"/>"#));
    }
}

/// The class of a step's colour.
pub(super) fn class(step: Step) -> &'static str {
    match step {
        Step::Pause => "step1",
        Step::LastPages => "step2",
        Step::State => "step3",
        Step::HandOver => "step4",
        Step::Start => "step5",
    }
}

/// A step that is narrower has no name on it: the table has it.
const NAMED: f64 = 70.0;

/// The downtime from the left to the right: a bar of its steps, and what was aimed at.
pub(super) fn downtime(stop: &SwitchOver, aim: Duration) -> String {
    let took = stop.downtime();
    // An aim far beyond would leave a bar that nobody sees.
    let shown = aim <= took.saturating_mul(3);
    let most = if shown { took.max(aim) } else { took };
    let frame = Frame {
        x: Axis::time("since the guest was told to pause", most),
        y: Axis::pages("", 1),
        top: 30.0,
        height: 40.0,
    };
    let mut svg = open("The downtime's steps", 116.0);
    let bottom = frame.bottom();
    let mut at = Duration::ZERO;
    for taken in &stop.steps {
        let from = frame.x(at);
        at = at.saturating_add(taken.took);
        let width = frame.x(at) - from;
        put(
            &mut svg,
            format_args!(
                r#"<rect class="{}" x="{from:.1}" y="{:.1}" width="{width:.1}" height="{:.1}"/>"#,
                class(taken.step),
                frame.top + 4.0,
                frame.height - 8.0
            ),
        );
        if width >= NAMED {
            put(
                &mut svg,
                format_args!(
                    r#"<text class="on" x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                    from + width / 2.0,
                    frame.top + 24.0,
                    taken.step.name()
                ),
            );
        }
    }
    for (value, label) in frame.x.ticks() {
        let x = LEFT + frame.x.part(value) * (WIDTH - LEFT - RIGHT);
        put(
            &mut svg,
            format_args!(
                r#"<line class="axis" x1="{x:.1}" y1="{bottom:.1}" x2="{x:.1}" y2="{:.1}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#,
                bottom + 5.0,
                bottom + 18.0
            ),
        );
    }
    put(
        &mut svg,
        format_args!(
            r#"<line class="axis" x1="{LEFT}" y1="{bottom:.1}" x2="{}" y2="{bottom:.1}"/><text class="name" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
            WIDTH - RIGHT,
            WIDTH - RIGHT,
            bottom + 36.0,
            escape(&frame.x.title)
        ),
    );
    if shown {
        let x = frame.x(aim);
        put(
            &mut svg,
            format_args!(
                r#"<line class="limit" x1="{x:.1}" y1="{:.1}" x2="{x:.1}" y2="{bottom:.1}"/>"#,
                frame.top - 6.0
            ),
        );
        legend(&mut svg, 14.0, &[("limit", "aimed at")]);
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_has_a_sensible_number_of_round_ticks_whatever_its_end() {
        for exponent in -5..11 {
            for mantissa in [1.0, 1.3, 2.0, 3.7, 5.0, 9.99] {
                let most = mantissa * 10f64.powi(exponent);
                let time = Axis::time("", Duration::from_secs_f64(most));
                let rate = Axis::rate("", most);
                let pages = Axis::pages("", most as u64);
                for axis in [time, rate, pages] {
                    let ticks: Vec<_> = axis.ticks().collect();
                    assert!((3..=7).contains(&ticks.len()), "{most} {ticks:?}");
                    let mut labels: Vec<_> = ticks.iter().map(|(_, label)| label).collect();
                    labels.dedup();
                    assert_eq!(labels.len(), ticks.len(), "{most} {ticks:?}");
                    assert!(labels.iter().all(|label| label.len() <= 8), "{labels:?}");
                    assert!(axis.end >= most * 0.999 || axis.unit > most);
                }
            }
        }
    }

    #[test]
    fn ticks_of_pages_are_whole_pages() {
        let axis = Axis::pages("pages", 3);
        let ticks: Vec<_> = axis.ticks().map(|(_, label)| label).collect();
        assert_eq!(ticks, ["0", "1", "2", "3", "4", "5"]);
    }

    #[test]
    fn the_unit_is_the_one_in_which_there_is_a_number_before_the_point() {
        let axis = Axis::rate("rate", 120.0 * 1048576.0);
        assert_eq!(axis.title, "rate, MiB/s");
        let ticks: Vec<_> = axis.ticks().map(|(_, label)| label).collect();
        assert_eq!(ticks, ["0", "50", "100", "150"]);
        let axis = Axis::time("time", Duration::from_micros(12_400));
        assert_eq!(axis.title, "time, ms");
        let ticks: Vec<_> = axis.ticks().map(|(_, label)| label).collect();
        assert_eq!(ticks, ["0", "5", "10"]);
    }
}
