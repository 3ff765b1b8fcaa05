// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a guest comes to its end, and the signal that carries the news to the main thread.
//!
//! A device model or a vCPU thread learns first that the guest wants to stop; the main thread is
//! the one that stops the vCPUs and leaves. [`EndSignal`] is what they share: the first end that is
//! told wins, later ones are dropped, because a guest that writes to its reset register and then
//! triple-faults has been reset.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::text::printable;

/// Why the guest runs no more.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEnd {
    /// The guest entered ACPI S5, or a system event said the same.
    PoweredOff,
    /// The guest asked for a reset: i8042, the ACPI reset register, or a system event. This monitor
    /// ends then; whoever wants the guest again starts it again.
    Reset,
    /// The guest's kernel said through pvpanic that it panicked.
    Panicked,
    /// The guest wrote this value to the isa-debug-exit port.
    DebugExit(u32),
    /// Every vCPU halted, and the machine has no interrupt controller that could wake one.
    Halted,
    /// The vCPU cannot go on: a triple fault, or an error inside KVM. The text names the vCPU, what
    /// happened, and its registers.
    Crashed(String),
    /// A signal or the console's escape stopped the guest.
    Stopped(StopCause),
    /// It runs in another process now, at this address.
    Migrated(String),
    /// The monitor itself failed while the guest ran, or the host could not give the guest its memory; the text says at what.
    Failed(String),
}

/// Who stopped a guest that had not ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopCause {
    /// A signal, by number.
    Signal(i32),
    /// Ctrl-A x on the console.
    Console,
    /// gdb's `kill`.
    Debugger,
}

impl GuestEnd {
    /// The process's exit status: 0 the guest powered off, rebooted, was stopped or has moved; 1 the monitor
    /// failed; 3 the guest crashed; isa-debug-exit has QEMU's rule, `(value << 1) | 1`.
    pub fn exit_status(&self) -> u8 {
        match self {
            GuestEnd::PoweredOff
            | GuestEnd::Reset
            | GuestEnd::Halted
            | GuestEnd::Stopped(_)
            | GuestEnd::Migrated(_) => 0,
            GuestEnd::Failed(_) => 1,
            GuestEnd::Panicked | GuestEnd::Crashed(_) => 3,
            // What is above bit 6 is lost in an exit status, with QEMU as here.
            GuestEnd::DebugExit(value) => (value << 1 | 1) as u8,
        }
    }

    /// What the user is told of it, besides the log; nothing where an end is as it should be.
    pub(crate) fn words(&self) -> Option<String> {
        match self {
            GuestEnd::Crashed(what) => Some(format!("the guest crashed: {what}")),
            GuestEnd::Failed(what) => Some(what.clone()),
            GuestEnd::Panicked => Some("the guest's kernel panicked (told by pvpanic)".into()),
            GuestEnd::Migrated(to) => Some(format!("the guest has moved to {to:?}")),
            _ => None,
        }
    }
}

impl fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestEnd::PoweredOff => f.write_str("it powered off"),
            GuestEnd::Reset => f.write_str("it asked for a reset"),
            GuestEnd::Panicked => f.write_str("its kernel panicked"),
            GuestEnd::DebugExit(value) => write!(f, "it wrote {value:#x} to the debug-exit port"),
            GuestEnd::Halted => f.write_str("every vCPU halted for good"),
            GuestEnd::Crashed(what) => write!(f, "it crashed: {what}"),
            GuestEnd::Stopped(StopCause::Signal(signal)) => {
                write!(f, "{} stopped it", crate::signals::name(*signal))
            }
            GuestEnd::Stopped(StopCause::Console) => f.write_str("the console's escape stopped it"),
            GuestEnd::Stopped(StopCause::Debugger) => f.write_str("the debugger stopped it"),
            GuestEnd::Migrated(to) => write!(f, "it has moved to {}", printable(to)),
            GuestEnd::Failed(what) => f.write_str(what),
        }
    }
}

/// Told by the first who knows that the guest has ended; polled by the main thread through its
/// eventfd.
#[derive(Debug)]
pub struct EndSignal {
    end: OnceLock<GuestEnd>,
    event: EventFd,
    before: OnceLock<Before>,
    /// What the end has cost, if that is known behind it.
    cost: OnceLock<String>,
}

/// What is done before an end of the guest's own is told.
struct Before(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Before")
    }
}

impl EndSignal {
    /// A signal not told yet.
    ///
    /// # Errors
    /// The errno of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(EndSignal {
            end: OnceLock::new(),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            before: OnceLock::new(),
            cost: OnceLock::new(),
        })
    }

    /// Has `finish` called before each end of the guest's own is told, on the thread that tells it: what
    /// the guest said before is brought out there. It may block; that it comes back once another end
    /// has been told is its own business. Only the first call counts.
    pub fn before_own_end(&self, finish: impl Fn() + Send + Sync + 'static) {
        let _ = self.before.set(Before(Box::new(finish)));
    }

    /// Tells that the guest has ended. Only the first call counts. An end of the guest's own waits for
    /// [`before_own_end`](Self::before_own_end); a stop and a failure of the monitor do not block.
    pub fn tell(&self, end: GuestEnd) {
        let own = !matches!(
            end,
            GuestEnd::Stopped(_) | GuestEnd::Failed(_) | GuestEnd::Migrated(_)
        );
        if own
            && !self.is_told()
            && let Some(Before(finish)) = self.before.get()
        {
            finish();
        }
        if self.end.set(end).is_ok() {
            // An eventfd that was never written cannot be full, so this write cannot fail; and if
            // it did, the vCPU threads still see `is_told` and come back.
            if let Err(error) = self.event.write(1) {
                log::error!("cannot wake the main thread at the guest's end: {error}");
            }
        }
    }

    /// Whether an end has been told. A vCPU asks after each access that it handed to a device.
    pub fn is_told(&self) -> bool {
        self.end.get().is_some()
    }

    /// Tells that the end has cost somebody a guest, which was known only when this one had ended: a stop is a failure then,
    /// for who asks for the [last word](Self::last_word). Only the first call counts.
    pub fn has_cost(&self, what: String) {
        let _ = self.cost.set(what);
    }

    /// The end, once told, as it is when nobody tells more.
    pub fn last_word(&self) -> Option<GuestEnd> {
        match (self.end.get()?, self.cost.get()) {
            (GuestEnd::Stopped(_), Some(what)) => Some(GuestEnd::Failed(what.clone())),
            (end, _) => Some(end.clone()),
        }
    }

    /// The end, once told.
    pub fn get(&self) -> Option<&GuestEnd> {
        self.end.get()
    }
}

impl AsRawFd for EndSignal {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// An error with its sources on one line. A source whose words the message has already at its end
/// is not said again: crates differ in whether they put it there. Control characters, which a path
/// may have, and what turns text round are escaped ([`text`](crate::text)). Of what is too long to be read the middle is left out.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = self.0.to_string();
        let mut source = self.0.source();
        while let Some(error) = source {
            let next = error.to_string();
            if !line.contains(&next) {
                line.push_str(": ");
                line.push_str(&next);
            }
            source = error.source();
        }
        let escaped = printable(&line);
        let left_out = escaped.chars().count().saturating_sub(HEAD + TAIL);
        if left_out == 0 {
            return f.write_str(&escaped);
        }
        let at = |chars| escaped.char_indices().nth(chars).map_or(0, |(at, _)| at);
        let (head, tail) = (at(HEAD), at(HEAD + left_out));
        let parts = (escaped.get(..head), escaped.get(tail..));
        let (head, tail) = (parts.0.unwrap_or_default(), parts.1.unwrap_or_default());
        write!(f, "{head}[… {left_out} characters …]{tail}")
    }
}

/// Characters that are said of a line that is longer than both: a value in it is at its beginning, and
/// what is wrong with it before or behind that.
const HEAD: usize = 300;
const TAIL: usize = 300;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_told_wins() {
        let signal = EndSignal::new().unwrap();
        assert!(!signal.is_told());
        signal.tell(GuestEnd::Reset);
        signal.tell(GuestEnd::Crashed("later".into()));
        assert_eq!(signal.get(), Some(&GuestEnd::Reset));
        assert_eq!(signal.event.read().unwrap(), 1);
    }

    #[test]
    fn an_end_is_said_in_words() {
        for (end, said) in [
            (
                GuestEnd::Stopped(StopCause::Signal(libc::SIGTERM)),
                "SIGTERM stopped it",
            ),
            (GuestEnd::Crashed("vCPU 0".into()), "it crashed: vCPU 0"),
            (
                GuestEnd::DebugExit(16),
                "it wrote 0x10 to the debug-exit port",
            ),
        ] {
            assert_eq!(end.to_string(), said);
        }
    }

    #[test]
    fn an_error_and_its_sources_are_said_once_each() {
        #[derive(Debug, thiserror::Error)]
        enum Outer {
            #[error("outer: {0}")]
            Repeats(#[source] io::Error),
            #[error("outer")]
            Leaves(#[source] io::Error),
            #[error("outer: {0}; try another")]
            Advises(#[source] io::Error),
        }
        let errno = || io::Error::from_raw_os_error(libc::EPERM);
        let expected = "outer: Operation not permitted (os error 1)";
        assert_eq!(Chain(&Outer::Repeats(errno())).to_string(), expected);
        assert_eq!(Chain(&Outer::Leaves(errno())).to_string(), expected);
        let expected = "outer: Operation not permitted (os error 1); try another";
        assert_eq!(Chain(&Outer::Advises(errno())).to_string(), expected);
    }

    #[test]
    fn a_refusal_that_advises_behind_its_cause_says_the_cause_once() {
        use crate::snapshot::SnapshotError;
        use memslots::uffd::point_in_time::PointInTimeError;
        let cause = PointInTimeError::Thread(io::Error::from_raw_os_error(libc::EAGAIN));
        let said = Chain(&SnapshotError::Background(cause)).to_string();
        assert_eq!(said.matches("os error 11").count(), 1, "{said}");
        assert!(said.ends_with("it is written in a pause"), "{said}");
    }

    #[test]
    fn what_nobody_would_read_to_its_end_is_cut() {
        let error = |x: usize| io::Error::other(format!("\"{}\" is no size", "€".repeat(x)));
        let fits = error(587);
        assert_eq!(Chain(&fits).to_string(), fits.to_string());
        let text = Chain(&error(1 << 20)).to_string();
        assert!(text.starts_with("\"€€€"), "{text}");
        assert!(text.ends_with("€€€\" is no size"), "{text}");
        assert!(text.contains("[… 1047989 characters …]"), "{text}");
        assert!(text.chars().count() < 700);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let error = io::Error::other("no \x1b[31m\n\u{9b}1m here");
        assert_eq!(Chain(&error).to_string(), "no \\u{1b}[31m\\n\\u{9b}1m here");
        let error = io::Error::other("tcp:evil\u{202e}1.0.0.721:pct\u{2069}");
        let shown = "tcp:evil\\u{202e}1.0.0.721:pct\\u{2069}";
        assert_eq!(Chain(&error).to_string(), shown);
    }

    #[test]
    fn a_stop_that_has_cost_a_guest_is_a_failure_in_the_end() {
        let end = EndSignal::new().unwrap();
        end.has_cost("the guest is lost".into());
        assert_eq!(end.last_word(), None);
        let stop = GuestEnd::Stopped(StopCause::Signal(15));
        end.tell(stop.clone());
        assert_eq!(end.get(), Some(&stop));
        let failed = GuestEnd::Failed("the guest is lost".into());
        assert_eq!(end.last_word(), Some(failed));
        // What failed by itself says that.
        let end = EndSignal::new().unwrap();
        end.tell(GuestEnd::Panicked);
        end.has_cost("the guest is lost".into());
        assert_eq!(end.last_word(), Some(GuestEnd::Panicked));
    }

    #[test]
    fn exit_statuses_are_the_documented_ones() {
        assert_eq!(GuestEnd::PoweredOff.exit_status(), 0);
        assert_eq!(GuestEnd::Reset.exit_status(), 0);
        assert_eq!(GuestEnd::Stopped(StopCause::Signal(15)).exit_status(), 0);
        assert_eq!(GuestEnd::Failed(String::new()).exit_status(), 1);
        assert_eq!(GuestEnd::Panicked.exit_status(), 3);
        assert_eq!(GuestEnd::Crashed(String::new()).exit_status(), 3);
        assert_eq!(GuestEnd::DebugExit(0).exit_status(), 1);
        assert_eq!(GuestEnd::DebugExit(0x10).exit_status(), 0x21);
        assert_eq!(GuestEnd::DebugExit(0xff).exit_status(), 0xff);
        assert_eq!(GuestEnd::DebugExit(u32::MAX).exit_status(), 0xff);
    }
}
