"""What quantization observes without data: the probes that everybody gets, as the user stated them."""

from __future__ import annotations

import pytest

from graphopt.errors import DataError
from graphopt.inputs.probes import InputSpec
from graphopt.inputs.source import Probes
from graphopt.passes.quantize_datafree import observe_probes
from tests.inputs.nets import conv_net


def test_what_is_stated_of_an_input_counts() -> None:
    net = conv_net(normalized=False)
    stated = {"x": InputSpec(low=0, high=255)}
    (plain, anchored), (known, _) = (
        observe_probes(net, ["x", "c1"], {}, histograms=False, threads=1, specs=specs) for specs in (None, stated)
    )
    assert anchored == set()
    assert -2.21 < plain["x"].minimum < 0 < plain["x"].maximum < 2.71
    assert known["x"].minimum >= 0
    assert 200 < known["x"].maximum <= 255
    assert known["c1"].std > 10 * plain["c1"].std
    with pytest.raises(DataError, match="no input named 'z'"):
        observe_probes(net, ["c1"], {}, histograms=False, threads=1, specs={"z": InputSpec()})


def test_the_probes_are_those_of_the_source() -> None:
    net = conv_net()
    found, anchored = observe_probes(net, ["x", "n1"], {}, histograms=True, threads=1)
    assert anchored == set()  # the statistics are known of what fold-batchnorm leaves, not of BatchNormalization itself
    values = [feeds["x"] for feeds in Probes().feeds(net, samples=128)]
    assert found["x"].count == sum(array.size for array in values)
    assert found["x"].maximum == pytest.approx(max(float(array.max()) for array in values))
    assert found["x"].histogram is not None
