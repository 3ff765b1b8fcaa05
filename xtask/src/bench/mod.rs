// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask bench`: what a start costs, against what it must cost or what another monitor takes, in one run.

mod async_pf;
mod boot;
mod faults;
mod fleet;
mod io;
mod login;
mod migrate;
mod restore;
mod slow_pages;
mod startup;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Child, Command};

use crate::failure::{Context, Failure, Result};
use crate::host::{self, KvmKind};
pub(crate) use async_pf::{
    RUN_COMMAND as RUN_ASYNC_PF_COMMAND, run_command as run_async_pf_command,
};
pub(crate) use boot::{RUN_COMMAND, run_command};
pub(crate) use io::{RUN_COMMAND as RUN_IO_COMMAND, run_command as run_io_command};
pub(crate) use login::{RUN_COMMAND as RUN_LOGIN_COMMAND, run_command as run_login_command};
pub(crate) use migrate::{RUN_COMMAND as RUN_MIGRATE_COMMAND, run_command as run_migrate_command};

const USAGE: &str = "\
Measures, and compares in the same run.

Usage: cargo xtask bench startup [--runs N]   (60)
       cargo xtask bench boot [--rounds N]    (3)
       cargo xtask bench io [--rounds N] [--wall]   (3)
       cargo xtask bench login [--rounds N]   (3)
       cargo xtask bench migrate [--rounds N] [--postcopy] (3)
       cargo xtask bench restore [--rounds N] [--real-time] [--plot DIR] (9)
       cargo xtask bench faults [--rounds N] [--real-time] [--plot DIR] (25)
       cargo xtask bench async-pf [--rounds N] (5)

  startup   a tiny guest on this host's KVM: from exec to its first byte and to the end, against a program that makes
            the unavoidable system calls alone; peak memory; the size of the program
  boot      Debian's uncompressed cloud kernel in the lab, counting instructions: the guest's time at init, and from
            the VMM's start to its end, against Debian's QEMU microvm
  io        the same guest's disk, TCP and vsock in the lab, counting instructions, against the same QEMU with and
            without vhost-net. An emulated machine that counts instructions stands still now and then; with --wall it
            does not count them, and the figures are as steady as this host is
  login     the Debian of `cargo xtask boot --distro` from the monitor's start to its login prompt, against the same
            QEMU: a lab machine for each boot, by the host's clock
  migrate   an idle guest of 1 GiB that moves to another process in the lab: how long it stands still and
            where that goes, and how long all takes, against the same QEMU's migration; with --postcopy a guest that
            writes 256 MiB without rest, which goes before its memory after two seconds, and the longest silence behind that
  restore   guests that go on from snapshots on this host's KVM: from exec to the first byte and to an answer, by size and by
            the way in which memory comes, against the boot of a tiny guest of that size; what a recorded working set gains
            where the page cache is cold; 100 of one snapshot: what one more takes
  faults    faults served from a file: async-pf's pager, a loop without any bookkeeping and a handler as Firecracker's
            example is, by turns (cargo bench -p async-pf --bench pager)
  async-pf  a guest of one vCPU in the lab with two tasks, of which one waits for late pages: how far the other comes, with
            asynchronous page faults and without

  --real-time  as root: what is measured has a real-time priority, and what else runs on this host does not come between
  --plot DIR   writes what was measured as SVG files there, too";

/// `cargo xtask bench`.
pub(crate) fn command(args: Vec<OsString>) -> Result<i32> {
    use lexopt::prelude::*;
    let mut what = None;
    let mut count = None;
    let (mut wall, mut postcopy, mut real_time) = (false, false, false);
    let mut plot: Option<PathBuf> = None;
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Value(word) if what.is_none() => what = Some(word.string()?),
            Long(flag @ ("runs" | "rounds")) => {
                let flag = flag.to_owned();
                count = Some(times(&flag, &parser.value()?)?);
            }
            Long("wall") => wall = true,
            Long("postcopy") => postcopy = true,
            Long("real-time") => real_time = true,
            Long("plot") => plot = Some(parser.value()?.into()),
            Short('h') | Long("help") => {
                crate::ui::show(USAGE);
                return Ok(0);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if (plot.is_some() || real_time) && !matches!(what.as_deref(), Some("restore" | "faults")) {
        return Err(Failure::usage(
            "--plot and --real-time are of bench restore and bench faults",
        ));
    }
    match what.as_deref() {
        Some("startup") => startup::run(count.unwrap_or(60)),
        Some("boot") => boot::run(count.unwrap_or(3)),
        Some("io") => io::run(count.unwrap_or(3), !wall),
        Some("login") => login::run(count.unwrap_or(3)),
        Some("migrate") => migrate::run(count.unwrap_or(3), postcopy),
        Some("restore") => restore::run(count.unwrap_or(9), real_time, plot.as_deref()),
        Some("faults") => faults::run(count, real_time, plot.as_deref()),
        Some("async-pf") => async_pf::run(count.unwrap_or(5)),
        _ => Err(Failure::usage(
            "cargo xtask bench startup, boot, io, login, migrate, restore, faults or async-pf",
        )),
    }
}

/// What the host's KVM is, in words.
fn host_kvm() -> Result<String> {
    match host::kvm() {
        (KvmKind::None, reason) => Err(Failure::new(format!(
            "there is nothing to measure on this host: {reason}"
        ))),
        (_, reason) => Ok(reason),
    }
}

/// A process that does not outlive its measurement.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// In the lab: a tap by `guest_io`, with the host's address, up.
fn make_tap(guest_io: &OsStr, name: &str) -> Result<()> {
    let made = Command::new(guest_io).args(["tap", name]).status();
    match made
        .context(|| "the tap's maker does not start".into())?
        .success()
    {
        true => Ok(()),
        false => Err(Failure::new("there is no tap")),
    }
}

/// How often something is measured: at least once.
fn times(flag: &str, value: &OsStr) -> Result<usize> {
    let number = value.to_str().and_then(|text| text.parse().ok());
    number.filter(|number| *number > 0).ok_or_else(|| {
        Failure::usage(format!(
            "--{flag} {value:?}: a whole number is wanted, and at least 1"
        ))
    })
}

/// The middle of some measurements, and the ranks around it that nine tenths and one tenth lie under.
fn ranks(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: usize| {
        values
            .get(values.len() * share / 100)
            .copied()
            .unwrap_or(f64::NAN)
    };
    (at(10), at(50), at(90))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_measured_no_times() {
        let ask = |value: &str| command(vec!["startup".into(), format!("--runs={value}").into()]);
        for value in ["0", "x", "", "-1"] {
            let failure = ask(value).unwrap_err();
            assert_eq!(failure.status(), crate::failure::STATUS_USAGE);
            let told = format!("--runs {value:?}: ");
            assert!(failure.to_string().starts_with(&told), "{failure}");
        }
    }

    #[test]
    fn what_is_not_drawn_is_not_asked_to_be() {
        let failure = command(vec!["startup".into(), "--plot=x".into()]).unwrap_err();
        assert_eq!(failure.status(), crate::failure::STATUS_USAGE);
    }

    #[test]
    fn the_middle_is_the_middle() {
        let mut values: Vec<f64> = (0..100_u32).rev().map(f64::from).collect();
        assert_eq!(ranks(&mut values), (10.0, 50.0, 90.0));
        assert_eq!(ranks(&mut [3.0]), (3.0, 3.0, 3.0));
        assert!(ranks(&mut []).1.is_nan());
    }
}
