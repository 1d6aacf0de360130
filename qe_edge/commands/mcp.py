"""`qe-edge mcp`: a student for MCP clients."""

from __future__ import annotations

import os
import signal
import sys

import msgspec

from qe_edge.commands.common import WORKDIR, IndexOption, ModelOption, WorkdirOption, chosen_model
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.errors import require
from qe_edge.runtime.expander import Expander
from qe_edge.serve.config import StudentConfig


@flags_of(StudentConfig, "mcp")
def mcp(
    model: ModelOption = None,
    index: IndexOption = None,
    workdir: WorkdirOption = WORKDIR,
    *,
    settings: Settings[StudentConfig],
) -> None:
    """Offer expansion and search to an MCP client over stdin and stdout."""
    require("mcp", "mcp")
    config = settings.config()
    from qe_edge.serve.collection import open_collections, warn_of_language
    from qe_edge.serve.mcp import create_mcp

    collections = open_collections(index or [], workdir / "index")
    # As SIGTERM ends it: asyncio's own handler would wait for the thread that waits for a line on stdin.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    try:
        with Expander.load(chosen_model(model, workdir), **msgspec.structs.asdict(config)) as expander:
            for name, collection in collections.items():
                warn_of_language(name, collection.data.lang, expander)
            create_mcp(expander, collections).run("stdio")
    except SystemExit as ended:  # Python would wait for that thread, too
        os._exit(int(ended.code or 0))
