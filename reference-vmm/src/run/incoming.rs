// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `run --incoming`: the guest comes from another process, and the control socket answers before it is there.

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

use super::{Ended, Seat, Session, with_api};
use crate::api::load::Waiting;
use crate::api::{self, Server};
use crate::end::EndSignal;
use crate::gdb::Listener;
use crate::migration::incoming::Incoming;
use crate::text::printable;
use crate::vm::{BuildError, Machine, RunState, Running};

/// Why a guest is not waited for any more, if so.
type Stopped<'a> = &'a (dyn Fn() -> Option<String> + Sync);

impl<S: Fn(fmt::Arguments<'_>)> Session<'_, S> {
    /// Waits for a guest, and for its end behind that, and has clients answered all the while.
    ///
    /// # Errors
    /// [`BuildError`]: none has come.
    pub(super) fn run_incoming(
        &self,
        mut incoming: Incoming,
        server: &Server,
        debugger: Option<Listener>,
        end: &Arc<EndSignal>,
        stopped: Stopped<'_>,
    ) -> Result<Ended, BuildError> {
        let guest = OnceLock::<Running>::new();
        let ear = incoming.also();
        let came = {
            let waiting = Waiting::for_migration(incoming.address().to_string(), incoming.coming())
                .with_ear(incoming.also());
            if let Some(landing) = waiting.landing() {
                incoming.when_prepared(move || landing.is_near());
            }
            let stop = || {
                if let Some(running) = guest.get() {
                    running.stop();
                }
            };
            let mut came = None;
            let served = with_api(server, &waiting, stop, || {
                let received = self.receive(incoming, debugger, end, stopped);
                came = Some(received.map(|(running, seat)| {
                    let running = guest.get_or_init(|| running);
                    waiting.begin(api::Machine::new(running, end));
                    self.wait(end, running, seat.main_loop);
                    seat.terminal
                }));
                // Who waits for a guest that has not come waits no more.
                waiting.end();
            });
            served.map_err(|source| BuildError::Process {
                what: "start the control socket's thread",
                source,
            })?;
            came
        };
        // Its source may not have said that it has heard all, and is listened for.
        ear.unlink();
        match (came, guest.into_inner()) {
            (Some(Ok(terminal)), Some(running)) => Ok(self.finish(end, running, terminal)),
            (Some(Err(error)), _) => self.not_come(end, error),
            // Neither can be: who has waited says how, and a guest that has come is there.
            (_, _) => Err(BuildError::Ended),
        }
    }

    /// Waits for a guest, which goes on as it was.
    pub(super) fn receive<'a>(
        &self,
        mut incoming: Incoming,
        mut debugger: Option<Listener>,
        end: &Arc<EndSignal>,
        stopped: Stopped<'_>,
    ) -> Result<(Running, Seat<'a>), BuildError> {
        let mut seat = None;
        // While the guest is the source's still: a terminal, a thread or a descriptor that cannot be had costs it nothing.
        let start = |machine: Machine| {
            let (running, its) = self.start(machine, debugger.take(), RunState::Running)?;
            seat = Some(its);
            Ok(running)
        };
        let coming = incoming.coming();
        incoming.when_offered(|coming| {
            let from = coming.came().map(|came| came.from).unwrap_or_default();
            let from = printable(&from);
            let text = format!(
                "reference-vmm: a guest comes from {from}; it runs there until it is here\n"
            );
            crate::stderr::write(text.as_bytes());
        });
        let running = incoming.receive(io::stdout(), end, stopped, start)?;
        let how = coming.came().map(|came| came.arrived());
        let state = match running.state() {
            RunState::Running => "runs here now",
            RunState::Paused => "is paused here, as it was there",
        };
        // Of one that came before its memory.
        let follows = running.lazy_progress().and_then(|of| of.words());
        let follows = follows.map(|words| {
            format!(
                "{words}, and what is missing follows from there: the monitor there has to live until then (ctl status says how far \
                 it is)"
            )
        });
        (self.say)(format_args!(
            "the guest has come {}, and {state}{}",
            how.unwrap_or_default(),
            follows.unwrap_or_default()
        ));
        // It was started, or has not come.
        let seat = seat.ok_or(BuildError::Ended)?;
        Ok((running, seat))
    }

    /// None has come: by a stop nobody has lost a guest.
    pub(super) fn not_come(&self, end: &EndSignal, error: BuildError) -> Result<Ended, BuildError> {
        match end.get() {
            Some(end) => Ok((end.clone(), self.no_stats())),
            None => Err(error),
        }
    }
}
