// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread of a queue pair: when it reads the tap, when it writes it, and for what it waits otherwise.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::control;
use super::pair::{Pair, Shared};
use super::rx::{Rx, RxEnd, Turn};
use super::tap::Tap;
use super::tx::{Tx, TxEnd};
use crate::devices::virtio::device::{Cx, Handler, Source};
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::interrupt::DriverLink;

/// The tap.
const TAP: u32 = 0;
/// The pair has come into use or out of it.
const CHANGED: u32 = 1;

/// Queues of a pair's handler, in its assignment's order.
const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;

/// Serves a queue pair, and the first one the control queue.
#[derive(Debug)]
pub struct PairHandler<T: Tap> {
    shared: Arc<Shared<T>>,
    pair: Arc<Pair<T>>,
    number: usize,
    features: Accepted,
    rx: Rx,
    tx: Tx,
    /// Nothing is read: the guest has no buffers.
    rx_waits: bool,
    /// Nothing is written: the tap has no room, or is down.
    tx_waits: bool,
    /// The tap cannot be used any more.
    gone: bool,
    /// For what of the tap the thread waits.
    watched: Option<EventSet>,
}

/// What the driver accepted, as far as a handler needs it.
#[derive(Clone, Copy, Debug)]
pub struct Accepted {
    /// `MRG_RXBUF`.
    pub merged: bool,
    /// `STATUS`: the driver hears of the link.
    pub status: bool,
    /// `MQ`.
    pub multiqueue: bool,
    /// The longest frame that it expects, header included.
    pub longest: usize,
}

impl<T: Tap> PairHandler<T> {
    /// The handler of the pair `number`, with a frame that was read before and not delivered, or none.
    pub fn new(
        shared: &Arc<Shared<T>>,
        (number, pair): (usize, &Arc<Pair<T>>),
        features: Accepted,
        frame: Vec<u8>,
    ) -> Self {
        PairHandler {
            shared: shared.clone(),
            pair: pair.clone(),
            number,
            features,
            rx: Rx::new(features.merged, features.longest, frame),
            tx: Tx::default(),
            rx_waits: false,
            tx_waits: false,
            gone: false,
            watched: (*pair.on()).then_some(EventSet::IN),
        }
    }

    /// The pair's number and the frame that was read and not delivered.
    pub fn into_frame(self) -> (usize, Vec<u8>) {
        (self.number, self.rx.into_frame())
    }

    /// The driver, if it hears of the link.
    fn listener<'a>(&self, driver: &'a DriverLink) -> Option<&'a DriverLink> {
        self.features.status.then_some(driver)
    }

    fn receive(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let end = self.rx.turn(Turn {
            memory: &**cx.memory,
            queue: &mut cx.queues[RX],
            tap: &self.pair.tap,
            counters: &self.shared.counters,
        })?;
        self.rx_waits = matches!(end, RxEnd::NoBuffers);
        if let RxEnd::Gone(error) = end {
            self.lost(cx, &error)?;
        }
        Ok(())
    }

    fn transmit(&mut self, cx: &mut Cx<'_>, usable: bool) -> Result<(), Fault> {
        let shared = self.shared.clone();
        let end = self.tx.turn(
            &**cx.memory,
            &mut cx.queues[TX],
            usable.then_some(&self.pair.tap),
            &shared.counters,
        )?;
        self.tx_waits = matches!(end, TxEnd::Full | TxEnd::Down);
        match end {
            TxEnd::Down => {
                if shared.set_link(false, self.listener(cx.driver)) {
                    let name = &shared.name;
                    log::warn!(
                        "the tap {name:?} is down: its guest has no carrier until `ip link set {name} up`"
                    );
                }
            }
            TxEnd::Gone(error) => self.lost(cx, &error)?,
            TxEnd::Empty | TxEnd::Full => {}
        }
        Ok(())
    }

    /// No tap any more: what the guest sends meets none.
    fn lost(&mut self, cx: &mut Cx<'_>, error: &io::Error) -> Result<(), Fault> {
        self.gone = true;
        self.shared.lost(error, self.listener(cx.driver));
        self.transmit(cx, false)
    }

    /// Tells the thread for what of the tap it waits from now on.
    fn watch(&mut self, cx: &mut Cx<'_>, on: bool) {
        // The end of the tap is an error, which is always waited for. But the kernel wakes for it as for a frame: who
        // does not wait for frames hears it by the priority that such a wake-up has as well, and no frame has.
        let mut interest = match self.rx_waits {
            true => EventSet::PRIORITY,
            false => EventSet::IN,
        };
        interest.set(EventSet::OUT, self.tx_waits);
        // A queue that is detached and a tap that is gone are in error for good.
        let wanted = (on && !self.gone).then_some(interest);
        match (self.watched, wanted) {
            (None, Some(interest)) => cx.add_source(self.source(interest)),
            (Some(_), None) => cx.forget_source(TAP),
            (Some(was), Some(interest)) if was != interest => cx.set_interest(TAP, interest),
            _ => {}
        }
        self.watched = wanted;
    }

    fn source(&self, interest: EventSet) -> Source {
        Source {
            fd: self.pair.tap.as_raw_fd(),
            token: TAP,
            interest,
        }
    }

    fn tap_ready(&mut self, cx: &mut Cx<'_>, events: EventSet) -> Result<(), Fault> {
        if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            // A read tells which error it is, and frees the descriptor of it if it can be.
            self.receive(cx)?;
            if !self.gone {
                self.lost(cx, &io::Error::from_raw_os_error(libc::EBADFD))?;
            }
            return Ok(());
        }
        if events.contains(EventSet::OUT) && self.tx_waits {
            if self.shared.set_link(true, self.listener(cx.driver)) {
                log::info!("the tap {:?} is up again", self.shared.name);
            }
            self.transmit(cx, true)?;
        }
        if events.contains(EventSet::IN) && !self.gone {
            self.receive(cx)?;
        }
        Ok(())
    }
}

impl<T: Tap> Handler for PairHandler<T> {
    fn sources(&self) -> Vec<Source> {
        let changed = Source {
            fd: self.pair.changed(),
            token: CHANGED,
            interest: EventSet::IN,
        };
        let tap = self.watched.map(|interest| self.source(interest));
        tap.into_iter().chain([changed]).collect()
    }

    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        if queue == CONTROL {
            let multiqueue = self.features.multiqueue;
            // The first pair, whose thread this is, is always in use.
            return control::serve(
                &**cx.memory,
                &mut cx.queues[CONTROL],
                &self.shared,
                multiqueue,
            );
        }
        let pair = self.pair.clone();
        let on = pair.on();
        let usable = *on && !self.gone;
        match queue {
            RX if usable => self.receive(cx)?,
            TX if !usable => self.transmit(cx, false)?,
            // Else its becoming writable is what goes on.
            TX if !self.tx_waits => self.transmit(cx, true)?,
            _ => {}
        }
        self.watch(cx, *on);
        Ok(())
    }

    fn ready(&mut self, cx: &mut Cx<'_>, token: u32, events: EventSet) -> Result<(), Fault> {
        let pair = self.pair.clone();
        let on = pair.on();
        match (token, *on && !self.gone) {
            (TAP, true) => self.tap_ready(cx, events)?,
            (CHANGED, usable) => {
                pair.take_change();
                self.transmit(cx, usable)?;
                if usable && !self.gone {
                    self.receive(cx)?;
                }
            }
            _ => {}
        }
        self.watch(cx, *on);
        Ok(())
    }

    fn rest(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        self.rx.rest(&mut cx.queues[RX]);
        Ok(())
    }
}
