"""What stands around the nodes: etcd behind them, HAProxy and PgBouncer before them."""

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from string import Template

from examples.cluster.network import HOST, free_ports
from examples.cluster.node import DATABASE, ROLE, Node, Plan
from examples.cluster.programs import Program, Programs
from examples.cluster.waiting import until

HAPROXY = Template(
    """\
defaults
  mode tcp
  timeout connect 1s
  timeout client 1h
  timeout server 1h
  timeout check 1s
  option httpchk
  default-server inter 500ms fastinter 200ms downinter 200ms fall 2 rise 1
  default-server on-marked-down shutdown-sessions

listen primary
  bind 127.0.0.1:$primary
  http-check send meth OPTIONS uri /primary
  http-check expect status 200
$servers

listen standbys
  bind 127.0.0.1:$standbys
  balance leastconn
  http-check send meth OPTIONS uri /replica
  http-check expect status 200
$servers
"""
)

PGBOUNCER = Template(
    """\
[databases]
$database = host=127.0.0.1 port=$primary user=$role password=$password

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $port
unix_socket_dir =
auth_type = plain
auth_file = $directory/users.txt
pool_mode = transaction
default_pool_size = 10
server_connect_timeout = 2
server_login_retry = 0.2
server_check_delay = 0
"""
)


class Etcd:
    """The store in which Patroni keeps who the primary is."""

    def __init__(self, programs: Programs, directory: Path) -> None:
        self.port, peers = free_ports(2)
        client, peer = f"http://{HOST}:{self.port}", f"http://{HOST}:{peers}"
        self._program = Program(
            [
                programs.etcd,
                *("--data-dir", str(directory / "etcd")),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"default={peer}"),
                *("--heartbeat-interval", "100", "--election-timeout", "1000"),
            ],
            directory / "etcd.log",
            programs.user,
        )

    async def start(self) -> None:
        await self._program.start()
        await until_listening(self.port, self._program)


class HAProxy:
    """One address for the primary and one for the standbys, by asking each Patroni."""

    def __init__(self, plan: Plan, nodes: Sequence[Node]) -> None:
        self.primary, self.standbys = free_ports(2)
        self._nodes = nodes
        self._file = plan.directory / "haproxy.cfg"
        self._program = Program(
            [plan.programs.haproxy, "-q", "-db", "-f", str(self._file)],
            plan.directory / "haproxy.log",
            plan.programs.user,
        )

    async def start(self) -> None:
        servers = "\n".join(
            f"  server {node.name} {HOST}:{node.clients.port} check port {node.rest}"
            for node in self._nodes
        )
        self._file.write_text(
            HAPROXY.substitute(primary=self.primary, standbys=self.standbys, servers=servers)
        )
        await self._program.start()
        await until_listening(self.primary, self._program)


class PgBouncer:
    """A pooler in transaction mode, before HAProxy."""

    def __init__(self, plan: Plan, haproxy: HAProxy) -> None:
        (self.port,) = free_ports(1)
        self._plan = plan
        self._primary = haproxy.primary
        self._directory = plan.directory / "pgbouncer"
        self._program = Program(
            [plan.programs.pgbouncer, "-q", str(self._directory / "pgbouncer.ini")],
            plan.directory / "pgbouncer.log",
            plan.programs.user,
        )

    async def start(self) -> None:
        password, user = self._plan.password, self._plan.programs.user
        self._directory.mkdir(mode=0o700)
        files = {
            "users.txt": f'"{ROLE}" "{password}"\n',
            "pgbouncer.ini": PGBOUNCER.substitute(
                database=DATABASE,
                role=ROLE,
                password=password,
                primary=self._primary,
                port=self.port,
                directory=self._directory,
            ),
        }
        for name, content in files.items():
            (self._directory / name).write_text(content)
        if user is not None:
            for each in (self._directory, *self._directory.iterdir()):
                shutil.chown(each, user)
        await self._program.start()
        await until_listening(self.port, self._program)


async def until_listening(port: int, program: Program) -> None:
    """Wait until a program accepts connections."""

    def listens() -> bool:
        with socket.socket() as tried:
            return tried.connect_ex((HOST, port)) == 0

    await until(listens, 20.0, lambda: f"a program did not start:\n{program.last_words()}")
