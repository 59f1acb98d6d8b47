"""Checks of `docker-compose.yml`, the gateway and the image. They read the files, so no container engine is needed."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml

from services.sync.api import API
from shared.http import response_headers
from shared.http.bodies import MAX_BODY_BYTES
from shared.messaging.topology import PERMISSIONS
from shared.security.tokens import Identity, Role, Tokens
from shared.security.weak_secrets import weakness
from shared.settings import Settings
from tests.rigs.system import ROOT

COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
OURS = ("orders", "sync-worker", "sync-api", "notifier")
# The first two end by themselves or are run by hand; the image of the collector has no program for a health check.
WITHOUT_HEALTH = {"migrate", "ticketrail", "collector"}
DOCKERFILE = (ROOT / "deploy/image/Dockerfile").read_text()
EXAMPLE = (ROOT / "deploy/compose.env.example").read_text()
SECRETS = re.findall(r"^(TICKETRAIL_\w+)=$", EXAMPLE, re.MULTILINE)


@pytest.mark.parametrize("name", list(SERVICES))
def test_every_container_has_limits_and_minimal_privileges(name: str) -> None:
    service = SERVICES[name]
    assert {"cpus", "mem_limit", "pids_limit"} <= set(service)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("privileged") is None
    assert service["logging"]["options"]["max-size"]
    assert ("healthcheck" in service) == (name not in WITHOUT_HEALTH)


@pytest.mark.parametrize("name", OURS)
def test_a_service_waits_for_the_migration_and_runs_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert service["user"] == "10001:10001"
    assert service["init"] is True
    assert service["command"] == [name]
    port = {"orders": "orders", "sync-worker": "worker", "sync-api": "sync", "notifier": "notifier"}[name]
    assert service["healthcheck"]["test"][-1] == str(Settings.model_fields[f"{port}_port"].default)
    assert "ports" not in service, "the service has a public port, but clients connect through the gateway"


def test_only_the_gateway_has_a_public_port_and_other_ports_are_local() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert name == "gateway" or port.startswith("127.0.0.1:"), name
    assert "inside" not in SERVICES["gateway"]["networks"]


def _settings_of(service: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in service.get("environment", {}).items() if name.startswith("TICKETRAIL_")}


def test_every_setting_in_the_file_exists() -> None:
    known = {f"TICKETRAIL_{name.upper()}" for name in Settings.model_fields}
    for name in (*OURS, "migrate", "ticketrail"):
        assert set(_settings_of(SERVICES[name])) <= known, name


def test_the_file_contains_no_secret_and_no_default_for_one() -> None:
    given = re.findall(r"\$\{(TICKETRAIL_\w*(?:PASSWORD|SECRET|TOKEN))([^}]*)\}", COMPOSE)
    assert {name for name, _ in given} == set(SECRETS)
    for name in SECRETS:
        first = next(rest for found, rest in given if found == name)
        assert first.startswith(":?"), f"{name} may be missing without an error"
        assert not any(rest.startswith(":-") for found, rest in given if found == name)
    for url in re.findall(r"\w+://[^/\s:]*:([^@\s]+)@", COMPOSE):
        assert url.startswith("${"), url


def test_a_service_has_only_the_password_of_its_own_database_role() -> None:
    roles = {
        name: {
            url
            for url, value in _settings_of(SERVICES[name]).items()
            if url.startswith("TICKETRAIL_DATABASE_") and value
        }
        for name in OURS
    }
    assert roles == {
        "orders": {"TICKETRAIL_DATABASE_API_URL"},
        "sync-worker": {"TICKETRAIL_DATABASE_WRITER_URL"},
        "sync-api": {"TICKETRAIL_DATABASE_API_URL", "TICKETRAIL_DATABASE_OPS_URL"},
        "notifier": {"TICKETRAIL_DATABASE_API_URL"},
    }


def test_each_service_has_users_of_its_own_and_migrate_alone_configures() -> None:
    def user(name: str, setting: str) -> str | None:
        found = re.match(r"\w+://([^:/]+):", str(_settings_of(SERVICES[name]).get(setting, "")))
        return found[1] if found else None

    brokers = {name: user(name, "TICKETRAIL_RABBITMQ_URL") for name in OURS}
    assert brokers == {
        "orders": "ticketrail_orders",
        "sync-worker": "ticketrail_worker",
        "sync-api": "ticketrail_sync",
        "notifier": "ticketrail_notifier",
    }
    assert {name: user(name, "TICKETRAIL_REDIS_URL") for name in OURS} == {
        "orders": "orders",
        "sync-worker": "worker",
        "sync-api": "sync",
        "notifier": None,
    }
    made = json.loads(_settings_of(SERVICES["migrate"])["TICKETRAIL_RABBITMQ_SERVICE_URLS"])
    assert {name: url.split("://")[1].split(":")[0] for name, url in made.items()} == brokers
    for name in OURS:
        settings = _settings_of(SERVICES[name])
        assert not settings["TICKETRAIL_RABBITMQ_MANAGEMENT_URL"]
        assert "TICKETRAIL_RABBITMQ_PASSWORD}" not in str(settings)
    assert set(PERMISSIONS) == set(OURS)
    assert {permissions.configure for permissions in PERMISSIONS.values()} == {"^$"}


def test_the_users_of_the_mirror_may_run_every_command_of_the_mirror_and_no_other() -> None:
    """A command that is missing here is refused only when it is first used, such as after a restart of the mirror."""
    folder = ROOT / "shared/mirror"
    scripts = "".join(path.read_text() for path in folder.rglob("*.lua"))
    modules = "".join(path.read_text() for path in folder.rglob("*.py"))
    in_scripts = re.findall(r"redis\.p?call\('(\w+)'", scripts)
    assert len(in_scripts) == scripts.count("redis."), "a script calls a command in a way that this test cannot read"
    by_modules = re.findall(r'(?:\.call|_ask\(connection,|return) ?\(?\s*"([A-Z]+)"', modules)
    by_redis_py = {"select"}  # for a database other than 0
    allowed = SERVICES["valkey"]["environment"]["MIRROR_COMMANDS"].split()
    assert {command.removeprefix("+").partition("|")[0] for command in allowed} == {
        *map(str.lower, in_scripts + by_modules),
        *by_redis_py,
    }


def _given(text: str, secrets: dict[str, str]) -> str:
    """Returns `text` as compose fills it in."""
    return re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda found: secrets.get(found[1], found[2] or ""), text)


@pytest.mark.parametrize("name", [*OURS, "migrate", "ticketrail"])
def test_production_accepts_the_settings_of_every_container(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _make(tmp_path / "env")
    monkeypatch.chdir(tmp_path)
    for setting in [one for one in os.environ if one.startswith("TICKETRAIL_")]:
        monkeypatch.delenv(setting)
    of_image = dict(re.findall(r"(TICKETRAIL_\w+)=(\S+)", DOCKERFILE))
    assert of_image["TICKETRAIL_ENVIRONMENT"] == "production"
    for setting, value in {**of_image, **_settings_of(SERVICES[name])}.items():
        monkeypatch.setenv(setting, _given(str(value), made))
    settings = Settings.load()
    assert settings.environment == "production"
    assert settings.jwt_algorithm == "EdDSA"
    assert bool(settings.redis_url) is (name not in ("notifier", "migrate"))


def test_every_image_of_others_has_a_full_version() -> None:
    images = {
        name: service["image"] for name, service in SERVICES.items() if "TICKETRAIL_IMAGE" not in service["image"]
    }
    images["python"] = next(line for line in DOCKERFILE.splitlines() if line.startswith("FROM python:"))
    for name, image in images.items():
        assert re.search(r":v?\d+\.\d+", image), f"{name} takes whatever is the newest {image}"


def test_persistent_data_is_on_volumes() -> None:
    declared = yaml.safe_load(COMPOSE)["volumes"]
    mounted = {
        volume.split(":")[0]: name for name, service in SERVICES.items() for volume in service.get("volumes", [])
    }
    assert set(declared) == {name for name in mounted if not name.startswith(".")}
    assert "journal:/var/lib/ticketrail/journal" in SERVICES["orders"]["volumes"]
    for name in OURS:
        assert "traces:/var/lib/ticketrail/traces" in SERVICES[name]["volumes"]
    for volume in mounted:
        if volume.startswith("./"):
            assert (ROOT / volume).exists(), volume


def test_replicas_lease_their_numbers() -> None:
    for name in OURS:
        assert SERVICES[name]["environment"]["TICKETRAIL_INSTANCE"] == "auto"
        assert "container_name" not in SERVICES[name]


# -- the gateway
# --------------------------------------------------------------------------------------------------------

GATEWAY = (ROOT / "deploy/gateway/nginx.conf").read_text()


def _locations() -> Iterator[tuple[str, str]]:
    yield from re.findall(r"^        location (\S+(?: \S+)?) \{(.*?)^        \}", GATEWAY, re.MULTILINE | re.DOTALL)


def test_the_gateway_accepts_bodies_up_to_the_services_limit() -> None:
    assert f"client_max_body_size {MAX_BODY_BYTES};" in GATEWAY
    assert f'"max_bytes":{MAX_BODY_BYTES}' in GATEWAY


def test_the_gateway_overwrites_the_client_address_that_a_client_sends() -> None:
    assert "proxy_set_header X-Forwarded-For $remote_addr;" in GATEWAY
    assert "$proxy_add_x_forwarded_for" not in GATEWAY
    # In nginx a proxy_set_header in a location drops all inherited ones.
    assert not [name for name, body in _locations() if "proxy_set_header" in body]


def test_the_gateway_never_repeats_a_change_and_reports_failures_in_every_location() -> None:
    locations = dict(_locations())
    for name, body in locations.items():
        # In nginx an error_page in a location drops all inherited ones.
        assert "error_page" not in body, name
        if name.startswith("/api/"):
            assert "if ($repeatable = 0) {\n                return 418;" in body, name
        if name.endswith("_change"):
            assert "proxy_next_upstream off;" in body, name
    assert "non_idempotent" not in GATEWAY


def test_the_gateway_limits_each_address_and_adds_the_security_headers_to_its_own_answers() -> None:
    for rule in ("limit_conn connections", "limit_req zone=requests", "limit_conn_status 429", "limit_req_status 429"):
        assert f"    {rule}" in GATEWAY
    for name, value in [*response_headers.HEADERS, (b"content-security-policy", response_headers.CSP)]:
        header = re.search(rf"add_header {name.decode()} \$(\w+) always;", GATEWAY, re.IGNORECASE)
        assert header, name
        rule_of = re.search(rf"map \$own \${header[1]} \{{ default \"\"; 1 (.+); \}}", GATEWAY)
        assert rule_of, name
        assert rule_of[1].strip('"') == value.decode()
    # In nginx an add_header in a location drops all inherited ones.
    assert not [name for name, body in _locations() if "add_header" in body]


def test_every_route_of_the_sync_api_is_proxied_to_it() -> None:
    locations = dict(_locations())
    for path in {path for route in API.handlers for path in route.paths}:
        fits = max((name for name in locations if path.startswith(name)), key=len)
        assert "$sync_api" in locations[fits], path


def test_event_streams_are_not_buffered() -> None:
    keep_alive_seconds = Settings.model_fields["push_keepalive_seconds"].default
    for name, body in _locations():
        if "$notifier" in body and not name.startswith("@"):
            assert "proxy_buffering off;" in body, name
            found = re.search(r"proxy_read_timeout (\d+)s;", body)
            assert found, name
            assert int(found[1]) > 3 * keep_alive_seconds


def test_the_document_of_every_service_is_reachable_through_the_gateway() -> None:
    choice = re.search(r"map \$uri \$described \{\n\s+default \$orders;(.*?)\n    \}", GATEWAY, re.DOTALL)
    of_others = re.search(r"location ~ (\S+) \{\n\s+proxy_pass \$described/api-docs\$document;", GATEWAY)
    assert choice
    assert of_others
    rules = re.findall(r"~(\S+) (\$\w+);", choice[1])
    for path in ("/api-docs", "/api-docs/openapi.json", "/api-docs/files/start.js"):
        assert not [service for rule, service in rules if re.search(rule, path)]
    for name, service in (("sync", "$sync_api"), ("notifier", "$notifier")):
        for document in ("", "/", "/openapi.json"):
            path = f"/api-docs/{name}{document}"
            assert next(found for rule, found in rules if re.search(rule, path)) == service
            matched = re.match(of_others[1].replace("?<", "?P<"), path)
            assert matched
            assert (matched["document"] or "") == document
    assert dict(_locations())["/api-docs"].strip() == "proxy_pass $described;"


def test_metrics_are_not_reachable_through_the_gateway() -> None:
    assert not [name for name, _ in _locations() if "metrics" in name]
    assert dict(_locations())["/"].strip() == "return 404;"


# -- secrets
# ------------------------------------------------------------------------------------------------------------


def _make(file: Path) -> dict[str, str]:
    subprocess.run(["sh", str(ROOT / "deploy/secrets.sh"), str(file)], check=True, capture_output=True)
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_generated_secrets_are_strong_different_and_readable_only_by_their_owner(tmp_path: Path) -> None:
    made = _make(tmp_path / "env")
    assert set(made) == set(SECRETS)
    keys = tmp_path / ".secrets"
    assert keys.stat().st_mode & 0o777 == 0o700
    assert len(set(made.values())) == len(made)
    assert not [name for name, value in made.items() if weakness(value)]
    assert all(re.fullmatch(r"[\w-]{43}", value) for value in made.values()), (
        "the secret has a character that is not allowed in URLs"
    )
    assert (tmp_path / "env").stat().st_mode & 0o777 == 0o600


def test_secrets_that_are_set_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(
        "# mine\nTICKETRAIL_PORT=9000\nTICKETRAIL_REDIS_SYNC_PASSWORD=mine\nTICKETRAIL_DATABASE_API_PASSWORD=\n"
    )
    first = _make(file)
    pair = {path.name: path.read_text() for path in (tmp_path / ".secrets").iterdir()}
    assert first["TICKETRAIL_REDIS_SYNC_PASSWORD"] == "mine"
    assert first["TICKETRAIL_PORT"] == "9000"
    assert len(first["TICKETRAIL_DATABASE_API_PASSWORD"]) == 43
    assert _make(file) == first
    assert {path.name: path.read_text() for path in (tmp_path / ".secrets").iterdir()} == pair


def test_services_verify_with_the_generated_key_pair_and_only_orders_signs(tmp_path: Path) -> None:
    _make(tmp_path / "env")
    holders: dict[str, set[str]] = {name: set(SERVICES[name].get("secrets", [])) for name in (*OURS, "ticketrail")}
    assert holders == {
        "orders": {"jwt_private_key", "jwt_public_key"},
        "sync-worker": set(),
        "sync-api": {"jwt_public_key"},
        "notifier": {"jwt_public_key"},
        "ticketrail": {"jwt_private_key", "jwt_public_key"},
    }
    declared = yaml.safe_load(COMPOSE)["secrets"]

    def tokens(name: str) -> Tokens:
        given = {
            setting.removeprefix("TICKETRAIL_").lower(): str(tmp_path / declared[Path(value).name]["file"])
            for setting, value in _settings_of(SERVICES[name]).items()
            if value.startswith("/run/secrets/") and Path(value).name in holders[name]
        }
        return Tokens.of(Settings(_env_file=None, **given))  # type: ignore[arg-type]

    token = tokens("orders").issue(Identity("u1", Role.STAFF, "7f0c3b52-6f1e-5c0a-9b1d-2a6d1f0e4c11"))
    assert jwt.get_unverified_header(token)["alg"] == "EdDSA"
    for name in ("sync-api", "notifier"):
        assert tokens(name).verify(f"Bearer {token}").user_id == "u1"
        assert not tokens(name).signs


def test_the_image_defaults_to_production() -> None:
    assert "TICKETRAIL_ENVIRONMENT=production" in (ROOT / "deploy/image/Dockerfile").read_text()


# -- observation
# --------------------------------------------------------------------------------------------------------

OBSERVE = ROOT / "deploy/observe"


def test_prometheus_scrapes_every_replica_of_every_service_on_its_port() -> None:
    jobs = yaml.safe_load((OBSERVE / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    found = {job["job_name"]: job["dns_sd_configs"][0] for job in jobs if "dns_sd_configs" in job}
    for name in OURS:
        assert found[name]["names"] == [name]
        assert found[name]["type"] == "A"
        assert str(found[name]["port"]) == SERVICES[name]["healthcheck"]["test"][-1]


def test_the_collector_keeps_failed_and_slow_traces() -> None:
    collector = yaml.safe_load((OBSERVE / "collector.yaml").read_text())
    policies = {policy["type"]: policy for policy in collector["processors"]["tail_sampling"]["policies"]}
    assert policies["status_code"]["status_code"]["status_codes"] == ["ERROR"]
    assert policies["latency"]["latency"]["threshold_ms"] == Settings.model_fields["trace_slow_ms"].default
    assert 0 < policies["probabilistic"]["probabilistic"]["sampling_percentage"] < 100
    for pipeline in collector["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= set(collector[part]), part
        assert pipeline["processors"][0] == "memory_limiter"


def _expressions() -> list[str]:
    """The queries of the alerts and of the dashboards."""
    groups = yaml.safe_load((OBSERVE / "prometheus/alerts.yml").read_text())["groups"]
    found = [rule["expr"] for group in groups for rule in group["rules"]]
    for dashboard in (OBSERVE / "grafana/dashboards").glob("*.json"):
        panels = json.loads(dashboard.read_text())["panels"]
        found += [target["expr"] for panel in panels for target in panel["targets"]]
    return found


def test_alerts_and_dashboards_name_only_metrics_and_labels_that_exist() -> None:
    # An integration test compares this table with the metrics that the services export.
    rows = re.findall(r"^\| (`ticketrail.*?) \| (.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    labels: dict[str, set[str]] = {}
    for names, told in rows:
        for name in re.findall(r"`(\w+)`", names):
            labels[name] = set(re.findall(r"`(\w+)`", told)) | {"le", "job", "instance"}
    expressions = _expressions()
    assert len(expressions) > 20
    for expression in expressions:
        named = re.findall(r"ticketrail_\w+", expression)
        assert named, expression
        for name in named:
            base = name if name in labels else re.sub(r"_(bucket|sum|count)$", "", name)
            assert base in labels, f"{name} does not exist: {expression}"
            used = re.findall(r"by \(([^)]*)\)", expression) + re.findall(r"(\w+)=~?\"", expression)
            assert {label.strip() for part in used for label in part.split(",")} <= labels[base], expression


def test_grafana_data_sources_have_the_ids_that_dashboards_use() -> None:
    sources = yaml.safe_load((OBSERVE / "grafana/provisioning/datasources/datasources.yaml").read_text())
    assert [source["uid"] for source in sources["datasources"]] == ["prometheus", "jaeger"]


# -- the image
# ----------------------------------------------------------------------------------------------------------


def test_the_image_runs_every_command_and_loads_no_external_syntax() -> None:
    dockerfile = (ROOT / "deploy/image/Dockerfile").read_text()
    entry = (ROOT / "deploy/image/entry.sh").read_text()
    assert "# syntax" not in dockerfile
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
    assert "--require-hashes" in dockerfile
    for name in (*OURS, "migrate", "ticketrail"):
        assert re.search(rf"^{name}\) exec ", entry, re.MULTILINE), name
    unknown = subprocess.run(["sh", str(ROOT / "deploy/image/entry.sh"), "toaster"], capture_output=True, text=True)
    assert unknown.returncode == 64
    assert "toaster" in unknown.stderr


def test_the_health_check_fails_for_a_service_that_does_not_answer() -> None:
    health = ["python3", str(ROOT / "deploy/image/health.py"), "9"]
    checked = subprocess.run(health, capture_output=True, text=True)
    assert checked.returncode == 1
    assert "Error" in checked.stdout
