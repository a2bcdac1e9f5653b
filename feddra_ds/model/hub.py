"""Folders on the Hugging Face hub, or on another server that speaks its protocol (HF_ENDPOINT)."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download

from feddra_ds.common.text import first_line

_NOT_FETCHED = ["*.onnx", "*.onnx.data", "*.bin", "*.pt", "*.py"]  # other forms, and what could run code
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.onnx", "*.onnx.data"]


def is_id(name: str | Path) -> bool:
    """Whether `name` could be org/name on the hub: nothing of that name is here."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


def fetch(name: str) -> Path:
    """The folder of org/name, from the hub's cache where it is there. Raises ValueError, one line."""
    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_FETCHED))
    except Exception as error:  # what an HTTP client raises has no common type
        raise ValueError(
            f"{name} is not a folder here and could not be fetched from the Hugging Face hub: {first_line(error)}"
        ) from error


def check_can_push(name: str) -> None:
    """Raises ValueError where `name` is not org/name, or nobody is logged in."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(f"--push-to-hub: {name} is not of the form org/name")
    if not get_token():
        raise ValueError("--push-to-hub: needs a token of the Hugging Face hub; `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Upload a folder as org/name, in place of the weights that are there. Returns its address.

    A repository that is new is private; one that exists stays as visible as it was. Raises ValueError, one line.
    """
    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="feddra-ds export", delete_patterns=_WEIGHTS)
    except Exception as error:
        raise ValueError(
            f"--push-to-hub: {name} could not be written: {first_line(error)}; {folder} is whole, and can be uploaded again"
        ) from error
    return str(url)
