// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! COM1: vm-superio's 16550A on a PIO range, with the console behind it.
//!
//! Output goes out byte by byte on the vCPU thread that wrote it, so the guest waits when the
//! console does; a guest whose end has been told waits no longer ([`ConsoleOut`]), and an end of its
//! own is told when all that it wrote is out ([`EndSignal::before_own_end`]). Input comes
//! from the main thread through [`SerialPort::enqueue`], which takes what the 64-byte FIFO has room
//! for; when the guest has emptied the FIFO, [`SerialPort::drained`] becomes readable.
//!
//! A guest that polls the port and writes much may have its output coalesced: [`coalesce`](super::coalesce)
//! says when, and why the port's registers do not show it.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::coalesce::PolledOutput;
use super::edge::{Edge, Owing, TryTrigger};
use crate::end::EndSignal;
use crate::no_wait::{Way, ready};
use crate::timeline::{Event, timeline};

/// The guest's console on a file of the host, stdout as a rule.
///
/// A vCPU thread writes to it, and a reader that has gone to sleep must not keep the VM from ending.
/// A kick does not reach a thread that is not in the guest, so no write may block: each waits, if it
/// has to wait, for room or for the guest's end.
#[derive(Debug)]
pub struct ConsoleOut {
    out: File,
    end: Arc<EndSignal>,
    way: Way,
    lost: bool,
}

impl ConsoleOut {
    /// Writes to a duplicate of `out`; gives up waiting once `end` has been told.
    ///
    /// # Errors
    /// The errno of `dup(2)` or `fstat(2)`.
    pub fn new(out: impl AsFd, end: Arc<EndSignal>) -> io::Result<Self> {
        let out = File::from(out.as_fd().try_clone_to_owned()?);
        Ok(ConsoleOut {
            way: Way::of(&out)?,
            out,
            end,
            lost: false,
        })
    }
}

/// Waits until `out` has room, or the guest's end has been told: then false.
fn wait_for_room(out: &File, end: &EndSignal) -> io::Result<bool> {
    let fds = [
        (out.as_raw_fd(), libc::POLLOUT),
        (end.as_raw_fd(), libc::POLLIN),
    ];
    // What there is room for is written even at the end. An error of `out` counts as room: the
    // write says which.
    ready(fds, -1).map(|[room, _]| room)
}

impl Write for ConsoleOut {
    /// Blocks while the console is full, unless the guest's end has been told: what a stopped guest
    /// still had to say is dropped then.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        timeline().mark(Event::FirstOutput);
        let room = || wait_for_room(&self.out, &self.end);
        let written = self.way.write(&self.out, bytes, room);
        if let (Err(error), false) = (&written, self.lost) {
            log::error!("the console takes no more output, which is lost: {error}");
            self.lost = true;
        }
        Ok(written?.unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt enable register, and its bit for the transmitter's (THRI).
const INTERRUPT_ENABLE: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 1;

/// The line control register, and its bit that puts the divisor latch over registers 0 and 1 (DLAB).
const LINE_CONTROL: u8 = 3;
const DIVISOR_LATCH: u8 = 1 << 7;

/// The modem control register, and its bit for loop-back mode.
const MODEM_CONTROL: u8 = 4;
const LOOP_BACK: u8 = 1 << 4;

/// Tells the main thread that the guest has read all of its input.
#[derive(Debug)]
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // EAGAIN: the counter is at its top, so the eventfd is readable already.
        let _ = self.0.write(1);
    }
}

/// What the register model interrupts by: the edge is sent when its lock is free again.
struct Wanted<T>(Arc<Edge<T>>);

impl<T> Trigger for Wanted<T> {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.want();
        Ok(())
    }
}

/// A serial port: registers 0..=7 from its base, one byte each.
///
/// Two locks, `out` before `uart`: a vCPU that waits for a slow console holds `out` alone, so that
/// input, status reads and with them the main thread never wait for the console's reader. None is held
/// while the guest is interrupted.
pub struct SerialPort<T: Trigger, W: Write> {
    interrupt: Arc<Edge<T>>,
    /// Where the bytes go that `uart` has put into its own buffer, in the order in which the guest
    /// wrote them.
    out: Mutex<W>,
    uart: Mutex<Uart<T>>,
    drained: EventFd,
    /// Written by who holds `uart`.
    polled: AtomicU32,
    /// There may be bytes in the buffer that nobody has taken yet.
    pending: AtomicBool,
    /// Who has said [`hold`](PolledOutput::hold) and will take them.
    held: AtomicU32,
}

/// Its output is a buffer that [`SerialPort`] empties after each access.
type Uart<T> = Serial<Wanted<T>, Drained, Vec<u8>>;

/// A serial port as plain data: its registers, and the input that the guest has not read. What the guest has sent is
/// on the console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Divisor latch: DLL, DLM.
    pub divisor: [u8; 2],
    /// IER.
    pub interrupt_enable: u8,
    /// IIR.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// The receiver's FIFO, the next byte first.
    pub input: Vec<u8>,
    /// An interrupt is due that has not been sent.
    pub owes_interrupt: bool,
}

impl<T: Trigger, W: Write> SerialPort<T, W> {
    /// A port that interrupts through `interrupt` and speaks to `out`.
    ///
    /// # Errors
    /// The errno of `eventfd(2)`.
    pub fn new(interrupt: T, out: W) -> io::Result<Self> {
        let drained = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let events = Drained(drained.try_clone()?);
        let interrupt = Arc::new(Edge::new(interrupt));
        let wanted = Wanted(interrupt.clone());
        Ok(SerialPort {
            interrupt,
            out: Mutex::new(out),
            uart: Mutex::new(Serial::with_events(wanted, events, Vec::new())),
            drained,
            polled: AtomicU32::new(0),
            pending: AtomicBool::new(false),
            held: AtomicU32::new(0),
        })
    }

    /// A port in this state. An interrupt that is due is owed ([`SerialPort::owes_interrupt`]) until somebody sends it.
    ///
    /// # Errors
    /// The errno of `eventfd(2)`; `InvalidData` of a state whose FIFO holds more than one can.
    pub fn from_state(interrupt: T, out: W, state: &PortState) -> io::Result<Self> {
        let port = Self::new(interrupt, out)?;
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let registers = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let wanted = Wanted(port.interrupt.clone());
        let events = Drained(port.drained.try_clone()?);
        let uart = Serial::from_state(&registers, wanted, events, Vec::new());
        *port.uart() = uart.map_err(|_| {
            let len = state.input.len();
            let text = format!("a serial port's FIFO with {len} bytes, and 64 are the most");
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        if state.owes_interrupt {
            port.interrupt.want();
        }
        Ok(port)
    }

    /// The port as plain data. To be asked while no vCPU runs and no input comes, and after
    /// [`sync`](PolledOutput::sync).
    pub fn state(&self) -> PortState {
        let state = self.uart().state();
        PortState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
            owes_interrupt: self.interrupt.is_wanted(),
        }
    }

    /// Hands input to the guest and returns how many bytes the FIFO took: 0 when it is full, and
    /// while the guest has the port in loop-back mode, in which the receiver is off the wire (Linux
    /// tries it when it looks for its ports). [`SerialPort::drained`] says when to come again. Waits
    /// neither for the console's output nor to interrupt the guest: see
    /// [`SerialPort::owes_interrupt`].
    pub fn enqueue(&self, bytes: &[u8]) -> usize
    where
        T: TryTrigger,
    {
        let mut uart = self.uart();
        let taken = match uart.fifo_capacity() {
            0 => 0,
            // No other error is left, for there is room.
            _ => uart.enqueue_raw_bytes(bytes).unwrap_or(0),
        };
        drop(uart);
        if let Err(error) = self.interrupt.try_send() {
            // The source tells of its own failure (`devices::interrupt`); a second line here
            // would race with the guest's end.
            log::debug!("cannot interrupt the guest for console input: {error:?}");
        }
        taken
    }

    /// Whether the guest is to be interrupted by someone who may wait ([`Owing`]).
    pub fn owes_interrupt(&self) -> bool {
        self.interrupt.is_wanted()
    }

    /// After an access, with no lock held. May wait.
    fn interrupt(&self) {
        if let Err(error) = self.interrupt.send() {
            log::debug!("cannot interrupt the guest for the serial port: {error:?}");
        }
    }

    /// Readable when the guest has read the last byte of its input, and when it has left loop-back
    /// mode.
    pub fn drained(&self) -> &EventFd {
        &self.drained
    }

    /// Takes what is in the buffer to the console. Blocks while that is full.
    fn flush(&self) {
        // A console whose write panicked takes bytes as any other.
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the bytes are taken: who adds to them later says so again.
        self.pending.store(false, Ordering::SeqCst);
        let mut bytes = std::mem::take(self.uart().writer_mut());
        if bytes.is_empty() {
            return;
        }
        if let Err(error) = out.write_all(&bytes) {
            log::debug!("serial output: {error}");
        }
        // Its allocation serves the next byte too, unless that is there already.
        bytes.clear();
        let mut uart = self.uart();
        if uart.writer().is_empty() {
            *uart.writer_mut() = bytes;
        }
    }

    fn uart(&self) -> MutexGuard<'_, Uart<T>> {
        // The registers are plain bytes: a panic elsewhere leaves them as valid as any guest could.
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Trigger + Send + Sync, W: Write + Send> Owing for SerialPort<T, W> {
    fn send_owed(&self) {
        self.interrupt();
    }
}

impl<T, W> PolledOutput for SerialPort<T, W>
where
    T: Trigger + Send + Sync,
    W: Write + Send,
{
    fn polled_bytes(&self) -> u32 {
        // Relaxed: a number that decides about speed alone.
        self.polled.load(Ordering::Relaxed)
    }

    fn restart(&self) {
        let _uart = self.uart();
        self.polled.store(0, Ordering::Relaxed);
    }

    fn is_interrupt_driven(&self) -> bool {
        transmits_by_interrupt(&mut self.uart())
    }

    fn hold(&self) {
        self.held.fetch_add(1, Ordering::SeqCst);
    }

    fn release(&self) {
        // SeqCst, as the store of `pending` and the load of `held` in `pio_write`: of a writer and the
        // last who releases at the same time, one sees the other, and takes the bytes. Not the last
        // alone: vCPUs that hold by turns would keep the bytes back, and the buffer growing, for ever.
        self.held.fetch_sub(1, Ordering::SeqCst);
        if self.pending.load(Ordering::SeqCst) {
            self.flush();
        }
    }

    fn let_go(&self) {
        self.held.fetch_sub(1, Ordering::SeqCst);
    }

    fn sync(&self) {
        // Its lock waits for who has taken bytes and not brought them out; what nobody has taken yet,
        // though it may be held, goes with it.
        self.flush();
    }
}

/// Whether the guest has THRI set. Reading these registers changes nothing.
fn transmits_by_interrupt<T: Trigger>(uart: &mut Uart<T>) -> bool {
    uart.read(LINE_CONTROL) & DIVISOR_LATCH == 0
        && uart.read(INTERRUPT_ENABLE) & TRANSMITTER_EMPTY != 0
}

impl<T: Trigger, W: Write> DevicePio for SerialPort<T, W> {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        // The UART has byte registers: a wider access meets one register a byte, as on ISA.
        let mut uart = self.uart();
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |register| uart.read(register));
        }
        drop(uart);
        self.interrupt();
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut uart = self.uart();
        let before = uart.writer().len();
        for (register, byte) in (offset..).zip(data) {
            let Ok(register) = u8::try_from(register) else {
                continue;
            };
            let leaves_loop_back = register == MODEM_CONTROL
                && uart.read(MODEM_CONTROL) & LOOP_BACK != 0
                && byte & LOOP_BACK == 0;
            if let Err(error) = uart.write(register, *byte) {
                log::debug!("serial register {register}: {error:?}");
            }
            if leaves_loop_back {
                // EAGAIN: the counter is at its top, so the eventfd is readable already.
                let _ = self.drained.write(1);
            }
        }
        let sent = uart.writer().len().saturating_sub(before);
        if sent > 0 && !transmits_by_interrupt(&mut uart) {
            let sent = u32::try_from(sent).unwrap_or(u32::MAX);
            let polled = self.polled.load(Ordering::Relaxed).saturating_add(sent);
            self.polled.store(polled, Ordering::Relaxed);
        }
        drop(uart);
        self.interrupt();
        if sent == 0 {
            return;
        }
        self.pending.store(true, Ordering::SeqCst);
        if self.held.load(Ordering::SeqCst) == 0 {
            self.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::edge::tests::Count;

    fn read(port: &SerialPort<Count, Vec<u8>>, register: u16) -> u8 {
        let mut data = [0];
        port.pio_read(PioAddress(0x3f8), register, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_writer_and_input_the_guest_with_one_interrupt() {
        let count = Count::default();
        let port = SerialPort::new(count.clone(), Vec::new()).unwrap();
        port.pio_write(PioAddress(0x3f8), 0, b"A");
        port.pio_write(PioAddress(0x3f8), 1, &[1]); // interrupt on received data
        assert_eq!(port.enqueue(b"hi"), 2);
        assert_eq!(count.sent(), 1);
        assert!(port.drained().read().is_err(), "not drained yet");
        assert_eq!((read(&port, 0), read(&port, 0)), (b'h', b'i'));
        assert_eq!(port.drained().read().unwrap(), 1);
        assert_eq!(*port.out.lock().unwrap(), b"A");
    }

    #[test]
    fn an_interrupt_that_would_have_to_wait_is_owed_and_the_next_access_sends_it() {
        let count = Count::default();
        let port = SerialPort::new(count.clone(), Vec::new()).unwrap();
        port.pio_write(PioAddress(0x3f8), 1, &[1]);
        count.busy(true);
        assert_eq!(port.enqueue(b"hi"), 2);
        assert!(port.owes_interrupt());
        port.send_owed();
        port.send_owed();
        assert_eq!((count.sent(), port.owes_interrupt()), (1, false));
        assert_eq!((read(&port, 0), read(&port, 0)), (b'h', b'i'));
        assert_eq!(port.enqueue(b"!"), 1);
        assert_eq!((count.sent(), port.owes_interrupt()), (1, true));
        assert_eq!(read(&port, 0), b'!');
        assert_eq!((count.sent(), port.owes_interrupt()), (2, false));
    }

    #[test]
    fn a_full_fifo_takes_nothing_and_loses_nothing() {
        let port = SerialPort::new(Count::default(), Vec::new()).unwrap();
        let input: Vec<u8> = (0..100).collect();
        let taken = port.enqueue(&input);
        assert_eq!(taken, 64);
        assert_eq!(port.enqueue(&input[taken..]), 0);
        let got: Vec<u8> = (0..64).map(|_| read(&port, 0)).collect();
        assert_eq!(got, input[..64]);
        assert_eq!(port.enqueue(&input[64..]), 36);
    }

    #[test]
    fn input_waits_for_the_end_of_loop_back_mode() {
        let port = SerialPort::new(Count::default(), Vec::new()).unwrap();
        port.pio_write(PioAddress(0x3f8), 4, &[0x10]);
        assert_eq!(port.enqueue(b"hi"), 0);
        port.pio_write(PioAddress(0x3f8), 4, &[0x1b]);
        assert!(port.drained().read().is_err(), "still in loop-back mode");
        port.pio_write(PioAddress(0x3f8), 4, &[0x08]);
        assert_eq!(port.drained().read().unwrap(), 1);
        assert_eq!(port.enqueue(b"hi"), 2);
        assert_eq!((read(&port, 0), read(&port, 0)), (b'h', b'i'));
    }

    #[test]
    fn only_bytes_on_the_wire_that_nobody_waits_for_count_as_polled() {
        let port = SerialPort::new(Count::default(), Vec::new()).unwrap();
        let write = |register, byte| port.pio_write(PioAddress(0x3f8), register, &[byte]);
        write(0, b'a');
        write(0, b'b');
        assert_eq!(port.polled_bytes(), 2);
        // The divisor: to the same addresses, and 2 in its high byte is no THRI.
        write(3, 0x80);
        write(0, 1);
        write(1, 2);
        assert_eq!(port.polled_bytes(), 2);
        assert!(!port.is_interrupt_driven());
        write(3, 0x03);
        // Loop-back mode.
        write(4, 0x10);
        write(0, b'x');
        write(4, 0);
        assert_eq!(port.polled_bytes(), 2);
        write(1, 2);
        assert!(port.is_interrupt_driven());
        write(0, b'c');
        assert_eq!(port.polled_bytes(), 2);
        write(1, 1);
        assert!(!port.is_interrupt_driven());
        write(0, b'd');
        assert_eq!(port.polled_bytes(), 3);
        port.restart();
        assert_eq!(port.polled_bytes(), 0);
        assert_eq!(*port.out.lock().unwrap(), b"abcd");
    }

    #[test]
    fn what_is_held_goes_out_in_one_piece_when_someone_lets_go() {
        /// Each write's bytes by themselves.
        #[derive(Default)]
        struct Pieces(Vec<Vec<u8>>);
        impl Write for Pieces {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.push(bytes.to_vec());
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let port = SerialPort::new(Count::default(), Pieces::default()).unwrap();
        let write = |byte| port.pio_write(PioAddress(0x3f8), 0, &[byte]);
        write(b'a');
        port.hold();
        port.hold();
        write(b'b');
        write(b'c');
        assert_eq!(port.out.lock().unwrap().0, [b"a"]);
        port.release();
        // Another holds still, and may go on to do so: nobody waits for that.
        assert_eq!(port.out.lock().unwrap().0, [&b"a"[..], b"bc"]);
        port.release();
        port.hold();
        port.release();
        write(b'd');
        let pieces = &port.out.lock().unwrap().0;
        assert_eq!(*pieces, [&b"a"[..], b"bc", b"d"]);
    }

    #[test]
    fn nothing_is_lost_between_those_who_write_and_those_who_hold() {
        let port = SerialPort::new(Count::default(), Vec::new()).unwrap();
        std::thread::scope(|scope| {
            for byte in [b'a', b'b'] {
                let port = &port;
                scope.spawn(move || {
                    for _ in 0..5000 {
                        port.hold();
                        port.pio_write(PioAddress(0x3f8), 0, &[byte]);
                        port.release();
                        port.pio_write(PioAddress(0x3f8), 0, &[byte]);
                    }
                });
            }
        });
        let out = port.out.lock().unwrap();
        let count = |byte| out.iter().filter(|&&got| got == byte).count();
        assert_eq!((count(b'a'), count(b'b')), (10_000, 10_000));
    }

    #[test]
    fn a_wide_access_meets_one_register_a_byte() {
        let port = SerialPort::new(Count::default(), Vec::new()).unwrap();
        port.pio_write(PioAddress(0x3f8), 7, &[0x5a, 0x99]); // the second byte is past the UART
        let mut data = [0; 4];
        port.pio_read(PioAddress(0x3f8), 5, &mut data);
        assert_eq!(data[0] & 0x60, 0x60, "transmitter empty");
        assert_eq!(data[2], 0x5a, "scratch");
    }

    #[test]
    fn a_console_that_takes_nothing_does_not_hold_a_stopped_guest() {
        let end = Arc::new(EndSignal::new().unwrap());
        let (_reader, writer) = io::pipe().unwrap();
        // SAFETY: F_SETFL on a descriptor that this test owns.
        unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let mut out = ConsoleOut::new(&writer, end.clone()).unwrap();
        let chunk = [0; 4096];
        for _ in 0..16 {
            out.write_all(&chunk).unwrap();
        }
        end.tell(crate::end::GuestEnd::Reset);
        out.write_all(&chunk).unwrap();
    }

    /// A console that is full until the test says otherwise.
    struct Stuck(std::sync::mpsc::Receiver<()>, std::sync::mpsc::Sender<()>);
    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.send(()).unwrap();
            self.0.recv().unwrap();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn input_does_not_wait_for_output_that_nobody_reads() {
        let (release, released) = std::sync::mpsc::channel();
        let (stuck, is_stuck) = std::sync::mpsc::channel();
        let port = SerialPort::new(Count::default(), Stuck(released, stuck)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| port.pio_write(PioAddress(0x3f8), 0, b"x"));
            is_stuck.recv().unwrap();
            assert_eq!(port.enqueue(b"hi"), 2);
            let mut data = [0];
            port.pio_read(PioAddress(0x3f8), 0, &mut data);
            assert_eq!(data, *b"h");
            release.send(()).unwrap();
        });
    }

    #[test]
    fn a_blocking_console_lets_go_when_the_guest_ends() {
        let end = Arc::new(EndSignal::new().unwrap());
        let (_reader, writer) = io::pipe().unwrap();
        for way in [Way::NoWait, Way::AskFirst] {
            let mut out = ConsoleOut::new(&writer, end.clone()).unwrap();
            out.way = way;
            let end = end.clone();
            std::thread::scope(|scope| {
                // Byte by byte, as the UART writes: more than a pipe holds.
                scope.spawn(move || (0..100_000).for_each(|_| out.write_all(b"x").unwrap()));
                end.tell(crate::end::GuestEnd::Reset);
            });
        }
    }

    #[test]
    fn a_string_instruction_does_not_block_on_a_console_with_too_little_room() {
        for way in [Way::NoWait, Way::AskFirst] {
            let end = Arc::new(EndSignal::new().unwrap());
            // Empty, and smaller than what is written.
            let (_reader, writer) = io::pipe().unwrap();
            let mut out = ConsoleOut::new(&writer, end.clone()).unwrap();
            out.way = way;
            std::thread::scope(|scope| {
                scope.spawn(move || out.write_all(&[b'x'; 100_000]).unwrap());
                end.tell(crate::end::GuestEnd::Reset);
            });
        }
    }
}
