from support import *
import pytest
@pytest.mark.parametrize("backend", ["ebpf","cbpf","kernel"])
def test_it(service, backend):
    s = service("-w","2","--policy","cpu","--backend",backend,"-b","127.0.0.1:8080","-b","udp://[::1]:9")
    print(s.status()); print(s._bpf)
    print(http_get("127.0.0.1",8080), udp_ask("::1",9))
    print(s.selected())
def test_nobody(service):
    s = service("-w","2", user=65534)
    print(s.status(), s.log)
def test_kill(service):
    s = service("-w","2")
    s.send_signal(9)
    s.wait()
