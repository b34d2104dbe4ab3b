"""Train the demo model, a Llama of about 6 M parameters, on the arrays that prepare.py made. Needs PyTorch.

    python train.py --data data --out model --minutes 1.2    one GPU; about three minutes in all
    python train.py --data data --out trial --device cpu --steps 4 --batch 2 --length 128 --reports 1      smoke test

Writes the Hugging Face files (config.json, generation_config.json, tokenizer*.json, model.safetensors in bfloat16) and
training.json: the loss curve, the held-out perplexity, and what was trained on what. The text is read about a hundred
times; what keeps the model from learning it by heart is dropout, strong weight decay, and windows that start anywhere.
"""

import argparse
import contextlib
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from export import check_transformers, export, sample
from llama import BEGIN, END, Config, Llama
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional

# How often a training window is drawn from each part of train.npy. By size alone, two thirds would be unit tests.
PART_SHARES = {"library": 0.55, "tests": 0.25, "snippets": 0.20}
IGNORED = -100


def loss_sum(model, inputs, targets):
    """Summed cross entropy in nats over the targets that count."""
    logits = model(inputs).flatten(0, 1).float()
    return functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


class Windows:
    """Random training windows, drawn on the device: `<|begin|>` and then text from the start of some line.

    Half of the windows start at the left margin (a def, a class, an import), as prompts do.
    """

    def __init__(self, folder, length, tokenizer, device):
        ids = np.load(folder / "train.npy").astype(np.int64)
        parts = json.loads((folder / "meta.json").read_text())["train"]
        names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        # In byte-level BPE, newline, space and tab are spelled Ċ, Ġ and ĉ.
        ends_line = np.array([name.endswith("Ċ") for name in names])
        indents = np.array([name[0] in "ĊĠĉ" for name in names])
        ends_line[BEGIN] = True
        after_line = np.flatnonzero(ends_line[ids[:-1]]) + 1
        after_line = after_line[ids[after_line] > max(BEGIN, END)]
        self.starts = []
        for part, share in PART_SHARES.items():
            low, high = parts[part]["start"], parts[part]["start"] + parts[part]["tokens"] - length
            lines = after_line[(after_line >= low) & (after_line < high)]
            margin = lines[~indents[ids[lines]]]
            self.starts += [(share / 2, torch.from_numpy(some).to(device)) for some in (lines, margin)]
        self.ids = torch.from_numpy(ids).to(device)
        self.offsets = torch.arange(length, device=device)

    def draw(self, count):
        """Inputs and targets, both [count, length]."""
        shares = torch.tensor([share for share, _ in self.starts]).cumsum(0) * count
        edges = [0, *(round(edge) for edge in shares.tolist())]
        first = torch.cat(
            [
                starts[torch.randint(len(starts), (edges[i + 1] - edges[i],), device=starts.device)]
                for i, (_, starts) in enumerate(self.starts)
            ]
        )
        targets = self.ids[first[:, None] + self.offsets]
        return functional.pad(targets[:, :-1], (1, 0), value=BEGIN), targets


def held_out_rows(folder, length, batch, device):
    """Per part of valid.npy: batches of (inputs, targets) that cover it once, and its size in bytes.

    Predicting `<|begin|>` after `<|end|>` is free, so it does not count.
    """
    ids = torch.from_numpy(np.load(folder / "valid.npy").astype(np.int64))
    parts = json.loads((folder / "meta.json").read_text())["valid"]
    rows = {}
    for part, about in parts.items():
        own = ids[about["start"] : about["start"] + about["tokens"]]
        count = math.ceil(len(own) / (length * batch)) * batch
        chunks = functional.pad(own, (0, count * length - len(own)), value=BEGIN).view(count, length)
        inputs = functional.pad(chunks[:, :-1], (1, 0), value=BEGIN)
        targets = torch.where(chunks == BEGIN, IGNORED, chunks)
        batches = list(zip(inputs.to(device).split(batch), targets.to(device).split(batch), strict=True))
        rows[part] = (batches, about["bytes"])
    return rows


@torch.no_grad()
def evaluate(model, rows, losses, autocast):
    """Held-out figures per part and for all of it: nats and perplexity per token, bits per byte of source."""
    model.eval()
    sums = {}
    for part, (batches, size) in rows.items():
        with autocast():
            nats = sum(losses(model, inputs, targets).double() for inputs, targets in batches).item()
        sums[part] = (nats, sum((targets != IGNORED).sum().item() for _, targets in batches), size)
    sums["all"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    model.train()
    return {
        part: {"loss": nats / tokens, "perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / size}
        for part, (nats, tokens, size) in sums.items()
    }


def learning_rate(peak, progress):
    """Linear warm-up over the first 2 % of the run, then a cosine down to 0 at its end."""
    return peak * min(progress / 0.02, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def make_optimizer(model, args):
    """AdamW that decays matrices only: norm weights have nothing to overfit with."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device.startswith("cuda"))


def compile_losses(model, windows, rows, args, autocast):
    """`loss_sum`, compiled where a GPU makes that worthwhile, and used once each way, so that no clock counts that."""
    losses = loss_sum
    if args.device.startswith("cuda") and not args.no_compile:
        losses = torch.compile(loss_sum, dynamic=False)
    try:
        with autocast():
            losses(model, *windows.draw(args.batch)).backward()
        evaluate(model, rows, losses, autocast)
    except Exception as error:
        if losses is loss_sum:
            raise
        print(f"torch.compile failed ({error}); training without it, at about half the speed", flush=True)
        losses = loss_sum
    model.zero_grad(set_to_none=True)
    return losses


def update(model, optimizer, losses, windows, args, autocast):
    """One step of AdamW on one batch; returns the mean loss, still on the device."""
    with autocast():
        loss = losses(model, *windows.draw(args.batch)) / (args.batch * args.length)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def report(progress, point):
    """Print one point of the loss curve."""
    speed = point["tokens"] / max(point["seconds"], 0.01) / 1e6
    print(
        f"{progress:6.1%}  step {point['step']:6}  {point['seconds']:5.0f} s  {speed:5.2f} M tokens/s  train "
        f"{point['train_loss']:.3f}  held out {point['held_out_loss']:.3f}",
        flush=True,
    )


def train(model, windows, rows, args, autocast):
    """Run the schedule; leave the best held-out weights in the model and return the record for training.json.

    Progress runs from 0 to 1: by steps when --steps is given, else by time, so the run fits its --minutes on any GPU.
    """
    losses, optimizer = compile_losses(model, windows, rows, args, autocast), make_optimizer(model, args)
    curve, best_loss, best_state = [], math.inf, None
    recent, step, progress, next_report, started = [], 0, 0.0, 0.0, time.perf_counter()
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, progress)
        recent.append(update(model, optimizer, losses, windows, args, autocast))
        step += 1
        if step % 10 == 0:
            recent[-1].item()  # Wait for the device now and then, or the clock would run ahead of it.
        elapsed = time.perf_counter() - started
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if next_report <= progress or progress >= 1:
            point = {"step": step, "tokens": step * args.batch * args.length, "seconds": round(elapsed, 2)}
            point["train_loss"] = torch.stack(recent).mean().item()
            point["held_out_loss"] = evaluate(model, rows, losses, autocast)["all"]["loss"]
            report(progress, point)
            curve.append(point)
            recent, next_report = [], next_report + 1 / args.reports
            if point["held_out_loss"] < best_loss:
                best_loss, best_state = point["held_out_loss"], {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_state)
    best_step = min(curve, key=lambda point: point["held_out_loss"])["step"]
    return {"steps": step, "best_step": best_step, "tokens_seen": point["tokens"], "seconds": elapsed, "curve": curve}


def parse_arguments():
    """The command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=here / "data", help="the folder that prepare.py filled")
    parser.add_argument("--out", type=Path, default=here / "model")
    parser.add_argument("--minutes", type=float, default=1.2, help="training time, without compiling and sampling")
    parser.add_argument("--steps", type=int, help="train for this many steps instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="windows per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--reports", type=int, default=50, help="points of the loss curve, each with a held-out loss")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    return parser.parse_args()


def summarise(args, config, held_out, samples):
    """What training.json says besides the curve: the result, and everything that is needed to get it again."""
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU ({platform.machine()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "held_out": held_out,
        "data": json.loads((args.data / "meta.json").read_text()),
        "config": asdict(config),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("data", "out")},
        "device": device,
        "versions": versions | {"transformers": transformers.__version__},
        "samples": samples,
    }


def main():
    """Train, export, evaluate and sample what was exported, write training.json, check with transformers."""
    args, config = parse_arguments(), Config()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    model = Llama(config, args.dropout).set_rope(device)
    parameters = sum(p.numel() for p in model.parameters())
    windows = Windows(args.data, args.length, tokenizer, device)
    rows = held_out_rows(args.data, args.length, args.batch, device)
    print(f"{parameters / 1e6:.2f} M parameters, {len(windows.ids) / 1e6:.1f} M training tokens", flush=True)

    record = {"parameters": parameters} | train(model, windows, rows, args, autocast)
    export(model, config, args.data, args.out)
    held_out = evaluate(model, rows, loss_sum, contextlib.nullcontext)
    print("held out, the exported weights in float32:", json.dumps(held_out), flush=True)
    samples = sample(model.eval(), tokenizer, device)
    record |= summarise(args, config, held_out, samples)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    check_transformers(model, tokenizer, args.out)
    print(f"model.safetensors: {(args.out / 'model.safetensors').stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
