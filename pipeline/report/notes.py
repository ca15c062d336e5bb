"""What has to be known to read a study's numbers, in sentences."""

from __future__ import annotations

from pipeline.report import papers
from pipeline.report.tables import Table, TableEntry
from pipeline.report.writers import format_value

_SELECTION = {
    "selection": "Epoch and hyperparameters were chosen on a selection split held out of the training pool; "
    "the evaluation split was scored once.",
    "test": "Epoch and hyperparameters were chosen on the evaluation split itself{as_the_papers}: "
    "the numbers are optimistic.",
}


def notes(table: Table) -> list[str]:
    """Return the sentences; a study that is of no paper speaks of none."""
    out = [table.note] if table.note else []
    out += [*_samples(table), _protocol(table)]
    selection = _SELECTION.get(table.study.selection, f"Selection: {table.study.selection}.")
    out.append(selection.replace("{as_the_papers}", ", as the papers do" if table.paper else ""))
    printed = any(entry.paper is not None for entry in table.entries.values())
    for stand_in, model in stand_ins([table]):
        known = ": the paper's numbers are of that model, so no difference is shown" if printed else ""
        out.append(f"{stand_in} stands for {model}{known}.")
    return out


def stand_ins(tables: list[Table]) -> list[tuple[str, str]]:
    """Return which backbone plays which of a study's, by their labels, each pair once."""
    pairs = {
        (papers.label("backbones", line.backbone), papers.label("backbones", line.paper_backbone)): None
        for table in tables
        for line in table.lines
        if line.backbone != line.paper_backbone
    }
    return list(pairs)


def _samples(table: Table) -> list[str]:
    """Say how many samples and seeds a number is of, and how far chance over the samples reaches."""
    numbers = [entry for entry in table.entries.values() if entry.column.metric is None and entry.done]
    scored = [entry for entry in numbers if all(cell.measurement is None for cell in entry.done)]
    seeds = sorted({cell.seed for entry in numbers for cell in entry.done})
    if not seeds:
        return []
    listed = ", ".join(map(str, seeds))
    count = f"{len(seeds)} seeds ({listed})" if len(seeds) > 1 else f"One seed ({listed})"
    sizes: dict[str, list[str]] = {}
    reach: dict[str, tuple[float, TableEntry]] = {}
    for entry in scored:
        task = papers.label("tasks", entry.column.task)
        of_task = {cell.num_samples for cell in entry.done if cell.num_samples}
        for size in of_task:
            tasks = sizes.setdefault(f"{size:,}", [])
            tasks += [task] if task not in tasks else []
        if entry.interval and entry.value is not None:
            far = max(entry.value - entry.interval[0], entry.interval[1] - entry.value)
            reach[task] = max(reach.get(task, (0.0, entry)), (far, entry), key=lambda pair: pair[0])
    of = "; ".join(f"{size} evaluation samples of {', '.join(tasks)}" for size, tasks in sizes.items())
    out = [f"{count}; scored on {of}." if of else f"{count}."]
    if reach:
        far_out = ", ".join(f"{format_value(far, entry.unit)} on {task}" for task, (far, entry) in reach.items())
        out.append(f"The 95 % interval over samples reaches at most so far from a number: {far_out}.")
    return out


def _protocol(table: Table) -> str:
    name = table.study.protocol
    if name is not None:
        return f"Protocol: {name}, the choices of the published code all together (docs/methods.md)."
    of = "the equations and prompts of the papers" if table.paper else "none"
    return f"Protocol: {of}; hificl trials prints every setting."
