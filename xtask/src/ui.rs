// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Progress on stderr, so that stdout stays the output of what was run.

use std::io::{self, Write};
use std::time::Instant;

/// A text on stdout, for as much of which there is a reader.
pub(crate) fn show(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// One line about a step that has begun.
pub(crate) fn say(text: impl AsRef<str>) {
    eprintln!("xtask: {}", text.as_ref());
}

/// A long step: its name when it begins, its time when it ends.
pub(crate) struct Step {
    name: String,
    begun: Instant,
}

impl Step {
    pub(crate) fn begin(name: impl Into<String>) -> Self {
        let name = name.into();
        say(format!("{name} …"));
        Step {
            name,
            begun: Instant::now(),
        }
    }

    pub(crate) fn end(self) {
        say(format!(
            "{}: {:.1} s",
            self.name,
            self.begun.elapsed().as_secs_f64()
        ));
    }
}
