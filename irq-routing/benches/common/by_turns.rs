// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two programs by turns, so that what else the host does hits both: their tenth percentiles, medians, and
//! the ratios. On a host that others keep busy nothing else can be compared.

use std::time::Duration;

/// Runs each `rounds` times by turns; each says how long it took.
pub fn by_turns(
    what: &str,
    rounds: usize,
    [(name, ours), (floor_name, floor)]: [(&str, &mut dyn FnMut() -> Duration); 2],
) {
    let (mut times, mut floors) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Neither is always the second.
        if round % 2 == 0 {
            times.push(ours());
            floors.push(floor());
        } else {
            floors.push(floor());
            times.push(ours());
        }
    }
    let at = |times: &mut [Duration], percent: usize| {
        times.sort_unstable();
        times[(times.len() - 1) * percent / 100]
    };
    for (title, percent) in [("p10", 10), ("median", 50)] {
        let (time, floor) = (at(&mut times, percent), at(&mut floors, percent));
        let ratio = time.as_secs_f64() / floor.as_secs_f64();
        println!("{what}: {title}: {name} {time:.1?}, {floor_name} {floor:.1?}: {ratio:.2}x");
    }
}
