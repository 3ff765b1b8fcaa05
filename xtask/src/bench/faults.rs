// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a fault is served: async-pf's own bench, which lets a pager, a bare loop and a handler as Firecracker's example is take
//! turns; and what it has measured as a picture.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::cargo;
use crate::failure::{Context, Failure, Result};
use crate::host;
use crate::plot::{self, Axis, Line, Panel};

/// From and to which part of 1,000 faults a line goes: beyond are the few that were on their way already, and the host's own pauses.
const SHOWN: std::ops::RangeInclusive<usize> = 10..=998;

pub(super) fn run(rounds: Option<usize>, real_time: bool, plot: Option<&Path>) -> Result<i32> {
    let file = host::workspace().join("target/xtask/faults.json");
    let dir = host::workspace().join("target/xtask");
    fs::create_dir_all(&dir).context(|| format!("{} cannot be made", dir.display()))?;
    let mut bench = cargo::command();
    bench.args([
        "bench", "-p", "async-pf", "--bench", "pager", "--", "--json",
    ]);
    bench.arg(&file);
    if let Some(rounds) = rounds {
        bench.args(["--rounds", &rounds.to_string()]);
    }
    if real_time {
        bench.arg("--real-time");
    }
    let ended = bench.status().context(|| "cargo does not start".into())?;
    if !ended.success() {
        return Err(Failure::new(format!("the bench failed ({ended})")));
    }
    if let Some(dir) = plot {
        let text = fs::read_to_string(&file);
        let text = text.context(|| format!("{} cannot be read", file.display()))?;
        let measured = serde_json::from_str(&text);
        let measured = measured.context(|| format!("{} is no JSON", file.display()))?;
        plot::write(
            dir,
            "fault-latency.svg",
            "How long a thread waits for a page, at random, in microseconds",
            &panels(&measured),
        )?;
    }
    Ok(0)
}

/// One for each number of threads that touch: in the first those that serve on one thread, in the second on two.
fn panels(measured: &Value) -> Vec<Panel> {
    let all = measured.as_array().into_iter().flatten();
    let random = all.filter(|of| of["random"] == true);
    let panels = random.filter_map(|of| {
        let threads = of["threads"].as_u64()?;
        let mut lines = Vec::new();
        for server in of["servers"].as_array()? {
            let name = server["name"].as_str()?;
            let waited = server["nanoseconds_by_permille"].as_array()?;
            let points = waited.iter().enumerate().skip(*SHOWN.start());
            let points = points.take_while(|(share, _)| share <= SHOWN.end());
            let points = points
                .filter_map(|(share, waited)| Some((waited.as_f64()? / 1e3, share as f64 / 10.0)));
            lines.push(Line {
                name: name.to_owned(),
                points: points.collect(),
                dots: false,
            });
        }
        let values = lines.iter().flat_map(|line| &line.points).map(|(x, _)| *x);
        let plural = if threads == 1 {
            "thread touches"
        } else {
            "threads touch"
        };
        Some(Panel {
            title: format!("{threads} {plural}"),
            x: Axis::log("µs", values.collect::<Vec<_>>()),
            y: Axis::percent("served within"),
            lines,
        })
    });
    panels.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_drawn_is_the_random_order() {
        let of = |random: bool, threads: u64| {
            let waited: Vec<u64> = (0..=1000).map(|share| 10_000 + share).collect();
            json!({ "random": random, "threads": threads, "servers": [
                { "name": "pager, 1 worker", "nanoseconds_by_permille": waited },
            ]})
        };
        let panels = panels(&json!([of(true, 1), of(true, 2), of(false, 1)]));
        let titles: Vec<_> = panels.iter().map(|panel| panel.title.as_str()).collect();
        assert_eq!(titles, ["1 thread touches", "2 threads touch"]);
        let line = &panels[0].lines[0];
        assert_eq!(line.points.first(), Some(&(10.01, 1.0)));
        assert_eq!(line.points.last(), Some(&(10.998, 99.8)));
    }
}
