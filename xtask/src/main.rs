// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The repository's own chores, each doing all of its own set-up.
//!
//! `cargo xtask` without a command prints what there is. Read `lab/mod.rs` first: the emulated machine is
//! what the other chores stand on.

mod apt;
mod assets;
mod bench;
mod boot;
mod cargo;
mod coverage;
mod cpio;
mod distro;
mod failure;
mod fuzz;
mod guest_image;
mod host;
mod kernel_image;
mod lab;
mod modules;
mod plot;
mod tiers;
mod ui;

use failure::{Failure, Result};

const USAGE: &str = "\
The repository's own chores.

Usage: cargo xtask COMMAND [OPTIONS]

Commands:
  build                      the release binary, linked statically, as target/reference-vmm
  boot [OPTIONS]             boot a stock Debian kernel under reference-vmm, to a shell on this terminal
  boot --distro [OPTIONS]    boot a whole Debian, with disk, network and vsock, to its login
  lab [OPTIONS] -- COMMAND…  run COMMAND as root in an emulated machine with hardware-style KVM (kvm_amd)
  test [OPTIONS]             build and run the tests of all tiers, and say what ran where
  coverage                   measure the tests' coverage, against coverage_config.json
  fuzz [TARGET…]             run the crates' fuzz targets with libFuzzer
  bench startup|boot|io|login|migrate|restore|faults|async-pf
                             measure a start, a boot, a guest's devices, a Debian's start to its login or a migration,
                             against a floor or another monitor; or how page faults are served

`cargo xtask COMMAND --help` says more of one.";

fn main() {
    let mut args = std::env::args_os().skip(1);
    let command = args.next();
    let rest: Vec<_> = args.collect();
    let outcome = match command.as_deref().and_then(|c| c.to_str()) {
        Some("bench") => bench::command(rest),
        Some(bench::RUN_COMMAND) => bench::run_command(rest),
        Some(bench::RUN_IO_COMMAND) => bench::run_io_command(rest),
        Some(bench::RUN_LOGIN_COMMAND) => bench::run_login_command(rest),
        Some(bench::RUN_MIGRATE_COMMAND) => bench::run_migrate_command(rest),
        Some(bench::RUN_ASYNC_PF_COMMAND) => bench::run_async_pf_command(rest),
        Some("build") => cargo::build_command(&rest),
        Some("boot") => boot::command(rest),
        Some(distro::WATCH_COMMAND) => distro::watch_command(rest),
        Some(boot::WATCH_COMMAND) => boot::watch(rest),
        Some("coverage") => coverage::command(rest),
        Some("fuzz") => fuzz::command(rest),
        Some("test") => tiers::command(rest),
        Some(tiers::RUN_COMMAND) => tiers::run_command(rest),
        Some("lab") => lab::command(rest),
        Some(lab::AGENT_COMMAND) => lab::agent::command(),
        None | Some("help" | "--help" | "-h") => {
            crate::ui::show(USAGE);
            Ok(0)
        }
        Some(_) => Err(Failure::usage(format!(
            "there is no command {}; `cargo xtask help` lists them",
            command.unwrap_or_default().display()
        ))),
    };
    std::process::exit(finish(outcome));
}

/// The process's status, after what went wrong has been said.
fn finish(outcome: Result<i32>) -> i32 {
    match outcome {
        Ok(status) => status,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            failure.status()
        }
    }
}
