// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a chore ends with when it cannot do its work: a sentence for a person, and an exit status.

use std::fmt;

/// The status of a chore that could not do its own part, distinct from any status of what it ran for the user
/// (`env`, `timeout` and their kin use the same number).
pub(crate) const STATUS_FAILED: i32 = 125;
/// The status of wrong arguments.
pub(crate) const STATUS_USAGE: i32 = 2;

/// A sentence that says what was wrong, with the value, and what to do.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    status: i32,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Failure {
            text: text.into(),
            status: STATUS_FAILED,
        }
    }

    /// Wrong arguments.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Failure {
            text: text.into(),
            status: STATUS_USAGE,
        }
    }

    /// The same failure, ending the process with `status`.
    pub(crate) fn with_status(mut self, status: i32) -> Self {
        self.status = status;
        self
    }

    pub(crate) fn status(&self) -> i32 {
        self.status
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

impl From<lexopt::Error> for Failure {
    fn from(error: lexopt::Error) -> Self {
        Failure::usage(error.to_string())
    }
}

/// Says what was being done when an error of the system came.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::new(format!("{}: {error}", what())))
    }
}
