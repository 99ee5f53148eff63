"""The Vagrantfile: valid for both providers, and its options reach the machines; and its scripts,
with tools that are played.

`vagrant validate` looks at the settings of one provider, and only where that is installed. For
libvirt its plugin is enough, for VirtualBox a VBoxManage that tells a version.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testkit import ROOT

FRESH_ROOT = ROOT / "vagrant" / "fresh-root.sh"
KERNEL = ROOT / "vagrant" / "kernel.sh"

# Stands in for Vagrant: prints each setting of the machines as a line of Ruby.
RECORDER = """
class Recorder < BasicObject
  def initialize(path) = @path = path

  def method_missing(name, *values, **options, &block)
    words = (values + options.map { |key, value| "#{key}: #{value}" }).join(", ")
    ::Kernel.puts "#{@path}.#{name} #{words}"
    here = ::Recorder.new("#{@path}.#{values.first || name}")
    block ? block.call(*[here] * block.arity) : here
  end
end

module Vagrant
  def self.configure(_) = yield(Recorder.new("config"))
end

load ARGV.first
"""

Vagrant = Callable[..., subprocess.CompletedProcess[str]]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    unwanted = ("STEER_", "VAGRANT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return subprocess.run(
        command,
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def load(**options: str) -> subprocess.CompletedProcess[str]:
    return run("ruby", "-e", RECORDER, str(ROOT / "Vagrantfile"), **options)


def settings(**options: str) -> list[str]:
    done = load(**options)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def vagrant(tmp_path_factory: pytest.TempPathFactory) -> Vagrant:
    home = tmp_path_factory.mktemp("vagrant")
    virtualbox = home / "bin" / "VBoxManage"
    virtualbox.parent.mkdir()
    virtualbox.write_text("#!/bin/sh\necho 7.0.20r163906\n")
    virtualbox.chmod(0o755)

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        mine = {
            "VAGRANT_CWD": str(ROOT),
            "VAGRANT_HOME": str(home / "home"),
            "VAGRANT_DOTFILE_PATH": str(home / "state"),
            "VAGRANT_CHECKPOINT_DISABLE": "1",
            "PATH": f"{virtualbox.parent}:{os.environ['PATH']}",
        }
        return run("vagrant", *arguments, **mine, **environment)

    return call


@pytest.mark.needs("vagrant")
@pytest.mark.parametrize(
    ("provider", "options"),
    [
        ("libvirt", {"STEER_VM_CPUS": "4", "STEER_VM_KERNEL": "5.10", "STEER_VM_BOX": "my/box"}),
        ("virtualbox", {}),
    ],
)
def test_vagrantfile_is_valid(vagrant: Vagrant, provider: str, options: dict[str, str]) -> None:
    done = vagrant("validate", VAGRANT_DEFAULT_PROVIDER=provider, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs("ruby")
@pytest.mark.parametrize(
    ("name", "value", "needs"),
    [
        ("STEER_VM_CPUS", "many", "a number from 2 to 32"),
        ("STEER_VM_CPUS", "1", "a number from 2 to 32"),
        ("STEER_VM_MEMORY_MB", "4G", "a number from 1024 to 65536"),
        ("STEER_VM_KERNEL", "2.4", "one of 5.10, 6.1, 6.12"),
    ],
)
def test_bad_option_says_what_is_allowed(name: str, value: str, needs: str) -> None:
    done = load(**{name: value})
    assert done.returncode == 1
    assert done.stderr == f"Vagrantfile: {name}={value}: has to be {needs}\n"


@pytest.mark.needs("ruby")
def test_first_machine_is_debian_12_and_the_only_one_that_comes_unasked() -> None:
    machines = [line for line in settings() if line.startswith("config.vm.define ")]
    assert machines == [
        "config.vm.define debian12, primary: true, autostart: true",
        "config.vm.define debian13, primary: false, autostart: false",
    ]


@pytest.mark.needs("ruby")
def test_every_cpu_has_a_receive_queue() -> None:
    made = settings(STEER_VM_CPUS="16")
    for machine in ("debian12", "debian13"):
        assert f"config.vm.{machine}.vm.libvirt.cpus= 16" in made
        assert f"config.vm.{machine}.vm.virtualbox.cpus= 16" in made
    networks = [line for line in made if "private_network" in line]
    assert len(networks) == 2
    assert all(line.endswith("libvirt__driver_queues: 16") for line in networks)


@pytest.mark.needs("ruby")
def test_kernel_is_booted_before_steer_is_set_up() -> None:
    made = [line for line in settings(STEER_VM_KERNEL="6.1") if ".provision " in line]
    assert [line.removeprefix("config.vm.provision ") for line in made] == [
        "kernel, type: shell, inline: sh /steer/vagrant/kernel.sh 6.1, reboot: true",
        "steer, type: shell, inline: sh /steer/vagrant/provision.sh 6.1",
    ]


@pytest.mark.needs("ruby")
def test_a_box_of_ones_own_is_that_of_both_providers() -> None:
    boxes = [line for line in settings(STEER_VM_BOX="./my.box") if ".box= " in line]
    assert len(boxes) == 4
    assert {line.split("= ")[1] for line in boxes} == {"./my.box"}


@pytest.mark.needs("ruby")
def test_what_is_written_in_the_machine_stays_there() -> None:
    [tree] = [line for line in settings() if line.startswith("config.vm.synced_folder ., /steer,")]
    found = re.search(r"rsync__args: \[(.*?)\]", tree)
    assert found, "with those of Vagrant rsync deletes"
    arguments = found[1].replace('"', "").split(", ")
    assert "--archive" in arguments
    assert not [each for each in arguments if each.startswith("--del")]


def test_tests_that_rewire_network_cards_do_not_run_here() -> None:
    """In such a machine they would end the connection of whoever runs them."""
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only")
    done = run(*pytest, str(ROOT / "vm" / "tests"), PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "this one is not the guest of ./dev vm" in done.stdout + done.stderr


# ---- scripts


Tools = Callable[..., dict[str, str]]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Programs, as shell scripts, that are found before those that are there."""

    def make(**scripts: str) -> dict[str, str]:
        place = tmp_path / "bin"
        place.mkdir()
        for name, script in scripts.items():
            tool = place / name.replace("_", "-")
            tool.write_text(f"#!/bin/sh\n{script}\n")
            tool.chmod(0o755)
        return {"PATH": f"{place}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path)}

    return make


def test_fresh_root_of_a_tree_that_git_does_not_list(tools: Tools) -> None:
    made = tools(id="echo 0", git="exit 128", debootstrap="exit 1", unshare="")
    done = run(str(FRESH_ROOT), **made)
    assert done.returncode == 1
    wanted = f"cannot list {ROOT}: needs git and a checkout that root may read"
    assert done.stderr == f"fresh-root.sh: {wanted}\n"


def test_fresh_root_that_another_run_has_made_meanwhile(tools: Tools, tmp_path: Path) -> None:
    base = tmp_path / "steer" / "fresh" / "bookworm"
    debootstrap = f'mkdir {base}; touch {base}/theirs "$3/mine"'
    made = tools(id="echo 0", git="", debootstrap=debootstrap, unshare="echo up")
    done = run(str(FRESH_ROOT), **made)
    assert (done.returncode, done.stdout) == (0, "up\n")
    assert [path.name for path in base.iterdir()] == ["theirs"]
    assert sorted(path.name for path in base.parent.iterdir()) == [
        "bookworm",
        "bookworm.log",
        "room",
    ]


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"])
def test_fresh_root_is_told_of_proxies(name: str) -> None:
    [passed_on] = re.findall(r"^passed_on='(.*)'$", FRESH_ROOT.read_text(), re.MULTILINE)
    assert re.match(passed_on, f"{name}=http://proxy:3128")
    assert not re.match(passed_on, "LS_COLORS=")


ENTRY = "menuentry 'Linux' $menuentry_id_option 'gnulinux-{}-advanced-1234' {{"
SUBMENU = "submenu 'More' $menuentry_id_option 'gnulinux-advanced-1234' {{"
Kernel = Callable[[str | None], subprocess.CompletedProcess[str]]


@pytest.fixture
def kernel(tools: Tools, tmp_path: Path) -> Kernel:
    """kernel.sh 6.1, with another /boot and /etc."""
    script = tmp_path / "kernel.sh"
    script.write_text(re.sub(r"/(?=boot/|etc/)", f"{tmp_path}/", KERNEL.read_text()))
    (tmp_path / "boot" / "grub").mkdir(parents=True)
    (tmp_path / "etc" / "default").mkdir(parents=True)

    def call(menu: str | None) -> subprocess.CompletedProcess[str]:
        if menu is not None:
            (tmp_path / "boot" / "grub" / "grub.cfg").write_text(menu)
        made = tools(
            dpkg="echo amd64",
            apt_get="",
            apt_cache="echo linux-image-6.1.0-9-amd64",
            update_grub="",
        )
        return run("sh", str(script), "6.1", **made)

    return call


@pytest.mark.parametrize(
    ("menu", "default"),
    [
        ([SUBMENU, ENTRY], "gnulinux-advanced-1234>gnulinux-6.1.0-9-amd64-advanced-1234"),
        ([ENTRY], "gnulinux-6.1.0-9-amd64-advanced-1234"),
    ],
    ids=["submenu", "none"],
)
def test_grub_is_told_of_the_kernel(
    kernel: Kernel, tmp_path: Path, menu: list[str], default: str
) -> None:
    done = kernel("\n".join([each.format("6.1.0-9-amd64") for each in menu]))
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "etc" / "default" / "grub.d" / "90-steer.cfg").read_text()
    assert written == f"GRUB_DEFAULT='{default}'\n"


@pytest.mark.parametrize(
    ("menu", "said"),
    [
        (None, "needs a machine that GRUB boots"),
        (ENTRY.format("5.10.0-1-amd64"), "GRUB has no entry for 6.1.0-9-amd64"),
    ],
)
def test_kernel_that_grub_does_not_know(kernel: Kernel, menu: str | None, said: str) -> None:
    done = kernel(menu)
    assert done.returncode == 1
    assert done.stderr.startswith("kernel.sh: ")
    assert done.stderr.endswith(f"{said}\n")
