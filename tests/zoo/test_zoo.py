"""The register of the zoo says what its files hold."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from graphopt.ir.session import open_session
from tests.zoo.models import CORE, FILES, NAMES, zoo_feeds, zoo_model

pytestmark = pytest.mark.torch
HERE = Path(__file__).parent


@pytest.mark.parametrize("module", [module for module, names in FILES.items() if names])
def test_each_file_holds_what_the_register_says(module: str) -> None:
    entries = importlib.import_module(f"tests.zoo.{module}").ENTRIES
    assert sorted(entries) == sorted(FILES[module])
    for name, entry in entries.items():
        assert name == name.lower().replace("_", "-")
        assert entry.purpose, name
        assert "\n" not in entry.purpose, name


def test_names_are_distinct_and_no_file_is_forgotten() -> None:
    assert len(set(NAMES)) == len(NAMES)
    files = {file.stem for file in HERE.glob("*.py") if "\nENTRIES" in file.read_text()}
    assert files == {module for module, names in FILES.items() if names}


def test_files_stay_alone() -> None:
    """The cache key of a model is its own file: it may import no other file of models."""
    for module in FILES:
        file = HERE / f"{module}.py"
        for line in file.read_text().splitlines() if file.exists() else ():
            if "tests.zoo" in line:
                assert line.startswith(("from tests.zoo.blocks import", "from tests.zoo.entry import")), (module, line)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CORE])
def test_the_model_runs_and_its_outputs_depend_on_its_inputs(name: str) -> None:
    model = zoo_model(name)
    session = open_session(model)
    first, second = (session.run_feeds(zoo_feeds(model, seed=seed)) for seed in (0, 1))
    assert all(np.isfinite(array).all() for array in (*first, *second) if array.dtype.kind == "f")
    assert any(a.shape != b.shape or not np.allclose(a, b) for a, b in zip(first, second, strict=True))
