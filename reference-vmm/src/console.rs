// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The terminal's side of the guest's console, serial or hvc0: raw mode that is always undone, the escape sequence,
//! and the way from stdin to the guest.

use std::io::{self, IsTerminal, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, Once};

/// Ctrl-A begins an escape.
const ESCAPE: u8 = 0x01;

/// The terminal as it was before raw mode, for whoever has to restore it: [`RawTerminal`]'s drop,
/// or a panic.
static SAVED: Mutex<Option<(RawFd, libc::termios)>> = Mutex::new(None);

/// Raw mode of a terminal, for as long as this lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts stdin into raw mode if it is a terminal: the guest does the echo and gets Ctrl-C and
    /// the like as bytes. `None` if it is none. A panic restores the terminal too.
    ///
    /// # Errors
    /// The errno of `tcgetattr(3)` or `tcsetattr(3)`; the terminal is then unchanged.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let fd = stdin.as_raw_fd();
        let mut termios = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills `termios` when it succeeds, and it is read only then.
        let saved = unsafe {
            if libc::tcgetattr(fd, termios.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            termios.assume_init()
        };
        let mut raw = saved;
        // SAFETY: `raw` is a valid termios.
        unsafe { libc::cfmakeraw(&mut raw) };
        // The guest ends its lines with CR LF itself, yet what the monitor says on the same
        // terminal does not.
        raw.c_oflag = saved.c_oflag;
        if let Ok(mut slot) = SAVED.lock() {
            *slot = Some((fd, saved));
        }
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                hook(info);
            }));
        });
        // SAFETY: `raw` is a valid termios.
        if unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was, once.
pub(crate) fn restore() {
    if let Ok(mut slot) = SAVED.try_lock()
        && let Some((fd, saved)) = slot.take()
        && !in_background(fd)
    {
        // SAFETY: `saved` is what tcgetattr gave for this descriptor.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, &saved) };
    }
}

/// Whether the terminal is another job's by now. Its shell has settings of its own, and who changes
/// them from the background is stopped by SIGTTOU.
fn in_background(fd: RawFd) -> bool {
    // SAFETY: both calls only ask. A terminal that does not control this process (-1) has no jobs.
    let (foreground, own) = unsafe { (libc::tcgetpgrp(fd), libc::getpgrp()) };
    foreground > 0 && foreground != own
}

/// Takes the console's escapes out of what is typed: Ctrl-A x quits, Ctrl-A Ctrl-A types one
/// Ctrl-A; any other key after Ctrl-A passes with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Appends what is meant for the guest to `to_guest`. Returns whether the user asked to quit;
    /// what was typed after that is dropped.
    pub fn filter(&mut self, typed: &[u8], to_guest: &mut Vec<u8>) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.pending), byte) {
                (false, ESCAPE) => self.pending = true,
                (false, byte) => to_guest.push(byte),
                (true, b'x' | b'X') => return true,
                (true, ESCAPE) => to_guest.push(ESCAPE),
                (true, byte) => to_guest.extend([ESCAPE, byte]),
            }
        }
        false
    }
}

/// What a turn of [`ConsoleInput`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// More can be read.
    More,
    /// Nothing is to be read before the guest's FIFO has drained and [`ConsoleInput::hand_over`]
    /// says [`Turn::More`].
    Full,
    /// The input has ended; the guest runs on without.
    Ended,
    /// The user typed the escape to quit.
    Quit,
}

/// Carries stdin to the guest and loses nothing: of a file or a pipe nothing more is read while the
/// guest has no room. A terminal is read on for [`TYPE_AHEAD`] bytes, or a guest that reads nothing
/// could not be quit by the escape.
#[derive(Debug)]
pub struct ConsoleInput {
    escape: Option<Escape>,
    pending: Vec<u8>,
    chunk: usize,
}

/// Bytes read at a time for a UART: its FIFO has room for as many.
pub const CHUNK: usize = 64;
/// The most that is read at a time.
pub const MOST_AT_ONCE: usize = 4096;

/// How many bytes typed on a terminal are kept for a guest that does not read them.
pub const TYPE_AHEAD: usize = 64 << 10;

impl ConsoleInput {
    /// Input with escapes when it comes from a terminal, without when it is a file or a pipe, whose
    /// bytes all belong to the guest. `chunk` bytes are read at a time, up to [`MOST_AT_ONCE`].
    pub fn new(terminal: bool, chunk: usize) -> Self {
        let chunk = chunk.clamp(1, MOST_AT_ONCE);
        ConsoleInput {
            escape: terminal.then(Escape::default),
            pending: Vec::with_capacity(chunk),
            chunk,
        }
    }

    /// Reads once from `input`, if that may be read on, and hands what there is to `guest`, which
    /// returns how many bytes it took. Blocks if `input` does: `WouldBlock` is nothing for now.
    pub fn turn(&mut self, input: &mut impl Read, guest: impl Fn(&[u8]) -> usize) -> Turn {
        if self.may_read() {
            let mut chunk = [0; MOST_AT_ONCE];
            let chunk = &mut chunk[..self.chunk];
            let read = match input.read(chunk) {
                Ok(0) => return Turn::Ended,
                Ok(read) => &chunk[..read],
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) =>
                {
                    return Turn::More;
                }
                Err(e) => {
                    log::warn!("the console's input has ended: {e}");
                    return Turn::Ended;
                }
            };
            match &mut self.escape {
                Some(escape) => {
                    if escape.filter(read, &mut self.pending) {
                        return Turn::Quit;
                    }
                }
                None => self.pending.extend_from_slice(read),
            }
        }
        self.hand_over(guest)
    }

    /// Hands what was read and not taken yet to `guest`, and reads nothing. Call it when the guest's
    /// FIFO has drained. Does not block.
    pub fn hand_over(&mut self, guest: impl Fn(&[u8]) -> usize) -> Turn {
        if !self.pending.is_empty() {
            let taken = guest(&self.pending).min(self.pending.len());
            self.pending.drain(..taken);
        }
        if self.may_read() {
            Turn::More
        } else {
            Turn::Full
        }
    }

    fn may_read(&self) -> bool {
        self.pending.is_empty() || self.escape.is_some() && self.pending.len() < TYPE_AHEAD
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    fn filtered(typed: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut escape, mut out) = (Escape::default(), Vec::new());
        let quit = typed.iter().any(|typed| escape.filter(typed, &mut out));
        (out, quit)
    }

    #[test]
    fn ctrl_a_x_quits_also_when_it_comes_in_two_reads() {
        assert_eq!(filtered(&[b"ab\x01xcd"]), (b"ab".to_vec(), true));
        assert_eq!(filtered(&[b"ab\x01", b"x"]), (b"ab".to_vec(), true));
        assert_eq!(filtered(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filtered(&[b"\x01b"]), (b"\x01b".to_vec(), false));
    }

    #[test]
    fn a_pipe_may_hold_the_escape_bytes() {
        let mut input = ConsoleInput::new(false, CHUNK);
        let got = RefCell::new(Vec::new());
        let guest = |bytes: &[u8]| {
            got.borrow_mut().extend_from_slice(bytes);
            bytes.len()
        };
        let mut source = &b"\x01x"[..];
        assert_eq!(input.turn(&mut source, guest), Turn::More);
        assert_eq!(input.turn(&mut source, guest), Turn::Ended);
        assert_eq!(*got.borrow(), b"\x01x");
    }

    #[test]
    fn a_guest_that_reads_nothing_can_be_quit() {
        let mut input = ConsoleInput::new(true, CHUNK);
        let typed = [b'a'; 1000];
        let mut source = &typed[..];
        while !source.is_empty() {
            assert_eq!(input.turn(&mut source, |_| 0), Turn::More);
        }
        assert_eq!(input.turn(&mut &b"\x01x"[..], |_| 0), Turn::Quit);
    }

    #[test]
    fn what_is_typed_ahead_is_kept_in_order_and_has_an_end() {
        let mut input = ConsoleInput::new(true, CHUNK);
        let typed: Vec<u8> = (0..2 * TYPE_AHEAD).map(|n| (n % 251) as u8 | 2).collect();
        let mut source = &typed[..];
        while input.turn(&mut source, |_| 0) == Turn::More {}
        let read = typed.len() - source.len();
        assert!((TYPE_AHEAD..TYPE_AHEAD + CHUNK).contains(&read));
        assert_eq!(input.turn(&mut source, |_| 0), Turn::Full);
        assert_eq!(typed.len() - source.len(), read, "nothing more was read");

        let got = RefCell::new(Vec::new());
        let take = |bytes: &[u8]| {
            let taken = bytes.len().min(CHUNK);
            got.borrow_mut().extend_from_slice(&bytes[..taken]);
            taken
        };
        while got.borrow().len() < read {
            assert_eq!(input.hand_over(take), Turn::More);
        }
        assert_eq!(*got.borrow(), typed[..read]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled_whatever_the_guest_takes(
            bytes in any::<Vec<u8>>(),
            takes in proptest::collection::vec(0usize..70, 1..200)
        ) {
            let mut input = ConsoleInput::new(false, CHUNK);
            let got = RefCell::new(Vec::new());
            let mut source = &bytes[..];
            let mut takes = takes.into_iter().cycle();
            for _ in 0..bytes.len() * 2 + 200 {
                let take = takes.next().unwrap_or(1);
                let turn = input.turn(&mut source, |offered| {
                    let take = take.min(offered.len());
                    got.borrow_mut().extend_from_slice(&offered[..take]);
                    take
                });
                if turn == Turn::Ended {
                    break;
                }
            }
            let got = got.into_inner();
            prop_assert!(bytes.starts_with(&got));
        }
    }
}
