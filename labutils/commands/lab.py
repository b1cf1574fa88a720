"""`python -m labutils lab`: opens the notebooks in JupyterLab."""

from __future__ import annotations

import importlib.util
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from labutils.commands.arguments import new_parser

FIRST_NOTEBOOK = "01-Setup_and_Comparison.ipynb"
PACKAGE = Path(__file__).resolve().parent.parent

# Browsers that draw into the terminal. They cannot show JupyterLab, and would take the terminal from the server.
_TEXT_BROWSERS = ("www-browser", "w3m", "lynx", "links", "elinks")


def checkout() -> Path:
    """The folder that holds the notebooks: the current one, or the one that labutils was installed from.

    Raises:
        FileNotFoundError: neither holds them, as after an installation without a clone.
    """
    for folder in (Path.cwd(), PACKAGE.parent):
        if (folder / FIRST_NOTEBOOK).is_file():
            return folder
    raise FileNotFoundError(
        f"{FIRST_NOTEBOOK} is neither in this folder nor beside the installed labutils package. The "
        "notebooks are in the repository: clone it, change into it, and run the command of its README there."
    )


def graphical_browser() -> bool:
    """Whether this machine has a browser with a screen to draw on."""
    if os.environ.get("BROWSER"):
        return True  # the user, or an editor that forwards ports, has said what opens a page
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not screen:
        return False
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    return Path(getattr(browser, "name", "")).name not in _TEXT_BROWSERS


def lab_command(folder: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command that serves `folder` in JupyterLab with the first notebook open.

    Args:
        folder: the checkout.
        extra: arguments for Jupyter. An option among them is not given a second time, which Jupyter would refuse.
    """
    given = {argument.split("=")[0] for argument in extra}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={folder}",
        # Both the browser's first page and the printed address. A file name as an argument changes only the former.
        f"--LabApp.default_url=/lab/tree/{FIRST_NOTEBOOK}",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and "--allow-root" not in given:
        command.append("--allow-root")  # root in a container; JupyterLab refuses to start otherwise
    if "--no-browser" not in given and not graphical_browser():
        command.append("--no-browser")  # JupyterLab prints the address with its token anyway
    if not given & {"--log-level", "--debug", "--ServerApp.log_level", "--Application.log_level"}:
        # The address is printed at every level. At the default level it stands among forty other lines.
        command.append("--log-level=WARN")
    return [*command, *extra]


def environment_for_kernels() -> dict[str, str]:
    """This process's environment, without the switch for Triton's interpreter if importing labutils set it here.

    Each notebook's kernel imports labutils and sets the switch for itself. An inherited switch would hide that a
    notebook imports triton before labutils, and the notebook would fail on another machine.
    """
    import torch

    from labutils.machine import runtime

    kept = dict(os.environ)
    without_gpu = os.environ.get("LABUTILS_DEVICE", "").strip().lower() == "cpu" or not torch.cuda.is_available()
    if runtime.interpreted and without_gpu:  # else the user has set the switch
        kept.pop("TRITON_INTERPRET", None)
    return kept


def parser() -> ArgumentParser:
    """The parser of the command's only argument, --help. `run` hands all others on."""
    return new_parser(
        "python -m labutils lab",
        f"Start JupyterLab in the repository, with {FIRST_NOTEBOOK} open. Without a screen or a browser, the command "
        "prints the address to open. Root is allowed, as containers need it.",
        epilog="All other arguments go to JupyterLab. In a container with port 9999 published: "
        "python -m labutils lab --ip=0.0.0.0 --port=9999",
    )


def run(words: Sequence[str]) -> int:
    """Replaces this process by JupyterLab. Returns, with 2, only if JupyterLab cannot be started."""
    parser().parse_args([word for word in words if word in ("-h", "--help")])
    try:
        folder = checkout()
    except FileNotFoundError as error:
        print(f"labutils lab: {error}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("jupyterlab") is None:
        print(
            "labutils lab: JupyterLab is not installed in this Python. Run `python -m pip install -e .` in "
            "the repository, with this same Python.",
            file=sys.stderr,
        )
        return 2
    command = lab_command(folder, [word for word in words if word != "--"])
    environment = environment_for_kernels()  # raises if LABUTILS_DEVICE cannot be had
    how = "Open the address below in a browser" if "--no-browser" in command else "It opens in your browser"
    print(f"Starting JupyterLab. {how}; Control-C, twice, stops it.", flush=True)
    # No process stays in between, so signals reach JupyterLab, and the exit status is its own.
    os.execve(command[0], command, environment)
