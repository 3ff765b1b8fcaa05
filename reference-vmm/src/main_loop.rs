// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the main thread does while the guest runs: wait for its end, for signals and for console
//! input, with event-manager.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use crate::console::{CHUNK, ConsoleInput, Turn};
use crate::end::{EndSignal, GuestEnd, StopCause};
use crate::no_wait::Reader;
use crate::signals::{self, Signals};

/// The guest's side of the console and of the power button, as the main thread needs them. Nothing here
/// waits for the guest, or for what it makes of its interrupt controllers.
pub trait GuestSide: Send + Sync {
    /// Hands input to the guest; how many bytes it took.
    fn input(&self, bytes: &[u8]) -> usize;
    /// How many bytes of input are read at a time.
    fn input_chunk(&self) -> usize {
        CHUNK
    }
    /// The terminal has another size.
    fn resized(&self) {}
    /// Readable when the guest has read all of its input, or takes input again.
    fn drained(&self) -> RawFd;
    /// Makes [`drained`](Self::drained) not readable.
    fn clear_drained(&self);
    /// Presses the power button; false if no one in the guest will notice.
    fn press_power_button(&self) -> bool;
    /// The guest is paused, and reacts to nothing until somebody resumes it. One that stands still for a snapshot goes on by
    /// itself.
    fn is_paused(&self) -> bool {
        false
    }
    /// Has each vCPU's registers shown on stderr, soon. Does not wait for it.
    fn show_registers(&self);
}

/// What SIGUSR1 shows besides the registers: `--stats`' numbers. On the main thread.
pub type ShowMore<'a> = dyn Fn() + 'a;

const END: u32 = 0;
const STOPS: u32 = 1;
const STDIN: u32 = 2;
const DRAINED: u32 = 3;
const DEADLINE: u32 = 4;
const SHOWS: u32 = 5;
const RESIZES: u32 = 6;

/// How stdin is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// epoll says when there is something to read.
    Readable,
    /// The guest's FIFO is full: its drained event says when to go on.
    Drained,
    /// epoll does not take regular files, which are readable always: the guest's drained event
    /// paces them.
    File,
    /// No more input.
    Ended,
}

struct Subscriber<'a> {
    end: Arc<EndSignal>,
    signals: &'a Signals,
    guest: &'a dyn GuestSide,
    show_more: &'a ShowMore<'a>,
    /// A duplicate of descriptor 0 without std's buffer, which would hide from epoll what it read
    /// ahead. Other processes may have it as well, and read what epoll has told of here.
    stdin: Reader,
    input: ConsoleInput,
    waiting: Waiting,
    shutdown_timeout: Duration,
    deadline: TimerFd,
    /// The signal that began a shutdown by the power button.
    stopping: Option<i32>,
}

/// The loop with all descriptors that it begins with: to be made while its failure costs nobody a guest.
pub struct MainLoop<'a> {
    manager: EventManager<Subscriber<'a>>,
    stdin: Reader,
    /// Of a shutdown, when that has begun.
    deadline: TimerFd,
    /// Stdin is a terminal, on which the console's escapes are taken out.
    terminal: bool,
}

fn failed(error: event_manager::Error) -> io::Error {
    io::Error::other(error.to_string())
}

impl<'a> MainLoop<'a> {
    /// `terminal` says that stdin is a terminal, on which the console's escapes are taken out.
    ///
    /// # Errors
    /// There is no epoll, no timer, or no other descriptor of stdin.
    pub fn new(terminal: bool) -> io::Result<Self> {
        Ok(MainLoop {
            manager: EventManager::new_with_capacity(8).map_err(failed)?,
            stdin: Reader::new(io::stdin().as_fd().try_clone_to_owned()?.into()),
            deadline: TimerFd::new()?,
            terminal,
        })
    }

    /// Runs until `end` has been told. Signals: SIGUSR1 shows the vCPUs' registers, and `show_more`; SIGWINCH tells the
    /// guest that the terminal has another size; the first SIGTERM stops a guest that is paused, and else presses the power
    /// button and gives the guest `shutdown_timeout` to react; any other stop signal, a second one, or the first where
    /// `shutdown_timeout` is zero, ends at once.
    ///
    /// # Errors
    /// epoll fails.
    pub fn run(
        self,
        end: &Arc<EndSignal>,
        signals: &'a Signals,
        guest: &'a dyn GuestSide,
        show_more: &'a ShowMore<'a>,
        shutdown_timeout: Duration,
    ) -> io::Result<()> {
        let mut manager = self.manager;
        manager.add_subscriber(Subscriber {
            end: end.clone(),
            signals,
            guest,
            show_more,
            stdin: self.stdin,
            input: ConsoleInput::new(self.terminal, guest.input_chunk()),
            waiting: Waiting::Readable,
            shutdown_timeout,
            deadline: self.deadline,
            stopping: None,
        });
        while !end.is_told() {
            manager.run().map_err(failed)?;
        }
        Ok(())
    }
}

impl Subscriber<'_> {
    fn fail(&self, what: &str, error: impl std::fmt::Display) {
        self.end.tell(GuestEnd::Failed(format!("{what}: {error}")));
    }

    /// Stdin is readable: moves input until there is none, or the guest has no room.
    fn pump(&mut self, ops: &mut EventOps<'_>) {
        loop {
            let guest = self.guest;
            let turn = self.input.turn(&mut self.stdin, |bytes| guest.input(bytes));
            match (turn, self.waiting) {
                // A file has more at once; for the rest epoll says when.
                (Turn::More, Waiting::File) => continue,
                (Turn::More, _) => {}
                (Turn::Full, Waiting::Readable) => {
                    self.unwatch_stdin(ops);
                    self.waiting = Waiting::Drained;
                }
                (Turn::Full, _) => {}
                (Turn::Ended, waiting) => {
                    if waiting == Waiting::Readable {
                        self.unwatch_stdin(ops);
                    }
                    self.waiting = Waiting::Ended;
                }
                (Turn::Quit, _) => self.end.tell(GuestEnd::Stopped(StopCause::Console)),
            }
            return;
        }
    }

    /// The guest has room again. Stdin is not read here, unless it is a file: epoll says when.
    fn drained(&mut self, ops: &mut EventOps<'_>) {
        if self.waiting == Waiting::File {
            return self.pump(ops);
        }
        let guest = self.guest;
        let turn = self.input.hand_over(|bytes| guest.input(bytes));
        if turn == Turn::More && self.waiting == Waiting::Drained {
            self.waiting = Waiting::Readable;
            self.watch_stdin(ops);
        }
    }

    fn watch_stdin(&mut self, ops: &mut EventOps<'_>) {
        let events = Events::with_data(&self.stdin, STDIN, EventSet::IN);
        match ops.add(events) {
            Ok(()) => {}
            // A file that epoll does not take, because it can be read always.
            Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EPERM => {
                self.waiting = Waiting::File;
                self.stdin.is_file();
            }
            // Anything else: a read could block this thread, and with it the end.
            Err(error) => self.fail("cannot wait for console input", error),
        }
    }

    fn unwatch_stdin(&self, ops: &mut EventOps<'_>) {
        let events = Events::with_data(&self.stdin, STDIN, EventSet::IN);
        if let Err(error) = ops.remove(events) {
            log::debug!("stdin: {error}");
        }
    }

    /// The stop signals that have come: a second one is the end, so they are few.
    fn stops(&mut self) {
        while !self.end.is_told()
            && let Some(signal) = self.signals.next_stop()
        {
            self.stop(signal);
        }
    }

    fn stop(&mut self, signal: i32) {
        let name = signals::name(signal);
        let end = self.end.clone();
        let stop = || end.tell(GuestEnd::Stopped(StopCause::Signal(signal)));
        if signal != libc::SIGTERM || self.stopping.is_some() || self.shutdown_timeout.is_zero() {
            // First: the log's reader may be slow.
            stop();
            return log::info!("{name} stops the guest");
        }
        // It could not power off.
        if self.guest.is_paused() {
            stop();
            return log::info!("{name} stops the guest, which is paused");
        }
        // Before the button: a guest that is told must have a deadline.
        self.set_deadline();
        self.stopping = Some(signal);
        if !self.guest.press_power_button() {
            stop();
            return log::info!("{name} stops the guest, which has no ACPI");
        }
        log::info!(
            "{name} pressed the power button; the guest has {} s to power off",
            self.shutdown_timeout.as_secs()
        );
    }

    fn set_deadline(&mut self) {
        // There is some time: with none it was stopped before this.
        if let Err(error) = self.deadline.reset(self.shutdown_timeout, None) {
            self.fail("cannot set the shutdown's deadline", error);
        }
    }
}

impl MutEventSubscriber for Subscriber<'_> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let drained = self.guest.drained();
        for (fd, data) in [
            (self.end.as_raw_fd(), END),
            (self.signals.stops(), STOPS),
            (self.signals.shows(), SHOWS),
            (self.signals.resizes(), RESIZES),
            (drained, DRAINED),
            (self.deadline.as_raw_fd(), DEADLINE),
        ] {
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                self.fail("cannot set up the event loop", error);
            }
        }
        self.watch_stdin(ops);
        if self.waiting == Waiting::File {
            self.pump(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            STOPS => self.stops(),
            SHOWS => {
                // First, and one of the others a turn: they may come without rest.
                self.stops();
                if !self.end.is_told() && self.signals.next_show() {
                    self.guest.show_registers();
                    (self.show_more)();
                }
            }
            STDIN => self.pump(ops),
            RESIZES if self.signals.next_resize() => self.guest.resized(),
            DRAINED => {
                self.guest.clear_drained();
                self.drained(ops);
            }
            DEADLINE => {
                let signal = self.stopping.unwrap_or(libc::SIGTERM);
                self.end.tell(GuestEnd::Stopped(StopCause::Signal(signal)));
                log::warn!(
                    "the guest did not power off in {} s: stopping it",
                    self.shutdown_timeout.as_secs()
                );
            }
            // END is what ends the loop around this.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vmm_sys_util::eventfd::EventFd;

    /// A signal that a shell had ignored (it does so in the background) would not be taken over.
    fn heed(signal: i32) {
        // SAFETY: a valid signal and its default; it is blocked before it is sent.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }

    /// Sends this thread a signal.
    fn raise(signal: i32) {
        // SAFETY: a valid signal, which this thread blocks.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    /// Who watches it asks again at each answer, for [`ANSWERS`] times.
    struct Watched {
        answers: AtomicUsize,
        drained: EventFd,
    }

    const ANSWERS: usize = 1000;

    impl GuestSide for Watched {
        fn input(&self, bytes: &[u8]) -> usize {
            bytes.len()
        }
        fn drained(&self) -> RawFd {
            self.drained.as_raw_fd()
        }
        fn clear_drained(&self) {}
        fn press_power_button(&self) -> bool {
            false
        }
        fn show_registers(&self) {
            if self.answers.fetch_add(1, Ordering::Relaxed) < ANSWERS {
                raise(signals::SHOW_REGISTERS);
            }
        }
    }

    #[test]
    fn sigusr1_without_rest_keeps_no_stop_signal_waiting() {
        for stop in [libc::SIGTERM, libc::SIGINT] {
            heed(stop);
            let signals = Signals::take_over().unwrap();
            let end = Arc::new(EndSignal::new().unwrap());
            let guest = Watched {
                answers: AtomicUsize::new(0),
                drained: EventFd::new(0).unwrap(),
            };
            raise(signals::SHOW_REGISTERS);
            // While it is shown.
            let more = Cell::new(Some(stop));
            let show_more = || {
                if let Some(stop) = more.take() {
                    raise(stop);
                }
            };
            let timeout = Duration::from_secs(3600);
            let main_loop = MainLoop::new(false).unwrap();
            main_loop
                .run(&end, &signals, &guest, &show_more, timeout)
                .unwrap();
            let stopped = GuestEnd::Stopped(StopCause::Signal(stop));
            assert_eq!(format!("{:?}", end.get()), format!("{:?}", Some(stopped)));
            assert_eq!(guest.answers.into_inner(), 1);
            // What was asked last, or the next round would begin with it.
            assert!(signals.next_show());
        }
    }
}
