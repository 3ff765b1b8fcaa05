// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Many guests of one snapshot side by side: what one more takes of the host's memory, and of its time.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::restore::{Guest, WAYS, Way, restore, start, summary};
use crate::failure::{Context, Failure, Result};
use crate::ui::{Step, say};

/// Of how much the guests are that run side by side, and how many do. Where memory is not shared all of it is in the host's
/// memory as often.
pub(super) const FLEET_SIZE: u32 = 64;
const FLEET: usize = 100;

/// Measures each way that is to have many, and prints it.
pub(super) fn measure(vmm: &Path, dir: &Path) -> Result<()> {
    println!(
        "\n{FLEET} guests of one snapshot of {FLEET_SIZE} MiB side by side: what one more takes when all have answered; the \
         milliseconds of each where they are started one after another, and of {FLEET} by {FLEET} where they are at once\n"
    );
    println!(
        "{:<20} {:>14} {:>14} {:>24} {:>24} {:>10}",
        "memory", "KiB, process", "KiB, host", "first byte", "answer", "at once"
    );
    for way in WAYS.iter().filter(|way| way.fleet) {
        let step = Step::begin(format!("{FLEET} guests, memory {}", way.name));
        let taken = one_by_one(vmm, dir, way)?;
        let at_once = at_once(vmm, dir, way)?;
        step.end();
        println!(
            "{:<20} {:>14} {:>14} {:>24} {:>24} {at_once:>10.2}",
            way.name,
            taken.process_kib,
            taken.host_kib,
            summary(&taken.firsts),
            summary(&taken.answers),
        );
    }
    say(
        "of the process: its share of resident memory and page tables; of the host: what /proc/meminfo has available less",
    );
    Ok(())
}

struct Taken {
    process_kib: u64,
    host_kib: u64,
    firsts: Vec<f64>,
    answers: Vec<f64>,
}

fn one_by_one(vmm: &Path, dir: &Path, way: &Way) -> Result<Taken> {
    let mut guests: Vec<Guest> = Vec::with_capacity(FLEET);
    let (mut firsts, mut answers) = (Vec::new(), Vec::new());
    let mut alone = (0, 0);
    for _ in 0..FLEET {
        let (mut guest, first) = restore(vmm, dir, way, FLEET_SIZE)?;
        firsts.push(first);
        answers.push(guest.hears(b'>')?);
        guests.push(guest);
        if let [first] = &guests[..] {
            alone = (taken_by(first)?, available()?);
        }
    }
    let all: u64 = guests.iter().map(taken_by).sum::<Result<u64>>()?;
    let left = available()?;
    let more = guests.len().saturating_sub(1).max(1) as u64;
    Ok(Taken {
        process_kib: all.saturating_sub(alone.0) / more,
        host_kib: alone.1.saturating_sub(left) / more,
        firsts,
        answers,
    })
}

/// A guest's share of the milliseconds in which all of them, started at once, answer.
fn at_once(vmm: &Path, dir: &Path, way: &Way) -> Result<f64> {
    let begun = Instant::now();
    let guests = (0..FLEET).map(|_| start(vmm, dir, way, FLEET_SIZE));
    let mut guests = guests.collect::<Result<Vec<_>>>()?;
    for guest in &mut guests {
        guest.hears(b'>')?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e3 / FLEET as f64)
}

/// A guest's share of resident memory, and its page tables, KiB.
fn taken_by(guest: &Guest) -> Result<u64> {
    let id = guest.id();
    Ok(field(&format!("/proc/{id}/smaps_rollup"), "Pss:")?
        + field(&format!("/proc/{id}/status"), "VmPTE:")?)
}

/// A number of KiB behind a word of /proc.
fn field(file: &str, word: &str) -> Result<u64> {
    let text = fs::read_to_string(file).context(|| format!("{file} cannot be read"))?;
    kib(&text, word).ok_or_else(|| Failure::new(format!("{file} has no {word}")))
}

fn kib(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// What the host has left, once what was freed a moment ago has come back.
fn available() -> Result<u64> {
    thread::sleep(Duration::from_millis(200));
    field("/proc/meminfo", "MemAvailable:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_proc_is_read() {
        let text = "Rss:     12 kB\nPss:            4096 kB\nPss_Anon:       7 kB\n";
        assert_eq!(kib(text, "Pss:"), Some(4096));
        assert_eq!(kib(text, "Swap:"), None);
        assert_eq!(kib("Pss: much", "Pss:"), None);
    }
}
