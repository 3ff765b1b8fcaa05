// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether an answer is one to what was asked. Who listens at the socket may be anybody, or a monitor of another time:
//! of what it says only that is looked for by which the answer is known, and which `ctl` tells of.

use serde_json::Value;

use super::Question;
use crate::api::client::Answer;
use crate::migration::recover::Recover;

/// Where the end of a value that is long is left out, characters.
const SHOWN: usize = 100;

/// Why `answer`, which is no refusal, is none to `question`; none where it is one.
pub(super) fn wrong(question: &Question, answer: &Answer) -> Option<String> {
    let came = answer.body.as_ref();
    let of = |name: &str| came.and_then(|body| body.get(name));
    let (is_due, due) = match question {
        // That it was done is said by HTTP's status alone.
        Question::Pause
        | Question::Resume
        | Question::Load(..)
        | Question::MigrateOrder(_)
        | Question::PowerButton => return None,
        Question::MigrateRecover(Recover::To { .. }) => return None,
        Question::MigrateRecover(Recover::Listen { .. }) => (
            of("listen").is_some_and(Value::is_string),
            "where it listens (listen)",
        ),
        // Firecracker says no more.
        Question::Snapshot(_) => (
            came.is_none() || of("total_us").is_some_and(Value::is_u64),
            "nothing, or what it cost (total_us)",
        ),
        Question::Status => (
            of("state").is_some_and(Value::is_string),
            "whether the guest runs (state)",
        ),
        Question::Version => (
            of("firecracker_version").is_some_and(Value::is_string),
            "a version (firecracker_version)",
        ),
        Question::Config => (
            of("machine-config").is_some_and(Value::is_object),
            "the machine (machine-config)",
        ),
        Question::Stats => (of("exits").is_some_and(Value::is_array), "numbers (exits)"),
        // It comes when the guest is there.
        Question::Migrate(_) => (
            of("outcome").is_some_and(|outcome| outcome["result"] == "moved"),
            "that the guest has moved (outcome)",
        ),
        Question::MigrateStatus => (
            of("settings").is_some_and(Value::is_object)
                || of("state").is_some_and(Value::is_string),
            "a migration (settings), or whether a guest has come (state)",
        ),
    };
    (!is_due).then(|| {
        let came = came.map_or_else(|| "nothing".into(), shown);
        let status = answer.status;
        format!("{due} is due, and {came} came (HTTP status {status})")
    })
}

/// The beginning of what came.
fn shown(body: &Value) -> String {
    let text = body.to_string();
    let mut chars = text.chars();
    let mut shown: String = chars.by_ref().take(SHOWN).collect();
    if chars.next().is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::outgoing::{MigrateRequest, Order};
    use crate::snapshot::SnapshotRequest;
    use serde_json::json;

    #[test]
    fn what_is_no_answer_to_the_question_is_told_with_what_came() {
        let migrate = || {
            let request = MigrateRequest::new("unix:/s");
            Question::Migrate(Box::new(super::super::Migrate { request }))
        };
        let snapshot = || Question::Snapshot(SnapshotRequest::new("/s"));
        let answer = |body: Value| Answer {
            status: 200,
            body: Some(body),
        };
        let nothing = Answer {
            status: 204,
            body: None,
        };
        let waits = json!({ "state": "waiting" });
        for (question, due) in [
            (Question::Status, json!({ "state": "Running" })),
            (Question::Version, json!({ "firecracker_version": "1" })),
            (Question::Config, json!({ "machine-config": {} })),
            (Question::Stats, json!({ "exits": [] })),
            (migrate(), json!({ "outcome": { "result": "moved" } })),
            (Question::MigrateStatus, json!({ "settings": {} })),
            (Question::MigrateStatus, waits),
            (snapshot(), json!({ "total_us": 1 })),
        ] {
            assert_eq!(wrong(&question, &answer(due)), None, "{question:?}");
            for came in [
                json!(null),
                json!([]),
                json!("x"),
                json!({}),
                json!(["state", "exits"]),
            ] {
                let why = wrong(&question, &answer(came.clone())).unwrap();
                let end = format!(" is due, and {came} came (HTTP status 200)");
                assert!(why.ends_with(&end), "{question:?}: {why}");
            }
            match question {
                Question::Snapshot(_) => assert_eq!(wrong(&question, &nothing), None),
                _ => {
                    let why = wrong(&question, &nothing).unwrap();
                    let end = " is due, and nothing came (HTTP status 204)";
                    assert!(why.ends_with(end), "{question:?}: {why}");
                }
            }
        }
        for result in ["cancelled", "failed", "unsettled"] {
            let still_here = json!({ "outcome": { "result": result }, "settings": {} });
            assert!(wrong(&migrate(), &answer(still_here)).is_some(), "{result}");
        }
        for question in [
            Question::Pause,
            Question::Resume,
            Question::Load(Box::new(crate::ctl::Load::new("/s", true))),
            Question::MigrateOrder(Order::Cancel),
            Question::PowerButton,
        ] {
            assert_eq!(wrong(&question, &nothing), None, "{question:?}");
        }
        let why = wrong(&Question::Stats, &answer(json!(vec!["ä"; 1 << 20]))).unwrap();
        assert!(why.chars().count() < 200 && why.contains("…"), "{why}");
    }
}
