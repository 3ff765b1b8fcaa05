// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! COM1: vm-superio's 16550A on a PIO range, with the console behind it.
//!
//! Output goes out byte by byte on the vCPU thread that wrote it, so the guest waits when the
//! console does; a guest that has been told to stop waits no longer ([`ConsoleOut`]). Input comes
//! from the main thread through [`SerialPort::enqueue`], which takes what the 64-byte FIFO has room
//! for; when the guest has emptied the FIFO, [`SerialPort::drained`] becomes readable.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::end::EndSignal;
use crate::timeline::{Event, timeline};

/// The guest's console on a file of the host, stdout as a rule.
#[derive(Debug)]
pub struct ConsoleOut {
    out: File,
    end: Arc<EndSignal>,
    lost: bool,
}

impl ConsoleOut {
    /// Writes to a duplicate of `out`; gives up waiting once `end` has been told.
    ///
    /// # Errors
    /// The errno of `dup(2)`.
    pub fn new(out: impl AsFd, end: Arc<EndSignal>) -> io::Result<Self> {
        Ok(ConsoleOut {
            out: out.as_fd().try_clone_to_owned()?.into(),
            end,
            lost: false,
        })
    }

    /// Waits until a non-blocking `out` takes bytes again, or a signal comes.
    fn wait_writable(&self) -> io::Result<()> {
        let mut fd = libc::pollfd {
            fd: self.out.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: `fd` is one valid pollfd.
        if unsafe { libc::poll(&mut fd, 1, -1) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Write for ConsoleOut {
    /// Blocks while the console is full. The signal that kicks a vCPU out of the guest ends the
    /// wait too: what a stopped guest still had to say is dropped, or a reader that has gone to
    /// sleep could keep the VM from ending.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        timeline().mark(Event::FirstOutput);
        loop {
            let result = self.out.write(bytes);
            let wait = match &result {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => false,
                Err(e) => {
                    if !self.lost {
                        log::error!("the console takes no more output, which is lost: {e}");
                        self.lost = true;
                    }
                    return result;
                }
                Ok(_) => return result,
            };
            if self.end.is_told() {
                return Ok(bytes.len());
            }
            if wait
                && let Err(e) = self.wait_writable()
                && e.kind() != io::ErrorKind::Interrupted
            {
                return Err(e);
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

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

/// A serial port: registers 0..=7 from its base, one byte each.
pub struct SerialPort<T: Trigger, W: Write> {
    uart: Mutex<Serial<T, Drained, W>>,
    drained: EventFd,
}

impl<T: Trigger, W: Write> SerialPort<T, W> {
    /// A port that interrupts through `interrupt` and speaks to `out`.
    ///
    /// # Errors
    /// The errno of `eventfd(2)`.
    pub fn new(interrupt: T, out: W) -> io::Result<Self> {
        let drained = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let events = Drained(drained.try_clone()?);
        Ok(SerialPort {
            uart: Mutex::new(Serial::with_events(interrupt, events, out)),
            drained,
        })
    }

    /// Hands input to the guest and returns how many bytes the FIFO took: 0 when it is full. While
    /// the guest has the port in loop-back mode its receiver is off the wire: bytes that come then
    /// are lost, and count as taken. Blocks only for an access that is under way.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart();
        if uart.fifo_capacity() == 0 {
            return 0;
        }
        // The only errors left are the trigger's, after the bytes are in: they count as taken.
        let room = uart.fifo_capacity().min(bytes.len());
        match uart.enqueue_raw_bytes(bytes) {
            Ok(0) => bytes.len(),
            Ok(taken) => taken,
            Err(error) => {
                log::error!("cannot interrupt the guest for console input: {error:?}");
                room
            }
        }
    }

    /// Readable when the guest has read the last byte of its input.
    pub fn drained(&self) -> &EventFd {
        &self.drained
    }

    fn uart(&self) -> MutexGuard<'_, Serial<T, Drained, W>> {
        // The registers are plain bytes: a panic elsewhere leaves them as valid as any guest could.
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Trigger, W: Write> DevicePio for SerialPort<T, W> {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        // The UART has byte registers: a wider access meets one register a byte, as on ISA.
        let mut uart = self.uart();
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |register| uart.read(register));
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut uart = self.uart();
        for (register, byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register)
                && let Err(error) = uart.write(register, *byte)
            {
                log::debug!("serial register {register}: {error:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Clone, Default)]
    struct Count(Arc<AtomicU32>);
    impl Trigger for Count {
        type E = io::Error;
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

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
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(port.drained().read().is_err(), "not drained yet");
        assert_eq!((read(&port, 0), read(&port, 0)), (b'h', b'i'));
        assert_eq!(port.drained().read().unwrap(), 1);
        assert_eq!(port.uart().writer(), b"A");
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
}
