// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `ctl load`: what a monitor that waits for it is to go on from.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::lazy::{LazySaid, OnLoss, PageServerAt};

/// What is to be gone on from, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// Whether the guest goes on at once.
    pub resume: bool,
    /// Whether the guest runs before its memory is read, and how that comes: over what the monitor's command line said.
    pub lazy: LazySaid,
}

impl Load {
    /// One of the snapshot `dir` whose memory comes as the monitor's command line said.
    pub fn new(dir: impl Into<PathBuf>, resume: bool) -> Self {
        Load {
            dir: dir.into(),
            resume,
            lazy: LazySaid::default(),
        }
    }

    /// The request's body: what is as it is without saying is not said.
    pub(super) fn body(&self) -> Value {
        let mut body = json!({ "snapshot_path": self.dir, "resume_vm": self.resume });
        let LazySaid {
            lazy,
            on_loss,
            deadline,
            record,
            handler,
            page_server,
        } = &self.lazy;
        if *lazy {
            body["lazy"] = true.into();
        }
        match on_loss {
            None => {}
            Some(OnLoss::Stop) => body["on_loss"] = "stop".into(),
            Some(OnLoss::Poison) => body["on_loss"] = "poison".into(),
        }
        if let Some(deadline) = deadline {
            body["page_deadline"] = deadline.as_secs().into();
        }
        if let Some(record) = record {
            body["record"] = record.as_secs().into();
        }
        if let Some(handler) = handler {
            body["mem_backend"] = json!({ "backend_type": "Uffd", "backend_path": handler });
        }
        if let Some(server) = page_server {
            let PageServerAt { address, tls } = &**server;
            let path = address.to_string();
            body["mem_backend"] = json!({ "backend_type": "PageServer", "backend_path": path });
            if let Some(tls) = tls {
                body["mem_backend"]["tls"] = json!(tls);
            }
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::UsageError;
    use crate::ctl::{Parsed, Question, parse};

    fn body(words: &str) -> Result<Value, UsageError> {
        let words = format!("--api-sock /s load /a {words}");
        let parsed = parse(lexopt::Parser::from_args(words.split_whitespace()))?;
        match parsed {
            Parsed::Ctl(ctl) => match ctl.question {
                Question::Load(load) => Ok(load.body()),
                other => panic!("{words}: {other:?}"),
            },
            Parsed::Help(help) => panic!("{words}: {help}"),
        }
    }

    #[test]
    fn what_is_said_of_memory_is_told_and_no_more() {
        let plain = json!({ "snapshot_path": "/a", "resume_vm": false });
        assert_eq!(body("").unwrap(), plain);
        for (words, field, value) in [
            ("--lazy", "lazy", json!(true)),
            ("--on-loss stop", "on_loss", json!("stop")),
            ("--on-loss=poison", "on_loss", json!("poison")),
            ("--page-deadline 3", "page_deadline", json!(3)),
            ("--record", "record", json!(10)),
            ("--record=7", "record", json!(7)),
            (
                "--page-handler /h",
                "mem_backend",
                json!({ "backend_type": "Uffd", "backend_path": "/h" }),
            ),
            (
                "--page-server tcp:h:1 --tls-cert /c --tls-key /k --tls-ca /a --tls-name n",
                "mem_backend",
                json!({
                    "backend_type": "PageServer", "backend_path": "tcp:h:1",
                    "tls": { "cert": "/c", "key": "/k", "ca": "/a", "name": "n" },
                }),
            ),
        ] {
            let mut expected = plain.clone();
            expected[field] = value;
            assert_eq!(body(words).unwrap(), expected, "{words}");
        }
        let here = body("--resume --page-handler h").unwrap();
        let path = here["mem_backend"]["backend_path"].as_str().unwrap();
        assert!(path.starts_with('/') && path.ends_with("/h"), "{path}");
        assert_eq!(here["resume_vm"], true);
        let here = body("--page-server unix:s").unwrap();
        let path = here["mem_backend"]["backend_path"].as_str().unwrap();
        assert!(path.starts_with("unix:/") && path.ends_with("/s"), "{path}");
        body("--page-server unix:s --page-handler h").unwrap_err();
        body("--tls-cert /c --tls-key /k --tls-ca /a").unwrap_err();
    }
}
