"""A RabbitMQ home of links: what it holds, and when there is none. That nodes run from one: faults/test_cluster.py."""

from pathlib import Path

import pytest

from deploy.local.rabbitmq_home import make_home

APPLICATIONS = {
    "rabbit-4.0.5": "kernel, stdlib, rabbit_common",
    "rabbit_common-4.0.5": "kernel,stdlib,\n   jsx",
    "jsx-3.1.0": "kernel",
    "rabbitmq_management-4.0.5": "kernel,rabbit,cowboy",
    "cowboy-2.12.0": "crypto",
    "rabbitmq_shovel-4.0.5": "rabbit,amqp10_client",
    "amqp10_client-4.0.5": "kernel",
}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Of an installation, by the link that PATH has."""
    installed = tmp_path / "installed"
    for name, needed in APPLICATIONS.items():
        ebin = installed / "plugins" / name / "ebin"
        ebin.mkdir(parents=True)
        app = name.rpartition("-")[0]
        (ebin / f"{app}.app").write_text(f"{{application, {app}, [{{vsn, []}}, {{applications, [{needed}]}}]}}.")
    (installed / "plugins" / "README").write_text("not a plugin")
    for folder, script in (("sbin", "rabbitmq-server"), ("escript", "rabbitmqctl")):
        (installed / folder).mkdir()
        (installed / folder / script).touch()
    link = tmp_path / "rabbitmq-server"
    link.symlink_to(installed / "sbin" / "rabbitmq-server")
    return link


def kept(home: Path) -> set[str]:
    return {folder.name for folder in (home / "plugins").iterdir() if (folder / "ebin").is_dir()}


def test_it_holds_the_scripts_and_the_wanted_plugins_with_all_that_they_need(program: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert make_home(program, home, ["rabbitmq_management"]) == home / "sbin"
    assert (home / "sbin" / "rabbitmq-server").is_file() and (home / "escript" / "rabbitmqctl").is_file()
    assert kept(home) == set(APPLICATIONS) - {"rabbitmq_shovel-4.0.5", "amqp10_client-4.0.5"}


def test_it_is_made_anew_for_another_version_that_was_installed_since(program: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    make_home(program, home, [])
    plugins = program.resolve().parent.parent / "plugins"
    (plugins / "rabbit-4.0.5").rename(plugins / "rabbit-4.1.0")
    make_home(program, home, [])
    assert kept(home) == {"rabbit-4.1.0", "rabbit_common-4.0.5", "jsx-3.1.0"}


def test_where_something_does_not_lie_as_expected_there_is_none(program: Path, tmp_path: Path) -> None:
    assert make_home(program, tmp_path / "home", ["rabbitmq_prometheus"]) is None
    assert make_home(program, tmp_path / "my home", []) is None
    assert make_home(tmp_path / "elsewhere" / "sbin" / "rabbitmq-server", tmp_path / "home", []) is None
    (program.resolve().parent.parent / "plugins" / "jsx-3.2.0-rc.1").mkdir()
    assert make_home(program, tmp_path / "home", []) is None
    assert not (tmp_path / "home").exists()
