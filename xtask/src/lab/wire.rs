// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the host and the agent inside the lab say to each other, over one virtio-serial port: frames of a kind, a
//! length and bytes. One port keeps the order of things; the machine's console stays out of it.

use std::io::{self, Read, Write};

/// The port's name on both sides.
pub(crate) const PORT: &str = "lab";

/// No frame is longer: a length beyond it means that the two sides do not understand each other.
const LONGEST: usize = 16 << 20;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Agent: the machine is up.
    Ready,
    /// Host: what to run.
    Job(Job),
    /// Host: bytes for the command's stdin; none means its end.
    Stdin(Vec<u8>),
    /// Host: the terminal's size is now rows × columns.
    Window(u16, u16),
    /// Agent: bytes that the command wrote.
    Stdout(Vec<u8>),
    /// Agent: bytes that the command wrote to stderr.
    Stderr(Vec<u8>),
    /// Agent: the command's exit status. No output follows.
    Exit(i32),
    /// Agent, every second: the machine runs.
    Alive,
}

/// A command and what it runs with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) argv: Vec<Vec<u8>>,
    /// `NAME=value` each; the command sees these and no others.
    pub(crate) env: Vec<Vec<u8>>,
    pub(crate) cwd: Vec<u8>,
    /// Rows and columns, where the command is to have a terminal of its own.
    pub(crate) terminal: Option<(u16, u16)>,
}

impl Frame {
    pub(crate) fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, body): (u8, Vec<u8>) = match self {
            Frame::Ready => (0, Vec::new()),
            Frame::Job(job) => (1, job.encode()),
            Frame::Stdin(bytes) => (2, bytes.clone()),
            Frame::Window(rows, columns) => {
                (3, [rows.to_le_bytes(), columns.to_le_bytes()].concat())
            }
            Frame::Stdout(bytes) => (4, bytes.clone()),
            Frame::Stderr(bytes) => (5, bytes.clone()),
            Frame::Exit(status) => (6, status.to_le_bytes().to_vec()),
            Frame::Alive => (7, Vec::new()),
        };
        let mut frame = vec![kind];
        frame.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        frame.extend_from_slice(&body);
        to.write_all(&frame)
    }

    pub(crate) fn receive(from: &mut impl Read) -> io::Result<Frame> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > LONGEST {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a frame of {length} bytes"),
            ));
        }
        let mut body = vec![0; length];
        from.read_exact(&mut body)?;
        let malformed = || {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a malformed frame of kind {kind}"),
            )
        };
        Ok(match kind {
            0 => Frame::Ready,
            1 => Frame::Job(Job::decode(&body).ok_or_else(malformed)?),
            2 => Frame::Stdin(body),
            3 => match body[..] {
                [a, b, c, d] => {
                    Frame::Window(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
                }
                _ => return Err(malformed()),
            },
            4 => Frame::Stdout(body),
            5 => Frame::Stderr(body),
            6 => Frame::Exit(i32::from_le_bytes(
                body.try_into().map_err(|_| malformed())?,
            )),
            7 => Frame::Alive,
            _ => return Err(malformed()),
        })
    }
}

impl Job {
    /// Four lists of strings, each string after its length, each list after its count.
    fn encode(&self) -> Vec<u8> {
        let terminal: Vec<Vec<u8>> = self
            .terminal
            .iter()
            .map(|(r, c)| [r.to_le_bytes(), c.to_le_bytes()].concat())
            .collect();
        let mut out = Vec::new();
        let number = |out: &mut Vec<u8>, n: usize| {
            out.extend_from_slice(&u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes())
        };
        for list in [&self.argv, &self.env, &vec![self.cwd.clone()], &terminal] {
            number(&mut out, list.len());
            for item in list {
                number(&mut out, item.len());
                out.extend_from_slice(item);
            }
        }
        out
    }

    fn decode(mut body: &[u8]) -> Option<Job> {
        fn number(body: &mut &[u8]) -> Option<usize> {
            let (head, tail) = body.split_first_chunk::<4>()?;
            *body = tail;
            usize::try_from(u32::from_le_bytes(*head)).ok()
        }
        let mut list = || {
            let count = number(&mut body)?;
            let mut items = Vec::new();
            for _ in 0..count {
                let length = number(&mut body)?;
                let (item, tail) = body.split_at_checked(length)?;
                body = tail;
                items.push(item.to_vec());
            }
            Some(items)
        };
        let (argv, env, mut cwd, terminal) = (list()?, list()?, list()?, list()?);
        let terminal = match terminal.first().map(Vec::as_slice) {
            Some(&[a, b, c, d]) => Some((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))),
            _ => None,
        };
        Some(Job {
            argv,
            env,
            cwd: cwd.pop()?,
            terminal,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received() {
        let job = Job {
            argv: vec![b"sh".to_vec(), b"-c".to_vec(), b"a b\0\xff".to_vec()],
            env: vec![b"A=".to_vec()],
            cwd: b"/".to_vec(),
            terminal: Some((25, 80)),
        };
        let frames = [
            Frame::Ready,
            Frame::Job(job),
            Frame::Job(Job::default()),
            Frame::Stdin(vec![]),
            Frame::Window(1, 65535),
            Frame::Stdout(vec![0; 100_000]),
            Frame::Stderr(b"x".to_vec()),
            Frame::Alive,
            Frame::Exit(-1),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            assert!(frame.send(&mut bytes).is_ok());
        }
        let mut from = &bytes[..];
        for frame in &frames {
            assert_eq!(Frame::receive(&mut from).ok().as_ref(), Some(frame));
        }
        assert!(from.is_empty());
    }

    #[test]
    fn nonsense_is_an_error() {
        for bytes in [
            &[9, 0, 0, 0, 0][..],
            &[0, 255, 255, 255, 255],
            &[6, 1, 0, 0, 0, 0],
            &[1, 4, 0, 0, 0, 1, 0, 0, 0],
        ] {
            assert!(Frame::receive(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
