"""A RabbitMQ home of symbolic links: its content, and when none is made. faults/test_cluster.py runs nodes from one."""

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
    """The link in PATH to the `rabbitmq-server` of a made-up installation."""
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


def plugins_in(home: Path) -> set[str]:
    return {folder.name for folder in (home / "plugins").iterdir() if (folder / "ebin").is_dir()}


def test_the_home_has_the_scripts_and_the_requested_plugins_with_their_dependencies(
    program: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert make_home(program, home, ["rabbitmq_management"]) == home / "sbin"
    assert (home / "sbin" / "rabbitmq-server").is_file() and (home / "escript" / "rabbitmqctl").is_file()
    assert plugins_in(home) == set(APPLICATIONS) - {"rabbitmq_shovel-4.0.5", "amqp10_client-4.0.5"}


def test_the_home_is_made_again_after_another_version_was_installed(program: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    make_home(program, home, [])
    plugins = program.resolve().parent.parent / "plugins"
    (plugins / "rabbit-4.0.5").rename(plugins / "rabbit-4.1.0")
    make_home(program, home, [])
    assert plugins_in(home) == {"rabbit-4.1.0", "rabbit_common-4.0.5", "jsx-3.1.0"}


def test_an_installation_with_an_unexpected_layout_gets_no_home(program: Path, tmp_path: Path) -> None:
    assert make_home(program, tmp_path / "home", ["rabbitmq_prometheus"]) is None
    assert make_home(program, tmp_path / "my home", []) is None
    assert make_home(tmp_path / "elsewhere" / "sbin" / "rabbitmq-server", tmp_path / "home", []) is None
    (program.resolve().parent.parent / "plugins" / "jsx-3.2.0-rc.1").mkdir()
    assert make_home(program, tmp_path / "home", []) is None
    assert not (tmp_path / "home").exists()
