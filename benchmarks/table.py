"""Markdown tables and terminal lines drawn from records."""

from __future__ import annotations

from math import isinf
from statistics import median
from typing import Any

from benchmarks.operation import OURS
from benchmarks.record import Record
from benchmarks.registry import TARGETS, Target
from benchmarks.timing import Entry

CaseRecord = dict[str, Any]

_METHOD = "Medians over interleaved rounds; extra memory is beyond the inputs, the results included."


def markdown(records: list[Record]) -> str:
    """Targets, then every case, of one or more records; where several hold a case, the last one counts."""
    cases = {case["id"]: case for record in records for case in record["cases"]}
    parts = [targets_table(list(cases.values())), *(_case_table(case) for case in cases.values())]
    parts += [_provenance(record) for record in records]
    return "\n\n".join(part for part in parts if part)


def case_lines(case: CaseRecord) -> list[str]:
    """A case as the terminal shows it while a run goes on."""
    lines = [case["id"]]
    if "floor" in case:
        lines.append(f"    floor: {_time(case['floor']['seconds'])}, of {case['floor']['bound']}")
    for name, entry in case["implementations"].items():
        time, over_ours, peak = _cells(entry, name)
        share = f"{entry['share']:>6.0%} of the floor's rate" if "share" in entry and name == OURS else ""
        lines.append(f"    {name:<33} {time:<32} {over_ours:>8} {peak:>10}  {share}".rstrip())
    return lines


def measure(target: Target, cases: dict[str, CaseRecord]) -> tuple[float, str] | None:
    """The target's figure and what it is against, or None where one of the two was not measured."""
    case = cases.get(target.case.id, {"implementations": {}})
    measured = {name: entry for name, entry in case["implementations"].items() if "seconds" in entry}
    ours = measured.get(OURS)
    if ours is None:
        return None
    match target.sense:
        case "share" | "launches" as what:
            return None if what not in ours else (ours[what], target.against[0])
        case "memory":
            peak = ours.get("peak_bytes")
            return None if peak is None else (peak / case["memory_unit_bytes"], target.against[0])
    others = [name for name in target.against if target.of in measured.get(name, {})]
    if not others or target.of not in ours:
        return None
    fastest = min(others, key=lambda name: _median(measured[name], target.of))
    ratio = _median(ours, target.of) / _median(measured[fastest], target.of)
    return {"at most": ratio, "at least": 1 / ratio, "added": ratio - 1}[target.sense], fastest


def _median(entry: Entry, of: str) -> float:
    return median(entry[of]) if isinstance(entry[of], list) else entry[of]


def targets_table(cases: list[CaseRecord]) -> str:
    """The targets that these cases bear on, with what was measured."""
    by_id = {case["id"]: case for case in cases}
    lines = ["| what | case | against | measured | target | |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        found = measure(target, by_id)
        if found is None:
            continue
        value, against = found
        match target.sense:
            case "share":
                cells = f"{value:.0%} | >= {target.bound:.0%} | {_verdict(value >= target.bound)}"
            case "added" if isinf(target.bound):
                cells = f"{value:+.1%} | |"
            case "added":
                cells = f"{value:+.1%} | <= {target.bound:.0%} | {_verdict(value <= target.bound)}"
            case "at least":
                cells = f"{value:.3g}x as fast | >= {target.bound:g}x | {_verdict(value >= target.bound)}"
            case _:
                cells = f"{value:.3g} | <= {target.bound:g} | {_verdict(value <= target.bound)}"
        lines.append(f"| {target.what} | `{target.case.id}` | {against} | {cells} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def _case_table(case: CaseRecord) -> str:
    floor = case.get("floor")
    least = f": floor {_time(floor['seconds'])}, of {floor['bound']}" if floor else ""
    lines = [
        f"`{case['id']}`{least}",
        "",
        "| implementation | time, median (20 to 80 %) | time / ours | extra memory |",
        "|---|---|---|---|",
    ]
    for name, entry in case["implementations"].items():
        lines.append(f"| {name} | {' | '.join(_cells(entry, name))} |")
    return "\n".join(lines)


def _cells(entry: Entry, name: str) -> tuple[str, str, str]:
    """Time, or why there is none; time over ours; extra memory."""
    if "seconds" not in entry:
        return f"{entry['status']}: {entry['reason']}", "", ""
    quantiles = entry["quantiles"]
    unit, scale = _unit(quantiles["50"])
    low_to_high = " to ".join(f"{quantiles[q] * scale:.3g}" for q in ("20", "80") if q in quantiles)
    spread = f" ({low_to_high})" if low_to_high else ""
    over_ours = f"{entry['over_ours']['medians']:.3g}x" if "over_ours" in entry and name != OURS else ""
    peak = f"{entry['peak_bytes'] / 1e6:.3g} MB" if "peak_bytes" in entry else entry.get("reason", "")
    return f"{quantiles['50'] * scale:.3g} {unit}{spread}", over_ours, peak


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)


def _time(seconds: float) -> str:
    unit, scale = _unit(seconds)
    return f"{seconds * scale:.3g} {unit}"


def _provenance(record: Record) -> str:
    machine = record["machine"]
    gpu = machine.get("gpu")
    driver = f", driver {gpu['driver']}" if gpu and "driver" in gpu else ""
    card = f"{gpu['name']}{driver}, CUDA {gpu['cuda']}; " if gpu else ""
    dirty = " with local changes" if record["dirty"] else ""
    threads = f"{machine['threads']} threads on " if "threads" in machine else ""
    processor = [
        machine.get("cpu", "a processor not recorded"),
        f"{threads}{machine['cores']} cores",
        machine.get("vector_code"),
        f"{machine['memory_gb']} GB" if "memory_gb" in machine else None,
    ]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return (
        f"`{record['command']}`, {record['date'][:10]}, commit {record['commit'][:9]}{dirty}; "
        f"{card}{', '.join(filter(None, processor))}; {versions}. {record.get('method', _METHOD)}"
    )
