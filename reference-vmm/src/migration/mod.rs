// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine that moves to another process while its guest runs: pre-copy, and post-copy for who asks for it, with one owner
//! of the guest at every moment.
//!
//! ```text
//!   ctl migrate ─► outgoing ─► source ◄──────── control ────────► destination ◄─ incoming ◄─ run --incoming
//!                     │          │  └─ sender ══ data, 1 to 64 ══► takers ─┐         │
//!                  record      live: Running                     arriving: a machine that is to be
//!                     │
//!                  progress, report
//! ```
//!
//! [`source`] and [`destination`] are the two sides of a conversation over traits: a [`guest`] and a [`link`]. [`live`] and
//! `arriving` are the guest of a real machine, [`dial`] real connections ([`transport`], [`tls`]). So the conversation is
//! tested without a host, cut at each message in each direction and with either side killed there
//! (`tests/migration_owner.rs`).
//!
//! # What is said
//!
//! [`message`] has the bytes; data connections carry [`codec`]'s frames, with a mark behind each round.
//!
//! | from | message | what it means |
//! | --- | --- | --- |
//! | source | `Offer` | the machine, as a snapshot's file `state` of now: a rehearsal |
//! | destination | `Ready` | such a machine can be here: CPUID, MSRs, capabilities, memory; with its words for the line |
//! | source | `Round(n)` | all pages of round n are sent, and the mark n on each data connection |
//! | destination | `Taken(n)` | and in memory |
//! | source | `Missing(runs)` | of a post-copy alone: these pages follow the guest, who asks for them |
//! | source | `State(n)` | the guest stands still, its disks are let go of; this is all of it but memory, which is whole with round n |
//! | destination | `Prepared` | the machine is whole, its threads are there and it holds the disks; one word starts it |
//! | source | `Go` | the guest is not mine any more |
//! | destination | `Started` | it is mine; said before its vCPUs run |
//! | source | `Done` | heard; I shall not ask |
//! | either | `GivenUp(why)` | before `Go`: the guest stays where it is |
//! | source | a connection of its own | how did it end? Here and for pages both prove first that they are of this migration, whose number is not said again: `Known`, `Proof` |
//! | destination | `Settled` | started; or never, a pledge: nothing is held here, and nothing ever starts; or unknown, of a migration that this process knows nothing of |
//! | source | a connection of its own, two of them or more | of a post-copy alone: pages may be asked for here ([`postcopy`]) |
//! | destination | `Wanted`, `Enough` | they will be, by [`async_pf::peer`]'s frames; or no more will be: all are here, the guest has ended, or what did not come in time is lost |
//!
//! Host differences are found before the first page: the rehearsal has the vCPUs' state, which the destination's KVM is
//! asked about, and the VM, its memory, irqchip and vCPUs are made then, while the guest runs at the source. Disks, taps and
//! sockets are opened when the state comes, for only then are they free. What is wrong with those costs a stop of some
//! milliseconds, and the guest goes on where it was.
//!
//! # Rounds
//!
//! Round 0 is all of memory, the next what was written while the one before was sent. Each is answered before the next is
//! begun, so what a round took is what the link carries, and nothing waits in buffers when the guest is stopped. That is
//! done when the rest fits into the downtime: [`dirty_log::estimate`] forecasts it from the last rounds, and what the
//! rehearsal took for the state is taken off first. One round follows the first in any case: what a guest that idles wrote
//! while all was sent need not be sent while it stands still. A guest that writes faster than that is refused with what a
//! stop would cost, or slowed down until it does not, or stopped all the same ([`source::WhenStuck`]); or it goes before its
//! memory ([`postcopy::When`]).
//!
//! Slowed down, each vCPU sleeps a part of its time ([`kvm_core::Throttle`]): 20 % at first, 10 % more behind each round that
//! does not promise an end, up to 99 %, as QEMU's auto-converge has it; what was seen before counts as if it had been as slow.
//! It is the same with `--dirty-log ring`, where dirty-log could hold the vCPUs that write alone
//! ([`dirty_log::estimate::DirtyLimit`]): not done. The throttle is the source's process's: it is lifted before a guest that
//! stays goes on, and the destination knows of none.
//!
//! A page takes the same data connection in each round, by its address: so nothing older overtakes what is newer, and
//! connections do not wait for each other. Pages that are zero are said to be so, by runs. In the first round those that
//! nothing was ever put into are not even read: the host knows them ([`memslots::Holes`]), it is asked behind the harvest, and
//! what is put there later is in the next one. The destination notes what it has written, and writes zeros only there. Behind
//! the first round it has KVM take that into its page tables ([`kvm_core::pre_fault`], Linux 6.11), or the guest's first steps
//! there would be an exit for each page. The bandwidth limit holds to the end, also while the guest stands still.
//!
//! All that takes the time that is allowed at most ([`source::Settings::time`]): a round that is at work then is given up, and
//! the migration with it; or cut short where the guest is to be stopped, and all that was dirty is sent while it stands still.
//!
//! # Whose the guest is
//!
//! | | source | destination | the guest is |
//! | --- | --- | --- | --- |
//! | 1 | sends memory | receives | the source's, and runs there |
//! | 2 | sent `State`; holds no disk | prepares | the source's, and stands still |
//! | 3 | waits for `Prepared` | prepared; holds the disks; undecided | the source's, and stands still |
//! | 4 | said `Go`: in doubt | undecided, or decided | whoever's the destination decides |
//! | 5 | heard `Started`: ends | started | the destination's |
//! | 6 | heard `Settled(never)`: takes back | never | the source's |
//!
//! All hangs on one thing: whether the guest starts is decided in one place, once, by the destination
//! ([`destination::Decision`]). `Go` decides for it, the question against it; whichever the destination takes first has it,
//! and the other finds it decided. The source gives its part of the decision away with `Go` and takes it back by an
//! answer alone.
//!
//! **One fault.** A break in 1 to 3: no `Go` was said, so the destination decides that the guest never starts, drops what
//! it holds and ends; the source takes back its disks, and runs on. That is so whether the destination has heard why or
//! not, and also when the source cannot reach it. If the disks are not free yet, the source asks, which has the destination
//! let go. A break in 4: the source connects again and asks. If `Go` had come through the answer is *started*; if not, it is
//! *never*, and a `Go` that arrives behind it starts nothing. The destination in turn, which has heard neither, decides for
//! *never* when its connection breaks, and stays for a while to say so: until the source has heard it or gives up too, and no
//! longer than a second in a process that is to end. If the destination's process dies, nobody listens
//! where it did, and the source is told that, if the line was direct: at a Unix socket at once; over TCP by the host where the
//! first connection went, when each question is refused there for as long as a firewall is given to do so in its place
//! ([`Patience::refused`](source::Patience::refused)). A name is asked for once: what other host it leads to by then says
//! nothing. Before `Started` was sent the guest has not run there, because that
//! word is sent first; so it goes on here. After it the destination was the owner, and what dies with its owner is gone, as
//! without any migration. If the source's process dies before `Go`, the guest dies with it, as without any migration; after
//! it, it runs at the destination.
//!
//! **No way at all.** While the source is in doubt and cannot reach the destination, the guest stands still here, which is
//! said on stderr and in `GET /migrate`, and it is asked for again each second. Who knows better says so:
//! `ctl migrate-settle here|there`; or by which other way the destination can be asked (`ctl migrate-recover`, [`recover`]). A destination that was cut off before `Go` has ended by then, and the first question
//! that gets through finds nobody there. (A Unix socket whose path is gone, or is another's, proves nothing: somebody may have
//! removed it while the destination lives. That is no way at all, too.)
//!
//! **A tunnel or a proxy** (ssh, socat, a published port of a container) between the two may die while the destination lives:
//! that nobody listens there, or somebody who knows nothing of the guest, proves nothing then. `Ready` has the
//! destination's words for the line ([`link::Wire::line`]). Where they are not the source's own, only an answer of the
//! destination's ends the doubt, or who knows better.
//!
//! **Two faults.** A wire that loses `Started`, and a destination that dies before it can be asked: the source finds nobody
//! there, and goes on with a guest that ran elsewhere for that long. If a disk was written there meanwhile it sees that and
//! stands still, until somebody answers for it (`ctl migrate-settle here`, then `ctl resume`); memory and sockets have no
//! such guard. A firewall that cuts a TCP connection and then answers for that long in the destination's place that nobody
//! listens looks the same. Who fears it migrates over a link without such a box, or through a tunnel, behind which a refusal proves nothing.
//!
//! # What can be done meanwhile
//!
//! A cancel (`ctl migrate-cancel`) is heard within 50 ms until `Go`, and refused behind it. That `ctl migrate` ends, by
//! Ctrl-C or with its terminal, cancels nothing: the monitor goes on, and `ctl migrate-status` says how; but while memory that
//! the guest itself still lacks is waited for, and who would bring it is away, nobody waits who is not asked to. An end of the guest
//! ends the migration. While the guest stands still for the hand-over nobody pauses or resumes it. A guest that is paused
//! goes as it is: it arrives paused, and whoever resumes it does so there.
//!
//! # The network, and connections
//!
//! A tap is let go of as a disk is, so that both processes may name the same one on one host; when the guest starts, its
//! cards say by RARP where they are now, and switches learn it before the guest sends anything. Connections of vsock, of
//! sockets behind ports and of a debugger do not go along; on one host these sockets need other paths for the destination
//! (`run --incoming … --vsock uds=PATH`). The guest is told no new generation: it is the same one.
//!
//! # Who may send, and receive
//!
//! Who has the guest's memory has the guest, and who offers one names the files that are its disks, and the taps and
//! sockets: whatever the user of this process may open. A Unix socket is its user's. TCP on this host is open to all of its
//! users, who are to be trusted like that; TCP beyond the host needs TLS, where both sides have certificates ([`tls`]). Whatever the other side sends is bounded, and parsed as a snapshot's file is; the first who
//! offers a guest is the one, and others are sent away. One who connects has 2 s to say all of what for, however
//! slowly it comes; with TLS up to 10 s more to show who he is. 128 are heard at the same time, and behind that one who is
//! silent makes room for who comes ([`callers`] has the promise): strangers keep neither a source nor its pages out.
//!
//! # Limits
//!
//! - A guest that goes before its memory ([`postcopy`]) lives only while both processes do, until all has followed.
//! - Writes of other processes into guest memory are not seen ([`dirty_log`] has sources for them).
//! - Disks are on storage that both hosts have. Their contents are made durable before the state is sent: once right before
//!   the guest stops, and what came in between in the downtime.

pub mod address;
mod arriving;
pub mod callers;
pub mod codec;
pub mod coming;
pub mod destination;
pub mod dial;
pub mod event;
mod filled;
pub mod guest;
pub mod incoming;
pub mod limit;
pub mod link;
pub mod live;
pub mod message;
pub mod orders;
pub mod outgoing;
pub mod pages;
mod plot;
pub mod postcopy;
pub mod progress;
mod proof;
pub mod record;
pub mod recover;
pub mod report;
mod sender;
pub mod source;
pub mod tls;
pub mod transport;
