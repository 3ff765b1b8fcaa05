// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The least that a debugger says: a client of gdb's remote protocol, which waits for each answer and
//! fails its test where none comes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::WATCHDOG;

/// Numbers of registers in the target description.
pub const RAX: usize = 0;
pub const RIP: usize = 16;
pub const CS: usize = 18;
pub const XMM0: usize = 40;
pub const CR3: usize = 62;
pub const CR4: usize = 63;

pub trait Socket: Read + Write + Send {}
impl<S: Read + Write + Send> Socket for S {}

/// A debugger that is connected.
pub struct Gdb {
    socket: Box<dyn Socket>,
    received: Vec<u8>,
    /// What was sent last.
    last: String,
}

impl Gdb {
    pub fn unix(path: impl AsRef<Path>) -> Self {
        let socket = UnixStream::connect(path).expect("somebody listens");
        socket.set_read_timeout(Some(WATCHDOG)).unwrap();
        socket.set_write_timeout(Some(WATCHDOG)).unwrap();
        Gdb::over(socket)
    }

    pub fn tcp(address: &str) -> Self {
        let socket = TcpStream::connect(address).expect("somebody listens");
        socket.set_read_timeout(Some(WATCHDOG)).unwrap();
        Gdb::over(socket)
    }

    fn over(socket: impl Socket + 'static) -> Self {
        Gdb {
            socket: Box::new(socket),
            received: Vec::new(),
            last: String::new(),
        }
    }

    /// Bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the peer takes bytes");
    }

    /// Bytes as they are, as many as the peer takes.
    pub fn try_raw(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// A packet, not waited for.
    pub fn send(&mut self, body: &str) {
        self.raw(&packet(body.as_bytes()));
        body.clone_into(&mut self.last);
    }

    /// A packet, and its answer.
    pub fn ask(&mut self, body: &str) -> String {
        self.send(body);
        self.answer()
    }

    /// The next packet that comes, acknowledged.
    pub fn answer(&mut self) -> String {
        loop {
            if let Some(start) = self.received.iter().position(|b| *b == b'$')
                && let Some(end) = self.received.iter().position(|b| *b == b'#')
                && self.received.len() >= end + 3
            {
                let body = expand(&self.received[start + 1..end]);
                self.received.drain(..end + 3);
                // At the guest's end nobody waits for it.
                self.try_raw(b"+");
                return body;
            }
            let mut chunk = [0; 4096];
            let len = self
                .socket
                .read(&mut chunk)
                .unwrap_or_else(|error| panic!("no answer: {error}; before: {:?}", self.last));
            assert!(len > 0, "the peer has closed; before: {:?}", self.received);
            self.received.extend(&chunk[..len]);
        }
    }

    /// Whether the peer has closed; waits until it has or says something.
    pub fn closed(&mut self) -> bool {
        let mut chunk = [0; 4096];
        loop {
            match self.socket.read(&mut chunk) {
                Ok(0) => return true,
                // What it said before.
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }

    pub fn register(&mut self, number: usize) -> u64 {
        let answer = self.ask(&format!("p{number:x}"));
        let mut bytes = unhex(&answer);
        bytes.resize(8, 0);
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    pub fn set_register(&mut self, number: usize, value: u64) -> String {
        self.ask(&format!("P{number:x}={}", hex(&value.to_le_bytes())))
    }

    pub fn memory(&mut self, address: u64, len: usize) -> String {
        self.ask(&format!("m{address:x},{len:x}"))
    }

    pub fn set_memory(&mut self, address: u64, bytes: &[u8]) -> String {
        let len = bytes.len();
        self.ask(&format!("M{address:x},{len:x}:{}", hex(bytes)))
    }

    /// Every packet of a real debugger's begins so; the answer to `?`.
    pub fn hello(&mut self) -> String {
        let features = self.ask("qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+");
        for feature in [
            "PacketSize=",
            "swbreak+",
            "hwbreak+",
            "qXfer:features:read+",
        ] {
            assert!(features.contains(feature), "no {feature} in {features}");
        }
        self.ask("?")
    }

    /// Continues, and waits for the guest to stop.
    pub fn go(&mut self) -> String {
        self.ask("vCont;c")
    }

    /// One instruction of a vCPU's, the others standing still.
    pub fn step(&mut self, thread: u32) -> String {
        self.ask(&format!("vCont;s:p1.{thread:x}"))
    }
}

/// A packet around a body.
pub fn packet(body: &[u8]) -> Vec<u8> {
    let sum = body.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    [b"$", body, format!("#{sum:02x}").as_bytes()].concat()
}

/// Undoes run-length encoding.
fn expand(body: &[u8]) -> String {
    let mut text = String::new();
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'*' => {
                let count = usize::from(bytes.next().expect("a count") - 29);
                let last = text.chars().last().expect("something to repeat");
                text.extend(std::iter::repeat_n(last, count));
            }
            byte => text.push(char::from(*byte)),
        }
    }
    text
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(
        text.len().is_multiple_of(2) && !text.starts_with('E'),
        "an error for an answer: {text}"
    );
    let pairs = (0..text.len()).step_by(2);
    pairs
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal"))
        .collect()
}
