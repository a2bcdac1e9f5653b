"""Keys that DeepSpeed would ignore are refused; those that it reads are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from feddra_ds.common.errors import ConfigError
from feddra_ds.config.deepspeed_keys import SECTIONS, known_deepspeed_keys, unknown_deepspeed_keys
from feddra_ds.config.load import from_dict, load

# What people bring from other trainers, every key of it read by DeepSpeed.
BROUGHT: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
    "aio": {"block_size": 1048576, "queue_depth": 8},
    "comms_logger": {"enabled": False, "prof_all": True},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "timers": {"throughput": {"enabled": True}},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "gradient_clipping": 1.0,
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "meant"),
    [
        ("zero_optimisation", {"stage": 1}, "zero_optimization"),
        ("zero_optimization.stge", 1, "zero_optimization.stage"),
        ("zero_optimization.stage3_max_live_params", 1, "zero_optimization.stage3_max_live_parameters"),
        ("zero_optimization.offload_optimizer.devise", "cpu", "zero_optimization.offload_optimizer.device"),
        ("offload_optimizer", {"device": "cpu"}, "zero_optimization.offload_optimizer"),  # known, but elsewhere
        ("gradient_cliping", 1.0, "gradient_clipping"),
        ("bf16.enable", True, "bf16.enabled"),
        ("activation_checkpointing.cpu_checkpoint", True, "activation_checkpointing.cpu_checkpointing"),
        ("elasticity", {"enabled": True}, "zero_optimization.elastic_checkpoint"),  # of other versions
        ("xyzzy", 1, None),
    ],
)
def test_a_key_that_deepspeed_would_ignore_is_refused_with_the_nearest(
    path: str, value: Any, meant: str | None
) -> None:
    for part in reversed(path.split(".")):
        value = {part: value}
    with pytest.raises(ConfigError) as raised:
        from_dict({"data": {"root": "x"}, "deepspeed": value})
    advice = "remove it" if meant is None else f"did you mean deepspeed.{meant}?"
    assert raised.value.problems == [f"deepspeed.{path}: DeepSpeed has no such key; {advice}"]


def test_a_file_of_another_trainer_passes_but_for_its_typo(tmp_path: Path) -> None:
    file, config = tmp_path / "ds.json", tmp_path / "c.yaml"
    config.write_text(f"data: {{root: x}}\ndeepspeed: {file}\n")
    file.write_text(json.dumps(BROUGHT))
    assert load(config).deepspeed["zero_optimization"]["stage"] == 3
    file.write_text(json.dumps(BROUGHT | {"gradient_clip": 1.0}))
    with pytest.raises(ConfigError, match=r"^deepspeed.gradient_clip: DeepSpeed has no such key"):
        load(config)


class Asking(dict[str, Any]):
    """A dictionary for DeepSpeed which notes what it is asked for."""

    def __init__(self, prefix: str, noted: set[str]):
        super().__init__()
        self.prefix, self.noted = prefix, noted

    def __contains__(self, key: object) -> bool:
        self.noted.add(f"{self.prefix}{key}")
        return False

    def get(self, key: str, default: Any = None) -> Any:
        self.noted.add(f"{self.prefix}{key}")
        return default

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asking:
        return self


@pytest.mark.slow
def test_deepspeed_itself_knows_these_keys_and_asks_for_no_others() -> None:
    """Against the imported DeepSpeed: the fields of its classes, and what it asks a dictionary for."""
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.runtime import config, precision_config, zero

    known = known_deepspeed_keys()
    places = {"DeepSpeedZeroConfig": zero.config, "DeepSpeedBF16Config": precision_config,
              "DeepSpeedFP16Config": precision_config}  # fmt: skip

    def fields(kind: type[BaseModel], prefix: str) -> set[str]:
        out = set()
        for name, info in kind.model_fields.items():
            for spelled in {name, info.alias or name}:
                out.add(prefix + spelled)
                for part in [info.annotation, *getattr(info.annotation, "__args__", ())]:
                    if isinstance(part, type) and issubclass(part, BaseModel):
                        out |= fields(part, f"{prefix}{spelled}.")
        return out

    for section in ("zero_optimization", "bf16", "fp16"):
        (kind,) = SECTIONS[section]
        below = {key for key in known if key.startswith(f"{section}.")}
        assert below == fields(getattr(places[kind], kind), f"{section}."), deepspeed.__version__
    noted: set[str] = set()
    config.DeepSpeedConfig._initialize_params(object.__new__(config.DeepSpeedConfig), Asking("", noted))
    elsewhere = {"writer"}  # of the section checkpoint, whose reader is handed the section
    assert len(noted) > 30
    assert noted - known - elsewhere == set()
    assert not list(unknown_deepspeed_keys(BROUGHT))
