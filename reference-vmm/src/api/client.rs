// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client of the control socket: one request, one answer.
//!
//! Who listens there may be anybody. Whatever is sent, in whatever pieces, the wait for an answer ends when its time is
//! over, and what is kept of one is bounded: each head by [`MAX_HEAD`], interim answers by [`MAX_INTERIM`], the body by
//! [`MAX_ANSWER`].

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::http::{MAX_HEAD, MAX_HEADERS};
use crate::unix_socket;

/// The longest body of an answer that is read, bytes. The longest that a monitor has is `GET /stats` of 255 vCPUs, with all
/// that KVM counts of each: 3 MiB where no bucket of a histogram is empty. `GET /migrate` of the longest migration is a
/// sixth of that. Parsed, the worst takes a hundred times as much.
pub const MAX_ANSWER: usize = 4 << 20;
/// The most interim answers (HTTP's 1xx) before an answer. A monitor says one at most.
pub const MAX_INTERIM: usize = 16;

/// A connection to a monitor's control socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    /// For a request and its answer.
    timeout: Duration,
}

/// What the monitor answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// HTTP's number: 2xx, or the request was refused.
    pub status: u16,
    /// Its JSON, if it said anything.
    pub body: Option<Value>,
}

impl Answer {
    /// Why it was refused; none where it was not.
    pub fn fault(&self) -> Option<String> {
        if (200..300).contains(&self.status) {
            return None;
        }
        let said = self
            .body
            .as_ref()
            .and_then(|body| body.get("fault_message"));
        let said = said.and_then(Value::as_str).map(str::to_owned);
        Some(said.unwrap_or_else(|| format!("HTTP status {}", self.status)))
    }
}

/// There is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens there, or who does takes nobody.
    #[error("{}: no monitor answers there: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The monitor has ended meanwhile, or takes longer than the client waits.
    #[error("{}: the monitor gives no answer: {source}", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// What came is no answer.
    #[error("{}: this is no monitor's answer: {why}", path.display())]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl Client {
    /// Connects to the socket at `path`: its turn is waited for up to `timeout`, and so is each answer, until all of it is
    /// there.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        // std takes no 0, which would be no limit.
        let at_least = timeout.max(Duration::from_millis(1));
        let path = path.to_owned();
        match unix_socket::connect_within(&path, at_least) {
            Ok(stream) => Ok(Client {
                stream,
                path,
                timeout,
            }),
            Err(source) => Err(ClientError::Connect { path, source }),
        }
    }

    /// Waits so long for each answer from now on.
    pub fn wait_for(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Makes a request, and waits for its answer.
    ///
    /// # Errors
    /// [`ClientError`]; the connection has ended then, for what came next might be this request's answer. A request that is
    /// refused is an [`Answer`].
    pub fn call(
        &mut self,
        method: &str,
        target: &str,
        body: Option<&Value>,
    ) -> Result<Answer, ClientError> {
        let mut request = format!(
            "{method} {target} HTTP/1.1\r\nHost: localhost\r\nPrefer: return=representation\r\n"
        );
        let body = body.map(Value::to_string).unwrap_or_default();
        if !body.is_empty() {
            let length = body.len();
            request += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        request += "\r\n";
        request += &body;
        let until = Deadline::after(self.timeout);
        let sent = self.send(request.as_bytes(), &until);
        let answer = sent.and_then(|()| self.read_answer(&until));
        answer.map_err(|source| {
            // Where that is refused it has ended already.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            let path = self.path.clone();
            match source.kind() {
                io::ErrorKind::InvalidData => ClientError::Strange {
                    path,
                    why: source.to_string(),
                },
                io::ErrorKind::WouldBlock => ClientError::Gone {
                    path,
                    source: io::ErrorKind::TimedOut.into(),
                },
                _ => ClientError::Gone { path, source },
            }
        })
    }

    fn send(&mut self, bytes: &[u8], until: &Deadline) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            self.stream.set_write_timeout(until.left()?)?;
            match self.stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => rest = rest.get(len..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_answer(&mut self, until: &Deadline) -> io::Result<Answer> {
        let mut bytes = Vec::new();
        let mut interim = 0;
        let head = loop {
            match head(&bytes)? {
                None => self.read_more(&mut bytes, until)?,
                Some(head) if (100..200).contains(&head.status) => {
                    interim += 1;
                    if interim > MAX_INTERIM {
                        return Err(strange(format!(
                            "{interim} interim answers came, the last with HTTP status {}, and {MAX_INTERIM} are the most",
                            head.status
                        )));
                    }
                    drop(bytes.drain(..head.len));
                }
                Some(head) => break head,
            }
        };
        drop(bytes.drain(..head.len));
        while bytes.len() < head.body {
            self.read_more(&mut bytes, until)?;
        }
        let body = match bytes.get(..head.body).unwrap_or_default() {
            [] => None,
            body => Some(serde_json::from_slice(body).map_err(|error| strange(error.to_string()))?),
        };
        let status = head.status;
        Ok(Answer { status, body })
    }

    /// Reads what is there, or comes before the time is over.
    fn read_more(&mut self, bytes: &mut Vec<u8>, until: &Deadline) -> io::Result<()> {
        let mut chunk = [0; 4096];
        loop {
            self.stream.set_read_timeout(until.left()?)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    bytes.extend_from_slice(chunk.get(..len).unwrap_or_default());
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// When the time of a call is over; never, where no clock goes so far.
struct Deadline(Option<Instant>);

impl Deadline {
    fn after(timeout: Duration) -> Self {
        Deadline(Instant::now().checked_add(timeout))
    }

    /// What is left, as a socket's limit, which cannot be 0.
    fn left(&self) -> io::Result<Option<Duration>> {
        let Some(at) = self.0 else {
            return Ok(None);
        };
        match at.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

fn strange(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// The head of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    /// Its own bytes.
    len: usize,
    /// The body's.
    body: usize,
}

/// The head at the start of `bytes`; none while it is not whole. It is parsed anew whenever more of it has come, which is
/// cheap, for it is short or refused.
fn head(bytes: &[u8]) -> io::Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let at_most = bytes.get(..MAX_HEAD).unwrap_or(bytes);
    let len = match response.parse(at_most) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_HEAD => {
            let text = format!("its head has more than {MAX_HEAD} bytes, which are the most");
            return Err(strange(text));
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            let text = format!("its head has more than {MAX_HEADERS} headers, which are the most");
            return Err(strange(text));
        }
        Err(error) => return Err(strange(error.to_string())),
    };
    let status = response.code.unwrap_or_default();
    let mut body = None;
    for header in response.headers.iter() {
        let value = String::from_utf8_lossy(header.value);
        if header.name.eq_ignore_ascii_case("content-length") {
            let length = content_length(&value)?;
            if body.is_some_and(|before| before != length) {
                return Err(strange("it has two Content-Lengths, which differ"));
            }
            body = Some(length);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            let text = format!("it has a Transfer-Encoding ({value}) and no Content-Length");
            return Err(strange(text));
        }
    }
    Ok(Some(Head {
        status,
        len,
        // These never have one (RFC 9112, 6.3).
        body: match status {
            100..200 | 204 | 304 => 0,
            _ => body.unwrap_or(0),
        },
    }))
}

fn content_length(value: &str) -> io::Result<usize> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    if !digits {
        return Err(strange(format!(
            "its Content-Length is {value:?}, which is no number"
        )));
    }
    // One that no usize takes is too much as well.
    let length = value.parse().ok();
    length
        .filter(|length| *length <= MAX_ANSWER)
        .ok_or_else(|| {
            strange(format!(
                "its Content-Length is {value}, and {MAX_ANSWER} bytes are the most"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::postcopy::When;
    use crate::migration::source::WhenStuck;

    #[test]
    fn a_head_is_known_when_it_is_whole_and_says_how_long_the_body_is() {
        let said =
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}";
        let len = said.len() - 22;
        for at in 0..len {
            assert_eq!(head(&said[..at]).unwrap(), None, "{at}");
        }
        for at in len..=said.len() {
            let (status, body) = (400, 22);
            let whole = Head { status, len, body };
            assert_eq!(head(&said[..at]).unwrap(), Some(whole), "{at}");
        }
        let done = head(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n");
        assert_eq!(done.unwrap().unwrap().body, 0);
        for (wrong, needle) in [
            ("hello\r\n\r\n", "HTTP version"),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
                "\"-1\", which is no number",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
                "\"+1\", which is no number",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 4194305\r\n\r\n",
                "is 4194305, and 4194304 bytes",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
                "is 99999999999999999999999, and",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                "differ",
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                "(chunked)",
            ),
        ] {
            let error = head(wrong.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(needle), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_refusal_says_why() {
        let answer = |status, body| Answer { status, body }.fault();
        let why = serde_json::json!({ "fault_message": "no" });
        assert_eq!(answer(400, Some(why)).unwrap(), "no");
        assert_eq!(answer(503, None).unwrap(), "HTTP status 503");
        assert_eq!(answer(204, None), None);
    }

    #[test]
    fn the_longest_that_a_monitor_has_to_say_is_read() {
        use crate::config::MAX_CPUS;
        use crate::kvm_stats::{KvmBucket, KvmStat, KvmStats};
        use crate::migration::record::{MOST_ROUNDS, MigrationRecord, Settings};
        use crate::stats::{Exits, Stats};
        // As many as KVM has, and its longest names; each with the longest number.
        let most = u64::MAX;
        let scalar = KvmStat {
            name: "guest_debug_exception_exits".into(),
            unit: "seconds".into(),
            value: Some(most),
            buckets: Vec::new(),
        };
        let bucket = KvmBucket {
            from: most,
            below: Some(most),
            count: most,
        };
        let histogram = KvmStat {
            buckets: vec![bucket; 32],
            ..scalar.clone()
        };
        let vcpu = [vec![scalar; 50], vec![histogram; 3]].concat();
        let kvm = KvmStats {
            vm: vcpu.clone(),
            vcpus: vec![vcpu; MAX_CPUS as usize],
        };
        let exits = Exits {
            pio_in: most,
            pio_out: most,
            mmio_read: most,
            mmio_write: most,
            hlt: most,
            other: most,
        };
        let stats = Stats {
            exits: vec![exits; MAX_CPUS as usize],
            kvm: Some(kvm),
            ..Stats::default()
        };
        let len = stats.json().len();
        assert!(len < MAX_ANSWER, "{len}");

        let settings = Settings {
            limit_bytes_per_s: Some(most),
            downtime: Duration::from_secs(most),
            connections: u32::MAX,
            compression: "zstd".into(),
            tls: true,
            when_stuck: WhenStuck::default(),
            postcopy: When::default(),
        };
        let mut record = MigrationRecord::new(
            "unix:/s".into(),
            most,
            settings,
            std::time::SystemTime::now(),
        );
        for round in 0..2 * MOST_ROUNDS as u64 {
            let at = |of: u64| Duration::from_secs(4 * 24 * 3600 * round + of);
            record.round_begins(at(0), most, false);
            record.sent(at(1000), most, most, most);
            record.round_ends(at(2000), most);
        }
        let len = serde_json::to_string(&record).unwrap().len();
        assert!(len < MAX_ANSWER / 6, "{len}");
    }
}
