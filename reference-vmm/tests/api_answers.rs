// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Answers that are none: what a client, and `ctl`, make of a server that lies, drips or never ends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use reference_vmm::api::Client;
use reference_vmm::api::client::{Answer, ClientError, MAX_ANSWER, MAX_INTERIM};
use reference_vmm::api::http::{CONTINUE, MAX_HEAD, MAX_HEADERS};
use reference_vmm::ctl::{self, Ctl, Migrate, Question};
use reference_vmm::migration::outgoing::{MigrateRequest, Order};
use reference_vmm::snapshot::SnapshotRequest;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// A server that reads a request and then says something of its own.
struct Liar {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Liar {
    /// `say` is done for each who comes, until an error.
    fn start(say: impl Fn(&mut UnixStream) -> std::io::Result<()> + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        // It goes with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 4096]);
                // One who had enough has hung up.
                let _ = say(&mut stream);
            }
        });
        Liar {
            path,
            _folder: folder,
        }
    }

    fn saying(said: impl Into<Vec<u8>>) -> Self {
        let said = said.into();
        Liar::start(move |stream| stream.write_all(&said))
    }

    fn client(&self, timeout: Duration) -> Client {
        Client::connect(&self.path, timeout).unwrap()
    }

    fn answer(&self) -> Result<Answer, ClientError> {
        self.client(PATIENCE).call("GET", "/", None)
    }

    /// What a client says that takes it for no answer.
    #[track_caller]
    fn strange(&self) -> String {
        match self.answer().unwrap_err() {
            strange @ ClientError::Strange { .. } => strange.to_string(),
            other => panic!("{other}"),
        }
    }

    /// The status of `ctl`, and what it prints and says.
    fn ctl(&self, question: Question, json: bool) -> (u8, String, String) {
        let ctl = Ctl {
            api_sock: self.path.clone(),
            question,
            json,
            timeout: PATIENCE,
        };
        let (mut printed, mut said) = (String::new(), String::new());
        let status = ctl::run(
            &ctl,
            |text| printed.push_str(text),
            |line| said = line.to_string(),
        );
        (status, printed, said)
    }
}

/// An answer with this body.
fn ok(body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

#[test]
fn a_few_interim_answers_are_passed_over_and_more_are_refused() {
    let answer = ok(r#"{"state":"Running"}"#);
    let after = |interim: usize| Liar::saying([CONTINUE.repeat(interim), answer.clone()].concat());
    for interim in [0, 1, MAX_INTERIM] {
        let body = after(interim).answer().unwrap().body.unwrap();
        assert_eq!(body, json!({ "state": "Running" }), "{interim}");
    }
    for interim in [MAX_INTERIM + 1, 300_000] {
        let why = after(interim).strange();
        let due = format!(
            "{} interim answers came, the last with HTTP status 100",
            MAX_INTERIM + 1
        );
        assert!(why.contains(&due), "{why}");
    }
}

#[test]
fn an_answer_that_drips_is_waited_for_as_long_as_one_that_does_not_come() {
    let timeout = Duration::from_millis(200);
    for (begins, ends) in [
        ("HTTP/1.1 200 OK\r\nX: ", "\r\nContent-Length: 0\r\n\r\n"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 204\r\n\r\n", "null"),
        (
            "HTTP/1.1 100 Continue\r\nX: ",
            "\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        ),
    ] {
        // A byte at a time, which comes long before the time is over: 20 times as long in all.
        let liar = Liar::start(move |stream| {
            stream.write_all(begins.as_bytes())?;
            for _ in 0..200 {
                std::thread::sleep(timeout / 10);
                stream.write_all(b" ")?;
            }
            stream.write_all(ends.as_bytes())
        });
        let mut client = liar.client(timeout);
        match client.call("GET", "/", None).unwrap_err() {
            ClientError::Gone { source, .. } => {
                assert_eq!(source.kind(), std::io::ErrorKind::TimedOut, "{begins}");
            }
            other => panic!("{begins}: {other}"),
        }
    }
}

#[test]
fn a_head_and_a_body_are_as_long_as_they_may_be_and_no_longer() {
    let padded = |len: usize| {
        let (begins, ends) = ("HTTP/1.1 200 OK\r\nX: ", "\r\nContent-Length: 4\r\n\r\n");
        let fill = "y".repeat(len - begins.len() - ends.len());
        Liar::saying(format!("{begins}{fill}{ends}null"))
    };
    assert_eq!(padded(MAX_HEAD).answer().unwrap().body, Some(Value::Null));
    let why = padded(MAX_HEAD + 1).strange();
    assert!(why.contains("more than 8192 bytes"), "{why}");
    for endless in ["X: y\r\n", "y"] {
        let liar = Liar::start(move |stream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\nX: ")?;
            loop {
                stream.write_all(endless.repeat(1000).as_bytes())?;
            }
        });
        let why = liar.strange();
        let bounds = [
            format!("{MAX_HEAD} bytes"),
            format!("{MAX_HEADERS} headers"),
        ];
        assert!(bounds.iter().any(|bound| why.contains(bound)), "{why}");
    }
    let text = |len: usize| format!("\"{}\"", "x".repeat(len - 2));
    let longest = Liar::saying(ok(text(MAX_ANSWER))).answer().unwrap();
    assert_eq!(
        longest.body.unwrap().as_str().unwrap().len(),
        MAX_ANSWER - 2
    );
    // Refused by its head: nothing of it has to come.
    for length in [MAX_ANSWER + 1, 9_999_999_999, usize::MAX] {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
        let why = Liar::saying(head).strange();
        let due = format!("its Content-Length is {length}, and {MAX_ANSWER} bytes are the most");
        assert!(why.contains(&due), "{why}");
    }
}

#[test]
fn behind_an_answer_that_was_none_nothing_is_taken_for_the_next() {
    let twice = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{".to_vec(),
        ok("{}"),
    ];
    let liar = Liar::saying(twice.concat());
    let mut client = liar.client(PATIENCE);
    let first = client.call("GET", "/", None).unwrap_err();
    assert!(matches!(first, ClientError::Strange { .. }), "{first}");
    let second = client.call("GET", "/", None).unwrap_err();
    assert!(matches!(second, ClientError::Gone { .. }), "{second}");
}

#[test]
fn ctl_says_what_becomes_of_a_snapshot_that_it_does_not_wait_for_and_where_a_guest_that_moved_is_asked()
 {
    let ask = |path: &std::path::Path, question| {
        let ctl = Ctl {
            api_sock: path.to_owned(),
            question,
            json: false,
            timeout: Duration::from_millis(20),
        };
        let mut said = String::new();
        let status = ctl::run(&ctl, |_| {}, |line| said = line.to_string());
        assert_eq!(status, 1, "{said}");
        said
    };
    let (_held, hold) = std::sync::mpsc::channel::<()>();
    let hold = std::sync::Mutex::new(hold);
    let mute = Liar::start(move |_| {
        let _ = hold.lock().unwrap().recv();
        Ok(())
    });
    let said = ask(&mute.path, Question::Snapshot(SnapshotRequest::new("/s/a")));
    assert!(
        said.contains("timed out; a snapshot that has begun goes on"),
        "{said}"
    );
    assert!(
        said.contains("/s/a/state") && said.contains("snapshot info /s/a"),
        "{said}"
    );
    let nowhere = mute.path.with_file_name("moved");
    for question in [
        Question::MigrateStatus,
        Question::MigrateOrder(Order::Cancel),
    ] {
        let said = ask(&nowhere, question);
        assert!(said.contains("No such file"), "{said}");
        assert!(
            said.contains("ask the monitor at the destination"),
            "{said}"
        );
    }
    let said = ask(&nowhere, Question::Status);
    assert!(!said.contains("destination"), "{said}");
}

#[test]
fn ctl_takes_nothing_for_an_answer_that_is_none_and_says_what_came() {
    let questions = || {
        let request = MigrateRequest::new("unix:/s");
        [
            Question::Status,
            Question::Version,
            Question::Config,
            Question::Stats,
            Question::Migrate(Box::new(Migrate { request })),
            Question::MigrateStatus,
        ]
    };
    let snapshot = || Question::Snapshot(SnapshotRequest::new("/s"));
    let empty = || b"HTTP/1.1 204 No Content\r\n\r\n".to_vec();
    for (said, came) in [
        (ok("null"), "null came (HTTP status 200)"),
        (ok("[]"), "[] came (HTTP status 200)"),
        (ok("{}"), "{} came (HTTP status 200)"),
        (ok(r#""moved""#), r#""moved" came (HTTP status 200)"#),
        (empty(), "nothing came (HTTP status 204)"),
    ] {
        let liar = Liar::saying(said.clone());
        // Firecracker says of a snapshot only that it is done.
        let more = (said != empty()).then(snapshot);
        for question in questions().into_iter().chain(more) {
            for json in [false, true] {
                let (status, printed, line) = liar.ctl(question.clone(), json);
                assert_eq!(status, 1, "{question:?}: {printed}");
                assert!(line.contains(came), "{question:?}: {line}");
                let fault = json.then(|| serde_json::from_str::<Value>(&printed).unwrap());
                let fault = fault.map(|fault| fault["fault_message"].as_str().unwrap().to_owned());
                assert_eq!(fault.is_some_and(|fault| fault.contains(came)), json);
                assert_eq!(printed.is_empty(), !json, "{question:?}: {printed}");
            }
        }
    }
    // As many as can be of the shortest things, of which each takes memory of its own.
    let many = format!("[{}0]", r#"{"":0},"#.repeat((MAX_ANSWER - 3) / 7));
    let (status, printed, line) = Liar::saying(ok(many)).ctl(Question::Status, false);
    assert_eq!((status, &*printed), (1, ""), "{line}");
    assert!(
        line.contains(r#"[{"":0},{"":0},"#) && line.contains("… came"),
        "{line}"
    );
}
