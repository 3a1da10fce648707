"""The real Claude Code, set up by `install` and as a plugin: one ping per event."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
from types import ModuleType
from typing import Any

import pytest

import claude_code
from claude_code import Seen, World, client, need, text, tool
from support import ROOT, SCRIPT, TOKEN, script_command

PLUGIN = "telemhq-ping@telemhq-ping"
SAY: dict[str, list[Any]] = {
    "WORK": [
        [tool("Bash", command="echo CANARY_OUT")],
        [tool("Bash", command="echo CANARY_ERR >&2; exit 3")],
        [text("CANARY_DONE")],
    ]
}


def without_url(world: World) -> None:
    """Take the ping URL out of the client's environment."""
    world.url = None


def run_client(world: World, *arguments: str) -> str:
    """Run a command of the client's; its output."""
    ended = subprocess.run(
        [client(), *arguments],
        env=world.env(),
        cwd=str(world.home.project),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=150,
    )
    said = ended.stdout.decode("utf-8", "replace")
    assert ended.returncode == 0, said
    return said


def run_ours(world: World, *arguments: str) -> tuple[int, str]:
    """Run one of our commands; its output."""
    ended = subprocess.run(
        script_command(*arguments),
        env=world.env(),
        cwd=str(world.home.project),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=100,
    )
    return ended.returncode, ended.stdout.decode("utf-8")


def doctor(world: World) -> tuple[int, str]:
    """doctor's status and output; its GET is no ping."""
    told = run_ours(world, "doctor")
    assert world.receiver.requests.pop().method == "GET"
    return told


def checkout(world: World) -> pathlib.Path:
    """A checkout: the files that the repository keeps for a plugin."""
    found = world.home.path / "checkout"
    shutil.copytree(str(ROOT / ".claude-plugin"), str(found / ".claude-plugin"))
    shutil.copy(str(SCRIPT), str(found))
    return found


# -- Set up by `install` ---------------------------------------------------------


def play_installed(world: World) -> dict[str, Any]:
    """`install --url URL --tools`, a session, `doctor`, `uninstall`."""
    without_url(world)
    world.messages.script = SAY
    asked = "install", "--url", world.receiver.url, "--tools"
    told: dict[str, Any] = {"install": run_ours(world, *asked)}
    world.claude("WORK")
    world.settle()
    told["doctor"] = doctor(world)
    told["uninstall"] = run_ours(world, "uninstall")
    told["left"] = os.path.exists(str(world.home.path / ".claude" / "settings.json"))
    return told


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What became of a session set up by `install`."""
    return claude_code.run(play_installed, tmp_path_factory.mktemp("installed"))


def test_what_install_writes_works(installed: Seen) -> None:
    """With the settings that `install` writes, the real client's session sends its
    pings, tool activity included; the URL comes from the settings' env block."""
    assert installed.told["install"][0] == 0
    assert [ping["event"] for ping in installed.pings] == [
        "PostToolUse",
        "PostToolUseFailure",
        "Stop",
        "SessionEnd",
    ]


def test_the_client_notices_nothing_of_the_installed_hooks(installed: Seen) -> None:
    """No hook of ours shows in a transcript as an error or with output."""
    assert installed.noticed() == []


def test_doctor_is_content_after_a_session(installed: Seen) -> None:
    """After the session doctor finds nothing wrong, and prints no secret."""
    code, said = installed.told["doctor"]
    assert code == 0, said
    assert TOKEN not in said


def test_uninstall_after_a_session(installed: Seen) -> None:
    """After the session uninstall removes settings and script."""
    assert installed.told["uninstall"][0] == 0
    assert installed.told["left"] is False


# -- As a plugin -----------------------------------------------------------------


def play_plugin(world: World, settings_too: bool) -> dict[str, Any]:
    """The plugin, installed from a checkout; a session; a settings file beside it."""
    without_url(world)
    world.messages.script = SAY
    run_client(world, "plugin", "marketplace", "add", str(checkout(world)))
    run_client(
        world, "plugin", "install", PLUGIN, "--config", "ping_url=" + world.receiver.url
    )
    told = {"first": world.claude("WORK")["session_id"]}
    world.settle()
    if settings_too:
        run_ours(world, "install", "--url", world.receiver.url)
        told["second"] = world.claude("WORK")["session_id"]
        world.settle()
        told["doctor"] = doctor(world)
    return told


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What became of a session with the plugin, and of one with settings beside it."""
    path = tmp_path_factory.mktemp("plugin")
    return claude_code.run(play_plugin, path, settings_too=True)


def of(plugin: Seen, which: str) -> list[dict[str, Any]]:
    """The pings of one of the two sessions."""
    return [p for p in plugin.pings if p["session_id"] == plugin.told[which]]


def test_the_plugin_sends_pings(plugin: Seen) -> None:
    """Installed from a checkout, with the URL as its option, the plugin sends a ping
    for each of its events; nothing else needs to be set up."""
    pings = of(plugin, "first")
    assert [ping["event"] for ping in pings] == ["Stop", "SessionEnd"]
    assert pings[0]["total_tokens"] > 0
    assert plugin.requests[0]["path"] == "/ping/" + TOKEN


def test_with_settings_beside_the_plugin_each_event_is_one_ping(plugin: Seen) -> None:
    """Where a settings file names the script as well, there is one ping per event."""
    pings = of(plugin, "second")
    assert [ping["event"] for ping in pings] == ["Stop", "SessionEnd"]


def test_the_client_notices_nothing_of_the_plugin(plugin: Seen) -> None:
    """No hook of the plugin shows in a transcript as an error or with output."""
    assert plugin.noticed() == []


def test_the_url_is_in_no_command_and_no_transcript(plugin: Seen) -> None:
    """The URL's token is kept as a secret: in no command, no transcript, no settings
    but the env block that `install --url` was told to write."""
    rows = json.dumps(list(plugin.rows()))
    assert "telemhq_ping.py" in rows  # a Stop's commands are in the transcript
    assert TOKEN not in rows
    for found in plugin.state().values():
        assert TOKEN not in found
    config = plugin.home / ".claude"
    cached = list((config / "plugins").rglob("*.json"))
    assert cached
    assert not [path for path in cached if TOKEN in path.read_text("utf-8")]
    hooks = json.loads((config / "settings.json").read_text("utf-8"))["hooks"]
    assert TOKEN not in json.dumps(hooks)


def test_doctor_knows_the_plugin(plugin: Seen) -> None:
    """With settings beside the plugin doctor is content."""
    code, said = plugin.told["doctor"]
    assert code == 0, said


# -- The plugin's files ----------------------------------------------------------


def manifest(name: str) -> Any:
    """A file of .claude-plugin."""
    return json.loads((ROOT / ".claude-plugin" / name).read_text("utf-8"))


def test_the_client_finds_the_plugins_files_valid(tmp_path: pathlib.Path) -> None:
    """`claude plugin validate` passes, for the marketplace and for the plugin."""
    need([client(), "--version"], "no Claude Code: set TELEMHQ_TEST_CLAUDE to its path")
    ended = subprocess.run(
        [client(), "plugin", "validate", str(ROOT)],
        env={
            "HOME": str(tmp_path),
            "PATH": os.environ["PATH"],
            "DISABLE_TELEMETRY": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=100,
    )
    said = ended.stdout.decode("utf-8", "replace")
    assert ended.returncode == 0, said
    for event in manifest("plugin.json")["hooks"]:
        assert f"hooks: {event} command" in said


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


def test_the_plugins_url_is_a_secret() -> None:
    """The ping URL is a sensitive option, which the client keeps apart."""
    option = manifest("plugin.json")["userConfig"]["ping_url"]
    assert option["sensitive"] is True
    assert {"type", "title", "description"} <= set(option)


def test_the_versions_agree(script: ModuleType) -> None:
    """Plugin and script are of one version; the marketplace names the plugin."""
    found = manifest("plugin.json")
    assert found["version"] == script.__version__
    market = manifest("marketplace.json")
    assert found["name"] + "@" + market["name"] == PLUGIN
    assert [plugin["name"] for plugin in market["plugins"]] == [found["name"]]
