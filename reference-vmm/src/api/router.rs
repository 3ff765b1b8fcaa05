// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a request to what is to be done, and from what came of it to the response. Nothing is done here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use kvm_core::arch::x86_64::state::ClockRestore;

use super::http::{Request, Response, Status};
use super::load::LoadRequest;
use crate::lazy::{LazySaid, OnLoss, PageServerAt};
use crate::migration::address::Address;
use crate::migration::outgoing::{MigrateRequest, Order};
use crate::migration::recover::{Recover, Said};
use crate::migration::tls::TlsFiles;
use crate::snapshot::disks::DiskCopies;
use crate::snapshot::files::MEMORY;
use crate::snapshot::packed::Compression;
use crate::snapshot::{SnapshotKind, SnapshotRequest};

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// `GET /`: who this is, and whether it runs.
    Describe,
    /// `GET /version`.
    Version,
    /// `GET /machine-config`.
    MachineConfig,
    /// `GET /vm/config`.
    VmConfig,
    /// `GET /stats`, which Firecracker has not: what the guest has done so far, in numbers.
    Stats,
    /// `PATCH /vm` with `{"state": "Paused"}`.
    Pause,
    /// `PATCH /vm` with `{"state": "Resumed"}`.
    Resume,
    /// `PUT /snapshot/create` with `{"snapshot_path": DIR}`: Firecracker's `snapshot_path` is a file's, beside which there
    /// is `mem_file_path`; here it is the directory with both.
    ///
    /// `snapshot_type` is `Full` or `Diff`. Not Firecracker's are `base`, the snapshot that a `Diff` builds on, without which
    /// it is the last; `track`, whether writes behind it are tracked ([`SnapshotRequest::track`]); `compress` (`zstd`,
    /// `none`); `disks` (`name`, `reflink`, `copy`); `background`, whether memory is written when the guest goes on already
    /// ([`background`](crate::snapshot::background)): the answer has what that cost then.
    Snapshot(SnapshotRequest),
    /// `PUT /snapshot/load`.
    Load(LoadRequest),
    /// `PUT /actions` with `{"action_type": "InstanceStart"}`.
    Start,
    /// `PUT /migrate`, which Firecracker has not: to move the guest to another process. The answer comes when it is there.
    Migrate(Box<MigrateRequest>),
    /// `GET /migrate`: what the migration that is under way does, or the last one did.
    Migration,
    /// `PATCH /migrate` with `{"order": "Cancel"}`: to give it up. With `"Postcopy"`: the guest goes now, before its memory. With `"Here"` or `"There"`, when the destination cannot
    /// be asked: where the guest is.
    MigrateOrder(Order),
    /// `PATCH /migrate` with `{"order": "Recover", "to": ADDRESS}` at the source, `"listen"` at the destination: another way for
    /// the memory of a guest that has gone before it.
    Recover(Recover),
    /// `PUT /actions` with `{"action_type": "SendCtrlAltDel"}`: the power button, by which this machine's guests are asked
    /// to power off. It has no keyboard.
    PowerButton,
}

impl Action {
    /// Whether it waits: for the guest's I/O, for files, for the resolver. Such a one is done on the server's worker, one after another; a
    /// short one is done at once, also while a long one is at work, and must not wait for it.
    pub fn is_long(&self) -> bool {
        match self {
            Action::Pause
            | Action::Resume
            | Action::Snapshot(_)
            | Action::Load(_)
            | Action::Migrate(_)
            | Action::Recover(_) => true,
            Action::Describe
            | Action::Version
            | Action::MachineConfig
            | Action::VmConfig
            | Action::Stats
            | Action::Start
            | Action::Migration
            | Action::MigrateOrder(_)
            | Action::PowerButton => false,
        }
    }

    /// Whether it is [long](Self::is_long) and the guest runs meanwhile: other long ones are done beside it.
    pub fn is_background(&self) -> bool {
        matches!(self, Action::Snapshot(request) if request.background)
    }

    /// Whether it is [long](Self::is_long) and of a migration that is at work: it waits for nothing but others of its kind.
    pub fn is_of_migration(&self) -> bool {
        matches!(self, Action::Recover(_))
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// This JSON is the answer.
    Json(String),
    /// It is done, and this JSON says more of it to who [wants that](Request::wants_all): others hear what Firecracker says.
    Report(String),
    /// It was not done, and nothing has changed; why.
    Refused(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    state: State,
}

#[derive(Deserialize)]
enum State {
    Paused,
    Resumed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    #[serde(default)]
    snapshot_type: SnapshotType,
    snapshot_path: PathBuf,
    mem_file_path: Option<PathBuf>,
    base: Option<PathBuf>,
    track: Option<bool>,
    #[serde(default)]
    compress: Compression,
    #[serde(default)]
    disks: DiskCopies,
    #[serde(default)]
    background: bool,
}

#[derive(Default, Deserialize)]
enum SnapshotType {
    #[default]
    Full,
    Diff,
}

/// Firecracker's `SnapshotLoadParams`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Load {
    snapshot_path: PathBuf,
    mem_file_path: Option<PathBuf>,
    mem_backend: Option<MemoryBackend>,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default)]
    track_dirty_pages: bool,
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    vsock_override: Option<VsockOverride>,
    clock_realtime: Option<bool>,
    /// Not Firecracker's.
    lazy: Option<bool>,
    on_loss: Option<Loss>,
    /// Seconds, and the next one.
    page_deadline: Option<u64>,
    record: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Loss {
    Stop,
    Poison,
}

/// The seconds of `field`.
fn seconds(field: &str, said: Option<u64>) -> Result<Option<Duration>, Response> {
    let range = LazySaid::SECONDS;
    match said {
        Some(said) if !u32::try_from(said).is_ok_and(|said| range.contains(&said)) => {
            Err(bad(format!(
                "{field} {said}: a whole number of seconds from {} to {}.",
                range.start(),
                range.end()
            )))
        }
        said => Ok(said.map(Duration::from_secs)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryBackend {
    backend_type: BackendType,
    backend_path: PathBuf,
    /// Not Firecracker's; of a [`BackendType::PageServer`].
    tls: Option<TlsFiles>,
}

#[derive(Deserialize)]
enum BackendType {
    File,
    Uffd,
    /// Not Firecracker's.
    PageServer,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkOverride {
    iface_id: String,
    host_dev_name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockOverride {
    uds_path: PathBuf,
}

impl Load {
    fn request(self) -> Result<LoadRequest, Response> {
        let (mut handler, mut page_server) = (None, None);
        let file = match (self.mem_file_path, self.mem_backend) {
            (Some(_), Some(_)) => {
                let text = "too many fields: mem_backend and mem_file_path are the same thing.";
                return Err(bad(text.into()));
            }
            (file, None) => file,
            (
                None,
                Some(MemoryBackend {
                    tls: Some(_),
                    backend_type: BackendType::File | BackendType::Uffd,
                    ..
                }),
            ) => {
                return Err(bad("tls is of a PageServer alone.".into()));
            }
            (None, Some(backend)) => match backend.backend_type {
                BackendType::File => Some(backend.backend_path),
                // Not a file: the socket of who has it.
                BackendType::Uffd => {
                    handler = Some(backend.backend_path);
                    None
                }
                // Neither: an address.
                BackendType::PageServer => {
                    let text = backend.backend_path.to_string_lossy();
                    let address = text.parse::<Address>();
                    page_server = Some(Box::new(PageServerAt {
                        address: address.map_err(|error| bad(format!("backend_path: {error}.")))?,
                        tls: backend.tls,
                    }));
                    None
                }
            },
        };
        check_memory(&self.snapshot_path, file.as_deref())?;
        let nets = self.network_overrides.into_iter().map(|of| {
            let number = of.iface_id.strip_prefix("net");
            let number = number.filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
            match number.and_then(|number| number.parse().ok()) {
                Some(number) => Ok((number, of.host_dev_name)),
                None => Err(bad(format!(
                    "There is no network card {:?}: they are net0, net1 and so on, as GET /vm/config says them.",
                    of.iface_id
                ))),
            }
        });
        let lazy = LazySaid {
            lazy: self.lazy == Some(true),
            on_loss: self.on_loss.map(|on_loss| match on_loss {
                Loss::Stop => OnLoss::Stop,
                Loss::Poison => OnLoss::Poison,
            }),
            deadline: seconds("page_deadline", self.page_deadline)?,
            record: seconds("record", self.record)?,
            handler,
            page_server,
        };
        if self.lazy == Some(false) && lazy.any() {
            return Err(bad(
                "lazy is false, and on_loss, page_deadline, record and a mem_backend of Uffd or PageServer each mean that it is \
                 true: leave out the one or the other."
                    .into(),
            ));
        }
        Ok(LoadRequest {
            nets: nets.collect::<Result<_, _>>()?,
            dir: self.snapshot_path,
            resume: self.resume_vm,
            // The second is the first's older name.
            track: self.track_dirty_pages || self.enable_diff_snapshots,
            uds: self.vsock_override.map(|of| of.uds_path),
            lazy,
            clock: self.clock_realtime.map(|advanced| match advanced {
                true => ClockRestore::Advanced,
                false => ClockRestore::AsSaved,
            }),
        })
    }
}

/// Whether `memory` is the file in `dir`, where it is said at all.
fn check_memory(dir: &Path, memory: Option<&Path>) -> Result<(), Response> {
    match memory {
        Some(memory) if memory != dir.join(MEMORY) => Err(bad(
            "A snapshot of this monitor's is a directory, snapshot_path, with the guest's memory in it: leave \
             mem_file_path out."
                .into(),
        )),
        _ => Ok(()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MigrateOrder {
    order: OrderWord,
    to: Option<String>,
    tls_name: Option<String>,
    listen: Option<String>,
}

#[derive(Deserialize)]
enum OrderWord {
    Cancel,
    Postcopy,
    Here,
    There,
    Recover,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Actions {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

/// What `request` asks for.
///
/// # Errors
/// The response to one that asks for nothing that there is. Firecracker says 400 to a path or a method that it has not;
/// here that is 404 and 405, which its clients take for the same.
pub fn route(request: &Request) -> Result<Action, Response> {
    // One slash at the end is as good as none.
    let path = match request.path.as_str() {
        "/" => "/",
        path => path.strip_suffix('/').unwrap_or(path),
    };
    let get = |action| {
        allow(request, "GET")?;
        match request.body.is_empty() {
            true => Ok(action),
            false => Err(bad("GET request cannot have a body.".into())),
        }
    };
    match path {
        "/" => get(Action::Describe),
        "/version" => get(Action::Version),
        "/machine-config" => get(Action::MachineConfig),
        "/vm/config" => get(Action::VmConfig),
        "/stats" => get(Action::Stats),
        "/vm" => match body::<Vm>(request, "PATCH")?.state {
            State::Paused => Ok(Action::Pause),
            State::Resumed => Ok(Action::Resume),
        },
        "/snapshot/create" => {
            let Snapshot {
                snapshot_type,
                snapshot_path: dir,
                mem_file_path: memory,
                base,
                track,
                compress,
                disks,
                background,
            } = body(request, "PUT")?;
            let kind = match (snapshot_type, base) {
                (SnapshotType::Full, None) => SnapshotKind::Full,
                (SnapshotType::Full, Some(_)) => {
                    return Err(bad(
                        "A full snapshot builds on no other: base is a Diff's, or snapshot_type is to be Diff.".into(),
                    ));
                }
                (SnapshotType::Diff, base) => SnapshotKind::Diff { base },
            };
            check_memory(&dir, memory.as_deref())?;
            Ok(Action::Snapshot(SnapshotRequest {
                kind,
                track,
                compression: compress,
                disks,
                background,
                ..SnapshotRequest::new(dir)
            }))
        }
        "/snapshot/load" => Ok(Action::Load(body::<Load>(request, "PUT")?.request()?)),
        "/migrate" => match request.method.as_str() {
            "PUT" => Ok(Action::Migrate(Box::new(body(request, "PUT")?))),
            "PATCH" => {
                let MigrateOrder {
                    order,
                    to,
                    tls_name,
                    listen,
                } = body(request, "PATCH")?;
                let said = Said {
                    to,
                    tls_name,
                    listen,
                };
                Ok(Action::MigrateOrder(match order {
                    OrderWord::Recover => {
                        let recover = said.recover().map_err(bad)?;
                        return Ok(Action::Recover(recover));
                    }
                    _ if !said.is_none() => {
                        return Err(bad(
                            "to, tls_name and listen are of the order Recover".into()
                        ));
                    }
                    OrderWord::Cancel => Order::Cancel,
                    OrderWord::Postcopy => Order::Postcopy,
                    OrderWord::Here => Order::Here,
                    OrderWord::There => Order::There,
                }))
            }
            _ => get(Action::Migration),
        },
        "/actions" => match body::<Actions>(request, "PUT")?.action_type {
            ActionType::SendCtrlAltDel => Ok(Action::PowerButton),
            ActionType::InstanceStart => Ok(Action::Start),
            ActionType::FlushMetrics => Err(bad(
                "This monitor writes no metrics to a file; GET /stats has its numbers.".into(),
            )),
        },
        _ => Err(Response::fault(
            Status::NotFound,
            format!(
                "Invalid request method and/or path: {} {}.",
                request.method, request.path
            ),
        )),
    }
}

/// The response to what came of a request; `all` is what it [wants](Request::wants_all).
pub fn respond(outcome: Outcome, all: bool) -> Response {
    match outcome {
        Outcome::Report(_) if !all => Response::done(),
        Outcome::Done => Response::done(),
        Outcome::Json(body) | Outcome::Report(body) => Response::json(body),
        Outcome::Refused(why) => bad(why),
    }
}

fn bad(message: String) -> Response {
    Response::fault(Status::BadRequest, message)
}

/// Refuses another method than `method`.
fn allow(request: &Request, method: &'static str) -> Result<(), Response> {
    if request.method == method {
        return Ok(());
    }
    let text = format!(
        "Invalid request method and/or path: {} {}.",
        request.method, request.path
    );
    let mut refusal = Response {
        allow: Some(method),
        ..Response::fault(Status::MethodNotAllowed, text)
    };
    // A response to HEAD has no body.
    if request.method == "HEAD" {
        refusal.body = None;
    }
    Err(refusal)
}

/// The body of a request that has to have one.
fn body<T: DeserializeOwned>(request: &Request, method: &'static str) -> Result<T, Response> {
    allow(request, method)?;
    if request.body.is_empty() {
        return Err(bad(format!("Empty {method} request.")));
    }
    serde_json::from_slice(&request.body).map_err(|error| {
        bad(format!(
            "An error occurred when deserializing the json body of a request: {error}."
        ))
    })
}
