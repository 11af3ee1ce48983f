"""Text to ids and back, with the whole Qwen2.5 vocabulary or with the part of it that a small data set uses.

A *trimmed* vocabulary has a row for every token the training captions produce, for every byte and for the control
tokens. It carries its own small BPE (the merges that lead to its tokens), so it needs no tokenizer folder: the training
captions get the same tokens as from the full tokenizer, anything else falls back to smaller tokens and bytes.
Text is only ever text: a caption that spells `<|im_start|>` does not become a control token.
"""

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as FastTokenizer

from unicom_dist.config.errors import DataError
from unicom_dist.config.storage import reason
from unicom_dist.data.tar import replace_file

FORMAT = "unicom-vocabulary/1"
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
_REMEDY = "run `unicom data fetch`, or set prior.tokenizer to a folder with Qwen2.5's tokenizer.json"
_CACHED_TEXTS = 1 << 16


def _byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level BPE (the GPT-2 table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_characters()


class Tokenizer:
    """The fast tokenizer of a folder with `tokenizer.json`. DataError if it is missing or not Qwen2.5's kind."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / "tokenizer.json"
        try:
            content = path.read_bytes()
            self.spec: dict[str, Any] = json.loads(content)
            self.fast = _fast(self.spec)
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist", "the prior reads text with it", _REMEDY) from error
        except Exception as error:  # the tokenizers package raises bare Exception on a malformed file
            raise DataError(f"{path} cannot be read", str(error).splitlines()[0], _REMEDY) from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        lacking = [token for token in CONTROL_TOKENS if self.fast.token_to_id(token) is None]
        if lacking or any(self.fast.token_to_id(character) is None for character in _BYTE_OF):
            raise DataError(f"{path} is not a Qwen2.5 tokenizer", f"it lacks {lacking or 'single bytes'}", _REMEDY)


class Vocabulary:
    """Rows of the embedding table and the text they stand for.

    `size` rows; `control[name]` is the row of a control token; `source_ids[row]` is its id in the full tokenizer.
    """

    def __init__(self, kind: Literal["full", "trimmed"], fast: FastTokenizer, spec: dict[str, Any]) -> None:
        self.kind = kind
        self._fast, self._spec = fast, spec
        if kind == "full":
            self.size = max(spec["size"], fast.get_vocab_size())
            self.source_ids: list[int] = list(range(self.size))
            self._row_of: dict[int, tuple[int, ...]] = {}
            self._text_of = {row: text for text, row in fast.get_vocab(with_added_tokens=True).items()}
        else:
            self.size = len(spec["rows"])
            self.source_ids = spec["source_ids"]
            self._text_of = dict(enumerate(spec["rows"]))
            rows = {text: row for row, text in self._text_of.items()}
            self._row_of = {
                number: (rows[text],) if text in rows else tuple(rows[character] for character in text)
                for text, number in fast.get_vocab(with_added_tokens=True).items()
            }
        by_text = {text: row for row, text in self._text_of.items()}
        self.control = {token: by_text[token] for token in CONTROL_TOKENS}
        self._control_rows = set(self.control.values())
        self._encode = functools.lru_cache(maxsize=_CACHED_TEXTS)(self._encode_text)

    @classmethod
    def full(cls, folder: str | Path, rows: int = 0) -> "Vocabulary":
        """Every token of the tokenizer in `folder`; at least `rows` rows, for published tables that have spare ones."""
        tokenizer = Tokenizer(folder)
        spec = {"tokenizer_sha256": tokenizer.sha256, "size": max(rows, tokenizer.fast.get_vocab_size())}
        return cls("full", tokenizer.fast, spec)

    @classmethod
    def trimmed(cls, folder: str | Path, groups: Iterable[Iterable[str]], least: int = 1) -> "Vocabulary":
        """The tokens in the texts of at least `least` groups, all single bytes and the control tokens.

        Rows are in the order of the source ids. A token left out is spelled by smaller ones.
        """
        tokenizer = Tokenizer(folder)
        model = tokenizer.spec["model"]
        vocabulary: dict[str, int] = model["vocab"]
        uses = Counter[str]()
        for texts in groups:
            uses.update({text for encoding in tokenizer.fast.encode_batch(list(texts)) for text in encoding.tokens})
        common = {text for text, count in uses.items() if count >= least and text in vocabulary}
        kept = sorted(common | set(_BYTE_OF), key=vocabulary.__getitem__)
        merges = _merges_to(kept, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]])
        pieces = sorted({a + b for a, b in merges} | set(kept), key=vocabulary.__getitem__)
        small = tokenizer.spec | {
            "added_tokens": [],
            "model": model
            | {"vocab": {text: n for n, text in enumerate(pieces)}, "merges": [f"{a} {b}" for a, b in merges]},
        }
        spec = {
            "tokenizer_sha256": tokenizer.sha256,
            "rows": [*kept, *CONTROL_TOKENS],
            "source_ids": [tokenizer.fast.token_to_id(text) for text in (*kept, *CONTROL_TOKENS)],
            "tokenizer": small,
        }
        return cls("trimmed", _fast(small), spec)

    def encode(self, text: str) -> list[int]:
        """Rows of the tokens of `text`; `decode` gives back its NFC form."""
        return list(self._encode(text))

    def decode(self, rows: Iterable[int]) -> str:
        """The text of `rows`; control tokens and spare rows stand for nothing, broken UTF-8 for U+FFFD."""
        content = bytearray()
        for row in rows:
            text = "" if row in self._control_rows else self._text_of.get(row, "")
            if all(character in _BYTE_OF for character in text):
                content += bytes(_BYTE_OF[character] for character in text)
            else:  # an added token such as <tool_call>, stored as plain text
                content += text.encode()
        return content.decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write as JSON. A full vocabulary only names its tokenizer by digest, a trimmed one is complete."""
        content = {"format": FORMAT, "kind": self.kind, **self._spec}
        replace_file(Path(path), json.dumps(content, ensure_ascii=False).encode())

    @classmethod
    def load(cls, path: str | Path, folder: str | Path = "") -> "Vocabulary":
        """Read what `save` wrote; a full one also needs its tokenizer `folder`. DataError if they do not match."""
        path = Path(path)
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != FORMAT:
                raise ValueError("unknown format")
            kind = content.pop("kind")
            if kind == "trimmed":
                return cls("trimmed", _fast(content["tokenizer"]), content)
        except Exception as error:  # as in Tokenizer
            raise DataError(f"cannot read the vocabulary {path}", reason(error), "export the model again") from error
        tokenizer = Tokenizer(folder)
        if tokenizer.sha256 != content["tokenizer_sha256"]:
            raise DataError(
                f"the tokenizer in {folder} is not the one the model was trained with",
                f"sha256 {tokenizer.sha256[:12]}… instead of {content['tokenizer_sha256'][:12]}…",
                _REMEDY,
            )
        return cls("full", tokenizer.fast, content)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        ids = self._fast.encode(text, add_special_tokens=False).ids
        if self.kind == "full":
            return tuple(ids)
        return tuple(row for number in ids for row in self._row_of[number])


def _fast(spec: dict[str, Any]) -> FastTokenizer:
    fast = FastTokenizer.from_str(json.dumps(spec))
    fast.encode_special_tokens = True
    return fast


def _merges_to(tokens: Iterable[str], merges: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The merges a byte-level BPE applies on the way to each of `tokens`, in rank order.

    Merges inside a token do not depend on its neighbours: none of those that cross its border was ever applied.
    """
    rank = {pair: n for n, pair in enumerate(merges)}
    used: set[tuple[str, ...]] = set()
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, len(merges)))
            if best not in rank:
                break
            used.add(best)
            merged, n = [], 0
            while n < len(parts):
                if tuple(parts[n : n + 2]) == best:
                    merged.append(parts[n] + parts[n + 1])
                    n += 2
                else:
                    merged.append(parts[n])
                    n += 1
            parts = merged
    return sorted(used, key=rank.__getitem__)
