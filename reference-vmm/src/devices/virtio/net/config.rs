// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `--net` asks for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::tap::{KernelTap, Opened};
use super::{Net, NetError, NetState};

/// So many queue pairs a device can have.
pub const PAIRS_MOST: u16 = 8;

/// The MTUs that a tap can have, bytes (Linux, `tun.c`; virtio 1.2, 5.1.4 has 68 to 65,535).
pub const MTUS: std::ops::RangeInclusive<u16> = 68..=65521;

/// The longest name of an interface, bytes (`IFNAMSIZ` with its 0).
const NAME_MOST: usize = libc::IFNAMSIZ - 1;

/// An Ethernet address of one station. As text `02:00:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mac([u8; 6]);

/// A network device, as it was asked for.
///
/// As text (`--net`): `tap=NAME[,mac=MAC][,queues=N][,mtu=N]`; in a JSON file an object with these fields.
///
/// ```
/// use reference_vmm::devices::virtio::net::NetConfig;
/// let net = NetConfig::parse("tap=tap0,mac=02:00:00:12:34:56,queues=2")?;
/// assert_eq!((net.tap.as_str(), net.queues, net.mtu), ("tap0", 2, None));
/// # Ok::<(), reference_vmm::devices::virtio::net::NetConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// A tap of the host's, which exists.
    pub tap: String,
    /// The guest's address; a random one if there is none.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Queue pairs, up to [`PAIRS_MOST`]; more than one need a tap that was made with `multi_queue`.
    #[serde(default = "one")]
    pub queues: u16,
    /// The MTU that the guest is told, bytes; nothing if there is none, and it takes 1500.
    #[serde(default)]
    pub mtu: Option<u16>,
}

fn one() -> u16 {
    1
}

/// What is wrong with a [`NetConfig`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetConfigError {
    /// An option that there is not, is there twice, or has no such value.
    #[error("{option:?}: {why}")]
    Option {
        /// As it was given.
        option: String,
        /// What is possible.
        why: &'static str,
    },
    /// Everything else has a default.
    #[error(
        "no tap is named: tap=NAME is wanted, an interface that `ip tuntap add NAME mode tap` makes"
    )]
    NoTap,
    /// Not a name of an interface.
    #[error(
        "tap={0:?}: the name of an interface has 1 to {NAME_MOST} bytes, and no space, '/', ':' or '%'"
    )]
    Name(String),
    /// No or too many queue pairs.
    #[error("queues={0}: 1 to {PAIRS_MOST} are possible")]
    Queues(u16),
    /// An MTU that no tap can have.
    #[error("mtu={0}: {first} to {last} are possible", first = MTUS.start(), last = MTUS.end())]
    Mtu(u16),
}

impl NetConfig {
    /// A network device with this tap, and the defaults.
    pub fn new(tap: impl Into<String>) -> Self {
        NetConfig {
            tap: tap.into(),
            mac: None,
            queues: 1,
            mtu: None,
        }
    }

    /// Reads the command line's form.
    ///
    /// # Errors
    /// [`NetConfigError`].
    pub fn parse(text: &str) -> Result<Self, NetConfigError> {
        let (mut tap, mut mac, mut queues, mut mtu) = (None, None, None, None);
        for option in text.split(',') {
            let wrong = |why| NetConfigError::Option {
                option: option.to_owned(),
                why,
            };
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            // `parse` would take a sign.
            let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            let number = value.parse::<u16>().ok().filter(|_| digits);
            let number = number.ok_or_else(|| wrong("a number is wanted"));
            let twice = match key {
                "tap" => tap.replace(value.to_owned()).is_some(),
                "mac" => {
                    let address = value.parse().map_err(|why: BadMac| wrong(why.0))?;
                    mac.replace(address).is_some()
                }
                "queues" => queues.replace(number?).is_some(),
                "mtu" => mtu.replace(number?).is_some(),
                _ => return Err(wrong("not one of tap=NAME, mac=MAC, queues=N, mtu=N")),
            };
            if twice {
                return Err(wrong("it is there twice"));
            }
        }
        let config = NetConfig {
            tap: tap.ok_or(NetConfigError::NoTap)?,
            mac,
            queues: queues.unwrap_or(1),
            mtu,
        };
        config.check()?;
        Ok(config)
    }

    /// Checks what can be checked without a host.
    ///
    /// # Errors
    /// [`NetConfigError`].
    pub fn check(&self) -> Result<(), NetConfigError> {
        let name = self.tap.as_bytes();
        // '%' would have the kernel number it.
        let bad = |byte: &u8| matches!(byte, b'/' | b':' | b'%' | 0) || byte.is_ascii_whitespace();
        let dots = matches!(name, b"." | b"..");
        if name.is_empty() || name.len() > NAME_MOST || name.iter().any(bad) || dots {
            return Err(NetConfigError::Name(self.tap.clone()));
        }
        if !(1..=PAIRS_MOST).contains(&self.queues) {
            return Err(NetConfigError::Queues(self.queues));
        }
        match self.mtu {
            Some(mtu) if !MTUS.contains(&mtu) => Err(NetConfigError::Mtu(mtu)),
            _ => Ok(()),
        }
    }

    /// Attaches the tap, and makes the device.
    ///
    /// # Errors
    /// [`NetError`]; the tap is as it was.
    pub fn open(&self) -> Result<Net, NetError> {
        self.check()?;
        let opened = KernelTap::open(&self.tap, self.queues)?;
        let mac = match self.mac {
            Some(mac) => mac,
            None => {
                let mac = Mac::random()?;
                log::info!(
                    "the guest's address at the tap {:?} is {mac}, made by chance",
                    self.tap
                );
                mac
            }
        };
        self.tell(&opened);
        Net::new(&self.tap, mac, self.mtu, opened.queues, opened.offload)
    }

    /// Attaches the tap for a device that goes on in `state`, which keeps its address, queue pairs and MTU, whatever
    /// this configuration has.
    ///
    /// # Errors
    /// [`NetError`]; the tap is as it was.
    pub fn restore(&self, state: &NetState) -> Result<Net, NetError> {
        self.check()?;
        let opened = KernelTap::open(&self.tap, state.queues)?;
        self.tell(&opened);
        Net::from_state(&self.tap, state, opened.queues, opened.offload)
    }

    /// Says what may surprise.
    fn tell(&self, opened: &Opened) {
        let name = &self.tap;
        if opened.up == Some(false) {
            log::warn!("the tap {name:?} is down: `ip link set {name} up`");
        }
        let told = u32::from(self.mtu.unwrap_or(1500));
        if let Some(mtu) = opened.mtu.filter(|mtu| *mtu > told) {
            log::warn!(
                "the tap {name:?} has an MTU of {mtu}, and its guest takes {told}: longer frames may be lost; \
                 `mtu={mtu}` tells the guest"
            );
        }
    }
}

impl FromStr for NetConfig {
    type Err = NetConfigError;

    fn from_str(text: &str) -> Result<Self, NetConfigError> {
        NetConfig::parse(text)
    }
}

/// Why a text is no [`Mac`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadMac(&'static str);

impl Mac {
    /// An address of one station.
    ///
    /// # Errors
    /// It is a group's (multicast), or nobody's (all zeros).
    pub fn new(bytes: [u8; 6]) -> Result<Self, BadMac> {
        match bytes {
            [0, 0, 0, 0, 0, 0] => Err(BadMac("all zeros are nobody's address")),
            [first, ..] if first & 1 == 1 => Err(BadMac(
                "that is a group's address: the first byte of a station's is even",
            )),
            _ => Ok(Mac(bytes)),
        }
    }

    /// A random address that is administered locally (IEEE 802: the second bit of the first byte), by the host's
    /// kernel's random numbers.
    ///
    /// # Errors
    /// [`NetError::Host`].
    pub fn random() -> Result<Self, NetError> {
        let mut bytes = [0; 6];
        super::super::rng::random(&mut bytes).map_err(|fault| NetError::Host {
            what: "make an address",
            source: std::io::Error::other(fault),
        })?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Mac(bytes))
    }

    /// Its bytes, in the order in which they go over the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let malformed = BadMac("six bytes in hexadecimal are wanted, as 02:00:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(malformed)?;
            let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let value = u8::from_str_radix(part, 16).ok().filter(|_| digits);
            *byte = value.ok_or(malformed)?;
        }
        match parts.next() {
            None => Mac::new(bytes),
            Some(_) => Err(malformed),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let wrong = |why: BadMac| de::Error::custom(format!("{text:?}: {why}"));
        text.parse().map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_taken_and_the_rest_has_defaults() {
        let text = "tap=vm0,mtu=9000,queues=8,mac=02:00:5e:10:00:fF";
        let given = NetConfig::parse(text).unwrap();
        let json = r#"{"tap": "vm0", "mtu": 9000, "queues": 8, "mac": "02:00:5e:10:00:ff"}"#;
        assert_eq!(serde_json::from_str::<NetConfig>(json).unwrap(), given);
        assert_eq!(given.mac.unwrap().to_string(), "02:00:5e:10:00:ff");
        let least = NetConfig::parse("tap=t").unwrap();
        assert_eq!(least, NetConfig::new("t"));
        assert_eq!(
            serde_json::from_str::<NetConfig>(r#"{"tap": "t"}"#).unwrap(),
            least
        );
        let unknown = r#"{"tap": "t", "mask": 1}"#;
        assert!(serde_json::from_str::<NetConfig>(unknown).is_err());
    }

    #[test]
    fn what_is_wrong_is_told_with_the_option_and_what_is_possible() {
        for (text, told) in [
            ("", r#""": not one of tap=NAME, mac=MAC, queues=N, mtu=N"#),
            ("mtu=1500", "no tap is named: tap=NAME is wanted"),
            ("tap=a,tap=b", r#""tap=b": it is there twice"#),
            ("tap=", r#"tap="": the name of an interface has 1 to 15"#),
            ("tap=0123456789abcdef", "tap=\"0123456789abcdef\": the name"),
            ("tap=a/b", "tap=\"a/b\": the name"),
            ("tap=tap%d", "tap=\"tap%d\": the name"),
            ("tap=t,mac=01:00:00:00:00:01", "that is a group's address"),
            ("tap=t,mac=00:00:00:00:00:00", "all zeros are nobody's"),
            ("tap=t,mac=02:00:00:00:00", r#""mac=02:00:00:00:00": six"#),
            ("tap=t,mac=02:00:00:00:00:0g", "six bytes in hexadecimal"),
            ("tap=t,mac=02:00:00:00:00:00:00", "six bytes in hexadecimal"),
            ("tap=t,mac=2:0:0:0:0:+1", "six bytes in hexadecimal"),
            ("tap=t,queues=0", "queues=0: 1 to 8 are possible"),
            ("tap=t,queues=9", "queues=9: 1 to 8 are possible"),
            ("tap=t,queues=+1", r#""queues=+1": a number is wanted"#),
            ("tap=t,queues", r#""queues": a number is wanted"#),
            ("tap=t,mtu=67", "mtu=67: 68 to 65521 are possible"),
            ("tap=t,mtu=65522", "mtu=65522: 68 to 65521 are possible"),
            ("tap=t,mtu=70000", r#""mtu=70000": a number is wanted"#),
            ("tap=t,speed=10", r#""speed=10": not one of"#),
        ] {
            let error = NetConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(told), "{text}: {error}");
        }
    }

    #[test]
    fn a_random_address_is_one_stations_and_administered_locally() {
        let addresses = [(); 64].map(|()| Mac::random().unwrap());
        for address in addresses {
            assert_eq!(address.bytes()[0] & 3, 2, "{address}");
            assert_eq!(address.to_string().parse(), Ok(address));
        }
        assert_ne!(addresses[0], addresses[1]);
    }
}
