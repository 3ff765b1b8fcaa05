// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A configuration as JSON, in the form in which `--config` reads it.
//!
//! The paths of what a restore opens are made absolute, for it may be done from another directory.

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use memslots::HugePages;
use serde_json::{Value, json};

use crate::config::{Config, Irqchip};
use crate::devices::virtio::block::{Cache, DiskConfig, Io};
use crate::devices::virtio::console::config::{ConsoleConfig, PortConfig, PortEnd};

/// A path that no snapshot can say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// It is not UTF-8, which JSON is.
    #[error(
        "the path {0:?} is not UTF-8, and a snapshot could not say it: open the file by another name"
    )]
    NotUtf8(PathBuf),
    /// The process has no current directory.
    #[error("cannot find out where {path} is: {source}")]
    Relative {
        /// The path.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

/// The configuration as JSON.
///
/// # Errors
/// [`PathError`].
pub fn to_json(config: &Config) -> Result<Value, PathError> {
    let Config {
        kernel,
        initrd,
        cmdline,
        memory,
        cpus,
        cpu,
        irqchip,
        pit,
        debug_exit,
        coalesce_console,
        dirty_log,
        disks,
        nets,
        vsock,
        console,
        ports,
        rng,
        kvm,
    } = config;
    let initrd = initrd.iter().map(|path| text(path));
    let disks = disks.iter().map(disk).collect::<Result<Vec<_>, _>>()?;
    let nets: Vec<_> = nets
        .iter()
        .map(|net| json!({"tap": net.tap, "mac": net.mac, "queues": net.queues, "mtu": net.mtu}))
        .collect();
    let ports = ports.iter().map(port).collect::<Result<Vec<_>, _>>()?;
    let mut object = json!({
        "kernel": kernel.as_deref().map(text).transpose()?,
        "initrd": initrd.collect::<Result<Vec<_>, _>>()?,
        "cmdline": cmdline,
        "memory": {
            "size": memory.size,
            "shared": memory.shared,
            "hugepages": memory.hugepages.map(memslots::HugePageSize::bytes),
            "prefault": memory.prefault,
            "thp": match memory.thp {
                HugePages::Advise => Value::from("always"),
                HugePages::Never => Value::from("never"),
                _ => Value::Null,
            },
            "numa": memory.numa,
        },
        "cpus": {"count": cpus.count},
        "cpu": cpu,
        "irqchip": match irqchip {
            Irqchip::Kernel => "kernel",
            Irqchip::Split => "split",
            Irqchip::None => "none",
        },
        "pit": pit,
        "debug-exit": debug_exit,
        "coalesce-console": coalesce_console,
        "dirty-log": dirty_log.to_string(),
        "disk": disks,
        "net": nets,
        "console": match console {
            ConsoleConfig::Off => json!("off"),
            ConsoleConfig::Stdio => json!("stdio"),
            ConsoleConfig::File(path) => json!({"file": text(path)?}),
            ConsoleConfig::Unix(path) => json!({"unix": text(path)?}),
        },
        "port": ports,
        "rng": rng,
        "kvm": text(kvm)?,
    });
    // Said where it is so: who does not know the word can take every other machine.
    if memory.guest_memfd {
        object["memory"]["guest-memfd"] = true.into();
    }
    if let Some(vsock) = vsock {
        object["vsock"] = json!({"cid": vsock.cid, "uds": text(&vsock.uds)?});
    }
    let arranged = [
        ("sockets", cpus.sockets),
        ("cores", cpus.cores),
        ("threads", cpus.threads),
    ];
    for (key, number) in arranged {
        if let Some(number) = number {
            object["cpus"][key] = number.into();
        }
    }
    Ok(object)
}

fn disk(disk: &DiskConfig) -> Result<Value, PathError> {
    Ok(json!({
        "path": text(&disk.path)?,
        "readonly": disk.readonly,
        "cache": match disk.cache {
            Cache::Writeback => "writeback",
            Cache::Unsafe => "unsafe",
        },
        "id": disk.id,
        "queues": disk.queues,
        "io": match disk.io {
            Io::Auto => "auto",
            Io::Uring => "uring",
            Io::Threads => "threads",
        },
    }))
}

fn port(port: &PortConfig) -> Result<Value, PathError> {
    Ok(match &port.to {
        PortEnd::File(path) => json!({"name": port.name, "file": text(path)?}),
        PortEnd::Unix(path) => json!({"name": port.name, "unix": text(path)?}),
    })
}

/// An absolute path, as text.
fn text(path: &Path) -> Result<String, PathError> {
    let absolute = std::path::absolute(path).map_err(|source| PathError::Relative {
        path: path.to_owned(),
        source,
    })?;
    let text = absolute.into_os_string().into_string();
    text.map_err(|path| PathError::NotUtf8(path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu_model::CpuModel;
    use crate::cpus::Cpus;

    #[test]
    fn a_configuration_is_read_back_as_it_was() {
        let full = Config {
            initrd: vec!["/i".into(), "/j".into()],
            cmdline: "a \"b\" ü".into(),
            memory: "1G,shared,hugepages=2M,prefault,numa=0".parse().unwrap(),
            cpus: Cpus {
                threads: Some(2),
                ..Cpus::new(4)
            },
            cpu: CpuModel::try_from(PathBuf::from("x86-64-v2")).unwrap(),
            irqchip: Irqchip::Kernel,
            pit: true,
            debug_exit: Some(0xf4),
            coalesce_console: false,
            dirty_log: "ring=4096".parse().unwrap(),
            disks: vec![
                DiskConfig::parse("path=/a,readonly,cache=unsafe,id=x,queues=3,io=threads")
                    .unwrap(),
                DiskConfig::parse("path=/b,io=uring").unwrap(),
            ],
            nets: vec![
                "tap=t,mac=02:00:5e:10:00:01,queues=2,mtu=9000"
                    .parse()
                    .unwrap(),
                "tap=u".parse().unwrap(),
            ],
            vsock: Some(crate::devices::virtio::vsock::VsockConfig {
                cid: 3,
                uds: "/v".into(),
            }),
            console: ConsoleConfig::parse("unix=/c").unwrap(),
            ports: vec![PortConfig::parse("name=p,file=/p").unwrap()],
            rng: true,
            ..Config::new("/k")
        };
        let thp = Config {
            memory: "1G,thp=never".parse().unwrap(),
            console: ConsoleConfig::Stdio,
            irqchip: Irqchip::None,
            ..Config::new("/k")
        };
        let guest_memfd = Config {
            memory: "1G,guest-memfd".parse().unwrap(),
            ..Config::new("/k")
        };
        for config in [full, thp, guest_memfd, Config::new("/k")] {
            let text = to_json(&config).unwrap().to_string();
            assert_eq!(text.contains("guest-memfd"), config.memory.guest_memfd);
            assert_eq!(
                serde_json::from_str::<Config>(&text).unwrap(),
                config,
                "{text}"
            );
        }
    }

    #[test]
    fn a_path_is_absolute_and_one_that_json_cannot_say_is_told() {
        use std::os::unix::ffi::OsStringExt;
        let json = to_json(&Config::new("k")).unwrap();
        let here = std::env::current_dir().unwrap().join("k");
        assert_eq!(json["kernel"], here.to_str().unwrap());
        let odd = PathBuf::from(std::ffi::OsString::from_vec(b"/\xff".to_vec()));
        let error = to_json(&Config::new(odd)).unwrap_err().to_string();
        assert!(error.contains("xFF"), "{error}");
    }
}
