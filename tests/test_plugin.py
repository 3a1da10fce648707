"""The real Claude Code, set up by `install` and as a plugin: one ping per event."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from types import ModuleType
from typing import Any

import pytest

import claude_code
from claude_code import Seen, World, client, text, tool
from support import ROOT, SCRIPT, TOKEN

PLUGIN = "telemhq-ping@telemhq-ping"
SAY: dict[str, list[Any]] = {
    "WORK": [
        [tool("Bash", command="echo CANARY_OUT")],
        [tool("Bash", command="echo CANARY_ERR >&2; exit 3")],
        [text("CANARY_DONE")],
    ]
}


def told(world: World, *command: str) -> tuple[int, str]:
    """Exit status and output of a command in the client's environment, without a ping
    URL; a GET of doctor's is no ping."""
    world.url = None
    ended = subprocess.run(
        command,
        env=world.env(),
        cwd=str(world.home.project),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=150,
    )
    requests = world.receiver.requests
    requests[:] = [request for request in requests if request.method == "POST"]
    return ended.returncode, ended.stdout.decode("utf-8", "replace")


def ours(home: pathlib.Path) -> list[str]:
    """The paths below a home with something of ours in the name, and settings files."""
    found = [str(path.relative_to(home)) for path in home.rglob("*")]
    words = ("telemhq", "hooks", "settings", "__pycache__")
    return sorted(path for path in found if any(word in path for word in words))


# -- Set up by `install` ---------------------------------------------------------


def play_installed(world: World) -> dict[str, Any]:
    """`install`, a session, `doctor`, `report`, `uninstall`."""
    world.messages.script = SAY
    by = "python3", str(SCRIPT)
    (world.home.path / ".claude" / "hooks").rmdir()
    found: dict[str, Any] = {"before": ours(world.home.path)}
    asked = "install", "--url", world.receiver.url, "--tools", "--yes"
    found["install"] = told(world, *by, *asked)
    world.claude("WORK")
    world.settle()
    for command in (["doctor"], ["report"], ["uninstall", "--yes"]):
        found[command[0]] = told(world, *by, *command)
    return {**found, "after": ours(world.home.path)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What became of a session set up by `install`."""
    return claude_code.run(play_installed, tmp_path_factory.mktemp("installed"))


def test_what_install_writes_works(installed: Seen) -> None:
    """With the settings that `install` writes, the real client's session sends its
    pings, tool activity included; the URL comes from the settings' env block. No hook
    of ours shows in a transcript as an error or with output."""
    assert [ping["event"] for ping in installed.pings] == [
        "PostToolUse",
        "PostToolUseFailure",
        "Stop",
        "SessionEnd",
    ]
    assert installed.noticed() == []


@pytest.mark.parametrize("command", ["install", "doctor", "report", "uninstall"])
def test_every_command_is_content(installed: Seen, command: str) -> None:
    """install, doctor, report and uninstall find nothing wrong, and print no secret."""
    code, said = installed.told[command]
    assert code == 0, said
    assert TOKEN not in said
    assert "Traceback" not in said


def test_nothing_of_ours_is_left(installed: Seen) -> None:
    """After a session and uninstall a fresh HOME is as it was, but for the client's own
    files."""
    assert installed.told["before"] == installed.told["after"]


# -- As a plugin -----------------------------------------------------------------


def play_plugin(world: World) -> dict[str, Any]:
    """The plugin, installed from a checkout; a session; its own copy's commands; its
    removal."""
    world.messages.script = SAY
    checkout = world.home.path / "checkout"
    shutil.copytree(str(ROOT / ".claude-plugin"), str(checkout / ".claude-plugin"))
    shutil.copy(str(SCRIPT), str(checkout))
    found: dict[str, Any] = {}
    url = "ping_url=" + world.receiver.url
    for asked in (
        ["marketplace", "add", str(checkout)],
        ["install", PLUGIN, "--config", url],
    ):
        code, said = told(world, client(), "plugin", *asked)
        assert code == 0, said
    world.claude("WORK")
    world.settle()
    readme = (ROOT / "README.md").read_text("utf-8")
    (here,) = world.home.path.glob(".claude/plugins/cache/telemhq-ping/*/*")
    old = here.with_name("0.9.0")  # the client keeps it for a while
    old.mkdir()
    (old / SCRIPT.name).write_text("import sys; sys.exit(9)")
    copy = re.findall("`(python3 .*telemhq-ping/.*) doctor`", readme)[0] + " "
    for command in ("doctor", "sent", "uninstall --yes"):
        found[command] = told(world, "/bin/sh", "-c", copy + command)
    found["settings"] = (world.home.path / ".claude/settings.json").read_text("utf-8")
    found["state"] = {
        path.name: path.read_bytes().decode("latin-1")
        for path in world.home.state.rglob("*")
        if path.is_file()
    }
    found["removed"] = told(world, client(), "plugin", "uninstall", PLUGIN)
    found["after"] = ours(world.home.path)
    remedy = found["uninstall --yes"][1].rpartition("; ")[2].splitlines()[0]
    found["rest"] = told(world, "/bin/sh", "-c", remedy)
    found["state after"] = world.home.state.exists()
    return found


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What became of a session with the plugin."""
    return claude_code.run(play_plugin, tmp_path_factory.mktemp("plugin"))


def test_the_plugin_sends_pings(plugin: Seen) -> None:
    """Installed from a checkout, with the URL as its option, the plugin sends a ping
    for each of its events; nothing else needs to be set up, nothing shows."""
    assert [ping["event"] for ping in plugin.pings] == ["Stop", "SessionEnd"]
    assert plugin.pings[0]["total_tokens"] > 0
    assert plugin.requests[0]["path"] == "/ping/" + TOKEN
    assert plugin.noticed() == []


def test_the_url_is_in_no_command_and_no_transcript(plugin: Seen) -> None:
    """The URL's token is kept as a secret: in no transcript, no settings, no state."""
    rows = json.dumps(list(plugin.rows()))
    assert "telemhq_ping.py" in rows  # a Stop's commands are in the transcript
    assert TOKEN not in rows + plugin.told["settings"]
    assert plugin.told["state"]
    assert TOKEN not in str(plugin.told["state"])


def test_the_plugins_own_copy_runs_the_commands(plugin: Seen) -> None:
    """The README's line runs the plugin's own copy, whatever its version: doctor is
    content without knowing the URL, sent shows what left, and uninstall says how the
    plugin goes, and its state."""
    for command in ("doctor", "sent", "uninstall --yes"):
        code, said = plugin.told[command]
        assert code == 0, said
        assert TOKEN not in said
    assert '"SessionEnd"' in plugin.told["sent"][1]
    words = f"claude plugin uninstall {PLUGIN}; rm -r '/.*/.claude/telemhq'\n"
    assert re.search(words, plugin.told["uninstall --yes"][1])


def test_the_plugins_state_is_left_to_its_user(plugin: Seen) -> None:
    """`claude plugin uninstall` leaves the state; the line that uninstall prints
    removes it."""
    assert plugin.told["removed"][0] == plugin.told["rest"][0] == 0
    assert ".claude/telemhq" in plugin.told["after"]
    assert plugin.told["state after"] is False


# -- The plugin's files ----------------------------------------------------------


def manifest(name: str) -> Any:
    """A file of .claude-plugin."""
    return json.loads((ROOT / ".claude-plugin" / name).read_text("utf-8"))


def test_the_plugin_registers_the_examples_events() -> None:
    """The plugin's hooks are those of settings.example.json, from its own directory.
    (`cd ""` would succeed, and import from the project: hence the slash.)"""
    example = json.loads((ROOT / "settings.example.json").read_text("utf-8"))["hooks"]
    text = json.dumps(example)
    for place, its_own in (
        ("~/.claude/hooks/telemhq_ping.py", "${CLAUDE_PLUGIN_ROOT}/telemhq_ping.py"),
        ("~/.claude/hooks", "${CLAUDE_PLUGIN_ROOT}/"),
    ):
        text = text.replace(place, f'\\"{its_own}\\"')
    assert manifest("plugin.json")["hooks"] == json.loads(text)


def test_the_versions_agree(script: ModuleType) -> None:
    """Plugin and script are of one version; the marketplace names the plugin. The ping
    URL is a sensitive option, which the client keeps apart."""
    found = manifest("plugin.json")
    assert found["userConfig"]["ping_url"]["sensitive"] is True
    assert found["version"] == script.__version__
    market = manifest("marketplace.json")
    assert found["name"] + "@" + market["name"] == PLUGIN
    assert [plugin["name"] for plugin in market["plugins"]] == [found["name"]]
