"""Databases: files of SQLite, and a PostgreSQL that the tests start."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

PASSWORD = "o/pen #sesame"
"""One that a URL has to escape."""


def _program(name: str) -> str | None:
    found = sorted(glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return shutil.which(name) or (found[-1] if found else None)


class Server:
    """A PostgreSQL of its own, reached by a socket in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._as_user: list[str] = []
        if os.geteuid() == 0:  # as which it refuses to run
            user = pwd.getpwnam("nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            self._as_user = ["setpriv", *ids, "--pdeathsig=QUIT"]
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            *("initdb", "--no-sync", "--username=admin", "--auth=scram-sha-256"),
            *(f"--pwfile={password}", "--encoding=UTF8", "--locale=C", f"--pgdata={folder}/data"),
        )
        self.start()

    def start(self) -> None:
        options = ("fsync=off", "listen_addresses=", f"unix_socket_directories={self.folder}")
        words = [_program("postgres"), "-D", f"{self.folder}/data"]
        for option in options:
            words += ["-c", option]
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [*self._as_user, *words], stdout=log, stderr=log, cwd=self.folder
            )
        while True:
            try:
                self.execute("SELECT 1")
                return
            except Exception as error:
                if self.process.poll() is not None:
                    log_text = (self.folder / "log").read_text()
                    raise RuntimeError(f"PostgreSQL has ended: {log_text}") from error
                time.sleep(0.05)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def url(self, user: str = "admin", driver: str = "psycopg") -> str:
        """The URL of the database, with the password."""
        password = "o%2Fpen%20%23sesame"
        return f"postgresql+{driver}://{user}:{password}@/postgres?host={self.folder}"

    def execute(self, *statements: str) -> list[tuple]:
        """Commit the statements; the rows of the last one."""
        import psycopg

        with psycopg.connect(
            host=str(self.folder), user="admin", password=PASSWORD, dbname="postgres"
        ) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *words: str) -> None:
        command = [*self._as_user, str(_program(program)), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    pytest.importorskip("psycopg")
    if _program("initdb") is None or _program("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and setpriv is not installed")
    # A socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="apt-pg-", dir="/tmp"))
    try:
        server = Server(folder)
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
