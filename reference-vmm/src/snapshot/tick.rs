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
    let Some(last) = written.max().filter(|last| *last >= begun) else {
        return;
    };
    // The finer times of Linux 6.13 are ahead of the clock by less than it moves at once. A time that is yet to come is
    // somebody's own.
    let last = last.min(begun + TICK);
    for _ in 0..100 {
        if coarse_time() > last {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
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
    use super::*;

    #[test]
    fn what_is_written_behind_it_has_another_time() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let disks = [DiskConfig::new(image.path())];
        let time = || {
            let is = image.as_file().metadata().unwrap();
            Duration::new(is.mtime() as u64, is.mtime_nsec() as u32)
        };
        // Of two writes right behind each other some have the same; not where a file system has finer times for one whose
        // time was asked (Linux 6.13), so the clock is looked at as well.
        for _ in 0..50 {
            fs::write(&image, "before").unwrap();
            let written = time();
            wait_for_a_tick(&disks);
            assert!(coarse_time() > written);
            fs::write(&image, "behind").unwrap();
            assert!(time() > written);
        }
    }
}
