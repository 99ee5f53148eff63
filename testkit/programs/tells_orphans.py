"""Tells orphans from children that somebody waits for; it becomes a subreaper for good."""

import os
import subprocess
import threading

from steer.linux import family
from steer.linux import fork as process

before = subprocess.Popen(["sleep", "60"])
family.become_subreaper()
told: list[subprocess.CompletedProcess[bytes]] = []
ours = threading.Thread(target=lambda: told.append(process.run(["sh", "-c", "read x; exit 7"], 60)))
pid, pidfd = process.fork(lambda: 0)
orphan = int(subprocess.check_output(["sh", "-c", "setsid sleep 60 >&- & echo $!"]))
process.wait_for_end(pidfd, None)
while os.getpgid(orphan) != orphan:
    os.sched_yield()
found, left = family.orphans(), family.left_behind()
ours.start()
while ours.is_alive():
    family.reap_orphans()
with process.starting():
    assert before.pid not in family.orphans()
    assert not family.reap_orphans()[1]
for each in (orphan, before.pid):
    os.kill(each, 9)
    process.wait_for_end(os.pidfd_open(each), None)
assert family.reap_orphans() == ([before.pid, orphan], True)
print(found == [before.pid, orphan], left == [orphan], family.orphans() == [], told[0].returncode)
print(process.reap(pid, pidfd, True))
