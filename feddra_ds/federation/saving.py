"""What the server keeps in a checkpoint, and takes back from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from feddra_ds.checkpoint.format import EMA, PREVIOUS, SHARED, files_of
from feddra_ds.checkpoint.load import SavedFragments, SavedModel
from feddra_ds.checkpoint.write import Piece, copy_fragments, copy_model
from feddra_ds.common.logs import logger
from feddra_ds.distributed.topology import Topology
from feddra_ds.engine.parts import FROZEN, PARTS, ModelState
from feddra_ds.federation.client import Client
from feddra_ds.federation.server import Server
from feddra_ds.strategies.base import SliceState


def copy_server(server: Server, clients: Sequence[Client], topology: Topology) -> list[Piece]:
    """Copies of this rank's part of all that the server holds, which the next round may change at once."""
    pieces: list[Piece] = []
    for owner, state in server.states.items():
        if owner not in (SHARED, EMA) or topology.slot == 0:  # every slot holds those two
            moved = {FROZEN: server.engine.slices(FROZEN)} if owner == SHARED else {}
            pieces += copy_model(owner, server.engine, state | moved)
    if server.residuals is not None:
        pieces += copy_fragments(f"residuals/slot-{topology.slot:05d}", server.engine, server.residuals)
    kept = {f"client/{client.id}": client.corrections for client in clients}
    if topology.slot == 0:
        kept["server"] = server.outer
    for owner, by_part in kept.items():
        for name, state in _by_name(by_part).items():
            pieces += copy_fragments(f"kept/{owner}/{name}", server.engine, state)
    for client in clients:
        if client.previous is not None:
            pieces += copy_model(client.id, server.engine, client.previous, kind=PREVIOUS)
        if client.pairs is not None and topology.is_slot_leader:  # every rank of the slot has the same
            pieces.append(Piece(_pairs_file(client), client.pairs.tensors()))
    return pieces


def _pairs_file(client: Client) -> str:
    return f"pairs/{client.id}.safetensors"


def _by_name(by_part: Mapping[str, SliceState]) -> dict[str, ModelState]:
    """What a strategy's hook keeps, {part: {name: slices}}, as {name: {part: slices}}."""
    out: dict[str, ModelState] = {}
    for part, state in by_part.items():
        for name, slices in state.items():
            out.setdefault(name, {})[part] = slices
    return out


def read_kept(folder: Path, server: Server, clients: Iterable[Client]) -> None:
    """Give the server and this slot's clients what they had kept, beside the models, when the checkpoint was written."""
    files = files_of(folder)
    clients = list(clients)
    for client in clients:
        if client.pairs is not None and _pairs_file(client) in files:
            client.pairs.load(folder / _pairs_file(client))
        if any(file.startswith(f"{PREVIOUS}/{client.id}/") for file in files):
            client.previous = SavedModel(folder, client.id, PREVIOUS).read_state(server.engine)
    owners = [("server", server.outer), *((f"client/{client.id}", client.corrections) for client in clients)]
    for owner, into in owners:
        place = f"kept/{owner}/"
        for name in sorted({file.removeprefix(place).split("/")[0] for file in files if file.startswith(place)}):
            saved = SavedFragments(folder, f"{place}{name}")
            for part in PARTS:
                if any(parameter.startswith(f"{part}.") for parameter in saved.names):
                    into.setdefault(part, {})[name] = saved.state(server.engine, part)


def read_residuals(folder: Path, server: Server, topology: Topology) -> None:
    """Give a server its slot's share of what rounding had kept when the checkpoint was written.

    Only the sum over slots matters: with other slots than then, the old ones' are added to the new ones' in turn. A
    checkpoint without any (no delta had travelled rounded) leaves the server's at 0, and says so.
    """
    if server.residuals is None:
        return
    slots = sorted({Path(file).parts[1] for file in files_of(folder) if file.startswith("residuals/")})
    if not slots and topology.is_coordinator:
        logger.warning("%s holds no residuals: what rounding kept from its deltas is dropped", folder)
    for slot in slots[topology.slot :: topology.plan.num_slots]:
        saved = SavedFragments(folder, f"residuals/{slot}")
        for part, state in server.residuals.items():
            for fragment, owed in server.engine.views_of(part, state):
                owed += saved.read(fragment)
