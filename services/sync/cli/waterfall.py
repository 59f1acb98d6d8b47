"""Draws the traces of an order as a waterfall: the time and the service of each step, and the waits between steps.
Pure.

    POST /api/orders         orders        0.0     3.9 ms  ████████████
      claim                  orders        0.7     0.5 ms    ██
      record                 orders        1.2     2.1 ms     ██████
        send …               orders        1.2     2.1 ms     ██████
          · waits            critical.v1   3.4     6.6 ms            ░░░░░░░░░
          write order        sync-worker  10.0     4.0 ms                     ████

The spans that consumed a change are drawn below the span that sent it. The time between them is a row of its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct, to_builtins
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.sync.cli.trace_search import DeadChange, FoundTraces, TracedChange
from services.sync.printable import printable
from shared.observability.trace_files import SpanRow

_MIN_WAIT_NS = 100_000  # shorter waits are noise
_HEADINGS = ("what", "where", "at ms", "took ms")
_GAP = 2  # columns between two columns of the table
_MAX_BAR_CHARS = 60
_MIN_BAR_CHARS = 8
_MIN_NOTE_CHARS = 12
_CONSUMED = ("write ", "mirror ", "push ")


class WaterfallLine(Struct):
    depth: int
    name: str
    where: str
    start_ns: int
    end_ns: int
    note: str = ""
    error: str | None = None
    waits: bool = False


def lines_of(spans: Sequence[SpanRow], trace_id: str) -> list[WaterfallLine]:
    """Returns the spans of one trace as the lines of a tree, earliest first, with the waits between them."""
    mine = {span.span_id: span for span in spans if span.trace_id == trace_id}
    children: dict[str | None, list[SpanRow]] = {}
    for span in mine.values():
        # If the parent was not kept, its children are at the top level.
        children.setdefault(span.parent_id if span.parent_id in mine else None, []).append(span)
    lines: list[WaterfallLine] = []

    def add(span: SpanRow, depth: int, after: SpanRow | None) -> None:
        if after is not None and span.name.startswith(_CONSUMED) and span.start_ns - after.end_ns > _MIN_WAIT_NS:
            queue = str(span.attributes.get("messaging.destination.name", "")).removeprefix("sync.postgres.")
            lines.append(WaterfallLine(depth, "· waits", queue, after.end_ns, span.start_ns, waits=True))
        lines.append(
            WaterfallLine(depth, span.name, _service(span), span.start_ns, span.end_ns, _note(span), span.error)
        )
        for child in sorted(children.get(span.span_id, ()), key=lambda span: span.start_ns):
            add(child, depth + 1, span)

    for root in sorted(children.get(None, ()), key=lambda span: span.start_ns):
        add(root, 0, None)
    return lines


def _service(span: SpanRow) -> str:
    return span.service.removeprefix("ticketrail-")


def _note(span: SpanRow) -> str:
    notes = []
    attributes = span.attributes
    if "ticketrail.message.changes" in attributes:
        notes.append(f"{attributes['ticketrail.message.changes']} in its message")
    if "ticketrail.batch.changes" in attributes:
        notes.append(f"{attributes['ticketrail.batch.changes']} in its batch")
    if "ticketrail.attempt" in attributes:
        notes.append(f"attempt {attributes['ticketrail.attempt']}")
    if attributes.get("ticketrail.from_journal"):
        notes.append("from the journal")
    if "ticketrail.push.subscribers" in attributes:
        notes.append(f"to {attributes['ticketrail.push.subscribers']} subscribers")
    if "http.response.status_code" in attributes:
        notes.append(str(attributes["http.response.status_code"]))
    return ", ".join(notes)


# -- drawing ---------------------------------------------------------------------------------------------------


def render(order_id: str, found: FoundTraces, width: int) -> RenderableType:
    """Renders the changes by version, then the dead letters, then the traces without a change in PostgreSQL."""
    parts: list[RenderableType] = []
    shown: set[str] = set()
    for change in found.changes:
        parts.append(_headline(change))
        trace = change.trace_id
        lines = lines_of(found.spans, trace) if trace else []
        shown.add(trace or "")
        parts.append(_table(lines, width) if lines else Text(f"  {_unsampled(change)}\n", style="dim"))
    for dead_letter in found.dead_letters:
        parts.append(_dead_letter(dead_letter))
        if dead_letter.trace_id and dead_letter.trace_id not in shown:
            shown.add(dead_letter.trace_id)
            if lines := lines_of(found.spans, dead_letter.trace_id):
                parts.append(_table(lines, width))
    for trace in _traces_naming(order_id, found.spans):
        if trace not in shown:
            parts.append(Text.assemble(("not in PostgreSQL (yet)", "bold yellow"), f"  trace {trace}"))
            parts.append(_table(lines_of(found.spans, trace), width))
    parts += [Text(f"! {text}", style="yellow") for text in found.missing]
    return Group(*parts)


def as_json(order_id: str, found: FoundTraces) -> dict[str, Any]:
    known = {change.trace_id for change in found.changes} | {dead_letter.trace_id for dead_letter in found.dead_letters}
    return {
        "order_id": order_id,
        "changes": [
            {
                "change_id": change.change_id,
                "version": change.version,
                "type": change.type,
                "accepted_at": change.accepted_at,
                "written_at": change.written_at,
                "trace_id": change.trace_id,
                "spans": [span for span in found.spans if span.trace_id == change.trace_id],
            }
            for change in found.changes
        ],
        "dead_letters": [
            {
                **to_builtins(dead_letter),
                "spans": [span for span in found.spans if span.trace_id == dead_letter.trace_id],
            }
            for dead_letter in found.dead_letters
        ],
        "elsewhere": [
            {"trace_id": trace, "spans": [span for span in found.spans if span.trace_id == trace]}
            for trace in _traces_naming(order_id, found.spans)
            if trace not in known
        ],
        "missing": found.missing,
    }


def _traces_naming(order_id: str, spans: Iterable[SpanRow]) -> list[str]:
    return list(dict.fromkeys(s.trace_id for s in spans if s.attributes.get("ticketrail.order_id") == order_id))


def _headline(change: TracedChange) -> Text:
    lag = (change.written_at - change.accepted_at).total_seconds() * 1000
    return Text.assemble(
        (change.type, "bold"),
        f"  version {change.version}  by {change.source}  accepted {change.accepted_at:%Y-%m-%d %H:%M:%S.%f}"[:-3],
        f"  in PostgreSQL after {lag:.1f} ms\n  trace {change.trace_id or 'unknown'}",
    )


def _dead_letter(dead_letter: DeadChange) -> Text:
    version = f"  version {dead_letter.version}" if dead_letter.version else ""
    return Text.assemble(
        (printable(dead_letter.type or "unreadable"), "bold"),
        version,
        (f"  dead, {dead_letter.status}", "bold red" if dead_letter.status in ("open", "replaying") else "dim"),
        f"  last failed {dead_letter.last_failed_at:%Y-%m-%d %H:%M:%S}"
        f"\n  {printable(f'{dead_letter.reason}: {dead_letter.error}')}",
        f"\n  ticketrail dlq show {dead_letter.id}\n  trace {dead_letter.trace_id or 'unknown'}",
    )


def _unsampled(change: TracedChange) -> str:
    if change.trace_id is None:
        return "this change has no trace"
    return "no spans: not sampled (TICKETRAIL_TRACE_SAMPLE) and neither failed nor slow, or already removed"


def _table(lines: Sequence[WaterfallLine], width: int) -> Table:
    """Draws the lines in `width` columns. Names and times are never cut: first the bar gives way, then the notes."""
    began = min(line.start_ns for line in lines)
    whole = max(max(line.end_ns for line in lines) - began, 1)
    texts = [
        (
            "  " * line.depth + line.name,
            line.where,
            f"{(line.start_ns - began) / 1e6:.1f}",
            f"{(line.end_ns - line.start_ns) / 1e6:.1f}",
        )
        for line in lines
    ]
    notes = [", ".join(filter(None, (line.error, line.note))) for line in lines]
    used = sum(max(cell_len(text) for text in column) + _GAP for column in zip(_HEADINGS, *texts, strict=True))
    noted = max(map(cell_len, notes))
    bar = min(_MAX_BAR_CHARS, width - used - noted - _GAP)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=True, header_style="dim")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading.endswith("ms") else "left", no_wrap=True)
    if bar >= _MIN_BAR_CHARS:
        table.add_column("", width=bar, no_wrap=True)
    if width - used >= _MIN_NOTE_CHARS:
        table.add_column("", style="dim")
    for line, cells, note in zip(lines, texts, notes, strict=True):
        left = min(int((line.start_ns - began) / whole * bar), bar - 1)
        long = max(1, round((line.end_ns - line.start_ns) / whole * bar))
        drawn = " " * left + ("░" if line.waits else "█") * min(long, bar - left)
        row: list[RenderableType] = [
            Text(cells[0], style="yellow" if line.waits else ""),
            *cells[1:],
            Text(drawn, style="red" if line.error else "yellow" if line.waits else "green"),
            Text(note, style="red" if line.error else ""),
        ]
        if bar < _MIN_BAR_CHARS:
            del row[-2]
        table.add_row(*row[: len(table.columns)])
    return table
