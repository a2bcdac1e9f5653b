"""A round's line of metrics.jsonl."""

from __future__ import annotations

from typing import Any, Required

from pydantic import ConfigDict
from typing_extensions import TypedDict

from feddra_ds.strategies.robust_weights import RobustGain


class RoundRecord(TypedDict, total=False):
    """What a run says of one round. Lists are in the order of client_ids; the last three keys are the coordinator's clock."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # of another version's run

    round: Required[int]
    """From 0."""
    client_ids: Required[list[str]]
    client_weights: Required[list[float]]
    """p used in this round."""
    next_client_weights: list[float] | None
    """p of the next round; null where it moves only at the next round's first average."""
    client_losses: Required[list[float | None]]
    """L_i of the new global model on the pairs of dro.evaluate_on; null for a client that was not heard of."""
    client_losses_se: list[float | None]
    """Their standard errors."""
    client_train_losses: list[float | None]
    """The same on training pairs, where L_i is not of them: what a client has memorised is the gap."""
    client_train_losses_se: list[float | None]
    reference_losses: list[float | None]
    """L_i of the client's own model (dro.reference) on the same pairs; null but for dro.loss = excess."""
    followed_losses: list[float | None]
    """What p follows: L_i where it can be believed, less its reference, smoothed; null where p_i is kept. With
    strategy.name = drfa it is that of a snapshot, not of the new global model."""
    mean_loss: Required[float | None]
    worst_loss: Required[float | None]
    update_norms: dict[str, float | None]
    """‖w_i − w_global‖ of what trained in the round's last stage; null where the client has no update, or nobody asks
    (aggregate.max_norm_ratio)."""
    update_cosines: dict[str, float]
    """The cosine of each update of the round's last stage to the others', the median over them; empty where they are not
    compared (aggregate.min_cosine, aggregate.rule = krum)."""
    anchor_gradient_ratio: dict[str, float | None]
    """How hard the anchors pull: ‖∂ λ₂ ANC‖ / ‖∂ λ₁ ITA‖ by the embeddings, at the last step of the round's last stage, where
    the client is furthest from the global model; null without anchors."""
    clipped_losses: list[dict[str, Any]]
    """{id, reported, used} of every loss that p did not follow as it was: above chance (used: chance), or not finite or
    negative (used: null, p_i is kept; a loss that is not finite is told as text)."""
    robust_gain: RobustGain | None
    """What p, after it has moved, makes of this round's losses, of the most that its set offers."""
    excluded_clients: Required[list[dict[str, str]]]
    """{id, reason} of every client that was left out of an average."""
    skipped_samples: dict[str, dict[str, int]]
    """Unreadable samples: {client: {reason: count}}."""
    skipped_steps: dict[str, dict[str, int]]
    """Local steps that changed nothing, as their loss or gradient was not finite: {client: {stage: count}}, of those with any."""
    present_clients: list[str]
    """Who trained, where clients are drawn, each as often as it was; the others are not in excluded_clients."""
    samples: int
    """Pairs trained on."""
    bytes_sent_per_rank: int
    """Most bytes that a rank handed to collectives over its peers."""
    peak_memory_bytes: list[int]
    """By rank: of the device where there is one, else resident on the host."""
    stage_bytes_sent: dict[str, int]
    """Of bytes_sent_per_rank, what the averages of a stage sent, by stage."""
    stage_memory_bytes: dict[str, int]
    """The most that a rank took in a stage, by stage: the device's peak, else what is resident on the host at its end."""
    val: dict[str, dict[str, float]]
    """Retrieval by gallery: {client or "all": {i2t_recall@1, …, chance@10, pairs}}."""
    seconds: float
    stage_seconds: dict[str, float]
    """By stage; that of `checkpoint` is what training waited for it."""
    checkpoint_writer_seconds: float | None
    """What the thread that writes took, beside training, for the checkpoint that it finished in this round; null: for none."""


Record = dict[str, Any] | RoundRecord
