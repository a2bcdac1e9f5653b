"""The keys that the installed DeepSpeed reads, out of its sources, as it ignores those that it does not know.

Nothing of DeepSpeed is imported, which would take seconds: its config classes are pydantic models, and everything else it asks
of its dictionaries by constants. A section that stands in no row of SECTIONS is known by its name alone.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The files that read the whole dictionary, which they call param_dict or ds_config.
_READERS = (
    "runtime/config.py", "runtime/zero/config.py", "runtime/precision_config.py", "runtime/tensor_parallel/config.py",
    "runtime/activation_checkpointing/config.py", "runtime/swap_tensor/aio_config.py", "comm/config.py", "profiling/config.py",
    "utils/config.py", "datastates/config.py",
)  # fmt: skip
# Files with constants or config classes beside them.
_MORE = (
    "runtime/constants.py", "runtime/zero/offload_config.py", "runtime/zero/leaf_module_config.py",
    "runtime/zenflow/zenflow_config.py", "runtime/swap_tensor/constants.py", "runtime/model_checkpointing/constants.py",
    "runtime/model_checkpointing/config.py", "comm/constants.py", "profiling/constants.py", "compile/config.py",
)  # fmt: skip
# What it asks for by other ways than a constant's name.
_ALSO = (
    "autotuning", "comet", "communication_data_type", "csv_monitor", "data_efficiency", "tensorboard", "vocabulary_size", "wandb",
    "checkpoint.writer",
)  # fmt: skip
# What reads a section: a pydantic class, or the expressions under which it is asked for its keys.
SECTIONS: dict[str, tuple[str, ...]] = {
    "zero_optimization": ("DeepSpeedZeroConfig",),
    "bf16": ("DeepSpeedBF16Config",),
    "bfloat16": ("DeepSpeedBF16Config",),
    "fp16": ("DeepSpeedFP16Config",),
    "comms_logger": ("CommsLoggerConfig",),
    "compile": ("CompileConfig",),
    "timers": ("param_dict[TIMERS]",),
    "timers.throughput": ("DeepSpeedThroughputTimerConfig",),
    "activation_checkpointing": ("act_chkpt_config_dict",),
    "aio": ("aio_dict",),
    "checkpoint": ("checkpoint_params", "checkpoint_dict"),
    "checkpoint.parallel_write": ("par_write_params",),
    "data_types": ("data_types_params",),
    "flops_profiler": ("flops_profiler_dict",),
    "torch_autocast": ("param_dict[TORCH_AUTOCAST]",),
}


def known_deepspeed_keys() -> frozenset[str]:
    """Every key by dotted path, sections included; empty where DeepSpeed is not installed."""
    folder = _folder()
    return _keys(folder) if folder is not None else frozenset()


def unknown_deepspeed_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a dictionary for DeepSpeed that it would not read."""
    known = known_deepspeed_keys()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if known and key not in known:
            yield key
        elif isinstance(value, dict) and any(other.startswith(f"{key}.") for other in known):
            yield from unknown_deepspeed_keys(value, f"{key}.")


def _folder() -> Path | None:
    try:
        spec = find_spec("deepspeed")
    except ValueError:  # the process has forbidden it
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@dataclass
class _Sources:
    """What the sources define: constants that are text, and the fields (name → annotation) of classes; and all trees."""

    trees: dict[str, ast.Module]
    constants: dict[str, str] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tree in self.trees.values():
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                        self.constants[node.targets[0].id] = node.value.value
                elif isinstance(node, ast.ClassDef):
                    self.classes[node.name] = node

    def asked(self, *expressions: str, files: tuple[str, ...] | None = None) -> set[str]:
        """The keys that are asked of a dictionary that goes by these expressions."""
        found: set[str] = set()
        for name in files or self.trees:
            for node in ast.walk(self.trees[name]):
                key = _key_asked(node, expressions)
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    found.add(key.value)
                elif isinstance(key, ast.Name) and key.id in self.constants:
                    found.add(self.constants[key.id])
        return found

    def fields(self, kind: str, prefix: str) -> set[str]:
        """The fields of a pydantic class, by name and by alias, with those of the classes among them."""
        found: set[str] = set()
        for node in self.classes[kind].body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            names = {node.target.id}
            if isinstance(node.value, ast.Call):
                names |= {
                    word.value.value
                    for word in node.value.keywords
                    if word.arg == "alias"
                    and isinstance(word.value, ast.Constant)
                    and isinstance(word.value.value, str)
                }
            for name in names:
                found.add(prefix + name)
                for part in ast.walk(node.annotation):
                    if isinstance(part, ast.Name) and part.id in self.classes and self._has_fields(part.id):
                        found |= self.fields(part.id, f"{prefix}{name}.")
        return found

    def _has_fields(self, kind: str) -> bool:
        return any(isinstance(node, ast.AnnAssign) for node in self.classes[kind].body)


def _key_asked(node: ast.AST, expressions: tuple[str, ...]) -> ast.expr | None:
    """The key in `d[key]`, `d.get(key)`, `key in d`, `key in d.keys()` and `get_…_param(d, key, …)`."""
    of = lambda expression: ast.unparse(expression).removesuffix(".keys()") in expressions
    if isinstance(node, ast.Subscript) and of(node.value):
        return node.slice
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In) and of(node.comparators[0]):
        return node.left
    if isinstance(node, ast.Call) and node.args:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and of(node.func.value):
            return node.args[0]
        if len(node.args) > 1 and ast.unparse(node.func).startswith("get_") and of(node.args[0]):
            return node.args[1]
    return None


@functools.cache
def _keys(folder: Path) -> frozenset[str]:
    files = [name for name in (*_READERS, *_MORE) if (folder / name).is_file()]
    sources = _Sources({name: ast.parse((folder / name).read_text(encoding="utf-8")) for name in files})
    readers = tuple(name for name in _READERS if name in files)
    found = sources.asked("param_dict", "ds_config", files=readers)
    for key, by in SECTIONS.items():
        for source in by:
            if source in sources.classes:
                found |= sources.fields(source, f"{key}.")
            else:
                found |= {f"{key}.{name}" for name in sources.asked(source)}
    return frozenset(found.union(_ALSO))
