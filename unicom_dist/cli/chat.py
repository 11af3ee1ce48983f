"""`unicom chat`: a conversation in the terminal, or with lines from a pipe."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicom_dist.cli.screen import logged, say
from unicom_dist.config.errors import ConfigError, UnicomError
from unicom_dist.config.storage import check_writable

if TYPE_CHECKING:
    from PIL.Image import Image

    from unicom_dist.sample.chat import Chat

DOCS = "docs/sampling.md"
HELP = """\
/image PATH   show a picture with what you say next; may be repeated
/draw WORDS   one picture, whatever the model would have done
/think        switch thinking before the reply on or off
/reset        forget the conversation
/quit         end it (so does Ctrl-D)
/help         this list
Anything else is said to the model; it writes, and draws where it begins an image."""


def chat(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help="A run directory or a saved model folder.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures [default: MODEL/pictures/chat].")] = None,
    seed: Annotated[int, typer.Option(help="Of what is written and drawn.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0 = the likeliest words.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest words that make up this share.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 256,
    think: Annotated[bool, typer.Option("--think", help="Begin with thinking switched on.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.", show_default="the recipe's")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 = none.", show_default="the recipe's")] = None,
    stage: Annotated[str, typer.Option(help="A prior stage other than the last finished one.")] = "",
) -> None:
    """Talk with a model: it reads pictures, writes and draws."""
    from unicom_dist.cli.sample import settings_of
    from unicom_dist.sample.chat import Chat
    from unicom_dist.sample.drawing import Drawing
    from unicom_dist.sample.pipeline import UniComPipeline
    from unicom_dist.sample.writing import Chooser

    Chooser([seed], temperature, top_p)  # refuses values before the model is loaded
    drawing: Drawing = Drawing.of(settings_of(checkpoint, steps=steps, guidance=guidance))
    folder = out or Path(checkpoint) / "pictures" / "chat"
    check_writable(folder)
    with logged():
        pipeline = UniComPipeline.from_pretrained(checkpoint, stage=stage)
        _ = pipeline.prior  # says so now if there is none
        Session(Chat(pipeline, seed, drawing), folder, temperature, top_p, max_tokens, think).run()


class Session:
    """The loop over lines. What goes wrong in a turn is said, and the conversation goes on."""

    def __init__(
        self, chat: "Chat", folder: Path, temperature: float, top_p: float, max_tokens: int, think: bool
    ) -> None:
        self.chat, self.folder, self.think = chat, folder, think
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.images: list[Image] = []

    def run(self) -> None:
        """Until /quit or the end of the input."""
        for line in _lines():
            try:
                if not self.obey(line.strip()):
                    return
            except UnicomError as error:
                print(error, file=sys.stderr, flush=True)

    def obey(self, line: str) -> bool:
        """One line; False ends the conversation."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            say(HELP)
        elif command == "/reset":
            self.chat.reset()
            self.images = []
            say("a new conversation")
        elif command == "/think":
            self.think = not self.think
            say(f"thinking is {'on' if self.think else 'off'}")
        elif command == "/image":
            self._show(rest.strip())
        elif command == "/draw":
            self._turn(rest, draws=True)
        elif command.startswith("/"):
            raise ConfigError(f"no command {command!r}", "", "/help lists what there is", DOCS)
        elif line:
            self._turn(line, draws=None)
        return True

    def _show(self, path: str) -> None:
        from unicom_dist.cli.sample import open_picture

        picture = open_picture(Path(path).expanduser())
        self.images.append(picture)
        say(f"{path}: {picture.width} x {picture.height}, shown with what you say next")

    def _turn(self, text: str, draws: bool | None) -> None:
        from unicom_dist.sample.replies import Writing

        writing = Writing(self.max_tokens, self.temperature, self.top_p, self.think, draws)
        images, self.images, open_line = self.images, [], False
        for piece in self.chat.say(text, images, writing):
            if isinstance(piece, str):
                print(piece, end="", flush=True)
                open_line = not piece.endswith("\n")
                continue
            if open_line:
                say("")
            say(f"picture: {self._save(piece.picture)}")
            open_line = False
        if open_line:
            say("")

    def _save(self, picture: "Image") -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while (path := self.folder / f"{number:03d}.png").exists():
            number += 1
        picture.save(path)
        return path


def _lines() -> Iterator[str]:
    """What is typed, after a prompt, or what comes through a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    say("/help lists the commands")
    while True:
        try:
            yield input("> ")
        except EOFError:
            say("")
            return
