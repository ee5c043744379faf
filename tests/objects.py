"""An object store for tests: moto's, in a thread of each test process, started when a test first asks for it.

bucket = fresh_bucket()
bucket.url, bucket.options      what the settings blob_url and blob_options would say
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import urllib.request
import warnings
from typing import Any, NamedTuple
from xml.etree import ElementTree

from afterglow.store.object_blobs import ObjectBlobs

NAMES = itertools.count(1)
TAG = "{http://s3.amazonaws.com/doc/2006-03-01/}"


class Bucket(NamedTuple):
    """A bucket of its own, with a look behind the scenes. endpoint: the server's address."""

    endpoint: str
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}/some/where"

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint": self.endpoint, "access_key_id": "tester", "secret_access_key": "hush-hush-hush"}

    def open(self, **options: str) -> ObjectBlobs:
        return ObjectBlobs(self.url, {**self.options, **options})

    def unfinished(self) -> list[str]:
        """The keys whose parts are held without being a blob."""
        return self._keys("uploads", "Upload")

    def keys(self) -> list[str]:
        return self._keys("list-type=2", "Contents")

    def _keys(self, query: str, noun: str) -> list[str]:
        with urllib.request.urlopen(f"{self.endpoint}/{self.name}?{query}") as answer:
            tree = ElementTree.fromstring(answer.read())
        return [entry.findtext(f"{TAG}Key") or "" for entry in tree.iter(f"{TAG}{noun}")]


def fresh_bucket() -> Bucket:
    """An empty bucket."""
    bucket = Bucket(object_store(), f"bucket-{next(NAMES)}")
    put = urllib.request.Request(f"{bucket.endpoint}/{bucket.name}", method="PUT")
    urllib.request.urlopen(put).close()
    return bucket


@functools.cache
def object_store() -> str:
    """The address of the server. Its thread ends with the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        from moto.moto_server.werkzeug_app import (
            DomainDispatcherApplication,
            MotoRequestHandler,
            create_backend_app,
        )
        from werkzeug.serving import make_server
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a line for each request
    application = DomainDispatcherApplication(create_backend_app)
    server: Any = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, name="object-store", daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
