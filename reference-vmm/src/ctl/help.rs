// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `ctl --help` says, and each of its commands behind it.

/// What all of them have.
macro_rules! with_common {
    ($text:literal) => {
        concat!(
            $text,
            "  --api-sock PATH  The monitor's control socket
  --json           One line of JSON, also of a refusal (fault_message), instead of words
  --timeout SECS   How long to wait for the answer, until all of it is there [60]
  -h, --help       Show this help

Exit status: 0 done; 1 the monitor refused, or is gone; 2 the arguments were wrong.
"
        )
    };
}

/// `reference-vmm ctl --help`.
pub const HELP: &str = with_common!(
    "\
Ask something of a monitor that runs, through its control socket (`run --api-sock PATH`).

Usage: reference-vmm ctl --api-sock PATH COMMAND [--json] [--timeout SECS]
       reference-vmm ctl COMMAND --help

Commands:
  status          Say whether the guest is running, paused or not started
  pause           Pause the guest: its vCPUs, its devices and its input
  resume          Let it go on
  snapshot DIR    Write a snapshot of it to the directory DIR, all of it or what was written since the last
  load DIR        Have a monitor that waits for it (`restore` without --from) go on from the snapshot DIR
  migrate         Move the guest to the monitor that waits for it (`run --incoming`), while it runs
  migrate-cancel  Give that up; the guest stays where it is
  migrate-postcopy  Have the guest go now, and its memory follow it (migrate --postcopy)
  migrate-status  Say how it goes, or how the last one went
  migrate-recover --to ADDRESS, or --listen ADDRESS
                  Have the memory of a guest that has gone before it take another way
  migrate-settle here|there
                  Say where the guest is, when the monitor says that it cannot find that out
  power-button    Press the power button, at which a guest with ACPI powers off
  config          Say what the machine is
  stats           Say what the guest has done so far, in numbers
  version         Say the monitor's version

While a guest is being moved, pause, resume, snapshot and another migrate are refused, with how far it is;
while a snapshot is written in the background, migrate and another snapshot are.

Options:
"
);

/// Each command, and its help.
pub(super) const COMMANDS: [(&str, &str); 15] = [
    (
        "status",
        with_common!(
            "\
Say whether the guest is running, paused or not started. Of one whose memory comes while it runs: how much is there, and
for whom the rest waits, if it does.

Usage: reference-vmm ctl --api-sock PATH status [--json] [--timeout SECS]

It is answered also while something else is at work.

Options:
"
        ),
    ),
    (
        "pause",
        with_common!(
            "\
Pause the guest: its vCPUs, its devices and its input. One that is paused already stays so.

Usage: reference-vmm ctl --api-sock PATH pause [--json] [--timeout SECS]

It waits up to 5 seconds for I/O that is under way; then the guest runs on, and what kept it is named. A guest
that is being moved is not paused: give the move up first (migrate-cancel).

Options:
"
        ),
    ),
    (
        "resume",
        with_common!(
            "\
Let a guest that is paused go on. One that runs stays so.

Usage: reference-vmm ctl --api-sock PATH resume [--json] [--timeout SECS]

Options:
"
        ),
    ),
    (
        "snapshot",
        with_common!(
            "\
Write a snapshot of the guest to the directory DIR, and say how long it stood still for it.

Usage: reference-vmm ctl --api-sock PATH snapshot DIR [OPTIONS]

DIR is new, empty, or an older snapshot, and not within another. The older one is replaced, unless a snapshot beside
it builds on it (`snapshot info` says which do): that would be lost. A guest that runs is paused for it and goes on;
one that is paused stays so. `restore --from DIR` has it go on.

While writes are tracked each snapshot, a full one as well, and one without --track, is what the next incremental
one builds on: --base of that is the last one, whichever it was. --track=off ends the chain with this snapshot.

Options:
  --track[=off]    Track what is written behind it, so that the next may build on it; or no more [as it was: on
                   since a --track, and under `--track-dirty-pages` always]
  --base PREV      Only what was written since PREV, the last one, which has to be kept
  --compress zstd  Compress memory, while the guest stands still; a restore reads it and cannot map it
  --disks name|reflink|copy
                   What becomes of disks that the guest writes: only their names are in it, or clones of them, or
                   copies where the file system does not clone [name]
  --background     Memory is written when the guest goes on already: it is paused for a moment, however much
                   memory there is. Says also how many pages were protected in it, and what one took. Meanwhile
                   the guest may be paused and resumed; it is not moved, and no other snapshot is taken

It is waited for without --timeout [a day]. One that is not waited for, because that ran out or this command was
ended, is made all the same: it is whole when DIR is there (`snapshot info DIR`). But for one that still waits for
the guest's memory from a page server that is away (`restore --page-server`), which is said on stderr: that is given
up then.
"
        ),
    ),
    (
        "load",
        with_common!(
            "\
Have a monitor that waits for it (`restore` without --from) make the guest of the snapshot DIR, paused.

Usage: reference-vmm ctl --api-sock PATH load DIR [OPTIONS]

A load that fails says why, and another may come. A monitor that has its guest loads no other.

Options:
  --resume         The guest goes on at once
  --lazy           The guest runs before its memory is read: what it touches comes first, the rest behind it
  --on-loss stop|poison
                   If memory does not come: the guest is stopped, or goes on without it
  --page-deadline SECS
                   The longest that anybody waits for memory
  --record[=SECS]  For so long [10] only what the guest touches is brought, and is recorded beside the snapshot
  --page-handler SOCKET
                   A page-fault handler of Firecracker's listens there, in another process, and brings memory
  --page-server ADDRESS
                   Memory comes from `snapshot serve` at unix:PATH or tcp:HOST:PORT; beyond this host with --tls-cert,
                   --tls-key, --tls-ca (and --tls-name), as of migrate
                   (Each of these six has memory come later, as of `restore`, and over what the monitor's
                   command line said; what neither says is as there)
"
        ),
    ),
    (
        "migrate",
        with_common!(
            "\
Move the guest to the monitor that waits for it (`run --incoming ADDRESS`), while it runs. One that is paused
arrives paused, and `resume` there lets it go on.

Usage: reference-vmm ctl --api-sock PATH migrate --to ADDRESS [OPTIONS]

How it goes is on stderr. It goes on if this command is ended: migrate-cancel ends it, migrate-status says how it
goes. --timeout is not for its answer. Meanwhile pause, resume, snapshot and another migrate are refused.

Options:
  --to ADDRESS     unix:PATH, from this directory on where it has no / first, or tcp:HOST:PORT, which beyond this
                   host needs TLS
  --connections N  How many connections carry memory [1]
  --compress zstd[:LEVEL]
                   Compress it [none]
  --bandwidth SIZE So many bytes a second at most, as in 100M; 64K or more
  --downtime MS    How long the guest may stand still, in milliseconds [100]
  --max-time SECS  How long memory is sent while the guest runs [3600]
  --when-stuck cancel|throttle|stop
                   When it writes faster than that goes: give up; slow it by 20 %, then 10 % more at a time, up to
                   99 %, and give up if that does not help; or stop it for as long as it takes [cancel]
  --postcopy[=never|by-hand|auto|after-rounds=N|after=SECONDS]
                   When the guest goes before its memory, which follows it, what it touches first: never; when
                   migrate-postcopy says so; when it writes faster than it goes in time (auto, without a value);
                   after N rounds, of which 0 is at once; or after a time. Each but never also when
                   migrate-postcopy says so. Until all has followed, the guest lives only while both monitors do,
                   and this one ends when it has [never]
  --tls-cert FILE, --tls-key FILE, --tls-ca FILE
                   This host's certificate, its key, and the authority's certificate, PEM
  --tls-name NAME  Whom the other's certificate is for, if not the host in ADDRESS
  --report FILE    The monitor writes a report with plots there, HTML, when it is over, however it ends
"
        ),
    ),
    (
        "migrate-cancel",
        with_common!(
            "\
Give a migration up that is under way; the guest stays where it is, as it was.

Usage: reference-vmm ctl --api-sock PATH migrate-cancel [--json] [--timeout SECS]

Behind the moment in which the guest is handed over it is too late, and refused.

Options:
"
        ),
    ),
    (
        "migrate-postcopy",
        with_common!(
            "\
Have the guest that is being moved (`migrate --postcopy`) go on at the other monitor now, and its memory follow it. What
it touches comes first.

Usage: reference-vmm ctl --api-sock PATH migrate-postcopy [--json] [--timeout SECS]

Until all has followed, the guest lives only while both monitors do; migrate-status says how much is left. If the
connection breaks, who touches what is missing waits, and this monitor makes a new one by itself.

Options:
"
        ),
    ),
    (
        "migrate-status",
        with_common!(
            "\
Say how a migration goes, what is foretold of it, or how the last one went. At the monitor that waits for a guest
(`run --incoming`): whether one is on its way, from whom, since when and how much of it is there; or that it has come.

Usage: reference-vmm ctl --api-sock PATH migrate-status [--json] [--timeout SECS]

Options:
"
        ),
    ),
    (
        "migrate-recover",
        with_common!(
            "\
Have the connections of a guest that has gone (`migrate --postcopy`), and whose memory follows it, take another way: a
host that has another address now, another port, another socket. What breaks is made again by itself where it was.

Usage: reference-vmm ctl --api-sock PATH migrate-recover --to ADDRESS [--tls-name NAME] [--json] [--timeout SECS]
       reference-vmm ctl --api-sock PATH migrate-recover --listen ADDRESS [--json] [--timeout SECS]

The first is said to the monitor that the guest has come from, the second, where it is of use, to the one that it has
gone to. Connections that there are are closed, and what was under way on them is asked for again: the guest waits, and
loses nothing. So does a monitor that cannot find out whether the guest is there (migrate-settle): it asks at the new
address. Each side proves to the other that it is of this migration before a page goes: at an address that is
another monitor's nothing is sent. Both may be said again.

Options:
  --to ADDRESS     Connect there from now on: unix:PATH or tcp:HOST:PORT, which beyond this host needs the TLS that the
                   migration was begun with
  --tls-name NAME  Whom the certificate there is for; without it, the --tls-name that the migration was begun with, and
                   if there was none, the host in ADDRESS
  --listen ADDRESS
                   Listen there as well, with the same certificates; it replaces the one said before, and the first
                   address (`run --incoming`) stays
"
        ),
    ),
    (
        "migrate-settle",
        with_common!(
            "\
Say where the guest is, when the monitor says that it cannot find that out: here, and it goes on here; or there, and
this monitor ends. Look first, by `ctl status` at the destination's control socket: a guest that is there is running or
paused; a monitor there that says \"not started\", or has ended, has none, and its host is to have no other process with
the guest's disks. Who says so wrongly has two guests, or none.

Usage: reference-vmm ctl --api-sock PATH migrate-settle here|there [--json] [--timeout SECS]

Options:
"
        ),
    ),
    (
        "power-button",
        with_common!(
            "\
Press the power button, at which a guest with ACPI powers off. One that is paused hears of it when it goes on.

Usage: reference-vmm ctl --api-sock PATH power-button [--json] [--timeout SECS]

Options:
"
        ),
    ),
    (
        "config",
        with_common!(
            "\
Say what the machine is, a line for each thing; with --json as Firecracker's GET /vm/config does.

Usage: reference-vmm ctl --api-sock PATH config [--json] [--timeout SECS]

Options:
"
        ),
    ),
    (
        "stats",
        with_common!(
            "\
Say what the guest has done so far, a line for each number.

Usage: reference-vmm ctl --api-sock PATH stats [--json] [--timeout SECS]

Options:
"
        ),
    ),
    (
        "version",
        with_common!(
            "\
Say the version of the monitor that runs.

Usage: reference-vmm ctl --api-sock PATH version [--json] [--timeout SECS]

Options:
"
        ),
    ),
];

/// The help of `command`; of `ctl` itself where there is none.
pub(super) fn of(command: Option<&str>) -> &'static str {
    let mut commands = COMMANDS.iter();
    let found = commands.find(|(name, _)| command == Some(name));
    found.map_or(HELP, |(_, help)| help)
}
