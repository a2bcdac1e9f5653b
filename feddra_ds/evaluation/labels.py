"""Labels in the samples' json as classification tasks, and zero-shot prompts for them.

Legend: n pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddra_ds.common.parse import parse_yaml
from feddra_ds.data.format.text import NO, UNKNOWN, YES

MAX_CLASSES = 50
SEPARATOR = "|"  # between the parts of a multi-label value

POSITIVE_PROMPTS = ("{}", "There is {}.", "Findings consistent with {}.")
NEGATIVE_PROMPTS = ("no {}", "There is no {}.", "No evidence of {}.")
CLASS_PROMPTS = ("{}", "an image of {}", "Findings consistent with {}.")

Prompts = dict[str, dict[str, list[str]]]  # label → class → prompts


def read_prompts(path: str | Path) -> Prompts:
    """A YAML or JSON file `label: {class: [prompt, …]}`, whose binary labels have the classes `yes` and `no`.

    Raises ValueError that names what is wrong.
    """
    try:
        told = parse_yaml(Path(path).read_bytes(), only_text=True)  # yes and no stay words
    except OSError as error:
        raise ValueError(f"--prompts: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--prompts: {path} is not YAML: {error}") from error
    if not isinstance(told, dict) or not told:
        raise ValueError(
            f"--prompts: {path} holds no labels; it needs lines like `edema: {{yes: [edema], no: [no edema]}}`"
        )
    out: Prompts = {}
    for label, classes in told.items():
        if not isinstance(classes, dict):
            raise ValueError(f"--prompts: {path}: {label}: needs a list of prompts for each class")
        lists = {name: [some] if isinstance(some, str) else some for name, some in classes.items()}
        if not all(
            isinstance(some, list) and some and all(isinstance(p, str) for p in some) for some in lists.values()
        ):
            raise ValueError(f"--prompts: {path}: {label}: needs a list of prompts for each class")
        out[label] = lists
    return out


@dataclass(frozen=True)
class Task:
    """One label of a dataset. targets: (n,) class index, -1 where it is not known; binary tasks have 1 = present."""

    name: str
    classes: tuple[str, ...]
    binary: bool
    targets: NDArray[np.int64]

    def prompts(self, given: Prompts | None = None) -> list[list[str]]:
        """Prompts of each class, in the order of `classes`: those `given` for the label, else of its names.

        Raises ValueError where what is given for the label leaves out one of its classes. A binary label's are `no` and `yes`.
        """
        own = (given or {}).get(self.name)
        if own is not None:
            names = ("no", "yes") if self.binary else self.classes
            if set(own) != set(names):
                raise ValueError(f"--prompts: {self.name}: needs the classes {', '.join(names)}, got {', '.join(own)}")
            return [own[name] for name in names]
        if self.binary:
            name = readable(self.name.rpartition(":")[2])
            return [[p.format(name) for p in side] for side in (NEGATIVE_PROMPTS, POSITIVE_PROMPTS)]
        return [[p.format(readable(c)) for p in CLASS_PROMPTS] for c in self.classes]


def readable(name: str) -> str:
    """A label's name as words: pleural_effusion and Pleural-Effusion become `pleural effusion`."""
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


def find_tasks(infos: Sequence[dict[str, Any]], keys: Sequence[str] | None = None) -> tuple[list[Task], dict[str, str]]:
    """The tasks in the json members of n pairs, and the labels that are none, with the reason.

    0/1 and yes/no values make a binary task, other values one of up to MAX_CLASSES classes; values with | in them are
    lists, each part of which makes a binary task `key:part`. Empty and -1 mean unknown. keys: these labels only.
    Raises ValueError for a key that no pair has.
    """
    labels = [found if isinstance(found := info.get("labels"), dict) else {} for info in infos]
    there = sorted({key for one in labels for key in one})
    for key in keys or ():
        if key not in there:
            have = f"there are: {', '.join(there)}" if there else "the samples have no labels"
            raise ValueError(f"--label-key: no sample has a label {key}; {have}")
    tasks: list[Task] = []
    refused: dict[str, str] = {}
    for key in there if keys is None else keys:
        values = [_text(one.get(key)) for one in labels]
        known = Counter(v for v in values if v is not None)
        if any(SEPARATOR in v for v in known):
            found, reason = _list_tasks(key, values)
        else:
            found, reason = _value_task(key, values, known)
        tasks += found
        if reason:
            refused[key] = reason
    return tasks, refused


def draw_labels(targets: NDArray[np.int64], fraction: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Sorted indices of a share of n pairs with targets (n, K), at least one of each class of each of the K labels.

    Stratified: pairs are put in the order of their targets, equal ones at random, and every 1/fraction-th is taken.
    """
    n = len(targets)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    mixed = rng.permutation(n)
    order = mixed[np.lexsort(targets[mixed].T[::-1])]
    num = max(1, round(fraction * n))
    chosen = set(order[((np.arange(num) + rng.random()) * n / num).astype(np.int64)].tolist())
    for column in targets.T:
        for c in np.setdiff1d(column[column >= 0], column[list(chosen)]):
            chosen.add(int(next(i for i in mixed if column[i] == c)))
    return np.array(sorted(chosen), dtype=np.int64)


def _value_task(key: str, values: list[str | None], known: Counter[str]) -> tuple[list[Task], str | None]:
    if len(known) < 2:
        return [], "all known values are the same" if known else "no value is known"
    lowered = {v: v.lower() for v in known}
    if all(v in YES | NO for v in lowered.values()):
        targets = [-1 if v is None else int(lowered[v] in YES) for v in values]
        return [Task(key, (f"no {key}", key), True, np.array(targets))] if len(set(targets) - {-1}) > 1 else [], None
    if len(known) > MAX_CLASSES:
        return [], f"{len(known)} different values are more than {MAX_CLASSES} classes"
    classes = tuple(sorted(known))
    index = {c: i for i, c in enumerate(classes)}
    return [Task(key, classes, False, np.array([-1 if v is None else index[v] for v in values]))], None


def _list_tasks(key: str, values: list[str | None]) -> tuple[list[Task], str | None]:
    parts = [None if v is None else {p.strip() for p in v.split(SEPARATOR) if p.strip()} for v in values]
    counts = Counter(p for one in parts if one is not None for p in one)
    known = sum(one is not None for one in parts)
    out = []
    for name, count in counts.most_common(MAX_CLASSES):
        if count < known:
            targets = np.array([-1 if one is None else int(name in one) for one in parts])
            out.append(Task(f"{key}:{name}", (f"no {name}", name), True, targets))
    left = len(counts) - MAX_CLASSES
    return out, f"{left} rarer parts are left out" if left > 0 else None


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(int(value))
    text = "" if value is None else str(value).strip()
    return None if text.lower() in UNKNOWN else text


def weakest(clients: dict[str, dict[str, float] | None]) -> tuple[str, float] | None:
    """(client, AUROC) of the least of `measure`'s by client, among those whose AUROC says something: from five pairs of
    each side, or twenty of several classes. None where there is no such client."""

    def is_enough(m: dict[str, float]) -> bool:
        return min(m["positives"], m["n"] - m["positives"]) >= 5 if "positives" in m else m["n"] >= 20

    known = {client: m["auroc"] for client, m in clients.items() if m is not None and is_enough(m)}
    return min(known.items(), key=lambda item: item[1]) if known else None
