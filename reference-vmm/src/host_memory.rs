// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the host's kernel says of the memory that guests can be made of, in sysfs: its pools of huge
//! pages, when transparent huge pages serve, its NUMA nodes.
//!
//! `doctor` shows it; [`memory`](crate::memory) warns by it of a wish that has no effect. Nothing here
//! fails: a file that is not there (a kernel without the feature, a jail without sysfs) is left out. One
//! that is there and cannot be read is left out too, and [`Files`] tells of it.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::{fs, io};

use memslots::HugePageSize;

/// Where sysfs is.
pub const SYSFS: &str = "/sys";

/// The host's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostMemory {
    /// The pools of huge pages, by size of their pages.
    pub pools: Vec<Pool>,
    /// When transparent huge pages serve.
    pub transparent: Transparent,
    /// The NUMA nodes with memory, by number. A kernel without NUMA shows none.
    pub nodes: Vec<Node>,
}

/// A pool of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Of each page.
    pub page_size: HugePageSize,
    /// Pages in it.
    pub pages: u64,
    /// Those in no mapping.
    pub free: u64,
    /// Those of the free ones that are promised to mappings.
    pub reserved: u64,
}

/// The settings of transparent huge pages (Documentation/admin-guide/mm/transhuge.rst).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transparent {
    /// Those of private memory.
    pub private: Option<Setting>,
    /// Those of shared memory.
    pub shared: Option<Setting>,
}

/// One setting, and those of each size of pages that can be other than it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The file with it.
    pub file: PathBuf,
    /// Its word: `always`, `madvise` or `never`; of shared memory also others.
    pub word: String,
    /// Each size's own file and word, where the kernel has them (6.8 and later).
    pub sizes: Vec<(PathBuf, String)>,
}

/// A NUMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: u32,
    /// Bytes of memory.
    pub total: u64,
    /// Bytes of it that nobody uses, not even as a cache.
    pub free: u64,
}

/// How much memory the host has in all, in bytes. One system call and no file, for every start asks.
pub fn total() -> Option<u64> {
    let mut info = MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the call writes a sysinfo, and zeroes are one already.
    let info = unsafe {
        if libc::sysinfo(info.as_mut_ptr()) != 0 {
            return None;
        }
        info.assume_init()
    };
    info.totalram.checked_mul(info.mem_unit.into())
}

/// Reads the kernel's files, and remembers the first one that it could not read though it is there: for
/// want of a descriptor, perhaps.
#[derive(Debug, Default)]
pub struct Files {
    unread: RefCell<Option<String>>,
}

impl Files {
    /// The first that could not be read, and why.
    pub fn unread(&self) -> Option<String> {
        self.unread.borrow().clone()
    }

    /// A file's text; `None` if it is not there, or not to be read.
    pub fn text(&self, file: &Path) -> Option<String> {
        self.note(file, fs::read_to_string(file))
    }

    /// What is in a folder; nothing if it is not there, or not to be read.
    pub fn folder(&self, folder: &Path) -> Vec<fs::DirEntry> {
        let entries = fs::read_dir(folder).and_then(Iterator::collect);
        self.note(folder, entries).unwrap_or_default()
    }

    fn note<T>(&self, path: &Path, read: io::Result<T>) -> Option<T> {
        match read {
            Ok(read) => return Some(read),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                let mut unread = self.unread.borrow_mut();
                unread.get_or_insert_with(|| format!("{}: {error}", path.display()));
            }
        }
        None
    }
}

impl HostMemory {
    /// Reads what the sysfs mounted at `sysfs` says.
    pub fn read(sysfs: &Path) -> Self {
        Self::read_by(&Files::default(), sysfs)
    }

    /// The same, and `files` has what could not be read.
    pub fn read_by(files: &Files, sysfs: &Path) -> Self {
        HostMemory {
            pools: pools(files, &sysfs.join("kernel/mm/hugepages")),
            transparent: Transparent::read_by(files, sysfs),
            nodes: nodes(files, &sysfs.join("devices/system/node")),
        }
    }
}

impl Transparent {
    /// Reads what the sysfs mounted at `sysfs` says.
    pub fn read(sysfs: &Path) -> Self {
        Self::read_by(&Files::default(), sysfs)
    }

    fn read_by(files: &Files, sysfs: &Path) -> Self {
        let folder = sysfs.join("kernel/mm/transparent_hugepage");
        Transparent {
            private: Setting::read(files, &folder, "enabled"),
            shared: Setting::read(files, &folder, "shmem_enabled"),
        }
    }
}

impl Setting {
    fn read(files: &Files, folder: &Path, name: &str) -> Option<Self> {
        let file = folder.join(name);
        let word = chosen(files, &file)?;
        let sizes = numbered(files, folder, "hugepages-", "kB").into_iter();
        let own = sizes.filter_map(|(_, folder)| {
            let file = folder.join(name);
            chosen(files, &file).map(|word| (file, word))
        });
        Some(Setting {
            word,
            sizes: own.collect(),
            file,
        })
    }

    /// The file and the word that keep even memory that asks for them from getting transparent huge
    /// pages; `None` where it can get some. (Of a size whose word is `inherit`, the general one counts;
    /// a general `deny` counts for all sizes.)
    pub fn obstacle(&self) -> Option<(&Path, &str)> {
        let has = |words: fn(&str) -> bool| self.sizes.iter().any(|(_, own)| words(own));
        let own = has(|own| !matches!(own, "inherit" | "never"));
        let inherits = self.sizes.is_empty() || has(|own| own == "inherit");
        match &*self.word {
            "deny" => {}
            _ if own => return None,
            "never" => {}
            _ if inherits => return None,
            // The largest is the one that huge pages are known by.
            _ => return self.sizes.last().map(|(file, own)| (&**file, &**own)),
        }
        Some((&self.file, &self.word))
    }
}

fn pools(files: &Files, folder: &Path) -> Vec<Pool> {
    let pool = |(kib, folder): (u64, PathBuf)| {
        let number = |name: &str| files.text(&folder.join(name))?.trim().parse().ok();
        Some(Pool {
            page_size: HugePageSize::new(kib.checked_mul(1024)?)?,
            pages: number("nr_hugepages")?,
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
        })
    };
    let folders = numbered(files, folder, "hugepages-", "kB").into_iter();
    folders.filter_map(pool).collect()
}

fn nodes(files: &Files, folder: &Path) -> Vec<Node> {
    let node = |(number, folder): (u64, PathBuf)| {
        let meminfo = files.text(&folder.join("meminfo"))?;
        // "Node 0 MemTotal:       16869588 kB"
        let bytes = |name: &str| {
            let value = meminfo.lines().find_map(|line| line.split_once(name))?.1;
            let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(Node {
            number: number.try_into().ok()?,
            total: bytes("MemTotal:")?,
            free: bytes("MemFree:")?,
        })
    };
    let nodes = numbered(files, folder, "node", "");
    let nodes = nodes.into_iter().filter_map(node);
    nodes.filter(|node| node.total > 0).collect()
}

/// The word in brackets: `always [madvise] never`.
fn chosen(files: &Files, file: &Path) -> Option<String> {
    let text = files.text(file)?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// What of a folder has a name with a number between these, by number.
fn numbered(files: &Files, folder: &Path, before: &str, after: &str) -> Vec<(u64, PathBuf)> {
    let entries = files.folder(folder).into_iter();
    let number = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let number = name.strip_prefix(before)?.strip_suffix(after)?;
        Some((number.parse().ok()?, entry.path()))
    };
    let mut found: Vec<_> = entries.filter_map(number).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with these files.
    fn sysfs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn pools_and_nodes_are_read_in_order_of_their_numbers() {
        let root = sysfs(&[
            (
                "kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
                "1\n",
            ),
            (
                "kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
                "0\n",
            ),
            (
                "kernel/mm/hugepages/hugepages-1048576kB/resv_hugepages",
                "0\n",
            ),
            ("kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "16\n"),
            (
                "kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
                "12\n",
            ),
            ("kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "2\n"),
            (
                "kernel/mm/hugepages/hugepages-64kB/nr_hugepages",
                "nonsense",
            ),
            (
                "devices/system/node/node10/meminfo",
                "Node 10 MemTotal: 8 kB\nNode 10 MemFree: 4 kB\n",
            ),
            (
                "devices/system/node/node2/meminfo",
                "\nNode 2 MemTotal:  16 kB\nNode 2 MemFree: 0 kB\n",
            ),
            (
                "devices/system/node/node3/meminfo",
                "Node 3 MemTotal: 0 kB\nNode 3 MemFree: 0 kB\n",
            ),
            ("devices/system/node/has_memory", "2,10\n"),
        ]);
        let memory = HostMemory::read(root.path());
        let pool = |page_size, pages, free, reserved| Pool {
            page_size,
            pages,
            free,
            reserved,
        };
        assert_eq!(
            memory.pools,
            [
                pool(HugePageSize::MIB_2, 16, 12, 2),
                pool(HugePageSize::GIB_1, 1, 0, 0)
            ]
        );
        let node = |number, total, free| Node {
            number,
            total,
            free,
        };
        assert_eq!(
            memory.nodes,
            [node(2, 16 << 10, 0), node(10, 8 << 10, 4 << 10)]
        );
        assert_eq!(memory.transparent, Transparent::default());
    }

    #[test]
    fn the_hosts_memory_is_the_one_that_it_shows() {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let line = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"));
        let kib: u64 = line
            .unwrap()
            .trim()
            .trim_end_matches("kB")
            .trim()
            .parse()
            .unwrap();
        assert_eq!(total(), Some(kib << 10));
    }

    #[test]
    fn a_host_that_shows_nothing_has_nothing() {
        let root = sysfs(&[]);
        let files = Files::default();
        let memory = HostMemory::read_by(&files, root.path());
        assert_eq!((memory, files.unread()), (HostMemory::default(), None));
    }

    #[test]
    fn what_is_there_and_cannot_be_read_is_remembered() {
        // A folder in a file's place, and a file in a folder's.
        let root = sysfs(&[
            ("kernel/mm/transparent_hugepage/enabled/x", ""),
            ("devices/system/node", ""),
        ]);
        let files = Files::default();
        let memory = HostMemory::read_by(&files, root.path());
        assert_eq!(memory, HostMemory::default());
        let unread = files.unread().unwrap();
        assert!(
            unread.contains("transparent_hugepage/enabled: "),
            "{unread}"
        );
        assert!(unread.contains("directory"), "{unread}");
    }

    /// What stands in the way of a setting with this general word and these of sizes: the file's path
    /// without its folder, and the word.
    fn obstacle(word: &str, sizes: &[(&str, &str)]) -> Option<(String, String)> {
        let folder = "kernel/mm/transparent_hugepage";
        let all = format!("x [{word}] y\n");
        let own: Vec<_> = sizes
            .iter()
            .map(|(kib, word)| {
                (
                    format!("{folder}/hugepages-{kib}kB/enabled"),
                    format!("[{word}]"),
                )
            })
            .collect();
        let general = format!("{folder}/enabled");
        let mut files = vec![(&*general, &*all)];
        files.extend(own.iter().map(|(path, text)| (&**path, &**text)));
        let root = sysfs(&files);
        let setting = Transparent::read(root.path()).private.unwrap();
        assert_eq!(setting.word, word);
        let (file, word) = setting.obstacle()?;
        let file = file.strip_prefix(root.path().join(folder)).unwrap();
        Some((file.display().to_string(), word.to_owned()))
    }

    #[test]
    fn what_stands_in_the_way_is_the_file_that_says_never() {
        let found = |file: &str, word: &str| Some((file.to_owned(), word.to_owned()));
        // Kernels before 6.8 have no sizes.
        for word in ["always", "madvise", "within_size", "advise", "force"] {
            assert_eq!(obstacle(word, &[]), None, "{word}");
        }
        for word in ["never", "deny"] {
            assert_eq!(obstacle(word, &[]), found("enabled", word));
            let inherit = [("64", "never"), ("2048", "inherit")];
            assert_eq!(obstacle(word, &inherit), found("enabled", word));
        }
        // A size has a word of its own, which counts but against "deny".
        let own = [("64", "madvise"), ("2048", "inherit")];
        assert_eq!(obstacle("never", &own), None);
        assert_eq!(obstacle("deny", &own), found("enabled", "deny"));
        assert_eq!(
            obstacle("madvise", &[("64", "never"), ("2048", "inherit")]),
            None
        );
        let none = [("64", "never"), ("2048", "never")];
        assert_eq!(
            obstacle("always", &none),
            found("hugepages-2048kB/enabled", "never")
        );
    }
}
