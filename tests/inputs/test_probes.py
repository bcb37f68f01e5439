from __future__ import annotations

import time

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.inputs.probes import (
    KINDS,
    InputSpec,
    candidate_sizes,
    check_specs,
    probe_feeds,
    runnable_sizes,
    symbolic_sizes,
)
from graphopt.inputs.spectra import natural_images, pink_images, pink_noise
from graphopt.ir.session import open_session


def model(inputs: str, body: str = "y = Identity(x)", outputs: str = "float[m] y") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}')


def table(rows: int, body: str, inputs: str = "int64[batch, sequence] x") -> ir.Model:
    made = model(f"{inputs}, float[{rows}, 4] table", body, "float[a, b, 4] y")
    weight = made.graph.inputs.pop()
    weight.const_value = ir.tensor(np.zeros((rows, 4), np.float32))
    made.graph.register_initializer(weight)
    return made


def test_images_are_smooth_and_their_colours_correlated() -> None:
    x = probe_feeds(model("float[batch, 3, height, width] x"), sizes={"batch": 4, "height": 64, "width": 64})[0]["x"]
    assert x.shape == (4, 3, 64, 64)
    assert x.dtype == np.float32
    neighbours = np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1]
    colours = np.corrcoef(x[:, 0].ravel(), x[:, 1].ravel())[0, 1]
    assert neighbours > 0.6
    assert colours > 0.7
    assert abs(float(x.mean())) < 0.1
    assert 0.8 < float(x.std()) < 1.1
    assert -2.2 <= x.min() < -1
    assert 1 < x.max() <= 2.7


def test_images_have_edges_and_noise_has_none() -> None:
    made = model("float[16, 3, 32, 32] x")

    def fourth_moment(texture: str) -> float:
        steps = np.diff(probe_feeds(made, texture=texture)[0]["x"], axis=3)
        return float((steps**4).mean() / (steps**2).mean() ** 2)

    assert fourth_moment("leaves") > 8  # most neighbours are alike, a few are not
    assert fourth_moment("pink") == pytest.approx(3, abs=0.5)
    with pytest.raises(DataError, match=r"(?s)texture of images 'stripes'.*leaves, pink"):
        probe_feeds(made, texture="stripes")


def test_images_are_brighter_and_darker_ones() -> None:
    images = natural_images(np.random.default_rng(0), (64, 3, 32, 32), 1, (2, 3))
    assert images.mean() == pytest.approx(0)
    assert images.std() == pytest.approx(1)
    assert 0.2 < images.mean(axis=(1, 2, 3)).std() < 0.7


def test_large_images_show_the_same_scene() -> None:
    """The share of neighbours at a hundredth of the side that lie in one leaf does not depend on the size."""

    def alike(side: int) -> float:
        image = natural_images(np.random.default_rng(0), (12, 1, side, side), 1, (2, 3))
        return float(np.corrcoef(image[..., side // 16 :].ravel(), image[..., : -(side // 16)].ravel())[0, 1])

    assert alike(32) == pytest.approx(alike(192), abs=0.08)


def test_a_large_image_is_quickly_made() -> None:
    start = time.process_time()
    natural_images(np.random.default_rng(0), (4, 3, 224, 224), 1, (2, 3))
    assert time.process_time() - start < 4 * 0.3  # about 0.045 s an image on one core


@pytest.mark.parametrize("channels", [1, 2, 4, 64])
def test_any_number_of_channels_shares_the_leaves(channels: int) -> None:
    image = natural_images(np.random.default_rng(0), (40, channels, 16, 16), 1, (2, 3))
    assert image.shape == (40, channels, 16, 16)
    correlations = np.corrcoef(np.moveaxis(image, 1, 0).reshape(channels, -1)).reshape(channels, channels)
    apart = correlations[~np.eye(channels, dtype=bool)]
    assert channels == 1 or 0.45 < apart.mean() < 0.7


def test_leaves_of_a_video_move_a_little() -> None:
    video = natural_images(np.random.default_rng(0), (2, 3, 40, 24, 24), 1, (2, 3, 4))
    assert video.shape == (2, 3, 40, 24, 24)

    def alike(frames: int) -> float:
        return float(np.corrcoef(video[:, :, frames:].ravel(), video[:, :, :-frames].ravel())[0, 1])

    assert 0.85 < alike(1) < 0.9999
    assert alike(30) < alike(5) < alike(1)
    last = natural_images(np.random.default_rng(0), (2, 5, 16, 16, 3), 4, (1, 2, 3))
    assert last.shape == (2, 5, 16, 16, 3)


def test_lines_and_single_pixels_are_images_too() -> None:
    for shape, axes in (((3, 2, 50), (2,)), ((3, 2, 1, 1), (2, 3)), ((1, 3, 5, 1), (2, 3)), ((0, 3, 8, 8), (2, 3))):
        for images in (natural_images, pink_images):
            made = images(np.random.default_rng(0), shape, 1, axes)
            assert made.shape == shape
            assert np.isfinite(made).all()
    assert natural_images(np.random.default_rng(0), (4, 3), 1, ()).shape == (4, 3)


def test_amplitude_falls_as_one_over_frequency() -> None:
    noise = pink_noise(np.random.default_rng(0), (16, 4096), (1,))
    spectrum = np.abs(np.fft.rfft(noise, axis=1)).mean(axis=0)
    slope = np.polyfit(np.log(np.arange(8, 1024)), np.log(spectrum[8:1024]), 1)[0]
    assert -1.1 < slope < -0.9


def test_spatial_axes_in_any_order_and_channels_last() -> None:
    image = natural_images(np.random.default_rng(0), (2, 48, 32, 3), 3, (1, 2))
    assert image.shape == (2, 48, 32, 3)
    assert np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1] > 0.6


@pytest.mark.parametrize("dtype", ["float", "double", "float16", "bfloat16"])
def test_every_float_type(dtype: str) -> None:
    x = probe_feeds(model(f"{dtype}[2, 3, 16, 16] x", outputs=f"{dtype}[m] y"))[0]["x"]
    assert np.isfinite(x.astype(np.float32)).all()
    assert x.dtype.name == {"float": "float32", "double": "float64"}.get(dtype, dtype)


def test_tokens_stay_within_the_table_that_reads_them() -> None:
    made = table(7, "c = Cast<to=6>(x) y = Gather(table, c)")
    feeds = probe_feeds(made, sizes={"batch": 3, "sequence": 200})[0]
    assert feeds["x"].min() == 0
    assert feeds["x"].max() == 6
    open_session(made).run_feeds(feeds)


def test_masks_booleans_scalars_and_unknown_integers() -> None:
    feeds = probe_feeds(
        model("int64[b, s] attention_mask, bool[b] flag, int64 step, int32[b, s] x, uint8[b, 8, 8, 3] pixels")
    )[0]
    assert (feeds["attention_mask"] == 1).all()
    assert feeds["flag"].all()
    assert feeds["step"] == 1
    assert 0 <= feeds["x"].min() <= feeds["x"].max() < 8
    assert feeds["pixels"].max() > 200
    assert feeds["pixels"].dtype == np.uint8


def test_sound_is_pink_and_caches_are_gaussian() -> None:
    feeds = probe_feeds(model("float[b, samples] audio, float[b, 4, 16, 8] past_key_values, float[b, 12] x"))[0]
    assert feeds["audio"].shape == (1, 16000)
    assert np.corrcoef(feeds["audio"][0, 1:], feeds["audio"][0, :-1])[0, 1] > 0.5
    assert (
        abs(np.corrcoef(feeds["past_key_values"][..., 1:].ravel(), feeds["past_key_values"][..., :-1].ravel())[0, 1])
        < 0.3
    )


def test_pixel_values_are_an_image() -> None:
    made = model("float[2, 3, 32, 32] pixel_values, float[2, 3, 32, 32] past_key_values")
    feeds = probe_feeds(made)[0]
    alike = {name: np.corrcoef(x[..., 1:].ravel(), x[..., :-1].ravel())[0, 1] for name, x in feeds.items()}
    assert alike["pixel_values"] > 0.6
    assert alike["past_key_values"] < 0.1


def test_what_the_user_states_wins() -> None:
    made = model("float[1, 3, 32, 32] x")
    x = probe_feeds(made, specs={"x": InputSpec(low=0, high=255)})[0]["x"]
    assert 0 <= x.min() <= x.max() <= 255
    assert 110 < x.mean() < 145
    x = probe_feeds(made, specs={"x": InputSpec(kind="gaussian", mean=5, std=2)})[0]["x"]
    assert 4.8 < x.mean() < 5.2
    with pytest.raises(DataError, match="no input named 'z'"):
        probe_feeds(made, specs={"z": InputSpec()})
    with pytest.raises(DataError, match="unknown kind"):
        InputSpec(kind="picture")
    with pytest.raises(DataError, match="empty"):
        InputSpec(low=1, high=0)


def test_seed_and_count() -> None:
    made = model("float[1, 3, 8, 8] x")
    first, second = probe_feeds(made, count=2, seed=5)
    assert not np.array_equal(first["x"], second["x"])
    np.testing.assert_array_equal(first["x"], probe_feeds(made, count=1, seed=5)[0]["x"])


def test_sizes_by_name_and_position() -> None:
    made = model("int64[batch, seq_len] ids, float[batch, 8, total, 64] past, float[n, c, h, w] x")
    past = made.graph.inputs[1]
    past.shape = ir.Shape(["batch", 8, "past_len + seq_len", 64])
    made.graph.inputs.append(ir.val("more", dtype=ir.DataType.FLOAT, shape=ir.Shape(["batch", "past_len"])))
    sizes = symbolic_sizes(made)
    assert sizes["past_len + seq_len"] == sizes["past_len"] + sizes["seq_len"] == 32
    assert sizes["batch"] == 1
    assert sizes["seq_len"] == 16
    assert sizes["h"] == sizes["w"] == 224
    assert sizes["c"] == 3
    assert {frozenset(sizes) for sizes in candidate_sizes(made)} == {frozenset(sizes)}


def test_a_model_that_refuses_the_usual_size_gets_another() -> None:
    made = model("float[n, 1, h, w] x, float[1024, 4] weight", "f = Flatten(x) y = MatMul(f, weight)", "float[m, 4] y")
    weight = made.graph.inputs.pop()
    weight.const_value = ir.tensor(np.zeros((1024, 4), np.float32))
    made.graph.register_initializer(weight)
    assert runnable_sizes(made) == {"n": 1, "h": 32, "w": 32}


def test_a_model_that_refuses_every_size_says_so() -> None:
    made = model("float[n, 1, h, w] x, float[7, 4] weight", "f = Flatten(x) y = MatMul(f, weight)", "float[m, 4] y")
    weight = made.graph.inputs.pop()
    weight.const_value = ir.tensor(np.zeros((7, 4), np.float32))
    made.graph.register_initializer(weight)
    with pytest.raises(DataError, match="no usual size"):
        runnable_sizes(made)


def test_strings_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be made up"):
        probe_feeds(model("string[2] x", outputs="string[2] y"))


# What is stated and cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["mean", "std", "low", "high"])
@pytest.mark.parametrize("number", [[0.4, 0.4, 0.4], "a", np.zeros(3), True])
def test_what_is_stated_is_one_number(field: str, number: object) -> None:
    with pytest.raises(DataError, match=f"`{field}` of an input is .* must be one number") as caught:
        InputSpec(**{field: number})  # type: ignore[arg-type]
    assert caught.value.help
    InputSpec(**{field: np.float32(0.5)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("declared", "fitting"),
    [
        ("int64[n, 16]", {"tokens", "integer", "mask"}),
        ("bool[n, 16]", {"mask"}),
        ("float[n, 13]", {"audio", "gaussian", "mask"}),
        ("float[n, c, 2, 2]", {"audio", "gaussian", "mask"}),
        ("float[n, 3, h, w]", {"image", "audio", "gaussian", "mask"}),
        ("float[n, h, w, 3]", {"image", "audio", "gaussian", "mask"}),
        ("float[c, h, w]", {"image", "audio", "gaussian", "mask"}),
        ("float[n, 3, t, 16, 16]", {"image", "audio", "gaussian", "mask"}),
        ("float", {"gaussian", "mask"}),
    ],
)
def test_kinds_that_cannot_be_are_refused(declared: str, fitting: set[str]) -> None:
    kind = declared.partition("[")[0]
    operator = "Not" if kind == "bool" else "Identity"
    made = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]> g ({declared} x) => ({declared} y) {{ y = {operator}(x) }}'
    )
    for kind in KINDS:
        if kind in fitting:
            check_specs(made, {"x": InputSpec(kind=kind)})
            continue
        with pytest.raises(DataError, match=f"'x' is said to be of kind '{kind}'") as caught:
            check_specs(made, {"x": InputSpec(kind=kind)})
        assert all(other in str(caught.value.help) for other in fitting)


def test_ids_beyond_the_table_are_refused() -> None:
    made = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (int64[n, 4] x) => (float[n, 4, 1] y) '
        "<float[3, 1] table = {1, 2, 3}> { y = Gather(table, x) }"
    )
    for spec, message in (
        (InputSpec(kind="tokens", low=0, high=1000), "`high` is 1000, but the table .* has 3 rows"),
        (InputSpec(high=3), "`high` is 3,"),
        (InputSpec(low=-4), "`low` is -4,"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            check_specs(made, {"x": spec})
        assert "from 0 to 2" in str(caught.value.help)
    check_specs(made, {"x": InputSpec(kind="tokens", low=0, high=2)})
