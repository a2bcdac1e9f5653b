"""What others read of RUN/evaluation.json, which `feddra-ds evaluate` keeps (docs/json_output.md): what is not so is none."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0)]
_Some = _Number | None


class _Recall(TypedDict):
    k: _Count
    recall: _Share
    low: _Share
    high: _Share
    chance: _Share
    verdict: Annotated[str, Field(pattern=r"^\w")]


class _Gallery(TypedDict, total=False):
    pairs: Required[_Count]
    intervals: Required[dict[str, _Recall]]
    held_out: bool
    split: str


class _Bounds(TypedDict):
    low: _Some
    high: _Some


class _Interval(_Bounds):
    value: _Some


class _Worst(_Interval):
    id: str


class _Set(TypedDict):
    kind: Literal["chi2", "kl", "cvar", "simplex"]
    radius: _Number
    minimum: _Number
    maximum: _Some


class _Mixture(TypedDict, total=False):
    intervals: Required[dict[Literal["loss", "recall@5"], _Bounds]]
    weights_by_loss: Required[dict[str, _Number] | None]
    weights_by_recall: Required[dict[str, _Number] | None]
    mean: Required[dict[str, _Interval]]
    worst_client: Required[dict[str, _Worst]]
    held_out: Required[dict[str, dict[str, _Interval]]]
    set: Required[_Set]
    loss_by_chance: _Some


class _Bin(TypedDict):
    n: Annotated[int, Field(gt=0)]
    confidence: _Share
    accuracy: _Share


class _Calibration(TypedDict):
    ece: _Some
    bins: list[_Bin]


class _Measured(TypedDict, total=False):
    n: Required[_Number]
    auroc: Required[_Number]
    balanced_accuracy: Required[_Number]
    positives: _Number
    calibration: _Calibration | None


class _Label(TypedDict):
    pooled: _Measured
    classes: _Count
    clients: dict[str, _Measured | None]


_Value = TypedDict("_Value", {"pairs": Required[_Count], "recall@5": _Recall}, total=False)


class _Least(_Recall):
    field: str
    value: str


class _Subgroups(TypedDict):
    fields: dict[str, dict[str, _Value]]
    worst: _Least | None


class _NonFinite(TypedDict, total=False):
    weights: dict[str, _Count]
    pairs: dict[str, dict[str, list[str]]]


class _Evaluation(TypedDict, total=False):
    round: Required[_Count]
    split: Required[str]
    data: Required[str]
    clients: Required[dict[str, _Gallery]]
    pooled: Required[_Gallery | None]
    without_split: Required[list[str]]
    worst_mixture: _Mixture | None
    zero_shot: dict[str, _Label]
    subgroups: _Subgroups | None
    non_finite: _NonFinite


EVALUATION: TypeAdapter[Any] = TypeAdapter(_Evaluation)
