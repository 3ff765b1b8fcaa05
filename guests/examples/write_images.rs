// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes every boot guest as an image into the folder named: for trying a monitor by hand.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use guests::{boot, console, debug, image};

fn main() {
    let folder = std::path::PathBuf::from(std::env::args().nth(1).expect("a folder"));
    std::fs::create_dir_all(&folder).unwrap();
    for (name, image) in [
        ("hello.elf", image::elf64(boot::hello64())),
        ("hello.bzimage", image::bzimage(boot::hello64())),
        ("byte.elf", image::elf64(boot::byte_and_reset64())),
        ("poweroff.elf", image::elf64(boot::poweroff64())),
        ("triple-fault.elf", image::elf64(boot::triple_fault64())),
        ("spin.elf", image::elf64(boot::spin64())),
        ("pvpanic.elf", image::elf64(boot::pvpanic64())),
        ("echo.elf", image::elf64(boot::echo64())),
        ("boot-params.elf", image::elf64(boot::boot_params64())),
        ("pvh.elf", image::elf64_pvh(boot::pvh32())),
        ("multiboot.elf", image::multiboot(boot::multiboot32())),
        ("smp.elf", image::elf64(boot::smp64())),
        ("polled.elf", image::elf64(console::polled64())),
        ("debug.elf", image::elf64(debug::debug64())),
        ("rom.elf", image::elf64(console::rom64())),
    ] {
        std::fs::write(folder.join(name), image).unwrap();
    }
}
