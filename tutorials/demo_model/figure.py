"""Draw the loss curve and write the results section of the README, both from model/training.json. Needs matplotlib.

python figure.py
"""

import json
from pathlib import Path

from matplotlib import pyplot

HERE = Path(__file__).parent
OPEN, CLOSE = "<!-- results: written by figure.py -->", "<!-- end of results -->"


def draw(record, path):
    """Training and held-out loss against tokens seen."""
    # The same input gives the same file, byte for byte, and text stays text.
    pyplot.rcParams.update({"svg.hashsalt": "demo", "svg.fonttype": "none", "font.size": 10})
    tokens = [point["tokens"] / 1e6 for point in record["curve"]]
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for key, label in (("train_loss", "training (with dropout)"), ("held_out_loss", "held out")):
        axes.plot(tokens, [point[key] for point in record["curve"]], label=label)
    lowest = min(point[key] for point in record["curve"] for key in ("train_loss", "held_out_loss"))
    axes.set(xlabel="tokens seen, millions", ylabel="loss, nats per token", ylim=(0.95 * lowest, 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def results(record):
    """The results section as Markdown lines."""
    seen, unique = record["tokens_seen"], sum(part["tokens"] for part in record["data"]["train"].values())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"Trained on {record['data']['source']} for {record['seconds']:.0f} s on one {record['device']} ({versions}):"
    yield f"{record['parameters'] / 1e6:.2f} M parameters, {record['steps']} steps, {seen / 1e6:.0f} M tokens, which is"
    yield f"{seen / unique:.0f} times the {unique / 1e6:.1f} M of the training set,"
    yield f"{seen / record['seconds'] / 1e6:.2f} M tokens per second. The best held-out loss, at step"
    yield f"{record['best_step']}, is the model that was kept."
    yield from (
        "",
        "| held-out files | documents | tokens | perplexity per token | bits per byte |",
        "|---|---|---|---|---|",
    )
    parts = record["data"]["valid"]
    for name, figures in record["held_out"].items():
        chosen = [parts[name]] if name in parts else list(parts.values())
        documents, tokens = (sum(part[key] for part in chosen) for key in ("documents", "tokens"))
        yield f"| {name} | {documents} | {tokens} | {figures['perplexity']:.2f} | {figures['bits_per_byte']:.3f} |"
    yield from ("", "![Loss curve](loss_curve.svg)", "", "Greedy completions, cut at 96 tokens:", "")
    for sample in record["samples"]:
        if sample["temperature"] == 0:
            yield from ("```python", (sample["prompt"] + sample["completion"]).rstrip(), "```", "")


def main():
    """Write loss_curve.svg and replace what stands between the README's two markers."""
    record = json.loads((HERE / "model" / "training.json").read_text())
    draw(record, HERE / "loss_curve.svg")
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(OPEN)
    after = rest.split(CLOSE)[1]
    readme.write_text("\n".join([before + OPEN, "", *results(record), CLOSE + after]))


if __name__ == "__main__":
    main()
