// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes every boot guest as an image into the folder named, for trying a monitor by hand, and says of each
//! with which flags of `reference-vmm run` it does what it is for.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use guests::{boot, console, debug, dirtier, image};

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let folder = match (words.next(), words.next()) {
        (Some(folder), None) if !folder.as_encoded_bytes().starts_with(b"-") => {
            std::path::PathBuf::from(folder)
        }
        (word, more) => {
            let usage = "Usage: write_images FOLDER    (made if it is not there; ./-x is one of the name -x)";
            if more.is_none() && word.is_some_and(|word| word == "--help" || word == "-h") {
                println!("{usage}");
                return ExitCode::SUCCESS;
            }
            eprintln!("{usage}");
            return ExitCode::from(2);
        }
    };
    match write(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write_images: {}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (name, flags, image) in [
        ("hello.elf", " --debug-exit", image::elf64(boot::hello64())),
        (
            "hello.bzimage",
            " --debug-exit",
            image::bzimage(boot::hello64()),
        ),
        ("byte.elf", "", image::elf64(boot::byte_and_reset64())),
        ("poweroff.elf", "", image::elf64(boot::poweroff64())),
        ("triple-fault.elf", "", image::elf64(boot::triple_fault64())),
        (
            "spin.elf",
            "    (until it is stopped)",
            image::elf64(boot::spin64()),
        ),
        (
            "dirtier.elf",
            " --memory 256M    (writes 4 MiB again and again, and says a digit each time, until it is stopped)",
            image::elf64(dirtier::dirtier64()),
        ),
        ("pvpanic.elf", "", image::elf64(boot::pvpanic64())),
        (
            "echo.elf",
            " --debug-exit    (until a q is typed)",
            image::elf64(boot::echo64()),
        ),
        (
            "boot-params.elf",
            " --debug-exit --cmdline TEXT",
            image::elf64(boot::boot_params64()),
        ),
        (
            "pvh.elf",
            " --debug-exit --cmdline TEXT",
            image::elf64_pvh(boot::pvh32()),
        ),
        (
            "multiboot.elf",
            " --debug-exit --cmdline TEXT",
            image::multiboot(boot::multiboot32()),
        ),
        (
            "smp.elf",
            " --debug-exit --cpus 4 --cmdline 4    (the same number twice)",
            image::elf64(boot::smp64()),
        ),
        (
            "polled.elf",
            " --debug-exit --cmdline 10000e    (so many bytes, then an end)",
            image::elf64(console::polled64()),
        ),
        (
            "debug.elf",
            " --gdb unix:/tmp/gdb",
            image::elf64(debug::debug64()),
        ),
        ("rom.elf", " --debug-exit", image::elf64(console::rom64())),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, image)
            .map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
        println!("--kernel {}{flags}", path.display());
    }
    Ok(())
}
