// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine out of a snapshot, and signals while it is made: whoever makes it may wait for memory that is brought by another
//! process, for as long as a page may take, and clients of its control socket are answered meanwhile. Of files here a page takes
//! no longer than their disk.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Ended, Session, with_api};
use crate::api::load::Waiting;
use crate::api::{self, Server};
use crate::end::{EndSignal, GuestEnd, StopCause};
use crate::gdb::Listener;
use crate::lazy::LazyRequest;
use crate::no_wait::readable;
use crate::signals::{self, Signals};
use crate::snapshot::RestoreRequest;
use crate::vm::{BuildError, Machine, RunState, Running};

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
        if !waits_for_others(request) {
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

impl<S: Fn(fmt::Arguments<'_>)> Session<'_, S> {
    /// Makes the machine of a snapshot whose memory [others bring](waits_for_others), and waits for its end; clients are answered
    /// all the while.
    ///
    /// # Errors
    /// [`BuildError`]: there was no guest.
    pub(super) fn run_restored(
        &self,
        request: &RestoreRequest,
        server: &Server,
        debugger: Option<Listener>,
        end: &Arc<EndSignal>,
    ) -> Result<Ended, BuildError> {
        // As in `restore`, before there are threads.
        srcu::prepare();
        let guest = OnceLock::<Running>::new();
        let made = {
            let waiting = Waiting::for_restore();
            let stop = || {
                if let Some(running) = guest.get() {
                    running.stop();
                }
            };
            let mut made = None;
            let served = with_api(server, &waiting, stop, || {
                let started = self
                    .restore(request, end, || server.unlink())
                    .and_then(|machine| self.start(machine, debugger, RunState::Running));
                made = Some(started.map(|(running, seat)| {
                    let running = guest.get_or_init(|| running);
                    waiting.begin(api::Machine::new(running, end));
                    self.wait(end, running, seat.main_loop);
                    seat.terminal
                }));
                // Who waits for a guest that is not to be waits no more.
                waiting.end();
            });
            served.map_err(|source| BuildError::Process {
                what: "start the control socket's thread",
                source,
            })?;
            made
        };
        match (made, guest.into_inner(), end.get()) {
            (Some(Ok(terminal)), Some(running), _) => Ok(self.finish(end, running, terminal)),
            (Some(Err(BuildError::Ended)), _, Some(end)) => Ok((end.clone(), self.no_stats())),
            (Some(Err(error)), _, _) => Err(error),
            // Neither can be: who has waited says how, and a guest that has ended is there.
            (_, _, _) => Err(BuildError::Ended),
        }
    }
}

/// Whether another process brings memory that the machine needs before there is a guest.
pub(super) fn waits_for_others(request: &RestoreRequest) -> bool {
    let lazy = request.lazy.as_ref();
    lazy.is_some_and(LazyRequest::is_of_another)
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
    if is_heard(signal, end, made) {
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

/// Tells the end of this signal; whether who makes the machine comes back in time, and who comes behind that hears of it.
fn is_heard(signal: i32, end: &EndSignal, made: RawFd) -> bool {
    end.tell(GuestEnd::Stopped(StopCause::Signal(signal)));
    let is_made = is_made(made);
    // Of a load that is given up already the monitor would go on, and has to hear of it.
    if is_made && !matches!(end.get(), Some(GuestEnd::Stopped(_))) {
        signals::again(signal);
    }
    is_made
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    static CAME: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn came(_: i32) {
        CAME.fetch_add(1, SeqCst);
    }

    #[test]
    fn a_signal_that_is_no_guests_end_comes_once_more() {
        // One for which no thread is blocked, and of which each that comes counts.
        let signal = libc::SIGRTMAX();
        let handler: extern "C" fn(i32) = came;
        // SAFETY: the handler adds to a number, and nobody else in this process has use for this signal.
        let before = unsafe { libc::signal(signal, handler as libc::sighandler_t) };
        assert_ne!(before, libc::SIG_ERR);
        let made = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        made.write(1).unwrap();
        for is_given_up in [false, true] {
            let end = EndSignal::new().unwrap();
            if is_given_up {
                end.tell(GuestEnd::Failed("the load is given up".into()));
            }
            assert!(is_heard(signal, &end, made.as_raw_fd()));
            let stopped = GuestEnd::Stopped(StopCause::Signal(signal));
            assert_eq!(end.get() == Some(&stopped), !is_given_up);
        }
        let begun = Instant::now();
        while CAME.load(SeqCst) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(60), "it did not come");
            std::thread::yield_now();
        }
        assert_eq!(CAME.load(SeqCst), 1);
    }
}
