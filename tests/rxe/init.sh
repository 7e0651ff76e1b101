#!/bin/busybox sh
# Process 1 of the guest: loads the modules, mounts the machine outside, and hands over to guest.py.
# Whatever happens ends in a power-off; what is written here goes to the console, which the harness shows on failure.
/bin/busybox --install -s /bin
export PATH=/bin
. /job # XD_WORK, XD_PYTHON, XD_GUEST: paths of the machine outside

finish() {
    sync
    poweroff -f
    sleep 60
}

need() {
    "$@" && return
    echo "guest: '$*' failed"
    finish
}

share() { # TAG FOLDER OPTIONS
    need mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$3" "$1" "$2"
}

need mount -t proc proc /proc
for module in /modules/*; do
    need insmod "$module"
done

share root /root ro,cache=loose
need mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm
need mount -t devpts devpts /root/dev/pts
need mount -t tmpfs tmpfs /root/dev/shm
need mount -t proc proc /root/proc
need mount -t sysfs sysfs /root/sys
for folder in tmp run var/tmp; do
    need mount -t tmpfs tmpfs "/root/$folder"
done
chmod 1777 /root/tmp /root/var/tmp
mkdir -p "/root$XD_WORK" /root/run/control # the checkout may lie under one of the empty folders
share work "/root$XD_WORK" cache=loose
share control /root/run/control cache=none

chroot /root "$XD_PYTHON" "$XD_GUEST"
umount "/root$XD_WORK" || echo "guest: the checkout was in use; files written late may be missing"
finish
