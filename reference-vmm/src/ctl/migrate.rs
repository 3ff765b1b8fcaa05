// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `ctl migrate`: asks for a migration, and shows how it goes while it is waited for.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use lexopt::prelude::*;
use serde_json::Value;

use super::waits::Waits;
use crate::api::Client;
use crate::api::client::{Answer, ClientError};
use crate::cli::restore::TlsFlags;
use crate::cli::{self, UsageError};
use crate::lazy::LazySaid;
use crate::migration::address::Address;
use crate::migration::codec::Compression;
use crate::migration::coming::Came;
use crate::migration::limit::LEAST_RATE;
use crate::migration::message::MOST_CONNECTIONS;
use crate::migration::outgoing::MigrateRequest;
use crate::migration::postcopy::When;
use crate::migration::progress::{Manner, Progress};
use crate::migration::record::MigrationRecord;
use crate::migration::recover::{Recover, Said};
use crate::migration::source::WhenStuck;
use crate::migration::tls::TlsFiles;
use crate::text::printable;

/// Its answer comes when the guest is there. The monitor's end ends the wait in any case.
const PATIENCE: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often it is asked how it goes, at most: it costs the monitor, and shows no more.
const INTERVAL: Duration = Duration::from_millis(200);

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrate {
    /// The request.
    pub request: MigrateRequest,
}

/// The flags of `migrate`, as they come.
#[derive(Default)]
pub(super) struct Flags {
    to: Option<Address>,
    listen: Option<Address>,
    connections: Option<u32>,
    bandwidth: Option<u64>,
    downtime: Option<u32>,
    time: Option<u32>,
    when_stuck: Option<WhenStuck>,
    postcopy: Option<When>,
    tls: TlsFlags,
    report: Option<PathBuf>,
    /// One of them was there.
    any: Option<String>,
}

impl Flags {
    /// Takes a flag; false if it is none of these.
    pub(super) fn take(
        &mut self,
        flag: &str,
        parser: &mut lexopt::Parser,
    ) -> Result<bool, UsageError> {
        let wrong = |flag: &str, why: String| UsageError::Command(format!("--{flag} {why}"));
        match Long(flag) {
            Long("to") => {
                let text = parser.value()?.string()?;
                let address = text.parse::<Address>();
                self.to = Some(address.map_err(|error| wrong(flag, error.to_string()))?);
            }
            Long("listen") => {
                let text = parser.value()?.string()?;
                let address = text.parse::<Address>();
                self.listen = Some(address.map_err(|error| wrong(flag, error.to_string()))?);
            }
            Long("connections") => {
                let value = parser.value()?;
                let number = cli::number_within("--connections", value, 1..=MOST_CONNECTIONS)?;
                self.connections = Some(number);
            }
            Long("bandwidth") => {
                let text = parser.value()?.string()?;
                let bytes = crate::config::parse_size(&text);
                let bytes = bytes.ok().filter(|bytes| *bytes >= LEAST_RATE);
                let why =
                    || format!("{text:?}: bytes a second are wanted, 64K or more, as in 100M");
                self.bandwidth = Some(bytes.ok_or_else(|| wrong(flag, why()))?);
            }
            Long("downtime") => {
                let number = cli::number_within("--downtime", parser.value()?, 1..=u32::MAX)?;
                self.downtime = Some(number);
            }
            Long("max-time") => {
                let number = cli::number_within("--max-time", parser.value()?, 1..=u32::MAX)?;
                self.time = Some(number);
            }
            Long("when-stuck") => {
                self.when_stuck = Some(parser.value()?.parse_with(|word| match word {
                    "cancel" => Ok(WhenStuck::Cancel),
                    "throttle" => Ok(WhenStuck::Throttle),
                    "stop" => Ok(WhenStuck::Stop),
                    _ => Err("--when-stuck is cancel, throttle or stop"),
                })?);
            }
            Long("postcopy") => {
                let word = parser.optional_value().map(|value| value.string());
                let word = word.transpose()?.unwrap_or_else(|| "auto".into());
                let when = word.parse::<When>();
                self.postcopy = Some(when.map_err(|why| wrong(flag, why))?);
            }
            Long("tls-name") => self.tls.set_name(parser.value()?.string()?),
            Long("report") => {
                let path = PathBuf::from(parser.value()?);
                crate::config::check_path("--report", &path)?;
                // The monitor writes it, who may be at home elsewhere.
                self.report = Some(super::told_path("--report", path)?);
            }
            Long(other) if TlsFlags::is_one(other) => self.tls.take(flag, parser.value()?)?,
            _ => return Ok(false),
        }
        self.any = Some(flag.to_owned());
        Ok(true)
    }

    /// One of them, if there was any.
    pub(super) fn any(&self) -> Option<&str> {
        self.any.as_deref()
    }

    /// Those of `migrate-recover`.
    pub(super) fn recover(self) -> Result<Recover, UsageError> {
        let wrong = |text: &str| UsageError::Command(format!("ctl migrate-recover: {text}"));
        let Flags {
            to,
            listen,
            connections: None,
            bandwidth: None,
            downtime: None,
            time: None,
            when_stuck: None,
            postcopy: None,
            report: None,
            tls,
            any: _,
        } = self
        else {
            return Err(wrong("--to, --tls-name and --listen are all that it has"));
        };
        let Ok(tls_name) = tls.name_alone() else {
            return Err(wrong(
                "the certificates are those that the migration was begun with",
            ));
        };
        let told = |flag: &str, address: Option<Address>| {
            let address = match address {
                // The monitor has another working directory.
                Some(Address::Unix(path)) => Some(Address::Unix(super::told_path(flag, path)?)),
                other => other,
            };
            Ok::<_, UsageError>(address.map(|address| address.to_string()))
        };
        let said = Said {
            to: told("--to", to)?,
            tls_name,
            listen: told("--listen", listen)?,
        };
        let text = |_| {
            wrong(
                "--to ADDRESS, to the source, with --tls-name NAME or without; or --listen ADDRESS, to the destination: one of the two is wanted",
            )
        };
        said.recover().map_err(text)
    }

    /// Those of `load`: of the page server's TLS. Whose flags it takes has none but these.
    pub(super) fn load(self, lazy: &mut LazySaid) -> Result<(), UsageError> {
        let wrong = |text: &str| Err(UsageError::Command(text.into()));
        let tls = self.tls.files()?;
        told_tls(tls.as_ref())?;
        match (&mut lazy.page_server, tls) {
            (Some(_), _) if lazy.handler.is_some() => {
                wrong("--page-server and --page-handler: one of the two brings the guest's memory")
            }
            (None, Some(_)) => wrong("ctl load: --tls-cert and the like are for --page-server"),
            (None, None) => Ok(()),
            (Some(server), tls) => {
                if let Address::Unix(path) = &server.address {
                    let path = super::told_path("--page-server", path.clone())?;
                    server.address = Address::Unix(path);
                }
                server.tls = tls;
                Ok(())
            }
        }
    }

    /// All together, with the value of `--compress`.
    pub(super) fn migrate(self, compress: Option<OsString>) -> Result<Migrate, UsageError> {
        let compression = compress.map(|value| {
            let compression = value.string()?.parse::<Compression>();
            compression.map_err(|why| UsageError::Command(format!("--compress {why}")))
        });
        let compression = compression.transpose()?;
        let text = "ctl migrate: --to unix:PATH or --to tcp:HOST:PORT is missing: where `run --incoming` waits";
        let to = self.to.ok_or_else(|| UsageError::Command(text.into()))?;
        let to = match to {
            // The monitor has another working directory.
            Address::Unix(path) => Address::Unix(super::told_path("--to", path)?),
            other => other,
        };
        if self.listen.is_some() {
            let text = "ctl migrate: --listen is of migrate-recover, said to the monitor that the guest has gone to";
            return Err(UsageError::Command(text.into()));
        }
        let usual = MigrateRequest::new(to.to_string());
        let tls = self.tls.files()?;
        told_tls(tls.as_ref())?;
        Ok(Migrate {
            request: MigrateRequest {
                connections: self.connections.unwrap_or(usual.connections),
                compression: compression
                    .map_or(usual.compression, |compression| compression.to_string()),
                bandwidth_limit: self.bandwidth,
                downtime_ms: self.downtime.map_or(usual.downtime_ms, u64::from),
                time_s: self.time.map_or(usual.time_s, u64::from),
                when_stuck: self.when_stuck.unwrap_or_default(),
                postcopy: self.postcopy.unwrap_or_default(),
                tls,
                destination: usual.destination,
                report: self.report,
            },
        })
    }
}

/// Refuses files that the monitor cannot be told of.
fn told_tls(tls: Option<&TlsFiles>) -> Result<(), UsageError> {
    for (flag, file) in tls.iter().flat_map(|tls| {
        let (cert, key, ca) = (&tls.cert, &tls.key, &tls.ca);
        [("--tls-cert", cert), ("--tls-key", key), ("--tls-ca", ca)]
    }) {
        super::told_path(flag, file.clone())?;
    }
    Ok(())
}

/// Asks for it through the socket, and says on stderr how it goes until there is an answer.
///
/// # Errors
/// [`ClientError`].
pub(super) fn ask(
    socket: &std::path::Path,
    timeout: Duration,
    migrate: &Migrate,
) -> Result<Answer, ClientError> {
    let mut client = Client::connect(socket, timeout)?;
    client.wait_for(PATIENCE);
    let body = serde_json::to_value(&migrate.request).unwrap_or_default();
    let (sender, answers) = channel();
    let thread = std::thread::spawn(move || {
        // Nobody takes it: the process ends.
        let _ = sender.send(client.call("PUT", "/migrate", Some(&body)));
    });
    let began = Instant::now();
    let manner = Manner::of_stderr(true);
    let interval = manner.interval().max(INTERVAL);
    let mut progress = Progress::new(manner);
    let mut waits = Waits::new("a migration");
    let answer = loop {
        match answers.recv_timeout(interval) {
            Ok(answer) => break answer,
            Err(RecvTimeoutError::Timeout) => {}
            // The thread has sent before it ended.
            Err(RecvTimeoutError::Disconnected) => {
                let source = std::io::ErrorKind::UnexpectedEof.into();
                let path = socket.to_owned();
                break Err(ClientError::Gone { path, source });
            }
        }
        match record(socket, timeout).filter(|record| record.took.is_none()) {
            Some(record) => progress.show(&record, began.elapsed()),
            // It has not begun, or has ended.
            None => waits.look(socket),
        }
    };
    progress.end();
    let _ = thread.join();
    if let Some(path) = &migrate.request.report {
        let told = answer.as_ref().ok().and_then(|answer| answer.body.clone());
        let done = told.and_then(|body| serde_json::from_value(body).ok());
        // Of one that failed the monitor still knows it; of one that it did not begin it knows another's.
        let record = done.or_else(|| record(socket, timeout));
        let report = record.and_then(|record: MigrationRecord| record.report);
        let report = report.filter(|report| Some(report.path.as_str()) == path.to_str());
        if let Some(why) = report.and_then(|report| report.failed) {
            let text = format!("reference-vmm: no report: {}\n", printable(&why));
            crate::stderr::write(text.as_bytes());
        }
    }
    answer.map_err(in_doubt)
}

/// A monitor that was asked, and has not said what came of it: the guest may be anywhere.
fn in_doubt(error: ClientError) -> ClientError {
    let told = |what: &dyn std::fmt::Display| {
        format!(
            "in doubt: the guest may be here or at the destination, or have ended. Ask both (ctl migrate-status): where this monitor \
             answers, the guest is where it says, and a migration that is under way goes on; where it is gone, the guest is at the \
             destination if that says that it has come, and has ended if not: {what}"
        )
    };
    match error {
        ClientError::Gone { path, source } => ClientError::Gone {
            source: std::io::Error::new(source.kind(), told(&source)),
            path,
        },
        ClientError::Strange { path, why } => ClientError::Strange {
            why: told(&why),
            path,
        },
        // Nothing was asked of anybody.
        ClientError::Connect { .. } => error,
    }
}

/// What it does now.
fn record(socket: &std::path::Path, timeout: Duration) -> Option<MigrationRecord> {
    let mut client = Client::connect(socket, timeout).ok()?;
    let answer = client.call("GET", "/migrate", None).ok()?;
    match answer.fault() {
        None => serde_json::from_value(answer.body?).ok(),
        Some(_) => None,
    }
}

/// The record in words, or what a monitor says that waits for a guest, or waited.
pub(super) fn words(body: &Value) -> String {
    if let Ok(record) = serde_json::from_value::<MigrationRecord>(body.clone()) {
        return record.summary().trim_end().to_owned();
    }
    let address = super::text(&body["address"]);
    let came = serde_json::from_value::<Came>(body["guest"].clone()).ok();
    match (body["state"].as_str(), came) {
        (Some("waiting"), _) => {
            format!("a guest is waited for at {address}, and none is on its way")
        }
        (Some("coming"), Some(came)) => came.coming(&address),
        (Some("arrived"), Some(came)) => {
            format!("the guest has come here, to {address}, {}", came.arrived())
        }
        (Some("arrived"), None) => format!("the guest has come here, to {address}"),
        _ => body.to_string(),
    }
}
