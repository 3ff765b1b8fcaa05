// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine out of a snapshot, and signals while it is made: whoever makes it may wait for memory that is brought by another
//! process, for as long as a page may take.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Session;
use crate::end::{EndSignal, GuestEnd, StopCause};
use crate::no_wait::is_ready;
use crate::signals::{self, Signals};
use crate::snapshot::RestoreRequest;
use crate::vm::{BuildError, Machine};

/// How long a machine that is stopped while it is made may take to notice.
const GRACE: Duration = Duration::from_secs(1);
/// How often it is looked whether it is made.
const LOOK: Duration = Duration::from_millis(50);

impl<S> Session<'_, S> {
    /// Makes the machine. A signal meanwhile is told to `end`, and [`BuildError::Ended`]; where the call does not come back for
    /// it within a second, because it waits for memory, the process exits here: no guest has run, and `sweep` removes what it
    /// would leave behind.
    pub(super) fn restore(
        &self,
        request: &RestoreRequest,
        end: &Arc<EndSignal>,
        sweep: impl Fn() + Sync,
    ) -> Result<Machine, BuildError> {
        if request.lazy.is_none() {
            return Machine::restore(request, io::stdout(), end);
        }
        // Relaxed: looked at until it is seen.
        let made = AtomicBool::new(false);
        let signals = &self.signals;
        std::thread::scope(|scope| {
            let watch = || watch(signals, end, &made, &sweep);
            let builder = std::thread::Builder::new().name("signals".into());
            if let Err(error) = builder.spawn_scoped(scope, watch) {
                log::warn!("no signal is heard until the guest is there: {error}");
            }
            let machine = Machine::restore(request, io::stdout(), end);
            made.store(true, Ordering::Relaxed);
            match (machine, end.get()) {
                (_, Some(GuestEnd::Stopped(_))) => Err(BuildError::Ended),
                (machine, _) => machine,
            }
        })
    }
}

fn watch(signals: &Signals, end: &EndSignal, made: &AtomicBool, sweep: &(impl Fn() + Sync)) {
    let is_made = || made.load(Ordering::Relaxed);
    let signal = loop {
        if is_made() {
            return;
        }
        // An error is the read's to say, which finds none.
        let _ = is_ready(signals.stops(), libc::POLLIN, LOOK.as_millis() as i32);
        if let Some(signal) = signals.next_stop() {
            break signal;
        }
    };
    end.tell(GuestEnd::Stopped(StopCause::Signal(signal)));
    let until = Instant::now() + GRACE;
    while Instant::now() < until {
        if is_made() {
            return;
        }
        std::thread::sleep(LOOK);
    }
    let name = signals::name(signal);
    log::warn!(
        "{name} came while the guest's memory was waited for: it has not begun, and this process exits"
    );
    sweep();
    std::process::exit(
        GuestEnd::Stopped(StopCause::Signal(signal))
            .exit_status()
            .into(),
    );
}
