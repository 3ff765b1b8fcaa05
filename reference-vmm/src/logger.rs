// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The monitor's log: lines on stderr, for stdout is the guest's.

use log::{LevelFilter, Log, Metadata, Record};

use crate::text::printable;

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            // One write a line, so that lines of several threads do not mix. Stderr closed or full
            // is no reason to stop a guest.
            // Who puts others' text into a line escapes what would begin another one; a line of ours may have several.
            let said = record.args().to_string();
            let said: Vec<String> = said.split('\n').map(printable).collect();
            let line = format!("reference-vmm: {level}: {}\n", said.join("\n"));
            crate::stderr::write(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Logs up to `level` from now on.
pub fn start(level: LevelFilter) {
    // Fails only where a logger is set already, which is then somebody's choice.
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}
