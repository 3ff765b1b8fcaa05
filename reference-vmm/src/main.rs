// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The `reference-vmm` binary: the command line around the library.

use std::io::Write;
use std::process::ExitCode;

use reference_vmm::cli::{self, Command};
use reference_vmm::end::Chain;
use reference_vmm::timeline::{Event, timeline};
use reference_vmm::{doctor, logger, run};

/// Exit status of a command line or configuration that cannot be.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    timeline().mark(Event::Start);
    let command = match cli::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(error) => {
            say(format_args!("{}", Chain(&error)));
            return USAGE.into();
        }
    };
    match command {
        Command::Run(options) => {
            logger::start(options.log);
            run::run(&options, |message| say(message)).into()
        }
        Command::Doctor { json, kvm } => {
            logger::start(log::LevelFilter::Error);
            match doctor::run(json, &kvm, &mut std::io::stdout().lock()) {
                Ok(status) => status.into(),
                Err(error) => {
                    say(format_args!("cannot write the report: {error}"));
                    1.into()
                }
            }
        }
        Command::Help(text) => print(text),
        Command::Version => print(concat!("reference-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
    }
}

/// One line on stderr, which may be closed.
fn say(message: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "reference-vmm: {message}");
}

/// Text on stdout. A reader that has seen enough of it (`| head`) is no failure.
fn print(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
