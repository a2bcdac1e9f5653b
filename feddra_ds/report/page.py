"""A run as one HTML page, the retrieval examples in it, several runs, and a search: no scripts, no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from feddra_ds import __version__
from feddra_ds.common.text import duration, listed, number, percent, size
from feddra_ds.evaluation import finite
from feddra_ds.report.charts import NUM_COLOURS, NUM_SHADES
from feddra_ds.report.contents import context
from feddra_ds.report.side_by_side import side_by_side
from feddra_ds.run.files import RunFiles

if TYPE_CHECKING:
    from feddra_ds.evaluation.search import Search


def examples_of(files: RunFiles, data: str | None, num: int, max_pairs: int, seed: int) -> dict[str, Any]:
    """{by_image, by_text, split, source, shared, non_finite: lines on what is not finite}, or {why, non_finite} where there
    are none."""
    if num == 0:
        return {"why": "They were left out (--examples 0).", "non_finite": spoilt_weights(files)}
    # late: these import torch and transformers, which a page without examples can do without
    from feddra_ds.evaluation.examples import retrieval_examples
    from feddra_ds.evaluation.gallery import open_split
    from feddra_ds.evaluation.models import open_models

    try:
        models = open_models(files.path)
        split = str(files.get("evaluation.split") or "val")
        root = models.data_root(data)
        dataset = open_split(models, root, split, None)
        by_image, by_text, spoilt = retrieval_examples(
            models, dataset, split, num_each=num, max_pairs=max_pairs, seed=seed
        )
    except (ValueError, OSError) as error:
        return {"why": f"There are none: {str(error).splitlines()[0]}", "non_finite": spoilt_weights(files)}
    source = models.source.relative_to(files.path) if models.source.is_relative_to(files.path) else models.source
    about = {"split": split, "source": str(source), "shared": models.shared, "non_finite": finite.in_words(spoilt)}
    return {"by_image": by_image, "by_text": by_text, **about}


def spoilt_weights(files: RunFiles) -> list[str]:
    """A line on the weights of a run's model/ that are not finite; none where all are."""
    spoilt = {
        f"{client}/{name}" if client else name: count
        for client, folder in files.models.items()
        for name, count in finite.of_folders([folder]).items()
    }
    return [finite.weights_in_words(spoilt)] if spoilt else []


def render(files: RunFiles, examples: dict[str, Any]) -> str:
    """The page of a run."""
    return filled("report.html.j2", context(files) | {"examples": examples})


def render_search(found: Search) -> str:
    """The page of a search: its pictures, best first."""
    spoilt = finite.in_words(found.non_finite)
    return filled("search.html.j2", {"found": found, "non_finite": spoilt, "version": __version__})


def render_runs(runs: Sequence[RunFiles], non_finite: Sequence[str]) -> str:
    """The page of several runs side by side. Raises ValueError for runs that cannot be shown so."""
    told = side_by_side(runs)
    columns = dict.fromkeys(column for row in told["rows"] for column in row["cells"])
    return filled("runs.html.j2", {"runs": told, "columns": list(columns), "non_finite": non_finite})


def filled(template: str, values: dict[str, Any]) -> str:
    """A template of assets/ with these values, and the colours that its styles need."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # late: `report --help` can do without
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("feddra_ds", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "duration": duration, "size": size, "listed": listed}
    environment.filters["bold"] = lambda text: Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text))))
    return environment.get_template(template).render(values | {"colours": NUM_COLOURS, "shades": NUM_SHADES})
