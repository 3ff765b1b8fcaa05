// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A [`Config`] from a JSON file, with errors that name the key and the value.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};

use super::{Config, ConfigError, JsonFile, parse_size};

/// Longest JSON configuration read.
pub(super) const MAX_CONFIG_FILE: u64 = 1 << 20;

/// Reads a JSON object of at most [`MAX_CONFIG_FILE`] bytes from a regular file.
pub(crate) fn read_json<T: DeserializeOwned>(
    what: JsonFile,
    path: &Path,
) -> Result<T, ConfigError> {
    let read = |source| ConfigError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    // Asked before the file is opened, because opening a pipe waits for its other end.
    let file_type = fs::metadata(path).map_err(read)?.file_type();
    if !file_type.is_file() {
        return Err(ConfigError::NotAFile {
            what,
            path: path.to_owned(),
            is: match file_type.is_dir() {
                true => "a directory",
                false => "not a regular file",
            },
        });
    }
    let file = File::open(path).map_err(read)?;
    let mut len = file.metadata().map_err(read)?.len();
    let mut text = Vec::new();
    if len <= MAX_CONFIG_FILE {
        // A file may grow meanwhile, and those of /proc have no length beforehand.
        file.take(MAX_CONFIG_FILE + 1)
            .read_to_end(&mut text)
            .map_err(read)?;
        len = text.len() as u64;
    }
    if len > MAX_CONFIG_FILE {
        return Err(ConfigError::TooLarge {
            what,
            path: path.to_owned(),
            len,
        });
    }
    let json = |source| ConfigError::Json {
        what,
        path: path.to_owned(),
        source,
    };
    // A list of the fields' values in their order would be one to serde.
    if text.trim_ascii_start().starts_with(b"[") {
        let wanted = "a list, and an object is wanted";
        return Err(json(serde::de::Error::custom(wanted)));
    }
    serde_json::from_slice(&text).map_err(json)
}

/// The value of `key`; of what is wrong with it, the error says where it is.
pub(crate) fn field<'de, T, A>(map: &mut A, key: &str) -> Result<T, A::Error>
where
    T: Deserialize<'de>,
    A: MapAccess<'de>,
{
    let value = map.next_value();
    value.map_err(|error| de::Error::custom(format_args!("{key}: {error}")))
}

/// Reads an object, key by key with its value by [`field`]; `read` says no where there is no such key.
pub(crate) fn object<'de, A: MapAccess<'de>>(
    mut map: A,
    keys: &'static [&'static str],
    mut read: impl FnMut(&str, &mut A) -> Result<bool, A::Error>,
) -> Result<(), A::Error> {
    let mut seen: Vec<String> = Vec::new();
    while let Some(key) = map.next_key::<String>()? {
        if seen.contains(&key) {
            return Err(de::Error::custom(format_args!("{key} is there twice")));
        }
        if !read(&key, &mut map)? {
            return Err(de::Error::unknown_field(&key, keys));
        }
        seen.push(key);
    }
    Ok(())
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ConfigVisitor)
    }
}

struct ConfigVisitor;

impl<'de> Visitor<'de> for ConfigVisitor {
    type Value = Config;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Config, A::Error> {
        const KEYS: &[&str] = &[
            "kernel",
            "initrd",
            "cmdline",
            "memory",
            "cpus",
            "cpu",
            "irqchip",
            "pit",
            "debug-exit",
            "coalesce-console",
            "dirty-log",
            "disk",
            "net",
            "vsock",
            "console",
            "port",
            "rng",
            "kvm",
        ];
        let mut config = Config::default();
        object(map, KEYS, |key, map| {
            match key {
                "kernel" => config.kernel = field(map, key)?,
                "initrd" => config.initrd = field::<Paths, A>(map, key)?.0,
                "cmdline" => config.cmdline = field(map, key)?,
                "memory" => config.memory = field(map, key)?,
                "cpus" => config.cpus = field(map, key)?,
                "cpu" => config.cpu = field(map, key)?,
                "irqchip" => config.irqchip = field(map, key)?,
                "pit" => config.pit = field(map, key)?,
                "debug-exit" => config.debug_exit = field(map, key)?,
                "coalesce-console" => config.coalesce_console = field(map, key)?,
                "dirty-log" => config.dirty_log = field(map, key)?,
                "disk" => config.disks = field::<Several<_>, A>(map, key)?.0,
                "net" => config.nets = field::<Several<_>, A>(map, key)?.0,
                "vsock" => config.vsock = Some(field::<Object<_>, A>(map, key)?.0),
                "console" => config.console = field(map, key)?,
                "port" => config.ports = field::<Several<_>, A>(map, key)?.0,
                "rng" => config.rng = field(map, key)?,
                "kvm" => config.kvm = field(map, key)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(config)
    }
}

/// A size, as a number of bytes or as text.
pub(crate) struct Size(pub(crate) u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or text such as \"512M\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                parse_size(text).map(Size).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// An object, where serde would take a list of the fields' values in their order as well.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_any(ObjectVisitor(PhantomData))
    }
}

/// One object or several.
struct Several<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Several<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SeveralVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for SeveralVisitor<T> {
            type Value = Several<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object or a list of objects")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Several<T>, A::Error> {
                let one = T::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Several(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Several<T>, A::Error> {
                let mut several = Vec::new();
                while let Some(Object(one)) = seq.next_element()? {
                    several.push(one);
                }
                Ok(Several(several))
            }
        }
        deserializer.deserialize_any(SeveralVisitor(PhantomData))
    }
}

/// One path or several.
struct Paths(Vec<PathBuf>);

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PathsVisitor;
        impl<'de> Visitor<'de> for PathsVisitor {
            type Value = Paths;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path or a list of paths")
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<Paths, E> {
                Ok(Paths(vec![path.into()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Paths, A::Error> {
                let mut paths = Vec::new();
                while let Some(path) = seq.next_element()? {
                    paths.push(path);
                }
                Ok(Paths(paths))
            }
        }
        deserializer.deserialize_any(PathsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    #[test]
    fn a_file_has_the_same_fields_and_defaults_and_no_others() {
        let parse = |text: &str| serde_json::from_str::<Config>(text);
        let config = parse(r#"{"kernel": "k", "memory": "1G", "initrd": "i", "debug-exit": 244}"#);
        let expected = Config {
            memory: Memory::new(1 << 30),
            initrd: vec!["i".into()],
            debug_exit: Some(0xf4),
            ..Config::new("k")
        };
        assert_eq!(config.unwrap(), expected);
        assert_eq!(parse(r#"{"kernel": "k"}"#).unwrap(), Config::new("k"));
        // Without a kernel it is a file still, and no machine.
        let none = parse("{}").unwrap();
        assert_eq!(none, Config::default());
        assert!(matches!(none.validate(), Err(ConfigError::NoKernel)));
        assert!(
            parse(r#"{"kernel": "k", "colour": 2}"#)
                .unwrap_err()
                .to_string()
                .contains("`colour`")
        );
    }

    #[test]
    fn what_is_wrong_in_a_file_is_told_with_its_key_and_its_value() {
        for (text, needles) in [
            (
                r#"{"kernel": 1}"#,
                &["kernel: ", "`1`", "line 1 column 12"][..],
            ),
            (r#"{"initrd": 5}"#, &["initrd: ", "`5`", "a path or a list"]),
            (r#"{"initrd": ["i", 5]}"#, &["initrd: ", "`5`"]),
            (r#"{"cpus": "two"}"#, &["cpus: ", "\"two\""]),
            (r#"{"cpus": 4294967296}"#, &["cpus: ", "`4294967296`"]),
            (
                r#"{"irqchip": "apic"}"#,
                &["irqchip: ", "`apic`", "`split`"],
            ),
            (r#"{"pit": 1}"#, &["pit: ", "`1`"]),
            (r#"{"debug-exit": 65536}"#, &["debug-exit: ", "`65536`"]),
            (
                r#"{"coalesce-console": "on"}"#,
                &["coalesce-console: ", "\"on\""],
            ),
            (r#"{"memory": "lots"}"#, &["memory: ", "\"lots\""]),
            (r#"{"memory": -1}"#, &["memory: ", "`-1`"]),
            (r#"{"memory": {"size": "x"}}"#, &["memory: size: ", "\"x\""]),
            (
                r#"{"memory": {"size": []}}"#,
                &["memory: size: ", "sequence"],
            ),
            (r#"{"memory": {"shared": 5}}"#, &["memory: shared: ", "`5`"]),
            (
                r#"{"memory": {"hugepages": 3}}"#,
                &["memory: hugepages: ", "`3`"],
            ),
            (r#"{"memory": {"thp": "on"}}"#, &["memory: thp: ", "`on`"]),
            (r#"{"memory": {"numa": -1}}"#, &["memory: numa: ", "`-1`"]),
            (r#"{"pit": true, "pit": true}"#, &["pit", "twice"]),
            (
                r#"{"disk": [["d", true]]}"#,
                &["disk: ", "sequence", "an object"],
            ),
            (r#"{"vsock": [3, "v"]}"#, &["vsock: ", "sequence"]),
            (r#"{"port": [["a", "b"]]}"#, &["port: ", "sequence"]),
        ] {
            let error = serde_json::from_str::<Config>(text).unwrap_err();
            let error = error.to_string();
            for needle in needles {
                assert!(
                    error.contains(needle),
                    "{text}: {error:?} has no {needle:?}"
                );
            }
            assert_eq!(error.matches(" at line ").count(), 1, "{error}");
        }
    }
}
