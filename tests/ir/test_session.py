"""Which provider a target is, and what its session is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt.errors import GraphoptError
from graphopt.ir import session as session_module
from graphopt.ir.session import PROVIDERS, open_session, providers


def large() -> ir.Model:
    """A model with a weight that is larger than what travels in the proto."""
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[2,32] x) => (float[2,32] y)
        <float[32,32] w = {{{", ".join(["0.5"] * 1024)}}}> {{ y = MatMul (x, w) }}"""
    )


@pytest.mark.parametrize(("target", "build"), [("cuda", "onnxruntime-gpu"), ("openvino", "onnxruntime-openvino")])
def test_a_missing_provider_says_what_to_install(target: str, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS["cpu"]])
    with pytest.raises(GraphoptError, match=PROVIDERS[target]) as caught:
        open_session(large(), target=target)
    assert build in (caught.value.help or "")


def test_an_unknown_target_names_the_others() -> None:
    with pytest.raises(GraphoptError, match="'tpu'") as caught:
        providers("tpu")
    assert caught.value.help == "targets are cpu, cuda, openvino"


def test_openvino_gets_its_threads_and_the_cpu_stands_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    assert providers("openvino", threads=2) == [
        (PROVIDERS["openvino"], {"device_type": "CPU", "num_of_threads": "2"}),
        PROVIDERS["cpu"],
    ]
    assert providers("openvino") == [(PROVIDERS["openvino"], {"device_type": "CPU"}), PROVIDERS["cpu"]]
    assert providers("cuda", threads=2) == [PROVIDERS["cuda"], PROVIDERS["cpu"]]


@pytest.mark.parametrize(("target", "shared"), [("cpu", True), ("openvino", False)])
def test_openvino_reads_weights_from_the_proto(target: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []

    class Recorded(session_module.Session):
        def __init__(self, proto: bytes, options: Any, providers: Any) -> None:
            given.append(proto)
            super().__init__(proto, options, providers=[PROVIDERS["cpu"]])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(session_module, "Session", Recorded)
    found = open_session(large(), target=target).run_feeds({"x": np.ones((2, 32), np.float32)})[0]
    np.testing.assert_allclose(found, 16.0)
    assert (len(given[0]) < 1024 * 4) == shared
