"""A collection on an OpenSearch or Elasticsearch cluster, searched as our own index is.

Named by its address, `http://localhost:9200/my-index?fields=title^2,body`. User and password come from
QE_EDGE_OPENSEARCH_AUTH (`user:password`), so that none of our files ever holds them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from qe_edge.errors import BadArgument, NotFound, QeEdgeError, require
from qe_edge.redact import redact
from qe_edge.retrieval.trec import Ranking
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.join import Join
from qe_edge.text import analyzer_for, detect_language, get_analyzer

AUTH = "QE_EDGE_OPENSEARCH_AUTH"
TOGETHER = 32  # searches in one request


class OpenSearchIndex:
    """An index of a cluster; its documents' `_id` are the ids of the judgments.

    Args:
        address: see above; without `fields`, the field `text` is searched.

    Raises:
        BadArgument: the address can't be read, or holds a password.
        NotFound: nobody answers there, or there is no such index.
    """

    def __init__(self, address: str):
        opensearch = require("opensearchpy", "opensearch")
        self.address, parts = address, urlsplit(address)
        self.name = parts.path.strip("/")
        try:
            port = parts.port
        except ValueError:
            port = 0
        known = parts.scheme in ("http", "https") and parts.hostname and port != 0
        if not known or not self.name or "/" in self.name:
            raise BadArgument(f"{redact(address)!r} is no http://HOST:PORT/INDEX?fields=FIELD,FIELD")
        if parts.username or parts.password:
            raise BadArgument(f"the address holds a password, which would be kept with results; set {AUTH}")
        self.fields = parse_qs(parts.query).get("fields", ["text"])[0].split(",")
        auth, secure = os.environ.get(AUTH), parts.scheme == "https"
        self._errors = opensearch.exceptions
        self._client = opensearch.OpenSearch(
            hosts=[{"host": parts.hostname, "port": port or (443 if secure else 9200)}],
            use_ssl=secure,
            http_auth=tuple(auth.split(":", 1)) if auth else None,
            timeout=60,
            max_retries=3,
            retry_on_timeout=True,
        )
        self.documents: int = self._ask(lambda: self._client.count(index=self.name)["count"])
        # What kept scores depend on: an index that was made anew has another uuid.
        self.made_with: Any = self._ask(lambda: self._client.indices.get(index=self.name))

    def __str__(self) -> str:
        return self.address

    def analyze(self, text: str) -> list[str]:
        """Our own terms of a text, to compare texts by; the cluster has its own analyzer."""
        return get_analyzer(analyzer_for(detect_language(text)))(text)

    def search_text(self, query: str, expansion: str = "", *, join: Join, k: int = 10) -> Ranking:
        """Join and search; equal scores come in the cluster's order."""
        return self.search_many([(query, expansion)], join=join, k=k)[0]

    def search_many(self, texts: Sequence[tuple[str, str]], *, join: Join, k: int = 10) -> list[Ranking]:
        """The ranking of each (query, expansion), in few requests.

        Raises:
            QeEdgeError: the cluster failed, or refused a search.
        """
        found: list[Ranking] = []
        for start in range(0, len(texts), TOGETHER):
            body: list[dict[str, Any]] = []
            for query, expansion in texts[start : start + TOGETHER]:
                match = ExpandedQuery(query, expansion, join).to_opensearch(*self.fields)
                body += [{}, {"query": match, "size": k, "_source": False}]
            for answer in self._ask(lambda body=body: self._client.msearch(body=body, index=self.name))[
                "responses"
            ]:
                if "error" in answer:
                    raise QeEdgeError(f"{self.address} refused a search: {answer['error']}")
                if answer.get("timed_out") or answer.get("_shards", {}).get("failed"):
                    raise QeEdgeError(f"{self.address} answered in part: a shard failed, or was too slow")
                found.append([(hit["_id"], hit["_score"]) for hit in answer["hits"]["hits"]])
        return found

    def _ask(self, request: Any) -> Any:
        try:
            return request()
        except self._errors.NotFoundError:
            raise NotFound(f"{self.address}: the cluster has no index {self.name!r}") from None
        except (self._errors.AuthenticationException, self._errors.AuthorizationException) as error:
            raise BadArgument(f"{self.address} refuses us ({error.status_code}); set {AUTH}") from None
        except self._errors.ConnectionError as error:
            raise NotFound(f"{self.address} can't be reached: {error.error}") from None
        except self._errors.TransportError as error:
            raise QeEdgeError(f"{self.address} failed: {error}") from None
