// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The debugger's thread: waits for a debugger, serves it until it goes, and waits for the next.
//!
//! ```text
//!   waiting ──connects──► stopped ◄──event, Ctrl-C──► running
//!      ▲                     │  detaches, breaks off     │
//!      └─────────────────────┴───────────────────────────┘     the machine ends ──► W or X, and out
//! ```
//!
//! Whatever a peer sends ends at worst its own session, and the guest goes on as if it had detached.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as Machine;
use gdbstub::stub::{
    DisconnectReason, GdbStub, GdbStubBuilder, GdbStubError, MultiThreadStopReason,
};

use super::connection::{Peer, Ready, wait};
use super::link::Link;
use super::listener::Listener;
use super::target::{GuestTarget, StopReason};
use super::vcpus::{Trouble, Vcpus};
use crate::end::{EndSignal, GuestEnd, StopCause};
use crate::no_wait::is_ready;

/// The longest packet that is received, and what gdb is told that it may send.
const PACKET: usize = 16 * 1024;

/// How long a debugger waits that the host had no room for.
const RETRY: Duration = Duration::from_millis(200);

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
enum Over {
    /// The debugger detached.
    Detached,
    /// It has the guest ended.
    Killed,
    /// It went, or sent what makes no sense; the text is for the log.
    Broken(String),
    /// The machine ends.
    Closing,
}

/// Serves debuggers, one after the other, until the machine ends.
pub(super) fn serve<V: Vcpus>(listener: &Listener, link: &Arc<Link>, vcpus: V, end: &EndSignal) {
    let mut target = GuestTarget::new(vcpus);
    loop {
        let stream = match next(listener, link) {
            Ok(Some(stream)) => stream,
            Ok(None) => return,
            Err(error) => {
                // The guest runs on, without a breakpoint: no debugger is there that has set one. Where it
                // waits for its first, the link's end lets it go.
                log::error!("gdb: no debugger can connect any more: {error}");
                return;
            }
        };
        let peer = Peer::new(stream, link.closing());
        let over = match target.attach() {
            Ok(()) => session(peer, &mut target, link, end),
            Err(trouble) => Over::Broken(trouble.to_string()),
        };
        let detached = match over {
            Over::Closing => return,
            Over::Killed => {
                end.tell(GuestEnd::Stopped(StopCause::Debugger));
                continue;
            }
            Over::Detached => target.detach(true),
            Over::Broken(why) => {
                log::info!("gdb: the session has broken off: {why}");
                target.detach(false)
            }
        };
        if let Err(trouble) = detached
            && !link.is_closed()
        {
            log::warn!("gdb: {trouble}");
        }
    }
}

/// Waits for a debugger; `None` once the machine ends.
fn next(listener: &Listener, link: &Link) -> io::Result<Option<super::listener::Stream>> {
    use std::os::fd::AsRawFd;
    loop {
        let first = (listener.as_raw_fd(), libc::POLLIN);
        if wait(link.closing(), first, None)? == Ready::Closing {
            return Ok(None);
        }
        match listener.accept() {
            Ok(stream) => return Ok(Some(stream)),
            Err(error) => match error.raw_os_error() {
                // One that has gone already, or gave up.
                Some(libc::EAGAIN | libc::EINTR | libc::ECONNABORTED | libc::EPROTO) => {}
                Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP) => {
                    return Err(error);
                }
                // A host that is short of something, or a network that is: the peer waits, and with it
                // the listener is ready still.
                _ => {
                    log::warn!("gdb: a debugger waits, for it cannot be let in now: {error}");
                    if closes_within(link, RETRY)? {
                        return Ok(None);
                    }
                }
            },
        }
    }
}

/// Waits for the machine's end, so long at most, and says whether it has come.
fn closes_within(link: &Link, time: Duration) -> io::Result<bool> {
    let milliseconds = libc::c_int::try_from(time.as_millis()).unwrap_or(libc::c_int::MAX);
    match is_ready(link.closing(), libc::POLLIN, milliseconds) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        ready => ready,
    }
}

type Step<'a, V> =
    Result<Machine<'a, GuestTarget<V>, Peer>, GdbStubError<Trouble, <Peer as Connection>::Error>>;

/// A debugger, from its first byte to its last.
fn session<V: Vcpus>(
    peer: Peer,
    target: &mut GuestTarget<V>,
    link: &Link,
    end: &EndSignal,
) -> Over {
    let stub = GdbStubBuilder::new(peer).packet_buffer_size(PACKET).build();
    let begun = stub
        .map_err(|error| error.to_string())
        .and_then(|stub: GdbStub<'_, _, _>| {
            stub.run_state_machine(target).map_err(|e| e.to_string())
        });
    let mut machine = match begun {
        Ok(machine) => machine,
        Err(error) => return Over::Broken(error),
    };
    loop {
        let step = match machine {
            Machine::Idle(mut idle) => match next_byte(idle.borrow_conn()) {
                Next::Byte(byte) => idle.incoming_data(target, byte),
                Next::Over(over) => return over,
                Next::Happened => Ok(idle.into()),
            },
            Machine::Running(running) => match run(running, target, link, end) {
                Ok(step) => step,
                Err(over) => return over,
            },
            Machine::CtrlCInterrupt(interrupt) => {
                // While the guest is stopped there is nothing to interrupt.
                let reason = match target.is_running() {
                    true => target.interrupt().map(Some),
                    false => Ok(None),
                };
                match reason {
                    Ok(reason) => interrupt.interrupt_handled(target, reason),
                    Err(trouble) => return Over::Broken(trouble.to_string()),
                }
            }
            Machine::Disconnected(mut disconnected) => {
                let reason = disconnected.get_reason();
                // A debugger that has gone already has no use for an answer.
                let _ = disconnected.borrow_conn().flush();
                return match reason {
                    DisconnectReason::Kill => Over::Killed,
                    DisconnectReason::Disconnect => Over::Detached,
                    _ => Over::Closing,
                };
            }
        };
        machine = match step {
            Ok(machine) => machine,
            Err(error) => return Over::Broken(error.to_string()),
        };
    }
}

/// The guest runs: waits for an event of its, or a word of the debugger's.
fn run<'a, V: Vcpus>(
    mut running: gdbstub::stub::state_machine::GdbStubStateMachineInner<
        'a,
        gdbstub::stub::state_machine::state::Running,
        GuestTarget<V>,
        Peer,
    >,
    target: &mut GuestTarget<V>,
    link: &Link,
    end: &EndSignal,
) -> Result<Step<'a, V>, Over> {
    let broken = |error: &dyn std::fmt::Display| Over::Broken(error.to_string());
    if target.is_running()
        && let Some(reason) = target.next_untold()
    {
        return Ok(running.report_stop(target, reason));
    }
    let peer = running.borrow_conn();
    let ready = match peer.buffered() {
        Some(byte) => return Ok(running.incoming_data(target, byte)),
        None => {
            peer.flush().map_err(|error| broken(&error))?;
            peer.wait(Some(link.happened()))
        }
    };
    match ready.map_err(|error| broken(&error))? {
        Ready::Closing => Ok(running.report_stop(target, last_words(end))),
        Ready::Second => match target.happened().map_err(|error| broken(&error))? {
            Some(reason) => Ok(running.report_stop(target, reason)),
            None => Ok(Ok(running.into())),
        },
        Ready::First => {
            peer.receive().map_err(|error| broken(&error))?;
            Ok(Ok(running.into()))
        }
    }
}

enum Next {
    Byte(u8),
    Over(Over),
    Happened,
}

/// The guest is stopped: the next byte of the debugger's, waited for.
fn next_byte(peer: &mut Peer) -> Next {
    let broken = |error: io::Error| Next::Over(Over::Broken(error.to_string()));
    loop {
        if let Some(byte) = peer.buffered() {
            return Next::Byte(byte);
        }
        // An answer that is not complete waits for nothing: gdb waits for it.
        if let Err(error) = peer.flush() {
            return broken(error);
        }
        match peer.wait(None) {
            Ok(Ready::Closing) => return Next::Over(Over::Closing),
            Ok(Ready::Second) => return Next::Happened,
            Ok(Ready::First) => {}
            Err(error) => return broken(error),
        }
        if let Err(error) = peer.receive() {
            return broken(error);
        }
    }
}

/// What gdb is told of the guest's end: the process's exit status of a guest that ended by itself, a
/// signal for one that crashed or was stopped.
fn last_words(end: &EndSignal) -> StopReason {
    match end.get() {
        Some(GuestEnd::Crashed(_) | GuestEnd::Panicked | GuestEnd::Failed(_)) => {
            MultiThreadStopReason::Terminated(Signal::SIGABRT)
        }
        Some(GuestEnd::Stopped(cause)) => MultiThreadStopReason::Terminated(match cause {
            StopCause::Signal(libc::SIGTERM) => Signal::SIGTERM,
            StopCause::Signal(libc::SIGINT) => Signal::SIGINT,
            StopCause::Signal(libc::SIGHUP) => Signal::SIGHUP,
            StopCause::Signal(libc::SIGQUIT) => Signal::SIGQUIT,
            _ => Signal::SIGKILL,
        }),
        Some(end) => MultiThreadStopReason::Exited(end.exit_status()),
        None => MultiThreadStopReason::Terminated(Signal::SIGKILL),
    }
}
