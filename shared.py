"""
What every part needs and no part teaches: the command line, seed, device and dtype, files, the log,
the judge of answers, and one style of figure.

A mistake that the user can correct ends in one line on stderr and exit code 2. A bug keeps its
traceback.
"""

import argparse
import difflib
import functools
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent

# torchrun sets RANK. Process 0 prints, logs and builds what is missing.
RANK = int(os.environ.get("RANK", 0))

# These options cannot change a result, so a run with them is still a run with the defaults.
NEUTRAL = {
    "out",
    "device",
    "resume",
    "save_every",
    "eval_every",
    "log_every",
    "threads",
    "merge",
}

# An option of one of these names has this range in every script. A script asserts what is special
# to it, for example that one size divides another.
AT_LEAST_1 = """accum asked batch_size bits block_size codes context_dim dim draws entropy_steps
    epochs eval_bytes given group hash_rows head_bits held_out k kill last length levels longer
    longest max_new_tokens minibatches moe_every n_embd n_head n_kv_head n_layer n_local n_query
    negatives ngram per_step positions probe_steps prompts rank repeats rm_steps row rows
    samples save_every seeds sentences steps streams terms top_k_experts vocab_size width
    windows"""
ABOVE_0 = """alpha beta clip grad_clip kl_horizon max_kl norm_eps patch_bytes rope_base scale
    score_clip seconds tau vf_clip"""
AT_LEAST_0 = """aux balance center eval_every examples gap head_dim kl_coef kl_target lr
    lr_adamw lr_flat lr_head lr_logits lr_value margin mlp_dim n_decoder n_encoder n_expert
    noise pairs policy_pairs port seed shuffles sink target_loss temperature threads top_k
    vf_coef weight_decay window"""
UP_TO_1 = "decay delete_at drop gamma lam migration mix share small top_p warmup wrong"

# Seconds that a run has to end after Ctrl-C.
GRACE = 5.0

# tiktoken's pattern matching gives up at a million blanks in a row.
LONGEST_BLANK = 500_000

# Larger seeds would overflow where a seed is made from a seed and a step.
LARGEST_INT = 10**12

BOOLS = {"0": False, "1": True, "false": False, "true": True}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Okabe and Ito's palette: people who are colour-blind can tell these apart.
COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
]

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Maker(NamedTuple):
    script: str  # the script that makes the file, relative to ROOT
    seconds: int  # how long that takes on two cores, roughly


# What require() can build.
MAKERS = {
    "data/stories": Maker("part_0/prepare_data.py", seconds=8),
    "part_1/out/gpt.pt": Maker("part_1/train.py", seconds=25),
    "part_2/out/gpt.pt": Maker("part_2/train.py", seconds=80),
    "part_3/out/gpt.pt": Maker("part_3/train.py", seconds=90),
    "part_4/out/base.pt": Maker("part_4/train.py", seconds=90),
    "part_5/out/gpt.pt": Maker("part_5/train.py", seconds=150),
    "part_6/out/sft.pt": Maker("part_6/train_sft.py", seconds=90),
    "part_7/out/rm.pt": Maker("part_7/train_rm.py", seconds=110),
    "part_8/out/reinforce.pt": Maker("part_8/train_reinforce.py", seconds=60),
    "part_8/out/ppo.pt": Maker("part_8/train_ppo.py", seconds=110),
    "part_9/out/grpo.pt": Maker("part_9/train_grpo.py", seconds=160),
    "part_10/out/blt.pt": Maker("part_10/train_blt.py", seconds=90),
    "part_10/out/boundless.pt": Maker("part_10/boundless.py", seconds=10),
    "part_10/out/context.pt": Maker("part_10/train_context.py", seconds=240),
    "part_10/out/distill.pt": Maker("part_10/distill.py", seconds=170),
    "part_10/out/lcm.pt": Maker("part_10/train_lcm.py", seconds=80),
    "part_10/out/smollm2.pt": Maker("part_10/weights.py", seconds=30),
    "part_10/out/sonar.pt": Maker("part_10/train_sonar.py", seconds=45),
    "part_10/out/thoughts.pt": Maker("part_10/train_thoughts.py", seconds=90),
}


# ------------------------------------------------------------------------------------------
# Errors: one line, no traceback


def fail(message, code=2):
    """Print the message as one line on stderr and exit."""
    one_line = " ".join(str(message).split())
    print("error:", one_line, file=sys.stderr, flush=True)
    sys.exit(code)


def on_interrupt(signal_number, frame):
    """The signal handler for Ctrl-C."""
    # Python ignores an exception that is raised in some places, for example while an object is
    # being deleted. A run that is still there after GRACE seconds is therefore ended without one.
    last_resort = threading.Timer(GRACE, os._exit, [130])
    last_resort.daemon = True
    last_resort.start()
    fail("interrupted; every file that was already saved is complete", code=130)


def on_uncaught_error(kind, error, trace):
    """The sys.excepthook: an OSError (a full disk, a missing folder) becomes one line."""
    if not issubclass(kind, OSError):
        sys.__excepthook__(kind, error, trace)
        return

    # stderr may be on the full disk, too.
    with suppress(OSError):
        subject = error.filename or kind.__name__
        reason = error.strerror or error
        print(f"error: {subject}: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()

    # After a hook Python exits with code 1. Only os._exit can choose another code.
    os._exit(2)


# ------------------------------------------------------------------------------------------
# Options: dataclasses, filled from the command line


def parse_args(*classes, argv=None, **defaults):
    """Build one config of each dataclass from the command line.

    cfg = parse_args(Config)
    cfg, gpt_cfg = parse_args(Config, GPTConfig, block_size=128)

    Keyword arguments replace the defaults of the fields with these names. argv is for tests.
    cfg.changed is {option: value} of every option that differs from its default and can change a
    result. All configs of one call share it.
    """
    # A list of arguments comes from a test, which handles errors and signals itself.
    if argv is None:
        signal.signal(signal.SIGINT, on_interrupt)
        sys.excepthook = on_uncaught_error
        argv = sys.argv[1:]

    names = {field.name for cls in classes for field in fields(cls)}
    unknown = set(defaults) - names
    assert not unknown, f"{unknown} are not fields of {classes}"

    given = parse_options(classes, defaults, argv)

    configs = []
    changed = {}
    for cls in classes:
        config = build_config(cls, defaults, given)
        changed |= changed_options(config, defaults, given)
        configs.append(config)

    for config in configs:
        config.changed = changed
    if len(configs) == 1:
        return configs[0]
    return tuple(configs)


def parse_options(classes, defaults, argv):
    """["--lr=0.1", "--steps", "9", "--resume"] -> {"lr": 0.1, "steps": 9, "resume": True}"""
    wants_help = "-h" in argv or "--help" in argv
    parser = build_parser(classes, defaults, wants_help)
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        # A value with a minus in front (-1e-3) looks like an option, unless it follows a "=".
        option, message = error.argument_name, error.message
        if message == "expected one argument":
            message = f"wants a value: {option}=..."
        fail(f"{option} {message}")

    if unknown:
        word = unknown[0].partition("=")[0]
        options = [f"--{field.name}" for cls in classes for field in fields(cls)]
        nearest = difflib.get_close_matches(word, options, n=1, cutoff=0)[0]
        fail(f"no option {word}, did you mean {nearest}? --help lists all options")
    return vars(namespace)


def build_parser(classes, defaults, wants_help):
    """An argparse parser with one option for each field. It returns only the options given.

    The texts for --help are read from the source code, and only if they are wanted.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option=value ...]",
        description=script_description(classes[0]) if wants_help else None,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=28, width=100
        ),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )

    names = set()
    for cls in classes:
        group = parser.add_argument_group(cls.__name__)
        comments = field_comments(cls) if wants_help else {}
        for field in fields(cls):
            # Two classes may share a field. Then one option fills both.
            if field.name in names:
                continue
            names.add(field.name)

            default = defaults.get(field.name, field.default)
            shown_default = "empty" if default == "" else default
            text = f"{comments.get(field.name, '')} (default: {shown_default})".strip()

            # A flag may stand alone: --resume means --resume=true.
            is_flag = field.type is bool
            group.add_argument(
                f"--{field.name}",
                type=converter(field.type),
                nargs="?" if is_flag else None,
                const=True if is_flag else None,
                metavar=field.type.__name__.upper(),
                help=text.replace("%", "%%"),
            )
    return parser


def converter(kind):
    """A function from the text on the command line to a value of this type."""
    wanted = {int: "an int", float: "a float", bool: "true or false"}

    def convert(text):
        try:
            value = BOOLS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            message = f"wants {wanted[kind]}, got {text!r}"
            raise argparse.ArgumentTypeError(message) from None

        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"wants a finite number, got {text!r}")
        if kind is int and abs(value) > LARGEST_INT:
            raise argparse.ArgumentTypeError(f"wants at most {LARGEST_INT:,}, got {text!r}")
        return value

    return convert


def script_description(cls):
    """The first paragraph of the script's docstring, and the commands in the rest of it."""
    docstring = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    first, _, rest = docstring.partition("\n\n")
    commands = re.findall(r"^ *(?:\w+=\S+ )*(?:python3?|torchrun) .*", rest, re.MULTILINE)
    return "\n".join([first, "", *commands])


def field_comments(cls):
    """{field: comment}: the comment at the end of the field's line, or else the lines above it."""
    comments = {}
    lines_above = []
    for line in inspect.getsource(cls).splitlines():
        line = line.strip()
        if line.startswith("#"):
            lines_above.append(line.lstrip("# "))
            continue

        match = re.fullmatch(r"(\w+)\s*:.*?(?:\s#\s*(.*))?", line)
        if match:
            name, comment = match.groups()
            comments[name] = comment or " ".join(lines_above)
        lines_above = []
    return comments


def build_config(cls, defaults, given):
    """One config from the final values, so that __post_init__ derives other fields from these."""
    standard = {field.name: field.default for field in fields(cls)} | defaults
    for name, value in select_fields(cls, given).items():
        # A default is always allowed: where it is 0, the script chooses a value by itself.
        if value != standard.get(name):
            check_range(name, value)
    values = select_fields(cls, defaults | given)
    try:
        return cls(**values)
    except AssertionError as error:
        fail(error)
    except ZeroDivisionError:
        options = " ".join(f"--{name}={value}" for name, value in values.items())
        fail(f"a size by which others are divided is 0: {options}")


def check_range(name, value):
    """Fail if the value of an option is outside of the range that its name stands for."""
    if isinstance(value, (str, bool)):
        return
    if name in AT_LEAST_1.split() and value < 1:
        fail(f"--{name}={value} must be at least 1")
    if name in ABOVE_0.split() and value <= 0:
        fail(f"--{name}={value} must be above 0")
    if name in AT_LEAST_0.split() and value < 0:
        fail(f"--{name}={value} must not be negative")
    if name in UP_TO_1.split() and not 0 <= value <= 1:
        fail(f"--{name}={value} must be from 0 to 1")


def changed_options(config, defaults, given):
    """{option: value} of the given options that differ from their defaults and can matter."""
    default_config = type(config)(**select_fields(type(config), defaults))
    changed = {}
    for name in select_fields(type(config), given):
        value = getattr(config, name)
        if name not in NEUTRAL and value != getattr(default_config, name):
            changed[name] = value
    return changed


def select_fields(cls, values):
    """The values that belong to fields of this class, in the order of the fields."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


# ------------------------------------------------------------------------------------------
# Setting up a run


def set_seed(seed):
    """Seed every generator of random numbers that the parts use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name=""):
    """The torch.device of this name; the best one available if the name is empty."""
    best = "cpu"
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available():
        best = "mps"
    name = name or best

    # Under torchrun each process takes a GPU of its own.
    full_name = name
    if name == "cuda":
        full_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"

    # Only using a device shows that it works. A torch built without CUDA raises AssertionError.
    try:
        device = torch.device(full_name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        fail(f"--device={name} is not available here, {best} is")

    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """The checked name, or if it is empty the best one: bf16 on CUDA and fp32 elsewhere."""
    if not name:
        return "bf16" if device.type == "cuda" else "fp32"
    if name not in DTYPES or (name == "fp16" and device.type == "cpu"):
        fail(f"--dtype={name} is not possible: choose fp32, bf16 or, on a GPU, fp16")
    return name


def autocast_for(device, dtype):
    """A function that makes the context for forward passes: `with autocast(): ...`"""
    if dtype == "fp32":
        return nullcontext
    return functools.partial(torch.autocast, device.type, DTYPES[dtype])


def output_folder(cfg):
    """The Path of the folder for everything that a run writes. It is made if it is missing.

    It is --out if the user gave one, or else out/ beside the script. A run with other settings than
    the defaults goes to out/steps=50,.../, because the parts that follow read from out/ itself and
    must not pick up somebody's experiment.
    """
    # A config that parse_args did not make has no `changed`, and not every script has `out`.
    out = getattr(cfg, "out", "")
    changed = getattr(cfg, "changed", {})

    if out:
        folder = Path(out).expanduser().resolve()
    else:
        folder = Path(inspect.getfile(type(cfg))).resolve().parent / "out"
        if changed:
            settings = ",".join(f"{name}={value}" for name, value in changed.items())
            folder = folder / re.sub(r"[^\w.=,+-]+", "_", settings)[:200]
            if RANK == 0:
                print(f"some settings differ from the defaults: writing to {folder}", flush=True)

    if folder.exists() and not folder.is_dir():
        fail(f"--out={out} is a file, but it must be a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ------------------------------------------------------------------------------------------
# Files


def as_json(value, **options):
    """json.dumps, which also accepts tensors and numpy's numbers."""
    return json.dumps(value, default=lambda array: array.tolist(), **options)


def write_atomic(path, data):
    """Write all the bytes or none: to a temporary file first, which is then renamed."""
    path = Path(path)
    sweep(path.parent, f".{path.name}.*.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder, pattern):
    """Delete the temporary files and folders that killed runs left behind. What somebody may still
    be writing is younger than an hour, and stays."""
    for path in Path(folder).glob(pattern):
        # Another process may sweep at the same time.
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < 3600:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def save_metrics(out, name="metrics", **metrics):
    """Write OUT/NAME.json. Only the part's main script keeps the name "metrics"."""
    write_atomic(Path(out) / f"{name}.json", as_json(metrics, indent=1).encode())


def save_checkpoint(path, *, kind, **content):
    """Write dicts, lists, strings, numbers, bytes and tensors. Pass changed=cfg.changed, too."""
    # In memory first: a full disk is then a plain OSError in write_atomic.
    buffer = io.BytesIO()
    torch.save({"kind": kind, "changed": {}, **content}, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path, kind):
    """The dict that save_checkpoint wrote, with its tensors on the CPU.

    kind is a name, a tuple of names of which any is accepted, or None to accept every kind.
    """
    if not Path(path).is_file():
        fail(f"no checkpoint at {path}")

    # torch.load raises many kinds of errors for files that it did not write.
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        actual_kind = dict(content)["kind"]
    except Exception as error:
        name = type(error).__name__
        fail(f"{path} is truncated or not a checkpoint of this project ({name}): make it again")

    if kind is None:
        return content
    expected_kinds = (kind,) if isinstance(kind, str) else kind
    if actual_kind not in expected_kinds:
        expected = " or ".join(repr(expected_kind) for expected_kind in expected_kinds)
        fail(f"{path} is a {actual_kind!r} checkpoint, expected {expected}")
    return content


def require(path):
    """The absolute Path of a file that a script needs, such as "part_6/out/sft.pt".

    If it is one of MAKERS and missing, its script is run with the defaults. Any other path is the
    user's own, relative to the current folder, and must exist.
    """
    if str(path) not in MAKERS:
        if not Path(path).exists():
            fail(f"there is no {path}")
        return Path(path).resolve()

    # A data set is a folder, and prepare_data.py writes facts.json last.
    target = ROOT / path
    is_checkpoint = target.suffix != ""
    last_file = target if is_checkpoint else target / "facts.json"

    # Under torchrun only process 0 builds, the others wait for it.
    while RANK > 0 and not last_file.exists():
        time.sleep(0.5)
    if not last_file.exists():
        run_maker(path, MAKERS[str(path)])

    # Somebody may have written an experiment to this path with --out.
    made = load_checkpoint(last_file, None) if is_checkpoint else read_facts(last_file)
    changed = made.get("changed", {})
    if changed:
        options = " ".join(f"--{name}={value}" for name, value in changed.items())
        fail(
            f"{path} was made with {options}, not with the defaults: "
            "move it away, and it will be built again"
        )
    return target


def read_facts(path):
    """The facts.json of a world, as a dict."""
    try:
        facts = json.loads(path.read_text())
        # What an older version of prepare_data.py wrote lacks "after".
        is_current = "after" in facts["patterns"][0]
    except (ValueError, LookupError, TypeError):
        is_current = False
    if not is_current:
        fail(f"{path} is broken or of an older version: delete {path.parent}, it is made again")
    return facts


def run_maker(path, maker):
    """Run the script that makes this file, and exit if it fails."""
    print(f"{path} is missing: running {maker.script}, about {maker.seconds} s", flush=True)

    # The child trains in one process, so it must not see the variables that torchrun has set.
    torchrun = "RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_"
    environment = {}
    for name, value in os.environ.items():
        if not re.match(torchrun, name):
            environment[name] = value

    # The child has already printed why it failed.
    child = subprocess.run([sys.executable, str(ROOT / maker.script)], env=environment)
    if child.returncode != 0:
        sys.exit(child.returncode)


def read_foreign(read, source, name=""):
    """read(source), for a source that another project wrote and of which anything may be wrong.
    Whatever read raises is one line that begins with the name of the source."""
    try:
        return read(source)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        fail(f"{name or source} is missing, truncated or of another kind ({reason})")


def read_text(path):
    """A UTF-8 file as one string, which is never empty. "shakespeare" is downloaded once."""
    if path == "shakespeare":
        path = download_shakespeare()
    if not Path(path).is_file():
        fail(f"there is no file {path}")

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text: byte {error.start} does not belong there")
    if not text.strip():
        fail(f"{path} is empty")
    if re.search(rf"\s{{{LONGEST_BLANK}}}", text):
        fail(f"{path} has more than {LONGEST_BLANK:,} blanks in a row: remove some of them")
    return text


def download_shakespeare():
    """The path of the tiny Shakespeare text, which is downloaded if it is not there yet."""
    path = ROOT / "data/shakespeare/input.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return path

    # The file gets its name only after its checksum was found to be right.
    socket.setdefaulttimeout(30)
    try:
        torch.hub.download_url_to_file(SHAKESPEARE, path, SHAKESPEARE_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        fail(
            f"cannot download tiny Shakespeare ({error}): "
            f"without a network, put the file at {path} yourself"
        )
    return path


def read_jsonl(path, fields):
    """A list of dicts from a file with one JSON object per line, or with one JSON array of them.

    Every record must have all of `fields`, as strings. If it has a "check", it must be one that
    judge understands.
    """
    text = read_text(path)
    is_array = text.lstrip().startswith("[")

    # str.splitlines() would also cut at other characters, which may stand inside a JSON string.
    chunks = [text] if is_array else text.split("\n")

    records = []
    for line_number, chunk in enumerate(chunks, start=1):
        if not chunk.strip():
            continue
        try:
            value = json.loads(chunk.strip())
        except json.JSONDecodeError as error:
            line = line_number + error.lineno - 1
            fail(f"{path} line {line}: {error.msg}, column {error.colno}")

        for record in value if isinstance(value, list) else [value]:
            where = f"{path} line {line_number}"
            if is_array:
                where = f"{path} record {len(records) + 1}"
            check_record(record, fields, where)
            records.append(record)

    if not records:
        fail(f"{path} has no records")
    return records


def check_record(record, fields, where):
    """Fail unless the record is a dict with all of these fields."""
    if not isinstance(record, dict):
        fail(f"{where}: expected an object with {', '.join(fields)}")
    for field in fields:
        if field not in record:
            fail(f"{where}: field {field!r} is missing")
        if not isinstance(record[field], str):
            fail(f"{where}: field {field!r} must be a string, got {as_json(record[field])}")

    check = record.get("check")
    problem = check_problem(check) if check else None
    if problem:
        fail(f'{where}: "check" {problem}')


# ------------------------------------------------------------------------------------------
# The log


class Log:
    """log(step, loss=..., ...) writes a line to OUT/NAME.jsonl and sometimes prints one.

    It prints at most one line every 2 s, plus the first, the last, and every line with a value that
    the line before did not have (an evaluation). Steps run from 0 to total_steps - 1. With
    resume_step=N the lines of the steps before N are kept.
    """

    def __init__(self, out, total_steps, resume_step=0, name="log"):
        self.total_steps = total_steps
        self.first_step = resume_step
        self.start_time = time.time()
        self.last_print_time = 0.0
        self.last_keys = set()

        path = Path(out) / f"{name}.jsonl"
        if RANK > 0:
            path = Path(os.devnull)

        # A crash may have torn the last line. Such a line is not kept.
        kept_lines = []
        if resume_step > 0 and path.exists():
            for line in path.read_text().splitlines(keepends=True):
                match = re.fullmatch(r'{"step": (\d+)\b.*}\n', line)
                if match and int(match[1]) < resume_step:
                    kept_lines.append(line)

        self.file = open(path, "w", buffering=1)
        self.file.writelines(kept_lines)

    @property
    def seconds(self):
        """The time since the log was opened."""
        return time.time() - self.start_time

    def __call__(self, step, **values):
        loss = float(values.get("loss", 0))
        if not math.isfinite(loss):
            fail(f"loss is {loss} at step {step}: lower --lr, or look at the data of this step")

        line = as_json({"step": step, **values})
        self.file.write(line + "\n")

        has_new_key = not set(values) <= self.last_keys
        self.last_keys = set(values)
        is_last = step + 1 >= self.total_steps
        is_time = time.time() - self.last_print_time >= 2
        if RANK == 0 and (has_new_key or is_last or is_time):
            self.last_print_time = time.time()
            self.print_progress(step, json.loads(line))

    def print_progress(self, step, values):
        """Print the numbers and texts of one line, the time elapsed and the time left."""
        shown = []
        for name, value in values.items():
            if name == "step" or not isinstance(value, (str, int, float)):
                continue
            text = f"{value:#.4g}" if isinstance(value, float) else str(value)
            shown.append(f"{name} {text}")

        # The steps to come take as long as the steps so far did.
        seconds_per_step = self.seconds / max(step + 1 - self.first_step, 1)
        seconds_left = seconds_per_step * max(self.total_steps - step - 1, 0)
        times = f"{clock(self.seconds)} elapsed, {clock(seconds_left)} left"

        width = len(str(self.total_steps))
        print(f"step {step:{width}}/{self.total_steps}", *shown, times, sep=" | ", flush=True)


def read_log(out, name="log"):
    """The lines that Log wrote to OUT/NAME.jsonl, as a list of dicts."""
    lines = (Path(out) / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def clock(seconds):
    """75.3 -> "1:15", minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------------------------------
# The judge


class Verdict(NamedTuple):
    checks: dict  # {name of the check: whether it holds}
    share: float  # share of the checks that hold
    passed: bool  # whether all of them hold

    # for each step of a solution whether it is right, or None if the record has no steps; a right
    # answer passes whatever its steps are
    steps: list | None = None


class StoryPattern(NamedTuple):
    stage: int  # the place of such a sentence in a story, counted from 0
    regex: re.Pattern  # what such a sentence looks like; its groups are names and things
    end: str  # how a story with this last sentence ends, or None
    after: list  # the regexes of the sentences that it may follow, or None if any may stand there


# What the value of each key of a "check" must be.
CHECKS = {
    "answer": "a string",
    "number": "a string of digits",
    "steps": "a list of equations like 7-2=5",
    "must": "a list of strings",
    "ends": "a string",
    "no_repeat": "true or false",
    "patterns": "a string",
}


def judge(record, answer, ended=True):
    """Check an answer by rules -> Verdict, or None if the record has no "check".

    record["check"] is a dict. Its keys say what is checked:
        answer     the answer must be this text, both in their normal form (normal_form)
        number     the last number in the answer must be this one
        steps      the equations that lead to it, such as "7-2=5"; Verdict.steps says which of them
                   the answer has, and whether it is right does not depend on them
        must       a list of words that must occur
        ends       how the story must end, for example "happy"
        no_repeat  if true, no sentence may occur twice
        patterns   the name of a world: the sentences must tell one of its stories
    ended=False says that the answer was cut off, which is a check of its own. Line breaks and
    repeated blanks count as one blank.
    """
    check = record.get("check")
    if not check:
        return None

    text = " ".join(answer.split())
    sentences = re.split(r"(?<=[.!?]) ", text) if text else []

    checks = {}
    for word in check.get("must", []):
        whole_word = rf"(?<!\w){re.escape(word)}(?!\w)"
        checks[f"has:{word}"] = re.search(whole_word, text) is not None

    if "answer" in check:
        checks["answer"] = normal_form(answer) == normal_form(check["answer"])

    if "number" in check:
        numbers = re.findall(r"\d+", text)
        checks["number"] = numbers[-1:] == [check["number"]]

    if check.get("no_repeat"):
        checks["no_repeat"] = 0 < len(sentences) == len(set(sentences))

    if "patterns" in check or "ends" in check:
        checks |= check_story(check, sentences)

    # An exact answer that has ended needs no further proof that it has.
    if "answer" not in check or not ended:
        checks["end"] = ended

    share = sum(checks.values()) / len(checks)
    steps = judge_steps(check["steps"], text) if "steps" in check else None
    return Verdict(checks, share, passed=all(checks.values()), steps=steps)


def normal_form(text):
    """The form in which exact answers are compared: lower case, single blanks, and no full stop at
    the end. "Yes." -> "yes", " 7\\n" -> "7"."""
    return " ".join(text.lower().split()).removesuffix(".")


# Longer numbers than these are no part of an equation: Python refuses to convert very long ones.
EQUATION = re.compile(r"(\d{1,15}) ?([-+*]) ?(\d{1,15}) ?= ?(\d{1,15})")


def judge_steps(expected, text):
    """Which steps of a written solution are right? -> a list of bools.

    The equations in the text are compared with the expected ones, in order. a+b=c may be written
    as b+a=c. An equation too many is a wrong step, and so is one that is missing.
    """

    def normal(equation):
        left, sign, right, result = EQUATION.fullmatch(equation).groups()
        operands = [int(left), int(right)]
        if sign != "-":
            operands.sort()
        return sign, operands, int(result)

    written = [match[0] for match in EQUATION.finditer(text)]
    right = [normal(a) == normal(b) for a, b in zip(expected, written)]
    return right + [False] * abs(len(expected) - len(written))


def check_problem(check):
    """One line that says what is wrong with a record's "check", or None if judge can use it."""
    if not isinstance(check, dict):
        return f"must be an object with some of {', '.join(CHECKS)}, got {as_json(check)}"

    for name, value in check.items():
        if name not in CHECKS:
            nearest = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0)[0]
            return f"has no rule {name!r}, did you mean {nearest!r}?"

        if name == "must":
            is_right = isinstance(value, list) and all(isinstance(word, str) for word in value)
        elif name == "steps":
            texts = value if isinstance(value, list) else [None]
            is_right = all(isinstance(t, str) and EQUATION.fullmatch(t) for t in texts)
        elif name == "number":
            is_right = isinstance(value, str) and re.fullmatch(r"\d+", value) is not None
        elif name == "no_repeat":
            is_right = isinstance(value, bool)
        else:
            is_right = isinstance(value, str)
        if not is_right:
            return f"{name!r} must be {CHECKS[name]}, got {as_json(value)}"

    world = check.get("patterns", "stories")
    facts = ROOT / "data" / world / "facts.json"
    if world != "stories" and not facts.is_file():
        return f"'patterns' names the world {world!r}, but there is no {facts}"
    return None


def check_story(check, sentences):
    """{name: whether it holds} of the checks that need the sentence patterns of a world."""
    world = check.get("patterns", "stories")
    patterns = story_patterns(ROOT / "data" / world / "facts.json")

    # For each sentence: its pattern, or None if the world has no such sentence.
    matched = [match_sentence(patterns, sentence) for sentence in sentences]

    checks = {}
    if "ends" in check:
        last = matched[-1] if matched else None
        checks["ends"] = last is not None and last.end == check["ends"]

    if "patterns" in check:
        # A story has exactly one sentence for each stage, in order.
        stages = [pattern.stage if pattern else None for pattern in matched]
        last_stage = max(pattern.stage for pattern in patterns)
        complete = stages == list(range(last_stage + 1))
        checks["patterns"] = complete and possible_sequence(matched)
        checks["agree"] = sentences_agree(matched, sentences)
    return checks


def match_sentence(patterns, sentence):
    """The first pattern that the whole sentence fits, or None."""
    for pattern in patterns:
        if pattern.regex.fullmatch(sentence):
            return pattern
    return None


def possible_sequence(matched):
    """Can each sentence follow the one before it? Nobody asks the wind to give a ball back."""
    for before, pattern in zip(matched, matched[1:]):
        if pattern.after is not None and before.regex.pattern not in pattern.after:
            return False
    return True


def sentences_agree(matched, sentences):
    """Does every sentence speak of the same hero, the same thing, and so on?"""
    value_of = {}
    for pattern, sentence in zip(matched, sentences):
        if pattern is None:
            continue
        for name, value in pattern.regex.fullmatch(sentence).groupdict().items():
            if value and value_of.setdefault(name, value) != value:
                return False
    return any(pattern is not None for pattern in matched)


@functools.lru_cache
def story_patterns(facts_path):
    """The list of StoryPatterns in a world's facts.json."""
    if not facts_path.exists():
        require(f"data/{facts_path.parent.name}")

    patterns = []
    for row in read_facts(facts_path)["patterns"]:
        regex = re.compile(row["regex"])
        patterns.append(StoryPattern(row["stage"], regex, row["end"], row["after"]))
    return patterns


# ------------------------------------------------------------------------------------------
# Figures


def figure(title, xlabel="", ylabel="", rows=1, columns=1, height=4.5):
    """(fig, ax), 800 pixels wide and `height` inches high.

    With several rows or columns, ax is the array that plt.subplots returns.
    """
    # Not pyplot: it needs a window system, and it keeps every figure until it is closed.
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "axes.grid": True,
        "grid.alpha": 0.2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        "font.size": 11,
    }
    matplotlib.rcParams.update(style)

    fig = Figure(figsize=(8, height), dpi=100, layout="constrained")
    fig.suptitle(title)
    ax = fig.subplots(rows, columns, subplot_kw={"xlabel": xlabel, "ylabel": ylabel})
    return fig, ax


def save_figure(fig, path):
    """Write a PNG file. It carries the figure's title for generate_screenshots.py."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Title": fig.get_suptitle()})
    write_atomic(path, buffer.getvalue())
    print(f"wrote {path}", flush=True)


def plot_log(out, *panels, name="log"):
    """Draw OUT/NAME.jsonl as OUT/NAME.png, one panel per key.

    A tuple of keys shares a panel: plot_log(out, ("loss", "val_loss"), "lr").
    """
    records = read_log(out, name)
    fig, axes = figure(name, "step", rows=len(panels), height=1 + 2.5 * len(panels))
    for ax, panel in zip(np.ravel(axes), panels):
        keys = (panel,) if isinstance(panel, str) else panel
        for key in keys:
            # Not every step has every key: an evaluation comes once in a while.
            with_key = [record for record in records if record.get(key) is not None]
            steps = [record["step"] for record in with_key]
            values = [record[key] for record in with_key]
            marker = "." if len(values) < 40 else ""
            ax.plot(steps, values, marker=marker, label=key)
        ax.legend()
    save_figure(fig, Path(out) / f"{name}.png")
