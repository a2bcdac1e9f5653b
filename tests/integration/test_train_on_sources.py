"""What was converted from DICOM pictures inside Parquet trains: one round over two clients."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pydicom
from helpers import metrics_of, on_each, run_all, tree
from pydicom.data import get_testdata_file

from feddra_ds.cli import main


def dicom(number: int) -> bytes:
    """A 12-bit picture with a window, made of pydicom's own MR, its rows rolled by `number`."""
    ds = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    ds.PixelData = np.roll(ds.pixel_array, number, axis=0).tobytes()
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


def test_dicom_inside_parquet_trains_for_a_round(tmp_path: Path) -> None:
    table = {
        "picture": [{"bytes": dicom(n), "path": f"{n}.dcm"} for n in range(32)],
        "report": [f"FINDINGS: shifted by {n} rows. IMPRESSION: normal" for n in range(32)],
        "site": [f"s{n % 2}" for n in range(32)],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    words = "--image-column picture --text-column report --client-column site --sections findings --val-fraction 0.25"
    out = tmp_path / "data"
    words += f" --from parquet --path {tmp_path}/t.parquet --out {out}"
    assert main(["data", "convert", *words.split()]) == 0
    config = tree(out, tmp_path / "run", schedule__rounds=1, dro__evaluation_pairs=8, dro__evaluation_batch_size=4)
    on_each(run_all, [(config,)])
    (line,) = metrics_of(tmp_path / "run")
    assert line["client_ids"] == ["s0", "s1"]
    assert np.isfinite(line["client_losses"]).all()
    assert not any(line["skipped_samples"].values())
