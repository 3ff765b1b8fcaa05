// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine out of a snapshot, and signals while it is made: whoever makes it may wait for memory that is brought by another
//! process, for as long as a page may take. Of files here a page takes no longer than their disk.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Session;
use crate::end::{EndSignal, GuestEnd, StopCause};
use crate::no_wait::readable;
use crate::signals::{self, Signals};
use crate::snapshot::RestoreRequest;
use crate::vm::{BuildError, Machine};

/// How long a machine that is stopped while it is made may take to notice.
const GRACE: Duration = Duration::from_secs(1);

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
        let lazy = request.lazy.as_ref();
        if lazy.is_none_or(|lazy| lazy.page_server.is_none() && lazy.handler.is_none()) {
            return Machine::restore(request, io::stdout(), end);
        }
        // Written once the machine is made: the guest waits for the thread's end, and so for nothing.
        let made = match EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK) {
            Ok(made) => made,
            Err(error) => {
                log::warn!("no signal is heard until the guest is there: {error}");
                return Machine::restore(request, io::stdout(), end);
            }
        };
        let signals = &self.signals;
        // While the process has one thread: with two, the kernel waits for a grace period of its own.
        srcu::prepare();
        std::thread::scope(|scope| {
            let watch = || watch(signals, end, &made, &sweep);
            let builder = std::thread::Builder::new().name("signals".into());
            if let Err(error) = builder.spawn_scoped(scope, watch) {
                log::warn!("no signal is heard until the guest is there: {error}");
            }
            let machine = Machine::restore(request, io::stdout(), end);
            // Of a counter that stands at zero a write of one does not fail.
            let _ = made.write(1);
            match (machine, end.get()) {
                (_, Some(GuestEnd::Stopped(_))) => Err(BuildError::Ended),
                (machine, _) => machine,
            }
        })
    }
}

fn watch(signals: &Signals, end: &EndSignal, made: &EventFd, sweep: &(impl Fn() + Sync)) {
    let made = made.as_raw_fd();
    let signal = loop {
        match readable([made, signals.stops()], -1) {
            Ok([false, _]) => {}
            // Memory, for one, of which the kernel has none: nothing is heard until the guest is there.
            Ok([true, _]) | Err(_) => return,
        }
        if let Some(signal) = signals.next_stop() {
            break signal;
        }
    };
    end.tell(GuestEnd::Stopped(StopCause::Signal(signal)));
    if is_made(made) {
        return;
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

/// Whether the machine is made, within [`GRACE`].
fn is_made(made: RawFd) -> bool {
    let until = Instant::now() + GRACE;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match readable([made], left.as_millis() as i32) {
            Ok([true]) => return true,
            Ok([false]) if !left.is_zero() => {}
            Ok([false]) | Err(_) => return false,
        }
    }
}
