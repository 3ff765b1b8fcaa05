// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! HTTP/1.1 as bytes: requests out of what a client has sent, responses as bytes. No sockets.
//!
//! Heads are parsed by httparse, hyper's parser. What is made of them is here, and it is strict where two readings of the
//! same bytes are possible (RFC 9112, 6.3): lengths that differ, or a length that is no plain number, are refused, and
//! behind a refusal nothing more of the connection is read.

use crate::text::json_plain;

/// The longest head of a request, its request line and headers, bytes.
pub const MAX_HEAD: usize = 8 << 10;
/// The most headers of a request.
pub const MAX_HEADERS: usize = 32;
/// The longest body of a request, bytes: Firecracker's.
pub const MAX_BODY: usize = 51_200;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, or whatever it is.
    pub method: String,
    /// Its path, as it was sent, without a scheme and a host.
    pub path: String,
    /// Its body.
    pub body: Vec<u8>,
    /// The client goes on with this connection.
    pub keep_alive: bool,
    /// It wants to hear what there is to say of what was done (`Prefer: return=representation`, RFC 7240).
    pub wants_all: bool,
}

/// What comes of the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A request, whole.
    Request(Request),
    /// The client waits for [`CONTINUE`] before it sends the body.
    Continue,
    /// No request: this is the answer, and the connection ends behind it.
    Refused(Response),
}

/// What a client waits for that has said `Expect: 100-continue`, as curl does.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Takes one connection's bytes and gives its requests.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// A head whose body has not come yet.
    head: Option<Head>,
    refused: bool,
}

#[derive(Debug)]
struct Head {
    method: String,
    path: String,
    length: usize,
    keep_alive: bool,
    wants_all: bool,
    /// The client waits, and has not been told to go on.
    waits: bool,
}

impl Decoder {
    /// Takes bytes. Who feeds and takes [`next`](Self::next) until there is none keeps at most one request.
    pub fn feed(&mut self, bytes: &[u8]) {
        if !self.refused {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// How many bytes are kept.
    pub fn kept(&self) -> usize {
        self.buffer.len()
    }

    /// What comes next, if it is there.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Incoming> {
        match self.step() {
            Ok(incoming) => incoming,
            Err(response) => {
                self.refused = true;
                self.buffer = Vec::new();
                self.head = None;
                Some(Incoming::Refused(response))
            }
        }
    }

    fn step(&mut self) -> Result<Option<Incoming>, Response> {
        if self.refused {
            return Ok(None);
        }
        let mut head = match self.head.take() {
            Some(head) => head,
            None => match head(&self.buffer)? {
                Some((length, head)) => {
                    self.buffer.drain(..length);
                    head
                }
                None => return Ok(None),
            },
        };
        if self.buffer.len() < head.length {
            // One that has begun to send waits no more.
            let waits = std::mem::take(&mut head.waits) && self.buffer.is_empty();
            self.head = Some(head);
            return Ok(waits.then_some(Incoming::Continue));
        }
        let Head {
            method,
            path,
            length,
            keep_alive,
            wants_all,
            ..
        } = head;
        Ok(Some(Incoming::Request(Request {
            method,
            path,
            body: self.buffer.drain(..length).collect(),
            keep_alive,
            wants_all,
        })))
    }
}

/// The head at the start of `bytes`, and how long it is; none while it is not whole.
fn head(bytes: &[u8]) -> Result<Option<(usize, Head)>, Response> {
    let too_long = || {
        let text = format!("The head of a request has at most {MAX_HEAD} bytes.");
        Response::fault(Status::HeadTooLarge, text)
    };
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    // What is behind is not looked at, so that it does not matter how much of it has come.
    let at_most = bytes.get(..MAX_HEAD).unwrap_or(bytes);
    let length = match request.parse(at_most) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_HEAD => return Err(too_long()),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            let text = format!("A request has at most {MAX_HEADERS} headers.");
            return Err(Response::fault(Status::HeadTooLarge, text));
        }
        Err(error) => return Err(bad(format!("This is no HTTP/1.1 request: {error}."))),
    };
    // All of them are there in a head that is whole.
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(bad("This is no HTTP/1.1 request.".into()));
    };
    let mut head = Head {
        method: method.to_owned(),
        path: path(target)?.to_owned(),
        length: 0,
        keep_alive: version == 1,
        wants_all: false,
        waits: false,
    };
    let mut length_said = None;
    for header in request.headers.iter() {
        let name = header.name;
        if name.eq_ignore_ascii_case("content-length") {
            let said = content_length(header.value)?;
            if length_said.is_some_and(|before| before != said) {
                return Err(bad("It has two Content-Lengths, which differ.".into()));
            }
            length_said = Some(said);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            let text = "A body comes with a Content-Length here, and in no Transfer-Encoding.";
            return Err(Response::fault(Status::NotImplemented, text.into()));
        } else if name.eq_ignore_ascii_case("expect") {
            if !header.value.eq_ignore_ascii_case(b"100-continue") {
                let text = "Nothing but 100-continue can be expected here.";
                return Err(Response::fault(Status::ExpectationFailed, text.into()));
            }
            // A client of HTTP/1.0 would take the interim answer for the answer.
            head.waits = version == 1;
        } else if name.eq_ignore_ascii_case("prefer") {
            let mut words = header.value.split(|byte| matches!(byte, b',' | b';'));
            let all = b"return=representation";
            head.wants_all |= words.any(|word| word.trim_ascii().eq_ignore_ascii_case(all));
        } else if name.eq_ignore_ascii_case("connection") {
            for word in header.value.split(|byte| *byte == b',') {
                let word = word.trim_ascii();
                if word.eq_ignore_ascii_case(b"close") {
                    head.keep_alive = false;
                } else if word.eq_ignore_ascii_case(b"keep-alive") && version == 0 {
                    head.keep_alive = true;
                }
            }
        }
    }
    head.length = length_said.unwrap_or(0);
    Ok(Some((length, head)))
}

fn bad(text: String) -> Response {
    Response::fault(Status::BadRequest, text)
}

/// A target's path: of `/vm` and of `http://localhost/vm`.
fn path(target: &str) -> Result<&str, Response> {
    if target.starts_with('/') {
        return Ok(target);
    }
    match target.split_once("://") {
        Some(("http", rest)) => Ok(rest.find('/').map_or("/", |at| &rest[at..])),
        _ => Err(bad("A request is for a path, which begins with /.".into())),
    }
}

fn content_length(value: &[u8]) -> Result<usize, Response> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).unwrap_or_default();
    match text.parse() {
        _ if !digits => Err(bad("Its Content-Length is no number.".into())),
        Ok(length) if length <= MAX_BODY => Ok(length),
        // Or it does not fit.
        _ => {
            let text = format!("The body of a request has at most {MAX_BODY} bytes.");
            Err(Response::fault(Status::BodyTooLarge, text))
        }
    }
}

/// How a request went (RFC 9110, 15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// 200: here it is.
    Ok,
    /// 204: it is done.
    NoContent,
    /// 400: it cannot be done, now or ever; the fault says why.
    BadRequest,
    /// 404: there is no such path.
    NotFound,
    /// 405: the path has no such method.
    MethodNotAllowed,
    /// 413.
    BodyTooLarge,
    /// 417.
    ExpectationFailed,
    /// 431.
    HeadTooLarge,
    /// 500: the monitor's own failure.
    Internal,
    /// 501.
    NotImplemented,
}

impl Status {
    /// Its number.
    pub fn code(self) -> u16 {
        self.line().0
    }

    fn line(self) -> (u16, &'static str) {
        match self {
            Status::Ok => (200, "OK"),
            Status::NoContent => (204, "No Content"),
            Status::BadRequest => (400, "Bad Request"),
            Status::NotFound => (404, "Not Found"),
            Status::MethodNotAllowed => (405, "Method Not Allowed"),
            Status::BodyTooLarge => (413, "Content Too Large"),
            Status::ExpectationFailed => (417, "Expectation Failed"),
            Status::HeadTooLarge => (431, "Request Header Fields Too Large"),
            Status::Internal => (500, "Internal Server Error"),
            Status::NotImplemented => (501, "Not Implemented"),
        }
    }
}

/// A response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// How it went.
    pub status: Status,
    /// The methods that there are instead.
    pub allow: Option<&'static str>,
    /// JSON, if there is something to say.
    pub body: Option<String>,
}

impl Response {
    /// It is done, and there is nothing to say.
    pub fn done() -> Self {
        Response {
            status: Status::NoContent,
            allow: None,
            body: None,
        }
    }

    /// This JSON.
    pub fn json(body: String) -> Self {
        Response {
            status: Status::Ok,
            allow: None,
            body: Some(body),
        }
    }

    /// It was not done, as Firecracker says it: `{"fault_message": …}`.
    pub fn fault(status: Status, message: String) -> Self {
        Response {
            status,
            allow: None,
            body: Some(serde_json::json!({ "fault_message": message }).to_string()),
        }
    }

    /// Its bytes. `keep_alive` is what the client is told of the connection.
    pub fn encode(&self, keep_alive: bool, out: &mut Vec<u8>) {
        let (code, reason) = self.status.line();
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {code} {reason}\r\nServer: reference-vmm\r\nConnection: {connection}\r\n"
        );
        if let Some(allow) = self.allow {
            head += &format!("Allow: {allow}\r\n");
        }
        // Whoever shows it to a terminal as it came shows no character that moves others.
        let body = json_plain(self.body.as_deref().unwrap_or_default());
        // A 204 has neither (RFC 9110, 8.6).
        if self.status != Status::NoContent {
            let length = body.len();
            head += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(body.as_bytes());
    }
}
