"""The commands: those of the README, `python -m labutils ...`, and what CI runs."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
import webbrowser
from pathlib import Path

import pytest
import torch

import study
import targets
from labutils import __main__ as command_line
from labutils import runtime
from labutils.attention import probing
from labutils.attention.backends import BACKENDS
from labutils.benchmark import environment
from labutils.commands import bench, lab, tune

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["figure", "study", "targets"]
"""The scripts of tools that have a command line."""


def readme_lines():
    """The lines of the shell blocks in the README's section "Start"."""
    start = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Start\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", start, re.S | re.M)
    return [line for block in blocks for line in block.splitlines()]


# -- README and CI -------------------------------------------------------------------------------------------


def test_readme_has_two_commands_of_one_line_each():
    start, test = readme_lines()
    assert start.endswith("-m labutils lab")
    assert test.endswith("-m pytest -n 2 --dist loadfile")
    for line in (start, test):
        steps = [shlex.split(step) for step in line.split(" && ")]
        assert steps[0] == ["python3", "-m", "venv", ".venv"]
        assert [step[0] for step in steps[1:]] == [
            ".venv/bin/python"
        ] * 2  # in the new environment, whichever is active


def test_ci_ends_with_the_readme_s_test_command_letter_for_letter():
    _, test = readme_lines()
    # The last line, so that its status is the script's: `set -e` overlooks a failure inside `a && b`.
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == test


def test_ci_can_be_executed():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def git(*arguments, cwd):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.mark.parametrize("failing", [None, "venv", "pip", "pytest"])
def test_ci_runs_a_clone_fails_with_any_step_and_cleans_up(tmp_path, failing):
    repository, programs, scratch = (tmp_path / name for name in ("a repository", "bin", "scratch"))
    for folder in (repository / ".ci", programs, scratch):
        folder.mkdir(parents=True)
    (repository / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    (repository / "committed").write_text("")
    git("init", cwd=repository)
    git("add", ".", cwd=repository)
    git("commit", "-m", "all", cwd=repository)
    (repository / "uncommitted").write_text("")
    # A python3 that notes what it is asked to do, and puts itself into the virtual environment.
    fake = programs / "python3"
    fake.write_text(
        "#!/bin/bash\n"
        f'echo "$2 $(ls | tr "\\n" " ")" >> "{tmp_path}/log"\n'
        f'[ "$2" = "{failing}" ] && exit 3\n'
        'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi\n'
        "exit 0\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", repository / ".ci" / "run"],
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(scratch), "CI": "true"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == (3 if failing else 0), done.stderr
    steps = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    expected = ["venv", "pip", "pytest"]
    assert steps == (expected[: expected.index(failing) + 1] if failing else expected)
    assert "committed" in (tmp_path / "log").read_text().split()
    assert "uncommitted" not in (tmp_path / "log").read_text().split()
    assert list(scratch.iterdir()) == []


# -- python -m labutils --------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ +lab +open the notebooks", printed, re.M)
    assert re.search(r"^ +check +report", printed, re.M)


def answer_without_torch(arguments, run):
    """Runs a command line that ends at once, in a process that then looks whether torch was imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        f"try:\n    {run}\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [[], *([name] for name in command_line.COMMANDS)])
def test_help_is_answered_without_torch(command):
    run = "runpy.run_module('labutils', run_name='__main__', alter_sys=False)"
    # "-m" is what Python itself sets while it looks for the module
    assert "usage: python -m labutils" in answer_without_torch(["-m", *command, "--help"], run)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_help_of_a_tool_is_answered_without_torch(tool):
    path = f"tools/{tool}.py"
    run = f"runpy.run_path({path!r}, run_name='__main__')"
    assert f"usage: python {path}" in answer_without_torch([path, "--help"], run)


def test_tools_that_have_a_command_line_are_those_of_the_list():
    assert sorted(path.stem for path in (ROOT / "tools").glob("*.py") if "def parser()" in path.read_text()) == TOOLS


@pytest.mark.parametrize("argv", [[], ["chekc"], ["check", "--forse"], ["check", "--forc"]])
def test_a_command_line_that_makes_no_sense_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(argv)
    assert caught.value.code == 2
    assert "usage: python -m labutils" in capsys.readouterr().err


def test_a_tool_s_command_line_that_makes_no_sense_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        study.run(["traffic", "--out", "x", "--res"])
    assert caught.value.code == 2
    assert "usage: python tools/study.py" in capsys.readouterr().err


def test_check_runs_as_a_process_and_force_decides_its_status():
    done = subprocess.run(
        [sys.executable, "-m", "labutils", "check", "--json", "--force"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert [backend["name"] for backend in found["backends"]] == [
        backend.name for backend in BACKENDS.values() if backend.load and backend.tried
    ]
    if found["compiled_flash_kernels_on_gpu"]:
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("labutils check: No FlashAttention kernel compiled for a GPU")


@pytest.mark.parametrize("command", [
    "lab", "check", "bench", "tools/targets.py", "tune --show", "tools/study.py decoding --out x",
    "tools/figure.py --out x.png", "train --smoke-test", "grade . --csv x.csv",
])  # fmt: skip
def test_a_device_that_is_not_known_is_told_without_a_traceback(command, tmp_path):
    name, *arguments = command.split()
    program = [str(ROOT / name)] if name.startswith("tools/") else ["-m", "labutils", name]
    done = subprocess.run(
        [sys.executable, *program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"LABUTILS_DEVICE": "gpu", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode in (1, 2) and "LABUTILS_DEVICE='gpu' is not known" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert "Starting" not in done.stdout  # `lab` said so before it refused


def test_check_prints_the_report(monkeypatch, capsys):
    monkeypatch.setattr(environment, "report", lambda compile_flex: f"report, compile_flex={compile_flex}")
    assert command_line.main(["check"]) == 0
    assert command_line.main(["check", "--compile-flex"]) == 0
    assert capsys.readouterr().out == "report, compile_flex=None\nreport, compile_flex=True\n"


def test_check_force_passes_where_a_compiled_kernel_ran(monkeypatch):
    monkeypatch.setattr(environment, "report", lambda compile_flex: "")
    monkeypatch.setattr(probing, "compiled_flash", lambda tried: ["triton_v2"])
    assert command_line.main(["check", "--force"]) == 0


# -- python -m labutils lab ----------------------------------------------------------------------------------


@pytest.fixture
def desktop(monkeypatch):
    """An ordinary user's desktop, whatever runs the tests."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    monkeypatch.setattr(webbrowser, "get", lambda: webbrowser.GenericBrowser("firefox"))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("BROWSER", raising=False)


def test_lab_on_a_desktop_opens_the_browser(desktop):
    command = lab.lab_command(Path("/home/ann/my lab"))
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert "--ServerApp.root_dir=/home/ann/my lab" in command
    assert "--LabApp.default_url=/lab/tree/01-Setup_and_Comparison.ipynb" in command
    assert "--no-browser" not in command and "--allow-root" not in command


def test_lab_as_root_says_so_to_jupyter(desktop, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-root" in lab.lab_command(Path("/lab"))


def no_browser_installed():
    raise webbrowser.Error("could not locate runnable browser")


def test_lab_without_a_screen_prints_the_address(desktop, monkeypatch):
    monkeypatch.delenv("DISPLAY")
    assert "--no-browser" in lab.lab_command(Path("/lab"))


@pytest.mark.parametrize("get", [no_browser_installed, lambda: webbrowser.GenericBrowser("w3m")])
def test_lab_without_a_graphical_browser_prints_the_address(desktop, monkeypatch, get):
    monkeypatch.setattr(webbrowser, "get", get)
    assert "--no-browser" in lab.lab_command(Path("/lab"))


def test_lab_trusts_the_variable_browser(desktop, monkeypatch):
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setenv("BROWSER", "/usr/local/bin/open-at-home")
    assert "--no-browser" not in lab.lab_command(Path("/lab"))


def test_lab_passes_arguments_on_and_sets_nothing_twice(desktop, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    given = ["--port=9999", "--no-browser", "--allow-root", "--log-level=INFO"]
    command = lab.lab_command(Path("/lab"), given)
    assert command[-4:] == given
    names = [argument.split("=")[0] for argument in command]
    assert all(names.count(name) == 1 for name in ("--no-browser", "--allow-root", "--log-level"))


def test_lab_starts_jupyter_without_our_interpreter_switch(desktop, monkeypatch, tmp_path, capsys):
    started = []
    (tmp_path / lab.FIRST_NOTEBOOK).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    command_line.main(["lab", "--port", "9999"])
    ((program, command, kept),) = started
    assert program == sys.executable
    assert command[-2:] == ["--port", "9999"]
    assert f"--ServerApp.root_dir={tmp_path}" in command
    if runtime.interpreted and "LABUTILS_DEVICE" not in os.environ:
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert "TRITON_INTERPRET" not in kept
    assert "It opens in your browser" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "kept"), [("", True), ("cpu", False), (" CPU", False)])
def test_lab_knows_whose_switch_it_is(device, kept, monkeypatch):
    """On a machine with a GPU the switch is the user's own, unless the device is the CPU, however that is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "interpreted", True)
    monkeypatch.setenv("LABUTILS_DEVICE", device)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ("TRITON_INTERPRET" in lab.environment_for_kernels()) is kept


def test_lab_finds_the_checkout_from_anywhere(monkeypatch, tmp_path):
    (tmp_path / "clone" / "labutils").mkdir(parents=True)
    (tmp_path / "clone" / lab.FIRST_NOTEBOOK).write_text("")
    monkeypatch.setattr(lab, "PACKAGE", tmp_path / "clone" / "labutils")
    monkeypatch.chdir(tmp_path)
    assert lab.checkout() == tmp_path / "clone"


def test_lab_without_a_checkout_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lab, "PACKAGE", tmp_path / "site-packages" / "labutils")
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["lab"]) == 2
    assert "clone it, change into it, and run the command of its README" in capsys.readouterr().err


def test_lab_without_jupyterlab_says_what_to_do(monkeypatch, tmp_path, capsys):
    (tmp_path / lab.FIRST_NOTEBOOK).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None)
    assert command_line.main(["lab"]) == 2
    assert "pip install -e ." in capsys.readouterr().err


@pytest.fixture
def server(tmp_path):
    """Address and token, read off the terminal, of a server in a folder with a space in its name."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: notebooks are only executed here")
    folder = tmp_path / "my lab"
    folder.mkdir()
    cell = {
        "cell_type": "code",
        "id": "a",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": "",
    }
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / lab.FIRST_NOTEBOOK).write_text(json.dumps(notebook))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dropped = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY", "JUPYTER_TOKEN", "TRITON_INTERPRET")
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        clean[name] = str(tmp_path / name)
    clean["PYTHONPATH"] = str(ROOT)  # as after `pip install -e .`
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "labutils", "lab", f"--port={port}"],
            cwd=folder,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        address = None
        while address is None:
            assert process.poll() is None, f"JupyterLab ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"no address after two minutes:\n{log.read_text()}"
            address = re.search(r"(http://127\.0\.0\.1:\d+)(/\S*)\?token=(\w+)", log.read_text())
            time.sleep(0.2)
        yield address.groups()
    finally:
        process.send_signal(signal.SIGTERM)  # the server shuts its kernels down
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_lab_serves_the_first_notebook_and_its_kernel_imports_labutils(server):
    import websocket  # of the package websocket-client, which jupyter_server needs

    host, path, token = server
    assert path == f"/lab/tree/{lab.FIRST_NOTEBOOK}"

    def ask(url, data=None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(host + url, body, {"Authorization": f"token {token}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    assert "JupyterLab" in ask(path)
    assert [entry["name"] for entry in json.loads(ask("/api/contents"))["content"]] == [lab.FIRST_NOTEBOOK]
    notebook = {
        "path": lab.FIRST_NOTEBOOK,
        "name": "",
        "type": "notebook",
        "kernel": {"name": "python3"},
    }
    kernel = json.loads(ask("/api/sessions", notebook))["kernel"]["id"]

    channel = websocket.create_connection(
        f"{host.replace('http', 'ws')}/api/kernels/{kernel}/channels",
        header=[f"Authorization: token {token}"],
        timeout=120,
    )
    code = "import labutils, sys; print(labutils.__version__, sys.executable)"
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "execute_request",
        "session": "s",
        "username": "",
        "version": "5.3",
    }
    content = {
        "code": code,
        "silent": False,
        "store_history": False,
        "user_expressions": {},
        "allow_stdin": False,
    }
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    channel.send(json.dumps(message))
    printed = ""
    while True:
        answer = json.loads(channel.recv())
        if answer["msg_type"] == "stream":
            printed += answer["content"]["text"]
        if answer["msg_type"] == "execute_reply":
            break
    channel.close()
    assert answer["content"]["status"] == "ok", answer["content"]
    assert printed.split(" ", 1)[1].strip() == sys.executable


# -- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["abc", "nan", "-1", "0", "3600"])
@pytest.mark.parametrize(("command", "arguments"), [(targets, []), (tune, []), (study, ["blocks", "--out", "x"])])
def test_seconds_in_which_nothing_can_be_measured_are_refused(command, arguments, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.run([*arguments, f"--seconds={value}"])
    assert stopped.value.code == 2
    assert f"{value}: it must be a number of seconds, above 0" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["abc", "0", "-2", "1.5"])
@pytest.mark.parametrize(
    ("command", "option"),
    [(targets, "--rounds"), (tune, "--rounds"), (bench, "--rounds"), (study, "blocks --out x --processes")],
)
def test_counts_that_are_no_whole_numbers_are_refused(command, option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.run(f"{option}={value}".split())
    assert stopped.value.code == 2
    assert f"{value}: it must be 1 or more, a whole number" in capsys.readouterr().err
