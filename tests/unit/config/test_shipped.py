"""The shipped configs by name, and the commands that print them, their schema and their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from feddra_ds.cli import main
from feddra_ds.common.errors import ConfigError
from feddra_ds.config.load import class_of, known_keys, load
from feddra_ds.config.reference import reference
from feddra_ds.config.shipped import about, names

CONFIGS = Path(__file__).parents[3] / "configs"


def test_list_names_every_config_with_a_whole_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert names() == sorted(
        path.stem for path in CONFIGS.glob("*.yaml")
    )  # those of experiments/ are no configs to train
    assert main(["config", "list"]) == 0
    text = capsys.readouterr().out
    for name in names():
        assert any(line.split() == [name, *about(name).split()] for line in text.splitlines())
        assert about(name).endswith("."), f"the first line of {name}.yaml is cut off in the list"


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "quickstart.yaml").read_text()


def test_show_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["config", "show", "quickstrat"])
    assert stopped.value.code == 2
    assert "quickstart" in capsys.readouterr().err


def test_reference_prints_the_docs_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "reference"]) == 0
    assert capsys.readouterr().out == reference(class_of())


def test_a_bare_name_is_a_shipped_config_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # `make quickstart` leaves such a folder
    shipped = load("quickstart")
    assert shipped == load(CONFIGS / "quickstart.yaml")
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("data: {root: mine}\n")
    assert load("quickstart").data.root == "mine"


def test_a_config_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "quickstart")
    (line,) = caught.value.problems
    assert line.startswith(f"--config: cannot read {tmp_path}/quickstart: No such file")
    assert line.endswith(", ".join(names()))


def keys_of(node: dict[str, Any], definitions: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.key` → its schema, sections followed."""
    found: dict[str, Any] = {}
    for name, value in node["properties"].items():
        if "$ref" in value:
            found |= keys_of(definitions[value["$ref"].rpartition("/")[2]], definitions, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def test_the_schema_explains_every_key_and_allows_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["title"]
    found = keys_of(schema, schema["$defs"])
    assert set(found) == set(known_keys())
    for key, info in known_keys().items():
        assert found[key]["description"] == info.description
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))


def test_the_schema_knows_the_shipped_configs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "schema"])
    schema = json.loads(capsys.readouterr().out)
    for path in CONFIGS.glob("*.yaml"):
        for section, keys in yaml.safe_load(path.read_text()).items():
            about_section = schema["properties"][section]
            if "$ref" in about_section:
                assert set(keys) <= set(schema["$defs"][about_section["$ref"].rpartition("/")[2]]["properties"])


def test_schema_help_says_how_an_editor_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["config", "schema", "--help"])
    assert "# yaml-language-server: $schema=feddra_config.schema.json" in capsys.readouterr().out
