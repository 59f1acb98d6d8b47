"""Settings are read, and a process that cannot use them ends with an error."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from deploy import settings_docs
from deploy.local.local_settings import LocalSettings
from services.sync.cli.main import main
from shared.home import require_home
from shared.messaging import topology
from shared.setting_fields import allowed_values, description_of, variable
from shared.settings import Settings
from shared.settings_loading import LOCAL_RUN_NAMES, OTHER_NAMES, SettingsError
from tests.rigs.system import ROOT

ENTRY_POINTS = {
    "orders": ["services.orders"],
    "sync-worker": ["services.sync", "worker"],
    "sync-api": ["services.sync", "api"],
    "notifier": ["services.notifier"],
    "ticketrail": ["services.sync.cli", "asyncapi"],
    "make run": ["deploy.local.run"],
}
SERVICES = ("orders", "sync-worker", "sync-api", "notifier")
# These names are misspelt on purpose, for tests of the error.
_MISSPELT = {"TICKETRAIL_TRACE_SAMPEL", "TICKETRAIL_ORDER_PORT", "TICKETRAIL_EXTRA", "TICKETRAIL_NO_SUCH_SETTING"}

Load = Callable[..., Settings]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """Returns a function that loads settings from the given variables and `.env` text only."""
    for name in [name for name in os.environ if name.startswith("TICKETRAIL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def from_environment(file: str = "", **environment: str) -> Settings:
        (tmp_path / ".env").write_text(file)
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return Settings.load()

    return from_environment


# -- wrong values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("HOME", "", "the path of a directory"),
        ("ORDERS_PORT", "eighty", "a whole number from 1 to 65535"),
        ("ORDERS_PORT", "70000", "a whole number from 1 to 65535"),
        ("ENVIRONMENT", "prod", "development or production"),
        ("INSTANCE", "0", "a whole number above 0 or auto"),
        ("TRACE_SAMPLE", "1.5", "a number from 0 to 1"),
        ("TRACE_SAMPLE", "", "a number from 0 to 1"),
        ("LOST_MESSAGE_SECONDS", "inf", "a number above 0"),
        ("ADDRESS_REQUESTS_PER_SECOND", "-1", "a number of 0 or more"),
        ("RETRY_STEPS_MS", "1000,2000", "a JSON list of whole numbers above 0, such as [1000, 10000]"),
        ("RETRY_STEPS_MS", "[1000, -1]", "a JSON list of whole numbers above 0, such as [1000, 10000]"),
        ("STATUS_URLS", "http://orders:8001", "a JSON object such as"),
        ("HOST", "bad host", "an IP address"),
        ("HOST", "999.1.1.1", "an IP address"),
        ("HOST", "localhost", "an IP address"),
        ("HOST", "fe80::1%eth0", "an IP address"),
        ("HOST", "", "an IP address"),
        ("CORS_ORIGINS", "foo", "empty, * or origins separated by commas"),
        ("CORS_ORIGINS", "https://pos.example,pos.example", "empty, * or origins separated by commas"),
        ("CORS_ORIGINS", "https://pos.example/", "empty, * or origins separated by commas"),
        ("CORS_ORIGINS", "https://bad host", "empty, * or origins separated by commas"),
        ("CORS_ORIGINS", "https://u:p@pos.example", "empty, * or origins separated by commas"),
        ("CORS_ORIGINS", "https://:8443", "empty, * or origins separated by commas"),
        ("CORS_ORIGINS", "https://pos.example:port", "empty, * or origins separated by commas"),
        ("PORT_BASE", "99999", "a whole number from 1023 to 65525"),
        ("PORT_BASE", "-5", "a whole number from 1023 to 65525"),
        ("PORT_BASE", "many", "a whole number from 1023 to 65525"),
        ("TRUSTED_PROXIES", "nginx", "addresses or networks separated by commas"),
        ("CHANGE_LOG_MAX_AGE", "7 days", "a whole number followed by Y, M, D, h, m or s, such as 7D"),
        ("OTLP_ENDPOINT", "collector:4318", "empty or a URL of http:// or https:// with a host"),
    ],
)
@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_wrong_value_is_refused_with_setting_value_and_allowed_values(
    load: Load, name: str, value: str, allowed: str, source: str
) -> None:
    variable = f"TICKETRAIL_{name}"
    with pytest.raises(SettingsError) as refused:
        if source == "file":
            load(f"{variable}='{value}'\n")
        else:
            load(**{variable: value})
    said = str(refused.value)
    origin = " (in .env)" if source == "file" else ""
    assert said.startswith(f"{variable}{origin} is {value!r}, which is not allowed: it must be {allowed}")
    assert "\n" not in said


def test_each_wrong_value_has_a_sentence_of_its_own(load: Load) -> None:
    with pytest.raises(SettingsError) as refused:
        load(TICKETRAIL_SYNC_PORT="x", TICKETRAIL_ENVIRONMENT="x", TICKETRAIL_HOST="0.0.0.0")
    names = [line.split()[0] for line in str(refused.value).splitlines()]
    assert names == ["TICKETRAIL_ENVIRONMENT", "TICKETRAIL_SYNC_PORT"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RABBITMQ_URL", "http://ticketrail:hunter2@mq/"),
        ("RABBITMQ_URL", "amqp://ticketrail:hunter2@mq/,amqp://ticketrail:hunter2@mq:99999/"),
        ("REDIS_URL", "redis://:hunter2@/0"),
        ("DATABASE_OPS_URL", "mysql://u:hunter2@db/x"),
        ("RABBITMQ_WATCHER_URL", "watcher:hunter2@mq:15672"),
        ("JWT_SECRET", "hunter2"),
    ],
)
def test_a_wrong_value_of_a_secret_setting_is_not_repeated(load: Load, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^TICKETRAIL_{name} has a value that is not allowed: it must be ") as seen:
        load(**{f"TICKETRAIL_{name}": value})
    assert "hunter2" not in str(seen.value)
    assert seen.value.__cause__ is None
    assert seen.value.__suppress_context__


def test_every_setting_that_can_hold_a_password_or_key_counts_as_secret() -> None:
    secret = {name for name, field in LocalSettings.model_fields.items() if description_of(field).secret}
    assert secret == {
        name
        for name in LocalSettings.model_fields
        if re.search(r"(secret|token|_key)$|^(database|redis|rabbitmq)_.*urls?$", name)
    }


def test_a_wrong_port_base_is_refused_by_make_run_in_the_same_single_sentence(load: Load) -> None:
    for base in ("99999", "-5", "0", "80", "many"):
        with pytest.raises(SettingsError) as by_service:
            load(TICKETRAIL_PORT_BASE=base)
        with pytest.raises(SettingsError) as by_run, pytest.MonkeyPatch.context() as patch:
            patch.setenv("TICKETRAIL_PORT_BASE", base)
            LocalSettings.load()
        assert str(by_run.value) == str(by_service.value)
        assert str(by_run.value).startswith(f"TICKETRAIL_PORT_BASE is '{base}'")
        assert "\n" not in str(by_run.value)


def test_addresses_and_origins_are_accepted(load: Load) -> None:
    secrets = {"TICKETRAIL_JWT_SECRET": "j" * 32}
    for host in ("0.0.0.0", "::1", "192.168.1.7"):
        assert load(TICKETRAIL_HOST=host, **secrets).host == host
    for origins in ("", "*", "https://pos.example", "http://localhost:3000, https://*.pos.example", "http://[::1]:80"):
        assert load(TICKETRAIL_CORS_ORIGINS=origins).cors_origins == origins


def test_urls_of_several_hosts_and_empty_urls_are_accepted(load: Load) -> None:
    several = "amqp://a:b@mq-1:5672/,amqps://a:b@mq-2/"
    postgres = "postgresql://a:b@pg-1:5432,pg-2:5433/ticketrail?target_session_attrs=read-write"
    found = load(TICKETRAIL_RABBITMQ_URL=several, TICKETRAIL_DATABASE_API_URL=postgres, TICKETRAIL_DATABASE_URL="")
    assert (found.rabbitmq_url, found.database_api_url, found.database_url) == (several, postgres, "")
    assert load(TICKETRAIL_DATABASE_URL="postgresql:///ticketrail?host=/run/postgresql").database_url


def test_a_file_that_is_not_text_is_reported(load: Load, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"TICKETRAIL_HOST=\xff\xfe")
    with pytest.raises(SettingsError, match=r"^\.env cannot be read: "):
        Settings.load()


# -- unknown names -----------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest_known_one(load: Load) -> None:
    with pytest.raises(SettingsError, match=r"^TICKETRAIL_TRACE_SAMPEL is not a setting; .* TICKETRAIL_TRACE_SAMPLE$"):
        load(TICKETRAIL_TRACE_SAMPEL="1")
    with pytest.raises(SettingsError, match=r"^TICKETRAIL_ORDER_PORT \(in \.env\) .* TICKETRAIL_ORDERS_PORT$"):
        load("TICKETRAIL_ORDER_PORT=1\nOTHER_NAME=2\n")


def test_names_of_make_run_compose_and_tests_are_accepted(load: Load) -> None:
    for name in [*OTHER_NAMES, *LOCAL_RUN_NAMES]:
        assert load(**{name: "1"}) == load()
    assert not {variable(name) for name in LocalSettings.model_fields} & OTHER_NAMES.keys()
    assert {variable(name) for name in LocalSettings.model_fields.keys() - Settings.model_fields} == LOCAL_RUN_NAMES


def test_the_ports_of_make_run_are_below_the_range_of_outgoing_connections_and_not_the_usual_ones() -> None:
    ports = {port for port, _ in LocalSettings(_env_file=None).ports.values()}
    assert len(ports) == 10
    assert max(ports) < 32_768
    assert not ports & {4369, 5432, 5672, 6379, 15672, 25672}


def test_the_default_urls_name_the_ports_of_make_run() -> None:
    local = LocalSettings(_env_file=None)
    ports = {f":{local.postgres_port}/", f":{local.redis_port}/", f":{local.rabbitmq_port}/"}
    urls = [local.database_url, local.database_writer_url, local.database_api_url, local.database_ops_url]
    assert {
        found for url in [*urls, local.redis_url, local.rabbitmq_url] for found in re.findall(r":\d+/", url)
    } == ports
    for url in (local.rabbitmq_management_url, local.rabbitmq_watcher_url):
        assert url.endswith(f":{local.rabbitmq_management_port}")


def test_every_name_in_the_repository_is_known() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    known = {variable(name) for name in LocalSettings.model_fields} | OTHER_NAMES.keys() | _MISSPELT
    unknown = {}
    for path in listed.split("\0"):
        if not path or not (ROOT / path).is_file():
            continue
        text = (ROOT / path).read_text(errors="replace")
        # A name that ends in `_` is the beginning of several, as in `TICKETRAIL_DATABASE_*URL`.
        for name in re.findall(r"TICKETRAIL_[A-Z_]*[A-Z]\b(?![_{*])", text):
            if name not in known:
                unknown[name] = path
    assert unknown == {}


# -- entry points ------------------------------------------------------------------------------------------------


def only_sentence(entry: str, output: str) -> str:
    """Returns the one error in the output of an entry point. That of a service is a log: it has JSON lines only."""
    (line,) = output.splitlines()
    if entry in SERVICES:
        found = json.loads(line)
        assert (found["service"], found["level"], found["event"]) == (entry, "error", "settings_refused")
        assert datetime.fromisoformat(found["timestamp"])
        (sentence,) = found["errors"]
        return str(sentence)
    said, _, sentence = line.partition(": ")
    assert said in ("ticketrail", "Error")
    return sentence


@pytest.mark.parametrize("source", ["environment", "file"])
def test_every_entry_point_ends_with_one_sentence_for_a_wrong_setting(tmp_path: Path, source: str) -> None:
    cases = {
        "TICKETRAIL_SYNC_PORT": "is 'x'.*, which is not allowed",
        "TICKETRAIL_PORT_BASE": "is 'x'.*, which is not allowed",
        "TICKETRAIL_EXTRA": "nearest one is TICKETRAIL_",
    }
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")}
    for name, said in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        if source == "file":
            (folder / ".env").write_text(f"{name}=x\n")
        env = {**plain, "PYTHONPATH": str(ROOT), **({name: "x"} if source == "environment" else {})}
        started = {
            entry: subprocess.Popen(
                [sys.executable, "-m", *module], cwd=folder, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True
            )
            for entry, module in ENTRY_POINTS.items()
        }
        for entry, process in started.items():
            try:
                told, _ = process.communicate(timeout=60)
            finally:
                process.kill()
            assert process.returncode == 1, (entry, told)
            assert re.fullmatch(rf"{name}\b.*{said}.*", only_sentence(entry, told)), (entry, told)


@pytest.mark.parametrize("entry", SERVICES)
def test_a_service_names_the_empty_url_that_it_needs(tmp_path: Path, entry: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")}
    name = variable("database_api_url" if entry == "notifier" else "redis_url")
    ended = subprocess.run(
        [sys.executable, "-m", *ENTRY_POINTS[entry]],
        cwd=tmp_path,
        env={**plain, "PYTHONPATH": str(ROOT), name: ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert only_sentence(entry, ended.stdout + ended.stderr) == f"{name} is empty, but this process needs it"


@pytest.mark.parametrize("entry", [*SERVICES, "make run"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_an_unusable_home_is_refused_in_one_sentence(tmp_path: Path, entry: str, below: str) -> None:
    (tmp_path / "file").touch()
    home = f"{tmp_path}/file{below}"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")}
    # With `auto` a service leases its number in the home, so it cannot start without one.
    env = {**plain, "PYTHONPATH": str(ROOT), "TICKETRAIL_HOME": home, "TICKETRAIL_INSTANCE": "auto"}
    ended = subprocess.run(
        [sys.executable, "-m", *ENTRY_POINTS[entry]],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    assert only_sentence(entry, said).startswith(
        f"TICKETRAIL_HOME is {home!r}, which is not allowed: it must be the path of a directory "
    )


def test_a_service_on_a_terminal_reports_the_error_in_plain_text(tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "services.orders"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "TICKETRAIL_SYNC_PORT": "x"},
            stdout=terminal,
            stderr=terminal,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 1
        assert os.read(ours, 1000).startswith(b"ticketrail: TICKETRAIL_SYNC_PORT is 'x'")
    finally:
        os.close(ours)
        os.close(terminal)


def test_a_home_that_only_lacks_its_folders_gets_them(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path / "new")
    require_home(settings, settings.journal_folder)
    require_home(settings, settings.journal_folder)
    assert settings.journal_folder.is_dir()


def test_a_command_reports_a_wrong_setting_but_help_and_version_need_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TICKETRAIL_RETRY_STEPS_MS", "soon")
    refused = CliRunner().invoke(main, ["asyncapi"])
    assert refused.exit_code == 1
    assert refused.output.startswith("Error: TICKETRAIL_RETRY_STEPS_MS is 'soon'")
    for arguments in (["--help"], ["trace", "--help"], ["--version"]):
        shown = CliRunner().invoke(main, arguments)
        assert shown.exit_code == 0, shown.output
        assert "ticketrail" in shown.output


# -- defaults ----------------------------------------------------------------------------------------------------


def test_every_trace_is_kept_in_development_and_a_tenth_in_production(load: Load) -> None:
    production: dict[str, Any] = {name: "" for name in Settings.model_fields if name.endswith("_url")}
    strong = "f3Zr0kq9wLx7TnVb2mYc"
    production |= {"environment": "production", "jwt_secret": strong * 2}
    chosen = {variable(name): value for name, value in production.items()}
    assert load().trace_sample == 1.0
    assert load(**chosen).trace_sample == 0.1
    assert load(**chosen, TICKETRAIL_TRACE_SAMPLE="0.5").trace_sample == 0.5
    assert load(TICKETRAIL_TRACE_SAMPLE="0").trace_sample == 0
    assert (load().registration, load(**chosen).registration) == ("open", "closed")
    assert load(**chosen, TICKETRAIL_REGISTRATION="invitation").registration == "invitation"


# -- documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [".env.example", "docs/settings.md"])
def test_make_settings_would_not_change_the_documents(path: str) -> None:
    assert (ROOT / path).read_text() == settings_docs.documents()[path], f"{path} is out of date: run `make settings`"


def test_the_example_lists_every_setting_with_its_default(load: Load) -> None:
    example = (ROOT / ".env.example").read_text()
    lines = re.findall(r"^#(TICKETRAIL_\w+)=(.*)$", example, re.MULTILINE)
    assert [name for name, _ in lines] == [variable(name) for name in LocalSettings.model_fields]
    assert load(re.sub(r"^#(?=TICKETRAIL_)", "", example, flags=re.MULTILINE)) == load()
    assert LocalSettings.load() == LocalSettings(_env_file=None)


def test_every_setting_has_a_group_a_sentence_and_the_unit_of_its_name() -> None:
    units = {"_seconds": "seconds", "_ms": "milliseconds", "_bytes": "bytes", "_days": "days"}
    for name, field in LocalSettings.model_fields.items():
        described = description_of(field)
        assert described.group, name
        assert re.fullmatch(r"\S.*\.", described.sentence), name
        for ending, unit in units.items():
            assert (described.unit == unit) == name.endswith(ending), name
        if "number" in allowed_values(field) and name not in ("instance", "trace_sample"):
            assert described.unit or name.endswith("_port") or name in ("port_base", "change_log_max_age"), name


@pytest.mark.parametrize(("preset", "minutes"), [("growing", 6.2), ("every_30s", 5.0), ("every_5min", 60.0)])
def test_retry_schedule_has_presets_and_one_queue_for_each_delay(
    preset: str, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TICKETRAIL_RETRY_STEPS_MS", preset)
    settings = Settings(_env_file=None)
    assert round(sum(settings.retry_steps_ms) / 60_000, 1) == minutes
    retries = [queue.name for queue in topology.queues(settings) if ".retry." in queue.name]
    assert len(retries) == len(set(retries)) == 3 * len(set(settings.retry_steps_ms))
    monkeypatch.setenv("TICKETRAIL_RETRY_STEPS_MS", "sometimes")
    with pytest.raises(ValidationError):
        Settings(_env_file=None)


def test_secrets_are_read_from_files_and_the_environment_overrides_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shared.settings_loading.SECRETS", tmp_path / "secrets")
    default = Settings.load().database_api_url  # there is no such directory
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/ticketrail_database_api_url").write_text("postgresql://from@a-file/ticketrail\n")
    (tmp_path / "secrets/of_another_program").write_text("ignored")
    assert Settings.load().database_api_url == "postgresql://from@a-file/ticketrail" != default
    monkeypatch.setenv("TICKETRAIL_DATABASE_API_URL", "postgresql://from@the-environment/ticketrail")
    assert Settings.load().database_api_url == "postgresql://from@the-environment/ticketrail"
