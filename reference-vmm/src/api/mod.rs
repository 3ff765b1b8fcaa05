// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `run --api-sock PATH`: the control socket, HTTP/1.1 over a Unix socket with Firecracker's paths, bodies and status
//! codes, so that its clients work here. [`ctl`](crate::ctl) is one of our own.
//!
//! ```text
//!   socket ──► server ── bytes ──► http ── request ──► router ── action ──► (worker) ──► Monitor (the machine)
//!   (thread       ▲                                                                         │
//!     "api")      └── bytes ◄── http ◄── response ◄── router ◄── outcome ◄───────────────────┘
//! ```
//!
//! [`http`] and [`router`] are functions of bytes and values; only [`server`] knows sockets.
//!
//! | request | what it does |
//! | --- | --- |
//! | `GET /` | `id`, `state` (`Running`, `Paused`, `Not started`), `vmm_version`, `app_name`; of a guest whose memory comes later `lazy` ([`LazyProgress`](crate::lazy::LazyProgress)) |
//! | `GET /version` | this program's version, as `firecracker_version`: the name that clients read |
//! | `GET /machine-config` | vCPUs, memory, threads, huge pages |
//! | `GET /vm/config` | the same, kernel, disks, cards, vsock, entropy: as far as Firecracker has words for it |
//! | `GET /stats` | not Firecracker's: what `--stats=json` says, now |
//! | `PATCH /vm` | `{"state": "Paused"}` or `"Resumed"` ([`vm::control`](crate::vm::control)) |
//! | `PUT /snapshot/create` | `{"snapshot_path": DIR}` ([`snapshot`](crate::snapshot)); to who sends `Prefer: return=representation` (RFC 7240) a 200 with what it cost the guest |
//! | `PUT /snapshot/load` | the same, where the monitor waits for it ([`load`]) |
//! | `PUT /migrate` | not Firecracker's: moves the guest to another process ([`migration`](crate::migration)); `GET` says how it goes (at the destination: `role`, `address`, `state`: `waiting` or `arrived`), `PATCH` with `{"order": "Cancel"}` gives it up, with `"Postcopy"` it has the guest go before its memory, with `"Recover"` and an address (`"to"` at the source, `"listen"` at the destination) that memory goes another way |
//! | `PUT /actions` | `{"action_type": "SendCtrlAltDel"}` presses the power button |
//!
//! Success is 200 with JSON or 204 with nothing; what is refused is 400 with `{"fault_message": …}`, and has changed
//! nothing. To ask for the state that there is is no error. A path that there is not is 404, a method 405. The machine
//! starts by itself: `InstanceStart` and all that Firecracker takes before it are refused, but for `PUT /snapshot/load`
//! where the monitor was started to wait for it (`restore` without `--from`).
//!
//! # The parser
//!
//! httparse, hyper's: fuzzed by many, no dependencies, and only heads. Firecracker's `micro_http` is on no registry (the
//! crate of that name is another), dbs-uhttp is a copy of it that has not moved with it, and both come with a server of
//! their own, whose clients can wait for each other.
//!
//! # Clients
//!
//! Who can connect owns the guest; the socket is its user's alone (mode 0600). What is limited is what one can do by
//! mistake: heads, bodies, headers and connections are bounded ([`http`], [`server::MAX_CONNECTIONS`]), a client that
//! reads nothing is read from no more, and one that is silent loses its connection to newcomers when there are too many.
//! [`client`] in turn bounds what it takes for an answer, and how long it waits for all of it.
//!
//! The socket is there as soon as the configuration is known to be good, and answers when the guest has started, or is
//! waited for: to be loaded, to come by migration, or to have memory that another process brings. It goes with the guest: what
//! is under way then gets no answer.
//!
//! # One after another, and meanwhile
//!
//! What takes its time ([`Action::is_long`](router::Action::is_long): a pause, a resume, a snapshot, a load) is done in the
//! order in which it came, one after another, on a thread of its own; its answer goes to the connection that asked. All
//! else is answered meanwhile. Up to [`worker::MAX_WAITING`] requests wait for the one that is at work, and one more is
//! refused. A connection that is closed loses its answer: what has begun is done to its end, what still waits is not begun, and
//! what waits for memory is given up ([`Monitor::perform_while`]), a load whose guest has not begun among that.
//! A snapshot in the [background](crate::snapshot::background) has a thread of its own, and others are done beside it.
//! So has another way for a migration (`Recover`), which may wait for the resolver.
//! What is not done beside that, or beside a migration, is refused at once, and does not wait ([`worker::Busy`]).
//!
//! # In a program of one's own
//!
//! ```no_run
//! use reference_vmm::api::{self, Server};
//! # use reference_vmm::vm::Running;
//! # fn serve(running: &Running, end: &reference_vmm::end::EndSignal) -> Result<(), Box<dyn std::error::Error>> {
//! let server = Server::bind("/run/guest.api".as_ref())?;
//! let machine = api::Machine::new(running, end);
//! std::thread::scope(|scope| {
//!     let thread = scope.spawn(|| server.serve(&machine));
//!     // … until the guest's end.
//!     server.stop();
//!     thread.join()
//! });
//! # Ok(())
//! # }
//! ```

pub mod client;
pub mod http;
pub mod load;
pub mod monitor;
pub mod router;
pub mod server;
pub mod worker;

pub use client::Client;
pub use monitor::{Machine, Monitor};
pub use server::{ListenError, Server};
