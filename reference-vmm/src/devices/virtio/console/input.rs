// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes that the main thread has for a port: what is typed on the monitor's terminal.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::host::Source;

/// So many bytes are taken ahead of the guest.
pub const ROOM: usize = 16 << 10;

/// A bounded queue of bytes between the main thread and a device's. Clones are the same queue. Neither side waits for
/// the other: the lock is held to copy bytes, never while guest memory is touched.
#[derive(Clone, Debug)]
pub struct InputQueue(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    bytes: Mutex<Bytes>,
    /// Readable while there are bytes. Written and read under the lock.
    arrived: EventFd,
    /// Readable when there is room again for who was refused.
    drained: EventFd,
}

#[derive(Debug, Default)]
struct Bytes {
    queue: VecDeque<u8>,
    /// Somebody had more than there was room for.
    refused: bool,
}

impl InputQueue {
    /// An empty one.
    ///
    /// # Errors
    /// The errno of `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(InputQueue(Arc::new(Inner {
            bytes: Mutex::default(),
            arrived: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            drained: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })))
    }

    /// Adds bytes, as many as there is room for: how many. Where that are not all, [`drained`](Self::drained) says when
    /// to come again. Does not block.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        let taken = bytes.len().min(ROOM.saturating_sub(inner.queue.len()));
        inner.queue.extend(&bytes[..taken]);
        inner.refused = taken < bytes.len();
        if !inner.queue.is_empty() {
            // EAGAIN: it is readable as it is.
            let _ = self.0.arrived.write(1);
        }
        taken
    }

    /// Readable when there is room for who was refused.
    pub fn drained(&self) -> &EventFd {
        &self.0.drained
    }

    /// What is in it.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().queue.iter().copied().collect()
    }

    /// Puts bytes before all others, as many as there are: those that a state has.
    pub fn restore(&self, bytes: &[u8]) {
        let mut inner = self.lock();
        for byte in bytes.iter().rev() {
            inner.queue.push_front(*byte);
        }
        if !inner.queue.is_empty() {
            let _ = self.0.arrived.write(1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Bytes> {
        // Bytes are valid whatever happened to who held it.
        self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for InputQueue {
    fn fd(&self) -> RawFd {
        self.0.arrived.as_raw_fd()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut inner = self.lock();
        let read = buffer.len().min(inner.queue.len());
        for (place, byte) in buffer.iter_mut().zip(inner.queue.drain(..read)) {
            *place = byte;
        }
        if inner.queue.is_empty() {
            // EAGAIN: it was not readable.
            let _ = self.0.arrived.read();
        }
        if read == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if std::mem::take(&mut inner.refused) {
            // EAGAIN: it is readable as it is.
            let _ = self.0.drained.write(1);
        }
        Ok(read)
    }

    fn pending(&self) -> Vec<u8> {
        self.contents()
    }

    fn restore(&mut self, bytes: &[u8]) {
        InputQueue::restore(self, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in_and_who_was_refused_is_called(
            steps in proptest::collection::vec((any::<bool>(), 0..2 * ROOM), 1..40)
        ) {
            let queue = InputQueue::new().unwrap();
            let mut reader = queue.clone();
            let (mut next, mut got, mut refused) = (0u32, Vec::new(), false);
            for (offers, len) in steps {
                if offers {
                    let bytes: Vec<u8> = (next..).map(|n| (n % 251) as u8).take(len).collect();
                    let taken = queue.offer(&bytes);
                    next += taken as u32;
                    refused = taken < len;
                } else {
                    let mut buffer = vec![0; len.max(1)];
                    match reader.read(&mut buffer) {
                        Ok(read) => got.extend_from_slice(&buffer[..read]),
                        Err(error) => prop_assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                    }
                    if std::mem::take(&mut refused) {
                        prop_assert!(queue.drained().read().is_ok());
                    }
                }
                let held = queue.contents().len();
                prop_assert!(held <= ROOM);
                prop_assert_eq!(got.len() + held, next as usize);
                // Readable while there is something; reading it for the test takes that away.
                let readable = queue.0.arrived.read().is_ok();
                prop_assert_eq!(readable, held > 0);
                queue.restore(&[]);
            }
            let expected: Vec<u8> = (0..got.len()).map(|n| (n % 251) as u8).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
