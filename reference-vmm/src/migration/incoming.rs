// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `run --incoming ADDRESS`: a process that waits for a guest, and has it go on.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use kvm_core::arch::x86_64::state::ClockRestore;

use super::address::Address;
use super::arriving::Arrival;
use super::coming::{Coming, Tell};
use super::destination::{Patience, ReceiveError, receive};
use super::dial::{Also, Ear};
use super::guest::Refusal;
use super::tls::{Tls, TlsError, TlsFiles};
use super::transport::{BindError, Listener};
use crate::devices::virtio::block::{Image, OpenError};
use crate::end::EndSignal;
use crate::lazy::LazyRequest;
use crate::snapshot::Overrides;
use crate::vm::{BuildError, Machine, Running};

/// What is waited for, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IncomingRequest {
    /// Where the source connects to.
    pub address: Address,
    /// By what the two know each other: needed beyond loopback.
    pub tls: Option<TlsFiles>,
    /// What the machine has of its own here, as a snapshot's has that goes on.
    pub overrides: Overrides,
    /// What the guest sees of the time that it stood still.
    pub clock: ClockRestore,
    /// How memory comes that the guest is there before (post-copy): how long the source is waited for, and what becomes of
    /// the guest if it does not come back.
    pub lazy: LazyRequest,
}

/// How long who touches a page waits for the source of a post-copy, where nobody says.
pub const PAGE_DEADLINE: Duration = Duration::from_secs(300);

/// How memory comes later, where nobody says.
pub(crate) fn usual_lazy() -> LazyRequest {
    LazyRequest {
        deadline: PAGE_DEADLINE,
        ..LazyRequest::default()
    }
}

impl IncomingRequest {
    /// At `address`, with all as it was.
    pub fn new(address: Address) -> Self {
        IncomingRequest {
            address,
            tls: None,
            overrides: Overrides::default(),
            clock: ClockRestore::Advanced,
            lazy: usual_lazy(),
        }
    }
}

/// No guest came.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// TLS cannot be had.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A disk of [`IncomingRequest::overrides`] is not there.
    #[error("--disk: {0}")]
    Disk(#[from] OpenError),
    /// One cannot listen there.
    #[error("--incoming: {0}")]
    Bind(#[from] BindError),
    /// It was waited for, or had begun to come.
    #[error("no guest has come, and none is waited for any more: {0}")]
    Receive(#[from] ReceiveError),
}

impl IncomingError {
    /// The process's exit status: 2 the arguments were wrong, 1 anything else.
    pub fn exit_status(&self) -> u8 {
        match self {
            IncomingError::Disk(error) if !error.is_users_fault() => 1,
            IncomingError::Tls(_) | IncomingError::Disk(_) => 2,
            // As of every socket: who has it now may be gone in a moment.
            IncomingError::Bind(error) if error.is_users_fault() => 2,
            IncomingError::Bind(_) | IncomingError::Receive(_) => 1,
        }
    }
}

/// Listens for a guest.
pub struct Incoming {
    ear: Ear,
    address: Address,
    overrides: Overrides,
    clock: ClockRestore,
    coming: Arc<Coming>,
    offered: Option<Tell>,
    lazy: LazyRequest,
    prepared: Option<Box<dyn FnOnce() + Send>>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Incoming");
        shown.field("ear", &self.ear).finish_non_exhaustive()
    }
}

impl Incoming {
    /// Listens. A source may connect from now on.
    ///
    /// # Errors
    /// [`IncomingError::Tls`], [`IncomingError::Disk`], [`IncomingError::Bind`]; nothing was made.
    pub fn bind(request: &IncomingRequest) -> Result<Self, IncomingError> {
        let tls = request.tls.as_ref().map(Tls::load).transpose()?;
        // Whether they are the guest's disks is known when it is offered.
        for (_, path) in &request.overrides.disks {
            Image::is_there(path)?;
        }
        let listener = Listener::bind(&request.address, tls.as_ref())?;
        Ok(Incoming {
            address: listener.address().clone(),
            ear: Ear::new(listener),
            overrides: request.overrides.clone(),
            clock: request.clock,
            coming: Arc::default(),
            offered: None,
            lazy: request.lazy.clone(),
            prepared: None,
        })
    }

    /// What is known of the guest that comes, while [`receive`](Self::receive) waits for it and behind that.
    pub fn coming(&self) -> Arc<Coming> {
        Arc::clone(&self.coming)
    }

    /// Has `tell` called when a guest was offered that can be here, before its memory comes.
    pub fn when_offered(&mut self, tell: impl FnOnce(&Coming) + Send + 'static) {
        self.offered = Some(Box::new(tell));
    }

    /// Has `tell` called when the machine is whole, before the source is told so: from then on it may be the guest at any
    /// moment.
    pub fn when_prepared(&mut self, tell: impl FnOnce() + Send + 'static) {
        self.prepared = Some(Box::new(tell));
    }

    /// Where, with the port that the system chose.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Has it listen elsewhere too, as long as a connection of the source's may come: also when the guest is here, and its
    /// memory follows it.
    pub fn also(&self) -> Arc<Also> {
        self.ear.also()
    }

    /// Waits for a guest, and has it go on: `start` starts the machine, with its serial console's output on `console` and its
    /// end told to `end`. `stop` says why it is not waited for any more, if so.
    ///
    /// `start` is called while the guest is the source's still. What it returns stands still and cannot be resumed
    /// ([`ControlError::HandOver`](crate::vm::ControlError::HandOver)), whether it was started so or not; it goes on when the
    /// source has let go of it. If `start` fails, the guest goes on at the source.
    ///
    /// # Errors
    /// [`IncomingError::Receive`]; nothing is left of it.
    pub fn receive(
        self,
        console: impl AsFd,
        end: &Arc<EndSignal>,
        stop: &(dyn Fn() -> Option<String> + Sync),
        start: impl FnOnce(Machine) -> Result<Running, BuildError>,
    ) -> Result<Running, IncomingError> {
        let start = |machine: Machine| start(machine).map_err(|error| Refusal::of(&error));
        let arrival = Arrival {
            overrides: self.overrides,
            clock: self.clock,
            lazy: self.lazy,
            console,
            end: Arc::clone(end),
            coming: Arc::clone(&self.coming),
            source: None,
            offered: self.offered,
            prepared: self.prepared,
            start,
        };
        let arrived = receive(self.ear, arrival, Patience::default(), stop)?;
        self.coming.has_arrived();
        log::info!("the guest of migration {} goes on here", arrived.id);
        Ok(arrived.running)
    }
}
