"""What strategies that keep something, or look at other models, cannot work with: a line each, the key first, with the remedy."""

from __future__ import annotations

from typing import Any


def clients_undo_the_step(config: Any) -> list[str]:
    """A line where stage 2 starts beside the global model that the server's step after stage 1 has made.

    The clients' mean after stage 2 would then take that step back. config: as for Strategy.problems.
    """
    schedule = config.schedule
    both_stages = schedule.stage1_steps > 0 and schedule.stage2_steps > 0
    if not (both_stages and schedule.stage2_start == "client" and config.aggregate.after_stage1):
        return []
    return [
        f"schedule.stage2_start: with client, stage 2 takes back what the server's step of strategy.name={config.strategy.name} "
        "did after stage 1; use global, or aggregate.after_stage1=false"
    ]


def adapters_are_not(config: Any, rules: tuple[str, ...], why: str) -> list[str]:
    """A line where the rule by which adapters are averaged is none of these; why: what of the strategy it does not go with."""
    rule = (config.model.adapter or {}).get("aggregation") or rules[0]
    if rule in rules:
        return []
    remedy = f"{', '.join(rules[:-1])} or {rules[-1]}"
    return [f"model.adapter.aggregation: {rule} does not go with {why}; use {remedy}"]


def factors_are_new(config: Any) -> list[str]:
    """A line where the average gives adapters other factors each round, so that nothing kept of the old ones fits them."""
    if (config.model.adapter or {}).get("aggregation") != "product":
        return []
    return [
        f"model.adapter.aggregation: product gives each average new factors, which what strategy.name={config.strategy.name} "
        "keeps of the old ones does not fit; use factors or freeze_a"
    ]
