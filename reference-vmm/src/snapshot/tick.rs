// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The time of a write, by which a restore tells that a disk has moved on.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::devices::virtio::block::DiskConfig;

/// The clock by which file systems tell the time of a write moves a hundred times a second at least.
const TICK: Duration = Duration::from_millis(10);

/// Waits until that clock has moved on behind the last write to each of these disks: one that comes when the guest goes on
/// has another time then, by which a restore tells that the disk has moved on.
pub(super) fn wait_for_a_tick(disks: &[DiskConfig]) {
    let begun = coarse_time();
    let written = disks.iter().filter(|disk| !disk.readonly).map(|disk| {
        // One that does not say may be as recent as any.
        let time = fs::metadata(&disk.path).map(|file| (file.mtime(), file.mtime_nsec()));
        time.map_or(begun, |(seconds, nanoseconds)| {
            Duration::new(seconds.max(0) as u64, nanoseconds as u32)
        })
    });
    if let Some(last) = written.max() {
        let nap = || std::thread::sleep(Duration::from_millis(1));
        wait_behind(last, coarse_time, nap);
    }
}

/// Waits until `clock` is behind a write at `last`; `nap` is a millisecond of this.
fn wait_behind(last: Duration, mut clock: impl FnMut() -> Duration, mut nap: impl FnMut()) {
    let begun = clock();
    if last < begun {
        return;
    }
    // The finer times of Linux 6.13 are ahead of the clock by less than it moves at once. A time that is yet to come is
    // somebody's own.
    let last = last.min(begun + TICK);
    for _ in 0..100 {
        if clock() > last {
            return;
        }
        nap();
    }
}

/// `CLOCK_REALTIME_COARSE`.
fn coarse_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a timespec that lives through the call.
    match unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut time) } {
        0 => Duration::new(time.tv_sec as u64, time.tv_nsec as u32),
        // There is no such host; the finer clock moves on at once.
        _ => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// How often it naps behind a write at `last`, where it is 1,000 ms and the clock moves every `tick` ms.
    fn naps(last: u64, tick: u64) -> u64 {
        let naps = Cell::new(0);
        let clock = || Duration::from_millis(1000 + naps.get() / tick * tick);
        wait_behind(Duration::from_millis(last), clock, || {
            naps.set(naps.get() + 1)
        });
        naps.get()
    }

    #[test]
    fn the_clock_moves_on_behind_the_last_write_and_no_longer_is_waited() {
        // It is later already.
        assert_eq!(naps(999, 4), 0);
        // Written at this tick, or by a finer clock between it and the next.
        assert_eq!(naps(1000, 4), 4);
        assert_eq!(naps(1003, 4), 4);
        assert_eq!(naps(1004, 4), 8);
        assert_eq!(naps(1000, 10), 10);
        // Somebody's own time, and a clock that stands still, hold nobody up.
        assert_eq!(naps(1_000_000, 1), 11);
        assert_eq!(naps(1000, 1_000_000), 100);
    }

    #[test]
    fn what_is_written_behind_it_has_another_time() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let of = DiskConfig::new(image.path());
        let written = |disk: &DiskConfig| {
            // Nobody is away for so long each time.
            let written = coarse_time() + Duration::from_millis(5);
            image.as_file().set_modified(UNIX_EPOCH + written).unwrap();
            wait_for_a_tick(std::slice::from_ref(disk));
            written
        };
        for _ in 0..20 {
            let before = written(&of);
            assert!(coarse_time() > before);
            fs::write(&image, "behind").unwrap();
            let is = image.as_file().metadata().unwrap();
            let time = Duration::new(is.mtime() as u64, is.mtime_nsec() as u32);
            assert!(time > before);
        }
        // Of one that the guest cannot write nothing is waited for.
        let readonly = DiskConfig {
            readonly: true,
            ..of
        };
        assert!((0..20).any(|_| {
            let before = written(&readonly);
            coarse_time() <= before
        }));
    }
}
