"""
Part 2: continue a text with the model that train.py has made.

    python part_2/sample.py                                       two continuations of a story
    python part_2/sample.py --prompt="Once there was a fox"       your own beginning
    python part_2/sample.py --file=my.txt --length=500            a beginning from a file
    python part_2/sample.py --temperature=0                       always the likeliest byte
    python part_2/sample.py --init=my_run/gpt.pt                  a model of your own

Starts here. model.py and train.py are used as they are.

The model draws one byte after the other, and each drawn byte becomes part of the text that the next
one continues. A character can have several bytes, so a sample may begin or end with half of one,
which is shown as U+FFFD.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import time
from dataclasses import dataclass, fields

import torch

from model import GPT, GPTConfig
from shared import fail, load_checkpoint, parse_args, pick_device, read_text, require, set_seed
from train import decode, encode


@dataclass
class Config:
    init: str = "part_2/out/gpt.pt"  # checkpoint of part_2/train.py
    prompt: str = "Once there was a "  # the text to continue
    file: str = ""  # a text file to continue, instead of the prompt
    samples: int = 2  # number of continuations
    length: int = 300  # bytes of a continuation
    temperature: float = 0.8  # below 1 likely bytes become likelier; 0: always the likeliest
    top_k: int = 0  # draw among this many likeliest bytes; 0: all
    top_p: float = 1.0  # draw among the likeliest bytes that have this probability together
    seed: int = 0  # seed of all random numbers
    device: str = ""  # cuda, mps or cpu; empty: the best available

    def __post_init__(self):
        assert self.prompt, "prompt is empty: the first byte needs one before it"
        assert self.temperature >= 0, f"temperature={self.temperature} must not be negative"
        assert self.top_k >= 0, f"top_k={self.top_k} must not be negative"
        assert 0 <= self.top_p <= 1, f"top_p={self.top_p} must be from 0 to 1"


def load_model(checkpoint, path):
    """The GPT of a checkpoint. Other parts write "gpt" checkpoints, too, with other models."""
    sizes = checkpoint["gpt_config"]
    names = {field.name for field in fields(GPTConfig)}
    if set(sizes) != names or sizes["vocab_size"] != 256:
        fail(f"{path} is the model of another part: part_2/train.py makes one for this script")
    model = GPT(GPTConfig(**sizes))
    if checkpoint["weights"].keys() != model.state_dict().keys():
        fail(f"{path} is the model of another part: part_2/train.py makes one for this script")
    model.load_state_dict(checkpoint["weights"])
    return model


if __name__ == "__main__":
    cfg = parse_args(Config)
    device = pick_device(cfg.device)

    # In the texts that the model has read, a blank line stands before every document.
    text = cfg.prompt
    if cfg.file:
        text = read_text(cfg.file)
    ids = encode("\n\n" + text)

    # All continuations at once, one row each.
    model = load_model(load_checkpoint(require(cfg.init), "gpt"), cfg.init).to(device)
    set_seed(cfg.seed)  # after the model, whose first weights are random
    start = time.time()
    idx = torch.tensor([ids], device=device).expand(cfg.samples, -1)
    rows = model.generate(idx, cfg.length, cfg.temperature, cfg.top_k, cfg.top_p)
    seconds = time.time() - start

    for row in rows.tolist():
        print(text + decode(row[len(ids) :]))
        print("---")
    count = cfg.samples * cfg.length
    print(f"{count} bytes in {seconds:.1f} s, {count / seconds:.0f} per second")
