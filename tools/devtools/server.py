"""Run a real ComfyUI server in a folder of its own. Talks to nobody: that is client.py's work."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .cache import REPOSITORY
from .link import link_folder

PACK_NAME = "ComfyUI-QwenImage-LowVRAM"
# ComfyUI wants these to exist below --base-directory
_BASE_FOLDERS = ("custom_nodes", "input", "output", "temp", "user/default")
_MODEL_FOLDERS = ("checkpoints", "diffusers", "diffusion_models", "loras", "text_encoders", "vae", "vae_approx")
_BOOT_SECONDS = 300


class ServerFailed(Exception):
    """The server ended or never answered; the message carries the end of its log."""


class ComfyServer:
    """One ComfyUI process with its own base folder, free port and in-memory database.

        with ComfyServer(comfyui, base, cpu=True) as server:
            ComfyClient(server.url)

    The process is ended on every way out. `log` holds everything it printed, `boot_log` what it had printed when it
    first answered.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        cpu: bool,
        pack: Path | None = REPOSITORY,
        arguments: Sequence[str] = (),
        python: str = sys.executable,
    ) -> None:
        self.base = base
        self.port = _free_port()
        self.log_file = base / f"comfyui-{self.port}.log"
        self.boot_log = ""
        self.url = f"http://127.0.0.1:{self.port}"
        self._comfyui = comfyui
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [python, "main.py", "--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
        self._command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        self._command += [*(["--cpu"] if cpu else []), *arguments]
        prepare_base(base)
        if pack is not None:
            link_folder(pack, base / "custom_nodes" / PACK_NAME)

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Boot and wait until the server answers. Raises ServerFailed with the end of its log."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        # threads that spin while they wait take the cores from each other when several programs run
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._comfyui, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _BOOT_SECONDS
        while not self._answers():
            if not self.running or time.monotonic() > deadline:
                code = self._process.poll()
                self.stop()
                what = f"ended with code {code}" if code is not None else f"did not answer in {_BOOT_SECONDS} s"
                raise ServerFailed(f"ComfyUI {what}. The end of {self.log_file}:\n{self.log[-4000:]}")
            time.sleep(0.2)
        self.boot_log = self.log

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def prepare_base(base: Path) -> None:
    """Make the folders that --base-directory needs."""
    for name in (*_BASE_FOLDERS, *(f"models/{folder}" for folder in _MODEL_FOLDERS)):
        (base / name).mkdir(parents=True, exist_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
