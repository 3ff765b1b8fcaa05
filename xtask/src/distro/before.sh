#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Run by mmdebstrap when dpkg works in the new system ($1) and before the packages are installed: what makes their
# installation quick and small.
set -eu
root=$1

mkdir -p "$root/etc/dpkg/dpkg.cfg.d" "$root/etc/initramfs-tools"
cat >"$root/etc/dpkg/dpkg.cfg.d/no-documents" <<'EOF'
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
EOF

# The end of the installation would make an initramfs, as the kernel's package would (INITRD=No keeps it from that);
# `after.sh` makes the only one.
echo 'update_initramfs=no' >"$root/etc/initramfs-tools/update-initramfs.conf"
