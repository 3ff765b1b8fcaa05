// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-net, the network device (virtio 1.2, 5.1): the guest's Ethernet is a tap of the host's.
//!
//! ```text
//!   guest ─ transmit queue ─► tx ─ writev ─► tap ─► the host's network
//!         ◄─ receive queue ── rx ◄─ readv ──┘
//! ```
//!
//! Frames go straight between guest memory and the kernel. The header before each is the guest's own: with a driver
//! that accepts it, checksums and the segmentation of TCP and UDP are left to whoever is the last to need them, and
//! between two guests of a host that is nobody.
//!
//! # Queue pairs
//! Up to [`PAIRS_MOST`], each with a thread and a queue of the tap of its own; the kernel spreads flows over them. The
//! driver says by the control queue, which the first pair's thread serves, how many it uses; until then that is one.
//! The tap's other queues are detached.
//!
//! # What is lost, and what is not
//! A frame that was read from the tap waits until the guest has buffers for it, through a pause and a restore; while
//! it waits nothing is read, and the kernel drops what its own queue has no room for. What the guest sends waits for
//! the tap to have room. Dropped and counted ([`Counters`]) are frames that the kernel refuses, and frames that the
//! guest's buffers are too small for. When the tap is down or deleted the guest sees that it has no carrier.
//!
//! # What a guest is trusted with
//! It may send any frame, with any source address: who filters is the host's network (nftables, tc). The kernel
//! checks the headers. It receives what the tap is sent, whoever it is for.

mod config;
mod control;
pub mod fake;
mod handler;
pub mod iovecs;
mod pair;
mod rx;
pub mod tap;
mod tx;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use config::{BadMac, MTUS, Mac, NetConfig, NetConfigError, PAIRS_MOST};
pub use handler::PairHandler;
pub use pair::{Counter, Counters};

use self::handler::Accepted;
use self::pair::Shared;
use self::tap::{HEADER, KernelTap, Offload, Tap, TapError};
use super::device::{Activation, Assignment, VirtioDevice};
use super::fault::Fault;

/// The longest frame, bytes, its header included: the largest IP packet in Ethernet with two VLAN tags.
pub const FRAME_MOST: usize = HEADER + ETHERNET_MOST + 65535;

/// An Ethernet header with two VLAN tags, bytes.
const ETHERNET_MOST: usize = 14 + 8;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;

/// What is offered whatever the tap can do.
const ALWAYS: u64 = bit(VIRTIO_NET_F_CSUM)
    | bit(VIRTIO_NET_F_MAC)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | bit(VIRTIO_NET_F_STATUS);

/// What is offered with [`Offload::TCP`].
const TCP: u64 = bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN)
    | bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6)
    | bit(VIRTIO_NET_F_HOST_ECN);

/// What is offered with [`Offload::UDP`] besides.
const UDP: u64 =
    bit(VIRTIO_NET_F_GUEST_USO4) | bit(VIRTIO_NET_F_GUEST_USO6) | bit(VIRTIO_NET_F_HOST_USO);

/// With any of these the guest's buffers are for frames of up to 64 KiB.
const LONG_FRAMES: u64 = bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_USO4)
    | bit(VIRTIO_NET_F_GUEST_USO6);

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] NetConfigError),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The guest uses what this host's tap cannot do.
    #[error(
        "the guest uses network features {missing:#x} that the tap {tap:?} cannot have here: restore it on a host \
         whose kernel is as new"
    )]
    Features {
        /// The tap's name.
        tap: String,
        /// Feature bits.
        missing: u64,
    },
    /// A state that none was saved as.
    #[error("the state of a network device is none: {0}")]
    State(&'static str),
    /// The host refused.
    #[error("cannot {what}")]
    Host {
        /// What it was for.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl NetError {
    /// Whether the user asked for what cannot be; else the host refused.
    pub fn is_users_fault(&self) -> bool {
        match self {
            NetError::Config(_) | NetError::State(_) => true,
            NetError::Tap(error) => error.is_users_fault(),
            NetError::Features { .. } | NetError::Host { .. } => false,
        }
    }
}

/// A frame by which switches learn where `mac` is now: a request of RARP (RFC 903), which nobody answers, as QEMU sends it.
fn rarp(mac: Mac) -> [u8; 60] {
    let mut frame = [0; 60];
    let parts: [&[u8]; 8] = [
        // To all, from this address, of type RARP.
        &[0xff; 6],
        &mac.bytes(),
        &[0x80, 0x35],
        // Ethernet and IPv4 with addresses of 6 and 4 bytes; who am I?
        &[0, 1, 8, 0, 6, 4, 0, 3],
        &mac.bytes(),
        &[0; 4],
        &mac.bytes(),
        &[0; 4],
    ];
    let bytes = parts.into_iter().flatten();
    frame
        .iter_mut()
        .zip(bytes)
        .for_each(|(to, from)| *to = *from);
    frame
}

/// A network device.
#[derive(Debug)]
pub struct Net<T: Tap = KernelTap> {
    shared: Arc<Shared<T>>,
    mac: Mac,
    mtu: Option<u16>,
    offered: u64,
    /// Since the last activation; none after a reset.
    accepted: u64,
    queue_sizes: Vec<u16>,
    /// So many pairs the driver uses.
    pairs: usize,
    /// Of each pair: a frame that was read and not delivered; empty if there is none.
    frames: Vec<Vec<u8>>,
    /// The driver is to hear of the link as soon as it can.
    announce: bool,
}

/// A network device as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The guest's address.
    pub mac: Mac,
    /// Queue pairs that there are.
    pub queues: u16,
    /// The MTU that the guest was told, bytes.
    pub mtu: Option<u16>,
    /// Feature bits that were offered.
    pub offered: u64,
    /// Feature bits that the driver accepted.
    pub accepted: u64,
    /// Queue pairs that the driver uses.
    pub pairs: u16,
    /// Whether the guest saw a carrier.
    pub link: bool,
    /// Of each pair: a frame that was read from the tap and not delivered, with its header; empty if there is none.
    pub frames: Vec<Vec<u8>>,
}

impl<T: Tap> Net<T> {
    /// A device at a tap with these queues, which are attached, and whose kernel can do this for a guest. `name` is
    /// the tap's, for messages.
    ///
    /// # Errors
    /// [`NetConfigError`], and [`NetError::Host`]: no descriptors.
    pub fn new(
        name: &str,
        mac: Mac,
        mtu: Option<u16>,
        taps: Vec<T>,
        offload: Offload,
    ) -> Result<Self, NetError> {
        let config = NetConfig {
            mac: Some(mac),
            queues: u16::try_from(taps.len()).unwrap_or(u16::MAX),
            mtu,
            ..NetConfig::new(name)
        };
        config.check()?;
        let queues = taps.len();
        let shared = Shared::new(name.to_owned(), taps).map_err(|source| NetError::Host {
            what: "make an eventfd",
            source,
        })?;
        let mut offered = ALWAYS;
        if offload.0 & Offload::TCP.0 == Offload::TCP.0 {
            offered |= TCP;
        }
        if offload.0 & Offload::UDP.0 == Offload::UDP.0 {
            offered |= UDP;
        }
        if mtu.is_some() {
            offered |= bit(VIRTIO_NET_F_MTU);
        }
        let mut count = 2 * queues;
        if queues > 1 {
            offered |= bit(VIRTIO_NET_F_CTRL_VQ) | bit(VIRTIO_NET_F_MQ);
            count += 1;
        }
        Ok(Net {
            shared: Arc::new(shared),
            mac,
            mtu,
            offered,
            accepted: 0,
            queue_sizes: vec![QUEUE_SIZE; count],
            pairs: 1,
            frames: vec![Vec::new(); queues],
            announce: false,
        })
    }

    /// A device in this state, at a tap with as many queues.
    ///
    /// # Errors
    /// [`NetError::State`], [`NetError::Features`], and those of [`new`](Self::new).
    pub fn from_state(
        name: &str,
        state: &NetState,
        taps: Vec<T>,
        offload: Offload,
    ) -> Result<Self, NetError> {
        if taps.len() != usize::from(state.queues) || state.frames.len() != taps.len() {
            return Err(NetError::State("its queue pairs are not the tap's"));
        }
        if state.pairs == 0 || state.pairs > state.queues {
            return Err(NetError::State("more queue pairs are used than there are"));
        }
        if state.frames.iter().any(|frame| frame.len() > FRAME_MOST) {
            return Err(NetError::State("a frame is longer than one can be"));
        }
        if state
            .frames
            .iter()
            .any(|frame| (1..=HEADER).contains(&frame.len()))
        {
            return Err(NetError::State("a frame is shorter than its header"));
        }
        let mut net = Net::new(name, state.mac, state.mtu, taps, offload)?;
        let missing = state.accepted & state.offered & !net.offered;
        if missing != 0 {
            let tap = name.to_owned();
            return Err(NetError::Features { tap, missing });
        }
        net.offered &= state.offered;
        net.accepted = state.accepted;
        net.pairs = state.pairs.into();
        net.frames = state.frames.clone();
        net.announce = !state.link;
        Ok(net)
    }

    /// The guest's address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// What it counts, from now on and wherever the device goes.
    pub fn counters(&self) -> impl Fn() -> [(&'static str, u64); 4] + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || {
            let counters = &shared.counters;
            [
                ("rx_frames", counters.rx_frames.get()),
                ("rx_dropped", counters.rx_dropped.get()),
                ("tx_frames", counters.tx_frames.get()),
                ("tx_dropped", counters.tx_dropped.get()),
            ]
        }
    }

    /// `virtio_net_config` (5.1.4), as far as it is of what is offered.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.bytes());
        let status = match self.shared.link() {
            true => VIRTIO_NET_S_LINK_UP as u16,
            false => 0,
        };
        config[6..8].copy_from_slice(&status.to_le_bytes());
        if self.offered & bit(VIRTIO_NET_F_MQ) != 0 {
            let pairs = self.shared.pairs.len() as u16;
            config[8..10].copy_from_slice(&pairs.to_le_bytes());
        }
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    /// What a driver with these features takes over from the kernel.
    fn offload(features: u64) -> Offload {
        let has = |feature| features & bit(feature) != 0;
        if !has(VIRTIO_NET_F_GUEST_CSUM) {
            // The others need it (5.1.3.1).
            return Offload::NONE;
        }
        let mut offload = libc::TUN_F_CSUM;
        let uso = has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6);
        let segments = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        for (of, bits) in [
            (has(VIRTIO_NET_F_GUEST_TSO4), libc::TUN_F_TSO4),
            (has(VIRTIO_NET_F_GUEST_TSO6), libc::TUN_F_TSO6),
            (has(VIRTIO_NET_F_GUEST_ECN) && segments, libc::TUN_F_TSO_ECN),
            (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ] {
            offload |= if of { bits } else { 0 };
        }
        Offload(offload)
    }
}

impl<T: Tap> VirtioDevice for Net<T> {
    type Handler = PairHandler<T>;
    type State = NetState;
    const DEVICE_ID: u32 = VIRTIO_ID_NET;
    const NAME: &'static str = "virtio-net";

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = config.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(there) {
            *to = *from;
        }
    }

    fn activate(
        &mut self,
        activation: &Activation,
    ) -> Result<Vec<Assignment<PairHandler<T>>>, Fault> {
        let host = |what| move |source| Fault::Host { what, source };
        let multiqueue = activation.has(VIRTIO_NET_F_MQ);
        if !multiqueue {
            self.pairs = 1;
        }
        let shared = &self.shared;
        shared
            .set_pairs(self.pairs)
            .map_err(host("attach the tap's queues"))?;
        if let Some(first) = shared.pairs.first() {
            let offload = first.tap.set_offload(Self::offload(activation.features));
            offload.map_err(host(
                "have the tap leave checksums and segments to the guest",
            ))?;
        }
        self.accepted = activation.features;
        let status = activation.has(VIRTIO_NET_F_STATUS);
        let mtu = usize::from(self.mtu.unwrap_or(0)).max(1500);
        let features = Accepted {
            merged: activation.has(VIRTIO_NET_F_MRG_RXBUF),
            status,
            multiqueue,
            longest: match activation.features & LONG_FRAMES {
                0 => HEADER + ETHERNET_MOST + mtu,
                _ => FRAME_MOST,
            },
        };
        // The control queue comes behind all pairs that the driver knows of (5.1.2).
        let pairs = match multiqueue {
            true => shared.pairs.len(),
            false => 1,
        };
        let control = activation.has(VIRTIO_NET_F_CTRL_VQ);
        let handlers = shared.pairs.iter().zip(&mut self.frames).enumerate();
        let assignments = handlers.take(pairs).map(|(number, (pair, frame))| {
            // There are at most 8.
            let first = 2 * number as u16;
            let mut queues = vec![first, first + 1];
            if number == 0 && control {
                queues.push(2 * pairs as u16);
            }
            let frame = std::mem::take(frame);
            let handler = PairHandler::new(shared, (number, pair), features, frame);
            Assignment { queues, handler }
        });
        let assignments = assignments.collect();
        if std::mem::take(&mut self.announce) && status {
            activation.driver.configuration_changed();
        }
        Ok(assignments)
    }

    fn retire(&mut self, handlers: Vec<PairHandler<T>>) {
        for handler in handlers {
            let (number, frame) = handler.into_frame();
            if let Some(place) = self.frames.get_mut(number) {
                *place = frame;
            }
        }
        self.pairs = self.shared.pairs.iter().filter(|pair| *pair.on()).count();
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.pairs = 1;
        self.frames.iter_mut().for_each(Vec::clear);
    }

    fn let_go(&self) -> io::Result<()> {
        for pair in &self.shared.pairs {
            if let Err(error) = pair.tap.let_go() {
                // The first error counts.
                let _ = self.take_back();
                return Err(error);
            }
        }
        Ok(())
    }

    fn take_back(&self) -> io::Result<()> {
        for pair in &self.shared.pairs {
            pair.tap.take_back()?;
            if !*pair.on() {
                pair.tap.set_attached(false)?;
            }
        }
        Ok(())
    }

    fn announce(&self) {
        let Some(first) = self.shared.pairs.first() else {
            return;
        };
        let mut frame = vec![0; tap::HEADER];
        frame.extend(rarp(self.mac));
        // An interface that is down hears of it as little as of any other frame.
        if let Err(error) = first.tap.write_bytes(&frame) {
            log::warn!(
                "the guest's network address {} could not be announced: {error}",
                self.mac
            );
        }
    }

    fn state(&self) -> NetState {
        NetState {
            mac: self.mac,
            queues: self.shared.pairs.len() as u16,
            mtu: self.mtu,
            offered: self.offered,
            accepted: self.accepted,
            pairs: self.pairs as u16,
            link: self.shared.link(),
            frames: self.frames.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_frame_to_all_from_the_guests_address() {
        let frame = rarp("02:00:00:00:00:07".parse().unwrap());
        let address = [2, 0, 0, 0, 0, 7];
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &address[..]));
        // RARP's request, for whoever this is.
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(
            (&frame[22..28], &frame[32..38]),
            (&address[..], &address[..])
        );
        assert!(frame[38..].iter().all(|byte| *byte == 0));
    }
}
