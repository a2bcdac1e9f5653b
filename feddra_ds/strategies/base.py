"""What a strategy may decide; the round loop asks these questions and nothing else.

N: number of clients. Slices: a part's fp32 masters on this rank, flat tensors; ranks of equal slot rank hold equal
slices in every slot, so whatever is done element by element needs no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from feddra_ds.strategies import robust_weights
from feddra_ds.strategies.mixture_set import MixtureSet, Vector
from feddra_ds.strategies.options import DroOptions, StrategyOptions

if TYPE_CHECKING:
    from torch import Tensor

    from feddra_ds.objectives.features import Features

Draws = NDArray[np.int64]
"""How often each client was drawn for a round, (N,); those of 0 do not train."""

SliceState = dict[str, list["Tensor"]]
"""What a hook keeps from call to call, by a name of its own: tensors of the sizes of the part's slices. It is saved with every
checkpoint, and loads at another number of ranks."""


@dataclass(frozen=True)
class Averaged:
    """How the mean that a server's step follows came about."""

    num_steps: int
    """Local steps of the stage that was averaged."""
    learning_rate: float
    """Of the clients' optimizers in these steps."""
    share: float = 1.0
    """Σ of the weights of the clients in the mean, of a sum of 1 over all clients: below 1 where some took no part."""
    drift: float = 0.0
    """What `Strategy.fold_drifts` made of how far the clients went."""


def kept(state: SliceState, name: str, like: list[Tensor], value: float = 0.0) -> list[Tensor]:
    """What a hook keeps under a name: at first tensors like `like`, filled with a value."""
    if name not in state:
        state[name] = [x.new_full(x.shape, value) for x in like]
    return state[name]


class Strategy:
    """One shared model, averaged with weights p that follow equation (4). Yours is a subclass, named in strategy.name.

    `Options` holds its keys, a subclass of StrategyOptions; `presets` the values that it gives keys of other sections
    where the user gives none, as nested dicts.
    """

    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    averages: ClassVar[bool] = True
    """The server averages the clients' models; False: each client keeps its own."""
    pools_data: ClassVar[bool] = False
    """One client that holds everybody's data."""
    num_outer: ClassVar[int] = 0
    """How many tensors like the model `server_step` keeps on each rank, for the memory plan."""
    num_kept: ClassVar[int] = 0
    """How many tensors like the model each client keeps between stages, for the memory plan."""

    draws_by_weight: ClassVar[bool] = False
    """The clients of a round are drawn by p, with replacement: clients.per_round draws, or as many as there are clients."""
    takes_snapshot: ClassVar[bool] = False
    """p follows the losses, not of the new global model, but of the clients' mean after a random local step of the round."""

    def __init__(self, options: Any, dro: DroOptions):
        """options: an instance of `Options`; dro: the config's section of that name."""
        self.options, self.dro = options, dro

    def problems(self, config: Any) -> list[str]:
        """What of a valid config this strategy cannot work with: a line each, the key first, with the remedy.

        config: an instance of feddra_ds.config.schema.Config.
        """
        return []

    def step_factor(self, num_owners: int) -> int:
        """How many times the schedule's local steps each client takes, from the number of data owners."""
        return 1

    # ---- the weights p: pure, float64
    def center(self, num_samples: Sequence[int]) -> Vector:
        """c of equation (4), (N,), from every client's number of training pairs."""
        if self.dro.center == "samples":
            return robust_weights.samples_center(num_samples)
        return robust_weights.uniform_center(len(num_samples))

    def first_mixture(self, center: Vector) -> Vector:
        """p of the first round, (N,)."""
        fixed = self.dro.fixed_weights
        return center.copy() if fixed is None else np.asarray(fixed, dtype=np.float64)

    def mixture_set(self, center: Vector) -> MixtureSet:
        """Where p may move around the centre, (N,)."""
        dro = self.dro
        return robust_weights.set_around(
            center, dro.set, dro.radius, dro.radius_share, minimum=dro.minimum_weight, maximum=dro.maximum_weight
        )

    def next_mixture(self, p: Vector, losses: Vector, center: Vector) -> Vector:
        """p of the next round, (N,), from the losses L_i of the new global model, (N,) in the scale of step_size.

        A loss of NaN says that its client has none to go by, so that its p_i is kept.
        """
        unknown = np.isnan(losses)
        if self.dro.fixed_weights is not None or unknown.all():
            return p
        return self.mixture_set(center).step(
            p,
            np.where(unknown, 0.0, losses),
            step_size=self.dro.step_size,
            ascent=self.dro.ascent,
            kept=np.where(unknown, p, np.nan) if unknown.any() else None,
        )

    def average_weight(self, p: Vector, draws: Draws) -> Vector:
        """Weights of the server's average, (N,): p, or uniform where p acts in the loss alone (dro.apply).

        draws: those of the round. The sum is taken over the clients that are averaged.
        """
        return np.full(len(p), 1.0 / len(p)) if self.dro.apply == "loss" else p

    def loss_weight(self, p: Vector, index: int) -> float:
        """Factor of client `index`'s whole loss: N p_i where dro.apply says so, else 1."""
        return float(len(p) * p[index]) if self.dro.apply in ("loss", "both") else 1.0

    def fold_drifts(self, weights: Vector, losses: Vector, squares: Vector) -> float:
        """One number for `server_step` of how far the clients went, as `Averaged.drift`; overridden, it is asked for.

        Of the n clients that are averaged, (n,) each: their weights, of sum 1; L_i of the newest global model that has been
        measured, NaN where it is not known; ‖w_i − w_global‖² over the parts that the stage trains.
        """
        return 0.0

    # ---- a client's loss
    def added_loss(self, features: Features, anchors: Features, previous: Features) -> Tensor:
        """(B,) what each pair's loss has beside the objective's, with a gradient by `features`. Overridden, it is asked for.

        features: this rank's pairs under the model that trains, the others without gradient; anchors: under the global
        model; previous: under what the client itself had made of the model in the last round that it trained in. Before a
        client's first such round it is not asked for. It is stated for the two directions' sum (Objective.loss_scale).
        """
        raise NotImplementedError

    # ---- the weights of the model: slices of one part at a time
    def begin_stage(self, start: list[Tensor], state: SliceState, outer: SliceState) -> None:
        """Before a client's first step of a stage, where `correct` is overridden. start, state: as there.

        outer: copies of what `server_step` keeps, on the same device.
        """

    def end_stage(
        self, live: list[Tensor], start: list[Tensor], state: SliceState, *, learning_rate: float, num_steps: int
    ) -> None:
        """After a client's last step of a stage, where its update can be averaged. num_steps: those that changed the weights."""

    def correct(self, live: list[Tensor], start: list[Tensor], state: SliceState, *, learning_rate: float) -> None:
        """After each local step: change a client's live slices in place (a proximal pull, a control variate).

        start: the slices that the stage started from, on the same device; state: this client's, kept from stage to stage.
        """

    def server_step(self, old: list[Tensor], mean: list[Tensor], state: SliceState, about: Averaged) -> list[Tensor]:
        """After the average: the new global slices from the old ones and the clients' mean (momentum, Adam, an outer step).

        On the host, every rank its own slices; state: the server's, for this part; about: the stage that gave the mean.
        """
        return mean

    @property
    def adds_loss(self) -> bool:
        """Whether `added_loss` is asked for: a client's last model is kept, and each stage begins with two more forwards."""
        return type(self).added_loss is not Strategy.added_loss

    @property
    def corrects(self) -> bool:
        """Whether `correct` does anything: each call costs a refresh of the working weights."""
        return type(self).correct is not Strategy.correct

    @property
    def folds_drifts(self) -> bool:
        """Whether clients measure how far they went: a norm over all slices of a slot."""
        return type(self).fold_drifts is not Strategy.fold_drifts

    @property
    def steps(self) -> bool:
        """Whether `server_step` does anything."""
        return type(self).server_step is not Strategy.server_step
