"""What a schedule sends between ranks, and where in each rank's program it is sent and awaited.

F of pp_stage k sends activations to F of k + 1, B of k sends gradients to B of k - 1; both are messages to the action
that needs them. From one rank to another there is one channel, in which messages arrive in the order they were sent.
So the receiver posts its buffers in that order, whatever the order in which it uses them, and the two ends of a channel
always agree. Sends never block the sender. Hence a rank waits only for an action of another rank that comes before its
own in the dependencies or in that rank's program: if the schedule can be executed, the program cannot deadlock.

Receives are posted one message early: before an action waits for its message, the buffer for the channel's next one is
posted too, which then arrives during the action. More would only cost memory.
Imports no torch.
"""

from typing import NamedTuple

from unicom_dist.parallel.pipeline.schedule import Action, Actions


class Message(NamedTuple):
    """Activations or gradients between two ranks of the pipeline."""

    source: int
    target: int
    action: Action  # of the target, which needs it


class Receive(NamedTuple):
    """Post the buffers of a message; the action that needs it waits for it."""

    message: Message


class Send(NamedTuple):
    """Send what the action just before computed; nobody waits."""

    message: Message


Instruction = Action | Receive | Send


def chunks_of(actions: Actions) -> int:
    """Chunks a rank of the schedule runs."""
    return 1 + max(action.chunk for mine in actions for action in mine)


def message_from(action: Action, rank: int, ranks: int, chunks: int) -> Message | None:
    """What `action` of `rank` sends (to itself, if there is one rank); None at both ends of the pipeline and for W."""
    step = {"F": 1, "B": -1, "W": 0}[action.kind]
    pp_stage = action.chunk * ranks + rank + step
    if step == 0 or not 0 <= pp_stage < ranks * chunks:
        return None
    chunk, target = divmod(pp_stage, ranks)
    return Message(rank, target, Action(action.kind, chunk, action.micro))


def program(actions: Actions) -> list[list[Instruction]]:
    """For every rank: its actions, each after the Receive of what it needs and before the Send of what it made."""
    ranks, chunks = len(actions), chunks_of(actions)
    channels: dict[tuple[int, int], list[Message]] = {}
    for rank, mine in enumerate(actions):
        for action in mine:
            message = message_from(action, rank, ranks, chunks)
            if message and message.target != rank:
                channels.setdefault((message.source, message.target), []).append(message)
    return [_of_rank(rank, actions, channels) for rank in range(ranks)]


def _of_rank(rank: int, actions: Actions, channels: dict[tuple[int, int], list[Message]]) -> list[Instruction]:
    place = {action: number for number, action in enumerate(actions[rank])}
    receives: list[list[Instruction]] = [[] for _ in actions[rank]]  # to post before each action
    for pair in sorted(channels):
        if pair[1] != rank:
            continue
        # A message is due when it is needed, or one sent after it: its buffer stands before theirs.
        due = [place[message.action] for message in channels[pair]]
        for number in reversed(range(len(due) - 1)):
            due[number] = min(due[number], due[number + 1])
        for message, when in zip(channels[pair], [0, *due], strict=False):
            receives[when].append(Receive(message))
    instructions: list[Instruction] = []
    chunks = chunks_of(actions)
    for action, early in zip(actions[rank], receives, strict=True):
        sent = message_from(action, rank, len(actions), chunks)
        instructions += [*early, action, *([Send(sent)] if sent else [])]
    return instructions
