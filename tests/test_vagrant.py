"""The Vagrantfile: valid for both providers, and its options reach the machines.

`vagrant validate` looks at the settings of one provider, and only where that is installed. For
libvirt its plugin is enough, for VirtualBox a VBoxManage that tells a version.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

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
