// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket's requests and responses as bytes, without a socket.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod api_bytes;

use std::time::Duration;

use api_bytes::{decode, readable, run};
use kvm_core::arch::x86_64::state::ClockRestore;
use proptest::prelude::*;
use reference_vmm::api::http::{
    Decoder, Incoming, MAX_BODY, MAX_HEAD, MAX_HEADERS, Request, Response, Status,
};
use reference_vmm::api::load::LoadRequest;
use reference_vmm::api::router::{Action, Outcome, respond, route};
use reference_vmm::lazy::{LazySaid, OnLoss, PageServerAt};
use reference_vmm::migration::outgoing::Order;
use reference_vmm::migration::recover::Recover;
use reference_vmm::migration::tls::TlsFiles;
use reference_vmm::text::is_plain;
use serde_json::Value;

fn request(method: &str, path: &str, body: &str) -> Request {
    Request {
        method: method.into(),
        path: path.into(),
        body: body.into(),
        keep_alive: true,
        wants_all: false,
    }
}

fn refusal(bytes: &[u8]) -> Response {
    match decode(bytes, &[4096]).pop() {
        Some(Incoming::Refused(response)) => response,
        other => panic!("{}: {other:?}", bytes.escape_ascii()),
    }
}

fn fault(response: &Response) -> String {
    let body: Value = serde_json::from_str(response.body.as_deref().unwrap()).unwrap();
    assert_eq!(body.as_object().unwrap().len(), 1);
    body["fault_message"].as_str().unwrap().to_owned()
}

// ---- HTTP

#[test]
fn a_request_is_what_its_bytes_say() {
    let sent = b"PATCH /vm HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\ncontent-length: 5\r\n\r\nhello\
                 GET http://localhost/version HTTP/1.1\r\n\r\n\r\nGET / HTTP/1.1\r\nConnection: foo , Close\r\n\r\n";
    let expected = [
        request("PATCH", "/vm", "hello"),
        request("GET", "/version", ""),
        Request {
            keep_alive: false,
            ..request("GET", "/", "")
        },
    ];
    let expected = expected.map(Incoming::Request);
    for cut in 1..sent.len() {
        assert_eq!(decode(sent, &[cut]), expected, "{cut}");
    }
    for (preference, wants_all) in [
        ("return=representation", true),
        ("respond-async, Return=Representation; x=1", true),
        ("return=minimal", false),
        ("return", false),
    ] {
        let sent = format!("GET / HTTP/1.1\r\nprefer: {preference}\r\n\r\n");
        let expected = Request {
            wants_all,
            ..request("GET", "/", "")
        };
        assert_eq!(decode(sent.as_bytes(), &[9]), [Incoming::Request(expected)]);
    }
    for (sent, keep_alive) in [
        ("GET / HTTP/1.0\r\n\r\n", false),
        ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true),
    ] {
        let expected = Request {
            keep_alive,
            ..request("GET", "/", "")
        };
        assert_eq!(decode(sent.as_bytes(), &[9]), [Incoming::Request(expected)]);
    }
}

#[test]
fn what_is_no_request_or_one_that_can_be_read_in_two_ways_is_refused_and_is_the_last() {
    let long = |len| format!("GET /{} HTTP/1.1\r\n", "x".repeat(len));
    let many = "A: b\r\n".repeat(MAX_HEADERS + 1);
    for (sent, status) in [
        ("hello\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/2.0\r\n\r\n".into(), 400),
        ("GET vm HTTP/1.1\r\n\r\n".into(), 400),
        ("GET ftp://host/vm HTTP/1.1\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nA b: c\r\n\r\n".into(), 400),
        ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n".into(), 400),
        ("PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n".into(), 400),
        ("PUT / HTTP/1.1\r\nContent-Length:\r\n\r\n".into(), 400),
        ("PUT / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n".into(), 400),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".into(),
            400,
        ),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            501,
        ),
        (
            format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", MAX_BODY + 1),
            413,
        ),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".into(),
            413,
        ),
        ("PUT / HTTP/1.1\r\nExpect: wonders\r\n\r\n".into(), 417),
        (long(MAX_HEAD) + "\r\n", 431),
        (long(MAX_HEAD) + "no header at all\r\n", 431),
        ("\r\n".repeat(MAX_HEAD), 431),
        (format!("GET / HTTP/1.1\r\n{many}\r\n"), 431),
    ] {
        // Behind it nothing is read.
        let sent = sent + "GET / HTTP/1.1\r\n\r\n";
        let response = refusal(sent.as_bytes());
        assert_eq!(response.status.code(), status, "{:.200}", sent);
        assert!(!fault(&response).is_empty());
        assert_eq!(decode(sent.as_bytes(), &[1]).len(), 1);
    }
}

#[test]
fn a_body_of_the_most_bytes_is_taken() {
    let body = "x".repeat(MAX_BODY);
    let sent = format!("PUT / HTTP/1.1\r\nContent-Length: {MAX_BODY}\r\n\r\n{body}");
    let taken = decode(sent.as_bytes(), &[4096]);
    assert_eq!(taken, [Incoming::Request(request("PUT", "/", &body))]);
}

#[test]
fn a_client_that_waits_before_its_body_is_told_once_to_go_on() {
    let head = b"PUT /x HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";
    let mut decoder = Decoder::default();
    decoder.feed(head);
    assert_eq!(decoder.next(), Some(Incoming::Continue));
    assert_eq!(decoder.next(), None);
    decoder.feed(b"{");
    assert_eq!(decoder.next(), None);
    decoder.feed(b"}");
    let expected = Incoming::Request(request("PUT", "/x", "{}"));
    assert_eq!(decoder.next(), Some(expected.clone()));
    // One that did not wait is not told.
    decoder.feed(&[&head[..], b"{}"].concat());
    assert_eq!(decoder.next(), Some(expected));
    // Nor is one of HTTP/1.0, or one that has no body.
    decoder.feed(b"PUT / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n");
    assert_eq!(decoder.next(), None);
    let mut decoder = Decoder::default();
    decoder.feed(b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n");
    assert!(matches!(decoder.next(), Some(Incoming::Request(_))));
}

#[test]
fn a_response_says_how_long_it_is_and_what_becomes_of_the_connection() {
    let text = |response: Response, keep_alive| {
        readable(&response);
        let mut bytes = Vec::new();
        response.encode(keep_alive, &mut bytes);
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(
        text(Response::done(), true),
        "HTTP/1.1 204 No Content\r\nServer: reference-vmm\r\nConnection: keep-alive\r\n\r\n"
    );
    assert_eq!(
        text(Response::json("{}".into()), false),
        "HTTP/1.1 200 OK\r\nServer: reference-vmm\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: 2\r\n\r\n{}"
    );
}

#[test]
fn a_response_has_no_character_that_a_terminal_obeys_or_does_not_show_and_reads_as_the_same() {
    let why = "a\u{2028}b\u{9b}31m\u{202e}c\u{3164}, Grüße";
    let mut bytes = Vec::new();
    Response::fault(Status::BadRequest, why.into()).encode(true, &mut bytes);
    let said = String::from_utf8(bytes).unwrap();
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    assert!(
        body.chars().all(is_plain) && body.contains("Grüße"),
        "{body}"
    );
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["fault_message"], why);
}

// ---- Routes

#[test]
fn each_path_has_its_method_and_its_body() {
    let action = |action: &str| format!("{{\"action_type\": \"{action}\"}}");
    for (method, path, body, expected) in [
        ("GET", "/", "", Action::Describe),
        ("GET", "/version", "", Action::Version),
        ("GET", "/version/", "", Action::Version),
        ("GET", "/machine-config", "", Action::MachineConfig),
        ("GET", "/vm/config", "", Action::VmConfig),
        ("GET", "/stats", "", Action::Stats),
        ("PATCH", "/vm", r#"{"state": "Paused"}"#, Action::Pause),
        ("PATCH", "/vm", r#"{"state": "Resumed"}"#, Action::Resume),
        (
            "PUT",
            "/actions",
            &action("SendCtrlAltDel"),
            Action::PowerButton,
        ),
        ("PUT", "/actions", &action("InstanceStart"), Action::Start),
        (
            "PATCH",
            "/migrate",
            r#"{"order": "Here"}"#,
            Action::MigrateOrder(Order::Here),
        ),
        (
            "PATCH",
            "/migrate",
            r#"{"order": "Recover", "to": "unix:/s", "tls_name": "n"}"#,
            Action::Recover(Recover::To {
                address: "unix:/s".into(),
                tls_name: Some("n".into()),
            }),
        ),
        (
            "PATCH",
            "/migrate",
            r#"{"order": "Recover", "listen": "unix:/s"}"#,
            Action::Recover(Recover::Listen {
                address: "unix:/s".into(),
            }),
        ),
    ] {
        assert_eq!(route(&request(method, path, body)), Ok(expected), "{path}");
    }
    for (method, path, body, status, needle) in [
        ("GET", "/mmds", "", 404, "GET /mmds"),
        ("GET", "/vm/", "", 405, "GET /vm/"),
        ("GET", "//", "x", 400, "body"),
        ("get", "/", "", 405, "get"),
        ("DELETE", "/vm", "", 405, "DELETE"),
        ("PUT", "/vm", r#"{"state": "Paused"}"#, 405, "PUT"),
        ("GET", "/", "x", 400, "body"),
        ("PATCH", "/vm", "", 400, "Empty PATCH"),
        ("PATCH", "/vm", "x", 400, "json"),
        ("PATCH", "/vm", r#"{"state": "paused"}"#, 400, "paused"),
        ("PATCH", "/vm", r#"{"state": "Paused", "x": 1}"#, 400, "`x`"),
        (
            "PATCH",
            "/migrate",
            r#"{"order": "Recover"}"#,
            400,
            "is missing",
        ),
        (
            "PATCH",
            "/migrate",
            r#"{"order": "Recover", "to": "a", "listen": "b"}"#,
            400,
            "not both",
        ),
        (
            "PATCH",
            "/migrate",
            r#"{"order": "Cancel", "to": "a"}"#,
            400,
            "of the order Recover",
        ),
        (
            "PATCH",
            "/migrate",
            r#"{"order": "Cancel", "x": 1}"#,
            400,
            "`x`",
        ),
        ("PUT", "/actions", "", 400, "Empty PUT"),
        ("PUT", "/actions", &action("FlushMetrics"), 400, "/stats"),
        ("PUT", "/actions", &action("Explode"), 400, "Explode"),
    ] {
        let refused = route(&request(method, path, body)).unwrap_err();
        assert_eq!(refused.status.code(), status, "{method} {path} {body}");
        assert_eq!(refused.allow.is_some(), status == 405);
        let said = fault(&refused);
        assert!(said.contains(needle), "{method} {path} {body}: {said}");
    }
    let head = route(&request("HEAD", "/", "")).unwrap_err();
    assert_eq!((head.allow, readable(&head)), (Some("GET"), (405, 0)));
}

#[test]
fn a_load_is_taken_in_each_of_firecrackers_forms_that_says_the_same_here() {
    let load = LoadRequest {
        dir: "/s".into(),
        resume: false,
        track: false,
        nets: vec![],
        uds: None,
        clock: None,
        lazy: LazySaid::default(),
    };
    let with = |lazy| LoadRequest {
        lazy,
        ..load.clone()
    };
    let lazy = with(LazySaid {
        lazy: true,
        ..LazySaid::default()
    });
    let said = with(LazySaid {
        on_loss: Some(OnLoss::Poison),
        deadline: Some(Duration::from_secs(3)),
        record: Some(Duration::from_secs(86_400)),
        ..LazySaid::default()
    });
    let handled = with(LazySaid {
        handler: Some("/run/handler".into()),
        ..LazySaid::default()
    });
    let served = with(LazySaid {
        page_server: Some(Box::new(PageServerAt {
            address: "tcp:10.0.0.1:7".parse().unwrap(),
            tls: Some(TlsFiles {
                cert: "/c".into(),
                key: "/k".into(),
                ca: "/a".into(),
                name: None,
            }),
        })),
        ..LazySaid::default()
    });
    let all = LoadRequest {
        resume: true,
        track: true,
        nets: vec![(0, "tap5".into()), (12, "tap6".into())],
        uds: Some("/v".into()),
        clock: Some(ClockRestore::AsSaved),
        ..load.clone()
    };
    for (body, expected) in [
        (r#"{"snapshot_path": "/s"}"#, &load),
        (
            r#"{"snapshot_path": "/s", "mem_file_path": "/s/memory"}"#,
            &load,
        ),
        (
            r#"{"snapshot_path": "/s", "mem_backend": {"backend_type": "File", "backend_path": "/s/memory"},
                "track_dirty_pages": false, "enable_diff_snapshots": false, "network_overrides": []}"#,
            &load,
        ),
        (
            r#"{"snapshot_path": "/s", "mem_backend": {"backend_type": "Uffd", "backend_path": "/run/handler"}}"#,
            &handled,
        ),
        (
            r#"{"snapshot_path": "/s", "mem_backend": {"backend_type": "PageServer", "backend_path": "tcp:10.0.0.1:7",
                "tls": {"cert": "/c", "key": "/k", "ca": "/a"}}}"#,
            &served,
        ),
        (r#"{"snapshot_path": "/s", "lazy": true}"#, &lazy),
        (
            r#"{"snapshot_path": "/s", "on_loss": "poison", "page_deadline": 3, "record": 86400}"#,
            &said,
        ),
        (
            r#"{"snapshot_path": "/s", "resume_vm": true, "track_dirty_pages": true, "vsock_override": {"uds_path": "/v"}, "clock_realtime": false,
                "network_overrides": [{"iface_id": "net0", "host_dev_name": "tap5"},
                                      {"iface_id": "net12", "host_dev_name": "tap6"}]}"#,
            &all,
        ),
    ] {
        let taken = route(&request("PUT", "/snapshot/load", body)).unwrap();
        assert_eq!(taken, Action::Load(expected.clone()), "{body}");
        assert!(taken.is_long());
    }
    let net = |name: &str| {
        format!(
            r#"{{"snapshot_path": "/s", "network_overrides": [{{"iface_id": "{name}", "host_dev_name": "t"}}]}}"#
        )
    };
    for (body, needle) in [
        ("", "Empty PUT"),
        ("{}", "snapshot_path"),
        (
            r#"{"snapshot_path": "/s", "mem_file_path": "/m"}"#,
            "leave mem_file_path out",
        ),
        (
            r#"{"snapshot_path": "/s", "mem_backend": {"backend_type": "Socket", "backend_path": "/s/memory"}}"#,
            "Socket",
        ),
        (
            r#"{"snapshot_path": "/s", "mem_backend": {"backend_type": "File", "backend_path": "/m"}}"#,
            "leave mem_file_path out",
        ),
        (
            r#"{"snapshot_path": "/s", "mem_file_path": "/s/memory",
                "mem_backend": {"backend_type": "File", "backend_path": "/s/memory"}}"#,
            "too many fields",
        ),
        (r#"{"snapshot_path": "/s", "on_loss": "retry"}"#, "retry"),
        (
            r#"{"snapshot_path": "/s", "mem_backend": {"backend_type": "PageServer", "backend_path": "10.0.0.1:7"}}"#,
            "unix:PATH or tcp:HOST:PORT",
        ),
        (
            r#"{"snapshot_path": "/s", "mem_backend": {"backend_type": "Uffd", "backend_path": "/h",
                "tls": {"cert": "/c", "key": "/k", "ca": "/a"}}}"#,
            "tls is of a PageServer",
        ),
        (
            r#"{"snapshot_path": "/s", "page_deadline": 0}"#,
            "page_deadline 0: a whole number of seconds from 1 to 86400",
        ),
        (
            r#"{"snapshot_path": "/s", "record": 4294967297}"#,
            "record 4294967297",
        ),
        (
            r#"{"snapshot_path": "/s", "lazy": false, "record": 3}"#,
            "lazy is false, and",
        ),
        (
            r#"{"snapshot_path": "/s", "lazy": false, "mem_backend": {"backend_type": "Uffd", "backend_path": "/h"}}"#,
            "lazy is false, and",
        ),
        (
            r#"{"snapshot_path": "/s", "huge_pages": "2M"}"#,
            "huge_pages",
        ),
        (&net("eth0"), "\"eth0\""),
        (&net("net"), "\"net\""),
        (&net("net+1"), "\"net+1\""),
        (
            &net("net99999999999999999999"),
            "\"net99999999999999999999\"",
        ),
    ] {
        let refused = route(&request("PUT", "/snapshot/load", body)).unwrap_err();
        assert_eq!(refused.status.code(), 400, "{body}");
        assert!(fault(&refused).contains(needle), "{body}: {refused:?}");
    }
    let refused = route(&request("GET", "/snapshot/load", "")).unwrap_err();
    assert_eq!(refused.status.code(), 405);
}

#[test]
fn what_came_of_an_action_is_its_response() {
    for all in [false, true] {
        assert_eq!(readable(&respond(Outcome::Done, all)), (204, 0));
        let json = Outcome::Json("{}".into());
        assert_eq!(readable(&respond(json, all)), (200, 2));
    }
    // As Firecracker says it, to who does not want more.
    let report = || Outcome::Report("{}".into());
    assert_eq!(readable(&respond(report(), false)), (204, 0));
    assert_eq!(readable(&respond(report(), true)), (200, 2));
    let refused = respond(Outcome::Refused("a \"b\"\n".into()), true);
    assert_eq!(refused.status, Status::BadRequest);
    assert_eq!(fault(&refused), "a \"b\"\n");
}

// ---- Anything

/// Pieces of requests, more or less right.
fn pieces() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::sample::select(vec![
        "GET ",
        "PUT ",
        "PATCH ",
        "/",
        "/vm",
        "/actions",
        " HTTP/1.1\r\n",
        " HTTP/1.0\r\n",
        "Content-Length: ",
        "3",
        "51200",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "Connection: close",
        "\r\n",
        "\r\n\r\n",
        ":",
        "{}",
        "{\"state\": \"Paused\"}",
        "http://x",
        "\0",
        "\u{fe0f}",
    ]);
    let piece = prop_oneof![
        9 => words.prop_map(|word| word.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..20),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// A request that is right, and how it is written.
fn right() -> impl Strategy<Value = (Request, String)> {
    let token = "[A-Z]{1,9}";
    let path = "/[a-z/]{0,20}";
    (token, path, "[ -~]{0,200}", any::<bool>()).prop_map(|(method, path, body, keep_alive)| {
        let end = if keep_alive {
            ""
        } else {
            "Connection: close\r\n"
        };
        let text = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\n{end}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let request = Request {
            keep_alive,
            ..request(&method, &path, &body)
        };
        (request, text)
    })
}

proptest! {
    #[test]
    fn any_bytes_are_requests_or_a_refusal_however_they_are_cut(cut: u8, bytes in pieces()) {
        run(&[&[cut][..], &bytes].concat());
    }

    #[test]
    fn pipelined_requests_come_out_as_they_went_in(
        requests in prop::collection::vec(right(), 0..10),
        cuts in prop::collection::vec(1_usize..300, 1..20),
    ) {
        let (expected, texts): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
        let taken = decode(texts.concat().as_bytes(), &cuts);
        let expected: Vec<_> = expected.into_iter().map(Incoming::Request).collect();
        prop_assert_eq!(taken, expected);
    }
}
