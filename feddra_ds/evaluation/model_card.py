"""The README.md of an exported model: what it is, how it is loaded, what it was trained on, what was measured, its limits."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from feddra_ds import __version__
from feddra_ds.common.text import number, percent
from feddra_ds.common.tree import get_path
from feddra_ds.config.load import from_dict
from feddra_ds.evaluation.mixture import set_in_words
from feddra_ds.run.files import RunFiles, training_pairs

FILE_NAME = "README.md"
_FACTS = "<!-- what follows is of the training: an export of this folder keeps it -->"
_LIBRARIES = {"feddra": "feddra_ds", "onnx": "onnx", "adapter": "peft"}  # the others: transformers


def facts_of(source: Path, run: RunFiles | None, round_index: int | None, client: str, *, ema: bool) -> str:
    """The part of a card that does not depend on the form of the export, as Markdown.

    run: where the model comes from; None for an export, whose own card is carried on. client: whose model it is where
    each has its own, "" for the one that all share. ema: the average over rounds, of which `evaluate` keeps nothing.
    """
    if run is None:
        card = source / FILE_NAME
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if _FACTS in text:
            return text.partition(_FACTS)[2].strip()
    return _render(
        "facts",
        run=None if run is None else _training(run, round_index, client, ema=ema),
        measured=_measured(run, round_index, client, ema=ema),
    )


def write_card(folder: Path, kind: str, config: Mapping[str, Any], facts: str) -> str:
    """The whole card of what lies in `folder`. kind: the form of the export; config: the model's, as a dict."""
    from huggingface_hub import ModelCardData  # late: --help can do without

    head = ModelCardData(
        library_name=_LIBRARIES.get(kind, "transformers"),
        pipeline_tag="zero-shot-image-classification" if kind in ("feddra", "transformers") else "feature-extraction",
        tags=["feddra-ds", "federated-learning", "vision-language", "arxiv:2404.03854"],
    )
    sides = {side: _encoder_in_words(config[f"{side}_config"]) for side in ("vision", "text")}
    return _render(
        "card",
        head=head.to_yaml(),
        name=folder.name,
        folder=folder,
        kind=kind,
        config=config,
        sides=sides,
        version=__version__,
        marker=_FACTS,
        facts=facts,
    )


def _render(part: str, **values: Any) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {
        "number": number,
        "percent": percent,
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    template = resources.files("feddra_ds").joinpath(f"assets/model_{part}.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(values).strip() + "\n"


def _encoder_in_words(config: Mapping[str, Any]) -> str:
    blocks, width = config.get("num_hidden_layers"), config.get("hidden_size")
    shape = f", {blocks} blocks of {width}" if isinstance(blocks, int) and isinstance(width, int) else ""
    return f"{config['model_type']}{shape}"


def _training(run: RunFiles, round_index: int | None, client: str, *, ema: bool) -> dict[str, Any]:
    """What the run's files say of the model after a round, and of the clients then."""
    line = next((line for line in run.lines if line["round"] == round_index), {})
    values = _with_defaults(run.config)
    pairs, ids = training_pairs(run), line.get("client_ids", [])
    weights = line.get("client_weights", [None] * len(ids))
    losses, errors = (line.get(key) or [None] * len(ids) for key in ("client_losses", "client_losses_se"))
    return {
        "client": client,
        "ema": ema,
        "rounds": None if round_index is None else round_index + 1,
        "value": lambda key: get_path(values, key),
        "initial": {
            side: get_path(values, f"model.{side}.pretrained") or get_path(values, "model.pretrained")
            for side in ("vision", "text")
        },
        "clients": [
            {"id": name, "pairs": pairs.get(name), "p": weights[i], "loss": losses[i], "se": errors[i]}
            for i, name in enumerate(ids)
        ],
    }


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what it leaves out; as it is where it can no longer be read (a class of the user's that is not here)."""
    try:
        return from_dict(config).model_dump(mode="json")
    except ValueError:
        return config


def _measured(run: RunFiles | None, round_index: int | None, client: str, *, ema: bool) -> dict[str, Any] | None:
    """What `feddra-ds evaluate` kept of this very model; None where it kept nothing, or of another round."""
    if run is None or client or ema or not run.evaluation or run.evaluation.get("round") != round_index:
        return None
    result = run.evaluation
    rows = [(name, about) for name, about in result["clients"].items() if about.get("intervals")]
    if (result.get("pooled") or {}).get("intervals"):
        rows.append(("all that were trained on, in one gallery", result["pooled"]))
    mixture = result.get("worst_mixture")
    classified = {
        label: about["pooled"] for label, about in (result.get("zero_shot") or {}).items() if about.get("pooled")
    }
    return {
        "split": result["split"],
        "ks": sorted({one["k"] for _, about in rows for one in about["intervals"].values()}),
        "rows": rows,
        "worst": result.get("worst_client"),
        "mixture": mixture if mixture and mixture.get("recall@5") is not None else None,
        "mixture_set": set_in_words(mixture) if mixture and mixture.get("set") else None,
        "zero_shot": classified,
        "subgroup": (result.get("subgroups") or {}).get("worst"),
        "non_finite": bool((result.get("non_finite") or {}).get("weights")),
    }
