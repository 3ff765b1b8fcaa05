// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a program on the host says first: `CONNECT <port>\n`, a line that Firecracker and cloud-hypervisor share. The
//! answer is `OK <host port>\n` once the guest has accepted; where it has not, the connection is closed.

/// The longest line, with its end. `CONNECT 4294967295\r\n` has 20 bytes.
pub const MAX_LINE: usize = 32;

/// A line that comes in pieces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line {
    bytes: [u8; MAX_LINE],
    len: usize,
}

/// What a byte has made of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The line goes on.
    More,
    /// It asks for this port of the guest's.
    Connect(u32),
    /// It is no such line, or too long for one.
    Garbage,
}

impl Line {
    /// Takes the next byte. What comes behind the line's end is the guest's: it is not for this.
    pub fn push(&mut self, byte: u8) -> Heard {
        if byte == b'\n' {
            let line = self.bytes.get(..self.len).unwrap_or_default();
            return port(line).map_or(Heard::Garbage, Heard::Connect);
        }
        match self.bytes.get_mut(self.len) {
            // The last place is for the end.
            Some(place) if self.len + 1 < MAX_LINE => {
                *place = byte;
                self.len += 1;
                Heard::More
            }
            _ => Heard::Garbage,
        }
    }
}

/// The port of a line without its end. As the others do, words are parted by any white space, and case does not matter.
fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    // `parse` would take a sign.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let asked = command.eq_ignore_ascii_case("connect") && digits && words.next().is_none();
    port.parse().ok().filter(|_| asked)
}

/// The answer: the host's end has this port.
pub fn answer(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn heard(bytes: &[u8]) -> (Heard, usize) {
        let mut line = Line::default();
        for (at, byte) in bytes.iter().enumerate() {
            match line.push(*byte) {
                Heard::More => {}
                end => return (end, at + 1),
            }
        }
        (Heard::More, bytes.len())
    }

    #[test]
    fn a_port_is_asked_for_by_a_line() {
        for (line, port) in [
            (&b"CONNECT 0\n"[..], 0),
            (b"CONNECT 4294967295\n", u32::MAX),
            (b"connect 52\r\n", 52),
            (b"Connect\t 00052 \n", 52),
        ] {
            assert_eq!(heard(line), (Heard::Connect(port), line.len()));
        }
        // What is behind the line stays where it is.
        assert_eq!(heard(b"CONNECT 5\n7\n"), (Heard::Connect(5), 10));
    }

    #[test]
    fn other_lines_are_garbage() {
        for line in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT +5\n",
            b"CONNECT -5\n",
            b"CONNECT 0x5\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 5 6\n",
            b"CONNECT5\n",
            b"GET / HTTP/1.1\n",
            b"\xff\xfe 5\n",
        ] {
            assert_eq!(heard(line).0, Heard::Garbage, "{line:?}");
        }
        assert_eq!(heard(&[b' '; 100]), (Heard::Garbage, MAX_LINE));
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end_within_the_longest_line(bytes: Vec<u8>) {
            let (end, used) = heard(&bytes);
            prop_assert!(used <= MAX_LINE);
            prop_assert!(end != Heard::More || !bytes.contains(&b'\n') && used == bytes.len());
        }
    }
}
