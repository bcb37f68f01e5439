"""Does `merge-branches` with `split_parallel` pay? Query, key and value of one attention block, fp32.

Run: .venv/bin/python benchmarks/split_parallel.py
Two sessions take turns, one intra-op thread, process CPU time; the ratio of medians is printed, above 1 where one
product and a Split is faster than three products. Repeated, because one run is no evidence.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.ir.session import Session, open_session
from graphopt.passes.merge_branches import MergeBranches

SHAPES = {
    "ViT-S, 197 tokens": (1, 197, 384, 6),
    "BERT-base, 128 tokens": (1, 128, 768, 12),
    "BERT-base, 128 tokens, batch 8": (8, 128, 768, 12),
    "BERT-base, 16 tokens": (1, 16, 768, 12),
    "decoder step, 1 token, width 768": (1, 1, 768, 12),
}
ROUNDS, REPEATS = 60, 3


def attention_block(batch: int, tokens: int, width: int, heads: int) -> ir.Model:
    """x -> three projections with bias -> heads -> softmax(q k) v."""
    random = np.random.default_rng(0)
    lines, weights = [], []
    for name in "qkv":
        for suffix, shape in (("w", (width, width)), ("b", (width,))):
            array = (random.standard_normal(shape) / width**0.5).astype(np.float32)
            weights.append(onnx.numpy_helper.from_array(array, f"{name}{suffix}"))
        perm = "[0, 2, 3, 1]" if name == "k" else "[0, 2, 1, 3]"
        lines += [
            f"{name}1 = MatMul (x, {name}w)",
            f"{name}2 = Add ({name}1, {name}b)",
            f"{name}3 = Reshape ({name}2, heads)",
            f"{name}4 = Transpose <perm = {perm}> ({name}3)",
        ]
    lines += ["s = MatMul (q4, k4)", "p = Softmax <axis = -1> (s)", "y = MatMul (p, v4)"]
    head_shape = f"{batch},{heads},{tokens},{width // heads}"
    text = (
        '<ir_version: 10, opset_import: ["": 21]>\n'
        f"g (float[{batch},{tokens},{width}] x) => (float[{head_shape}] y)\n"
        f"<int64[4] heads = {{{batch}, {tokens}, {heads}, {width // heads}}}> {{\n" + "\n".join(lines) + "\n}"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(weights)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def cpu_time(session: Session, feeds: dict[str, np.ndarray]) -> float:
    """Seconds of process CPU time of one run."""
    start = time.process_time()
    session.run(None, feeds)
    return time.process_time() - start


def main() -> None:
    """Print one line for each shape."""
    for name, shape in SHAPES.items():
        model = attention_block(*shape)
        merged = model.clone()
        MergeBranches(split_parallel=True)(merged)
        feeds = {"x": np.random.default_rng(1).standard_normal(shape[:3]).astype(np.float32)}
        sessions = [open_session(model, threads=1), open_session(merged, threads=1)]
        inner = max(1, int(0.01 / max(cpu_time(sessions[0], feeds), 1e-5)))
        ratios = []
        for _ in range(REPEATS):
            times: list[list[float]] = [[], []]
            for _ in range(ROUNDS):
                for index, session in enumerate(sessions):
                    times[index].append(sum(cpu_time(session, feeds) for _ in range(inner)))
            ratios.append(statistics.median(times[0]) / statistics.median(times[1]))
        print(f"{name:34s} three products / one and Split: " + "  ".join(f"{ratio:.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
