// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The PC's real-time clock (Motorola MC146818A) at ports 0x70 and 0x71.
//!
//! It tells the host's UTC. It has no interrupt: alarms, periodic ticks and the update-ended
//! interrupt can be programmed and read back, and never fire (the DSDT gives the device no IRQ, so
//! an ACPI system does not wait for one). A guest that sets the clock moves an offset that lives as
//! long as the VM.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// Where the FADT's century field and PC firmware put the century.
const CENTURY: u8 = 0x32;

/// Register A after reset: 32.768 kHz base, 1024 Hz rate; bit 7 (update in progress) never shows,
/// for the time is computed at the read.
const REG_A_RESET: u8 = 0x26;
/// Register B: bit 7 stops the clock for setting, bit 2 selects binary, bit 1 the 24-hour form.
const REG_B_SET: u8 = 1 << 7;
const REG_B_BINARY: u8 = 1 << 2;
const REG_B_24H: u8 = 1 << 1;
/// How far a guest can set the clock away from the host's, seconds: more than the 10,000 years that
/// its registers can tell. A guest whose days and years have any byte in them, written again and
/// again, would count beyond any number otherwise.
const MAX_OFFSET: i64 = 400_000_000_000;
/// Register D: the battery is good.
const REG_D_VALID: u8 = 1 << 7;

#[derive(Debug)]
struct State {
    index: u8,
    ram: [u8; 128],
    /// Guest time minus host time, in seconds.
    offset: i64,
    /// The time registers as the guest left them while it set the clock.
    setting: Option<Civil>,
}

impl State {
    /// The guest's time is `time` when the host's is `now`.
    fn set_time(&mut self, time: Civil, now: i64) {
        self.offset = (time.to_unix() - now).clamp(-MAX_OFFSET, MAX_OFFSET);
    }
}

/// The clock.
#[derive(Debug)]
pub struct Rtc {
    state: Mutex<State>,
    now: fn() -> i64,
}

/// A clock as plain data. Its time is told by what it is ahead of the host's, so a restored guest reads the time of day
/// that it is then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    /// The register that the data port shows.
    pub index: u8,
    /// The 128 bytes of its memory.
    pub ram: Vec<u8>,
    /// The guest's time less the host's, seconds.
    pub offset: i64,
    /// Year, month, day, hour, minute and second, while the guest is setting them.
    pub setting: Option<(i64, [u8; 5])>,
}

impl Rtc {
    /// Index port; the data port follows it.
    pub const PORT: u16 = 0x70;
    /// Ports taken.
    pub const LEN: u16 = 2;

    /// A clock that tells the host's UTC.
    pub fn new() -> Self {
        Self::with_clock(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs() as i64)
        })
    }

    /// A clock that counts from `now`, in seconds since 1970 (UTC).
    pub fn with_clock(now: fn() -> i64) -> Self {
        let mut ram = [0; 128];
        ram[usize::from(REG_A)] = REG_A_RESET;
        ram[usize::from(REG_B)] = REG_B_24H;
        Rtc {
            state: Mutex::new(State {
                index: 0,
                ram,
                offset: 0,
                setting: None,
            }),
            now,
        }
    }

    /// A clock that tells the host's UTC, in this state; none where no clock can have it.
    pub fn from_state(state: &RtcState) -> Option<Self> {
        let ram = <[u8; 128]>::try_from(state.ram.as_slice()).ok()?;
        let possible = -MAX_OFFSET..=MAX_OFFSET;
        let setting = state.setting.map(|(year, rest)| {
            let [month, day, hour, minute, second] = rest;
            Civil {
                year,
                month,
                day,
                hour,
                minute,
                second,
                weekday: 1,
            }
        });
        // What a guest can set: two digits of a year and two of its century.
        let years = setting.is_none_or(|time| (-25_600..=25_600).contains(&time.year));
        if state.index > 127 || !possible.contains(&state.offset) || !years {
            return None;
        }
        let rtc = Rtc::new();
        *rtc.lock() = State {
            index: state.index,
            ram,
            offset: state.offset,
            setting,
        };
        Some(rtc)
    }

    /// The clock as plain data.
    pub fn state(&self) -> RtcState {
        let state = self.lock();
        RtcState {
            index: state.index,
            ram: state.ram.to_vec(),
            offset: state.offset,
            setting: state.setting.map(|time| {
                let rest = [time.month, time.day, time.hour, time.minute, time.second];
                (time.year, rest)
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, state: &State) -> u8 {
        let register_b = state.ram[usize::from(REG_B)];
        let time = || {
            state
                .setting
                .unwrap_or_else(|| Civil::from_unix((self.now)() + state.offset))
        };
        let encode = |value: u8| encode(value, register_b);
        match state.index {
            SECONDS => encode(time().second),
            MINUTES => encode(time().minute),
            HOURS => encode_hour(time().hour, register_b),
            DAY_OF_WEEK => encode(time().weekday),
            DAY => encode(time().day),
            MONTH => encode(time().month),
            YEAR => encode((time().year.rem_euclid(100)) as u8),
            CENTURY => encode((time().year.div_euclid(100).rem_euclid(100)) as u8),
            // Reading register C acknowledges interrupts, of which there are none.
            REG_C => 0,
            REG_D => REG_D_VALID,
            other => state.ram[usize::from(other)],
        }
    }

    fn write(&self, state: &mut State, value: u8) {
        let register_b = state.ram[usize::from(REG_B)];
        let now = (self.now)();
        let mut time = state
            .setting
            .unwrap_or_else(|| Civil::from_unix(now + state.offset));
        let plain = decode(value, register_b);
        match state.index {
            SECONDS => time.second = plain,
            MINUTES => time.minute = plain,
            HOURS => time.hour = decode_hour(value, register_b),
            DAY_OF_WEEK => return,
            DAY => time.day = plain,
            MONTH => time.month = plain,
            YEAR => time.year = time.year.div_euclid(100) * 100 + i64::from(plain),
            CENTURY => time.year = i64::from(plain) * 100 + time.year.rem_euclid(100),
            REG_A => {
                state.ram[usize::from(REG_A)] = value & 0x7f;
                return;
            }
            REG_B => {
                state.ram[usize::from(REG_B)] = value;
                if value & REG_B_SET != 0 {
                    state.setting.get_or_insert(time);
                } else if let Some(set) = state.setting.take() {
                    state.set_time(set, now);
                }
                return;
            }
            REG_C | REG_D => return,
            other => {
                state.ram[usize::from(other)] = value;
                return;
            }
        }
        if state.setting.is_some() {
            state.setting = Some(time);
        } else {
            state.set_time(time, now);
        }
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl DevicePio for Rtc {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        data.fill(0xff);
        if let Some(first) = data.first_mut()
            && offset == 1
        {
            *first = self.read(&state);
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, data.first()) {
            // Bit 7 of the index port is the NMI mask of the PC, which this machine has not.
            (0, Some(index)) => state.index = index & 0x7f,
            (1, Some(value)) => self.write(&mut state, *value),
            _ => {}
        }
    }
}

fn encode(value: u8, register_b: u8) -> u8 {
    if register_b & REG_B_BINARY != 0 {
        value
    } else {
        ((value / 10) << 4) | (value % 10)
    }
}

fn decode(value: u8, register_b: u8) -> u8 {
    if register_b & REG_B_BINARY != 0 {
        value
    } else {
        (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf)
    }
}

/// In the 12-hour form bit 7 says afternoon, and midnight and noon are 12.
fn encode_hour(hour: u8, register_b: u8) -> u8 {
    if register_b & REG_B_24H != 0 {
        return encode(hour, register_b);
    }
    let twelve = match hour % 12 {
        0 => 12,
        other => other,
    };
    encode(twelve, register_b) | if hour >= 12 { 0x80 } else { 0 }
}

fn decode_hour(value: u8, register_b: u8) -> u8 {
    if register_b & REG_B_24H != 0 {
        return decode(value, register_b);
    }
    let hour = decode(value & 0x7f, register_b) % 12;
    if value & 0x80 != 0 { hour + 12 } else { hour }
}

/// A date and time of the proleptic Gregorian calendar. A guest can put any byte in any field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Civil {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// 1 is Sunday.
    weekday: u8,
}

impl Civil {
    fn from_unix(unix: i64) -> Self {
        let (days, seconds) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
        // Days are counted from 0000-03-01, so that a leap day ends a year; 400 years are 146,097
        // days.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Civil {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (seconds / 3_600) as u8,
            minute: (seconds / 60 % 60) as u8,
            second: (seconds % 60) as u8,
            // 1970-01-01 was a Thursday.
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    fn to_unix(self) -> i64 {
        let (month, day) = (i64::from(self.month), i64::from(self.day));
        let year = self.year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let march_month = (month + 9) % 12;
        let day_of_year = (153 * march_month + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400
            + i64::from(self.hour) * 3_600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2026-11-23 21:35:07, a Monday.
    const SOME_TIME: i64 = 1_795_469_707;

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.pio_write(PioAddress(0x70), 0, &[index]);
        let mut data = [0];
        rtc.pio_read(PioAddress(0x70), 1, &mut data);
        data[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.pio_write(PioAddress(0x70), 0, &[index]);
        rtc.pio_write(PioAddress(0x70), 1, &[value]);
    }

    #[test]
    fn tells_the_hosts_time_in_bcd_and_the_battery_is_good() {
        let rtc = Rtc::with_clock(|| SOME_TIME);
        let got: Vec<u8> = [
            CENTURY,
            YEAR,
            MONTH,
            DAY,
            HOURS,
            MINUTES,
            SECONDS,
            DAY_OF_WEEK,
            REG_D,
        ]
        .map(|index| get(&rtc, index))
        .to_vec();
        assert_eq!(got, [0x20, 0x26, 0x11, 0x23, 0x21, 0x35, 0x07, 0x02, 0x80]);
    }

    #[test]
    fn a_guest_that_sets_the_clock_reads_what_it_set() {
        let rtc = Rtc::with_clock(|| SOME_TIME);
        set(&rtc, REG_B, REG_B_SET | REG_B_24H);
        for (index, value) in [
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0),
        ] {
            set(&rtc, index, value);
        }
        set(&rtc, REG_B, REG_B_24H);
        assert_eq!(
            [YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|index| get(&rtc, index)),
            [0x99, 0x12, 0x31, 0x23, 0x59, 0x00]
        );
    }

    #[test]
    fn a_guest_cannot_count_the_years_beyond_all_bounds() {
        let rtc = Rtc::with_clock(|| SOME_TIME);
        set(&rtc, REG_B, REG_B_BINARY | REG_B_24H);
        for _ in 0..1000 {
            set(&rtc, YEAR, 0xff);
        }
        let offset = rtc.state.lock().unwrap().offset;
        assert_eq!(offset, MAX_OFFSET);
    }

    #[test]
    fn hours_have_a_twelve_hour_form() {
        for (hour, form) in [
            (0, 0x12),
            (1, 0x01),
            (11, 0x11),
            (12, 0x92),
            (13, 0x81),
            (23, 0x91),
        ] {
            assert_eq!(encode_hour(hour, 0), form, "{hour}");
            assert_eq!(decode_hour(form, 0), hour, "{form:#x}");
        }
    }

    proptest! {
        #[test]
        fn a_date_survives_the_way_there_and_back(unix in -100_000_000_000i64..300_000_000_000) {
            prop_assert_eq!(Civil::from_unix(unix).to_unix(), unix);
        }

        #[test]
        fn no_sequence_of_accesses_panics(
            accesses in proptest::collection::vec((any::<bool>(), 0u16..4, any::<Vec<u8>>()), 0..60)
        ) {
            let rtc = Rtc::with_clock(|| SOME_TIME);
            for (write, offset, mut data) in accesses {
                if write {
                    rtc.pio_write(PioAddress(0x70), offset, &data);
                } else {
                    rtc.pio_read(PioAddress(0x70), offset, &mut data);
                }
            }
        }
    }
}
