// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm run` and `restore`: build the machine, let it run, say how it ended.

mod incoming;
mod load;
mod restore;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::api::{self, Monitor, Server};
use crate::cli::{Run, StatsForm};
use crate::console::RawTerminal;
use crate::end::{Chain, EndSignal, GuestEnd, StopCause};
use crate::gdb::Listener;
use crate::main_loop::MainLoop;
use crate::migration::incoming::Incoming;
use crate::priority::step_back;
use crate::signals::{self, Signals};
use crate::stats::Stats;
use crate::timeline::{Event, timeline};
use crate::vm::{BuildError, Machine, RunState, Running};

/// Runs a guest with its console on this process's stdin and stdout, and returns the process's exit
/// status. `say` gets what the user is to read besides the log, one line (or for a crash, one block)
/// a call.
///
/// The process is expected to exit next: the VM is closed, and what else it had is left to that
/// ([`Running::leave_to_exit`](crate::vm::Running::leave_to_exit) has the reason).
pub fn run(options: &Run, say: impl Fn(fmt::Arguments<'_>)) -> u8 {
    let (end, stats) = match run_to_end(options, &say) {
        Ok(ended) => ended,
        Err(error) => {
            say(format_args!("{}", Chain(&error)));
            return error.exit_status();
        }
    };
    if !crate::lazy::bus::may_say() {
        // Who says it ends the process.
        loop {
            std::thread::park();
        }
    }
    match (&end, end.words()) {
        (_, Some(words)) => say(format_args!("{words}")),
        (GuestEnd::Stopped(StopCause::Signal(signal)), None) => {
            log::info!("{} stopped the guest", signals::name(*signal));
        }
        (other, None) => log::info!("the guest has ended: {other:?}"),
    }
    if options.timeline {
        print(&timeline().to_string());
    }
    if let (Some(stats), Some(form)) = (stats, options.stats) {
        show(&stats, form);
    }
    end.exit_status()
}

/// Text on stderr, which may be closed or full.
fn print(text: &str) {
    crate::stderr::write(text.as_bytes());
}

/// In one write, so that a vCPU's registers do not mix with it.
fn show(stats: &Stats, form: StatsForm) {
    print(&match form {
        StatsForm::Text => stats.to_string(),
        StatsForm::Json => stats.json() + "\n",
    });
}

/// How a guest ended, and its numbers where they are wanted.
type Ended = (GuestEnd, Option<Stats>);

/// Serves the control socket on a thread of its own while `meanwhile` is at work, and stops the machine by `stop` behind it:
/// what the thread is at, a pause for one, ends by that.
///
/// # Errors
/// There is no thread; nothing was done but `stop`.
fn with_api(
    server: &Server,
    monitor: &dyn Monitor,
    stop: impl FnOnce(),
    meanwhile: impl FnOnce(),
) -> io::Result<()> {
    /// Also where something unwinds: the scope below waits for the thread.
    struct StopAtEnd<'a>(&'a Server);
    impl Drop for StopAtEnd<'_> {
        fn drop(&mut self) {
            self.0.stop();
        }
    }
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("api".into());
        let thread = builder.spawn_scoped(scope, || server.serve(monitor));
        if thread.is_ok() {
            let _stop = StopAtEnd(server);
            meanwhile();
        }
        stop();
        match thread?.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("the control socket was served no more: {error}"),
            Err(_) => log::error!("the control socket's thread panicked"),
        }
        Ok(())
    })
}

fn run_to_end(options: &Run, say: &impl Fn(fmt::Arguments<'_>)) -> Result<Ended, BuildError> {
    let host = |what| move |source| BuildError::Process { what, source };
    // Before any thread exists, so that all of them inherit the mask.
    let signals = Signals::take_over().map_err(host("take over the stop signals"))?;
    let session = Session {
        options,
        say,
        signals,
    };
    // Guest memory with a hardware error is told to a vCPU's thread by SIGBUS, and is a line and a status
    // then; so is memory that did not come, to any thread. Without it the process would be killed where it stands.
    if let Err(error) = crate::lazy::bus::install() {
        log::warn!("lost guest memory will kill the monitor: {error}");
    }
    let end = Arc::new(EndSignal::new().map_err(host("make an eventfd"))?);
    let api = options.api_sock.as_deref().map(Server::bind).transpose()?;
    let debugger = options.gdb.as_ref().map(Listener::bind).transpose()?;
    if let (Some(base), Some(server)) = (&options.load, &api) {
        return session.run_loaded(base, server, debugger);
    }
    // What stops a guest ends its building as well. Registers are shown when there are any.
    let stop = |signal| end.tell(GuestEnd::Stopped(StopCause::Signal(signal)));
    let watch = || {
        // One is enough, and has come however fast others follow.
        if let Some(signal) = session.signals.next_stop() {
            stop(signal);
        }
    };
    let stopped = || {
        watch();
        end.is_told().then(|| "it was stopped".to_owned())
    };
    let lazily = |request: &&_| restore::waits_for_others(request);
    if let (Some(request), Some(server)) = (options.restore.as_ref().filter(lazily), &api) {
        return session.run_restored(request, server, debugger, &end);
    }
    let mut ear = None;
    let (running, seat) = if let Some(request) = &options.incoming {
        let incoming = Incoming::bind(request)?;
        ear = Some(incoming.also());
        say(format_args!(
            "a guest is waited for at {}",
            incoming.address()
        ));
        if let Some(server) = &api {
            return session.run_incoming(incoming, server, debugger, &end, &stopped);
        }
        match session.receive(incoming, debugger, &end, &stopped) {
            Ok(came) => came,
            Err(error) => return session.not_come(&end, error),
        }
    } else {
        let built = match &options.restore {
            Some(request) => session.restore(request, &end, || {
                if let Some(server) = &api {
                    server.unlink();
                }
            }),
            None => Machine::build_watched(&options.config, io::stdout(), &end, watch),
        };
        let machine = match (built, end.get()) {
            (Err(BuildError::Ended), Some(end)) => return Ok((end.clone(), session.no_stats())),
            (built, _) => built?,
        };
        session.start(machine, debugger, RunState::Running)?
    };
    let Seat {
        terminal,
        main_loop,
    } = seat;
    let wait_for_the_end = || session.wait(&end, &running, main_loop);
    match &api {
        None => wait_for_the_end(),
        Some(server) => {
            let machine = api::Machine::new(&running, &end);
            let served = with_api(server, &machine, || running.stop(), wait_for_the_end);
            if let Err(error) = served {
                let what = format!("cannot start the control socket's thread: {error}");
                end.tell(GuestEnd::Failed(what));
            }
        }
    }
    if let Some(ear) = ear {
        ear.unlink();
    }
    Ok(session.finish(&end, running, terminal))
}

/// From where a guest is watched: all of it is there before the guest goes on.
struct Seat<'a> {
    /// In raw mode.
    terminal: Option<RawTerminal>,
    main_loop: MainLoop<'a>,
}

/// What a run has, whatever its machine.
struct Session<'a, S> {
    options: &'a Run,
    say: &'a S,
    signals: Signals,
}

impl<S: Fn(fmt::Arguments<'_>)> Session<'_, S> {
    /// Lets a machine go, watched as the options say, under the terminal in raw mode.
    fn start<'a>(
        &self,
        mut machine: Machine,
        debugger: Option<Listener>,
        state: RunState,
    ) -> Result<(Running, Seat<'a>), BuildError> {
        if self.options.track_dirty_pages {
            machine.track_snapshots();
        }
        if self.options.stats.is_some() {
            machine.count_accesses();
            if let Err(error) = machine.read_kvm_statistics() {
                log::warn!("the statistics are without KVM's own: {error}");
            }
        }
        if let Some(listener) = debugger {
            (self.say)(format_args!(
                "the guest waits for a debugger: gdb -ex 'target remote {}'",
                listener.address()
            ));
            machine.debug(listener);
        }
        // Last before the guest speaks: what fails above is told on a terminal in its usual mode.
        let failed = |what| move |source| BuildError::Process { what, source };
        let terminal = RawTerminal::enter().map_err(failed("put the terminal into raw mode"))?;
        let main_loop = MainLoop::new(terminal.is_some()).map_err(failed("wait for the guest"))?;
        let seat = Seat {
            terminal,
            main_loop,
        };
        Ok((machine.start_as(state)?, seat))
    }

    /// The numbers of no guest.
    fn no_stats(&self) -> Option<Stats> {
        let stats = |_| Stats::none(self.options.config.cpus.count);
        self.options.stats.map(stats)
    }

    /// Serves the guest until its end has been told.
    fn wait(&self, end: &Arc<EndSignal>, running: &Running, main_loop: MainLoop<'_>) {
        let show_more = || {
            if let Some(form) = self.options.stats {
                show(&running.stats(), form);
            }
        };
        let timeout = Duration::from_secs(self.options.shutdown_timeout.into());
        let looped = main_loop.run(end, &self.signals, running, &show_more, timeout);
        if let Err(error) = looped {
            end.tell(GuestEnd::Failed(format!(
                "cannot wait for the guest: {error}"
            )));
        }
        if let Some(GuestEnd::Migrated(_)) = end.get() {
            // What is left to do is in the way of the guest's first steps, if those are on this host.
            step_back();
        }
    }

    /// Takes the machine down, for a process that exits next.
    fn finish(&self, end: &EndSignal, running: Running, terminal: Option<RawTerminal>) -> Ended {
        running.stop();
        timeline().mark(Event::Exit);
        drop(terminal);
        let stats = self.options.stats.map(|_| running.stats());
        running.leave_to_exit();
        // The wait comes back only when an end has been told, or has failed and is told just there.
        let untold = || GuestEnd::Failed("the guest stopped without a reason".into());
        (end.last_word().unwrap_or_else(untold), stats)
    }
}
