"""
Part 0: the measurements that bench.py asks for, each in a process of its own.

    python part_0/measure.py --what=products            one of the measurements, as JSON
    python part_0/measure.py --what=generation --threads=1 --clock=cpu
    python part_0/measure.py --what=part_4/train.py     a train script with clocks in it; what
                                                        follows "--" are the script's own options

Each part has a model.py of its own, so one process cannot hold two parts. A process of its own also
says how much memory the measurement needed.

Other programs can only slow a measurement down. So everything is measured several times, and the
fastest time counts (Timing.best). How much slower the median is says how far it can be trusted
(Timing.spread).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ast
import functools
import importlib
import math
import os
import platform
import resource
import statistics
import tempfile
import time
import types
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import shared
from shared import (
    ROOT,
    as_json,
    fail,
    judge,
    load_checkpoint,
    parse_args,
    read_jsonl,
    read_text,
    require,
    save_checkpoint,
    set_seed,
    write_atomic,
)

MIB = 2**20


@dataclass
class Config:
    what: str = "machine"  # which measurement, or a train script such as part_4/train.py
    seconds: float = 0.3  # seconds to spend on each number
    clock: str = "wall"  # wall (what a user waits) or cpu (processor time; for a busy machine)
    threads: int = 0  # CPU threads; 0: as many as torch chooses
    seed: int = 0  # seed of all random numbers
    out: str = ""  # the file for the results; empty: print them

    def __post_init__(self):
        assert self.clock in ("wall", "cpu"), f"clock={self.clock} must be wall or cpu"
        assert self.clock == "wall" or self.threads == 1, (
            "clock=cpu adds up the time of all threads: use it with --threads=1"
        )


# clocks -------------------------------------------------------------------------------------------

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Timing(NamedTuple):
    best: float  # seconds of the fastest repeat
    spread: float  # how much slower the median was: 0.1 is 10 %


def timing(times):
    """A list of seconds -> Timing."""
    best = min(times)
    return Timing(best, statistics.median(times) / best - 1)


def measure(function, cfg, least=5):
    """Call function() for about cfg.seconds, and at least `least` times -> Timing of one call."""
    clock = CLOCKS[cfg.clock]
    function()  # the first call also allocates memory and chooses a kernel

    # A clock has a resolution. Calls that are short are measured several at a time.
    start = clock()
    function()
    calls = math.ceil(0.002 / max(clock() - start, 1e-6))

    times = []
    begin = clock()
    while len(times) < least or clock() - begin < cfg.seconds:
        start = clock()
        for _ in range(calls):
            function()
        times.append((clock() - start) / calls)
    return timing(times)


def result(value, unit, spread=0.0):
    """One number of the results. The unit says whether more is better: more of ".../s" is."""
    return {"value": value, "unit": unit, "spread": spread}


def rate(amount, unit, timing):
    """So much in the best time -> the result `amount` per second."""
    return result(amount / timing.best, f"{unit}/s", timing.spread)


def peak_memory():
    """The most memory that this process has used so far, in bytes."""
    # On Linux getrusage starts with the memory of the process that started this one.
    path = Path("/proc/self/status")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# the machine --------------------------------------------------------------------------------------


def processor_name():
    """What the processor calls itself, as Linux knows it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def machine(cfg):
    """What this machine has: {name: value}. These are facts and no measurements."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes, on Linux and Mac
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "clock": cfg.clock,
        # how many programs wanted to compute in the last minute
        "load": round(os.getloadavg()[0], 1),
    }


# products and memory ------------------------------------------------------------------------------

SIZES = (64, 128, 256, 512, 1024)
SLOWEST = 0.5  # seconds; a precision that is only emulated would need minutes for larger products


def products(cfg):
    """The speed of matrix products by size and precision. A product of two (n, n) matrices takes
    2 n^3 operations: n multiplications and n additions for each of n^2 results."""
    results = {}
    for name in ("fp32", "bf16", "int8"):
        for n in SIZES:
            if name == "int8":
                a = torch.randint(-128, 128, (n, n), dtype=torch.int8)
                product = functools.partial(torch._int_mm, a, a)
            else:
                a = torch.randn(n, n).to(shared.DTYPES[name])
                product = functools.partial(torch.matmul, a, a)

            time_of_one = measure(product, cfg)
            results[f"{name} {n}"] = rate(2 * n**3 / 1e9, "GFLOP", time_of_one)
            if 8 * time_of_one.best > SLOWEST:  # the next size takes eight times as long
                break

    # The largest product of our small model, in a training step of Part 4: its MLP.
    x = torch.randn(24 * 72, 128)
    weight = torch.randn(344, 128)
    time_of_one = measure(functools.partial(F.linear, x, weight), cfg)
    results["fp32 1728x128x344"] = rate(2 * x.numel() * 344 / 1e9, "GFLOP", time_of_one)
    return results


def memory(cfg):
    """How fast numbers come from memory, and from the cache: 4 MiB fit there, 256 MiB do not. Our
    small model has 3 MiB of weights."""
    results = {}
    for mib in (4, 256):
        x = torch.randn(mib * MIB // 4)
        y = torch.empty_like(x)
        time_of_read = measure(x.sum, cfg)
        time_of_copy = measure(functools.partial(y.copy_, x), cfg)
        results[f"read {mib} MiB"] = rate(mib * MIB / 1e9, "GB", time_of_read)
        results[f"copy {mib} MiB"] = rate(2 * mib * MIB / 1e9, "GB", time_of_copy)  # in and out
    return results


# generation ---------------------------------------------------------------------------------------

# The weights are random, because trained ones are no faster.
MODELS = {
    # part_6/out/sft.pt
    "small": dict(vocab_size=854, block_size=128, n_layer=3),
    # SmolLM2-135M, with 540 MB of weights
    "large": dict(
        vocab_size=49152,
        block_size=128,
        n_layer=30,
        n_head=9,
        n_kv_head=3,
        n_embd=576,
        mlp_dim=1536,
        tied=True,
        qk_norm=False,
    ),
}

# (model, answers at the same time, new tokens)
GENERATIONS = [("small", 1, 48), ("small", 64, 48), ("large", 1, 8)]
PROMPT = 32  # tokens of a prompt


class Work(NamedTuple):
    """What a computation cannot do without."""

    flops: float
    bytes: float


def used_weights(cfg):
    """The weights of a model without experts that work on each token, head included. A row of the
    embedding table is looked up, which is no work."""
    attention = 2 * cfg.n_embd * cfg.head_dim * (cfg.n_head + cfg.n_kv_head)
    mlp = 3 * cfg.n_embd * cfg.mlp_dim
    return cfg.n_layer * (attention + mlp) + cfg.n_embd * cfg.vocab_size


def decode_work(cfg, B, S):
    """One token for each of B texts that have S tokens so far, in fp32 -> Work.

    Each weight is read once and used for B multiplications and additions. Each cached key and value
    is read once. A query and a key need 2 D operations, and a weight and a value as many.
    """
    weights = used_weights(cfg)
    cached = 2 * cfg.n_layer * B * cfg.n_kv_head * S * cfg.head_dim
    attention = 4 * cfg.n_layer * B * cfg.n_head * S * cfg.head_dim
    return Work(flops=2 * B * weights + attention, bytes=4 * (weights + cached))


def prefill_work(cfg, B, T):
    """B prompts of T tokens -> Work. The head is needed for the last token alone, and a token
    attends to half of the others on average."""
    head = cfg.n_embd * cfg.vocab_size
    weights = used_weights(cfg)
    attention = 4 * cfg.n_layer * B * cfg.n_head * T * (T + 1) / 2 * cfg.head_dim
    return Work(
        flops=2 * B * T * (weights - head) + 2 * B * head + attention,
        bytes=4 * weights,
    )


class OperationCounter(TorchDispatchMode):
    """Counts the operations that torch starts, views included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def count_operations(function):
    with OperationCounter() as counter:
        function()
    return counter.count


def part_module(part, name):
    """A module of a part, in a process that imports from no other part."""
    sys.path.insert(0, str(ROOT / f"part_{part}"))
    return importlib.import_module(name)


class Generation(NamedTuple):
    """How long model.generate takes."""

    prefill: Timing  # reading the prompts, and the first new token
    decode: Timing  # each of the tokens after the first
    prefill_operations: int
    decode_operations: int


def time_generation(model, prompts, n_new, cfg):
    """Time the generation of n_new tokens -> Generation. Decoding is what more tokens add to the
    time of one."""
    clock = CLOCKS[cfg.clock]
    prefill_times = []
    decode_times = []
    model.generate(prompts, 2)
    begin = clock()
    while len(decode_times) < 5 or clock() - begin < 3 * cfg.seconds:
        start = clock()
        model.generate(prompts, 1)
        middle = clock()
        model.generate(prompts, n_new)
        end = clock()
        prefill_times.append(middle - start)
        decode_times.append((end - middle - prefill_times[-1]) / (n_new - 1))

    one = count_operations(lambda: model.generate(prompts, 1))
    two = count_operations(lambda: model.generate(prompts, 2))
    return Generation(timing(prefill_times), timing(decode_times), one, two - one)


def generation_result(tokens, time_of_one, operations, work):
    """The result for one stage of generation, with what bench.py needs for the bound."""
    row = rate(tokens, "token", time_of_one)
    row["seconds"] = time_of_one.best
    row["operations"] = operations
    return row | work._asdict()


def generation(cfg):
    """Prefill (reading the prompts) and decode (one token after the other), by model and batch."""
    model_module = part_module(9, "model")
    results = {}
    for name, B, n_new in GENERATIONS:
        gpt_cfg = model_module.GPTConfig(**MODELS[name])
        model = model_module.GPT(gpt_cfg).requires_grad_(False)
        prompts = torch.randint(gpt_cfg.vocab_size, (B, PROMPT))
        found = time_generation(model, prompts, n_new, cfg)

        work = prefill_work(gpt_cfg, B, PROMPT)
        row = generation_result(B * PROMPT, found.prefill, found.prefill_operations, work)
        results[f"{name} prefill x{B}"] = row
        work = decode_work(gpt_cfg, B, PROMPT + n_new / 2)
        row = generation_result(B, found.decode, found.decode_operations, work)
        results[f"{name} decode x{B}"] = row
    return results


# tokenizer, checkpoint, judge ---------------------------------------------------------------------


def tokenizer(cfg):
    """Part 4's tokenizer: training on the world's text, encoding and decoding."""
    tokenizer_module = part_module(4, "tokenizer")
    text = read_text(require("data/stories") / "train.txt")
    megabytes = len(text.encode()) / 1e6

    time_of_train = measure(lambda: tokenizer_module.Tokenizer.train(text, 1024), cfg, least=3)
    results = {"train": rate(megabytes, "MB", time_of_train)}

    tok = tokenizer_module.Tokenizer.train(text, 1024)
    text = text[:200_000]
    ids = tok.encode(text)
    time_of_encode = measure(lambda: tok.encode(text), cfg)
    time_of_slow = measure(lambda: tok.encode_slow(text[:20_000]), cfg)
    time_of_decode = measure(lambda: tok.decode(ids), cfg)
    results["encode"] = rate(len(ids), "token", time_of_encode)
    results["encode_slow"] = rate(len(tok.encode(text[:20_000])), "token", time_of_slow)
    results["decode"] = rate(len(ids), "token", time_of_decode)
    return results


def checkpoint(cfg):
    """Saving and loading a model: the small one, and one of 100 MB."""
    model_module = part_module(9, "model")
    sizes = {"small": MODELS["small"], "100 MB": dict(n_layer=8, n_embd=512, vocab_size=1024)}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"

        def load():
            return model_module.GPT.load(load_checkpoint(path, "base"))

        for name, size in sizes.items():
            content = model_module.GPT(model_module.GPTConfig(**size)).to_checkpoint()
            save = functools.partial(save_checkpoint, path, kind="base", **content)
            time_of_save = measure(save, cfg)
            megabytes = path.stat().st_size / 1e6
            results[f"save {name}"] = rate(megabytes, "MB", time_of_save)
            results[f"load {name}"] = rate(megabytes, "MB", measure(load, cfg))
    return results


def judge_all(records):
    for record in records:
        judge(record, record["output"])


def judge_speed(cfg):
    """How many answers the judge checks, stories and short answers apart."""
    records = read_jsonl(require("data/stories") / "instructions.jsonl", ["output", "task"])
    stories = [record for record in records if record["task"] == "story"][:200]
    others = [record for record in records if record["task"] != "story"][:200]
    results = {}
    for name, chosen in (("stories", stories), ("other answers", others)):
        time_of_all = measure(functools.partial(judge_all, chosen), cfg)
        results[name] = rate(len(chosen), "answer", time_of_all)
    return results


# train scripts ------------------------------------------------------------------------------------

# The functions of the train scripts that get a clock, and the name of what they do. The time of a
# function does not contain that of another one with a clock that it calls.
STAGES = {
    "evaluate": "evaluation",
    "rollout": "sampling",
    "score_answers": "reward model",
    "answer_logp": "reference model",
    "log_probs": "reference model",
    "ActorCritic.act": "critic",
    "gae": "advantages",
    "whiten": "advantages",
    "returns_to_go": "advantages",
    "group_advantage": "advantages",
    "learn": "update",
    "answers_of": "judge",
    "gold_share": "judge",
    "passed": "judge",
}

# These are called with gradients, too. Then they belong to the update that calls them.
WITHOUT_GRADIENT = ("log_probs", "ActorCritic.act")


class Meter:
    """Counts what a train script does in each step: seconds by stage, tokens, and operations."""

    def __init__(self, clock):
        self.clock = clock
        self.steps = []  # one dict for each finished step
        self.stages = []  # the stages that are running, the innermost last
        self.switched = clock()  # when the innermost stage last changed
        self.start_step()

    def start_step(self):
        self.seconds = defaultdict(float)  # {stage: seconds}; "other" is what has no clock
        self.work = {"trained_tokens": 0, "read_tokens": 0, "flops": 0}

    def end_step(self):
        self.switch()
        self.steps.append({"seconds": dict(self.seconds), **self.work})
        self.start_step()

    def switch(self):
        """Book the time since the last switch on the innermost stage."""
        now = self.clock()
        stage = self.stages[-1] if self.stages else "other"
        self.seconds[stage] += now - self.switched
        self.switched = now

    def clocked(self, function, stage, without_gradient=False):
        """The same function with a clock around it."""

        @functools.wraps(function)
        def with_clock(*arguments, **options):
            inside_update = without_gradient and torch.is_grad_enabled()
            if inside_update or "evaluation" in self.stages:
                return function(*arguments, **options)

            self.switch()
            self.stages.append(stage)
            value = function(*arguments, **options)
            self.switch()
            self.stages.pop()
            return value

        return with_clock

    def add_flops(self, forward, has_gradient):
        """A product in the forward pass brings two of the same size in the backward pass: one for
        the gradient of each factor."""
        if "evaluation" not in self.stages:
            self.work["flops"] += 3 * forward if has_gradient else forward

    def add_tokens(self, n):
        if "evaluation" not in self.stages:
            name = "trained_tokens" if torch.is_grad_enabled() else "read_tokens"
            self.work[name] += n


def count_work(meter):
    """From now on torch's layers tell the meter what they do.

    A weight takes part in 2 operations per token in the forward pass, and in 4 more in the backward
    pass: 6 N for N weights (Kaplan et al. 2020, section 2.1). The attention of T queries to S keys
    adds 4 T S D per head, and three times as much if it is trained.
    """
    linear = nn.Linear.forward
    embedding = nn.Embedding.forward
    fused_attention = F.scaled_dot_product_attention

    def counting_linear(self, x):
        has_gradient = torch.is_grad_enabled() and self.weight.requires_grad
        meter.add_flops(2 * x.numel() * self.out_features, has_gradient)
        return linear(self, x)

    def counting_embedding(self, idx):
        if idx.ndim == 2:  # tokens (B, T); positions are (T,)
            meter.add_tokens(idx.numel())
        return embedding(self, idx)

    def counting_attention(q, k, v, *arguments, **options):
        meter.add_flops(4 * q.numel() * k.size(-2), q.requires_grad)
        return fused_attention(q, k, v, *arguments, **options)

    nn.Linear.forward = counting_linear
    nn.Embedding.forward = counting_embedding
    F.scaled_dot_product_attention = counting_attention


def put_clocks(script, meter):
    """Clocks around those of STAGES that a script has, and a step that ends with each line of its
    log. script is {name: object}, the script's own names."""
    for path, stage in STAGES.items():
        owner, _, name = path.rpartition(".")
        if (owner or name) not in script:
            continue
        without_gradient = path in WITHOUT_GRADIENT
        if owner:
            function = getattr(script[owner], name)
            setattr(script[owner], name, meter.clocked(function, stage, without_gradient))
        else:
            script[name] = meter.clocked(script[name], stage, without_gradient)

    class MeteredLog(script["Log"]):
        def __call__(self, step, **values):
            super().__call__(step, **values)
            meter.end_step()

    script["Log"] = MeteredLog

    # Parts 1 to 3 write their attention out, as a function of model.py.
    attention = getattr(sys.modules["model"], "attention", None)
    if attention is not None:

        def counting_attention(q, k, v, mask):
            meter.add_flops(4 * q.numel() * k.size(-2), q.requires_grad)
            return attention(q, k, v, mask)

        sys.modules["model"].attention = counting_attention


def train_script(path, options, cfg):
    """Run a train script with clocks in it -> {"steps": what Meter saw, and memory in bytes}.

    The script is run in two pieces. The first defines its functions. Then they get their clocks,
    and the second piece, the block under `if __name__ == "__main__":`, runs with them.
    """
    tree = ast.parse(path.read_text())
    main_block = tree.body.pop()
    assert isinstance(main_block, ast.If), f"{path} does not end with its main block"

    # To the script all looks as if Python had started it.
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    sys.argv = [str(path), *options]
    sys.path.insert(0, str(path.parent))

    exec(compile(tree, path, "exec"), vars(module))
    memory_before = peak_memory()
    meter = Meter(CLOCKS[cfg.clock])
    put_clocks(vars(module), meter)
    count_work(meter)
    exec(compile(ast.Module([main_block], []), path, "exec"), vars(module))
    return {"steps": meter.steps, "memory_before": memory_before, "memory": peak_memory()}


# --------------------------------------------------------------------------------------------------

MEASUREMENTS = {
    "machine": machine,
    "products": products,
    "memory": memory,
    "generation": generation,
    "tokenizer": tokenizer,
    "checkpoint": checkpoint,
    "judge": judge_speed,
}

if __name__ == "__main__":
    # What follows "--" are the options of a train script.
    argv = sys.argv[1:]
    script_options = []
    if "--" in argv:
        place = argv.index("--")
        script_options = argv[place + 1 :]
        sys.argv = sys.argv[: place + 1]
    cfg = parse_args(Config)
    set_seed(cfg.seed)
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)

    if cfg.what in MEASUREMENTS:
        results = MEASUREMENTS[cfg.what](cfg)
    elif (ROOT / cfg.what).is_file() and Path(cfg.what).name.startswith("train"):
        results = train_script(ROOT / cfg.what, script_options, cfg)
    else:
        known = ", ".join(MEASUREMENTS)
        fail(f"--what={cfg.what} must be one of {known}, or a train script")

    if cfg.out:
        write_atomic(cfg.out, as_json(results).encode())
    else:
        print(as_json(results, indent=1))
