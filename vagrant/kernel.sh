#!/bin/sh
# Installs the newest kernel of a version, from the Debian release that has it, and has GRUB boot
# it from now on. In a VM, as root: kernel.sh 5.10|6.1|6.12
set -eu
version=${1:-}
architecture=$(dpkg --print-architecture)

die() {
    echo "kernel.sh: $*" >&2
    exit 1
}

case $version in
5.10) release=bullseye ;;
6.1) release=bookworm ;;
6.12) release=trixie ;;
*) die "version '$version': has to be 5.10, 6.1 or 6.12" ;;
esac

newest_image() {
    apt-cache pkgnames "linux-image-$version." |
        grep -E "^linux-image-[0-9.]+(\+deb[0-9.]+)?(-[0-9]+)?-$architecture\$" | sort -V | tail -n 1
}

# All else stays with the machine's own release: apt_preferences(5).
add_release() {
    # shellcheck disable=SC2016 # apt-get's own
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$keys] $mirror $release main" >"/etc/apt/sources.list.d/$release.list"
    printf 'Package: *\nPin: release n=%s\nPin-Priority: 100\n' "$release" >"/etc/apt/preferences.d/$release"
    apt-get -q update
}

# By default GRUB boots the newest, which this need not be. An entry of a submenu is named by both;
# with GRUB_DISABLE_SUBMENU there is none.
boot() {
    [ -e /boot/grub/grub.cfg ] || die "boot $1: no /boot/grub/grub.cfg: needs a machine that GRUB boots"
    entries=$(sed -n "s/.*menuentry_id_option '\(gnulinux-[^']*\)'.*/\1/p" /boot/grub/grub.cfg)
    menu=$(echo "$entries" | grep -m 1 '^gnulinux-advanced-') || :
    entry=$(echo "$entries" | grep -m 1 -F "gnulinux-$1-advanced-") || die "GRUB has no entry for $1"
    mkdir -p /etc/default/grub.d
    echo "GRUB_DEFAULT='${menu:+$menu>}$entry'" >/etc/default/grub.d/90-steer.cfg
    update-grub
}

export DEBIAN_FRONTEND=noninteractive
apt-get -q update
image=$(newest_image)
if [ -z "$image" ]; then
    add_release
    image=$(newest_image)
fi
[ -n "$image" ] || die "no kernel $version for $architecture: not in $release, nor in this machine's sources"
apt-get -q install -y --no-install-recommends "$image"
boot "${image#linux-image-}"
