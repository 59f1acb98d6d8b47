"""Clients generated from our OpenAPI documents place an order, read it back, and see a refusal as a typed error. The
programs are the examples of the document, as a reader would copy them."""

import asyncio
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.rigs.restaurant import RestaurantRig, expect, register_restaurant
from tests.rigs.system import ROOT, System

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENT = ROOT / "docs/how-to/generate-a-client.md"
CLIENTS = ROOT / ".local/clients"
TOOLS = CLIENTS / "tools/bin"
# The messages of npm and pip when no registry answers, or has no package for this machine.
_NO_REGISTRY = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH"
    r"|No matching distribution found"
)


def example(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    return str(found)


async def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Runs a program, which must succeed; returns its output. It finds the generators' Python and Node.js first."""
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", **variables}
    ended = await asyncio.to_thread(
        subprocess.run, command, cwd=cwd, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


async def generate(target: str) -> None:
    """Runs a target of `make clients`. Skips the test if the generator is not installed and its registry is away."""
    try:
        await run("make", "-s", target, cwd=ROOT)
    except AssertionError as error:
        if _NO_REGISTRY.search(str(error)):
            pytest.skip(f"the registry has no package, or cannot be reached: {error}")
        raise


@pytest.fixture
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system, tax_basis_points=0)


async def check_orders(restaurant: RestaurantRig, program: tuple[str, ...], cwd: Path, **variables: str) -> None:
    """Runs a program that places an order, reads it back and is refused another one. It has an API key."""
    dish = (await restaurant.dish(price=1_250))["id"]
    key = await restaurant.api_key("orders:write", "orders:read")
    url = restaurant.system.urls["orders"]
    output = await run(*program, cwd=cwd, ORDERS_URL=url, TOKEN=key, DISH=dish, **variables)
    async with restaurant.client() as staff:
        (order,) = expect(await staff.get("/api/orders"))
    assert output.splitlines() == [f"order {order['id']} 2500 pending", "refused invalid_input items[0].quantity"]
    assert [(item["menu_item_id"], item["quantity"]) for item in order["items"]] == [(dish, 2)]


async def test_generated_python_client_places_an_order(restaurant: RestaurantRig, tmp_path: Path) -> None:
    await generate("client-python")
    (tmp_path / "place.py").write_text(example("python"))
    await check_orders(restaurant, ("python", "place.py"), tmp_path, PYTHONPATH=str(CLIENTS / "python"))


async def test_generated_typescript_client_places_an_order(restaurant: RestaurantRig, tmp_path: Path) -> None:
    await generate("client-typescript")
    (tmp_path / "package.json").write_text((ROOT / "deploy/clients/package.json").read_text())
    (tmp_path / "node_modules").symlink_to(CLIENTS / "typescript/node_modules")
    (tmp_path / "orders.d.ts").write_text((CLIENTS / "typescript/orders.d.ts").read_text())
    code = example("typescript")
    check = ("tsc", "--noEmit", "--strict", "--module", "nodenext", "--allowImportingTsExtensions", "place.ts")
    (tmp_path / "place.ts").write_text(code)
    await run("npx", "--no-install", *check, cwd=tmp_path)
    await check_orders(restaurant, ("node", "place.ts"), tmp_path)
    # The types refuse what the service refuses.
    (tmp_path / "place.ts").write_text(code.replace("menu_item_id: DISH", "menu_item: DISH"))
    with pytest.raises(AssertionError, match="menu_item"):
        await run("npx", "--no-install", *check, cwd=tmp_path)
