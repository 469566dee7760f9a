"""
Part 10: what are small weights worth? Tokens per second, memory and quality of one model in fp32,
bf16, 8 and 4 bits.

    python part_10/demo_speed.py                  SmolLM2
    python part_10/demo_speed.py --threads=2      with both cores, in real time
    python part_10/demo_speed.py --held_out=32    a more exact loss
    python part_10/demo_speed.py --group=32       the grid of the file that the weights come from

    pip install transformers                      another program, as a comparison
    python part_10/weights.py part_10/out/smollm2.pt --to=smollm2_hf
    python part_10/demo_speed.py --peer=smollm2_hf

Speed is measured like this: every variant reads the question and then writes --length tokens, each
of them the likeliest. This is repeated --repeats times, one variant after the other in each round,
so that a busy machine slows all of them. What is reported is the median over the rounds of the
ratio to our fp32 in the same round. With one thread the clock is that of the process, which stands
still while other programs have the core. With several threads it is real time.

Memory is measured in a fresh process for each variant: it opens a file that has only this variant's
weights, and answers the question. Memory that a process has used once is not always given back to
the system, so a process that had opened the large weights before would say nothing.

Quality is the loss on the held-out half of Python's documentation (compression.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import copy
import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from compression import MODELS, load_model, load_texts, mean_loss
from model import KVCache
from qlinear import Sizes, check_sizes, make_small, save_small, say_what_is_left
from shared import (
    ROOT,
    fail,
    figure,
    load_checkpoint,
    output_folder,
    parse_args,
    read_foreign,
    save_figure,
    save_metrics,
    set_seed,
)

PEER = "transformers, fp32"
NAMES = {32: "fp32", 16: "bf16", 8: "8 bits", 4: "4 bits"}


@dataclass
class Config:
    # models
    model: str = "smollm2"  # smollm2, base, or the path of a checkpoint
    group: int = 64  # weights of a row that share a scale, with 4 bits: 32, 64, 128 or 256

    # bits of the head, if the other matrices have 4 or 8: 4, 8, or 32 to leave it as it is
    head_bits: int = 8

    # a Hugging Face folder with the same weights, to compare with the package transformers; empty:
    # no comparison
    peer: str = ""

    # measurement
    prompt: str = "What is the capital of France?"  # question to the model
    batch: str = "1,8"  # numbers of texts that are written at the same time
    length: int = 20  # tokens written in each round
    repeats: int = 5  # rounds
    held_out: int = 8  # rows of the held-out text
    block_size: int = 256  # tokens in a row of the held-out text, at most
    # run
    threads: int = 1  # threads of the processor
    out: str = ""  # output folder; empty: out/ beside this script

    def __post_init__(self):
        check_sizes(Sizes(32, self.group, self.head_bits))
        for size in self.batch.split(","):
            assert size.isdecimal() and int(size) > 0, f"batch={self.batch} must be like 1,8"


def open_large(name):
    """A model of MODELS or a checkpoint with large weights -> (model, tokenizer)."""
    if name not in MODELS and load_checkpoint(name, None)["kind"] == "small":
        fail(f"{name} is a 'small' checkpoint: the comparison needs the large weights")
    return load_model(name, "cpu")


# speed --------------------------------------------------------------------------------------------


def pick_clock(threads):
    """The function that measures time: with one thread that of the process, otherwise real time."""
    return time.process_time if threads == 1 else time.perf_counter


@torch.no_grad()
def seconds_to_write(model, prompt, batch, length, clock):
    """The seconds in which a GPT writes `length` tokens behind a prompt, for `batch` texts at the
    same time. Reading the prompt is not counted."""
    cache = KVCache(model.cfg, batch, dtype=model.wte.weight.dtype)
    idx = torch.tensor([prompt] * batch)
    logits, _ = model(idx, cache=cache)
    token = logits[:, -1:].argmax(dim=-1)  # (B, 1)

    start = clock()
    for _ in range(length):
        logits, _ = model(token, cache=cache)
        token = logits[:, -1:].argmax(dim=-1)
    return clock() - start


@torch.no_grad()
def seconds_of_peer(model, prompt, batch, length, clock):
    """seconds_to_write for a model of the package transformers. The loop is the same as ours: its
    own method generate does more between two tokens and is slower."""
    idx = torch.tensor([prompt] * batch)
    output = model(input_ids=idx, use_cache=True)
    token = output.logits[:, -1:].argmax(dim=-1)

    start = clock()
    for _ in range(length):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return clock() - start


def measure_speed(models, prompt, batch, cfg):
    """{name: [seconds of each round]} for the models of {name: model}."""
    clock = pick_clock(cfg.threads)
    rounds = {name: [] for name in models}

    # The first round warms up and does not count.
    for i in range(cfg.repeats + 1):
        for name, model in models.items():
            measure = seconds_of_peer if name == PEER else seconds_to_write
            length = cfg.length if i > 0 else 2
            seconds = measure(model, prompt, batch, length, clock)
            if i > 0:
                rounds[name].append(seconds)
    return rounds


def summarize(rounds, batch, length, reference):
    """What came out of rounds -> {name: {"tokens_per_second", "ratio", "lowest", "highest"}}.

    ratio is the median of the reference's seconds over those of this variant, round by round;
    lowest and highest are the extremes of the rounds.
    """
    summary = {}
    for name, seconds in rounds.items():
        ratios = [a / b for a, b in zip(rounds[reference], seconds)]
        summary[name] = {
            "tokens_per_second": batch * length / statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return summary


# memory -------------------------------------------------------------------------------------------


def bytes_of_weights(model):
    """The bytes of all tensors of a model; what is shared counts once."""
    sizes = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def measure_fresh(path, cfg):
    """Opens a file of save_small in a fresh process and asks the question -> what qlinear.py wrote
    into its JSON."""
    command = [sys.executable, str(ROOT / "part_10/qlinear.py"), f"--model={path}"]
    options = [f"--prompt={cfg.prompt}", "--max_new_tokens=20", f"--out={path.parent}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode != 0:
        fail(f"qlinear.py failed: {done.stderr.strip()}")
    return json.loads((path.parent / "qlinear.json").read_text())


# the peer -----------------------------------------------------------------------------------------


def open_peer(folder):
    """The model of a Hugging Face folder in the package transformers, or None without a package."""
    if not Path(folder).is_dir():
        fail(f"--peer={folder} is not a folder")
    if importlib.util.find_spec("transformers") is None:
        print("no comparison with transformers: the package is not installed")
        return None
    from transformers import AutoModelForCausalLM

    def read(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )

    return read_foreign(read, folder).eval()


# the figure ---------------------------------------------------------------------------------------


def finding(speeds):
    """The title of the figure."""
    first = next(iter(speeds))
    lines = []
    for batch, summary in speeds.items():
        ours = {name: row["ratio"] for name, row in summary.items() if name in NAMES.values()}
        best = max(ours, key=ours.get)
        if best == NAMES[32]:
            lines.append(f"nothing beats our fp32 at batch {batch}")
        else:
            lines.append(f"{best}: {ours[best]:.1f} times our fp32 at batch {batch}")
    if PEER in speeds[first]:
        times = speeds[first][NAMES[4]]["ratio"] / speeds[first][PEER]["ratio"]
        lines.append(f"4 bits: {times:.1f} times transformers' fp32 at batch {first}")
    return "\n".join(lines)


def draw(speeds, path):
    """Bars of the ratio to fp32, a panel for each batch; a line from the lowest to the highest."""
    names = list(next(iter(speeds.values())))
    fig, axes = figure(finding(speeds), columns=len(speeds), height=4.6)
    panels = np.ravel(axes)
    for ax, (batch, summary) in zip(panels, speeds.items()):
        for place, name in enumerate(names):
            row = summary[name]
            colour = "C1" if name == PEER else "C0"
            ax.barh(place, row["ratio"], color=colour, height=0.65)
            ax.plot([row["lowest"], row["highest"]], [place, place], color="black", linewidth=1)
            text = f"{row['ratio']:.2f}x, {row['tokens_per_second']:.0f} tokens/s"
            place_of_text = max(row["ratio"], row["highest"])
            ax.text(place_of_text, place, f" {text}", va="center", fontsize=9)
        largest = max(row["highest"] for row in summary.values())
        ax.axvline(1, color="black", linewidth=1, linestyle=":")
        ax.set(
            xlim=(0, 1.75 * largest),
            title=f"batch {batch}",
            xlabel="speed over our fp32 (line: all rounds)",
        )
        ax.set_yticks(range(len(names)), names if ax is panels[0] else [""] * len(names))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    save_figure(fig, path)


# main ---------------------------------------------------------------------------------------------


if __name__ == "__main__":
    cfg = parse_args(Config)
    set_seed(0)
    torch.set_num_threads(max(cfg.threads, 1))
    out = output_folder(cfg)
    peer = open_peer(cfg.peer) if cfg.peer else None

    # the variants
    model, tok = open_large(cfg.model)
    prompt = tok.chat_prompt(cfg.prompt)
    if len(prompt) + cfg.length >= model.cfg.block_size:
        fail(f"{len(prompt)} tokens of the prompt and --length={cfg.length} do not fit")
    texts = load_texts(cfg.model, model, tok, cfg.block_size, 1, cfg.held_out)

    models = {}
    sizes_of = {}
    for bits, name in NAMES.items():
        sizes_of[name] = Sizes(bits, cfg.group, cfg.head_bits)
        models[name] = copy.deepcopy(model)
        left = make_small(models[name], sizes_of[name])
        say_what_is_left(left)
    del model

    # speed
    competitors = dict(models)
    if peer is not None:
        competitors[PEER] = peer
    speeds = {}
    for batch in cfg.batch.split(","):
        rounds = measure_speed(competitors, prompt, int(batch), cfg)
        speeds[batch] = summarize(rounds, int(batch), cfg.length, NAMES[32])
        print(f"batch {batch}")
        for name, row in speeds[batch].items():
            print(
                f"  {name:20} {row['tokens_per_second']:6.1f} tokens/s  {row['ratio']:5.2f} times "
                f"our fp32 ({row['lowest']:.2f} to {row['highest']:.2f})"
            )

    # memory and quality
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, small in models.items():
            path = Path(folder) / "small.pt"
            save_small(path, small, tok, sizes_of[name])
            fresh = measure_fresh(path, cfg)
            table[name] = {
                "weights": bytes_of_weights(small),
                "file": path.stat().st_size,
                "memory": fresh["memory"],
                "memory_before": fresh["memory_before"],
                "loss": mean_loss(small, texts.held_out),
                "answer": fresh["answer"],
            }
            row = table[name]
            print(
                f"{name:8} weights {row['weights'] / 1e6:4.0f} MB, file {row['file'] / 1e6:4.0f} "
                f"MB, process {row['memory'] / 1e6:4.0f} MB (empty "
                f"{row['memory_before'] / 1e6:.0f}), {row['loss']:.4f} nats per token: "
                f"{row['answer']!r}",
                flush=True,
            )

    save_metrics(out, "demo_speed", config=vars(cfg), speeds=speeds, table=table)
    draw(speeds, out / "demo_speed.png")
