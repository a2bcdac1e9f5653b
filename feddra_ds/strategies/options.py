"""The keys that every strategy has: the config's sections `strategy` and `dro`. A strategy adds its own in its class."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from feddra_ds.common.section import MAY_CHANGE, Section


class StrategyOptions(Section):
    """Which federated algorithm runs."""

    name: str = "feddra"
    """The federated algorithm: a row of docs/strategies.md, or package.module:Class for your own, whose options join these.
    It presets other keys, which keys given by you override."""


class DroOptions(Section):
    """The robust weights p of equation (4): their set, their step, and the losses that move them."""

    set: Literal["chi2", "kl", "cvar", "simplex"] = "chi2"
    """Where p may move: a χ² ball (the paper) or KL ball of this radius, cvar (no p_i above (1 + radius) c_i), or anywhere."""
    radius: float = Field(1.0, ge=0)
    """ρ of equation (4); 0 pins the weights to the centre, (N − 1)/2 and more allows the whole simplex."""
    radius_share: float | None = Field(None, ge=0)
    """The radius as a share of the smallest one that allows the whole simplex, in place of radius: the same at any N."""
    ascent: Literal["projected", "from_center", "closed_form", "exponentiated"] = "exponentiated"
    """The step of p: projected (p + η L onto the set), from_center (c + η L onto it, which adds up no noise), closed_form
    (the worst mixture of the losses), or exponentiated (the release), which keeps a weight of 0 at 0 unless minimum_weight
    lifts it."""
    minimum_weight: float = Field(0.5, ge=0, le=1)
    """Least p_i, as a part of the centre c_i: from there a client that becomes the worst comes back within rounds."""
    maximum_weight: float | None = Field(1.5, ge=1)
    """Largest p_i, as a multiple of the centre c_i; null for no bound but the set's. It bounds what one client whose loss is
    high for want of data can cost the others (docs/experiments.md)."""
    step_size: float = Field(0.5, ge=0)
    """η of equation (4), stated for direction_reduction = sum (the release: 0.01 × 50)."""
    apply: Literal["aggregate", "loss", "both"] = "aggregate"
    """Where p acts: the server's average, the client's loss (almost a no-op under Adam), or both."""
    center: Literal["uniform", "samples"] = "uniform"
    """Centre c of the ball: 1/N, or each client's share of the training pairs."""
    fixed_weights: list[float] | None = None
    """Pins p, one weight per client in the order of the clients; null lets it move."""
    loss: Literal["alignment", "excess"] = "alignment"
    """What p follows: each client's loss, or what it has beyond the loss of a model trained on that client alone (reference)."""
    reference: str | None = Field(None, json_schema_extra=MAY_CHANGE)
    """Run folder of a finished strategy.name=local on the same clients, whose models dro.loss=excess compares with."""
    loss_smoothing: float = Field(0.0, ge=0, lt=1)
    """Weight of the earlier rounds in the losses that p follows: an exponential moving average; 0 takes each round's alone."""
    evaluation_pairs: int = Field(256, ge=1)
    """Most pairs of a client in the losses that move p; a smaller client gives all it has, in whole batches."""
    evaluation_batch_size: int = Field(32, ge=2)
    """Batch size of those losses, the same for every client (chance is 2 log of it)."""
    evaluate_on: Literal["val", "train", "anchors"] = "val"
    """Pairs of the losses that move p. val: the val split, or, for a client that has none, a slice kept out of its training.
    train: training pairs, whose loss falls by memorising. anchors: read off the next round's stage-1 anchor pass, no extra
    forward."""
    evaluation_sample: Literal["fresh", "fixed"] = "fresh"
    """Whether each round draws its own pairs (seeded), or all rounds have the same."""
    holdout_fraction: float = Field(0.1, gt=0, lt=1)
    """Part of the training pairs that a client without a val split keeps for its losses, a whole evaluation batch at least."""
