// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table at the end of the tests: tier, where, counts, time; and what failed, by name.

use std::time::Duration;

use super::Tier;
use super::run::Outcome;

pub(crate) fn print(outcomes: &[Outcome], waived: &[Tier], total: Duration) {
    print!("{}", text(outcomes, waived, total));
}

fn text(outcomes: &[Outcome], waived: &[Tier], total: Duration) -> String {
    // One row for each tier and place, in the order in which they ran.
    let mut rows: Vec<(Tier, &str, Vec<&Outcome>)> = Vec::new();
    for outcome in outcomes {
        match rows
            .iter_mut()
            .find(|(tier, place, _)| *tier == outcome.tier && *place == outcome.place)
        {
            Some((.., of_row)) => of_row.push(outcome),
            None => rows.push((outcome.tier, &outcome.place, vec![outcome])),
        }
    }
    let wide = rows
        .iter()
        .map(|(_, place, _)| place.chars().count())
        .max()
        .unwrap_or(0)
        .max(5);
    let mut text = format!(
        "\n{:<6} {:<wide$} {:>8} {:>7} {:>7} {:>8} {:>9}\n",
        "tier", "where", "programs", "passed", "failed", "ignored", "time"
    );
    for (tier, place, of_row) in &rows {
        let sum = |field: fn(&Outcome) -> u64| of_row.iter().map(|o| field(o)).sum::<u64>();
        let seconds: f64 = of_row.iter().map(|o| o.seconds).sum();
        text += &format!(
            "{:<6} {place:<wide$} {:>8} {:>7} {:>7} {:>8} {:>7.1} s\n",
            tier.name(),
            of_row.len(),
            sum(|o| o.passed),
            sum(|o| o.failed),
            sum(|o| o.ignored),
            seconds
        );
    }
    for tier in waived {
        text += &format!("{:<6} waived\n", tier.name());
    }
    text += &failures(outcomes);
    let verdict = match outcomes.iter().all(Outcome::is_good) {
        true => "all good",
        false => "not good",
    };
    let again = match outcomes.iter().filter(|o| !o.again.is_empty()).count() {
        0 => String::new(),
        count => format!(", {count} of them run again"),
    };
    text += &format!("{verdict}{again}, {:.0} s in all\n", total.as_secs_f64());
    text
}

/// Of so many tests it is shown what they said: a CI's record keeps the last few hundred lines.
const MOST_SAID: usize = 12;

/// What the tests that failed said, those too that were good when they were run again, and then (so that the end of it tells
/// most) which they are; nothing where none did.
pub(crate) fn failures(outcomes: &[Outcome]) -> String {
    let (bad, again): (Vec<_>, Vec<_>) = outcomes
        .iter()
        .filter(|o| !o.is_good() || !o.again.is_empty())
        .partition(|o| !o.is_good());
    let what = |outcome: &Outcome| {
        let (tier, place) = (outcome.tier.name(), &outcome.place);
        format!("{} ({tier}, {place})", outcome.name)
    };
    let said: Vec<_> = bad
        .iter()
        .chain(&again)
        .flat_map(|outcome| outcome.said.iter().map(move |said| (*outcome, said)))
        .collect();
    let mut text = String::new();
    for (outcome, said) in said.iter().take(MOST_SAID) {
        text += &format!("\n---- {}: {}\n", what(outcome), said.test);
        for line in &said.lines {
            text += &format!("  {line}\n");
        }
    }
    match said.len() {
        0 => {}
        count @ ..=MOST_SAID => text += &format!("---- {count} in all\n\n"),
        count => text += &format!("---- {MOST_SAID} of {count}: the others are above\n\n"),
    }
    for outcome in &again {
        let tests = outcome.again.join(" ");
        text += &format!(
            "failed at first, and good when run again: {}: {tests}\n",
            what(outcome)
        );
    }
    for outcome in &bad {
        let why = outcome
            .trouble
            .clone()
            .unwrap_or_else(|| format!("{} failed", outcome.failed));
        text += &format!("FAILED: {}: {why}\n", what(outcome));
        for test in &outcome.failures {
            text += &format!("  {test}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::said::Said;
    use super::*;

    #[test]
    fn the_table_adds_up_and_names_what_failed() {
        let mut good = Outcome::broken(Tier::Pure, "this host", "");
        (good.trouble, good.passed, good.seconds) = (None, 3, 0.5);
        let mut bad = Outcome::broken(Tier::Lab, "the lab", "signal 6");
        bad.name = "reference-vmm lab_boot".into();
        let text = text(
            &[good.clone(), good, bad],
            &[Tier::Kvm],
            Duration::from_secs(9),
        );
        assert!(
            text.contains("pure   this host        2       6       0        0     1.0 s"),
            "{text}"
        );
        assert!(text.contains("kvm    waived"));
        assert!(text.contains("FAILED: reference-vmm lab_boot (lab, the lab): signal 6"));
        assert!(text.contains("not good, 9 s in all"));
    }

    #[test]
    fn what_failed_is_told_with_what_it_said_and_the_names_come_last() {
        let mut good = Outcome::broken(Tier::Pure, "this host", "");
        good.trouble = None;
        assert_eq!(failures(std::slice::from_ref(&good)), "");
        let mut bad = good.clone();
        let names: Vec<_> = (0..MOST_SAID + 3).map(|n| format!("test_{n}")).collect();
        bad.name = "io-bus unit tests".into();
        bad.failed = names.len() as u64;
        bad.said = names
            .iter()
            .map(|test| Said {
                test: test.clone(),
                lines: vec![format!("thread '{test}' panicked at x")],
            })
            .collect();
        bad.failures = names.clone();
        let mut flaky = good.clone();
        flaky.name = "io-bus kvm_x".into();
        flaky.again = vec!["once".into()];
        let told = failures(&[good, flaky, bad]);
        let (said, failed) = told.split_once("FAILED: ").unwrap();
        let once =
            "failed at first, and good when run again: io-bus kvm_x (pure, this host): once\n";
        assert!(said.contains(once), "{said}");
        assert!(said.contains(
            "---- io-bus unit tests (pure, this host): test_0\n  thread 'test_0' panicked at x\n"
        ));
        assert!(
            said.contains("12 of 15") && !said.contains("test_12"),
            "{said}"
        );
        assert!(failed.starts_with("io-bus unit tests (pure, this host): 15 failed\n  test_0\n"));
        assert!(failed.ends_with("  test_14\n"), "{failed}");
    }
}
