"""`ticketrail dlq` as operators and scripts run it: what it prints, what it asks, and its exit codes."""

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
from tests.rigs.dead_letters import LETTERS, Desk, seen
from tests.rigs.restaurant import expect
from tests.rigs.system import eventually

UNKNOWN = "7d0c5f1e-4c11-4c0a-9b1d-7f0c3b526f1e"
NOT_UTF8 = b"\x00\xff\xfe \x80 not \x1b[31mUTF-8 "


async def done(desk: Desk, *arguments: str, answer: str = "") -> str:
    """What a command printed that had to end with 0."""
    code, out, err = await desk.dlq(*arguments, answer=answer)
    assert code == 0, f"{arguments}: {code}\n{out}\n{err}"
    return out


async def told(desk: Desk, *arguments: str, code: int = 0) -> Any:
    """The JSON of a command: all that it printed."""
    ended, out, err = await desk.dlq(*arguments, "--json")
    assert ended == code, f"{arguments}: {ended}\n{out}\n{err}"
    return json.loads(out)


async def broken(desk: Desk, marker: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a letter, its event), of a table without a seat."""
    body = message(encode(change(desk.table(label=marker))).replace(b'"seats":4', b'"seats":0'))
    await desk.bury(body, reason="contract_broken")
    [letter] = await desk.letters(1, text=marker)
    event = event_in(body)
    assert event is not None
    return letter, event


def one_line(err: str) -> str:
    [line] = err.strip().splitlines()
    return line


# -- looking -------------------------------------------------------------------------------------------------------


async def test_list_and_groups_print_what_the_api_tells(desk: Desk, marker: str) -> None:
    await desk.bury(change(desk.table(label=marker)), place=marker)
    # What a stranger has written is neither markup nor a smiley, and does not steer the terminal.
    await desk.bury(change(desk.table(label=marker)), place=marker, error="KeyError: [/red] [bold] :boom: \x1b[2J")
    letters = await desk.letters(2, text=marker)
    assert await told(desk, "list", "--text", marker) == letters[::-1]
    assert await told(desk, "list", "--text", marker, "--limit", "1") == letters[1:]
    text = await done(desk, "list", "--text", marker)
    assert [line.split()[0] for line in text.splitlines()[1:3]] == [letter["id"] for letter in letters[::-1]]
    assert "KeyError: [/red] [bold] :boom: �[2J" in text
    assert text.splitlines()[-1] == "2 dead letters"
    async with desk.client() as client:
        expected = expect(await client.get(f"{LETTERS}/groups", params={"text": marker}))
    groups = await told(desk, "groups", "--text", marker)
    assert groups == expected
    text = await done(desk, "groups", "--text", marker)
    for group in groups:
        assert group["fingerprint"] in text
    assert marker in text


@pytest.mark.parametrize("narrow", ["queue", "fingerprint", "reason", "entity", "restaurant", "status", "since"])
async def test_each_option_narrows_a_list(desk: Desk, marker: str, narrow: str) -> None:
    old = change(order(restaurant_id=str(uuid4()), items=1, notes=marker))
    await desk.bury(old, lane=Lane.CRITICAL, reason="another", at="2026-03-14T12:00:00+00:00")
    [other] = await desk.letters(1, text=marker)
    async with desk.client() as client:
        expect(await client.post(f"{LETTERS}/{other['id']}/discard", json={"revision": 1, "why": "a test"}))
    await desk.bury(change(desk.table(label=marker)))
    wanted = (await desk.letters(2, text=marker))[1]
    value = {
        "queue": topology.dead_queue(Lane.NORMAL),
        "fingerprint": wanted["fingerprint"],
        "reason": "transient",
        "entity": "table",
        "restaurant": desk.restaurant,
        "status": "open",
        "since": "24",
    }[narrow]
    assert await told(desk, "list", "--text", marker, f"--{narrow}", value) == [wanted]


async def test_show_prints_a_letter_its_event_and_what_was_done_to_it(desk: Desk, marker: str) -> None:
    letter, event = await broken(desk, marker)
    async with desk.client() as client:
        body = {"revision": 1, "why": "looked at twice"}
        expect(await client.post(f"{LETTERS}/{letter['id']}/discard", json=body))
        expected = await seen(client, letter)
    shown = await told(desk, "show", letter["id"])
    assert expected == shown
    assert shown["event"] == event
    text = await done(desk, "show", letter["id"])
    for part in (
        letter["id"],
        letter["fingerprint"],
        letter["trace_id"] or "table",
        "looked at twice",
        "discard by nadia",
    ):
        assert part in text
    assert json.loads(text[text.index("\n{") :]) == event


async def test_show_prints_a_body_that_is_no_event_as_text(desk: Desk, marker: str) -> None:
    await desk.bury(NOT_UTF8, reason=marker)
    [letter] = await desk.letters(1, reason=marker)
    assert (await done(desk, "show", letter["id"])).endswith("��� � not �[31mUTF-8 \n")
    assert (await told(desk, "show", letter["id"]))["body"] == NOT_UTF8.decode(errors="replace")


async def test_export_writes_each_letter_whole_on_a_line(desk: Desk, marker: str, tmp_path: Path) -> None:
    bodies = [message(change(desk.table(label=marker))), NOT_UTF8 + marker.encode()]
    await desk.bury(*bodies)
    letters = await desk.letters(2, text=marker)
    lines = [json.loads(line) for line in (await done(desk, "export", "--text", marker)).splitlines()]
    assert [line["id"] for line in lines] == [letter["id"] for letter in letters[::-1]]
    assert [base64.b64decode(line["body"]) for line in lines] == bodies[::-1]
    for line, letter in zip(lines, letters[::-1], strict=True):
        assert {name: line[name] for name in letter} == letter
        assert line["attempts"][0]["reason"] == "transient"
        assert line["headers"]["ticketrail-reason"] == "transient"
    path = tmp_path / "letters.jsonl"
    assert await done(desk, "export", "--text", marker, "--out", str(path)) == f"2 dead letters in {path}\n"
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert not path.with_name(f"{path.name}.part").exists()
    (link := tmp_path / "link.jsonl").symlink_to(path)
    path.write_text("the export before")
    await done(desk, "export", "--text", marker, "--out", str(link))
    assert (link.is_symlink(), [json.loads(line) for line in path.read_text().splitlines()]) == (True, lines)
    code, out, err = await desk.dlq("export", "--out", str(tmp_path / "nowhere" / "letters.jsonl"))
    assert (code, out, "No such file or directory" in one_line(err)) == (1, "", True)


# -- replaying -------------------------------------------------------------------------------------------------------


async def test_replay_shows_its_plan_and_asks_before_it_sends_anything(desk: Desk, marker: str) -> None:
    [letter] = await desk.buried(marker)
    code, out, err = await desk.dlq("replay", letter["id"], answer="n\n")
    assert (code, err.strip()) == (1, "Aborted!")
    assert out.splitlines()[:2] == ["1 open dead letter", f"       1 to {topology.lane_queue(Lane.NORMAL)}"]
    assert "Replay them?" in out
    assert await desk.letters(1, text=marker) == [letter]
    async with desk.client() as client:
        assert (await seen(client, letter))["replays"] == [], "no job was made"
    # A script that does not say --yes is asked too, beside its JSON.
    code, out, err = await desk.dlq_process("replay", letter["id"], "--why", "mended", "--json", answer="y\n")
    assert code == 0, err
    assert f"1 to {topology.lane_queue(Lane.NORMAL)}" in err
    assert "Replay them?" in err
    replayed = json.loads(out)
    assert replayed["plan"]["total"] == 1
    assert (replayed["job"]["state"], replayed["job"]["outcomes"]) == ("done", {"resolved": 1})
    assert (replayed["job"]["actor"], replayed["job"]["why"]) == ("cli/nadia", "mended")
    assert [(one["dead_letter_id"], one["outcome"]) for one in replayed["items"]] == [(letter["id"], "resolved")]
    assert await desk.written(letter["change_id"]) == 1


async def test_replay_of_a_filter_tells_what_became_of_each_and_ends_with_1_when_one_dies_again(
    desk: Desk, marker: str
) -> None:
    [good] = await desk.buried(marker)
    await desk.bury(message(encode(change(desk.table(label=marker))).replace(b'"seats":4', b'"seats":0')))
    bad = (await desk.letters(2, text=marker))[1]
    code, out, err = await desk.dlq("replay", "--text", marker, "--dry-run")
    assert (code, err) == (1, ""), "it asks nothing, and one would fail"
    assert f"{good['id']}  would_write  version 1" in out
    assert f"{bad['id']}  would_fail  contract_broken" in out
    assert "done, 1 would_fail, 1 would_write" in out
    assert await desk.letters(2, text=marker) == [good, bad]
    code, out, err = await desk.dlq("replay", "--text", marker, "--yes", "--no-canary")
    assert (code, err) == (1, "")
    assert out.startswith("2 open dead letters\n")
    assert f"{good['id']}  resolved" in out
    assert f"{bad['id']}  failed  contract_broken" in out
    assert ": done, 1 failed, 1 resolved" in out
    [left] = await desk.letters(1, text=marker, status="open")
    assert (left["id"], left["deaths"]) == (bad["id"], 2)


async def test_a_dry_run_of_good_letters_ends_with_0_and_changes_nothing(desk: Desk, marker: str) -> None:
    letters = await desk.buried(marker, 2)
    said = await told(desk, "replay", *(letter["id"] for letter in letters), "--dry-run")
    assert (said["job"]["kind"], said["job"]["outcomes"]) == ("dry_run", {"would_write": 2})
    assert await desk.letters(2, text=marker) == letters
    assert await desk.written(*(letter["change_id"] for letter in letters)) == 0


async def test_a_replay_that_nobody_waits_for_can_be_cancelled(desk: Desk, marker: str) -> None:
    await desk.buried(marker, 3)
    slowly = ("--rate", "0.1", "--no-canary", "--yes", "--detach")
    job = (await told(desk, "replay", "--text", marker, *slowly))["job"]
    assert job["state"] in ("waiting", "running")
    assert (await told(desk, "cancel", job["id"]))["cancel_asked"] is True
    assert (await desk.ended(job))["state"] == "cancelled"
    code, out, err = await desk.dlq("cancel", job["id"])
    assert (code, out, one_line(err)) == (1, "", "Error: this replay job is cancelled")


# -- mending ---------------------------------------------------------------------------------------------------------


async def test_edit_takes_an_event_from_a_file_and_shows_what_differs(desk: Desk, marker: str, tmp_path: Path) -> None:
    letter, event = await broken(desk, marker)
    path = tmp_path / "event.json"
    for content, error in (
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "the event must be a JSON object"),
        (json.dumps(event).encode(), "event.data.after.seats: data.after: Expected `int` >= 1"),
        (
            json.dumps({**event, "subject": f"table/{uuid4()}"}).encode(),
            "event.subject: must stay as it is in the dead letter",
        ),
    ):
        path.write_bytes(content)
        code, _, err = await desk.dlq("edit", letter["id"], "--event", str(path))
        assert code == 1, content
        assert one_line(err).startswith(f"Error: {error}")
    event["data"]["after"]["seats"] = 6
    path.write_text(json.dumps(event))
    out = await done(desk, "edit", letter["id"], "--event", str(path), "--why", "it has six")
    assert "data.after.seats: 0 → 6" in out
    [edited] = await desk.letters(1, text=marker)
    assert (edited["status"], out.splitlines()[-1]) == ("resolved", f"resolved by change {edited['replaced_by']}")
    await eventually(lambda: desk.written(edited["replaced_by"]), what="the new change written")
    async with desk.client() as client:
        [act] = (await seen(client, letter))["actions"]
    assert (act["action"], act["actor"], act["why"]) == ("dead_letter.edit", "cli/nadia", "it has six")
    assert "edited:           data.after.seats: 0 → 6" in await done(desk, "show", letter["id"])
    code, _, err = await desk.dlq("edit", letter["id"], "--event", str(path), "--json")
    assert (code, one_line(err)) == (1, "Error: this dead letter is resolved")


async def test_discard_and_restore_say_what_they_did_and_are_audited(desk: Desk, marker: str) -> None:
    [letter] = await desk.buried(marker)
    gone = await told(desk, "discard", letter["id"], "--why", "a test of the terminal")
    assert (gone["id"], gone["status"], gone["why"]) == (letter["id"], "discarded", "a test of the terminal")
    code, _, err = await desk.dlq("discard", letter["id"], "--why", "again")
    assert (code, one_line(err)) == (1, "Error: this dead letter is discarded")
    assert await done(desk, "restore", letter["id"], "--why", "it was none") == "open again\n"
    assert await done(desk, "discard", letter["id"], "--why", "it was one") == "discarded\n"
    assert (await told(desk, "restore", letter["id"]))["status"] == "open"
    async with desk.client() as client:
        acts = (await seen(client, letter))["actions"]
    assert [(act["action"].partition(".")[2], act["actor"], act["why"]) for act in acts[::-1]] == [
        ("discard", "cli/nadia", "a test of the terminal"),
        ("restore", "cli/nadia", "it was none"),
        ("discard", "cli/nadia", "it was one"),
        ("restore", "cli/nadia", None),
    ]


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("show",), "no such dead letter"),
        (("discard", "--why", "x"), "no such dead letter"),
        (("restore",), "no such dead letter"),
        (("edit", "--event", __file__), "no such dead letter"),
        (("replay", "--yes"), "no such dead letter"),
        (("cancel",), "no such replay job"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
async def test_an_unknown_id_ends_with_1_and_one_clear_line(desk: Desk, arguments: tuple[str, ...], error: str) -> None:
    code, out, err = await desk.dlq(*arguments, UNKNOWN)
    assert (code, out, one_line(err)) == (1, "", f"Error: {error}")


async def test_a_replay_of_which_one_is_unknown_replays_the_others_and_ends_with_1(desk: Desk, marker: str) -> None:
    [letter] = await desk.buried(marker)
    code, out, err = await desk.dlq("replay", letter["id"], UNKNOWN, "--yes", "--json")
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
        ("edit", UNKNOWN, "--event", "/no/such/file"),
        ("bury",),
    ],
    ids=" ".join,
)
async def test_wrong_usage_ends_with_2(desk: Desk, arguments: tuple[str, ...]) -> None:
    code, out, err = await desk.dlq(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("list", "--json"), 0), (("show", UNKNOWN), 1), (("show",), 2)],
    ids=str,
)
async def test_a_process_ends_with_the_code_of_its_command(desk: Desk, arguments: tuple[str, ...], code: int) -> None:
    ended, out, err = await desk.dlq_process(*arguments)
    assert (ended, bool(out), bool(err)) == (code, code == 0, code != 0)


async def test_without_a_database_it_ends_with_1_and_says_what_does_not_answer(desk: Desk) -> None:
    code, out, err = await desk.dlq_process("list", database_ops_url="postgresql://nobody:x@127.0.0.1:9/none")
    assert (code, out) == (1, "")
    assert one_line(err).startswith("Error: a backend does not answer: ")
