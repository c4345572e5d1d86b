"""How long token log-probabilities take, and how exact they are, form by form.

    python kernels/bench_logprobs.py [--quick] [--sweep] [--json OUT]

One command, one table, one JSON file. Arms are interleaved (every arm once, then every arm again),
three warm-ups, medians with their range. On a GPU: bf16, Qwen3-1.7B's head, wall time between CUDA
events, and peak memory beside the inputs. On a CPU: float32, small sizes, one thread, process time;
Triton's forms need a GPU. `--sweep` times the Triton forward pass with each candidate of tile sizes
as well.

Peers are timed where they are installed: TRL's chunked log-probabilities, cut-cross-entropy and
Liger's fused linear cross entropy. None of them leaves out a token or takes a temperature per row,
so here every temperature is 1 and nothing is left out, which costs our forms the same. Liger
returns one mean over rows, so it has no error to show. An arm that fails is named with its error
and left out, and the exit status is 1.

Dimensions
    N  rows
    D  width of the hidden state
    V  vocabulary
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import rlp  # noqa: F401, before torch: see rlp/process/machine.py

# isort: split
import torch
from torch import Tensor

import rlp_kernels

PEAK_FLOPS = 790e12
"""bf16 with float32 sums on one H200, what large products of random numbers reach; the data sheet
says 990e12."""
GPU_SHAPE = {
    "num_rows": (8192, 65_536),
    "vocabulary": 151_936,
    "width": 2048,
    "dtype": torch.bfloat16,
}
CPU_SHAPE = {"num_rows": (256, 1024), "vocabulary": 8192, "width": 256, "dtype": torch.float32}
ERROR_ROWS = 512
"""Rows whose float64 answer is computed; `--quick` takes 64."""
PLAIN_COPIES = 5
"""[N, V] float32 tensors that the plain form has alive in its backward pass, about."""

SWEEP = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
)
"""Rows, columns, depth, warps, stages."""


@dataclass(frozen=True, slots=True)
class HeadPass:
    """One head pass."""

    hidden: Tensor
    """[N, D]."""
    head: Tensor
    """[V, D]."""
    target: Tensor
    """[N] int64."""
    coefficient: Tensor
    """[N] float32, the upstream gradient."""
    rows: dict[str, Tensor]
    """inverse_temperature and excluded, each [N]."""

    def trained(self) -> tuple[Tensor, Tensor]:
        """hidden and head as leaves that want a gradient."""
        return self.hidden.detach().requires_grad_(), self.head.detach().requires_grad_()


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to compute it."""

    name: str
    forward: Callable[[HeadPass], Tensor] | None
    """Log-probabilities [N] without gradient; None for arms that always make the gradient."""
    both: Callable[[HeadPass], tuple[Tensor, ...]]
    """Log-probabilities and the gradients in hidden and head."""
    units: int
    """N V D operations of forward and backward, 8 where the logits are made twice."""
    per_row: bool = True
    """Whether it gives one number per row, so that its error can be shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    arm: str
    num_rows: int
    direction: str
    """forward, or forward+backward."""
    median_s: float
    range_s: tuple[float, float]
    speedup: float
    """chunked's median over this one's."""
    roofline_frac: float | None
    """Of PEAK_FLOPS, by the operations that the arm does; None on a CPU."""
    floor_frac: float | None
    """Of PEAK_FLOPS, by the least that would do: 2 N V D forward, 6 with the gradients."""
    peak_memory_bytes: int | None


def make_inputs(
    num_rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: str
) -> HeadPass:
    """Logits of deviation 2.

    Temperature 1 and no excluded token, which is all that the peers can do.
    """
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator, device=device).to(dtype)
    head = torch.empty(vocabulary, width, dtype=dtype, device=device)
    head.normal_(std=2 / width**0.5, generator=generator)
    rows = {
        "inverse_temperature": torch.ones(num_rows, device=device),
        "excluded": torch.full((num_rows,), -1, device=device),
    }
    target = torch.randint(vocabulary, (num_rows,), generator=generator, device=device)
    coefficient = torch.linspace(-1.0, 1.0, num_rows, device=device)
    return HeadPass(hidden, head, target, coefficient, rows)


def our_arms(on_gpu: bool) -> list[Arm]:
    """The forms of `token_logprobs`, and those with the gradient in the forward pass."""

    def forward(inputs: HeadPass, form: str) -> Tensor:
        with torch.no_grad():
            return rlp_kernels.token_logprobs(
                inputs.hidden, inputs.head, inputs.target, **inputs.rows, form=form
            )

    def both(inputs: HeadPass, form: str) -> tuple[Tensor, ...]:
        hidden, head = inputs.trained()
        logprob = rlp_kernels.token_logprobs(hidden, head, inputs.target, **inputs.rows, form=form)
        return logprob.detach(), *torch.autograd.grad(logprob, (hidden, head), inputs.coefficient)

    def in_forward(inputs: HeadPass, form: str) -> tuple[Tensor, ...]:
        given = (inputs.hidden, inputs.head, inputs.target, inputs.coefficient)
        return rlp_kernels.token_logprobs_with_grad(*given, **inputs.rows, form=form)

    forms = rlp_kernels.FORMS if on_gpu else ("plain", "chunked")
    arms = []
    for form in forms:
        units = 6 if form == "plain" else 8
        arms.append(Arm(form, partial(forward, form=form), partial(both, form=form), units))
    for form in forms:
        if form in ("chunked", "triton"):
            both_at_once = partial(in_forward, form=form)
            arms.append(Arm(f"{form}, in forward", None, both_at_once, units=6))
    return arms


def peer_arms(on_gpu: bool) -> tuple[list[Arm], list[str]]:
    """Peers that are installed, and the names of those that are not."""
    peers = {"trl": _trl, "cut_cross_entropy": _cut_cross_entropy, "liger_kernel": _liger}
    found = [name for name in peers if importlib.util.find_spec(name)]
    absent = [name for name in peers if name not in found]
    # The other two are GPU kernels only.
    usable = [name for name in found if on_gpu or name == "trl"]
    return [peers[name]() for name in usable], absent


def _peer(
    name: str,
    logprobs: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    units: int = 8,
    per_row: bool = True,
) -> Arm:
    """An arm from a function of hidden, head and target to log-probabilities."""

    def forward(inputs: HeadPass) -> Tensor:
        with torch.no_grad():
            return logprobs(inputs.hidden, inputs.head, inputs.target)

    def both(inputs: HeadPass) -> tuple[Tensor, ...]:
        hidden, head = inputs.trained()
        logprob = logprobs(hidden, head, inputs.target)
        upstream = inputs.coefficient if logprob.dim() else torch.ones_like(logprob)
        return logprob.detach(), *torch.autograd.grad(logprob, (hidden, head), upstream)

    return Arm(name, forward, both, units, per_row)


def _trl() -> Arm:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logprobs(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        # temperature, words a tile, no soft cap, scale of the logits, no further statistics
        return ChunkedLogProbFunction.apply(hidden, head, None, target, 1.0, 4096, None, 1.0, ())[0]

    return _peer("TRL chunked", logprobs)


def _cut_cross_entropy() -> Arm:
    from cut_cross_entropy import linear_cross_entropy

    return _peer(
        "cut-cross-entropy", lambda *given: -linear_cross_entropy(*given, reduction="none")
    )


def _liger() -> Arm:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _peer(
        "Liger", lambda hidden, head, target: -loss(head, hidden, target), units=6, per_row=False
    )


def measure(
    runs: dict[str, Callable[[], object]], repeats: int, on_gpu: bool
) -> dict[str, tuple[list[float], int | None]]:
    """Seconds of each repeat and peak bytes beside the inputs.

    The arms are interleaved, after three warm-ups.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peak: dict[str, int | None] = dict.fromkeys(runs)
    for repeat in range(-3, repeats):
        for name, run in runs.items():
            took, peak[name] = _timed_on_gpu(run) if on_gpu else (_timed_on_cpu(run), None)
            if repeat >= 0:
                seconds[name].append(took)
    return {name: (seconds[name], peak[name]) for name in runs}


def _timed_on_gpu(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds between events, and peak bytes beside what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)

    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def _timed_on_cpu(run: Callable[[], object]) -> float:
    """Seconds of this process."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def time_arms(arms: list[Arm], inputs: HeadPass, repeats: int, on_gpu: bool) -> list[Row]:
    """Forward, then forward and backward, of every arm on the same inputs."""
    forward = {arm.name: partial(arm.forward, inputs) for arm in arms if arm.forward is not None}
    both = {arm.name: partial(arm.both, inputs) for arm in arms}
    table = []
    for direction, runs in (("forward", forward), ("forward+backward", both)):
        measured = measure(runs, repeats, on_gpu)
        chunked = statistics.median(measured["chunked"][0])
        for arm in arms:
            if arm.name in measured:
                seconds, peak = measured[arm.name]
                table.append(_row(arm, inputs, direction, seconds, chunked, peak))
    return table


def _row(
    arm: Arm,
    inputs: HeadPass,
    direction: str,
    seconds: list[float],
    chunked: float,
    peak: int | None,
) -> Row:
    num_rows, width = inputs.hidden.shape
    median = statistics.median(seconds)
    least, units = (2, 2) if direction == "forward" else (6, arm.units)
    # The share of the peak that one unit of N V D operations makes.
    share = num_rows * width * inputs.head.shape[0] / PEAK_FLOPS / median
    on_gpu = inputs.hidden.is_cuda
    return Row(
        arm.name,
        num_rows,
        direction,
        median,
        (min(seconds), max(seconds)),
        speedup=chunked / median,
        roofline_frac=units * share if on_gpu else None,
        floor_frac=least * share if on_gpu else None,
        peak_memory_bytes=peak,
    )


def working(arms: list[Arm], inputs: HeadPass) -> tuple[list[Arm], dict[str, str]]:
    """The arms that run, and the errors of those that do not, by name."""
    failed = {}
    for arm in arms:
        try:
            arm.both(inputs)
        # Whatever breaks a peer or a form here must not cost the rows of the others.
        except Exception as error:
            failed[arm.name] = f"{type(error).__name__}: {error}"[:500]
    return [arm for arm in arms if arm.name not in failed], failed


def errors(arms: list[Arm], inputs: HeadPass) -> list[dict[str, object]]:
    """Largest error against float64 on the same rounded inputs, and whether reruns are equal."""
    wide = HeadPass(
        inputs.hidden.double(),
        inputs.head.double(),
        inputs.target,
        inputs.coefficient.double(),
        inputs.rows,
    )
    truth = our_arms(on_gpu=False)[0].both(wide)
    names = ("logprob", "hidden_grad", "head_grad")

    lines = []
    for arm in arms:
        first, second = arm.both(inputs), arm.both(inputs)
        line: dict[str, object] = {
            "arm": arm.name,
            "rerun_bit_equal": all(map(torch.equal, first, second)),
        }
        for name, found, true in zip(names, first, truth, strict=True) if arm.per_row else ():
            line[f"{name}_error"] = (found.double() - true).abs().max().item()
            line[f"{name}_largest"] = true.abs().max().item()
        lines.append(line)
    return lines


def sweep(inputs: HeadPass, repeats: int) -> list[dict[str, object]]:
    """The Triton forward pass by tile sizes.

    A size that does not compile or fit is reported with its error.
    """
    from rlp_kernels import triton_form

    lines: list[dict[str, object]] = []
    for sizes in SWEEP:
        run = partial(
            triton_form.token_logprobs,
            inputs.hidden,
            inputs.head,
            inputs.target,
            **inputs.rows,
            sizes=triton_form.Tiles(*sizes),
        )
        line: dict[str, object] = {"sizes": sizes}
        try:
            seconds, _ = measure({"triton": run}, repeats, on_gpu=True)["triton"]
            line["median_s"] = statistics.median(seconds)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:200]
        lines.append(line)
    return lines


def provenance(commit: str | None) -> dict[str, str]:
    """What the numbers were measured on and with."""
    found = {
        "hardware": _hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit() if commit is None else commit,
    }
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    return found


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()

    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.processor()


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=all", ".")
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"the commit is part of every row, and git does not say it ({error}): give --commit"
        ) from error
    return commit + " with changes in kernels/" if changed else commit


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, check=True)
    return done.stdout.strip()


def main() -> int:
    """Returns 1 where an arm fails."""
    arguments = parse()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device, shape = ("cuda", GPU_SHAPE) if on_gpu else ("cpu", CPU_SHAPE)
    fixed = {name: shape[name] for name in ("vocabulary", "width", "dtype")} | {"device": device}
    about = provenance(arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in about.items()))

    peers, absent = peer_arms(on_gpu)
    if absent:
        print(f"not installed, not measured: {', '.join(absent)}")
    if not on_gpu:
        print("no GPU: one CPU thread, small sizes; triton and folded are not timed")
    arms, failed = working(our_arms(on_gpu) + peers, make_inputs(64, **fixed))
    for name, error in failed.items():
        print(f"FAILED, not measured: {name}: {error}")

    repeats = 3 if arguments.quick else 10 if on_gpu else 7
    all_num_rows = shape["num_rows"][:1] if arguments.quick else shape["num_rows"]
    table = time_all(arms, all_num_rows, fixed, repeats, on_gpu)
    checked = errors(arms, make_inputs(64 if arguments.quick else ERROR_ROWS, **fixed))
    swept = sweep(make_inputs(8192, **fixed), repeats) if arguments.sweep and on_gpu else []

    print(f"\nV {shape['vocabulary']}, D {shape['width']}, {shape['dtype']};", end=" ")
    print(f"medians [range] of {repeats}\n")
    print_times(table)
    print_errors(checked)
    print_sweep(swept)
    if arguments.json:
        raw = {
            "provenance": about,
            "shape": {name: str(value) for name, value in shape.items()},
            "repeats": repeats,
            "table": [asdict(row) for row in table],
            "errors": checked,
            "sweep": swept,
            "absent": absent,
            "failed": failed,
        }
        arguments.json.write_text(json.dumps(raw, indent=1) + "\n")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the raw numbers here")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the smaller N only, three repeats, fewer rows in float64",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also time Triton's forward pass by tile sizes (GPU)"
    )
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    return parser.parse_args()


def time_all(
    arms: list[Arm],
    all_num_rows: tuple[int, ...],
    fixed: dict[str, object],
    repeats: int,
    on_gpu: bool,
) -> list[Row]:
    """`time_arms` for each N, without plain where a GPU could not hold it."""
    table = []
    for num_rows in all_num_rows:
        plain_bytes = PLAIN_COPIES * 4 * num_rows * fixed["vocabulary"]
        fits = not on_gpu or plain_bytes < torch.cuda.get_device_properties(0).total_memory
        if not fits:
            print(f"plain is left out at N {num_rows}: about {plain_bytes / 1e9:.0f} GB of logits")
        timed = [arm for arm in arms if fits or arm.name != "plain"]
        table += time_arms(timed, make_inputs(num_rows, **fixed), repeats, on_gpu)
    return table


def print_times(table: list[Row]) -> None:
    print(
        "| arm | N | direction | ms | speedup over chunked | of 790 TFLOP/s | of the floor"
        " | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in table:
        low, high = row.range_s
        of_peak = "" if row.roofline_frac is None else f"{row.roofline_frac:.2f}"
        of_floor = "" if row.floor_frac is None else f"{row.floor_frac:.2f}"
        memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}"
        print(
            f"| {row.arm} | {row.num_rows} | {row.direction}"
            f" | {row.median_s * 1e3:.4g} [{low * 1e3:.4g}, {high * 1e3:.4g}]"
            f" | {row.speedup:.2f} | {of_peak} | {of_floor} | {memory} |"
        )


def print_errors(checked: list[dict[str, object]]) -> None:
    print(
        "\n| arm | logprob error, nats | hidden grad error / largest | head grad error / largest"
        " | rerun equal to the bit |"
    )
    print("|---|---|---|---|---|")
    for line in checked:
        cells = ["", "", ""]
        if "logprob_error" in line:
            hidden = line["hidden_grad_error"] / line["hidden_grad_largest"]
            head = line["head_grad_error"] / line["head_grad_largest"]
            cells = [f"{value:.1e}" for value in (line["logprob_error"], hidden, head)]
        equal = "yes" if line["rerun_bit_equal"] else "NO"
        print(f"| {line['arm']} | {' | '.join(cells)} | {equal} |")


def print_sweep(swept: list[dict[str, object]]) -> None:
    for line in swept:
        found = f"{line['median_s'] * 1e3:.4g} ms" if "median_s" in line else line["error"]
        print(f"tiles {line['sizes']}: {found}")


if __name__ == "__main__":
    sys.exit(main())
