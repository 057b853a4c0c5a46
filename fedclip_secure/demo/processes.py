"""The demo's processes: started with their logs in files, and none of them left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fedclip_secure.errors import TransportError

_PATIENCE = 5.0  # seconds between asking a process to stop and killing it
_STARTING = 300.0  # seconds within which the server answers, however busy the machine is


class Crew:
    """`with Crew(...) as crew`: all that was started ends with the block, however it ends."""

    def __init__(self, threads: int) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            process.terminate()
        end = time.monotonic() + _PATIENCE
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, program: str, *arguments: str, folder: Path) -> None:
        """Start an installed program in `folder`; what it prints goes to `<folder>.log` beside it."""
        if name in self._processes:
            raise ValueError(f"{name} runs already")
        command = [str(Path(sysconfig.get_path("scripts"), program)), *arguments]
        with log_of(folder).open("wb") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603 - our own programs
                command,
                cwd=folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to the demo alone, which then ends all others in order.
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut would end it."""
        self._processes[name].kill()
        self._processes[name].wait()

    def wait_for_port(self, name: str, port: int, log: Path) -> None:
        """Wait until the server `name` listens.

        Raises:
            TransportError: it has ended, or does not; quotes the end of its log.
        """
        end = time.monotonic() + _STARTING
        while self.ended(name) is None and time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    return
            except OSError:
                time.sleep(0.05)
        raise TransportError(f"the coordinator did not start; {log} ends with: {log.read_text('utf-8')[-500:]}")

    def ended(self, name: str) -> int | None:
        """The exit code of a process, or None while it runs."""
        return self._processes[name].poll()


def log_of(folder: Path) -> Path:
    """Where the output of the program that runs in `folder` goes."""
    return folder.with_name(f"{folder.name}.log")


@contextmanager
def without_proxies() -> Iterator[None]:
    """Everything is on this machine, and no proxy would find it there: for this process and those that it starts."""
    removed = {key: os.environ.pop(key) for key in list(os.environ) if key.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(removed)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
