// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Measurements as an SVG file for a README: panels side by side, each with lines over two axes, and one legend.
//!
//! The file is shown by itself, as an image: it has its ground and its colours, for light and dark. Who reads without
//! colours tells lines apart by their dashes. The migration report's plots are the monitor's own, on a page with colours of
//! its own, and would have to be built with it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::failure::{Context, Result};

const PANEL: f64 = 340.0;
const PLOT: f64 = 220.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 68.0;
/// Points of a line are as far from each other, at least.
const NEAR: f64 = 1.5;
/// A line of the legend.
const ENTRY: f64 = 18.0;
const ENTRIES: usize = 3;

/// Of light and of dark, by a series's place; then its dashes.
const STYLES: [(&str, &str, &str); 8] = [
    ("#0969da", "#58a6ff", ""),
    ("#cf222e", "#ff7b72", "7 3"),
    ("#1a7f37", "#56d364", "2 3"),
    ("#8250df", "#d2a8ff", "9 3 2 3"),
    ("#9a6700", "#e3b341", "4 2"),
    ("#bf3989", "#ff9bce", "12 4"),
    ("#0a7f7f", "#39c5cf", "1 3"),
    ("#57606a", "#8b949e", "6 2 2 2 2 2"),
];

/// Values from `from` to `to`, with a mark at each of `ticks`.
pub(crate) struct Axis {
    pub title: String,
    pub from: f64,
    pub to: f64,
    pub ticks: Vec<(f64, String)>,
    /// Each step is a factor.
    pub log: bool,
}

impl Axis {
    /// By factors, so that all of these values, which are above zero, are on it.
    pub fn log(title: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let usable = values.into_iter().filter(|it| it.is_finite() && *it > 0.0);
        let (low, high) = usable.fold((f64::INFINITY, 0.0_f64), |(low, high), it| {
            (low.min(it), high.max(it))
        });
        let (low, high) = if low <= high {
            (low, high)
        } else {
            (1.0, 10.0)
        };
        let steps: Vec<f64> = (low.log10().floor() as i32..=high.log10().ceil() as i32)
            .flat_map(|power| [1.0, 2.0, 5.0].map(|factor| factor * 10_f64.powi(power)))
            .collect();
        let below = steps.iter().rev().find(|step| **step <= low);
        let above = steps.iter().find(|step| **step >= high && **step > low);
        let (from, to) = (
            below.copied().unwrap_or(low),
            above.copied().unwrap_or(low * 10.0),
        );
        // Up to there all labels have room.
        let wide = to / from > 5001.0;
        let shown = steps.iter().filter(|step| {
            let power = step.log10();
            (from..=to).contains(*step) && (!wide || (power - power.round()).abs() < 1e-9)
        });
        Self {
            title: title.into(),
            from,
            to,
            ticks: shown.map(|step| (*step, step.to_string())).collect(),
            log: true,
        }
    }

    /// From 0 to 100 %.
    pub fn percent(title: &str) -> Self {
        let ticks = [0.0, 25.0, 50.0, 75.0, 100.0].map(|at| (at, format!("{at} %")));
        Self {
            title: title.into(),
            from: 0.0,
            to: 100.0,
            ticks: ticks.into(),
            log: false,
        }
    }

    /// The part of it that a value is at; what is beyond an end is at that end.
    fn part(&self, value: f64) -> f64 {
        let part = match self.log {
            true => (value / self.from).ln() / (self.to / self.from).ln(),
            false => (value - self.from) / (self.to - self.from),
        };
        // A NaN is no number to clamp.
        if part > 0.0 { part.min(1.0) } else { 0.0 }
    }
}

/// A line; those of one name look alike in all panels.
pub(crate) struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// With a dot at each point.
    pub dots: bool,
}

/// A rectangle with its two axes.
pub(crate) struct Panel {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub lines: Vec<Line>,
}

/// Writes `panels` to a file of the directory, which is made if it is not there.
pub(crate) fn write(dir: &Path, name: &str, title: &str, panels: &[Panel]) -> Result<()> {
    fs::create_dir_all(dir).context(|| format!("{} cannot be made", dir.display()))?;
    let file = dir.join(name);
    let written = fs::write(&file, svg(title, panels));
    written.context(|| format!("{} cannot be written", file.display()))?;
    println!("drawn: {}", file.display());
    Ok(())
}

/// The file's text.
fn svg(title: &str, panels: &[Panel]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for line in panels.iter().flat_map(|panel| &panel.lines) {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    let width = PANEL * panels.len() as f64;
    let legend = TOP + PLOT + 54.0;
    let height = legend + ENTRY * names.len().div_ceil(ENTRIES) as f64 + 4.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         role=\"img\">\n<title>{}</title>\n<style>\n{}</style>\n<rect class=\"ground\" width=\"{width}\" \
         height=\"{height}\"/>\n",
        escape(title),
        style()
    );
    put(
        &mut svg,
        format_args!(
            r#"<text class="title" x="12" y="22">{}</text>"#,
            escape(title)
        ),
    );
    for (number, panel) in panels.iter().enumerate() {
        panel.draw(&mut svg, PANEL * number as f64, &names);
    }
    let column = (width - 24.0) / ENTRIES as f64;
    for (number, name) in names.iter().enumerate() {
        let x = 12.0 + column * (number % ENTRIES) as f64;
        let y = legend + ENTRY * (number / ENTRIES) as f64;
        put(
            &mut svg,
            format_args!(
                r#"<path class="line s{}" d="M{x:.1} {:.1}h30"/><text class="tick" x="{:.1}" y="{y:.1}">{}</text>"#,
                number % STYLES.len(),
                y - 4.0,
                x + 38.0,
                escape(name)
            ),
        );
    }
    svg + "</svg>\n"
}

impl Panel {
    fn draw(&self, svg: &mut String, at: f64, names: &[&str]) {
        let (left, right, bottom) = (at + LEFT, at + PANEL - RIGHT, TOP + PLOT);
        let x = |value: f64| left + self.x.part(value) * (right - left);
        let y = |value: f64| bottom - self.y.part(value) * PLOT;
        let heading = format!("{}: {}", self.title, self.y.title);
        put(
            svg,
            format_args!(
                r#"<text class="name" x="{:.1}" y="52">{}</text>"#,
                at + 12.0,
                escape(&heading)
            ),
        );
        for (value, label) in &self.y.ticks {
            let y = y(*value);
            put(
                svg,
                format_args!(
                    r#"<path class="grid" d="M{left:.1} {y:.1}H{right:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                    left - 7.0,
                    y + 4.0,
                    escape(label)
                ),
            );
        }
        for (value, label) in &self.x.ticks {
            let x = x(*value);
            put(
                svg,
                format_args!(
                    r#"<path class="grid" d="M{x:.1} {TOP}V{bottom:.1}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                    bottom + 16.0,
                    escape(label)
                ),
            );
        }
        put(
            svg,
            format_args!(
                r#"<path class="axis" d="M{left:.1} {TOP}V{bottom:.1}H{right:.1}"/><text class="tick" x="{right:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                bottom + 32.0,
                escape(&self.x.title)
            ),
        );
        for line in &self.lines {
            let style = names.iter().position(|name| *name == line.name);
            let style = style.unwrap_or_default() % STYLES.len();
            let mut path = String::new();
            let mut before: Option<(f64, f64)> = None;
            for (number, (across, up)) in line.points.iter().enumerate() {
                let (x, y) = (x(*across), y(*up));
                // What nobody could tell from the point before makes the file larger alone.
                let near = before.is_some_and(|(a, b)| (x - a).hypot(y - b) < NEAR);
                if near && number + 1 < line.points.len() {
                    continue;
                }
                before = Some((x, y));
                let command = if path.is_empty() { 'M' } else { 'L' };
                // A string takes everything.
                let _ = write!(path, "{command}{x:.1} {y:.1}");
                if line.dots {
                    put(
                        svg,
                        format_args!(
                            r#"<circle class="dot s{style}" cx="{x:.1}" cy="{y:.1}" r="3"/>"#
                        ),
                    );
                }
            }
            put(
                svg,
                format_args!(r#"<path class="line s{style}" d="{path}"/>"#),
            );
        }
    }
}

fn put(svg: &mut String, line: std::fmt::Arguments<'_>) {
    let _ = svg.write_fmt(line);
    svg.push('\n');
}

fn style() -> String {
    let mut light = String::from(
        ".ground{fill:#fff}.title,.name,.tick{font-family:system-ui,sans-serif;fill:#1f2328}\n\
         .title{font-size:14px;font-weight:600}.name{font-size:12px}.tick{font-size:11px}\n\
         .grid{stroke:#d8dee4;stroke-width:1}.axis{stroke:#57606a;fill:none}.line{fill:none;stroke-width:2}\n",
    );
    let mut dark = String::from(
        ".ground{fill:#0d1117}.title,.name,.tick{fill:#e6edf3}.grid{stroke:#30363d}.axis{stroke:#8b949e}\n",
    );
    for (number, (bright, dim, dashes)) in STYLES.iter().enumerate() {
        let _ = writeln!(
            light,
            ".s{number}{{stroke:{bright}}}.dot.s{number}{{fill:{bright}}}.line.s{number}{{stroke-dasharray:{}}}",
            if dashes.is_empty() { "none" } else { dashes }
        );
        let _ = writeln!(
            dark,
            ".s{number}{{stroke:{dim}}}.dot.s{number}{{fill:{dim}}}"
        );
    }
    format!("{light}@media (prefers-color-scheme:dark){{\n{dark}}}\n")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_by_factors_has_all_values_between_two_of_its_ticks() {
        for (low, high) in [(3.4, 5565.0), (17.0, 18.0), (0.02, 0.9), (10.0, 10.0)] {
            let axis = Axis::log("", [high, low]);
            assert!(axis.from <= low && axis.to >= high && axis.from < axis.to);
            assert!((2..=12).contains(&axis.ticks.len()), "{:?}", axis.ticks);
            assert_eq!((axis.part(axis.from), axis.part(axis.to)), (0.0, 1.0));
        }
    }

    #[test]
    fn what_is_no_number_is_at_an_end() {
        let axis = Axis::log("", [f64::NAN, -1.0, 0.0, f64::INFINITY]);
        assert!(axis.from < axis.to);
        assert_eq!(
            [axis.part(f64::NAN), axis.part(-3.0), axis.part(1e300)],
            [0.0, 0.0, 1.0]
        );
    }

    #[test]
    fn lines_of_one_name_look_alike_and_text_is_escaped() {
        let line = |name: &str| Line {
            name: name.into(),
            points: vec![(1.0, 0.0), (10.0, 100.0)],
            dots: false,
        };
        let panel = |lines| Panel {
            title: "a < b".into(),
            x: Axis::log("x", [1.0, 10.0]),
            y: Axis::percent("y"),
            lines,
        };
        let text = svg(
            "t & u",
            &[
                panel(vec![line("one"), line("two")]),
                panel(vec![line("two")]),
            ],
        );
        // Each in a panel or two, and in the legend.
        assert_eq!(text.matches(r#"class="line s0""#).count(), 2);
        assert_eq!(text.matches(r#"class="line s1""#).count(), 3);
        assert!(text.contains("t &amp; u") && text.contains("a &lt; b"));
        assert!(!text.contains("NaN") && !text.contains("a < b"));
    }
}
