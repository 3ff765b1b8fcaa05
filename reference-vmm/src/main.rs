// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The `reference-vmm` binary: the command line around the library.

#![cfg_attr(not(test), no_main)]

use std::ffi::{OsString, c_char, c_int};
use std::io::Write;

use reference_vmm::cli::{self, Command};
use reference_vmm::cpu_report::CpuReport;
use reference_vmm::end::Chain;
use reference_vmm::timeline::{Event, timeline};
use reference_vmm::vm::BuildError;
use reference_vmm::{ctl, doctor, logger, process, run, stderr};

/// Exit status of a command line or configuration that cannot be.
const USAGE: u8 = 2;

/// C's `main`; [`process`] has the reason.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    timeline().mark(Event::Start);
    if let Err(error) = process::prepare() {
        say(format_args!(
            "cannot open /dev/null for a closed stdin, stdout or stderr: {error}"
        ));
        return 1;
    }
    // SAFETY: the C library calls this with the process's arguments.
    let args = unsafe { process::args(argc, argv) };
    c_int::from(command(args))
}

/// Does what the command line says; the exit status.
fn command(args: Vec<OsString>) -> u8 {
    let command = match cli::parse(args) {
        Ok(command) => command,
        Err(error) => {
            say(format_args!("{}", Chain(&error)));
            return USAGE;
        }
    };
    match command {
        Command::Run(options) => {
            logger::start(options.log);
            run::run(&options, say)
        }
        Command::Cpu {
            template,
            json,
            kvm,
        } => {
            let report = match CpuReport::ask(&kvm, &template) {
                Ok(report) => report,
                Err(error) => return failed(&error),
            };
            let refusal = report.refusal();
            match &refusal {
                // Lines are for a reader, who has what is missing on stderr.
                Some(_) if !json => 0,
                _ if json => print(&report.json()),
                _ => print(&report.to_string()),
            };
            refusal.map_or(0, |error| failed(&error))
        }
        Command::Doctor { json, kvm } => {
            logger::start(log::LevelFilter::Error);
            doctor::run(json, &kvm, &mut std::io::stdout().lock()).unwrap_or_else(|error| {
                say(format_args!("cannot write the report: {error}"));
                1
            })
        }
        Command::Snapshot(command) => {
            logger::start(log::LevelFilter::Warn);
            cli::snapshot::run(&command, |text| _ = print(text), say)
        }
        Command::Ctl(options) => ctl::run(&options, |text| _ = print(text), say),
        Command::Help(text) => print(text),
        Command::Version => print(concat!("reference-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
    }
}

/// Says why there is no answer; the exit status.
fn failed(error: &BuildError) -> u8 {
    say(format_args!("{}", Chain(error)));
    error.exit_status()
}

/// One line on stderr, which may be closed or full.
fn say(message: std::fmt::Arguments<'_>) {
    stderr::write(format!("reference-vmm: {message}\n").as_bytes());
}

/// Text on stdout. A reader that has seen enough of it (`| head`) is no failure.
fn print(text: &str) -> u8 {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    0
}
