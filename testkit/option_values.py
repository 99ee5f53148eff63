"""A value for every socket option, none of them the default."""

ALL = {
    "nodelay": "no",
    "keepalive": "yes",
    "keepidle": "77",
    "keepintvl": "11",
    "keepcnt": "5",
    "user-timeout": "12.5",
    "notsent-lowat": "16K",
    "congestion": "reno",
    "fastopen": "16",
    "defer-accept": "3",
    "rcvbuf": "100000",
    "sndbuf": "60K",
    "priority": "5",
    "mark": "0x7",
    "transparent": "yes",
}
