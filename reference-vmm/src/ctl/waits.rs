// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an answer waits for: a snapshot or a migration of a guest whose memory comes while it runs has all of it brought first,
//! which may take its time, or wait for a page server that is away.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::api::Client;
use crate::lazy;

/// How often it is looked. What is done sooner is not asked about.
const LOOK: Duration = Duration::from_millis(300);
/// How often the same is said again.
const AGAIN: Duration = Duration::from_secs(5);
/// How long the monitor may take to say so.
const PATIENCE: Duration = Duration::from_secs(1);

/// Says on stderr what is waited for, when there is something to say.
pub(super) struct Waits {
    /// What was asked for.
    what: &'static str,
    /// What was said last, but for its numbers: whether somebody is away.
    said: Option<(bool, Instant)>,
}

/// [`Waits`] on a thread of its own, until it is dropped.
pub(super) struct Watch(#[expect(dead_code, reason = "its end is what is heard")] Sender<()>);

/// Watches the monitor at `socket`, of which `what` was asked.
pub(super) fn watch(socket: &Path, what: &'static str) -> Watch {
    let (sender, ended) = channel();
    let socket: PathBuf = socket.to_owned();
    let look = move || {
        let mut waits = Waits::new(what);
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(LOOK) {
            waits.look(&socket);
        }
    };
    // Without it nothing is said before the answer.
    let _ = std::thread::Builder::new().name("waits".into()).spawn(look);
    Watch(sender)
}

impl Waits {
    pub(super) fn new(what: &'static str) -> Self {
        Waits { what, said: None }
    }

    /// Asks the monitor, and says what is new.
    pub(super) fn look(&mut self, socket: &Path) {
        let connected = Client::connect(socket, PATIENCE).ok();
        let answer = connected.and_then(|mut client| client.call("GET", "/", None).ok());
        let Some(body) = answer.and_then(|answer| answer.body) else {
            return;
        };
        let of = &body["lazy"];
        // Of a damaged one the answer says it.
        let comes = matches!(of["state"].as_str(), Some("bringing" | "recording"));
        let Some(coming) = lazy::coming(of).filter(|_| comes) else {
            return;
        };
        let is_away = !of["waits-for-server"].is_null() || !of["waits-for-source-s"].is_null();
        let is_new = match self.said {
            Some((before, at)) => before != is_away || at.elapsed() >= AGAIN,
            None => true,
        };
        if !is_new {
            return;
        }
        self.said = Some((is_away, Instant::now()));
        let what = self.what;
        let hint = match is_away {
            true => "; to give it up, end this command (a migration: migrate-cancel)",
            false => "",
        };
        let text =
            format!("reference-vmm: {what} waits for all of the guest's memory{coming}{hint}\n");
        crate::stderr::write(text.as_bytes());
    }
}
