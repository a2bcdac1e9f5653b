"""`feddra-ds data partition`: deals a dataset out over N clients by a Dirichlet draw over labels (the paper's split)."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feddra_ds.common.console import guarded, next_step, print_table, track
from feddra_ds.common.errors import DataError
from feddra_ds.data.format.dataset import Dataset, open_dataset
from feddra_ds.data.format.samples import Samples
from feddra_ds.data.format.writer import MAX_SHARD_BYTES, DatasetWriter, safe_name
from feddra_ds.data.loading.order import permutation, seeded
from feddra_ds.data.sources.table import nearest

_TRIES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data partition`."""
    add = parser.add_argument
    add("root", type=Path, metavar="ROOT", help="folder of the dataset to deal out; its splits stay as they are")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to make; it appears once everything is written")
    add("--num-clients", type=int, default=5, metavar="N", help="clients to make, client0 … (default %(default)s)")
    add("--label", metavar="NAME", help="label to deal by, or `site` (default: the only label, or the labels together)")
    add("--alpha", type=float, default=0.5, metavar="A", help="Dirichlet concentration: small = very different clients, "
        "large = alike (default %(default)s)")  # fmt: skip
    add(
        "--min-pairs",
        type=int,
        default=1,
        metavar="N",
        help="fewest train pairs per client; draws again until it holds",
    )
    add("--keep-clients", action="store_true", help="leave the clients as they are (with --shuffle-texts)")
    add("--shuffle-texts", action="store_true", help="a control: deal each client's train texts to its images at random; "
        "what is learned from this must be chance")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S", help="seed of the draw (default %(default)s)")
    add("--overwrite", action="store_true", help="replace DIR where it is a dataset already")


@dataclass(frozen=True)
class _Pair:
    part: Samples
    index: int
    info: dict[str, Any]


@guarded
def run(args: argparse.Namespace) -> int:
    """Deal out; prints a table of clients. Returns 0, or 2 with the problems on stderr."""
    problems = []
    if args.num_clients < 1:
        problems.append(f"--num-clients: must be at least 1, got {args.num_clients}")
    if not args.alpha > 0:
        problems.append(f"--alpha: must be above 0, got {args.alpha}")
    if args.keep_clients and not args.shuffle_texts:
        problems.append("--keep-clients: with nothing to change would copy the dataset; it goes with --shuffle-texts")
    if args.out.resolve() == args.root.resolve():
        problems.append("--out: must be another folder than ROOT")
    if problems:
        raise DataError(problems)
    dataset = open_dataset(args.root)
    pairs = _read(dataset, dataset.client_ids)
    owners = [pair.part.client for pair in pairs] if args.keep_clients else _deal(pairs, dataset, args)
    texts = _shuffled(pairs, owners, args.seed) if args.shuffle_texts else list(range(len(pairs)))
    held_out = [] if args.keep_clients is False else _read(dataset, dataset.held_out)

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with DatasetWriter(args.out, max_shard_bytes=MAX_SHARD_BYTES, overwrite=args.overwrite) as writer:
        kept = {k: v for k, v in dataset.info.items() if k in ("label_names", "label_columns", "image_size", "sites")}
        writer.info |= {"source": _describe(args, dataset), **kept}
        writer.held_out += dataset.held_out if held_out else []
        everything = [(pair, owner, pairs[t]) for pair, owner, t in zip(pairs, owners, texts, strict=True)]
        everything += [(pair, pair.part.client, pair) for pair in held_out]
        for pair, owner, told in track(everything, len(everything), "writing shards"):
            _copy(writer, pair, owner, told)
            counts[owner][pair.part.split] += 1
    splits = sorted({split for count in counts.values() for split in count}, key=["train", "val", "test"].index)
    print_table(f"{args.out}", ["client", *splits], [(c, *(n[s] for s in splits)) for c, n in sorted(counts.items())])
    next_step(f"feddra-ds data inspect {args.out}",
              f"feddra-ds train --config cxr_regions --data.root {args.out} "
              f"--run.output_dir runs/{Path(args.out).name}")  # fmt: skip
    return 0


def deal(units: Sequence[tuple[str, int]], num_clients: int, alpha: float, min_pairs: int, seed: int) -> np.ndarray:
    """Which client gets each unit: (units,) int64. units: (label, train pairs) each.

    For every label a Dirichlet(alpha) draw over the clients gives the share of the label's pairs that each is due; the
    label's units, in a seeded order, are then dealt to whoever is furthest behind its due. Drawn again until every
    client has `min_pairs` train pairs. Raises DataError when that does not happen.
    """
    by_label: dict[str, list[int]] = defaultdict(list)
    for number, (label, _) in enumerate(units):
        by_label[label].append(number)
    best = 0
    for attempt in range(_TRIES):
        key = np.frombuffer(seeded("dirichlet", seed, attempt)[:16], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        owner = np.zeros(len(units), dtype=np.int64)
        sizes = np.zeros(num_clients, dtype=np.int64)
        for label in sorted(by_label):
            members = by_label[label]
            weight = np.array([max(1, units[m][1]) for m in members])
            due = rng.dirichlet(np.full(num_clients, alpha)) * weight.sum()
            for m in permutation(len(members), "deal", seed, attempt, label).tolist():
                client = int(np.argmax(due))
                owner[members[m]] = client
                due[client] -= weight[m]
                sizes[client] += units[members[m]][1]
        if sizes.min() >= min_pairs:
            return owner
        best = max(best, int(sizes.min()))
    raise DataError(
        f"--min-pairs: no draw of {_TRIES} gives every client {min_pairs} train pairs (the best gave {best}); "
        "raise --alpha, or lower --min-pairs or --num-clients"
    )


def _read(dataset: Dataset, clients: Sequence[str]) -> list[_Pair]:
    parts = [dataset.samples(client, split) for client in clients for split in dataset.splits(client)]
    return [_Pair(part, i, part.read_info(i)) for part in parts for i in range(len(part))]


def _deal(pairs: list[_Pair], dataset: Dataset, args: argparse.Namespace) -> list[str]:
    """The new client of each pair. A patient's pairs go to one client, by the patient's most frequent label."""
    labels = [_label(pair.info, args.label) for pair in pairs]
    if all(label is None for label in labels):
        names = sorted({name for pair in pairs for name in pair.info.get("labels") or {}} | {"site"})
        near = nearest(args.label or "", names) or "."
        raise DataError(
            f"--label: no pair under {dataset.root} has {args.label or 'labels'}{near} There are: {', '.join(names)}"
        )
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        patient = pair.info.get("patient")
        members[("patient", f"{patient}") if patient else ("pair", str(number))].append(number)
    units = []
    for own in members.values():
        label = Counter(labels[i] or "none" for i in own).most_common(1)[0][0]
        units.append((label, sum(pairs[i].part.split == "train" for i in own)))
    owner = deal(units, args.num_clients, args.alpha, args.min_pairs, args.seed)
    width = len(str(args.num_clients - 1))
    out = [""] * len(pairs)
    for client, own in zip(owner.tolist(), members.values(), strict=True):
        for i in own:
            out[i] = f"client{client:0{width}d}"
    return out


def _label(info: dict[str, Any], name: str | None) -> str | None:
    labels = info.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    if name == "site":
        return info.get("site")
    if name is not None:
        value = labels.get(name)
        return None if value is None else str(value)
    told = [f"{key}={value}" for key, value in sorted(labels.items()) if value not in (None, 0, False, "")]
    return "|".join(told) if labels else None


def _shuffled(pairs: list[_Pair], owners: list[str], seed: int) -> list[int]:
    """For each pair the one whose text it gets: another train pair of the same client; itself outside of train."""
    out = list(range(len(pairs)))
    for client in sorted(set(owners)):
        own = [i for i, owner in enumerate(owners) if owner == client and pairs[i].part.split == "train"]
        order = permutation(len(own), "shuffle", seed, client).tolist()
        following = {
            own[order[k]]: own[order[(k + 1) % len(order)]] for k in range(len(order))
        }  # one cycle: none keeps its own
        for i in own:
            out[i] = following[i]
    return out


def _copy(writer: DatasetWriter, pair: _Pair, owner: str, told: _Pair) -> None:
    part, index = pair.part, pair.index
    image, text = part.read_image(index), told.part.read_text(told.index)
    suffix = "png" if image is not None and image.startswith(b"\x89PNG") else "jpg"
    key = safe_name(f"{part.client}-{part.keys[index]}")
    writer.add(owner, part.split, key, image=image, suffix=suffix,
               text=None if text is None else text.decode(errors="replace"), info=pair.info)  # fmt: skip


def _describe(args: argparse.Namespace, dataset: Dataset) -> str:
    how = (
        []
        if args.keep_clients
        else [f"{args.num_clients} clients, Dirichlet {args.alpha} over {args.label or 'all labels'}"]
    )
    how += ["texts shuffled (a control)"] if args.shuffle_texts else []
    return f"{dataset.info.get('source', dataset.root.name)}; {', '.join(how)}, seed {args.seed}"
