// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices as they are asked for: on the command line, in a `--config` file, and what of it is opened.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::path::Path;

use reference_vmm::cli::{Command, parse};
use reference_vmm::config::Config;
use reference_vmm::devices::virtio::any::Devices;
use reference_vmm::devices::virtio::block::DiskConfig;
use reference_vmm::devices::virtio::console::config::{ConsoleConfig, PortConfig, PortEnd};

fn run(words: &[&str]) -> Result<Config, String> {
    let words = ["reference-vmm", "run", "--kernel", "k"]
        .iter()
        .chain(words);
    match parse(words) {
        Ok(Command::Run(run)) => Ok(run.config),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn the_command_line_and_a_file_say_the_same_of_each_device() {
    let flags = run(&[
        "--disk",
        "path=/a,readonly",
        "--disk",
        "path=/b,queues=2",
        "--net",
        "tap=t0,mtu=9000",
        "--vsock",
        "cid=3,uds=/v",
        "--console",
        "unix=/c",
        "--port",
        "name=p,file=/p",
        "--rng",
    ]);
    let file = r#"{"kernel": "k", "disk": [{"path": "/a", "readonly": true}, {"path": "/b", "queues": 2}],
        "net": {"tap": "t0", "mtu": 9000}, "vsock": {"cid": 3, "uds": "/v"}, "console": {"unix": "/c"},
        "port": [{"name": "p", "file": "/p"}], "rng": true}"#;
    let flags = flags.unwrap();
    assert_eq!(flags, serde_json::from_str::<Config>(file).unwrap());
    assert_eq!((flags.disks.len(), flags.nets.len()), (2, 1));
}

#[test]
fn what_is_on_the_command_line_stands_alone() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let text = br#"{"disk": [{"path": "/a"}, {"path": "/b"}], "net": [{"tap": "t0"}], "port": {"name": "p", "file": "/p"}}"#;
    std::io::Write::write_all(&mut file, text).unwrap();
    let path = file.path().to_str().unwrap();
    let all = ["--config", path, "--disk", "path=/c", "--net", "tap=t1"];
    let config = run(&[&all[..], &["--port", "name=q,file=/q"]].concat()).unwrap();
    assert_eq!(config.disks, [DiskConfig::new("/c")]);
    assert_eq!((config.nets.len(), config.nets[0].tap.as_str()), (1, "t1"));
    assert_eq!(config.ports[0].name, "q");
    assert_eq!(run(&["--config", path]).unwrap().disks.len(), 2);
}

#[test]
fn what_is_wrong_is_told_with_its_flag_and_its_value() {
    for (words, needles) in [
        (
            &["--disk", "path=x,cache=none"][..],
            &["--disk", "cache=none"][..],
        ),
        (&["--disk", "readonly"], &["--disk", "path"]),
        (
            &["--net", "tap=t0,mac=01:00:00:00:00:01"],
            &["--net", "01:00"],
        ),
        (&["--net", "tap="], &["--net"]),
        (&["--vsock", "cid=2,uds=/v"], &["--vsock", "2"]),
        (&["--console", "tty"], &["--console", "tty"]),
        (&["--port", "name=a/b,file=/p"], &["--port", "a/b"]),
        (&["--port", "file=/p"], &["--port", "name"]),
        (
            &["--rng", "--irqchip", "none"],
            &["--irqchip split or kernel"],
        ),
    ] {
        let error = run(words).unwrap_err();
        for needle in needles {
            assert!(
                error.contains(needle),
                "{words:?}: {error:?} has no {needle:?}"
            );
        }
    }
    for (text, needle) in [
        (r#"{"disk": 5}"#, "disk: "),
        (r#"{"disk": [{"path": "x", "size": 1}]}"#, "`size`"),
        (r#"{"port": [{"name": "p"}]}"#, "missing"),
        (r#"{"vsock": []}"#, "vsock: "),
    ] {
        let error = serde_json::from_str::<Config>(text).unwrap_err();
        assert!(error.to_string().contains(needle), "{text}: {error}");
    }
    let twice = Config {
        disks: vec![DiskConfig::new("")],
        ..Config::new("k")
    };
    assert!(
        twice
            .validate()
            .unwrap_err()
            .to_string()
            .starts_with("--disk: ")
    );
}

fn open(config: &Config) -> Result<Devices, String> {
    let opened = Devices::open(config, std::io::stdout());
    opened.map_err(|error| format!("{} {error}", error.is_users_fault()))
}

#[test]
fn the_devices_of_a_configuration_are_opened_in_the_order_in_which_a_guest_finds_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    File::create(at("disk")).unwrap().set_len(1 << 20).unwrap();
    let text = format!(
        r#"{{"kernel": "k", "rng": true, "disk": {{"path": "{0}/disk"}}, "vsock": {{"cid": 3, "uds": "{0}/v"}}}}"#,
        folder.path().display()
    );
    let mut config: Config = serde_json::from_str(&text).unwrap();
    config.console = ConsoleConfig::File(at("console"));
    config.ports = vec![PortConfig {
        name: "agent".into(),
        to: PortEnd::Unix(at("agent")),
    }];
    let devices = open(&config).unwrap();
    assert_eq!(devices.len(), 5);
    // The image is locked, and who asks for it again is told so.
    let error = open(&config).map(drop).unwrap_err();
    assert!(
        error.starts_with("true --disk: ") && error.contains("in use"),
        "{error}"
    );
    // So is who asks for a socket that somebody listens at; that is the host's state, and no fault of the configuration.
    config.disks.clear();
    let error = open(&config).map(drop).unwrap_err();
    assert!(
        error.starts_with("false --vsock: ") && error.contains("listens there"),
        "{error}"
    );
    config.vsock = None;
    let error = open(&config).map(drop).unwrap_err();
    assert!(
        error.starts_with("false --port: ") && error.contains("listens there"),
        "{error}"
    );
    drop(devices);
    // Nothing of the sockets is left behind.
    assert!(!Path::new(&at("v")).exists() && !Path::new(&at("agent")).exists());
}

#[test]
fn what_cannot_be_opened_is_told_with_its_flag() {
    let missing = |change: fn(&mut Config)| {
        let mut config = Config::new("k");
        change(&mut config);
        open(&config).map(drop).unwrap_err()
    };
    let error = missing(|config| config.disks = vec![DiskConfig::new("/no/such/disk")]);
    assert!(
        error.starts_with("true --disk: ") && error.contains("/no/such/disk"),
        "{error}"
    );
    let error = missing(|config| config.console = ConsoleConfig::File("/no/such/folder/x".into()));
    assert!(error.starts_with("true --console: "), "{error}");
    let error = missing(|config| {
        config.ports = vec![PortConfig {
            name: "p".into(),
            to: PortEnd::Unix("/no/such/folder/x".into()),
        }];
    });
    assert!(error.starts_with("true --port: "), "{error}");
    let error = missing(|config| {
        config.nets = vec![reference_vmm::devices::virtio::net::NetConfig::new(
            "nosuchtap0",
        )];
    });
    assert!(
        error.contains("--net: ") && error.contains("nosuchtap0"),
        "{error}"
    );
}
