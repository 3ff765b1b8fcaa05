// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client of the control socket: one request, one answer.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::unix_socket;

/// The longest answer that is read, bytes.
const MOST: usize = 16 << 20;
const MAX_HEADERS: usize = 64;

/// A connection to a monitor's control socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
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
    /// Connects to the socket at `path`: its turn is waited for up to `timeout`, and so is an answer.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let connect = || {
            // std takes no 0, which would be no limit.
            let timeout = timeout.max(Duration::from_millis(1));
            let stream = unix_socket::connect_within(path, timeout)?;
            stream.set_read_timeout(Some(timeout))?;
            Ok(stream)
        };
        let path = path.to_owned();
        match connect() {
            Ok(stream) => Ok(Client { stream, path }),
            Err(source) => Err(ClientError::Connect { path, source }),
        }
    }

    /// Waits so long for answers from now on.
    pub fn wait_for(&mut self, timeout: Duration) {
        // Of a socket that is connected it is refused only for 0.
        let _ = self.stream.set_read_timeout(Some(timeout));
    }

    /// Makes a request, and waits for its answer.
    ///
    /// # Errors
    /// [`ClientError`]. A request that is refused is an [`Answer`].
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
        let sent = self.stream.write_all(request.as_bytes());
        let answer = sent.and_then(|()| self.read_answer());
        answer.map_err(|source| match source.kind() {
            io::ErrorKind::InvalidData => ClientError::Strange {
                path: self.path.clone(),
                why: source.to_string(),
            },
            io::ErrorKind::WouldBlock => ClientError::Gone {
                path: self.path.clone(),
                source: io::ErrorKind::TimedOut.into(),
            },
            _ => ClientError::Gone {
                path: self.path.clone(),
                source,
            },
        })
    }

    fn read_answer(&mut self) -> io::Result<Answer> {
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            if let Some(answer) = answer(&bytes)? {
                return Ok(answer);
            }
            if bytes.len() > MOST {
                return Err(strange("it does not end"));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => bytes.extend_from_slice(chunk.get(..len).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn strange(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// The answer at the start of `bytes`; none while it is not whole.
fn answer(bytes: &[u8]) -> io::Result<Option<Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(strange(error.to_string())),
    };
    let rest = bytes.get(head..).unwrap_or_default();
    let status = response.code.unwrap_or_default();
    // An interim one.
    if (100..200).contains(&status) {
        return answer(rest);
    }
    let mut length = 0;
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let text = std::str::from_utf8(header.value).ok();
            let number = text.and_then(|text| text.parse().ok());
            length = number.ok_or_else(|| strange("its Content-Length is no number"))?;
        }
    }
    if length > MOST {
        return Err(strange(format!("{length} bytes are too many")));
    }
    let Some(body) = rest.get(..length) else {
        return Ok(None);
    };
    let body = match body {
        [] => None,
        body => Some(serde_json::from_slice(body).map_err(|error| strange(error.to_string()))?),
    };
    Ok(Some(Answer { status, body }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_known_when_it_is_whole() {
        let said =
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 Bad Request\r\nContent-Length: 22\r\n\r\n\
                     {\"fault_message\":\"no\"}";
        for len in 0..said.len() {
            assert_eq!(answer(&said[..len]).unwrap(), None, "{len}");
        }
        let whole = answer(said).unwrap().unwrap();
        assert_eq!((whole.status, whole.fault()), (400, Some("no".into())));
        let done = answer(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().unwrap();
        assert_eq!((done.fault(), done.body), (None, None));
        for wrong in [
            "hello\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{",
        ] {
            answer(wrong.as_bytes()).unwrap_err();
        }
    }
}
