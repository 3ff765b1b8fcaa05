#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Run by mmdebstrap when all packages of the new system ($1) are installed: makes it the guest of
# `cargo xtask boot --distro`. A system for development: root has no password, on the console, by ssh and by vsock.
set -eu
root=$1

# The essential packages were unpacked before dpkg knew what to leave out.
for dir in doc info locale man; do
    rm -rf "${root:?}/usr/share/$dir"
    mkdir "$root/usr/share/$dir"
done

# Who it is. An empty machine-id is filled in by the first boot.
echo guest >"$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n::1\tlocalhost\n192.168.127.2\tguest\n' >"$root/etc/hosts"
# What sshd calls a peer that came by vsock. PAM looks the name up several times a login, and each time the name server,
# which no packet of this guest's reaches, is waited for 10 seconds.
printf '127.0.0.1\tUNKNOWN\n::1\tUNKNOWN\n' >>"$root/etc/hosts"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"

# Who may come in: root, without a password.
chroot "$root" passwd -q -d root
cat >"$root/etc/issue" <<'EOF'
Debian GNU/Linux 12 \n \l: log in as root, there is no password

EOF
cat >"$root/etc/ssh/sshd_config.d/development.conf" <<'EOF'
PermitRootLogin yes
PermitEmptyPasswords yes
PrintMotd no
EOF
: >"$root/etc/motd"

# A guest of an emulated machine on a busy host is slow, and slow is not broken.
mkdir -p "$root/etc/systemd/system.conf.d"
cat >"$root/etc/systemd/system.conf.d/patience.conf" <<'EOF'
[Manager]
DefaultTimeoutStartSec=10min
DefaultTimeoutStopSec=10min
DefaultDeviceTimeoutSec=10min
EOF

# The network: an address of its own on whatever virtio interface there is, and no wait for one.
cat >"$root/etc/systemd/network/guest.network" <<'EOF'
[Match]
Driver=virtio_net

[Network]
Address=192.168.127.2/24
Gateway=192.168.127.1
LinkLocalAddressing=ipv6
IPv6AcceptRA=no

[Link]
RequiredForOnline=no
EOF
chroot "$root" systemctl -q enable systemd-networkd

# ssh by vsock, port 22, where there is such a device.
cat >"$root/etc/systemd/system/ssh-vsock.socket" <<'EOF'
[Unit]
Description=OpenBSD Secure Shell server on vsock

[Socket]
ListenStream=vsock::22
Accept=yes
EOF
cat >"$root/etc/systemd/system/ssh-vsock@.service" <<'EOF'
[Unit]
Description=OpenBSD Secure Shell server for one vsock connection

[Service]
ExecStart=-/usr/sbin/sshd -i
StandardInput=socket
RuntimeDirectory=sshd
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
EOF

# A login on hvc0 and ssh by vsock begin with their devices: nothing waits for what this machine has not.
cat >"$root/etc/udev/rules.d/99-guest.rules" <<'EOF'
SUBSYSTEM=="tty", KERNEL=="hvc0", TAG+="systemd", ENV{SYSTEMD_WANTS}+="serial-getty@hvc0.service"
SUBSYSTEM=="misc", KERNEL=="vsock", TAG+="systemd", ENV{SYSTEMD_WANTS}+="ssh-vsock.socket"
EOF

# There is no screen, and nothing is to wake up by itself in the middle of a measurement.
chroot "$root" systemctl -q disable getty@tty1.service e2scrub_reap.service
chroot "$root" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    fstrim.timer

# Debian's own initramfs, as its kernel's package would have made it, packed in less time. It looks for the root's
# file system where an fstab names one, and there is none yet.
echo 'update_initramfs=yes' >"$root/etc/initramfs-tools/update-initramfs.conf"
mkdir -p "$root/etc/initramfs-tools/conf.d"
echo 'COMPRESSLEVEL=1' >"$root/etc/initramfs-tools/conf.d/quick"
unset INITRD
chroot "$root" update-initramfs -c -k all
echo 'LABEL=guest / ext4 defaults,errors=remount-ro 0 1' >"$root/etc/fstab"
