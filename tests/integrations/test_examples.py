"""The examples run as they are, for a few steps."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lightning_module": "lightning",
    "monai_2d": "monai",
    "monai_3d": "monai",
    "smp_unet": "segmentation_models_pytorch",
    "timm_features": "timm",
    "torchvision_deeplab": "torchvision",
}


@pytest.mark.filterwarnings("error:contrastseg_fast")  # an example shows what to do
@pytest.mark.parametrize("example", NEEDS)
def test_examples_run(example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip(NEEDS[example], reason=f"needs {NEEDS[example]}")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [example, "--steps", "2", "--size", "64", "--device", "cpu"])
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    value = re.search(r"pdcr(?:_step')?:? (-?\d+\.\d+)", last)
    assert value is not None, last
    assert 0 < float(value[1]) < 100
