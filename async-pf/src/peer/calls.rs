// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a [`PeerSource`](super::PeerSource) has asked for and what has become of it: plain data, with no thread or
//! connection in it.
//!
//! A call is an ask of a fetch, under a ticket that stays; each time that it is sent it has another number on the wire.
//!
//! ```text
//!              send                 answered          take
//!   in a lane ──────▶ unanswered ────────────▶ done ───────▶ gone
//!       ▲                 │ broken: asked again, or done with the reason
//!       └─────────────────┘
//! ```

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memslots::{Gfn, PAGE_SIZE};

use super::PeerError;
use super::frame::{self, Ask, Head, Kind, MOST_PAGES, Run};
use crate::{Fetched, Lane};

/// Buffers that are kept to be used again.
const SPARE: usize = 8;

#[derive(Default)]
pub struct Calls {
    calls: HashMap<u64, Call>,
    next_ticket: u64,
    /// Tickets to be sent, by [`Lane`]; of those that are forgotten, too.
    lanes: [VecDeque<u64>; 2],
    /// By the number on the wire.
    unanswered: HashMap<u64, Sent>,
    next_id: u64,
    window: usize,
    /// When an answer came last on this connection.
    last_answer: Option<Instant>,
    spare: Vec<Vec<u8>>,
}

struct Call {
    ask: Ask,
    lane: Lane,
    tries: u32,
    done: Option<Result<Answer, Arc<PeerError>>>,
}

struct Sent {
    ask: Ask,
    /// Of a call that may be forgotten meanwhile.
    ticket: u64,
    since: Instant,
}

/// An answer, whose body has been looked at.
pub struct Answer {
    pub ask: Ask,
    pub kind: Kind,
    pub body: Vec<u8>,
    id: u64,
    runs: Vec<Run>,
    /// Where in the body the bytes begin.
    at: usize,
}

/// How many asks were sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub all: u64,
    pub again: u64,
}

impl Calls {
    /// Puts asks for these pages into the line: their tickets, in the order of the pages.
    pub fn add(&mut self, lane: Lane, first: Gfn, pages: u64) -> Range<u64> {
        let start = self.next_ticket;
        let mut done = 0;
        while done < pages {
            let part = (pages - done).min(u64::from(MOST_PAGES));
            let ask = Ask {
                first: Gfn(first.0 + done),
                pages: part as u32,
            };
            let call = Call {
                ask,
                lane,
                tries: 0,
                done: None,
            };
            let ticket = self.next_ticket;
            self.calls.insert(ticket, call);
            self.line(lane).push_back(ticket);
            self.next_ticket += 1;
            done += part;
        }
        start..self.next_ticket
    }

    fn line(&mut self, lane: Lane) -> &mut VecDeque<u64> {
        let [fault, prefetch] = &mut self.lanes;
        match lane {
            Lane::Fault => fault,
            Lane::Prefetch => prefetch,
        }
    }

    /// Nobody waits for these any more. What was sent stays unanswered until it is answered.
    pub fn forget(&mut self, tickets: Range<u64>) {
        for ticket in tickets {
            self.calls.remove(&ticket);
        }
        // Or a line that is not sent from would grow with each fetch that ends.
        let calls = &self.calls;
        for lane in &mut self.lanes {
            lane.retain(|ticket| calls.contains_key(ticket));
        }
    }

    /// There is a new connection, on which so many may be unanswered.
    pub fn connected(&mut self, window: u16) {
        (self.window, self.next_id) = (usize::from(window), 1);
        self.last_answer = None;
    }

    /// Whether something is in line, and may be sent.
    pub fn may_send(&self) -> bool {
        self.unanswered.len() < self.window && self.lanes.iter().any(|lane| !lane.is_empty())
    }

    /// How many asks have not been sent.
    pub fn in_line(&self) -> usize {
        self.lanes.iter().map(VecDeque::len).sum()
    }

    /// Writes the asks that may be sent, demand first.
    pub fn send(&mut self, bytes: &mut Vec<u8>, now: Instant) -> Count {
        let mut count = Count::default();
        while self.unanswered.len() < self.window {
            let next = self.lanes.iter_mut().find_map(VecDeque::pop_front);
            let Some(ticket) = next else {
                break;
            };
            let Some(call) = self.calls.get_mut(&ticket) else {
                continue;
            };
            let (id, ask) = (self.next_id, call.ask);
            self.next_id += 1;
            count.all += 1;
            count.again += u64::from(call.tries > 0);
            call.tries += 1;
            bytes.extend_from_slice(&ask.to_frame(call.lane, id));
            let since = now;
            self.unanswered.insert(id, Sent { ask, ticket, since });
        }
        count
    }

    /// Whether an answer may come that begins so.
    pub fn expects(&self, head: &Head) -> Result<(), PeerError> {
        let Some(sent) = self.unanswered.get(&head.id) else {
            return Err(PeerError::Unasked { id: head.id });
        };
        let pages = matches!(head.kind, Kind::Pages { .. });
        let (got, want) = (head.len, sent.ask.most_body());
        match pages && got > want {
            true => Err(PeerError::Bytes {
                id: head.id,
                got: u64::from(got),
                want: u64::from(want),
            }),
            false => Ok(()),
        }
    }

    /// An answer has come.
    pub fn answered(&mut self, head: &Head, body: Vec<u8>) -> Result<(), PeerError> {
        let id = head.id;
        let sent = self.unanswered.remove(&id);
        let sent = sent.ok_or(PeerError::Unasked { id })?;
        let answer = Answer::new(head, body, sent.ask)?;
        self.last_answer = Some(Instant::now());
        match self.calls.get_mut(&sent.ticket) {
            Some(call) => call.done = Some(Ok(answer)),
            None => self.recycle(answer.body),
        }
        Ok(())
    }

    /// Refuses a peer that has an ask unanswered for so long.
    pub fn overdue(&self, limit: Duration) -> Result<(), PeerError> {
        let late = self.unanswered.iter().find_map(|(id, sent)| {
            let after = sent.since.elapsed();
            (after > limit).then_some((id, sent, after))
        });
        match late {
            Some((id, sent, after)) => Err(PeerError::NoAnswer {
                id: *id,
                gfn: sent.ask.first,
                after,
                quiet: self
                    .last_answer
                    .map_or(after, |last| last.elapsed().min(after)),
            }),
            None => Ok(()),
        }
    }

    /// The connection is gone: what was unanswered is asked again, before all else, or has been sent often enough.
    pub fn broken(&mut self, tries: u32, why: &Arc<PeerError>) {
        self.window = 0;
        let mut again: Vec<(u64, u64)> = (self.unanswered.drain())
            .map(|(id, sent)| (id, sent.ticket))
            .collect();
        // The last first, as each goes to the front.
        again.sort_unstable_by(|a, b| b.cmp(a));
        for (_, ticket) in again {
            let Some(call) = self.calls.get_mut(&ticket) else {
                continue;
            };
            if call.tries >= tries {
                call.done = Some(Err(Arc::clone(why)));
                continue;
            }
            let lane = call.lane;
            self.line(lane).push_front(ticket);
        }
    }

    /// Nobody is to wait any longer.
    pub fn fail_all(&mut self, why: &Arc<PeerError>) {
        self.lanes.iter_mut().for_each(VecDeque::clear);
        for call in self.calls.values_mut().filter(|call| call.done.is_none()) {
            call.done = Some(Err(Arc::clone(why)));
        }
    }

    /// Whether someone waits.
    pub fn is_waiting(&self) -> bool {
        self.calls.values().any(|call| call.done.is_none())
    }

    /// What has become of a call, once.
    pub fn take(&mut self, ticket: u64) -> Option<Result<Answer, Arc<PeerError>>> {
        self.calls.get_mut(&ticket)?.done.take()
    }

    /// A buffer to read into.
    pub fn spare(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Keeps a buffer to be used again.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(buffer);
        }
    }
}

impl Answer {
    fn new(head: &Head, body: Vec<u8>, ask: Ask) -> Result<Self, PeerError> {
        let (id, kind) = (head.id, head.kind);
        let (runs, at) = match kind {
            Kind::Pages { .. } => frame::take_runs(id, &body, ask)?,
            _ => (Vec::new(), 0),
        };
        let (got, want) = (body.len() - at, frame::bytes_of(&runs));
        let bytes = PeerError::Bytes {
            id,
            got: got as u64,
            want: want as u64,
        };
        let refused = match kind {
            Kind::Pages { compressed: true } if !cfg!(feature = "zstd") => {
                Some(PeerError::Packed {
                    id,
                    why: "it was not to be compressed".into(),
                })
            }
            // Compressed, it is smaller, or would not be.
            Kind::Pages { compressed: true } if got >= want => Some(bytes),
            Kind::Pages { compressed: false } if got != want => Some(bytes),
            _ => None,
        };
        match refused {
            Some(refused) => Err(refused),
            None => Ok(Self {
                ask,
                kind,
                body,
                id,
                runs,
                at,
            }),
        }
    }

    /// Puts the pages where they belong. Where all are zeros, nothing is written.
    pub fn unpack(&self, into: &mut [u8]) -> Result<Fetched, PeerError> {
        if self.runs.iter().all(|run| run.zeros) {
            return Ok(Fetched::Zero);
        }
        let packed = self.body.get(self.at..).unwrap_or_default();
        let plain;
        let mut bytes = match self.kind {
            Kind::Pages { compressed: true } => {
                plain = self.decompress(packed)?;
                &plain[..]
            }
            _ => packed,
        };
        let mut rest = into;
        for run in &self.runs {
            let size = (run.pages as usize * PAGE_SIZE as usize).min(rest.len());
            let (now, later) = rest.split_at_mut(size);
            rest = later;
            match run.zeros {
                true => now.fill(0),
                false => {
                    let (from, others) = bytes.split_at(size.min(bytes.len()));
                    now.copy_from_slice(from);
                    bytes = others;
                }
            }
        }
        Ok(Fetched::Bytes)
    }

    #[cfg(feature = "zstd")]
    fn decompress(&self, packed: &[u8]) -> Result<Vec<u8>, PeerError> {
        let want = frame::bytes_of(&self.runs);
        let plain = zstd::bulk::decompress(packed, want).map_err(|error| PeerError::Packed {
            id: self.id,
            why: error.to_string(),
        })?;
        match plain.len() == want {
            true => Ok(plain),
            false => Err(PeerError::Bytes {
                id: self.id,
                got: plain.len() as u64,
                want: want as u64,
            }),
        }
    }

    #[cfg(not(feature = "zstd"))]
    fn decompress(&self, _packed: &[u8]) -> Result<Vec<u8>, PeerError> {
        // Was refused when it came.
        Err(PeerError::Unasked { id: self.id })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::frame::Refusal;
    use super::*;

    #[test]
    fn for_how_long_nothing_was_answered_counts_from_the_last_answer_on_the_connection() {
        let mut calls = Calls::default();
        for answers in [false, true, false] {
            calls.connected(8);
            calls.add(Lane::Prefetch, Gfn(0), u64::from(MOST_PAGES) + 1);
            let asked = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
            assert_eq!(calls.send(&mut Vec::new(), asked).all, 2);
            if answers {
                let refused = frame::frame(Kind::Failed(Refusal::MayPass), 2, &[0; 8]);
                let head = Head::parse(refused.first_chunk().unwrap()).unwrap();
                calls.answered(&head, vec![0; 8]).unwrap();
            }
            let late = calls.overdue(Duration::from_secs(30)).unwrap_err();
            let PeerError::NoAnswer { after, quiet, .. } = late else {
                panic!("{late}");
            };
            assert!(after >= Duration::from_secs(60));
            assert_eq!(quiet < after, answers);
            // What the next connection finds of this one.
            calls = Calls {
                last_answer: calls.last_answer,
                ..Calls::default()
            };
        }
    }
}
