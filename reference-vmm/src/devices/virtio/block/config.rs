// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a disk is to be: `--disk path=FILE[,OPTION]...`, or an object with the same keys in a JSON file.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::Deserialize;

/// The most queues that a disk has. Each has a thread of its own.
pub const MAX_QUEUES: u16 = 16;
/// The longest serial number, bytes (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
pub const MAX_SERIAL: usize = 20;

/// A disk, as it was asked for.
///
/// ```
/// use reference_vmm::devices::virtio::block::DiskConfig;
/// let disk = DiskConfig::parse("path=/images/root.raw,readonly,queues=2")?;
/// assert!(disk.readonly && disk.queues == 2);
/// # Ok::<(), reference_vmm::devices::virtio::block::DiskConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The raw file or block device.
    pub path: PathBuf,
    /// The guest cannot write to it.
    #[serde(default)]
    pub readonly: bool,
    /// What a flush is worth.
    #[serde(default)]
    pub cache: Cache,
    /// What the guest is told when it asks for the disk's serial number; none is empty.
    #[serde(default)]
    pub id: Option<String>,
    /// How many queues, and threads: 1 to [`MAX_QUEUES`].
    #[serde(default = "one")]
    pub queues: u16,
    /// How reading and writing is done.
    #[serde(default)]
    pub io: Io,
}

/// What a guest's flush is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// What was written is in the host's memory first; a flush has it on the disk.
    #[default]
    Writeback,
    /// A flush is answered, and nothing else is done. For what a crash of the host may break.
    Unsafe,
}

/// How reading and writing is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// io_uring where the host permits it, threads otherwise.
    #[default]
    Auto,
    /// io_uring, or there is no disk.
    Uring,
    /// Threads that read and write and wait for it.
    Threads,
}

/// A disk that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("option {option:?}: {why}")]
pub struct DiskConfigError {
    /// The option, as given.
    pub option: String,
    /// What is wrong with it, and what is possible.
    pub why: &'static str,
}

const QUEUES: &str = "a number of queues is wanted, 1 to 16";
const SERIAL: &str = "1 to 20 letters, digits, - _ or . are wanted";
const PATH: &str = "a file's path is wanted";
const IO: &str = "auto, uring or threads is wanted";
const CACHE: &str = "writeback or unsafe is wanted";
const ON_OFF: &str = "on or off is wanted";
const TWICE: &str = "it is there twice";
const OPTIONS: &str = "not one of path=FILE, readonly, cache=writeback|unsafe, id=SERIAL, queues=N, \
    io=auto|uring|threads (a path with a comma in it can only be in a --config file)";

impl DiskConfig {
    /// A disk that the guest can write, with the defaults.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        DiskConfig {
            path: path.into(),
            readonly: false,
            cache: Cache::default(),
            id: None,
            queues: 1,
            io: Io::default(),
        }
    }

    /// Reads the command line's form, and [checks](Self::check) it.
    ///
    /// # Errors
    /// The option that is none, is there twice, or has a value that it cannot have.
    pub fn parse(text: &str) -> Result<Self, DiskConfigError> {
        let mut disk = DiskConfig::new("");
        let mut seen = Vec::new();
        for option in text.split(',') {
            let wrong = |why| DiskConfigError {
                option: option.to_owned(),
                why,
            };
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (option, None),
            };
            match (key, value) {
                ("path", Some(path)) => disk.path = path.into(),
                ("path", None) => return Err(wrong(PATH)),
                ("readonly", None | Some("on")) => disk.readonly = true,
                ("readonly", Some("off")) => disk.readonly = false,
                ("readonly", Some(_)) => return Err(wrong(ON_OFF)),
                ("cache", Some("writeback")) => disk.cache = Cache::Writeback,
                ("cache", Some("unsafe")) => disk.cache = Cache::Unsafe,
                ("cache", _) => return Err(wrong(CACHE)),
                ("id", serial) => disk.id = Some(serial.unwrap_or_default().to_owned()),
                ("queues", value) => {
                    let value = value.unwrap_or_default();
                    // `parse` would take a sign.
                    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
                    let number = value.parse().ok().filter(|_| digits);
                    disk.queues = number.ok_or_else(|| wrong(QUEUES))?;
                }
                ("io", Some("auto")) => disk.io = Io::Auto,
                ("io", Some("uring")) => disk.io = Io::Uring,
                ("io", Some("threads")) => disk.io = Io::Threads,
                ("io", _) => return Err(wrong(IO)),
                _ => return Err(wrong(OPTIONS)),
            }
            if seen.contains(&key) {
                return Err(wrong(TWICE));
            }
            seen.push(key);
        }
        disk.check()?;
        Ok(disk)
    }

    /// Checks what can be checked without the file.
    ///
    /// # Errors
    /// The option with a value that it cannot have.
    pub fn check(&self) -> Result<(), DiskConfigError> {
        let wrong = |option: String, why| Err(DiskConfigError { option, why });
        if self.path.as_os_str().is_empty() {
            return wrong("path=".into(), PATH);
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return wrong(format!("queues={}", self.queues), QUEUES);
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if let Some(id) = &self.id
            && !((1..=MAX_SERIAL).contains(&id.len()) && id.bytes().all(plain))
        {
            return wrong(format!("id={id}"), SERIAL);
        }
        Ok(())
    }
}

fn one() -> u16 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_and_json_say_the_same() {
        let text = "path=/a b,readonly,cache=unsafe,id=disk-1,queues=16,io=threads";
        let json = r#"{"path": "/a b", "readonly": true, "cache": "unsafe", "id": "disk-1", "queues": 16, "io": "threads"}"#;
        let parsed = DiskConfig::parse(text).unwrap();
        assert_eq!(parsed, serde_json::from_str(json).unwrap());
        assert_eq!(parsed.io, Io::Threads);
        let plain = DiskConfig::parse("path=x").unwrap();
        assert_eq!(plain, DiskConfig::new("x"));
        assert_eq!(plain, serde_json::from_str(r#"{"path": "x"}"#).unwrap());
    }

    #[test]
    fn what_cannot_be_is_told_with_its_key_and_value() {
        for (text, option, why) in [
            ("", "", "path=FILE"),
            ("path=", "path=", "a file's path"),
            ("readonly", "path=", "a file's path"),
            ("path=a,path=b", "path=b", "twice"),
            ("path=a,queues=0", "queues=0", "1 to 16"),
            ("path=a,queues=17", "queues=17", "1 to 16"),
            ("path=a,queues=+1", "queues=+1", "1 to 16"),
            ("path=a,readonly=yes", "readonly=yes", "on or off"),
            ("path=a,cache=none", "cache=none", "writeback or unsafe"),
            ("path=a,io=aio", "io=aio", "auto, uring or threads"),
            ("path=a,id=", "id=", "1 to 20"),
            ("path=a,id=a b", "id=a b", "letters"),
            (
                "path=a,id=123456789012345678901",
                "id=123456789012345678901",
                "1 to 20",
            ),
            ("path=a,size=1", "size=1", "io=auto|uring|threads"),
        ] {
            let error = DiskConfig::parse(text).unwrap_err();
            assert_eq!(error.option, option, "{text}");
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
        assert!(serde_json::from_str::<DiskConfig>(r#"{"path": "x", "size": 1}"#).is_err());
    }
}
