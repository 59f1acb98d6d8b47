"""`ticketrail dlq` for operators and scripts: its output, its questions and its exit codes."""

import base64
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from services.sync.dead_letters.editing import event_in
from shared.entities.contract import Lane, encode
from shared.messaging import topology
from tests.rigs.builders import change, message, order
from tests.rigs.dead_letters import DEAD_LETTERS, OperatorRig, details_of
from tests.rigs.restaurant import expect
from tests.rigs.system import eventually

UNKNOWN = "7d0c5f1e-4c11-4c0a-9b1d-7f0c3b526f1e"
NOT_UTF8 = b"\x00\xff\xfe \x80 not \x1b[31mUTF-8 "


async def run_ok(ops_rig: OperatorRig, *arguments: str, answer: str = "") -> str:
    """Runs a command that must exit with 0; returns its stdout."""
    code, out, err = await ops_rig.dlq(*arguments, answer=answer)
    assert code == 0, f"{arguments}: {code}\n{out}\n{err}"
    return out


async def printed_json(ops_rig: OperatorRig, *arguments: str, code: int = 0) -> Any:
    """Runs a command with --json; returns the JSON that is its whole stdout."""
    ended, out, err = await ops_rig.dlq(*arguments, "--json")
    assert ended == code, f"{arguments}: {ended}\n{out}\n{err}"
    return json.loads(out)


async def contract_breaker(ops_rig: OperatorRig, marker: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes a dead letter of a table without seats; returns (the dead letter, its event)."""
    body = message(encode(change(ops_rig.table(label=marker))).replace(b'"seats":4', b'"seats":0'))
    await ops_rig.send_to_dead_queue(body, reason="contract_broken")
    [dead_letter] = await ops_rig.dead_letters(1, text=marker)
    event = event_in(body)
    assert event is not None
    return dead_letter, event


def one_line(err: str) -> str:
    [line] = err.strip().splitlines()
    return line


# -- reading -------------------------------------------------------------------------------------------------------


async def test_list_and_groups_print_what_the_api_returns(ops_rig: OperatorRig, marker: str) -> None:
    await ops_rig.send_to_dead_queue(change(ops_rig.table(label=marker)), place=marker)
    # Text from outside is printed literally: it is not read as markup, emoji codes or escape sequences.
    await ops_rig.send_to_dead_queue(
        change(ops_rig.table(label=marker)), place=marker, error="KeyError: [/red] [bold] :boom: \x1b[2J"
    )
    dead_letters = await ops_rig.dead_letters(2, text=marker)
    assert await printed_json(ops_rig, "list", "--text", marker) == dead_letters[::-1]
    assert await printed_json(ops_rig, "list", "--text", marker, "--limit", "1") == dead_letters[1:]
    text = await run_ok(ops_rig, "list", "--text", marker)
    assert [line.split()[0] for line in text.splitlines()[1:3]] == [
        dead_letter["id"] for dead_letter in dead_letters[::-1]
    ]
    assert "KeyError: [/red] [bold] :boom: �[2J" in text
    assert text.splitlines()[-1] == "2 dead letters"
    async with ops_rig.client() as client:
        expected = expect(await client.get(f"{DEAD_LETTERS}/groups", params={"text": marker}))
    groups = await printed_json(ops_rig, "groups", "--text", marker)
    assert groups == expected
    text = await run_ok(ops_rig, "groups", "--text", marker)
    for group in groups:
        assert group["fingerprint"] in text
    assert text.splitlines()[-1] == ("1 group" if len(groups) == 1 else f"{len(groups)} groups")
    assert (await run_ok(ops_rig, "groups", "--text", f"not {marker}")).splitlines()[-1] == "0 groups"
    assert marker in text


@pytest.mark.parametrize("narrow", ["queue", "fingerprint", "reason", "entity", "restaurant", "status", "since"])
async def test_each_option_filters_the_list(ops_rig: OperatorRig, marker: str, narrow: str) -> None:
    old = change(order(restaurant_id=str(uuid4()), items=1, notes=marker))
    await ops_rig.send_to_dead_queue(old, lane=Lane.CRITICAL, reason="another", at="2026-03-14T12:00:00+00:00")
    [other] = await ops_rig.dead_letters(1, text=marker)
    async with ops_rig.client() as client:
        expect(await client.post(f"{DEAD_LETTERS}/{other['id']}/discard", json={"revision": 1, "why": "a test"}))
    await ops_rig.send_to_dead_queue(change(ops_rig.table(label=marker)))
    expected = (await ops_rig.dead_letters(2, text=marker))[1]
    value = {
        "queue": topology.dead_queue(Lane.NORMAL),
        "fingerprint": expected["fingerprint"],
        "reason": "transient",
        "entity": "table",
        "restaurant": ops_rig.restaurant_id,
        "status": "open",
        "since": "24h",
    }[narrow]
    assert await printed_json(ops_rig, "list", "--text", marker, f"--{narrow}", value) == [expected]


async def test_show_prints_a_dead_letter_with_its_event_and_its_actions(ops_rig: OperatorRig, marker: str) -> None:
    dead_letter, event = await contract_breaker(ops_rig, marker)
    async with ops_rig.client() as client:
        body = {"revision": 1, "why": "looked at twice"}
        expect(await client.post(f"{DEAD_LETTERS}/{dead_letter['id']}/discard", json=body))
        expected = await details_of(client, dead_letter)
    shown = await printed_json(ops_rig, "show", dead_letter["id"])
    assert expected == shown
    assert shown["event"] == event
    text = await run_ok(ops_rig, "show", dead_letter["id"])
    for part in (
        dead_letter["id"],
        dead_letter["fingerprint"],
        dead_letter["trace_id"] or "table",
        "looked at twice",
        "discard by nadia",
    ):
        assert part in text
    assert json.loads(text[text.index("\n{") :]) == event


async def test_show_prints_a_body_that_is_not_an_event_as_text(ops_rig: OperatorRig, marker: str) -> None:
    await ops_rig.send_to_dead_queue(NOT_UTF8, reason=marker)
    [dead_letter] = await ops_rig.dead_letters(1, reason=marker)
    assert (await run_ok(ops_rig, "show", dead_letter["id"])).endswith("��� � not �[31mUTF-8 \n")
    assert (await printed_json(ops_rig, "show", dead_letter["id"]))["body"] == NOT_UTF8.decode(errors="replace")


async def test_export_writes_each_dead_letter_in_full_on_one_line(
    ops_rig: OperatorRig, marker: str, tmp_path: Path
) -> None:
    bodies = [message(change(ops_rig.table(label=marker))), NOT_UTF8 + marker.encode()]
    await ops_rig.send_to_dead_queue(*bodies)
    dead_letters = await ops_rig.dead_letters(2, text=marker)
    lines = [json.loads(line) for line in (await run_ok(ops_rig, "export", "--text", marker)).splitlines()]
    assert [line["id"] for line in lines] == [dead_letter["id"] for dead_letter in dead_letters[::-1]]
    assert [base64.b64decode(line["body"]) for line in lines] == bodies[::-1]
    for line, dead_letter in zip(lines, dead_letters[::-1], strict=True):
        assert {name: line[name] for name in dead_letter} == dead_letter
        assert line["attempts"][0]["reason"] == "transient"
        assert line["headers"]["ticketrail-reason"] == "transient"
    path = tmp_path / "letters.jsonl"
    assert await run_ok(ops_rig, "export", "--text", marker, "--out", str(path)) == f"2 dead letters in {path}\n"
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert not path.with_name(f"{path.name}.part").exists()
    (link := tmp_path / "link.jsonl").symlink_to(path)
    path.write_text("the export before")
    await run_ok(ops_rig, "export", "--text", marker, "--out", str(link))
    assert (link.is_symlink(), [json.loads(line) for line in path.read_text().splitlines()]) == (True, lines)
    code, out, err = await ops_rig.dlq("export", "--out", str(tmp_path / "nowhere" / "letters.jsonl"))
    assert (code, out, "No such file or directory" in one_line(err)) == (1, "", True)


# -- replaying -------------------------------------------------------------------------------------------------------


async def test_replay_shows_its_plan_and_asks_before_it_sends_anything(ops_rig: OperatorRig, marker: str) -> None:
    [dead_letter] = await ops_rig.make_dead_letters(marker)
    code, out, err = await ops_rig.dlq("replay", dead_letter["id"], answer="n\n")
    assert (code, err.strip()) == (1, "Aborted!")
    assert out.splitlines()[:2] == ["1 open dead letter", f"       1 to {topology.lane_queue(Lane.NORMAL)}"]
    assert "Replay them?" in out
    assert await ops_rig.dead_letters(1, text=marker) == [dead_letter]
    async with ops_rig.client() as client:
        assert (await details_of(client, dead_letter))["replays"] == [], "a job was created"
    # Without --yes the command asks a script too, but on stderr, so that stdout stays JSON.
    code, out, err = await ops_rig.dlq_process("replay", dead_letter["id"], "--why", "fixed", "--json", answer="y\n")
    assert code == 0, err
    assert f"1 to {topology.lane_queue(Lane.NORMAL)}" in err
    assert "Replay them?" in err
    replayed = json.loads(out)
    assert replayed["plan"]["total"] == 1
    assert (replayed["job"]["state"], replayed["job"]["outcomes"]) == ("done", {"resolved": 1})
    assert (replayed["job"]["actor"], replayed["job"]["why"]) == ("cli/nadia", "fixed")
    assert [(one["dead_letter_id"], one["outcome"]) for one in replayed["items"]] == [(dead_letter["id"], "resolved")]
    assert await ops_rig.written(dead_letter["change_id"]) == 1


async def test_replay_of_a_filter_prints_each_outcome_and_exits_with_1_when_one_dies_again(
    ops_rig: OperatorRig, marker: str
) -> None:
    [good] = await ops_rig.make_dead_letters(marker)
    await ops_rig.send_to_dead_queue(
        message(encode(change(ops_rig.table(label=marker))).replace(b'"seats":4', b'"seats":0'))
    )
    bad = (await ops_rig.dead_letters(2, text=marker))[1]
    code, out, err = await ops_rig.dlq("replay", "--text", marker, "--dry-run")
    assert (code, err) == (1, ""), "the dry run asked a question, or did not report the one failure"
    assert f"{good['id']}  would_write  version 1" in out
    assert f"{bad['id']}  would_fail  contract_broken" in out
    assert "done, 1 would_fail, 1 would_write" in out
    assert await ops_rig.dead_letters(2, text=marker) == [good, bad]
    code, out, err = await ops_rig.dlq("replay", "--text", marker, "--yes", "--no-canary")
    assert (code, err) == (1, "")
    assert out.startswith("2 open dead letters\n")
    assert f"{good['id']}  resolved" in out
    assert f"{bad['id']}  failed  contract_broken" in out
    assert ": done, 1 failed, 1 resolved" in out
    [left] = await ops_rig.dead_letters(1, text=marker, status="open")
    assert (left["id"], left["deaths"]) == (bad["id"], 2)


async def test_dry_run_of_good_dead_letters_exits_with_0_and_changes_nothing(ops_rig: OperatorRig, marker: str) -> None:
    dead_letters = await ops_rig.make_dead_letters(marker, 2)
    planned = await printed_json(ops_rig, "replay", *(dead_letter["id"] for dead_letter in dead_letters), "--dry-run")
    assert (planned["job"]["kind"], planned["job"]["outcomes"]) == ("dry_run", {"would_write": 2})
    assert await ops_rig.dead_letters(2, text=marker) == dead_letters
    assert await ops_rig.written(*(dead_letter["change_id"] for dead_letter in dead_letters)) == 0


async def test_detached_replay_can_be_cancelled(ops_rig: OperatorRig, marker: str) -> None:
    await ops_rig.make_dead_letters(marker, 3)
    slowly = ("--rate", "0.1", "--no-canary", "--yes", "--detach")
    job = (await printed_json(ops_rig, "replay", "--text", marker, *slowly))["job"]
    assert job["state"] in ("waiting", "running")
    assert (await printed_json(ops_rig, "cancel", job["id"]))["cancel_requested"] is True
    assert (await ops_rig.ended(job))["state"] == "cancelled"
    code, out, err = await ops_rig.dlq("cancel", job["id"])
    assert (code, out, one_line(err)) == (1, "", "Error: this job is cancelled")


# -- edit and discard --------------------------------------------------------------------------------------------------


async def test_edit_takes_an_event_from_a_file_and_shows_the_differences(
    ops_rig: OperatorRig, marker: str, tmp_path: Path
) -> None:
    dead_letter, event = await contract_breaker(ops_rig, marker)
    path = tmp_path / "event.json"
    for content, error in (
        (b"{", "the event is not JSON"),
        (b"\xff\xfe", "the event is not JSON"),
        (b"[]", "the event must be a JSON object"),
        (json.dumps(event).encode(), "event.data.after.seats: Expected `int` >= 1"),
        (
            json.dumps({**event, "subject": f"table/{uuid4()}"}).encode(),
            "event.subject: must stay as it is in the dead letter",
        ),
    ):
        path.write_bytes(content)
        code, _, err = await ops_rig.dlq("edit", dead_letter["id"], "--event", str(path))
        assert code == 1, content
        assert one_line(err).startswith(f"Error: {error}")
    event["data"]["after"]["seats"] = 6
    path.write_text(json.dumps(event))
    out = await run_ok(ops_rig, "edit", dead_letter["id"], "--event", str(path), "--why", "it has six")
    assert "data.after.seats: 0 → 6" in out
    [edited] = await ops_rig.dead_letters(1, text=marker)
    assert (edited["status"], out.splitlines()[-1]) == ("resolved", f"resolved by change {edited['replaced_by']}")
    await eventually(lambda: ops_rig.written(edited["replaced_by"]), what="the new change written")
    async with ops_rig.client() as client:
        [act] = (await details_of(client, dead_letter))["actions"]
    assert (act["action"], act["actor"], act["why"]) == ("dead_letter.edit", "cli/nadia", "it has six")
    assert "edited:           data.after.seats: 0 → 6" in await run_ok(ops_rig, "show", dead_letter["id"])
    code, _, err = await ops_rig.dlq("edit", dead_letter["id"], "--event", str(path), "--json")
    assert (code, one_line(err)) == (1, "Error: this dead letter is resolved")


async def test_edit_of_a_body_that_is_not_an_event_asks_for_its_entity_and_shows_the_effect(
    ops_rig: OperatorRig, marker: str, tmp_path: Path
) -> None:
    await ops_rig.send_to_dead_queue(f"a table for four, {marker}".encode(), reason="undecodable")
    [dead_letter] = await ops_rig.dead_letters(1, text=marker)
    table = ops_rig.table(label=marker)
    path = tmp_path / "event.json"
    path.write_text(json.dumps({"data": {"after": json.loads(encode(table))}}))
    command = ("edit", dead_letter["id"], "--event", str(path))

    answers = f"{ops_rig.restaurant.slug}\nticketrail.table.created.v1\n{table.id}\n"
    code, out, err = await ops_rig.dlq(*command, answer=f"{answers}n\n")
    assert code == 1, err
    assert f"a table for four, {marker}" in out
    assert (
        f"This creates table/{table.id} of restaurant {ops_rig.restaurant_id} by ticketrail.table.created.v1,"
        " at version 1." in out
    )
    assert len(await ops_rig.dead_letters(1, text=marker, status="open")) == 1, "a refused edit has changed something"

    out = await run_ok(ops_rig, *command, "--why", "says the owner", answer=f"{answers}y\n")
    [edited] = await ops_rig.dead_letters(1, text=marker, status="resolved")
    assert out.splitlines()[-1] == f"resolved by change {edited['replaced_by']}"
    await eventually(lambda: ops_rig.written(edited["replaced_by"]), what="the new change written")

    await ops_rig.send_to_dead_queue(f"it has six, {marker}".encode(), reason="undecodable")
    [second] = await ops_rig.dead_letters(1, text=marker, status="open")
    whole = {"restaurantid": ops_rig.restaurant_id, "subject": f"table/{table.id}"}
    path.write_text(json.dumps({**whole, "data": {"after": {**json.loads(encode(table)), "seats": 6}}}))
    kind = ("--type", "ticketrail.table.updated.v1")
    out = await run_ok(ops_rig, "edit", second["id"], "--event", str(path), *kind, "--yes")
    assert "by ticketrail.table.updated.v1, from version 1 to 2." in out


async def test_discard_and_restore_report_the_new_status_and_are_audited(ops_rig: OperatorRig, marker: str) -> None:
    [dead_letter] = await ops_rig.make_dead_letters(marker)
    gone = await printed_json(ops_rig, "discard", dead_letter["id"], "--why", "a test of the terminal")
    assert (gone["id"], gone["status"], gone["why"]) == (dead_letter["id"], "discarded", "a test of the terminal")
    code, _, err = await ops_rig.dlq("discard", dead_letter["id"], "--why", "again")
    assert (code, one_line(err)) == (1, "Error: this dead letter is discarded")
    restored = await run_ok(ops_rig, "restore", dead_letter["id"], "--why", "it was none")
    assert restored == "the dead letter is open again\n"
    assert await run_ok(ops_rig, "discard", dead_letter["id"], "--why", "it was one") == "discarded\n"
    assert (await printed_json(ops_rig, "restore", dead_letter["id"]))["status"] == "open"
    async with ops_rig.client() as client:
        acts = (await details_of(client, dead_letter))["actions"]
    assert [(act["action"].partition(".")[2], act["actor"], act["why"]) for act in acts[::-1]] == [
        ("discard", "cli/nadia", "a test of the terminal"),
        ("restore", "cli/nadia", "it was none"),
        ("discard", "cli/nadia", "it was one"),
        ("restore", "cli/nadia", None),
    ]


async def test_dead_letters_are_discarded_in_bulk_with_a_plan_and_undone_by_their_job(
    ops_rig: OperatorRig, marker: str
) -> None:
    dead_letters = await ops_rig.make_dead_letters(marker, 3)
    code, out, _ = await ops_rig.dlq("discard", "--text", marker, "--why", "a test of the terminal", answer="n\n")
    assert code == 1
    assert out.splitlines()[:2] == ["3 open dead letters", f"       3 to {topology.lane_queue(Lane.NORMAL)}"]
    assert len(await ops_rig.dead_letters(3, text=marker, status="open")) == 3, "a refused plan has discarded something"

    done = await printed_json(ops_rig, "discard", "--text", marker, "--why", "a test of the terminal", "--yes")
    job = done["job"]
    assert (job["kind"], job["state"], job["outcomes"]) == ("discard", "done", {"discarded": 3})
    assert job["message"] == "3 of 3 were discarded"
    discarded = await ops_rig.dead_letters(3, text=marker, status="discarded")
    assert {dead_letter["why"] for dead_letter in discarded} == {"a test of the terminal"}
    async with ops_rig.client() as client:
        [act] = (await details_of(client, dead_letters[0]))["actions"]
    assert (act["action"], act["actor"], act["why"]) == ("dead_letter.discard", "cli/nadia", "a test of the terminal")

    # One of them was restored by hand meanwhile, so the undo leaves it.
    await run_ok(ops_rig, "restore", dead_letters[0]["id"])
    undone = (await run_ok(ops_rig, "undo", job["id"], "--why", "the wrong table")).splitlines()
    assert len(undone) == 3
    assert undone[-1].endswith("done, 2 restored: 2 of 2 were restored")
    assert len(await ops_rig.dead_letters(3, text=marker, status="open")) == 3
    code, _, err = await ops_rig.dlq("undo", undone[-1].split()[1].rstrip(":"))
    assert (code, one_line(err)) == (1, "Error: only a discard can be undone; this job is a restore")
    jobs = await printed_json(ops_rig, "jobs", "--limit", "2")
    assert [(one["kind"], one["undo_of"]) for one in jobs] == [("restore", job["id"]), ("discard", None)]
    assert "3 discarded" in await run_ok(ops_rig, "jobs")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("show",), "no such dead letter"),
        (("discard", "--why", "x"), "no such dead letter"),
        (("restore",), "no such dead letter"),
        (("edit", "--event", __file__), "no such dead letter"),
        (("replay", "--yes"), "no such dead letter"),
        (("cancel",), "no such job"),
        (("undo",), "no such job"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
async def test_unknown_id_exits_with_1_and_one_error_line(
    ops_rig: OperatorRig, arguments: tuple[str, ...], error: str
) -> None:
    code, out, err = await ops_rig.dlq(*arguments, UNKNOWN)
    assert (code, out, one_line(err)) == (1, "", f"Error: {error}")


async def test_replay_with_an_unknown_id_replays_the_others_and_exits_with_1(ops_rig: OperatorRig, marker: str) -> None:
    [dead_letter] = await ops_rig.make_dead_letters(marker)
    code, out, err = await ops_rig.dlq("replay", dead_letter["id"], UNKNOWN, "--yes", "--json")
    assert code == 1
    assert f"{UNKNOWN} does not exist or is not open" in err
    assert json.loads(out)["job"]["outcomes"] == {"resolved": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay", "--yes"),
        ("replay", "--text", "x", "--rate", "0"),
        ("show", "7"),
        ("list", "--status", "dead"),
        ("list", "--limit", "0"),
        ("discard", UNKNOWN),
        ("discard", "--why", "x", "--yes"),
        ("edit", UNKNOWN, "--event", "/no/such/file"),
        ("bury",),
    ],
    ids=" ".join,
)
async def test_wrong_usage_exits_with_2(ops_rig: OperatorRig, arguments: tuple[str, ...]) -> None:
    code, out, err = await ops_rig.dlq(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("list", "--json"), 0), (("show", UNKNOWN), 1), (("show",), 2)],
    ids=str,
)
async def test_process_exits_with_the_code_of_its_command(
    ops_rig: OperatorRig, arguments: tuple[str, ...], code: int
) -> None:
    ended, out, err = await ops_rig.dlq_process(*arguments)
    assert (ended, bool(out), bool(err)) == (code, code == 0, code != 0)


async def test_unreachable_database_exits_with_1_and_names_the_cause(ops_rig: OperatorRig) -> None:
    code, out, err = await ops_rig.dlq_process("list", database_ops_url="postgresql://nobody:x@127.0.0.1:9/none")
    assert (code, out) == (1, "")
    assert one_line(err).startswith("Error: a backend does not answer: ")
