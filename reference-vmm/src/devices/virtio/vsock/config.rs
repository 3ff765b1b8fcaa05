// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `--vsock cid=N,uds=PATH`: the guest's address, and where the host finds it.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::Deserialize;

use super::device::Vsock;
use super::sockets::UnixSockets;
use crate::unix_socket::{BindError, MAX_PATH};

/// The address of the host (virtio 1.2, 5.10.4); 0 is a hypervisor's, 1 is local.
pub const HOST_CID: u64 = 2;

/// The longest `_PORT` behind the path.
const SUFFIX: usize = "_4294967295".len();

/// A vsock device, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address (its context id), unique among the host's guests only as far as the user cares: each
    /// guest's sockets are paths of its own.
    pub cid: u32,
    /// The Unix socket at which the guest is reached, and the first part of those that it reaches.
    pub uds: PathBuf,
}

/// A vsock device cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// No `key=value` that there is.
    #[error("{option:?}: {why}; cid=N,uds=PATH is wanted, as cid=3,uds=/run/guest.vsock")]
    Option {
        /// What was given.
        option: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A key is missing.
    #[error("{0} is missing; cid=N,uds=PATH is wanted, as cid=3,uds=/run/guest.vsock")]
    Missing(&'static str),
    /// An address that no guest can have.
    #[error("cid={0}: a guest's is from 3 to 4294967294")]
    Cid(u32),
    /// No path, or none for the kernel.
    #[error("uds={path:?}: {why}", path = path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The path cannot be listened at.
    #[error("uds={path}: {source}", path = path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        source: BindError,
    },
    /// The host has no descriptor for it.
    #[error("cannot {what}: {source}")]
    Host {
        /// What it was for.
        what: &'static str,
        /// The errno.
        source: std::io::Error,
    },
}

impl VsockError {
    /// Whether the user asked for what cannot be; else the host refused.
    pub fn is_users_fault(&self) -> bool {
        match self {
            VsockError::Bind { source, .. } => source.is_users_fault(),
            VsockError::Host { .. } => false,
            _ => true,
        }
    }
}

impl VsockConfig {
    /// Reads the command line's form, `cid=N,uds=PATH`. A path with a comma in it is for the JSON file.
    ///
    /// # Errors
    /// [`VsockError`]: the part that is none, or one that is missing.
    pub fn parse(text: &str) -> Result<Self, VsockError> {
        let (mut cid, mut uds) = (None, None);
        for option in text.split(',') {
            let wrong = |why| VsockError::Option {
                option: option.to_owned(),
                why,
            };
            let twice = match option.split_once('=') {
                Some(("cid", value)) => {
                    // `parse` would take a sign.
                    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
                    let number = value.parse().ok().filter(|_| digits);
                    let number = number.ok_or_else(|| wrong("a number is wanted"))?;
                    cid.replace(number).is_some()
                }
                Some(("uds", value)) => uds.replace(PathBuf::from(value)).is_some(),
                _ => return Err(wrong("not one of cid=N, uds=PATH")),
            };
            if twice {
                return Err(wrong("it is there twice"));
            }
        }
        let config = VsockConfig {
            cid: cid.ok_or(VsockError::Missing("cid=N"))?,
            uds: uds.ok_or(VsockError::Missing("uds=PATH"))?,
        };
        config.check()?;
        Ok(config)
    }

    /// Finds what is wrong in it without asking the host.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn check(&self) -> Result<(), VsockError> {
        if !(3..u32::MAX).contains(&self.cid) {
            return Err(VsockError::Cid(self.cid));
        }
        let bytes = self.uds.as_os_str().as_bytes();
        let room = MAX_PATH - SUFFIX;
        let why = if bytes.is_empty() {
            "a path is wanted".to_owned()
        } else if bytes.contains(&0) {
            "a path has no NUL in it".to_owned()
        } else if bytes.len() > room {
            let len = bytes.len();
            format!("the path has {len} bytes, and {room} leave room for the _PORT behind it")
        } else {
            return Ok(());
        };
        let path = self.uds.clone();
        Err(VsockError::Path { path, why })
    }

    /// The device, which listens at the path from now on. Who connects waits until the guest's driver is ready.
    ///
    /// # Errors
    /// [`VsockError`]; nothing was made.
    pub fn open(&self) -> Result<Vsock, VsockError> {
        self.check()?;
        let sockets = UnixSockets::listen(&self.uds).map_err(|source| VsockError::Bind {
            path: self.uds.clone(),
            source,
        })?;
        Vsock::new(self.cid, sockets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cid_and_a_path_are_read_in_any_order() {
        let expected = VsockConfig {
            cid: 3,
            uds: "/run/a=b".into(),
        };
        for text in ["cid=3,uds=/run/a=b", "uds=/run/a=b,cid=3"] {
            assert_eq!(VsockConfig::parse(text).unwrap(), expected);
        }
        let json = r#"{"cid": 3, "uds": "/run/a=b"}"#;
        assert_eq!(serde_json::from_str::<VsockConfig>(json).unwrap(), expected);
        let json = r#"{"cid": 3, "uds": "x", "port": 1}"#;
        let error = serde_json::from_str::<VsockConfig>(json).unwrap_err();
        assert!(error.to_string().contains("`port`"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_value() {
        let long = format!("cid=3,uds=/{}", "x".repeat(96));
        for (text, needle) in [
            ("", "\"\""),
            ("cid=3", "uds=PATH is missing"),
            ("uds=x", "cid=N is missing"),
            ("cid=3,uds=x,", "\"\""),
            ("cid=3,uds=x,port=4", "\"port=4\""),
            ("cid=3,cid=4,uds=x", "\"cid=4\": it is there twice"),
            ("cid=+3,uds=x", "\"cid=+3\""),
            ("cid=4294967296,uds=x", "\"cid=4294967296\""),
            ("cid=,uds=x", "\"cid=\""),
            ("cid=2,uds=x", "cid=2"),
            ("cid=4294967295,uds=x", "cid=4294967295"),
            ("cid=3,uds=", "a path is wanted"),
            (&long, "97 bytes, and 96"),
        ] {
            let error = VsockConfig::parse(text).unwrap_err();
            assert!(error.to_string().contains(needle), "{text}: {error}");
            assert!(error.is_users_fault());
        }
        VsockConfig::parse(&long[..long.len() - 1]).unwrap();
    }

    #[test]
    fn a_folder_that_is_none_is_the_users_fault_and_a_path_in_use_the_hosts_state() {
        let folder = tempfile::tempdir().unwrap();
        let config = VsockConfig {
            cid: 3,
            uds: folder.path().join("v.sock"),
        };
        let device = config.open().unwrap();
        assert!(!config.open().unwrap_err().is_users_fault());
        drop(device);
        assert!(!config.uds.exists());
        let uds = folder.path().join("none/v.sock");
        let error = VsockConfig { uds, ..config }.open().unwrap_err();
        assert!(error.is_users_fault(), "{error}");
    }
}
