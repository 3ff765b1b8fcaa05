// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket and its clients, friendly and hostile, over real sockets and without a guest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use reference_vmm::api::client::ClientError;
use reference_vmm::api::http::{MAX_BODY, MAX_HEAD};
use reference_vmm::api::router::{Action, Outcome};
use reference_vmm::api::server::MAX_CONNECTIONS;
use reference_vmm::api::worker::MAX_WAITING;
use reference_vmm::api::{Client, Monitor, Server};

const PATIENCE: Duration = Duration::from_secs(60);

/// Counts what it is asked, and says much.
#[derive(Default)]
struct Fake {
    asked: AtomicUsize,
    /// The pauses and resumes, in order.
    order: Mutex<Vec<Action>>,
    /// Where each of them waits for the test.
    gate: Option<Gate>,
}

struct Gate {
    begun: Mutex<Sender<Action>>,
    go: Mutex<Receiver<()>>,
}

impl Monitor for Fake {
    fn perform(&self, action: Action) -> Outcome {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match action {
            Action::Pause | Action::Resume => {
                if let Some(gate) = &self.gate {
                    gate.begun.lock().unwrap().send(action.clone()).unwrap();
                    gate.go.lock().unwrap().recv().unwrap();
                }
                self.order.lock().unwrap().push(action);
                Outcome::Done
            }
            Action::PowerButton => Outcome::Refused("nobody listens".into()),
            _ => Outcome::Json(format!("\"{}\"", "x".repeat(1000))),
        }
    }
}

struct Served {
    path: PathBuf,
    fake: Arc<Fake>,
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Served {
    fn start() -> Self {
        Served::with(Fake::default())
    }

    /// One whose pauses and resumes wait: the actions as they begin, and what lets one go on.
    fn gated() -> (Self, Receiver<Action>, Sender<()>) {
        let ((begun, begins), (go, goes)) = (channel(), channel());
        let gate = Gate {
            begun: Mutex::new(begun),
            go: Mutex::new(goes),
        };
        let fake = Fake {
            gate: Some(gate),
            ..Fake::default()
        };
        (Served::with(fake), begins, go)
    }

    fn with(fake: Fake) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let server = Arc::new(Server::bind(&path).unwrap());
        let fake = Arc::new(fake);
        let (serving, monitor) = (server.clone(), fake.clone());
        let thread = std::thread::spawn(move || serving.serve(&*monitor).unwrap());
        Served {
            path,
            fake,
            server,
            thread: Some(thread),
            _folder: folder,
        }
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn client(&self) -> Client {
        Client::connect(&self.path, PATIENCE).unwrap()
    }

    /// A newcomer is answered.
    fn answers(&self) {
        let answer = self.client().call("GET", "/", None).unwrap();
        assert_eq!(answer.status, 200);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.stop();
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking());
        }
    }
}

const GET: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

/// All that comes until the server closes. A reset is an end too.
fn to_the_end(stream: &mut UnixStream) -> String {
    let mut said = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => said.extend_from_slice(&chunk[..len]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}"),
        }
    }
    String::from_utf8(said).unwrap()
}

#[test]
fn a_client_asks_many_things_over_one_connection() {
    let served = Served::start();
    let mut client = served.client();
    for _ in 0..100 {
        let paused = serde_json::json!({ "state": "Paused" });
        let answer = client.call("PATCH", "/vm", Some(&paused)).unwrap();
        assert_eq!(
            (answer.status, answer.fault(), answer.body),
            (204, None, None)
        );
        let answer = client.call("GET", "/version", None).unwrap();
        assert_eq!(answer.body.unwrap().as_str().unwrap().len(), 1000);
        let press = serde_json::json!({ "action_type": "SendCtrlAltDel" });
        let answer = client.call("PUT", "/actions", Some(&press)).unwrap();
        assert_eq!(
            (answer.status, answer.fault().unwrap()),
            (400, "nobody listens".into())
        );
    }
    assert_eq!(served.fake.asked.load(Ordering::SeqCst), 300);
}

/// A request for a pause or a resume.
fn patch(state: &str) -> String {
    let body = format!("{{\"state\": \"{state}\"}}");
    let length = body.len();
    format!("PATCH /vm HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}")
}

/// The next answer's status, of one that has no body.
fn status(stream: &mut UnixStream) -> String {
    let mut said = Vec::new();
    while !said.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    String::from_utf8(said[9..12].to_vec()).unwrap()
}

#[test]
fn while_an_action_is_at_work_others_are_answered_and_the_next_waits_its_turn() {
    let (served, begins, go) = Served::gated();
    let (mut first, mut second) = (served.raw(), served.raw());
    first.write_all(patch("Paused").as_bytes()).unwrap();
    assert_eq!(begins.recv().unwrap(), Action::Pause);
    // Its own next request waits for it, as does another client's.
    first.write_all(patch("Paused").as_bytes()).unwrap();
    second.write_all(patch("Resumed").as_bytes()).unwrap();
    let press = serde_json::json!({ "action_type": "SendCtrlAltDel" });
    for _ in 0..3 * MAX_CONNECTIONS {
        served.answers();
        let answer = served.client().call("PUT", "/actions", Some(&press));
        assert_eq!(answer.unwrap().fault().unwrap(), "nobody listens");
    }
    assert!(begins.try_recv().is_err());
    go.send(()).unwrap();
    assert_eq!(status(&mut first), "204");
    assert_eq!(begins.recv().unwrap(), Action::Resume);
    go.send(()).unwrap();
    assert_eq!(status(&mut second), "204");
    assert_eq!(begins.recv().unwrap(), Action::Pause);
    go.send(()).unwrap();
    assert_eq!(status(&mut first), "204");
    let order = served.fake.order.lock().unwrap();
    assert_eq!(*order, [Action::Pause, Action::Resume, Action::Pause]);
}

#[test]
fn a_client_that_goes_loses_the_answer_of_what_has_begun_and_what_has_not_is_not() {
    let (served, begins, go) = Served::gated();
    let (mut first, mut second) = (served.raw(), served.raw());
    first.write_all(patch("Paused").as_bytes()).unwrap();
    assert_eq!(begins.recv().unwrap(), Action::Pause);
    // The answer to the first of both says that the server has come to it.
    let both = [GET, patch("Resumed").as_bytes()].concat();
    second.write_all(&both).unwrap();
    second.read_exact(&mut [0; 15]).unwrap();
    drop((first, second));
    // Whoever comes now comes behind that.
    served.answers();
    let mut third = served.raw();
    third.write_all(patch("Paused").as_bytes()).unwrap();
    third.shutdown(std::net::Shutdown::Write).unwrap();
    go.send(()).unwrap();
    assert_eq!(begins.recv().unwrap(), Action::Pause);
    served.answers();
    go.send(()).unwrap();
    // One that only sends no more has not gone.
    assert!(to_the_end(&mut third).starts_with("HTTP/1.1 204"));
    let order = served.fake.order.lock().unwrap();
    assert_eq!(*order, [Action::Pause, Action::Pause]);
}

#[test]
fn a_few_wait_for_what_is_at_work_and_one_more_is_refused_at_once() {
    let (served, begins, go) = Served::gated();
    let mut all = Vec::new();
    for _ in 0..=MAX_WAITING {
        let mut stream = served.raw();
        let both = [GET, patch("Paused").as_bytes()].concat();
        stream.write_all(&both).unwrap();
        let mut said = [0; 15];
        stream.read_exact(&mut said).unwrap();
        all.push(stream);
    }
    let pause = serde_json::json!({ "state": "Paused" });
    let refused = served.client().call("PATCH", "/vm", Some(&pause)).unwrap();
    let why = refused.fault().unwrap();
    assert!(
        why.contains("ask again") && refused.status == 400,
        "{refused:?}"
    );
    // Those that wait keep their connections, however many come.
    let silent: Vec<_> = (0..3 * MAX_CONNECTIONS).map(|_| served.raw()).collect();
    served.answers();
    for mut stream in all {
        assert_eq!(begins.recv().unwrap(), Action::Pause);
        go.send(()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let said = to_the_end(&mut stream);
        assert!(said.contains("HTTP/1.1 204"), "{said}");
    }
    drop(silent);
}

#[test]
fn a_server_that_is_stopped_answers_what_is_at_work_and_begins_nothing_more() {
    let (mut served, begins, go) = Served::gated();
    let (mut first, mut second) = (served.raw(), served.raw());
    first.write_all(patch("Paused").as_bytes()).unwrap();
    assert_eq!(begins.recv().unwrap(), Action::Pause);
    let both = [GET, patch("Resumed").as_bytes()].concat();
    second.write_all(&both).unwrap();
    second.read_exact(&mut [0; 15]).unwrap();
    served.server.stop();
    // It tells the others why and closes them first, and is there still.
    let told = to_the_end(&mut second);
    assert!(!served.thread.as_ref().unwrap().is_finished());
    go.send(()).unwrap();
    assert!(to_the_end(&mut first).starts_with("HTTP/1.1 204"));
    served.thread.take().unwrap().join().unwrap();
    assert_eq!(*served.fake.order.lock().unwrap(), [Action::Pause]);
    assert!(begins.try_recv().is_err());
    for needle in [
        "HTTP/1.1 400",
        "Connection: close",
        "not begun: the monitor ends",
    ] {
        assert!(told.contains(needle), "{told}");
    }
}

#[test]
fn pipelined_requests_are_answered_in_order_also_behind_the_end_of_what_is_sent() {
    let served = Served::start();
    let mut stream = served.raw();
    let both = patch("Paused") + &patch("Resumed");
    stream.write_all(both.repeat(200).as_bytes()).unwrap();
    stream.write_all(GET).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let said = to_the_end(&mut stream);
    assert_eq!(said.matches("HTTP/1.1 204").count(), 400);
    assert!(said.ends_with("x\""), "{said}");
    let order = served.fake.order.lock().unwrap();
    let expected = (0..200).flat_map(|_| [Action::Pause, Action::Resume]);
    assert_eq!(*order, expected.collect::<Vec<_>>());
}

#[test]
fn a_client_that_expects_to_be_told_to_go_on_is_told() {
    let served = Served::start();
    let mut stream = served.raw();
    let body = br#"{"state": "Paused"}"#;
    let head = format!(
        "PATCH /vm HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut told = [0; 25];
    stream.read_exact(&mut told).unwrap();
    assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body).unwrap();
    let said = to_the_end(&mut stream);
    assert!(
        said.starts_with("HTTP/1.1 204") && said.contains("Connection: close"),
        "{said}"
    );
}

#[test]
fn a_client_that_sends_a_byte_at_a_time_or_never_reads_holds_nobody_up() {
    let served = Served::start();
    // Says half a request, and nothing more.
    let mut slow = served.raw();
    for byte in &GET[..GET.len() - 1] {
        slow.write_all(&[*byte]).unwrap();
    }
    // Asks as much as it can, and reads nothing.
    let mut deaf = served.raw();
    deaf.set_nonblocking(true).unwrap();
    let mut sent = 0;
    loop {
        match deaf.write(&GET.repeat(100)) {
            Ok(len) => sent += len,
            // The server reads no more of it: what it is to answer is bounded. It may be about to.
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                let asked = served.fake.asked.load(Ordering::SeqCst);
                served.answers();
                served.answers();
                if served.fake.asked.load(Ordering::SeqCst) == asked + 2 {
                    break;
                }
            }
        }
        assert!(sent < 64 << 20, "the server never stops reading");
    }
    served.answers();
    // And each gets its answer when it comes to it.
    slow.write_all(&GET[GET.len() - 1..]).unwrap();
    let mut said = [0; 15];
    slow.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"HTTP/1.1 200 OK");
    deaf.set_nonblocking(false).unwrap();
    deaf.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"HTTP/1.1 200 OK");
}

#[test]
fn connections_that_ask_for_nothing_make_place_for_newcomers() {
    let served = Served::start();
    let mut busy = served.client();
    busy.call("GET", "/", None).unwrap();
    let mut silent = Vec::new();
    for _ in 0..5 * MAX_CONNECTIONS {
        silent.push(served.raw());
        served.answers();
        // Who goes on asking keeps its connection.
        busy.call("GET", "/", None).unwrap();
    }
    let first = silent.first_mut().unwrap();
    assert_eq!(to_the_end(first), "");
}

#[test]
fn what_is_no_request_is_refused_and_the_connection_closed() {
    let served = Served::start();
    for (sent, status) in [
        ("\0\x01\x02\r\n\r\n".to_owned(), 400),
        (
            "GET / HTTP/1.1\r\nX: ".to_owned() + &"y".repeat(4 * MAX_HEAD),
            431,
        ),
        (
            "GET / HTTP/1.1\r\nX: ".to_owned() + &"y".repeat(2 << 20),
            431,
        ),
        (
            "GET / HTTP/1.1\r\n".to_owned() + &"X: y\r\n".repeat(100_000),
            431,
        ),
        ("GET /".to_owned() + &"y".repeat(100_000), 431),
        (
            "GET / HTTP/1.1\r\nX: ".to_owned() + &"\0".repeat(100_000),
            400,
        ),
        (
            format!(
                "PUT /actions HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
                MAX_BODY + 1
            ) + &"z".repeat(1 << 20),
            413,
        ),
    ] {
        let mut stream = served.raw();
        // All of it is taken, and so the answer is not lost.
        stream.write_all(sent.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{said}");
        assert!(said.contains("fault_message"), "{said}");
        served.answers();
    }
}

#[test]
fn one_that_does_not_end_behind_a_refusal_is_ended_and_holds_nobody_up() {
    let served = Served::start();
    // Says nothing more, and does not close.
    let mut silent = served.raw();
    silent.write_all(b"\0\r\n\r\n").unwrap();
    assert!(to_the_end(&mut silent).starts_with("HTTP/1.1 400 "));
    // Never stops. What was unread at the end is a reset.
    let is_end = |error: &std::io::Error| {
        matches!(
            error.kind(),
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
        )
    };
    let mut endless = served.raw();
    let ended = loop {
        if let Err(error) = endless.write_all(&[b'y'; 64 << 10]) {
            break error;
        }
    };
    assert!(is_end(&ended), "{ended}");
    served.answers();
    // The silent one has its end as well, by the clock.
    let ended = loop {
        if let Err(error) = silent.write_all(&[0]) {
            break error;
        }
        served.answers();
    };
    assert!(is_end(&ended), "{ended}");
}

#[test]
fn clients_that_break_off_anywhere_break_nothing() {
    let served = Served::start();
    let body = br#"{"state": "Paused"}"#;
    let whole = [
        format!(
            "PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .as_bytes(),
        body,
        GET,
    ]
    .concat();
    for len in 0..=whole.len() {
        let mut stream = served.raw();
        stream.write_all(&whole[..len]).unwrap();
        drop(stream);
    }
    served.answers();
    // What was not whole was not done.
    let done = served.fake.order.lock().unwrap().len();
    assert!(done <= GET.len() + 1, "{done}");
}

#[test]
fn the_socket_is_its_users_alone_and_is_gone_with_the_server() {
    let served = Served::start();
    let path = served.path.clone();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Another server does not take its place.
    let refused = Server::bind(&path).unwrap_err();
    assert!(
        refused.to_string().contains("another process listens"),
        "{refused}"
    );
    served.answers();
    let mut idle = served.raw();
    drop(served);
    assert!(!path.exists());
    assert_eq!(to_the_end(&mut idle), "");
    let gone = Client::connect(&path, PATIENCE).unwrap_err();
    assert!(matches!(gone, ClientError::Connect { .. }), "{gone}");
}

#[test]
fn a_socket_that_a_killed_monitor_left_is_replaced_and_a_file_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Server::bind(&path).unwrap());
    std::fs::write(&path, "mine").unwrap();
    let refused = Server::bind(&path).unwrap_err();
    assert!(refused.is_users_fault(), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn a_client_gives_up_a_monitor_that_says_nothing_or_no_http() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut client = Client::connect(&path, Duration::from_millis(20)).unwrap();
    let silent = client.call("GET", "/", None).unwrap_err();
    assert!(matches!(silent, ClientError::Gone { .. }), "{silent}");
    let (first, _) = listener.accept().unwrap();
    drop(first);
    let mut client = Client::connect(&path, PATIENCE).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"220 mail.example.org\r\n\r\n").unwrap();
    let strange = client.call("GET", "/", None).unwrap_err();
    assert!(matches!(strange, ClientError::Strange { .. }), "{strange}");
    let mut client = Client::connect(&path, PATIENCE).unwrap();
    drop(listener.accept().unwrap());
    let gone = client.call("GET", "/", None).unwrap_err();
    assert!(matches!(gone, ClientError::Gone { .. }), "{gone}");
}
