"""Time to the first token of a conversation's second turn, over that of a fresh prompt with the same text and pictures.

    python benchmarks/chat_turn.py                # writes benchmarks/chat_turn.md

A model of random weights with 60 M parameters (`benchmarks/models.py`) and two pictures of 800 x 600. In each round
both ways take turns, media opened and cut anew by the fresh prompt. Both must give the same token.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from models import write
from PIL import Image

from ivl import Chat, InternVL, Processor
from ivl.chat import Settings

QUESTIONS = {
    "two pictures, then a question": (["<image><image>Describe both.", "What do they have in common?"], [2, 0]),
    "a picture, then another": (["<image>Describe it.", "<image>How does this one differ?"], [1, 1]),
}


def picture(path: Path, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (600, 800, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(pixels.numpy()).save(path)
    return str(path)


def first_token(chat: Chat, question: str, images: list[str]) -> tuple[float, float, str]:
    """Seconds on the wall and of the processor, and the token's text."""
    chat.settings = Settings(max_new_tokens=1)
    wall, processor = time.perf_counter(), time.process_time()
    answer = chat.ask(question, images)
    return time.perf_counter() - wall, time.process_time() - processor, answer


def measure(model: InternVL, processor: Processor, name: str, images: list[str], rounds: int) -> dict[str, float]:
    questions, counts = QUESTIONS[name]
    first, second = images[: counts[0]], images[counts[0] : sum(counts)]
    times: dict[str, list[tuple[float, float]]] = {"going on": [], "fresh": []}
    for number in range(rounds + 1):
        chat = Chat(model, processor, settings=Settings(max_new_tokens=24))
        chat.ask(questions[0], first)
        fresh = Chat(model, processor)
        answered = [list(pair) for pair in chat.history]
        found = [first_token(chat, questions[1], second)]
        length, new = len(chat.prefix_cache._keys), chat.prefix_cache.tokens_read
        row = {"query": questions[1], "history": answered, "images": images[: sum(counts)]}
        wall, cpu = time.perf_counter(), time.process_time()
        messages = processor.parse(row).messages
        fresh._messages, fresh.settings = messages[:-1], Settings(max_new_tokens=1)
        text = "".join(fresh._answer(messages[-1]))
        found.append((time.perf_counter() - wall, time.process_time() - cpu, text))
        assert found[0][2] == found[1][2], f"{name}: {found}"
        if number:  # the first round warms up
            for way, (wall, cpu, _) in zip(times, found):
                times[way].append((wall, cpu))
    walls, cpus = ({way: median(t[n] for t in taken) for way, taken in times.items()} for n in (0, 1))
    return {
        "tokens": length,
        "new": new,
        "fresh": walls["fresh"],
        "on": walls["going on"],
        "ratio": walls["going on"] / walls["fresh"],
        "cpu": cpus["going on"] / cpus["fresh"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name) / "60m", "60m")
        model, processor = InternVL.from_pretrained(folder), Processor.from_pretrained(folder, max_tiles=6)
        images = [picture(Path(name) / f"{n}.png", n) for n in range(2)]
        found = {name: measure(model, processor, name, images, options.rounds) for name in QUESTIONS}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# The second turn of a conversation",
        "",
        f"`python benchmarks/chat_turn.py --rounds {options.rounds}` at {commit}: 60 M parameters, float32, on a CPU",
        f"with {options.threads} thread(s); time to the first token, medians; both ways take turns and give the same",
        "token.",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "",
        "| conversation | tokens | of them new | fresh prompt, s | second turn, s | ratio | ratio of processor time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['tokens']} | {row['new']} | {row['fresh']:.2f} | {row['on']:.2f} | {row['ratio']:.3f} | "
            f"{row['cpu']:.3f} |"
        )
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
