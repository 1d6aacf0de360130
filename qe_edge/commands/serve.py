"""`qe-edge serve`: a student for other programs, over HTTP."""

from __future__ import annotations

import math

from qe_edge.commands.common import WORKDIR, IndexOption, ModelOption, WorkdirOption, chosen_model
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.errors import require
from qe_edge.runtime.expander import Expander
from qe_edge.serve.config import ServeConfig, StudentConfig


@flags_of(ServeConfig, "serve")
def serve(
    model: ModelOption = None,
    index: IndexOption = None,
    workdir: WorkdirOption = WORKDIR,
    *,
    settings: Settings[ServeConfig],
) -> None:
    """Serve expansions and searches over HTTP (documentation at /docs)."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    config = settings.config()
    from qe_edge.serve.collection import open_collections, warn_of_language
    from qe_edge.serve.guard import check_free, run
    from qe_edge.serve.http import create_app

    check_free(config.host, config.port)
    collections = open_collections(index or [], workdir / "index")
    student = {name: getattr(config, name) for name in StudentConfig.__struct_fields__}
    expander = Expander.load(chosen_model(model, workdir), parallel=config.parallel, **student)
    for name, collection in collections.items():
        warn_of_language(name, collection.data.lang, expander)
    expander.expand("what causes tides").terms()  # what the first query would wait for
    last = math.ceil(config.deadline_ms / 1000) + 5  # seconds until what was begun is answered
    run(create_app(expander, collections, config), host=config.host, port=config.port, last=last)
