"""The worst mixture of the clients over pairs that were not trained on: what the robust weights' problem asks a model for.

N clients that were trained on; n pairs of a gallery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from feddra_ds import objectives
from feddra_ds.common.errors import ConfigError
from feddra_ds.run.files import RunFiles
from feddra_ds.strategies import robust_weights
from feddra_ds.strategies.mixture_set import MixtureSet, SetKind

if TYPE_CHECKING:
    from feddra_ds.evaluation.gallery import Gallery
    from feddra_ds.objectives import Objective

RECALL = "recall@5"
KINDS = {"chi2": "χ² ball", "kl": "KL ball", "cvar": "CVaR", "simplex": "simplex"}
_K = 5
_BATCH_SIZE = 32  # of the losses, where there is no run to say
DEFAULT_SET = "chi2:1"  # where there is no run to say, or its set is its centre alone


@dataclass(frozen=True)
class Measured:
    """The mean of a number over a client's pairs, and (draws,) means over resamplings of whole groups."""

    value: float
    drawn: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[np.float64], groups: Sequence[str], draws: int, seed: int) -> Measured:
        """values: (n,); groups: n keys of what is resampled together. Shares that are all 0 or all 1 say nothing of their
        spread: they are drawn from Jeffreys' distribution for as many trials as groups."""
        rng, mean = np.random.default_rng(seed), float(values.mean())
        _, member = np.unique(np.array(groups), return_inverse=True)
        sums, sizes = np.bincount(member, values), np.bincount(member)
        if np.ptp(values) == 0 and mean in (0.0, 1.0):
            hits = mean * len(sums)
            return cls(mean, rng.beta(hits + 0.5, len(sums) - hits + 0.5, draws))
        chosen = (rng.integers(0, len(sums), len(sums)) for _ in range(draws))
        return cls(mean, np.array([sums[i].sum() / sizes[i].sum() for i in chosen]))


def objective_of(run: RunFiles) -> Objective | None:
    """The run's objective; None where that is a class that is not here."""
    try:
        options = objectives.find(run.get("objective.name")).Options.model_validate(run.config["objective"])
        return objectives.build(options)
    except (ConfigError, ValidationError, KeyError, TypeError):
        return None


def set_of(run: RunFiles, center: NDArray[np.float64]) -> MixtureSet:
    """The set in which the run's p moves, around `center` (N,). An older run, whose config names no set, has the χ² ball."""
    kind: SetKind = run.get("dro.set") or "chi2"
    radius, share = run.get("dro.radius"), run.get("dro.radius_share")
    return robust_weights.set_around(
        center,
        kind,
        1.0 if radius is None else float(radius),
        share,
        minimum=float(run.get("dro.minimum_weight") or 0.0),
        maximum=run.get("dro.maximum_weight"),
    )


def center_of(run: RunFiles | None, num_samples: Sequence[int]) -> NDArray[np.float64]:
    """The centre of the run's set, (N,), from every client's number of training pairs; uniform where they have none."""
    if run is not None and run.get("dro.center") == "samples" and min(num_samples) > 0:
        return robust_weights.samples_center(num_samples)
    return robust_weights.uniform_center(len(num_samples))


def named_set(text: str, num_clients: int) -> MixtureSet:
    """`chi2:1`, `kl:0.5`, `cvar:1` or `simplex`, around the uniform centre. Raises ValueError, which names --worst-over."""
    kind, _, radius = text.partition(":")
    try:
        return MixtureSet(kind, float(radius) if kind != "simplex" else 0.0, robust_weights.uniform_center(num_clients))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"--worst-over: must be chi2:RADIUS, kl:RADIUS, cvar:RADIUS or simplex, got {text!r}"
        ) from error


def set_in_words(told: Mapping[str, Any]) -> str:
    """The set of a measured worst mixture: `χ² ball, ρ = 1, p from 0.1 to 3 times the centre`."""
    about = told["set"]
    out = KINDS[about["kind"]] + ("" if about["kind"] == "simplex" else f", ρ = {about['radius']:.3g}")
    if about["minimum"] > 0 or about["maximum"] is not None:
        most = "" if about["maximum"] is None else f" to {about['maximum']:g}"
        out += f", p from {about['minimum']:g}{most} times the centre"
    return out


def chance_in_words(told: Mapping[str, Any]) -> str:
    """`; by chance the loss is 6.93`; empty for evaluations of older versions, and where there is no loss."""
    chance = told.get("loss_by_chance")
    return "" if chance is None else f"; by chance the loss is {chance:.2f}"


def mixture_rows(told: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, {"loss": {value, low, high}, "recall@5": …}) of a measured worst mixture and what it stands beside."""
    mixture = {name: {"value": told.get(name)} | interval for name, interval in told["intervals"].items()}
    names = dict.fromkeys(about["id"] for about in told["worst_client"].values())
    return [
        ("worst mixture", mixture),
        (f"worst client ({' / '.join(names)})", told["worst_client"]),
        ("mean of the clients", told["mean"]),
        *((f"{name} (held out)", about) for name, about in told["held_out"].items()),
    ]


def pair_losses(gallery: Gallery, objective: Objective, batch_size: int) -> NDArray[np.float64]:
    """L_i of a gallery, pair by pair, in batches of one size, as chance depends on it.

    The pairs beyond the last whole batch are left out; which they are is up to the gallery's seeded order.
    """
    import torch  # late, as in what is imported here: the report reads runs without it

    whole = len(gallery) // batch_size * batch_size
    image, text, ids = (torch.from_numpy(x[:whole]) for x in (gallery.image, gallery.text, gallery.text_ids))
    losses = [torch.zeros(0, dtype=torch.float64)]
    with torch.no_grad():
        for i in range(0, whole, batch_size):
            part = slice(i, i + batch_size)
            features = objectives.Features(image[part], text[part], temperature=gallery.temperature)
            losses.append(objective.per_pair(features, ids[part]).double())
    return torch.cat(losses).numpy()


def pair_hits(gallery: Gallery) -> NDArray[np.float64]:
    """Recall@5, pair by pair, the mean of both directions; empty where the gallery has no more than five texts."""
    found = gallery.ranks
    return found.hits("mean", _K) if _K in found.cutoffs else np.zeros(0)


def measure_mixture(
    galleries: Mapping[str, Gallery],
    held_out: Sequence[str],
    run: RunFiles | None,
    num_samples: Mapping[str, int],
    *,
    worst_over: str | None,
    draws: int,
    seed: int,
) -> dict[str, Any] | None:
    """Loss and recall@5 under the worst mixture of the clients that are not held out, beside their mean, the worst client
    and the held-out ones, as a JSON-ready dict; None for fewer than two clients.

    num_samples: training pairs by client. worst_over: see named_set; None for the run's own set, or DEFAULT_SET where
    that is its centre alone. Intervals resample within each client, with the mixture's weights held. `losses` has L_i of
    every client with a whole batch of pairs, held-out ones too; `loss_by_chance` is that of a model that knows nothing.
    Where the loss of any of the clients is not finite (`loss_not_finite`) there is no mixture by loss.
    """
    insiders = [name for name in galleries if name not in held_out]
    if len(insiders) < 2:
        return None
    inside = named_set(worst_over or DEFAULT_SET, len(insiders))
    if run is not None and worst_over is None:
        own = set_of(run, center_of(run, [num_samples.get(name, 0) for name in insiders]))
        inside = inside if own.is_point else own
    objective = None if run is None else objective_of(run)
    batch_size = int((run.get("dro.evaluation_batch_size") if run is not None else None) or _BATCH_SIZE)
    losses: dict[str, Measured] = {}
    hits: dict[str, Measured] = {}
    endless: list[str] = []
    for i, (client, gallery) in enumerate(galleries.items()):
        for out, values in (
            (losses, np.zeros(0) if objective is None else pair_losses(gallery, objective, batch_size)),
            (hits, pair_hits(gallery)),
        ):
            if not np.isfinite(values).all():
                endless.append(client)
            elif values.size:
                out[client] = Measured.of(values, gallery.groups[: values.size], draws, seed + i)
    whole = not any(name in endless for name in insiders)  # a mixture that left those out would be too good
    found = {
        "loss": _worst_of(losses, insiders, inside, 1.0) if whole else None,
        RECALL: _worst_of(hits, insiders, inside, -1.0),
    }
    if not any(found.values()):
        return None
    parts = lambda key: {name: about[key] for name, about in found.items() if about}
    outside = {
        name: {what: _mixed([1.0], [of[name]]) for what, of in (("loss", losses), (RECALL, hits)) if name in of}
        for name in galleries
        if name in held_out
    }
    return {
        **{name: about["mixture"]["value"] if about else None for name, about in found.items()},
        "intervals": {name: {"low": e["low"], "high": e["high"]} for name, e in parts("mixture").items()},
        "weights_by_loss": parts("weights").get("loss"),
        "weights_by_recall": parts("weights").get(RECALL),
        "mean": parts("mean"),
        "worst_client": parts("worst_client"),
        "held_out": outside,
        "set": {"kind": inside.kind, "radius": inside.radius, "minimum": inside.minimum, "maximum": inside.maximum},
        "loss_batch_size": batch_size,
        "loss_by_chance": None if objective is None else objective.chance(batch_size),
        "losses": {client: measured.value for client, measured in losses.items()},
        "too_few_pairs": parts("too_few_pairs"),
        "loss_not_finite": endless,
    }


def _worst_of(
    scores: Mapping[str, Measured], insiders: Sequence[str], inside: MixtureSet, sign: float
) -> dict[str, Any] | None:
    """The worst mixture by sign × score, the mean and the worst client; None where fewer than two have a score."""
    known = [name for name in insiders if name in scores]
    if len(known) < 2:
        return None
    of_known = [scores[name] for name in known]
    badness = sign * np.array([one.value for one in of_known])
    p = inside.among([name in scores for name in insiders]).worst(badness)
    worst = int(np.argmax(badness))
    return {
        "mixture": _mixed(p, of_known),
        "weights": {name: float(w) for name, w in zip(known, p, strict=True)},
        "mean": _mixed(np.full(len(known), 1 / len(known)), of_known),
        "worst_client": {"id": known[worst]} | _mixed([1.0], [of_known[worst]]),
        "too_few_pairs": [name for name in insiders if name not in scores],
    }


def _mixed(weights: ArrayLike, measured: Sequence[Measured]) -> dict[str, float]:
    """{value, low, high}: Σ weights × values with its 95 % interval."""
    w = np.asarray(weights)
    low, high = np.quantile(w @ np.stack([one.drawn for one in measured]), (0.025, 0.975))
    return {"value": float(w @ [one.value for one in measured]), "low": float(low), "high": float(high)}
