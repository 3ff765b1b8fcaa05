#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The guests' init. It reports what the guest sees, one `guest: name value` a line, and does what the kernel's
# command line asks for then:
#   guest.then=poweroff   (the default)     guest.then=reboot
#   guest.then=panic      a kernel panic    guest.then=wait     until the power button, or for ever
#   guest.then=shell      a shell on the console; its end powers off
#   guest.then=echo       answers each line of the console with `guest: echo LINE`, until `quit`
#   guest.modules=A,B     loads these drivers and what they need, from an image that has them (guest_image.rs lists them)
#   guest.address=A       gives the first network device this address
#   guest.run=PROGRAM     runs it before that, from an image that has it in /bin, with the word `guest`
#   guest.script=BASE64   runs these lines of shell before that
#   guest.cpus            says of each processor where it stands, and what the first one can
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
read -r up _ </proc/uptime
echo "guest: init $up"

then=poweroff
cpus=
modules=
address=
run=
script=
for word in $(cat /proc/cmdline); do
    case "$word" in
    guest.then=*) then="${word#guest.then=}" ;;
    guest.modules=*) modules="${word#guest.modules=}" ;;
    guest.address=*) address="${word#guest.address=}" ;;
    guest.script=*) script="${word#guest.script=}" ;;
    guest.run=*) run="${word#guest.run=}" ;;
    guest.cpus) cpus=1 ;;
    esac
done

release=$(uname -r)
# Loads what a list names. Several lists have the same module; a kernel whose modules are not here has no list.
load() {
    while read -r module; do
        [ -d "/sys/module/$module" ] || insmod "/modules/$release/$module.ko" || echo "guest: refused $module"
    done <"/modules/$release/$1"
}
[ -r "/modules/$release/order" ] && load order
for name in $(echo "$modules" | tr , ' '); do
    if [ -r "/modules/$release/$name.needs" ]; then
        load "$name.needs"
    else
        echo "guest: refused $name"
    fi
done

echo "guest: uname $(uname -a)"
echo "guest: cpus $(grep -c ^processor /proc/cpuinfo)"
echo "guest: online $(cat /sys/devices/system/cpu/online)"
echo "guest: memory $(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
echo "guest: clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "guest: cmdline $(cat /proc/cmdline)"
if [ -n "$cpus" ]; then
    (
        cd /sys/devices/system/cpu || exit
        grep -H . cpu[0-9]*/topology/physical_package_id cpu[0-9]*/topology/*_siblings_list \
            cpu[0-9]*/cache/index*/level cpu[0-9]*/cache/index*/shared_cpu_list | sed 's/^/guest: sys /'
    )
    awk -F '[\t ]*: ' '/^processor/ { n = $2 } /^siblings/ { s = $2 } /^cpu cores/ { c = $2 }
        /^apicid/ { print "guest: cpuinfo " n " apicid " $2 " siblings " s " cores " c }' /proc/cpuinfo
    sed -n 's/^flags[\t ]*: /guest: flags /p' /proc/cpuinfo | sed -n 1p
fi
sed -n 's/.*IO-APIC  *\([^ ]*\)  */guest: pin \1 /p' /proc/interrupts
read -r up _ </proc/uptime
echo "guest: uptime $up"

[ -n "$address" ] && ifconfig eth0 "$address" up
[ -n "$script" ] && {
    echo "$script" | base64 -d >/tmp/script
    sh -e /tmp/script && echo "guest: script done" || echo "guest: script failed"
}
[ -n "$run" ] && { "/bin/$run" guest || echo "guest: $run failed"; }

# The power button ends the guest in every mode.
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\necho "guest: button" >/dev/console\npoweroff -f\n' >/etc/acpi/PWRF/00000080
chmod 755 /etc/acpi/PWRF/00000080
if [ -e /dev/input/event0 ]; then
    acpid -f -l /dev/null >/dev/console 2>&1 </dev/null &
    # A press before it listens is lost.
    until ls -l /proc/$!/fd | grep -q event0; do :; done 2>/dev/null
fi

case "$then" in
reboot)
    echo "guest: reboot"
    reboot -f
    ;;
panic)
    echo "guest: panic"
    echo c >/proc/sysrq-trigger
    ;;
wait)
    echo "guest: waiting"
    while :; do sleep 3600; done
    ;;
echo)
    echo "guest: listening"
    while read -r line; do
        [ "$line" = quit ] && break
        echo "guest: echo $line"
    done
    ;;
shell)
    echo "guest: a shell; its end (exit, or Ctrl-D) powers the guest off"
    # busybox's poweroff and its like only signal init, which is this script: -f makes the call.
    printf 'alias %s="%s -f"\n' poweroff poweroff reboot reboot halt halt >/etc/shrc
    ENV=/etc/shrc setsid cttyhack sh
    ;;
esac
echo "guest: poweroff"
poweroff -f
