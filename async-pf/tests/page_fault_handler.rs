// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the example `page_fault_handler` listens: what a killed one left behind is replaced, and nothing else.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

#[path = "../examples/page_fault_handler.rs"]
#[allow(dead_code)]
mod example;

use example::listen;

#[test]
fn a_socket_that_nobody_listens_at_is_replaced_and_what_is_another_s_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pages.sock");
    let path = path.to_str().unwrap();

    // As a killed one does, which removes nothing.
    drop(UnixListener::bind(path).unwrap());
    let theirs = listen(path).unwrap();
    let _monitor = UnixStream::connect(path).unwrap();
    theirs.accept().unwrap();

    let in_use = listen(path).unwrap_err().to_string();
    let expected = format!("{path}: another process listens there; name another path");
    assert_eq!(in_use, expected);
    // Who listens there has not been connected to.
    theirs.set_nonblocking(true).unwrap();
    theirs.accept().unwrap_err();
    drop(theirs);

    fs::remove_file(path).unwrap();
    let datagrams = UnixDatagram::bind(path).unwrap();
    assert_eq!(listen(path).unwrap_err().to_string(), expected);
    drop(datagrams);

    fs::remove_file(path).unwrap();
    fs::write(path, "mine").unwrap();
    let no_socket = listen(path).unwrap_err().to_string();
    assert!(no_socket.contains("is no socket"), "{no_socket}");
    assert_eq!(fs::read(path).unwrap(), b"mine");

    // A name without a folder is the system's to refuse.
    let nowhere = listen(folder.path().join("none/x").to_str().unwrap());
    assert!(nowhere.unwrap_err().to_string().contains("none/x"));
}
