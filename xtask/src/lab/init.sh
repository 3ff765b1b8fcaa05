#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The lab's init: modules, the host's tree under an overlay, then the agent in it as the first process.
export PATH=/bin
fail() {
    echo "lab: $*" >/dev/console
    poweroff -f
}
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module.ko" || echo "lab: module $module was refused" >/dev/console
done </modules/order

mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /lower || fail "the host's tree cannot be mounted"
mount -t tmpfs -o mode=0755 layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work lab /root || fail "the overlay cannot be mounted"

for dir in dev proc sys run; do
    [ -d "/root/$dir" ] || mkdir -p "/root/$dir"
done
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /root/dev/pts
mount -t tmpfs -o mode=1777 shm /root/dev/shm
mount -t tmpfs -o mode=0755 run /root/run
mount -t debugfs debug /root/sys/kernel/debug
mount -t tracefs trace /root/sys/kernel/tracing
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
    ln -s "${link#*:}" "/root/dev/${link%%:*}"
done
ifconfig lo 127.0.0.1 up
cp /agent /root/run/lab-agent
exec chroot /root /run/lab-agent lab-agent
