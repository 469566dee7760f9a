"""What every part needs and no part teaches: options, device, files, log, the judge of answers, one style of figure.
What a user can mend is one line on stderr and exit code 2, never a traceback."""
import difflib, functools, inspect, io, json, math, os, random, re, signal, socket, subprocess, sys, time
from contextlib import nullcontext, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # torchrun sets it; 0 is the process that prints, logs and builds
NEUTRAL = {"out", "device", "resume", "save_every", "eval_every", "log_every", "threads"}  # cannot change a result
BOOLS = {"0": False, "1": True, "false": False, "true": True}
as_json = functools.partial(json.dumps, default=lambda value: value.tolist())  # tensors and numpy numbers too
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]  # Okabe and Ito
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MAKERS = {  # what require() can build: by which script, in about how many seconds on two cores
    "data/stories": ("part_0/prepare_data.py", 8), "part_1/out/gpt.pt": ("part_1/train.py", 25),
    "part_2/out/gpt.pt": ("part_2/train.py", 80), "part_3/out/gpt.pt": ("part_3/train.py", 90),
    "part_4/out/base.pt": ("part_4/train.py", 90), "part_5/out/gpt.pt": ("part_5/train.py", 150),
    "part_6/out/sft.pt": ("part_6/train_sft.py", 90), "part_7/out/rm.pt": ("part_7/train_rm.py", 160),
    "part_8/out/ppo.pt": ("part_8/train_ppo.py", 110), "part_9/out/grpo.pt": ("part_9/train_grpo.py", 160),
}

def fail(message, code=2):
    print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(code)

def need(condition, message):
    condition or fail(message)

def on_error(kind, error, trace):  # a sys.excepthook; os._exit, because a hook cannot choose the exit code
    if not issubclass(kind, OSError):
        return sys.__excepthook__(kind, error, trace)
    with suppress(OSError):
        print(f"error: {error.filename or kind.__name__}: {error.strerror or error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(2)

def print_help(configs):
    first, *rest = inspect.cleandoc(sys.modules[type(configs[0]).__module__].__doc__ or "").split("\n\n")
    print(first, "", *re.findall(r"^ *(?:\w+=\S+ )*(?:python|torchrun) .*", "\n".join(rest), re.M), sep="\n")
    for config in configs:
        comments = dict(re.findall(r"^\s+(\w+)\s*:[^#\n]*#\s*(.*)$", inspect.getsource(type(config)), re.M))
        print(f"\n{type(config).__name__}")
        for f in fields(config):
            print(f"  {f'--{f.name}={getattr(config, f.name)}':<28}  {comments.get(f.name, '')}".rstrip())

def parse(argv, kinds):
    """["--lr=0.1", "--steps", "9", "--resume"] -> {"lr": 0.1, "steps": 9, "resume": True}, by the fields' types."""
    given, words = {}, list(argv)
    while words:
        key, equals, text = words.pop(0).partition("=")
        near = difflib.get_close_matches(key, kinds, 1, 0)[0]
        need(key.startswith("--") and key[2:] in kinds, f"no option {key}, did you mean --{near}? --help lists them")
        key, kind = key[2:], kinds[key[2:]]
        if not equals:
            follows = words and not words[0].startswith("--")
            need(follows or kind is bool, f"--{key} wants a value: --{key}=...")
            text = words.pop(0) if follows else "true"
        try:
            given[key] = BOOLS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            fail(f"--{key} wants {'an' if kind is int else 'a'} {kind.__name__}, got {text!r}")
    return given

def rebuild(config, own):
    """The same dataclass with `own` changed. What its __post_init__ derived (head_dim=0 -> 32) is derived again."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    for f in fields(config):
        with suppress(Exception):  # a default may be impossible beside these values
            values[f.name] = f.default if replace(config, **{f.name: f.default}) == config else values[f.name]
    return type(config)(**{**values, **own})

def cli(*configs, argv=None):
    """The same dataclasses, filled from the command line. .changed: {knob: value} off its default that can matter."""
    if argv is None:  # a script, not a test
        signal.signal(signal.SIGINT, lambda *_: fail("interrupted, every file that was saved is whole", 130))
        sys.excepthook = on_error
        argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        sys.exit(print_help(configs))
    given = parse(argv, {f.name: f.type for c in configs for f in fields(c)})
    filled, changed = [], {}
    for config in configs:
        own = {f.name: given[f.name] for f in fields(config) if f.name in given}
        try:
            new = rebuild(config, own)
        except (AssertionError, ZeroDivisionError) as error:
            fail(str(error) if isinstance(error, AssertionError) else f"a size is 0 that others are divided by: {own}")
        changed |= {k: v for k, v in own.items() if k not in NEUTRAL and getattr(new, k) != getattr(config, k)}
        new.changed = changed
        filled.append(new)
    return tuple(filled) if len(filled) > 1 else filled[0]

def setup(cfg):
    """Seed, threads, device, dtype and out of cfg, written back resolved -> (device, autocast), `with autocast():`."""
    seed = getattr(cfg, "seed", 0)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(getattr(cfg, "threads", 0) or torch.get_num_threads())
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = getattr(cfg, "device", "") or best
    try:  # under torchrun each process takes the GPU of its LOCAL_RANK
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):  # torch raises the latter where it was built without CUDA
        fail(f"--device={name} is not available here, {best} is")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = getattr(cfg, "dtype", "fp32") or ("bf16" if device.type == "cuda" else "fp32")
    possible = dtype in DTYPES and (dtype, device.type) != ("fp16", "cpu")
    need(possible, f"--dtype={dtype}: it is fp32, bf16 or, on a GPU, fp16")
    out, changed = getattr(cfg, "out", ""), getattr(cfg, "changed", {})
    folder = Path(out).expanduser().resolve() if out else Path(inspect.getfile(type(cfg))).resolve().parent / "out"
    if changed and not out:  # the default chain is never silently someone's experiment
        folder /= re.sub(r"[^\w.=,+-]+", "_", ",".join(f"{k}={v}" for k, v in changed.items()))[:200]
        RANK or print(f"other settings than the defaults: this run goes to {folder}", flush=True)
    need(folder.is_dir() or not folder.exists(), f"--out={out} is a file, a folder is wanted")
    folder.mkdir(parents=True, exist_ok=True)
    cfg.device, cfg.dtype, cfg.out = str(device), dtype, str(folder)
    return device, nullcontext if dtype == "fp32" else functools.partial(torch.autocast, device.type, DTYPES[dtype])

def write_atomic(path, data):
    """All the bytes or none: temporary name, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

def save_checkpoint(path, *, kind, **content):
    """One file of plain dicts, lists, strings, numbers, bytes and tensors. Pass changed=cfg.changed."""
    buffer = io.BytesIO()  # in memory first: a full disk is then an OSError, with nothing half-written
    torch.save({"kind": kind, "changed": {}, **content}, buffer)
    write_atomic(path, buffer.getvalue())

def load_checkpoint(path, kind):
    """The dict that save_checkpoint wrote, on the CPU. kind: a name, a tuple of names that will do, or None for any."""
    need(Path(path).is_file(), f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(content)["kind"]
    except Exception as error:  # torch.load has a dozen ways to say that a file is not its own
        fail(f"{path} is truncated or not a checkpoint of this project ({type(error).__name__}): make it again")
    wanted = (kind,) if isinstance(kind, str) else kind or (found,)
    need(found in wanted, f"{path} is a {found!r} checkpoint, wanted is {' or '.join(map(repr, wanted))}")
    return content

def require(path):
    """The absolute Path of "part_6/out/sft.pt", "data/stories", ...: if missing, its script makes it with the defaults.
    Any other path is the user's own, relative to where they stand, and must exist."""
    if str(path) not in MAKERS:
        return Path(path).resolve() if Path(path).exists() else fail(f"there is no {path}")
    target, (script, seconds) = ROOT / path, MAKERS[str(path)]
    done = target if target.suffix else target / "facts.json"  # the generator writes facts.json last
    while RANK > 0 and not done.exists():  # rank 0 alone builds
        time.sleep(0.5)
    if not done.exists():
        print(f"{path} is missing: running {script}, about {seconds} s", flush=True)
        torchrun = "RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_"  # the child trains alone
        env = {k: v for k, v in os.environ.items() if not re.match(torchrun, k)}
        child = subprocess.run([sys.executable, str(ROOT / script)], env=env)
        child.returncode == 0 or sys.exit(child.returncode)  # it has said why
    made = load_checkpoint(done, None) if target.suffix else json.loads(done.read_text())
    knobs = " ".join(f"--{k}={v}" for k, v in made.get("changed", {}).items())
    need(not knobs, f"{path} was made with {knobs}, not with the defaults: move it away and it is built again")
    return target

def read_text(path):
    """A UTF-8 file as one string, never empty. The name "shakespeare" is downloaded once."""
    if path == "shakespeare":
        path = ROOT / "data/shakespeare/input.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)
        try:  # it checks the sum, then renames
            path.exists() or torch.hub.download_url_to_file(SHAKESPEARE, path, SHAKESPEARE_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            fail(f"cannot download tiny Shakespeare ({error}): without a network, put it at {path}")
    need(Path(path).is_file(), f"there is no file {path}")
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    need("\ufffd" not in text, f"{path} is not UTF-8 text")
    return text if text.strip() else fail(f"{path} is empty")

def read_jsonl(path, fields):
    """A list of dicts, one JSON object per line or one JSON array of them. Each has `fields`, as text or numbers."""
    text, records = read_text(path), []
    array = text.lstrip().startswith("[")
    for i, line in enumerate([text] if array else text.split("\n"), 1):  # splitlines() also cuts inside strings
        try:
            found = json.loads(line.strip() or "[]")
        except json.JSONDecodeError as error:
            fail(f"{path} line {i + error.lineno - 1}: {error.msg}, column {error.colno}")
        for record in found if isinstance(found, list) else [found]:
            where = f"{path} record {len(records) + 1}" if array else f"{path} line {i}"
            need(isinstance(record, dict), f"{where}: an object with {', '.join(fields)} is wanted")
            for f in fields:
                need(isinstance(record.get(f), (str, int, float)), f"{where}: field {f!r} is missing or not text")
            records.append(record)
    return records or fail(f"{path} has no records")

def save_metrics(out, name="metrics", **metrics):
    """Flat OUT/metrics.json. out: a config or its folder; name= for any script but the part's main one."""
    write_atomic(Path(out.out if is_dataclass(out) else out) / f"{name}.json", as_json(metrics, indent=1).encode())

class Log:
    """log(step, loss=...): a line of OUT/log.jsonl per call; on the screen one every 2 s, besides the first, the last,
    and one with something new (an evaluation). Steps are 0 to total - 1; resume_step=N keeps the lines of steps < N."""
    seconds = property(lambda self: time.time() - self.start)

    def __init__(self, cfg, total, resume_step=0, name="log"):
        self.total, self.first, self.start, self.printed, self.keys = total, resume_step, time.time(), 0, set()
        path = Path(cfg.out) / f"{name}.jsonl" if RANK == 0 else Path(os.devnull)
        lines = re.finditer(r'^{"step": (\d+)\b.*}\n', path.read_text() if resume_step and path.exists() else "", re.M)
        self.file = open(path, "w", buffering=1)
        self.file.writelines(m[0] for m in lines if int(m[1]) < resume_step)  # a torn last line does not match

    def __call__(self, step, **values):
        loss = float(values.get("loss", 0))
        need(math.isfinite(loss), f"loss is {loss} at step {step}: lower --lr, or look at the data of this step")
        line = as_json({"step": step, **values})
        self.file.write(line + "\n")
        new, self.keys = set(values) - self.keys, set(values)
        if RANK > 0 or not (new or step + 1 >= self.total or time.time() - self.printed >= 2):
            return
        self.printed = time.time()
        scalars = list(json.loads(line).items())[1:]
        shown = [f"{k} {v:#.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in scalars if np.isscalar(v)]
        left = self.seconds / max(step + 1 - self.first, 1) * max(self.total - step - 1, 0)
        times = "{}:{:02} elapsed, {}:{:02} left".format(*divmod(int(self.seconds), 60), *divmod(int(left), 60))
        print(f"step {step:{len(str(self.total))}}/{self.total}", *shown, times, sep=" | ", flush=True)

@functools.lru_cache
def story_patterns(facts):
    """[(stage, compiled regex, end)] of a world's sentences, from its facts.json."""
    facts.exists() or require(f"data/{facts.parent.name}")
    return [(p["stage"], re.compile(p["regex"]), p["end"]) for p in json.loads(facts.read_text())["patterns"]]

def judge(record, answer, ended=True):
    """(checks by name, share that holds, whether all do), or None without a record["check"]: {"answer": "7"}, or any of
    "must" (words), "ends", "no_repeat", "patterns" (the world whose sentences count). ended=False: it was cut off."""
    check = record.get("check")
    if not check:
        return None
    checks = {f"has:{w}": bool(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", answer)) for w in check.get("must", [])}
    if "answer" in check:
        checks["answer"] = answer.strip() == str(check["answer"]).strip()
    sentences = [s for s in re.split(r"(?<=\.) ", answer.strip()) if s]
    if check.get("no_repeat"):
        checks["no_repeat"] = 0 < len(sentences) == len(set(sentences))
    if "patterns" in check or "ends" in check:
        patterns = story_patterns(ROOT / "data" / check.get("patterns", "stories") / "facts.json")
        found = [next((p for p in patterns if p[1].fullmatch(s)), None) for s in sentences]
        if "ends" in check:
            checks["ends"] = bool(found and found[-1] and found[-1][2] == check["ends"])
        if "patterns" in check:
            stages = [f and f[0] for f in found]
            checks["patterns"] = stages == list(range(max(stage for stage, _, _ in patterns) + 1))
            named = {kv for p, s in zip(found, sentences) if p for kv in p[1].fullmatch(s).groupdict().items() if kv[1]}
            checks["agree"] = any(found) and len(named) == len({name for name, _ in named})
    if "answer" not in check or not ended:
        checks["end"] = ended
    return checks, sum(checks.values()) / len(checks), all(checks.values())

def figure(title, xlabel="", ylabel="", rows=1, columns=1, height=4.5):
    """(fig, ax) 800 px wide; with rows or columns, ax is the array of plt.subplots. height in inches, of all."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window system, no global list to close
    look = {"axes.grid": True, "grid.alpha": 0.2, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
    matplotlib.rcParams.update({**look, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)})
    fig = Figure(figsize=(8, height), dpi=100, layout="constrained")
    fig.suptitle(title)
    return fig, fig.subplots(rows, columns, subplot_kw={"xlabel": xlabel, "ylabel": ylabel})

def save_figure(fig, path):
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Title": fig.get_suptitle()})  # generate_screenshots.py reads it
    write_atomic(path, buffer.getvalue())
    print(f"wrote {path}", flush=True)

def plot_log(out, *panels, name="log"):
    """OUT/log.jsonl -> OUT/log.png, a panel per key; a tuple shares one: plot_log(out, ("loss", "val_loss"), "lr")."""
    records = [json.loads(line) for line in (Path(out) / f"{name}.jsonl").read_text().splitlines()]
    fig, axes = figure(name, "step", rows=len(panels), height=1 + 2.5 * len(panels))
    for ax, keys in zip(np.ravel(axes), panels):
        for key in (keys,) if isinstance(keys, str) else keys:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            ax.plot([x for x, _ in points], [y for _, y in points], marker="." if len(points) < 40 else "", label=key)
        ax.legend()
    save_figure(fig, Path(out) / f"{name}.png")
