#!/bin/sh
# What `vagrant up` runs in the machine, as root: provision.sh [KERNEL]
# After it `sudo steer run` works, and in the tree this lies in, `sudo ./dev test`.
set -eu
tree=$(dirname "$(dirname "$(readlink -f "$0")")")

# With as many queues as CPUs, the card does it. With one, all its packets are one CPU's, unless
# the kernel hands them on: Documentation/networking/scaling.rst, RPS.
spread_packets() {
    all_cpus=$(printf '%x' $(((1 << $(nproc)) - 1)))
    cat >/etc/udev/rules.d/90-steer.rules <<END
ACTION!="remove", SUBSYSTEM=="net", TEST=="device", TEST!="queues/rx-1", ATTR{queues/rx-0/rps_cpus}="$all_cpus"
END
    udevadm control --reload
    udevadm trigger --subsystem-match=net
}

case $(uname -r) in
"${1:-$(uname -r)}" | "${1:-}".*) ;;
*)
    echo "provision.sh: wanted Linux $1, and GRUB has booted $(uname -r)" >&2
    exit 1
    ;;
esac

"$tree/dev" setup test
ln -sf "$tree/.venv/bin/steer" /usr/local/bin/steer # where sudo looks: secure_path, sudoers(5)
# shellcheck disable=SC2016 # for the shell that logs in
printf 'case $- in *i*) cd %s ;; esac\n' "$tree" >/etc/profile.d/steer.sh
[ ! -e /run/udev/control ] || spread_packets
