// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `restore` without `--from`: a client of the control socket says what the guest goes on from.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use super::restore::waits_for_others;
use super::{Ended, Session, with_api};
use crate::api::load::{Load, Loads, Waiting};
use crate::api::router::Outcome;
use crate::api::{self, Server};
use crate::console::RawTerminal;
use crate::end::{Chain, EndSignal, GuestEnd, StopCause};
use crate::gdb::Listener;
use crate::no_wait::readable;
use crate::signals;
use crate::snapshot::RestoreRequest;
use crate::timeline::{Event, timeline};
use crate::vm::{BuildError, RunState, Running};

/// What came while no machine was there.
enum Came {
    Load(Load),
    Stop(i32),
}

/// The guest that was loaded, and where its end is told.
type Loaded = (Running, Arc<EndSignal>);

/// How the wait for a load, and for the guest behind it, came to its end.
enum Waited {
    /// By this signal, before a load.
    Stopped(i32),
    /// The guest ended.
    Guest(Option<RawTerminal>),
}

impl<S: Fn(fmt::Arguments<'_>)> Session<'_, S> {
    /// Waits for a load, laid over `base`, and for the guest's end behind it.
    ///
    /// # Errors
    /// [`BuildError`]: what has not to do with the snapshot. What has is the client's answer.
    pub(super) fn run_loaded(
        &self,
        base: &RestoreRequest,
        server: &Server,
        debugger: Option<Listener>,
    ) -> Result<Ended, BuildError> {
        let process = |what| move |source| BuildError::Process { what, source };
        let loads = Loads::new().map_err(process("make an eventfd"))?;
        let guest = OnceLock::<Loaded>::new();
        let waited = {
            let waiting = Waiting::new(&loads);
            let stop = || {
                loads.close();
                if let Some((running, _)) = guest.get() {
                    running.stop();
                }
            };
            let mut waited = None;
            let served = with_api(server, &waiting, stop, || {
                let at = (server, &loads);
                waited = Some(self.wait_for_loads(base, at, debugger, &guest, &waiting));
            });
            served.map_err(process("start the control socket's thread"))?;
            waited
        };
        match (waited.transpose()?, guest.into_inner()) {
            (Some(Waited::Guest(terminal)), Some((running, end))) => {
                Ok(self.finish(&end, running, terminal))
            }
            (Some(Waited::Stopped(signal)), _) => {
                timeline().mark(Event::Exit);
                let end = GuestEnd::Stopped(StopCause::Signal(signal));
                Ok((end, self.no_stats()))
            }
            // Neither can be: who has waited says how, and a guest that has ended is there.
            (_, _) => Err(BuildError::Ended),
        }
    }

    fn wait_for_loads<'a>(
        &self,
        base: &RestoreRequest,
        (server, loads): (&Server, &'a Loads),
        mut debugger: Option<Listener>,
        guest: &'a OnceLock<Loaded>,
        waiting: &Waiting<'a>,
    ) -> Result<Waited, BuildError> {
        loop {
            let load = match self.next(loads) {
                Ok(Came::Load(load)) => load,
                Ok(Came::Stop(signal)) => return Ok(Waited::Stopped(signal)),
                Err(source) => {
                    let what = "wait for a load";
                    return Err(BuildError::Process { what, source });
                }
            };
            // One for each: what has told the end of a machine that was not to be is not the next one's.
            let end = EndSignal::new();
            let end = Arc::new(end.map_err(|source| BuildError::Process {
                what: "make an eventfd",
                source,
            })?);
            let request = load.request.over(base);
            load.is_made(&end);
            loads.waits_for_another(waits_for_others(&request));
            let made = self.restore(&request, &end, || server.unlink());
            loads.waits_for_another(false);
            let machine = match (made, end.get()) {
                (Err(BuildError::Ended), Some(GuestEnd::Stopped(StopCause::Signal(signal)))) => {
                    let why = format!("{} stopped the monitor", signals::name(*signal));
                    load.answer(Outcome::Refused(why));
                    return Ok(Waited::Stopped(*signal));
                }
                (Err(BuildError::Ended), Some(GuestEnd::Failed(why))) => {
                    load.answer(Outcome::Refused(why.clone()));
                    continue;
                }
                (Err(error), _) => {
                    load.answer(Outcome::Refused(Chain(&error).to_string()));
                    continue;
                }
                (Ok(machine), _) => machine,
            };
            if !load.begins() {
                drop(machine);
                load.answer(Outcome::Refused("nobody waits for it".into()));
                continue;
            }
            let state = match load.request.resume {
                true => RunState::Running,
                false => RunState::Paused,
            };
            // What fails here is the process's own matter, and would fail the next time as well.
            let (running, seat) = match self.start(machine, debugger.take(), state) {
                Ok(started) => started,
                Err(error) => {
                    load.answer(Outcome::Refused(Chain(&error).to_string()));
                    return Err(error);
                }
            };
            let (running, end) = guest.get_or_init(|| (running, end));
            waiting.begin(api::Machine::new(running, end));
            load.answer(Outcome::Done);
            self.wait(end, running, seat.main_loop);
            return Ok(Waited::Guest(seat.terminal));
        }
    }

    /// Waits for a load, or for a signal that stops the monitor.
    fn next(&self, loads: &Loads) -> io::Result<Came> {
        loop {
            if let Some(signal) = self.signals.next_stop() {
                return Ok(Came::Stop(signal));
            }
            if let Some(load) = loads.next() {
                return Ok(Came::Load(load));
            }
            readable([self.signals.stops(), loads.as_raw_fd()], -1)?;
        }
    }
}
