// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as what a client of the control socket sends, in pieces. libFuzzer's target `api` and `api.rs` share it.
//!
//! Whatever the bytes: nothing panics, no more than one request is kept, how they are cut changes nothing, and each response
//! is one that an HTTP client can read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use reference_vmm::api::http::{Decoder, Incoming, MAX_BODY, MAX_HEAD, Response};
use reference_vmm::api::router::{Outcome, respond, route};

/// What comes of `bytes` that arrive in pieces of these lengths, the last length again and again. Told to go on is not
/// among it, for that depends on the cuts.
pub fn decode(bytes: &[u8], cuts: &[usize]) -> Vec<Incoming> {
    let mut decoder = Decoder::default();
    let (mut rest, mut cuts, mut cut) = (bytes, cuts.iter(), 4096);
    let mut all = Vec::new();
    while !rest.is_empty() {
        cut = cuts.next().copied().unwrap_or(cut).max(1);
        let (piece, behind) = rest.split_at(cut.min(rest.len()));
        rest = behind;
        decoder.feed(piece);
        let mut told = 0;
        while let Some(incoming) = decoder.next() {
            match incoming {
                Incoming::Continue => told += 1,
                incoming => all.push(incoming),
            }
            assert!(told <= 1 + piece.len());
        }
        assert!(decoder.kept() <= MAX_HEAD.max(MAX_BODY) + piece.len());
    }
    all
}

/// That a client can read it, and what it reads: the status, and the length of the body.
pub fn readable(response: &Response) -> (u16, usize) {
    let mut bytes = Vec::new();
    response.encode(true, &mut bytes);
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut head = httparse::Response::new(&mut headers);
    let length = head.parse(&bytes).unwrap().unwrap();
    let said = head
        .headers
        .iter()
        .find(|header| header.name == "Content-Length");
    let said = said.map_or(0, |header| {
        std::str::from_utf8(header.value).unwrap().parse().unwrap()
    });
    assert_eq!(bytes.len() - length, said);
    if said > 0 {
        serde_json::from_slice::<serde_json::Value>(&bytes[length..]).unwrap();
    }
    (head.code.unwrap(), said)
}

/// The first byte says how the others are cut.
pub fn run(input: &[u8]) {
    let Some((cut, bytes)) = input.split_first() else {
        return;
    };
    let whole = decode(bytes, &[bytes.len()]);
    assert_eq!(decode(bytes, &[usize::from(*cut)]), whole);
    assert_eq!(decode(bytes, &[1, usize::from(*cut), 3]), whole);
    for (at, incoming) in whole.iter().enumerate() {
        match incoming {
            Incoming::Continue => unreachable!("not kept"),
            Incoming::Refused(response) => {
                assert!(readable(response).0 >= 400);
                assert_eq!(at, whole.len() - 1, "the last");
            }
            Incoming::Request(request) => {
                assert!(request.body.len() <= MAX_BODY);
                let response = match route(request) {
                    Ok(_) => respond(Outcome::Done, false),
                    Err(response) => response,
                };
                readable(&response);
            }
        }
    }
}
