// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Amounts as people read them: three digits that count, and the unit.

use std::time::Duration;

use dirty_log::PAGE_SIZE;

/// Bytes of `pages` pages.
pub fn pages(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE)
}

/// `1.50 GiB`, `12.0 MiB`, `512 B`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut amount, mut unit) = (bytes as f64, "B");
    if bytes < 1024 {
        return format!("{bytes} {unit}");
    }
    for next in UNITS {
        // What would be rounded to 1,024 is one of the next.
        if amount < 1023.5 {
            break;
        }
        (amount, unit) = (amount / 1024.0, next);
    }
    format!("{} {unit}", digits(amount))
}

/// Bytes a second: `112 MiB/s`. What is no number is 0.
pub fn rate(per_second: f64) -> String {
    // The cast ends at the ends: a NaN is 0.
    format!("{}/s", bytes(per_second as u64))
}

/// `850 us`, `12.4 ms`, `3.20 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`.
pub fn time(time: Duration) -> String {
    let (seconds, micros) = (time.as_secs(), time.as_secs_f64() * 1e6);
    match seconds {
        _ if micros < 999.5 => format!("{micros:.0} us"),
        _ if micros < 999_500.0 => format!("{} ms", digits(micros / 1e3)),
        0..60 => format!("{} s", digits(time.as_secs_f64())),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// `2026-11-28 21:34:35 UTC`, of seconds since 1970.
pub fn utc(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    // Years begin in March, so that a leap day is the last one; 400 of them are 146,097 days, and the first of those was
    // 719,468 days before 1970 (Hinnant, "chrono-compatible low-level date algorithms").
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year + next;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3 + 1);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Three of them that count.
fn digits(amount: f64) -> String {
    match amount {
        _ if amount < 9.995 => format!("{amount:.2}"),
        _ if amount < 99.95 => format!("{amount:.1}"),
        _ => format!("{amount:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_has_three_digits_and_its_unit() {
        for (amount, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 << 20, "1.50 GiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (1000 << 10, "1000 KiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(amount), expected);
        }
        assert_eq!(rate(f64::NAN), "0 B/s");
        assert_eq!(rate(-1.0), "0 B/s");
        assert_eq!(rate(117_440_512.9), "112 MiB/s");
        assert_eq!(pages(u64::MAX), u64::MAX);
    }

    #[test]
    fn a_time_has_the_unit_that_fits() {
        for (micros, expected) in [
            (0, "0 us"),
            (850, "850 us"),
            (1000, "1.00 ms"),
            (12_440, "12.4 ms"),
            (999_600, "1.00 s"),
            (3_200_000, "3.20 s"),
            (59_999_000, "60.0 s"),
            (125_000_000, "2 min 5 s"),
            (12_000_000_000, "3 h 20 min"),
            (187_200_000_000, "2 d 4 h"),
        ] {
            assert_eq!(time(Duration::from_micros(micros)), expected);
        }
        time(Duration::MAX);
    }

    #[test]
    fn a_day_is_the_calendars() {
        // `date -u -d @SECONDS`
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds), expected);
        }
        utc(u64::MAX);
    }

    #[test]
    fn a_number_has_a_comma_at_each_thousand() {
        for (number, expected) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(count(number), expected);
        }
    }
}
