#!/bin/sh
# Runs vagrant/prove.sh on a fresh, minimal Debian that has nothing but this tree: what README and
# Vagrantfile promise. As root:
#
#   vagrant/fresh-root.sh                       with all tests
#   vagrant/fresh-root.sh ./dev test -k cli     with another command in place of ./dev test
#   STEER_FRESH_RELEASE=trixie vagrant/fresh-root.sh
#
# The root is made once, by debootstrap, in ~/.cache/steer/fresh: remove it there for a newer one.
# What runs gets it under a tmpfs, in namespaces of its own, so that nothing is left of it, whichever
# way it ends. It reaches the network, apt's mirror and Python's packages as this machine does.
set -eu
self=$(readlink -f "$0")
tree=$(dirname "$(dirname "$self")")
release=${STEER_FRESH_RELEASE:-bookworm}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/steer/fresh
base=$cache/$release
room=$cache/room
passed_on='^([a-z]+_proxy|[A-Z]+_PROXY|PIP_|SSL_CERT_|CURL_CA_|REQUESTS_CA_|STEER_|CI=|TERM=)'

die() {
    echo "fresh-root.sh: $*" >&2
    exit 1
}

debian_mirror() {
    command -v apt-get >/dev/null || return 0
    # shellcheck disable=SC2016 # apt-get's own
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1
}

# As this machine has them: how apt and pip reach what they install. The bundle of certificates
# serves until ca-certificates is installed, which makes its own and adds to it the local ones.
copy_settings() {
    apt-config dump | grep -E '^Acquire::(https?::Proxy |Check-)' >"$1/etc/apt/apt.conf.d/90host" || :
    mkdir -p "$1/etc/ssl/certs" "$1/root/.config/pip" "$1/usr/local/share/ca-certificates"
    cp -L /etc/resolv.conf /etc/hosts "$1/etc/"
    for file in /etc/ssl/certs/ca-certificates.crt /usr/local/share/ca-certificates/*.crt /etc/pip.conf; do
        [ ! -e "$file" ] || cp -L "$file" "$1$file"
    done
    [ ! -e "$HOME/.config/pip/pip.conf" ] || cp "$HOME/.config/pip/pip.conf" "$1/root/.config/pip/"
}

make_base() {
    command -v debootstrap >/dev/null || die "needs debootstrap: apt-get install debootstrap"
    echo "fresh-root.sh: making $base" >&2
    mkdir -p "$cache"
    partial=$(mktemp -d "$base.XXXXXX")
    trap 'rm -rf "$partial"' EXIT
    trap 'exit 1' HUP INT TERM
    # shellcheck disable=SC2046 # none at all, if there is none
    debootstrap --variant=minbase "$release" "$partial" $(debian_mirror) >"$base.log" ||
        die "debootstrap $release failed: see $base.log"
    chmod 755 "$partial"
    # Not into the one that another run has made meanwhile, which is as good.
    mv -T "$partial" "$base" 2>/dev/null || [ -d "$base" ] || die "cannot rename $partial to $base"
    rm -rf "$partial"
    trap - EXIT HUP INT TERM
}

# What git knows, or would add.
list_tree() {
    git -C "$tree" ls-files -z --cached --others --exclude-standard ||
        die "cannot list $tree: needs git and a checkout that root may read"
}

copy_tree() {
    mkdir "$1"
    list_tree >"$room/files"
    cd "$tree"
    tar --create --null --ignore-failed-read --files-from "$room/files" 2>/dev/null |
        tar --extract --no-same-owner --directory "$1"
}

# In the new namespaces, as their init: a shell, which buries orphans while it waits. A new root and
# not chroot(2), in which there are no user namespaces: user_namespaces(7).
inside() {
    mount -t tmpfs -o mode=755 tmpfs "$room"
    mkdir "$room/upper" "$room/work" "$room/root"
    mount -t overlay -o "lowerdir=$base,upperdir=$room/upper,workdir=$room/work" overlay "$room/root"
    copy_settings "$room/root"
    copy_tree "$room/root/steer"
    cd "$room/root"
    mount -t proc proc proc
    mount --rbind /sys sys
    mount --rbind /dev dev
    pivot_root . mnt
    cd /
    umount -l /mnt
    passed=$(env | grep -E "$passed_on" || :)
    set -- /steer/vagrant/prove.sh "$@"
    while IFS= read -r setting; do
        [ -z "$setting" ] || set -- "$setting" "$@"
    done <<END
$passed
END
    env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
    exit
fi
[ "$(id -u)" = 0 ] || die "needs root: for debootstrap, mounts and namespaces"
list_tree >/dev/null
[ -d "$base" ] || make_base
mkdir -p "$room"
exec unshare --mount --propagation private --pid --fork --kill-child --ipc --uts "$self" --inside "$@"
